"""The Triton kernels on CPU tensors in Triton's interpreter, against the float64 oracle and the public API.

test_kernels.py runs this file with TRITON_INTERPRET=1, which must be set before triton is imported. A program costs
milliseconds here, so sizes are the smallest that meet a branch or a tail: a tile of 10 classes is 64 rows, blocks are 8, 32,
1024, 2048 or 4096 elements.
"""

import math
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import absgd_fast as ab
from absgd_fast import ops, reference
from absgd_fast.compat.repository import Focal as Repository
from absgd_fast.functional import logit_loss as public_logit_loss
from absgd_fast.functional import weighted_momentum_step_
from absgd_fast.kernels import launch, losses, step, weighted, weights

INF, NAN = math.inf, math.nan
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
NORMALIZERS = {"moving": 0, "batch": 1, "none": 2}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where a row that is masked is NaN


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture(params=["one", "many"])
def launches(request, monkeypatch):
    """Up to 16384 losses in one launch; the same through the launches for more."""
    if request.param == "many":
        monkeypatch.setattr(launch, "ONE_LAUNCH", 0)


@pytest.fixture(autouse=True)
def counters_are_left_zero():
    yield
    assert not any(done.any() for done in launch._counters.values())


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def tolerance(dtype):
    """64 ulp: of the computation, and one rounding of the result."""
    rounding = torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0
    return 64 * torch.finfo(wide(dtype)).eps + rounding


def close(got, exact, rtol=0.0, atol=0.0, what=""):
    np.testing.assert_allclose(torch.as_tensor(got).detach().double().numpy(), exact, rtol=rtol, atol=atol, err_msg=what)


