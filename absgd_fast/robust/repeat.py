"""A training forward that repeats the one before it: what both need is found once.

The usual way of a forward (paths.py `fused`) asks who settles log s', which loss, which backend, and collects the arguments of
the operator. For most trainings the answers never change. So the first forward of this kind leaves a `Repeat`, and the next ones
go straight to the operator, as long as nobody has set an attribute of a robust loss or of its criterion (`_exact.CHANGES`).
Everything else that may differ between two forwards is looked at each time, here or in csrc/eager.cpp. If anything differs, the
usual way serves; it also says mistakes in plain words.

Measured (instructions of forward and backward by callgrind, 1 x 2): docs/design-cpu.md, decision 51.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .._exact import CHANGES
from ..ops import LossSpec
from .base import RobustLoss
from .derivative import derivative
from .last import Memo, Weighed
from .processes import is_distributed


class Repeat(NamedTuple):
    """What the forward before found out."""

    changes: int  # `CHANGES.count` at that time
    run: Callable[..., tuple[Tensor, Tensor] | None]  # of csrc/eager.cpp
    arguments: tuple  # of the operator, without logits and target
    spec: LossSpec
    nonfinite: Tensor  # the buffer that `arguments` has
    lam: Tensor


def remember(memo: Memo, run: Callable, given: tuple, operands: tuple, spec: LossSpec) -> None:
    """Leave a `Repeat` for the next forward. given, operands: the arguments of the operator."""
    if not is_distributed():  # otherwise each forward asks whether the process group is still there
        memo.repeat = Repeat(CHANGES.count, run, (*given[2:], *operands), spec, operands[1], operands[2])


def weighed_again(criterion: RobustLoss, args: tuple) -> Weighed | None:
    """The robust loss of a training forward that repeats the one before, or None if the usual way has to serve."""
    repeat = criterion.memo.repeat
    if repeat is None or repeat.changes != CHANGES.count or len(args) != 2 or is_distributed():
        return None
    if criterion._buffers["nonfinite_batches"] is not repeat.nonfinite:
        return None
    logits, target = args
    lam = repeat.lam
    again = derivative, criterion, repeat.spec, target, None, None, None, lam
    try:
        attached = repeat.run(logits, target, *repeat.arguments, again)
    except RuntimeError:
        return None
    return None if attached is None else (*attached, None, lam)


def can_repeat(criterion: RobustLoss, spec: LossSpec) -> bool:
    """Whether the next forward is the same as long as no attribute changes: class weights and the like may change in place."""
    plain = spec.class_weight is None and spec.adjust is None and not spec.smoothing
    return plain and not (criterion.lam_is_open or criterion.reports_mean)
