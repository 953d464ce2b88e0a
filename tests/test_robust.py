"""ABLoss: loss, gradient, weights, log s and what it reports, against the oracle, for every way in which losses reach it."""

import copy
import math
import pickle
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import absgd_fast as ab
from absgd_fast import _backend

INF = math.inf


def losses_of(rng, n=21, scale=1.0):
    """21 = a lane of 16 and a tail; above 0.01, because cross-entropies are never 0."""
    return torch.tensor(rng.exponential(scale, n) + 0.01)


def check(result, exact, rtol=1e-11):
    """`result`: (value, d loss/d L, criterion) of one forward and backward; `exact`: the oracle's Forward and state."""
    value, slope, criterion = result
    forward, log_s = exact
    close = partial(np.testing.assert_allclose, rtol=rtol, atol=1e-13)
    close(value.detach(), forward.loss, err_msg="loss")
    close(slope, forward.grad, err_msg="gradient")
    close(criterion.log_s, log_s, err_msg="log s")
    close(criterion.last.weights, forward.weights, err_msg="weights")
    if not math.isnan(forward.loss):
        close(criterion.last.ess, forward.ess, err_msg="ess")
        close(criterion.last.mean_loss, forward.mean_loss, err_msg="mean loss")
        close(criterion.objective, forward.objective, err_msg="objective")


def run(criterion, entry, losses, valid=None, **keywords):
    leaf, args, more = entry.inputs(losses, valid)
    value = criterion(*args, **more, **keywords)
    value.backward()
    return value, entry.slope(leaf, losses), criterion


options = st.fixed_dictionaries(
    {
        "lam": st.sampled_from([-0.5, 0.25, 2.0, -5.0, INF, -INF]),
        "gamma": st.sampled_from([0.9, 0.5, 0.1, 1.0]),
        "alpha": st.sampled_from([0.4, 1.0]),
        "mix": st.sampled_from([0.0, 0.3]),
        "init": st.sampled_from(["first", "zero"]),
        "normalizer": st.sampled_from(["moving", "batch", "none"]),
        "max_weight": st.sampled_from([None, 0.6]),
    }
)
arguments = st.fixed_dictionaries({k: st.booleans() for k in ("sample_weight", "mask", "score", "update")})


@pytest.mark.covering(1)
@given(options=options, calls=st.lists(arguments, min_size=3, max_size=3), seed=st.integers(0, 999))
def test_three_steps_are_the_oracles(backend, entry, options, calls, seed):
    """All options and all arguments together; three steps, so that log s is an average of averages."""
    rng = np.random.default_rng(seed)
    criterion = ab.ABLoss(entry.criterion(backend), backend=backend, **options).double()
    exact = oracle.ABLoss(**options)
    for call in calls:
        losses = losses_of(rng, 21)
        valid = rng.random(21) < 0.7 if call["mask"] else None
        extra = {k: torch.tensor(rng.random(21) * 2) for k in ("sample_weight", "score") if call[k]}
        result = run(criterion, entry, losses, valid, update=call["update"], **extra)
        check(result, (exact(losses, mask=valid, update=call["update"], **extra), exact.log_s))


def test_oracle_options_matter(rng):
    """Each option and argument of the property above changes the oracle's numbers: none is tested vacuously."""
    losses = [rng.exponential(1.0, 21) for _ in range(2)]

    def outcome(call=None, **options):
        exact = oracle.ABLoss(**({"lam": 0.5} | options))
        exact(losses[0])
        forward = exact(losses[1], **(call or {}))
        return forward.loss, *forward.grad, exact.log_s

    plain = outcome()
    changed = [
        dict(lam=-0.5),
        dict(lam=INF),
        dict(gamma=0.5),
        dict(alpha=0.4),
        dict(mix=1.0),
        dict(init="zero"),
        dict(normalizer="batch"),
        dict(normalizer="none"),
        dict(max_weight=0.3),
    ]
    calls = [dict(sample_weight=rng.random(21)), dict(mask=rng.random(21) < 0.7), dict(score=rng.random(21)), dict(update=False)]
    outcomes = [outcome(**c) for c in changed] + [outcome(call=c) for c in calls]
    assert all(not np.allclose(plain, o, rtol=1e-6) for o in outcomes)


