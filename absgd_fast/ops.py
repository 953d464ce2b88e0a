"""Every custom operator: schema, fake, autograd, which backend serves it.

The kernels of the namespace `absgd_fast` are registered by the native libraries (CPU, CUDA), those of
`absgd_fast_triton` here. A value gets its gradient in autograd from `attach`, in one of two ways:

made in forward     the exponentials are at hand there, and backward only multiplies by the upstream gradient, in place; so
                    the graph keeps one buffer of the size of the logits and not the logits themselves.
from statistics     four numbers per row (csrc/math.h RowGradient), and backward walks over the logits once more. A GPU
                    takes this way beyond small batches: to make the gradient in forward, before the weights are known,
                    would read and write it twice.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib import import_module

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backend, reference
from .reference import NORMALIZERS, real_dtype

_libs = tuple(torch.library.Library(name, "DEF") for name in ("absgd_fast", "absgd_fast_triton"))

# ---- schemas and fakes ---------------------------------------------------------------------------------------------

# `flags` packs what never changes within a run into one integer (an argument costs about 0.1 us); csrc/ops_common.h has the same bits.
# HARD is read by Python only: no soft targets. KIND: one step of the kinds' bits
INIT_FIRST, UPDATE, WITH_GRAD, WITH_STATS, PRUNE, HARD, KIND = 4, 8, 16, 32, 64, 128, 256


def flags(normalizer: str, init: str) -> int:
    """Bits of the `flags` argument.

    >>> flags("batch", "first") == 1 | INIT_FIRST
    True
    """
    return NORMALIZERS.index(normalizer) | (INIT_FIRST if init == "first" else 0)


_STATE = "Tensor(a!) log_s, Tensor(b!) nonfinite, Tensor lam, float gamma, float alpha, float mix, float max_weight, int flags"
_ROWS = "Tensor? score, Tensor? sample_weight, Tensor? mask"
# adjust (3, C): the class vectors S, D, M; first, second: the loss's numbers (csrc/math.h LossNumbers)
_LOSS = "Tensor logits, Tensor target, Tensor? class_weight, Tensor? adjust, float first, float second, int ignore_index"


def _define(schema: str):
    """Declare an operator in both namespaces, and its fake (shapes and dtypes of the results, for torch.compile)."""
    name = schema.split("(")[0]

    def register(fake):
        for lib in _libs:
            lib.define(schema)
            # Autograd is attached by hand below, so its dispatch keys have nothing to do (0.5 us a call).
            for key in ("Autograd", "ADInplaceOrView"):
                lib.impl(name, torch.library.fallthrough_kernel, key)
            torch.library.register_fake(f"{lib.ns}::{name}", fake, lib=lib)

    return register


def _rows(logits: Tensor) -> tuple:
    return (logits.shape[0], *logits.shape[2:])


def _made(like: Tensor, rows: tuple, flags: int) -> Tensor:
    """What backward needs. A gradient made in the forward pass is not stored in float16: what a loss scale (GradScaler) is
    there to lift into range would already be 0 when backward brings that scale."""
    if flags & WITH_STATS:
        return like.new_empty((4, *rows), dtype=real_dtype(like.dtype))
    dtype = torch.float32 if like.dtype == torch.float16 else like.dtype
    return like.new_empty(like.shape if flags & WITH_GRAD else (0,), dtype=dtype)


# valid (real): 1 where a row counts; 0 where it is ignored, pruned, or (on a GPU) has a label out of range
@_define(f"logit_loss({_LOSS}, int flags) -> (Tensor losses, Tensor made, Tensor valid)")
def _(logits, target, class_weight, adjust, first, second, ignore_index, flags):
    rows, real = _rows(logits), real_dtype(logits.dtype)
    return logits.new_empty(rows, dtype=real), _made(logits, rows, flags), logits.new_empty(rows, dtype=real)


# The same, and over the logits ((B, C) contiguous, not float16) the gradient of each row's own loss
@_define(f"logit_loss_({_LOSS.replace('Tensor logits', 'Tensor(c!) logits')}, int flags) -> (Tensor losses, Tensor valid)")
def _(logits, target, class_weight, adjust, first, second, ignore_index, flags):
    rows, real = _rows(logits), real_dtype(logits.dtype)
    return logits.new_empty(rows, dtype=real), logits.new_empty(rows, dtype=real)


# rows (3, ...): losses, weights, validity. weighing (4) float64, csrc/math.h Weighing: where it is given, rows[1] has z instead
# (-inf: ignored, NaN: bad), from which backward and `weights_of` make the weights; so no launch has to wait for the last loss
@_define(f"robust_logit_loss({_LOSS}, {_ROWS}, {_STATE}, Tensor(c!)? weighing) -> (Tensor loss, Tensor rows, Tensor made)")
def _(logits, target, class_weight, adjust, first, second, ignore_index, score, sample_weight, mask, log_s, nonfinite, lam,
      gamma, alpha, mix, max_weight, flags, weighing):  # fmt: skip
    rows, real = _rows(logits), real_dtype(logits.dtype)
    return logits.new_empty((), dtype=real), logits.new_empty((3, *rows), dtype=real), _made(logits, rows, flags)


# stats (4, B, ...): max, scale, at_label, spread of each row (csrc/math.h RowGradient); smoothing: of soft targets; rows,
# weighing: of robust_logit_loss, or None
@_define(
    "logit_loss_backward(Tensor logits, Tensor target, Tensor? class_weight, Tensor? adjust, float smoothing, Tensor stats,"
    " Tensor upstream, Tensor? rows, Tensor? weighing) -> Tensor"
)
def _(logits, target, class_weight, adjust, smoothing, stats, upstream, rows, weighing):
    return logits.new_empty(logits.shape)


# The robust loss of rows whose normaliser is known, by which z is bounded: exp(z - log s') is a row's weight as soon as its loss
# is there, so its gradient is written while the row is on the chip. settled: of robust_settle; totals: of these rows. CUDA only:
# elsewhere logit_loss, robust_totals and robust_apply do it.
@_define(
    f"settled_logit_loss({_LOSS}, {_ROWS}, Tensor settled, Tensor log_s, Tensor lam, int flags)"
    " -> (Tensor loss, Tensor rows, Tensor made, Tensor totals)"
)
def _(logits, target, class_weight, adjust, first, second, ignore_index, score, sample_weight, mask, settled, log_s, lam, flags):
    rows, real = _rows(logits), real_dtype(logits.dtype)
    return (logits.new_empty((), dtype=real), logits.new_empty((3, *rows), dtype=real), _made(logits, rows, WITH_GRAD),
            settled.new_empty(3))  # fmt: skip


@_define(f"robust_loss(Tensor losses, {_ROWS}, {_STATE}) -> (Tensor loss, Tensor rows, Tensor grad)")
def _(losses, score, sample_weight, mask, log_s, nonfinite, lam, gamma, alpha, mix, max_weight, flags):
    return losses.new_empty(()), losses.new_empty((3, *losses.shape)), _made(losses, losses.shape, flags)


# The three stages of robust_loss, for rows of several processes, micro-batches or chunks (reference.py totals, settle, apply).
# settled: what robust_settle returns; in robust_totals it bounds z, as in robust_apply where `bounded`
@_define("robust_totals(Tensor losses, Tensor? score, Tensor? mask, Tensor log_s, Tensor lam, Tensor? settled) -> Tensor")
def _(losses, score, mask, log_s, lam, settled):
    return losses.new_empty((3,), dtype=torch.float64)


@_define(
    "robust_settle(Tensor totals, Tensor(a!) log_s, Tensor(b!) nonfinite, Tensor lam, Tensor? reference, float gamma,"
    " float alpha, float share, int flags) -> Tensor"
)
def _(totals, log_s, nonfinite, lam, reference, gamma, alpha, share, flags):
    return totals.new_empty((6,))


@_define(
    f"robust_apply(Tensor losses, {_ROWS}, Tensor settled, Tensor log_s, Tensor lam, bool bounded, float mix,"
    " float max_weight, int flags) -> (Tensor loss, Tensor rows, Tensor grad)"
)
def _(losses, score, sample_weight, mask, settled, log_s, lam, bounded, mix, max_weight, flags):
    return losses.new_empty(()), losses.new_empty((3, *losses.shape)), _made(losses, losses.shape, flags)


@_define(
    "robust_weights(Tensor losses, Tensor log_s, Tensor lam, Tensor? mask, float gamma, float alpha, int flags)"
    " -> (Tensor weights, Tensor log_s_new, Tensor shares)"
)
def _(losses, log_s, lam, mask, gamma, alpha, flags):
    return losses.new_empty(losses.shape), log_s.new_empty(()), losses.new_empty((2,), dtype=torch.float64)


@_define("robust_weights_backward(Tensor weights, Tensor grad_weights, Tensor grad_log_s, Tensor lam, Tensor shares) -> Tensor")
def _(weights, grad_weights, grad_log_s, lam, shares):
    return weights.new_empty(weights.shape)


# W of a rule (csrc/launch.h LossRule) that solves for a level; first, second: beta and reg, or rho. Only the CPU has a kernel of
# this and the next: elsewhere they are a few launches of torch's on one number per row (weights.py).
RULES_OF_LOSSES = ("cvar", "chi2")


@_define("rule_weights(Tensor losses, Tensor? mask, int rule, float first, float second) -> Tensor")
def _(losses, mask, rule, first, second):
    return losses.new_empty(losses.shape)


# W of group DRO; log_q moves where `update`
@_define("group_weights(Tensor losses, Tensor? mask, Tensor groups, Tensor(a!) log_q, float eta, bool update) -> Tensor")
def _(losses, mask, groups, log_q, eta, update):
    return losses.new_empty(losses.shape)


# Weights of L2RW (csrc/math.h RectifiedNumbers), which are constants: nothing is differentiated through them
@_define("rectified(Tensor products) -> Tensor")
def _(products):
    return products.new_empty(products.shape)


@_define("scale(Tensor grad, Tensor upstream, bool to_half) -> Tensor")
def _(grad, upstream, to_half):
    return grad.new_empty(grad.shape, dtype=torch.float16 if to_half else grad.dtype)


@_define("scale_(Tensor(a!) grad, Tensor upstream) -> ()")
def _(grad, upstream):
    return None


# The rules of a step (csrc/math.h Rule), by their numbers
RULES = ("sgd", "adam", "rmsprop", "adagrad")


# One step of `rule` (csrc/math.h for_step) on all parameters. states: those the rule keeps, of all parameters, one kind after the
# other; steps: how many steps each parameter took, where the rule counts them. lr_tensor, grad_scale, found_inf: one number each,
# read where the parameters are (the last two on GPUs only); grads are written where grad_scale divides them. robust: of
# robust_settle: its second number multiplies the gradients, and with bad rows nothing is written. first, second: the rule's
# numbers; flags: StepFlag.
@_define(
    "step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, Tensor(d!)[] steps, Tensor? lr_tensor,"
    " Tensor? grad_scale, Tensor? found_inf, Tensor? robust, float lr, float weight_decay, float first, float second,"
    " float eps, int rule, int flags) -> ()"
)
def _(params, grads, states, steps, lr_tensor, grad_scale, found_inf, robust, lr, weight_decay, first, second, eps, rule, flags):
    return None


# The same step over the table of a StepPlan: writes the tensors whose addresses are in it (eager only). `on`: any of them.
@_define("planned_step(Tensor(a!) table, Tensor on) -> ()")
def _(table, on):
    return None


# Robust weights of the losses (B), their weighted mean of the rows of each gradient (B, *shape of the parameter), and one step of
# sgd with it: nothing but the new log s, which is returned, where a row is bad. buffers: none without momentum. lam_tensor,
# lr_tensor: used instead of lam and lr. form: StepFlag; flags: normalizer and INIT_FIRST.
@_define(
    "weighted_step_(Tensor(a!)[] params, Tensor(b!)[] buffers, Tensor[] grads, Tensor losses, Tensor? sample_weight, Tensor? mask,"
    " Tensor log_s, Tensor? lam_tensor, Tensor? lr_tensor, float lam, float gamma, float alpha, float mix, float max_weight,"
    " float lr, float weight_decay, float momentum, float dampening, int form, int flags) -> Tensor log_s_new"
)
def _(params, buffers, grads, losses, sample_weight, mask, log_s, lam_tensor, lr_tensor, lam, gamma, alpha, mix, max_weight, lr,
      weight_decay, momentum, dampening, form, flags):  # fmt: skip
    if any(t.device != losses.device for t in (*params, *buffers, *grads)):  # one on "meta" brings them all here
        raise RuntimeError(f"weighted_step_: expected all tensors on {losses.device} as the losses")
    return log_s.new_empty(())


for _tool in ("isas() -> str", "use_isa(str name) -> bool", "native_signatures() -> str", "cuda_signatures() -> str",
              "cuda_unbound() -> str", "cuda_versions() -> str"):  # fmt: skip
    _libs[0].define(_tool)

_backend.load()  # registers the kernels, if they are there


# ---- who serves ----------------------------------------------------------------------------------------------------

_OPERATORS = ("logit_loss", "logit_loss_", "robust_logit_loss", "settled_logit_loss", "logit_loss_backward", "robust_loss", "robust_totals", "robust_settle",
              "robust_apply", "robust_weights", "robust_weights_backward", "rule_weights", "group_weights", "rectified", "scale", "scale_",
              "step_", "planned_step", "weighted_step_")  # fmt: skip


_TRITON_MODULE = {
    "losses": ("logit_loss", "logit_loss_", "robust_logit_loss", "logit_loss_backward"),
    "weights": ("robust_loss", "robust_weights", "robust_weights_backward", "rectified", "scale", "scale_"),
    "step": ("step_",),
    "weighted": ("weighted_step_",),
}


# Of these there is no Triton twin: a few launches of torch's on one number per row.


def _robust_totals(losses, score, mask, log_s, lam, settled):
    return reference.totals(losses, log_s, lam, score=score, mask=mask, top=None if settled is None else settled[2])


def _robust_settle(totals, log_s, nonfinite, lam, reference_point, gamma, alpha, share, bits):
    settled, new_log_s = reference.settle(
        totals, log_s, lam, gamma=gamma, alpha=alpha, init="first" if bits & INIT_FIRST else "zero",
        normalizer=NORMALIZERS[bits & 3], share=share, reference=reference_point,
    )  # fmt: skip
    if bits & UPDATE:
        log_s.copy_(new_log_s)
        nonfinite += settled[5] > 0
    return settled


def _robust_apply(losses, score, sample_weight, mask, settled, log_s, lam, bounded, mix, max_weight, bits):
    with torch.enable_grad() if bits & WITH_GRAD else torch.no_grad():
        x = losses.detach().requires_grad_(bits & WITH_GRAD != 0)
        loss, weights = reference.apply(
            x, settled, log_s, lam, mix=mix, max_weight=max_weight, sample_weight=sample_weight, score=score, mask=mask,
            bounded=bounded,
        )  # fmt: skip
    grad = torch.autograd.grad(loss, x)[0] if bits & WITH_GRAD else losses.new_empty(0)
    return loss.detach(), stacked_rows(losses, weights, mask), grad


def stacked_rows(losses: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
    """(3, ...): losses (0 where ignored), weights, 1 or 0 = ignored."""
    valid = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
    return torch.stack([losses.where(valid > 0, 0.0), weights, valid])


_IN_TORCH = {"robust_totals": _robust_totals, "robust_settle": _robust_settle, "robust_apply": _robust_apply}


# Last arguments that say how CUDA's kernels weigh late; None for all others
_CUDA_ARGUMENTS = {"robust_logit_loss": 1, "logit_loss_backward": 2}


def _triton(module: str, name: str):
    """The Triton function of this name, called as the operator is; Triton is imported by the first call."""

    def call(*args):
        function = getattr(import_module(f"absgd_fast.kernels.{module}"), name)
        args = args[: len(args) - _CUDA_ARGUMENTS.get(name, 0)]
        if name in ("logit_loss", "logit_loss_", "robust_logit_loss", "robust_loss", "robust_weights", "weighted_step_"):
            *args, bits = args
            return function(*args, **_decoded(name, bits))
        return function(*args)

    return call


def _decoded(name: str, bits: int) -> dict:
    rule = dict(normalizer=bits & 3, init_first=bool(bits & INIT_FIRST))
    if name in ("robust_weights", "weighted_step_"):
        return rule
    if name == "robust_loss":
        return rule | dict(update=bool(bits & UPDATE), with_grad=bool(bits & WITH_GRAD))
    loss = dict(kind=bits // KIND, prune=bool(bits & PRUNE), report=report_of_kernels())
    if name == "logit_loss_":
        return loss
    loss["with_stats"] = bool(bits & WITH_STATS)
    return loss if name == "logit_loss" else rule | loss | dict(update=bool(bits & UPDATE))


class Operators:
    """The operators of one backend as attributes. `compiled`: the same for torch.compile.

    gradient_limit: lanes of the one block that makes the gradient of a small batch in the forward pass of the robust loss; 0:
    no batch, ANY: every batch.
    """

    def __init__(self, backend: str, functions: dict, gradient_limit: int, compiled: Operators | None = None):
        self.backend, self.gradient_limit, self.compiled = backend, gradient_limit, compiled or self
        self.has_rules = backend == "cpu"  # rule_weights and group_weights are there
        # settled_logit_loss is there, and backward makes the weights of what robust_logit_loss left as statistics
        self.weighs_late = backend == "cuda"
        vars(self).update(functions)

    def __reduce__(self):  # a module that is copied or pickled finds the same ones again
        return _find, (self.backend, self.compiled is self)

    def saves(self, logits: Tensor) -> int:
        """What the forward pass of the robust loss leaves for backward."""
        limit = self.gradient_limit
        if limit == ANY:
            return WITH_GRAD
        if not limit or logits.dtype == torch.float64:
            return WITH_STATS
        classes = logits.shape[1]
        return WITH_GRAD if 0 < classes <= 128 and logits.numel() <= classes * (limit // _lanes(classes)) else WITH_STATS

    def weighing(self, logits: Tensor, saves: int) -> Tensor | None:
        """Room for what the weights are made from later; None where the forward pass makes them. Where `weighs_late`."""
        if saves == WITH_GRAD:
            return None
        return torch.empty(4, dtype=torch.float64, device=logits.device)

    @property
    def saves_losses(self) -> int:
        """The same for losses alone: their upstream gradient has one number per row, which statistics take for nothing."""
        return WITH_GRAD if self.gradient_limit == ANY else WITH_STATS


ANY = sys.maxsize
# Threads of the one block of the CUDA kernels that holds a small batch in its registers (csrc/launch.h fits_one_block)
ONE_BLOCK = 512


def _lanes(classes: int) -> int:
    """Threads that share a row there, a power of two of at most 32: four classes each, if the row has them."""
    return next((lanes for lanes in (1, 2, 4, 8, 16) if classes <= 4 * lanes), 32)


def weights_of(rows: Tensor, weighing: Tensor | None) -> Tensor:
    """W of the rows that robust_logit_loss left (csrc/math.h RobustNumbers)."""
    if weighing is None:
        return rows[1]
    log_s, _, _, max_weight = weighing.unbind()
    return torch.minimum((rows[1].double() - log_s).exp(), max_weight).to(rows.dtype)


def _operators() -> dict[str, Operators]:
    out = {}
    for backend, lib, limit in (("cpu", 0, ANY), ("cuda", 0, ONE_BLOCK), ("triton", 1, 0)):
        overloads = {name: getattr(getattr(torch.ops, _libs[lib].ns), name).default for name in _OPERATORS}
        if backend == "triton":
            now = {name: _triton(module, name) for module, names in _TRITON_MODULE.items() for name in names} | _IN_TORCH
            for name, function in now.items():
                _libs[1].impl(name, function, "CompositeExplicitAutograd")
        else:
            # the overload's own callable, without the Python frame of OpOverload.__call__ (0.3 us)
            now = {name: overload._op for name, overload in overloads.items()}
        out[backend] = Operators(backend, now, limit, Operators(backend, overloads, limit))
    return out


OPERATORS = _operators()
IN_TORCH = Operators("reference", _IN_TORCH, ANY)  # the stages on any device, where no kernels serve


def _find(backend: str, compiled: bool) -> Operators:
    return OPERATORS[backend].compiled if compiled else OPERATORS[backend]


def transformed() -> bool:
    """Whether a torch.func transform or a level of forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def serving(device: torch.device, backend: str | None) -> Operators | None:
    """The operators that serve this call, or None for reference.py.

    Inside torch.func transforms (vmap, grad, jvp) and on dual numbers only the differentiable formula does.
    """
    if transformed():
        return None
    found = OPERATORS.get(_backend.select(device, backend))
    return found.compiled if found is not None and torch.compiler.is_compiling() else found


