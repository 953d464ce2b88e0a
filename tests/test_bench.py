"""The benchmarks: the oracle stops whoever is wrong, and what is reported says so. No timing is asserted."""

import contextlib
import json
import math
import os
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
    from benchmarks import cases, device, gpu_folder, gpu_report, imbalance, l2rw, models, peers, run

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
    "gpu deferred": [partial(cases.MicroBatches, 3, 11, 10, dtype) for dtype in (torch.float32, torch.bfloat16)],
    "gpu linear": [partial(cases.Head, 37, 8, 50, dtype) for dtype in (torch.float32, torch.bfloat16)],
    "gpu train": [case.data for case in cases.gpu_cases("cpu", tiny=True) if case.suite == "gpu train"],
}
NEED_MORE = {"absgd_fast, triton", "Liger"}  # than a CPU has, or tests install
if not hasattr(torch.nn.functional, "linear_cross_entropy"):
    NEED_MORE.add("torch, chunked")
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


@pytest.mark.parametrize("wrong", ["no factor", "a micro-batch by itself"])
def test_a_wrong_deferred_step_is_stopped(wrong):
    def factory(data):
        deferred = wrong == "no factor"
        criterion = ab.ABLoss(lam=cases.LAM, gamma=cases.GAMMA, deferred=deferred)
        return peers._micro_batches(data, criterion, (lambda: 1.0 + 0 * criterion.settle()[1]) if deferred else None)

    with pytest.raises(peers.LeftOut, match="off by"):
        peers.ready(factory, cases.MicroBatches(3, 11, 10))


@pytest.mark.parametrize("name", ["absgd_fast", "plain"])
def test_a_wrong_loss_of_a_head_or_a_whole_step_is_stopped(name):
    head, (whole,) = cases.Head(37, 8, 50), DATA["gpu train"]
    with pytest.raises(peers.LeftOut, match="off by"):
        peers.ready(lambda data: peers._head(data, ab.LinearABLoss(lam=2 * cases.LAM, gamma=cases.GAMMA)), head)
    factory = peers.PEERS["gpu train"][name]

    def off(data):
        peer = factory(data)
        right = peer.run
        peer.run = lambda: right() * 1.01
        return peer

    with pytest.raises(peers.LeftOut, match="off by"):
        peers.ready(off, whole())


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


def gpu_case(suite, name, **options):
    return next(case for case in cases.gpu_cases(**options) if (case.suite, case.name) == (suite, name))


def test_what_is_timed_on_a_gpu():
    """What memory bounds comes first, the one-block kernel last; a share of the copy depends on the card."""
    found = cases.gpu_cases()
    large, small = ([f"{rows} × {classes} {dtype}" for rows, classes in shapes for dtype in ("bf16", "fp32")]
                    for shapes in (cases.SHAPES, cases.SMALL_SHAPES))  # fmt: skip
    names = [case.name for case in found if case.suite == "gpu loss"]
    assert names == [*large, "16384 × 10 fp32", "2 × 8142 fp32", *small] and names[0] == "8192 × 32000 bf16"
    order = [case.name for case in found]
    with_figures = {f"gpu {suite}" for suite in "deferred step weighted linear train".split()}
    others = [order.index(case.name) for case in found if case.suite in with_figures]
    assert max(others) < order.index("256 × 365 bf16")  # a shape among others waits for what has figures of its own
    suites = list(dict.fromkeys(case.suite for case in found))
    assert suites == [f"gpu {name}" for name in "loss deferred step weighted linear train rules limit".split()]
    assert [case.name for case in cases.gpu_probe(found)] == [
        "8192 × 32000 bf16", "16384 × 10 fp32", "2 × 8142 fp32", "ResNet-50, 161 tensors", "128 × 10 fp32"
    ]  # fmt: skip
    for case in cases.gpu_probe(found):  # cold, a compiler takes longer than the probe has
        assert not set(run.taking_part(case)) & {*run.COMPILING} and set(case.targets) <= set(run.taking_part(case))
    assert set(run.taking_part(gpu_case("gpu step", "ResNet-50, 161 tensors"))) == peers.PEERS["gpu step"].keys()


def test_the_figures_of_a_gpu():
    small, large = gpu_case("gpu loss", "128 × 100 bf16"), gpu_case("gpu loss", "8192 × 32000 bf16")
    launches = {"forward launches": (1, 1), "backward launches": (0, 1)}
    assert small.targets == {"absgd package": 0.25, "Liger": 1.5, "torch.compile": 0.7} and small.bounds == launches
    assert large.targets == {"absgd package": 0.4, "Liger": 1.5}  # three passes; Liger has two
    for name in ("512 × 8142 bf16", "16384 × 10 fp32"):
        assert gpu_case("gpu loss", name).targets["Liger"] == 1.5
    assert gpu_case("gpu loss", "128 × 10 fp32").targets["Liger"] == 1.0  # one block, one pass
    for name, card, least in (("8192 × 32000 bf16", "NVIDIA H200", 0.85), ("8192 × 32000 fp32", "NVIDIA H100 80GB HBM3", 0.88),
                              ("8192 × 128256 bf16", "NVIDIA H200", 0.90)):  # fmt: skip
        assert gpu_case("gpu loss", name, card=card).bounds == launches | {"share of copy": (least, math.inf)}
    assert "torch.compile" not in gpu_case("gpu loss", "512 × 1000 fp32").targets
    assert gpu_case("gpu loss", "16384 × 10 fp32").targets["cross_entropy"] == 1.3
    assert gpu_case("gpu loss", "2 × 8142 fp32").targets["cross_entropy"] == 1.5
    assert gpu_case("gpu deferred", "4 of 8192 × 32000 bf16").targets == {"Liger": 1.0}  # two passes each
    linear = gpu_case("gpu linear", "8192 × 4096 × 128256 bf16")
    assert linear.targets == {"Liger": 1.05, "torch, chunked": 1.05} and linear.memory == {"Liger": 1.1, "torch, chunked": 1.1}
    assert [case.targets for case in cases.gpu_cases() if case.suite == "gpu train"] == [{"plain": 1.0}] * 2
    steps = {case.name: case for case in cases.gpu_cases() if case.suite == "gpu step"}
    assert [case.targets for case in steps.values()] == [{"SGD fused": 0.5}, {"SGD fused": 0.9}, {}, {}]
    assert steps["ResNet-50, 161 tensors"].bounds == {"step launches": (1, 1), "host us": (0, 35)}
    billion = steps["1 B parameters, 300 tensors"]
    assert billion.bounds["share of copy"] == (0.9, math.inf)
    shapes = billion.data.args[0]
    assert len(shapes) == 300 and sum(map(math.prod, shapes)) == pytest.approx(1e9, rel=1e-3)


