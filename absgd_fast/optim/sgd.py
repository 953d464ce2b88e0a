"""ABSGD: momentum SGD in torch's form and in the paper's."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _codes, reference
from ..robust.base import RobustLoss
from .base import FusedOptimizer
from .rule import OptimizerRule, Place
from .state import state_dtype

SGD = OptimizerRule(
    "sgd",
    states={"momentum_buffer": "momentum"},
    flags={"maximize": _codes.MAXIMIZE, "nesterov": _codes.NESTEROV, "heavy_ball": _codes.HEAVY_BALL},
    hyper_a=Place("momentum"),
    hyper_b=Place("dampening"),
    counts=False,
    own_flags=("heavy_ball",),
    made_in_step=("momentum_buffer",),
)


class ABSGD(FusedOptimizer, torch.optim.SGD):
    r"""Momentum SGD, the optimizer of the ABSGD paper.

    The robust weights come from :class:`ABLoss`, which works with any optimizer.

    The update is that of torch.optim.SGD, which the `absgd` package uses too (docs/MATH.md §3.1). With w a parameter and
    b its momentum buffer:

        G = gradient of the robust loss + weight_decay * w  (maximize: -gradient + weight_decay * w)
        b = momentum * b + (1 - dampening) * G              (b = G in the first step of a parameter)
        w = w - lr * b                                      (nesterov: w - lr * (G + momentum * b))

    ``heavy_ball=True`` takes the paper's own step (Eq. 2), where d is the latest change of w:

        d = momentum * d - lr * G
        w = w + d

    The two are the same while ``lr`` stays the same. After ``lr`` has changed, the paper's form goes on with past steps at the
    size at which they were taken, and torch's form with past gradients times the new ``lr``.

    One kernel launch updates all parameters, in one pass (on CUDA up to 959 tensors a launch). They may have any shape and be
    float32, float64, bfloat16 or float16; half precision has its momentum in float32. Plain torch steps sparse gradients and
    tensor subclasses, with the same result. On a GPU the kernel itself reads a tensor ``lr`` and, with ``fused=True``, the
    numbers of torch.amp.GradScaler. So the host never waits, and a captured graph follows a schedule of ``lr``.

    A step is skipped if GradScaler has found a gradient that is not finite, or if ``robust`` has met a loss since the last step
    that is not finite. A skipped step changes nothing; if it would have been the first, the next one counts as first
    (docs/MATH.md §3.5).

    ``state_dict()`` and torch.optim.SGD's are interchangeable, also in the middle of a training (except with ``heavy_ball``).

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: the learning rate >= 0, a float or a one-element tensor.
        momentum: the factor >= 0 of the momentum buffer. With 0 there is no buffer.
        dampening: the gradient enters the buffer times 1 - dampening.
        weight_decay: the factor >= 0 of the L2 penalty.
        nesterov: Nesterov momentum. It needs momentum > 0 and dampening = 0.
        maximize: maximize the objective instead of minimizing it.
        foreach: which of its own implementations torch's class uses. The kernels replace them all, so True, False and None do
            the same here. The value is kept in the parameter groups and in checkpoints. Not True together with fused=True.
        differentiable: only False, because autograd cannot record the step of a kernel. torch.optim.SGD can do it.
        fused: which protocol torch.amp.GradScaler uses with this optimizer. The kernels are the same. None or False: that of
            torch's default optimizers. GradScaler unscales the gradients itself, and calls no ``step()`` after an overflow; on a
            GPU the host waits to know. True: that of torch's fused optimizers. GradScaler always calls ``step()``, whose kernel
            unscales the gradients and skips an overflow, so the host never waits. It is always used with ``robust``, whose step
            must end even then, and for float16 parameters.
        heavy_ball: take the step of the paper's Eq. 2. It has neither nesterov nor dampening.
        robust: an ABLoss or LinearABLoss with deferred=True, or None. Such a loss leaves gradients in ``.grad`` that are not
            normalised yet. The step then settles log s' for all micro-batches (of all processes) since the last step, and
            multiplies the gradients by the factor that is missing, inside its kernel; ``.grad`` stays as it is. Any other loss
            needs no ``robust``. Copy the pair together, by copy.deepcopy((model, criterion, optimizer)). Do not clip gradients
            before such a step, because they are not normalised yet: give it ``max_norm``.
        max_norm: clip the gradients to this norm > 0 within the step, with or without ``robust``; None: do not clip. With G the
            finished gradients (normalised, divided by GradScaler's scale) of all parameters, shards of other processes included,
            the step uses min(1, max_norm / (||G|| + 1e-6)) G, as torch.nn.utils.clip_grad_norm_ would leave them; ``.grad`` stays
            as it is (docs/MATH.md §3.6). ``last_grad_norm`` is ||G||, 0-d float64, not finite after a skipped step. ``max_norm``
            is an attribute like ``robust``, which may be replaced, and part of no checkpoint.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the fastest that runs.

    Raises:
        ValueError: a number is out of its range, options exclude each other, the backend is unknown, a parameter is float16
            together with ``robust``, or one belongs to FullyShardedDataParallel together with ``max_norm``.
        RuntimeError: the backend cannot run here (the text says why), ``differentiable`` is True, or ``foreach`` and ``fused``
            both are.
        TypeError: ``robust`` is not a loss with deferred=True.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    Source: Qi et al., *Attentional-Biased Stochastic Gradient Descent* (TMLR 2023), Algorithm 1 and Eq. 2; torch.optim.SGD.
    """

    _rule = SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        heavy_ball: bool = False,
        robust: RobustLoss | None = None,
        max_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        for name, value in (("learning rate", lr), ("momentum value", momentum), ("weight_decay value", weight_decay)):
            refuse_nan(name, value)
        if heavy_ball and (nesterov or dampening != 0):
            raise ValueError(
                f"heavy_ball is Eq. 2 of the paper, which has no nesterov (got {nesterov}) and no dampening (got {dampening});"
                " use heavy_ball=False with these options"
            )
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._set_up(robust, max_norm, backend, heavy_ball=heavy_ball)

    def _make_missing(self, group: dict) -> None:
        super()._make_missing(group)
        for p in group["params"]:
            # A first step from a buffer of zeros gives b = G too, and leaves the zeros if found_inf forbids the step, so nobody
            # waits for found_inf. With dampening the first gradient would have to count in full, so plain torch takes that step.
            if p.grad is None or p.grad.is_sparse or group["momentum"] == 0 or group["dampening"] != 0:
                continue
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)

    def _torch_step(
        self, group: dict, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor | None]], steps: list[Tensor]
    ) -> None:
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "heavy_ball")
        buffers = reference.momentum_step_(params, grads, states[0], **{name: group[name] for name in names})
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers):
                self.state[p]["momentum_buffer"] = buffer


def refuse_nan(name: str, value: float | Tensor) -> None:
    """Raises ValueError for NaN, which torch's class does not refuse."""
    if not isinstance(value, Tensor) and value != value:
        raise ValueError(f"Invalid {name}: {value}")
