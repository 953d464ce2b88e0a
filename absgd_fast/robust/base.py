"""RobustLoss: what `ABLoss` and `LinearABLoss` are alike in."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _backend, _checks, ops
from ..losses import CrossEntropy
from . import finish, options
from .lam import RelativeLam
from .last import LastForward, Memo
from .normalizer import OWN, Deferred, Own, Shared
from .processes import Processes
from .state import RobustState
from .step import OPEN, DeferredStep


class RobustLoss(RobustState):
    """A robust loss of some criterion: its state, the normaliser that settles it, and what the latest forward left."""

    def __init__(
        self,
        criterion: Callable[..., Tensor] | None,
        *,
        lam: float | RelativeLam | None = None,
        process_group="auto",
        deferred: bool = False,
        loss_divisor: float = 1,
        backend: str | None = None,
        **numbers,
    ):
        if lam is None:
            raise ValueError("lam: got None, expected a number other than 0 or RelativeLam(r); math.inf is the plain mean")
        if criterion is not None and not callable(criterion):
            raise TypeError(f"criterion: got {type(criterion).__name__}, expected a callable that returns per-sample losses")
        shared = (Deferred if deferred else Shared)(Processes(process_group), _checks.positive(loss_divisor, "loss_divisor"))
        super().__init__(lam, **numbers)
        self._shared = shared
        if deferred:
            options.check("deferred=True", vars(self))
        self.criterion = CrossEntropy() if criterion is None else criterion
        self.backend = backend
        self.memo = Memo()
        self._served: tuple[torch.device, ops.Operators] | None = None  # the device of the last batch, and what serves it
        reason = None if backend is None else _backend.why_not(backend)  # the module may still be moved to another device
        if reason is not None:
            raise RuntimeError(
                f"backend {backend!r} cannot run: {reason}; run `python -m absgd_fast doctor`, or use backend=None"
            )

    # ---- state ----

    @property
    def process_group(self):
        return self._shared.processes.group

    @process_group.setter
    def process_group(self, group) -> None:
        self._shared.processes.group = group

    @property
    def loss_divisor(self) -> float:
        return self._shared.loss_divisor

    @loss_divisor.setter
    def loss_divisor(self, value: float) -> None:
        self._shared.loss_divisor = value

    @property
    def deferred(self) -> bool:
        return self._shared.deferred

    @deferred.setter
    def deferred(self, value: bool) -> None:
        if bool(value) == self.deferred:
            return
        if value:
            options.check("deferred=True", vars(self))
        self._shared = (Deferred if value else Shared)(self._shared.processes, self._shared.loss_divisor)

    @property
    def deferred_step(self) -> DeferredStep | None:
        """The optimizer step that deferred mode is in; None where nothing is deferred."""
        return self._shared.step if self.deferred else None

    def set_lam(self, value: float | RelativeLam, reset: bool = True) -> None:
        """Use another lambda. s lives on the old lambda's scale, so it starts anew unless reset=False.

        >>> from absgd_fast import ABLoss
        >>> criterion = ABLoss(lam=math.inf)
        >>> criterion.set_lam(-0.5)
        >>> criterion.lam
        tensor(-0.5000)
        """
        if self.deferred:
            self._shared.step.check("set_lam")
        self._take_lam(value, reset)
        self._shared.processes.forget_agreement()

    @property
    def objective(self) -> Tensor:
        """lam log s: the running estimate of the DRO objective (Eq. 7 without r); the last plain mean at |lam| = inf."""
        seen = self.memo.sample_stats is not None
        plain = self.last.mean_loss.to(self.log_s.dtype) if seen else self.log_s.new_tensor(math.nan)
        return torch.where(self.lam.isinf() | self.lam.isnan(), plain, self.lam * self.log_s)

    @property
    def last(self) -> LastForward:
        if self.memo.sample_stats is None:
            raise RuntimeError("last: there was no forward yet; call the criterion first")
        return LastForward(self.memo)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._served = None
        return self

    def _own_parts(self) -> None:
        """What a shallow copy or a replica does not share with its original: what the latest forward left."""
        self.memo = copy.copy(self.memo)

    def __copy__(self):
        copied = type(self).__new__(type(self))
        copied.__setstate__(self.__dict__)
        copied._own_parts()
        return copied

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._own_parts()
        return replica

    def _refusal(self, lam: Tensor | None) -> str | None:
        """Why a saved lambda cannot be loaded."""
        if lam is not None and bool(lam.isnan()) and self.relative_lam is None:
            return "the saved RelativeLam was not fixed yet; construct ABLoss with lam=RelativeLam(r)"
        return None

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        lam = state_dict.get(prefix + "lam")
        refusal = self._refusal(lam)
        if refusal is not None:
            error_msgs.append(f"{prefix}lam: {refusal}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._shared.processes.forget_agreement()
        if self.deferred:
            self._shared.step.move("load")
        if lam is not None:
            self.lam_is_open = bool(lam.isnan())

    # ---- the deferred step ----

    def discard(self) -> None:
        """Deferred mode: forget the micro-batches since the last step, whose gradients were thrown away (zero_grad).

        >>> from absgd_fast import ABLoss
        >>> criterion = ABLoss(lam=0.5, deferred=True)
        >>> criterion(torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 3])).backward()
        >>> criterion.discard()
        """
        if self.deferred:
            self._shared.step.move("discard")

    def finish_(self, params) -> Tensor:
        """Settle log s for all micro-batches since the last step, and bring the gradients to their size, in place.

            log s' of all their rows, on all processes;    grad <- exp(m - log s') / n  grad  (times the R processes that average)

        For ``deferred=True`` with any optimizer: after the last backward (and after GradScaler.unscale_), before clipping.

        Args:
            params: the parameters of the step, all of them (a tensor or an iterable of tensors).

        Returns:
            0-d bool, whether the step counts. It does not after a NaN or infinite loss, or one whose z is 60 beyond the
            reference point: the state stays as it was. On the CPU there is no gradient left (an optimizer then passes over
            the parameters). On a GPU the gradients become NaN, because looking would wait for it: there an optimizer may step
            only where the result is True, or behind GradScaler, which sees the NaN.

        Raises:
            RuntimeError: not deferred, nothing to finish, or finished already. ValueError: a float16 gradient, which cannot
            hold sums that are not normalised.

        >>> from absgd_fast import ABLoss
        >>> weight = torch.zeros(10, 4, requires_grad=True)
        >>> criterion = ABLoss(lam=0.5, deferred=True)
        >>> for x, y in [(torch.ones(2, 4), torch.tensor([0, 1])), (torch.ones(1, 4), torch.tensor([2]))]:
        ...     criterion(x @ weight.T, y).backward()
        >>> criterion.finish_(weight)
        tensor(True)

        Source: ABSGD paper, Alg. 1, steps 5 and 6: s' divides every gradient alike, so it may be applied last.
        """
        if not self.deferred:
            raise RuntimeError("finish_: got an ABLoss that is not deferred, whose gradients have their size already")
        self._shared.step.check("finish_")
        params, grads = finish.deferred_grads(params)
        return finish.scale_grads(params, grads, self._end("finish_"))

    def settle(self) -> Tensor | None:
        """Ends the deferred step: log s' of all its micro-batches is written to the state; what finishes the gradients is returned.

        Called by `finish_` and by an optimizer with ``robust=``; the gradients are not touched.

        Returns:
            (6) float64, reference.settle: the second number multiplies the gradients, the last counts rows that are not finite;
            or None: no micro-batch since gradients were last computed.

        Raises:
            RuntimeError: `finish_` was called: the gradients have their size; or a state was loaded since the micro-batches.
        """
        if not self.deferred:
            return None
        step = self._shared.step
        step.check("step")
        return self._end("step") if step.phase is OPEN else step.settled

    def _end(self, event: str) -> Tensor:
        step = self._shared.step
        reference = step.reference
        settled = self._shared.end(self, self.operators_for(self.log_s), event)
        self.memo.moved = (reference, settled)
        return settled

    # ---- what serves a forward ----

    def normalizer_for(self, trains: bool) -> Own | Shared:
        """What settles log s' of a forward: only one that trains shares it."""
        shared = self._shared
        if not (trains and shared.takes_part()):
            return OWN
        if ops.transformed():
            raise RuntimeError(
                "ABLoss: deferred, loss_divisor and a process group do not go through torch.func transforms; expected a plain"
                " forward, or ABLoss(process_group=None), or functional.robust_weights"
            )
        return shared

    def chosen_backend(self) -> str | None:
        return self.backend or getattr(self.criterion, "backend", None)

    def operators_for(self, x: Tensor) -> ops.Operators:
        """The operators that serve this batch. ValueError if the state is on another device."""
        if ops.transformed():
            return ops.REFERENCE
        served = self._served
        device = x.device if isinstance(x, Tensor) else None
        operators = served[1] if served is not None and served[0] == device else self._serve(device)
        return operators.compiled if torch.compiler.is_compiling() else operators

    def _serve(self, device: torch.device | None) -> ops.Operators:
        if device is None:
            raise TypeError("ABLoss: expected tensors, criterion(logits, target)")
        if device != self.log_s.device:
            raise ValueError(
                f"ABLoss: got a batch on {device}, but its state is on {self.log_s.device}; use criterion.to({str(device)!r})"
            )
        operators = ops.serving(device, self.chosen_backend())
        if not torch.compiler.is_compiling():
            self._served = device, operators
        return operators

    def extra_repr(self) -> str:
        lam = f"RelativeLam({self.relative_lam})" if self.lam_is_open else f"{float(self.lam):g}"
        return f"lam={lam}, gamma={self.gamma:g}, alpha={self.alpha:g}, mix={self.mix:g}, normalizer={self.normalizer!r}"
