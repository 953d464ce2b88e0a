"""Scheduled: a module that schedules drive, whose state_dict has their counts."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn

from ._exact import ExactState


class Counted(Protocol):
    """What a module must know of a schedule that drives it."""

    COUNT: ClassVar[str]  # the name of its count, one of `Scheduled.COUNTS`

    def continue_at(self, count: int) -> None:
        """Continue at a saved count."""


# Who drives a module. It stands here and not in the module, so that copies and pickles of a module do not contain its schedules.
_schedules: WeakKeyDictionary[nn.Module, WeakSet[Counted]] = WeakKeyDictionary()


def schedules_of(module: nn.Module) -> list[Counted]:
    """The schedules that drive a module."""
    return list(_schedules.get(module, ()))


class Scheduled(ExactState):
    """A module that schedules drive. A checkpoint of it resumes them too.

    Each schedule writes its count into an attribute of the module, which the state_dict has under the same name. Loading a count
    continues the schedules that drive the module then. Without a schedule the count stays until the next state_dict. A state_dict
    without counts leaves the schedules as they are.
    """

    COUNTS: ClassVar[tuple[str, ...]] = ()  # the names of the counts; None: no schedule has driven the module
    NUMBERS: ClassVar[tuple[str, ...]] = ()  # the names of other numbers that schedules need, floats or None, saved as the counts

    def driven_by(self, schedule: Counted) -> None:
        """Tell this schedule from now on when a count is loaded. The module does not keep the schedule alive."""
        _schedules.setdefault(self, WeakSet()).add(schedule)

    def _after_load(self) -> None:
        """What the module does after its tensors were loaded and before its schedules continue."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for names, dtype in ((self.COUNTS, torch.int64), (self.NUMBERS, torch.float64)):
            for name in names:
                if getattr(self, name) is not None:
                    destination[prefix + name] = torch.tensor(getattr(self, name), dtype=dtype, device="cpu")

    def resumed_by(self, state_dict: dict[str, Any], prefix: str) -> list[Counted]:
        """The schedules that will continue when this state_dict is loaded."""
        return [schedule for schedule in schedules_of(self) if prefix + schedule.COUNT in state_dict]

    def _load_what_hooks_left(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        schedules = self.resumed_by(state_dict, prefix)
        counts = {name: int(state_dict.pop(prefix + name)) for name in self.COUNTS if prefix + name in state_dict}
        numbers = {name: float(state_dict.pop(prefix + name)) for name in self.NUMBERS if prefix + name in state_dict}
        super()._load_what_hooks_left(state_dict, prefix, *args)
        self._after_load()
        for name, value in (counts | numbers).items():
            setattr(self, name, value)
        for schedule in schedules:
            schedule.continue_at(counts[schedule.COUNT])
