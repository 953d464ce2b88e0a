"""ABRMSprop: RMSprop in torch's form."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _codes, reference
from ..robust.base import RobustLoss
from .base import FusedOptimizer
from .rule import OptimizerRule, Place

RMSPROP = OptimizerRule(
    "rmsprop",
    states={"square_avg": None, "momentum_buffer": "momentum", "grad_avg": "centered"},
    flags={"maximize": _codes.MAXIMIZE, "centered": _codes.CENTERED},
    hyper_a=Place("alpha"),
    hyper_b=Place("momentum"),
    eps=Place("eps"),
    refuses_sparse="RMSprop does not support sparse gradients",
)


class ABRMSprop(FusedOptimizer, torch.optim.RMSprop):
    r"""RMSprop on the gradient of a robust loss.

    The robust weights come from :class:`ABLoss`, which works with any optimizer.

    The update is that of torch.optim.RMSprop (docs/MATH.md §3.3). With w a parameter:

        G = gradient of the loss + weight_decay w                                (maximize: -gradient + weight_decay w)
        u = alpha u + (1 - alpha) G^2,    m = alpha m + (1 - alpha) G            (m = 0 unless ``centered``)
        d = G / (sqrt(u - m^2) + eps)
        w = w - lr d                                                             (momentum: b = momentum b + d,  w = w - lr b)

    Half-precision parameters have float32 states. :class:`ABSGD` says which tensors the kernels take, how
    GPUs and GradScaler are served, and what a skipped step does; all that holds here too.

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: the learning rate >= 0, a float or a one-element tensor.
        alpha: the factor >= 0 of the past in the averages u and m.
        eps: the number >= 0 that is added to the root.
        weight_decay: the factor >= 0 of the L2 penalty.
        momentum: the factor >= 0 of the momentum buffer. With 0 there is no buffer.
        centered: divide by the standard deviation of the gradient instead of its root mean square.
        capturable: whether the step may be captured in a CUDA graph. On a GPU the kernels' step always may. On the CPU the value
            changes nothing (torch's class refuses True there).
        maximize: maximize the objective instead of minimizing it.
        foreach, differentiable: see :class:`ABSGD`.
        fused: the protocol of torch.amp.GradScaler; see :class:`ABSGD`. torch's class has no such argument.
        robust: an ABLoss or LinearABLoss with deferred=True, whose gradients this step finishes; see :class:`ABSGD`.
        max_norm: clip the gradients to this norm within the step; see :class:`ABSGD`.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the fastest that runs.

    Raises:
        ValueError: a number is out of its range, the backend is unknown, or a parameter is float16 together with ``robust``.
        RuntimeError: the backend cannot run here (the text says why), ``differentiable`` is True, or ``foreach`` and ``fused``
            both are. ``step()`` raises it for a sparse gradient.
        TypeError: ``robust`` is not a loss with deferred=True.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABRMSprop(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Tieleman & Hinton 2012, Lecture 6.5; Graves 2013, Eq. 38 to 45 (centered); Qi et al. 2023 (the ABSGD paper), Sec. 3.4.
    """

    _rule = RMSPROP

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        fused: bool | None = None,
        robust: RobustLoss | None = None,
        max_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, capturable, foreach, maximize, differentiable)
        self._set_up(robust, max_norm, backend, fused=fused)

    def _torch_step(
        self, group: dict, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor | None]], steps: list[Tensor]
    ) -> None:
        square_avgs = cast("list[Tensor]", states[0])  # always kept
        buffers, grad_avgs = states[1:]
        names = ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")
        reference.rmsprop_step_(params, grads, square_avgs, buffers, grad_avgs, steps, **{name: group[name] for name in names})
