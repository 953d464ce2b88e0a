"""Every custom operator: schema, fake, autograd. The kernels are registered by the native libraries.

An operator makes the gradient of its value in the forward pass (the exponentials are at hand there) and returns it
beside the value; `attach` gives the value that gradient in autograd. So the graph keeps one buffer of the size of the
logits and not the logits themselves, and backward only multiplies by the upstream gradient, in place.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from . import _backend
from .reference import NORMALIZERS, real_dtype

_lib = torch.library.Library("absgd_fast", "DEF")

# ---- schemas and fakes ---------------------------------------------------------------------------------------------

# `flags` packs what never changes within a run into one integer (an argument costs about 0.1 us); ops_cpu.cpp has the same bits.
INIT_FIRST, UPDATE, WITH_GRAD = 4, 8, 16


def flags(normalizer: str, init: str) -> int:
    """Bits of the `flags` argument.

    >>> flags("batch", "first") == 1 | INIT_FIRST
    True
    """
    return NORMALIZERS.index(normalizer) | (INIT_FIRST if init == "first" else 0)


_STATE = "Tensor(a!) log_s, Tensor(b!) nonfinite, Tensor lam, float gamma, float alpha, float mix, float max_weight, int flags"
_ROWS = "Tensor? score, Tensor? sample_weight, Tensor? mask"
_LOSS = "Tensor logits, Tensor target, Tensor? class_weight, float label_smoothing, int ignore_index"


def _define(schema: str):
    """Declare an operator and its fake (shapes and dtypes of the results, for torch.compile)."""
    name = schema.split("(")[0]
    _lib.define(schema)
    # Autograd is attached by hand below, so its dispatch keys have nothing to do (0.5 us a call).
    for key in ("Autograd", "ADInplaceOrView"):
        _lib.impl(name, torch.library.fallthrough_kernel, key)
    return torch.library.register_fake(f"absgd_fast::{name}", lib=_lib)


def _made(like: Tensor, with_grad: bool) -> Tensor:
    """A gradient made in the forward pass. Not in float16: what a loss scale (GradScaler) is there to lift into range would
    already be 0 when backward brings that scale."""
    dtype = torch.float32 if like.dtype == torch.float16 else like.dtype
    return like.new_empty(like.shape if with_grad else (0,), dtype=dtype)


@_define(f"logit_loss({_LOSS}, bool with_grad) -> (Tensor losses, Tensor grad)")
def _(logits, target, class_weight, label_smoothing, ignore_index, with_grad):
    return logits.new_empty(target.shape, dtype=real_dtype(logits.dtype)), _made(logits, with_grad)


@_define(f"robust_logit_loss({_LOSS}, {_ROWS}, {_STATE}) -> (Tensor loss, Tensor rows, Tensor grad)")
def _(logits, target, class_weight, label_smoothing, ignore_index, score, sample_weight, mask, log_s, nonfinite, lam,
      gamma, alpha, mix, max_weight, flags):  # fmt: skip
    real = real_dtype(logits.dtype)
    rows = logits.new_empty((3, *target.shape), dtype=real)
    return logits.new_empty((), dtype=real), rows, _made(logits, bool(flags & WITH_GRAD))


@_define(f"robust_loss(Tensor losses, {_ROWS}, {_STATE}) -> (Tensor loss, Tensor rows, Tensor grad)")
def _(losses, score, sample_weight, mask, log_s, nonfinite, lam, gamma, alpha, mix, max_weight, flags):
    return losses.new_empty(()), losses.new_empty((3, *losses.shape)), _made(losses, bool(flags & WITH_GRAD))


@_define(
    "robust_weights(Tensor losses, Tensor log_s, Tensor lam, Tensor? mask, float gamma, float alpha, int flags)"
    " -> (Tensor weights, Tensor log_s_new, Tensor shares)"
)
def _(losses, log_s, lam, mask, gamma, alpha, flags):
    return losses.new_empty(losses.shape), log_s.new_empty(()), losses.new_empty((2,), dtype=torch.float64)


@_define("robust_weights_backward(Tensor weights, Tensor grad_weights, Tensor grad_log_s, Tensor lam, Tensor shares) -> Tensor")
def _(weights, grad_weights, grad_log_s, lam, shares):
    return weights.new_empty(weights.shape)


@_define("scale(Tensor grad, Tensor upstream, bool to_half) -> Tensor")
def _(grad, upstream, to_half):
    return grad.new_empty(grad.shape, dtype=torch.float16 if to_half else grad.dtype)


@_define("scale_(Tensor(a!) grad, Tensor upstream) -> ()")
def _(grad, upstream):
    return None


@_define(
    "sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, float momentum, float dampening,"
    " float weight_decay, bool nesterov, bool maximize, bool heavy_ball) -> ()"
)
def _(params, grads, momentum_buffers, lr, momentum, dampening, weight_decay, nesterov, maximize, heavy_ball):
    return None


# The same step over the table of a StepPlan: writes the tensors whose addresses are in it (eager only).
@_define("sgd_planned_step(Tensor(a!) table) -> ()")
def _(table):
    return None


_lib.define("isas() -> str")
_lib.define("use_isa(str name) -> bool")
_lib.define("native_signatures() -> str")

_backend.why_not("cpu")  # registers the CPU kernels, if they are there


# ---- autograd ------------------------------------------------------------------------------------------------------

_scale = torch.ops.absgd_fast.scale.default
# The overload's own callable, without the Python frame of OpOverload.__call__ (0.3 us). torch.compile cannot see through it.
_scale_ = torch.ops.absgd_fast.scale_.default._op

# True while the graph of the running backward is kept (retain_graph=True). Without this torch the gradient is copied.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class _Attach(torch.autograd.Function):
    """value, with d value / d x = grad (one number or one row per element of value)."""

    @staticmethod
    def forward(ctx, x: Tensor, made: tuple[Tensor, Tensor]) -> Tensor:
        value, grad = made
        ctx.save_for_backward(grad)
        ctx.to_half = x.dtype == torch.float16
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (grad,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            raise RuntimeError(
                "absgd_fast: create_graph=True through a fused kernel, which has only a first derivative;"
                ' use backend="reference" for second derivatives'
            )
        if ctx.to_half or _graph_is_kept():
            return _scale(grad, upstream, ctx.to_half), None
        _scale_(grad, upstream)
        return grad, None


class _AttachCompiled(torch.autograd.Function):
    """The same for torch.compile, where autograd sees tensors only and results must be new."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.to_half = x.dtype == torch.float16
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (grad,) = ctx.saved_tensors
        return _scale(grad, upstream, ctx.to_half), None, None


