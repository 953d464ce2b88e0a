"""`FusedOptimizer`: the base class of the optimizers, which gives torch's classes another `step`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import _backend, _hooks, ops
from ..robust.base import RobustLoss
from . import clipping, list_step, planned_step, torch_step
from .checks import (
    check_deferrable,
    check_no_attributes,
    check_robust,
    check_tensors,
    check_torchs_options,
    claim,
    warn_of_another_criterion,
    warn_of_written_gradients,
)
from .rule import OptimizerRule, changed, plain_options
from .scaling import Scaling, is_known_nonfinite, unscale_where_host_reads
from .state import check_forms, fill_in_own_flags, place_states, restore_float32

_R = TypeVar("_R")


class FusedOptimizer(torch.optim.Optimizer):
    """The base class of the optimizers: it updates all parameters by one kernel launch.

    Parameters may have any shape. They may be float32, float64, bfloat16, float16 (with float32 states) or complex. Plain torch
    steps the tensors that the kernels cannot take (sparse gradients, tensor subclasses other than DTensor), with the same result.
    On a GPU the kernel itself reads a tensor ``lr``, GradScaler's numbers and the counts of steps. So the host never waits for
    the GPU, and a captured graph follows a schedule of ``lr``.

    A step has three tiers, and each takes what the one before it leaves: planned_step.py, list_step.py, torch_step.py.
    """

    _rule: OptimizerRule
    robust: RobustLoss | None
    backend: str | None
    _used: Tensor | None  # what finished the gradients of the latest deferred step
    _operators: dict[torch.device, ops.Operators | None]  # None: plain torch serves the device
    _on_gpu: bool  # whether kernels read GradScaler's numbers
    _plan: planned_step.Plan | None
    _max_norm: float | None = None
    _grad_norm: Tensor | None = None  # of `last_grad_norm`; written in place, because torch.compile drops a new one

    # ---- what the classes fill in ----

    def _set_up(self, robust: RobustLoss | None, max_norm: float | None, backend: str | None, **own_flags: bool | None) -> None:
        """Does what is left to do after torch's __init__. own_flags: the options that torch's class does not have."""
        check_torchs_options(type(self), self.defaults | own_flags)
        check_robust(robust)
        self.robust, self._used = robust, None
        self.max_norm = max_norm
        claim(self)
        for group in self.param_groups:
            self._check_deferrable(group)
        if backend is not None:
            _backend.why_not(backend)  # raises for an unknown name
        self.backend = backend
        for group in self.param_groups:
            for name, value in own_flags.items():
                group.setdefault(name, value)
        self.defaults = plain_options(self.defaults) | own_flags
        self._choose_kernels()

    @property
    def max_norm(self) -> float | None:
        """The global norm to which a step clips the gradients, as given to the constructor; it may be replaced."""
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float | None) -> None:
        self._max_norm = clipping.check_max_norm(value, self.param_groups)
        self._grad_norm = None if value is None else clipping.unknown(self.param_groups)

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The norm of the gradients of the latest step before clipping, 0-d float64 (docs/MATH.md §3.6); None without max_norm.

        It is that of the finished gradients, over all parameters and all shards. NaN before the first step, and NaN or infinite
        after a skipped one.
        """
        return None if self._grad_norm is None else self._grad_norm.clone()

    def _torch_step(
        self, group: dict, params: list[Tensor], grads: list[Tensor], states: list[list[Tensor | None]], steps: list[Tensor]
    ) -> None:
        """The step of this rule in plain torch. states: one list for each state of the rule, with None for what is not kept."""
        raise NotImplementedError

    # ---- who steps ----

    def _choose_kernels(self) -> None:
        devices = {p.device for group in self.param_groups for p in group["params"]} or {torch.device("cpu")}
        # raises if a backend is forced and cannot run
        self._operators = {device: kernels_or_none(ops.serving(device, self.backend)) for device in devices}
        backends = {kernels.backend for kernels in self._operators.values() if kernels is not None}
        self._on_gpu = backends <= {"cuda", "triton"} and None not in self._operators.values()
        self._plan = planned_step.make_plan(self._rule, backends)

    def _check_deferrable(self, group: dict) -> None:
        if self.robust is not None:
            check_deferrable(group)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler calls `step` in any case, with its numbers in `grad_scale` and `found_inf` (torch's fused protocol).

        False, as for torch's default classes: GradScaler unscales the gradients, and leaves `step` out after an overflow. True
        with fused=True; with ``robust``, whose step must end even after an overflow, or its micro-batches would count in the
        next one; and for float16 parameters, whose gradients GradScaler does not unscale. GradScaler reads it once a step, where
        it goes over all parameters itself, so nothing is kept that a cast or a new group would make wrong.
        """
        if self.defaults.get("fused") or getattr(self, "robust", None) is not None:
            return True
        return any(p.dtype == torch.float16 for group in self.param_groups for p in group["params"])

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.defaults["fused"] = value  # torch's classes set it to True in their __init__ for fused=True

    # ---- state ----

    def __getstate__(self) -> dict[str, Any]:
        own = ("backend", "robust", "_used", "_max_norm", "_grad_norm")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        fill_in_own_flags(self._rule, self.param_groups)
        if hasattr(self, "backend"):  # not yet while torch's __init__ runs
            self._used = state.get("_used")
            claim(self)
            self._choose_kernels()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters, as for every torch optimizer.

        ValueError: parameters that ``robust`` or ``max_norm`` cannot take, or these two as options of a group; nothing is added
        then.
        """
        check_no_attributes(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group |= plain_options(group)
        if hasattr(self, "backend"):
            try:
                self._check_deferrable(group)
                clipping.check_max_norm(self._max_norm, [group])
            except ValueError:
                self.param_groups.pop()
                raise
            self._choose_kernels()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of torch's class. float32 states of half-precision parameters stay float32.

        Args:
            state_dict: what ``state_dict()`` of this class, or of torch's class, has returned.

        Raises:
            ValueError: the checkpoint was made with another ``heavy_ball`` or ``paper_form``, so its states mean other things; or
                it does not fit, for the reasons of torch's ``load_state_dict``. Nothing is loaded then.
        """
        # torch's loading stands between the hooks of the user. So the checks see what the pre-hooks have left, and the post-hooks
        # find float32 states.
        pre_hooks, post_hooks = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        state_dict = state_dict.copy()
        for pre_hook in list(pre_hooks.values()):
            changed_by_hook = pre_hook(self, state_dict)
            state_dict = state_dict if changed_by_hook is None else changed_by_hook
        check_forms(self._rule, self.param_groups, state_dict["param_groups"])
        with _hooks.aside(self, "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks"):
            super().load_state_dict(state_dict)
        restore_float32(self._rule, self, state_dict)
        for post_hook in list(post_hooks.values()):
            post_hook(self)

    def _init_group(self, group: dict, *lists: list) -> object:
        """torch's method: makes missing states, and appends the parameters that have a gradient, their gradients, states and
        counts of steps to the lists. torch.compile calls it by this name, outside the graph."""
        self._make_missing(group)
        return super()._init_group(_unfused(group), *lists)  # type: ignore[misc]  # of torch's optimizer, the other base class

    def _make_missing(self, group: dict) -> None:
        """Makes missing states, in float32 for half precision, and puts the counts of steps on the devices where kernels run."""
        super()._init_group(_unfused(group), *([] for _ in range(self._rule.list_count)))  # type: ignore[misc]  # as above
        place_states(self._rule, group["params"], self.state, self._operators)

    # ---- step ----

    @staticmethod
    def profile_hook_step(func: Callable[..., _R]) -> Callable[..., _R]:
        """Wraps `step` as torch does (profiler range, hooks), but enters torch's wrapper only if somebody would notice: it costs
        5.5 us, where the whole step of 161 small tensors takes 31."""
        hooked = torch.optim.Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self: FusedOptimizer, *args: Any, **kwargs: Any) -> _R:
            noticed = (
                torch.compiler.is_compiling()
                or torch.autograd._profiler_enabled()
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
            )
            return (hooked if noticed else func)(self, *args, **kwargs)

        return step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        A step is skipped if GradScaler has found a gradient that is not finite, or if a loss of the micro-batches of ``robust``
        was not finite. A skipped step changes nothing; if it would have been the first, the next one counts as first
        (docs/MATH.md §3.5).

        Args:
            closure: computes the loss and its gradients; it is called before the update.

        Returns:
            what the closure returned, or None without a closure.

        Raises:
            RuntimeError: a gradient or state does not fit its parameter; or ``robust`` cannot settle the step, because
                ``finish_`` has finished the gradients already or a state was loaded since the micro-batches.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settled = None if self.robust is None else self._take_settled(self.robust)
        scaling = self._scaling(settled)
        if scaling is not None:
            self._step_groups(scaling)
        elif self._grad_norm is not None:
            self._grad_norm.fill_(math.nan)
        if settled is not None and not torch.compiler.is_compiling():
            self._used = settled  # after the step: one that raises an error has used nothing
        return loss

    def _scaling(self, settled: Tensor | None) -> Scaling | None:
        """What this step still has to do to the gradients. None: the host knows that the step is skipped."""
        if is_known_nonfinite(settled):
            return None
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and not (self._on_gpu and found_inf.device.type != "cpu"):
            if not unscale_where_host_reads(grad_scale, found_inf, self.param_groups):
                return None
            grad_scale = found_inf = None
        return Scaling(grad_scale, found_inf, settled)

    def _take_settled(self, robust: RobustLoss) -> Tensor | None:
        """What finishes the gradients of this step. None: they are normalised already.

        It finishes the gradients of one step. Those that another loss makes after that step are normalised already.
        """
        for group in self.param_groups:
            check_deferrable(group)
        compiling = torch.compiler.is_compiling()
        if not compiling:
            warn_of_written_gradients(self, robust)
        settled = robust.settle()
        if compiling:
            return settled
        if settled is self._used:
            warn_of_another_criterion(robust, self.param_groups)
            return None
        return settled

    def _step_groups(self, scaling: Scaling) -> None:
        plan = None if torch.compiler.is_compiling() or type(self.state) not in planned_step.STATES else self._plan
        updated: list[Tensor] = []
        on: Tensor | None = None
        others: list[dict] = self.param_groups
        if self._max_norm is not None:
            scaling = clipping.prepared(scaling, self.param_groups)
        if plan is not None:
            # `_held` keeps gradients and states alive until the kernel is done
            updated, _held, on, others = planned_step.refresh(plan, self.param_groups, self.state, scaling)
        numbers = [self._checked_numbers(group) for group in others]  # errors are raised before anything is written
        if self._max_norm is not None:
            self._clip(self._max_norm, plan, updated, on, others, scaling)
        if plan is not None and on is not None:
            planned_step.launch(plan, updated, on)
        for group, values in zip(others, numbers):
            self._step_group(group, values, scaling)

    def _clip(
        self,
        max_norm: float,
        plan: planned_step.Plan | None,
        updated: list[Tensor],
        on: Tensor | None,
        others: list[dict],
        scaling: Scaling,
    ) -> None:
        """Brings the clip factor into the SCALE of this step, and keeps the norm. plan, ..., others: as in `_step_groups`."""
        parts: list[tuple[list[Tensor], Tensor]] = []
        if plan is not None and on is not None:
            kernels = self._operators[on.device]
            has_squares = kernels is not None and kernels.has_squares
            of_plan = planned_step.sums_of_squares(plan, on) if has_squares else clipping.sums_of_squares(updated)
            parts.append((updated, of_plan))
        rest = [p for group in others for p in group["params"] if p.grad is not None]
        if rest:
            parts.append((rest, clipping.sums_of_squares(rest)))
        total = clipping.clip_(scaling, max_norm, parts, self.param_groups)
        if self._grad_norm is None or self._grad_norm.device != total.device:  # the parameters were moved
            self._grad_norm = total
        else:
            self._grad_norm.copy_(total)

    @torch.no_grad()
    def _step_group(self, group: dict, numbers: list[float], scaling: Scaling) -> None:
        """One step of a group without the plan: kernels take the tensors that they can, plain torch the others."""
        rule = self._rule
        params: list[Tensor] = []
        grads: list[Tensor] = []
        steps: list[Tensor] = []
        states: list[list[Tensor | None]] = [[] for _ in rule.states]
        self._init_group(group, params, grads, *states, *([steps] if rule.counts else []))
        lists: list[Sequence[Tensor | None]] = [params, grads, *rule.kept(group, states)]
        views = [[(list_step.read_view if values is grads else list_step.written_view)(t) for t in values] for values in lists]
        on_kernels, others = list_step.divide(self._operators, group, params, views, steps)
        for device, chosen in on_kernels.items():
            # `divide` leaves devices without kernels and parameters without their states to plain torch
            kernels = cast("ops.Operators", self._operators[device])
            picked = cast("list[list[Tensor]]", [[values[i] for i in chosen] for values in views])
            counts = [steps[i] for i in chosen] if steps else []
            list_step.launch(rule, kernels, group, numbers, picked, counts, scaling)
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version([params[i] for i in chosen])
        if others:
            kept: list[list[Tensor | None]] = [
                [values[i] for i in others] if values else [None] * len(others) for values in states
            ]
            counts = [steps[i] for i in others] if steps else []
            group = rule.with_numbers(group, numbers)
            torch_step.step(
                self._torch_step, group, [params[i] for i in others], [grads[i] for i in others], kept, counts, scaling
            )

    def _checked_numbers(self, group: dict) -> list[float]:
        """Checks the tensors of a group (`check_tensors`), and returns the rule's numbers (`OptimizerRule.numbers`)."""
        if not torch.compiler.is_compiling():
            params = [p for p in group["params"] if p.grad is not None]
            if not {p.device for p in params} <= self._operators.keys():  # a parameter was moved to another device
                self._choose_kernels()
            check_tensors(self._rule, group, params, self.state)
        return self._rule.numbers(group)


def kernels_or_none(operators: ops.Operators) -> ops.Operators | None:
    """The operators of a device that has kernels. None: plain torch serves the device."""
    return operators if operators.has_kernels else None


def _unfused(group: dict) -> dict:
    """The group as torch's own code may see it. With fused=True or foreach=True it refuses what torch's kernels cannot take."""
    return changed(group, fused=False, foreach=False)
