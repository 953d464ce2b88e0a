"""The scaling of gradients that the forward pass has made: the twin of csrc/cuda/scale.cu. "real" is as in weights.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .math import multiple


@triton.jit(do_not_specialize=["slices", "length", "classes"])
def scale_kernel(
    grad,  # (slices, length)
    upstream,  # real: one number (EACH = 0), one of each slice (1), (slices / classes, length) (2)
    out,  # (slices, length); may be grad itself
    slices,
    length,
    classes,
    EACH: tl.constexpr,
    IN_PLACE: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A gradient that the forward pass has made, times the upstream gradient. Each program has ROWS x BLOCK elements.

    1. It reads the upstream gradient. If this is the single number 1 and the gradient stays in place, nothing else is read.
    2. It reads its elements, multiplies each by the upstream gradient of its row, and stores the products.
    """
    length = multiple(length, UNIT)
    blocks = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    stop = length
    if EACH == 0:
        u = tl.load(upstream)
        if IN_PLACE:  # After loss.backward() u is 1, and the gradient is what it should be.
            stop = tl.where(u == 1, 0, length)
    elif EACH == 1:
        u = tl.load(upstream + row, mask=row < slices, other=0.0)[:, None]
    inside = (row < slices)[:, None] & (col < stop)[None, :]
    if EACH == 2:
        u = tl.load(upstream + (row // classes)[:, None] * length + col[None, :], mask=inside, other=0.0)
    place = row[:, None] * length + col[None, :]
    g = tl.load(grad + place, mask=inside, other=0.0).to(u.dtype)
    tl.store(out + place, (g * u).to(out.dtype.element_ty), mask=inside)


KERNELS = (scale_kernel,)

_BLOCK = 1024  # elements of a program


def _scale(grad: Tensor, upstream: Tensor, out: Tensor) -> None:
    n = out.numel()
    if not n:
        return
    if not any(upstream.stride()):  # a 0-d tensor, or one value that is expanded (the gradient of a sum)
        slices, length, classes, each = 1, n, 1, 0
    else:
        upstream = upstream.contiguous()
        if out.dim() == upstream.dim():  # the gradient of a vector of losses: each element has a factor of its own
            slices, length, classes, each = 1, n, 1, 2
        else:
            batch, classes = out.shape[:2]
            inner = n // (batch * classes)
            slices, length, each = (batch, classes, 1) if inner == 1 else (batch * classes, inner, 2)
    block = min(launch.power_of_two(length), _BLOCK)
    rows = min(_BLOCK // block, launch.power_of_two(slices))
    launch.launch(
        scale_kernel,
        -(-slices // rows) * -(-length // block),
        out,
        grad,
        upstream,
        out,
        slices,
        length,
        classes,
        EACH=each,
        IN_PLACE=out is grad,
        UNIT=launch.unit(out.element_size(), length),
        ROWS=rows,
        BLOCK=block,
    )


def scale(grad: Tensor, upstream: Tensor, to_half: bool) -> Tensor:
    """upstream * grad, for a gradient that the forward pass has made.

    Args:
        grad: contiguous, the gradient of a vector of losses or of logits (B, C, ...).
        upstream: real, 0-d or one number per row.
        to_half: whether the result is float16, for a float32 grad.
    """
    out = torch.empty_like(grad, dtype=torch.float16 if to_half else grad.dtype)
    _scale(grad, upstream, out)
    return out


def scale_(grad: Tensor, upstream: Tensor) -> None:
    """`scale` in place. If upstream is the single number 1, grad is neither read nor written."""
    _scale(grad, upstream, grad)
