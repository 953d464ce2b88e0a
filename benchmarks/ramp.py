"""Constant lambda, two stages and a ramp, each to the same lambda, on digits with and without wrong labels.

    python -m benchmarks.ramp [--noise 0,0.4] [--lam=-1,-0.5] [--epochs 120,40] [--model mlp] [--seeds 8] [--out FILE.json]

Two stages train 30 % of the epochs with the plain mean. A ramp moves 1/lambda evenly during these epochs. All methods have the
same splits, initial weights and order of batches. The program prints the test accuracy in percent: mean ± standard deviation over
the seeds, and the worst and the best single run.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from absgd_fast.experiments import data, train

from .record import environment, write

WAYS = {"constant": ("absgd", 0.0), "two stages": ("absgd", 0.3), "ramp": ("ramp", 0.3)}  # the method, and its warmup


def settings(lams, **options):
    """[(way, lambda or None, the configuration)]: plain SGD, then each way to each lambda."""
    made = [("sgd", None, train.Config(methods=("sgd",), **options))]
    for lam in lams:
        for way, (method, warmup) in WAYS.items():
            made.append((way, lam, train.Config(methods=(method,), lam=lam, warmup=warmup, **options)))
    return made


def shown(accuracies):
    """The mean, the standard deviation, the smallest and the largest."""
    spread = f" ± {stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
    return f"{mean(accuracies):.1f}{spread} [{min(accuracies):.1f}, {max(accuracies):.1f}]"


def table(found, seeds):
    """A row for each way and lambda, a column for each number of epochs and noise rate."""
    columns = list(dict.fromkeys((row["config"]["epochs"], row["config"]["noise_rate"]) for row in found))
    out = Table(title=f"Test accuracy, %, mean ± standard deviation [min, max] of {seeds} seeds", box=box.SIMPLE_HEAD)
    for name in ("way", "λ", *(f"{epochs} epochs, {rate:g} wrong" for epochs, rate in columns)):
        out.add_column(name)
    for way, lam in dict.fromkeys((row["way"], row["lam"]) for row in found):
        rows = {(r["config"]["epochs"], r["config"]["noise_rate"]): r for r in found if (r["way"], r["lam"]) == (way, lam)}
        out.add_row(way, "" if lam is None else f"{lam:g}", *(shown(rows[column]["accuracies"]) for column in columns))
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ramp", description=__doc__.splitlines()[0])
    numbers = lambda text: [float(r) for r in text.split(",")]  # noqa: E731
    parser.add_argument("--noise", type=numbers, default=[0.0, 0.4])
    parser.add_argument("--lam", type=numbers, default=[-1.0, -0.5])
    parser.add_argument("--epochs", type=lambda text: [int(e) for e in text.split(",")], default=[120, 40])
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    cells = [
        cell
        for epochs in given.epochs
        for rate in given.noise
        for cell in settings(
            given.lam,
            model=given.model,
            noise="symmetric" if rate else "none",
            noise_rate=rate,
            seeds=given.seeds,
            epochs=epochs,
        )
    ]
    before, source, found = torch.get_num_threads(), data.load_source("digits"), []
    torch.set_num_threads(1)
    try:
        with Progress(transient=True) as progress:
            bar = progress.add_task("trainings", total=len(cells) * given.seeds)
            for way, lam, config in cells:
                accuracies = []
                for run in train.runs(config, source):
                    accuracies.append(run["accuracy"])
                    progress.advance(bar)
                found.append({"way": way, "lam": lam, "accuracies": accuracies, "config": asdict(config)})
                if given.out:  # so that a run that is cut short leaves what it has
                    write(environment() | {"ramp": found}, given.out)
    finally:
        torch.set_num_threads(before)
    Console(width=200).print(table(found, given.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
