"""The two programs that take tests to a GPU without pytest: gpu_runner.py and gpu_smoke.py."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import SkipTest

import gpu_cases
import gpu_runner
import gpu_smoke
import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent


# ---- gpu_runner.py --------------------------------------------------------------------------------------------------------


# Answers like a worker, and does what the test's name says; leaves a mark for each process that was started.
WORKER = """
import json, os, pathlib, sys, time
pathlib.Path(sys.argv[1], str(os.getpid())).touch()
for line in sys.stdin:
    if "hang" in line: time.sleep(60)
    if "die" in line: os.kill(os.getpid(), 11)
    print(json.dumps(dict(test=line.strip(), status="passed", message="", seconds=0, usable="lost" not in line)), flush=True)
"""


@pytest.fixture
def started(monkeypatch, tmp_path):
    """A folder with one file for each worker process that was started."""

    class Worker(gpu_runner.Worker):
        def __init__(self, arguments):
            super().__init__(arguments)
            self.command = [sys.executable, "-c", WORKER, str(tmp_path)]

    monkeypatch.setattr(gpu_runner, "Worker", Worker)
    return tmp_path


def run_all(ids, jobs=1, each=10):
    """{id: (status, message)} of tests that are named after their backend: "cuda die 1"."""
    results = []
    tests = {id: (None, {"where": gpu_cases.Where("cpu", id.split()[0])}) for id in ids}
    gpu_runner.run_all(tests, jobs, 60, each, [], results.append)
    assert sorted(result["test"] for result in results) == sorted(ids)
    return {result["test"]: (result["status"], result["message"]) for result in results}


GIVEN_UP = ("not run", "the backend keeps crashing")


@pytest.mark.parametrize("how", ["die", "lost"])
def test_a_backend_that_keeps_crashing_is_given_up(started, how):
    """Its other tests are not run, whoever else's are; no more processes start than crashes explain."""
    bad = [f"cuda {how} {i}" for i in range(20)]
    found = run_all([*bad, "cuda fine", "triton fine", "reference fine"])
    assert [found[id] == GIVEN_UP for id in bad] == [False] * gpu_runner.CRASHES + [True] * (20 - gpu_runner.CRASHES)
    assert found["cuda fine"] == GIVEN_UP and found["triton fine"] == found["reference fine"] == ("passed", "")
    assert len(list(started.iterdir())) == gpu_runner.CRASHES + 1
    if how == "die":
        assert found[bad[0]] == ("failed", "the process died with exit code -11")


def test_crashes_of_workers_side_by_side_are_counted_together(started):
    found = run_all([f"cuda die {i}" for i in range(40)], jobs=4)
    run = [id for id, result in found.items() if result != GIVEN_UP]
    assert gpu_runner.CRASHES <= len(run) <= gpu_runner.CRASHES + 3  # those that were under way
    assert len(list(started.iterdir())) <= len(run)


def test_those_who_want_to_be_alone_are_given_up_too(started):
    def alone():
        pass

    alone.alone, results = True, []
    tests = {f"cuda die {i}": (None, {"where": gpu_cases.Where("cpu", "cuda")}) for i in range(3)}
    tests["cuda alone"] = (alone, {"where": gpu_cases.Where("cpu", "cuda")})
    gpu_runner.run_all(tests, 1, 60, 10, [], results.append)
    assert (results[-1]["test"], results[-1]["status"], results[-1]["message"]) == ("cuda alone", *GIVEN_UP)


def test_tests_that_take_too_long_are_no_crashes(started):
    ids = [f"cuda hang {i}" for i in range(gpu_runner.CRASHES + 1)]
    found = run_all([*ids, "cuda fine"], each=0.2)
    assert [found[id][1] for id in ids] == ["no answer within 0 s"] * len(ids)


def read(out):
    report = json.loads(out.read_text())
    return report, {test["test"]: test["status"] for test in report["tests"]}


def test_the_run_is_over_at_its_limit(started, monkeypatch, tmp_path):
    """However many workers hang, and with the time before the run counted; those that hang are no longer there afterwards."""
    ids = [f"cpu hang {i}" for i in range(6)]
    tests = {"cpu fine": None} | dict.fromkeys(ids)
    where = gpu_cases.CPU[0]
    monkeypatch.setattr(gpu_runner, "collect", lambda *args: {id: (None, {"where": where}) for id in tests})
    out, before, begin = tmp_path / "out.json", 20, time.perf_counter()
    limit = before + gpu_runner.MARGIN + 1.5
    arguments = ["--device", "cpu", "--backends", "cpu", "--jobs", "3", "--limit", str(limit), "--out", str(out)]
    assert gpu_runner.main(arguments, begin - before) == 1
    assert 1 < time.perf_counter() - begin <= limit - before
    report, found = read(out)
    assert found["cpu fine"] == "passed" and set(found) == set(tests)
    assert [found[id] for id in ids] == ["failed"] * 3 + ["not run"] * 3
    assert (report["passed"], report["failed"], report["not_run"]) == (1, 3, 3)
    said = {failure["message"] for failure in report["failures"]}
    assert all(text.startswith("no answer within") and text.endswith("(the time of the run was over)") for text in said)
    for mark in started.iterdir():
        if mark.name.isdecimal():
            with pytest.raises(ProcessLookupError):
                os.kill(int(mark.name), 0)


