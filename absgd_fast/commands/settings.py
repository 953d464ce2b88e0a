"""The options of an experiment: one for each field of experiments.train.Config."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from absgd_fast.experiments.config import Config


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the data, the loss, the model and its training, with their defaults."""
    add = _adder(parser.add_argument_group("data"))
    add(
        "dataset",
        "digits (of scikit-learn), digits-9-4 (only its nines and fours), cifar10, cifar100, mnist, mnist-9-4, fashion-mnist, "
        "kmnist, folder (a folder of images for each class), imagenet-lt, places-lt or inaturalist2018",
    )
    add(
        "data-root",
        "folder of the data: CIFAR's python files, the idx files of mnist, fashion-mnist or kmnist, or DIR/train/CLASS and "
        "DIR/val/CLASS; idx files are found by themselves in share/datasets, where Debian's package dataset-fashion-mnist puts "
        "them",
        metavar="DIR",
    )
    add("digests", "refuse files of a standard data set that are not the known ones; --no-digests takes them")
    add("per-class", "training images of each class before imbalance (default: as many as the smallest class has)")
    add("data-share", "share of the training images of each class, of folders and index files")
    add("imbalance", "none, lt (long-tailed) or step")
    add("rho", "number of images of the largest class over that of the smallest")
    add("noise", "none, symmetric (also called uniform), asymmetric or background")
    add("noise-rate", "probability that a training label is flipped")
    add("background", "the class that background noise flips labels to")
    add("image-size", "height and width of the images of a folder")
    add("augment", "none, crop-flip or randaugment (default: crop-flip for CIFAR and folders, none for the others)")
    add("workers", "processes that read the images of a folder")
    _add_loss(parser)
    add = _adder(parser.add_argument_group("model and training"))
    add("model", "linear, mlp, cnn, cnn4, cnn8, lenet, resnet32 (CIFAR), preact, wrn-16-2, wrn-28-10, or resnet18, 34, 50, 152")
    add("epochs", "passes over the training set")
    add("lr", "learning rate")
    add("lr-schedule", "steps, or cosine (to 0)")
    add("lr-steps", "steps: fractions of the epochs after which the learning rate is multiplied by --lr-factor, with commas")
    add("lr-factor", "steps: what the learning rate is multiplied by")
    add("momentum", "momentum of SGD")
    add("batch-size", "images per step")
    add("weight-decay", "weight decay, as in torch.optim.SGD")
    add("trainable", "what is trained after the warm-up: all, fc (the classifier) or fc+lb (and the last block)")
    add("device", "auto (the GPU if there is one), cpu or cuda")
    add("amp", "none, bf16 or fp16 (automatic mixed precision)")
    add("channels-last", "store images and convolutions with their channels last")
    parser.add_argument("--threads", type=int, help="CPU threads (default: 1, and torch's choice for CIFAR and folders)")


def _add_loss(parser: argparse.ArgumentParser) -> None:
    from absgd_fast.experiments.criteria import LOSSES, SCHEDULES

    add = _adder(parser.add_argument_group("loss"))
    add("loss", f"LOSS or LOSS+SCHEDULE, of {', '.join(LOSSES)} and {', '.join(SCHEDULES)}, such as vs+tla+adrw")
    add("gamma", "weight γ of the current batch in the moving average")
    add("mix", "weight of the plain mean loss, which is added")
    add("focal-gamma", "focal: exponent γ")
    add("gce-q", "gce, tce: exponent q")
    add("gce-k", "tce: samples with a smaller probability of their label are left out")
    add("sce-alpha", "sce: factor of the cross-entropy")
    add("sce-beta", "sce: factor of the reverse cross-entropy")
    add("ldam-margin", "ldam: the largest margin")
    add("ldam-scale", "ldam: scale of the logits")
    add("vs-gamma", "vs, cdt: exponent γ of the scale of a logit")
    add("vs-tau", "vs, la: factor τ of the logarithm of the class frequencies")
    add("cb-beta", "cb-…, drw: β of the class-balanced weights")
    add("nu", "adrw: exponent ν of the class weights")
    add("drw-start", "drw, adrw, tla, tce: fraction of the epochs before they begin")


