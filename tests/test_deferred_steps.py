"""What surrounds a deferred step: evaluation, checkpoints, copies, several optimizers, closures, schedules, torch.compile."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import identity
from deferred_cases import (
    NAN,
    SIZES,
    SPOILS,
    Run,
    assert_alike,
    batch,
    distance,
    gradient,
    micro,
    network,
    same,
    snapshot,
    vector,
)
from torch import nn

import absgd_fast as ab
from absgd_fast import _backend

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what surrounds a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-finish"])
def test_robust_leaves_the_gradients_and_finish_scales_them(one_backend, way):
    run = Run(way, backend=one_backend)
    run.accumulate(*batch(0))
    raw = gradient(run.net).clone()
    run.settle()
    finished = gradient(run.net).clone()
    run.optimizer.step()
    assert torch.equal(gradient(run.net), raw if run.how == "robust" else finished)
    assert (distance(finished, raw) > 0.5) == (run.how == "finish")


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode", "update=False"])
@pytest.mark.parametrize("way", ["ABSGD-robust", "ABSGD-finish"])
def test_evaluation_defers_nothing(one_backend, way, mode):
    """Between two micro-batches and between two steps: the whole loss at once, and the training is as if it had not been."""
    run, undisturbed = Run(way, backend=one_backend), Run(way, backend=one_backend)
    plain = Run.plain(way, backend=one_backend)
    x, y = batch(77)

    def evaluate(one):
        if mode == "eval":
            value = one.criterion.eval()(run.net(x), y)
            one.criterion.train()
        elif mode == "update=False":
            value = one.criterion(run.net(x), y, update=False)
        else:
            with getattr(torch, mode)():
                value = one.criterion(run.net(x), y)
        return value

    for step in range(3):
        before = run.criterion.log_s.clone()
        run.optimizer.zero_grad()
        for some in micro(*batch(step)):
            plain.criterion.log_s.copy_(before)
            value, wanted = evaluate(run), evaluate(plain)
            torch.testing.assert_close(value, wanted, rtol=1e-13, atol=0)
            torch.testing.assert_close(run.criterion.last.weights, plain.criterion.last.weights, rtol=1e-13, atol=0)
            if mode == "update=False":  # its gradient has its size
                slopes = [torch.autograd.grad(v, run.net[0].weight)[0] for v in (value, wanted)]
                torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)
            run.criterion(run.net(some[0]), some[1]).backward()
            assert torch.equal(run.criterion.log_s, before)
        run.settle()
        run.optimizer.step()
        evaluate(run)
        undisturbed.step(step)
        assert torch.equal(vector(run.net), vector(undisturbed.net))
        assert torch.equal(run.criterion.log_s, undisturbed.criterion.log_s)
    fresh = Run("ABSGD-finish", backend=one_backend)
    evaluate(fresh)
    with pytest.raises(RuntimeError, match="no forward in training mode"):
        fresh.criterion.finish_(fresh.net.parameters())


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-robust", "ABAdagrad-robust", "SGD-finish", "Adam-finish"])
def test_state_dict_between_steps(one_backend, way):
    """Saved to a file after two steps and loaded into new objects, the training goes on to the bit."""
    run, other = Run(way, backend=one_backend), Run(way, backend=one_backend, gamma=0.9)
    for step in range(2):
        run.step(step)
    file = io.BytesIO()
    torch.save({k: getattr(run, k).state_dict() for k in ("net", "criterion", "optimizer")}, file)
    file.seek(0)
    other.step(5)  # whatever was before is gone
    for name, saved in torch.load(file).items():
        getattr(other, name).load_state_dict(saved)
    for step in range(2, 5):
        run.step(step)
        other.step(step)
        assert torch.equal(vector(run.net), vector(other.net)) and torch.equal(run.criterion.log_s, other.criterion.log_s)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-robust", "ABAdam-finish"])
def test_copies_stay_linked(one_backend, way, copied):
    """A copied optimizer finishes the copied criterion: both go their way to the bit, and neither moves the other."""
    run, undisturbed = Run(way, backend=one_backend), Run(way, backend=one_backend)
    for one in (run, undisturbed):
        one.step(0)
    twin = copied(run)
    if run.how == "robust":
        assert twin.optimizer.robust is twin.criterion and twin.criterion is not run.criterion
    for one in (twin, undisturbed, run):
        one.step(1)
        one.step(2)
    for one in (twin, run):
        assert same(snapshot(one.net, one.optimizer), snapshot(undisturbed.net, undisturbed.optimizer))
        assert torch.equal(one.criterion.log_s, undisturbed.criterion.log_s)


def test_deepcopy_between_micro_batches(one_backend):
    """With its gradients, which torch does not copy with parameters, the copy ends the step that the original began."""
    run = Run("ABSGD-robust", backend=one_backend)
    run.step(0)
    parts = list(micro(*batch(1)))
    run.optimizer.zero_grad()
    for some in parts[:4]:
        run.criterion(run.net(some[0]), some[1]).backward()
    with pytest.warns(UserWarning, match="or a copy of the gradients"):
        twin = copy.deepcopy(run)
    for p, q in zip(run.net.parameters(), twin.net.parameters()):
        q.grad = p.grad.clone()
    for one in (run, twin):
        for some in parts[4:]:
            one.criterion(one.net(some[0]), some[1]).backward()
        one.optimizer.step()
    assert torch.equal(vector(run.net), vector(twin.net)) and torch.equal(run.criterion.log_s, twin.criterion.log_s)


@pytest.mark.parametrize("how", ["robust", "finish"])
@pytest.mark.parametrize("bad", [False, True])
def test_two_optimizers_share_a_criterion(one_backend, how, bad):
    """Weights to one and biases to another of other settings; a row that is not finite skips both."""
    plain = Run(backend=one_backend)
    net, criterion = network(), ab.ABLoss(lam=0.5, deferred=True, backend=one_backend).double()

    def pair(net, first, second, **more):
        weights, biases = ([p for p in net.parameters() if p.dim() == d] for d in (2, 1))
        return [first(weights, lr=0.1, momentum=0.9, **more), second(biases, lr=0.01, eps=1e-4, **more)]

    more = {"robust": criterion} if how == "robust" else {}
    ours = pair(net, ab.ABSGD, ab.ABAdam, backend=one_backend, **more)
    theirs = pair(plain.net, torch.optim.SGD, torch.optim.Adam)
    for step in range(4):
        x, y = batch(step)
        if bad and step == 1:
            x[12] = NAN
        net.zero_grad()
        for some in micro(x, y):
            criterion(net(some[0]), some[1]).backward()
        if how == "finish":
            criterion.finish_(net.parameters())
        for optimizer in ours:
            optimizer.step()
        plain.net.zero_grad()
        plain.criterion(plain.net(x), y).backward()
        for optimizer in theirs if not (bad and step == 1) else []:
            optimizer.step()
        assert distance(vector(net), vector(plain.net)) <= 1e-12
        assert torch.equal(criterion.nonfinite_batches, plain.criterion.nonfinite_batches)
        assert float(criterion.log_s) == pytest.approx(float(plain.criterion.log_s), rel=1e-12)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (partial(ab.ABSGD, lr=0.1, momentum=0), partial(torch.optim.SGD, lr=0.1)),
        (partial(ab.ABAdagrad, lr=0.1), partial(torch.optim.Adagrad, lr=0.1)),
        (None, partial(torch.optim.SGD, lr=0.1)),
        (None, partial(torch.optim.SparseAdam, lr=0.01, eps=1e-4)),
    ],
    ids=["ABSGD-robust", "ABAdagrad-robust", "SGD-finish", "SparseAdam-finish"],
)
def test_sparse_gradients(one_backend, ours, theirs):
    """Rows of a table that come in several micro-batches, and several times in one."""
    tables = []
    for _ in range(2):
        torch.manual_seed(2)
        tables.append(nn.Embedding(9, 4, sparse=True).double())
    criterions = [ab.ABLoss(lam=0.5, deferred=d, backend=one_backend).double() for d in (False, True)]
    plain = theirs(tables[0].parameters())
    optimizer = (
        ours(tables[1].parameters(), robust=criterions[1], backend=one_backend) if ours else theirs(tables[1].parameters())
    )
    for step in range(4):
        draw = torch.Generator().manual_seed(step)
        words = torch.randint(9, (sum(SIZES),), generator=draw)
        target = torch.randint(4, (sum(SIZES),), generator=draw)
        for one in (plain, optimizer):
            one.zero_grad()
        criterions[0](tables[0](words), target).backward()
        for some in zip(words.split(SIZES[2:]), target.split(SIZES[2:])):
            criterions[1](tables[1](some[0]), some[1]).backward()
        assert tables[1].weight.grad.is_sparse
        if not ours:
            assert criterions[1].finish_(tables[1].weight) and tables[1].weight.grad.is_sparse
        plain.step()
        optimizer.step()
        assert distance(tables[1].weight.detach(), tables[0].weight.detach()) <= 1e-12


def test_evaluation_between_two_optimizers(one_backend):
    """update=False defers nothing, so neither does it end the step that the second optimizer still has to take."""
    outcomes = []
    for looks in (False, True):
        net, criterion = network(), ab.ABLoss(lam=0.5, deferred=True, backend=one_backend).double()
        optimizers = [ab.ABSGD(layer.parameters(), lr=0.1, robust=criterion, backend=one_backend) for layer in (net[0], net[2])]
        x, y = batch(0)
        criterion(net(x), y).backward()
        optimizers[0].step()
        if looks:
            criterion(net(x), y, update=False)
        optimizers[1].step()
        outcomes.append(vector(net))
    assert torch.equal(*outcomes)


def test_closure(one_backend):
    """The closure's micro-batches are those of the step."""
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)
    for step in range(3):

        def closure(step=step):
            run.accumulate(*batch(step))
            return step

        assert run.optimizer.step(closure) == step
        plain.step(step)
        assert_alike(run, plain)


