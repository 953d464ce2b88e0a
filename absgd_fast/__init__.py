"""absgd_fast: attentional-biased SGD (ABSGD) for PyTorch, with fused kernels.

A robust loss weighs each sample by W_i = exp(L_i / lambda) / s. lambda > 0 attends to large losses, for imbalanced data.
lambda < 0 attends to small ones, for mislabelled data. docs/MATH.md §1 has the formulas.

>>> import torch, absgd_fast as ab
>>> criterion = ab.ABLoss(lam=-0.5)
>>> loss = criterion(torch.zeros(4, 10, requires_grad=True), torch.arange(4))
>>> loss.backward()

`__version__` is the version of the installed package, which pyproject.toml sets, and "0+not.installed" if absgd_fast is imported
from a checkout that is not installed.
"""

from importlib import metadata as _metadata

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _error:
    if _error.name != "torch":
        raise
    raise ModuleNotFoundError("absgd_fast needs PyTorch 2.10 or later: pip install torch", name="torch") from None

from . import functional, meta, reference, weights
from .audit import LabelAudit
from .class_weights import adrw_weights, class_balanced_weights
from .language_models import DFT, causal_lm_loss
from .linear import LinearABLoss, linear_robust_loss
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
)
from .optim import ABSGD, ABAdagrad, ABAdam, ABAdamW, ABRMSprop
from .robust import ABLoss, RelativeLam, TargetESS
from .schedule import DRW, TLA, Ramp, TwoStage, vs_tla_adrw
from .selection import Selection, select

try:
    __version__ = _metadata.version("absgd_fast")
except _metadata.PackageNotFoundError:
    __version__ = "0+not.installed"

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
    "LabelAudit",
    "LinearABLoss",
    "LogitAdjusted",
    "Ramp",
    "RelativeLam",
    "Selection",
    "TargetESS",
    "TwoStage",
    "adrw_weights",
    "causal_lm_loss",
    "class_balanced_weights",
    "functional",
    "linear_robust_loss",
    "meta",
    "reference",
    "select",
    "vs_tla_adrw",
    "weights",
]
