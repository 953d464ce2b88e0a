"""Hooks of torch's classes that stand aside while a method of torch runs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def aside(owner: object, *names: str) -> Iterator[None]:
    """Without the hooks that `owner` keeps under these names. Whoever puts them aside calls them at the right moment."""
    kept = {name: getattr(owner, name) for name in names}
    for name in names:
        setattr(owner, name, OrderedDict())
    try:
        yield
    finally:
        for name, hooks in kept.items():
            setattr(owner, name, hooks)