def test_sharpness_aware(one_backend):
    """SAM: the gradient at a point uphill of the first, by a forward with update=False, which is the whole loss. So finish_."""
    run, plain = Run("ABSGD-finish", backend=one_backend), Run.plain("ABSGD-finish", backend=one_backend)
    for step in range(3):
        for one in (run, plain):
            x, y = batch(step)
            one.accumulate(x, y)
            one.settle()
            way = gradient(one.net)
            uphill = [0.05 * p.grad / way.norm() for p in one.net.parameters()]
            torch._foreach_add_([p.data for p in one.net.parameters()], uphill)
            one.optimizer.zero_grad()
            one.criterion(one.net(x), y, update=False).backward()
            torch._foreach_sub_([p.data for p in one.net.parameters()], uphill)
            one.optimizer.step()
        assert_alike(run, plain)


def test_a_step_without_a_micro_batch_takes_the_gradients_as_they_are(one_backend):
    """Between them, training by another loss: no scale of the robust one is left over."""
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)
    for one in (run, plain):
        x, y = batch(0)
        F.cross_entropy(one.net(x), y).backward()
        one.optimizer.step()
    assert_alike(run, plain)


@pytest.mark.parametrize("bad", [False, True])
def test_gradients_of_another_loss_between_robust_steps(one_backend, bad):
    """They have their size, and the last step's scale is none of theirs."""
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)
    run.step(0)
    plain.step(0)
    if bad:
        run.step(9, SPOILS["nan"])
        plain.criterion.nonfinite_batches += 1
    x, y = batch(1)
    for one in (run, plain):
        one.optimizer.zero_grad()
        F.cross_entropy(one.net(x), y).backward()
        one.optimizer.step()
    assert_alike(run, plain)