def add_methods(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the methods, with their defaults."""
    from absgd_fast.experiments.config import Config
    from absgd_fast.experiments.methods import EXTRAS, METHODS
    from absgd_fast.meta import METHODS as L2RW

    group = parser.add_argument_group("methods")
    add, methods = _adder(group), shown(Config().methods)
    group.add_argument(
        "--methods",
        type=names,
        help=f"METHOD[+EXTRA...][:LOSS[+SCHEDULE...]][@SETTING=VALUE...], several with commas (default: {methods}). "
        f"METHOD: {', '.join(METHODS)}. EXTRA: {', '.join(EXTRAS)}. SETTING: an option of this group, of the loss, or of the "
        "training",
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
    add("sam-rho", "sam: length of its step to the worst point nearby")
    add("mixup-alpha", "mixup: both parameters of the Beta distribution of its shares")
    add("tau", "tau: exponent τ of the norms of the classifier's rows")
    add("stage-epochs", "crt, lws: passes over the features")
    add("stage-lr", "crt, lws: learning rate")
    add("seeds", "number of runs per method, each on a split of its own")
    add("test-images", "test images that are looked at after each epoch; at the end it is all of them (default: always all)")


def _adder(group: argparse._ArgumentGroup) -> Callable[..., None]:
    """A function that adds an option for a field of Config, with its type and default."""
    from absgd_fast.experiments.config import Config

    defaults = Config()

    def add(name: str, text: str, **more: Any) -> None:
        value = getattr(defaults, name.replace("-", "_"))
        if isinstance(value, bool):
            group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=f"{text} (default: {shown(value)})")
        elif value is None:  # the text says what happens without
            group.add_argument(f"--{name}", type=int if name in ("per-class", "test-images") else str, help=text, **more)
        else:
            kind = numbers if isinstance(value, tuple) else type(value)
            group.add_argument(f"--{name}", type=kind, help=f"{text} (default: {shown(value)})", **more)

    return add


def numbers(text: str) -> tuple[float, ...]:
    """The numbers in a list that is separated by commas."""
    return tuple(float(number) for number in names(text))


def names(text: str) -> tuple[str, ...]:
    """The names in a list that is separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of Config, by name."""
    from absgd_fast.experiments.config import Config

    return {field.name: options[field.name] for field in fields(Config) if field.name in options}


def of_data(config: Config) -> list[str]:
    """The packages that reading the data needs."""
    from absgd_fast.experiments import folder

    return ["sklearn"] * config.dataset.startswith("digits") + ["PIL"] * (config.dataset in folder.DATASETS)


def check_counts(given: Mapping[str, Any]) -> None:
    """Raises ValueError if --threads or --checkpoint-every was given and is too small."""
    for name, least in (("threads", 1), ("checkpoint_every", 0)):
        if name in given and given[name] < least:
            raise ValueError(f"{name.replace('_', '-')}: got {given[name]}, expected at least {least}")


def check_effects(given: Mapping[str, Any], configs: Sequence[Config]) -> None:
    """Raises ValueError if an option was given that has no effect in any of these experiments."""
    from absgd_fast.experiments.spec import without_effect

    for name, why in without_effect(settings(given), configs).items():
        raise ValueError(f"{name.replace('_', '-')}: got {shown(given[name])}, which changes nothing here; {why}")


def shown(value: object) -> str:
    """The value of an option as the user writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def threads(config: Config, given: int | None, before: int) -> int:
    """The number of CPU threads to train with: what was given, or else what suits the data."""
    # On digits' small networks a second thread gains little (0.57 s per run instead of 0.60). On a busy machine the two
    # threads wait for each other, and a run takes 13 s. With images of 28×28 and batches of 64 an epoch of 5,000 took there
    # 0.16 s with one thread and 4 to 17 s with two (MLP), 1.9 to 3.1 s and 8 to 14 s (CNN).
    from absgd_fast.experiments import data

    if given is not None:
        return given
    return before if config.dataset.startswith("cifar") or config.dataset not in data.SHAPES else 1
