"""The eager module (csrc/eager.cpp) and the forward that repeats the one before (robust/repeat.py): the same numbers as without.

What both change is speed alone. So each test does the same with them and without them, and compares every bit.
"""

import copy
import ctypes
import gc
import itertools
import math
import os
import pickle
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import absgd_fast as ab
from absgd_fast import _backend, ops
from absgd_fast.functional import logit_loss
from absgd_fast.ops import OPERATORS
from absgd_fast.optim import planned_step
from absgd_fast.robust import paths

pytestmark = pytest.mark.skipif(_backend.eager() is None, reason=f"no eager module: {_backend.why_not_eager()}")
ROWS, CLASSES = 12, 7
TARGET = torch.arange(ROWS) % CLASSES


def test_the_build_has_it():
    """Where the kernels were built with Python's headers, the module must not be missing without anybody noticing."""
    assert _backend.build_info()["host"] and _backend.report()["eager module"] == {"available": True, "reason": None}


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(environment="0"), "ABSGD_FAST_EAGER=0"),
        (dict(torch="2.99.0"), "it was built beside torch 2.99.0"),
        (dict(library="_host"), "the CPU library lends it no kernels"),
    ],
    ids=["left out", "another torch", "another library"],
)
def test_why_it_is_not_here(change, reason, monkeypatch):
    if "torch" in change:
        monkeypatch.setattr(_backend, "build_info", lambda: {"torch": change["torch"]})
    elif "library" in change:
        other = _backend.host().__file__
        monkeypatch.setattr(ctypes, "CDLL", lambda path, load=ctypes.CDLL: load(other))
    else:
        monkeypatch.setenv("ABSGD_FAST_EAGER", change["environment"])
    assert reason in _backend.why_not_eager.__wrapped__()


# ---- the same numbers ------------------------------------------------------------------------------------------------


def logits_of(dtype=torch.float32, seed=0, leaf=True):
    x = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_(leaf)


def both_ways(run, monkeypatch):
    """run() with the eager module, and without it."""
    found = run()
    with monkeypatch.context() as patch:
        patch.setattr(OPERATORS["cpu"], "eager", None)
        return found, run()


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def gradient(loss_of, x, upstream=1.0):
    loss = loss_of(x)
    loss.backward(torch.full_like(loss, upstream))
    return [loss.detach(), x.grad]


def kept_graph(loss_of, x):
    loss = loss_of(x).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    return [loss.detach(), first, x.grad]


def second(loss_of, x):
    (first,) = torch.autograd.grad(loss_of(x).sum(), x, create_graph=True)
    return [first.detach(), *torch.autograd.grad(first.square().sum(), x)]


def inner(loss_of, x):
    """The logits are no leaf, and are changed in place after the loss."""
    z = x * 1.5
    loss = loss_of(z).sum()
    with torch.no_grad():
        z.zero_()
    loss.backward()
    return [loss.detach(), x.grad]


def second_of_inner(loss_of, x):
    return second(lambda leaf: loss_of(leaf * 1.5), x)


def upstream_rows(loss_of, x):
    loss = loss_of(x)
    loss.backward(torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape))
    return [loss.detach(), x.grad]


def saved_elsewhere(loss_of, x):
    with save_on_cpu():
        return gradient(loss_of, x)


def checkpointed(loss_of, x):
    return gradient(lambda leaf: checkpoint(loss_of, leaf, use_reentrant=False), x)