def test_finish_takes_a_tensor_a_generator_and_parameters_without_gradient(one_backend):
    for form in (lambda w, other: w, lambda w, other: iter([other, w]), lambda w, other: {w: 0, other: 0}.keys()):
        criterion = ab.ABLoss(identity, lam=1.0, deferred=True, backend=one_backend)
        w, other = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
        criterion(w).backward()
        criterion(w[:1]).backward()
        assert criterion.finish_(form(w, other))
        assert other.grad is None
        torch.testing.assert_close(w.grad, torch.tensor([0.5, 0.25, 0.25]))


def test_a_loaded_state_between_backward_and_step(one_backend):
    """Gradients that nothing can bring to their size any more: an error, and nothing is written."""
    run = Run("ABSGD-robust", backend=one_backend)
    run.step(0)
    run.accumulate(*batch(1))
    before = snapshot(run.net, run.optimizer)
    with pytest.raises(RuntimeError):
        run.criterion.load_state_dict(run.criterion.state_dict())
        run.optimizer.step()
    assert same(snapshot(run.net, run.optimizer), before)


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABSGD-finish"])
def test_set_lam_in_the_middle_of_a_step_is_refused(one_backend, way):
    """The step goes on as it was."""
    run, plain = Run(way, backend=one_backend), Run.plain(way, backend=one_backend)
    for step in range(2):
        run.accumulate(*batch(step))
        before = [run.criterion.log_s.clone(), run.criterion.lam.clone()]
        for lam in (0.25, ab.RelativeLam(0.3)):
            with pytest.raises(RuntimeError, match="set_lam.*middle of a deferred step.*discard"):
                run.criterion.set_lam(lam)
        assert same([run.criterion.log_s, run.criterion.lam], before)
        run.settle()
        run.optimizer.step()
        plain.step(step)
        assert_alike(run, plain)


