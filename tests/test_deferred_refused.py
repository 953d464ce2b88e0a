"""What a deferred step refuses: each refusal leaves everything as it was."""

import math
from functools import partial

import pytest
import torch
from conftest import identity
from deferred_cases import INF, NAN, PAIRS, Run, assert_alike, batch, gradient, micro, network, same, snapshot, vector

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what is refused, and leaves everything as it was ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(deferred=True, mix=0.5), "mix.*0.5.*; use mix=0, or deferred=False"),
        (dict(deferred=True, max_weight=2.0), "max_weight.*2"),
    ]
    + [(dict(loss_divisor=value), f"loss_divisor.*{value}") for value in (0, -1, NAN, INF, "2", None)],
    ids=str,
)
def test_refused_options(options, named):
    with pytest.raises(ValueError, match=named):
        ab.ABLoss(lam=0.5, **options)


def test_refused_robust():
    w = [torch.zeros(2, requires_grad=True)]
    for name in PAIRS:
        make = partial(getattr(ab, name), lr=0.1)
        with pytest.raises(TypeError, match="not deferred.*deferred=True"):
            make(w, robust=ab.ABLoss(lam=0.5))
        with pytest.raises(TypeError, match="CrossEntropy.*deferred=True"):
            make(w, robust=ab.CrossEntropy())
        deferred = ab.ABLoss(lam=0.5, deferred=True)
        half = torch.zeros(2, dtype=torch.float16, requires_grad=True)
        with pytest.raises(ValueError, match="float16"):
            make([half], robust=deferred)
        optimizer = make(w, robust=deferred)
        with pytest.raises(ValueError, match="float16"):
            optimizer.add_param_group({"params": [half]})


def test_refused_float16_gradients(one_backend):
    """The network was cast after the optimizer was made."""
    net, criterion = network(torch.float32), ab.ABLoss(lam=0.5, deferred=True, backend=one_backend)
    optimizer = ab.ABSGD(net.parameters(), robust=criterion, backend=one_backend)
    x, y = batch(0, torch.float16)
    criterion(net.half()(x), y).backward()
    before = vector(net)
    with pytest.raises(ValueError, match="float16"):
        optimizer.step()
    assert torch.equal(vector(net), before) and float(criterion.log_s) == -INF


def test_refused_finish(one_backend):
    """Each with the word for what is wrong; neither gradients nor log s are touched."""
    criterion = ab.ABLoss(identity, lam=0.5, deferred=True, backend=one_backend)
    w = torch.tensor([0.5, 1.0, 3.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="no forward"):
        criterion.finish_(w)
    criterion(w).backward()
    half = torch.ones(2, dtype=torch.float16, requires_grad=True)
    half.grad = torch.ones_like(half)
    raw = w.grad.clone()
    with pytest.raises(ValueError, match="float16"):
        criterion.finish_([w, half])
    assert torch.equal(w.grad, raw) and float(criterion.log_s) == -INF and torch.equal(half.grad, torch.ones_like(half))
    assert criterion.finish_([w])  # still there
    finished, log_s = w.grad.clone(), criterion.log_s.clone()
    with pytest.raises(RuntimeError, match="has normalised the gradients of this step already"):
        criterion.finish_([w])
    assert torch.equal(w.grad, finished) and torch.equal(criterion.log_s, log_s)
    plain = ab.ABLoss(identity, lam=0.5, backend=one_backend)
    w.grad = None
    plain(w).backward()
    torch.testing.assert_close(w.grad, finished, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="not deferred"):
        plain.finish_(w)


@pytest.mark.parametrize("name", PAIRS)
def test_robust_after_finish_is_refused(one_backend, name):
    """Two scales on one gradient: nothing is written; the next step, finished once, is fine."""
    run = Run(f"{name}-robust", backend=one_backend)
    run.step(0)
    run.accumulate(*batch(1))
    assert run.criterion.finish_(run.net.parameters())
    before = [snapshot(run.net, run.optimizer), run.criterion.log_s.clone()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="finish_"):
            run.optimizer.step()
        assert same([snapshot(run.net, run.optimizer), run.criterion.log_s], before)
    run.step(2)
    assert not same(snapshot(run.net, run.optimizer), before[0])


def test_finish_after_a_robust_step_is_refused(one_backend):
    run = Run("ABSGD-robust", backend=one_backend)
    run.step(0)
    raw = gradient(run.net).clone()
    with pytest.raises(RuntimeError, match="no forward"):
        run.criterion.finish_(run.net.parameters())
    assert torch.equal(gradient(run.net), raw)


def test_transforms_are_refused(one_backend):
    criterion = ab.ABLoss(identity, lam=0.5, deferred=True, backend=one_backend)
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(criterion)(torch.ones(3))
    assert float(criterion.log_s) == -INF
    with pytest.raises(RuntimeError, match="no forward"):
        criterion.finish_(torch.ones(3))


def test_wrong_labels_leave_the_step_as_it_was(one_backend):
    """A micro-batch that raised is none: the step goes on with the others."""
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)
    for one in (run, plain):
        one.step(0)
    x, y = batch(1)
    run.optimizer.zero_grad()
    for some in micro(x, y):
        run.criterion(run.net(some[0]), some[1]).backward()
        with pytest.raises(IndexError):
            run.criterion(run.net(x[:2]), torch.tensor([0, 4]))
        with pytest.raises(ValueError, match="sample_weight"):
            run.criterion(run.net(x[:2]), y[:2], sample_weight=torch.ones(3))
    run.optimizer.step()
    plain.step(1)
    assert_alike(run, plain)


def test_micro_batches_that_know_the_reference_point(one_backend):
    """The second and later ones: empty, of which some rows are masked and hold labels out of range, and with weights that are NaN
    where the row does not count. As one batch."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 5, generator=draw, dtype=torch.float64).requires_grad_()
    rows = [
        (torch.randn(n, 5, generator=draw, dtype=torch.float64), torch.randint(6, (n,), generator=draw)) for n in (12, 0, 25, 300)
    ]
    masks = [torch.arange(len(x)) % 3 != 1 for x, _ in rows]
    junk = [y.where(m, 77) for (_, y), m in zip(rows, masks)]
    scales = [torch.rand(len(x), generator=draw, dtype=torch.float64).where(m, math.nan) for (x, _), m in zip(rows, masks)]
    whole = ab.ABLoss(lam=0.7, backend="reference").double()
    x, y, mask, t = torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows]), torch.cat(masks), torch.cat(scales)
    whole(x @ weight.t(), y, mask=mask, sample_weight=t.nan_to_num(0)).backward()
    wanted, weight.grad = weight.grad, None
    deferred = ab.ABLoss(lam=0.7, deferred=True, backend=one_backend).double()
    for (x, _), y, mask, t in zip(rows, junk, masks, scales):
        value = deferred(x @ weight.t(), y, mask=mask, sample_weight=t)
        assert value.isfinite() and (len(x) > 0 or value == 0)
        value.backward()
    deferred.finish_(weight)
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(deferred.log_s, whole.log_s)
