"""Every optimizer of this package and torch's class of that name go through the same situations, with the same outcome.

tests/conformance_tensors.py, conformance_options.py and conformance_state.py have the situations. What differs on purpose
stands in `DIFFERENCES`, with its reason. One difference is everywhere: half-precision parameters have float32 states here, so
torch's class is given float32 parameters in their place (`World`).
"""

from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import conformance_options
import conformance_state
import conformance_tensors
import pytest
import torch
from conformance_world import ALL, SITUATIONS, World
from optim_cases import HALF, OPTIMIZERS

from absgd_fast import _backend

pytestmark = pytest.mark.usefixtures("one_thread")
assert conformance_options and conformance_state and conformance_tensors  # they fill SITUATIONS

# ---- what differs on purpose ------------------------------------------------------------------------------------------------

WAYS = ("planned", "lists", "reference")


class Difference(NamedTuple):
    situations: str  # a pattern of their names
    only: tuple[str, ...]  # optimizers
    instead: Any  # (old, new): torch's outcome of the situation with that part of the name; or a function of ours: is it right?
    reason: str
    ways: tuple[str, ...] = WAYS


def goes_on(outcome):
    """No exception anywhere, and no NaN."""
    if isinstance(outcome, (dict, list, tuple)):
        return all(map(goes_on, outcome.values() if isinstance(outcome, dict) else outcome))
    if isinstance(outcome, torch.Tensor):
        return not outcome.isnan().any()
    return not (isinstance(outcome, type) and issubclass(outcome, Exception) and not issubclass(outcome, Warning))


