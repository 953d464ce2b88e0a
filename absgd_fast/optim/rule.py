"""`OptimizerRule`: everything that the package knows about the update rule of an optimizer. All three tiers of a step read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from .. import _numbers
from .._codes import RULES

_T = TypeVar("_T")


class Place(NamedTuple):
    """Where a number stands in a parameter group."""

    key: str
    position: int = -1  # the position in the tuple that stands under `key` (betas); -1: the number itself stands there


LR = Place("lr")


@dataclass(frozen=True, eq=False)
class OptimizerRule:
    """Where the parameter groups and the state of torch's optimizer hold the numbers, flags and states of a rule."""

    name: str  # one of RULES
    states: dict[
        str, str | None
    ]  # in the order of csrc/math/step.h: a state, and the option that turns it on (None: always kept)
    flags: dict[str, int]  # options of a group, and the bits that they set (_codes.py)
    hyper_a: Place  # the two numbers that only this rule has (csrc/math/step.h StepNumbers)
    hyper_b: Place | None = None  # None: the rule has no such number, and the kernels are given 0
    eps: Place | None = None
    weight_decay: Place = field(default=Place("weight_decay"))
    counts: bool = True  # whether the rule counts the steps of a parameter
    own_flags: tuple[str, ...] = ()  # options that torch's class does not have, and that change the meaning of the states
    made_in_step: tuple[str, ...] = ()  # states that may be None, because the next step makes them
    refuses_sparse: str | None = None  # torch's error text; None: sparse gradients are refused only together with weight decay

    @property
    def number(self) -> int:
        """The number by which operators and kernels know the rule."""
        return RULES.index(self.name)

    @property
    def list_count(self) -> int:
        """How many lists torch's `_init_group` fills: parameters, gradients, each state and, where they are counted, steps."""
        return 2 + len(self.states) + self.counts

    def kept(self, group: dict, lists: list[_T]) -> list[_T]:
        """The items of those states that the group's options keep. lists: one item for each state of the rule."""
        return [values for values, option in zip(lists, self.states.values()) if option is None or group[option] != 0]

    def numbers(self, group: dict) -> list[float]:
        """weight_decay, hyper_a, hyper_b and eps of the group. TypeError: an option is not a number."""
        return [0.0 if place is None else read_number(group, place) for place in self._places]

    @property
    def _places(self) -> tuple[Place | None, ...]:
        return self.weight_decay, self.hyper_a, self.hyper_b, self.eps

    def with_numbers(self, group: dict, numbers: list[float]) -> dict:
        """The group with these four numbers (of `numbers`) in their places, for plain torch, which would not read all of them."""
        options = changed(group)
        for place, value in zip(self._places, numbers):
            if place is not None and place.position < 0:
                options[place.key] = value
            elif place is not None:
                options[place.key] = tuple(value if i == place.position else old for i, old in enumerate(options[place.key]))
        return options

    def bits(self, group: dict) -> int:
        """The bits of all flags that are set in the group."""
        bits = 0
        for option, bit in self.flags.items():
            bits |= bit if group[option] else 0
        return bits

    def check_sparse(self, group: dict) -> None:
        """Raises torch's RuntimeError if the rule takes no sparse gradients, or none together with the group's weight decay."""
        if self.refuses_sparse is not None:
            raise RuntimeError(self.refuses_sparse)
        if group["weight_decay"] != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")


def changed(group: dict, **options: Any) -> dict:
    """A copy of the group with these options. It asks for each value, because a dict of another class may compute it."""
    return {name: group[name] for name in group} | options


def plain_options(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group, with Python's own numbers for those of NumPy, so that a state_dict is made of plain values."""
    return {name: _numbers.plain(value) for name, value in group.items() if name != "params"}


def read_number(group: dict, place: Place) -> float:
    """The number that stands at a place of the group. TypeError: it is a string. ValueError: it is not one of a pair."""
    value = group[place.key]
    if place.position >= 0:
        if len(value) != 2:
            raise ValueError(f"{place.key}: got {value!r}, expected two numbers")
        value = value[place.position]
    if isinstance(value, str):  # float() would read it
        raise TypeError(f"{place.key}: got {value!r}, expected a number")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{place.key}: got {value!r}, expected a number") from error
