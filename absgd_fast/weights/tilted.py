"""Tilted empirical risk minimisation, and exponentiated gradient (docs/MATH.md §4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from .. import functional as F
from .samples import VANISHED, Samples, prepared

# The range of |t| in which the kernels take 1/t as lambda
NATIVE_TILTS = (2.0**-64, 2.0**64)


def term(
    losses: Tensor,
    t: float,
    groups: Tensor | None = None,
    t_group: float | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Tilted empirical risk minimisation, TERM, flat or over groups (Li et al. 2021; docs/MATH.md §4.1).

        flat       p_i = exp(t L_i) / sum_j exp(t L_j),  the gradient of  (1/t) log mean_i exp(t L_i)
        grouped    R_g = (1/t) log mean_{i in g} exp(t L_i)
                   p   = gradient of (1/t_group) log((1/n) sum_g n_g exp(t_group R_g))
        W_i = n p_i

    t is 1/lambda: flat TERM has the weights of `ABLoss(lam=1 / t, gamma=1)`. With t < 0 it is exponentiated gradient (EG,
    min-min DRO). With groups p is the product of two softmaxes, one over the groups and one within each group. t_group = 0 (the
    default) weighs a group by its size. t = 0 with t_group > 0 tilts groups as wholes.

    Args:
        losses: any shape.
        t: tilt. > 0 attends to large losses, < 0 to small ones, 0 to all alike. +inf: only the largest losses, -inf: only the
            smallest, ties alike.
        groups: as losses, integers, equal for samples of the same group; None: flat.
        t_group: tilt between the groups, as t. At +-inf all samples of tied groups count alike.
        mask: as losses, bool; a sample with False is ignored.
        backend: of the flat form, which is one call of the kernel of `functional.robust_weights`.

    Returns:
        W, as losses; float64 for float64 losses, else float32. See `absgd_fast.weights`.

    Raises:
        ValueError: a tilt that is NaN, t_group without groups, or groups or mask of another shape.
        TypeError: groups that are not integers.

    >>> term(torch.tensor([0.0, 0.0, 1.0]), t=math.log(2.0))  # in proportion 1 : 1 : 2
    tensor([0.7500, 0.7500, 1.5000])
    >>> term(torch.tensor([1.0, 1.0, 2.0]), 0.0, groups=torch.tensor([5, 5, 7]), t_group=math.log(2.0))
    tensor([0.7500, 0.7500, 1.5000])

    Source: Li et al. 2021, "Tilted empirical risk minimization" (flat and hierarchical); EG: Majidi et al. 2021,
    "Exponentiated gradient reweighting for robust training under label noise and beyond".
    """
    t = _checks.tilt(t, "t")
    if groups is None and t_group is not None:
        raise ValueError(f"t_group: got {t_group!r} without groups, expected groups=, one integer per loss")
    losses, mask = prepared(losses, mask)
    if groups is None and NATIVE_TILTS[0] <= abs(t) <= NATIVE_TILTS[1]:
        gaps = _below_the_extreme(losses, t, mask)
        return F.robust_weights(gaps, -math.inf, 1 / t, gamma=1.0, mask=mask, backend=backend)[0]
    samples = Samples(losses, mask)
    one = torch.zeros_like(samples.x, dtype=torch.int64)
    if groups is None:
        return samples.weights(samples.n * _tilted(samples.x, samples.finite.double(), t, one)[0])
    within = _numbered(_checks.groups(groups, losses).flatten())
    t_group = _checks.tilt(0.0 if t_group is None else t_group, "t_group")
    sizes = torch.zeros_like(samples.x).index_add_(0, within, samples.finite.double())
    p, risks = _tilted(samples.x, samples.finite.double(), t, within)
    between, _ = _tilted(risks, sizes, t_group, one)
    return samples.weights(samples.n * between[within] * p)


def _below_the_extreme(losses: Tensor, t: float, mask: Tensor | None) -> Tensor:
    """The losses less the largest one (for t < 0 the smallest one), clamped where exp(t x) is 0 anyway.

    For the losses themselves t L could overflow, or be so large that log n is lost in rounding. A loss that does not count or is
    not finite stays as it is.
    """
    if not losses.numel():
        return losses
    sign = -1.0 if t < 0 else 1.0
    counts = losses.isfinite() if mask is None else losses.isfinite() & mask
    extreme = sign * (sign * losses).where(counts, -math.inf).max()
    limit = {"min": -VANISHED / t} if t > 0 else {"max": -VANISHED / t}
    return (losses - extreme).clamp(**limit).where(counts, losses)


def _numbered(groups: Tensor) -> Tensor:
    """The groups, numbered from 0.

    torch.unique would make the host wait for a GPU, because the size of its result depends on the values.
    """
    ordered, order = groups.sort()
    new = torch.ones_like(ordered)
    new[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, new.cumsum(0) - 1)


def _tilted(values: Tensor, counts: Tensor, t: float, segment: Tensor) -> tuple[Tensor, Tensor]:
    """Within each segment: the softmax weights p, and the tilted mean.

        p = counts exp(t values) / sum counts exp(t values),    mean = (1/t) log(sum counts exp(t values) / sum counts)

    Values with count 0 have no influence. t = 0 and t = +-inf give the limits.
    """
    zeros, taken = torch.zeros_like(values), counts > 0
    sign = -1.0 if t < 0 else 1.0
    extreme = zeros.scatter_reduce(0, segment, (sign * values).where(taken, -math.inf), "amax", include_self=False)
    gap = (sign * values - extreme[segment]).where(taken, 0.0)  # <= 0, so that nothing overflows
    exp = (gap == 0).double() if math.isinf(t) else (abs(t) * gap).exp()
    total = lambda x: zeros.index_add(0, segment, counts * x)  # noqa: E731
    sums, sizes = total(exp), zeros.index_add(0, segment, counts)
    if math.isinf(t):
        below = zeros
    elif t == 0:
        below = total(gap) / sizes
    else:
        less = total((abs(t) * gap).expm1()) / sizes  # mean exp - 1 without the cancellation at small t
        below = torch.where(less > -0.5, less.log1p(), (sums / sizes).log()) / abs(t)
    return (counts * exp / sums[segment]).where(taken, 0.0), sign * (extreme + below)
