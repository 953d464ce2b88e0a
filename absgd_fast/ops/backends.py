"""The operators of each backend, and the choice of the one that serves a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from .. import _backend
from .._codes import INIT_FIRST, KIND, NORMALIZER, PRUNE, UPDATE, WITH_GRAD, WITH_STATS
from .labels import report_of_kernels
from .modes import transformed
from .schemas import RECORDS, TRITON, Operator

ANY = sys.maxsize
# How many threads the one block has that keeps a small batch in its registers (csrc/launch.h fits_one_block)
ONE_BLOCK = 512


class Operators:
    """The operators of one backend as attributes. Each takes the arguments of its schema (schemas.py).

    An object of this class itself has the operators in plain torch (in_torch.py). Autograd differentiates their losses, so
    callers save nothing for backward and attach no gradient. Operators with kernels are `Kernels`.

    The backward mode of a forward pass says what it leaves for backward: 0 (nothing: autograd has what it needs), WITH_GRAD (the
    gradient) or WITH_STATS (the statistics of the rows).

    Attributes:
        backend: the name of the backend.
        compiled: the same operators for torch.compile.
        has_kernels: whether kernels serve, those of a C++ library or of Triton.
        has_rules: whether rule_weights and group_weights are there.
        has_squares: whether planned_squares is there.
        weighs_late: whether settled_logit_loss is there. Then the backward pass also makes the weights of the statistics that
            robust_logit_loss leaves.
        eager: the module _eager, which goes through an operator and autograd in C++ (csrc/eager.cpp), or None.
        writes_over_logits: whether backward makes the gradient from statistics over a copy of the logits (logit_loss_backward_).
        vector_backward_mode: the backward mode of the robust loss of losses that are there already.
    """

    # One attribute for each record of schemas.py, which a test compares. Each backend has those that its records give it. In
    # plain torch a result that is saved for backward is None.
    logit_loss: Callable[..., tuple[Tensor, Tensor, Tensor]]
    logit_loss_: Callable[..., tuple[Tensor, Tensor]]
    robust_logit_loss: Callable[..., tuple[Tensor, Tensor, Tensor]]
    logit_loss_backward: Callable[..., Tensor]
    logit_loss_backward_: Callable[..., None]
    settled_logit_loss: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    robust_loss: Callable[..., tuple[Tensor, Tensor, Tensor]]
    robust_partial_stats: Callable[..., Tensor]
    robust_settle: Callable[..., Tensor]
    robust_apply: Callable[..., tuple[Tensor, Tensor, Tensor]]
    robust_weights: Callable[..., tuple[Tensor, Tensor, Tensor]]
    robust_weights_backward: Callable[..., Tensor]
    rule_weights: Callable[..., Tensor]
    group_weights: Callable[..., Tensor]
    rectified: Callable[..., Tensor]
    scale: Callable[..., Tensor]
    scale_: Callable[..., None]
    step_: Callable[..., None]
    planned_step: Callable[..., None]
    planned_squares: Callable[..., Tensor]
    weighted_step_: Callable[..., Tensor]

    has_kernels = False
    vector_backward_mode = 0

    def __init__(self, backend: str, functions: dict[str, Callable], compiled: Operators | None = None):
        self.backend, self.compiled = backend, compiled or self
        self.eager: ModuleType | None = None
        self.has_rules, self.weighs_late = "rule_weights" in functions, "settled_logit_loss" in functions
        self.has_squares = "planned_squares" in functions
        self.writes_over_logits = "logit_loss_backward_" in functions
        vars(self).update(functions)

    def __reduce__(self):  # a module that is deeply copied or pickled finds the same operators again
        return _find, (self.backend, self.compiled is self)

    def __copy__(self):  # for whoever wants to change one of them for himself
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def backward_mode(self, logits: Tensor) -> int:
        """The backward mode of the robust loss on logits."""
        return 0

    def losses_backward_mode(self, logits: Tensor) -> int:
        """The backward mode of losses on logits, without weights."""
        return 0

    def weighing(self, logits: Tensor, mode: int) -> Tensor | None:
        """Room for the numbers from which backward makes the weights; None if forward makes them. Only if `weighs_late`."""
        return torch.empty(4, dtype=torch.float64, device=logits.device) if mode != WITH_GRAD else None


class Kernels(Operators):
    """The operators of a backend with kernels. autograd.py attaches their gradients.

    gradient_limit: which batches get their gradient in the forward pass of the robust loss: those that fit into one block of this
    many lanes, none (0), or all (ANY).
    """

    has_kernels = True
    vector_backward_mode = WITH_GRAD

    def __init__(self, backend: str, functions: dict, gradient_limit: int, compiled: Operators | None = None):
        super().__init__(backend, functions, compiled)
        self.gradient_limit = gradient_limit

    def backward_mode(self, logits: Tensor) -> int:
        """The backward mode of the robust loss on logits."""
        limit = self.gradient_limit
        if limit == ANY:
            return WITH_GRAD
        if not limit or logits.dtype == torch.float64 or logits.dim() < 2:  # the operator refuses the last
            return WITH_STATS
        classes = logits.shape[1]
        fits = 0 < classes <= 128 and logits.numel() <= classes * (limit // lanes_of_a_row(classes))
        return WITH_GRAD if fits else WITH_STATS

    def losses_backward_mode(self, logits: Tensor) -> int:
        """The backward mode of losses on logits, without weights.

        A gradient made from statistics takes in the upstream gradient of losses, one number per row, at no cost. A gradient made
        in the forward pass would be rounded before and after that in bfloat16.
        """
        return WITH_GRAD if self.gradient_limit == ANY and logits.dtype is not torch.bfloat16 else WITH_STATS


def lanes_of_a_row(classes: int) -> int:
    """How many threads of the one block share a row: the least power of two with at most four classes each, or 32."""
    return next((lanes for lanes in (1, 2, 4, 8, 16) if classes <= 4 * lanes), 32)


# ---- Triton's functions, called as the operators are -----------------------------------------------------------------------

# The arguments that a Triton function takes instead of an operator's `flags`. These are the operator's last argument, apart from
# the arguments that only CUDA reads.
_DECODED = {
    "normalizer": lambda flags: flags & NORMALIZER,
    "init_first": lambda flags: bool(flags & INIT_FIRST),
    "update": lambda flags: bool(flags & UPDATE),
    "with_grad": lambda flags: bool(flags & WITH_GRAD),
    "with_stats": lambda flags: bool(flags & WITH_STATS),
    "kind": lambda flags: flags // KIND,
    "prune": lambda flags: bool(flags & PRUNE),
    "report": lambda flags: report_of_kernels(),
}


def _from_triton(record: Operator) -> Callable:
    """The Triton function of an operator. The first call imports Triton."""

    def call(*args):
        function = getattr(import_module(f"absgd_fast.kernels.{record.triton}"), record.name)
        args = args[: len(args) - record.cuda_arguments]
        if not record.triton_flags:
            return function(*args)
        *args, flags = args
        return function(*args, **{name: _DECODED[name](flags) for name in record.triton_flags})

    return call


# ---- who serves ------------------------------------------------------------------------------------------------------------


def _overloads(namespace: str, records: list[Operator]) -> dict[str, torch._ops.OpOverload]:
    return {record.name: getattr(getattr(torch.ops, namespace), record.name).default for record in records}


def _native(backend: str, gradient_limit: int) -> Kernels:
    """The operators of a C++ library, "cpu" or "cuda"."""
    overloads = _overloads("absgd_fast", [record for record in RECORDS.values() if backend in record.native])
    # the overload's own callable, without the Python frame of OpOverload.__call__ (0.3 us)
    eager = {name: overload._op for name, overload in overloads.items()}
    operators = Kernels(backend, eager, gradient_limit, Kernels(backend, overloads, gradient_limit))
    operators.eager = _backend.eager() if backend == "cpu" else None
    return operators


def _triton() -> Kernels:
    records = [record for record in RECORDS.values() if record.triton is not None or record.in_torch is not None]
    eager = {record.name: record.in_torch if record.triton is None else _from_triton(record) for record in records}
    for name, function in eager.items():
        TRITON.impl(name, function, "CompositeExplicitAutograd")
    return Kernels("triton", eager, 0, Kernels("triton", _overloads(TRITON.ns, records), 0))


REFERENCE = Operators("reference", {r.name: r.in_torch for r in RECORDS.values() if r.in_torch is not None})
OPERATORS = {"cpu": _native("cpu", ANY), "cuda": _native("cuda", ONE_BLOCK), "triton": _triton(), "reference": REFERENCE}


def _find(backend: str, compiled: bool) -> Operators:
    return OPERATORS[backend].compiled if compiled else OPERATORS[backend]


def serving(device: torch.device, backend: str | None) -> Operators:
    """The operators that serve a call with tensors on `device`: those of `backend`, or of the fastest backend that can run.

    Inside torch.func transforms (vmap, grad, jvp) and on dual numbers only the operators in plain torch serve.
    """
    if transformed():
        return REFERENCE
    found = OPERATORS[_backend.select(device, backend)]
    return found.compiled if torch.compiler.is_compiling() else found