# ---- autograd ------------------------------------------------------------------------------------------------------

# True while the graph of the running backward is kept (retain_graph=True). Without this torch the gradient is copied.
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _differentiable(again, x: Tensor, upstream: Tensor) -> Tensor:
    """upstream * d value / d x as a function that can be differentiated again: by the formula of reference.py."""
    with torch.enable_grad():
        value = again(x)
    return torch.autograd.grad(value, x, upstream.to(value.dtype), create_graph=True)[0]


class _Attach(torch.autograd.Function):
    """value, with d value / d x = grad (one number or one row per element of value); again(x): value in plain torch."""

    @staticmethod
    def forward(ctx, x: Tensor, made: tuple) -> Tensor:
        value, grad, ctx.operators, ctx.again = made
        ctx.save_for_backward(grad, x)
        ctx.to_half = x.dtype == torch.float16
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor):
        grad, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(ctx.again, x, upstream), None
        if ctx.to_half or graph_is_kept():
            return ctx.operators.scale(grad, upstream, ctx.to_half), None
        ctx.operators.scale_(grad, upstream)
        return grad, None


class _AttachRows(torch.autograd.Function):
    """The same from the statistics of the rows of x. loss: what logit_loss_backward has between x and them."""

    @staticmethod
    def forward(ctx, x: Tensor, made: tuple) -> Tensor:
        value, (target, class_weight, adjust, ctx.smoothing), saved, ctx.operators, ctx.again = made
        ctx.save_for_backward(x, target, class_weight, adjust, *saved)
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, target, class_weight, adjust, stats, rows, weighing = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(ctx.again, x, upstream), None
        backward = ctx.operators.logit_loss_backward
        return backward(x, target, class_weight, adjust, ctx.smoothing, stats, upstream, rows, weighing), None


