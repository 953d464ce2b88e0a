"""Loads the native libraries, and says which backends can run and why others cannot.

This is the only file that reads environment variables:

ABSGD_FAST_BACKEND   forces a backend: "cuda", "triton", "cpu" or "reference"
ABSGD_FAST_ISA       forces an instruction set of the CPU kernels: "avx512", "avx2" or "baseline"
ABSGD_FAST_EAGER     0 leaves the module _eager out, so that Python and torch's dispatcher do its work
TRITON_INTERPRET     Triton's own: with 1 its kernels run on the CPU, slowly, and "triton" can be forced for CPU tensors
XDG_DATA_HOME        the user's folder of shared data, where `absgd-fast train` looks for data sets
XDG_DATA_DIRS        the system's, separated by colons
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.machinery
import importlib.util
import json
import os
import platform
import re
import sys
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from ._compiled import constant_in_graphs

NAMES = ("cuda", "triton", "cpu", "reference")
_VARIABLES = ("ABSGD_FAST_BACKEND", "ABSGD_FAST_ISA", "ABSGD_FAST_EAGER", "TRITON_INTERPRET")  # those that doctor shows
_HERE = Path(__file__).parent
_CHOICES = "None, " + ", ".join(map(repr, NAMES))


@cache
def build_info() -> dict:
    """What the build has noted: native, host, reason, compiler, isas, cuda, cuda_reason, torch (see CMakeLists.txt)."""
    try:
        return json.loads((_HERE / "_build_info.json").read_text())
    except FileNotFoundError:
        reason = "the package was not built; run `pip install .` in the source tree"
        return {
            "native": False,
            "host": False,
            "reason": reason,
            "compiler": None,
            "isas": [],
            "torch": None,
            "cuda": None,
            "cuda_reason": reason,
        }


@cache
def _load(name: str) -> str | None:
    """Loads the operators of "cpu" or "cuda". Returns None, or the reason why they cannot be used."""
    library = _HERE / f"_ops_{name}.so"
    if not library.exists():
        info = build_info()
        return f"native kernels were not built: {info['cuda_reason'] if name == 'cuda' and info['native'] else info['reason']}"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch >= 2.10 is needed, this is {torch.__version__}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    forced = os.environ.get("ABSGD_FAST_ISA")
    if forced and name == "cpu":
        set_cpu_isa(forced)
    return None


def load() -> None:
    """Registers the kernels of the libraries that were built. It does not touch a GPU, so a process may fork afterwards."""
    _load("cpu")
    if torch.version.cuda:
        _load("cuda")


def cuda_unbound() -> str | None:
    """None if the CUDA operators are loaded and find torch's stream (csrc/torch_stream.h), otherwise the reason. Needs no GPU."""
    return _load("cuda") or torch.ops.absgd_fast.cuda_unbound() or None


def _driver_too_old() -> str | None:
    """Why the driver cannot serve the linked CUDA runtime, or None: it serves runtimes up to its own major version."""
    driver, runtime = map(int, torch.ops.absgd_fast.cuda_versions().split())
    if driver // 1000 >= runtime // 1000:
        return None

    def shown(version: int) -> str:
        return f"{version // 1000}.{version % 1000 // 10}"

    return (
        f"the NVIDIA driver serves CUDA {shown(driver)}, but the kernels were built with CUDA {shown(runtime)};"
        " update the driver, or build the package with an older nvcc"
    )


@cache
def _why_not_cuda() -> str | None:
    if not torch.version.cuda:
        return f"this torch ({torch.__version__}) is built without CUDA"
    reason = cuda_unbound()
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no CUDA GPU"
    reason = reason or _driver_too_old()
    if reason is None:
        compiled = build_info()["cuda"]
        for device in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(device)
            if not _has_code_for(10 * major + minor, compiled["architectures"], compiled["ptx"]):
                built = ", ".join(f"{x / 10}" for x in compiled["architectures"])
                return f"GPU {device} has compute capability {major}.{minor}, the kernels were built for {built}; see CUDAARCHS"
    return reason


