"""ABSGD in Lightning's Trainer. Tested with `lightning.pytorch` 2.6; docs/integrations.md has an example."""

from __future__ import annotations

from typing import Any

from ..robust.base import RobustLoss
from ..schedule import LossSchedule
from ._missing import without
from ._steps import Skipped, accumulates, check_criterion, check_schedule, divided_by, finish

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise without("lightning", "lightning 2.6") from error


class RobustCallback(Callback):
    """Lets Lightning train with an `ABLoss` or `LinearABLoss` as a plain loop with one big batch does (docs/MATH.md §5).

    Lightning divides the loss of each micro-batch by `accumulate_grad_batches`, and clips before the optimizer's step. The
    callback makes the criterion deferred where several micro-batches come, and normalises their gradients before they are
    clipped. Their number may change from epoch to epoch, and the last group of an epoch may be short. The value of the criterion
    becomes the plain mean loss, so that `self.log("loss", loss)` shows it.

    `fit` moves the callback before the others of the Trainer, so that they see normalised gradients.

    The checkpoints of the Trainer have the state of the schedule, and that of the criterion. So `ckpt_path=` resumes both.

    Args:
        schedule: of lambda or of the loss, such as `TwoStage`; several as `ChainedSchedules`. The callback steps it with the
            last batch of each epoch, as Lightning does with a scheduler of learning rates; with ``unit="step"`` after each
            optimizer step.
        criterion: the criterion, if it is no submodule of the LightningModule. None: all those that are.

    Raises (when `fit` begins):
        ValueError: there is no criterion; the schedule drives another one, or Lightning steps it already; gradient_clip_val
            beside an optimizer with ``robust=``, which would normalise after clipping; an option that cannot be deferred (mix,
            max_weight) while gradients accumulate.
        RuntimeError: manual optimization, or a strategy that accumulates by itself (DeepSpeed).

    In the training, RuntimeError: two criteria in one step of several micro-batches. ValueError: an optimizer that runs
    training_step several times in a step, as LBFGS does.

    A training_step that returns None skips its micro-batch, whether it has called the criterion or not.

    Do not add other terms to the loss while gradients accumulate: the gradient of the whole step is normalised at its end.

    >>> import absgd_fast as ab
    >>> criterion = ab.ABLoss(lam=-0.5)
    >>> callback = RobustCallback(ab.TwoStage(criterion, lam=-0.5, start=10), criterion=criterion)
    >>> callback.state_dict()["schedule"]
    {'count': 0}
    """

    def __init__(self, schedule: LossSchedule | None = None, *, criterion: RobustLoss | None = None):
        if criterion is not None:
            check_criterion(criterion, ", or None")
        self.schedule = schedule
        self._given = criterion
        self._criteria = [] if criterion is None else [criterion]
        self._stepped = False  # whether the optimizer has, with this batch
        self._skipped: list[Skipped] = []  # of the criteria, until the backward of this batch
        self._resting = False  # whether the criteria are in eval mode for an epoch without backward

    # ---- before the first batch ----

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the criteria, whose value is the plain mean from now on. Lightning calls this before it loads a checkpoint."""
        if self._given is None:
            self._criteria = [module for module in pl_module.modules() if isinstance(module, RobustLoss)]
        for criterion in self._criteria:
            criterion.report = "mean"  # validation may come before the first batch of a training, or without one
        if stage != "fit":
            return
        if not self._criteria:
            raise ValueError(
                f"RobustCallback: {type(pl_module).__name__} has no ABLoss; expected one as an attribute, such as"
                " self.criterion = ab.ABLoss(...), or RobustCallback(criterion=...)"
            )
        if not pl_module.automatic_optimization:
            raise RuntimeError(
                "RobustCallback: got automatic_optimization=False, where Lightning calls no hook between the last backward and"
                " clipping; leave the callback out, and call criterion.finish_(params) before clipping (docs/scale.md)"
            )
        check_schedule(self.schedule, self._criteria)
        # a callback that logs the norm of the gradients, which are sums until this one has normalised them
        trainer.callbacks = [self, *(callback for callback in trainer.callbacks if callback is not self)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what does not go together, and bring a criterion outside of the module to its device."""
        if trainer.strategy.handles_gradient_accumulation:
            raise RuntimeError(
                f"RobustCallback: got {type(trainer.strategy).__name__}, which accumulates, clips and steps by itself; expected"
                " a strategy that leaves this to Lightning, such as ddp"
            )
        if any(config.scheduler is self.schedule for config in trainer.lr_scheduler_configs):
            raise ValueError(
                "schedule: configure_optimizers returns it too, so it would be stepped twice; return it there or give it to"
                " RobustCallback, not both"
            )
        if trainer.gradient_clip_val and any(self._finishes(optimizer) for optimizer in trainer.optimizers):
            raise ValueError(
                f"gradient_clip_val: got {trainer.gradient_clip_val} beside an optimizer with robust=, whose step normalises"
                " after Lightning has clipped; leave robust= out (RobustCallback normalises before clipping), or"
                " gradient_clip_val, with max_norm= of the optimizer in its place"
            )
        if self._given is not None:
            self._given.to(pl_module.device)

    def _finishes(self, optimizer: Any) -> bool:
        """Whether the step of this optimizer normalises the gradients of one of the criteria."""
        robust = getattr(optimizer, "robust", None)
        return any(robust is criterion for criterion in self._criteria)

    # ---- the steps ----

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the micro-batches of an epoch that was cut short: Lightning throws their gradients away."""
        for criterion in self._criteria:
            criterion.discard()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Follow accumulate_grad_batches, which may change from epoch to epoch."""
        self._stepped = False
        # SWA adds a last epoch without backward, for batch norm; it must not move log s
        self._resting = getattr(trainer.fit_loop, "_skip_backward", False)
        for criterion in self._criteria:
            if self._resting:
                criterion.eval()
            else:
                has_optimizer = any(getattr(o, "robust", None) is criterion for o in trainer.optimizers)
                accumulates(criterion, trainer.accumulate_grad_batches, has_optimizer=has_optimizer)
        self._skipped = [Skipped(criterion) for criterion in self._criteria]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The micro-batch counts."""
        self._skipped = []

    def _take_out_skipped(self) -> None:
        """Forget a micro-batch whose training_step has returned None, so that Lightning runs no backward."""
        for skipped in self._skipped:
            skipped.take_out()
        self._skipped = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Normalise the gradients. Lightning has unscaled them, and has not clipped them yet."""
        if self._stepped:
            raise ValueError(
                f"RobustCallback: got {type(optimizer).__name__}, which runs training_step several times in one optimizer step,"
                " and log s would move with each of them; expected an optimizer that runs it once, such as ABSGD"
            )
        self._take_out_skipped()
        divisor = trainer.accumulate_grad_batches  # of a short last group too
        if self._finishes(optimizer):
            divided_by(optimizer.robust, divisor)
        else:
            finish(self._criteria, [param for group in optimizer.param_groups for param in group["params"]], divisor)
        self._stepped = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Step the schedule, before Lightning validates and saves."""
        self._take_out_skipped()
        stepped, self._stepped = self._stepped, False
        if self.schedule is None:
            return
        if stepped if getattr(self.schedule, "unit", "epoch") == "step" else trainer.is_last_batch:
            self.schedule.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End an epoch without backward."""
        if self._resting:
            for criterion in self._criteria:
                criterion.train()

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, and of a criterion that is no submodule of the LightningModule."""
        parts = {"schedule": self.schedule, "criterion": self._given}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the saved state."""
        if self._given is not None and "criterion" in state_dict:
            self._given.load_state_dict(state_dict["criterion"])
        if self.schedule is not None and "schedule" in state_dict:
            self.schedule.load_state_dict(state_dict["schedule"])
