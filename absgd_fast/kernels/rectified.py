"""Rectified weights (MATH §4.5): the twin of csrc/cuda/rectified.cu."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .math import rectified_numbers, rectified_sum, rectified_weight


@triton.jit(do_not_specialize=["count"])
def rectified_kernel(products, weights, count, BLOCK: tl.constexpr):
    """Rectified weights, (count) real -> (count) real, by one program, because a batch has only one number for each sample.

    1. The program reads all numbers, and adds up those that are positive and finite, in float64.
    2. It reads the numbers again, and writes each divided by the sum.
    """
    T: tl.constexpr = products.dtype.element_ty
    plain, scaled = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        plain, scaled = rectified_sum(plain, scaled, tl.load(products + i, mask=i < count, other=0.0))
    unit, total = rectified_numbers(tl.sum(plain, 0), tl.sum(scaled, 0), T)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        u = tl.load(products + i, mask=i < count, other=0.0)
        tl.store(weights + i, rectified_weight(u, unit, total), mask=i < count)


KERNELS = (rectified_kernel,)


def rectified(products: Tensor) -> Tensor:
    """Rectified weights (MATH §4.5): max(u, 0) / sum max(u, 0) over the finite u, and NaN for all other u.

    All weights of finite u are 0 if the sum is 0. products: contiguous, float32 or float64.
    """
    weights, count = torch.empty_like(products), products.numel()
    if count:
        warps = 4 if count <= 512 else 16  # 4 products for each thread, as in weights.py
        launch.launch(rectified_kernel, 1, products, products, weights, count, BLOCK=128 * warps, num_warps=warps)
    return weights
