"""The schedules in a framework's list of learning-rate schedulers: what is asked of them, and how they step, save and resume."""

import copy
import pickle
import warnings

import pytest
import torch
from optim_cases import through_a_file
from torch.optim import lr_scheduler

import absgd_fast as ab
from absgd_fast.schedule import ChainedSchedules

COUNTS = [40, 15, 5]
WEIGHT = torch.tensor([0.25, 1.25, 1.5])
X = torch.tensor([[0.4, -1.0, 2.0], [3.0, 0.3, -0.7], [0.0, 0.1, 0.2], [-2.0, 1.0, 1.5]])
Y = torch.tensor([0, 1, 2, 2])

# of (criterion, optimizer or None): each schedule, alone and chained
MADE = {
    "two-stage": lambda criterion, o: ab.TwoStage(criterion, 0.5, 2, optimizer=o),
    "ramp": lambda criterion, o: ab.Ramp(criterion, 0.5, 3, optimizer=o),
    "drw": lambda criterion, o: ab.DRW(criterion.criterion, WEIGHT, 2, optimizer=o),
    "tla": lambda criterion, o: ab.TLA(criterion.criterion, 2, optimizer=o),
    "chained": lambda criterion, o: ChainedSchedules(ab.TwoStage(criterion, 0.5, 2), ab.TLA(criterion.criterion, 1), optimizer=o),
    "chained parts": lambda criterion, o: ChainedSchedules(
        ab.TwoStage(criterion, 0.5, 2), ab.DRW(criterion.criterion, WEIGHT, 1, optimizer=o)
    ),
}
each_schedule = pytest.mark.parametrize("make", MADE.values(), ids=MADE)


class Training:
    """A model, its criterion and its optimizer."""

    def __init__(self, lam=0.5, lr=0.25, **options):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 3)
        self.criterion = ab.ABLoss(ab.VS(COUNTS), lam=lam, **options)
        self.optimizer = ab.ABSGD(self.model.parameters(), lr=lr)

    def train(self, steps=1):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.criterion(self.model(X), Y).backward()
            self.optimizer.step()

    def result(self):
        return [*self.model.parameters(), self.criterion.log_s, self.criterion.lam, self.criterion.criterion.weight]


def assert_equal(one, other):
    for a, b in zip(one.result(), other.result()):
        assert (a is None and b is None) or torch.equal(a, b)


# ---- what frameworks ask for ----------------------------------------------------------------------------------------


@each_schedule
def test_optimizer_is_optional_and_may_be_set_later(make):
    """Lightning compares it with the optimizers of configure_optimizers, accelerate with those that it has prepared."""
    training = Training()
    schedule = make(training.criterion, None)
    assert schedule.optimizer is None and schedule.get_last_lr() == []
    schedule.optimizer = training.optimizer
    assert schedule.optimizer is training.optimizer and schedule.get_last_lr() == [0.25]
    assert make(training.criterion, training.optimizer).optimizer is training.optimizer


@each_schedule
def test_is_a_scheduler_for_those_who_check(make):
    """Lightning steps nothing but torch's classes by itself, and accelerate prepares nothing else."""
    schedule = make(Training().criterion, None)
    assert isinstance(schedule, lr_scheduler.LRScheduler)
    assert all(callable(getattr(schedule, name)) for name in ("step", "state_dict", "load_state_dict", "get_last_lr"))
    schedule._step_count += 1  # accelerate does while gradients accumulate


@each_schedule
def test_last_epoch_counts_the_calls_of_step(make):
    """From 0, as in torch; it is no setting."""
    training = Training()
    schedule, theirs = make(training.criterion, training.optimizer), lr_scheduler.StepLR(training.optimizer, 2)
    for _ in range(4):
        assert schedule.last_epoch == theirs.last_epoch
        training.optimizer.step()
        schedule.step(), theirs.step()
    with pytest.raises(AttributeError, match=rf"last_epoch: got 7, but {type(schedule).__name__} .* use load_state_dict\("):
        schedule.last_epoch = 7
    assert schedule.last_epoch == 4


