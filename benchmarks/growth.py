"""How the cost grows with the size: `make bench-growth`, about two minutes.

    python -m benchmarks.growth [--seconds 10] [--threads 1 2] [--out benchmarks/results/growth.json] [--plot docs/growth.png]

Four sweeps in steps of 2, each with every number of threads. ABLoss, forward and backward, over the rows B of its logits and over
the classes C; ABSGD.step over the number of small tensors, and over the number of parameters in as many tensors. The sizes of a
sweep take turns (timing.py), so a change of the machine's load moves all of them.

The JSON has what record.py says of the machine, quiet (quiet.py), caches {name: bytes of one core's, or of the shared one}, and:

    sweeps      one object per sweep and number of threads: sweep, fixed, threads, rounds
                bytes_of_one   the bytes that a call touches, divided by the size; null where the numbers are few
                sizes, us      of each point; us are quartiles over the rounds
                slope, error   of log time over log size in the upper half of the sweep, by least squares, and its standard error
                local          the slopes of five neighbouring points (growth_fit.py)
                knees          where the local slope is away from 1 by more than two standard errors: size; side (-1: up to here
                               the time grows more slowly than the size; 1: from here on it grows faster); place among the caches
"""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path

import torch

import absgd_fast as ab

from . import growth_fit, quiet
from .gpu_report import table
from .growth_plot import picture
from .record import environment, write
from .timing import interleave, quartiles

ROOT = Path(__file__).parent
ROWS, CLASSES, TENSORS, SMALL = 128, 1000, 64, 4  # what is fixed while something else grows


@dataclass(frozen=True)
class Sweep:
    """What grows, and a function from a size to the call that is timed.

    Args:
        name, fixed: what grows, and what does not.
        make: size -> callable.
        exponents: the sizes are 2 to the power of these.
        bytes_of_one: bytes that a call touches, divided by the size. None where Python's work outweighs the numbers'.
    """

    name: str
    fixed: str
    make: object
    exponents: range
    bytes_of_one: int | None


def loss(rows, classes):
    """A forward and backward pass of ABLoss on logits (rows, classes)."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, classes, generator=draw).requires_grad_()
    y, criterion = torch.randint(classes, (rows,), generator=draw), ab.ABLoss(lam=-1.0)

    def run():
        x.grad = None
        criterion(x, y).backward()

    return run


def step(tensors, numbers):
    """A step of ABSGD with momentum on so many tensors of so many numbers."""
    params = [torch.nn.Parameter(torch.randn(numbers)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn(numbers)
    return ab.ABSGD(params, lr=1e-3, momentum=0.9).step


# A loss touches logits and gradient; a step parameter, gradient and momentum. All are float32.
SWEEPS = [
    Sweep("ABLoss over rows B", f"C = {CLASSES}", lambda rows: loss(rows, CLASSES), range(2, 16), 8 * CLASSES),
    Sweep("ABLoss over classes C", f"B = {ROWS}", lambda classes: loss(ROWS, classes), range(3, 19), 8 * ROWS),
    Sweep("ABSGD.step over tensors", f"{SMALL} numbers each", lambda n: step(n, SMALL), range(13), None),
    Sweep("ABSGD.step over parameters", f"{TENSORS} tensors", lambda n: step(TENSORS, n // TENSORS), range(9, 26), 12),
]


def measure(sweep, threads, seconds, caches):
    """One sweep with so many threads, as a dict ready for JSON. torch's number of threads stays as it was."""
    before, sizes = torch.get_num_threads(), [2**k for k in sweep.exponents]
    torch.set_num_threads(threads)
    try:
        times = interleave({size: sweep.make(size) for size in sizes}, seconds)
    finally:
        torch.set_num_threads(before)
    us = [quartiles(times[size]) for size in sizes]
    rounds = len(times[sizes[0]])
    return {
        "sweep": sweep.name,
        "fixed": sweep.fixed,
        "threads": threads,
        "rounds": rounds,
        "bytes_of_one": sweep.bytes_of_one,
        "sizes": sizes,
        "us": us,
    } | judge(sizes, us, rounds, sweep.bytes_of_one, caches)


def judge(sizes, us, rounds, bytes_of_one, caches):
    """{slope, error, local, knees} of the quartiles of the times."""
    medians = [found["median"] for found in us]
    # Of a normal distribution, the interquartile range is 1.35 standard deviations, and a median's error is 1.25 of a mean's.
    errors = [1.25 * (found["q3"] - found["q1"]) / 1.35 / sqrt(rounds) / found["median"] for found in us]
    slope, error = growth_fit.slope(growth_fit.upper(sizes), growth_fit.upper(medians))
    local = growth_fit.local_slopes(sizes, medians, errors)
    knees = growth_fit.knees(local)
    for knee in knees:
        knee["place"] = growth_fit.place(knee["size"], bytes_of_one, caches) if bytes_of_one else None
    return {"slope": slope, "error": error, "local": local, "knees": knees}


def words(knees):
    """What the knees say."""
    said = []
    for knee in knees:
        how = "slower than the size up to" if knee["side"] < 0 else "faster from"
        said.append(f"{how} {knee['size']:,}" + (f" ({knee['place']})" if knee["place"] else ""))
    return ", ".join(said) or "in proportion"


def lines(sweeps):
    """The table that is printed."""
    head = ["sweep", "fixed", "threads", "sizes", "µs at the largest", "slope of the upper half", "growth"]
    rows = [
        [
            found["sweep"],
            found["fixed"],
            str(found["threads"]),
            f"{found['sizes'][0]} to {found['sizes'][-1]}",
            f"{found['us'][-1]['median']:.4g}",
            f"{found['slope']:.3f} ± {found['error']:.3f}",
            words(found["knees"]),
        ]
        for found in sweeps
    ]
    return table([head, *rows])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each sweep with each number of threads (default: 10)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "growth.json")
    parser.add_argument("--plot", type=Path, default=ROOT.parent / "docs" / "growth.png")
    given = parser.parse_args(argv)
    caches, one = growth_fit.caches(), partial(measure, seconds=given.seconds)
    report = environment() | {"quiet": quiet.look(), "caches": caches}
    report["threads"] = given.threads
    print(quiet.sentence(report["quiet"]))
    report["sweeps"] = [one(sweep, threads, caches=caches) for sweep in SWEEPS for threads in given.threads]
    print("\n".join(lines(report["sweeps"])))
    write(report, given.out)
    picture(report).savefig(given.plot, dpi=140, metadata={"Software": None})
    print(f"written: {given.out} and {given.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
