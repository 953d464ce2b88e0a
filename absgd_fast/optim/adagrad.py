"""ABAdagrad."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad

from .. import _codes, reference
from .base import FusedOptimizer
from .rule import OptimizerRule, Place
from .state import state_dtype

ADAGRAD = OptimizerRule(
    "adagrad",
    states={"sum": None},
    flags={"maximize": _codes.MAXIMIZE},
    hyper_a=Place("lr_decay"),
    eps=Place("eps"),
)


class ABAdagrad(FusedOptimizer, torch.optim.Adagrad):
    r"""AdaGrad on the gradient of the robust loss: torch.optim.Adagrad in one pass over all parameters.

        g = G + weight_decay * w
        u = u + g^2
        w = w - lr / (1 + (t - 1) lr_decay) g / (sqrt(u) + eps)

    Args:
        params: parameters, named parameters or parameter groups.
        lr, lr_decay, weight_decay, initial_accumulator_value (of u), eps: >= 0.
        maximize: ascend instead of descend.
        robust, backend: as for :class:`ABSGD`, which also says what holds of tensors, GPUs and scalers.

    Sparse gradients take torch's own step.

    Raises:
        ValueError: a number out of its range, an unknown backend.
        RuntimeError: a backend that cannot run; weight_decay with a sparse gradient.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABAdagrad(model.parameters(), lr=1e-2)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Duchi et al. 2011; ABSGD paper, Sec. 3.4.
    """

    _rule = ADAGRAD

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        robust=None,
        backend: str | None = None,
    ):
        super().__init__(params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize=maximize)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = self._first_sum(p, group)
        self._set_up(robust, backend)

    @staticmethod
    def _first_sum(p: Tensor, group: dict) -> Tensor:
        start = group["initial_accumulator_value"]
        return torch.full_like(
            p,
            complex(start, start) if p.is_complex() else start,
            dtype=state_dtype(p),
            memory_format=torch.preserve_format,
        )

    def _make_missing(self, group):
        for p in group["params"]:  # torch makes them in __init__ only, not for a group that is added later
            if p.grad is not None and not self.state[p]:
                self.state[p] = {"step": torch.tensor(0.0, dtype=torch.float32), "sum": self._first_sum(p, group)}
        super()._make_missing(group)

    def _torch_step(self, group, params, grads, sums, steps):
        names = ("lr", "weight_decay", "lr_decay", "eps", "maximize")
        options = {name: group[name] for name in names}
        for one in zip(params, grads, sums, steps):
            one = [[value] for value in one]
            if one[1][0].is_sparse:
                adagrad(*one, has_sparse_grad=True, foreach=False, has_complex=one[0][0].is_complex(), **options)
            else:
                reference.adagrad_step_(*one, **options)