@pytest.mark.parametrize("lam", [0.5, -0.5])
def test_single_precision(backend, entry, dtype, lam, rng):
    """The default module: log s is fp32, loss and weights are fp32 (fp64 for fp64), gradients have the logits' dtype."""
    criterion = ab.ABLoss(entry.criterion(backend), lam=lam, backend=backend)
    exact = oracle.ABLoss(lam)
    for _ in range(3):
        leaf, args, _ = entry.inputs(losses_of(rng).to(dtype))
        value = criterion(*args)
        value.backward()
        kept = criterion.last.losses  # as the criterion saw them: its inputs were rounded to dtype
        forward = exact(kept.double())
        half = dtype in (torch.bfloat16, torch.float16)
        if entry.criterion(backend).__class__ is ab.CrossEntropy:
            assert kept.dtype == (torch.float32 if half else dtype)
        assert value.dtype == criterion.last.weights.dtype == (torch.float32 if half else dtype)
        assert leaf.grad.dtype == dtype and criterion.log_s.dtype == torch.float32
        np.testing.assert_allclose(value.detach(), forward.loss, rtol=3e-6)
        np.testing.assert_allclose(criterion.last.weights, forward.weights, rtol=3e-6)
        np.testing.assert_allclose(criterion.log_s, exact.log_s, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("options", [{}, {"mix": 1.0}, {"normalizer": "batch"}, {"max_weight": 1.2}, {"gamma": 0.3}], ids=str)
def test_gradient_is_that_of_constant_weights(backend, case, options, rng):
    """(B, C, d) logits through a linear layer: autograd of (1/n) sum (W + mix) L with W from the oracle, in eager torch."""
    layer = torch.nn.Linear(6, 5 * 4).double()
    x, target = torch.tensor(rng.normal(size=(7, 6))), torch.tensor(rng.integers(0, 5, (7, 4)))
    keywords = case.tensors(5, torch.float64)
    fused = ab.ABLoss(case.module(5, backend=backend), lam=0.625, backend=backend, **options).double()
    exact = oracle.ABLoss(0.625, **options)
    for _ in range(3):
        value = fused(layer(x).view(7, 5, 4), target)
        grads = torch.autograd.grad(value, layer.parameters())
        losses = case.eager(layer(x).view(7, 5, 4), target, **keywords).flatten()
        valid = case.valid(oracle.rows(layer(x).view(7, 5, 4).detach()), target.flatten(), **case.options(5))
        forward = exact(losses.detach(), mask=valid)
        wanted = torch.autograd.grad((torch.tensor(forward.grad) * losses).sum(), layer.parameters())
        torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-12)
        assert value.item() == pytest.approx(forward.loss, rel=1e-11)
        assert fused.last.weights.shape == fused.last.losses.shape == (7, 4)
        np.testing.assert_allclose(fused.last.weights.flatten(), forward.weights, rtol=1e-11)
        np.testing.assert_allclose(fused.log_s, exact.log_s, rtol=1e-11, atol=1e-13)
        x = x * 1.2


def test_gradcheck_with_given_weights(backend, rng):
    """With score= the weights do not depend on the logits, so the loss's true derivative is the gradient returned."""
    target, score = torch.tensor([0, 3, 1, 2, 4]), torch.tensor(rng.random(5))
    criterion = ab.ABLoss(ab.CrossEntropy(backend=backend), lam=0.5, mix=0.4, backend=backend).double()
    logits = torch.tensor(rng.normal(size=(5, 5)), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: criterion(x, target, score=score, update=False), logits)


@pytest.mark.parametrize("lam", [0.5, -0.5])
def test_step_is_the_gradient_of_the_objective(backend, entry, lam, rng):
    """gamma' = alpha = 1: the gradient is that of lam log mean exp(L/lam), by central differences."""
    losses = losses_of(rng, 7)
    _, slope, criterion = run(
        ab.ABLoss(entry.criterion(backend), lam=lam, normalizer="batch", backend=backend).double(), entry, losses
    )

    def objective(x):
        return lam * (oracle.logsumexp(x / lam) - math.log(7))

    assert float(criterion.objective) == pytest.approx(objective(losses.numpy()), rel=1e-11)
    for j, step in enumerate(np.eye(7) * 1e-6):
        numeric = (objective(losses.numpy() + step) - objective(losses.numpy() - step)) / 2e-6
        assert float(slope[j]) == pytest.approx(numeric, rel=1e-6, abs=1e-9)