RUNS = {f.__name__: f for f in (kept_graph, second, inner, second_of_inner, upstream_rows, saved_elsewhere, checkpointed)} | {
    "gradient": gradient,
    "times 3": partial(gradient, upstream=3.0),
}
FORMS = {
    "ABLoss": lambda dtype: partial(ab.ABLoss(lam=0.7, mix=0.2).to(dtype), target=None),
    "smoothing": lambda dtype: partial(ab.ABLoss(ab.CrossEntropy(label_smoothing=0.1), lam=0.7).to(dtype), target=None),
    "VS": lambda dtype: partial(ab.ABLoss(ab.VS([50, 40, 30, 20, 10, 5, 2]), lam=0.7).to(dtype), target=None),
    "losses": lambda dtype: partial(ab.CrossEntropy().to(dtype), target=None),
    "functional": lambda dtype: partial(logit_loss, target=None),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_numbers(dtype, form, run, monkeypatch):
    def again():
        function = FORMS[form](dtype).func
        return RUNS[run](lambda x: function(x, TARGET), logits_of(dtype))

    same(*both_ways(again, monkeypatch))


def test_it_serves():
    """The node is the one of C++, for a leaf and for logits of a model."""
    for x in (logits_of(), logits_of() * 1):
        assert ab.ABLoss(lam=1.0)(x, TARGET).grad_fn.name() == "KnownGradientBackward"


def test_a_second_backward_without_the_graph_is_torchs_error():
    x = logits_of()
    loss = ab.ABLoss(lam=1.0)(x * 1, TARGET)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_leaf_that_was_changed_has_no_second_derivative():
    x = logits_of()
    loss = ab.ABLoss(lam=1.0)(x, TARGET)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_the_gradient_becomes_the_leafs():
    """No copy: the buffer that the forward pass wrote is the gradient of a leaf (the memory of one gradient)."""
    x = logits_of()
    loss = ab.ABLoss(lam=1.0)(x, TARGET)
    seen = []
    x.register_hook(lambda g: seen.append(g.data_ptr()))
    loss.backward()
    assert x.grad.data_ptr() == seen[0]


def test_compiled_autograd(monkeypatch):
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    layer = torch.nn.Linear(4, CLASSES)
    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))

    def run():
        layer.zero_grad()
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
            ab.ABLoss(lam=1.0)(layer(x), TARGET).backward()
        return [layer.weight.grad.clone()]

    found, expected = both_ways(run, monkeypatch)
    torch.testing.assert_close(found, expected)


# ---- who else wants to see the operators ---------------------------------------------------------------------------------


def test_a_dispatch_mode_sees_the_operator():
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    criterion, x = ab.ABLoss(lam=1.0), logits_of()
    criterion(x, TARGET)
    with Log():
        criterion(x, TARGET)
    assert "absgd_fast.robust_logit_loss.default" in seen


def test_a_function_mode_does_not_stop_it():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    criterion, other, x = ab.ABLoss(lam=1.0), ab.ABLoss(lam=1.0), logits_of()
    criterion(x, TARGET), other(x, TARGET)
    with Mode():
        found = criterion(x, TARGET)
    same([found], [other(x, TARGET)])


def test_a_profile_names_the_operator():
    x = logits_of()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ab.ABLoss(lam=1.0)(x, TARGET)
    assert "absgd_fast::robust_logit_loss" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("rows, classes, alone", [(64, 10, True), (4096, 2000, False)], ids=["small", "large"])
def test_other_threads_run_beside_a_large_batch(rows, classes, alone):
    """A forward of a large batch lets go of the interpreter, as torch's operators do.

    The small batch shows that the count of the other thread stands still where nothing lets go. Threads of other tests
    may let this one in at any time, so one quiet call of five is enough there.
    """
    criterion, x = ab.ABLoss(lam=1.0), torch.randn(rows, classes, requires_grad=True)
    operator = criterion.operators_for(x).eager.robust_logit_loss
    given = (x, torch.zeros(rows, dtype=torch.long), None, None, 0.0, 0.0, -100, None, None, None)
    operands, count, stop = criterion.operands(True, ops.WITH_GRAD), itertools.count(), threading.Event()
    seen = [0]

    def tick():
        while not stop.is_set():
            seen[0] = next(count)

    def moved():
        before = seen[0]
        operator(*given, *operands, (abs,))
        return seen[0] != before

    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.5)  # so that nobody takes the interpreter away from this thread during a call
    thread = threading.Thread(target=tick)
    gc.disable()  # a finaliser may let go of the interpreter
    thread.start()
    try:
        while not seen[0]:
            time.sleep(0.001)
        found = [moved() for _ in range(5)]
    finally:
        gc.enable()
        stop.set()
        sys.setswitchinterval(interval)
        thread.join()
    assert not all(found) if alone else all(found), found


def test_transforms_and_dual_numbers():
    criterion, x = ab.ABLoss(lam=1.0), logits_of()
    criterion(x, TARGET)  # leaves a Repeat
    expected = ab.ABLoss(lam=1.0).eval()
    with torch.no_grad():
        expected.log_s.copy_(criterion.log_s)
    found = torch.func.grad(lambda z: criterion(z, TARGET, update=False))(x.detach())
    torch.testing.assert_close(found, torch.func.grad(lambda z: expected(z, TARGET))(x.detach()))
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.func.grad(lambda z: criterion(z, TARGET))(x.detach())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach().clone().requires_grad_(), torch.ones_like(x))
        assert forward_ad.unpack_dual(criterion(dual, TARGET)).tangent is not None


# ---- a forward that repeats the one before -------------------------------------------------------------------------------