FLOATS = "Options are read by float(). torch's operators refuse some numbers, in some classes and in the step only."
INFERENCE = "Kernels write memory. No autograd can have saved an inference tensor, so nothing that anybody needs is overwritten."
CAPTURABLE = "The kernels step the same with it as without, so it changes nothing on the CPU, where torch refuses it."
DIFFERENTIABLE = "Refused by name at construction. torch refuses both in the first step."
OWN_FUSED = "torch's RMSprop has no fused=; here every class has both protocols of GradScaler."
COUNT = (
    "A count of another kind becomes the float32 tensor that kernels read. torch takes some kinds, in checkpoints or in steps."
)
NONE = "A missing state is a TypeError by name. In torch it is an AttributeError of None, or a TypeError."
FOREACH = "foreach chooses among torch's own implementations, which the kernels replace. torch's refuses a tensor lr."
DECAY = "torch rounds 1 - lr wd to the dtype of a tensor lr. Here a tensor lr gives the decay of the same number in float64."
COUNTING = ("adam", "adamw", "rmsprop", "adagrad")
COUPLED = ("sgd", "adam", "rmsprop", "adagrad")
DIFFERENCES = [
    Difference("lr is a number (fraction)", ("sgd", "rmsprop"), ("fraction", "numpy float32"), FLOATS),
    Difference("weight decay is a number (bool)", COUPLED, ("bool", "int"), FLOATS),
    Difference("weight decay is a number (fraction)", COUPLED, ("fraction", "numpy float32"), FLOATS),
    Difference("weight decay is a number (numpy 0-d array)", COUPLED, ("0-d array", "float32"), FLOATS),
    Difference("option is a tensor (weight_decay, one element)", COUPLED, ("one element", "float64"), FLOATS),
    Difference("option is a tensor (weight_decay, requires grad)", COUPLED[1:], ("requires grad", "float64"), FLOATS),
    Difference("option is a tensor (momentum, one element)", ("sgd",), ("one element", "float64"), FLOATS),
    Difference("option is a tensor (momentum, requires grad)", ("sgd",), ("requires grad", "float64"), FLOATS),
    Difference("option is a tensor (alpha, one element)", ("rmsprop",), ("one element", "float64"), FLOATS),
    Difference("option is a tensor (lr_decay, one element)", ("adagrad",), ("one element", "float64"), FLOATS),
    Difference("option is a tensor (dampening, one element)", ("sgd",), ("one element", "float64"), FLOATS),
    Difference("decay by a tensor lr (bf16)", ("adam", "adamw"), ("bf16", "float64"), DECAY),
    Difference("decay by a tensor lr (fp16)", ("adam", "adamw"), ("fp16", "float64"), DECAY),
    Difference("tensor lr and an option of the group (foreach=True)", ("adam", "adamw"), ("True", "False"), FOREACH),
    Difference(
        "mistakes (lr is nan, which only some refuse)",
        ("sgd",),
        lambda ours: ours == ("refused", ValueError),
        "torch's other classes refuse it; its SGD makes every parameter NaN.",
    ),
    Difference(
        "grad scaler that skips the first step fp32",
        ("sgd",),
        goes_on,
        "The next step counts as the first. torch's fused SGD leaves the momentum uninitialised (NaN in deterministic mode).",
    ),
    Difference(
        "grad scaler of float16",
        ALL,
        goes_on,
        "With float16 parameters the step unscales in its kernel, with float32 states; GradScaler refuses to do it itself.",
    ),
    Difference(
        "model becomes half precision fp32",
        ("adam", "adamw", "rmsprop"),
        goes_on,
        "float32 states are those that half-precision parameters have here.",
    ),
    Difference(
        "gradient is the parameter",
        ("adamw",),
        goes_on,
        "The gradient counts as it was before the step. torch's weight decay changes the parameter, so its gradient, first.",
    ),
    Difference(
        "parameter listed twice",
        ("sgd",),
        goes_on,
        "Both mentions share one momentum from the first step. torch gives each its own in the first step and keeps the last.",
    ),
    Difference("first step in a mode (inference_mode) fp32", ("sgd", "adam", "adamw", "rmsprop"), goes_on, INFERENCE, WAYS[:2]),
    Difference("parameters of inference mode", ALL, goes_on, INFERENCE, WAYS[:2]),
    Difference("*(capturable)", ("adam", "adamw", "rmsprop"), goes_on, CAPTURABLE),
    Difference("flags (capturable=True)", ("adam", "adamw", "rmsprop"), goes_on, CAPTURABLE),
    Difference("flags (foreach and capturable)", ("adam", "adamw", "rmsprop"), goes_on, CAPTURABLE),
    Difference("flags (foreach and differentiable)", ALL[1:], lambda ours: ours is RuntimeError, DIFFERENTIABLE),
    Difference("flags (fused=None)", ("rmsprop",), ("fused=None", "foreach=None"), OWN_FUSED),
    Difference("flags (fused=False)", ("rmsprop",), ("fused=False", "foreach=None"), OWN_FUSED),
    Difference("flags (fused=True)", ("rmsprop",), ("fused=True", "foreach=None"), OWN_FUSED),
    Difference("flags (fused and *)", ("rmsprop",), lambda ours: ours is RuntimeError, OWN_FUSED),
    Difference(
        "state replaced (one count for all)",
        ("adam", "adamw", "adagrad"),
        goes_on,
        "All counts rise before the parameters are updated. In torch each parameter sees another value of a count they share.",
        WAYS[:1],
    ),
    Difference(
        "a checkpoint shares memory bf16",
        ALL,
        lambda ours: ours[0] and not any(moved for of_p in ours[1] for name, moved in of_p.items() if name != "step"),
        "load_state_dict copies the states of half-precision parameters, where torch's rule would cast them.",
    ),
    Difference(
        "complex that is conjugated (as it is)",
        ALL[1:],
        ("as it is", "resolved"),
        "It moves as any other. torch's SGD moves it too; its other classes raise, because they view it as real numbers.",
    ),
    Difference("counts of steps (int64)", COUNTING, ("int64", "as it is"), COUNT, WAYS[:2]),
    Difference("counts of steps in the state (int64)", COUNTING, ("int64", "as it is"), COUNT, WAYS[:2]),
    Difference("counts of steps in the state (int)", COUNTING, ("(int)", "(as it is)"), COUNT),
    Difference("counts of steps in the state (float)", COUNTING, ("(float)", "(as it is)"), COUNT),
    Difference("checkpoint that was edited (none in the state)*", COUNTING[1:], lambda ours: ours is TypeError, NONE),
    Difference("state replaced (none for the first)*", COUNTING, lambda ours: ours is TypeError, NONE),
    Difference(
        "gradient that broadcasts",
        ("sgd", "adam", "adamw", "rmsprop"),
        lambda ours: ours is RuntimeError,
        "A gradient of another shape is a mistake. torch broadcasts it in the first step and raises in the second.",
    ),
    Difference(
        "conjugated gradient",
        ("adamw",),
        goes_on,
        "It is a gradient like any other. torch's AdamW raises, because it views it as real numbers.",
    ),
    Difference(
        "parameters that are not finite (inf)",
        ("adamw",),
        lambda ours: ours["params"][0].isfinite().sum() == 19,
        "Decay is w - lr wd w, as in docs/MATH.md, so an infinite weight becomes NaN. torch's w (1 - lr wd) keeps inf.",
    ),
]
OWN_OPTIONS = {
    "heavy_ball": "the paper's Eq. 2",
    "paper_form": "the paper's Eq. 9",
    "fused": OWN_FUSED,  # torch's other classes have it
}