@each_schedule
@pytest.mark.parametrize("lr", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_learning_rates_are_those_of_the_optimizer(make, lr):
    """Of every group and at any time; tensors as copies, as in torch."""
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": lr}, {"params": [b], "lr": 0.125}])
    schedule, decay = make(Training().criterion, optimizer), lr_scheduler.ExponentialLR(optimizer, 0.5)
    for _ in range(3):
        assert [float(rate) for rate in schedule.get_last_lr()] == [float(rate) for rate in decay.get_last_lr()]
        assert [type(rate) for rate in schedule.get_last_lr()] == [type(lr), float]
        optimizer.step()
        schedule.step(), decay.step()
    if isinstance(lr, torch.Tensor):
        schedule.get_last_lr()[0].zero_()
        assert float(optimizer.param_groups[0]["lr"]) > 0


@each_schedule
def test_the_optimizer_is_left_alone(make):
    """torch's schedulers write initial_lr into its groups, wrap its step and warn about the order of the calls."""
    training = Training()
    before = copy.deepcopy(training.optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = make(training.criterion, training.optimizer)
        for _ in range(3):
            schedule.step()
    assert training.optimizer.state_dict() == before and "step" not in vars(training.optimizer)


@each_schedule
def test_state_is_plain_and_loads_as_before(make):
    """It holds no optimizer. Checkpoints hold the counts under the keys that they always had."""
    schedule, resumed = (make(training.criterion, training.optimizer) for training in (Training(), Training()))
    for _ in range(3):
        schedule.step()
    chained = isinstance(schedule, ChainedSchedules)
    assert schedule.state_dict() == ({"parts": [{"count": 3}] * 2} if chained else {"count": 3})
    resumed.load_state_dict(through_a_file(schedule.state_dict()))
    assert resumed.last_epoch == 3


@each_schedule
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_pair(make, copied):
    training = Training()
    schedule = make(training.criterion, training.optimizer)
    schedule.step()
    *_, optimizer, other = copied((training.model, training.criterion, training.optimizer, schedule))
    assert other.optimizer is optimizer and other.last_epoch == 1
    other.step()
    assert (schedule.last_epoch, other.last_epoch) == (1, 2)


def test_chained_with_learning_rates():
    """For frameworks that take one scheduler: the optimizer is that of the first part that has one."""
    training = Training()
    decay = lr_scheduler.StepLR(training.optimizer, 1, 0.5)
    schedule = ChainedSchedules(ab.TwoStage(training.criterion, 0.5, 2), decay)
    assert schedule.optimizer is training.optimizer
    for epoch in range(4):
        assert schedule.last_epoch == epoch and schedule.get_last_lr() == decay.get_last_lr() == [0.25 * 0.5**epoch]
        assert bool(training.criterion.lam.isinf()) == (epoch < 2)
        training.train()
        schedule.step()
    assert ChainedSchedules().last_epoch == 0 and ChainedSchedules().optimizer is None


def test_chained_follows_the_optimizers_of_its_parts():
    """Also if a part gets its optimizer later. One that is given to the whole, at any time, comes first."""
    training, other = Training(), Training(lr=0.5)
    part = ab.TwoStage(training.criterion, 0.5, 2)
    inner = ChainedSchedules(ab.TLA(training.criterion.criterion, 1), part)
    schedule = ChainedSchedules(inner)
    assert schedule.optimizer is None and schedule.get_last_lr() == []
    for optimizer in (training.optimizer, other.optimizer):
        part.optimizer = optimizer
        assert schedule.optimizer is optimizer and schedule.get_last_lr() == [optimizer.param_groups[0]["lr"]]
    inner.optimizer = training.optimizer
    assert schedule.optimizer is training.optimizer and part.optimizer is other.optimizer
    schedule.optimizer = other.optimizer
    assert schedule.get_last_lr() == [0.5]
    schedule.optimizer = None
    assert schedule.get_last_lr() == [0.25]
    assert ChainedSchedules(part, optimizer=training.optimizer).optimizer is training.optimizer


def test_chained_refuses_a_schedule_that_needs_a_metric():
    """Before a step in which the parts in front of it would already have counted."""
    training = Training()
    plateau = lr_scheduler.ReduceLROnPlateau(training.optimizer)
    with pytest.raises(TypeError, match="parts: got a ReduceLROnPlateau, .*metric, so step it beside"):
        ChainedSchedules(ab.TwoStage(training.criterion, 0.5, 2), plateau)


@each_schedule
def test_torchs_sequence_is_refused_with_the_reason(make):
    """It takes back the first step of every scheduler by setting last_epoch."""
    training = Training()
    schedules = [lr_scheduler.StepLR(training.optimizer, 1), make(training.criterion, training.optimizer)]
    with pytest.raises(AttributeError, match="torch's SequentialLR sets last_epoch, so it cannot hold this schedule"):
        lr_scheduler.SequentialLR(training.optimizer, schedules, [2])
    rates = [lr_scheduler.ConstantLR(training.optimizer, 0.5), lr_scheduler.ConstantLR(training.optimizer, 1.0)]
    chained = ChainedSchedules(lr_scheduler.SequentialLR(training.optimizer, rates, [1]), schedules[1])
    training.optimizer.step(), chained.step()
    assert chained.last_epoch == schedules[1].last_epoch == 1 and chained.optimizer is training.optimizer


def test_in_torchs_chain():
    training = Training()
    schedule = ab.TwoStage(training.criterion, 0.5, 2, optimizer=training.optimizer)
    chain = lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(training.optimizer, 1, 0.5), schedule], training.optimizer)
    for _ in range(2):
        training.train()
        chain.step()
    assert chain.get_last_lr() == [0.0625] and float(training.criterion.lam) == 0.5