def test_the_second_forward_repeats(monkeypatch):
    """Otherwise the tests below would compare the usual way with itself."""
    criterion, x = ab.ABLoss(lam=1.0), logits_of()
    criterion(x, TARGET).backward()
    monkeypatch.setattr(paths, "_checks", None)  # the usual way would fail now
    criterion(x, TARGET).backward()
    with pytest.raises(AttributeError):
        criterion(x, TARGET.double())


def _in_place(name, value):
    return lambda c: getattr(c, name).fill_(value)


def _set(name, value):
    return lambda c: setattr(c, name, value)


def _of_criterion(name, value):
    return lambda c: setattr(c.criterion, name, value)


def _to_float64_and_back(criterion):
    criterion.double()
    criterion.float()


def _loaded(assign):
    def load(criterion):
        state = ab.ABLoss(lam=-2.0).state_dict()
        state["log_s"].fill_(0.25)
        criterion.load_state_dict(state, assign=assign)

    return load


# Everything that may change between two forwards of a training. Each returns None, or the criterion to go on with.
CHANGES = {
    "nothing": lambda c: None,
    "gamma": _set("gamma", 0.3),
    "alpha": _set("alpha", 0.5),
    "mix": _set("mix", 0.75),
    "max_weight": _set("max_weight", 1.25),
    "set_lam": lambda c: c.set_lam(-0.4),
    "set_lam TargetESS": lambda c: c.set_lam(ab.TargetESS(0.8)),
    "set_lam RelativeLam": lambda c: c.set_lam(ab.RelativeLam(0.5)),
    "lam in place": _in_place("lam", 3.0),
    "log_s in place": _in_place("log_s", 1.0),
    "log_s replaced": lambda c: setattr(c, "log_s", torch.tensor(0.5)),
    "eval": lambda c: c.eval(),
    "eval and train": lambda c: c.eval().train(),
    "report": _set("report", "mean"),
    "deferred": _set("deferred", True),
    "loss_divisor": _set("loss_divisor", 2),
    "process_group": _set("process_group", None),
    "backend": _set("backend", "reference"),
    "double": lambda c: c.double(),
    "double and float": _to_float64_and_back,
    "reset": lambda c: c.reset_parameters(),
    "load": _loaded(False),
    "load, assign": _loaded(True),
    "criterion": _set("criterion", ab.Focal()),
    "criterion of torch": lambda c: setattr(c, "criterion", torch.nn.CrossEntropyLoss(reduction="none")),
    "class weights": lambda c: c.criterion.set_weight([1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 1.0]),
    "the criterion's numbers": lambda c: setattr(c.criterion, "_numbers", ab.CrossEntropy(label_smoothing=0.2)._numbers),
    "the criterion's reduction": _of_criterion("reduction", "none"),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda c: pickle.loads(pickle.dumps(c)),
    "Ramp": lambda c: ab.Ramp(c, 0.5, 4).step(),
    "TwoStage": lambda c: ab.TwoStage(c, 0.5, 1).step(),
    "nonfinite_batches": lambda c: c._buffers.update(nonfinite_batches=torch.tensor(5)),
    "default dtype": lambda c: c.to(torch.bfloat16),
}


def forwards(criterion, usual):
    """The values, gradients and states of three forwards; usual: never by a repetition."""
    out = []
    for seed in range(3):
        if usual:
            criterion.memo.repeat = None
        x = logits_of(seed=seed)
        loss = criterion(x, TARGET)
        loss.backward()
        out += [loss.detach(), x.grad, criterion.log_s.clone(), criterion.lam.clone(), criterion.nonfinite_batches.clone()]
        out += [criterion.last.weights, criterion.last.losses]
    return out


def between_forwards(run):
    """run(criterion, usual) after some forwards gives the same with repetitions and without."""
    results = []
    for usual in (False, True):
        criterion = ab.ABLoss(lam=0.7)
        results.append(forwards(criterion, usual) + run(criterion, usual))
    same(*results)


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change):
    def run(criterion, usual):
        changed = CHANGES[change](criterion)
        return forwards(changed if change in ("deepcopy", "copy", "pickle") else criterion, usual)

    between_forwards(run)


def test_every_attribute_is_in_the_table_or_counts():
    """Setting any attribute of a criterion or of its loss ends the repetition, whatever the name."""
    criterion = ab.ABLoss(lam=0.7)
    for module in (criterion, criterion.criterion):
        for name in [*vars(module), "a new one"]:
            forwards(criterion, False)
            assert criterion.memo.repeat.changes == _changes()
            module.__setattr__(name, getattr(module, name, 0))
            assert criterion.memo.repeat.changes != _changes(), name


