"""Batches whose lambda has a target for the effective sample size (TargetESS, docs/MATH.md §1.7), and what must hold of each.

The kernels' tests share these: CUDA on the CPU (cuda_on_cpu/suite.py), Triton's interpreter (kernels_interpreted_weights.py) and
a GPU (test_gpu_robust.py).
"""

import math

import numpy as np
import oracle
import torch

NAN, INF = math.nan, math.inf


def normal(n):
    return torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).abs() + 0.5


def ties(n):
    """Half of the losses are the smallest one, the other half the largest."""
    return torch.arange(n, dtype=torch.float64) % 2 + 1


def outlier(n):
    x = normal(n)
    x[n // 2] = 1e3
    x[n // 3] = -1e3
    return x


def bad(n):
    """NaN and infinite losses among the others."""
    x = normal(n)
    x[1::7], x[2::9], x[3::11] = NAN, INF, -INF
    return x


BATCHES = {
    "normal": normal,
    "constant": lambda n: torch.full((n,), 1.7, dtype=torch.float64),
    "ties": ties,
    "outliers": outlier,
    "far from 0": lambda n: 1000 + 1e-3 * normal(n),
    "bad": bad,
    "heavy tails": lambda n: torch.exp(3 * normal(n)),
}
SHARES = (0.7, -0.7, 0.3, -0.95)  # with the sign of lambda
STATE = -0.75  # log s before the batch


def check(
    values, share, loss, weights, grad, log_s, nonfinite, lam, mask=None, score=None, sample_weight=None, mix=0.0, update=True
):
    """The results of one forward on `values` (of the dtype in which they are computed), against the oracle."""
    dtype, tensors = values.dtype, (values, mask, score, sample_weight)
    losses, mask, scores, t = (None if x is None else x.flatten().cpu().double().numpy() for x in tensors)
    valid = np.ones(losses.shape, bool) if mask is None else mask > 0
    x = losses if scores is None else scores
    good = valid & np.isfinite(losses) & np.isfinite(x)
    eps = torch.finfo(dtype).eps
    exact_lam, _, _ = oracle.target_ess(losses, abs(share), math.copysign(1, share), mask=valid, score=scores, floor=64 * eps)
    got, weights = float(lam), weights.flatten().cpu().double().numpy()
    n, is_bad = good.sum(), bool((valid & ~good).any())
    z = np.zeros(n)
    if math.isinf(exact_lam):
        assert got == INF
    else:
        np.testing.assert_allclose(got, exact_lam, rtol=3e-3)
        extreme = x[good].max() if share > 0 else x[good].min()
        z = (x[good] - extreme) / got
    log_mean = np.log(np.exp(z).mean()) if n else 0.0
    wanted = np.exp(z - log_mean)
    near = 1e-11 if dtype == torch.float64 else 2e-5
    np.testing.assert_allclose(weights[good], wanted, rtol=near, atol=1e-30)
    assert np.isnan(weights[valid & ~good]).all() and not weights[~valid].any()
    if n and not math.isinf(got):
        of_ties = (x[good] == extreme).mean()
        reached = weights[good].sum() ** 2 / (n * (weights[good] ** 2).sum())
        np.testing.assert_allclose(reached, max(abs(share), of_ties), rtol=1e-3)
    moved = 0.0 if math.isinf(got) else log_mean + extreme / got
    floor = 1e-6 if torch.float32 in (dtype, log_s.dtype) else 1e-10
    np.testing.assert_allclose(float(log_s), STATE if is_bad or not update or not n else moved, rtol=floor, atol=floor)
    assert int(nonfinite) == int(is_bad and update)
    mix = 0.0 if math.isinf(got) else mix
    t = np.ones(len(losses)) if t is None else t
    factors = t[good] * (wanted + mix) / max(n, 1)
    if is_bad:
        assert not math.isfinite(float(loss))
    else:
        near_loss = near * np.abs(factors * losses[good]).sum() if n else 0.0
        np.testing.assert_allclose(float(loss), (factors * losses[good]).sum(), rtol=0, atol=near_loss)
    if grad is not None:
        grad = grad.flatten().cpu().double().numpy()
        np.testing.assert_allclose(grad[good], factors, rtol=2 * near, atol=1e-30)
