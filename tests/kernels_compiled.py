"""Every Triton kernel compiled for GPUs that are not here: NVIDIA sm_80, sm_90, sm_100 and AMD gfx942.

test_kernels.py runs this file in a process of its own. The launchers are called on CPU tensors with their launches recorded;
Triton then does for each launch what it does before a launch, with a driver that names the GPU: it takes the arguments,
specializes, compiles. So what is compiled is what would run.
"""

import math
import re
import subprocess
from collections import Counter
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from absgd_fast.kernels import launch, losses, rectified, step, weighted, weights
from absgd_fast.kernels import scale as scaling
from absgd_fast.ops import RULES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MODULES = (losses, weights, rectified, scaling, step, weighted)
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)


# ---- recorded launches -----------------------------------------------------------------------------------------------


class Driver:
    """A GPU in words."""

    def __init__(self, target):
        self.get_current_target = lambda: TARGETS[target]
        self.get_current_device = lambda: list(TARGETS).index(target)  # Triton keeps what it compiled by device
        self.get_current_stream = lambda device: 0


class Launch:
    def __init__(self, kernel, args, options):
        self.kernel, self.name, self.args, self.options = kernel, kernel.__name__, args, options

    def compile(self, target, **options):
        driver.set_active(Driver(target))
        return self.kernel.run(*self.args, grid=(1,), warmup=True, **(launch.OPTIONS | self.options | options))


