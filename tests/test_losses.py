"""Fused per-sample losses on logits: values and gradients against fp64, in every layout, dtype and instruction set."""

import math
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

import absgd_fast as ab
from absgd_fast.functional import logit_loss

INF = math.inf
# 1..9: below a lane; then one below, at and above multiples of the lanes (4, 8, 16 floats) and of four of them (16, 32, 64)
CLASSES = [*range(1, 10), 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 97, 127, 128, 129, 255, 257, 511, 513, 999, 1000, 1001]  # fmt: skip


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(shape, dtype=torch.float32, seed=0, scale=3.0):
    """Logits as a leaf, labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    return logits.to(dtype).requires_grad_(), target


def exact_of(case, logits, target, classes):
    """Oracle losses in the shape of target and d loss / d logits in the shape of logits."""
    losses, grads = case.exact(oracle.rows(logits.detach().double()), target.flatten().tolist(), **case.options(classes))
    return losses.reshape(target.shape), oracle.unrows(grads, logits.shape)


def check(got, exact, eager, dtype, what, *, cancels=False):
    """Elementwise: 64 ulp and one rounding to dtype. The largest error: at most 4 times eager torch's, or 8 ulp of the largest."""
    got, eager = (t.detach().double().numpy() for t in (got, eager))
    ulp = torch.finfo(wide(dtype)).eps
    rounding = torch.finfo(dtype).eps if what == "gradient" and dtype in (torch.bfloat16, torch.float16) else 0.0
    floor = max(4 * ulp if cancels else ulp * 2**-6, torch.finfo(dtype).tiny * torch.finfo(dtype).eps if rounding else 0)
    np.testing.assert_allclose(got, exact, rtol=64 * ulp + rounding, atol=floor, err_msg=what)
    if got.size and not rounding:
        bound = max(4 * np.abs(eager - exact).max(), 8 * ulp * np.abs(exact).max(), floor)
        assert np.abs(got - exact).max() <= bound, f"{what}: error beyond eager torch's"