class _AttachCompiled(torch.autograd.Function):
    """The first for torch.compile, where autograd sees tensors only and results must be new."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, grad: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.to_half, ctx.backend = x.dtype == torch.float16, backend
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (grad,) = ctx.saved_tensors
        return OPERATORS[ctx.backend].compiled.scale(grad, upstream, ctx.to_half), None, None, None


class _AttachRowsCompiled(torch.autograd.Function):
    """The second for torch.compile."""

    @staticmethod
    def forward(ctx, x, value, target, class_weight, adjust, smoothing: float, stats, rows, weighing, backend: str) -> Tensor:
        ctx.save_for_backward(x, target, class_weight, adjust, stats, rows, weighing)
        ctx.smoothing, ctx.backend = smoothing, backend
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, target, class_weight, adjust, *saved = ctx.saved_tensors
        backward = OPERATORS[ctx.backend].compiled.logit_loss_backward
        grad = backward(x, target, class_weight, adjust, ctx.smoothing, saved[0], upstream, *saved[1:])
        return grad, *[None] * 9


# Function.apply is a Python wrapper (1 us) that serves setup_context and functorch; neither is used here: transforms
# take the differentiable formula of reference.py (see `serving`).
_attach = super(torch.autograd.Function, _Attach).apply
_attach_rows = super(torch.autograd.Function, _AttachRows).apply


def attach(operators: Operators, x: Tensor, value: Tensor, grad: Tensor, again) -> Tensor:
    """value as a function of x whose gradient is already known: backward gives upstream * grad; again(x): the value in
    plain torch, asked only when backward itself is to be differentiated."""
    if torch.compiler.is_compiling():
        return _AttachCompiled.apply(x, value, grad, operators.backend)
    return _attach(x, (value, grad, operators, again))


def attach_rows(
    operators: Operators, x: Tensor, value: Tensor, loss: tuple, stats: Tensor, again, rows: Tensor | None = None,
    weighing: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """value as a function of the logits x, whose gradient follows from x, (target, class weight, adjust, smoothing), the
    statistics of its rows and, where these are weighed late, what robust_logit_loss left for that."""
    saved = (stats, None, None) if weighing is None else (stats, rows, weighing)
    if torch.compiler.is_compiling():
        return _AttachRowsCompiled.apply(x, value, *loss, *saved, operators.backend)
    return _attach_rows(x, (value, loss, saved, operators, again))


class _RobustWeights(torch.autograd.Function):
    """(W, log s') differentiable in the losses (MATH: vjp in csrc/math.h robust_weight_vjp)."""

    @staticmethod
    def forward(ctx, losses, log_s, lam, mask, gamma, alpha, flags, backend):
        ctx.operators = OPERATORS[backend].compiled
        weights, new_log_s, shares = ctx.operators.robust_weights(losses, log_s, lam, mask, gamma, alpha, flags)
        ctx.save_for_backward(weights, lam, shares)
        return weights, new_log_s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_weights, grad_log_s):
        grad = ctx.operators.robust_weights_backward(
            ctx.saved_tensors[0], grad_weights.contiguous(), grad_log_s, *ctx.saved_tensors[1:]
        )
        return grad, None, None, None, None, None, None, None


