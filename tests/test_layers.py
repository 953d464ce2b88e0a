"""Who may import whom (DESIGN.md), environment variables, machine paths, and the examples in the docstrings."""

import ast
import doctest
import importlib
import math
import re
from pathlib import Path

import pytest
import torch

import absgd_fast as ab

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, CSRC = ROOT / "absgd_fast", ROOT / "csrc"

# lowest first: a module may import those of lower layers only; the files of one package may import each other, without a circle
LAYERS = [
    {"_codes", "_hooks", "_numbers", "_compiled"},
    {"_backend", "_checkpointing", "_tangents"},
    {"_exact"},
    {"_scheduled"},
    {"reference"},
    {"kernels", "_checks"},
    {"ops"},
    {"functional"},
    {"class_weights", "losses", "weights", "distributed"},
    {"robust"},
    {"audit", "optim", "schedule", "meta", "linear"},
    {"language_models", "selection"},
    {"integrations"},
]
PACKAGES = {"kernels", "optim"}
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TOP = {"compat", "experiments", "commands", "selftest", "__main__"}  # may import anything; nothing else imports them
# Of each module of integrations/: the packages of others that it imports. Nothing else in absgd_fast imports these.
FRAMEWORKS = {
    "accelerate": {"accelerate"},
    "lightning": {"lightning"},
    "transformers": {"accelerate", "peft", "transformers", "trl"},
}

MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))
SOURCES = sorted(p.relative_to(CSRC) for p in CSRC.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def imported(path, for_types=True):
    """Dotted names inside absgd_fast that a module imports, anywhere in it, each as a list of its parts.

    for_types: whether imports under `if TYPE_CHECKING:` count, which never run."""
    package, tree = ("absgd_fast", *path.parent.parts), ast.parse((PACKAGE / path).read_text())
    if not for_types:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        found += [t[1:] for t in targets if t[0] == "absgd_fast" and len(t) > 1]
    return found


def foreign_imports(path):
    """Top-level names of the packages of others that a module imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse((PACKAGE / path).read_text())))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0}
    return {name.split(".")[0] for name in found}


def own_imports(path):
    """Top-level names inside absgd_fast that a module imports."""
    return {name for name, *_ in imported(path)}


def imported_files(path):
    """The files of absgd_fast that a module imports when it runs. A name from a package is the file of that name, else what the
    package's __init__.py has."""
    found = set()
    for parts in imported(path, for_types=False):
        for end in range(len(parts), 0, -1):
            module = Path(*parts[:end])
            file = next((f for f in (module.with_suffix(".py"), module / "__init__.py") if f in MODULES), None)
            if file is not None:
                found.add(file)
                break
    return found - {path}


def own_includes(path):
    """(quoted or bracketed, name) of each #include."""
    return re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', (CSRC / path).read_text(), re.MULTILINE)


def test_there_is_something_to_check():
    names = {str(p) for p in MODULES} | {str(p) for p in SOURCES}
    assert {
        "_backend.py",
        "reference/weights.py",
        "ops/schemas.py",
        "functional.py",
        "losses.py",
        "robust/loss.py",
        "optim/base.py",
    } <= names
    assert {"math/losses.h", "launch.h", "cpu/losses.cpp", "ops/losses.h", "ops_cpu.cpp", "host.cpp"} <= names


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_python_imports(path):
    module = path.parts[0].removesuffix(".py")
    imports = own_imports(path)
    if module in TOP:
        return
    if module == "__init__":  # the public face: everything but what stands on top of it
        assert not imports & {*TOP, "integrations"}
        return
    assert module in LEVEL, f"{path}: give {module} a layer in DESIGN.md and here"
    higher = {n for n in imports if n in TOP or (LEVEL.get(n, -1) >= LEVEL[module] and n != module)}
    assert not higher, f"{path} imports {sorted(higher)} of its own or a higher layer"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_frameworks_are_imported_by_their_integration_only(path):
    frameworks = set().union(*FRAMEWORKS.values())
    allowed = FRAMEWORKS.get(path.stem, set()) if path.parts[0] == "integrations" else set()
    assert foreign_imports(path) & frameworks <= allowed


def test_no_import_circle():
    """Neither between packages nor between the files of one."""
    left = {path: imported_files(path) for path in MODULES}
    while done := {path for path, files in left.items() if not files & left.keys()}:
        left = {path: files for path, files in left.items() if path not in done}
    assert not left, f"these import each other in a circle, or what does: {sorted(map(str, left))}"


# file or folder of csrc -> what it may include of ours (a folder's files may include each other); the first that fits counts
INCLUDES = {
    "math": set(),
    "math.h": {"math"},
    "launch.h": {"math.h"},
    "torch_stream.h": set(),  # torch's symbol by its name, at run time
    "cpu": {"launch.h"},
    "cuda": {"launch.h"},
    "ops/cpu": {"ops", "cpu/kernels.h"},
    "ops/cuda": {"ops_common.h", "torch_stream.h"},
    "ops": {"launch.h"},
    "ops_common.h": {"ops"},
    "ops_cpu.cpp": {"ops", "ops/cpu"},
    "ops_cuda.cpp": {"ops_common.h", "ops/cuda"},
    "host": {"launch.h"},
    "host.cpp": {"host", "launch.h"},
    "eager": {"host"},
    "eager.cpp": {"eager", "ops/cpu"},
}
# and of others, beside the standard library
OUTSIDE = {
    "cuda": r"cuda_runtime\.h|cuda_fp16\.h|cuda_bf16\.h",
    "ops": r"torch/.+|sys/mman\.h",
    "ops/cpu": r"torch/.+|sys/mman\.h",
    "ops/cuda": r"torch/.+",
    "host": r"pybind11/.+",
    "host.cpp": r"pybind11/.+",
    "eager": r"(torch|ATen|c10)/.+",
    "eager.cpp": r"(torch|ATen)/.+",
}


def is_in(path, places):
    """Whether a file of csrc is one of the places, or lies directly in one of them."""
    return path.as_posix() in places or path.parent.as_posix() in places


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_includes(path):
    home = next((place for place in INCLUDES if is_in(path, {place})), None)
    assert home, f"csrc/{path}: give it a layer in DESIGN.md and here"
    for bracket, name in own_includes(path):
        if bracket == "<":
            assert re.fullmatch(rf"[a-z_0-9]+(\.h)?|{OUTSIDE.get(home, '(?!)')}", name), f"{path} includes <{name}>"
            continue
        found = [f.resolve() for f in ((CSRC / path).parent / name, CSRC / name) if f.exists()]
        assert found, f"{path} includes {name}, which is not ours"
        included = found[0].relative_to(CSRC.resolve())
        assert included.parent == path.parent != Path() or is_in(included, INCLUDES[home]), f"{path} includes {included}"


def test_one_reader_of_environment_variables():
    """_backend.py, so that what a run depends on can be read in one place."""
    reading = re.compile(r"\b(getenv|environb?)\b")
    readers = {str(p) for p in MODULES if reading.search((PACKAGE / p).read_text())}
    assert readers == {"_backend.py"}
    assert not {str(p) for p in SOURCES if reading.search((CSRC / p).read_text())}


def test_no_machine_paths():
    """Nothing depends on where somebody's checkout, home or compiler lies. (Shared data lies where the XDG standard says.)"""
    absolute = re.compile(r"""["'\s=(:](/(?:home|root|Users|work|tmp|opt|mnt|usr(?!/(?:local/)?share\b))/)""")
    others = [ROOT / n for n in ("setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "MANIFEST.in", ".ci/run")]
    files = [PACKAGE / p for p in MODULES] + [CSRC / p for p in SOURCES] + [*(ROOT / "benchmarks").glob("*.py")]
    files += [p for p in others if p.exists()]
    assert {str(p.relative_to(ROOT)) for p in files if absolute.search(p.read_text())} == set()


def test_the_version_stands_in_one_place():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert ab.__version__ in (version, "0+not.installed")
    assert [str(p) for p in MODULES if version in (PACKAGE / p).read_text()] == []


EXAMPLES = {".".join(p.with_suffix("").parts).removesuffix(".__init__") for p in MODULES if ">>>" in (PACKAGE / p).read_text()}


def run_docstring_examples(name):
    """The result of doctest for a module of absgd_fast."""
    module = importlib.import_module("absgd_fast" if name == "__init__" else f"absgd_fast.{name}")
    known = {"torch": torch, "math": math} | {name: getattr(ab, name) for name in ab.__all__}
    return doctest.testmod(module, extraglobs={word: value for word, value in known.items() if word not in vars(module)})


@pytest.mark.parametrize("name", sorted(EXAMPLES | {"optim"}))
def test_docstring_examples(name):
    """Every example of a docstring runs. (The optimizers call themselves members of `optim`, wherever their files are.)"""
    package, _, framework = name.rpartition(".")
    if package == "integrations" and framework in FRAMEWORKS:
        pytest.skip(f"needs {framework}; tests/integrations/test_documents.py runs it in `make test-integrations`")
    result = run_docstring_examples(name)
    assert result.failed == 0 and (result.attempted > 0 or name.startswith("optim."))


PUBLIC = [o for o in vars(ab).values() if getattr(o, "__module__", "").startswith("absgd_fast.")]
PUBLIC += [ab.weights.term, ab.weights.cvar, ab.weights.chi2, ab.weights.GroupDRO, ab.meta.l2rw_weights, ab.meta.l2rw_loss]
PUBLIC += [ab.functional.logit_loss, ab.functional.robust_weights, ab.functional.weighted_momentum_step_]


@pytest.mark.parametrize("item", PUBLIC, ids=lambda o: o.__name__)
def test_everything_public_shows_an_example(item):
    assert ">>>" in (item.__doc__ or "")
