"""The competitors that are timed, ours among them. A factory makes each one from the data of a case.

Every competitor is used as its users would use it, and also in its fastest way: torch's optimizer by default, with foreach and
fused; the log-domain formula well written and compiled for each shape. The suites named "gpu ..." run on a GPU.
"""

import importlib
import importlib.util
import math
from copy import copy
from functools import partial
from itertools import cycle

import torch
from torch.nn import functional as F

import absgd_fast as ab
from absgd_fast import _backend, ops

from . import heads
from .case_data import GAMMA, LAM, LOSSES, SGD, STEPS
from .cases import COPY
from .liger import liger_cross_entropy, on_fresh
from .peer import OURS, OURS_ON_TRITON, LeftOut, Peer

# ---- losses: forward and backward ------------------------------------------------------------------------------------


def _loss(data, criterion, lam=LAM, init="first", copies=None):
    """A step of criterion(logits, target) on its own leaves, which share the memory of the case's logits and take turns."""
    leaves, y = [x.detach().requires_grad_() for x in copies or data.copies], data.target
    x, turn = leaves[0], cycle(leaves)

    def run(**options):
        nonlocal x
        x = next(turn)
        x.grad = None
        loss = criterion(x, y)
        loss.backward(**options)
        return loss

    def forward():
        return criterion(leaves[0], y)

    def backward():
        loss = forward()
        return partial(torch.autograd.grad, loss, leaves[0], torch.ones_like(loss))

    parts = {"forward": lambda: forward, "backward": backward}
    return Peer(run, lambda loss: data.error(loss, x.grad, lam, init), leaves[0], parts)


def _ours(device="cpu", backend=None, criterion=None):
    with torch.device(device):
        return ab.ABLoss(criterion, lam=LAM, gamma=GAMMA, backend=backend)


class _Twin:
    """A copy of the reference package's loss (absgd 0.0.1), operation by operation, for when the package is not installed."""

    def __init__(self, lam, abgamma):
        self.u, self.lam, self.gamma = 0, lam, abgamma

    def updateLambda(self):
        pass

    def __call__(self, logits, target):
        losses = F.cross_entropy(logits, target, reduction="none")
        powers = torch.exp(losses / self.lam)
        self.u = (1 - self.gamma) * self.u + self.gamma * (1 * torch.mean(powers))
        weights = (powers / (self.u * len(losses))).detach_()
        return torch.sum(weights * losses)


def _package(modify=lambda loss: None, twin=False, **options):
    """The reference package's loss with its lambda switched on. It starts from s = 0."""
    try:
        from absgd.losses import ABLoss
    except ImportError as error:
        if not twin:
            raise LeftOut(f"{error}: pip install absgd==0.0.1") from error
        ABLoss = _Twin
    loss = ABLoss(LAM, abgamma=GAMMA, **options)
    loss.updateLambda()

    def criterion(x, y):
        value = loss(x, y)
        modify(loss)
        return value

    return criterion


def _cut(loss):
    """Cuts the graph of the package's average u, which would keep the graph of every step so far alive.

    So the package is timed without the cost of this leak. The cut takes 1.4 µs of a step's 70 or more.
    """
    loss.u = loss.u.detach()


def _focal(x, y):
    nll = F.cross_entropy(x, y, reduction="none")
    return (1 - (-nll).exp()) ** 2 * nll


def _gce(x, y):
    p = x.softmax(1).gather(1, y[:, None])[:, 0]
    return (1 - p**0.7) / 0.7


def _sce(x, y):
    far = 1 - x.softmax(1).gather(1, y[:, None])[:, 0]
    return 0.1 * F.cross_entropy(x, y, reduction="none") - math.log(1e-4) * far


def _with_vectors(name):
    def make(classes):
        scale, shift, margin = LOSSES[name](classes)._adjust(torch.empty(1, classes))
        if name == "LDAM":  # as its authors do
            return lambda x, y: F.cross_entropy(
                torch.where(F.one_hot(y, classes).bool(), x - margin[y][:, None], x), y, reduction="none"
            )
        adjusted = {
            "logit adjustment": lambda x: x + shift,
            "CDT": lambda x: scale * x,
            "VS": lambda x: scale * x + shift,
        }[name]
        return lambda x, y: F.cross_entropy(adjusted(x), y, reduction="none")

    return make


