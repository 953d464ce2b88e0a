"""The names and numbers by which Python, Triton and C++ speak of the same things, written once.

An operator takes its kinds, its rule and what never changes within a run as integers. Whoever makes or reads such an integer in
Python takes it from here; tests/test_codes.py compares all of them with csrc/.
"""

from __future__ import annotations

# What the operators' two numbers hyper_a and hyper_b are called, for each kind of loss on logits, in the order of csrc/math/losses.h Kind.
# A number that a kind does not have is 0; so is the k of "gce" where there is none.
HYPERPARAMETERS = {
    "ce": ("label_smoothing",),
    "focal": ("gamma",),
    "gce": ("q", "k"),
    "sce": ("alpha", "beta"),
    "weighted_focal": ("gamma",),
}
KINDS = tuple(HYPERPARAMETERS)

# Where log s' comes from: the moving average, this batch alone, or nowhere (log s' = 0); in the order of csrc/math/weights.h NormalizerKind.
NORMALIZERS = ("moving", "batch", "none")

# The rules of an optimizer's step, in the order of csrc/math/step.h Rule.
RULES = ("sgd", "adam", "rmsprop", "adagrad")

# The rules from losses to weights that solve for a level, in the order of csrc/cpu/kernels.h Weighting.
RULES_OF_LOSSES = ("cvar", "chi2")

# ---- bits of the operators' argument `flags` -------------------------------------------------------------------------

# It packs what never changes within a run into one integer, because an argument costs about 0.1 us.
NORMALIZER = 3  # the two bits of an index of NORMALIZERS
INIT_FIRST = 4  # the first batch sets s by itself
UPDATE = 8  # log s and the count of non-finite batches move
WITH_GRAD = 16  # what is saved for backward: the gradient
WITH_STATS = 32  # what is saved for backward: the statistics of the rows
PRUNE = 64  # "gce" with k: rows with p <= k do not count
HARD = 128  # no soft targets; read by Python alone
KIND = 256  # one step of the kind's bits, which are the highest: flags // KIND is an index of KINDS


def flags(normalizer: str, init: str) -> int:
    """The bits of a normalizer and of how it begins.

    >>> flags("batch", "first") == 1 | INIT_FIRST
    True
    """
    return NORMALIZERS.index(normalizer) | (INIT_FIRST if init == "first" else 0)


# ---- bits of a step's argument `flags` (csrc/math/step.h StepFlag) ----------------------------------------------------------

MAXIMIZE = 1
NESTEROV = 2  # sgd
HEAVY_BALL = 4  # sgd
AMSGRAD = 8  # adam
DECOUPLED = 16  # adam: weight decay apart from the gradient (AdamW)
PAPER_FORM = 32  # adam: Eq. 9 of the ABSGD paper, no bias correction
CENTERED = 64  # rmsprop
