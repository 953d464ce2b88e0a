"""Device, precision and memory format of a training, and the processes of torchrun (this file is the program of each)."""

import contextlib
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from two_processes import needs_gloo, torchrun

from absgd_fast.experiments.models import make_model
from absgd_fast.experiments.placing import Placing, Processes


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n) makes torch say that there are n GPUs."""

    def there_are(n):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    there_are(0)
    return there_are


# ------------------------------------------------------------------------------------------------ device


@pytest.mark.parametrize(
    "name, n, local_rank, device",
    [
        ("auto", 0, None, "cpu"),
        ("auto", 0, 1, "cpu"),
        ("auto", 2, None, "cuda:0"),
        ("auto", 2, 1, "cuda:1"),
        ("cpu", 2, 1, "cpu"),
        ("cuda", 2, None, "cuda:0"),
        ("cuda", 2, 1, "cuda:1"),
        ("cuda:1", 2, 0, "cuda:1"),
    ],
)
def test_device(name, n, local_rank, device, gpus, monkeypatch):
    gpus(n)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    placing = Placing(name)
    placing.check()
    assert placing.device == torch.device(device)
    assert (placing.device.index is None) == (device == "cpu")


@pytest.mark.parametrize(
    "options, n, words",
    [
        ({"device": "tpu"}, 0, "^unknown device 'tpu'; use one of auto, cpu, cuda, or cuda:1"),
        ({"device": "cuda:"}, 1, "^unknown device 'cuda:'"),
        ({"device": "cpu:0"}, 0, "^unknown device 'cpu:0'"),
        ({"device": 1}, 0, "^unknown device 1;"),
        ({"device": "cuda"}, 0, "^device: got cuda, but torch .* finds no CUDA device here; use auto or cpu, or install"),
        ({"device": "cuda:1"}, 0, "^device: got cuda:1, but torch .* finds no CUDA device"),
        (
            {"device": "cuda:2"},
            2,
            "^device: got cuda:2, which is cuda:2 .* expected a number below 2, the number of CUDA devices",
        ),
        ({"amp": "fp8"}, 1, "^unknown amp 'fp8'; use one of none, bf16, fp16$"),
        ({"device": "cpu", "amp": "fp16"}, 1, "^amp: got fp16 with the device cpu, expected none or bf16 there"),
        ({"amp": "fp16"}, 0, "^amp: got fp16 with the device auto, which is the CPU here, expected none or bf16"),
    ],
)
def test_refused(options, n, words, gpus):
    gpus(n)
    placing = Placing(**options)
    with pytest.raises(ValueError, match=words) as error:
        placing.check()
    assert "\n" not in str(error.value)


def test_more_processes_than_gpus(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="got auto, which is cuda:2 in this process, .* start at most one process for each"):
        Placing().check()


@pytest.mark.parametrize(
    "options, n",
    [({"amp": "bf16"}, 0), ({"amp": "fp16"}, 1), ({"device": "cuda:1", "amp": "fp16"}, 2), ({"channels_last": True}, 0)],
)
def test_allowed(options, n, gpus):
    gpus(n)
    Placing(**options).check()


# ------------------------------------------------------------------------------------------------ memory


def last(x):
    """Whether a 4-d tensor is stored with the channels last, and not the other way too."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_memory_format_of_images(dtype):
    x = torch.arange(2 * 3 * 4 * 5, device="cpu").view(2, 3, 4, 5).to(dtype)
    for wanted in (False, True):
        moved = Placing("cpu", channels_last=wanted).images(x)
        assert last(moved) == wanted and moved.dtype == dtype and torch.equal(moved, x)
    rows = x.flatten(1)
    assert Placing("cpu", channels_last=True).images(rows) is rows


