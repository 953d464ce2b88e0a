"""Several trainings as one: the runs of many results.json, put into cells, and the numbers of each cell.

    cells, twice = merge(find(folders))      reads the files; runs with equal data, model and training settings are one Cell
    results = numbers(cells, twice)          plain dict, ready for JSON

A cell compares its methods seed by seed. merged_plots.py draws it, and merged_report.py writes the page and the tables.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from .effects import READERS, needs, words_of
from .spec import given_settings
from .style import base_of
from .summary import BASELINE, METRICS, RunsOf, std, stderr
from .train import Config, Run
from .words import setting

FILE = "results.json"
COMPARED = ("accuracy", "balanced_accuracy")
METRIC = "balanced_accuracy"  # what methods are compared by, unless a recipe says otherwise
AHEAD, BEHIND, ALIKE = "ahead", "behind", "not told apart"

# What may differ between the trainings of a cell: how many runs there are, where the data lie, and where and how fast it runs.
_FREE = frozenset(["methods", "seeds", "test_images", "audit", "data_root", "workers", "device", "digests", "channels_last"])

# The settings of a method (effects.READERS) may differ between the trainings of a cell too. A method whose setting differs
# is then named with it, as in absgd@lam=-1.

# What is read of a run. A file that lacks one of them is of another version.
_OF_RUN = ("method", "seed", *METRICS, "per_class_recall", "train_counts", "parameters", "epochs")


@dataclass
class Cell:
    """The runs with equal data, model and training settings.

    Attributes:
        title: what distinguishes it from the other cells.
        config: the settings of its first training, as train.Config.
        recipe: that of its trainings, or {}.
        runs_of: {name of the method: {seed: run}}.
        rows: {name of the method: its row in the summary}, which methods of other cells may share.
        folders: where its results.json were found.
        environments: of its trainings, as summary.environment.
        created: when its first training ended.
        found_in: {(name of the method, seed): the file}.
    """

    title: str
    config: dict[str, Any]
    recipe: dict[str, Any]
    runs_of: RunsOf = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    environments: list[dict[str, Any]] = field(default_factory=list)
    created: str = ""
    found_in: dict[tuple[str, int], Path] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """ "accuracy" or "balanced_accuracy": what its methods are compared by."""
        return self.recipe.get("metric", METRIC)


# ------------------------------------------------------------------------------------------------ reading


def find(folders: Iterable[str | Path]) -> list[Path]:
    """The results.json in these folders and below them, each once, in natural order within a folder.

    Raises:
        ValueError: a folder does not exist, or has no results.json. The message is one line.
    """
    found: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder} is {'no folder' if folder.exists() else 'not there'}; give folders of `absgd-fast train`")
        files = sorted(folder.rglob(FILE), key=lambda path: _natural(str(path)))
        if not files:
            raise ValueError(f"{folder} has no {FILE}; `absgd-fast train --out {folder}` writes one")
        for file in files:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts run-2 before run-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def read(file: Path) -> dict[str, Any]:
    """The results in a file. A setting that the file does not have yet had its default's effect, and gets it.

    Raises:
        ValueError: it is damaged, or of another version of absgd_fast. The message is one line.
        OSError: it cannot be read.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}; train again, or remove it") from error
    if not isinstance(results, dict) or not isinstance(results.get("config"), dict) or not isinstance(results.get("runs"), list):
        raise ValueError(f"{file} is not of `absgd-fast train`; remove it, or give another folder")
    defaults = asdict(Config())
    if unknown := sorted(results["config"].keys() - defaults.keys()):
        raise ValueError(f"{file} is of another version: its settings {', '.join(unknown)} are unknown here; update absgd_fast")
    for run in results["runs"]:
        missing = [key for key in _OF_RUN if not isinstance(run, dict) or key not in run]
        if missing or not isinstance(run["epochs"], dict) or "class_weight" not in run["epochs"]:
            what = ", ".join(missing) or "epochs' class_weight"
            raise ValueError(f"{file} is of another version: its runs have no {what}; train again with this absgd_fast")
    if not results["runs"]:
        raise ValueError(f"{file} has no finished run; continue its training with --resume, or remove it")
    if (metric := (results.get("recipe") or {}).get("metric", METRIC)) not in COMPARED:
        raise ValueError(f"{file} is of another version: its recipe compares by {metric}, expected {' or '.join(COMPARED)}")
    return results | {"config": defaults | results["config"]}


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