def test_the_shapes_of_the_one_block_kernel_are_at_its_border():
    """It serves rows of at most 128 classes, 4 of them per lane, in at most 512 lanes."""
    lanes = [(rows * min(32, 2 ** max(0, math.ceil(math.log2(classes / 4)))), classes) for rows, classes in cases.ONE_BLOCK]
    assert all(n <= 512 and classes <= 128 for n, classes in lanes) and sum(n > 256 for n, _ in lanes) == 2
    assert [case.name for case in cases.gpu_cases() if case.suite == "gpu limit"] == [f"{r} × {c}" for r, c in cases.ONE_BLOCK]


def test_the_fastest_way_of_torch_depends_on_the_device():
    """Adagrad's fused step is for the CPU alone."""
    on = {name: (rule.fastest(CPU), rule.fastest(torch.device("cuda"))) for name, rule in cases.RULES.items()}
    assert on["AdaGrad"] == ({"fused": True}, {"foreach": True}) and on["AdamW"] == ({"fused": True}, {"fused": True})


def test_the_decoder_is_one_of_124_million():
    with torch.device("meta"):
        assert models.sizes(models.Decoder()) == 124_475_904


def test_statistics_can_be_forced():
    """Where a backend has the choice: here one that says so, and serves nothing."""
    operators = types.SimpleNamespace(backend="cuda", saves=lambda logits: 0, in_place=False, has_rules=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers.ops, "serving", lambda device, backend: operators)
        patch.setattr(peers, "_loss", lambda data, criterion: criterion._served[1])
        other = peers._from_statistics(cases.Logits(8, 5))
    assert other.saves(None) == peers.ops.WITH_STATS and operators.saves(None) == 0


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


def test_liger_comes_before_what_compiles_longer():
    """It must not be left out because torch.compile has taken the time of all."""
    names = list(peers.PEERS["gpu loss"])
    assert names.index("Liger") < names.index("torch.compile") == len(names) - 1


@pytest.mark.parametrize("text, words", [
    ("import sys\nassert sys.modules['peft'] is None\nLigerCrossEntropyLoss = dict", None),
    ("raise RuntimeError('no driver')", "Liger cannot be imported: RuntimeError: no driver"),
    ("import nowhere_at_all", "No module named 'nowhere_at_all': pip install liger-kernel"),
])  # fmt: skip
def test_liger_is_imported_without_what_it_asks_for(tmp_path, monkeypatch, capsys, text, words):
    folder = tmp_path / "liger_kernel" / "transformers"
    folder.mkdir(parents=True)
    (folder / "cross_entropy.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name == "peft" or name.split(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        if words:
            with pytest.raises(peers.LeftOut, match=re.escape(words)):
                peers._liger_cross_entropy()
        else:
            assert peers._liger_cross_entropy() == {}
        assert "peft" not in sys.modules
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
            del sys.modules[name]


def test_imports_belong_to_nobodys_time(monkeypatch, capsys):
    asked = []

    def load(name):
        asked.append(name)
        raise ImportError(f"no {name}")

    monkeypatch.setattr(peers.importlib, "import_module", load)
    peers.import_compilers()
    assert asked == ["liger_kernel.transformers.cross_entropy", "triton", "torch._inductor.compile_fx"]
    assert capsys.readouterr().out.count("no ") == 3


def test_memory_is_measured_without_old_gradients(quick, monkeypatch):
    """They would count as what was there before, and then as room that the call found."""
    case, held, grads = gpu_case("gpu linear", "40 × 8 × 300 fp32", device="cpu", tiny=True), [], []

    def ours(data):
        criterion = ab.LinearABLoss(lam=cases.LAM, gamma=cases.GAMMA)

        def seen(hidden, weight, target):
            held[:] = hidden, weight
            return criterion(hidden, weight, target)

        return peers._head(data, seen)

    monkeypatch.setitem(peers.PEERS, "gpu linear", {"absgd_fast": ours})
    monkeypatch.setattr(run, "peak_allocated", lambda where, call: grads.append([leaf.grad for leaf in held]))
    run.explore(case, 0.01, False)
    assert grads == [[None, None]] and all(leaf.grad is not None for leaf in held)


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
            self.device_index = 0

        def wait_stream(self, other):
            done.append("wait")

    class Graph:
        def replay(self):
            done.append("replay")

    class Capture(contextlib.nullcontext):
        def __init__(self, graph, pool):
            super().__init__()

    fake = dict(Event=Event, Stream=Stream, CUDAGraph=Graph, stream=contextlib.nullcontext, graph=Capture)
    fake |= dict(current_stream=lambda *_: Stream(0), synchronize=lambda *_: None, graph_pool_handle=lambda: (0, 1))
    fake |= dict(get_sync_debug_mode=lambda: 0, set_sync_debug_mode=done.append, set_stream=lambda stream: done.append("stream"))
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return types.SimpleNamespace(type="cuda"), done


def test_the_clock_and_the_graphs_of_a_gpu(pretended):
    where, done = pretended
    assert device.block_ns(where, lambda: done.append("run"), 4) == 1e6
    replay, result = device.captured(where, lambda: done.append("run") or 7)
    # the last warm-up while waiting is an error, the last one of all while it is captured
    assert result == 7 and done[-8:] == ["wait", "run", "run", "error", "run", 0, "wait", "run"]
    replay()
    assert done[-1] == "replay"
    assert len(device.host_us(where, lambda: done.append("run"), 2, 3)) == 3


def test_who_waits_is_never_captured(pretended, monkeypatch):
    """A failed capture costs the process its allocator; .item() is found before."""
    where, done = pretended
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: pytest.fail("a capture began"))

    def waits():
        if "error" in done:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        device.captured(where, waits)
    assert done[-1] == 0  # waiting is allowed again


