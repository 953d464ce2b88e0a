"""How a value gets its gradient in autograd.

There are two ways:

made in forward     The forward pass makes the gradient, because it has the exponentials at hand. Backward only multiplies it by
                    the upstream gradient, in place. So the graph keeps one buffer of the size of the logits, and not the logits
                    themselves. A second derivative needs logits; it recovers them from the gradient (docs/MATH.md §2.6).
                    `attach` keeps the logits where that cannot be done. Inside other people's hooks for saved tensors
                    (activation checkpointing, save_on_cpu) it saves gradient and logits as these hooks want it.
from statistics     The forward pass leaves four numbers per row (csrc/math/losses.h RowGradient, docs/MATH.md §8), and backward
                    walks over the logits once more, so the graph keeps them. A GPU takes this way for all but small batches: the
                    forward pass would make the gradient before it knows the weights, and so read and write it twice.
                    The CPU takes it for losses of bfloat16 logits. A gradient that the forward pass makes would be rounded
                    there, and again after the upstream gradient. The graph keeps a copy of these logits, and backward writes
                    the gradient over it (docs/design-cpu.md, decision 6).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _backend
from .._checkpointing import pop_hooks, push_hooks, top_hooks
from .._codes import WITH_STATS
from .backends import OPERATORS, Operators
from .modes import graph_is_kept
from .spec import LossSpec


def _differentiable(recompute: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Tensor:
    """upstream * d value / d x with a graph of its own, by the formula of reference/, so that it can be differentiated again."""
    with torch.enable_grad():
        value = recompute(x)
    return torch.autograd.grad(value, x, upstream.to(value.dtype), create_graph=True)[0]


def _derivative(
    given: tuple, sample_stats: Tensor | None
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
    """(recompute, recover) of `attach`, from what csrc/eager.cpp keeps: these two, or (make, *arguments) with make(sample_stats,
    *arguments) -> the two. So a forward need not make them, because only a second derivative asks for them.
    """
    if sample_stats is None:
        return given
    make, *arguments = given
    return make(sample_stats, *arguments)


class _OverCopy:
    """Makes the gradient over a copy of the logits. It takes the place of the operators that scale a gradient.

    The caller may change labels, class weights and class vectors after the loss, as with the other dtypes. Labels and class
    weights are copied, because they are small. Soft targets are as large as the logits, so they are not copied and must stay as
    they are until backward, as in torch. Only soft targets of inference mode are copied, because torch does not count their
    changes.
    """

    def __init__(
        self,
        operators: Operators,
        target: Tensor,
        class_weight: Tensor | None,
        adjust: Tensor | None,
        smoothing: float,
        stats: Tensor,
    ):
        self.write = operators.logit_loss_backward_
        self.watched = target.is_floating_point() and not target.is_inference()
        self.version = target._version if self.watched else 0
        target = target if self.watched else target.clone()
        class_weight = None if class_weight is None else class_weight.clone()
        self.given = target, class_weight, adjust, smoothing, stats  # adjust is no tensor of the caller's

    def check(self) -> None:
        """Raises if soft targets were changed in place."""
        if self.watched and self.given[0]._version != self.version:
            raise RuntimeError(
                "target: got soft targets that were modified by an inplace operation between the loss and backward,"
                " expected them unchanged; give the loss target.clone()"
            )

    def scale_(self, copy: Tensor, upstream: Tensor) -> None:
        """Writes the gradient, times the upstream one, over the copy."""
        self.write(copy, *self.given, upstream)

    def scale(self, copy: Tensor, upstream: Tensor, to_half: bool) -> Tensor:
        """The same in new memory."""
        grad = copy.clone()
        self.scale_(grad, upstream)
        return grad


class _KnownGradient(torch.autograd.Function):
    """A value whose derivative by x is known: grad has one number, or one row, per element of value.

    A first backward reads grad alone. So it works after x was changed in place. recompute(x), the value in plain torch, serves a
    second derivative. Only then is the saved x asked for.

    With an `_OverCopy` as operators, grad is the copy of x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, given: tuple) -> Tensor:
        value, grad, hooked, operators, recompute = given
        ctx.known = operators, recompute, grad.dtype is not x.dtype
        if hooked:
            ctx.save_for_backward(x, grad)
            grad = None
        else:
            ctx.save_for_backward(x)
        ctx.grad = grad
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor):
        operators, recompute, to_half = ctx.known
        x, grad, kept = None, ctx.grad, graph_is_kept()
        if type(operators) is _OverCopy:
            operators.check()  # before the copy is let go, so that another backward raises the same error
        if grad is None:  # hooks have it, or an earlier backward freed it, which torch reports here
            x, grad = ctx.saved_tensors  # once, as activation checkpointing demands
        elif not kept:
            ctx.grad = None
        if torch.is_grad_enabled():
            return _differentiable(recompute, ctx.saved_tensors[0] if x is None else x, upstream), None
        if to_half or kept:
            return operators.scale(grad, upstream, to_half), None
        operators.scale_(grad, upstream)
        return grad, None


