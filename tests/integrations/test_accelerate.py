"""Robust in a loop with an Accelerator: the parameters are those of the plain loop (truth.py)."""

import math

import pytest
import torch
import truth
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from truth import EPOCHS, wanted
from two_processes import needs_gloo

import absgd_fast as ab
from absgd_fast.integrations.accelerate import Robust
from absgd_fast.schedule import ChainedSchedules

LENGTHS = {"4,4": (8, 5), "4,4,2": (10, 4)}  # batches of an epoch with K = 4, and epochs: ten and twelve optimizer steps


def forget():
    """Accelerate keeps its state in class attributes. The group of two processes stays."""
    for state in (AcceleratorState, GradientState):
        state._reset_state()
    if not torch.distributed.is_initialized():
        PartialState._reset_state()


class Loop:
    """The loop of the documentation."""

    def __init__(
        self,
        k=4,
        *,
        dtype=torch.float32,
        optimizer="SGD",
        batches=10,
        clip=None,
        start=None,
        criterion=None,
        scaler=False,
        **given,
    ):
        forget()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=k, **given)
        self.criterion = ab.ABLoss(lam=truth.LAM).to(dtype) if criterion is None else criterion
        self.schedule = None if start is None else ab.TwoStage(self.criterion, lam=truth.LAM, start=start)
        net = truth.network(dtype)
        make = truth.OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
        rows = batches * truth.ROWS * self.accelerator.num_processes
        loader = DataLoader(TensorDataset(*truth.samples(rows, dtype)), batch_size=truth.ROWS)
        self.model, self.loader = self.accelerator.prepare(net, loader)
        if scaler:  # as with mixed_precision="fp16" on a GPU, which Accelerate refuses on the CPU; the model stays float32
            self.accelerator.scaler, self.accelerator.native_amp = torch.amp.GradScaler("cpu"), True
            self.accelerator.state._mixed_precision = "fp16"
        self.optimizer = self.accelerator.prepare(make(net.parameters()))
        self.robust = Robust(self.accelerator, self.criterion, self.schedule)
        self.clip, self.printed, self.norms = clip, [], []

    @property
    def net(self):
        return self.accelerator.unwrap_model(self.model)

    def loss(self, x, y):
        return self.criterion(self.model(x), y)

    def run(self, epochs=EPOCHS):
        for _ in range(epochs):
            for x, y in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = self.loss(x, y)
                    self.accelerator.backward(loss)
                    norm = self.robust.finish(self.model, max_norm=self.clip)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                self.printed.append(float(loss.detach()))
                if norm is not None:
                    self.norms.append(float(norm))
            if self.schedule is not None:
                self.schedule.step()
        return self


# ---- accumulation and clipping -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("clip", [None, truth.CLIP])
@pytest.mark.parametrize("optimizer, dtype", truth.EXACT)
def test_training(optimizer, dtype, clip, length):
    batches, epochs = LENGTHS[length]
    want = wanted(batches, epochs=epochs, dtype=dtype, optimizer=optimizer, max_norm=clip)
    loop = Loop(dtype=dtype, optimizer=optimizer, batches=batches, clip=clip).run(epochs)
    truth.assert_same(loop.net, want, dtype)
    assert loop.norms == ([] if clip is None else pytest.approx(want.norms, rel=1e-5))
    assert float(loop.criterion.log_s) == pytest.approx(float(want.log_s), rel=1e-6)


@pytest.mark.parametrize("k", [1, 4])
def test_printed_is_the_plain_mean(k):
    """The value of the criterion is the plain mean of the micro-batch."""
    loop = Loop(k, optimizer=lambda params: torch.optim.SGD(params, lr=0.0)).run(1)
    x, y = truth.samples(30)
    losses = torch.nn.functional.cross_entropy(truth.network()(x), y, reduction="none").view(10, truth.ROWS).mean(1)
    assert loop.printed == pytest.approx(losses.tolist(), rel=1e-5)


