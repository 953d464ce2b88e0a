"""Checks of arguments. Each error says what was given, what is expected, and what to do instead."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from typing import Any, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ._exact import exact_dtype
from ._numbers import integer, is_real, listed, real
from .reference import real_dtype

TRACED = (FakeTensor, FunctionalTensor)  # the tensors of FakeTensorMode, and those that torch.export traces with
_FLOATS = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}  # the names of NumPy's dtypes


def has_values(x: Tensor) -> bool:
    """Whether x has numbers to look at: not on the meta device, in FakeTensorMode, and while torch.export traces."""
    return not x.is_meta and not isinstance(x, TRACED)


def unit_interval(value: float, name: str) -> float:
    """A number in (0, 1] as a float; ValueError for anything else."""
    number = real(value)
    if number is None or not 0 < number <= 1:
        raise ValueError(f"{name}: got {value!r}, expected a number in (0, 1]")
    return number


def positive(value: float, name: str) -> float:
    """A finite number > 0 as a float; ValueError for anything else."""
    number = real(value)
    if number is None or not 0 < number < math.inf:
        raise ValueError(f"{name}: got {value!r}, expected a finite number > 0")
    return number


def at_least(value: int, name: str, least: int, expected: str | None = None) -> int:
    """An integer >= least as an int; ValueError for anything else. expected: what is allowed, in other words."""
    number = integer(value)
    if number is None or number < least:
        close = real(value)
        hint = f", such as int({value})" if number is None and close is not None and least <= close < math.inf else ""
        raise ValueError(f"{name}: got {value!r}, expected {expected or f'an integer >= {least}'}{hint}")
    return number


def finite(value: float | Tensor, name: str) -> float:
    """A finite number, or a tensor of one, as a float; ValueError for anything else."""
    number = real(value, tensors=True)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{name}: got {value!r}, expected a finite number")
    return number


def max_weight(value: float | Tensor | None) -> float:
    """An upper bound of weights as a float: infinity for None. ValueError for anything but a positive number."""
    bound = math.inf if value is None else real(value, tensors=True)
    if bound is None or not bound > 0:
        raise ValueError(f"max_weight: got {value!r}, expected a positive number or None")
    return bound


def ignore_index(value: int | Tensor) -> int:
    """The label of rows that do not count, as an int; ValueError for anything but an integer of 64 bits."""
    label = integer(value, tensors=True)
    if label is None or not -(2**63) <= label < 2**63:
        raise ValueError(f"ignore_index: got {value!r}, expected an integer (int64): the label of rows that do not count")
    return label


def choice(value: str, name: str, choices: tuple[str, ...]) -> str:
    """One of `choices`; ValueError for anything else."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
    return value


def scalar(value: float | Tensor, name: str) -> float | Tensor:
    """A real 0-d tensor as it is, or a number as a float; ValueError for a wrong shape or size, TypeError for the rest."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: got a tensor of shape {tuple(value.shape)}, expected a number or a 0-d tensor")
        return _real_tensor(value, name)
    number = real(value)
    if number is None:
        if is_real(value):
            raise ValueError(f"{name}: got {value!r}, expected a number that a float can hold")
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number or a 0-d tensor")
    return number


def _real_tensor(value: Tensor, name: str) -> Tensor:
    """TypeError for a tensor of bools or of complex numbers. Its value is not looked at."""
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name}: got a tensor of {value.dtype}, expected a real number")
    return value


def not_learned(value: object, name: str) -> None:
    """RuntimeError for a tensor that requires grad, by which nothing here is differentiated; in the words of torch."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: got a tensor that requires grad, but the result is not differentiable with respect to argument {name!r}."
            f" This input cannot have requires_grad True; expected {name}.detach()"
        )


def lam(value: float | Tensor) -> float | Tensor:
    """A lambda: any number except 0 and NaN as a float, or a 0-d tensor; RuntimeError for a tensor that requires grad.

    The value of a tensor is checked on the CPU alone, because on another device the host would wait for it.
    """
    not_learned(value, "lam")
    value = scalar(value, "lam")
    if isinstance(value, Tensor) and (value.device.type != "cpu" or torch.compiler.is_compiling()):
        return value
    number = float(value)
    if abs(number) < torch.finfo(torch.float32).tiny or math.isnan(number):  # 0 in float32 too
        raise ValueError(
            f"lam: got {number}, expected a number other than 0: > 0 attends to large losses (imbalance), "
            "< 0 to small ones (label noise), inf is the plain mean"
        )
    return value


