"""The benchmarks: the oracle stops whoever is wrong, and what is reported says so. No timing is asserted."""

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from absgd_fast import __main__ as cli

with pytest.MonkeyPatch.context() as patch:  # benchmarks are no part of the package
    patch.syspath_prepend(Path(cli.__file__).resolve().parents[1])
    from benchmarks import cases, peers, run

DATA = {
    "loss": [partial(cases.Logits, 32, 10), partial(cases.Logits, 32, 10, torch.bfloat16)],
    "step": [partial(cases.Tensors, [(3, 4), (5,)])],
    "train": [partial(cases.Training, "mlp"), partial(cases.Training, "cnn")],
}
EVERYBODY = [(suite, make, name) for suite in DATA for make in DATA[suite] for name in peers.PEERS[suite]]


@pytest.fixture(autouse=True)
def same_path(monkeypatch):
    """The command adds the checkout to the path; for these tests only."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def no_compiler(monkeypatch):
    """torch.compile takes ten seconds and a C++ compiler; its formula can be had without."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture
def tiny(monkeypatch, no_compiler):
    """One small case of each kind, few rounds; targets that are surely met or surely missed."""
    small = [
        cases.Case("loss", "8 × 5", partial(cases.Logits, 8, 5), {"cross_entropy": 1e9, "absgd package": 0.0}),
        cases.Case("memory", "8 × 5", partial(cases.Logits, 8, 5), {"growth": 1e9, "peak": 1e9, "retained": -1e9}),
        cases.Case("step", "two tensors", partial(cases.Tensors, [(3, 4), (5,)]), {"SGD fused": 1e9}),
        cases.Case("train", "mlp", partial(cases.Training, "mlp")),
    ]
    for name, value in dict(CASES=small, ROUNDS=(3, 3), BLOCK=1e5, GROWTH_STEPS=10).items():
        monkeypatch.setattr(run, name, value)


def replace(monkeypatch, suite, name, factory):
    monkeypatch.setitem(peers.PEERS[suite], name, factory)


def plain_called_robust(data):
    return peers._loss(data, torch.nn.functional.cross_entropy)


def refuse(data):
    raise peers.LeftOut("it is not there")


# ---- right and wrong results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite, make, name", EVERYBODY)
def test_everybody_is_right(no_compiler, suite, make, name):
    data = make()
    _, error = peers.ready(peers.PEERS[suite][name], data)
    assert 0 <= error <= data.tolerance


CHANGES = {
    "loss": lambda loss, grad: loss * 1.001,
    "gradient of a row that hardly counts": lambda loss, grad: (loss, grad[1].mul_(1.001))[0],
    "NaN": lambda loss, grad: loss * math.nan,
    "NaN in the gradient": lambda loss, grad: (loss, grad[2, 3].fill_(math.nan))[0],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["absgd_fast", "cross_entropy"])
def test_a_wrong_loss_is_stopped(name, change):
    def factory(data):
        peer = peers.PEERS["loss"][name](data)
        right = peer.run
        peer.run = lambda: change(right(), peer.leaf.grad)
        return peer

    with pytest.raises(peers.LeftOut, match="off by"):
        peers.ready(factory, cases.Logits(32, 10))


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.0}, {"momentum": 0.89}, {"nesterov": True}], ids=str)
def test_a_wrong_step_is_stopped(wrong):
    def factory(data):
        params = data.parameters()
        return peers.Peer(torch.optim.SGD(params, **cases.SGD | wrong).step, lambda _: data.error(params))

    with pytest.raises(peers.LeftOut, match="off by"):
        peers.ready(factory, cases.Tensors([(3, 4), (5,)]))


def test_a_wrong_training_is_stopped():
    plain = partial(peers.PEERS["train"]["cross_entropy, SGD fused"], lam=cases.LAM)  # plain, but said to be robust
    with pytest.raises(peers.LeftOut, match="off by"):
        peers.ready(plain, cases.Training("mlp"))


def test_wrong_and_missing_competitors_are_left_out(monkeypatch, tiny):
    replace(monkeypatch, "loss", "cross_entropy", plain_called_robust)
    replace(monkeypatch, "loss", "torch.compile", refuse)
    result = run.compare(run.CASES[0], seconds=0.01)
    assert set(result["peers"]) == {"absgd_fast", "absgd package"}
    assert result["absent"]["torch.compile"] == "it is not there"
    assert "off by" in result["absent"]["cross_entropy"]


