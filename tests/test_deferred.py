"""Deferred normalisation (MATH §5) in one process: micro-batches of one optimizer step against one big batch."""

import math
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import identity
from deferred_cases import IGNORED, INF, SIZES, WAYS, Run, assert_alike, batch, distance, gradient, network, vector, weighted
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- micro-batches are one batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way, clip", [(way, clip) for way in WAYS for clip in (None, 1.0)])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_twenty_steps(one_backend, way, clip, dtype, limit):
    """Parameters after 20 steps against one big batch per step, the plain loss and torch's optimizer."""
    run = Run(way, dtype=dtype, clip=clip, backend=one_backend)
    plain = Run.plain(way, dtype=dtype, clip=clip, backend=one_backend)
    start = vector(plain.net)
    for step in range(20):
        assert run.step(step) in (None, True)
        plain.step(step)
    assert distance(start, vector(plain.net)) > 0.05
    if clip is not None:
        assert min(plain.norms) < clip < max(plain.norms)  # some steps are clipped and some are not
        np.testing.assert_allclose(run.norms, plain.norms, rtol=10 * limit)
    assert distance(vector(run.net), vector(plain.net)) <= limit
    np.testing.assert_allclose(run.criterion.log_s, plain.criterion.log_s, rtol=2 * limit)
    assert run.criterion.log_s.dtype == dtype and int(run.criterion.nonfinite_batches) == 0


@pytest.mark.parametrize(
    "options",
    [
        dict(normalizer="batch"),
        dict(normalizer="none", lam=-1.0),
        dict(init="zero"),
        dict(init="zero", alpha=0.3, gamma=0.2),
        dict(lam=-0.5),
        dict(lam=INF),
        dict(lam=-INF),
        dict(gamma=1.0),
        dict(gamma=0.1),
        dict(alpha=0.4),
        dict(normalizer="batch", alpha=0.4, lam=-2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["ABSGD-robust", "ABSGD-finish"])
def test_options(one_backend, way, options):
    """The gradient itself (of finish_), the parameters and log s, in the first step and in later ones."""
    run, plain = Run(way, backend=one_backend, **options), Run.plain(way, backend=one_backend, **options)
    for step in range(4):
        run.step(step)
        plain.step(step)
        if run.how == "finish":
            assert distance(gradient(run.net), gradient(plain.net)) <= 1e-12
        assert_alike(run, plain)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)], ids=str)
def test_any_criterion_and_all_arguments(one_backend, order, rng):
    """A function of three arguments, with sample_weight, mask and score; which micro-batch comes first does not matter."""
    net, parts = network(), [(0, 0), (0, 7), (7, 15), (15, 21)]
    x, y = batch(0)
    y[IGNORED] = 1
    rows = [torch.tensor(rng.uniform(0.5, 2, 21)) for _ in range(3)]
    mask = torch.tensor(rng.random(21) < 0.7)
    outcomes = []
    for deferred in (False, True):
        criterion = ab.ABLoss(weighted, lam=0.5, deferred=deferred, backend=one_backend).double()
        criterion.log_s.fill_(0.7)
        net.zero_grad()
        for start, end in [parts[k] for k in order] if deferred else [(0, 21)]:
            cut = slice(start, end)
            loss = criterion(net(x[cut]), y[cut], rows[0][cut], sample_weight=rows[1][cut], score=rows[2][cut], mask=mask[cut])
            loss.backward()
        if deferred:
            criterion.finish_(net.parameters())
        outcomes.append([gradient(net), criterion.log_s.clone()])
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-14)


def test_every_loss(one_backend, case, rng):
    """(B, C, d) logits of the whole table, in micro-batches of 3, 0 and 5 samples."""
    layer = nn.Linear(6, 5 * 4).double()
    x, target = torch.tensor(rng.normal(size=(8, 6))), torch.tensor(rng.integers(0, 5, (8, 4)))
    outcomes = []
    for deferred in (False, True):
        criterion = ab.ABLoss(case.module(5, backend=one_backend), lam=0.6, deferred=deferred, backend=one_backend).double()
        layer.zero_grad()
        for _ in range(2):
            layer.zero_grad()
            for part in (slice(3), slice(0), slice(3, 8)) if deferred else (slice(8),):
                criterion(layer(x[part]).view(-1, 5, 4), target[part]).backward()
            if deferred:
                assert criterion.finish_(layer.parameters())
        outcomes.append([gradient(layer), criterion.log_s.clone()])
    torch.testing.assert_close(*outcomes, rtol=1e-11, atol=1e-13)


