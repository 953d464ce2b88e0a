"""Ramp (MATH §2.5): its lambda, log s carried over, and what it leaves alone; resuming is in test_resume.py."""

import copy
import math
import pickle
import warnings
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import identity
from deferred_cases import Run, assert_alike, batch
from optim_cases import through_a_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from two_processes import RANKS, needs_gloo, run

import absgd_fast as ab

INF, NAN = math.inf, math.nan
LENGTH, PER_STEP = 4, 2  # calls of step() until lambda is there, batches between two of them
DRAW = np.random.default_rng(3)
LOSSES = [DRAW.exponential(1.0 + t % 3, size=7 + t % 2) for t in range(7 * PER_STEP)]


def as_logits(losses):
    """Two classes whose cross-entropy to class 0 is these losses, in float64."""
    losses = torch.as_tensor(losses)
    return torch.stack([torch.zeros_like(losses), torch.expm1(losses).log()], 1), torch.zeros(len(losses), dtype=torch.long)


class OnLogits(torch.nn.Module):
    def __init__(self, make, **options):
        super().__init__()
        self.criterion = make(**options)

    def forward(self, losses):
        x, y = as_logits(losses)
        head = (torch.eye(2, dtype=torch.float64),) if isinstance(self.criterion, ab.LinearABLoss) else ()
        return self.criterion(x.requires_grad_(), *head, y)


