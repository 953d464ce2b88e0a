"""Activation checkpointing runs a forward twice: gradients and state are those of the run without it (MATH §1.4).

Every stateful thing of the package (SUBJECTS) goes through every way of checkpointing (WAYS). The wanted values come from the
same subject in the same order of forwards and backwards, without a checkpoint.
"""

import copy
import pickle
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts, set_checkpoint_early_stop

import absgd_fast as ab
from absgd_fast import _checkpointing, distributed

checkpoint = partial(torch_checkpoint.checkpoint, use_reentrant=False)
NAN = float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:.*in the middle of a deferred step")  # states are compared in every phase


# ---- what has a state ------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A user's rule whose weights depend on how often it was called, and on random numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, losses):
        self.calls += 1
        return (1 + self.calls) * torch.rand_like(losses)


class Head(nn.Module):
    """A `LinearABLoss` with its head, called as a criterion."""

    def __init__(self, **options):
        super().__init__()
        self.criterion, self.head = ab.LinearABLoss(lam=0.5, chunk=5, **options), nn.Linear(6, 6)

    def forward(self, x, y):
        return self.criterion(x, self.head.weight, y, self.head.bias)


class Standalone(nn.Module):
    """Group DRO without an `ABLoss`."""

    def __init__(self):
        super().__init__()
        self.rule = ab.weights.GroupDRO(3, eta=0.5)

    def forward(self, x, y):
        losses = F.cross_entropy(x, y, reduction="none")
        return (self.rule(losses, y % 3) * losses).mean()


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.criterion = ab.ABLoss(rule=ab.weights.GroupDRO(3, eta=0.5), max_weight=2.0)

    def forward(self, x, y):
        return self.criterion(x, y, groups=y % 3)


class Given(nn.Module):
    """Every argument that has one value per sample."""

    def __init__(self, **options):
        super().__init__()
        self.criterion = ab.ABLoss(lam=0.5, **options)

    def forward(self, x, y):
        score, sample_weight = torch.linspace(-1, 1, len(y)), torch.linspace(0.5, 2, len(y))
        return self.criterion(x, y, score=score, sample_weight=sample_weight, mask=y != 2)


def robust(criterion=None, **options):
    return partial(ab.ABLoss, criterion, **({"lam": 0.5} | options))


SUBJECTS = {
    "fused": robust(gamma=0.4),
    "small losses": robust(lam=-0.5, mix=0.3, max_weight=2.0),
    "plain torch": robust(backend="reference"),
    "init zero": robust(init="zero"),
    "without a normaliser": ab.DFT,
    "callable": robust(partial(F.cross_entropy, reduction="none")),
    "focal": robust(ab.Focal(2.0)),
    "arguments": Given,
    "relative lambda": robust(lam=ab.RelativeLam(0.5)),
    "relative lambda of a callable": robust(partial(F.cross_entropy, reduction="none"), lam=ab.RelativeLam(-0.5)),
    "target": robust(lam=ab.TargetESS(0.7), mix=0.3),
    "target of a callable": robust(partial(F.cross_entropy, reduction="none"), lam=ab.TargetESS(0.5, sign=-1)),
    "target in stages": robust(lam=ab.TargetESS(0.7), loss_divisor=2),
    "divided": robust(loss_divisor=2),
    "deferred": robust(deferred=True),
    "deferred, plain torch": robust(deferred=True, backend="reference"),
    "deferred arguments": partial(Given, deferred=True),
    "deferred relative lambda": robust(deferred=True, lam=ab.RelativeLam(0.5)),
    "term": partial(ab.ABLoss, rule=partial(ab.weights.term, t=0.7)),
    "group DRO": Grouped,
    "group DRO alone": Standalone,
    "random rule": partial(ab.ABLoss, rule=Counting()),
    "linear": Head,
    "linear, plain torch": partial(Head, backend="reference"),
    "linear, deferred": partial(Head, deferred=True),
}


# ---- ways of checkpointing ---------------------------------------------------------------------------------------------------


def twice(run, x, y):
    """A checkpoint inside a checkpoint, with a second forward of the same subject outside the inner one."""

    def outer(x):
        return checkpoint(run, x * 1.5, y) + run(x.sin(), y)

    return checkpoint(outer, x)


def mid_evaluation(run, x, y):
    """A forward that does not move the state, and whose recomputation comes after the next forward moved it."""
    return checkpoint(run, x, y, update=False) + checkpoint(run, x.sin(), y)


