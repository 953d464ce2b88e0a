"""`absgd-fast tune`: finds λ for a data set and a model by a held-out part of the training images, and goes on after a kill."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import PROGRAM, Refused, check_writable, fail, plain_console, require
from .settings import add_experiment, check_counts, check_effects, names, of_data, settings, threads

if TYPE_CHECKING:
    from .common import Subparsers

OUT = "absgd-tune"


def add_parser(commands: Subparsers) -> None:
    """Adds the command to the program's parser."""
    from absgd_fast.selection.candidates import DEFAULTS

    tune = commands.add_parser(
        "tune",
        help="find λ: train a few candidates, and let held-out training images decide",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_experiment(tune)
    tune.add_argument(
        "--goal",
        help="accuracy (wrong labels) or balanced (rare classes) (default: balanced with --imbalance, also if there is --noise "
        "too; else accuracy)",
    )
    defaults = "; ".join(f"{goal}: {','.join(candidates)}" for goal, candidates in DEFAULTS.items())
    tune.add_argument(
        "--candidates",
        type=names,
        help="inf (the plain mean), numbers such as -0.5 (a ramp to this λ over 30 %% of the epochs) and ess0.7 (TargetESS), "
        f"with commas; the first one wins ties (default for {defaults})",
    )
    tune.add_argument("--holdout", type=float, help="share of the training images that is held out (default: 0.1)")
    tune.add_argument("--seed", type=int, help="determines the images, their wrong labels, and the training (default: 0)")
    tune.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help="steps between two checkpoints of a training; 0 writes one every 30 seconds (default: 0)",
    )
    tune.add_argument(
        "--out",
        metavar="DIR",
        help=f"folder for the results and the scores; the same command goes on with it after a stop (default: {OUT})",
    )
    tune.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Tunes, or goes on with it; prints and writes the results."""
    import torch

    from absgd_fast.experiments import data, tune
    from absgd_fast.experiments.train import Config

    given, before = vars(arguments), torch.get_num_threads()
    out = Path(given.get("out", OUT))
    try:
        config = Config(**settings(given), methods=("absgd",))
        require("tune", ["rich", "jinja2", "matplotlib", *of_data(config)])
        config.check()
        check_effects(given, [config])
        options = _options(given)
        check_writable(out)
        source = data.load_source(config.dataset, config.data_root, **config.reading)
        config.check_source(source)
    except (ValueError, OSError) as error:
        raise Refused(error) from error
    used = threads(config, given.get("threads"), before)
    torch.set_num_threads(used)
    more: dict[str, Any] = {"threads": used, "command": [PROGRAM, *argv], "progress": _progress(config.epochs)}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"select: \d+ of \d+ candidates failed", UserWarning)  # the report says it
            results = tune.tune(config, source, **options, out=out, **more)
    except ValueError as error:
        raise Refused(error) from error
    except RuntimeError as error:
        return fail(1, error)
    except KeyboardInterrupt:
        return fail(1, f"interrupted; the scores are in {out}, and the same command goes on with them")
    finally:
        torch.set_num_threads(before)
    _print(results, tune.write(results, out))
    return 0


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of tune.tune. Raises ValueError for a bad one."""
    from absgd_fast.selection import Candidate
    from absgd_fast.selection.candidates import DEFAULTS

    rules = {
        "goal": (given.get("goal", "accuracy") in DEFAULTS, f"one of {', '.join(DEFAULTS)}"),
        "holdout": (0 < given.get("holdout", 0.1) < 1, "a share of the training images in (0, 1)"),
        "seed": (given.get("seed", 0) >= 0, "at least 0"),
    }
    for name, (right, expected) in rules.items():
        if not right:
            raise ValueError(f"{name}: got {given[name]}, expected {expected}")
    check_counts(given)
    options: dict[str, Any] = {name: given[name] for name in ("goal", "holdout", "seed") if name in given}
    if "candidates" in given:
        options["candidates"] = [Candidate.named(text) for text in given["candidates"]]
    return options | {"every": given.get("checkpoint_every", 0)}


def _progress(epochs: int) -> bool | Callable[[str, int, float], object]:
    """A bar on a terminal, or else a line whenever a quarter of a training is done."""
    if sys.stderr.isatty():
        return True
    quarters = {math.ceil(epochs * quarter / 4) for quarter in (1, 2, 3, 4)}

    def line(name: str, epoch: int, score: float) -> None:
        if epoch in quarters:
            print(f"{name}: epoch {epoch} of {epochs}, {100 * score:.1f} %", flush=True)

    return line


def _print(results: dict[str, Any], paths: Sequence[Path]) -> None:
    """Prints the table, the choice, the warnings, the code that uses it, and the paths of the written files."""
    from absgd_fast.experiments import tune_report

    console, answers = plain_console(), tune_report.answers(results)
    console.print(tune_report.table(results))
    for text in (f"λ: {answers['choice']} {answers['why']}", answers["final"], *tune_report.notes(results)):
        console.print(text)
    print(results["code"])
    console.print("written: " + ", ".join(map(str, paths)), soft_wrap=True)
