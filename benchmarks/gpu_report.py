"""The report of a run on a GPU: the figures to reach, and short tables in plain text.

    python -m benchmarks.gpu_report call CALL OUT [--gpu NAME]     reads what a call of gpu.sh left in OUT; writes OUT/CALL.json
    python -m benchmarks.gpu_report merge FILE.json CALL.json ...  writes one report of several calls; later results win
    python -m benchmarks.gpu_report failed CALL.json               prints the tests to run again, for gpu_runner.py --only

A report, of one call or of several, has:

    date, gpu, hardware, versions, compiler, load_at_start     as in the benchmark's report (see run.py)
    manifest     that of the folder that `gpu.sh prepare` built (see gpu_folder.py)
    calls        {call: {stage: {exit, seconds, limit}}}; exit 124 means that the stage was stopped at its limit
    logs         {call: {stage: the end of its output}}, of stages whose exit code was not 0
    smoke        of tests/gpu_smoke.py: operators [{operator, backend, status, message, seconds}]; died, only if the process died:
                 its exit code and the operator in which it died
    tests        {test: {status, seconds, and a message if it did not pass}}; skips {reason: number of tests}
    sanitizer    {memcheck: {errors: a number, or null with `reason`}}
    benchmark    the rest of the benchmark's report, or of the probe's if there was no other
    failed       the reasons for exit code 1

The exit code is 1 if something failed: an operator, a test, the sanitizer, or a wrong result of ours.
"""

import argparse
import json
import re
import shutil
import statistics
import sys
from collections import Counter
from pathlib import Path

from .verdict import spread, too_noisy

OURS = "absgd_fast"


# ---- the benchmark's figures -----------------------------------------------------------------------------------------


def finish(report, cases):
    """Adds to a benchmark's report the values that need all measurements.

    These are the bandwidths as fractions of the copy's, and every figure of every case. The value of a figure is null if it was
    not measured.
    """
    found = {(result["suite"], result["case"]): result.get("peers", {}) for result in report["results"]}
    if report["copy"]:
        for result in report["results"]:
            for peer in result.get("peers", {}).values():
                by_copy = result["bytes"] / report["copy"]["bytes_per_us"]["median"]  # µs
                peer["share"] = {
                    name: by_copy / peer["us"][of] for name, of in (("median", "median"), ("q1", "q3"), ("q3", "q1"))
                }
    report["figures"] = [
        {"suite": case.suite, "case": case.name, "figure": figure, **_judged(value, least, most, *ratio)}
        for case in cases
        for figure, value, least, most, *ratio in _figures(case, found.get((case.suite, case.name), {}))
    ]


def _figures(case, peers):
    """(name, value, least, most) of each figure. The value is None if the competitor that it needs is not among the peers.

    The ratio of two times, as quartiles, follows such a figure.
    """
    ours = peers.get(OURS, {})
    for name, most in case.targets.items():
        ratio = peers[name]["ratio"] if name in peers else None
        yield f"time over {name}", ratio and ratio["median"], 0, most, ratio
    for name, most in case.memory.items():
        theirs = peers.get(name, {}).get("peak_bytes")
        yield f"memory over {name}", ours["peak_bytes"] / theirs if theirs else None, 0, most
    for name, (least, most) in case.bounds.items():
        yield name, _value(ours, name), least, most


def _value(peer, name):
    if name.endswith(" launches"):
        seen = peer.get("launches", {}).get(name.removesuffix(" launches"))
        return None if seen is None else len(seen)
    measured = {"host us": "host_us", "share of copy": "share"}[name]
    return peer[measured]["median"] if measured in peer else None


def _judged(value, least, most, ratio=None):
    met = None if value is None or (ratio and too_noisy(ratio)) else bool(least <= value <= most)
    found = {"value": value, "least": least, "most": None if most == float("inf") else most, "met": met}
    return found | ({"spread": spread(ratio)} if ratio else {})


# ---- tables ----------------------------------------------------------------------------------------------------------


def _us(quartiles):
    if quartiles is None:
        return "–"
    return f"{quartiles['median']:.3g}" if quartiles["median"] < 1000 else f"{quartiles['median']:.0f}"


def progress(result):
    place = f"{result['suite']}: {result['case']}"
    if "wrong" in result:
        return f"{place}: WRONG: {result['wrong']}"
    return f"{place}: " + ", ".join(f"{name} {_us(peer['us'])} us" for name, peer in result["peers"].items())


