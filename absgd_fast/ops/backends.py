"""The operators of each backend, and which of them serves a call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from .. import _backend
from .._codes import INIT_FIRST, KIND, NORMALIZER, PRUNE, UPDATE, WITH_GRAD, WITH_STATS
from .labels import report_of_kernels
from .modes import transformed
from .schemas import RECORDS, TRITON, Operator

ANY = sys.maxsize
# Threads of the one block of the CUDA kernels that holds a small batch in its registers (csrc/launch.h fits_one_block)
ONE_BLOCK = 512


class Operators:
    """The operators of one backend as attributes, each with the arguments of its schema.

    Here are those in plain torch (in_torch.py). Their losses are differentiable by autograd itself: whoever calls them saves
    nothing for backward, and attaches no gradient.

    backend: its name. native: whether kernels serve, C++ or Triton. compiled: the same operators for torch.compile.
    has_rules: rule_weights and group_weights are there. weighs_late: settled_logit_loss is there, and backward makes the weights
    of what robust_logit_loss left as statistics.

    What a forward pass leaves for backward is its backward mode: 0 (autograd has what it needs), WITH_GRAD or WITH_STATS.
    losses_backward_mode: of losses on logits alone. vector_backward_mode: of a robust loss of losses that are there already.
    """

    native = False
    losses_backward_mode = vector_backward_mode = 0

    def __init__(self, backend: str, functions: dict[str, Callable], compiled: Operators | None = None):
        self.backend, self.compiled = backend, compiled or self
        self.has_rules, self.weighs_late = "rule_weights" in functions, "settled_logit_loss" in functions
        vars(self).update(functions)

    def __reduce__(self):  # a module that is copied or pickled finds the same ones again
        return _find, (self.backend, self.compiled is self)

    def backward_mode(self, logits: Tensor) -> int:
        """The backward mode of the robust loss on logits."""
        return 0

    def weighing(self, logits: Tensor, mode: int) -> Tensor | None:
        """Room for what the weights are made from later; None where the forward pass makes them. Where `weighs_late`."""
        return torch.empty(4, dtype=torch.float64, device=logits.device) if mode != WITH_GRAD else None


class Kernels(Operators):
    """The operators of a backend with kernels, whose gradients are attached by autograd.py.

    gradient_limit: lanes of the one block that makes the gradient of a small batch in the forward pass of the robust loss; 0:
    no batch, ANY: every batch.
    """

    native = True
    vector_backward_mode = WITH_GRAD

    def __init__(self, backend: str, functions: dict, gradient_limit: int, compiled: Operators | None = None):
        super().__init__(backend, functions, compiled)
        self.gradient_limit = gradient_limit
        # Losses alone have one number per row as their upstream gradient, which statistics take for nothing.
        self.losses_backward_mode = WITH_GRAD if gradient_limit == ANY else WITH_STATS

    def backward_mode(self, logits: Tensor) -> int:
        limit = self.gradient_limit
        if limit == ANY:
            return WITH_GRAD
        if not limit or logits.dtype == torch.float64:
            return WITH_STATS
        classes = logits.shape[1]
        fits = 0 < classes <= 128 and logits.numel() <= classes * (limit // lanes_of_a_row(classes))
        return WITH_GRAD if fits else WITH_STATS


def lanes_of_a_row(classes: int) -> int:
    """Threads that share a row in the one block, a power of two of at most 32: four classes each, if the row has them."""
    return next((lanes for lanes in (1, 2, 4, 8, 16) if classes <= 4 * lanes), 32)


# ---- Triton's functions, called as the operators are -----------------------------------------------------------------------

# What a Triton function takes in place of an operator's `flags`, which are its last argument (but for those of CUDA alone)
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
    """The Triton function of an operator; Triton is imported by the first call."""

    def call(*args):
        function = getattr(import_module(f"absgd_fast.kernels.{record.triton}"), record.name)
        args = args[: len(args) - record.cuda_arguments]
        if not record.triton_flags:
            return function(*args)
        *args, flags = args
        return function(*args, **{name: _DECODED[name](flags) for name in record.triton_flags})

    return call


# ---- who serves ------------------------------------------------------------------------------------------------------------


def _overloads(namespace: str, records: list[Operator]) -> dict[str, Callable]:
    return {record.name: getattr(getattr(torch.ops, namespace), record.name).default for record in records}


def _native(backend: str, gradient_limit: int) -> Kernels:
    overloads = _overloads("absgd_fast", [record for record in RECORDS.values() if backend in record.native])
    # the overload's own callable, without the Python frame of OpOverload.__call__ (0.3 us)
    eager = {name: overload._op for name, overload in overloads.items()}
    return Kernels(backend, eager, gradient_limit, Kernels(backend, overloads, gradient_limit))


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
    """The operators that serve a call with tensors on `device`.

    Inside torch.func transforms (vmap, grad, jvp) and on dual numbers only the differentiable formulas do.
    """
    if transformed():
        return REFERENCE
    found = OPERATORS[_backend.select(device, backend)]
    return found.compiled if torch.compiler.is_compiling() else found