def make(shape, dtype=torch.float32, seed=0, scale=3.0):
    """Logits, labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return logits.to(dtype), torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)


def exact_of(logits, target, **options):
    values, grads = oracle.cross_entropy(oracle.rows(logits.double()), target.flatten().tolist(), **options)
    return values.reshape(target.shape), oracle.unrows(grads, logits.shape)


def fused(logits, target, upstream, weight=None, label_smoothing=0.0, ignore_index=-100, report=None):
    """Losses, gradient."""
    values, stats, _ = losses.logit_loss(
        logits, target, weight, None, label_smoothing, 0.0, ignore_index, kind=0, prune=False, with_stats=True, report=report
    )
    return values, losses.logit_loss_backward(logits, target, weight, None, label_smoothing, stats, upstream)


def test_parts():
    """A Python float in two float32: 48 bits of it; inf, and what float32 cannot hold, stays inf."""
    for x in (0.1, -1e-3, 1 / 3, 0.9, 1e30, 0.0):
        high, low = launch.parts(x)
        assert float(np.float32(high)) == high and float(np.float32(low)) == low and abs(x - high - low) <= abs(x) * 2**-47
    assert launch.parts(1.0, INF, -INF, 1e300) == (1.0, 0.0, INF, 0.0, -INF, 0.0, INF, 0.0)


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def class_weight(classes):
    return [0.5 + 1.5 * ((7 * c + 3) % 16) / 15.5 for c in range(classes)]


OPTIONS = {
    "plain": lambda c: {},
    "weight": lambda c: {"weight": class_weight(c)},
    "smooth": lambda c: {"label_smoothing": 0.1},
    "weight-smooth-ignore": lambda c: {"weight": class_weight(c), "label_smoothing": 0.3, "ignore_index": 0},
}
# rows x classes: one class; tiles of many rows with a tail, one block and one more; several blocks with a tail
SIZES = [(5, 1), (3, 2), (65, 10), (5, 33), (2, 1000), (3, 1025), (2, 4096), (2, 4097)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_sizes(dtype, options, index):
    for size in SIZES[:: 1 if index == torch.int64 else 3]:
        logits, target = make(size, dtype, seed=size[1])
        given = OPTIONS[options](size[1])
        exact, slopes = exact_of(logits, target, **given)
        if "weight" in given:
            given["weight"] = torch.tensor(given["weight"], dtype=wide(dtype))
        upstream = torch.linspace(-2, 1.5, size[0], dtype=wide(dtype))
        values, grad = fused(logits, target.to(index), upstream, **given)
        assert values.dtype == wide(dtype) and grad.dtype == dtype and grad.is_contiguous()
        tol = tolerance(dtype)
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype == torch.float16 else 0  # subnormal
        close(values, exact, tol, torch.finfo(wide(dtype)).eps, f"losses {size}")
        cancels = 8 * torch.finfo(wide(dtype)).eps if options == "smooth" or "ignore_index" in given else 0
        close(grad, slopes * upstream.double().numpy()[:, None], tol, max(tiny, cancels), f"gradient {size}")


LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced rows": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "sliced classes": lambda x: torch.stack([x, x + 1], 2).flatten(1, 2)[:, ::2],
    "wider row": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "offset of one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "permuted": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
}


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "weight-smooth"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 36), (1, 21), (4, 1), (3, 9, 8), (2, 17, 3, 4), (3, 5, 1, 1)], ids=str)
def test_layouts(layout, shape, smooth):
    """Multiples of 4 (loads of 16 bytes) and others; rows side by side have blocks of 8 classes. Labels, upstream: strided."""
    plain, target = make(shape)
    moved = LAYOUTS[layout](plain)
    assert torch.equal(moved, plain)
    options = {"weight": class_weight(shape[1]), "label_smoothing": 0.2} if smooth else {}
    exact, slopes = exact_of(plain, target, **options)
    if smooth:
        options["weight"] = torch.tensor(options["weight"])
    upstream = torch.linspace(-1, 2, 2 * target.numel())[::2].reshape(target.shape)
    strided = torch.stack([target, target * 0 - 7], -1)[..., 0]
    values, grad = fused(moved, strided, upstream, **options)
    tol = tolerance(torch.float32)
    close(values, exact, tol, 1e-7)
    close(grad, slopes * upstream.unsqueeze(1).double().numpy(), tol, 1e-6 if smooth else 1e-8)


def test_upstream():
    """One number, one expanded, one of each row; expanded logits (stride 0)."""
    logits, target = make((6, 5))
    _, slopes = exact_of(logits, target)
    for upstream in (torch.tensor(3.0), torch.tensor(3.0).expand(6), torch.full((6,), 3.0)):
        close(fused(logits, target, upstream)[1], 3 * slopes, 1e-5, 1e-8)
    for same in (logits[:1].expand(6, 5), logits[:, :1].expand(6, 5)):
        exact, slopes = exact_of(same, target)
        values, grad = fused(same, target, torch.tensor(1.0))
        close(values, exact, 1e-5)
        close(grad, slopes, 1e-5, 1e-8)


def test_rounded_once():
    """A loss scale times a gradient below float16's range: multiplied before it is rounded."""
    logits = torch.tensor([[18.0, 0.0]], dtype=torch.float16)  # p = 1.5e-8
    _, grad = fused(logits, torch.tensor([0]), torch.tensor(65536.0))
    close(grad[0, 1], 65536 * math.exp(-18) / (1 + math.exp(-18)), 2e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_extremes(smoothing):
    """p = 1 - 1e-6 (the label's gradient must not cancel), logits of +-80, of 1e4, equal ones; 10 classes and 4097."""
    for classes in (10, 4097):
        logits, _ = make((8, classes), seed=1)
        target = torch.zeros(8, dtype=torch.int64)
        logits[0, 0] = logits[0, 1:].logsumexp(0) + math.log(1e6)
        logits[1] = 80.0 * (-1.0) ** torch.arange(classes)
        logits[2] = -logits[1]
        logits[3:5] += torch.tensor([[1e4], [-1e4]])
        logits[5] = 7.0
        logits[6, 0], logits[7, 0] = -90.0, 90.0
        exact, slopes = exact_of(logits, target, label_smoothing=smoothing)
        values, grad = fused(logits, target, torch.tensor(1.0), label_smoothing=smoothing)
        close(values, exact, 1e-5, what=f"losses of {classes}")
        close(grad, slopes, 1e-5, 1e-6 if smoothing else 1e-38, what=f"gradient of {classes}")


@pytest.mark.parametrize("classes", [3, 4100])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_infinite_logits(classes, smoothing):
    """As torch: a class of -inf has p = 0; +inf, NaN, or nothing but -inf makes the row NaN. With 4100 classes the first
    block of row 0 holds nothing finite, and 0 would be no reference point for the rest."""
    logits = torch.zeros(6, classes)
    logits[0, :-2], logits[0, -2:] = -INF, -200.0
    logits[1, -1] = -INF  # the label
    logits[2] = -INF
    logits[3, 0] = INF
    logits[4, 1] = NAN
    logits[5, -1] = NAN
    target = torch.full((6,), classes - 1)
    leaf = logits.double().requires_grad_()
    exact = F.cross_entropy(leaf, target, reduction="none", label_smoothing=smoothing)
    values, grad = fused(logits, target, torch.tensor(1.0), label_smoothing=smoothing)
    close(values[:2], exact[:2].detach(), 1e-5)
    assert values[2:].isnan().all()
    if not smoothing:  # torch multiplies 0 by inf there
        (wanted,) = torch.autograd.grad(exact[:2].sum(), leaf)
        close(grad[:2], wanted[:2], 1e-5, 1e-12)
    assert grad[2:].isnan().all(1)[[0, 2, 3]].all()


@pytest.mark.parametrize("ignore_index", [-100, 2, -1])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("classes", [5, 4097])
def test_ignored_rows(ignore_index, smoothing, classes):
    """Loss 0 and gradient 0, whatever stands in the row."""
    logits, target = make((6, classes))
    target[target == ignore_index] = 0
    target[1] = target[4] = ignore_index
    logits[1] = NAN
    exact, slopes = exact_of(logits, target, ignore_index=ignore_index, label_smoothing=smoothing)
    values, grad = fused(logits, target, torch.ones(6), None, smoothing, ignore_index)
    close(values, exact, 1e-5)
    close(grad, slopes, 1e-5, 1e-7)


def test_ignored_rows_are_not_read(monkeypatch):
    """Neither in the forward pass (of many classes) nor in the backward pass."""
    from triton.runtime.interpreter import InterpreterBuilder

    read, load = [], InterpreterBuilder.create_masked_load
    monkeypatch.setattr(
        InterpreterBuilder, "create_masked_load",
        lambda self, p, mask, *a: (read.append(int(np.sum(mask.data))), load(self, p, mask, *a))[1],
    )  # fmt: skip
    for ignored in (0, 2):
        logits, target = make((4, 4097))
        target[:ignored] = -100
        read.clear()
        fused(logits, target, torch.tensor(1.0))
        assert 2 * (4 - ignored) * 4097 < sum(read) < 2 * (4 - ignored) * 4097 + 100


def test_labels_out_of_range(launches):
    """Treated as ignored; one is reported, without and with robust weights. 2^32 + 1 has 1 in its low half."""
    logits, target = make((70, 10))  # two programs
    for index, bad in ((torch.int64, 2**32 + 1), (torch.int32, 10), (torch.int64, -1)):
        labels = target.to(index).clone()
        labels[3] = -100
        clean = labels.clone()
        labels[[66, 69]], clean[[66, 69]] = bad, -100
        exact, slopes = exact_of(logits, clean)
        for some, wanted in ((clean, [0, 0, 0, 0]), (labels, [bad, 66, 10, 1])):
            report = torch.zeros(4, dtype=torch.int64)
            values, grad = fused(logits, some, torch.tensor(1.0), report=report)
            assert report.tolist() == wanted
            close(values, exact, 1e-5)
            close(grad, slopes, 1e-5, 1e-8)
            fused(logits, labels.flip(0), torch.tensor(1.0), report=report)  # an unread report stays
            assert report.tolist() == (wanted if wanted[3] else [bad, 0, 10, 1])
            report.zero_()
            loss, rows, grad, log_s, _ = robust(logits, some, log_s=0.3, report=report)
            assert report.tolist() == wanted and rows[2].sum() == 67
            again = robust(logits, clean, log_s=0.3)
            assert all(map(torch.equal, (loss, rows, grad, log_s), again))


def test_labels_out_of_range_where_no_kernel_can_report(monkeypatch):
    """On Intel's GPUs: ignored, without a report and without an error."""
    monkeypatch.setattr(ops, "_kernels_can_report", lambda: False)
    logits, target = make((5, 3))
    bad, ignored = target.clone(), target.clone()
    bad[2], ignored[2] = 3, -100
    assert torch.equal(public_logit_loss(logits, bad, backend="triton"), public_logit_loss(logits, ignored, backend="triton"))
    values = []
    for labels in (bad, ignored):
        x = logits.clone().requires_grad_()
        loss = ab.ABLoss(lam=0.5, backend="triton")(x, labels)
        loss.backward()
        values.append((loss.detach(), x.grad))
    assert all(map(torch.equal, *values)) and not values[0][1][2].any()
    assert not ops.reported_labels(check=True).any()


@pytest.mark.parametrize("cuda, xpu, can", [(False, False, True), (True, False, True), (True, True, True), (False, True, False)])
def test_which_kernels_can_report(monkeypatch, cuda, xpu, can):
    """The interpreter's, CUDA's and ROCm's; not those of a torch that has Intel's GPUs alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu)
    assert ops._kernels_can_report.__wrapped__() == can


def test_no_classes_and_no_rows():
    values, grad = fused(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert values.shape == (0,) and grad.shape == (0, 5)
    report = torch.zeros(4, dtype=torch.int64)
    target = torch.tensor([-100, 1])
    values, grad = fused(torch.zeros(2, 0), target, torch.zeros(2), label_smoothing=0.1, report=report)
    assert values.tolist() == [0, 0] and grad.shape == (2, 0) and report.tolist() == [1, 1, 0, 1]
    for shape in ((0, 5), (2, 0), (2, 3, 0)):
        target = torch.full((shape[0], *shape[2:]), -100)
        loss, rows, _, log_s, nonfinite = robust(torch.zeros(shape), target, log_s=0.7)
        assert loss == 0 and rows.shape == (3, *target.shape) and log_s.item() == pytest.approx(0.7) and nonfinite == 0
    assert losses.logit_loss(*make((2, 3)), None, None, 0.0, 0.0, -100, kind=0, prune=False, with_stats=False, report=None)[
        1
    ].shape == (0,)


# ---- robust weights ----------------------------------------------------------------------------------------------------


def state(log_s, lam, dtype):
    return torch.tensor(log_s, dtype=dtype), torch.tensor(0), torch.tensor(lam, dtype=dtype)


def numbers(gamma=0.9, alpha=1.0, mix=0.0, max_weight=None, normalizer="moving", init="first"):
    """Positional and keyword arguments of the kernels."""
    positional = gamma, alpha, mix, INF if max_weight is None else max_weight
    return positional, dict(normalizer=NORMALIZERS[normalizer], init_first=init == "first")


def robust(logits, target, log_s=-INF, lam=0.7, score=None, sample_weight=None, mask=None, update=True, upstream=1.0,
           weight=None, label_smoothing=0.0, report=None, state_dtype=None, **options):  # fmt: skip
    """loss, rows, gradient, log_s, nonfinite."""
    real = wide(logits.dtype)
    log_s, nonfinite, lam = state(log_s, lam, state_dtype or real)
    positional, flags = numbers(**options)
    loss, rows, stats = losses.robust_logit_loss(
        logits, target, weight, None, label_smoothing, 0.0, -100, score, sample_weight, mask, log_s, nonfinite, lam, *positional,
        **flags, kind=0, prune=False, update=update, with_stats=True, report=report,
    )  # fmt: skip
    grad = losses.logit_loss_backward(logits, target, weight, None, label_smoothing, stats, torch.tensor(upstream, dtype=real))
    return loss, rows, grad, log_s, nonfinite


def given(values, log_s=-INF, lam=0.7, score=None, sample_weight=None, mask=None, update=True, state_dtype=None, **options):
    """The same for losses that are given; the gradient is d loss / d losses."""
    log_s, nonfinite, lam = state(log_s, lam, state_dtype or values.dtype)
    positional, flags = numbers(**options)
    loss, rows, grad = weights.robust_loss(
        values, score, sample_weight, mask, log_s, nonfinite, lam, *positional, **flags, update=update, with_grad=True
    )
    return loss, rows, grad, log_s, nonfinite


STATES = {
    "first": dict(lam=0.7),
    "first, negative": dict(lam=-0.5),
    "init=zero": dict(lam=0.7, init="zero", gamma=0.4, alpha=0.6),
    "moving": dict(lam=-0.5, log_s=-0.75, gamma=0.3, alpha=0.8),
    "gamma=1": dict(lam=-0.5, log_s=-0.75, gamma=1.0),
    "batch": dict(lam=0.7, log_s=-0.75, normalizer="batch", alpha=0.7),
    "none": dict(lam=-1.0, log_s=0.0, normalizer="none"),
    "mix": dict(lam=-0.5, mix=0.3),
    "max_weight": dict(lam=0.7, max_weight=0.9),
    "inf": dict(lam=INF, log_s=-0.75, mix=0.3, max_weight=0.1),
    "-inf": dict(lam=-INF),
}
INPUTS = ["none", "mask", "sample_weight", "score"]
CASES = [(case, which) for j, case in enumerate(STATES) for which in (INPUTS[j % 4], "all")]


def per_row(which, shape, dtype):
    """sample_weight, mask, score, of which `which` are given."""
    n = math.prod(shape)
    out = dict(
        sample_weight=torch.linspace(-1, 2, n, dtype=dtype), score=torch.linspace(3, -1, n, dtype=dtype),
        mask=torch.arange(n) % 3 != 1,
    )  # fmt: skip
    return {k: v.reshape(shape) for k, v in out.items() if which in (k, "all")}


def expected(values, valid, case, inputs, dtype):
    """The oracle's forward on losses, from the state of `case`."""
    case = dict(case)
    exact = oracle.ABLoss(case.pop("lam"), **{k: v for k, v in case.items() if k != "log_s"})
    exact.log_s = case.get("log_s", exact.log_s)
    flat = {k: v.flatten().numpy() for k, v in inputs.items()}
    flat["mask"] = np.broadcast_to(valid, values.shape) & flat.get("mask", True)
    return exact(values, **flat), exact


@pytest.mark.parametrize(
    "kind, case, which",
    [("fp32", *c) for c in CASES] + [("fp64", *c) for c in CASES if "all" in c] + [("bf16", *c) for c in CASES[::5]],
)
def test_robust_logit_loss(kind, case, which, launches):
    """70 rows (two programs) with two ignored ones; class weights and smoothing where lambda < 0."""
    dtype, case = DTYPES[kind], STATES[case]
    shape = (70, 10) if dtype != torch.float64 else (5, 6, 2)
    logits, target = make(shape, dtype)
    target.view(-1)[[1, -1]] = -100
    both = {"weight": class_weight(shape[1]), "label_smoothing": 0.2} if case["lam"] < 0 else {}
    values, slopes = exact_of(logits, target, **both)
    inputs = per_row(which, target.shape, wide(dtype))
    forward, exact = expected(values.flatten(), (target != -100).flatten().numpy(), case, inputs, dtype)
    if both:
        both["weight"] = torch.tensor(both["weight"], dtype=wide(dtype))
    loss, rows, grad, log_s, nonfinite = robust(logits, target, upstream=-3.0, **case, **inputs, **both)
    tol = 1e-12 if dtype == torch.float64 else tolerance(torch.float32)
    floor = torch.finfo(wide(dtype)).eps
    valid = (target != -100) & inputs.get("mask", torch.tensor(True))
    close(loss, forward.loss, tol, floor)
    close(rows[0], np.where(valid, values, 0), tol, floor)
    close(rows[1].flatten(), forward.weights, 2 * tol)
    close(rows[2], valid)
    close(log_s, exact.log_s, tol, floor)
    factor = forward.grad.reshape(target.shape)
    close(grad, slopes * np.expand_dims(factor, 1) * -3, 2 * max(tol, torch.finfo(dtype).eps), 8 * floor)
    assert nonfinite == 0


def test_evaluation_leaves_the_state(launches):
    logits, target = make((70, 10))
    trained, evaluated = (robust(logits, target, log_s=0.25, update=update) for update in (True, False))
    assert all(map(torch.equal, trained[:3], evaluated[:3])) and trained[3] != 0.25 == evaluated[3]
    values = torch.linspace(0, 1, 5)
    trained, evaluated = (given(values, log_s=0.25, update=update) for update in (True, False))
    assert all(map(torch.equal, trained[:3], evaluated[:3])) and trained[3] != 0.25 == evaluated[3]


@pytest.mark.parametrize("case, which", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_robust_loss(case, which, dtype, launches):
    """1500 losses in one program of 2048 lanes, or in two of 1024; losses of both signs, and an infinite one that is masked."""
    case = STATES[case]
    values = torch.linspace(-1, 4, 1500, dtype=dtype)
    inputs = per_row(which, values.shape, dtype)
    if "mask" in inputs:
        values[1] = INF
    forward, exact = expected(values.numpy(), True, case, inputs, dtype)
    loss, rows, grad, log_s, nonfinite = given(values, **case, **inputs)
    tol = 1e-12 if dtype == torch.float64 else tolerance(dtype)
    floor = torch.finfo(dtype).eps
    mask = inputs.get("mask", torch.tensor(True))
    close(loss, forward.loss, tol, 4 * floor)
    close(rows[0], np.where(mask, values, 0))
    close(rows[1], forward.weights, tol)
    close(rows[2], np.broadcast_to(mask, 1500))
    close(grad, forward.grad, tol)
    close(log_s, exact.log_s, tol, floor)
    assert nonfinite == 0 and loss.shape == () and rows.shape == (3, 1500)


@pytest.mark.parametrize("count", [0, 1, 512, 513, 1024, 1025, 2049])
def test_counts(count, launches):
    values = torch.rand(count, dtype=torch.float64)
    forward, exact = expected(values.numpy(), True, dict(lam=-0.5), {}, None)
    loss, rows, grad, log_s, _ = given(values, lam=-0.5)
    close(loss, forward.loss, 1e-12)
    close(rows[1], forward.weights, 1e-12)
    close(grad, forward.grad, 1e-12)
    close(log_s, exact.log_s, 1e-12)


def test_many_losses():
    """More than one launch takes, by themselves and from logits (2 classes): 17 programs and more; (B, d1) rows."""
    values = torch.linspace(0, 5, 16500)
    forward, exact = expected(values.double().numpy(), True, dict(lam=0.7, log_s=0.2), {}, None)
    loss, rows, grad, log_s, _ = given(values.view(150, 110), log_s=0.2)
    tol = tolerance(torch.float32)
    for got, wanted in (
        (loss, forward.loss),
        (rows[1].flatten(), forward.weights),
        (grad.flatten(), forward.grad),
        (log_s, exact.log_s),
    ):
        close(got, wanted, tol)
    logits = torch.stack([torch.zeros(16500), values.expm1().log()], 1)  # cross-entropy of the first class: `values`
    logits[0, 1] = -INF
    logits = torch.stack([logits.view(150, 110, 2)[..., c] for c in (0, 1)], 1)
    loss, rows, _, log_s, _ = robust(logits, torch.zeros(150, 110, dtype=torch.int64), log_s=0.2)
    for got, wanted in ((loss, forward.loss), (rows[1].flatten(), forward.weights), (log_s, exact.log_s)):
        close(got, wanted, 4 * tol)


def test_programs_that_take_several_blocks(monkeypatch):
    """As beyond a million losses: 2 programs at most, 3 blocks each, the last one short."""
    monkeypatch.setattr(launch, "ONE_LAUNCH", 0)
    monkeypatch.setattr(launch, "MOST_PARTIALS", 2)
    values = torch.linspace(0, 5, 5500, dtype=torch.float64)
    values[5000] = NAN
    loss, rows, grad, log_s, nonfinite = given(values, log_s=0.2)
    keep = torch.arange(5500) != 5000
    wanted = expected(values[keep].numpy(), True, dict(lam=0.7, log_s=0.2), {}, None)[0]
    close(rows[1][keep], wanted.weights, 1e-12)
    assert loss.isnan() and grad[5000].isnan() and log_s == 0.2 and nonfinite == 1
    made, _, shares = weights.robust_weights(
        values, *state(0.2, 0.7, torch.float64)[::2], None, 0.9, 1.0, normalizer=0, init_first=True
    )
    d = torch.linspace(1, -1, 5500, dtype=torch.float64)
    got = weights.robust_weights_backward(made, d, torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.7), shares)
    w, d = made[keep], d[keep]
    close(got[keep], w * (d - 0.9 / 5499 * (w @ d)) / np.float32(0.7), 1e-12, 1e-14)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("entry", ["losses", "logits"])
def test_nonfinite_rows(bad, entry, launches):
    """The bad row keeps its NaN to itself; the state does not move; it counts only where the state would have moved."""
    values = torch.tensor([0.5, 1.0, 2.0, 0.25])
    valid = np.array([True, False, True, True])
    forward, _ = expected(values.double().numpy(), valid, dict(lam=0.7, log_s=0.2), {}, None)
    for update in (True, False):
        if entry == "losses":
            values[1] = bad
            loss, rows, grad, log_s, nonfinite = given(values, log_s=0.2, update=update)
            close(grad[valid], forward.grad[valid], 1e-6)
        else:
            logits = torch.stack([torch.zeros(4), torch.tensor([0.5, 1.0, 2.0, 0.25]).expm1().log()], 1)
            logits[1] = torch.tensor({NAN: [NAN, 0.0], INF: [-INF, 0.0], -INF: [INF, 0.0]}[bad])
            loss, rows, grad, log_s, nonfinite = robust(logits, torch.zeros(4, dtype=torch.int64), log_s=0.2, update=update)
        close(rows[1][valid], forward.weights[valid], 1e-5)
        assert rows[1][1].isnan() and rows[2].tolist() == [1, 1, 1, 1]
        assert grad[1].isnan().all() and grad[valid].isfinite().all() and not loss.isfinite()
        assert log_s == torch.tensor(0.2) and nonfinite == int(update)


def test_scores_and_losses_must_be_finite(launches):
    """The score also where |lam| = inf makes z = 0; the loss also where only the score is exponentiated."""
    for bad in (INF, NAN):
        score, values = torch.tensor([1.0, bad, 2.0, 3.0]), torch.tensor([1.0, 1.0, bad, 1.0])
        for lam in (INF, 0.7):
            _, rows, _, log_s, nonfinite = given(values, lam=lam, log_s=0.3, score=score)
            assert rows[1].isnan().tolist() == [False, True, True, False] and nonfinite == 1 and log_s == torch.tensor(0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64])
