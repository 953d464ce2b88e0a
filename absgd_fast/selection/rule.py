"""The rule of select: which candidate is stopped early, and which one is chosen.

A candidate is a curve: a score after each epoch and, if `train` yields predictions, which held-out samples were right. All
comparisons are of the mean over the last epochs, and of one candidate with another on the same samples. So neither the noise of
one epoch nor the difficulty of the held-out part counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# The parts of the budget after which candidates are compared and may be stopped. Learning rates are often cut by ten after 60 %.
# Before that, TargetESS was 10 to 16 points behind on a long tail where it ended level.
RUNGS = (0.7, 0.85)
WINDOW = 0.1  # the part of the budget whose last epochs are averaged
SPREAD = 3  # the spread from epoch to epoch is that of at least so many epochs
STOPPED = 2.0  # so many standard errors (with the swings from epoch to epoch) behind the leader is hopeless
# The lead over the first candidate, the plain mean, must exceed so many standard errors. This is no test of significance: of
# four candidates that are equally good, another than the first one is chosen about every second time. That costs nothing then.
CHOSEN = 0.5
FELL = 4.0  # so many standard errors below its own contest a training on all samples has collapsed; by chance 1 in 30,000 is


@dataclass
class Curve:
    """The scores of one candidate so far; right[e] is a vector of bools if predictions were yielded."""

    scores: list[float] = field(default_factory=list)
    right: list[Tensor] = field(default_factory=list)


class Judge:
    """Compares curves.

    Args:
        budget: the number of epochs of a candidate.
        groups: (n) the class of each held-out sample for balanced accuracy; None: accuracy.
    """

    def __init__(self, budget: int, groups: Tensor | None = None) -> None:
        self.budget = budget
        self.window = max(1, round(WINDOW * budget))
        self.member = None
        if groups is not None:
            self.member = torch.nn.functional.one_hot(groups.unique(return_inverse=True)[1]).double()  # (n, classes)

    def score(self, right: Tensor) -> float:
        """Accuracy of one epoch, or balanced accuracy: the mean recall of the classes. right: (n)."""
        return float(self._mean(right.double()))

    def _mean(self, values: Tensor) -> Tensor:
        if self.member is None:
            return values.mean()
        return (values @ self.member / self.member.sum(0)).mean()

    def level(self, curve: Curve, end: int) -> float:
        """The mean score of the last epochs before `end`."""
        from statistics import fmean  # here and below, because it takes 1.5 of the 47 ms of `import absgd_fast`

        return fmean(curve.scores[max(0, end - self.window) : end])

    def lead(self, one: Curve, other: Curve, end: int) -> tuple[float, float]:
        """How far one curve is ahead of another before epoch `end`, and the standard error of that.

        With predictions the difference is taken sample by sample, and the error is that of another draw of the held-out samples.
        Without them it is the spread of the scores from epoch to epoch, which is all that can be seen; NaN after one epoch alone.
        Neither contains what another seed of the training would change.
        """
        lead = self.level(one, end) - self.level(other, end)
        first = max(0, end - self.window)
        if one.right and other.right:
            differences = _average(one.right[first:end]) - _average(other.right[first:end])
            return lead, self._error(differences)
        return lead, math.hypot(*(_spread(c.scores[:end], self.window) for c in (one, other)))

    def _error(self, differences: Tensor) -> float:
        """The standard error of the mean of per-sample differences (n)."""
        n = len(differences)
        if n < 2:
            return math.inf
        if self.member is None:
            return float(differences.std()) / math.sqrt(n)
        counts = self.member.sum(0)
        # The spread if both are equally good, around 0. Around the mean of its class a single sample would have none. A class
        # with few samples gets two samples' worth of the spread of all.
        squares = differences.square()
        spread = (squares @ self.member + 2 * squares.mean()) / (counts + 2)
        return float((spread / counts).sum().sqrt()) / len(counts)

    def leader(self, curves: Sequence[Curve], end: int) -> Curve:
        """The curve with the best level before epoch `end`; the first of several."""
        return max(curves, key=lambda curve: self.level(curve, end))

    def behind(self, curves: Sequence[Curve], end: int) -> list[tuple[float, float]]:
        """How far each curve is behind the leading one before epoch `end`, as `lead` says it."""
        leader = self.leader(curves, end)
        return [self.lead(leader, curve, end) for curve in curves]

    def hopeless(self, curves: Sequence[Curve], end: int) -> list[int]:
        """The curves that are clearly behind the leading one before epoch `end`: by more than chance and swings together."""
        leader = self.leader(curves, end)
        found = []
        for i, (lead, error) in enumerate(self.behind(curves, end)):
            if lead > STOPPED * math.hypot(error, self._swing(leader, curves[i], end)) and lead > 0:
                found.append(i)
        return found

    def _swing(self, one: Curve, other: Curve, end: int) -> float:
        """The standard deviation of the lead from epoch to epoch, which is large while a learning rate is."""
        swing = _spread([a - b for a, b in zip(one.scores[:end], other.scores[:end])], self.window)
        return 0.0 if math.isnan(swing) and one.right and other.right else swing

    def choose(self, curves: Sequence[Curve], plain: Curve | None) -> int:
        """The curve with the best last epochs; but `plain`, if the best one's lead over it is at most CHOSEN standard errors."""
        best = self.leader(curves, self.budget)
        if plain is not None and best is not plain:
            lead, error = self.lead(best, plain, self.budget)
            if lead <= CHOSEN * error:
                best = plain
        return next(i for i, curve in enumerate(curves) if curve is best)

    def fell(self, again: Curve, before: Curve) -> tuple[float, float] | None:
        """(level before, level of a second training) if that is clearly below the first one's; None if it is not.

        It is meant for a second training on more samples, the held-out ones among them, which should score higher.
        Scores do not compare with predictions: `absgd-fast tune` ends with scores of the test set.
        """
        if bool(again.right) != bool(before.right):
            return None
        lead, error = self.lead(before, again, self.budget)
        if lead > FELL * math.hypot(error, self._swing(before, again, self.budget)):
            return self.level(before, self.budget), self.level(again, self.budget)
        return None


def _spread(values: Sequence[float], window: int) -> float:
    """The standard deviation of the last values; NaN, with which no comparison is true, if there is one value alone."""
    from statistics import stdev

    last = values[-max(window, SPREAD) :]
    return stdev(last) if len(last) > 1 else math.nan


def _average(right: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(right)).double().mean(0)


def rungs_of(budget: int, ramp: float) -> list[int]:
    """The epochs after which candidates are compared: those of RUNGS that come clearly after a ramp, and before the end."""
    parts = [part for part in RUNGS if part - ramp > 0.14]
    return sorted({round(part * budget) for part in parts if 1 <= round(part * budget) < budget})
