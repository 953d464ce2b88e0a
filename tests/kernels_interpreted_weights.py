"""The Triton kernels of the robust loss, the weights and the scaled gradients in Triton's interpreter, against the oracle."""

import math
from functools import partial

import numpy as np
import oracle
import pytest
import target_cases
import torch
from tensors import DTYPES, class_weight, wide

pytest.importorskip("triton")

from interpreted_cases import INF, NAN, NORMALIZERS, close, exact_of, make, numbers, state, tolerance
from interpreted_hooks import counters_are_left_zero, launches, pytestmark  # noqa: F401

from absgd_fast import reference
from absgd_fast.kernels import launch, losses, rectified, scale, weights

# ---- robust weights ----------------------------------------------------------------------------------------------------


def robust(
    logits,
    target,
    log_s=-INF,
    lam=0.7,
    score=None,
    sample_weight=None,
    mask=None,
    update=True,
    upstream=1.0,
    weight=None,
    label_smoothing=0.0,
    report=None,
    state_dtype=None,
    **options,
):
    """loss, rows, gradient, log_s, nonfinite."""
    real = wide(logits.dtype)
    log_s, nonfinite, lam = state(log_s, lam, state_dtype or real)
    positional, flags = numbers(**options)
    loss, rows, stats = losses.robust_logit_loss(
        logits,
        target,
        weight,
        None,
        label_smoothing,
        0.0,
        -100,
        score,
        sample_weight,
        mask,
        log_s,
        nonfinite,
        lam,
        *positional,
        **flags,
        kind=0,
        prune=False,
        update=update,
        with_stats=True,
        report=report,
    )
    grad = losses.logit_loss_backward(logits, target, weight, None, label_smoothing, stats, torch.tensor(upstream, dtype=real))
    return loss, rows, grad, log_s, nonfinite


def given(values, log_s=-INF, lam=0.7, score=None, sample_weight=None, mask=None, update=True, state_dtype=None, **options):
    """The same for losses that are given; the gradient is d loss / d losses."""
    log_s, nonfinite, lam = state(log_s, lam, state_dtype or values.dtype)
    positional, flags = numbers(**options)
    loss, rows, grad = weights.robust_loss(
        values, score, sample_weight, mask, log_s, nonfinite, lam, *positional, **flags, update=update, with_grad=True
    )
    return loss, rows, grad, log_s, nonfinite


STATES = {
    "first": dict(lam=0.7),
    "first, negative": dict(lam=-0.5),
    "init=zero": dict(lam=0.7, init="zero", gamma=0.4, alpha=0.6),
    "moving": dict(lam=-0.5, log_s=-0.75, gamma=0.3, alpha=0.8),
    "gamma=1": dict(lam=-0.5, log_s=-0.75, gamma=1.0),
    "batch": dict(lam=0.7, log_s=-0.75, normalizer="batch", alpha=0.7),
    "none": dict(lam=-1.0, log_s=0.0, normalizer="none"),
    "mix": dict(lam=-0.5, mix=0.3),
    "max_weight": dict(lam=0.7, max_weight=0.9),
    "inf": dict(lam=INF, log_s=-0.75, mix=0.3, max_weight=0.1),
    "-inf": dict(lam=-INF),
}
INPUTS = ["none", "mask", "sample_weight", "score"]
CASES = [(case, which) for j, case in enumerate(STATES) for which in (INPUTS[j % 4], "all")]


def per_row(which, shape, dtype):
    """sample_weight, mask, score, of which `which` are given."""
    n = math.prod(shape)
    out = dict(
        sample_weight=torch.linspace(-1, 2, n, dtype=dtype),
        score=torch.linspace(3, -1, n, dtype=dtype),
        mask=torch.arange(n) % 3 != 1,
    )
    return {k: v.reshape(shape) for k, v in out.items() if which in (k, "all")}


def expected(values, valid, case, inputs, dtype):
    """The oracle's forward on losses, from the state of `case`."""
    case = dict(case)
    exact = oracle.ABLoss(case.pop("lam"), **{k: v for k, v in case.items() if k != "log_s"})
    exact.log_s = case.get("log_s", exact.log_s)
    flat = {k: v.flatten().numpy() for k, v in inputs.items()}
    flat["mask"] = np.broadcast_to(valid, values.shape) & flat.get("mask", True)
    return exact(values, **flat), exact


