"""One training of a user's function, which is paused after an epoch and goes on later."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from .._numbers import real
from .draws import Draws
from .modes import GradMode, shared
from .rule import Curve, Judge

# What says nothing of a candidate, so it ends the selection and is not put on record: the machine, whose memory all candidates
# share, and mistakes in the user's code.
OF_THE_MACHINE = (OSError, MemoryError, torch.OutOfMemoryError)
MISTAKES = (NameError, AttributeError, TypeError, ImportError, SyntaxError)


class Failed(Exception):
    """A training that did not come to its end. The text says why; `__cause__` is what the user's function raised."""


class PausedInside(RuntimeError):
    """The user's function was paused where it must not be."""


class Run:
    """The training of one candidate.

    Args:
        start: makes the generator, train(candidate, ...). It is called when the first epoch is needed.
        curve: takes the scores. It may have some already, from the disk: those epochs are trained again only if later ones are
            needed, and their scores stay.
        budget: how many scores the generator must yield.
        judge: makes scores of predictions.
        labels: of the held-out samples; None: the generator must yield scores.
        held_out: the number of held-out samples.
        on_score: called as on_score(epoch, score, right or None) for each score that is new.
    """

    def __init__(
        self,
        start: Callable[[], Iterator[Any]],
        curve: Curve,
        budget: int,
        judge: Judge,
        labels: Tensor | None,
        held_out: int,
        on_score: Callable[[int, float, Tensor | None], object],
    ) -> None:
        self._start, self.curve, self.budget, self._judge = start, curve, budget, judge
        self._labels, self._held_out, self._on_score = labels, held_out, on_score
        self._generator: Iterator[Any] | None = None
        self._yielded = 0
        self._draws, self._grad_mode = Draws(), GradMode()
        self.result: Any = None

    def again(self, start: Callable[[], Iterator[Any]], on_score: Callable[[int, float, Tensor | None], object]) -> Run:
        """A new training that is judged alike."""
        return Run(start, Curve(), self.budget, self._judge, self._labels, self._held_out, on_score)

    def advance(self, end: int) -> None:
        """Trains until `end` epochs have their score; at the end of the budget the generator is run to its own end.

        Raises:
            Failed: the user's function raised something else, ended too early, or yielded a score that is not finite.
            OF_THE_MACHINE, MISTAKES: the user's function raised one of them.
            TypeError, ValueError: what it yielded is neither a score nor predictions.
            PausedInside: it yielded inside a block whose mode would hold for the others too.
        """
        with self._draws, self._grad_mode:
            self._advance(end)

    def _advance(self, end: int) -> None:
        while len(self.curve.scores) < end or (self._generator is not None and self._yielded < end):
            try:
                value = self._next()
            except StopIteration:
                raise Failed(f"it ended after {self._yielded} of {self.budget} scores") from None
            self._yielded += 1
            if self._yielded > len(self.curve.scores):
                self._take(value)
        if end == self.budget and self._generator is not None:
            try:
                self._next()
            except StopIteration as done:
                self.result = done.value
            else:
                raise ValueError(f"train: it yielded more than budget = {self.budget} scores, expected one after each epoch")
            self._generator = None

    def _next(self) -> Any:
        before = shared()
        try:
            if self._generator is None:
                self._generator = self._start()
            if hasattr(self._generator, "__next__"):
                value = next(self._generator)
                _check_modes(before)
                return value
        except (StopIteration, PausedInside, *OF_THE_MACHINE, *MISTAKES):
            raise
        except Exception as error:
            _let_go(error)
            raise Failed(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        made, self._generator = self._generator, None
        raise TypeError(
            f"train: it returned {type(made).__name__}, expected a generator: `yield` a score or predictions after each epoch"
        )

    def close(self) -> None:
        """Ends the training; its memory is freed."""
        ended, self._generator = self._generator, None
        if isinstance(ended, Generator):
            # what a user's function raises while it ends changes no score
            with self._draws, self._grad_mode, contextlib.suppress(Exception):
                ended.close()

    def _take(self, value: Any) -> None:
        score, right = self._score(value)
        epoch = len(self.curve.scores) + 1
        if not math.isfinite(score):
            raise Failed(f"the score of epoch {epoch} is {score}")
        if (right is None) == bool(self.curve.right) and self.curve.scores:
            raise ValueError("train: it yielded scores in some epochs and predictions in others, expected one kind alone")
        self.curve.scores.append(score)
        if right is not None:
            self.curve.right.append(right)
        self._on_score(epoch, score, right)

    def _score(self, value: Any) -> tuple[float, Tensor | None]:
        """A score as it is, or the score of predictions and which of them are right."""
        if getattr(value, "ndim", 0) == 0 and not isinstance(value, (list, tuple)):
            score = real(value.detach() if isinstance(value, Tensor) else value, tensors=True)
            if score is None:
                raise TypeError(
                    f"train: it yielded {type(value).__name__}, expected a score (a number, higher is better) or the predicted"
                    " labels of the held-out samples"
                )
            return score, None
        try:
            predicted = torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:  # torch raises each of them for what is no array of numbers
            raise TypeError(
                f"train: it yielded {type(value).__name__} that is no array of numbers ({error}), expected a score or the"
                f" predicted labels of the {self._held_out} held-out samples, as integers"
            ) from error
        if predicted.shape != (self._held_out,) or predicted.is_floating_point():
            raise ValueError(
                f"train: it yielded {predicted.dtype} of shape {tuple(predicted.shape)}, expected a score or the predicted labels"
                f" of the {self._held_out} held-out samples, for example model(x[holdout_idx]).argmax(1)"
            )
        if self._labels is None:
            raise ValueError("labels: train yields predictions, so select must know the labels: labels=...")
        right = predicted == self._labels
        return self._judge.score(right), right


def _check_modes(before: dict[str, bool]) -> None:
    """RuntimeError if the user's function was paused inside a block that changes the modes of all."""
    for block, on in shared().items():
        if on != before[block]:
            raise PausedInside(
                f"train: it yielded inside `with {block}`, which would hold for the other candidates too; compute the predictions"
                " inside that block, and yield them after it"
            )


def _let_go(error: BaseException | None) -> None:
    """Frees the variables of the functions that an error came through: a failed training must not keep its model in memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