# ---- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_every_width(backend, case, dtype, index):
    """5 rows (an odd number) of every C: lanes, tails, blocks of lanes; any upstream vector; two widths per call share none."""
    for classes in CLASSES[:: 1 if index == torch.int64 else 4]:
        logits, target = make((5, classes), dtype, seed=classes)
        options = case.tensors(classes, wide(dtype))
        upstream = torch.linspace(-2, 1.5, 5, dtype=wide(dtype))
        losses = logit_loss(logits, target.to(index), kind=case.kind, backend=backend, **options)
        (grad,) = torch.autograd.grad(losses, logits, upstream)
        exact, exact_grad = exact_of(case, logits, target, classes)
        leaf = logits.detach().to(wide(dtype)).requires_grad_()
        eager = case.eager(leaf, target, **options)
        (eager_grad,) = torch.autograd.grad(eager, leaf, upstream)
        assert losses.dtype == wide(dtype) and losses.shape == (5,) and grad.dtype == dtype
        check(losses, exact, eager, dtype, "loss")
        exact_grad = exact_grad * upstream.double().numpy()[:, None]
        check(grad, exact_grad, eager_grad, dtype, "gradient", cancels=case.cancels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_width_robust(backend, case, dtype):
    """The same widths through ABLoss, whose kernel is another one: one step from the middle of a run, 5 rows, upstream -3."""
    for classes in CLASSES[::2]:
        logits, target = make((5, classes), dtype, seed=classes)
        criterion = case.fused(**case.tensors(classes, wide(dtype)), backend=backend)
        robust, exact = ab.ABLoss(criterion, lam=-0.5, backend=backend), oracle.ABLoss(-0.5)
        if dtype == torch.float64:
            robust = robust.double()
        robust.log_s.fill_(-0.75)
        exact.log_s = -0.75
        losses, grads = exact_of(case, logits, target, classes)
        forward = exact(losses, mask=target != case.options(classes).get("ignore_index", -100))
        value = robust(logits, target)
        (grad,) = torch.autograd.grad(value, logits, torch.tensor(-3.0, dtype=value.dtype))
        tol = 64 * torch.finfo(wide(dtype)).eps
        np.testing.assert_allclose(value.detach(), forward.loss, rtol=tol, atol=tol**2)
        np.testing.assert_allclose(robust.last.weights, forward.weights, rtol=tol)
        np.testing.assert_allclose(robust.log_s, exact.log_s, rtol=tol, atol=tol)
        wanted = grads * forward.grad[:, None] * -3
        cancelled = tol / 16 if case.cancels else 0
        np.testing.assert_allclose(grad.double(), wanted, rtol=max(tol, torch.finfo(dtype).eps), atol=cancelled)


@pytest.mark.parametrize("shape", [(0, 5), (1, 5), (2, 5, 0), (0, 5, 3), (3, 6, 7), (2, 3, 5, 4), (2, 17, 3, 2, 2)], ids=str)
def test_shapes(backend, case, dtype, shape):
    logits, target = make(shape, dtype)
    options = case.tensors(shape[1], wide(dtype))
    losses = logit_loss(logits, target, kind=case.kind, backend=backend, **options)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    exact, exact_grad = exact_of(case, logits, target, shape[1])
    leaf = logits.detach().to(wide(dtype)).requires_grad_()
    eager = case.eager(leaf, target, **options) if logits.numel() else leaf.sum() + losses.detach()
    (eager_grad,) = torch.autograd.grad(eager.sum(), leaf)
    assert losses.shape == target.shape and grad.shape == logits.shape
    check(losses, exact, eager, dtype, "loss")
    check(grad, exact_grad, eager_grad, dtype, "gradient", cancels=case.cancels)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced rows": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "sliced classes": lambda x: torch.stack([x, x + 1], 2).flatten(1, 2)[:, ::2],
    "wider row": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "offset of one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "permuted": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 37), (1, 21), (4, 1), (3, 6, 7), (2, 5, 3, 4)], ids=str)
def test_layouts(backend, dtype, layout, shape):
    """The same numbers in other places of memory; 37 = two lanes of 16 and a tail. Labels are strided too."""
    plain, target = make(shape, dtype)
    moved = LAYOUTS[layout](plain)
    assert torch.equal(moved, plain)
    labels = torch.stack([target, target * 0 - 7], -1)[..., 0]  # every second element of a larger tensor
    upstream = torch.linspace(-1, 2, target.numel(), dtype=wide(dtype)).reshape(target.shape)
    losses = logit_loss(moved, labels, backend=backend)
    (grad,) = torch.autograd.grad(losses, moved, upstream)
    leaf = plain.detach().double().requires_grad_()
    exact = F.cross_entropy(leaf, target, reduction="none")
    (exact_grad,) = torch.autograd.grad(exact, leaf, upstream.double())
    tol = 32 * torch.finfo(wide(dtype)).eps
    torch.testing.assert_close(losses.double(), exact, rtol=tol, atol=tol)
    tol = max(tol, torch.finfo(dtype).eps)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=tol, atol=tol / 4)
    robust = []
    for x in (plain, moved):
        criterion = ab.ABLoss(ab.CrossEntropy(backend=backend), lam=0.7, backend=backend)
        value = criterion(x, labels)
        robust.append((value.detach(), criterion.last.weights, *torch.autograd.grad(value, x)))
    torch.testing.assert_close(*robust, rtol=tol, atol=tol / 4)


def test_expanded_logits(backend):
    """One row seen as 9 rows, one class seen as 6: stride 0, also in the labels and in the upstream gradient."""
    row = torch.linspace(-2, 2, 6).requires_grad_()
    losses = logit_loss(row.expand(9, 6), torch.tensor(2).expand(9), backend=backend)
    losses.sum().backward()  # the gradient of sum is an expanded one
    leaf = row.detach().clone().requires_grad_()
    F.cross_entropy(leaf.expand(9, 6), torch.full((9,), 2), reduction="none").sum().backward()
    torch.testing.assert_close(row.grad, leaf.grad, rtol=1e-5, atol=1e-6)
    column = torch.linspace(-2, 2, 9)[:, None].requires_grad_()
    losses = logit_loss(column.expand(9, 6), torch.zeros(9, dtype=torch.int64), backend=backend)
    torch.testing.assert_close(losses, torch.full((9,), math.log(6)))


def test_strided_upstream(backend):
    logits, target = make((7, 5))
    losses = logit_loss(logits, target, backend=backend)
    upstream = torch.arange(14.0)[::2]
    (grad,) = torch.autograd.grad(losses, logits, upstream, retain_graph=True)
    (wanted,) = torch.autograd.grad(losses, logits, upstream.contiguous())
    assert torch.equal(grad, wanted) and grad[0].abs().max() == 0 < grad[1].abs().max()


