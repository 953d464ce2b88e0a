"""A small training in deferred micro-batches, and the same in one batch: what the tests of deferred normalisation compare."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import absgd_fast as ab

INF, NAN = math.inf, math.nan
# Uneven micro-batches of 21 rows: the first two have no row, and all of the fourth (3 rows) are ignored.
SIZES = (0, 0, 7, 3, 5, 6)
IGNORED = slice(7, 10)
# Ours, torch's, arguments. eps is far above a gradient's rounding: Adam's first steps are lr g / (|g| + eps), and a g that is
# nothing but rounding would be a whole step.
PAIRS = {
    "ABSGD": (ab.ABSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.01)),
    "ABAdam": (ab.ABAdam, torch.optim.Adam, dict(lr=0.005, eps=1e-4)),
    "ABAdamW": (ab.ABAdamW, torch.optim.AdamW, dict(lr=0.005, eps=1e-4, amsgrad=True)),
    "ABRMSprop": (ab.ABRMSprop, torch.optim.RMSprop, dict(lr=0.005, eps=1e-4, momentum=0.9, centered=True)),
    "ABAdagrad": (ab.ABAdagrad, torch.optim.Adagrad, dict(lr=0.05, eps=1e-4)),
}
# How a step is finished: inside ours, or by finish_ before ours or torch's
WAYS = {
    **{f"{name}-robust": (name, "robust") for name in PAIRS},
    **{f"{name}-finish": (name, "finish") for name in PAIRS},
    "SGD-finish": ("ABSGD", "torch"),
    "Adam-finish": ("ABAdam", "torch"),
}
each_way = pytest.mark.parametrize("way", WAYS)


def network(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 4)).to(dtype)


def batch(step, dtype=torch.float64):
    """Losses of another size in each step, so that log s has somewhere to move."""
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(sum(SIZES), 5, generator=draw, dtype=torch.float64) * (0.5 + step % 3 / 2)
    y = torch.randint(4, (sum(SIZES),), generator=draw)
    y[IGNORED] = -100
    return x.to(dtype), y


def micro(*tensors):
    return zip(*(t.split(SIZES) for t in tensors))


def vector(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def distance(a, b):
    """Relative error of a whole vector."""
    return float((a - b).norm() / b.norm())


def snapshot(net, optimizer):
    """Parameters, states and counts of steps, to compare to the bit."""
    return copy.deepcopy([list(net.parameters()), optimizer.state_dict()["state"]])


def same(a, b):
    """Equal to the bit, NaN included, through lists and dicts."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


class Run:
    """A network in training: deferred, in micro-batches, finished in one of the WAYS; or (no way) plain and in one batch."""

    def __init__(self, way=None, *, optimizer="ABSGD", dtype=torch.float64, clip=None, backend=None, criterion=None, **options):
        self.dtype, self.clip, self.deferred = dtype, clip, way is not None
        name, self.how = WAYS[way] if self.deferred else (optimizer, "torch")
        self.net = network(dtype)
        options = {"lam": 0.5} | options | ({"deferred": True} if self.deferred else {})
        self.criterion = ab.ABLoss(criterion, backend=backend, **options)
        if dtype == torch.float64:
            self.criterion.double()
        ours, theirs, given = PAIRS[name]
        if self.how == "torch":
            self.optimizer = theirs(self.net.parameters(), **given)
        else:
            robust = {"robust": self.criterion, "max_norm": clip} if self.how == "robust" else {}
            self.optimizer = ours(self.net.parameters(), **given, **robust, backend=backend)
        self.norms = []

    @classmethod
    def plain(cls, way, **options):
        """One big batch and torch's optimizer beside this way."""
        return cls(optimizer=WAYS[way][0], **options)

    def accumulate(self, x, y, wrap=lambda loss: loss):
        self.optimizer.zero_grad()
        for some in micro(x, y) if self.deferred else [(x, y)]:
            wrap(self.criterion(self.net(some[0]), some[1])).backward()

    def settle(self):
        """What stands between the last backward and the step."""
        counts = self.criterion.finish_(self.net.parameters()) if self.deferred and self.how != "robust" else None
        if self.clip is not None and self.how != "robust":
            self.norms.append(float(nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)))
        return counts

    def step(self, step, spoil=lambda x, y: None):
        x, y = batch(step, self.dtype)
        spoil(x, y)
        self.accumulate(x, y)
        counts = self.settle()
        self.optimizer.step()
        if self.clip is not None and self.how == "robust":
            self.norms.append(float(self.optimizer.last_grad_norm))
        return counts


def assert_alike(run, plain, rtol=1e-11):
    assert distance(vector(run.net), vector(plain.net)) <= rtol
    np.testing.assert_allclose(run.criterion.log_s, plain.criterion.log_s, rtol=rtol, atol=rtol)
    assert run.criterion.nonfinite_batches == plain.criterion.nonfinite_batches


def weighted(logits, target, factor):
    return factor * F.cross_entropy(logits, target, reduction="none", ignore_index=-100)


def not_finite(row, value):
    def spoil(x, y):
        x[row] = value

    return spoil


def spike(row):
    """A loss of hundreds of lambdas, where its micro-batch is not the first."""

    def spoil(x, y):
        x[row] = torch.linspace(-3e3, 3e3, 5)
        y[row] = 0

    return spoil


# of row 2, which is in the first micro-batch that has any, and row 12, which is in a later one
SPOILS = {"nan-first": not_finite(2, NAN), "nan": not_finite(12, NAN), "inf": not_finite(12, INF), "spike": spike(12)}
