"""TargetESS: the lambda by which the effective sample size of a batch has a given share (docs/MATH.md §1.7).

x_i are the scores of the n samples that count, and e is the largest of them (lambda > 0) or the smallest (lambda < 0):

    d_i = |e - x_i|,    u = 1 / |lambda|,    share(u) = (sum_i exp(-u d_i))^2 / (n sum_i exp(-2 u d_i))

share falls from 1 at u = 0 to the share of the ties at e. `Search` finds the u at which it has the wanted value from sums at a
few fixed u. So several processes can add their sums, and no host looks at a number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .weights import robust_loss

POINTS = 16  # values of u at which a round of the search takes sums
ROUNDS = 4  # leave an error of u of about 1e-8
CHUNK = 4096  # samples whose exponentials are made at once, which a cache holds


class Target(NamedTuple):
    """The lambda of a batch, and the score that its weights are relative to, both 0-d float64.

    z_i = (x_i - shift) / lam. lam is inf, and shift 0 or the extreme score, if all weights are 1.
    """

    lam: Tensor
    shift: Tensor


def usable_scores(losses: Tensor, score: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which samples count and are finite (bool), and how many samples count and are not finite (0-d int64)."""
    finite = losses.isfinite() if score is None else losses.isfinite() & score.isfinite()
    usable = finite if mask is None else finite & mask
    return usable, (~finite if mask is None else mask & ~finite).sum()


def extremes(x: Tensor, usable: Tensor) -> Tensor:
    """(2) float64: the smallest and the largest usable score; inf and -inf without one."""
    if x.numel() == 0:
        return torch.tensor([math.inf, -math.inf], dtype=torch.float64, device=x.device)
    lowest, highest = torch.where(usable, x, math.inf).amin(), torch.where(usable, x, -math.inf).amax()
    return torch.stack([lowest, highest]).double()


class Search:
    """The search for u = 1 / |lambda| in rounds. A round takes `sums` of the samples of every process for `narrow`.

    The bracket begins at 2 sqrt(-log share) / (largest d), because share(u) >= 1 / cosh^2(u max d / 2) (Kantorovich's
    inequality). It ends where the exponentials of all d above the floor, the rounding of the losses, are 0.
    """

    def __init__(self, share: float, extremes: Tensor, dtype: torch.dtype):
        """share: with the sign of lambda. extremes: as the function of this name, of all samples. dtype: of the losses."""
        self.sign, self.share = math.copysign(1.0, share), abs(share)
        lowest, highest = extremes.unbind()
        some = lowest <= highest
        self.shift = torch.where(some, highest if share > 0 else lowest, 0.0)
        floor = 64 * torch.finfo(dtype).eps * extremes.abs().amax().clamp(min=1.0)
        spread = (highest - lowest).clamp(max=torch.finfo(torch.float64).max)
        self.solvable = some & (spread > floor)
        self.largest = torch.finfo(dtype).max
        high = torch.where(self.solvable, (750 if dtype == torch.float64 else 110) / floor, 1.0)
        low = torch.where(self.solvable, 2 * math.sqrt(-math.log(self.share)) / spread, 1.0)
        self.low, self.high = torch.minimum(low, high).log(), high.log()  # of log u
        self.steps = torch.linspace(0, 1, POINTS, dtype=torch.float64, device=extremes.device)

    def sums(self, x: Tensor, usable: Tensor) -> Tensor:
        """(3, POINTS) float64: the sums of exp(-u d) and of exp(-2 u d), and the number of samples."""
        minus_u = -self._points().exp().to(x.dtype).unsqueeze(1)
        d = torch.where(usable, (self.shift.to(x.dtype) - x).abs(), math.inf).flatten()
        total = self.steps.new_zeros(2, POINTS)
        for part in d.split(CHUNK):
            e = (minus_u * part).exp()
            total = total + torch.stack([e.sum(1), e.square().sum(1)])
        return torch.cat([total, usable.sum().double().expand(1, POINTS)])

    def _points(self) -> Tensor:
        return self.low + (self.high - self.low) * self.steps

    def narrow(self, sums: Tensor) -> None:
        """Take the sums of all samples, and keep the two neighbouring points between which share(u) has the wanted value."""
        s1, s2, n = sums
        share = s1.square() / (n * s2)
        points, height = self._points(), (-share.log()).clamp(min=0.0).sqrt()
        # The first point is below the root but for rounding, and the last one may be too: then the root is taken to be there.
        at = (share >= self.share).sum().clamp(1, POINTS - 1)
        pick = lambda values, place: values.gather(0, place.unsqueeze(0)).squeeze(0)  # noqa: E731
        self.low, self.high = pick(points, at - 1), pick(points, at)
        self.at_low, self.at_high = pick(height, at - 1), pick(height, at)

    def found(self) -> Target:
        """The solution: sqrt(-log share) is nearly a straight line between the last two points, within the error of ROUNDS."""
        part = (math.sqrt(-math.log(self.share)) - self.at_low) / (self.at_high - self.at_low)
        part = torch.where(part.isfinite(), part, 1.0).clamp(0.0, 1.0)
        low, high = self.low.exp(), self.high.exp()
        u = low + (high - low) * part
        lam = self.sign * (1 / u).clamp(max=self.largest)
        return Target(torch.where(self.solvable, lam, math.inf), self.shift)