# ---- how they are driven --------------------------------------------------------------------------------------------


class Prepared:
    """What accelerate makes of a scheduler: it follows the optimizers, and is stepped once for each process."""

    def __init__(self, scheduler, processes=1):
        self.scheduler, self.processes = scheduler, processes

    def step(self, stepped):
        if not stepped:
            self.scheduler._step_count += 1
            return
        for _ in range(self.processes):
            if not hasattr(self.scheduler, "total_steps"):
                self.scheduler.step()


@each_schedule
@pytest.mark.parametrize("processes", [1, 2])
def test_prepared(make, processes):
    """The calls that wait for more micro-batches do not count."""
    training = Training()
    schedule = make(training.criterion, training.optimizer)
    prepared = Prepared(schedule, processes)
    for micro_batch in range(6):
        prepared.step(micro_batch % 2 == 1)
    assert schedule.last_epoch == 3 * processes


PLACES = ["with the criterion", "with the optimizer"]


def resumed_training(place, make, checkpoint=None, **options):
    """As a framework resumes: the module, its state, then configure_optimizers, then the states of optimizers and schedulers."""
    training = Training(**options)
    schedule = make(training.criterion, None) if place == PLACES[0] else None
    if checkpoint is not None:
        training.model.load_state_dict(checkpoint[0])
        training.criterion.load_state_dict(checkpoint[1])
    if schedule is None:
        schedule = make(training.criterion, training.optimizer)
    schedule.optimizer = training.optimizer
    if checkpoint is not None:
        training.optimizer.load_state_dict(checkpoint[2])
        schedule.load_state_dict(checkpoint[3])
    return training, schedule


def save(training, schedule):
    parts = training.model, training.criterion, training.optimizer, schedule
    return through_a_file([part.state_dict() for part in parts])


