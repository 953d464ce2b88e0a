"""Transformers' Trainer with RobustTrainerMixin trains as a plain loop with one big batch for each optimizer step."""

import functools
import math
import re
import subprocess
import sys

import pytest
import torch
import transformers
import transformers_cases as cases
import truth
import two_processes
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
)

import absgd_fast as ab
from absgd_fast.integrations._rows import rows, without_labels
from absgd_fast.integrations.transformers import STATE_FILE, RobustTrainerMixin
from absgd_fast.schedule import ChainedSchedules


def wanted(dtype=torch.float32, optimizer="SGD", rows=30, epochs=4, k=4, **options):
    """The plain loop on the data of `cases.trainer`."""
    batches = truth.big_batches(truth.samples(rows, dtype), rows // truth.ROWS, k, epochs)
    return truth.train(truth.network(dtype), batches, optimizer, **({"max_norm": truth.CLIP} | options))


def assert_logged(trainer, truth_):
    """What Trainer has logged are the plain mean losses and the norms before clipping."""
    assert cases.logged(trainer, "loss") == pytest.approx(truth_.means, rel=1e-5)
    assert cases.logged(trainer, "grad_norm") == pytest.approx(truth_.norms, rel=1e-5)


@pytest.mark.parametrize("rows", [30, 24], ids=["4-4-2", "4-4"])
@pytest.mark.parametrize("optimizer, dtype", truth.EXACT)
def test_one_process(tmp_path, optimizer, dtype, rows):
    trainer = cases.trainer(tmp_path, dtype=dtype, optimizer=optimizer, rows=rows)
    trainer.train()
    plain = wanted(dtype, optimizer, rows)
    truth.assert_same(trainer.model.net, plain, dtype)
    assert_logged(trainer, plain)
    assert float(trainer.criterion.log_s) == pytest.approx(float(plain.log_s), rel=1e-5)


def _two_processes(rank, folder):
    for optimizer, dtype in truth.EXACT:
        trainer = cases.trainer(folder, dtype=dtype, optimizer=optimizer, rows=60)
        trainer.train()
        batches = truth.big_batches(truth.samples(60, dtype), 10, 4, 4, processes=2)
        plain = truth.train(truth.network(dtype), batches, optimizer, max_norm=truth.CLIP)
        truth.assert_same(trainer.model.net, plain, dtype)
        assert trainer.args.world_size == 2 and trainer.args.average_tokens_across_devices
        if rank == 0:
            assert_logged(trainer, plain)
    _resume(folder, 60)
    _nonfinite(rank, folder)
    _evaluate(folder)
    _not_deferred(folder, 60, 2, check_log=rank == 0)
    truth.assert_same(*_nets(_undeferred(folder, 60, 2, {}, bad=25)))


def _nets(found):
    trainer, net, _ = found
    return trainer.model.net, net


def _nonfinite(rank, folder):
    trainer = cases.trainer(folder, optimizer="SGD", rows=60, num_train_epochs=1)
    x, y = trainer.train_dataset.x, trainer.train_dataset.y
    x[25] = math.nan  # of the second step, and of one process
    trainer.train()
    batches = list(truth.big_batches((x, y), 10, 4, 1, processes=2))
    plain = truth.train(truth.network(), [batches[0], batches[2]], max_norm=truth.CLIP)
    truth.assert_same(trainer.model.net, plain)
    assert int(trainer.criterion.nonfinite_batches) == 1


def _evaluate(folder):
    x, y = truth.samples(20, seed=5)
    trainer = cases.trainer(folder, rows=60, more={"eval_dataset": cases.Rows(x, y)}, per_device_eval_batch_size=5)
    plain = torch.nn.functional.cross_entropy(truth.network()(x), y)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(plain), rel=1e-6)


@two_processes.needs_gloo
def test_two_processes(tmp_path):
    """The gradients are averaged over the processes once, and no number of processes multiplies them (S4)."""
    truth.in_two_processes(_two_processes, tmp_path, tmp_path / "out")


# ---- checkpoints -------------------------------------------------------------------------------------------------------------


def _scheduled(start, unit):
    criterion = ab.ABLoss(lam=ab.RelativeLam(-0.4))
    return criterion, ab.TwoStage(criterion, ab.RelativeLam(-0.4), start, unit)


def _trained(folder, stage, resume=None, **options):
    criterion, schedule = _scheduled(*stage) if stage else (ab.ABLoss(lam=ab.RelativeLam(-0.4)), None)
    trainer = cases.trainer(
        folder, optimizer="SGD", criterion=criterion, more={"schedule": schedule}, **({"save_strategy": "steps"} | options)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _state(trainer):
    state = trainer.criterion.state_dict() | trainer.model.state_dict()
    return state | ({} if trainer.schedule is None else {"count": torch.tensor(trainer.schedule.last_epoch)})


def assert_equal_states(a, b):
    """Every tensor of two states has the same bits."""
    a, b = _state(a), _state(b)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), {
        name: (a[name], b[name]) for name in a if (a[name] != b[name]).any()
    }


