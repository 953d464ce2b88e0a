"""The benchmarks: the oracle stops whoever is wrong, and what is reported says so. No timing is asserted."""

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from unittest import SkipTest

import pytest
import test_gpu
import torch

import absgd_fast as ab
from absgd_fast import __main__ as cli

with pytest.MonkeyPatch.context() as patch:  # benchmarks are no part of the package
    patch.syspath_prepend(Path(cli.__file__).resolve().parents[1])
    from benchmarks import cases, device, gpu_report, imbalance, l2rw, peers, run

CPU = torch.device("cpu")
DATA = {
    "loss": [partial(cases.Logits, 32, 10), partial(cases.Logits, 32, 10, torch.bfloat16)],
    "family": [partial(cases.Logits, 32, 10, loss=name) for name in cases.LOSSES if name != "cross-entropy"],
    "step": [partial(cases.Tensors, [(3, 4), (5,)])],
    "rules": [partial(cases.Tensors, [(3, 4), (5,)], rule=rule) for rule in cases.RULES],
    "weighted": [partial(cases.Samples, 9, [(3, 4), (5,)])],
    "train": [partial(cases.Training, "mlp"), partial(cases.Training, "cnn")],
    "gpu loss": [partial(cases.Logits, 32, 10, dtype, copies=2) for dtype in (torch.float32, torch.bfloat16)],
    "gpu step": [partial(cases.Tensors, [(3, 4), (5,)])],
    "gpu rules": [partial(cases.Tensors, [(3, 4), (5,)], rule="AdamW")],
    "gpu weighted": [partial(cases.Samples, 9, [(3, 4), (5,)])],
}
NEED_MORE = {"absgd_fast, triton", "Liger"}  # than a CPU has, or tests install
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
        cases.Case("family", "VS, 8 × 5", partial(cases.Logits, 8, 5, loss="VS"), {"our cross-entropy": 1e9}),
        cases.Case("memory", "8 × 5", partial(cases.Logits, 8, 5), {"growth": 1e9, "peak": 1e9, "retained": -1e9}),
        cases.Case("step", "two tensors", partial(cases.Tensors, [(3, 4), (5,)]), {"SGD fused": 1e9}),
        cases.Case("rules", "AdamW", partial(cases.Tensors, [(3, 4), (5,)], rule="AdamW"), {"torch's fastest": 1e9}),
        cases.Case("weighted", "9 × 17", partial(cases.Samples, 9, [(3, 4), (5,)]), {cases.COPY: 1e9}),
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
    try:
        _, error = peers.ready(peers.PEERS[suite][name], data)
    except peers.LeftOut:
        assert name in NEED_MORE
        return
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


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.0}, {"momentum": 0.89}, {"mix": 1e-3}, {"init": "first"}], ids=str)
def test_a_wrong_weighted_step_is_stopped(monkeypatch, wrong):
    right = ab.functional.weighted_momentum_step_
    monkeypatch.setattr(ab.functional, "weighted_momentum_step_", lambda *args, **options: right(*args, **options | wrong))
    with pytest.raises(peers.LeftOut, match="off by"):
        peers.ready(peers.PEERS["weighted"]["absgd_fast"], cases.Samples(9, [(3, 4), (5,)]))


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
    assert (len(cases.resnet152()), sum(map(math.prod, cases.resnet152()))) == (467, 60_192_808)


def test_every_target_has_its_competitor():
    for case in [*cases.CASES, *cases.gpu_cases()]:
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
    peer = run.compare(next(case for case in run.CASES if case.suite == "step"), seconds=1)["peers"]["SGD fused"]
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
    loss, family, memory, step, rules, weighted, train = report["results"]
    for result in (loss, family, step, rules, weighted, train):
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


# ---- on a GPU: what of it a CPU can try ------------------------------------------------------------------------------


