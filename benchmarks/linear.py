"""LinearABLoss compared with the plain route, which stores the logits: `make bench-linear`, ten minutes and 20 GB of memory.

    python -m benchmarks.linear [--rows 8192] [--width 1024] [--classes 128000] [--rounds 3] [--chunk ROWS] [--out FILE.json]

A round runs the forward and backward pass of each route once, and each round begins with the other route. The program reports the
median times, and the largest additional memory in use, without the gradients themselves, as a fraction of the size of the logits.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import absgd_fast as ab

from .memory import peak_bytes
from .record import environment, write
from .timing import interleave_long, quartiles, ratios

MOST_MEMORY, MOST_TIME = 0.05, 1.1
PLAIN, OURS = "matmul + cross_entropy", "LinearABLoss"


def routes(hidden, weight, target, chunk):
    """{name: callable that returns the loss}. At λ = inf ours is the plain mean too, so the results can be compared.

    The work is the same for every λ.
    """
    robust, plain = (ab.LinearABLoss(lam=lam, chunk=chunk) for lam in (0.5, float("inf")))
    return {
        PLAIN: lambda: F.cross_entropy(hidden @ weight.t(), target),
        OURS: lambda: robust(hidden, weight, target),
        "ours, λ = inf": lambda: plain(hidden, weight, target),
    }


def measure(rows, width, classes, rounds, chunk=None, seed=0):
    """The measurements, as a dict ready for JSON."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=draw).requires_grad_()
    weight = (torch.randn(classes, width, generator=draw) / width**0.5).requires_grad_()
    target = torch.randint(classes, (rows,), generator=draw)
    leaves, logits = (hidden, weight), 4 * rows * classes
    of_gradients = sum(4 * leaf.numel() for leaf in leaves)
    made = routes(hidden, weight, target, chunk)

    def forget():
        for leaf in leaves:
            leaf.grad = None

    def run(name):
        forget()
        made[name]().backward()

    exact = None
    for name in (PLAIN, "ours, λ = inf"):  # which also warms up
        run(name)
        grads = [leaf.grad for leaf in leaves]
        error = 0.0 if exact is None else max(float((a - b).norm() / b.norm()) for a, b in zip(grads, exact))
        exact = exact or grads
    del exact, grads
    peaks = {PLAIN: [], OURS: []}

    def weighed(name):
        peaks[name].append(peak_bytes(partial(run, name)) - of_gradients)

    times = interleave_long({name: partial(weighed, name) for name in peaks}, rounds, forget)
    return {
        "rows": rows,
        "width": width,
        "classes": classes,
        "chunk": chunk,
        "rounds": rounds,
        "error": error,
        "seconds": {name: quartiles(values) for name, values in times.items()},
        "memory": {name: statistics.median(values) / logits for name, values in peaks.items()},
        "ratio": ratios(times[OURS], times[PLAIN]),
        "targets": {"memory": MOST_MEMORY, "ratio": MOST_TIME},
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear", description=__doc__.splitlines()[0])
    for name, default in (("rows", 8192), ("width", 1024), ("classes", 128000), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        report = environment()
        found = measure(arguments.rows, arguments.width, arguments.classes, arguments.rounds, arguments.chunk)
    finally:
        torch.set_num_threads(before)
    for name, seconds in found["seconds"].items():
        print(
            f"{name:24} {seconds['median']:8.2f} s   peak beyond the gradients: {100 * found['memory'][name]:.1f} % of the logits"
        )
    met = found["memory"][OURS] <= MOST_MEMORY and found["ratio"]["median"] <= MOST_TIME
    print(
        f"time of ours / theirs {found['ratio']['median']:.2f} (≤ {MOST_TIME:g}), memory ≤ {100 * MOST_MEMORY:g} %: "
        f"{'met' if met else 'missed'}; gradients differ by {found['error']:.0e}"
    )
    if arguments.out:
        write(report | {"linear": found}, arguments.out)
    return 0 if found["error"] < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