@overload
def per_sample(value: Tensor, name: str, like: Tensor, dtype: torch.dtype, *, constant: bool = True) -> Tensor: ...
@overload
def per_sample(value: Tensor | None, name: str, like: Tensor, dtype: torch.dtype, *, constant: bool = True) -> Tensor | None: ...
def per_sample(value: Tensor | None, name: str, like: Tensor, dtype: torch.dtype, *, constant: bool = True) -> Tensor | None:
    """One value per sample, contiguous, in `dtype`; None stays None. `constant`: detached, because nothing goes through it.

    Raises:
        ValueError: value is no tensor, or differs from `like` in shape or device.
        TypeError: dtype is bool and value is not.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.shape != like.shape or value.device != like.device:
        got = f"shape {tuple(value.shape)} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {got}, expected one value per sample, shape {tuple(like.shape)} on {like.device}")
    if dtype == torch.bool and value.dtype != torch.bool:
        raise TypeError(f"{name}: got {value.dtype}, expected torch.bool (True = valid)")
    return (value.detach() if constant else value).to(dtype).contiguous()


def floating(value: object, name: str, meaning: str) -> Tensor:
    """A floating tensor; TypeError for anything else. Integers are refused, because they are most often labels."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: got {got}, expected a floating tensor of {meaning}; convert integers with .float()")
    return value


def losses(value: object) -> Tensor:
    """Per-sample losses: a floating tensor with at least one dimension; TypeError or ValueError for anything else."""
    value = floating(value, "losses", "per-sample losses")
    if value.dim() == 0:
        raise ValueError('losses: got shape (), expected (B,) per-sample losses; use reduction="none"')
    return value


def groups(value: Tensor, like: Tensor) -> Tensor:
    """One integer per sample, contiguous, int64."""
    out = per_sample(value, "groups", like, torch.int64)
    if out is None:
        raise ValueError("groups: got None, expected one integer per sample, equal for samples of the same group")
    if value.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"groups: got {value.dtype}, expected integers, equal for samples of the same group")
    return out


def tilt(value: float, name: str) -> float:
    """A tilt as a float: any number except NaN; ValueError for anything else."""
    number = real(value)
    if number is None or math.isnan(number):
        raise ValueError(f"{name}: got {value!r}, expected a number: > 0 attends to large losses, < 0 to small ones")
    return number


def batched(logits: Tensor) -> None:
    """ValueError for logits that are not (B, C, ...)."""
    if logits.dim() < 2:
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, expected (B, C) or (B, C, d1, ...): one logit per class; use"
            " logits.unsqueeze(0) and target.unsqueeze(0) for a batch of one sample"
        )


LABELS = (torch.int64, torch.int32)  # the dtypes of labels that operators read


def target(logits: Tensor, target: Tensor, soft: bool = True, one_sample: bool = False) -> Tensor:
    """The target as operators read it, once logits and target fit together in shape, dtype and device.

    Args:
        logits: (B, C, ...), floating.
        target: (B, ...) integer labels, or probabilities of the shape of the logits. Labels in one of `LABELS` are returned as
            they are, uint8 ones as int64, and probabilities contiguous in the dtype of the losses. As in torch, labels may be
            uint8 if they have at most one dimension.
        soft: whether the loss takes probabilities.
        one_sample: whether the logits may be those of one sample, (C), with a label (), or (C) probabilities.

    Raises:
        TypeError: logits that are not floating, a target of another dtype, or no tensors.
        ValueError: shapes or devices that do not fit, or probabilities without `soft`.
    """
    if not isinstance(logits, Tensor) or not isinstance(target, Tensor):
        raise TypeError(f"logits, target: got {type(logits).__name__} and {type(target).__name__}, expected tensors")
    if not logits.dtype.is_floating_point:
        swapped = " (are logits and target swapped?)" if target.is_floating_point() else ""
        raise TypeError(f"logits: got {logits.dtype}, expected float32, float64, bfloat16 or float16{swapped}")
    if not (one_sample and logits.dim() == 1):
        batched(logits)
    if target.is_floating_point() and target.shape == logits.shape:
        if not soft:
            raise ValueError(
                "target: got probabilities, expected class labels: only cross-entropy (without a margin) has soft targets"
            )
        if target.device != logits.device:
            raise ValueError(f"target: got a tensor on {target.device}, expected {logits.device}, the device of the logits")
        return target.to(real_dtype(logits.dtype)).contiguous()
    if target.dtype not in LABELS and not (target.dtype is torch.uint8 and target.dim() <= 1):
        raise TypeError(
            f"target: got {target.dtype}, expected class labels in int64 or int32, for one-dimensional labels also in uint8 (use"
            f" target.long()), or probabilities of the shape of the logits, {tuple(logits.shape)}"
        )
    if target.shape != logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else target.dim():
        raise ValueError(
            f"target: got shape {tuple(target.shape)} for logits of shape {tuple(logits.shape)}, "
            f"expected logits (B, C) or (B, C, d1, ...) and target (B) or (B, d1, ...){_shape_hint(logits, target)}"
        )
    if target.device != logits.device:
        raise ValueError(f"target: got a tensor on {target.device}, expected {logits.device}, the device of the logits")
    return target if target.dtype in LABELS else target.long()