@pytest.mark.parametrize("make", [torch.optim.SGD, ab.ABSGD], ids=["SGD", "ABSGD with robust="])
def test_a_criterion_without_accumulation(make):
    """It is not deferred, whatever it was before. An optimizer that has it as robust= then uses the gradients as they are."""
    criterion = ab.ABLoss(lam=truth.LAM, deferred=True)
    options = dict(lr=0.1, momentum=0.9, weight_decay=1e-3) | ({"robust": criterion} if make is ab.ABSGD else {})
    loop = Loop(1, criterion=criterion, optimizer=lambda params: make(params, **options), clip=0.02).run(1)
    assert not criterion.deferred
    truth.assert_same(loop.net, wanted(k=1, epochs=1, max_norm=0.02))


def test_groups_that_span_epochs():
    """sync_with_dataloader=False: 40 micro-batches are ten steps."""
    from accelerate.utils import GradientAccumulationPlugin

    plugin = GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)
    x, y = (torch.cat([t] * EPOCHS).split(4 * truth.ROWS) for t in truth.samples(30))
    want = truth.train(truth.network(), zip(x, y, strict=True), max_norm=0.1)
    loop = Loop(1, clip=0.1, gradient_accumulation_plugin=plugin)
    truth.assert_same(loop.run().net, want)


