"""The build: what it leaves, and that an installation without a compiler works and says why it is slow."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from absgd_fast import _backend

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(_backend.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("_*.so"))
STABLE = [library for library in LIBRARIES if not library.name.startswith("_eager.")]  # this one serves the torch of the build


def test_native_kernels_are_here():
    """`make test` is about the kernels: without them it must not pass."""
    info = _backend.build_info()
    assert info["native"], info["reason"]
    assert _backend.why_not("cpu") is None
    assert info["compiler"] and info["torch"] and info["isas"][0] == "baseline"
    if platform.machine() == "x86_64":
        assert info["isas"] == ["baseline", "avx2", "avx512"]
    assert info["host"] or "Python.h" in info["reason"] or "pybind11" in info["reason"]
    assert (_backend.host() is not None) == info["host"]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name.split(".")[0])
def test_no_path_of_the_building_machine(library):
    contents = library.read_bytes()
    for path in (ROOT, Path(torch.__file__).parent, Path(sys.prefix)):
        assert os.fsencode(path) not in contents


@pytest.mark.parametrize("library", STABLE, ids=lambda p: p.name.split(".")[0])
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
def test_only_the_stable_abi_is_used(library):
    """A symbol of c10::, at:: or torch:: would tie the library to one version of torch."""
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in symbols.splitlines()]
    assert names and not [name for name in names if any(space in name for space in ("3c10", "2at", "5torch"))]


# ---- installing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """A copy of the source tree without anything built."""
    tree = tmp_path / "source"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    (tree / "README.md").touch()
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copytree(
        ROOT / "absgd_fast", tree / "absgd_fast", ignore=shutil.ignore_patterns("_*.so", "_build_info.json", "__pycache__")
    )
    return tree


def install(source, target, **environment):
    pytest.importorskip("setuptools")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        source,
    ]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def run(target, code):
    """Standard output and error of `code` with the package in `target`."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=target, env=os.environ | {"PYTHONPATH": str(target)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_without_a_compiler(source, tmp_path):
    """pip succeeds; the package runs in plain torch, says so once, and doctor knows why."""
    done = install(source, tmp_path / "target", CXX=shutil.which("false"))
    assert done.returncode == 0, done.stdout + done.stderr
    installed = tmp_path / "target" / "absgd_fast"
    assert not list(installed.glob("_*.so")) and (installed / "py.typed").exists()
    info = json.loads((installed / "_build_info.json").read_text())
    assert not info["native"] and not info["host"] and "compiler" in info["reason"]
    out, err = run(
        tmp_path / "target",
        "import torch, absgd_fast as ab\n"
        "from absgd_fast import _backend\n"
        "x = torch.zeros(4, 3, requires_grad=True)\n"
        "optimizer = ab.ABSGD([x], lr=0.1)\n"
        "for _ in range(3):\n"
        "    ab.ABLoss(lam=1.0)(x, torch.arange(4) % 3).backward()\n"
        "    optimizer.step()\n"
        "print(ab.__file__, x.abs().sum().item() > 0)\n"
        "print(_backend.why_not('cpu'))\n",
    )
    assert str(installed) in out and "True" in out and info["reason"] in out
    assert err.count("RuntimeWarning") == 1 and info["reason"] in err


def test_required_kernels(source, tmp_path):
    """make test sets this, so that a broken build cannot pass as a slow one."""
    done = install(source, tmp_path / "target", CXX=shutil.which("false"), ABSGD_FAST_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "the kernels could not be built" in done.stdout + done.stderr


def test_a_failed_build_leaves_no_old_library(source, tmp_path):
    """An editable install builds into the source tree, where the libraries of an earlier build may lie."""
    stale = source / "absgd_fast" / "_ops_cpu.so"
    stale.write_bytes(b"old")
    environment = os.environ | {"CXX": shutil.which("false")}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not stale.exists() and (source / "absgd_fast" / "_build_info.json").exists()