class _GradientFromStats(torch.autograd.Function):
    """A value whose derivative by x is made in backward from the statistics of the rows of x."""

    @staticmethod
    def forward(ctx, x: Tensor, given: tuple) -> Tensor:
        value, (target, class_weight, adjust, ctx.smoothing), saved, ctx.operators, ctx.recompute = given
        ctx.save_for_backward(x, target, class_weight, adjust, *saved)
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, target, class_weight, adjust, stats, sample_stats, weighing = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(ctx.recompute, x, upstream), None
        backward = ctx.operators.logit_loss_backward
        return backward(x, target, class_weight, adjust, ctx.smoothing, stats, upstream, sample_stats, weighing), None


class _KnownGradientCompiled(torch.autograd.Function):
    """`_KnownGradient` for torch.compile, where autograd sees tensors only and results must be new tensors."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, grad: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(grad)
        ctx.to_half, ctx.backend = x.dtype == torch.float16, backend
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (grad,) = ctx.saved_tensors
        return OPERATORS[ctx.backend].compiled.scale(grad, upstream, ctx.to_half), None, None, None


class _GradientFromStatsCompiled(torch.autograd.Function):
    """`_GradientFromStats` for torch.compile."""

    @staticmethod
    def forward(
        ctx, x, value, target, class_weight, adjust, smoothing: float, stats, sample_stats, weighing, backend: str
    ) -> Tensor:
        ctx.save_for_backward(x, target, class_weight, adjust, stats, sample_stats, weighing)
        ctx.smoothing, ctx.backend = smoothing, backend
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, target, class_weight, adjust, *saved = ctx.saved_tensors
        operators = OPERATORS[ctx.backend].compiled
        given = target, class_weight, adjust, ctx.smoothing, saved[0], upstream
        if operators.writes_over_logits:
            grad = x.clone(memory_format=torch.contiguous_format)
            operators.logit_loss_backward_(grad, *given)
        else:
            grad = operators.logit_loss_backward(x, *given, *saved[1:])
        return grad, *[None] * 9


# Function.apply is a Python wrapper (1 us) that serves setup_context and functorch. Neither is used here: inside transforms the
# operators in plain torch serve.
_known = super(torch.autograd.Function, _KnownGradient).apply
_from_stats = super(torch.autograd.Function, _GradientFromStats).apply

if (_eager := _backend.eager()) is not None:
    _eager.bind(_backend.cpu_kernels_address(), _derivative, _differentiable)


def attach(
    operators: Operators,
    x: Tensor,
    value: Tensor,
    grad: Tensor,
    recompute: Callable[[Tensor], Tensor],
    recover: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Makes value a function of x whose derivative, grad, is known: backward gives upstream * grad.

    Args:
        recompute: recompute(x) is the value in plain torch. It is called only if backward itself is to be differentiated.
        recover: recover(grad) makes an x for recompute. None: the graph keeps x.
    """
    if operators.compiled is operators:  # torch.compiler.is_compiling() takes four times as long
        return _KnownGradientCompiled.apply(x, value, grad, operators.backend)
    if operators.eager is not None:
        attached = operators.eager.attach(x, value, grad, (recompute, recover))
        if attached is not None:
            return attached
    return _attach_eagerly(operators, x, value, grad, recompute, recover)


