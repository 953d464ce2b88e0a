"""Where ABSGD helps: recipes of `absgd-fast train` on data that anybody can install, made once, with their tables.

    python -m benchmarks.evidence [--parts digits-noise,...] [--processes 2] [--out DIR]
    python -m benchmarks.evidence --tables

Each cell of a part is one `absgd-fast train --recipe` in a process of its own, with one thread. Its results are in DIR/PART/CELL,
and the program goes on with what it finds there. The numbers of a complete part go to results/evidence-PART.json beside this
file, its plot for the page to docs/, and `absgd-fast report DIR/PART` shows all its plots. `--tables` trains nothing and
prints the tables of docs/evidence.md.

    digits-noise, digits-imbalance    the recipes as they are: 8 seeds, 1100 images of one size
    digits-lambda, -gamma, -l2rw      the same for the ablations, and for L2RW's experiments
    fashion-noise                     250 images of each class, 30 epochs: a CNN that memorises wrong labels
    fashion-noise-short               the same with 6 epochs, in which it memorises few; only SGD and ABSGD
    fashion-imbalance                 600 images of the largest class, 20 epochs
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from absgd_fast.experiments import merged, merged_report, recipes
from absgd_fast.experiments.checkpoint import write_whole
from absgd_fast.experiments.merged_plots import PLOTS, Lines, lines, series, weighing
from absgd_fast.experiments.plots import Plot
from absgd_fast.experiments.svg import LOOK
from absgd_fast.experiments.words import plus_minus

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs"
FITTED = Lines(
    "What is left to weigh",
    "The training labels that the network predicts, and ESS/n of the batches.",
    [("", "% of training labels", series("train_accuracy")), ("", "ESS/n", weighing("ess"))],
    shared=False,
)


@dataclass(frozen=True)
class Picture:
    """A plot of the page, of one cell and its methods on cross-entropy.

    Attributes:
        file: its name in docs/.
        cell: of the recipe.
        draw: makes it, as those of merged_plots.PLOTS.
    """

    file: str
    cell: str
    draw: Callable[[merged.Cell, Sequence[str]], Plot | None]

    def write(self, cells: Sequence[merged.Cell]) -> None:
        """Draws it of the cells of a part."""
        cell = next(cell for cell in cells if cell.recipe["cell"] == self.cell)
        shown = {name: runs for name, runs in cell.runs_of.items() if merged.loss_of(name) == "ce"}
        with rc_context(LOOK):
            plot = self.draw(replace(cell, runs_of=shown), list(cell.runs_of))
            assert plot is not None, f"{cell.title} has no data for {self.file}"
            plot[2].savefig(PICTURES / self.file, dpi=140, metadata={"Software": None})
        print(f"written: {PICTURES / self.file}", flush=True)


@dataclass(frozen=True)
class Part:
    """A recipe, and the options that stand above it.

    Attributes:
        recipe: its name or path.
        options: of `absgd-fast train`.
        picture: the plot of the page.
        short: whether the page has the results alone, without differences and memorised labels.
    """

    recipe: str
    options: tuple[str, ...] = ()
    picture: Picture | None = None
    short: bool = False

    @property
    def cells(self) -> dict[str, recipes.Cell]:
        """The cells that are trained, by name."""
        return recipes.load(self.recipe).cells


# channels-last takes 0.6 to 0.7 of the time of the other format here; testing on all 10,000 images after each epoch would take as
# long as the training
CNN = ("--channels-last", "--test-images", "1000", "--per-class")
FEW = "sgd,absgd@lam=-1,sgd:sce,absgd:sce@lam=-4,sgd:gce,absgd:gce@lam=-0.6"
MEMORISATION = PLOTS["Memorisation of wrong labels"]
PARTS = {
    "digits-noise": Part("digits-noise"),
    "digits-imbalance": Part("digits-imbalance", (), Picture("fitted.png", "lt-100", partial(lines, FITTED))),
    **{name: Part(name, short=True) for name in ("digits-lambda", "digits-gamma", "digits-l2rw")},
    "fashion-noise": Part(
        "fashion-noise", (*CNN, "250", "--epochs", "30"), Picture("memorised.png", "symmetric-0.4", MEMORISATION)
    ),
    "fashion-noise-short": Part(
        "fashion-noise",
        (*CNN, "250", "--epochs", "6", "--methods", FEW),
        Picture("memorised-short.png", "symmetric-0.4", MEMORISATION),
    ),
    "fashion-imbalance": Part("fashion-imbalance", (*CNN, "600", "--epochs", "20")),
}


def train(name: str, cell: str, out: Path) -> int:
    """Trains one cell of a part, or goes on with it; returns the exit code. Its output goes to OUT/PART/CELL.log."""
    part, folder = PARTS[name], out / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "absgd_fast", "train", "--recipe", part.recipe, "--cell", cell, "--threads", "1"]
    command += [*part.options, "--out", str(folder)]
    began = time.monotonic()
    with open(folder / f"{cell}.log", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    print(f"{name}, {cell}: exit code {done.returncode} after {time.monotonic() - began:.0f} s", flush=True)
    return done.returncode


def file_of(name: str) -> Path:
    """The file of a part's numbers."""
    return RESULTS / f"evidence-{name}.json"


