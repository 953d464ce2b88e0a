"""`absgd-fast doctor`: which backends run here, and why the others do not. --selftest: whether they compute the right numbers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .common import Refused

if TYPE_CHECKING:
    from absgd_fast.selftest import Outcome

    from .common import Subparsers


def add_parser(commands: Subparsers) -> None:
    """Adds the command to the program's parser."""
    doctor = commands.add_parser("doctor", help="show which backends run here, and why the others do not", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument(
        "--selftest",
        action="store_true",
        help="run every backend against stored exact results (seconds on a CPU)",
    )
    doctor.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints what was found, as a tree or as JSON. Returns 1 if the self-test found a wrong number."""
    from absgd_fast import _backend

    try:
        found = _backend.report()
    except ValueError as error:  # of an environment variable
        raise Refused(error) from None
    # Without rich it prints JSON too, because this command must also run on a broken installation.
    as_json = arguments.json or importlib.util.find_spec("rich") is None
    if not arguments.selftest:
        _show_json(found) if as_json else _show_tree(found)
        return 0
    from absgd_fast import selftest

    if as_json:
        outcomes = list(selftest.run())
        _show_json(found | {"selftest": [asdict(outcome) for outcome in outcomes]})
    else:
        _show_tree(found)
        outcomes = _show_outcomes(selftest.run())
    failures = [sentence for o in outcomes for sentence in o.sentences()]
    for failure in failures:
        print(failure, file=sys.stderr)
    checks = sum(o.checks for o in outcomes)
    verdict = f"{len(failures)} of {checks} checks failed." if failures else f"All {checks} checks passed."
    print(verdict, file=sys.stderr if as_json else sys.stdout)
    return 1 if failures else 0


def _show_json(found: Mapping[str, Any]) -> None:
    print(json.dumps(found, indent=1, default=str))


def _show_tree(found: Mapping[str, Any]) -> None:
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


def _show_outcomes(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Prints a line for each outcome when it comes, and returns them all."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table

    columns = ("backend", "dtype", "checks", "failed", "worst deviation", "seconds")
    table = Table(*columns, title="Self-test", caption="The worst deviation is a share of what rounding may do.")
    done: list[Outcome] = []
    with Live(table, console=Console()):
        for o in outcomes:
            done.append(o)
            if o.not_run:
                continue
            failed = f"[red]{len(o.failures)}[/]" if o.failures else "0"
            table.add_row(o.where, o.dtype, str(o.checks), failed, f"{o.worst:.0%}", f"{o.seconds:.1f}")
    for o in done:
        if o.not_run:
            print(f"not run: {o.where}{o.dtype and ', '}{o.dtype}: {o.not_run}")
    return done
