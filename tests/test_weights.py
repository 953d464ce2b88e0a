"""TERM, CVaR, chi-squared and group DRO: against slow float64 versions, as optima, and at the extremes."""

import copy
import math
import pickle
import time
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import identity
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from weights_cases import (  # noqa: F401 (a fixture)
    FLAT,
    G3,
    GROUPED,
    INF,
    KINDS,
    L3,
    NAN,
    GroupDRO,
    Rule,
    batches,
    chi2,
    close,
    cvar,
    divergence,
    many,
    tensor,
    term,
    tilted,
    way,
)

import absgd_fast as ab
from absgd_fast import weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=[*FLAT, *GROUPED])
def rule(request):
    return Rule(request.param)


# ---- values -----------------------------------------------------------------------------------------------------------


tilts = st.sampled_from([-INF, -20.0, -1.0, -1e-9, 0.0, 1e-12, 1e-4, 0.5, 3.0, 20.0, INF])


@many
@given(batch=batches([k for k in KINDS if k != "far"]), t=tilts)
def test_term(one_backend, batch, t):
    close(weights.term(tensor(batch[0]), t, backend=one_backend), term(batch[0], t))


@many
@given(batch=batches(), t=tilts, t_group=st.one_of(st.none(), tilts))
def test_hierarchical_term(batch, t, t_group):
    """1e6 + x with t = 20: only what is taken from the largest before it is multiplied keeps ten digits."""
    losses, groups = batch
    labels = np.array([-(2**63), 7, 2**63 - 1, 0])[groups]  # any integers: no table of labels, no bincount
    # the value of a group of 1e6 + x is known to 1e-10, and t_group multiplies that
    tolerance = 1e-10 if abs(losses).max() < 1e5 or t_group in (None, INF, -INF) else 1e-8
    if t_group in (INF, -INF) and abs(t) != INF:
        values = np.sort([tilted(losses[groups == g], t)[1] for g in np.unique(groups)])
        # which group is ahead may otherwise hang on the last digit; ties are for test_groups_that_tie
        assume((np.diff(values) > 1e-8 * (1 + abs(losses).max())).all())
    close(weights.term(tensor(losses), t, tensor(labels), t_group), term(losses, t, groups, t_group), tolerance)


@many
@given(batch=batches(), beta=st.sampled_from([1e-6, 0.05, 0.25, 0.3, 0.9, 1.0]))
def test_cvar(batch, beta):
    close(weights.cvar(tensor(batch[0]), beta), cvar(batch[0], beta))


@many
@given(batch=batches(), beta=st.sampled_from([1e-6, 0.05, 0.25, 0.3, 0.9, 1.0]), reg=st.sampled_from([0.05, 0.5, 3.0, 1e4]))
def test_regularised_cvar(batch, beta, reg):
    """1e6 + x with reg = 0.05: mu is a float64 near 1e6 here, which costs 1e-10 / 0.05."""
    losses = batch[0]
    close(weights.cvar(tensor(losses), beta, reg), cvar(losses - losses.max(), beta, reg))


@many
@given(batch=batches(), rho=st.sampled_from([0.0, 1e-6, 0.01, 0.3, 1.0, 5.0, 1e9, INF]))
def test_chi2(batch, rho):
    close(weights.chi2(tensor(batch[0]), rho), chi2(batch[0], rho))


@given(seed=st.integers(0, 9999), eta=st.sampled_from([0.0, 0.01, 0.5, 3.0]), double=st.booleans())
def test_group_dro_over_several_batches(seed, eta, double):
    """Groups of five, absent now and then: they keep their q up to the common factor."""
    rng = np.random.default_rng(seed)
    rule, exact = weights.GroupDRO(5, eta), GroupDRO(5, eta)
    rule = rule.double() if double else rule
    assert rule.q.tolist() == pytest.approx([0.2] * 5)
    for _ in range(6):
        n = int(rng.integers(1, 12))
        losses, groups = rng.normal(1, 1, n), rng.integers(0, 5, n)
        w = rule(tensor(losses), tensor(groups))
        # log q in float32 is up to 50 here, and known to 50 ulp
        close(w, exact(losses, groups), 1e-11 if double else 2e-5)
        close(rule.q, exact.q, 1e-11 if double else 2e-5)
        assert float(w.mean()) == pytest.approx(sum(exact.q[g] for g in set(groups)), rel=1e-4)


