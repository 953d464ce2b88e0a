"""TRL's SFTTrainer with RobustTrainerMixin: parameters, TRL's own DFT, its metrics, adapters, two processes."""

import copy
import math

import language_cases as cases
import pytest
import torch
import truth
import two_processes
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from trl import DPOTrainer, SFTTrainer

import absgd_fast as ab
from absgd_fast.integrations.transformers import RobustTrainerMixin

CLIP = 0.05
LOSSES = {  # name: options of the criterion, and those of the plain loop
    "dft": ({}, {"lam": -1.0, "normalizer": "none"}),
    "absgd": ({"lam": -2.0}, {"lam": -2.0}),
}


def wanted(model, name, dtype, optimizer="SGD", rows=20, **options):
    """The plain loop on the data of `cases.sft`."""
    batches = truth.big_batches(cases.tokens(rows), rows // cases.SEQUENCES, 4, 4, rows=cases.SEQUENCES)
    return truth.train(model, batches, optimizer, max_norm=CLIP, losses_of=cases.losses_of, **LOSSES[name][1], **options)


def robust(folder, model, name, optimizer="SGD", more=None, **options):
    """A RobustSFT of a named criterion."""
    params = [p for p in model.parameters() if p.requires_grad]
    given = dict(criterion=name, criterion_options=LOSSES[name][0], optimizers=(truth.OPTIMIZERS[optimizer](params), None))
    return cases.sft(folder, model, more=given | (more or {}), **({"max_grad_norm": CLIP} | options))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("optimizer, dtype", truth.EXACT)
def test_one_process(tmp_path, name, optimizer, dtype):
    """Steps of 4, 4 and 2 micro-batches, whose numbers of tokens differ."""
    model = cases.language_model(dtype)
    plain = wanted(model, name, dtype, optimizer)
    trainer = robust(tmp_path, model, name, optimizer)
    trainer.train()
    truth.assert_same(trainer.model, plain, dtype)
    assert cases.logged(trainer, "loss") == pytest.approx(plain.means, rel=1e-5)
    assert cases.logged(trainer, "grad_norm") == pytest.approx(plain.norms, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"activation_checkpointing": True}, {"padding_free": True, "max_length": None}],
    ids=["activation_checkpointing", "padding_free"],
)
def test_settings_that_change_no_number(tmp_path, options):
    model = cases.language_model()
    plain = wanted(model, "absgd", torch.float32)
    trainer = robust(tmp_path, model, "absgd", **options)
    trainer.train()
    truth.assert_same(trainer.model, plain)
    assert cases.logged(trainer, "loss") == pytest.approx(plain.means, rel=1e-5)


def test_bf16(tmp_path):
    model = cases.language_model()
    plain = wanted(model, "dft", torch.float32)
    trainer = robust(tmp_path, model, "dft", bf16=True)
    trainer.train()
    assert truth.distance(trainer.model, plain.net) < 5e-3
    assert cases.logged(trainer, "loss") == pytest.approx(plain.means, rel=0.01)


@pytest.mark.parametrize("lora", [{}, {"modules_to_save": ["lm_head"]}], ids=["lora", "lora and head"])
def test_lora(tmp_path, lora):
    model = cases.with_lora(cases.language_model(torch.float64, tie_word_embeddings=False), **lora)
    plain = wanted(copy.deepcopy(model), "absgd", torch.float64)
    trainer = robust(tmp_path, model, "absgd")
    trainer.train()
    truth.assert_same(trainer.model, plain, torch.float64)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
@pytest.mark.parametrize("criterion", ["cross_entropy", "logits"])
def test_virtual_tokens(tmp_path, kind, criterion):
    """PEFT puts the tokens of a prompt before each sequence; they have no labels, and the loss is SFTTrainer's."""
    model = cases.language_model(torch.float64, attn_implementation="sdpa")
    torch.manual_seed(4)
    model = get_peft_model(model, kind(num_virtual_tokens=3, task_type="CAUSAL_LM")).double()
    other = copy.deepcopy(model)
    made = ab.ABLoss(lam=math.inf) if criterion == "logits" else criterion
    options = {"max_grad_norm": CLIP, "num_train_epochs": 2}
    trainers = []
    for each, cls, more in ((model, cases.RobustSFT, {"criterion": made}), (other, SFTTrainer, {})):
        params = [p for p in each.parameters() if p.requires_grad]
        more = {"optimizers": (torch.optim.SGD(params, lr=0.5), None), **more}
        loss_type = {} if cls is cases.RobustSFT else {"loss_type": "nll"}
        trainers.append(cases.sft(tmp_path, each, cls=cls, more=more, **options, **loss_type))
        trainers[-1].train()
    truth.assert_same(model, other)  # Transformers makes the loss in float32
    ours, theirs = (cases.logged(trainer, "mean_token_accuracy") for trainer in trainers)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("cls", ["sft", "trainer"])
