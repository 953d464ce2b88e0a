"""Whether memory stays flat over a long training: `make bench-endurance`, one to three minutes.

    python -m benchmarks.endurance [--steps 100000] [--readings 10] [--threads 1] [--out FILE.json]

A small network (64-128-10, batches of 64) is trained with ABLoss and ABSGD. The bytes in use in the C heap, which holds tensors
and graphs, are read at equal distances. The count is exact (memory.py). The first reading comes after a tenth of the steps, when
every cache has been filled. The exit code is 1 if a step leaves more than MOST bytes behind from then on.

The JSON has what record.py says of the machine, and: model, batch, steps, heap [[step, bytes in use]], bytes_per_step (from the
first reading to the last one), most, met, seconds.
"""

import argparse
import itertools
import sys
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

import absgd_fast as ab

from .memory import heap
from .record import environment, write

WIDTHS, BATCH, BATCHES = (64, 128, 10), 64, 8
MOST = 1.0  # bytes that a step may leave behind


def training():
    """A function that makes one step."""
    torch.manual_seed(0)
    inputs, hidden, classes = WIDTHS
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    criterion, optimizer = ab.ABLoss(lam=-5.0), ab.ABSGD(model.parameters(), lr=0.01, momentum=0.9)
    data = [(torch.randn(BATCH, inputs), torch.randint(classes, (BATCH,))) for _ in range(BATCHES)]
    batches = itertools.cycle(data)

    def step():
        x, y = next(batches)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return step


def measure(step, steps, readings):
    """[[step, bytes in use in the heap]] after each of `readings` equal parts of the steps."""
    found, part = [[0, 0] for _ in range(readings)], steps // readings  # the list is there before the first reading
    for k, reading in enumerate(found, 1):
        for _ in range(part):
            step()
        reading[:] = k * part, heap()
    return found


def bytes_per_step(found):
    """The growth from the first to the last reading, divided by the steps between them."""
    (first, before), (last, after) = found[0], found[-1]
    return (after - before) / (last - first)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--readings", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(argv)
    if not 2 <= given.readings <= given.steps:
        parser.error("there must be at least two readings, and a step before each")
    before, start = torch.get_num_threads(), perf_counter()
    torch.set_num_threads(given.threads)
    try:
        report = environment()
        found = measure(training(), given.steps, given.readings)
    except AttributeError:
        parser.error("the heap can be read only with glibc 2.33 or newer")
    finally:
        torch.set_num_threads(before)
    growth = bytes_per_step(found)
    report |= {"model": "-".join(map(str, WIDTHS)), "batch": BATCH, "steps": given.steps, "heap": found}
    report |= {"bytes_per_step": growth, "most": MOST, "met": growth <= MOST, "seconds": round(perf_counter() - start, 1)}
    for step, used in found:
        print(f"{step:8} steps  {used:12} bytes in use")
    print(f"{growth:.4f} bytes per step (≤ {MOST:g}): {'met' if report['met'] else 'missed'}")
    if given.out:
        write(report, given.out)
    return 0 if report["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
