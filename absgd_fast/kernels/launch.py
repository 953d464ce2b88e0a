"""What every launch needs on the host: numbers, the counter of finished programs, the device."""

from __future__ import annotations

import math
from ctypes import c_float
from functools import lru_cache

import torch
from torch import Tensor
from triton.runtime import driver

from ..reference import real_dtype as real_dtype  # what losses and sums are computed in

ONE_LAUNCH = 16384  # up to so many losses are weighted by one program; beyond, by many and in more than one launch
MOST_PARTIALS = 1024  # programs that share the sum over more losses: one block holds their partial sums

FENCE = 64 if torch.version.hip else 0  # threads of a wave that has to wait for its stores: weigh.last_program

# The last program of a kernel needs twice the registers that all of them need for the rows, and would halve the number
# of programs that run at once; with this cap it spills a little instead (96 -> 64 and 48 bytes at 512 x 1000, sm_90).
# An option of Triton for NVIDIA; float64 needs more for the rows too.
FEW_REGISTERS = {torch.float32: {"maxnreg": 64}} if torch.version.cuda else {}


def power_of_two(n: int) -> int:
    """The smallest power of two >= n (1 for n = 0)."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def unit(itemsize: int, *counts: int) -> int:
    """How many elements of a 16-byte load divide all of `counts` (lengths and strides of rows): 1, 2, 4 or 8."""
    return math.gcd(16 // itemsize, *counts)


@lru_cache(4096)
def parts(*numbers: float) -> tuple[float, ...]:
    """high, low of each number: a Python float reaches a kernel as float32, and high + low has 48 bits of it.

    >>> high, low = parts(0.1)
    >>> abs(0.1 - high) > 1e-9, abs(0.1 - high - low) < 1e-16
    (True, True)
    """
    out = []
    for x in numbers:
        high = c_float(x).value
        out += [high, c_float(x - high).value if math.isfinite(high) else 0.0]
    return tuple(out)


# Triton 3.10 will no longer contract a * b + c by itself, and 3.9 warns of that; the kernels are tested with it.
OPTIONS = {"enable_fp_fusion": True}


def launch(kernel, programs: int, like: Tensor, *args, **options) -> None:
    """Start `programs` programs on the device of `like` (Triton starts them on the current one)."""
    options = OPTIONS | options
    index = like.get_device()  # -1: the CPU, in Triton's interpreter
    if index < 0 or index == torch.accelerator.current_device_index():
        kernel[(programs,)](*args, **options)
        return
    with torch.accelerator.device_index(index):
        kernel[(programs,)](*args, **options)


def captures(like: Tensor) -> bool:
    """Whether what is launched now, on the device of `like`, becomes part of a graph."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


_counters: dict[tuple[int, int], Tensor] = {}


def counter(like: Tensor) -> Tensor:
    """(1) int32, the number of programs that are done: 0 before and after every launch (weigh.last_program).

    One for each stream, whose kernels follow each other. A captured graph may run on any stream, so it gets its own.
    """
    index = like.get_device()
    if captures(like):
        return torch.zeros(1, dtype=torch.int32, device=like.device)
    key = index, 0 if index < 0 else driver.active.get_current_stream(index)
    done = _counters.get(key)
    if done is None:
        done = _counters[key] = torch.zeros(1, dtype=torch.int32, device=like.device)
    return done