def selective(run, x, y):
    """The operators of losses and weights are not run again."""
    policy = lambda ctx, op, *args, **kwargs: (  # noqa: E731
        CheckpointPolicy.MUST_SAVE if op.namespace == "absgd_fast" else CheckpointPolicy.PREFER_RECOMPUTE
    )
    return checkpoint(run, x, y, context_fn=partial(create_selective_checkpoint_contexts, policy))


def other_hooks(run, x, y):
    """Hooks of somebody else around the checkpoint, and inside it."""

    def inner(x):
        with save_on_cpu():
            return run(x, y)

    with saved_tensors_hooks(lambda t: t, lambda t: t):
        return checkpoint(inner, x)


def only_other_hooks(run, x, y):
    with save_on_cpu():
        return run(x, y)


def late(way):
    """The recomputation runs to the end of the function."""

    def call(run, x, y):
        with set_checkpoint_early_stop(False):
            return way(run, x, y)

    return call


def as_nested(run, x, y):
    return run(x * 1.5, y) + run(x.sin(), y)


def as_evaluated(run, x, y):
    return run(x, y, update=False) + run(x.sin(), y)


def plainly(run, x, y):
    return run(x, y)


# way -> (with checkpoints, without)
WAYS = {
    "checkpoint": (lambda run, x, y: checkpoint(run, x, y), plainly),
    "late stop": (late(lambda run, x, y: checkpoint(run, x, y)), plainly),
    "nested": (twice, as_nested),
    "nested, late stop": (late(twice), as_nested),
    "other hooks": (other_hooks, plainly),
    "selective": (selective, plainly),
    "hooks without a checkpoint": (only_other_hooks, plainly),
}


def batches():
    draw = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(12, 6, generator=draw), torch.randint(6, (12,), generator=draw)) for scale in (1.0, 4.0, 2.0)]


def trained(make, way, order="in turn", spoilt=None):
    """The gradients of three batches, the state, and what `last` shows. order: of forwards and backwards."""
    torch.manual_seed(1)
    subject, layer = copy.deepcopy(make()), nn.Linear(6, 6)
    run = lambda x, y, **update: subject(layer(x), y, **update)  # noqa: E731
    gradients, open_losses = [], []
    for k, (x, y) in enumerate(batches()):
        x = x.clone()
        if k == spoilt:
            x[3, 2] = NAN
        leaf = x.requires_grad_()
        loss = way(run, leaf, y)
        if order == "in turn":
            loss.backward()
            if hasattr(subject, "deferred_step") and subject.deferred_step and k == 1:  # two micro-batches, then one
                subject.finish_([leaf, *layer.parameters()])
        else:
            open_losses.append(loss)
        gradients.append(leaf)
    if order == "backwards later":
        for loss in reversed(open_losses):
            loss.backward()
    elif order == "one backward":
        sum(open_losses).backward()
    elif order == "kept":
        for loss in open_losses:
            loss.backward(retain_graph=True)
            loss.backward()
    criterion = getattr(subject, "criterion", subject)
    seen = [criterion.last.losses, criterion.last.weights] if hasattr(criterion, "last") else []
    step = getattr(criterion, "deferred_step", None)
    counted = [] if step is None or step.partial_stats is None else [step.partial_stats]
    return [x.grad for x in gradients], [p.grad for p in layer.parameters()], list(subject.state_dict().values()), seen, counted


