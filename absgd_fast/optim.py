"""Optimizers. The formulas are `reference.momentum_step_` (plain torch) and `sgd_update` in csrc/math.h (kernels)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import _backend, reference

_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
_FLAGS = ("nesterov", "maximize", "heavy_ball")


class ABSGD(torch.optim.Optimizer):
    r"""Momentum SGD; the robust weights of ABSGD come from :class:`ABLoss`, which works with any optimizer.

    One pass over all parameters, with G the gradient of the robust loss (negated with ``maximize``):

        g = G + weight_decay * w
        b = momentum * b + (1 - dampening) * g              (b = g in a parameter's first step)
        w = w - lr * b                                      (nesterov: w - lr * (g + momentum * b))

    which is torch.optim.SGD, and what the `absgd` package uses. ``heavy_ball=True`` is the paper's own step, where d is
    the last change of w; the two differ once ``lr`` changes, because the paper's keeps past steps at their size:

        d = momentum * d - lr * g
        w = w + d

    Parameters may have any shape. float32 and float64 parameters on the CPU are stepped by one kernel launch for all of
    them; every other tensor (another dtype or device, sparse gradients, tensor subclasses) by plain torch, with the same
    result. ``state_dict()`` loads into torch.optim.SGD and back in the middle of a training (not with ``heavy_ball``).

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: learning rate >= 0; a float or a one-element tensor.
        momentum: >= 0. With 0 no buffer is kept.
        dampening: of the gradient's share in the buffer.
        weight_decay: L2 penalty >= 0.
        nesterov: needs momentum > 0 and dampening = 0.
        maximize: ascend instead of descend.
        heavy_ball: Eq. 2 of the paper; with neither nesterov nor dampening.
        robust: reserved for an ABLoss whose normaliser this step would finish; raises NotImplementedError.
        backend: None (the fastest that runs), "cpu" or "reference".

    Raises:
        ValueError: a number out of its range, options that exclude each other, an unknown backend.
        RuntimeError: a backend that cannot run, with the reason.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    Source: Qi et al., *Attentional-Biased Stochastic Gradient Descent* (TMLR 2023), Algorithm 1 and Eq. 2; the momentum
    of torch.optim.SGD. A step that torch.amp.GradScaler skips never was: the next one is the first if that was.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf instead of unscaling by itself

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        heavy_ball: bool = False,
        robust=None,
        backend: str | None = None,
    ):
        if robust is not None:
            raise NotImplementedError(
                "robust: the step cannot finish the normaliser of a deferred ABLoss yet; use ABLoss without deferred and robust=None"
            )
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        # `not >=` also refuses NaN
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not momentum >= 0.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if heavy_ball and (nesterov or dampening != 0):
            raise ValueError(
                f"heavy_ball is Eq. 2 of the paper, which has no nesterov (got {nesterov}) and no dampening (got {dampening});"
                " use heavy_ball=False with these"
            )
        if backend is not None:
            _backend.why_not(backend)  # raises for an unknown name
        defaults = dict(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            heavy_ball=heavy_ball,
        )
        self.backend = backend
        super().__init__(params, defaults)
        self._make_plan()

    def _make_plan(self) -> None:
        devices = {p.device for group in self.param_groups for p in group["params"]} or {torch.device("cpu")}
        # raises for a backend that is forced and cannot run
        self._native = "cpu" in [_backend.select(device, self.backend) for device in devices]
        host = _backend.host()
        self._plan = None
        if self._native and host is not None:
            try:
                self._plan = host.StepPlan(Tensor, torch.nn.Parameter, _allocate_table)
            except (AttributeError, ValueError):
                pass  # a torch without DLPack's exchange table, version 1: the operator is given lists

    def __getstate__(self):
        return super().__getstate__() | {"backend": self.backend}

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            for name in _FLAGS:  # heavy_ball is absent from checkpoints of torch.optim.SGD
                group.setdefault(name, False)
        self._make_plan()

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
        if getattr(self, "found_inf", None) is not None and self.found_inf:
            return loss
        if getattr(self, "grad_scale", None) is not None:
            self._unscale_grads()
        if self._plan is None or torch.compiler.is_compiling():
            for group in self.param_groups:
                self._step_group(group, group["params"])
            return loss
        # `grads` keeps the gradients alive until the kernel is done
        updated, grads, others = self._plan.refresh(self.param_groups, self.state)
        if updated:
            torch.ops.absgd_fast.sgd_planned_step(self._plan.table)
            torch.autograd.graph.increment_version(updated)
        for group, params in others:
            self._step_group(group, params)
        return loss

    @torch.no_grad()
    def _unscale_grads(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(self.grad_scale)

    @torch.no_grad()
    def _step_group(self, group: dict, params: list[Tensor]) -> None:
        """One step of some parameters of a group without the plan."""
        options = {name: group[name] for name in _NUMBERS + _FLAGS}
        momentum = group["momentum"]
        native, plain = ([], [], []), ([], [], [])
        for p in params:
            if p.grad is None:
                continue
            buffer = self.state[p].get("momentum_buffer") if momentum != 0 else None
            started = momentum == 0 or buffer is not None
            tensors = (p, p.grad) if buffer is None else (p, p.grad, buffer)
            lists = native if started and self._native and _fit_kernels(options, tensors) else plain
            for out, tensor in zip(lists, (p, p.grad, buffer)):
                out.append(tensor)
        if native[0]:
            params, grads, buffers = native
            torch.ops.absgd_fast.sgd_step_(params, grads, buffers if momentum != 0 else [], **_as_schema(options))
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(params)
        if plain[0]:
            buffers = reference.momentum_step_(*plain, **options)
            if momentum != 0:
                for p, buffer in zip(plain[0], buffers):
                    self.state[p]["momentum_buffer"] = buffer


def _allocate_table(words: int) -> Tensor:
    return torch.empty(words, dtype=torch.int64)


def _fit_kernels(options: dict, tensors: tuple[Tensor, ...]) -> bool:
    """Whether sgd_step_ takes these: plain strided CPU tensors, all float32 or all float64, and numbers for options."""
    if torch.compiler.is_compiling() and any(isinstance(value, Tensor) for value in options.values()):
        return False  # a number would have to leave the graph
    dtype = tensors[0].dtype
    return dtype in (torch.float32, torch.float64) and all(
        type(t) in (Tensor, torch.nn.Parameter) and t.dtype == dtype and t.device.type == "cpu" and t.layout == torch.strided
        for t in tensors
    )


def _as_schema(options: dict) -> dict:
    return {name: float(options[name]) for name in _NUMBERS} | {name: bool(options[name]) for name in _FLAGS}
