"""Optimizers: torch's own classes with their step in one kernel for all parameters. The formulas are in reference.py (plain
torch) and csrc/math.h (kernels)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import _backend, ops, reference
from .reference import real_dtype
from .robust import ABLoss

_planned_step = torch.ops.absgd_fast.planned_step.default._op  # without the Python frame of OpOverload.__call__


class _FusedStep(torch.optim.Optimizer):
    """What the optimizers here share: one kernel launch for all parameters, found again each step by a plan kept between steps.

    Parameters may have any shape, float32, float64, bfloat16 or float16 (whose states are float32), and any real or complex
    values. Tensors that the kernels cannot take (sparse gradients, tensor subclasses other than DTensor) are stepped by plain
    torch, with the same result. On a GPU the kernel reads a tensor ``lr``, the scaler's numbers and the count of steps by
    itself: the host never waits, and a captured graph follows a schedule.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf instead of unscaling by itself

    # Of each rule: its name in ops.RULES and reference.py; the places of its numbers in a group, (key, index in a tuple or -1);
    # its flags in a group and their bits (csrc/math.h StepFlag); its states (csrc/math.h: the slots of its functor); whether
    # it counts steps; the flags torch's class has not.
    _rule: str
    _numbers: dict[str, tuple[str, int]]
    _flags: dict[str, int]
    _states: tuple[str, ...]
    _counts = True
    _own_flags: tuple[str, ...] = ()

    def _set_up(self, robust, backend: str | None, **own_flags) -> None:
        """What is left to do after torch's __init__."""
        if robust is not None and not (isinstance(robust, ABLoss) and robust.deferred):
            got = "an ABLoss that is not deferred" if isinstance(robust, ABLoss) else type(robust).__name__
            raise TypeError(
                f"robust: got {got}, expected ABLoss(..., deferred=True), whose normaliser the step finishes, or None"
            )
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
        self._make_plan()

    def _check_deferrable(self, group: dict) -> None:
        """ValueError for parameters whose gradients cannot hold sums that are not normalised."""
        if self.robust is not None and any(p.dtype == torch.float16 for p in group["params"]):
            raise ValueError(
                "robust: got a float16 parameter, whose gradient cannot hold deferred sums; expected float32 or bfloat16"
            )

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
                self._plan = host.StepPlan(
                    Tensor, torch.nn.Parameter, _allocate_table, "cpu" in served, "cuda" in served,
                    ops.RULES.index(self._rule), self._numbers, self._flags, self._states,
                )  # fmt: skip
            except (AttributeError, ValueError):
                pass  # a torch without DLPack's exchange table, version 1: the operator is given lists

    # ---- state ----

    def __getstate__(self):
        return super().__getstate__() | {"backend": self.backend, "robust": self.robust}

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            for name in self._own_flags:  # absent from checkpoints of torch's class
                group.setdefault(name, False)
        if hasattr(self, "backend"):  # not yet while torch's __init__ runs
            self._used = None
            self._make_plan()

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "backend"):
            self._check_deferrable(self.param_groups[-1])
            self._make_plan()

    def load_state_dict(self, state_dict: dict) -> None:
        """torch's, but float32 states of half-precision parameters stay float32, and what cannot go on elsewhere is refused.

        Raises:
            ValueError: the checkpoint was made with another `heavy_ball` or `paper_form`, whose states mean other things; or
                as torch's load_state_dict. Nothing is loaded then.
        """
        saved_groups = state_dict["param_groups"]
        for group, saved in zip(self.param_groups, saved_groups):
            for name in self._own_flags:
                if bool(saved.get(name, False)) != bool(group[name]):
                    raise ValueError(
                        f"{name}: the checkpoint was made with {name}={bool(saved.get(name, False))}, this optimizer has"
                        f" {name}={bool(group[name])}; their states mean different things"
                    )
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, saved_groups):
            for p, index in zip(group["params"], saved["params"]):
                if p.dtype not in _HALF:
                    continue
                for name, value in state_dict["state"].get(index, {}).items():
                    if name in self._states and isinstance(value, Tensor):
                        self.state[p][name] = value.to(p.device, torch.float32, copy=True)

    def _init_group(self, group, *lists):
        """torch's: appends the parameters that have a gradient, their gradients, states and counts of steps to the lists,
        making what is missing. (torch.compile calls it under this name, outside the graph.)"""
        self._make_missing(group)
        return super()._init_group(group, *lists)

    def _make_missing(self, group: dict) -> None:
        """States of parameters that have none, float32 for half precision; counts of steps where the kernels are."""
        super()._init_group(group, *([] for _ in range(self._list_count())))
        for p in group["params"]:
            state = self.state[p] if p in self.state else {}
            for name in self._states:
                if isinstance(state.get(name), Tensor) and state[name].dtype in _HALF:
                    state[name] = state[name].float()
            step = state.get("step")
            operators = self._operators.get(p.device)
            if step is not None and operators is not None and step.device != p.device:
                state["step"] = step.to(p.device, torch.float32)

    def _list_count(self) -> int:
        return 2 + len(self._states) + self._counts

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
        robust = None
        if self.robust is not None:
            for group in self.param_groups:
                self._check_deferrable(group)
            robust = self.robust.settle()
            if not torch.compiler.is_compiling():
                # what is settled finishes the gradients of one step: those of another loss after it have their size
                robust, self._used = (None if robust is self._used else robust), robust
        if robust is not None and robust.device.type == "cpu" and not torch.compiler.is_compiling() and robust[5] > 0:
            return loss  # a row without a finite loss: a step that never was
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and not (self._on_gpu and found_inf.device.type != "cpu"):
            if found_inf:
                return loss
            if grad_scale is not None:
                self._unscale_grads(p for group in self.param_groups for p in group["params"])
            grad_scale = found_inf = None
        plan = self._plan
        if plan is None or torch.compiler.is_compiling():
            updated, others = [], self.param_groups
        else:
            # `grads` keeps the gradients alive until the kernel is done
            updated, grads, on, others = plan.refresh(self.param_groups, self.state, grad_scale, found_inf, _sharded(), robust)
            others = [{**group, "params": params} for group, params in others]
        numbers = [self._checked(group) for group in others]  # what is wrong is said before anything is written
        if updated:
            _planned_step(plan.table, on)
            torch.autograd.graph.increment_version(updated)
        for group, values in zip(others, numbers):
            self._step_group(group, values, grad_scale, found_inf, robust)
        return loss

    @torch.no_grad()
    def _unscale_grads(self, params) -> None:
        for p in params:
            if p.grad is not None:
                p.grad.div_(self.grad_scale.to(p.grad.device))

    def _checked(self, group: dict) -> list[float]:
        """weight_decay, first, second and eps of a group whose tensors can be stepped.

        Raises:
            RuntimeError: a sparse gradient where the rule has none, a gradient or state of another shape than its parameter, a
                parameter whose elements share memory. TypeError: an option that is no number.
        """
        for p in () if torch.compiler.is_compiling() else group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if p.device not in self._operators:  # moved there since
                self._make_plan()
            if grad.is_sparse:
                self._check_sparse(group)
            states = self.state[p] if p in self.state else {}
            for t in (grad, *(states.get(name) for name in self._states)):
                if isinstance(t, Tensor) and t.shape != p.shape:
                    raise RuntimeError(
                        f"step: got a gradient or state of shape {tuple(t.shape)}, its parameter has {tuple(p.shape)}"
                    )
            if p.layout == torch.strided and torch._debug_has_internal_overlap(p) == 1:
                raise RuntimeError(
                    "unsupported operation: more than one element of the written-to tensor refers to a single memory location."
                    " Please clone() the tensor before performing the operation."
                )
        return [self._number(group, *self._numbers.get(name, (None, -1))) for name in ("weight_decay", "first", "second", "eps")]

    def _check_sparse(self, group: dict) -> None:
        """RuntimeError where the rule takes no sparse gradients, in torch's words, or not with weight decay."""
        if group["weight_decay"] != 0:
            raise RuntimeError("weight_decay option is not compatible with sparse gradients")

    @staticmethod
    def _number(group: dict, key: str | None, index: int) -> float:
        value = 0.0 if key is None else group[key] if index < 0 else group[key][index]
        if isinstance(value, str):  # which float() would read
            raise TypeError(f"{key}: got {value!r}, expected a number")
        return float(value)

    @torch.no_grad()
    def _step_group(
        self, group: dict, numbers: list[float], grad_scale: Tensor | None, found_inf: Tensor | None, robust: Tensor | None
    ) -> None:
        """One step of a group without the plan: the operator on lists, or plain torch for what it cannot take."""
        params, grads, *rest = lists = [[] for _ in range(self._list_count())]
        self._init_group(group, *lists)
        kept = self._kept(group)
        states = [values for values, used in zip(rest, kept) if used]
        steps = rest[-1] if self._counts else []
        native: dict[torch.device, list[int]] = {}
        plain = []
        parts = [[_part(t) for t in values] for values in (params, grads, *states)]
        for i, p in enumerate(parts[0]):
            fits = self._fits(group, [values[i] for values in parts], steps[i] if steps else None)
            (native.setdefault(p.device, []) if fits else plain).append(i)
        for device, chosen in native.items():
            picked = [[values[i] for i in chosen] for values in parts]
            counts = [steps[i] for i in chosen] if steps else []
            self._native(group, numbers, device, *picked[:2], picked[2:], counts, grad_scale, found_inf, robust)
            if not torch.compiler.is_compiling():
                torch.autograd.graph.increment_version([params[i] for i in chosen])
        if not plain:
            return
        if found_inf is not None:
            if found_inf:
                return
            if grad_scale is not None:
                self._unscale_grads(params[i] for i in plain)
        if robust is not None:
            if robust[5] > 0:
                return
            grads = [g * robust[1].to(g.device, real_dtype(g.dtype)) for g in grads]
        if isinstance(group["lr"], Tensor):
            group = {**group, "lr": group["lr"].reshape(())}  # may have one dimension more than a parameter
        self._plain(group, [params[i] for i in plain], [grads[i] for i in plain],
                    *([values[i] for i in plain] if values else [None] * len(plain) for values in rest))  # fmt: skip

    def _kept(self, group: dict) -> list[bool]:
        """Which of `_states` this group's options keep (csrc/math.h StepNumbers::states)."""
        raise NotImplementedError

    def _native(self, group, numbers, device, params, grads, states, steps, grad_scale, found_inf, robust) -> None:
        operators = self._operators[device]
        operators = operators.compiled if torch.compiler.is_compiling() else operators
        lr = group["lr"]
        lr_tensor = lr if isinstance(lr, Tensor) and lr.device == device else None
        if torch.compiler.is_compiling() and lr_tensor is None:
            # a number would become part of the code: compiled anew for each lr, and so with torch.full
            lr_tensor = torch.ones((), dtype=torch.float64, device=device) * lr
        there = [None if x is None else x.to(device, non_blocking=True) for x in (grad_scale, found_inf, robust)]
        bits = 0
        for name, bit in self._flags.items():
            bits |= bit if group[name] else 0
        operators.step_(
            params, grads, [t for values in states for t in values], steps, lr_tensor, *there,
            0.0 if lr_tensor is not None else self._number(group, "lr", -1), *numbers, ops.RULES.index(self._rule), bits,
        )  # fmt: skip

    def _fits(self, group: dict, tensors: list[Tensor], step: Tensor | None) -> bool:
        """Whether step_ takes them: plain strided tensors on one device, the parameter and gradient of one dtype and states of
        its real dtype; under torch.compile no option that would have to leave the graph as a number."""
        p = tensors[0]
        if self._operators.get(p.device) is None or any(t is None for t in tensors):
            return False
        if torch.compiler.is_compiling():
            values = [
                v for key, value in group.items() if key != "params" for v in (value if isinstance(value, tuple) else (value,))
            ]
            if any(isinstance(v, Tensor) and v is not group["lr"] for v in values):
                return False
            if isinstance(group["lr"], Tensor) and group["lr"].device != p.device:
                return False
        return (
            p.dtype in _DTYPES
            and all(
                type(t) in (Tensor, torch.nn.Parameter) and t.device == p.device and t.layout == torch.strided for t in tensors
            )
            and tensors[1].dtype == p.dtype
            and all(t.dtype == real_dtype(p.dtype) for t in tensors[2:])
            and (step is None or step.device == p.device)
        )

    def _plain(self, group: dict, params, grads, *lists) -> None:
        """The step in plain torch."""
        raise NotImplementedError


