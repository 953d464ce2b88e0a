"""Fused per-sample losses on logits: values and gradients against fp64, in every layout, dtype and instruction set."""

import math
from functools import cache, partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from tensors import LAYOUTS, wide

import absgd_fast as ab
from absgd_fast.functional import logit_loss

INF = math.inf
# 1..9: below a lane; then one below, at and above multiples of the lanes (4, 8, 16 floats) and of four of them (16, 32, 64)
CLASSES = [
    *range(1, 10),
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    95,
    97,
    127,
    128,
    129,
    255,
    257,
    511,
    513,
    999,
    1000,
    1001,
]
SPARSE = [1, 2, 3, 8, 17, 33, 70, 130, 1001]  # each kind of remainder once: for what only the formula of a row decides


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


def check(got, exact, eager, dtype, what, *, cancels=()):
    """Elementwise: 64 ulp, and one rounding of a half-precision gradient.

    The largest error: at most 4 times eager torch's, or 8 ulp of the largest number.
    """
    got, eager = (t.detach().double().numpy() for t in (got, eager))
    ulp = torch.finfo(wide(dtype)).eps
    rounding = torch.finfo(dtype).eps / 2 if what == "gradient" and dtype in (torch.bfloat16, torch.float16) else 0.0
    floor = max(4 * ulp if what in cancels else ulp * 2**-6, torch.finfo(dtype).tiny * torch.finfo(dtype).eps if rounding else 0)
    np.testing.assert_allclose(got, exact, rtol=64 * ulp + rounding, atol=floor, err_msg=what)
    if got.size and not rounding:
        theirs = np.abs(eager - exact)[np.isfinite(eager)].max(initial=0)  # eager torch's focal loss is NaN at p = 1
        bound = max(4 * theirs, 8 * ulp * np.abs(exact).max(), floor)
        assert np.abs(got - exact).max() <= bound, f"{what}: error beyond eager torch's"


# ---- values and gradients -------------------------------------------------------------------------------------------


@cache
def expected(case, classes, dtype):
    """Logits, labels, an upstream vector, and what the oracle and eager torch make of them: the same for every backend."""
    logits, target = make((5, classes), dtype, seed=classes)
    upstream = torch.linspace(-2, 1.5, 5, dtype=wide(dtype))
    exact, exact_grad = exact_of(case, logits, target, classes)
    leaf = logits.detach().to(wide(dtype)).requires_grad_()
    eager = case.eager(leaf, target, **case.tensors(classes, wide(dtype)))
    (eager_grad,) = torch.autograd.grad(eager, leaf, upstream)
    return logits, target, upstream, exact, exact_grad * upstream.double().numpy()[:, None], eager.detach(), eager_grad


