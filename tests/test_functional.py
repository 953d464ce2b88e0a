"""robust_weights and logit_loss as pure functions: the facts of MATH §1.3 as properties, derivatives, dtypes, errors."""

import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import absgd_fast as ab
from absgd_fast.functional import logit_loss, robust_weights

INF = math.inf


@st.composite
def batches(draw, largest=50.0):
    """Losses (n,), n from 1 to 70: below, at and above four lanes of 16; and a state from the start or the middle of a run."""
    n = draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    losses = np.minimum(rng.exponential(draw(st.sampled_from([0.1, 1.0, 10.0])), n), largest)
    mask = rng.random(n) < 0.7 if draw(st.booleans()) else None
    return losses, mask, draw(st.sampled_from([-INF, -4.0, 0.0, 3.0]))


lams = st.sampled_from([-20.0, -1.0, -0.3, 0.3, 1.0, 20.0])
shares = st.sampled_from([1.0, 0.9, 0.5, 0.01])
inits = st.sampled_from(["first", "zero"])


def tensor(x, **kw):
    return torch.tensor(np.asarray(x), **kw)


# ---- robust_weights: values ---------------------------------------------------------------------------------------


@given(batch=batches(), lam=lams, gamma=shares, alpha=shares, init=inits)
def test_weights_are_the_formula(backend, batch, lam, gamma, alpha, init):
    losses, mask, log_s = batch
    options = dict(gamma=gamma, alpha=alpha, init=init)
    exact = oracle.robust_weights(losses, log_s, lam, mask=mask, **options)
    mask = None if mask is None else tensor(mask)
    weights, new = robust_weights(tensor(losses), log_s, lam, mask=mask, backend=backend, **options)
    # |z| reaches 167, which costs fp64's exp 167 ulp: 4e-14
    np.testing.assert_allclose(weights, exact.weights, rtol=1e-12)
    np.testing.assert_allclose(new, exact.log_s, rtol=1e-12, atol=1e-14)


@given(batch=batches(), lam=lams, gamma=shares, init=inits)
def test_fp32_loses_only_what_fp32_must(backend, batch, lam, gamma, init):
    """exp(z - log s') in fp32 cannot beat ulp(z) + ulp(log s'): eight of each are allowed."""
    losses, _, log_s = batch
    losses = losses.astype(np.float32)
    exact = oracle.robust_weights(losses, log_s, lam, gamma=gamma, init=init)
    weights, new = robust_weights(tensor(losses), log_s, lam, gamma=gamma, init=init, backend=backend)
    size = 1 + np.abs(losses / lam).max() + abs(exact.norm)
    np.testing.assert_allclose(weights, exact.weights, rtol=8 * size * 2**-24, atol=1e-37)
    np.testing.assert_allclose(new, exact.log_s, atol=8 * size * 2**-24)


@given(batch=batches(1e4), lam=st.sampled_from([-10.0, -0.1, -1e-3, 1e-3, 0.1, 10.0]), gamma=shares, alpha=shares, init=inits)
def test_weights_are_bounded(backend, batch, lam, gamma, alpha, init):
    """W <= n/(gamma' alpha) whatever lam and L: |z| goes to 1e7 here, where a bare exp has long overflowed."""
    losses, mask, log_s = batch
    first = init == "first" and log_s == -INF
    valid = np.ones(len(losses), bool) if mask is None else mask
    weights, new = robust_weights(
        tensor(100 * losses), log_s, lam, gamma=gamma, alpha=alpha, init=init, mask=tensor(valid), backend=backend
    )
    assert torch.isfinite(weights).all() and not torch.isnan(new)
    assert weights.max() <= valid.sum() / ((1 if first else gamma) * alpha) * (1 + 1e-8)


@given(batch=batches(), lam=lams, init=inits)
def test_fresh_state_is_softmax(backend, batch, lam, init):
    losses, _, _ = batch
    weights, _ = robust_weights(tensor(losses), -INF, lam, gamma=1.0, alpha=1.0, init=init, backend=backend)
    z = losses / lam
    softmax = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    np.testing.assert_allclose(weights / len(losses), softmax, rtol=1e-12)