def table(rows):
    """Lines with columns of equal width. The first column is aligned to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths))) for row in rows]


def _line(result, others):
    if "wrong" in result:
        return [result["case"], "WRONG", *[""] * (len(HEAD) - 1 + len(others))]
    ours = result["peers"][OURS]
    launches = "+".join("–" if seen is None else str(len(seen)) for seen in ours["launches"].values()) or "–"
    share = f"{100 * ours['share']['median']:.0f}%" if "share" in ours else "–"
    times = [_us(ours["us"]), f"{100 * spread(ours['us']):.0f}%", _us(ours["host_us"]), _us(ours.get("graph_us"))]
    line = [result["case"], *times, share, launches]
    for name in others:
        peer = result["peers"].get(name)
        line.append("–" if peer is None else f"{peer['ratio']['median']:.2f}{_mark(peer)}")
    return line


def _mark(peer):
    if peer["met"] is None:
        return "" if peer["target"] is None else "?"
    return "" if peer["met"] else "!"


HEAD = ("us", "IQR", "host us", "graph us", "of copy", "launches")
SHORT = {"absgd package": "absgd", "torch.compile": "compile", "cross_entropy": "CE", "absgd_fast, triton": "triton"}


def lines(report):
    """A benchmark's report on one screen: medians of our times, and the ratios of our times to theirs."""
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
    unjudged = [figure for figure in report["figures"] if figure["met"] is None]
    noisy = [figure for figure in unjudged if figure["value"] is not None]
    others = [f"{figure['case']}: {figure['figure']}" for figure in unjudged if figure["value"] is None]
    out += [f"not judged: {len(others)}: {'; '.join(others)}"] * bool(others)
    out += [f"too noisy: {f['suite']}, {f['case']}: {f['figure']} varies by {100 * f['spread']:.1f} %" for f in noisy]
    out.append(f"figures: {sum(figure['met'] for figure in judged)} of {len(judged)} met ('!' above: missed, '?': too noisy)")
    for figure in judged:
        if not figure["met"]:
            bound = f">= {figure['least']:g}" if figure["value"] < figure["least"] else f"<= {figure['most']:g}"
            out.append(f"missed: {figure['suite']}, {figure['case']}: {figure['figure']} {figure['value']:.3g}, wanted {bound}")
    return out


def _limit(results):
    """Lines that say for which sizes the gradient in the forward pass is slower, by replayed graphs and by calls."""
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


# ---- the files of a call of gpu.sh -----------------------------------------------------------------------------------

OF_THE_BENCHMARK = ("date", "gpu", "hardware", "versions", "compiler", "load_at_start")


def _text(path):
    return path.read_text(errors="replace") if path.exists() else ""


def _json(path):
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError:
        return {}


def stages(log):
    """{name: {exit, seconds, limit, said: [lines]}} from the log of a call. A stage without an end was killed with its call."""
    out = {}
    for line in log.splitlines():
        if begun := re.fullmatch(r"==== (\w+): at most (\d+) s", line):
            stage = out[begun[1]] = {"exit": None, "seconds": None, "limit": int(begun[2]), "said": []}
        elif ended := re.fullmatch(r"==== (\w+): exit code (\d+) after (\d+) s", line):
            out[ended[1]] |= {"exit": int(ended[2]), "seconds": int(ended[3])}
        elif out and line:
            stage["said"].append(line[:300])
    return out


def smoked(text, stage):
    """The results of the smoke test, and the operator that it did not finish."""
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    done = [line for line in lines if line["status"] != "begun"]
    out = {"operators": done}
    if stage["exit"] not in (0, 1) or not done:
        where = " | ".join(["before its first operator", *stage["said"][-1:]])
        if lines:
            place = "in" if lines[-1]["status"] == "begun" else "after"
            where = f"{place} {lines[-1]['operator']} ({lines[-1]['backend']})"
        out["died"] = f"exit code {stage['exit']}, {where}"
    return out


def tested(report, stage, name):
    """{test: result} and skips of one run of gpu_runner.py. A run without a report counts as one failed test."""
    if not report:
        said = " | ".join(stage["said"][-3:])
        message = f"no result: exit code {stage['exit']} after {stage['seconds']} s: {said}"
        return {f"stage {name}": {"status": "failed", "seconds": stage["seconds"], "message": message}}, {}
    messages = {failure["test"]: failure["message"] for failure in report["failures"]}
    results = {
        test["test"]: {"status": test["status"], "seconds": test["seconds"]}
        | ({"message": messages[test["test"]]} if test["test"] in messages else {})
        for test in report["tests"]
    }
    return results, report["skips"]


