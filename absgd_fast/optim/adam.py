"""ABAdam and ABAdamW: Adam in torch's form and in the paper's."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _codes, _numbers, reference
from ..robust.base import RobustLoss
from .base import FusedOptimizer
from .rule import OptimizerRule, Place

ADAM = OptimizerRule(
    "adam",
    states={"exp_avg": None, "exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"},
    flags={
        "maximize": _codes.MAXIMIZE,
        "amsgrad": _codes.AMSGRAD,
        "decoupled_weight_decay": _codes.DECOUPLED,
        "paper_form": _codes.DECOUPLED | _codes.PAPER_FORM,
    },
    hyper_a=Place("betas", 0),
    hyper_b=Place("betas", 1),
    eps=Place("eps"),
    own_flags=("paper_form",),
    refuses_sparse="Adam does not support sparse gradients, please consider SparseAdam instead",
)


class ABAdam(FusedOptimizer, torch.optim.Adam):
    r"""Adam on the gradient of a robust loss.

    The robust weights come from :class:`ABLoss`, which works with any optimizer.

    The update is that of torch.optim.Adam (docs/MATH.md §3.2). With w a parameter and t the number of the step:

        G = gradient of the loss + weight_decay * w                                  (maximize: -gradient + weight_decay * w)
        v = beta_1 v + (1 - beta_1) G,    u = beta_2 u + (1 - beta_2) G^2
        w = w - lr (v / (1 - beta_1^t)) / (sqrt(u / (1 - beta_2^t)) + eps)           (amsgrad: the largest u so far instead of u)

    ``paper_form=True`` takes the step of the ABSGD paper (Eq. 9). It has no bias correction, its eps (G_0 in the paper) stands
    outside the root, and its weight decay is decoupled, so G is the gradient (-gradient) alone:

        v = beta_1 v + (1 - beta_1) G,    u = beta_2 u + (1 - beta_2) G^2
        w = w - lr (v / (sqrt(u) + eps) + weight_decay * w)

    Half-precision parameters have float32 states. ``state_dict()`` and torch.optim.Adam's are
    interchangeable, also in the middle of a training (except with ``paper_form``). :class:`ABSGD` says which tensors the kernels
    take, how GPUs and GradScaler are served, and what a skipped step does; all that holds here too. On CUDA a launch takes up to
    633 tensors (546 with amsgrad), and a small second launch raises the counts of steps.

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: the learning rate >= 0, a float or a one-element tensor.
        betas: beta_1 and beta_2, both in [0, 1).
        eps: the number >= 0 that is added to the root.
        weight_decay: the factor >= 0 of the L2 penalty (with ``paper_form`` of the decoupled weight decay).
        amsgrad: divide by the root of the largest u so far. Not together with ``paper_form``.
        maximize: maximize the objective instead of minimizing it.
        capturable: whether the step may be captured in a CUDA graph. On a GPU the kernels' step always may. On the CPU the value
            changes nothing (torch's class refuses True there).
        foreach, differentiable, fused: see :class:`ABSGD`.
        decoupled_weight_decay: take the weight decay of :class:`ABAdamW`. ``paper_form`` always has it.
        paper_form: take the step of the paper's Eq. 9.
        robust: an ABLoss or LinearABLoss with deferred=True, whose gradients this step finishes; see :class:`ABSGD`.
        max_norm: clip the gradients to this norm within the step; see :class:`ABSGD`.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the fastest that runs.

    Raises:
        ValueError: a number is out of its range, options exclude each other, the backend is unknown, or a parameter is float16
            together with ``robust``.
        RuntimeError: the backend cannot run here (the text says why), ``differentiable`` is True, or ``foreach`` and ``fused``
            both are. ``step()`` raises it for a sparse gradient.
        TypeError: ``robust`` is not a loss with deferred=True.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABAdam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Kingma & Ba 2015, Alg. 1; Qi et al. 2023 (the ABSGD paper), Sec. 3.4 and Eq. 9; Reddi et al. 2018, Alg. 2 (amsgrad).
    """

    _rule = ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        paper_form: bool = False,
        robust: RobustLoss | None = None,
        max_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        if paper_form and amsgrad:
            raise ValueError(
                "paper_form is Eq. 9 of the paper, which has no amsgrad (got True); use paper_form=False with amsgrad"
            )
        decoupled = {"decoupled_weight_decay": True} if decoupled_weight_decay else {}  # torch's AdamW has no such argument
        super().__init__(
            params,
            lr,
            _numbers.plain(betas),
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            **decoupled,
        )
        self._set_up(robust, max_norm, backend, paper_form=paper_form)

    def _torch_step(
        self, group: dict, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor | None]], steps: list[Tensor]
    ) -> None:
        exp_avgs, exp_avg_sqs = cast("list[list[Tensor]]", states[:2])  # both are always kept
        names = ("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay", "paper_form")
        reference.adam_step_(params, grads, exp_avgs, exp_avg_sqs, states[2], steps, **{name: group[name] for name in names})


class ABAdamW(ABAdam, torch.optim.AdamW):
    r"""AdamW on the gradient of a robust loss: :class:`ABAdam` with decoupled weight decay.

    The update is that of torch.optim.AdamW (docs/MATH.md §3.2): the step of :class:`ABAdam` with G without
    weight decay, and before it

        w = w - lr weight_decay w

    Arguments, errors and limits are those of :class:`ABAdam`, except that weight_decay is 1e-2 by default, and that there is no
    decoupled_weight_decay, which is always on.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABAdamW(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Loshchilov & Hutter 2019, Alg. 2; Qi et al. 2023 (the ABSGD paper), Sec. 3.4.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        paper_form: bool = False,
        robust: RobustLoss | None = None,
        max_norm: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            paper_form=paper_form,
            robust=robust,
            max_norm=max_norm,
            backend=backend,
        )
