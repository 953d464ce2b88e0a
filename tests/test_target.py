"""TargetESS: a lambda for each batch, such that the effective sample size has a given share (MATH §1.7), against the oracle."""

import copy
import gc
import math
import pickle
import warnings

import numpy as np
import oracle
import pytest
import torch
from conftest import LOSSES, identity

import absgd_fast as ab
from absgd_fast import reference

INF, NAN = math.inf, math.nan
F32, F64 = torch.float32, torch.float64


def rng_of(name):
    return np.random.default_rng(len(name))


# Losses of every kind: name -> an array that float32 holds exactly enough.
BATCHES = {
    "normal": lambda rng: rng.normal(size=128),
    "exponential": lambda rng: rng.exponential(size=128),
    "offset of 1000": lambda rng: 1000 + rng.normal(size=128),
    "offset of -1000": lambda rng: rng.normal(size=128) - 1000,
    "tiny": lambda rng: 1e-4 * (1 + rng.random(128)),
    "large": lambda rng: 1e20 * rng.exponential(size=128),
    "one outlier": lambda rng: np.r_[rng.normal(size=127), 1e3],
    "one outlier below": lambda rng: np.r_[rng.normal(size=127), -1e3],
    "heavy tails": lambda rng: np.exp(3 * rng.normal(size=256)),
    "two clusters": lambda rng: np.r_[rng.normal(size=64), 50 + 1e-2 * rng.normal(size=64)],
    "half tied": lambda rng: np.r_[np.zeros(32), np.ones(32)],
    "most tied": lambda rng: np.r_[np.full(60, 2.0), rng.random(4)],
    "equal": lambda rng: np.full(16, 2.5),
    "equal up to rounding": lambda rng: 2.5 + np.arange(16) * 2.0**-50,
    "one": lambda rng: np.array([3.0]),
    "two": lambda rng: np.array([1.0, 2.0]),
    "none": lambda rng: np.zeros(0),
    "several blocks": lambda rng: rng.exponential(size=9001),
    "a NaN": lambda rng: np.r_[rng.normal(size=31), NAN],
    "infinite ones": lambda rng: np.r_[INF, rng.normal(size=31), -INF],
    "all NaN": lambda rng: np.full(5, NAN),
}
SHARES = [0.7, 0.05, 0.3, 0.95, 0.999]


def criterion_of(share=0.7, sign=1, backend=None, dtype=F64, **options):
    options = {"criterion": identity} | options
    return ab.ABLoss(lam=ab.TargetESS(share, sign), backend=backend, **options).to(dtype)


def wanted(losses, share, sign, dtype=F64, **given):
    return oracle.target_ess(losses, share, sign, floor=64 * torch.finfo(dtype).eps, **given)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("batch", BATCHES)
