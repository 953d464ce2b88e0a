"""benchmarks/gpu.sh and the folder that it prepares: stages, limits, and a whole run rehearsed on the CPU."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from bench_cases import (
    GPU_SH,
    cases,
    gpu_folder,
    gpu_report,
    same_path,  # noqa: F401 (a fixture)
)

# ---- the folder of a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "absgd_fast").mkdir()
    for name in ("_ops_cpu.so", "_ops_cuda.so", f"_host{gpu_folder.sysconfig.get_config_var('EXT_SUFFIX')}"):
        (tmp_path / "absgd_fast" / name).write_bytes(b"abc")
    (tmp_path / "competitors" / "liger_kernel-0.8.5.dist-info").mkdir(parents=True)
    return tmp_path


def look(folder, capsys):
    code = gpu_folder.main([str(folder), "--commit", "abc", "--archs", "90-real"])
    return code, json.loads((folder / "manifest.json").read_text()), capsys.readouterr().out


@pytest.fixture
def with_cuda(monkeypatch):
    """A torch with CUDA, and what the look-up of its stream says."""
    said = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu_folder._backend, "cuda_unbound", lambda: said[-1] if said else None, raising=False)
    return said


def test_what_is_in_the_folder(folder, with_cuda, capsys):
    code, manifest, printed = look(folder, capsys)
    assert code == 0 and manifest["wrong"] == []
    assert manifest["competitors"] == ["liger_kernel-0.8.5"] and "liger_kernel-0.8.5" in printed
    assert manifest["libraries"]["_ops_cuda.so"] == {
        "bytes": 3,
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }
    assert (manifest["commit"], manifest["architectures"], manifest["torch"]) == ("abc", "90-real", torch.__version__)


def test_a_folder_that_no_run_can_begin_with(folder, with_cuda, capsys, monkeypatch):
    with_cuda.append("no symbol of that name")
    (folder / "absgd_fast" / "_ops_cpu.so").unlink()
    monkeypatch.setattr(gpu_folder, "MOST", 5)
    code, manifest, printed = look(folder, capsys)
    assert code == 1 and len(manifest["wrong"]) == 3
    for words in ("_ops_cpu.so was not built", "does not find torch's stream: no symbol of that name", "it takes 0 MiB"):
        assert f"WRONG: {words}" in printed or words in printed


# ---- the script -------------------------------------------------------------------------------------------------------


BUDGETS = {"prove": 300, "again": 110, "measure": 250}
with_bash = pytest.mark.skipif(shutil.which("bash") is None or not sys.platform.startswith("linux"), reason="needs bash on Linux")


def gpu_sh(*arguments, script=GPU_SH, cwd=None, **environment):
    """Torch's compiler is no part of a rehearsal: it costs ten seconds a case."""
    quick = {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | {"PYTHON": sys.executable} | quick | environment
    return subprocess.run(["bash", script, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment)


@with_bash
@pytest.mark.parametrize("call", BUDGETS)
def test_the_stages_of_a_call_fit_into_its_seconds(tmp_path, call):
    """Two of them are for the script itself."""
    dry = gpu_sh(call, "--dry-run", tmp_path / "out")
    limits = [int(limit) for limit in re.findall(r"^\w+: at most (\d+) s$", dry.stdout, re.MULTILINE)]
    assert dry.returncode == 0 and dry.stderr == "" and len(limits) > 1 and sum(limits) <= BUDGETS[call] - 2
    assert list(tmp_path.iterdir()) == []


def test_three_calls_and_two_starts_fit_a_quarter_of_an_hour():
    """A start takes one to two minutes. What the page and the script say of the limits is what they are."""
    assert sum(BUDGETS.values()) + 2 * 120 <= 900
    script, page = GPU_SH.read_text(encoding="utf-8"), (GPU_SH.parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    for call, seconds in BUDGETS.items():
        assert re.search(rf"gpu.sh {call} .*at most {seconds} s", script)
        assert f"gpu.sh {call} OUT` | the GPU | {seconds} s" in page


@with_bash
def test_again_needs_what_prove_left(prepared, tmp_path):
    """Without it nothing is known to have failed, which must not read as if nothing had."""
    done = gpu_sh("again", "--rehearse", "--from", tmp_path, tmp_path / "out", script=prepared[0] / "gpu.sh")
    assert done.returncode == 2 and "no prove.json" in done.stderr and list(tmp_path.iterdir()) == []


@with_bash
def test_preparing_anew_keeps_what_a_run_left(prepared, tmp_path):
    """Also on a machine where nobody has a home."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("manifest.json", "prove.json", "caches.tar.gz", "old.py"):
        (folder / name).write_text("{}")
    command = ["env", "-u", "HOME", "-u", "XDG_CACHE_HOME", "bash", GPU_SH, "prepare", "--rehearse", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    kept = {path.name for path in folder.iterdir()}
    assert {"prove.json", "caches.tar.gz", "absgd_fast", "gpu.sh"} <= kept and "old.py" not in kept


@with_bash
def test_what_gpu_sh_refuses(tmp_path):
    for arguments, words in ((["--frobnicate"], "--frobnicate"), ([], "expected prepare, prove, again"), (["all"], "'all'")):
        refused = gpu_sh(*arguments, cwd=tmp_path)
        assert refused.returncode == 2 and words in refused.stderr and refused.stdout == ""
    assert "--rehearse" in gpu_sh("--help").stdout
    (tmp_path / "mine").write_text("not to be deleted")
    refused = gpu_sh("prepare", "--rehearse", tmp_path)
    assert refused.returncode == 2 and "holds something else" in refused.stderr and (tmp_path / "mine").exists()


SMOKE = """
import json, os, signal, sys
with open(sys.argv[sys.argv.index("--out") + 1], "w") as out:
    for status in ("begun", {end!r}):
        if status == "killed":
            os.kill(os.getpid(), signal.SIGSEGV)
        print(json.dumps(dict(operator="logit_loss", backend="cpu", status=status, message="", seconds=0)), file=out, flush=True)
sys.exit({code})
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder as `gpu.sh prepare` makes it, with the kernels that are there."""
    folder = tmp_path_factory.mktemp("gpu") / "folder"
    done = gpu_sh("prepare", "--rehearse", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    smoke = folder / "tests" / "gpu_smoke.py"
    if not smoke.exists():
        smoke.write_text(SMOKE.format(end="passed", code=0))
    return folder, done


@pytest.fixture(scope="session")
def rehearsal(prepared):
    """{call: what it printed and left}, all four calls, the last three as on one machine after the other."""
    folder, done = prepared
    calls, environment = {"prepare": (done, [], {})}, {"XDG_CACHE_HOME": str(folder.parent / "cache")}
    for call in BUDGETS:
        out = folder.parent / call
        done = gpu_sh(call, "--rehearse", out, script=folder / "gpu.sh", **environment)
        assert done.returncode == 0, done.stdout + done.stderr + (out / f"{call}.log").read_text()
        calls[call] = done, sorted(out.iterdir()), json.loads((out / f"{call}.json").read_text(encoding="utf-8"))
        if call == "prove":  # as if one test had failed there
            report = json.loads((folder / "prove.json").read_text(encoding="utf-8"))
            report["tests"]["test_certain_rows[cpu]"]["status"] = "failed"
            (folder / "prove.json").write_text(json.dumps(report))
            shutil.rmtree(folder.parent / "cache")
    return folder, calls


@pytest.mark.deep
@with_bash
def test_a_rehearsed_folder(rehearsal):
    folder, calls = rehearsal
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["wrong"] == [] and manifest["torch"] == torch.__version__ and "_ops_cpu.so" in manifest["libraries"]
    assert {"absgd_fast", "benchmarks", "tests", "gpu.sh"} <= {path.name for path in folder.iterdir()}
    printed = calls["prepare"][0].stdout
    assert f"for Python {manifest['python']}" in printed and re.search(r"kernels: exit code 0, \d+ of \d+ s", printed)
    with_path = [p for p in folder.rglob("*.py") if str(GPU_SH.parents[1]) in p.read_text()]
    assert with_path == []  # it does not know where it was made


@pytest.mark.deep
@with_bash
@pytest.mark.parametrize(
    "call, stages",
    [
        ("prove", "smoke cuda compile triton probe caches"),
        ("again", "failed large memcheck"),
        ("measure", "bench"),
    ],
)
def test_a_rehearsed_call(rehearsal, call, stages):
    """Few files, small enough to be brought back; the seconds of each stage; a table at the end. (Without load the four calls
    take 40 s.)"""
    done, files, report = rehearsal[1][call]
    names = {path.name for path in files}
    caches = {name for name in names if re.fullmatch(r"caches\.tar\.(zst|gz)", name)}
    assert names == {f"{call}.json", f"{call}.log"} | caches and len(caches) == (call == "prove")
    assert all(path.stat().st_size <= 16 * 2**20 for path in files)
    assert list(report["calls"][call]) == stages.split() and report["failed"] == []
    for stage in stages.split():
        assert re.search(rf"^{stage}: exit code 0, \d+ of \d+ s$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-2] == "everything passed"


@pytest.mark.deep
@with_bash
def test_what_a_rehearsal_finds(rehearsal, tmp_path, capsys):
    folder, calls = rehearsal
    prove, again, measure = (calls[call][2] for call in BUDGETS)
    assert [line["status"] for line in prove["smoke"]["operators"]].count("passed") == len(prove["smoke"]["operators"]) > 0
    assert [result["case"] for result in prove["benchmark"]["results"]] == ["16 × 5 fp32", "three tensors"]
    assert again["tests"]["test_certain_rows[cpu]"]["status"] == "passed" and again["sanitizer"]["memcheck"] == {"errors": 0}
    assert len(measure["benchmark"]["results"]) == len(cases.gpu_cases("cpu", tiny=True))
    assert (folder.parent / "cache" / "absgd_fast_gpu" / "triton").is_dir()  # unpacked from what `prove` packed
    paths = [str(next(p for p in calls[call][1] if p.suffix == ".json")) for call in BUDGETS]
    assert gpu_report.main(["merge", str(tmp_path / "all.json"), *paths]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "everything passed"


@with_bash
@pytest.mark.parametrize(
    "end, code, died",
    [("killed", 0, "exit code 139, in"), pytest.param("failed", 3, "exit code 3, after", marks=pytest.mark.deep)],
)
def test_a_crash_is_not_repeated(prepared, tmp_path, end, code, died):
    """A kernel that kills its process or its device is met once: no test of its backend, and a report that names it."""
    folder = tmp_path / "folder"
    shutil.copytree(prepared[0], folder)
    (folder / "tests" / "gpu_smoke.py").write_text(SMOKE.format(end=end, code=code))
    out = tmp_path / "out"
    done = gpu_sh("prove", "--rehearse", out, script=folder / "gpu.sh", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((out / "prove.json").read_text(encoding="utf-8"))
    assert list(report["calls"]["prove"]) == ["smoke", "triton", "caches"]
    limits = re.findall(r"at most (\d+) s", (out / "prove.log").read_text())
    assert int(limits[1]) <= 70 + 60 and report["tests"] and len(list(out.iterdir())) <= 8
    assert report["failed"][0] == f"smoke: {died} logit_loss (cpu)" and f"DIED: {died} logit_loss (cpu)" in done.stdout


@pytest.mark.deep
@with_bash
def test_an_operator_that_fails_stops_nothing(prepared, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(prepared[0], folder)
    (folder / "tests" / "gpu_smoke.py").write_text(SMOKE.format(end="failed", code=1))
    done = gpu_sh("prove", "--rehearse", tmp_path / "out", script=folder / "gpu.sh", XDG_CACHE_HOME=str(tmp_path / "cache"))
    report = json.loads((tmp_path / "out" / "prove.json").read_text(encoding="utf-8"))
    assert list(report["calls"]["prove"]) == ["smoke", "cuda", "compile", "triton", "probe", "caches"]
    assert done.returncode == 1 and report["failed"] == ["smoke: 1 operators failed"]


@with_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_call_without_a_gpu(prepared, tmp_path):
    done = gpu_sh("measure", tmp_path / "out", script=prepared[0] / "gpu.sh")
    assert done.returncode == 2 and "no GPU" in done.stderr and list(tmp_path.iterdir()) == []
