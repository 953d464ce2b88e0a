"""The command line: `absgd-fast doctor | train | bench`, or `python -m absgd_fast`.

Exit codes: 0 = done, 1 = it failed while running or was interrupted, 2 = bad arguments, or something must be installed
first. A bad argument is reported in one line on stderr before anything is written.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

    from absgd_fast.experiments.checkpoint import Keeper
    from absgd_fast.experiments.data import Source
    from absgd_fast.experiments.train import Config, Run

PROGRAM = "absgd-fast"
OUT, CHECKPOINT = "absgd-results", "checkpoint.pt"


class Refused(Exception):
    """The arguments cannot be followed. The user gets the text in one line, and the exit code is 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message} (see {self.prog} --help)")  # argparse itself would first print many lines of usage


def main(argv: Iterable[object] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments without the program's name. None takes them from sys.argv.

    Returns:
        The exit code: 0 = done, 1 = failed while running, 2 = bad arguments.

    Example:
        >>> from absgd_fast.__main__ import main
        >>> main(["train", "--lam", "0", "--methods", "sgd,absgd"])
        2
    """
    given = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    try:
        # the benchmarks parse everything after `bench` themselves
        if given[:1] == ["bench"]:
            return _bench(given[1:])
        arguments = _parser().parse_args(_join_numbers(given))
        return arguments.run(arguments, given)
    except Refused as refusal:
        return _fail(2, refusal)
    except KeyboardInterrupt:
        return _fail(1, "interrupted")
    except OSError as error:
        return _fail(1, error)
    except SystemExit as leaving:  # --help, or the benchmarks' own options
        return _fail(1, leaving) if isinstance(leaving.code, str) else leaving.code or 0


def _fail(code: int, message: object) -> int:
    print(f"{PROGRAM}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _parser() -> _Parser:
    parser = _Parser(PROGRAM, description="Checks, tries and measures Attentional-Biased SGD for PyTorch.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="doctor | train | bench", required=True, parser_class=_Parser)

    doctor = commands.add_parser("doctor", help="show which backends run here, and why the others do not", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)

    train = commands.add_parser(
        "train",
        help="compare SGD, ABSGD and the reference package on imbalanced or wrongly labelled data",
        argument_default=argparse.SUPPRESS,  # options that were not given are absent, so --resume can compare the others
        allow_abbrev=False,
    )
    _add_settings(train)
    train.add_argument("--out", metavar="DIR", help=f"folder for results.json and report.html (default: {OUT})")
    train.add_argument("--threads", type=int, help="number of CPU threads (default: 1 for digits, torch's choice for CIFAR)")
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
    train.set_defaults(run=_train)

    commands.add_parser("bench", help="time the kernels against their competitors (needs a source checkout)")
    return parser


def _add_settings(train: argparse.ArgumentParser) -> None:
    """Adds an option for each field of train.Config, with its default."""
    from absgd_fast.experiments.methods import METHODS
    from absgd_fast.experiments.train import Config
    from absgd_fast.meta import METHODS as L2RW

    defaults = Config()

    def add(name: str, text: str) -> None:
        value = getattr(defaults, name.replace("-", "_"))
        train.add_argument(f"--{name}", type=type(value), help=f"{text} (default: {value})")

    add("dataset", "digits (of scikit-learn), digits-9-4 (only its nines and fours), cifar10 or cifar100")
    train.add_argument("--data-root", metavar="DIR", help="folder of CIFAR's python files (cifar10 and cifar100 only)")
    add("imbalance", "none, lt (long-tailed) or step")
    add("rho", "number of images of the largest class over that of the smallest")
    add("noise", "none, symmetric (also called uniform), asymmetric or background")
    add("noise-rate", "probability that a training label is flipped")
    add("loss", "the loss function; only ce, cross-entropy")
    methods = _shown(defaults.methods)
    train.add_argument(
        "--methods", type=_names, help=f"one or more of {', '.join(METHODS)}; separate them by commas (default: {methods})"
    )
    add("lam", "λ in the unit of the loss: > 0 against imbalance, < 0 against wrong labels")
    add("gamma", "weight γ of the current batch in the moving average")
    add("mix", "weight of the plain mean loss, which is added")
    add("warmup", "fraction of the epochs that are trained plainly (λ = inf) at first")
    add("beta", "cvar: fraction of the batch that gets weight")
    add("reg", "cvar: strength of its KL penalty")
    add("chi2-rho", "chi2: radius of the chi-squared ball")
    add("eta", "groupdro: step size of its weights; the groups are the labels")
    add("clean", "l2rw: number of training images of each class whose right label it knows")
    add("l2rw-method", f"l2rw: how it computes its weights: {', '.join(L2RW)}")
    add("model", "linear, mlp, cnn, or resnet32 (CIFAR only)")
    add("epochs", "passes over the training set")
    add("lr", "learning rate, divided by 10 after 60 %% and again after 80 %% of the epochs")
    add("batch-size", "images per step")
    add("weight-decay", "weight decay, as in torch.optim.SGD")
    add("seeds", "number of runs per method, each on a split of its own")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _join_numbers(argv: Sequence[str]) -> list[str]:
    """["--lam", "-1e-1"] → ["--lam=-1e-1"], because argparse takes numbers such as -1e-1 and -inf for options."""
    joined: list[str] = []
    for argument in argv:
        try:
            negative = argument.startswith("-") and float(argument) is not None
        except ValueError:
            negative = False
        if negative and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += "=" + argument
        else:
            joined.append(argument)
    return joined


# ------------------------------------------------------------------------------------------------ doctor


def _doctor(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    from absgd_fast import _backend

    found = _backend.report()
    # Without rich it prints JSON too, because this command must also run on a broken installation.
    if arguments.json or importlib.util.find_spec("rich") is None:
        print(json.dumps(found, indent=1, default=str))
        return 0
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    def shown(value: object) -> Text:
        if isinstance(value, bool):
            return Text("yes", "green") if value else Text("no", "red")
        if isinstance(value, (list, tuple)):
            return Text(", ".join(map(str, value)) or "none")
        return Text("none" if value is None else str(value), "cyan")

    def grow(branch: Tree, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                grow(branch.add(Text(str(name), "bold")), value)
            else:
                branch.add(Text(f"{name}: ") + shown(value))

    tree = Tree(Text("absgd_fast", "bold"))
    grow(tree, found)
    Console().print(tree)
    return 0


# ------------------------------------------------------------------------------------------------ train


def _train(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    import torch

    from absgd_fast.experiments import data
    from absgd_fast.experiments.train import Config

    given, before = vars(arguments), torch.get_num_threads()
    out = Path(given.get("resume", given.get("out", OUT)))
    file, saved = out / CHECKPOINT, {}
    try:
        if "resume" in given:
            if not file.is_file():
                return _already_complete(out, given)
            saved = _read(file, given)
        config = Config(**saved.get("config", {}) | _settings(given))
        _require(["rich", "jinja2", "matplotlib", "scipy"] + ["sklearn"] * config.dataset.startswith("digits"))
        config.check()
        for name, least in (("threads", 1), ("checkpoint_every", 0)):
            if name in given and given[name] < least:
                raise ValueError(f"{name.replace('_', '-')}: got {given[name]}, expected at least {least}")
        _check_writable(out)
        if not saved and file.exists():
            raise ValueError(
                f"out: {file} belongs to a training that is not finished; continue it with --resume {out}, give another folder, "
                "or delete the file"
            )
        source = data.load_source(config.dataset, config.data_root)
        fingerprint = source.fingerprint
        if saved and saved["source"] != fingerprint:
            raise ValueError(f"data: {file} was made with {saved['source']}; found {fingerprint}")
    except (ValueError, FileNotFoundError) as error:
        raise Refused(error) from error
    about = {
        "config": asdict(config),
        "source": fingerprint,
        # On digits' small networks a second thread gains little (0.57 s per run instead of 0.60). On a busy machine the two
        # threads wait for each other, and a run takes 13 s.
        "threads": given.get("threads", saved.get("threads", 1 if config.dataset.startswith("digits") else before)),
        "every": given.get("checkpoint_every", saved.get("every", 0)),
        "command": saved.get("command", [PROGRAM, *argv]),
        "environments": saved.get("environments", []),
    }
    torch.set_num_threads(about["threads"])
    try:
        return _train_and_report(config, source, out, about, saved.get("state"))
    finally:
        torch.set_num_threads(before)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    from absgd_fast.experiments.train import Config

    return {field.name: options[field.name] for field in fields(Config) if field.name in options}


def _read(file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a checkpoint. Raises ValueError if an option that was given together with --resume differs from its own."""
    from absgd_fast.experiments.checkpoint import load

    saved = load(file)
    if missing := [name for name in ("config", "source", "threads", "state") if name not in saved]:
        raise ValueError(f"{file} was made by a script and not by this command: there is no {', '.join(missing)} in it")
    if unknown := saved["config"].keys() - _settings(saved["config"]).keys():
        raise ValueError(f"{file} was made with the options {', '.join(sorted(unknown))}, which this absgd_fast does not know")
    _must_agree(file, saved["config"] | {"threads": saved["threads"]}, given)
    return saved


def _already_complete(out: Path, given: Mapping[str, Any]) -> int:
    """Prints that the training in `out` is complete. Raises ValueError if it is not."""
    file = out / "results.json"
    try:
        results = json.loads(file.read_text())
        complete, was = results["partial"] is False, results["config"] | {"threads": results["environment"]["threads"]}
        was |= {"lam": float(was["lam"]), "methods": tuple(was["methods"])}
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
            wrong.append(f"{name.replace('_', '-')}: {file} was made with {_shown(value)}, got {_shown(given[name])}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _train_and_report(config: Config, source: Source, out: Path, about: dict[str, Any], state: dict[str, Any] | None) -> int:
    import torch
    from rich.console import Console

    from absgd_fast.experiments import report, summary
    from absgd_fast.experiments.checkpoint import Keeper

    console, finished = Console(), list["Run"]()
    earlier, here = about["environments"], summary.environment(config, about["threads"])
    keeper = Keeper(out / CHECKPOINT, about | {"environments": earlier + [here] * (here not in earlier)}, about["every"])
    go_on = f"{PROGRAM} train --resume {shlex.quote(str(out))}"
    if state:
        _print_resumed(console, config, state, summary.changes([*earlier, here]))
    partial = kept = False
    try:
        _run_all(console, config, source, keeper, state, finished)
    except KeyboardInterrupt:
        partial, kept = True, keeper.interrupted()
        if not finished:
            wrote = f"continue with {go_on}" if kept else "nothing was written"
            return _fail(1, f"interrupted before the first run was finished; {wrote}")
    results = report.collect(
        config, finished, command=about["command"], threads=torch.get_num_threads(), partial=partial, earlier=earlier
    )
    _print_results(console, results, report.write(results, out))
    if kept:
        console.print(f"continue with: {go_on}", highlight=False, soft_wrap=True)
    if not partial:
        keeper.done()
    return 1 if partial else 0


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
    console.print(where, highlight=False)
    if changed:
        console.print(report.changes_note(changed), highlight=False)


def _run_all(
    console: Console, config: Config, source: Source, keeper: Keeper, state: dict[str, Any] | None, finished: list[Run]
) -> None:
    """Trains with a progress bar. It appends each run to `finished`, which still has them after Ctrl-C."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from absgd_fast.experiments.train import runs

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    before, trained = (state["finished"], _epochs_done(config, state)) if state else ([], 0)
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting", total=config.seeds * len(config.methods) * config.epochs, completed=trained)

        def on_epoch(method: str, seed: int) -> None:
            progress.update(bar, advance=1, description=f"seed {seed} {method}")

        for run in runs(config, source, on_epoch, keeper, state):
            finished.append(run)
            if not console.is_terminal and run not in before:  # without a terminal there is no progress bar
                console.print(
                    f"seed {run['seed']} {run['method']}: balanced accuracy "
                    f"{run['balanced_accuracy']:.1f} %, {run['seconds']:.2f} s",
                    highlight=False,
                )


def _print_results(console: Console, results: dict[str, Any], paths: Sequence[Path]) -> None:
    """Prints the table, the answer, the warnings, and the paths of the written files."""
    from absgd_fast.experiments import report

    console.print(report.table(results))
    console.print(report.answers(results)["help"], highlight=False)
    for note in report.notes(results):
        console.print(note, highlight=False)
    console.print("written: " + ", ".join(map(str, paths)), highlight=False, soft_wrap=True)


def _require(modules: Sequence[str]) -> None:
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise Refused(f'train needs {", ".join(missing)}: pip install "absgd_fast[experiments]"')


def _check_writable(out: Path) -> None:
    """Raises ValueError if the folder for the results cannot be written to.

    This is checked before an hour of training. The folder itself is created when there is something to write.
    """
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"out: {existing} is a file; give a folder, new or existing")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"out: {existing} cannot be written to; give another folder")


# ------------------------------------------------------------------------------------------------ bench


def _bench(argv: Sequence[str]) -> int:
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "run.py").is_file():
        raise Refused("the benchmarks are not part of the installed package: run bench from a source checkout")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.run").main(argv)


if __name__ == "__main__":
    sys.exit(main())