def test_is_the_oracles(backend, batch, share, sign):
    """Weights, loss, gradient, lambda and the state of one training batch, in float64."""
    losses = BATCHES[batch](rng_of(batch))
    criterion = criterion_of(share, sign, backend)
    leaf = torch.tensor(losses, requires_grad=True)
    loss = criterion(leaf)
    loss.backward()
    lam, log_s, weights = wanted(losses, share, sign)
    good = np.isfinite(losses)
    np.testing.assert_allclose(criterion.last.weights[torch.tensor(good)], weights, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(float(criterion.last.lam), lam, rtol=1e-4)
    assert float(criterion.lam) == float(criterion.last.lam)
    n = int(good.sum())
    if n == len(losses) > 0:
        np.testing.assert_allclose(float(criterion.log_s), log_s, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(leaf.grad, weights / n, rtol=1e-4, atol=1e-14)
        np.testing.assert_allclose(float(loss.detach()), (weights * losses).mean(), rtol=1e-4, atol=1e-12 * abs(losses).max())
    else:
        assert float(criterion.log_s) == -INF and int(criterion.nonfinite_batches) == (n < len(losses))
        assert loss.isnan() if n < len(losses) else loss == 0
        assert leaf.grad[torch.tensor(~good)].isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("batch", BATCHES)
def test_share_in_single_precision(one_backend, batch, share, sign):
    """float32 reaches the share within 1e-3, unless ties hold more; and its weights are the oracle's on these float32 losses."""
    losses = torch.tensor(BATCHES[batch](rng_of(batch)), dtype=F32)
    criterion = criterion_of(share, sign, one_backend, F32)
    criterion(losses.requires_grad_())
    losses = losses.detach().double().numpy()
    _, _, weights = wanted(losses, share, sign, F32)
    good = np.isfinite(losses)
    found = criterion.last.weights[torch.tensor(good)].double().numpy()
    np.testing.assert_allclose(found, weights, rtol=2e-3, atol=1e-5)
    if good.any():
        exact = weights.sum() ** 2 / (weights**2).sum()
        np.testing.assert_allclose(found.sum() ** 2 / (found**2).sum(), exact, rtol=1e-3)


@pytest.mark.parametrize("a", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("b", [0.0, -7.0, 100.0])
def test_scale_and_shift_of_the_losses_do_not_matter(one_backend, a, b, rng):
    losses = rng.exponential(size=64)
    weights = []
    for x in (losses, a * losses + b):
        criterion = criterion_of(backend=one_backend)
        criterion(torch.tensor(x, requires_grad=True))
        weights.append(criterion.last.weights)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=0)


def test_offset_of_1000_and_a_spread_of_a_thousandth(one_backend, rng):
    """z = x / lambda is about 1e6 here, which no weight may be made from. In float32 such differences are rounding."""
    losses = torch.tensor(1000 + 1e-3 * rng.normal(size=128))
    criterion = criterion_of(backend=one_backend)
    criterion(losses.requires_grad_())
    np.testing.assert_allclose(float(criterion.last.ess) / 128, 0.7, rtol=1e-5)
    np.testing.assert_allclose(criterion.last.weights, wanted(losses.detach().numpy(), 0.7, 1)[2], rtol=1e-4)
    criterion = criterion_of(backend=one_backend, dtype=F32)
    criterion(losses.detach().float().requires_grad_())
    assert float(criterion.lam) == INF and (criterion.last.weights == 1).all()


# ---- arguments and options -------------------------------------------------------------------------------------------------


CALLS = {
    "mask": dict(mask=lambda rng: rng.random(32) < 0.6),
    "score": dict(score=lambda rng: 5 * rng.random(32)),
    "sample_weight": dict(sample_weight=lambda rng: 2 * rng.random(32)),
    "all": dict(
        mask=lambda rng: rng.random(32) < 0.6, score=lambda rng: rng.normal(size=32), sample_weight=lambda rng: rng.random(32)
    ),
}


@pytest.mark.parametrize("options", [{}, {"mix": 0.5}, {"max_weight": 1.2}, {"report": "mean"}], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_arguments_and_options(backend, call, options, rng):
    losses = rng.exponential(size=32)
    given = {name: make(rng) for name, make in CALLS[call].items()}
    criterion = criterion_of(0.6, backend=backend, **options)
    leaf = torch.tensor(losses, requires_grad=True)
    loss = criterion(leaf, **{name: torch.tensor(x) for name, x in given.items()})
    loss.backward()
    valid = given.get("mask", np.ones(32, bool))
    _, log_s, weights = wanted(losses, 0.6, 1, **{name: given[name] for name in ("mask", "score") if name in given})
    factor = np.minimum(weights, options.get("max_weight", INF)) + options.get("mix", 0.0)
    slope = given.get("sample_weight", np.ones(32))[valid] * factor / valid.sum()
    np.testing.assert_allclose(leaf.grad[torch.tensor(valid)], slope, rtol=1e-4)
    assert (leaf.grad[torch.tensor(~valid)] == 0).all()
    value = losses[valid].mean() if options.get("report") == "mean" else (slope * losses[valid]).sum()
    np.testing.assert_allclose(float(loss.detach()), value, rtol=1e-4)
    np.testing.assert_allclose(float(criterion.log_s), log_s, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_fused_loss(one_backend, name, rng):
    """The weights of the fused operator are those of its losses, and the gradient is the weighted sum of theirs."""
    case = LOSSES[name]
    logits, target = torch.tensor(3 * rng.normal(size=(40, 6))), torch.tensor(rng.integers(0, 6, 40))
    fused = case.module(6, backend=one_backend).double()
    criterion = criterion_of(backend=one_backend, criterion=fused)
    leaf = logits.clone().requires_grad_()
    criterion(leaf, target).backward()
    last, again = criterion.last, logits.clone().requires_grad_()
    counts = last.weights > 0
    weights = wanted(last.losses.numpy(), 0.7, 1, mask=counts.numpy())[2]
    np.testing.assert_allclose(last.weights[counts], weights, rtol=1e-4)
    (last.weights * fused(again, target)).sum().div(counts.sum()).backward()
    torch.testing.assert_close(leaf.grad, again.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(one_backend, dtype, rng):
    logits = torch.tensor(rng.normal(size=(64, 10)), dtype=dtype, requires_grad=True)
    criterion = criterion_of(backend=one_backend, dtype=F32, criterion=None)
    criterion(logits, torch.tensor(rng.integers(0, 10, 64))).backward()
    np.testing.assert_allclose(float(criterion.last.ess) / 64, 0.7, rtol=1e-4)
    assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


def test_ignored_rows_and_soft_targets(one_backend, rng):
    logits = torch.tensor(rng.normal(size=(30, 5)))
    criterion = criterion_of(backend=one_backend, criterion=ab.CrossEntropy(ignore_index=1, backend=one_backend))
    target = torch.tensor(rng.integers(0, 5, 30))
    criterion(logits.clone().requires_grad_(), target)
    counts = target != 1
    assert (criterion.last.weights[~counts] == 0).all()
    np.testing.assert_allclose(float(criterion.last.ess) / int(counts.sum()), 0.7, rtol=1e-5)
    criterion(logits.clone().requires_grad_(), logits.softmax(1))
    np.testing.assert_allclose(float(criterion.last.ess) / 30, 0.7, rtol=1e-5)


def test_second_derivatives_and_gradcheck_with_given_weights(one_backend, rng):
    """W is a constant: the second derivative of the loss is that of the losses with these weights, and mix."""
    x, y = torch.tensor(rng.normal(size=(6, 4)), requires_grad=True), torch.tensor(rng.integers(0, 4, 6))
    criterion = criterion_of(backend=one_backend, criterion=ab.CrossEntropy(backend=one_backend), mix=0.3)
    loss = criterion(x, y)
    factor = (criterion.last.weights + 0.3) / 6
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    criterion(torch.zeros_like(x), y)  # another batch, whose lambda is inf
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    again = (factor * torch.nn.functional.cross_entropy(x, y, reduction="none")).sum()
    (wanted_grad,) = torch.autograd.grad(again, x, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(wanted_grad.square().sum(), x)[0])


# ---- the state ---------------------------------------------------------------------------------------------------------------


def test_state_moves_in_training_only(one_backend, rng):
    """Eval mode, no_grad and update=False weigh by the batch's own lambda, and write nothing."""
    criterion = criterion_of(backend=one_backend)
    x = torch.tensor(rng.exponential(size=(4, 20)), requires_grad=True)
    criterion(x[0])
    state = copy.deepcopy(criterion.state_dict())
    kept = criterion.last
    lam = kept.lam

    def others():
        yield criterion(x[1], update=False)
        with torch.no_grad():
            yield criterion(x[2])
        criterion.eval()
        yield criterion(x[3])

    for row, value in zip(x[1:].detach(), others()):
        found, _, weights = wanted(row.numpy(), 0.7, 1)
        np.testing.assert_allclose(float(criterion.last.lam), found, rtol=1e-4)
        np.testing.assert_allclose(float(value.detach()), (weights * row.numpy()).mean(), rtol=1e-4)
        assert all(torch.equal(criterion.state_dict()[name], saved) for name, saved in state.items())
    criterion.train()
    criterion(5 * x[3])
    assert not torch.equal(criterion.lam, state["lam"]) and torch.equal(lam, state["lam"]) and kept.lam is lam


@pytest.mark.parametrize("lam", [0.5, -INF, ab.RelativeLam(0.5)], ids=str)
def test_last_lam_of_any_criterion(one_backend, lam, rng):
    """It is the lambda of that forward, whatever set_lam, loading or the next forward does."""
    criterion = ab.ABLoss(identity, lam=lam, backend=one_backend).double()
    x = torch.tensor(rng.exponential(size=20), requires_grad=True)
    criterion(x)
    used = float(criterion.lam)
    for change in (
        lambda: criterion.set_lam(3.0),
        lambda: criterion.load_state_dict({**criterion.state_dict(), "lam": torch.tensor(4.0)}),
        lambda: criterion.set_lam(ab.TargetESS()),
        criterion.reset_parameters,
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change()
        assert float(criterion.last.lam) == used
    rule = ab.ABLoss(identity, rule=lambda losses: torch.ones_like(losses), backend=one_backend)
    rule(x.float())
    assert float(rule.last.lam) == INF


def test_objective_is_that_of_the_batch(one_backend, rng):
    """lambda log mean exp(L / lambda) of the latest training batch; the plain mean at lambda = inf."""
    criterion = criterion_of(backend=one_backend)
    losses = rng.exponential(size=20)
    criterion(torch.tensor(losses, requires_grad=True))
    lam = float(criterion.lam)
    np.testing.assert_allclose(float(criterion.objective), lam * (oracle.logsumexp(losses / lam) - math.log(20)), rtol=1e-6)
    criterion(torch.full((20,), 3.0, dtype=F64, requires_grad=True))
    assert float(criterion.lam) == INF and float(criterion.log_s) == 0 and float(criterion.objective) == 3.0


def test_copies_moves_and_casts(one_backend, rng):
    x = torch.tensor(rng.exponential(size=20), requires_grad=True)
    criterion = criterion_of(0.4, -1, one_backend)
    criterion(x)
    for copied in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), copy.copy(criterion).float().double()):
        assert copied.target == -0.4 and repr(copied) == repr(criterion) and torch.equal(copied(x), criterion(x))
    assert "lam=TargetESS(0.4, sign=-1)" in repr(criterion)
    copied, used = copy.copy(criterion), float(criterion.lam)  # which has the same state tensors
    copied(5 * x)
    assert float(criterion.last.lam) == used and float(copied.last.lam) == float(criterion.lam) != used
    half = criterion_of(0.4, -1, one_backend, F32).bfloat16()
    half(x.detach().bfloat16().requires_grad_())
    assert half.lam.dtype == F32 and abs(float(half.last.ess) / 20 - 0.4) < 1e-3


def test_loading_keeps_the_target(one_backend, rng):
    x = torch.tensor(rng.exponential(size=20), requires_grad=True)
    saved, fixed = criterion_of(0.4, backend=one_backend), ab.ABLoss(identity, lam=0.5, backend=one_backend).double()
    saved(x), fixed(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for state in (saved.state_dict(), fixed.state_dict()):
            loaded = criterion_of(0.6, backend=one_backend)
            loaded.load_state_dict(state)
            assert torch.equal(loaded.lam, state["lam"]) and torch.equal(loaded.log_s, state["log_s"]) and loaded.target == 0.6
            loaded(x)
            np.testing.assert_allclose(float(loaded.last.ess) / 20, 0.6, rtol=1e-5)
        relative = ab.ABLoss(identity, lam=ab.RelativeLam(0.5)).double()  # still open: its lambda is NaN
        loaded.load_state_dict(relative.state_dict())
        loaded(x)
        np.testing.assert_allclose(float(loaded.last.ess) / 20, 0.6, rtol=1e-5)
    fixed = ab.ABLoss(identity, lam=0.5, backend=one_backend).double()
    with pytest.warns(UserWarning, match="the loaded state has lam=.*, but the constructor was given lam=0.5"):
        fixed.load_state_dict(saved.state_dict())
    saved.reset_parameters()
    assert float(saved.lam) == INF and float(saved.log_s) == -INF and saved.target == 0.4


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("given", [0.5, ab.RelativeLam(0.5), torch.tensor(0.5)], ids=["a number", "RelativeLam", "a tensor"])
def test_the_lambda_of_one_batch_does_not_become_a_fixed_one_unseen(sign, given, rng):
    """A RelativeLam, too, takes the loaded number for its own: so the user is told whose it is."""
    x = torch.tensor(rng.exponential(size=20), requires_grad=True)
    saved = criterion_of(0.4, sign)
    saved(x)
    assert float(saved.state_dict()["target"]) == 0.4 * sign
    loaded = ab.ABLoss(identity, lam=given).double()
    name = r"TargetESS\(0\.4\)" if sign > 0 else r"TargetESS\(0\.4, sign=-1\)"
    with pytest.warns(UserWarning, match=rf"which {name} chose for its last batch, but the constructor was given lam="):
        loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.lam, saved.lam) and "target" not in loaded.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduled = ab.ABLoss(identity, lam=given).double()
        schedule = ab.TwoStage(scheduled, ab.TargetESS(0.4, sign), start=0)  # who replaces the constructor's lambda knows it
        scheduled.load_state_dict(saved.state_dict())
        assert schedule.criterion.target == 0.4 * sign


def test_repr_has_every_digit():
    for share in (0.95, 0.5, 1 - 1e-9, 1e-9, 1 / 3):
        assert eval(repr(ab.TargetESS(share, -1)), {"TargetESS": ab.TargetESS}).signed_share == -share


def test_deferred_is_refused_before_a_schedule_switches():
    """Not at the switch, hours later."""
    criterion = ab.ABLoss(lam=math.inf)
    schedule = ab.TwoStage(criterion, ab.TargetESS(0.5), start=10)
    with pytest.raises(ValueError, match=r"lam: got TargetESS\(0.5\) with deferred=True"):
        criterion.deferred = True
    assert not criterion.deferred
    schedule.step()
    del schedule
    gc.collect()
    criterion.deferred = True  # nobody will switch


def test_set_lam_there_and_back(one_backend, rng):
    """A criterion that had another lambda is the same as one that was constructed with this one."""
    x = torch.tensor(rng.exponential(size=20), requires_grad=True)
    criterion, new = ab.ABLoss(identity, lam=0.5, backend=one_backend).double(), criterion_of(backend=one_backend)
    criterion(x)
    criterion.set_lam(ab.TargetESS(0.7))
    assert torch.equal(criterion(x), new(x)) and torch.equal(criterion.log_s, new.log_s)
    criterion.set_lam(0.5)
    assert torch.equal(criterion(x), ab.ABLoss(identity, lam=0.5, backend=one_backend).double()(x)) and criterion.target is None


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
@pytest.mark.parametrize("schedule_first", [True, False])
def test_two_stage(calls, schedule_first, rng):
    """A checkpoint of the criterion resumes the schedule in either stage, also where the batch's lambda was inf."""
    x = torch.tensor(rng.exponential(size=20), requires_grad=True)

    def make():
        criterion = ab.ABLoss(identity, lam=ab.TargetESS(0.4)).double()
        return criterion, ab.TwoStage(criterion, ab.TargetESS(0.4), start=2)

    criterion, schedule = make()
    assert criterion.target is None and float(criterion.lam) == INF
    for _ in range(calls):
        criterion(torch.ones(3, dtype=F64, requires_grad=True))
        schedule.step()
    assert (criterion.target is not None) == (calls >= 2)
    criterion(torch.ones(3, dtype=F64, requires_grad=True))
    resumed, again = make()
    if schedule_first:
        again.load_state_dict(schedule.state_dict())
    resumed.load_state_dict(criterion.state_dict())
    assert resumed.target == criterion.target and torch.equal(resumed.lam, criterion.lam)
    assert torch.equal(resumed.log_s, criterion.log_s)
    for _ in range(2):
        assert torch.equal(resumed(x), criterion(x))
        again.step(), schedule.step()


# ---- torch around it -----------------------------------------------------------------------------------------------------------


def test_transforms_and_export(rng):
    x = torch.tensor(rng.exponential(size=(3, 20)))
    criterion = criterion_of().eval()
    single = torch.stack([criterion(row) for row in x])
    torch.testing.assert_close(torch.func.vmap(criterion)(x), single)
    slope = torch.func.grad(criterion)(x[0])
    criterion(x[0])
    torch.testing.assert_close(slope, criterion.last.weights / 20)
    _, tangent = torch.func.jvp(criterion, (x[0],), (torch.ones(20, dtype=F64),))
    torch.testing.assert_close(tangent, torch.tensor(1.0, dtype=F64))
    with pytest.raises(RuntimeError, match="got a forward inside a torch.func transform"):
        torch.func.grad(criterion.train())(x[0])
    program = torch.export.export(criterion.eval(), (x[0],)).module()
    torch.testing.assert_close(program(x[1]), single[1])
    fixed = ab.ABLoss(identity, lam=0.5).double().eval()
    torch.testing.assert_close(torch.export.export(fixed, (x[0],)).module()(x[1]), fixed(x[1]))


@pytest.mark.parametrize("train, options", [(True, {}), (False, {}), (True, {"loss_divisor": 2.0})], ids=str)
def test_compiles_into_one_graph(one_backend, train, options, rng):
    x, y = torch.tensor(rng.normal(size=(20, 5)), requires_grad=True), torch.tensor(rng.integers(0, 5, 20))
    criterions = [
        criterion_of(backend=one_backend, criterion=ab.CrossEntropy(backend=one_backend), **options).train(train)
        for _ in range(2)
    ]
    compiled = torch.compile(criterions[0], fullgraph=True, backend="aot_eager")
    for step in range(2):
        found, exact = compiled((1 + step) * x, y), criterions[1]((1 + step) * x, y)
        torch.testing.assert_close(found, exact)
        torch.testing.assert_close(*[torch.autograd.grad(value, x)[0] for value in (found, exact)])
        for name, value in criterions[1].state_dict().items():
            torch.testing.assert_close(criterions[0].state_dict()[name], value)
    torch.testing.assert_close(criterions[0].last.lam, criterions[1].last.lam)


def test_any_number_of_threads_gives_the_same_bits(threads, rng):
    x = torch.tensor(rng.exponential(size=50_000), dtype=F32, requires_grad=True)
    found = []
    for number in (1, 2):
        threads(number)
        criterion = criterion_of(dtype=F32)
        found.append((criterion(x), criterion.lam.clone(), criterion.log_s.clone(), criterion.last.weights))
    assert all(torch.equal(*pair) for pair in zip(*found))


# ---- LinearABLoss and a loss_divisor: lambda is found before the stages -------------------------------------------------------


@pytest.mark.parametrize("batch", [name for name in BATCHES if name not in ("none", "large")])
@pytest.mark.parametrize("sign", [1, -1])
def test_in_stages(one_backend, batch, sign):
    """With a loss_divisor the batch is weighed in stages; its numbers are those of the operators."""
    losses = torch.tensor(BATCHES[batch](rng_of(batch)), requires_grad=True)
    one, staged = criterion_of(0.6, sign, one_backend), criterion_of(0.6, sign, one_backend, loss_divisor=4)
    value, quarter = one(losses), staged(losses)
    torch.testing.assert_close(quarter, 4 * value, rtol=1e-4, atol=1e-12, equal_nan=True)
    for found, exact in ((staged.last.weights, one.last.weights), (staged.lam, one.lam), (staged.log_s, one.log_s)):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert torch.equal(staged.nonfinite_batches, one.nonfinite_batches) and torch.equal(staged.last.lam, staged.lam)


@pytest.mark.parametrize("given", [{}, {"mask": True}, {"sample_weight": True, "score": True}], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_linear(one_backend, sign, given, rng):
    """Loss, gradients, weights and state are those of ABLoss on the logits."""
    hidden, weight = torch.tensor(rng.normal(size=(50, 8))), torch.tensor(rng.normal(size=(7, 8)))
    bias, target = torch.tensor(rng.normal(size=7)), torch.tensor(rng.integers(0, 7, 50))
    makes = {"mask": lambda: rng.random(50) < 0.7, "sample_weight": lambda: rng.random(50), "score": lambda: rng.random(50)}
    given = {name: torch.tensor(makes[name]()) for name in given}
    linear = ab.LinearABLoss(lam=ab.TargetESS(0.6, sign), chunk=16, backend=one_backend).double()
    plain = criterion_of(0.6, sign, one_backend, criterion=ab.CrossEntropy(backend=one_backend))
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        loss = linear(leaves[0], leaves[1], target, leaves[2], **given)
        again = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        exact = plain(again[0] @ again[1].T + again[2], target, **given)
        torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-8)
        for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, again)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(linear.last.weights, plain.last.weights, rtol=1e-4, atol=1e-8)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(linear.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    exact = plain.eval()(hidden @ weight.T + bias, target, **given)
    torch.testing.assert_close(linear.eval()(hidden, weight, target, bias, **given), exact, rtol=1e-5, atol=1e-8)


# ---- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 1, -0.5, 1.5, NAN, INF, "0.7", None, True, torch.ones(2), 0.7j], ids=str)
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match=r"^share: got .*, expected a number in \(0, 1\)"):
        ab.TargetESS(share)


@pytest.mark.parametrize("sign", [0, 2, -0.5, NAN, "+1", None, True], ids=str)
def test_a_sign_that_is_none(sign):
    with pytest.raises(ValueError, match=r"^sign: got .*, expected \+1 .* or -1 "):
        ab.TargetESS(sign=sign)


def test_tensors_as_share_and_sign():
    target = ab.TargetESS(torch.tensor(0.5), np.float32(-1))
    assert (target.share, target.sign, repr(target)) == (0.5, -1, "TargetESS(0.5, sign=-1)")
    for given in ({"share": torch.tensor(0.5, requires_grad=True)}, {"sign": torch.tensor(1.0, requires_grad=True)}):
        (name,) = given
        with pytest.raises(RuntimeError, match=f"^{name}: got a tensor that requires grad"):
            ab.TargetESS(**given)


EXCLUDED = {
    "gamma": (0.5, "gamma: got 0.5 with lam=TargetESS"),
    "alpha": (0.5, "alpha: got 0.5 with lam=TargetESS"),
    "init": ("zero", "init: got 'zero' with lam=TargetESS"),
    "normalizer": ("none", "normalizer: got 'none' with lam=TargetESS"),
    "deferred": (True, "lam: got TargetESS.* with deferred=True, expected a number or RelativeLam.*use deferred=False"),
}


@pytest.mark.parametrize("make", [lambda **o: ab.ABLoss(**o), lambda **o: ab.LinearABLoss(**o)], ids=["ABLoss", "LinearABLoss"])
@pytest.mark.parametrize("name", EXCLUDED)
def test_options_that_exclude_it(name, make):
    value, message = EXCLUDED[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        make(lam=ab.TargetESS(), **{name: value})
    criterion = make(lam=0.5, **{name: value})
    with pytest.raises(ValueError, match=f"^{message}"):
        criterion.set_lam(ab.TargetESS())
    with pytest.raises(ValueError, match=f"^{message}"):  # and not when the second stage begins, after hours of training
        ab.TwoStage(criterion, ab.TargetESS(), start=1)
    assert criterion.target is None and float(criterion.lam) == 0.5
    assert make(lam=ab.TargetESS(), normalizer="batch").target == 0.95


def test_deferred_afterwards_rules_and_other_places():
    criterion = ab.ABLoss(lam=ab.TargetESS(0.6))
    with pytest.raises(ValueError, match=r"^lam: got TargetESS\(0.6\) with deferred=True"):
        criterion.deferred = True
    with pytest.raises(ValueError, match="^lam: got TargetESS.* together with rule="):
        ab.ABLoss(lam=ab.TargetESS(), rule=ab.weights.chi2)
    with pytest.raises(ValueError, match="^mix: got 0.5 with LinearABLoss"):
        ab.LinearABLoss(lam=ab.TargetESS(), mix=0.5)
    with pytest.raises(ValueError, match="^lam: got TargetESS.*, but DFT always has lam=-1.0"):
        ab.DFT(lam=ab.TargetESS())
    with pytest.raises(TypeError, match=r"^criterion: got the TargetESS TargetESS\(0.7\).*ABLoss\(lam=TargetESS\(0.7\)\)"):
        ab.ABLoss(ab.TargetESS(0.7), lam=0.5)
    with pytest.raises(TypeError, match="^lam: got TargetESS, expected a number"):
        ab.functional.robust_weights(torch.ones(3), -INF, ab.TargetESS())


def test_collapse_names_the_target():
    criterion = criterion_of(0.02, dtype=F32)
    x = torch.arange(200.0, requires_grad=True)
    with pytest.warns(UserWarning, match=r"have collapsed.*by lam=TargetESS\(0.02\)"):
        [criterion(x) for _ in range(300)]


def test_reference_functions(rng):
    """target_lambda by hand: two losses have share = (1 + q)^2 / (2 (1 + q^2)) with q = exp(-1 / lambda)."""
    (lam, shift), n, bad = reference.target_lambda(torch.tensor([1.0, 2.0, NAN, 5.0]), 0.7, mask=torch.tensor([1, 1, 1, 0]) > 0)
    q = math.exp(-1 / float(lam))
    assert abs((1 + q) ** 2 / (2 * (1 + q * q)) - 0.7) < 1e-7 and (float(shift), int(n), int(bad)) == (2.0, 2, 1)