def test_numbers_by_hand():
    three = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    close(weights.term(three, math.log(2)), [0.75, 0.75, 1.5])
    # R = 0 and 1, n_g e^(t R) = 2 and 2: half each
    close(weights.term(three, 1.0, torch.tensor([4, 4, -1]), math.log(2)), [0.75, 0.75, 1.5])
    close(weights.cvar(torch.tensor([1.0, 2.0, 3.0, 3.0]), 0.25), [0, 0, 2, 2])
    close(weights.cvar(torch.tensor([1.0, 2.0, 3.0, 4.0]), 0.375), [0, 0, 4 / 3, 8 / 3], 1e-6)
    # e^(2 - mu), e^(0 - mu) capped at 1 / beta = 1.5: the rest is 0.5
    close(weights.cvar(torch.tensor([2.0, 0.0], dtype=torch.float64), 2 / 3, 1.0), [1.5, 0.5])
    close(weights.chi2(torch.tensor([0.0, 5.0], dtype=torch.float64), 0.125), [0.5, 1.5])  # (W - 1)^2 = 2 rho
    rule = weights.GroupDRO(3, eta=math.log(2))
    close(rule(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 2])), [3 / 4, 3 / 4, 3 / 4], 1e-6)
    close(rule.q, [0.5, 0.25, 0.25], 1e-6)


def test_arguments_matter(rng):
    """Each argument changes the weights: none of the properties is vacuous."""
    losses, groups = rng.random(12), rng.integers(0, 3, 12)
    pairs = [
        (term(losses, 1.0), term(losses, 2.0)),
        (term(losses, 1.0), term(losses, 1.0, groups)),
        (term(losses, 1.0, groups), term(losses, 1.0, groups, 1.0)),
        (term(losses, 1.0, groups, 1.0), term(losses, 1.0)),  # unlike tilts would have to be one: see the test below
        (cvar(losses, 0.3), cvar(losses, 0.3, 0.1)),
        (cvar(losses, 0.3, 0.1), cvar(losses, 1e-9, 0.1)),  # the cap binds
        (chi2(losses, 0.1), chi2(losses, 0.2)),
    ]
    equal = [np.allclose(a, b) for a, b in pairs]
    assert equal == [False, False, False, True, False, False, False]


# ---- as gradients and optima ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [-2.0, 0.3, 4.0])
@pytest.mark.parametrize("t_group", [None, 0.0, -1.5, 2.5])
def test_term_is_the_gradient_of_its_objective(t, t_group, rng):
    """autograd of (1/t_out) log((1/n) sum_g n_g exp(t_out R_g)); for t_out = 0 the mean of R."""
    losses = tensor(rng.exponential(1.0, 17), requires_grad=True)
    groups = tensor(rng.integers(0, 4, 17))
    members = [groups == g for g in groups.unique()]
    value = torch.stack([(torch.logsumexp(t * losses[m], 0) - math.log(m.sum())) / t for m in members])
    sizes = torch.stack([m.sum() for m in members]).double()
    if t_group:
        objective = (torch.logsumexp(sizes.log() + t_group * value, 0) - math.log(17)) / t_group
    else:
        objective = (sizes * value).sum() / 17
    (wanted,) = torch.autograd.grad(objective, losses)
    torch.testing.assert_close(weights.term(losses, t, groups, t_group), 17 * wanted, rtol=1e-11, atol=1e-13)
    (flat,) = torch.autograd.grad(torch.logsumexp(t * losses, 0) / t, losses)
    torch.testing.assert_close(weights.term(losses, t), 17 * flat, rtol=1e-11, atol=1e-13)
    # one tilt inside and between groups is no grouping at all
    torch.testing.assert_close(weights.term(losses, t, groups, t), 17 * flat, rtol=1e-11, atol=1e-13)


def test_limits_of_term(rng):
    """t to 0: 1 + t (L - mean L); t to inf: the extreme alone, and all that tie there."""
    losses = tensor(rng.exponential(1.0, 9))
    close((weights.term(losses, 1e-7) - 1) / 1e-7, losses - losses.mean(), 1e-5)
    for t, where in ((1e9, losses.argmax()), (-1e9, losses.argmin())):
        close(weights.term(losses, t), 9.0 * F.one_hot(where, 9).double().numpy())
        close(weights.term(losses, math.copysign(INF, t)), 9.0 * F.one_hot(where, 9).double().numpy(), 0)
    ties = torch.tensor([1.0, 3.0, 3.0, 1.0, 2.0])
    assert weights.term(ties, INF).tolist() == weights.term(ties, 1e9).tolist() == [0, 2.5, 2.5, 0, 0]
    assert weights.term(ties, -INF).tolist() == weights.term(ties, -1e9).tolist() == [2.5, 0, 0, 2.5, 0]


