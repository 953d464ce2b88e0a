"""ABRMSprop."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _codes, reference
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
    r"""RMSprop on the gradient of the robust loss: torch.optim.RMSprop in one pass over all parameters.

        g = G + weight_decay * w
        u = alpha u + (1 - alpha) g^2,    m = alpha m + (1 - alpha) g            (m: centered only, else 0)
        d = g / (sqrt(u - m^2) + eps)
        w = w - lr d;    with momentum  b = momentum b + d,  w = w - lr b

    Args:
        params: parameters, named parameters or parameter groups.
        lr, alpha, eps, weight_decay, momentum: >= 0.
        centered: divide by the standard deviation instead of the root mean square.
        maximize: ascend instead of descend.
        robust, backend: as for :class:`ABSGD`, which also says what holds of tensors, GPUs and scalers.

    Raises:
        ValueError: a number out of its range, an unknown backend.
        RuntimeError: a backend that cannot run; a sparse gradient.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABRMSprop(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Tieleman & Hinton 2012, Lecture 6.5; Graves 2013, Eq. 38 to 45 (centered); ABSGD paper, Sec. 3.4.
    """

    _rule = RMSPROP

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        robust=None,
        backend: str | None = None,
    ):
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, maximize=maximize)
        self._set_up(robust, backend)

    def _torch_step(self, group, params, grads, square_avgs, buffers, grad_avgs, steps):
        names = ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")
        reference.rmsprop_step_(params, grads, square_avgs, buffers, grad_avgs, steps, **{name: group[name] for name in names})
