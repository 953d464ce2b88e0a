"""benchmarks/evidence.py on two small cells; and that docs/evidence.md has its tables and pictures."""

import json
import re
from pathlib import Path

import pytest
from bench_cases import evidence

PAGE = Path(__file__).resolve().parents[1] / "docs" / "evidence.md"
RECIPE = """
title = "Two small cells"
[settings]
dataset = "digits"
model = "linear"
epochs = 2
seeds = 2
per_class = 20
[methods]
"SGD (CE)" = "sgd"
"ABSGD (CE)" = "absgd@lam=-1"
"ABSGD (GCE)" = "absgd:gce@lam=-1"
[cells.none]
title = "Right labels"
[cells."symmetric-0.4"]
title = "Wrong labels"
settings = { noise = "symmetric", noise_rate = 0.4 }
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with the recipe of a part "small", whose files go there."""
    (tmp_path / "small.toml").write_text(RECIPE)
    picture = evidence.Picture("memorised.png", "symmetric-0.4", evidence.MEMORISATION)
    part = evidence.Part(str(tmp_path / "small.toml"), ("--epochs", "1"), picture)
    monkeypatch.setattr(evidence, "PARTS", {"small": part})
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "PICTURES", tmp_path)
    return tmp_path


def test_a_part_is_trained_once_and_its_numbers_are_written(small, capfd):
    arguments = ["--parts", "small", "--out", str(small / "runs")]
    assert evidence.main(arguments) == 0
    first = json.loads((small / "evidence-small.json").read_text())
    assert [cell["title"] for cell in first["cells"]] == ["Right labels", "Wrong labels"] and first["runs"] == 12
    assert [cell["folders"] for cell in first["cells"]] == [["small/none"], ["small/symmetric-0.4"]]
    assert str(small) not in json.dumps(first["cells"])
    assert all(cell["settings"]["epochs"] == 1 for cell in first["cells"])
    assert (small / "memorised.png").read_bytes().startswith(b"\x89PNG")
    trained = {path: path.stat().st_mtime_ns for path in small.rglob("results.json")}
    assert len(trained) == 2
    assert evidence.main(arguments) == 0
    assert trained == {path: path.stat().st_mtime_ns for path in small.rglob("results.json")}
    assert json.loads((small / "evidence-small.json").read_text())["cells"] == first["cells"]
    out = capfd.readouterr().out
    assert len(re.findall("small, (?:none|symmetric-0.4): exit code 0", out)) == 4
    assert evidence.main(["--parts", "small", "--tables"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("| method |") == 3 and "| ABSGD (CE) |" in printed


def test_a_part_with_a_cell_that_fails_has_no_numbers(small, capfd):
    (small / "small.toml").write_text(RECIPE.replace("noise_rate = 0.4", "noise_rate = 2"))
    assert evidence.main(["--parts", "small", "--out", str(small / "runs")]) == 2
    assert not (small / "evidence-small.json").exists()
    assert "small, none: exit code" in capfd.readouterr().out


def test_unknown_parts_are_refused(small, capsys):
    with pytest.raises(SystemExit) as stop:
        evidence.main(["--parts", "large"])
    assert stop.value.code == 2 and "unknown part 'large'; use some of small" in capsys.readouterr().err


def entry(mean, stderr=None, verdict=None):
    return {"mean": mean, "std": stderr, "stderr": stderr, "n": 2 if stderr else 1} | ({"verdict": verdict} if verdict else {})


def test_tables(small):
    """A bold result is ahead of its baseline; a method without a number has a dash; cells without any are left out."""
    nothing = {"mean": None, "std": None, "stderr": None, "n": 0}

    def method(row, accuracy, to_baseline, memorised):
        return {"row": row, "seeds": [0, 1], "accuracy": accuracy, "to_baseline": to_baseline, "flipped_as_given": memorised}

    def cell(title, *methods):
        return {"title": title, "recipe": None, "metric": "accuracy", "reported": {}, "methods": methods}

    results = {
        "recipes": [],
        "cells": [
            cell(
                "right",
                method("SGD", entry(90.0, 1.0), None, nothing),
                method("AB", entry(89.0, 1.0), entry(-1.0, 0.25), nothing),
            ),
            cell(
                "wrong",
                method("SGD", entry(60.0, 1.0), None, entry(81.6)),
                method("AB", entry(70.25, 0.5), entry(10.25, 1.5, "ahead"), nothing),
            ),
        ],
    }
    results["cells"][0]["methods"][1]["to_baseline"]["verdict"] = "not told apart"
    (small / "evidence-small.json").write_text(json.dumps(results))
    both = "| method | right | wrong |\n| --- | ---: | ---: |\n"
    assert evidence.tables("small") == [
        f"{both}| SGD | 90.00 ± 1.00 | 60.00 ± 1.00 |\n| AB | 89.00 ± 1.00 | **70.25 ± 0.50** |",
        f"{both}| AB | −1.0 ± 0.2 | +10.2 ± 1.5 |",
        "| method | wrong |\n| --- | ---: |\n| SGD | 82 |",
    ]


@pytest.mark.parametrize("name", list(evidence.PARTS))
def test_the_page_has_the_tables(name):
    page = PAGE.read_text(encoding="utf-8")
    found = evidence.tables(name)
    assert len(found) == (1 if evidence.PARTS[name].short else 2 + ("noise" in name))
    for table in found:
        assert table in page
    results = evidence.read(name)
    seeds = 8 if name.startswith("digits") else 3
    assert all(method["seeds"] == list(range(seeds)) for cell in results["cells"] for method in cell["methods"])
    if picture := evidence.PARTS[name].picture:
        assert f"]({picture.file})" in page and (PAGE.parent / picture.file).is_file()


def test_the_numbers_are_those_of_the_recipes():
    """Every row and every cell of the recipe is there, with the settings of the recipe and the options above it."""
    for name, part in evidence.PARTS.items():
        results = evidence.read(name)
        assert len(part.cells) >= 2 and [cell["title"] for cell in results["cells"]] == [c.title for c in part.cells.values()]
        for cell, of_recipe in zip(results["cells"], part.cells.values(), strict=True):
            kept = part.options[part.options.index("--methods") + 1].split(",") if "--methods" in part.options else None
            rows = {row: spec for row, spec in of_recipe.methods.items() if kept is None or spec in kept}
            assert {method["row"]: method["method"] for method in cell["methods"]} == rows and len(rows) >= (
                4 if name == "digits-l2rw" else 6
            )
            above = {option.removeprefix("--").replace("-", "_") for option in part.options if option.startswith("--")}
            wanted = {key: value for key, value in of_recipe.settings.items() if key in cell["settings"] and key not in above}
            assert {"dataset", "model", "batch_size"} < set(wanted)
            assert all(cell["settings"][key] == (list(v) if isinstance(v, tuple) else v) for key, v in wanted.items())
            for option in above & set(cell["settings"]):
                assert str(cell["settings"][option]) == part.options[part.options.index(f"--{option.replace('_', '-')}") + 1]
