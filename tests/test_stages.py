"""Classifier stages: the formulas, the sampling, and that they raise the recall of a rare class."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import absgd_fast as ab
from absgd_fast.experiments.stages import STAGES, class_balanced, crt, lws, tau_normalised

GIVEN = dict(epochs=3, lr=0.1, batch_size=8, weight_decay=0.0, momentum=0.9, seed=0)
CONFIG = SimpleNamespace(tau=1.0, stage_epochs=10, stage_lr=0.1, batch_size=64, weight_decay=1e-4, momentum=0.9)


def generator(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


def layer_of(weight, bias=None, dtype=torch.float64):
    weight = torch.as_tensor(weight, dtype=dtype)
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(torch.as_tensor(bias, dtype=dtype))
    return layer


def gaussians(counts, seed, size=1.5):
    """One Gaussian for each class, whose means are `size` along an axis of its own."""
    g = generator(seed)
    y = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    means = size * torch.eye(len(counts), 8, dtype=torch.float32)
    return means[y] + torch.randn(len(y), 8, generator=g, dtype=torch.float32), y


def plainly_trained(x, y, bias):
    """The classifier of least cross-entropy, with a weight decay of 0.03."""
    layer = layer_of(torch.zeros(3, 8), torch.zeros(3) if bias else None, torch.float32)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(x), y) + 0.015 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return layer


def recalls(layer, x, y):
    right = layer(x).argmax(1) == y
    return [float(right[y == c].double().mean()) for c in range(int(y.max()) + 1)]


# ---- tau -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("bias", [None, [1.0, 2.0, 3.0]], ids=["without bias", "bias"])
def test_tau_is_the_formula(tau, bias):
    layer = layer_of([[3.0, 4.0], [0.0, 0.0], [-6.0, 8.0]], bias)
    new = tau_normalised(layer, tau)
    expected = [[3 / 5**tau, 4 / 5**tau], [0.0, 0.0], [-6 / 10**tau, 8 / 10**tau]]
    torch.testing.assert_close(new.weight.detach(), torch.tensor(expected, dtype=torch.float64))
    assert type(new) is torch.nn.Linear and new.bias is None and new.weight.requires_grad
    assert layer.weight.tolist() == [[3.0, 4.0], [0.0, 0.0], [-6.0, 8.0]]


# ---- sampling ------------------------------------------------------------------------------------------------------------


def test_every_class_and_every_sample_of_it_comes_equally_often():
    labels = torch.tensor([4, 0, 0, 4, 0, 0, 2, 0])  # classes 1 and 3 have no sample
    chosen = class_balanced(labels, 30_000, generator())
    times = torch.bincount(chosen, minlength=8).tolist()
    expected = [30_000 / 3 / int((labels == c).sum()) for c in labels.tolist()]
    assert all(abs(t - e) < 5 * math.sqrt(e) for t, e in zip(times, expected))
    assert chosen.dtype == torch.int64


# ---- crt and lws ---------------------------------------------------------------------------------------------------------


def sgd_by_hand(logits_of, start, x, y, seed_generator, epochs, lr, batch_size, weight_decay, momentum):
    """Momentum SGD with a cosine by epoch, on batches that class_balanced draws."""
    values, momenta = [v.clone() for v in start], None
    for epoch in range(epochs):
        rate = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for chosen in class_balanced(y, len(y), seed_generator).split(batch_size):
            leaves = [v.clone().requires_grad_() for v in values]
            grads = torch.autograd.grad(F.cross_entropy(logits_of(leaves, x[chosen]), y[chosen]), leaves)
            grads = [g + weight_decay * v for g, v in zip(grads, values)]
            momenta = grads if momenta is None else [momentum * m + g for m, g in zip(momenta, grads)]
            values = [v - rate * m for v, m in zip(values, momenta)]
    return values


HAND = dict(epochs=3, lr=0.2, batch_size=8, weight_decay=0.05, momentum=0.8)


def test_crt_is_momentum_sgd_on_balanced_batches():
    x, y = gaussians((15, 5, 2), seed=1)
    x = x.double()
    draws = generator(7)
    bound = 8**-0.5
    start = [torch.empty(size, dtype=torch.float64).uniform_(-bound, bound, generator=draws) for size in ((3, 8), (3,))]
    weight, bias = sgd_by_hand(lambda v, x: x @ v[0].T + v[1], start, x, y, draws, **HAND)
    layer = crt(x, y, 3, **HAND, seed=7)
    torch.testing.assert_close(layer.weight.detach(), weight)
    torch.testing.assert_close(layer.bias.detach(), bias)


@pytest.mark.parametrize("bias", [None, [0.3, -0.2, 0.1]], ids=["without bias", "bias"])
def test_lws_trains_a_factor_of_each_class(bias):
    x, y = gaussians((15, 5, 2), seed=1)
    x = x.double()
    layer = layer_of(torch.randn(3, 8, generator=generator(2), dtype=torch.float64), bias)
    before = copy.deepcopy(layer)
    start = [torch.ones(3, dtype=torch.float64)]
    (f,) = sgd_by_hand(lambda v, x: v[0] * layer(x), start, x, y, generator(7), **HAND)
    new = lws(layer, x, y, **HAND, seed=7)
    torch.testing.assert_close(new.weight.detach(), f.unsqueeze(1) * layer.weight.detach())
    assert (new.bias is None) == (bias is None)
    if bias is not None:
        torch.testing.assert_close(new.bias.detach(), f * layer.bias.detach())
    assert type(new) is torch.nn.Linear and not torch.allclose(f, torch.ones(3, dtype=torch.float64), atol=0.01)
    assert torch.equal(layer.weight, before.weight) and layer.weight.grad is None and layer.weight.requires_grad


def test_a_class_without_samples():
    x, y = gaussians((15, 5), seed=1)
    layer = crt(x, 2 * y, 4, **GIVEN)
    assert layer.weight.shape == (4, 8) and layer.weight.isfinite().all()


# ---- the stages by name --------------------------------------------------------------------------------------------------


# LWS cannot shift a logit. So it has classes that lie apart, and weights of which those of the rare class are too small.
@pytest.mark.parametrize("name, size, bias, gain", [("tau", 1.5, True, 0.4), ("crt", 1.5, True, 0.5), ("lws", 3.0, False, 0.12)])
@pytest.mark.parametrize("seed", range(3))
def test_the_recall_of_the_rare_class_rises(name, size, bias, gain, seed):
    x, y = gaussians((2000, 200, 20), seed, size)
    test_x, test_y = gaussians((2000,) * 3, seed + 100, size)
    plain = plainly_trained(x, y, bias)
    new = STAGES[name](plain, x, y, CONFIG, seed)
    before, after = recalls(plain, test_x, test_y), recalls(new, test_x, test_y)
    assert after[2] > before[2] + gain
    assert sum(after) > sum(before) + gain  # the other classes lose less


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_the_seed_alone_determines_a_stage(name, default):
    x, y = gaussians((60, 20, 5), 0)
    plain = layer_of(torch.randn(3, 8, generator=generator(1)), [0.1, 0.2, 0.3], torch.float32)
    here = torch.random.get_rng_state()
    kept = torch.get_default_dtype()
    one = STAGES[name](plain, x, y, CONFIG, 5)
    torch.set_default_dtype(default)
    try:
        with torch.no_grad():  # as a caller's evaluation may have it
            two, other = STAGES[name](plain, x, y, CONFIG, 5), STAGES[name](plain, x, y, CONFIG, 6)
    finally:
        torch.set_default_dtype(kept)
    assert torch.equal(torch.random.get_rng_state(), here)
    assert one.weight.dtype == two.weight.dtype == torch.float32
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.weight, other.weight) is (name == "tau")
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in two.parameters())


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_new_classifier_fits_where_the_old_one_was(name, dtype):
    x, y = gaussians((20, 5, 3), 0)
    plain = layer_of(torch.randn(3, 8, generator=generator(1)), [0.1, 0.2, 0.3], dtype)
    new = STAGES[name](plain, x.to(dtype), y.int(), CONFIG, 0)
    assert new(x.to(dtype)).dtype == dtype and new(x.to(dtype)).shape == (28, 3)


@pytest.mark.parametrize("name", STAGES)
def test_a_cosine_classifier_has_no_norms(name):
    x, y = gaussians((20, 5, 3), 0)
    cosine = ab.CosineClassifier(8, 3)
    if name == "crt":
        assert type(STAGES[name](cosine, x, y, CONFIG, 0)) is torch.nn.Linear
        return
    with pytest.raises(ValueError, match=f"stage {name}: got a CosineClassifier, expected an nn.Linear.*use crt") as caught:
        STAGES[name](cosine, x, y, CONFIG, 0)
    assert "\n" not in str(caught.value)


X, Y = torch.zeros(4, 2, dtype=torch.float32), torch.tensor([0, 1, 1, 2])


@pytest.mark.parametrize(
    "message, call",
    [
        (r"features \(4, 2, 1\) and labels \(4,\), expected \(n, d\)", lambda: crt(X.unsqueeze(2), Y, 3, **GIVEN)),
        (r"features \(4, 2\) and labels \(3,\)", lambda: crt(X, Y[:3], 3, **GIVEN)),
        (r"features \(0, 2\)", lambda: crt(X[:0], Y[:0], 3, **GIVEN)),
        (r"expected \(n, 5\)", lambda: lws(layer_of(torch.zeros(3, 5)), X, Y, **GIVEN)),
        ("labels from 0 to 2, expected 0 to 1, those of the 2 classes", lambda: crt(X, Y, 2, **GIVEN)),
        ("labels from -1 to 1", lambda: crt(X, Y - 1, 3, **GIVEN)),
        ("epochs: got 0", lambda: crt(X, Y, 3, **GIVEN | {"epochs": 0})),
        ("batch_size: got 0", lambda: crt(X, Y, 3, **GIVEN | {"batch_size": 0})),
        ("tau: got nan", lambda: tau_normalised(layer_of([[1.0]]), math.nan)),
    ],
)
def test_errors(message, call):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---- features ------------------------------------------------------------------------------------------------------------