def test_a_wrong_result_of_ours_ends_the_run(monkeypatch, tiny, tmp_path, capsys):
    replace(monkeypatch, "loss", "absgd_fast", plain_called_robust)
    assert run.main(["--suite", "loss", "--out", str(tmp_path / "x.json")]) == 1
    assert "loss 8 × 5: absgd_fast: its result is off by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_is_reported(monkeypatch):
    def fails(*args):
        raise RuntimeError("No working C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fails)
    with pytest.raises(peers.LeftOut, match="^torch.compile failed: RuntimeError: No working C.. compiler$"):
        peers.ready(peers.PEERS["loss"]["torch.compile"], cases.Logits(8, 5))


# ---- the cases -------------------------------------------------------------------------------------------------------


def test_tensor_lists():
    sizes = {name: (len(shapes), sum(map(math.prod, shapes))) for name, shapes in
             {"resnet32": cases.resnet32(), "resnet50": cases.resnet50()}.items()}  # fmt: skip
    assert sizes == {"resnet32": (94, 464_144), "resnet50": (161, 25_557_032)}


def test_every_target_has_its_competitor():
    for case in cases.CASES:
        assert set(case.targets) <= set(run.MEASURES if case.suite == "memory" else peers.PEERS[case.suite])


# ---- how it is timed -------------------------------------------------------------------------------------------------


def test_rounds_interleave_everybody(monkeypatch):
    monkeypatch.setattr(run, "ROUNDS", (4, 4))
    monkeypatch.setattr(run, "BLOCK", 1.0)  # one call per block
    calls = []
    times = run.interleave({name: partial(calls.append, name) for name in "abc"}, seconds=0.01)
    assert [len(times[name]) for name in "abc"] == [4, 4, 4]
    assert "".join(calls).endswith("abcbcacababc")  # each begins in its turn


def test_ratios_are_taken_round_by_round(monkeypatch, tiny):
    """A machine that gets slower during the run changes the times but not the ratio."""
    monkeypatch.setattr(run, "interleave", lambda runs, seconds: {
        name: [t * (1 if name == "absgd_fast" else 2) for t in (1.0, 10.0, 100.0)] for name in runs})  # fmt: skip
    peer = run.compare(run.CASES[2], seconds=1)["peers"]["SGD fused"]
    assert peer["ratio"] == {"median": 0.5, "q1": 0.5, "q3": 0.5}
    assert peer["us"] == {"median": 20.0, "q1": 11.0, "q3": 110.0}


def test_a_leak_shows():
    kept = []
    leaking = peers.Peer(lambda: kept.append(torch.ones(1000)), None)
    measured = run._attempt(run.growth, leaking)
    assert measured is None or 4000 <= measured <= 6000


# ---- what is reported ------------------------------------------------------------------------------------------------


def test_the_report(tiny, tmp_path, capsys):
    before = torch.get_num_threads()
    out = tmp_path / "new" / "bench.json"
    assert cli.main(["bench", "--out", str(out), "--threads", "1", "--seconds", "0.01"]) == 0
    assert torch.get_num_threads() == before
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]
    report = json.loads(out.read_text(encoding="utf-8"))
    assert " ".join(report) == "date hardware versions compiler threads load_at_start seconds_per_case results"
    assert report["hardware"].keys() == {"cpu", "cores", "backend", "instruction_set"} and report["threads"] == 1
    assert report["versions"].keys() == {"python", "torch", "absgd_fast", "absgd"}
    loss, memory, step, train = report["results"]
    for result in (loss, step, train):
        assert result.keys() == {"suite", "case", "rounds", "tolerance", "peers", "absent"}
        assert result["rounds"] == 3 and result["absent"] == {}
        assert result["peers"].keys() == peers.PEERS[result["suite"]].keys()
        for name, peer in result["peers"].items():
            assert 0 < peer["us"]["q1"] <= peer["us"]["median"] <= peer["us"]["q3"]
            assert 0 <= peer["error"] <= result["tolerance"]
            assert name == "absgd_fast" or peer["ratio"]["q1"] <= peer["ratio"]["median"] <= peer["ratio"]["q3"]
    verdicts = {name: (peer["target"], peer["met"]) for name, peer in loss["peers"].items() if name != "absgd_fast"}
    assert verdicts == {"cross_entropy": (1e9, True), "absgd package": (0.0, False), "torch.compile": (None, None)}
    assert memory["targets"].keys() == memory["met"].keys() == memory["peers"]["absgd_fast"].keys()
    printed = capsys.readouterr().out
    assert "missed: loss 8 × 5, absgd package" in printed and "missed: loss 8 × 5, cross_entropy" not in printed
    assert "met" in printed and f"written: {out}" in printed


def test_a_busy_machine_is_mentioned(monkeypatch, tiny, capsys):
    for load, expected in ((9.0, True), (0.1, False)):
        monkeypatch.setattr(run.os, "getloadavg", lambda: (load, 0.0, 0.0))
        run.main(["--suite", "step"])
        assert ("busy" in capsys.readouterr().out) is expected


def test_a_lost_case_is_shown(monkeypatch, tiny, capsys):
    slow = {name: [float(name == "absgd_fast") + 1] * 3 for name in peers.PEERS["train"]}
    monkeypatch.setattr(run, "interleave", lambda runs, seconds: slow)
    assert run.main(["--suite", "train"]) == 0
    printed = capsys.readouterr().out
    assert "slower: train mlp, absgd package" in printed and "2.00 (2.00–2.00)" in printed


def test_an_old_report_outlives_a_failing_write(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    path.write_text("old")
    monkeypatch.setattr(run.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        run.write({}, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("options, words", [
    (["--suite", "everything"], ["'everything'", "loss", "step", "train", "all"]),
    (["--threads", "0"], ["'0'", "whole number > 0"]),
    (["--threads", "two"], ["'two'", "whole number > 0"]),
    (["--seconds", "nan"], ["'nan'", "number > 0"]),
    (["--seconds", "-1"], ["'-1'", "number > 0"]),
    (["--out", "."], ["'.'", "a file that can be written"]),
    (["--out", "file/x.json"], ["'file/x.json'", "a file that can be written"]),
    (["--sweet", "loss"], ["--sweet"]),
], ids=str)  # fmt: skip
def test_bad_arguments(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("absgd-fast bench: ")
    assert all(word in err for word in words), err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
