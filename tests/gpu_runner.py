"""The tests of test_gpu_*.py on a machine with a GPU, without pytest.

    python tests/gpu_runner.py [--out FILE.json]

Worker processes take the tests, so that a kernel that hangs or breaks its CUDA context costs one test and not the run; a backend
that does so again and again is given up. (`pytest tests/test_gpu_*.py` runs the same bodies on the CPU's backends; what only a
GPU can show is skipped.)
"""

import argparse
import gc
import importlib
import itertools
import json
import os
import select
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest import SkipTest

STARTED = time.perf_counter()  # before torch, whose import counts as time of the run
TESTS = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import torch  # noqa: E402
from gpu_cases import CPU, GPU, INF  # noqa: E402
from gpu_hooks import setup_function, teardown_function  # noqa: E402

from absgd_fast import _backend, ops  # noqa: E402
from absgd_fast.functional import logit_loss  # noqa: E402

ROOMS = ("losses", "robust", "steps", "training", "graphs", "device")  # test_gpu_*.py, in the order in which they run


def bodies():
    """{name: function} of every test in the rooms. A name stands for one test only."""
    out = {}
    for module in (importlib.import_module(f"test_gpu_{room}") for room in ROOMS):
        for name, function in vars(module).items():
            if name.startswith("test_"):
                assert out.setdefault(name, function) is function, f"{name} stands in {module.__name__} and in another room"
    return out


def collect(device, backends, only):
    """{id: (function, arguments)} of every test for a device, those of the fastest backend first."""
    out = {}
    for where in (where for where in CPU + GPU if where.device.type == device and where.backend in backends):
        for name, function in bodies().items():
            if where.backend == "reference" and getattr(function, "gpu", False):
                continue
            if getattr(function, "gpu", False) and not where.gpu:
                continue
            tables = getattr(function, "tables", {})
            for entries in itertools.product(*(table.items() for table in tables.values())):
                id = f"{name}[{'-'.join([where.backend, *(entry[0] for entry in entries)])}]"
                if not only or any(part in id for part in only):
                    out[id] = function, dict(zip(tables, (entry[1] for entry in entries)), where=where)
    return out


def one_row(where):
    return logit_loss(torch.zeros(1, 2, device=where.device), torch.zeros(1, dtype=torch.int64, device=where.device))


def clean_up(where, failed):
    """What the test has left behind, so that the next one does not meet it. That this fails says nothing of the device: torch
    2.11 does not empty its cache once a capture has failed. Returns what went wrong, as words."""
    steps = [gc.collect, torch.cuda.empty_cache] if failed or torch.cuda.memory_reserved() > 2**31 else []  # others want it
    if failed:  # a label out of range that nobody was told of is no error of the next test's
        steps += [partial(ops.reported_labels, check=True), partial(one_row, where)]
    said = ""
    for step in steps:
        try:
            step()
        except IndexError:
            pass
        except Exception as error:
            said += f"\nafterwards: {type(error).__name__}: {error}"
    return said[:1000]


def device_works(where):
    """torch alone computes on it: raises what it says if it does not."""
    torch.cuda.synchronize()
    assert torch.ones(2, device=where.device).sum().item() == 2


def attempt(id, function, arguments):
    """The result of one test; `usable`: the device can still be used."""
    start, where = time.perf_counter(), arguments["where"]
    status, message, usable = "passed", "", True
    setup_function()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**arguments)
            where.synchronize()  # a failure of a kernel belongs to the test that launched it
    except SkipTest as reason:
        status, message = "skipped", str(reason)
    except Exception as error:
        status = "failed"
        where_from = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        message = f"{type(error).__name__}: {str(error).strip()[:1500]}\n(at {' > '.join(where_from[-4:])})"
    finally:
        teardown_function()
    if where.gpu:
        message += clean_up(where, status == "failed")
        try:
            device_works(where)
        except Exception as error:
            status, message, usable = "failed", f"{message}\nthe CUDA context is lost: {error}"[:2500], False
    return dict(test=id, status=status, message=message, seconds=round(time.perf_counter() - start, 2), usable=usable)


