"""Modes of torch that belong to a thread, and so to all trainings that take turns in it."""

from __future__ import annotations

import torch


class GradMode:
    """A context in which the grad mode is what it was at the end of the last one; leaving it puts the outer mode back.

    A training that is paused inside `with torch.no_grad()` leaves the others alone so.

    >>> mode = GradMode()
    >>> with mode:
    ...     _ = torch.set_grad_enabled(False)
    >>> torch.is_grad_enabled()
    True
    >>> with mode:
    ...     torch.is_grad_enabled()
    False
    """

    def __init__(self) -> None:
        self._inside: bool | None = None

    def __enter__(self) -> GradMode:
        self._outside = torch.is_grad_enabled()
        if self._inside is not None:
            torch.set_grad_enabled(self._inside)
        return self

    def __exit__(self, *_: object) -> None:
        self._inside = torch.is_grad_enabled()
        torch.set_grad_enabled(self._outside)


def shared() -> dict[str, bool]:
    """The modes that cannot be given back to one training: {the way they are written: whether they are on}.

    torch has no setter of inference mode. Autocast keeps casts of weights until the outermost block ends, which is that of the
    paused training, so the others would go on with casts of old weights.
    """
    gpu = torch.accelerator.current_accelerator()
    autocast = any(torch.is_autocast_enabled(device) for device in ("cpu", *([] if gpu is None else [gpu.type])))
    return {"torch.inference_mode()": torch.is_inference_mode_enabled(), "torch.autocast(...)": autocast}
