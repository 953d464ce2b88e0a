"""The training methods that `absgd-fast train --methods` compares. METHODS has a function for each name; it builds a Method.

sgd, absgd, reference                      plain momentum SGD, ABSGD, the reference package
ramp, targetess                            other choices of λ: it moves to its end (ab.Ramp), or follows the batch (ab.TargetESS)
term, eg, cvar, chi2, groupdro             other weightings (absgd_fast.weights)
l2rw                                       weights from a clean batch (absgd_fast.meta)
proportion, resample, hard-mining, random  the methods that the L2RW paper compares with (Sec. 4.1)

EXTRAS has what is added to a method: sam, mixup, balanced sampling, and the classifier stages tau, crt and lws.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

import absgd_fast as ab

from . import data
from .method import Method, Setup, Stateful
from .sam import SAM

Weighting = Callable[..., Tensor]  # losses, and groups if it has such an argument → weights of mean 1


Make = Callable[[Setup], Method]  # builds a method


def scheduled(setup: Setup, loss: ab.ABLoss, schedule: ab.TwoStage | ab.Ramp, name: str = "schedule") -> Method:
    """The method of a loss whose λ a schedule moves after each epoch. name: of the schedule in a checkpoint."""
    return Method(setup, loss, setup.sgd(), lambda: loss.last.weights, {name: schedule}, {"loss": loss})


def _sgd(setup: Setup) -> Method:
    # torch's own loss where it has one, and fused=True, its fastest step: the cost of ABSGD is measured against them. The other
    # losses are the mean over the batch of the loss per sample, which is ABSGD's at λ = ∞.
    plain: nn.Module = nn.CrossEntropyLoss() if setup.config.loss == "ce" and setup.mixup is None else _plain(setup)
    return Method(setup, plain, setup.sgd(torch.optim.SGD, fused=True))


def _plain(setup: Setup) -> ab.ABLoss:
    return ab.ABLoss(setup.criterion, lam=inf)


def _absgd(setup: Setup) -> Method:
    return _two_stages(setup, setup.config.lam, gamma=setup.config.gamma)


def _two_stages(setup: Setup, lam: float | ab.TargetESS, **options: Any) -> Method:
    loss = ab.ABLoss(setup.criterion, lam=lam, mix=setup.config.mix, **options)
    return scheduled(setup, loss, ab.TwoStage(loss, lam, start=setup.config.switch), "stages")


def _ramp(setup: Setup) -> Method:
    config = setup.config
    if config.switch == 0:  # λ = lam from the start, as in two stages
        return _absgd(setup)
    loss = ab.ABLoss(setup.criterion, lam=config.lam, mix=config.mix, gamma=config.gamma)
    return scheduled(setup, loss, ab.Ramp(loss, config.lam, length=config.switch, unit="epoch"), "ramp")


def _targetess(setup: Setup) -> Method:
    return _two_stages(setup, ab.TargetESS(setup.config.share, setup.config.sign))


def _reference(setup: Setup) -> Method:
    from absgd.losses import ABLoss
    from absgd.optimizers import ABSGD

    config = setup.config

    class Kept(nn.Module):
        """Keeps the per-sample losses for weights(), because the package does not show its weights."""

        last: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.CrossEntropyLoss(reduction="none") if config.loss == "ce" else setup.criterion

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            self.last = self.criterion(logits, labels)
            return self.last

    class State:
        """The state of the package's loss, which is in plain attributes: its own state_dict() is empty.

        `u` holds the autograd graph of every step so far. No backward walks that graph, so the numbers are the same without it.
        """

        def state_dict(self) -> dict[str, Any]:
            u = loss.u.detach() if isinstance(loss.u, torch.Tensor) else loss.u
            return {"u": u, "ablambda": loss.ablambda, "step": loss.step}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            for name, value in state.items():
                setattr(loss, name, value)

        def step(self) -> None:
            loss.updateLambda()

    criterion = Kept()
    # updateLambda counts its calls from 0 and switches λ on at call number milestone − 1. One call comes before the first epoch
    # and one after each epoch, so λ starts in the same epoch as in _absgd.
    loss = ABLoss(config.lam, milestone=config.switch + 1, criterion=criterion, abgamma=config.gamma)
    loss.updateLambda()

    def weights() -> Tensor | None:
        return None if loss.ablambda is None else torch.exp(criterion.last.detach() / loss.ablambda) / loss.u.detach()

    # the package's optimizer has momentum 0.9 and no other
    optimizer = ABSGD(setup.parameters, config.lr, weight_decay=config.weight_decay)
    return Method(setup, loss, optimizer, weights, {"loss": State()})


def _term(setup: Setup) -> Method:
    """TERM with t = 1/λ is ABLoss with the normaliser of each batch (MATH §4.1)."""
    return _two_stages(setup, setup.config.lam, normalizer="batch")


def _eg(setup: Setup) -> Method:
    """Exponentiated gradient is TERM with λ < 0 (MATH §4.1)."""
    return _two_stages(setup, -abs(setup.config.lam), normalizer="batch")


class _FromEpoch:
    """The plain mean before epoch `start`, a weighting from then on: the two stages of a method without λ."""

    def __init__(self, setup: Setup, weighting: Weighting, start: int, grouped: bool = False) -> None:
        self.plain = _plain(setup)
        self.robust = ab.ABLoss(setup.criterion, rule=weighting, mix=setup.config.mix)
        self.start, self.grouped, self.epoch, self.used = start, grouped, 0, self.plain

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.used = self.robust if self.epoch >= self.start else self.plain
        groups = labels if self.grouped and self.used is self.robust else None
        return self.used(logits, labels, groups=groups)

    def step(self) -> None:
        self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "robust": self.robust.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        self.robust.load_state_dict(state["robust"])


def _by_weighting(setup: Setup, weighting: Weighting, start: int = 0, grouped: bool = False, **stateful: Stateful) -> Method:
    loss = _FromEpoch(setup, weighting, start, grouped)
    return Method(setup, loss, setup.sgd(), lambda: loss.used.last.weights, {"loss": loss}, stateful)


def _cvar(setup: Setup) -> Method:
    config = setup.config
    return _by_weighting(setup, partial(ab.weights.cvar, beta=config.beta, reg=config.reg), config.switch)


def _chi2(setup: Setup) -> Method:
    return _by_weighting(setup, partial(ab.weights.chi2, rho=setup.config.chi2_rho), setup.config.switch)


def _groupdro(setup: Setup) -> Method:
    weighting = ab.weights.GroupDRO(len(setup.counts), setup.config.eta).to(setup.placing.device)
    return _by_weighting(setup, weighting, setup.config.switch, grouped=True)


def _hard_mining(setup: Setup) -> Method:
    return _by_weighting(setup, hardest, grouped=True)


def hardest(losses: Tensor, groups: Tensor) -> Tensor:
    """The weights W of hard mining (L2RW paper, Sec. 4.1).

    Each group keeps as many samples as the smallest group of the batch has, namely those with the largest losses. So the whole
    minority is kept, and the hardest samples of the majority.

    Args:
        losses: (B,) per-sample losses.
        groups: (B,) integers.

    Returns:
        (B,) weights with mean 1; the samples that are not kept have weight 0.

    >>> hardest(torch.tensor([1.0, 3.0, 2.0, 0.0]), torch.tensor([0, 0, 0, 1]))
    tensor([0., 2., 0., 2.])
    """
    members = [torch.nonzero(groups == g).flatten() for g in groups.unique()]
    few = min(map(len, members), default=0)
    kept = torch.cat([samples[losses[samples].topk(few).indices] for samples in members]) if members else groups[:0]
    return torch.zeros_like(losses).index_fill_(0, kept, len(losses) / max(len(kept), 1))


def _random(setup: Setup) -> Method:
    """Rectified Gaussian weights (L2RW paper, Eq. 16)."""

    def weighting(losses: Tensor) -> Tensor:
        w = torch.randn(len(losses), generator=method.draws.generator, dtype=torch.float32, device="cpu").clamp(min=0)
        return (len(losses) * w / w.sum().clamp(min=1e-12)).to(losses.device)

    method = _by_weighting(setup, weighting)
    return method


def _proportion(setup: Setup) -> Method:
    """The weight of a sample is inversely proportional to the size of its class."""
    split, plain = setup.split, _plain(setup)
    counts = torch.bincount(split.y)
    weight = (len(split.y) / (counts.clamp(min=1) * (counts > 0).sum()).float()).to(setup.placing.device)
    last = torch.empty(0, dtype=torch.float32, device="cpu")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal last
        last = weight[labels]
        return plain(logits, labels, sample_weight=last)

    return Method(setup, loss, setup.sgd(), weights=lambda: last)


def _resample(setup: Setup) -> Method:
    method = Method(setup, _plain(setup), setup.sgd())
    _balanced(method)
    return method


class _Reweighting(Method):
    """L2RW. Each step uses all clean samples, but at most twice as many as it trains on, drawn at random.

    With fewer clean samples the weights are noisier. On digits with 40 % of the labels wrong, the MLP reached 85 to 90 % with all
    100 clean samples and 47 to 85 % with 32 (three seeds).
    """

    clean: tuple[Tensor, Tensor]  # images, right labels

    def step(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        x, y = self.clean
        few = torch.randperm(len(y), generator=self.draws.generator, device="cpu")[: 2 * len(labels)]
        clean = self.setup.placing.images(x[few]), y[few].to(labels.device)
        how = self.setup.config.l2rw_method
        loss, weights = ab.meta.l2rw_loss(model, self.loss, (images, labels), clean, how, return_weights=True)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.weights = lambda: len(weights) * weights


def _l2rw(setup: Setup) -> Method:
    method = _Reweighting(setup, setup.criterion, setup.sgd())
    method.clean = data.clean_part(setup.split, setup.config.clean)
    return method


# name: the function that builds the Method
METHODS: dict[str, Make] = {
    "sgd": _sgd,
    "absgd": _absgd,
    "ramp": _ramp,
    "targetess": _targetess,
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
# The methods that have λ = lam, and those that begin with plain training (--warmup).
OF_LAM = ("absgd", "ramp", "reference", "term", "eg")
IN_STAGES = (*OF_LAM, "targetess", "cvar", "chi2", "groupdro")


def build(name: str, setup: Setup) -> Method:
    """The method of this name in METHODS, with the extras of its setup."""
    method = METHODS[name](setup)
    for extra in setup.extras:
        EXTRAS[extra](method)
    return method


# ------------------------------------------------------------------------------------------------ extras


def _balanced(method: Method) -> None:
    """Class-balanced sampling: first a class is drawn, all equally likely, and then one of its training samples."""
    method.balanced = True


def _sam(method: Method) -> None:
    method.sam = SAM(method.optimizer, method.setup.config.sam_rho)


def _nothing(method: Method) -> None:
    """Of the extras that work elsewhere: mixup in Setup, the classifier stages after the training (train.Training)."""


# name: what it does to a Method that was made
EXTRAS: dict[str, Callable[[Method], None]] = {
    "sam": _sam,
    "mixup": _nothing,
    "balanced": _balanced,
    "tau": _nothing,
    "crt": _nothing,
    "lws": _nothing,
}
# extra: {method: why they do not go together}
WITHOUT = {
    "sam": {
        "l2rw": "whose step has three passes of its own",
        "reference": "whose normaliser moves with every forward, so it would move twice a step",
        "random": "whose weights would be others in each of the two passes",
        "groupdro": "whose weights would move twice a step",
    },
    "mixup": {
        "l2rw": "which weighs samples of one label",
        "groupdro": "whose groups are the labels, and a mixed image has two",
        "proportion": "whose weights are those of a label, and a mixed image has two",
        "hard-mining": "whose groups are the labels, and a mixed image has two",
    },
    "balanced": {"resample": "which samples like this already"},
}