def _changes():
    from absgd_fast._exact import CHANGES as counted

    return counted.count


FORWARDS = {
    "mask": lambda c, x: c(x, TARGET, mask=torch.arange(ROWS) % 3 > 0),
    "sample_weight": lambda c, x: c(x, TARGET, sample_weight=torch.linspace(0, 2, ROWS)),
    "update": lambda c, x: c(x, TARGET, update=False),
    "no_grad": lambda c, x: torch.no_grad()(c)(x, TARGET),
    "logits without a gradient": lambda c, x: c(x.detach(), TARGET),
    "int32": lambda c, x: c(x, TARGET.int()),
    "soft": lambda c, x: c(x, torch.nn.functional.one_hot(TARGET, CLASSES).float()),
    "float64": lambda c, x: c(x.double(), TARGET),
    "images": lambda c, x: c(x.reshape(3, CLASSES, 4), TARGET.reshape(3, 4)),
    "fewer rows": lambda c, x: c(x[:5], TARGET[:5]),
    "no rows": lambda c, x: c(x[:0], TARGET[:0]),
    "ignored": lambda c, x: c(x, TARGET.masked_fill(TARGET == 2, -100)),
    "NaN": lambda c, x: c(x.index_fill(0, torch.tensor([1]), math.nan), TARGET),
    "autocast": lambda c, x: torch.autocast("cpu", torch.bfloat16)(c)(x, TARGET),
    "strided": lambda c, x: c(x.t().contiguous().t(), TARGET),
}


@pytest.mark.parametrize("kind", FORWARDS)
def test_another_forward_after_some(kind):
    """What a forward before has found out does not hold for a forward of another kind."""

    def run(criterion, usual):
        if usual:
            criterion.memo.repeat = None
        loss = FORWARDS[kind](criterion, logits_of(seed=9))
        seen = [loss.detach(), criterion.log_s.clone(), criterion.nonfinite_batches.clone(), criterion.last.weights]
        return seen + forwards(criterion, usual)

    between_forwards(run)


@pytest.mark.parametrize(
    "logits, target, error",
    [
        (lambda: logits_of(), lambda: TARGET + 3, IndexError),
        (lambda: logits_of(), lambda: TARGET[:5], ValueError),
        (lambda: logits_of()[0], lambda: TARGET, ValueError),
        (lambda: logits_of(), lambda: TARGET.bool(), TypeError),
    ],
    ids=["label out of range", "too few labels", "a vector", "bool"],
)
def test_errors_are_those_of_a_first_forward(logits, target, error):
    fresh, used = ab.ABLoss(lam=0.7), ab.ABLoss(lam=0.7)
    forwards(used, False)
    state = used.log_s.clone()
    messages = []
    for criterion in (fresh, used):
        with pytest.raises(error) as caught:
            criterion(logits(), target())
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and used.log_s == state


def test_nothing_is_kept_alive():
    """Neither the node nor what is remembered for the next forward keeps logits, a graph or the criterion alive."""
    import gc
    import weakref

    criterion, x = ab.ABLoss(lam=0.7), logits_of()
    z = x * 1
    loss = criterion(z, TARGET)
    loss.backward()
    seen = [weakref.ref(t) for t in (z, loss, criterion)]
    gc.collect()
    gc.disable()
    try:
        del z, loss, criterion
        assert [r() for r in seen] == [None] * 3
    finally:
        gc.enable()


# ---- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_steps_by_both_looks_at_tensors(dtype, monkeypatch):
    def run():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in ((3,), (2, 4), (), (5, 1), (0,))]
        params.append(torch.nn.Parameter(torch.randn(3, 4).to(dtype).t()))
        optimizer = ab.ABSGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            params[0].grad = None
            optimizer.step()
        return [p.detach() for p in params] + [torch.tensor([p._version for p in params])]

    found = run()
    monkeypatch.setattr(planned_step, "_eager", None)
    monkeypatch.setattr(planned_step, "_increment_version", torch.autograd.graph.increment_version)
    same(found, run())


@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "files",
    ["test_robust test_inputs test_logits_after_the_loss", "test_recomputation test_target", "test_optim_changes test_clipping"],
)
def test_without_the_eager_module(files):
    """The tests of what it serves, without it, on rows that hold every pair: an installation beside another torch has only
    that way."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not deep and not long"]
    done = subprocess.run(
        [*command, *(f"tests/{name}.py" for name in files.split())],
        cwd=os.path.dirname(os.path.dirname(__file__)),
        env=os.environ | {"ABSGD_FAST_EAGER": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