_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, torch.float64, *_HALF)


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype in _HALF else p.dtype


def _allocate_table(words: int) -> Tensor:
    return torch.empty(words, dtype=torch.int64)


def _sharded() -> type | None:
    """torch's DTensor, where anybody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else getattr(module, "DTensor", None)


def _part(t: Tensor | None) -> Tensor | None:
    """What the kernels see of a tensor: complex numbers as pairs."""
    if t is None:
        return None
    if t.is_complex() and t.layout == torch.strided:
        t = torch.view_as_real(t.resolve_conj())
    if t.layout == torch.strided and not torch.compiler.is_compiling() and t.is_neg():
        t = t.resolve_neg()  # an operator takes no pending sign in a list it may write
    return t


class ABSGD(_FusedStep, torch.optim.SGD):
    r"""Momentum SGD; the robust weights of ABSGD come from :class:`ABLoss`, which works with any optimizer.

    One pass over all parameters, with G the gradient of the robust loss (negated with ``maximize``):

        g = G + weight_decay * w
        b = momentum * b + (1 - dampening) * g              (b = g in a parameter's first step)
        w = w - lr * b                                      (nesterov: w - lr * (g + momentum * b))

    which is torch.optim.SGD, and what the `absgd` package uses. ``heavy_ball=True`` is the paper's own step, where d is
    the last change of w; the two differ once ``lr`` changes, because the paper's keeps past steps at their size:

        d = momentum * d - lr * g
        w = w + d

    Parameters may have any shape and be float32, float64, bfloat16 or float16 (whose momentum is kept in float32). All of them
    are stepped by one kernel launch (up to 959 tensors on CUDA); sparse gradients and tensor subclasses by plain torch, with
    the same result. On a GPU the kernel reads a tensor ``lr``, and the scaler's numbers, by itself: the host never waits, and a
    captured graph follows a schedule. ``state_dict()`` loads into torch.optim.SGD and back in the middle of a training (not
    with ``heavy_ball``).

    Args:
        params: parameters, named parameters or parameter groups, as for every torch optimizer.
        lr: learning rate >= 0; a float or a one-element tensor.
        momentum: >= 0. With 0 no buffer is kept.
        dampening: of the gradient's share in the buffer.
        weight_decay: L2 penalty >= 0.
        nesterov: needs momentum > 0 and dampening = 0.
        maximize: ascend instead of descend.
        heavy_ball: Eq. 2 of the paper; with neither nesterov nor dampening.
        robust: an ABLoss with deferred=True, whose log s' this step settles for all micro-batches (and processes) since the
            last, and whose gradients it brings to their size in its kernel, from device memory; ``.grad`` stays as it is. After a
            loss that is not finite nothing is written. Not with clipping, which needs ``criterion.finish_(params)``.
        backend: None (the fastest that runs), "cuda", "triton", "cpu" or "reference".

    Raises:
        ValueError: a number out of its range, options that exclude each other, an unknown backend.
        RuntimeError: a backend that cannot run, with the reason; a step whose gradients ``finish_`` has finished.
        TypeError: robust is no deferred ABLoss.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()

    Source: Qi et al., *Attentional-Biased Stochastic Gradient Descent* (TMLR 2023), Algorithm 1 and Eq. 2; the momentum
    of torch.optim.SGD. A step that torch.amp.GradScaler skips never was: the next one is the first if that was.
    """

    _rule = "sgd"
    _numbers = {"weight_decay": ("weight_decay", -1), "first": ("momentum", -1), "second": ("dampening", -1)}
    _flags = {"maximize": 1, "nesterov": 2, "heavy_ball": 4}
    _states = ("momentum_buffer",)
    _counts = False
    _own_flags = ("heavy_ball",)

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
        for name, value in (("learning rate", lr), ("momentum value", momentum), ("weight_decay value", weight_decay)):
            _refuse_nan(name, value)
        if heavy_ball and (nesterov or dampening != 0):
            raise ValueError(
                f"heavy_ball is Eq. 2 of the paper, which has no nesterov (got {nesterov}) and no dampening (got {dampening});"
                " use heavy_ball=False with these"
            )
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self._set_up(robust, backend, heavy_ball=heavy_ball)

    def _kept(self, group):
        return [group["momentum"] != 0]

    def _make_missing(self, group):
        super()._make_missing(group)
        for p in group["params"]:
            # A first step from a buffer of zeros gives b = g, and found_inf may undo it without anybody waiting for it. (With
            # dampening the first gradient counts in full, so there plain torch takes the first step.)
            if p.grad is None or p.grad.is_sparse or group["momentum"] == 0 or group["dampening"] != 0:
                continue
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p, dtype=_state_dtype(p), memory_format=torch.preserve_format)

    def _plain(self, group, params, grads, buffers):
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "heavy_ball")
        buffers = reference.momentum_step_(params, grads, buffers, **{name: group[name] for name in names})
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers):
                self.state[p]["momentum_buffer"] = buffer


class ABAdam(_FusedStep, torch.optim.Adam):
    r"""Adam on the gradient of the robust loss; the robust weights come from :class:`ABLoss`.

    torch.optim.Adam in one pass over all parameters, with G the gradient (negated with ``maximize``) and t the step:

        g = G + weight_decay * w
        v = beta_1 v + (1 - beta_1) g,    u = beta_2 u + (1 - beta_2) g^2       (amsgrad: the largest u so far, below)
        w = w - lr (v / (1 - beta_1^t)) / (sqrt(u / (1 - beta_2^t)) + eps)

    ``paper_form=True`` is Eq. 9 of the ABSGD paper: no bias correction, eps (its G_0) outside the root, decoupled decay:

        w = w - lr (v / (sqrt(u) + eps) + weight_decay * w)

    Half-precision parameters keep float32 states. ``state_dict()`` loads into torch.optim.Adam and back in the middle of a
    training (not with ``paper_form``). What can be said of tensors, GPUs and scalers at :class:`ABSGD` holds here too; CUDA takes
    633 tensors a launch (546 with amsgrad), and a small launch more for the counts of steps.

    Args:
        params: parameters, named parameters or parameter groups.
        lr: learning rate >= 0; a float or a one-element tensor.
        betas: both in [0, 1).
        eps: >= 0.
        weight_decay: L2 penalty >= 0 (with ``paper_form`` decoupled).
        amsgrad: divide by the largest u so far; not with ``paper_form``.
        maximize: ascend instead of descend.
        paper_form: Eq. 9 of the paper.
        robust, backend: as for :class:`ABSGD`.

    Raises:
        ValueError: a number out of its range, options that exclude each other, an unknown backend.
        RuntimeError: a backend that cannot run; a sparse gradient.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABAdam(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Kingma & Ba 2015, Alg. 1; ABSGD paper, Sec. 3.4 and Eq. 9; Reddi et al. 2018, Alg. 2 (amsgrad).
    """

    _rule = "adam"
    _numbers = {"weight_decay": ("weight_decay", -1), "first": ("betas", 0), "second": ("betas", 1), "eps": ("eps", -1)}
    _flags = {"maximize": 1, "amsgrad": 8, "decoupled_weight_decay": 16, "paper_form": 16 | 32}
    _states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _own_flags = ("paper_form",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        paper_form: bool = False,
        robust=None,
        backend: str | None = None,
    ):
        if paper_form and amsgrad:
            raise ValueError("paper_form is Eq. 9 of the paper, which has no amsgrad (got True); use paper_form=False with it")
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        self._set_up(robust, backend, paper_form=paper_form)

    def _check_sparse(self, group):
        raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")

    def _kept(self, group):
        return [True, True, group["amsgrad"]]

    def _plain(self, group, params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps):
        names = ("lr", "betas", "eps", "weight_decay", "maximize", "decoupled_weight_decay", "paper_form")
        reference.adam_step_(
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, **{name: group[name] for name in names}
        )


class ABAdamW(ABAdam, torch.optim.AdamW):
    r"""AdamW on the gradient of the robust loss: :class:`ABAdam` with decoupled weight decay, w = w - lr weight_decay w.

    torch.optim.AdamW in one pass over all parameters; arguments, errors and limits as for :class:`ABAdam`, with weight_decay =
    1e-2.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABAdamW(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Loshchilov & Hutter 2019, Alg. 2; ABSGD paper, Sec. 3.4.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        amsgrad: bool = False,
        maximize: bool = False,
        paper_form: bool = False,
        robust=None,
        backend: str | None = None,
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay,
            amsgrad=amsgrad, maximize=maximize, paper_form=paper_form, robust=robust, backend=backend,
        )  # fmt: skip


class ABRMSprop(_FusedStep, torch.optim.RMSprop):
    r"""RMSprop on the gradient of the robust loss: torch.optim.RMSprop in one pass over all parameters.

        g = G + weight_decay * w
        u = alpha u + (1 - alpha) g^2,    m = alpha m + (1 - alpha) g            (m: centered only, else 0)
        d = g / (sqrt(u - m^2) + eps)
        w = w - lr d;    with momentum  b = momentum b + d,  w = w - lr b

    Args:
        params: parameters, named parameters or parameter groups.
        lr, alpha, eps, weight_decay, momentum: >= 0.
        centered: divide by the standard deviation instead of the root mean square.
        maximize: ascend instead of descend.
        robust, backend: as for :class:`ABSGD`, which also says what holds of tensors, GPUs and scalers.

    Raises:
        ValueError: a number out of its range, an unknown backend.
        RuntimeError: a backend that cannot run; a sparse gradient.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABRMSprop(model.parameters(), lr=1e-3)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Tieleman & Hinton 2012, Lecture 6.5; Graves 2013, Eq. 38 to 45 (centered); ABSGD paper, Sec. 3.4.
    """

    _rule = "rmsprop"
    _numbers = {"weight_decay": ("weight_decay", -1), "first": ("alpha", -1), "second": ("momentum", -1), "eps": ("eps", -1)}
    _flags = {"maximize": 1, "centered": 64}
    _states = ("square_avg", "momentum_buffer", "grad_avg")

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
        robust=None,
        backend: str | None = None,
    ):
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, maximize=maximize)
        self._set_up(robust, backend)

    def _check_sparse(self, group):
        raise RuntimeError("RMSprop does not support sparse gradients")

    def _kept(self, group):
        return [True, group["momentum"] != 0, group["centered"]]

    def _plain(self, group, params, grads, square_avgs, buffers, grad_avgs, steps):
        names = ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")
        reference.rmsprop_step_(params, grads, square_avgs, buffers, grad_avgs, steps, **{name: group[name] for name in names})


