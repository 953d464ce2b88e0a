"""The competitors for the loss of a linear head: ours, which stores no logits, and others."""

import math
from functools import partial

import torch
from torch.nn import functional as F

import absgd_fast as ab

from .case_data import GAMMA, LAM
from .cases import PLAIN_HEAD, chunked, policies
from .liger import from_liger
from .peer import OURS, LeftOut, Peer

PATIENCE = 30.0  # seconds of a call: some ways of adding up are said to be 50 times slower where the processor has no bfloat16


def _head(data, criterion, lam=LAM, init="first"):
    """A step of criterion(hidden, weight, target) on its own leaves."""
    hidden, weight = (t.detach().requires_grad_() for t in (data.hidden, data.weight))

    def forget():
        hidden.grad = weight.grad = None

    def run():
        forget()
        loss = criterion(hidden, weight, data.target)
        loss.backward()
        return loss

    return Peer(run, lambda loss: data.error(loss, (hidden.grad, weight.grad), lam, init), forget=forget)


def _linear(data):
    with data.device:
        return _head(data, ab.LinearABLoss(lam=LAM, gamma=GAMMA))


def _liger_linear(data):
    criterion = from_liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss")
    return _head(data, lambda hidden, weight, target: criterion(weight, hidden, target), lam=math.inf)


def _plain(data):
    return _once(_head(data, lambda hidden, weight, target: F.cross_entropy(hidden @ weight.t(), target), lam=math.inf))


def _torch_linear(data, policy="auto"):
    """torch's own chunked loss of a linear head, which torch >= 2.13 has."""
    if not hasattr(F, "linear_cross_entropy"):
        raise LeftOut(f"torch {torch.__version__} has no linear_cross_entropy")
    criterion = partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions(acc_policy=policy))
    return _head(data, criterion, lam=math.inf)


def _once(peer):
    """The same competitor on a CPU, where one step is enough for a plain mean, and where a step may take too long."""
    peer.steps, peer.patience = 1, PATIENCE
    return peer


ON_GPU = {OURS: _linear, "Liger": _liger_linear, "torch, chunked": _torch_linear}
ON_CPU = {OURS: _linear, PLAIN_HEAD: _plain} | {
    chunked(policy): lambda data, policy=policy: _once(_torch_linear(data, policy)) for policy in policies()
}
