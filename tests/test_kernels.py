"""The Triton kernels without a GPU: run in Triton's interpreter (kernels_interpreted.py), compiled for four GPUs
(kernels_compiled.py). Each in a process of its own: the interpreter must be chosen before triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
PARTS = {"interpreted": {"TRITON_INTERPRET": "1"}, "compiled": {}}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """Both started at once: part -> (process, file of its output). The compiler's cache lies in a new folder."""
    folder = tmp_path_factory.mktemp("kernels")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    out = {}
    for part, extra in PARTS.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", HERE / f"kernels_{part}.py"]
        env = kept | {"TRITON_CACHE_DIR": str(folder / part), "OMP_NUM_THREADS": "1"} | extra
        with open(folder / f"{part}.txt", "w") as file:
            process = subprocess.Popen(command, cwd=HERE.parent, env=env, stdout=file, stderr=subprocess.STDOUT)
        out[part] = process, Path(file.name)
    yield out
    for process, _ in out.values():
        process.kill()
        process.wait()


@TRITON
@pytest.mark.parametrize("part", PARTS)
def test_kernels(running, part):
    process, output = running[part]
    code = process.wait(timeout=280)
    text = output.read_text()
    assert code == 0, text[-6000:]
    assert " passed" in text and "skipped" not in text, text[-6000:]


def test_package_imports_without_triton():
    """absgd_fast.kernels does; its modules say what is missing."""
    code = """if True:
        import sys
        sys.modules["triton"] = None
        import absgd_fast.kernels
        try:
            import absgd_fast.kernels.losses
        except ImportError as error:
            assert "triton" in str(error), error
        else:
            raise AssertionError("imported without triton")
    """
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, check=True)
