"""The benchmarks: the oracle stops whoever is wrong, and what is reported says so. No timing is asserted."""

import dataclasses
import json
import math
from functools import partial

import pytest
import torch
from bench_cases import (  # noqa: F401 (fixtures)
    DATA,
    EVERYBODY,
    NEED_MORE,
    case_data,
    cases,
    heads,
    imbalance,
    l2rw,
    looked,
    memory,
    no_compiler,
    one_case,
    peers,
    plain_called_robust,
    ramp,
    ready,
    record,
    refuse,
    replace,
    run,
    same_path,
    tables,
    timing,
    tiny,
    train_loop,
    verdict,
)

import absgd_fast as ab
from absgd_fast import __main__ as cli

# ---- right and wrong results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite, make, name", EVERYBODY)
def test_everybody_is_right(no_compiler, suite, make, name):
    data = make()
    try:
        _, error = ready(peers.PEERS[suite][name], data)
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
        ready(factory, cases.Logits(32, 10))


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.0}, {"momentum": 0.89}, {"nesterov": True}], ids=str)
def test_a_wrong_step_is_stopped(wrong):
    def factory(data):
        params = data.parameters()
        return peers.Peer(torch.optim.SGD(params, **case_data.SGD | wrong).step, lambda _: data.error(params))

    with pytest.raises(peers.LeftOut, match="off by"):
        ready(factory, cases.Tensors([(3, 4), (5,)]))


@pytest.mark.parametrize("wrong", [{"weight_decay": 0.0}, {"momentum": 0.89}, {"mix": 1e-3}, {"init": "first"}], ids=str)
def test_a_wrong_weighted_step_is_stopped(monkeypatch, wrong):
    right = ab.functional.weighted_momentum_step_
    monkeypatch.setattr(ab.functional, "weighted_momentum_step_", lambda *args, **options: right(*args, **options | wrong))
    with pytest.raises(peers.LeftOut, match="off by"):
        ready(peers.PEERS["weighted"]["absgd_fast"], cases.Samples(9, [(3, 4), (5,)]))


@pytest.mark.parametrize("wrong", ["no factor", "a micro-batch by itself"])
def test_a_wrong_deferred_step_is_stopped(wrong):
    def factory(data):
        deferred = wrong == "no factor"
        criterion = ab.ABLoss(lam=case_data.LAM, gamma=case_data.GAMMA, deferred=deferred)
        return peers._micro_batches(data, criterion, (lambda: 1.0 + 0 * criterion.settle()[1]) if deferred else None)

    with pytest.raises(peers.LeftOut, match="off by"):
        ready(factory, cases.MicroBatches(3, 11, 10))


@pytest.mark.parametrize("name", ["absgd_fast", "plain"])
def test_a_wrong_loss_of_a_head_or_a_whole_step_is_stopped(name):
    head, (whole,) = cases.Head(37, 8, 50), DATA["gpu train"]
    with pytest.raises(peers.LeftOut, match="off by"):
        ready(lambda data: heads._head(data, ab.LinearABLoss(lam=2 * case_data.LAM, gamma=case_data.GAMMA)), head)
    factory = peers.PEERS["gpu train"][name]

    def off(data):
        peer = factory(data)
        right = peer.run
        peer.run = lambda: right() * 1.01
        return peer

    with pytest.raises(peers.LeftOut, match="off by"):
        ready(off, whole())


def test_a_wrong_training_is_stopped():
    plain = partial(peers.PEERS["train"]["cross_entropy, SGD fused"], lam=case_data.LAM)  # plain, but said to be robust
    with pytest.raises(peers.LeftOut, match="off by"):
        ready(plain, cases.Training("mlp"))


def test_wrong_and_missing_competitors_are_left_out(monkeypatch, tiny):
    replace(monkeypatch, "loss", "cross_entropy", plain_called_robust)
    replace(monkeypatch, "loss", "torch.compile", refuse)
    result = one_case.compare(run.CASES[0], seconds=0.01)
    assert set(result["peers"]) == {"absgd_fast", "absgd package", "torch.compile, max-autotune"}
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
        ready(peers.PEERS["loss"]["torch.compile"], cases.Logits(8, 5))


