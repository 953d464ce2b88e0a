"""A module whose state keeps its precision."""

from __future__ import annotations

import torch
from torch import nn


class ExactState(nn.Module):
    """A module whose floating buffers stay float32 or float64 when it is cast: in bfloat16 a moving average would not move."""

    def _apply(self, fn, recurse=True):
        exact = {name: b for name, b in self._buffers.items() if b is not None and b.is_floating_point()}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if after.dtype not in (torch.float32, torch.float64):
                setattr(self, name, before.to(after.device))
        return self
