"""The robust loss, its three stages and rectified weights, on every backend of a GPU against the float64 oracle."""

import itertools
import math
from functools import partial
from unittest import SkipTest

import numpy as np
import oracle
import target_cases
import torch
from gpu_cases import BEYOND, HELD, INF, NAN, ONE_LAUNCH, PATHS, check_robust, close, device_tools, gpu, numpy, over, problem
from gpu_hooks import pytest_generate_tests, setup_function, teardown_function, unpoisoned  # noqa: F401
from tensors import DTYPES, wide
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

import absgd_fast as ab
from absgd_fast import ops
from absgd_fast.functional import logit_loss, robust_weights

# ---- the robust loss -------------------------------------------------------------------------------------------------


ROBUST = {
    "default": dict(lam=0.75),
    "negative": dict(lam=-0.5, gamma=0.3, alpha=0.5),
    "zero": dict(lam=2.0, init="zero"),
    "batch": dict(lam=0.75, normalizer="batch"),
    "none": dict(lam=-1.0, normalizer="none"),
    "mix": dict(lam=-0.5, mix=1.0),
    "max_weight": dict(lam=0.5, max_weight=1.5),
    "plain": dict(lam=INF),
}
GIVEN = {name: (name,) for name in ("mask", "sample_weight", "score")} | {
    "nothing": (),
    "all": ("mask", "sample_weight", "score"),
}


def given_rows(names, shape, seed):
    rng = np.random.default_rng(seed)
    drawn = dict(mask=rng.random(shape) > 0.2, sample_weight=rng.random(shape) * 2, score=rng.normal(size=shape))
    return {name: drawn[name] for name in names}


def steps_of(where, rule, given, dtype, losses=("ce", "all")):
    """Four steps: logits that one block holds, and more of them."""
    for shape, loss in itertools.product((HELD, BEYOND), losses):
        criterion = where.criterion(loss, shape[1], dtype, **rule)
        exact = oracle.ABLoss(**rule)
        for seed in range(4):
            p = problem(shape, dtype, seed, 2.0, loss)
            rows = given_rows(given, p.target.shape, seed)
            check_robust(criterion, exact, where.leaf(p.logits), p.target.to(where.device), p, dtype, **rows)


@over(dtype={name: DTYPES[name] for name in ("fp32", "fp64", "bf16")}, rule=ROBUST)
def test_robust_loss(where, dtype, rule):
    steps_of(where, rule, (), dtype, ("ce",) if where.backend == "triton" and dtype != torch.float32 else ("ce", "all"))


@over(given=GIVEN)
def test_robust_loss_of_given_rows(where, given):
    steps_of(where, dict(lam=-0.75, mix=0.5), given, torch.float32)
    steps_of(where, dict(lam=0.75, max_weight=2.0), given, torch.float64, ("ce",))


@over(dtype={name: DTYPES[name] for name in ("fp32", "fp64")}, rule=ROBUST)
def test_robust_loss_of_given_losses(where, dtype, rule):
    """Any losses at all: one, some, and more than one launch weighs."""
    for count in (1, 300, ONE_LAUNCH + 617):
        criterion, exact = where.robust(lambda x: x, dtype, **rule), oracle.ABLoss(**rule)
        for seed in range(2):
            rng = np.random.default_rng(seed)
            losses = rng.gamma(2.0, size=count).astype(np.float32).astype(np.float64)
            rows = given_rows(("mask", "sample_weight"), count, seed) if seed else {}
            x = where.leaf(torch.from_numpy(losses).to(dtype))
            forward = exact(losses, **rows)
            value = criterion(x, **{k: torch.from_numpy(v).to(where.device) for k, v in rows.items()})
            value.backward()
            close(value, forward.loss, dtype, "loss", ulps=512)
            close(criterion.last.weights, forward.weights, dtype, "weights", ulps=512)
            close(x.grad, forward.grad, dtype, "gradient", ulps=512)
            close(criterion.log_s, exact.log_s, dtype, "log_s", ulps=512)