def test_state_precision(dtype, state_dtype, launches):
    """|z| of 1e39 fits float64 losses with a float64 state only; log_s and lam of either precision."""
    values = torch.tensor([0.0, 1.0], dtype=dtype)
    for lam, fits in ((1e-39, dtype == state_dtype == torch.float64), (2.0**-10, True)):
        if lam < 1e-38 and torch.float32 in (dtype, state_dtype):
            lam = 1e-38 if dtype == torch.float32 else 2.0**-127
            values = torch.tensor([0.0, 4.0], dtype=dtype)
        loss, rows, _, log_s, nonfinite = given(values, lam=lam, state_dtype=state_dtype)
        assert nonfinite == int(not fits) and rows[1][1].isnan() == (not fits)
        assert log_s.dtype == state_dtype


def test_state_in_two_parts(launches):
    """z = 1024 L: a float32 log s' alone would be off by 3e-5, and so would each weight. lam is a power of two: z is exact."""
    values = torch.tensor([0.99, 0.991, 0.992, 0.9893])
    forward, _ = expected(values.double().numpy(), True, dict(lam=2.0**-10), {}, None)
    _, rows, _, _, _ = given(values, lam=2.0**-10)
    close(rows[1], forward.weights, 1e-6)


def test_no_overflow(launches):
    """W <= n / (gamma alpha), whatever lambda and L; nothing but exp of numbers <= 0."""
    values = torch.tensor([0.0, 1e4, 1e4 - 1])
    forward, _ = expected(values.double().numpy(), True, dict(lam=0.5), {}, None)
    close(given(values, lam=0.5)[1][1], forward.weights, 1e-5)


