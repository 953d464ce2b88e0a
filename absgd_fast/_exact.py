"""A module whose state keeps its precision when the module is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self


class ExactState(nn.Module):
    """A module whose floating buffers stay float32 or float64 under `.half()`, `.bfloat16()` and `.to(dtype)`.

    In bfloat16 a moving average would not move: its changes are smaller than the rounding.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after is not None and after.dtype not in (torch.float32, torch.float64):
                setattr(self, name, before.to(after.device))
        return self
