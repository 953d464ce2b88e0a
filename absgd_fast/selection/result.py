"""What select returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


class Table(list[dict[str, Any]]):
    """One dict per candidate, shown as a table.

    >>> Table([{"candidate": "inf", "score": 0.5}, {"candidate": "-2", "score": None}])
    candidate  score
    inf        0.5000
    -2
    """

    def __repr__(self) -> str:
        if not self:
            return "(no rows)"
        lines = [list(self[0])] + [[_shown(value) for value in row.values()] for row in self]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, repr=False)
class Selection:
    """The result of `select`.

    Attributes:
        best: the chosen candidate, as it was given.
        name: its name.
        result: what the last training returned (the value of `return` in the generator), for example the model; None if nothing
            was returned or, with refit=False, if the chosen candidate was trained by an earlier process.
        table: a dict per candidate: candidate, score (the mean of its last epochs), behind (how far it was behind the best score
            when it was compared last), error (the standard error of that), epochs (that it was trained), and outcome.
        scores: {name: the score after each epoch}.
        reason: why this candidate was chosen, in a sentence, and whether it was the strongest one.
        rungs: the epochs after which candidates were compared and might be stopped.
        window: the number of epochs whose scores are averaged.
        train_idx, holdout_idx: the samples that were trained on and held out while candidates were compared.

    >>> from absgd_fast import select
    >>> def train(candidate, train_idx, holdout_idx, budget):
    ...     for epoch in range(budget):
    ...         yield candidate
    >>> select(train, [0.5, 0.75], n=100, budget=3, progress=False)
    chosen: 0.75
    candidate  score   behind  error   epochs  outcome
    0.5        0.5000  0.2500  0.0000  2       stopped after 2 of 3
    0.75       0.7500  0.0000  0.0000  3       chosen
    """

    best: Any
    name: str
    result: Any
    table: Table
    scores: dict[str, list[float]]
    reason: str
    rungs: list[int]
    window: int
    train_idx: Tensor
    holdout_idx: Tensor

    def __repr__(self) -> str:
        return f"chosen: {self.name}\n{self.table!r}"


def row(name: str, score: float | None, behind: float | None, error: float | None, epochs: int, outcome: str) -> dict[str, Any]:
    """A row of the table."""
    return {"candidate": name, "score": score, "behind": behind, "error": error, "epochs": epochs, "outcome": outcome}


def failures(names: Sequence[str], reasons: Sequence[str]) -> str:
    """The reasons why candidates failed, in one line."""
    return "; ".join(f"{name}: {reason}" for name, reason in zip(names, reasons))