def _shape_hint(logits: Tensor, target: Tensor) -> str:
    """What may be wrong with labels whose shape does not fit the logits; empty if it is none of the usual mistakes."""
    if logits.dim() == 1:
        return "; the logits are those of one sample, whose target is one label of shape ()"
    if target.dim() == logits.dim() and target.squeeze(1).shape == logits.shape[:1] + logits.shape[2:]:
        return "; use target.squeeze(1)"
    if target.shape == logits.shape:
        return "; use target.float() if it holds probabilities (one-hot labels are such), or target.argmax(1) for labels"
    if target.dim() > 0 and len(target) != len(logits):
        return f"; the logits have {len(logits)} rows, the target has {len(target)}"
    return ""


def class_vectors(scale: Tensor | None, shift: Tensor | None, margin: Tensor | None, logits: Tensor) -> Tensor | None:
    """The class vectors S, D, M as one tensor (3, C) in the dtype of the losses, with 1, 0, 0 for those not given.

    None if none is given, or for logits that `target` refuses. The values are not checked, because on a GPU the host would wait.
    """
    given = {"scale": scale, "shift": shift, "margin": margin}
    like = next((v for v in given.values() if v is not None), None)
    if like is None or not isinstance(logits, Tensor) or logits.dim() == 0:
        return None
    classes = logits.shape[0 if logits.dim() == 1 else 1]
    for name, v in given.items():
        not_learned(v, name)
        if v is not None and not (isinstance(v, Tensor) and v.shape == (classes,)):
            got = f"shape {tuple(v.shape)}" if isinstance(v, Tensor) else repr(v)
            raise ValueError(f"{name}: got {got}, expected one number per class, a tensor ({classes},)")
    ones = like.new_ones(classes, dtype=real_dtype(logits.dtype))
    return torch.stack(
        [ones if scale is None else scale.to(ones), *(ones * 0 if v is None else v.to(ones) for v in (shift, margin))]
    )


def adjust(vectors: Tensor | None, logits: Tensor) -> Tensor | None:
    """The class vectors S, D, M (3, C) in the dtype and on the device that the kernels read."""
    if vectors is None:
        return None
    if vectors.shape[1:] != logits.shape[1:2]:
        batched(logits)
        raise ValueError(
            f"class vectors: got {vectors.shape[1]} classes (cls_num_list), expected {logits.shape[1]} as in the logits"
        )
    return _per_class(vectors, "class vectors", logits)


def _per_class(x: Tensor, name: str, logits: Tensor) -> Tensor:
    """x in the dtype and on the device that the kernels read; RuntimeError if it requires grad.

    Most often x has them already. To check this here costs 1 us less than calls of torch that change nothing.
    """
    real = real_dtype(logits.dtype)
    if x.dtype is real and not x.requires_grad and x.device == logits.device and x.is_contiguous():
        return x
    not_learned(x, name)
    return x.to(logits.device, real).contiguous()


def within(value: float, name: str, low: float, high: float, open_below: bool = False, open_above: bool = False) -> float:
    """A finite number between low and high as a float; ValueError for anything else."""
    found = real(value)
    number = math.nan if found is None else found
    above, below = low < number if open_below else low <= number, number < high if open_above else number <= high
    if not (math.isfinite(number) and above and below):
        upper = "inf)" if math.isinf(high) else f"{high}{')' if open_above else ']'}"
        raise ValueError(f"{name}: got {value!r}, expected a number in {'(' if open_below else '['}{low}, {upper}")
    return number


def class_counts(cls_num_list: Sequence[float] | Tensor, name: str = "cls_num_list") -> list[float]:
    """The number of samples of each class; ValueError unless all are positive and finite."""
    counts = _numbers(cls_num_list, name)
    if not all(0 < count < math.inf for count in counts):
        raise ValueError(f"{name}: got {cls_num_list!r}, expected one positive number of samples per class")
    return counts


