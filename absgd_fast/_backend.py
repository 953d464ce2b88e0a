"""Finds the native libraries, says what can run and why not; the only reader of environment variables.

ABSGD_FAST_BACKEND   forces a backend: "cpu" or "reference"
ABSGD_FAST_ISA       forces an instruction set of the CPU kernels: "avx512", "avx2" or "baseline"
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import warnings
from functools import cache
from pathlib import Path

import torch

NAMES = ("cuda", "triton", "cpu", "reference")
_HERE = Path(__file__).parent
_CHOICES = "None, " + ", ".join(map(repr, NAMES))


@cache
def build_info() -> dict:
    """What the build left: native, host, reason, compiler, isas, torch (see CMakeLists.txt)."""
    try:
        return json.loads((_HERE / "_build_info.json").read_text())
    except FileNotFoundError:
        reason = "the package was not built; run `pip install .` in the source tree"
        return {"native": False, "host": False, "reason": reason, "compiler": None, "isas": [], "torch": None}


@cache
def _load_cpu() -> str | None:
    """Load the CPU operators; None, or why they cannot be used."""
    library = _HERE / "_ops_cpu.so"
    if not library.exists():
        return f"native kernels were not built: {build_info()['reason']}"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"torch >= 2.10 is needed, this is {torch.__version__}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} does not load: {error}"
    forced = os.environ.get("ABSGD_FAST_ISA")
    if forced:
        set_cpu_isa(forced)
    return None


def why_not(name: str) -> str | None:
    """None if backend `name` can run, else the reason.

    >>> why_not("reference") is None
    True
    """
    if name == "reference":
        return None
    if name == "cpu":
        return _load_cpu()
    if name in NAMES:
        return "this version has no such kernels; tensors on a GPU are served by reference"
    raise ValueError(f"backend: got {name!r}, expected one of {_CHOICES}")


def available(name: str) -> bool:
    return why_not(name) is None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@torch.compiler.assume_constant_result  # what can run does not change between two calls of a compiled function
def select(device: torch.device, backend: str | None = None) -> str:
    """The backend that serves tensors on `device`: the forced one, or the fastest that can run.

    Raises ValueError for an unknown name, RuntimeError (with the reason) for one that cannot run.

    >>> select(torch.device("cpu"), "reference")
    'reference'
    """
    forced = backend if backend is not None else os.environ.get("ABSGD_FAST_BACKEND") or None
    if forced is not None:
        reason = why_not(forced)
        if reason is None and forced == "cpu" and device.type != "cpu":
            reason = f"it serves CPU tensors, not {device.type!r}"
        if reason is not None:
            raise RuntimeError(f"backend {forced!r} cannot run: {reason}; run `python -m absgd_fast doctor`, or use backend=None")
        return forced
    if device.type == "cpu":
        reason = _load_cpu()
        if reason is None:
            return "cpu"
        _warn_once(f"absgd_fast runs on plain torch (slower, same numbers): {reason}")
    return "reference"


# ---- the CPU kernels ----


def cpu_isas() -> list[str]:
    """Instruction sets of the CPU kernels that this build has and this machine runs, the best first."""
    return [] if _load_cpu() else torch.ops.absgd_fast.isas().split(",")[1:]


def cpu_isa() -> str | None:
    """The instruction set in use."""
    return None if _load_cpu() else torch.ops.absgd_fast.isas().split(",")[0]


def set_cpu_isa(name: str) -> str:
    """Use instruction set `name`; returns the one used before. Raises ValueError for one that cannot run."""
    current, *known = torch.ops.absgd_fast.isas().split(",")
    if not torch.ops.absgd_fast.use_isa(name):
        raise ValueError(f"instruction set: got {name!r}, this build and machine have {', '.join(known)}")
    return current


def native_signatures() -> dict[str, tuple[list[str], list[str]]]:
    """C++ signatures of the native operators: name -> (argument types, return types), in the schema language's names."""
    out = {}
    if _load_cpu() is None:
        for line in torch.ops.absgd_fast.native_signatures().splitlines():
            name, signature = line.split(": ", 1)
            arguments, returns = signature.split(" -> ")
            out[name] = tuple([t for t in part.split(", ") if t] for part in (arguments, returns))
    return out


@cache
def host():
    """The pybind11 module with StepPlan, or None."""
    try:
        return importlib.import_module("absgd_fast._host")
    except ImportError:
        return None


def report() -> dict:
    """Everything `absgd-fast doctor` shows."""
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
        "selected for CPU tensors": _quietly_select(),
        "backends": backends,
        "cpu": {
            "machine": platform.machine(),
            "instruction set": cpu_isa(),
            "available": cpu_isas(),
            "compiled": info["isas"],
            "threads": torch.get_num_threads(),
        },
        "host module": {
            "available": host() is not None,
            "reason": None if host() is not None else (info["reason"] or "absgd_fast._host does not import"),
        },
        "build": {"compiler": info["compiler"], "torch": info["torch"]},
        "environment": {name: os.environ.get(name) for name in ("ABSGD_FAST_BACKEND", "ABSGD_FAST_ISA")},
    }


def _quietly_select() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return select(torch.device("cpu"))
        except (RuntimeError, ValueError) as error:
            return str(error)
