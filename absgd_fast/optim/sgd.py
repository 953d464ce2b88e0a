"""ABSGD: momentum SGD, in torch's form and in the paper's."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _codes, reference
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
)


class ABSGD(FusedOptimizer, torch.optim.SGD):
    r"""Momentum SGD; the robust weights of ABSGD come from :class:`ABLoss`, which works with any optimizer.

    One pass over all parameters, with G the gradient of the robust loss (negated with ``maximize``):

        g = G + weight_decay * w
        b = momentum * b + (1 - dampening) * g              (b = g in a parameter's first step)
        w = w - lr * b                                      (nesterov: w - lr * (g + momentum * b))

    which is torch.optim.SGD, and what the `absgd` package uses. ``heavy_ball=True`` is the paper's own step, where d is
    the last change of w; the two differ once ``lr`` changes, because the paper's keeps past steps at their size:

        d = momentum * d - lr * g
        w = w + d

    Parameters may have any shape and be float32, float64, bfloat16 or float16 (whose momentum is kept in float32). All of them
    are stepped by one kernel launch (up to 959 tensors on CUDA); sparse gradients and tensor subclasses by plain torch, with
    the same result. On a GPU the kernel reads a tensor ``lr``, and the scaler's numbers, by itself: the host never waits, and a
    captured graph follows a schedule. ``state_dict()`` loads into torch.optim.SGD and back in the middle of a training (not
    with ``heavy_ball``).

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: learning rate >= 0; a float or a one-element tensor.
        momentum: >= 0. With 0 no buffer is kept.
        dampening: the gradient enters the buffer times 1 - dampening.
        weight_decay: L2 penalty >= 0.
        nesterov: needs momentum > 0 and dampening = 0.
        maximize: ascend instead of descend.
        heavy_ball: Eq. 2 of the paper; with neither nesterov nor dampening.
        robust: an ABLoss with deferred=True, whose log s' this step settles for all micro-batches (and processes) since the
            last, and whose gradients it brings to their size in its kernel, from device memory; ``.grad`` stays as it is. After a
            loss that is not finite nothing is written. Not with clipping, which needs ``criterion.finish_(params)``.
        backend: None (the fastest that runs), "cuda", "triton", "cpu" or "reference".

    Raises:
        ValueError: a number out of its range, options that exclude each other, an unknown backend.
        RuntimeError: a backend that cannot run, with the reason; a step whose gradients ``finish_`` has finished.
        TypeError: robust is no deferred ABLoss.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    Source: Qi et al., *Attentional-Biased Stochastic Gradient Descent* (TMLR 2023), Algorithm 1 and Eq. 2; the momentum
    of torch.optim.SGD. A step that torch.amp.GradScaler skips changes nothing; if it would have been the first, the next one
    counts as first.
    """

    _rule = SGD

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        heavy_ball: bool = False,
        robust=None,
        backend: str | None = None,
    ):
        for name, value in (("learning rate", lr), ("momentum value", momentum), ("weight_decay value", weight_decay)):
            refuse_nan(name, value)
        if heavy_ball and (nesterov or dampening != 0):
            raise ValueError(
                f"heavy_ball is Eq. 2 of the paper, which has no nesterov (got {nesterov}) and no dampening (got {dampening});"
                " use heavy_ball=False with these"
            )
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self._set_up(robust, backend, heavy_ball=heavy_ball)

    def _make_missing(self, group):
        super()._make_missing(group)
        for p in group["params"]:
            # A first step from a buffer of zeros gives b = g, and found_inf may undo it without anybody waiting for it. (With
            # dampening the first gradient counts in full, so there plain torch takes the first step.)
            if p.grad is None or p.grad.is_sparse or group["momentum"] == 0 or group["dampening"] != 0:
                continue
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.preserve_format)

    def _torch_step(self, group, params, grads, buffers):
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "heavy_ball")
        buffers = reference.momentum_step_(params, grads, buffers, **{name: group[name] for name in names})
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers):
                self.state[p]["momentum_buffer"] = buffer


def refuse_nan(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor) and value != value:  # torch lets it pass
        raise ValueError(f"Invalid {name}: {value}")
