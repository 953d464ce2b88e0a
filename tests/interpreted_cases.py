"""What the tests of the Triton kernels in Triton's interpreter (kernels_interpreted_*.py) share.

test_kernels.py runs these with TRITON_INTERPRET=1, which must be set before triton is imported. A program costs
milliseconds here, so sizes are the smallest that meet a branch or a tail: a tile of 10 classes is 64 rows, blocks are 8, 32,
1024, 2048 or 4096 elements.
"""

import math

import numpy as np
import oracle
import torch
from tensors import wide

from absgd_fast import _codes
from absgd_fast.kernels import losses

INF, NAN = math.inf, math.nan
NORMALIZERS = {name: number for number, name in enumerate(_codes.NORMALIZERS)}


def tolerance(dtype):
    """64 ulp: of the computation, and one rounding of the result. The interpreter truncates to bfloat16."""
    rounding = {torch.bfloat16: torch.finfo(torch.bfloat16).eps, torch.float16: torch.finfo(torch.float16).eps / 2}.get(dtype, 0)
    return 64 * torch.finfo(wide(dtype)).eps + rounding


def close(got, exact, rtol=0.0, atol=0.0, what=""):
    np.testing.assert_allclose(torch.as_tensor(got).detach().double().numpy(), exact, rtol=rtol, atol=atol, err_msg=what)


def make(shape, dtype=torch.float32, seed=0, scale=3.0):
    """Logits, labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return logits.to(dtype), torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)


def exact_of(logits, target, **options):
    values, grads = oracle.cross_entropy(oracle.rows(logits.double()), target.flatten().tolist(), **options)
    return values.reshape(target.shape), oracle.unrows(grads, logits.shape)


def fused(logits, target, upstream, weight=None, label_smoothing=0.0, ignore_index=-100, report=None):
    """Losses, gradient."""
    values, stats, _ = losses.logit_loss(
        logits, target, weight, None, label_smoothing, 0.0, ignore_index, kind=0, prune=False, with_stats=True, report=report
    )
    return values, losses.logit_loss_backward(logits, target, weight, None, label_smoothing, stats, upstream)


def state(log_s, lam, dtype):
    return torch.tensor(log_s, dtype=dtype), torch.tensor(0), torch.tensor(lam, dtype=dtype)


def numbers(gamma=0.9, alpha=1.0, mix=0.0, max_weight=None, normalizer="moving", init="first"):
    """Positional and keyword arguments of the kernels."""
    positional = gamma, alpha, mix, INF if max_weight is None else max_weight
    return positional, dict(normalizer=NORMALIZERS[normalizer], init_first=init == "first")
