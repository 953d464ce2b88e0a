"""Checkpoints: a training that was killed and resumed ends as one that was never stopped, bit for bit; bad files are named."""

import copy
import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_cli import ROOT, in_an_empty_folder, interrupt_after, refused  # noqa: F401 (a fixture)
from test_experiments import Harmful, cifar_folder, python3_pickle
from torch import nn

from absgd_fast import __main__ as cli
from absgd_fast.experiments import checkpoint, data, methods, report, summary, train
from absgd_fast.experiments.train import Config
from absgd_fast.selection import draws

pytestmark = pytest.mark.usefixtures("one_thread")
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}

# 249 images in batches of 60: the fifth step of an epoch has nine. λ is on from epoch 2 of 0 to 3, the learning rate falls
# after the second and the third epoch.
QUICK = ["--imbalance", "lt", "--model", "linear", "--epochs", "4", "--warmup", "0.5", "--batch-size", "60", "--seeds", "2"]
STEPS = 5 * 4  # of a run
CALLS = STEPS + 1  # of the keeper in a run: the last is between it and the next
WARM = 3 * 2 * 2  # steps of the warm-up


def same(a, b):
    """Equal in every type and bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and checkpoint.digest({"": a}) == checkpoint.digest({"": b})
    return a == b


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def untimed(folder):
    """results.json but for what depends on the clock, and but for its folder's name in the command."""
    results = json.loads((Path(folder) / "results.json").read_text())
    for run in results["runs"]:
        assert len(run["parameters"]) == 64 and run.pop("seconds") > 0
    for part in (*results["summary"].values(), *results["paired"].values()):
        del part["seconds"]
    del results["created"], results["command"]
    return results


# ------------------------------------------------------------------------------------------------ every step of a small one


class Jitter(nn.Module):
    """Draws from each of the global generators while training."""

    def forward(self, x):
        return x * (1 + 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * torch.rand(())) if self.training else x  # noqa: NPY002