@pytest.mark.parametrize(
    "kind, case, which",
    [("fp32", *c) for c in CASES] + [("fp64", *c) for c in CASES if "all" in c] + [("bf16", *c) for c in CASES[::5]],
)
def test_robust_logit_loss(kind, case, which, launches):
    """70 rows (two programs) with two ignored ones; class weights and smoothing where lambda < 0."""
    dtype, case = DTYPES[kind], STATES[case]
    shape = (70, 10) if dtype != torch.float64 else (5, 6, 2)
    logits, target = make(shape, dtype)
    target.view(-1)[[1, -1]] = -100
    both = {"weight": class_weight(shape[1]), "label_smoothing": 0.2} if case["lam"] < 0 else {}
    values, slopes = exact_of(logits, target, **both)
    inputs = per_row(which, target.shape, wide(dtype))
    forward, exact = expected(values.flatten(), (target != -100).flatten().numpy(), case, inputs, dtype)
    if both:
        both["weight"] = torch.tensor(both["weight"], dtype=wide(dtype))
    loss, rows, grad, log_s, nonfinite = robust(logits, target, upstream=-3.0, **case, **inputs, **both)
    tol = 1e-12 if dtype == torch.float64 else tolerance(torch.float32)
    floor = torch.finfo(wide(dtype)).eps
    valid = (target != -100) & inputs.get("mask", torch.tensor(True))
    close(loss, forward.loss, tol, floor)
    close(rows[0], np.where(valid, values, 0), tol, floor)
    close(rows[1].flatten(), forward.weights, 2 * tol)
    close(rows[2], valid)
    close(log_s, exact.log_s, tol, floor)
    factor = forward.grad.reshape(target.shape)
    close(grad, slopes * np.expand_dims(factor, 1) * -3, 2 * max(tol, torch.finfo(dtype).eps), 8 * floor)
    assert nonfinite == 0


def test_evaluation_leaves_the_state(launches):
    logits, target = make((70, 10))
    trained, evaluated = (robust(logits, target, log_s=0.25, update=update) for update in (True, False))
    assert all(map(torch.equal, trained[:3], evaluated[:3])) and trained[3] != 0.25 == evaluated[3]
    values = torch.linspace(0, 1, 5)
    trained, evaluated = (given(values, log_s=0.25, update=update) for update in (True, False))
    assert all(map(torch.equal, trained[:3], evaluated[:3])) and trained[3] != 0.25 == evaluated[3]


