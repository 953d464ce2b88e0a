"""The command line: `absgd-fast doctor | train | bench`, also as `python -m absgd_fast`.

Exit codes: 0 done, 1 a failure while running (Ctrl-C is one), 2 bad arguments or something to install first. A bad
argument costs one line on stderr, and nothing has been written by then.
"""

import argparse
import importlib
import importlib.util
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

PROGRAM = "absgd-fast"


class Refused(Exception):
    """What was asked for cannot be done as asked: one line for the user, exit code 2."""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"{message} (see {self.prog} --help)")  # argparse would print the usage first, many lines


def main(argv=None):
    """Runs one command.

    Args:
        argv: the arguments without the program's name; None takes them from sys.argv.

    Returns:
        The exit code: 0 done, 1 a failure while running, 2 bad arguments.

    Example:
        >>> from absgd_fast.__main__ import main
        >>> main(["train", "--lam", "0", "--methods", "sgd,absgd"])
        2
    """
    argv = sys.argv[1:] if argv is None else [str(argument) for argument in argv]
    try:
        # everything behind `bench` is for the benchmarks, which know their own options
        if argv[:1] == ["bench"]:
            return _bench(argv[1:])
        arguments = _parser().parse_args(_join_numbers(argv))
        return arguments.run(arguments, argv)
    except Refused as refusal:
        return _fail(2, refusal)
    except KeyboardInterrupt:
        return _fail(1, "interrupted")
    except OSError as error:
        return _fail(1, error)
    except SystemExit as leaving:  # --help, or the benchmarks' own options
        return _fail(1, leaving) if isinstance(leaving.code, str) else leaving.code or 0