def test_a_schedule_in_the_middle_of_a_step_is_refused():
    """After the step it does what it was refused."""
    run = Run("ABSGD-robust")
    schedule = ab.TwoStage(run.criterion, lam=0.25, start=1)
    run.accumulate(*batch(0))
    with pytest.raises(RuntimeError, match="middle of a deferred step"):
        schedule.step()
    run.optimizer.step()
    schedule.step()
    assert float(run.criterion.lam) == 0.25


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-finish"])
def test_discard(one_backend, way):
    """A step given up half-way is forgotten, a spike in it included: what follows is as if it had not been begun."""
    run, undisturbed = Run(way, backend=one_backend), Run(way, backend=one_backend)
    for step in range(3):
        x, y = batch(7)
        SPOILS["spike" if step == 1 else "nan"](x, y)
        run.accumulate(x, y)
        run.criterion.discard()
        with pytest.raises(RuntimeError, match="no forward"):
            run.criterion.finish_(run.net.parameters())
        if step == 2:
            for one in (run, undisturbed):
                one.criterion.set_lam(-0.5)
        run.step(step)
        undisturbed.step(step)
        assert same(snapshot(run.net, run.optimizer), snapshot(undisturbed.net, undisturbed.optimizer))
        assert same(run.criterion.state_dict(), undisturbed.criterion.state_dict())
    ab.ABLoss(lam=0.5).discard()  # where nothing was begun there is nothing to forget


# ---- torch.compile ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """torch.compile without code generation, and nothing left of it afterwards."""
    torch.compiler.reset()
    yield partial(torch.compile, backend="aot_eager")
    torch.compiler.reset()


@pytest.mark.parametrize(
    "backend, way",
    [
        (None, "ABSGD-robust"),
        (None, "ABAdam-robust"),
        (None, "ABSGD-finish"),
        pytest.param("reference", "ABSGD-robust", marks=pytest.mark.deep),
    ],
)
def test_compiled(backend, way, compiled):
    """Loss and step compiled, the kernels' in one graph each. A row that is not finite skips the step."""
    whole = backend is None and _backend.available("cpu")
    run, eager = Run(way, backend=backend), Run(way, backend=backend)
    loss, step = compiled(run.criterion, fullgraph=whole), compiled(run.optimizer.step, fullgraph=whole)
    for k in range(4):
        x, y = batch(k)
        if k == 2:
            x[12] = NAN
            before = vector(run.net)
        run.optimizer.zero_grad()
        for part in (slice(10), slice(10, None)):
            loss(run.net(x[part]), y[part]).backward()
        run.settle()
        step()
        eager.accumulate(x, y)
        eager.settle()
        eager.optimizer.step()
        assert_alike(run, eager)
        assert k != 2 or torch.equal(vector(run.net), before)


def test_compiled_for_many_micro_batches(compiled):
    leaf = torch.ones(3, requires_grad=True)
    criterion = ab.ABLoss(identity, lam=0.5, deferred=True)
    loss = compiled(criterion, fullgraph=True)
    for _ in range(12):
        loss(leaf * 1.0).backward()
    assert criterion.finish_(leaf)


def test_compiled_reference_point_of_an_empty_micro_batch(compiled):
    """Losses of 100 lambdas, whose exponentials fp32 does not hold, are no matter where all are like that."""
    criterion, plain = ab.ABLoss(identity, lam=0.5, deferred=True), ab.ABLoss(identity, lam=0.5)
    loss, leaf = compiled(criterion), torch.tensor([50.0, 51.0, 50.5], requires_grad=True)
    for part in (leaf[:0], leaf[:2], leaf[2:]):
        loss(part).backward()
    assert criterion.finish_(leaf)
    (wanted,) = torch.autograd.grad(plain(leaf), leaf)
    torch.testing.assert_close(leaf.grad, wanted)
