"""How the programs of a launch share logits, and whether the logits must be copied for that."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from . import launch


class Walk:
    """How the programs of a launch share logits of one shape and layout.

    The sizes of tiles were chosen by reasoning, not by measurement. A thread has 8 or 16 elements, so several loads of 16 bytes
    are under way. A program takes a single row as soon as one row fills it.

    Attributes:
        numbers: lanes, classes and three strides, as the kernels take them.
        constants, programs, warps: constants, number of programs and of warps of a forward kernel.
        backward, backward_programs: constants and number of programs of the backward kernel.
    """

    __slots__ = ("backward", "backward_programs", "constants", "numbers", "programs", "warps")

    def __init__(self, batch, classes, inner, strides, itemsize, aligned):
        stride_batch, stride_class, stride_inner = strides
        outer, lanes, stride_outer, stride_lane = batch, inner, stride_batch, stride_inner
        if inner == 1:
            outer, lanes, stride_outer, stride_lane = 1, batch, 0, stride_batch
        # The stride of a dimension with one element can be anything.
        stride_outer, stride_lane = stride_outer * (outer > 1), stride_lane * (lanes > 1)
        stride_class = stride_class * (classes > 1)
        self.numbers = lanes, classes, stride_outer, stride_lane, stride_class
        along_lanes = lanes > 1 and stride_class != 1 and (classes <= 1 or stride_lane < stride_class)
        if stride_class == 1:
            adjacent, counts = "classes", (classes, stride_outer, stride_lane)
        elif stride_lane == 1:
            adjacent, counts = "lanes", (lanes, stride_outer, stride_class)
        else:
            adjacent, counts = "neither", ()
        unit = launch.unit(itemsize, *counts) if aligned and counts else 1
        layout = {"ADJACENT": adjacent, "UNIT": unit}
        # A tile does not reach from one sample into the next. The rows of a tile do not depend on the size of the batch, so a
        # batch that is a little smaller needs no other kernel.
        tallest = launch.power_of_two(lanes) if inner > 1 else 2048
        # Forward: a program loops over the classes.
        width = launch.power_of_two(classes)
        block = min(width, 8 if along_lanes else 4096)
        rows = min(tallest, 256 if along_lanes else max(1, 1024 // block))
        self.constants = dict(layout, INNER=inner > 1, ROWS=rows, BLOCK=block, SKIP=rows == 1 and classes > block)
        self.programs = outer * -(-lanes // rows)
        self.warps = 8 if block > 2048 else 4
        # Backward: every block of classes has a program. With 32 classes side by side the rows' numbers are seldom read again.
        block = min(width, 32 if along_lanes else 2048)
        rows = min(tallest, max(1, 2048 // block))
        self.backward = dict(layout, INNER=inner > 1, ROWS=rows, BLOCK=block)
        self.backward_programs = outer * -(-lanes // rows) * -(-classes // block)


@lru_cache(4096)
def _walk_over(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, aligned: bool) -> Walk | None:
    """The walk over logits of this shape, or None if the dimensions d1, ... have no common stride."""
    inner, stride_inner = 1, 1
    for size, stride in zip(reversed(shape[2:]), reversed(strides[2:])):
        if size == 1:
            continue
        if inner == 1:
            stride_inner = stride
        elif stride != inner * stride_inner:
            return None
        inner *= size
    return Walk(shape[0], shape[1], inner, (strides[0], strides[1], stride_inner), itemsize, aligned)


def walked(logits: Tensor) -> tuple[Tensor, Walk]:
    """The logits, which are copied only if no walk fits them, and the walk over them."""
    walk = _walk_over(logits.shape, logits.stride(), logits.element_size(), logits.data_ptr() % 16 == 0)
    return (logits, walk) if walk is not None else walked(logits.contiguous())
