"""What is told of a run on a GPU: the figures it was to reach, and short tables in plain text.

    python -m benchmarks.gpu_report WORK OUT_DIR

puts together what benchmarks/gpu.sh left in the folder WORK (stages.txt, build.txt, tests.json, bench.json and the logs) as
OUT_DIR/<gpu>.json:

    date, commit, gpu, hardware, versions     of the benchmark's report (see run.py)
    stages       {name: {exit, seconds, limit}}; exit 124: stopped at its limit
    build        _build_info.json of what was built, log: the end of the log
    tests        passed, failed, skipped, not_run, failures [{test, message}], skips {reason: tests}, tests (see tests/test_gpu.py)
    sanitizer    {tool: {errors: a number, or null with `reason`}, log: the end of the log}
    benchmark    the rest of the benchmark's report
    failed       what ends in exit code 1

and prints the tables. Exit code 1 if the build or a test failed, a sanitizer found something, or a result of ours was wrong.
"""

import json
import re
import statistics
import sys
from pathlib import Path

OURS = "absgd_fast"
TOOLS = ("memcheck", "racecheck")


# ---- the benchmark's figures -----------------------------------------------------------------------------------------


def finish(report, cases):
    """Adds to a benchmark's report what follows from all its measurements: shares of the copy's speed, and the figures."""
    named, report["figures"] = {(case.suite, case.name): case for case in cases}, []
    for result in report["results"]:
        if "wrong" in result:
            continue
        if report["copy"]:
            by_copy = result["bytes"] / report["copy"]["bytes_per_us"]["median"]  # µs
            for peer in result["peers"].values():
                peer["share"] = {
                    name: by_copy / peer["us"][of] for name, of in (("median", "median"), ("q1", "q3"), ("q3", "q1"))
                }
        case, ours = named[result["suite"], result["case"]], result["peers"][OURS]
        for name, most in case.targets.items():
            if name in result["peers"]:
                _judge(report, result, f"time over {name}", result["peers"][name]["ratio"]["median"], 0, most)
        for name, (least, most) in case.bounds.items():
            _judge(report, result, name, _value(ours, name), least, most)


def _value(peer, name):
    if name.endswith(" launches"):
        seen = peer["launches"][name.removesuffix(" launches")]
        return None if seen is None else len(seen)
    measured = {"host us": "host_us", "share of copy": "share"}[name]
    return peer[measured]["median"] if measured in peer else None


def _judge(report, result, figure, value, least, most):
    met = None if value is None else bool(least <= value <= most)
    most = None if most == float("inf") else most
    place = {"suite": result["suite"], "case": result["case"], "figure": figure}
    report["figures"].append(place | {"value": value, "least": least, "most": most, "met": met})


# ---- tables ----------------------------------------------------------------------------------------------------------


def _us(spread):
    return "–" if spread is None else f"{spread['median']:.3g}" if spread["median"] < 1000 else f"{spread['median']:.0f}"


def progress(result):
    place = f"{result['suite']}: {result['case']}"
    if "wrong" in result:
        return f"{place}: WRONG: {result['wrong']}"
    return f"{place}: " + ", ".join(f"{name} {_us(peer['us'])} us" for name, peer in result["peers"].items())


