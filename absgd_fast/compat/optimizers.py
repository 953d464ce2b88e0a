"""`absgd.optimizers` of the reference package."""

from __future__ import annotations

from .. import optim


def ABSGD(model_param, lr: float, weight_decay: float = 0.0) -> optim.ABSGD:
    """Momentum SGD with momentum 0.9, as the original.

    >>> type(ABSGD([torch.zeros(1, requires_grad=True)], lr=0.1)).__name__
    'ABSGD'
    """
    return optim.ABSGD(model_param, lr=lr, momentum=0.9, weight_decay=weight_decay)


def ABAdam(model_param, lr: float, weight_decay: float = 0.0) -> optim.ABAdam:
    """Adam with torch's defaults, as the original.

    >>> type(ABAdam([torch.zeros(1, requires_grad=True)], lr=0.1)).__name__
    'ABAdam'
    """
    return optim.ABAdam(model_param, lr=lr, weight_decay=weight_decay)
