"""The Triton kernels without a GPU: run in Triton's interpreter (kernels_interpreted_*.py), compiled for four GPUs
(kernels_compiled.py). Each in a process of its own: the interpreter must be chosen before triton is imported."""

import os
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = {"interpreted": {"TRITON_INTERPRET": "1"}, "compiled": {}}
# name: (kind, which of its tests). `make test` has two of them, `make test-deep` the other two.
PARTS = {f"{kind}{deep}": (kind, marks) for kind in KINDS for deep, marks in (("", "not deep"), (", deep", "deep"))}


def why_not_interpreted(triton: str, numpy: str) -> str | None:
    """Before Triton 3.7 an index in the interpreter is int() of an array of one dimension, which numpy 2.4 made an error."""

    def number(version):
        return tuple(int(part) for part in version.split(".")[:2])

    if number(triton) >= (3, 7) or number(numpy) < (2, 4):
        return None
    return f"the interpreter of triton {triton} needs numpy < 2.4, this is {numpy}: pip install 'numpy<2.4'"


def why_not(part: str) -> str | None:
    if util.find_spec("triton") is None:
        return "triton is not installed"
    return why_not_interpreted(metadata.version("triton"), metadata.version("numpy")) if PARTS[part][0] == "interpreted" else None


@pytest.fixture(scope="module")
def running(tmp_path_factory, request):
    """Those that were asked for, started at once: part -> (process, file of its output). The compiler's cache is a new folder."""
    folder = tmp_path_factory.mktemp("kernels")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PYTEST_"))}
    out = {}
    tests = [item for item in request.session.items if getattr(item, "originalname", "") == "test_kernels"]
    for part in [test.callspec.params["part"] for test in tests]:
        kind, which = PARTS[part]
        if why_not(part) is not None:
            continue
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            "-m",
            which,
            *sorted(HERE.glob(f"kernels_{kind}*.py")),
        ]
        env = kept | {"TRITON_CACHE_DIR": str(folder / part), "OMP_NUM_THREADS": "1"} | KINDS[kind]
        with open(folder / f"{part}.txt", "w") as file:
            process = subprocess.Popen(command, cwd=HERE.parent, env=env, stdout=file, stderr=subprocess.STDOUT)
        out[part] = process, Path(file.name)
    yield out
    for process, _ in out.values():
        process.kill()
        process.wait()


def marks(part):
    reason = why_not(part)
    return [pytest.mark.skipif(reason is not None, reason=str(reason)), *([pytest.mark.deep] if PARTS[part][1] == "deep" else [])]


@pytest.mark.parametrize("part", [pytest.param(part, marks=marks(part)) for part in PARTS])
@pytest.mark.timeout(1200)
def test_kernels(running, part):
    process, output = running[part]
    code = process.wait(timeout=1100)
    text = output.read_text()
    assert code == 0, text[-6000:]
    assert " passed" in text and "skipped" not in text, text[-6000:]


@pytest.mark.parametrize(
    "triton, numpy, runs",
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.5.1", "2.10.0", False), ("3.7.0", "2.5.5", True)],
)
def test_which_numpy_the_interpreter_needs(triton, numpy, runs):
    assert (why_not_interpreted(triton, numpy) is None) == runs


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