# The losses as users write them in eager torch: classes -> function of logits and labels.
EAGER = {
    "label smoothing": lambda classes: partial(F.cross_entropy, reduction="none", label_smoothing=0.1),
    "focal": lambda classes: _focal,
    "GCE": lambda classes: _gce,
    "SCE": lambda classes: _sce,
    **{name: _with_vectors(name) for name in ("LDAM", "logit adjustment", "CDT", "VS")},
}


def _family(data):
    return _loss(data, _ours(criterion=LOSSES[data.loss](data.logits.shape[1])))


def _target(data):
    target = ab.TargetESS(0.7)
    return _loss(data, ab.ABLoss(lam=target), lam=target)


def _family_base(data):
    """Our cross-entropy on the same logits."""
    return _loss(data.as_cross_entropy(), _ours())


def _family_eager(data):
    return _loss(data, _package(_cut, criterion=EAGER[data.loss](data.logits.shape[1])), init="zero")


def six_lines(logits, target, log_s):
    """The robust loss in plain torch, in the log domain: (loss, next log s)."""
    losses = F.cross_entropy(logits.float(), target, reduction="none")
    z = losses.detach() / LAM
    log_g = z.logsumexp(0) - math.log(len(z))
    log_s = torch.logaddexp(log_s + math.log(1 - GAMMA), log_g + math.log(GAMMA))
    weights = (z - log_s).exp()
    return (weights * losses).mean(), log_s


def _compiled(data, **options):
    torch.compiler.reset()  # each case gets code for its own shape, without the guards of earlier cases
    compiled = torch.compile(six_lines, fullgraph=True, dynamic=False, **options)
    log_s = start = torch.tensor(-math.inf, device=data.device)

    def criterion(x, y):
        nonlocal log_s
        loss, log_s = compiled(x, y, log_s)
        return loss

    peer = _loss(data, criterion, init="zero")
    try:
        peer.run()
    except Exception as error:  # a missing C++ compiler, a missing Python.h and a failed compilation all raise different types
        reason = str(error).strip().split("\n")[0]
        raise LeftOut(f"torch.compile failed: {type(error).__name__}: {reason}") from error
    log_s = start
    return peer


# ---- optimizers: the step --------------------------------------------------------------------------------------------


def _step(data, optimizer=None, **options):
    """The step of an optimizer, by default ours for the case's rule."""
    params = data.parameters()
    run = (optimizer or data.rule.ours)(params, **data.rule.options, **options).step
    return Peer(run, lambda _: data.error(params), parts={"step": lambda: run})


def _clipped(data):
    return _step(data, max_norm=data.max_norm)


def _clip_and_step(data):
    """torch's two calls, of which the first writes the gradients. They are copies, which all steps share."""
    params = data.parameters()
    step = torch.optim.SGD(params, **SGD, fused=True).step

    def run():
        # From the second step on the gradients have the norm that clipping gave them. Clipping takes as long then.
        torch.nn.utils.clip_grad_norm_(params, data.max_norm)
        step()

    for p in params:
        p.grad = p.grad.clone()
    return Peer(run, lambda _: data.error(params), parts={"step": lambda: run})


def _torch_step(data):
    return _step(data, data.rule.theirs, **data.rule.fastest(data.device))


# ---- the weighted step ------------------------------------------------------------------------------------------------


def _weighted(data, backend=None):
    params = [w.clone() for w in data.start]
    buffers, log_s = [torch.zeros_like(w) for w in params], torch.tensor(-math.inf, device=data.device)

    def run():
        nonlocal log_s
        log_s = ab.functional.weighted_momentum_step_(
            params, buffers, data.grads, data.losses, log_s, lam=LAM, gamma=GAMMA, init="zero", backend=backend, **SGD
        )

    return Peer(run, lambda _: data.error(params), parts={"step": lambda: run})


def _weighted_torch(data):
    """The weights in plain torch, a matrix product for each parameter, and torch's fused step."""
    params = [torch.nn.Parameter(w.clone()) for w in data.start]
    optimizer, log_s = torch.optim.SGD(params, **SGD, fused=True), torch.tensor(-math.inf, device=data.device)

    @torch.no_grad()
    def run():
        nonlocal log_s
        z = data.losses / LAM
        log_g = z.logsumexp(0) - math.log(len(z))
        log_s = torch.logaddexp(log_s + math.log(1 - GAMMA), log_g + math.log(GAMMA))
        factors = (z - log_s).exp() / len(z)
        for p, g in zip(params, data.grads):
            p.grad = (factors @ g.flatten(1)).view_as(p)
        optimizer.step()

    return Peer(run, lambda _: data.error(params), parts={"step": lambda: run})