def test_the_compiler_is_asked_for_its_best(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    for name in ("torch.compile", "torch.compile, max-autotune"):
        ready(peers.PEERS["loss"][name], cases.Logits(8, 5))
    plain = {"fullgraph": True, "dynamic": False}
    assert asked == [plain, plain | {"mode": "max-autotune"}]


def test_a_head_that_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(heads, "PATIENCE", 0.0)
    with pytest.raises(peers.LeftOut, match="a step takes 0 s, allowed are 0"):
        ready(peers.PEERS["linear"][cases.PLAIN_HEAD], cases.Head(9, 8, 50))
    ready(peers.PEERS["linear"]["absgd_fast"], cases.Head(9, 8, 50))  # ours is always waited for


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="torch 2.13 has it")
def test_every_policy_of_torch_is_a_competitor():
    """Those that torch itself takes; another one is refused by it."""
    for policy in cases.policies():
        torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
    with pytest.raises(ValueError, match="invalid acc_policy"):
        torch.nn.LinearCrossEntropyOptions(acc_policy="best")
    assert {"auto", "accurate", "balanced", "compact"} <= set(cases.policies())
    assert set(peers.PEERS["linear"]) == {"absgd_fast", cases.PLAIN_HEAD, *map(cases.chunked, cases.policies())}


# ---- the cases -------------------------------------------------------------------------------------------------------


def test_tensor_lists():
    sizes = {
        name: (len(shapes), sum(map(math.prod, shapes)))
        for name, shapes in {"resnet32": cases.resnet32(), "resnet50": cases.resnet50()}.items()
    }
    assert sizes == {"resnet32": (94, 464_144), "resnet50": (161, 25_557_032)}
    assert (len(cases.resnet152()), sum(map(math.prod, cases.resnet152()))) == (467, 60_192_808)


def test_every_target_has_its_competitor():
    for case in [*cases.CASES, *cases.gpu_cases()]:
        assert set(case.targets) <= set(memory.MEASURES if case.suite == "memory" else peers.PEERS[case.suite])


def test_what_a_linear_head_has_to_reach():
    found = [case for case in run.CASES if case.suite == "linear"]
    sizes = ["512 × 256 × 8000", "2048 × 512 × 8000", "1024 × 512 × 32000", "2048 × 512 × 32000"]
    assert [case.name for case in found] == [f"{size} {dtype}" for size in sizes for dtype in ("fp32", "bf16")]
    for case in found:
        assert case.targets == {cases.PLAIN_HEAD: 0.7} | {cases.chunked(policy): 0.5 for policy in cases.policies()}
        assert case.memory == {cases.PLAIN_HEAD: 0.7}
    assert "linear" in run.SUITES["all"]


# ---- how it is timed -------------------------------------------------------------------------------------------------


