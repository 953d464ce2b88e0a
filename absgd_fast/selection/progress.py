"""The progress bar of select."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar


def bar(console: Console, width: int) -> Bar:
    """A bar of rich that counts epochs: what is trained in `width` letters, the epochs, the time so far, and the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    done = TextColumn(f"{{task.description:<{width}}}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("epochs")
    return Bar(*done, TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(), console=console, transient=True)


class Progress:
    """Counts epochs: in a bar of rich on a terminal, by a function of the user, or not at all.

    Args:
        wanted: True: a bar, if rich is installed and stderr is a terminal. False: nothing. A function: it is called as
            wanted(name, epoch, score) after each epoch.
        total: the largest number of epochs that may come.
    """

    def __init__(self, wanted: bool | Callable[[str, int, float], object], total: int) -> None:
        self._call = wanted if callable(wanted) else None
        self._bar: Any = None
        self._total = total
        if wanted is True and importlib.util.find_spec("rich") is not None and sys.stderr.isatty():
            from rich.console import Console

            self._bar = bar(Console(stderr=True), 16)
            self._task = self._bar.add_task("starting", total=total)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def epoch(self, name: str, epoch: int, score: float) -> None:
        """One epoch of a candidate is done."""
        if self._call is not None:
            self._call(name, epoch, score)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=name)

    def skipped(self, epochs: int) -> None:
        """So many epochs will not be trained: a candidate was stopped or failed, or they are known from the disk."""
        self._total -= epochs
        if self._bar is not None:
            self._bar.update(self._task, total=self._total)