@over(dtype=DTYPES, shape=[HELD, BEYOND, (ONE_LAUNCH + 6, 2)])
def test_rows_that_are_not_finite(where, dtype, shape):
    """They are NaN, their neighbours and the state do not notice, and the batch is counted."""
    if where.backend == "triton" and dtype == torch.float64:
        raise SkipTest("each kernel costs a second to compile")
    criterion, exact = where.criterion(lam=-0.75, dtype=dtype), oracle.ABLoss(-0.75)
    for seed, bad in enumerate((None, NAN, INF, None)):
        p = problem(shape, dtype, seed, 2.0)
        logits, losses, grads = p.logits.clone(), p.losses.copy(), p.grads.copy()
        if bad is not None:
            logits[4, int(p.target[4]) - 1] = bad
            losses[4], grads[4] = NAN, NAN
        forward = exact(losses, mask=p.valid)
        x = where.leaf(logits)
        value = criterion(x, p.target.to(where.device))
        value.backward()
        rest = np.arange(shape[0]) != 4 if bad is not None else slice(None)
        close(criterion.last.weights, forward.weights, dtype, "weights", ulps=512)
        close(x.grad[rest], (grads * forward.grad[:, None])[rest], dtype, "gradient", ulps=512, stored=True)
        close(criterion.log_s, exact.log_s, dtype, "log_s", ulps=512)
        assert bad is None or (not value.isfinite() and x.grad[4].isnan().any())
        assert bad is not None or value.isfinite()
        assert int(criterion.nonfinite_batches) == exact.nonfinite_batches


@over(dtype=DTYPES)
def test_nothing_to_do(where, dtype):
    """No rows, none that counts, no pixels: a loss of 0, a gradient of 0, the state as it was."""
    criterion = where.criterion(lam=0.75, dtype=dtype)
    p = problem((9, 37), dtype)
    criterion(where.leaf(p.logits), p.target.to(where.device))
    before = criterion.log_s.clone()
    for shape in ((0, 5), (4, 5), (0, 5, 3), (2, 5, 0), (600, 40)):
        x = torch.randn(shape, device=where.device).to(dtype).requires_grad_()
        target = torch.full((shape[0], *shape[2:]), -100, device=where.device)
        value = criterion(x, target)
        value.backward()
        assert value.item() == 0 and x.grad.shape == x.shape and not x.grad.any() and torch.equal(criterion.log_s, before)
        losses = logit_loss(x, target, backend=where.backend)
        assert losses.shape == target.shape and not losses.any()
        assert not torch.autograd.grad(losses.sum(), x)[0].any()
    empty = torch.zeros(0, dtype=wide(dtype), device=where.device)
    assert robust_weights(empty, before, 0.75, backend=where.backend)[0].shape == (0,)


def test_weights_of_vectors(where):
    for count in [1, 2, 3, 1000, 4096, 4097, ONE_LAUNCH, ONE_LAUNCH + 1] + [100_003, 3_000_001] * where.gpu:
        check_weights(where, count)


@gpu(alone=True)
def test_weights_of_a_hundred_million_losses(where):
    where.need(100_000_000 * 200)
    check_weights(where, 100_000_000)