@pytest.mark.parametrize("log_s", [-INF, 0.3])
@pytest.mark.parametrize("init", ["first", "zero"])
@pytest.mark.parametrize("lam", [0.8, -0.5, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_robust_weights(log_s, init, lam, dtype, launches):
    """Values and vjp against autograd through reference.py in float64; 1030 losses with masked ones."""
    values, mask = torch.linspace(-0.5, 3, 1030, dtype=dtype), torch.arange(1030) % 7 != 3
    log_s, _, lam = state(log_s, lam, dtype)
    flags = dict(normalizer=0, init_first=init == "first")
    made, new, shares = weights.robust_weights(values, log_s, lam, mask, 0.7, 0.6, **flags)
    leaf = values.double().requires_grad_()
    exact, state_after = reference.robust_weights(leaf, log_s.double(), lam.double(), gamma=0.7, alpha=0.6, init=init, mask=mask)
    tol = 1e-12 if dtype == torch.float64 else tolerance(dtype)
    close(made, exact.detach(), tol)
    close(new, state_after.detach(), tol)
    assert new.shape == () and new.dtype == dtype and log_s is not new
    d, u = torch.linspace(-1, 2, 1030, dtype=dtype), torch.tensor(1.5, dtype=dtype)
    grad = weights.robust_weights_backward(made, d, u, lam, shares)
    if exact.requires_grad:
        (wanted,) = torch.autograd.grad((exact * d).sum() + state_after * u, leaf)
        close(grad, torch.nan_to_num(wanted), tol, 64 * torch.finfo(dtype).eps)


def test_robust_weights_around_a_bad_row(launches):
    """Its own gradient is NaN, the others' are those of the batch without it, and log s', which stays, owes them nothing."""
    values = torch.tensor([0.5, NAN, 2.0], dtype=torch.float64)
    log_s, _, lam = state(0.2, 0.9, torch.float64)
    run = partial(weights.robust_weights, normalizer=0, init_first=True)
    made, new, shares = run(values, log_s, lam, None, 0.9, 1.0)
    d = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    grad = weights.robust_weights_backward(made, d, torch.tensor(7.0, dtype=torch.float64), lam, shares)
    clean, _, clean_shares = run(values[[0, 2]], log_s, lam, None, 0.9, 1.0)
    wanted = weights.robust_weights_backward(clean, d[[0, 2]], torch.tensor(0.0, dtype=torch.float64), lam, clean_shares)
    close(grad[[0, 2]], wanted, 1e-12)
    assert grad[1].isnan() and new == 0.2 and shares[1] == 0
    close(shares[0], 0.45, 1e-12)
    empty = torch.zeros(0, dtype=torch.float64)
    made, new, shares = run(empty, log_s, lam, None, 0.9, 1.0)
    assert made.shape == (0,) and new == 0.2 and shares.tolist() == [0, 0]
    assert weights.robust_weights_backward(empty, empty, log_s, lam, shares).shape == (0,)


# ---- rectified weights -----------------------------------------------------------------------------------------------


# one block of 512 and one more, which takes blocks of 2048; several of those with a tail
@pytest.mark.parametrize("count", [0, 1, 3, 17, 512, 513, 1000, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_rectified(count, dtype):
    u = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).to(dtype)
    if count > 500:
        u[2], u[count // 2], u[-1] = NAN, INF, -INF
    made = weights.rectified(u)
    assert made.dtype == dtype and made.shape == (count,)
    close(made, oracle.rectified(u), 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-13)
    assert not weights.rectified(-u.abs().nan_to_num()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_rectified_extremes(dtype):
    info = torch.finfo(dtype)
    for u in (info.smallest_normal * info.eps, info.smallest_normal, info.max):
        for count in (1, 3, 17, 1000):
            close(weights.rectified(torch.full((count,), u, dtype=dtype)), np.full(count, 1 / count), 2 * info.eps)
    mixed = torch.tensor([info.max, info.smallest_normal, -info.max, info.max], dtype=dtype)
    close(weights.rectified(mixed), [0.5, 0, 0, 0.5], 2 * info.eps, 1e-37)


# ---- gradient scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (1500,), (3, 5), (70, 3), (2, 1030), (2, 3, 4), (2, 3, 1100)], ids=str)
def test_scale(shape, dtype):
    """One number, one expanded, one of each row: a vector of losses, rows of classes, classes of inner positions."""
    grad = torch.linspace(-2, 2, math.prod(shape)).reshape(shape).to(dtype)
    rows = shape if len(shape) == 1 else (shape[0], *shape[2:])
    real = wide(dtype)
    each = torch.linspace(-1, 3, math.prod(rows), dtype=real).reshape(rows)
    tol, tiny = max(torch.finfo(dtype).eps, 1e-15), 6e-8 if dtype == torch.float16 else 0  # its smallest number
    for upstream in (
        torch.tensor(-0.3, dtype=real),
        torch.tensor(-0.3, dtype=real).expand(rows),
        each,
        torch.stack([each, each], -1)[..., 0],
    ):
        factor = upstream if len(shape) == 1 or upstream.dim() == 0 else upstream.unsqueeze(1)
        wanted = (grad.to(real) * factor).double().numpy()
        out = weights.scale(grad, upstream, False)
        assert out.dtype == dtype and out.data_ptr() != grad.data_ptr()
        close(out, wanted, tol, tiny)
        in_place = grad.clone()
        assert weights.scale_(in_place, upstream) is None
        assert torch.equal(in_place, out)
        if dtype == torch.float32:
            half = weights.scale(grad, upstream, True)
            assert half.dtype == torch.float16
            close(half, wanted, 1e-3, 1e-7)


def test_scale_by_one_touches_nothing(monkeypatch):
    """In place and by exactly 1: no element is stored. Otherwise each is."""
    from triton.runtime.interpreter import InterpreterBuilder

    stored, store = [], InterpreterBuilder.create_masked_store
    monkeypatch.setattr(
        InterpreterBuilder, "create_masked_store",
        lambda self, p, v, mask, *a: (stored.append(int(np.sum(mask.data))), store(self, p, v, mask, *a))[1],
    )  # fmt: skip
    for upstream, elements in ((1.0, 0), (2.0, 12)):
        stored.clear()
        weights.scale_(torch.ones(3, 4), torch.tensor(upstream))
        assert sum(stored) == elements
    weights.scale_(torch.zeros(0), torch.tensor(2.0))


# ---- steps -----------------------------------------------------------------------------------------------------------

FORMS = {
    "sgd": ("sgd", dict(lr=0.1)),
    "sgd decay": ("sgd", dict(lr=0.1, weight_decay=0.3)),
    "sgd momentum": ("sgd", dict(lr=0.1, momentum=0.9, weight_decay=0.01)),
    "sgd dampening": ("sgd", dict(lr=0.1, momentum=0.9, dampening=0.3, maximize=True)),
    "sgd nesterov": ("sgd", dict(lr=0.1, momentum=0.8, weight_decay=0.01, nesterov=True)),
    "sgd heavy ball": ("sgd", dict(lr=0.1, momentum=0.8, weight_decay=0.01, heavy_ball=True)),
    "adam": ("adam", dict(lr=0.1)),
    "adam decay": ("adam", dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3, maximize=True)),
    "adam without memory": ("adam", dict(lr=0.1, betas=(0.0, 0.0))),
    "amsgrad": ("adam", dict(lr=0.1, betas=(0.8, 0.5), amsgrad=True, weight_decay=0.01)),
    "adamw": ("adam", dict(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True)),
    "adamw amsgrad": ("adam", dict(lr=0.1, weight_decay=0.3, decoupled_weight_decay=True, amsgrad=True, maximize=True)),
    "paper form": ("adam", dict(lr=0.1, eps=1e-2, weight_decay=0.3, paper_form=True)),
    "rmsprop": ("rmsprop", dict(lr=0.1)),
    "rmsprop decay": ("rmsprop", dict(lr=0.1, alpha=0.5, eps=1e-3, weight_decay=0.3, maximize=True)),
    "rmsprop momentum": ("rmsprop", dict(lr=0.1, momentum=0.9)),
    "rmsprop centered": ("rmsprop", dict(lr=0.1, alpha=0.9, centered=True)),
    "rmsprop centered momentum": ("rmsprop", dict(lr=0.1, alpha=0.9, momentum=0.9, weight_decay=0.01, centered=True)),
    "adagrad": ("adagrad", dict(lr=0.1)),
    "adagrad decay": ("adagrad", dict(lr=0.1, lr_decay=0.2, eps=1e-3, weight_decay=0.3, maximize=True)),
}
FLAGS = dict(maximize=1, nesterov=2, heavy_ball=4, amsgrad=8, decoupled_weight_decay=16, paper_form=16 | 32, centered=64)
RULES = ("sgd", "adam", "rmsprop", "adagrad")  # in the order of csrc/math.h Rule
DEFAULTS = {  # of reference.py
    "sgd": dict(momentum=0.0, dampening=0.0),
    "adam": dict(betas=(0.9, 0.999), eps=1e-8),
    "rmsprop": dict(alpha=0.99, momentum=0.0, eps=1e-8),
    "adagrad": dict(lr_decay=0.0, eps=1e-10),
}
KEPT = {
    "sgd": lambda o: [o["momentum"] != 0],
    "adam": lambda o: [True, True, "amsgrad" in o],
    "rmsprop": lambda o: [True, o["momentum"] != 0, "centered" in o],
    "adagrad": lambda o: [True],
}


class Step:
    """What a step of `form` works on: parameters, gradients, kinds of states (zeros, or None), counts of steps."""

    def __init__(self, form, shapes, dtype=torch.float32, count=torch.float32, **options):
        self.rule, given = FORMS[form]
        self.options = DEFAULTS[self.rule] | given | options
        generator = torch.Generator().manual_seed(3)
        self.params, self.grads = (
            [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(2)
        )
        self.states = [
            [torch.zeros(s, dtype=wide(dtype)) for s in shapes] if kept else None for kept in KEPT[self.rule](self.options)
        ]
        self.steps = [] if self.rule == "sgd" else [torch.tensor(7.0 * j, dtype=count) for j in range(len(shapes))]

    def lists(self):
        return [self.params, self.grads, *(ts for ts in self.states if ts is not None), self.steps]

    def copy(self):
        return [[t.clone() for t in ts] for ts in self.lists()]

    def run(self, lr_tensor=None, grad_scale=None, found_inf=None, robust=None, **options):
        o = dict(weight_decay=0.0, eps=0.0) | self.options | options
        first, second = {
            "sgd": lambda: (o["momentum"], o["dampening"]),
            "adam": lambda: o["betas"],
            "rmsprop": lambda: (o["alpha"], o["momentum"]),
            "adagrad": lambda: (o["lr_decay"], 0.0),
        }[self.rule]()
        step.step_(
            self.params, self.grads, [t for ts in self.states if ts is not None for t in ts], self.steps, lr_tensor, grad_scale,
            found_inf, robust, o["lr"], o["weight_decay"], first, second, o["eps"], RULES.index(self.rule),
            sum(bit for name, bit in FLAGS.items() if o.get(name)),
        )  # fmt: skip

    def wanted(self, scale=1.0, **options):
        """The lists after the same step by reference.py, in float64."""
        options = {k: v for k, v in (self.options | options).items() if k not in ("amsgrad", "centered")}
        params, grads, *states, steps = (
            [None] * len(self.params) if ts is None else [t.double() for t in ts]
            for ts in (self.params, self.grads, *self.states, self.steps)
        )
        params, grads = [p.clone() for p in params], [g / scale for g in grads]
        states = [[None if t is None else t.clone() for t in ts] for ts in states]
        steps = [t.clone() for t in steps]
        function = {"sgd": reference.momentum_step_, "adam": reference.adam_step_, "rmsprop": reference.rmsprop_step_}.get(
            self.rule, reference.adagrad_step_
        )
        function(params, grads, *states, *([steps] if steps else []), **options)
        return [params, grads, *(ts for ts in states if ts[0] is not None), steps]

    def compare(self, wanted, scaled=False):
        tol = 1e-12 if self.params[0].dtype == torch.float64 else 1e-6
        for j, (got, exact) in enumerate(zip(self.lists(), wanted, strict=True)):
            for t, e in zip(got, exact, strict=True):
                half = t.dtype in (torch.bfloat16, torch.float16)
                rounding = torch.finfo(t.dtype).eps if half and (j == 0 or scaled) else 0  # the interpreter rounds to 0
                tiny = 6e-8 if t.dtype == torch.float16 else 0
                close(t, e, tol + rounding, tol + tiny)


def run_as(form, params, grads, **options):
    """One step from states of 0."""
    made = Step(form, [p.shape for p in params], params[0].dtype, **options)
    made.params, made.grads = params, grads
    made.run()
    return made


def step_twice(form, shapes, dtype):
    """With other gradients the second time. Counts start apart."""
    made = Step(form, shapes, dtype)
    for k in range(2):
        grads = made.grads = [g * (1 - 1.5 * k) for g in made.grads]
        before, wanted = [g.clone() for g in grads], made.wanted()
        made.run()
        made.compare(wanted)
        assert all(map(torch.equal, grads, before))
        assert [float(t) for t in made.steps] == [7 * j + k + 1 for j in range(len(made.steps))]


@pytest.mark.parametrize("form", FORMS)
def test_step(form, dtype):
    """Tensors of no and one element, one program and two; one launch for all."""
    step_twice(form, [(0,), (5, 3), (step._BLOCK[wide(dtype)] + 1,), ()], dtype)


@pytest.mark.parametrize("form", ["sgd nesterov", "amsgrad"])
def test_step_sizes(form, dtype):
    """Around one and two programs' elements."""
    block = step._BLOCK[wide(dtype)]
    step_twice(form, [(block - 1,), (1,), (block,), (0,), (2 * block - 1,), (2 * block,)], dtype)


@pytest.mark.parametrize("form", ["amsgrad", "rmsprop momentum", "adagrad decay"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_step_counts(form, dtype, monkeypatch):
    """In float32 and float64, one set of tensors having both; for more tensors than a program counts; far on."""
    monkeypatch.setattr(step, "_COUNT_BLOCK", 4)
    for count in (torch.float32, torch.float64, None):
        made = Step(form, [(j,) for j in range(9)], dtype, count or torch.float32)
        made.steps[3].fill_(1e5)
        if count is None:
            made.steps[::2] = [t.double() for t in made.steps[::2]]
        made.steps[5] = made.steps[5].view(1)
        types, wanted = [t.dtype for t in made.steps], made.wanted()
        made.run()
        made.compare(wanted)
        assert types == [t.dtype for t in made.steps] and made.steps[3] == 100001


def test_step_corrections_keep_their_digits():
    """1 - beta^t for t = 1, where beta in float32 has lost all but four digits of 1 - beta."""
    made = Step("adam", [(1,)], torch.float64, betas=(0.9999, 0.999999), eps=0.0, lr=1.0)
    before = made.params[0].clone()
    made.run()
    close(before - made.params[0], made.grads[0].sign(), 1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_step_with_infinite_weights(form):
    """0 * inf is no weight decay of 0."""
    weight = torch.tensor([INF])
    run_as(form, [weight], [torch.ones(1)], weight_decay=0.0)
    assert weight == INF


def test_step_amsgrad_keeps_a_nan():
    """And takes one from u."""
    made = Step("amsgrad", [(3,)])
    made.states[2][0][1] = NAN
    made.grads[0][2] = NAN
    made.run()
    assert made.states[2][0].isnan().tolist() == [False, True, True] == made.params[0].isnan().tolist()
    assert made.states[1][0].isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("sgd decay", "adam without memory")])
def test_step_with_device_numbers(form, dtype):
    """lr in a tensor wins over the float; gradients are divided by grad_scale and stay so; found_inf stops everything, also at
    the first step."""
    for number in {torch.float32, wide(dtype)} | ({torch.float64} if form.startswith("a") else set()):
        made = Step(form, [(5, 3), (step._BLOCK[wide(dtype)] + 2,)], dtype)
        made.steps = [torch.zeros_like(t) for t in made.steps]
        before, wanted = made.copy(), made.wanted(scale=3.0, lr=0.25)
        given = dict(lr_tensor=torch.tensor([0.25], dtype=number), grad_scale=torch.tensor(3.0, dtype=number), lr=77.0)
        made.run(**given, found_inf=torch.tensor(1.0))
        for ts, kept in zip(made.lists(), before, strict=True):
            assert all(map(torch.equal, ts, kept))
        made.run(**given, found_inf=torch.tensor(0.0))
        made.compare(wanted, scaled=True)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("sgd decay", "adam without memory")])
def test_step_with_a_settled_normaliser(form, dtype):
    """What reference.settle returns: gradients count so many times as much and stay as they are; a bad row stops everything."""
    made = Step(form, [(5, 3), (step._BLOCK[wide(dtype)] + 2,)], dtype)
    made.steps = [torch.zeros_like(t) for t in made.steps]
    before, wanted = made.copy(), made.wanted(scale=4.0)
    made.run(robust=torch.tensor([0.0, 0.25, 60.0, 0.0, 2.0, 1.0], dtype=torch.float64))
    for ts, kept in zip(made.lists(), before, strict=True):
        assert all(map(torch.equal, ts, kept))
    made.run(robust=torch.tensor([0.0, 0.25, 60.0, 0.0, 2.0, 0.0], dtype=torch.float64))
    wanted[1] = [g.double() for g in before[1]]
    made.compare(wanted, scaled=True)


@pytest.mark.parametrize("form", ["sgd momentum", "amsgrad", "rmsprop centered momentum"])
def test_step_layouts(form):
    """Dense tensors in any order, and those that are not: strided parameters, transposed gradients, a state laid out otherwise;
    float32, float64 and bfloat16 together; an address that is no multiple of 16; grad_scale writes back to all."""
    made = Step(form, [(2, 3, 4, 5), (6, 4), (6, 4), (5, 3), (8,), (7,), (6, 5)])
    made.params[0] = made.params[0].to(memory_format=torch.channels_last)
    made.params[1] = torch.randn(6, 8)[:, ::2]
    made.params[4] = torch.randn(9)[1:]
    made.grads[0] = made.grads[0].to(memory_format=torch.channels_last)
    made.grads[2] = made.grads[2].t().contiguous().t()
    made.states[0][3] = made.states[0][3].t().contiguous().t()
    for lists in (made.params, made.grads, *(ts for ts in made.states if ts)):
        lists[5] = lists[5].double()
    made.params[6], made.grads[6] = made.params[6].bfloat16(), made.grads[6].bfloat16().t().contiguous().t()
    for g in made.grads:
        g.mul_(2)
    wanted = made.wanted(scale=2.0)
    made.run(grad_scale=torch.tensor(2.0))
    made.compare(wanted, scaled=True)


def test_step_expanded_gradient():
    p = torch.ones(4, 3)
    made = run_as("sgd momentum", [p], [torch.tensor(2.0).expand(4, 3)], lr=0.5, weight_decay=0.0)
    assert torch.equal(p, torch.zeros(4, 3)) and torch.equal(made.states[0][0], torch.full((4, 3), 2.0))


@pytest.mark.parametrize("form", ["sgd", "amsgrad", "rmsprop", "adagrad"])
def test_step_refuses_other_shapes_and_types(form):
    """Nothing is written then."""

    def refused(change, match):
        made = Step(form, [(5,), (3, 2)])
        change(made)
        before = made.copy()
        with pytest.raises(ValueError, match=match):
            made.run()
        assert all(all(map(torch.equal, ts, kept)) for ts, kept in zip(made.lists(), before))

    def put(kind, index, value):
        return lambda made: getattr(made, kind).__setitem__(index, value)

    refused(put("grads", 0, torch.ones(4)), r"\(4,\).*\(5,\)")
    refused(put("grads", 0, torch.ones(5).double()), "got {torch.float64}, expected gradients of torch.float32")
    refused(lambda made: made.grads.pop(), "1 gradients.* 2 parameters")
    if form != "sgd":
        refused(lambda made: made.states[0].__setitem__(1, torch.zeros(3, 2, 1)[:, :, 0].t()), r"\(2, 3\).*\(3, 2\)")
        refused(
            lambda made: made.states[0].__setitem__(1, torch.zeros(3, 2).half()),
            "got {torch.float16}, .* states of torch.float32",
        )
        refused(lambda made: made.states[0].pop(), "states")
        refused(lambda made: made.steps.pop(), "1 counts for 2 parameters")


@pytest.mark.parametrize("form", ["sgd", "amsgrad", "rmsprop", "adagrad"])
def test_step_of_nothing(form):
    """No parameters; none with elements, whose steps are counted all the same."""
    Step(form, []).run()
    made = Step(form, [(0,), (0, 3)])
    made.run()
    assert [float(t) for t in made.steps] == [1, 8][: len(made.steps)]


def test_step_table_follows_the_tensors(monkeypatch):
    """Uploaded once while the tensors stay, again when one moves or another size comes; the oldest is dropped."""
    monkeypatch.setattr(step, "_KEPT", 2)
    step._tables.clear()
    p, g = torch.ones(3), torch.ones(3)
    kept = []  # so that no address is given away twice
    for _ in range(3):
        run_as("sgd", [p], [g], lr=0.125)
    assert len(step._tables) == 1 and torch.equal(p, torch.full((3,), 0.625))
    for _ in range(4):
        kept.append(g)
        g = torch.ones(3)
        run_as("sgd", [p], [g], lr=0.125)
    assert len(step._tables) == 2 and torch.equal(p, torch.full((3,), 0.125))
    run_as("sgd", [p[:2]], [g[:2]], lr=0.125)
    assert p.tolist() == [0, 0, 0.125]


def test_step_captured_with_new_addresses(monkeypatch):
    """Nothing pinned is allocated meanwhile, and what a graph copies from at each replay is never written again. Two sets of
    tensors in a step, of two dtypes."""

    def made():
        step_of = Step("adam", [(5,), (3, 2), (7,)])
        for lists in (step_of.params, step_of.grads, *step_of.states[:2]):
            lists[1] = lists[1].double()
        return step_of

    def run_and_compare(one):
        wanted = one.wanted()
        one.run()
        one.compare(wanted)

    def refuse(size, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    plain = step._pinned
    monkeypatch.setattr(step, "_reserve", step._Reserve())
    monkeypatch.setattr(step, "_captured", [])
    kept = [made() for _ in range(4)]  # so that no address is given away twice
    run_and_compare(kept[0])
    for one in kept[1:3]:
        captured = len(step._captured)
        monkeypatch.setattr(launch, "captures", lambda like: True)
        monkeypatch.setattr(step, "_pinned", refuse)
        run_and_compare(one)
        uploads = [upload for owned in step._captured[captured:] for upload in owned[:2]]
        assert len(uploads) == 4 and step._reserve.left == 0
        monkeypatch.setattr(step, "_pinned", plain)
        monkeypatch.setattr(launch, "captures", lambda like: False)
        run_and_compare(kept[0])
        assert step._reserve.left == step._reserve.needed > 0
    everything = [upload.host for owned in step._captured for upload in owned[:2]]
    before = [host.clone() for host in everything]
    monkeypatch.setattr(launch, "captures", lambda like: True)
    monkeypatch.setattr(step, "_pinned", plain)
    run_and_compare(kept[3])
    assert len({host.data_ptr() for host in everything if len(host)}) == len(everything) == 8
    assert all(map(torch.equal, everything, before))


def test_step_captured_without_one_before(monkeypatch):
    """Then torch is asked for pinned memory after all; and a table that is there already is used as it is."""
    asked, plain = [], step._pinned
    monkeypatch.setattr(step, "_reserve", step._Reserve())
    monkeypatch.setattr(step, "_captured", [])
    monkeypatch.setattr(step, "_pinned", lambda size, device: asked.append(size) or plain(size, device))
    first, second = Step("sgd", [(5,), (3, 2)]), Step("sgd", [(5,), (3, 2)])
    monkeypatch.setattr(launch, "captures", lambda like: True)
    first.run()
    assert asked == [128, 16] and step._reserve.needed == 0
    monkeypatch.setattr(launch, "captures", lambda like: False)
    second.run()
    assert asked == [128, 16, 144]
    monkeypatch.setattr(launch, "captures", lambda like: True)
    second.run()
    assert asked == [128, 16, 144] and step._reserve.left == 144 and len(step._captured) == 2


def test_step_table_knows_which_states():
    """Two rules with as many arrays at the same addresses keep their states in other places."""
    made = Step("rmsprop momentum", [(5,)])
    wanted = made.wanted()
    made.run()
    made.compare(wanted)
    made.options = {k: v for k, v in made.options.items() if k != "momentum"} | dict(momentum=0.0, centered=True)
    made.states = [made.states[0], None, made.states[1]]
    made.states[2][0].zero_()
    wanted = made.wanted()
    made.run()
    made.compare(wanted)


def test_memory_shared_by_two_parameters():
    """Updated one after the other, as without a kernel."""
    memory = torch.ones(8)
    run_as("sgd", [memory[:6], memory[2:]], [torch.ones(6), torch.ones(6)])
    torch.testing.assert_close(memory, torch.tensor([0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.9, 0.9]))


def test_a_parameter_listed_twice():
    """Two steps, the second with the next count."""
    twice, once = Step("adam decay", [(5,)]), Step("adam decay", [(5,)])
    for ts in (twice.params, twice.grads, *twice.states[:2], twice.steps):
        ts *= 2
    twice.run()
    once.run()
    wanted = once.wanted()
    once.run()
    once.compare(wanted)
    assert torch.equal(twice.params[0], once.params[0]) and twice.steps[0] == 2


@pytest.mark.parametrize("count", [torch.float32, torch.float64], ids=["fp32 counts", "fp64 counts"])
def test_count_shared_by_two_parameters(count):
    made = Step("adam", [(5,), (4,)], count=count)
    made.steps[1] = made.steps[0]
    wanted = made.wanted()
    made.steps[0].fill_(1)
    second = made.wanted()
    made.steps[0].zero_()
    made.run()
    close(made.params[0], wanted[0][0], 1e-6, 1e-6)
    close(made.params[1], second[0][1], 1e-6, 1e-6)
    assert made.steps[0] == 2


OPTIMIZERS = {
    "ABSGD": ("SGD", dict(lr=0.1, momentum=0.9)),
    "ABAdam": ("Adam", dict(lr=0.1, amsgrad=True)),
    "ABAdamW": ("AdamW", dict(lr=0.1)),
    "ABRMSprop": ("RMSprop", dict(lr=0.1, momentum=0.5, centered=True)),
    "ABAdagrad": ("Adagrad", dict(lr=0.1, lr_decay=0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_the_optimizers(name):
    """Three of each optimizer of the package by these kernels, beside torch's own."""
    theirs, options = OPTIMIZERS[name]
    ours = [torch.nn.Parameter(torch.linspace(-1, 1, 7).view(s)) for s in ((7,), (7, 1))]
    exact = [torch.nn.Parameter(p.detach().double()) for p in ours]
    pair = getattr(ab, name)(ours, backend="triton", **options), getattr(torch.optim, theirs)(exact, **options)
    for k in range(3):
        for params, optimizer in zip((ours, exact), pair):
            for p in params:
                p.grad = (p.detach() - 0.3 * k).cos()
            optimizer.step()
    for p, q in zip(ours, exact):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)


# ---- the weighted step, through the public function ------------------------------------------------------------------------


def weighted_twice(params, buffers, grads, losses, log_s=-INF, **options):
    """Two steps, each against plain torch in float64 from the same place; the last log s."""
    options = dict(lam=-0.75, lr=0.125, weight_decay=0.25) | options
    near = {
        torch.float64: 1e-13,
        torch.float32: 2e-6,
        torch.bfloat16: 2**-7,
        torch.float16: 2**-9,
    }  # twice a rounding: it cuts off
    for _ in range(2):
        exact = [[t.double() for t in ts] for ts in (params, buffers, grads, [losses])]
        wanted = weighted_momentum_step_(*exact[:3], exact[3][0], log_s, **options, backend="reference")
        log_s = weighted_momentum_step_(params, buffers, grads, losses, log_s, **options, backend="triton")
        close(log_s, wanted.double(), near[log_s.dtype], near[log_s.dtype])
        for t, e in zip([*params, *buffers], exact[0] + exact[1]):
            close(t, e, near[t.dtype], min(near[t.dtype], 2e-6))
    return log_s


def weighted_lists(dtype, batch, shapes=((0,), (5, 3), (), (8,))):
    shapes = [*shapes, (weighted._BYTES // dtype.itemsize + 1,)]
    params, buffers = ([torch.randn(s).to(d) for s in shapes] for d in (dtype, wide(dtype)))
    return params, buffers, [torch.randn(batch, *s).to(dtype) for s in shapes], torch.rand(batch, dtype=wide(dtype))


WEIGHTED = {
    "momentum": {},
    "plain": dict(momentum=0.0, weight_decay=0.0),
    "nesterov": dict(nesterov=True, mix=0.5),
    "heavy ball": dict(heavy_ball=True, maximize=True),
    "dampening": dict(dampening=0.5, normalizer="batch"),
    "inf": dict(lam=INF, max_weight=0.5),
    "in tensors": dict(lam=torch.tensor(0.75), lr=torch.tensor([0.125]), init="zero", max_weight=1.5),
}


@pytest.mark.parametrize("options", WEIGHTED)
def test_weighted_step(options, dtype, launches):
    """11 rows, 8 at a time: one masked and one without weight, both of NaN."""
    torch.manual_seed(0)
    lists = weighted_lists(dtype, 11)
    mask, weight = torch.arange(11) != 4, torch.linspace(0, 2, 11, dtype=wide(dtype))
    for g in lists[2]:
        g[4] = g[0] = NAN
    weighted_twice(*lists, mask=mask, sample_weight=weight, **WEIGHTED[options])


def test_weighted_step_of_a_bad_row_writes_nothing(launches):
    params, buffers, grads, losses = weighted_lists(torch.float32, 5)
    log_s = weighted_twice(params, buffers, grads, losses)
    before = [t.clone() for t in params + buffers]
    losses[2] = NAN
    assert torch.equal(weighted_momentum_step_(params, buffers, grads, losses, log_s, lam=0.5, lr=0.1, backend="triton"), log_s)
    assert all(torch.equal(a, b) for a, b in zip(before, params + buffers))


def test_weighted_step_of_no_rows():
    assert weighted_twice(*weighted_lists(torch.float32, 0), torch.tensor(0.5)) == 0.5


def test_weighted_step_layouts():
    """Gaps, rows of a wider block, an odd address, several dtypes at once; a tensor listed twice is refused."""
    torch.manual_seed(0)
    params, buffers, grads, losses = weighted_lists(torch.float32, 5)
    more = weighted_lists(torch.bfloat16, 5)
    params += [p.clone() for p in more[0]] + [torch.randn(6, 2)[:, 0], torch.randn(8)[1:]]
    buffers += more[1] + [torch.randn(6), torch.randn(14)[::2]]
    grads += more[2] + [torch.randn(6, 5).t(), torch.randn(5, 9)[:, 1:8]]
    weighted_twice(params, buffers, grads, losses)
    with pytest.raises(ValueError, match=r"params\[0\], params\[1\]: share memory"):
        weighted_momentum_step_(
            [params[1]] * 2, [buffers[1], buffers[1].clone()], [grads[1]] * 2, losses, 0.0, lam=1.0, lr=0.1, backend="triton"
        )


# ---- against what the package does elsewhere -----------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [-0.5, 2.0])
def test_same_as_the_public_api(lam):
    """Three steps of ABLoss on whatever serves the CPU here, float64: the same values, weights, gradients and state."""
    criterion = ab.ABLoss(ab.CrossEntropy(label_smoothing=0.1), lam=lam, gamma=0.8, alpha=0.9, mix=0.2, max_weight=3.0).double()
    log_s, nonfinite, lam = state(-INF, lam, torch.float64)
    for seed in range(3):
        logits, target = make((9, 7), torch.float64, seed)
        target[seed] = -100
        leaf = logits.clone().requires_grad_()
        value = criterion(leaf, target, sample_weight=torch.linspace(0, 1, 9))
        value.backward()
        loss, rows, stats = losses.robust_logit_loss(
            logits, target, None, None, 0.1, 0.0, -100, None, torch.linspace(0, 1, 9).double(), None, log_s, nonfinite, lam, 0.8, 0.9, 0.2,
            3.0, kind=0, prune=False, normalizer=0, init_first=True, update=True, with_stats=True, report=None,
        )  # fmt: skip
        grad = losses.logit_loss_backward(logits, target, None, None, 0.1, stats, torch.tensor(1.0, dtype=torch.float64))
        for ours, theirs in (
            (loss, value),
            (rows[0], criterion.last.losses),
            (rows[1], criterion.last.weights),
            (log_s, criterion.log_s),
            (grad, leaf.grad),
        ):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-14)


def test_same_losses_as_the_public_api(dtype):
    logits, target = make((33, 12), dtype)
    leaf = logits.clone().requires_grad_()
    value = public_logit_loss(leaf, target)
    value.sum().backward()
    values, grad = fused(logits, target, torch.tensor(1.0, dtype=wide(dtype)))
    tol = tolerance(dtype)
    torch.testing.assert_close(values, value.detach(), rtol=tol, atol=tol)
    torch.testing.assert_close(grad, leaf.grad, rtol=2 * tol, atol=2 * torch.finfo(wide(dtype)).eps)


# ---- the loss family, through the public functions ---------------------------------------------------------------------

COUNTS = [50, 9, 4, 2, 1, 1, 1, 1, 1, 1]
FAMILY = {
    "soft": lambda **o: ab.CrossEntropy(torch.linspace(0.5, 2, 10), label_smoothing=0.1, **o),
    "focal": lambda **o: ab.Focal(0.5, torch.linspace(0.5, 2, 10), **o),
    "gce": lambda **o: ab.GCE(0.7, **o),
    "tce": lambda **o: ab.GCE(0.7, 0.1, prune=True, **o),
    "sce": lambda **o: ab.SCE(6.0, 0.5, **o),
    "ldam": lambda **o: ab.LDAM(COUNTS, **o),
    "vs": lambda **o: ab.VS(COUNTS, 0.3, 1.0, torch.linspace(0.5, 2, 10), **o),
    "weighted focal": lambda **o: Repository(1.5, torch.linspace(0.5, 2, 10), **o),
}


@pytest.mark.parametrize("shape", [(6, 10), (2, 10, 3)], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_loss_family(name, shape):
    """Losses, robust loss, weights and gradients against plain torch in float64: kinds, class vectors, soft targets, layouts."""
    torch.manual_seed(1)
    logits = torch.randn(shape).mul(4)
    target = torch.randint(10, shape[:1] + shape[2:])
    target.view(-1)[1] = -100
    if name == "soft":
        target = torch.randn(shape).softmax(1)
        target[0, 3] = 0
    for criterion in (FAMILY[name], lambda **o: ab.ABLoss(FAMILY[name](**o), lam=0.7)):
        ours, exact = criterion(backend="triton"), criterion(backend="reference").double()
        x, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
        value, wanted = ours(x, target), exact(wide, target.double() if name == "soft" else target)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-6)
        value.sum().backward()
        wanted.sum().backward()
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2e-5, atol=2e-6 * float(wide.grad.abs().max()))


def in_place(logits, target, spec):
    """Losses, G, validity, and that the other kernels say the same."""
    grad = logits.clone()
    one = ops.OPERATORS["triton"]
    values, valid = one.logit_loss_(grad, target, *spec)
    others = one.logit_loss(logits, target, *spec._replace(bits=spec.bits | ops.WITH_STATS))
    upstream = torch.ones((), dtype=wide(logits.dtype))
    smoothing = spec.first if spec.bits < ops.KIND else 0.0
    again = one.logit_loss_backward(
        logits, target, spec.class_weight, spec.adjust, smoothing, others[1], upstream, None, None
    )
    assert torch.equal(values, others[0]) and torch.equal(valid, others[2]) and torch.equal(grad, again)
    return values, grad, valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_gradient_in_place(name, dtype):
    """Rows of 10 classes, many in a tile; of 4100 (twice, for the time), whose second loop has another block. A row that is ignored
    holds NaN."""
    for classes in (10, 4100) if name in ("soft", "tce") and dtype == torch.bfloat16 else (10,):
        logits, target = make((6, classes), dtype, seed=1)
        target[:4] = torch.tensor([0, 9, 3, -100])
        logits[3] = NAN
        if name == "soft":
            logits[3], target = 0.0, torch.randn(6, classes, dtype=wide(dtype)).softmax(1)
        loss = FAMILY[name]().to(wide(dtype))
        if loss.weight is not None:
            loss.weight = torch.linspace(0.5, 2, classes, dtype=wide(dtype))
        spec = loss.spec(logits)
        values, grad, valid = in_place(logits, target, spec)
        leaf = logits.double().requires_grad_()
        exact = spec._replace(class_weight=None if spec.class_weight is None else spec.class_weight.double())
        wanted = exact.plain(leaf, target.double() if name == "soft" else target)
        wanted.sum().backward()
        tol = 4 * tolerance(dtype)
        torch.testing.assert_close(values.double(), wanted.detach(), rtol=tol, atol=tol)
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=tol, atol=tol / 64)
        assert torch.equal(valid > 0, exact.valid(target, wanted)), name
        if name != "soft":
            assert valid[3] == 0 and not grad[3].any()


def test_gradient_in_place_of_bad_rows():
    """NaN stays in its row; a label out of range is reported, and its row does not count."""
    logits, target = make((4, 4100))
    logits[1, 7], target[2] = NAN, 4100
    report = torch.zeros(4, dtype=torch.int64)
    grad = logits.clone()
    values, valid = losses.logit_loss_(grad, target, None, None, 0.0, 0.0, -100, kind=0, prune=False, report=report)
    assert valid.tolist() == [1, 1, 0, 1] and report.tolist() == [4100, 2, 4100, 1]
    assert grad[1].isnan().all() and not grad[2].any() and values[2] == 0
    close(grad[[0, 3]], exact_of(logits[[0, 3]], target[[0, 3]])[1], 1e-5, 1e-8)


@pytest.mark.parametrize("wrong", [torch.zeros(2, 3, dtype=torch.float16), torch.zeros(3, 2).t(), torch.zeros(2, 3, 1)])
def test_what_has_no_gradient_in_place(wrong):
    with pytest.raises(RuntimeError, match="logit_loss_: expected contiguous"):
        losses.logit_loss_(wrong, torch.zeros(2).long(), None, None, 0.0, 0.0, -100, kind=0, prune=False, report=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_head(dtype):
    """LinearABLoss on these kernels: three chunks, one of them all ignored, a masked row, against plain torch in float64."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*n, generator=draw).to(dtype).requires_grad_() for n in ((12, 5), (30, 5), (30,)))
    target = torch.randint(30, (12,), generator=draw)
    target[4:8] = -100
    mask = torch.arange(12) != 1
    one, two = ab.LinearABLoss(lam=0.5, chunk=4, backend="triton"), ab.ABLoss(lam=0.5, backend="reference").double()
    one(hidden, weight, target, bias, mask=mask).backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    two(F.linear(*wide), target, mask=mask).backward()
    for ours, exact in zip((hidden, weight, bias), wide):
        error = (ours.grad.double() - exact.grad).norm() / exact.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2), error
    close(one.log_s, two.log_s, 1e-2 if dtype == torch.bfloat16 else 1e-5)
