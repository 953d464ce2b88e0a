"""The arguments of torch's optimizers: each has its name, place, default and effect, or is refused by name."""

import inspect
import pickle
import re

import pytest
import torch
from optim_cases import OPTIMIZERS, assert_same, make, set_grads, single, through_a_file

pytestmark = pytest.mark.usefixtures("one_thread")

# what API and docstrings add to torch's signatures, all of it keyword-only, and the default that differs
EXTRA = {
    "sgd": {"heavy_ball": False},
    "adam": {"paper_form": False},
    "adamw": {"paper_form": False},
    "rmsprop": {"fused": None},
    "adagrad": {},
}
OTHER_DEFAULT = {("sgd", "momentum"): 0.9}
# a value of each argument of torch's classes that is not its default
GIVEN = {
    "lr": 0.125,
    "momentum": 0.5,
    "dampening": 0.25,
    "weight_decay": 0.0625,
    "nesterov": True,
    "betas": (0.5, 0.75),
    "eps": 0.03125,
    "amsgrad": True,
    "alpha": 0.5,
    "centered": True,
    "lr_decay": 0.375,
    "initial_accumulator_value": 0.625,
    "maximize": True,
    "foreach": True,
    "capturable": True,
    "fused": True,
    "decoupled_weight_decay": True,
    "differentiable": False,  # True is refused
}
SHAPES = [(3,), (17, 5), ()]


def arguments(cls):
    """Name, kind and default of each argument but the parameters."""
    signature = inspect.signature(cls)
    return [(p.name, p.kind, p.default) for p in signature.parameters.values() if p.name != "params"]


def is_positional(kind):
    return kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


