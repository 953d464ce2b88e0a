"""The options of an experiment: one for each field of experiments.train.Config."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from absgd_fast.experiments.train import Config


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the data, the model and its training, with their defaults."""
    add = _adder(parser)
    add(
        "dataset",
        "digits (of scikit-learn), digits-9-4 (only its nines and fours), cifar10, cifar100, mnist, fashion-mnist or kmnist",
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder of CIFAR's python files, or of the idx files of mnist, fashion-mnist or kmnist; the idx files are found by "
        "themselves in share/datasets, where Debian's package dataset-fashion-mnist puts them",
    )
    parser.add_argument(
        "--per-class",
        type=int,
        help="training images of each class before imbalance (default: as many as the smallest class has)",
    )
    add("imbalance", "none, lt (long-tailed) or step")
    add("rho", "number of images of the largest class over that of the smallest")
    add("noise", "none, symmetric (also called uniform), asymmetric or background")
    add("noise-rate", "probability that a training label is flipped")
    add("loss", "the loss function; only ce, cross-entropy")
    add("gamma", "weight γ of the current batch in the moving average")
    add("mix", "weight of the plain mean loss, which is added")
    add("model", "linear, mlp, cnn, or resnet32 (CIFAR only)")
    add("epochs", "passes over the training set")
    add("lr", "learning rate, divided by 10 after 60 %% and again after 80 %% of the epochs")
    add("batch-size", "images per step")
    add("weight-decay", "weight decay, as in torch.optim.SGD")
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: 1, and torch's choice for CIFAR)")


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the methods, with their defaults."""
    from absgd_fast.experiments.methods import METHODS
    from absgd_fast.experiments.train import Config
    from absgd_fast.meta import METHODS as L2RW

    add, methods = _adder(parser), shown(Config().methods)
    parser.add_argument(
        "--methods", type=names, help=f"one or more of {', '.join(METHODS)}; separate them by commas (default: {methods})"
    )
    add("lam", "λ in the unit of the loss: > 0 against imbalance, < 0 against wrong labels")
    add("warmup", "fraction of the epochs that are trained plainly (λ = inf) at first; ramp: that λ takes to reach --lam")
    add("share", "targetess: ESS/n, the share of each batch that counts")
    add("sign", "targetess: 1 for λ > 0, against imbalance; -1 for λ < 0, against wrong labels")
    add("beta", "cvar: fraction of the batch that gets weight")
    add("reg", "cvar: strength of its KL penalty")
    add("chi2-rho", "chi2: radius of the chi-squared ball")
    add("eta", "groupdro: step size of its weights; the groups are the labels")
    add("clean", "l2rw: number of training images of each class whose right label it knows")
    add("l2rw-method", f"l2rw: how it computes its weights: {', '.join(L2RW)}")
    add("seeds", "number of runs per method, each on a split of its own")


def _adder(parser: argparse.ArgumentParser) -> Callable[[str, str], None]:
    """A function that adds an option for a field of Config, with its type and default."""
    from absgd_fast.experiments.train import Config

    defaults = Config()

    def add(name: str, text: str) -> None:
        value = getattr(defaults, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=type(value), help=f"{text} (default: {value})")

    return add


def names(text: str) -> tuple[str, ...]:
    """The names in a list that is separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of Config, by name."""
    from absgd_fast.experiments.train import Config

    return {field.name: options[field.name] for field in fields(Config) if field.name in options}


def check_counts(given: Mapping[str, Any]) -> None:
    """Raises ValueError if --threads or --checkpoint-every was given and is too small."""
    for name, least in (("threads", 1), ("checkpoint_every", 0)):
        if name in given and given[name] < least:
            raise ValueError(f"{name.replace('_', '-')}: got {given[name]}, expected at least {least}")


def shown(value: object) -> str:
    """The value of an option as the user writes it."""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def threads(config: Config, given: int | None, before: int) -> int:
    """The number of CPU threads to train with: what was given, or else what suits the data."""
    # On digits' small networks a second thread gains little (0.57 s per run instead of 0.60). On a busy machine the two
    # threads wait for each other, and a run takes 13 s. With images of 28×28 and batches of 64 an epoch of 5,000 took there
    # 0.16 s with one thread and 4 to 17 s with two (MLP), 1.9 to 3.1 s and 8 to 14 s (CNN).
    if given is not None:
        return given
    return before if config.dataset.startswith("cifar") else 1
