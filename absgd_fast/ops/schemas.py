"""Every operator of the package as one record: its schema, its fake, and which backends have it.

A record says which C++ libraries have the operator, which module of kernels/ has its Triton function, and whether it runs in
plain torch. tests/test_ops.py compares the records with the lists in csrc/ and with the attributes of `Operators` (backends.py).

Arguments and results of many schemas:
    flags               bits of _codes.py
    hyper_a, hyper_b    the two numbers of a loss (_codes.HYPERPARAMETERS) or of an optimizer's rule (optim/rule.py)
    adjust              (3, C): the class vectors S, D, M (docs/MATH.md §2.1)
    valid               a real number: 1 where a row counts, 0 where it is ignored, pruned, or (on a GPU) has a label out of range
    saved               what backward needs: the gradient, the statistics of the rows, or nothing, as the flags say
    sample_stats        (3, ...): losses, weights and validity of each sample
    partials            (K, 3 or more): the first three columns are results of reference.partial_stats
    settled             (6): the result of reference.settle (docs/MATH.md §8)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._codes import WITH_GRAD, WITH_STATS
from ..reference import real_dtype
from . import in_torch


@dataclass(frozen=True)
class Operator:
    """The record of one operator.

    Attributes:
        name: the name of the operator.
        schema: its arguments and results.
        fake: a function that makes empty results of the right shapes and dtypes, for torch.compile.
        native: the C++ libraries that have it, "cpu" and "cuda".
        triton: the module of kernels/ that has a Triton function of this name, or None.
        triton_flags: the arguments that the Triton function takes instead of `flags` (backends.py decodes them).
        cuda_arguments: how many of the last arguments only the CUDA kernels read; the Triton function does not take them.
        in_torch: the operator in plain torch, for `REFERENCE`, and for Triton if `triton` is None.
    """

    name: str
    schema: str
    fake: Callable
    native: tuple[str, ...] = ("cpu", "cuda")
    triton: str | None = None
    triton_flags: tuple[str, ...] = ()
    cuda_arguments: int = 0
    in_torch: Callable | None = None


RECORDS: dict[str, Operator] = {}


def _operator(schema: str, **who_has_it: Any) -> Callable[[Callable], Callable]:
    """A decorator of an operator's fake that makes the operator's record."""

    def record(fake: Callable) -> Callable:
        name = schema.split("(")[0]
        RECORDS[name] = Operator(name, schema, fake, **who_has_it)
        return fake

    return record


# lam is written in the mode "target" alone.
_STATE = (
    "Tensor(a!) log_s, Tensor(b!) nonfinite, Tensor(d!) lam, float gamma, float alpha, float mix, float max_weight, int flags"
)
_SAMPLES = "Tensor? score, Tensor? sample_weight, Tensor? mask"
_LOSS = "Tensor logits, Tensor target, Tensor? class_weight, Tensor? adjust, float hyper_a, float hyper_b, int ignore_index"

# The arguments that a Triton function takes instead of `flags`
_NORMALIZER = ("normalizer", "init_first")
_LOGIT_LOSS = ("kind", "prune", "report")


def _samples(logits: Tensor) -> tuple:
    return (logits.shape[0], *logits.shape[2:])


def _saved(like: Tensor, samples: tuple, flags: int) -> Tensor:
    """An empty result `saved`. The gradient is not stored in float16: before backward multiplies it by GradScaler's loss scale,
    small numbers would already be 0."""
    if flags & WITH_STATS:
        return like.new_empty((4, *samples), dtype=real_dtype(like.dtype))
    dtype = torch.float32 if like.dtype == torch.float16 else like.dtype
    return like.new_empty(like.shape if flags & WITH_GRAD else (0,), dtype=dtype)


# ---- losses on logits, alone and with the robust weights -----------------------------------------------------------------


@_operator(
    f"logit_loss({_LOSS}, int flags) -> (Tensor losses, Tensor saved, Tensor valid)",
    triton="losses",
    triton_flags=(*_LOGIT_LOSS, "with_stats"),
    in_torch=in_torch.logit_loss,
)
def _(logits, target, class_weight, adjust, hyper_a, hyper_b, ignore_index, flags):
    samples, real = _samples(logits), real_dtype(logits.dtype)
    return logits.new_empty(samples, dtype=real), _saved(logits, samples, flags), logits.new_empty(samples, dtype=real)


# The losses, as of logit_loss. The gradient of each row's own loss is written over the logits ((B, C) contiguous, not float16).
@_operator(
    f"logit_loss_({_LOSS.replace('Tensor logits', 'Tensor(c!) logits')}, int flags) -> (Tensor losses, Tensor valid)",
    triton="losses",
    triton_flags=_LOGIT_LOSS,
)
def _(logits, target, class_weight, adjust, hyper_a, hyper_b, ignore_index, flags):
    samples, real = _samples(logits), real_dtype(logits.dtype)
    return logits.new_empty(samples, dtype=real), logits.new_empty(samples, dtype=real)


# weighing: (4) float64, csrc/math/weights.h Weighing, or None. If it is given, sample_stats[1] has z instead of the weights
# (-inf: ignored, NaN: nonfinite), and backward and `weights_of` make the weights from it. So no launch has to wait for the last
# loss.
@_operator(
    f"robust_logit_loss({_LOSS}, {_SAMPLES}, {_STATE}, Tensor(c!)? weighing) -> (Tensor loss, Tensor sample_stats, Tensor saved)",
    triton="losses",
    triton_flags=(*_NORMALIZER, *_LOGIT_LOSS, "with_stats", "update"),
    cuda_arguments=1,
    in_torch=in_torch.robust_logit_loss,
)
def _(
    logits,
    target,
    class_weight,
    adjust,
    hyper_a,
    hyper_b,
    ignore_index,
    score,
    sample_weight,
    mask,
    log_s,
    nonfinite,
    lam,
    gamma,
    alpha,
    mix,
    max_weight,
    flags,
    weighing,
):
    samples, real = _samples(logits), real_dtype(logits.dtype)
    return logits.new_empty((), dtype=real), logits.new_empty((3, *samples), dtype=real), _saved(logits, samples, flags)


# stats (4, B, ...): the four numbers of each row of logits (csrc/math/losses.h RowGradient). smoothing: the label smoothing, for
# soft targets. sample_stats, weighing: those of robust_logit_loss, or None.
@_operator(
    "logit_loss_backward(Tensor logits, Tensor target, Tensor? class_weight, Tensor? adjust, float smoothing, Tensor stats,"
    " Tensor upstream, Tensor? sample_stats, Tensor? weighing) -> Tensor",
    native=("cuda",),
    triton="losses",
    cuda_arguments=2,
)
def _(logits, target, class_weight, adjust, smoothing, stats, upstream, sample_stats, weighing):
    return logits.new_empty(logits.shape)


# The gradient of logit_loss_backward, written over the logits (contiguous, not float16).
# upstream: one number for each row.
@_operator(
    "logit_loss_backward_(Tensor(a!) logits, Tensor target, Tensor? class_weight, Tensor? adjust, float smoothing, Tensor stats,"
    " Tensor upstream) -> ()",
    native=("cpu",),
)
def _(logits, target, class_weight, adjust, smoothing, stats, upstream):
    return None


# The robust loss of rows whose normaliser is already settled; it bounds their z. A row's weight exp(z - log s') is known as soon
# as its loss is, so its gradient is written while the row is on the chip. Other backends call logit_loss, robust_partial_stats
# and robust_apply instead.
@_operator(
    f"settled_logit_loss({_LOSS}, {_SAMPLES}, Tensor settled, Tensor log_s, Tensor lam, int flags)"
    " -> (Tensor loss, Tensor sample_stats, Tensor saved, Tensor partial_stats)",
    native=("cuda",),
)
def _(
    logits, target, class_weight, adjust, hyper_a, hyper_b, ignore_index, score, sample_weight, mask, settled, log_s, lam, flags
):
    samples, real = _samples(logits), real_dtype(logits.dtype)
    return (
        logits.new_empty((), dtype=real),
        logits.new_empty((3, *samples), dtype=real),
        _saved(logits, samples, WITH_GRAD),
        settled.new_empty(3),
    )


# ---- robust weights of losses that are there already ---------------------------------------------------------------------


@_operator(
    f"robust_loss(Tensor losses, {_SAMPLES}, {_STATE}) -> (Tensor loss, Tensor sample_stats, Tensor grad)",
    triton="weights",
    triton_flags=(*_NORMALIZER, "update", "with_grad"),
    in_torch=in_torch.robust_loss,
)
def _(losses, score, sample_weight, mask, log_s, nonfinite, lam, gamma, alpha, mix, max_weight, flags):
    return losses.new_empty(()), losses.new_empty((3, *losses.shape)), _saved(losses, losses.shape, flags)


# The three stages of robust_loss, for samples of several processes, micro-batches or chunks (docs/MATH.md §1.6, §5, §6).
# `settled` bounds z in robust_partial_stats, and in robust_apply if `bounded`.
@_operator(
    "robust_partial_stats(Tensor losses, Tensor? score, Tensor? mask, Tensor log_s, Tensor lam, Tensor? settled) -> Tensor",
    in_torch=in_torch.robust_partial_stats,
)
def _(losses, score, mask, log_s, lam, settled):
    return losses.new_empty((3,), dtype=torch.float64)


@_operator(
    "robust_settle(Tensor partials, Tensor(a!) log_s, Tensor(b!) nonfinite, Tensor lam, Tensor? reference, float gamma,"
    " float alpha, float grad_multiplier, int flags) -> Tensor",
    in_torch=in_torch.robust_settle,
)
def _(partials, log_s, nonfinite, lam, reference, gamma, alpha, grad_multiplier, flags):
    return partials.new_empty((6,))


@_operator(
    f"robust_apply(Tensor losses, {_SAMPLES}, Tensor settled, Tensor log_s, Tensor lam, bool bounded, float mix,"
    " float max_weight, int flags) -> (Tensor loss, Tensor sample_stats, Tensor grad)",
    in_torch=in_torch.robust_apply,
)
def _(losses, score, sample_weight, mask, settled, log_s, lam, bounded, mix, max_weight, flags):
    return losses.new_empty(()), losses.new_empty((3, *losses.shape)), _saved(losses, losses.shape, flags)


# dlog_s (2) float64: the derivatives of log s' and of the next state by z, each divided by W (csrc/math/weights.h
# robust_weight_vjp)
@_operator(
    "robust_weights(Tensor losses, Tensor log_s, Tensor lam, Tensor? mask, float gamma, float alpha, int flags)"
    " -> (Tensor weights, Tensor log_s_new, Tensor dlog_s)",
    triton="weights",
    triton_flags=_NORMALIZER,
    in_torch=in_torch.robust_weights,
)
def _(losses, log_s, lam, mask, gamma, alpha, flags):
    return losses.new_empty(losses.shape), log_s.new_empty(()), losses.new_empty((2,), dtype=torch.float64)


@_operator(
    "robust_weights_backward(Tensor weights, Tensor grad_weights, Tensor grad_log_s, Tensor lam, Tensor dlog_s) -> Tensor",
    triton="weights",
)
def _(weights, grad_weights, grad_log_s, lam, dlog_s):
    return weights.new_empty(weights.shape)


# ---- other weights -------------------------------------------------------------------------------------------------------

# Only the CPU has kernels of these two. On other devices torch's own kernels serve (weights/): a few launches on one number per
# row.


# W of a rule that solves for a level (RULES_OF_LOSSES). hyper_a, hyper_b: beta and reg of CVaR, or rho of chi-squared.
@_operator("rule_weights(Tensor losses, Tensor? mask, int rule, float hyper_a, float hyper_b) -> Tensor", native=("cpu",))
def _(losses, mask, rule, hyper_a, hyper_b):
    return losses.new_empty(losses.shape)


# W of group DRO. log_q is updated if `update`.
@_operator(
    "group_weights(Tensor losses, Tensor? mask, Tensor groups, Tensor(a!) log_q, float eta, bool update) -> Tensor",
    native=("cpu",),
)
def _(losses, mask, groups, log_q, eta, update):
    return losses.new_empty(losses.shape)


# The weights of L2RW (csrc/math/weights.h RectifiedNumbers). They are constants: nothing is differentiated through them.
@_operator("rectified(Tensor products) -> Tensor", triton="rectified", in_torch=in_torch.rectified)
def _(products):
    return products.new_empty(products.shape)


# ---- a gradient that is known, times the upstream one --------------------------------------------------------------------


@_operator("scale(Tensor grad, Tensor upstream, bool to_half) -> Tensor", triton="scale")
def _(grad, upstream, to_half):
    return grad.new_empty(grad.shape, dtype=torch.float16 if to_half else grad.dtype)


@_operator("scale_(Tensor(a!) grad, Tensor upstream) -> ()", triton="scale")
def _(grad, upstream):
    return None


# ---- steps ---------------------------------------------------------------------------------------------------------------


# One step of `rule` (an index of RULES) on all parameters.
# states: the states that the rule keeps, of all parameters, one kind after the other.
# steps: how many steps each parameter took, if the rule counts them.
# lr_tensor, grad_scale, found_inf: one number each on the device of the parameters (the last two on GPUs only), or None.
#     grad_scale divides grads, in place. Unless found_inf is 0, nothing is written.
# settled: of robust_settle, or None. The step multiplies the gradients by its SCALE; with nonfinite rows nothing is written.
# flags: those of a step.
@_operator(
    "step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, Tensor(d!)[] steps, Tensor? lr_tensor,"
    " Tensor? grad_scale, Tensor? found_inf, Tensor? settled, float lr, float weight_decay, float hyper_a, float hyper_b,"
    " float eps, int rule, int flags) -> ()",
    triton="step",
)
def _(
    params, grads, states, steps, lr_tensor, grad_scale, found_inf, settled, lr, weight_decay, hyper_a, hyper_b, eps, rule, flags
):
    return None


# The same step over the table of a StepPlan. It writes the tensors whose addresses stand in the table; torch.compile cannot see
# them.
# on: any of these tensors, for the dispatcher.
@_operator("planned_step(Tensor(a!) table, Tensor on) -> ()")
def _(table, on):
    return None


# The sum of the squares of each gradient in such a table, (tensors) float64. On other devices torch's own operators serve
# (optim/clipping.py).
@_operator("planned_squares(Tensor table, Tensor on) -> Tensor", native=("cpu",))
def _(table, on):
    raise NotImplementedError("planned_squares: the number of tensors stands in the table; torch.compile uses no plan")


# The robust weights of the losses (B), the mean of each gradient (B, *shape of the parameter) with these weights, and one step of
# sgd with that mean; the new log s is returned. If a loss is nonfinite, nothing is written (docs/MATH.md §3.4).
# buffers: empty without momentum. lam_tensor, lr_tensor: used instead of lam and lr if given. form: the flags of a step.
# flags: the normalizer and INIT_FIRST.
@_operator(
    "weighted_step_(Tensor(a!)[] params, Tensor(b!)[] buffers, Tensor[] grads, Tensor losses, Tensor? sample_weight,"
    " Tensor? mask, Tensor log_s, Tensor? lam_tensor, Tensor? lr_tensor, float lam, float gamma, float alpha, float mix,"
    " float max_weight, float lr, float weight_decay, float momentum, float dampening, int form, int flags) -> Tensor log_s_new",
    triton="weighted",
    triton_flags=_NORMALIZER,
    in_torch=in_torch.weighted_step_,
)
def _(
    params,
    buffers,
    grads,
    losses,
    sample_weight,
    mask,
    log_s,
    lam_tensor,
    lr_tensor,
    lam,
    gamma,
    alpha,
    mix,
    max_weight,
    lr,
    weight_decay,
    momentum,
    dampening,
    form,
    flags,
):
    if any(t.device != losses.device for t in (*params, *buffers, *grads)):  # one tensor on "meta" sends all of them to this fake
        raise RuntimeError(f"weighted_step_: expected all tensors on {losses.device}, the device of the losses")
    return log_s.new_empty(())


# ---- registration --------------------------------------------------------------------------------------------------------

# Questions to the libraries themselves. They take no tensors and have no fakes.
TOOLS = (
    "isas() -> str",
    "use_isa(str name) -> bool",
    "native_signatures() -> str",
    "cuda_signatures() -> str",
    "cuda_unbound() -> str",
    "cuda_versions() -> str",
)

# The native libraries register the kernels of the first, backends.py those of the second.
NATIVE, TRITON = (torch.library.Library(name, "DEF") for name in ("absgd_fast", "absgd_fast_triton"))


def _on_one_device(operator: Operator) -> Callable:
    """The fake, which refuses some tensors on "meta" among others. One such tensor sends a call to the fake, whose results have
    no values."""

    def fake(*args: Any, **kwargs: Any) -> Any:
        given = [t for arg in (*args, *kwargs.values()) for t in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        on_meta = [t.is_meta for t in given if isinstance(t, Tensor)]
        if any(on_meta) and not all(on_meta):
            raise RuntimeError(f"{operator.name}: got some tensors on meta, expected all tensors on one device")
        return operator.fake(*args, **kwargs)

    return fake


def _register(lib: torch.library.Library, operator: Operator) -> None:
    lib.define(operator.schema)
    # autograd.py attaches the gradients, so the dispatch keys of autograd have nothing to do (that saves 0.5 us a call)
    for key in ("Autograd", "ADInplaceOrView"):
        lib.impl(operator.name, torch.library.fallthrough_kernel, key)
    torch.library.register_fake(f"{lib.ns}::{operator.name}", _on_one_device(operator), lib=lib)


for _record in RECORDS.values():
    for _lib in (NATIVE, TRITON):
        _register(_lib, _record)
for _tool in TOOLS:
    NATIVE.define(_tool)

_backend.load()  # registers the kernels of the libraries that are there
