"""Which dtype things are computed in."""

from __future__ import annotations

import torch


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype losses and sums are computed in: float64 for float64, float32 for everything narrower.

    A loss of 10 rounded to bfloat16 is off by up to 0.03, which an exponential turns into a weight that is off by 3 %.

    >>> real_dtype(torch.bfloat16)
    torch.float32
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