@pytest.mark.parametrize("ended", [False, True])
def test_a_failed_capture_gives_back_the_pool_and_the_stream(pretended, monkeypatch, ended):
    """capture_end() of torch 2.11 raises before it does; where torch did, ending it again is an error of no interest."""
    where, done = pretended

    class Capture:
        def __init__(self, graph, pool):
            self.pool = pool

        def __enter__(self):
            done.append("capture")

        def __exit__(self, *error):
            raise RuntimeError("operation failed due to a previous error during capture")

    def end(index, pool):
        done.append((index, pool))
        if ended:
            raise RuntimeError("not currently recording")

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    with pytest.raises(RuntimeError, match="previous error"):
        device.captured(where, lambda: None)
    assert done[-3:] == ["capture", (0, (0, 1)), "stream"]


def profiled_event(name, at, kind=torch.autograd.DeviceType.CPU, **more):
    return types.SimpleNamespace(name=name, device_type=kind, time_range=types.SimpleNamespace(start=at, end=at + 5), **more)


on_gpu = partial(profiled_event, kind=torch.autograd.DeviceType.CUDA)


@pytest.fixture
def profile(pretended, monkeypatch):
    """The events that the profiler will have seen."""
    where, _ = pretended
    seen = []
    monkeypatch.setattr(device, "_events", lambda where, run: run() or seen)
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: torch.ones(1))  # the pretended device has no memory
    return where, seen


def test_kernels_are_what_lies_between_the_marks(profile):
    """Whatever they are called, in the order of their start; no copies and fills, and no annotations."""
    where, seen = profile
    seen += [on_gpu("add", 1), on_gpu("add", 90), on_gpu("void absgd::gpu::a_kernel<float>", 20), on_gpu("nobody_knows_me", 30)]
    seen += [on_gpu("Memset (Device)", 21), on_gpu("[memcpy] dtod", 22), on_gpu("add", 40)]
    seen += [profiled_event("cudaLaunchKernel", 11)]
    seen += [on_gpu("Optimizer.step#ABSGD.step", 19, is_user_annotation=True), on_gpu("a range", 0, is_user_annotation=True)]
    assert device.kernels(where, lambda: None) == ["void absgd::gpu::a_kernel<float>", "nobody_knows_me", "add"]


@pytest.mark.parametrize("names", [[], ["add"], ["add", "a_kernel"]])
def test_a_profiler_that_misses_the_marks_counts_nothing(profile, names):
    where, seen = profile
    seen += [on_gpu(name, at) for at, name in enumerate(names)]
    with pytest.raises(RuntimeError, match="did not see the marks"):
        device.kernels(where, lambda: None)
    assert run._launched(where, lambda: None) is None


def test_what_the_host_waited_for(profile):
    where, seen = profile
    event = profiled_event
    seen += [event("absgd_fast: no waiting", 10), event("cudaStreamSynchronize", 12), event("cudaDeviceSynchronize", 99)]
    seen += [event("cudaLaunchKernel", 11), event("cudaMemcpy", 13), event("cudaMemcpyAsync", 14)]
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
    suites = [result["suite"] for result in report["results"]]
    assert suites == [f"gpu {name}" for name in "loss loss deferred step weighted linear train rules limit".split()]
    _, loss, deferred, step, _, linear, whole, _, limit = report["results"]
    assert set(step["peers"]) == {"absgd_fast", "SGD fused", "SGD foreach"} and "absgd_fast, triton" in step["absent"]
    assert set(loss["peers"]) == {"absgd_fast", "cross_entropy", "absgd package", "torch.compile"}
    assert set(loss["absent"]) == NEED_MORE and set(limit["absent"]) == {"from statistics"}
    for result in report["results"]:
        for name, peer in result["peers"].items():
            for key in ("us", "host_us", "share", *(["graph_us"] if result is not whole else [])):
                assert 0 < peer[key]["q1"] <= peer[key]["median"] <= peer[key]["q3"], (result["case"], name, key)
            assert name == "absgd_fast" or "ratio" in peer
    assert loss["bytes"] == 3 * 16 * 5 * 4 and set(loss["peers"]["absgd_fast"]["launches"]) == {"forward", "backward"}
    assert deferred["bytes"] == 2 * 4 * 6 * 11 * 2 and set(deferred["peers"]) == {"absgd_fast", "cross_entropy"}
    assert set(linear["peers"]) | NEED_MORE == {"absgd_fast", "torch, chunked"} | NEED_MORE and "Liger" in linear["absent"]
    assert linear["peers"]["absgd_fast"]["peak_bytes"] is None and set(whole["peers"]) == {"absgd_fast", "plain"}
    assert all(result["seconds"] > 0 for result in report["results"])
    figures = {(figure["case"], figure["figure"]): figure for figure in report["figures"]}
    assert figures["three tensors", "share of copy"]["met"] is False and figures["three tensors", "host us"]["most"] == 35
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
    assert ["wrong" in result for result in results] == [True] + [False] * 8
    assert "off by" in results[0]["wrong"]
    assert results[1]["absent"]["cross_entropy"] == "RuntimeError: a kernel that does not compile and more"
    assert "WRONG" in capsys.readouterr().out


def test_no_time_for_all_cases(quick, monkeypatch, capsys):
    assert run.main([*REHEARSAL, "--limit", "0.001"]) == 0
    assert "not measured: gpu step: three tensors" in capsys.readouterr().out


def test_the_limit_counts_from_before_the_imports(quick, capsys):
    """A machine that never read torch from its disk takes half a minute for them."""
    assert run.main([*REHEARSAL, "--limit", "60"], begun=run.perf_counter() - 61) == 0
    assert "not measured: gpu step: three tensors" in capsys.readouterr().out


def test_a_benchmark_that_is_killed_tells_what_was_to_come(quick):
    report, kept = {"copy": None, "results": [], "figures": [], "not_measured": []}, []
    some = [gpu_case(*place, device="cpu", tiny=True) for place in (("gpu step", "three tensors"), ("gpu weighted", "8 × 87"))]
    run.measure_gpu(report, some, CPU, 0.01, math.inf, lambda: kept.append([*report["not_measured"]]))
    first, second = "gpu step: three tensors", "gpu weighted: 8 × 87"
    assert kept == [[first, second], [second], [], []]


