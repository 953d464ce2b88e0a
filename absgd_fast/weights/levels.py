"""Rules that solve for a level: conditional value at risk, and the chi-squared ball (docs/MATH.md §4.3 and §4.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks, _numbers, ops
from .samples import VANISHED, Samples, kernels_for, prepared


def running_sum(x: Tensor) -> Tensor:
    """x.cumsum(0) by log2 n shifted additions, because torch has no deterministic cumsum on a GPU."""
    shift = 1
    while shift < len(x):
        x = torch.cat([x[:shift], x[shift:] + x[:-shift]])
        shift *= 2
    return x


def cvar(losses: Tensor, beta: float, reg: float = 0.0, *, mask: Tensor | None = None, backend: str | None = None) -> Tensor:
    """CVaR: gives the worst fraction beta of the samples the weight 1/beta and the others 0 (reg=0).

    The weighted mean is the conditional value at risk, the mean of the worst fraction beta of the losses (docs/MATH.md §4.3):

        max_p sum_i p_i L_i - reg KL(p || 1/n)     over  p_i <= 1 / (beta n),  sum_i p_i = 1

        reg = 0    p_i = 1 / (beta n) for the largest losses; ties at the boundary share the remainder equally
        reg > 0    p_i = min(exp((L_i - mu) / reg), 1 / beta) / n,  with mu such that sum_i p_i = 1

    Args:
        losses: any shape.
        beta: in (0, 1]; 1 is the plain mean.
        reg: weight of the KL penalty, >= 0, in the unit of the losses.
        mask: as losses, bool; a sample with False is ignored.
        backend: None (the fastest that can run), "cpu" (a kernel) or any other (torch's own operators).

    Returns:
        W_i = n p_i <= 1 / beta, as losses; float64 for float64 losses, else float32. `absgd_fast.weights`
            says what all rules have in common (nonfinite losses, gradients).

    Raises:
        ValueError: beta outside (0, 1], reg negative or not finite, or mask of another shape.

    >>> cvar(torch.tensor([1.0, 2.0, 3.0, 4.0]), beta=0.375)  # the worst row and a half
    tensor([0.0000, 0.0000, 1.3333, 2.6667])

    Source: Rockafellar & Uryasev 2000; Levy et al. 2020, "Large-scale methods for distributionally robust optimization".
    """
    beta, reg = _checks.within(beta, "beta", 0, 1, open_below=True), _checks.within(reg, "reg", 0, math.inf)
    losses, mask = prepared(losses, mask)
    if (kernels := kernels_for(losses, backend)) is not None:
        return kernels.rule_weights(losses, mask, ops.RULES_OF_LOSSES.index("cvar"), beta, reg)
    samples = Samples(losses, mask)
    if not len(samples.x):
        return samples.weights(samples.x)
    ordered, order = samples.x.where(samples.finite, -math.inf).sort(descending=True)
    if reg == 0:
        last = ((beta * samples.n).ceil().long() - 1).clamp(min=0)
        edge = ordered.gather(0, last.reshape(1))  # of shape (1), because a 0-d index would make the host wait
        above, ties = ((samples.finite & at).double() for at in (samples.x > edge, samples.x == edge))
        left = (samples.n - above.sum() / beta).clamp(min=0) / ties.sum()
        return samples.weights(above / beta + ties * left)
    # The k largest losses are at the bound. The others share n - k / beta in proportion to their exponentials. k is the smallest
    # number for which the largest of the others stays below the bound. The exponents z are sums of the gaps between neighbours,
    # each at most VANISHED, at which exp is 0. So losses of any size keep their differences.
    gaps = ((ordered[:-1] - ordered[1:]) / reg).clamp(max=VANISHED).nan_to_num(VANISHED)
    k, counts = samples.place(), samples.place() < samples.n
    z = torch.cat([gaps.new_zeros(1), -running_sum(gaps)]).where(counts, -math.inf)
    log_sum = z.flip(0).logcumsumexp(0).flip(0)  # at place k: over the losses from k on
    left = samples.n - k / beta
    can = (left > 0) & counts
    log_mu = log_sum - left.where(can, 1.0).log()
    fits = (z - log_mu <= -math.log(beta)) | (k >= can.sum() - 1)  # the last k with left > 0 fits always, but for rounding
    log_mu = log_mu.gather(0, (~fits).sum().clamp(max=len(k) - 1).reshape(1))
    w = (z - log_mu).exp().clamp(max=1 / beta)
    return samples.weights(torch.empty_like(w).scatter_(0, order, w))


def chi2(losses: Tensor, rho: float, *, mask: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The worst case in a chi-squared ball around the plain mean (docs/MATH.md §4.4).

        max_p sum_i p_i L_i     over  (1/2n) sum_i (n p_i - 1)^2 <= rho,  sum_i p_i = 1
        p_i proportional to max(L_i - mu, 0), with the largest mu that keeps to the bound

    Let k samples tie at the maximum. If rho >= (n/k - 1) / 2, the ball contains the uniform weights over these k samples, and
    they are the result. If all losses are equal, the weights are uniform over all samples.

    Args:
        losses: any shape.
        rho: >= 0; 0 is the plain mean.
        mask: as losses, bool; a sample with False is ignored.
        backend: as for `cvar`.

    Returns:
        W_i = n p_i, as losses; float64 for float64 losses, else float32. `absgd_fast.weights`
            says what all rules have in common (nonfinite losses, gradients).

    Raises:
        ValueError: rho negative or NaN, or mask of another shape.

    >>> chi2(torch.tensor([0.0, 1.0]), rho=0.125)  # (W - 1)^2 = 2 rho
    tensor([0.5000, 1.5000])

    Source: Namkoong & Duchi 2017, "Variance-based regularization with convex objectives"; Levy et al. 2020.
    """
    radius = _numbers.real(rho)
    if radius is None or not radius >= 0:
        raise ValueError(f"rho: got {rho!r}, expected a number >= 0")
    rho = radius
    losses, mask = prepared(losses, mask)
    if (kernels := kernels_for(losses, backend)) is not None:
        return kernels.rule_weights(losses, mask, ops.RULES_OF_LOSSES.index("chi2"), rho, 0.0)
    samples = Samples(losses, mask)
    if rho == 0 or not len(samples.x):
        return samples.weights(samples.finite.double())
    ordered, x = samples.descending(), samples.relative()
    value_range = (-x).max()
    value_range = torch.where(value_range > 0, value_range, 1.0)  # differences up to 1: no square overflows
    d, x = torch.where(ordered.isfinite(), ordered, 0.0) / value_range, x / value_range
    # If mu is the j-th largest loss (j = 0, 1, ...), the j losses above it have weight: `sums` has the sum of their distances to
    # mu, `squares` the sum of the squared distances.
    j = samples.place()
    sum_d, sum_d2 = running_sum(d) - d, running_sum(d.square()) - d.square()
    sums, squares = sum_d - j * d, sum_d2 - 2 * d * sum_d + j * d * d
    bound = 1 + 2 * rho
    beyond = (j == 0) | ((j < samples.n) & (samples.n * squares > bound * sums.square())) | (sums == 0)
    k = beyond.double().cumprod(0).sum().clamp(max=samples.n)  # the number of losses above mu
    taken = (j < k).double()
    mean = (taken * d).sum() / k
    variance = (taken * (d - mean).square()).sum() / k
    mu = mean - (variance / (k * bound / samples.n - 1).clamp(min=1e-15)).sqrt()  # at least its rounding error
    w = (x - mu).clamp(min=0).where(samples.finite, 0.0)
    ties = ((x == 0) & samples.finite).double()
    # w.sum() is 0 if the squares of the differences underflow; then the ties at the maximum are the result too
    w = torch.where((bound * ties.sum() >= samples.n) | (w.sum() == 0), ties, w)
    return samples.weights(w * (samples.n / w.sum()))