robust_weights = _RobustWeights.apply


# ---- labels out of range -------------------------------------------------------------------------------------------

_BAD_LABEL = re.compile(r"absgd_fast label out of range: label=(-?\d+) row=(\d+) classes=(\d+)( in an earlier call)?;")


def translated(error: RuntimeError, first_row: int = 0) -> Exception:
    """The stable ABI passes every C++ error on as RuntimeError; give a bad label its own type and words. first_row: where the
    rows of this call begin."""
    found = _BAD_LABEL.search(str(error))
    if found is None:
        return error
    label, row, classes = map(int, found.groups()[:3])
    earlier = found.group(4) is not None
    return bad_label(label, row if earlier else row + first_row, classes, earlier)


def bad_label(label: int, row: int, classes: int, earlier: bool = False) -> IndexError:
    return IndexError(
        f"target: label {label} in row {row} (counted over the flattened target){' of an earlier batch' if earlier else ''},"
        f" expected 0 <= label < {classes}; pass ignore_index for rows that shall not count"
    )


def check_labels(target: Tensor, classes: int, ignore_index: int) -> Tensor:
    """For the backends that cannot raise from within a kernel: labels fit for indexing.

    On the CPU the first label out of range is an IndexError. On a GPU its row is ignored, and a later call raises (the
    host does not wait, and an index out of range would end the CUDA context).
    """
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if target.device.type == "cpu":
        if bad.any():
            row = int(bad.flatten().nonzero()[0])
            raise bad_label(int(target.flatten()[row]), row, classes)
        return target
    if target.numel() and not torch.compiler.is_compiling():
        report, seen = reported_labels(check=True), _seen_labels(target.device)
        row = bad.flatten().to(torch.uint8).argmax()
        found = torch.stack(
            [target.flatten().gather(0, row.reshape(1))[0].long(), row, torch.full_like(row, classes), torch.ones_like(row)]
        )
        seen.copy_(torch.where(bad.any() & (seen[3] == 0), found, seen))
        report.copy_(seen, non_blocking=True)
    return target.masked_fill(bad, ignore_index)