@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_every_width(backend, case, dtype, index):
    """5 rows (an odd number) of every C: lanes, tails, blocks of lanes; any upstream vector; two widths per call share none."""
    widths = SPARSE if case.sparse else CLASSES
    for classes in widths[:: 1 if index == torch.int64 else 4]:
        logits, target, upstream, exact, exact_grad, eager, eager_grad = expected(case, classes, dtype)
        losses = logit_loss(logits, target.to(index), backend=backend, **case.tensors(classes, wide(dtype)))
        (grad,) = torch.autograd.grad(losses, logits, upstream)
        assert losses.dtype == wide(dtype) and losses.shape == (5,) and grad.dtype == dtype
        check(losses, exact, eager, dtype, "loss", cancels=case.cancels)
        check(grad, exact_grad, eager_grad, dtype, "gradient", cancels=case.cancels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_width_robust(backend, case, dtype):
    """The same widths through ABLoss, whose kernel is another one: one step from the middle of a run, 5 rows, upstream -3."""
    for classes in SPARSE if case.sparse else CLASSES[::2]:
        logits, target = make((5, classes), dtype, seed=classes)
        criterion = case.module(classes, wide(dtype), backend=backend)
        robust, exact = ab.ABLoss(criterion, lam=-0.5, backend=backend), oracle.ABLoss(-0.5)
        if dtype == torch.float64:
            robust = robust.double()
        robust.log_s.fill_(-0.75)
        exact.log_s = -0.75
        losses, grads = exact_of(case, logits, target, classes)
        forward = exact(losses, mask=case.valid(logits.detach().double(), target, **case.options(classes)))
        value = robust(logits, target)
        (grad,) = torch.autograd.grad(value, logits, torch.tensor(-3.0, dtype=value.dtype))
        # W = exp(z - log s'), both known to some ulp of the largest; below fp32's range it is 0 or has few digits left
        tol = (64 + 4 * np.abs(losses / 0.5).max()) * torch.finfo(wide(dtype)).eps
        tiny = 4 * torch.finfo(wide(dtype)).tiny
        np.testing.assert_allclose(value.detach(), forward.loss, rtol=tol, atol=tol if "loss" in case.cancels else tol**2)
        np.testing.assert_allclose(robust.last.weights, forward.weights, rtol=tol, atol=tiny)
        np.testing.assert_allclose(robust.log_s, exact.log_s, rtol=tol, atol=tol)
        wanted = grads * forward.grad[:, None] * -3
        cancelled = tol / 16 if "gradient" in case.cancels else tiny
        np.testing.assert_allclose(grad.double(), wanted, rtol=max(tol, torch.finfo(dtype).eps), atol=cancelled)


def test_shapes(backend, case, dtype):
    for shape in [(0, 5), (1, 5), (2, 5, 0), (0, 5, 3), (3, 6, 7), (2, 3, 5, 4), (2, 17, 3, 2, 2)]:
        check_shape(backend, case, dtype, shape)


def check_shape(backend, case, dtype, shape):
    logits, target = make(shape, dtype)
    options = case.tensors(shape[1], wide(dtype))
    losses = logit_loss(logits, target, backend=backend, **options)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    exact, exact_grad = exact_of(case, logits, target, shape[1])
    leaf = logits.detach().to(wide(dtype)).requires_grad_()
    eager = case.eager(leaf, target, **options) if logits.numel() else leaf.sum() + losses.detach()
    (eager_grad,) = torch.autograd.grad(eager.sum(), leaf)
    assert losses.shape == target.shape and grad.shape == logits.shape
    check(losses, exact, eager, dtype, "loss", cancels=case.cancels)
    check(grad, exact_grad, eager_grad, dtype, "gradient", cancels=case.cancels)


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
def test_reductions_are_torchs(backend, case, reduction):
    """A mean divides by the weights of the valid rows; nothing to divide by is NaN; any upstream scalar."""
    for shape in [(6, 5), (3, 5, 4), (0, 5)]:
        for ignored in ("some", "all", "none"):
            check_reduction(backend, case, reduction, shape, ignored)


def check_reduction(backend, case, reduction, shape, ignored):
    options = case.tensors(5, torch.float64)
    logits, target = make(shape, torch.float64, seed=4)  # with it `prune` drops some rows, not all
    ignore = options.get("ignore_index", -100)
    target = torch.where(target == ignore, 1, target)
    if ignored != "none":
        target = torch.where((target < 3) | (ignored == "all"), ignore, target)
    results = []
    for loss in (case.module(5, reduction=reduction, backend=backend), partial(case.eager, reduction=reduction, **options)):
        leaf = logits.detach().clone().requires_grad_()
        value = loss(leaf, target)
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


def labels_that_count(case, classes):
    """One of the labels that `case` does not ignore, for each of `classes` rows."""
    ignored = case.options(classes).get("ignore_index", -100)
    return torch.tensor([c for c in range(classes) if c != ignored] or [0])


@pytest.mark.parametrize("value", [math.nan, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nan_and_inf_logits(backend, case, value, dtype):
    """Row i has it in column i: every lane, block of lanes (70 = 4 x 16 + 6) and the tail meet it. The last row is clean."""
    for classes in (3, 70) if case.sparse else (3, 37, 70):
        check_nonfinite(backend, case, value, dtype, classes)


def check_nonfinite(backend, case, value, dtype, classes):
    logits, _ = make((classes + 1, classes), dtype)
    allowed = labels_that_count(case, classes)
    target = allowed[torch.arange(classes + 1) * 5 % len(allowed)]
    with torch.no_grad():
        logits[range(classes), range(classes)] = value
        logits[-1, target[-1]] = logits[-1].logsumexp(0) + 1  # p = 0.73 before class vectors: no row of the table prunes it
    losses = logit_loss(logits, target, backend=backend, **case.tensors(classes, wide(dtype)))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.isnan(losses[:-1]).all() and torch.isnan(grad[:-1]).all()
    assert torch.isfinite(losses[-1]) and torch.isfinite(grad[-1]).all()
    robust = ab.ABLoss(case.module(classes, wide(dtype), backend=backend), lam=0.5, backend=backend)
    value = robust(logits, target)
    (robust_grad,) = torch.autograd.grad(value, logits)
    assert torch.isnan(value) and torch.isnan(robust_grad[:-1]).all() and torch.isnan(robust.last.weights[:-1]).all()
    torch.testing.assert_close(robust_grad[-1], grad[-1])  # alone in its batch, the clean row has W = 1
    assert float(robust.log_s) == -INF and int(robust.nonfinite_batches) == 1
    eager = case.eager(logits.detach(), target, **case.tensors(classes, dtype))
    assert case.options(classes).get("prune") or torch.isnan(eager[:-1]).all()  # and torch agrees; NaN > k is False in it


@pytest.mark.parametrize("classes", [51, 95, 131, 161])
def test_label_in_every_place(backend, case, dtype, classes):
    """A row for each label: in groups of 4 registers (16 to 64 floats), in the overlapping last group or pair behind them."""
    logits, _ = make((classes, classes), dtype, scale=1.0)
    target = labels_that_count(case, classes)
    logits = logits.detach()[: len(target)].requires_grad_()
    losses = logit_loss(logits, target, backend=backend, **case.tensors(classes, wide(dtype)))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    robust = ab.ABLoss(case.module(classes, wide(dtype), backend=backend), lam=math.inf, backend=backend)
    (robust_grad,) = torch.autograd.grad(robust(logits, target), logits)
    leaf = logits.detach().double().requires_grad_()
    exact = case.eager(leaf, target, **case.tensors(classes, torch.float64))
    (exact_grad,) = torch.autograd.grad(exact.sum(), leaf)
    tol = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(losses.double(), exact.detach(), rtol=tol, atol=tol)
    tol = max(tol, torch.finfo(dtype).eps)
    count = (exact_grad != 0).any(1).sum()  # without pruned rows
    for got in (grad, robust_grad * count):
        torch.testing.assert_close(got.double(), exact_grad, rtol=tol, atol=tol / 100)


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001], ids=hex)
def test_every_nan_stays_nan(backend, bits):
    """Rounding to bfloat16 must not make a number of a NaN whose bits are all ones, in logits (row 0) or weights (row 1)."""
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    for classes in (10, 70):
        logits, target = make((4, classes), torch.bfloat16)
        with torch.no_grad():
            logits.view(torch.int16)[0, 3] = bits >> 16 | 1
        clean = torch.linspace(0.5, 1.5, classes)
        for vectors in ({}, {"scale": clean}, {"shift": clean}, {"scale": clean, "shift": clean}):
            for place in (None, *((name, k) for name in vectors for k in (0, 1, classes - 1, int(target[2])))):
                given = {name: vector.clone() for name, vector in vectors.items()}
                if place is not None:
                    given[place[0]][place[1]] = nan
                losses = logit_loss(logits, target, **given, backend=backend)
                upstream = torch.cat([torch.ones(1), nan, torch.ones(2)])
                (grad,) = torch.autograd.grad(losses, logits, upstream)
                assert torch.isnan(grad[:2]).all()
                assert torch.isfinite(grad[2:]).all() if place is None else torch.isnan(grad[2:]).all(), place
        robust = ab.ABLoss(ab.CrossEntropy(backend=backend), lam=1.0, backend=backend)
        (grad,) = torch.autograd.grad(robust(logits, target, sample_weight=upstream), logits)
        assert torch.isnan(grad[:2]).all() and torch.isfinite(grad[2:]).all()


@pytest.mark.parametrize("value", [math.nan, INF], ids=["nan", "inf"])
def test_nan_and_inf_logits_of_one_class(backend, case, value):
    logits, target = torch.tensor([[value], [0.5]], requires_grad=True), torch.tensor([0, 0])
    target[1] = case.options(1).get("ignore_index", -100)
    if target[1] == 0:
        return  # the only class is the ignored one
    losses = logit_loss(logits, target, backend=backend, **case.tensors(1, torch.float32))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.isnan(losses[0]) and torch.isnan(grad[0, 0]) and losses[1] == grad[1, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_minus_inf_logits(backend, case, dtype):
    """Legal in another class (row i, column i): zero gradient there. On the target (last row): p = 0. All: NaN. As torch."""
    for classes in (3, 70) if case.sparse else (3, 37, 70):
        check_minus_inf(backend, case, dtype, classes)


def check_minus_inf(backend, case, dtype, classes):
    logits, _ = make((classes + 2, classes), dtype)
    allowed = labels_that_count(case, classes)
    target = allowed[torch.arange(classes + 2) % len(allowed)]
    target[:classes] = torch.where(target[:classes] == torch.arange(classes), allowed[0], target[:classes])
    rows = torch.arange(classes)[target[:classes] != torch.arange(classes)]
    with torch.no_grad():
        logits[rows, rows] = -INF
        logits[classes, target[classes]] = -INF
        logits[classes + 1] = -INF
    losses = logit_loss(logits, target, backend=backend, **case.tensors(classes, wide(dtype)))
    leaf = logits.detach().double().requires_grad_()
    eager = case.eager(leaf, target, **case.tensors(classes, torch.float64))
    if case.options(classes).get("prune"):
        assert torch.isnan(losses[-1])
        losses, eager = losses[:-1], eager[:-1]
    torch.testing.assert_close(losses.double(), eager.detach(), rtol=1e-5, atol=1e-5, equal_nan=True)
    if case.every_class:  # so is torch's: the gradient of an infinite loss is not asked for
        assert (losses[rows] == INF).all()
        return
    (grad,) = torch.autograd.grad(losses[rows].sum(), logits)
    (eager_grad,) = torch.autograd.grad(eager[rows].sum(), leaf)
    assert grad[rows, rows].abs().max() == 0
    tol = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(grad[rows].double(), eager_grad[rows], rtol=tol, atol=tol / 4)


@pytest.mark.parametrize("size", [80.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_large_logits(backend, case, size, dtype):
    """Uniform in +-size (1e4 fits fp16). 64 rows have labels near the maximum and far below. exp leaves fp32's range."""
    logits = ((torch.rand(64, 33, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1) * size).to(dtype)
    with torch.no_grad():
        logits[0], logits[1] = size, -size  # all equal, at both ends
    logits.requires_grad_()
    target = torch.arange(64) % 32 + 1
    losses = logit_loss(logits, target, backend=backend, **case.tensors(33, wide(dtype)))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    exact, exact_grad = exact_of(case, logits, target, 33)
    ulp = torch.finfo(wide(dtype)).eps
    # a_k - a_y is rounded to ulp(2 size) before the exponential
    np.testing.assert_allclose(losses.detach(), exact, rtol=4 * size * ulp, atol=8 * ulp * size)
    rounding = torch.finfo(dtype).eps if dtype == torch.float16 else 0
    np.testing.assert_allclose(grad.double(), exact_grad, rtol=4 * size * ulp + rounding, atol=4 * ulp + rounding / 4)


@pytest.mark.parametrize("r", [1e-3, 1e-6, 1e-10])
def test_p_near_one(backend, case, r):
    """1 - p = r/(1+r) with r summed without the target: the true class's gradient keeps its digits, so does the loss.

    Alone, inside ABLoss, and with the target first, in the middle and last (in a lane and in the tail).
    """
    for classes in (2, 10, 100) if case.sparse else (2, 3, 10, 17, 100, 1000):
        check_near_one(backend, case, classes, r)


def check_near_one(backend, case, classes, r):
    options = case.options(classes)
    target = labels_that_count(case, classes)[[0, classes // 2 - (classes == 2), -1]]
    true = range(3), target
    x = torch.randn(3, classes, generator=torch.Generator().manual_seed(2)).double()
    scale, shift, margin = (
        torch.tensor(options.get(k, [d] * classes)).double() for k, d in (("scale", 1.0), ("shift", 0.0), ("margin", 0.0))
    )
    others = scale * x + shift
    others[true] = -INF
    x[true] = (others.logsumexp(1) - math.log(r) - shift[target] + margin[target]) / scale[target]
    logits = x.float().requires_grad_()
    exact, exact_grad = case.exact(logits.detach().double(), target, **options)
    n, _ = oracle.logit_loss(logits.detach().double(), target, scale=scale, shift=shift, margin=margin)
    assert n[0] == pytest.approx(r, rel=1e-2)  # the size that was meant
    losses = logit_loss(logits, target, backend=backend, **case.tensors(classes, torch.float32))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    np.testing.assert_allclose(losses.detach(), exact, rtol=1e-5)
    np.testing.assert_allclose(grad[true], exact_grad[true], rtol=1e-5)
    loss = ab.ABLoss(case.module(classes, torch.float32, backend=backend), lam=-0.5, backend=backend)(logits, target)
    (grad,) = torch.autograd.grad(loss, logits)
    weights = oracle.ABLoss(-0.5)(exact).weights
    np.testing.assert_allclose(grad[true], (exact_grad * weights[:, None] / 3)[true], rtol=1e-5)


def test_p_is_one(backend, case):
    """Labels 300 and 2000 above the rest: exp underflows, r = 0; a power below 1 of it has no finite derivative of its own."""
    target = labels_that_count(case, 19)[[0, 5]]
    logits = torch.zeros(2, 19)
    logits[range(2), target] = torch.tensor([300.0, 2000.0])
    logits.requires_grad_()
    losses = logit_loss(logits, target, backend=backend, **case.tensors(19, torch.float32))
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    exact, exact_grad = case.exact(logits.detach(), target, **case.options(19))
    np.testing.assert_allclose(losses.detach(), exact, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-5, atol=1e-30 if "gradient" not in case.cancels else 1e-6)


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
    """fp16 with a GradScaler: the upstream 2^16 lifts small gradients into fp16's range before rounding, as in eager torch.

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [3.0, 80.0])
def test_half_inputs_err_no_more_than_eager_torch(backend, case, dtype, size):
    """The same half inputs, judged against fp64; equality plus one rounding is allowed. 64 x 33: p of all sizes."""
    logits, _ = make((64, 33), dtype, scale=size / 2)
    target = labels_that_count(case, 33)[torch.arange(64) % 32]
    exact, exact_grad = exact_of(case, logits, target, 33)
    errors = []
    for f in (
        partial(logit_loss, backend=backend, **case.tensors(33, torch.float32)),
        partial(case.eager, **case.tensors(33, dtype)),
    ):
        losses = f(logits, target)
        (grad,) = torch.autograd.grad(losses.sum(), logits)
        pairs = ((losses, exact), (grad, exact_grad))
        errors.append([np.nan_to_num(np.abs(ours.detach().double().numpy() - wanted), nan=INF).max() for ours, wanted in pairs])
        if not errors[1:]:
            assert torch.isfinite(losses).all() and torch.isfinite(grad).all()
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # below it a rounding is not relative
    rounding = max(torch.finfo(dtype).eps * np.abs(exact_grad).max(), smallest)
    assert errors[0][0] <= errors[1][0] + 16 * size * torch.finfo(torch.float32).eps * max(np.abs(exact).max(), 1)
    assert errors[0][1] <= errors[1][1] + rounding


def test_ldam_of_cosines(backend):
    """The defaults, s = 30, on logits in [-1, 1]; p from 1e-20 to 1 - 1e-20. 7 x 33: two lanes of 16 and a tail."""
    numbers = [1 + (37 * c + 11) % 97 for c in range(33)]
    logits = (torch.rand(7, 33, generator=torch.Generator().manual_seed(0)) * 2 - 1).requires_grad_()
    with torch.no_grad():
        logits[0, 0], logits[1] = 1.0, -1.0
        logits[1, 5] = 1.0
    target = torch.arange(7) * 5
    losses = ab.LDAM(numbers, backend=backend)(logits, target)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    exact, exact_grad = oracle.logit_loss(logits.detach(), target, **oracle.ldam(numbers))
    # each 30 x - M is rounded to half an ulp of 30, 1e-6, before the exponential
    np.testing.assert_allclose(losses.detach(), exact, rtol=1e-5)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-5, atol=1e-35)


LAYOUT_SHAPES = [(5, 37), (3, 6, 7)]  # two lanes of 16 and a tail; more than one pixel


def test_layouts_of_every_loss(backend, case):
    for shape in LAYOUT_SHAPES:
        plain, target = make(shape)
        options = case.tensors(shape[1], torch.float32)
        upstream = torch.linspace(-1, 2, target.numel()).reshape(target.shape)
        wanted = None
        for move in LAYOUTS.values():
            losses = logit_loss(move(plain), target, backend=backend, **options)
            got = losses.detach(), *torch.autograd.grad(losses, plain, upstream)
            wanted = wanted or got
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_same_bits_for_1_and_2_threads_in_every_loss(one_backend, threads, case):
    """600 x 257: enough to be split by rows."""
    logits, target = make((600, 257))
    results = []
    for n in (1, 2):
        threads(n)
        robust = ab.ABLoss(case.module(257, torch.float32, backend=one_backend), lam=0.8, backend=one_backend)
        for loss in (case.module(257, torch.float32, backend=one_backend), robust):
            value = loss(logits, target)
            results += [value.detach(), *torch.autograd.grad(value.sum(), logits)]
    assert all(torch.equal(a, b) for a, b in zip(results[:4], results[4:]))


# ---- soft targets ---------------------------------------------------------------------------------------------------


def soft(shape, seed=0):
    """Probabilities; the first row is a label (a one and zeros)."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(shape, generator=generator, dtype=torch.float64) ** 4
    t = t / t.sum(1, keepdim=True)
    t[0] = 0
    t[0, 1] = 1
    return t


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_targets(backend, dtype, weight, smoothing):
    """Values and gradients against the oracle, reductions against torch (a mean divides by the number of rows)."""
    for shape in [(5, 3), (4, 37), (2, 5, 3), (0, 5)]:
        logits, _ = make(shape, dtype)
        target = soft(shape) if shape[0] else torch.zeros(shape, dtype=torch.float64)
        v = torch.linspace(0.5, 2, shape[1], dtype=torch.float64) if weight else None
        exact, exact_grad = oracle.soft_cross_entropy(
            oracle.rows(logits.detach().double()), oracle.rows(target), weight=v, label_smoothing=smoothing
        )
        tol = 64 * torch.finfo(wide(dtype)).eps
        for reduction in ("none", "mean", "sum"):
            given = None if v is None else v.to(wide(dtype))
            loss = ab.CrossEntropy(weight=given, label_smoothing=smoothing, reduction=reduction, backend=backend)
            value = loss(logits, target.to(wide(dtype)))
            (grad,) = torch.autograd.grad(value.sum(), logits)
            rows = max(len(exact), 1) if reduction == "mean" else 1
            wanted = {"none": exact, "mean": exact.sum() / rows if len(exact) else math.nan, "sum": exact.sum()}[reduction]
            theirs = F.cross_entropy(logits.detach().double(), target, weight=v, label_smoothing=smoothing, reduction=reduction)
            assert value.dtype == wide(dtype) and grad.dtype == dtype and value.shape == theirs.shape
            np.testing.assert_allclose(value.detach().flatten(), np.atleast_1d(wanted), rtol=tol, atol=tol)
            np.testing.assert_allclose(theirs.flatten(), np.atleast_1d(wanted), rtol=1e-12)
            rounding = max(tol, torch.finfo(dtype).eps)
            np.testing.assert_allclose(oracle.rows(grad.double()), exact_grad / rows, rtol=rounding, atol=rounding / 16)


def test_soft_targets_near_one_and_large(backend):
    """Logits up to +-80 and the probability of the only class that has any 1 - 1e-6.

    A row has no one label to leave out of the sum: log p is known to an ulp of the logits' differences (as in eager torch).
    """
    logits = torch.zeros(4, 6)
    logits[0] = torch.tensor([80.0, -80, 3, 79, -2, 0])
    logits[1, 2] = math.log(5e6)
    logits[2, 1], logits[3] = -80, 80
    target = soft((4, 6)).float()
    target[1] = torch.eye(6)[2]
    leaf = logits.requires_grad_()
    losses = ab.CrossEntropy(backend=backend)(leaf, target)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    exact, exact_grad = oracle.soft_cross_entropy(leaf.detach(), target)
    np.testing.assert_allclose(losses.detach(), exact, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(grad, exact_grad, rtol=4e-5, atol=1e-6)
    assert exact[1] == pytest.approx(1e-6, rel=1e-2)


def test_soft_targets_of_a_masked_class(backend):
    """A class without probability may be at -inf, as with labels: the loss and gradient of the other classes."""
    logits = torch.tensor([[0.3, -INF, 1.0, -0.4]], requires_grad=True)
    target = torch.tensor([[0.2, 0.0, 0.5, 0.3]])
    losses = ab.CrossEntropy(backend=backend)(logits, target)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    rest = [0, 2, 3]
    exact, exact_grad = oracle.soft_cross_entropy(logits.detach()[:, rest], target[:, rest])
    np.testing.assert_allclose(losses.detach(), exact, rtol=1e-6)
    np.testing.assert_allclose(grad[:, rest], exact_grad, rtol=1e-5, atol=1e-7)
    assert grad[0, 1] == 0


def test_soft_targets_belong_to_cross_entropy(one_backend):
    """LDAM's margin stands at one label: without one it would silently be dropped."""
    x, t = torch.zeros(2, 3), torch.full((2, 3), 1 / 3)
    numbers = [3, 2, 1]
    losses = [
        ab.Focal(backend=one_backend),
        ab.GCE(backend=one_backend),
        ab.SCE(backend=one_backend),
        ab.LDAM(numbers, backend=one_backend),
    ]
    calls = [*losses, partial(logit_loss, margin=torch.ones(3), backend=one_backend)]
    for call in [*calls, *(ab.ABLoss(loss, lam=1.0, backend=one_backend) for loss in losses)]:
        with pytest.raises(ValueError, match="(?is)target.*label|soft|probabilit"):
            call(x, t)


# ---- class vectors and weights of classes -----------------------------------------------------------------------------


def test_class_vectors_by_hand(one_backend):
    """N = 16, 1: margins 1/2 max_m and max_m; VS scales 1 and 16^-1/4 = 1/2, shifts log 16/17 and log 1/17."""
    x = torch.tensor([[0.3, -0.2], [0.3, -0.2]], dtype=torch.float64)
    y = torch.tensor([0, 1])

    def two(a, b):  # cross-entropies of logits a (label 0) and b (label 1)
        return torch.log1p(torch.tensor([math.exp(a[1] - a[0]), math.exp(b[0] - b[1])], dtype=torch.float64))

    got = ab.LDAM([16, 1], max_m=0.4, s=10.0, backend=one_backend)(x, y)
    torch.testing.assert_close(got, two((3 - 2, -2), (3, -2 - 4)))
    both, zero, one = (0.3 + 2 * math.log(16 / 17), -0.1 + 2 * math.log(1 / 17)), (0.3, -0.1), (0.3, -0.2 + math.log(1 / 16))
    torch.testing.assert_close(ab.VS([16, 1], gamma=0.25, tau=2.0, backend=one_backend)(x, y), two(both, both))
    torch.testing.assert_close(ab.CDT([16, 1], gamma=0.25, backend=one_backend)(x, y), two(zero, zero))
    torch.testing.assert_close(ab.LogitAdjusted([16, 1], backend=one_backend)(x, y), two(one, one))
    for numbers in (np.array([16, 1]), torch.tensor([16, 1]), (16, 1)):
        torch.testing.assert_close(ab.CDT(numbers, gamma=0.25, backend=one_backend)(x, y), two(zero, zero))


@pytest.mark.parametrize("numbers", [[5000, 50, 1], [1, 1, 1, 1], [10**9, 7], [3]], ids=str)
def test_class_weights(numbers):
    for beta in (0.0, 0.9, 0.9999, 1 - 1e-9):
        w = ab.class_balanced_weights(numbers, beta)
        np.testing.assert_allclose(w, oracle.class_balanced_weights(numbers, beta), rtol=1e-6)
        assert w.dtype == torch.float32 and w.sum() == pytest.approx(len(numbers))
    torch.testing.assert_close(ab.class_balanced_weights(numbers), ab.class_balanced_weights(numbers, 0.9999))
    for nu in (0.0, 0.5, 1.0, 3.0):
        w = ab.adrw_weights(numbers, nu)
        np.testing.assert_allclose(w, oracle.adrw_weights(numbers, nu), rtol=1e-6)
        assert w.dtype == torch.float32 and w.sum() == pytest.approx(len(numbers))


def test_cosine_classifier():
    """cos(h, W_k) for any leading shape, finite with gradient at h = 0, one parameter; LDAM on top of it learns."""
    torch.manual_seed(0)
    layer = ab.CosineClassifier(4, 3).double()
    h = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    (weight,) = layer.parameters()
    assert weight.shape == (3, 4)
    wanted = torch.einsum("bik,ck->bic", h, weight) / h.norm(dim=-1)[..., None] / weight.norm(dim=-1)
    torch.testing.assert_close(layer(h), wanted)
    torch.testing.assert_close(layer(h * 1e3), wanted)
    zero = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    layer(zero).sum().backward()
    assert torch.equal(layer(zero), torch.zeros(1, 3, dtype=torch.float64)) and torch.isfinite(zero.grad).all()
    x, y, values = h.detach().reshape(10, 4), torch.arange(10) % 3, []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for _ in range(20):
        loss = ab.LDAM([4, 3, 3], reduction="mean")(layer(x), y)
        values.append(loss.item())
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert values[-1] < values[0]


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


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ab.Focal(gamma=-0.1), r"gamma.*-0\.1.*0"),
        (lambda: ab.Focal(gamma=math.nan), "gamma.*nan.*0"),
        (lambda: ab.GCE(q=0.0), r"q.*\b0.*1"),
        (lambda: ab.GCE(q=1.1), r"q.*1\.1.*1"),
        (lambda: ab.GCE(q=math.nan), "q.*nan.*1"),
        (lambda: ab.GCE(k=0.0), r"k.*\b0.*1"),
        (lambda: ab.GCE(k=1.0), r"k.*\b1.*1"),
        (lambda: ab.GCE(k=math.nan), "k.*nan.*1"),
        (lambda: ab.GCE(prune=True), "prune.*True.*k"),
        (lambda: ab.SCE(alpha=-1.0), "alpha.*-1.*0"),
        (lambda: ab.SCE(beta=math.inf), "beta.*inf.*0"),
        (lambda: ab.CrossEntropy(label_smoothing=1.5), r"label_smoothing.*1\.5.*0, 1"),
        (lambda: ab.CrossEntropy(label_smoothing=-0.5), r"label_smoothing.*-0\.5.*0, 1"),
        (lambda: ab.LDAM([1, 2], max_m=-1.0), "max_m.*-1.*0"),
        (lambda: ab.LDAM([1, 2], s=0.0), r"s.*\b0.*0"),
        (lambda: ab.VS([1, 2], gamma=-1.0), "gamma.*-1.*0"),
        (lambda: ab.VS([1, 2], tau=math.nan), "tau.*nan.*0"),
        (lambda: ab.LogitAdjusted([1, 2], tau=-2.0), "tau.*-2.*0"),
        (lambda: ab.CDT([1, 2], gamma=-2.0), "gamma.*-2.*0"),
        (lambda: ab.class_balanced_weights([1, 2], beta=1.0), "beta.*1.*0, 1"),
        (lambda: ab.class_balanced_weights([1, 2], beta=-0.1), r"beta.*-0\.1.*0, 1"),
        (lambda: ab.adrw_weights([1, 2], nu=-0.5), r"nu.*-0\.5.*0"),
        (lambda: ab.adrw_weights([1, 2], nu=math.nan), "nu.*nan.*0"),
    ],
)
def test_bad_numbers(make, words):
    """When the loss is made, not at the first batch: the argument, its value and the allowed range."""
    with pytest.raises(ValueError, match=f"(?s){words}"):
        make()


@pytest.mark.parametrize("numbers", [[1, 0, 2], [1, -3, 2], [1, math.nan], [1, math.inf], [], [[1, 2]]], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        ab.LDAM,
        ab.VS,
        ab.LogitAdjusted,
        ab.CDT,
        ab.class_balanced_weights,
        partial(ab.adrw_weights, nu=1.0),
        partial(ab.vs_tla_adrw, start=1),
    ],
    ids=["ldam", "vs", "la", "cdt", "class_balanced", "adrw", "recipe"],
)
def test_bad_counts(make, numbers):
    with pytest.raises(
        ValueError, match="(?s)cls_num_list.*" + r".*".join(str(n) for n in numbers if isinstance(n, (int, float)))
    ):
        make(numbers)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("loss", [ab.LDAM, ab.VS, ab.LogitAdjusted, ab.CDT])
def test_class_vectors_of_another_length(one_backend, loss, inside):
    loss = loss([5, 4, 3], backend=one_backend)
    call = ab.ABLoss(loss, lam=1.0, backend=one_backend) if inside else loss
    for classes in (2, 4):
        with pytest.raises(ValueError, match=rf"(?s)(?=.*cls_num_list)(?=.*\b3\b)(?=.*\b{classes}\b)"):
            call(torch.zeros(2, classes), torch.tensor([0, 1]))
    assert torch.isfinite(call(torch.zeros(2, 3), torch.tensor([0, 1]))).all()


# ---- logits that are masked by a large number --------------------------------------------------------------------------


MASKED = {
    "first": lambda classes, label: range(classes // 2),
    "last": lambda classes, label: range(classes // 2 + 1, classes),
    "every other": lambda classes, label: range(1, classes, 2),
    "all but the label": lambda classes, label: [k for k in range(classes) if k != label],
    "the label too": lambda classes, label: range(classes),
}


@pytest.mark.parametrize("mask", [-1e9, -1e10, -1e12, -1e18, -1e20, -1e30, -1e37, -1e38, -3e38, -INF])
@pytest.mark.parametrize("where", MASKED)
def test_masked_logits(backend, where, mask):
    """Vocabularies and actions are masked by any of these numbers. A row's loss and gradient are those of the other classes, to
    the rounding of the mask itself where nothing else is there."""
    for classes, dtype, apart in (
        (8, torch.float32, False),
        (40, torch.bfloat16, True),
        (1100, torch.float32, False),
        (4101, torch.bfloat16, False),
    ):
        if where == "the label too" and mask == -INF:
            continue
        for smoothing in (0.0, 0.1) if mask > -1e12 and where != "all but the label" else (0.0,):
            label = classes // 2
            draw = torch.randn(3, classes, generator=torch.Generator().manual_seed(classes)).to(dtype)
            draw[:, list(MASKED[where](classes, label))] = mask
            logits = draw.t().contiguous().t() if apart else draw
            x, wide = logits.detach().requires_grad_(), logits.double().requires_grad_()
            target = torch.full((3,), label)
            losses = logit_loss(x, target, label_smoothing=smoothing, backend=backend)
            exact = F.cross_entropy(wide, target, label_smoothing=smoothing, reduction="none")
            losses.sum().backward()
            exact.sum().backward()
            what = f"{where} of {classes} at {mask}"
            torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")
            near = 2**-7 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(x.grad.double(), wide.grad, rtol=near, atol=1e-6, msg=lambda text: f"{what}: {text}")
            criterion = ab.ABLoss(ab.CrossEntropy(label_smoothing=smoothing), lam=INF, backend=backend)
            torch.testing.assert_close(criterion(logits, target).double(), exact.mean(), rtol=1e-5, atol=1e-5)