def test_a_call_that_cannot_be_captured(quick, monkeypatch):
    def captured(device, run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(run, "captured", captured)
    result = run.explore(gpu_case("gpu step", "three tensors", device="cpu", tiny=True), 0.01, True)
    assert "not permitted" in result["peers"]["absgd_fast"]["graph_failed"] and "graph_us" not in result["peers"]["SGD fused"]


def test_a_case_is_kept_before_the_memory_is_emptied(quick, monkeypatch, capsys):
    """The allocator of a process whose capture failed raises for ever; what was measured is on the disk by then."""
    order = []

    def broken():
        order.append("empty")
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    run._empty(types.SimpleNamespace(type="cuda"))
    assert "captures_underway" in capsys.readouterr().out
    monkeypatch.setattr(run, "_empty", lambda where: order.append("empty"))
    report = {"copy": None, "results": [], "figures": [], "not_measured": []}
    case = gpu_case("gpu step", "three tensors", device="cpu", tiny=True)
    assert run.measure_gpu(report, [case], CPU, 0.01, math.inf, lambda: order.append(len(report["results"])))
    assert order == ["empty", 0, 1, "empty", 1]


def test_a_probe_is_a_few_of_the_cases(quick, tmp_path):
    assert run.main([*REHEARSAL, "--suite", "gpu-probe", "--out", str(tmp_path / "probe.json")]) == 0
    results = json.loads((tmp_path / "probe.json").read_text(encoding="utf-8"))["results"]
    assert [result["suite"] for result in results] == ["gpu loss", "gpu step"]
    assert [result["case"] for result in results] == ["16 × 5 fp32", "three tensors"]


def test_who_is_late_is_left_out(quick, monkeypatch):
    monkeypatch.setattr(run, "BUDGET", 0.0)
    case = gpu_case("gpu step", "three tensors", device="cpu", tiny=True)
    with pytest.raises(peers.LeftOut, match="absgd_fast: no time was left"):
        run.explore(case, 0.01, True)
    right = peers.ready
    monkeypatch.setattr(run, "BUDGET", 1e9)
    monkeypatch.setattr(run, "ready", lambda *args: (right(*args), monkeypatch.setattr(run, "perf_counter", lambda: 2e9))[0])
    assert set(run.explore(case, 0.01, True)["peers"]) == {"absgd_fast"}


def test_a_case_whose_model_is_not_installed(quick, tmp_path):
    """torchvision has the ResNet-50 of whole steps; without it the case is not measured, and nothing is wrong."""

    def data():
        raise ModuleNotFoundError("No module named 'torchvision'")

    report = {"copy": None, "results": [], "figures": [], "not_measured": []}
    case = cases.Case("gpu train", "a ResNet", data)
    assert run.measure_gpu(report, [case], CPU, 0.01, math.inf, lambda: None)
    assert report["not_measured"] == ["gpu train: a ResNet: ModuleNotFoundError: No module named 'torchvision'"]


def test_preparing_runs_what_compiles(monkeypatch, capsys):
    ran = []
    for suite in ("gpu loss", "gpu step"):
        for name in {*run.COMPILING} & peers.PEERS[suite].keys():
            replace(monkeypatch, suite, name, lambda data, name=name: peers.Peer(lambda: ran.append(name), None))
    assert run.main(["--suite", "gpu", "--rehearse", "--prepare"]) == 0
    assert sorted(ran) == ["Liger"] * 2 + ["absgd_fast, triton"] * 3 + ["torch.compile"] * 2
    assert "gpu weighted: 8 × 87: absgd_fast, triton: LeftOut" in capsys.readouterr().out


def test_preparing_in_processes(monkeypatch):
    """A process for each case; where the one in question needs no compiler, nothing goes wrong."""
    number = next(k for k, case in enumerate(cases.gpu_cases("cpu", tiny=True)) if case.suite == "gpu train")
    monkeypatch.setattr(run, "range", lambda count: [number], raising=False)
    assert run.prepare(1, "gpu", CPU, True, 2) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as leaving:
        run.main(["--suite", "gpu"])
    assert leaving.value.code == 2 and "needs a CUDA GPU" in capsys.readouterr().err


# ---- gpu.sh and what it leaves ---------------------------------------------------------------------------------------


def measured(median):
    return {"median": median, "q1": median, "q3": median}


def a_report():
    ours = {"us": measured(10.0), "host_us": measured(5.0), "peak_bytes": 12}
    ours["launches"] = {"forward": ["a"], "backward": ["b", "c"]}
    theirs = {"us": measured(20.0), "ratio": measured(0.5), "met": False, "note": "a twin", "peak_bytes": 10}
    result = {"suite": "gpu loss", "case": "x", "bytes": 900, "absent": {}}
    result["peers"] = {"absgd_fast": ours, "absgd package": theirs}
    wrong = {"suite": "gpu loss", "case": "y", "wrong": "off by 1"}
    return {"copy": {"bytes_per_us": measured(100.0)}, "results": [result, wrong], "figures": [], "not_measured": ["z"]}


def test_figures_are_judged():
    report = a_report()
    bounds = {"share of copy": (0.85, math.inf), "forward launches": (1, 1), "backward launches": (0, 1), "host us": (0, 20)}
    case = cases.Case("gpu loss", "x", None, {"absgd package": 0.25, "Liger": 1.0}, bounds, {"absgd package": 1.1, "Liger": 1.1})
    gpu_report.finish(report, [case])
    gpu_report.finish(report, [case])  # as after every case
    assert report["results"][0]["peers"]["absgd_fast"]["share"]["median"] == pytest.approx(0.9)
    met = {figure["figure"]: figure["met"] for figure in report["figures"]}
    assert met == {"time over absgd package": False, "memory over absgd package": False, "share of copy": True,
                   "forward launches": True, "backward launches": False, "host us": True,
                   "time over Liger": None, "memory over Liger": None}  # fmt: skip
    assert report["figures"][4]["most"] is None and json.dumps(report)
    lines = gpu_report.lines(report)
    assert lines[0].split()[:3] == ["gpu", "loss", "us"] and lines[1].split() == "x 10 0% 5 – 90% 1+2 0.50!".split()
    assert "WRONG" in lines[2] and "absgd package: a twin" in lines and "not measured: z" in lines
    assert lines[-5:] == [
        "not judged: 2: x: time over Liger; x: memory over Liger",
        "figures: 3 of 6 met ('!' above: missed)",
        "missed: gpu loss, x: time over absgd package 0.5, wanted <= 0.25",
        "missed: gpu loss, x: memory over absgd package 1.2, wanted <= 1.1",
        "missed: gpu loss, x: backward launches 2, wanted <= 1",
    ]


def test_no_figure_disappears():
    """Neither of a case that was wrong nor of one that was not measured."""
    report, bounds = a_report(), {"share of copy": (0.85, math.inf), "step launches": (1, 1), "host us": (0, 20)}
    some = [cases.Case("gpu loss", name, None, {"Liger": 1.0}, bounds, {"Liger": 1.1}) for name in "yz"]
    gpu_report.finish(report | {"results": report["results"][1:]}, some)  # without x; y is wrong, z was not measured
    gpu_report.finish(report, [cases.Case("gpu loss", "x", None), *some])
    assert [figure["case"] for figure in report["figures"]] == ["y"] * 5 + ["z"] * 5
    assert all(figure["value"] is None and figure["met"] is None for figure in report["figures"])
    assert any(line.startswith("not judged: 10: y: time over Liger; ") for line in gpu_report.lines(report))


def test_where_one_block_stops_to_pay():
    results = [
        {"case": name, "peers": {"absgd_fast": {"graph_us": measured(a)}, "from statistics": {"graph_us": measured(2.0)}}}
        for name, a in (("1k", 1.0), ("4k", 1.5), ("16k", 3.0))
    ]
    assert gpu_report._limit(results) == ["one block over statistics, graph_us: median 0.75; slower at 16k (1.50)"]


def test_stages_are_read_from_the_log():
    """A call that was killed leaves a stage without an end."""
    log = "==== smoke: at most 35 s\na line\n==== smoke: exit code 139 after 3 s\n==== triton: at most 92 s\nhalf a line"
    assert gpu_report.stages(log) == {
        "smoke": {"exit": 139, "seconds": 3, "limit": 35, "said": ["a line"]},
        "triton": {"exit": None, "seconds": None, "limit": 92, "said": ["half a line"]},
    }
    assert gpu_report.stages("") == {}


def test_half_a_line_hides_no_end():
    """gpu.sh puts an empty line before the end of a stage, whose command may have been killed amid a line."""
    assert "printf '\\n==== %s: exit code" in GPU_SH.read_text(encoding="utf-8")
    found = gpu_report.stages("==== cuda: at most 9 s\nhalf a line\n==== cuda: exit code 124 after 9 s\n")
    assert found["cuda"]["exit"] == 124


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_stage_without_results_runs_again_as_a_whole(name):
    stage = {"exit": 124, "seconds": 9, "said": []}
    tests, _ = gpu_report.tested({}, stage, name)
    tests["test_a[cuda-x, 1]"] = {"status": "not run"}
    assert gpu_report.to_run_again({"tests": tests}) == [f"[{name}", "test_a[cuda-x"]
    tests[f"stage {name}"]["status"] = "passed"
    assert gpu_report.to_run_again({"tests": tests}) == ["test_a[cuda-x"]


def smoke_lines(*lines):
    of = ("operator", "backend", "status")
    return "".join(json.dumps(dict(zip(of, line)) | dict(message="", seconds=0)) + "\n" for line in lines)


RIGHT = [("logit_loss", "cuda", "begun"), ("logit_loss", "cuda", "passed")]


@pytest.mark.parametrize("lines, code, done, died", [
    (RIGHT, 0, 1, None),
    ([*RIGHT, ("scale", "cuda", "failed")], 1, 2, None),
    ([*RIGHT, ("scale", "cuda", "begun")], 139, 1, "exit code 139, in scale (cuda)"),
    (RIGHT, 124, 1, "exit code 124, after logit_loss (cuda)"),
    ([], 2, 0, "exit code 2, before its first operator | no such file"),
])  # fmt: skip
def test_what_the_smoke_test_came_to(lines, code, done, died):
    stage = {"exit": code, "said": ["Traceback", "no such file"]}
    found = gpu_report.smoked(smoke_lines(*lines) + '{"operator": "half a li', stage)
    assert len(found["operators"]) == done and found.get("died") == died


@pytest.mark.parametrize("log, code, errors, reason", [
    ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors", 0, 0, None),
    ("========= ERROR SUMMARY: 3 errors", 9, 3, None),
    ("========= ERROR SUMMARY: 0 errors", 1, 0, "what ran under it failed"),
    ("========= Error: Device not supported\n========= ERROR SUMMARY: 1 error", 1, None, "ERROR SUMMARY"),
    ("========= ERROR SUMMARY: 0 errors", 124, None, "stopped after 60 s"),
    ("========= Invalid __global__ write\n=========     at x\n========= Misaligned address", 124, 2, "stopped after 60 s"),
    ("========= Invalid __global__ read of size 4 bytes", 139, 1, "no summary"),
    ("timeout: failed to run command: No such file", 127, None, "it said nothing"),
])  # fmt: skip
def test_what_a_sanitizer_said(log, code, errors, reason):
    found = gpu_report.sanitized({"exit": code, "seconds": 1, "limit": 60, "said": log.splitlines()})
    assert found["errors"] == errors and (reason is None or reason in found["reason"])


def left_by_tests(**statuses):
    """What test_gpu.py leaves; names with _ for what an identifier cannot hold."""
    found = {name.replace("__", "[cuda-") + "]": status for name, status in statuses.items()}
    failures = [dict(test=name, message="off\nby one") for name, status in found.items() if status == "failed"]
    tests = [dict(test=name, status=status, seconds=1) for name, status in found.items()]
    return dict(failures=failures, tests=tests, skips={"needs two GPUs": 1} if "skipped" in found.values() else {})


@pytest.fixture
def a_call(tmp_path, monkeypatch):
    """a_call(name, {stage: exit code}, {file: text or JSON}) -> what gpu_report makes of a call that left these."""
    monkeypatch.chdir(tmp_path)
    manifest = dict(commit="abc", torch="2.11", architectures="90-real")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    def make(call, codes, pieces):
        folder = tmp_path / "pieces"
        folder.mkdir()
        for name, value in pieces.items():
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        said = {"memcheck": "========= ERROR SUMMARY: 0 errors\n"}
        log = "".join(f"==== {s}: at most 9 s\n{said.get(s, '')}==== {s}: exit code {c} after 5 s\n" for s, c in codes.items())
        (tmp_path / f"{call}.log").write_text(log)
        code = gpu_report.main(["call", call, str(tmp_path), "--gpu", "a card"])
        assert not folder.exists()
        report = json.loads((tmp_path / f"{call}.json").read_text(encoding="utf-8"))
        assert code == (1 if report["failed"] else 0)
        return report

    return make


def a_bench(**changes):
    bench = a_report() | {"gpu": {"name": "NVIDIA H200"}, "date": "now", "hardware": {}, "versions": {}}
    bench["results"].pop()
    return bench | changes


ALL_WELL = dict(smoke=0, cuda=0, triton=0, compile=0, probe=0, caches=0)
LEFT = {"smoke.jsonl": smoke_lines(*RIGHT), "cuda.json": left_by_tests(test_a__x="passed", test_b__y="skipped"),
        "triton.json": left_by_tests(test_c__x="passed"), "bench.json": a_bench()}  # fmt: skip


def test_one_call_in_one_json(a_call, capsys):
    report = a_call("prove", ALL_WELL, LEFT)
    assert set(report) == {*gpu_report.OF_THE_BENCHMARK, "manifest", "calls", "logs", "smoke", "tests", "skips", "sanitizer",
                           "benchmark", "failed"}  # fmt: skip
    assert report["gpu"] == {"name": "NVIDIA H200"} and report["manifest"]["commit"] == "abc" and report["failed"] == []
    assert report["calls"]["prove"]["probe"] == {"exit": 0, "seconds": 5, "limit": 9} and report["logs"] == {"prove": {}}
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == ["everything passed", f"written: {Path.cwd() / 'prove.json'}"]
    assert "tests: 2 passed, 0 failed, 1 skipped, 0 not run" in printed and "  skipped 1: needs two GPUs" in printed
    assert "smoke: 1 operators right, 0 wrong" in printed
    assert "prove: smoke 5 s, cuda 5 s, triton 5 s, compile 5 s, probe 5 s, caches 5 s" in printed


@pytest.mark.parametrize("codes, left, words", [
    (dict(smoke=1), {"smoke.jsonl": smoke_lines(*RIGHT, ("scale", "cuda", "failed"))},
     ["smoke: 1 operators failed", "FAILED scale (cuda)"]),
    (dict(smoke=139), {"smoke.jsonl": smoke_lines(("scale", "cuda", "begun"))}, ["DIED: exit code 139, in scale (cuda)"]),
    (dict(cuda=1), {"cuda.json": left_by_tests(test_a__x="failed", test_b__x="passed")},
     ["1 failed, 0 not run", "FAILED test_a[cuda-x]: off by one"]),
    (dict(cuda=1), {"cuda.json": left_by_tests(test_a__x="not run", test_b__x="passed")}, ["0 failed, 1 not run"]),
    (dict(cuda=124), {"cuda.json": ""}, ["FAILED stage cuda: no result: exit code 124 after 5 s", "cuda 5 s, stopped"]),
    (dict(probe=1), {"bench.json": a_bench(results=[dict(suite="gpu loss", case="y", wrong="off by 1")])}, ["wrong at y"]),
    (dict(probe=1), {"bench.json": "{"}, ["benchmark: no result"]),
    (dict(probe=1), {}, ["FAILED: probe: exit code 1"]),
    (dict(probe=139), {"bench.json": a_bench(results=[dict(suite="gpu loss", case="y", wrong="off by 1")])},
     ["wrong at y; probe: exit code 139"]),
], ids=range(9))  # fmt: skip
def test_a_failure_ends_in_exit_code_1(a_call, capsys, codes, left, words):
    report = a_call("prove", ALL_WELL | codes, LEFT | left)
    printed = capsys.readouterr().out
    assert report["failed"] and all(word in printed for word in words), printed


def test_several_calls_as_one(a_call, tmp_path, capsys):
    """What `again` found stands for what `prove` did, and the benchmark for the probe."""
    tests = left_by_tests(test_a__x="failed", test_b__y="not run", test_d__z="failed", test_e__z="passed")
    tests["tests"].append(dict(test="test_f[cuda-sgd, dampening 0.5]", status="failed", seconds=1))
    a_call("prove", ALL_WELL | dict(cuda=1, probe=1), LEFT | {"cuda.json": tests, "bench.json": a_bench(results=[])})
    assert gpu_report.main(["failed", "prove.json"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "test_a[cuda-x],test_b[cuda-y],test_d[cuda-z],test_f[cuda-sgd"
    left = left_by_tests(test_a__x="passed", test_b__y="passed", test_d__z="failed")
    left["tests"].append(dict(test="test_f[cuda-sgd, dampening 0.5]", status="passed", seconds=1))
    a_call("again", dict(failed=1, large=0, memcheck=0), {"failed.json": left, "large.json": left_by_tests(test_g__z="passed")})
    a_call("measure", dict(bench=0), {"bench.json": a_bench(not_measured=[])})
    calls = [f"{name}.json" for name in ("prove", "again", "measure")]
    assert gpu_report.main(["merge", "all.json", *calls]) == 1
    report = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))
    assert report["failed"] == ["tests: 1 failed, 0 not run"] and list(report["calls"]) == ["prove", "again", "measure"]
    assert report["tests"]["test_a[cuda-x]"]["status"] == "passed" and report["tests"]["test_g[cuda-z]"]["status"] == "passed"
    assert report["benchmark"]["results"] and report["benchmark"]["not_measured"] == []
    assert report["sanitizer"]["memcheck"] == {"errors": 0} and report["smoke"]["operators"]
    printed = capsys.readouterr().out
    assert "memcheck: 0 errors" in printed and "FAILED test_d[cuda-z]: off by one" in printed
    assert gpu_report.main(["failed", "nowhere.json"]) == 0 and capsys.readouterr().out == "\n"


def test_a_call_without_gpu_tests_has_not_proved_nothing(a_call):
    report = a_call("measure", dict(bench=0), {"bench.json": a_bench()})
    assert report["failed"] == [] and report["tests"] == {}


# ---- the folder of a run ----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "absgd_fast").mkdir()
    for name in ("_ops_cpu.so", "_ops_cuda.so", f"_host{gpu_folder.sysconfig.get_config_var('EXT_SUFFIX')}"):
        (tmp_path / "absgd_fast" / name).write_bytes(b"abc")
    (tmp_path / "competitors" / "liger_kernel-0.8.5.dist-info").mkdir(parents=True)
    return tmp_path


def look(folder, capsys):
    code = gpu_folder.main([str(folder), "--commit", "abc", "--archs", "90-real"])
    return code, json.loads((folder / "manifest.json").read_text()), capsys.readouterr().out


@pytest.fixture
def with_cuda(monkeypatch):
    """A torch with CUDA, and what the look-up of its stream says."""
    said = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu_folder._backend, "cuda_unbound", lambda: said[-1] if said else None, raising=False)
    return said


