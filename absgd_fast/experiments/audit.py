"""The audit of one training: what `absgd-fast train --audit` records, its file, and how `absgd-fast audit` reads it.

    watch = Watch(samples, classes)          during the training: watch.add(...) after each step
    save(path, parts)                        writes DIR/audit/METHOD-SEED.pt
    load(path) -> Findings                   reads such a file, or DIR/audit.pt of a user's own training

A file is that of torch.save, a dict of tensors and plain values. Loading never runs code that a file names. `KEYS` has its keys.
"""

from __future__ import annotations

import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from ..audit import COUNT, LabelAudit
from . import checkpoint, data, images

# How long a training is recorded: this share of its epochs, and at least so many. Early losses tell wrong labels from right ones
# better than late ones, unless a training is so short that it memorises nothing (docs/audit.md has the measurements).
SHARE, AT_LEAST = 0.5, 10
SHOWN = 200  # samples whose images are in a file that train writes: so many that are first by loss, and as many by weight

# key: what it holds; the first two are required
KEYS = {
    "audit": "the state_dict of a LabelAudit(N)",
    "labels": "(N,) integers, the given labels",
    "predictions": "(N,) integers, the predicted labels",
    "true_labels": "(N,) integers, the right labels of an experiment, in which labels were flipped",
    "classes": "a list of the names of the classes",
    "images": "(M, H, W) or (M, channels, H, W), channels 1 or 3; uint8, or floats of any range",
    "image_index": "(M,) integers, the sample of each image; without it M = N",
    "title": "a line of text",
}


class Watch:
    """Keeps the LabelAudit of a training, and how often each class was predicted for each sample.

    The prediction of a sample is the class that the network answered most often while it was trained on it. The answer at the
    end says less: a network that has memorised its training set answers with the given label, right or wrong.
    """

    def __init__(self, samples: int, classes: int) -> None:
        with torch.device("cpu"):
            self.audit = LabelAudit(samples).float()
        self.votes = torch.zeros(samples, classes, dtype=torch.int32, device="cpu")

    @staticmethod
    def records(epoch: int, epochs: int) -> bool:
        """Whether this epoch, counted from 0, of so many is recorded."""
        return epoch < max(SHARE * epochs, AT_LEAST)

    def add(self, index: Tensor, logits: Tensor, labels: Tensor, weights: Tensor | None) -> None:
        """Adds a batch: the place of each sample, its logits (B, C) before the step, its given label, and its weight."""
        self.audit.update(index, F.cross_entropy(logits, labels, reduction="none"), weights)
        one = torch.ones(len(index), dtype=torch.int32, device="cpu")
        self.votes.index_put_((index, logits.argmax(1)), one, accumulate=True)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors."""
        return {"audit": dict(self.audit.state_dict()), "votes": self.votes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what state_dict() gave."""
        self.audit.load_state_dict(state["audit"])
        self.votes.copy_(state["votes"])

    def parts(self, split: data.Split, source: data.Source, title: str) -> dict[str, Any]:
        """The parts of a file: everything about all samples, and the images of the most suspicious ones."""
        first = self.audit.ranked()[:SHOWN]
        if weighed(self.audit):  # or else `audit` refuses to rank by weight
            first = torch.cat([first, (other := self.audit.ranked("weight")[:SHOWN])[~torch.isin(other, first)]])
        found = {
            "audit": dict(self.audit.state_dict()),
            "labels": split.y.to(torch.int16),
            "true_labels": split.y_true.to(torch.int16),
            "predictions": self.votes.argmax(1).to(torch.int16),
            "images": pixels(images.as_tensor(split.x[first])),
            "image_index": first,
            "title": title,
        }
        names = source.class_names or data.CLASS_NAMES.get(source.name)
        return found | ({"classes": list(names)} if names else {})


def weighed(audit: LabelAudit) -> bool:
    """Whether the weights differ between the samples. With the plain mean all of them are 1."""
    weights = audit.mean_weight[audit.count > 0]
    return len(weights) > 0 and float(weights.max() - weights.min()) > 1e-6 * float(weights.abs().max())


def pixels(images: Tensor) -> Tensor:
    """Images as uint8 0…255. The smallest finite number of other dtypes becomes 0, the largest one 255, and NaN 0."""
    if images.dtype == torch.uint8 or images.numel() == 0:
        return images.to(torch.uint8)
    images = images.float()
    finite = images[images.isfinite()]
    low, high = map(float, finite.aminmax()) if len(finite) else (0.0, 0.0)
    images = images.nan_to_num(low, high, low)
    # halves, because high - low may be larger than the largest float
    return ((images / 2 - low / 2) * (255 / max(high / 2 - low / 2, 1e-12))).round().to(torch.uint8)


def save(path: str | os.PathLike[str], parts: dict[str, Any]) -> None:
    """Writes the file, completely or not at all, and creates its folder if there is none."""
    buffer = io.BytesIO()
    torch.save(parts, buffer)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_whole(path, buffer.getbuffer())


