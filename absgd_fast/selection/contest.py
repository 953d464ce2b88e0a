"""The contest of the candidates: successive halving, with the rule of rule.py and the record of record.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .progress import Progress
from .record import Record, packed, unpacked
from .result import Table, row
from .rule import Curve, Judge
from .run import Failed, Run

Start = Callable[[int], Iterator[Any]]  # the generator of the candidate at a place


class Entrant:
    """One candidate in the contest."""

    def __init__(self, name: str, run: Run) -> None:
        self.name, self.run, self.curve = name, run, run.curve
        self.failed: Failed | None = None
        self.will_fail: str | None = None  # the reason, if the record says that it failed after the epochs that it has
        self.stopped: int | None = None  # the epoch after which it was stopped
        self.behind: tuple[float, float] | None = None  # its distance to the leader when it was last compared, and the error

    @property
    def running(self) -> bool:
        """Whether it has neither failed nor been stopped."""
        return self.failed is None and self.stopped is None


class Contest:
    """Trains the candidates in turns, from rung to rung.

    Args:
        names: of the candidates.
        start: start(i) makes the generator of candidate i.
        budget: epochs of each candidate.
        judge: compares them.
        labels: of the held-out samples, or None.
        held_out: the number of held-out samples.
        record: where the scores are kept. Those that it has already are taken from it.
        progress: is told of each epoch.
    """

    def __init__(
        self,
        names: Sequence[str],
        start: Start,
        budget: int,
        judge: Judge,
        labels: Tensor | None,
        held_out: int,
        record: Record,
        progress: Progress,
    ) -> None:
        self.budget, self.judge, self.record, self.progress = budget, judge, record, progress
        curves = [Curve() for _ in names]
        will_fail: dict[int, str] = {}
        for entry in record.entries:
            curve = curves[entry["candidate"]]
            if "failed" in entry:
                will_fail[entry["candidate"]] = entry["failed"]
                continue
            curve.scores.append(entry["score"])
            if entry["right"] is not None:
                curve.right.append(unpacked(entry["right"], held_out))
        progress.skipped(sum(len(curve.scores) for curve in curves))

        def entrant(i: int, name: str) -> Entrant:
            def kept(epoch: int, score: float, right: Tensor | None) -> None:
                record.add({"candidate": i, "epoch": epoch, "score": score, "right": None if right is None else packed(right)})
                progress.epoch(name, epoch, score)

            return Entrant(name, Run(lambda: start(i), curves[i], budget, judge, labels, held_out, kept))

        self.entrants = [entrant(i, name) for i, name in enumerate(names)]
        for i, reason in will_fail.items():
            self.entrants[i].will_fail = reason

    def decide(self, rungs: Sequence[int]) -> Entrant | None:
        """Trains to the end of the budget, and returns the chosen candidate; None if all have failed."""
        for rung in (*rungs, self.budget):
            self._advance(rung)
            while not any(e.running for e in self.entrants):
                if not self._revive():
                    return None
                self._advance(rung)
            self._compare([e for e in self.entrants if e.running], rung)
        running, plain = [e for e in self.entrants if e.running], self.entrants[0]
        return running[self.judge.choose([e.curve for e in running], plain.curve if plain.running else None)]

    def _advance(self, rung: int) -> None:
        for i, entrant in enumerate(self.entrants):
            if not entrant.running:
                continue
            try:
                if entrant.will_fail is not None and len(entrant.curve.scores) < rung:
                    raise Failed(entrant.will_fail)
                entrant.run.advance(rung)
            except Failed as failure:
                if entrant.will_fail is None:
                    self.record.add({"candidate": i, "failed": str(failure)})
                entrant.failed = failure
                entrant.run.close()
                self._skip(entrant)

    def _skip(self, entrant: Entrant, times: int = 1) -> None:
        """Tells the progress bar that the rest of its budget is not needed. times: -1 if it is needed after all."""
        self.progress.skipped(times * (self.budget - len(entrant.curve.scores)))

    def _revive(self) -> bool:
        """Lets those go on that were stopped last, because whoever was ahead of them has failed; whether there were any."""
        stopped = [e for e in self.entrants if e.stopped is not None]
        last = max((e.stopped or 0 for e in stopped), default=0)
        for entrant in stopped:
            if entrant.stopped == last:
                entrant.stopped = None
                self._skip(entrant, -1)
        return bool(stopped)

    def _compare(self, running: Sequence[Entrant], rung: int) -> None:
        """Notes how far each candidate is behind, and stops those that are hopeless unless this is the end."""
        curves = [e.curve for e in running]
        for entrant, behind in zip(running, self.judge.behind(curves, rung)):
            entrant.behind = behind
        if rung < self.budget:
            for i in self.judge.hopeless(curves, rung):
                running[i].stopped = rung  # its training stays paused: it goes on if all others fail
                self._skip(running[i])

    def close(self) -> None:
        """Ends all trainings."""
        for entrant in self.entrants:
            entrant.run.close()

    def forget(self) -> None:
        """Drops what the trainings returned, such as models, whose memory the last training needs."""
        for entrant in self.entrants:
            entrant.run.result = None

    def table(self, chosen: Entrant | None) -> Table:
        """A row for each candidate."""
        rows = []
        for e in self.entrants:
            epochs = len(e.curve.scores)
            level = self.judge.level(e.curve, epochs) if epochs else None
            behind, error = (None, None) if e.behind is None else e.behind
            if e.failed is not None:
                outcome = f"failed: {e.failed}"
            elif e.stopped is not None:
                outcome = f"stopped after {e.stopped} of {self.budget}"
            else:
                outcome = "chosen" if e is chosen else "finished"
            rows.append(row(e.name, level, behind, error, epochs, outcome))
        return Table(rows)


def folder_of(out: Path | None, place: int | str) -> Path | None:
    """A folder for what the training of one candidate keeps; None without `out`."""
    if out is None:
        return None
    folder = out / f"candidate-{place}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
