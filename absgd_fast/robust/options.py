"""Options of a robust loss that do not go together: one table."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from ..distributed import AUTO


class Conflict(NamedTuple):
    owner: str  # the option, or the class, that excludes
    option: str  # what it excludes
    clashes: Callable[[dict], bool]  # whether it does so with these options
    message: str  # formatted with the options, `value` of the option and `owner`


def _given(name: str, default) -> Callable[[dict], bool]:
    return lambda options: options[name] != default


def _alone(name: str, default) -> Conflict:
    message = name + ": got {value!r} with a rule, which weighs a batch by itself; leave it out"
    return Conflict("rule", name, _given(name, default), message)


def _before_log_s(owner: str) -> tuple[Conflict, Conflict]:
    """What needs log s' before all samples are known."""
    return (
        Conflict(
            owner,
            "mix",
            _given("mix", 0),
            "mix: got {value:g} with {owner}, expected 0: two sums of other sizes cannot share one gradient",
        ),
        Conflict(
            owner,
            "max_weight",
            lambda options: options["max_weight"] != math.inf and options["normalizer"] != "none",
            "max_weight: got {value:g} with {owner}, expected None: the weights are known only after the gradient",
        ),
    )


CONFLICTS = (
    _alone("lam", None),
    _alone("gamma", 0.9),
    _alone("alpha", 1.0),
    _alone("init", "first"),
    _alone("normalizer", "moving"),
    Conflict(
        "rule",
        "process_group",
        lambda options: options["process_group"] not in (None, AUTO),
        "process_group: got a group with a rule, which weighs the batch of one process; expected None",
    ),
    _alone("deferred", False),
    _alone("loss_divisor", 1),
    *_before_log_s("deferred=True"),
    Conflict(
        "LinearABLoss",
        "rule",
        _given("rule", None),
        "rule: got one with LinearABLoss, whose gradients are made before all losses are known; use ABLoss",
    ),
    *_before_log_s("LinearABLoss"),
)


def check(owner: str, options: dict) -> None:
    """ValueError for the first of `options` that `owner` excludes. Options that are not given are not looked at."""
    for conflict in CONFLICTS:
        if conflict.owner == owner and conflict.option in options and conflict.clashes(options):
            raise ValueError(conflict.message.format(**options | {"value": options[conflict.option], "owner": owner}))
