"""LinearABLoss against ABLoss on logits that are stored."""

import contextlib
import copy
import math
from pathlib import Path

import oracle
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from two_processes import RANKS, needs_gloo, run

import absgd_fast as ab
from absgd_fast import _backend, ops
from absgd_fast.functional import losses_and_validity
from absgd_fast.linear import products
from absgd_fast.reference import real_dtype

pytestmark = pytest.mark.usefixtures("one_thread")
native = pytest.mark.skipif(not _backend.available("cpu"), reason="the native library is not built here")
BACKENDS = ["reference", pytest.param("cpu", marks=native)]
# 150 rows in chunks of 40: the last is short; 100 classes are walked along, 10 are not (csrc/cpu/kernels.h kFewClasses)
N, D, CHUNK = 150, 12, 40
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}
CRITERIA = {
    "ce": lambda c: ab.CrossEntropy(),
    "weighted, smoothed": lambda c: ab.CrossEntropy(torch.linspace(0.5, 2, c), label_smoothing=0.1),
    "torch": lambda c: nn.CrossEntropyLoss(reduction="none"),
    "focal": lambda c: ab.Focal(),
    "gce": lambda c: ab.GCE(k=0.1, prune=True),
    "sce": lambda c: ab.SCE(),
    "ldam": lambda c: ab.LDAM(range(1, c + 1)),
    "vs": lambda c: ab.VS(range(1, c + 1)),
}
RULES = {
    "moving": dict(lam=0.5),
    "negative": dict(lam=-0.5, gamma=0.5, alpha=0.8, init="zero"),
    "batch": dict(lam=0.3, normalizer="batch"),
    "none": dict(lam=-1.0, normalizer="none", max_weight=0.7),
    "plain": dict(lam=math.inf),
    "large": dict(lam=1e-3),  # z in the thousands: the chunks lie far from each other
}


def inputs(classes=100, dtype=torch.float64, bias=True, seed=0, n=N):
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    tensors = [randn(n, D), randn(classes, D) * 0.5, randn(classes) if bias else None]
    hidden, weight, b = (t if t is None else t.to(dtype).requires_grad_() for t in tensors)
    target = torch.randint(classes, (n,), generator=draw)
    target[3::11] = -100
    return hidden, weight, b, target


def pair(criterion, dtype, backend=None, chunk=CHUNK, **rule):
    one = ab.LinearABLoss(copy.deepcopy(criterion), chunk=chunk, backend=backend, **rule)
    two = ab.ABLoss(copy.deepcopy(criterion), **rule)
    return (one.double(), two.double()) if dtype == torch.float64 else (one, two)


def gradients(loss, leaves, upstream=1.0):
    return torch.autograd.grad(upstream * loss, [t for t in leaves if t is not None and t.requires_grad])


def assert_close(got, wanted, tolerance, what=""):
    """Relative to the whole tensor: single elements of a gradient cancel."""
    for a, b in zip(got, wanted, strict=True):
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape and torch.equal(a.isnan(), b.isnan()), what
        error = (a - b).nan_to_num().norm() / b.nan_to_num().norm().clamp(min=1e-300)
        assert error <= tolerance, f"{what}: {error:.1e}"