def table(rows):
    """Lines of equal columns, the first to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths))) for row in rows]


def _line(result, others):
    if "wrong" in result:
        return [result["case"], "WRONG", *[""] * (len(HEAD) - 1 + len(others))]
    ours = result["peers"][OURS]
    width = (ours["us"]["q3"] - ours["us"]["q1"]) / ours["us"]["median"]
    launches = "+".join("–" if seen is None else str(len(seen)) for seen in ours["launches"].values())
    share = f"{100 * ours['share']['median']:.0f}%" if "share" in ours else "–"
    times = [_us(ours["us"]), f"{100 * width:.0f}%", _us(ours["host_us"]), _us(ours.get("graph_us"))]
    line = [result["case"], *times, share, launches]
    for name in others:
        peer = result["peers"].get(name)
        line.append("–" if peer is None else f"{peer['ratio']['median']:.2f}{'!' if peer['met'] is False else ''}")
    return line


HEAD = ("us", "IQR", "host us", "graph us", "of copy", "launches")
SHORT = {"absgd package": "absgd", "torch.compile": "compile", "cross_entropy": "CE", "absgd_fast, triton": "triton"}


def lines(report):
    """A benchmark's report in a screenful: medians of ours, and ours over theirs."""
    out = []
    for suite in dict.fromkeys(result["suite"] for result in report["results"]):
        results = [result for result in report["results"] if result["suite"] == suite]
        others = list(dict.fromkeys(name for result in results for name in result.get("peers", {}) if name != OURS))
        head = [suite, *HEAD, *("/ " + SHORT.get(name, name) for name in others)]
        out += table([head, *(_line(result, others) for result in results)])
        if suite == "gpu limit":
            out += _limit(results)
    if report["copy"]:
        out.append(f"copy: {report['copy']['bytes_per_us']['median'] / 1e6:.2f} TB/s")
    absent = {}
    for result in report["results"]:
        for name, reason in result.get("absent", {}).items():
            absent.setdefault(f"left out: {name}: {reason}", []).append(result["case"])
    out += [f"{what} ({len(places)} cases)" for what, places in absent.items()]
    peers = [named for result in report["results"] for named in result.get("peers", {}).items()]
    out += sorted({f"{name}: {peer['note']}" for name, peer in peers if "note" in peer})
    out += [f"not measured: {name}" for name in report["not_measured"]]
    judged = [figure for figure in report["figures"] if figure["met"] is not None]
    out.append(f"figures: {sum(figure['met'] for figure in judged)} of {len(judged)} met ('!' above: missed)")
    for figure in judged:
        if not figure["met"]:
            bound = f">= {figure['least']:g}" if figure["value"] < figure["least"] else f"<= {figure['most']:g}"
            out.append(f"missed: {figure['suite']}, {figure['case']}: {figure['figure']} {figure['value']:.3g}, wanted {bound}")
    return out


def _limit(results):
    """Where making the gradient in the forward pass stops to pay, by replays (by calls, where nothing could be captured)."""
    out = []
    right = [result for result in results if "wrong" not in result and "from statistics" in result["peers"]]
    for key in ("graph_us", "us"):
        pairs = [(result["case"], result["peers"][OURS], result["peers"]["from statistics"]) for result in right]
        ratios = [(case, a[key]["median"] / b[key]["median"]) for case, a, b in pairs if key in a and key in b]
        slower = [f"{case} ({ratio:.2f})" for case, ratio in ratios if ratio > 1]
        if ratios:
            middle = statistics.median(ratio for _, ratio in ratios)
            out.append(f"one block over statistics, {key}: median {middle:.2f}; slower at {', '.join(slower) or 'none'}")
    return out


# ---- everything that gpu.sh left -------------------------------------------------------------------------------------


def _text(path):
    return path.read_text(errors="replace") if path.exists() else ""


def _json(path):
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError:
        return {}


def _end(text, lines=30):
    return [line[:300] for line in text.splitlines()[-lines:]]


def stages(text):
    """stages.txt: name, exit code, seconds, limit; one stage a line."""
    rows = (line.split() for line in text.splitlines())
    return {name: {"exit": int(code), "seconds": int(seconds), "limit": int(limit)} for name, code, seconds, limit in rows}


