"""How to choose lambda: the measurements of docs/choosing-lambda.md.

    python -m benchmarks.choosing_lambda [--sections imbalance,clean,noise] [--only TEXT] [--seeds N] [--out FILE.json]
    python -m benchmarks.choosing_lambda --tables

Every run is one training of one candidate on one seed. The file holds every finished run, and a program that was stopped goes on
where it stood. `--only` keeps the cells whose name holds TEXT. `--tables` trains nothing and prints the tables of the page.

    imbalance   long tails with rho = 100: plain SGD, a grid of fixed lambda > 0 from the first step on, TargetESS
    clean       the same candidates on balanced training sets without wrong labels
    noise       symmetric label noise: plain SGD and ramps to lambda < 0, trained on everything and on the part that `ab.select`
                leaves when it holds a tenth of the noisy training set out

Candidates of one seed have the same samples, wrong labels, initial weights and order of batches. So all differences are taken
between runs of the same seed, and "±" is the standard error of the mean of these differences.
"""

import argparse
import io
import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from statistics import mean, stdev

import torch
from torch.nn import functional as F

import absgd_fast as ab
from absgd_fast import selection
from absgd_fast.experiments import data, models
from absgd_fast.experiments.checkpoint import write_whole
from absgd_fast.selection.split import split as holdout

from .record import environment

OUT = Path(__file__).parent / "results" / "choosing-lambda.json"


@dataclass(frozen=True)
class Task:
    """A data set, a network and a budget. lr is divided by 10 after 60 % and again after 80 % of the epochs."""

    dataset: str
    model: str
    seeds: int
    epochs: int
    batch_size: int
    lr: float
    per_class: int | None = None  # training images of a class before imbalance; None: as many as the data set has
    pool: int = 1  # images are averaged over squares of so many pixels


DIGITS = Task("digits", "mlp", seeds=8, epochs=120, batch_size=64, lr=0.1)
FASHION = Task("fashion-mnist", "mlp", seeds=3, epochs=24, batch_size=128, lr=0.05, per_class=2000)
CNN = replace(FASHION, model="cnn", epochs=8, pool=2)
DIGITS_TASKS = {"digits linear": replace(DIGITS, model="linear"), "digits MLP": DIGITS}
BALANCED = DIGITS_TASKS | {"F-MNIST MLP": FASHION, "F-MNIST CNN": CNN}
# long tails; the number is that of the largest class, and the small one has as many steps as the large one
TAILS = DIGITS_TASKS | {
    "F-MNIST MLP, 2000": replace(FASHION, epochs=72),
    "F-MNIST MLP, 6000": replace(FASHION, per_class=6000),
    "F-MNIST CNN, 6000": replace(CNN, per_class=6000),
}
TASKS = BALANCED | TAILS

SHARES = ("target 0.5", "target 0.7", "target 0.8", "target 0.9", "target 0.95")
FEW_SHARES = ("target 0.7", "target 0.9", "target 0.95")  # for the CNN, which takes long
GRID = ("lam 0.25", "lam 0.5", "lam 1", "lam 2", "lam 5", "lam 10")
RAMPS = ("ramp -2", "ramp -1", "ramp -0.5")
CHOICE = ("sgd", *RAMPS)  # the candidates of select
RELATIVE = ("relative -0.5",)  # for comparison
NOISY = ("digits MLP", "F-MNIST MLP", "F-MNIST CNN")
RATES = (0.0, 0.2, 0.4, 0.6)
EVERYTHING, NOT_HELD_OUT = "everything", "90 %"  # what a run trains on


@dataclass(frozen=True)
class Cell:
    """Runs that are compared with each other."""

    section: str
    task: str
    candidates: tuple[str, ...]
    rho: float = 1.0
    rate: float = 0.0
    part: str = EVERYTHING

    @property
    def name(self):
        noise = f", noise {self.rate:g}" if self.section == "noise" else ""
        part = f", {self.part}" if self.part != EVERYTHING else ""
        return f"{self.section}: {self.task}{noise}{part}"

    @property
    def seeds(self):
        """The seeds. The rule of select and the default share were chosen by seeds below 10, so they are judged on others."""
        return range(10, 10 + self.of.seeds)

    @property
    def of(self):
        """The Task."""
        return TASKS[self.task]


def cells():
    """All cells, in the order in which they are measured."""
    for task in BALANCED:
        yield Cell("clean", task, ("sgd", *_shares(task)))
    for task in TAILS:
        yield Cell("imbalance", task, ("sgd", *_shares(task), *GRID), rho=100.0)
    for part in (NOT_HELD_OUT, EVERYTHING):
        for task in NOISY:
            for rate in RATES:
                more = RELATIVE if part == EVERYTHING and task != "F-MNIST CNN" else ()
                yield Cell("noise", task, (*CHOICE, *more), rate=rate, part=part)