def _numbers(values: Any, name: str) -> list[float]:
    """The numbers of a sequence (0-d tensors are numbers), an array or a tensor; an error by name for anything else."""
    if isinstance(values, (Mapping, Set)):  # of a mapping only the keys would be read
        hint = "list(d.values())" if isinstance(values, Mapping) else "a list"
        raise ValueError(f"{name}: got a {type(values).__name__}, expected one number per class in their order, such as {hint}")
    for x in filter(lambda x: isinstance(x, Tensor), values if isinstance(values, (list, tuple)) else [values]):
        strided(x, name)
        not_learned(x, name)
        if not has_values(x):
            where = "on the meta device or of FakeTensorMode"
            raise ValueError(f"{name}: got a tensor {where}, which has no values; expected a list, or a tensor with values")
    if not (numbers := listed(values)):
        raise ValueError(f"{name}: got {values!r}, expected one number per class")
    return numbers


def strided(x: Tensor, name: str) -> None:
    """TypeError for a sparse tensor, or one of another layout than torch's usual one."""
    if x.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {x.layout}, expected {torch.strided}; a sparse one has to_dense()")


def given_class_weight(weight: Tensor | Sequence[float]) -> Tensor:
    """The class weights that a user gave, (C) floating, as a copy without a graph.

    A tensor and a floating array keep their dtype; other numbers become floats of `exact_dtype`. ValueError if they are not one
    finite float per class, or have no values (on the meta device). RuntimeError if they require grad. TypeError for sparse ones.
    """
    not_learned(weight, "weight")
    if isinstance(weight, Tensor):
        strided(weight, "weight")
        weight = weight.detach().clone()
    else:
        dtype, device = _FLOATS.get(str(getattr(weight, "dtype", None)), exact_dtype()), torch.get_default_device()
        numbers = list(map(float, _numbers(weight, "weight")))
        weight = torch.tensor(numbers, dtype=dtype, device="cpu" if device.type == "meta" else device)  # one that has values
    if weight.dim() != 1 or not weight.is_floating_point():
        raise ValueError(f"weight: got shape {tuple(weight.shape)} {weight.dtype}, expected one float weight per class, (C,)")
    if weight.is_meta:
        raise ValueError('weight: got a tensor on the meta device, which has no values; make it with device="cpu"')
    return per_class_finite(weight, "weight")


def per_class_finite(x: Tensor, name: str) -> Tensor:
    """x (C); ValueError if a number is NaN or infinite. On a GPU the host waits, so only constructors and setters call it.

    Tensors without values pass, as all do while torch.compile traces.
    """
    if torch.compiler.is_compiling() or not has_values(x):
        return x
    found = x.to(real_dtype(x.dtype)).isfinite()  # torch has no isfinite for float8
    if not bool(found.all()):
        k = int(found.logical_not().nonzero()[0])
        raise ValueError(f"{name}: got {float(x[k])} for class {k}, expected a finite number for each class")
    return x


def class_weight(weight: Tensor | None, logits: Tensor) -> Tensor | None:
    """The class weights (C) in the dtype and on the device that the kernels read; None stays None."""
    if weight is None:
        return None
    if weight.shape != logits.shape[1:2]:
        batched(logits)
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected one weight per class, ({logits.shape[1]},)")
    return _per_class(weight, "weight", logits)


def smoothing(label_smoothing: float) -> float:
    """A label smoothing in [0, 1] as a float; ValueError for anything else."""
    number = real(label_smoothing, tensors=True)
    if number is None or not 0 <= number <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing!r}, expected a number in [0, 1]")
    return number


def momentum_sgd(
    momentum: float, dampening: float, weight_decay: float, nesterov: bool, heavy_ball: bool
) -> tuple[float, float, float]:
    """The three numbers of a momentum step as floats; ValueError for one out of range, or options that exclude each other."""
    momentum = within(momentum, "momentum", 0, math.inf)
    weight_decay = within(weight_decay, "weight_decay", 0, math.inf)
    dampening = within(dampening, "dampening", -math.inf, math.inf, open_below=True, open_above=True)
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(f"nesterov: got momentum {momentum} and dampening {dampening}, expected a momentum > 0 and no dampening")
    if heavy_ball and (nesterov or dampening != 0):
        raise ValueError(
            f"heavy_ball is Eq. 2 of the paper, which has no nesterov (got {nesterov}) and no dampening (got {dampening});"
            " use heavy_ball=False with these"
        )
    return momentum, dampening, weight_decay


