"""`ab.select` with the training loop of this package: which lambda suits a data set and a model.

    results = tune(config, source, candidates, out="folder")      plain dict, ready for JSON; goes on after a kill
    write(results, folder)                                        selection.json and tune.html

All trainings have the same initial weights. The test set is looked at by the last training alone, and decides nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shlex
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import absgd_fast as ab
from absgd_fast.selection import Candidate, Selection, default_candidates
from absgd_fast.selection.draws import random_state, restore_random_state

from . import criteria, data, methods
from .checkpoint import Keeper, load, write_whole
from .method import Method, Setup
from .summary import environment
from .train import Config, Run, Training, draw

CHECKPOINT, RESULTS, PAGE = "checkpoint.pt", "selection.json", "tune.html"
# the fields of Config that no candidate uses
UNUSED = (
    "methods",
    "test_images",
    "lam",
    "warmup",
    "share",
    "sign",
    "beta",
    "reg",
    "chi2_rho",
    "eta",
    "sam_rho",
    "mixup_alpha",
    "tau",
    "stage_epochs",
    "stage_lr",
    "clean",
    "l2rw_method",
    "seeds",
    "data_root",
    "audit",
)


def options_of(candidate: Candidate, config: Config) -> dict[str, Any]:
    """The options of the criterion of a candidate, as for Candidate.build."""
    gamma: dict[str, Any] = {} if isinstance(candidate.lam, ab.TargetESS) else {"gamma": config.gamma}  # a TargetESS has none
    return gamma | {"mix": config.mix}


def method_of(candidate: Candidate) -> methods.Make:
    """The function that builds the method of a candidate, as those of methods.METHODS."""

    def make(setup: Setup) -> Method:
        loss, schedule = candidate.build(setup.criterion, setup.config.epochs, **options_of(candidate, setup.config))
        return methods.scheduled(setup, loss, schedule)

    return make


class Trainer:
    """The function that ab.select calls: it trains a candidate on a part of a split.

    Args:
        config, source, split, seed: as for train.Training.
        every: steps between two checkpoints, as for checkpoint.Keeper.
    """

    def __init__(self, config: Config, source: data.Source, split: data.Split, seed: int, every: int = 0) -> None:
        self.config, self.source, self.split, self.seed, self.every = config, source, split, seed, every

    def __call__(
        self, candidate: Candidate, train_idx: Tensor, holdout_idx: Tensor, budget: int, folder: Path | None
    ) -> Generator[Any, None, Run]:
        """Yields the predicted labels of the held-out images after each epoch.

        The training on all images tests on the test set instead, yields its accuracy there, and returns Training.result().

        Raises:
            FloatingPointError: a logit of these images is not finite. Its argmax would be class 0, a score like any other.
        """
        whole, last = self.split, len(train_idx) == len(self.split.y)
        split = whole if last else data.Split(*whole.part(train_idx), whole.x[holdout_idx], whole.y[holdout_idx])
        training = Training(candidate.name, self.config, self.source, split, self.seed, method_of(candidate))
        tested = "test images" if last else "held-out images"
        kept = _Kept(training, None if folder is None else folder / CHECKPOINT, self.every, tested)
        for epoch, predicted in enumerate(kept.epochs()):
            yield training.history["accuracy"][epoch] / 100 if last else predicted
        return training.result()


class _Kept:
    """A training whose state is kept in a file from time to time, together with the predictions of its earlier epochs.

    An epoch whose logits are not all finite ends it before its predictions are kept, so those in the file are of finite ones.

    Args:
        training, file, every: the training, its file (None: there is none), and the steps between two writes.
        tested: what the predictions are of, for the error.
    """

    def __init__(self, training: Training, file: Path | None, every: int, tested: str) -> None:
        self.training, self.tested, self.predictions = training, tested, list[Tensor]()
        self.keeper = None if file is None else Keeper(file, {"candidate": training.name}, every)
        if file is not None and file.is_file():
            state = load(file)["state"]
            training.load_state_dict(state["training"])
            self.predictions = list(state["predictions"].long())
            restore_random_state(state["random"])

    def epochs(self) -> Iterator[Tensor]:
        """The predictions after each epoch, those from the file first. Raises FloatingPointError if logits are not finite."""
        yield from list(self.predictions)
        for logits in self.training.epochs(self._after_step):
            if not logits.isfinite().all():
                raise FloatingPointError(f"the logits of the {self.tested} are not finite after epoch {self.training.epoch}")
            self.predictions.append(logits.argmax(1))
            yield self.predictions[-1]

    def _after_step(self) -> None:
        if self.keeper is not None:
            self.keeper(self._state, False)

    def _state(self) -> dict[str, Any]:
        n = len(self.training.split.y_test)
        predictions = torch.stack(self.predictions) if self.predictions else torch.empty(0, n, dtype=torch.int64, device="cpu")
        return {"training": self.training.state_dict(), "predictions": predictions.to(torch.int16), "random": random_state()}


def tune(
    config: Config,
    source: data.Source,
    candidates: Sequence[Candidate] | None = None,
    *,
    goal: str | None = None,
    holdout: float = 0.1,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    every: int = 0,
    threads: int | None = None,
    command: Iterable[str] = (),
    progress: bool | Callable[[str, int, float], object] = True,
) -> dict[str, Any]:
    """Chooses a candidate by a held-out part of the training images, and trains it on all of them.

    Args:
        config: the data, the model and its training; `methods`, `lam` and `seeds` are not used.
        source: its data set.
        candidates: Candidates; None: the default ones of the goal.
        goal: as for ab.select. None: goal_of(config).
        holdout, progress: as for ab.select.
        seed: of the split, of the wrong labels, of the held-out part, of the initial weights and of the order of the batches.
        out: the folder of the scores and checkpoints. If it has those of the same arguments, tuning goes on.
        every: steps between two checkpoints; 0: 30 seconds.
        threads, command: the number of CPU threads, and the words of the command line, for the report.

    Returns:
        A dict, ready for JSON (accuracies in percent): "config", "goal", "holdout", "seed", "chosen", "code", "reason", "table",
        "scores", "rungs" (epochs at which candidates were compared), "window" (epochs that are averaged), "final" (the result of
        the last training, as train.runs yields it), "command", "environment", "created".

    Raises:
        ValueError: a class has one training image alone, or as ab.select.
        RuntimeError, OSError: as ab.select.
    """
    config.check()
    config.check_source(source)
    goal = goal_of(config) if goal is None else goal
    chosen_from = default_candidates(goal) if candidates is None else list(candidates)
    split = draw(config, source, seed)
    _check_classes(split.y, config, source)
    settings = {name: value for name, value in asdict(config).items() if name not in UNUSED}
    settings |= {"seed": seed, "data": source.fingerprint, "threads": threads}
    selection = ab.select(
        Trainer(config, source, split, seed, every),
        chosen_from,
        holdout=holdout,
        goal=goal,
        budget=config.epochs,
        labels=split.y,
        seed=seed,
        out=out,
        settings=settings,
        progress=progress,
    )
    return _results(config, selection, goal, holdout, seed, threads) | {"command": shlex.join(command)}


def goal_of(config: Config) -> str:
    """The goal if none is given: "balanced" if the classes differ in size, whether labels are wrong too or not; else "accuracy".

    With rare classes accuracy hardly sees them, and the candidates for it, λ < 0, turn away from their large losses.
    """
    return "accuracy" if config.imbalance == "none" else "balanced"


def _check_classes(labels: Tensor, config: Config, source: data.Source) -> None:
    """Raises ValueError if a class has a single image, with the options that may give it a second one."""
    counts = torch.bincount(labels)
    alone = torch.nonzero(counts == 1).flatten().tolist()
    if not alone:
        return
    asked = source.n_max if config.per_class is None else config.per_class
    needed, ways = 2.0, list[str]()
    if config.imbalance != "none":
        needed = 2 * config.rho
        if asked >= 2:
            # a smaller one than that if only the wrong labels have left a single image
            ways.append(f"a --rho of at most {asked / 2:g}" if needed > asked else "a smaller --rho")
    if asked < source.n_max and needed <= source.n_max:
        ways.append("a larger --per-class")
    what_to_do = f": give {' or '.join(ways)}" if ways else f", which {source.name} does not have with these options"
    named = f"class {', '.join(map(str, alone))} {'has' if len(alone) == 1 else 'have'}"
    raise ValueError(
        f"holdout: {named} a single training image, which cannot be held out and trained on; expected at least two images of"
        f" each class{what_to_do}"
    )


def _results(config: Config, selection: Selection, goal: str, holdout: float, seed: int, threads: int | None) -> dict[str, Any]:
    percent = ("score", "behind", "error")
    settings = {name: value for name, value in asdict(config).items() if name not in UNUSED or name == "data_root"}
    final: Run = selection.result
    return {
        "config": settings,
        "goal": goal,
        "holdout": holdout,
        "seed": seed,
        "chosen": selection.name,
        "code": _code(selection.best, config),
        "reason": selection.reason,
        "table": [row | {key: _percent(row[key]) for key in percent} for row in selection.table],
        "scores": {name: [_percent(score) for score in scores] for name, scores in selection.scores.items()},
        "rungs": selection.rungs,
        "window": selection.window,
        "held out": len(selection.holdout_idx),
        "trained on": len(selection.train_idx),
        "final": final,
        "environment": environment(config, threads),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _code(candidate: Candidate, config: Config) -> str:
    """The lines that make the criterion of a candidate, with its loss, and their schedules."""
    lines = candidate.code(config.epochs, **options_of(candidate, config))
    if config.loss == "ce":
        return lines
    loss, schedules = criteria.code(config)
    plain = ", as torch.nn.CrossEntropyLoss()"  # it is another loss here
    lines = lines.replace("ab.ABLoss(", "ab.ABLoss(loss, ").replace(plain, "")
    return "\n".join(part for part in (f"loss = {loss}", lines, schedules) if part)


def _percent(fraction: float | None) -> float | None:
    """A fraction in percent, with six digits."""
    return None if fraction is None else float(f"{100 * fraction:.6g}")


def write(results: dict[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes selection.json and tune.html, each whole or not at all, and removes the checkpoints. Returns the paths.

    The results come first, so that they are there even if a plot cannot be drawn.
    """
    from .tune_report import html  # it needs matplotlib and jinja2

    into = Path(folder)
    into.mkdir(parents=True, exist_ok=True)
    write_whole(into / RESULTS, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    write_whole(into / PAGE, html(results).encode())
    for place in (*range(len(results["table"])), "refit"):
        kept = into / f"candidate-{place}"
        Keeper(kept / CHECKPOINT, {}).done()
        with contextlib.suppress(OSError):  # it is not there, or a user's own files are in it
            kept.rmdir()
    return [into / RESULTS, into / PAGE]
