"""Robust losses inside Transformers' `Trainer` and TRL's `SFTTrainer`.

    class MyTrainer(RobustTrainerMixin, Trainer): ...
    trainer = MyTrainer(model, args, train_dataset=data, criterion=ABLoss(lam=-0.5))

What happens in one optimizer step (K = gradient_accumulation_steps; docs/integrations.md has the table of all frameworks):

    compute_loss      K times: the model is called without its labels, and the criterion (deferred if K > 1) makes the loss
    training_step     K times: backward, not divided by K; if K > 1, `finish_` normalises the gradients after the last one
    Trainer           clips them by max_grad_norm, logs their norm, and lets the optimizer step
    callback          steps the schedule; saves and loads the state of the criterion with the checkpoints

It builds on the public methods of Trainer (compute_loss, training_step, create_optimizer, save_model, train) and on callbacks.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed import ranks
from ..language_models import causal_lm_loss
from ..language_models.head import find_head
from ..linear import LinearABLoss
from ..ops import COUNT
from ..robust import ABLoss
from ._missing import without
from ._named import OPTIMIZERS, criterion_of, optimizer_called
from ._refused import is_sft, refuse_own_losses, refuse_robust, refuse_schedule, refuse_task, refuse_training
from ._rows import figures, figures_of_head, next_labels, rows, with_virtual_tokens, without_labels
from ._steps import drop_grads, is_open

try:
    from transformers import Trainer, TrainerCallback, TrainingArguments, __version__
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils import logging
except ImportError as error:
    raise without("transformers", "transformers 5.24") from error

if not hasattr(Trainer, "loss_is_scaled_for_ga"):  # otherwise it divides some losses and not others
    raise ImportError(
        f"absgd_fast.integrations.transformers: got transformers {__version__}, expected >= 5.19 (tested with 5.24);"
        " pip install -U transformers"
    )

_logger = logging.get_logger(__name__)
_Base: Any = Trainer if TYPE_CHECKING else object

STATE_FILE = "absgd_fast.pt"  # in a checkpoint's folder
_ADAM = ("ABAdam", "ABAdamW")  # which take betas and eps of TrainingArguments


class RobustTrainerMixin(_Base):
    """A robust loss, or any loss of this package, in Transformers' `Trainer` or TRL's `SFTTrainer`.

    Put it before the trainer's class, and give the trainer a `criterion`:

        class MyTrainer(RobustTrainerMixin, Trainer): ...
        trainer = MyTrainer(model, args, train_dataset=data, criterion=ABLoss(lam=-0.5))

    The parameters after each optimizer step are those of one big batch of all its samples: all gradient_accumulation_steps (a
    last short group too) on all processes. Gradients are clipped by max_grad_norm after the criterion has normalised them. The
    logged loss is the plain mean over the samples of the optimizer step, and the logged grad_norm that of the robust gradient.
    The evaluation loss is the plain mean. Each checkpoint has the state of the criterion and its schedule (`absgd_fast.pt`), and
    resume_from_checkpoint and load_best_model_at_end load it. An optimizer step with a NaN or infinite loss changes nothing.

    Labels are shifted for causal language models, and rows with the label -100 do not count. With a `LinearABLoss`, or a name,
    the logits of a causal language model are never stored in training.

    Args:
        *args, **kwargs: those of the trainer.
        criterion: an `ABLoss`, a `LinearABLoss` (for causal language models), a loss of this package or another callable of
            (logits, labels) that returns per-sample losses (then the plain mean), or a name: "absgd", "dft", "cross_entropy",
            "focal", "gce", "sce", "ldam", "vs", "la" or "cdt". With gradient_accumulation_steps > 1 it is made
            deferred, and an `ABLoss` with mix, max_weight or rule is refused.
        criterion_options: for a name, the arguments of its class: of `ABLoss` or `LinearABLoss` for "absgd" (lam among them) and
            "dft", of the loss for the others.
        schedule: a schedule of the criterion or its loss, such as `TwoStage`, or a function from the criterion to it. It is
            stepped after each epoch, or after each optimizer step with unit="step".
        optimizer: the name of an optimizer of this package, "ABSGD", "ABAdam", "ABAdamW", "ABRMSprop" or "ABAdagrad". It gets the
            learning rate, betas, eps and weight decay of TrainingArguments. None: whatever the trainer has.
        optimizer_options: more arguments of that optimizer.
        shift_labels: whether labels[:, t + 1] is the label of position t, as in causal language models. None: as the class of the
            model says.

    Raises:
        ValueError: an option that would divide or clip a second time or make another loss (loss_divisor, `robust=` of an
            optimizer, label_smoothing_factor, compute_loss_func, TRL's loss_type="dft"), a way of training whose gradients are
            not those of one big batch (DeepSpeed, FSDP 1, DataParallel, tensor, context and sequence parallelism, optimizers that
            step within backward), a criterion that cannot be deferred with gradient accumulation.
        TypeError: a trainer of TRL that is no SFTTrainer, a class in which the trainer stands before the mixin or has a
            compute_loss of its own, a `LinearABLoss` for a model without an unadapted linear head.

    >>> from transformers import Trainer
    >>> class MyTrainer(RobustTrainerMixin, Trainer): ...
    """

    loss_is_scaled_for_ga = True  # Trainer does not divide by the accumulation steps

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        mro = cls.__mro__
        refuse_own_losses(cls, mro[mro.index(RobustTrainerMixin) + 1 :])
        if Trainer in mro and mro.index(Trainer) < mro.index(RobustTrainerMixin):
            raise TypeError(
                f"{cls.__name__}: got Trainer before RobustTrainerMixin, whose methods would not be called; expected"
                f" class {cls.__name__}(RobustTrainerMixin, Trainer)"
            )

    def __init__(
        self,
        *args: Any,
        criterion: str | Callable[..., Tensor],
        criterion_options: dict[str, Any] | None = None,
        schedule: Any = None,
        optimizer: str | None = None,
        optimizer_options: dict[str, Any] | None = None,
        shift_labels: bool | None = None,
        **kwargs: Any,
    ):
        optimizer = optimizer_called(optimizer)
        if optimizer is None and optimizer_options:
            raise ValueError(
                "optimizer_options: got some without optimizer=, expected the name of an optimizer of absgd_fast too"
            )
        self._our_optimizer = optimizer, dict(optimizer_options or {})
        super().__init__(*args, **kwargs)
        refuse_training(self)
        if not self.label_names:  # of a model whose forward does not name any
            self.label_names: list[str] = ["labels"]
        model = _inner(self, self.model)
        self._shifts = _shifts_labels(self, model) if shift_labels is None else shift_labels
        made = criterion_of(criterion, dict(criterion_options or {}), bool(self._shifts))
        if isinstance(made, LinearABLoss):
            find_head(model)  # TypeError for one that is adapted
        self.criterion = made.to(self.args.device)
        self._defer()
        made_here = isinstance(schedule, type) or (callable(schedule) and not hasattr(schedule, "step"))
        self.schedule = schedule(self.criterion) if made_here else schedule
        refuse_schedule(self.schedule, self.criterion)
        ignored, inner = self.criterion.ignore_index, self.criterion.criterion
        self._plain_mean = ABLoss(inner, lam=math.inf, process_group=None, ignore_index=ignored).to(self.args.device)
        self._sum = torch.zeros((), dtype=torch.float64, device=self.args.device)  # of the losses of this optimizer step
        self._bad_steps = 0
        self._fresh = copy.deepcopy(self._robust_state()) if self.model_init is not None else None
        self._resumed_from: str | None = None
        self._callback = _StateAndSchedule(self)
        self.add_callback(self._callback)

    def _defer(self) -> None:
        """Make the criterion deferred if a step has several micro-batches. Otherwise other terms may be added to the loss."""
        criterion = self.criterion
        if criterion.loss_divisor != 1:
            raise ValueError(
                f"loss_divisor: got a criterion with {criterion.loss_divisor:g}, expected 1: with RobustTrainerMixin Trainer does"
                " not divide the loss by gradient_accumulation_steps, so leave loss_divisor out"
            )
        steps = self.args.gradient_accumulation_steps
        try:
            if steps > 1 and criterion.rule is not None:
                raise ValueError("rule: got one, which weighs each batch by itself")
            criterion.deferred = steps > 1
        except ValueError as error:
            raise ValueError(
                f"criterion: got one that cannot be deferred, and gradient_accumulation_steps={steps}, whose micro-batches are"
                f" normalised together; expected one without that option, or gradient_accumulation_steps=1 ({error})"
            ) from None

    # ---- the loss of a micro-batch ----

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss for backward (while the model trains), or the plain mean (while it is evaluated), as Trainer calls it.

        num_items_in_batch is not used: the criterion counts the rows of all micro-batches itself.
        """
        trains = model.training and torch.is_grad_enabled()
        criterion = self.criterion if trains else self._plain_mean
        if self._shifts:
            inputs = with_virtual_tokens(self.accelerator.unwrap_model(model, keep_torch_compile=False), inputs, self.label_names)
        if isinstance(self.criterion, LinearABLoss) and (trains or not return_outputs):
            return self._loss_of_head(self.criterion, model, inputs, return_outputs)
        inner = _inner(self, model)
        rest, labels = without_labels(inputs, self.label_names)
        outputs = model(**_with_decoder_inputs(inner, rest, labels))
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs if isinstance(outputs, Tensor) else outputs[0]
        if inputs.get("shift_labels") is None:
            labels = self._shifted(labels, inputs, inner)
        refuse_task(inner, logits, labels, self.criterion.criterion)
        of_rows = rows(logits, labels, self.criterion.criterion)
        loss = criterion(*of_rows)
        if is_sft(self):
            self._add_token_figures(figures(*of_rows), inputs)
        if not return_outputs:
            return loss
        if isinstance(outputs, dict):
            return loss, outputs
        return loss, (loss, outputs) if isinstance(outputs, Tensor) else (loss, *outputs)

    def _shifted(self, labels: Tensor, inputs: dict[str, Any], model: nn.Module) -> Tensor:
        """The labels, each at the position whose logits are meant for it."""
        if self._shifts is None and labels.dim() > 1 and labels.shape == getattr(inputs.get("input_ids"), "shape", None):
            raise ValueError(
                f"labels: got one for each token and a {type(model).__name__}, of which Transformers does not say whether they"
                " are those of the next tokens; expected shift_labels=True (a causal language model) or shift_labels=False"
                " beside criterion="
            )
        return next_labels(labels) if self._shifts else labels

    def _loss_of_head(self, criterion: LinearABLoss, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """As `compute_loss`, for a causal language model and a `LinearABLoss`, which stores no logits."""
        made: list[Tensor] = []
        hook = criterion.register_forward_pre_hook(lambda _, head: made.append(figures_of_head(*head))) if is_sft(self) else None
        try:
            loss, outputs = causal_lm_loss(criterion, model, inputs, return_outputs=True)
        finally:
            if hook is not None:
                hook.remove()
        if made:
            self._add_token_figures(made[0], inputs)
        loss = loss if model.training and torch.is_grad_enabled() else criterion.last.mean_loss
        return (loss, outputs) if return_outputs else loss

    def _add_token_figures(self, of_labels: Tensor, inputs: dict[str, Any]) -> None:
        """Add the figures of a micro-batch to those that SFTTrainer logs: entropy, mean_token_accuracy and num_tokens."""
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        tokens = (
            mask.sum()
            if mask is not None
            else torch.tensor(0 if positions is None else positions.size(1), dtype=torch.int64, device=of_labels.device)
        )
        of_all = self.accelerator.gather(torch.cat([of_labels.double(), tokens.to(of_labels.device).double()[None]])[None])
        count, entropy, correct, in_batch = of_all.sum(0).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["entropy"].append(entropy / max(count, 1))
        metrics["mean_token_accuracy"].append(correct / max(count, 1))
        if self.model.training:
            self._total_train_tokens += int(in_batch)
        metrics["num_tokens"] = [self._total_train_tokens]

    # ---- an optimizer step ----

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of a micro-batch, and after the last of a step the normalisation of the gradients.

        Returns what Trainer adds to the loss that it logs: 0, and with the last micro-batch the plain mean of all.
        """
        criterion = self.criterion
        bad_before, forward_before = criterion.nonfinite_batches.clone(), criterion.memo.sample_stats
        super().training_step(model, *args, **kwargs)
        if criterion.memo.sample_stats is forward_before:
            raise RuntimeError(
                f"compute_loss: got one of {type(self).__name__} that does not call the criterion; expected loss ="
                " super().compute_loss(...), or self.criterion(logits, labels), or no compute_loss of your own and your loss as"
                " criterion="
            )
        if not criterion.deferred:
            return self._mean_of_one(criterion.nonfinite_batches != bad_before, list(model.parameters()))
        self._sum += criterion.last.losses.sum(dtype=torch.float64)
        if not self.accelerator.sync_gradients:
            return torch.zeros((), dtype=torch.float32, device=self._sum.device)
        rows = self._finish(list(model.parameters()))
        # Trainer averages it over the processes: the sum over all rows of all processes, divided by their number.
        mean = self._sum * ranks(criterion.process_group, 1) / rows.clamp(min=1)
        self._sum = torch.zeros_like(self._sum)
        return mean.float()

    def _finish(self, params: list[nn.Parameter]) -> Tensor:
        """Normalise the gradients of the step. Returns the number of rows that count, on all processes."""
        step = self.criterion.deferred_step
        assert step is not None
        # Before GradScaler.unscale_, which Trainer's clipping calls: the factor is the same for scaled gradients.
        counts = self.criterion.finish_(params)
        self._drop_unless(counts, params)
        assert step.settled is not None
        return step.settled[COUNT]

    def _mean_of_one(self, is_bad: Tensor, params: list[nn.Parameter]) -> Tensor:
        """The plain mean of a step of one micro-batch, over the rows of all processes. is_bad: a loss was NaN or infinite."""
        last = self.criterion.last
        figures = [last.losses.sum(dtype=torch.float64), last.counted.sum().double(), is_bad.double()]
        total, rows, bad = self.accelerator.gather(torch.stack(figures)[None]).sum(0)
        self._drop_unless(bad == 0, params)
        return (total / rows.clamp(min=1)).float()

    def _drop_unless(self, counts: Tensor, params: list[nn.Parameter]) -> None:
        """Drop the gradients of a step with a nonfinite loss. A scaler passes over such a step itself."""
        if self.accelerator.scaler is None and not bool(counts):
            drop_grads(params)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's; it says how many optimizer steps were passed over because of a NaN or infinite loss."""
        bad = int(self.criterion.nonfinite_batches)
        if bad > self._bad_steps:
            logs["nonfinite_steps"] = bad
            _logger.warning(
                f"{bad - self._bad_steps} optimizer step(s) since the last log had a NaN or infinite loss; they changed neither"
                " the parameters nor the criterion"
            )
        self._bad_steps = bad
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, with the optimizer of this package that was asked for."""
        name, options = self._our_optimizer
        if name is not None and self.optimizer is None:
            given = self.args
            numbers: dict[str, Any] = {"lr": given.learning_rate}
            if name in _ADAM:
                numbers |= {"betas": (given.adam_beta1, given.adam_beta2), "eps": given.adam_epsilon}
            self.optimizer_cls_and_kwargs = OPTIMIZERS[name], numbers | options
        return super().create_optimizer(*args, **kwargs)

    # ---- the state ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; the state of the criterion is that of the checkpoint, and with model_init it begins anew each time."""
        if self._fresh is not None:
            self._load_robust_state(copy.deepcopy(self._fresh))
        found = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._resumed_from = found or None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """As Trainer's; the state of the criterion and the schedule is written beside the model."""
        super().save_model(output_dir, *args, **kwargs)
        if self.args.should_save:
            folder = self.args.output_dir if output_dir is None else output_dir
            torch.save(self._robust_state(), os.path.join(folder, STATE_FILE))

    def _robust_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"criterion": self.criterion.state_dict()}
        callback = getattr(self, "_callback", None)
        if self.schedule is not None:
            state["schedule"] = self.schedule.state_dict()
        state["inside_epoch"] = callback is not None and callback.inside_epoch
        state["epoch_is_due"] = callback is not None and callback.epoch_is_due
        return state

    def _load_robust_state(self, state: dict[str, Any]) -> None:
        self.criterion.load_state_dict(state["criterion"])
        if self.schedule is not None and "schedule" in state:
            self.schedule.load_state_dict(state["schedule"])
        self._bad_steps = int(self.criterion.nonfinite_batches)

    def _load_from_folder(self, folder: str) -> tuple[bool, bool]:
        """Load the state in a checkpoint's folder.

        Returns whether it was saved before the end of an epoch was seen, and whether an epoch that was seen to end is due.
        """
        path = os.path.join(folder, STATE_FILE)
        if not os.path.isfile(path):
            warnings.warn(
                f"resume_from_checkpoint: got {folder}, which has no {STATE_FILE}; expected a checkpoint of a trainer with"
                " RobustTrainerMixin. The criterion and its schedule begin anew",
                stacklevel=2,
            )
            return False, False
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._load_robust_state(state)
        return bool(state["inside_epoch"]), bool(state.get("epoch_is_due", False))


class _StateAndSchedule(TrainerCallback):
    """Steps the schedule, and loads the state when Trainer has loaded that of the model."""

    def __init__(self, trainer: RobustTrainerMixin):
        self.trainer = trainer
        self.inside_epoch = False  # whether an epoch has begun and not ended
        self.epoch_is_due = False  # whether an epoch has ended within an optimizer step, after which the schedule is stepped

    def _step(self, unit: str) -> None:
        schedule = self.trainer.schedule
        if schedule is not None and getattr(schedule, "unit", "epoch") == unit:
            schedule.step()

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """After Trainer has loaded the model and the optimizer."""
        trainer = self.trainer
        refuse_robust(trainer.optimizer)
        trainer._defer()  # a search may have changed the accumulation
        trainer.criterion.discard()  # micro-batches of a training that was broken off
        trainer._sum = torch.zeros_like(trainer._sum)
        self.inside_epoch = self.epoch_is_due = False
        if trainer._resumed_from is None:
            return
        inside, is_due = trainer._load_from_folder(trainer._resumed_from)
        # A checkpoint after the last step of an epoch was saved before on_epoch_end, which Trainer does not call again.
        if is_due or (inside and _is_whole(state.epoch)):
            self._step("epoch")

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch begins."""
        self.inside_epoch = True

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """After an optimizer step, before Trainer saves."""
        self._step("step")
        if self.epoch_is_due:
            self.epoch_is_due = False
            self._step("epoch")

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """After an epoch, before Trainer saves. Also after a part of one, if the training stops in it; that is not counted."""
        if _is_whole(state.epoch) or not control.should_training_stop:
            self.inside_epoch = False
            # Of a dataset without a length, the last micro-batches and the first of the next epoch make one optimizer step.
            self.epoch_is_due = is_open(self.trainer.criterion)
            if not self.epoch_is_due:
                self._step("epoch")

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """After Trainer has loaded the best model."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.trainer._load_from_folder(state.best_model_checkpoint)


def _is_whole(epoch: float) -> bool:
    """Whether Trainer has counted an integer of epochs."""
    return math.isclose(epoch, round(epoch), abs_tol=1e-9)


# ---- the model ----------------------------------------------------------------------------------------------------------------


def _inner(trainer: Any, model: nn.Module) -> Any:
    """The model inside the wrappers of accelerate and PEFT."""
    model = trainer.accelerator.unwrap_model(model, keep_torch_compile=False)
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


def _shifts_labels(trainer: Any, model: Any) -> bool | None:
    """Whether the label of a position is the next token; None if the class of the model does not say."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    names = {cls.__name__ for cls in type(model).__mro__}
    if is_sft(trainer) or names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return True
    of_class = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return None if of_class is None else of_class is ForCausalLMLoss


def _with_decoder_inputs(model: Any, inputs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """The inputs of an encoder-decoder model too, which otherwise makes those of its decoder from the labels."""
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not encodes or make is None or any(name in inputs for name in ("decoder_input_ids", "decoder_inputs_embeds")):
        return inputs
    return {**inputs, "decoder_input_ids": make(labels=labels)}
