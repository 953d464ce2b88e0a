"""Deferred steps with rows that are not finite, with spikes, and with scaled losses."""

from functools import partial

import numpy as np
import oracle
import pytest
import torch
from conftest import identity
from deferred_cases import INF, NAN, SPOILS, Run, assert_alike, batch, each_way, same, snapshot, spike

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- rows that are not finite, and spikes -------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("spoil", SPOILS)
def test_bad_steps_never_were(one_backend, way, spoil):
    """Parameters, states and counts stay as they are to the bit, log s too; the event is counted; the next step is as good as
    in a training that never had this one, be it the first."""
    run, undisturbed = Run(way, backend=one_backend), Run(way, backend=one_backend)
    for step in range(3):
        if step in (0, 2):
            before = [snapshot(run.net, run.optimizer), run.criterion.log_s.clone()]
            counts = run.step(9, SPOILS[spoil])
            assert same([snapshot(run.net, run.optimizer), run.criterion.log_s], before)
            assert int(run.criterion.nonfinite_batches) == 1 + step // 2
            if run.how != "robust":
                assert counts.dtype == torch.bool and counts.shape == () and not counts
                assert all(p.grad is None for p in run.net.parameters())
        run.step(step)
        undisturbed.step(step)
        assert same(snapshot(run.net, run.optimizer), snapshot(undisturbed.net, undisturbed.optimizer))
        assert torch.equal(run.criterion.log_s, undisturbed.criterion.log_s)


def test_several_bad_micro_batches_are_one_event(one_backend):
    run = Run("ABSGD-robust", backend=one_backend)

    def spoil(x, y):
        x[[2, 12, 13, 20]] = NAN

    run.step(0, spoil)
    assert int(run.criterion.nonfinite_batches) == 1 and float(run.criterion.log_s) == -INF


