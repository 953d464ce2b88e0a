"""Tensors in the layout that a kernel walks over, and back again.

A kernel walks through the memory of a parameter. So its gradient and its states must lie in the same layout.
"""

from __future__ import annotations

from torch import Tensor, empty_like


def fit(lists: list[list[Tensor]]) -> list[list[Tensor]]:
    """The lists with all tensors in the layout of their parameters, which are the first list.

    Each parameter of the result fills a block of memory. A tensor that lies otherwise is replaced by a copy.

    Returns:
        The lists themselves if nothing had to be copied.

    Raises:
        ValueError: A gradient or state has another shape than its parameter.
    """
    params, *others = lists
    counts = [p.numel() for p in params]
    # Contiguous tensors of one size lie alike. Only other tensors are looked at.
    contiguous = all([t.is_contiguous() for ts in lists for t in ts])
    if contiguous and not any([[t.numel() for t in ts] != counts for ts in others]):
        return lists
    like = [p if _is_dense(p) else p.contiguous() for p in params]
    return [like, *([_laid_out_like(t, p) for t, p in zip(ts, like)] for ts in others)]


def write_back(originals: list[Tensor], copies: list[Tensor]) -> None:
    """Copy the results back into the original tensors, wherever `fit` has made a copy."""
    for original, copy in zip(originals, copies):
        if copy is not original:
            original.copy_(copy)


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill a block of memory, each place once. The order of dimensions does not matter (channels_last)."""
    block = 1
    for stride, size in sorted((stride, size) for size, stride in zip(t.shape, t.stride()) if size > 1):
        if stride != block:
            return False
        block *= size
    return True


def _laid_out_like(t: Tensor, like: Tensor) -> Tensor:
    """The tensor t in the layout of `like`, which is dense: t itself, or a copy."""
    if t.shape != like.shape:
        raise ValueError(
            f"step_: got a gradient or state of shape {tuple(t.shape)} for a parameter of shape {tuple(like.shape)},"
            " expected the same shape"
        )
    if all(a == b for a, b, size in zip(t.stride(), like.stride(), t.shape) if size > 1):
        return t
    return empty_like(like, dtype=t.dtype).copy_(t)
