"""LinearABLoss on samples of any shape, such as the tokens (B, T) of a batch: as on the same samples in rows."""

import copy
import math

import pytest
import torch
from test_linear import BACKENDS, gradients, native
from torch.utils import checkpoint
from two_processes import RANKS, needs_gloo, run

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")
B, T, D, C, CHUNK = 4, 6, 5, 12, 7
SHAPES = {"rows": (B * T,), "tokens": (B, T), "images": (B, 2, 3), "none": (B, 0)}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def head():
    return draw(C, D, seed=1).requires_grad_(), draw(C, seed=2).requires_grad_()


def labels(shape):
    target = torch.arange(math.prod(shape)).mul(5).remainder(C)
    target[1::5] = -100
    return target.view(shape)


def strided(hidden, layout):
    """The same numbers in another layout."""
    if layout == "slice":  # as hidden[:, :-1] of a shift
        wide = torch.full((*hidden.shape[:-1], D + 3), math.nan, dtype=hidden.dtype)
        wide[..., 2 : D + 2] = hidden
        return wide[..., 2 : D + 2]
    if layout == "transposed" and hidden.dim() > 1:
        return hidden.transpose(0, -2).contiguous().transpose(0, -2)
    return hidden.flip(0).flip(0) if layout == "flipped" else hidden