def serve(tests):
    """A worker: takes ids from stdin, answers one line of JSON each. What tests print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(attempt(line.strip(), *tests[line.strip()])), file=answers, flush=True)


class Worker:
    """A process that runs one test after the other, and is replaced when it hangs or dies."""

    def __init__(self, arguments):
        self.command, self.process = [sys.executable, str(Path(__file__).resolve()), "--worker", *arguments], None

    def run(self, id, seconds):
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        start = time.perf_counter()
        try:
            print(id, file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], seconds)[0]:
                self.stop()
                return dict(test=id, status="failed", message=f"no answer within {seconds:.0f} s", seconds=round(seconds, 2))
            result = json.loads(self.process.stdout.readline())
            if not result["usable"]:
                self.stop()
            return result
        except (BrokenPipeError, json.JSONDecodeError):
            with suppress(subprocess.TimeoutExpired):  # it has closed its pipe, and ends now
                self.process.wait(PATIENCE)
            message = f"the process died with exit code {self.process.poll()}"
            self.stop()
            seconds = round(time.perf_counter() - start, 2)
            return dict(test=id, status="failed", message=message, seconds=seconds, usable=False)

    def stop(self):
        if self.process is not None:
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):  # one that waits in the driver ends when that lets it go
                self.process.wait(PATIENCE)
            self.process = None


PATIENCE = 1.2  # Seconds for a worker to end.
# Seconds before the limit at which no test runs any more: time for four waits of PATIENCE, two for a worker that died at the last
# moment and two for the others, and for the report.
MARGIN = 5.0


def stop(workers):
    """All at once, so that they wait together."""
    for worker in workers:
        if worker.process is not None:
            worker.process.kill()
    for worker in workers:
        worker.stop()


STATUSES = ("passed", "failed", "skipped", "not run")


def not_run(id):
    return dict(test=id, status="not run", message="out of time", seconds=0)


CRASHES = 3  # A start costs a worker seconds. A backend that broke so many has a fault that more tests would only meet again.


def run_all(tests, jobs, limit, each, arguments, on_result):
    """Every test in one of `jobs` workers (0: in this process); those that want the memory for themselves come last, one at a
    time. After CRASHES workers that died or lost their CUDA context the rest of that backend's tests are not run."""
    end, crashes = time.perf_counter() + limit, Counter()
    queue = [id for id, (function, _) in tests.items() if not getattr(function, "alone", False)]
    alone = [id for id in tests if id not in set(queue)]
    lock = threading.Lock()

    def take(ids, run):
        while True:
            with lock:
                id = ids.pop(0) if ids else None
            if id is None:
                return
            left, backend = end - time.perf_counter(), tests[id][1]["where"].backend
            result = not_run(id)
            if crashes[backend] >= CRASHES:
                result["message"] = "the backend keeps crashing"
            elif left > 0:
                result = run(id, min(each, left))
                if result["status"] == "failed" and time.perf_counter() > end:
                    result["message"] += " (the time of the run was over)"
            with lock:
                crashes[backend] += not result.get("usable", True)  # a test that took too long says nothing of the next
                on_result(result)

    if not jobs:
        take(queue + alone, lambda id, seconds: attempt(id, *tests[id]))
        return
    workers = [Worker(arguments) for _ in range(min(jobs, max(1, len(queue))))]
    threads = [threading.Thread(target=take, args=(queue, worker.run)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop(workers[1:])
    take(alone, workers[0].run)
    stop(workers)


class Report:
    """The results so far, on disk every second: whoever is stopped in between leaves what it knows."""

    EVERY = 1.0  # seconds

    def __init__(self, tests, out, **about):
        self.queued, self.out, self.about = dict.fromkeys(tests), out, about
        self.results, self.start, self.written = [], time.perf_counter(), -INF
        self.write()

    def add(self, result):
        self.queued.pop(result["test"], None)
        self.results.append(result)
        if result["status"] != "passed":
            print(f"{result['status']}: {result['test']}: {result['message']}", flush=True)
        if time.perf_counter() > self.written + self.EVERY:
            self.write()

    def content(self):
        results = self.results + [not_run(id) for id in self.queued]
        count = Counter(result["status"] for result in results)
        return {
            **self.about,
            "seconds": round(time.perf_counter() - self.start, 1),
            **{name.replace(" ", "_"): count[name] for name in STATUSES},
            "failures": [{k: result[k] for k in ("test", "message")} for result in results if result["status"] == "failed"],
            "skips": dict(Counter(result["message"] for result in results if result["status"] == "skipped")),
            "tests": [{k: result[k] for k in ("test", "status", "seconds")} for result in results],
        }

    def write(self):
        """Never half of it: a reader finds the one before or this one."""
        content, self.written = self.content(), time.perf_counter()
        if self.out:
            new = self.out.with_name(self.out.name + ".new")
            new.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(new, self.out)
        return content


def main(argv=None, started=None):
    """started: since when the limit counts."""
    started = time.perf_counter() if started is None else started
    parser = argparse.ArgumentParser("gpu_runner.py", description="Every backend of a GPU against the oracle, without pytest.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the bodies that need no GPU, to try them")
    parser.add_argument("--backends", help="with commas; default: all of the device")
    parser.add_argument("--only", default="", help="parts of names, with commas")
    parser.add_argument("--only-file", type=Path, help="a file of whole names, one a line: what failed in an earlier run")
    jobs = min(8, max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--jobs", type=int, default=jobs, help="processes; 0: this one, where nobody stops a test")
    parser.add_argument("--limit", type=float, default=170, help="seconds for all, the start of this process included")
    parser.add_argument("--each", type=float, default=30, help="seconds for one test")
    parser.add_argument("--out", type=Path, help="where the results go, as JSON, from the first one on")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        reason = _backend.why_not("cuda")
        print(f"gpu_runner.py: torch sees no CUDA GPU ({reason}); --device cpu tries what needs none", file=sys.stderr)
        return 2
    known = {where.backend: where for where in CPU + GPU if where.device.type == options.device}
    backends = options.backends.split(",") if options.backends else list(known)
    if not set(backends) <= set(known):
        parser.error(f"--backends: got {options.backends!r}, expected some of {', '.join(known)}")
    missing = {name: reason for name in backends if (reason := known[name].why_not())}
    tests = collect(options.device, set(backends) - set(missing), [part for part in options.only.split(",") if part])
    if options.worker:
        torch.set_num_threads(1)  # the cores have other workers
        serve(tests)
        return 0
    # a backend that cannot run here has proved nothing
    unknown = {f"backend {name}": reason for name, reason in missing.items()}
    if options.only_file:
        wanted = list(dict.fromkeys(filter(None, map(str.strip, options.only_file.read_text().splitlines()))))
        unknown = {id: "there is no test of this name for these backends" for id in wanted if id not in tests} | unknown
        tests = {id: test for id, test in tests.items() if id in set(wanted)}

    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    report = Report(tests, options.out, device=device, backends=backends)
    for id, reason in unknown.items():
        report.add(dict(test=id, status="failed", message=reason, seconds=0))
    arguments = ["--device", options.device, "--backends", ",".join(backends)]
    left = options.limit - MARGIN - (time.perf_counter() - started)
    run_all(tests, options.jobs, left, options.each, arguments, report.add)
    found = report.write()
    count = {name: found[name.replace(" ", "_")] for name in STATUSES}
    print(", ".join(f"{count[name]} {name}" for name in STATUSES), f"in {found['seconds']} s")
    return 1 if count["failed"] or count["not run"] or not count["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
