"""What torch.compile makes, without importing dynamo: that takes longer than importing torch, and most trainings never need it.

torch's own torch.compiler.disable, torch.compiler.assume_constant_result and torch._dynamo.OptimizedModule import it at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

if TYPE_CHECKING:
    from torch._dynamo import OptimizedModule
    from typing_extensions import TypeIs

_Function = TypeVar("_Function", bound=Callable)


def is_compiled(module: object) -> TypeIs[OptimizedModule]:
    """Whether torch.compile has made the module: then its `_orig_mod` is the module inside.

    >>> is_compiled(torch.nn.Linear(2, 2))
    False
    """
    dynamo = sys.modules.get("torch._dynamo")  # torch.compile imports it
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def outside_graphs(function: _Function) -> _Function:
    """The function as torch.compiler.disable has it: a compiled caller leaves its graph for the call, and goes on in another."""
    disabled = torch._disable_dynamo(function)  # it imports dynamo with its first call

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return (disabled if torch.compiler.is_compiling() else function)(*args, **kwargs)

    return cast(_Function, called)


def constant_in_graphs(function: _Function) -> _Function:
    """The function as torch.compiler.assume_constant_result has it: a graph keeps the result from the time of tracing."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
