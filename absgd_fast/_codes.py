"""The names and numbers that Python, Triton and C++ share.

The operators take kinds, rules and flags as integers. All Python code takes these integers from here, and tests/test_codes.py
compares them with csrc/.
"""

from __future__ import annotations

# The kinds of losses on logits, in the order of Kind in csrc/math/losses.h, and the names that the operators' two numbers hyper_a
# and hyper_b have for each kind. A number that a kind does not have is 0. A "gce" without k has k = 0.
HYPERPARAMETERS = {
    "ce": ("label_smoothing",),
    "focal": ("gamma",),
    "gce": ("q", "k"),
    "sce": ("alpha", "beta"),
    "weighted_focal": ("gamma",),
}
KINDS = tuple(HYPERPARAMETERS)

# The modes of the normaliser, in the order of NormalizerKind in csrc/math/weights.h (MATH §1.2): log s' is that of the moving
# average, that of this batch alone, or 0. With "target", lambda too is that of this batch alone (TargetESS, MATH §1.7).
# In this mode the operators' argument gamma is the share with the sign of lambda, and lam is written.
NORMALIZERS = ("moving", "batch", "none", "target")
CHOSEN_BY_NAME = NORMALIZERS[:3]  # the values of the public argument `normalizer`

# The rules of the optimizers, in the order of Rule in csrc/math/step.h (MATH §3).
RULES = ("sgd", "adam", "rmsprop", "adagrad")

# The rules from losses to weights that the operator rule_weights knows, in the order of Weighting in csrc/cpu/kernels.h
# (MATH §4.3 and §4.4).
RULES_OF_LOSSES = ("cvar", "chi2")

# ---- bits of the operators' argument `flags` -------------------------------------------------------------------------

# One integer holds all settings that do not change within a run, because each argument of an operator costs about 0.1 us.
NORMALIZER = 3  # mask of the two bits that hold an index of NORMALIZERS
INIT_FIRST = 4  # the first batch alone sets s (init="first")
UPDATE = 8  # this call updates log s and the count of non-finite batches
WITH_GRAD = 16  # backward mode: the forward pass saves the gradient
WITH_STATS = 32  # backward mode: the forward pass saves the statistics of the rows
PRUNE = 64  # "gce" with k: rows with p <= k do not count
HARD = 128  # soft targets are refused; only Python reads this bit
KIND = 256  # unit of the kind, which takes the highest bits: flags // KIND is an index of KINDS


def flags(normalizer: str, init: str) -> int:
    """The bits of a normaliser's mode and of its start.

    Args:
        normalizer: one of NORMALIZERS.
        init: "first" or "zero".

    >>> flags("batch", "first") == 1 | INIT_FIRST
    True
    """
    return NORMALIZERS.index(normalizer) | (INIT_FIRST if init == "first" else 0)


# ---- bits of a step's argument `flags` (StepFlag in csrc/math/step.h) --------------------------------------------------

MAXIMIZE = 1
NESTEROV = 2  # sgd
HEAVY_BALL = 4  # sgd
AMSGRAD = 8  # adam
DECOUPLED = 16  # adam: weight decay does not enter the gradient (AdamW)
PAPER_FORM = 32  # adam: Eq. 9 of the ABSGD paper, without bias correction
CENTERED = 64  # rmsprop
