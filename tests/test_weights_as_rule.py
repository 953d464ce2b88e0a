"""TERM, CVaR, chi-squared and group DRO as ABLoss(rule=...): the loss, its gradient and its state."""

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import identity
from weights_cases import (
    G3,
    INF,
    L3,
    NAN,
    GroupDRO,
    chi2,
    close,
    cvar,
    tensor,
    term,
    way,  # noqa: F401 (a fixture)
)

import absgd_fast as ab
from absgd_fast import weights

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- ABLoss(rule=...) -------------------------------------------------------------------------------------------------


def p_and_n(logits, target):
    n = F.cross_entropy(logits, target, reduction="none")
    return torch.exp(-n), n


def focal(logits, target):
    p, n = p_and_n(logits, target)
    return (1 - p) ** 2 * n


def gce(logits, target):
    p, _ = p_and_n(logits, target)
    return torch.where(target == -100, 0, (1 - p**0.7) / 0.7)


ce = partial(F.cross_entropy, reduction="none")
CRITERIA = {
    "ce": (ab.CrossEntropy, ce),
    "focal": (ab.Focal, focal),
    "gce": (ab.GCE, gce),
    "torch": (lambda backend: torch.nn.CrossEntropyLoss(reduction="none"), ce),
    "callable": (lambda backend: lambda x, y: gce(x, y).square(), lambda x, y: gce(x, y).square()),
}
# as ABLoss gets it; what W must be, from (losses, groups) of the valid rows; takes groups
PLUGGED = {
    "cvar": (lambda: partial(weights.cvar, beta=0.4), lambda x, g: cvar(x, 0.4), False),
    "cvar-kl": (lambda: partial(weights.cvar, beta=0.4, reg=0.2), lambda x, g: cvar(x, 0.4, 0.2), False),
    "chi2": (lambda: partial(weights.chi2, rho=0.3), lambda x, g: chi2(x, 0.3), False),
    "term": (lambda: partial(weights.term, t=2.0), lambda x, g: term(x, 2.0), False),
    "hierarchical": (lambda: partial(weights.term, t=1.5, t_group=-2.3), lambda x, g: term(x, 1.5, g, -2.3), True),
    "group-dro": (lambda: weights.GroupDRO(3, 0.5), lambda x, g: GroupDRO(3, 0.5)(x, g), True),
    "lambda": (lambda: lambda losses: losses / losses.mean(), lambda x, g: x / x.mean(), False),  # its graph does not count
    "lambda-groups": (lambda: lambda losses, groups: losses * groups / losses.sum(), lambda x, g: x * g / x.sum(), True),
}


def formula(eager, logits, target, exact, *, valid, groups, sample_weight=None, score=None, mix=0.0):
    """(1/n) sum sample_weight (W + mix) L over the valid rows, and W."""
    losses = eager(logits, target)
    seen = losses.detach() if score is None else score
    w = torch.zeros(losses.shape, dtype=torch.float64)
    w[valid] = tensor(exact(seen[valid].numpy(), groups[valid].numpy()))
    terms = (w + mix) * losses * (1 if sample_weight is None else sample_weight)
    return terms[valid].sum() / valid.sum(), w, losses.detach()