def test_numbers_by_hand(one_backend):
    """lam = 1, gamma = 1/2, losses ln 1, ln 3 then ln 2, ln 6: s = 2, then (2 + 4)/2 = 3; W = 1/2, 3/2, then 2/3, 2."""
    criterion = ab.ABLoss(lambda x: x, lam=1.0, gamma=0.5, backend=one_backend).double()
    ln = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64).log()
    assert float(criterion(ln[[0, 2]])) == pytest.approx(1.5 * math.log(3) / 2)
    assert float(criterion(ln[[1, 3]])) == pytest.approx((2 / 3 * math.log(2) + 2 * math.log(6)) / 2)
    assert float(criterion.log_s) == pytest.approx(math.log(3)) == float(criterion.objective)
    assert criterion.last.weights.tolist() == pytest.approx([2 / 3, 2])
    assert float(criterion.last.ess) == pytest.approx((2 / 3 + 2) ** 2 / (4 / 9 + 4))
    assert float(criterion.last.mean_loss) == pytest.approx(math.log(12) / 2)


def test_default_criterion(one_backend, rng):
    """criterion=None is cross-entropy per sample."""
    logits, target = torch.tensor(rng.normal(size=(6, 4))), torch.tensor([0, 1, 2, 3, -100, 1])
    values = [
        c(logits, target)
        for c in (ab.ABLoss(lam=0.5, backend=one_backend), ab.ABLoss(ab.CrossEntropy(), lam=0.5, backend=one_backend))
    ]
    exact = oracle.ABLoss(0.5)(oracle.cross_entropy(logits, target)[0], mask=target != -100)
    assert torch.equal(*values) and values[0].item() == pytest.approx(exact.loss, rel=1e-6)


def test_wrapped_torch_loss_keeps_its_options(backend, rng):
    """nn.CrossEntropyLoss with weight and smoothing: as a function around F.cross_entropy, fused or not."""
    weight = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
    keywords = dict(weight=weight, label_smoothing=0.2, reduction="none")
    logits, target = torch.tensor(rng.normal(size=(6, 3)), requires_grad=True), torch.tensor([0, 1, 2, 2, 1, 0])
    results = []
    for inner in (torch.nn.CrossEntropyLoss(**keywords), partial(F.cross_entropy, **keywords)):
        criterion = ab.ABLoss(inner, lam=0.5, backend=backend).double()
        value = criterion(logits, target)
        results.append((value.detach(), *torch.autograd.grad(value, logits), criterion.log_s.clone()))
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13)


class Ops(TorchDispatchMode):
    """The operators that run, views aside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "absgd_fast" or not (op.is_view or op is torch.ops.aten.detach.default):
            self.names.append(op.name())
        return op(*args, **(kwargs or {}))


def ops_of(call):
    with Ops() as ops:
        result = call()
    return result, ops.names


def test_wrapped_torch_loss_with_soft_targets(one_backend, rng):
    """nn.CrossEntropyLoss with probabilities, weights and smoothing: the oracle's numbers for 3 steps, fused."""
    weight = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
    keywords = dict(weight=weight, label_smoothing=0.2)
    criterion = ab.ABLoss(torch.nn.CrossEntropyLoss(**keywords, reduction="none"), lam=0.5, backend=one_backend).double()
    exact = oracle.ABLoss(0.5)
    for _ in range(3):
        logits = torch.tensor(rng.normal(size=(6, 3)), requires_grad=True)
        target = torch.tensor(rng.dirichlet([1, 1, 1], 6))
        value, names = ops_of(lambda: criterion(logits, target))
        if one_backend != "reference":
            # beside it at most the allocation of what a GPU's backward makes the weights from
            assert [n for n in names if n != "aten::empty.memory_format"] == ["absgd_fast::robust_logit_loss"]
        losses, grads = oracle.soft_cross_entropy(logits.detach(), target, **keywords)
        forward = exact(losses)
        assert float(value) == pytest.approx(forward.loss, rel=1e-11)
        np.testing.assert_allclose(torch.autograd.grad(value, logits)[0], grads * forward.grad[:, None], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(criterion.last.weights, forward.weights, rtol=1e-11)


@pytest.mark.skipif(not _backend.available("cpu"), reason="no CPU kernels")
def test_one_operator_forward_and_one_backward(case):
    """Every loss of the table inside ABLoss, and alone; the first call may make class vectors."""
    logits = torch.zeros(6, 5, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 1])
    loss = case.module(5, torch.float32, backend="cpu")
    for criterion, name in ((ab.ABLoss(loss, lam=0.5, backend="cpu"), "robust_logit_loss"), (loss, "logit_loss")):
        criterion(logits, target)
        value, names = ops_of(lambda: criterion(logits, target))
        assert names == [f"absgd_fast::{name}"]
        (_, names) = ops_of(lambda: torch.autograd.grad(value, logits, torch.ones_like(value)))
        assert [n for n in names if n != "aten::ones_like"] == ["absgd_fast::scale_"]


