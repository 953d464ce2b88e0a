"""What select chooses among: a lambda and the way it is reached, under a name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import _checks, _numbers
from ..robust import ABLoss, RelativeLam, TargetESS
from ..schedule import Ramp, TwoStage

RAMP = 0.3  # the part of a training in which 1/lambda grows; shorter ramps collapse more often, longer ones leave less time


@dataclass(frozen=True)
class Candidate:
    """One way to set lambda: a value, and the part of the training over which 1/lambda grows to it.

    Args:
        name: how tables and reports call it. Two candidates of one selection must have different names.
        lam: lambda, as for `ABLoss`; infinity is the plain mean. A number of any kind, 0-d tensors too, is kept as a float.
        ramp: the part of the training, from 0 to 1, after which `lam` is reached (`Ramp`); 0: `lam` from the first step on.

    Raises:
        TypeError: lam is no number, or ramp is given together with a `TargetESS`.
        ValueError: the name is empty, lam is 0, NaN or a tensor on the meta device, or ramp lies outside [0, 1].

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
        ramp = _checks.finite(self.ramp, "ramp")
        if not 0 <= ramp <= 1:
            raise ValueError(f"ramp: got {self.ramp!r}, expected the part of the training, a number from 0 to 1")
        object.__setattr__(self, "ramp", ramp)
        if isinstance(self.lam, TargetESS):
            if self.ramp:
                raise TypeError(f"ramp: got {self.ramp!r} together with a TargetESS, which has no ramp; leave ramp out")
        elif not isinstance(self.lam, RelativeLam):
            object.__setattr__(self, "lam", _number(self.lam))

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

    def code(self, length: int, *, unit: str = "epoch", loss: Callable[..., Any] = ABLoss, **options: Any) -> str:
        """The lines of code that stand for `build(None, length, unit=unit, loss=loss, **options)`.

        Args:
            length, unit, loss, **options: as for `build`. Options that are at the default of `ABLoss` are left out.

        Raises:
            As `build`: code that could not run is not shown.

        >>> print(Candidate.named("-0.5").code(40, gamma=0.5, mix=0.0))
        criterion = ab.ABLoss(lam=-0.5, gamma=0.5)
        schedule = ab.Ramp(criterion, lam=-0.5, length=12)  # schedule.step() after each epoch
        """
        self.build(None, length, unit=unit, loss=loss, **options)
        # LinearABLoss takes those of all robust losses as **options, with the defaults of ABLoss
        defaults = {name: parameter.default for name, parameter in inspect.signature(ABLoss).parameters.items()}
        changed = {name: value for name, value in options.items() if name not in defaults or value != defaults[name]}
        given = ", ".join(f"{name}={_written(value)}" for name, value in {"lam": self.lam, **changed}.items())
        line = f"criterion = ab.{getattr(loss, '__name__', 'ABLoss')}({given})"
        if isinstance(self.lam, float) and math.isinf(self.lam):
            same = ", as torch.nn.CrossEntropyLoss()" if loss is ABLoss and not changed else ""
            return f"{line}  # the plain mean{same}"
        if not self.ramp:
            return line
        length = max(1, round(self.ramp * length))
        more = "" if unit == "epoch" else f", unit={unit!r}"
        ramp = f"schedule = ab.Ramp(criterion, lam={_written(self.lam)}, length={length}{more})"
        return f"{line}\n{ramp}  # schedule.step() after each {unit}"

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


def _number(lam: float | Tensor) -> float:
    """A lambda as Python's own float, which a report can print and a record can compare."""
    _checks.lam(lam)
    if isinstance(lam, Tensor) and not _checks.has_values(lam):
        raise ValueError("lam: got a tensor without a value (on the meta device, or of FakeTensorMode), expected a number")
    return float(_checks.lam(float(lam)))  # again, because the value of a tensor on a GPU was not looked at


def _written(value: object) -> str:
    """A lambda or the value of an option as Python code."""
    if isinstance(value, (RelativeLam, TargetESS)):
        return f"ab.{value!r}"
    value = _numbers.plain(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value)
    return f'float("{value}")' if isinstance(value, float) and not math.isfinite(value) else repr(value)


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


def is_strongest(chosen: Any, among: Iterable[Any]) -> bool:
    """Whether none of the candidates weighs more strongly than the chosen one, in its direction.

    It is False for the plain mean, and for what is no `Candidate`.

    >>> candidates = default_candidates()
    >>> [candidate.name for candidate in candidates if is_strongest(candidate, candidates)]
    ['-0.5']
    """
    direction, strength = _strength(chosen)
    return strength > 0 and all(other <= strength for way, other in map(_strength, among) if way == direction)


def _strength(candidate: Any) -> tuple[object, float]:
    """(with which candidates it compares, a number that grows with the strength of the weights); 0: it does not weigh."""
    lam = candidate.lam if isinstance(candidate, Candidate) else math.inf
    if isinstance(lam, TargetESS):
        return (TargetESS, lam.sign), 1 - lam.share
    number = lam.r if isinstance(lam, RelativeLam) else lam
    return (type(lam), math.copysign(1, number)), 1 / abs(number)


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