def _shares(task):
    """Those that are tried."""
    return FEW_SHARES if "CNN" in task else SHARES


# ---- one run ---------------------------------------------------------------------------------------------------------


@cache
def source_of(dataset, pool, root):
    """The data set of a task."""
    source = data.load_source(dataset, root)
    if pool > 1:
        source = replace(source, images=_pooled(source.images, pool), test=(_pooled(source.test[0], pool), source.test[1]))
    return source


def _pooled(images, pool):
    return F.avg_pool2d(images.float(), pool).round().to(images.dtype)


@lru_cache(maxsize=1)
def split_of(cell, seed, root):
    """(the data set, the split of this seed)."""
    task, source = cell.of, source_of(cell.of.dataset, cell.of.pool, root)
    options = {"imbalance": "lt", "rho": cell.rho} if cell.rho > 1 else {}
    options |= {"noise": "symmetric", "rate": cell.rate} if cell.rate else {}
    return source, data.draw(source, seed, per_class=task.per_class, **options)


def criterion_of(candidate, epochs):
    """(the criterion, its schedule or None). The schedule is stepped after each of so many epochs, as `absgd-fast tune` does."""
    kind, _, number = candidate.partition(" ")
    lams = {"sgd": lambda: math.inf, "lam": lambda: float(number), "target": lambda: ab.TargetESS(float(number))}
    lams["relative"] = lambda: ab.RelativeLam(float(number))
    if kind in lams:
        return ab.ABLoss(lam=lams[kind]()), None
    if kind == "ramp":
        return selection.Candidate.named(number).build(None, epochs)
    if kind == "two-stage":
        criterion = ab.ABLoss(lam=math.inf)
        return criterion, ab.TwoStage(criterion, float(number), max(1, round(0.3 * epochs)))
    raise ValueError(f"candidate: got {candidate!r}, expected sgd, or lam, target, relative, ramp or two-stage with a number")


def training(cell, seed, root, candidate, kept, held_out):
    """Trains one candidate on `kept`. Yields the predicted labels of `held_out` after each epoch. Returns the model."""
    task = cell.of
    source, split = split_of(cell, seed, root)
    x, y = split.x[kept], split.y[kept]
    model = models.make_model(task.model, source.shape, source.classes, seed)
    criterion, schedule = criterion_of(candidate, task.epochs)
    optimizer = ab.ABSGD(model.parameters(), task.lr, 0.9, weight_decay=1e-4)
    decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.6 * task.epochs), round(0.8 * task.epochs)])
    order = data.generator(seed, data.ORDER)
    for _ in range(task.epochs):
        model.train()
        for batch in torch.randperm(len(y), generator=order).split(task.batch_size):
            optimizer.zero_grad()
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
        decay.step()
        if schedule is not None:
            schedule.step()
        yield predicted(model, split.x[held_out])
    return model


def run(cell, candidate, seed, root):
    """(the results of one training, ready for JSON; (epochs, held out) which of its held-out predictions were right)."""
    begun, (_, split) = time.perf_counter(), split_of(cell, seed, root)
    kept, held_out = torch.arange(len(split.y)), torch.arange(0)
    if cell.part == NOT_HELD_OUT:
        kept, held_out, _ = holdout(0.1, None, split.y, seed)
    epochs, right = training(cell, seed, root, candidate, kept, held_out), []
    while True:
        try:
            right.append(next(epochs) == split.y[held_out])
        except StopIteration as end:
            model = end.value
            break
    accuracy, balanced = scores(predicted(model, split.x_test), split.y_test)
    found = {"accuracy": round(accuracy, 3), "balanced_accuracy": round(balanced, 3), "training_images": len(kept)}
    if len(held_out):
        found["held_out"] = round(100 * float(right[-1].double().mean()), 2)
    return found | {"seconds": round(time.perf_counter() - begun, 2)}, torch.stack(right)


@torch.no_grad()
def predicted(model, x):
    """The predicted labels."""
    model.eval()
    return torch.cat([model(part).argmax(1) for part in x.split(2000)])


def scores(labels, right_labels):
    """Accuracy and mean recall, in percent."""
    right, counts = labels == right_labels, torch.bincount(right_labels)
    recall = torch.bincount(right_labels[right], minlength=len(counts)) / counts
    return 100 * float(right.double().mean()), 100 * float(recall.mean())


