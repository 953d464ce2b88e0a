"""Two processes that talk through gloo."""

import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")


def _process(rank, body, args, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
        dist.barrier()  # one that is done early would take the meeting place away
        body(rank, *args)
        dist.barrier()  # nor does one leave while the other still talks
        dist.destroy_process_group()
    except Exception:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # the other rank may wait for this one for ever
    # Not through the end of the interpreter, where torch's threads may still run: seen once, "terminate called".
    os._exit(0)


def run(body, tmp_path, *args):
    """body(rank, *args) in two processes; what one of them raises fails the test."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=_process, args=(rank, body, args, tmp_path)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        process.kill()
    errors = [path.read_text() for path in sorted(tmp_path.glob("error-*"))]
    assert not errors, "\n".join(errors)
    assert not alive, f"still running after two minutes: {alive}"
    assert [process.exitcode for process in ranks] == [0] * RANKS