def _resume(folder, rows):
    whole = _trained(folder / "whole", (2, "epoch"), save_steps=4, rows=rows)
    assert_equal_states(_trained(folder / "again", (2, "epoch"), str(folder / "whole" / "checkpoint-4"), rows=rows), whole)


# An epoch has 3 steps: checkpoints within an epoch, and after its last step, which Trainer saves before the epoch ends.
@pytest.mark.parametrize("at", [2, 3, 4, 6, 7])
@pytest.mark.parametrize("stage", [None, (2, "epoch"), (1, "epoch"), (5, "step")], ids=str)
def test_resume(tmp_path, stage, at):
    """A resumed run ends with the same bits as one that was never broken off, whichever state moves (S6)."""
    whole = _whole(stage, tmp_path.parent)
    folder = whole.args.output_dir
    assert_equal_states(_trained(tmp_path, stage, f"{folder}/checkpoint-{at}", save_strategy="no"), whole)


@functools.cache
def _whole(stage, folder):
    return _trained(folder / f"whole-{stage}", stage, save_steps=1)


def test_resume_of_epochs(tmp_path):
    whole = _trained(tmp_path / "whole", (2, "epoch"), save_strategy="epoch")
    again = _trained(tmp_path / "whole", (2, "epoch"), str(tmp_path / "whole" / "checkpoint-6"), save_strategy="epoch")
    assert_equal_states(again, whole)
    assert_equal_states(_trained(tmp_path / "whole", (2, "epoch"), True, save_strategy="epoch"), whole)


def test_resume_of_an_epoch_that_max_steps_broke_off(tmp_path):
    """It is not counted before its end: the first training stops after step 4, the resumed one goes on within its epoch."""
    options = {"save_strategy": "epoch", "rows": 30}
    whole = _trained(tmp_path / "whole", (2, "epoch"), **options)
    _trained(tmp_path / "short", (2, "epoch"), max_steps=4, **options)
    assert_equal_states(_trained(tmp_path / "again", (2, "epoch"), str(tmp_path / "short" / "checkpoint-4"), **options), whole)


class Slowing:
    """A schedule of the user, which makes gamma smaller after each epoch: it has step, state_dict and load_state_dict."""

    def __init__(self, criterion):
        self.criterion, self.count = criterion, 0

    @property
    def last_epoch(self):
        """The number of steps."""
        return self.count

    def step(self):
        """Another gamma."""
        self.load_state_dict({"count": self.count + 1})

    def state_dict(self):
        """The count."""
        return {"count": self.count}

    def load_state_dict(self, state):
        """Continue at the count."""
        self.count = state["count"]
        self.criterion.gamma = 0.9 / (1 + self.count)


