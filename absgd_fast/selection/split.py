"""Which samples are held out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._numbers import real

SEED = 1_000_000_007  # is added, so that the draw has nothing in common with what the caller draws by the same seed


def split(
    holdout: float | Sequence[int] | Tensor, n: int | None, labels: Sequence[int] | Tensor | None, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Divides the samples 0 … n − 1 into a part to train on and a held-out part.

    Args:
        holdout: the share of the samples to hold out, in (0, 1), or their indices.
        n: the number of samples; None takes it from the labels.
        labels: (n) integers, or None. A share is drawn from each class alike, and at least one sample of each.
        seed: of the draw.

    Returns:
        (train_idx, holdout_idx, labels): sorted int64 on the CPU; labels as int64, or None.

    Raises:
        TypeError: the labels or the indices are no array and no list.
        ValueError: n is unknown or differs from the number of labels, the share lies outside (0, 1), an index is out of range or
            stands twice, or one of the two parts lacks a class or has no sample.
    """
    known = None if labels is None else _integers(labels, "labels")
    if n is None and known is None:
        raise ValueError("n: got neither n nor labels, expected the number of training samples or their labels: labels=...")
    n = len(known) if n is None and known is not None else _checks.at_least(n, "n", 2)  # type: ignore[arg-type]
    if known is not None and len(known) != n:
        raise ValueError(f"labels: got {len(known)} labels, expected n = {n} of them, one for each training sample")
    one = getattr(holdout, "ndim", None) == 0  # a tensor or an array of one number
    share = real(torch.as_tensor(holdout) if one else holdout, tensors=one)
    random = torch.Generator("cpu").manual_seed((seed + SEED) % 2**63)
    held = _given(holdout, n) if share is None else _drawn(share, n, known, random)
    kept = torch.ones(n, dtype=torch.bool, device="cpu")
    kept[held] = False
    train, held = torch.nonzero(kept).flatten(), torch.nonzero(~kept).flatten()
    _check_parts(train, held, known)
    return train, held, known


def _integers(values: Any, name: str) -> Tensor:
    tensor = _tensor(values, name)
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(f"{name}: got {tensor.dtype} of shape {tuple(tensor.shape)}, expected a vector of integers")
    return tensor.long()


def _tensor(values: Any, name: str) -> Tensor:
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # torch raises each of them for what is no array of numbers
        return torch.as_tensor(values).detach().cpu()
    first = values[0] if isinstance(values, (list, tuple)) and values else next(iter(getattr(values, "flat", ())), None)
    if name == "labels":
        hint = "number the classes, as by numpy.unique(labels, return_inverse=True)[1]"
    else:
        hint = "the share of the samples to hold out is a number in (0, 1), and indices are a list or an array"
    of = "" if first is None else f" of {type(first).__name__}"
    raise TypeError(f"{name}: got {type(values).__name__}{of}, expected a vector of integers; {hint}")


def _given(holdout: Any, n: int) -> Tensor:
    held = _tensor(holdout, "holdout")
    if held.dtype == torch.bool and held.shape == (n,):
        return torch.nonzero(held).flatten()
    if held.dtype == torch.bool:
        raise ValueError(f"holdout: got bools of shape {tuple(held.shape)}, expected one for each of the {n} samples")
    held = _integers(held.long() if held.numel() == 0 else held, "holdout")
    if len(held) and not 0 <= int(held.min()) <= int(held.max()) < n:
        raise ValueError(f"holdout: got indices from {int(held.min())} to {int(held.max())}, expected 0 to {n - 1}")
    if len(held.unique()) < len(held):
        raise ValueError("holdout: got an index more than once, expected each held-out sample once")
    return held


def _drawn(share: float, n: int, labels: Tensor | None, random: torch.Generator) -> Tensor:
    """The same share of each class, rounded, but at least one sample and not all of them."""
    if not 0 < share < 1:
        raise ValueError(f"holdout: got {share}, expected the share of the samples to hold out, in (0, 1), or their indices")
    members = [torch.arange(n, device="cpu")]
    if labels is not None:
        members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    parts = []
    for samples in members:
        count = min(max(1, round(share * len(samples))), len(samples) - 1)
        parts.append(samples[torch.randperm(len(samples), generator=random, device="cpu")[:count]])
    return torch.cat(parts)


def _check_parts(train: Tensor, held: Tensor, labels: Tensor | None) -> None:
    for part, name, other in ((held, "held-out", "train on"), (train, "training", "hold out")):
        if not len(part):
            raise ValueError(f"holdout: the {name} part has no sample; expected at least one: leave fewer to {other}")
        if labels is None:
            continue
        missing = sorted(set(labels.unique().tolist()) - set(labels[part].unique().tolist()))
        if missing:
            few = (labels == missing[0]).sum()
            raise ValueError(
                f"holdout: the {name} part has no sample of class {', '.join(map(str, missing))} (class {missing[0]} has"
                f" {int(few)} in all); expected each class in both parts: give indices that hold some of each class out, leave a"
                " class of a single sample out of the data, or merge it with another one"
            )