def test_a_run_that_is_killed_leaves_what_it_knows(tmp_path):
    """The report is a whole one at any time, with those that were waiting or under way as not run."""
    script = (
        f"import sys; sys.path[:0] = [{str(TESTS)!r}, {str(ROOT)!r}]\n"
        "import gpu_cases, gpu_runner, time\n"
        "gpu_runner.Report.EVERY = 0\n"
        "functions = {'first': lambda where: None, 'second': lambda where: time.sleep(60), 'third': lambda where: None}\n"
        "tests = {id: (function, {'where': gpu_cases.CPU[1]}) for id, function in functions.items()}\n"
        "gpu_runner.collect = lambda *args: tests\n"
        "gpu_runner.main(sys.argv[1:])\n"
    )
    out = tmp_path / "out.json"
    arguments = ["--device", "cpu", "--backends", "reference", "--jobs", "0", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT)
    end = time.perf_counter() + 60
    while time.perf_counter() < end and process.poll() is None and not (out.exists() and read(out)[0]["passed"]):
        time.sleep(0.02)
    process.kill()
    process.wait()
    report, found = read(out)
    assert found == {"first": "passed", "second": "not run", "third": "not run"}
    assert (report["passed"], report["not_run"], report["device"]) == (1, 2, "cpu")


def test_results_are_not_written_one_by_one(tmp_path):
    """A file for each of a thousand results would take the time of tests."""
    report = gpu_runner.Report(["a", "b"], tmp_path / "out.json", device="cpu")
    assert read(tmp_path / "out.json")[1] == {"a": "not run", "b": "not run"}
    report.add(dict(test="a", status="passed", message="", seconds=1))
    assert read(tmp_path / "out.json")[1] == {"a": "not run", "b": "not run"}
    report.written -= report.EVERY
    report.add(dict(test="b", status="skipped", message="why", seconds=1))
    assert read(tmp_path / "out.json")[1] == {"a": "passed", "b": "skipped"}
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_failures_are_run_again_by_their_whole_names(tmp_path):
    """Names with commas; those that begin like another; and one that is no test, which is a failure and not a shorter run."""
    wanted = ["test_grad_scaler[cpu-sgd, dampening 0.5]", "test_certain_rows[cpu]"]
    names, out = tmp_path / "names", tmp_path / "out.json"
    for extra, code in ([], 0), (["test_certain[cpu]"], 1):
        names.write_text("\n".join([*wanted, "", *extra]) + "\n")
        arguments = ["--device", "cpu", "--backends", "cpu", "--jobs", "0", "--only-file", str(names), "--out", str(out)]
        assert gpu_runner.main(arguments) == code
        report = json.loads(out.read_text())
        assert sorted(test["test"] for test in report["tests"]) == sorted([*wanted, *extra])
        assert [failure["test"] for failure in report["failures"]] == extra


def test_a_worker_finds_what_the_runner_asks_for(tmp_path):
    names, out = tmp_path / "names", tmp_path / "out.json"
    names.write_text("test_grad_scaler[reference-sgd, dampening 0.5]\n")
    command = [sys.executable, TESTS / "gpu_runner.py", "--device", "cpu", "--jobs", "1", "--only-file", names, "--out", out]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(out.read_text())["passed"] == 1


def test_what_only_a_gpu_shows_runs_one_at_a_time_where_it_needs_the_memory():
    found = gpu_runner.collect("cuda", {"cuda", "triton", "reference"}, ["hundred_million", "2_to_the_31"])
    assert found and all(function.alone for function, _ in found.values())
    assert {id for id in found if "hundred_million" in id} == {
        f"test_weights_of_a_hundred_million_losses[{backend}]" for backend in ("cuda", "triton")
    }


def test_workers_that_hang_and_die():
    """Each costs one test; the next one finds a new process."""
    script = (
        "import sys, time, json\n"
        "for line in sys.stdin:\n"
        "    if 'hang' in line: time.sleep(60)\n"
        "    if 'die' in line: sys.exit(7)\n"
        "    report = dict(test=line.strip(), status='passed', message='', seconds=0, usable='lost' not in line)\n"
        "    print(json.dumps(report), flush=True)\n"
    )
    worker = gpu_runner.Worker([])
    worker.command = [sys.executable, "-c", script]
    seen = []
    for id in ("a", "hang", "b", "die", "c", "lost", "d"):
        result = worker.run(id, 10 if id != "hang" else 0.5)
        seen.append((result["test"], result["status"], result["message"]))
    worker.stop()
    assert seen == [
        ("a", "passed", ""),
        ("hang", "failed", "no answer within 0 s"),
        ("b", "passed", ""),
        ("die", "failed", "the process died with exit code 7"),
        ("c", "passed", ""),
        ("lost", "passed", ""),
        ("d", "passed", ""),
    ]