@pytest.mark.parametrize("name", ["linear", "mlp", "cnn", "preact"])
def test_memory_format_of_models(name):
    """It moves the weights of convolutions, changes no value, and leaves linear models as they are."""
    shape, placing = (3, 8, 8), Placing("cpu", channels_last=True)
    plain, model = (make_model(name, shape, 10, 0).eval() for _ in range(2))
    wanted = [(p, p.stride()) for p in model.parameters()]
    assert placing.model(model) is model
    assert all(p is q for p, (q, _) in zip(model.parameters(), wanted, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    convolutions = [p for p in model.parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert all(map(last, convolutions)) and (bool(convolutions) == (name in ("cnn", "preact")))
    x = torch.rand(4, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    got, expected = model(placing.images(x)), plain(x)
    if convolutions:
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(got, expected) and all(p.stride() == stride for p, stride in wanted)
    before = [p.stride() for p in plain.parameters()]
    assert Placing("cpu").model(plain) is plain and [p.stride() for p in plain.parameters()] == before


class Recorder:
    """A batch of images, or a model, that notes what to() was called with."""

    def __init__(self, calls):
        self.calls = calls

    def dim(self):
        return 4

    def to(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self


def test_copies_overlap_on_their_way_to_a_gpu_only(gpus):
    gpus(1)
    for device, later in (("cpu", False), ("cuda", True)):
        placing, calls = Placing(device), []
        placing.images(Recorder(calls))
        placing.model(Recorder(calls))
        assert calls == [((placing.device,), {"non_blocking": later}), ((placing.device,), {})]


def test_wait(gpus, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    gpus(2)
    Placing("cpu").wait()
    assert waited == []
    Placing("cuda:1").wait()
    assert waited == [torch.device("cuda:1")]


# ------------------------------------------------------------------------------------------------ precision


def test_autocast():
    model = make_model("linear", (1, 8, 8), 10, 0)
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    exact = model(x)
    for amp, dtype in (("none", torch.float32), ("bf16", torch.bfloat16)):
        with Placing("cpu", amp).autocast():
            logits = model(x)
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), exact, rtol=0, atol=0 if amp == "none" else 0.02)
        assert torch.equal(logits.float(), exact) == (amp == "none")
    logits.float().sum().backward()
    assert model[-1].weight.grad.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_is_that_of_the_device(gpus, monkeypatch):
    gpus(1)
    called = []
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: called.append((args, kwargs)) or contextlib.nullcontext())
    for amp in ("none", "bf16", "fp16"):
        with Placing("cuda", amp).autocast():
            pass
    assert called == [(("cuda",), {"dtype": torch.bfloat16}), (("cuda",), {"dtype": torch.float16})]


def test_scaler():
    """For fp16 alone. (The CPU stands in for CUDA: check() refuses it, but torch can scale there too.)"""
    assert Placing("cpu", "none").scaler() is None and Placing("cpu", "bf16").scaler() is None
    scaler = Placing("cpu", "fp16").scaler(init_scale=8.0)
    assert scaler.is_enabled() and not Placing("cpu", "fp16").scaler(enabled=False).is_enabled()
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float32, device="cpu"))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler.scale(weight.sum()).backward()
    assert weight.grad.item() == 8
    scaler.step(optimizer)
    assert weight.item() == 0.5


def test_scaler_is_that_of_the_device(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, **options: (device, options))
    assert Placing("cuda:0", "fp16").scaler(growth_interval=5) == ("cuda", {"growth_interval": 5})


# ------------------------------------------------------------------------------------------------ processes


def test_one_process(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    processes, model, batch = Processes(torch.device("cpu")), nn.Linear(2, 3), torch.tensor([4, 1, 7], device="cpu")
    assert (processes.rank, processes.world, processes.main) == (0, 1, True)
    assert processes.wrap(model) is model and torch.equal(processes.part(batch), batch)
    assert not dist.is_initialized()
    processes.close()


@pytest.mark.parametrize("n, share", [(0, 0), (2, 0), (3, 1), (11, 3), (12, 4)])
def test_parts(n, share, monkeypatch):
    """Those of three processes have one length, and together they are the batch without the rest of the division."""
    processes, parts = Processes(torch.device("cpu")), []
    monkeypatch.setattr(processes, "world", 3)
    batch = torch.arange(100, 100 + n, device="cpu").flip(0)
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", rank)
        parts.append(processes.part(batch))
    assert [len(part) for part in parts] == [share] * 3
    assert torch.cat(parts).tolist() == batch.tolist()[: 3 * share]


def test_a_gpu_of_another_process(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="^device: got cuda:1 in the process of local rank 0; use device cuda or auto, .*own$"):
        Processes(torch.device("cuda", 1))


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda:1", "nccl")])
def test_how_the_processes_meet(device, backend, gpus, monkeypatch):
    """NCCL for CUDA, after this process has chosen its GPU; the wrapper is told the GPU."""
    gpus(2)
    calls, running = [], []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: calls.append(str(d)))
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(running))
    monkeypatch.setattr(dist, "init_process_group", lambda b: running.append(b) or calls.append(b))
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.append("end"))
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda model, device_ids: device_ids)
    processes = Processes(torch.device(device))
    assert calls == ([device] if backend == "nccl" else []) + [backend]
    assert (processes.rank, processes.world, processes.main) == (1, 2, False)
    assert processes.wrap(nn.Linear(1, 1)) == ([torch.device(device)] if backend == "nccl" else None)
    processes.close()
    processes.close()
    assert calls[-2:] == [backend, "end"]


