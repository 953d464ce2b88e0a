"""RobustCallback in Lightning's Trainer: the parameters are those of the plain loop (truth.py)."""

import math
from functools import partial

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
import truth
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset
from truth import EPOCHS, wanted
from two_processes import needs_gloo

import absgd_fast as ab
from absgd_fast.integrations.lightning import RobustCallback
from absgd_fast.schedule import ChainedSchedules

# Batches of an epoch with K = 4: ten optimizer steps, and twelve of which every third has two micro-batches only.
LENGTHS = {"4,4": (8, 5), "4,4,2": (10, 4)}
QUIET = dict(devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)


class Module(pl.LightningModule):
    def __init__(self, criterion, net=None, optimizer="SGD", dtype=torch.float32, schedule=None):
        super().__init__()
        self.net, self.criterion = truth.network(dtype) if net is None else net, criterion
        self.optimizer, self.schedule, self.printed = optimizer, schedule, []

    def training_step(self, batch, batch_idx):
        loss = self.criterion(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        self.printed.append(float(self.trainer.callback_metrics.get("loss", loss)))
        return loss

    def configure_optimizers(self):
        make = truth.OPTIMIZERS[self.optimizer] if isinstance(self.optimizer, str) else self.optimizer
        optimizer = make(self.net.parameters())
        if self.schedule is None:
            return optimizer
        self.schedule.optimizer = optimizer
        return [optimizer], [self.schedule]


def loader(batches, dtype=torch.float32):
    """In the same order in every epoch, which Lightning's own sampler for several processes would not keep."""
    data = TensorDataset(*truth.samples(batches * truth.ROWS, dtype))
    sampler = DistributedSampler(data, shuffle=False) if torch.distributed.is_initialized() else None
    return DataLoader(data, batch_size=truth.ROWS, sampler=sampler)


def trainer(*callbacks, epochs=EPOCHS, **options):
    return pl.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **(QUIET | options))


def fit(module, *callbacks, batches=10, dtype=torch.float32, epochs=EPOCHS, ckpt_path=None, **options):
    trainer(*callbacks, epochs=epochs, **options).fit(module, loader(batches, dtype), ckpt_path=ckpt_path)
    return module


# ---- accumulation and clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("clip", [None, truth.CLIP])
@pytest.mark.parametrize("optimizer, dtype", truth.EXACT)
def test_training(optimizer, dtype, clip, length):
    batches, epochs = LENGTHS[length]
    want = wanted(batches, epochs=epochs, dtype=dtype, optimizer=optimizer, max_norm=clip)
    module = Module(ab.ABLoss(lam=truth.LAM).to(dtype), optimizer=optimizer, dtype=dtype)
    fit(
        module,
        RobustCallback(),
        batches=batches,
        dtype=dtype,
        epochs=epochs,
        accumulate_grad_batches=4,
        gradient_clip_val=clip,
    )
    truth.assert_same(module.net, want, dtype)
    assert float(module.criterion.log_s) == pytest.approx(float(want.log_s), rel=1e-6)


@pytest.mark.parametrize("optimizer", [ab.ABSGD, torch.optim.SGD])
def test_printed_is_the_plain_mean(optimizer):
    """What self.log of the loss shows is the plain mean of the micro-batch, and the callbacks' metrics have it."""
    module = fit(
        Module(ab.ABLoss(lam=truth.LAM), optimizer=partial(optimizer, lr=0.0)), RobustCallback(), accumulate_grad_batches=4
    )
    x, y = truth.samples(30)
    losses = torch.nn.functional.cross_entropy(truth.network()(x), y, reduction="none").view(10, truth.ROWS).mean(1)
    assert module.printed == pytest.approx(losses.tolist() * EPOCHS, rel=1e-5)


class Validated(Module):
    """It logs the criterion's value in every stage."""

    def validation_step(self, batch, batch_idx):
        self.log("held out", self.criterion(self.net(batch[0]), batch[1]))

    test_step = validation_step


