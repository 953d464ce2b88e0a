"""ABAdagrad: AdaGrad in torch's form."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.optimizer import ParamsT

from .. import _codes, _numbers, reference
from .._exact import exact_dtype
from ..robust.base import RobustLoss
from .base import FusedOptimizer
from .rule import OptimizerRule, Place
from .state import first_count, state_dtype

ADAGRAD = OptimizerRule(
    "adagrad",
    states={"sum": None},
    flags={"maximize": _codes.MAXIMIZE},
    hyper_a=Place("lr_decay"),
    eps=Place("eps"),
)


class ABAdagrad(FusedOptimizer, torch.optim.Adagrad):
    r"""AdaGrad on the gradient of a robust loss.

    The robust weights come from :class:`ABLoss`, which works with any optimizer.

    The update is that of torch.optim.Adagrad (docs/MATH.md §3.3). With w a parameter and t the number of the step:

        G = gradient of the loss + weight_decay * w              (maximize: -gradient + weight_decay * w)
        u = u + G^2
        w = w - lr / (1 + (t - 1) lr_decay) G / (sqrt(u) + eps)

    Half-precision parameters have float32 states. :class:`ABSGD` says which tensors the kernels take, how
    GPUs and GradScaler are served, and what a skipped step does; all that holds here too. torch's own function steps sparse
    gradients.

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: the learning rate >= 0, a float or a one-element tensor.
        lr_decay: how fast lr falls with the number of steps, >= 0.
        weight_decay: the factor >= 0 of the L2 penalty. Not together with sparse gradients.
        initial_accumulator_value: u before the first step, >= 0.
        eps: the number >= 0 that is added to the root.
        maximize: maximize the objective instead of minimizing it.
        foreach, differentiable, fused: see :class:`ABSGD`.
        robust: an ABLoss or LinearABLoss with deferred=True, whose gradients this step finishes; see :class:`ABSGD`.
        max_norm: clip the gradients to this norm within the step; see :class:`ABSGD`.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the fastest that runs.

    Raises:
        ValueError: a number is out of its range, the backend is unknown, or a parameter is float16 together with ``robust``.
        RuntimeError: the backend cannot run here (the text says why), ``differentiable`` is True, or ``foreach`` and ``fused``
            both are. ``step()`` raises it for a sparse gradient together with weight_decay.
        TypeError: ``robust`` is not a loss with deferred=True.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABAdagrad(model.parameters(), lr=1e-2)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Duchi et al. 2011; Qi et al. 2023 (the ABSGD paper), Sec. 3.4.
    """

    _rule = ADAGRAD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        robust: RobustLoss | None = None,
        max_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        initial_accumulator_value = _numbers.plain(initial_accumulator_value)
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = self._first_state(p, group)
        self._set_up(robust, max_norm, backend)

    @classmethod
    def _first_state(cls, p: Tensor, group: dict) -> dict[str, Tensor]:
        return {"step": first_count(exact_dtype()), "sum": cls._first_sum(p, group)}

    @staticmethod
    def _first_sum(p: Tensor, group: dict) -> Tensor:
        start = group["initial_accumulator_value"]
        return torch.full_like(
            p,
            complex(start, start) if p.is_complex() else start,
            dtype=state_dtype(p),
            memory_format=torch.preserve_format,
        )

    def _make_missing(self, group: dict) -> None:
        for p in group["params"]:  # torch makes states in __init__ only, and not for a group that is added later
            if p.grad is not None and not self.state[p]:
                self.state[p] = self._first_state(p, group)
        super()._make_missing(group)

    def _torch_step(
        self, group: dict, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor | None]], steps: list[Tensor]
    ) -> None:
        names = ("lr", "weight_decay", "lr_decay", "eps", "maximize")
        options = {name: group[name] for name in names}
        sums = cast("list[Tensor]", states[0])  # always kept
        for p, grad, total, count in zip(params, grads, sums, steps):
            if grad.is_sparse:
                adagrad([p], [grad], [total], [count], has_sparse_grad=True, foreach=False, has_complex=p.is_complex(), **options)
            else:
                reference.adagrad_step_([p], [grad], [total], [count], **options)
