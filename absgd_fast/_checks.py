"""Checks of arguments. An error says what was given, what was expected, and what to call instead."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .reference import real_dtype


def share(value: float, name: str) -> float:
    """A number in (0, 1], or ValueError."""
    if not (isinstance(value, (int, float)) and 0 < value <= 1):
        raise ValueError(f"{name}: got {value!r}, expected a number in (0, 1]")
    return float(value)


def choice(value: str, name: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
    return value


def scalar(value: float | Tensor, name: str) -> None:
    if isinstance(value, Tensor) and value.dim() != 0:
        raise ValueError(f"{name}: got a tensor of shape {tuple(value.shape)}, expected a number or a 0-d tensor")


def lam(value: float | Tensor) -> float | Tensor:
    """lambda: any number but 0 and NaN (a tensor on the CPU is looked into, one on a GPU is not waited for)."""
    if isinstance(value, Tensor):
        scalar(value, "lam")
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return value
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"lam: got {type(value).__name__}, expected a number or a 0-d tensor")
    number = float(value)
    if abs(number) < torch.finfo(torch.float32).tiny or math.isnan(number):  # 0, also after rounding to float32
        raise ValueError(
            f"lam: got {number}, expected a number other than 0: > 0 attends to large losses (imbalance), "
            "< 0 to small ones (label noise), inf is the plain mean"
        )
    return value


def per_sample(value: Tensor | None, name: str, like: Tensor, dtype: torch.dtype) -> Tensor | None:
    """One value per loss, contiguous, in `dtype`."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.shape != like.shape or value.device != like.device:
        got = f"shape {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {got}, expected one value per sample, shape {tuple(like.shape)} on {like.device}")
    if dtype == torch.bool and value.dtype != torch.bool:
        raise TypeError(f"{name}: got {value.dtype}, expected torch.bool (True = valid)")
    return value.detach().to(dtype).contiguous()


def target(logits: Tensor, target: Tensor) -> None:
    """Shapes, dtypes and devices of logits (B, C, ...) and target (B, ...)."""
    if not isinstance(logits, Tensor) or not isinstance(target, Tensor):
        raise TypeError(f"logits, target: got {type(logits).__name__} and {type(target).__name__}, expected tensors")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"logits: got {logits.dtype}, expected float32, float64, bfloat16 or float16")
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"target: got {target.dtype}, expected int64 or int32 class labels; use target.long()")
    if logits.dim() < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"target: got shape {tuple(target.shape)} for logits of shape {tuple(logits.shape)}, "
            "expected logits (B, C) or (B, C, d1, ...) and target (B) or (B, d1, ...)"
        )
    if target.device != logits.device:
        raise ValueError(f"target: got a tensor on {target.device}, expected {logits.device} as the logits")


def class_weight(weight: Tensor | None, logits: Tensor) -> Tensor | None:
    if weight is None:
        return None
    if weight.shape != logits.shape[1:2]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected one weight per class, ({logits.shape[1]},)")
    return weight.detach().to(logits.device, real_dtype(logits.dtype)).contiguous()


def smoothing(label_smoothing: float) -> float:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}, expected a number in [0, 1]")
    return float(label_smoothing)
