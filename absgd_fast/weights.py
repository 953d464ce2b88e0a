"""Other robust weightings of per-sample losses: TERM, EG, CVaR, chi-squared and group DRO.

Each returns W with mean 1 over the rows that count (W_i = n p_i), so that (1/n) sum_i W_i L_i is the weighted loss, as with
`ABLoss`, which takes any of them, or any callable of the same form, in place of lambda:

    ABLoss(rule=functools.partial(weights.cvar, beta=0.1))        ABLoss(rule=weights.GroupDRO(n_groups=4))

What they have in common. Losses have any shape. mask: bool, False = ignored, W = 0. A row with a NaN or infinite loss has
W = NaN, and the others are weighed without it. W is a constant: no gradient flows through it, so that (W * losses).mean() has
the gradient of the rule's objective. W is float64 for float64 losses, else float32; between them all is float64, because
sums of squares and of exponentials would lose what the rules are exact about. The host never waits for a GPU.
"""

from __future__ import annotations

import inspect
import math
from functools import partial

import torch
from torch import Tensor, nn

from . import _checks, ops
from . import functional as F
from .reference import real_dtype

# |t| for which 1/t is a lambda of the kernels
NATIVE_TILTS = (2.0**-64, 2.0**64)
VANISHED = 1e4  # exp(-VANISHED) is 0 in every dtype


