"""LabelAudit beside cleanlab: how many of the wrong labels each finds, and in how many seconds. docs/audit.md has the table.

    pip install cleanlab             (2.9.0 was used; the package itself does not need it)
    python -m benchmarks.audit [--data-root DIR] [--cells digits,mlp,cnn] [--out FILE.json]

Labels of digits and Fashion-MNIST are flipped. k is the number of flips, and the precision at k is the share of flipped labels
among the k most suspicious samples. All methods train the same network with the same settings:

- loss: one training with the plain mean; LabelAudit's average loss over all epochs, and over the first half and quarter of them.
- weight: one training with a ramp to λ = -1 over three tenths of the epochs; LabelAudit's average weight over all epochs.
- last loss: the loss of each sample under the network at the end of the plain training, which most people look at first.
- cleanlab: the self-confidence of five-fold cross-validation, which are five trainings on four fifths of the samples. It is also
  computed from the networks after half and a quarter of their epochs.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from statistics import mean, median, stdev

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import absgd_fast as ab
from absgd_fast.experiments import data
from absgd_fast.experiments.models import make_model

from .record import environment, write

FOLDS, LAM, RAMP = 5, -1.0, 0.3
SAMPLES = 20_000  # of Fashion-MNIST


@dataclass(frozen=True)
class Cell:
    """One data set, network and noise."""

    dataset: str
    model: str
    noise: str
    rate: float
    seeds: int
    epochs: int
    lr: float
    batch_size: int


NOISES = (("symmetric", 0.2), ("symmetric", 0.4), ("symmetric", 0.6), ("asymmetric", 0.4))
CELLS = {
    "digits": [Cell("digits", "mlp", *noise, seeds=8, epochs=120, lr=0.1, batch_size=64) for noise in NOISES],
    "mlp": [Cell("fashion-mnist", "mlp", *noise, seeds=3, epochs=20, lr=0.05, batch_size=128) for noise in NOISES],
    "cnn": [Cell("fashion-mnist", "cnn", *noise, seeds=3, epochs=4, lr=0.05, batch_size=128) for noise in NOISES[:3]],
}


def samples(cell, seed, source):
    """(images, given labels, true labels) of one seed."""
    split = data.draw(source, seed, noise=cell.noise, rate=cell.rate)
    chosen = torch.randperm(len(split.y), generator=data.generator(seed, data.SPLIT))[:SAMPLES]
    return split.x[chosen], split.y[chosen], split.y_true[chosen]


def trained(cell, seed, x, y, lam=inf, after_batch=lambda batch, criterion: None, after_epoch=lambda epoch, model: None):
    """A network trained on x, y. Its loss is the plain mean, or that of a ramp to lam."""
    model = make_model(cell.model, tuple(x.shape[1:]), 10, seed)
    criterion = ab.ABLoss(lam=inf)
    schedule = ab.Ramp(criterion, lam, length=max(1, round(RAMP * cell.epochs)))
    optimizer = ab.ABSGD(model.parameters(), cell.lr, 0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.6 * cell.epochs), round(0.8 * cell.epochs)])
    order = data.generator(seed, data.ORDER)
    for epoch in range(cell.epochs):
        for batch in torch.randperm(len(y), generator=order).split(cell.batch_size):
            optimizer.zero_grad()
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
            after_batch(batch, criterion)
        decay.step()
        schedule.step()
        after_epoch(epoch + 1, model)
    return model


@torch.no_grad()
def logits_of(model, x):
    return torch.cat([model(part) for part in x.split(2000)])


def audited(cell, seed, x, y, lam=inf):
    """({name: (ranking, seconds until it was known)}, the model)."""
    audit, found, by = ab.LabelAudit(len(y)), {}, "loss" if lam == inf else "weight"
    ends = {cell.epochs // 4: f"{by}, first quarter", cell.epochs // 2: f"{by}, first half", cell.epochs: by}
    begun = time.perf_counter()

    def after_epoch(epoch, model):
        if epoch in ends:
            found[ends[epoch]] = audit.ranked(by), time.perf_counter() - begun

    def after_batch(batch, criterion):
        audit.update(batch, criterion.last.losses, criterion.last.weights)

    model = trained(cell, seed, x, y, lam, after_batch, after_epoch)
    if lam != inf:
        return {"weight": found["weight"]}
    losses = F.cross_entropy(logits_of(model, x), y, reduction="none")
    return found | {"last loss": (losses.argsort(descending=True), time.perf_counter() - begun)}


def cleaned(cell, seed, x, y):
    """{name: (ranking by cleanlab's self-confidence, its seconds)}."""
    from cleanlab.rank import get_label_quality_scores

    shuffled = torch.randperm(len(y), generator=data.generator(seed, data.METHOD))
    names = {cell.epochs // 4: "cleanlab, first quarter", cell.epochs // 2: "cleanlab, first half", cell.epochs: "cleanlab"}
    outs, seconds, found = {name: torch.empty(len(y), 10) for name in names.values()}, dict.fromkeys(names.values(), 0.0), {}
    for fold in range(FOLDS):
        held = shuffled[fold::FOLDS]
        rest = torch.cat([shuffled[other::FOLDS] for other in range(FOLDS) if other != fold])
        for name, (out, taken) in predicted(cell, seed, x[rest], y[rest], x[held], names).items():
            outs[name][held] = out
            seconds[name] += taken
    for name, out in outs.items():
        begun = time.perf_counter()
        quality = get_label_quality_scores(y.numpy(), out.numpy(), method="self_confidence")
        found[name] = torch.from_numpy(quality).argsort(stable=True), seconds[name] + time.perf_counter() - begun
    return found


def predicted(cell, seed, x, y, x_held, names):
    """{name: (probabilities of x_held after these epochs of a training on x, y; its seconds)}. names: {epoch: name}."""
    found, begun = {}, time.perf_counter()

    def after_epoch(epoch, model):
        nonlocal begun
        if epoch in names:
            here = time.perf_counter()
            out = logits_of(model, x_held).softmax(1)
            found[names[epoch]] = out, time.perf_counter() - begun
            begun += time.perf_counter() - here  # a later name does not need this prediction

    trained(cell, seed, x, y, after_epoch=after_epoch)
    return found


def measure(cell, source):
    """{method: {"precision": [of each seed], "seconds": [...]}}."""
    found = {}
    for seed in range(cell.seeds):
        x, y, y_true = samples(cell, seed, source)
        if seed == 0:  # so that the first use of each operator is not timed
            trained(cell, seed, x[: 2 * cell.batch_size], y[: 2 * cell.batch_size])
        rankings = audited(cell, seed, x, y) | audited(cell, seed, x, y, LAM) | cleaned(cell, seed, x, y)
        wrong = y != y_true
        for method, (ranking, seconds) in rankings.items():
            entry = found.setdefault(method, {"precision": [], "seconds": []})
            entry["precision"].append(float(wrong[ranking[: int(wrong.sum())]].double().mean()))
            entry["seconds"].append(seconds)
    return found


METHODS = ("loss, first quarter", "loss, first half", "loss", "weight", "last loss")
METHODS += ("cleanlab, first quarter", "cleanlab, first half", "cleanlab")


def table(found, key, digits):
    """The results as a rich table: mean and, with several seeds, standard deviation."""
    out = Table("cell", *METHODS, title=f"{key}, mean±standard deviation over the seeds", box=box.SIMPLE_HEAD)
    for row in found:
        cell, cells = row["cell"], []
        for method in METHODS:
            values = row["methods"][method][key]
            cells.append(f"{mean(values):.{digits}f}" + (f"±{stdev(values):.{digits}f}" if len(values) > 1 else ""))
        out.add_row(f"{cell['dataset']} {cell['model']} {cell['noise'][:4]} {cell['rate']:g}", *cells)
    return out


COLUMNS = ("loss", "loss, first half", "weight", "last loss", "cleanlab", "cleanlab, first half")


def markdown(found):
    """The table of docs/audit.md: the precision of each ranking, and the time of two of them over that of cleanlab."""
    lines = ["| cell | " + " | ".join(COLUMNS) + " | time: loss | time: first half |", "|---" * (len(COLUMNS) + 3) + "|"]
    for row in found:
        cell, methods = row["cell"], row["methods"]
        cells = [f"{cell['dataset']} {cell['model']}, {cell['noise']} {cell['rate']:g}"]
        for method in COLUMNS:
            values = methods[method]["precision"]
            cells.append(f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else ""))
        for method in ("loss", "loss, first half"):
            ratios = [a / b for a, b in zip(methods[method]["seconds"], methods["cleanlab"]["seconds"])]
            cells.append(f"{median(ratios):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--cells", type=lambda text: text.split(","), default=list(CELLS), help=f"some of {', '.join(CELLS)}")
    parser.add_argument("--seeds", type=int, help="at most so many seeds in each cell")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for cell in (cell for name in arguments.cells for cell in CELLS[name]):
            cell = replace(cell, seeds=min(cell.seeds, arguments.seeds or cell.seeds))
            source = data.load_source(cell.dataset, arguments.data_root if cell.dataset != "digits" else None)
            found.append({"cell": asdict(cell), "methods": measure(cell, source)})
            print(f"{cell}: done", flush=True)
            if arguments.out:
                write(environment() | {"audit": found}, arguments.out)
    finally:
        torch.set_num_threads(before)
    console = Console(width=200)
    console.print(table(found, "precision", 3), table(found, "seconds", 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