def test_an_adapted_head_is_refused(tmp_path, cls):
    model = cases.with_lora(cases.language_model(tie_word_embeddings=False), target_modules=["lm_head"], fan_in_fan_out=False)
    if cls == "sft":  # by TRL itself
        with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
            robust(tmp_path, model, "absgd")
        return

    class MyTrainer(RobustTrainerMixin, Trainer):
        pass

    with pytest.raises(TypeError, match="got a head that is adapted.*expected the adapter on other modules"):
        MyTrainer(model, cases.arguments(tmp_path), train_dataset=cases.dataset(4), criterion="dft")


# ---- TRL's own loss and metrics ----------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """After clipping."""
        if state.global_step == 0:
            self.grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("clip", [0.0, CLIP])
def test_trls_dft(tmp_path, clip):
    """The same parameters, gradients and metrics as SFTTrainer(loss_type="dft"); the logged loss is the plain mean instead."""
    ours, theirs = Gradients(), Gradients()
    trainer = robust(tmp_path, cases.language_model(), "dft", more={"callbacks": [ours]}, max_grad_norm=clip)
    trainer.train()
    model = cases.language_model()
    more = {"optimizers": (truth.OPTIMIZERS["SGD"](model.parameters()), None), "callbacks": [theirs]}
    trls = cases.sft(tmp_path, model, cls=SFTTrainer, more=more, loss_type="dft", max_grad_norm=clip)
    trls.train()
    truth.assert_same(trainer.model, trls.model)
    assert len(ours.grads) == len(theirs.grads) > 0
    assert max(float((a - b).abs().max()) for a, b in zip(ours.grads, theirs.grads, strict=True)) <= 1e-6
    for key in ("grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert cases.logged(trainer, key) == pytest.approx(cases.logged(trls, key), rel=1e-5)
    first = cases.losses_of(cases.language_model(), [t[:8] for t in cases.tokens(20)]).detach()
    assert cases.logged(trainer, "loss")[0] == pytest.approx(float(first.mean()), rel=1e-5)
    assert cases.logged(trls, "loss")[0] == pytest.approx(float((first * (-first).exp()).mean()), rel=1e-5)


def test_logits_are_not_stored(tmp_path):
    """In training the head returns the loss, and no tensor of (tokens, vocabulary) is saved for backward."""
    model = cases.language_model()
    returned, saved = [], []
    model.lm_head.register_forward_hook(lambda _, inputs, output: returned.append(output.shape))
    trainer = robust(tmp_path, model, "absgd", num_train_epochs=1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        trainer.train()
    tokens = cases.SEQUENCES * cases.LENGTH
    assert set(returned) == {torch.Size([])}
    assert saved and not [shape for shape in saved if shape[-1:] == (cases.VOCABULARY,) and shape.numel() >= tokens * shape[-1]]


# ---- evaluation and checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_evaluation(tmp_path, name):
    """The plain mean, with TRL's metrics of the evaluation; with compute_metrics the logits are made."""
    model = cases.language_model()
    batch = cases.tokens(6, seed=3)
    more = {"eval_dataset": cases.dataset(6, seed=3)}
    trainer = robust(tmp_path, model, name, more=more, per_device_eval_batch_size=6)
    trls = cases.sft(tmp_path, cases.language_model(), cls=SFTTrainer, more=more, per_device_eval_batch_size=6)
    metrics, other = trainer.evaluate(), trls.evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(cases.losses_of(model, batch).detach().mean()), rel=1e-5)
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"):
        assert metrics[key] == pytest.approx(other[key], rel=1e-5)

    def shape_of(prediction):
        return {"numbers": float(prediction.predictions.size)}

    trainer.compute_metrics = shape_of
    again = trainer.evaluate()
    assert again["eval_numbers"] == 6 * cases.LENGTH * cases.VOCABULARY
    assert again["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert torch.isinf(trainer.criterion.log_s) or name == "dft"


def test_resume(tmp_path):
    def trained(folder, resume=None, **options):
        criterion = ab.LinearABLoss(lam=ab.RelativeLam(-0.4))
        model = cases.language_model()
        given = {"criterion": criterion, "optimizers": (truth.OPTIMIZERS["SGD"](model.parameters()), None)}
        trainer = cases.sft(folder, model, more=given, max_grad_norm=CLIP, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict() | trainer.criterion.state_dict()

    whole = trained(tmp_path / "whole", save_strategy="steps", save_steps=4)
    again = trained(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


# ---- two processes -----------------------------------------------------------------------------------------------------------


def _two_processes(rank, folder):
    for name, dtype in (("dft", torch.float32), ("absgd", torch.float64)):
        model = cases.language_model(dtype)
        batches = truth.big_batches(cases.tokens(40), 10, 4, 4, processes=2, rows=cases.SEQUENCES)
        plain = truth.train(model, batches, max_norm=CLIP, losses_of=cases.losses_of, **LOSSES[name][1])
        trainer = robust(folder, model, name, rows=40)
        trainer.train()
        truth.assert_same(trainer.model, plain, dtype)
        of_all = trainer.accelerator.gather(torch.cat([p.detach().flatten() for p in trainer.model.parameters()])[None])
        assert torch.equal(of_all[0], of_all[1])  # the ranks do not drift apart (S10)
        if rank == 0:
            assert cases.logged(trainer, "loss") == pytest.approx(plain.means, rel=1e-5)
            assert cases.logged(trainer, "num_tokens")[-1] == 4 * 40 * cases.LENGTH


@two_processes.needs_gloo
def test_two_processes(tmp_path):
    truth.in_two_processes(_two_processes, tmp_path, tmp_path / "out")


# ---- Trainer with a language model -------------------------------------------------------------------------------------------


class RobustTrainer(RobustTrainerMixin, Trainer):
    """Trainer without TRL."""


@pytest.mark.parametrize("criterion", [lambda: "absgd", lambda: ab.ABLoss(lam=-2.0)], ids=["head", "logits"])
def test_trainer_shifts_labels(tmp_path, criterion):
    """A causal language model in Trainer, with the loss of its head or of its logits."""
    model, made = cases.language_model(torch.float64), criterion()
    plain = wanted(model, "absgd", torch.float64)
    options = {"criterion_options": {"lam": -2.0}} if isinstance(made, str) else {}
    optimizers = (truth.OPTIMIZERS["SGD"](model.parameters()), None)
    arguments = cases.arguments(tmp_path, max_grad_norm=CLIP)
    trainer = RobustTrainer(model, arguments, train_dataset=cases.Tokens(20), criterion=made, optimizers=optimizers, **options)
    trainer.train()
    truth.assert_same(trainer.model, plain, torch.float64)
    assert isinstance(trainer.criterion, ab.LinearABLoss) is isinstance(made, str)


class Unknown(torch.nn.Module):
    """A model of tokens of which nothing says whether its labels are those of the next tokens."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Embedding(cases.VOCABULARY, 4), torch.nn.Linear(4, cases.VOCABULARY)

    def forward(self, input_ids, labels=None):
        """The logits."""
        return {"logits": self.head(self.body(input_ids))}


@pytest.mark.parametrize("shift", [None, True, False])
def test_a_model_that_does_not_say_whether_labels_are_shifted(tmp_path, shift):
    ids = torch.arange(6).view(2, 3)
    given = {} if shift is None else {"shift_labels": shift}
    trainer = RobustTrainer(Unknown(), cases.arguments(tmp_path), criterion=ab.ABLoss(lam=0.5), **given)
    trainer.model.eval()
    if shift is None:
        with pytest.raises(ValueError, match="labels: got one for each token and a Unknown.*expected shift_labels=True"):
            trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids})
        return
    logits = trainer.model(ids)["logits"]
    rows, labels = (logits[:, :-1], ids[:, 1:]) if shift else (logits, ids)
    plain = torch.nn.functional.cross_entropy(rows.reshape(-1, cases.VOCABULARY), labels.reshape(-1))
    assert float(trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids})) == pytest.approx(
        float(plain.detach()), rel=1e-5
    )


# ---- what is refused ---------------------------------------------------------------------------------------------------------


def test_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_type: got 'dft' with RobustTrainerMixin.*expected criterion='dft'"):
        cases.sft(tmp_path, cases.language_model(), more={"criterion": "dft"}, loss_type="dft")


def test_other_trainers_of_trl_are_refused(tmp_path, monkeypatch):
    class Preferences(RobustTrainerMixin, DPOTrainer):
        pass

    monkeypatch.setattr(DPOTrainer, "__init__", Trainer.__init__)
    with pytest.raises(TypeError, match="Preferences: got a DPOTrainer of TRL.*expected Trainer or SFTTrainer"):
        Preferences(cases.language_model(), cases.arguments(tmp_path), criterion="dft")