def test_what_is_timed_on_a_gpu():
    """The shapes, the competitors and the figures that were set."""
    found = {(case.suite, case.name): case for case in cases.gpu_cases()}
    sizes = [f"{rows} × {classes} {dtype}" for rows, classes in cases.SHAPES for dtype in ("fp32", "bf16")]
    assert [name for suite, name in found if suite == "gpu loss"] == sizes and len(sizes) == 14
    small, large = found["gpu loss", "128 × 100 bf16"], found["gpu loss", "8192 × 32000 fp32"]
    assert small.targets == {"absgd package": 0.25, "Liger": 1.0, "torch.compile": 0.7}
    assert large.targets == {"absgd package": 0.4, "Liger": 1.0} and large.bounds["share of copy"] == (0.85, math.inf)
    assert "torch.compile" not in found["gpu loss", "512 × 1000 fp32"].targets
    steps = {name: case for (suite, name), case in found.items() if suite == "gpu step"}
    assert [case.targets for case in steps.values()] == [{"SGD fused": 0.5}, {"SGD fused": 0.9}, {}, {}]
    assert steps["ResNet-50, 161 tensors"].bounds == {"step launches": (1, 1), "host us": (0, 20)}
    billion = steps["1 B parameters, 300 tensors"]
    assert billion.bounds["share of copy"] == (0.9, math.inf)
    shapes = billion.data.args[0]
    assert len(shapes) == 300 and sum(map(math.prod, shapes)) == pytest.approx(1e9, rel=1e-3)


def test_copies_are_taken_in_turn():
    data = cases.Logits(32, 10, copies=3)
    assert len({x.data_ptr() for x in data.copies}) == 3 and data.moved == 3 * 32 * 10 * 4
    peer, _ = peers.ready(peers.PEERS["gpu loss"]["cross_entropy"], data)
    data.copies[1].zero_()
    seen = [round(peer.run().item(), 4) for _ in range(6)]
    assert seen.count(round(math.log(10), 4)) == 2  # each third time
    assert len(cases.Logits(64, 300, copies=None).copies) == 1  # stays in the cache
    data = cases.Logits(8, 5)
    data.bytes = cases.IN_CACHE
    assert data._beyond_cache() == 1  # larger than four caches of the stand-in
    assert not hasattr(cases.Tensors([(3,)]), "copies")


def test_the_twin_is_the_package(monkeypatch):
    """Loss and gradient over a few steps, bit for bit."""
    pytest.importorskip("absgd")
    results = []
    for module in (sys.modules["absgd.losses"] if "absgd.losses" in sys.modules else pytest.importorskip("absgd.losses"), None):
        monkeypatch.setitem(sys.modules, "absgd.losses", module)
        criterion, values = peers._package(peers._cut, twin=True), []
        for seed in range(3):
            x = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)).requires_grad_()
            loss = criterion(x, torch.arange(9) % 5)
            loss.backward()
            values += [loss.detach(), x.grad]
        results.append(values)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_liger_gets_fresh_logits_while_it_is_checked(monkeypatch):
    """Like Liger's, this one leaves its gradient in the logits."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            p = x.softmax(1)
            loss = -p[range(len(y)), y].log().mean()
            p[range(len(y)), y] -= 1
            x.copy_(p / len(y))
            ctx.save_for_backward(x.detach())
            return loss

        @staticmethod
        def backward(ctx, upstream):
            return ctx.saved_tensors[0] * upstream, None

    module = types.SimpleNamespace(LigerCrossEntropyLoss=lambda: Function.apply)
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.cross_entropy"):
        monkeypatch.setitem(sys.modules, name, module)
    data = cases.Logits(32, 10, copies=2)
    before = data.logits.clone()
    peer, error = peers.ready(peers.PEERS["gpu loss"]["Liger"], data)
    assert error < 1e-6
    peer.run()
    assert all(torch.equal(x, before) for x in data.copies)  # the others' numbers


def test_tools_on_a_cpu():
    calls = []
    assert device.block_ns(CPU, lambda: calls.append(1), 3) > 0 and len(calls) == 4
    assert len(device.host_us(CPU, lambda: calls.append(1), calls=2, rounds=3)) == 3
    replay, result = device.captured(CPU, lambda: 7, warm_up=1)
    assert replay() == 7 and result is None
    assert device.kernels(CPU, lambda: calls.append(2)) is None and device.waits(CPU, lambda: calls.append(3)) == []
    assert calls[-2:] == [2, 3] and len(device.copy_ns(CPU, 100)) == 30


@pytest.fixture
def pretended(monkeypatch):
    """A device that calls itself cuda, and as much of torch.cuda as device.py uses, all of it done at once."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(done)

        def synchronize(self):
            done.append("synchronize")

        def elapsed_time(self, end):
            return float(end.at - self.at)  # one ms per call

    class Stream:
        def __init__(self, device):
            pass

        def wait_stream(self, other):
            done.append("wait")

    class Graph:
        def replay(self):
            done.append("replay")

    fake = dict(Event=Event, Stream=Stream, CUDAGraph=Graph, stream=contextlib.nullcontext, graph=contextlib.nullcontext)
    fake |= dict(current_stream=Stream, synchronize=lambda *_: None)
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return types.SimpleNamespace(type="cuda"), done


