"""The results of a training as numbers: collected, summarised, and each method paired with plain SGD.

Differences are paired: each seed's result less plain SGD's on the same seed, so the luck of the split cancels.
"""

import datetime
import importlib.metadata
import math
import os
import shlex
from dataclasses import asdict
from statistics import mean, stdev

from absgd_fast import _backend

from .methods import METHODS

BASELINE = "sgd"
METRICS = ("accuracy", "balanced_accuracy", "seconds")

# what may change the last bits of a result; --resume keeps the number of threads itself
BITS = ("torch", "absgd_fast", "absgd", "backend", "instruction set", "machine")


def collect(config, runs, *, command=(), threads=None, partial=False, earlier=()):
    """The results as one dict, ready for JSON.

    Args:
        config: the train.Config of the runs.
        runs: what train.runs yielded, all or the first few.
        command: the command line, for the report.
        threads: CPU threads that torch used.
        partial: True when training was cut short.
        earlier: where training was resumed, environment() of each part before this one.

    Returns:
        {"config": {...}, "runs": [...], "summary": summarise(runs), "paired": pair(runs), "partial", "command",
        "environment", "changes": changes([*earlier, environment(...)]), "created"}
    """
    here = environment(config, threads)
    settings = asdict(config) | {"methods": list(config.methods)}
    if math.isinf(config.lam):
        settings["lam"] = str(config.lam)  # JSON has no infinity
    return {
        "config": settings,
        "runs": list(runs),
        "summary": summarise(runs),
        "paired": pair(runs),
        "partial": partial,
        "command": shlex.join(command),
        "environment": here,
        "changes": changes([*earlier, here]),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def environment(config, threads):
    """What the results were made with, name by name: versions, kernels, machine."""
    here = _backend.report()
    found = {name: str(here[name]) for name in ("python", "torch")} | {"absgd_fast": here["version"]}  # torch's is no plain str
    if "reference" in config.methods:
        found["absgd"] = importlib.metadata.version("absgd")
    return found | {
        "backend": here["selected for CPU tensors"],
        "instruction set": here["cpu"]["instruction set"],
        "machine": here["cpu"]["machine"],
        "cpus": os.cpu_count(),
        "threads": threads,
    }


def changes(environments):
    """{name: [value, …]} of what the parts of a resumed training had different and what may change their bits.

    Example:
        >>> from absgd_fast.experiments.summary import changes
        >>> changes([{"torch": "2.12.0", "cpus": 2}, {"torch": "2.13.0", "cpus": 4}])
        {'torch': ['2.12.0', '2.13.0']}
    """
    values = {name: list(dict.fromkeys(e[name] for e in environments if name in e)) for name in BITS}
    return {name: several for name, several in values.items() if len(several) > 1}


def summarise(runs):
    """{method: {metric: {"mean", "std", "n"}}} over the seeds; std with n − 1, None for a single seed.

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


def pair(runs, baseline=BASELINE):
    """{method: {metric: {"mean", "stderr", "n"}}} of each method's difference to the baseline on the same seed.

    Only seeds that both finished count. stderr = std / √n, None for a single seed; no baseline, no entries.
    """
    runs_of = by_method(runs)
    base = runs_of.pop(baseline, {})
    pairs = {}
    for method, mine in runs_of.items():
        if shared := sorted(mine.keys() & base.keys()):
            pairs[method] = {}
            for metric in METRICS:
                differences = [mine[seed][metric] - base[seed][metric] for seed in shared]
                pairs[method][metric] = {"mean": mean(differences), "stderr": stderr(differences), "n": len(shared)}
    return pairs


def by_method(runs):
    """{method: {seed: run}}, methods in the order of METHODS (plain SGD first)."""
    methods = sorted({run["method"] for run in runs}, key=list(METHODS).index)
    return {m: {run["seed"]: run for run in runs if run["method"] == m} for m in methods}


def judged(runs_of):
    """The method that the report judges: absgd, or else the first other one; None where there is only plain SGD."""
    return next((m for m in runs_of if m != BASELINE), None)


def head_to_tail(runs):
    """(class indices from most to fewest training samples, mean count of each class)."""
    columns = zip(*(run["train_counts"] for run in runs))
    counts = [mean(column) for column in columns]
    return sorted(range(len(counts)), key=lambda c: -counts[c]), counts


def time_ratios(mine, base):
    """Seconds of one method over those of another, for each seed that both have finished."""
    return [mine[s]["seconds"] / base[s]["seconds"] for s in sorted(mine.keys() & base.keys())]


def std(values):
    """Standard deviation with n − 1; None for a single value."""
    return stdev(values) if len(values) > 1 else None


def stderr(values):
    """Standard error of the mean; None for a single value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
