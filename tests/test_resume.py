"""Resuming: a schedule's count travels in the state_dict of what it drives; loading another lambda than the given one warns."""

import copy
import gc
import io
import math
import pickle
import warnings
import weakref
from functools import partial

import pytest
import torch
from conftest import identity
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import absgd_fast as ab
from absgd_fast.compat import losses as compat

COUNTS = [40, 15, 5]
X = torch.tensor([[0.4, -1.0, 2.0], [3.0, 0.3, -0.7], [0.0, 0.1, 0.2], [-2.0, 1.0, 1.5]])
Y = torch.tensor([0, 1, 2, 2])


def driven(make, start):
    """(criterion, schedule) of a schedule that drives the criterion's loss."""
    loss, schedule = make(start)
    return ab.ABLoss(loss, lam=0.5), schedule


def two_stage(lam, start):
    criterion = ab.ABLoss(lam=0.25)
    return criterion, ab.TwoStage(criterion, lam, start)


def ramp(lam, start):
    criterion = ab.ABLoss(lam=0.25, alpha=0.5)  # so that log alpha enters what is carried over
    return criterion, ab.Ramp(criterion, lam, start + 1)


def drw(start):
    loss = ab.VS(COUNTS)
    return loss, ab.DRW(loss, torch.tensor([0.25, 1.25, 1.5]), start)


def tla(start):
    loss = ab.VS(COUNTS)
    return loss, ab.TLA(loss, start)


def all_of_them(start, of_lam=ab.TwoStage):
    loss, recipe = ab.vs_tla_adrw(COUNTS, start=start)
    criterion = ab.ABLoss(loss, lam=0.25)
    return criterion, ab.schedule.ChainedSchedules(recipe, of_lam(criterion, ab.RelativeLam(0.5), start + 1))


SCHEDULES = {
    "TwoStage": partial(two_stage, 0.5),
    "TwoStage, relative": partial(two_stage, ab.RelativeLam(0.5)),
    "Ramp": partial(ramp, 0.5),
    "Ramp, relative": partial(ramp, ab.RelativeLam(0.5)),
    "TwoStage, target": partial(two_stage, ab.TargetESS(0.6)),
    "DRW": partial(driven, drw),
    "TLA": partial(driven, tla),
    "the recipe": partial(driven, lambda start: ab.vs_tla_adrw(COUNTS, start=start)),
    "all of them": all_of_them,
    "all of them, ramp": partial(all_of_them, of_lam=ab.Ramp),
}


@pytest.fixture(params=SCHEDULES)
def make(request):
    return SCHEDULES[request.param]


def steps(criterion, schedule, count):
    """The values of so many epochs of one batch, with gradients, so that the state moves."""
    values = []
    for _ in range(count):
        values.append(float(criterion(X.clone().requires_grad_(), Y).detach()))
        schedule.step()
    return values


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def counts_in(state):
    return {name: int(t) for name, t in state.items() if name.endswith("_count")}


# ---- schedules --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("saved_at", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("used_for", [0, 2, 4])
@pytest.mark.parametrize("way", ["criterion alone", "schedule after", "schedule before", "in a model"])
def test_the_criterion_resumes_its_schedules(make, saved_at, used_for, way):
    """Saved before, at and after the switch, loaded by a fresh one or one in any stage; without a warning, with strict=True."""
    criterion, schedule = make(2)
    steps(criterion, schedule, saved_at)
    own = through_a_file(schedule.state_dict())
    resumed, resumed_schedule = make(2)
    steps(resumed, resumed_schedule, used_for)
    if way == "schedule before":
        resumed_schedule.load_state_dict(own)
    if way == "in a model":
        state = through_a_file(nn.ModuleDict({"loss": criterion}).state_dict())
        nn.ModuleDict({"loss": resumed}).load_state_dict(state)
    else:
        resumed.load_state_dict(through_a_file(criterion.state_dict()))
    if way == "schedule after":
        resumed_schedule.load_state_dict(own)
    assert resumed_schedule.state_dict() == schedule.state_dict()
    assert steps(resumed, resumed_schedule, 4) == steps(criterion, schedule, 4)
    assert counts_in(resumed.state_dict()) == counts_in(criterion.state_dict()) != {}


def test_another_start_decides_anew():
    """As by the schedule's own load_state_dict: the saved count meets the start of today."""
    for kind in ("DRW", "TLA", "TwoStage"):
        criterion, schedule = SCHEDULES[kind](1)
        steps(criterion, schedule, 2)
        state = criterion.state_dict()
        later, later_schedule = SCHEDULES[kind](3)
        later.load_state_dict(state)
        if kind == "DRW":
            assert later.criterion.weight.tolist() == [1, 1, 1]
        elif kind == "TLA":
            assert later.criterion.scaled
        else:
            assert math.isinf(later.lam)
        steps(later, later_schedule, 1)
        same_stage = [float(later.lam) == 0.5, later.criterion.weight is not None, not getattr(later.criterion, "scaled", True)]
        assert any(same_stage)


