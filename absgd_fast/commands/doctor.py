"""`absgd-fast doctor`: which backends run here, and why the others do not."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .common import Subparsers


def add_parser(commands: Subparsers) -> None:
    """Adds the command to the program's parser."""
    doctor = commands.add_parser("doctor", help="show which backends run here, and why the others do not", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints what was found, as a tree or as JSON."""
    from absgd_fast import _backend

    found = _backend.report()
    # Without rich it prints JSON too, because this command must also run on a broken installation.
    if arguments.json or importlib.util.find_spec("rich") is None:
        print(json.dumps(found, indent=1, default=str))
        return 0
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    def shown(value: object) -> Text:
        if isinstance(value, bool):
            return Text("yes", "green") if value else Text("no", "red")
        if isinstance(value, (list, tuple)):
            return Text(", ".join(map(str, value)) or "none")
        return Text("none" if value is None else str(value), "cyan")

    def grow(branch: Tree, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                grow(branch.add(Text(str(name), "bold")), value)
            else:
                branch.add(Text(f"{name}: ") + shown(value))

    tree = Tree(Text("absgd_fast", "bold"))
    grow(tree, found)
    Console().print(tree)
    return 0