def test_groups_that_tie():
    """Groups 0 and 1 have the largest maximum: their five rows share the weight, each group by its size."""
    losses = torch.tensor([4.0, 4.0, 1.0, 4.0, 2.0, 3.0], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    # 6 n_g / 5 each, over the ties within
    close(weights.term(losses, INF, groups, INF), [1.8, 1.8, 0, 2.4, 0, 0])
    # every group by its size, 3 : 2 : 1, its own largest alone
    close(weights.term(losses, INF, groups), [1.5, 1.5, 0, 2, 0, 1])
    # the smallest mean is 3 = that of group 0, of 1 and of 2
    close(weights.term(losses, 0.0, groups, -INF), [1, 1, 1, 1, 1, 1])
    close(weights.term(losses, -INF, groups, INF), [0, 0, 0, 0, 0, 6])  # minima 1, 2, 3


def feasible(rng, n, allowed):
    """A random W of mean 1, as far from uniform as `allowed` lets it be, and so often on the boundary."""
    p = n * rng.dirichlet(np.full(n, rng.choice([0.1, 1.0, 10.0])))
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if allowed(1 + middle * (p - 1)) else (low, middle)
    return 1 + low * (p - 1)


def kl(w):
    return np.where(w > 0, w * np.log(np.maximum(w, 1e-300)), 0).mean()


@given(batch=batches(["spread", "signed", "ties", "outlier"]), beta=st.sampled_from([0.1, 0.4]), reg=st.sampled_from([0.0, 0.3]))
def test_cvar_is_optimal(batch, beta, reg):
    losses, n = batch[0], len(batch[0])
    rng = np.random.default_rng(n)
    w = weights.cvar(tensor(losses), beta, reg).numpy()
    assert w.min() >= 0 and w.max() <= 1 / beta * (1 + 1e-12) and w.mean() == pytest.approx(1, rel=1e-12)

    def objective(w):
        return (w * losses).mean() - reg * kl(w)

    for _ in range(20):
        assert objective(feasible(rng, n, lambda v: v.max() <= 1 / beta)) <= objective(w) + 1e-10


@given(batch=batches(["spread", "signed", "ties", "outlier"]), rho=st.sampled_from([0.01, 0.3, 2.0]))
def test_chi2_is_optimal(batch, rho):
    losses, n = batch[0], len(batch[0])
    rng = np.random.default_rng(n)
    w = weights.chi2(tensor(losses), rho).numpy()
    assert w.min() >= 0 and w.mean() == pytest.approx(1, rel=1e-12) and divergence(w) <= rho * (1 + 1e-9)
    top = (losses == losses.max()).sum()
    if np.ptp(losses) > 0:  # else the uniform is as good as any
        assert divergence(w) == pytest.approx(min(rho, (n / top - 1) / 2), rel=1e-9)
    for _ in range(20):
        assert (feasible(rng, n, lambda v: divergence(v) <= rho) * losses).mean() <= (w * losses).mean() + 1e-10


def test_chi2_where_the_ball_reaches_the_corner():
    """n = 10, k = 2 ties at the maximum: uniform over them from rho = (10/2 - 1)/2 = 2 on, not before."""
    losses = tensor([3.0, 3.0, *np.linspace(0, 2, 8)])
    corner = torch.tensor([5.0] * 2 + [0.0] * 8, dtype=torch.float64)
    for rho in (2.0, 2.1, 1e300, INF):
        close(weights.chi2(losses, rho), corner, 1e-12)
    before = weights.chi2(losses, 1.99)
    assert before[9] > 1e-3 and divergence(before.numpy()) == pytest.approx(1.99, rel=1e-10)


@given(batch=batches(["spread", "signed", "ties"]), exponent=st.sampled_from([-900, -100, 100, 900]))
def test_unit_of_the_losses(batch, exponent):
    """A power of two on losses and reg changes nothing, although squares of them over- and underflow."""
    losses, unit = tensor(batch[0]), 2.0**exponent
    for f in (weights.cvar, lambda x, beta: weights.chi2(x, beta)):
        close(f(losses * unit, 0.3), f(losses, 0.3).numpy(), 1e-13)
    close(weights.cvar(losses * unit, 0.3, 0.5 * unit), weights.cvar(losses, 0.3, 0.5).numpy(), 1e-11)


@given(batch=batches(["ties"]), beta=st.sampled_from([0.05, 0.3, 0.9]))
def test_limits_of_the_penalty(batch, beta):
    """reg = 1e-3 beside gaps of 0.5 is none, e^-500; reg = 1e9 leaves the plain mean."""
    losses = tensor(batch[0])
    close(weights.cvar(losses, beta, 1e-3), weights.cvar(losses, beta).numpy())
    close(weights.cvar(losses, beta, 1e9), np.ones(len(losses)), 1e-8)


# ---- rows that do not count -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shape_dtype_and_constancy(rule, dtype, rng):
    """(3, 1, 7): any shape comes back; no graph, the argument untouched; float64 inside whatever came."""
    losses = tensor(rng.exponential(1.0, (3, 1, 7))).to(dtype).requires_grad_()
    groups, before = tensor(rng.integers(0, 4, (3, 1, 7)).astype(np.int32)), losses.detach().clone()
    w = rule(losses, groups)
    assert w.shape == losses.shape and not w.requires_grad and torch.equal(losses.detach(), before)
    assert w.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = rule.exact(before.double().flatten(), groups.flatten())
    close(w.flatten(), exact, 1e-10 if dtype == torch.float64 else 2e-6)  # |t L| up to 7: 7 ulp


def test_noncontiguous(rule, rng):
    losses, groups = tensor(rng.exponential(1.0, (5, 8))), tensor(rng.integers(0, 4, (5, 8)))
    mask = tensor(rng.random((5, 8)) < 0.6)
    strided = [x.t()[::2] for x in (losses, groups, mask)]
    w, plain = (rule(x, g, mask=m) for x, g, m in (strided, [x.contiguous() for x in strided]))
    assert torch.equal(w, plain)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_rows_that_do_not_count(rule, bad, rng):
    """Masked: 0. NaN and inf: NaN. The others as if alone; groups 2 and 3 are masked and bad as wholes."""
    losses, groups = rng.exponential(1.0, 19), np.arange(19) % 2
    mask = np.ones(19, bool)
    groups[[3, 4]], mask[[3, 4]] = 2, False
    groups[[7, 8]], losses[[7, 8]] = 3, bad
    mask[0], losses[0] = False, bad  # masked wins
    losses[9] = 1e30
    mask[9] = False  # not in any sum, maximum or range
    losses[12] = bad
    good = mask & np.isfinite(losses)
    w = rule(tensor(losses), tensor(groups), mask=tensor(mask))
    assert (w[~tensor(mask)] == 0).all() and w[[7, 8, 12]].isnan().all()
    close(w[tensor(good)], rule.exact(losses[good], groups[good]))


@pytest.mark.parametrize("shape", [(0,), (3, 0)], ids=str)
def test_empty(rule, shape):
    w = rule(torch.zeros(shape), torch.zeros(shape, dtype=torch.int64))
    assert w.shape == shape and w.dtype == torch.float32


def test_no_row_counts(rule):
    """All masked: zeros; all bad: NaN; both: each its own."""
    losses, groups = torch.tensor([1.0, NAN, INF]), torch.tensor([0, 1, 1])
    assert rule(losses, groups, mask=torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]
    w = rule(losses, groups, mask=torch.tensor([False, True, True]))
    assert w[0] == 0 and w[1:].isnan().all()


EXTREMES = [
    [1e30, -1e30, 0.0, 1.0, 1e30],
    [1e30, 1e30, 1e30],
    [0.7, 0.7, 0.7, 0.7, 0.7],  # 0.7 + 0.7 + 0.7 is not 3 * 0.7
    [-1e30, -1e30],
    [1e30],
    [0.0],
    [1e30, 1.0, 1e-30, 0.0],
    [1e-30, 0.0, 2e-30],
    [1e-45, 0.0],  # the smallest float32
    [1.0, 1.0 + 2**-23],
    [3e38, -3e38],  # near the largest float32
    [0.0, -0.0],
]
STRETCHED = {
    **{f"term({t:g})": partial(weights.term, t=t) for t in (1e30, -1e30, 1e-30, 0.0, INF, -INF, 88.0)},
    **{f"cvar({b:g}, {r:g})": partial(weights.cvar, beta=b, reg=r) for b in (1e-30, 0.5, 1.0) for r in (0, 1e-30, 1.0, 1e30)},
    **{f"chi2({r:g})": partial(weights.chi2, rho=r) for r in (0.0, 1e-30, 0.3, 1e30)},
    **{
        f"groups({t:g}, {u:g})": partial(weights.term, t=t, t_group=u)
        for t in (1e30, -1e30, 1e-30, 0.0, INF, -INF)
        for u in (1e30, -1e30, 1e-30, 1.0, INF, -INF)
    },
}


@pytest.mark.parametrize("name", STRETCHED)
def test_extremes(name):
    """Finite losses never give NaN: W is in [0, n], has mean 1, and ties within a group weigh the same."""
    for values in EXTREMES:
        for dtype in (torch.float32, torch.float64):
            losses = torch.tensor(values, dtype=dtype)
            n, groups = len(values), torch.tensor([0, 1, 1, 0, 0][: len(values)])
            more = {"groups": groups} if name.startswith("groups") else {}
            w = STRETCHED[name](losses, **more)
            assert ((w >= 0) & (w <= n * (1 + 1e-6))).all(), (values, w)  # NaN is neither
            assert float(w.double().mean()) == pytest.approx(1, rel=1e-6), (values, w)
            for i in range(n):
                for j in range(i):
                    if values[i] == values[j] and (not more or groups[i] == groups[j]):
                        assert w[i] == w[j], (values, w)
            if losses.max() == losses.min():  # groups tie as well: all their rows alike
                assert w.tolist() == pytest.approx([1] * n), (values, w)


@pytest.mark.parametrize("eta", [0.01, 1e10])
def test_group_dro_extremes(eta):
    """exp(eta 1e30) is infinite in any precision: all of q goes to the group that loses most, and comes back finite."""
    rule = weights.GroupDRO(3, eta)
    groups = torch.tensor([0, 1, 1])
    for values in ([1e30, 0.0, 1.0], [1e30, 1e30, 1e30], [-1e30, -1e30, 3.0], [0.0, 0.0, 0.0], [0.0, 1e30, 1e30]):
        w = rule(torch.tensor(values), groups)
        assert ((w >= 0) & (w <= 3)).all() and float(rule.q.sum()) == pytest.approx(1, rel=1e-5)
    first = weights.GroupDRO(3, eta)
    assert first(torch.tensor([1e30, 0.0, 1.0]), groups).tolist() == [3, 0, 0] and first.q.tolist() == [1, 0, 0]


# ---- the state of group DRO -------------------------------------------------------------------------------------------


def moved(rule, *args, **keywords):
    before = rule.log_q.clone()
    w = rule(*args, **keywords)
    return w, not torch.equal(before, rule.log_q)


def test_when_q_moves():
    """Only in training mode with gradients enabled and update=True; the weights are those of the new q in any case."""
    rule, losses, groups = weights.GroupDRO(3, 0.5), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1])
    rule(torch.tensor([1.0, 3.0]), torch.tensor([2, 1]))  # not from the start, where q is uniform
    wanted = copy.deepcopy(rule)(losses, groups)
    for kept in (lambda: moved(rule, losses, groups, update=False), torch.no_grad()(lambda: moved(rule, losses, groups))):
        w, changed = kept()
        assert torch.equal(w, wanted) and not changed
    w, changed = moved(rule.eval(), losses, groups)
    assert torch.equal(w, wanted) and not changed
    w, changed = moved(rule.train(), losses, groups)
    assert torch.equal(w, wanted) and changed


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_row_leaves_q(bad):
    """Unless it is masked; the other rows have the weights that they have alone."""
    rule, losses, groups = weights.GroupDRO(3, 0.5), torch.tensor([1.0, bad, 4.0, 2.0]), torch.tensor([0, 0, 1, 1])
    wanted = copy.deepcopy(rule)(losses[[0, 2, 3]], groups[[0, 2, 3]])
    w, changed = moved(rule, losses, groups)
    assert not changed and math.isnan(w[1])
    torch.testing.assert_close(w[[0, 2, 3]], wanted)
    w, changed = moved(rule, losses, groups, mask=torch.tensor([True, False, True, True]))
    assert changed and w[1] == 0
    torch.testing.assert_close(w[[0, 2, 3]], wanted)