def test_any_number_of_arguments(one_backend):
    """A criterion may take any arguments and return losses of any shape."""
    criterion = ab.ABLoss(lambda a, b, power: (a - b).abs() ** power, lam=-2.0, backend=one_backend).double()
    a = torch.arange(12, dtype=torch.float64).view(3, 2, 2) / 5
    value = criterion(a, 0.5, 3)
    exact = oracle.ABLoss(-2.0)(np.abs(a.numpy() - 0.5).flatten() ** 3)
    assert value.item() == pytest.approx(exact.loss, rel=1e-11)
    assert value.shape == () and criterion.last.weights.shape == (3, 2, 2)
    np.testing.assert_allclose(criterion.last.weights.flatten(), exact.weights, rtol=1e-11)


@pytest.mark.parametrize("shape", [(3, 4), (12,)], ids=str)
def test_arguments_have_the_shape_of_the_losses(one_backend, shape, rng):
    losses, weight, score = (torch.tensor(rng.random(12)) for _ in range(3))
    mask = torch.arange(12) % 5 != 1
    criterion = ab.ABLoss(lambda x: x, lam=0.5, backend=one_backend).double()
    value = criterion(losses.view(shape), sample_weight=weight.view(shape), mask=mask.view(shape), score=score.view(shape))
    exact = oracle.ABLoss(0.5)(losses, sample_weight=weight, mask=mask, score=score)
    assert value.item() == pytest.approx(exact.loss, rel=1e-11) and criterion.last.weights.shape == shape


