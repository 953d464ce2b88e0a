"""`absgd-fast train`: compares training methods on real data, keeps a checkpoint while it trains, and writes a report."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .audit import FOLDER as AUDITS
from .common import PROGRAM, Refused, check_writable, fail, plain_console, require
from .settings import add_experiment, add_methods, check_counts, check_effects, of_data, settings, shown, threads

if TYPE_CHECKING:
    from rich.console import Console

    from absgd_fast.experiments.checkpoint import Keeper
    from absgd_fast.experiments.config import Config
    from absgd_fast.experiments.data import Source
    from absgd_fast.experiments.placing import Processes
    from absgd_fast.experiments.train import Run

    from .common import Subparsers

OUT, CHECKPOINT = "absgd-results", "checkpoint.pt"


def add_parser(commands: Subparsers) -> None:
    """Adds the command to the program's parser."""
    train = commands.add_parser(
        "train",
        help="compare SGD, ABSGD and the reference package on imbalanced or wrongly labelled data",
        argument_default=argparse.SUPPRESS,  # options that were not given are absent, so --resume can compare the others
        allow_abbrev=False,
    )
    add_experiment(train)
    add_methods(train)
    train.add_argument("--out", metavar="DIR", help=f"folder for results.json and report.html (default: {OUT})")
    train.add_argument(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help=f"steps between two writes of DIR/{CHECKPOINT}; 0 writes it every 30 seconds (default: 0)",
    )
    train.add_argument(
        "--resume",
        metavar="DIR",
        help=f"continue the training of DIR/{CHECKPOINT} with its options; the results are those of a training without a stop",
    )
    train.add_argument(
        "--recipe",
        metavar="NAME",
        help="a table of a paper, or of your own NAME.toml: trains each of its cells into DIR/CELL, goes on where it stopped, "
        "and writes a report of all; list prints the names",
    )
    train.add_argument(
        "--cell", metavar="CELL", help="only these cells of the recipe, with commas; the beginning of a name will do"
    )
    train.add_argument(
        "--scale",
        metavar="SHARE",
        help="a small version of the recipe: share of the images and of the epochs, such as 0.1 or data=0.1,epochs=0.5",
    )
    train.add_argument(
        "--audit", action="store_true", help="record which training samples look mislabelled; `absgd-fast audit DIR` shows them"
    )
    train.set_defaults(run=run)