def test_the_clock_and_the_graphs_of_a_gpu(pretended):
    where, done = pretended
    assert device.block_ns(where, lambda: done.append("run"), 4) == 1e6
    replay, result = device.captured(where, lambda: done.append("run") or 7)
    assert result == 7 and done[-6:] == ["wait", "run", "run", "run", "wait", "run"]  # the last one while it is captured
    replay()
    assert done[-1] == "replay"
    assert len(device.host_us(where, lambda: done.append("run"), 2, 3)) == 3


def test_what_the_profiler_saw_of_a_gpu(pretended, monkeypatch):
    where, _ = pretended
    types_ = torch.autograd.DeviceType

    def event(name, at, kind=types_.CPU, **more):
        return types.SimpleNamespace(name=name, device_type=kind, time_range=types.SimpleNamespace(start=at, end=at + 5), **more)

    on_gpu = partial(event, at=0, kind=types_.CUDA)
    seen = [event("absgd_fast: no waiting", 10), event("cudaStreamSynchronize", 12), event("cudaDeviceSynchronize", 99)]
    seen += [event("cudaLaunchKernel", 11), event("cudaMemcpy", 13), event("cudaMemcpyAsync", 14)]
    seen += [on_gpu("void absgd::gpu::a_kernel<float>"), on_gpu("Memset (Device)"), on_gpu("Memcpy DtoD (Device -> Device)")]
    seen += [on_gpu("Optimizer.step#ABSGD.step", is_user_annotation=True), on_gpu("a range", is_user_annotation=True)]
    monkeypatch.setattr(device, "_events", lambda where, run: run() or seen)
    assert device.kernels(where, lambda: None) == ["void absgd::gpu::a_kernel<float>", "Memset (Device)"]
    assert device.waits(where, lambda: None) == ["cudaStreamSynchronize", "cudaMemcpy"]


REHEARSAL = ["--suite", "gpu", "--rehearse", "--seconds", "0.01", "--threads", "1"]


@pytest.fixture
def quick(monkeypatch, no_compiler):
    monkeypatch.setattr(run, "ROUNDS", (3, 3))
    monkeypatch.setattr(run, "BLOCK", 1e5)
    monkeypatch.setattr(run, "host_us", lambda where, call, *counts: device.host_us(where, call, 2, 3))


