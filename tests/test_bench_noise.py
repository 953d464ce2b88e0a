"""Ratios that vary too much are not judged, and a busy machine is found before anything is timed."""

import itertools
import math

import pytest
from bench_cases import (  # noqa: F401 (fixtures)
    cases,
    gpu_report,
    looked,
    no_compiler,
    one_case,
    quiet,
    run,
    same_path,
    tables,
    tiny,
    verdict,
)


def ratio(q1, median, q3):
    return {"median": median, "q1": q1, "q3": q3}


# ---- the verdict -------------------------------------------------------------------------------------------------------


def test_the_spread_is_the_interquartile_range_over_the_median():
    assert verdict.spread(ratio(0.9, 2.0, 1.5)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "found, most, met",
    [
        (ratio(0.50, 0.5, 0.52), 0.5, True),
        (ratio(0.50, 0.51, 0.52), 0.5, False),
        (ratio(0.475, 0.5, 0.5249), 0.5, True),
        (ratio(0.475, 0.5, 0.526), 0.5, None),
        (ratio(0.1, 0.2, 0.3), 10.0, None),  # also where every quartile is on one side of the target
        (ratio(0.50, 0.5, 0.52), None, None),
        (ratio(math.nan, math.nan, math.nan), 1.0, None),
    ],
)
def test_a_figure_is_met_missed_or_too_noisy(found, most, met):
    assert verdict.met(found, most) is met


def noisy_times(ours):
    """The same times in every round, but ours vary; the rounds come from `ours`."""
    return lambda runs, seconds, **options: {name: list(ours) if name == "absgd_fast" else [1.0] * len(ours) for name in runs}


def test_noise_shows_in_the_record_the_table_and_the_last_lines(monkeypatch, tiny, capsys):
    """A case with two targets, of which a steady ratio would meet one and miss the other."""
    case = next(case for case in run.CASES if case.suite == "loss")
    for ours, met, words in (
        ([0.5, 0.5, 0.5, 0.5], [True, False], ["1 of 2 targets met", "missed: loss 8 × 5, absgd package"]),
        (
            [0.4, 0.5, 0.5, 0.6],
            [None, None],
            [
                "0 of 0 targets met, 2 more too noisy to be judged",
                "too noisy: loss 8 × 5, cross_entropy: the ratio varies by 10.5 % (at most 10 %)",
                "too noisy: loss 8 × 5, absgd package: the ratio varies by 10.5 % (at most 10 %)",
            ],
        ),
    ):
        ours = [value + (0.01 if value > 0.55 else 0) for value in ours]  # a spread of 10.5 % in the second row
        monkeypatch.setattr(one_case, "interleave", noisy_times(ours))
        result = one_case.compare(case, 1)
        peers = [result["peers"][name] for name in ("cross_entropy", "absgd package")]
        assert [peer["met"] for peer in peers] == met
        assert peers[0]["spread"] == verdict.spread(peers[0]["ratio"])
        assert tables.summary([result]) == words
        assert run.main(["--suite", "loss"]) == 0
        assert ("too noisy" in capsys.readouterr().out.split("targets met")[0]) is (None in met)


def test_a_noisy_ratio_of_a_gpu_is_not_judged():
    steady, noisy = ratio(0.5, 0.5, 0.5), ratio(0.4, 0.5, 0.6)
    result = {"suite": "gpu loss", "case": "x", "bytes": 1, "absent": {}}
    times = {"us": ratio(1.0, 1.0, 1.0), "host_us": ratio(1.0, 1.0, 1.0)}
    peers = {"absgd_fast": {**times, "launches": {}}}
    peers |= {
        name: {**times, "ratio": found, "target": 1.0, "met": verdict.met(found, 1.0)}
        for name, found in (("Liger", steady), ("absgd package", noisy))
    }
    report = {"copy": None, "results": [result | {"peers": peers}], "figures": [], "not_measured": []}
    gpu_report.finish(report, [cases.Case("gpu loss", "x", None, {"Liger": 1.0, "absgd package": 1.0, "torch.compile": 1.0})])
    assert [(figure["met"], figure.get("spread")) for figure in report["figures"]] == [
        (True, 0.0),
        (None, pytest.approx(0.4)),
        (None, None),
    ]
    lines = gpu_report.lines(report)
    assert "0.50?" in lines[1] and "0.50!" not in lines[1]
    assert "too noisy: gpu loss, x: time over absgd package varies by 40.0 %" in lines
    assert "not judged: 1: x: time over torch.compile" in lines


# ---- the machine -------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine whose clock, load and ticks are given. Returns a dict to change them."""
    state = {"times": [1e6], "load": 0.1, "ticks": [(0, 0), (0, 1000)]}

    def block_ns(device, work, calls):
        state["times"].append(state["times"].pop(0))
        return state["times"][-1]

    turns = itertools.cycle((0, 1))
    monkeypatch.setattr(quiet, "block_ns", block_ns)
    monkeypatch.setattr(quiet, "_load", lambda: state["load"])
    monkeypatch.setattr(quiet, "_ticks", lambda: state["ticks"][next(turns)])
    return state


@pytest.mark.parametrize(
    "change, still, words",
    [
        ({}, True, "varies by 0.0 % (at most 5 %), the load is 0.1 (at most 0.5), and the host took 0.0 % (at most 1 %)"),
        ({"times": [1e6, 1.2e6]}, False, " % (at most 5 %), the load is 0.1"),
        ({"load": 0.6}, False, "the load is 0.6"),
        ({"ticks": [(5, 100), (25, 1100)]}, False, "the host took 2.0 % (at most 1 %) of the time of the cores."),
        ({"load": None, "ticks": [None, None]}, True, "The machine is quiet: a fixed piece of work varies by 0.0 %"),
        ({"ticks": [(5, 100), (5, 100)]}, True, ", and the load is 0.1"),  # no tick has passed
    ],
    ids=str,
)
def test_a_quiet_machine(machine, change, still, words):
    machine.update(change)
    found = quiet.look(0.01)
    assert found["quiet"] is still and found["limits"] == quiet.LIMITS
    said = quiet.sentence(found)
    assert words in said and said.startswith("The machine is quiet: " if still else "The machine is not quiet, so ratios may")
    assert said.endswith(".") and said.count(". ") == 0


def test_the_real_machine_is_looked_at():
    """The work takes time, a single look ends soon, and what the system tells lies in its range."""
    found = quiet.look(0.02)
    assert found.keys() == {"seconds", "spread", "load", "steal", "quiet", "limits"}
    assert found["spread"] > 0 and found["seconds"] == 0.02  # no two blocks of real work take the same nanoseconds
    assert found["steal"] is None or 0 <= found["steal"] <= 1


def test_ticks_come_from_the_first_line(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    monkeypatch.setattr(quiet, "Path", lambda name: stat)
    assert quiet._ticks() is None
    stat.write_text("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    assert quiet._ticks() == (8, 36)  # guests count among the users already
    stat.write_text("cpu  1 2 3\n")
    assert quiet._ticks() is None


def test_a_short_look_at_a_gpu_machine(monkeypatch, no_compiler, capsys):
    asked = []
    monkeypatch.setattr(quiet, "look", lambda seconds: asked.append(seconds) or looked(False))
    assert run.main(["--suite", "gpu", "--rehearse", "--limit", "0.001"]) == 0
    assert asked == [run.QUIET_ON_GPU] and "The machine is not quiet" in capsys.readouterr().out
