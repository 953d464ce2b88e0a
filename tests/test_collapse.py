"""The warning of weights that have collapsed: the mean of ESS/n over 100 training forwards in a row is below its limit."""

import copy
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import absgd_fast as ab
from absgd_fast.compat import losses as compat_losses
from absgd_fast.experiments import data, train
from absgd_fast.robust import collapse as collapse_file
from absgd_fast.robust.collapse import LENGTH

ROWS, CLASSES = 100, 4
X = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_()
Y = torch.arange(ROWS) % CLASSES
per_row = partial(F.cross_entropy, reduction="none")


class Head(torch.nn.Module):
    """LinearABLoss as a loss of logits."""

    def __init__(self, **options):
        super().__init__()
        self.criterion = ab.LinearABLoss(**options)

    def forward(self, x, y, **given):
        return self.criterion(x, torch.eye(CLASSES), y, **given)


class Share:
    """A rule: equal weights for the rows with the largest losses, or the smallest, and none for the others."""

    def __init__(self, rows=4, falling=False):
        self.rows, self.falling = rows, falling

    def __call__(self, losses):
        rank = losses.argsort(descending=not self.falling).argsort()
        return torch.where(rank < self.rows, len(losses) / self.rows, 0.0)


LOSSES = {
    "fused": ab.ABLoss,
    "callable": partial(ab.ABLoss, per_row),
    "deferred": partial(ab.ABLoss, deferred=True),
    "deferred callable": partial(ab.ABLoss, per_row, deferred=True),
    "divided": partial(ab.ABLoss, loss_divisor=2),
    "mean": partial(ab.ABLoss, report="mean"),
    "linear": Head,
    "linear, deferred": partial(Head, deferred=True),
}


def warned_at(criterion, calls=3 * LENGTH, call=lambda criterion, i: criterion(X, Y), start=0):
    """The forwards (from 0) that warned."""
    found = []
    for i in range(start, start + calls):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(criterion, i)
        found += [i] * sum("collapsed" in str(w.message) for w in caught)
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_once(one_backend, loss):
    """At most 200 forwards after the first; then no more. A weighting that spreads is never warned of."""
    criterion = LOSSES[loss](lam=0.05, backend=one_backend)
    assert warned_at(criterion, 4 * LENGTH) == [2 * LENGTH - 2]
    ess = getattr(criterion, "criterion", criterion).last.ess if loss.startswith("linear") else criterion.last.ess
    assert 1 <= ess < 0.05 * ROWS
    for lam in (5.0, math.inf, -math.inf):
        assert warned_at(LOSSES[loss](lam=lam, backend=one_backend)) == []


SHARES = [(1, False, True), (4, False, True), (5, False, False), (6, False, False), (14, False, False)]
SHARES += [(1, True, True), (5, True, True), (11, True, True), (16, True, True), (18, True, False)]


@pytest.mark.parametrize("rows, falling, collapsed", SHARES)
def test_share(one_backend, rows, falling, collapsed):
    """The ESS of equal weights for k of 100 rows is k. The limit is 5 if they have the largest losses, and 17 if the smallest."""
    assert bool(warned_at(ab.ABLoss(per_row, rule=Share(rows, falling), backend=one_backend))) == collapsed


def test_the_sign_is_of_the_rows_that_count():
    """Rows of a loss that is ignored or bad do not tell whether the weights fall with the loss."""
    values = torch.cat([torch.linspace(1, 2, 90), torch.full((10,), 50.0)])  # the last ten do not count, or are infinite
    mask = torch.arange(ROWS) < 90
    for share, collapsed in [(Share(6), False), (Share(6, falling=True), True)]:
        rule = lambda losses, share=share: F.pad(share(losses[:90]), (0, len(losses) - 90))  # noqa: E731
        for given, left_out in [(values, {"mask": mask}), (values.where(mask, math.inf), {})]:
            call = lambda c, i, x=given, m=left_out: c(x.clone().requires_grad_(), **m)  # noqa: E731
            assert bool(warned_at(ab.ABLoss(lambda x: x * 1, rule=rule), call=call)) == collapsed
    same = torch.ones(ROWS, requires_grad=True)  # equal losses: the weights neither fall nor rise
    assert warned_at(ab.ABLoss(lambda x: x * 1, rule=Share(6, True)), call=lambda c, i: c(same)) == []


@pytest.mark.parametrize("lam, few", [(1e-3, 20), (-1e-3, 5)])
def test_few_rows_cannot_collapse(lam, few):
    for n in (1, 2, few - 1, few):
        assert warned_at(ab.ABLoss(lam=lam), call=lambda c, i, n=n: c(X[:n], Y[:n])) == []
    assert warned_at(ab.ABLoss(lam=lam), call=lambda c, i: c(X[: few + 1], Y[: few + 1])) == [2 * LENGTH - 2]


