"""benchmarks/gpu_report.py: figures are judged, and what a call left is put together."""

import json
import math
from pathlib import Path

import pytest
from bench_cases import (
    GPU_SH,
    cases,
    gpu_report,
    same_path,  # noqa: F401 (a fixture)
)

# ---- gpu.sh and what it leaves ---------------------------------------------------------------------------------------


def measured(median):
    return {"median": median, "q1": median, "q3": median}


def a_report():
    ours = {"us": measured(10.0), "host_us": measured(5.0), "peak_bytes": 12}
    ours["launches"] = {"forward": ["a"], "backward": ["b", "c"]}
    theirs = {"us": measured(20.0), "ratio": measured(0.5), "met": False, "note": "a twin", "peak_bytes": 10}
    result = {"suite": "gpu loss", "case": "x", "bytes": 900, "absent": {}}
    result["peers"] = {"absgd_fast": ours, "absgd package": theirs}
    wrong = {"suite": "gpu loss", "case": "y", "wrong": "off by 1"}
    return {"copy": {"bytes_per_us": measured(100.0)}, "results": [result, wrong], "figures": [], "not_measured": ["z"]}


def test_figures_are_judged():
    report = a_report()
    bounds = {"share of copy": (0.85, math.inf), "forward launches": (1, 1), "backward launches": (0, 1), "host us": (0, 20)}
    case = cases.Case("gpu loss", "x", None, {"absgd package": 0.25, "Liger": 1.0}, bounds, {"absgd package": 1.1, "Liger": 1.1})
    gpu_report.finish(report, [case])
    gpu_report.finish(report, [case])  # as after every case
    assert report["results"][0]["peers"]["absgd_fast"]["share"]["median"] == pytest.approx(0.9)
    met = {figure["figure"]: figure["met"] for figure in report["figures"]}
    assert met == {
        "time over absgd package": False,
        "memory over absgd package": False,
        "share of copy": True,
        "forward launches": True,
        "backward launches": False,
        "host us": True,
        "time over Liger": None,
        "memory over Liger": None,
    }
    assert report["figures"][4]["most"] is None and json.dumps(report)
    lines = gpu_report.lines(report)
    assert lines[0].split()[:3] == ["gpu", "loss", "us"] and lines[1].split() == [
        "x",
        "10",
        "0%",
        "5",
        "–",
        "90%",
        "1+2",
        "0.50!",
    ]
    assert "WRONG" in lines[2] and "absgd package: a twin" in lines and "not measured: z" in lines
    assert lines[-5:] == [
        "not judged: 2: x: time over Liger; x: memory over Liger",
        "figures: 3 of 6 met ('!' above: missed, '?': too noisy)",
        "missed: gpu loss, x: time over absgd package 0.5, wanted <= 0.25",
        "missed: gpu loss, x: memory over absgd package 1.2, wanted <= 1.1",
        "missed: gpu loss, x: backward launches 2, wanted <= 1",
    ]


def test_no_figure_disappears():
    """Neither of a case that was wrong nor of one that was not measured."""
    report, bounds = a_report(), {"share of copy": (0.85, math.inf), "step launches": (1, 1), "host us": (0, 20)}
    some = [cases.Case("gpu loss", name, None, {"Liger": 1.0}, bounds, {"Liger": 1.1}) for name in "yz"]
    gpu_report.finish(report | {"results": report["results"][1:]}, some)  # without x; y is wrong, z was not measured
    gpu_report.finish(report, [cases.Case("gpu loss", "x", None), *some])
    assert [figure["case"] for figure in report["figures"]] == ["y"] * 5 + ["z"] * 5
    assert all(figure["value"] is None and figure["met"] is None for figure in report["figures"])
    assert any(line.startswith("not judged: 10: y: time over Liger; ") for line in gpu_report.lines(report))


def test_where_one_block_stops_to_pay():
    results = [
        {"case": name, "peers": {"absgd_fast": {"graph_us": measured(a)}, "from statistics": {"graph_us": measured(2.0)}}}
        for name, a in (("1k", 1.0), ("4k", 1.5), ("16k", 3.0))
    ]
    assert gpu_report._limit(results) == ["one block over statistics, graph_us: median 0.75; slower at 16k (1.50)"]


def test_stages_are_read_from_the_log():
    """A call that was killed leaves a stage without an end."""
    log = "==== smoke: at most 35 s\na line\n==== smoke: exit code 139 after 3 s\n==== triton: at most 92 s\nhalf a line"
    assert gpu_report.stages(log) == {
        "smoke": {"exit": 139, "seconds": 3, "limit": 35, "said": ["a line"]},
        "triton": {"exit": None, "seconds": None, "limit": 92, "said": ["half a line"]},
    }
    assert gpu_report.stages("") == {}