NAMES = [(name, argument) for name, (_, theirs, _) in OPTIMIZERS.items() for argument, *_ in arguments(theirs)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_signature(name):
    """Every argument of torch's class, with its default; the positional ones in torch's order. What is ours is keyword-only."""
    ours, theirs, _ = OPTIMIZERS[name]
    assert issubclass(ours, theirs)
    expected = [(n, kind, OTHER_DEFAULT.get((name, n), default)) for n, kind, default in arguments(theirs)]
    assert [a for a in arguments(ours) if is_positional(a[1])] == [a for a in expected if is_positional(a[1])]
    extra = EXTRA[name] | {"robust": None, "max_norm": None, "backend": None}
    expected += [(n, inspect.Parameter.KEYWORD_ONLY, default) for n, default in extra.items()]
    assert sorted(arguments(ours)) == sorted(expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_are_what_torch_keeps(name):
    ours, theirs, _ = OPTIMIZERS[name]
    changed = {n: value for (of, n), value in OTHER_DEFAULT.items() if of == name}
    assert ours(make()).defaults == theirs(make(), **changed).defaults | EXTRA[name]


@pytest.mark.parametrize("name, argument", NAMES)
@pytest.mark.parametrize("by", ["keyword", "position", "group"])
def test_each_argument_reaches_its_option(name, argument, by):
    """Under its name, at its place, and in a group of parameters, where it stands in the group and in checkpoints as torch's."""
    ours, theirs, _ = OPTIMIZERS[name]
    given = ({"momentum": 0.5} if name == "sgd" else {}) | {argument: GIVEN[argument]}  # nesterov wants momentum
    places = [n for n, kind, _ in arguments(theirs) if is_positional(kind)]
    if by == "position" and argument not in places:
        with pytest.raises(TypeError, match="positional"):
            ours(make(), *[GIVEN[n] for n in places], GIVEN[argument])
        return
    defaults = {n: default for n, _, default in arguments(theirs)}
    first = places[: places.index(argument) + 1] if by == "position" else []
    positional, rest = [given.get(n, defaults[n]) for n in first], {n: value for n, value in given.items() if n not in first}
    groups = []
    for cls in (ours, theirs):
        optimizer = cls([{"params": make()} | given]) if by == "group" else cls(make(), *positional, **rest)
        groups.append(optimizer.state_dict()["param_groups"][0])
    assert groups[0] == groups[1] | {n: groups[0][n] for n in EXTRA[name]}
    assert groups[0][argument] == GIVEN[argument]


# ---- values that are hints for torch, and what has an effect ---------------------------------------------------------

TENSOR = torch.tensor(0.02, dtype=torch.float64)
# options, of which classes, and the options of torch's class that give the same numbers on the CPU
HONOURED = [
    ("sgd adam adamw rmsprop adagrad", dict(foreach=True), {}),
    ("sgd adam adamw rmsprop adagrad", dict(foreach=False), {}),
    ("sgd adam adamw adagrad", dict(fused=True), {}),
    ("sgd adam adamw adagrad", dict(fused=False), {}),
    ("sgd adam adamw adagrad", dict(fused=False, foreach=True), {}),
    ("rmsprop", dict(fused=True), {}),
    ("adam adamw rmsprop", dict(capturable=True), {}),  # torch refuses it on the CPU, where nothing is captured
    ("adam adamw rmsprop", dict(capturable=True, foreach=True, lr=TENSOR), dict(lr=TENSOR)),
    ("adam", dict(decoupled_weight_decay=True, weight_decay=0.3), dict(decoupled_weight_decay=True, weight_decay=0.3)),
    ("sgd adam adamw rmsprop adagrad", dict(differentiable=False), {}),
]
ROWS = [
    pytest.param(n, options, plain, id="-".join([n, *(f"{key}={value}" for key, value in options.items())]))
    for names, options, plain in HONOURED
    for n in names.split()
]


def pair(name, options, plain, backend, way):
    """Our optimizer with the options, given in this way, torch's without them, and the parameters of both."""
    ours, theirs, _ = OPTIMIZERS[name]
    base = {"lr": 0.02} | ({"momentum": 0.9} if name == "sgd" else {})
    params, expected = make(SHAPES), make(SHAPES)
    other = single(theirs, expected, **base | plain)
    if way == "constructor":
        return ours(params, **base | options, backend=backend), other, params, expected
    if way == "group":
        optimizer = ours([{"params": params[:1], **options}], **base | plain, backend=backend)
        optimizer.add_param_group({"params": params[1:], **options})
        return optimizer, other, params, expected
    optimizer = ours(params, **base | plain, backend=backend)
    if way == "set":
        optimizer.param_groups[0].update(options)
    else:
        # torch's class may refuse the options at its step, but not in its groups
        checkpoint = theirs(make(SHAPES), **base | plain).state_dict()
        checkpoint["param_groups"][0].update(options)
        optimizer.load_state_dict(checkpoint)
    return optimizer, other, params, expected


@pytest.mark.parametrize("name, options, plain", ROWS)
@pytest.mark.parametrize("way", ["constructor", "group", "set", "loaded"])
def test_options_that_are_honoured(one_way, name, options, plain, way):
    """torch's numbers, however the option was given; it stays in the groups, in copies and in checkpoints both ways."""
    ours, theirs, _ = OPTIMIZERS[name]
    optimizer, other, params, expected = pair(name, options, plain, one_way, way)
    for step in range(3):
        set_grads(params, expected, seed=step)
        optimizer.step()
        other.step()
        assert_same(params, optimizer, expected, other)
    kept = {n: value for n, value in options.items() if n != "lr"}
    copied = ours(make(SHAPES), **kept)
    guest = theirs([{"params": group["params"]} for group in optimizer.param_groups])
    guest.load_state_dict(through_a_file(optimizer.state_dict()))
    back = ours(make(SHAPES)) if way != "group" else ours([{"params": make(SHAPES)[:1]}, {"params": make(SHAPES)[1:]}])
    back.load_state_dict(through_a_file(guest.state_dict()))
    for holder in (optimizer, copied, guest, back, pickle.loads(pickle.dumps(optimizer))):
        for group in holder.param_groups:
            assert {n: group[n] for n in kept} == kept


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_foreach_refuses_no_tensor_lr_in_mid_training(one_way, name):
    """torch's Adam does, because its foreach kernels cannot read one; ours can, in the first step and in the later ones."""
    params, expected = make(SHAPES), make(SHAPES)
    ours, theirs, _ = OPTIMIZERS[name]
    options = {"momentum": 0.9} if name == "sgd" else {}
    optimizer, other = ours(params, lr=0.1, foreach=True, backend=one_way, **options), single(theirs, expected, lr=0.1, **options)
    for step in range(3):
        for of in (optimizer, other):
            of.param_groups[0]["lr"] = torch.tensor(0.02 / (1 + step), dtype=torch.float64)
        set_grads(params, expected, seed=step)
        optimizer.step()
        other.step()
        assert_same(params, optimizer, expected, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", ["group", "set", "loaded"])
def test_differentiable_in_a_group_records_nothing(one_way, name, way):
    """As in torch, where the argument of the constructor decides.

    torch's Adam then computes its bias corrections in float32, so the numbers are compared with torch's class without the option.
    """
    optimizer, other, params, expected = pair(name, dict(differentiable=True), {}, one_way, way)
    _, of_torch, _, torchs = pair(name, {}, {}, one_way, "set")
    for group in of_torch.param_groups:
        group["differentiable"] = True
    for step in range(2):
        set_grads(params, expected, torchs, seed=step)
        for of in (optimizer, other, of_torch):
            of.step()
    assert_same(params, optimizer, expected, other)
    for ps, of in ((params, optimizer), (torchs, of_torch)):
        kept = [value for state in of.state.values() for value in state.values() if value is not None]
        assert not any(t.grad_fn is not None for t in (*ps, *kept)) and not any(t.requires_grad for t in kept)


# ---- what is refused ------------------------------------------------------------------------------------------------

TOGETHER = "`fused` and `foreach` cannot be `True` together."
# options, of which classes, and the words; None: those of torch's class
REFUSED = [
    (
        "sgd adam adamw rmsprop adagrad",
        dict(differentiable=True),
        "differentiable: got True, expected False.*torch.optim.{torch}",
    ),
    ("sgd adam adamw adagrad", dict(differentiable=True, fused=True), None),
    ("rmsprop", dict(differentiable=True, fused=True), "differentiable: got True, expected False"),
    ("sgd adam adamw adagrad", dict(foreach=True, fused=True), None),
    ("rmsprop", dict(foreach=True, fused=True), re.escape(TOGETHER)),
    ("adam adamw", dict(foreach=True, lr=torch.tensor(0.1)), None),
    ("adam adamw", dict(foreach=True, betas=(torch.tensor(0.9), torch.tensor(0.99))), None),
    ("sgd adagrad", dict(capturable=True), None),
    ("sgd adamw rmsprop adagrad", dict(decoupled_weight_decay=True), None),
]


@pytest.mark.parametrize(
    "name, options, words", [(n, options, words) for names, options, words in REFUSED for n in names.split()], ids=str
)
def test_options_that_are_refused(name, options, words):
    """With torch's type and words where torch's class refuses them too."""
    ours, theirs, _ = OPTIMIZERS[name]
    error = RuntimeError
    if words is None:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - ours is compared with it
            theirs(make(), **options)
        error = caught.type
        words = re.escape(str(caught.value).replace(f"{theirs.__name__}.", f"{ours.__name__}."))
    with pytest.raises(error, match=words.replace("{torch}", theirs.__name__)):
        ours(make(), **options)
    ours(make())  # the class is as it was
