"""The oracle against Algorithm 1 written in the linear domain, and absgd_fast.reference against the oracle."""

import inspect

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

import absgd_fast as ab

WEIGHT_OPTIONS = dict(gamma=0.9, alpha=1.0, init="first", mask=None)  # names and defaults are the contract
LOSS_OPTIONS = dict(kind="ce", weight=None, label_smoothing=0.0, ignore_index=-100)


def test_oracle_is_algorithm_1(rng):
    """s <- (1-gamma) s + gamma alpha mean(exp(L/lam)); W = exp(L/lam)/s; three batches, so that s is an average of averages."""
    gamma, alpha, lam, s, log_s = 0.7, 0.8, -0.6, 0.0, -oracle.INF
    for _ in range(3):
        losses = rng.exponential(1.0, 5)
        g = np.exp(losses / lam)
        s = (1 - gamma) * s + gamma * alpha * g.mean()
        w = oracle.robust_weights(losses, log_s, lam, gamma=gamma, alpha=alpha, init="zero")
        np.testing.assert_allclose(w.weights, g / s, rtol=1e-13)
        log_s = w.log_s
        assert log_s == pytest.approx(np.log(s), rel=1e-13)


def test_oracle_cross_entropy_is_torchs(case, rng):
    """Two independent fp64 programs agree, gradients too; 6 rows of 5 classes, row 0 ignored where the case ignores class 0."""
    logits = torch.tensor(rng.normal(0, 3, (6, 5)), requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 1])
    options = case.tensors(5, torch.float64)
    losses = case.eager(logits, target, **options)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    exact, exact_grad = case.exact(logits.detach(), target, **case.options(5))
    np.testing.assert_allclose(losses.detach(), exact, rtol=1e-13)
    np.testing.assert_allclose(grad, exact_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name, options", [("robust_weights", WEIGHT_OPTIONS), ("logit_loss", LOSS_OPTIONS)])
@pytest.mark.parametrize("module", [ab.reference, ab.functional])
def test_names_and_defaults(module, name, options):
    parameters = inspect.signature(getattr(module, name)).parameters
    assert {k: parameters[k].default for k in options} == options
    leading = ["losses", "log_s", "lam"] if name == "robust_weights" else ["logits", "target"]
    assert list(parameters)[: len(leading)] == leading


@pytest.mark.parametrize("lam", [0.7, -0.7, oracle.INF])
@pytest.mark.parametrize("log_s", [-oracle.INF, 1.3])
@pytest.mark.parametrize("init", ["first", "zero"])
def test_reference_weights(dtype, lam, log_s, init, rng):
    """7 losses, one of them masked and large, so that counting it would show in both log s and n."""
    losses = torch.tensor(rng.exponential(1.0, 7)).to(dtype)
    losses[2] = 30.0
    mask = torch.arange(7) != 2
    options = dict(gamma=0.8, alpha=0.6, init=init)
    exact = oracle.robust_weights(losses.double(), log_s, lam, mask=mask, **options)
    weights, new = ab.reference.robust_weights(losses, log_s, lam, mask=mask, **options)
    half = dtype in (torch.bfloat16, torch.float16)
    assert weights.dtype == (torch.float32 if half else dtype)
    tol = 1e-12 if dtype == torch.float64 else 3e-6
    np.testing.assert_allclose(weights, exact.weights, rtol=tol)
    np.testing.assert_allclose(new, exact.log_s, rtol=tol)


def test_reference_weights_are_bounded(rng):
    """And the state does not see the bound."""
    losses = torch.tensor(rng.exponential(1.0, 7))
    exact = oracle.robust_weights(losses, 0.2, 0.7, max_weight=1.1)
    weights, new = ab.reference.robust_weights(losses, 0.2, 0.7, max_weight=1.1)
    assert (weights == 1.1).any() and (weights < 1.1).any()
    np.testing.assert_allclose(weights, exact.weights, rtol=1e-12)
    np.testing.assert_allclose(new, exact.log_s, rtol=1e-12)


def test_reference_losses(dtype, case, rng):
    """(B, C, d) logits: 3 x 7 x 4 has no two equal sizes, so a wrong axis cannot pass."""
    logits = torch.tensor(rng.normal(0, 3, (3, 7, 4))).to(dtype).requires_grad_()
    target = torch.tensor(rng.integers(0, 7, (3, 4)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    losses = ab.reference.logit_loss(logits, target, **case.tensors(7, wide))
    losses.sum().backward()
    exact, exact_grad = case.exact(oracle.rows(logits.detach().double()), target.flatten(), **case.options(7))
    assert losses.shape == (3, 4)
    assert losses.dtype == wide and logits.grad.dtype == dtype
    tol = 32 * torch.finfo(wide).eps
    np.testing.assert_allclose(losses.detach().flatten(), exact, rtol=tol, atol=tol)
    tol = max(tol, torch.finfo(dtype).eps)  # a half gradient is rounded once
    np.testing.assert_allclose(oracle.rows(logits.grad.double()), exact_grad, rtol=tol, atol=tol / 8)


def test_reference_mean_loss_is_plain_cross_entropy(rng):
    """|lam| = inf through the whole reference pipeline is F.cross_entropy's mean."""
    logits, target = torch.tensor(rng.normal(0, 2, (6, 4))), torch.tensor(rng.integers(0, 4, 6))
    losses = ab.reference.logit_loss(logits, target)
    weights, log_s = ab.reference.robust_weights(losses, 0.5, -oracle.INF)
    assert torch.equal(weights, torch.ones_like(losses)) and float(log_s) == 0.5
    torch.testing.assert_close((weights * losses).mean(), F.cross_entropy(logits, target))