def difference(situation, name, way):
    """What stands in the table about a situation of an optimizer."""
    for line in DIFFERENCES:
        if name in line.only and way in line.ways and fnmatchcase(situation, line.situations):
            return line
    return None


# ---- what is the same -------------------------------------------------------------------------------------------------------

# Relative to the largest number of a tensor (at most 10). Kernels and torch round the same formula in another order, a few times
# a step; the situations have up to ten steps.
TOLERANCE = {torch.float64: 1e-12, torch.complex128: 1e-12, torch.float32: 3e-6, torch.complex64: 3e-6}


def assert_same(where, ours, theirs, tolerance, half=None):
    """Raises AssertionError where two outcomes differ.

    tolerance: at least that of the dtype. half: the dtype of parameters for which torch's class got float32; their last digit may
    differ, because both are rounded.
    """
    if isinstance(theirs, torch.Tensor) and isinstance(ours, torch.Tensor):
        if half is not None:
            tolerance = max(tolerance, 3e-6)
            if ours.dtype == half and theirs.dtype == torch.float32:
                ours, tolerance = ours.float(), torch.finfo(half).eps
        for what in ("dtype", "shape", "device", "layout"):
            mine, other = getattr(ours, what), getattr(theirs, what)
            assert mine == other, f"{where}: {what} {mine} instead of {other}"
        if theirs.device.type != "meta":
            assert_near(where, ours, theirs, max(tolerance, TOLERANCE.get(theirs.dtype, 0)))
    elif all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (ours, theirs)):
        assert ours == theirs or (ours != ours and theirs != theirs), f"{where}: {ours!r} instead of {theirs!r}"
    else:
        assert type(ours) is type(theirs), f"{where}: {short(ours)} instead of {short(theirs)}"
        if isinstance(theirs, dict):
            assert ours.keys() == theirs.keys(), f"{where}: {list(ours)} instead of {list(theirs)}"
            for key in theirs:
                assert_same(f"{where}.{key}", ours[key], theirs[key], tolerance, half)
        elif isinstance(theirs, (list, tuple)):
            assert len(ours) == len(theirs), f"{where}: {len(ours)} instead of {len(theirs)}"
            for i, (a, b) in enumerate(zip(ours, theirs)):
                assert_same(f"{where}[{i}]", a, b, tolerance, half)
        else:
            assert ours == theirs, f"{where}: {ours!r} instead of {theirs!r}"


def short(outcome):
    """An exception, or what kind of outcome it is."""
    return f"a {type(outcome).__name__}" if isinstance(outcome, (dict, list, tuple, torch.Tensor)) else repr(outcome)