@dataclass(frozen=True)
class Findings:
    """The audit of one training, with what is known about its samples. N samples, M images."""

    audit: LabelAudit
    labels: Tensor  # (N,) int64
    predictions: Tensor | None = None  # (N,) int64
    true_labels: Tensor | None = None  # (N,) int64
    classes: tuple[str, ...] = ()
    images: Tensor | None = None  # (M, channels, H, W) uint8
    image_index: Tensor | None = None  # (M,) int64
    title: str = ""

    @property
    def flipped(self) -> Tensor | None:
        """(N,) bool: whether a label was flipped; None if nobody knows."""
        return None if self.true_labels is None else self.labels != self.true_labels

    @property
    def weighed(self) -> bool:
        """Whether the weights differ between the samples."""
        return weighed(self.audit)

    def name(self, label: int) -> str:
        """A class as the reader sees it."""
        return (self.classes[label] if 0 <= label < len(self.classes) else "") or str(label)

    def precision(self, by: str) -> tuple[int, float] | None:
        """(k, the share of flipped labels among the k most suspicious samples), where k is the number of flips; None without."""
        if self.flipped is None or not (k := int(self.flipped.sum())):
            return None
        return k, float(self.flipped[self.audit.ranked(by)[:k]].double().mean())


def load(path: str | os.PathLike[str]) -> Findings:
    """Reads a file, with all tensors on the CPU.

    Raises:
        ValueError: it is damaged, or does not hold what `KEYS` says. The message is one line with the name of the file.
        OSError: it could not be read.
    """
    content = Path(path).read_bytes()
    if problem := checkpoint.damage(content):
        raise ValueError(f"{path} {problem}, expected a file of torch.save with an audit")
    try:
        parts = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # a file that another program made may raise anything here
    except Exception as error:
        name = found[1] if (found := re.search(r"GLOBAL (\S+)", str(error))) else type(error).__name__
        raise ValueError(
            f"{path} holds more than tensors, numbers, strings, lists and dicts ({name}); nothing in it was run; use "
            "torch.as_tensor for the arrays of other libraries"
        ) from error
    if not isinstance(parts, dict) or not {"audit", "labels"} <= parts.keys():
        raise ValueError(
            f"{path} has no audit and labels, expected a dict with " + "; ".join(f"{k}: {v}" for k, v in KEYS.items())
        )
    if unknown := parts.keys() - KEYS.keys():
        raise ValueError(f"{path} has {', '.join(sorted(map(repr, unknown)))}, expected only {', '.join(KEYS)}")
    return _findings(parts, path)


def _findings(parts: dict[str, Any], path: str | os.PathLike[str]) -> Findings:
    def wrong(key: str, found: object) -> ValueError:
        return ValueError(f"{path}: {key}: got {found}, expected {KEYS[key]}")

    sums = parts["audit"].get("sums") if isinstance(parts["audit"], dict) else None
    if not _whole(sums) or sums.dim() != 2 or sums.shape[0] != 3 or not sums.shape[1] or not sums.is_floating_point():
        raise wrong("audit", "no such state")
    if not (sums.isfinite().all() and ((sums[COUNT] >= 0) & (sums[COUNT] == sums[COUNT].round())).all()):
        raise wrong("audit", "sums that are not finite, or counts that are not 0, 1, 2, …")
    with torch.device("cpu"):
        audit = LabelAudit(sums.shape[1])
    audit.load_state_dict({"sums": sums}, assign=True)  # in its dtype

    def integers(key: str, length: int | None) -> Tensor | None:
        x = parts.get(key)
        if x is None and key != "labels":
            return None
        if not _whole(x) or x.dim() != 1 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise wrong(key, _described(x))
        if length is not None and len(x) != length:
            raise wrong(key, f"{len(x)} of them, but {length} samples")
        return x.long()

    labels, classes = integers("labels", audit.n_samples), parts.get("classes", [])
    assert labels is not None
    if not isinstance(classes, (list, tuple)) or not all(isinstance(name, str) for name in classes):
        raise wrong("classes", repr(classes))
    if not isinstance(title := parts.get("title", ""), str):
        raise wrong("title", type(title).__name__)
    images, index = parts.get("images"), integers("image_index", None)
    if images is not None:
        if not _whole(images) or images.is_complex() or images.dim() not in (3, 4) or not images.shape[-1] * images.shape[-2]:
            raise wrong("images", _described(images))
        images = images if images.dim() == 4 else images[:, None]
        if images.shape[1] not in (1, 3):
            raise wrong("images", _described(images))
        images = pixels(images)
        index = torch.arange(audit.n_samples, device="cpu") if index is None else index
        if len(index) != len(images) or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < audit.n_samples):
            raise wrong("image_index", f"{len(index)} indices of {len(images)} images, of {audit.n_samples} samples")
    predictions, true_labels = (integers(key, audit.n_samples) for key in ("predictions", "true_labels"))
    return Findings(audit, labels, predictions, true_labels, tuple(map(_line, classes)), images, index, _line(title))


def _whole(x: object) -> TypeGuard[Tensor]:
    """Whether x is a tensor whose numbers are all in the file. One that is expanded may have any size."""
    return (
        isinstance(x, Tensor)
        and x.layout == torch.strided
        and x.device.type == "cpu"
        and x.numel() * x.element_size() <= x.untyped_storage().nbytes()
    )


def _described(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{x.dtype} of shape {tuple(x.shape)}" + ("" if _whole(x) else ", sparse, expanded or without values")


def _line(text: str) -> str:
    """The text in one line, without control characters, which a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
