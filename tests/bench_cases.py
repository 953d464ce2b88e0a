"""What the tests of the benchmarks share: small data of every kind, and a run of one small case each."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from absgd_fast import __main__ as cli

with pytest.MonkeyPatch.context() as patch:  # benchmarks are no part of the package
    patch.syspath_prepend(Path(cli.__file__).resolve().parents[1])
    from benchmarks import (  # noqa: F401
        case_data,
        cases,
        changes,
        choosing_lambda,
        device,
        endurance,
        evidence,
        gpu_folder,
        gpu_report,
        growth,
        growth_fit,
        growth_plot,
        heads,
        imbalance,
        l2rw,
        liger,
        memory,
        models,
        on_gpu,
        one_case,
        peers,
        performance_plot,
        quiet,
        ramp,
        record,
        run,
        tables,
        timing,
        train_loop,
        verdict,
    )
    from benchmarks.peer import ready  # noqa: F401

CPU = torch.device("cpu")
DATA = {
    "loss": [partial(cases.Logits, 32, 10), partial(cases.Logits, 32, 10, torch.bfloat16)],
    "target": [partial(cases.Logits, 32, 10)],
    "family": [partial(cases.Logits, 32, 10, loss=name) for name in cases.LOSSES if name != "cross-entropy"],
    "step": [partial(cases.Tensors, [(3, 4), (5,)])],
    "clip": [partial(cases.Clipped, [(3, 4), (5,)])],
    "rules": [partial(cases.Tensors, [(3, 4), (5,)], rule=rule) for rule in cases.RULES],
    "weighted": [partial(cases.Samples, 9, [(3, 4), (5,)])],
    "train": [partial(cases.Training, "mlp"), partial(cases.Training, "cnn")],
    "language model": [partial(cases.LanguageModel, 50, 6, 8, 2, 2, 3)],
    "gpu loss": [partial(cases.Logits, 32, 10, dtype, copies=2) for dtype in (torch.float32, torch.bfloat16)],
    "gpu step": [partial(cases.Tensors, [(3, 4), (5,)])],
    "gpu rules": [partial(cases.Tensors, [(3, 4), (5,)], rule="AdamW")],
    "gpu weighted": [partial(cases.Samples, 9, [(3, 4), (5,)])],
    "gpu deferred": [partial(cases.MicroBatches, 3, 11, 10, dtype) for dtype in (torch.float32, torch.bfloat16)],
    "linear": [partial(cases.Head, 37, 8, 50, dtype) for dtype in (torch.float32, torch.bfloat16)],
    "gpu linear": [partial(cases.Head, 37, 8, 50, dtype) for dtype in (torch.float32, torch.bfloat16)],
    "gpu train": [case.data for case in cases.gpu_cases("cpu", tiny=True) if case.suite == "gpu train"],
}
NEED_MORE = {"absgd_fast, triton", "Liger"}  # than a CPU has, or tests install
if not hasattr(torch.nn.functional, "linear_cross_entropy"):
    NEED_MORE |= {"torch, chunked", *map(cases.chunked, cases.policies())}
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
        cases.Case("target", "8 × 5", partial(cases.Logits, 8, 5), {"a fixed lambda": 1e9}),
        cases.Case("family", "VS, 8 × 5", partial(cases.Logits, 8, 5, loss="VS"), {"our cross-entropy": 1e9}),
        cases.Case("memory", "8 × 5", partial(cases.Logits, 8, 5), {"growth": 1e9, "peak": 1e9, "retained": -1e9}),
        cases.Case("step", "two tensors", partial(cases.Tensors, [(3, 4), (5,)]), {"SGD fused": 1e9}),
        cases.Case("clip", "two tensors", partial(cases.Clipped, [(3, 4), (5,)]), {"our step without clipping": 1e9}),
        cases.Case("rules", "AdamW", partial(cases.Tensors, [(3, 4), (5,)], rule="AdamW"), {"torch's fastest": 1e9}),
        cases.Case("weighted", "9 × 17", partial(cases.Samples, 9, [(3, 4), (5,)]), {cases.COPY: 1e9}),
        cases.Case(
            "linear", "9 × 8 × 50", partial(cases.Head, 9, 8, 50), {cases.PLAIN_HEAD: 1e9}, memory={cases.PLAIN_HEAD: 1e9}
        ),
        cases.Case("train", "mlp", partial(cases.Training, "mlp")),
        cases.Case("language model", "2 layers of 8", partial(cases.LanguageModel, 50, 6, 8, 2, 2, 3)),
    ]
    for module, name, value in (
        (run, "CASES", small),
        (timing, "ROUNDS", (3, 3)),
        (timing, "BLOCK", 1e5),
        (memory, "GROWTH_STEPS", 10),
        (run.quiet, "look", lambda seconds=0: looked(True)),
    ):
        monkeypatch.setattr(module, name, value)


def looked(still):
    """What benchmarks/quiet.py finds on a machine that is quiet, or is not."""
    return {"seconds": 1.0, "spread": 0.01 if still else 0.2, "load": 0.1, "steal": 0.0, "quiet": still, "limits": quiet.LIMITS}


def replace(monkeypatch, suite, name, factory):
    monkeypatch.setitem(peers.PEERS[suite], name, factory)


def plain_called_robust(data):
    return peers._loss(data, torch.nn.functional.cross_entropy)


def refuse(data):
    raise peers.LeftOut("it is not there")


GPU_SH = Path(run.__file__).with_name("gpu.sh")
