"""The streams of random numbers of a seed. Each kind of choice has one, so another kind of noise does not change the split."""

from __future__ import annotations

import hashlib
from operator import index

import torch

SPLIT, NOISE, INIT, ORDER, METHOD, MIXUP = range(6)


def generator(seed: int, stream: int) -> torch.Generator:
    """The random generator (CPU) of a seed for one `stream`: SPLIT, NOISE, INIT, ORDER, METHOD or MIXUP."""
    return torch.Generator("cpu").manual_seed(1_000_003 * index(seed) + stream)


def number(*parts: int) -> int:
    """A seed in [0, 2^63) that is a pure function of some integers, for the choices that no earlier choice may move.

    Other integers, or the same ones in another order, give an unrelated seed.

    Example:
        >>> number(0, 1, 2) == number(0, 1, 2), number(0, 1, 2) == number(0, 2, 1)
        (True, False)
    """
    text = " ".join(str(index(part)) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
