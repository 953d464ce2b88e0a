"""The tables of a step in device memory: the addresses and sizes of its tensors, and the tensor of each program.

A table is uploaded once for a set of tensors and never written again. So a captured graph may keep using it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from . import launch
from .launch import real_dtype

_KEPT = 64  # sets of tensors whose tables are kept, and for which pinned memory is reserved


class Table(NamedTuple):
    """The tables of one set of tensors."""

    table: Tensor  # (tensors, 8) int64: parameter, gradient, elements, first program, count of steps, three states
    owner: Tensor  # (programs) int32: the tensor of each program
    corrected: Tensor  # (tensors, 2) real: scratch, where the step writes the corrections that depend on the counts
    aligned: bool  # every address is a multiple of 16
    overlaps: bool  # some of the tensors that are written share memory


_tables: OrderedDict[tuple, Table] = OrderedDict()
_captured: list = []  # the tensors that captured graphs read again at every replay


def _pinned(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=device.type != "cpu")


class Reserve:
    """Pinned memory for uploads while a stream is captured, when CUDA may refuse to allocate any.

    A graph copies from this memory at every replay. So memory that was taken is neither written again nor given back.
    """

    def __init__(self) -> None:
        self.memory, self.left = torch.empty(0, dtype=torch.uint8, device="cpu"), 0
        self.sizes: OrderedDict[tuple, int] = OrderedDict()
        self.needed = 0

    def know(self, tensors: tuple, size: int) -> None:
        """Remember a set of tensors whose uploads take `size` bytes. A graph may upload it again, with other addresses."""
        self.sizes[tensors] = size
        self.sizes.move_to_end(tensors)
        if len(self.sizes) > _KEPT:
            self.sizes.popitem(last=False)
        self.needed = sum(self.sizes.values())

    def refill(self, device: torch.device) -> None:
        """Allocate as much as the graph of a step with all remembered sets needs. Call it outside of a capture."""
        if self.left < self.needed:
            self.memory, self.left = _pinned(self.needed, device), self.needed

    def take(self, size: int, device: torch.device) -> Tensor:
        """Memory of `size` bytes. If there is not enough left, torch is asked for it."""
        if size > self.left:
            return _pinned(size, device)
        taken, self.memory, self.left = self.memory[:size], self.memory[size:], self.left - size
        return taken


_reserve = Reserve()


class _Upload(NamedTuple):
    device: Tensor
    host: Tensor


def _room(numbers: Tensor) -> int:
    """The bytes that these numbers take, rounded up to where the next ones may begin."""
    return -(-numbers.nbytes // 16) * 16


def _upload(numbers: list[int], dtype: torch.dtype, device: torch.device, captures: bool) -> _Upload:
    """Copy numbers to the device, without waiting for it."""
    if captures:
        plain = torch.tensor(numbers, dtype=dtype, device="cpu")
        host = _reserve.take(_room(plain), device)[: plain.nbytes].view(dtype).copy_(plain)
    else:
        host = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=device.type != "cpu")
    return _Upload(host.to(device, non_blocking=True), host)


def _overlap(ranges: list[tuple[int, int]]) -> bool:
    ranges = sorted(ends for ends in ranges if ends[0] < ends[1])
    return any(end > start for (_, end), (start, _) in pairwise(ranges))


def table_of(
    tensors: Sequence[Sequence[Tensor]], counts: tuple[int, ...], steps: list[Tensor], slots: tuple[int, ...], block: int
) -> Table:
    """The tables of a set of tensors. A set that was seen before keeps its tables.

    Args:
        tensors: parameters, gradients, then each kind of state.
        counts: elements of each parameter.
        steps: the count of steps of each parameter; empty if the rule counts none.
        slots: the places of the kinds of states among the three of a table.
        block: elements that a program takes.
    """
    like = tensors[0][0]
    pointers = tuple([t.data_ptr() for ts in (*tensors, steps) for t in ts])
    index = like.get_device()
    stream = 0 if index < 0 else driver.active.get_current_stream(index)
    key = pointers, counts, slots, block, like.dtype, index, stream
    captures = launch.captures(like)
    table = _tables.get(key)
    if table is None:
        aligned = not any(pointer % 16 for pointer in pointers[: len(pointers) - len(steps)])
        table, uploads = _make(tensors, counts, steps, slots, block, aligned, captures)
        if captures:  # The copies are a part of the graph: none has run yet, and every replay runs them again.
            _captured.append((*uploads, table.corrected))
            return table
        _reserve.know(key[1:], sum(_room(upload.host) for upload in uploads))
        _tables[key] = table
        if len(_tables) > _KEPT:
            _tables.popitem(last=False)
    if captures:
        _captured.append(table)
    else:
        _reserve.refill(like.device)
    _tables.move_to_end(key)
    return table


def _make(tensors, counts, steps, slots, block, aligned: bool, captures: bool) -> tuple[Table, tuple[_Upload, _Upload]]:
    """A new table, and its two uploads."""
    like = tensors[0][0]
    programs = [-(-count // block) for count in counts]
    first_programs = accumulate(programs, initial=0)
    params, grads, *states, counters = ([t.data_ptr() for t in ts] for ts in (*tensors, steps))
    none = [0] * len(counts)
    in_slots = [none] * 3
    for slot, addresses in zip(slots, states):
        in_slots[slot] = addresses
    rows = zip(params, grads, counts, first_programs, counters or none, *in_slots)
    table = _upload([field for row in rows for field in row], torch.int64, like.device, captures)
    owner = _upload([j for j, n in enumerate(programs) for _ in range(n)], torch.int32, like.device, captures)
    corrected = torch.empty(len(counts), 2, dtype=real_dtype(like.dtype), device=like.device)
    written = [t for ts in (tensors[0], *tensors[2:], steps) for t in ts]
    overlaps = _overlap([(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in written])
    return Table(table.device, owner.device, corrected, aligned, overlaps), (table, owner)
