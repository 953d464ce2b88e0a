"""The whole pipeline in plain torch, to be read beside the paper. The oracle of the tests and the last fallback.

    losses.py    per-sample losses on logits
    weights.py   robust weights, the robust loss, its three stages, the weights of L2RW
    steps.py     the steps of the optimizers

Never optimised: every function is the formula of Algorithm 1 of *Attentional-Biased Stochastic Gradient Descent*
(ABSGD), in the log domain, for any floating dtype and any device, differentiable by autograd. Equation numbers refer
to that paper.
"""

from .._codes import KINDS, NORMALIZERS
from .dtypes import real_dtype
from .losses import SCE_A, logit_loss
from .steps import adagrad_step_, adam_step_, momentum_step_, rmsprop_step_, weighted_momentum_step_
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
    "adagrad_step_",
    "adam_step_",
    "apply",
    "logit_loss",
    "momentum_step_",
    "partial_stats",
    "real_dtype",
    "rectified",
    "rmsprop_step_",
    "robust_loss",
    "robust_weights",
    "settle",
    "weighted_momentum_step_",
]