def chosen(cell, seed, root, right):
    """The candidate that `ab.select` chooses. It is handed the predictions of trainings that ran before.

    Args:
        cell: of the runs on the part that was not held out.
        right: {candidate: (epochs, held out) which predictions were right}.
    """
    _, split = split_of(cell, seed, root)

    def replayed(candidate, train_idx, holdout_idx, budget):
        for epoch in right[candidate]:
            yield torch.where(epoch, split.y[holdout_idx], -1)

    options = {"labels": split.y, "seed": seed, "budget": cell.of.epochs, "refit": False, "progress": False}
    return ab.select(replayed, CHOICE, holdout=0.1, **options).best


# ---- all runs --------------------------------------------------------------------------------------------------------


def key_of(cell, candidate, seed):
    return f"{cell.name} | {candidate} | {seed}"


def measure(wanted, found, root, keep, most=None):
    """Adds the missing runs of the wanted cells to `found`, and calls keep() after each. most: seeds of a cell; None: all."""
    for cell in wanted:
        for seed in cell.seeds[:most]:
            for candidate in cell.candidates:
                key = key_of(cell, candidate, seed)
                undecided = cell.part == NOT_HELD_OUT and key_of(cell, "chosen", seed) not in found.chosen
                lost = undecided and key not in found.right
                if key not in found.runs or lost:
                    found.runs[key], right = run(cell, candidate, seed, root)
                    if cell.part == NOT_HELD_OUT:
                        found.right[key] = right
                    keep()
                    result = found.runs[key]
                    print(f"{key}: {result['accuracy']:.2f} %, balanced {result['balanced_accuracy']:.2f} %", flush=True)
            keys = {candidate: key_of(cell, candidate, seed) for candidate in cell.candidates}
            if cell.part == NOT_HELD_OUT and found.right.keys() >= set(keys.values()):
                right = {candidate: found.right[key] for candidate, key in keys.items()}
                found.chosen[key_of(cell, "chosen", seed)] = chosen(cell, seed, root, right)
                keep()


@dataclass
class Found:
    """What is known so far."""

    runs: dict[str, dict]
    chosen: dict[str, str]
    right: dict[str, torch.Tensor]

    @classmethod
    def read(cls, path):
        """From the files that write() made; empty if there are none."""
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        beside = beside_of(path)
        right = torch.load(beside, weights_only=True) if beside.is_file() else {}
        return cls(found.get("runs", {}), found.get("chosen", {}), right)

    def write(self, path, about):
        """Writes the results with one line for each run, and beside them the held-out predictions, which are not for a reader."""
        tasks = json.dumps({name: asdict(task) for name, task in TASKS.items()}, ensure_ascii=False)
        runs = ",\n".join(f" {json.dumps(key, ensure_ascii=False)}: {json.dumps(run)}" for key, run in self.runs.items())
        chosen = json.dumps(self.chosen, ensure_ascii=False, indent=1)
        text = f'{{"environment": {json.dumps(about)},\n"tasks": {tasks},\n"chosen": {chosen},\n"runs": {{\n{runs}\n}}}}\n'
        write_whole(path, text.encode())
        if self.right:
            buffer = io.BytesIO()
            torch.save(self.right, buffer)
            write_whole(beside_of(path), buffer.getbuffer())


def beside_of(path):
    """The file of the held-out predictions."""
    return path.with_suffix(".held-out.pt")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choosing_lambda", description=__doc__.splitlines()[0])
    parser.add_argument("--sections", type=lambda text: text.split(","), default=["imbalance", "clean", "noise"])
    parser.add_argument("--only", default="", help="measure the cells whose name holds this text")
    parser.add_argument("--seeds", type=int, help="measure only so many seeds of each cell for now")
    parser.add_argument("--data-root", help="the folder of the Fashion-MNIST files; by default they are looked for")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tables", action="store_true", help="print the tables of a file and train nothing")
    arguments = parser.parse_args(argv)
    found = Found.read(arguments.out)
    if not arguments.tables:
        torch.set_num_threads(1)
        wanted = [cell for cell in cells() if cell.section in arguments.sections and arguments.only in cell.name]
        about = environment()
        measure(wanted, found, arguments.data_root, lambda: found.write(arguments.out, about), arguments.seeds)
    print(tables(found))
    return 0


# ---- tables ----------------------------------------------------------------------------------------------------------


def values(found, cell, candidate, metric):
    """{seed: percent} of the runs that are there. The candidate "chosen" is on each seed what select chose."""
    picked = {}
    for seed in cell.seeds:
        choice = candidate
        if candidate == "chosen":
            choice = found.chosen.get(key_of(replace(cell, part=NOT_HELD_OUT), candidate, seed))
        key = key_of(cell, choice, seed)
        if key in found.runs:
            picked[seed] = found.runs[key][metric]
    return picked


