"""The ways to train that `absgd-fast train --methods` compares, and what each needs of the loop in train.py.

sgd, absgd, reference                      plain momentum SGD, ABSGD, the reference package
term, eg, cvar, chi2, groupdro             other rules from losses to weights (absgd_fast.weights)
l2rw                                       weights from a clean batch (absgd_fast.meta)
proportion, resample, hard-mining, random  what the L2RW paper compares with (Sec. 4.1)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import torch
from torch import nn

import absgd_fast as ab

from .. import _backend
from ..ops import OPERATORS, WITH_GRAD
from . import data

MOMENTUM = 0.9  # the reference package has it built in, so it is everybody's

# name: (our fused loss, torch's counterpart)
LOSSES = {"ce": (ab.CrossEntropy, nn.CrossEntropyLoss)}


@dataclass
class Method:
    """What one way of training needs: loss(logits, labels), an optimizer, what to call after each epoch, weights() → (B,),
    the weights of the batch just trained on (1 on average, None = all 1), and by name whatever has a state that a checkpoint
    must hold beside the optimizer."""

    loss: Callable
    optimizer: Any
    after_epoch: Callable = lambda: None
    weights: Callable = lambda: None
    stateful: dict = field(default_factory=dict)

    def __post_init__(self):
        self.stateful = {"optimizer": self.optimizer} | self.stateful

    def choose(self, batch):
        """The samples (indices) to train on where it is the turn of `batch`."""
        return batch

    def step(self, model, images, labels):
        """Forward, backward and the optimizer's step."""
        loss = self.loss(model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.stateful.items()}

    def load_state_dict(self, state):
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])


# Elements of the per-sample gradients of a linear model up to which they are stepped with by themselves: on digits' 41,600 a
# step takes 80 to 110 µs instead of 240 to 360, at 504,000 0.6 of the other's time, at 983,000 as long.
OUTER_PRODUCTS = 2**18


class _LinearMethod(Method):
    """ABSGD on softmax regression without a graph: the gradient of a sample is the outer product of its logits' gradient and
    its pixels, and one pass over all of them makes the weights, log s and the step (functional.weighted_momentum_step_). The
    loss and the optimizer hold the state, as ever."""

    def step(self, model, images, labels):
        pixels, layer, (group,), loss = images.flatten(1), model[-1], self.optimizer.param_groups, self.loss
        params, state = [layer.weight, layer.bias], self.optimizer.state
        for p in params:
            if "momentum_buffer" not in state[p]:
                state[p]["momentum_buffer"] = torch.zeros_like(p)
        with torch.no_grad():
            logits = layer(pixels)
            *spec, bits = loss.criterion.spec(logits)
            losses, slopes, _ = OPERATORS["cpu"].logit_loss(
                logits, labels, *spec, bits | WITH_GRAD
            )  # what autograd would be told
            log_s = ab.functional.weighted_momentum_step_(
                params,
                [state[p]["momentum_buffer"] for p in params],
                [slopes[:, :, None] * pixels[:, None, :], slopes],
                losses,
                loss.log_s,
                lam=loss.lam,
                gamma=loss.gamma,
                mix=loss.mix,
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
            )
            loss.log_s.copy_(log_s)
        self.optimizer._opt_called = True  # what a schedule asks for before it is stepped
        self.weights = lambda: torch.exp(losses / loss.lam - log_s) if loss.lam.isfinite() else None


def _momentum_sgd(parameters, config):
    return ab.ABSGD(parameters, config.lr, MOMENTUM, weight_decay=config.weight_decay)


def _sgd(parameters, config, split, seed):
    # fused=True is the fastest step torch has: the cost of ABSGD is measured against that
    optimizer = torch.optim.SGD(parameters, config.lr, MOMENTUM, weight_decay=config.weight_decay, fused=True)
    return Method(LOSSES[config.loss][1](), optimizer)


def _absgd(parameters, config, split, seed):
    parameters = list(parameters)
    few = config.batch_size * parameters[0].numel() <= OUTER_PRODUCTS
    kind = _LinearMethod if config.model == "linear" and few and _backend.select(torch.device("cpu"), None) == "cpu" else Method
    return _two_stages(parameters, config, config.lam, kind, gamma=config.gamma)


