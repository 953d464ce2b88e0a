"""The machine instructions of one forward and backward of small batches, which repeat exactly where times do not.

    python -m benchmarks.instructions [--out FILE.json]

Valgrind's callgrind counts them, so it must be installed (Debian: `apt-get install valgrind`); four minutes. Valgrind knows no
AVX-512, so the kernels are those of AVX2. The counts hold for one Python, torch, compiler and instruction set, which the JSON
names: {"made with": {...}, "instructions": {case: {competitor: instructions per call}}}. tests/test_instructions.py compares a
new count with the committed one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

import absgd_fast as ab
from absgd_fast import _backend

RECORD = Path(__file__).parent / "results" / "instructions.json"
CALLS = 100
# name -> rows, classes, whether the logits are computed (a leaf otherwise)
CASES = {
    "1 x 2": (1, 2, False),
    "128 x 10": (128, 10, False),
    "128 x 10, of a model": (128, 10, True),
    "128 x 100": (128, 100, False),
}
PEERS = {"absgd_fast": lambda: ab.ABLoss(lam=-1.0), "cross_entropy": lambda: F.cross_entropy}
# Steps of 161 tensors of 4 numbers.
STEPS = {
    "absgd_fast": lambda params: ab.ABSGD(params, lr=0.1, momentum=0.9),
    "SGD fused": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
}
STEP = "step of 161 tensors of 4"


def why_not() -> str | None:
    """None if instructions can be counted here, otherwise the reason."""
    missing = [name for name in ("valgrind", "callgrind_control") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found; install valgrind" if missing else None


def made_with() -> dict:
    """What the counts depend on."""
    info = _backend.build_info()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "compiler": info["compiler"],
        "machine": platform.machine(),
        "eager module": _backend.why_not_eager() is None,
    }


def call_of(case: str, peer: str):
    """The call that is counted."""
    torch.manual_seed(0)
    if case == STEP:
        params = [torch.nn.Parameter(torch.randn(4)) for _ in range(161)]
        for p in params:
            p.grad = torch.randn(4)
        return STEPS[peer](params).step
    rows, classes, computed = CASES[case]
    leaf, target = torch.randn(rows, classes).requires_grad_(), torch.randint(0, classes, (rows,))
    criterion = PEERS[peer]()

    def run():
        leaf.grad = None
        criterion(leaf * 1 if computed else leaf, target).backward()

    return run


def count_here(case: str, peer: str) -> None:
    """Makes the calls, of which callgrind counts the last ones. This process runs under it."""
    torch.set_num_threads(1)
    run = call_of(case, peer)
    for _ in range(50):
        run()
    gc.collect()
    gc.disable()
    subprocess.run(["callgrind_control", "-i", "on", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)
    run()
    torch._C._valgrind_toggle()
    for _ in range(CALLS):
        run()
    torch._C._valgrind_toggle()


def count(case: str, peer: str) -> int:
    """The instructions of one call, in a process of its own. RuntimeError if callgrind says nothing."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                "--instr-atstart=no",
                "--collect-atstart=no",
                f"--callgrind-out-file={folder}/out",
                *(sys.executable, "-m", "benchmarks.instructions", "--count", case, peer),
            ],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
        )
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or found is None:
        raise RuntimeError(f"callgrind counted nothing for {case}, {peer}: {done.stderr[-500:]}")
    return round(int(found[1]) / CALLS)


def main(argv: list[str] | None = None) -> int:
    """Counts all cases and writes them down."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE.json", type=Path, default=RECORD, help="default: the committed record")
    parser.add_argument("--count", nargs=2, metavar=("CASE", "PEER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.count:
        count_here(*arguments.count)
        return 0
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    asked = [(case, peer) for case in CASES for peer in PEERS] + [(STEP, peer) for peer in STEPS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # counts do not depend on what else runs
        found = dict(zip(asked, pool.map(lambda pair: count(*pair), asked), strict=True))
    counts = {case: {peer: n for (c, peer), n in found.items() if c == case} for case in (*CASES, STEP)}
    for case, of_peers in counts.items():
        (ours, theirs), (_, competitor) = of_peers.values(), of_peers
        print(f"{case}: {ours:,} instructions, {ours / theirs:.2f} of {competitor}")
    arguments.out.write_text(json.dumps({"made with": made_with(), "instructions": counts}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
