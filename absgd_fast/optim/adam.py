"""ABAdam and ABAdamW, in torch's form and in the paper's."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _codes, reference
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
    r"""Adam on the gradient of the robust loss; the robust weights come from :class:`ABLoss`.

    torch.optim.Adam in one pass over all parameters, with G the gradient (negated with ``maximize``) and t the step:

        g = G + weight_decay * w
        v = beta_1 v + (1 - beta_1) g,    u = beta_2 u + (1 - beta_2) g^2       (amsgrad: the largest u so far, below)
        w = w - lr (v / (1 - beta_1^t)) / (sqrt(u / (1 - beta_2^t)) + eps)

    ``paper_form=True`` is Eq. 9 of the ABSGD paper: no bias correction, eps (its G_0) outside the root, decoupled decay:

        w = w - lr (v / (sqrt(u) + eps) + weight_decay * w)

    Half-precision parameters keep float32 states. ``state_dict()`` loads into torch.optim.Adam and back in the middle of a
    training (not with ``paper_form``). What can be said of tensors, GPUs and scalers at :class:`ABSGD` holds here too; CUDA takes
    633 tensors a launch (546 with amsgrad), and a small launch more for the counts of steps.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate >= 0; a float or a one-element tensor.
        betas: both in [0, 1).
        eps: >= 0.
        weight_decay: L2 penalty >= 0 (with ``paper_form`` decoupled).
        amsgrad: divide by the largest u so far; not with ``paper_form``.
        maximize: ascend instead of descend.
        paper_form: Eq. 9 of the paper.
        robust, backend: as for :class:`ABSGD`.

    Raises:
        ValueError: a number out of its range, options that exclude each other, an unknown backend.
        RuntimeError: a backend that cannot run; a sparse gradient.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABAdam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Kingma & Ba 2015, Alg. 1; ABSGD paper, Sec. 3.4 and Eq. 9; Reddi et al. 2018, Alg. 2 (amsgrad).
    """

    _rule = ADAM

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        paper_form: bool = False,
        robust=None,
        backend: str | None = None,
    ):
        if paper_form and amsgrad:
            raise ValueError("paper_form is Eq. 9 of the paper, which has no amsgrad (got True); use paper_form=False with it")
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        self._set_up(robust, backend, paper_form=paper_form)

    def _torch_step(self, group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps):
        names = ("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay", "paper_form")
        reference.adam_step_(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, **{name: group[name] for name in names}
        )


class ABAdamW(ABAdam, torch.optim.AdamW):
    r"""AdamW on the gradient of the robust loss: :class:`ABAdam` with decoupled weight decay, w = w - lr weight_decay w.

    torch.optim.AdamW in one pass over all parameters; arguments, errors and limits as for :class:`ABAdam`, with weight_decay =
    1e-2.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABAdamW(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Loshchilov & Hutter 2019, Alg. 2; ABSGD paper, Sec. 3.4.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        paper_form: bool = False,
        robust=None,
        backend: str | None = None,
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            paper_form=paper_form,
            robust=robust,
            backend=backend,
        )
