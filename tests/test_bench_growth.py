"""benchmarks/growth.py and endurance.py: slopes and knees of known curves, and small runs from end to end."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from bench_cases import (  # noqa: F401 (fixtures)
    endurance,
    growth,
    growth_fit,
    growth_plot,
    looked,
    memory,
    same_path,
    timing,
)

SIZES = [2**k for k in range(4, 18)]
EXACT = [1e-3] * len(SIZES)  # the errors of the times


def noise(count, sigma, seed=0):
    return np.exp(sigma * np.random.default_rng(seed).standard_normal(count))


# ---- the fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5])
def test_a_known_slope_is_found(exponent):
    found, error = growth_fit.slope(SIZES, [3 * size**exponent for size in SIZES])
    assert found == pytest.approx(exponent, abs=1e-9) and error < 1e-7
    with_noise, error = growth_fit.slope(SIZES, 3 * np.asarray(SIZES, dtype=float) ** exponent * noise(len(SIZES), 0.1))
    assert abs(with_noise - exponent) < 3 * error and 0.005 < error < 0.03


def test_the_error_is_that_of_least_squares():
    """By the textbook: the residual variance with n - 2 degrees of freedom over the sum of squares."""
    x, y = np.log([1.0, 2.0, 4.0, 8.0]), np.array([0.1, 1.3, 1.9, 3.2])
    centred = x - x.mean()
    by_hand = (centred * y).sum() / (centred**2).sum()
    residuals = y - y.mean() - by_hand * centred
    error = math.sqrt((residuals**2).sum() / 2 / (centred**2).sum())
    assert growth_fit.slope(np.exp(x), np.exp(y)) == pytest.approx((by_hand, error))


def test_only_the_upper_half_is_fitted():
    """An overhead below, proportion above: the slope of everything would be about a half."""
    times = [max(SIZES[7], size) for size in SIZES]
    us = [{"median": t, "q1": t, "q3": t} for t in times]
    found = growth.judge(SIZES, us, 7, None, {})
    assert found["slope"] == pytest.approx(1.0) and growth_fit.upper(list(range(5))) == [2, 3, 4]
    assert growth_fit.slope(SIZES, times)[0] < 0.7


def test_a_line_has_no_knee():
    local = growth_fit.local_slopes(SIZES, [float(size) for size in SIZES], EXACT)
    assert len(local) == len(SIZES) - growth_fit.WINDOW + 1 and all(window["away"] == 0 for window in local)
    assert growth_fit.knees(local) == []


def test_knees_are_where_they_were_put():
    """An overhead up to 2^8, proportion, and from 2^13 on the power 1.3."""
    sizes = [2**k for k in range(2, 20)]
    times = [max(2.0**8, size) * max(1.0, size / 2**13) ** 0.3 for size in sizes]
    slower, faster = growth_fit.knees(growth_fit.local_slopes(sizes, times, [1e-3] * len(sizes)))
    assert slower == {"size": 2**8, "side": -1} and faster == {"size": 2**13, "side": 1}


def test_noise_makes_no_knee():
    """Errors of the times as large as what is seen: five points that happen to lie on a line do not say more than they can."""
    times = [size * factor for size, factor in zip(SIZES, noise(len(SIZES), 0.05, seed=1))]
    assert growth_fit.knees(growth_fit.local_slopes(SIZES, times, [0.05] * len(SIZES))) == []


def test_a_window_alone_is_no_knee():
    windows = [{"size": float(k), "away": away} for k, away in enumerate([-1, -1, 0, -1, 0, 1, 0, 1, 1, 1])]
    assert growth_fit.knees(windows) == [{"size": 1.0, "side": -1}, {"size": 7.0, "side": 1}]
    assert growth_fit.knees(windows[3:7]) == []


# ---- the caches --------------------------------------------------------------------------------------------------------


def test_caches_are_read(tmp_path):
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "32K"), ("1", "Instruction", "64K"), ("2", "Unified", "1024K"), ("3", "Unified", "36M")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    (tmp_path / "index4").mkdir()  # one that says nothing
    assert growth_fit.caches(tmp_path) == {"L1d": 2**15, "L2": 2**20, "L3": 36 * 2**20}
    assert growth_fit.caches(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    "size, words",
    [(1, "within L1d"), (4096, "within L1d"), (4097, "between L1d and L2"), (10**6, "beyond L2")],
)
def test_a_size_has_its_place(size, words):
    assert growth_fit.place(size, 8, {"L1d": 2**15, "L2": 2**20}) == words
    assert growth_fit.place(size, 8, {}) == "the caches are not known"


# ---- end to end --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The sweeps of the benchmark, cut to seven sizes."""
    monkeypatch.setattr(timing, "BLOCK", 1e4)
    monkeypatch.setattr(growth.quiet, "look", lambda: looked(True))
    cut = [growth.Sweep(s.name, s.fixed, s.make, s.exponents[:7], s.bytes_of_one) for s in growth.SWEEPS]
    monkeypatch.setattr(growth, "SWEEPS", cut)


def test_small_sweeps_from_end_to_end(small, tmp_path, capsys):
    before = torch.get_num_threads()
    out, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    assert growth.main(["--seconds", "0.01", "--threads", "1", "2", "--out", str(out), "--plot", str(plot)]) == 0
    assert torch.get_num_threads() == before and plot.read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.read_text(encoding="utf-8"))
    assert {"quiet", "caches", "hardware", "versions"} <= report.keys() and report["threads"] == [1, 2]
    assert [(s["sweep"], s["threads"]) for s in report["sweeps"]] == [(s.name, n) for s in growth.SWEEPS for n in (1, 2)]
    for found in report["sweeps"]:
        assert len(found["sizes"]) == len(found["us"]) == 7 and len(found["local"]) == 3
        assert all(b == 2 * a for a, b in itertools.pairwise(found["sizes"]))
        assert all(0 < us["q1"] <= us["median"] <= us["q3"] for us in found["us"]) and found["error"] >= 0
    printed = capsys.readouterr().out
    assert printed.count("ABLoss over rows B") == 2 and " ± " in printed and f"written: {out}" in printed