@pytest.fixture
def tiny():
    """33 images of 3 classes to train on, coloured, shifted and mirrored while training."""
    images = torch.randint(0, 256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return data.Source("tiny", 3, images, torch.arange(50) % 3, None, n_max=11, n_test=5, augment="crop-flip")


COMPOSED = (
    "sgd+sam",
    "absgd+sam@sam_rho=0.5",
    "absgd+mixup",
    "sgd+mixup+balanced",
    "targetess+balanced",
    "sgd+crt",
    "absgd+lws",
    "sgd+tau",
    "absgd:focal+drw@drw_start=0.5",
    "sgd:vs+tla+adrw@drw_start=0.5",
    "absgd:ldam",
    "reference:sce",
    "absgd@lr_schedule=cosine",
    "absgd@trainable=fc",
)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch says so once, to whoever is first
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("model", ["linear", "mlp", "cnn", "jitter"])
def test_a_run_goes_on_from_every_step(model, tiny, tmp_path, monkeypatch):
    """Three methods, two seeds (one for the larger models), batches of 12, 12 and 9, λ on after the second of four epochs."""
    if model == "jitter":
        make = train.make_model
        monkeypatch.setattr(train, "make_model", lambda *a: nn.Sequential(make(*a), nn.BatchNorm1d(3), nn.Dropout(0.2), Jitter()))
    # a second per step: even `seconds` must come out equal
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    config = Config(
        model="mlp" if model == "jitter" else model,
        noise="symmetric",
        lam=0.7,
        warmup=0.5,
        epochs=4,
        batch_size=12,
        seeds=2 if model == "linear" else 1,
    )
    files = []

    def keep(take, finished):
        files.append(tmp_path / f"{len(files)}.pt")
        checkpoint.save(files[-1], take())

    never_stopped = list(train.runs(config, tiny, keep=keep))
    assert len(files) == config.seeds * 3 * (4 * 3 + 1) and never_stopped[0]["seconds"] == 12
    assert len({run["parameters"] for run in never_stopped}) == len(never_stopped)
    for i, file in enumerate(files):
        state, epochs = checkpoint.load(file), []
        assert not any(tensor.requires_grad for tensor in tensors(state))
        resumed = list(train.runs(config, tiny, lambda *who: epochs.append(who), state=state))
        assert resumed == never_stopped, f"stopped at {i}"
        assert len(epochs) == 4 * 3 * config.seeds - i // 13 * 4 - i % 13 // 3


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch says so once, to whoever is first
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", [*(m for m in methods.METHODS if m not in Config().methods), *COMPOSED])
def test_the_other_methods_go_on_from_every_step(method, tiny, monkeypatch):
    """Their draws and weights of groups are part of the state: two epochs of three batches, the second with the rule (a ramp:
    with half of it)."""
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    config = Config(
        model="mlp",
        noise="symmetric",
        methods=(method,),
        lam=0.7,
        warmup=1.0 if method == "ramp" else 0.5,
        epochs=2,
        batch_size=12,
        seeds=1,
        eta=1.0,
    )
    states = []
    never_stopped = list(train.runs(config, tiny, keep=lambda take, finished: states.append(copy.deepcopy(take()))))
    assert len(states) == 7
    for i, state in enumerate(states):
        assert not any(tensor.requires_grad for tensor in tensors(state))
        assert list(train.runs(config, tiny, state=state)) == never_stopped, f"stopped at {i}"


def test_checkpoints_have_no_influence(tiny):
    config = Config(model="linear", epochs=3, batch_size=12, seeds=1)
    parameters = [run["parameters"] for run in train.runs(config, tiny)]
    assert parameters == [run["parameters"] for run in train.runs(config, tiny, keep=lambda take, finished: take())]


def test_a_state_of_another_run_is_refused(tiny):
    """What follows from the configuration is compared by the command line; this is the last line behind it."""
    states = []
    config = Config(model="linear", methods=("sgd", "absgd"), epochs=1, seeds=1)
    list(train.runs(config, tiny, keep=lambda take, finished: states.append(take())))
    with pytest.raises(ValueError, match="the state is sgd's on seed 0, not absgd's on seed 0"):
        list(train.runs(replace(config, methods=("absgd", "sgd")), tiny, state=states[0]))


def test_random_states():
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.standard_normal(), torch.rand(1).item()  # noqa: NPY002

    draw()  # Python's and numpy's normal numbers come in pairs, of which the second is part of the state
    before = draws.random_state()
    buffer = io.BytesIO()
    torch.save(before, buffer)
    first, second = draw(), draw()
    draws.restore_random_state(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert (first, second) == (draw(), draw())


# ------------------------------------------------------------------------------------------------ when a checkpoint is written


def test_every_so_many_steps_or_seconds(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))
    steps, file = [0], tmp_path / "new" / "checkpoint.pt"

    def written(keeper, seconds=0.0, finished=False):
        """Whether this step left its number in the file."""
        steps[0] += 1
        now[0] += seconds
        keeper(lambda: {"step": steps[0]}, finished)
        return file.exists() and checkpoint.load(file)["state"]["step"] == steps[0]

    assert [written(checkpoint.Keeper(file, {}, every=1))] == [True]
    counted = checkpoint.Keeper(file, {"config": "c"}, every=3)
    assert [written(counted) for _ in range(7)] == [False, False, True, False, False, True, False]
    assert checkpoint.load(file)["config"] == "c"
    timed = checkpoint.Keeper(file, {})
    assert [written(timed, s) for s in (10, 19.9, 0.1, 29, 2, 1)] == [False, False, True, False, True, False]

    # interrupted: the runs finished since the last checkpoint are kept, and nothing older than what is there
    assert timed.interrupted() and checkpoint.load(file)["state"]["step"] == steps[0] - 1
    assert not written(timed, finished=True) and not written(timed)
    assert timed.interrupted() and checkpoint.load(file)["state"]["step"] == steps[0] - 1
    assert not written(timed, finished=True) and written(timed, 40)
    assert timed.interrupted() and checkpoint.load(file)["state"]["step"] == steps[0]
    timed.done()
    assert list(file.parent.iterdir()) == []
    assert not checkpoint.Keeper(file, {}).interrupted()


# ------------------------------------------------------------------------------------------------ a crash while writing


def fail(*arguments, **named):
    raise OSError(errno.ENOSPC, "No space left on device")


class FullDisk(io.FileIO):
    def write(self, content):
        super().write(content[: len(content) // 2])
        fail()


@pytest.mark.parametrize(
    "name, failing, there",
    [
        ("torch.save", fail, "old"),
        ("open", fail, "old"),
        ("open", FullDisk, "old"),
        ("os.fsync", fail, "old"),
        ("os.replace", fail, "old"),
        ("os.open", fail, "new"),  # the folder's, when all is done but its own way to the disk
    ],
)
def test_a_failed_save_leaves_the_last_good_one(tmp_path, monkeypatch, name, failing, there):
    file = tmp_path / "checkpoint.pt"
    checkpoint.save(file, {"x": torch.zeros(100), "text": "old"})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        where, _, attribute = f"checkpoint.{name}".rpartition(".")
        target = {"checkpoint": checkpoint, "checkpoint.torch": torch, "checkpoint.os": os}[where]
        patch.setattr(target, attribute, failing, raising=False)
        checkpoint.save(file, {"x": torch.ones(100), "text": "new"})
    assert checkpoint.load(file)["text"] == there and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_only_what_loads_again_is_saved(tmp_path):
    file = tmp_path / "checkpoint.pt"
    for part, name in ((torch.__version__, "TorchVersion"), (np.float64(1), "numpy.float64"), ([{"a": {1}}], "set")):
        with pytest.raises(TypeError, match=rf"parts\['here'\].*got .*{name}, expected tensors and plain values"):
            checkpoint.save(file, {"here": part})
    assert not file.exists()


# ------------------------------------------------------------------------------------------------ SIGKILL

# One process with everything imported, which forks the trainings: a start takes seconds otherwise. Reads
# [arguments, where, n] and answers with the exit status; the child kills itself at the n-th passage of `where`.
DRIVER = """
import json, os, signal, sys
import sklearn.datasets
import absgd, torch
from absgd_fast import __main__ as cli
from absgd_fast.experiments import checkpoint, report, train

torch.set_num_threads(1)

def kill_at(where, nth):
    passed = [0]

    def reached():
        passed[0] += 1
        return passed[0] == nth

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def before(original):
        return lambda *a, **k: kill() if reached() else original(*a, **k)

    def after(original):
        return lambda *a, **k: (original(*a, **k), reached() and kill())[0]

    class HalfWritten:
        def __init__(self, path, mode):
            self.file = open(path, mode)
        def __enter__(self):
            return self
        def __exit__(self, *exception):
            self.file.close()
        def __getattr__(self, name):
            return getattr(self.file, name)
        def write(self, content):
            if reached():
                self.file.write(content[: len(content) // 2])
                self.file.flush()
                kill()
            self.file.write(content)

    if where == "half written":
        checkpoint.open = HalfWritten
    else:
        target, name, when = {
            "step": (checkpoint.Keeper, "__call__", before),       # done, and not yet kept
            "backward": (torch.Tensor, "backward", after),         # half of a step
            "torch.save": (torch, "save", before),
            "fsync": (os, "fsync", before),                        # twice a checkpoint: the file, the folder
            "replace": (os, "replace", before),
            "replaced": (os, "replace", after),
            "report": (report, "write", before),                   # everything trained, nothing written
            "written": (report, "write", after),                   # the results are there, and so is the checkpoint
        }[where]
        setattr(target, name, when(getattr(target, name)))

report.html = lambda results: ""  # a second of drawing
for line in sys.stdin:
    arguments, where, nth = json.loads(line)
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        if where:
            kill_at(where, nth)
        os._exit(cli.main(arguments))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def driver():
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )

    def train_(*arguments, kill="", nth=0):
        process.stdin.write(json.dumps([["train", *map(str, arguments)], kill, nth]) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield train_
    process.stdin.close()
    process.wait(60)


@pytest.fixture(scope="module")
def never_stopped(driver, tmp_path_factory):
    folder = tmp_path_factory.mktemp("never_stopped")
    assert driver(*QUICK, "--out", folder) == 0
    assert sorted(os.listdir(folder)) == ["report.html", "results.json"]  # and no checkpoint: it took no 30 seconds
    results = untimed(folder)
    assert [(r["method"], r["seed"]) for r in results["runs"]] == [
        ("sgd", 0),
        ("absgd", 0),
        ("reference", 0),
        ("absgd", 1),
        ("reference", 1),
        ("sgd", 1),
    ]
    return results


@pytest.mark.parametrize(
    "every, kill, nth, left",
    [
        # killed at the n-th passage; the checkpoint then holds finished runs, and (method, epoch, step) of the one under way
        (7, "step", 7, None),  # before the first
        (7, "step", 8, (0, "sgd", 1, 2)),
        (7, "backward", WARM + 12, (0, "sgd", 1, 2)),
        (7, "step", CALLS + 10, (1, "absgd", 1, 3)),  # before λ is on
        (1, "backward", WARM + STEPS + 13, (1, "absgd", 2, 2)),  # after
        (1, "step", 2 * CALLS + 11, (2, "reference", 1, 5)),  # λ goes on with the next step
        (1, "step", 2 * CALLS + 12, (2, "reference", 2, 1)),
        (1, "step", 2 * CALLS, (1, "absgd", 3, 5)),  # between two runs
        (1, "step", 3 * CALLS + 1, (2, "reference", 3, 5)),  # and two seeds
        (1, "step", 3 * CALLS + 2, (3, "absgd", 0, 1)),
        (1, "torch.save", 6, (0, "sgd", 0, 5)),  # the last step of an epoch is kept, the epoch is not yet closed
        (1, "half written", 7, (0, "sgd", 1, 1)),
        (1, "fsync", 2 * STEPS + 1, (0, "sgd", 3, 5)),  # the file's, in the first checkpoint of the second run
        (1, "fsync", 2 * STEPS + 2, (1, "absgd", 0, 1)),  # the folder's, of the same one
        (1, "replace", 1, None),
        (1, "replace", 30, (1, "absgd", 1, 4)),
        (1, "replaced", 30, (1, "absgd", 1, 5)),
        (1, "report", 1, (5, "sgd", 3, 5)),
        (1, "written", 1, (5, "sgd", 3, 5)),
    ],
)
def test_killed_and_resumed(driver, never_stopped, tmp_path, every, kill, nth, left):
    out = tmp_path / "results"
    assert driver(*QUICK, "--out", out, "--checkpoint-every", every, kill=kill, nth=nth) == -signal.SIGKILL
    unfinished = out / ".checkpoint.pt.unfinished"
    assert unfinished.exists() == (kill in ("half written", "replace") or (kill, nth) == ("fsync", 2 * STEPS + 1))
    if left is None:
        assert not (out / "checkpoint.pt").exists()
        assert driver("--resume", out) == 2
        assert driver(*QUICK, "--out", out) == 0
    else:
        state = checkpoint.load(out / "checkpoint.pt")["state"]
        running = state["running"]
        assert (len(state["finished"]), *(running[key] for key in ("method", "epoch", "step"))) == left
        assert driver("--resume", out) == 0
    assert sorted(os.listdir(out)) == ["report.html", "results.json"]
    assert untimed(out) == never_stopped


def progress(file):
    """How far the training has come that writes there; what is read may be replaced, never half."""
    try:
        state = checkpoint.load(file)["state"]
    except FileNotFoundError:
        return -1, 0
    return len(state["finished"]), state["running"]["epoch"]


@pytest.mark.deep
def test_killed_again_and_again(driver, tmp_path):
    """The command itself, killed from outside at whatever it is doing: in absgd's run after λ went on, in the reference's
    before; resumed each time, with checkpoints as often as it was told at first."""
    options = ["--noise", "symmetric", "--epochs", "5", "--warmup", "0.4", "--seeds", "1", "--batch-size", "100"]
    assert driver(*options, "--out", tmp_path / "never") == 0
    out, arguments = tmp_path / "results", [*options, "--checkpoint-every", "1", "--out", "results"]
    for goal in ((1, 3), (2, 1), None):
        process = subprocess.Popen(
            [sys.executable, "-m", "absgd_fast", "train", *arguments], stdout=subprocess.DEVNULL, env=ENVIRONMENT, cwd=tmp_path
        )
        try:
            if goal is None:
                assert process.wait(120) == 0
            else:
                end = time.monotonic() + 120
                while progress(out / "checkpoint.pt") < goal and process.poll() is None and time.monotonic() < end:
                    time.sleep(0.02)
        finally:
            process.kill()
        assert goal is None or process.wait(60) == -signal.SIGKILL
        arguments = ["--resume", "results"]
    assert untimed(out) == untimed(tmp_path / "never")
    assert json.loads((out / "results.json").read_text())["command"].endswith("--checkpoint-every 1 --out results")


def test_ctrl_c_and_resume(monkeypatch, capsys, never_stopped, in_an_empty_folder):
    monkeypatch.setattr(report, "html", lambda results: "")
    with monkeypatch.context() as patch:
        patch.setattr(train, "runs", interrupt_after(3))
        assert cli.main(["train", *QUICK, "--out", "some results"]) == 1
    assert "continue with: absgd-fast train --resume 'some results'" in capsys.readouterr().out
    assert json.loads(Path("some results/results.json").read_text())["partial"] is True
    state = checkpoint.load("some results/checkpoint.pt")["state"]
    assert len(state["finished"]) == 3 and state["running"] is None
    assert cli.main(["train", "--resume", "some results", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "resumed: 3 of 6 runs are finished\n" in out and "seed 0" not in out and out.count("\nseed 1") == 3
    assert untimed("some results") == never_stopped


def test_ctrl_c_inside_a_run(monkeypatch, capsys, never_stopped, in_an_empty_folder):
    """Twice: before the first run is finished and after it; what is half done is not kept."""
    monkeypatch.setattr(report, "html", lambda results: "")
    steps, backward = itertools.count(1), torch.Tensor.backward

    def interrupted(self):
        backward(self)
        if next(steps) in (WARM + 10, 2 * WARM + 10 + 12 + 3):
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.Tensor, "backward", interrupted)
    assert cli.main(["train", *QUICK, "--out", "results", "--checkpoint-every", "4"]) == 1
    assert "before the first run was finished; continue with absgd-fast train --resume results" in capsys.readouterr().err
    assert os.listdir("results") == ["checkpoint.pt"] and progress("results/checkpoint.pt") == (0, 1)
    assert cli.main(["train", "--resume", "results"]) == 1
    assert "continue with: absgd-fast train --resume results" in capsys.readouterr().out
    assert json.loads(Path("results/results.json").read_text())["partial"] is True
    assert cli.main(["train", "--resume", "results"]) == 0
    assert untimed("results") == never_stopped


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def good(driver, tmp_path_factory):
    """The bytes of a checkpoint of QUICK, in the second epoch of the second run."""
    folder = tmp_path_factory.mktemp("good")
    assert driver(*QUICK, "--out", folder, "--checkpoint-every", 7, kill="step", nth=STEPS + 10) == -signal.SIGKILL
    return (folder / "checkpoint.pt").read_bytes()


@pytest.fixture
def resumable(good, in_an_empty_folder):
    (in_an_empty_folder / "results").mkdir()
    (in_an_empty_folder / "results" / "results.json").write_text("older")
    file = in_an_empty_folder / "results" / "checkpoint.pt"
    file.write_bytes(good)
    return file


def torch_file(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zip_file():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("notes.txt", "hello")
    return buffer.getvalue()


def flipped(content, at, bit=0):
    return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


FORMAT = checkpoint.FORMAT


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda good: b"", ["(0 bytes) is empty", f"expected a {FORMAT}"]),
        (lambda good: b"lam: 0.5\n", ["(9 bytes)", "is not a zip file", "begins with b'lam: 0.5'", f"expected a {FORMAT}"]),
        (lambda good: good[1:], ["is not a zip file"]),
        (lambda good: good[:1], ["(1 bytes)", "is not a zip file"]),
        (lambda good: good[:4], ["(4 bytes)", "cut short or damaged", f"expected a {FORMAT}"]),
        (lambda good: good[: len(good) // 2], ["bytes)", "cut short or damaged", f"expected a {FORMAT}"]),
        (lambda good: good[:-1], ["cut short or damaged", f"expected a {FORMAT}"]),
        (lambda good: flipped(good, good.index(b"parts")), ["damaged (its record 'archive/data.pkl'", f"expected a {FORMAT}"]),
        (lambda good: zip_file(), ["is a zip file, but not one of torch's", f"expected a {FORMAT}"]),
        (lambda good: torch_file({"x": torch.ones(2)}), ["is a torch file", f"but not a {FORMAT}"]),
        (lambda good: torch_file(torch.ones(2)), ["is a torch file", f"but not a {FORMAT}"]),
        (lambda good: torch_file(nn.Linear(2, 2)), ["is a torch file", f"but not a {FORMAT}"]),
        (lambda good: torch_file({}, _use_new_zipfile_serialization=False), ["is not a zip file"]),
        (
            lambda good: torch_file({"format": FORMAT, "version": 2, "parts": {}}),
            ["has version 2 of the format", "reads version 1"],
        ),
        (
            lambda good: torch_file({"format": FORMAT, "version": 1, "parts": {"state": {}, "source": ""}}),
            ["was made by a script", "there is no config, threads in it"],
        ),
        (
            lambda good: torch_file(
                {"format": FORMAT, "version": 1, "parts": {"config": {"tilt": 1.0}, "threads": 1, "source": "", "state": {}}}
            ),
            ["was made with the options tilt", "this absgd_fast does not know"],
        ),
    ],
)
def test_a_bad_checkpoint_is_named(change, words, good, resumable, capsys):
    resumable.write_bytes(change(good))
    before = resumable.read_bytes()
    line = refused(capsys, "train", "--resume", "results")
    assert "results/checkpoint.pt" in line and all(word in line for word in words)
    assert resumable.read_bytes() == before and (resumable.parent / "results.json").read_text() == "older"
    assert len(os.listdir(resumable.parent)) == 2
    if change(good):  # nor does a new training take its place
        assert "--resume results" in refused(capsys, "train", "--out", "results")
        assert resumable.read_bytes() == before


def test_nothing_in_a_file_is_run(tmp_path):
    file, victim = tmp_path / "checkpoint.pt", tmp_path / "victim"
    file.write_bytes(torch_file({"format": FORMAT, "version": 1, "parts": Harmful(str(victim))}))
    with pytest.raises(ValueError, match=f"is a torch file, but not a {FORMAT}"):
        checkpoint.load(file)
    assert not victim.exists()


def test_no_flipped_bit_goes_unnoticed(good, tmp_path):
    """Bytes all over the file, and each byte around its directory: refused, or without any influence (padding, dates)."""
    file, whole = tmp_path / "checkpoint.pt", checkpoint.load(io_file(tmp_path, good))
    chance, refusals = random.Random(0), 0
    places = [chance.randrange(len(good)) for _ in range(300)] + [*range(60), *range(len(good) - 150, len(good))]
    tensor = whole["state"]["running"]["model"]["1.weight"].numpy().tobytes()
    places += [good.index(tensor), good.index(tensor) + len(tensor) - 1]
    for at in places:
        file.write_bytes(flipped(good, at, chance.randrange(8)))
        try:
            assert same(checkpoint.load(file), whole), f"byte {at}"
        except ValueError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            refusals += 1
    assert refusals > len(places) / 2
    for length in [chance.randrange(len(good)) for _ in range(100)]:
        file.write_bytes(good[:length])
        with pytest.raises(ValueError, match="checkpoint.pt"):
            checkpoint.load(file)


def io_file(folder, content):
    (folder / "good.pt").write_bytes(content)
    return folder / "good.pt"


@pytest.mark.parametrize(
    "options, words",
    [
        (["--lam", "0.3"], ["lam: results/checkpoint.pt was made with -0.5, got 0.3"]),
        (["--lam", "nan"], ["lam: results/checkpoint.pt was made with -0.5, got nan"]),
        (["--epochs", "4", "--seeds", "3"], ["seeds: results/checkpoint.pt was made with 2, got 3"]),
        (
            ["--methods", "absgd,sgd", "--dataset", "cifar10"],
            ["made with digits, got cifar10; methods: results/checkpoint.pt was made with sgd,absgd,reference, got absgd,sgd"],
        ),
        (["--threads", "3"], ["threads: results/checkpoint.pt was made with 1, got 3"]),
        (["--out", "other"], ["out: --resume results continues in that folder, got other"]),
        (["--checkpoint-every", "-1"], ["checkpoint-every: got -1, expected at least 0"]),
    ],
)
def test_other_options_than_the_checkpoints_are_refused(options, words, good, resumable, capsys):
    line = refused(capsys, "train", "--resume", "results", *options)
    assert all(word in line for word in words) and "epochs" not in line
    assert resumable.read_bytes() == good and len(os.listdir(resumable.parent)) == 2 and not Path("other").exists()


def test_the_checkpoints_own_options_may_be_given(resumable, monkeypatch, never_stopped):
    monkeypatch.setattr(report, "html", lambda results: "")
    assert cli.main(["train", "--resume", "results", *QUICK, "--out", "./results/", "--checkpoint-every", "9"]) == 0
    assert untimed("results") == never_stopped


YOUNGER = ("per_class", "share", "sign")  # options that the first checkpoints did not have


def test_a_checkpoint_without_younger_options(resumable, good, monkeypatch, capsys, never_stopped):
    """They had their defaults' effect. Another value is refused, here and where the training is complete."""
    monkeypatch.setattr(report, "html", lambda results: "")
    parts = checkpoint.load(resumable)
    assert set(YOUNGER) <= parts["config"].keys()
    parts["config"] = {name: value for name, value in parts["config"].items() if name not in YOUNGER}
    checkpoint.save(resumable, parts)
    older = resumable.read_bytes()
    others = ["--per-class", "50", "--share", "0.5", "--sign", "-1"]

    def say_no(file):
        line = refused(capsys, "train", "--resume", "results", *others)
        for words in ("per-class: {} was made without it, got 50", "share: {} was made with 0.95, got 0.5", "sign: {}"):
            assert words.format(f"results/{file}") in line

    say_no("checkpoint.pt")
    assert resumable.read_bytes() == older
    assert cli.main(["train", "--resume", "results", "--share", "0.95"]) == 0
    assert untimed("results") == never_stopped
    results = json.loads(Path("results/results.json").read_text())
    results["config"] = {name: value for name, value in results["config"].items() if name not in YOUNGER}
    Path("results/results.json").write_text(json.dumps(results))
    capsys.readouterr()
    say_no("results.json")
    assert cli.main(["train", "--resume", "results", "--sign", "1"]) == 0


def test_nothing_to_resume(capsys, in_an_empty_folder):
    line = refused(capsys, "train", "--resume", "nowhere")
    assert "there is no checkpoint.pt in nowhere" in line and os.listdir(".") == []
    assert "--resume" in refused(capsys, "train", "--resume")
    for text in ("{}", "no JSON", '{"partial": true}', '{"partial": false}'):
        Path("results.json").write_text(text)
        assert "there is no checkpoint.pt" in refused(capsys, "train", "--resume", ".")


def test_a_complete_training(capsys, monkeypatch, never_stopped, in_an_empty_folder):
    monkeypatch.setattr(report, "html", lambda results: "")
    command = ["train", *QUICK, "--lam", "inf", "--methods", "sgd,absgd"]
    assert cli.main(command) == 0
    before = Path("absgd-results/results.json").read_bytes()
    capsys.readouterr()
    assert cli.main(["train", "--resume", "absgd-results"]) == 0
    assert "absgd-results: this training is complete" in capsys.readouterr().out
    assert cli.main(["train", "--resume", "absgd-results", "--lam", "inf", "--methods", "sgd,absgd"]) == 0
    line = refused(capsys.readouterr() and capsys, "train", "--resume", "absgd-results", "--lam", "1", "--methods", "sgd")
    assert "methods: absgd-results/results.json was made with sgd,absgd, got sgd; lam: " in line and "with inf, got 1.0" in line
    assert Path("absgd-results/results.json").read_bytes() == before
    assert cli.main([*command, "--seeds", "1"]) == 0  # a new one takes its place, as ever
    assert len(untimed("absgd-results")["runs"]) == 2


def test_another_torch_is_noted(resumable, capsys, monkeypatch, never_stopped):
    """On the terminal, in the report and in results.json; what the first part had is kept when it is stopped again."""
    monkeypatch.setattr(report, "html", lambda results: "")
    made_with = summary.environment
    other = lambda config, threads: made_with(config, threads) | {"torch": "9.9", "cpus": 1}  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(summary, "environment", other)
        patch.setattr(train, "runs", interrupt_after(3))
        assert cli.main(["train", "--resume", "results"]) == 1
    assert f"resumed with another torch ({torch.__version__}, then 9.9)" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["train", "--resume", "results"]) == 0
    assert " ".join(capsys.readouterr().out.split()).count(f"another torch ({torch.__version__}, then 9.9)") == 2
    results = untimed("results")
    assert results.pop("changes") == {"torch": [torch.__version__, "9.9"]} and never_stopped["changes"] == {}
    assert results == {name: value for name, value in never_stopped.items() if name != "changes"}


@pytest.mark.deep
def test_cifar_is_shifted_as_ever_and_told_from_other_images(tmp_path, capsys, monkeypatch):
    """Random shifts and mirror images go on where they stopped; the files may move, and may not change."""
    monkeypatch.setattr(report, "html", lambda results: "")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)  # CIFAR's default; the checkpoint's number comes back all the same
    Path("there").mkdir()
    cifar_folder(tmp_path / "there", "cifar10", python3_pickle(2))
    options = [
        "train",
        "--dataset",
        "cifar10",
        "--data-root",
        "there",
        "--no-digests",
        "--model",
        "cnn",
        "--epochs",
        "3",
        "--seeds",
        "1",
    ]
    options += ["--methods", "absgd,sgd", "--batch-size", "30", "--threads", "1"]
    assert cli.main([*options, "--out", "never"]) == 0
    steps, keep = itertools.count(1), checkpoint.Keeper.__call__

    def stopped(self, take, finished):
        keep(self, take, finished)
        if next(steps) in (6, 6 + 12):  # of 4 a run's epoch: in the second epoch of the first run, and in the second run
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Keeper, "__call__", stopped)
    assert cli.main([*options, "--out", "results", "--checkpoint-every", "1"]) == 1
    assert cli.main(["train", "--resume", "results"]) == 1
    before = Path("results/checkpoint.pt").read_bytes()
    assert checkpoint.load("results/checkpoint.pt")["state"]["running"]["method"] == "sgd"

    shutil.move("there", "elsewhere")
    assert "data_batch_1" in refused(capsys.readouterr() and capsys, "train", "--resume", "results")
    batch = Path("elsewhere/cifar-10-batches-py/data_batch_4")
    content = batch.read_bytes()
    batch.write_bytes(flipped(content, len(content) // 2))  # a pixel
    line = refused(capsys, "train", "--resume", "results", "--data-root", "elsewhere")
    assert "results/checkpoint.pt was made with cifar10, 100 labels, images of 3×32×32, sha256 " in line
    assert "; found cifar10, 100 labels, images of 3×32×32, sha256 " in line
    assert Path("results/checkpoint.pt").read_bytes() == before

    batch.write_bytes(content)
    assert cli.main(["train", "--resume", "results", "--data-root", "elsewhere"]) == 0
    resumed, never = untimed("results"), untimed("never")
    assert resumed["config"].pop("data_root") == "elsewhere" and never["config"].pop("data_root") == "there"
    assert resumed == never and resumed["environment"]["threads"] == 1 and torch.get_num_threads() == 2
