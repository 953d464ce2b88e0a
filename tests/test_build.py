"""The build: what it leaves, and that an installation without a compiler works and says why it is slow."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
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


@pytest.mark.parametrize(
    "capability, machine_code, ptx, runs",
    [
        (90, [80, 90], [90], True),
        (89, [86], [], True),  # machine code runs on later GPUs of its generation
        (80, [86], [], False),
        (75, [80, 90], [90], False),
        (100, [80, 90], [], False),  # and on no other generation
        (100, [80, 90], [90], True),  # PTX runs on every later one
        (110, [80, 90, 100, 120], [90], True),
        (110, [80, 90, 100, 120], [120], False),
        (121, [120], [], True),
        (90, [], [], True),  # CUDAARCHS=native, where nobody knows
    ],
)
def test_which_gpus_have_code(capability, machine_code, ptx, runs):
    assert _backend._has_code_for(capability, machine_code, ptx) == runs


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("2.13.0+cpu", "2.13.0+cu130", True),
        ("2.13.0", "2.13.0+rocm7.1", True),
        ("2.13.0+xpu", "2.13.0+cpu", True),
        ("2.13.0+cpu", "2.13.1+cpu", False),
        ("2.14.0a0+git1234567", "2.14.0a0+git89abcde", False),  # builds of two commits
        ("2.14.0.dev20261101+cpu", "2.14.0.dev20261102+cpu", False),
        ("2.13.0+nv26.1", "2.13.0", False),  # somebody's own build
        (None, "2.13.0", False),
    ],
)
def test_which_torchs_have_the_same_classes(one, other, same):
    assert (_backend._release(one) == _backend._release(other)) == same


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another folder of the package, in which there is nothing."""
    monkeypatch.setattr(_backend, "_HERE", tmp_path)
    for function in (_backend._module, _backend.build_info):
        function.cache_clear()
    yield tmp_path
    for function in (_backend._module, _backend.build_info):
        function.cache_clear()


def test_the_modules_of_other_pythons_do_not_serve(elsewhere):
    for name in ("cpython-39-x86_64-linux-gnu", "cpython-310t-x86_64-linux-gnu"):
        (elsewhere / f"_host.{name}.so").touch()
    reason = _backend.why_not_host.__wrapped__()
    own = sysconfig.get_config_var("EXT_SUFFIX").split(".")[1]
    assert "built for cpython-310t-x86_64-linux-gnu, cpython-39-x86_64-linux-gnu" in reason and f"this Python is {own}" in reason


def test_no_module_of_another_checkout_serves(elsewhere):
    """An editable installation maps the name absgd_fast to its folder: `import absgd_fast._host` would find that everywhere."""
    assert "the package was not built" in _backend.why_not_host.__wrapped__()


def test_import_is_light():
    """What takes longer to import than torch itself stays out: dynamo, sympy and Triton. (torch's own optimizers import them.)"""
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import absgd_fast as ab\n"
        "x = torch.zeros(4, 3, requires_grad=True)\n"
        "criterion = ab.ABLoss(lam=1.0)\n"
        "linear = ab.LinearABLoss(lam=1.0)\n"
        "for _ in range(3):\n"
        "    criterion(x, torch.arange(4) % 3).backward()\n"
        "    linear(x, torch.eye(3), torch.arange(4) % 3).backward()\n"
        "print(*{name.split('.')[0] if 'dynamo' not in name else 'dynamo' for name in set(sys.modules) - before})\n"
    )
    out, _ = run(PACKAGE.parent, code)
    assert "absgd_fast" in out.split()
    assert not {"dynamo", "sympy", "triton", "scipy", "matplotlib"} & set(out.split())


# ---- installing ------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """A copy of the source tree without anything built."""
    tree = tmp_path / "source"
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    shutil.copytree(
        ROOT / "absgd_fast", tree / "absgd_fast", ignore=shutil.ignore_patterns("_*.so", "_build_info.json", "__pycache__")
    )
    return tree


def setup_py(source, *command, python=sys.executable, **environment):
    """Runs a command of setup.py there, with the cmake of this environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path} | environment
    return subprocess.run([python, "setup.py", *command], cwd=source, env=environment, capture_output=True, text=True)


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
        "print(_backend.why_not('cpu'))\n"
        "assert _backend.host() is None and _backend.eager() is None\n",
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
    done = setup_py(source, "build_ext", "--inplace", CXX=shutil.which("false"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert not stale.exists() and (source / "absgd_fast" / "_build_info.json").exists()


# ---- a build that does not see torch, and the tag of a wheel ---------------------------------------------------------


@pytest.fixture
def hidden(tmp_path):
    """Variables that hide torch, as those of pip's isolated builds do."""
    folder = tmp_path / "isolation"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    return {"PYTHONPATH": str(folder), "PYTHONNOUSERSITE": "1"}