@needs_gloo
def test_a_group_that_runs_already_is_left_running(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        processes = Processes(torch.device("cpu"))
        assert (processes.rank, processes.world) == (0, 1)
        processes.close()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_an_exception_keeps_no_model_beyond_the_group(monkeypatch):
    """close() in a finally: the frames that the exception has left, and those of its cause, let go of their models before."""
    alive, processes = list[weakref.ref[nn.Module]](), Processes(torch.device("cpu"))
    monkeypatch.setattr(processes, "_started", True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: kept.append([model() is not None for model in alive]))
    kept = list[list[bool]]()

    def fails():
        model = nn.Linear(1, 1)
        alive.append(weakref.ref(model))
        raise RuntimeError("no memory")

    def fails_as_well():
        model = nn.Linear(1, 1)
        alive.append(weakref.ref(model))
        try:
            fails()
        except RuntimeError as error:
            raise ValueError("batch-size: too large") from error

    with pytest.raises(ValueError, match="batch-size"):
        try:
            fails_as_well()
        finally:
            processes.close()
    assert kept == [[False, False]]


def samples():
    """A model, 11 rows of 5 with labels, and a batch of all of them in some order. Every process draws the same."""
    draw = torch.Generator().manual_seed(0)
    model = make_model("linear", (1, 1, 5), 3, seed=0).double()
    x = torch.randn(11, 1, 1, 5, generator=draw, dtype=torch.float64, device="cpu")
    y = torch.randint(3, (11,), generator=draw, device="cpu")
    return model, x, y, torch.randperm(11, generator=draw, device="cpu")


def train_in_a_process(folder):
    """What each process of torchrun does."""
    placing = Placing("cpu")
    placing.check()
    processes = Processes(placing.device)
    model, x, y, batch = samples()
    wrapped, part = processes.wrap(placing.model(model)), processes.part(batch)
    nn.functional.cross_entropy(wrapped(x[part]), y[part]).backward()
    found = {
        "rank": processes.rank,
        "world": processes.world,
        "main": processes.main,
        "part": part,
        "gradients": [p.grad for p in model.parameters()],
        "wrapped": isinstance(wrapped, DistributedDataParallel) and wrapped.module is model,
        "gpu": str(Placing("cuda").device),
        "running": dist.is_initialized(),
    }
    del wrapped  # before the group ends, see close()
    processes.close()
    found["ended"] = not dist.is_initialized()
    torch.save(found, f"{folder}/{processes.rank}.pt")


@needs_gloo
def test_two_processes_of_torchrun(tmp_path):
    done = torchrun([__file__, str(tmp_path)], tmp_path)
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [(f["rank"], f["world"], f["main"], f["gpu"]) for f in found] == [(0, 2, True, "cuda:0"), (1, 2, False, "cuda:1")]
    assert all(f["wrapped"] and f["running"] and f["ended"] for f in found)
    model, x, y, batch = samples()
    parts = [f["part"].tolist() for f in found]
    assert parts == [batch[:5].tolist(), batch[5:10].tolist()]  # disjoint, and all of it but the last
    nn.functional.cross_entropy(model(x[batch[:10]]), y[batch[:10]]).backward()
    for f in found:
        for got, parameter in zip(f["gradients"], model.parameters(), strict=True):
            torch.testing.assert_close(got, parameter.grad, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    train_in_a_process(sys.argv[1])