def _prepared(losses: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Losses and mask as the kernels read them."""
    losses = _checks.losses(losses).detach()
    return losses.to(real_dtype(losses.dtype)).contiguous(), _checks.per_sample(mask, "mask", losses, torch.bool)


def _kernels(losses: Tensor, backend: str | None) -> ops.Operators | None:
    """The operators, where they have kernels for the rules: on the CPU. 128 losses take 4 to 9 us there, in torch's operators 140
    (CVaR) to 280 us (chi-squared)."""
    operators = ops.serving(losses.device, backend)
    return operators if operators is not None and operators.has_rules else None


class _Rows:
    """The losses that count (as `_prepared`), flat and in float64 (0 elsewhere), and the way back from their weights."""

    def __init__(self, losses: Tensor, mask: Tensor | None):
        self.shape, self.dtype = losses.shape, losses.dtype
        x = losses.flatten().double()
        valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.flatten()
        self.good, self.bad = valid & x.isfinite(), valid & ~x.isfinite()
        self.x = x.where(self.good, 0.0)
        self.n = self.good.sum().double()

    def place(self) -> Tensor:
        """0, 1, ... n - 1, and on where rows do not count, which come last in `descending` (float64: integers would make
        float32 of what they are divided by)."""
        return torch.arange(len(self.x), device=self.x.device, dtype=torch.float64)

    def descending(self) -> Tensor:
        """The losses, largest first, relative to the largest: 0, ..., and -inf for the rows that do not count."""
        ordered = self.x.where(self.good, -math.inf).sort(descending=True).values
        return torch.where(ordered.isfinite(), ordered - ordered[:1], -math.inf)

    def relative(self) -> Tensor:
        """The losses in their own order, relative to the largest; 0 for the rows that do not count."""
        if not len(self.x):
            return self.x
        return (self.x - self.x.where(self.good, -math.inf).max()).where(self.good, 0.0)

    def weights(self, w: Tensor) -> Tensor:
        return w.where(self.good, 0.0).masked_fill(self.bad, math.nan).to(self.dtype).reshape(self.shape)


def term(
    losses: Tensor,
    t: float,
    groups: Tensor | None = None,
    t_group: float | None = None,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Tilted empirical risk minimisation (TERM), flat or over groups; t < 0 is exponentiated gradient (EG, min-min DRO).

        flat       p_i = exp(t L_i) / sum_j exp(t L_j),  the gradient of  (1/t) log mean_i exp(t L_i)
        grouped    R_g = (1/t) log mean_{i in g} exp(t L_i)
                   p   = gradient of (1/t_group) log((1/n) sum_g n_g exp(t_group R_g))
        W_i = n p_i

    t is 1/lambda: `ABLoss(lam=1 / t, gamma=1)` from its start. With groups p is the product of two softmaxes: over the groups,
    and within one. Without t_group (= 0) a group counts by its size; with t = 0 and t_group > 0 groups are tilted as wholes.

    Args:
        losses: any shape.
        t: tilt. > 0 attends to large losses, < 0 to small ones, 0: all alike, +-inf: the largest (smallest) alone, ties alike.
        groups: like losses, any integers; equal = the same group. None: flat.
        t_group: tilt between groups, as t; where groups tie at +-inf all their rows count alike.
        mask, returns: see above.
        backend: of the flat form, which is one call of the kernel of `functional.robust_weights`.

    Raises:
        ValueError: a NaN tilt, t_group without groups, groups or mask of another shape. TypeError: groups that are not integers.

    >>> term(torch.tensor([0.0, 0.0, 1.0]), t=math.log(2.0))  # shares 1 : 1 : 2
    tensor([0.7500, 0.7500, 1.5000])
    >>> term(torch.tensor([1.0, 1.0, 2.0]), 0.0, groups=torch.tensor([5, 5, 7]), t_group=math.log(2.0))
    tensor([0.7500, 0.7500, 1.5000])

    Source: Li et al. 2021, "Tilted empirical risk minimization" (flat and hierarchical); EG: Majidi et al. 2021,
    "Exponentiated gradient reweighting for robust training under label noise and beyond".
    """
    _checks.tilt(t, "t")
    if groups is None and t_group is not None:
        raise ValueError(f"t_group: got {t_group!r} without groups, expected groups=, one integer per loss")
    losses, mask = _prepared(losses, mask)
    if groups is None and NATIVE_TILTS[0] <= abs(t) <= NATIVE_TILTS[1]:
        gaps = _below_the_extreme(losses, t, mask)
        return F.robust_weights(gaps, -math.inf, 1 / t, gamma=1.0, mask=mask, backend=backend)[0]
    rows = _Rows(losses, mask)
    one = torch.zeros_like(rows.x, dtype=torch.int64)
    if groups is None:
        return rows.weights(rows.n * _tilted(rows.x, rows.good.double(), t, one)[0])
    within = _numbered(_checks.groups(groups, losses).flatten())
    t_group = _checks.tilt(0.0 if t_group is None else t_group, "t_group")
    sizes = torch.zeros_like(rows.x).index_add_(0, within, rows.good.double())
    p, risks = _tilted(rows.x, rows.good.double(), t, within)
    between, _ = _tilted(risks, sizes, t_group, one)
    return rows.weights(rows.n * between[within] * p)


def _below_the_extreme(losses: Tensor, t: float, mask: Tensor | None) -> Tensor:
    """The losses less the largest (for t < 0 the smallest), down to where they weigh nothing: with those themselves t L might leave
    the range, and log n be lost beside it. What is not finite stays as it is."""
    if not losses.numel():
        return losses
    sign = -1.0 if t < 0 else 1.0
    counts = losses.isfinite() if mask is None else losses.isfinite() & mask
    extreme = sign * (sign * losses).where(counts, -math.inf).max()
    limit = {"min": -VANISHED / t} if t > 0 else {"max": -VANISHED / t}
    return (losses - extreme).clamp(**limit).where(counts, losses)


def _numbered(groups: Tensor) -> Tensor:
    """Groups as numbers below their count. torch.unique would wait for a GPU: it returns as many elements as it finds."""
    ordered, order = groups.sort()
    new = torch.ones_like(ordered)
    new[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(order).scatter_(0, order, new.cumsum(0) - 1)


def _tilted(values: Tensor, counts: Tensor, t: float, segment: Tensor) -> tuple[Tensor, Tensor]:
    """Within each segment: the shares counts exp(t values) / sum, and the tilted mean (1/t) log(sum counts exp(t values) /
    sum counts). Values that count 0 times take no part. t = 0 and t = +-inf are the limits."""
    zeros, taken = torch.zeros_like(values), counts > 0
    sign = -1.0 if t < 0 else 1.0
    top = zeros.scatter_reduce(0, segment, (sign * values).where(taken, -math.inf), "amax", include_self=False)
    gap = (sign * values - top[segment]).where(taken, 0.0)  # <= 0, so that nothing overflows
    exp = (gap == 0).double() if math.isinf(t) else (abs(t) * gap).exp()
    total = lambda x: zeros.index_add(0, segment, counts * x)  # noqa: E731
    sums, sizes = total(exp), zeros.index_add(0, segment, counts)
    if math.isinf(t):
        below = 0.0
    elif t == 0:
        below = total(gap) / sizes
    else:
        less = total((abs(t) * gap).expm1()) / sizes  # of mean exp - 1, which cancels where t is small
        below = torch.where(less > -0.5, less.log1p(), (sums / sizes).log()) / abs(t)
    return (counts * exp / sums[segment]).where(taken, 0.0), sign * (top + below)


def _running_sum(x: Tensor) -> Tensor:
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
    losses, mask = _prepared(losses, mask)
    if (kernels := _kernels(losses, backend)) is not None:
        return kernels.rule_weights(losses, mask, ops.RULES_OF_LOSSES.index("cvar"), beta, reg)
    rows = _Rows(losses, mask)
    if not len(rows.x):
        return rows.weights(rows.x)
    ordered, order = rows.x.where(rows.good, -math.inf).sort(descending=True)
    if reg == 0:
        edge = ordered.gather(0, ((beta * rows.n).ceil().long() - 1).clamp(min=0).reshape(1))  # an index of no dimension waits
        above, ties = ((rows.good & at).double() for at in (rows.x > edge, rows.x == edge))
        left = (rows.n - above.sum() / beta).clamp(min=0) / ties.sum()
        return rows.weights(above / beta + ties * left)
    # The k largest are at the bound; the others share n - k / beta by their exponentials. k is the smallest for which the
    # largest of the others stays below the bound. The exponents z are made from the gaps between neighbours, no wider than what
    # makes exp vanish, so that losses of any size keep what tells them apart.
    gaps = ((ordered[:-1] - ordered[1:]) / reg).clamp(max=VANISHED).nan_to_num(VANISHED)
    k, counts = rows.place(), rows.place() < rows.n
    z = torch.cat([gaps.new_zeros(1), -_running_sum(gaps)]).where(counts, -math.inf)
    log_sum = z.flip(0).logcumsumexp(0).flip(0)  # over those from k on
    left = rows.n - k / beta
    can = (left > 0) & counts
    log_mu = log_sum - left.where(can, 1.0).log()
    fits = (z - log_mu <= -math.log(beta)) | (k >= can.sum() - 1)  # the last that can always fits, up to rounding
    log_mu = log_mu.gather(0, (~fits).sum().clamp(max=len(k) - 1).reshape(1))
    w = (z - log_mu).exp().clamp(max=1 / beta)
    return rows.weights(torch.empty_like(w).scatter_(0, order, w))


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
    losses, mask = _prepared(losses, mask)
    if (kernels := _kernels(losses, backend)) is not None:
        return kernels.rule_weights(losses, mask, ops.RULES_OF_LOSSES.index("chi2"), rho, 0.0)
    rows = _Rows(losses, mask)
    if rho == 0 or not len(rows.x):
        return rows.weights(rows.good.double())
    ordered, x = rows.descending(), rows.relative()
    spread = (-x).max()
    spread = torch.where(spread > 0, spread, 1.0)  # so that no square leaves the range
    d, x = torch.where(ordered.isfinite(), ordered, 0.0) / spread, x / spread
    # With mu at the j-th loss, j = 1, 2, ..., those before it have weight: their distances to it, summed and squared.
    j = rows.place()
    first, second = _running_sum(d) - d, _running_sum(d.square()) - d.square()
    sums, squares = first - j * d, second - 2 * d * first + j * d * d
    bound = 1 + 2 * rho
    beyond = (j == 0) | ((j < rows.n) & (rows.n * squares > bound * sums.square())) | (sums == 0)
    k = beyond.double().cumprod(0).sum().clamp(max=rows.n)  # so many lie above mu
    taken = (j < k).double()
    mean = (taken * d).sum() / k
    variance = (taken * (d - mean).square()).sum() / k
    mu = mean - (variance / (k * bound / rows.n - 1).clamp(min=1e-15)).sqrt()  # no less than its rounding
    w = (x - mu).clamp(min=0).where(rows.good, 0.0)
    ties = ((x == 0) & rows.good).double()
    # nobody above mu: differences whose squares are 0
    w = torch.where((bound * ties.sum() >= rows.n) | (w.sum() == 0), ties, w)
    return rows.weights(w * (rows.n / w.sum()))


class ExactState(nn.Module):
    """A module whose floating buffers stay float32 or float64 when it is cast: in bfloat16 a moving average would not move."""

    def _apply(self, fn, recurse=True):
        exact = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after.dtype not in (torch.float32, torch.float64):
                setattr(self, name, before.to(after.device))
        return self


class GroupDRO(ExactState):
    """Group DRO: groups are weighed by how much they have lost so far; the state is one weight per group.

        q_g <- q_g exp(eta mean loss of g), normalised to sum 1          (a group that is not in the batch keeps its q, but for that)
        p_i  = q_{g(i)} / n_g,   W_i = n p_i

    forward(losses, groups, *, mask=None, update=True) -> W. q moves only in training mode with gradients enabled and
    update=True, and not after a bad row; the weights are those of the new q in any case. The mean of W is the sum of q over the
    groups in the batch: one that is absent contributes nothing.

    Args:
        n_groups: number of groups; forward takes labels in [0, n_groups).
        eta: step size >= 0 of q. backend: as for `cvar`.

    Attributes:
        log_q: (n_groups) buffer, float32 (float64 after .double()). q: its exponential.

    Raises:
        ValueError: n_groups < 1, eta out of range, groups of another shape. TypeError: groups that are not integers.
        IndexError: a group out of range, on the CPU; on a GPU, which is not waited for, its row has W = NaN.

    >>> rule = GroupDRO(2, eta=math.log(2.0))
    >>> rule(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 1]))  # q = 2/3, 1/3
    tensor([1., 1., 1.])
    >>> rule.q
    tensor([0.6667, 0.3333])

    Source: Sagawa et al. 2020, "Distributionally robust neural networks for group shifts", Alg. 1. There q / n_g weighs a
    batch drawn group by group; so it does here.
    """

    def __init__(self, n_groups: int, eta: float = 0.01, *, backend: str | None = None):
        super().__init__()
        self.backend = backend
        if isinstance(n_groups, bool) or not isinstance(n_groups, int) or n_groups < 1:
            raise ValueError(f"n_groups: got {n_groups!r}, expected an integer >= 1")
        self.n_groups = n_groups
        self.eta = _checks.within(eta, "eta", 0, math.inf)
        self.register_buffer("log_q", torch.full((n_groups,), -math.log(n_groups)))

    @property
    def q(self) -> Tensor:
        return self.log_q.exp()

    def forward(self, losses: Tensor, groups: Tensor, *, mask: Tensor | None = None, update: bool = True) -> Tensor:
        losses, mask = _prepared(losses, mask)
        groups = _checks.groups(groups, losses)
        if losses.device != self.log_q.device:
            raise ValueError(
                f"GroupDRO: got losses on {losses.device}, but its state is on {self.log_q.device}; use .to({str(losses.device)!r})"
            )
        update = update and self.training and torch.is_grad_enabled()
        if (kernels := _kernels(losses, self.backend)) is not None:
            try:
                return kernels.group_weights(losses, mask, groups, self.log_q, self.eta, update)
            except RuntimeError:  # a group out of range, which is said below
                pass
        rows, groups = _Rows(losses, mask), groups.flatten()
        inside = (groups >= 0) & (groups < self.n_groups)
        counts = rows.good | rows.bad
        if losses.device.type == "cpu" and not torch.compiler.is_compiling() and bool((counts & ~inside).any()):
            row = int((counts & ~inside).nonzero()[0])
            raise IndexError(
                f"groups: got {int(groups[row])} in row {row}, expected 0 <= group < {self.n_groups}; mask rows that shall"
                " not count"
            )
        group = groups.where(inside, 0)
        rows.bad, rows.good = rows.bad | (counts & ~inside), rows.good & inside
        one, zeros = rows.good.double(), rows.x.new_zeros(self.n_groups)
        sizes = zeros.index_add(0, group, one)
        means = zeros.index_add(0, group, one * rows.x) / sizes.clamp(min=1)
        log_q = (self.log_q.double() + (self.eta * means).clamp(-1e300, 1e300)).log_softmax(0)
        w = (log_q.exp() / sizes.clamp(min=1))[group] * one.sum()
        if update:
            moves = log_q.isfinite().all() & ~rows.bad.any()
            self.log_q.copy_(torch.where(moves, log_q.to(self.log_q.dtype), self.log_q))
        return rows.weights(w)

    def extra_repr(self) -> str:
        return f"n_groups={self.n_groups}, eta={self.eta:g}"


# ---- as the rule of an ABLoss --------------------------------------------------------------------------------------


def flat_tilt(rule) -> float | None:
    """t, where a rule is the flat `term` with a tilt that its kernel takes: then ABLoss can weigh as with lambda = 1/t."""
    if not (isinstance(rule, partial) and rule.func is term and not rule.args and set(rule.keywords) == {"t"}):
        return None
    t = _checks.tilt(rule.keywords["t"], "t")
    return t if NATIVE_TILTS[0] <= abs(t) <= NATIVE_TILTS[1] else None


def options(rule) -> frozenset[str]:
    """Which of groups, mask and update a rule takes beside the losses."""
    known = {"groups", "mask", "update"}
    while isinstance(rule, (partial, torch._dynamo.OptimizedModule)):
        known -= rule.keywords.keys() if isinstance(rule, partial) else set()
        rule = rule.func if isinstance(rule, partial) else rule._orig_mod
    try:
        parameters = inspect.signature(rule.forward if isinstance(rule, nn.Module) else rule).parameters
    except (TypeError, ValueError):  # a builtin, which does not say
        return frozenset()
    return frozenset(known & parameters.keys())


def shown(rule) -> str:
    """A rule in a line: "cvar(beta=0.1)"."""
    if isinstance(rule, partial):
        numbers = [*map(repr, rule.args), *(f"{name}={value!r}" for name, value in rule.keywords.items())]
        return f"{shown(rule.func)}({', '.join(numbers)})"
    return type(rule).__name__ if isinstance(rule, nn.Module) else getattr(rule, "__qualname__", repr(rule))


def weigh(rule, takes: frozenset[str], losses: Tensor, valid: Tensor | None, groups: Tensor | None, update: bool) -> Tensor:
    """W of a rule for the rows that are valid (None: all), 0 for the others; W is checked, detached and of the losses' dtype and
    shape.

    A rule without a `mask` is given the valid rows with a finite loss alone, and the others' W is NaN; choosing them waits for a GPU.
    """
    if groups is not None and "groups" not in takes:
        raise ValueError("groups: got groups, but the rule of this ABLoss takes none; leave them out")
    more = {"update": update} if "update" in takes else {}
    grouped = lambda groups: {} if groups is None else {"groups": groups}  # noqa: E731
    if "mask" in takes:
        return _returned(rule(losses, **({} if valid is None else {"mask": valid}), **grouped(groups), **more), losses)
    good = losses.isfinite() if valid is None else losses.isfinite() & valid
    if bool(good.all()):
        return _returned(rule(losses, **grouped(groups), **more), losses)
    kept = losses[good]
    weights = _returned(rule(kept, **grouped(None if groups is None else groups[good]), **more), kept)
    bad = ~good if valid is None else valid & ~good
    return torch.zeros_like(losses).masked_scatter_(good, weights).masked_fill_(bad, math.nan)


def _returned(weights: object, losses: Tensor) -> Tensor:
    if not isinstance(weights, Tensor) or weights.shape != losses.shape or not weights.is_floating_point():
        got = f"{weights.dtype}, shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"rule: returned {got}, expected one floating weight per loss, shape {tuple(losses.shape)}")
    weights = weights.detach() if weights.requires_grad else weights
    return weights if weights.dtype == losses.dtype else weights.to(losses.dtype)
