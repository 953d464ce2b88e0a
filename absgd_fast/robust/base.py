"""RobustLoss: what `ABLoss` and `LinearABLoss` have in common."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _backend, _checks, _numbers, ops
from .._checkpointing import Replays
from .._scheduled import Counted, schedules_of
from ..losses import CrossEntropy
from . import finish, options
from .collapse import Collapse
from .lam import RelativeLam, TargetESS
from .last import LastForward, Memo
from .normalizer import OWN, Deferred, Own, Shared
from .options import StateOptions
from .processes import Processes
from .state import TARGET, RobustState
from .step import OPEN, DeferredStep

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_IN_THE_MIDDLE = (
    "{}state_dict(): got a criterion in the middle of a deferred step, whose micro-batches so far are not in the checkpoint;"
    " expected it after optimizer.step() (robust=) or finish_, or after discard()"
)

_STEPPED_EARLY = (
    "finish_: an optimizer has stepped these parameters since the first micro-batch, with gradients that were not normalised;"
    " expected criterion.finish_(params) before optimizer.step()"
)
_WRITTEN = (
    "finish_: got gradients that were changed in place after backward, before they are normalised. If that was clipping, it has"
    " seen sums, and the step is far too small; expected finish_ first, and clip_grad_norm_ after it. Multiplying the gradients"
    " by a constant is fine"
)

Rule = Callable[..., Tensor]  # losses -> W; it may also take groups, mask and update


_AVERAGED = "if the state_dicts of several steps were averaged, leave lam and log_s out of the average"


class RobustLoss(RobustState):
    """A robust loss: its criterion, its state, who settles its normaliser, and what the latest forward left behind."""

    criterion: Callable[..., Tensor]
    rule: Rule | None  # what makes the weights instead of lambda
    ignore_index: int | None = None  # the label of rows that do not count, if the criterion is a user's
    memo: Memo

    def __init__(
        self,
        criterion: Callable[..., Tensor] | None,
        *,
        lam: float | Tensor | RelativeLam | TargetESS | None = None,
        process_group: torch.distributed.ProcessGroup | str | None = "auto",
        deferred: bool = False,
        loss_divisor: float = 1,
        report: str = "robust",
        warn_of_collapse: bool = True,
        backend: str | None = None,
        **numbers: Unpack[StateOptions],
    ):
        if criterion is not None and not callable(criterion):
            raise TypeError(_not_a_criterion(criterion, type(self).__name__))
        if lam is None:
            raise ValueError(
                "lam: got None, expected a number other than 0, TargetESS(share) or RelativeLam(r); math.inf is the plain mean"
            )
        shared = (Deferred if options.flag(deferred, "deferred") else Shared)(
            Processes(process_group), _checks.positive(loss_divisor, "loss_divisor")
        )
        super().__init__(lam, **numbers)
        self._shared = shared
        if deferred:
            options.check("deferred=True", vars(self))
        if isinstance(lam, TargetESS):
            options.check("TargetESS", vars(self))
        self.criterion = CrossEntropy() if criterion is None else criterion
        self.backend = backend
        self.memo = Memo(Collapse(options.flag(warn_of_collapse, "warn_of_collapse")))
        self.report = report
        self.replays: Replays = Replays()
        self._served: tuple[torch.device, ops.Operators] | None = None  # the device of the last batch, and its operators
        reason = None if backend is None else _backend.why_not(backend)  # the module may still be moved to another device
        if reason is not None:
            raise RuntimeError(
                f"backend {backend!r} cannot run: {reason}; run `python -m absgd_fast doctor`, or use backend=None"
            )

    # ---- state ----

    @property
    def process_group(self) -> torch.distributed.ProcessGroup | str | None:
        """The processes whose batches are normalised as one, as given to the constructor; it may be replaced."""
        return self._shared.processes.group

    @process_group.setter
    def process_group(self, group: torch.distributed.ProcessGroup | str | None) -> None:
        self._refuse_with_rule(process_group=group)
        self._shared.processes.group = group

    def _refuse_with_rule(self, **option: Any) -> None:
        """ValueError for an option that a criterion with rule= does not have, as in the constructor."""
        if self.rule is not None:
            options.check("rule", option)

    @property
    def loss_divisor(self) -> float:
        """The number by which a framework divides the loss of a forward before its backward.

        It may be replaced between two forwards, and on several processes alike. Each forward has its own, so a deferred step may
        hold micro-batches with several: those of a last short group, for example.
        """
        return self._shared.loss_divisor

    @loss_divisor.setter
    def loss_divisor(self, value: float) -> None:
        divisor = _checks.positive(value, "loss_divisor")
        self._refuse_with_rule(loss_divisor=divisor)
        self._shared.loss_divisor = divisor

    @property
    def report(self) -> str:
        """What the value of a forward is, "robust" or "mean"; it may be replaced, on all processes alike."""
        return "mean" if self.reports_mean else "robust"

    @report.setter
    def report(self, value: str) -> None:
        self.reports_mean = _checks.choice(value, "report", ("robust", "mean")) == "mean"
        self.memo.reports_mean = self.reports_mean

    @property
    def warn_of_collapse(self) -> bool:
        """Whether weights that have collapsed are looked for; it may be replaced."""
        return self.memo.collapse.watched

    @warn_of_collapse.setter
    def warn_of_collapse(self, value: bool) -> None:
        self.memo.collapse = Collapse(options.flag(value, "warn_of_collapse"))

    @property
    def deferred(self) -> bool:
        """Whether the micro-batches of an optimizer step are normalised once, at its end; it may be switched between two steps.

        Switching forgets the micro-batches of a step that is not finished. ValueError with options that cannot be deferred.
        """
        return self._shared.deferred

    @deferred.setter
    def deferred(self, value: bool) -> None:
        value = options.flag(value, "deferred")
        if value == self.deferred:
            return
        self._refuse_with_rule(deferred=value)
        if value:
            options.check("deferred=True", vars(self))
            for schedule in schedules_of(self):  # one that would give it such a lambda only later
                self.check_lam(getattr(schedule, "lam", None), deferred=True)
        self._shared = (Deferred if value else Shared)(self._shared.processes, self._shared.loss_divisor)

    @property
    def deferred_step(self) -> DeferredStep | None:
        """The optimizer step that deferred mode is in; None without deferred mode."""
        shared = self._shared
        return shared.step if isinstance(shared, Deferred) else None

    def set_lam(self, value: float | Tensor | RelativeLam | TargetESS, reset: bool = True) -> None:
        """Use another lambda from the next forward on.

        Args:
            value: as lam in the constructor.
            reset: start log s anew, because s lives on the scale of the old lambda. False keeps log s.

        Raises:
            RuntimeError: in the middle of a deferred step, or for an ABLoss with a rule.
            ValueError: a TargetESS with deferred=True, or with an option that it does not use.

        >>> from absgd_fast import ABLoss
        >>> criterion = ABLoss(lam=math.inf)
        >>> criterion.set_lam(-0.5)
        >>> criterion.lam
        tensor(-0.5000)
        """
        step = self.deferred_step
        if step is not None:
            step.check("set_lam")
        self.check_lam(value)
        self._take_lam(value, reset)
        self.memo.collapse.restart()
        self._shared.processes.forget_agreement()

    def check_lam(self, value: object, deferred: bool | None = None) -> None:
        """ValueError for a TargetESS with an option that it does not use, as in `set_lam`. deferred: None: `self.deferred`."""
        if isinstance(value, TargetESS):
            deferred = self.deferred if deferred is None else deferred
            options.check("TargetESS", {**vars(self), "_given_lam": value, "deferred": deferred})

    def _lam_changes(self) -> None:
        memo = vars(self).get("memo")
        if memo is not None:
            memo.keep_lam(self.lam)

    def reset_parameters(self) -> None:
        """As `RobustState.reset_parameters`."""
        super().reset_parameters()
        self.memo.collapse.restart()

    @property
    def objective(self) -> Tensor:
        """lam log s, the running estimate of the DRO objective (ABSGD paper, Eq. 7 without r; docs/MATH.md §1.3), 0-d.

        At |lam| = inf, and while a RelativeLam is open, it is the plain mean loss of the latest forward (NaN before the first).
        With a TargetESS it is that of the latest training forward alone, because lam is.
        """
        seen = self.memo.sample_stats is not None
        plain = self.last.mean_loss.to(self.log_s.dtype) if seen else self.log_s.new_tensor(math.nan)
        return torch.where(self.lam.isinf() | self.lam.isnan(), plain, self.lam * self.log_s)

    @property
    def last(self) -> LastForward:
        """The losses, weights and figures of the latest forward. RuntimeError before the first."""
        return LastForward(self.memo)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._served = None
        return self

    def also_changed(self) -> list[tuple[object, str, Any]]:
        """As `ExactState.also_changed`; the deferred step and `last` too."""
        parts: list[object] = [self.memo, self.memo.collapse]
        if self.deferred_step is not None:
            parts.append(self.deferred_step)
        return super().also_changed() + [(part, name, value) for part in parts for name, value in vars(part).items()]

    def _own_parts(self) -> None:
        """Give a shallow copy or a replica a memo of its own, so that its forwards do not show in the original."""
        self.memo = copy.copy(self.memo)
        self.memo.collapse = copy.copy(self.memo.collapse)

    def __copy__(self) -> Self:
        if not torch.compiler.is_compiling():
            self._lam_changes()  # the copy has the same state tensors, and its forwards may write them
        copied = type(self).__new__(type(self))
        copied.__setstate__(self.__dict__)
        copied._own_parts()
        return copied

    def _replicate_for_data_parallel(self) -> Self:
        replica = super()._replicate_for_data_parallel()
        replica._own_parts()
        return replica

    def _refusal(self, lam: Tensor, schedules: list[Counted]) -> str | None:
        """Why a saved lambda cannot be loaded; None if it can. schedules: those that continue when it is loaded."""
        relative = self.relative_lam is not None or any(isinstance(getattr(s, "lam", None), RelativeLam) for s in schedules)
        if bool(lam.isnan()) and not relative and self.target is None:
            return f"the saved RelativeLam was not fixed yet; construct ABLoss with lam=RelativeLam(r); {_AVERAGED}"
        return None

    def _load_what_hooks_left(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = {name: state_dict[prefix + name] for name in self.STATE if prefix + name in state_dict}
        known = {name: t for name, t in saved.items() if t.numel() == 1 and not t.is_meta}  # those with a value to look at
        target = state_dict.pop(prefix + TARGET, None)
        refusal = self._refusal(known["lam"], self.resumed_by(state_dict, prefix)) if "lam" in known else None
        if refusal is not None:
            error_msgs.append(f"{prefix}lam: {refusal}")
            return
        if "log_s" in known and bool(known["log_s"].isnan()):
            error_msgs.append(f"{prefix}log_s: got NaN, expected a number, or the -inf with which it starts; {_AVERAGED}")
            return
        if "lam" in known and self.rule is None:
            self.warn_of_another_lam(known["lam"], None if target is None or target.is_meta else float(target))
        self._lam_changes()
        super()._load_what_hooks_left(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _after_load(self) -> None:
        self._served = None
        self.memo.collapse.restart()
        self._shared.processes.forget_agreement()
        step = self.deferred_step
        if step is not None:
            step.move("load")
        if not self.lam.is_meta:
            self.lam_is_open = self.target is None and bool(self.lam.isnan())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        step = self.deferred_step
        if step is not None and step.phase is OPEN and not step.watch.warned:
            step.watch.warned = True
            warnings.warn(_IN_THE_MIDDLE.format(prefix), stacklevel=2)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    # ---- the deferred step ----

    def _watch(self, loss: Tensor) -> None:
        """Deferred mode: see to it that somebody ends the step of this loss (unfinished.py)."""
        step = self.deferred_step
        if step is not None and not step.watch.quiet and step.phase is OPEN:
            step.watch.forward(step, loss)

    def discard(self) -> None:
        """Deferred mode: forget the micro-batches of the step that is under way. Without deferred mode it does nothing.

        Call it after zero_grad() has thrown their gradients away, to give the step up. log s and nonfinite_batches stay.

        >>> from absgd_fast import ABLoss
        >>> criterion = ABLoss(lam=0.5, deferred=True)
        >>> criterion(torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 3])).backward()
        >>> criterion.discard()
        """
        step = self.deferred_step
        if step is not None:
            step.move("discard")
            step.watch.touched.forget()

    def finish_(self, params: Tensor | Iterable[Tensor]) -> Tensor:
        """Deferred mode: normalise the gradients of all micro-batches since the last step, in place, and update log s.

            grad <- exp(m - log s') / n  grad              log s' of all rows of the step, on all processes; n: how many count

        (times R if R processes average their gradients, and times loss_divisor; docs/MATH.md §5.) It serves any optimizer. Call
        it after the last backward, after GradScaler.unscale_, and before clipping. An optimizer with ``robust=`` needs no
        `finish_`.

        Args:
            params: all parameters that the step updates (a tensor or an iterable of tensors).

        Returns:
            0-d bool, whether the step counts. It does not count if a loss was NaN or infinite, or if its z was more than 60 above
            the reference point m. Then log s stays, and `nonfinite_batches` grows by 1. On the CPU every ``.grad`` becomes None,
            so that an optimizer passes over the parameters. On a GPU the gradients become NaN, because looking would wait for the
            GPU; there let an optimizer step only if the result is True, or use GradScaler, which skips the step.

        Raises:
            RuntimeError: without deferred mode, without a forward since the last step, or a second time in one step.
            ValueError: a float16 gradient, whose range is too small for sums that are not normalised yet.

        >>> from absgd_fast import ABLoss
        >>> weight = torch.zeros(10, 4, requires_grad=True)
        >>> criterion = ABLoss(lam=0.5, deferred=True)
        >>> for x, y in [(torch.ones(2, 4), torch.tensor([0, 1])), (torch.ones(1, 4), torch.tensor([2]))]:
        ...     criterion(x @ weight.T, y).backward()
        >>> criterion.finish_(weight)
        tensor(True)

        Source: ABSGD paper, Alg. 1, steps 5 and 6: s' divides every gradient alike, so it may be applied last.
        """
        step = self.deferred_step
        if step is None:
            raise RuntimeError(
                "finish_: got a criterion that is not deferred, whose gradients are normalised already; leave finish_ out"
            )
        step.check("finish_")
        params, grads = finish.deferred_grads(params)
        if step.watch.stepped_early(params):
            raise RuntimeError(_STEPPED_EARLY)
        if step.watch.touched.by_hand(step.watch.touched.FINISH):
            warnings.warn(_WRITTEN, stacklevel=2)
        return finish.scale_grads(params, grads, self._end("finish_"))

    def settle(self) -> Tensor | None:
        """Deferred mode: end the step, update log s, and return the numbers that normalise the gradients.

        An optimizer with ``robust=`` calls it. The gradients are not touched. The formula is reference/weights.py `settle`.

        Returns:
            (6) float64, as reference/weights.py `settle` returns it. SCALE (the second) multiplies the gradients. NONFINITE (the
            last) counts the nonfinite losses; if it is not 0 the step must change nothing. A step that is settled already
            gives the same tensor again. None without deferred mode, or if there was no micro-batch yet (phase IDLE).

        Raises:
            RuntimeError: `finish_` has normalised the gradients already, or a state was loaded after the micro-batches.
        """
        step = self.deferred_step
        if step is None:
            return None
        step.check("step")
        return self._end("step") if step.phase is OPEN else step.settled

    def _end(self, event: str) -> Tensor:
        """End an OPEN step by "step" or "finish_"; the weights of `last` become those by log s'."""
        shared = self._shared
        assert isinstance(shared, Deferred)
        reference = shared.step.reference
        assert reference is not None  # the step is OPEN
        settled = shared.end(self, self.operators_for(self.log_s), event)
        self.memo.moved = (reference, settled)
        return settled

    # ---- what serves a forward ----

    def normalizer_for(self, trains: bool) -> Own | Shared:
        """Who settles log s' of a forward: `OWN` unless the forward trains and shares it with others."""
        shared = self._shared
        if not (trains and shared.takes_part()):
            return OWN
        if ops.transformed():
            raise RuntimeError(
                "ABLoss: deferred, loss_divisor and a process group do not go through torch.func transforms in training mode,"
                " with update=False neither; call eval() before, or use ABLoss(process_group=None), or functional.robust_weights"
            )
        return shared

    def room_for_weighing(self, operators: ops.Operators, logits: Tensor, mode: int) -> Tensor | None:
        """`Operators.weighing` for a forward; a recomputation gets what its first pass was given."""
        return operators.weighing(logits, mode)

    def chosen_backend(self) -> str | None:
        """The backend that the user asked for, here or in the criterion; None: the fastest that can run."""
        return self.backend or getattr(self.criterion, "backend", None)

    def operators_for(self, x: Tensor, update_state: bool = False) -> ops.Operators:
        """The operators that serve this batch, which write the state if update_state.

        Raises:
            ValueError: the state is on another device. TypeError: x is no tensor.
            RuntimeError: update_state inside a torch.func transform, or while torch.export traces.
        """
        if ops.transformed():
            if update_state:
                ops.refuse_update(type(self).__name__)
            return ops.REFERENCE
        served = self._served
        device = x.device if isinstance(x, Tensor) else None
        operators = served[1] if served is not None and served[0] == device else self._serve(device)
        if not torch.compiler.is_compiling():
            return operators
        if update_state:
            ops.refuse_export(type(self).__name__)
        return operators.compiled

    def _serve(self, device: torch.device | None) -> ops.Operators:
        """Choose the operators for a device, and remember them; None: the batch was no tensor."""
        if device is None:
            raise TypeError("ABLoss: got no tensor as the first argument, expected criterion(logits, target)")
        if device != self.log_s.device:
            self.follow_buffers(device)
        if device != self.log_s.device:
            raise ValueError(
                f"ABLoss: got a batch on {device}, but its state is on {self.log_s.device}; use criterion.to({str(device)!r})"
            )
        operators = ops.serving(device, self.chosen_backend())
        if not torch.compiler.is_compiling():
            self._served = device, operators
        return operators

    def weighting_in_words(self) -> str:
        """What makes the weights, for a warning. On a GPU it waits."""
        return f"lam={float(self.lam):g}" if self.target is None else f"lam={self._given_lam!r}"

    def extra_repr(self) -> str:
        """The numbers, for repr()."""
        if self.target is not None:
            return f"lam={self._given_lam!r}, mix={self.mix:g}"
        number = self.lam_number if self.lam.is_meta else float(self.lam)  # a tensor on the meta device has no value
        lam = f"RelativeLam({self.relative_lam})" if self.lam_is_open else f"{number:g}"
        return f"lam={lam}, gamma={self.gamma:g}, alpha={self.alpha:g}, mix={self.mix:g}, normalizer={self.normalizer!r}"


def _not_a_criterion(given: object, class_name: str) -> str:
    """The error for a criterion that is not callable. The package absgd takes lambda in its place."""
    is_lam = isinstance(given, (Tensor, RelativeLam, TargetESS)) or _numbers.real(given) is not None
    got = f"the {type(given).__name__} {given}" if is_lam else type(given).__name__
    hint = f"; lambda is a keyword: {class_name}(lam={given})" if is_lam else ""
    return f"criterion: got {got}, expected a callable that returns per-sample losses{hint}"
