"""Criteria and optimizers by their names, for trainers that are configured with names."""

from __future__ import annotations

import math
from typing import Any

import torch

from .. import losses, optim
from ..language_models import DFT
from ..linear import LinearABLoss
from ..robust import ABLoss

LOSSES: dict[str, type[losses.LogitLoss]] = {
    "cross_entropy": losses.CrossEntropy,
    "focal": losses.Focal,
    "gce": losses.GCE,
    "sce": losses.SCE,
    "ldam": losses.LDAM,
    "vs": losses.VS,
    "la": losses.LogitAdjusted,
    "cdt": losses.CDT,
}
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "ABSGD": optim.ABSGD,
    "ABAdam": optim.ABAdam,
    "ABAdamW": optim.ABAdamW,
    "ABRMSprop": optim.ABRMSprop,
    "ABAdagrad": optim.ABAdagrad,
}


def optimizer_called(given: str | None) -> str | None:
    """The name of an optimizer as `OPTIMIZERS` has it, from one in any capitals; None stays None.

    >>> optimizer_called("abadamw")
    'ABAdamW'
    """
    if given is None:
        return None
    found = [name for name in OPTIMIZERS if isinstance(given, str) and name.lower() == given.lower()]
    if not found:
        raise ValueError(f"optimizer: got {given!r}, expected one of {', '.join(OPTIMIZERS)}, or None")
    return found[0]


def criterion_of(given: Any, options: dict[str, Any], of_head: bool) -> ABLoss | LinearABLoss:
    """The robust loss that a user means by a criterion or its name. A plain loss becomes a robust one with lam = inf.

    Args:
        given: an `ABLoss`, a `LinearABLoss`, another callable that returns per-sample losses, or a name.
        options: for a name, the arguments of its class.
        of_head: whether the model is a language model, whose head a `LinearABLoss` takes.

    >>> criterion_of("focal", {"gamma": 1.0}, False)
    ABLoss(
      lam=inf, gamma=0.9, alpha=1, mix=0, normalizer='moving'
      (criterion): Focal(1, ignore_index=-100, reduction='none')
    )
    """
    if not isinstance(given, str):
        if options:
            raise ValueError("criterion_options: got some with a criterion that is made already, expected them with a name only")
        if isinstance(given, LinearABLoss) and not of_head:
            raise TypeError("criterion: got a LinearABLoss, and the model is no causal language model; expected an ABLoss")
        return given if isinstance(given, ABLoss) else ABLoss(given, lam=math.inf)
    made: Any = LinearABLoss if of_head else ABLoss
    name = given.lower()
    if name == "absgd":
        if not {"lam", "rule"} & options.keys():
            raise ValueError(
                'criterion_options: got none with the name lam and criterion="absgd", expected lambda, such as'
                ' criterion_options={"lam": -0.5} (docs/choosing-lambda.md)'
            )
        return made(**options)
    if name == "dft":
        return DFT(linear=True, **options) if of_head else DFT(**options)
    if name not in LOSSES:
        raise ValueError(f"criterion: got {given!r}, expected 'absgd', 'dft', one of {', '.join(LOSSES)}, or a criterion")
    return made(LOSSES[name](**options), lam=math.inf)