@pytest.mark.parametrize("case, which", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_robust_loss(case, which, dtype, launches):
    """1500 losses in one program of 2048 lanes, or in two of 1024; losses of both signs, and an infinite one that is masked."""
    case = STATES[case]
    values = torch.linspace(-1, 4, 1500, dtype=dtype)
    inputs = per_row(which, values.shape, dtype)
    if "mask" in inputs:
        values[1] = INF
    forward, exact = expected(values.numpy(), True, case, inputs, dtype)
    loss, rows, grad, log_s, nonfinite = given(values, **case, **inputs)
    tol = 1e-12 if dtype == torch.float64 else tolerance(dtype)
    floor = torch.finfo(dtype).eps
    mask = inputs.get("mask", torch.tensor(True))
    close(loss, forward.loss, tol, 4 * floor)
    close(rows[0], np.where(mask, values, 0))
    close(rows[1], forward.weights, tol)
    close(rows[2], np.broadcast_to(mask, 1500))
    close(grad, forward.grad, tol)
    close(log_s, exact.log_s, tol, floor)
    assert nonfinite == 0 and loss.shape == () and rows.shape == (3, 1500)


@pytest.mark.parametrize("count", [0, 1, 512, 513, 1024, 1025, 2049])
def test_counts(count, launches):
    values = torch.rand(count, dtype=torch.float64)
    forward, exact = expected(values.numpy(), True, dict(lam=-0.5), {}, None)
    loss, rows, grad, log_s, _ = given(values, lam=-0.5)
    close(loss, forward.loss, 1e-12)
    close(rows[1], forward.weights, 1e-12)
    close(grad, forward.grad, 1e-12)
    close(log_s, exact.log_s, 1e-12)


def test_many_losses():
    """More than one launch takes, by themselves and from logits (2 classes): 17 programs and more; (B, d1) rows."""
    values = torch.linspace(0, 5, 16500)
    forward, exact = expected(values.double().numpy(), True, dict(lam=0.7, log_s=0.2), {}, None)
    loss, rows, grad, log_s, _ = given(values.view(150, 110), log_s=0.2)
    tol = tolerance(torch.float32)
    for got, wanted in (
        (loss, forward.loss),
        (rows[1].flatten(), forward.weights),
        (grad.flatten(), forward.grad),
        (log_s, exact.log_s),
    ):
        close(got, wanted, tol)
    logits = torch.stack([torch.zeros(16500), values.expm1().log()], 1)  # cross-entropy of the first class: `values`
    logits[0, 1] = -INF
    logits = torch.stack([logits.view(150, 110, 2)[..., c] for c in (0, 1)], 1)
    loss, rows, _, log_s, _ = robust(logits, torch.zeros(150, 110, dtype=torch.int64), log_s=0.2)
    for got, wanted in ((loss, forward.loss), (rows[1].flatten(), forward.weights), (log_s, exact.log_s)):
        close(got, wanted, 4 * tol)


def test_programs_that_take_several_blocks(monkeypatch):
    """As beyond a million losses: 2 programs at most, 3 blocks each, the last one short."""
    monkeypatch.setattr(launch, "ONE_LAUNCH", 0)
    monkeypatch.setattr(launch, "MOST_PARTIALS", 2)
    values = torch.linspace(0, 5, 5500, dtype=torch.float64)
    values[5000] = NAN
    loss, rows, grad, log_s, nonfinite = given(values, log_s=0.2)
    keep = torch.arange(5500) != 5000
    wanted = expected(values[keep].numpy(), True, dict(lam=0.7, log_s=0.2), {}, None)[0]
    close(rows[1][keep], wanted.weights, 1e-12)
    assert loss.isnan() and grad[5000].isnan() and log_s == 0.2 and nonfinite == 1
    made, _, shares = weights.robust_weights(
        values, *state(0.2, 0.7, torch.float64)[::2], None, 0.9, 1.0, normalizer=0, init_first=True
    )
    d = torch.linspace(1, -1, 5500, dtype=torch.float64)
    got = weights.robust_weights_backward(made, d, torch.tensor(1.0, dtype=torch.float64), torch.tensor(0.7), shares)
    w, d = made[keep], d[keep]
    close(got[keep], w * (d - 0.9 / 5499 * (w @ d)) / np.float32(0.7), 1e-12, 1e-14)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("entry", ["losses", "logits"])
def test_nonfinite_rows(bad, entry, launches):
    """The bad row keeps its NaN to itself; the state does not move; it counts only where the state would have moved."""
    values = torch.tensor([0.5, 1.0, 2.0, 0.25])
    valid = np.array([True, False, True, True])
    forward, _ = expected(values.double().numpy(), valid, dict(lam=0.7, log_s=0.2), {}, None)
    for update in (True, False):
        if entry == "losses":
            values[1] = bad
            loss, rows, grad, log_s, nonfinite = given(values, log_s=0.2, update=update)
            close(grad[valid], forward.grad[valid], 1e-6)
        else:
            logits = torch.stack([torch.zeros(4), torch.tensor([0.5, 1.0, 2.0, 0.25]).expm1().log()], 1)
            logits[1] = torch.tensor({NAN: [NAN, 0.0], INF: [-INF, 0.0], -INF: [INF, 0.0]}[bad])
            loss, rows, grad, log_s, nonfinite = robust(logits, torch.zeros(4, dtype=torch.int64), log_s=0.2, update=update)
        close(rows[1][valid], forward.weights[valid], 1e-5)
        assert rows[1][1].isnan() and rows[2].tolist() == [1, 1, 1, 1]
        assert grad[1].isnan().all() and grad[valid].isfinite().all() and not loss.isfinite()
        assert log_s == torch.tensor(0.2) and nonfinite == int(update)


def test_scores_and_losses_must_be_finite(launches):
    """The score also where |lam| = inf makes z = 0; the loss also where only the score is exponentiated."""
    for bad in (INF, NAN):
        score, values = torch.tensor([1.0, bad, 2.0, 3.0]), torch.tensor([1.0, 1.0, bad, 1.0])
        for lam in (INF, 0.7):
            _, rows, _, log_s, nonfinite = given(values, lam=lam, log_s=0.3, score=score)
            assert rows[1].isnan().tolist() == [False, True, True, False] and nonfinite == 1 and log_s == torch.tensor(0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64])
