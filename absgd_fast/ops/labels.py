"""Labels out of range. On the CPU they raise IndexError at once. On a GPU a later call raises it, because checking would wait."""

from __future__ import annotations

import re
from functools import cache

import torch
from torch import Tensor

from .. import _checks

_BAD_LABEL = re.compile(r"absgd_fast label out of range: label=(-?\d+) row=(\d+) classes=(\d+)( in an earlier call)?;")


def translated(error: RuntimeError, first_row: int = 0) -> Exception:
    """The IndexError of a label out of range, for the RuntimeError that the stable ABI makes of every C++ error; other errors are
    returned as they are. first_row: the number of the first row of this call."""
    found = _BAD_LABEL.search(str(error))
    if found is None:
        return error
    label, row, classes = map(int, found.groups()[:3])
    earlier = found.group(4) is not None
    return bad_label(label, row if earlier else row + first_row, classes, earlier)


def bad_label(label: int, row: int, classes: int, earlier: bool = False) -> IndexError:
    """The error for a label out of range. earlier: it was in an earlier batch."""
    return IndexError(
        f"target: label {label} in row {row} (counted over the flattened target){' of an earlier batch' if earlier else ''},"
        f" expected 0 <= label < {classes}; mark rows that must not count with the label `ignore_index`"
    )


def check_labels(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """Labels that are safe to index with, for backends whose kernels cannot raise.

    On the CPU the first label out of range raises IndexError. On a GPU its row is ignored and a later call raises, because the
    host does not wait for the GPU. (Indexing with the label would destroy the CUDA context.) Labels without values pass.
    """
    if not _checks.has_values(target):
        return target
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if target.device.type == "cpu":
        if bad.any():
            row = int(bad.flatten().nonzero()[0])
            raise bad_label(int(target.flatten()[row]), row, classes)
        return target
    if target.numel() and not torch.compiler.is_compiling():
        report, seen = reported_labels(check=True), _seen_labels(target.device)
        first = bad.flatten().to(torch.uint8).argmax()
        label = target.flatten().gather(0, first.reshape(1))[0].long()
        found = torch.stack([label, first, torch.full_like(first, classes), torch.ones_like(first)])
        seen.copy_(torch.where(bad.any() & (seen[3] == 0), found, seen))
        report.copy_(seen, non_blocking=True)
    return target.masked_fill(bad, ignore_index)


@cache
def _report() -> Tensor:
    return torch.zeros(4, dtype=torch.int64, device="cpu", pin_memory=torch.cuda.is_available())


_seen: dict[torch.device, Tensor] = {}


def _seen_labels(device: torch.device) -> Tensor:
    if device not in _seen:
        _seen[device] = torch.zeros(4, dtype=torch.int64, device=device)
    return _seen[device]


def reported_labels(check: bool) -> Tensor:
    """(label, row, classes, 1) of a label out of range, or zeros, in memory that host and GPU share.

    check: raise IndexError if an earlier call has left a label here.
    """
    report = _report()
    if check:
        label, row, classes, found = report.numpy()
        if found == 1:
            report.zero_()
            for seen in _seen.values():
                seen.zero_()
            raise bad_label(int(label), int(row), int(classes), earlier=True)
    return report


@cache
def kernels_can_report() -> bool:
    """Whether a GPU's kernels can write into the memory of `reported_labels`."""
    return torch.cuda.is_available() or not torch.xpu.is_available()


def report_of_kernels() -> Tensor | None:
    """`reported_labels(check=True)` for a kernel to write into.

    None on Intel's GPUs, for which that memory is not pinned: there the kernels ignore a row with a label out of range, and
    nothing is raised. What `check_labels` finds is copied into that memory by torch, so it is raised on every device.
    """
    report = reported_labels(check=True)
    return report if kernels_can_report() else None
