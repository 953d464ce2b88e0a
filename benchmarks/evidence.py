"""Where ABSGD helps: recipes of `absgd-fast train` on data that anybody can install, made once, with their tables.

    python -m benchmarks.evidence [--parts digits-noise,...] [--processes 2] [--out DIR]
    python -m benchmarks.evidence --tables

Each cell of a part is one `absgd-fast train --recipe` in a process of its own, with one thread. Its results are in DIR/PART/CELL,
and the program goes on with what it finds there. The numbers of a complete part go to results/evidence-PART.json beside this
file, and `absgd-fast report DIR/PART` shows its plots. `--tables` trains nothing and prints the tables of all parts.

    digits-noise, digits-imbalance    the recipes as they are: 8 seeds, 1100 images, 120 epochs
    fashion-noise                     500 images of each class, 20 epochs: a CNN that memorises wrong labels
    fashion-noise-short               the same with 5 epochs: it does not
    fashion-imbalance                 1000 images of the largest class, 30 epochs
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from absgd_fast.experiments import merged, merged_report, recipes
from absgd_fast.experiments.checkpoint import write_whole

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Part:
    """A recipe, and the options that stand above it."""

    recipe: str
    options: tuple[str, ...] = ()


CNN = ("--channels-last", "--per-class")  # channels-last takes 0.6 to 0.7 of the time of the other format here
PARTS = {
    "digits-noise": Part("digits-noise"),
    "digits-imbalance": Part("digits-imbalance"),
    "fashion-noise": Part("fashion-noise", (*CNN, "500", "--epochs", "20")),
    "fashion-noise-short": Part("fashion-noise", (*CNN, "500", "--epochs", "5")),
    "fashion-imbalance": Part("fashion-imbalance", (*CNN, "1000", "--epochs", "30")),
}


def train(name: str, cell: str, out: Path, more: tuple[str, ...] = ()) -> int:
    """Trains one cell of a part, or goes on with it; returns the exit code. Its output goes to OUT/PART/CELL.log."""
    part, folder = PARTS[name], out / name
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "absgd_fast", "train", "--recipe", part.recipe, "--cell", cell, "--threads", "1"]
    command += [*part.options, *more, "--out", str(folder)]
    began = time.monotonic()
    with open(folder / f"{cell}.log", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)
    print(f"{name}, {cell}: exit code {done.returncode} after {time.monotonic() - began:.0f} s", flush=True)
    return done.returncode


def file_of(name: str) -> Path:
    """The file of a part's numbers."""
    return RESULTS / f"evidence-{name}.json"


def collect(name: str, out: Path, into: Path) -> None:
    """Writes the numbers of a part whose cells are all complete."""
    cells, twice = merged.merge(merged.find([out / name]))
    text = json.dumps(merged.numbers(cells, twice), indent=1, allow_nan=False) + "\n"
    write_whole(into, text.encode())
    print(f"written: {into}", flush=True)


def tables(names: list[str]) -> str:
    """The tables of the parts whose numbers are there, as Markdown."""
    found = [(name, file_of(name)) for name in names if file_of(name).is_file()]
    return "\n".join(f"<!-- {name} -->\n{merged_report.markdown(json.loads(file.read_text()))}" for name, file in found)


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
        print(tables(names))
        return 0
    work = [(name, cell) for name in names for cell in recipes.load(PARTS[name].recipe).cells]
    with ThreadPoolExecutor(given.processes) as pool:
        codes = list(pool.map(lambda one: train(*one, given.out), work))
    for name in names:
        if not any(code for (part, _), code in zip(work, codes) if part == name):
            collect(name, given.out, file_of(name))
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
