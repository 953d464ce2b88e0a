"""What the package knows of an optimizer's rule: one record, which all three tiers of a step read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .._codes import RULES


class Place(NamedTuple):
    """Where a number stands in a parameter group."""

    key: str
    index: int = -1  # within the tuple that stands there (betas); -1: the number itself stands there


@dataclass(frozen=True, eq=False)
class OptimizerRule:
    """Where torch's dicts have the numbers, flags and states of a rule."""

    name: str  # one of RULES
    states: dict[str, str | None]  # in the order of csrc/math/step.h; the option without which a state is not kept, or None
    flags: dict[str, int]  # options of a group, and the bits that they set (_codes.py)
    hyper_a: Place  # the two numbers that only this rule has (csrc/math/step.h StepNumbers)
    hyper_b: Place | None = None  # None: the rule has no such number, which then is 0
    eps: Place | None = None
    weight_decay: Place = field(default=Place("weight_decay"))
    counts: bool = True  # whether it counts steps
    own_flags: tuple[str, ...] = ()  # options that torch's class does not have, and that change what the states mean
    refuses_sparse: str | None = None  # torch's words; None: sparse gradients are refused with weight decay only

    @property
    def number(self) -> int:
        return RULES.index(self.name)

    @property
    def list_count(self) -> int:
        """How many lists torch's `_init_group` fills: parameters, gradients, states, counts of steps."""
        return 2 + len(self.states) + self.counts

    def kept(self, group: dict, lists: list) -> list:
        """Of one item for each state those that this group's options keep (csrc/math/step.h StepNumbers::states)."""
        return [values for values, option in zip(lists, self.states.values()) if option is None or group[option] != 0]

    def numbers(self, group: dict) -> list[float]:
        """weight_decay, hyper_a, hyper_b and eps. TypeError: an option that is no number."""
        places = (self.weight_decay, self.hyper_a, self.hyper_b, self.eps)
        return [0.0 if place is None else read_number(group, place) for place in places]

    def bits(self, group: dict) -> int:
        bits = 0
        for option, bit in self.flags.items():
            bits |= bit if group[option] else 0
        return bits

    def check_sparse(self, group: dict) -> None:
        """RuntimeError where the rule takes no sparse gradients, in torch's words, or not with weight decay."""
        if self.refuses_sparse is not None:
            raise RuntimeError(self.refuses_sparse)
        if group["weight_decay"] != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")


def read_number(group: dict, place: Place) -> float:
    value = group[place.key] if place.index < 0 else group[place.key][place.index]
    if isinstance(value, str):  # which float() would read
        raise TypeError(f"{place.key}: got {value!r}, expected a number")
    return float(value)