# Function.apply is a Python wrapper (1 us) that serves setup_context and functorch; neither is used here: transforms
# take the differentiable formula of reference.py (see `differentiable`).
_attach = super(torch.autograd.Function, _Attach).apply


def attach(x: Tensor, value: Tensor, grad: Tensor) -> Tensor:
    """value as a function of x whose gradient is already known: backward gives upstream * grad."""
    if torch.compiler.is_compiling():
        return _AttachCompiled.apply(x, value, grad)
    return _attach(x, (value, grad))


class _RobustWeights(torch.autograd.Function):
    """(W, log s') differentiable in the losses (MATH: vjp in csrc/math.h robust_weight_vjp)."""

    @staticmethod
    def forward(ctx, losses, log_s, lam, mask, gamma, alpha, flags):
        weights, new_log_s, shares = torch.ops.absgd_fast.robust_weights(losses, log_s, lam, mask, gamma, alpha, flags)
        ctx.save_for_backward(weights, lam, shares)
        return weights, new_log_s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_weights, grad_log_s):
        weights, lam, shares = ctx.saved_tensors
        grad = torch.ops.absgd_fast.robust_weights_backward(weights, grad_weights.contiguous(), grad_log_s, lam, shares)
        return grad, None, None, None, None, None, None


robust_weights = _RobustWeights.apply


# ---- which backend serves ------------------------------------------------------------------------------------------


def native(device: torch.device, backend: str | None) -> bool:
    """Whether the operators above serve this call; otherwise reference.py does.

    Inside torch.func transforms (vmap, grad, jvp) only the differentiable formula does.
    """
    if torch._C._are_functorch_transforms_active():
        return False
    return _backend.select(device, backend) != "reference"


_BAD_LABEL = re.compile(r"absgd_fast label out of range: label=(-?\d+) row=(\d+) classes=(\d+);")


def translated(error: RuntimeError) -> Exception:
    """The stable ABI passes every C++ error on as RuntimeError; give a bad label its own type and words."""
    found = _BAD_LABEL.search(str(error))
    if found is None:
        return error
    return bad_label(*map(int, found.groups()))


def bad_label(label: int, row: int, classes: int) -> IndexError:
    return IndexError(
        f"target: label {label} in row {row} (counted over the flattened target), expected 0 <= label < {classes};"
        " pass ignore_index for rows that shall not count"
    )


def check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for the first label out of range; reads the labels, so for tensors on the CPU."""
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        row = int(bad.flatten().nonzero()[0])
        raise bad_label(int(target.flatten()[row]), row, classes)
