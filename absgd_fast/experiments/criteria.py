"""The losses of `absgd-fast train --loss LOSS[+SCHEDULE...]`: a fused loss for each name, and what changes while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

import absgd_fast as ab
from absgd_fast import _codes
from absgd_fast.losses import VS, LogitLoss
from absgd_fast.ops import LossSpec

if TYPE_CHECKING:
    from .config import Config


class _Kind(NamedTuple):
    """A class of losses, and the fields of Config that are its arguments. counted: the class counts come before them."""

    make: type[Any]  # of LogitLoss, each with other arguments
    fields: tuple[str, ...] = ()
    counted: bool = False


class TCE(ab.GCE):
    """GCE that is truncated at k: while `pruning`, samples with p <= k have no gradient, as in Zhang & Sabuncu 2018, Sec. 3.3."""

    pruning = False

    def spec(self, logits: Tensor) -> LossSpec:
        """As LogitLoss.spec; while pruning, that of GCE(prune=True)."""
        spec = super().spec(logits)
        return spec._replace(bits=spec.bits | _codes.PRUNE) if self.pruning else spec


class Truncation:
    """Switches the pruning of a TCE on after `start` epochs. Before, no sample has a large p, and all would be left out."""

    def __init__(self, loss: TCE, start: int) -> None:
        self.loss, self.start = loss, start
        self.load_state_dict({"epoch": 0})

    def step(self) -> None:
        """Call it after each epoch."""
        self.load_state_dict({"epoch": self.epoch + 1})

    def state_dict(self) -> dict[str, Any]:
        """The number of finished epochs."""
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Any, /) -> None:
        """Puts back what state_dict() gave."""
        self.epoch = state["epoch"]
        self.loss.pruning = self.epoch >= self.start


_KINDS = {
    "ce": _Kind(ab.CrossEntropy),
    "focal": _Kind(ab.Focal, ("focal_gamma",)),
    "ldam": _Kind(ab.LDAM, ("ldam_margin", "ldam_scale"), counted=True),
    "la": _Kind(ab.LogitAdjusted, ("vs_tau",), counted=True),
    "vs": _Kind(ab.VS, ("vs_gamma", "vs_tau"), counted=True),
    "cdt": _Kind(ab.CDT, ("vs_gamma",), counted=True),
    "gce": _Kind(ab.GCE, ("gce_q",)),
    "tce": _Kind(TCE, ("gce_q", "gce_k")),
    "sce": _Kind(ab.SCE, ("sce_alpha", "sce_beta")),
}
CLASS_BALANCED = ("ce", "focal", "ldam")  # the losses of the ABSGD paper's Table 2 that have a class-balanced version
LOSSES = (*_KINDS, *(f"cb-{name}" for name in CLASS_BALANCED))
SCALED = ("vs", "cdt")  # the losses with a multiplicative part, which tla switches off
SCHEDULES = ("drw", "adrw", "tla")


class Schedule(Protocol):
    """Something that step() moves after each epoch, and whose state a checkpoint must hold."""

    def step(self) -> None:
        """Call it after each epoch."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values."""
        ...

    def load_state_dict(self, state: Any, /) -> object:
        """Puts back what state_dict() gave."""
        ...


def class_sizes(labels: Tensor, classes: int) -> list[int]:
    """The number of samples with each label, at least 1.

    Noise may take the only sample of a rare class away. Its margin and its weight are then those of a class with one sample.
    """
    return torch.bincount(labels.cpu(), minlength=classes).clamp_min(1).tolist()


def make(config: Config, counts: Sequence[int]) -> tuple[LogitLoss, dict[str, Schedule]]:
    """The loss that config.loss names, for one loss per sample, and its schedules by name.

    Args:
        config: its `loss` is LOSS[+SCHEDULE...]. The numbers of the losses are its fields too.
        counts: the number of training samples of each class.

    Example:
        >>> from absgd_fast.experiments.criteria import make
        >>> from absgd_fast.experiments.train import Config
        >>> make(Config(loss="focal+drw", focal_gamma=1.0), [9, 1])[1]["drw"].start  # 80 % of the epochs
        96

    Source: Cao et al. 2019 (LDAM, DRW); Cui et al. 2019 (class-balanced weights); Wang et al. 2023, Sec. 3.3 (ADRW, TLA).
    """
    name, *schedules = config.loss.split("+")
    kind = _KINDS[name.removeprefix("cb-")]
    loss: LogitLoss = kind.make(*[counts] * kind.counted, *(getattr(config, field) for field in kind.fields))
    if name.startswith("cb-"):
        loss.set_weight(ab.class_balanced_weights(counts, config.cb_beta))
    start, made = round(config.drw_start * config.epochs), dict[str, Schedule]()
    if isinstance(loss, TCE):
        made["tce"] = Truncation(loss, start)
    for schedule in schedules:
        if schedule == "drw":
            made["drw"] = ab.DRW(loss, ab.class_balanced_weights(counts, config.cb_beta), start)
        elif schedule == "adrw":
            made["adrw"] = ab.DRW(loss, ab.adrw_weights(counts, config.nu), start)
        else:
            assert isinstance(loss, VS)
            made["tla"] = ab.TLA(loss, start)
    return loss, made


def code(config: Config) -> tuple[str, str]:
    """The expression that makes the loss, with `counts` for the class counts, and the lines that make its schedules of `loss`."""
    name, *schedules = config.loss.split("+")
    kind = _KINDS[name.removeprefix("cb-")]
    given = ["counts"] * kind.counted + [f"{getattr(config, field)!r}" for field in kind.fields]
    balanced, start = f"ab.class_balanced_weights(counts, {config.cb_beta!r})", round(config.drw_start * config.epochs)
    if name.startswith("cb-"):
        given.append(f"weight={balanced}")
    lines = {
        "drw": f"drw = ab.DRW(loss, {balanced}, start={start})",
        "adrw": f"adrw = ab.DRW(loss, ab.adrw_weights(counts, {config.nu!r}), start={start})",
        "tla": f"tla = ab.TLA(loss, start={start})",
    }
    stepped = [f"{lines[schedule]}  # {schedule}.step() after each epoch" for schedule in schedules]
    if kind.make is TCE:
        stepped.append(f"# after {start} epochs: loss = ab.GCE({', '.join(given)}, prune=True)")
    return f"ab.{'GCE' if kind.make is TCE else kind.make.__name__}({', '.join(given)})", "\n".join(stepped)


def head(loss: str) -> str:
    """The last layer that a loss needs, as models.make_model names it: LDAM's margins are those of cosines."""
    return "cosine" if loss.split("+")[0].endswith("ldam") else "linear"