options = st.fixed_dictionaries(
    {
        "lam": st.sampled_from([-0.5, 0.25, 2.0, -5.0, INF, -INF]),
        "gamma": st.sampled_from([0.9, 0.5, 0.1, 1.0]),
        "alpha": st.sampled_from([0.4, 1.0]),
        "init": st.sampled_from(["first", "zero"]),
        "normalizer": st.sampled_from(["moving", "batch", "none"]),
    }
)
arguments = st.fixed_dictionaries({k: st.booleans() for k in ("sample_weight", "mask", "score")})


@given(
    options=options,
    call=arguments,
    sizes=st.lists(st.sampled_from([0, 1, 3, 17]), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_forward_and_gradient_are_the_oracles(backend, entry, options, call, sizes, seed):
    """m, the value sum exp(z - m) L, then gradient, weights and log s of the batch of all rows; two steps in a row."""
    rng = np.random.default_rng(seed)
    criterion = ab.ABLoss(entry.criterion(backend), deferred=True, backend=backend, **options).double()
    exact = oracle.ABLoss(**options)
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for size, end in zip(sizes, ends)]
    for _ in range(2):
        losses = torch.tensor(rng.exponential(1.0, ends[-1]) + 0.01)
        valid = rng.random(ends[-1]) < 0.6 if call["mask"] else np.ones(ends[-1], bool)
        extra = {k: torch.tensor(rng.random(ends[-1]) * 2) for k in ("sample_weight", "score") if call[k]}
        m, leaves = None, []
        for part in parts:
            rows = {k: v[part] for k, v in extra.items()}
            leaf, args, more = entry.inputs(losses[part], valid[part] if call["mask"] else None)
            value = criterion(*args, **more, **rows)
            value.backward()
            leaves.append(leaf)
            if m is None and valid[part].any():
                rule = {"mask": valid[part], "score": rows.get("score")} | exact.options
                m = oracle.robust_weights(losses[part], exact.log_s, exact.lam, **rule).norm
            wanted = 0.0
            if m is not None:
                z = (rows.get("score", losses[part]) / exact.lam)[valid[part]] if math.isfinite(exact.lam) else torch.zeros(())
                terms = (z - m).exp() * (rows.get("sample_weight", torch.ones(())) * losses[part])[valid[part]]
                wanted = float(terms.sum())
            assert value.dtype == torch.float64 and value.item() == pytest.approx(wanted, rel=1e-10, abs=1e-12)
        before = criterion.log_s.clone()
        forward = exact(losses, mask=valid, **extra)
        assert torch.equal(before, criterion.log_s)  # not before the step
        counts = criterion.finish_(leaves)
        assert counts.dtype == torch.bool and counts.shape == () and counts
        slope = torch.cat([entry.slope(leaf, losses[part]) for leaf, part in zip(leaves, parts)])
        close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
        close(slope, forward.grad)
        close(criterion.log_s, exact.log_s)
        close(criterion.last.weights, forward.weights[parts[-1]])
        close(criterion.last.losses[valid[parts[-1]]], losses[parts[-1]][valid[parts[-1]]])


def test_losses_of_masked_rows_read_as_zero(one_backend):
    for deferred in (False, True):
        criterion = ab.ABLoss(identity, lam=0.5, deferred=deferred, backend=one_backend)
        criterion(torch.tensor([1.0, 2.0, 3.0]), mask=torch.tensor([True, False, True]))
        assert criterion.last.losses.tolist() == [1.0, 0.0, 3.0]


def test_reference_point_by_hand(backend):
    """lam = 1, gamma = 3/4, s = 2: m = log(1/4 2 + 3/4 4) = log 3.5, although the second micro-batch has other losses."""
    criterion = ab.ABLoss(identity, lam=1.0, gamma=0.75, deferred=True, backend=backend).double()
    criterion.log_s.fill_(math.log(2))
    leaf = torch.tensor([2.0, 6.0, 1.0, 1.0], dtype=torch.float64).log().requires_grad_()
    values = [criterion(leaf[:0]), criterion(leaf[:2]), criterion(leaf[2:])]
    assert values[0] == 0
    assert values[1].item() == pytest.approx((2 * math.log(2) + 6 * math.log(6)) / 3.5, rel=1e-14)
    assert values[2].item() == 0  # log 1
    sum(values).backward()
    assert leaf.grad.tolist() == pytest.approx([2 / 3.5, 6 / 3.5, 1 / 3.5, 1 / 3.5], rel=1e-14)
    assert criterion.finish_(leaf)
    s = 0.25 * 2 + 0.75 * 2.5
    assert float(criterion.log_s) == pytest.approx(math.log(s), rel=1e-14)
    assert leaf.grad.tolist() == pytest.approx([2 / s / 4, 6 / s / 4, 1 / s / 4, 1 / s / 4], rel=1e-13)
    assert criterion.last.weights.tolist() == pytest.approx([1 / s, 1 / s], rel=1e-13)


def test_weights_before_and_after_the_step(one_backend):
    """`last` of the last micro-batch: its rows' share of the big batch, once log s is settled; ess and mean_loss at any time."""
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)
    for step in range(2):
        run.step(step)
        plain.step(step)
        rows = slice(21 - SIZES[-1], 21)
        torch.testing.assert_close(run.criterion.last.weights, plain.criterion.last.weights[rows], rtol=1e-12, atol=0)
        w, losses = plain.criterion.last.weights[rows], plain.criterion.last.losses[rows]
        torch.testing.assert_close(run.criterion.last.ess, w.sum() ** 2 / (w**2).sum())
        torch.testing.assert_close(run.criterion.last.mean_loss, losses.mean())
        torch.testing.assert_close(run.criterion.objective, plain.criterion.objective)


