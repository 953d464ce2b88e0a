"""The benchmarks of a GPU, as far as a CPU can try them: clocks, graphs, profiles and memory are pretended."""

import contextlib
import json
import math
import re
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from bench_cases import (  # noqa: F401 (fixtures)
    CPU,
    NEED_MORE,
    case_data,
    cases,
    device,
    heads,
    liger,
    looked,
    models,
    no_compiler,
    on_gpu,
    one_case,
    peers,
    plain_called_robust,
    ready,
    replace,
    run,
    same_path,
    timing,
)

import absgd_fast as ab

# ---- on a GPU: what of it a CPU can try ------------------------------------------------------------------------------


def gpu_case(suite, name, **options):
    return next(case for case in cases.gpu_cases(**options) if (case.suite, case.name) == (suite, name))


def test_what_is_timed_on_a_gpu():
    """What memory bounds comes first, the one-block kernel last; a share of the copy depends on the card."""
    found = cases.gpu_cases()
    large, small = (
        [f"{rows} × {classes} {dtype}" for rows, classes in shapes for dtype in ("bf16", "fp32")]
        for shapes in (cases.SHAPES, cases.SMALL_SHAPES)
    )
    names = [case.name for case in found if case.suite == "gpu loss"]
    assert names == [*large, "16384 × 10 fp32", "2 × 8142 fp32", *small] and names[0] == "8192 × 32000 bf16"
    order = [case.name for case in found]
    with_figures = {f"gpu {suite}" for suite in ["deferred", "step", "weighted", "linear", "train"]}
    others = [order.index(case.name) for case in found if case.suite in with_figures]
    assert max(others) < order.index("256 × 365 bf16")  # a shape among others waits for what has figures of its own
    suites = list(dict.fromkeys(case.suite for case in found))
    assert suites == [f"gpu {name}" for name in ["loss", "deferred", "step", "weighted", "linear", "train", "rules", "limit"]]
    assert [case.name for case in cases.gpu_probe(found)] == [
        "8192 × 32000 bf16",
        "16384 × 10 fp32",
        "2 × 8142 fp32",
        "ResNet-50, 161 tensors",
        "128 × 10 fp32",
    ]
    for case in cases.gpu_probe(found):  # cold, a compiler takes longer than the probe has
        assert not set(one_case.taking_part(case)) & {*on_gpu.COMPILING} and set(case.targets) <= set(one_case.taking_part(case))
    assert set(one_case.taking_part(gpu_case("gpu step", "ResNet-50, 161 tensors"))) == peers.PEERS["gpu step"].keys()


def test_the_figures_of_a_gpu():
    small, large = gpu_case("gpu loss", "128 × 100 bf16"), gpu_case("gpu loss", "8192 × 32000 bf16")
    launches = {"forward launches": (1, 1), "backward launches": (0, 1)}
    assert small.targets == {"absgd package": 0.25, "Liger": 1.5, "torch.compile": 0.7} and small.bounds == launches
    assert large.targets == {"absgd package": 0.4, "Liger": 1.5}  # three passes; Liger has two
    for name in ("512 × 8142 bf16", "16384 × 10 fp32"):
        assert gpu_case("gpu loss", name).targets["Liger"] == 1.5
    assert gpu_case("gpu loss", "128 × 10 fp32").targets["Liger"] == 1.0  # one block, one pass
    for name, card, least in (
        ("8192 × 32000 bf16", "NVIDIA H200", 0.85),
        ("8192 × 32000 fp32", "NVIDIA H100 80GB HBM3", 0.88),
        ("8192 × 128256 bf16", "NVIDIA H200", 0.90),
    ):
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
    operators = types.SimpleNamespace(backend="cuda", backward_mode=lambda logits: 0, in_place=False, has_rules=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers.ops, "serving", lambda device, backend: operators)
        patch.setattr(peers, "_loss", lambda data, criterion: criterion._served[1])
        other = peers._from_statistics(cases.Logits(8, 5))
    assert other.backward_mode(None) == peers.ops.WITH_STATS and operators.backward_mode(None) == 0


def test_copies_are_taken_in_turn():
    data = cases.Logits(32, 10, copies=3)
    assert len({x.data_ptr() for x in data.copies}) == 3 and data.moved == 3 * 32 * 10 * 4
    peer, _ = ready(peers.PEERS["gpu loss"]["cross_entropy"], data)
    data.copies[1].zero_()
    seen = [round(peer.run().item(), 4) for _ in range(6)]
    assert seen.count(round(math.log(10), 4)) == 2  # each third time
    assert len(cases.Logits(64, 300, copies=None).copies) == 1  # stays in the cache
    data = cases.Logits(8, 5)
    data.bytes = case_data.IN_CACHE
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
    peer, error = ready(peers.PEERS["gpu loss"]["Liger"], data)
    assert error < 1e-6
    peer.run()
    assert all(torch.equal(x, before) for x in data.copies)  # the others' numbers


