"""The rows that a user's criterion ignores because of their labels."""

from __future__ import annotations

import warnings
from typing import TypeGuard

import torch
from torch import Tensor

from .. import _checks, _numbers


def checked(ignore_index: int | None, criterion: object) -> int | None:
    """The option ignore_index. ValueError if it is no integer, or not the one of a criterion that has one itself."""
    if ignore_index is None:
        return None
    ignore_index, own = _checks.ignore_index(ignore_index), _of_criterion(criterion)
    if own is not None and own != ignore_index:
        name = type(criterion).__name__
        raise ValueError(
            f"ignore_index: got {ignore_index}, but the criterion {name} ignores the label {own}; expected"
            f" {name}(..., ignore_index={ignore_index}), and no ignore_index here"
        )
    return ignore_index


def without_ignored(
    mask: Tensor | None, ignore_index: int | None, criterion: object, args: tuple, losses: Tensor
) -> Tensor | None:
    """The mask (True: the row counts), without the rows whose label is ignored too.

    Labels are the one integer tensor among the criterion's arguments that has the shape of the losses. If none has it, they are
    the one that has as many elements: a criterion may flatten its arguments. If the criterion's own ignore_index does not say
    which rows count, because no tensor or several could be the labels, the mask alone says it.

    Args:
        ignore_index: None: that of the criterion itself, if it has one and is called with integers.
        args: what the criterion was called with. losses: what it returned.

    Raises:
        ValueError: no argument or several could be the labels, and ignore_index is given, or the criterion has its own and there
            is no mask.
    """
    label = _of_criterion(criterion) if ignore_index is None else ignore_index
    if label is None:
        return mask
    integers = [arg for arg in args if _is_integer(arg)]
    fitting = _labels(integers, losses)
    if len(fitting) == 1:
        counts = fitting[0].detach().reshape(losses.shape) != label
        return counts if mask is None else counts & mask
    if ignore_index is None and (mask is not None or not integers):
        return mask
    whose = f"got {label}" if ignore_index is not None else f"the criterion {type(criterion).__name__} ignores the label {label}"
    leave_out = "" if ignore_index is None else ", and no ignore_index"
    raise ValueError(
        f"ignore_index: {whose}, but was called with tensors of shapes {[tuple(a.shape) for a in args if isinstance(a, Tensor)]},"
        f" of which {len(fitting) or 'none'} could be the labels: integers, one for each of the losses {tuple(losses.shape)};"
        f" expected one such tensor, or mask=labels != {label}{leave_out}"
    )


def warn_of_ignored(args: tuple, losses: Tensor) -> None:
    """Warns if the criterion returns 0 for negative labels, which it seems to ignore. Called once: on a GPU it waits."""
    labels = _labels([arg for arg in args if _is_integer(arg)], losses)
    if len(labels) != 1 or not _checks.has_values(losses):
        return
    zeros = (labels[0].detach().reshape(losses.shape) < 0) & (losses.detach() == 0)
    if bool(zeros.any()):
        warnings.warn(
            f"criterion: got losses of exactly 0 for {int(zeros.sum())} of {losses.numel()} labels, which are negative, so the"
            " criterion seems to ignore them; they count as rows of a small loss unless you say so: expected"
            " ABLoss(criterion, ignore_index=-100, ...) with your label, or mask=",
            stacklevel=7,
        )


def _labels(integers: list[Tensor], losses: Tensor) -> list[Tensor]:
    """Those of the integer arguments that could be the labels of the losses."""
    fitting = [arg for arg in integers if arg.numel() == losses.numel() and arg.device == losses.device]
    return [arg for arg in fitting if arg.shape == losses.shape] or fitting


def _is_integer(arg: object) -> TypeGuard[Tensor]:
    """Whether an argument of the criterion is a tensor of integers with at least one dimension."""
    if not isinstance(arg, Tensor) or arg.dim() == 0:
        return False
    return not (arg.is_floating_point() or arg.is_complex() or arg.dtype == torch.bool)


def _of_criterion(criterion: object) -> int | None:
    """The ignore_index of a criterion that has one itself, as torch.nn.NLLLoss."""
    return _numbers.integer(getattr(criterion, "ignore_index", None))