LATE = {  # the schedules that may be made after the criterion's state was loaded: they add no tensor to it
    "number": lambda criterion, o: ab.TwoStage(criterion, 0.5, 2, optimizer=o),
    "relative": lambda criterion, o: ab.TwoStage(criterion, ab.RelativeLam(0.5), 2, optimizer=o),
    "at once": lambda criterion, o: ab.TwoStage(criterion, ab.RelativeLam(0.5), 0, optimizer=o),
    "ramp": lambda criterion, o: ab.Ramp(criterion, 0.5, 3, optimizer=o),
    "relative ramp": lambda criterion, o: ab.Ramp(criterion, ab.RelativeLam(0.5), 3, optimizer=o),
    "tla": lambda criterion, o: ab.TLA(criterion.criterion, 2, optimizer=o),
    "chained": lambda criterion, o: ChainedSchedules(ab.TwoStage(criterion, 0.5, 2), ab.TLA(criterion.criterion, 1), optimizer=o),
    "chained ramp": lambda criterion, o: ChainedSchedules(
        ab.Ramp(criterion, 0.5, 3), ab.TLA(criterion.criterion, 1), optimizer=o
    ),
}
RESUMED = [(PLACES[0], make) for make in MADE] + [(place, make) for place in PLACES for make in LATE]


@pytest.mark.filterwarnings("ignore:ABLoss. the loaded state has lam=inf")  # where the schedule is made after loading
@pytest.mark.parametrize("place, make", RESUMED)
@pytest.mark.parametrize("options", [{}, {"init": "zero"}, {"normalizer": "none", "lr": 1e-3}], ids=str)
@pytest.mark.parametrize("saved_at", [0, 1, 2, 3])
def test_resumed_by_a_framework_is_identical(place, make, options, saved_at):
    """Also if the schedule is made in configure_optimizers, after the criterion was loaded, although it starts lambda anew."""
    if make in ("relative", "at once"):  # a criterion made with a number refuses a saved RelativeLam that is still open
        options = options | {"lam": ab.RelativeLam(0.5)}
    make = (MADE | LATE)[make]
    training, schedule = resumed_training(place, make, **options)
    for epoch in range(5):
        if epoch == saved_at:
            checkpoint = save(training, schedule)
        training.train(2)
        schedule.step()
    resumed, other = resumed_training(place, make, checkpoint, **options)
    for _ in range(saved_at, 5):
        resumed.train(2)
        other.step()
    assert_equal(resumed, training)
    assert other.state_dict() == schedule.state_dict()


def test_what_a_late_schedule_gives_back():
    """Lambda and log s of a criterion that was loaded before; nothing with another count, after a step or after another load."""
    saved, schedule = resumed_training(PLACES[0], MADE["two-stage"])
    for _ in range(3):
        saved.train(), schedule.step()
    state, log_s = copy.deepcopy(saved.criterion.state_dict()), float(saved.criterion.log_s)

    def late():
        criterion = Training().criterion
        criterion.load_state_dict(state)
        return criterion, ab.TwoStage(criterion, 0.5, 2)

    criterion, schedule = late()
    assert criterion.lam.isinf() and criterion.log_s == -float("inf")  # a new training starts anew
    schedule.load_state_dict({"count": 3})
    assert float(criterion.log_s) == log_s and float(criterion.lam) == 0.5
    criterion, schedule = late()
    schedule.load_state_dict({"count": 4})
    assert criterion.log_s == -float("inf") and float(criterion.lam) == 0.5
    criterion, schedule = late()
    schedule.step()
    schedule.load_state_dict({"count": 3})
    assert criterion.log_s == -float("inf")
    criterion, schedule = late()
    other = copy.deepcopy(state)
    other["log_s"].fill_(0.125)
    criterion.load_state_dict(other)
    schedule.load_state_dict({"count": 3})
    assert float(criterion.log_s) == 0.125


def raise_log_s(seen):
    """A pre-hook of load_state_dict that changes log s; it needs log s and the count, as in every checkpoint of the criterion."""

    def hook(module, state_dict, prefix, *_):
        seen.append(int(state_dict[prefix + "two_stage_count"]))
        state_dict[prefix + "log_s"] = state_dict[prefix + "log_s"] + 1

    return hook


