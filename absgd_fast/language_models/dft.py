"""Dynamic fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor

from ..linear import LinearABLoss
from ..robust import ABLoss
from ..robust.options import flag

_DEFINES_DFT: dict[str, Any] = {"lam": -1.0, "normalizer": "none"}


@overload
def DFT(criterion: Callable[..., Tensor] | None = None, *, linear: Literal[False] = False, **options: Any) -> ABLoss: ...
@overload
def DFT(criterion: Callable[..., Tensor] | None = None, *, linear: Literal[True], **options: Any) -> LinearABLoss: ...
def DFT(criterion: Callable[..., Tensor] | None = None, *, linear: bool = False, **options: Any) -> ABLoss | LinearABLoss:
    """Dynamic fine-tuning (DFT): the robust loss with W = exp(-L), which for cross-entropy is p(label).

        loss = (1/n) sum_i exp(-L_i) L_i            the weight is a constant for autograd; n: how many tokens count

    A token counts by how probable the model already finds it. This is lam=-1 with normalizer="none", where log s' = 0 always
    (docs/MATH.md §1.2; Wu et al. 2025). With deferred=True n counts the tokens of all micro-batches of an optimizer step.

    Args:
        criterion: as for `ABLoss`; None: `CrossEntropy()`.
        linear: True: a `LinearABLoss`, which takes the inputs of the head and stores no logits. False: an `ABLoss`.
        **options: other options of the class, such as deferred, process_group, loss_divisor, max_weight and backend.

    Returns:
        An `ABLoss`, or with linear=True a `LinearABLoss`.

    Raises:
        ValueError: lam, normalizer or rule, which would make another loss; linear is no bool; the others as for the class.

    >>> criterion = DFT()
    >>> _ = criterion(torch.zeros(1, 4, requires_grad=True), torch.tensor([2]))
    >>> criterion.last.weights
    tensor([0.2500])
    """
    cls = LinearABLoss if flag(linear, "linear") else ABLoss
    for name in (*_DEFINES_DFT, "rule"):
        if name in options:
            why = f"always has {name}={_DEFINES_DFT[name]!r}" if name in _DEFINES_DFT else "has no rule"
            raise ValueError(
                f"{name}: got {options[name]!r}, but DFT {why}; leave {name} out, or use {cls.__name__} for another loss"
            )
    made: ABLoss | LinearABLoss = cls(criterion, **_DEFINES_DFT, **options)
    return made