def check_weights(where, count):
    """Robust weights of so many losses and their vjp, W and log s' both with an upstream gradient."""
    generator = torch.Generator(where.device).manual_seed(count)
    losses = torch.rand(count, generator=generator, device=where.device).mul_(8).requires_grad_()
    mask = torch.rand(count, generator=generator, device=where.device) > 0.3 if count % 2 and count > 1 else None
    d = torch.randn(count, generator=generator, device=where.device)
    for lam, log_s in ((-0.75, -INF), (2.0, 1.3)):
        state = torch.tensor(log_s, device=where.device)
        weights, next_log_s = robust_weights(losses, state, lam, mask=mask, gamma=0.6, alpha=0.5, backend=where.backend)
        (grad,) = torch.autograd.grad((weights, next_log_s), losses, (d, torch.full_like(next_log_s, 3.0)))
        exact_weights, exact_log_s, exact_grad = vjp(losses.detach(), mask, lam, log_s, 0.6, 0.5, d, 3.0)
        torch.testing.assert_close(next_log_s.double(), exact_log_s, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(weights.double(), exact_weights, rtol=2e-5, atol=1e-9)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=2e-5, atol=2e-6 * float(exact_grad.abs().max()))
        if count <= 1000:
            kept = None if mask is None else mask.cpu().numpy()
            exact = oracle.robust_weights(numpy(losses), log_s, lam, gamma=0.6, alpha=0.5, mask=kept)
            close(weights, exact.weights, torch.float32, "weights", ulps=512)
            close(next_log_s, exact.log_s, torch.float32, "log_s", ulps=512)


def trained_by(where, forward, shape, deferred):
    """The gradients of four forwards, and log s; in deferred mode they are one step."""
    criterion = where.criterion(classes=shape[1], lam=0.75, deferred=deferred)
    leaves = []
    for k in range(4):
        draw = torch.Generator().manual_seed(k)
        leaves.append(where.leaf(torch.randn(shape, generator=draw) * (1 + k)))
        target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=draw).to(where.device)
        forward(lambda x, target: criterion(x * 1, target), leaves[-1], target).backward()
    if deferred:
        criterion.finish_(leaves)
    return [leaf.grad for leaf in leaves], criterion.log_s


@over(shape=PATHS, deferred=[False, True])
def test_activation_checkpointing(where, shape, deferred):
    """A recomputation gives the same gradients and moves nothing; selective checkpoints leave out our operators."""
    wanted = trained_by(where, lambda run, x, y: run(x, y), shape, deferred)
    keep_ours = lambda ctx, op, *args, **kwargs: (  # noqa: E731
        CheckpointPolicy.MUST_SAVE if op.namespace.startswith("absgd_fast") else CheckpointPolicy.PREFER_RECOMPUTE
    )
    for context in (noop_context_fn, partial(create_selective_checkpoint_contexts, keep_ours)):
        run = partial(checkpoint, use_reentrant=False, context_fn=context)
        torch.testing.assert_close(trained_by(where, run, shape, deferred), wanted, rtol=1e-6, atol=1e-9)


def vjp(losses, mask, lam, log_s, gamma, alpha, d, u):
    """W, log s' and their vjp in float64, the formulas of the weights written out once more."""
    z = losses.double() / lam
    valid = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    n = valid.sum()
    log_g = z.masked_fill(~valid, -INF).logsumexp(0) - n.double().log()
    share = alpha if log_s == -INF else gamma * alpha
    norm = math.log(share) + log_g
    if log_s != -INF:
        norm = torch.logaddexp(norm, torch.tensor(math.log1p(-gamma) + log_s, dtype=torch.float64, device=losses.device))
    w = torch.where(valid, (z - norm).exp(), 0)
    return w, norm, (w * d - share * w / n * ((w * d).sum() - u)) / lam


# ---- the three stages --------------------------------------------------------------------------------------------------


def stages(where):
    return ops.OPERATORS[where.backend]