@torch.no_grad()
def target_lambda(
    losses: Tensor, share: float, *, score: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Target, Tensor, Tensor]:
    """The lambda at which the effective sample size of the weights exp(x / lambda) is `share` of the n finite samples.

    Args:
        losses: in `real_dtype`, of any shape. score: as losses; in their place. mask: as losses, bool; False: ignored.
        share: in (0, 1), with the sign of lambda.

    Returns:
        The `Target`, n (0-d int64), and how many samples count and are not finite (0-d int64).

    >>> losses = torch.tensor([0.0, 1.0, 2.0, 3.0])
    >>> target, _, _ = target_lambda(losses, 0.7)
    >>> weights = ((losses - target.shift) / target.lam).softmax(0)
    >>> 1 / (len(losses) * weights.square().sum())
    tensor(0.7000)
    """
    usable, nonfinite = usable_scores(losses, score, mask)
    x = losses if score is None else score
    search = Search(share, extremes(x, usable), losses.dtype)
    for _ in range(ROUNDS):
        search.narrow(search.sums(x, usable))
    return search.found(), usable.sum(), nonfinite


def robust_loss_at_target(
    losses: Tensor,
    log_s: Tensor,
    share: float,
    *,
    score: Tensor | None = None,
    mask: Tensor | None = None,
    mix: float = 0.0,
    max_weight: float = math.inf,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The robust loss by the lambda at which the weights have an effective sample size of `share` n (docs/MATH.md §1.7).

        W_i  = exp(z_i) / mean exp(z),    z_i = (x_i - e) / lambda           all of them 1 at lambda = inf
        loss = (1/n) sum_i t_i (W_i + mix) L_i                               the W_i are constants

    Args:
        losses: in `real_dtype`. share: in (0, 1), with the sign of lambda.
        log_s, score, mask, mix, max_weight, sample_weight: as for `robust_loss`.

    Returns:
        loss (0-d), weights (as losses), lambda (0-d float64), the new log s (0-d), nonfinite (0-d bool). log s is that of
        exp(x / lambda), and 0 at lambda = inf; a batch with a nonfinite sample, or without any, leaves it as it was.
    """
    plain = losses.detach()
    score = None if score is None else score.detach().to(losses.dtype)
    (lam, shift), n, bad = target_lambda(plain, share, score=score, mask=mask)
    largest = torch.finfo(losses.dtype).max
    relative = ((plain if score is None else score).double() - shift).clamp(-largest, largest).to(losses.dtype)
    loss, weights, relative_log_s, nonfinite = robust_loss(
        losses,
        log_s,
        lam,
        score=relative,
        mask=mask,
        mix=mix,
        max_weight=max_weight,
        sample_weight=sample_weight,
        normalizer="batch",
    )
    moved = torch.where(lam.isinf(), 0.0, relative_log_s.double() + shift / lam).to(log_s.dtype)
    return loss, weights, lam, torch.where((n > 0) & (bad == 0), moved, log_s), nonfinite
