"""What a training writes down in each epoch: accuracies, weights, λ and log s, and what becomes of the wrong labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import absgd_fast as ab

from . import data

TESTED = ("accuracy", "balanced_accuracy")
WEIGHTS = ("class_weight", "clean_weight", "flipped_weight", "ess")
LAMBDA = ("lam", "log_s")
PREDICTED = ("train_accuracy", "flipped_as_true", "flipped_as_given")


class Recorder:
    """The series of a training, with an entry per epoch. None of its work is timed.

    Args:
        split: the data that is trained on.
        classes: their number.

    Attributes:
        history: the series by name, as train.runs describes them.
    """

    def __init__(self, split: data.Split, classes: int) -> None:
        self.split, self.classes = split, classes
        self.history: dict[str, list[Any]] = {key: [] for key in (*TESTED, *WEIGHTS, *LAMBDA, *PREDICTED)}
        self.begin()

    def begin(self) -> None:
        """Forgets the steps of the epoch before."""
        self._samples, self._weights, self._predicted = list[Tensor](), list[Tensor](), list[Tensor]()

    def add(self, batch: Tensor, weights: Tensor | None, logits: Tensor | None) -> None:
        """Adds a step.

        Args:
            batch: (B,) indices of the training samples.
            weights: (B,), None for 1.
            logits: (B, C), None if the method does not show them.
        """
        self._samples.append(batch)
        self._weights.append(torch.ones(len(batch), dtype=torch.float32, device="cpu") if weights is None else weights.detach())
        if logits is not None:
            self._predicted.append(logits.argmax(1))

    def end(self, predicted: Tensor, loss: ab.ABLoss | None) -> None:
        """Adds the entries of an epoch.

        Args:
            predicted: (N_test,) classes of the test images.
            loss: the loss with the λ and the normaliser, or None.
        """
        samples = torch.cat(self._samples)
        accuracy, balanced, _ = tested(predicted, self.split, self.classes)
        entries: list[Any] = [accuracy, balanced, *self._of_weights(samples), *_lambda(loss), *self._of_labels(samples)]
        for series, entry in zip(self.history.values(), entries):
            series.append(entry)

    def _of_weights(self, samples: Tensor) -> tuple[list[float | None], float | None, float | None, float | None]:
        """The mean weight of each class (by the labels that training sees), of right labels, of wrong ones, and mean ESS/n."""
        steps = [w.cpu().double() for w in self._weights]
        weights = torch.cat(steps)
        y, wrong = self.split.y[samples], self.split.y[samples] != self.split.y_true[samples]
        per_class = torch.zeros(self.classes, dtype=torch.float64, device="cpu").index_add_(0, y, weights)
        per_class /= torch.bincount(y, minlength=self.classes)
        ess = [float(w.sum() ** 2 / (len(w) * w.square().sum())) for w in steps]
        known = [value for value in ess if math.isfinite(value)]
        return (
            [number(w) for w in per_class],
            number(weights[~wrong].mean()),
            number(weights[wrong].mean()),
            number(sum(known) / len(known)) if known else None,
        )

    def _of_labels(self, samples: Tensor) -> tuple[float | None, float | None, float | None]:
        """Percent of the samples that the network, while it trains, predicts as their label; and of those with a wrong label as
        their true class, and as the wrong label itself, which it has then memorised."""
        if not self._predicted:
            return None, None, None
        predicted = torch.cat([p.cpu() for p in self._predicted])
        y, y_true = self.split.y[samples], self.split.y_true[samples]
        wrong = y != y_true
        of_wrong = [100 * (predicted == labels)[wrong].double().mean() for labels in (y_true, y)]
        return number(100 * (predicted == y).double().mean()), number(of_wrong[0]), number(of_wrong[1])

    def state_dict(self) -> dict[str, Any]:
        """The series, and the steps of the epoch under way."""
        steps = {"samples": self._samples, "weights": self._weights, "predicted": self._predicted}
        return {"history": self.history} | {name: [part.cpu() for part in parts] for name, parts in steps.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what state_dict() gave."""
        self.history = {key: list(values) for key, values in state["history"].items()}
        self._samples, self._weights, self._predicted = (list(state[name]) for name in ("samples", "weights", "predicted"))


def _lambda(loss: ab.ABLoss | None) -> tuple[float | None, float | None]:
    """λ and log s. None: the plain mean, or a method without them."""
    if loss is None:
        return None, None
    lam = number(loss.lam)
    return lam, None if lam is None else number(loss.log_s)


def tested(predicted: Tensor, split: data.Split, classes: int) -> tuple[float | None, float | None, list[float | None]]:
    """Accuracy, mean recall over the classes, and the recall of each class, in percent. predicted: classes of the test images."""
    right = predicted == split.y_test
    counts = torch.bincount(split.y_test, minlength=classes)
    recall = 100 * torch.bincount(split.y_test[right], minlength=classes).float() / counts
    return number(100 * right.double().mean()), number(recall.nanmean()), [number(r) for r in recall]


def confusion(predicted: Tensor, split: data.Split, classes: int) -> list[list[int]] | None:
    """(C, C) counts over the training samples with a wrong label: row = their true class, column = predicted class.

    None if no label is wrong. predicted: (N,) classes of the training images.
    """
    wrong = split.y != split.y_true
    if not wrong.any():
        return None
    cells = split.y_true[wrong] * classes + predicted[wrong]
    return torch.bincount(cells, minlength=classes * classes).view(classes, classes).tolist()


def number(x: Tensor | float) -> float | None:
    """A float with six digits, or None if JSON has no number for it."""
    return float(f"{float(x):.6g}") if math.isfinite(x) else None