def run(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Trains, or goes on with a training; prints and writes the results."""
    given = vars(arguments)
    if "recipe" in given:
        from .recipe import run_recipe

        return run_recipe(given, argv, train, CHECKPOINT)
    if only := [f"--{name}" for name in ("cell", "scale") if name in given]:
        raise Refused(f"{only[0]} is for --recipe")
    return train(given, argv)


def train(given: Mapping[str, Any], argv: Sequence[str], recipe: Mapping[str, Any] | None = None) -> int:
    """Trains one experiment.

    Args:
        given: the options that were given, by name.
        argv: the words of the command line.
        recipe: of a cell of a recipe: what its report says about it (recipe.about).
    """
    import torch

    from absgd_fast.experiments import data
    from absgd_fast.experiments.config import Config
    from absgd_fast.experiments.placing import Placing, Processes
    from absgd_fast.experiments.train import check_processes, runs

    before = torch.get_num_threads()
    out = Path(given.get("resume", given.get("out", OUT)))
    file, saved = out / CHECKPOINT, {}
    try:
        if "resume" in given:
            if not file.is_file():
                return _already_complete(out, given)
            saved = _read(file, given)
        config = Config(**saved.get("config", {}) | settings(given))
        require("train", ["rich", "jinja2", "matplotlib", "scipy", *of_data(config)])
        config.check(resumed=bool(saved))
        if recipe is None and not saved:
            check_effects(given, [config])
        check_counts(given)
        check_writable(out)
        if not saved and file.exists():
            raise ValueError(
                f"out: {file} belongs to a training that is not finished; continue it with --resume {out}, give another folder, "
                "or delete the file"
            )
        source = data.load_source(config.dataset, config.data_root, **config.reading)
        config.check_source(source)
        fingerprint = source.fingerprint
        if saved and saved["source"] != fingerprint:
            raise ValueError(f"data: {file} was made with {saved['source']}; found {fingerprint}")
    except (ValueError, OSError) as error:
        raise Refused(error) from error
    about = {
        "config": asdict(config),
        "source": fingerprint,
        "threads": threads(config, given.get("threads", saved.get("threads")), before),
        "every": given.get("checkpoint_every", saved.get("every", 0)),
        "command": saved.get("command", [PROGRAM, *argv]),
        "environments": saved.get("environments", []),
        "recipe": saved.get("recipe", recipe),
    }
    torch.set_num_threads(about["threads"])
    processes = Processes(Placing(config.device).device)
    try:
        check_processes(config, processes)
        if processes.main:
            return _train_and_report(config, source, out, about, saved.get("state"), processes)
        for _ in runs(config, source, state=saved.get("state"), processes=processes):
            pass  # the first process prints and writes
        return 0
    except ValueError as error:
        raise Refused(error) from error
    finally:
        processes.close()
        torch.set_num_threads(before)


def _read(file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a checkpoint. Raises ValueError if an option that was given together with --resume differs from its own."""
    from absgd_fast.experiments.checkpoint import load
    from absgd_fast.experiments.config import Config

    saved = load(file)
    if missing := [name for name in ("config", "source", "threads", "state") if name not in saved]:
        raise ValueError(f"{file} was made by a script and not by this command: there is no {', '.join(missing)} in it")
    if unknown := saved["config"].keys() - settings(saved["config"]).keys():
        raise ValueError(f"{file} was made with the options {', '.join(sorted(unknown))}, which this absgd_fast does not know")
    # an option that is younger than the checkpoint had its default's effect
    _must_agree(file, asdict(Config()) | saved["config"] | {"threads": saved["threads"]}, given)
    return saved


def _already_complete(out: Path, given: Mapping[str, Any]) -> int:
    """Prints that the training in `out` is complete. Raises ValueError if it is not."""
    from absgd_fast.experiments.config import Config

    file = out / "results.json"
    try:
        results = json.loads(file.read_text())
        complete, was = results["partial"] is False, asdict(Config()) | results["config"]
        was |= {"lam": float(was["lam"]), "threads": results["environment"]["threads"]}
        was |= {name: tuple(value) for name, value in was.items() if isinstance(value, list)}
    except (OSError, ValueError, KeyError, TypeError):  # no results, or another program's
        complete = False
    if not complete:
        raise ValueError(
            f"resume: there is no {CHECKPOINT} in {out}; a training with --out {out} writes the first one after 30 seconds "
            "(see --checkpoint-every)"
        )
    _must_agree(file, was, given)
    print(f"{out}: this training is complete, see {file}; nothing was written")
    return 0


def _must_agree(file: Path, made_with: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises ValueError if an option that was given together with --resume is not the one that `file` was made with.

    The message is one line with both values.
    """
    wrong = []
    if "out" in given and Path(given["out"]).resolve() != file.parent.resolve():
        wrong.append(f"out: --resume {given['resume']} continues in that folder, got {given['out']}")
    for name, value in made_with.items():
        # data_root may differ, because the digest of the data shows whether the files are the same
        if name != "data_root" and given.get(name, value) != value:
            was = "without it" if value is None else f"with {shown(value)}"
            wrong.append(f"{name.replace('_', '-')}: {file} was made {was}, got {shown(given[name])}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _train_and_report(
    config: Config, source: Source, out: Path, about: dict[str, Any], state: dict[str, Any] | None, processes: Processes
) -> int:
    import torch

    from absgd_fast.experiments import report, summary
    from absgd_fast.experiments.checkpoint import Keeper

    console, finished = plain_console(), list["Run"]()
    if about["recipe"]:
        console.print(f"{about['recipe']['name']}, {about['recipe']['title']}")
    earlier, here = about["environments"], summary.environment(config, about["threads"])
    keeper = Keeper(out / CHECKPOINT, about | {"environments": earlier + [here] * (here not in earlier)}, about["every"])
    go_on = f"{PROGRAM} train --resume {shlex.quote(str(out))}"
    if state:
        _print_resumed(console, config, state, summary.changes([*earlier, here]))
    partial = kept = False
    try:
        _run_all(console, config, source, out, keeper, state, finished, processes)
    except KeyboardInterrupt:
        partial, kept = True, keeper.interrupted()
        if not finished:
            wrote = f"continue with {go_on}" if kept else "nothing was written"
            return fail(1, f"interrupted before the first run was finished; {wrote}")
    _forget_audits(out, {_audit_name(run["method"], run["seed"]) for run in finished if config.audit})
    results = report.collect(
        config, finished, command=about["command"], threads=torch.get_num_threads(), partial=partial, earlier=earlier
    )
    if about["recipe"]:
        results["recipe"] = about["recipe"]
    _print_results(console, results, report.write(results, out))
    if kept:
        console.print(f"continue with: {go_on}", soft_wrap=True)
    if not partial:
        keeper.done()
    return 1 if partial else 0


def _forget_audits(out: Path, kept: Collection[str]) -> None:
    """Removes the audits of an older training in `out`, whose other results are about to be replaced. kept: their names."""
    for file in (out / AUDITS).glob("*-*.pt"):
        if file.stem not in kept:
            file.unlink()


def _audit_name(method: str, seed: int) -> str:
    # no system refuses these letters in the name of a file, as some do with the colon and the slash of a specification
    return f"{re.sub('[:/]', '_', method)}-{seed}"


def _epochs_done(config: Config, state: dict[str, Any]) -> int:
    """The number of epochs that are finished in a checkpoint's state, over all runs."""
    running = state["running"]
    return len(state["finished"]) * config.epochs + (running["epoch"] if running else 0)


def _print_resumed(console: Console, config: Config, state: dict[str, Any], changed: dict[str, list[Any]]) -> None:
    """Prints where the training continues, and what has changed since it stopped."""
    from absgd_fast.experiments import report

    running, total = state["running"], config.seeds * len(config.methods)
    where = f"resumed: {len(state['finished'])} of {total} runs are finished"
    if running:
        where += f", seed {running['seed']} {running['method']} is in epoch {running['epoch'] + 1} of {config.epochs}"
    console.print(where)
    if changed:
        console.print(report.changes_note(changed))


def _run_all(
    console: Console,
    config: Config,
    source: Source,
    out: Path,
    keeper: Keeper,
    state: dict[str, Any] | None,
    finished: list[Run],
    processes: Processes,
) -> None:
    """Trains with a progress bar. It appends each run to `finished`, which still has them after Ctrl-C, and writes its audit."""
    from absgd_fast.experiments import audit
    from absgd_fast.experiments.train import runs
    from absgd_fast.selection.progress import bar

    before, trained = (state["finished"], _epochs_done(config, state)) if state else ([], 0)
    with bar(console, 18) as progress:
        task = progress.add_task("starting", total=config.seeds * len(config.methods) * config.epochs, completed=trained)

        def on_epoch(method: str, seed: int) -> None:
            progress.update(task, advance=1, description=f"seed {seed} {method}")

        def on_audit(method: str, seed: int, parts: dict[str, Any]) -> None:
            audit.save(out / AUDITS / f"{_audit_name(method, seed)}.pt", parts)

        for run in runs(config, source, on_epoch, keeper, state, on_audit, processes):
            finished.append(run)
            if not console.is_terminal and run not in before:  # without a terminal there is no progress bar
                console.print(
                    f"seed {run['seed']} {run['method']}: balanced accuracy "
                    f"{run['balanced_accuracy']:.1f} %, {run['seconds']:.2f} s",
                )


def _print_results(console: Console, results: dict[str, Any], paths: Sequence[Path]) -> None:
    """Prints the class counts, the table, the answer, the warnings, and the paths of the written files."""
    from absgd_fast.experiments import report

    console.print(report.class_counts(results))
    console.print(report.table(results))
    console.print(report.answers(results)["help"])
    for note in report.notes(results):
        console.print(note)
    console.print("written: " + ", ".join(map(str, paths)), soft_wrap=True)
