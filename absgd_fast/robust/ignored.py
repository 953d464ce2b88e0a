"""The rows that a user's criterion ignores because of their labels."""

from __future__ import annotations

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

    Labels are the last of the criterion's arguments that is an integer tensor of the shape of the losses.

    Args:
        ignore_index: None: that of the criterion itself, if it has one and labels.
        args: what the criterion was called with. losses: what it returned.

    Raises:
        ValueError: ignore_index is given, but there are no labels.
    """
    label = _of_criterion(criterion) if ignore_index is None else ignore_index
    if label is None:
        return mask
    target = next((arg for arg in reversed(args) if _are_labels(arg, losses)), None)
    if target is None:
        if ignore_index is None:
            return mask
        shapes = [tuple(arg.shape) for arg in args if isinstance(arg, Tensor)]
        raise ValueError(
            f"ignore_index: got {ignore_index}, but arguments of shapes {shapes}, of which none is integer and has the shape of"
            f" the losses, {tuple(losses.shape)}; expected labels of that shape after the logits, or mask= instead"
        )
    counts = target.detach() != label
    return counts if mask is None else counts & mask


def _are_labels(arg: object, losses: Tensor) -> bool:
    """Whether an argument of the criterion has one integer per loss."""
    if not isinstance(arg, Tensor) or arg.shape != losses.shape or arg.device != losses.device:
        return False
    return not (arg.is_floating_point() or arg.is_complex() or arg.dtype == torch.bool)


def _of_criterion(criterion: object) -> int | None:
    """The ignore_index of a criterion that has one itself, as torch.nn.NLLLoss."""
    return _numbers.integer(getattr(criterion, "ignore_index", None))