def _has_code_for(capability: int, machine_code: list[int], ptx: list[int]) -> bool:
    """Whether a GPU runs what was compiled: machine code of its generation, not newer, or PTX that is not newer.

    With neither list, CUDAARCHS was a word such as "native", and what it stood for is not known here.
    """
    if not machine_code and not ptx:
        return True
    same = any(code // 10 == capability // 10 and code <= capability for code in machine_code)
    return same or any(code <= capability for code in ptx)


@cache
def _why_not_triton() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton does not import: {error}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 5):
        return f"triton >= 3.5 is needed, this is {triton.__version__}"
    if _interpreted() or torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return None
    return "torch sees no GPU"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(name: str) -> str | None:
    """None if backend `name` can run, otherwise the reason. ValueError: an unknown name.

    >>> why_not("reference") is None
    True
    """
    if name == "reference":
        return None
    if name == "cpu":
        return _load("cpu")
    if name == "cuda":
        return _why_not_cuda()
    if name == "triton":
        return _why_not_triton()
    raise ValueError(f"backend: got {name!r}, expected one of {_CHOICES}")


def available(name: str) -> bool:
    """Whether backend `name` can run."""
    return why_not(name) is None


def devices(name: str) -> tuple[str, ...]:
    """The types of device whose tensors a backend serves."""
    return {"cuda": ("cuda",), "triton": ("cuda", "xpu") + ("cpu",) * _interpreted(), "cpu": ("cpu",)}[name]


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


# The backends that serve a type of device, the fastest first. "reference" serves every device.
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}


@constant_in_graphs  # what can run does not change between two calls of a compiled function
def select(device: torch.device, backend: str | None = None) -> str:
    """The backend that serves tensors on `device`: the forced one, or the fastest that can run.

    Args:
        device: the device of the tensors.
        backend: the forced backend; None takes ABSGD_FAST_BACKEND, or else the fastest that can run.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the forced backend cannot run (the text says why).

    >>> select(torch.device("cpu"), "reference")
    'reference'
    """
    forced = backend if backend is not None else os.environ.get("ABSGD_FAST_BACKEND") or None
    if forced is not None:
        reason = why_not(forced)
        if reason is None and forced != "reference" and device.type not in devices(forced):
            reason = f"it serves {' and '.join(devices(forced))} tensors, not {device.type!r}"
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} cannot run: {reason}; run `python -m absgd_fast doctor`, or use backend=None")
        return forced
    reasons = []
    for name in _PREFERENCE.get(device.type, ()):
        reason = why_not(name)
        if reason is None:
            return name
        reasons.append(reason if len(_PREFERENCE[device.type]) == 1 else f"{name}: {reason}")
    if reasons:
        _warn_once(f"absgd_fast runs on plain torch (slower, same numbers): {'; '.join(reasons)}")
    return "reference"


# ---- the CPU kernels ----


def cpu_isas() -> list[str]:
    """The instruction sets that this build of the CPU kernels has and this machine runs, the best first."""
    return [] if _load("cpu") else torch.ops.absgd_fast.isas().split(",")[1:]


def cpu_isa() -> str | None:
    """The instruction set that the CPU kernels use, or None without them."""
    return None if _load("cpu") else torch.ops.absgd_fast.isas().split(",")[0]


def set_cpu_isa(name: str) -> str:
    """Makes the CPU kernels use instruction set `name`, and returns the one used before. ValueError: it cannot run here."""
    current, *known = torch.ops.absgd_fast.isas().split(",")
    if not torch.ops.absgd_fast.use_isa(name):
        raise ValueError(
            f"instruction set: got {name!r}, expected one that this build has and this machine runs: {', '.join(known)}"
        )
    return current


def native_signatures(name: str = "cpu") -> dict[str, tuple[list[str], list[str]]]:
    """The C++ signatures of the operators of "cpu" or "cuda": name -> (argument types, return types), as schemas name the types.

    The library must be there, but its device need not. Without the library the result is empty.
    """
    out: dict[str, tuple[list[str], list[str]]] = {}
    if _load(name) is None:
        written = torch.ops.absgd_fast.native_signatures if name == "cpu" else torch.ops.absgd_fast.cuda_signatures
        for line in written().splitlines():
            name, signature = line.split(": ", 1)
            arguments, returns = ([t for t in part.split(", ") if t] for part in signature.split(" -> "))
            out[name] = arguments, returns
    return out


