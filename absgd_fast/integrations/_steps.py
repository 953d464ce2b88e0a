"""What every integration does at the end of an optimizer step: one call that ends the deferred steps of its criteria."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..robust.base import RobustLoss
from ..robust.step import OPEN


def accumulates(criterion: RobustLoss, micro_batches: int) -> None:
    """Prepare a criterion for a framework that divides the loss by `micro_batches`, before the first of them.

    The value of the forward becomes the plain mean, which a framework prints. Several micro-batches make the criterion deferred.
    A criterion with rule= weighs each micro-batch by itself, and then the framework's division by their number is right.

    Raises:
        ValueError: several micro-batches, and an option that cannot be deferred (mix, max_weight).
    """
    criterion.report = "mean"
    if criterion.rule is None:
        criterion.loss_divisor = 1  # see `divided_by`
        if micro_batches > 1:
            criterion.deferred = True


def is_open(criterion: RobustLoss) -> bool:
    """Whether this criterion has micro-batches whose gradients are not normalised yet."""
    step = criterion.deferred_step
    return step is not None and step.phase is OPEN


def divided_by(criterion: RobustLoss, loss_divisor: float) -> None:
    """Tell the open step of a criterion by what a framework has divided the loss of its micro-batches.

    The criterion's own loss_divisor stays 1, because it would multiply the mean that each forward reports. People log that one
    before the framework divides it.
    """
    step = criterion.deferred_step
    if step is not None:
        step.divisor = loss_divisor


def finish(criteria: Iterable[RobustLoss], params: Sequence[Tensor], loss_divisor: float) -> bool:
    """Normalise the gradients of the criterion whose step is open, as `finish_` does; without one, leave them as they are.

    Args:
        criteria: those that take part in the training.
        params: all parameters that the optimizer steps.
        loss_divisor: by what the framework has divided the loss of each micro-batch.

    Returns:
        Whether the step counts. If it does not, every ``.grad`` is None, so that any optimizer passes over the parameters. On a
        GPU this waits for it.

    Raises:
        RuntimeError: two criteria are in an open step.
    """
    open_ones = [criterion for criterion in criteria if is_open(criterion)]
    if not open_ones:
        return True
    if len(open_ones) > 1:
        raise RuntimeError(
            f"got {len(open_ones)} deferred criteria in one optimizer step, expected one: their gradients are added up before"
            " either can be normalised; use one criterion for the whole loss, or no accumulation"
        )
    (criterion,) = open_ones
    divided_by(criterion, loss_divisor)
    counts = bool(criterion.finish_(params))
    if not counts:
        for param in params:
            param.grad = None
    return counts