def assert_near(where, ours, theirs, tolerance):
    ours, theirs = (t.detach().to_dense().resolve_conj() for t in (ours, theirs))
    finite = theirs[theirs.isfinite()].abs()
    largest = min(10.0, float(finite.max())) if len(finite) else 0.0
    if not torch.allclose(ours, theirs, tolerance, tolerance * largest, equal_nan=True):
        raise AssertionError(f"{where}: {ours} instead of {theirs}")


def comparable(outcome, name):
    """Without the options that torch's class does not have."""
    if isinstance(outcome, dict):
        own = {option for option in OWN_OPTIONS if option != "fused" or name == "rmsprop"}
        return {key: comparable(value, name) for key, value in outcome.items() if key not in own}
    if isinstance(outcome, (list, tuple)):
        return type(outcome)([comparable(value, name) for value in outcome])
    return outcome


# ---- the tests --------------------------------------------------------------------------------------------------------------

OUTCOMES = {}  # of torch's classes, which all ways of ours are compared with


def theirs(situation, name):
    key = situation, name
    if key not in OUTCOMES:
        case = SITUATIONS[situation]
        OUTCOMES[key] = comparable(case.happens(World(name, OPTIMIZERS[name][1], case.dtype)), name)
    return OUTCOMES[key]


def runs_here(way):
    return way == "reference" or (_backend.available("cpu") and (way == "lists" or _backend.host() is not None))


def check(situation, name, way):
    """Raises AssertionError unless our outcome is torch's, or the one that the table of differences asks for."""
    case = SITUATIONS[situation]
    with pytest.MonkeyPatch.context() as patch:
        if way == "lists":
            patch.setattr(_backend, "host", lambda: None)
        backend = "reference" if way == "reference" else None
        ours = comparable(case.happens(World(name, OPTIMIZERS[name][0], case.dtype, backend=backend)), name)
    half = case.dtype if case.dtype in HALF else None
    differs = difference(situation, name, way)
    if differs is None:
        assert_same("", ours, theirs(situation, name), case.tolerance, half)
        return
    with pytest.raises(AssertionError):  # or the table has a line too many
        assert_same("", ours, theirs(situation, name), case.tolerance, half)
    if isinstance(differs.instead, tuple):
        assert_same("", ours, theirs(situation.replace(*differs.instead), name), case.tolerance, half)
    else:
        assert differs.instead(ours), differs.reason


def rows():
    """Each situation on each of the three ways, with another optimizer each; and all that differs on purpose, on one way each."""
    for i, (situation, case) in enumerate(SITUATIONS.items()):
        count = len(case.only)
        chosen = {case.only[(i + k) % count]: WAYS[(i // count + k) % 3] for k in range(3)}
        for name in case.only:
            way = next((way for way in WAYS if difference(situation, name, way)), None)
            if name in chosen or way is not None:
                marks = [pytest.mark.deep] if case.deep else []
                key = f"{situation.replace(' ', '_')}-{name}-{chosen.get(name, way)}"
                yield pytest.param(situation, name, chosen.get(name, way), marks=marks, id=key)


@pytest.mark.covering(1)
@pytest.mark.parametrize("situation, name, way", list(rows()))
def test_the_outcome_is_torchs(situation, name, way):
    if not runs_here(way):
        pytest.skip("built without kernels, or without the host module")
    check(situation, name, way)


@pytest.mark.deep
@pytest.mark.parametrize("situation", SITUATIONS)
def test_the_outcome_is_torchs_on_every_way(situation):
    wrong = {}
    for name in SITUATIONS[situation].only:
        for way in filter(runs_here, WAYS):
            try:
                check(situation, name, way)
            except Exception as error:  # all of them are shown
                wrong[name, way] = f"{type(error).__name__}: {error}"
    assert not wrong, "\n".join(f"{name} ({way}): {error}" for (name, way), error in wrong.items())


def test_the_table_of_differences():
    """Each line is about situations and optimizers that there are, and has its reason."""
    for line in DIFFERENCES:
        met = [s for s in SITUATIONS if fnmatchcase(s, line.situations)]
        assert met, line.situations
        assert all(name in SITUATIONS[s].only for s in met for name in line.only), line.situations
        assert line.reason.endswith("."), line.situations