def assert_same(got, wanted):
    for ours, theirs in zip(got, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_gradients_and_state_are_those_without_a_checkpoint(subject, way):
    """Truth: the same calls without checkpoints, to the bit."""
    with_checkpoints, without = WAYS[way]
    assert_same(trained(SUBJECTS[subject], with_checkpoints), trained(SUBJECTS[subject], without))


@pytest.mark.parametrize("order", ["backwards later", "one backward", "kept"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_order_of_backwards(subject, order):
    """Several forwards before a backward, and two backwards of one graph."""
    checkpointed, plain = WAYS["nested" if order == "one backward" else "checkpoint"]
    assert_same(trained(SUBJECTS[subject], checkpointed, order), trained(SUBJECTS[subject], plain, order))


@pytest.mark.parametrize("subject", ["fused", "callable", "deferred", "divided", "linear"])
def test_forwards_that_do_not_move_the_state(subject):
    """Their recomputation comes after another forward has moved log s."""
    make = SUBJECTS[subject] if subject != "linear" else lambda: Updating()
    assert_same(trained(make, mid_evaluation, "backwards later"), trained(make, as_evaluated, "backwards later"))


class Updating(Head):
    def forward(self, x, y, update=True):
        return self.criterion(x, self.head.weight, y, self.head.bias, update=update)


@pytest.mark.parametrize("subject", ["fused", "plain torch", "callable", "relative lambda", "deferred", "group DRO", "linear"])
def test_a_nonfinite_batch_counts_once(subject):
    """nonfinite_batches is part of the state that is compared."""
    checkpointed, plain = WAYS["late stop"]
    assert_same(trained(SUBJECTS[subject], checkpointed, spoilt=1), trained(SUBJECTS[subject], plain, spoilt=1))


@pytest.mark.parametrize("subject", ["fused", "deferred", "group DRO", "group DRO alone", "random rule", "linear"])
def test_the_comparison_sees_a_state_that_moves_twice(subject, monkeypatch):
    """Without the replay the same comparison fails."""
    for module in (ab.robust.loss, ab.linear.loss, ab.weights.group_dro):
        monkeypatch.setattr(module, "hooks_are_active", lambda: False)
    checkpointed, plain = WAYS["late stop"]
    with pytest.raises((AssertionError, torch_checkpoint.CheckpointError)):  # the latter: the second pass takes another way
        assert_same(trained(SUBJECTS[subject], checkpointed), trained(SUBJECTS[subject], plain))


@pytest.mark.parametrize("deferred", [False, True])
def test_micro_batches_with_equal_values(deferred):
    """Records are told apart by their order, not by their values."""
    x, y = batches()[0]

    def gradient(way):
        criterion, leaf = ab.ABLoss(lam=0.5, deferred=deferred), x.clone().requires_grad_()
        losses = [way(criterion, leaf, y) for _ in range(4)]
        for loss in losses:
            loss.backward()
        if deferred:
            criterion.finish_(leaf)
        return [leaf.grad], [criterion.log_s]

    assert_same(gradient(WAYS["checkpoint"][0]), gradient(plainly))


def test_reentrant_checkpoints_move_the_state_once():
    """The first pass has no gradients, and the second moves the state, as a plain forward would."""
    reentrant = lambda run, x, y: torch_checkpoint.checkpoint(run, x, y, use_reentrant=True)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = trained(SUBJECTS["fused"], reentrant)
    gradients, of_layer, state, *_ = trained(SUBJECTS["fused"], plainly)
    assert_same(got[:3], (gradients, of_layer, state))


def test_a_reentrant_checkpoint_inside():
    """The outer first pass runs the criterion without gradients, and so does its recomputation."""

    def both(run, x, y):
        inner = partial(torch_checkpoint.checkpoint, run, use_reentrant=True)
        return checkpoint(lambda x: inner(x * 1, y), x)

    assert_same(trained(SUBJECTS["fused"], both)[:3], trained(SUBJECTS["fused"], plainly)[:3])


# ---- compiled ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", ["fused", "plain torch", "callable", "deferred", "group DRO alone", "linear"])
@pytest.mark.parametrize("place", ["inside", "outside"])
def test_compiled(subject, place):
    """torch.compile around the function that makes the checkpoint, and around the function that it runs."""
    torch._dynamo.reset()
    compiled = partial(torch.compile, backend="aot_eager")

    def inside(run, x, y):
        return compiled(lambda x: checkpoint(run, x, y))(x)

    def outside(run, x, y):
        return checkpoint(compiled(run), x, y)

    got = trained(SUBJECTS[subject], dict(inside=inside, outside=outside)[place])
    for ours, theirs in zip(got[:3], trained(SUBJECTS[subject], plainly)[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


# ---- the records -------------------------------------------------------------------------------------------------------------


def test_records_die_with_the_graph():
    criterion, (x, y) = ab.ABLoss(lam=0.5), batches()[0]
    loss = checkpoint(criterion, x.requires_grad_(), y)
    assert len(criterion.replays._of_frame) == 1
    loss.backward()
    del loss
    assert not criterion.replays._of_frame and not criterion.replays._read


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_criterion_is_copied_while_a_graph_is_open(copied):
    criterion, (x, y) = ab.ABLoss(lam=0.5, rule=None), batches()[0]
    loss = checkpoint(criterion, x.requires_grad_(), y)
    other = copied(criterion)
    checkpoint(other, x.detach().requires_grad_(), y).backward()
    loss.backward()
    assert other.log_s.isfinite()


@pytest.mark.parametrize("subject", ["fused", "linear", "group DRO alone"])
def test_a_forward_that_the_first_pass_did_not_run(subject):
    """A recomputation that calls the module once more than the first pass."""
    torch.manual_seed(1)
    subject, (x, y) = SUBJECTS[subject](), batches()[0]
    passes = []

    def uneven(x):
        passes.append(None)
        loss = subject(x * 1, y)
        if len(passes) > 1:
            with torch.no_grad():  # nothing is saved, so only the module can notice
                subject(x, y)
        return loss.exp()

    with set_checkpoint_early_stop(False), pytest.raises(RuntimeError, match="the first pass did not run in this way"):
        checkpoint(uneven, x.requires_grad_()).backward()


@pytest.mark.parametrize("moved", ["frame", "hook"])
def test_a_torch_that_keeps_its_frames_elsewhere(moved, monkeypatch):
    """It is an error, and the state does not move."""
    criterion, (x, y) = ab.ABLoss(lam=0.5), batches()[0]
    if moved == "frame":
        monkeypatch.setattr(
            _checkpointing, "checkpoint", SimpleNamespace(__name__=torch_checkpoint.__name__, _CheckpointFrame=int)
        )
        call = lambda: checkpoint(criterion, x.requires_grad_(), y)  # noqa: E731
    else:

        def call():
            pack = lambda t: t  # noqa: E731
            pack.__module__ = torch_checkpoint.__name__
            with saved_tensors_hooks(pack, lambda t: t):
                return criterion(x, y)

    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        call()
    assert criterion.log_s == -torch.inf and not torch._C._autograd._top_saved_tensors_default_hooks(True)


def test_hooks_are_put_back_in_order():
    """Looking at the stack of hooks takes them off; afterwards they serve as before."""
    seen = []
    criterion, (x, y) = ab.ABLoss(lam=0.5), batches()[0]
    hooks = lambda name: saved_tensors_hooks(lambda t: seen.append(name) or t, lambda t: t)  # noqa: E731
    with hooks("outer"):
        with hooks("inner"):
            criterion(x.requires_grad_(), y)
        assert set(seen) == {"inner"}
        criterion(x, y)
    assert set(seen) == {"inner", "outer"}
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_a_label_out_of_range_in_a_checkpoint():
    """The forward that raised is run again in its place, so the next one finds its own record."""
    make = robust(backend="reference")  # on a GPU a later call raises
    wanted = trained(make, plainly)

    def patient(run, x, y):
        def call(x):
            try:
                run(x, y + 7)
            except IndexError:
                return run(x, y)

        return checkpoint(call, x)

    assert_same(trained(make, patient)[:3], wanted[:3])


# ---- several processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"deferred": True}, {"loss_divisor": 3}, {"lam": ab.RelativeLam(0.5)}], ids=str)
@pytest.mark.parametrize("make", [ab.ABLoss, ab.LinearABLoss])
def test_a_recomputation_exchanges_nothing(make, options, monkeypatch):
    """A second process that sends the same statistics is simulated; test_distributed.py runs two real ones."""
    exchanges = []
    monkeypatch.setattr(distributed, "ranks", lambda group, before=1: 2)
    monkeypatch.setattr(distributed, "exchange", lambda row, group, count: exchanges.append(1) or torch.stack([row, row]))

    def gradients(way):
        criterion, head = make(**({"lam": 0.5} | options), process_group="auto"), torch.eye(6)
        monkeypatch.setattr(criterion._shared, "takes_part", lambda: True)
        run = criterion if make is ab.ABLoss else (lambda x, y: criterion(x, head, y))
        leaves = [x.requires_grad_() for x, _ in batches()]
        for leaf, (_, y) in zip(leaves, batches()):
            way(lambda x, y: run(x * 1, y), leaf, y).backward()
        return [leaf.grad for leaf in leaves], list(criterion.state_dict().values())

    wanted = gradients(plainly)
    plain_count = len(exchanges)
    exchanges.clear()
    assert_same(gradients(WAYS["late stop"][0]), wanted)
    assert len(exchanges) == plain_count > 0


@pytest.mark.parametrize("hooks", [(torch.Tensor.detach, torch.Tensor.detach), (torch.Tensor.numpy, torch.from_numpy)])
def test_hooks_that_are_no_functions(hooks):
    """Methods of built-in types have neither a module nor a closure."""
    x, y = batches()[0]
    leaf, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    with saved_tensors_hooks(*hooks):
        loss = ab.ABLoss(lam=0.5)(leaf * 1, y)
    loss.backward()
    ab.ABLoss(lam=0.5)(wanted * 1, y).backward()
    torch.testing.assert_close(leaf.grad, wanted.grad, rtol=0, atol=0)
