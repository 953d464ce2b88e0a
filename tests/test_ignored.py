"""ignore_index= of ABLoss: rows of a user's criterion that do not count, as those with mask=False."""

import math
import warnings
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


class Flat(nn.CrossEntropyLoss):
    """A loss of tokens that returns one dimension."""

    def __init__(self):
        super().__init__(reduction="none")

    def forward(self, x, y):
        return super().forward(x.flatten(0, 1), y.flatten())


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
    "other integers": (lambda x, y, n: per_row(x, y), True, lambda x, y: (x, y, torch.full((1, 3), IGNORED))),
    "columns": (lambda x, y: per_row(x, y[:, 0]), True, lambda x, y: (x, y.unsqueeze(1))),
    "flattens": (lambda x, y: per_row(x.flatten(0, 1), y.flatten()), True, lambda x, y: (x.unsqueeze(0), y.unsqueeze(0))),
    "flattens, module": (Flat(), False, lambda x, y: (x.unsqueeze(1), y.unsqueeze(1))),
    "another order of the same number": (
        lambda x, y, other: per_row(x, y),
        True,
        lambda x, y: (x, y, torch.full((1, len(y)), IGNORED)),
    ),
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
    with pytest.warns(UserWarning, match="seems to ignore them"):
        criterion(x, y)
    assert criterion.last.weights[1] > 0


def test_refused():
    """An index that is not the criterion's, and one that is no integer."""
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


def reduced(x, y):
    return per_row(x, y).reshape(2, -1).sum(1)


class Reduced(nn.NLLLoss):
    forward = staticmethod(reduced)


class Many(Own):
    def forward(self, x, y, ids):
        return per_row(x, y)


# (the criterion, its arguments, whether the index is given, what the error says)
DOES_NOT_FIT = {
    "no labels of that number": (
        reduced,
        lambda x, y: (x, y),
        True,
        r"shapes \[\(8, 4\), \(8,\)\], of which none .*losses \(2,\)",
    ),
    "no labels of that number, module": (
        Reduced(),
        lambda x, y: (x, y),
        False,
        r"the criterion Reduced ignores the label -100, but .* of which none",
    ),
    "soft": (per_row, lambda x, y: (x, x.softmax(1).detach()), True, "of which none could be the labels"),
    "several": (lambda x, y, ids: per_row(x, y), lambda x, y: (x, y, torch.arange(ROWS)), True, "of which 2 could be the labels"),
    "several, module": (Many(), lambda x, y: (x, y, torch.arange(ROWS)), False, "the criterion Many ignores .* of which 2 could"),
    "several of another shape": (
        lambda x, y, ids: per_row(x, y[0]),
        lambda x, y: (x, y.view(1, -1), torch.arange(ROWS).view(2, 4)),
        True,
        "of which 2 could be",
    ),
}


@pytest.mark.parametrize("name", DOES_NOT_FIT)
def test_labels_that_do_not_fit(name):
    """Never silently counted; a mask instead is taken."""
    criterion, arguments, given, message = DOES_NOT_FIT[name]
    x, y = batch()
    ours = ab.ABLoss(criterion, lam=0.5, **({"ignore_index": IGNORED} if given else {})).double()
    before = ours.log_s.clone()
    instead = ", and no ignore_index" * given
    with pytest.raises(ValueError, match=rf"ignore_index: .*{message}.*mask=labels != -100{instead}$"):
        ours(*arguments(x, y))
    assert torch.equal(ours.log_s, before)
    losses = criterion(*arguments(x, y))
    mask = torch.arange(len(losses)) != 1
    value = ab.ABLoss(criterion, lam=0.5).double()(*arguments(x, y), mask=mask)
    torch.testing.assert_close(value, ab.ABLoss(lambda losses: losses * 1, lam=0.5).double()(losses, mask=mask))


def test_without_labels():
    """Soft targets: a module's own index means nothing."""
    x, y = batch()
    ab.ABLoss(Own(), lam=0.5)(x.float(), 1.0, F.one_hot(y.clamp(0), CLASSES).float())
    ab.ABLoss(Own(), lam=0.5)(x.float(), torch.tensor(1), F.one_hot(y.clamp(0), CLASSES).float())


# ---- a criterion that nobody said anything about ---------------------------------------------------------------------------


def of_logits(x, y):
    return F.cross_entropy(x, y, reduction="none")


@pytest.mark.parametrize("flat", [False, True], ids=["", "flattened"])
def test_rows_that_seem_to_be_ignored_warn_once(flat):
    """Losses of exactly 0 at negative labels, in the first training forward that has labels."""
    x, y = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[0, -100, 2], [-100, 1, 3]])
    loss_of = (lambda x, y: of_logits(x.flatten(0, 1), y.flatten())) if flat else lambda x, y: of_logits(x.mT, y)
    criterion = ab.ABLoss(loss_of, lam=0.5)
    with pytest.warns(UserWarning, match="exactly 0 for 2 of 6 labels.*ignore_index=-100") as found:
        criterion(x, y)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(x, y)


@pytest.mark.parametrize("how", ["no negative label", "told", "a mask", "evaluation", "a loss of 0 elsewhere"])
def test_no_warning(how):
    x, y = torch.randn(6, 4), torch.tensor([0, -100, 2, -100, 1, 3])
    criterion = ab.ABLoss(of_logits, lam=0.5, ignore_index=-100 if how == "told" else None)
    given = {"mask": y != -100} if how == "a mask" else {}
    if how in ("no negative label", "a loss of 0 elsewhere"):
        y = y.clamp(min=0)
    if how == "a loss of 0 elsewhere":
        x = torch.nn.functional.one_hot(y, 4) * 1e4
    criterion.train(how != "evaluation")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(x, y, **given)
