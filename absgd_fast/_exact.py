"""ExactState: a module with state that is saved and moved as buffers are, but never cast to half, averaged or broadcast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from . import _hooks

if TYPE_CHECKING:
    from typing_extensions import Self

EXACT = (torch.float32, torch.float64)


def exact_dtype() -> torch.dtype:
    """The dtype of new state: float64 if that is torch's default dtype, else float32."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


class Changes:
    """How often an attribute of an `ExactState` was set, of whichever. While it stays, none of them has changed."""

    count = 0


CHANGES = Changes()


class ExactState(nn.Module):
    """A module whose state tensors are plain attributes, and buffers only while torch moves, saves or loads the module.

    Frameworks average all buffers of a model, and DDP broadcasts them. But the average of two values of log s, or of an infinite
    and a finite lambda, is the state of no training. And in bfloat16 a moving average does not move, because its changes are
    smaller than the rounding. So nothing finds these tensors among the buffers. They stay float32 or float64 under `.half()`,
    `.bfloat16()` and `.to(dtype)`, and the state_dict holds clones of them.

    A move keeps the values of the state and of the buffers: `to_empty` too, unless they come from the meta device, which has no
    values. Then `reset_parameters` gives them those of the constructor.
    """

    STATE: ClassVar[tuple[str, ...]] = ()  # the names of the state tensors

    def __setattr__(self, name: str, value: Any) -> None:
        CHANGES.count += 1
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        CHANGES.count += 1
        super().__delattr__(name)

    def reset_parameters(self) -> None:
        """Give the state and the buffers the values that they have after the constructor."""
        raise NotImplementedError

    def also_changed(self) -> list[tuple[object, str, Any]]:
        """What a forward may change besides tensors, as it is now: (owner, attribute, value)."""
        return []

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        """Let nn.Module see the state tensors among its buffers."""
        self._buffers.update({name: vars(self)[name] for name in self.STATE})
        try:
            yield
        finally:
            for name in self.STATE:
                vars(self)[name] = self._buffers.pop(name)
            CHANGES.count += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        lost = False
        with self._as_buffers():
            before = {name: b for name, b in self._buffers.items() if b is not None}
            super()._apply(fn, recurse)
            for name, old in before.items():
                new = self._buffers[name]
                if new is None or new is old:
                    continue
                if name in self.STATE and new.dtype not in EXACT:
                    self._buffers[name] = new = torch.empty_like(old, device=new.device)
                if old.is_meta:
                    lost = lost or not new.is_meta
                else:
                    new.detach().copy_(old.detach())
        if lost:
            self.reset_parameters()
        return self

    def follow_buffers(self, device: torch.device) -> None:
        """Bring the state to `device` if the buffers are there. FSDP and DataParallel move buffers without `_apply`."""
        if not any(b is not None and b.device == device for b in self._buffers.values()):
            return
        before = {name: getattr(self, name) for name in self.STATE}
        for name, old in before.items():
            setattr(self, name, torch.empty_like(old, device=device) if old.is_meta else old.to(device))
        if any(old.is_meta for old in before.values()):
            self.reset_parameters()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with self._as_buffers():
            super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.STATE:
            destination[prefix + name] = destination[prefix + name].clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch calls the pre-hooks in the innermost `_load_from_state_dict`. But they may change everything that is loaded, so
        # here they come before all that the classes do with the state_dict.
        for hook in list(self._load_state_dict_pre_hooks.values()):
            hook(state_dict, prefix, *args)
        with _hooks.aside(self, "_load_state_dict_pre_hooks"):
            self._load_what_hooks_left(state_dict, prefix, *args)

    def _load_what_hooks_left(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """`_load_from_state_dict`, with the same arguments, once the pre-hooks have run."""
        with self._as_buffers():
            super()._load_from_state_dict(state_dict, prefix, *args)
        for name in self.STATE:  # load_state_dict(assign=True) takes over tensors of any dtype
            if getattr(self, name).dtype not in EXACT:
                setattr(self, name, getattr(self, name).float())


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state tensors of a module and of all its submodules, by their names in the state_dict."""
    return {
        f"{path}.{name}" if path else name: getattr(m, name)
        for path, m in module.named_modules()
        if isinstance(m, ExactState)
        for name in m.STATE
    }
