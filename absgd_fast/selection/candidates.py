"""What select chooses among: a lambda and the way it is reached, under a name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _checks
from ..robust import ABLoss, RelativeLam, TargetESS
from ..schedule import Ramp, TwoStage

RAMP = 0.3  # the part of a training in which 1/lambda grows; shorter ramps collapse more often, longer ones leave less time


@dataclass(frozen=True)
class Candidate:
    """One way to set lambda: a value, and the part of the training over which 1/lambda grows to it.

    Args:
        name: how tables and reports call it. Two candidates of one selection must have different names.
        lam: lambda, as for `ABLoss`; infinity is the plain mean.
        ramp: the part of the training, from 0 to 1, after which `lam` is reached (`Ramp`); 0: `lam` from the first step on.

    Raises:
        TypeError: lam is no number, or ramp is given together with a `TargetESS`.
        ValueError: the name is empty, lam is 0 or NaN, or ramp lies outside [0, 1].

    >>> candidate = Candidate("gentle", -2.0, ramp=0.3)
    >>> criterion, schedule = candidate.build(None, 10)
    >>> for _ in range(3):
    ...     schedule.step()
    >>> criterion.lam
    tensor(-2.)
    """

    name: str
    lam: float | RelativeLam | TargetESS
    ramp: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"name: got {self.name!r}, expected a text that is not empty")
        if not 0 <= _checks.finite(self.ramp, "ramp") <= 1:
            raise ValueError(f"ramp: got {self.ramp!r}, expected the part of the training, a number from 0 to 1")
        if isinstance(self.lam, TargetESS):
            if self.ramp:
                raise TypeError(f"ramp: got {self.ramp!r} together with a TargetESS, which has no ramp; leave ramp out")
        elif not isinstance(self.lam, RelativeLam):
            _checks.lam(self.lam)

    @classmethod
    def named(cls, text: str) -> Candidate:
        """The candidate that a short text stands for.

        Args:
            text: "inf" for the plain mean, a number for a ramp to this lambda over the first 30 % of the training, "ess0.7" for
                `TargetESS(0.7)`.

        Raises:
            ValueError: the text is none of these.

        >>> Candidate.named("-0.5")
        Candidate(name='-0.5', lam=-0.5, ramp=0.3)
        """
        text = text.strip()
        try:
            if text.startswith("ess"):
                return cls(text, TargetESS(float(text.removeprefix("ess"))))
            lam = float(text)
            return cls(text, lam, 0.0 if math.isinf(lam) else RAMP)
        except ValueError as error:
            raise ValueError(
                f"candidates: got {text!r} ({error}); expected inf (the plain mean), a lambda other than 0 such as -0.5, or ess"
                " and a share in (0, 1) such as ess0.7"
            ) from error

    def code(self, length: int) -> str:
        """The lines of code that stand for `build(None, length)`.

        >>> print(Candidate.named("-0.5").code(40))
        criterion = ab.ABLoss(lam=-0.5)
        schedule = ab.Ramp(criterion, lam=-0.5, length=12)  # schedule.step() after each epoch
        """
        lam = repr(self.lam) if isinstance(self.lam, float) else f"ab.{self.lam!r}"
        if isinstance(self.lam, float) and math.isinf(self.lam):
            return 'criterion = ab.ABLoss(lam=float("inf"))  # the plain mean, as torch.nn.CrossEntropyLoss()'
        lines = [f"criterion = ab.ABLoss(lam={lam})"]
        if self.ramp:
            length = max(1, round(self.ramp * length))
            lines.append(f"schedule = ab.Ramp(criterion, lam={lam}, length={length})  # schedule.step() after each epoch")
        return "\n".join(lines)

    def build(
        self,
        criterion: Callable[..., Any] | None,
        length: int,
        *,
        unit: str = "epoch",
        loss: Callable[..., Any] = ABLoss,
        **options: Any,
    ) -> tuple[Any, Ramp | TwoStage]:
        """A new criterion, and the schedule that moves its lambda.

        Args:
            criterion: the per-sample loss, as for `ABLoss`; None: cross-entropy.
            length: the number of calls of `schedule.step()` in the whole training, for example of epochs.
            unit: whether you call step() once per "epoch" or once per "step".
            loss: the class of the criterion, `ABLoss` or `LinearABLoss`.
            **options: more arguments of that class, such as gamma.

        Returns:
            (criterion, schedule). Both have a state_dict.

        Raises:
            ValueError: length is no integer of at least 1, or unit is unknown.
        """
        length = _checks.at_least(length, "length", 1)
        given = () if criterion is None else (criterion,)
        made = loss(*given, lam=math.inf if self.ramp else self.lam, **options)
        if self.ramp and not isinstance(self.lam, TargetESS):
            return made, Ramp(made, self.lam, max(1, round(self.ramp * length)), unit)
        return made, TwoStage(made, self.lam, 0, unit)


DEFAULTS = {"accuracy": ("inf", "-2", "-1", "-0.5"), "balanced": ("inf", "ess0.95", "ess0.9", "ess0.7")}


def default_candidates(goal: str = "accuracy") -> list[Candidate]:
    """The candidates that select tries if none are given. The plain mean is the first one.

    Args:
        goal: "accuracy" (wrong labels): infinity, and ramps to -2, -1 and -0.5. "balanced" (rare classes): infinity, and
            `TargetESS` of 0.95, 0.9 and 0.7. (0.5 is left out: it cost up to 6 points where nothing was wrong.)

    Raises:
        ValueError: another goal.

    >>> [candidate.name for candidate in default_candidates("balanced")]
    ['inf', 'ess0.95', 'ess0.9', 'ess0.7']
    """
    return [Candidate.named(text) for text in DEFAULTS[_checks.choice(goal, "goal", tuple(DEFAULTS))]]


def name_of(candidate: Any) -> str:
    """How tables call a candidate: the name of a `Candidate`, a text itself, and the repr of any other object."""
    if isinstance(candidate, Candidate):
        return candidate.name
    return candidate if isinstance(candidate, str) else repr(candidate)


def listed(candidates: Any) -> list[Any]:
    """The candidates that somebody gave.

    Raises:
        TypeError: it is no list. A text or a dict can be iterated over, but is a mistake.
    """
    if isinstance(candidates, (str, bytes, Mapping)) or not isinstance(candidates, Iterable):
        raise TypeError(f"candidates: got {candidates!r}, expected a list of candidates")
    return list(candidates)


def names_of(candidates: Sequence[Any]) -> list[str]:
    """The name of each candidate.

    Raises:
        ValueError: there are no candidates, or two have the same name.
    """
    names = [name_of(candidate) for candidate in candidates]
    if not names:
        raise ValueError("candidates: got none, expected at least one; None takes the default ones")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"candidates: got {', '.join(twice)} more than once, expected candidates with different names")
    return names