def criterion(**options):
    return ab.LinearABLoss(**{"lam": -0.5, "chunk": CHUNK, **options}).double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "slice", "transposed"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_in_rows(shape, soft, layout, backend):
    """Value, gradients, state, and what belongs to samples; two steps, because the state moves."""
    shape, one, rows = SHAPES[shape], criterion(backend=backend), criterion(backend=backend)
    n = math.prod(shape)
    weight, bias = head()
    for seed in range(2):
        hidden = draw(*shape, D, seed=seed)
        target = draw(*shape, C, seed=3).softmax(-1).requires_grad_() if soft else labels(shape)
        each = dict(sample_weight=draw(*shape, seed=4).abs().requires_grad_(), mask=draw(*shape, seed=5) > -1, score=draw(*shape))
        leaf = strided(hidden, layout).detach().requires_grad_()
        loss = one(leaf, weight, target, bias, **each)
        flat = {name: t.detach().reshape(n).requires_grad_(t.requires_grad) for name, t in each.items()}
        row_leaf = hidden.reshape(n, D).requires_grad_()
        row_target = target.detach().reshape(n, *target.shape[len(shape) :]).requires_grad_(soft)
        wanted = rows(row_leaf, weight, row_target, bias, **flat)
        torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)
        got = gradients(loss, [leaf, weight, bias, each["sample_weight"], *([target] * soft)])
        truth = gradients(wanted, [row_leaf, weight, bias, flat["sample_weight"], *([row_target] * soft)])
        assert got[0].shape == leaf.shape and got[3].shape == shape
        for a, b in zip(got, truth, strict=True):
            torch.testing.assert_close(a, b.view(a.shape), rtol=1e-12, atol=1e-14)
        for name in ("losses", "weights"):
            assert getattr(one.last, name).shape == shape
            torch.testing.assert_close(getattr(one.last, name), getattr(rows.last, name).view(shape), rtol=1e-13, atol=0)
        torch.testing.assert_close(one.log_s, rows.log_s, rtol=1e-13, atol=0)
        assert one.last.mean_loss == rows.last.mean_loss and one.last.ess.shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_stored_logits(backend):
    """As ABLoss on (B, C, T)."""
    hidden, (weight, bias), target = draw(B, T, D).requires_grad_(), head(), labels((B, T))
    one, two = criterion(backend=backend), ab.ABLoss(lam=-0.5).double()
    loss = one(hidden[:, :-1], weight, target[:, 1:], bias)
    wanted = two((hidden[:, :-1] @ weight.T + bias).transpose(1, 2), target[:, 1:])
    for a, b in zip(gradients(loss, [hidden, weight, bias]), gradients(wanted, [hidden, weight, bias]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(one.last.weights, two.last.weights, rtol=1e-12, atol=0)


@native
def test_no_copy_where_a_view_does():
    """The rows of contiguous hidden states are the hidden states themselves."""
    seen, hidden, (weight, _) = [], draw(B, T, D), head()
    one = criterion()
    forward = one._in_chunks
    one._in_chunks = lambda rows, *rest: seen.append(rows) or forward(rows, *rest)
    one(hidden, weight, labels((B, T)))
    assert seen[0].shape == (B * T, D) and seen[0].data_ptr() == hidden.data_ptr()


@native
def test_micro_batches():
    hidden, (weight, bias), target = draw(B, T, D).requires_grad_(), head(), labels((B, T))
    one = criterion(deferred=True)
    for part in (slice(0, 1), slice(1, B)):
        one(hidden[part], weight, target[part], bias).backward()
    assert one.finish_([hidden, weight, bias]) and one.last.weights.shape == (B - 1, T)
    wanted = gradients(criterion()(hidden, weight, target, bias), [hidden, weight, bias])
    for leaf, grad in zip((hidden, weight, bias), wanted, strict=True):
        torch.testing.assert_close(leaf.grad, grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation(backend):
    """Activation checkpointing recomputes the forward; the state moves once, and `last` is that of the first pass."""
    hidden, (weight, bias), target = draw(B, T, D).requires_grad_(), head(), labels((B, T))
    one, two = criterion(backend=backend), criterion(backend=backend)
    loss = checkpoint.checkpoint(one, hidden, weight, target, bias, use_reentrant=False)
    wanted = two(hidden, weight, target, bias)
    for a, b in zip(gradients(loss, [hidden, weight, bias]), gradients(wanted, [hidden, weight, bias]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.log_s, two.log_s) and torch.equal(one.last.losses, two.last.losses)


@native
def test_under_autocast():
    hidden, (weight, _), target = draw(B, T, D).float().requires_grad_(), head(), labels((B, T))
    one = ab.LinearABLoss(lam=-0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = one(hidden, weight.float(), target)
    assert one.last.losses.shape == (B, T) and torch.autograd.grad(loss, hidden)[0].dtype == torch.float32


@native
def test_compiled():
    hidden, (weight, bias), target = draw(B, T, D).requires_grad_(), head(), labels((B, T))
    one = criterion()
    wanted = copy.deepcopy(one)(hidden, weight, target, bias)
    got = torch.compile(lambda h: one(h, weight, target, bias), backend="eager")(hidden)
    assert torch.equal(got, wanted) and one.last.losses.shape == (B, T)


def test_a_forward_that_is_only_traced_leaves_nothing():
    from torch._subclasses import FakeTensorMode

    one = criterion(backend="reference").eval()
    one(draw(2, 3, D), draw(C, D), labels((2, 3)))
    before = one.last.losses
    with FakeTensorMode(allow_non_fake_inputs=True):
        one(
            torch.empty(6, 1, D, dtype=torch.float64),
            torch.empty(C, D, dtype=torch.float64),
            torch.zeros(6, 1, dtype=torch.int64),
        )
    assert torch.equal(one.last.losses.flatten(), before.flatten())


BAD = {
    "a shift that is forgotten": (
        dict(target=labels((B, T - 1))),
        r"target: got shape \(4, 5\) with hidden \(4, 6, 5\) and 12",
    ),
    "rows": (dict(target=labels((B * T,))), r"expected labels \(4, 6\), or probabilities \(4, 6, 12\)"),
    "classes in the middle": (dict(target=draw(B, C, T)), r"got shape \(4, 12, 6\) .* probabilities \(4, 6, 12\)"),
    "mask": (dict(mask=torch.ones(B * T, dtype=torch.bool)), r"mask: got shape \(24,\) .*expected .* shape \(4, 6\)"),
    "sample_weight": (dict(sample_weight=draw(B)), r"sample_weight: got shape \(4,\) .* shape \(4, 6\)"),
    "score": (dict(score=draw(B, T, 1)), r"score: got shape \(4, 6, 1\)"),
    "head": (
        dict(linear_weight=draw(C, D + 1)),
        r"hidden \(4, 6, 5\) and linear_weight \(12, 6\), expected \(n, d\) or \(\.\.\., d\), such as \(B, T, d\), and \(C, d\)",
    ),
    "one sample": (dict(hidden=torch.ones(D)), r"hidden \(5,\) and linear_weight \(12, 5\)"),
    "number": (dict(hidden=torch.tensor(1.0)), r"hidden \(\) and linear_weight \(12, 5\)"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BAD)
def test_bad_shapes(name, backend):
    wrong, message = BAD[name]
    one, given = criterion(backend=backend), dict(hidden=draw(B, T, D), linear_weight=draw(C, D), target=labels((B, T)))
    with pytest.raises(ValueError, match=message):
        one(**{**given, **wrong})
    assert one.log_s == -math.inf
    with pytest.raises(TypeError, match="target: got list, expected a tensor"):
        one(given["hidden"], given["linear_weight"], [1, 2])


def shards(rank):
    """A weight that FSDP2 holds in parts, outside of the forward in which it is whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    weight = distribute_tensor(draw(C, D), init_device_mesh("cpu", (RANKS,)), [Shard(0)])
    with pytest.raises(TypeError, match=r"linear_weight: got a DTensor, .* causal_lm_loss .* \.full_tensor\(\)"):
        criterion()(draw(B, T, D), weight, labels((B, T)))
    criterion()(draw(B, T, D), weight.full_tensor(), labels((B, T)))


@needs_gloo
def test_a_part_of_a_weight(tmp_path):
    run(shards, tmp_path)
