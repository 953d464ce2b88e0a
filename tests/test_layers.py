"""Who may import whom (DESIGN.md), environment variables, machine paths, and the examples in the docstrings."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

import absgd_fast as ab

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, CSRC = ROOT / "absgd_fast", ROOT / "csrc"

# lowest first: a module may import those of lower layers only; kernels is a package, whose files may import each other
LAYERS = [
    {"reference", "_backend", "kernels"},
    {"_checks"},
    {"ops"},
    {"functional"},
    {"losses", "weights", "distributed"},
    {"robust"},
    {"optim", "schedule", "meta", "linear"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TOP = {"compat", "experiments", "__main__"}  # may import anything; nothing else imports them

MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))
SOURCES = sorted(p.relative_to(CSRC) for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def own_imports(path):
    """Top-level names inside absgd_fast that a module imports, anywhere in it."""
    package = ("absgd_fast", *path.parent.parts)
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found |= {t[1] for t in targets if t[0] == "absgd_fast" and len(t) > 1}
    return found


def own_includes(path):
    """(quoted or bracketed, name) of each #include."""
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', (CSRC / path).read_text(), re.M)


def test_there_is_something_to_check():
    names = {str(p) for p in MODULES} | {str(p) for p in SOURCES}
    assert {"reference.py", "_backend.py", "ops.py", "functional.py", "losses.py", "robust.py", "optim.py"} <= names
    assert {"math.h", "launch.h", "ops_cpu.cpp", "host.cpp"} <= names


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_python_imports(path):
    module = path.parts[0].removesuffix(".py")
    imports = own_imports(path)
    if module in TOP:
        return
    if module == "__init__":  # the public face: everything but what stands on top of it
        assert not imports & TOP
        return
    assert module in LEVEL, f"{path}: give {module} a layer in DESIGN.md and here"
    higher = {n for n in imports if n in TOP or (LEVEL.get(n, -1) >= LEVEL[module] and not n == module == "kernels")}
    assert not higher, f"{path} imports {sorted(higher)} of its own or a higher layer"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_includes(path):
    ours = {p.name for p in SOURCES}
    names = {name.rsplit("/", 1)[-1] for bracket, name in own_includes(path) if name.rsplit("/", 1)[-1] in ours}
    outside = {name for _, name in own_includes(path) if name.rsplit("/", 1)[-1] not in ours}
    standard = {n for n in outside if re.fullmatch(r"[a-z_0-9]+(\.h)?", n)}
    torch = {n for n in outside if n.startswith(("torch/", "ATen/", "c10/"))}
    folder = path.parent.name
    if path.name == "math.h":
        assert not names and outside == standard
    elif path.name == "launch.h":
        assert names == {"math.h"} and outside == standard
    elif folder in {"cpu", "cuda"}:
        assert names <= {"math.h", "launch.h"} | {p.name for p in SOURCES if p.parent.name == folder}
        assert not torch
        assert outside - standard <= ({"cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h"} if folder == "cuda" else set())
    elif path.name == "ops_common.h":
        assert names == {"launch.h"} and torch
    elif path.name.startswith("ops_"):
        assert names == {"ops_common.h", *["torch_stream.h"] * (path.name == "ops_cuda.cpp")}
    elif path.name == "torch_stream.h":  # torch's symbol by its name, at run time
        assert not names and outside == standard
    else:  # host.cpp: pybind11, and no torch
        assert not torch and names <= {"launch.h"}


def test_one_reader_of_environment_variables():
    """_backend.py, so that what a run depends on can be read in one place."""
    reading = re.compile(r"\b(getenv|environb?)\b")
    readers = {str(p) for p in MODULES if reading.search((PACKAGE / p).read_text())}
    assert readers == {"_backend.py"}
    assert not {str(p) for p in SOURCES if reading.search((CSRC / p).read_text())}


def test_no_machine_paths():
    """Nothing depends on where somebody's checkout, home or compiler lies."""
    absolute = re.compile(r"""["'\s=(:](/(?:home|root|Users|work|tmp|opt|mnt|usr)/)""")
    others = [ROOT / n for n in ("setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "MANIFEST.in", ".ci/run")]
    files = [PACKAGE / p for p in MODULES] + [CSRC / p for p in SOURCES] + [*(ROOT / "benchmarks").glob("*.py")]
    files += [p for p in others if p.exists()]
    assert {str(p.relative_to(ROOT)) for p in files if absolute.search(p.read_text())} == set()


@pytest.mark.parametrize(
    "name",
    ["functional", "losses", "robust", "linear", "schedule", "optim", "reference", "weights", "meta", "experiments.methods"],
)
def test_docstring_examples(name):
    """Each public module shows how it is used, and the examples run."""
    result = doctest.testmod(importlib.import_module(f"absgd_fast.{name}"))
    assert result.attempted > 0 and result.failed == 0


PUBLIC = [o for o in vars(ab).values() if getattr(o, "__module__", "").startswith("absgd_fast.")]
PUBLIC += [ab.weights.term, ab.weights.cvar, ab.weights.chi2, ab.weights.GroupDRO, ab.meta.l2rw_weights, ab.meta.l2rw_loss]
PUBLIC += [ab.functional.logit_loss, ab.functional.robust_weights, ab.functional.weighted_momentum_step_]


@pytest.mark.parametrize("item", PUBLIC, ids=lambda o: o.__name__)
def test_everything_public_shows_an_example(item):
    assert ">>>" in (item.__doc__ or "")
