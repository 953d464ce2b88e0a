"""`absgd-fast report`: one page, one table and one file of numbers of many trainings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .common import Refused, check_writable, plain_console, require

if TYPE_CHECKING:
    from .common import Subparsers

OUT = "absgd-report"


def add_parser(commands: Subparsers) -> None:
    """Adds the command to the program's parser."""
    report = commands.add_parser("report", help="merge the results of several trainings into one report", allow_abbrev=False)
    report.add_argument(
        "folders",
        metavar="DIR",
        nargs="+",
        help="folder of `absgd-fast train`, or one with several of them; each results.json in it is read",
    )
    report.add_argument(
        "--out", metavar="DIR", default=OUT, help=f"folder for report.html, report.md and report.json (default: {OUT})"
    )
    report.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Writes the merged report."""
    return write(arguments.folders, Path(arguments.out))


def write(folders: Sequence[str | Path], out: Path) -> int:
    """Reads the results in these folders, writes the merged report into `out`, and prints its tables.

    Returns:
        The exit code.

    Raises:
        Refused: a folder without results, or with results that cannot be merged. Nothing is written then.
    """
    require("report", ["rich", "jinja2", "matplotlib"])
    from absgd_fast.experiments import merged, merged_report

    try:
        cells, twice = merged.merge(merged.find(folders))
        check_writable(out)
    except (ValueError, OSError) as error:
        raise Refused(error) from error
    results = merged.numbers(cells, twice)
    console = plain_console()
    for table in merged_report.tables(results):
        console.print(table)
    paths = merged_report.write(cells, results, out)
    console.print("written: " + ", ".join(map(str, paths)), soft_wrap=True)
    return 0
