"""Which settings of an experiment have an effect, and on what.

Results that differ only in settings without effect belong together (merged.py). A setting without effect is refused where a user
gives it: who forgets --noise beside --noise-rate would train on right labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import folder
from .criteria import LOSSES
from .methods import IN_STAGES, OF_LAM

# The settings of a method: the METHODs, EXTRAs, LOSSes and SCHEDULEs that read them. All other settings are the experiment's.
READERS: dict[str, tuple[str, ...]] = {
    "loss": (),  # it is part of a method's name
    "lam": OF_LAM,
    "gamma": ("absgd", "ramp", "reference"),
    "mix": (*IN_STAGES, "hard-mining", "random"),
    "warmup": IN_STAGES,
    **dict.fromkeys(("share", "sign"), ("targetess",)),
    **dict.fromkeys(("beta", "reg"), ("cvar",)),
    "chi2_rho": ("chi2",),
    "eta": ("groupdro",),
    **dict.fromkeys(("clean", "l2rw_method"), ("l2rw",)),
    "focal_gamma": ("focal",),
    "gce_q": ("gce", "tce"),
    "gce_k": ("tce",),
    **dict.fromkeys(("sce_alpha", "sce_beta"), ("sce",)),
    "cb_beta": (*(name for name in LOSSES if name.startswith("cb-")), "drw"),
    **dict.fromkeys(("ldam_margin", "ldam_scale"), ("ldam",)),
    "vs_gamma": ("vs", "cdt"),
    "vs_tau": ("vs", "la"),
    "nu": ("adrw",),
    "drw_start": ("drw", "adrw", "tla", "tce"),
    "sam_rho": ("sam",),
    "mixup_alpha": ("mixup",),
    "tau": ("tau",),
    **dict.fromkeys(("stage_epochs", "stage_lr"), ("crt", "lws")),
}

Settings = Mapping[str, Any]  # the fields of a Config, by name

# The settings that have no effect beside a value of another one: (when they have none, what they need).
_NEEDS: dict[str, tuple[Callable[[Settings], bool], str]] = {
    "rho": (lambda config: config["imbalance"] == "none", "--imbalance lt or step"),
    "noise_rate": (lambda config: config["noise"] == "none", "--noise symmetric, asymmetric or background"),
    "background": (lambda config: config["noise"] != "background", "--noise background"),
    **dict.fromkeys(
        ("lr_steps", "lr_factor"), (lambda config: config.get("lr_schedule", "steps") != "steps", "--lr-schedule steps")
    ),
    **dict.fromkeys(
        ("image_size", "workers"),
        (lambda config: config["dataset"] not in folder.DATASETS, f"--dataset {' or '.join(folder.DATASETS)}"),
    ),
    **dict.fromkeys(
        ("data_root", "digests"),
        (lambda config: config["dataset"].startswith("digits"), "a --dataset that is read from files; digits are not"),
    ),
}


def needs(name: str, config: Settings) -> str | None:
    """What a setting would need to have an effect beside these others, or None if it has one.

    Example:
        >>> from absgd_fast.experiments.effects import needs
        >>> needs("rho", {"imbalance": "none"}), needs("rho", {"imbalance": "lt"})
        ('--imbalance lt or step', None)
    """
    idle, needed = _NEEDS.get(name, (None, ""))
    return needed if idle and idle(config) else None


def words_of(text: str, loss: str = "ce") -> set[str]:
    """The METHOD, EXTRAs, LOSS and SCHEDULEs of a specification. "cb-focal" counts as "focal" too.

    Args:
        text: METHOD[+EXTRA...][:LOSS[+SCHEDULE...]][@SETTING=VALUE...].
        loss: LOSS[+SCHEDULE...] of a text that names none.

    Example:
        >>> from absgd_fast.experiments.effects import words_of
        >>> sorted(words_of("absgd+sam:cb-focal@lam=2"))
        ['absgd', 'cb-focal', 'focal', 'sam']
    """
    method, _, of_loss = text.split("@")[0].partition(":")
    words = {*method.split("+"), *(of_loss or loss).split("+")}
    return words | {word.removeprefix("cb-") for word in words}
