"""Checks the folder that `gpu.sh prepare` built, and writes its contents to manifest.json.

    python -m benchmarks.gpu_folder FOLDER --commit COMMIT --archs ARCHITECTURES

manifest.json has: commit, date, python, torch, cuda, nvcc, architectures, libraries {name: {bytes, sha256}}, competitors
[distributions], megabytes, and wrong, the reasons why no run can begin with the folder. The exit code is 1 if there is a reason.
"""

import argparse
import datetime
import hashlib
import json
import sys
import sysconfig
from pathlib import Path

import torch

from absgd_fast import _backend

MOST = 44 * 2**20  # bytes: 64 MiB can travel, less the working tree (4 MiB) and the caches of an earlier run (16 MiB)


def wrong(libraries, size):
    """The reasons why no run can begin with a folder of `size` bytes and these libraries."""
    host = f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"
    out = [f"{name} was not built" for name in ("_ops_cpu.so", "_ops_cuda.so", host) if name not in libraries]
    if torch.version.cuda:  # a torch without CUDA has nothing to bind to
        unbound = _backend.cuda_unbound()
        out += [f"the CUDA library does not find torch's stream: {unbound}"] * (unbound is not None)
    if size > MOST:
        out.append(f"it takes {size / 2**20:.0f} MiB, but only {MOST / 2**20:.0f} can travel")
    return out


def look(folder, commit, archs):
    """The manifest of the folder."""
    libraries = {path.name: path.read_bytes() for path in sorted((folder / "absgd_fast").glob("_*.so"))}
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.match("caches.tar.*"))
    return {
        "commit": commit,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nvcc": (_backend.build_info()["cuda"] or {}).get("nvcc"),
        "architectures": archs,
        "libraries": {name: {"bytes": len(b), "sha256": hashlib.sha256(b).hexdigest()} for name, b in libraries.items()},
        "competitors": sorted(path.stem for path in (folder / "competitors").glob("*.dist-info")),
        "megabytes": round(size / 2**20, 1),
        "wrong": wrong(libraries, size),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_folder", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--archs", default="unknown")
    options = parser.parse_args(argv)
    found = look(options.folder, options.commit, options.archs)
    (options.folder / "manifest.json").write_text(json.dumps(found, indent=1) + "\n")
    made_for = f"Python {found['python']}, torch {found['torch']}, {options.archs}"
    print(f"{options.folder}: {found['megabytes']} MiB for {made_for}")
    for name, library in found["libraries"].items():
        print(f"  {name}: {library['bytes'] / 2**20:.1f} MiB")
    print(f"  competitors: {', '.join(found['competitors']) or 'none'}")
    for reason in found["wrong"]:
        print(f"WRONG: {reason}")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