@pytest.mark.parametrize("inner", CRITERIA)
@pytest.mark.parametrize("plugged", PLUGGED)
@pytest.mark.parametrize("extras", [("sample_weight", "mix"), ("score", "mask")], ids=",".join)
def test_loss_and_gradient_of_a_rule(one_backend, inner, plugged, extras, rng):
    """autograd of the formula, W a constant of the slow versions; (7, 4, 3) logits, some labels ignored, through a layer."""
    layer = torch.nn.Linear(6, 12).double()
    x, target = torch.tensor(rng.normal(size=(7, 6))), torch.tensor(rng.integers(0, 4, (7, 3)))
    groups = torch.tensor(rng.integers(0, 3, (7, 3)))
    (make, eager), (rule, exact, grouped) = CRITERIA[inner], PLUGGED[plugged]
    more = {k: torch.tensor(rng.random((7, 3)) + 0.1) for k in ("sample_weight", "score") if k in extras}
    valid = torch.ones(7, 3, dtype=torch.bool)
    call = dict(more)
    if "mask" in extras:
        call["mask"] = valid = tensor(rng.random((7, 3)) < 0.7)
    if inner != "callable":  # which does not say what it ignores
        target[2, 1] = target[5, 0] = -100
        valid = valid & (target != -100)
    mix = 0.3 if "mix" in extras else 0.0
    criterion = ab.ABLoss(make(backend=one_backend), rule=rule(), mix=mix, backend=one_backend).double()
    value = criterion(layer(x).view(7, 4, 3), target, **call, **({"groups": groups} if grouped else {}))
    grads = torch.autograd.grad(value, layer.parameters())
    wanted, w, losses = formula(eager, layer(x).view(7, 4, 3), target, exact, valid=valid, groups=groups, mix=mix, **more)
    assert value.shape == () and value.item() == pytest.approx(wanted.item(), rel=1e-10)
    torch.testing.assert_close(grads, torch.autograd.grad(wanted, layer.parameters()), rtol=1e-9, atol=1e-12)
    last = criterion.last
    assert last.weights.shape == last.losses.shape == (7, 3)
    close(last.weights, w.numpy())
    close(last.losses[valid], losses[valid].numpy())
    assert float(last.ess) == pytest.approx(float(w.sum() ** 2 / (w**2).sum()), rel=1e-10)
    assert float(last.mean_loss) == pytest.approx(float(losses[valid].mean()), rel=1e-10)
    assert float(criterion.objective) == pytest.approx(float((w * losses)[valid].mean()), rel=1e-10)


def test_term_as_a_rule_in_double_precision(one_backend, rng):
    """1/1.5 is no float32: a rule in float64 is float64 throughout, as every other rule."""
    losses = tensor(rng.exponential(1.0, 9))
    criterion = ab.ABLoss(identity, rule=partial(weights.term, t=1.5), backend=one_backend).double()
    criterion(losses)
    close(criterion.last.weights, term(losses.numpy(), 1.5))


@pytest.mark.parametrize("t", [2.0, -0.7])
def test_term_as_a_rule_is_abloss_of_the_batch(one_backend, t, rng):
    """t = 1/lam, normalizer="batch"; float64 and the float32 of every day."""
    for dtype, rel in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        logits = tensor(rng.normal(0, 2, (9, 4))).to(dtype).requires_grad_()
        target = torch.tensor([0, 1, 2, 3, -100, 1, 2, 0, 0])
        results = []
        for rule in (dict(rule=partial(weights.term, t=t)), dict(lam=1 / t, normalizer="batch")):
            criterion = ab.ABLoss(ab.CrossEntropy(backend=one_backend), backend=one_backend, **rule)
            criterion = criterion.double() if dtype == torch.float64 else criterion
            value = criterion(logits, target)
            assert value.dtype == dtype
            results.append((value.detach(), *torch.autograd.grad(value, logits), criterion.last.weights))
        torch.testing.assert_close(*results, rtol=rel, atol=rel)


def test_a_rule_without_mask_sees_the_valid_rows_alone(one_backend):
    """Of losses and of groups; all of them where none is ignored; W comes back to its place."""
    seen = []

    def rule(losses, groups):
        seen.append((losses.flatten().tolist(), groups.flatten().tolist()))
        return losses * 2

    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    groups = torch.arange(6).view(2, 3)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    criterion = ab.ABLoss(identity, rule=rule, backend=one_backend)
    criterion(losses, groups=groups, mask=mask).backward()
    assert seen.pop() == ([1, 3, 5, 6], [0, 2, 4, 5])
    assert criterion.last.weights.tolist() == [[2, 0, 6], [0, 10, 12]]
    assert torch.equal(losses.grad, criterion.last.weights / 4)  # a constant: not 2 L / n more
    criterion(losses, groups=groups)
    assert seen.pop() == ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5])


