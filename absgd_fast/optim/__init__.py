"""Optimizers: torch's own classes, with a step that is one kernel launch for all parameters. The formulas are in
reference/steps.py (plain torch) and csrc/math/step.h (kernels); docs/MATH.md §3 lists them.

    rule.py            everything that the package knows about an optimizer's rule: one record
    sgd.py, adam.py, rmsprop.py, adagrad.py    the records, and the classes that users see
    base.py            the base class; its `step` has three tiers:
    planned_step.py    one launch over the table of a StepPlan
    list_step.py       the operator on lists of tensors
    torch_step.py      plain torch
    scaling.py         what a step still has to do to the gradients for GradScaler and for a deferred ABLoss
    clipping.py        max_norm: the global norm, and the clip factor
    state.py           float32 states of half-precision parameters, checkpoints
    checks.py          errors beyond those of torch's classes
"""

import torch  # noqa: F401  the examples of the classes use it, and this is their module

from .adagrad import ABAdagrad
from .adam import ABAdam, ABAdamW
from .rmsprop import ABRMSprop
from .sgd import ABSGD

__all__ = ["ABSGD", "ABAdagrad", "ABAdam", "ABAdamW", "ABRMSprop"]

for _public in (ABAdagrad, ABAdam, ABAdamW, ABRMSprop, ABSGD):
    _public.__module__ = __name__  # a pickle names this public place, so the files in here may be moved