def test_rows_that_count():
    """Ignored, masked and bad rows are none of the n. A forward in which no row counts neither counts nor ends a run."""
    y, mask = Y.clone(), torch.ones(ROWS, dtype=torch.bool)
    y[20:60], mask[60:] = -100, False
    assert warned_at(ab.ABLoss(lam=1e-3), call=lambda c, i: c(X, y, mask=mask)) == []
    for empty in (lambda c: c(X[:0], Y[:0]), lambda c: c(X * math.nan, Y), lambda c: c(X, Y, mask=Y < 0)):
        for at in (LENGTH - 1, 150):  # the first that is looked at, and one within a run
            call = lambda c, i, empty=empty, at=at: empty(c) if i == at else c(X, Y)  # noqa: E731
            assert warned_at(ab.ABLoss(lam=0.05), call=call) == [2 * LENGTH - 1]
        assert warned_at(ab.ABLoss(lam=0.05), call=lambda c, i, empty=empty: empty(c)) == []


@pytest.mark.parametrize("loss", ["fused", "callable", "deferred"])
@pytest.mark.parametrize("lam", [0.02, 0.01, -0.001])
def test_weights_that_underflow(loss, lam):
    """With batches that differ, all weights of many forwards are 0, because s is of earlier ones. These have collapsed too."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 20, generator=draw)
    y = (x @ torch.randn(20, 5, generator=draw)).argmax(1)
    weight, criterion, all_zero = torch.zeros(20, 5, requires_grad=True), LOSSES[loss](lam=lam), []

    def step(c, i):
        rows = torch.randint(1024, (64,), generator=draw)
        c(x[rows] @ weight, y[rows]).backward()
        if i % 4 == 3 and c.deferred:
            c.finish_(weight)
        if i % 4 == 3 or not c.deferred:
            all_zero.append(not c.last.weights.any())
            weight.data -= 0.1 * (0.0 if weight.grad is None else weight.grad)
            weight.grad = None

    assert len(warned_at(criterion, 1000, step)) == 1
    assert any(all_zero) or loss == "deferred" or lam == 0.02


@pytest.mark.parametrize("spread, at", [(99, 298), (100, 299), (140, 339), (150, 198), (197, 198), (198, 198)])
def test_one_forward_that_spreads(spread, at):
    """Shares of 4 and one of 50, limit 5. Among the first 45 that are looked at it ends the run; later the mean stays below."""
    criterion = ab.ABLoss(per_row, rule=Share())

    def call(c, i):
        c.rule.rows = 50 if i == spread else 4
        c(X, Y)

    assert warned_at(criterion, 5 * LENGTH, call) == [at]


@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("high, warns", [(1.7, True), (1.9, False)])
def test_the_mean_decides(falling, high, warns):
    """Shares that alternate between a fifth of the limit and `high` times the limit."""
    criterion, limit = ab.ABLoss(per_row, rule=Share(falling=falling)), 17 if falling else 5

    def call(c, i):
        c.rule.rows = round(limit * (0.2 if i % 2 else high))
        c(X, Y)

    assert bool(warned_at(criterion, 5 * LENGTH, call)) == warns


def test_the_text():
    text = r"ABLoss: the weights have collapsed.*100 training.*17% .*\(5% .*lam=0.05.*Ramp\(.*docs/choosing-lambda.md"
    with pytest.warns(UserWarning, match=text):
        [c(X, Y) for c in [ab.ABLoss(lam=0.05)] for _ in range(200)]
    with pytest.warns(UserWarning, match=r"by rule=cvar\(beta=0.01\)") as caught:
        [c(X, Y) for c in [ab.ABLoss(rule=partial(ab.weights.cvar, beta=0.01))] for _ in range(200)]
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(UserWarning, match="collapsed") as caught:
        [checkpoint(lambda x, c=c: c(x * 1, Y), X, use_reentrant=False) for c in [ab.ABLoss(lam=0.05)] for _ in range(200)]
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(UserWarning, match=r"LinearABLoss: the weights.*lam=0.05"):
        [c(X, Y) for c in [Head(lam=0.05)] for _ in range(200)]


def test_forwards_that_do_not_train():
    """Evaluation, no_grad, update=False and recomputations neither count nor end a run."""

    def idle(c, i):
        c.eval()(X, Y)
        c.train()(X, Y, update=False)
        with torch.no_grad():
            c(X, Y)

    assert warned_at(ab.ABLoss(lam=0.05), call=idle) == []
    both = lambda c, i: (idle(c, i), c(X, Y))  # noqa: E731
    assert warned_at(ab.ABLoss(lam=0.05), call=both) == [2 * LENGTH - 2]
    recomputed = lambda c, i: checkpoint(lambda x: c(x * 1, Y), X, use_reentrant=False).backward()  # noqa: E731
    assert warned_at(ab.ABLoss(lam=0.05), call=recomputed) == [2 * LENGTH - 2]


RESTARTS = {
    "set_lam": lambda c: c.set_lam(0.05),
    "load": lambda c: c.load_state_dict(c.state_dict()),
    "reset": lambda c: c.reset_parameters(),
    "switch": lambda c: setattr(c, "warn_of_collapse", True),
}


@pytest.mark.parametrize("restart", RESTARTS)
def test_restart(restart):
    """These begin anew: before the warning, and after it."""
    criterion = ab.ABLoss(lam=0.05)
    assert warned_at(criterion, 150) == []
    RESTARTS[restart](criterion)
    assert warned_at(criterion, 300) == [198]
    RESTARTS[restart](criterion)
    assert warned_at(criterion, 300) == [198]
    assert not any("collapse" in key for key in criterion.state_dict())


def test_switch():
    """Off: nothing is counted. Copies and pickles keep the switch, and count by themselves."""
    for loss in (ab.ABLoss, Head):
        assert warned_at(loss(lam=0.05, warn_of_collapse=False)) == []
    criterion = ab.ABLoss(lam=0.05)
    assert criterion.warn_of_collapse is True
    assert warned_at(criterion, 190) == []
    for copied in (copy.copy(criterion), copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert warned_at(copied) == [198]
    criterion.warn_of_collapse = False
    assert warned_at(criterion) == []
    assert copy.deepcopy(criterion).warn_of_collapse is False
    assert not compat_losses.ABLoss(0.05).loss.warn_of_collapse


def test_compiled():
    """Nothing is counted, compiled once, and in one graph."""
    torch._dynamo.reset()
    criterion = ab.ABLoss(lam=0.05)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(criterion, backend=counter, fullgraph=True)
    assert warned_at(criterion, call=lambda c, i: compiled(X, Y)) == []
    assert counter.frame_count == 1


def test_without_values():
    """On meta and in FakeTensorMode there is nothing to look at."""
    criterion = ab.ABLoss(lam=0.05)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, y = mode.from_tensor(X), mode.from_tensor(Y)
        assert warned_at(criterion, call=lambda c, i: c(x, y)) == []
    assert warned_at(ab.ABLoss(lam=0.05).to("meta"), call=lambda c, i: c(X.to("meta"), Y.to("meta"))) == []
    assert warned_at(criterion) == [LENGTH - 1]  # it has counted forwards before, and looks at the first that it can look at


@pytest.mark.parametrize("late", [0, 1, 7, 1000])
def test_numbers_that_arrive_late(monkeypatch, late):
    """As on a GPU, whose numbers arrive some forwards later: the host never waits, and the warning comes that much later."""
    now = [0]

    class Late(collapse_file.Arrival):
        def __init__(self, number):
            super().__init__(number.clone())
            self.due = now[0] + late

        def is_there(self):
            return now[0] >= self.due

        def value(self):
            assert self.is_there()  # it would wait
            return super().value()

    monkeypatch.setattr(collapse_file, "Arrival", Late)

    def call(c, i):
        now[0] = i
        c(X, Y)

    at = warned_at(ab.ABLoss(lam=0.05), 5 * LENGTH, call)
    assert at == [] if late == 1000 else len(at) == 1 and 198 <= at[0] <= 198 + 2 * late
    rules = ab.ABLoss(per_row, rule=Share())

    def broken(c, i):
        now[0] = i
        c.rule.rows = 50 if i % 30 == 0 else 4
        c(X, Y)

    assert warned_at(rules, 8 * LENGTH, broken) == []


# ---- real trainings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, warmup, lam, noise_rate, seed, collapsed",
    [
        ("absgd", 0.0, -0.5, 0.0, 1, True),
        ("absgd", 0.0, -0.5, 0.4, 0, True),
        ("ramp", 0.3, -0.5, 0.0, 1, False),
        ("ramp", 0.3, -0.5, 0.4, 0, False),
        ("absgd", 0.3, -1.0, 0.4, 0, False),
        ("targetess", 0.0, 0.5, 0.0, 0, False),
    ],
)
def test_training_on_digits(method, warmup, lam, noise_rate, seed, collapsed):
    """With 10 classes: a training that ends with one class warns, and healthy ones do not."""
    pytest.importorskip("sklearn")
    noise = {"noise": "symmetric", "noise_rate": noise_rate} if noise_rate else {}
    config = train.Config(methods=(method,), warmup=warmup, lam=lam, share=0.5, epochs=25, **noise)
    source = data.load_source(config.dataset)
    training = train.Training(method, config, source, train.draw(config, source, seed), seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accuracy = training.run(lambda: None, lambda: None)["accuracy"]
    assert any("collapsed" in str(w.message) for w in caught) == collapsed
    assert accuracy < 21 if collapsed else accuracy > 85