def test_half_a_line_hides_no_end():
    """gpu.sh puts an empty line before the end of a stage, whose command may have been killed amid a line."""
    assert "printf '\\n==== %s: exit code" in GPU_SH.read_text(encoding="utf-8")
    found = gpu_report.stages("==== cuda: at most 9 s\nhalf a line\n==== cuda: exit code 124 after 9 s\n")
    assert found["cuda"]["exit"] == 124


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_stage_without_results_runs_again_as_a_whole(name):
    stage = {"exit": 124, "seconds": 9, "said": []}
    tests, _ = gpu_report.tested({}, stage, name)
    tests["test_a[cuda-x, 1]"] = {"status": "not run"}
    assert gpu_report.to_run_again({"tests": tests}) == [f"[{name}", "test_a[cuda-x"]
    tests[f"stage {name}"]["status"] = "passed"
    assert gpu_report.to_run_again({"tests": tests}) == ["test_a[cuda-x"]


def smoke_lines(*lines):
    of = ("operator", "backend", "status")
    return "".join(json.dumps(dict(zip(of, line)) | dict(message="", seconds=0)) + "\n" for line in lines)


RIGHT = [("logit_loss", "cuda", "begun"), ("logit_loss", "cuda", "passed")]


@pytest.mark.parametrize(
    "lines, code, done, died",
    [
        (RIGHT, 0, 1, None),
        ([*RIGHT, ("scale", "cuda", "failed")], 1, 2, None),
        ([*RIGHT, ("scale", "cuda", "begun")], 139, 1, "exit code 139, in scale (cuda)"),
        (RIGHT, 124, 1, "exit code 124, after logit_loss (cuda)"),
        ([], 2, 0, "exit code 2, before its first operator | no such file"),
    ],
)
def test_what_the_smoke_test_came_to(lines, code, done, died):
    stage = {"exit": code, "said": ["Traceback", "no such file"]}
    found = gpu_report.smoked(smoke_lines(*lines) + '{"operator": "half a li', stage)
    assert len(found["operators"]) == done and found.get("died") == died


@pytest.mark.parametrize(
    "log, code, errors, reason",
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors", 0, 0, None),
        ("========= ERROR SUMMARY: 3 errors", 9, 3, None),
        ("========= ERROR SUMMARY: 0 errors", 1, 0, "what ran under it failed"),
        ("========= Error: Device not supported\n========= ERROR SUMMARY: 1 error", 1, None, "ERROR SUMMARY"),
        ("========= ERROR SUMMARY: 0 errors", 124, None, "stopped after 60 s"),
        ("========= Invalid __global__ write\n=========     at x\n========= Misaligned address", 124, 2, "stopped after 60 s"),
        ("========= Invalid __global__ read of size 4 bytes", 139, 1, "no summary"),
        ("timeout: failed to run command: No such file", 127, None, "it said nothing"),
    ],
)
def test_what_a_sanitizer_said(log, code, errors, reason):
    found = gpu_report.sanitized({"exit": code, "seconds": 1, "limit": 60, "said": log.splitlines()})
    assert found["errors"] == errors and (reason is None or reason in found["reason"])


def left_by_tests(**statuses):
    """What gpu_runner.py leaves; names with _ for what an identifier cannot hold."""
    found = {name.replace("__", "[cuda-") + "]": status for name, status in statuses.items()}
    failures = [dict(test=name, message="off\nby one") for name, status in found.items() if status == "failed"]
    tests = [dict(test=name, status=status, seconds=1) for name, status in found.items()]
    return dict(failures=failures, tests=tests, skips={"needs two GPUs": 1} if "skipped" in found.values() else {})


@pytest.fixture
def a_call(tmp_path, monkeypatch):
    """a_call(name, {stage: exit code}, {file: text or JSON}) -> what gpu_report makes of a call that left these."""
    monkeypatch.chdir(tmp_path)
    manifest = dict(commit="abc", torch="2.11", architectures="90-real")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    def make(call, codes, pieces):
        folder = tmp_path / "pieces"
        folder.mkdir()
        for name, value in pieces.items():
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        said = {"memcheck": "========= ERROR SUMMARY: 0 errors\n"}
        log = "".join(f"==== {s}: at most 9 s\n{said.get(s, '')}==== {s}: exit code {c} after 5 s\n" for s, c in codes.items())
        (tmp_path / f"{call}.log").write_text(log)
        code = gpu_report.main(["call", call, str(tmp_path), "--gpu", "a card"])
        assert not folder.exists()
        report = json.loads((tmp_path / f"{call}.json").read_text(encoding="utf-8"))
        assert code == (1 if report["failed"] else 0)
        return report

    return make


def a_bench(**changes):
    bench = a_report() | {"gpu": {"name": "NVIDIA H200"}, "date": "now", "hardware": {}, "versions": {}}
    bench["results"].pop()
    return bench | changes


ALL_WELL = dict(smoke=0, cuda=0, triton=0, compile=0, probe=0, caches=0)
LEFT = {
    "smoke.jsonl": smoke_lines(*RIGHT),
    "cuda.json": left_by_tests(test_a__x="passed", test_b__y="skipped"),
    "triton.json": left_by_tests(test_c__x="passed"),
    "bench.json": a_bench(),
}


