"""The specification of a method of `absgd-fast train`: what is compared, in one word.

    METHOD[+EXTRA...][:LOSS[+SCHEDULE...]][@SETTING=VALUE...]

    absgd                      the method alone, with the loss and the settings of the experiment
    absgd:sce@lam=-1           with symmetric cross-entropy, and a λ of its own
    sgd+sam:vs+tla+adrw        plain SGD with sharpness-aware minimisation, on the loss of Wang et al. 2023

parse(text, config) returns a Spec or says in one line what is wrong with the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .choices import check_choice
from .criteria import LOSSES, SCALED, SCHEDULES
from .effects import READERS, needs, words_of
from .methods import EXTRAS, METHODS, WITHOUT
from .stages import STAGES

if TYPE_CHECKING:
    from .config import Config

# What all methods of an experiment share: the data, the network, the budget, and where it runs.
SHARED = {
    *(
        "dataset",
        "data_root",
        "digests",
        "image_size",
        "augment",
        "workers",
        "per_class",
        "data_share",
        "imbalance",
        "rho",
        "noise",
        "noise_rate",
    ),
    *("background", "methods", "loss", "model", "epochs", "batch_size", "seeds", "test_images", "audit", "device", "amp"),
    "channels_last",
}


@dataclass(frozen=True)
class Spec:
    """A method of an experiment.

    Attributes:
        text: as it was given.
        method: a name in methods.METHODS.
        extras: names in methods.EXTRAS.
        loss: a name in criteria.LOSSES.
        schedules: names in criteria.SCHEDULES.
        settings: fields of Config that differ for this method.
    """

    text: str
    method: str
    extras: tuple[str, ...]
    loss: str
    schedules: tuple[str, ...]
    settings: dict[str, Any]

    def config(self, config: Config) -> Config:
        """The settings of the experiment as this method sees them."""
        return replace(config, loss="+".join((self.loss, *self.schedules)), **self.settings)


def base(text: str) -> str:
    """The METHOD of a specification.

    Example:
        >>> from absgd_fast.experiments.spec import base
        >>> base("absgd+sam:vs+tla@nu=1.5")
        'absgd'
    """
    return re.split("[+:@]", text, maxsplit=1)[0]


def given_settings(text: str) -> dict[str, str]:
    """The SETTINGs of a specification, with _ instead of -, and their values as text.

    Example:
        >>> from absgd_fast.experiments.spec import given_settings
        >>> given_settings("absgd:sce@sce-alpha=0.5@lam=-2")
        {'sce_alpha': '0.5', 'lam': '-2'}
    """
    return {name.replace("-", "_"): value for name, _, value in (one.partition("=") for one in text.split("@")[1:])}


def parse(text: str, config: Config) -> Spec:
    """The specification in a text.

    Args:
        text: METHOD[+EXTRA...][:LOSS[+SCHEDULE...]][@SETTING=VALUE...].
        config: of the experiment. It has the loss of a method that names none.

    Raises:
        ValueError: an unknown name, or parts that do not go together. The message is one line.

    Example:
        >>> from absgd_fast.experiments.spec import parse
        >>> from absgd_fast.experiments.train import Config
        >>> spec = parse("absgd+sam:vs+tla@lam=5", Config())
        >>> spec.method, spec.extras, spec.loss, spec.schedules, spec.settings
        ('absgd', ('sam',), 'vs', ('tla',), {'lam': 5.0})
    """
    named, *given = text.split("@")
    of_method, colon, of_loss = named.partition(":")
    if colon and not of_loss:
        raise ValueError(f"method {text!r}: expected a loss behind the colon, such as {of_method}:sce")
    method, *extras = of_method.split("+")
    _check_name(method, METHODS, "method", text)
    for extra in extras:
        _check_name(extra, EXTRAS, "extra", text)
    check_loss(of_loss or config.loss)
    loss, *schedules = (of_loss or config.loss).split("+")
    spec = Spec(text, method, tuple(extras), loss, tuple(schedules), dict(_setting(one, text, config) for one in given))
    if len(spec.settings) < len(given):
        raise ValueError(f"method {text!r}: a setting is given twice")
    _check_together(spec)
    return spec


def check_loss(text: str) -> None:
    """Raises ValueError unless the text is LOSS[+SCHEDULE...], a loss and schedules that it can have."""
    loss, *schedules = text.split("+")
    _check_name(loss, LOSSES, "loss", text)
    for name in schedules:
        _check_name(name, SCHEDULES, "schedule", text)
    if len(set(schedules)) < len(schedules):
        raise ValueError(f"loss {text}: a schedule is named twice")
    if "tla" in schedules and loss not in SCALED:
        raise ValueError(f"loss {text}: tla switches a scale of the logits off, which only {' and '.join(SCALED)} have")
    weighted = [name for name in schedules if name in ("drw", "adrw")]
    if loss.startswith("cb-") and weighted:
        raise ValueError(
            f"loss {text}: {loss} has class weights from the first step, {weighted[0]} brings them later; use "
            f"{loss[3:]}+{weighted[0]}"
        )
    if len(weighted) > 1:
        raise ValueError(f"loss {text}: drw and adrw are two choices of the class weights; give one of them")


def _check_name(name: str, allowed: Iterable[str], kind: str, text: str) -> None:
    """Raises ValueError unless a part of a specification is one of the names."""
    check_choice(kind, name, allowed, "" if name == text else f" in {text!r}")


def _setting(given: str, text: str, config: Config) -> tuple[str, Any]:
    """The name and the value of NAME=VALUE."""
    name, equals, value = given.partition("=")
    name = name.replace("-", "_")
    if not equals:
        raise ValueError(f"method {text!r}: got @{given}, expected @SETTING=VALUE, such as @lam=-0.5")
    defaults = {field.name: field.default for field in fields(config)}
    _check_name(name, [n for n in defaults if n not in SHARED], "setting of a method", text)
    kind: Any = type(defaults[name])
    try:
        if kind is tuple:
            return name, tuple(float(part) for part in value.split("/"))
        return name, kind(value)
    except ValueError:
        expected = {float: "a number", int: "a whole number", tuple: "numbers with / between them"}[kind]
        raise ValueError(f"method {text!r}: {name} is {expected}, got {value!r}") from None


def _check_together(spec: Spec) -> None:
    """Raises ValueError for parts that do not go together."""
    if len(set(spec.extras)) < len(spec.extras):
        raise ValueError(f"method {spec.text!r}: an extra is named twice")
    for extra in spec.extras:
        if spec.method in WITHOUT.get(extra, {}):
            raise ValueError(f"method {spec.text!r}: {extra} does not go with {spec.method}, {WITHOUT[extra][spec.method]}")
    if len(stages := [extra for extra in spec.extras if extra in STAGES]) > 1:
        raise ValueError(f"method {spec.text!r}: {' and '.join(stages)} each replace the classifier; give one of them")
    if spec.loss.endswith("ldam") and stages and stages[0] != "crt":
        raise ValueError(f"method {spec.text!r}: ldam's cosine classifier has no norms, so {stages[0]} has nothing to change")


def check_effects(spec: Spec, config: Config) -> None:
    """Raises ValueError for a setting of a specification that changes nothing for its method. The message is one line."""
    own = spec.config(config)
    for name in spec.settings:
        if not _reads(spec, name, own):
            raise ValueError(f"method {spec.text!r}: {name} changes nothing here; it is a setting of {', '.join(READERS[name])}")
        if needed := needs(name, vars(own)):
            raise ValueError(f"method {spec.text!r}: {name} changes nothing here; it needs {needed}")


def without_effect(names: Iterable[str], configs: Iterable[Config]) -> dict[str, str]:
    """{setting: why it changes nothing} of those settings that change nothing in any of these experiments.

    What only methods and losses read that are not there may stand.

    Example:
        >>> from absgd_fast.experiments.spec import without_effect
        >>> from absgd_fast.experiments.train import Config
        >>> without_effect(["noise_rate", "lam", "share"], [Config(methods=("sgd", "absgd@lam=2"))])["lam"]
        'each method that reads it has its own'
        >>> without_effect(["rho", "share"], [Config(methods=("sgd", "absgd"))])
        {'rho': 'it needs --imbalance lt or step'}
    """
    seen = [[(spec, spec.config(config)) for spec in (parse(text, config) for text in config.methods)] for config in configs]
    found: dict[str, str] = {}
    for name in names:
        why = [reason for reason in (_why_idle(name, methods) for methods in seen) if reason]
        if len(why) == len(seen):
            found[name] = why[0]
    return found


def _why_idle(name: str, methods: Sequence[tuple[Spec, Config]]) -> str | None:
    """Why a setting of an experiment changes nothing for its methods, (specification, the settings as it sees them), or None."""
    readers = [(spec, own) for spec, own in methods if name == "loss" or _reads(spec, name, own)]
    left = [own for spec, own in readers if name not in spec.settings and not (name == "loss" and ":" in spec.text)]
    if readers and not left:
        return "each method that reads it has its own"
    needed = [needs(name, vars(own)) for own in left]
    return f"it needs {needed[0]}" if needed and all(needed) else None


def _reads(spec: Spec, name: str, own: Config) -> bool:
    """Whether a method reads a setting. own: the settings as it sees them."""
    if name not in READERS or (name == "warmup" and own.trainable != "all"):  # what is trained changes after the warm-up
        return True
    return bool(words_of(spec.text, own.loss) & set(READERS[name]))


def stage_of(spec: Spec) -> str | None:
    """The classifier stage after the training, a name in stages.STAGES, or None."""
    return next((extra for extra in spec.extras if extra in STAGES), None)
