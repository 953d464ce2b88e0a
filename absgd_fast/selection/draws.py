"""The random numbers of trainings that take turns: each has global generators of its own, as if it were trained alone."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


class Draws:
    """A context in which the global generators of torch, Python and NumPy go on where they stood at the end of the last one.

    The first context begins where they stand outside, and leaving one puts that back.

    >>> draws = Draws()
    >>> with draws:
    ...     first = torch.rand(2)
    >>> with Draws():
    ...     bool((torch.rand(2) == first).all())
    True
    """

    def __init__(self) -> None:
        self._inside: tuple[Any, ...] | None = None

    def __enter__(self) -> Draws:
        self._outside = _state()
        if self._inside is not None:
            _restore(self._inside)
        return self

    def __exit__(self, *_: object) -> None:
        self._inside = _state()
        _restore(self._outside)


def _state() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy.random")
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.get_state(), gpus


def _restore(state: tuple[Any, ...]) -> None:
    cpu, python, numpy, gpus = state
    torch.set_rng_state(cpu)
    random.setstate(python)
    if numpy is not None:
        sys.modules["numpy.random"].set_state(numpy)
    if gpus is not None:
        torch.cuda.set_rng_state_all(gpus)