def test_bfloat16():
    """Beside it the same precision with one big batch."""
    small = Loop(4, clip=truth.CLIP, mixed_precision="bf16", batches=8).run(2)
    big = truth.network()
    optimizer, criterion = truth.OPTIMIZERS["SGD"](big.parameters()), ab.ABLoss(lam=truth.LAM)
    for x, y in truth.big_batches(truth.samples(24), 8, 4, 2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = big(x)
        criterion(logits.float(), y).backward()
        nn.utils.clip_grad_norm_(big.parameters(), truth.CLIP)
        optimizer.step()
    assert truth.distance(small.net, big) <= 5e-3 < truth.distance(big, truth.network())


@pytest.mark.parametrize("scaler", [False, True])
def test_a_bad_step_is_passed_over(scaler):
    """A NaN in one micro-batch spoils its whole step, and the norm says so."""
    loop = Loop(clip=truth.CLIP, batches=8, scaler=scaler)
    loop.loader.dataset.tensors[0][7 * truth.ROWS] = math.nan
    loop.run(1)
    x, y = truth.samples(24)
    truth.assert_same(loop.net, truth.train(truth.network(), [(x[:12], y[:12])], max_norm=truth.CLIP))
    assert math.isnan(loop.norms[1]) and loop.criterion.nonfinite_batches == 1


def test_a_bad_step_of_a_gpu(monkeypatch):
    """There `finish_` leaves NaN in the gradients, because it does not wait. An optimizer must not step them."""

    def finish_(params):
        for p in params:
            p.grad.fill_(math.nan)
        loop.criterion.discard()
        return torch.tensor(False)

    loop = Loop(batches=4)
    monkeypatch.setattr(loop.criterion, "finish_", finish_)
    assert truth.distance(loop.run(1).net, truth.network()) == 0


@pytest.mark.parametrize("clip", [None, truth.CLIP])
@pytest.mark.parametrize("make", [ab.ABSGD, torch.optim.SGD], ids=["ABSGD", "SGD"])
def test_gradscaler(make, clip):
    """The gradients are unscaled before they are normalised and clipped, and once only."""
    loop = Loop(clip=clip, optimizer=lambda params: make(params, lr=0.1, momentum=0.9, weight_decay=1e-3), scaler=True).run()
    want = wanted(max_norm=clip)
    truth.assert_same(loop.net, want)
    assert clip is None or loop.norms == pytest.approx(want.norms, rel=1e-5)


def test_a_rule_weighs_each_micro_batch():
    """Accelerate's mean over the micro-batches is left alone."""
    loop = Loop(4, criterion=ab.ABLoss(rule=ab.weights.GroupDRO(2)))
    assert not loop.criterion.deferred


# ---- checkpoints -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resume(stop, tmp_path):
    """save_state and load_state carry criterion and schedule: the same bits as without the interruption."""
    options = dict(clip=0.1, start=2)
    whole = Loop(**options).run()
    steps = lambda epoch: math.inf if epoch < 6 else truth.LAM  # noqa: E731  # three in an epoch
    truth.assert_same(whole.net, wanted(lam=steps, max_norm=0.1))
    first = Loop(**options).run(stop)
    first.accelerator.save_state(tmp_path)
    second = Loop(**options)
    second.accelerator.load_state(tmp_path)
    second.run(EPOCHS - stop)
    assert truth.distance(second.net, whole.net) == 0
    assert second.criterion.log_s == whole.criterion.log_s and second.criterion.lam == truth.LAM
    assert second.schedule.count == EPOCHS


# ---- what goes wrong silently elsewhere --------------------------------------------------------------------------------------


def test_a_given_loss_divisor_does_no_harm():
    """S3: Robust knows by what Accelerate divides."""
    loop = Loop(criterion=ab.ABLoss(lam=truth.LAM, deferred=True, loss_divisor=7), clip=truth.CLIP).run()
    truth.assert_same(loop.net, wanted(max_norm=truth.CLIP))


def test_a_step_that_nobody_finishes():
    """S5: the loop without `finish`."""
    loop = Loop()
    loop.robust.finish = lambda model, max_norm: None
    with pytest.raises(RuntimeError, match=r"expected criterion\.finish_\(params\) before optimizer\.step"):
        loop.run()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """S7: around the model and the criterion."""
    loop = Loop(clip=truth.CLIP)
    loop.loss = lambda x, y: checkpoint(lambda x: loop.criterion(loop.model(x), y), x.requires_grad_(), use_reentrant=reentrant)
    truth.assert_same(loop.run().net, wanted(max_norm=truth.CLIP))


def test_averages_leave_the_state_alone():
    """S8: torch's averages with buffers, of a model that contains its criterion."""
    loop = Loop()
    both = nn.ModuleDict({"net": loop.net, "criterion": loop.criterion})
    average = torch.optim.swa_utils.AveragedModel(both, use_buffers=True)
    for _ in range(3):
        loop.run(1)
        average.update_parameters(both)
    assert math.isfinite(loop.criterion.log_s) and not average.module["criterion"].log_s.isnan()
    truth.assert_same(loop.net, wanted(epochs=3))


def test_a_copy_before_lambda_is_fixed():
    """RelativeLam: a copy that is made before the first batch does not learn what the training has fixed, as the page says."""
    loop = Loop(criterion=ab.ABLoss(lam=ab.RelativeLam(truth.LAM)))
    both = nn.ModuleDict({"net": loop.net, "criterion": loop.criterion})
    average = torch.optim.swa_utils.AveragedModel(both)
    loop.run(1)
    average.update_parameters(both)
    assert loop.criterion.lam.isfinite() and average.module["criterion"].lam.isnan()


# ---- what is refused ---------------------------------------------------------------------------------------------------------


def test_refused():
    accelerator = Accelerator(cpu=True)
    of_samples = r"expected an ABLoss or LinearABLoss: such as ABLoss\(loss, lam=\.\.\.\) .* reduction='none'"
    for loss in (nn.CrossEntropyLoss(), ab.CrossEntropy(), nn.functional.cross_entropy):
        with pytest.raises(TypeError, match=f"criterion: got {type(loss).__name__}, {of_samples}"):
            Robust(accelerator, loss)
    Robust(accelerator, ab.ABLoss(nn.CrossEntropyLoss(reduction="none"), lam=truth.LAM))  # as the error says
    with pytest.raises(TypeError, match="the criterion itself, and not what Accelerator.prepare, DDP or torch.compile"):
        Robust(accelerator, torch.compile(ab.ABLoss(lam=truth.LAM)))
    with pytest.raises(ValueError, match="mix: got 1 with deferred=True"):
        Loop(criterion=ab.ABLoss(lam=truth.LAM, mix=1.0))
    loop = Loop(1)
    loop.accelerator.gradient_accumulation_steps = 4
    with pytest.raises(RuntimeError, match="got gradient_accumulation_steps=4, which was 1 when Robust was made"):
        loop.run(1)
    criterion = ab.ABLoss(lam=truth.LAM, deferred=True)
    loop = Loop(criterion=criterion, optimizer=lambda params: ab.ABSGD(params, robust=criterion))
    with pytest.raises(RuntimeError, match="expected an optimizer without robust= together with finish_"):
        loop.run(1)


def with_clipping(loop, clip, when, params=None):
    """The loop, with a method of the Accelerator that clips, before or after `finish` of a whole step."""
    finish, accelerator = loop.robust.finish, loop.accelerator

    def both(model, max_norm):
        for now in ("before", "after"):
            if now == when and accelerator.sync_gradients:
                getattr(accelerator, clip)(model.parameters() if params is None else params, 0.01)
            if now == "before":
                finish(model)

    loop.robust.finish = both
    return loop


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
def test_clipping_of_sums(clip):
    """The Accelerator's clipping before `finish` is an error. After it, of other parameters and of normalised gradients it is
    not."""
    with pytest.raises(RuntimeError, match=r"finish: got gradients that accelerator\.clip_grad_norm_ .* expected robust\.finish"):
        with_clipping(Loop(), clip, "before").run(1)
    other = torch.zeros(3, requires_grad=True)
    other.grad = torch.ones(3)
    truth.assert_same(with_clipping(Loop(), clip, "before", [other]).run(1).net, wanted(epochs=1))
    by_hand = with_clipping(Loop(), clip, "after").run()
    if clip == "clip_grad_norm_":
        truth.assert_same(by_hand.net, wanted(max_norm=0.01))
        truth.assert_same(with_clipping(Loop(1), clip, "before").run(1).net, wanted(k=1, epochs=1, max_norm=0.01))


@pytest.mark.parametrize("wrap", [lambda schedule: schedule, ChainedSchedules], ids=["alone", "in a ChainedSchedules"])
def test_a_schedule_of_another_criterion(wrap):
    """Nothing is changed or registered then. A schedule of class weights may drive what it likes."""
    forget()
    accelerator, criterion = Accelerator(cpu=True), ab.ABLoss(lam=truth.LAM)
    with pytest.raises(ValueError, match="schedule: got a TwoStage of a criterion that this training does not have"):
        Robust(accelerator, criterion, wrap(ab.TwoStage(ab.ABLoss(lam=truth.LAM), lam=truth.LAM, start=1)))
    assert criterion.report == "robust" and not accelerator._custom_objects
    Robust(accelerator, criterion, wrap(ab.TwoStage(criterion, lam=truth.LAM, start=1)))
    Robust(accelerator, criterion, wrap(ab.DRW(ab.CrossEntropy(), [1.0] * truth.CLASSES, start=1)))


# ---- two processes -----------------------------------------------------------------------------------------------------------


def of_two_processes(rank, tmp_path):
    """Every process sees the parameters of the plain loop, which has the samples of both in one batch."""
    for (optimizer, dtype), batches in zip(truth.EXACT, (10, 10, 8), strict=True):
        want = wanted(batches, dtype=dtype, processes=2, optimizer=optimizer, max_norm=truth.CLIP)
        loop = Loop(dtype=dtype, optimizer=optimizer, batches=batches, clip=truth.CLIP).run()
        assert loop.accelerator.num_processes == 2
        truth.assert_same(loop.net, want, dtype)
        assert loop.norms == pytest.approx(want.norms, rel=1e-5)
        x, y = truth.samples(2 * batches * truth.ROWS, dtype)
        mean = torch.nn.functional.cross_entropy(truth.network(dtype)(x[: 2 * truth.ROWS]), y[: 2 * truth.ROWS])
        assert loop.printed[0] == pytest.approx(mean.item(), rel=1e-5)

    whole = Loop(clip=0.1, start=2).run()
    first = Loop(clip=0.1, start=2).run(3)
    first.accelerator.save_state(tmp_path / "state")
    second = Loop(clip=0.1, start=2)
    second.accelerator.load_state(tmp_path / "state")
    second.run(1)
    assert truth.distance(second.net, whole.net) == 0 and second.criterion.log_s == whole.criterion.log_s

    with pytest.raises(RuntimeError, match="any parameter that requires a gradient"):  # as documented
        second.accelerator.prepare(ab.ABLoss(lam=truth.LAM))
    with pytest.raises(TypeError, match="criterion itself, and not what Accelerator.prepare"):
        Robust(second.accelerator, second.model)


@needs_gloo
def test_two_processes(tmp_path):
    truth.in_two_processes(of_two_processes, tmp_path, tmp_path)
