"""The module `absgd.optimizers` of the reference package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import optim

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


def ABSGD(model_param: ParamsT, lr: float, weight_decay: float = 0.0) -> optim.ABSGD:
    """Momentum SGD with momentum 0.9, as in the original (docs/MATH.md §3.1).

    Args:
        model_param: parameters or parameter groups, as for torch.optim.SGD.
        lr: learning rate.
        weight_decay: >= 0.

    >>> type(ABSGD([torch.zeros(1, requires_grad=True)], lr=0.1)).__name__
    'ABSGD'
    """
    return optim.ABSGD(model_param, lr=lr, momentum=0.9, weight_decay=weight_decay)


def ABAdam(model_param: ParamsT, lr: float, weight_decay: float = 0.0) -> optim.ABAdam:
    """Adam with torch's defaults, as in the original (docs/MATH.md §3.2).

    Args:
        model_param: parameters or parameter groups, as for torch.optim.Adam.
        lr: learning rate.
        weight_decay: >= 0.

    >>> type(ABAdam([torch.zeros(1, requires_grad=True)], lr=0.1)).__name__
    'ABAdam'
    """
    return optim.ABAdam(model_param, lr=lr, weight_decay=weight_decay)