def difference(found, cell, candidate, baseline, metric):
    """The mean of the paired differences between two candidates with its standard error, as text."""
    mine, base = (values(found, cell, name, metric) for name in (candidate, baseline))
    differences = [mine[seed] - base[seed] for seed in mine.keys() & base.keys()]
    if not differences:
        return "–"
    error = f" ± {stdev(differences) / math.sqrt(len(differences)):.1f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.1f}{error}".replace("-", "−")


def best(found, cell, metric, candidates):
    """The candidate with the best mean over the seeds; None if none of them has a run."""
    means = {name: mean(picked.values()) for name in candidates if (picked := values(found, cell, name, metric))}
    return max(means, key=means.get, default=None)


def title(candidate):
    """The name of a candidate in the tables."""
    kind, _, number = candidate.partition(" ")
    number = number.replace("-", "−")
    titles = {"sgd": "SGD", "lam": f"λ = {number}", "target": f"`TargetESS({number})`", "ramp": f"ramp to {number}"}
    titles |= {"relative": f"`RelativeLam({number})`".replace("−", "-"), "chosen": "what `select` chooses"}
    return titles[kind]


def markdown(rows):
    """A table in Markdown. The first row is the header; rows without a figure are left out."""
    rows = [row for row in rows if row is rows[0] or set(row[1:]) != {"–"}]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _seeds(found, columns):
    """How many seeds the cells have, as text: "3", or "1 to 3" while some are missing."""
    counts = [
        len(values(found, cell, candidate, "accuracy"))
        for cell in columns
        for candidate in cell.candidates
        if candidate not in RELATIVE
    ]
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{max(counts)}"


def by_task(found, section, metric):
    """A line for each candidate, a column for each task: SGD's percentage, and differences to it."""
    columns = [cell for cell in cells() if cell.section == section]
    sgd = [values(found, cell, "sgd", metric).values() for cell in columns]
    rows = [["", *(f"{cell.task} ({_seeds(found, [cell])})" for cell in columns)]]
    rows.append(["SGD, %", *(f"{mean(percent):.1f}" if percent else "–" for percent in sgd)])
    rows += [
        [title(candidate), *(difference(found, cell, candidate, "sgd", metric) for cell in columns)]
        for candidate in columns[0].candidates[1:]
    ]
    if section == "imbalance":
        for candidate in SHARES:
            against = [(cell, best(found, cell, metric, GRID)) for cell in columns]
            behind = [difference(found, cell, candidate, lam, metric) if lam else "–" for cell, lam in against]
            rows.append([f"{title(candidate)} − the best fixed λ", *behind])
    return markdown(rows)


def by_rate(found, task):
    """A line for each candidate, a column for each share of wrong labels.

    The trainings are those on 90 %, until all those on everything are there.
    """
    noisy = [cell for cell in cells() if cell.section == "noise" and cell.task == task]
    wanted = [(cell, candidate) for cell in noisy if cell.part == EVERYTHING for candidate in CHOICE]
    complete = all(len(values(found, cell, candidate, "accuracy")) == cell.of.seeds for cell, candidate in wanted)
    part = EVERYTHING if complete else NOT_HELD_OUT
    columns = [cell for cell in noisy if cell.part == part]
    rows = [[f"{task} ({_seeds(found, columns)}), trained on {part}", *(f"{cell.rate:g}" for cell in columns)]]
    sgd = [values(found, cell, "sgd", "accuracy").values() for cell in columns]
    rows.append(["SGD, %", *(f"{mean(percent):.1f}" if percent else "–" for percent in sgd)])
    rows += [
        [title(candidate), *(difference(found, cell, candidate, "sgd", "accuracy") for cell in columns)]
        for candidate in (*RAMPS, *RELATIVE, "chosen")
    ]
    winners = [(cell, best(found, cell, "accuracy", CHOICE)) for cell in columns]
    behind = [difference(found, cell, "chosen", winner, "accuracy") if winner else "–" for cell, winner in winners]
    rows.append(["what `select` chooses − the best candidate", *behind])
    rows.append(["how often it chooses each", *(_counts(found, cell) for cell in columns)])
    return markdown(rows)


def _counts(found, cell):
    """For example "ramp to −1 5×, SGD 3×"."""
    keys = [key_of(replace(cell, part=NOT_HELD_OUT), "chosen", seed) for seed in cell.seeds]
    counts = Counter(title(found.chosen[key]) for key in keys if key in found.chosen)
    return ", ".join(f"{name} {count}×" for name, count in counts.most_common()) or "–"


def tables(found):
    """The tables of the page as Markdown."""
    parts = [by_task(found, "imbalance", "balanced_accuracy"), by_task(found, "clean", "accuracy")]
    return "\n\n".join([*parts, *(by_rate(found, task) for task in NOISY)])


if __name__ == "__main__":
    sys.exit(main())
