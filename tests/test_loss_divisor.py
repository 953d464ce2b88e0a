"""loss_divisor that changes: between two steps, for a last short group of micro-batches, and inside a deferred step."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deferred_cases import distance, network, vector
from two_processes import RANKS, needs_gloo, run

import absgd_fast as ab

CLASSES = 4
GROUPS = (4, 4, 2)  # micro-batches per step
ROWS = 5
# what the framework divides the micro-batches of a group by
DIVISORS = {
    "true size": lambda size: [size] * size,
    "always 4": lambda size: [4] * size,
    "another from the second micro-batch on": lambda size: [3] + [size] * (size - 1),
    "each its own": lambda size: [1, 0.5, 3, 7][:size],
}


class Head(torch.nn.Module):
    """LinearABLoss as a loss of logits."""

    def __init__(self, **options):
        super().__init__()
        self.criterion = ab.LinearABLoss(**options)

    def forward(self, x, y):
        return self.criterion(x, torch.eye(CLASSES, dtype=x.dtype), y)


LOSSES = {
    "fused": ab.ABLoss,
    "callable": partial(ab.ABLoss, partial(F.cross_entropy, reduction="none")),
    "linear": Head,
}


def groups(rank=0, empty=False):
    """The micro-batches of three steps; the first of each step may be empty."""
    draw = torch.Generator().manual_seed(rank)
    for size in GROUPS:
        x = torch.randn(size * ROWS, 5, generator=draw, dtype=torch.float64)
        y = torch.randint(CLASSES, (size * ROWS,), generator=draw)
        cuts = [ROWS] * size if not empty else [0, *[ROWS] * (size - 2), 2 * ROWS]
        yield list(zip(x.split(cuts), y.split(cuts)))


def train(make, of_step, divisors, finish, ranks=1):
    """(parameters, log s, reported means) after three steps. of_step: the micro-batches of each; divisors: theirs."""
    net, loss = network(), make(lam=0.5).double()
    criterion = getattr(loss, "criterion", loss) if isinstance(loss, Head) else loss
    robust = {"robust": criterion} if finish == "robust" and criterion.deferred else {}
    optimizer = ab.ABSGD(net.parameters(), lr=0.1, momentum=0.9, **robust)
    means = []
    for micro_batches in of_step:
        optimizer.zero_grad()
        for (x, y), divisor in zip(micro_batches, divisors(len(micro_batches))):
            criterion.loss_divisor = divisor
            value = loss(net(x), y) / divisor
            value.backward()
            means.append((float(value), len(y)))
        if ranks > 1:
            for p in net.parameters():
                dist.all_reduce(p.grad)
                p.grad /= ranks
        if finish == "finish_" and criterion.deferred:
            assert criterion.finish_(net.parameters())
        optimizer.step()
    return vector(net), criterion.log_s, means


def together(of_step):
    return [[tuple(torch.cat(t) for t in zip(*micro_batches))] for micro_batches in of_step]


@pytest.mark.parametrize("finish", ["robust", "finish_"])
@pytest.mark.parametrize("divisors", DIVISORS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("empty", [False, True], ids=["", "empty first"])
def test_deferred(one_backend, loss, divisors, finish, empty):
    """Groups of 4, 4 and 2 micro-batches are three big batches, whatever each was divided by; and so is the plain mean."""
    make = partial(LOSSES[loss], backend=one_backend)
    start = vector(network())
    ours = train(partial(make, deferred=True, report="mean"), groups(empty=empty), DIVISORS[divisors], finish)
    plain = train(make, together(groups(empty=empty)), lambda size: [1], finish)
    assert distance(start, plain[0]) > 0.03
    assert distance(ours[0], plain[0]) <= 1e-12
    np.testing.assert_allclose(ours[1], plain[1], rtol=1e-12)
    by_plain_loss = train(partial(make, deferred=True, report="mean"), groups(empty=empty), lambda size: [1] * size, finish)
    np.testing.assert_allclose(ours[2], by_plain_loss[2], rtol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_not_deferred(one_backend, loss):
    """Each forward undoes its own."""
    make = partial(LOSSES[loss], backend=one_backend)
    ours = train(make, groups(), DIVISORS["each its own"], None)
    plain = train(make, groups(), lambda size: [1] * size, None)
    assert distance(ours[0], plain[0]) <= 1e-12
    np.testing.assert_allclose(ours[2], plain[2], rtol=1e-12)


def test_an_update_outside_of_the_step(one_backend):
    """A forward with update=False has the divisor of now, and takes none from the open step."""
    x, y = next(groups())[0]
    logits = x[:, :CLASSES].clone().requires_grad_()
    deferred, plain = (ab.ABLoss(lam=0.5, backend=one_backend, deferred=d, loss_divisor=d * 3 or 1) for d in (True, False))
    deferred(logits, y)
    deferred.loss_divisor = 8
    torch.testing.assert_close(deferred(logits, y, update=False) / 8, plain(logits, y, update=False))


def of_two_processes(rank):
    """Two processes with different rows, also where the divisor changes; one that differs between them is refused."""
    for loss in LOSSES:
        for divisors in DIVISORS.values():
            for options in ({"deferred": True}, {}):
                if not options and loss == "linear":
                    continue
                ours = train(partial(LOSSES[loss], **options), groups(rank), divisors, "robust", RANKS)
                plain = partial(LOSSES[loss], process_group=None)
                everybody = [
                    [tuple(torch.cat(t) for t in zip(*pair)) for pair in zip(*of_ranks)] for of_ranks in zip(groups(0), groups(1))
                ]
                if options:
                    everybody = together(everybody)
                wanted = train(plain, everybody, lambda size: [1] * size, "robust")
                assert distance(ours[0], wanted[0]) <= 1e-12, (loss, options)
                np.testing.assert_allclose(ours[1], wanted[1], rtol=1e-12)
    x, y = torch.randn(3, CLASSES), torch.arange(3)
    for deferred in (True, False):
        criterion = ab.ABLoss(lam=0.5, deferred=deferred, loss_divisor=2)
        criterion(x.requires_grad_(), y)
        if deferred:
            criterion.discard()
        criterion.loss_divisor = 2 + rank
        with pytest.raises(ValueError, match="disagree on loss_divisor: rank 0 has 2, rank 1 has 3"):
            criterion(x, y)


@needs_gloo
def test_two_processes(tmp_path):
    run(of_two_processes, tmp_path)
