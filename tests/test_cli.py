"""The command line: exit codes, messages, and what is written and what is not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import absgd_fast
from absgd_fast import __main__ as cli
from absgd_fast.commands import bench, common
from absgd_fast.experiments import report, train

QUICK = ["train", "--model", "linear", "--epochs", "2", "--seeds", "2", "--methods", "sgd,absgd"]
ROOT = Path(cli.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *argv):
    """Runs a command that must be refused with exit code 2 and one line on stderr; returns the line."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("absgd-fast: ")
    return err


@pytest.mark.parametrize(
    "options, words",
    [
        (["--dataset", "svhn"], ["'svhn'", "digits, digits-9-4, cifar10, cifar100, mnist"]),
        (["--methods", "sgd,adam"], ["'adam'", "sgd, absgd, ramp, targetess, reference"]),
        (["--methods", ","], ["methods"]),
        (["--methods", "sgd,sgd"], ["'sgd,sgd'", "at most once"]),
        (["--model", "vgg"], ["'vgg'", "linear, mlp, cnn, resnet32"]),
        (["--model", "resnet32"], ["resnet32", "8×8", "use linear, mlp or cnn"]),
        (["--imbalance", "exp"], ["'exp'", "none, lt, step"]),
        (["--noise", "pairflip"], ["'pairflip'", "symmetric"]),
        (["--noise", "sym"], ["unknown noise 'sym'", "did you mean symmetric?"]),
        (["--dataset", "fashionmnist"], ["unknown dataset 'fashionmnist'", "did you mean fashion-mnist?"]),
        (["--model", "resnet-32"], ["unknown model 'resnet-32'", "did you mean resnet32?"]),
        (["--amp", "bf_16"], ["unknown amp 'bf_16'", "did you mean bf16?"]),
        (["--loss", "focal2"], ["'focal2'", "ce"]),
        (["--lam", "0"], ["lam: got 0.0", "other than 0"]),
        (["--lam", "nan"], ["lam: got nan"]),
        (["--lam", "high"], ["--lam", "'high'"]),
        (["--gamma", "0"], ["gamma: got 0.0", "(0, 1]"]),
        (["--gamma", "1.1"], ["gamma: got 1.1"]),
        (["--mix", "-1"], ["mix: got -1.0"]),
        (["--warmup", "1.5"], ["warmup: got 1.5", "[0, 1]"]),
        (["--per-class", "0"], ["per-class: got 0", "at least 1"]),
        (["--per-class", "111"], ["per-class: got 111", "at most 110", "every class of digits"]),
        (["--per-class", "all"], ["--per-class", "'all'"]),
        (["--share", "0"], ["share: got 0.0", "(0, 1)"]),
        (["--share", "1"], ["share: got 1.0", "(0, 1)"]),
        (["--share", "nan"], ["share: got nan", "(0, 1)"]),
        (["--sign", "0"], ["sign: got 0", "1 (λ > 0) or -1 (λ < 0)"]),
        (["--sign", "-2"], ["sign: got -2"]),
        (["--sign", "0.5"], ["--sign", "'0.5'"]),
        (["--beta", "0"], ["beta: got 0.0", "(0, 1]"]),
        (["--beta", "1.5"], ["beta: got 1.5"]),
        (["--reg", "-1"], ["reg: got -1.0"]),
        (["--chi2-rho", "-0.5"], ["chi2-rho: got -0.5"]),
        (["--chi2-rho", "inf"], ["chi2-rho: got inf", "finite"]),
        (["--eta", "nan"], ["eta: got nan"]),
        (["--clean", "0"], ["clean: got 0", "at least 1"]),
        (["--l2rw-method", "exact"], ["l2rw-method 'exact'", "jvp, finite_difference"]),
        (["--noise-rate", "1"], ["noise-rate: got 1.0", "[0, 1)"]),
        (["--noise-rate", "nan"], ["noise-rate: got nan"]),
        (["--rho", "0.5"], ["rho: got 0.5", "≥ 1"]),
        (["--rho", "inf"], ["rho: got inf"]),
        (["--epochs", "0"], ["epochs: got 0", "at least 1"]),
        (["--epochs", "2.5"], ["--epochs", "'2.5'"]),
        (["--lr", "-0.1"], ["lr: got -0.1", "> 0"]),
        (["--lr", "-1e-1"], ["lr: got -0.1"]),
        (["--lr", "inf"], ["lr: got inf"]),
        (["--batch-size", "0"], ["batch-size: got 0"]),
        (["--weight-decay", "-1e-4"], ["weight-decay: got -0.0001"]),
        (["--seeds", "0"], ["seeds: got 0"]),
        (["--threads", "0"], ["threads: got 0"]),
        (["--dataset", "cifar10"], ["--data-root"]),
        (["--dataset", "cifar10", "--data-root", "nowhere"], ["data_batch_1", "nowhere"]),
        (["--epoch", "3"], ["--epoch"]),  # no guessing at abbreviations
        (["--out"], ["--out"]),
        (["extra"], ["extra"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments_cost_one_line_and_write_nothing(options, words, capsys, in_an_empty_folder):
    line = refused(capsys, *QUICK, "--out", "results", *options)
    assert all(word in line for word in words)
    assert list(in_an_empty_folder.iterdir()) == []


def test_out_must_be_a_folder(capsys, in_an_empty_folder):
    file = in_an_empty_folder / "taken"
    file.write_text("mine")
    for out in ("taken", "taken/below"):
        assert "taken is a file" in refused(capsys, *QUICK, "--out", out)
    assert file.read_text() == "mine" and list(in_an_empty_folder.iterdir()) == [file]


def test_out_must_be_writable(monkeypatch, capsys, in_an_empty_folder):
    monkeypatch.setattr(common.os, "access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    assert f"{in_an_empty_folder} cannot be written to" in refused(capsys, *QUICK, "--out", "new/folder")


@pytest.mark.parametrize("argv", [[], ["trane"], ["--nonsense"]])
def test_unknown_command(argv, capsys):
    assert "doctor" in refused(capsys, *argv)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"absgd_fast {absgd_fast.__version__}\n"


HIDES_TORCH = """
import importlib.abc, sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize("hides, says", [(HIDES_TORCH, "pip install torch"), ("", "No module named 'nowhere'")])
def test_without_torch(hides, says, tmp_path):
    """The last line of the error says what to install; but not if a torch is there that lacks something itself."""
    (tmp_path / "torch.py").write_text("import nowhere")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", hides + "import absgd_fast"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and says in done.stderr.splitlines()[-1]
    assert ("pip install torch" in done.stderr) == bool(hides)


def test_help(capsys):
    assert cli.main(["train", "--help"]) == 0
    assert "--noise-rate" in capsys.readouterr().out


@pytest.mark.parametrize("module", ["rich", "jinja2", "matplotlib", "sklearn"])
def test_missing_extras_are_named(module, monkeypatch, capsys, in_an_empty_folder):
    find = common.importlib.util.find_spec
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None if name == module else find(name))
    line = refused(capsys, *QUICK)
    assert module in line and 'pip install "absgd_fast[experiments]"' in line


EXTRAS = ["numpy", "scipy", "sklearn", "matplotlib", "jinja2", "rich", "PIL"]


@pytest.mark.parametrize(
    "argv, code",
    [
        (["doctor"], 0),
        (["--help"], 0),
        (["train", "--dataset", "digits"], 2),
        (["train", "--recipe", "list"], 0),
        (["train", "--resume", "."], 2),
        (["tune", "--dataset", "digits"], 2),
        (["audit", "."], 2),
        (["report", "."], 2),
        (["bench", "--suite", "all"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_torch_alone_is_installed(argv, code, tmp_path):
    """Neither NumPy nor an extra: what needs them says so in one line."""
    command = (
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); from absgd_fast.__main__ import main; sys.exit(main({argv}))"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("absgd-fast")]
    assert "Traceback" not in done.stderr and len(ours) == (code == 2)


def test_missing_reference_is_named(monkeypatch, capsys, in_an_empty_folder):
    monkeypatch.setitem(sys.modules, "absgd", None)
    assert "pip install absgd" in refused(capsys, *QUICK, "--methods", "sgd,reference")
    assert list(in_an_empty_folder.iterdir()) == []


def test_train(capsys, in_an_empty_folder):
    assert cli.main([*QUICK, "--lam", "-5e-1", "--noise", "symmetric", "--out", "deep/results", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "balanced" in out and "absgd" in out and "written:" in out
    results = json.loads((in_an_empty_folder / "deep" / "results" / "results.json").read_text())
    assert len(results["runs"]) == 4 and results["config"]["lam"] == -0.5 and results["partial"] is False
    assert results["command"].startswith("absgd-fast train --model linear") and results["environment"]["threads"] == 1
    assert results["summary"]["absgd"]["accuracy"]["n"] == 2
    page = (in_an_empty_folder / "deep" / "results" / "report.html").read_text()
    assert page.count("<figure") == 5 and results["command"] in page
    assert report.answers(results)["help"].split(".")[0] in out


def interrupt_after(count):
    """train.runs that ends in Ctrl-C once `count` runs are finished."""
    whole = train.runs

    def runs(*arguments):
        for i, run in enumerate(whole(*arguments)):
            if i == count:
                raise KeyboardInterrupt
            yield run

    return runs


def test_ctrl_c_keeps_the_finished_runs(monkeypatch, capsys, in_an_empty_folder):
    monkeypatch.setattr(train, "runs", interrupt_after(3))
    assert cli.main([*QUICK, "--out", "results"]) == 1
    out, _ = capsys.readouterr()
    assert "interrupted" in out and "3 of 4 runs" in " ".join(out.split())
    results = json.loads((in_an_empty_folder / "results" / "results.json").read_text())
    assert results["partial"] is True and len(results["runs"]) == 3
    # sgd trained first on seed 0, absgd first on seed 1
    assert results["summary"]["sgd"]["accuracy"]["n"] == 1 and results["paired"]["absgd"]["accuracy"]["n"] == 1
    assert "interrupted" in (in_an_empty_folder / "results" / "report.html").read_text()


def test_ctrl_c_before_the_first_run_writes_nothing(monkeypatch, capsys, in_an_empty_folder):
    monkeypatch.setattr(train, "runs", interrupt_after(0))
    assert cli.main([*QUICK, "--out", "results"]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert list(in_an_empty_folder.iterdir()) == []


def test_a_real_interrupt(in_an_empty_folder):
    """SIGINT to a training that would take minutes, once its first run is reported."""
    command = [sys.executable, "-m", "absgd_fast", "train", "--model", "linear", "--methods", "sgd,absgd"]
    command += ["--epochs", "20", "--seeds", "10000", "--threads", "1", "--out", "results"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=in_an_empty_folder,
        # a shell's background job, which the tests may be, has SIGINT ignored, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert first.startswith("seed 0") and process.returncode == 1 and "Traceback" not in err
    results = json.loads((in_an_empty_folder / "results" / "results.json").read_text())
    assert results["partial"] is True and 1 <= len(results["runs"]) < 20000
    assert "interrupted" in out and (in_an_empty_folder / "results" / "report.html").exists()


def test_a_failure_while_writing_is_one_line(monkeypatch, capsys, in_an_empty_folder):
    def fail(results, folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(report, "write", fail)
    assert cli.main([*QUICK, "--epochs", "1", "--seeds", "1"]) == 1
    err = capsys.readouterr().err
    assert "No space left" in err and err.count("\n") == 1


def test_doctor(capsys, monkeypatch):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["reference"]["available"] is True and found["torch"]
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "reference" in shown and found["torch"] in shown and "available: yes" in shown
    # a command for broken installations runs without rich too
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["doctor"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_bench_needs_the_checkout(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "absgd_fast" / "commands" / "bench.py"))
    assert "source checkout" in refused(capsys, "bench", "--suite", "loss")


def test_bench_hands_its_options_over(monkeypatch, tmp_path):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()  # a package, so that it comes before one that lies elsewhere on the path
    (tmp_path / "benchmarks" / "run.py").write_text("def main(argv):\n    return len(argv)\n")
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "absgd_fast" / "commands" / "bench.py"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        assert cli.main(["bench", "--suite", "all", "--out", "x.json"]) == 4
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
            del sys.modules[name]


def test_the_package_itself_needs_no_extras():
    code = "import sys, absgd_fast; print(sorted({'rich', 'jinja2', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
