"""The cases that are timed, and the figures to reach. A case makes its data (case_data.py) when asked."""

import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from absgd_fast import ops

from . import models
from .case_data import (
    LARGE,
    LOSSES,
    RULES,
    Clipped,
    Head,
    LanguageModel,
    Logits,
    MicroBatches,
    Samples,
    Tensors,
    Training,
    Whole,
    images,
    text,
    torchvision_resnet50,
)


@dataclass(frozen=True, eq=False)
class Case:
    """A case and its figures to reach.

    Args:
        suite, name: the suite, and the name of the case in it.
        data: makes the data of the case.
        targets: {competitor: the largest ratio of our time to its time}. In suite memory: {measure: the largest value}.
        bounds: {measure: (least, most)} of our own values on a GPU (see run.py).
        memory: {competitor: the largest ratio of our peak memory to its own}.
        peers: the names of those in the suite that take part. None means all of them.
        rounds: the least number of rounds, where calls take seconds. None means that of timing.py.
    """

    suite: str
    name: str
    data: Callable
    targets: Mapping[str, float] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    peers: frozenset | None = None
    rounds: int | None = None

    def between(self, peers):
        """The same case with only these competitors."""
        return replace(self, peers=frozenset(peers), targets={name: self.targets[name] for name in self.targets if name in peers})


# ---- tensor lists ----------------------------------------------------------------------------------------------------


def _conv(out, channels, size):
    """A convolution and its batch norm."""
    return [(out, channels, size, size), (out,), (out,)]


def resnet32():
    """ResNet-32 for CIFAR (He et al. 2016; classifier without bias): 94 tensors, 0.46 M numbers."""
    shapes, width = _conv(16, 3, 3), 16
    for out in [16] * 5 + [32] * 5 + [64] * 5:
        shapes += _conv(out, width, 3) + _conv(out, out, 3)
        width = out
    return [*shapes, (10, width)]


def resnet50(blocks=(3, 4, 6, 3)):
    """ResNet-50 for ImageNet: 161 tensors, 25.6 M numbers."""
    shapes, width = _conv(64, 3, 7), 64
    for inner, count in zip((64, 128, 256, 512), blocks):
        for block in range(count):
            shapes += _conv(inner, width, 1) + _conv(inner, inner, 3) + _conv(4 * inner, inner, 1)
            shapes += [] if block else _conv(4 * inner, width, 1)
            width = 4 * inner
    return [*shapes, (1000, width), (1000,)]


def resnet152():
    """ResNet-152 for ImageNet: 467 tensors, 60.2 M numbers."""
    return resnet50((3, 8, 36, 3))


# ---- the cases -------------------------------------------------------------------------------------------------------


COPY = "copy of as many bytes"
PLAIN_HEAD = "matmul + cross_entropy"


def policies():
    """The ways in which torch's chunked loss of a linear head adds up, which torch >= 2.13 has: the values of `acc_policy`."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    return typing.get_args(typing.get_type_hints(options)["acc_policy"]) if options else ("auto",)


def chunked(policy):
    """The name of torch's chunked loss with this policy."""
    return f"torch, chunked: {policy}"


def _size(rows, classes, dtype):
    return f"{rows} × {classes} {'bf16' if dtype == torch.bfloat16 else 'fp32'}"


def _loss(rows, classes, target=None, dtype=torch.float32):
    targets = {} if target is None else {"cross_entropy": target, "absgd package": 0.4}
    return Case("loss", _size(rows, classes, dtype), partial(Logits, rows, classes, dtype), targets)


def _family(name, rows, classes):
    targets = {"our cross-entropy": 1.1, "eager, absgd package": 0.4}
    return Case("family", f"{name}, {_size(rows, classes, torch.float32)}", partial(Logits, rows, classes, loss=name), targets)


def _target(rows, classes):
    return Case("target", _size(rows, classes, torch.float32), partial(Logits, rows, classes), {"a fixed lambda": 1.15})


