"""ABSGD in a loop with an Accelerator. Tested with accelerate 1.15; docs/integrations.md has an example."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..robust.base import RobustLoss
from ..schedule import LossSchedule
from ._missing import without
from ._steps import accumulates, check_criterion, check_schedule, finish, is_open

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise without("accelerate", "accelerate 1.15") from error


class Robust:
    """Ends the optimizer steps of an `ABLoss` or `LinearABLoss` in a loop with an Accelerator (docs/MATH.md §5).

    `Accelerator.backward` divides the loss of each micro-batch by `gradient_accumulation_steps`. Several of them make the
    criterion deferred, and one makes it not deferred. `finish` then normalises their gradients and clips. The last group of an
    epoch may be short. The value of the criterion becomes the plain mean loss.

    The Accelerator's own `clip_grad_norm_` and `clip_grad_value_` would clip sums if they came before `finish`. So this object
    replaces them on the Accelerator by ones that note it, and `finish` raises an error.

    `Accelerator.save_state` and `load_state` save and load the criterion and the schedule.

    Args:
        accelerator: the Accelerator of the training. Its `gradient_accumulation_steps` must be set already.
        criterion: it is moved to the Accelerator's device. Do not give it to `Accelerator.prepare`, which on several processes
            wraps it in DDP: that refuses a module without parameters.
        schedule: of lambda or of the loss, to be saved with the criterion. You call its step(), once per epoch or step. Do not
            give it to `Accelerator.prepare` either: it would be stepped once for each process.

    Raises:
        TypeError: criterion is no `ABLoss` or `LinearABLoss`.
        ValueError: the schedule drives another criterion; an option that cannot be deferred (mix, max_weight) while gradients
            accumulate.
        RuntimeError: a backend that accumulates and clips by itself (DeepSpeed, Megatron-LM).

    >>> import absgd_fast as ab
    >>> from accelerate import Accelerator
    >>> accelerator = Accelerator(cpu=True)
    >>> model, criterion = torch.nn.Linear(4, 3), ab.ABLoss(lam=-0.5)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> model, optimizer = accelerator.prepare(model, optimizer)
    >>> robust = Robust(accelerator, criterion)
    >>> for _ in range(2):
    ...     with accelerator.accumulate(model):
    ...         accelerator.backward(criterion(model(torch.ones(2, 4)), torch.tensor([0, 2])))
    ...         norm = robust.finish(model, max_norm=1.0)
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    """

    def __init__(self, accelerator: Accelerator, criterion: RobustLoss, schedule: LossSchedule | None = None):
        check_criterion(criterion)
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise RuntimeError(
                f"Robust: got an Accelerator with {accelerator.distributed_type.value}, which accumulates and clips by itself;"
                " expected DDP, FSDP or one process"
            )
        check_schedule(schedule, [criterion])
        self.accelerator, self.criterion = accelerator, criterion.to(accelerator.device)
        accumulates(criterion, accelerator.gradient_accumulation_steps)
        accelerator.register_for_checkpointing(criterion, *([] if schedule is None else [schedule]))
        self._clipped: set[int] = set()  # ids of parameters whose gradients were clipped too early
        for name in ("clip_grad_norm_", "clip_grad_value_"):
            setattr(accelerator, name, self._noting(getattr(accelerator, name)))

    def _noting(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the Accelerator that clips. It also notes parameters that it clips before `finish` of their step."""

        @functools.wraps(clip)
        def noting(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Any:
            params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            if is_open(self.criterion):
                self._clipped.update(map(id, params))
            return clip(params, *args, **kwargs)

        return noting

    def finish(self, model: nn.Module | Iterable[Tensor], max_norm: float | None = None) -> Tensor | None:
        """End an optimizer step: normalise the gradients, and clip them. Call it between each backward and optimizer.step().

        While `Accelerator.accumulate` collects gradients it does nothing. With float16 it unscales the gradients first.

        Args:
            model: the module whose parameters the optimizer steps, or these parameters.
            max_norm: clip the gradient to this norm, as `Accelerator.clip_grad_norm_` does; math.inf only measures it.

        Returns:
            The norm of the whole gradient before clipping (0-d); NaN if a nonfinite loss has spoilt the step, which then changes
            nothing. None without max_norm, and while gradients accumulate.

        Raises:
            RuntimeError: `gradient_accumulation_steps` was raised after this object was made; or the Accelerator has clipped the
                gradients, which are sums before this call.
        """
        accelerator, criterion = self.accelerator, self.criterion
        micro_batches = accelerator.gradient_accumulation_steps
        if micro_batches > 1 and criterion.rule is None and not criterion.deferred:
            raise RuntimeError(
                f"finish: got gradient_accumulation_steps={micro_batches}, which was 1 when Robust was made, so these"
                " micro-batches were normalised one by one; expected it to be set before Robust(accelerator, criterion)"
            )
        if not accelerator.sync_gradients:
            return None
        params = list(model.parameters() if isinstance(model, nn.Module) else model)
        clipped = any(id(param) in self._clipped for param in params)
        self._clipped.clear()
        if clipped:
            raise RuntimeError(
                "finish: got gradients that accelerator.clip_grad_norm_ or clip_grad_value_ has clipped while they were sums over"
                " all samples, which makes the step far too small; expected robust.finish(model, max_norm=...) in its place, or"
                " clipping between finish and optimizer.step()"
            )
        accelerator.unscale_gradients()
        counts = finish([criterion], params, micro_batches)
        if max_norm is None:
            return None
        # Accelerate's own knows FSDP, but would unscale a second time
        clip = accelerator.clip_grad_norm_ if accelerator.scaler is None else nn.utils.clip_grad_norm_
        norm: Tensor = clip(params, max_norm)
        return norm if counts else torch.full_like(norm, torch.nan)
