"""Rules that solve for a level: conditional value at risk, and the chi-squared ball."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks, ops
from .samples import VANISHED, Samples, kernels_for, prepared


def running_sum(x: Tensor) -> Tensor:
    """x.cumsum(0), of which torch has no deterministic version on a GPU: log2 n shifted additions."""
    shift = 1
    while shift < len(x):
        x = torch.cat([x[:shift], x[shift:] + x[:-shift]])
        shift *= 2
    return x


def cvar(losses: Tensor, beta: float, reg: float = 0.0, *, mask: Tensor | None = None, backend: str | None = None) -> Tensor:
    """Conditional value at risk: the mean of the worst share beta of the losses, with or without a KL penalty.

        max_p sum_i p_i L_i - reg KL(p || 1/n)     over  p_i <= 1 / (beta n),  sum_i p_i = 1

        reg = 0    p_i = 1 / (beta n) for the worst; what is left over goes to the loss at the boundary, shared equally by ties
        reg > 0    p_i = min(exp((L_i - mu) / reg), 1 / beta) / n,  mu such that sum_i p_i = 1

    Args:
        losses: any shape. beta: in (0, 1]; 1 is the plain mean. reg: >= 0, in the unit of the losses.
        mask, returns: see above; W_i = n p_i <= 1 / beta.
        backend: None, "cpu" (a kernel), or any other: torch's own operators.

    Raises:
        ValueError: beta outside (0, 1], reg negative or not finite, mask of another shape.

    >>> cvar(torch.tensor([1.0, 2.0, 3.0, 4.0]), beta=0.375)  # the worst row and a half
    tensor([0.0000, 0.0000, 1.3333, 2.6667])

    Source: Rockafellar & Uryasev 2000; Levy et al. 2020, "Large-scale methods for distributionally robust optimization".
    """
    _checks.within(beta, "beta", 0, 1, open_below=True)
    _checks.within(reg, "reg", 0, math.inf)
    losses, mask = prepared(losses, mask)
    if (kernels := kernels_for(losses, backend)) is not None:
        return kernels.rule_weights(losses, mask, ops.RULES_OF_LOSSES.index("cvar"), beta, reg)
    samples = Samples(losses, mask)
    if not len(samples.x):
        return samples.weights(samples.x)
    ordered, order = samples.x.where(samples.finite, -math.inf).sort(descending=True)
    if reg == 0:
        edge = ordered.gather(0, ((beta * samples.n).ceil().long() - 1).clamp(min=0).reshape(1))  # an index of no dimension waits
        above, ties = ((samples.finite & at).double() for at in (samples.x > edge, samples.x == edge))
        left = (samples.n - above.sum() / beta).clamp(min=0) / ties.sum()
        return samples.weights(above / beta + ties * left)
    # The k largest are at the bound; the others share n - k / beta by their exponentials. k is the smallest for which the
    # largest of the others stays below the bound. The exponents z are made from the gaps between neighbours, no wider than what
    # makes exp vanish, so that losses of any size keep what tells them apart.
    gaps = ((ordered[:-1] - ordered[1:]) / reg).clamp(max=VANISHED).nan_to_num(VANISHED)
    k, counts = samples.place(), samples.place() < samples.n
    z = torch.cat([gaps.new_zeros(1), -running_sum(gaps)]).where(counts, -math.inf)
    log_sum = z.flip(0).logcumsumexp(0).flip(0)  # over those from k on
    left = samples.n - k / beta
    can = (left > 0) & counts
    log_mu = log_sum - left.where(can, 1.0).log()
    fits = (z - log_mu <= -math.log(beta)) | (k >= can.sum() - 1)  # the last that can always fits, up to rounding
    log_mu = log_mu.gather(0, (~fits).sum().clamp(max=len(k) - 1).reshape(1))
    w = (z - log_mu).exp().clamp(max=1 / beta)
    return samples.weights(torch.empty_like(w).scatter_(0, order, w))


def chi2(losses: Tensor, rho: float, *, mask: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The worst case in a chi-squared ball around the plain mean.

        max_p sum_i p_i L_i     over  (1/2n) sum_i (n p_i - 1)^2 <= rho
        p_i proportional to max(L_i - mu, 0), with the largest mu that keeps to the bound

    Uniform over the k rows that tie at the maximum if rho >= (n/k - 1) / 2, where the ball holds them; uniform over all where
    all losses are equal.

    Args:
        losses: any shape. rho: >= 0; 0 is the plain mean.
        mask, returns: see above. backend: as for `cvar`.

    Raises:
        ValueError: rho negative or NaN, mask of another shape.

    >>> chi2(torch.tensor([0.0, 1.0]), rho=0.125)  # (W - 1)^2 = 2 rho
    tensor([0.5000, 1.5000])

    Source: Namkoong & Duchi 2017, "Variance-based regularization with convex objectives"; Levy et al. 2020.
    """
    if not (isinstance(rho, (int, float)) and not isinstance(rho, bool) and rho >= 0):
        raise ValueError(f"rho: got {rho!r}, expected a number >= 0")
    losses, mask = prepared(losses, mask)
    if (kernels := kernels_for(losses, backend)) is not None:
        return kernels.rule_weights(losses, mask, ops.RULES_OF_LOSSES.index("chi2"), rho, 0.0)
    samples = Samples(losses, mask)
    if rho == 0 or not len(samples.x):
        return samples.weights(samples.finite.double())
    ordered, x = samples.descending(), samples.relative()
    value_range = (-x).max()
    value_range = torch.where(value_range > 0, value_range, 1.0)  # so that no square leaves the range
    d, x = torch.where(ordered.isfinite(), ordered, 0.0) / value_range, x / value_range
    # With mu at the j-th loss, j = 1, 2, ..., those before it have weight: their distances to it, summed and squared.
    j = samples.place()
    sum_d, sum_d2 = running_sum(d) - d, running_sum(d.square()) - d.square()
    sums, squares = sum_d - j * d, sum_d2 - 2 * d * sum_d + j * d * d
    bound = 1 + 2 * rho
    beyond = (j == 0) | ((j < samples.n) & (samples.n * squares > bound * sums.square())) | (sums == 0)
    k = beyond.double().cumprod(0).sum().clamp(max=samples.n)  # so many lie above mu
    taken = (j < k).double()
    mean = (taken * d).sum() / k
    variance = (taken * (d - mean).square()).sum() / k
    mu = mean - (variance / (k * bound / samples.n - 1).clamp(min=1e-15)).sqrt()  # no less than its rounding
    w = (x - mu).clamp(min=0).where(samples.finite, 0.0)
    ties = ((x == 0) & samples.finite).double()
    # nobody above mu: differences whose squares are 0
    w = torch.where((bound * ties.sum() >= samples.n) | (w.sum() == 0), ties, w)
    return samples.weights(w * (samples.n / w.sum()))
