"""What torch is in the middle of."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

# True while the graph of the running backward is kept (retain_graph=True). A torch without this function lets the gradient be copied.
graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def transformed() -> bool:
    """Whether a torch.func transform or a level of forward-mode AD is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