@given(batch=batches(), lam=lams, gamma=shares, alpha=shares, init=inits, shift=st.sampled_from([-3.0, 1.0, 200.0]))
def test_fresh_state_ignores_a_constant(backend, batch, lam, gamma, alpha, init, shift):
    losses, _, _ = batch
    options = dict(gamma=gamma, alpha=alpha, init=init, backend=backend)
    plain, log_s = robust_weights(tensor(losses), -INF, lam, **options)
    moved, moved_log_s = robust_weights(tensor(losses + shift), -INF, lam, **options)
    np.testing.assert_allclose(moved, plain, rtol=1e-11)
    np.testing.assert_allclose(moved_log_s, log_s + shift / lam, rtol=1e-12, atol=1e-11)


@given(batch=batches(), lam=lams)
def test_shares_at_the_first_step(backend, batch, lam):
    """mean W = 1/alpha under init="first", the spike 1/(gamma alpha) under init="zero"."""
    losses, _, _ = batch
    for init, share in (("first", 0.5), ("zero", 0.5 * 0.8)):
        weights, _ = robust_weights(tensor(losses), -INF, lam, gamma=0.8, alpha=0.5, init=init, backend=backend)
        assert float(weights.mean()) == pytest.approx(1 / share, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_numbers_in_tensors(backend, dtype):
    """log s and lambda as 0-d tensors of any dtype are their numbers. The new log s has a dtype that keeps small changes."""
    losses = torch.tensor([1.0, 50.0, 3.0])
    lam, log_s = (0.75, 0.25) if dtype.is_floating_point else (2, 1)
    expected = robust_weights(losses, log_s, lam, backend=backend)
    weights, new = robust_weights(losses, torch.tensor(log_s, dtype=dtype), torch.tensor(lam, dtype=dtype), backend=backend)
    torch.testing.assert_close((weights, new.float()), expected)
    assert new.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("lam", [INF, -INF])
@pytest.mark.parametrize("log_s", [-INF, 0.7])
def test_infinite_lam_is_the_plain_mean(backend, lam, log_s):
    mask = torch.tensor([True, True, False])
    weights, new = robust_weights(torch.tensor([1.0, 50.0, 3.0]), log_s, lam, mask=mask, backend=backend)
    assert weights.tolist() == [1, 1, 0] and float(new) == pytest.approx(log_s)


@pytest.mark.parametrize("losses, mask", [([], None), ([1.0, 2.0], [False, False])], ids=["empty", "masked"])
@pytest.mark.parametrize("log_s", [-INF, 0.7])
def test_no_valid_row_leaves_the_state(backend, losses, mask, log_s):
    leaf = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    mask = None if mask is None else torch.tensor(mask)
    weights, new = robust_weights(leaf, log_s, 0.5, mask=mask, backend=backend)
    assert weights.tolist() == [0.0] * len(losses) and new.item() == log_s
    (grad,) = torch.autograd.grad(weights.sum(), leaf)
    assert grad.tolist() == [0.0] * len(losses)


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("lam", [0.5, -0.5])
def test_nonfinite_rows(backend, bad, lam):
    """19 losses: the bad one sits in each place once, in a full lane, in the tail, and under a mask."""
    losses = np.linspace(0.1, 3, 19)
    for at in range(19):
        broken = losses.copy()
        broken[at] = bad
        exact = oracle.robust_weights(broken, 0.4, lam)
        weights, new = robust_weights(tensor(broken), 0.4, lam, backend=backend)
        np.testing.assert_allclose(weights, exact.weights, rtol=1e-12)  # NaN at `at`, the others as if it were absent
        assert float(new) == 0.4 and math.isnan(weights[at])
        mask = np.arange(19) != at
        exact = oracle.robust_weights(losses, 0.4, lam, mask=mask)
        weights, new = robust_weights(tensor(broken), 0.4, lam, mask=tensor(mask), backend=backend)
        np.testing.assert_allclose(weights, exact.weights, rtol=1e-12)
        np.testing.assert_allclose(new, exact.log_s, rtol=1e-12)


def test_overflow_of_the_exponent_counts_as_nonfinite(backend):
    """1e30 / 1e-10 is finite in fp64 and infinite in fp32, the precision of these losses."""
    losses = torch.tensor([1e30, 1e-10])
    weights, new = robust_weights(losses, 0.25, 1e-10, backend=backend)
    exact = oracle.robust_weights(losses, 0.25, 1e-10, largest=float(torch.finfo(torch.float32).max))
    assert math.isnan(weights[0]) and float(new) == 0.25
    np.testing.assert_allclose(weights[1], exact.weights[1], rtol=1e-6)


@pytest.mark.parametrize("where", ["float", "fp32", "fp64"])
def test_dtypes(backend, dtype, where):
    """Weights: the dtype of the losses, fp32 for halves. log s: the dtype it came in, else fp64 for fp64, fp32 otherwise."""
    losses = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given_dtype = {"float": None, "fp32": torch.float32, "fp64": torch.float64}[where]
    log_s = 0.5 if given_dtype is None else torch.tensor(0.5, dtype=given_dtype)
    lam = 0.75 if given_dtype is None else torch.tensor(0.75, dtype=given_dtype)
    weights, new = robust_weights(losses, log_s, lam, backend=backend)
    assert weights.dtype == wide and new.dtype == (given_dtype or wide) and new.shape == ()
    exact = oracle.robust_weights(losses.double(), 0.5, 0.75)
    np.testing.assert_allclose(weights, exact.weights, rtol=1e-6)
    np.testing.assert_allclose(new, exact.log_s, rtol=1e-6)


def test_inputs_are_left_alone(backend):
    """The state is returned, not written, and never the same memory, not even where it does not change."""
    for mask in (None, torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.bool)):
        losses, log_s, lam = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(0.5), torch.tensor(-0.7)
        before = [t.clone() for t in (losses, log_s, lam)]
        weights, new = robust_weights(losses, log_s, lam, mask=mask, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip((losses, log_s, lam), before))
        assert len({t.data_ptr() for t in (losses, log_s, lam, weights, new)}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_losses(backend, dtype):
    """A step of 2, an odd offset (misaligned for any vector), a column, one value expanded."""
    base = torch.linspace(0.1, 4, 82, dtype=dtype)
    for losses in (base[::2], base[3:20], base.reshape(41, 2)[:, 1], base[5].expand(7)):
        exact = oracle.robust_weights(losses.double(), 0.3, 0.8)
        weights, new = robust_weights(losses, 0.3, 0.8, backend=backend)
        np.testing.assert_allclose(weights, exact.weights, rtol=2e-6)
        np.testing.assert_allclose(new, exact.log_s, rtol=2e-6)


def test_same_bits_for_1_and_2_threads(backend, threads):
    """300,000 losses are split among threads; the order of summation must not depend on it."""
    losses = torch.rand(300_000, generator=torch.Generator().manual_seed(0)) * 5
    results = []
    for n in (1, 2, 2, 1):
        threads(n)
        leaf = losses.clone().requires_grad_()
        weights, new = robust_weights(leaf, 0.3, 0.8, backend=backend)
        (grad,) = torch.autograd.grad(weights.square().sum() + new, leaf)
        results.append((weights.detach(), new.detach(), grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    z = losses.double() / 0.8
    exact = torch.logaddexp(torch.tensor(math.log(0.1) + 0.3), math.log(0.9) + z.logsumexp(0) - math.log(300_000))
    assert float(results[0][1]) == pytest.approx(float(exact), rel=1e-6)


# ---- robust_weights: derivatives ----------------------------------------------------------------------------------


@given(batch=batches(5.0), lam=lams, gamma=shares, alpha=shares, init=inits, seed=st.integers(0, 99))
def test_vjp(backend, batch, lam, gamma, alpha, init, seed):
    """d/dz_j = W_j d_j - (gamma' alpha W_j / n) sum W_i d_i + e gamma' alpha W_j / n, for upstream d on W and e on log s'."""
    losses, mask, log_s = batch
    exact = oracle.robust_weights(losses, log_s, lam, gamma=gamma, alpha=alpha, init=init, mask=mask)
    w, n = exact.weights, max(exact.good.sum(), 1)
    share = (1 if init == "first" and log_s == -INF else gamma) * alpha
    rng = np.random.default_rng(seed)
    d, e = rng.normal(size=len(losses)), float(rng.normal())
    wanted = np.where(exact.good, (w * d - share * w / n * (w * d).sum() + e * share * w / n) / lam, 0.0)
    leaf = tensor(losses, requires_grad=True)
    weights, new = robust_weights(
        leaf, log_s, lam, gamma=gamma, alpha=alpha, init=init, backend=backend, mask=None if mask is None else tensor(mask)
    )
    (grad,) = torch.autograd.grad([weights, new], leaf, [tensor(d), torch.tensor(e, dtype=new.dtype)])
    np.testing.assert_allclose(grad, wanted, rtol=1e-9, atol=1e-11 * np.abs(w).max() ** 2)


@given(batch=batches(5.0), lam=lams, gamma=shares, alpha=shares, init=inits)
def test_objective_gradient(backend, batch, lam, gamma, alpha, init):
    """d(lam log s')/dL_j = gamma' alpha W_j / n, against central differences of the oracle; gamma' = alpha = 1: mean of W."""
    losses, mask, log_s = batch
    assume(mask is None or mask.any())
    options = dict(gamma=gamma, alpha=alpha, init=init)
    leaf = tensor(losses, requires_grad=True)
    weights, new = robust_weights(leaf, log_s, lam, backend=backend, mask=None if mask is None else tensor(mask), **options)
    (grad,) = torch.autograd.grad(lam * new, leaf)
    share = (1 if init == "first" and log_s == -INF else gamma) * alpha
    n = len(losses) if mask is None else mask.sum()
    np.testing.assert_allclose(grad, share * weights.detach() / n, rtol=1e-11, atol=1e-300)
    for j in {0, len(losses) - 1}:  # both ends: a lane and the tail
        step = np.eye(len(losses))[j] * 1e-6
        up, down = (oracle.robust_weights(losses + s, log_s, lam, mask=mask, **options).log_s for s in (step, -step))
        assert float(grad[j]) == pytest.approx(lam * (up - down) / 2e-6, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("log_s", [-INF, 0.3])
@pytest.mark.parametrize("init", ["first", "zero"])
@pytest.mark.parametrize("lam", [0.8, -0.5])
def test_gradcheck_weights(backend, log_s, init, lam):
    """19 losses: a lane of 16, a tail, and three masked rows."""
    losses = torch.linspace(0.1, 3, 19, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(19) % 7 != 3
    assert torch.autograd.gradcheck(
        lambda x: robust_weights(x, log_s, lam, gamma=0.7, alpha=0.6, init=init, mask=mask, backend=backend), losses
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vjp_dtype(backend, dtype):
    leaf = torch.tensor([0.5, 1.0, 4.0], dtype=dtype, requires_grad=True)
    weights, _ = robust_weights(leaf, 0.2, 0.9, backend=backend)
    weights[0].backward()
    w = oracle.robust_weights(leaf.detach().double(), 0.2, 0.9).weights
    wanted = np.array([w[0], 0, 0]) - 0.9 * w / 3 * w[0]
    assert leaf.grad.dtype == dtype
    np.testing.assert_allclose(leaf.grad.double(), wanted / 0.9, rtol=4 * torch.finfo(dtype).eps)


def test_vjp_around_a_nonfinite_row(backend):
    """The bad row's own gradient is NaN; through their weights, the others' are those of the batch without it."""
    leaf = torch.tensor([0.5, math.nan, 2.0], dtype=torch.float64, requires_grad=True)
    weights, _ = robust_weights(leaf, 0.2, 0.9, backend=backend)
    (grad,) = torch.autograd.grad(weights, leaf, torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64))
    clean = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    w, _ = robust_weights(clean, 0.2, 0.9, backend=backend)
    (wanted,) = torch.autograd.grad(w, clean, torch.tensor([1.0, -2.0], dtype=torch.float64))
    np.testing.assert_allclose(grad[[0, 2]], wanted, rtol=1e-12)
    assert math.isnan(grad[1])


# ---- logit_loss: derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 5)], ids=str)
def test_gradcheck_logit_loss(backend, case, shape, rng):
    logits = tensor(rng.normal(0, 2, shape), requires_grad=True)
    target = torch.arange(shape[0] * math.prod(shape[2:])).reshape(shape[0], *shape[2:]) % shape[1]
    options = case.tensors(shape[1], torch.float64)
    assert torch.autograd.gradcheck(lambda x: logit_loss(x, target, backend=backend, **options), logits)


# ---- logit_loss: the family as properties -------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)


def batch_of(seed):
    """fp64 logits of 1 to 9 rows, 1 to 40 classes (below, at, above lanes of 4 and 8), |x| up to about 15; labels; counts."""
    rng = np.random.default_rng(seed)
    rows, classes = rng.integers(1, 10), rng.integers(1, 41)
    numbers = [int(n) for n in rng.integers(1, 1000, classes)]
    return tensor(rng.normal(0, 4, (rows, classes)), requires_grad=True), tensor(rng.integers(0, classes, rows)), numbers, rng


def both(f, logits):
    """Losses and the gradient of a weighted sum of them."""
    losses = f(logits)
    (grad,) = torch.autograd.grad(losses, logits, torch.linspace(-1, 2, len(losses), dtype=losses.dtype))
    return losses.detach(), grad


def assert_same(f, g, logits, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(both(f, logits), both(g, logits), rtol=rtol, atol=atol)


@given(seed=seeds)
def test_neutral_options_are_cross_entropy(backend, seed):
    x, y, numbers, _ = batch_of(seed)
    ce = ab.CrossEntropy(backend=backend)
    for loss in (
        ab.LDAM(numbers, max_m=0.0, s=1.0, backend=backend),
        ab.Focal(gamma=0.0, backend=backend),
        ab.VS(numbers, gamma=0.0, tau=0.0, backend=backend),
        ab.LogitAdjusted(numbers, tau=0.0, backend=backend),
        ab.CDT(numbers, gamma=0.0, backend=backend),
        ab.CDT([7] * len(numbers), backend=backend),
        ab.SCE(alpha=1.0, beta=0.0, backend=backend),
    ):
        assert_same(lambda x: loss(x, y), lambda x: ce(x, y), x)


@given(seed=seeds, gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_focal_with_the_weight_inside(backend, seed, gamma):
    """The authors' form, m = w n, (1 - exp(-m))^gamma m: the oracle's numbers; with weights of 1 it is Focal."""
    x, y, _, rng = batch_of(seed)
    weight = tensor(rng.uniform(0.3, 2, x.shape[1]))
    losses = logit_loss(x, y, kind="weighted_focal", weight=weight, gamma=gamma, backend=backend)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    exact, exact_grad = oracle.logit_loss(x.detach(), y, kind="weighted_focal", weight=weight, gamma=gamma)
    np.testing.assert_allclose(losses.detach(), exact, rtol=1e-11, atol=1e-300)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-11, atol=1e-300)
    plain = ab.Focal(gamma, backend=backend)
    assert_same(lambda x: logit_loss(x, y, kind="weighted_focal", gamma=gamma, backend=backend), lambda x: plain(x, y), x)


@given(seed=seeds)
def test_limits_of_gce(backend, seed):
    """q = 1: 1 - p, half SCE's second term; q = 1e-7: n - q n^2 / 2, n up to 40; truncated: less a constant."""
    x, y, _, rng = batch_of(seed)
    gce = lambda **options: lambda x: logit_loss(x, y, kind="gce", backend=backend, **options)  # noqa: E731
    assert_same(gce(q=1.0), lambda x: 1 - x.softmax(1).gather(1, y[:, None])[:, 0], x)
    assert_same(gce(q=1.0), lambda x: logit_loss(x, y, kind="sce", alpha=0.0, beta=1 / oracle.A, backend=backend), x)
    assert_same(gce(q=1e-7), lambda x: logit_loss(x, y, backend=backend), x, rtol=1e-5, atol=1e-8)
    q, k = rng.uniform(0.05, 1), rng.uniform(0.01, 0.99)
    assert_same(gce(q=q, k=k), lambda x: gce(q=q)(x) - (1 - k**q) / q, x)


@given(seed=seeds)
def test_pruned_rows_are_ignored_rows(backend, seed):
    """Rows with p <= k, and only they: loss and gradient 0, the others as without `prune`; inside ABLoss they do not count."""
    x, y, _, rng = batch_of(seed)
    k = rng.uniform(0.05, 0.95)
    with torch.no_grad():
        keep = x.softmax(1).gather(1, y[:, None])[:, 0] > k
    labels = torch.where(keep, y, -100)
    options = dict(kind="gce", k=k, backend=backend)
    assert_same(lambda x: logit_loss(x, y, prune=True, **options), lambda x: logit_loss(x, labels, **options), x)
    values = []
    for loss, target in ((ab.GCE(k=k, prune=True, backend=backend), y), (ab.GCE(k=k, backend=backend), labels)):
        criterion = ab.ABLoss(loss, lam=0.5, backend=backend).double()
        value = criterion(x, target)
        values.append((value.detach(), *torch.autograd.grad(value, x), criterion.log_s.clone(), criterion.last.weights))
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)


@given(
    seed=seeds, kind=st.sampled_from(["ce", "focal", "gce", "sce"]), which=st.sets(st.sampled_from(["scale", "shift", "margin"]))
)
def test_class_vectors_are_adjusted_logits(backend, seed, kind, which):
    """a = S x + D - M at the label, by hand; any subset of the three, for every kind."""
    x, y, _, rng = batch_of(seed)
    classes = x.shape[1]
    vectors = {
        "scale": tensor(rng.uniform(0.2, 2, classes)),
        "shift": tensor(rng.normal(0, 2, classes)),
        "margin": tensor(rng.uniform(-1, 2, classes)),
    }
    vectors = {name: vectors[name] for name in which}

    def by_hand(x):
        a = x * vectors.get("scale", 1) + vectors.get("shift", 0)
        margin = vectors.get("margin", torch.zeros(classes, dtype=x.dtype))
        return logit_loss(a - torch.nn.functional.one_hot(y, classes) * margin, y, kind=kind, backend=backend)

    assert_same(lambda x: logit_loss(x, y, kind=kind, backend=backend, **vectors), by_hand, x)


# ---- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"lam": 0.0}, ValueError, "lam.*0"),
        ({"lam": math.nan}, ValueError, "lam.*nan"),
        ({"lam": torch.tensor([0.5])}, ValueError, r"lam.*\(1,\)"),
        ({"log_s": torch.zeros(2)}, ValueError, r"log_s.*\(2,\)"),
        ({"gamma": 0.0}, ValueError, "gamma.*0"),
        ({"gamma": 1.5}, ValueError, "gamma.*1.5"),
        ({"gamma": math.nan}, ValueError, "gamma.*nan"),
        ({"alpha": 0.0}, ValueError, "alpha.*0"),
        ({"alpha": 2.0}, ValueError, "alpha.*2"),
        ({"init": "last"}, ValueError, "init.*last.*first"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "mask.*4.*3"),
        ({"backend": "abacus"}, ValueError, "backend.*abacus"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_weight_errors(one_backend, change, error, words):
    call = dict(losses=torch.ones(3), log_s=0.0, lam=1.0, backend=one_backend) | change
    with pytest.raises(error, match=f"(?is){words}"):
        robust_weights(**call)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"kind": "hinge"}, ValueError, "kind.*hinge.*ce"),
        ({"target": torch.zeros(3)}, TypeError, "target.*float32.*int"),
        ({"target": torch.zeros(3, 4)}, TypeError, "float32.*3, 5"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, "target.*4.*logits have 3 rows, the target has 4"),
        ({"target": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, r"target.*3, 1.*use target\.squeeze\(1\)"),
        ({"target": torch.zeros(3, 5, dtype=torch.int64)}, ValueError, r"target.*3, 5.*target\.float\(\) .*probabilities"),
        ({"target": torch.zeros((), dtype=torch.int64)}, ValueError, r"target: got shape \(\).*\(B, d1, \.\.\.\)$"),
        ({"logits": torch.zeros(3)}, ValueError, r"^target: got shape \(3,\) for logits of shape \(3,\).*one sample.*shape \(\)"),
        ({"logits": torch.tensor([0, 1, 2]), "target": torch.zeros(3, 5)}, TypeError, "logits.*int64.*target swapped"),
        ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "logits.*int64.*float16$"),
        ({"target": torch.tensor([0, 7, 9])}, IndexError, r"\b7\b.*\b1\b|\b1\b.*\b7\b"),
        ({"target": torch.tensor([0, 1, -3])}, IndexError, r"-3\b.*\b2\b|\b2\b.*-3\b"),
        ({"target": torch.tensor([0, 1, 2**32 + 1])}, IndexError, r"\b4294967297\b"),  # 1 in its low 32 bits
        ({"target": torch.tensor([0, 2**32 - 100, 1])}, IndexError, r"\b4294967196\b"),  # -100 in them
        ({"target": torch.tensor([5, 1, 0], dtype=torch.int32)}, IndexError, r"\b5\b.*\b0\b|\b0\b.*\b5\b"),
        ({"weight": torch.ones(4)}, ValueError, "weight.*4.*5"),
        ({"scale": torch.ones(4)}, ValueError, "scale.*4.*5"),
        ({"shift": torch.ones(6)}, ValueError, "shift.*6.*5"),
        ({"margin": torch.ones(5, 1)}, ValueError, "margin.*5, 1.*5"),
        ({"scale": [1.0, 2.0, 3.0, 4.0, 5.0]}, (TypeError, ValueError), "scale.*tensor"),
        ({"kind": "focal", "gamma": -1.0}, ValueError, "gamma.*-1.*0"),
        ({"kind": "gce", "q": 0.0}, ValueError, r"\bq\b.*0"),
        ({"kind": "gce", "q": 1.5}, ValueError, r"\bq\b.*1.5"),
        ({"kind": "gce", "k": 1.0}, ValueError, r"\bk\b.*1"),
        ({"kind": "gce", "prune": True}, ValueError, r"prune.*\bk\b"),
        ({"kind": "sce", "alpha": -1.0}, ValueError, "alpha.*-1"),
        ({"kind": "sce", "beta": math.nan}, ValueError, "beta.*nan"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing.*1.5.*0, 1"),
        ({"kind": "gce", "label_smoothing": 0.1}, ValueError, "label_smoothing.*0.1.*gce"),
        ({"kind": "focal", "label_smoothing": 0.1}, ValueError, "label_smoothing.*0.1.*focal"),
        ({"kind": "sce", "label_smoothing": 0.1}, ValueError, "label_smoothing.*0.1.*sce"),
        ({"kind": "sce", "target": torch.zeros(3, 5)}, ValueError, "target.*probabilities.*labels"),
        ({"backend": "abacus"}, ValueError, "backend.*abacus"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)
def test_loss_errors(one_backend, change, error, words):
    call = dict(logits=torch.zeros(3, 5), target=torch.tensor([0, 1, 2]), backend=one_backend) | change
    with pytest.raises(error, match=f"(?is){words}"):
        logit_loss(**call)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA backend can run here")
@pytest.mark.parametrize("call", ["weights", "loss", "module"])
def test_forcing_an_unavailable_backend_says_why(call):
    with pytest.raises(RuntimeError, match="(?is)cuda.{10,}"):
        if call == "weights":
            robust_weights(torch.ones(3), 0.0, 1.0, backend="cuda")
        elif call == "loss":
            logit_loss(torch.zeros(3, 5), torch.tensor([0, 1, 2]), backend="cuda")
        else:
            ab.ABLoss(lam=1.0, backend="cuda")(torch.zeros(3, 5), torch.tensor([0, 1, 2]))