# ------------------------------------------------------------------------------------------------ names and cells


def canonical(name: str, loss: str = "ce") -> str:
    """A specification with the loss of its training, and without what is the default: ":ce" is left out.

    Args:
        name: METHOD[+EXTRA...][:LOSS[+SCHEDULE...]][@SETTING=VALUE...].
        loss: of a method that names none, Config.loss.

    Example:
        >>> from absgd_fast.experiments.merged import canonical
        >>> canonical("absgd@lam=-1.0", "sce"), canonical("sgd:ce")
        ('absgd:sce@lam=-1', 'sgd')
    """
    method, _, of_loss = name.split("@")[0].partition(":")
    of_loss = of_loss or loss
    settings = [f"@{key}={_shown(value)}" for key, value in given_settings(name).items()]
    return "".join([method, f":{of_loss}" * (of_loss != "ce"), *settings])


def _shown(value: object) -> str:
    """A setting as a user writes it: -1.0 as -1."""
    if isinstance(value, (list, tuple)):
        return "/".join(map(_shown, value))
    try:
        return f"{float(value):g}"  # type: ignore[arg-type]  # what is no number raises
    except (TypeError, ValueError):
        return str(value)


def loss_of(name: str) -> str:
    """The LOSS[+SCHEDULE...] of a canonical specification."""
    return name.split("@")[0].partition(":")[2] or "ce"


