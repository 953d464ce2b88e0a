"""L2RW's protocol for imbalance (Ren et al. 2018, Sec. 4.1 and Fig. 2) on digits' nines and fours: `make l2rw`.

    python -m benchmarks.imbalance [--ratios 1,5,10,20,50,100] [--seeds 10] [--out FILE.json]

The training set has 100 nines and 100 / ratio fours, the test set 80 of each. Ten training images, five of each class, are
L2RW's clean samples; every method trains on them too. All methods train the CNN for 120 epochs with a learning rate of 0.01. At
0.1 L2RW breaks down, because its few weights make large steps. The program prints the test error in percent, mean ± standard
deviation over the seeds.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from absgd_fast.experiments import data, train

from .record import environment, write

METHODS = ("sgd", "proportion", "resample", "hard-mining", "random", "l2rw")


def measure(ratio, seeds, source=None, **options):
    """({method: [test error of each seed, percent]}, the configuration)."""
    options = dict(imbalance="step", rho=ratio, clean=5, model="cnn", lr=0.01) | options
    config = train.Config(dataset="digits-9-4", methods=METHODS, seeds=seeds, **options)
    errors = {method: [] for method in METHODS}
    for run in train.runs(config, source):
        errors[run["method"]].append(100 - run["accuracy"])
    return errors, config


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imbalance", description=__doc__.splitlines()[0])
    parser.add_argument("--ratios", type=lambda text: [float(r) for r in text.split(",")], default=[1, 5, 10, 20, 50, 100])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    before, source, found = torch.get_num_threads(), data.load_source("digits-9-4"), []
    torch.set_num_threads(1)
    try:
        for ratio in track(arguments.ratios, "ratios", transient=True):
            errors, config = measure(ratio, arguments.seeds, source, epochs=arguments.epochs)
            found.append({"ratio": ratio, "errors": errors, "config": asdict(config)})
    finally:
        torch.set_num_threads(before)
    table = Table(
        "9 : 4", *METHODS, title=f"Test error, %, mean±standard deviation of {arguments.seeds} seeds", box=box.SIMPLE_HEAD
    )
    for row in found:
        cells = [f"{mean(e):.1f}" + (f"±{stdev(e):.1f}" if len(e) > 1 else "") for e in row["errors"].values()]
        table.add_row(f"{row['ratio']:g}", *cells)
    Console().print(table)
    if arguments.out:
        write(environment() | {"imbalance": found}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