class OnLosses(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.criterion = ab.ABLoss(identity, **options)

    def forward(self, losses):
        return self.criterion(torch.as_tensor(losses).requires_grad_())


KINDS = {"losses": OnLosses, "logits": partial(OnLogits, ab.ABLoss), "linear": partial(OnLogits, ab.LinearABLoss)}


class Truth:
    """The trajectory in float64, with s itself and not its logarithm, by the formulas of MATH §1.1 and §2.5."""

    def __init__(self, end, relative=False, gamma=0.9, alpha=1.0, init="first", normalizer="moving"):
        self.end, self.relative, self.t = end, relative, 0
        self.gamma, self.alpha, self.init, self.normalizer = gamma, alpha, init, normalizer
        self.lam, self.s = INF, None

    def __call__(self, losses):
        if self.relative:
            self.end, self.relative = self.end * losses.mean(), False
            self.lam = self.ramped()
        if math.isinf(self.lam):
            self.weights = np.ones_like(losses)
            return losses.mean()
        e = np.exp(losses / self.lam)
        if self.normalizer == "none":
            self.s = 1.0
        elif self.normalizer == "batch" or (self.s is None and self.init == "first"):
            self.s = self.alpha * e.mean()
        else:
            self.s = (1 - self.gamma) * (self.s or 0.0) + self.gamma * self.alpha * e.mean()
        self.weights = e / self.s
        return (self.weights * losses).mean()

    def ramped(self):
        return INF if self.t == 0 else 1 / (min(1.0, self.t / LENGTH) / self.end)

    def step(self):
        self.t += 1
        if self.relative:
            return
        old, self.lam = self.lam, self.ramped()
        if self.s is not None and self.normalizer != "none":
            self.s = self.alpha * (self.s / self.alpha) ** (old / self.lam)


def pair(kind="losses", lam=-0.7, **options):
    made = KINDS[kind](lam=-0.25, **options).double()
    return made, ab.Ramp(made.criterion, lam, LENGTH)


# ---- the numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [-0.5, 2, torch.tensor(-1.5), np.float32(0.25), INF, -INF, 1e38, -3e38])
@pytest.mark.parametrize("length", [1, 3, np.int64(5)])
def test_lambda(end, length):
    """1/lambda is t/length of 1/end; infinity where float32 cannot hold lambda."""
    criterion = ab.ABLoss(lam=1.0)
    schedule = ab.Ramp(criterion, end, length)
    assert criterion.lam == INF
    for t in range(1, 8):
        schedule.step()
        expected = float(end) / min(1.0, t / int(length))
        if abs(expected) > 3.4028234e38:
            expected = math.copysign(INF, expected)
        assert float(criterion.lam) == pytest.approx(expected, rel=1e-7)
        assert 1 / float(criterion.lam) == pytest.approx(min(1, t / int(length)) / float(end), rel=1e-6, abs=1e-37)


OPTIONS = [
    {},
    {"gamma": 0.3},
    {"gamma": 1.0, "alpha": 0.5},
    {"alpha": 0.6, "gamma": 0.5},
    {"init": "zero"},
    {"init": "zero", "alpha": 0.7},
    {"normalizer": "batch", "alpha": 0.7},
    {"normalizer": "none"},
    {"normalizer": "none", "alpha": 0.5},
]


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("end", [-0.7, 1.5])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_trajectory(kind, options, end, relative):
    """Losses, weights, log s and lambda, batch by batch, on batches that differ."""
    made, schedule = pair(kind, ab.RelativeLam(end) if relative else end, **options)
    truth, criterion = Truth(end, relative, **options), made.criterion
    for step in range(len(LOSSES) // PER_STEP):
        for losses in LOSSES[PER_STEP * step : PER_STEP * (step + 1)]:
            assert made(losses).item() == pytest.approx(truth(losses), rel=1e-11)
            np.testing.assert_allclose(criterion.last.weights, truth.weights, rtol=1e-11)
            log_s = (0.0 if "none" in options.values() else -INF) if truth.s is None else math.log(truth.s)
            assert float(criterion.log_s) == pytest.approx(log_s, rel=1e-11, abs=1e-12)
            assert float(criterion.lam) == pytest.approx(truth.lam, rel=1e-13)
        schedule.step(), truth.step()
        if truth.s is not None:
            assert float(criterion.log_s) == pytest.approx(math.log(truth.s), rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gamma, alpha", [(0.9, 1.0), (0.1, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("end", [-0.7, 1.5])
def test_a_constant_batch_keeps_the_mean_weight(kind, gamma, alpha, end):
    """All losses are equal, and init="first"."""
    made, schedule = pair(kind, end, gamma=gamma, alpha=alpha)
    other, of_zero = pair(kind, end, gamma=gamma, alpha=alpha, init="zero")
    losses, means = np.full(6, 1.25), []
    for step in range(LENGTH + 2):
        for _ in range(PER_STEP):
            made(losses), other(losses)
            assert float(made.criterion.last.weights.mean()) == pytest.approx(1.0 if step == 0 else 1 / alpha, rel=1e-12)
            means.append(float(other.criterion.last.weights.mean()))
        schedule.step(), of_zero.step()
    assert max(means) > 1 / alpha + 1e-2


def test_a_small_gamma_strays():
    """What the docstring advises: with gamma >= 0.5 the mean weight stays near 1 on batches that differ, with 0.1 it does not."""
    spread = {}
    for gamma in (0.1, 0.5, 0.9):
        draw = np.random.default_rng(0)
        criterion = ab.ABLoss(identity, lam=-0.5, gamma=gamma).double()
        schedule = ab.Ramp(criterion, -0.5, 40, "step")
        means = []
        for _ in range(40):
            criterion(torch.tensor(draw.exponential(1.0, 64)).requires_grad_())
            means.append(float(criterion.last.weights.mean()))
            schedule.step()
        spread[gamma] = max(abs(math.log(m)) for m in means)
    assert spread[0.9] < 0.05 < spread[0.1] and spread[0.9] < spread[0.5] < spread[0.1]


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-finish", "SGD-finish"])
@pytest.mark.parametrize("lam", [-0.7, ab.RelativeLam(-0.5)], ids=["number", "relative"])
@pytest.mark.parametrize("init", ["first", "zero"])
def test_deferred(one_backend, way, lam, init):
    """Micro-batches give what one batch gives, through the whole ramp."""
    runs = [Run(way, backend=one_backend, init=init), Run.plain(way, backend=one_backend, init=init)]
    x, y = batch(0)  # the two must fix the same lambda, though the first micro-batch has fewer rows
    if isinstance(lam, ab.RelativeLam):
        lam = lam.r * F.cross_entropy(runs[0].net(x[:7]), y[:7]).item()
        schedules = [ab.Ramp(runs[0].criterion, ab.RelativeLam(-0.5), 3), ab.Ramp(runs[1].criterion, lam, 3)]
    else:
        schedules = [ab.Ramp(run.criterion, lam, 3) for run in runs]
    for step in range(6):
        for one, schedule in zip(runs, schedules):
            one.step(step)
            schedule.step()
        assert_alike(*runs)
        assert float(runs[0].criterion.lam) == pytest.approx(lam * 3 / min(step + 1, 3), rel=1e-12)


# ---- a relative lambda ------------------------------------------------------------------------------------------------------


def test_a_relative_lambda_is_fixed_by_the_first_plain_batch():
    """Evaluation does not fix it, nor does a batch whose mean is 0 or not finite. lambda stays infinite until step()."""
    criterion = ab.ABLoss(identity, lam=1.0).double()
    schedule = ab.Ramp(criterion, ab.RelativeLam(-0.5), 2)
    first, later = torch.tensor([1.0, 3.0]).double().requires_grad_(), torch.tensor([8.0, 9.0]).double().requires_grad_()
    criterion.eval()(later)
    criterion.train()(torch.zeros(2, requires_grad=True).double())
    criterion(later * NAN)
    assert criterion.lam_is_open and criterion.lam == INF and "end" not in schedule.state_dict()
    assert criterion(first).item() == 2.0 and not criterion.lam_is_open and criterion.lam == INF
    assert schedule.state_dict() == {"count": 0, "end": -1.0}
    criterion(later)
    for expected in (-2.0, -1.0, -1.0):
        schedule.step()
        assert float(criterion.lam) == expected


def test_a_step_before_the_first_batch():
    """The first batch then fixes it, and is weighed by it at once, as in `TwoStage(start=0)`."""
    criterion = ab.ABLoss(identity, lam=1.0).double()
    schedule = ab.Ramp(criterion, ab.RelativeLam(-0.5), 2)
    schedule.step()
    assert criterion.lam.isnan() and criterion.lam_is_open
    losses = torch.tensor([1.0, 3.0]).double().requires_grad_()
    criterion(losses)
    assert float(criterion.lam) == -2.0 and float(criterion.last.weights[0] / criterion.last.weights[1]) == pytest.approx(math.e)
    schedule.step()
    assert float(criterion.lam) == -1.0


@pytest.mark.parametrize("given", [-0.25, ab.RelativeLam(-0.5)], ids=["number", "relative"])
@pytest.mark.parametrize("batches", [0, 1])
def test_a_relative_lambda_before_the_first_step_survives_saving(given, batches):
    """Open or fixed; with the criterion alone, and with the schedule alone as far as it is fixed."""

    def make():
        criterion = ab.ABLoss(identity, lam=given)
        return criterion, ab.Ramp(criterion, ab.RelativeLam(-0.5), 2)

    (criterion, schedule), (resumed, other), (alone, third) = make(), make(), make()
    losses, later = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor([5.0, 9.0], requires_grad=True)
    for _ in range(batches):
        criterion(losses)
    resumed.load_state_dict(through_a_file(criterion.state_dict()))
    third.load_state_dict(through_a_file(schedule.state_dict()))
    for one, its in ((criterion, schedule), (resumed, other), (alone, third)):
        assert one.lam == INF and one.lam_is_open == (batches == 0)
        one(later)
        its.step()
        assert float(one.lam) == (-2.0 if batches else -7.0)


def test_a_recomputation_weighs_as_the_first_pass():
    """Under activation checkpointing, where the first batch fixes lambda while the plain mean weighs it."""
    criterion = ab.ABLoss(identity, lam=1.0).double()
    ab.Ramp(criterion, ab.RelativeLam(-0.5), 2)
    losses = torch.tensor([1.0, 3.0]).double().requires_grad_()
    checkpoint(lambda t: criterion(t * 1), losses, use_reentrant=False).backward()
    assert losses.grad.tolist() == [0.5, 0.5] and criterion.ramp_end == -1.0


def test_a_look_ahead_leaves_it_open():
    """L2RW runs forwards that must not show."""
    criterion = ab.ABLoss(lam=1.0)
    schedule = ab.Ramp(criterion, ab.RelativeLam(-0.5), 2)
    model, (x, y) = torch.nn.Linear(3, 3), (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    before = criterion.also_changed()
    assert ("ramp_end", True) in [(name, math.isnan(value)) for _, name, value in before if name == "ramp_end"]
    criterion(model(x), y)
    for owner, name, value in before:
        setattr(owner, name, value)
    assert criterion.lam_is_open and "end" not in schedule.state_dict()


# ---- what a step leaves alone -----------------------------------------------------------------------------------------------


class NoLooking(TorchDispatchMode):
    """An error for every operator that makes the host wait for a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lam", [-0.7, ab.RelativeLam(-0.5)], ids=["number", "relative"])
def test_a_step_looks_at_no_tensor(lam):
    made, schedule = pair(lam=lam, alpha=0.5)
    tensors = made.criterion.lam, made.criterion.log_s
    for losses in LOSSES[: LENGTH + 2]:
        made(losses)
        with NoLooking():
            schedule.step()
    assert tensors == (made.criterion.lam, made.criterion.log_s)  # written in place, as graphs and captured graphs need it
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoLooking():
        float(made.criterion.lam)


@pytest.mark.parametrize("lam", [-0.7, ab.RelativeLam(-0.5)], ids=["number", "relative"])
def test_meta(lam):
    """A criterion without values: steps and loads go through, and `to_empty` gives it the lambda of the count."""
    criterion = ab.ABLoss(lam=1.0).to("meta")
    schedule = ab.Ramp(criterion, lam, 2)
    schedule.step()
    schedule.load_state_dict({"count": 1})
    assert schedule.count == criterion.ramp_count == 1
    criterion.to_empty(device="cpu")
    if isinstance(lam, float):
        assert float(criterion.lam) == pytest.approx(-1.4)
    else:
        assert criterion.lam.isnan() and criterion.lam_is_open
    assert criterion.log_s == -INF
    schedule.step()
    criterion(torch.zeros(4, 10, requires_grad=True), torch.arange(4))
    assert float(criterion.lam) == pytest.approx(-0.7 if isinstance(lam, float) else -0.5 * math.log(10))


def test_a_reset_of_the_parameters():
    """lambda of the count, log s anew, and a relative lambda open again."""
    for lam in (-0.7, ab.RelativeLam(-0.5)):
        made, schedule = pair(lam=lam)
        made(LOSSES[0]), schedule.step(), made(LOSSES[1])
        made.criterion.reset_parameters()
        assert made.criterion.log_s == -INF and made.criterion.lam_is_open == isinstance(lam, ab.RelativeLam)
        made(LOSSES[2])
        end = lam if isinstance(lam, float) else -0.5 * LOSSES[2].mean()
        assert float(made.criterion.lam) == pytest.approx(end * LENGTH)


def test_float64_in_the_middle():
    """lambda is then the exact one, not the one that float32 had."""
    for lam in (-0.7, ab.RelativeLam(-0.5)):
        criterion = ab.ABLoss(identity, lam=1.0)
        schedule = ab.Ramp(criterion, lam, 3)
        criterion(torch.tensor([1.1, 2.2], requires_grad=True))
        schedule.step()
        criterion.double()
        assert float(criterion.lam) == pytest.approx(3 * (lam if isinstance(lam, float) else criterion.ramp_end), rel=1e-15)


def test_the_count_of_collapsed_forwards_goes_on():
    """set_lam begins it anew; a ramp that never ends would hide a collapse."""
    x, y = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_(), torch.arange(100) % 4
    for length, before in ((2, 2), (1000, 700)):  # after the end of a ramp, and while it rises
        criterion = ab.ABLoss(lam=0.05)
        schedule = ab.Ramp(criterion, 0.05, length)
        for _ in range(before):
            schedule.step()
        with pytest.warns(UserWarning, match="collapsed"):
            _ = [(criterion(x, y), schedule.step()) for _ in range(200)]


def test_the_settings_stay_agreed():
    """On a GPU a comparison of the processes' settings waits; set_lam asks for one."""
    made, schedule = pair()
    processes = made.criterion._shared.processes
    processes._agreed = "agreed"
    for _ in range(LENGTH + 1):
        schedule.step()
        made(LOSSES[0])
    assert processes._agreed == "agreed"
    made.criterion.set_lam(0.5)
    assert processes._agreed is None


def test_nothing_compiles_anew():
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    model, criterion = torch.nn.Linear(3, 5), ab.ABLoss(lam=-1.0)
    schedule = ab.Ramp(criterion, 0.7, 3, unit="step")
    loss = torch.compile(lambda x, y: criterion(model(x), y), fullgraph=True, backend=counted)
    for _ in range(6):
        loss(torch.randn(8, 3), torch.arange(8) % 5).backward()
        schedule.step()
    assert counted.frame_count == 1 and math.isfinite(criterion.log_s)


# ---- lambda by hand, and other schedules -------------------------------------------------------------------------------------


def test_a_lambda_by_hand():
    """It holds until the next step of the ramp, which starts log s anew; after the end it stays."""
    made, schedule = pair(lam=-0.7)
    criterion = made.criterion
    schedule.step(), made(LOSSES[0])
    criterion.set_lam(0.3)
    made(LOSSES[1])
    schedule.step()
    assert float(criterion.lam) == pytest.approx(-1.4) and criterion.log_s == -INF
    schedule.step(), schedule.step()
    made(LOSSES[0])
    assert float(criterion.lam) == pytest.approx(-0.7)
    criterion.set_lam(0.3)
    made(LOSSES[1])
    log_s = float(criterion.log_s)
    schedule.step()
    assert float(criterion.lam) == 0.3 and float(criterion.log_s) == log_s and schedule.count == LENGTH + 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("by_hand", [0.3, INF, ab.RelativeLam(2.0), torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("steps", [0, 1, LENGTH, LENGTH + 2])
@pytest.mark.parametrize("way", ["criterion alone", "schedule after", "schedule before"])
@pytest.mark.parametrize("lam", [-0.7, ab.RelativeLam(-0.5)], ids=["number", "relative"])
def test_a_lambda_by_hand_is_resumed(by_hand, steps, way, lam):
    made, schedule = pair(lam=lam)
    for losses in LOSSES[:steps]:
        made(losses), schedule.step()
    made(LOSSES[5])
    made.criterion.set_lam(by_hand)
    made(LOSSES[6])
    states = through_a_file([made.state_dict(), schedule.state_dict()])
    resumed, other = pair(lam=lam)
    if way == "schedule before":
        other.load_state_dict(states[1])
    resumed.load_state_dict(states[0])
    if way == "schedule after":
        other.load_state_dict(states[1])
    for losses in LOSSES[7:]:
        assert torch.equal(made(losses), resumed(losses))
        assert torch.equal(made.criterion.log_s, resumed.criterion.log_s)
        assert torch.equal(made.criterion.lam, resumed.criterion.lam)
        schedule.step(), other.step()


def test_a_criterion_made_with_another_kind_of_lambda():
    """The ramp replaces it, as it replaces a number."""
    for given in (ab.TargetESS(0.7), ab.RelativeLam(2.0), torch.tensor(0.3)):
        criterion, truth = ab.ABLoss(identity, lam=given).double(), Truth(-0.7)
        if isinstance(given, ab.TargetESS):
            criterion(torch.tensor(LOSSES[0]).requires_grad_())
        schedule = ab.Ramp(criterion, -0.7, LENGTH)
        for losses in LOSSES:
            assert criterion(torch.tensor(losses).requires_grad_()).item() == pytest.approx(truth(losses), rel=1e-11)
            schedule.step(), truth.step()


def test_a_second_schedule():
    """The latest made begins anew; each overwrites what another has set, and log s starts anew then."""
    made, first = pair(lam=-0.7)
    made(LOSSES[0]), first.step(), made(LOSSES[1])
    second = ab.Ramp(made.criterion, 0.5, 2)
    assert made.criterion.lam == INF and made.criterion.log_s == -INF and second.count == made.criterion.ramp_count == 0
    second.step(), made(LOSSES[2])
    assert float(made.criterion.lam) == 1.0
    stages = ab.TwoStage(made.criterion, 2.0, 1)
    assert made.criterion.lam == INF and made.criterion.log_s == -INF
    stages.step(), made(LOSSES[3])
    assert float(made.criterion.lam) == 2.0
    second.step()
    assert float(made.criterion.lam) == 0.5 and made.criterion.log_s == -INF
    assert made.criterion.two_stage_count == 1 and made.criterion.ramp_count == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("lam", [-0.7, ab.RelativeLam(-0.5)], ids=["number", "relative"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_copies_go_on_alone(copied, lam, at):
    """log s is carried over in the copy too, and the original does not move."""
    criterion = ab.ABLoss(lam=1.0, alpha=0.5)
    schedule = ab.Ramp(criterion, lam, 3)
    batches = [(torch.randn(5, 4, generator=torch.Generator().manual_seed(i)), torch.arange(5) % 4) for i in range(6)]
    train = lambda c, s, b: (c(b[0].clone().requires_grad_(), b[1]).item(), s.step())[0]  # noqa: E731
    for b in batches[:at]:
        train(criterion, schedule, b)
    other, others = copied((criterion, schedule))
    values = [train(other, others, b) for b in batches[at:]]
    assert schedule.count == criterion.ramp_count == at and others.count == other.ramp_count == 6
    assert [train(criterion, schedule, b) for b in batches[at:]] == values


# ---- loading ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, LENGTH, LENGTH + 2])
def test_the_schedule_alone(steps):
    """Its state has the exact lambda, of a RelativeLam too; log s belongs to the criterion."""
    for lam in (-0.7, ab.RelativeLam(-0.5)):
        made, schedule = pair(lam=lam)
        for losses in LOSSES[:steps]:
            made(losses), schedule.step()
        for used in (0, 1, LENGTH + 1):
            fresh, other = pair(lam=lam)
            for losses in LOSSES[3 : 3 + used]:
                fresh(losses), other.step()
            other.load_state_dict(through_a_file(schedule.state_dict()))
            assert torch.equal(fresh.criterion.lam, made.criterion.lam) and other.state_dict() == schedule.state_dict()


@pytest.mark.parametrize("way", ["criterion alone", "schedule after", "schedule before", "late"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3, LENGTH + 1])
@pytest.mark.parametrize("length, end", [(1, -0.7), (2, -0.7), (9, -0.7), (LENGTH, -0.5), (2, 0.5)])
def test_another_length_or_end(length, end, steps, relative, way):
    """The saved count meets the length and the lambda of today. log s is carried over, but not to another end."""
    if relative and end != -0.7:
        return  # what a RelativeLam has become is loaded
    made, schedule = pair(lam=ab.RelativeLam(-0.7) if relative else -0.7, alpha=0.5)
    for losses in LOSSES[:steps]:
        made(losses), schedule.step()
    made(LOSSES[5])
    lam, states = float(made.criterion.lam), through_a_file([made.criterion.state_dict(), schedule.state_dict()])
    criterion = ab.ABLoss(identity, lam=INF, alpha=0.5).double()
    if way == "late":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # another lambda than the constructor's
            criterion.load_state_dict(states[0])
    other = ab.Ramp(criterion, ab.RelativeLam(-0.7) if relative else end, length)
    if way == "schedule before":
        other.load_state_dict(states[1])
    if way != "late":
        criterion.load_state_dict(states[0])
    if way in ("schedule after", "late"):
        other.load_state_dict(states[1])
    end = made.criterion.ramp_end if relative else end
    for count in range(steps, steps + length + 1):  # at once, and until the end
        assert other.count == count
        assert float(criterion.lam) == pytest.approx(end / (count / length) if 0 < count < length else end if count else INF)
        if count == steps and steps > 0:
            log_s = (float(made.criterion.log_s) - math.log(0.5)) * lam / float(criterion.lam) + math.log(0.5)
            assert float(criterion.log_s) == (pytest.approx(log_s, rel=1e-12) if relative or end == -0.7 else -INF)
        other.step()


def test_a_new_schedule_for_a_criterion_that_goes_on():
    """Only the count is given to it, as in the recipe for skorch: the criterion knows what the RelativeLam has become."""
    made, schedule = pair(lam=ab.RelativeLam(-0.7))
    for losses in LOSSES[:2]:
        made(losses), schedule.step()
    whole = copy.deepcopy((made, schedule))
    count = made.criterion.ramp_count
    other = ab.Ramp(made.criterion, ab.RelativeLam(-0.7), LENGTH)
    other.load_state_dict({"count": count})
    other.step(), whole[1].step()
    assert other.state_dict() == whole[1].state_dict() and "end" in other.state_dict()
    assert torch.equal(made.criterion.lam, whole[0].criterion.lam) and torch.equal(made.criterion.log_s, whole[0].criterion.log_s)


def test_a_loaded_state_is_rounded():
    """From a float32 criterion to a float64 one: lambda becomes the exact one."""
    criterion = ab.ABLoss(identity, lam=1.0)
    schedule = ab.Ramp(criterion, -0.7, 3)
    criterion(torch.tensor([1.1, 2.2], requires_grad=True)), schedule.step()
    other = ab.ABLoss(identity, lam=1.0).double()
    schedules = ab.Ramp(other, -0.7, 3)
    other.load_state_dict(criterion.state_dict())
    assert schedules.count == 1 and float(other.lam) == pytest.approx(-2.1, rel=1e-15)


# ---- errors -----------------------------------------------------------------------------------------------------------------


class EachBatch:
    """A lambda that every batch chooses anew."""


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda c: ab.Ramp(c, EachBatch(), 3), TypeError, r"lam: got EachBatch, expected a number or RelativeLam\(r\)"),
        (lambda c: ab.Ramp(c, ab.TargetESS(0.7), 3), TypeError, "lam: got TargetESS, .*goes to ABLoss.* without a ramp"),
        (lambda c: ab.Ramp(c, "0.5", 3), TypeError, "lam: got str"),
        (lambda c: ab.Ramp(c, None, 3), TypeError, "lam: got NoneType"),
        (lambda c: ab.Ramp(c, 0.0, 3), ValueError, "lam: got 0.0, expected a number other than 0"),
        (lambda c: ab.Ramp(c, NAN, 3), ValueError, "lam: got nan"),
        (lambda c: ab.Ramp(c, torch.tensor(0.5, device="meta"), 3), ValueError, "lam: got a tensor on the meta device"),
        (lambda c: ab.Ramp(c, torch.tensor([0.5, 1.0]), 3), ValueError, "lam"),
        (lambda c: ab.Ramp(c, 0.5, 0), ValueError, "length: got 0, expected an integer >= 1"),
        (lambda c: ab.Ramp(c, 0.5, 2.5), ValueError, r"length: got 2.5, .*int\(2.5\)"),
        (lambda c: ab.Ramp(c, 0.5, 3, "batch"), ValueError, "unit: got 'batch'"),
        (lambda c: ab.Ramp(torch.nn.CrossEntropyLoss(), 0.5, 3), TypeError, "criterion: got CrossEntropyLoss"),
    ],
)
def test_errors(make, error, words):
    """Before anything has changed."""
    criterion = ab.ABLoss(lam=0.5)
    before = criterion.state_dict()
    with pytest.raises(error, match=words):
        make(criterion)
    assert criterion.state_dict() == before


@pytest.mark.parametrize("make", [lambda c: ab.Ramp(c, 0.5, 3), lambda c: ab.TwoStage(c, 0.5, 3)], ids=["Ramp", "TwoStage"])
def test_a_rule_is_refused(make):
    criterion = ab.ABLoss(rule=partial(ab.weights.cvar, beta=0.5))
    before = criterion.state_dict()
    with pytest.raises(RuntimeError, match="got a lambda for an ABLoss with a rule"):
        make(criterion)
    assert criterion.state_dict().keys() == before.keys()


@pytest.mark.parametrize("lam", [-0.7, ab.RelativeLam(-0.5)], ids=["number", "relative"])
@pytest.mark.parametrize("steps", [0, 2, 5])
def test_an_open_deferred_step_is_refused(lam, steps):
    """step(), the load of the schedule alone, and another Ramp; nothing changes, the count neither, and the step goes on."""
    one, undisturbed = Run("ABSGD-robust"), Run("ABSGD-robust")
    schedule, other = (ab.Ramp(r.criterion, lam, 3) for r in (one, undisturbed))
    for step in range(steps):
        for r, s in ((one, schedule), (undisturbed, other)):
            r.step(step), s.step()
    one.accumulate(*batch(steps))
    before = one.criterion.lam.clone(), one.criterion.log_s.clone(), schedule.state_dict()
    calls = schedule.step, lambda: schedule.load_state_dict({"count": 1}), lambda: ab.Ramp(one.criterion, 0.5, 2)
    for call in calls:
        with pytest.raises(RuntimeError, match="middle of a deferred step"):
            call()
    assert (one.criterion.lam, one.criterion.log_s, schedule.state_dict()) == before
    assert one.criterion.ramp_count == steps
    one.settle()
    one.optimizer.step()
    undisturbed.step(steps)
    schedule.step(), other.step()
    assert_alike(one, undisturbed)
    assert torch.equal(one.criterion.lam, undisturbed.criterion.lam)


# ---- the warning of a collapse, in a small training ---------------------------------------------------------------------------


def collapses(lam, ramped, classes=100, batch_size=200, steps=350):
    """Whether an MLP that learns clusters, of which a fifth of the labels is wrong, warns of collapsed weights; its accuracy."""
    torch.manual_seed(0)
    centres = 3 * torch.randn(classes, 16)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, classes))
    criterion = ab.ABLoss(lam=lam)
    schedule = ab.Ramp(criterion, lam, 150, "step") if ramped else None
    optimizer = ab.ABSGD(model.parameters(), lr=0.1, momentum=0.9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            true = torch.randint(classes, (batch_size,))
            x = centres[true] + torch.randn(batch_size, 16)
            y = torch.where(torch.rand(batch_size) < 0.2, torch.randint(classes, (batch_size,)), true)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
    accuracy = (model(x).argmax(1) == true).float().mean()
    return any("collapsed" in str(w.message) for w in caught), float(accuracy)


@pytest.mark.parametrize("lam", [-0.05, -0.5])
def test_a_small_lambda_from_the_start_warns(lam):
    """The model learns one class, and the rows of one class of a hundred have all the weight."""
    warns, accuracy = collapses(lam, ramped=False)
    assert warns and accuracy < 0.1


@pytest.mark.parametrize("lam", [-1.0, -0.5, 5.0])
def test_a_ramp_to_a_sensible_lambda_does_not_warn(lam):
    warns, accuracy = collapses(lam, ramped=True)
    assert not warns and accuracy > 0.8


# ---- several processes --------------------------------------------------------------------------------------------------------


def ramp_on_ranks(rank):
    """Two ranks with uneven batches, one empty, give log s and lambda of one process with all rows."""
    for lam, deferred in product((-0.7, ab.RelativeLam(-0.5)), (False, True)):
        shared = ab.ABLoss(identity, lam=1.0, alpha=0.5, deferred=deferred).double()
        alone = ab.ABLoss(identity, lam=1.0, alpha=0.5, process_group=None).double()
        schedules = [ab.Ramp(criterion, lam, LENGTH) for criterion in (shared, alone)]
        for i, losses in enumerate(LOSSES):
            losses = torch.tensor(losses)
            cut = (0, 3, 5)[i % 3]
            mine = (losses[:cut], losses[cut:])[rank]
            mine = mine.clone().requires_grad_()
            shared(mine).backward(), alone(losses.clone().requires_grad_())
            if deferred:
                shared.finish_(mine)
            torch.testing.assert_close(shared.log_s, alone.log_s, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(shared.lam, alone.lam, rtol=1e-13, atol=0)
            if i % PER_STEP == 1:
                real, calls = torch.distributed.all_gather, []
                torch.distributed.all_gather = lambda *args, **options: calls.append(args)
                for schedule in schedules:
                    schedule.step()
                torch.distributed.all_gather = real
                assert not calls
        both = [torch.empty_like(shared.lam) for _ in range(RANKS)]
        torch.distributed.all_gather(both, shared.lam)
        assert torch.equal(*both)


@needs_gloo
def test_several_processes(tmp_path):
    run(ramp_on_ranks, tmp_path)