class Parts:
    """Losses in parts whose normaliser is one: totals of each, one settling, weights of each. The numbers may be overwritten."""

    def __init__(self, where, sizes, dtype, *, given=(), seed=0, **options):
        draw = np.random.default_rng(seed)
        self.where, self.options, self.real = where, dict(gamma=0.6, alpha=0.5) | options, wide(dtype)
        self.losses = draw.gamma(2.0, size=sum(sizes)).astype(np.float32).astype(np.float64)
        self.rows = given_rows(given, sum(sizes), seed)
        numbers = {"losses": self.losses} | self.rows
        self.parts = [dict(zip(numbers, some)) for some in zip(*(self.on_device(v).split(sizes) for v in numbers.values()))]
        tensor = partial(torch.tensor, dtype=self.real, device=where.device)
        self.log_s, self.lam, self.nonfinite = tensor(-INF), tensor(0.75), torch.tensor(0, device=where.device)

    def continued(self, exact):
        """From where an oracle.ABLoss is."""
        for number, value in ((self.lam, exact.lam), (self.log_s, exact.log_s), (self.nonfinite, exact.nonfinite_batches)):
            number.fill_(value)
        return self

    def on_device(self, values):
        values = torch.from_numpy(values)
        return values.to(self.where.device, None if values.dtype == torch.bool else self.real)

    def step(self, ranks=1):
        """The loss of all parts, their weights, and d loss / d L."""
        operators, options = stages(self.where), dict(self.options)
        row = lambda part, name: part.get(name)  # noqa: E731
        state, flags = (self.log_s, self.lam), ops.flags(options.get("normalizer", "moving"), options.get("init", "first"))
        totals = torch.stack(
            [operators.robust_partial_stats(p["losses"], row(p, "score"), row(p, "mask"), *state, None) for p in self.parts]
        )
        self.settled = operators.robust_settle(
            totals,
            self.log_s,
            self.nonfinite,
            self.lam,
            None,
            options["gamma"],
            options["alpha"],
            float(ranks),
            flags | ops.UPDATE,
        )
        applied = [
            operators.robust_apply(
                p["losses"],
                row(p, "score"),
                row(p, "sample_weight"),
                row(p, "mask"),
                self.settled,
                *state,
                False,
                options.get("mix", 0.0),
                options.get("max_weight", INF),
                ops.WITH_GRAD,
            )
            for p in self.parts
        ]
        loss, rows, grads = zip(*applied)
        return sum(loss), torch.cat([r[1] for r in rows]), torch.cat(grads)

    def check(self, exact, dtype, ranks=1):
        forward = exact(self.losses, **self.rows)
        loss, weights, grad = self.step(ranks)
        near = 512 * torch.finfo(self.real).eps * np.nansum(np.abs(forward.grad * self.losses)) * ranks
        np.testing.assert_allclose(numpy(loss), forward.loss * ranks, rtol=0, atol=near)
        close(weights, forward.weights, dtype, "weights", ulps=512)
        close(grad, forward.grad * ranks, dtype, "gradient", ulps=512)
        close(self.log_s, exact.log_s, dtype, "log_s", ulps=512)
        assert int(self.nonfinite) == exact.nonfinite_batches


SIZES_OF_PARTS = {"one": (300,), "uneven": (0, 1, 257, 42), "many": (100, ONE_LAUNCH + 617)}
STAGED = {
    "moving": {},
    "zero, mix": dict(init="zero", mix=0.5),
    "batch": dict(normalizer="batch", max_weight=1.5),
    "none": dict(normalizer="none"),
}


@over(sizes=SIZES_OF_PARTS, options=STAGED, dtype={name: DTYPES[name] for name in ("fp32", "fp64")})
def test_three_stages(where, sizes, options, dtype):
    """Totals, settle, apply by themselves: the parts of a batch are that batch, from one rank's side and from one of two."""
    for lam, given in ((0.75, ()), (-0.5, ("mask", "sample_weight", "score")), (INF, ("sample_weight",))):
        exact = oracle.ABLoss(lam, **dict(gamma=0.6, alpha=0.5) | options)
        for seed in range(2):
            Parts(where, sizes, dtype, given=given, seed=seed, **options).continued(exact).check(exact, dtype, ranks=1 + seed)


