"""The end of a forward: what is remembered of it, and what it returns."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.compiler import is_compiling

from .._checkpointing import hooks_are_active
from .base import RobustLoss
from .collapse import message
from .last import Weighed
from .normalizer import InStages, Own
from .report import as_mean


def conclude(criterion: RobustLoss, normalizer: Own | InStages, weighed: Weighed, update_state: bool) -> Tensor:
    """What a forward returns, after `last` and the count of collapsed forwards have been told of it.

    It is written for few attributes of modules: each takes ten times as long as one of a plain object.
    """
    loss, sample_stats, weighing, lam = weighed
    memo = criterion.memo
    memo.remember(sample_stats, weighing, lam)
    if update_state and not is_compiling():
        collapse = memo.collapse
        collapse.until_look -= 1
        if collapse.until_look <= 0 and collapse.look(sample_stats, weighing):
            callers = 11 if hooks_are_active() else 6  # frames up to the user's call; replay.py adds some
            warnings.warn(message(type(criterion).__name__, criterion.weighting_in_words()), stacklevel=callers)
    return as_mean(normalizer, weighed) if memo.reports_mean else loss