def test_an_isolated_build_finds_the_torch_of_the_environment(source, hidden, tmp_path):
    look = [sys.executable, "-c", "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is not None)"]
    assert subprocess.run(look, env=os.environ | hidden).returncode == 0  # it is hidden
    done = install(source, tmp_path / "target", CXX=shutil.which("false"), **hidden)
    assert done.returncode == 0, done.stdout + done.stderr
    configure = ["cmake", "-S", source, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}", "-DABSGD_CUDA=OFF"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(configure, capture_output=True, text=True, env=os.environ | {"PATH": path} | hidden)
    assert done.returncode == 0 and f"torch {torch.__version__}" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def tools(tmp_path):
    """A PYTHONPATH that has setuptools and nothing else."""
    packages = Path(pytest.importorskip("setuptools").__file__).parent.parent
    (tmp_path / "tools").mkdir()
    for path in [packages / "setuptools", packages / "_distutils_hack", *packages.glob("setuptools-*.dist-info")]:
        (tmp_path / "tools" / path.name).symlink_to(path)
    return str(tmp_path / "tools")


def test_a_build_without_torch_says_what_to_do(source, tools, tmp_path):
    """An environment with setuptools alone, as uv and poetry make it for a build."""
    venv.create(tmp_path / "bare", with_pip=False)
    done = setup_py(source, "bdist_wheel", python=tmp_path / "bare" / "bin" / "python", PYTHONPATH=tools)
    assert done.returncode != 0 and not list(source.glob("dist/*"))
    assert "No module named 'torch'" in done.stderr and "--no-build-isolation absgd_fast" in done.stderr


def test_an_older_torch_stops_a_build(source, tools, tmp_path):
    """Without kernels pip would keep the wheel, and then upgrade torch. The torch lies where `pip install --user` has put it."""
    user = Path(sysconfig.get_path("purelib", f"{os.name}_user", vars={"userbase": str(tmp_path / "user")}))
    (user / "torch").mkdir(parents=True)
    (user / "torch" / "__init__.py").write_text("__version__ = '2.9.1'\n")
    isolated = {"PYTHONPATH": tools, "PYTHONNOUSERSITE": "1", "PYTHONUSERBASE": str(tmp_path / "user")}
    python = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")  # Python 3.10 has no sys._base_executable for it
    done = setup_py(source, "bdist_wheel", python=python, **isolated)
    assert done.returncode != 0 and not list(source.glob("dist/*"))
    assert "this is torch 2.9.1" in done.stderr and "--no-build-isolation absgd_fast" in done.stderr


@pytest.mark.parametrize("url", ["", "https://example.org/somebody/absgd_fast"])
def test_the_page_on_an_index(source, url):
    """An index shows the README alone. So its links and its picture need the address of the repository, which a release knows."""
    readme = (source / "README.md").read_text(encoding="utf-8")
    done = setup_py(source, "dist_info", "--output-dir", ".", ABSGD_FAST_URL=url)
    assert done.returncode == 0, done.stderr
    (folder,) = source.glob("*.dist-info")
    metadata = (folder / "METADATA").read_text(encoding="utf-8")
    assert "Description-Content-Type: text/markdown" in metadata
    assert (readme.strip() in metadata) == (not url)
    assert (f"Project-URL: Source, {url}\n" in metadata) == bool(url) == ("Project-URL" in metadata)
    relative = re.findall(r"\]\((?!https:|#)([^)]+)\)", readme)
    assert len(relative) > 40
    for path in relative:
        kind = "raw" if path.endswith(".png") else "blob"
        assert (f"]({url}/{kind}/HEAD/{path})" in metadata) == bool(url) and (f"]({path})" in metadata) == (not url)


def test_required_cuda(source):
    """`make wheel` sets this, so that no wheel without CUDA code is published by mistake."""
    wrong = shutil.which("false")
    done = setup_py(source, "bdist_wheel", ABSGD_FAST_CUDA="1", ABSGD_FAST_REQUIRE_NATIVE="1", CUDACXX=wrong)
    assert done.returncode != 0 and "needs a working CUDA compiler" in done.stderr and not list(source.glob("dist/*"))


@pytest.mark.parametrize("pythons", ["", "python3.10 python3.11"], ids=["this Python", "several Pythons"])
def test_tag(source, pythons):
    """A wheel for several Pythons is tagged for all of them; the wheel that pip builds is for its own alone."""
    done = setup_py(source, "bdist_wheel", CXX=shutil.which("false"), ABSGD_FAST_PYTHONS=pythons)
    assert done.returncode == 0, done.stdout + done.stderr
    own = f"cp3{sys.version_info.minor}"
    (name,) = [path.name for path in source.glob("dist/*.whl")]
    assert name.split("-", 2)[2].startswith("py3-none-linux" if pythons else f"{own}-{own}-linux"), name
