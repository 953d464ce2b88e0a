"""What the optimizers share: torch's class with another `step`, which goes through three tiers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import _backend, ops
from . import list_step, planned_step, torch_step
from .checks import check_deferrable, check_robust, check_tensors
from .rule import OptimizerRule
from .scaling import Scaling, is_known_nonfinite, take_settled, unscale_where_host_reads
from .state import check_forms, fill_in_own_flags, place_states, restore_float32


class FusedOptimizer(torch.optim.Optimizer):
    """What the optimizers here share: one kernel launch for all parameters, found again each step by a plan kept between steps.

    Parameters may have any shape, float32, float64, bfloat16 or float16 (whose states are float32), and any real or complex
    values. Tensors that the kernels cannot take (sparse gradients, tensor subclasses other than DTensor) are stepped by plain
    torch, with the same result. On a GPU the kernel reads a tensor ``lr``, the scaler's numbers and the count of steps by
    itself: the host never waits, and a captured graph follows a schedule.

    A step tries three tiers in turn, each for what the one before leaves: planned_step.py, list_step.py, torch_step.py.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf instead of unscaling by itself
    _rule: OptimizerRule

    # ---- what the classes fill in ----

    def _set_up(self, robust, backend: str | None, **own_flags) -> None:
        """What is left to do after torch's __init__."""
        check_robust(robust)
        self.robust, self._used = robust, None
        for group in self.param_groups:
            self._check_deferrable(group)
        if backend is not None:
            _backend.why_not(backend)  # raises for an unknown name
        self.backend = backend
        for group in self.param_groups:
            for name, value in own_flags.items():
                group.setdefault(name, value)
        self.defaults |= own_flags
        self._choose_kernels()

    def _torch_step(self, group: dict, params, grads, *lists) -> None:
        """The step of this rule in plain torch. lists: states (None where they are not kept), counts of steps."""
        raise NotImplementedError

    # ---- who steps ----

    def _choose_kernels(self) -> None:
        devices = {p.device for group in self.param_groups for p in group["params"]} or {torch.device("cpu")}
        # raises for a backend that is forced and cannot run; None: plain torch serves the device
        self._operators = {device: kernels_or_none(ops.serving(device, self.backend)) for device in devices}
        backends = {kernels.backend for kernels in self._operators.values() if kernels is not None}
        # the kernels read found_inf and grad_scale by themselves
        self._on_gpu = backends <= {"cuda", "triton"} and None not in self._operators.values()
        self._plan = planned_step.make_plan(self._rule, backends)

    def _check_deferrable(self, group: dict) -> None:
        if self.robust is not None:
            check_deferrable(group)

    # ---- state ----

    def __getstate__(self):
        return super().__getstate__() | {"backend": self.backend, "robust": self.robust}

    def __setstate__(self, state):
        super().__setstate__(state)
        fill_in_own_flags(self._rule, self.param_groups)
        if hasattr(self, "backend"):  # not yet while torch's __init__ runs
            self._used = None
            self._choose_kernels()

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "backend"):
            self._check_deferrable(self.param_groups[-1])
            self._choose_kernels()

    def load_state_dict(self, state_dict: dict) -> None:
        """torch's, but float32 states of half-precision parameters stay float32, and what cannot go on elsewhere is refused.

        Raises:
            ValueError: the checkpoint was made with another `heavy_ball` or `paper_form`, whose states mean other things; or
                as torch's load_state_dict. Nothing is loaded then.
        """
        check_forms(self._rule, self.param_groups, state_dict["param_groups"])
        super().load_state_dict(state_dict)
        restore_float32(self._rule, self, state_dict)

    def _init_group(self, group, *lists):
        """torch's: appends the parameters that have a gradient, their gradients, states and counts of steps to the lists,
        making what is missing. (torch.compile calls it under this name, outside the graph.)"""
        self._make_missing(group)
        return super()._init_group(group, *lists)

    def _make_missing(self, group: dict) -> None:
        """States of parameters that have none, float32 for half precision; counts of steps where the kernels are."""
        super()._init_group(group, *([] for _ in range(self._rule.list_count)))
        place_states(self._rule, group["params"], self.state, self._operators)

    # ---- step ----

    @staticmethod
    def profile_hook_step(func: Callable) -> Callable:
        """torch's wrapper of every `step` (profiler range, hooks), entered only when there is somebody to notice: it costs
        5.5 us, where the whole step of 161 small tensors takes 31."""
        hooked = torch.optim.Optimizer.profile_hook_step(func)

        @wraps(func)
        def step(self, *args, **kwargs):
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

    def step(self, closure: Callable[[], float] | None = None):
        """Update every parameter that has a gradient.

        Args:
            closure: recomputes the loss and its gradients first; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settled = None
        if self.robust is not None:
            settled = take_settled(self)
            if is_known_nonfinite(settled):
                return loss
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and not (self._on_gpu and found_inf.device.type != "cpu"):
            if not unscale_where_host_reads(grad_scale, found_inf, self.param_groups):
                return loss
            grad_scale = found_inf = None
        self._step_groups(Scaling(grad_scale, found_inf, settled))
        return loss

    def _step_groups(self, scaling: Scaling) -> None:
        plan = self._plan
        if plan is None or torch.compiler.is_compiling():
            updated, others = [], self.param_groups
        else:
            # `grads` keeps the gradients alive until the kernel is done
            updated, grads, on, others = planned_step.refresh(plan, self.param_groups, self.state, scaling)
        numbers = [self._checked_numbers(group) for group in others]  # what is wrong is said before anything is written
        if updated:
            planned_step.launch(plan, updated, on)
        for group, values in zip(others, numbers):
            self._step_group(group, values, scaling)

    @torch.no_grad()
    def _step_group(self, group: dict, numbers: list[float], scaling: Scaling) -> None:
        """One step of a group without the plan: kernels take the tensors that they can, plain torch the others."""
        rule = self._rule
        params, grads, *rest = lists = [[] for _ in range(rule.list_count)]
        self._init_group(group, *lists)
        steps = rest[-1] if rule.counts else []
        views = [[list_step.kernel_view(t) for t in values] for values in (params, grads, *rule.kept(group, rest))]
        on_kernels, others = list_step.divide(self._operators, group, views, steps)
        for device, chosen in on_kernels.items():
            picked = [[values[i] for i in chosen] for values in views]
            counts = [steps[i] for i in chosen] if steps else []
            list_step.launch(rule, self._operators[device], group, numbers, picked, counts, scaling)
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version([params[i] for i in chosen])
        if others:
            picked = [[values[i] for i in others] if values else [None] * len(others) for values in lists]
            torch_step.step(self, group, picked, scaling)

    def _checked_numbers(self, group: dict) -> list[float]:
        """The rule's numbers for a group whose tensors can be stepped.

        Raises:
            RuntimeError: a sparse gradient where the rule has none, a gradient or state of another shape than its parameter, a
                parameter whose elements share memory. TypeError: an option that is no number.
        """
        if not torch.compiler.is_compiling():
            params = [p for p in group["params"] if p.grad is not None]
            if not {p.device for p in params} <= self._operators.keys():  # moved there since
                self._choose_kernels()
            check_tensors(self._rule, group, params, self.state)
        return self._rule.numbers(group)


def kernels_or_none(operators: ops.Operators) -> ops.Operators | None:
    """The operators of a device that has kernels; None where plain torch serves it."""
    return operators if operators.native else None
