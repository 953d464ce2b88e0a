"""`absgd-fast train --recipe NAME`: the cells of a recipe, one training after the other, and the report of them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Refused
from .settings import check_effects, settings

if TYPE_CHECKING:
    from absgd_fast.experiments.recipes import Cell, Recipe

OF_RECIPE = ("recipe", "cell", "scale", "out", "resume")


Train = Callable[[Mapping[str, Any], Sequence[str], Mapping[str, Any]], int]


def run_recipe(given: Mapping[str, Any], argv: Sequence[str], train: Train, checkpoint: str) -> int:
    """Trains the cells that are chosen into OUT/CELL. A cell that is complete stays, and one that was stopped goes on.

    Options that are given stand above those of the recipe.

    Args:
        given, argv: the options that were given, by name, and the words of the command line.
        train: trains one cell, as train.train.
        checkpoint: the name of the file that an unfinished training has in its folder.
    """
    from absgd_fast.experiments import recipes
    from absgd_fast.experiments.config import Config
    from absgd_fast.experiments.placing import Placing, Processes

    from . import report

    if given["recipe"] == "list":
        for name in recipes.names():
            recipe = recipes.load(name)
            print(f"{name}: {recipe.title} ({recipe.source})")
        return 0
    if "resume" in given:
        raise Refused("resume: the same command with --recipe goes on by itself; leave --resume out")
    try:
        recipe = recipes.load(given["recipe"])
        cells = recipe.choose(given["cell"]) if "cell" in given else list(recipe.cells.values())
        scale = recipes.parse_scale(given["scale"]) if "scale" in given else None
        planned = [(cell, _options(cell, given, scale)) for cell in cells]  # all of them, before the first one is trained
        check_effects(given, [Config(**settings(options)) for _, options in planned])
    except (ValueError, OSError) as error:
        raise Refused(error) from error
    out = Path(given.get("out", f"absgd-{recipe.name}"))
    processes = Processes(Placing(planned[0][1]["device"]).device)  # of all cells: torch starts one group only from a launch
    try:
        for cell, options in planned:
            folder = out / cell.name
            begun = (folder / checkpoint).is_file() or (folder / "results.json").is_file()
            code = train(options | {"resume" if begun else "out": str(folder)}, argv, about(recipe, cell, scale))
            if code:
                return code
    finally:
        processes.close()
    # The first process writes the results, and the others may be here before it is done.
    return report.write([str(out)], out) if len(cells) > 1 and processes.main else 0


def _options(cell: Cell, given: Mapping[str, Any], scale: tuple[float, float] | None) -> dict[str, Any]:
    """The options of a cell: those of the recipe, made small, and above them those that were given."""
    from absgd_fast.experiments import data, recipes
    from absgd_fast.experiments.config import Config

    options = cell.settings | {"methods": tuple(cell.methods.values())}
    try:
        config = Config(**options | settings(given))
        config.check()
        if scale is not None:
            source = data.load_source(config.dataset, config.data_root, **config.reading)
            options = recipes.scaled(options, *scale, source.n_max, source.natural)
    except (ValueError, OSError) as error:
        raise Refused(f"{cell.name}: {error}") from error
    # All settings, those with their defaults too: a training that was made with another value is not this one.
    whole = asdict(Config(**options | settings(given)))
    return whole | {name: value for name, value in given.items() if name not in OF_RECIPE}


def about(recipe: Recipe, cell: Cell, scale: tuple[float, float] | None) -> dict[str, Any]:
    """What a report says about a cell: its place in the recipe, and the numbers that the paper reports."""
    small = [] if scale is None else [f"Made small: {scale[0]:g} of the images of each class, and {scale[1]:g} of the epochs."]
    return {
        "name": recipe.name,
        "cell": cell.name,
        "order": list(recipe.cells).index(cell.name),
        "title": cell.title,
        "recipe_title": recipe.title,
        "source": recipe.source,
        "metric": recipe.metric,
        "notes": [*small, *recipe.notes],
        "seeds_reported": recipe.seeds_reported,
        "rows": {spec: row for row, spec in cell.methods.items()},
        "reported": {row: list(value) for row, value in cell.reported.items()},
    }
