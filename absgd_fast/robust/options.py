"""Options of a robust loss: flags, and those that exclude each other, as one table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from .._numbers import plain
from ..distributed import AUTO
from .lam import RelativeLam, TargetESS

Options = Mapping[str, Any]  # name -> value; the values are of many types


class StateOptions(TypedDict, total=False):
    """The options of a `RobustState` besides lam."""

    gamma: float
    alpha: float
    mix: float
    init: str
    normalizer: str
    max_weight: float | None


class LossOptions(StateOptions, total=False):
    """The options of a `RobustLoss` besides its criterion."""

    lam: float | Tensor | RelativeLam | TargetESS | None
    process_group: torch.distributed.ProcessGroup | str | None
    deferred: bool
    loss_divisor: float
    report: str
    warn_of_collapse: bool
    backend: str | None


class Conflict(NamedTuple):
    """One option (or class) that excludes another option, and the error that says so."""

    owner: str  # the option, or the class, that excludes
    option: str  # the option that it excludes
    clashes: Callable[[Options], bool]  # whether it does so with these options
    message: str  # formatted with the options, `value` of the option and `owner`


def _given(name: str, default: object) -> Callable[[Options], bool]:
    """A test whether an option is not at its default."""
    return lambda options: options[name] != default


def _unused_by_rule(name: str, default: object) -> Conflict:
    message = name + ": got {value!r} together with rule=, which makes the weights of a batch without it; leave it out"
    return Conflict("rule", name, _given(name, default), message)


def _unused_by_target(name: str, default: object) -> Conflict:
    message = name + ": got {value!r} with lam={_given_lam!r}, which weighs each batch by itself without it; leave it out"
    return Conflict("TargetESS", name, _given(name, default), message)


_TARGET_DEFERRED = (
    "lam: got {_given_lam!r} with deferred=True, expected a number or RelativeLam(r): every micro-batch has a lambda of its own,"
    " so nothing that all of them share is left for the end of the step; use deferred=False, which weighs each micro-batch by"
    " itself"
)


def _before_log_s(owner: str, instead: str) -> tuple[Conflict, Conflict]:
    """Options that need log s' before all samples are known. instead: with what they can be used."""
    return (
        Conflict(
            owner,
            "mix",
            _given("mix", 0),
            "mix: got {value:g} with {owner}, expected 0: the weighted sum and the plain sum are divided by different numbers,"
            f" which are known only after both are in one gradient; use mix=0, or {instead}",
        ),
        Conflict(
            owner,
            "max_weight",
            lambda options: options["max_weight"] != math.inf and options["normalizer"] != "none",
            "max_weight: got {value:g} with {owner}, expected None (or normalizer='none'): the gradient is made before the"
            f" weights are known, so they cannot be bounded in it; leave max_weight out, or use {instead}",
        ),
    )


CONFLICTS = (
    _unused_by_rule("lam", None),
    _unused_by_rule("gamma", 0.9),
    _unused_by_rule("alpha", 1.0),
    _unused_by_rule("init", "first"),
    _unused_by_rule("normalizer", "moving"),
    Conflict(
        "rule",
        "process_group",
        lambda options: options["process_group"] not in (None, AUTO),
        "process_group: got a group together with rule=, which weighs the batch of one process; expected None",
    ),
    _unused_by_rule("deferred", False),
    _unused_by_target("gamma", 0.9),
    _unused_by_target("alpha", 1.0),
    _unused_by_target("init", "first"),
    Conflict(
        "TargetESS",
        "normalizer",
        lambda options: options["normalizer"] == "none",
        "normalizer: got {value!r} with lam={_given_lam!r}, which gives the weights of each batch a mean of 1; leave it out",
    ),
    Conflict("TargetESS", "deferred", _given("deferred", False), _TARGET_DEFERRED),
    Conflict("deferred=True", "target", _given("target", None), _TARGET_DEFERRED),
    _unused_by_rule("loss_divisor", 1),
    *_before_log_s("deferred=True", "deferred=False"),
    Conflict(
        "LinearABLoss",
        "rule",
        _given("rule", None),
        "rule: got one with LinearABLoss, which makes its gradients before all losses are known; use ABLoss",
    ),
    *_before_log_s("LinearABLoss", "ABLoss on the logits"),
)


def check(owner: str, options: Options) -> None:
    """ValueError for the first of `options` that `owner` excludes. Options that are not given are not looked at."""
    for conflict in CONFLICTS:
        if conflict.owner == owner and conflict.option in options and conflict.clashes(options):
            raise ValueError(conflict.message.format(**{**options, "value": options[conflict.option], "owner": owner}))


def flag(value: bool, name: str) -> bool:
    """True or False (NumPy's too) as a bool; ValueError for anything else, such as a text, which Python would take as True."""
    number = plain(value)
    if not isinstance(number, bool):
        raise ValueError(f"{name}: got {value!r}, expected True or False")
    return number
