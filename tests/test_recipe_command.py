"""`absgd-fast train --recipe`: the cells of a recipe one after the other, into folders of their own; and train under torchrun."""

import json

import pytest
from test_cli import in_an_empty_folder, refused  # noqa: F401 (a fixture)
from two_processes import torchrun

from absgd_fast import __main__ as cli
from absgd_fast.experiments import checkpoint

RECIPE = """
title = "Two small cells"
source = "Nobody 2000, Table 1"
notes = ["The epochs are few."]
[settings]
dataset = "digits"
model = "linear"
epochs = 4
seeds = 2
per_class = 30
[methods]
"SGD (CE)" = "sgd"
"ABSGD (SCE)" = "absgd:sce@lam=-2"
[cells.clean]
title = "Digits"
[cells.noisy]
title = "Noisy digits"
settings = { noise = "symmetric", noise_rate = 0.3 }
[cells.noisy.reported]
"SGD (CE)" = [71.5, 0.5]
"""


@pytest.fixture
def recipe(in_an_empty_folder):
    (in_an_empty_folder / "two.toml").write_text(RECIPE)
    return in_an_empty_folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def parameters(folder):
    return {(run["method"], run["seed"]): run["parameters"] for run in results(folder)["runs"]}


def test_all_cells(recipe, capsys):
    assert cli.main(["train", "--recipe", "two.toml", "--out", "x"]) == 0
    out = capsys.readouterr().out
    assert "two, Digits" in out and "two, Noisy digits" in out and "x/report.html" in out
    noisy = results(recipe / "x/noisy")
    assert noisy["recipe"]["rows"] == {"sgd": "SGD (CE)", "absgd:sce@lam=-2": "ABSGD (SCE)"}
    assert noisy["recipe"]["reported"] == {"SGD (CE)": [71.5, 0.5]} and noisy["recipe"]["cell"] == "noisy"
    assert noisy["config"]["noise_rate"] == 0.3 and results(recipe / "x/clean")["config"]["noise"] == "none"
    assert "71.5" in (recipe / "x/report.md").read_text()
    before = {path: path.read_bytes() for path in (recipe / "x").rglob("results.json")}
    assert len(before) == 2
    assert cli.main(["train", "--recipe", "two.toml", "--out", "x"]) == 0
    assert capsys.readouterr().out.count("this training is complete") == 2
    assert all(path.read_bytes() == content for path, content in before.items())


def test_one_cell_made_small(recipe):
    assert cli.main(["train", "--recipe", "two.toml", "--cell", "noi", "--scale", "data=0.5,epochs=0.25", "--seeds", "1"]) == 0
    assert [path.name for path in (recipe / "absgd-two").iterdir()] == ["noisy"]
    made = results(recipe / "absgd-two/noisy")
    assert (made["config"]["per_class"], made["config"]["epochs"], made["config"]["seeds"]) == (15, 1, 1)
    assert made["runs"][0]["train_counts"] == [15] * 10


def test_goes_on_where_it_stopped(recipe, monkeypatch):
    command = ["train", "--recipe", "two.toml", "--checkpoint-every", "1", "--out"]
    assert cli.main([*command, "never"]) == 0
    keep, steps = checkpoint.Keeper.__call__, iter(range(10_000))

    def stopped(self, take, finished):
        keep(self, take, finished)
        if next(steps) == 30:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Keeper, "__call__", stopped)
        assert cli.main([*command, "x"]) == 1
    assert (recipe / "x/clean/checkpoint.pt").is_file() and not (recipe / "x/noisy").exists()
    assert cli.main([*command, "x"]) == 0
    for cell in ("clean", "noisy"):
        assert parameters(recipe / "x" / cell) == parameters(recipe / "never" / cell)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--recipe", "three.toml"], ["three.toml"]),
        (["--recipe", "absgd-tabel1"], ["'absgd-tabel1'", "absgd-table1"]),
        (["--recipe", "two.toml", "--cell", "dirty"], ["'dirty'", "clean, noisy"]),
        (["--recipe", "two.toml", "--scale", "2"], ["scale"]),
        (["--recipe", "two.toml", "--resume", "x"], ["resume", "goes on by itself"]),
        (["--recipe", "two.toml", "--lam", "0"], ["clean: lam: got 0.0"]),
        (["--cell", "clean"], ["--cell is for --recipe"]),
        (["--scale", "0.5"], ["--scale is for --recipe"]),
        (["--recipe", "absgd-table1", "--cell", "cifar10-lt-100"], ["cifar10", "--data-root"]),
    ],
)
def test_bad_arguments_cost_one_line(options, words, recipe, capsys):
    line = refused(capsys, "train", *options)
    assert all(word in line for word in words), line
    assert [path.name for path in recipe.iterdir()] == ["two.toml"]


