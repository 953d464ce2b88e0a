"""The Triton kernels of losses on CPU tensors in Triton's interpreter, against the float64 oracle and the public API."""

import math

import numpy as np
import pytest
import test_inputs
import torch
import torch.nn.functional as F
from tensors import LAYOUTS, class_weight, wide

pytest.importorskip("triton")

from interpreted_cases import INF, NAN, close, exact_of, fused, make, state, tolerance
from interpreted_hooks import counters_are_left_zero, launches, pytestmark  # noqa: F401
from kernels_interpreted_weights import robust

import absgd_fast as ab
from absgd_fast import ops
from absgd_fast.compat.repository import Focal as Repository
from absgd_fast.functional import logit_loss as public_logit_loss
from absgd_fast.kernels import launch, losses


def test_parts():
    """A Python float in two float32: 48 bits of it; inf, and what float32 cannot hold, stays inf."""
    for x in (0.1, -1e-3, 1 / 3, 0.9, 1e30, 0.0):
        high, low = launch.parts(x)
        assert float(np.float32(high)) == high and float(np.float32(low)) == low and abs(x - high - low) <= abs(x) * 2**-47
    assert launch.parts(1.0, INF, -INF, 1e300) == (1.0, 0.0, INF, 0.0, -INF, 0.0, INF, 0.0)


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


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
        InterpreterBuilder,
        "create_masked_load",
        lambda self, p, mask, *a: (read.append(int(np.sum(mask.data))), load(self, p, mask, *a))[1],
    )
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
    monkeypatch.setattr(ops.labels, "kernels_can_report", lambda: False)
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
    assert ops.kernels_can_report.__wrapped__() == can


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
            logits,
            target,
            None,
            None,
            0.1,
            0.0,
            -100,
            None,
            torch.linspace(0, 1, 9).double(),
            None,
            log_s,
            nonfinite,
            lam,
            0.8,
            0.9,
            0.2,
            3.0,
            kind=0,
            prune=False,
            normalizer=0,
            init_first=True,
            update=True,
            with_stats=True,
            report=None,
        )
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
    smoothing = spec.smoothing
    again = one.logit_loss_backward(logits, target, spec.class_weight, spec.adjust, smoothing, others[1], upstream, None, None)
    assert torch.equal(values, others[0]) and torch.equal(valid, others[2]) and torch.equal(grad, again)
    return values, grad, valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_gradient_in_place(name, dtype):
    """Rows of 10 classes, many in a tile; of 4100 (twice, for the time), whose second loop has another block. An ignored row
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
        wanted = exact.recompute(leaf, target.double() if name == "soft" else target)
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


# ---- inputs beside the logits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form, options", [("fused", "mixed"), ("fused", "plain"), ("divided", "moving"), ("rule", "rule, mixed")]
)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_gradients_of_inputs(form, options, soft):
    """Sample weights and soft targets, first and second derivatives: the weights are made in backward here."""
    test_inputs.test_gradients(form, options, soft, (5, 4), "triton")
    test_inputs.test_masked_and_bad_rows(form, soft, "triton")