def test_liger_comes_before_what_compiles_longer():
    """It must not be left out because torch.compile has taken the time of all."""
    names = list(peers.PEERS["gpu loss"])
    assert names.index("Liger") < names.index("torch.compile") == len(names) - 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("import sys\nassert sys.modules['peft'] is None\nLigerCrossEntropyLoss = dict", None),
        ("raise RuntimeError('no driver')", "Liger cannot be imported: RuntimeError: no driver"),
        ("import nowhere_at_all", "No module named 'nowhere_at_all': pip install liger-kernel"),
    ],
)
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
                liger.liger_cross_entropy()
        else:
            assert liger.liger_cross_entropy() == {}
        assert "peft" not in sys.modules
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
            del sys.modules[name]


def test_imports_belong_to_nobodys_time(monkeypatch, capsys):
    asked = []

    def load(name):
        asked.append(name)
        raise ImportError(f"no {name}")

    monkeypatch.setattr(liger.importlib, "import_module", load)
    liger.import_compilers()
    assert asked == ["liger_kernel.transformers.cross_entropy", "triton", "torch._inductor.compile_fx"]
    assert capsys.readouterr().out.count("no ") == 3


def test_memory_is_measured_without_old_gradients(quick, monkeypatch):
    """They would count as what was there before, and then as room that the call found."""
    case, held, grads = gpu_case("gpu linear", "40 × 8 × 300 fp32", device="cpu", tiny=True), [], []

    def ours(data):
        criterion = ab.LinearABLoss(lam=case_data.LAM, gamma=case_data.GAMMA)

        def seen(hidden, weight, target):
            held[:] = hidden, weight
            return criterion(hidden, weight, target)

        return heads._head(data, seen)

    monkeypatch.setitem(peers.PEERS, "gpu linear", {"absgd_fast": ours})
    monkeypatch.setattr(on_gpu, "peak_allocated", lambda where, call: grads.append([leaf.grad for leaf in held]))
    on_gpu.explore(case, 0.01, False)
    assert grads == [[None, None]] and all(leaf.grad is not None for leaf in held)


def test_tools_on_a_cpu():
    calls = []
    assert device.block_ns(CPU, lambda: calls.append(1), 3) > 0 and len(calls) == 4
    assert len(timing.host_us(CPU, lambda: calls.append(1), calls=2, rounds=3)) == 3
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
    assert len(timing.host_us(where, lambda: done.append("run"), 2, 3)) == 3


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


kernel = partial(profiled_event, kind=torch.autograd.DeviceType.CUDA)


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
    seen += [kernel("add", 1), kernel("add", 90), kernel("void absgd::gpu::a_kernel<float>", 20), kernel("nobody_knows_me", 30)]
    seen += [kernel("Memset (Device)", 21), kernel("[memcpy] dtod", 22), kernel("add", 40)]
    seen += [profiled_event("cudaLaunchKernel", 11)]
    seen += [kernel("Optimizer.step#ABSGD.step", 19, is_user_annotation=True), kernel("a range", 0, is_user_annotation=True)]
    assert device.kernels(where, lambda: None) == ["void absgd::gpu::a_kernel<float>", "nobody_knows_me", "add"]


@pytest.mark.parametrize("names", [[], ["add"], ["add", "a_kernel"]])
def test_a_profiler_that_misses_the_marks_counts_nothing(profile, names):
    where, seen = profile
    seen += [kernel(name, at) for at, name in enumerate(names)]
    with pytest.raises(RuntimeError, match="did not see the marks"):
        device.kernels(where, lambda: None)
    assert on_gpu._launched(where, lambda: None) is None


def test_what_the_host_waited_for(profile):
    where, seen = profile
    event = profiled_event
    seen += [event("absgd_fast: no waiting", 10), event("cudaStreamSynchronize", 12), event("cudaDeviceSynchronize", 99)]
    seen += [event("cudaLaunchKernel", 11), event("cudaMemcpy", 13), event("cudaMemcpyAsync", 14)]
    assert device.waits(where, lambda: None) == ["cudaStreamSynchronize", "cudaMemcpy"]


REHEARSAL = ["--suite", "gpu", "--rehearse", "--seconds", "0.01", "--threads", "1"]


@pytest.fixture
def quick(monkeypatch, no_compiler):
    monkeypatch.setattr(timing, "ROUNDS", (3, 3))
    monkeypatch.setattr(timing, "BLOCK", 1e5)
    monkeypatch.setattr(run.quiet, "look", lambda seconds: looked(True))
    monkeypatch.setattr(on_gpu, "host_us", lambda where, call, *counts: timing.host_us(where, call, 2, 3))


