"""TargetESS on two processes: one lambda for the rows of both, by sums and not by the losses (MATH §1.7)."""

import math
import re
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
from conftest import identity
from torch.utils.checkpoint import checkpoint
from two_processes import RANKS, needs_gloo, run

import absgd_fast as ab

INF, NAN = math.inf, math.nan
pytestmark = needs_gloo

# Losses and the number of those that rank 0 has.
SPLITS = {
    "uneven": (lambda rng: rng.exponential(size=50), 7),
    "one rank empty": (lambda rng: rng.exponential(size=50), 50),
    "both empty": (lambda rng: np.zeros(0), 0),
    "a rank of one, which is the outlier": (lambda rng: np.r_[1e3, rng.normal(size=40)], 1),
    "offset": (lambda rng: 1000 + 1e-2 * rng.normal(size=60), 20),
    "equal": (lambda rng: np.full(9, 2.0), 4),
    "equal on each rank": (lambda rng: np.r_[np.full(5, 1.0), np.full(5, 3.0)], 5),
    "a NaN on one rank": (lambda rng: np.r_[NAN, rng.normal(size=20)], 10),
    "ties": (lambda rng: np.r_[np.zeros(10), np.ones(10)], 5),
}


def of_ranks(value):
    """(ranks, ...) of a tensor of one shape."""
    out = [torch.empty_like(value) for _ in range(RANKS)]
    dist.all_gather(out, value.contiguous())
    return torch.stack(out)


def same_bits_everywhere(*values):
    for value in values:
        both = of_ranks(value.detach().double().reshape(1))
        assert torch.equal(both.view(torch.int64)[0], both.view(torch.int64)[1])


def shared(share=0.6, sign=1, criterion=identity, **options):
    return ab.ABLoss(criterion, lam=ab.TargetESS(share, sign), **options).double()


def close(found, exact):
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6, equal_nan=True)


def is_one_big_batch(rank):
    for sign in (1, -1):
        for backend in ("reference", None):
            for make, first in SPLITS.values():
                losses = torch.tensor(make(np.random.default_rng(0)))
                mine = slice(0, first) if rank == 0 else slice(first, len(losses))
                criterion, one = shared(sign=sign, backend=backend), shared(sign=sign, process_group=None, backend=backend)
                leaf, whole = losses[mine].clone().requires_grad_(), losses.clone().requires_grad_()
                value = criterion(leaf)
                value.backward()
                exact = one(whole)
                exact.backward()
                close(of_ranks(value.detach()).mean(0), exact.detach())
                close(leaf.grad / RANKS, whole.grad[mine])
                close(criterion.last.weights, one.last.weights[mine])
                for name, number in one.state_dict().items():
                    close(criterion.state_dict()[name].double(), number.double())
                same_bits_everywhere(criterion.lam, criterion.log_s, criterion.last.lam)
                lam = oracle.target_ess(losses.numpy(), 0.6, sign)[0]
                np.testing.assert_allclose(float(criterion.lam), lam, rtol=1e-4)


def in_single_precision(rank):
    losses = 3 * torch.rand(501, generator=torch.Generator().manual_seed(0))
    criterion = ab.ABLoss(identity, lam=ab.TargetESS(0.7))
    criterion((losses[:100] if rank == 0 else losses[100:]).requires_grad_())
    padded = torch.nn.functional.pad(criterion.last.weights, (0, 401 - len(criterion.last.weights)))
    weights = of_ranks(padded).flatten().double()
    assert abs(float(weights.sum() ** 2 / weights.square().sum()) / 501 - 0.7) < 7e-4
    same_bits_everywhere(criterion.lam, criterion.log_s)


def without_update(rank):
    """update=False weighs by the lambda of all processes; eval mode by that of this one; neither writes."""
    losses = torch.arange(1.0, 11.0, dtype=torch.float64)
    mine = (losses[:3] if rank == 0 else losses[3:]).requires_grad_()
    criterion, alone, of_all = shared(), shared(process_group=None), shared(process_group=None)
    alone(mine), of_all(losses.requires_grad_())
    criterion(mine, update=False)
    close(criterion.last.lam, of_all.lam)
    criterion.eval()(mine)
    close(criterion.last.lam, alone.lam)
    assert float(criterion.lam) == INF and float(criterion.log_s) == -INF


