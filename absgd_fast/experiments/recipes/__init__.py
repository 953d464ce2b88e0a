"""The tables of the papers as files: which data, which settings, which methods, and the numbers that were reported.

A recipe is a TOML file. Each cell of it is one experiment of `absgd-fast train`, that is one data set of a table:

    title = "Imbalanced CIFAR"                   what the page is called
    source = "Qi et al. 2023, Table 1"           optional, as are the next three
    metric = "accuracy"                          the column of the results that the table reports: one of METRICS
    seeds_reported = 3                           how many runs the reported numbers are over
    notes = ["The batch size is not stated."]    one sentence for each thing that is not stated, or that differs here
    [settings]                                   fields of Config, for all cells
    epochs = 200
    [methods]                                    row of the table = specification, as for spec.parse
    "SGD (CE)" = "sgd:ce"
    "ABSGD (CE)" = "absgd:ce@lam=5"
    [cells.cifar10-lt-100]
    title = "CIFAR-10, long-tailed"
    settings = { dataset = "cifar10", imbalance = "lt", rho = 100 }
    methods = { "ABSGD (CE)" = "absgd:ce@lam=1" }    optional: other specifications for some rows; "" leaves the row out
    [cells.cifar10-lt-100.reported]                  optional: mean, or [mean, deviation], as printed
    "SGD (CE)" = [71.75, 0.75]
    "META (CE)" = 76.41                              rows that cannot be run here may stand here too

names() has the recipes of this package, load() reads one of them or a file of the user.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from ..choices import unknown
from ..spec import parse, without_effect

if TYPE_CHECKING:
    from ..config import Config

METRICS = ("accuracy", "balanced_accuracy")
_EXPECTED = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", tuple: "a list of numbers"}
_KEYS = {
    "title": str,
    "source": str,
    "metric": str,
    "seeds_reported": int,
    "notes": list,
    "settings": dict,
    "methods": dict,
    "cells": dict,
}
_CELL_KEYS = {"title": str, "settings": dict, "methods": dict, "reported": dict}

Reported = tuple[float, "float | None"]  # mean, and its deviation if one was printed


@dataclass(frozen=True)
class Cell:
    """One experiment of a recipe.

    Attributes:
        name: the key in [cells].
        title: for people.
        settings: fields of Config, those of the recipe and those of this cell. Lists are tuples, as in Config.
        methods: row of the table → specification, in the order of the table.
        reported: row of the table → (mean, deviation or None). It may have rows that methods does not have, and the other way
            round.
    """

    name: str
    title: str
    settings: dict[str, Any]
    methods: dict[str, str]
    reported: dict[str, Reported]

    def config(self, **changes: Any) -> Config:
        """The experiment of this cell. changes: fields of Config that are not those of the recipe, such as data_root.

        >>> from absgd_fast.experiments import recipes
        >>> recipes.load("digits-noise").cells["symmetric-0.4"].config(seeds=2).noise_rate
        0.4
        """
        from ..config import Config

        return Config(**{**self.settings, "methods": tuple(self.methods.values()), **changes})


@dataclass(frozen=True)
class Recipe:
    """A table of a paper, as the file says it.

    Attributes:
        name: that of the file, without its folder and .toml.
        title, source, notes: for people.
        metric: what the reported numbers are, one of METRICS.
        seeds_reported: the number of runs that they are over, or None.
        cells: name → Cell.
    """

    name: str
    title: str
    source: str
    metric: str
    seeds_reported: int | None
    notes: tuple[str, ...]
    cells: dict[str, Cell]

    def choose(self, text: str) -> tuple[Cell, ...]:
        """The cells with these names, or with names that begin like this, each once.

        Args:
            text: names, or beginnings that only one cell has; several with commas between them.

        Raises:
            ValueError: a name that no cell has, or a beginning of more than one. The message is one line.

        Example:
            >>> from absgd_fast.experiments import recipes
            >>> [cell.name for cell in recipes.load("digits-noise").choose("none,asym")]
            ['none', 'asymmetric-0.3']
        """
        chosen = {}
        for name in filter(None, (part.strip() for part in text.split(","))):
            found = [name] if name in self.cells else [cell for cell in self.cells if cell.startswith(name)]
            if len(found) > 1:
                raise ValueError(f"recipe {self.name}: {name!r} begins {len(found)} cells: {', '.join(found)}; name one of them")
            if not found:
                raise ValueError(f"recipe {self.name}: {unknown('cell', name, self.cells)}")
            chosen[found[0]] = self.cells[found[0]]
        if not chosen:
            raise ValueError(f"recipe {self.name}: no cell is named; use some of {', '.join(self.cells)}")
        return tuple(chosen.values())


def names() -> tuple[str, ...]:
    """The names of the recipes of this package.

    >>> "absgd-table1" in names()
    True
    """
    return tuple(
        sorted(file.name[: -len(".toml")] for file in resources.files(__name__).iterdir() if file.name.endswith(".toml"))
    )


def load(name_or_path: str) -> Recipe:
    """Reads a recipe and checks all of it: keys, types, settings, rows and specifications.

    Args:
        name_or_path: one of names(), or the path of a file that ends in .toml.

    Raises:
        ValueError: an unknown name, or a mistake in the file. The message is one line: where it is, what was given, and what is
            allowed. Whether the values of the settings are allowed is left to Config.check.
        FileNotFoundError: no such file.

    Example:
        >>> from absgd_fast.experiments import recipes
        >>> recipe = recipes.load("absgd-table1")
        >>> recipe.cells["cifar10-lt-100"].reported["SGD (CE)"]
        (71.75, 0.75)
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no recipe file {name_or_path}; give the path of a TOML file, or one of {', '.join(names())}"
            )
        content = path.read_bytes()
    elif name_or_path in names():
        content = (resources.files(__name__) / f"{name_or_path}.toml").read_bytes()
    else:
        raise ValueError(f"{unknown('recipe', name_or_path, names())}, or the path of a file that ends in .toml")
    try:
        given = tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {name_or_path}: it is not a text in UTF-8 ({error.reason} at byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe {name_or_path}: it is not TOML: {' '.join(str(error).split())}") from None
    return _recipe(name_or_path, given)


# ------------------------------------------------------------------------------------------------ smaller experiments


def parse_scale(text: str) -> tuple[float, float]:
    """The shares of the data and of the epochs: one number for both, or data=NUMBER,epochs=NUMBER with one or both of them.

    Raises:
        ValueError: anything else, or a number outside (0, 1]. The message is one line.

    Example:
        >>> from absgd_fast.experiments.recipes import parse_scale
        >>> parse_scale("0.1"), parse_scale("data=0.1,epochs=0.2"), parse_scale("epochs=0.5")
        ((0.1, 0.1), (0.1, 0.2), (1.0, 0.5))
    """
    shares: dict[str, float] = {}
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        name, equals, value = part.rpartition("=")
        which = [name.strip()] if equals else ["data", "epochs"]
        try:
            share = float(value)
        except ValueError:
            share = math.nan
        if not set(which) <= {"data", "epochs"} or shares.keys() & set(which) or not 0 < share <= 1:
            raise ValueError(f"scale: got {text!r}, expected a share in (0, 1] such as 0.1, or data=0.1,epochs=0.2")
        shares |= dict.fromkeys(which, share)
    return shares.get("data", 1.0), shares.get("epochs", 1.0)


def scaled(settings: Mapping[str, Any], data: float, epochs: float, source_n_max: int, natural: bool = False) -> dict[str, Any]:
    """The settings of a smaller experiment, for a first look at a table. The sizes of the batches stay.

        per_class = max(1, round(n_max · data))       epochs = max(1, round(epochs · share))

    Args:
        settings: fields of Config, as Cell.settings. Its per_class is n_max, if it has one.
        data: the share of the training images that is kept, in (0, 1]. 1 leaves per_class as it is.
        epochs: the share of the epochs, in (0, 1]. It holds for those of a classifier stage too.
        source_n_max: n_max of data.Source, the images that every class has.
        natural: of data.Source. Then data_share keeps this share of each class, and the imbalance stays.

    Example:
        >>> from absgd_fast.experiments.recipes import scaled
        >>> scaled({"epochs": 200, "batch_size": 128}, data=0.1, epochs=0.25, source_n_max=5000)
        {'epochs': 50, 'batch_size': 128, 'per_class': 500, 'stage_epochs': 2}
    """
    from ..config import Config

    new = dict(settings)
    if data != 1 and natural and "per_class" not in new:
        new["data_share"] = data
    elif data != 1:
        new["per_class"] = max(1, round(new.get("per_class", source_n_max) * data))
    if epochs != 1:
        for name in ("epochs", "stage_epochs"):
            new[name] = max(1, round(new.get(name, getattr(Config, name)) * epochs))
    return new


# ------------------------------------------------------------------------------------------------ checking a file


def _recipe(name: str, given: dict[str, Any]) -> Recipe:
    """The Recipe of what a TOML file holds."""
    where = f"recipe {name}: "
    _check_keys(given, _KEYS, where, ("title", "methods", "cells"))
    metric, notes, seeds = given.get("metric", METRICS[0]), given.get("notes", []), given.get("seeds_reported")
    if metric not in METRICS:
        raise ValueError(f"{where}{unknown('metric', metric, METRICS)}")
    if not all(isinstance(note, str) for note in notes):
        raise ValueError(f"{where}notes: expected a list of texts, got {notes!r}")
    if seeds is not None and seeds < 1:
        raise ValueError(f"{where}seeds_reported: got {seeds}, expected at least 1")
    settings = _settings(given.get("settings", {}), f"{where}[settings]")
    rows = _rows(given["methods"], f"{where}[methods]")
    if "" in rows.values():
        raise ValueError(f'{where}[methods]: only a cell can leave a row out with ""')
    for part in ("methods", "cells"):
        if not given[part]:
            raise ValueError(f"{where}[{part}] is empty; a recipe has at least one")
    cells = {key: _cell(key, cell, settings, rows, where) for key, cell in given["cells"].items()}
    _check_effects(settings, [(cell.settings, cell.methods) for cell in cells.values()], f"{where}[settings]")
    return Recipe(Path(name).stem, given["title"], given.get("source", ""), metric, seeds, tuple(notes), cells)


def _cell(name: str, given: Any, settings: dict[str, Any], rows: dict[str, str], where: str) -> Cell:
    """The Cell `name`. settings, rows: those of the recipe."""
    here = f"{where}[cells.{name}]"
    if not isinstance(given, dict):
        raise ValueError(f"{here}: expected a table, got {given!r}")
    if "," in name:
        raise ValueError(f"{here}: the name of a cell has no comma, which separates names")
    _check_keys(given, _CELL_KEYS, f"{here}: ", ("title",))
    changed = _rows(given.get("methods", {}), f"{where}[cells.{name}.methods]")
    for row in changed:
        if row not in rows:
            raise ValueError(f"{where}[cells.{name}.methods]: {unknown('row', row, rows)}, which stand in [methods]")
    own = _settings(given.get("settings", {}), f"{where}[cells.{name}.settings]")
    settings = {**settings, **own}
    methods = {row: text for row, text in {**rows, **changed}.items() if text}
    if not methods:
        raise ValueError(f"{here}: all rows are left out")
    _check_methods(methods, settings, here)
    _check_effects(own, [(settings, methods)], f"{where}[cells.{name}.settings]")
    reported = {
        row: _reported(value, f"{where}[cells.{name}.reported] {row!r}") for row, value in given.get("reported", {}).items()
    }
    return Cell(name, given["title"], settings, methods, reported)


def _check_effects(given: dict[str, Any], cells: Sequence[tuple[dict[str, Any], dict[str, str]]], where: str) -> None:
    """Raises ValueError for a setting that was given and has no effect in any of these cells, (settings, methods)."""
    from ..config import Config

    configs = [Config(**{**settings, "methods": tuple(methods.values())}) for settings, methods in cells]
    for name, why in without_effect(given, configs).items():
        raise ValueError(f"{where}: {name} = {given[name]!r} changes nothing here; {why}")


def _check_methods(methods: dict[str, str], settings: dict[str, Any], here: str) -> None:
    """Raises ValueError unless each row is a specification that no other row has."""
    from ..config import Config

    config, row_of = Config(**settings), dict[str, str]()
    for row, text in methods.items():
        try:
            parse(text, config)
        except ValueError as error:
            raise ValueError(f"{here} {row!r}: {error}") from None
        if text in row_of:
            raise ValueError(
                f"{here}: {row_of[text]!r} and {row!r} are both {text!r}; results are named by it, so give one of them"
            )
        row_of[text] = row


def _check_keys(given: dict[str, Any], kinds: Mapping[str, type], where: str, needed: Collection[str]) -> None:
    """Raises ValueError for an unknown or missing key, and for one with a value of another kind."""
    names = {**_EXPECTED, list: "a list", dict: "a table"}
    for key, value in given.items():
        if key not in kinds:
            raise ValueError(f"{where}{unknown('key', key, kinds)}")
        if type(value) is not kinds[key]:
            raise ValueError(f"{where}{key}: expected {names[kinds[key]]}, got {value!r}")
    for key in needed:
        if key not in given:
            raise ValueError(f"{where}it has no {key}; expected {', '.join(needed)}")


def _rows(given: dict[str, Any], where: str) -> dict[str, str]:
    for row, text in given.items():
        if not isinstance(text, str):
            raise ValueError(f'{where} {row!r}: expected a specification such as "absgd:ce@lam=5", got {text!r}')
    return given


def _reported(value: Any, where: str) -> Reported:
    """(mean, deviation or None)."""
    numbers = value if isinstance(value, list) else [value]
    if not (1 <= len(numbers) <= 2 and all(type(n) in (int, float) and math.isfinite(n) for n in numbers)):
        raise ValueError(f"{where}: expected a number, or [mean, deviation], got {value!r}")
    return float(numbers[0]), float(numbers[1]) if len(numbers) == 2 else None


def _settings(given: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of Config in a table, each with its type."""
    from ..config import Config

    kinds = {name: _kind(hint) for name, hint in get_type_hints(Config).items()}
    allowed = [field.name for field in fields(Config) if field.name != "methods"]
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name == "methods":
            raise ValueError(f"{where}: methods are no setting of a recipe; give each of them a row in [methods]")
        if name not in allowed:
            raise ValueError(f"{where}: {unknown('setting', name, allowed)}")
        kind = kinds[name]
        if kind is tuple and isinstance(value, list) and all(type(v) in (int, float) for v in value):
            settings[name] = tuple(float(v) for v in value)
        elif kind is float and type(value) in (int, float):
            settings[name] = float(value)
        elif kind not in (float, tuple) and type(value) is kind:
            settings[name] = value
        else:
            raise ValueError(f"{where} {name}: expected {_EXPECTED[kind]}, got {value!r}")
    return settings


def _kind(hint: Any) -> type:
    """The type of a field of Config: the T of T | None, and tuple for tuple[T, ...]."""
    if get_origin(hint) in (Union, UnionType):
        return next(arg for arg in get_args(hint) if arg is not type(None))
    return get_origin(hint) or hint