@pytest.mark.parametrize("r", [-0.5, 0.4])
def test_relative_lam_takes_the_first_micro_batch(one_backend, r):
    """That is the first batch it is used on; the first two here are empty."""
    run, plain = Run("ABSGD-finish", lam=ab.RelativeLam(r), backend=one_backend), Run.plain("ABSGD-finish", backend=one_backend)
    x, y = batch(0)
    plain.criterion.set_lam(r * F.cross_entropy(plain.net(x[:7]), y[:7]).item())
    for step in range(3):
        run.step(step)
        plain.step(step)
        assert_alike(run, plain)
    assert float(run.criterion.lam) == pytest.approx(float(plain.criterion.lam), rel=1e-12)


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABSGD-finish"])
def test_two_stages_and_set_lam_between_steps(one_backend, way):
    runs = [Run(way, backend=one_backend), Run.plain(way, backend=one_backend)]
    schedules = [ab.TwoStage(run.criterion, lam=-0.7, start=2, unit="step") for run in runs]
    for step in range(6):
        for run, schedule in zip(runs, schedules):
            if step == 4:
                run.criterion.set_lam(1.5, reset=False)
            run.step(step)
            schedule.step()
        assert_alike(*runs)


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-robust", "SGD-finish"])
def test_steps_of_nothing(one_backend, way):
    """Micro-batches without any row: the step that an empty batch makes, in which momentum goes on; log s stays."""
    run, plain = Run(way, backend=one_backend), Run.plain(way, backend=one_backend)

    def ignore(x, y):
        y.fill_(-100)

    for step in range(5):
        spoil = ignore if step in (0, 3) else lambda x, y: None
        assert run.step(step, spoil) in (None, True)
        plain.step(step, spoil)
        assert_alike(run, plain)


def test_one_micro_batch_is_the_plain_loss(one_backend):
    run, plain = Run("ABSGD-finish", backend=one_backend), Run.plain("ABSGD-finish", backend=one_backend)
    for step in range(3):
        for one in (run, plain):
            x, y = batch(step)
            one.optimizer.zero_grad()
            one.criterion(one.net(x), y).backward()
            one.settle()
            one.optimizer.step()
        assert_alike(run, plain, 1e-13)


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-robust", "ABAdagrad-finish"])
def test_bfloat16_parameters(one_backend, way):
    """As far as two ways to sum bfloat16 gradients agree: 2^-8 of a gradient, a few steps of 0.01 to 0.1 of the parameters."""
    run, plain = (make(way, dtype=torch.bfloat16, backend=one_backend) for make in (Run, Run.plain))
    for step in range(5):
        run.step(step)
        plain.step(step)
        assert all(p.grad.dtype == torch.bfloat16 for p in run.net.parameters())
    assert run.criterion.log_s.dtype == torch.float32
    assert distance(vector(run.net).double(), vector(plain.net).double()) <= 1e-2
    assert float(run.criterion.log_s) == pytest.approx(float(plain.criterion.log_s), abs=2e-2)
