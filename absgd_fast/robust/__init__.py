"""The robust loss.

    lam.py         RelativeLam
    state.py       buffers and numbers, as operators take them
    step.py        the phases of a deferred step
    processes.py   who shares a normaliser, and what they must agree on
    normalizer.py  three ways to settle log s'
    last.py        what a forward leaves
    weighting.py   what makes W from losses: lambda or a rule
    options.py     options that do not go together
    finish.py      the arithmetic of finish_
    base.py        what ABLoss and LinearABLoss have in common
    paths.py       the two ways of a forward: fused and general
    loss.py        ABLoss

Each file imports from those above it only.
"""

from .lam import RelativeLam
from .last import LastForward
from .loss import DFT, ABLoss

__all__ = ["DFT", "ABLoss", "LastForward", "RelativeLam"]