def test_batches_of_nothing_leave_q():
    rule = weights.GroupDRO(2, 0.5)
    rule(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    before = rule.q.clone()
    rule(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    rule(torch.ones(2), torch.tensor([0, 1]), mask=torch.zeros(2, dtype=torch.bool))
    torch.testing.assert_close(rule.q, before)


def test_state_of_group_dro():
    rule = weights.GroupDRO(3, 0.5)
    rule(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    assert rule.log_q.dtype == torch.float32 and not rule.log_q.requires_grad
    torch.testing.assert_close(rule.q, rule.log_q.exp())
    fresh = weights.GroupDRO(3, 0.5)
    fresh.load_state_dict(rule.state_dict())
    for other in (fresh, copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
        assert torch.equal(other.log_q, rule.log_q) and other.log_q is not rule.log_q
    for narrow in ("bfloat16", "half"):
        cast = getattr(copy.deepcopy(rule), narrow)()
        assert torch.equal(cast.log_q, rule.log_q) and cast.log_q.dtype == torch.float32
    assert copy.deepcopy(rule).double().log_q.dtype == torch.float64


# ---- bad arguments ----------------------------------------------------------------------------------------------------


BAD = {
    "t is nan": (lambda: weights.term(L3, NAN), ValueError, r"\bt\b"),
    "t_group is nan": (lambda: weights.term(L3, 1.0, G3, NAN), ValueError, "t_group"),
    "t_group alone": (lambda: weights.term(L3, 1.0, t_group=1.0), ValueError, "groups"),
    "groups: shape": (lambda: weights.term(L3, 1.0, G3[:2]), ValueError, "groups"),
    "groups: broadcast": (lambda: weights.term(L3, 1.0, G3[:1]), ValueError, "groups"),
    "groups: float": (lambda: weights.term(L3, 1.0, G3.float()), TypeError, "groups"),
    "term: mask": (lambda: weights.term(L3, 1.0, mask=torch.ones(2, dtype=torch.bool)), ValueError, "mask"),
    "term: mask, grouped": (lambda: weights.term(L3, 1.0, G3, mask=torch.ones(2, dtype=torch.bool)), ValueError, "mask"),
    "term: integers": (lambda: weights.term(G3, 1.0), (TypeError, ValueError), "losses"),
    "term: integers, grouped": (lambda: weights.term(G3, 1.0, G3), (TypeError, ValueError), "losses"),
    "term: 0-d": (lambda: weights.term(torch.tensor(1.0), 1.0), (TypeError, ValueError), "losses"),
    **{f"beta {b}": (partial(weights.cvar, L3, b), ValueError, "beta") for b in (0.0, -0.1, 1.1, INF, NAN)},
    **{f"reg {r}": (partial(weights.cvar, L3, 0.5, r), ValueError, "reg") for r in (-0.1, INF, NAN)},
    "cvar: mask": (lambda: weights.cvar(L3, 0.5, mask=torch.ones(1, 3, dtype=torch.bool)), ValueError, "mask"),
    "cvar: integers": (lambda: weights.cvar(G3, 0.5), (TypeError, ValueError), "losses"),
    "cvar: 0-d": (lambda: weights.cvar(torch.tensor(1.0), 0.5), (TypeError, ValueError), "losses"),
    **{f"rho {r}": (partial(weights.chi2, L3, r), ValueError, "rho") for r in (-0.1, -INF, NAN)},
    "chi2: mask": (lambda: weights.chi2(L3, 0.5, mask=torch.ones(2, dtype=torch.bool)), ValueError, "mask"),
    "chi2: integers": (lambda: weights.chi2(G3, 0.5), (TypeError, ValueError), "losses"),
    "chi2: 0-d": (lambda: weights.chi2(torch.tensor(1.0), 0.5), (TypeError, ValueError), "losses"),
    **{f"n_groups {n}": (partial(weights.GroupDRO, n), ValueError, "n_groups") for n in (0, -1)},
    **{f"eta {e}": (partial(weights.GroupDRO, 2, e), ValueError, "eta") for e in (-0.1, INF, NAN)},
    "dro: shape": (lambda: weights.GroupDRO(2)(L3, G3[:2]), ValueError, "groups"),
    "dro: float": (lambda: weights.GroupDRO(2)(L3, G3.float()), TypeError, "groups"),
    "dro: mask": (lambda: weights.GroupDRO(2)(L3, G3, mask=torch.ones(2, dtype=torch.bool)), ValueError, "mask"),
    "dro: too large": (lambda: weights.GroupDRO(2)(L3, G3 + 1), IndexError, "2"),
    "dro: negative": (lambda: weights.GroupDRO(2)(L3, G3 - 1), IndexError, "-1"),
    "dro: integers": (lambda: weights.GroupDRO(2)(G3, G3), (TypeError, ValueError), "losses"),
    "dro: 0-d": (lambda: weights.GroupDRO(2)(torch.tensor(1.0), torch.tensor(0)), (TypeError, ValueError), "losses"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    call, error, names = BAD[name]
    with pytest.raises(error, match=names):
        call()


def test_a_masked_row_may_have_any_group():
    """-1 often stands for "unknown"; an index of it must not be read. An error leaves q as it was."""
    rule = weights.GroupDRO(2, 0.5)
    w = rule(L3, torch.tensor([0, -1, 2**40]), mask=torch.tensor([True, False, False]))
    close(w, [rule.q[0].item(), 0, 0], 1e-6)
    before = rule.log_q.clone()
    with pytest.raises(IndexError):
        rule(L3, torch.tensor([0, -1, 1]))
    assert torch.equal(before, rule.log_q)


# ---- the host never waits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        partial(weights.term, t=2.0),
        partial(weights.term, t=-INF),
        partial(weights.term, t=2.0, t_group=3.0),
        partial(weights.cvar, beta=0.3),
        partial(weights.cvar, beta=0.3, reg=0.5),
        partial(weights.chi2, rho=0.4),
        weights.GroupDRO(3),
    ],
    ids=lambda rule: repr(getattr(rule, "keywords", "group DRO")),
)
def test_the_host_never_waits(rule):
    """A tensor on `meta` has no numbers: whatever would wait for one of a GPU's raises there."""
    losses, mask = torch.empty(7, device="meta"), torch.empty(7, dtype=torch.bool, device="meta")
    groups = torch.empty(7, dtype=torch.int64, device="meta")
    rule = copy.deepcopy(rule).to("meta") if isinstance(rule, nn.Module) else rule
    grouped = {"groups": groups} if isinstance(rule, nn.Module) or "t_group" in rule.keywords else {}
    assert rule(losses, mask=mask, **grouped).shape == (7,)
    criterion = ab.ABLoss(identity, rule=rule).to("meta")
    criterion(losses.requires_grad_(), mask=mask, **grouped).backward()
    assert losses.grad.shape == (7,)
    with pytest.raises(RuntimeError):
        losses.sum().item()


@pytest.mark.parametrize("count", [1, 5, 1000])
def test_every_instruction_set(backend, count):
    """Each searches the level in float64; 1000 losses take many rounds. (The float64 oracles above judge the best one.)"""
    losses = torch.randn(count, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    groups, mask = torch.arange(count) % 3, torch.arange(count) % 7 != 2
    for rule in (
        partial(weights.cvar, beta=0.13, mask=mask),
        partial(weights.cvar, beta=0.13, reg=0.2, mask=mask),
        partial(weights.chi2, rho=0.4),
        partial(weights.chi2, rho=1e-3, mask=mask),
    ):
        close(rule(losses.double(), backend=backend), rule(losses.double(), backend="reference"))
    ours, plain = (weights.GroupDRO(3, 0.7, backend=b) for b in (backend, "reference"))
    for _ in range(3):
        torch.testing.assert_close(ours(losses, groups, mask=mask), plain(losses, groups, mask=mask), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.log_q, plain.log_q)


@pytest.mark.parametrize("way", ["kernels"], indirect=True)
@pytest.mark.parametrize("kind", ["plain", "ties", "2^-100 to 2^100", "1e30", "denormal", "outliers", "all but one alike"])
def test_both_ways_agree(kind):
    """200 batches of a kind; one of the second found a search for mu that never ended, one of the fourth false ties."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=random, dtype=torch.float64)  # noqa: E731
    for _ in range(200):
        n = int(torch.randint(1, 30, (), generator=random))
        x = draw(n)
        if kind == "ties":
            x = x.round()
        elif kind == "2^-100 to 2^100":
            x = x * 2.0 ** torch.randint(-100, 100, (n,), generator=random)
        elif kind == "1e30":
            x = x + 1e30 * torch.randint(-1, 2, (n,), generator=random)
        elif kind == "denormal":
            x = x * 1e-310
        elif kind == "outliers":
            x = torch.where(draw(n) > 0.5, x * 1e6, x)
        elif kind == "all but one alike":
            x = torch.cat([torch.tensor([-1.0]), -(2.0 ** -torch.randint(0, 400, (n,), generator=random).double())]).double()
        beta, reg, rho = 0.01 + 0.99 * float(torch.rand((), generator=random)), 10 ** float(2 * draw()), 10 ** float(2 * draw())
        for rule in (partial(weights.cvar, beta=beta), partial(weights.cvar, beta=beta, reg=reg), partial(weights.chi2, rho=rho)):
            ours, plain = rule(x), rule(x, backend="reference")
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
            assert float(ours.mean()) == pytest.approx(1, abs=1e-9)
    six = [
        7.0343731517876276e-15,
        -5.6461432751397922e-11,
        -6.4837110443015507e26,
        3.7198334691290546e-12,
        -2.67e-07,
        -769658126336.0,
    ]
    assert weights.chi2(torch.tensor(six), rho=0.1).tolist() == pytest.approx([1.2, 1.2, 0, 1.2, 1.2, 1.2])


# ---- at the edges ------------------------------------------------------------------------------------------------------


def test_a_state_of_another_lambda_is_refused():
    """Loaded, it would weigh a second time; a rule's own state is taken."""
    rule = partial(weights.cvar, beta=0.5)
    criterion = ab.ABLoss(identity, rule=rule)
    before = criterion(L3)
    with pytest.raises(RuntimeError, match=r"another lambda or rule than cvar\(beta=0.5\)"):
        criterion.load_state_dict(ab.ABLoss(identity, lam=-0.5).state_dict())
    with pytest.raises(RuntimeError, match="another lambda"):
        ab.ABLoss(identity, rule=partial(weights.term, t=4.0)).load_state_dict(criterion.state_dict())
    criterion.load_state_dict(ab.ABLoss(identity, rule=rule).state_dict())
    assert torch.equal(criterion(L3), before)
    tilted, exact = (ab.ABLoss(identity, rule=partial(weights.term, t=3.0)) for _ in range(2))
    tilted.load_state_dict(exact.double().state_dict())


def test_narrow_groups():
    """int8 cannot hold the number of groups."""
    for backend in (None, "reference"):
        groups = torch.tensor([0, 1, 2, 100], dtype=torch.int8)
        assert weights.GroupDRO(200, backend=backend)(torch.rand(4), groups).isfinite().all()
        with pytest.raises(IndexError, match="got -1 in row 1"):
            weights.GroupDRO(200, backend=backend)(torch.rand(2), torch.tensor([0, -1], dtype=torch.int8))


def test_groups_whose_step_leaves_the_range():
    losses, groups = torch.tensor([1e30, 1.0]), torch.tensor([0, 1])
    assert weights.GroupDRO(2, eta=1e290)(losses, groups).tolist() == [2.0, 0.0]
    assert weights.GroupDRO(2, eta=1e300)(losses, groups).tolist() == [1.0, 1.0]  # both beyond: alike


def test_what_a_wrapped_rule_takes():
    x, groups = torch.rand(6), torch.arange(6) % 2
    for rule in (weights.GroupDRO(2), partial(weights.GroupDRO(2)), torch.compile(weights.GroupDRO(2), backend="eager")):
        ab.ABLoss(identity, rule=rule)(x, groups=groups)
    with pytest.raises(ValueError, match="the rule of this ABLoss has no argument `groups`"):
        ab.ABLoss(identity, rule=partial(weights.term, t=1.0, groups=groups))(x, groups=groups)


@pytest.mark.parametrize("way", ["kernels"], indirect=True)
def test_a_long_search_is_short():
    """16,000 losses and a penalty far below their distances: half of them reach the bound one by one (1.2 s at first)."""
    x = torch.randn(16000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = time.perf_counter()
    ours = weights.cvar(x, 0.5, reg=1e-6)
    assert time.perf_counter() - start < 0.5
    close(ours, weights.cvar(x, 0.5, reg=1e-6, backend="reference"))
