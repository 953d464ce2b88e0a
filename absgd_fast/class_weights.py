"""Class weights from the numbers of samples per class (docs/MATH.md §2.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks


def class_balanced_weights(cls_num_list: Sequence[int], beta: float = 0.9999) -> Tensor:
    """Class-balanced weights (Cui et al. 2019, Eq. 12; docs/MATH.md §2.3).

        w_j proportional to (1 - beta) / (1 - beta^N_j),    sum_j w_j = C

    Args:
        cls_num_list: number of samples N of each class, positive.
        beta: in [0, 1); 0 gives equal weights.

    Returns:
        (C) float32 class weights, for the argument `weight` of the losses and for `DRW`.

    Raises:
        ValueError: a number of samples that is not positive, or beta outside [0, 1).

    >>> class_balanced_weights([1000, 10], beta=0.9)
    tensor([0.7888, 1.2112])
    """
    counts = _float64(_checks.class_counts(cls_num_list))
    beta = _checks.within(beta, "beta", 0, 1, open_above=True)
    return _normalised((1 - beta) / -torch.expm1(counts * math.log(beta)) if beta else torch.ones_like(counts))


def adrw_weights(cls_num_list: Sequence[int], nu: float) -> Tensor:
    """The class weights of aligned deferred re-weighting, ADRW (Wang et al. 2023, Sec. 3.3; docs/MATH.md §2.3).

        w_j proportional to pi_j^(-nu),    sum_j w_j = C,    pi_j = N_j / sum_k N_k

    Args:
        cls_num_list: number of samples N of each class, positive.
        nu: >= 0; 0 gives equal weights.

    Returns:
        (C) float32 class weights, for `DRW`.

    Raises:
        ValueError: a number of samples that is not positive, or a negative nu.

    >>> adrw_weights([3, 1], nu=1.0)
    tensor([0.5000, 1.5000])
    """
    counts = _float64(_checks.class_counts(cls_num_list))
    return _normalised((counts / counts.sum()) ** -_checks.within(nu, "nu", 0, math.inf))


def _float64(counts: list[float]) -> Tensor:
    return torch.tensor(counts, dtype=torch.float64, device="cpu")


def _normalised(weights: Tensor) -> Tensor:
    """Weights that sum to their number, float32. ValueError if they are too far apart to be numbers."""
    return _checks.per_class_finite((weights * (len(weights) / weights.sum())).float(), "class weights")