def test_a_run_without_pytest():
    def passes(where):
        pass

    def fails(where):
        assert 1 == 2, "one is not two"

    def skips(where):
        raise SkipTest("no reason")

    passes.alone = True
    where = gpu_cases.CPU[1]
    tests = {f.__name__: (f, dict(where=where)) for f in (passes, fails, skips)}
    for limit, statuses in ((60, ["failed", "skipped", "passed"]), (0, ["not run"] * 3)):
        results = []
        gpu_runner.run_all(tests, 0, limit, 10, [], results.append)
        assert [result["test"] for result in results] == ["fails", "skips", "passes"]  # who wants to be alone comes last
        assert [result["status"] for result in results] == statuses
        if limit:
            assert "one is not two" in results[0]["message"] and results[1]["message"] == "no reason"


def test_what_is_collected_without_pytest():
    on_gpu = gpu_runner.collect("cuda", {"cuda", "triton", "reference"}, [])
    assert "test_launches[cuda]" in on_gpu and "test_launches[reference]" not in on_gpu
    assert len(on_gpu) > 400 and next(iter(on_gpu)).split("[")[1].startswith("cuda")
    some = gpu_runner.collect("cpu", {"cpu"}, ["test_tour", "scaler[cpu-sgd, dampening 0.5"])
    assert list(some) == ["test_grad_scaler[cpu-sgd, dampening 0.5]", "test_tour[cpu]"]
    if not torch.cuda.is_available():
        assert gpu_runner.main([]) == 2