def _two_stages(parameters, config, lam, kind=Method, **options):
    loss = ab.ABLoss(LOSSES[config.loss][0](), lam=lam, mix=config.mix, **options)
    stages, optimizer = ab.TwoStage(loss, lam, start=config.switch), _momentum_sgd(parameters, config)
    return kind(loss, optimizer, stages.step, lambda: loss.last.weights, {"loss": loss, "stages": stages})


def _reference(parameters, config, split, seed):
    from absgd.losses import ABLoss
    from absgd.optimizers import ABSGD

    class Kept(LOSSES[config.loss][1]):
        """The per-sample losses, kept for weights(): the package does not show its weights."""

        def forward(self, logits, labels):
            self.last = super().forward(logits, labels)
            return self.last

    class State:
        """That of the package's loss, whose own state_dict() is empty: plain attributes, of which u drags the graph of every
        step so far along. The graph is never walked, so without it the numbers are the same."""

        def state_dict(self):
            u = loss.u.detach() if isinstance(loss.u, torch.Tensor) else loss.u
            return {"u": u, "ablambda": loss.ablambda, "step": loss.step}

        def load_state_dict(self, state):
            for name, value in state.items():
                setattr(loss, name, value)

    criterion = Kept(reduction="none")
    # updateLambda counts its calls from 0 and switches on at number milestone − 1. It is called before the first epoch
    # and after each, so that λ starts in the same epoch as in _absgd.
    loss = ABLoss(config.lam, milestone=config.switch + 1, criterion=criterion, abgamma=config.gamma)
    loss.updateLambda()

    def weights():
        return None if loss.ablambda is None else torch.exp(criterion.last.detach() / loss.ablambda) / loss.u.detach()

    optimizer = ABSGD(parameters, config.lr, weight_decay=config.weight_decay)
    return Method(loss, optimizer, loss.updateLambda, weights, {"loss": State()})


def _term(parameters, config, split, seed):
    """TERM is λ with the normaliser of the batch alone (t = 1/λ)."""
    return _two_stages(parameters, config, config.lam, normalizer="batch")


def _eg(parameters, config, split, seed):
    """Exponentiated gradient is TERM with λ < 0."""
    return _two_stages(parameters, config, -abs(config.lam), normalizer="batch")


class _FromEpoch:
    """The plain mean until an epoch, then by a weighting: the two stages of a method that has no λ."""

    def __init__(self, config, weighting, start, grouped=False):
        criterion = LOSSES[config.loss][0]()
        self.plain = ab.ABLoss(criterion, lam=inf)
        self.robust = ab.ABLoss(criterion, rule=weighting, mix=config.mix)
        self.start, self.grouped, self.epoch, self.used = start, grouped, 0, self.plain

    def __call__(self, logits, labels):
        self.used = self.robust if self.epoch >= self.start else self.plain
        groups = labels if self.grouped and self.used is self.robust else None
        return self.used(logits, labels, groups=groups)

    def step(self):
        self.epoch += 1

    def state_dict(self):
        return {"epoch": self.epoch, "robust": self.robust.state_dict()}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]
        self.robust.load_state_dict(state["robust"])


def _by_weighting(parameters, config, weighting, start=0, grouped=False, **stateful):
    loss, optimizer = _FromEpoch(config, weighting, start, grouped), _momentum_sgd(parameters, config)
    return Method(loss, optimizer, loss.step, lambda: loss.used.last.weights, stateful | {"loss": loss})


def _cvar(parameters, config, split, seed):
    return _by_weighting(parameters, config, partial(ab.weights.cvar, beta=config.beta, reg=config.reg), config.switch)


def _chi2(parameters, config, split, seed):
    return _by_weighting(parameters, config, partial(ab.weights.chi2, rho=config.chi2_rho), config.switch)


def _groupdro(parameters, config, split, seed):
    weighting = ab.weights.GroupDRO(int(split.y.max()) + 1, config.eta)
    return _by_weighting(parameters, config, weighting, config.switch, grouped=True)