def test_largest_weight(one_backend, rng):
    """max_weight bounds W of a rule as any other; sample_weight comes after it."""
    losses = tensor(rng.exponential(1.0, 12), requires_grad=True)
    for rule, exact, _ in (PLUGGED["term"], PLUGGED["cvar"], PLUGGED["chi2"]):
        criterion = ab.ABLoss(identity, rule=rule(), max_weight=1.2, backend=one_backend).double()
        value = criterion(losses, sample_weight=torch.full((12,), 3.0, dtype=torch.float64))
        free = exact(losses.detach().numpy(), None)
        assert free.max() > 1.2  # otherwise nothing is bounded
        (grad,) = torch.autograd.grad(value, losses)
        close(criterion.last.weights, np.minimum(free, 1.2), 1e-7)  # 1.2 may have been a float32
        close(grad, 3 * np.minimum(free, 1.2) / 12, 1e-7)


def test_low_precision(one_backend, rng):
    """bf16 logits, float32 loss and weights, the gradient in the dtype of the logits; cast modules keep a float32 state."""
    logits, target = tensor(rng.normal(size=(8, 4))), torch.arange(8) % 4
    groups = torch.arange(8) % 3
    for dtype, cast in ((torch.bfloat16, "bfloat16"), (torch.float16, "half")):
        criterion = getattr(ab.ABLoss(ab.CrossEntropy(), rule=weights.GroupDRO(3, 0.5), backend=one_backend), cast)()
        assert criterion.rule.log_q.dtype == torch.float32
        x = logits.to(dtype).requires_grad_()
        value = criterion(x, target, groups=groups)
        value.backward()
        assert value.dtype == criterion.last.weights.dtype == torch.float32 and x.grad.dtype == dtype
        w = GroupDRO(3, 0.5)(ce(x.detach().double(), target).numpy(), groups.numpy())
        close(criterion.last.weights, w, 1e-5)


def test_upstream_gradient(one_backend, rng):
    """An AMP scaler multiplies the loss by a power of two: the gradient with it, exactly."""
    grads = []
    for scale in (1.0, 1024.0):
        x = tensor(np.linspace(-1, 1, 24).reshape(6, 4), requires_grad=True)
        criterion = ab.ABLoss(ab.Focal(backend=one_backend), rule=partial(weights.chi2, rho=0.2), backend=one_backend)
        (criterion(x, torch.arange(6) % 4) * scale).backward()
        grads.append(x.grad / scale)
    assert torch.equal(*grads) and grads[0].abs().max() > 0


# ---- ABLoss(rule=GroupDRO): the state ---------------------------------------------------------------------------------


def dro(backend=None, criterion=identity):
    return ab.ABLoss(criterion, rule=weights.GroupDRO(3, 0.5), backend=backend)


def test_training_moves_q_as_the_rule_alone(one_backend, rng):
    """Six steps with ignored rows, whose group may be any number."""
    criterion, exact = dro(one_backend, ab.CrossEntropy(backend=one_backend)).double(), GroupDRO(3, 0.5)
    for _ in range(6):
        logits, target = tensor(rng.normal(0, 2, (8, 4))), tensor(rng.integers(0, 4, 8))
        groups = tensor(rng.integers(0, 3, 8))
        groups[3], target[3] = -7, -100
        criterion(logits.requires_grad_(), target, groups=groups).backward()
        kept = target != -100
        w = exact(ce(logits.detach(), target)[kept].numpy(), groups[kept].numpy())
        close(criterion.last.weights[kept], w)
        close(criterion.rule.q, exact.q)


def test_when_the_criterion_moves_q(one_backend):
    criterion, losses, groups = dro(one_backend), torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1])
    start = criterion.rule.log_q.clone()
    value = criterion(losses, groups=groups, update=False)
    with torch.no_grad():
        assert torch.equal(criterion(losses, groups=groups), value)
    assert torch.equal(criterion.eval()(losses, groups=groups), value)
    assert torch.equal(criterion.rule.log_q, start)
    assert torch.equal(criterion.train()(losses, groups=groups), value)
    assert not torch.equal(criterion.rule.log_q, start)