# ---- ignored rows, reductions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-100, 2, -1])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ignored_rows(backend, ignore_index, smoothing):
    """Loss 0 and gradient 0, whatever stands in the row, NaN included."""
    logits, target = make((6, 5))
    target[1] = target[4] = ignore_index
    target[0] = 0
    with torch.no_grad():
        logits[1] = math.nan
    losses = logit_loss(logits, target, ignore_index=ignore_index, label_smoothing=smoothing, backend=backend)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    exact, exact_grad = oracle.cross_entropy(
        logits.detach().double(), target, ignore_index=ignore_index, label_smoothing=smoothing
    )
    np.testing.assert_allclose(losses.detach(), exact, rtol=1e-5)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 4), (0, 5)], ids=str)
@pytest.mark.parametrize("ignored", ["some", "all", "none"])
def test_reductions_are_torchs(backend, case, reduction, shape, ignored):
    """A mean divides by the weights of the valid rows; nothing to divide by is NaN; any upstream scalar."""
    options = case.tensors(5, torch.float64)
    logits, target = make(shape, torch.float64)
    ignore = options.get("ignore_index", -100)
    target = torch.where(target == ignore, 1, target)
    if ignored != "none":
        target = torch.where((target < 3) | (ignored == "all"), ignore, target)
    results = []
    for loss in (case.fused(**options, reduction=reduction, backend=backend), None):
        leaf = logits.detach().clone().requires_grad_()
        value = loss(leaf, target) if loss else F.cross_entropy(leaf, target, reduction=reduction, **options)
        (value.sum() * -1.7).backward()
        results.append((value.detach(), leaf.grad))
    for ours, torchs in zip(*results):
        torch.testing.assert_close(ours, torchs, rtol=1e-11, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_class_weights(backend, dtype):
    """A model cast to half casts the loss's class weights: they are used as they are, in fp32 arithmetic."""
    weight = torch.tensor([0.3, 1.7, 0.9]).to(dtype)
    logits, target = make((4, 3), dtype)
    loss = ab.CrossEntropy(weight=weight.float(), backend=backend).to(dtype)
    exact, _ = oracle.cross_entropy(logits.detach().double(), target, weight=weight.double())
    losses = loss(logits, target)
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.detach(), exact, rtol=1e-5)


def test_class_weights_are_state_of_the_module():
    """As torch.nn.CrossEntropyLoss: a buffer, moved by .to and .double, kept by deepcopy and state_dict."""
    loss = ab.CrossEntropy(weight=torch.tensor([0.5, 2.0]))
    ours, torchs = loss.state_dict(), torch.nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0])).state_dict()
    assert ours.keys() == torchs.keys() and torch.equal(ours["weight"], torchs["weight"])
    assert loss.double().weight.dtype == torch.float64


# ---- autograd -------------------------------------------------------------------------------------------------------


def forms_of(backend):
    """The loss alone, reduced, inside ABLoss, and ABLoss on torch's losses: each may keep a gradient from forward to backward."""
    criterion = ab.CrossEntropy(backend=backend)
    return [
        lambda x, y: criterion(x, y),
        lambda x, y: ab.CrossEntropy(reduction="mean", backend=backend)(x, y),
        lambda x, y: ab.ABLoss(criterion, lam=0.7, backend=backend)(x, y),
        lambda x, y: ab.ABLoss(partial(F.cross_entropy, reduction="none"), lam=0.7, backend=backend)(x, y),
    ]


