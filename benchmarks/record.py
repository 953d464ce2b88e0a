"""A record: what it says of the machine and of the versions, and how its file is written."""

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from absgd_fast import _backend


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version_of(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment():
    """The machine and the versions, on which timings depend. Call this before the first timing, which is a load itself."""
    here = _backend.report()
    versions = {"python": here["python"], "torch": here["torch"], "absgd_fast": here["version"], "absgd": version_of("absgd")}
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "backend": here["selected for CPU tensors"],
            "instruction_set": here["cpu"]["instruction set"],
        },
        "versions": versions,
        "compiler": here["build"]["compiler"],
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def write(report, path):
    """Writes JSON, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