def _step(name, shapes, fused, default):
    return Case("step", name, partial(Tensors, shapes), {"SGD fused": fused, "SGD default": default})


def _clip(name, shapes, **more):
    return Case("clip", name, partial(Clipped, shapes), {"clip_grad_norm_, SGD fused": 1.0} | more)


def _linear(rows, width, classes, dtype):
    """A head's time, and its peak memory, which the gradients dominate in the chunked forms: so it has no target over them."""
    name = f"{rows} × {width} × {_size(0, classes, dtype).removeprefix('0 × ')}"
    targets = {PLAIN_HEAD: 0.7} | dict.fromkeys(map(chunked, policies()), 0.5)
    return Case("linear", name, partial(Head, rows, width, classes, dtype), targets, memory={PLAIN_HEAD: 0.7}, rounds=5)


def _rule(rule, name, shapes, target):
    return Case("rules", f"{rule}, {name}", partial(Tensors, shapes, rule=rule), {"torch's fastest": target})


CASES = [
    _loss(128, 10, 0.8),
    _loss(128, 100, 0.8),
    _loss(512, 1000, 0.33),
    _loss(512, 8142, 0.22),
    _loss(2048, 32000, 0.15),
    *(_loss(*size, 0.35, torch.bfloat16) for size in ((512, 1000), (512, 8142), (2048, 32000))),
    *(_target(*size) for size in ((128, 10), (512, 1000))),
    *(_family(name, *size) for size in ((512, 1000), (2048, 32000)) for name in LOSSES if name != "cross-entropy"),
    # Tensors of 262 MB: the allocator maps and unmaps each of them, so the resident memory is the memory in use.
    Case("memory", "2048 × 32000 fp32", partial(Logits, 2048, 32000), {"peak": 1.01, "retained": 2.01}),
    Case("memory", "128 × 10 fp32", partial(Logits, 128, 10), {"growth": 1.0}),
    _step("ResNet-32, 94 tensors", resnet32(), 0.25, 0.15),
    _step("ResNet-50, 161 tensors", resnet50(), 0.8, 0.5),
    _step("161 tensors of 4", [(4,)] * 161, 0.18, 0.1),
    _clip("ResNet-32, 94 tensors", resnet32()),
    _clip("ResNet-50, 161 tensors", resnet50(), **{"our step without clipping": 1.5}),
    *(
        _rule(rule, *case)
        for case in (("ResNet-32", resnet32(), 0.3), ("ResNet-50", resnet50(), 1.0), ("161 tensors of 4", [(4,)] * 161, 0.2))
        for rule in RULES
        if rule != "SGD"
    ),
    # 80 % of the bandwidth of a copy: 1.25 times its time
    Case("weighted", "64 × 10⁶", partial(Samples, 64, [(1000, 1000)]), {"torch": 1.0, COPY: 1.25}),
    Case("weighted", "128 × ResNet-32, 94 tensors", partial(Samples, 128, resnet32()), {"torch": 1.0, COPY: 1.25}),
    Case("weighted", "64 × 650, a linear head", partial(Samples, 64, [(10, 64), (10,)]), {"torch": 1.0}),
    *(
        _linear(*size, dtype)
        for size in ((512, 256, 8000), (2048, 512, 8000), (1024, 512, 32000), (2048, 512, 32000))
        for dtype in (torch.float32, torch.bfloat16)
    ),
    Case("train", "mlp 64-128-128-10", partial(Training, "mlp"), {"cross_entropy, SGD fused": 0.85}),
    Case("train", "cnn", partial(Training, "cnn"), {"cross_entropy, SGD fused": 0.97}),
    # 31 layers with kinks: after three steps of plain torch, the change in float32 differs from that in float64 by 0.26
    Case(
        "train",
        "ResNet-32, 128 of 32 × 32",
        partial(Training, "resnet32", (3, 32, 32), 128, tolerance=0.5),
        {"cross_entropy, SGD fused": 0.99},
    ),
    Case(
        "language model",
        "4 layers of 256, 8 × 128 tokens of 32000",
        partial(LanguageModel, 32000, 128, 256, 4, 4, 8),
        {"logits stored, SGD fused": 0.85},
    ),
]