@pytest.mark.parametrize("form", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_again(backend, form, dtype):
    """With retain_graph each backward is the same function of its upstream, whatever was done to earlier gradients."""
    logits, target = make((9, 21), dtype)
    value = forms_of(backend)[form](logits, target)
    (first,) = torch.autograd.grad(value, logits, torch.full_like(value, 4.0), retain_graph=True)
    kept = first.clone()
    first.zero_()  # a gradient handed out belongs to the caller
    (second,) = torch.autograd.grad(value, logits, torch.full_like(value, 4.0), retain_graph=True)
    assert torch.equal(second, kept) and kept.abs().max() > 0
    (third,) = torch.autograd.grad(value, logits, torch.full_like(value, -2.0))
    assert torch.equal(third, kept * -0.5)  # powers of two: exact
    assert torch.equal(second, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, logits, torch.ones_like(value))


@pytest.mark.parametrize("form", range(4))
def test_shared_logits(backend, form):
    """Two losses on the same logits accumulate; so do two backwards into .grad."""
    logits, target = make((9, 21), torch.float64)
    loss, other = forms_of(backend)[form], target.flip(0)
    (a,) = torch.autograd.grad(loss(logits, target).sum(), logits)
    (b,) = torch.autograd.grad(loss(logits, other).sum(), logits)
    (loss(logits, target).sum() + 3 * loss(logits, other).sum()).backward()
    torch.testing.assert_close(logits.grad, a + 3 * b, rtol=1e-13, atol=1e-15)
    loss(logits, target).sum().backward()
    torch.testing.assert_close(logits.grad, 2 * a + 3 * b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("form", range(4))
def test_inputs_are_left_alone(backend, form):
    logits, target = make((9, 21))
    before = logits.detach().clone(), target.clone()
    value = forms_of(backend)[form](logits * 1, target)
    (value.sum() * 3).backward()
    assert torch.equal(logits, before[0]) and torch.equal(target, before[1])
    assert value.data_ptr() != logits.data_ptr()


@pytest.mark.parametrize("form", range(4))
def test_result_changed_in_place(backend, form):
    """`loss /= accumulation_steps` before backward."""
    logits, target = make((9, 21), torch.float64)
    grads = []
    for divide in (torch.Tensor.div, torch.Tensor.div_):
        value = divide(forms_of(backend)[form](logits, target), 4)
        grads.append(torch.autograd.grad(value.sum(), logits)[0])
    assert torch.equal(*grads) and grads[0].abs().max() > 0


@pytest.mark.parametrize("form", range(4))
def test_second_derivative_is_right_or_refused(backend, form):
    """Never silently wrong: the derivative of sum(grad^2), against eager torch, or an error that says so."""
    logits, target = make((3, 5), torch.float64)
    value = forms_of(backend)[form](logits, target).sum()
    try:
        (grad,) = torch.autograd.grad(value, logits, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), logits)
    except RuntimeError as error:
        assert "derivative" in str(error)
        return
    weights = torch.ones(3, dtype=torch.float64)
    losses = F.cross_entropy(logits, target, reduction="none")
    if form >= 2:  # ABLoss: constant weights, fp32 state
        weights = torch.tensor(oracle.ABLoss(0.7)(losses.detach()).weights)
    (grad,) = torch.autograd.grad((weights * losses).sum() / (1 if form == 0 else 3), logits, create_graph=True)
    (wanted,) = torch.autograd.grad(grad.square().sum(), logits)
    torch.testing.assert_close(second, wanted, rtol=1e-5, atol=1e-9)


def test_no_gradient_wanted(backend):
    """Logits that need no gradient, and no_grad: the same losses, no graph."""
    logits, target = make((9, 21))
    losses = logit_loss(logits, target, backend=backend)
    with torch.no_grad():
        assert torch.equal(logit_loss(logits, target, backend=backend), losses)
    plain = logit_loss(logits.detach(), target, backend=backend)
    assert torch.equal(plain, losses) and not plain.requires_grad


def test_logits_changed_in_place_are_noticed(backend):
    """As torch: a backward that would read overwritten logits raises; one that does not need them may give the right gradient."""
    logits, target = make((9, 21))
    hidden = logits * 1
    (wanted,) = torch.autograd.grad(logit_loss(hidden, target, backend=backend).sum(), logits)
    hidden = logits * 1
    losses = logit_loss(hidden, target, backend=backend)
    with torch.no_grad():
        hidden.mul_(3)
    try:
        (grad,) = torch.autograd.grad(losses.sum(), logits)
    except RuntimeError as error:
        assert "inplace operation" in str(error)
    else:
        assert torch.equal(grad, wanted)


# ---- numerics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 3, 37, 70])
def test_nan_and_inf_logits(backend, value, dtype, classes):
    """Row i has it in column i, so every lane, every block of lanes (70 = 4 x 16 + 6) and the tail meet it; the last row is clean."""
    logits, target = make((classes + 1, classes), dtype)
    with torch.no_grad():
        logits[range(classes), range(classes)] = value
    losses = logit_loss(logits, target, backend=backend)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.isnan(losses[:-1]).all() and torch.isnan(grad[:-1]).all()
    assert torch.isfinite(losses[-1]) and torch.isfinite(grad[-1]).all()
    robust = ab.ABLoss(ab.CrossEntropy(backend=backend), lam=0.5, backend=backend)
    value = robust(logits, target)
    (robust_grad,) = torch.autograd.grad(value, logits)
    assert torch.isnan(value) and torch.isnan(robust_grad[:-1]).all() and torch.isnan(robust.last.weights[:-1]).all()
    torch.testing.assert_close(robust_grad[-1], grad[-1])  # alone in its batch, the clean row has W = 1
    assert float(robust.log_s) == -INF and int(robust.nonfinite_batches) == 1
    assert torch.isnan(F.cross_entropy(logits.detach(), target, reduction="none")[:-1]).all()  # and torch agrees


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [2, 3, 37, 70])
def test_minus_inf_logits(backend, dtype, classes):
    """Legal in another class (row i, column i): zero gradient there. On the target (last row): loss inf. All: NaN. As torch."""
    logits, target = make((classes + 2, classes), dtype)
    target[:classes] = (torch.arange(classes) + 1) % classes
    with torch.no_grad():
        logits[range(classes), range(classes)] = -INF
        logits[classes, target[classes]] = -INF
        logits[classes + 1] = -INF
    losses = logit_loss(logits, target, backend=backend)
    (grad,) = torch.autograd.grad(losses[:classes].sum(), logits)
    leaf = logits.detach().double().requires_grad_()
    eager = F.cross_entropy(leaf, target, reduction="none")
    (eager_grad,) = torch.autograd.grad(eager[:classes].sum(), leaf)
    torch.testing.assert_close(losses.double(), eager.detach(), rtol=1e-5, atol=1e-6, equal_nan=True)
    assert losses[classes] == INF and torch.isnan(losses[classes + 1])
    assert grad[range(classes), range(classes)].abs().max() == 0
    tol = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(grad[:classes].double(), eager_grad[:classes], rtol=tol, atol=tol / 4)