def collect(name: str, out: Path) -> None:
    """Writes the numbers of a part whose cells are all complete, and its picture."""
    cells, twice = merged.merge(merged.find([out / name]))
    found = merged.numbers(cells, twice)
    of_recipe = PARTS[name].cells
    for cell, made in zip(found["cells"], cells):
        cell["folders"] = [Path(folder).relative_to(out).as_posix() for folder in cell["folders"]]  # no path of this machine
        order = list(of_recipe[made.recipe["cell"]].methods)
        cell["methods"].sort(key=lambda method: order.index(method["row"]))
    write_whole(file_of(name), (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    print(f"written: {file_of(name)}", flush=True)
    if picture := PARTS[name].picture:
        picture.write(cells)


# ------------------------------------------------------------------------------------------------ tables


def read(name: str) -> dict[str, Any]:
    """The numbers of a part."""
    found: dict[str, Any] = json.loads(file_of(name).read_text())
    return found


def differences(results: dict[str, Any]) -> str:
    """What ABSGD adds to SGD on the same loss, in points, as a Markdown table."""
    return _table(results, "to_baseline", lambda entry: plus_minus(entry, "stderr", 1, signed=True))


def memorised(results: dict[str, Any]) -> str:
    """The share of wrong labels that the network predicts at the end, in percent, as a Markdown table."""
    return _table(results, "flipped_as_given", lambda entry: f"{entry['mean']:.0f}")


def _table(results: dict[str, Any], key: str, text: Any) -> str:
    """A row for each method, and a column for each cell, of those that have such an entry."""
    cells = [cell for cell in results["cells"] if any(_known(method[key]) for method in cell["methods"])]
    lines = [["method", *(cell["title"] for cell in cells)], ["---", *["---:"] * len(cells)]]
    for row, methods in merged_report.matrix(cells):
        entries = [method[key] if method else None for method in methods]
        if any(map(_known, entries)):
            lines.append([row, *(text(entry) if _known(entry) else merged_report.NOTHING for entry in entries)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _known(entry: dict[str, Any] | None) -> bool:
    return entry is not None and entry["mean"] is not None


def tables(name: str) -> list[str]:
    """The tables of a part that the page shows: results, differences and, where labels are wrong, memorised labels."""
    results = read(name)
    body = [line for line in merged_report.markdown(results).splitlines() if line.startswith("|")]
    if PARTS[name].short:
        return ["\n".join(body)]
    found = ["\n".join(body), differences(results)]
    wrong = any(_known(method["flipped_as_given"]) for cell in results["cells"] for method in cell["methods"])
    return found + [memorised(results)] * wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, with commas")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("evidence"))
    parser.add_argument("--tables", action="store_true")
    given = parser.parse_args(argv)
    names = given.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}; use some of {','.join(PARTS)}")
    if given.tables:
        for name in (name for name in names if file_of(name).is_file()):
            print(f"<!-- {name} -->\n" + "\n\n".join(tables(name)) + "\n")
        return 0
    work = [(name, cell) for name in names for cell in PARTS[name].cells]
    with ThreadPoolExecutor(given.processes) as pool:
        codes = list(pool.map(lambda one: train(*one, given.out), work))
    for name in names:
        if not any(code for (part, _), code in zip(work, codes) if part == name):
            collect(name, given.out)
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
