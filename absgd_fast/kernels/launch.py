"""Helpers of every launch, on the host: numbers, the counter of finished programs, the device."""

from __future__ import annotations

import math
from ctypes import c_float
from functools import lru_cache

import torch
from torch import Tensor
from triton.runtime import driver

from ..reference import real_dtype as real_dtype  # the dtype that losses and sums are computed in

ONE_LAUNCH = 16384  # one program weighs up to so many losses; more take several programs and more than one launch
MOST_PARTIALS = 1024  # most programs that share the sum over more losses; one block holds their partial sums

FENCE = 64 if torch.version.hip else 0  # threads of a wave, where each wave must wait for its stores (weigh.last_program)

# The last program of a kernel needs twice the registers that every program needs for the rows. It would halve the number of
# programs that run at once. With this cap it spills a little instead (96 -> 64 registers, 48 bytes, at 512 x 1000 on sm_90).
# The option is Triton's for NVIDIA. float64 has no cap, because the rows need more registers there, too.
FEW_REGISTERS = {torch.float32: {"maxnreg": 64}} if torch.version.cuda else {}


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n = 0."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def unit(itemsize: int, *counts: int) -> int:
    """The most elements, within a 16-byte load, that divide all of `counts` (lengths and strides of rows): 1, 2, 4 or 8."""
    return math.gcd(16 // itemsize, *counts)


@lru_cache(4096)
def parts(*numbers: float) -> tuple[float, ...]:
    """Each number as two, high and low. A Python float reaches a kernel as float32; high + low keeps 48 bits of it.

    >>> high, low = parts(0.1)
    >>> abs(0.1 - high) > 1e-9, abs(0.1 - high - low) < 1e-16
    (True, True)
    """
    out = []
    for x in numbers:
        high = c_float(x).value
        out += [high, c_float(x - high).value if math.isfinite(high) else 0.0]
    return tuple(out)


# Triton 3.10 will no longer contract a * b + c by itself, and 3.9 warns of that. The kernels are tested with contraction.
OPTIONS = {"enable_fp_fusion": True}


def launch(kernel, programs: int, like: Tensor, *args, **options) -> None:
    """Start `programs` programs of a kernel on the device of `like`. Triton by itself starts them on the current device."""
    options = OPTIONS | options
    index = like.get_device()  # -1 is the CPU, in Triton's interpreter
    if index < 0 or index == torch.accelerator.current_device_index():
        kernel[(programs,)](*args, **options)
        return
    with torch.accelerator.device_index(index):
        kernel[(programs,)](*args, **options)


def captures(like: Tensor) -> bool:
    """Whether a launch on the device of `like` would now become part of a captured graph."""
    return like.is_cuda and torch.cuda.is_current_stream_capturing()


_counters: dict[tuple[int, int], Tensor] = {}


def counter(like: Tensor) -> Tensor:
    """The counter of finished programs, (1) int32, which is 0 before and after every launch (weigh.last_program).

    Each stream has one, because its kernels follow each other. A captured graph may run on any stream, so it gets its own.
    """
    index = like.get_device()
    if captures(like):
        return torch.zeros(1, dtype=torch.int32, device=like.device)
    key = index, 0 if index < 0 else driver.active.get_current_stream(index)
    done = _counters.get(key)
    if done is None:
        done = _counters[key] = torch.zeros(1, dtype=torch.int32, device=like.device)
    return done