def test_one_call_in_one_json(a_call, capsys):
    report = a_call("prove", ALL_WELL, LEFT)
    assert set(report) == {
        *gpu_report.OF_THE_BENCHMARK,
        "manifest",
        "calls",
        "logs",
        "smoke",
        "tests",
        "skips",
        "sanitizer",
        "benchmark",
        "failed",
    }
    assert report["gpu"] == {"name": "NVIDIA H200"} and report["manifest"]["commit"] == "abc" and report["failed"] == []
    assert report["calls"]["prove"]["probe"] == {"exit": 0, "seconds": 5, "limit": 9} and report["logs"] == {"prove": {}}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == ["everything passed", f"written: {Path.cwd() / 'prove.json'}"]
    assert "tests: 2 passed, 0 failed, 1 skipped, 0 not run" in printed and "  skipped 1: needs two GPUs" in printed
    assert "smoke: 1 operators right, 0 wrong" in printed
    assert "prove: smoke 5 s, cuda 5 s, triton 5 s, compile 5 s, probe 5 s, caches 5 s" in printed


@pytest.mark.parametrize(
    "codes, left, words",
    [
        (
            dict(smoke=1),
            {"smoke.jsonl": smoke_lines(*RIGHT, ("scale", "cuda", "failed"))},
            ["smoke: 1 operators failed", "FAILED scale (cuda)"],
        ),
        (dict(smoke=139), {"smoke.jsonl": smoke_lines(("scale", "cuda", "begun"))}, ["DIED: exit code 139, in scale (cuda)"]),
        (
            dict(cuda=1),
            {"cuda.json": left_by_tests(test_a__x="failed", test_b__x="passed")},
            ["1 failed, 0 not run", "FAILED test_a[cuda-x]: off by one"],
        ),
        (dict(cuda=1), {"cuda.json": left_by_tests(test_a__x="not run", test_b__x="passed")}, ["0 failed, 1 not run"]),
        (dict(cuda=124), {"cuda.json": ""}, ["FAILED stage cuda: no result: exit code 124 after 5 s", "cuda 5 s, stopped"]),
        (dict(probe=1), {"bench.json": a_bench(results=[dict(suite="gpu loss", case="y", wrong="off by 1")])}, ["wrong at y"]),
        (dict(probe=1), {"bench.json": "{"}, ["benchmark: no result"]),
        (dict(probe=1), {}, ["FAILED: probe: exit code 1"]),
        (
            dict(probe=139),
            {"bench.json": a_bench(results=[dict(suite="gpu loss", case="y", wrong="off by 1")])},
            ["wrong at y; probe: exit code 139"],
        ),
    ],
    ids=range(9),
)
def test_a_failure_ends_in_exit_code_1(a_call, capsys, codes, left, words):
    report = a_call("prove", ALL_WELL | codes, LEFT | left)
    printed = capsys.readouterr().out
    assert report["failed"] and all(word in printed for word in words), printed


def test_several_calls_as_one(a_call, tmp_path, capsys):
    """What `again` found stands for what `prove` did, and the benchmark for the probe."""
    tests = left_by_tests(test_a__x="failed", test_b__y="not run", test_d__z="failed", test_e__z="passed")
    tests["tests"].append(dict(test="test_f[cuda-sgd, dampening 0.5]", status="failed", seconds=1))
    a_call("prove", ALL_WELL | dict(cuda=1, probe=1), LEFT | {"cuda.json": tests, "bench.json": a_bench(results=[])})
    assert gpu_report.main(["failed", "prove.json"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "test_a[cuda-x],test_b[cuda-y],test_d[cuda-z],test_f[cuda-sgd"
    left = left_by_tests(test_a__x="passed", test_b__y="passed", test_d__z="failed")
    left["tests"].append(dict(test="test_f[cuda-sgd, dampening 0.5]", status="passed", seconds=1))
    a_call("again", dict(failed=1, large=0, memcheck=0), {"failed.json": left, "large.json": left_by_tests(test_g__z="passed")})
    a_call("measure", dict(bench=0), {"bench.json": a_bench(not_measured=[])})
    calls = [f"{name}.json" for name in ("prove", "again", "measure")]
    assert gpu_report.main(["merge", "all.json", *calls]) == 1
    report = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert report["failed"] == ["tests: 1 failed, 0 not run"] and list(report["calls"]) == ["prove", "again", "measure"]
    assert report["tests"]["test_a[cuda-x]"]["status"] == "passed" and report["tests"]["test_g[cuda-z]"]["status"] == "passed"
    assert report["benchmark"]["results"] and report["benchmark"]["not_measured"] == []
    assert report["sanitizer"]["memcheck"] == {"errors": 0} and report["smoke"]["operators"]
    printed = capsys.readouterr().out
    assert "memcheck: 0 errors" in printed and "FAILED test_d[cuda-z]: off by one" in printed
    assert gpu_report.main(["failed", "nowhere.json"]) == 0 and capsys.readouterr().out == "\n"


def test_a_call_without_gpu_tests_has_not_proved_nothing(a_call):
    report = a_call("measure", dict(bench=0), {"bench.json": a_bench()})
    assert report["failed"] == [] and report["tests"] == {}
