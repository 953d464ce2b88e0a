"""report="mean": the value is the plain mean loss, the gradient is that of report="robust" to the bit."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deferred_cases import same
from torch.func import grad, hessian, jvp, vmap
from torch.utils.checkpoint import checkpoint
from two_processes import needs_gloo, run

import absgd_fast as ab

INF, NAN = math.inf, math.nan
ROWS, CLASSES, DIVISOR = 9, 4, 3.0
per_row = partial(F.cross_entropy, reduction="none")


class Head(torch.nn.Module):
    """LinearABLoss as a loss of logits."""

    def __init__(self, backend=None, **options):
        super().__init__()
        self.loss = ab.LinearABLoss(ab.CrossEntropy(), chunk=4, backend=backend, **options)

    def forward(self, x, y, **given):
        return self.loss(x, torch.eye(CLASSES, dtype=x.dtype), y, **given)


def subject(criterion=ab.CrossEntropy, **options):
    return lambda backend, **more: ab.ABLoss(criterion(), backend=backend, **options, **more)


SUBJECTS = {
    "fused": subject(lam=0.7),
    "mixed": subject(lam=-0.7, mix=0.5, max_weight=1.05),
    "plain": subject(lam=INF),
    "without a normaliser": subject(lam=-1.0, normalizer="none"),
    "relative lambda": subject(lam=ab.RelativeLam(0.5)),
    "target": subject(lam=ab.TargetESS(0.7)),
    "focal": subject(ab.Focal, lam=0.7),
    "callable": subject(lambda: per_row, lam=0.7),
    "divided": subject(lam=0.7, loss_divisor=DIVISOR),
    "divided callable": subject(lambda: per_row, lam=0.7, loss_divisor=DIVISOR),
    "deferred": subject(lam=0.7, deferred=True, loss_divisor=DIVISOR),
    "deferred callable": subject(lambda: per_row, lam=0.7, deferred=True),
    "cvar": subject(rule=partial(ab.weights.cvar, beta=0.3)),
    "term": subject(rule=partial(ab.weights.term, t=0.7)),
    "linear": lambda backend, **more: Head(backend, lam=0.7, **more),
    "linear, deferred": lambda backend, **more: Head(backend, lam=0.7, deferred=True, loss_divisor=DIVISOR, **more),
}


def divisor(criterion):
    return getattr(criterion, "loss", criterion).loss_divisor


def pair(name, backend=None):
    """The criterion that returns the robust value, and the one that returns the plain mean."""
    return SUBJECTS[name](backend), SUBJECTS[name](backend, report="mean")


def batch(seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, CLASSES, generator=draw).to(dtype).requires_grad_(), torch.randint(CLASSES, (ROWS,), generator=draw)


def plain_losses(x, y, name="fused"):
    x = x.detach().double()
    return ab.reference.logit_loss(x, y, kind="focal", gamma=2.0) if name == "focal" else per_row(x, y)


# ---- value and gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_value_and_gradient(one_backend, name):
    """Three training forwards (in deferred mode micro-batches), a further one with update=False, and an evaluation."""
    robust, mean = pair(name, one_backend)
    for seed in range(3):
        given = {"update": False} if seed == 2 else {}
        x, y = batch(seed)
        losses = [criterion(x, y, **given) for criterion in (robust, mean)]
        grads = [torch.autograd.grad(loss / 3, x)[0] for loss in losses]
        assert torch.equal(*grads)
        assert losses[0].dtype == losses[1].dtype
        torch.testing.assert_close(losses[1].double(), plain_losses(x, y, name).mean() * divisor(mean), rtol=2e-6, atol=0)
    of_both = [getattr(criterion, "loss", criterion) for criterion in (robust, mean)]
    assert same(*([criterion.log_s, criterion.lam, criterion.nonfinite_batches] for criterion in of_both))
    robust.eval(), mean.eval()
    x, y = batch(4)
    grads = [torch.autograd.grad(criterion(x, y), x)[0] for criterion in (robust, mean)]
    assert torch.equal(*grads)
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(mean(x, y).double(), plain_losses(x, y, name).mean(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft targets"])
@pytest.mark.parametrize("name", ["fused", "mixed", "callable", "divided", "cvar", "linear"])
def test_gradients_of_other_inputs(one_backend, name, soft):
    """Sample weights and soft targets get the same gradients, and neither sample_weight nor a score is in the value."""
    draw = torch.Generator().manual_seed(1)
    x, y = batch()
    if soft:
        y = F.one_hot(y, CLASSES).float().mul(3).softmax(1).requires_grad_()
    weight = torch.rand(ROWS, generator=draw).requires_grad_()
    given = dict(sample_weight=weight, score=torch.rand(ROWS, generator=draw), mask=torch.arange(ROWS) != 3)
    robust, mean = pair(name, one_backend)
    losses = [criterion(x, y, **given) for criterion in (robust, mean)]
    inputs = [t for t in (x, y, weight) if t.requires_grad]
    assert all(map(torch.equal, *(torch.autograd.grad(loss, inputs) for loss in losses)))
    wanted = plain_losses(x, y.detach().double() if soft else y)[given["mask"]].mean() * divisor(mean)
    torch.testing.assert_close(losses[1].double(), wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", ["fused", "mixed", "callable", "deferred", "cvar"])
def test_second_derivative(one_backend, name):
    x, y = batch(dtype=torch.float64)
    seconds = []
    for criterion in pair(name, one_backend):
        (first,) = torch.autograd.grad(criterion(x, y), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert seconds[0].abs().max() > 0 or name == "cvar"
    assert torch.equal(*seconds)


# ---- rows that do not count, and bad ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("trains", [True, False])
def test_rows(one_backend, name, trains):
    """Ignored rows do not count, whatever they hold; a batch without rows has the mean 0, and one with a bad row NaN."""
    mean = pair(name, one_backend)[1].train(trains)
    factor = divisor(mean) if trains else 1
    x, y = batch()
    mask = torch.arange(ROWS) >= 2
    x.data[0] = NAN if name not in ("linear", "linear, deferred") else 1e3
    good = plain_losses(x, y, name)[2:].mean() * factor
    torch.testing.assert_close(mean(x, y, mask=mask).double(), good, rtol=2e-6, atol=0)
    torch.testing.assert_close(mean(x[8:], y[8:]).double(), plain_losses(x, y, name)[8] * factor, rtol=2e-6, atol=0)
    assert mean(x, y, mask=torch.zeros(ROWS, dtype=torch.bool)) == 0
    assert mean(x[:0], y[:0]) == 0
    x.data[4, 2] = NAN
    assert mean(x, y, mask=mask).isnan()


def test_not_every_nonfinite_value_is_a_bad_row(one_backend):
    """A robust loss that overflows, or that a sample weight spoils, has a finite plain mean; a z out of range is a bad row."""
    x, y = batch()
    overflows = ab.ABLoss(lam=1e-2, normalizer="none", report="mean", backend=one_backend)
    wanted = plain_losses(x, y).mean().float()
    torch.testing.assert_close(overflows(x, y), wanted)
    weighted = ab.ABLoss(lam=1.0, report="mean", backend=one_backend)
    torch.testing.assert_close(weighted(x, y, sample_weight=torch.full((ROWS,), INF)), wanted)
    far = ab.ABLoss(per_row, lam=1e-3, report="mean", backend=one_backend)
    assert far(x * 1e37, y).isnan()
    assert far.nonfinite_batches == 1


# ---- the rest of torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fused", "callable", "divided", "deferred", "cvar", "linear", "linear, deferred"])
def test_checkpoint(one_backend, name):
    """The recomputation has the value of the first pass, also where the divisor and the state have moved on."""
    x, y = batch()
    outcomes = []
    for through in (lambda f, *a: f(*a), partial(checkpoint, use_reentrant=False)):
        criterion = pair(name, one_backend)[1]
        loss = through(lambda x, y, c=criterion: c(x.sin(), y).square().sin(), x, y)
        inner = getattr(criterion, "loss", criterion)
        if name != "cvar":
            inner.loss_divisor = 7
        inner.log_s.add_(1.0)
        outcomes.append([loss.detach(), *torch.autograd.grad(loss, x), inner.log_s])
    assert same(*outcomes)


@pytest.mark.parametrize("name", ["fused", "mixed", "callable"])
def test_transforms(name):
    x, y = batch()
    x = x.detach()
    robust, mean = (c.eval() for c in pair(name))
    torch.testing.assert_close(mean(x, y), plain_losses(x, y).mean().float())
    for transform in (grad, hessian, lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1]):
        assert torch.equal(*(transform(lambda x, c=c: c(x, y))(x) for c in (robust, mean)))
    value = jvp(lambda x: mean(x, y), (x,), (x,))[0]
    torch.testing.assert_close(value, plain_losses(x, y).mean().float())
    many = torch.stack([x, x * 2, x.cos()])
    wanted = torch.stack([plain_losses(x, y).mean() for x in many]).float()
    torch.testing.assert_close(vmap(lambda x: mean(x, y))(many), wanted)
    assert torch.equal(*(vmap(grad(lambda x, c=c: c(x, y)))(many) for c in (robust, mean)))


@pytest.mark.parametrize("name", ["fused", "callable", "divided", "deferred", "linear"])
def test_compiled(name, one_thread):
    torch._dynamo.reset()  # each of these is a new criterion for the same code
    robust, mean = pair(name)
    compiled = torch.compile(mean, backend="aot_eager", fullgraph=name != "linear")
    for seed in range(2):
        x, y = batch(seed)
        losses = robust(x, y), compiled(x, y)
        assert torch.equal(*(torch.autograd.grad(loss, x)[0] for loss in losses))
        torch.testing.assert_close(losses[1].double(), plain_losses(x, y).mean() * divisor(mean), rtol=2e-6, atol=0)


def test_traced():
    """torch.export in eval mode; FakeTensorMode and the meta device leave nothing behind."""
    x, y = batch()
    criterion = ab.ABLoss(lam=0.7, report="mean").eval()
    exported = torch.export.export(criterion, (x.detach(), y)).module()
    torch.testing.assert_close(exported(x.detach(), y), plain_losses(x, y).mean().float())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = criterion(mode.from_tensor(x), mode.from_tensor(y))
        assert fake.shape == () and fake.requires_grad
    assert criterion.memo.sample_stats is None
    assert ab.ABLoss(lam=0.7, report="mean").to("meta")(x.to("meta"), y.to("meta")).is_meta


def test_grad_scaler(one_backend):
    """A scaled loss gives the same scaled gradient."""
    x, y = batch()
    robust, mean = pair("fused", one_backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert torch.equal(*(torch.autograd.grad(scaler.scale(c(x, y)), x)[0] for c in (robust, mean)))


def test_switch():
    """The attribute may change between two forwards; copies and pickles keep it; anything else is refused by name."""
    x, y = batch()
    criterion = ab.ABLoss(lam=0.7)
    assert criterion.report == "robust"
    criterion.report = "mean"
    for c in (criterion, copy.deepcopy(criterion), copy.copy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert c.report == "mean"
        torch.testing.assert_close(c(x, y), plain_losses(x, y).mean().float())
    criterion.report = "robust"
    torch.testing.assert_close(criterion(x, y), criterion.last.weighted_mean_loss)
    for wrong in ("plain", None, True):
        with pytest.raises(ValueError, match=r"report: got .*expected one of 'robust', 'mean'"):
            criterion.report = wrong
        with pytest.raises(ValueError, match=r"report: got .*expected one of 'robust', 'mean'"):
            ab.LinearABLoss(lam=0.7, report=wrong)


# ---- several processes -----------------------------------------------------------------------------------------------------


def global_mean(rank):
    """The mean of the rows of both processes, in every training forward; the own mean in evaluation, without a collective."""
    calls = []
    gather = dist.all_gather
    dist.all_gather = lambda *args, **kwargs: calls.append(0) or gather(*args, **kwargs)
    for name in ("fused", "callable", "divided", "deferred", "deferred callable", "linear", "linear, deferred"):
        robust, mean = pair(name)
        for step, (begin, end) in enumerate([(0, 4), (0, 9), (5, 5), (9, 9), (2, 3)]):  # rank 0 has begin:end, rank 1 the rest
            x, y = batch(step)
            rows = slice(begin, end) if rank == 0 else slice(end, ROWS)
            everybody = torch.cat([torch.arange(begin, end), torch.arange(end, ROWS)])
            calls.clear()
            of_robust = robust(x[rows], y[rows])
            without = len(calls)
            loss = mean(x[rows], y[rows])
            assert len(calls) == 2 * without + 1, (name, step, calls)
            wanted = plain_losses(x, y)[everybody].mean() if len(everybody) else torch.zeros(())
            torch.testing.assert_close(loss.double(), wanted.double() * divisor(mean), rtol=2e-6, atol=0)
            assert torch.equal(*(torch.autograd.grad(v, x, allow_unused=True)[0] for v in (of_robust, loss)))
        calls.clear()
        loss = checkpoint(lambda x, y, c=mean: c(x, y).sin(), x, y, use_reentrant=False)
        first = len(calls)
        loss.backward()
        assert len(calls) == first > 0, name
        x.data[ROWS - 1] = NAN  # a row of rank 1
        rows = slice(0, 4) if rank == 0 else slice(4, ROWS)
        assert mean(x[rows], y[rows]).isnan(), name
        mean.eval()
        calls.clear()
        if rank == 0:
            torch.testing.assert_close(mean(x[:4], y[:4]).double(), plain_losses(x, y)[:4].mean(), rtol=2e-6, atol=0)
        assert not calls


def disagreement(rank):
    x, y = batch()
    criterion = ab.ABLoss(lam=0.7, report=("robust", "mean")[rank])
    with pytest.raises(ValueError, match="disagree on report: rank 0 has 'robust', rank 1 has 'mean'"):
        criterion(x, y)


def unequally_many(rank):
    """In deferred mode the value "robust" takes them; "mean" names the mistake on both processes."""
    x, y = batch()
    for name in ("deferred", "deferred callable", "linear, deferred"):
        robust, mean = pair(name)
        for criterion in (robust, mean):
            inner = getattr(criterion, "loss", criterion)
            before = inner.log_s.clone()

            def step(criterion=criterion, inner=inner):
                for _ in range(3 - rank):
                    criterion(x, y).backward()
                inner.finish_(x)

            if criterion is robust:
                step()
                assert inner.log_s != before
                continue
            with pytest.raises(RuntimeError, match='with report="mean" rank 0 made a forward of an optimizer step that rank 1'):
                step()
            assert torch.equal(inner.log_s, before)


def without_a_look(rank):
    """Where nobody looks, as on a GPU, one process gets NaN, and the other a bad step, which leaves log s."""
    from absgd_fast.robust import processes

    look, processes._check_same_exchange = processes._check_same_exchange, lambda of_all: None
    check, processes.distributed.check_agreement = processes.distributed.check_agreement, lambda *args: None
    x, y = batch()
    criterion = ab.ABLoss(lam=0.7, report="mean", deferred=True)
    criterion(x, y).backward()
    if rank == 0:
        assert criterion(x, y).isnan()
    else:
        before = criterion.log_s.clone()
        assert not criterion.finish_(x)
        assert torch.equal(criterion.log_s, before) and criterion.nonfinite_batches == 1
    processes._check_same_exchange, processes.distributed.check_agreement = look, check


def of_two_processes(rank):
    global_mean(rank)
    unequally_many(rank)
    without_a_look(rank)
    disagreement(rank)


@needs_gloo
def test_two_processes(tmp_path):
    run(of_two_processes, tmp_path)