def test_another_recipe_in_the_same_folder_is_refused(recipe, capsys):
    assert cli.main(["train", "--recipe", "two.toml", "--cell", "noisy", "--out", "x"]) == 0
    before = (recipe / "x/noisy/results.json").read_bytes()
    (recipe / "two.toml").write_text(RECIPE.replace("noise_rate = 0.3", "noise_rate = 0.2"))
    capsys.readouterr()
    assert cli.main(["train", "--recipe", "two.toml", "--cell", "noisy", "--out", "x"]) == 2
    assert "noise-rate: x/noisy/results.json was made with 0.3, got 0.2" in capsys.readouterr().err
    assert (recipe / "x/noisy/results.json").read_bytes() == before


@pytest.mark.parametrize(
    "first, words",
    [
        (["--scale", "data=0.5"], "per-class: x/noisy/results.json was made with 15, got 30"),
        (["--gamma", "0.5"], "gamma: x/noisy/results.json was made with 0.5, got 0.9"),
        (["--weight-decay", "0.01"], "weight-decay: x/noisy/results.json was made with 0.01, got 0.0001"),
    ],
)
def test_a_training_with_other_options_is_not_taken_for_the_recipe(first, words, recipe, capsys):
    """Settings that the second command does not name count too, with their defaults."""
    command = ["train", "--recipe", "two.toml", "--cell", "noisy", "--seeds", "1", "--out", "x"]
    assert cli.main([*command, *first]) == 0
    capsys.readouterr()
    assert cli.main([*command, *first]) == 0 and "this training is complete" in capsys.readouterr().out
    assert cli.main(command) == 2
    assert words in capsys.readouterr().err


def test_the_names_are_listed(capsys):
    assert cli.main(["train", "--recipe", "list"]) == 0
    assert "absgd-table1: Imbalanced CIFAR" in capsys.readouterr().out


def test_two_processes_train_a_recipe(recipe):
    """Each of them finds out by itself which cells are left; one of them writes."""
    command = ["-m", "absgd_fast", "train", "--recipe", "two.toml", "--seeds", "1", "--epochs", "1", "--out", "x"]
    for _ in range(2):
        done = torchrun(command, recipe)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("this training is complete") == 4
    assert sorted(path.name for path in (recipe / "x").iterdir()) == ["clean", "noisy", "report.html", "report.json", "report.md"]
    assert "71.5" in (recipe / "x/report.md").read_text()


def test_two_processes_train_as_one(in_an_empty_folder):
    """Batches of 64 on two processes, 32 each: the same gradients, up to rounding, and the normaliser of the whole batch."""
    methods = "sgd,absgd@lam=0.7,absgd+sam:vs+tla+adrw@lam=5,resample"
    options = ["train", "--model", "linear", "--methods", methods, "--per-class", "64", "--epochs", "3", "--seeds", "1"]
    done = torchrun(["-m", "absgd_fast", *options, "--out", "two"], in_an_empty_folder)
    assert done.returncode == 0, done.stderr
    assert cli.main([*options, "--out", "one"]) == 0
    two, one = ({run["method"]: run for run in results(in_an_empty_folder / name)["runs"]} for name in ("two", "one"))
    assert two.keys() == one.keys() and len(one) == 4
    for method, run in one.items():
        assert two[method]["train_loss"] == pytest.approx(run["train_loss"], rel=1e-4)
        assert two[method]["accuracy"] == pytest.approx(run["accuracy"], abs=0.4)
        logs = [r["epochs"]["log_s"][-1] for r in (two[method], run)]
        assert logs[0] == (None if logs[1] is None else pytest.approx(logs[1], rel=1e-4))


def test_methods_of_one_process_are_refused_under_several(in_an_empty_folder):
    options = ["train", "--methods", "sgd,l2rw", "--epochs", "1", "--seeds", "1"]
    done = torchrun(["-m", "absgd_fast", *options], in_an_empty_folder)
    assert done.returncode != 0 and "method l2rw: got 2 processes of torchrun, expected one" in done.stderr
    assert not (in_an_empty_folder / "absgd-results").exists()