def test_the_report_of_a_gpu(quick, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert run.main([*REHEARSAL, "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert {"gpu", "copy", "results", "figures", "not_measured", "seconds_per_case", "versions", "date"} <= report.keys()
    assert {"triton", "liger-kernel", "torch"} <= report["versions"].keys() and report["not_measured"] == []
    assert [result["suite"] for result in report["results"]] == [
        "gpu step",
        *["gpu loss"] * 4,
        "gpu rules",
        "gpu weighted",
        "gpu limit",
    ]
    step, loss, limit = report["results"][0], report["results"][1], report["results"][-1]
    assert set(step["peers"]) == {"absgd_fast", "SGD fused", "SGD foreach"} and "absgd_fast, triton" in step["absent"]
    assert set(loss["peers"]) == {"absgd_fast", "cross_entropy", "absgd package", "torch.compile"}
    assert set(loss["absent"]) == NEED_MORE and set(limit["absent"]) == {"from statistics"}
    for result in report["results"]:
        for name, peer in result["peers"].items():
            for key in ("us", "host_us", "graph_us", "share"):
                assert 0 < peer[key]["q1"] <= peer[key]["median"] <= peer[key]["q3"], (result["case"], name, key)
            assert name == "absgd_fast" or "ratio" in peer
    assert loss["bytes"] == 3 * 16 * 5 * 4 and set(loss["peers"]["absgd_fast"]["launches"]) == {"forward", "backward"}
    figures = {(figure["case"], figure["figure"]): figure for figure in report["figures"]}
    assert figures["three tensors", "share of copy"]["met"] is False and figures["three tensors", "host us"]["most"] == 20
    assert figures["16 × 5 fp32", "forward launches"]["met"] is None  # no GPU launches on a CPU
    assert ("64 × 300 bf16", "time over torch.compile") in figures
    printed = capsys.readouterr().out
    assert "missed: gpu step, three tensors: share of copy" in printed and "left out: Liger" in printed


def test_one_wrong_result_on_a_gpu_leaves_the_others(quick, monkeypatch, tmp_path, capsys):
    """It is expensive to come there: what fails is told, what works is measured."""
    right = peers.PEERS["gpu loss"]["absgd_fast"]

    def wrong_in_half_precision(data):
        return plain_called_robust(data) if data.logits.dtype == torch.bfloat16 else right(data)

    def breaks(data):
        raise RuntimeError("a kernel that does not compile\nand more")

    replace(monkeypatch, "gpu loss", "absgd_fast", wrong_in_half_precision)
    replace(monkeypatch, "gpu loss", "cross_entropy", breaks)
    out = tmp_path / "bench.json"
    assert run.main([*REHEARSAL, "--out", str(out)]) == 1
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert ["wrong" in result for result in results] == [False, False, True, False, True, False, False, False]
    assert "off by" in results[2]["wrong"]
    assert results[1]["absent"]["cross_entropy"] == "RuntimeError: a kernel that does not compile and more"
    assert "WRONG" in capsys.readouterr().out


def test_no_time_for_all_cases(quick, monkeypatch, capsys):
    assert run.main([*REHEARSAL, "--limit", "0.001"]) == 0
    assert "not measured: gpu step: three tensors" in capsys.readouterr().out


def test_a_call_that_cannot_be_captured(quick, monkeypatch):
    def captured(device, run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(run, "captured", captured)
    result = run.explore(cases.gpu_cases("cpu", tiny=True)[0], 0.01, True)
    assert "not permitted" in result["peers"]["absgd_fast"]["graph_failed"] and "graph_us" not in result["peers"]["SGD fused"]


def test_preparing_runs_what_compiles(monkeypatch, capsys):
    ran = []
    for suite in ("gpu loss", "gpu step"):
        monkeypatch.setattr(peers, "PEERS", peers.PEERS)
        for name in {"absgd_fast, triton", "torch.compile"} & peers.PEERS[suite].keys():
            replace(monkeypatch, suite, name, lambda data, name=name: peers.Peer(lambda: ran.append(name), None))
    assert run.main(["--suite", "gpu", "--rehearse", "--prepare"]) == 0
    assert sorted(ran) == ["absgd_fast, triton"] * 5 + ["torch.compile"] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as leaving:
        run.main(["--suite", "gpu"])
    assert leaving.value.code == 2 and "needs a CUDA GPU" in capsys.readouterr().err


# ---- gpu.sh and what it leaves ---------------------------------------------------------------------------------------


def measured(median):
    return {"median": median, "q1": median, "q3": median}


def a_report():
    ours = {"us": measured(10.0), "host_us": measured(5.0), "launches": {"forward": ["a"], "backward": ["b", "c"]}}
    theirs = {"us": measured(20.0), "ratio": measured(0.5), "met": False, "note": "a twin"}
    result = {"suite": "gpu loss", "case": "x", "bytes": 900, "absent": {}}
    result["peers"] = {"absgd_fast": ours, "absgd package": theirs}
    wrong = {"suite": "gpu loss", "case": "y", "wrong": "off by 1"}
    return {"copy": {"bytes_per_us": measured(100.0)}, "results": [result, wrong], "figures": [], "not_measured": ["z"]}


def test_figures_are_judged():
    report = a_report()
    bounds = {"share of copy": (0.85, math.inf), "forward launches": (1, 1), "backward launches": (0, 1), "host us": (0, 20)}
    case = cases.Case("gpu loss", "x", None, {"absgd package": 0.25, "Liger": 1.0}, bounds)
    gpu_report.finish(report, [case])
    gpu_report.finish(report, [case])  # as after every case
    assert report["results"][0]["peers"]["absgd_fast"]["share"]["median"] == pytest.approx(0.9)
    met = {figure["figure"]: figure["met"] for figure in report["figures"]}
    assert met == {"time over absgd package": False, "share of copy": True, "forward launches": True,
                   "backward launches": False, "host us": True}  # fmt: skip
    assert report["figures"][1]["most"] is None and json.dumps(report)
    lines = gpu_report.lines(report)
    assert lines[0].split()[:3] == ["gpu", "loss", "us"] and lines[1].split() == "x 10 0% 5 – 90% 1+2 0.50!".split()
    assert "WRONG" in lines[2] and "absgd package: a twin" in lines and "not measured: z" in lines
    assert lines[-3:] == [
        "figures: 3 of 5 met ('!' above: missed)",
        "missed: gpu loss, x: time over absgd package 0.5, wanted <= 0.25",
        "missed: gpu loss, x: backward launches 2, wanted <= 1",
    ]


def test_where_one_block_stops_to_pay():
    results = [
        {"case": name, "peers": {"absgd_fast": {"graph_us": measured(a)}, "from statistics": {"graph_us": measured(2.0)}}}
        for name, a in (("1k", 1.0), ("4k", 1.5), ("16k", 3.0))
    ]
    assert gpu_report._limit(results) == ["one block over statistics, graph_us: median 0.75; slower at 16k (1.50)"]


@pytest.mark.parametrize("log, code, errors, reason", [
    ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors", 0, 0, None),
    ("========= ERROR SUMMARY: 3 errors", 9, 3, None),
    ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 9, 1, None),
    ("========= ERROR SUMMARY: 0 errors", 1, 0, "what ran under it failed"),
    ("========= Error: Device not supported\n========= ERROR SUMMARY: 1 error", 1, None, "ERROR SUMMARY"),
    ("========= ERROR SUMMARY: 0 errors", 124, None, "stopped after 60 s"),
    ("bash: no such thing", 127, None, "it said nothing"),
])  # fmt: skip
def test_what_a_sanitizer_said(log, code, errors, reason):
    found = gpu_report.sanitized(log, {"exit": code, "seconds": 1, "limit": 60})
    assert found["errors"] == errors and (reason is None or reason in found["reason"])
    assert gpu_report.sanitized("", None)["reason"] == "not run"


@pytest.fixture
def work(tmp_path):
    """What gpu.sh leaves when all is well."""
    (tmp_path / "stages.txt").write_text("build 0 60 120\ntests 0 90 175\nmemcheck 0 40 60\nracecheck 0 40 60\nbench 0 100 215\n")
    (tmp_path / "commit.txt").write_text("abc-dirty\n")
    info = dict(host=False, reason="Python.h not found", cuda=dict(nvcc="13.0", architectures=[90]))
    (tmp_path / "build.json").write_text(json.dumps(info))
    tests = dict(passed=5, failed=0, skipped=1, not_run=0, seconds=9, failures=[], skips={"needs two GPUs": 1}, tests=[])
    (tmp_path / "tests.json").write_text(json.dumps(tests))
    for name in ("build", "tests", "bench"):
        (tmp_path / f"{name}.log").write_text("a line\n")
    for tool in gpu_report.TOOLS:
        (tmp_path / f"{tool}.log").write_text("========= ERROR SUMMARY: 0 errors\n")
    bench = a_report() | {"gpu": {"name": "NVIDIA H200"}, "date": "now", "hardware": {}, "versions": {}}
    bench["results"].pop()
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    return tmp_path


def test_everything_in_one_json(work, tmp_path, capsys):
    assert gpu_report.main([work, tmp_path]) == 0
    report = json.loads((tmp_path / "nvidia-h200.json").read_text(encoding="utf-8"))
    assert " ".join(report) == (
        "date gpu hardware versions compiler load_at_start commit stages build tests sanitizer benchmark failed"
    )
    assert report["commit"] == "abc-dirty" and report["stages"]["bench"] == {"exit": 0, "seconds": 100, "limit": 215}
    assert report["build"]["log"] == ["a line"] and report["sanitizer"]["racecheck"]["errors"] == 0
    assert report["benchmark"]["results"] and report["failed"] == []
    printed = capsys.readouterr().out
    assert "StepPlan left out: Python.h not found" in printed and "skipped 1: needs two GPUs" in printed
    assert printed.splitlines()[-2] == "everything passed"


def spoil(name, **changes):
    def change(work):
        path = work / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize("change, words", [
    (spoil("tests.json", failed=1, failures=[dict(test="test_step[cuda]", message="off\nby one")]), ["1 failed", "test_step[cuda]: off by one"]),
    (spoil("tests.json", not_run=2), ["2 not run"]),
    (spoil("bench.json", results=[dict(suite="gpu loss", case="y", wrong="off by 1")]), ["wrong at y"]),
    (lambda work: (work / "tests.json").unlink(), ["tests: no result"]),
    (lambda work: (work / "bench.json").write_text("{"), ["benchmark: no result", "a line"]),
    (lambda work: (work / "stages.txt").write_text("build 1 60 120\n"), ["build: exit code 1"]),
    (lambda work: (work / "racecheck.log").write_text("RACECHECK SUMMARY: 9 hazards displayed (4 errors, 5 warnings)"), ["racecheck: 4 errors"]),
], ids=range(7))  # fmt: skip
def test_a_failure_ends_in_exit_code_1(work, tmp_path, capsys, change, words):
    change(work)
    assert gpu_report.main([work, tmp_path]) == 1
    printed = capsys.readouterr().out
    assert all(word in printed for word in words), printed


GPU_SH = Path(run.__file__).with_name("gpu.sh")


@pytest.mark.skipif(shutil.which("bash") is None or not sys.platform.startswith("linux"), reason="needs bash on Linux")
def test_gpu_sh(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHON", sys.executable)

    def command(*options):
        return subprocess.run(["bash", GPU_SH, *options], capture_output=True, text=True, cwd=tmp_path)

    dry = command("--dry-run", "--rehearse", "out")
    assert dry.returncode == 0 and dry.stderr == ""
    for stage in ("build: at most 120 s", "tests: at most 175 s", "bench: at most 215 s"):
        assert stage in dry.stdout
    assert list(tmp_path.iterdir()) == []
    unknown = command("--frobnicate")
    assert unknown.returncode == 2 and "--frobnicate" in unknown.stderr
    assert "--rehearse" in command("--help").stdout
    if not torch.cuda.is_available():
        without = command()
        assert without.returncode == 2 and "sees no CUDA GPU" in without.stderr and without.stdout == ""


def test_the_stages_of_gpu_sh_fit_into_ten_minutes():
    text = GPU_SH.read_text()
    limits = {name: int(value) for name, value in re.findall(r"LIMIT_(\w+)=(\d+)", text)}
    parts = [limits[name] for name in ("BUILD", "TESTS", "SANITIZER", "BENCH")]
    assert sum(parts) <= limits["ALL"] < 600


# ---- test_gpu.py without pytest ----------------------------------------------------------------------------------------


def test_workers_that_hang_and_die():
    """Each costs one test; the next one finds a new process."""
    script = (
        "import sys, time, json\n"
        "for line in sys.stdin:\n"
        "    if 'hang' in line: time.sleep(60)\n"
        "    if 'die' in line: sys.exit(7)\n"
        "    print(json.dumps(dict(test=line.strip(), status='passed', message='', seconds=0, usable='lost' not in line)), flush=True)\n"
    )
    worker = test_gpu.Worker([])
    worker.command = [sys.executable, "-c", script]
    seen = []
    for id in ("a", "hang", "b", "die", "c", "lost", "d"):
        result = worker.run(id, 10 if id != "hang" else 0.5)
        seen.append((result["test"], result["status"], result["message"]))
    worker.stop()
    assert seen == [
        ("a", "passed", ""), ("hang", "failed", "no answer within 0 s"), ("b", "passed", ""),
        ("die", "failed", "the process died with exit code 7"), ("c", "passed", ""), ("lost", "passed", ""), ("d", "passed", ""),
    ]  # fmt: skip


def test_a_run_without_pytest():
    def passes(where):
        pass

    def fails(where):
        assert 1 == 2, "one is not two"

    def skips(where):
        raise SkipTest("no reason")

    passes.alone = True
    where = test_gpu.CPU[1]
    tests = {f.__name__: (f, dict(where=where)) for f in (passes, fails, skips)}
    for limit, statuses in ((60, ["failed", "skipped", "passed"]), (0, ["not run"] * 3)):
        results = []
        test_gpu.run_all(tests, 0, limit, 10, [], results.append)
        assert [result["test"] for result in results] == ["fails", "skips", "passes"]  # who wants to be alone comes last
        assert [result["status"] for result in results] == statuses
        if limit:
            assert "one is not two" in results[0]["message"] and results[1]["message"] == "no reason"


def test_what_is_collected_without_pytest():
    on_gpu = test_gpu.collect("cuda", {"cuda", "triton", "reference"}, [])
    assert "test_launches[cuda]" in on_gpu and "test_launches[reference]" not in on_gpu
    assert len(on_gpu) > 400 and list(on_gpu)[0].split("[")[1].startswith("cuda")
    some = test_gpu.collect("cpu", {"cpu"}, ["test_tour", "scaler[cpu-sgd, dampening 0.5"])
    assert list(some) == ["test_grad_scaler[cpu-sgd, dampening 0.5]", "test_tour[cpu]"]
    if not torch.cuda.is_available():
        assert test_gpu.main([]) == 2


# ---- benchmarks of one question ----------------------------------------------------------------------------------------


def test_steps_of_l2rw_are_measured(threads):
    """The smallest batch with a clean sample; the weights are looked at in float64, and memory where the system tells."""
    threads(1)
    found = l2rw.measure(True, 8, 2)
    assert found["clean_rows"] == 1 and set(found["methods"]) == set(ab.meta.METHODS)
    for name, m in found["methods"].items():
        assert m["ratio"]["q1"] <= m["ratio"]["median"] <= m["ratio"]["q3"] and m["memory"] > 0
        assert m["distance"] < (0.2 if name == "finite_difference" else 1e-3), name
    assert found["methods"]["jvp"]["most"] == 2.8 and found["methods"]["unrolled"]["most"] is None


def test_imbalance_is_measured(tmp_path, capsys):
    assert imbalance.main(["--ratios", "20", "--seeds", "2", "--epochs", "1", "--out", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["imbalance"]
    assert row["ratio"] == 20 and list(row["errors"]) == list(imbalance.METHODS) and row["config"]["clean"] == 5
    assert all(len(e) == 2 and all(0 <= x <= 100 for x in e) for e in row["errors"].values())
    assert "Test error" in capsys.readouterr().out