def test_rounds_interleave_everybody(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", (4, 4))
    monkeypatch.setattr(timing, "BLOCK", 1.0)  # one call per block
    calls = []
    times = timing.interleave({name: partial(calls.append, name) for name in "abc"}, seconds=0.01)
    assert [len(times[name]) for name in "abc"] == [4, 4, 4]
    assert "".join(calls).endswith("abcbcacababc")  # each begins in its turn


def test_ratios_are_taken_round_by_round(monkeypatch, tiny):
    """A machine that gets slower during the run changes the times but not the ratio."""
    monkeypatch.setattr(
        one_case,
        "interleave",
        lambda runs, seconds, **options: {
            name: [t * (1 if name == "absgd_fast" else 2) for t in (1.0, 10.0, 100.0)] for name in runs
        },
    )
    peer = one_case.compare(next(case for case in run.CASES if case.suite == "step"), seconds=1)["peers"]["SGD fused"]
    assert peer["ratio"] == {"median": 0.5, "q1": 0.5, "q3": 0.5}
    assert peer["us"] == {"median": 20.0, "q1": 11.0, "q3": 110.0}


def test_the_least_number_of_rounds(monkeypatch):
    """A case can ask for fewer rounds than the others make at least; the time decides between the two limits."""
    monkeypatch.setattr(timing, "BLOCK", 1.0)
    times = timing.interleave({"a": lambda: None}, seconds=0.0, least=2)
    assert len(times["a"]) == 2
    assert len(timing.interleave({"a": lambda: None}, seconds=0.0)["a"]) == timing.ROUNDS[0]


def test_a_long_call_is_not_repeated_to_count_calls():
    for ns, looks in ((100 * timing.BLOCK + 1, 1), (1.0, 3)):
        seen = []
        calls = timing._calls(lambda ns=ns, seen=seen: seen.append(ns) or ns)
        assert len(seen) == looks and calls == (1 if looks == 1 else timing.BLOCK)


def test_peak_memory_is_compared(monkeypatch, tiny):
    """A competitor that allocates four times as much as ours; one whose memory nobody can tell has no ratio."""
    peaks = iter([1000, 4000, 500, None, 1000, 1000])
    monkeypatch.setattr(one_case, "peak_bytes", lambda call: next(peaks))
    case = dataclasses.replace(next(case for case in run.CASES if case.suite == "linear"), memory={cases.PLAIN_HEAD: 0.2})
    result = one_case.compare(case, 0.01)
    found = [peer.get("memory") for peer in result["peers"].values()]
    assert found[:4] == [
        None,
        {"ratio": 0.25, "target": 0.2, "met": False},
        {"ratio": 2.0, "target": None, "met": None},
        {"ratio": None, "target": None, "met": None},
    ]
    assert f"missed: linear 9 × 8 × 50, memory of {cases.PLAIN_HEAD}" in tables.summary([result])


def test_a_leak_shows():
    kept = []
    leaking = peers.Peer(lambda: kept.append(torch.ones(1000)), None)
    measured = memory.attempt(memory.growth, leaking)
    assert measured is None or 4000 <= measured <= 6000


# ---- what is reported ------------------------------------------------------------------------------------------------


def test_the_report(tiny, tmp_path, capsys):
    before = torch.get_num_threads()
    out = tmp_path / "new" / "bench.json"
    assert cli.main(["bench", "--out", str(out), "--threads", "1", "--seconds", "0.01"]) == 0
    assert torch.get_num_threads() == before
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]
    report = json.loads(out.read_text(encoding="utf-8"))
    assert " ".join(report) == "date hardware versions compiler threads load_at_start seconds_per_case quiet results"
    assert report["hardware"].keys() == {"cpu", "cores", "backend", "instruction_set"} and report["threads"] == 1
    assert report["versions"].keys() == {"python", "torch", "absgd_fast", "absgd"}
    loss, target, family, memory, step, clip, rules, weighted, linear, train, text = report["results"]
    for result in (loss, target, family, step, clip, rules, weighted, linear, train, text):
        assert result.keys() == {"suite", "case", "rounds", "tolerance", "peers", "absent"}
        assert result["rounds"] == 3 and result["absent"] == {}
        assert result["peers"].keys() == peers.PEERS[result["suite"]].keys()
        for name, peer in result["peers"].items():
            assert 0 < peer["us"]["q1"] <= peer["us"]["median"] <= peer["us"]["q3"]
            assert 0 <= peer["error"] <= result["tolerance"]
            assert name == "absgd_fast" or peer["ratio"]["q1"] <= peer["ratio"]["median"] <= peer["ratio"]["q3"]
    others = {name: peer for name, peer in loss["peers"].items() if name != "absgd_fast"}
    assert {name: peer["target"] for name, peer in others.items()} == {
        "cross_entropy": 1e9,
        "absgd package": 0.0,
        "torch.compile": None,
        "torch.compile, max-autotune": None,
    }
    assert all(peer["spread"] == verdict.spread(peer["ratio"]) for peer in others.values())
    plain = linear["peers"][cases.PLAIN_HEAD]
    if plain["peak_bytes"] is None:
        assert plain["memory"] == {"ratio": None, "target": 1e9, "met": None}
    else:  # a call this small may find all its memory in use already
        assert plain["peak_bytes"] >= 0 and plain["memory"]["target"] == 1e9
    assert linear["peers"][cases.chunked("auto")]["memory"]["target"] is None
    assert memory["targets"].keys() == memory["met"].keys() == memory["peers"]["absgd_fast"].keys()
    printed = capsys.readouterr().out
    for name, reached in (("cross_entropy", True), ("absgd package", False)):  # three rounds may be too noisy for a verdict
        met = others[name]["met"]
        assert met is (None if others[name]["spread"] > verdict.MOST_SPREAD else reached)
        assert (f"missed: loss 8 × 5, {name}" in printed) is (met is False)
        assert (f"too noisy: loss 8 × 5, {name}" in printed) is (met is None)
    assert "targets met" in printed and f"written: {out}" in printed


def test_a_busy_machine_is_mentioned(monkeypatch, tiny, capsys):
    for still, expected in ((True, "The machine is quiet: "), (False, "The machine is not quiet, so ratios may differ")):
        monkeypatch.setattr(run.quiet, "look", lambda still=still: looked(still))
        assert run.main(["--suite", "step"]) == 0
        assert capsys.readouterr().out.startswith(expected)