@cache
def _module(name: str) -> ModuleType:
    """A compiled module of this folder. ImportError: it does not import, or is not here (the text says why).

    A wheel has one build of it for each of several Pythons. `import` would also find that of another checkout, to which an
    editable installation has mapped the package's name.
    """
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]  # sysconfig's EXT_SUFFIX, without importing a file of the Python's build
    file = _HERE / f"{name}{suffix}"
    if not file.exists():
        built = sorted(path.name.split(".")[1] for path in _HERE.glob(f"{name}.*.so"))
        if built:
            raise ImportError(f"absgd_fast.{name} was built for {', '.join(built)}, and this Python is {suffix.split('.')[1]}")
        raise ImportError(build_info()["reason"] or f"absgd_fast.{name} was not built")
    spec = importlib.util.spec_from_file_location(f"absgd_fast.{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[spec.name] = module
    return module


@cache
def why_not_host() -> str | None:
    """None if the module _host (csrc/host.cpp) can serve, otherwise the reason."""
    try:
        _module("_host")
    except ImportError as error:
        return str(error)
    return None


def host() -> ModuleType | None:
    """The pybind11 module that has StepPlan, or None."""
    return None if why_not_host() else _module("_host")


@cache
def why_not_eager() -> str | None:
    """None if the module _eager (csrc/eager.cpp) can serve, otherwise the reason."""
    reason = _load("cpu")
    if reason is not None:
        return reason
    if os.environ.get("ABSGD_FAST_EAGER") == "0":
        return "ABSGD_FAST_EAGER=0"
    built = build_info()["torch"]
    if _release(built) != _release(torch.__version__):  # it uses classes of torch that change from version to version
        return f"it was built beside torch {built}, and this is torch {torch.__version__}"
    try:
        _module("_eager")
        cpu_kernels_address()
    except ImportError as error:
        return str(error)
    except AttributeError as error:  # it is not the library that was built with the module
        return f"the CPU library lends it no kernels: {error}"
    return None


def _release(version: str | None) -> str:
    """The version without its flavour: those of one release (+cpu, +cu130) have the same classes, and other builds are unlike."""
    return re.sub(r"^(\d+\.\d+\.\d+)\+(cpu|cu\d+|rocm[\d.]+|xpu)$", r"\1", str(version))


def eager() -> ModuleType | None:
    """The module that takes a batch on the CPU through autograd in C++ (csrc/eager.cpp), or None."""
    return None if why_not_eager() else _module("_eager")


def cpu_kernels_address() -> int:
    """The address of absgd_fast_cpu_kernels in the CPU library, which must be loaded. AttributeError: it has no such function."""
    address = ctypes.cast(ctypes.CDLL(str(_HERE / "_ops_cpu.so")).absgd_fast_cpu_kernels, ctypes.c_void_p).value
    assert address is not None
    return address


def report() -> dict:
    """Everything that `absgd-fast doctor` shows."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        package = version("absgd_fast")
    except PackageNotFoundError:
        package = "not installed (imported from a source tree)"
    info = build_info()
    backends = {name: {"available": available(name), "reason": why_not(name)} for name in NAMES}
    return {
        "version": package,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "selected for CPU tensors": _quietly_select("cpu"),
        "selected for CUDA tensors": _quietly_select("cuda") if torch.cuda.is_available() else "no GPU",
        "backends": backends,
        "cpu": {
            "machine": platform.machine(),
            "instruction set": cpu_isa(),
            "available": cpu_isas(),
            "compiled": info["isas"],
            "threads": torch.get_num_threads(),
        },
        "host module": {"available": why_not_host() is None, "reason": why_not_host()},
        "eager module": {"available": why_not_eager() is None, "reason": why_not_eager()},
        "cuda": {
            "compiled": info["cuda"],
            "reason": info["cuda_reason"],
            "torch's CUDA": torch.version.cuda,
            "GPUs": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "build": {"compiler": info["compiler"], "torch": info["torch"]},
        "environment": {name: os.environ.get(name) for name in _VARIABLES},
    }


def data_folders() -> list[Path]:
    """The folders of shared data: the user's, the system's by its environment, and those that the XDG standard names by default.

    As the standard says, an empty variable counts as none, and a path that is not absolute is left out.
    """
    shared = ["/usr/local/share", "/usr/share"]
    home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    named = [home, *os.environ.get("XDG_DATA_DIRS", "").split(os.pathsep), *shared]
    return list(dict.fromkeys(Path(folder) for folder in named if os.path.isabs(folder)))


def _quietly_select(device: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return select(torch.device(device))
        except (RuntimeError, ValueError) as error:
            return str(error)