def sanitized(log, stage):
    """What a sanitizer said: {errors, reason if it could not say}. It was shown no other kernels than ours."""
    if stage is None:
        return {"errors": None, "reason": "not run"}
    found = re.search(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: \d+ hazards? displayed \()(\d+) error", log)
    if stage["exit"] == 124:
        return {"errors": None, "reason": f"stopped after {stage['limit']} s"}
    if found is None or "Device not supported" in log:
        said = [line for line in log.splitlines() if line.startswith("=========") and line.strip("= ")]
        return {"errors": None, "reason": said[-1] if said else "it said nothing: see the log"}
    return {"errors": int(found[1])} | ({} if stage["exit"] in (0, 9) else {"reason": "what ran under it failed: see the log"})


def collect(work):
    """The whole report."""
    logs = {name: _text(work / f"{name}.log") for name in ("build", "tests", "bench", *TOOLS)}
    ran, tests, bench = stages(_text(work / "stages.txt")), _json(work / "tests.json"), _json(work / "bench.json")
    report = {name: bench.pop(name, None) for name in ("date", "gpu", "hardware", "versions", "compiler", "load_at_start")}
    sanitizer = {tool: sanitized(logs[tool], ran.get(tool)) | {"log": _end(logs[tool])} for tool in TOOLS}
    failed = []
    if ran.get("build", {}).get("exit"):
        failed.append(f"build: exit code {ran['build']['exit']}")
    if not tests or tests["failed"] or tests["not_run"] or not tests["passed"]:
        failed.append(f"tests: {tests['failed']} failed, {tests['not_run']} not run" if tests else "tests: no result")
    failed += [f"{tool}: {found['errors']} errors" for tool, found in sanitizer.items() if found["errors"]]
    wrong = [result["case"] for result in bench.get("results", []) if "wrong" in result]
    if wrong or not bench.get("results"):
        failed.append(f"benchmark: wrong at {', '.join(wrong)}" if wrong else "benchmark: no result")
    return report | {
        "commit": _text(work / "commit.txt").strip() or None,
        "stages": ran,
        "build": _json(work / "build.json") | {"log": _end(logs["build"])},
        "tests": tests | ({} if tests else {"log": _end(logs["tests"])}),
        "sanitizer": sanitizer,
        "benchmark": bench | ({} if bench else {"log": _end(logs["bench"])}),
        "failed": failed,
    }


def summary(report, most_failures=12):
    """Lines of the whole report, what matters most at the end."""
    out, tests, build = [], report["tests"], report["build"]
    if report["benchmark"].get("results"):
        out += lines(report["benchmark"])
    elif "log" in report["benchmark"]:
        out += ["benchmark: no result; its log ends:", *report["benchmark"]["log"][-8:]]
    cuda = build.get("cuda")
    built = f"no CUDA kernels: {build.get('cuda_reason', 'no build')}"
    if cuda:
        built = f"nvcc {cuda['nvcc']} for {cuda['architectures']}"
    host = "with StepPlan" if build.get("host") else f"StepPlan left out: {build.get('reason')}"
    out.append(f"build: {built}; {host}")
    if not cuda:
        out += report["build"]["log"][-6:]
    if "passed" in tests:
        numbers = ", ".join(f"{tests[name]} {name.replace('_', ' ')}" for name in ("passed", "failed", "skipped", "not_run"))
        out.append(f"tests: {numbers} in {tests['seconds']} s")
        out += [f"  skipped {count}: {reason}" for reason, count in tests["skips"].items()]
        for failure in tests["failures"][:most_failures]:
            out.append(f"  FAILED {failure['test']}: {' '.join(failure['message'].split())[:240]}")
        if len(tests["failures"]) > most_failures:
            out.append(f"  and {len(tests['failures']) - most_failures} more")
    else:
        out += ["tests: no result; the log ends:", *tests.get("log", [])[-8:]]
    for tool, found in report["sanitizer"].items():
        said = [] if found["errors"] is None else [f"{found['errors']} errors"]
        out.append(f"{tool}: {'; '.join([*said, *([found['reason']] if 'reason' in found else [])])}")
    for name, stage in report["stages"].items():
        if stage["exit"] == 124:
            out.append(f"{name}: stopped after {stage['limit']} s")
    out.append("stages: " + ", ".join(f"{name} {stage['seconds']} s" for name, stage in report["stages"].items()))
    out.append("; ".join(report["failed"]) if report["failed"] else "everything passed")
    return out


def main(argv):
    work, out = map(Path, argv)
    report = collect(work)
    name = (report["gpu"] or {}).get("name") or _text(work / "gpu.txt").strip() or "gpu"
    path = out / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(summary(report)))
    print(f"written: {path}")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
