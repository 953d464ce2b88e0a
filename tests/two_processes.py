"""Two processes that talk through gloo: run(), in which a function meets itself, and torchrun(), which starts a program."""

import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).resolve().parent.parent
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


# At a free port. Without an address torchrun asks for the full name of the machine, and its processes for the address of that
# name; where nothing answers these questions, such as in a sandbox without a network, they wait for minutes.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]


def torchrun(arguments, folder):
    """`torchrun --nproc-per-node 2 ARGUMENTS...` in `folder`, as a CompletedProcess with its output as text."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [*TORCHRUN, "--nproc-per-node", str(RANKS), *arguments]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes) as started:
        try:
            out, err = started.communicate(timeout=200)  # less than a test may take
        except subprocess.TimeoutExpired:
            started.terminate()  # so that it ends its processes too; killed, it would leave them running
            out, err = started.communicate(timeout=60)
            pytest.fail(f"still running after 200 seconds: {command}\n{out}\n{err}")
        finally:
            started.kill()  # if it still runs: leaving the block waits for it
    return subprocess.CompletedProcess(command, started.returncode, out, err)