@pytest.mark.parametrize("moved", [lambda c: c, lambda c: c.double()], ids=["as it is", "float64"])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("saved_at", [1, 3])
def test_hooks_of_the_criterion_run_once(moved, relative, saved_at):
    """What a late schedule gives back has been through them already, when the criterion was loaded."""
    lam = ab.RelativeLam(0.5) if relative else 0.5
    saved, schedule = resumed_training(PLACES[0], lambda criterion, o: ab.TwoStage(criterion, lam, 2), lam=lam)
    for _ in range(saved_at):
        saved.train(), schedule.step()
    saved.train()
    criterion, before, after = Training(lam=lam).criterion, [], []
    criterion.register_load_state_dict_pre_hook(raise_log_s(before))
    criterion.register_load_state_dict_post_hook(lambda *_: after.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lam=inf of the first stage
        criterion.load_state_dict(saved.criterion.state_dict())
    late = ab.TwoStage(criterion, lam, 2)
    moved(criterion)
    late.load_state_dict(schedule.state_dict())
    assert before == [saved_at] and after == [1]
    dtype = criterion.log_s.dtype
    assert torch.equal(criterion.log_s, (saved.criterion.log_s + 1).to(dtype))
    assert torch.equal(criterion.lam, saved.criterion.lam.to(dtype)) and not criterion.lam_is_open
    assert late.count == criterion.two_stage_count == saved_at


@pytest.mark.parametrize("start", [2, 5])
def test_a_late_schedule_decides_anew(start):
    """An open RelativeLam that was loaded becomes what this schedule has at its count, as if it had been made before."""
    source = ab.ABLoss(lam=ab.RelativeLam(0.5))
    schedule = ab.TwoStage(source, ab.RelativeLam(0.5), 3)
    schedule.load_state_dict({"count": 3})
    criterion = ab.ABLoss(lam=ab.RelativeLam(0.5))
    criterion.load_state_dict(source.state_dict())
    late = ab.TwoStage(criterion, 0.5, start)
    late.load_state_dict({"count": 3})
    assert float(criterion.lam) == (0.5 if start == 2 else float("inf")) and not criterion.lam_is_open


# ---- the frameworks themselves, where they are installed -------------------------------------------------------------


def batches(batch_size=2):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size)


of_lam = pytest.mark.parametrize("name", ["two-stage", "ramp"])


@of_lam
@pytest.mark.parametrize("place", PLACES)
def test_lightning(place, tmp_path, name):
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.training_of = Training()
            self.model, self.criterion = self.training_of.model, self.training_of.criterion
            self.schedule = MADE[name](self.criterion, None) if place == PLACES[0] else None

        def training_step(self, batch, _):
            return self.criterion(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = self.training_of.optimizer
            if self.schedule is None:
                self.schedule = MADE[name](self.criterion, optimizer)
            self.schedule.optimizer = optimizer
            return [optimizer], [lr_scheduler.StepLR(optimizer, 2), self.schedule]

    def fit(epochs, checkpoint=None):
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, batches(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = fit(5)
        fit(3)
        resumed = fit(5, tmp_path / "last.ckpt")
    assert whole.schedule.last_epoch == resumed.schedule.last_epoch == 5
    assert_equal(whole.training_of, resumed.training_of)


@of_lam
def test_accelerate(tmp_path, name):
    accelerate = pytest.importorskip("accelerate")

    def fit(epochs, start=None):
        training, accelerator = Training(), accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        schedule = MADE[name](training.criterion, training.optimizer)
        model, optimizer, loader, prepared = accelerator.prepare(training.model, training.optimizer, batches(1), schedule)
        assert prepared.scheduler is schedule and prepared.optimizers == [optimizer] and prepared.get_last_lr() == [0.25]
        accelerator.register_for_checkpointing(training.criterion)
        if start is not None:
            accelerator.load_state(start)
        for _ in range(epochs):
            for x, y in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(training.criterion(model(x), y))
                    optimizer.step()
                    prepared.step()
                    optimizer.zero_grad()
        accelerator.save_state(tmp_path / str(epochs))
        return training, schedule

    whole, schedule = fit(3)
    fit(1)
    resumed, other = fit(2, tmp_path / "1")
    assert schedule.last_epoch == other.last_epoch == 6  # two steps an epoch
    assert_equal(whole, resumed)
