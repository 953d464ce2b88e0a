"""Optimizers. The formulas are `reference.momentum_step_` (plain torch) and `sgd_update` in csrc/math.h (kernels)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import _backend, ops, reference

_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
_FLAGS = ("nesterov", "maximize", "heavy_ball")
_sgd_planned_step = torch.ops.absgd_fast.sgd_planned_step.default._op  # without the Python frame of OpOverload.__call__


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

    Parameters may have any shape. float32 and float64 parameters, on the CPU or on a GPU, are stepped by one kernel launch
    for all of them (up to 900 tensors on CUDA); every other tensor (another dtype, sparse gradients, tensor subclasses) by
    plain torch, with the same result. On a GPU the kernel reads a tensor ``lr``, and the scaler's numbers, by itself: the
    host never waits, and a captured graph follows a schedule. ``state_dict()`` loads into torch.optim.SGD and back in the middle of a training (not with ``heavy_ball``).

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
        backend: None (the fastest that runs), "cuda", "triton", "cpu" or "reference".

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
        self._operators = {device: ops.serving(device, self.backend) for device in devices}
        served = {operators.backend for operators in self._operators.values() if operators is not None}
        # the kernels read found_inf and grad_scale by themselves
        self._on_gpu = served <= {"cuda", "triton"} and None not in self._operators.values()
        host = _backend.host()
        self._plan = None
        if served & {"cpu", "cuda"} and host is not None:
            try:
                self._plan = host.StepPlan(Tensor, torch.nn.Parameter, _allocate_table, "cpu" in served, "cuda" in served)
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
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and not (self._on_gpu and found_inf.device.type != "cpu"):
            if found_inf:
                return loss
            if grad_scale is not None:
                self._unscale_grads(p for group in self.param_groups for p in group["params"])
            grad_scale = found_inf = None
        if self._plan is None or torch.compiler.is_compiling():
            for group in self.param_groups:
                self._step_group(group, group["params"], grad_scale, found_inf)
            return loss
        # `grads` keeps the gradients alive until the kernel is done
        updated, grads, others = self._plan.refresh(self.param_groups, self.state, grad_scale, found_inf)
        if updated:
            _sgd_planned_step(self._plan.table, updated[0])
            torch.autograd.graph.increment_version(updated)
        for group, params in others:
            self._step_group(group, params, grad_scale, found_inf)
        return loss

    @torch.no_grad()
    def _unscale_grads(self, params) -> None:
        for p in params:
            if p.grad is not None:
                p.grad.div_(self.grad_scale.to(p.grad.device))

    @torch.no_grad()
    def _step_group(self, group: dict, params: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """One step of some parameters of a group without the plan."""
        options = {name: group[name] for name in _NUMBERS + _FLAGS}
        momentum = group["momentum"]
        native, plain = {}, ([], [], [])
        for p in params:
            if p.grad is None:
                continue
            grad = p.grad
            if not torch.compiler.is_compiling() and grad.is_neg():  # an operator takes no pending sign in a list it may write
                grad = grad.resolve_neg()
            operators = self._operators.get(p.device)
            buffer = self.state[p].get("momentum_buffer") if momentum != 0 else None
            if (
                buffer is None
                and momentum != 0
                and operators is not None
                and operators.backend != "cpu"
                and group["dampening"] == 0
            ):
                # A first step from a buffer of zeros, which found_inf may still undo without anybody waiting for it. (With
                # dampening the first gradient counts in full, so there the step below is taken.)
                buffer = self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            tensors = (p, grad) if buffer is None else (p, grad, buffer)
            fits = operators is not None and (momentum == 0 or buffer is not None) and _fit_kernels(options, tensors)
            lists = native.setdefault(p.device, ([], [], [])) if fits else plain
            for out, tensor in zip(lists, (p, grad, buffer)):
                out.append(tensor)
        for device, (updated, grads, buffers) in native.items():
            lr, numbers = group["lr"], (grad_scale, found_inf)
            lr_tensor = lr if isinstance(lr, Tensor) and lr.device == device and device.type != "cpu" else None
            numbers = [None if number is None else number.to(device, non_blocking=True) for number in numbers]
            operators = self._operators[device].compiled if torch.compiler.is_compiling() else self._operators[device]
            operators.sgd_step_(
                updated, grads, buffers if momentum != 0 else [], lr_tensor, *numbers,
                0.0 if lr_tensor is not None else float(lr), *(float(group[name]) for name in _NUMBERS[1:]),
                *(bool(group[name]) for name in _FLAGS),
            )  # fmt: skip
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version(updated)
        if plain[0]:
            if found_inf is not None:
                if found_inf:
                    return
                if grad_scale is not None:
                    self._unscale_grads(plain[0])
            buffers = reference.momentum_step_(*plain, **options)
            if momentum != 0:
                for p, buffer in zip(plain[0], buffers):
                    self.state[p]["momentum_buffer"] = buffer


def _allocate_table(words: int) -> Tensor:
    return torch.empty(words, dtype=torch.int64)


def _fit_kernels(options: dict, tensors: tuple[Tensor, ...]) -> bool:
    """Whether sgd_step_ takes these: plain strided tensors on one device, all float32 or all float64, and numbers for options."""
    first = tensors[0]
    if torch.compiler.is_compiling():  # a number would have to leave the graph
        if any(isinstance(value, Tensor) and (name != "lr" or value.device.type == "cpu") for name, value in options.items()):
            return False
    return first.dtype in (torch.float32, torch.float64) and all(
        type(t) in (Tensor, torch.nn.Parameter)
        and t.dtype == first.dtype
        and t.device == first.device
        and t.layout == torch.strided
        for t in tensors
    )