def test_what_grows_is_what_is_said():
    """The numbers of rows, classes, tensors and parameters of a call, and threads that are set while it runs."""
    rows, classes, tensors, parameters = growth.SWEEPS
    for make, shape in ((rows.make, (8, growth.CLASSES)), (classes.make, (growth.ROWS, 8))):
        run = make(8)
        run()
        logits = next(cell.cell_contents for cell in run.__closure__ if getattr(cell.cell_contents, "requires_grad", False))
        assert logits.shape == shape and logits.grad.abs().sum() > 0
    for make, size, shapes in (
        (tensors.make, 3, [(growth.SMALL,)] * 3),
        (parameters.make, 2**9, [(2**9 // growth.TENSORS,)] * growth.TENSORS),
    ):
        params = make(size).__self__.param_groups[0]["params"]
        assert [tuple(p.shape) for p in params] == shapes and all(p.grad is not None for p in params)


def test_threads_are_set_while_a_sweep_runs(monkeypatch):
    seen = []

    def interleave(runs, seconds):
        seen.append(torch.get_num_threads())
        return {size: [float(size)] * 3 for size in runs}

    monkeypatch.setattr(growth, "interleave", interleave)
    found = growth.measure(growth.SWEEPS[2], 2, 0.0, {})
    assert seen == [2] and found["slope"] == pytest.approx(1.0) and found["rounds"] == 3
    assert growth.words(found["knees"]) == "in proportion"


def test_the_picture_shows_caches_and_knees():
    us = [{"median": t, "q1": 0.9 * t, "q3": 1.1 * t} for t in (max(256.0, size) for size in SIZES)]
    judged = growth.judge(SIZES, us, 100, 8, {"L1d": 2**15, "L2": 2**30})
    assert [knee["side"] for knee in judged["knees"]] == [-1] and judged["knees"][0]["place"] == "within L1d"
    found = {"sweep": "a loss", "fixed": "C = 8", "threads": 1, "bytes_of_one": 8, "sizes": SIZES, "us": us, **judged}
    figure = growth_plot.picture({"sweeps": [found, found | {"threads": 2}], "caches": {"L1d": 2**15, "L2": 2**30}})
    (axes,) = [axes for axes in figure.axes if axes.get_visible()]
    assert [text.get_text().strip() for text in axes.texts] == ["L1d"]  # the other cache is beyond the largest size
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == ":"] == [[2**12, 2**12]]
    assert sum(line.get_marker() == "o" and line.get_fillstyle() == "none" for line in axes.lines) == 2
    assert [text.get_text() for text in axes.get_legend().texts] == [
        "1 thread: slope 1.00 ± 0.00",
        "2 threads: slope 1.00 ± 0.00",
    ]


# ---- endurance ---------------------------------------------------------------------------------------------------------

reads_the_heap = pytest.mark.skipif(
    memory.attempt(lambda _: memory.heap(), None) is None, reason="heap in use is asked of glibc 2.33 or newer"
)


@reads_the_heap
def test_a_short_training_is_flat(tmp_path, capsys):
    """The first reading comes after the caches are full; the bound is generous for so few steps."""
    out = tmp_path / "endurance.json"
    code = endurance.main(["--steps", "2000", "--readings", "4", "--out", str(out)])
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [step for step, _ in report["heap"]] == [500, 1000, 1500, 2000] and report["steps"] == 2000
    assert report["bytes_per_step"] == (report["heap"][-1][1] - report["heap"][0][1]) / 1500 < 100
    assert report["met"] is (report["bytes_per_step"] <= report["most"]) and code == (0 if report["met"] else 1)
    assert report["model"] == "64-128-10" and "bytes per step" in capsys.readouterr().out


@reads_the_heap
def test_a_training_that_keeps_something_is_not_flat(monkeypatch, capsys):
    """4000 bytes a step, as of one more tensor."""
    kept = []
    monkeypatch.setattr(endurance, "training", lambda: lambda: kept.append(torch.ones(1000)))
    assert endurance.main(["--steps", "400", "--readings", "4"]) == 1
    grown = float(capsys.readouterr().out.splitlines()[-1].split()[0])
    assert 4000 <= grown <= 6000


@pytest.mark.parametrize("options", [["--readings", "1"], ["--steps", "2", "--readings", "3"]], ids=str)
def test_too_few_readings_are_refused(options, capsys):
    with pytest.raises(SystemExit) as leaving:
        endurance.main(options)
    assert leaving.value.code == 2 and "at least two readings" in capsys.readouterr().err


def test_the_training_trains():
    """It moves its parameters and its moving average, so the memory is that of a real step."""
    step = endurance.training()
    cells = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__)))
    before = [p.clone() for p in cells["model"].parameters()]
    step()
    assert all(not torch.equal(a, b) for a, b in zip(before, cells["model"].parameters()))
    assert math.isfinite(cells["criterion"].log_s)


def test_the_committed_records_are_flat_and_complete():
    folder = growth.ROOT / "results"
    report = json.loads((folder / "endurance.json").read_text())
    assert report["steps"] == 100_000 and len(report["heap"]) == 10 and report["met"]
    assert endurance.bytes_per_step(report["heap"]) == report["bytes_per_step"]
    sweeps = json.loads((folder / "growth.json").read_text())["sweeps"]
    assert [(s["sweep"], s["threads"]) for s in sweeps] == [(s.name, n) for s in growth.SWEEPS for n in (1, 2)]
