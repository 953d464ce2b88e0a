"""absgd_fast: attentional-biased SGD (ABSGD) for PyTorch, fused.

Robust weights W_i = exp(L_i / lambda) / s for training on imbalanced (lambda > 0) or mislabelled (lambda < 0) data.

>>> import torch, absgd_fast as ab
>>> criterion = ab.ABLoss(lam=-0.5)
>>> loss = criterion(torch.zeros(4, 10, requires_grad=True), torch.arange(4))
>>> loss.backward()
"""

from . import functional, meta, reference, weights
from .linear import LinearABLoss
from .losses import (
    CDT,
    GCE,
    LDAM,
    SCE,
    VS,
    CosineClassifier,
    CrossEntropy,
    Focal,
    LogitAdjusted,
    adrw_weights,
    class_balanced_weights,
)
from .optim import ABSGD, ABAdagrad, ABAdam, ABAdamW, ABRMSprop
from .robust import DFT, ABLoss, RelativeLam
from .schedule import DRW, TLA, TwoStage, vs_tla_adrw

__all__ = [
    "ABSGD",
    "CDT",
    "DFT",
    "DRW",
    "GCE",
    "LDAM",
    "SCE",
    "TLA",
    "VS",
    "ABAdagrad",
    "ABAdam",
    "ABAdamW",
    "ABLoss",
    "ABRMSprop",
    "CosineClassifier",
    "CrossEntropy",
    "Focal",
    "LinearABLoss",
    "LogitAdjusted",
    "RelativeLam",
    "TwoStage",
    "adrw_weights",
    "class_balanced_weights",
    "functional",
    "meta",
    "reference",
    "vs_tla_adrw",
    "weights",
]