def rate(lr: float | Tensor) -> float | Tensor:
    """A learning rate >= 0 as a float, or a real one-element tensor, whose value is not checked; ValueError or TypeError else."""
    if not isinstance(lr, Tensor):
        return within(lr, "lr", 0, math.inf)
    if lr.numel() != 1:
        raise ValueError(f"lr: got a tensor of shape {tuple(lr.shape)}, expected a number or a one-element tensor")
    return _real_tensor(lr, "lr")


def tensor_rate(lr: Tensor) -> Tensor:
    """A tensor lr as the kernels read it: float32 or float64. Other dtypes become float32, so no formula is rounded to them."""
    return lr if lr.dtype in (torch.float32, torch.float64) else lr.to(torch.float32)


def weighted_step(params: list[Tensor], buffers: list[Tensor] | None, grads: list[Tensor], losses: Tensor) -> None:
    """The checks of `functional.weighted_momentum_step_`: shapes, dtypes and devices, and that no written tensor shares memory.

    Args:
        params, grads: the parameters and their per-sample gradients.
        buffers: the momentum buffers, or None without momentum.
        losses: (B).
    """
    lists = {"params": params, "per_sample_grads": grads} | ({} if buffers is None else {"momentum_buffers": buffers})
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            hint = ", zeros at first" if name == "momentum_buffers" else ""
            raise ValueError(f"{name}: got {len(tensors)} tensors, expected one{hint} for each of the {len(params)} params")
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}[{i}]: got {type(t).__name__}, expected a tensor")
            strided(t, f"{name}[{i}]")
    buffers = buffers or []
    if losses.dim() != 1:
        raise ValueError(f"losses: got shape {tuple(losses.shape)}, expected (B,), one loss per sample")
    written = [(f"params[{i}]", p) for i, p in enumerate(params)] + [(f"momentum_buffers[{i}]", b) for i, b in enumerate(buffers)]
    for i, (p, g) in enumerate(zip(params, grads)):
        if p.dtype not in _STEPPED:
            raise TypeError(f"params[{i}]: got {p.dtype}, expected float32, float64, bfloat16 or float16")
        real = real_dtype(p.dtype)
        if losses.dtype != real:
            raise TypeError(f"losses: got {losses.dtype} with params[{i}] of {p.dtype}, expected {real}: use losses.to({real})")
        beside: list[tuple[str, Tensor, tuple[int, ...], torch.dtype]] = [
            (f"per_sample_grads[{i}]", g, (len(losses), *p.shape), p.dtype)
        ]
        if buffers:
            beside.append((f"momentum_buffers[{i}]", buffers[i], tuple(p.shape), real))
        for name, t, shape, dtype in beside:
            if tuple(t.shape) != shape:
                raise ValueError(
                    f"{name}: got shape {tuple(t.shape)} with params[{i}] of shape {tuple(p.shape)} and {len(losses)} losses,"
                    f" expected {shape}"
                )
            if t.dtype != dtype:
                raise TypeError(f"{name}: got {t.dtype} with params[{i}] of {p.dtype}, expected {dtype}")
        for name, t in ((f"params[{i}]", p), *((name, t) for name, t, *_ in beside)):
            if t.device != losses.device:
                raise ValueError(f"{name}: got a tensor on {t.device}, expected {losses.device}, the device of the losses")
    for name, t in written:
        if torch._debug_has_internal_overlap(t) == 1:
            raise ValueError(
                f"{name}: got a tensor with elements that share one place in memory, expected one place for each: clone() it"
            )
    if torch.compiler.is_compiling():  # tensors have no addresses yet
        return
    read = [("losses", losses), *((f"per_sample_grads[{i}]", g) for i, g in enumerate(grads))]
    spans = [(*_span(t, t.is_contiguous()), name, True) for name, t in written if t.numel()]
    spans = sorted(spans + [(*_span(t, True), name, False) for name, t in read if t.numel()])
    for i, (_, end, name, writes) in enumerate(spans):
        for start, _, other, writes_too in spans[i + 1 :]:
            if start >= end:
                break
            if writes or writes_too:
                raise ValueError(f"{name}, {other}: share memory, expected tensors of their own: clone() one of them")


_STEPPED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _span(t: Tensor, whole: bool) -> tuple[int, int]:
    """The addresses at which a tensor begins and ends.

    Without `whole` this is the range of its first element: elements of other tensors may lie in the gaps of a strided tensor.
    """
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride())) if whole else 0
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