def test_what_is_in_the_folder(folder, with_cuda, capsys):
    code, manifest, printed = look(folder, capsys)
    assert code == 0 and manifest["wrong"] == []
    assert manifest["competitors"] == ["liger_kernel-0.8.5"] and "liger_kernel-0.8.5" in printed
    assert manifest["libraries"]["_ops_cuda.so"] == {
        "bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }  # fmt: skip
    assert (manifest["commit"], manifest["architectures"], manifest["torch"]) == ("abc", "90-real", torch.__version__)


def test_a_folder_that_no_run_can_begin_with(folder, with_cuda, capsys, monkeypatch):
    with_cuda.append("no symbol of that name")
    (folder / "absgd_fast" / "_ops_cpu.so").unlink()
    monkeypatch.setattr(gpu_folder, "MOST", 5)
    code, manifest, printed = look(folder, capsys)
    assert code == 1 and len(manifest["wrong"]) == 3
    for words in ("_ops_cpu.so was not built", "does not find torch's stream: no symbol of that name", "it takes 0 MiB"):
        assert f"WRONG: {words}" in printed or words in printed


# ---- the script -------------------------------------------------------------------------------------------------------

GPU_SH = Path(run.__file__).with_name("gpu.sh")
BUDGETS = {"prove": 300, "again": 110, "measure": 250}
with_bash = pytest.mark.skipif(shutil.which("bash") is None or not sys.platform.startswith("linux"), reason="needs bash on Linux")


def gpu_sh(*arguments, script=GPU_SH, cwd=None, **environment):
    """Torch's compiler is no part of a rehearsal: it costs ten seconds a case."""
    quick = {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    environment = os.environ | {"PYTHON": sys.executable} | quick | environment
    return subprocess.run(["bash", script, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment)


@with_bash
@pytest.mark.parametrize("call", BUDGETS)
def test_the_stages_of_a_call_fit_into_its_seconds(tmp_path, call):
    """Two of them are for the script itself."""
    dry = gpu_sh(call, "--dry-run", tmp_path / "out")
    limits = [int(limit) for limit in re.findall(r"^\w+: at most (\d+) s$", dry.stdout, re.MULTILINE)]
    assert dry.returncode == 0 and dry.stderr == "" and len(limits) > 1 and sum(limits) <= BUDGETS[call] - 2
    assert list(tmp_path.iterdir()) == []


def test_three_calls_and_two_starts_fit_a_quarter_of_an_hour():
    """A start takes one to two minutes. What the page and the script say of the limits is what they are."""
    assert sum(BUDGETS.values()) + 2 * 120 <= 900
    script, page = GPU_SH.read_text(encoding="utf-8"), (GPU_SH.parents[1] / "docs" / "gpu.md").read_text(encoding="utf-8")
    for call, seconds in BUDGETS.items():
        assert re.search(rf"gpu.sh {call} .*at most {seconds} s", script)
        assert f"gpu.sh {call} OUT` | the GPU | {seconds} s" in page


@with_bash
def test_again_needs_what_prove_left(prepared, tmp_path):
    """Without it nothing is known to have failed, which must not read as if nothing had."""
    done = gpu_sh("again", "--rehearse", "--from", tmp_path, tmp_path / "out", script=prepared[0] / "gpu.sh")
    assert done.returncode == 2 and "no prove.json" in done.stderr and list(tmp_path.iterdir()) == []


@with_bash
def test_preparing_anew_keeps_what_a_run_left(prepared, tmp_path):
    """Also on a machine where nobody has a home."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("manifest.json", "prove.json", "caches.tar.gz", "old.py"):
        (folder / name).write_text("{}")
    command = ["env", "-u", "HOME", "-u", "XDG_CACHE_HOME", "bash", GPU_SH, "prepare", "--rehearse", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    kept = {path.name for path in folder.iterdir()}
    assert {"prove.json", "caches.tar.gz", "absgd_fast", "gpu.sh"} <= kept and "old.py" not in kept


@with_bash
def test_what_gpu_sh_refuses(tmp_path):
    for arguments, words in ((["--frobnicate"], "--frobnicate"), ([], "expected prepare, prove, again"), (["all"], "'all'")):
        refused = gpu_sh(*arguments, cwd=tmp_path)
        assert refused.returncode == 2 and words in refused.stderr and refused.stdout == ""
    assert "--rehearse" in gpu_sh("--help").stdout
    (tmp_path / "mine").write_text("not to be deleted")
    refused = gpu_sh("prepare", "--rehearse", tmp_path)
    assert refused.returncode == 2 and "holds something else" in refused.stderr and (tmp_path / "mine").exists()


SMOKE = """
import json, os, signal, sys
with open(sys.argv[sys.argv.index("--out") + 1], "w") as out:
    for status in ("begun", {end!r}):
        if status == "killed":
            os.kill(os.getpid(), signal.SIGSEGV)
        print(json.dumps(dict(operator="logit_loss", backend="cpu", status=status, message="", seconds=0)), file=out, flush=True)
sys.exit({code})
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder as `gpu.sh prepare` makes it, with the kernels that are there."""
    folder = tmp_path_factory.mktemp("gpu") / "folder"
    done = gpu_sh("prepare", "--rehearse", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    smoke = folder / "tests" / "gpu_smoke.py"
    if not smoke.exists():
        smoke.write_text(SMOKE.format(end="passed", code=0))
    return folder, done


@pytest.fixture(scope="session")
def rehearsal(prepared):
    """{call: what it printed and left}, all four calls, the last three as on one machine after the other."""
    folder, done = prepared
    calls, environment = {"prepare": (done, [], {})}, {"XDG_CACHE_HOME": str(folder.parent / "cache")}
    for call in BUDGETS:
        out = folder.parent / call
        done = gpu_sh(call, "--rehearse", out, script=folder / "gpu.sh", **environment)
        assert done.returncode == 0, done.stdout + done.stderr + (out / f"{call}.log").read_text()
        calls[call] = done, sorted(out.iterdir()), json.loads((out / f"{call}.json").read_text(encoding="utf-8"))
        if call == "prove":  # as if one test had failed there
            report = json.loads((folder / "prove.json").read_text(encoding="utf-8"))
            report["tests"]["test_certain_rows[cpu]"]["status"] = "failed"
            (folder / "prove.json").write_text(json.dumps(report))
            shutil.rmtree(folder.parent / "cache")
    return folder, calls


@with_bash
def test_a_rehearsed_folder(rehearsal):
    folder, calls = rehearsal
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["wrong"] == [] and manifest["torch"] == torch.__version__ and "_ops_cpu.so" in manifest["libraries"]
    assert {"absgd_fast", "benchmarks", "tests", "gpu.sh"} <= {path.name for path in folder.iterdir()}
    printed = calls["prepare"][0].stdout
    assert f"for Python {manifest['python']}" in printed and re.search(r"kernels: exit code 0, \d+ of \d+ s", printed)
    with_path = [p for p in folder.rglob("*.py") if str(GPU_SH.parents[1]) in p.read_text()]
    assert with_path == []  # it does not know where it was made


@with_bash
@pytest.mark.parametrize("call, stages", [
    ("prove", "smoke cuda compile triton probe caches"), ("again", "failed large memcheck"), ("measure", "bench"),
])  # fmt: skip
def test_a_rehearsed_call(rehearsal, call, stages):
    """Few files, small enough to be brought back; the seconds of each stage; a table at the end. (Without load the four calls
    take 40 s.)"""
    done, files, report = rehearsal[1][call]
    names = {path.name for path in files}
    caches = {name for name in names if re.fullmatch(r"caches\.tar\.(zst|gz)", name)}
    assert names == {f"{call}.json", f"{call}.log"} | caches and len(caches) == (call == "prove")
    assert all(path.stat().st_size <= 16 * 2**20 for path in files)
    assert list(report["calls"][call]) == stages.split() and report["failed"] == []
    for stage in stages.split():
        assert re.search(rf"^{stage}: exit code 0, \d+ of \d+ s$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-2] == "everything passed"


@with_bash
def test_what_a_rehearsal_finds(rehearsal, tmp_path, capsys):
    folder, calls = rehearsal
    prove, again, measure = (calls[call][2] for call in BUDGETS)
    assert [line["status"] for line in prove["smoke"]["operators"]].count("passed") == len(prove["smoke"]["operators"]) > 0
    assert [result["case"] for result in prove["benchmark"]["results"]] == ["16 × 5 fp32", "three tensors"]
    assert again["tests"]["test_certain_rows[cpu]"]["status"] == "passed" and again["sanitizer"]["memcheck"] == {"errors": 0}
    assert len(measure["benchmark"]["results"]) == len(cases.gpu_cases("cpu", tiny=True))
    assert (folder.parent / "cache" / "absgd_fast_gpu" / "triton").is_dir()  # unpacked from what `prove` packed
    paths = [str(next(p for p in calls[call][1] if p.suffix == ".json")) for call in BUDGETS]
    assert gpu_report.main(["merge", str(tmp_path / "all.json"), *paths]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "everything passed"


@with_bash
@pytest.mark.parametrize("end, code, died", [("killed", 0, "exit code 139, in"), ("failed", 3, "exit code 3, after")])
def test_a_crash_is_not_repeated(prepared, tmp_path, end, code, died):
    """A kernel that kills its process or its device is met once: no test of its backend, and a report that names it."""
    folder = tmp_path / "folder"
    shutil.copytree(prepared[0], folder)
    (folder / "tests" / "gpu_smoke.py").write_text(SMOKE.format(end=end, code=code))
    out = tmp_path / "out"
    done = gpu_sh("prove", "--rehearse", out, script=folder / "gpu.sh", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads((out / "prove.json").read_text(encoding="utf-8"))
    assert list(report["calls"]["prove"]) == ["smoke", "triton", "caches"]
    limits = re.findall(r"at most (\d+) s", (out / "prove.log").read_text())
    assert int(limits[1]) <= 70 + 60 and report["tests"] and len(list(out.iterdir())) <= 8
    assert report["failed"][0] == f"smoke: {died} logit_loss (cpu)" and f"DIED: {died} logit_loss (cpu)" in done.stdout


@with_bash
def test_an_operator_that_fails_stops_nothing(prepared, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(prepared[0], folder)
    (folder / "tests" / "gpu_smoke.py").write_text(SMOKE.format(end="failed", code=1))
    done = gpu_sh("prove", "--rehearse", tmp_path / "out", script=folder / "gpu.sh", XDG_CACHE_HOME=str(tmp_path / "cache"))
    report = json.loads((tmp_path / "out" / "prove.json").read_text(encoding="utf-8"))
    assert list(report["calls"]["prove"]) == ["smoke", "cuda", "compile", "triton", "probe", "caches"]
    assert done.returncode == 1 and report["failed"] == ["smoke: 1 operators failed"]


@with_bash
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_call_without_a_gpu(prepared, tmp_path):
    done = gpu_sh("measure", tmp_path / "out", script=prepared[0] / "gpu.sh")
    assert done.returncode == 2 and "no GPU" in done.stderr and list(tmp_path.iterdir()) == []


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
