"""absgd_fast: attentional-biased SGD (ABSGD) for PyTorch, fused.

Robust weights W_i = exp(L_i / lambda) / s for training on imbalanced (lambda > 0) or mislabelled (lambda < 0) data.

>>> import torch, absgd_fast as ab
>>> criterion = ab.ABLoss(lam=-0.5)
>>> loss = criterion(torch.zeros(4, 10, requires_grad=True), torch.arange(4))
>>> loss.backward()
"""

from . import functional, reference
from .losses import CrossEntropy
from .optim import ABSGD
from .robust import DFT, ABLoss, RelativeLam
from .schedule import TwoStage

__all__ = ["ABLoss", "ABSGD", "CrossEntropy", "DFT", "RelativeLam", "TwoStage", "functional", "reference"]
