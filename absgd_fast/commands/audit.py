"""`absgd-fast audit`: shows the training samples that look mislabelled, of `train --audit` or of a user's own training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .common import PROGRAM, Refused, check_writable, plain_console, require

if TYPE_CHECKING:
    from .common import Subparsers

FILE, FOLDER, FIRST = "audit.pt", "audit", "sgd-0"  # FIRST: plain SGD shows wrong labels of every kind of noise


def add_parser(commands: Subparsers) -> None:
    """Adds the command to the program's parser."""
    audit = commands.add_parser("audit", help="show the training samples that look mislabelled", allow_abbrev=False)
    audit.add_argument("folder", metavar="DIR", help=f"folder of `train --audit`, or of your own {FILE} (docs/audit.md)")
    audit.add_argument(
        "--run", metavar="METHOD-SEED", dest="run_name", help=f"which run of `train --audit` (default: {FIRST}, else the first)"
    )
    audit.add_argument("--by", choices=("loss", "weight"), default="loss", help="what samples are ranked by (default: loss)")
    audit.add_argument("--top", type=int, default=40, help="samples in the table and on the contact sheet (default: 40)")
    audit.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Prints the table, and writes DIR/audit.csv, audit.png and audit.html."""
    folder, by, top = Path(arguments.folder), arguments.by, arguments.top
    require("audit", ["rich", "jinja2", "matplotlib"])
    from absgd_fast.experiments import audit, audit_report

    try:
        if top < 1:
            raise ValueError(f"top: got {top}, expected at least 1")
        file, others = _find(folder, arguments.run_name)
        findings = audit.load(file)
        if by == "weight" and not findings.weighed:
            raise ValueError(f"by: all samples of {file.stem} have the same weight; give --by loss, or another --run")
        check_writable(folder)
    except (ValueError, OSError) as error:
        raise Refused(error) from error
    console = plain_console()
    console.print(audit_report.table(findings, by, top))
    paths = audit_report.write(findings, folder, by, top)
    if findings.images is None:
        console.print(f"{file} has no images, so there is no contact sheet", soft_wrap=True)
    if others:
        console.print(f"this was {file.stem}; --run shows {', '.join(others)}")
    console.print("written: " + ", ".join(map(str, paths)), soft_wrap=True)
    return 0


def _find(folder: Path, name: str | None) -> tuple[Path, list[str]]:
    """The file to read, and the names of the other runs. Raises ValueError if it is not there."""
    runs = {path.stem: path for path in sorted((folder / FOLDER).glob("*.pt"))}
    if name is None and (folder / FILE).is_file():
        return folder / FILE, list(runs)
    if name is None and not runs:
        raise ValueError(
            f"{folder} has no {FILE} and no {FOLDER}/*.pt; make them with `{PROGRAM} train --audit --out {folder}`, or write "
            f"{FILE} as docs/audit.md says"
        )
    name = name or (FIRST if FIRST in runs else next(iter(runs)))
    if name not in runs:
        raise ValueError(
            f"run: got {name!r}, expected one of {', '.join(runs)}" if runs else f"run: {folder / FOLDER} has no runs"
        )
    return runs[name], [other for other in runs if other != name]