def _fail(code, message):
    print(f"{PROGRAM}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _parser():
    from absgd_fast.experiments.train import Config  # its defaults are the options', and it says what is allowed

    parser = _Parser(PROGRAM, description="Attentional-Biased SGD for PyTorch: check, try and measure it.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="doctor | train | bench", required=True, parser_class=_Parser)

    doctor = commands.add_parser("doctor", help="which backends run here, and why others do not", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.set_defaults(run=_doctor)

    train = commands.add_parser(
        "train",
        help="compare SGD, ABSGD and the reference package on imbalanced or wrongly labelled data",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    defaults = Config()

    def add(name, text):
        value = getattr(defaults, name.replace("-", "_"))
        train.add_argument(f"--{name}", type=type(value), default=value, help=text)

    add("dataset", "digits (scikit-learn's), cifar10 or cifar100")
    train.add_argument("--data-root", metavar="DIR", help="where CIFAR's python files lie (cifar10 and cifar100 only)")
    add("imbalance", "none, lt (long-tailed) or step")
    add("rho", "images of the largest class over those of the smallest")
    add("noise", "none, symmetric, asymmetric or background")
    add("noise-rate", "share of the training labels that are flipped")
    add("loss", "ce")
    train.add_argument("--methods", type=_names, default=",".join(defaults.methods), help="one or more, with commas")
    add("lam", "λ: > 0 against imbalance, < 0 against wrong labels")
    add("gamma", "share of the current batch in the moving average")
    add("mix", "how much of the plain mean loss is added")
    add("warmup", "share of the epochs that are trained plainly (λ = inf) at first")
    add("model", "linear, mlp, cnn, or resnet32 (CIFAR only)")
    add("epochs", "passes over the training set")
    add("lr", "learning rate, divided by 10 at 60 %% and at 80 %% of the epochs")
    add("batch-size", "images per step")
    add("weight-decay", "as in torch.optim.SGD")
    add("seeds", "runs per method, each on its own split")
    train.add_argument("--out", metavar="DIR", default="absgd-results", help="where results.json and report.html go")
    train.add_argument("--threads", type=int, help="CPU threads; by default 1 for digits, torch's choice for CIFAR")
    train.set_defaults(run=_train)

    commands.add_parser("bench", help="time the kernels against their peers (from a source checkout)")
    return parser


def _names(text):
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _join_numbers(argv):
    """["--lam", "-1e-1"] → ["--lam=-1e-1"]: argparse takes negative numbers such as -1e-1 and -inf for options."""
    joined = []
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


def _doctor(arguments, argv):
    from absgd_fast import _backend

    found = _backend.report()
    # plain JSON too where rich is missing: a command for broken installations must run on one
    if arguments.json or importlib.util.find_spec("rich") is None:
        print(json.dumps(found, indent=1, default=str))
        return 0
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    def shown(value):
        if isinstance(value, bool):
            return Text("yes", "green") if value else Text("no", "red")
        if isinstance(value, (list, tuple)):
            return Text(", ".join(map(str, value)) or "none")
        return Text("none" if value is None else str(value), "cyan")

    def grow(branch, values):
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


def _train(arguments, argv):
    _require(["rich", "jinja2", "matplotlib", "scipy"] + ["sklearn"] * (arguments.dataset == "digits"))
    import torch

    from absgd_fast.experiments import data
    from absgd_fast.experiments.train import Config

    config = Config(**{field.name: getattr(arguments, field.name) for field in fields(Config)})
    try:
        config.check()
        if arguments.threads is not None and arguments.threads < 1:
            raise ValueError(f"threads: got {arguments.threads}, expected at least 1")
        out = _writable(arguments.out)
        source = data.load_source(config.dataset, config.data_root)
    except (ValueError, FileNotFoundError) as error:
        raise Refused(error) from error
    before = torch.get_num_threads()
    # On digits' small networks a second thread hardly gains (0.57 s per run against 0.60), and on a busy machine, where
    # the two wait for each other, it loses everything (13 s).
    torch.set_num_threads(arguments.threads or (1 if config.dataset == "digits" else before))
    try:
        return _train_and_report(config, source, out, [PROGRAM, *argv])
    finally:
        torch.set_num_threads(before)


def _train_and_report(config, source, out, command):
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from absgd_fast.experiments import report
    from absgd_fast.experiments.train import runs

    console, finished, partial = Console(), [], False
    columns = (
        TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
        TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("starting", total=config.seeds * len(config.methods) * config.epochs)

            def on_epoch(method, seed):
                progress.update(bar, advance=1, description=f"seed {seed} {method}")

            for run in runs(config, source, on_epoch):
                finished.append(run)
                if not console.is_terminal:  # a log has no bar to watch
                    console.print(
                        f"seed {run['seed']} {run['method']}: balanced accuracy "
                        f"{run['balanced_accuracy']:.1f} %, {run['seconds']:.2f} s",
                        highlight=False,
                    )
    except KeyboardInterrupt:
        if not finished:
            return _fail(1, "interrupted before the first run was finished; nothing was written")
        partial = True
    results = report.collect(config, finished, command=command, threads=torch.get_num_threads(), partial=partial)
    paths = report.write(results, out)
    console.print(report.table(results))
    console.print(report.answers(results)["help"], highlight=False)
    for note in report.notes(results):
        console.print(note, highlight=False)
    console.print("written: " + ", ".join(map(str, paths)), highlight=False, soft_wrap=True)
    return 1 if partial else 0


def _require(modules):
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise Refused(f'train needs {", ".join(missing)}: pip install "absgd_fast[experiments]"')


def _writable(out):
    """The folder for the results, checked before an hour of training, made after it."""
    out = Path(out)
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"out: {existing} is a file; give a folder, new or existing")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"out: {existing} cannot be written to; give another folder")
    return out


# ------------------------------------------------------------------------------------------------ bench


def _bench(argv):
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / "benchmarks" / "run.py").is_file():
        raise Refused("the benchmarks are not part of the installed package: run bench from a source checkout")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    return importlib.import_module("benchmarks.run").main(argv)


if __name__ == "__main__":
    sys.exit(main())
