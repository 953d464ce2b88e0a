"""What the commands share: the parser, how an argument is refused, and checks before the work begins.

A file of this package has one command: `add_parser(commands)` adds its parser, whose default `run` is the function that runs it,
run(arguments, argv) → exit code. argv are the words after the program's name.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

    Subparsers = argparse._SubParsersAction["Parser"]

PROGRAM = "absgd-fast"


class Refused(Exception):
    """The arguments cannot be followed. The user gets the text in one line, and the exit code is 2."""


class Parser(argparse.ArgumentParser):
    """A parser that raises Refused for bad arguments."""

    def error(self, message: str) -> NoReturn:
        """Raises Refused. argparse itself would first print many lines of usage."""
        raise Refused(f"{message} (see {self.prog} --help)")


def fail(code: int, message: object) -> int:
    """Prints the message in one line on stderr, and returns the exit code."""
    print(f"{PROGRAM}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def plain_console() -> Console:
    """A console of rich that prints every text as it is. In names and paths, [red] and :cat: are no markup."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:  # rich takes 80 columns there, which would cut the numbers of a long table off
        console.width = max(console.width, 130)
    return console


def require(command: str, modules: Sequence[str]) -> None:
    """Raises Refused if a command lacks packages, with the way to install them."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise Refused(f'{command} needs {", ".join(missing)}: pip install "absgd_fast[experiments]"')


def check_writable(out: Path) -> None:
    """Raises ValueError if the folder for the results cannot be written to.

    This is checked before an hour of training. The folder itself is created when there is something to write.
    """
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"out: {existing} is a file; give a folder, new or existing")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"out: {existing} cannot be written to; give another folder")
