"""The wheel in empty environments: every Python, the oldest and the newest torch, and nothing else.

In each environment there is no compiler, no Triton and no NumPy. The path has a space, the package's folder is read-only, and
whatever opens a connection fails (smoke.py).
"""

import json
import os
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
from conftest import PYTHONS

# The modules of Python are tried with every Python, the operators with the oldest and the newest torch, and once without the
# modules, as a later Python meets them.
ENVIRONMENTS = [
    *((python, "the same", True) for python in PYTHONS),
    (PYTHONS[0], "2.10.0", True),
    (PYTHONS[-1], "newest", True),
    (PYTHONS[-1], "the same", False),
]
ABSENT = {"numpy", "triton"}


@pytest.fixture(params=ENVIRONMENTS, ids=lambda e: f"{e[0]}, torch {e[1]}" + (", without modules" if not e[2] else ""))
def environment(request, wheel, info, tmp_path):
    """The Python of an environment with torch and the wheel alone, and whether the wheel's modules are left in it."""
    python, torch, modules = request.param
    release = info["torch"].split("+")[0]
    folder = tmp_path / "an environment with spaces"
    subprocess.run([python, "-m", "venv", folder], check=True)
    own = folder / "bin" / "python"
    pip = [own, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "install", {"newest": "torch", "the same": f"torch=={release}"}.get(torch, f"torch=={torch}")], check=True
    )
    subprocess.run([*pip, "uninstall", "--yes", *ABSENT], check=True)
    subprocess.run([*pip, "install", "--no-index", "--no-deps", wheel], check=True)
    yield own, modules
    subprocess.run(["chmod", "-R", "u+w", folder], check=True)
    shutil.rmtree(folder)  # five gigabytes, and pytest would keep those of three runs


def bare(home):
    """No compiler and no tool on PATH, and no setting of ours."""
    return {"PATH": os.devnull, "HOME": str(home)}


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def test_smoke(environment, info, tmp_path):
    python, modules = environment
    where = "import importlib.util as u; print(u.find_spec('absgd_fast').submodule_search_locations[0])"
    asked = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True, env=bare(tmp_path), cwd=tmp_path)
    package = Path(asked.stdout.strip())
    if not modules:
        for path in [*package.glob("_host.*.so"), *package.glob("_eager.*.so")]:
            path.rename(path.with_name(path.name.replace("cpython-3", "cpython-9")))
    subprocess.run(["chmod", "-R", "a-w", package], check=True)
    before = contents(package)
    smoke = Path(__file__).with_name("smoke.py")
    done = subprocess.run(
        [python, smoke, tmp_path / "checkpoint.pt"], capture_output=True, text=True, env=bare(tmp_path), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(package) == before
    found = json.loads(done.stdout.splitlines()[-1])
    built_beside, here = (version.split("+")[0] for version in (info["torch"], found["torch"]))
    if not modules:
        assert "_host was built for cpython-9" in found["host module"]["reason"]
        assert "_eager was built for cpython-9" in found["eager module"]["reason"]
    else:
        assert found["host module"] == {"available": True, "reason": None}
        if here == built_beside:
            assert found["eager module"] == {"available": True, "reason": None}
        else:
            assert f"it was built beside torch {built_beside}" in found["eager module"]["reason"]
    beyond = times(python, tmp_path)
    print(
        f"{found['python']}, torch {found['torch']}: {found['checks']} checks,",
        ", ".join(f"{k} {v:.2f} s" for k, v in beyond.items()),
    )
    assert beyond["import"] < 0.3 and beyond["doctor"] < 2  # measured: 0.04 to 0.06 s and 0.1 to 0.2 s on a quiet machine


def times(python, home):
    """Seconds beyond `import torch` of importing the package, and of `doctor`: medians of five, in turn."""
    commands = {
        "torch": ["-c", "import torch"],
        "import": ["-c", "import absgd_fast"],
        "doctor": ["-m", "absgd_fast", "doctor"],
    }
    taken = {name: [] for name in commands}
    for _ in range(5):
        for name, command in commands.items():
            code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
            code += "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime)"
            spent = subprocess.run(
                [python, "-c", code, python, *command], capture_output=True, text=True, check=True, env=bare(home), cwd=home
            )
            taken[name].append(float(spent.stdout))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    return {name: medians[name] - medians["torch"] for name in ("import", "doctor")}