@pytest.mark.deep
def test_the_report_of_a_gpu(quick, tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert run.main([*REHEARSAL, "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert {"gpu", "copy", "results", "figures", "not_measured", "seconds_per_case", "versions", "date", "quiet"} <= report.keys()
    assert {"triton", "liger-kernel", "torch"} <= report["versions"].keys() and report["not_measured"] == []
    suites = [result["suite"] for result in report["results"]]
    assert suites == [
        f"gpu {name}" for name in ["loss", "loss", "deferred", "step", "weighted", "linear", "train", "rules", "limit"]
    ]
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


@pytest.mark.deep
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
    assert run.main([*REHEARSAL, "--limit", "60"], begun=on_gpu.perf_counter() - 61) == 0
    assert "not measured: gpu step: three tensors" in capsys.readouterr().out


def test_a_benchmark_that_is_killed_tells_what_was_to_come(quick):
    report, kept = {"copy": None, "results": [], "figures": [], "not_measured": []}, []
    some = [gpu_case(*place, device="cpu", tiny=True) for place in (("gpu step", "three tensors"), ("gpu weighted", "8 × 87"))]
    on_gpu.measure_gpu(report, some, CPU, 0.01, math.inf, lambda: kept.append([*report["not_measured"]]))
    first, second = "gpu step: three tensors", "gpu weighted: 8 × 87"
    assert kept == [[first, second], [second], [], []]


def test_a_call_that_cannot_be_captured(quick, monkeypatch):
    def captured(device, run):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(on_gpu, "captured", captured)
    result = on_gpu.explore(gpu_case("gpu step", "three tensors", device="cpu", tiny=True), 0.01, True)
    assert "not permitted" in result["peers"]["absgd_fast"]["graph_failed"] and "graph_us" not in result["peers"]["SGD fused"]


def test_a_case_is_kept_before_the_memory_is_emptied(quick, monkeypatch, capsys):
    """The allocator of a process whose capture failed raises for ever; what was measured is on the disk by then."""
    order = []

    def broken():
        order.append("empty")
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    on_gpu._empty(types.SimpleNamespace(type="cuda"))
    assert "captures_underway" in capsys.readouterr().out
    monkeypatch.setattr(on_gpu, "_empty", lambda where: order.append("empty"))
    report = {"copy": None, "results": [], "figures": [], "not_measured": []}
    case = gpu_case("gpu step", "three tensors", device="cpu", tiny=True)
    assert on_gpu.measure_gpu(report, [case], CPU, 0.01, math.inf, lambda: order.append(len(report["results"])))
    assert order == ["empty", 0, 1, "empty", 1]


def test_a_probe_is_a_few_of_the_cases(quick, tmp_path):
    assert run.main([*REHEARSAL, "--suite", "gpu-probe", "--out", str(tmp_path / "probe.json")]) == 0
    results = json.loads((tmp_path / "probe.json").read_text(encoding="utf-8"))["results"]
    assert [result["suite"] for result in results] == ["gpu loss", "gpu step"]
    assert [result["case"] for result in results] == ["16 × 5 fp32", "three tensors"]


def test_who_is_late_is_left_out(quick, monkeypatch):
    monkeypatch.setattr(on_gpu, "BUDGET", 0.0)
    case = gpu_case("gpu step", "three tensors", device="cpu", tiny=True)
    with pytest.raises(peers.LeftOut, match="absgd_fast: no time was left"):
        on_gpu.explore(case, 0.01, True)
    right = ready
    monkeypatch.setattr(on_gpu, "BUDGET", 1e9)
    monkeypatch.setattr(
        on_gpu, "ready", lambda *args: (right(*args), monkeypatch.setattr(on_gpu, "perf_counter", lambda: 2e9))[0]
    )
    assert set(on_gpu.explore(case, 0.01, True)["peers"]) == {"absgd_fast"}


def test_a_case_whose_model_is_not_installed(quick, tmp_path):
    """torchvision has the ResNet-50 of whole steps; without it the case is not measured, and nothing is wrong."""

    def data():
        raise ModuleNotFoundError("No module named 'torchvision'")

    report = {"copy": None, "results": [], "figures": [], "not_measured": []}
    case = cases.Case("gpu train", "a ResNet", data)
    assert on_gpu.measure_gpu(report, [case], CPU, 0.01, math.inf, lambda: None)
    assert report["not_measured"] == ["gpu train: a ResNet: ModuleNotFoundError: No module named 'torchvision'"]


def test_preparing_runs_what_compiles(monkeypatch, capsys):
    ran = []
    for suite in ("gpu loss", "gpu step"):
        for name in {*on_gpu.COMPILING} & peers.PEERS[suite].keys():
            replace(monkeypatch, suite, name, lambda data, name=name: peers.Peer(lambda: ran.append(name), None))
    assert run.main(["--suite", "gpu", "--rehearse", "--prepare"]) == 0
    assert sorted(ran) == ["Liger"] * 2 + ["absgd_fast, triton"] * 3 + ["torch.compile"] * 2
    assert "gpu weighted: 8 × 87: absgd_fast, triton: LeftOut" in capsys.readouterr().out


def test_preparing_in_processes(monkeypatch):
    """A process for each case; where the one in question needs no compiler, nothing goes wrong."""
    number = next(k for k, case in enumerate(cases.gpu_cases("cpu", tiny=True)) if case.suite == "gpu train")
    # which the processes inherit: benchmarks are no part of the package
    monkeypatch.syspath_prepend(Path(run.__file__).parents[1])
    monkeypatch.setattr(on_gpu, "range", lambda count: [number], raising=False)
    assert on_gpu.prepare(1, "gpu", CPU, True, 2) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit) as leaving:
        run.main(["--suite", "gpu"])
    assert leaving.value.code == 2 and "needs a CUDA GPU" in capsys.readouterr().err