# ---- after one test -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pretended(monkeypatch):
    """The CPU as a GPU: what the tests' clean-up asks of torch.cuda, to be made fail."""
    for name, value in (("synchronize", None), ("empty_cache", None), ("memory_reserved", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    where = gpu_cases.Where("cpu", "reference")
    where.gpu, where.why_not = True, lambda: None
    return where


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


def test_a_cache_that_cannot_be_emptied_is_no_lost_context(monkeypatch, pretended):
    """As after a capture that failed. What failed stays the test's own message, and a test that passed has passed."""
    monkeypatch.setattr(torch.cuda, "empty_cache", raising(RuntimeError("captures_underway.empty()")))
    result = gpu_runner.attempt("id", raising(ValueError("not captured")), {"where": pretended})
    assert result["status"] == "failed" and result["usable"] is True
    assert result["message"].startswith("ValueError: not captured") and "captures_underway" in result["message"]
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**32)
    result = gpu_runner.attempt("id", lambda where: None, {"where": pretended})
    assert (result["status"], result["usable"]) == ("passed", True) and "captures_underway" in result["message"]


def test_one_of_our_operators_that_cannot_run_is_no_lost_context(monkeypatch, pretended):
    monkeypatch.setattr(gpu_runner, "one_row", raising(RuntimeError("no kernel image")))
    result = gpu_runner.attempt("id", raising(ValueError("wrong")), {"where": pretended})
    assert result["status"] == "failed" and result["usable"] is True and "no kernel image" in result["message"]


def test_a_device_that_does_not_answer_is_lost(monkeypatch, pretended):
    monkeypatch.setattr(torch.cuda, "synchronize", raising(RuntimeError("illegal memory access")))
    result = gpu_runner.attempt("id", lambda where: None, {"where": pretended})
    assert result["status"] == "failed" and result["usable"] is False
    assert "the CUDA context is lost: illegal memory access" in result["message"]


def test_a_device_that_computes_nothing_is_lost(monkeypatch, pretended):
    monkeypatch.setattr(torch, "ones", raising(RuntimeError("unspecified launch failure")))
    result = gpu_runner.attempt("id", lambda where: None, {"where": pretended})
    assert result["usable"] is False and "unspecified launch failure" in result["message"]


# ---- gpu_smoke.py -------------------------------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_operator_on_the_cpu(tmp_path):
    """In a process of its own, as on a GPU: a line before and one after each operator."""
    out = tmp_path / "out.jsonl"
    command = [sys.executable, TESTS / "gpu_smoke.py", "--device", "cpu", "--out", out]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = lines(out)
    assert found and all(set(line) == {"operator", "backend", "status", "message", "seconds"} for line in found)
    assert [line["status"] for line in found] == ["begun", "passed"] * (len(found) // 2)
    pairs = [(line["operator"], line["backend"]) for line in found]
    assert pairs[::2] == pairs[1::2] and {backend for _, backend in pairs} == {"cpu", "reference"}
    assert {operator for operator, backend in pairs if backend == "cpu"} == set(gpu_smoke.OPERATORS)


def test_triton_is_asked_for_cross_entropy_alone_and_plain_torch_for_no_graph():
    cuda, triton, reference = (gpu_smoke.chosen(where) for where in gpu_cases.GPU)
    assert set(triton) < set(reference) < set(cuda)
    assert set(cuda) - set(reference) == {"scale", "scale_", "graph"}
    assert {"logit_loss", "robust_logit_loss, many rows"} <= set(triton) and len(triton) <= 6


def test_an_operator_that_fails_fails_the_run(monkeypatch, tmp_path, capsys):
    def wrong(where):
        assert 1 == 2, "one is not two"

    monkeypatch.setattr(gpu_smoke, "OPERATORS", {"wrong": wrong, "right": lambda where: None})
    arguments = ["--device", "cpu", "--backends", "reference", "--out", str(tmp_path / "out.jsonl")]
    assert gpu_smoke.main(arguments) == 1
    found = lines(tmp_path / "out.jsonl")
    assert [line["status"] for line in found] == ["begun", "failed", "begun", "passed"]
    assert "one is not two" in found[1]["message"]
    assert "1 of 2 operators passed" in capsys.readouterr().out


def test_nothing_is_tried_after_the_context_is_lost(monkeypatch, tmp_path):
    attempt = gpu_runner.attempt
    monkeypatch.setattr(gpu_smoke, "OPERATORS", {"breaks": lambda where: None, "next": lambda where: None})
    monkeypatch.setattr(gpu_runner, "attempt", lambda *args: attempt(*args) | {"status": "failed", "usable": False})
    assert gpu_smoke.main(["--device", "cpu", "--backends", "reference", "--out", str(tmp_path / "out.jsonl")]) == 3
    assert [line["status"] for line in lines(tmp_path / "out.jsonl")] == ["begun", "failed", "not run"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_unusable(tmp_path):
    assert gpu_smoke.main(["--device", "cuda", "--out", str(tmp_path / "out.jsonl")]) == 3
    assert {line["status"] for line in lines(tmp_path / "out.jsonl")} == {"not run"}


def fails(where):
    raise ValueError("wrong number")


@pytest.mark.parametrize(
    "operators, lost, code",
    [
        ({"right": lambda where: None}, False, 0),
        ({"right": lambda where: None, "wrong": fails}, False, 1),
        ({"wrong": fails, "right": lambda where: None}, True, 3),
        ({"right": lambda where: None, "wrong": fails}, True, 3),  # the last one too
    ],
)
def test_the_exit_code_says_whether_the_device_can_still_be_used(monkeypatch, pretended, tmp_path, operators, lost, code):
    """A wrong number leaves the rest to be tried; a lost context does not."""

    def synchronize():
        if lost and found and found[-1] == "wrong":
            raise RuntimeError("an illegal memory access was encountered")

    found = []
    tried = {
        name: lambda where, name=name, function=function: (found.append(name), function(where))
        for name, function in operators.items()
    }
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(gpu_smoke, "OPERATORS", tried)
    monkeypatch.setattr(gpu_cases, "CPU", [pretended])
    assert gpu_smoke.main(["--device", "cpu", "--backends", "reference", "--out", str(tmp_path / "out.jsonl")]) == code
    assert found == (list(operators)[: list(operators).index("wrong") + 1] if lost else list(operators))


def test_the_last_line_names_the_operator_that_crashed(tmp_path):
    script = (
        f"import os, sys; sys.path[:0] = [{str(TESTS)!r}, {str(ROOT)!r}]\n"
        "import gpu_smoke\n"
        "gpu_smoke.OPERATORS = {'fine': lambda where: None, 'crashes': lambda where: os.kill(os.getpid(), 11)}\n"
        "gpu_smoke.main(sys.argv[1:])\n"
    )
    out = tmp_path / "out.jsonl"
    arguments = ["--device", "cpu", "--backends", "reference", "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True)
    assert done.returncode == -11
    assert [(line["operator"], line["status"]) for line in lines(out)] == [
        ("fine", "begun"),
        ("fine", "passed"),
        ("crashes", "begun"),
    ]


def test_a_backend_that_cannot_run_has_proved_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_cases.Where, "why_not", lambda self: "it is not there")
    assert gpu_smoke.main(["--device", "cpu", "--backends", "cpu", "--out", str(tmp_path / "out.jsonl")]) == 1
    found = lines(tmp_path / "out.jsonl")
    assert {line["status"] for line in found} == {"not run"} and found[0]["message"] == "it is not there"
