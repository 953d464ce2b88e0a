"""A number on its way to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Arrival:
    """A copy of a number (one element) on the host, which the host need not wait for.

    On a GPU the copy is queued behind the work that makes the number.
    """

    def __init__(self, number: Tensor):
        self._host = number.detach()
        self._event: torch.cuda.Event | None = None
        if number.is_cuda:
            self._host = torch.empty(number.shape, dtype=number.dtype, device="cpu", pin_memory=True)
            with torch.cuda.device(number.device):  # the event belongs on this device's stream, whichever device is current
                self._host.copy_(number.detach(), non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()

    def is_there(self) -> bool:
        """Whether `value` would not wait."""
        return self._event is None or self._event.query()

    def value(self) -> float:
        """The number. On a GPU this waits until it has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._host)
