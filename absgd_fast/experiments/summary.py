"""The results of a training as numbers: means over the seeds, and the difference of each method to plain SGD.

A difference is taken between two results on the same seed, so the luck of the split cancels.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import mean, stdev
from typing import Any

from absgd_fast import _backend

from .methods import METHODS
from .spec import base
from .train import Config, Run

RunsOf = dict[str, dict[int, Run]]  # {method: {seed: run}}

BASELINE = "sgd"
METRICS = ("accuracy", "balanced_accuracy", "seconds")

# These parts of environment() may change the last bits of a result. (--resume keeps the number of threads, which may too.)
BITS = ("torch", "absgd_fast", "absgd", "backend", "instruction set", "machine")


def collect(
    config: Config,
    runs: Iterable[Run],
    *,
    command: Iterable[str] = (),
    threads: int | None = None,
    partial: bool = False,
    earlier: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """The results as one dict, ready for JSON.

    Args:
        config: the train.Config of the runs.
        runs: the results that train.runs yielded, all or the first few.
        command: the words of the command line, for the report.
        threads: the number of CPU threads that torch used.
        partial: True if training was interrupted.
        earlier: for a resumed training, environment() of each part before this one.

    Returns:
        {"config": {...}, "runs": [...], "summary": summarise(runs), "paired": pair(runs), "partial", "command",
        "environment", "changes": changes([*earlier, environment(...)]), "created"}
    """
    runs, here = list(runs), environment(config, threads)
    settings = asdict(config) | {"methods": list(config.methods)}
    if math.isinf(config.lam):
        settings["lam"] = str(config.lam)  # JSON has no infinity
    return {
        "config": settings,
        "runs": runs,
        "summary": summarise(runs),
        "paired": pair(runs),
        "partial": partial,
        "command": shlex.join(command),
        "environment": here,
        "changes": changes([*earlier, here]),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def environment(config: Config, threads: int | None) -> dict[str, Any]:
    """The versions, kernels and machine that made the results, by name."""
    here = _backend.report()
    # str() because torch.__version__ is of a subclass of str, which a checkpoint does not take
    found: dict[str, Any] = {name: str(here[name]) for name in ("python", "torch")} | {"absgd_fast": here["version"]}
    if "reference" in map(base, config.methods):
        found["absgd"] = importlib.metadata.version("absgd")
    return found | {
        "backend": here["selected for CPU tensors"],
        "instruction set": here["cpu"]["instruction set"],
        "machine": here["cpu"]["machine"],
        "cpus": os.cpu_count(),
        "threads": threads,
    }


def changes(environments: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """{name: [value, …]} of the differences between the parts of a resumed training that may change the bits of its results.

    Example:
        >>> from absgd_fast.experiments.summary import changes
        >>> changes([{"torch": "2.12.0", "cpus": 2}, {"torch": "2.13.0", "cpus": 4}])
        {'torch': ['2.12.0', '2.13.0']}
    """
    values = {name: list(dict.fromkeys(e[name] for e in environments if name in e)) for name in BITS}
    return {name: several for name, several in values.items() if len(several) > 1}


def summarise(runs: Iterable[Run]) -> dict[str, dict[str, dict[str, Any]]]:
    """{method: {metric: {"mean", "std", "n"}}} over the seeds. std divides by n − 1, and is None for a single seed.

    Example:
        >>> from absgd_fast.experiments.summary import summarise
        >>> numbers = {"accuracy": 70.0, "balanced_accuracy": 70.0, "seconds": 1.0}
        >>> runs = [{"method": "sgd", "seed": 0} | numbers, {"method": "sgd", "seed": 1} | numbers | {"accuracy": 72.0}]
        >>> summarise(runs)["sgd"]["accuracy"]
        {'mean': 71.0, 'std': 1.4142135623730951, 'n': 2}
    """
    summary = {}
    for method, mine in by_method(runs).items():
        columns = {metric: [run[metric] for run in mine.values()] for metric in METRICS}
        summary[method] = {m: {"mean": mean(v), "std": std(v), "n": len(v)} for m, v in columns.items()}
    return summary


def pair(runs: Iterable[Run], baseline: str = BASELINE) -> dict[str, dict[str, dict[str, Any]]]:
    """{method: {metric: {"mean", "stderr", "n"}}} of the differences between each method and the baseline on the same seed.

    Only seeds that both have finished count. stderr is std / √n, and None for a single seed. Without a run of the baseline the
    dict is empty.
    """
    runs_of = by_method(runs)
    base = runs_of.pop(baseline, {})
    pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for method, mine in runs_of.items():
        if shared := sorted(mine.keys() & base.keys()):
            pairs[method] = {}
            for metric in METRICS:
                differences = [mine[seed][metric] - base[seed][metric] for seed in shared]
                pairs[method][metric] = {"mean": mean(differences), "stderr": stderr(differences), "n": len(shared)}
    return pairs


def by_method(runs: Iterable[Run]) -> RunsOf:
    """{method: {seed: run}}, with the methods in the order of METHODS (plain SGD first), and else as they come."""
    runs = list(runs)
    methods = sorted(dict.fromkeys(run["method"] for run in runs), key=lambda m: (m != BASELINE, list(METHODS).index(base(m))))
    return {m: {run["seed"]: run for run in runs if run["method"] == m} for m in methods}


def judged(runs_of: RunsOf) -> str | None:
    """The method that the report judges: absgd, or else the first other method. None if there is only plain SGD."""
    others = [m for m in runs_of if m != BASELINE]
    weighing = [m for m in others if base(m) != BASELINE]
    return next((m for m in others if base(m) == "absgd"), next(iter(weighing or others), None))


def head_to_tail(runs: Iterable[Run]) -> tuple[list[int], list[float]]:
    """(class indices from most to fewest training samples, mean count of each class)."""
    columns = zip(*(run["train_counts"] for run in runs))
    counts = [mean(column) for column in columns]
    return sorted(range(len(counts)), key=lambda c: -counts[c]), counts


def time_ratios(mine: dict[int, Run], base: dict[int, Run]) -> list[float]:
    """The seconds of one method divided by those of another, for each seed that both have finished."""
    return [mine[s]["seconds"] / base[s]["seconds"] for s in sorted(mine.keys() & base.keys())]


def std(values: Sequence[float]) -> float | None:
    """Standard deviation, which divides by n − 1. None for a single value."""
    return stdev(values) if len(values) > 1 else None


def stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean. None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
