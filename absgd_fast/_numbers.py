"""What is a number.

Every number that a user gives goes through one of these functions, and is kept as Python's own float or int. So a state_dict, a
pickle and the cache of torch.compile hold no scalars of NumPy. NumPy registers its scalars with the classes of `numbers`.
"""

from __future__ import annotations

from decimal import Decimal
from numbers import Integral, Real
from operator import index
from typing import Any

import torch
from torch import Tensor


def real(value: object, tensors: bool = False) -> float | None:
    """A real number as a float: of Python, NumPy, `fractions` or `decimal`; None for anything else, which a bool is too.

    None also for a number that is too large for a float, and for a signaling NaN.

    tensors: whether a tensor of one real number is a number.
    """
    if type(value) is float:
        return value
    if isinstance(value, Tensor):
        return float(value) if tensors and value.numel() == 1 and value.dtype != torch.bool and not value.is_complex() else None
    if not is_real(value):
        return None
    try:
        return float(value)  # type: ignore[arg-type]  # `is_real` has asked for its type
    except (OverflowError, ValueError):
        return None


def is_real(value: object) -> bool:
    """Whether it is a real number of Python, NumPy, `fractions` or `decimal`, of any size. A bool is none."""
    return isinstance(value, (Real, Decimal)) and not isinstance(value, bool)


def _is_bool(value: object) -> bool:
    """Whether it is True or False, of Python or NumPy. NumPy before 2.3 takes its own for an index."""
    kind = getattr(getattr(value, "dtype", None), "kind", None)
    return isinstance(value, bool) or (kind == "b" and getattr(value, "ndim", None) == 0)


def listed(values: Any) -> list[float] | None:
    """The numbers of a sequence or array as Python's, also those of 0-d tensors and arrays; None for anything else."""
    try:
        numbers = list(values.tolist() if hasattr(values, "tolist") else values)
    except TypeError:  # no sequence
        return None
    numbers = [number.item() if getattr(number, "ndim", None) == 0 else number for number in numbers]
    return None if any(real(number) is None for number in numbers) else plain(numbers)


def integer(value: object, tensors: bool = False) -> int | None:
    """An integer as an int: whatever has `__index__`; None for anything else, which a bool is too.

    tensors: whether a tensor of one integer is an integer.
    """
    if type(value) is int:
        return value
    if _is_bool(value) or (isinstance(value, Tensor) and (not tensors or value.dtype == torch.bool)):
        return None
    try:
        return index(value)  # type: ignore[arg-type]  # TypeError says that it is no integer
    except TypeError:
        return None


def plain(value: Any) -> Any:
    """A number or bool as Python's own int, float or bool, also within a tuple or a list; anything else as it is.

    It serves numbers that somebody else checks, as torch's optimizers check theirs.
    """
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    if type(value) in (float, int, bool):
        return value
    if _is_bool(value):
        return bool(value)
    number = int(value) if isinstance(value, Integral) else real(value)
    return value if number is None else number
