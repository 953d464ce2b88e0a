"""The training methods that `absgd-fast train --methods` compares. METHODS has a function for each name; it builds a Method.

sgd, absgd, reference                      plain momentum SGD, ABSGD, the reference package
ramp, targetess                            other choices of λ: it moves to its end (ab.Ramp), or follows the batch (ab.TargetESS)
term, eg, cvar, chi2, groupdro             other weightings (absgd_fast.weights)
l2rw                                       weights from a clean batch (absgd_fast.meta)
proportion, resample, hard-mining, random  the methods that the L2RW paper compares with (Sec. 4.1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

import absgd_fast as ab

from . import data

if TYPE_CHECKING:
    from .train import Config

MOMENTUM = 0.9  # the reference package has no other, so all methods use it

# name: (our fused loss, torch's counterpart)
LOSSES = {"ce": (ab.CrossEntropy, nn.CrossEntropyLoss)}

Weighting = Callable[..., Tensor]  # losses, and groups if it has such an argument → weights of mean 1


class Stateful(Protocol):
    """Whatever has a state that a checkpoint must hold."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        ...

    def load_state_dict(self, state: Any, /) -> object:
        """Puts back what state_dict() gave."""
        ...


@dataclass
class Method:
    """One way of training, as the loop in train.py uses it.

    Args:
        loss: loss(logits, labels) → the loss of a batch.
        optimizer: a torch optimizer for all parameters of the model.
        after_epoch: called after each epoch.
        weights: weights() → the (B,) weights of the batch just trained on, 1 on average; None = all are 1.
        stateful: by name, everything beside the optimizer whose state a checkpoint must hold.

    Attributes:
        logits: the logits of the batch just trained on, before the step; None for a method that does not show them.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    after_epoch: Callable[[], None] = lambda: None
    weights: Callable[[], Tensor | None] = lambda: None
    stateful: dict[str, Stateful] = field(default_factory=dict)
    logits: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.stateful = {"optimizer": self.optimizer} | self.stateful

    def choose(self, batch: Tensor) -> Tensor:
        """The indices of the samples to train on when it is the turn of those in `batch`."""
        return batch

    def step(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Forward, backward and the optimizer's step."""
        logits = model(images)
        loss = self.loss(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.logits = logits.detach()

    def state_dict(self) -> dict[str, Any]:
        """The state of each part of `stateful`, by name."""
        return {name: part.state_dict() for name, part in self.stateful.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what state_dict() gave."""
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])


Parameters = Iterable[nn.Parameter]
Make = Callable[[Parameters, "Config", data.Split, int], Method]  # builds a method from (parameters, config, split, seed)


def momentum_sgd(parameters: Parameters, config: Config) -> ab.ABSGD:
    """The optimizer of all methods whose time is not that of torch's."""
    return ab.ABSGD(parameters, config.lr, MOMENTUM, weight_decay=config.weight_decay)


def scheduled(
    parameters: Parameters, config: Config, loss: ab.ABLoss, schedule: ab.TwoStage | ab.Ramp, name: str = "schedule"
) -> Method:
    """The method of a loss whose λ a schedule moves after each epoch. name: of the schedule in a checkpoint."""
    optimizer = momentum_sgd(parameters, config)
    return Method(loss, optimizer, schedule.step, lambda: loss.last.weights, {"loss": loss, name: schedule})


def _sgd(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    # fused=True is torch's fastest step: the cost of ABSGD is measured against that
    optimizer = torch.optim.SGD(parameters, config.lr, MOMENTUM, weight_decay=config.weight_decay, fused=True)
    return Method(LOSSES[config.loss][1](), optimizer)


def _absgd(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    return _two_stages(parameters, config, config.lam, gamma=config.gamma)


def _two_stages(parameters: Parameters, config: Config, lam: float | ab.TargetESS, **options: Any) -> Method:
    loss = ab.ABLoss(LOSSES[config.loss][0](), lam=lam, mix=config.mix, **options)
    return scheduled(parameters, config, loss, ab.TwoStage(loss, lam, start=config.switch), "stages")


def _ramp(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    if config.switch == 0:  # λ = lam from the start, as in two stages
        return _absgd(parameters, config, split, seed)
    loss = ab.ABLoss(LOSSES[config.loss][0](), lam=config.lam, mix=config.mix, gamma=config.gamma)
    return scheduled(parameters, config, loss, ab.Ramp(loss, config.lam, length=config.switch, unit="epoch"), "ramp")


def _targetess(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    return _two_stages(parameters, config, ab.TargetESS(config.share, config.sign))


def _reference(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    from absgd.losses import ABLoss
    from absgd.optimizers import ABSGD

    class Kept(nn.Module):
        """Keeps the per-sample losses for weights(), because the package does not show its weights."""

        last: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.criterion = LOSSES[config.loss][1](reduction="none")

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

    criterion = Kept()
    # updateLambda counts its calls from 0 and switches λ on at call number milestone − 1. One call comes before the first epoch
    # and one after each epoch, so λ starts in the same epoch as in _absgd.
    loss = ABLoss(config.lam, milestone=config.switch + 1, criterion=criterion, abgamma=config.gamma)
    loss.updateLambda()

    def weights() -> Tensor | None:
        return None if loss.ablambda is None else torch.exp(criterion.last.detach() / loss.ablambda) / loss.u.detach()

    optimizer = ABSGD(parameters, config.lr, weight_decay=config.weight_decay)
    return Method(loss, optimizer, loss.updateLambda, weights, {"loss": State()})


def _term(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    """TERM with t = 1/λ is ABLoss with the normaliser of each batch (MATH §4.1)."""
    return _two_stages(parameters, config, config.lam, normalizer="batch")


def _eg(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    """Exponentiated gradient is TERM with λ < 0 (MATH §4.1)."""
    return _two_stages(parameters, config, -abs(config.lam), normalizer="batch")


class _FromEpoch:
    """The plain mean before epoch `start`, a weighting from then on: the two stages of a method without λ."""

    def __init__(self, config: Config, weighting: Weighting, start: int, grouped: bool = False) -> None:
        criterion = LOSSES[config.loss][0]()
        self.plain = ab.ABLoss(criterion, lam=inf)
        self.robust = ab.ABLoss(criterion, rule=weighting, mix=config.mix)
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


def _by_weighting(
    parameters: Parameters, config: Config, weighting: Weighting, start: int = 0, grouped: bool = False, **stateful: Stateful
) -> Method:
    loss, optimizer = _FromEpoch(config, weighting, start, grouped), momentum_sgd(parameters, config)
    return Method(loss, optimizer, loss.step, lambda: loss.used.last.weights, stateful | {"loss": loss})


def _cvar(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    return _by_weighting(parameters, config, partial(ab.weights.cvar, beta=config.beta, reg=config.reg), config.switch)


def _chi2(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    return _by_weighting(parameters, config, partial(ab.weights.chi2, rho=config.chi2_rho), config.switch)


def _groupdro(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    weighting = ab.weights.GroupDRO(int(split.y.max()) + 1, config.eta)
    return _by_weighting(parameters, config, weighting, config.switch, grouped=True)


def _hard_mining(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    return _by_weighting(parameters, config, hardest, grouped=True)


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


class _Draws:
    """The random numbers of one method. After --resume the stream goes on where it stopped."""

    def __init__(self, seed: int) -> None:
        self.generator = data.generator(seed, data.METHOD)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])


def _random(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    """Rectified Gaussian weights (L2RW paper, Eq. 16)."""
    draws = _Draws(seed)

    def weighting(losses: Tensor) -> Tensor:
        w = torch.randn(len(losses), generator=draws.generator, dtype=torch.float32, device="cpu").clamp(min=0)
        return len(losses) * w / w.sum().clamp(min=1e-12)

    return _by_weighting(parameters, config, weighting, draws=draws)


def _proportion(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    """The weight of a sample is inversely proportional to the size of its class."""
    counts = torch.bincount(split.y)
    weight = len(split.y) / (counts.clamp(min=1) * (counts > 0).sum()).float()
    plain = ab.ABLoss(LOSSES[config.loss][0](), lam=inf)
    last = torch.empty(0, dtype=torch.float32, device="cpu")

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal last
        last = weight[labels]
        return plain(logits, labels, sample_weight=last)

    return Method(loss, momentum_sgd(parameters, config), weights=lambda: last)


class _Resampling(Method):
    """Draws every sample of a batch by first drawing a class, all equally likely, and then one of its training samples."""

    chances: Tensor  # (N,) proportional to the probability of each training sample
    draws: _Draws

    def choose(self, batch: Tensor) -> Tensor:
        return torch.multinomial(self.chances, len(batch), replacement=True, generator=self.draws.generator)


def _resample(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    optimizer = momentum_sgd(parameters, config)
    loss = ab.ABLoss(LOSSES[config.loss][0](), lam=inf)
    draws = _Draws(seed)
    method = _Resampling(loss, optimizer, stateful={"draws": draws})
    method.draws, method.chances = draws, 1 / torch.bincount(split.y)[split.y].double()
    return method


class _Reweighting(Method):
    """L2RW. Each step uses all clean samples, but at most twice as many as it trains on, drawn at random.

    With fewer clean samples the weights are noisier. On digits with 40 % of the labels wrong, the MLP reached 85 to 90 % with all
    100 clean samples and 47 to 85 % with 32 (three seeds).
    """

    clean: tuple[Tensor, Tensor]  # images, right labels
    how: str  # the method argument of ab.meta.l2rw_loss
    draws: _Draws

    def step(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        x, y = self.clean
        few = torch.randperm(len(y), generator=self.draws.generator, device="cpu")[: 2 * len(labels)]
        loss, weights = ab.meta.l2rw_loss(model, self.loss, (images, labels), (x[few], y[few]), self.how, return_weights=True)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.weights = lambda: len(weights) * weights


def _l2rw(parameters: Parameters, config: Config, split: data.Split, seed: int) -> Method:
    optimizer = momentum_sgd(parameters, config)
    draws = _Draws(seed)
    method = _Reweighting(LOSSES[config.loss][0](), optimizer, stateful={"draws": draws})
    method.draws, method.clean, method.how = draws, data.clean_part(split, config.clean), config.l2rw_method
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
