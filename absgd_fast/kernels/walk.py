"""How the programs of a launch share logits, and whether these have to be copied for that."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from . import launch


class Walk:
    """How the programs of a launch share logits of one shape and layout. Chosen by reasoning, not by measurement: 8 or 16
    elements a thread, so that several loads of 16 bytes are under way, and one row per program as soon as a row fills it."""

    __slots__ = ("backward", "backward_programs", "constants", "numbers", "programs", "warps")

    def __init__(self, batch, classes, inner, strides, itemsize, aligned):
        stride_batch, stride_class, stride_inner = strides
        outer, lanes, stride_outer, stride_lane = batch, inner, stride_batch, stride_inner
        if inner == 1:
            outer, lanes, stride_outer, stride_lane = 1, batch, 0, stride_batch
        # the stride of a dimension of one element can be anything
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
        # a tile does not reach from one sample into the next; a batch that is a little smaller is no reason to compile
        tallest = launch.power_of_two(lanes) if inner > 1 else 2048
        # Forward: classes are looped over.
        width = launch.power_of_two(classes)
        block = min(width, 8 if along_lanes else 4096)
        rows = min(tallest, 256 if along_lanes else max(1, 1024 // block))
        self.constants = dict(layout, INNER=inner > 1, ROWS=rows, BLOCK=block, SKIP=rows == 1 and classes > block)
        self.programs = outer * -(-lanes // rows)
        self.warps = 8 if block > 2048 else 4
        # Backward: every block of classes is a program. 32 classes side by side keep rereading of the rows' numbers rare.
        block = min(width, 32 if along_lanes else 2048)
        rows = min(tallest, max(1, 2048 // block))
        self.backward = dict(layout, INNER=inner > 1, ROWS=rows, BLOCK=block)
        self.backward_programs = outer * -(-lanes // rows) * -(-classes // block)


@lru_cache(4096)
def _walk_over(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, aligned: bool) -> Walk | None:
    """None where d1, ... have no common stride."""
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
    """logits, copied only where that is needed, and how to walk over them."""
    walk = _walk_over(logits.shape, logits.stride(), logits.element_size(), logits.data_ptr() % 16 == 0)
    return (logits, walk) if walk is not None else walked(logits.contiguous())