def test_state_precision(dtype, state_dtype, launches):
    """|z| of 1e39 fits float64 losses with a float64 state only; log_s and lam of either precision."""
    values = torch.tensor([0.0, 1.0], dtype=dtype)
    for lam, fits in ((1e-39, dtype == state_dtype == torch.float64), (2.0**-10, True)):
        if lam < 1e-38 and torch.float32 in (dtype, state_dtype):
            lam = 1e-38 if dtype == torch.float32 else 2.0**-127
            values = torch.tensor([0.0, 4.0], dtype=dtype)
        _, rows, _, log_s, nonfinite = given(values, lam=lam, state_dtype=state_dtype)
        assert nonfinite == int(not fits) and rows[1][1].isnan() == (not fits)
        assert log_s.dtype == state_dtype


def test_state_in_two_parts(launches):
    """z = 1024 L: a float32 log s' alone would be off by 3e-5, and so would each weight. lam is a power of two: z is exact."""
    values = torch.tensor([0.99, 0.991, 0.992, 0.9893])
    forward, _ = expected(values.double().numpy(), True, dict(lam=2.0**-10), {}, None)
    _, rows, _, _, _ = given(values, lam=2.0**-10)
    close(rows[1], forward.weights, 1e-6)


def test_no_overflow(launches):
    """W <= n / (gamma alpha), whatever lambda and L; nothing but exp of numbers <= 0."""
    values = torch.tensor([0.0, 1e4, 1e4 - 1])
    forward, _ = expected(values.double().numpy(), True, dict(lam=0.5), {}, None)
    close(given(values, lam=0.5)[1][1], forward.weights, 1e-5)