def _copy(data):
    """torch's copy_ of so many numbers that it moves as many bytes as the step must move."""
    source = torch.rand(data.moved // 8, device=data.device)
    target = torch.zeros_like(source)
    return Peer(lambda: target.copy_(source), lambda _: 0.0 if torch.equal(source, target) else math.inf)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def _package_or_twin(data):
    peer = _loss(data, _package(_cut, twin=True), init="zero")
    if importlib.util.find_spec("absgd") is None:
        peer.note = "a twin of its arithmetic: the package is not installed"
    return peer


def _liger(data):
    own = [x.clone() for x in data.copies]
    return on_fresh(_loss(data, liger_cross_entropy(), lam=math.inf, copies=own), own, data.logits)


def _triton(factory):
    """The same factory with our Triton kernels."""

    def make(data):
        if reason := _backend.why_not("triton"):
            raise LeftOut(reason)
        return factory(data, backend="triton")

    return make


def _from_statistics(data):
    """Ours, with the gradient always made in backward, whatever the size of the batch."""
    criterion = _ours(data.device)
    operators = ops.serving(data.device, None)
    if operators.backend in ("cpu", "reference"):
        raise LeftOut("there is no such choice here")
    other = copy(operators)
    other.backward_mode = lambda logits: ops.WITH_STATS
    # ABLoss remembers these two from its first call on a device
    criterion._served = data.logits.device, other
    return _loss(data, criterion)


# ---- deferred: several micro-batches, one step ------------------------------------------------------------------------


def _micro_batches(data, criterion, finish=None, lam=LAM, init="first", logits=None):
    """criterion(logits, target), forward and backward, for each micro-batch.

    finish() is called last and returns the factor of all gradients. By default the losses are means of one micro-batch each, so
    the factor is 1 / count.
    """
    targets = data.target.chunk(data.count)
    leaves = [x.detach().requires_grad_() for x in (data.logits if logits is None else logits).chunk(data.count)]
    finish = finish or (lambda: 1 / data.count)

    def run():
        losses = []
        for x, y in zip(leaves, targets):
            x.grad = None
            loss = criterion(x, y)
            loss.backward()
            losses.append(loss.detach())
        return losses, finish()

    def error(result):
        losses, factor = result
        return data.error(torch.stack(losses).sum() * factor, torch.cat([x.grad for x in leaves]) * factor, lam, init)

    return Peer(run, error)


def _deferred(data, backend=None):
    """Ours, deferred. The gradients are not multiplied by the factor: an optimizer with robust= does that in its step."""
    with data.device:
        criterion = ab.ABLoss(lam=LAM, gamma=GAMMA, deferred=True, backend=backend)
    return _micro_batches(data, criterion, lambda: criterion.settle()[1])


def _deferred_liger(data):
    own = data.logits.clone()  # Liger writes its gradients there
    peer = _micro_batches(data, liger_cross_entropy(), lam=math.inf, logits=own)
    return on_fresh(peer, [own], data.logits)


# ---- whole steps of large models ---------------------------------------------------------------------------------------


def _checked_by_loss(data, run, seen, lam):
    """A competitor whose loss is checked, given what it has `seen` in every step until then."""

    def error(loss):
        out = data.error(loss, seen, lam, "first")
        seen[:] = [None] * STEPS
        return out

    return Peer(run, error)


def _whole(data, criterion, optimizer, lam=LAM, **options):
    model, batches, seen = data.model(), cycle(data.batches), []
    optimizer = optimizer(model.parameters(), **data.rule.options | {"lr": 1e-3}, **options)  # large models diverge at 0.1

    def run():
        x, y = next(batches)
        optimizer.zero_grad()
        with data.autocast():
            logits = model(x)
            loss = criterion(logits, y)
        loss.backward()
        optimizer.step()
        if len(seen) < STEPS:  # only until the check
            seen.append((logits.detach(), y))
        return loss.detach()

    return _checked_by_loss(data, run, seen, lam)


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
    criterion()  # raises LeftOut if the package is missing
    from absgd.optimizers import ABSGD

    optimizer = partial(ABSGD, lr=SGD["lr"], weight_decay=SGD["weight_decay"])  # its momentum is 0.9
    return _train(data, criterion, optimizer, init="zero")


def _language_model(data, loss_of, optimizer, lam=LAM):
    """Steps of a language model. loss_of: (features, weight of the head, labels) -> loss."""
    model, batches, seen = data.model(), cycle(data.batches), []
    optimizer = optimizer(model.parameters(), **SGD | {"lr": 1e-3})  # as in _whole

    def run():
        x, y = next(batches)
        optimizer.zero_grad()
        features, weight = model.features(x), model.head.weight
        loss = loss_of(features, weight, y)
        loss.backward()
        if len(seen) < STEPS:  # only until the check
            seen.append((features.detach(), weight.detach().clone(), y))
        optimizer.step()
        return loss.detach()

    return _checked_by_loss(data, run, seen, lam)


def _logits_stored(features, weight, y):
    return F.cross_entropy(features @ weight.t(), y)


# ---- all of them -----------------------------------------------------------------------------------------------------

_losses = {
    OURS: lambda data: _loss(data, _ours()),
    "cross_entropy": lambda data: _loss(data, F.cross_entropy, lam=math.inf),
    "absgd package": lambda data: _loss(data, _package(_cut), init="zero"),
    "torch.compile": _compiled,
    "torch.compile, max-autotune": partial(_compiled, mode="max-autotune"),
}
PEERS = {
    "loss": _losses,
    "target": {OURS: _target, "a fixed lambda": lambda data: _loss(data, _ours())},
    "family": {OURS: _family, "our cross-entropy": _family_base, "eager, absgd package": _family_eager},
    "gpu loss": {
        OURS: lambda data: _loss(data, _ours(data.device)),
        OURS_ON_TRITON: _triton(lambda data, backend: _loss(data, _ours(data.device, backend))),
        "cross_entropy": _losses["cross_entropy"],
        "absgd package": _package_or_twin,
        "Liger": _liger,
        "torch.compile": _compiled,  # the last one, because it takes ten seconds without a cache
    },
    "gpu deferred": {
        OURS: _deferred,
        OURS_ON_TRITON: _triton(_deferred),
        "cross_entropy": lambda data: _micro_batches(data, F.cross_entropy, lam=math.inf),
        "Liger": _deferred_liger,
    },
    "linear": heads.ON_CPU,
    "gpu linear": heads.ON_GPU,
    "gpu train": {
        OURS: lambda data: _whole(data, _ours(data.device), data.rule.ours),
        "plain": lambda data: _whole(data, F.cross_entropy, data.rule.theirs, math.inf, **data.rule.fastest(data.device)),
    },
    "gpu step": {
        OURS: _step,
        OURS_ON_TRITON: _triton(_step),
        "SGD fused": partial(_step, optimizer=torch.optim.SGD, fused=True),
        "SGD foreach": partial(_step, optimizer=torch.optim.SGD, foreach=True),
    },
    "gpu limit": {
        OURS: lambda data: _loss(data, _ours(data.device)),
        "from statistics": _from_statistics,
    },
    "memory": _losses | {"absgd package": lambda data: _loss(data, _package(), init="zero")},  # with its leak
    "step": {
        OURS: _step,
        "SGD fused": partial(_step, optimizer=torch.optim.SGD, fused=True),
        "SGD foreach": partial(_step, optimizer=torch.optim.SGD, foreach=True),
        "SGD default": partial(_step, optimizer=torch.optim.SGD),
    },
    "clip": {
        OURS: _clipped,
        "clip_grad_norm_, SGD fused": _clip_and_step,
        "our step without clipping": lambda data: _step(data.plain),
    },
    "rules": {OURS: _step, "torch's fastest": _torch_step},
    "weighted": {OURS: _weighted, "torch": _weighted_torch, COPY: _copy},
    "gpu weighted": {OURS: _weighted, OURS_ON_TRITON: _triton(_weighted), "torch": _weighted_torch},
    "gpu rules": {OURS: _step, OURS_ON_TRITON: _triton(_step), "torch's fastest": _torch_step},
    "train": {
        OURS: partial(_train, criterion=_ours, optimizer=partial(ab.ABSGD, **SGD)),
        "cross_entropy, SGD fused": partial(
            _train, criterion=lambda: F.cross_entropy, optimizer=partial(torch.optim.SGD, **SGD, fused=True), lam=math.inf
        ),
        "absgd package": _train_package,
    },
    "language model": {
        OURS: lambda data: _language_model(data, ab.LinearABLoss(lam=LAM, gamma=GAMMA), ab.ABSGD),
        "logits stored, SGD fused": lambda data: _language_model(
            data, _logits_stored, partial(torch.optim.SGD, fused=True), math.inf
        ),
    },
}