def test_mask_and_ignored_rows_together(backend, rng):
    """A row is valid if neither ignore_index nor the mask says otherwise; labels of an image, int32."""
    logits, target = torch.tensor(rng.normal(size=(4, 5, 6)), requires_grad=True), torch.tensor(rng.integers(0, 5, (4, 6)))
    target[1, 2] = target[3, 0] = -100
    mask = torch.tensor(rng.random((4, 6)) < 0.7)
    mask[1, 2], mask[3, 0] = True, False
    criterion = ab.ABLoss(ab.CrossEntropy(backend=backend), lam=0.5, backend=backend).double()
    value = criterion(logits, target.int(), mask=mask)
    (grad,) = torch.autograd.grad(value, logits)
    losses, grads = oracle.cross_entropy(oracle.rows(logits.detach()), target.flatten())
    forward = oracle.ABLoss(0.5)(losses, mask=(mask & (target != -100)).flatten())
    assert value.item() == pytest.approx(forward.loss, rel=1e-11)
    np.testing.assert_allclose(grad, oracle.unrows(grads * forward.grad[:, None], logits.shape), rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(criterion.last.weights.flatten(), forward.weights, rtol=1e-11)


def test_no_gradient_reaches_weights_score_or_sample_weight(one_backend, rng):
    losses, weight, score = (torch.tensor(rng.random(5), requires_grad=True) for _ in range(3))
    value = ab.ABLoss(lambda x: x, lam=0.5, backend=one_backend).double()(losses, sample_weight=weight, score=score)
    value.backward()
    forward = oracle.ABLoss(0.5)(losses.detach(), sample_weight=weight.detach(), score=score.detach())
    np.testing.assert_allclose(losses.grad, forward.grad, rtol=1e-11)
    assert score.grad is None or score.grad.abs().max() == 0


def test_backward_scales_with_upstream(backend, entry, rng):
    losses = losses_of(rng)
    slopes = []
    for scale in (1.0, -1024.0):  # as an AMP scaler does; a power of two, so the result is exact
        leaf, args, _ = entry.inputs(losses)
        (ab.ABLoss(entry.criterion(backend), lam=0.5, backend=backend).double()(*args) * scale).backward()
        slopes.append(leaf.grad)
    assert torch.equal(slopes[0] * -1024, slopes[1])


@pytest.mark.parametrize("lam", [0.1, -0.1])
def test_exponent_of_500(backend, entry, lam):
    """exp(500) is infinite in fp32: the weights are still n softmax(L/lam), and the next step is still right."""
    losses = torch.tensor([50.0, 49.9, 1.0])
    criterion, exact = ab.ABLoss(entry.criterion(backend), lam=lam, backend=backend), oracle.ABLoss(lam)
    for batch in (losses, losses / 2, losses):
        value, slope, _ = run(criterion, entry, batch)
        forward = exact(batch)
        # z = 500 is known to 500 ulp: 3e-5
        np.testing.assert_allclose(float(value.detach()), forward.loss, rtol=2e-4, atol=1e-30)
        np.testing.assert_allclose(slope, forward.grad, rtol=2e-4, atol=1e-30)
        np.testing.assert_allclose(criterion.log_s, exact.log_s, rtol=1e-6)


def test_dft(backend, rng):
    """Dynamic fine-tuning: lam = -1, W = p(label); log s stays 0."""
    logits, target = torch.tensor(rng.normal(0, 2, (6, 4)), requires_grad=True), torch.tensor([0, 1, 2, 3, -100, 1])
    criterion = ab.DFT(ab.CrossEntropy(backend=backend)).double()
    value = criterion(logits, target)
    (grad,) = torch.autograd.grad(value, logits)
    valid = target != -100
    losses = F.cross_entropy(logits[valid], target[valid], reduction="none")
    p = logits.softmax(1).detach()[valid, target[valid]]
    (wanted,) = torch.autograd.grad((p * losses).mean(), logits)
    torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(criterion.last.weights[valid], p, rtol=1e-11)
    assert float(criterion.log_s) == 0 and criterion.last.weights[4] == 0
    assert float(ab.DFT()(logits.detach(), target)) == pytest.approx(value.item(), rel=1e-6)


def test_max_weight_leaves_the_state(one_backend, rng):
    losses = losses_of(rng)
    free, clamped = (ab.ABLoss(lambda x: x, lam=0.3, max_weight=m, backend=one_backend).double() for m in (None, 1.1))
    for _ in range(2):
        free(losses), clamped(losses)
        assert torch.equal(free.log_s, clamped.log_s)
        assert free.last.weights.max() > 1.1  # otherwise nothing was clamped
        assert torch.equal(clamped.last.weights, free.last.weights.clamp(max=1.1))


def test_last_is_detached_and_optional(one_backend, rng):
    criterion = ab.ABLoss(lam=0.5, backend=one_backend)
    logits = torch.tensor(rng.normal(size=(6, 4)), requires_grad=True)
    criterion(logits, torch.tensor([0, 1, 2, 3, 0, 1])).backward()
    last = criterion.last
    assert not any(t.requires_grad for t in (last.losses, last.weights, last.ess, last.mean_loss, criterion.log_s))
    assert last.ess.shape == last.mean_loss.shape == ()
    assert repr(last) == f"LastForward(n=6, mean_loss={last.mean_loss:.6g}, ess={last.ess:.6g})"
    criterion(logits, torch.tensor([0, 1, -100, -100, -100, -100]))
    assert repr(criterion.last).startswith("LastForward(n=2, ")


def test_last_is_of_the_last_forward(backend, rng):
    """Computed when read, from what was: not from logits overwritten, a lam set or a log s moved meanwhile."""
    logits, target = torch.tensor(rng.normal(size=(6, 4)), requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    read = []
    for late in (False, True):
        criterion, hidden = ab.ABLoss(ab.CrossEntropy(backend=backend), lam=0.5, backend=backend), logits * 1
        criterion(hidden, target)
        last = criterion.last
        if late:
            hidden.detach().zero_()
            criterion.set_lam(3.0)
            criterion(logits * 2, target)
        read.append([x.clone() for x in (last.losses, last.weights, last.ess, last.mean_loss)])
    assert all(torch.equal(a, b) for a, b in zip(*read))


def test_deepcopy_and_pickle(one_backend, rng):
    """A copy goes on from the same state, alone."""
    logits, target = torch.tensor(rng.normal(size=(6, 4)), requires_grad=True), torch.tensor([0, 1, 2, 3, 0, 1])
    criterion = ab.ABLoss(ab.CrossEntropy(), lam=0.5, gamma=0.3, mix=0.2, backend=one_backend)
    criterion(logits, target).backward()
    copies = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    values = [c(logits * 2, target) for c in copies]
    assert torch.equal(values[0], criterion(logits * 2, target)) and torch.equal(*values)
    assert all(torch.equal(c.log_s, criterion.log_s) and c.log_s is not criterion.log_s for c in copies)


def test_compiles_into_one_graph(one_backend, rng):
    """fullgraph=True through ABLoss(CrossEntropy): the same losses, gradients and log s as eagerly, four steps running."""
    torch._dynamo.reset()
    criterion = ab.CrossEntropy(backend=one_backend)
    eager, inner = (ab.ABLoss(criterion, lam=0.5, backend=one_backend) for _ in range(2))
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    target = torch.tensor([0, 1, 2, 3, 4, 1])
    for _ in range(4):
        x = torch.tensor(rng.normal(0, 2, (6, 5)), dtype=torch.float32, requires_grad=True)
        results = []
        for criterion in (eager, compiled):
            value = criterion(x, target)
            results.append((value.detach(), *torch.autograd.grad(value, x)))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(eager.log_s, inner.log_s)
    assert math.isfinite(inner.log_s)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("make", [ab.CrossEntropy, ab.Focal, partial(ab.VS, [5, 4, 3, 2, 1])])
def test_nothing_compiles_anew(make, dynamic):
    """A model with ABLoss in one graph: once for all lambda, and with dynamic shapes for all batches."""
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    model, criterion = torch.nn.Linear(3, 5), ab.ABLoss(make(), lam=-1.0)
    stages = ab.TwoStage(criterion, lam=0.7, start=2, unit="step")
    loss = torch.compile(lambda x, y: criterion(model(x), y), fullgraph=True, dynamic=dynamic, backend=counted)
    frames = set()
    for step in range(6):
        n = 8 + step if dynamic else 8
        loss(torch.randn(n, 3), torch.arange(n) % 5).backward()
        frames.add(counted.frame_count)
        stages.step()
        if step == 3:
            criterion.set_lam(2.0)
    assert len(frames) == 1 and math.isfinite(criterion.log_s)


def test_functional_compiles_into_one_graph(one_backend, rng):
    torch._dynamo.reset()

    def weighted(logits, target, log_s):
        losses = ab.functional.logit_loss(logits, target, backend=one_backend)
        weights, new = ab.functional.robust_weights(losses, log_s, 0.7, backend=one_backend)
        return (weights * losses).mean(), new

    x, target = torch.tensor(rng.normal(size=(6, 5)), requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 1])
    results = []
    for f in (weighted, torch.compile(weighted, fullgraph=True, backend="aot_eager")):
        value, new = f(x, target, torch.tensor(0.3, dtype=torch.float64))
        results.append((value.detach(), new.detach(), *torch.autograd.grad(value, x)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shape", [(20, 10), (700, 10), (40, 600)])
def test_a_weight_of_a_row_that_does_not_count(one_backend, shape):
    """It may be NaN or infinite: the row is masked, ignored or pruned, and its gradient is 0."""
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target, mask = torch.arange(shape[0]) % shape[1], torch.arange(shape[0]) % 4 != 1
    target[2] = -100
    counts = mask & (target != -100)
    weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(1))
    grads = []
    for outside in (0.0, math.nan, math.inf):
        logits.grad = None
        criterion = ab.ABLoss(lam=0.7, backend=one_backend)
        criterion(logits, target, mask=mask, sample_weight=weight.where(counts, outside)).backward()
        grads.append(logits.grad)
    assert not grads[0][~counts].any() and grads[0][counts].any()
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