# ---- the cases of a GPU ----------------------------------------------------------------------------------------------

# The sizes whose time depends on the memory come first, because they matter most if time runs out.
SHAPES = [(8192, 32000), (8192, 128256), (512, 8142), (512, 1000)]
SMALL_SHAPES = [(256, 365), (128, 100), (128, 10)]
FEW_CLASSES, FEW_ROWS = (16384, 10), (2, 8142)
# Sizes near the limits of the one-block kernel: at most 128 classes, and at most 512 lanes of 4 classes each.
ONE_BLOCK = [(128, 10), (256, 4), (16, 100), (5, 128), (32, 16)]
PROBE = {  # the cases of the short run, which may remain the only run
    "8192 × 32000 bf16",
    "16384 × 10 fp32",
    "128 × 10 fp32",
    "2 × 8142 fp32",
    "ResNet-50, 161 tensors",
    "16 × 5 fp32",
    "three tensors",
}
PROBED = {"absgd_fast", "cross_entropy", "absgd package", "SGD fused"}  # those that compile nothing
ANY = math.inf


def _share_of_copy(classes, card):
    """The bandwidth to reach in three passes over the logits, as a fraction of a copy's.

    The end of the forward pass, which makes the weights, takes a smaller part of the time if there are more classes, and a larger
    part if the memory is faster.
    """
    if classes >= 128256:
        return 0.90
    return 0.85 if "H200" in card else 0.88


def _gpu_loss(rows, classes, dtype, device, card, **more):
    """Ours makes three passes (read; read, write) and Liger two, so 1.5 times Liger's time is par. One block makes one pass."""
    large = rows * classes * torch.finfo(dtype).bits / 8 >= LARGE
    at_once = classes <= 128 and rows * ops.lanes_of_a_row(classes) <= ops.ONE_BLOCK  # as Operators.backward_mode decides
    targets = {"absgd package": 0.4 if large else 0.25, "Liger": 1.0 if at_once else 1.5} | more
    if classes < 1000:
        targets["torch.compile"] = 0.7
    bounds = {"forward launches": (1, 1), "backward launches": (0, 1)}
    if large:
        bounds["share of copy"] = (_share_of_copy(classes, card), ANY)
    return Case("gpu loss", _size(rows, classes, dtype), partial(Logits, rows, classes, dtype, device, None), targets, bounds)


def _gpu_deferred(count, rows, classes, dtype, device):
    """Ours makes two passes, like Liger."""
    name = f"{count} of {_size(rows, classes, dtype)}"
    return Case("gpu deferred", name, partial(MicroBatches, count, rows, classes, dtype, device), {"Liger": 1.0})


def _gpu_step(name, shapes, device, fused=None, **bounds):
    targets = {} if fused is None else {"SGD fused": fused}
    return Case("gpu step", name, partial(Tensors, shapes, device), targets, {"step launches": (1, 1)} | bounds)


def _gpu_weighted(name, rows, shapes, device, **bounds):
    data = partial(Samples, rows, shapes, device)
    return Case("gpu weighted", name, data, {"torch": 1.0}, {"step launches": (1, 1)} | bounds)


def _gpu_linear(rows, width, classes, dtype, device):
    peers = ("Liger", "torch, chunked")
    data = partial(Head, rows, width, classes, dtype, device)
    name = f"{rows} × {width} × {_size(0, classes, dtype).removeprefix('0 × ')}"
    return Case("gpu linear", name, data, dict.fromkeys(peers, 1.05), memory=dict.fromkeys(peers, 1.1))