def test_a_checkpoint_without_counts_leaves_the_schedules(make):
    """As checkpoints were before the counts travelled; the schedule's own state_dict then has the count."""
    criterion, schedule = make(2)
    steps(criterion, schedule, 4)
    old = {name: t for name, t in criterion.state_dict().items() if not name.endswith(("_count", "ramp_end"))}
    resumed, resumed_schedule = make(2)
    before = resumed_schedule.state_dict()
    resumed.load_state_dict(old)
    assert resumed_schedule.state_dict() == before
    resumed_schedule.load_state_dict(schedule.state_dict())
    assert steps(resumed, resumed_schedule, 3) == steps(criterion, schedule, 3)


def test_a_criterion_without_a_schedule_hands_the_count_on():
    """Evaluation loads a checkpoint of a training, and whoever saves it again loses nothing."""
    for kind in ("TwoStage", "Ramp", "the recipe"):
        criterion, schedule = SCHEDULES[kind](2)
        steps(criterion, schedule, 3)
        state = criterion.state_dict()
        other = ab.ABLoss(lam=0.5) if kind != "the recipe" else ab.ABLoss(ab.VS(COUNTS, weight=torch.ones(3)), lam=0.5)
        assert not counts_in(other.state_dict())
        other.load_state_dict(state)
        assert counts_in(other.state_dict()) == counts_in(state)
        third, third_schedule = SCHEDULES[kind](2)
        third.load_state_dict(other.state_dict())
        assert third_schedule.state_dict() == schedule.state_dict()
    made_later = ab.TwoStage(other, 0.5, 2)  # a schedule starts anew, whatever was loaded before
    assert made_later.count == other.two_stage_count == 0


def test_a_count_that_no_schedule_of_this_loss_has():
    """No schedule of the logits' scale can drive a loss without one."""
    loss = ab.CrossEntropy(weight=torch.ones(3))
    with pytest.raises(RuntimeError, match="Unexpected key.*tla_count"):
        loss.load_state_dict(loss.state_dict() | {"tla_count": torch.tensor(1)})


def renamed(module, state_dict, prefix, *_):
    """A pre-hook that reads checkpoints of an older model, in which every name began with old_."""
    for name in [name for name in state_dict if name.startswith(prefix + "old_")]:
        state_dict[prefix + name[len(prefix + "old_") :]] = state_dict.pop(name)


def test_a_hook_changes_everything_that_is_loaded(make):
    """As for buffers: what a pre-hook of load_state_dict leaves is what is checked and loaded, also the counts."""
    source, schedule = make(2)
    steps(source, schedule, 3)
    expected, resumed = make(2), make(2)
    expected[0].load_state_dict(source.state_dict())
    old = {}
    for name, value in source.state_dict().items():
        path, _, last = name.rpartition(".")
        old[f"{path}.old_{last}" if path else f"old_{last}"] = value
    for module in resumed[0].modules():
        module.register_load_state_dict_pre_hook(renamed)
    for _ in range(2):
        resumed[0].load_state_dict(dict(old))
    assert steps(*resumed, 4) == steps(*expected, 4)
    assert all(len(module._load_state_dict_pre_hooks) == 1 for module in resumed[0].modules())


def test_a_hook_changes_a_state_that_would_be_refused():
    criterion = ab.ABLoss(lam=0.5)
    state = criterion.state_dict()
    state["log_s"].fill_(math.nan)
    with pytest.raises(RuntimeError, match="log_s: got NaN"):
        criterion.load_state_dict(state)

    def mended(module, state_dict, prefix, *_):
        state_dict[prefix + "log_s"] = state_dict[prefix + "log_s"].nan_to_num(0.25)

    handle = criterion.register_load_state_dict_pre_hook(mended)
    criterion.load_state_dict(state)
    assert float(criterion.log_s) == 0.25

    def refuses(*_):
        raise KeyError("not mine")

    criterion.register_load_state_dict_pre_hook(refuses)
    for _ in range(2):  # hooks are in their place after an error too
        with pytest.raises(KeyError, match="not mine"):
            criterion.load_state_dict(state)
    handle.remove()
    assert len(criterion._load_state_dict_pre_hooks) == 1


