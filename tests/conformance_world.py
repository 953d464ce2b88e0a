"""What the situations of tests/test_conformance.py are made of: a `World` for each optimizer class, and ways to look at it.

A situation is a function of a `World`. It does what a user does, and returns its outcome: tensors, numbers, types of exceptions.
test_conformance.py lets it happen to torch's class and to ours, and compares the outcomes. Situations know nothing of either.
"""

import copy
import inspect
import weakref
from typing import Any, NamedTuple

import torch
from optim_cases import HALF, OPTIMIZERS, SHAPES, make, set_grads, states
from torch.optim import Optimizer

ALL = ("sgd", "adam", "adamw", "rmsprop", "adagrad")
# states of every kind that a rule has, and numbers that differ from the defaults
OPTIONS = {
    "sgd": dict(lr=0.02, momentum=0.9, dampening=0.0, nesterov=True, weight_decay=0.01),
    "adam": dict(lr=0.02, betas=(0.7, 0.9), amsgrad=True, weight_decay=0.05, eps=1e-6),
    "adamw": dict(lr=0.02, betas=(0.7, 0.9), weight_decay=0.3),
    "rmsprop": dict(lr=0.02, alpha=0.9, centered=True, momentum=0.7, weight_decay=0.05, eps=1e-2),
    "adagrad": dict(lr=0.02, lr_decay=0.05, weight_decay=0.05, initial_accumulator_value=0.1),
}


class World:
    """An optimizer class, and how a situation makes parameters, gradients and steps for it.

    Our optimizers keep the states of half-precision parameters in float32. In a world of half precision torch's class gets
    float32 parameters in their place: they hold numbers of half precision, to which each step rounds them.
    """

    def __init__(self, name: str, cls: type[Optimizer], dtype: torch.dtype, **always: Any) -> None:
        self.name, self.cls, self.dtype, self.always = name, cls, dtype, always
        self.torch = OPTIMIZERS[name][1]
        self.rounds = dtype in HALF and cls is self.torch

    def __call__(self, params, **options):
        """An optimizer with the options of its row, replaced by those that are given."""
        return self.cls(params, **copy.deepcopy(OPTIONS[self.name]) | options, **self.always)

    def bare(self, *args, **options):
        """An optimizer with the arguments that are given and no others."""
        return self.cls(*args, **options, **self.always)

    def known(self, **options):
        """Those of the options that torch's class takes."""
        return {name: value for name, value in options.items() if name in inspect.signature(self.torch).parameters}

    def params(self, shapes=SHAPES, seed=0, dtype=None):
        made = make(shapes, dtype or self.dtype, seed)
        return [torch.nn.Parameter(p.detach().float()) for p in made] if self.rounds else made

    def grads(self, params, seed, skip=0.0):
        """Sets gradients, the same for equal seeds; with probability `skip` None."""
        set_grads(params, seed=seed, skip=skip)
        self.round([p.grad for p in params if p.grad is not None])

    @torch.no_grad()
    def round(self, tensors):
        if self.rounds:
            for t in tensors:
                t.copy_(t.to(self.dtype))

    def step(self, optimizer):
        optimizer.step()
        self.round([p for group in optimizer.param_groups for p in group["params"]])

    def train(self, optimizer, seeds=range(3), skip=0.0):
        """Steps with gradients of all parameters."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for seed in seeds:
            self.grads(params, seed, skip)
            self.step(optimizer)

    def started(self, shapes=SHAPES, **options):
        """Parameters and an optimizer that has made two steps."""
        params = self.params(shapes)
        optimizer = self(params, **options)
        self.train(optimizer, range(100, 102))
        return params, optimizer


# ---- the table --------------------------------------------------------------------------------------------------------------


class Situation(NamedTuple):
    happens: Any  # World -> outcome
    dtype: torch.dtype
    only: tuple[str, ...]  # optimizers
    tolerance: float  # at least that of the dtype
    deep: bool


SITUATIONS: dict[str, Situation] = {}
DTYPE_NAMES = {
    torch.float64: "",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}


def situation(variants=None, *, dtypes=(torch.float64,), only=ALL, tolerance=0.0, deep=False):
    """Adds a situation to the table, for each dtype and each variant: {name: second argument of the function}."""

    def add(function):
        for dtype in dtypes:
            for name in variants or [None]:
                happens = (
                    function if variants is None else lambda world, given=variants[name]: function(world, copy.deepcopy(given))
                )
                key = " ".join(filter(None, (function.__name__.replace("_", " "), name and f"({name})", DTYPE_NAMES[dtype])))
                assert key not in SITUATIONS
                SITUATIONS[key] = Situation(happens, dtype, only, tolerance, deep)
        return function

    return add


# ---- what can be seen ---------------------------------------------------------------------------------------------------


def attempt(call):
    """The type of the exception that a call raises. None: it raises none."""
    try:
        call()
    except NameError:  # a mistake of the situation, unless a class has no such attribute
        raise
    except Exception as error:  # its type is the outcome
        return type(error)


def look(optimizer):
    """Parameters, gradients, states and options, copied."""
    return copy.deepcopy(
        {
            "params": [p.detach() for group in optimizer.param_groups for p in group["params"]],
            "states": states(optimizer),
            "options": [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups],
        }
    )


def attempted(world, optimizer, call):
    """The exception of a call; where there is none, how training goes on after it."""
    error = attempt(call)
    if error is None:
        error = attempt(lambda: world.train(optimizer))
    return error if error is not None else look(optimizer)


def watched(t):
    """A copy of a tensor, and a function that says whether its memory has been freed.

    NumPy's array lives as long as torch's storage of its memory, whoever holds that storage, in Python or in C++.
    """
    import numpy as np

    memory = np.empty(t.numel() * t.element_size() + 1, np.uint8)  # one byte more: an empty storage holds nothing
    gone = weakref.ref(memory)
    with torch.no_grad():
        copied = torch.from_numpy(memory)[:-1].view(t.dtype).view(t.shape).copy_(t)
    return copied, lambda: gone() is None


def kept_names(optimizer, p):
    """The states of a parameter, without the count of steps."""
    return [name for name, value in optimizer.state[p].items() if name != "step" and isinstance(value, torch.Tensor)]


def watch_states(optimizer, params):
    """Puts watched copies in the places of all states. Returns the functions that say whether they are freed."""
    questions = []
    for p in params:
        for name, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor):
                optimizer.state[p][name], freed = watched(value)
                questions.append(freed)
    return questions
