"""Whether torch.func transforms or torch.export are active, and whether the graph of a backward is kept."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

# Whether the graph of the running backward is kept (retain_graph=True), so that a gradient in it must not be written over. In a
# torch without this function the answer is always True, which costs a copy of the gradient.
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def transformed() -> bool:
    """Whether a torch.func transform (vmap, grad, jvp) or a level of forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_update(name: str) -> None:
    """RuntimeError inside a torch.func transform, which does not let a module write its state. name: of the module.

    Forward-mode differentiation alone (torch.autograd.forward_ad) lets it.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name}: got a forward inside a torch.func transform (grad, vjp, jvp, vmap, ...), which cannot update the state;"
            " pass update=False, or call eval() before, to compute with the state as it is"
        )


def refuse_export(name: str) -> None:
    """RuntimeError while torch.export traces, whose programs have no state. name: of the module."""
    if torch.compiler.is_exporting():
        raise RuntimeError(
            f"{name}: got a forward that updates the state while torch.export traces it, but an exported program cannot keep this"
            " state; pass update=False, or call eval() before, to export the loss by the state as it is"
        )
