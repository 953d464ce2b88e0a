"""The global random generators: their state, and trainings that take turns, each of which has generators of its own."""

from __future__ import annotations

import importlib
import random
import sys
from typing import Any

import torch


def random_state() -> dict[str, Any]:
    """The state of the global generators of torch (CPU, and GPUs in use), Python, and numpy (in use), as a part of a checkpoint.

    `torch.load` reads it with weights_only=True.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy.random" in sys.modules:
        name, keys, *others = sys.modules["numpy.random"].get_state()
        state["numpy"] = (name, keys.tolist(), *others)
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restores a state that random_state() returned. GPUs are left alone if there are fewer or more of them now.

    >>> state = random_state()
    >>> first = torch.rand(1)
    >>> restore_random_state(state)
    >>> torch.equal(first, torch.rand(1))
    True
    """
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if "numpy" in state:
        importlib.import_module("numpy.random").set_state(state["numpy"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class Draws:
    """A context in which the global generators go on where they stood at the end of the last one.

    The first context begins where they stand outside, and leaving one puts that back.

    >>> draws = Draws()
    >>> with draws:
    ...     first = torch.rand(2)
    >>> with Draws():
    ...     bool((torch.rand(2) == first).all())
    True
    """

    def __init__(self) -> None:
        self._inside: dict[str, Any] | None = None

    def __enter__(self) -> Draws:
        self._outside = random_state()
        if self._inside is not None:
            restore_random_state(self._inside)
        return self

    def __exit__(self, *_: object) -> None:
        self._inside = random_state()
        restore_random_state(self._outside)
