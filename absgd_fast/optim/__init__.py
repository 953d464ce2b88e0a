"""Optimizers: torch's own classes with their step in one kernel for all parameters. The formulas are in reference/ (plain
torch) and csrc/math.h (kernels).

    rule.py            what the package knows of a rule: one record
    sgd.py, adam.py, rmsprop.py, adagrad.py    the records, and the classes that users see
    base.py            what the classes share; its `step` goes through three tiers:
    planned_step.py    one launch over the table of a StepPlan
    list_step.py       the operator on lists of tensors
    torch_step.py      plain torch
    scaling.py         what GradScaler and a deferred ABLoss leave for the step to do to the gradients
    state.py           float32 states of half-precision parameters, checkpoints
"""

import torch  # noqa: F401  the examples of the classes, whose module this is, use it

from .adagrad import ABAdagrad
from .adam import ABAdam, ABAdamW
from .rmsprop import ABRMSprop
from .sgd import ABSGD

__all__ = ["ABSGD", "ABAdagrad", "ABAdam", "ABAdamW", "ABRMSprop"]

for _public in (ABAdagrad, ABAdam, ABAdamW, ABRMSprop, ABSGD):
    _public.__module__ = __name__  # a pickle names the public place, so that files in here may be moved