def test_state_dict_has_q(one_backend):
    """A resumed run goes on with the same weights; nothing else than q could say so."""
    losses, groups = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 1, 1])
    criterion, resumed = dro(one_backend), dro(one_backend)
    criterion(losses, groups=groups)
    assert not torch.equal(resumed(losses, groups=groups, update=False), criterion(losses, groups=groups, update=False))
    resumed.load_state_dict(criterion.state_dict())
    copies = [resumed, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    wanted = criterion(losses, groups=groups)
    for other in copies:
        assert torch.equal(other(losses, groups=groups), wanted)
        assert torch.equal(other.rule.log_q, criterion.rule.log_q)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("plugged", ["cvar", "chi2", "term", "hierarchical", "group-dro"])
def test_a_bad_loss(one_backend, plugged, bad):
    """Non-finite value, counted, q as it was; the bad row's gradient is not finite, the others are those without it."""
    make, exact, grouped = PLUGGED[plugged]
    criterion = ab.ABLoss(identity, rule=make(), backend=one_backend).double()
    losses = torch.tensor([1.0, bad, 4.0, 2.0], dtype=torch.float64, requires_grad=True)
    groups, rest = torch.tensor([0, 0, 1, 2]), [0, 2, 3]
    more = {"groups": groups} if grouped else {}
    value = criterion(losses, **more)
    value.backward()
    assert not math.isfinite(value.detach()) and int(criterion.nonfinite_batches) == 1
    w = exact(losses.detach()[rest].numpy(), groups[rest].numpy())
    assert math.isnan(criterion.last.weights[1]) and not math.isfinite(losses.grad[1])
    close(criterion.last.weights[rest], w)
    close(losses.grad[rest], w / 3)
    if plugged == "group-dro":
        close(criterion.rule.q, [1 / 3] * 3, 1e-7)  # cast after it was made
    # masked it is no bad batch
    value = criterion(losses, mask=torch.tensor([True, False, True, True]), **more).detach()
    assert float(value) == pytest.approx((w * losses.detach()[rest].numpy()).mean(), rel=1e-10)
    assert int(criterion.nonfinite_batches) == 1


@pytest.mark.parametrize("losses, score", [([1.0, NAN], [1.0, 2.0]), ([1.0, 2.0], [1.0, NAN])], ids=["loss", "score"])
def test_a_bad_loss_or_score(one_backend, losses, score):
    """The rule sees the scores alone, and yet a NaN loss leaves q as it was and is counted; so does and is a NaN score, as
    beside lam."""
    score = torch.tensor(score)
    for criterion, more in ((dro(one_backend), {"groups": torch.tensor([0, 1])}), (ab.ABLoss(identity, lam=1.0), {})):
        state = [b for b in criterion.state_dict().values() if b.is_floating_point()]
        value = criterion(torch.tensor(losses), score=score, **more)
        assert not math.isfinite(value) and int(criterion.nonfinite_batches) == 1
        assert all(
            torch.equal(a, b) for a, b in zip(state, (b for b in criterion.state_dict().values() if b.is_floating_point()))
        )


@pytest.mark.parametrize("plugged", PLUGGED)
def test_a_batch_of_nothing(one_backend, plugged):
    """Empty or all ignored: loss 0, gradient 0, no bad batch."""
    make, _, grouped = PLUGGED[plugged]
    for n, mask in ((0, None), (3, torch.zeros(3, dtype=torch.bool))):
        criterion = ab.ABLoss(ab.CrossEntropy(backend=one_backend), rule=make(), backend=one_backend)
        logits = torch.ones(n, 4, requires_grad=True)
        target = torch.zeros(n, dtype=torch.int64)
        value = criterion(logits, target, mask=mask, **({"groups": target} if grouped else {}))
        value.backward()
        assert value == 0 and (logits.grad == 0).all() and int(criterion.nonfinite_batches) == 0
        assert criterion.last.weights.tolist() == [0] * n


# ---- ABLoss(rule=...): what cannot be ---------------------------------------------------------------------------------

PLAIN = partial(weights.cvar, beta=0.5)


@pytest.mark.parametrize(
    "options, names",
    [
        (dict(lam=0.5), "lam"),
        (dict(lam=ab.RelativeLam(-0.5)), "lam"),
        (dict(deferred=True), "deferred"),
        (dict(loss_divisor=2), "loss_divisor"),
        (dict(process_group=object()), "process_group"),
        (dict(gamma=0.5), "gamma"),
        (dict(alpha=0.5), "alpha"),
        (dict(init="zero"), "init"),
        (dict(normalizer="batch"), "normalizer"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_options_that_contradict_a_rule(options, names):
    with pytest.raises(ValueError, match=names):
        ab.ABLoss(rule=PLAIN, **options)


def test_a_rule_has_no_lam():
    criterion = ab.ABLoss(rule=PLAIN)
    with pytest.raises((ValueError, RuntimeError, TypeError), match="rule"):
        criterion.set_lam(0.5)
    with pytest.raises((ValueError, TypeError), match="lam"):
        ab.ABLoss()


@pytest.mark.parametrize(
    "rule, words",
    [
        (weights.cvar, r"rule: cvar needs beta, .*; bind it: functools\.partial\(rule, beta=\.\.\.\)"),
        (partial(weights.cvar, reg=0.1), r"rule: cvar\(reg=0\.1\) needs beta"),
        (lambda losses, a, *, b, groups, mask=None, c=0: losses, r"needs a and b.*bind them.*a=\.\.\., b=\.\.\."),
    ],
    ids=["unbound", "partly-bound", "several"],
)
def test_a_rule_that_needs_more_than_the_losses(rule, words):
    with pytest.raises(TypeError, match=words):
        ab.ABLoss(rule=rule)


def test_a_rule_that_needs_groups(one_backend):
    for rule in (weights.GroupDRO(2), partial(weights.GroupDRO(2)), torch.compile(weights.GroupDRO(2), backend="eager")):
        with pytest.raises(ValueError, match="groups: got none, but the rule .* needs them; pass groups= to"):
            ab.ABLoss(lambda x: x, rule=rule)(torch.rand(3))


def test_groups_for_a_rule_that_takes_none(one_backend):
    for rule in (PLAIN, partial(weights.chi2, rho=0.1), lambda losses: losses):
        with pytest.raises(ValueError, match="groups"):
            ab.ABLoss(identity, rule=rule, backend=one_backend)(L3, groups=G3)
    with pytest.raises(ValueError, match="groups"):  # nor without any rule
        ab.ABLoss(identity, lam=1.0, backend=one_backend)(L3, groups=G3)


@pytest.mark.parametrize("wrong", [lambda x: x[:2], lambda x: x.mean(), lambda x: x.unsqueeze(1)], ids=["short", "0-d", "column"])
def test_a_rule_that_returns_another_shape(one_backend, wrong):
    with pytest.raises(ValueError, match="rule|shape"):
        ab.ABLoss(identity, rule=wrong, backend=one_backend)(L3)


@pytest.mark.parametrize("name", ["groups", "mask", "score", "sample_weight"])
def test_arguments_of_another_shape(one_backend, name):
    """An error leaves q as it was."""
    criterion = dro(one_backend)
    start = criterion.rule.log_q.clone()
    given = {"groups": G3, name: torch.ones(2, dtype={"groups": torch.int64, "mask": torch.bool}.get(name, torch.float32))}
    with pytest.raises(ValueError, match=name):
        criterion(L3, **given)
    assert torch.equal(criterion.rule.log_q, start) and int(criterion.nonfinite_batches) == 0
