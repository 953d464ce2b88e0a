"""ignore_index= of ABLoss: rows of a user's criterion that do not count, as those with mask=False."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from deferred_cases import same
from torch import nn

import absgd_fast as ab

IGNORED, ROWS, CLASSES = -100, 8, 4
NAN = math.nan
per_row = partial(F.cross_entropy, reduction="none")


class Own(nn.Module):
    """A loss of the labels that come last."""

    ignore_index = IGNORED

    def forward(self, x, factor, y):
        return per_row(x, y) * factor


def linear(hidden, y):
    """torch's loss of a linear head, where it has one."""
    weight = torch.eye(CLASSES, dtype=hidden.dtype)
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(hidden, weight, y, reduction="none")
    return per_row(hidden @ weight.T, y)


# criterion -> (the criterion, whether ABLoss must be told, the arguments of a call)
CRITERIA = {
    "function": (per_row, True, lambda x, y: (x, y)),
    "linear head": (linear, True, lambda x, y: (x, y)),
    "integers before the labels": (lambda x, groups, y: per_row(x, y), True, lambda x, y: (x, torch.full_like(y, IGNORED), y)),
    "a mask behind the labels": (lambda x, y, which: per_row(x, y), True, lambda x, y: (x, y, torch.zeros_like(y).bool())),
    "NLLLoss": (nn.NLLLoss(reduction="none"), False, lambda x, y: (x.log_softmax(1), y)),
    "module": (Own(), False, lambda x, y: (x, torch.ones(y.shape, dtype=x.dtype), y)),
}


def batch(shape=(ROWS,), dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape[0], CLASSES, *shape[1:], generator=draw, dtype=dtype).requires_grad_()
    y = torch.randint(CLASSES, shape, generator=draw)
    y[1] = y[6] = IGNORED
    return x, y


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize(
    "options",
    [dict(lam=0.5), dict(lam=-0.5, mix=0.5), dict(lam=0.5, deferred=True), dict(rule=partial(ab.weights.cvar, beta=0.3))],
)
def test_as_without_these_rows(one_backend, name, options):
    """Value, gradient, state and weights are those of the batch without the rows, alone and together with mask=."""
    criterion, told, arguments = CRITERIA[name]
    told = {"ignore_index": IGNORED} if told else {}
    x, y = batch()
    for mask in (None, torch.arange(ROWS) != 3):
        ours = ab.ABLoss(criterion, backend=one_backend, report="mean", **told, **options).double()
        plain = ab.ABLoss(criterion, backend=one_backend, report="mean", **options).double()
        kept = y != IGNORED if mask is None else (y != IGNORED) & mask
        for _ in range(2):
            losses = ours(*arguments(x, y), mask=mask), plain(*arguments(x[kept], y[kept]))
            torch.testing.assert_close(*losses)
            torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in losses))
        torch.testing.assert_close(ours.log_s, plain.log_s)
        torch.testing.assert_close(ours.last.weights[kept], plain.last.weights)
        assert not ours.last.weights[~kept].any()


def test_as_the_fused_loss(one_backend):
    """Pixels too: what ABLoss gives with its own cross-entropy."""
    x, y = batch((ROWS, 3, 2))
    ours = ab.ABLoss(per_row, lam=0.5, ignore_index=IGNORED, backend=one_backend).double()
    fused = ab.ABLoss(lam=0.5, backend=one_backend).double()
    losses = ours(x, y), fused(x, y)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in losses))


def test_what_these_rows_hold(one_backend):
    """Any loss, and NaN logits, as long as the criterion lets no gradient through."""
    x, y = batch()
    losses = per_row(x, y)
    good = ab.ABLoss(lambda losses, y: losses * 1, lam=0.5, ignore_index=IGNORED, backend=one_backend).double()
    bad = ab.ABLoss(
        lambda losses, y: losses.masked_fill(y == IGNORED, NAN), lam=0.5, ignore_index=IGNORED, backend=one_backend
    ).double()
    values = good(losses, y), bad(losses, y)
    assert torch.equal(*values)
    assert torch.equal(*(torch.autograd.grad(value, x, retain_graph=True)[0] for value in values))
    assert same(good.state_dict(), bad.state_dict())
    x.data[1] = NAN
    value = ab.ABLoss(per_row, lam=0.5, ignore_index=IGNORED, backend=one_backend).double()(x, y)
    assert torch.equal(value, values[0])


def test_without_being_told():
    """A function that ignores rows counts them as losses of 0: this is why the option is there."""
    x, y = batch()
    criterion = ab.ABLoss(per_row, lam=0.5).double()
    criterion(x, y)
    assert criterion.last.weights[1] > 0


def test_refused():
    """An index that is not the criterion's, one that is no integer, and labels that do not fit."""
    for criterion in (None, ab.GCE(), nn.CrossEntropyLoss(reduction="none"), nn.NLLLoss(reduction="none"), Own()):
        name = "CrossEntropy" if criterion is None else type(criterion).__name__
        expected = (
            rf"ignore_index: got 0, but the criterion {name} ignores the label -100; expected {name}\(..., ignore_index=0\)"
        )
        with pytest.raises(ValueError, match=expected):
            ab.ABLoss(criterion, lam=0.5, ignore_index=0)
        assert ab.ABLoss(criterion, lam=0.5, ignore_index=-100).ignore_index == -100
    for wrong in (1.5, "0", True):
        with pytest.raises(ValueError, match="ignore_index: got"):
            ab.ABLoss(per_row, lam=0.5, ignore_index=wrong)
    x, y = batch()
    by_row = ab.ABLoss(lambda x, y: per_row(x, y).reshape(2, -1).sum(1), lam=0.5, ignore_index=IGNORED)
    before = by_row.log_s.clone()
    with pytest.raises(ValueError, match=r"ignore_index: got -100, but arguments of shapes .*\(8, 4\), \(8,\).*losses, \(2,\)"):
        by_row(x, y)
    soft = ab.ABLoss(per_row, lam=0.5, ignore_index=IGNORED)
    with pytest.raises(ValueError, match="ignore_index: got -100, but arguments of shapes"):
        soft(x, x.softmax(1).detach())
    assert torch.equal(by_row.log_s, before)
    ab.ABLoss(Own(), lam=0.5)(x.float(), 1.0, F.one_hot(y.clamp(0), CLASSES).float())  # without labels its index means nothing