@cache
def _report() -> Tensor:
    return torch.zeros(4, dtype=torch.int64, pin_memory=torch.cuda.is_available())


_seen: dict[torch.device, Tensor] = {}


def _seen_labels(device: torch.device) -> Tensor:
    if device not in _seen:
        _seen[device] = torch.zeros(4, dtype=torch.int64, device=device)
    return _seen[device]


def reported_labels(check: bool) -> Tensor:
    """(label, row, classes, 1) of a label out of range, or zeros; in memory that the host and the GPU share.

    check: IndexError if an earlier call left one.
    """
    report = _report()
    if check:
        label, row, classes, found = report.numpy()
        if found == 1:
            report.zero_()
            for seen in _seen.values():
                seen.zero_()
            raise bad_label(int(label), int(row), int(classes), earlier=True)
    return report


@cache
def _kernels_can_report() -> bool:
    return torch.cuda.is_available() or not torch.xpu.is_available()


def report_of_kernels() -> Tensor | None:
    """`reported_labels(check=True)` for a kernel to write into.

    None on Intel's GPUs, for which that memory is not pinned: there the kernels ignore a label out of range without a word. What
    `check_labels` finds is copied, and so is heard everywhere.
    """
    report = reported_labels(check=True)
    return report if _kernels_can_report() else None
