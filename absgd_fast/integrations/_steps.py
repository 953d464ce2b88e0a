"""What every integration does at the end of an optimizer step: one call that ends the deferred steps of its criteria."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor
from torch.nn import Module

from ..robust.base import RobustLoss
from ..robust.step import OPEN
from ..schedule import ChainedSchedules, LamSchedule


def check_criterion(criterion: object, instead: str = "") -> None:
    """TypeError for what is no `ABLoss` or `LinearABLoss`. instead: what may be given besides one, for the text."""
    if isinstance(criterion, RobustLoss):
        return
    wrapped = isinstance(getattr(criterion, "module", getattr(criterion, "_orig_mod", None)), Module)
    hint = (
        "the criterion itself, and not what Accelerator.prepare, DDP or torch.compile has made of a module"
        if wrapped
        else "such as ABLoss(loss, lam=...) for a loss of single samples (of torch's losses, one with reduction='none')"
    )
    raise TypeError(f"criterion: got {type(criterion).__name__}, expected an ABLoss or LinearABLoss{instead}: {hint}")


def check_schedule(schedule: object, criteria: Sequence[RobustLoss]) -> None:
    """ValueError for a schedule of the lambda of a criterion that does not take part in the training.

    A schedule of class weights is not looked at. It may drive a loss that is hidden in a function, or a second term.
    """
    for part in parts_of(schedule):
        if isinstance(part, LamSchedule) and all(part.criterion is not criterion for criterion in criteria):
            raise ValueError(
                f"schedule: got a {type(part).__name__} of a criterion that this training does not have; expected one of the"
                f" criterion that makes its loss, such as {type(part).__name__}(criterion, ...)"
            )


def parts_of(schedule: object) -> Iterator[object]:
    """A schedule, or those in a ChainedSchedules."""
    if isinstance(schedule, ChainedSchedules):
        for part in schedule.parts:
            yield from parts_of(part)
    else:
        yield schedule


def accumulates(criterion: RobustLoss, micro_batches: int, *, has_optimizer: bool = False) -> None:
    """Prepare a criterion for a framework that divides the loss by `micro_batches`, before the first of them.

    The value of the forward becomes the plain mean, which a framework prints. Several micro-batches make the criterion deferred.
    With one it is not deferred, so that a second term of the loss keeps its size. A criterion with rule= weighs each micro-batch
    by itself, and then the framework's division by their number is right.

    Args:
        criterion: it must not be in the middle of a deferred step.
        micro_batches: those of the optimizer steps that follow.
        has_optimizer: whether an optimizer has the criterion as its ``robust=``. Such a criterion stays deferred, because the
            optimizer finishes its steps.

    Raises:
        ValueError: several micro-batches, and an option that cannot be deferred (mix, max_weight, TargetESS).
    """
    if micro_batches > 1 and criterion.target is not None:
        raise ValueError(
            f"lam: got a criterion with {criterion.weighting_in_words()} and {micro_batches} micro-batches in an optimizer step,"
            " which are normalised together at its end, but every micro-batch has a lambda of its own; expected a number or"
            " RelativeLam(r) as lam, or one micro-batch in a step"
        )
    criterion.report = "mean"
    if criterion.rule is None:
        criterion.loss_divisor = 1  # see `divided_by`
        if not has_optimizer:
            criterion.deferred = micro_batches > 1


def is_open(criterion: RobustLoss) -> bool:
    """Whether this criterion has micro-batches whose gradients are not normalised yet."""
    step = criterion.deferred_step
    return step is not None and step.phase is OPEN


class Skipped:
    """Takes a micro-batch out of its deferred step again, if the framework runs no backward of its loss.

    It is made before the forward. Without deferred mode log s has moved by then, and stays.
    """

    def __init__(self, criterion: RobustLoss):
        self._criterion = criterion
        self._before = vars(criterion.deferred_step).copy() if is_open(criterion) else None

    def take_out(self) -> None:
        """Forget what the forwards since then have counted."""
        step = self._criterion.deferred_step
        if step is None or not is_open(self._criterion):
            return
        if self._before is None:
            self._criterion.discard()  # the step began with this micro-batch
        else:
            vars(step).update(self._before)  # the statistics of a step are replaced, and never changed in place


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
        drop_grads(params)
    return counts


def drop_grads(params: Iterable[Tensor]) -> None:
    """Leave a step that does not count no gradients, so that any optimizer passes over the parameters. On a GPU they are NaN."""
    for param in params:
        param.grad = None