def test_group_dro_loads_what_a_hook_leaves():
    rule = ab.weights.GroupDRO(2)
    state = rule.state_dict()
    old = {"old_" + name: value + 0.5 for name, value in state.items()}
    rule.register_load_state_dict_pre_hook(renamed)
    rule.load_state_dict(old)
    assert all(torch.equal(value, old["old_" + name]) for name, value in rule.state_dict().items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_of_criterion_and_schedule(make, copied):
    """Loading the copy resumes the copy's schedule, and the original's stays; also if the criterion alone was copied."""
    criterion, schedule = make(2)
    later, later_schedule = make(2)
    steps(later, later_schedule, 4)
    saved, before = later.state_dict(), schedule.state_dict()
    other, other_schedule = copied((criterion, schedule))
    alone = copied(criterion)
    for module in (other, alone):
        module.load_state_dict(saved)
        assert counts_in(module.state_dict()) == counts_in(saved)
    assert other_schedule.state_dict() == later_schedule.state_dict() and schedule.state_dict() == before
    assert counts_in(criterion.state_dict()) == counts_in(make(2)[0].state_dict())
    assert steps(other, other_schedule, 2) == steps(later, later_schedule, 2)


def test_a_criterion_keeps_no_schedule_alive(make):
    """Nor does a schedule and its criterion make a circle."""
    criterion, schedule = make(2)
    found = weakref.ref(schedule)
    gc.disable()
    try:
        del schedule
        assert found() is None
    finally:
        gc.enable()
    criterion.load_state_dict(make(2)[0].state_dict())


def test_distributed_checkpoints_have_the_counts(make):
    """torch.distributed.checkpoint looks every saved name up in the module."""
    criterion, schedule = make(2)
    steps(criterion, schedule, 3)
    resumed, resumed_schedule = make(2)
    set_model_state_dict(nn.ModuleDict({"loss": resumed}), get_model_state_dict(nn.ModuleDict({"loss": criterion})))
    assert resumed_schedule.state_dict() == schedule.state_dict()
    assert steps(resumed, resumed_schedule, 2) == steps(criterion, schedule, 2)


def test_a_state_is_loaded_in_the_middle_of_a_deferred_step():
    """The schedule may switch lambda then, because the micro-batches are given up with the old state."""
    criterion = ab.ABLoss(lam=0.5, deferred=True)
    schedule = ab.TwoStage(criterion, 0.5, 1)
    first = criterion.state_dict()
    schedule.step()
    criterion(X.clone().requires_grad_(), Y).backward()
    criterion.load_state_dict(first)
    assert math.isinf(criterion.lam) and schedule.count == 0
    with pytest.raises(RuntimeError, match="a state was loaded after the micro-batches"):
        criterion.finish_(X)


# ---- another lambda than the given one --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [ab.ABLoss, ab.LinearABLoss])
@pytest.mark.parametrize("given, loaded", [(0.5, -0.7), (math.inf, 0.5), (0.5, -math.inf), (0.3, 0.3001)])
def test_another_lambda_warns_once(make, given, loaded):
    """The loaded one holds, and the warning shows both. Loading it again says nothing."""
    criterion = nn.ModuleDict({"loss": make(lam=given)})
    state = nn.ModuleDict({"loss": make(lam=loaded)}).state_dict()
    with pytest.warns(UserWarning, match=f"{make.__name__}: .*lam={loaded:g},.*lam={given:g};.*loaded one holds") as caught:
        criterion.load_state_dict(state)
    assert len(caught) == 1 and float(criterion["loss"].lam) == pytest.approx(loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion.load_state_dict(state)


def replaced(criterion):
    criterion.set_lam(0.125)
    return criterion


def past_the_milestone(criterion):
    criterion.updateLambda()
    return criterion


def used(criterion):
    criterion(torch.rand(4, requires_grad=True))
    return criterion


ORDINARY = {
    "the same": (lambda: ab.ABLoss(lam=0.3), lambda: ab.ABLoss(lam=0.3)),
    "from float64": (lambda: ab.ABLoss(lam=0.3).double(), lambda: ab.ABLoss(lam=0.3)),
    "to float64": (lambda: ab.ABLoss(lam=0.3), lambda: ab.ABLoss(lam=0.3).double()),
    "RelativeLam": (
        lambda: used(ab.ABLoss(identity, lam=ab.RelativeLam(0.5))),
        lambda: ab.ABLoss(identity, lam=ab.RelativeLam(0.5)),
    ),
    "TargetESS": (
        lambda: used(ab.ABLoss(identity, lam=ab.TargetESS(0.6))),
        lambda: ab.ABLoss(identity, lam=ab.TargetESS(0.6)),
    ),
    "open RelativeLam": (lambda: ab.ABLoss(lam=ab.RelativeLam(0.5)), lambda: ab.ABLoss(lam=ab.RelativeLam(0.5))),
    "tensor": (lambda: ab.ABLoss(lam=0.3), lambda: ab.ABLoss(lam=torch.tensor(0.5))),
    "set_lam": (lambda: ab.ABLoss(lam=0.3), lambda: replaced(ab.ABLoss(lam=0.5))),
    "compat": (lambda: past_the_milestone(compat.ABLoss(0.3)), lambda: compat.ABLoss(0.3)),
    "rule": (lambda: ab.ABLoss(rule=partial(ab.weights.term, t=3.0)),) * 2,
    "written into the tensor": (lambda: ab.ABLoss(lam=0.3), lambda: (c := ab.ABLoss(lam=0.5), c.lam.fill_(0.3))[0]),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ORDINARY)
def test_an_ordinary_resume_does_not_warn(name):
    source, target = ORDINARY[name]
    source, target = source(), target()
    target.load_state_dict(source.state_dict())
    if not isinstance(target, compat.ABLoss):
        torch.testing.assert_close(target.lam.float(), source.lam.float(), equal_nan=True)
