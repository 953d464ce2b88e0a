"""The whole pipeline in plain torch, written to be read beside the paper.

    weights.py   robust weights, the robust loss and its three stages; the weights of L2RW     docs/MATH.md §1, §5, §4.5
    target.py    the lambda of TargetESS                                                       docs/MATH.md §1.7
    losses.py    per-sample losses on logits                                                   docs/MATH.md §2
    inverse.py   logits from the gradient of their loss                                        docs/MATH.md §2.6
    steps.py     the steps of the optimizers                                                   docs/MATH.md §3

The paper is Qi et al., *Attentional-Biased Stochastic Gradient Descent* (ABSGD, TMLR 2023). Numbers of equations, steps and
sections that name no other source refer to it.

The tests compare every kernel with these functions, and the package calls them where no kernel can run. Speed does not matter
here, so each function is its formula in the log domain and nothing more. The functions take any floating dtype and any device.
Autograd differentiates the losses and the weights.
"""

from .._codes import KINDS, NORMALIZERS
from .dtypes import real_dtype
from .inverse import logits_of_gradient
from .losses import SCE_A, logit_loss, soft_target_slope
from .steps import adagrad_step_, adam_step_, clip_factor, momentum_step_, rmsprop_step_, weighted_momentum_step_
from .target import Search, Target, extremes, robust_loss_at_target, target_lambda, usable_scores
from .weights import (
    COUNT,
    LOG_S,
    LOG_SUM,
    MAX_Z_GAP,
    NONFINITE,
    PARTIAL_STATS,
    SCALE,
    Z_MAX,
    apply,
    partial_stats,
    rectified,
    robust_loss,
    robust_weights,
    settle,
)

__all__ = [
    "COUNT",
    "KINDS",
    "LOG_S",
    "LOG_SUM",
    "MAX_Z_GAP",
    "NONFINITE",
    "NORMALIZERS",
    "PARTIAL_STATS",
    "SCALE",
    "SCE_A",
    "Z_MAX",
    "Search",
    "Target",
    "adagrad_step_",
    "adam_step_",
    "apply",
    "clip_factor",
    "extremes",
    "logit_loss",
    "logits_of_gradient",
    "momentum_step_",
    "partial_stats",
    "real_dtype",
    "rectified",
    "rmsprop_step_",
    "robust_loss",
    "robust_loss_at_target",
    "robust_weights",
    "settle",
    "soft_target_slope",
    "target_lambda",
    "usable_scores",
    "weighted_momentum_step_",
]