def sanitized(stage):
    """The result of memcheck, which saw only our kernels: {errors, and a reason if the number is unknown or incomplete}.

    If memcheck was stopped before its summary, the errors that it had printed count. If it had printed none, the number is
    unknown.
    """
    said = "\n".join(stage["said"])
    found = re.search(r"ERROR SUMMARY: (\d+) error", said)
    if stage["exit"] == 124 or found is None:
        kinds = r"========= (Invalid|Misaligned|Out-of-range|Uninitialized|Race|Barrier) "
        seen = sum(bool(re.match(kinds, line)) for line in stage["said"])
        if seen or stage["exit"] == 124:
            how = f"stopped after {stage['limit']} s" if stage["exit"] == 124 else "no summary"
            return {"errors": seen or None, "reason": how}
    if found is None or "Device not supported" in said:
        lines = [line for line in stage["said"] if line.startswith("=========") and line.strip("= ")]
        return {"errors": None, "reason": lines[-1] if lines else "it said nothing: see the log"}
    return {"errors": int(found[1])} | ({} if stage["exit"] in (0, 9) else {"reason": "what ran under it failed: see the log"})


def gather(call, out, gpu=None):
    """The report of one call."""
    ran, pieces = stages(_text(out / f"{call}.log")), out / "pieces"
    bench = _json(pieces / "bench.json")
    report = {name: bench.pop(name, None) for name in OF_THE_BENCHMARK}
    report["gpu"] = report["gpu"] or {"name": gpu}
    report |= {"manifest": _json(Path("manifest.json")), "benchmark": bench}
    report |= {name: {} for name in ("smoke", "tests", "skips", "sanitizer")}
    if "smoke" in ran:
        report["smoke"] = smoked(_text(pieces / "smoke.jsonl"), ran["smoke"])
    for name in ("cuda", "triton", "failed", "large"):
        of_tests = _json(pieces / f"{name}.json")
        if name in ran and (of_tests or ran[name]["exit"] != 0):  # exit code 0 without a result: no test had to run again
            results, skips = tested(of_tests, ran[name], name)
            report["tests"] |= results
            report["skips"] |= skips
    if "memcheck" in ran:
        report["sanitizer"]["memcheck"] = sanitized(ran["memcheck"])
    report["logs"] = {call: {name: stage["said"][-30:] for name, stage in ran.items() if stage["exit"]}}
    report["calls"] = {call: {name: {k: stage[k] for k in ("exit", "seconds", "limit")} for name, stage in ran.items()}}
    return report | {"failed": failed(report)}


def merge(reports):
    """One report of several calls. A later result of a test replaces an earlier one, and the benchmark replaces the probe."""
    merged = {"smoke": {}, "benchmark": {}} | {name: {} for name in ("calls", "logs", "tests", "skips", "sanitizer")}
    for report in reports:
        for name in ("calls", "logs", "tests", "skips", "sanitizer"):
            merged[name] |= report[name]
        merged["smoke"] = report["smoke"] or merged["smoke"]
        if report["benchmark"].get("results") or not merged["benchmark"]:
            merged |= {name: report[name] for name in (*OF_THE_BENCHMARK, "manifest", "benchmark")}
    return merged | {"failed": failed(merged)}


def count(tests):
    """{status: number of tests}."""
    return Counter(test["status"] for test in tests.values())