def test_a_lost_case_is_shown(monkeypatch, tiny, capsys):
    slow = {name: [float(name == "absgd_fast") + 1] * 3 for name in {**peers.PEERS["train"], **peers.PEERS["language model"]}}
    monkeypatch.setattr(one_case, "interleave", lambda runs, seconds, **options: slow)
    assert run.main(["--suite", "train"]) == 0
    printed = capsys.readouterr().out
    assert "slower: train mlp, absgd package" in printed and "2.00 (2.00–2.00)" in printed


def test_an_old_report_outlives_a_failing_write(tmp_path, monkeypatch):
    path = tmp_path / "bench.json"
    path.write_text("old")
    monkeypatch.setattr(record.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        record.write({}, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (["--suite", "everything"], ["'everything'", "loss", "step", "train", "all"]),
        (["--threads", "0"], ["'0'", "whole number > 0"]),
        (["--threads", "two"], ["'two'", "whole number > 0"]),
        (["--seconds", "nan"], ["'nan'", "number > 0"]),
        (["--seconds", "-1"], ["'-1'", "number > 0"]),
        (["--out", "."], ["'.'", "a file that can be written"]),
        (["--out", "file/x.json"], ["'file/x.json'", "a file that can be written"]),
        (["--sweet", "loss"], ["--sweet"]),
    ],
    ids=str,
)
def test_bad_arguments(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert cli.main(["bench", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("absgd-fast bench: ")
    assert all(word in err for word in words), err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- benchmarks of one question ----------------------------------------------------------------------------------------


@pytest.mark.deep
def test_steps_of_l2rw_are_measured(threads):
    """The smallest batch with a clean sample; the weights are looked at in float64, and memory where the system tells."""
    threads(1)
    found = l2rw.measure(True, 8, 2)
    assert found["clean_rows"] == 1 and set(found["methods"]) == set(l2rw.WAYS)
    for name, m in found["methods"].items():
        assert m["ratio"]["q1"] <= m["ratio"]["median"] <= m["ratio"]["q3"] and m["memory"] > 0
        assert m["distance"] < (0.2 if name == "finite_difference" else 1e-3), name
    assert found["methods"]["jvp"]["most"] == 2.2 and found["methods"]["unrolled"]["most"] is None


@pytest.mark.deep
def test_the_loop_of_train_is_measured(threads, tmp_path, monkeypatch, capsys):
    threads(1)
    config = dataclasses.replace(train_loop.EPOCH, dataset="digits", model="linear", per_class=20, batch_size=16)
    found = train_loop.measure(config, rounds=2, files=3, size=32)
    assert found["epoch"]["ratio"].keys() == found["epoch"]["most"].keys() == {"sgd", "absgd"}
    assert all(0 < ratio["q1"] <= ratio["median"] <= ratio["q3"] for ratio in found["epoch"]["ratio"].values())
    assert found["folder"]["images_per_second"].keys() == {"folder", "tensor", "reading"}
    monkeypatch.setattr(train_loop, "measure", lambda rounds: found)
    assert train_loop.main(["--out", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["folder"] == found["folder"]
    out = capsys.readouterr().out
    assert out.count("of the plain loop's time") == 2 and "of the throughput of a tensor; folder" in out


def test_imbalance_is_measured(tmp_path, capsys):
    assert imbalance.main(["--ratios", "20", "--seeds", "2", "--epochs", "1", "--out", str(tmp_path / "out.json")]) == 0
    (row,) = json.loads((tmp_path / "out.json").read_text())["imbalance"]
    assert row["ratio"] == 20 and list(row["errors"]) == list(imbalance.METHODS) and row["config"]["clean"] == 5
    assert all(len(e) == 2 and all(0 <= x <= 100 for x in e) for e in row["errors"].values())
    assert "Test error" in capsys.readouterr().out


def test_ramps_are_measured(tmp_path, capsys):
    """In a row for plain SGD, and one for each way and lambda; the ways differ by when lambda comes in."""
    options = ["--noise", "0.4", "--lam=-1,-0.5", "--epochs", "4", "--seeds", "2", "--model", "linear"]
    assert ramp.main([*options, "--out", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())["ramp"]
    assert [(row["way"], row["lam"]) for row in found] == [
        ("sgd", None),
        *((way, lam) for lam in (-1, -0.5) for way in ramp.WAYS),
    ]
    assert all(len(row["accuracies"]) == 2 and row["config"]["noise_rate"] == 0.4 for row in found)
    assert len({tuple(row["accuracies"]) for row in found}) > 3
    assert "4 epochs, 0.4 wrong" in capsys.readouterr().out