def _of_cell(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that all trainings of a cell share."""
    shared = {name: value for name, value in config.items() if name not in _FREE and name not in READERS}
    if config.get("trainable", "all") != "all":  # it changes after the warm-up, of every method
        shared["warmup"] = config["warmup"]
    shared = {name: value for name, value in shared.items() if not needs(name, config)}
    # two names of the same noise
    return shared | ({"noise": "symmetric"} if config["noise"] == "uniform" else {})


def merge(files: Iterable[Path]) -> tuple[list[Cell], int]:
    """The cells of these files, those of a recipe together, and the number of runs that were found twice.

    A method on a seed that two trainings of a cell have counts once if its parameters are the same to the bit. A training without
    a recipe joins the first cell with its settings, also one of a recipe.

    Raises:
        ValueError: a file cannot be used, or two trainings of a cell have the same method and seed with different parameters. The
            message is one line.
        OSError: a file cannot be read.
    """
    trainings = [(file, read(file)) for file in files]
    trainings.sort(key=lambda training: not training[1].get("recipe"))  # those of recipes first; others may join them
    cells: dict[tuple[str, str, str], Cell] = {}
    parts: dict[tuple[str, str, str], list[tuple[Path, dict[str, Any]]]] = {}
    for file, results in trainings:
        recipe, settings = results.get("recipe") or {}, json.dumps(_of_cell(results["config"]), sort_keys=True)
        key = (settings, recipe.get("name", ""), str(recipe.get("cell", "")))
        if not recipe:
            key = next((other for other in cells if other[0] == settings), key)
        if key not in cells:
            cells[key] = Cell(recipe.get("title") or setting(results["config"] | {"loss": "ce"}), results["config"], recipe)
        parts.setdefault(key, []).append((file, results))
    twice = sum(_fill(cell, parts[key]) for key, cell in cells.items())
    ordered = _ordered(list(cells.values()))
    _distinguish(ordered)
    return ordered, twice


def _ordered(cells: list[Cell]) -> list[Cell]:
    """The cells of each recipe one after another, in its order, or in that of their trainings if it says none."""
    recipes = list(dict.fromkeys(cell.recipe.get("name", "") for cell in cells))
    return sorted(cells, key=lambda cell: (recipes.index(cell.recipe.get("name", "")), cell.recipe.get("order", 0), cell.created))


def _fill(cell: Cell, parts: Sequence[tuple[Path, dict[str, Any]]]) -> int:
    """Puts the runs of these trainings into their cell. Returns the number of those that were there already."""
    twice = 0
    names = _names(parts)
    for file, results in parts:
        cell.folders.append(str(file.parent))
        cell.environments.append(results.get("environment", {}))
        cell.created = min(filter(None, (cell.created, str(results.get("created", "")))), default="")
        rows = (results.get("recipe") or {}).get("rows", {})
        given = [*results["config"]["methods"], *(run["method"] for run in results["runs"])]
        for method in dict.fromkeys(given):
            cell.runs_of.setdefault(names[file, method], {})
            if method in rows:
                cell.rows.setdefault(names[file, method], rows[method])
        for run in results["runs"]:
            name, seed = names[file, run["method"]], run["seed"]
            if seed not in cell.runs_of[name]:
                cell.runs_of[name][seed] = run
                cell.found_in[name, seed] = file
            elif _same(cell.runs_of[name][seed], run):
                twice += 1
            else:
                where = f"{cell.found_in[name, seed].parent} and {file.parent}"
                raise ValueError(
                    f"{name} on seed {seed} was trained twice with different parameters, in {where}; give only one of them"
                )
    cell.runs_of = {name: dict(sorted(runs.items())) for name, runs in cell.runs_of.items() if runs}
    taken: list[str] = [cell.rows.get(name, name) for name in cell.runs_of]
    for name in cell.runs_of:  # a row holds one method of a cell
        row = cell.rows.get(name, name)
        cell.rows[name] = row if taken.count(row) == 1 else f"{row} ({name})"
    return twice


def _same(a: Run, b: Run) -> bool:
    """Whether two runs are one training: the same parameters to the bit, or without them the same results."""
    if a["parameters"] is not None or b["parameters"] is not None:
        return a["parameters"] == b["parameters"]
    return all(a[key] == b[key] for key in ("accuracy", "balanced_accuracy", "per_class_recall", "epochs"))


def _names(parts: Sequence[tuple[Path, dict[str, Any]]]) -> dict[tuple[Path, str], str]:
    """{(file, method): its name in the cell}. A setting that it reads and that differs between the files is part of it."""
    names: dict[tuple[Path, str], str] = {}
    configs: dict[str, list[tuple[Path, str, dict[str, Any]]]] = {}
    for file, results in parts:
        config = results["config"]
        for method in dict.fromkeys([*config["methods"], *(run["method"] for run in results["runs"])]):
            configs.setdefault(canonical(method, config["loss"]), []).append((file, method, config))
    for name, trainings in configs.items():
        words, given = words_of(name), given_settings(name)
        read = [key for key, readers in READERS.items() if words & set(readers) and key not in given]
        differ = [key for key in read if len({_shown(config[key]) for _, _, config in trainings if key in config}) > 1]
        for file, method, config in trainings:
            names[file, method] = name + "".join(f"@{key}={_shown(config[key])}" for key in differ)
    return names


def _distinguish(cells: Sequence[Cell]) -> None:
    """Adds to equal titles the settings that differ between their cells."""
    for title in {cell.title for cell in cells}:
        same = [cell for cell in cells if cell.title == title]
        settings = [_of_cell(cell.config) for cell in same]
        names = dict.fromkeys(name for one in settings for name in one)
        differ = [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]
        for number, (cell, one) in enumerate(zip(same, settings), 1):
            if len(same) > 1:
                added = [f"{name} = {_shown(one[name])}" for name in differ if name in one]
                source = cell.recipe.get("recipe_title") or cell.recipe.get("name", "")
                cell.title = ", ".join([title, *(added or [source or f"no. {number}"])])


# ------------------------------------------------------------------------------------------------ numbers


def baseline_of(name: str, names: Iterable[str]) -> str | None:
    """The plain SGD of the same loss that a method is compared with.

    It has the loss and the schedules of the method, and no extra or setting that the method has not. Of several, the one with the
    most of them in common with it is taken. So sgd+sam:vs is the baseline of absgd+sam:vs, or else sgd:vs.

    Returns:
        One of `names`, or None if there is none, as for sgd:vs itself.

    Example:
        >>> from absgd_fast.experiments.merged import baseline_of
        >>> baseline_of("absgd:sce@lam=-1", ["sgd", "sgd:sce", "absgd:sce@lam=-1"])
        'sgd:sce'
    """
    found: list[tuple[int, str]] = []
    mine, my_settings = words_of(name), given_settings(name)
    for other in names:
        words, settings = words_of(other), given_settings(other)
        extra = (words - {BASELINE}) | {f"@{key}={value}" for key, value in settings.items()}
        allowed = mine | {f"@{key}={value}" for key, value in my_settings.items()}
        if other != name and base_of(other) == BASELINE and loss_of(other) == loss_of(name) and extra <= allowed:
            found.append((len(extra), other))
    return max(found, key=lambda one: one[0])[1] if found else None


def spread(values: Sequence[float | None]) -> dict[str, Any]:
    """{"mean", "std", "stderr", "n"} of the values that are numbers. std divides by n − 1, stderr is std / √n.

    Example:
        >>> from absgd_fast.experiments.merged import spread
        >>> spread([70.0, 72.0])
        {'mean': 71.0, 'std': 1.4142135623730951, 'stderr': 1.0, 'n': 2}
    """
    kept = [value for value in values if value is not None]
    return {"mean": mean(kept) if kept else None, "std": std(kept), "stderr": stderr(kept), "n": len(kept)}


def difference(mine: dict[int, Run], base: dict[int, Run], metric: str) -> dict[str, Any] | None:
    """spread() of the differences on the seeds that both have, and "verdict"; None if they share no seed.

    The verdict is "ahead" or "behind" if the mean is more than two standard errors away from 0, else "not told apart". A single
    seed tells nothing apart.
    """
    shared = [seed for seed in sorted(mine.keys() & base.keys()) if None not in (mine[seed][metric], base[seed][metric])]
    if not shared:
        return None
    found = spread([mine[seed][metric] - base[seed][metric] for seed in shared])
    if found["stderr"] is None or abs(found["mean"]) <= 2 * found["stderr"]:
        return found | {"verdict": ALIKE}
    return found | {"verdict": AHEAD if found["mean"] > 0 else BEHIND}


def numbers(cells: Sequence[Cell], twice: int = 0) -> dict[str, Any]:
    """The numbers of the report as one dict, ready for JSON.

    Returns:
        {"created", "runs": their number, "found_twice": twice, "recipes": [{"name", "title", "source"}], "cells": [...]}. A
        cell has "title", "recipe" (its name or None), "metric", "settings", "folders", "reported" ({row: [mean, deviation or
        None]}), and "methods": for each "method", "row", "seeds", spread() of "accuracy", "balanced_accuracy", "seconds" and
        "flipped_as_given" (of the last epoch), "baseline" (baseline_of), "to_baseline" and "to_sgd" (difference), "reported".
    """
    recipes = {cell.recipe["name"]: cell.recipe for cell in reversed(cells) if cell.recipe.get("name")}
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "runs": sum(len(runs) for cell in cells for runs in cell.runs_of.values()),
        "found_twice": twice,
        "recipes": [
            {"name": name, "title": recipes[name].get("recipe_title") or name, "source": recipes[name].get("source", "")}
            for name in dict.fromkeys(cell.recipe.get("name") for cell in cells)
            if name
        ],
        "cells": [
            {
                "title": cell.title,
                "recipe": cell.recipe.get("name"),
                "metric": cell.metric,
                "settings": _of_cell(cell.config),
                "folders": cell.folders,
                "reported": cell.recipe.get("reported") or {},
                "methods": [_of_method(name, cell) for name in cell.runs_of],
            }
            for cell in cells
        ],
    }


def _of_method(name: str, cell: Cell) -> dict[str, Any]:
    mine = cell.runs_of[name]
    baseline = baseline_of(name, cell.runs_of)
    memorised = [(run["epochs"].get("flipped_as_given") or [None])[-1] for run in mine.values()]
    return {
        "method": name,
        "row": cell.rows[name],
        "seeds": list(mine),
        **{metric: spread([run[metric] for run in mine.values()]) for metric in METRICS},
        "flipped_as_given": spread(memorised),
        "baseline": baseline,
        "to_baseline": difference(mine, cell.runs_of[baseline], cell.metric) if baseline else None,
        "to_sgd": difference(mine, cell.runs_of.get(BASELINE, {}), cell.metric) if name != BASELINE else None,
        "reported": (cell.recipe.get("reported") or {}).get(cell.rows[name]),
    }