def compare(one, two, given, target, tolerance, upstream=3.0, logits=F.linear, **rows):
    """one(the head) against two(its logits)."""
    hidden, weight, bias = given
    mine, theirs = one(hidden, weight, target, bias, **rows), two(logits(hidden, weight, bias), target, **rows)
    assert mine.dtype == theirs.dtype and mine.dim() == 0
    assert_close([mine], [theirs], tolerance, "loss")
    assert_close(gradients(mine, given, upstream), gradients(theirs, given, upstream), tolerance, "gradients")
    assert_close([one.last.weights, one.last.losses], [two.last.weights, two.last.losses], 10 * tolerance, "rows")
    torch.testing.assert_close(one.log_s, two.log_s, rtol=tolerance, atol=tolerance)
    assert one.nonfinite_batches == two.nonfinite_batches


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, bias, dtype, backend, monkeypatch):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)  # tests/test_linear_products.py has the other way
    if rule == "large" and dtype == torch.bfloat16:
        pytest.skip("the rounding of a bfloat16 logit is a factor of e^30 in a weight here")
    one, two = pair(ab.CrossEntropy(), dtype, backend, **RULES[rule])
    tolerance = TOLERANCE[dtype] * (300 if rule == "large" else 1)  # |z| is that many times as large
    for step in range(3):  # the state moves
        *given, target = inputs(dtype=dtype, bias=bias, seed=step)
        compare(one, two, given, target, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_losses(criterion, classes, backend):
    one, two = pair(CRITERIA[criterion](classes).double(), torch.float64, backend, lam=0.7)
    *given, target = inputs(classes)
    compare(one, two, given, target, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_soft_targets(backend):
    one, two = pair(ab.CrossEntropy(label_smoothing=0.1), torch.float64, backend, lam=0.7)
    *given, _ = inputs(10)
    compare(one, two, given, torch.rand(N, 10, dtype=torch.float64).softmax(1), 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 7, 150, 1000, None])
def test_any_chunk(chunk, backend):
    one, two = pair(ab.CrossEntropy(), torch.float64, backend, chunk=chunk, lam=0.5)
    *given, target = inputs()
    compare(one, two, given, target, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_belongs_to_rows(backend):
    one, two = pair(ab.CrossEntropy(), torch.float64, backend, lam=-0.5)
    *given, target = inputs()
    draw = torch.Generator().manual_seed(5)
    each = torch.rand(3, N, generator=draw, dtype=torch.float64)
    compare(one, two, given, target, 1e-12, sample_weight=each[0], mask=each[1] > 0.3, score=5 * each[2])
    before = one.log_s.clone()
    one(*given[:2], target, given[2], update=False)
    assert torch.equal(one.log_s, before)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all"])
@native
def test_frozen(frozen, monkeypatch):
    """A gradient that nobody wants is not computed."""
    one, two = pair(ab.CrossEntropy(), torch.float64, lam=0.5)
    *given, target = inputs()
    for name, t in zip(("hidden", "weight", "bias"), given):
        t.requires_grad_(frozen not in (name, "all"))
    if frozen == "all":
        assert not one(*given[:2], target, given[2]).requires_grad
        return
    compare(one, two, given, target, 1e-12)
    made = one(*given[:2], target, given[2]).grad_fn.grads
    assert [made.hidden is None, made.weight is None, made.bias is None] == [frozen == n for n in ("hidden", "weight", "bias")]


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_leaves_the_state(backend):
    one, two = pair(ab.CrossEntropy(), torch.float64, backend, lam=0.5)
    *given, target = inputs()
    compare(one, two, given, target, 1e-12)
    before = one.log_s.clone()
    one.eval(), two.eval()
    compare(one, two, given, target, 1e-12)
    one.train(), two.train()
    with torch.no_grad():
        assert_close([one(*given[:2], target, given[2])], [two(F.linear(given[0], *given[1:]), target)], 1e-12)
    assert torch.equal(one.log_s, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", [0, 41, 149])  # in the first chunk, the second, the last
def test_a_bad_row(place, backend):
    """NaN in its own gradient and in all of the weight's, as everywhere; the others' are as without it; the state stays."""
    one, two = pair(ab.CrossEntropy(), torch.float64, backend, lam=0.5)
    *given, target = inputs()
    compare(one, two, given, target, 1e-12)
    with torch.no_grad():
        given[0][place] = math.nan
    target[place] = 1
    before = one.log_s.clone()
    compare(one, two, given, target, 1e-12)
    assert torch.equal(one.log_s, before) and one.nonfinite_batches == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignored", [slice(0, 40), slice(40, 80), slice(None)], ids=["first chunk", "second", "all"])
def test_ignored_chunks(ignored, backend):
    one, two = pair(ab.CrossEntropy(), torch.float64, backend, lam=0.5)
    *given, target = inputs()
    target[ignored] = -100
    with torch.no_grad():
        given[0][ignored] = 7.0  # may hold anything
    compare(one, two, given, target, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    one, two = pair(ab.CrossEntropy(), torch.float64, backend, lam=0.5)
    *given, target = inputs(n=0)
    compare(one, two, given, target, 0.0)


@native
@pytest.mark.parametrize("lam", [0.5, -0.5])
def test_deferred(lam):
    """Micro-batches of chunks: the gradient of one batch."""
    one = ab.LinearABLoss(lam=lam, deferred=True, chunk=CHUNK).double()
    two = ab.ABLoss(lam=lam).double()
    for step in range(3):
        hidden, weight, bias, target = inputs(seed=step)
        for part in (slice(0, 90), slice(90, 91), slice(91, 91), slice(91, 150)):
            one(hidden[part], weight, target[part], bias).backward()
        assert one.finish_([hidden, weight, bias])
        wanted = gradients(two(F.linear(hidden, weight, bias), target), (hidden, weight, bias))
        assert_close([t.grad for t in (hidden, weight, bias)], wanted, 1e-12)
        torch.testing.assert_close(one.log_s, two.log_s, rtol=1e-12, atol=0)


@native
def test_relative_lam():
    one, two = ab.LinearABLoss(lam=ab.RelativeLam(0.3), chunk=CHUNK).double(), ab.ABLoss(lam=ab.RelativeLam(0.3)).double()
    *given, target = inputs()
    compare(one, two, given, target, 1e-11)
    torch.testing.assert_close(one.lam, two.lam, rtol=1e-14, atol=0)


@native
def test_dynamic_fine_tuning():
    """lam = -1 without a normaliser: every token counts by its own probability."""
    hidden, weight, _, target = inputs(bias=False)
    loss = ab.LinearABLoss(lam=-1.0, normalizer="none", chunk=CHUNK).double()(hidden, weight, target)
    losses = F.cross_entropy(hidden @ weight.t(), target, reduction="none")
    wanted = (losses.detach().neg().exp() * losses).sum() / (target >= 0).sum()
    assert_close([loss], [wanted], 1e-12)
    assert_close(gradients(loss, (hidden, weight)), gradients(wanted, (hidden, weight)), 1e-12)


@native
def test_graph_kept_for_another_backward():
    one, two = pair(ab.CrossEntropy(), torch.float64, lam=0.5)
    hidden, weight, bias, target = inputs()
    loss, stored = one(hidden, weight, target, bias), two(F.linear(hidden, weight, bias), target)
    wanted = gradients(stored, (hidden, weight, bias))
    for factor in (1.0, -2.0):
        got = torch.autograd.grad(factor * loss, (hidden, weight, bias), retain_graph=True)
        assert_close(got, [factor * g for g in wanted], 1e-12)
    loss.backward()
    with pytest.raises(RuntimeError, match="second backward|retain_graph"):
        loss.backward()


@native
def test_second_derivatives():
    hidden, weight, bias, target = inputs(10)
    with pytest.raises(RuntimeError, match="create_graph=True.*backend='reference'"):
        ab.LinearABLoss(lam=0.5).double()(hidden, weight, target, bias).backward(create_graph=True)
    stored = ab.LinearABLoss(lam=0.5, backend="reference").double()
    (grad,) = torch.autograd.grad(stored(hidden, weight, target, bias), hidden, create_graph=True)
    assert grad.square().sum().requires_grad


@native
def test_under_autocast(monkeypatch):
    """The head's tensors are brought to the dtype, and their gradients back to their own."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    one, two = pair(ab.CrossEntropy(), torch.float32, lam=0.5)
    *given, target = inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        compare(one, two, given, target, 2e-2)
        loss = one(*given[:2], target, given[2])
    assert [g.dtype for g in gradients(loss, given)] == [torch.float32] * 3


@native
def test_compiled_models_leave_the_graph_here():
    model = nn.Linear(D, D).double()
    one, two = pair(ab.CrossEntropy(), torch.float64, lam=0.5)
    _, weight, bias, target = inputs()
    x = torch.randn(N, D, dtype=torch.float64)

    def step(criterion, x):
        return criterion(model(x), weight, target, bias)

    loss = torch.compile(step, backend="eager")(one, x)
    assert_close([loss], [two(F.linear(model(x), weight, bias), target)], 1e-12)


@native
def test_logits_are_not_stored():
    """Only gradients are as large as a tenth of the logits, also inside the operators (seen by torch's profiler)."""
    n, classes = 2048, 1000
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(classes, 8, requires_grad=True)
    criterion = ab.LinearABLoss(lam=0.5, chunk=128)
    with torch.profiler.profile(profile_memory=True) as seen:
        criterion(hidden, weight, torch.arange(n) % classes).backward()
    largest = max(event.cpu_memory_usage for event in seen.events())
    assert 0 < largest <= 128 * classes * 4 < n * classes * 4 / 10


def shared_normaliser(rank, deferred):
    """Uneven ranks (the second has one row in the last step) and two micro-batches: the gradient of one batch of all rows."""
    one = ab.LinearABLoss(lam=0.5, chunk=CHUNK, deferred=deferred).double()
    two = ab.ABLoss(lam=0.5, process_group=None).double()
    for step in range(3):
        hidden, weight, bias, target = inputs(seed=step)
        end = 149 if step == 2 else 100
        for part in [[slice(0, 70), slice(70, end)], [slice(end, end + 1), slice(end + 1, 150)]][rank][: 2 if deferred else 1]:
            part = part if deferred else [slice(0, end), slice(end, 150)][rank]
            one(hidden[part], weight, target[part], bias).backward()
        if deferred:
            assert one.finish_([weight, bias])
        for t in (weight, bias):
            torch.distributed.all_reduce(t.grad)
        wanted = gradients(two(F.linear(hidden, weight, bias), target), (weight, bias))
        assert_close([weight.grad / RANKS, bias.grad / RANKS], wanted, 1e-12)
        torch.testing.assert_close(one.log_s, two.log_s, rtol=1e-12, atol=0)


@native
@needs_gloo
@pytest.mark.parametrize("deferred", [False, True])
def test_two_processes(tmp_path, deferred):
    run(shared_normaliser, tmp_path, deferred)


BAD = {
    "hidden": (dict(hidden=torch.ones(3, 4, 5)), ValueError, r"hidden \(3, 4, 5\) and linear_weight \(10, 4\)"),
    "weight": (dict(linear_weight=torch.ones(10, 5)), ValueError, r"hidden \(3, 4\) and linear_weight \(10, 5\)"),
    "bias": (dict(bias=torch.ones(9)), ValueError, r"bias: got shape \(9,\), expected \(10,\)"),
    "dtype": (
        dict(linear_weight=torch.ones(10, 4).double()),
        TypeError,
        "linear_weight: got torch.float64, but hidden is torch.float32",
    ),
    "module": (
        dict(linear_weight=torch.nn.Linear(4, 10)),
        TypeError,
        r"linear_weight: got Linear, expected a tensor \(C, d\), such as head\.weight",
    ),
    "numbers": (dict(hidden=[1.0]), TypeError, r"hidden: got list, expected a tensor \(n, d\) or \(\.\.\., d\)$"),
    "flag": (dict(bias=True), TypeError, r"bias: got bool, expected a tensor \(C,\) or None"),
    "half": (dict(hidden=torch.ones(3, 4).half(), linear_weight=torch.ones(10, 4).half()), TypeError, "float16"),
    "target": (dict(target=torch.tensor([0, 1])), ValueError, "target"),
    "label": (dict(target=torch.tensor([0, 1, 10])), IndexError, "label 10 in row 2"),
    "mask": (dict(mask=torch.ones(3)), TypeError, "mask: got torch.float32, expected torch.bool"),
    "sample_weight": (dict(sample_weight=torch.ones(2)), ValueError, r"sample_weight: got shape \(2,\)"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, backend):
    wrong, error, message = BAD[name]
    criterion = ab.LinearABLoss(lam=0.5, backend=backend)
    given = dict(hidden=torch.ones(3, 4), linear_weight=torch.ones(10, 4), target=torch.tensor([0, 1, 2])) | wrong
    with pytest.raises(error, match=message):
        criterion(**given)
    assert criterion.log_s == -math.inf


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(mix=1.0), ValueError, "mix: got 1 with LinearABLoss, expected 0.*; use mix=0, or ABLoss on the logits"),
        (dict(max_weight=2.0), ValueError, "max_weight: got 2 with LinearABLoss"),
        (dict(chunk=0), ValueError, "chunk: got 0, expected a positive number of rows"),
        (dict(chunk=2.5), ValueError, "chunk: got 2.5"),
    ],
    ids=["mix", "max_weight", "no-chunk", "part-of-a-row"],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ab.LinearABLoss(lam=0.5, **options)


@native
def test_a_criterion_that_is_not_fused():
    with pytest.raises(TypeError, match="criterion: got function, expected one of the fused losses"):
        ab.LinearABLoss(lambda x, y: x.sum(1), lam=0.5)(torch.ones(3, 4), torch.ones(10, 4), torch.tensor([0, 1, 2]))


# ---- each row's own gradient, in place of the logits ------------------------------------------------------------------

ISAS = _backend.cpu_isas() if _backend.available("cpu") else []


def rows_of(case, classes, dtype):
    """Logits (35 rows: two whole tiles and a short one), labels, the spec of the loss. Every other label is likely. Row 3 is
    ignored and holds NaN."""
    draw = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(35, classes, generator=draw, dtype=torch.float64)
    target = torch.randint(classes, (35,), generator=draw)
    logits[range(0, 35, 2), target[::2]] += 9.0
    logits = logits.to(dtype)
    spec = case.module(classes, real_dtype(dtype)).spec(logits)
    target[3], logits[3] = spec.ignore_index, math.nan
    if spec.adjust is not None:
        spec = spec._replace(adjust=spec.adjust.to(real_dtype(dtype)))
    return logits, target, spec


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_gradient_in_place(isa, dtype, case):
    """Rows side by side; a tile of rows together; row by row."""
    before = _backend.set_cpu_isa(isa)
    try:
        for classes in (10, 100) if case.sparse else (10, 100, 2100):
            check_in_place(case, classes, dtype)
    finally:
        _backend.set_cpu_isa(before)


def check_in_place(case, classes, dtype):
    logits, target, spec = rows_of(case, classes, dtype)
    grad = logits.clone()
    losses, valid = ops.OPERATORS["cpu"].logit_loss_(grad, target, *spec)
    others = losses_and_validity(logits, target, spec, "cpu")
    assert torch.equal(losses, others[0]) and torch.equal(valid, others[1])
    kept = logits.double()
    kept[3] = 0.0
    exact, slopes = case.exact(kept, target.tolist(), **case.options(classes))
    ulp = 64 * torch.finfo(real_dtype(dtype)).eps
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(losses.double(), torch.tensor(exact), rtol=ulp, atol=ulp)
    torch.testing.assert_close(grad.double(), torch.tensor(slopes), rtol=ulp + rounding, atol=ulp / 8)
    counts = torch.tensor(case.valid(kept, target.tolist(), **case.options(classes)))
    assert torch.equal(valid, counts.to(valid.dtype)) and 1 <= (valid == 0).sum() < 35
    assert not grad[valid == 0].any()


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@native
def test_gradient_in_place_of_a_bad_row(soft, classes):
    """NaN stays in its row, which counts; every other has the gradient that it has without."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, classes, generator=draw)
    target = torch.rand(5, classes, generator=draw).softmax(1) if soft else torch.tensor([0, 1, 2, -100, 4])
    spec = ab.CrossEntropy(label_smoothing=0.1).spec(logits)
    grads = []
    for bad in (False, True):
        logits[1, 6] = math.nan if bad else 0.0
        grads.append(logits.clone())
        losses, valid = ops.OPERATORS["cpu"].logit_loss_(grads[-1], target, *spec)
        assert losses.isnan().tolist() == [False, bad, False, False, False]
        assert valid.tolist() == ([1] * 5 if soft else [1, 1, 1, 0, 1])
    assert grads[1][1].isnan().all()
    assert torch.equal(grads[0][[0, 2, 3, 4]], grads[1][[0, 2, 3, 4]])
    if soft:
        _, slopes = oracle.soft_cross_entropy(logits.nan_to_num().double(), target, label_smoothing=0.1)
        torch.testing.assert_close(grads[0].double(), torch.tensor(slopes), rtol=1e-5, atol=1e-6)


@native
def test_what_has_no_gradient_in_place():
    spec = ab.CrossEntropy().spec(torch.zeros(2, 3))
    for wrong in (torch.zeros(2, 3).half(), torch.zeros(3, 2).t(), torch.zeros(2, 3, 4)):
        target = torch.zeros(wrong.shape[:1] + wrong.shape[2:], dtype=torch.int64)
        with pytest.raises(RuntimeError, match="logit_loss_: expected contiguous logits"):
            ops.OPERATORS["cpu"].logit_loss_(wrong, target, *spec)


@native
def test_masked_rows_hold_anything():
    """Hidden rows whose logits overflow, and labels out of range: as if the rows were not there; with soft targets too."""
    hidden, weight, bias, target = inputs(10)
    mask = torch.arange(N) % 5 != 1
    with torch.no_grad():
        weight[4] *= 1e200
        hidden[mask] *= 1e-200
        hidden[~mask] = 1e200
    for soft in (False, True):
        y = torch.rand(N, 10, dtype=torch.float64).softmax(1) if soft else target.where(mask, 77)
        one, two = (ab.LinearABLoss(lam=0.5, chunk=CHUNK).double() for _ in range(2))
        got = gradients(one(hidden, weight, y, bias, mask=mask), (weight, bias))
        assert_close(got, gradients(two(hidden[mask], weight, y[mask], bias), (weight, bias)), 1e-12)


@native
def test_a_bad_label_is_named_by_its_row():
    """In the second chunk: counted over the whole target; and the state stays."""
    hidden, weight, bias, target = inputs(10)
    target[45] = 10
    one = ab.LinearABLoss(lam=0.5, chunk=CHUNK).double()
    with pytest.raises(IndexError, match="label 10 in row 45 "):
        one(hidden, weight, target, bias)
    assert one.log_s == -math.inf


class Counter(TorchDispatchMode):
    """Calls of every operator, by name."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, chunks", [(4001, 8), (700, 3)])  # at least 256 rows
def test_a_gpu_is_not_waited_for(rows, chunks, dtype, monkeypatch):
    """On `meta` tensors, which have no numbers to look at: the operators of a GPU, in eight chunks, with sums in float32."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # neither knows `meta`
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    criterion = ab.LinearABLoss(lam=0.5).to("meta")
    criterion._served = torch.device("meta"), ops.OPERATORS["cuda"]
    hidden, weight, bias = (torch.empty(n, dtype=dtype, device="meta", requires_grad=True) for n in ((rows, 6), (50, 6), (50,)))
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    each = torch.empty(rows, device="meta")
    sums = products.adds_in_float32(hidden.device) and dtype == torch.bfloat16  # in torch 2.11 not on `meta`; asked before, once
    with Counter() as seen:
        criterion(hidden, weight, target, bias, mask=each > 0, sample_weight=each).backward()
    assert seen.calls.count("absgd_fast.logit_loss_.default") == chunks
    of_dtype = [name for name in seen.calls if "addmm" in name and "out" in name and "dtype" in name]
    assert len(of_dtype) == (2 * chunks if sums else 0)
    assert [t.grad.shape for t in (hidden, weight, bias)] == [t.shape for t in (hidden, weight, bias)]


@native
def test_benchmark(capsys, monkeypatch, tmp_path):
    """The small one of `make bench-linear`."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])  # benchmarks are no part of the package
    from benchmarks import linear

    assert (
        linear.main(["--rows", "600", "--width", "16", "--classes", "300", "--rounds", "2", "--out", str(tmp_path / "x.json")])
        == 0
    )
    assert "of the logits" in capsys.readouterr().out and (tmp_path / "x.json").exists()
