"""linear_robust_loss: the arguments of torch's linear_cross_entropy, and the values of LinearABLoss."""

import inspect
import math

import pytest
import torch
from test_linear import BACKENDS, gradients, native
from test_linear_shapes import B, C, D, T, draw, head, labels
from torch import nn
from torch.nn import functional as F

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")
torchs = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
INF = float("inf")


@torchs
def test_signature():
    """Every argument of torch has its name, kind and default; the others come from robust_weights, with its defaults."""
    ours, theirs = (inspect.signature(f).parameters for f in (ab.linear_robust_loss, F.linear_cross_entropy))
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default), name
    assert list(ours)[:3] == list(theirs)[:3]
    weights = inspect.signature(ab.functional.robust_weights).parameters
    for name in ours.keys() - theirs.keys():
        assert (ours[name].kind, ours[name].default) == (weights[name].kind, weights[name].default), name
    assert weights.keys() - ours.keys() == {"losses"}


CASES = {
    "plain": {},
    "bias": dict(linear_bias=True),
    "smoothing": dict(label_smoothing=0.2, linear_bias=True),
    "ignore_index": dict(ignore_index=3),
    "soft": dict(soft=True, linear_bias=True),
    "options": dict(options=True),
}


@torchs
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_the_plain_mean_is_torchs(case, backend):
    given = dict(CASES[case])
    input, (linear_weight, bias) = draw(B * T, D).requires_grad_(), head()
    target = draw(B * T, C).softmax(1) if given.pop("soft", False) else labels((B * T,)).abs().remainder(C)
    if "linear_bias" in given:
        given["linear_bias"] = bias
    if "options" in given:
        given["options"] = nn.LinearCrossEntropyOptions(batch_chunk_size=5)
    loss, log_s = ab.linear_robust_loss(input, linear_weight, target, -INF, INF, backend=backend, **given)
    wanted = F.linear_cross_entropy(input, linear_weight, target, **given)
    leaves = [input, linear_weight, *([bias] if "linear_bias" in given else [])]
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for a, b in zip(gradients(loss, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    assert log_s == -INF  # the plain mean has none


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("learns", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("shape", [(B,), (B, T)], ids=["rows", "tokens"])
def test_as_the_module(shape, learns, backend):
    """From step to step; log s moves without gradients too, because the caller keeps it."""
    (linear_weight, bias), class_weight = head(), torch.linspace(0.5, 2, C)
    module = ab.LinearABLoss(ab.CrossEntropy(class_weight, 0.1), lam=-0.5, gamma=0.7, alpha=0.8, init="zero").double()
    log_s, options = -INF, dict(gamma=0.7, alpha=0.8, init="zero", weight=class_weight, label_smoothing=0.1)
    for seed in range(3):
        input, target = draw(*shape, D, seed=seed).requires_grad_(), labels(shape)
        mask, before = draw(*shape, seed=seed + 9) > -1, log_s
        with torch.set_grad_enabled(learns):
            loss, log_s = ab.linear_robust_loss(
                input, linear_weight, target, before, -0.5, linear_bias=bias, mask=mask, backend=backend, **options
            )
        wanted = module(input, linear_weight, target, bias, mask=mask)
        torch.testing.assert_close(loss, wanted if learns else wanted.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(log_s, module.log_s, rtol=1e-12, atol=0)
        assert loss.requires_grad == learns and not log_s.requires_grad
        if learns:
            leaves = [input, linear_weight, bias]
            for a, b in zip(gradients(loss, leaves), gradients(wanted, leaves), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@native
def test_its_arguments_stay():
    """It is pure: a log s that is a tensor is not written."""
    input, (linear_weight, _) = draw(B, D), head()
    for dtype in (torch.float32, torch.float64):
        before = torch.tensor(0.25, dtype=dtype)
        _, after = ab.linear_robust_loss(input.float(), linear_weight.float(), labels((B,)), before, torch.tensor(0.5))
        assert before == 0.25 and after != 0.25 and after.dtype == dtype
    assert ab.linear_robust_loss(input, linear_weight, labels((B,)), 0.25, 0.5)[1].dtype == torch.float64


def test_transforms():
    """torch.func differentiates it, state and all."""
    input, (linear_weight, bias), target = draw(B, T, D), head(), labels((B, T))
    mask = draw(B, T) > -1

    def loss_of(input, weight):
        return ab.linear_robust_loss(input, weight, target, 0.3, -0.5, linear_bias=bias.detach(), mask=mask, label_smoothing=0.1)

    got, log_s = torch.func.grad(loss_of, argnums=(0, 1), has_aux=True)(input, linear_weight.detach())
    leaf = input.clone().requires_grad_()
    loss, wanted_log_s = loss_of(leaf, linear_weight)
    for a, b in zip(got, gradients(loss, [leaf, linear_weight]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(log_s, wanted_log_s, rtol=1e-12, atol=0)


BAD = {
    "sum": (dict(reduction="sum"), ValueError, "reduction: got 'sum', expected 'mean'"),
    "none": (dict(reduction="none"), ValueError, r"reduction: got 'none', .* last\.losses and last\.weights"),
    "soft and ignored": (dict(target=draw(B, C).softmax(1), ignore_index=1), RuntimeError, "ignore_index: .* with probabilities"),
    "lam": (dict(lam=0), ValueError, "lam: got 0"),
    "relative lam": (dict(lam=ab.RelativeLam(0.5)), TypeError, "lam: got RelativeLam"),
    "log_s": (dict(log_s=torch.zeros(2)), ValueError, "log_s: got a tensor of shape"),
    "input": (dict(input=[1.0]), TypeError, "input: got list"),
    "integers": (dict(input=torch.ones(B, D, dtype=torch.int64)), TypeError, "input: got torch.int64"),
    "smoothing": (dict(label_smoothing=2), ValueError, "label_smoothing: got 2"),
    "several outputs": (dict(linear_weight=torch.ones(C, 2, D)), ValueError, r"linear_weight \(12, 2, 5\), expected"),
    "options": (dict(options=3), TypeError, "options: got int, expected torch.nn.LinearCrossEntropyOptions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    wrong, error, message = BAD[name]
    given = dict(input=draw(B, D), linear_weight=draw(C, D), target=labels((B,)), log_s=-INF, lam=0.5)
    with pytest.raises(error, match=message):
        ab.linear_robust_loss(**{**given, **wrong})


@torchs
def test_options_of_torch():
    given = (draw(B, D), draw(C, D), labels((B,)), -INF, 0.5)
    with pytest.raises(ValueError, match="options: got chunking_method='aspect_ratio:4', expected .*batch_chunk_size"):
        ab.linear_robust_loss(*given, options=nn.LinearCrossEntropyOptions(chunking_method="aspect_ratio:4"))
    ab.linear_robust_loss(*given, options=nn.LinearCrossEntropyOptions(acc_policy="accurate", allow_retain_graph=True))


@torchs
def test_torchs_module_is_refused_by_name():
    """It has a head of its own. With its loss and its head the value is its own."""
    module = nn.LinearCrossEntropyLoss(D, C, label_smoothing=0.1, bias=True).double()
    with pytest.raises(TypeError, match=r"LinearCrossEntropyLoss, which has a head of its own; .*head\.linear\.weight"):
        ab.LinearABLoss(module, lam=0.5)
    input, target = draw(B, D), torch.arange(B)
    one = ab.LinearABLoss(ab.CrossEntropy(label_smoothing=0.1), lam=math.inf).double()
    loss = one(input, module.linear.weight, target, module.linear.bias)
    torch.testing.assert_close(loss, module(input, target), rtol=1e-12, atol=0)
