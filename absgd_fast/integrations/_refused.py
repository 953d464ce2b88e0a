"""What `RobustTrainerMixin` refuses, because the parameters would not be those of one big batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..schedule import CountedSchedule
from ._rows import of_logits
from ._steps import parts_of


def is_sft(trainer: Any) -> bool:
    """Whether this is a SFTTrainer, which trains causal language models and logs figures of their tokens."""
    return any(cls.__name__ == "SFTTrainer" and cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)


def refuse_own_losses(made: type, bases: Iterable[type]) -> None:
    """TypeError for a class with a base after the mixin whose own compute_loss would never be called."""
    for base in bases:
        if "compute_loss" in vars(base) and base.__module__.split(".")[0] not in ("transformers", "trl"):
            raise TypeError(
                f"{made.__name__}: got {base.__name__} after RobustTrainerMixin, whose own compute_loss would never be called;"
                " expected its loss as criterion= (a function of logits and labels that returns per-sample losses) and a trainer"
                " without compute_loss"
            )


def refuse_robust(optimizer: Any) -> None:
    """ValueError for an optimizer that would finish the criterion a second time."""
    while optimizer is not None:
        if getattr(optimizer, "robust", None) is not None:
            raise ValueError(
                "optimizers: got an optimizer with robust=, which would normalise gradients that are normalised and clipped"
                " already; with RobustTrainerMixin leave robust= out"
            )
        optimizer = getattr(optimizer, "optimizer", None)  # accelerate's wrapper


def refuse_training(trainer: Any) -> None:
    """ValueError or TypeError for a training in which the gradients would not be those of one big batch."""
    args, accelerator = trainer.args, trainer.accelerator
    of_trl = [cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith("trl.")]
    if of_trl and not is_sft(trainer):
        raise TypeError(
            f"{type(trainer).__name__}: got a {of_trl[0]} of TRL, whose loss is not that of labels; expected Trainer or"
            " SFTTrainer"
        )
    if args.label_smoothing_factor != 0:
        raise ValueError(
            f"label_smoothing_factor: got {args.label_smoothing_factor} with RobustTrainerMixin, whose criterion makes the loss;"
            " expected criterion=ABLoss(CrossEntropy(label_smoothing=...), ...)"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func: got one with RobustTrainerMixin, whose criterion makes the loss; expected criterion="
        )
    if getattr(args, "loss_type", "nll") not in ("nll", "chunked_nll"):
        raise ValueError(
            f"loss_type: got {args.loss_type!r} with RobustTrainerMixin, whose criterion makes the loss; expected"
            " criterion='dft' (or another criterion) and no loss_type"
        )
    name = str(getattr(args.optim, "value", args.optim))
    if "lomo" in name or "layerwise" in name:
        raise ValueError(
            f"optim: got {name!r}, which steps within backward, before the gradients are normalised; expected another"
        )
    sizes = {way: getattr(trainer, f"get_{way}_size", lambda: 1)() for way in ("tp", "cp", "sp")}
    sharded_by_model = getattr(trainer, "is_distributed_loading_by_transformers", False)
    refused = {
        "DeepSpeed, which scales, clips and steps by itself": trainer.is_deepspeed_enabled,
        "FSDP 1, which flattens the parameters": trainer.is_fsdp_enabled and not getattr(accelerator, "is_fsdp2", False),
        "torch.nn.DataParallel (several GPUs in one process)": args.n_gpu > 1,
        "tensor parallelism": sizes["tp"] > 1 or sharded_by_model,
        "context or sequence parallelism, which split the rows of a sample": sizes["cp"] > 1 or sizes["sp"] > 1,
    }
    for way, found in refused.items():
        if found:
            raise ValueError(
                f"RobustTrainerMixin: got {way}; expected one process, or one process per GPU with DistributedDataParallel or"
                " FSDP 2 (torchrun or accelerate launch)"
            )


def refuse_schedule(schedule: Any, criterion: nn.Module) -> None:
    """ValueError for a schedule that drives another criterion, or the loss of another one."""
    for part in parts_of(schedule):
        if isinstance(part, CountedSchedule) and all(part._driven is not module for module in criterion.modules()):
            raise ValueError(
                f"schedule: got a {type(part).__name__} of another {type(part._driven).__name__} than the trainer's, which it"
                " would leave as it is; expected one of criterion= (or its loss), or a function from the criterion to one, such"
                " as schedule=lambda criterion: TwoStage(criterion, lam=-0.5, start=1)"
            )


_OTHER_TASKS = {"multi_label_classification": "BCEWithLogitsLoss", "regression": "MSELoss"}  # and what Transformers takes


def refuse_task(model: Any, logits: Tensor, labels: Tensor, criterion: Any) -> None:
    """ValueError for a loss that chooses one class of several where the labels are any number of classes, or numbers."""
    if not of_logits(criterion):
        return
    config = getattr(model, "config", None)
    task = getattr(config, "problem_type", None)
    is_open = task is None and hasattr(config, "problem_type")  # then Transformers decides by the labels
    if logits.dim() == 2 and logits.shape[1] == 1:
        task = "regression"
    elif is_open and logits.dim() == 2 and labels.is_floating_point() and labels.shape == logits.shape:
        are_probabilities = bool(((labels.sum(1) - 1).abs() < 0.05).all())
        task = None if are_probabilities else "multi_label_classification"
    if task in _OTHER_TASKS:
        raise ValueError(
            f"criterion: got {type(criterion).__name__}, which chooses one of the classes, and a {type(model).__name__} with"
            f" logits {tuple(logits.shape)} and labels {tuple(labels.shape)} for {task!r}; expected"
            f" criterion=ABLoss(torch.nn.{_OTHER_TASKS[task]}(reduction='none'), lam=...)"
        )