@over(sizes=SIZES_OF_PARTS, dtype={name: DTYPES[name] for name in ("fp32", "fp64")})
def test_a_bad_row_in_one_of_the_parts(where, sizes, dtype):
    """Is NaN, the others are weighed without it, log s stays, and the batch is counted."""
    exact = oracle.ABLoss(0.75, gamma=0.6, alpha=0.5)
    for seed, bad in enumerate((None, NAN, INF, None)):
        parts = Parts(where, sizes, dtype, seed=seed).continued(exact)
        if bad is not None:
            parts.losses[-3] = bad
            parts.parts[-1]["losses"][-3] = bad
        before = parts.log_s.clone()
        parts.check(exact, dtype)
        assert torch.equal(before, parts.log_s) == (bad is not None)


@over(dtype={name: DTYPES[name] for name in ("fp32", "fp64")})
def test_rows_beyond_what_is_settled(where, dtype):
    """Where a normaliser is settled already, z that lie 60 above it count as bad in totals and in weights."""
    operators, parts = stages(where), Parts(where, (300,), dtype)
    parts.step()
    losses = parts.parts[0]["losses"].clone()
    losses[7] = 0.75 * (float(parts.settled[2]) + 1)
    log_sum, n, bad = operators.robust_partial_stats(losses, None, None, parts.log_s, parts.lam, parts.settled).tolist()
    kept = np.delete(parts.losses, 7) / 0.75
    assert (n, bad) == (299, 1)
    np.testing.assert_allclose(log_sum, oracle.logsumexp(kept), rtol=1e-12 if dtype == torch.float64 else 1e-6)
    _, rows, grad = operators.robust_apply(
        losses, None, None, None, parts.settled, parts.log_s, parts.lam, True, 0.0, INF, ops.WITH_GRAD
    )
    assert rows[1][7].isnan() and grad[7].isnan() and int(grad.isnan().sum()) == 1


# ---- a target for the effective sample size ----------------------------------------------------------------------------


@over(batch=target_cases.BATCHES, dtype={name: DTYPES[name] for name in ("fp32", "fp64")})
def test_target_of_losses(where, batch, dtype):
    """No loss, one, a block of them, and more than one block or one launch weighs; with score, mask and sample weights, too."""
    for count in (0, 1, 300, 2049, ONE_LAUNCH + 617):
        values = batch(count).to(dtype) if count else torch.zeros(0, dtype=dtype)
        rows = {k: torch.from_numpy(v) for k, v in given_rows(("score", "sample_weight", "mask"), count, count).items()}
        rows = {k: v if k == "mask" else v.to(dtype) for k, v in rows.items()}
        for share, inputs in ((0.7, {}), (-0.4, rows)):
            log_s, lam = (torch.tensor(x, dtype=dtype, device=where.device) for x in (target_cases.STATE, 5.0))
            nonfinite = torch.zeros((), dtype=torch.int64, device=where.device)
            given = [None if k not in inputs else inputs[k].to(where.device) for k in ("score", "sample_weight", "mask")]
            arguments = values.to(where.device), *given, log_s, nonfinite, lam, share, 1.0, 0.25, INF
            flags = ops.flags("target", "first") | ops.UPDATE | ops.WITH_GRAD
            loss, stats, grad = ops.OPERATORS[where.backend].robust_loss(*arguments, flags)
            results = loss.detach(), stats[1], grad, log_s, nonfinite, lam
            target_cases.check(values, share, *results, mix=0.25, **inputs)


@over(dtype=DTYPES, shape=[HELD, BEYOND, (ONE_LAUNCH + 6, 2)])
def test_target_of_logits(where, dtype, shape):
    """The module: losses, weights, lambda and the state; and the gradient is that of the weighted losses."""
    if where.backend == "triton" and dtype == torch.float64:
        raise SkipTest("each kernel costs a second to compile")
    for share in (0.7, -0.4):
        target = ab.TargetESS(abs(share), sign=1 if share > 0 else -1)
        criterion = where.criterion(lam=target, dtype=dtype)
        p = problem(shape, dtype, 1, 2.0)
        x = where.leaf(p.logits)
        loss = criterion(x, p.target.to(where.device))
        loss.backward()
        last = criterion.last
        results = loss.detach(), last.weights, None, criterion.log_s, criterion.nonfinite_batches, last.lam
        target_cases.check(last.losses, share, *results, mask=last.weights > 0)
        factors = numpy(last.weights) / int((last.weights > 0).sum())
        wanted = p.grads * np.expand_dims(factors, 1)
        close(x.grad, wanted, dtype, "gradient", ulps=512, cancels=True, stored=True)


