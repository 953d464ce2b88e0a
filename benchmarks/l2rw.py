"""The cost of a step of L2RW compared with a plain step: `make bench-l2rw`, ten minutes.

    python -m benchmarks.l2rw [--batch 128] [--rounds 15] [--out FILE.json]

A step is l2rw_loss, backward, and the optimizer's step. The clean batch is an eighth of the training batch. A plain step has
the mean loss instead. The model is a ResNet of 14 layers for 32 x 32 images, with BatchNorm and without. Each round runs every
step once, and each round begins with another one. "jvp apart" is "jvp" for models whose tangents cannot be taken beside the
training forward, so that they have a pass of their own. The program reports for each method:

- the ratio of its time to that of the plain step in the same round,
- the largest additional memory in use during a step, as a multiple of the plain step's,
- the distance of the weights from those of the definition in float64.
"""

import argparse
import copy
import statistics
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import absgd_fast as ab
from absgd_fast.experiments.models import resnet

from .memory import peak_bytes
from .record import environment, write
from .timing import interleave_long, quartiles, ratios

PLAIN, APART = "plain", "jvp apart"
# The largest allowed time in plain steps, (without, with) BatchNorm, and the largest allowed memory in that of plain steps.
TIME = {"jvp": (2.2, 2.2), APART: (2.3, 2.8), "finite_difference": (2.0, 2.0), "last_layer": (1.3, 1.3)}
MEMORY = 2.0
WAYS = ("jvp", APART, *ab.meta.METHODS[1:])


def model_of(normed, seed=0):
    torch.manual_seed(seed)
    model = resnet(3, 10, blocks_per_stage=2)
    if not normed:
        for m in list(model.modules()):
            for name, child in list(m.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(m, name, nn.Identity())
    return model


def data_of(batch, seed=1):
    """Images of ten kinds. 40 % of the training labels are wrong, so the weights are neither all equal nor mostly 0."""
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randn(10, 3, 32, 32, generator=draw)
    out = []
    for rows in (batch, batch // 8):
        y = torch.randint(10, (rows,), generator=draw)
        out.append([torch.randn(rows, 3, 32, 32, generator=draw) + 0.3 * kinds[y], y])
    wrong = torch.rand(batch, generator=draw) < 0.4
    out[0][1] = torch.where(wrong, torch.randint(10, (batch,), generator=draw), out[0][1])
    return tuple(map(tuple, out))


def steps_of(model, batch, clean):
    """{name: one step}. Each step has its own model."""
    loss_fn = ab.CrossEntropy()

    def make(method):
        own = copy.deepcopy(model)
        optimizer = ab.ABSGD(own.parameters(), 0.01, 0.9)

        def step():
            if method == PLAIN:
                loss = loss_fn(own(batch[0]), batch[1]).mean()
            else:
                with apart() if method == APART else nullcontext():
                    loss = ab.meta.l2rw_loss(own, loss_fn, batch, clean, method.split()[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    return {name: make(name) for name in (PLAIN, *WAYS)}


def apart():
    """Where tangents have a pass of their own."""

    def beside(step, forward, tangents):
        return forward(), partial(step._along, step.params, tangents)

    return mock.patch.object(ab.meta._Step, "_beside", beside)


def trained(model, batch, steps=40):
    """A model that has trained for some steps, because the gradients of an untrained model say little."""
    optimizer, loss_fn = ab.ABSGD(model.parameters(), 0.05, 0.9), ab.CrossEntropy()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(batch[0]), batch[1]).mean().backward()
        optimizer.step()
    return model


def distances(model, batch, clean):
    """{method: |w - w*|_1}. w* are the weights of the definition in float64 (for last_layer: those of the last layer alone)."""
    exact = copy.deepcopy(model).double()
    fn, wide = ab.CrossEntropy(), tuple((x.double(), y) for x, y in (batch, clean))
    truth = {"last_layer": ab.meta.l2rw_weights(exact, fn, *wide, "last_layer")}
    definition = ab.meta.l2rw_weights(exact, fn, *wide, "unrolled")
    found = {}
    for m in WAYS:
        with apart() if m == APART else nullcontext():
            found[m] = ab.meta.l2rw_weights(model, fn, batch, clean, m.split()[0])
    return {m: float((w - truth.get(m, definition)).abs().sum()) for m, w in found.items()}


def measure(normed, rows, rounds):
    batch, clean = data_of(rows)
    model = trained(model_of(normed), batch)
    errors = distances(model, batch, clean)
    steps = steps_of(model, batch, clean)
    for step in steps.values():
        step()
    times = interleave_long(steps, rounds)
    memory = {name: statistics.median(peak_bytes(step) for _ in range(3)) for name, step in steps.items()}
    return {
        "batch_norm": normed,
        "rows": rows,
        "clean_rows": rows // 8,
        "rounds": rounds,
        "seconds": quartiles(times[PLAIN]),
        "methods": {
            name: {
                "ratio": ratios(times[name], times[PLAIN]),
                "most": TIME.get(name, (None, None))[normed],
                "memory": memory[name] / memory[PLAIN],
                "most_memory": MEMORY,
                "distance": errors[name],
            }
            for name in steps
            if name != PLAIN
        },
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.l2rw", description=__doc__.splitlines()[0])
    for name, default in (("batch", 128), ("rounds", 15), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        report, found = environment(), []
        for normed in (False, True):
            found.append(measure(normed, arguments.batch, arguments.rounds))
            print(f"{'with' if normed else 'without'} BatchNorm: plain step {1e3 * found[-1]['seconds']['median']:.0f} ms")
            for name, m in found[-1]["methods"].items():
                print(
                    f"  {name:18} {m['ratio']['median']:.2f} plain steps "
                    f"({m['ratio']['q1']:.2f} to {m['ratio']['q3']:.2f}; ≤ {m['most']}), "
                    f"memory {m['memory']:.2f} (≤ {MEMORY:g}), |w - w*| {m['distance']:.0e}"
                )
    finally:
        torch.set_num_threads(before)
    if arguments.out:
        write(report | {"l2rw": found}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
