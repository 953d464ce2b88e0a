"""Who is timed: ours and each competitor, made by a factory that takes a case's data.

Every competitor is used as its users would use it, and at its fastest too: torch's optimizer by default, foreach and
fused; the log-domain formula well written and compiled for each shape.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch.nn import functional as F

import absgd_fast as ab

from .cases import GAMMA, LAM, SGD, STEPS

OURS = "absgd_fast"


class LeftOut(Exception):
    """A competitor that cannot run here or is wrong; the message says why."""


@dataclass
class Peer:
    run: Callable  # one step: what is timed
    error: Callable  # error(what run returned in step number STEPS): its distance from the float64 oracle
    leaf: torch.Tensor | None = None  # the logits, for those who look at memory


def ready(factory, data):
    """A competitor that took STEPS steps, and its error. Raises LeftOut if it cannot run or its result is wrong."""
    peer = factory(data)
    for _ in range(STEPS):
        result = peer.run()
    error = peer.error(result)
    if not error <= data.tolerance:  # `not <=` also stops a NaN
        raise LeftOut(f"its result is off by {error:.2g}, allowed is {data.tolerance:g}")
    return peer, error


# ---- losses: forward and backward ------------------------------------------------------------------------------------


def _loss(data, criterion, lam=LAM, init="first"):
    """criterion(logits, target) on a leaf of its own, which shares the case's numbers."""
    x, y = data.logits.detach().requires_grad_(), data.target

    def run(**options):
        x.grad = None
        loss = criterion(x, y)
        loss.backward(**options)
        return loss

    return Peer(run, lambda loss: data.error(loss, x.grad, lam, init), x)


def _ours():
    return ab.ABLoss(lam=LAM, gamma=GAMMA)


def _package(modify=lambda loss: None):
    """The reference package's loss, its lambda switched on; it starts from s = 0."""
    try:
        from absgd.losses import ABLoss
    except ImportError as error:
        raise LeftOut(f"{error}: pip install absgd==0.0.1") from error
    loss = ABLoss(LAM, abgamma=GAMMA)
    loss.updateLambda()

    def criterion(x, y):
        value = loss(x, y)
        modify(loss)
        return value

    return criterion


def _cut(loss):
    """The package's average u keeps the graph of every step so far alive. Cut here, so that it is timed without what its
    leak costs; the cut takes 1.4 µs of a step's 70 or more."""
    loss.u = loss.u.detach()


def six_lines(logits, target, log_s):
    """The robust loss in plain torch, in the log domain: (loss, next log s)."""
    losses = F.cross_entropy(logits.float(), target, reduction="none")
    z = losses.detach() / LAM
    log_g = z.logsumexp(0) - math.log(len(z))
    log_s = torch.logaddexp(log_s + math.log(1 - GAMMA), log_g + math.log(GAMMA))
    weights = (z - log_s).exp()
    return (weights * losses).mean(), log_s


def _compiled(data):
    torch.compiler.reset()  # each case has its own code, made for its shape, and no guards of others before it
    compiled = torch.compile(six_lines, fullgraph=True, dynamic=False)
    log_s = start = torch.tensor(-math.inf)

    def criterion(x, y):
        nonlocal log_s
        loss, log_s = compiled(x, y, log_s)
        return loss

    peer = _loss(data, criterion, init="zero")
    try:
        peer.run()
    except Exception as error:  # no C++ compiler, no Python.h, a compiler that fails: all of them come as their own type
        reason = str(error).strip().split("\n")[0]
        raise LeftOut(f"torch.compile failed: {type(error).__name__}: {reason}") from error
    log_s = start
    return peer


# ---- optimizers: the step --------------------------------------------------------------------------------------------


def _step(data, optimizer, **options):
    params = data.parameters()
    return Peer(optimizer(params, **SGD, **options).step, lambda _: data.error(params))


# ---- training: batch, forward, backward, step ------------------------------------------------------------------------


def _train(data, criterion, optimizer, lam=LAM, init="first"):
    model, batches = data.model(), cycle(data.batches)
    criterion, optimizer = criterion(), optimizer(model.parameters())

    def run():
        x, y = next(batches)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return Peer(run, lambda _: data.error(model, lam, init))


def _train_package(data):
    criterion = partial(_package, _cut)
    criterion()  # says so if the package is not there
    from absgd.optimizers import ABSGD

    optimizer = partial(ABSGD, lr=SGD["lr"], weight_decay=SGD["weight_decay"])  # its momentum is 0.9
    return _train(data, criterion, optimizer, init="zero")


# ---- all of them -----------------------------------------------------------------------------------------------------

_losses = {
    OURS: lambda data: _loss(data, _ours()),
    "cross_entropy": lambda data: _loss(data, F.cross_entropy, lam=math.inf),
    "absgd package": lambda data: _loss(data, _package(_cut), init="zero"),
    "torch.compile": _compiled,
}
PEERS = {
    "loss": _losses,
    "memory": _losses | {"absgd package": lambda data: _loss(data, _package(), init="zero")},  # as it is
    "step": {
        OURS: partial(_step, optimizer=ab.ABSGD),
        "SGD fused": partial(_step, optimizer=torch.optim.SGD, fused=True),
        "SGD foreach": partial(_step, optimizer=torch.optim.SGD, foreach=True),
        "SGD default": partial(_step, optimizer=torch.optim.SGD),
    },
    "train": {
        OURS: partial(_train, criterion=_ours, optimizer=partial(ab.ABSGD, **SGD)),
        "cross_entropy, SGD fused": partial(
            _train, criterion=lambda: F.cross_entropy, optimizer=partial(torch.optim.SGD, **SGD, fused=True), lam=math.inf
        ),
        "absgd package": _train_package,
    },
}
