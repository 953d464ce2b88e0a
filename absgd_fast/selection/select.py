"""`select`: trains a few candidates for lambda, and lets a held-out part of the training set decide."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _numbers
from .candidates import DEFAULTS, Candidate, default_candidates, is_strongest, listed, names_of
from .contest import Contest, Entrant, folder_of
from .progress import Progress
from .record import FILE, Record
from .result import Selection, failures
from .rule import Judge, rungs_of
from .run import Failed
from .split import split


def select(
    train: Callable[..., Iterator[Any]],
    candidates: Sequence[Any] | None = None,
    *,
    holdout: float | Sequence[int] | Tensor = 0.1,
    goal: str = "accuracy",
    budget: int,
    labels: Sequence[int] | Tensor | None = None,
    n: int | None = None,
    seed: int = 0,
    refit: bool = True,
    out: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: bool | Callable[[str, int, float], object] = True,
) -> Selection:
    """Trains each candidate with the same budget, chooses one by its scores on held-out samples, and trains it on everything.

    The held-out samples keep their labels, wrong ones too: symmetric noise lowers all scores alike. Candidates are compared by
    the mean score of their last epochs, sample by sample if `train` yields predictions. The best one wins, unless its lead over
    the first one is at most half a standard error: then the first one wins, so list the plain mean first. That is a preference
    and no test of significance: of four that are equally good, another than the first one is chosen about every second time. A
    candidate that is clearly behind after 70 or 85 % of the budget is stopped. At most (number of candidates + 1) × budget epochs
    are trained.

    Args:
        train: your training, as a generator: `for value in train(candidate, train_idx, holdout_idx, budget)`. It trains a new
            model for `budget` epochs on the samples train_idx, and after each epoch yields either a score of the samples
            holdout_idx (a number, higher is better) or their predicted labels. What it returns at last, such as the model, is
            `Selection.result` if it was the last training. Seed it alike in every call. It is paused at a `yield` while others
            train, so the models of all candidates are in memory; the global random generators are its own. If it has an argument
            `folder`, it gets a folder of its own (None without `out`) for its checkpoints; a training that goes on from a
            checkpoint yields its earlier values first.
        candidates: what to choose among. None: `selection.default_candidates(goal)`. Others, such as numbers or dicts, are
            handed to `train` as they are.
        holdout: the share of the training samples to hold out, or their indices.
        goal: "accuracy" (wrong labels) or "balanced", the mean recall of the classes (rare classes). It chooses the default
            candidates, and what is computed of predictions.
        budget: the number of epochs of each training, or of other units after which `train` yields.
        labels: (n) the labels of the training samples, wrong or not. Needed if `train` yields predictions. The share is then
            drawn from each class alike.
        n: the number of training samples, if there are no labels.
        seed: of the draw of the held-out part.
        refit: whether the chosen candidate is trained again on all samples. Its train_idx then has all of them, and holdout_idx
            is the same as before. What it yields decides nothing, but must be of the same kind, and finite.
        out: a folder for the scores, which are written after each epoch. Called again with the same arguments after a kill,
            select goes on: candidates that are finished, stopped or failed are not trained again; those under way start again.
        settings: what else the scores depend on, such as the learning rate, as plain values. If `out` has the scores of other
            settings they are refused.
        progress: True: a progress bar on a terminal if rich is installed. A function: progress(name, epoch, score).

    Returns:
        A `Selection` with .best, .name, .result, .table, .scores and .reason.

    Raises:
        ValueError: an argument is out of its range, a part of the samples lacks a class, `out` has the scores of other
            arguments, or `train` yields something else.
        TypeError: an argument, or what `train` returns or yields, is of another type.
        RuntimeError: all candidates failed; the message has each reason.
            (`PausedInside`) `train` yields inside `torch.inference_mode()` or `torch.autocast`.
        OSError, MemoryError, torch.OutOfMemoryError: `train` raised it, or `out` cannot be written. It is no failure of a
            candidate: call select again to go on.
        NameError, AttributeError, TypeError, ImportError, SyntaxError: `train` raised it. Such a mistake in your code is no
            failure of a candidate either: mend it, and call select again.

    Warns:
        UserWarning: some candidates failed; or the last training, on all samples, ended clearly below the same candidate in the
            contest.

    >>> def train(lam, train_idx, holdout_idx, budget):
    ...     for epoch in range(budget):
    ...         yield 1 - abs(lam + 1)  # the score of a real training comes from held-out samples
    ...     return f"a model for {lam}"
    >>> chosen = select(train, [-2.0, -1.0, -0.5], n=1000, budget=4, progress=False)
    >>> chosen.best, chosen.result
    (-1.0, 'a model for -1.0')
    """
    budget = _checks.at_least(budget, "budget", 1)
    _checks.choice(goal, "goal", tuple(DEFAULTS))
    chosen_from = default_candidates(goal) if candidates is None else listed(candidates)
    names = names_of(chosen_from)
    train_idx, holdout_idx, known = split(holdout, n, labels, _checks.at_least(seed, "seed", 0))
    held = None if known is None else known[holdout_idx]
    arguments = {
        "candidates": [_described(candidate) for candidate in chosen_from],
        "goal": goal,
        "budget": budget,
        "n": (total := len(train_idx) + len(holdout_idx)),
        "held-out samples (holdout, seed)": _digest(holdout_idx),
        "labels": None if known is None else _digest(known),
    }
    arguments |= _plain(settings or {}, arguments)
    trainings = _Trainings(train, holdout_idx, budget, None if out is None else Path(out))
    judge = Judge(budget, held if goal == "balanced" else None)
    rungs = rungs_of(budget, max((c.ramp for c in chosen_from if isinstance(c, Candidate)), default=0.0))

    with Record(trainings.out, arguments) as record, Progress(progress, (len(names) + bool(refit)) * budget) as bar:
        contest = Contest(
            names,
            lambda i: trainings.start(chosen_from[i], train_idx, i),
            budget,
            judge,
            held,
            len(holdout_idx),
            record,
            bar,
        )
        try:
            winner = _chosen(contest, contest.decide(rungs), trainings.out)
        finally:
            contest.close()
        best, result = chosen_from[contest.entrants.index(winner)], winner.run.result
        if refit:
            result = None
            contest.forget()
            everything = torch.arange(total, device="cpu")
            result = trainings.refit(best, winner, everything, judge, bar)
    scores = {entrant.name: list(entrant.curve.scores) for entrant in contest.entrants}
    table, reason = contest.table(winner), _reason(contest, winner)
    if is_strongest(best, chosen_from):
        reason += "; no stronger candidate was tried, and one may be better still"
    return Selection(best, winner.name, result, table, scores, reason, rungs, judge.window, train_idx, holdout_idx)


class _Trainings:
    """Calls the user's function.

    Args:
        train: the function.
        holdout_idx: the held-out samples.
        budget: the number of epochs of each training.
        out: the folder under which each training has its own; None: there are no folders.
    """

    def __init__(self, train: Callable[..., Iterator[Any]], holdout_idx: Tensor, budget: int, out: Path | None) -> None:
        if not callable(train):
            raise TypeError(
                f"train: got {train!r}, expected a generator function train(candidate, train_idx, holdout_idx, budget)"
            )
        self.train, self.holdout_idx, self.budget, self.out = train, holdout_idx, budget, out
        self.wants_folder = "folder" in inspect.signature(train).parameters

    def start(self, candidate: Any, samples: Tensor, place: int | str) -> Iterator[Any]:
        """A new training of a candidate on some samples. place: names its folder."""
        more = {"folder": folder_of(self.out, place)} if self.wants_folder else {}
        return self.train(candidate, samples.clone(), self.holdout_idx.clone(), self.budget, **more)

    def refit(self, best: Any, winner: Entrant, samples: Tensor, judge: Judge, bar: Progress) -> Any:
        """Trains the chosen candidate on all samples, and returns what that returns. Warns if it is clearly worse then."""
        run = winner.run.again(
            lambda: self.start(best, samples, "refit"),
            lambda epoch, score, right: bar.epoch(f"{winner.name}, all samples", epoch, score),
        )
        try:
            run.advance(self.budget)
        except Failed as failure:
            raise RuntimeError(
                f"select: {winner.name} was chosen, but its training on all samples failed: {failure}; call select with"
                " refit=False to get the choice alone"
            ) from failure.__cause__
        finally:
            run.close()
        if (fell := judge.fell(run.curve, winner.curve)) is not None:
            warnings.warn(
                f"select: {winner.name} was chosen with the score {fell[0]:.4f}, but its training on all samples ended at"
                f" {fell[1]:.4f} on the same held-out samples, although they were among its training samples; it may have"
                " collapsed, so look at it, or train it again with another seed",
                stacklevel=3,
            )
        return run.result


def _all_failed(contest: Contest, folder: Path | None) -> RuntimeError:
    failed = [entrant.failed for entrant in contest.entrants]
    kept = "" if folder is None else f"; their scores are in {folder / FILE}, so give another folder after mending the cause"
    reasons = failures([entrant.name for entrant in contest.entrants], list(map(str, failed)))
    error = RuntimeError(f"select: all {len(failed)} candidates failed: {reasons}{kept}")
    error.__cause__ = next((f.__cause__ for f in failed if f is not None and f.__cause__ is not None), None)
    return error


def _chosen(contest: Contest, winner: Entrant | None, folder: Path | None) -> Entrant:
    """The winner. RuntimeError if all candidates failed; a warning if some did."""
    failed = [e for e in contest.entrants if e.failed is not None]
    if winner is None:
        raise _all_failed(contest, folder)
    if failed:
        reasons = failures([e.name for e in failed], [str(e.failed) for e in failed])
        warnings.warn(f"select: {len(failed)} of {len(contest.entrants)} candidates failed: {reasons}", stacklevel=3)
    return winner


def _reason(contest: Contest, winner: Entrant) -> str:
    """Why this one was chosen."""
    others = [e for e in contest.entrants if e.running and e is not winner]
    if not others:
        return f"{winner.name} is the only candidate that came to its end"
    best = max(others, key=lambda e: contest.judge.level(e.curve, contest.budget))
    lead, error = contest.judge.lead(winner.curve, best.curve, contest.budget)
    if lead < 0:
        return f"{best.name} is ahead of {winner.name} by {-lead:.4f} ± {error:.4f}, which is at most half a standard error"
    if lead == 0:
        return f"{winner.name} and {best.name} have the same score, so the earlier one in the list is chosen"
    if math.isnan(error):
        return f"{winner.name} is ahead of the next best, {best.name}, by {lead:.4f}; a single score shows no error"
    return f"{winner.name} is ahead of the next best, {best.name}, by {lead:.4f} ± {error:.4f}"


def _plain(settings: Mapping[str, Any], taken: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON can hold them.

    Raises:
        TypeError: one is no plain value.
        ValueError: one is not finite, or has the name of an argument.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f'settings: got {type(settings).__name__}, expected a dict such as {{"lr": 0.1}}')
    plain = {str(name): _numbers.plain(value) for name, value in settings.items()}
    for name, value in plain.items():
        if name in taken:
            raise ValueError(f"settings: got {name!r}, which select knows itself; expected other names")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"settings: got {value!r} for {name!r}, expected a text, a finite number, a bool, None, or a list or dict of them"
            ) from error
    return plain


def _digest(numbers: Tensor) -> str:
    return hashlib.sha256(numbers.contiguous().numpy().tobytes()).hexdigest()[:16]


def _described(candidate: Any) -> str:
    """A candidate as text that is the same in another process: without the addresses of objects."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(candidate))