def failed(report):
    """The reasons for exit code 1."""
    out, bench = [], report["benchmark"]
    if "died" in report["smoke"]:
        out.append(f"smoke: {report['smoke']['died']}")
    wrong = [line for line in report["smoke"].get("operators", ()) if line["status"] != "passed"]
    out += [f"smoke: {len(wrong)} operators failed"] * bool(wrong)
    found = count(report["tests"])
    out += [f"tests: {found['failed']} failed, {found['not run']} not run"] * bool(found["failed"] or found["not run"])
    out += ["tests: none passed"] * (bool(report["tests"]) and not found["passed"])
    out += [f"{tool}: {said['errors']} errors" for tool, said in report["sanitizer"].items() if said["errors"]]
    measured = any({"probe", "bench"} & stages.keys() for stages in report["calls"].values())
    wrong = [result["case"] for result in bench.get("results", []) if "wrong" in result]
    out += [f"benchmark: wrong at {', '.join(wrong)}"] * bool(wrong)
    out += ["benchmark: no result"] * (measured and not bench.get("results"))
    last = [(name, ran[name]["exit"]) for ran in report["calls"].values() for name in ("probe", "bench") if name in ran][-1:]
    explained = (0, 124, 1) if wrong else (0, 124)  # the benchmark ends with 1 if ours was wrong
    out += [f"{name}: exit code {code}" for name, code in last if code not in explained]
    return out


def to_run_again(report):
    """Parts of the names of the tests that failed or were not run.

    For a stage without results it is the part that the names of all its tests have. No part contains a comma, because commas
    separate the parts on the command line.
    """
    again = [name for name, test in report["tests"].items() if test["status"] in ("failed", "not run")]
    whole = {"stage cuda": "[cuda", "stage triton": "[triton"}
    return list(dict.fromkeys(whole.get(name, name.split(",")[0]) for name in again if name in whole or "[" in name))


def summary(report, most_failures=12):
    """The lines of the whole report. The most important ones are at the end."""
    out, tests, manifest = [], report["tests"], report["manifest"]
    if report["benchmark"].get("results"):
        out += lines(report["benchmark"])
    if manifest:
        out.append(f"built from {manifest['commit']} for torch {manifest['torch']}, {manifest['architectures']}")
    wrong = [line for line in report["smoke"].get("operators", ()) if line["status"] != "passed"]
    if report["smoke"]:
        out.append(f"smoke: {len(report['smoke']['operators']) - len(wrong)} operators right, {len(wrong)} wrong")
        out += [f"  FAILED {line['operator']} ({line['backend']}): {' '.join(line['message'].split())[:240]}" for line in wrong]
        out += [f"  DIED: {died}" for died in [report["smoke"].get("died")] if died]
    if tests:
        found = count(tests)
        out.append("tests: " + ", ".join(f"{found[status]} {status}" for status in ("passed", "failed", "skipped", "not run")))
        out += [f"  skipped {n}: {reason}" for reason, n in report["skips"].items()]
        failures = [(name, test.get("message", "")) for name, test in tests.items() if test["status"] == "failed"]
        out += [f"  FAILED {name}: {' '.join(message.split())[:240]}" for name, message in failures[:most_failures]]
        out += [f"  and {len(failures) - most_failures} more"] * (len(failures) > most_failures)
    for tool, said in report["sanitizer"].items():
        words = None if said["errors"] is None else f"{said['errors']} errors", said.get("reason")
        out.append(f"{tool}: {'; '.join(filter(None, words))}")
    for call, ran in report["calls"].items():
        out.append(f"{call}: " + ", ".join(f"{name} {_took(stage)}" for name, stage in ran.items()))
    out.append("FAILED: " + "; ".join(report["failed"]) if report["failed"] else "everything passed")
    return out


def _took(stage):
    if stage["exit"] is None:
        return "not finished"
    how = {0: "", 124: ", stopped"}.get(stage["exit"], f", exit code {stage['exit']}")
    return f"{stage['seconds']} s{how}"


# ---- the command -----------------------------------------------------------------------------------------------------


def _finish(report, path):
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(summary(report)))
    print(f"written: {path}")
    return 1 if report["failed"] else 0


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("call")
    one.add_argument("call")
    one.add_argument("out", type=Path)
    one.add_argument("--gpu")
    many = verbs.add_parser("merge")
    many.add_argument("out", type=Path)
    many.add_argument("calls", type=Path, nargs="+")
    verbs.add_parser("failed").add_argument("call", type=Path)
    options = parser.parse_args(argv)
    if options.verb == "failed":
        print(",".join(to_run_again(_json(options.call) or {"tests": {}})))
        return 0
    if options.verb == "merge":
        return _finish(merge([json.loads(path.read_text(encoding="utf-8")) for path in options.calls]), options.out)
    code = _finish(gather(options.call, options.out, options.gpu), options.out / f"{options.call}.json")
    shutil.rmtree(options.out / "pieces", ignore_errors=True)  # their contents are in the report now
    return code


if __name__ == "__main__":
    sys.exit(main())
