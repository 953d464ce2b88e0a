"""What a competitor is, and how it is checked before it is timed."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch

from .case_data import STEPS

OURS, OURS_ON_TRITON = "absgd_fast", "absgd_fast, triton"


class LeftOut(Exception):
    """A competitor cannot run here, or its result is wrong. The message says why."""


@dataclass
class Peer:
    """One competitor, ready to be timed on the data of a case."""

    run: Callable  # one step, which is timed
    error: Callable  # error(result of run() in step number STEPS) -> its distance from the float64 oracle
    leaf: torch.Tensor | None = None  # the logits, for measurements of memory
    parts: dict = field(default_factory=dict)  # name: function that prepares a part of a step and returns what runs it
    forget: Callable = lambda: None  # frees the results of earlier calls, so they are not counted as memory in use
    note: str = ""  # a remark for the reader of the report
    steps: int = STEPS  # before the check: 1 if a step takes seconds and no result depends on earlier ones
    patience: float = math.inf  # seconds that a step may take


def ready(factory, data):
    """A competitor after its first steps, and its error. Raises LeftOut if it cannot run, takes too long, or is wrong."""
    peer = factory(data)
    for _ in range(peer.steps):
        start = perf_counter()
        result = peer.run()
    if (seconds := perf_counter() - start) > peer.patience:
        raise LeftOut(f"a step takes {seconds:.0f} s, allowed are {peer.patience:g}")
    error = peer.error(result)
    if not error <= data.tolerance:  # `not <=` also stops a NaN
        raise LeftOut(f"its result is off by {error:.2g}, allowed is {data.tolerance:g}")
    return peer, error