def _gpu_train(name, make, batch, rule, device, memory_format=torch.contiguous_format):
    return Case("gpu train", name, partial(Whole, make, batch, rule, device, memory_format), {"plain": 1.0})


def _gpu_limit(rows, classes, device):
    """The time that one block saves by making the gradient in forward, for sizes that it serves (ops.Operators.backward_mode)."""
    return Case("gpu limit", f"{rows} × {classes}", partial(Logits, rows, classes, device=device))


def _gpu_rule(rule, name, shapes, device):
    return Case("gpu rules", f"{rule}, {name}", partial(Tensors, shapes, device, rule))


def gpu_cases(device="cuda", card="", tiny=False):
    """The cases of a GPU, the most important ones first.

    Args:
        device: where the data is.
        card: the name of the GPU, on which some figures depend.
        tiny: return a few small cases instead, which try the benchmark itself on any device.
    """
    if tiny:
        return _tiny_cases(device)
    bf16, fp32, last = torch.bfloat16, torch.float32, torch.channels_last
    return [
        *(_gpu_loss(*shape, dtype, device, card) for shape in SHAPES for dtype in (bf16, fp32)),
        _gpu_loss(*FEW_CLASSES, fp32, device, card, cross_entropy=1.3),
        _gpu_loss(*FEW_ROWS, fp32, device, card, cross_entropy=1.5),
        _gpu_deferred(4, 8192, 32000, bf16, device),
        _gpu_step("ResNet-32, 94 tensors", resnet32(), device, 0.5),
        _gpu_step("ResNet-50, 161 tensors", resnet50(), device, 0.9, **{"host us": (0, 35)}),
        _gpu_step("ResNet-152, 467 tensors", resnet152(), device),
        _gpu_step("1 B parameters, 300 tensors", [(2048, 1628)] * 300, device, **{"share of copy": (0.9, ANY)}),
        _gpu_weighted("64 × 4 M", 64, [(2048, 2048)], device, **{"share of copy": (0.8, ANY)}),
        _gpu_linear(8192, 4096, 128256, bf16, device),
        _gpu_train("ResNet-50, 128 images", torchvision_resnet50, partial(images, 128, 224, 1000, last), "SGD", device, last),
        _gpu_train("decoder of 124 M, 8 × 1024 tokens", models.Decoder, partial(text, 8, 1024, 50304), "AdamW", device),
        *(_gpu_loss(*shape, dtype, device, card) for shape in SMALL_SHAPES for dtype in (bf16, fp32)),
        *(_gpu_rule(rule, "ResNet-50, 161 tensors", resnet50(), device) for rule in RULES if rule != "SGD"),
        *(_gpu_limit(*shape, device) for shape in ONE_BLOCK),
    ]


def _tiny_cases(device):
    shapes, decoder = [(3, 4), (5,), (70,)], partial(models.Decoder, 64, 8, 16, 2, 1)
    return [
        *(_gpu_loss(*size, dtype, device, "") for size, dtype in (((64, 300), torch.bfloat16), ((16, 5), torch.float32))),
        _gpu_deferred(4, 6, 11, torch.bfloat16, device),
        _gpu_step("three tensors", shapes, device, 0.9, **{"host us": (0, 35), "share of copy": (0.9, ANY)}),
        _gpu_weighted("8 × 87", 8, shapes, device),
        _gpu_linear(40, 8, 300, torch.float32, device),
        _gpu_train("decoder", decoder, partial(text, 4, 8, 64), "AdamW", device),
        _gpu_rule("AdamW", "three tensors", shapes, device),
        _gpu_limit(8, 8, device),
    ]


def gpu_probe(cases):
    """The few of these cases that a short run measures, with only the competitors that need no compiler."""
    return [case.between(PROBED) for case in cases if case.name in PROBE and case.suite in ("gpu loss", "gpu step")]