@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_large_logits(backend, case, size, dtype):
    """Uniform in +-size (1e4 fits fp16); 64 rows hit targets near the top and far below; exp of either sign leaves fp32's range."""
    logits = ((torch.rand(64, 33, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1) * size).to(dtype)
    with torch.no_grad():
        logits[0], logits[1] = size, -size  # all equal, at both ends
    logits.requires_grad_()
    target = torch.arange(64) % 32 + 1
    losses = logit_loss(logits, target, kind=case.kind, backend=backend, **case.tensors(33, wide(dtype)))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    exact, exact_grad = exact_of(case, logits, target, 33)
    ulp = torch.finfo(wide(dtype)).eps
    # a_k - a_y is rounded to ulp(2 size) before the exponential
    np.testing.assert_allclose(losses.detach(), exact, rtol=4 * size * ulp, atol=8 * ulp * size)
    rounding = torch.finfo(dtype).eps if dtype == torch.float16 else 0
    np.testing.assert_allclose(grad.double(), exact_grad, rtol=4 * size * ulp + rounding, atol=4 * ulp + rounding / 4)


@pytest.mark.parametrize("classes", [2, 3, 10, 17, 100, 1000])
@pytest.mark.parametrize("r", [1e-3, 1e-6, 1e-10])
def test_p_near_one(backend, classes, r):
    """1 - p = r/(1+r) with r summed without the target: the true class's gradient keeps its digits, so does the loss.

    Alone, inside ABLoss, and with the target first, in the middle and last (in a lane and in the tail).
    """
    target = torch.tensor([0, classes // 2, classes - 1])
    logits = torch.randn(3, classes, generator=torch.Generator().manual_seed(2))
    logits[range(3), target] = -INF
    logits[range(3), target] = logits.logsumexp(1) - math.log(r)
    logits.requires_grad_()
    exact, exact_grad = oracle.cross_entropy(logits.detach().double(), target)
    assert exact[0] == pytest.approx(r, rel=1e-2)  # the size that was meant
    losses = logit_loss(logits, target, backend=backend)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    np.testing.assert_allclose(losses.detach(), exact, rtol=1e-5)
    np.testing.assert_allclose(grad[range(3), target], exact_grad[range(3), target], rtol=1e-5)
    loss = ab.ABLoss(ab.CrossEntropy(backend=backend), lam=-0.5, backend=backend)(logits, target)
    (grad,) = torch.autograd.grad(loss, logits)
    weights = oracle.ABLoss(-0.5)(exact).weights
    np.testing.assert_allclose(grad[range(3), target], (exact_grad * weights[:, None] / 3)[range(3), target], rtol=1e-5)


def test_p_near_zero(backend):
    """Targets 20, 100 and 3e4 below the rest: loss = the distance + log of the others, gradient -1 exactly at the end."""
    logits = torch.zeros(3, 19)
    target = torch.tensor([0, 17, 18])
    logits[range(3), target] = torch.tensor([-20.0, -100.0, -3e4])
    logits.requires_grad_()
    losses = logit_loss(logits, target, backend=backend)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    np.testing.assert_allclose(losses.detach(), np.array([20, 100, 3e4]) + math.log(18), rtol=2e-7)
    np.testing.assert_allclose(grad[range(3), target], -1, rtol=2e-7)
    np.testing.assert_allclose(grad[1, 0], 1 / 18, rtol=1e-6)


@pytest.mark.parametrize("shape", [(4096, 37), (600, 1500), (6, 19, 64, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_1_and_2_threads(backend, threads, shape, dtype):
    """Large enough to be split by rows, by blocks of rows of more than a thousand classes, and by pixels."""
    logits, target = make(shape, dtype)
    criterion = ab.CrossEntropy(label_smoothing=0.1, backend=backend)
    results = []
    for n in (1, 2, 2, 1):
        threads(n)
        losses = criterion(logits, target)
        (grad,) = torch.autograd.grad(losses.sum(), logits)
        robust = ab.ABLoss(ab.CrossEntropy(backend=backend), lam=0.8, backend=backend)
        value = robust(logits, target)
        (robust_grad,) = torch.autograd.grad(value, logits)
        results.append((losses.detach(), grad, value.detach(), robust_grad, robust.log_s.clone(), robust.last.weights))
    for other in results[1:]:
        for ours, again in zip(results[0], other):
            assert torch.equal(ours, again)


@pytest.mark.parametrize("form", ["loss", "mean", "robust"])
def test_loss_scaling_keeps_small_half_gradients(backend, form):
    """fp16 with a GradScaler: the upstream 2^16 lifts small gradients above fp16's range before they are rounded, as in eager torch.

    Of the 64 x 33 gradients over 100 lie below fp16's normal range, 6e-5, and some below its smallest number, 6e-8.
    """
    logits, target = make((64, 33), torch.float16)
    exact, exact_grad = oracle.cross_entropy(logits.detach().double(), target)
    criterion = ab.CrossEntropy(reduction="none" if form != "mean" else "mean", backend=backend)
    if form == "robust":
        criterion = ab.ABLoss(criterion, lam=-0.5, backend=backend)
        exact_grad = exact_grad * oracle.ABLoss(-0.5)(exact).weights[:, None]
    value = criterion(logits, target)
    scale = 2.0**16 if form != "loss" else 2.0**10  # the sum of rows, or its mean: neither overflows
    (grad,) = torch.autograd.grad(value.sum() * scale, logits)
    wanted = exact_grad * scale / (1 if form == "loss" else 64)
    assert (np.abs(wanted / scale) < 6e-5).sum() > 100 and (np.abs(wanted / scale) < 6e-8).any() and np.abs(wanted).max() < 6e4
    np.testing.assert_allclose(grad.double(), wanted, rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_classes(one_backend, rows):
    """(B, 0) logits: ignored rows have loss 0, as in torch; any label is out of range."""
    ignored = torch.full((rows,), -100)
    for loss in (ab.CrossEntropy(backend=one_backend), ab.ABLoss(lam=0.5, backend=one_backend)):
        assert loss(torch.zeros(rows, 0), ignored).abs().sum() == 0
    if rows:
        with pytest.raises(IndexError, match=r"\b0\b"):
            ab.CrossEntropy(backend=one_backend)(torch.zeros(rows, 0), ignored * 0)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_bad_reduction_and_backend():
    with pytest.raises(ValueError, match="(?s)reduction.*median.*none"):
        ab.CrossEntropy(reduction="median")(torch.zeros(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="(?s)backend.*abacus"):
        ab.CrossEntropy(backend="abacus")(torch.zeros(2, 3), torch.tensor([0, 1]))


def test_bad_labels_of_images(one_backend):
    """The first bad label's value is named whatever the shape."""
    target = torch.zeros(2, 3, 4, dtype=torch.int64)
    target[1, 2, 0] = 11
    with pytest.raises(IndexError, match=r"\b11\b"):
        ab.CrossEntropy(backend=one_backend)(torch.zeros(2, 5, 3, 4), target)