def labels(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


def log_s(dtype=torch.float32):
    return torch.zeros((), dtype=dtype)


def logit_loss(logits, target, weight=None, smoothing=0.0, report=None, each=True, kind=0, second=0.0, adjust=None):
    real = launch.real_dtype(logits.dtype)
    losses.logit_loss(
        logits, target, weight, adjust, smoothing, second, -100, kind=kind, prune=kind == 2, with_stats=True, report=report
    )
    rows = (logits.shape[0], *logits.shape[2:])
    upstream, stats = torch.zeros(rows if each else (), dtype=real), torch.zeros(4, *rows, dtype=real)
    losses.logit_loss_backward(logits, target, weight, adjust, smoothing if kind == 0 else 0.0, stats, upstream)


def in_place(logits, weight=None, smoothing=0.0, report=None, kind=0, second=0.0, adjust=None, target=None):
    target = labels(len(logits)) if target is None else target
    losses.logit_loss_(logits, target, weight, adjust, smoothing, second, -100, kind=kind, prune=kind == 2, report=report)


def robust_logit_loss(logits, weight=None, smoothing=0.0, rows=None, report=None, normalizer=0, mix=0.0, update=True):
    real = launch.real_dtype(logits.dtype)
    losses.robust_logit_loss(
        logits,
        labels(len(logits)),
        weight,
        None,
        smoothing,
        0.0,
        -100,
        rows,
        rows,
        None if rows is None else rows > 0,
        log_s(real),
        torch.tensor(0),
        log_s(real),
        0.9,
        1.0,
        mix,
        math.inf,
        kind=0,
        prune=False,
        normalizer=normalizer,
        init_first=True,
        update=update,
        with_stats=True,
        report=report,
    )


def robust_loss(values, rows=None, update=True, normalizer=0):
    weights.robust_loss(
        values,
        rows,
        rows,
        None if rows is None else rows > 0,
        log_s(values.dtype),
        torch.tensor(0),
        log_s(),
        0.9,
        1.0,
        0.5,
        2.0,
        normalizer=normalizer,
        init_first=False,
        update=update,
        with_grad=True,
    )


def robust_weights(values):
    made, _, shares = weights.robust_weights(values, log_s(), log_s(), values > 0, 0.9, 1.0, normalizer=0, init_first=True)
    weights.robust_weights_backward(made, values, log_s(), log_s(), shares)


def scale():
    grad, rows = torch.zeros(64, 1000), torch.zeros(64)
    scaling.scale_(grad, log_s())
    scaling.scale(grad, rows, False)
    scaling.scale(grad, rows, True)
    scaling.scale(torch.zeros(4, 10, 64, dtype=torch.bfloat16), torch.zeros(4, 64), False)
    scaling.scale(grad.double(), rows.double(), False)


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def optimizer_step(rule, dtype=F32, shift=0, numbers=(), flags=0, weight_decay=1e-4, first=0.9, second=0.0, count=F32):
    """numbers: which of lr, grad_scale, found_inf, robust come in tensors. Arrays begin at element `shift` of their memory."""
    real = launch.real_dtype(dtype)
    arrays = [dtype] * 2 + [real] * len(step._slots(rule, flags, {"sgd": first, "rmsprop": second}.get(rule, 0) != 0))
    params, grads, *states = ([torch.zeros(5000 + shift, dtype=d)[shift:] for _ in range(2)] for d in arrays)
    given = [torch.zeros(1) if name in numbers else None for name in ("lr", "grad_scale", "found_inf")]
    robust = torch.zeros(6, dtype=F64) if "robust" in numbers else None
    steps = [] if rule == "sgd" else [torch.zeros((), dtype=count) for _ in range(2)]
    step.step_(
        params,
        grads,
        [t for ts in states for t in ts],
        steps,
        *given,
        robust,
        0.1,
        weight_decay,
        first,
        second,
        1e-8,
        RULES.index(rule),
        flags,
    )


def weighted_step(dtype=F32, momentum=0.9, form=0, lr_tensor=None, shift=0, weight_decay=1e-4, elements=5000, batch=64):
    real = launch.real_dtype(dtype)
    params, buffers = ([torch.zeros(elements + shift, dtype=d)[shift:]] * 2 for d in (dtype, real))
    weighted.weighted_step_(
        params,
        buffers if momentum else [],
        [torch.zeros(batch, elements, dtype=dtype)] * 2,
        torch.zeros(batch, dtype=real),
        None,
        None,
        log_s(real),
        None,
        lr_tensor,
        0.5,
        0.9,
        1.0,
        0.0,
        math.inf,
        0.1,
        weight_decay,
        momentum,
        0.0,
        form,
        normalizer=0,
        init_first=True,
    )


ALL_NUMBERS = ("lr", "grad_scale", "found_inf", "robust")
STEPS = {
    "plain": (("sgd", F32), dict(first=0.0, weight_decay=0.0, flags=1)),
    "momentum": (("sgd", F32), dict()),
    "nesterov": (("sgd", F32), dict(flags=2, numbers=ALL_NUMBERS)),
    "heavy ball fp64": (("sgd", F64), dict(flags=4, numbers=ALL_NUMBERS)),
    "momentum bf16": (("sgd", BF16), dict(numbers=("grad_scale",))),
    "odd addresses": (("sgd", F32), dict(shift=1)),
    "adam": (("adam", F32), dict(second=0.999)),
    "amsgrad": (("adam", F32), dict(second=0.999, flags=8 | 16, numbers=ALL_NUMBERS)),
    "amsgrad fp64": (("adam", F64), dict(second=0.999, flags=8 | 1, numbers=ALL_NUMBERS, count=F64)),
    "adamw fp16": (("adam", F16), dict(second=0.999, flags=16, numbers=("grad_scale", "found_inf"))),
    "paper form bf16": (("adam", BF16), dict(second=0.999, flags=16 | 32)),
    "adam, odd addresses bf16": (("adam", BF16), dict(second=0.999, shift=1)),
    "rmsprop": (("rmsprop", F32), dict()),
    "rmsprop, centered, momentum": (("rmsprop", F32), dict(second=0.9, flags=64, numbers=ALL_NUMBERS)),
    "rmsprop, centered, momentum fp64": (("rmsprop", F64), dict(second=0.9, flags=64, numbers=ALL_NUMBERS)),
    "rmsprop, centered bf16": (("rmsprop", BF16), dict(flags=64 | 1)),
    "adagrad": (("adagrad", F32), dict(count=F64)),
    "adagrad fp64": (("adagrad", F64), dict(numbers=ALL_NUMBERS)),
    "adagrad fp16": (("adagrad", F16), dict(weight_decay=0.0)),
}
CALLS = {
    # one row per program; a loop over classes; a tile of rows
    "512 x 1000 fp32": lambda: logit_loss(torch.zeros(512, 1000), labels(512)),
    "64 x 32000 bf16": lambda: logit_loss(torch.zeros(64, 32000, dtype=BF16), labels(64), each=False),
    "512 x 10 fp16": lambda: logit_loss(
        torch.zeros(512, 10, dtype=F16), labels(512, dtype=torch.int32), torch.zeros(10), 0.1, torch.zeros(4, dtype=torch.int64)
    ),
    "64 x 1000 fp64": lambda: logit_loss(torch.zeros(64, 1000, dtype=F64), labels(64), torch.zeros(1000, dtype=F64), 0.1),
    # rows side by side; nothing side by side
    "4 x 21 x 32 x 32 fp32": lambda: logit_loss(torch.zeros(4, 21, 32, 32), labels(4, 32, 32)),
    "64 x 2:100 fp32": lambda: logit_loss(torch.zeros(64, 100)[:, ::2], labels(64)),
    "512 x 1000 fp32, class vectors": lambda: logit_loss(torch.zeros(512, 1000), labels(512), adjust=torch.zeros(3, 1000)),
    "64 x 1000 bf16, focal": lambda: logit_loss(torch.zeros(64, 1000, dtype=BF16), labels(64), smoothing=2.0, kind=1),
    "64 x 100 fp32, gce": lambda: logit_loss(torch.zeros(64, 100), labels(64), smoothing=0.7, kind=2, second=0.5),
    "64 x 100 fp32, sce": lambda: logit_loss(torch.zeros(64, 100), labels(64), smoothing=0.1, kind=3, second=1.0),
    "4 x 10 x 64 fp16, soft": lambda: logit_loss(torch.zeros(4, 10, 64, dtype=F16), torch.zeros(4, 10, 64), smoothing=0.1),
    "64 x 100 fp64, weighted focal": lambda: logit_loss(torch.zeros(64, 100, dtype=F64), labels(64), smoothing=2.0, kind=4),
    "in place 512 x 1000 fp32": lambda: in_place(torch.zeros(512, 1000), report=torch.zeros(4).long()),
    "in place 64 x 32000 bf16": lambda: in_place(torch.zeros(64, 32000, dtype=BF16)),
    "in place 64 x 1000 fp64": lambda: in_place(torch.zeros(64, 1000, dtype=F64), torch.zeros(1000, dtype=F64), 0.1),
    "in place 64 x 1000 bf16, class vectors": lambda: in_place(torch.zeros(64, 1000, dtype=BF16), adjust=torch.zeros(3, 1000)),
    "in place 64 x 10 fp32, gce": lambda: in_place(torch.zeros(64, 10), smoothing=0.7, kind=2, second=0.5),
    "in place 64 x 1000 fp32, soft": lambda: in_place(torch.zeros(64, 1000), smoothing=0.1, target=torch.zeros(64, 1000)),
    "robust 128 x 10 fp32": lambda: robust_logit_loss(torch.zeros(128, 10), rows=torch.zeros(128), report=torch.zeros(4).long()),
    "robust 512 x 1000 fp32": lambda: robust_logit_loss(torch.zeros(512, 1000)),
    "robust 8192 x 100 bf16": lambda: robust_logit_loss(torch.zeros(8192, 100, dtype=BF16), torch.zeros(100), 0.1, normalizer=1),
    "robust 128 x 1000 fp64": lambda: robust_logit_loss(torch.zeros(128, 1000, dtype=F64), normalizer=2, mix=1.0),
    "robust 20000 x 10 fp32": lambda: robust_logit_loss(torch.zeros(20000, 10)),
    "900 losses fp32": lambda: robust_loss(torch.zeros(900)),
    "9000 losses fp64": lambda: robust_loss(torch.zeros(9000, dtype=F64), torch.zeros(9000, dtype=F64)),
    "90000 losses fp32": lambda: robust_loss(torch.zeros(90000), torch.zeros(90000)),
    "target 128 x 10 fp32": lambda: robust_logit_loss(torch.zeros(128, 10), normalizer=3),
    "target 128 x 1000 fp64": lambda: robust_logit_loss(torch.zeros(128, 1000, dtype=F64), normalizer=3, mix=1.0),
    "target 900 losses fp32": lambda: robust_loss(torch.zeros(900), torch.zeros(900), normalizer=3),
    "target 9000 losses fp64": lambda: robust_loss(torch.zeros(9000, dtype=F64), normalizer=3),
    "target 90000 losses fp32": lambda: robust_loss(torch.zeros(90000), normalizer=3),
    "900 weights fp32": lambda: robust_weights(torch.zeros(900)),
    "90000 weights fp64": lambda: robust_weights(torch.zeros(90000, dtype=F64)),
    "900 rectified weights fp32": lambda: rectified.rectified(torch.zeros(900)),
    "90 rectified weights fp64": lambda: rectified.rectified(torch.zeros(90, dtype=F64)),
    "scale": scale,
    "weighted": weighted_step,
    "weighted, nesterov, maximize, lr": partial(weighted_step, form=3, lr_tensor=torch.zeros(1), weight_decay=0.0),
    "weighted, heavy ball bf16": partial(weighted_step, BF16, form=4),
    "weighted, plain fp16": partial(weighted_step, F16, momentum=0.0),
    "weighted fp64": partial(weighted_step, F64, batch=9000),
    "weighted, odd addresses": partial(weighted_step, shift=1),
    "weighted, odd rows": partial(weighted_step, elements=5001),
    **{f"step, {name}": partial(optimizer_step, *args, **options) for name, (args, options) in STEPS.items()},
}


@contextmanager
def recording(target):
    """The list of launches made inside, as on this target."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            launch, "launch", lambda kernel, programs, like, *args, **options: made.append(Launch(kernel, args, options))
        )
        patch.setattr(launch, "FENCE", 64 if target == "gfx942" else 0)
        patch.setattr(launch, "FEW_REGISTERS", {} if target == "gfx942" else {F32: {"maxnreg": 64}})
        yield made


@cache
def recorded(call, target):
    """The launches of a call, in order."""
    with recording(target) as made:
        CALLS[call]()
    return made


def ptx_of(call, target="sm_90"):
    return {made.name: made.compile(target).asm["ptx"] for made in recorded(call, target)}


def count(pattern, text):
    return len(re.findall(pattern, text))


# ---- tests -----------------------------------------------------------------------------------------------------------


def test_every_kernel_is_here():
    """No kernel is missing from its module's list, nor from the calls above."""
    named = [kernel for module in MODULES for kernel in module.KERNELS]
    found = {v for m in MODULES for k, v in vars(m).items() if isinstance(v, JITFunction) and k.endswith("_kernel")}
    assert set(named) == found and len(named) == len(found)
    for calls in (CALLS, ONE_OF_EACH):
        assert {made.kernel for call in calls for made in recorded(call, "sm_90")} == found


def test_no_global_constants():
    """Triton compares the globals of a kernel at every launch, some 0.3 us each, and refuses one that differs: a NaN does."""
    for module in MODULES:
        for kernel in module.KERNELS:
            assert kernel.cache_key and not kernel.used_global_vals, kernel


# Every kernel and type at least once. `make test` compiles these for sm_90, `make test-deep` these for all targets and all calls
# for sm_90.
ONE_OF_EACH = [
    "512 x 1000 fp32",
    "64 x 32000 bf16",
    "64 x 1000 fp64",
    "in place 64 x 32000 bf16",
    "in place 64 x 1000 fp64",
    "robust 128 x 10 fp32",
    "robust 8192 x 100 bf16",
    "robust 128 x 1000 fp64",
    "9000 losses fp64",
    "90000 losses fp32",
    "target 128 x 10 fp32",
    "target 9000 losses fp64",
    "target 90000 losses fp32",
    "900 weights fp32",
    "90000 weights fp64",
    "900 rectified weights fp32",
    "90 rectified weights fp64",
    "scale",
    "step, nesterov",
    "step, heavy ball fp64",
    "step, amsgrad",
    "step, amsgrad fp64",
    "step, adamw fp16",
    "step, paper form bf16",
    "step, rmsprop, centered, momentum",
    "step, rmsprop, centered, momentum fp64",
    "step, adagrad fp64",
    "step, adagrad fp16",
    "weighted",
    "weighted, heavy ball bf16",
    "weighted, plain fp16",
    "weighted fp64",
]


def row(call, *target):
    quick = call in ONE_OF_EACH and target in ((), ("sm_90",))
    return pytest.param(call, *target, marks=[] if quick else pytest.mark.deep)


@pytest.mark.parametrize("call, target", [row(c, t) for c in CALLS for t in TARGETS if t == "sm_90" or c in ONE_OF_EACH])
def test_compiles(call, target):
    """To a binary, without spills: only the last program of a robust loss may spill, and little.

    With Triton 3.7 a program in float64 has 8 bytes of stack, with 3.9 it has none.
    """
    of_float64 = 8 if "fp64" in call and OLD_TRITON else 0
    for made in recorded(call, target):
        compiled = made.compile(target)
        binary = compiled.asm["hsaco" if target == "gfx942" else "cubin"]
        assert len(binary) > 1000
        if target == "gfx942":
            assert re.search(r"; ScratchSize: 0\b", compiled.asm["amdgcn"])
            continue
        assert f".target {target}" in compiled.asm["ptx"]
        capped = made.options.get("maxnreg")
        assert ("robust_logit" in made.name and "64" not in call.split()[-1]) == (capped is not None)
        assert not capped or f".maxnreg {capped}" in compiled.asm["ptx"]
        stack = stack_of(binary)
        assert stack is None or stack <= (128 if capped else of_float64), made.name


def stack_of(cubin):
    """Bytes of stack, if the tool that can tell is there."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


LAUNCHES = {
    "512 x 1000 fp32": "logit_loss_fwd logit_loss_bwd",
    "in place 64 x 32000 bf16": "logit_loss_in_place",
    "robust 128 x 10 fp32": "robust_logit_loss_fwd",
    "robust 512 x 1000 fp32": "robust_logit_loss_fwd",
    "robust 8192 x 100 bf16": "robust_logit_loss_fwd",
    "robust 20000 x 10 fp32": "logit_loss_fwd robust_sums_fwd robust_apply_fwd",
    "900 losses fp32": "robust_loss_fwd",
    "9000 losses fp64": "robust_loss_fwd",
    "90000 losses fp32": "robust_sums_fwd robust_apply_fwd",
    "target 128 x 10 fp32": "robust_logit_loss_fwd",
    "target 90000 losses fp32": "robust_target_fwd robust_apply_fwd",
    "900 weights fp32": "robust_loss_fwd robust_weights_bwd",
    "90000 weights fp64": "robust_sums_fwd robust_apply_fwd robust_dots_bwd robust_weights_bwd",
    "900 rectified weights fp32": "rectified",
    "step, momentum": "step",
    "step, adam": "count_steps step",
    "step, paper form bf16": "count_steps step",
    "step, rmsprop": "count_steps step",
    "step, adagrad": "count_steps step",
    "weighted": "robust_loss_fwd weighted_step",
}


@pytest.mark.parametrize("call", LAUNCHES)
def test_launches(call):
    assert [made.name for made in recorded(call, "sm_90")] == [f"{name}_kernel" for name in LAUNCHES[call].split()]


# Kernels of float32, bfloat16 and float16 that have nothing to do in float64
SINGLE = [call for call in CALLS if "fp64" not in call and "losses" not in call and "weights" not in call]


@pytest.mark.parametrize("call", map(row, SINGLE))
def test_no_float64(call):
    """No number of Python and no constant widens a computation: a GPU may be 64 times slower at float64."""
    for made in recorded(call, "sm_90"):
        double = any(isinstance(x, torch.Tensor) and x.dtype == F64 for x in made.args)
        # the state, and what a step owes to the count of steps, are one number for many
        if not made.name.startswith(("robust_", "count_steps")) and not double:
            assert ".f64" not in made.compile("sm_90").asm["ptx"], made.name


@pytest.mark.parametrize("call", ["robust 128 x 10 fp32", "robust 512 x 1000 fp32", "900 losses fp32", "90000 losses fp32"])
def test_float64_of_the_state_only(call):
    """What is computed in float64 beside the rows is as much for twice the rows of a program: scalars."""
    for made in recorded(call, "sm_90"):
        size = "LOSSES" if "LOSSES" in made.options else "BLOCK"
        ptx = [made.compile("sm_90", **{size: made.options[size] // n}).asm["ptx"] for n in (2, 1)]
        operations = [Counter(re.findall(r"^\s*(?:@%p\d+ )?([\w.]+\.f64)\s", text, re.MULTILINE)) for text in ptx]
        assert operations[0] == operations[1] and operations[0], made.name


def test_another_batch_is_no_new_kernel():
    """Rows, and what changes from step to step, are not specialized on."""
    compiled = []
    for rows, update in ((512, True), (511, False), (1, True)):
        with recording("sm_90") as made:
            robust_logit_loss(torch.zeros(rows, 1000), update=update)
            robust_loss(torch.zeros(rows), update=update)
            robust_loss(torch.zeros(20000 + rows), update=update)
            logit_loss(torch.zeros(rows, 10), labels(rows))
            rectified.rectified(torch.zeros(512 + rows))
        compiled.append([one.compile("sm_90") for one in made])
    for others in compiled[1:]:
        for one, first, other in zip(made, compiled[0], others, strict=True):
            assert first is other, one.name


WIDE_LOAD, WIDE_STORE = (rf"{x}\.global(?:\.\w+)*\.(?:v4\.[bfu]32|v2\.[bfu]64)" for x in ("ld", "st"))
# (loads, stores) of 16 bytes that a thread makes in each kernel: its elements * their size / 16 (and twice that for class
# weights of float32 beside logits of bfloat16)
WIDE = {
    "512 x 1000 fp32": {"logit_loss_fwd_kernel": (2, 0), "logit_loss_bwd_kernel": (4, 4)},
    "64 x 32000 bf16": {"logit_loss_fwd_kernel": (2, 0), "logit_loss_bwd_kernel": (2, 2)},
    "64 x 1000 fp64": {"logit_loss_fwd_kernel": (4, 0), "logit_loss_bwd_kernel": (8, 8)},
    "4 x 21 x 32 x 32 fp32": {"logit_loss_fwd_kernel": (4, 0), "logit_loss_bwd_kernel": (4, 4)},
    "in place 512 x 1000 fp32": {"logit_loss_in_place_kernel": (4, 2)},
    "in place 64 x 32000 bf16": {"logit_loss_in_place_kernel": (4, 2)},
    "robust 512 x 1000 fp32": {"robust_logit_loss_fwd_kernel": (2, 0)},
    "scale": {"scale_kernel": (2, 1)},
    "step, plain": {"step_kernel": (8, 4)},
    "step, momentum": {"step_kernel": (12, 8)},
    "step, nesterov": {"step_kernel": (12, 12)},
    "step, heavy ball fp64": {"step_kernel": (12, 12)},
    "step, momentum bf16": {"step_kernel": (8, 8)},
    "step, adam": {"step_kernel": (16, 12)},
    "step, amsgrad": {"step_kernel": (20, 20)},
    "step, amsgrad fp64": {"step_kernel": (20, 20)},
    "step, adamw fp16": {"step_kernel": (12, 12)},
    "step, paper form bf16": {"step_kernel": (12, 10)},
    "step, rmsprop": {"step_kernel": (12, 8)},
    "step, rmsprop, centered, momentum": {"step_kernel": (20, 20)},
    "step, rmsprop, centered bf16": {"step_kernel": (12, 10)},
    "step, adagrad": {"step_kernel": (12, 8)},
    "step, adagrad fp64": {"step_kernel": (12, 12)},
    "step, adagrad fp16": {"step_kernel": (8, 6)},
    "weighted": {"weighted_step_kernel": (10, 2)},
    "weighted, heavy ball bf16": {"weighted_step_kernel": (11, 3)},
    "weighted fp64": {"weighted_step_kernel": (10, 2)},
}


@pytest.mark.parametrize("call", map(row, WIDE))
def test_loads_of_16_bytes(call):
    for name, (loads, stores) in WIDE[call].items():
        for made in recorded(call, "sm_90"):
            if made.name == name:
                ptx = made.compile("sm_90").asm["ptx"]
                assert count(WIDE_LOAD, ptx) >= loads and count(WIDE_STORE, ptx) >= stores, name


def test_no_wide_access_at_odd_addresses():
    """An address that is no multiple of 16 would stop the GPU."""
    for call in ("step, odd addresses", "step, adam, odd addresses bf16", "weighted, odd addresses"):
        *_, ptx = ptx_of(call).values()
        assert not count(WIDE_LOAD, ptx) and not count(WIDE_STORE, ptx)
    _, backward = ptx_of("64 x 2:100 fp32").values()
    assert not count(WIDE_LOAD, backward)


@pytest.mark.parametrize("call", ["robust 128 x 10 fp32", "900 losses fp32", "90000 losses fp32"])
def test_scores_are_divided_exactly(call):
    """z = L / lambda, which an exponential follows: div.rn, as on the CPU."""
    assert all(count(r"div\.rn(\.ftz)?\.f32", ptx) for ptx in ptx_of(call).values())


def test_rectified_weights_are_divided_exactly():
    """div.full takes subnormal products for 0; what is widened to float64 is the sum alone."""
    (ptx,) = ptx_of("900 rectified weights fp32").values()
    assert count(r"div\.rn\.f32", ptx) and not count(r"\.ftz|div\.(?:full|approx)|div\.rn\.f64", ptx)


@pytest.mark.parametrize("call", [row(call) for call in CALLS if call.startswith(("step,", "weighted"))])
def test_steps_are_rounded_correctly(call):
    """Quotients, square roots (the approximate one flushes subnormals to 0), half precision (the interpreter truncates)."""
    *_, ptx = ptx_of(call).values()
    assert not count(r"\b(?:div|sqrt)\.(?:approx|full)|\.ftz|\bcvt\.r[^n]", ptx)
    assert bool(count(r"\bcvt\.rn\.b?f16", ptx)) == call.endswith(("bf16", "fp16"))


def test_another_step_is_no_new_kernel():
    """How many tensors there are, of how many elements, and numbers are not specialized on."""
    compiled = []
    for tensors, elements, lr in ((1, 5000, 0.1), (2, 1, 0.0), (16, 2048, 1.0)):
        lists = [[torch.zeros(elements) for _ in range(n * tensors)] for n in (1, 1, 2)]
        with recording("sm_90") as made:
            step.step_(
                *lists, [log_s() for _ in range(tensors)], *[None] * 4, lr, 0.1, lr / 2, 0.99, 1e-8, RULES.index("adam"), 0
            )
        compiled.append([one.compile("sm_90") for one in made])
    assert all(one is first for others in compiled[1:] for one, first in zip(others, compiled[0], strict=True))


@pytest.mark.parametrize("call", ["512 x 1000 fp32", "robust 512 x 1000 fp32", "90000 losses fp32"])
def test_logarithms_are_exact(call):
    """lg2.approx has an absolute error of 2^-22: it would lose a loss of 1e-6."""
    assert not any(count(r"lg2\.approx", ptx) for ptx in ptx_of(call).values())


@pytest.mark.parametrize("call", ["robust 512 x 1000 fp32", "90000 losses fp32"])
def test_last_program_sees_the_others(call):
    """Stores, barrier, atomic of acquire and release; then loads that bypass L1. On AMD every wave waits for its own stores."""
    for name, ptx in ptx_of(call).items():
        before, after = re.split(r"atom\.global\.gpu\.acq_rel\.add\.[us]32", ptx)
        assert "bar.sync" in before[before.rindex("st.global") :], name
        assert count(r"ld\.global\.cg", after) and not count(r"ld\.global\.cg", before), name
    for made in recorded(call, "gfx942"):
        code = made.compile("gfx942").asm["amdgcn"]
        _, _, rest = code.partition("buffer_wbl2 sc1")
        assert re.search(r"s_waitcnt vmcnt\(0\).*?s_barrier.*?buffer_wbl2 sc1.*?global_atomic_add", rest, re.DOTALL), made.name