def test_resume_of_a_users_schedule(tmp_path):
    def trained(folder, resume=None, **options):
        trainer = cases.trainer(folder, optimizer="SGD", more={"schedule": Slowing}, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = trained(tmp_path / "whole", save_strategy="steps", save_steps=4)
    assert_equal_states(trained(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-4")), whole)
    assert whole.schedule.count == 4


def test_resume_without_a_state(tmp_path):
    whole = _trained(tmp_path, None, save_steps=4)
    (tmp_path / "checkpoint-4" / STATE_FILE).unlink()
    with pytest.warns(UserWarning, match=f"no {STATE_FILE}.*RobustTrainerMixin"):
        again = _trained(tmp_path, None, str(tmp_path / "checkpoint-4"))
    assert not torch.equal(again.criterion.lam, whole.criterion.lam)


def test_the_best_model_has_its_criterion(tmp_path):
    """load_best_model_at_end loads the state of the criterion that trained this model."""
    x, y = truth.samples(30)
    trainer = cases.trainer(
        tmp_path,
        optimizer="SGD",
        more={"eval_dataset": cases.Rows(x, y), "compute_metrics": _best_at_four()},
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="rank",
    )
    trainer.train()
    plain = truth.train(truth.network(), list(truth.big_batches((x, y), 10, 4, 4))[:4], max_norm=truth.CLIP)
    truth.assert_same(trainer.model.net, plain)
    assert float(trainer.criterion.log_s) == pytest.approx(float(plain.log_s), rel=1e-5)


def _best_at_four():
    calls = iter([0, 1, 0, 0, 0, 0])
    return lambda _: {"rank": next(calls)}


@pytest.mark.parametrize("stage", [None, (2, "epoch")])
def test_model_init_begins_anew(tmp_path, stage):
    """Each trial of a search has a new model, so it has a new criterion and schedule too."""
    criterion, schedule = _scheduled(*stage) if stage else (ab.ABLoss(lam=ab.RelativeLam(-0.4)), None)
    more = {"model_init": cases.Classifier, "schedule": schedule, "model": None, "optimizer": "ABSGD"}
    data = cases.Rows(*truth.samples(30))
    trainer = cases.RobustTrainer(args=cases.arguments(tmp_path), train_dataset=data, criterion=criterion, **more)
    states = []
    for _ in range(2):
        trainer.train()
        states.append({name: t.clone() for name, t in _state(trainer).items()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ---- schedules ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, first", [((2, "epoch"), 6), ((5, "step"), 5)], ids=["epoch", "step"])
def test_schedule(tmp_path, stage, first):
    """The callback steps it after an epoch of 3 steps, or after each step."""

    def schedule(criterion):
        return ab.TwoStage(criterion, truth.LAM, *stage)

    trainer = cases.trainer(tmp_path, optimizer="SGD", more={"schedule": schedule})
    trainer.train()
    plain = wanted(lam=lambda step: math.inf if step < first else truth.LAM)
    truth.assert_same(trainer.model.net, plain)


class Stream(torch.utils.data.IterableDataset):
    """The samples without a length."""

    def __init__(self, rows):
        self.data = cases.Rows(*truth.samples(rows))

    def __iter__(self):
        return (self.data[i] for i in range(len(self.data)))


def test_schedule_of_a_stream(tmp_path):
    """An epoch of 10 micro-batches ends within the third optimizer step, after which the schedule is stepped."""
    model, criterion = cases.Classifier(), ab.ABLoss(lam=truth.LAM)
    trainer = cases.RobustTrainer(
        model,
        cases.arguments(tmp_path, max_steps=5, save_strategy="steps", save_steps=1),
        train_dataset=Stream(30),
        criterion=criterion,
        schedule=ab.TwoStage(criterion, truth.LAM, 1),
        optimizers=(truth.OPTIMIZERS["SGD"](model.parameters()), None),
    )
    trainer.train()
    rows = range(30)  # Trainer makes one step of the short group and the first whole group of the next epoch
    of_steps = [[*rows[:12]], [*rows[12:24]], [*rows[24:], *rows[:12]], [*rows[12:24]], [*rows[24:], *rows[:12]]]
    batches = [tuple(t[of_step] for t in truth.samples(30)) for of_step in of_steps]
    plain = truth.train(truth.network(), batches, max_norm=truth.CLIP, lam=lambda step: math.inf if step < 3 else truth.LAM)
    truth.assert_same(trainer.model.net, plain)
    saved = [torch.load(tmp_path / f"checkpoint-{i}" / STATE_FILE)["schedule"]["count"] for i in (2, 3)]
    assert saved == [0, 1]


def test_a_checkpoint_within_the_step_in_which_an_epoch_ends(tmp_path):
    """The micro-batches of the old epoch are lost with their gradients; the schedule is stepped before the next epoch."""
    criterion = ab.ABLoss(lam=truth.LAM)
    trainer = cases.trainer(tmp_path, criterion=criterion, more={"schedule": ab.TwoStage(criterion, truth.LAM, 1)})
    callback = trainer._callback
    trainer.accelerator.gradient_state._set_sync_gradients(False)  # more micro-batches are to come
    trainer.training_step(trainer.model, {"x": trainer.train_dataset.x[:2], "labels": trainer.train_dataset.y[:2]})
    callback.on_epoch_end(trainer.args, trainer.state, trainer.control)
    with pytest.warns(UserWarning, match="deferred step"):
        trainer.save_model(str(tmp_path))
    assert trainer.schedule.count == 0
    trainer._resumed_from = str(tmp_path)
    callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.schedule.count == 1 and float(criterion.lam) == pytest.approx(truth.LAM)


# ---- evaluation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", ["absgd", "focal"])
def test_evaluation(tmp_path, criterion):
    """The evaluation loss is the plain mean of the losses, predictions and metrics work, and the state stays."""
    options = {"lam": truth.LAM} if criterion == "absgd" else {"gamma": 2.0}
    x, y = truth.samples(22, seed=5)
    trainer = cases.trainer(
        tmp_path,
        optimizer="SGD",
        criterion=criterion,
        per_device_eval_batch_size=8,
        more={
            "criterion_options": options,
            "eval_dataset": cases.Rows(x, y),
            "compute_metrics": lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        },
    )
    trainer.train()
    before = {name: t.clone() for name, t in trainer.criterion.state_dict().items()}
    metrics, predicted = trainer.evaluate(), trainer.predict(cases.Rows(x, y))
    with torch.no_grad():
        logits = trainer.model.net(x)
        losses = (ab.CrossEntropy() if criterion == "absgd" else ab.Focal())(logits, y)
    assert metrics["eval_loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert metrics["eval_accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits)  # batches of another size are rounded otherwise
    assert all(torch.equal(before[name], t) for name, t in trainer.criterion.state_dict().items())


class Returns(torch.nn.Module):
    """The network with another kind of output."""

    def __init__(self, output):
        super().__init__()
        self.net, self.output = truth.network(), output

    def forward(self, x):
        """The logits as `output` packs them."""
        return self.output(self.net(x))


OUTPUTS = {
    "dict": lambda logits: {"logits": logits, "more": logits[:, 0]},
    "tuple": lambda logits: (logits, logits[:, 0]),
    "tensor": lambda logits: logits,
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs(tmp_path, output):
    """Models return dicts, tuples or tensors; the predictions are all that they return."""
    x, y = truth.samples(10, seed=5)
    trainer = cases.trainer(tmp_path, optimizer="SGD", model=Returns(OUTPUTS[output]))
    trainer.train()
    truth.assert_same(trainer.model.net, wanted())
    predicted = trainer.predict(cases.Rows(x, y)).predictions
    logits = trainer.model.net(x).detach()
    torch.testing.assert_close(torch.as_tensor(predicted if output == "tensor" else predicted[0]), logits)
    if output != "tensor":
        torch.testing.assert_close(torch.as_tensor(predicted[1]), logits[:, 0])


# ---- labels of tokens --------------------------------------------------------------------------------------------------------


def _of_user(logits, y):
    return torch.nn.functional.cross_entropy(logits, y, reduction="none")  # a label of -100 would be an error or a 0


@pytest.mark.parametrize("criterion", [None, torch.nn.CrossEntropyLoss(reduction="none"), _of_user, ab.GCE(ignore_index=3)])
def test_labels_of_tokens(criterion):
    """Rows with the label -100 do not count, whichever criterion it is."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 4, generator=draw), torch.randint(3, (2, 5), generator=draw)
    labels[0, :2] = labels[1, 4] = -100
    inner = ab.CrossEntropy() if criterion is None else criterion
    kept = labels != -100
    losses = (ab.GCE() if isinstance(inner, ab.GCE) else _of_user)(logits[kept], labels[kept])
    loss = ab.ABLoss(inner, lam=math.inf)(*rows(logits, labels, inner))
    assert float(loss) == pytest.approx(float(losses.mean()), rel=1e-5)


def test_evaluation_of_a_criterion_with_ignore_index(tmp_path):
    """The rows that the criterion of a user ignores do not count in the evaluation either."""
    x, y = truth.samples(8)
    criterion = ab.ABLoss(_of_user, lam=truth.LAM, ignore_index=int(y[0]))
    trainer = cases.trainer(tmp_path, criterion=criterion)
    kept = y != y[0]
    assert 0 < kept.sum() < 8
    plain = _of_user(trainer.model.net(x)[kept], y[kept]).mean().detach()
    assert trainer.evaluate(cases.Rows(x, y))["eval_loss"] == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.parametrize("floating", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize(
    "shape, of_labels",
    [((2, 5, 4), (2, 5)), ((2, 4, 4), (2, 4)), ((2, 4, 5), (2, 5)), ((2, 4, 3, 5), (2, 3, 5)), ((4, 4, 4, 4), (4, 4, 4))],
    ids=str,
)
def test_which_dimension_has_the_classes(shape, of_labels, floating):
    """The shape of the labels says it. If both fit, logits of three dimensions are those of a sequence, and others are dense."""
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(shape, generator=draw), torch.randint(4, of_labels, generator=draw)
    second = 1 if shape[2:] == of_labels[1:] and shape != (2, 4, 4) else len(shape) - 1
    labels.flatten()[:2] = 0 if floating else -100
    plain = torch.nn.functional.cross_entropy(logits.movedim(second, 1), labels)
    if floating:
        labels = torch.nn.functional.one_hot(labels, 4).movedim(-1, second).float()
        if shape == (2, 4, 5):
            return  # probabilities of 3 dimensions are those of a sequence
    assert float(ab.ABLoss(lam=math.inf)(*rows(logits, labels, ab.CrossEntropy()))) == pytest.approx(float(plain), rel=1e-5)


def test_dense_logits_of_another_size(tmp_path):
    """As Segformer's, whose logits are smaller than the image."""
    message = r"labels: got shape \(2, 8, 8\) with logits \(2, 4, 2, 2\), expected \(2, 4, 2\) .* or \(2, 2, 2\) .*interpolate"
    with pytest.raises(ValueError, match=message):
        rows(torch.zeros(2, 4, 2, 2), torch.zeros(2, 8, 8, dtype=torch.int64), ab.CrossEntropy())


@pytest.mark.parametrize("of_labels", [(3,), (3, 1)])
def test_regression(of_labels):
    """Predictions (B, 1) are compared with the labels of their own samples only."""
    x, y = torch.arange(3.0)[:, None], torch.tensor([1.0, 5.0, -2.0])
    loss = ab.ABLoss(torch.nn.MSELoss(reduction="none"), lam=math.inf)(*rows(x, y.view(of_labels), torch.nn.MSELoss()))
    assert float(loss) == pytest.approx(float((x[:, 0] - y).square().mean()))


def test_soft_labels():
    """Probabilities of classes, (B, T, C) as the logits."""
    logits, labels = rows(torch.zeros(2, 3, 4), torch.full((2, 3, 4), 0.25), ab.CrossEntropy())
    assert logits.shape == labels.shape == (6, 4)


def test_which_labels():
    ids = torch.arange(6).view(2, 3)
    given = {"input_ids": ids, "labels": ids, "shift_labels": ids + 1}
    rest, labels = without_labels(given, ["labels"])
    assert rest.keys() == {"input_ids"} and torch.equal(labels, ids + 1)
    with pytest.raises(ValueError, match="the labels are start, end; expected one tensor of labels, under the name start or end"):
        without_labels({"start": ids, "end": ids}, ["start", "end"])


def test_encoder_decoder(tmp_path):
    """Labels are not shifted, and the inputs of the decoder are made from them as the model makes them."""
    config = BartConfig(
        vocab_size=11,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=16,
        pad_token_id=1,
        dropout=0.0,
    )
    model = BartForConditionalGeneration(config)
    trainer = cases.RobustTrainer(model, cases.arguments(tmp_path), criterion="absgd", criterion_options={"lam": 0.5})
    ids = torch.arange(2, 10).view(2, 4)
    labels = torch.tensor([[3, 4, -100], [5, 6, 7]])
    model.eval()
    plain = model(input_ids=ids, labels=labels).loss
    assert float(trainer.compute_loss(model, {"input_ids": ids, "labels": labels})) == pytest.approx(
        float(plain.detach()), rel=1e-5
    )
    assert isinstance(trainer.criterion, ab.ABLoss) and not isinstance(trainer.criterion, ab.LinearABLoss)


TASKS = {  # problem_type, its labels of 4 samples, and what Transformers takes for it
    "multi_label_classification": (torch.tensor([[1.0, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]]), torch.nn.BCEWithLogitsLoss),
    "regression": (torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.nn.MSELoss),
}


@pytest.mark.parametrize("said", [True, False], ids=["config", "labels"])
@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_than_classification(tmp_path, task, said):
    """A loss that chooses a class is refused, with the one that Transformers takes; with that the numbers are Transformers'."""
    labels, loss_of = TASKS[task]
    sizes = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config = BertConfig(**sizes, num_labels=1 if labels.dim() == 1 else 3, problem_type=task if said else None)
    model = BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.arange(8).view(4, 2), "labels": labels}
    advice = rf"for '{task}'; expected criterion=ABLoss\(torch.nn.{loss_of.__name__}\(reduction='none'\), lam=...\)"
    for wrong in (ab.ABLoss(lam=-0.5), torch.nn.CrossEntropyLoss(reduction="none")):
        with pytest.raises(ValueError, match=advice):
            cases.RobustTrainer(model, cases.arguments(tmp_path), criterion=wrong).compute_loss(model, dict(inputs))
    trainer = cases.RobustTrainer(model, cases.arguments(tmp_path), criterion=ab.ABLoss(loss_of(reduction="none"), lam=0.5))
    plain = float(model(**inputs).loss.detach())
    assert float(trainer.compute_loss(model, dict(inputs)).detach()) == pytest.approx(plain, rel=1e-5)


def test_probabilities_of_classes(tmp_path):
    """Labels whose rows have the sum 1 are soft labels of one class, and no multi-label classification."""
    sizes = dict(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).eval()
    trainer = cases.RobustTrainer(model, cases.arguments(tmp_path), criterion=ab.ABLoss(lam=-0.5))
    ids, soft = torch.arange(4).view(2, 2), torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.1, 0.9]])
    plain = torch.nn.functional.cross_entropy(model(input_ids=ids).logits, soft)
    found = trainer.compute_loss(model, {"input_ids": ids, "labels": soft})
    assert float(found.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)


# ---- names -------------------------------------------------------------------------------------------------------------------

COUNTS = [9, 6, 3, 2]
NAMED = {
    "absgd": ({"lam": truth.LAM}, ab.ABLoss(lam=truth.LAM)),
    "dft": ({}, ab.DFT()),
    "cross_entropy": ({}, None),
    "focal": ({"gamma": 1.5}, ab.Focal(1.5)),
    "gce": ({"q": 0.6}, ab.GCE(0.6)),
    "sce": ({"alpha": 0.2}, ab.SCE(0.2)),
    "ldam": ({"cls_num_list": COUNTS}, ab.LDAM(COUNTS)),
    "vs": ({"cls_num_list": COUNTS}, ab.VS(COUNTS)),
    "la": ({"cls_num_list": COUNTS, "tau": 0.5}, ab.LogitAdjusted(COUNTS, tau=0.5)),
    "cdt": ({"cls_num_list": COUNTS}, ab.CDT(COUNTS)),
}


@pytest.mark.parametrize("name", [*NAMED, "ABSGD", "Focal"])
def test_criterion_by_name(tmp_path, name):
    """Capitals do not matter."""
    options, made = NAMED[name.lower()]
    trainer = cases.trainer(tmp_path, criterion=name, more={"criterion_options": options}, num_train_epochs=1)
    other = trainer.criterion if made is None else made if isinstance(made, ab.ABLoss) else ab.ABLoss(made, lam=math.inf)
    logits, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4
    trainer.criterion.eval()
    other.eval()
    assert torch.equal(trainer.criterion(logits, y), other(logits, y))


def test_a_plain_loss_is_its_mean(tmp_path):
    """A loss that is no ABLoss, here one with a callable of the user, has the gradient of its plain mean."""

    def of_user(logits, y):
        return torch.nn.functional.cross_entropy(logits, y, reduction="none")

    trainer = cases.trainer(tmp_path, optimizer="SGD", criterion=of_user)
    trainer.train()
    truth.assert_same(trainer.model.net, wanted(lam=math.inf))


@pytest.mark.parametrize("name, torchs", [("ABSGD", torch.optim.SGD), ("abadamw", torch.optim.AdamW)])
def test_optimizer_by_name(tmp_path, name, torchs):
    """It gets the learning rate, betas, eps and weight decay of TrainingArguments, in Trainer's groups."""
    given = dict(learning_rate=0.05, weight_decay=0.3, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-4)
    options = {"momentum": 0.5} if name == "ABSGD" else {}
    trainer = cases.trainer(tmp_path, more={"optimizer": name, "optimizer_options": options}, **given)
    trainer.train()

    def make(params):
        weights, biases = [p for p in params if p.dim() == 2], [p for p in params if p.dim() == 1]
        numbers = options if name == "ABSGD" else dict(betas=(0.8, 0.9), eps=1e-4)
        return torchs([{"params": weights, "weight_decay": 0.3}, {"params": biases, "weight_decay": 0.0}], lr=0.05, **numbers)

    assert type(trainer.optimizer.optimizer) is getattr(ab, "ABSGD" if name == "ABSGD" else "ABAdamW")
    truth.assert_same(trainer.model.net, wanted(optimizer=make))


# ---- steps that do not count -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filtered", [True, False])
def test_nonfinite_step(tmp_path, caplog, filtered):
    """A step with a NaN loss changes nothing, Trainer goes on, and says so."""
    trainer = cases.trainer(tmp_path, optimizer="SGD", num_train_epochs=1, logging_nan_inf_filter=filtered)
    x, y = trainer.train_dataset.x, trainer.train_dataset.y
    x[13] = math.nan
    trainer.train()
    batches = list(truth.big_batches((x, y), 10, 4, 1))
    truth.assert_same(trainer.model.net, truth.train(truth.network(), [batches[0], batches[2]], max_norm=truth.CLIP))
    assert cases.logged(trainer, "nonfinite_steps") == [1]
    assert math.isnan(cases.logged(trainer, "loss")[1]) is not filtered
    assert "1 optimizer step(s) since the last log had a NaN or infinite loss" in caplog.text


def test_nonfinite_step_on_a_gpu(tmp_path, monkeypatch):
    """There `finish_` leaves NaN instead of no gradients, because it does not wait for the GPU; nothing is stepped either."""
    finish = ab.ABLoss.finish_

    def as_on_a_gpu(self, params):
        counts = finish(self, params)
        for p in params:
            p.grad = p.grad if counts else torch.full_like(p, math.nan)
        return counts

    monkeypatch.setattr(ab.ABLoss, "finish_", as_on_a_gpu)
    trainer = cases.trainer(tmp_path, optimizer="SGD", num_train_epochs=1)
    trainer.train_dataset.x[13] = math.nan
    trainer.train()
    batches = list(truth.big_batches((trainer.train_dataset.x, trainer.train_dataset.y), 10, 4, 1))
    truth.assert_same(trainer.model.net, truth.train(truth.network(), [batches[0], batches[2]], max_norm=truth.CLIP))


# ---- other settings of Trainer -----------------------------------------------------------------------------------------------


def test_bf16(tmp_path):
    """Under autocast the parameters stay near those in float32, and nothing is divided or clipped twice."""
    trainer = cases.trainer(tmp_path, optimizer="SGD", bf16=True)
    trainer.train()
    assert truth.distance(trainer.model.net, wanted().net) < 0.02
    assert cases.logged(trainer, "loss") == pytest.approx(wanted().means, rel=0.02)


def test_torch_compile(tmp_path):
    trainer = cases.trainer(tmp_path, optimizer="SGD", torch_compile=True, torch_compile_backend="aot_eager")
    trainer.train()
    truth.assert_same(trainer.model.net, wanted())


class WithDecay(cases.RobustTrainer):
    """A user's trainer that adds another term to the loss."""

    def compute_loss(self, model, *args, **kwargs):
        """Without accumulation that is allowed."""
        return super().compute_loss(model, *args, **kwargs) + 0.1 * sum(p.square().sum() for p in model.parameters())


def _not_deferred(folder, rows, processes, check_log=True):
    """One micro-batch in a step: the criterion makes its loss at once, whatever its options are."""
    for options in ({"mix": 1.0}, {}, {"deferred": True}):
        trainer, net, means = _undeferred(folder, rows, processes, options)
        truth.assert_same(trainer.model.net, net)
        assert not check_log or cases.logged(trainer, "loss") == pytest.approx(means, rel=1e-5)


def _undeferred(folder, rows, processes, options, bad=None):
    """A trained trainer, and the net and means of a loop. bad: a sample that is NaN."""
    criterion = ab.ABLoss(lam=truth.LAM, **options)
    cls = cases.RobustTrainer if "mix" in options else WithDecay
    given = dict(optimizer="SGD", criterion=criterion, gradient_accumulation_steps=1, rows=rows, num_train_epochs=2, cls=cls)
    trainer = cases.trainer(folder, **given)
    assert not criterion.deferred
    x, y = truth.samples(rows)
    if bad is not None:
        x[bad] = trainer.train_dataset.x[bad] = math.nan
    trainer.train()
    net, other = truth.network(), ab.ABLoss(lam=truth.LAM, mix=options.get("mix", 0.0), process_group=None)
    optimizer, means = truth.OPTIMIZERS["SGD"](net.parameters()), []
    for batch, labels in truth.big_batches((x, y), 10, 1, 2, processes=processes):
        if batch.isnan().any():
            continue
        optimizer.zero_grad()
        decay = 0.1 * sum(p.square().sum() for p in net.parameters()) if cls is WithDecay else 0
        (other(net(batch), labels) + decay).backward()
        means.append(float(other.last.mean_loss))
        torch.nn.utils.clip_grad_norm_(net.parameters(), truth.CLIP)
        optimizer.step()
    return trainer, net, means


def test_one_micro_batch_in_a_step(tmp_path):
    """The criterion is not deferred then: mix= serves, and other terms of the loss keep their size."""
    _not_deferred(tmp_path, 30, 1)


def test_nonfinite_step_of_one_micro_batch(tmp_path):
    trainer, net, _ = _undeferred(tmp_path, 30, 1, {}, bad=13)
    truth.assert_same(trainer.model.net, net)
    assert int(trainer.criterion.nonfinite_batches) == 2


# ---- what is refused ---------------------------------------------------------------------------------------------------------

OTHER = ab.ABLoss(lam=0.5)
REFUSED = {
    "loss_divisor": (
        dict(criterion=lambda: ab.ABLoss(lam=0.5, loss_divisor=4)),
        "loss_divisor: got a criterion with 4, expected 1",
    ),
    "mix": (dict(criterion=lambda: ab.ABLoss(lam=0.5, mix=1.0)), "cannot be deferred, and gradient_accumulation_steps=4"),
    "rule": (
        dict(criterion=lambda: ab.ABLoss(rule=functools.partial(ab.weights.cvar, beta=0.5), process_group=None)),
        "cannot be deferred, and gradient_accumulation_steps=4",
    ),
    "linear": (dict(criterion=lambda: ab.LinearABLoss(lam=0.5)), "got a LinearABLoss, and the model is no causal language model"),
    "name": (dict(criterion=lambda: "absgb"), "criterion: got 'absgb', expected 'absgd'"),
    "lam": (
        dict(criterion=lambda: "absgd", more={"criterion_options": {"gamma": 0.5}}),
        'criterion_options: got none with the name lam .* expected lambda, such as criterion_options={"lam": -0.5}',
    ),
    "options": (dict(more={"criterion_options": {"lam": 1.0}}), "criterion_options: got some with a criterion that is made"),
    "optimizer": (dict(more={"optimizer": "AdamW"}), "optimizer: got 'AdamW', expected one of ABSGD"),
    "optimizer_options": (dict(more={"optimizer_options": {"momentum": 0.1}}), "optimizer_options: got some without optimizer="),
    "label_smoothing": (
        dict(model=cases.with_config(), label_smoothing_factor=0.1),
        "label_smoothing_factor: got 0.1 .* expected criterion=",
    ),
    "compute_loss_func": (dict(more={"compute_loss_func": lambda *_: 0}), "compute_loss_func: got one with RobustTrainerMixin"),
    "schedule": (
        dict(more={"schedule": ab.TwoStage(OTHER, lam=0.5, start=1)}),
        "schedule: got a TwoStage of another ABLoss than the trainer's",
    ),
    "schedule of a loss": (
        dict(
            more={"schedule": ChainedSchedules(ab.DRW(OTHER.criterion, [1.0, 2.0], start=1))},
            criterion=lambda: ab.ABLoss(ab.CrossEntropy(), lam=0.5),
        ),
        "schedule: got a DRW of another CrossEntropy than the trainer's",
    ),
    "lomo": (dict(optim="lomo"), "optim: got 'lomo', which steps within backward"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    options, message = REFUSED[case]
    options = {name: value() if name == "criterion" else value for name, value in options.items()}
    with pytest.raises((ValueError, TypeError), match=message):
        cases.trainer(tmp_path, **options)


@pytest.mark.parametrize(
    "attribute, value, message",
    [
        ("is_deepspeed_enabled", True, "DeepSpeed"),
        ("is_fsdp_enabled", True, "FSDP 1"),
        ("get_tp_size", lambda: 2, "tensor parallelism"),
        ("get_cp_size", lambda: 2, "context or sequence parallelism"),
    ],
)
def test_refused_ways_of_training(tmp_path, monkeypatch, attribute, value, message):
    made = Trainer.__init__

    def init(self, *args, **kwargs):
        made(self, *args, **kwargs)
        setattr(self, attribute, value)

    monkeypatch.setattr(Trainer, "__init__", init)
    with pytest.raises(ValueError, match=f"RobustTrainerMixin: got {message}.*expected one process"):
        cases.trainer(tmp_path)


def test_an_optimizer_with_robust_is_refused(tmp_path):
    """It would normalise gradients that were normalised and clipped (S1)."""
    model, criterion = cases.Classifier(), ab.ABLoss(lam=0.5, deferred=True)
    made = {"optimizers": (ab.ABSGD(model.parameters(), robust=criterion), None)}
    trainer = cases.trainer(tmp_path, model=model, criterion=criterion, more=made)
    with pytest.raises(ValueError, match=r"optimizers: got an optimizer with robust=.*leave robust= out"):
        trainer.train()


def test_order_of_the_classes():
    with pytest.raises(TypeError, match=r"got Trainer before RobustTrainerMixin.*class Wrong\(RobustTrainerMixin, Trainer\)"):

        class Wrong(Trainer, RobustTrainerMixin):
            pass


def test_an_older_version():
    """Transformers is there, so nothing is said of installing it."""
    code = "from transformers import Trainer; del Trainer.loss_is_scaled_for_ga; import absgd_fast.integrations.transformers"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    message = rf"ImportError: .*: got transformers {transformers.__version__}, expected >= 5.19 .*; pip install -U transformers"
    assert re.search(message, result.stderr) and "cannot be imported" not in result.stderr


class OwnLoss(Trainer):
    """A user's trainer, which makes the loss itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The plain mean."""
        outputs = model(x=inputs["x"])
        loss = torch.nn.functional.cross_entropy(outputs["logits"], inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def test_a_compute_loss_after_the_mixin():
    """It would never be called."""
    with pytest.raises(TypeError, match=r"A: got OwnLoss after RobustTrainerMixin.*expected its loss as criterion="):

        class A(RobustTrainerMixin, OwnLoss):
            pass


@pytest.mark.parametrize("k", [1, 4])
def test_a_compute_loss_without_the_criterion(tmp_path, k):
    """It may call the mixin's, or the criterion."""

    class Own(cases.RobustTrainer):
        compute_loss = OwnLoss.compute_loss

    class WithCriterion(cases.RobustTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return self.criterion(model(x=inputs["x"])["logits"], inputs["labels"])

    trainer = cases.trainer(tmp_path, cls=WithCriterion, optimizer="SGD", gradient_accumulation_steps=k, num_train_epochs=1)
    trainer.train()
    truth.assert_same(trainer.model.net, wanted(k=k, epochs=1))
    with pytest.raises(
        RuntimeError, match=r"compute_loss: got one of Own that does not call the criterion; expected loss = super"
    ):
        cases.trainer(tmp_path, cls=Own, gradient_accumulation_steps=k).train()


def test_labels_that_are_missing(tmp_path):
    trainer = cases.trainer(tmp_path)
    with pytest.raises(ValueError, match="inputs: got x, in which the labels are missing; expected one tensor of labels"):
        trainer.compute_loss(trainer.model, {"x": torch.zeros(1, 5)})


# ---- without the mixin -------------------------------------------------------------------------------------------------------


def _compute_loss_func(criterion):
    def loss_of(outputs, labels, num_items_in_batch=None):
        return criterion(outputs["logits"], labels)

    return loss_of


def test_nobody_finishes_without_the_mixin(tmp_path):
    """A deferred criterion as compute_loss_func of a plain Trainer: the second step is refused (S5)."""
    criterion = ab.ABLoss(lam=truth.LAM, deferred=True)
    model = cases.Classifier()
    trainer = Trainer(
        model,
        cases.arguments(tmp_path, label_names=["labels"]),
        train_dataset=cases.Rows(*truth.samples(30)),
        optimizers=(truth.OPTIMIZERS["SGD"](model.parameters()), None),
        compute_loss_func=_compute_loss_func(criterion),
    )
    with pytest.raises(RuntimeError, match="got a second step of an optimizer with gradients of a deferred criterion"):
        trainer.train()


def test_clipping_before_the_step_without_the_mixin(tmp_path):
    """An optimizer with robust= in a plain Trainer normalises what Trainer has clipped: that is warned of (S1)."""
    criterion, model = ab.ABLoss(lam=truth.LAM, deferred=True), cases.Classifier()
    trainer = Trainer(
        model,
        cases.arguments(tmp_path, label_names=["labels"]),
        train_dataset=cases.Rows(*truth.samples(30)),
        optimizers=(ab.ABSGD(model.parameters(), lr=0.1, robust=criterion), None),
        compute_loss_func=_compute_loss_func(criterion),
    )
    with pytest.warns(UserWarning, match="robust: got gradients that were changed in place after backward"):
        trainer.train()
