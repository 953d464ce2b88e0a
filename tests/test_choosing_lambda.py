"""benchmarks/choosing_lambda.py, on few epochs of digits; and that docs/choosing-lambda.md has its tables."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_cases import choosing_lambda as measured

from absgd_fast import selection

PAGE = Path(__file__).resolve().parents[1] / "docs" / "choosing-lambda.md"
CELL = next(
    cell for cell in measured.cells() if cell.section == "noise" and cell.rate == 0.4 and cell.part != measured.EVERYTHING
)


@pytest.fixture(autouse=True)
def small(monkeypatch, threads):
    threads(1)
    tasks = {name: replace(task, epochs=4, seeds=1) for name, task in measured.TASKS.items()}
    monkeypatch.setattr(measured, "TASKS", tasks)


def test_a_run_that_was_stopped_goes_on(tmp_path, capsys, monkeypatch):
    """The second call trains only what is missing, and gets the same file."""
    out = tmp_path / "found.json"
    arguments = ["--sections", "noise", "--only", "digits MLP, noise 0.4, 90 %", "--out", str(out)]
    assert measured.main(arguments) == 0
    whole = json.loads(out.read_text())
    assert len(whole["runs"]) == len(measured.CHOICE) and set(whole["chosen"].values()) <= set(measured.CHOICE)
    found = measured.Found.read(out)
    missing = measured.key_of(CELL, measured.CHOICE[-1], CELL.seeds[0])
    del found.runs[missing]
    found.write(out, {})
    trained = []
    monkeypatch.setattr(measured, "run", lambda *args, real=measured.run: trained.append(args[1]) or real(*args))
    assert measured.main(arguments) == 0
    again = json.loads(out.read_text())
    assert trained == [measured.CHOICE[-1]] and again["chosen"] == whole["chosen"]
    for runs in (whole["runs"], again["runs"]):
        for run in runs.values():
            run.pop("seconds")
    assert again["runs"] == whole["runs"]
    assert "what `select` chooses" in capsys.readouterr().out


def test_the_replayed_choice_is_that_of_a_real_selection():
    """What select makes of recorded predictions is what it makes of trainings, and the chosen model is the one of the table."""
    seed = CELL.seeds[0]
    _, split = measured.split_of(CELL, seed, None)
    right = {candidate: measured.run(CELL, candidate, seed, None)[1] for candidate in measured.CHOICE}

    def train(candidate, train_idx, holdout_idx, budget):
        return measured.training(CELL, seed, None, candidate, train_idx, holdout_idx)

    options = {"labels": split.y, "seed": seed, "budget": CELL.of.epochs, "progress": False}
    real = selection.select(train, measured.CHOICE, **options)
    assert real.best == measured.chosen(CELL, seed, None, right)
    everything = measured.run(replace(CELL, part=measured.EVERYTHING), real.best, seed, None)[0]
    assert measured.scores(measured.predicted(real.result, split.x_test), split.y_test)[0] == pytest.approx(
        everything["accuracy"], abs=1e-3
    )


@pytest.mark.parametrize(
    ("candidate", "lam"), [("sgd", torch.inf), ("lam 2", 2.0), ("ramp -1", torch.inf), ("two-stage -1", torch.inf)]
)
def test_candidates_begin_with_this_lambda(candidate, lam):
    criterion, schedule = measured.criterion_of(candidate, 10)
    assert float(criterion.lam) == lam
    for _ in range(3 if schedule is not None else 0):  # 30 % of the epochs
        schedule.step()
    assert schedule is None or float(criterion.lam) == -1


def test_the_page_has_the_tables(monkeypatch):
    monkeypatch.undo()  # the seeds of the file
    page = PAGE.read_text(encoding="utf-8")
    for table in measured.tables(measured.Found.read(measured.OUT)).split("\n\n"):
        assert table in page, table