def test_a_spike_in_an_ignored_row_is_none(one_backend):
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)

    def spoil(x, y):
        spike(12)(x, y)
        y[12] = -100

    for one in (run, plain):
        one.step(0)
        one.step(1, spoil)
    assert_alike(run, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("lam", [0.5, -0.5])
@pytest.mark.parametrize("beyond", [59.0, 61.0])
@pytest.mark.parametrize("scored", [False, True])
def test_the_bound_of_spikes(backend, dtype, lam, beyond, scored):
    """z - m = 59 in a later micro-batch is a row like any other, 61 is not finite; a z far below m is no matter."""
    criterion = ab.ABLoss(identity, lam=lam, deferred=True, backend=backend).to(dtype)
    criterion.log_s.fill_(0.3)
    first, second = (
        torch.tensor([0.5, 1.0, 0.1], dtype=dtype),
        torch.tensor([0.7, -50.0, 2.0], dtype=dtype) * (1 if lam > 0 else -1),
    )
    m = oracle.robust_weights(first.double(), float(criterion.log_s), lam).norm
    second[2] = lam * (m + beyond)
    exact = oracle.ABLoss(lam)
    exact.log_s = float(criterion.log_s)
    wanted = exact(torch.cat([first, second]).double())
    leaves = [torch.ones_like(part, requires_grad=True) for part in (first, second)]
    values = []
    for leaf, part in zip(leaves, (first, second)):
        if scored:
            values.append(criterion(leaf, score=part))
        else:
            values.append(criterion(part + 0 * leaf + (leaf - 1)))  # d L / d leaf = 1
        values[-1].backward()
    counts = criterion.finish_(leaves)
    assert bool(counts) == (beyond < 60) == bool(values[1].isfinite())
    assert int(criterion.nonfinite_batches) == (beyond > 60)
    if beyond > 60:
        assert float(criterion.log_s) == pytest.approx(0.3) and all(leaf.grad is None for leaf in leaves)
        assert criterion.last.weights.isnan().tolist() == [False, False, True]
        return
    rtol = 1e-12 if dtype == torch.float64 else 2e-5  # the 24 bits of z = 60 leave 4e-6 of exp(z)
    np.testing.assert_allclose(torch.cat([leaf.grad for leaf in leaves]), wanted.grad, rtol=rtol, atol=1e-30)
    np.testing.assert_allclose(criterion.log_s, exact.log_s, rtol=rtol)


def test_no_spike_in_the_first_micro_batch(one_backend):
    """m comes from its rows, so none can be far beyond: a loss of 200 lambdas there is a row like any other."""
    criterion = ab.ABLoss(identity, lam=0.5, deferred=True, backend=one_backend).double()
    plain = ab.ABLoss(identity, lam=0.5, backend=one_backend).double()
    x = torch.tensor([0.5, 100.0, 0.7, 1.0], dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        criterion(x[:2]).backward()
        criterion(x[2:]).backward()
        assert criterion.finish_(x)
        (wanted,) = torch.autograd.grad(plain(x), x)
        torch.testing.assert_close(x.grad, wanted, rtol=1e-12, atol=1e-200)
        x.grad = None
    assert int(criterion.nonfinite_batches) == 0


# ---- loss scaling ------------------------------------------------------------------------------------------------------


@each_way
def test_grad_scaler(one_backend, way):
    """torch.amp.GradScaler, with an overflow in the third step and a NaN row in the fifth: what the plain loss and torch's
    optimizer do, step by step, the scale included. finish_ comes after unscale_."""
    run = Run(way, dtype=torch.float32, backend=one_backend)
    plain = Run.plain(way, dtype=torch.float32, backend=one_backend)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    for step in range(7):
        for one, scaler in zip((run, plain), scalers):
            x, y = batch(step, one.dtype)
            if step == 4:
                x[12] = NAN
            one.accumulate(x, y, scaler.scale)
            if step == 2:
                one.net[0].weight.grad[0, 0] = INF
            before = snapshot(one.net, one.optimizer)
            if one.how != "robust":
                scaler.unscale_(one.optimizer)
                one.settle()
            scaler.step(one.optimizer)
            scaler.update()
            assert same(snapshot(one.net, one.optimizer)[0], before[0]) == (step in (2, 4))
            assert same(snapshot(one.net, one.optimizer), before) == (step in (2, 4))
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_alike(run, plain, 1e-6)
    assert int(run.criterion.nonfinite_batches) == 1


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-robust", "SGD-finish"])
def test_loss_divisor_deferred(one_backend, way):
    """A framework divides the loss by the six micro-batches before backward."""
    run, plain = Run(way, loss_divisor=6, backend=one_backend), Run.plain(way, backend=one_backend)
    for step in range(4):
        run.accumulate(*batch(step), lambda loss: loss / 6)
        run.settle()
        run.optimizer.step()
        plain.step(step)
        assert_alike(run, plain)


@pytest.mark.parametrize("divisor", [4, 3, 0.5])
@pytest.mark.parametrize("options", [{}, dict(mix=1.0), dict(max_weight=0.6), dict(lam=INF), dict(normalizer="none")], ids=str)
def test_loss_divisor_of_a_plain_loss(one_backend, entry, divisor, options, rng):
    """Value and gradient are those of the plain loss after the division; log s and the weights never knew. No multiple in
    evaluation, where nobody divides."""
    losses = torch.tensor(rng.exponential(1.0, 21) + 0.01)
    make = partial(ab.ABLoss, entry.criterion(one_backend), backend=one_backend, **({"lam": 0.5} | options))
    ours, plain = make(loss_divisor=divisor).double(), make().double()
    for _ in range(2):
        results = []
        for criterion, by in ((ours, divisor), (plain, 1)):
            leaf, args, more = entry.inputs(losses)
            value = criterion(*args, **more) / by
            value.backward()
            results.append([value.detach(), leaf.grad, criterion.log_s.clone(), criterion.last.weights, criterion.last.mean_loss])
        torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)
    with torch.no_grad():
        torch.testing.assert_close(ours(*args, **more), plain(*args, **more), rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.eval()(*args, **more), plain.eval()(*args, **more), rtol=1e-13, atol=0)