@pytest.mark.parametrize("log_s", [-INF, 0.3])
@pytest.mark.parametrize("init", ["first", "zero"])
@pytest.mark.parametrize("lam", [0.8, -0.5, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_robust_weights(log_s, init, lam, dtype, launches):
    """Values and vjp against autograd through reference/ in float64; 1030 losses with masked ones."""
    values, mask = torch.linspace(-0.5, 3, 1030, dtype=dtype), torch.arange(1030) % 7 != 3
    log_s, _, lam = state(log_s, lam, dtype)
    flags = dict(normalizer=0, init_first=init == "first")
    made, new, shares = weights.robust_weights(values, log_s, lam, mask, 0.7, 0.6, **flags)
    leaf = values.double().requires_grad_()
    exact, state_after = reference.robust_weights(leaf, log_s.double(), lam.double(), gamma=0.7, alpha=0.6, init=init, mask=mask)
    tol = 1e-12 if dtype == torch.float64 else tolerance(dtype)
    close(made, exact.detach(), tol)
    close(new, state_after.detach(), tol)
    assert new.shape == () and new.dtype == dtype and log_s is not new
    d, u = torch.linspace(-1, 2, 1030, dtype=dtype), torch.tensor(1.5, dtype=dtype)
    grad = weights.robust_weights_backward(made, d, u, lam, shares)
    if exact.requires_grad:
        (wanted,) = torch.autograd.grad((exact * d).sum() + state_after * u, leaf)
        close(grad, torch.nan_to_num(wanted), tol, 64 * torch.finfo(dtype).eps)


def test_robust_weights_around_a_bad_row(launches):
    """Its own gradient is NaN, the others' are those of the batch without it, and log s', which stays, owes them nothing."""
    values = torch.tensor([0.5, NAN, 2.0], dtype=torch.float64)
    log_s, _, lam = state(0.2, 0.9, torch.float64)
    run = partial(weights.robust_weights, normalizer=0, init_first=True)
    made, new, shares = run(values, log_s, lam, None, 0.9, 1.0)
    d = torch.tensor([1.0, 5.0, -2.0], dtype=torch.float64)
    grad = weights.robust_weights_backward(made, d, torch.tensor(7.0, dtype=torch.float64), lam, shares)
    clean, _, clean_shares = run(values[[0, 2]], log_s, lam, None, 0.9, 1.0)
    wanted = weights.robust_weights_backward(clean, d[[0, 2]], torch.tensor(0.0, dtype=torch.float64), lam, clean_shares)
    close(grad[[0, 2]], wanted, 1e-12)
    assert grad[1].isnan() and new == 0.2 and shares[1] == 0
    close(shares[0], 0.45, 1e-12)
    empty = torch.zeros(0, dtype=torch.float64)
    made, new, shares = run(empty, log_s, lam, None, 0.9, 1.0)
    assert made.shape == (0,) and new == 0.2 and shares.tolist() == [0, 0]
    assert weights.robust_weights_backward(empty, empty, log_s, lam, shares).shape == (0,)


# ---- a target for the effective sample size ---------------------------------------------------------------------------


def targeted(values, share, log_s=target_cases.STATE, mix=0.0, max_weight=INF, update=True, state_dtype=None, **inputs):
    """The robust loss of losses that are given: what target_cases.check takes."""
    log_s, nonfinite, lam = state(log_s, 5.0, state_dtype or values.dtype)
    given = inputs.get("score"), inputs.get("sample_weight"), inputs.get("mask")
    numbers = share, 1.0, mix, max_weight
    flags = dict(normalizer=NORMALIZERS["target"], init_first=True, update=update, with_grad=True)
    loss, rows, grad = weights.robust_loss(values, *given, log_s, nonfinite, lam, *numbers, **flags)
    return loss, rows[1], grad, log_s, nonfinite, lam


@pytest.mark.covering(2)
@pytest.mark.parametrize("count", [0, 1, 2, 130, 1100])
@pytest.mark.parametrize("batch", target_cases.BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_target(batch, count, dtype, launches):
    values = target_cases.BATCHES[batch](count).to(dtype) if count else torch.zeros(0, dtype=dtype)
    for share in target_cases.SHARES[: 4 if count == 130 else 2]:
        target_cases.check(values, share, *targeted(values, share))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("update", [True, False])
def test_target_with_inputs(update, dtype, launches):
    """Score, sample weights, mask and mix; also in a state of the other precision, and at evaluation."""
    values = target_cases.normal(700).to(dtype)
    inputs = per_row("all", values.shape, dtype)
    values[1] = NAN  # masked
    other = torch.float32 if dtype == torch.float64 else torch.float64
    for share, state_dtype in ((0.6, None), (-0.4, other)):
        out = targeted(values, share, mix=0.3, update=update, state_dtype=state_dtype, **inputs)
        target_cases.check(values, share, *out, mix=0.3, update=update, **inputs)


@pytest.mark.parametrize("kind", ["fp32", "fp64", "bf16", "fp16"])
def test_target_of_logits(kind, launches):
    """70 rows (two programs) with ignored ones: the statistics hold the weights, and lambda is written at evaluation, too."""
    dtype = DTYPES[kind]
    logits, target = make((70, 10), dtype)
    target[[1, -1]] = -100
    for share, update in ((0.7, True), (-0.5, False)):
        log_s, nonfinite, lam = state(target_cases.STATE, 5.0, wide(dtype))
        given = logits, target, None, None, 0.0, 0.0, -100, None, None, None, log_s, nonfinite, lam, share, 1.0, 0.0, INF
        flags = dict(normalizer=NORMALIZERS["target"], init_first=True, update=update, with_stats=True)
        loss, rows, stats = losses.robust_logit_loss(*given, kind=0, prune=False, report=None, **flags)
        valid = target != -100
        target_cases.check(rows[0], share, loss, rows[1], None, log_s, nonfinite, lam, mask=valid, update=update)
        grad = losses.logit_loss_backward(logits, target, None, None, 0.0, stats, torch.tensor(1.0, dtype=wide(dtype)))
        slopes = exact_of(logits, target)[1]
        tol = 1e-11 if dtype == torch.float64 else 2 * max(tolerance(torch.float32), torch.finfo(dtype).eps)
        close(grad, slopes * (rows[1].double() / valid.sum()).numpy()[:, None], tol, 8 * torch.finfo(wide(dtype)).eps)


def test_target_of_no_rows(launches):
    log_s, nonfinite, lam = state(target_cases.STATE, 5.0, torch.float32)
    given = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), None, None, 0.0, 0.0, -100, None, None, None, log_s, nonfinite
    flags = dict(normalizer=NORMALIZERS["target"], init_first=True, update=True, with_stats=True)
    loss, _, _ = losses.robust_logit_loss(*given, lam, 0.7, 1.0, 0.0, INF, kind=0, prune=False, report=None, **flags)
    assert loss == 0 and lam == INF and log_s == torch.tensor(target_cases.STATE)


# ---- rectified weights -----------------------------------------------------------------------------------------------


# one block of 512 and one more, which takes blocks of 2048; several of those with a tail
@pytest.mark.parametrize("count", [0, 1, 3, 17, 512, 513, 1000, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_rectified(count, dtype):
    u = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64).to(dtype)
    if count > 500:
        u[2], u[count // 2], u[-1] = NAN, INF, -INF
    made = rectified.rectified(u)
    assert made.dtype == dtype and made.shape == (count,)
    close(made, oracle.rectified(u), 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-13)
    assert not rectified.rectified(-u.abs().nan_to_num()).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_rectified_extremes(dtype):
    info = torch.finfo(dtype)
    for u in (info.smallest_normal * info.eps, info.smallest_normal, info.max):
        for count in (1, 3, 17, 1000):
            close(rectified.rectified(torch.full((count,), u, dtype=dtype)), np.full(count, 1 / count), 2 * info.eps)
    mixed = torch.tensor([info.max, info.smallest_normal, -info.max, info.max], dtype=dtype)
    close(rectified.rectified(mixed), [0.5, 0, 0, 0.5], 2 * info.eps, 1e-37)


# ---- gradient scaling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (1500,), (3, 5), (70, 3), (2, 1030), (2, 3, 4), (2, 3, 1100)], ids=str)
def test_scale(shape, dtype):
    """One number, one expanded, one of each row: a vector of losses, rows of classes, classes of inner positions."""
    grad = torch.linspace(-2, 2, math.prod(shape)).reshape(shape).to(dtype)
    rows = shape if len(shape) == 1 else (shape[0], *shape[2:])
    real = wide(dtype)
    each = torch.linspace(-1, 3, math.prod(rows), dtype=real).reshape(rows)
    tol, tiny = max(torch.finfo(dtype).eps, 1e-15), 6e-8 if dtype == torch.float16 else 0  # its smallest number
    for upstream in (
        torch.tensor(-0.3, dtype=real),
        torch.tensor(-0.3, dtype=real).expand(rows),
        each,
        torch.stack([each, each], -1)[..., 0],
    ):
        factor = upstream if len(shape) == 1 or upstream.dim() == 0 else upstream.unsqueeze(1)
        wanted = (grad.to(real) * factor).double().numpy()
        out = scale.scale(grad, upstream, False)
        assert out.dtype == dtype and out.data_ptr() != grad.data_ptr()
        close(out, wanted, tol, tiny)
        in_place = grad.clone()
        assert scale.scale_(in_place, upstream) is None
        assert torch.equal(in_place, out)
        if dtype == torch.float32:
            half = scale.scale(grad, upstream, True)
            assert half.dtype == torch.float16
            close(half, wanted, 1e-3, 1e-7)


def test_scale_by_one_touches_nothing(monkeypatch):
    """In place and by exactly 1: no element is stored. Otherwise each is."""
    from triton.runtime.interpreter import InterpreterBuilder

    stored, store = [], InterpreterBuilder.create_masked_store
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_masked_store",
        lambda self, p, v, mask, *a: (stored.append(int(np.sum(mask.data))), store(self, p, v, mask, *a))[1],
    )
    for upstream, elements in ((1.0, 0), (2.0, 12)):
        stored.clear()
        scale.scale_(torch.ones(3, 4), torch.tensor(upstream))
        assert sum(stored) == elements
    scale.scale_(torch.zeros(0), torch.tensor(2.0))