def _attach_eagerly(
    operators: Operators | _OverCopy,
    x: Tensor,
    value: Tensor,
    grad: Tensor,
    recompute: Callable[[Tensor], Tensor],
    recover: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """`attach` outside of torch.compile."""
    if top_hooks(True) is not None:
        return _known(x, (value, grad, True, operators, recompute))
    given = value, grad, False, operators, recompute
    if recover is None or x.is_leaf:  # the graph keeps a leaf anyway, as that in which its gradient is accumulated
        return _known(x, given)
    try:
        # Of x only its place in the graph is saved: packing it leaves the gradient, and unpacking it makes its values anew.
        push_hooks(lambda _: grad, recover)
    except RuntimeError:  # somebody has forbidden hooks (torch.autograd.graph.disable_saved_tensors_hooks)
        return _known(x, given)
    try:
        return _known(x, given)
    finally:
        pop_hooks()


def attach_logit_gradient(
    operators: Operators,
    mode: int,
    logits: Tensor,
    value: Tensor,
    spec: LossSpec,
    target: Tensor,
    class_weight: Tensor | None,
    adjust: Tensor | None,
    saved: Tensor,
    recompute: Callable[[Tensor], Tensor],
    recover: Callable[[Tensor], Tensor] | None = None,
    sample_stats: Tensor | None = None,
    weighing: Tensor | None = None,
) -> Tensor:
    """Makes value a function of the logits, by what an operator has saved: the gradient, or statistics of the rows.

    Args:
        operators: those whose backward serves.
        mode: the backward mode of `saved`, WITH_GRAD or WITH_STATS.
        logits, target, class_weight, adjust: as the operator was given them.
        value: the loss, or one loss per row.
        spec: the loss on logits.
        saved: what the operator has saved for backward.
        recompute: recompute(logits) is the value in plain torch, for a second derivative.
        recover: as in `attach`, if `saved` is the gradient. It is not used where the logits are not `recoverable`. A copy of the
            logits needs no recovery.
        sample_stats, weighing: of robust_logit_loss, if backward makes the weights.
    """
    if mode != WITH_STATS:
        if not spec.recoverable(logits, target):
            recover = None
        return attach(operators, logits, value, saved, recompute, recover)
    loss = target, class_weight, adjust, spec.smoothing
    stats = (saved, None, None) if weighing is None else (saved, sample_stats, weighing)
    if torch.compiler.is_compiling():
        return _GradientFromStatsCompiled.apply(logits, value, *loss, *stats, operators.backend)
    if operators.writes_over_logits:
        copy = logits.detach().clone(memory_format=torch.contiguous_format)
        return _attach_eagerly(_OverCopy(operators, *loss, saved), logits, value, copy, recompute, torch.Tensor.float)
    return _from_stats(logits, (value, loss, stats, operators, recompute))


def weights_of(sample_stats: Tensor, weighing: Tensor | None) -> Tensor:
    """W of the samples that robust_logit_loss has left (csrc/math/weights.h RobustNumbers, docs/MATH.md §1.1)."""
    if weighing is None:
        return sample_stats[1]
    log_s, _, _, max_weight = weighing.unbind()
    return torch.minimum((sample_stats[1].double() - log_s).exp(), max_weight).to(sample_stats.dtype)


class _RobustWeights(torch.autograd.Function):
    """(W, log s') as functions of the losses, by the vjp of csrc/math/weights.h robust_weight_vjp (docs/MATH.md §1.3)."""

    @staticmethod
    def forward(ctx, losses, log_s, lam, mask, gamma, alpha, flags, backend):
        ctx.operators = OPERATORS[backend].compiled
        weights, new_log_s, dlog_s = ctx.operators.robust_weights(losses, log_s, lam, mask, gamma, alpha, flags)
        ctx.save_for_backward(weights, lam, dlog_s)
        return weights, new_log_s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_weights, grad_log_s):
        grad = ctx.operators.robust_weights_backward(
            ctx.saved_tensors[0], grad_weights.contiguous(), grad_log_s, *ctx.saved_tensors[1:]
        )
        return grad, None, None, None, None, None, None, None


def robust_weights(operators: Operators, *args) -> tuple[Tensor, Tensor]:
    """(W, log s') of the operator robust_weights, differentiable in the losses. args: the operator's arguments."""
    if not operators.has_kernels:
        return operators.robust_weights(*args)[:2]
    return _RobustWeights.apply(*args, operators.backend)
