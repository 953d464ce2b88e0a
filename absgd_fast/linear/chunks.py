"""The walk over the samples of a linear head, a chunk at a time.

It makes the logits of a chunk and their losses, and overwrites the logits with the gradients of the losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .. import _checks, ops
from ..functional import LossSpec
from ..losses import fused_spec
from ..reference import real_dtype
from ..robust.normalizer import Samples
from ..robust.paths import checked
from .products import products

# How many chunks there are on a device, unless the user gives their size; but a chunk has LEAST_SAMPLES samples at least.
CHUNKS = {"cpu": 25}
CHUNKS_ELSEWHERE = 8
LEAST_SAMPLES = 256


def check_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """TypeError if an input is no tensor that this process has whole.

    Casting for autocast comes after this check, because it would change a module.
    """
    for name, t, expected in (
        ("hidden", hidden, "(n, d) or (..., d)"),
        ("linear_weight", weight, "(C, d), such as head.weight"),
        ("bias", bias, "(C,) or None, such as head.bias"),
    ):
        if not (isinstance(t, Tensor) or (name == "bias" and t is None)):
            raise TypeError(f"{name}: got {type(t).__name__}, expected a tensor {expected}")
        if hasattr(t, "_local_tensor"):
            raise TypeError(
                f"{name}: got a DTensor, of which this process has a part, expected a whole tensor: in the forward of a module"
                " that FSDP2 shards its weight is whole, and causal_lm_loss makes the loss there; elsewhere use .full_tensor()"
            )


def check_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """ValueError or TypeError if shapes, dtypes or devices of the inputs do not fit each other."""
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"LinearABLoss: got hidden {tuple(hidden.shape)} and linear_weight {tuple(weight.shape)}, expected (n, d)"
            " or (..., d), such as (B, T, d), and (C, d)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}, one number per class")
    for name, t in (("linear_weight", weight), ("bias", bias)):
        if t is not None and t.dtype != hidden.dtype:
            raise TypeError(f"{name}: got {t.dtype}, but hidden is {hidden.dtype}; expected one dtype")
        if t is not None and t.device != hidden.device:
            raise ValueError(f"{name}: got a tensor on {t.device}, but hidden is on {hidden.device}")
    if hidden.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(
            f"hidden: got {hidden.dtype}, expected float32, float64 or bfloat16, whose range holds sums without a loss scale"
        )


def in_rows(hidden: Tensor, target: Tensor, samples: Samples, classes: int) -> tuple[Tensor, Tensor, Samples]:
    """hidden (..., d), target and samples with one row per sample, (n, d) and so on; views of them where torch has such views.

    ValueError or TypeError if they do not fit each other.
    """
    shape, like = hidden.shape[:-1], hidden.new_empty(())
    if not isinstance(target, Tensor):
        raise TypeError(f"target: got {type(target).__name__}, expected a tensor")
    if target.shape not in (shape, (*shape, classes)):
        raise ValueError(
            f"target: got shape {tuple(target.shape)} with hidden {tuple(hidden.shape)} and {classes} classes, expected labels"
            f" {tuple(shape)}, or probabilities {(*shape, classes)}"
        )
    if target.shape == shape:
        _checks.target(like.expand(shape[0], classes, *shape[1:]), target)  # its dtype
    samples = checked(samples, like.expand(shape), real_dtype(hidden.dtype))
    n = shape.numel()
    rows = Samples(*(None if t is None else t.reshape(n) for t in samples))
    return hidden.reshape(n, hidden.shape[-1]), target.reshape(n, *target.shape[len(shape) :]), rows


class Chunks:
    """The checked inputs of one forward pass, and the walk over its samples.

    size: samples of a chunk; None: by the device. target_slopes: room for the derivatives of the losses by soft targets, (n, C),
    which a walk that makes gradients fills; None: nobody asks for them.
    """

    target_slopes: Tensor | None = None

    def __init__(
        self,
        criterion: Callable,
        operators: ops.Operators,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        samples: Samples,
        size: int | None,
    ):
        self.operators, self.classes = operators, weight.shape[0]
        self.hidden, self.weight, self.bias = hidden.contiguous(), weight, bias
        self.products = products(self.hidden, weight, bias)
        self.spec = _spec(criterion, hidden.new_empty((0, self.classes)))
        like = hidden[:, 0] if hidden.shape[1] else hidden.new_empty(len(hidden))
        target = _checks.target(hidden.new_empty(()).expand(len(hidden), self.classes), target, soft=self.spec.soft).contiguous()
        self.samples = checked(samples, like, real_dtype(hidden.dtype))
        self.target = ops.masked_target(target, self.samples.mask, self.spec)
        self.size = size or max(LEAST_SAMPLES, math.ceil(len(hidden) / CHUNKS.get(hidden.device.type, CHUNKS_ELSEWHERE)))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """(samples, their logits) of each chunk, all in one buffer: the logits of the next chunk overwrite them."""
        n = len(self.hidden)
        buffer = self.hidden.new_empty((min(self.size, n), self.classes), dtype=self.products.dtype)
        for begin in range(0, n, self.size):
            part, logits = slice(begin, min(begin + self.size, n)), buffer[: min(self.size, n - begin)]
            self.products.logits(part, logits)
            yield part, logits

    def losses(self, then: Callable[[slice, Tensor, Tensor, Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
        """Losses and validity (bool) of all samples.

        With `then` the gradients of the losses overwrite the logits, and then(part, gradients, losses, validity) is called for
        each chunk.
        """
        found = [(self.hidden.new_empty(0, dtype=real_dtype(self.hidden.dtype)), self.target.new_empty(0, dtype=torch.bool))]
        for part, logits in self:
            found.append(self._losses_of(logits, part, in_place=then is not None))
            if then is not None:
                then(part, logits, *found[-1])
        losses, valid = map(torch.cat, zip(*found))
        return losses, valid

    def _losses_of(self, logits: Tensor, part: slice, in_place: bool) -> tuple[Tensor, Tensor]:
        """Losses and validity of a chunk; in_place: the gradients of the losses overwrite the logits."""
        spec, operator = self.spec, self.operators.logit_loss_ if in_place else self.operators.logit_loss
        slopes = self.target_slopes if in_place else None
        if slopes is not None:
            slopes[part] = spec.target_slope(logits, self.target[part])
        try:
            losses, *_, valid = operator(logits, self.target[part], *spec)
        except RuntimeError as error:
            raise ops.translated(error, part.start) from None
        valid = valid > 0
        if self.samples.mask is not None:
            valid &= self.samples.mask[part]
            if in_place and spec.soft and self.target.is_floating_point():
                logits.masked_fill_(~valid.unsqueeze(1), 0.0)
            if slopes is not None:
                slopes[part].masked_fill_(~valid.unsqueeze(1), 0.0)
        return losses, valid


def _spec(criterion: Callable, empty: Tensor) -> LossSpec:
    """The loss as the operators take it. empty: logits without rows, against which its class vectors are checked."""
    spec = fused_spec(criterion, empty)
    if spec is None:
        raise TypeError(
            f"criterion: got {type(criterion).__name__}, expected one of the fused losses (those of this package"
            " and torch.nn.CrossEntropyLoss), with reduction='none'; for any other loss use ABLoss(criterion)(hidden @ weight.T,"
            " target), which stores the logits"
        )
    weight, adjust = spec.class_weight, spec.adjust
    return spec._replace(class_weight=_checks.class_weight(weight, empty), adjust=_checks.adjust(adjust, empty))
