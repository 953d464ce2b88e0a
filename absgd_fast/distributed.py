"""What the processes of a data-parallel training tell each other: the partial statistics of their samples, and what they were set up with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

AUTO = "auto"


def check(process_group) -> None:
    """TypeError for what can be no process group."""
    if process_group is None or (isinstance(process_group, str) and process_group == AUTO):
        return
    if dist.is_available() and isinstance(process_group, dist.ProcessGroup):
        return
    raise TypeError(
        f"process_group: got {process_group!r}, expected 'auto' (the default group, where there is one), None (this process by"
        " itself) or a torch.distributed.ProcessGroup"
    )


def ranks(process_group, before: int) -> int:
    """How many processes exchange their partial statistics; `before`: how many did the last time.

    Raises:
        RuntimeError: the group is gone, or this process is not in it.
    """
    if process_group is None:
        return 1
    running = dist.is_available() and dist.is_initialized()
    if process_group == AUTO:
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
        raise RuntimeError(f"process_group: the group {what}; expected one that it is in, 'auto', or None for this process alone")
    return size


def exchange(row: Tensor, process_group, count: int) -> Tensor:
    """(count, len(row)): the rows of all processes, by one all-gather. row (K) float64."""
    out = row.new_empty((count, row.numel()))
    group = None if process_group == AUTO else process_group
    try:
        dist.all_gather(list(out.unbind()), row, group=group)
    except RuntimeError as error:
        raise RuntimeError(
            f"ABLoss: the exchange of log s between {count} processes failed, and the state is as it was; a process ended, or"
            f" one made a forward pass in training mode that another did not (an empty batch takes part too): {error}"
        ) from error
    return out


def check_agreement(rows: Tensor, names: Sequence[str], show=str) -> None:
    """ValueError where a column differs between processes. rows (ranks, len(names)): what each was set up with."""
    differs = (rows.view(torch.int64) != rows[0].view(torch.int64)).any(0)
    if not differs.any():
        return
    column = int(differs.nonzero()[0])
    other = int((rows[:, column].view(torch.int64) != rows[0, column].view(torch.int64)).nonzero()[0])
    values = [show(names[column], float(rows[rank, column])) for rank in (0, other)]
    raise ValueError(
        f"ABLoss: the processes disagree on {names[column]}: rank 0 has {values[0]}, rank {other} has {values[1]}; construct and"
        " schedule the criterion alike on all of them (the state is as it was)"
    )
