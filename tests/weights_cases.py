"""TERM, CVaR, chi-squared and group DRO once more, slowly and in float64, and the table of what is called with what."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from absgd_fast import _backend, ops, weights

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def way(request, monkeypatch):
    """The CPU has kernels for the rules; a GPU takes torch's operators."""
    if request.param == "torch":
        for operators in {ops.OPERATORS["cpu"], ops.OPERATORS["cpu"].compiled}:
            monkeypatch.setattr(operators, "has_rules", False)
    elif not _backend.available("cpu"):
        pytest.skip(f"the native library is not there: {_backend.why_not('cpu')}")
    return request.param


# ---- the rules of MATH §4 again, in NumPy ----------------------------------------------------------------------


def tilted(losses, t):
    """Softmax of t L, and (1/t) log mean exp(t L); log1p and expm1, so that t = 1e-12 is as exact as t = 1."""
    top = losses.max() if t > 0 else losses.min()
    if math.isinf(t):
        share = (losses == top).astype(float)
        return share / share.sum(), top
    share = np.exp(t * (losses - top))
    value = losses.mean() if t == 0 else top + math.log1p(np.expm1(t * (losses - top)).mean()) / t
    return share / share.sum(), value


def term(losses, t, groups=None, t_group=None):
    labels = np.zeros(len(losses)) if groups is None else groups
    members = [np.flatnonzero(labels == g) for g in np.unique(labels)]
    sizes = np.array([len(m) for m in members])
    inner = [tilted(losses[m], t) for m in members]
    values = np.array([v for _, v in inner])
    tilt = 0.0 if t_group is None else t_group
    top = values.max() if tilt > 0 else values.min()
    outer = sizes * ((values == top) if math.isinf(tilt) else np.exp(tilt * (values - top)))
    result = np.zeros(len(losses))
    for m, (share, _), weight in zip(members, inner, outer / outer.sum()):
        result[m] = len(losses) * weight * share
    return result


def cvar(losses, beta, reg=0.0):
    n, value_range = len(losses), np.ptp(losses)
    if reg == 0:
        result, left = np.zeros(n), beta * n  # how many whole rows the share beta holds
        for value in np.unique(losses)[::-1]:
            ties = losses == value
            taken = min(left, ties.sum())
            result[ties], left = taken / ties.sum() / beta, left - taken
        return result

    def at(mu):
        return np.minimum(np.exp(np.minimum((losses - mu) / reg, 700)), 1 / beta)

    low, high = losses.min(), losses.max()  # all W >= 1 at the one, all W <= 1 at the other
    for _ in range(200 if value_range else 0):
        mu = low + (high - low) / 2
        low, high = (mu, high) if at(mu).mean() >= 1 else (low, mu)
    return at(low)


def divergence(w):
    return ((w - 1) ** 2).mean() / 2


def chi2(losses, rho):
    below = losses.max() - losses
    if rho == 0 or not below.any():
        return np.ones(len(losses))

    def at(s):
        """mu = max L - s value_range."""
        p = np.maximum(s - below / below.max(), 0)
        return p / p.mean()

    low, high = -90.0, 90.0  # log s: exp(-90) is under the gap to any second float64, exp(90) is uniform
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if divergence(at(math.exp(middle))) <= rho else (middle, high)
    return at(math.exp(high))


class GroupDRO:
    """Algorithm 1, with an array for q."""

    def __init__(self, n_groups, eta):
        self.q, self.eta = [1 / n_groups] * n_groups, eta

    def __call__(self, losses, groups):
        for g in set(groups.tolist()):
            self.q[g] *= math.exp(self.eta * losses[groups == g].mean())
        self.q = [q / sum(self.q) for q in self.q]
        return np.array([len(losses) * self.q[g] / (groups == g).sum() for g in groups])


# ---- the table: what is called with (losses, groups), and what it must give -------------------------------------------

FLAT = {
    "term": (partial(weights.term, t=0.7), partial(term, t=0.7)),
    "eg": (partial(weights.term, t=-1.3), partial(term, t=-1.3)),
    "term-zero": (partial(weights.term, t=0.0), partial(term, t=0.0)),
    "term-max": (partial(weights.term, t=INF), partial(term, t=INF)),
    "term-min": (partial(weights.term, t=-INF), partial(term, t=-INF)),
    "cvar": (partial(weights.cvar, beta=0.3), partial(cvar, beta=0.3)),
    "cvar-kl": (partial(weights.cvar, beta=0.3, reg=0.5), partial(cvar, beta=0.3, reg=0.5)),
    "chi2": (partial(weights.chi2, rho=0.4), partial(chi2, rho=0.4)),
}
GROUPED = {
    "grouped": (partial(weights.term, t=0.7), partial(term, t=0.7)),
    "hierarchical": (partial(weights.term, t=0.7, t_group=-2.0), partial(term, t=0.7, t_group=-2.0)),
    "groups-as-wholes": (partial(weights.term, t=0.0, t_group=1.5), partial(term, t=0.0, t_group=1.5)),
    "worst-group": (partial(weights.term, t=-1.0, t_group=INF), partial(term, t=-1.0, t_group=INF)),
    "worst-of-each": (partial(weights.term, t=INF), partial(term, t=INF)),
    "group-dro": (
        lambda losses, groups, **k: weights.GroupDRO(4, 0.3).double()(losses, groups, **k),
        lambda losses, groups: GroupDRO(4, 0.3)(losses, groups),
    ),
}


class Rule:
    def __init__(self, name):
        self.name, self.grouped = name, name in GROUPED
        self.rule, self.slow = (GROUPED if self.grouped else FLAT)[name]

    def __call__(self, losses, groups, **keywords):
        return self.rule(losses, **({"groups": groups} if self.grouped else {}), **keywords)

    def exact(self, losses, groups):
        losses, groups = np.asarray(losses, np.float64), np.asarray(groups)
        return self.slow(losses, **({"groups": groups} if self.grouped else {}))


KINDS = {
    "spread": lambda rng, n: rng.exponential(1.0, n),
    "signed": lambda rng, n: rng.normal(0, 3, n),
    "ties": lambda rng, n: rng.integers(0, 4, n) / 2.0,
    "equal": lambda rng, n: np.full(n, 0.7),
    "far": lambda rng, n: 1e6 + rng.random(n),  # a range of 1e-6 of the size: bounds relative to the size are too wide
    "outlier": lambda rng, n: np.where(np.arange(n) == n // 2, 40.0, rng.random(n)),
}


@st.composite
def batches(draw, kinds=tuple(KINDS)):
    """Losses (n,) of one of the kinds, n from 1 to 40, and groups 0 to 3 of which some may be absent."""
    n = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return KINDS[draw(st.sampled_from(kinds))](rng, n), rng.integers(0, draw(st.integers(1, 4)), n)


def tensor(x, **kw):
    return torch.tensor(np.asarray(x), **kw)


def close(result, exact, tolerance=1e-10):
    np.testing.assert_allclose(result.numpy(), exact, rtol=tolerance, atol=tolerance)


many = settings(max_examples=150)  # the arguments alone have 130 combinations


L3, G3 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1])
