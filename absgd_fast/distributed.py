"""The exchange between the processes of a data-parallel training (docs/MATH.md §1.6).

The processes tell each other the partial statistics of their samples and the settings of their criteria.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

AUTO = "auto"


def check(process_group: object) -> None:
    """TypeError unless process_group is "auto", None or a `torch.distributed.ProcessGroup`."""
    if process_group is None or (isinstance(process_group, str) and process_group == AUTO):
        return
    if dist.is_available() and isinstance(process_group, dist.ProcessGroup):
        return
    raise TypeError(
        f"process_group: got {process_group!r}, expected 'auto' (the default group if torch.distributed is initialised), None"
        " (this process by itself) or a torch.distributed.ProcessGroup"
    )


def ranks(process_group: dist.ProcessGroup | str | None, before: int) -> int:
    """The number of processes that exchange their partial statistics.

    Args:
        process_group: a group, "auto" or None, as `check` admits it.
        before: what the last call returned. It tells a default group that has ended from one that was never there.

    Raises:
        RuntimeError: the group has been destroyed, or this process is not in it.
    """
    if process_group is None:
        return 1
    running = dist.is_available() and dist.is_initialized()
    if isinstance(process_group, str):
        if running:
            return dist.get_world_size()
        if before > 1:
            raise RuntimeError(
                f"process_group: the default process group, in which {before} processes shared one normaliser, is gone"
                " (destroy_process_group was called); set criterion.process_group = None to go on with this process alone"
            )
        return 1
    try:
        size = dist.get_world_size(process_group) if running else 0
        member = size > 0 and dist.get_rank(process_group) >= 0
    except (ValueError, RuntimeError):
        size, member = 0, False
    if not member:
        what = "does not contain this process" if size != 0 else "is gone (destroyed after it was given to ABLoss)"
        raise RuntimeError(
            f"process_group: the group {what}; expected a group that contains it, 'auto', or None for this process alone"
        )
    return size


def exchange(row: Tensor, process_group: dist.ProcessGroup | str | None, count: int) -> Tensor:
    """The rows of all processes, (count, K), by one all-gather.

    Args:
        row: (K) float64, the numbers of this process.
        process_group: as for `ranks`.
        count: the number of processes.

    Raises:
        RuntimeError: the all-gather failed.
    """
    out = row.new_empty((count, row.numel()))
    group = None if isinstance(process_group, str) else process_group
    try:
        dist.all_gather(list(out.unbind()), row, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"ABLoss: the exchange of log s between {count} processes failed; the state is as it was. Either a process ended, or"
            " one made a forward pass in training mode that another did not. A process without samples must call forward with an"
            f" empty batch. The error was: {error}"
        ) from error
    return out


def add_up(x: Tensor, process_group: dist.ProcessGroup | str | None, count: int, name: str) -> None:
    """Replace x by its sum over all processes.

    Args:
        x: of the same shape on all of them.
        process_group: as for `ranks`.
        count: the number of processes.
        name: what the last dimension of x is, for the error.

    Raises:
        ValueError: the last dimension differs. Every process raises it, and x is as it was.
    """
    group = None if isinstance(process_group, str) else process_group
    size = torch.tensor([x.shape[-1]], dtype=torch.int64, device=x.device)
    sizes = size.new_empty((count, 1))
    dist.all_gather(list(sizes.unbind()), size, group=group)
    if bool((sizes != size).any()):
        raise ValueError(f"{name}: got {sizes.flatten().tolist()} on the processes, expected the same number on all of them")
    dist.all_reduce(x, group=group)


def check_agreement(rows: Tensor, names: Sequence[str], show: Callable[[str, float], str]) -> None:
    """ValueError if a setting differs between the processes.

    Args:
        rows: (processes, len(names)) float64, the settings of each process.
        names: the names of the settings.
        show: makes the text of a setting from its name and its number.
    """
    differs = (rows.view(torch.int64) != rows[0].view(torch.int64)).any(0)
    if not differs.any():
        return
    column = int(differs.nonzero()[0])
    other = int((rows[:, column].view(torch.int64) != rows[0, column].view(torch.int64)).nonzero()[0])
    values = [show(names[column], float(rows[rank, column])) for rank in (0, other)]
    raise ValueError(
        f"ABLoss: the processes disagree on {names[column]}: rank 0 has {values[0]}, rank {other} has {values[1]}; construct,"
        " schedule and load the criterion in the same way on all of them (the state is as it was)"
    )