def with_options(rank):
    """score, mask, sample_weight, mix, max_weight, loss_divisor and the reported mean, as on one process."""
    rng = np.random.default_rng(0)
    losses, score, weight = (torch.tensor(rng.exponential(size=30)) for _ in range(3))
    mask = torch.tensor(rng.random(30) < 0.7)
    mine = slice(0, 11) if rank == 0 else slice(11, 30)
    for options in ({"mix": 0.5}, {"max_weight": 1.1}, {"report": "mean"}, {"loss_divisor": 2.0}):
        divisor = options.get("loss_divisor", 1)
        criterion = shared(**options)
        one = shared(process_group=None, **{k: v for k, v in options.items() if k != "loss_divisor"})
        leaf, whole = losses[mine].clone().requires_grad_(), losses.clone().requires_grad_()
        criterion(leaf, score=score[mine], mask=mask[mine], sample_weight=weight[mine]).backward()
        one(whole, score=score, mask=mask, sample_weight=weight).backward()
        close(leaf.grad / RANKS / divisor, whole.grad[mine])
        close(criterion.log_s, one.log_s)


def linear(rank):
    rng = np.random.default_rng(0)
    hidden, weight = torch.tensor(rng.normal(size=(40, 6))), torch.tensor(rng.normal(size=(5, 6)))
    target = torch.tensor(rng.integers(0, 5, 40))
    mine = slice(0, 13) if rank == 0 else slice(13, 40)
    criterion = ab.LinearABLoss(lam=ab.TargetESS(0.6), chunk=8).double()
    one = ab.LinearABLoss(lam=ab.TargetESS(0.6), chunk=8, process_group=None).double()
    leaf, whole = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    criterion(hidden[mine], leaf, target[mine]).backward()
    one(hidden, whole, target).backward()
    dist.all_reduce(leaf.grad)
    close(leaf.grad / RANKS, whole.grad)
    close(criterion.log_s, one.log_s)
    same_bits_everywhere(criterion.lam, criterion.log_s)


def recomputed(rank):
    """A recomputation exchanges nothing, although the other process makes none."""
    losses = torch.arange(1.0, 11.0, dtype=torch.float64)
    mine = losses[:3] if rank == 0 else losses[3:]
    criterion, plain = shared(), shared()
    leaf, again = mine.clone().requires_grad_(), mine.clone().requires_grad_()
    value = checkpoint(lambda x: criterion(2 * x), leaf, use_reentrant=False) if rank == 0 else criterion(2 * leaf)
    value.backward()
    plain(2 * again).backward()
    assert torch.equal(leaf.grad, again.grad) and torch.equal(criterion.lam, plain.lam)
    same_bits_everywhere(criterion.lam)


def disagreement(rank):
    for mine, other, what in (
        (ab.TargetESS(0.5), ab.TargetESS(0.6), "the share of TargetESS: rank 0 has 0.5, rank 1 has 0.6"),
        (ab.TargetESS(0.5), ab.TargetESS(0.5, sign=-1), "the share of TargetESS: rank 0 has 0.5, rank 1 has -0.5"),
        (ab.TargetESS(0.5), INF, "normalizer and init: rank 0 has 'target' and 'first', rank 1 has 'moving' and 'first'"),
    ):
        criterion = ab.ABLoss(identity, lam=mine if rank == 0 else other).double()
        with pytest.raises(ValueError, match=re.escape(what)):
            criterion(torch.ones(3, dtype=torch.float64, requires_grad=True))
        assert float(criterion.lam) == INF and float(criterion.log_s) == -INF


BODIES = [is_one_big_batch, in_single_precision, without_update, with_options, linear, recomputed, disagreement]


def _all(rank, bodies):
    for body in bodies:
        body(rank)


@pytest.mark.parametrize("bodies", [BODIES[:1], BODIES[1:]], ids=["one big batch", "the rest"])
def test_two_processes(bodies, tmp_path):
    run(partial(_all, bodies=bodies), tmp_path)
