"""The CUDA kernels and operators, executed on the CPU (tests/simt): the package with `_ops_cuda` in place of `_ops_cpu` runs the
tests that every backend passes, and cuda_on_cpu/suite.py, in several orders of threads and blocks, under the sanitizers, and
under a checker of races."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from simt import build as simt

from absgd_fast import _backend

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# test_*.py
FILES = ("losses", "functional", "inputs", "rectified", "robust", "linear", "state", "recomputation", "optim_*", "ops")

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=simt.why_not() or "")

EVERYTHING = [TESTS / "cuda_on_cpu" / "suite.py", *(path for name in FILES for path in sorted(TESTS.glob(f"test_{name}.py")))]
NO_LIMIT = (
    "test_optim_",
    "test_linear",
    "test_rectified",
    "test_functional",
)  # their names begin so; they go the same way at every limit
LOSSES = [path for path in EVERYTHING if not path.stem.startswith(NO_LIMIT)]
SUITE = [TESTS / "cuda_on_cpu" / "suite.py"]
# Rows that hold every pair of values, without two kinds of tests that "one block" has for all: checkers keep a record of the
# accesses, so the memory of the process grows; and torch.compile takes a quarter of the time, in Python above the operators.
QUICK = ("-m", "not deep and not long", "-k", "not growth and not compil")
MORE = ("-m", "deep and not long", *QUICK[2:])
# name: (kind of build, order, limit of the one-block kernel, what to run). The first two are those of `make test`: the fewest
# builds that show races, uninitialised and misaligned accesses, and accesses out of bounds; each has one of the two limits.
# The others have the rest of the rows without a checker, and the rest of the checkers with the rows of QUICK.
RUNS = {
    "quick race, one block": ("race", "random:1", 512, [*QUICK, *EVERYTHING]),
    "quick bounds": ("bounds", "random:2", 0, [*QUICK, *LOSSES]),
    "statistics": ("plain", "forward", 0, [*MORE, *LOSSES]),
    "one block": ("plain", "random:1", 512, EVERYTHING),
    "address": ("address", "random:2", 0, [*QUICK, *SUITE]),
    "race": ("race", "random:3", 0, [*QUICK, *SUITE]),
    # minutes each: for `make sanitize`
    "address, one block": ("address", "forward", 512, [*SUITE, TESTS / "test_robust.py"]),
    "race, one block": ("race", "random:4", 512, SUITE),
}
LONG = ("address, one block", "race, one block")


def package(folder, kind):
    """A copy of the package whose CPU operators are the CUDA operators on fibers."""
    target = folder / kind / "absgd_fast"
    ignore = shutil.ignore_patterns("_ops_*.so", "__pycache__")
    shutil.copytree(Path(_backend.__file__).parent, target, ignore=ignore)
    torch_root = Path(torch.__path__[0])
    simt.build(
        sorted((ROOT / "csrc" / "cuda").glob("*.cu")),
        target / "_ops_cpu.so",
        kind,
        include_dirs=[ROOT / "csrc"],
        extra_flags=[
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-DABSGD_DISPATCH_KEY=CPU",
            "-isystem",
            torch_root / "include",
            f"-L{torch_root / 'lib'}",
            "-ltorch_cpu",
        ],
        extra_sources=[ROOT / "csrc" / "ops_cuda.cpp", TESTS / "cuda_on_cpu" / "tools.cpp"],
    )
    return target.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory, request):
    """name -> the finished process, of the runs that were asked for. Built and run side by side, because most of them use one
    core."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    asked = [
        i.callspec.params["name"] for i in request.session.items if getattr(i, "originalname", "") == "test_kernels_on_the_cpu"
    ]
    packages = {kind: package(folder, kind) for kind in {RUNS[name][0] for name in asked}}

    def run(name):
        kind, order, limit, files = RUNS[name]
        environment = os.environ | simt.environment(kind) | {"SIMT_ORDER": order, "SIMT_LIMIT": str(limit)}
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (packages[kind], TESTS, TESTS / "cuda_on_cpu")))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "plugin", "--rootdir", TESTS, *files]
        return subprocess.run([*map(str, command)], cwd=packages[kind], env=environment, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(asked, pool.map(run, asked)))


def marks(name):
    return [] if name.startswith("quick") else [pytest.mark.long if name in LONG else pytest.mark.deep]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in RUNS])
@pytest.mark.timeout(2700)  # the builds take 20 minutes on a slow machine with two cores
def test_kernels_on_the_cpu(results, name):
    done = results[name]
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert "passed" in done.stdout
