"""The gradient of half-precision logits is the true one rounded once, the upstream gradient included (docs/losses.md)."""

from functools import partial

import pytest
import torch
from tensors import LAYOUTS

import absgd_fast as ab
from absgd_fast.functional import logit_loss

HALF = [torch.bfloat16, torch.float16]
UPSTREAM = torch.linspace(0.3, 2.1, 12)  # no power of 2, by which a second multiplication would be exact
THIRD = 1 / 3


def of_losses(case, backend, classes, x, target, upstream):
    """Gradient and truth of the vector of losses."""
    (grad,) = torch.autograd.grad(logit_loss(x, target, backend=backend, **case.tensors(classes, torch.float32)), x, upstream)
    return grad, lambda losses: (losses * upstream).sum()


def of_reduced(reduction, case, backend, classes, x, target, upstream):
    """Of their mean or sum, divided by 3."""
    value = case.module(classes, torch.float32, reduction=reduction, backend=backend)(x, target)
    return torch.autograd.grad(value * THIRD, x)[0], reduction


def of_robust_loss(factor, options, any_losses, case, backend, classes, x, target, upstream):
    """Of the robust loss times `factor`. any_losses: the criterion is a function that the operators do not know."""
    module = case.module(classes, torch.float32, backend=backend)
    criterion = ab.ABLoss((lambda *xy: module(*xy)) if any_losses else module, lam=-0.7, backend=backend, **options)
    if criterion.deferred:  # the second micro-batch knows the reference point
        criterion(x, target).backward()
    sample_weight = upstream.flip(0).contiguous()
    value = criterion(x, target, sample_weight=sample_weight) * factor
    (grad,) = torch.autograd.grad(value, x)
    _, weights, valid = criterion.memo.sample_stats.unbind()
    factors = torch.where(valid > 0, (weights + criterion.mix) * sample_weight * factor, 0.0)
    return grad, lambda losses: (losses * factors / (1 if criterion.deferred else (valid > 0).sum())).sum()


# The names of the ways. "ABLoss" has the upstream gradient 1.
WAYS = {
    "losses": of_losses,
    "mean": partial(of_reduced, "mean"),
    "sum": partial(of_reduced, "sum"),
    "ABLoss": partial(of_robust_loss, 1.0, {"mix": 0.3}, False),
    "ABLoss times 1/3": partial(of_robust_loss, THIRD, {"mix": 0.3}, False),
    "ABLoss of any losses": partial(of_robust_loss, THIRD, {}, True),
    "deferred": partial(of_robust_loss, 1.0, {"deferred": True}, False),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [7, 70])  # on the CPU each has a walk of its own
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounded_once(backend, case, dtype, classes, layout, way):
    generator = torch.Generator().manual_seed(classes)
    given = (torch.randn(12, classes, generator=generator) * 3).to(dtype)
    target = torch.randint(classes, (12,), generator=generator)
    target[::2] = given[::2].argmax(1)  # pruning leaves these
    x = LAYOUTS[layout](given).requires_grad_()
    got, reduce = WAYS[way](case, backend, classes, x, target, UPSTREAM)
    exact = given.double().requires_grad_()
    eager = partial(case.eager, exact, target, **case.tensors(classes, torch.float64))
    value = eager(reduction=reduce) * THIRD if isinstance(reduce, str) else reduce(eager())
    (wanted,) = torch.autograd.grad(value, exact)
    twice = backend == "cpu" and dtype == torch.bfloat16 and way == "ABLoss times 1/3"  # decision 6 of docs/design-cpu.md
    info = torch.finfo(dtype)
    roundings = info.eps / (1 if twice else 2) * wanted.abs() + info.tiny * info.eps / 2
    arithmetic = 32 * torch.finfo(torch.float32).eps * wanted.abs().amax(1, keepdim=True)
    error = (got.double() - wanted).abs()
    assert wanted.abs().max() > 0 and (error <= roundings + arithmetic).all(), (error / roundings).max()