def _hard_mining(parameters, config, split, seed):
    return _by_weighting(parameters, config, hardest, grouped=True)


def hardest(losses, groups):
    """W of hard mining: of each group as many samples as the smallest one in the batch has, those of the largest losses. So all
    of a minority is kept, and the hardest of the majority (L2RW paper, Sec. 4.1).

    >>> hardest(torch.tensor([1.0, 3.0, 2.0, 0.0]), torch.tensor([0, 0, 0, 1]))
    tensor([0., 2., 0., 2.])
    """
    members = [torch.nonzero(groups == g).flatten() for g in groups.unique()]
    few = min(map(len, members), default=0)
    kept = torch.cat([samples[losses[samples].topk(few).indices] for samples in members]) if members else groups[:0]
    return torch.zeros_like(losses).index_fill_(0, kept, len(losses) / max(len(kept), 1))


class _Draws:
    """A stream of random numbers of a method's own, which goes on where it was after --resume."""

    def __init__(self, seed):
        self.generator = data.generator(seed, data.METHOD)

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def _random(parameters, config, split, seed):
    """Rectified Gaussian weights (L2RW paper, Eq. 16)."""
    draws = _Draws(seed)

    def weighting(losses):
        w = torch.randn(len(losses), generator=draws.generator).clamp(min=0)
        return len(losses) * w / w.sum().clamp(min=1e-12)

    return _by_weighting(parameters, config, weighting, draws=draws)


def _proportion(parameters, config, split, seed):
    """Each sample weighs as the inverse of its class's share."""
    counts = torch.bincount(split.y)
    weight = (len(split.y) / (counts.clamp(min=1) * (counts > 0).sum())).float()
    optimizer = _momentum_sgd(parameters, config)
    plain = ab.ABLoss(LOSSES[config.loss][0](), lam=inf)
    method = Method(None, optimizer)

    def loss(logits, labels):
        w = weight[labels]
        method.weights = lambda: w
        return plain(logits, labels, sample_weight=w)

    method.loss = loss
    return method


class _Resampling(Method):
    """Batches in which every class is as likely: a class is drawn first, then one of its samples."""

    def choose(self, batch):
        return torch.multinomial(self.chances, len(batch), replacement=True, generator=self.stateful["draws"].generator)


def _resample(parameters, config, split, seed):
    optimizer = _momentum_sgd(parameters, config)
    loss = ab.ABLoss(LOSSES[config.loss][0](), lam=inf)
    method = _Resampling(loss, optimizer, stateful={"draws": _Draws(seed)})
    method.chances = 1 / torch.bincount(split.y)[split.y].double()
    return method


class _Reweighting(Method):
    """L2RW. A step takes all clean samples, or draws twice as many as it trains on where they are more: the fewer, the more its
    weights are noise (digits, 40 % of the labels wrong, the MLP, three seeds: 85 to 90 % with all 100, 47 to 85 % with 32)."""

    def step(self, model, images, labels):
        (x, y), draws = self.clean, self.stateful["draws"].generator
        few = torch.randperm(len(y), generator=draws)[: 2 * len(labels)]
        loss, weights = ab.meta.l2rw_loss(model, self.loss, (images, labels), (x[few], y[few]), self.how, return_weights=True)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.weights = lambda: len(weights) * weights


def _l2rw(parameters, config, split, seed):
    optimizer = _momentum_sgd(parameters, config)
    method = _Reweighting(LOSSES[config.loss][0](), optimizer, stateful={"draws": _Draws(seed)})
    method.clean, method.how = data.clean_part(split, config.clean), config.l2rw_method
    return method


METHODS = {
    "sgd": _sgd,
    "absgd": _absgd,
    "reference": _reference,
    "term": _term,
    "eg": _eg,
    "cvar": _cvar,
    "chi2": _chi2,
    "groupdro": _groupdro,
    "l2rw": _l2rw,
    "proportion": _proportion,
    "resample": _resample,
    "hard-mining": _hard_mining,
    "random": _random,
}
# which options beside the common ones speak to whom
OF_LAM = ("absgd", "reference", "term", "eg")
IN_STAGES = (*OF_LAM, "cvar", "chi2", "groupdro")
