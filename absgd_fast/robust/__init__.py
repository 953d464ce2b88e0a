"""The robust loss `ABLoss`, and the parts that it is made of.

    lam.py         RelativeLam, TargetESS: lambdas that the losses fix
    state.py       the state tensors and numbers of a robust loss, in the form in which operators take them
    arrival.py     a number on its way from a GPU to the host
    step.py        the phases of a deferred step, and what happens in each (also after a NaN)
    processes.py   how many processes share a normaliser, and what they must agree on
    normalizer.py  three ways to settle log s': from this batch, with other processes, or once per optimizer step
    collapse.py    the warning of weights that have collapsed
    last.py        what a forward leaves behind, and how users read it
    ignored.py     rows that a user's criterion ignores by their labels
    report.py      the plain mean loss as the value of a forward
    options.py     options that exclude each other
    finish.py      the arithmetic of `finish_`
    base.py        what ABLoss and LinearABLoss have in common
    conclude.py    the end of a forward
    weighting.py   what makes W from losses: lambda, or a rule of the user
    paths.py       the two ways of a forward: fused and general
    loss.py        ABLoss

Each file imports only from files above it.
"""

from .lam import RelativeLam, TargetESS
from .last import LastForward
from .loss import ABLoss

__all__ = ["ABLoss", "LastForward", "RelativeLam", "TargetESS"]
