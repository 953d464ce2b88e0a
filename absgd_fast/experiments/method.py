"""What a method of a training is: Setup has what it is made of, Method is what the loop in train.py uses.

methods.py has the methods themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

import absgd_fast as ab

from . import criteria, data
from .criteria import Schedule
from .mixup import Mixup
from .placing import Placing
from .sam import SAM, running_statistics_kept
from .stages import class_balanced

if TYPE_CHECKING:
    from .config import Config


class Stateful(Protocol):
    """Whatever has a state that a checkpoint must hold."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        ...

    def load_state_dict(self, state: Any, /) -> object:
        """Puts back what state_dict() gave."""
        ...


@dataclass
class Setup:
    """What a method is made of. All methods of one seed have the same split, and networks with the same initial weights.

    Args:
        parameters: those of the network.
        config: the settings as this method sees them (spec.Spec.config).
        split: the data to train on.
        classes: their number.
        seed: determines the method's own random numbers.
        extras: names in methods.EXTRAS.
        placing: where the network is.
    """

    parameters: list[nn.Parameter]
    config: Config
    split: data.Split
    classes: int
    seed: int
    extras: tuple[str, ...] = ()
    placing: Placing = field(default_factory=lambda: Placing("cpu"))

    @cached_property
    def counts(self) -> list[int]:
        """The number of training samples with each label."""
        return criteria.class_sizes(self.split.y, self.classes)

    @cached_property
    def _made(self) -> tuple[nn.Module, dict[str, Schedule]]:
        loss, schedules = criteria.make(self.config, self.counts)
        return loss.to(self.placing.device), schedules

    @cached_property
    def mixup(self) -> Mixup | None:
        """The mixing of the images and of their losses, or None."""
        if "mixup" not in self.extras:
            return None
        return Mixup(self._made[0], self.config.mixup_alpha, data.generator(self.seed, data.MIXUP))

    @property
    def criterion(self) -> nn.Module:
        """(logits, labels) → one loss per sample."""
        return self.mixup or self._made[0]

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The schedules of the criterion, by name."""
        return self._made[1]

    def sgd(self, kind: Callable[..., torch.optim.Optimizer] = ab.ABSGD, **options: Any) -> torch.optim.Optimizer:
        """Momentum SGD with the settings of the experiment. All methods whose time is not that of torch's have ABSGD."""
        config = self.config
        return kind(self.parameters, config.lr, config.momentum, weight_decay=config.weight_decay, **options)


@dataclass
class Method:
    """One way of training, as the loop in train.py uses it.

    Args:
        setup: what it is made of.
        loss: loss(logits, labels) → the loss of a batch.
        optimizer: a torch optimizer for all parameters of the model.
        weights: weights() → the (B,) weights of the batch just trained on, 1 on average; None = all are 1.
        schedules: by name, what step() moves after each epoch; a checkpoint holds their states too.
        stateful: by name, everything beside them and the optimizer whose state a checkpoint must hold.

    Attributes:
        logits: the logits of the batch just trained on, before the step; None for a method that does not show them.
        balanced: whether an epoch draws its samples by stages.class_balanced; otherwise each comes once.
    """

    setup: Setup
    loss: Callable[..., Tensor]
    optimizer: torch.optim.Optimizer
    weights: Callable[[], Tensor | None] = lambda: None
    schedules: dict[str, Schedule] = field(default_factory=dict)
    stateful: dict[str, Stateful] = field(default_factory=dict)
    logits: Tensor | None = field(default=None, init=False)
    balanced: bool = field(default=False, init=False)
    sam: SAM | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.schedules = self.setup.schedules | self.schedules
        self.draws = Draws(self.setup.seed)
        self.scaler = self.setup.placing.scaler()
        own: dict[str, Stateful] = {"optimizer": self.optimizer, "draws": self.draws}
        if self.setup.mixup is not None:
            own["mixup"] = self.setup.mixup
        if self.scaler is not None:
            own["scaler"] = self.scaler
        self.stateful = own | self.schedules | self.stateful

    @property
    def robust(self) -> ab.ABLoss | None:
        """The loss with a λ and a normaliser, or None."""
        return self.loss if isinstance(self.loss, ab.ABLoss) else None

    def choose(self, order: Tensor) -> Tensor:
        """The indices of the samples to train on in an epoch. order: (N,) a permutation of all of them."""
        return class_balanced(self.setup.split.y, len(order), self.draws.generator) if self.balanced else order

    def step(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Forward, backward and the optimizer's step."""
        mixup, sam = self.setup.mixup, self.sam
        if mixup is not None:
            images = mixup.mix(images)
        if sam is None:
            self.optimizer.zero_grad()
            self.logits = self._backward(model, images, labels)
            self._update()
        else:
            sam.step(lambda first: self._pass_of_sam(model, images, labels, first), self._update)
        if mixup is not None:
            self.logits = None  # those of mixed images, which have no label

    def _backward(self, model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        """Forward and backward; returns the logits."""
        with self.setup.placing.autocast():
            logits = model(images)
            loss = self.loss(logits, labels, **options)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return logits.detach()

    def _pass_of_sam(self, model: nn.Module, images: Tensor, labels: Tensor, first: bool) -> None:
        options = {} if self.robust is None else {"update": not first}  # the second pass moves log s, see SAM
        with running_statistics_kept(model, not first):
            logits = self._backward(model, images, labels, **options)
        if first:
            self.logits = logits

    def _update(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def after_epoch(self) -> None:
        """Moves the schedules."""
        for schedule in self.schedules.values():
            schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """The state of each part of `stateful`, by name."""
        return {name: part.state_dict() for name, part in self.stateful.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what state_dict() gave."""
        for name, part in self.stateful.items():
            part.load_state_dict(state[name])


class Draws:
    """The random numbers of one method. After --resume the stream goes on where it stopped."""

    def __init__(self, seed: int) -> None:
        self.generator = data.generator(seed, data.METHOD)

    def state_dict(self) -> dict[str, Any]:
        """The state of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what state_dict() gave."""
        self.generator.set_state(state["generator"])
