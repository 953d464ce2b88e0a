"""`absgd-fast tune`: what it prints and writes, bad options, failures, and going on after a kill with the same bits."""

import html
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from test_cli import ROOT, in_an_empty_folder, refused  # noqa: F401 (a fixture)

from absgd_fast import __main__ as cli
from absgd_fast.experiments import data, train, tune, tune_report
from absgd_fast.experiments.method import Setup
from absgd_fast.selection import Candidate
from absgd_fast.selection.candidates import DEFAULTS
from absgd_fast.selection.record import FILE

QUICK = ["tune", "--model", "linear", "--epochs", "6", "--noise", "symmetric", "--candidates", "inf,-2,-0.5"]


def without_times(results):
    """The results without what differs between two runs on one machine."""
    final = {name: value for name, value in results["final"].items() if name != "seconds"}
    return {name: value for name, value in results.items() if name != "created"} | {"final": final}


def read(folder):
    return json.loads((folder / tune.RESULTS).read_text())


def test_tune(capsys, in_an_empty_folder):
    assert cli.main([*QUICK, "--out", "deep/results"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "inf: epoch 6 of 6" in out and "which λ?" in out and "written:" in out
    folder = in_an_empty_folder / "deep" / "results"
    assert sorted(path.name for path in folder.iterdir()) == [tune.RESULTS, FILE, tune.PAGE]
    results = read(folder)
    assert [row["candidate"] for row in results["table"]] == ["inf", "-2", "-0.5"] and results["chosen"] in results["scores"]
    assert len(results["scores"][results["chosen"]]) == 6 and results["rungs"] == [4, 5] and results["window"] == 1
    assert results["held out"] + results["trained on"] == 1100 and results["command"].startswith("absgd-fast tune --model linear")
    assert results["final"]["accuracy"] > 50 and len(results["final"]["epochs"]["accuracy"]) == 6
    assert f"{results['final']['accuracy']:.1f} % on" in " ".join(out.split())
    page = html.unescape((folder / tune.PAGE).read_text())
    assert (
        page.count("<img") == 1
        and results["command"] in page
        and 'src="data:image' in page
        and "http" not in page.split("</style>")[1]
    )
    assert all(text in page for text in tune_report.answers(results).values() if "'" not in text)
    for line in results["code"].splitlines():
        assert line in out and line.split("#")[0].strip() in page


def test_it_chooses_by_the_held_out_labels_as_select_does():
    """The last training is that of train.runs with the same lambda; the held-out scores are those of wrong labels too."""
    config = train.Config(methods=("sgd",), model="linear", epochs=4, noise="symmetric", seeds=1)
    source = data.load_source("digits")
    results = tune.tune(config, source, [Candidate.named("inf")], progress=False)
    (run,) = train.runs(config)
    assert results["final"]["accuracy"] == pytest.approx(run["accuracy"], abs=0.5)  # torch's fused SGD sums in another order
    assert results["scores"]["inf"][-1] < 75  # 40 % of the held-out labels are wrong, too


def test_a_balanced_goal(capsys, in_an_empty_folder):
    argv = ["tune", "--model", "linear", "--epochs", "4", "--imbalance", "lt", "--rho", "10", "--goal", "balanced", "--seed", "3"]
    assert cli.main([*argv, "--holdout", "0.2"]) == 0
    results = read(in_an_empty_folder / "absgd-tune")
    assert [row["candidate"] for row in results["table"]] == ["inf", "ess0.95", "ess0.9", "ess0.7"]
    assert "balanced accuracy" in capsys.readouterr().out and results["goal"] == "balanced" and results["seed"] == 3
    assert results["config"]["rho"] == 10 and "lam" not in results["config"]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--goal", "f1"], ["goal: got f1", "accuracy, balanced"]),
        (["--holdout", "0"], ["holdout: got 0.0", "(0, 1)"]),
        (["--holdout", "1"], ["holdout: got 1.0"]),
        (["--holdout", "nan"], ["holdout: got nan"]),
        (["--holdout", "-1e-1"], ["holdout: got -0.1"]),
        (["--seed", "-1"], ["seed: got -1"]),
        (["--threads", "0"], ["threads: got 0"]),
        (["--checkpoint-every", "-5"], ["checkpoint-every: got -5"]),
        (["--candidates", ""], ["candidates: got none"]),
        (["--candidates", "inf,inf"], ["inf more than once"]),
        (["--candidates", "inf,0"], ["candidates: got '0'"]),
        (["--candidates", "inf,strong"], ["candidates: got 'strong'", "ess0.7"]),
        (["--candidates", "ess1.5"], ["candidates: got 'ess1.5'", "(0, 1)"]),
        (["--model", "vgg"], ["'vgg'"]),
        (["--dataset", "nowhere"], ["'nowhere'"]),
        (["--lr", "0"], ["lr: got 0.0"]),
        (["--noise", "none", "--imbalance", "lt", "--rho", "100"], ["class 8, 9 have a single", "--rho of at most 55"]),
        (["--lam", "-0.5"], ["--lam"]),
        (["--methods", "sgd"], ["--methods"]),
        (["--resume", "x"], ["--resume"]),
        (["extra"], ["extra"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_options_cost_one_line_and_write_nothing(options, words, capsys, in_an_empty_folder):
    line = refused(capsys, *QUICK, "--out", "results", *options)
    assert all(word in line for word in words)
    assert list(in_an_empty_folder.iterdir()) == []


@pytest.mark.parametrize("module", ["rich", "jinja2", "matplotlib", "sklearn"])
def test_missing_extras_are_named(module, monkeypatch, capsys):
    from absgd_fast.commands import common

    find = common.importlib.util.find_spec
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    line = refused(capsys, *QUICK)
    assert f"tune needs {module}" in line and 'pip install "absgd_fast[experiments]"' in line


def test_the_same_folder_takes_the_same_options_only(capsys, in_an_empty_folder):
    assert cli.main([*QUICK, "--out", "results"]) == 0
    before = read(in_an_empty_folder / "results")
    capsys.readouterr()
    for options, words in [
        (["--lr", "0.05"], "lr: it was made with 0.1, got 0.05"),
        (["--seed", "1"], "seed: it was made with 0, got 1"),
        (["--candidates", "inf,-1"], "candidates"),
        (["--noise-rate", "0.3"], "noise_rate: it was made with 0.4, got 0.3"),
        (["--holdout", "0.2"], "held-out samples"),
        (["--threads", "2"], "threads"),
    ]:
        assert words in refused(capsys, *QUICK, "--out", "results", *options)
    assert read(in_an_empty_folder / "results") == before
    assert cli.main([*QUICK, "--out", "results"]) == 0  # again: only the last training is done anew
    out = capsys.readouterr().out
    assert without_times(read(in_an_empty_folder / "results")) == without_times(before) and "inf: epoch" not in out


def test_all_candidates_fail(monkeypatch, capsys, in_an_empty_folder):
    def broken(self, *arguments):
        raise FloatingPointError("the loss is nan")
        yield

    monkeypatch.setattr(tune.Trainer, "__call__", broken)
    assert cli.main([*QUICK, "--out", "results"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "all 3 candidates failed" in err and err.count("FloatingPointError") == 3
    assert (in_an_empty_folder / "results" / FILE).exists()


def test_a_candidate_that_fails_is_reported(monkeypatch, capsys, in_an_empty_folder):
    whole = tune.Trainer.__call__

    def broken(self, candidate, *arguments, folder):
        if candidate.name == "-2":
            raise FloatingPointError("the loss is nan")
        return whole(self, candidate, *arguments, folder=folder)

    monkeypatch.setattr(tune.Trainer, "__call__", broken)
    assert cli.main([*QUICK, "--out", "results"]) == 0
    results = read(in_an_empty_folder / "results")
    assert results["table"][1]["outcome"] == "failed: FloatingPointError: the loss is nan"
    note, page = "ramp to −2 failed: FloatingPointError: the loss is nan", in_an_empty_folder / "results" / tune.PAGE
    assert note in " ".join(capsys.readouterr().out.split()) and note in page.read_text()


def spoiled(monkeypatch, which):
    """Makes a parameter NaN after the second epoch of a training for which which(candidate, split) holds."""
    whole = tune.method_of

    def method_of(candidate):
        def make(setup):
            method = whole(candidate)(setup)
            step = method.after_epoch

            def after_epoch():
                step()
                if which(candidate, setup.split) and method.stateful["schedule"].count >= 2:
                    setup.parameters[0].data.fill_(math.nan)

            method.after_epoch = after_epoch
            return method

        return make

    monkeypatch.setattr(tune, "method_of", method_of)


NOT_FINITE = "FloatingPointError: the logits of the held-out images are not finite after epoch"


def test_networks_that_have_become_nan_are_no_choice(capsys, in_an_empty_folder):
    """The argmax of NaN is class 0, so each would have an accuracy. The second call takes the failures from the record."""
    argv = [*QUICK, "--lr", "1e12", "--epochs", "4", "--out", "x"]
    for _ in range(2):
        assert cli.main(argv) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "all 3 candidates failed" in err and err.count(f"{NOT_FINITE} 1") == 3


def test_the_others_go_on_when_a_network_becomes_nan(monkeypatch, capsys, in_an_empty_folder):
    spoiled(monkeypatch, lambda candidate, split: candidate.name == "-2")
    assert cli.main([*QUICK, "--out", "x"]) == 0
    inf, two, half = read(in_an_empty_folder / "x")["table"]
    assert two["outcome"] == f"failed: {NOT_FINITE} 2" and two["epochs"] == 1
    assert capsys.readouterr().err == ""  # the report says it, and select's warning would say it again
    assert {inf["outcome"], half["outcome"]} <= {"chosen", "finished", "stopped after 4 of 6", "stopped after 5 of 6"}


def test_a_training_that_goes_on_becomes_nan_in_the_same_epoch(monkeypatch, tmp_path):
    """The predictions of its first epoch come from the checkpoint, which was written before the second one was judged."""
    spoiled(monkeypatch, lambda candidate, split: True)
    source = data.load_source("digits")
    config, split = train.Config(methods=("absgd",), model="linear", epochs=4), data.draw(source, 0)
    seen = []
    for _ in range(2):
        training = tune.Trainer(config, source, split, 0, every=1)(
            Candidate.named("-1"), torch.arange(1000), torch.arange(1000, 1100), 4, tmp_path
        )
        seen.append(next(training))
        with pytest.raises(FloatingPointError, match="the logits of the held-out images are not finite after epoch 2"):
            next(training)
        assert len(tune.load(tmp_path / tune.CHECKPOINT)["state"]["predictions"]) == 1
    assert torch.equal(*seen)


def test_a_last_training_that_becomes_nan_is_no_result(monkeypatch, capsys, in_an_empty_folder):
    spoiled(monkeypatch, lambda candidate, split: len(split.y) == 1100)
    assert cli.main([*QUICK, "--out", "x"]) == 1
    err = capsys.readouterr().err
    assert "was chosen, but" in err and "the logits of the test images are not finite after epoch 2" in err
    assert not (in_an_empty_folder / "x" / tune.RESULTS).exists()


CODE = {
    "-2": "criterion = ab.ABLoss(lam=-2.0, gamma=0.5, mix=0.5)",
    "inf": 'criterion = ab.ABLoss(lam=float("inf"), gamma=0.5, mix=0.5)  # the plain mean',
    "ess0.7": "criterion = ab.ABLoss(lam=ab.TargetESS(0.7), mix=0.5)",
}


@pytest.mark.parametrize("name", CODE)
def test_the_code_has_the_options(name, capsys, in_an_empty_folder):
    argv = ["tune", "--model", "linear", "--epochs", "3", "--gamma", "0.5", "--mix", "0.5", f"--candidates={name}", "--out", "x"]
    assert cli.main(argv) == 0
    results = read(in_an_empty_folder / "x")
    assert results["code"].splitlines()[0] == CODE[name] and CODE[name] in capsys.readouterr().out
    assert CODE[name] in html.unescape((in_an_empty_folder / "x" / tune.PAGE).read_text())


@pytest.mark.parametrize("candidate", [Candidate("now", -1.0), Candidate.named("-1"), Candidate.named("ess0.7")])
def test_a_candidate_is_trained_with_these_options(candidate):
    config, split = train.Config(gamma=0.5, mix=0.25), data.draw(data.load_source("digits"), 0)
    loss = tune.method_of(candidate)(Setup(list(torch.nn.Linear(64, 10).parameters()), config, split, 10, 0)).loss
    assert loss.mix == 0.25 and loss.gamma == (0.9 if candidate.name == "ess0.7" else 0.5)


@pytest.mark.parametrize(
    "options, goal",
    [
        ([], "accuracy"),
        (["--noise", "symmetric"], "accuracy"),
        (["--imbalance", "lt", "--rho", "10"], "balanced"),
        (["--imbalance", "step", "--rho", "10", "--noise", "symmetric", "--noise-rate", "0.1"], "balanced"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_the_goal_suits_the_data(options, goal, capsys, in_an_empty_folder):
    """Without --goal. Given, it is the same for the folder; another one is refused."""
    argv = ["tune", "--model", "linear", "--epochs", "2", *options, "--out", "x"]
    assert cli.main(argv) == 0
    results = read(in_an_empty_folder / "x")
    assert results["goal"] == goal and [row["candidate"] for row in results["table"]] == list(DEFAULTS[goal])
    assert cli.main([*argv, "--goal", goal]) == 0
    capsys.readouterr()
    (other,) = DEFAULTS.keys() - {goal}
    assert f"goal: it was made with '{goal}', got '{other}'" in refused(capsys, *argv, "--goal", other)
    assert cli.main(argv) == 0
    assert read(in_an_empty_folder / "x")["goal"] == goal


def test_no_option_of_other_commands_is_listed(capsys, in_an_empty_folder):
    assert cli.main([*QUICK, "--epochs", "2", "--out", "x"]) == 0
    assert cli.main(["tune", "--help"]) == 0
    listed, known = read(in_an_empty_folder / "x")["config"], capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in known for name in listed)
    assert "<dt>audit</dt>" not in (in_an_empty_folder / "x" / tune.PAGE).read_text()


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys, in_an_empty_folder):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "tune", interrupted)
    assert cli.main([*QUICK, "--out", "results"]) == 1
    assert "interrupted; the scores are in results, and the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("epochs_before", [2, 8, 15, 20])
def test_going_on_from_checkpoints_gives_the_same_bits(epochs_before, tmp_path):
    """Interrupted after so many epochs, with a checkpoint after every third step: before and at a rung, in the last training."""
    config = train.Config(methods=("absgd",), model="linear", epochs=6, noise="symmetric")
    source, candidates = data.load_source("digits"), [Candidate.named(text) for text in ("inf", "-2", "-0.5")]
    loaded = []

    def tuned(out, progress=False):
        return without_times(tune.tune(config, source, candidates, out=out, every=3, progress=progress))

    def stop(name, epoch, score):
        loaded.append(name)
        if len(loaded) == epochs_before:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "stopped", stop)
    assert list((tmp_path / "stopped").glob("*/checkpoint.pt"))
    assert tuned(tmp_path / "stopped") == tuned(tmp_path / "whole")


def test_a_checkpoint_is_read(tmp_path, monkeypatch):
    """A training that goes on from its checkpoint does not begin again."""
    config = train.Config(methods=("absgd",), model="linear", epochs=4)
    split = data.draw(data.load_source("digits"), 0)
    make = lambda: tune.Trainer(config, data.load_source("digits"), split, 0, every=1)(  # noqa: E731
        Candidate.named("-1"), torch.arange(1000), torch.arange(1000, 1100), 4, tmp_path
    )
    whole = list(make())
    assert list(tmp_path.iterdir()) and all(torch.equal(a, b) for a, b in zip(make(), whole))
    begun = make()
    steps = []
    monkeypatch.setattr(train.methods.Method, "step", lambda *arguments: steps.append(1))
    assert torch.equal(next(begun), whole[0]) and not steps  # from the file


def test_sigkill(in_an_empty_folder):
    """Killed in the middle, and run again: the same results to the last bit."""
    command = [*QUICK, "--epochs", "30", "--checkpoint-every", "20"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, "-m", "absgd_fast", *command, "--out", "killed"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=in_an_empty_folder,
    )
    assert process.stdout.readline().startswith("inf: epoch 8 of 30")
    time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (in_an_empty_folder / "killed" / tune.RESULTS).exists()
    assert cli.main([*command, "--out", "killed"]) == 0 and cli.main([*command, "--out", "whole"]) == 0
    killed, whole = (without_times(read(in_an_empty_folder / name)) | {"command": ""} for name in ("killed", "whole"))
    assert killed == whole and killed["final"]["parameters"] == whole["final"]["parameters"]


def results_of(*outcomes, chosen="inf"):
    """Results as tune() returns them, by hand."""
    table = [
        {"candidate": name, "score": 50.0 - i, "behind": float(i), "error": 0.5, "epochs": 10, "outcome": outcome}
        for i, (name, outcome) in enumerate(outcomes)
    ]
    return {
        "config": {"dataset": "digits", "imbalance": "none", "noise": "none", "model": "mlp", "epochs": 10},
        "goal": "accuracy",
        "holdout": 0.1,
        "seed": 0,
        "chosen": chosen,
        "code": "",
        "reason": "",
        "table": table,
        "scores": {row["candidate"]: [50.0] * 10 for row in table},
        "rungs": [5, 8],
        "window": 1,
        "held out": 110,
        "trained on": 990,
        "final": {"accuracy": 90.0, "balanced_accuracy": 89.0},
        "command": "",
        "environment": {},
        "created": "",
    }


def test_the_strongest_candidate_is_called_so():
    said = "Ramp to −2 is the strongest candidate."
    others = [("inf", "finished"), ("-5", "finished"), ("2", "finished"), ("ess0.5", "finished")]
    assert any(said in note for note in tune_report.notes(results_of(*others, ("-2", "chosen"), chosen="-2")))
    assert not any("strongest" in note for note in tune_report.notes(results_of(*others, ("-2", "finished"))))
    stronger = results_of(*others, ("-2", "chosen"), ("-1", "finished"), chosen="-2")
    assert not any("strongest" in note for note in tune_report.notes(stronger))


def test_the_sentences():
    first = tune_report.answers(results_of(("inf", "chosen"), ("-2", "finished")))
    assert first["choice"] == "∞, the plain mean." and "1.00 ± 0.50 points ahead of the next best, ramp to −2" in first["why"]
    tie = results_of(("-2", "finished"), ("inf", "chosen"))
    assert "Ramp to −2 is 1.00 ± 0.50 points ahead of it, at most half an error." in tune_report.answers(tie)["why"]
    same = results_of(("inf", "chosen"), ("-2", "finished"))
    same["table"][1] |= {"score": 50.0, "behind": 0.0, "error": 0.0}
    assert "Ramp to −2 has the same score, but stands later in the list." in tune_report.answers(same)["why"]
    alone = results_of(("-2", "stopped after 5 of 10"), ("inf", "chosen"))
    assert "No other candidate came to its end." in tune_report.answers(alone)["why"]
    assert "20 of 20 epochs" in first["why"] and "90.0 % on the test set" in first["final"]


@pytest.mark.parametrize(
    "name, words",
    [("inf", "∞, the plain mean"), ("Infinity", "∞, the plain mean"), ("0.5", "ramp to 0.5"), ("ess0.9", "ESS/n = 0.9")],
)
def test_names(name, words):
    assert tune_report.shown(Candidate.named(name).name) == words


@pytest.mark.parametrize("options", [{"imbalance": "lt", "rho": 100.0}, {"imbalance": "step", "rho": 200.0}, {"per_class": 1}])
def test_what_a_class_of_one_image_needs(options):
    """The refusal names options with which there is none."""
    source = data.load_source("digits")
    config = train.Config(methods=("absgd",), model="linear", epochs=1, **options)
    with pytest.raises(ValueError, match=r"single training image") as raised:
        tune.tune(config, source, progress=False)
    if "rho" not in options:
        assert "give a larger --per-class" in str(raised.value) and "--rho" not in str(raised.value)
        return
    rho = float(re.search(r"--rho of at most ([\d.]+)", str(raised.value))[1])
    config = train.Config(methods=("absgd",), model="linear", epochs=1, imbalance=options["imbalance"], rho=rho)
    assert tune.tune(config, source, [Candidate.named("inf")], progress=False)["chosen"] == "inf"


@pytest.mark.parametrize(
    "options, advice",
    [
        ({"imbalance": "lt", "rho": 100.0}, "give a --rho of at most 55"),
        ({"imbalance": "lt", "rho": 100.0, "per_class": 110}, "give a --rho of at most 55"),
        ({"imbalance": "lt", "rho": 100.0, "per_class": 60}, "give a --rho of at most 30"),  # 110 are still too few for 100
        ({"imbalance": "lt", "rho": 50.0, "per_class": 60}, "give a --rho of at most 30 or a larger --per-class"),
        ({"imbalance": "lt", "rho": 50.0, "per_class": 1}, "give a larger --per-class"),
        ({"per_class": 1}, "give a larger --per-class"),
    ],
    ids=str,
)
def test_the_advice_can_be_followed(options, advice):
    """Digits have 110 images of each class, which is also the default of --per-class."""
    config = train.Config(methods=("absgd",), model="linear", epochs=1, **options)
    with pytest.raises(ValueError, match=f": {advice}$"):
        tune.tune(config, data.load_source("digits"), progress=False)


def test_a_data_set_with_too_few_images_gets_no_advice():
    source = data.Source("tiny", 2, torch.zeros(8, 1, 2, 2), torch.arange(8) % 2, None, n_max=1, n_test=3)
    with pytest.raises(ValueError, match="each class, which tiny does not have with these options$"):
        tune.tune(train.Config(methods=("absgd",), model="linear", epochs=1), source, progress=False)


def test_wrong_labels_may_leave_a_single_image():
    """Then a rho that is already small enough for the counts is too large."""
    config = train.Config(methods=("absgd",), imbalance="lt", rho=50.0)
    with pytest.raises(ValueError, match="give a smaller --rho$"):
        tune._check_classes(torch.tensor([0, 0, 1]), config, data.load_source("digits"))


def test_only_checkpoints_are_removed(tmp_path):
    """Not what a user has in a folder of a similar name."""
    mine = tmp_path / "candidate-photos" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    config = train.Config(methods=("absgd",), model="linear", epochs=2)
    results = tune.tune(config, data.load_source("digits"), [Candidate.named("inf")], out=tmp_path, every=1, progress=False)
    assert (tmp_path / "candidate-0" / tune.CHECKPOINT).exists()
    tune.write(results, tmp_path)
    assert mine.read_text() == "mine" and not (tmp_path / "candidate-0").exists() and not (tmp_path / "candidate-refit").exists()


def test_a_full_disk_is_no_failure_of_a_candidate(monkeypatch, capsys, in_an_empty_folder):
    """Checkpoints that cannot be written end the command; the same command goes on."""
    from absgd_fast.experiments import checkpoint

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_whole", full)
        assert cli.main([*QUICK, "--out", "results", "--checkpoint-every", "40"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "No space left on device" in err and tune.CHECKPOINT in err
    assert cli.main([*QUICK, "--out", "results"]) == 0
    assert not any("failed" in row["outcome"] for row in read(in_an_empty_folder / "results")["table"])


def test_notes():
    assert tune_report.notes(results_of(("inf", "chosen"))) == []
    few = results_of(("inf", "chosen"), ("-2", "failed: the score of epoch 3 is nan")) | {"held out": 30}
    failed, small = tune_report.notes(few)
    assert failed.startswith("ramp to −2 failed: the score of epoch 3 is nan") and "30 images" in small
    assert tune_report.html(few).count('class="card note"') == 2
