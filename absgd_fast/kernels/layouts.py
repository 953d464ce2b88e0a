"""Tensors in the layout that a kernel walks over, and back again. A kernel counts through the memory of a parameter, so that whatever
belongs to the parameter has to lie as it does."""

from __future__ import annotations

from torch import Tensor, empty_like


def fit(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    """Parameters (the first list) that fill a block of memory each, and what belongs to them laid out alike; copies where they are
    not. The same lists where nothing had to be copied.

    Raises:
        ValueError: a gradient or state of another shape than its parameter.
    """
    params, *others = lists
    counts = [p.numel() for p in params]
    # contiguous tensors of one size lie alike; anything else is looked at
    contiguous = all([t.is_contiguous() for ts in lists for t in ts])
    if contiguous and not any([[t.numel() for t in ts] != counts for ts in others]):
        return lists
    like = [p if _is_dense(p) else p.contiguous() for p in params]
    return [like, *([_laid_out_like(t, p) for t, p in zip(ts, like)] for ts in others)]


def write_back(originals: list[Tensor], copies: list[Tensor]) -> None:
    for original, copy in zip(originals, copies):
        if copy is not original:
            original.copy_(copy)


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill a block of memory, each place once, in whatever order of dimensions (channels_last)."""
    block = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride()) if size > 1):
        if stride != block:
            return False
        block *= size
    return True


def _laid_out_like(t: Tensor, like: Tensor) -> Tensor:
    """t in the layout of `like`, which is dense; a copy where it is not."""
    if t.shape != like.shape:
        raise ValueError(f"step_: got a gradient or state of shape {tuple(t.shape)} for a parameter of {tuple(like.shape)}")
    if all(a == b for a, b, size in zip(t.stride(), like.stride(), t.shape) if size > 1):
        return t
    return empty_like(like, dtype=t.dtype).copy_(t)
