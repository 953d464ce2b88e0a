"""`absgd-fast bench`: times the kernels against their competitors. benchmarks/run.py does it and parses its options."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .common import Refused

if TYPE_CHECKING:
    from .common import Subparsers


def add_parser(commands: Subparsers) -> None:
    """Adds the command to the program's --help. Its arguments never reach this parser."""
    commands.add_parser("bench", help="time the kernels against their competitors (needs a source checkout)")


def run(argv: Sequence[str]) -> int:
    """Hands the arguments after `bench` over to the benchmarks."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "run.py").is_file():
        raise Refused("the installed package has no benchmarks; in a source checkout run: python -m absgd_fast bench")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.run").main(argv)