@pytest.mark.parametrize("stage", ["validate", "test", "sanity check"])
def test_logged_without_a_training_is_the_plain_mean(stage):
    """Before a batch was trained on, with the state of an earlier training."""
    module = Validated(ab.ABLoss(lam=truth.LAM), optimizer=partial(torch.optim.SGD, lr=0.0))
    module.criterion.load_state_dict({**module.criterion.state_dict(), "log_s": torch.tensor(-2.0)})
    x, y = truth.samples(20, seed=5)
    mean = torch.nn.functional.cross_entropy(truth.network()(x), y).item()
    data, seen = DataLoader(TensorDataset(x, y), batch_size=20), []

    class See(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            seen.append(trainer.callback_metrics["held out"])

    if stage == "sanity check":
        trainer(RobustCallback(), See(), epochs=1, num_sanity_val_steps=1).fit(module, loader(1), data)
    else:
        seen += [getattr(trainer(RobustCallback()), stage)(module, data, verbose=False)[0]["held out"]]
    assert [float(value) for value in seen] == pytest.approx([mean], rel=1e-5)


def test_accumulation_that_changes():
    """Lightning's GradientAccumulationScheduler: one micro-batch in the first epoch, then five, then two."""
    module = Module(ab.ABLoss(lam=truth.LAM))
    fit(module, GradientAccumulationScheduler({0: 1, 1: 5, 3: 2}), RobustCallback(), gradient_clip_val=0.1)
    truth.assert_same(module.net, wanted(k=[1, 5, 5, 2], max_norm=0.1))


class WithATerm(Module):
    """A second term in the loss, where nothing accumulates."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        alone = self.trainer.accumulate_grad_batches == 1
        return loss + 0.1 * sum((p**2).sum() for p in self.net.parameters()) if alone else loss


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("k", [[1, 1, 1, 1], [4, 4, 1, 1], [1, 4, 1, 4]], ids=str)
def test_another_term_without_accumulation(k, deferred):
    """With one micro-batch the criterion is not deferred, whatever it was before, so nothing multiplies the other term."""
    dtype, net, log_s = torch.float64, truth.network(torch.float64), -math.inf
    module = WithATerm(ab.ABLoss(lam=truth.LAM, deferred=deferred).to(dtype), dtype=dtype)
    fit(module, GradientAccumulationScheduler(dict(enumerate(k))), RobustCallback(), dtype=dtype)
    optimizer = truth.OPTIMIZERS["SGD"](net.parameters())
    for size in k:
        for batch in truth.big_batches(truth.samples(30, dtype), 10, size, 1):
            optimizer.zero_grad()
            losses = truth.cross_entropy(net, batch)
            weights, log_s = ab.reference.robust_weights(losses.detach(), log_s, truth.LAM)
            term = 0.1 * sum((p**2).sum() for p in net.parameters()) if size == 1 else 0.0
            ((weights * losses).mean() + term).backward()
            optimizer.step()
    truth.assert_same(module.net, net, dtype)


@pytest.mark.parametrize("first", [False, True])
def test_other_callbacks_see_normalised_gradients(first):
    """Wherever they stand in the list. Their own order stays."""
    norms, robust = [], RobustCallback()

    class Norm(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            norms.append(float(nn.utils.clip_grad_norm_(pl_module.net.parameters(), math.inf)))

    run = trainer(*([robust, Norm()] if first else [Norm(), robust]), accumulate_grad_batches=4, enable_progress_bar=True)
    others = [callback for callback in run.callbacks if callback is not robust]
    run.fit(Module(ab.ABLoss(lam=truth.LAM)), loader(10))
    assert norms == pytest.approx(wanted().norms, rel=1e-4)
    assert [callback for callback in run.callbacks if callback is not robust] == others


def test_clipping_by_value():
    module = Module(ab.ABLoss(lam=truth.LAM))
    fit(module, RobustCallback(), accumulate_grad_batches=4, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    net, log_s = truth.network(), -math.inf
    optimizer = truth.OPTIMIZERS["SGD"](net.parameters())
    for batch in truth.big_batches(truth.samples(30), 10, 4, EPOCHS):
        optimizer.zero_grad()
        losses = truth.cross_entropy(net, batch)
        weights, log_s = ab.reference.robust_weights(losses.detach(), log_s, truth.LAM)
        (weights * losses).mean().backward()
        nn.utils.clip_grad_value_(net.parameters(), 0.01)
        optimizer.step()
    truth.assert_same(module.net, net)


@pytest.mark.parametrize("make", [ab.ABSGD, torch.optim.SGD], ids=["ABSGD", "SGD"])
@pytest.mark.parametrize("clip", [None, truth.CLIP])
def test_bfloat16(make, clip):
    """bf16-mixed with clipping, and with our optimizer too. Beside it the same Trainer with one big batch and no callback."""
    nets = []
    for k in (1, 4):
        module = Module(ab.ABLoss(lam=truth.LAM), optimizer=partial(make, lr=0.1, momentum=0.9))
        data = DataLoader(TensorDataset(*truth.samples(24)), batch_size=12 // k)
        callbacks = [] if k == 1 else [RobustCallback()]
        trainer(*callbacks, precision="bf16-mixed", accumulate_grad_batches=k, gradient_clip_val=clip).fit(module, data)
        nets.append(module.net)
    assert truth.distance(*nets) <= 5e-3 < truth.distance(nets[0], truth.network())


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("clip", [None, truth.CLIP])
def test_robust_in_the_optimizer(clip, k):
    """The optimizer's own step may normalise, and clip after that. Its criterion is deferred with one micro-batch too."""
    criterion = ab.ABLoss(lam=truth.LAM, deferred=True)
    options = dict(lr=0.1, momentum=0.9, weight_decay=1e-3, robust=criterion, max_norm=clip)
    module = Module(criterion, optimizer=partial(ab.ABSGD, **options))
    fit(module, RobustCallback(), epochs=k, accumulate_grad_batches=k)
    truth.assert_same(module.net, wanted(k=k, epochs=k, max_norm=clip))
    assert criterion.deferred


def test_linear_loss():
    """LinearABLoss makes the head's gradients itself."""

    class Headless(Module):
        def training_step(self, batch, batch_idx):
            head = self.net[-1]
            return self.criterion(self.net[:-1](batch[0]), head.weight, batch[1], head.bias)

    module = fit(
        Headless(ab.LinearABLoss(lam=truth.LAM)), RobustCallback(), accumulate_grad_batches=4, gradient_clip_val=truth.CLIP
    )
    truth.assert_same(module.net, wanted(max_norm=truth.CLIP))


def test_the_package_pytorch_lightning():
    """The older name of Lightning, with classes of its own."""

    class Older(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.criterion = truth.network(), ab.ABLoss(lam=truth.LAM)

        training_step = lambda self, batch, batch_idx: self.criterion(self.net(batch[0]), batch[1])  # noqa: E731
        configure_optimizers = lambda self: truth.OPTIMIZERS["SGD"](self.parameters())  # noqa: E731

    module = Older()
    options = dict(accelerator="cpu", max_epochs=EPOCHS, accumulate_grad_batches=4, gradient_clip_val=truth.CLIP)
    pytorch_lightning.Trainer(callbacks=[RobustCallback()], **options, **QUIET).fit(module, loader(10))
    truth.assert_same(module.net, wanted(max_norm=truth.CLIP))


def test_a_criterion_outside_of_the_module(tmp_path):
    """It is given to the callback, which saves it."""
    criterion = ab.ABLoss(lam=truth.LAM)

    class Outside(Module):
        def training_step(self, batch, batch_idx):
            return criterion(self.net(batch[0]), batch[1])

    run = trainer(RobustCallback(criterion=criterion), accumulate_grad_batches=4)
    module = Outside(None)
    run.fit(module, loader(10))
    truth.assert_same(module.net, wanted())
    run.save_checkpoint(tmp_path / "saved.ckpt")
    fresh = ab.ABLoss(lam=truth.LAM)
    callback = RobustCallback(criterion=fresh)
    trainer(callback, epochs=EPOCHS).fit(Outside(None), loader(10), ckpt_path=tmp_path / "saved.ckpt")
    assert fresh.log_s == criterion.log_s


@pytest.mark.parametrize("k", [1, 4])
def test_a_bad_step_is_passed_over(k):
    """A NaN in one micro-batch: with accumulation the whole step is skipped, and the training goes on without it."""
    x, y = truth.samples(24)
    x[13] = math.nan
    module = Module(ab.ABLoss(lam=truth.LAM))
    data = DataLoader(TensorDataset(x, y), batch_size=12 // k)
    trainer(RobustCallback(), epochs=1, accumulate_grad_batches=k, gradient_clip_val=truth.CLIP).fit(module, data)
    assert module.criterion.nonfinite_batches == 1
    if k == 4:
        truth.assert_same(module.net, truth.train(truth.network(), [(x[:12], y[:12])], max_norm=truth.CLIP))


def with_skipped(skipped):
    class Skips(Module):
        """Returns None for some micro-batches, as one does where the loss is NaN. The criterion has seen them by then."""

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in skipped else loss

    return Skips


@pytest.mark.parametrize("by", ["callback", "optimizer"])
@pytest.mark.parametrize("nan", [False, True], ids=["finite", "NaN"])
@pytest.mark.parametrize("skipped", [(0,), (1,), (0, 1), (3,), (2, 5, 9), (4, 5, 6, 7), (8, 9)], ids=str)
def test_a_training_step_that_returns_none(skipped, nan, by):
    """Its micro-batch does not count: the first, a middle one, the last, and all of a step. Lightning divides by 4 as before."""
    dtype = torch.float64
    x, y = truth.samples(30, dtype)
    rows = [i for i in range(30) if i // truth.ROWS not in skipped]
    groups = [[i for i in rows if i // truth.ROWS // 4 == group] for group in range(3)]
    want = truth.train(truth.network(dtype), [(x[g], y[g]) for _ in range(2) for g in groups if g], max_norm=0.1)
    if nan:
        for batch in skipped:
            x[batch * truth.ROWS] = math.nan
    criterion = ab.ABLoss(lam=truth.LAM, deferred=by == "optimizer").to(dtype)
    options = dict(lr=0.1, momentum=0.9, weight_decay=1e-3, robust=criterion, max_norm=0.1)
    make = "SGD" if by == "callback" else partial(ab.ABSGD, **options)
    module = with_skipped(skipped)(criterion, optimizer=make, dtype=dtype)
    data = DataLoader(TensorDataset(x, y), batch_size=truth.ROWS)
    clip = 0.1 if by == "callback" else None
    trainer(RobustCallback(), epochs=2, accumulate_grad_batches=4, gradient_clip_val=clip).fit(module, data)
    truth.assert_same(module.net, want, dtype)
    assert float(criterion.log_s) == pytest.approx(float(want.log_s), rel=1e-12) and criterion.nonfinite_batches == 0


def test_a_rule_weighs_each_micro_batch():
    """As without the callback: Lightning's mean over the micro-batches."""
    nets = []
    for callbacks in ([], [RobustCallback()]):
        module = Module(ab.ABLoss(rule=partial(ab.weights.cvar, beta=0.5)))
        nets.append(fit(module, *callbacks, accumulate_grad_batches=4).net)
    assert truth.distance(*nets) == 0


# ---- schedules and checkpoints -----------------------------------------------------------------------------------------------


def in_the_second_half(step, steps_of_an_epoch=3):
    return math.inf if step < 2 * steps_of_an_epoch else truth.LAM


def two_stage(way, unit="epoch", make=ab.TwoStage):
    """A module and its callbacks, with lambda from the third epoch on. way: who steps the schedule."""
    criterion = ab.ABLoss(lam=truth.LAM)
    schedule = make(criterion, truth.LAM, 2 if unit == "epoch" else 6, unit)
    if way == "callback":
        return Module(criterion), [RobustCallback(schedule)]
    return Module(criterion, schedule=schedule), [RobustCallback()]


@pytest.mark.parametrize("way, unit", [("callback", "epoch"), ("callback", "step"), ("scheduler", "epoch")])
def test_schedule(way, unit):
    """Stepped by the callback, or by Lightning itself if configure_optimizers returns it."""
    module, callbacks = two_stage(way, unit)
    fit(module, *callbacks, accumulate_grad_batches=4, gradient_clip_val=0.1)
    truth.assert_same(module.net, wanted(lam=in_the_second_half, max_norm=0.1))


class Stream(IterableDataset):
    """Samples without a length."""

    def __iter__(self):
        return zip(*truth.samples(30))


@pytest.mark.parametrize("limit", [6, 1.0])
@pytest.mark.parametrize("data", ["list", "stream"])
def test_schedule_follows_the_end_of_an_epoch(data, limit):
    """limit_train_batches ends an epoch before the loader does; a stream ends where nobody knows."""
    module, callbacks = two_stage("callback")
    data = loader(10) if data == "list" else DataLoader(Stream(), batch_size=truth.ROWS)
    trainer(*callbacks, accumulate_grad_batches=4, limit_train_batches=limit).fit(module, data)
    assert callbacks[0].schedule.count == EPOCHS


def test_the_callback_saves_the_schedule():
    """Parts of it may drive what no checkpoint of the module has."""
    states = []
    for steps in (3, 0):
        optimizer = torch.optim.SGD(truth.network().parameters(), lr=1.0)
        decay = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
        criterion = ab.ABLoss(lam=truth.LAM)
        callback = RobustCallback(ChainedSchedules(decay, ab.TwoStage(criterion, lam=truth.LAM, start=2)), criterion=criterion)
        for _ in range(steps):
            optimizer.step()
            callback.schedule.step()
        if states:
            callback.load_state_dict(states[0])
        states.append(callback.state_dict())
    assert states[0]["schedule"] == states[1]["schedule"] and decay.last_epoch == 3 and criterion.lam == truth.LAM


@pytest.mark.parametrize("way", ["callback", "scheduler"])
@pytest.mark.parametrize("make", [ab.TwoStage, ab.Ramp])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume(way, stop, make, tmp_path):
    """Saved at the end of an epoch, before, at and after the switch of lambda: the same bits as without the interruption."""
    options = dict(accumulate_grad_batches=4, gradient_clip_val=0.1)
    module, callbacks = two_stage(way, make=make)
    whole = fit(module, *callbacks, **options)

    module, callbacks = two_stage(way, make=make)
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(module, *callbacks, keep, epochs=stop, enable_checkpointing=True, **options)
    module, callbacks = two_stage(way, make=make)
    fit(module, *callbacks, ckpt_path=tmp_path / "last.ckpt", **options)
    assert truth.distance(module.net, whole.net) == 0
    assert module.criterion.log_s == whole.criterion.log_s and module.criterion.lam == truth.LAM


def test_resume_in_the_middle_of_an_epoch(tmp_path):
    """Saved after a number of optimizer steps, with a schedule that counts them."""
    options = dict(accumulate_grad_batches=2, gradient_clip_val=0.1, epochs=1)
    module, callbacks = two_stage("callback", "step")
    whole = fit(module, *callbacks, batches=20, **options)

    module, callbacks = two_stage("callback", "step")
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    fit(module, *callbacks, keep, batches=20, enable_checkpointing=True, **options)
    module, callbacks = two_stage("callback", "step")
    path = tmp_path / "step=7.ckpt"
    assert torch.load(path, weights_only=False)["callbacks"]["RobustCallback"]["schedule"] == {"count": 7}
    data = DataLoader(TensorDataset(*(t[14 * truth.ROWS :] for t in truth.samples(20 * truth.ROWS))), batch_size=truth.ROWS)
    trainer(*callbacks, **options).fit(module, data, ckpt_path=path)  # the data that are left, as a resumable loader gives them
    assert callbacks[0].schedule.count == 10
    assert module.criterion.lam == truth.LAM
    assert truth.distance(module.net, whole.net) == 0


# ---- averages of weights -----------------------------------------------------------------------------------------------------


class Record(pl.Callback):
    """log s at the end of each epoch."""

    def __init__(self):
        self.log_s = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.log_s.append(float(pl_module.criterion.log_s))


AVERAGES = {
    "EMA": lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=1),
    "average": WeightAveraging,
    "SWA": lambda: StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=EPOCHS - 1, annealing_epochs=1),
}


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_leave_the_state_alone(name, k):
    """log s and lambda are those of the training, and the schedule is stepped, whatever averages the weights (S8).

    SWA adds an epoch without backward, for the statistics of batch norm.
    """
    states = []
    for callbacks in ([AVERAGES[name]()], []):
        module, ours = two_stage("callback")
        module.net.append(nn.BatchNorm1d(truth.CLASSES))
        record = Record()
        fit(module, *ours, *callbacks, record, accumulate_grad_batches=k)
        assert module.criterion.lam == truth.LAM and module.criterion.nonfinite_batches == 0
        assert math.isfinite(module.criterion.log_s)
        states.append(record.log_s)
    averaged, plain = states
    if name == "SWA":  # it has a learning rate of its own in the last epoch, and one more epoch
        assert averaged[: EPOCHS - 1] == plain[: EPOCHS - 1] and len(averaged) == EPOCHS + 1
        assert averaged[EPOCHS] == averaged[EPOCHS - 1] and module.criterion.training
    else:
        assert averaged == plain


# ---- what goes wrong silently elsewhere --------------------------------------------------------------------------------------


def test_a_given_loss_divisor_does_no_harm():
    """S3: the callback knows by what Lightning divides, so a number given to the criterion changes nothing."""
    module = fit(Module(ab.ABLoss(lam=truth.LAM, deferred=True, loss_divisor=7)), RobustCallback(), accumulate_grad_batches=4)
    truth.assert_same(module.net, wanted())
    assert module.printed[0] == pytest.approx(float(module.printed[10]), rel=0.5)


def test_a_step_that_nobody_finishes():
    """S5: deferred without the callback."""
    with pytest.raises(RuntimeError, match=r"expected criterion\.finish_\(params\) before optimizer\.step"):
        fit(Module(ab.ABLoss(lam=truth.LAM, deferred=True)), accumulate_grad_batches=4)


def test_resume_without_the_callback(tmp_path):
    """S6: the criterion of the module carries TwoStage's count, so even a schedule that the user steps himself resumes."""

    class ByHand(Module):
        def on_train_epoch_end(self):
            self.by_hand.step()

    def make():
        module = ByHand(ab.ABLoss(lam=truth.LAM))
        module.by_hand = ab.TwoStage(module.criterion, lam=truth.LAM, start=2)
        return module

    whole = fit(make())
    fit(make(), ModelCheckpoint(dirpath=tmp_path, save_last=True), epochs=3, enable_checkpointing=True)
    resumed = make()
    fit(resumed, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.criterion.lam == truth.LAM
    assert truth.distance(resumed.net, whole.net) == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """S7: around the model and the criterion."""

    class Checkpointed(Module):
        def training_step(self, batch, batch_idx):
            loss_of = lambda x: self.criterion(self.net(x), batch[1])  # noqa: E731
            return checkpoint(loss_of, batch[0].requires_grad_(), use_reentrant=reentrant)

    module = fit(
        Checkpointed(ab.ABLoss(lam=truth.LAM)), RobustCallback(), accumulate_grad_batches=4, gradient_clip_val=truth.CLIP
    )
    truth.assert_same(module.net, wanted(max_norm=truth.CLIP))


# ---- what is refused ---------------------------------------------------------------------------------------------------------


def of(criterion=None, **options):
    return lambda: (Module(ab.ABLoss(lam=truth.LAM, **options) if criterion is None else criterion()), [RobustCallback()], {})


def with_another_schedule():
    return Module(ab.ABLoss(lam=1.0)), [RobustCallback(ab.TwoStage(ab.ABLoss(lam=1.0), lam=1.0, start=1))], {}


def with_a_schedule_twice():
    module, _ = two_stage("scheduler")
    return module, [RobustCallback(module.schedule)], {}


def with_robust_and_clipping():
    criterion = ab.ABLoss(lam=truth.LAM, deferred=True)
    return Module(criterion, optimizer=partial(ab.ABSGD, robust=criterion)), [RobustCallback()], {"gradient_clip_val": 1.0}


def by_hand():
    module = Module(ab.ABLoss(lam=truth.LAM))
    module.automatic_optimization = False
    return module, [RobustCallback()], {"accumulate_grad_batches": 1}


def with_two_criteria():
    class Two(Module):
        def training_step(self, batch, batch_idx):
            logits = self.net(batch[0])
            return self.criterion[0](logits, batch[1]) + self.criterion[1](logits, batch[1])

    return Two(nn.ModuleList([ab.ABLoss(lam=1.0), ab.ABLoss(lam=2.0)])), [RobustCallback()], {}


def with_lbfgs(k):
    make = partial(torch.optim.LBFGS, max_iter=3)
    return lambda: (Module(ab.ABLoss(lam=truth.LAM), optimizer=make), [RobustCallback()], {"accumulate_grad_batches": k})


REFUSED = {
    "LBFGS": (with_lbfgs(1), ValueError, "got LBFGS, which runs training_step several times in one optimizer step"),
    "LBFGS that accumulates": (with_lbfgs(4), ValueError, "got LBFGS, which runs training_step several times"),
    "no criterion": (of(nn.CrossEntropyLoss), ValueError, r"Module has no ABLoss; expected one as an attribute"),
    "mix": (of(mix=1.0), ValueError, "mix: got 1 with deferred=True"),
    "another schedule": (with_another_schedule, ValueError, "schedule: got a TwoStage of a criterion that this training"),
    "schedule twice": (with_a_schedule_twice, ValueError, "would be stepped twice"),
    "robust= and clipping": (with_robust_and_clipping, ValueError, r"gradient_clip_val: got 1\.0 .* leave robust= out"),
    "manual optimization": (by_hand, RuntimeError, r"automatic_optimization=False.*call criterion\.finish_\(params\)"),
    "two criteria": (with_two_criteria, RuntimeError, "got 2 deferred criteria in one optimizer step, expected one"),
}


@pytest.mark.parametrize("make, error, match", REFUSED.values(), ids=REFUSED)
def test_refused(make, error, match):
    module, callbacks, options = make()
    with pytest.raises(error, match=match):
        fit(module, *callbacks, **{"accumulate_grad_batches": 4, **options})


def test_not_a_criterion():
    match = r"criterion: got CrossEntropyLoss, expected an ABLoss or LinearABLoss, or None: such as ABLoss\(loss, lam=\.\.\.\)"
    with pytest.raises(TypeError, match=match):
        RobustCallback(criterion=nn.CrossEntropyLoss())


def test_what_cannot_be_deferred_serves_without_accumulation():
    """Also two criteria and other terms of the loss."""
    module, callbacks, _ = with_two_criteria()
    fit(module, *callbacks)
    fit(Module(ab.ABLoss(lam=truth.LAM, mix=1.0)), RobustCallback())


# ---- two processes -----------------------------------------------------------------------------------------------------------


def of_two_processes(rank, tmp_path):
    """Every process sees the parameters of the plain loop, which has the samples of both in one batch."""
    options = dict(accumulate_grad_batches=4, gradient_clip_val=truth.CLIP, devices=2, strategy="ddp")
    for (optimizer, dtype), batches in zip(truth.EXACT, (10, 10, 8), strict=True):
        tensors = truth.samples(2 * batches * truth.ROWS, dtype)
        want = truth.train(
            truth.network(dtype), truth.big_batches(tensors, batches, 4, EPOCHS, processes=2), optimizer, max_norm=truth.CLIP
        )
        module = Module(ab.ABLoss(lam=truth.LAM).to(dtype), optimizer=optimizer, dtype=dtype)
        fit(module, RobustCallback(), batches=2 * batches, dtype=dtype, **options)
        truth.assert_same(module.net, want, dtype)
        x, y = (t[: 2 * truth.ROWS] for t in tensors)  # the first micro-batches of both
        mean = torch.nn.functional.cross_entropy(truth.network(dtype)(x), y)
        assert module.printed[0] == pytest.approx(float(mean), rel=1e-5)

    module, callbacks = two_stage("callback")
    whole = fit(module, *callbacks, batches=20, **options)
    module, callbacks = two_stage("callback")
    keep = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit(module, *callbacks, keep, batches=20, epochs=3, enable_checkpointing=True, **options)
    module, callbacks = two_stage("callback")
    fit(module, *callbacks, batches=20, ckpt_path=tmp_path / "last.ckpt", **options)
    assert truth.distance(module.net, whole.net) == 0
    assert module.criterion.log_s == whole.criterion.log_s and module.criterion.lam == truth.LAM


@needs_gloo
def test_two_processes(tmp_path):
    truth.in_two_processes(of_two_processes, tmp_path, tmp_path)