@gpu
def test_target_launches_and_waits(where):
    """One launch where one block holds the batch, two elsewhere (Triton's last program needs one); nobody waits; a captured graph
    solves for lambda anew."""
    if where.backend == "triton":
        raise SkipTest("its launches are counted without a GPU (kernels_compiled.py)")
    with unpoisoned():
        for shape, launches in ((HELD, 1), (BEYOND, 2)):
            criterion = where.criterion(lam=ab.TargetESS(0.7))
            p = problem(shape, torch.float32, 1, 2.0)
            x, target = p.logits.to(where.device), p.target.to(where.device)
            run = partial(criterion, x.requires_grad_(), target)
            for _ in range(2):
                run()
            seen = device_tools.kernels(where.device, run)
            assert len(seen) == launches, f"{seen}"
            assert device_tools.waits(where.device, run) == []
            out = torch.zeros((), device=where.device)
            replay, _ = device_tools.captured(where.device, lambda: (run(), out.copy_(criterion.lam)), warm_up=3)
            with torch.no_grad():
                x.mul_(2)
            run()
            replay()
            assert torch.equal(out, criterion.lam)


# ---- rectified weights -----------------------------------------------------------------------------------------------


def rectified(where, products):
    return ops.OPERATORS[where.backend].rectified(products)


@over(dtype=["fp32", "fp64"])
def test_rectified_weights(where, dtype):
    """Those of L2RW, from no sample to millions; with products that are not finite, and where nothing is positive."""
    dtype = DTYPES[dtype]
    for count in (0, 1, 3, 17, 1000, 20000, *[3_000_001] * where.gpu):
        generator = torch.Generator(where.device).manual_seed(count)
        u = torch.randn(count, generator=generator, device=where.device, dtype=dtype)
        u[2:3], u[500:501], u[-3:-2] = NAN, INF, -INF
        w = rectified(where, u)
        exact = torch.from_numpy(oracle.rectified(numpy(u))).to(where.device)
        rtol = 2e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(w.double(), exact, rtol=rtol, atol=0, equal_nan=True)
        assert w.dtype == dtype and not rectified(where, -u.nan_to_num().abs()).any()
        assert torch.equal(w.nan_to_num(), rectified(where, u).nan_to_num())


@over(dtype=["fp32", "fp64"])
def test_rectified_weights_of_extreme_products(where, dtype):
    """Subnormal numbers are none that count for 0, and the largest ones do not overflow."""
    info = torch.finfo(DTYPES[dtype])
    for u, count in itertools.product((info.smallest_normal * info.eps, info.smallest_normal, info.max), (1, 3, 1000)):
        w = rectified(where, torch.full((count,), u, dtype=DTYPES[dtype], device=where.device))
        torch.testing.assert_close(w, torch.full_like(w, 1 / count), rtol=2 * info.eps, atol=0)


@gpu
def test_rectified_weights_launches_and_waits(where):
    """One launch, nobody waits, and a captured graph follows the products."""
    with unpoisoned():
        u = torch.randn(1000, device=where.device)
        run = partial(rectified, where, u)
        for _ in range(2):
            run()
        seen = device_tools.kernels(where.device, run)
        assert len(seen) == 1, f"{seen}"
        assert device_tools.waits(where.device, run) == []
        out = torch.empty_like(u)
        replay, _ = device_tools.captured(where.device, lambda: out.copy_(run()), warm_up=3)
        for _ in range(2):
            u.normal_()
            replay()
            assert torch.equal(out, run())