class ABAdagrad(_FusedStep, torch.optim.Adagrad):
    r"""AdaGrad on the gradient of the robust loss: torch.optim.Adagrad in one pass over all parameters.

        g = G + weight_decay * w
        u = u + g^2
        w = w - lr / (1 + (t - 1) lr_decay) g / (sqrt(u) + eps)

    Args:
        params: parameters, named parameters or parameter groups.
        lr, lr_decay, weight_decay, initial_accumulator_value (of u), eps: >= 0.
        maximize: ascend instead of descend.
        robust, backend: as for :class:`ABSGD`, which also says what holds of tensors, GPUs and scalers.

    Sparse gradients take torch's own step.

    Raises:
        ValueError: a number out of its range, an unknown backend.
        RuntimeError: a backend that cannot run; weight_decay with a sparse gradient.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = ABAdagrad(model.parameters(), lr=1e-2)
        >>> model(torch.ones(4, 3)).square().mean().backward()
        >>> optimizer.step()

    Source: Duchi et al. 2011; ABSGD paper, Sec. 3.4.
    """

    _rule = "adagrad"
    _numbers = {"weight_decay": ("weight_decay", -1), "first": ("lr_decay", -1), "eps": ("eps", -1)}
    _flags = {"maximize": 1}
    _states = ("sum",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        robust=None,
        backend: str | None = None,
    ):
        super().__init__(params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize=maximize)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = self._first_sum(p, group)
        self._set_up(robust, backend)

    @staticmethod
    def _first_sum(p: Tensor, group: dict) -> Tensor:
        start = group["initial_accumulator_value"]
        return torch.full_like(
            p,
            complex(start, start) if p.is_complex() else start,
            dtype=_state_dtype(p),
            memory_format=torch.preserve_format,
        )

    def _kept(self, group):
        return [True]

    def _make_missing(self, group):
        for p in group["params"]:  # torch makes them in __init__ only, not for a group that is added later
            if p.grad is not None and not self.state[p]:
                self.state[p] = {"step": torch.tensor(0.0, dtype=torch.float32), "sum": self._first_sum(p, group)}
        super()._make_missing(group)

    def _plain(self, group, params, grads, sums, steps):
        names = ("lr", "weight_decay", "lr_decay", "eps", "maximize")
        options = {name: group[name] for name in names}
        for one in zip(params, grads, sums, steps):
            one = [[value] for value in one]
            if one[1][0].is_sparse:
                adagrad(*one, has_sparse_grad=True, foreach=False, has_complex=one[0][0].is_complex(), **options)
            else:
                reference.adagrad_step_(*one, **options)


def _refuse_nan(name: str, value: float | Tensor) -> None:
    if not isinstance(value, Tensor) and value != value:  # torch lets it pass
        raise ValueError(f"Invalid {name}: {value}")
