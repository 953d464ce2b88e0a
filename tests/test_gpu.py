"""Every backend of a GPU against the float64 oracle, and what only a GPU has: graphs, streams, launches, more than 2^31 elements.

    pytest tests/test_gpu.py                    the same bodies on the CPU's backends; what only a GPU can show is skipped
    python tests/test_gpu.py [--out FILE.json]  on a machine with a GPU, without pytest: worker processes take the tests, so that a
                                                kernel that hangs or breaks its CUDA context costs one test and not the run; a
                                                backend that does so again and again is given up

A body is a function of `where`, a device and a backend on it, and of the names of its tables.
"""

import argparse
import copy
import gc
import importlib
import itertools
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import SkipTest
from unittest.mock import patch

STARTED = time.perf_counter()  # before torch, whose import counts as time of the run
TESTS = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import numpy as np  # noqa: E402
import oracle  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import absgd_fast as ab  # noqa: E402
from absgd_fast import _backend, ops, reference  # noqa: E402
from absgd_fast.functional import logit_loss, robust_weights, weighted_momentum_step_  # noqa: E402

with patch.object(sys, "path", [str(TESTS.parent), *sys.path]):  # benchmarks are no part of the package
    device_tools = importlib.import_module("benchmarks.device")

INF, NAN = math.inf, math.nan
# So many losses are weighted in the launch that made them, and so many logits are kept by one block: a batch that is, and
# one that is not. The CPU has no such border, and is spared the size.
ONE_LAUNCH = 16384 if torch.cuda.is_available() else 200
HELD, BEYOND = (9, 37), (40, 513) if torch.cuda.is_available() else (14, 37)
# The ways through the kernels of losses: one block keeps the batch; a few lanes take a row; a block takes it; classes that are
# no neighbours in memory; more rows than one launch weighs.
PATHS = {
    "one block": HELD,
    "lanes": (700, 100) if torch.cuda.is_available() else (30, 60),
    "a block a row": (24, 4099) if torch.cuda.is_available() else (5, 513),
    "columns": (8, 37, 90) if torch.cuda.is_available() else (3, 13, 20),
    "many rows": (ONE_LAUNCH + 617, 3),
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- where a body runs -----------------------------------------------------------------------------------------------


class Where:
    """A device and the backend that is to serve it."""

    def __init__(self, device, backend):
        self.device, self.backend = torch.device(device), backend
        self.gpu = self.device.type == "cuda"

    def __str__(self):
        return f"{self.device.type}-{self.backend}"

    def why_not(self):
        if self.gpu and not torch.cuda.is_available():
            return _backend.why_not("cuda") or "torch sees no CUDA GPU"
        return _backend.why_not(self.backend)

    def synchronize(self):
        device_tools.synchronize(self.device)

    def leaf(self, tensor):
        return tensor.detach().to(self.device, copy=True).requires_grad_()

    def fused(self, loss="ce", classes=1, dtype=torch.float32):
        """The module of one of LOSSES."""
        module, given, _ = LOSSES[loss]
        return module(**tensors_of(given(classes), dtype), backend=self.backend).to(self.device)

    def criterion(self, loss="ce", classes=1, dtype=torch.float32, **options):
        """ABLoss on it."""
        return self.robust(self.fused(loss, classes, dtype), dtype, **options)

    def robust(self, criterion, dtype=torch.float32, **options):
        with self.device:
            out = ab.ABLoss(criterion, backend=self.backend, **options)
        out = out.to(self.device)
        return out.double() if dtype == torch.float64 else out

    def need(self, bytes):
        """Skips what does not fit into the memory."""
        free = torch.cuda.mem_get_info(self.device)[0] if self.gpu else 2**32
        if bytes > free:
            raise SkipTest(f"needs {bytes / 2**30:.0f} GB of memory, {free / 2**30:.0f} are free")


CPU = [Where("cpu", name) for name in ("cpu", "reference")]
GPU = [Where("cuda", name) for name in ("cuda", "triton", "reference")]


def over(**tables):
    """The body runs once for each combination of entries of these tables ({id: value}, or ids alone)."""

    def mark(function):
        function.tables = {name: t if isinstance(t, dict) else {str(v): v for v in t} for name, t in tables.items()}
        return function

    return mark


def gpu(function=None, *, alone=False):
    """Only a GPU can show this, and only our kernels promise it. alone: it wants the memory for itself."""
    if function is None:
        return partial(gpu, alone=alone)
    function.gpu, function.alone = True, alone
    return function


def places(function):
    if getattr(function, "gpu", False):
        return [where for where in GPU if where.backend != "reference"]
    return CPU + GPU * torch.cuda.is_available()


def pytest_generate_tests(metafunc):
    import pytest

    for name, table in getattr(metafunc.function, "tables", {}).items():
        metafunc.parametrize(name, list(table.values()), ids=list(table))
    if "where" in metafunc.fixturenames:
        params = [(where, where.why_not()) for where in places(metafunc.function)]
        marked = [pytest.param(w, marks=pytest.mark.skipif(bool(reason), reason=str(reason)), id=str(w)) for w, reason in params]
        metafunc.parametrize("where", marked)


_settings = []


def setup_function(function=None):
    """torch.empty returns NaN, so that a read of uninitialised memory shows; torch's own operators are not meant by it. One
    thread, because on small tensors two would mostly wait for each other."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    _settings.append((*before, torch.get_num_threads()))
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.set_num_threads(1)


def teardown_function(function=None):
    enabled, warn_only, threads = _settings.pop()
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.set_num_threads(threads)


@contextmanager
def unpoisoned():
    """Where launches count, no kernel fills what torch.empty returns."""
    setup_function()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        teardown_function()


# ---- problems and their exact answers --------------------------------------------------------------------------------


def class_weight(classes):
    """Distinct values from 0.5 to 2, none of them 1: an unused or shifted weight shows."""
    return [0.5 + 1.5 * ((7 * c + 3) % 16) / 15.5 for c in range(classes)]


def counts(classes):
    """1 to 97 samples per class, neighbours unequal, the largest neither first nor last."""
    return [1 + (37 * c + 11) % 97 for c in range(classes)]


class Loss(NamedTuple):
    """A fused module, its arguments for C classes, and what logit_loss and the oracle call the same."""

    module: type
    given: callable
    exact: callable


def alike(module, options, **more):
    return Loss(module, options, lambda c: options(c) | more)


def counted(module, exact, **more):
    """A loss whose class vectors follow from numbers of samples."""
    return Loss(module, lambda c: {"cls_num_list": counts(c)} | more, lambda c: exact(counts(c), **more))


LOSSES = {
    "ce": alike(ab.CrossEntropy, lambda c: {}),
    "weight": alike(ab.CrossEntropy, lambda c: {"weight": class_weight(c)}),
    "smooth": alike(ab.CrossEntropy, lambda c: {"label_smoothing": 0.1}),
    "all": alike(ab.CrossEntropy, lambda c: {"weight": class_weight(c), "label_smoothing": 0.3, "ignore_index": 0}),
    "focal": alike(ab.Focal, lambda c: {"gamma": 2.0, "weight": class_weight(c)}, kind="focal"),
    "gce": alike(ab.GCE, lambda c: {}, kind="gce"),
    "gce, truncated": alike(ab.GCE, lambda c: {"q": 0.4, "k": 0.5}, kind="gce"),
    "gce, pruned": alike(ab.GCE, lambda c: {"k": 0.3 / c, "prune": True, "weight": class_weight(c)}, kind="gce"),
    "sce": alike(ab.SCE, lambda c: {"weight": class_weight(c)}, kind="sce"),
    "ldam": counted(ab.LDAM, oracle.ldam, s=2.0),  # logits that are no cosines reach the size that s = 30 gives those
    "vs": counted(ab.VS, oracle.vs),
    "logit adjusted": counted(ab.LogitAdjusted, oracle.logit_adjusted, tau=1.3),
    "cdt": counted(ab.CDT, oracle.cdt, gamma=0.2),
}
CROSS_ENTROPIES = list(LOSSES)[:4]
CANCELS = ("smooth", "all", "gce, truncated", "gce, pruned")  # terms of both signs: only their size can be asked for


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors_of(options, dtype, device="cpu"):
    """Class vectors as tensors of what losses are computed in."""
    return {k: torch.tensor(v, dtype=wide(dtype), device=device) if isinstance(v, list) else v for k, v in options.items()}


@lru_cache(maxsize=512)
def problem(shape, dtype, seed=0, scale=3.0, loss="ce"):
    """Logits and labels on the CPU; exact losses and gradients as NumPy arrays of their shapes. Where there are several rows
    the second is ignored and holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    options = LOSSES[loss].exact(shape[1])
    ignore = options.get("ignore_index", -100)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
    if target.numel() > 1:
        target.view(-1)[1] = ignore
        logits.movedim(1, -1)[target == ignore] = NAN
    flat = oracle.rows(logits.double()), target.flatten().numpy()
    (losses, grads), valid = oracle.logit_loss(*flat, **options), oracle.valid(*flat, **options)
    return SimpleNamespace(
        logits=logits, target=target, options=options, valid=valid.reshape(target.shape), ignore_index=ignore,
        losses=losses.reshape(target.shape), grads=oracle.unrows(grads, shape),
    )  # fmt: skip


def exact_losses(x, target, options):
    """The oracle's formula for many rows: losses of float64 logits in torch, differentiable, r summed without the label."""
    valid = target != options.get("ignore_index", -100)
    x, y = x.movedim(1, -1), torch.where(valid, target, 0).unsqueeze(-1)
    d = x - x.gather(-1, y)
    others = d.masked_fill(torch.zeros_like(d, dtype=torch.bool).scatter(-1, y, True), -INF)
    nll = F.softplus(others.logsumexp(-1), threshold=700)
    v, e = options.get("weight", x.new_ones(x.shape[-1])), options.get("label_smoothing", 0.0)
    losses = (1 - e) * v[y.squeeze(-1)] * nll + e / x.shape[-1] * (v * (nll.unsqueeze(-1) - d)).sum(-1)
    return torch.where(valid, losses, 0)


def along(rows, like):
    """One number per row, ready to multiply logits (B, C, ...)."""
    return np.expand_dims(np.asarray(rows), 1) * np.ones_like(like)


def numpy(tensor):
    return tensor.detach().double().cpu().numpy()


def close(got, exact, dtype, what, *, ulps=64, cancels=False, stored=False):
    """Elementwise: so many ulp of what it is computed in and, where it is stored in `dtype`, one rounding to that."""
    ulp, info = torch.finfo(wide(dtype)).eps, torch.finfo(dtype)
    half = stored and info.bits == 16
    floor = max(4 * ulp if cancels else ulp / 64, info.tiny * info.eps if half else 0)
    np.testing.assert_allclose(numpy(got), exact, rtol=ulps * ulp + half * info.eps, atol=floor, err_msg=what)


def raises(kind, words, function):
    try:
        function()
    except kind as error:
        assert all(word in str(error) for word in words), f"{error!r} does not say {words}"
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


# ---- losses on logits ------------------------------------------------------------------------------------------------


@over(dtype=DTYPES, loss=CROSS_ENTROPIES)
def test_losses(where, dtype, loss):
    """One class; less than a 16-byte access; a few; around where a block takes a row (128 accesses, 1024); many."""
    sizes = (1, 2, 10, 100, 513, 1000, 1027, 4099) + (32000,) * where.gpu
    if where.backend == "triton" and loss != "ce":  # compiles a kernel for each of these
        sizes = (2, 10, 1027, 32000)
    for classes in sizes:
        p = problem((5, classes), dtype, seed=classes, loss=loss)
        x, target = where.leaf(p.logits), p.target.to(where.device)
        if classes % 2 == 0:
            target = target.int()
        upstream = torch.linspace(-2, 1.5, 5, dtype=wide(dtype), device=where.device)
        losses = logit_loss(x, target, **tensors_of(p.options, dtype, where.device), backend=where.backend)
        (grad,) = torch.autograd.grad(losses, x, upstream)
        assert losses.dtype == wide(dtype) and losses.shape == (5,) and grad.dtype == dtype and grad.shape == x.shape
        close(losses, p.losses, dtype, f"losses of {classes} classes")
        exact = p.grads * along(numpy(upstream), p.grads)
        close(grad, exact, dtype, f"gradient of {classes} classes", cancels=loss in ("smooth", "all"), stored=True)


LAYOUTS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced rows": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "sliced classes": lambda x: torch.stack([x, x + 1], 2).flatten(1, 2)[:, ::2],
    "wider row": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "offset of one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "permuted": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
}


@over(dtype=DTYPES, layout=list(LAYOUTS))
def test_layouts(where, dtype, layout):
    """The same numbers in other places of memory: rows on a few lanes (37) and on a block (1030), with heads and tails; images."""
    if where.backend == "triton" and dtype not in (torch.float32, torch.bfloat16):
        raise SkipTest("loads and stores alone differ, and each kernel costs a second to compile")
    for shape in ((5, 37), (3, 1030), (3, 6, 7), (2, 5, 3, 4)):
        p = problem(shape, dtype)
        x = LAYOUTS[layout](p.logits.to(where.device)).requires_grad_()
        target = torch.stack([p.target, p.target * 0 - 7], -1).to(where.device)[..., 0]  # labels lie apart too
        upstream = torch.linspace(-1, 2, target.numel(), dtype=wide(dtype), device=where.device).reshape(target.shape)
        losses = logit_loss(x, target, backend=where.backend)
        (grad,) = torch.autograd.grad(losses, x, upstream)
        close(losses, p.losses, dtype, f"losses {shape}")
        close(grad, p.grads * along(numpy(upstream), p.grads), dtype, f"gradient {shape}", stored=True)
        check_robust(where.criterion(lam=0.75, dtype=dtype), oracle.ABLoss(0.75), x, target, p, dtype)


@over(dtype=DTYPES, loss=["ce", "all"])
def test_many_rows(where, dtype, loss):
    """Rows on lanes of many blocks; more of them than one launch weighs; images of more than that."""
    if where.backend == "triton" and (loss == "all") != (dtype == torch.float32):
        raise SkipTest("each kernel costs a second to compile")
    for shape in [(2100, 1000), (70_000, 10)] * where.gpu + [(ONE_LAUNCH + 617, 33), (3, 5, 8, ONE_LAUNCH // 16)]:
        generator = torch.Generator().manual_seed(1)
        logits = (torch.randn(shape, generator=generator) * 3).to(dtype)
        target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
        options = LOSSES[loss].exact(shape[1])
        x, y = where.leaf(logits), target.to(where.device)
        exact_x = x.detach().double().requires_grad_()
        exact = exact_losses(exact_x, y, tensors_of(options, torch.float64, where.device))
        upstream = torch.randn(target.shape, generator=generator, dtype=torch.float64).to(where.device, wide(dtype))
        (slopes,) = torch.autograd.grad(exact.sum(), exact_x)
        losses = logit_loss(x, y, **tensors_of(options, dtype, where.device), backend=where.backend)
        (grad,) = torch.autograd.grad(losses, x, upstream)
        close(losses, numpy(exact), dtype, f"losses {shape}", cancels=True)
        close(grad, numpy(slopes * upstream.unsqueeze(1)), dtype, f"gradient {shape}", cancels=True, stored=True)
        spots = [0, target.numel() // 2, target.numel() - 1]
        spot_losses, _ = oracle.cross_entropy(oracle.rows(logits.double())[spots], target.flatten()[spots], **options)
        np.testing.assert_allclose(numpy(exact).flatten()[spots], spot_losses, rtol=1e-13)  # the formula above is the oracle's
        valid = numpy(y) != options.get("ignore_index", -100)
        p = SimpleNamespace(losses=numpy(exact), grads=numpy(slopes), valid=valid)
        check_robust(where.criterion(loss, shape[1], dtype, lam=-0.5), oracle.ABLoss(-0.5), x, y, p, dtype)


def test_certain_rows(where):
    """The label's gradient where p = 1 - 1e-6, to 1e-5 (eager torch is off by 17 %); logits of +-80, where exp overflows."""
    for classes in (2, 10, 1000, 32000 if where.gpu else 3000):
        logits = torch.linspace(-0.01, 0.01, classes).repeat(7, 1)
        target = torch.arange(7) * (classes - 1) // 6
        logits[torch.arange(7), target] = math.log((1 - 1e-6) / 1e-6 * (classes - 1))
        losses, grads = oracle.cross_entropy(logits.double(), target)
        for n, criterion in ((1, ab.CrossEntropy(reduction="sum", backend=where.backend)), (7, where.criterion(lam=INF))):
            x = where.leaf(logits)
            criterion(x, target.to(where.device)).backward()
            got, exact = numpy(x.grad[range(7), target]) * n, grads[range(7), target]
            assert np.abs(got / exact - 1).max() <= 1e-5, f"{classes} classes: off by {np.abs(got / exact - 1).max():.1e}"
    logits = torch.full((6, 40), -80.0)
    target = torch.arange(6)
    logits[0, 0], logits[1, 30], logits[2], logits[3, 2:9], logits[4, 4] = 80, 80, 80, 80, 0
    losses, grads = oracle.cross_entropy(logits.double(), target)
    for dtype in DTYPES.values():
        x = where.leaf(logits.to(dtype))
        values = logit_loss(x, target.to(where.device), backend=where.backend)
        (grad,) = torch.autograd.grad(values.sum(), x)
        close(values, losses, dtype, "losses of +-80")
        close(grad, grads, dtype, "gradient of +-80", stored=True)


@over(dtype={"bf16": torch.bfloat16, "fp16": torch.float16})
def test_half_precision_is_no_worse_than_eager(where, dtype):
    """Largest error of losses and of gradients, next to torch's on the same logits."""
    p = problem((16, 1000), dtype, seed=5)
    target = p.target.to(where.device)
    errors = []
    for function in (partial(logit_loss, backend=where.backend), partial(F.cross_entropy, reduction="none")):
        x = where.leaf(p.logits.nan_to_num(0))
        losses = function(x, target)
        losses.sum().backward()
        errors.append([np.abs(numpy(losses) - p.losses).max(), np.abs(numpy(x.grad) - p.grads).max()])
    (our_loss, our_grad), (their_loss, their_grad) = errors
    assert our_loss <= their_loss and our_grad <= their_grad * (1 + 1e-3), errors  # the same rounding of the same number, at best


def check_losses(where, criterion, p, dtype, what, cancels=False):
    """Losses and gradient of logit_loss with the options of p, and of the module `criterion`."""
    x, target = where.leaf(p.logits), p.target.to(where.device)
    upstream = torch.linspace(-2, 1.5, p.losses.size, dtype=wide(dtype), device=where.device).reshape(p.losses.shape)
    options = tensors_of(p.options, dtype, where.device)
    for losses in (logit_loss(x, target, **options, backend=where.backend), criterion(x, target)):
        (grad,) = torch.autograd.grad(losses, x, upstream)
        close(losses, p.losses, dtype, f"losses, {what}", cancels=cancels)
        exact = p.grads * along(numpy(upstream), p.grads)
        close(grad, exact, dtype, f"gradient, {what}", ulps=128, cancels=cancels, stored=True)


def check_loss(where, criterion, p, dtype, what, cancels=False):
    """The same, and a step of ABLoss on it."""
    check_losses(where, criterion, p, dtype, what, cancels)
    x, target = where.leaf(p.logits), p.target.to(where.device)
    check_robust(where.robust(criterion, dtype, lam=-0.75), oracle.ABLoss(-0.75), x, target, p, dtype, cancels=cancels)


@over(loss=list(LOSSES)[4:], dtype=DTYPES, path=PATHS)
def test_every_loss(where, loss, dtype, path):
    if where.backend == "triton" and dtype != torch.float32:
        raise SkipTest("each kernel costs a second to compile, and the dtypes are those of test_losses")
    p = problem(path, dtype, 3, 2.0, loss)
    check_loss(where, where.fused(loss, path[1], dtype), p, dtype, loss, cancels=loss in CANCELS)


SOFT = {
    "ce": (ab.CrossEntropy, lambda c: {}),
    "weight, smoothing": (ab.CrossEntropy, lambda c: {"weight": class_weight(c), "label_smoothing": 0.1}),
    "vs": (ab.VS, lambda c: {"cls_num_list": counts(c)}),
}


def soft_problem(shape, dtype, loss, seed=0):
    """Logits, probabilities and the module that has them as targets; exact losses and gradients by torch in float64."""
    draw = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=draw, dtype=torch.float64) * 2).to(dtype)
    target = torch.randn(shape, generator=draw, dtype=torch.float64).softmax(1).to(wide(dtype))
    module, given = SOFT[loss]
    options = oracle.vs(counts(shape[1])) if module is ab.VS else given(shape[1])
    exact, x = tensors_of(options, torch.float64), logits.double().requires_grad_()
    a, each = x, (-1, *[1] * (len(shape) - 2))
    if module is ab.VS:
        a = x * exact.pop("scale").view(each) + exact.pop("shift").view(each)
    losses = F.cross_entropy(a, target.double(), reduction="none", **exact)
    (grads,) = torch.autograd.grad(losses.sum(), x)
    valid = np.ones(losses.shape, bool)
    return SimpleNamespace(logits=logits, target=target, options=options, losses=numpy(losses), grads=numpy(grads), valid=valid)


@over(loss=list(SOFT), dtype=DTYPES, path=PATHS)
def test_soft_targets(where, loss, dtype, path):
    if where.backend == "triton" and dtype != torch.float32:
        raise SkipTest("each kernel costs a second to compile, and the dtypes are those of test_losses")
    module, given = SOFT[loss]
    fused = module(**tensors_of(given(path[1]), dtype), backend=where.backend).to(where.device)
    # each class has a term of its own, and the gradients of these cancel
    check_loss(where, fused, soft_problem(path, dtype, loss), dtype, loss, cancels=True)


# ---- the robust loss -------------------------------------------------------------------------------------------------


def check_robust(criterion, exact, x, target, p, dtype, upstream=-3.0, ulps=512, cancels=False, **rows):
    """One step of `criterion` on logits x, next to that of an oracle.ABLoss on exact losses. rows: score, mask, ... (NumPy)."""
    mask = p.valid & rows["mask"] if "mask" in rows else p.valid
    forward = exact(p.losses.ravel(), mask=mask.ravel(), **{k: v.ravel() for k, v in rows.items() if k != "mask"})
    given = {k: torch.from_numpy(v).to(x.device) for k, v in rows.items()}
    value = criterion(x, target, **given)
    (grad,) = torch.autograd.grad(value, x, torch.full_like(value, upstream))
    last = criterion.last
    assert value.dtype == wide(dtype) and value.shape == () and last.weights.shape == p.losses.shape
    # where terms of both signs meet (scores), only their size can be asked for
    size = np.nansum(np.abs(forward.grad * p.losses.ravel()))
    near = ulps * torch.finfo(wide(dtype)).eps * size
    np.testing.assert_allclose(numpy(value), forward.loss, rtol=0, atol=near, err_msg="loss")
    close(last.losses, np.where(mask, p.losses, 0), dtype, "losses", cancels=cancels)
    close(last.weights, forward.weights.reshape(p.losses.shape), dtype, "weights", ulps=ulps)
    close(criterion.log_s, exact.log_s, dtype, "log_s", ulps=ulps)
    close(last.ess, forward.ess, dtype, "ess", ulps=ulps)
    factor = forward.grad.reshape(p.losses.shape) * upstream
    wanted = np.where(along(mask, p.grads) > 0, p.grads * along(factor, p.grads), 0)
    close(grad, wanted, dtype, "gradient", ulps=ulps, cancels=True, stored=True)
    assert int(criterion.nonfinite_batches) == exact.nonfinite_batches


ROBUST = {
    "default": dict(lam=0.75),
    "negative": dict(lam=-0.5, gamma=0.3, alpha=0.5),
    "zero": dict(lam=2.0, init="zero"),
    "batch": dict(lam=0.75, normalizer="batch"),
    "none": dict(lam=-1.0, normalizer="none"),
    "mix": dict(lam=-0.5, mix=1.0),
    "max_weight": dict(lam=0.5, max_weight=1.5),
    "plain": dict(lam=INF),
}
GIVEN = {name: (name,) for name in ("mask", "sample_weight", "score")} | {
    "nothing": (),
    "all": ("mask", "sample_weight", "score"),
}


def given_rows(names, shape, seed):
    rng = np.random.default_rng(seed)
    drawn = dict(mask=rng.random(shape) > 0.2, sample_weight=rng.random(shape) * 2, score=rng.normal(size=shape))
    return {name: drawn[name] for name in names}


def steps_of(where, rule, given, dtype, losses=("ce", "all")):
    """Four steps: logits that one block holds, and more of them."""
    for shape, loss in itertools.product((HELD, BEYOND), losses):
        criterion = where.criterion(loss, shape[1], dtype, **rule)
        exact = oracle.ABLoss(**rule)
        for seed in range(4):
            p = problem(shape, dtype, seed, 2.0, loss)
            rows = given_rows(given, p.target.shape, seed)
            check_robust(criterion, exact, where.leaf(p.logits), p.target.to(where.device), p, dtype, **rows)


@over(dtype={name: DTYPES[name] for name in ("fp32", "fp64", "bf16")}, rule=ROBUST)
def test_robust_loss(where, dtype, rule):
    steps_of(where, rule, (), dtype, ("ce",) if where.backend == "triton" and dtype != torch.float32 else ("ce", "all"))


@over(given=GIVEN)
def test_robust_loss_of_given_rows(where, given):
    steps_of(where, dict(lam=-0.75, mix=0.5), given, torch.float32)
    steps_of(where, dict(lam=0.75, max_weight=2.0), given, torch.float64, ("ce",))


@over(dtype={name: DTYPES[name] for name in ("fp32", "fp64")}, rule=ROBUST)
def test_robust_loss_of_given_losses(where, dtype, rule):
    """Any losses at all: one, some, and more than one launch weighs."""
    for count in (1, 300, ONE_LAUNCH + 617):
        criterion, exact = where.robust(lambda x: x, dtype, **rule), oracle.ABLoss(**rule)
        for seed in range(2):
            rng = np.random.default_rng(seed)
            losses = rng.gamma(2.0, size=count).astype(np.float32).astype(np.float64)
            rows = given_rows(("mask", "sample_weight"), count, seed) if seed else {}
            x = where.leaf(torch.from_numpy(losses).to(dtype))
            forward = exact(losses, **rows)
            value = criterion(x, **{k: torch.from_numpy(v).to(where.device) for k, v in rows.items()})
            value.backward()
            close(value, forward.loss, dtype, "loss", ulps=512)
            close(criterion.last.weights, forward.weights, dtype, "weights", ulps=512)
            close(x.grad, forward.grad, dtype, "gradient", ulps=512)
            close(criterion.log_s, exact.log_s, dtype, "log_s", ulps=512)


@over(dtype=DTYPES, shape=[HELD, BEYOND, (ONE_LAUNCH + 6, 2)])
def test_rows_that_are_not_finite(where, dtype, shape):
    """They are NaN, their neighbours and the state do not notice, and the batch is counted."""
    if where.backend == "triton" and dtype == torch.float64:
        raise SkipTest("each kernel costs a second to compile")
    criterion, exact = where.criterion(lam=-0.75, dtype=dtype), oracle.ABLoss(-0.75)
    for seed, bad in enumerate((None, NAN, INF, None)):
        p = problem(shape, dtype, seed, 2.0)
        logits, losses, grads = p.logits.clone(), p.losses.copy(), p.grads.copy()
        if bad is not None:
            logits[4, int(p.target[4]) - 1] = bad
            losses[4], grads[4] = NAN, NAN
        forward = exact(losses, mask=p.valid)
        x = where.leaf(logits)
        value = criterion(x, p.target.to(where.device))
        value.backward()
        rest = np.arange(shape[0]) != 4 if bad is not None else slice(None)
        close(criterion.last.weights, forward.weights, dtype, "weights", ulps=512)
        close(x.grad[rest], (grads * forward.grad[:, None])[rest], dtype, "gradient", ulps=512, stored=True)
        close(criterion.log_s, exact.log_s, dtype, "log_s", ulps=512)
        assert bad is None or (not value.isfinite() and x.grad[4].isnan().any())
        assert bad is not None or value.isfinite()
        assert int(criterion.nonfinite_batches) == exact.nonfinite_batches


@over(dtype=DTYPES)
def test_nothing_to_do(where, dtype):
    """No rows, none that counts, no pixels: a loss of 0, a gradient of 0, the state as it was."""
    criterion = where.criterion(lam=0.75, dtype=dtype)
    p = problem((9, 37), dtype)
    criterion(where.leaf(p.logits), p.target.to(where.device))
    before = criterion.log_s.clone()
    for shape in ((0, 5), (4, 5), (0, 5, 3), (2, 5, 0), (600, 40)):
        x = torch.randn(shape, device=where.device).to(dtype).requires_grad_()
        target = torch.full((shape[0], *shape[2:]), -100, device=where.device)
        value = criterion(x, target)
        value.backward()
        assert value.item() == 0 and x.grad.shape == x.shape and not x.grad.any() and torch.equal(criterion.log_s, before)
        losses = logit_loss(x, target, backend=where.backend)
        assert losses.shape == target.shape and not losses.any()
        assert not torch.autograd.grad(losses.sum(), x)[0].any()
    empty = torch.zeros(0, dtype=wide(dtype), device=where.device)
    assert robust_weights(empty, before, 0.75, backend=where.backend)[0].shape == (0,)


def test_weights_of_vectors(where):
    for count in [1, 2, 3, 1000, 4096, 4097, ONE_LAUNCH, ONE_LAUNCH + 1] + [100_003, 3_000_001] * where.gpu:
        check_weights(where, count)


@gpu(alone=True)
def test_weights_of_a_hundred_million_losses(where):
    where.need(100_000_000 * 200)
    check_weights(where, 100_000_000)


def check_weights(where, count):
    """Robust weights of so many losses and their vjp, W and log s' both with an upstream gradient."""
    generator = torch.Generator(where.device).manual_seed(count)
    losses = torch.rand(count, generator=generator, device=where.device).mul_(8).requires_grad_()
    mask = torch.rand(count, generator=generator, device=where.device) > 0.3 if count % 2 and count > 1 else None
    d = torch.randn(count, generator=generator, device=where.device)
    for lam, log_s in ((-0.75, -INF), (2.0, 1.3)):
        state = torch.tensor(log_s, device=where.device)
        weights, next_log_s = robust_weights(losses, state, lam, mask=mask, gamma=0.6, alpha=0.5, backend=where.backend)
        (grad,) = torch.autograd.grad((weights, next_log_s), losses, (d, torch.full_like(next_log_s, 3.0)))
        exact_weights, exact_log_s, exact_grad = vjp(losses.detach(), mask, lam, log_s, 0.6, 0.5, d, 3.0)
        torch.testing.assert_close(next_log_s.double(), exact_log_s, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(weights.double(), exact_weights, rtol=2e-5, atol=1e-9)
        torch.testing.assert_close(grad.double(), exact_grad, rtol=2e-5, atol=2e-6 * float(exact_grad.abs().max()))
        if count <= 1000:
            kept = None if mask is None else mask.cpu().numpy()
            exact = oracle.robust_weights(numpy(losses), log_s, lam, gamma=0.6, alpha=0.5, mask=kept)
            close(weights, exact.weights, torch.float32, "weights", ulps=512)
            close(next_log_s, exact.log_s, torch.float32, "log_s", ulps=512)


def vjp(losses, mask, lam, log_s, gamma, alpha, d, u):
    """W, log s' and their vjp in float64, the formulas of the weights written out once more."""
    z = losses.double() / lam
    valid = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    n = valid.sum()
    log_g = z.masked_fill(~valid, -INF).logsumexp(0) - n.double().log()
    share = alpha if log_s == -INF else gamma * alpha
    norm = math.log(share) + log_g
    if log_s != -INF:
        norm = torch.logaddexp(norm, torch.tensor(math.log1p(-gamma) + log_s, dtype=torch.float64, device=losses.device))
    w = torch.where(valid, (z - norm).exp(), 0)
    return w, norm, (w * d - share * w / n * ((w * d).sum() - u)) / lam


# ---- the three stages --------------------------------------------------------------------------------------------------


def stages(where):
    return ops.OPERATORS.get(where.backend, ops.IN_TORCH)


class Parts:
    """Losses in parts whose normaliser is one: totals of each, one settling, weights of each. The numbers may be overwritten."""

    def __init__(self, where, sizes, dtype, *, given=(), seed=0, **options):
        draw = np.random.default_rng(seed)
        self.where, self.options, self.real = where, dict(gamma=0.6, alpha=0.5) | options, wide(dtype)
        self.losses = draw.gamma(2.0, size=sum(sizes)).astype(np.float32).astype(np.float64)
        self.rows = given_rows(given, sum(sizes), seed)
        numbers = {"losses": self.losses} | self.rows
        self.parts = [dict(zip(numbers, some)) for some in zip(*(self.on_device(v).split(sizes) for v in numbers.values()))]
        tensor = partial(torch.tensor, dtype=self.real, device=where.device)
        self.log_s, self.lam, self.nonfinite = tensor(-INF), tensor(0.75), torch.tensor(0, device=where.device)

    def continued(self, exact):
        """From where an oracle.ABLoss is."""
        for number, value in ((self.lam, exact.lam), (self.log_s, exact.log_s), (self.nonfinite, exact.nonfinite_batches)):
            number.fill_(value)
        return self

    def on_device(self, values):
        values = torch.from_numpy(values)
        return values.to(self.where.device, None if values.dtype == torch.bool else self.real)

    def step(self, ranks=1):
        """The loss of all parts, their weights, and d loss / d L."""
        operators, options = stages(self.where), dict(self.options)
        row = lambda part, name: part.get(name)  # noqa: E731
        state, flags = (self.log_s, self.lam), ops.flags(options.get("normalizer", "moving"), options.get("init", "first"))
        totals = torch.stack(
            [operators.robust_totals(p["losses"], row(p, "score"), row(p, "mask"), *state, None) for p in self.parts]
        )
        self.settled = operators.robust_settle(
            totals, self.log_s, self.nonfinite, self.lam, None, options["gamma"], options["alpha"], float(ranks),
            flags | ops.UPDATE,
        )  # fmt: skip
        applied = [
            operators.robust_apply(
                p["losses"], row(p, "score"), row(p, "sample_weight"), row(p, "mask"), self.settled, *state, False,
                options.get("mix", 0.0), options.get("max_weight", INF), ops.WITH_GRAD,
            )
            for p in self.parts
        ]  # fmt: skip
        loss, rows, grads = zip(*applied)
        return sum(loss), torch.cat([r[1] for r in rows]), torch.cat(grads)

    def check(self, exact, dtype, ranks=1):
        forward = exact(self.losses, **self.rows)
        loss, weights, grad = self.step(ranks)
        near = 512 * torch.finfo(self.real).eps * np.nansum(np.abs(forward.grad * self.losses)) * ranks
        np.testing.assert_allclose(numpy(loss), forward.loss * ranks, rtol=0, atol=near)
        close(weights, forward.weights, dtype, "weights", ulps=512)
        close(grad, forward.grad * ranks, dtype, "gradient", ulps=512)
        close(self.log_s, exact.log_s, dtype, "log_s", ulps=512)
        assert int(self.nonfinite) == exact.nonfinite_batches


SIZES_OF_PARTS = {"one": (300,), "uneven": (0, 1, 257, 42), "many": (100, ONE_LAUNCH + 617)}
STAGED = {
    "moving": {},
    "zero, mix": dict(init="zero", mix=0.5),
    "batch": dict(normalizer="batch", max_weight=1.5),
    "none": dict(normalizer="none"),
}


@over(sizes=SIZES_OF_PARTS, options=STAGED, dtype={name: DTYPES[name] for name in ("fp32", "fp64")})
def test_three_stages(where, sizes, options, dtype):
    """Totals, settle, apply by themselves: the parts of a batch are that batch, from one rank's side and from one of two."""
    for lam, given in ((0.75, ()), (-0.5, ("mask", "sample_weight", "score")), (INF, ("sample_weight",))):
        exact = oracle.ABLoss(lam, **dict(gamma=0.6, alpha=0.5) | options)
        for seed in range(2):
            Parts(where, sizes, dtype, given=given, seed=seed, **options).continued(exact).check(exact, dtype, ranks=1 + seed)


@over(sizes=SIZES_OF_PARTS, dtype={name: DTYPES[name] for name in ("fp32", "fp64")})
def test_a_bad_row_in_one_of_the_parts(where, sizes, dtype):
    """Is NaN, the others are weighed without it, log s stays, and the batch is counted."""
    exact = oracle.ABLoss(0.75, gamma=0.6, alpha=0.5)
    for seed, bad in enumerate((None, NAN, INF, None)):
        parts = Parts(where, sizes, dtype, seed=seed).continued(exact)
        if bad is not None:
            parts.losses[-3] = bad
            parts.parts[-1]["losses"][-3] = bad
        before = parts.log_s.clone()
        parts.check(exact, dtype)
        assert torch.equal(before, parts.log_s) == (bad is not None)


@over(dtype={name: DTYPES[name] for name in ("fp32", "fp64")})
def test_rows_beyond_what_is_settled(where, dtype):
    """Where a normaliser is settled already, z that lie 60 above it count as bad in totals and in weights."""
    operators, parts = stages(where), Parts(where, (300,), dtype)
    parts.step()
    losses = parts.parts[0]["losses"].clone()
    losses[7] = 0.75 * (float(parts.settled[2]) + 1)
    log_sum, n, bad = operators.robust_totals(losses, None, None, parts.log_s, parts.lam, parts.settled).tolist()
    kept = np.delete(parts.losses, 7) / 0.75
    assert (n, bad) == (299, 1)
    np.testing.assert_allclose(log_sum, oracle.logsumexp(kept), rtol=1e-12 if dtype == torch.float64 else 1e-6)
    _, rows, grad = operators.robust_apply(
        losses, None, None, None, parts.settled, parts.log_s, parts.lam, True, 0.0, INF, ops.WITH_GRAD
    )
    assert rows[1][7].isnan() and grad[7].isnan() and int(grad.isnan().sum()) == 1


# ---- rectified weights -----------------------------------------------------------------------------------------------


def rectified(where, products):
    return (reference if where.backend == "reference" else ops.OPERATORS[where.backend]).rectified(products)


@over(dtype=["fp32", "fp64"])
def test_rectified_weights(where, dtype):
    """Those of L2RW, from no sample to millions; with products that are not finite, and where nothing is positive."""
    dtype = DTYPES[dtype]
    for count in (0, 1, 3, 17, 1000, 20000, *[3_000_001] * where.gpu):
        generator = torch.Generator(where.device).manual_seed(count)
        u = torch.randn(count, generator=generator, device=where.device, dtype=dtype)
        u[2:3], u[500:501], u[-3:-2] = NAN, INF, -INF
        w = rectified(where, u)
        exact = torch.from_numpy(oracle.rectified(numpy(u))).to(where.device)
        rtol = 2e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(w.double(), exact, rtol=rtol, atol=0, equal_nan=True)
        assert w.dtype == dtype and not rectified(where, -u.nan_to_num().abs()).any()
        assert torch.equal(w.nan_to_num(), rectified(where, u).nan_to_num())


@over(dtype=["fp32", "fp64"])
def test_rectified_weights_of_extreme_products(where, dtype):
    """Subnormal numbers are none that count for 0, and the largest ones do not overflow."""
    info = torch.finfo(DTYPES[dtype])
    for u, count in itertools.product((info.smallest_normal * info.eps, info.smallest_normal, info.max), (1, 3, 1000)):
        w = rectified(where, torch.full((count,), u, dtype=DTYPES[dtype], device=where.device))
        torch.testing.assert_close(w, torch.full_like(w, 1 / count), rtol=2 * info.eps, atol=0)


@gpu
def test_rectified_weights_launches_and_waits(where):
    """One launch, nobody waits, and a captured graph follows the products."""
    with unpoisoned():
        u = torch.randn(1000, device=where.device)
        run = partial(rectified, where, u)
        for _ in range(2):
            run()
        seen = device_tools.kernels(where.device, run)
        assert len(seen) == 1, f"{seen}"
        assert device_tools.waits(where.device, run) == []
        out = torch.empty_like(u)
        replay, _ = device_tools.captured(where.device, lambda: out.copy_(run()), warm_up=3)
        for _ in range(2):
            u.normal_()
            replay()
            assert torch.equal(out, run())


# ---- labels out of range ---------------------------------------------------------------------------------------------


@over(shape=[HELD, BEYOND, (ONE_LAUNCH + 6, 3)], label=["one too many", "negative", "huge"])
def test_label_out_of_range(where, shape, label):
    """The CPU raises at once. A GPU ignores the row, a later call raises, once, and everything goes on."""
    p = problem(shape, torch.float32)
    label = {"one too many": shape[1], "negative": -1, "huge": 2**40}[label]
    bad = p.target.clone()
    bad[3] = label
    good, bad = p.target.to(where.device), bad.to(where.device)
    criterion = where.criterion(lam=0.75)
    for form in (partial(logit_loss, backend=where.backend), criterion):
        x = where.leaf(p.logits)
        if not where.gpu:
            raises(IndexError, (f"label {label} in row 3", f"< {shape[1]}"), lambda: form(x, bad))
            continue
        value = form(x, bad)
        value.sum().backward()
        where.synchronize()
        assert not x.grad[3].any() and x.grad[0].any()
        rows = value if value.dim() else criterion.last.weights
        assert rows[3] == 0 and rows[0] > 0 and value.isfinite().all()
        raises(IndexError, (f"label {label} in row 3", "earlier", f"< {shape[1]}"), lambda: form(x, good))
        form(x, good)
    x = where.leaf(p.logits)
    criterion(x, good).backward()
    where.synchronize()
    assert x.grad[3].any()


def linear(where):
    """LinearABLoss as a function of logits: hidden, with the unit matrix as weight."""
    criterion = ab.LinearABLoss(lam=0.75, backend=where.backend).to(where.device)

    def call(x, target):
        return criterion(x, torch.eye(x.shape[1], device=x.device), target)

    call.deferred = False
    return call


FORMS = {
    **{loss: partial(Where.criterion, loss=loss, classes=HELD[1], lam=0.75) for loss in LOSSES},
    "deferred": partial(Where.criterion, lam=0.75, deferred=True),
    "term": lambda where: where.robust(ab.CrossEntropy(backend=where.backend), rule=partial(ab.weights.term, t=0.5)),
    "cvar": lambda where: where.robust(ab.CrossEntropy(backend=where.backend), rule=partial(ab.weights.cvar, beta=0.3)),
    "linear": linear,
}


@over(form=FORMS)
def test_label_out_of_range_in_every_form(where, form):
    """The row is ignored where it cannot be refused, a later call raises, and the training goes on as if it had been ignored."""
    if where.backend == "triton" and form not in (FORMS["ce"], FORMS["all"], FORMS["deferred"], FORMS["cvar"]):
        raise SkipTest("each kernel costs a second to compile")
    p = problem(HELD, torch.float32)
    ours, twin = form(where), form(where)
    ignore_index = getattr(getattr(ours, "criterion", None), "ignore_index", -100)
    good = p.target.clamp(min=1).to(where.device)  # 0 is ignored by one of them
    bad, ignored = good.clone(), good.clone()
    bad[3], ignored[3] = HELD[1], ignore_index
    logits = p.logits.nan_to_num(0)

    def run(form, target):
        x = where.leaf(logits)
        value = form(x, target)
        value.backward()
        return value.detach(), x.grad

    if where.gpu:
        wanted, found = run(twin, ignored), run(ours, bad)  # in this order: whoever calls next is told of the label
        where.synchronize()
        torch.testing.assert_close(found, wanted)
        assert not found[1][3].any() and found[1][0].any()
    words = (f"label {HELD[1]} in row 3", f"< {HELD[1]}") + ("earlier",) * where.gpu
    raises(IndexError, words, lambda: ours(where.leaf(logits), good if where.gpu else bad))
    for criterion in (ours, twin):
        if criterion.deferred:
            criterion.discard()
    torch.testing.assert_close(run(ours, good), run(twin, good))
    where.synchronize()
    run(ours, good)


@gpu
def test_a_batch_on_another_device_than_the_state(where):
    """Is refused in words, and the right call afterwards works."""
    p = problem(HELD, torch.float32)
    x, target = where.leaf(p.logits), p.target.to(where.device)
    criterion, head = ab.ABLoss(lam=0.75), ab.LinearABLoss(lam=0.75)
    weight = torch.eye(HELD[1], device=where.device)
    for form in (lambda: criterion(x, target), lambda: head(x, weight, target)):
        raises(ValueError, (f"got a batch on {x.device}", "its state is on cpu", f"criterion.to('{x.device}')"), form)
    elsewhere = ("target: got a tensor on cpu", f"expected {x.device}")
    raises(ValueError, elsewhere, lambda: logit_loss(x, p.target, backend=where.backend))
    on_device = where.criterion(lam=0.75)
    raises(ValueError, ("cpu",), lambda: on_device(x, p.target))  # Triton's launcher has words of its own
    raises(ValueError, ("sample_weight",), lambda: on_device(x, target, sample_weight=torch.ones(HELD[0])))
    assert on_device.log_s == -INF
    check_robust(on_device, oracle.ABLoss(0.75), x, target, p, torch.float32)


# ---- the graph of autograd -------------------------------------------------------------------------------------------


@over(dtype=[torch.float32, torch.bfloat16, torch.float16], shape=[HELD, BEYOND])
def test_backward_again(where, dtype, shape):
    """With retain_graph each backward is the same function of its upstream, whatever was done to earlier gradients."""
    p = problem(shape, dtype)
    target, alone = p.target.to(where.device), ab.CrossEntropy(backend=where.backend)
    torchs = where.robust(partial(F.cross_entropy, reduction="none"), lam=0.75)
    for form in (alone, where.criterion(lam=0.75), torchs):
        x = where.leaf(p.logits.nan_to_num(0))
        value = form(x, target)
        again = partial(torch.autograd.grad, value, x)
        (first,) = again(torch.full_like(value, 4.0), retain_graph=True)
        kept = first.clone()
        first.zero_()  # a gradient handed out belongs to the caller
        (second,) = again(torch.full_like(value, 4.0), retain_graph=True)
        assert torch.equal(second, kept) and kept.abs().max() > 0
        (third,) = again(torch.full_like(value, -2.0))
        torch.testing.assert_close(third, kept * -0.5, rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert torch.equal(second, kept)


def test_two_uses_of_one_loss(where):
    """A value used twice, and logits used by two losses: gradients add up."""
    p = problem(BEYOND, torch.float32)
    target = p.target.to(where.device)
    x, criterion = where.leaf(p.logits), where.criterion(lam=0.75, normalizer="batch")
    value = criterion(x, target)
    (value + 2 * value).backward()
    tripled, x.grad = x.grad, None
    (criterion(x, target) + criterion(x, target)).backward()
    torch.testing.assert_close(tripled / 3, x.grad / 2, rtol=1e-5, atol=1e-8)


@over(compiler=["aot_eager"] + ["inductor"] * torch.cuda.is_available(), batch=[8, 500 if torch.cuda.is_available() else 9])
def test_compiles_into_one_graph(where, compiler, batch):
    if compiler == "inductor" and where.backend != "cuda":
        raise SkipTest("costs ten seconds; the graph is that of aot_eager")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 40).to(where.device)
    x, target = torch.randn(batch, 20, device=where.device), torch.randint(40, (batch,), device=where.device)
    results = []
    with unpoisoned(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for compiled in (False, True):
            criterion = where.criterion(lam=-0.5)
            run = step = lambda x, y, criterion=criterion: criterion(model(x), y)  # noqa: E731
            if compiled:
                run = torch.compile(step, fullgraph=True, backend=compiler, dynamic=False)
            for _ in range(3):
                model.zero_grad()
                loss = run(x, target)
                loss.backward()
            results.append((loss.detach(), criterion.log_s, model.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


# ---- the step --------------------------------------------------------------------------------------------------------

# one element, none, less than an access, no multiple of one, a chunk of 2048 and one more, several chunks
SIZES = [(), (1,), (0,), (3,), (17, 5, 3), (64, 64), (2049,), (20_000,)]
OPTIONS = {
    "plain": dict(momentum=0.0),
    "decay": dict(momentum=0.0, weight_decay=0.1),
    "momentum": dict(momentum=0.9, weight_decay=0.05),
    "dampening": dict(momentum=0.8, dampening=0.3, weight_decay=0.01),
    "nesterov": dict(momentum=0.9, nesterov=True, weight_decay=0.01),
    "maximize": dict(momentum=0.5, maximize=True, weight_decay=0.01),
    "tensor lr": dict(momentum=0.9, lr=None),  # on the device
}


def parameters(where, sizes=SIZES, dtype=torch.float64, seed=0, offset=0):
    """Equal for equal seeds, whatever the dtype; `offset` elements into their memory."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for size in sizes:
        values = torch.randn(size, generator=generator)
        place = torch.zeros(values.numel() + offset, dtype=dtype, device=where.device)[offset:].view(size)
        out.append(torch.nn.Parameter(place.copy_(values)))
    return out


def set_grads(*models, seed, skip=0.0):
    """The same gradients for each list of parameters; each is None with probability `skip`."""
    generator = torch.Generator().manual_seed(seed)
    for tensors in zip(*models):
        none = torch.rand((), generator=generator) < skip
        grad = torch.randn(tensors[0].shape, generator=generator)
        for p in tensors:
            p.grad = None if none else grad.to(p.device, p.dtype, copy=True)


def torch_sgd(params, **options):
    return torch.optim.SGD(params, **{"lr": 0.02, "foreach": True} | options)


OPTIMIZERS = {
    "adam": (ab.ABAdam, torch.optim.Adam, dict(lr=2**-6, weight_decay=0.01)),
    "adam, amsgrad": (ab.ABAdam, torch.optim.Adam, dict(lr=2**-6, amsgrad=True, maximize=True)),
    "adamw": (ab.ABAdamW, torch.optim.AdamW, dict(lr=2**-6, betas=(0.5, 0.75))),
    "rmsprop": (ab.ABRMSprop, torch.optim.RMSprop, dict(lr=2**-6)),
    "rmsprop, all": (ab.ABRMSprop, torch.optim.RMSprop, dict(lr=2**-6, momentum=0.5, centered=True, weight_decay=0.01)),
    "adagrad": (ab.ABAdagrad, torch.optim.Adagrad, dict(lr=2**-6, lr_decay=0.1, weight_decay=0.01)),
}


def same(ours, theirs, tolerance, slack=1):
    """Parameters and all states of two optimizers; slack: of the states' absolute error, in tolerances."""
    pairs = zip(*([p for group in optimizer.param_groups for p in group["params"]] for optimizer in (ours, theirs)))
    for p, q in pairs:
        torch.testing.assert_close(p.double(), q.double(), rtol=tolerance, atol=tolerance)
        kept = {name: value for name, value in theirs.state[q].items() if value is not None}
        assert ours.state[p].keys() == kept.keys()
        for name, value in kept.items():
            given = ours.state[p][name].to(value.device, value.dtype)
            message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
            torch.testing.assert_close(given, value, rtol=tolerance, atol=slack * tolerance, msg=message)


def check_steps(where, rule, dtype, offset=0):
    """Two steps of one of OPTIMIZERS or the like."""
    make, torch_make, options = rule
    params, expected = parameters(where, dtype=dtype, offset=offset), parameters(where)
    ours = make(params, **options, backend=where.backend)
    theirs = torch_make(expected, **options, foreach=False)
    for step in range(2):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
    double, slack = (1e-13, 10) if make is ab.ABSGD else (1e-12, 1)
    same(ours, theirs, 1e-5 if dtype == torch.float32 else double, slack)


def paths(where):
    """Both ways to the kernel: the table that a StepPlan keeps, and lists of tensors."""
    yield lambda: patch.object(_backend, "host", _backend.host)
    if where.backend == "cuda" and _backend.host() is not None:
        yield lambda: patch.object(_backend, "host", lambda: None)


@over(options=OPTIONS, dtype={"fp32": torch.float32, "fp64": torch.float64}, offset=[0, 1])
def test_step(where, options, dtype, offset):
    """40 steps, gradients missing now and then; on the way the state moves into torch's class and back again.

    (Fewer on the CPU, where test_optim.py takes them all.)"""
    lr = 2**-6  # exact in float32 too
    options = dict(lr=lr) | options
    if options["lr"] is None:
        options["lr"] = torch.tensor(lr, device=where.device)
    for path in paths(where):
        with path():
            params, expected = parameters(where, dtype=dtype, offset=offset), parameters(where)
            ours = ab.ABSGD(params, **options, backend=where.backend)
            theirs = torch_sgd(expected, **options | {"lr": lr})
            for step in range(40 if where.gpu else 10):
                if step == 5:
                    guest = torch_sgd(params, lr=99.0)
                    guest.load_state_dict(ours.state_dict())
                    for inner in range(5):
                        set_grads(params, expected, seed=1000 + inner)
                        guest.step()
                        theirs.step()
                    ours = ab.ABSGD(params, lr=99.0, backend=where.backend)
                    ours.load_state_dict(guest.state_dict())
                set_grads(params, expected, seed=step, skip=0.2)
                ours.step()
                theirs.step()
            same(ours, theirs, 1e-5 if dtype == torch.float32 else 1e-13, slack=10)


@over(rule=OPTIMIZERS, dtype={"fp32": torch.float32, "fp64": torch.float64}, offset=[0, 1])
def test_rules_of_the_step(where, rule, dtype, offset):
    """20 steps, gradients missing now and then, a checkpoint on the way; the lr in a tensor on the device, which changes."""
    make, torch_make, options = rule
    for path in paths(where):
        with path():
            params, expected = parameters(where, dtype=dtype, offset=offset), parameters(where)
            lr = torch.tensor(options["lr"], device=where.device)
            ours = make(params, **options | {"lr": lr}, backend=where.backend)
            theirs = torch_make(expected, **options, foreach=False)
            for step in range(20 if where.gpu else 6):
                if step == 3:
                    saved = copy.deepcopy(ours.state_dict())
                    ours = make(params, lr=99.0, backend=where.backend)
                    ours.load_state_dict(saved)
                    ours.param_groups[0]["lr"] = lr
                lr.fill_(options["lr"] * 2.0**-step)
                theirs.param_groups[0]["lr"] = options["lr"] * 2.0**-step
                set_grads(params, expected, seed=step, skip=0.2)
                ours.step()
                theirs.step()
            same(ours, theirs, 1e-5 if dtype == torch.float32 else 1e-12)


@over(
    rule=OPTIMIZERS | {"sgd": (ab.ABSGD, torch.optim.SGD, dict(lr=2**-6, momentum=0.5))},
    dtype={"bf16": torch.bfloat16, "fp16": torch.float16},
)
def test_rules_of_the_step_in_half_precision(where, rule, dtype):
    """States in float32 as exact as such, and each step's parameters correctly rounded: torch's, from the same ones, in float64."""
    make, torch_make, options = rule
    params, expected = parameters(where, dtype=dtype), parameters(where)
    ours = make(params, **options, backend=where.backend)
    theirs = torch_make(expected, **options, foreach=False)
    for step in range(4):
        with torch.no_grad():
            for p, q in zip(params, expected):
                q.copy_(p)
        set_grads(params, expected, seed=step)
        for p, q in zip(params, expected):
            q.grad.copy_(p.grad)
        ours.step()
        theirs.step()
        for p, q in zip(params, expected):
            torch.testing.assert_close(p.double(), q, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-7)
            for name, value in theirs.state[q].items():
                if value is not None and name != "step":
                    assert ours.state[p][name].dtype == torch.float32
                    torch.testing.assert_close(ours.state[p][name].double(), value, rtol=1e-5, atol=1e-5)  # sums of terms near 1


def test_heavy_ball_is_equation_2(where):
    """w_{t+1} = w_t - lr_t (G + wd w_t) + beta (w_t - w_{t-1}), with an lr that changes."""
    beta, decay = 0.9, 0.01
    params = parameters(where)
    optimizer = ab.ABSGD(params, lr=0.1, momentum=beta, weight_decay=decay, heavy_ball=True, backend=where.backend)
    now = [p.detach().clone() for p in params]
    before = [p.clone() for p in now]
    for step in range(20):
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        set_grads(params, seed=step)
        optimizer.step()
        after = [w - lr * (p.grad + decay * w) + beta * (w - v) for w, v, p in zip(now, before, params)]
        before, now = now, after
    for p, w in zip(params, now):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_groups(where):
    """More than a launch holds (16), with options of their own; two groups of both dtypes; a gradient in another layout."""

    def groups(ps):
        some = [dict(params=[p], lr=0.01 * (j + 1), weight_decay=0.1 * (j % 3)) for j, p in enumerate(ps[8:])]
        return [dict(params=ps[:4], lr=0.5, momentum=0.0), dict(params=ps[4:8], nesterov=True, weight_decay=0.1), *some]

    sizes = [*SIZES, *[(j % 5 + 1, 7) for j in range(20)]]
    params = parameters(where, sizes, torch.float32)
    params[::2] = [torch.nn.Parameter(p.detach().double()) for p in params[::2]]
    expected = parameters(where, sizes)
    ours = ab.ABSGD(groups(params), lr=0.1, momentum=0.7, backend=where.backend)
    theirs = torch_sgd(groups(expected), lr=0.1, momentum=0.7)
    for step in range(4):
        set_grads(params, expected, seed=step)
        params[5].grad = params[5].grad.T.contiguous().T
        ours.step()
        theirs.step()
    same(ours, theirs, 1e-5, slack=10)


def test_many_tensors(where):
    """More than one launch holds (900), some of them empty."""
    sizes = [(j % 7 * 13,) for j in range(2003)]
    params, expected = parameters(where, sizes, torch.float32), parameters(where, sizes)
    ours = ab.ABSGD(params, lr=0.1, weight_decay=0.01, backend=where.backend)
    theirs = torch_sgd(expected, lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
    together = [torch.cat([p.detach().double() for p in ps]) for ps in (params, expected)]
    torch.testing.assert_close(*together, rtol=1e-5, atol=1e-5)


def test_memory_shared_by_two_parameters(where):
    """Updated one after the other, as torch's own loop does."""
    memory = [torch.linspace(-1, 1, 20_000, dtype=torch.float64, device=where.device) for _ in range(2)]
    params, expected = ([torch.nn.Parameter(m[:15_000]), torch.nn.Parameter(m[5_000:])] for m in memory)
    ours = ab.ABSGD(params, lr=0.1, momentum=0.9, weight_decay=0.3, backend=where.backend)
    theirs = torch_sgd(expected, lr=0.1, momentum=0.9, weight_decay=0.3, foreach=False)
    for step in range(4):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
    torch.testing.assert_close(*memory, rtol=1e-12, atol=1e-12)


@over(
    rule=OPTIMIZERS
    | {f"sgd, dampening {d}": (ab.ABSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=d)) for d in (0.0, 0.5)}
)
def test_grad_scaler(where, rule):
    """The first step skipped, another one later, gradients unscaled by hand in between: as torch's unfused loop."""
    make, torch_make, options = rule
    for path in paths(where):
        with path():
            params, expected = (parameters(where, dtype=torch.float32) for _ in range(2))
            ours, theirs = make(params, **options, backend=where.backend), torch_make(expected, **options, foreach=False)
            scalers = [torch.amp.GradScaler(where.device.type, init_scale=4.0, growth_interval=2) for _ in range(2)]
            for step in range(8):
                for ps, optimizer, scaler in ((params, ours, scalers[0]), (expected, theirs, scalers[1])):
                    set_grads(ps, seed=step)
                    scaler.scale(torch.ones((), device=where.device))
                    for p in ps:
                        p.grad *= scaler.get_scale()
                    if step in (0, 4):
                        ps[5].grad[0, 0] = INF
                    if step == 6:
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
                for p, q in zip(params, expected):
                    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


# ---- the weighted step -------------------------------------------------------------------------------------------------


class Weighted:
    """Parameters, momentum and per-sample gradients on the device, and the same in float64 for plain torch on the CPU."""

    def __init__(self, where, sizes, rows, dtype, gap=0, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.where, device, real = where, where.device, wide(dtype)
        self.params, self.buffers = ([torch.randn(n, generator=draw).to(device, d) for n in sizes] for d in (dtype, real))
        self.grads = [torch.randn(rows, n + gap, generator=draw).to(device, dtype)[:, :n] for n in sizes]
        self.losses = (3 * torch.rand(rows, generator=draw)).to(device, real)
        self.log_s = torch.tensor(-INF, dtype=real, device=device)

    def step(self, **options):
        self.log_s = weighted_momentum_step_(
            self.params, self.buffers, self.grads, self.losses, self.log_s, **dict(lam=-0.75, lr=2**-6) | options,
            backend=self.where.backend,
        )  # fmt: skip

    def check(self, **options):
        """One step, from where this one is, in float64."""
        cpu = lambda t: t.to("cpu", torch.float64) if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
        exact = [[cpu(t) for t in ts] for ts in (self.params, self.buffers, self.grads)]
        given = {k: v.cpu() if k == "mask" else cpu(v) for k, v in options.items()}
        log_s = weighted_momentum_step_(
            *exact, cpu(self.losses), cpu(self.log_s), **dict(lam=-0.75, lr=2**-6) | given, backend="reference"
        )
        self.step(**options)
        real = dict(rtol=1e-12, atol=1e-12) if self.losses.dtype == torch.float64 else dict(rtol=1e-5, atol=1e-5)
        half = {torch.bfloat16: dict(rtol=2**-7, atol=1e-5), torch.float16: dict(rtol=2**-9, atol=1e-5)}
        torch.testing.assert_close(cpu(self.log_s), log_s, **real)
        for t, e in zip([*self.params, *self.buffers], exact[0] + exact[1]):
            torch.testing.assert_close(cpu(t), e, **half.get(t.dtype, real))


WEIGHTED = {
    "momentum": dict(weight_decay=0.01),
    "plain": dict(momentum=0.0, maximize=True),
    "nesterov": dict(nesterov=True, mix=0.5),
    "heavy ball": dict(heavy_ball=True, init="zero"),
}


@over(options=WEIGHTED, dtype=DTYPES, gap=[0, 1])
def test_weighted_step(where, options, dtype, gap):
    """Few and many columns (of which a block has some, and of which the blocks fill the chip), rows of odd addresses, rows that
    hold NaN and do not count."""
    sizes = [0, 1, 5, 64, 650, 4099]
    if where.gpu:  # the CPU's answer in float64 takes its time: only the blocks of our own kernel are to fill the chip
        sizes.append(600_000 if where.backend == "cuda" else 60_000)
    problem = Weighted(where, sizes, 37, dtype, gap)
    mask, weight = torch.arange(37, device=where.device) % 5 != 2, torch.linspace(0, 2, 37, device=where.device)
    for g in problem.grads:
        g[~mask] = NAN
        g[0] = NAN
    for _ in range(3):
        problem.check(mask=mask, sample_weight=weight, **options)


@over(rows=[1, 1025, ONE_LAUNCH + 3])
def test_weighted_step_of_many_rows(where, rows):
    problem = Weighted(where, [3, 40], rows, torch.float32)
    for _ in range(2):
        problem.check(weight_decay=0.1)
    before = [t.clone() for t in [*problem.params, *problem.buffers, problem.log_s]]
    problem.losses[rows // 2] = NAN
    problem.step()
    assert all(torch.equal(a, b) for a, b in zip(before, [*problem.params, *problem.buffers, problem.log_s]))


@gpu
def test_weighted_step_launches_and_waits(where):
    """One launch of CUDA's, two of Triton's (the weights apart) beside what copies its state; nobody waits, and a captured graph
    follows lr."""
    with unpoisoned():
        problem, twin = (Weighted(where, [5 + j % 300 for j in range(161)], 64, torch.float32) for _ in range(2))
        lr = [torch.tensor(2**-6, device=where.device) for _ in range(2)]
        for _ in range(2):
            problem.step(lr=lr[0])
        seen = device_tools.kernels(where.device, lambda: problem.step(lr=lr[0]))
        assert where.backend != "cuda" or len(seen) == 1, f"{seen}"
        assert device_tools.waits(where.device, lambda: problem.step(lr=lr[0])) == []
        problem = Weighted(where, [5 + j % 300 for j in range(161)], 64, torch.float32)
        state = problem.log_s.zero_()

        def captured():
            problem.log_s = state
            problem.step(lr=lr[0])
            state.copy_(problem.log_s)

        replay, _ = device_tools.captured(where.device, captured, warm_up=3)
        twin.log_s.zero_()
        for _ in range(3):
            twin.step(lr=lr[1])
        for k in range(4):
            for number in lr:
                number.fill_(2**-6 / (1 + k))
            twin.step(lr=lr[1])
            replay()
            assert torch.equal(state, twin.log_s)
            assert all(torch.equal(a, b) for a, b in zip([*problem.params, *problem.buffers], [*twin.params, *twin.buffers]))


# ---- a training step as a whole --------------------------------------------------------------------------------------


class Loop:
    """A training whose model has no matrix product, so that every bit of it is ours or elementwise: logits = x w + b."""

    def __init__(self, where, shape, optimizer=ab.ABSGD, lr=0.1):
        self.shape, device = shape, where.device
        generator = torch.Generator().manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator).to(device)  # noqa: E731
        self.w, self.b = torch.nn.Parameter(draw(shape[1])), torch.nn.Parameter(draw(shape[1]))
        self.batches = [(draw(*shape), torch.randint(shape[1], shape[:1], generator=generator).to(device)) for _ in range(4)]
        self.x, self.y = (t.clone() for t in self.batches[0])
        self.lr = torch.tensor(lr, device=device)
        self.criterion = where.criterion(lam=-0.75)
        self.optimizer = optimizer([self.w, self.b], lr=self.lr, weight_decay=0.01, backend=where.backend)

    def step(self):
        self.optimizer.zero_grad()
        loss = self.criterion(self.x * self.w + self.b, self.y)
        loss.backward()
        self.optimizer.step()
        return loss

    def feed(self, k):
        for static, new in zip((self.x, self.y), self.batches[k % 4]):
            static.copy_(new)

    def change(self, k):
        """Another batch, lr and lambda."""
        self.feed(k)
        self.lr.fill_(0.1 / (1 + k))
        self.criterion.set_lam(-0.75 + 0.05 * k, reset=False)

    def state(self):
        """{name: tensor}"""
        states = {f"{name} of {p}": t for p, q in (("w", self.w), ("b", self.b)) for name, t in self.optimizer.state[q].items()}
        return {"w": self.w, "b": self.b, "log s": self.criterion.log_s} | states


class Micro(Loop):
    """The same in deferred micro-batches of these sizes, finished in the optimizer's kernel or (`finish`) by finish_."""

    def __init__(self, where, sizes, classes, optimizer=ab.ABSGD, finish=False, lam=-0.75, **options):
        super().__init__(where, (sum(sizes), classes))
        self.sizes, self.finish = sizes, finish
        self.criterion = where.criterion(lam=lam, deferred=True)
        ours = {} if optimizer.__module__.startswith("torch") else {"backend": where.backend}
        robust = {} if finish else {"robust": self.criterion}
        self.optimizer = optimizer([self.w, self.b], **{"lr": self.lr} | options, **ours, **robust)

    def accumulate(self):
        self.optimizer.zero_grad()
        total = 0
        for x, y in zip(self.x.split(self.sizes), self.y.split(self.sizes)):
            loss = self.criterion(x * self.w + self.b, y)
            loss.backward()
            total = total + loss.detach()
        return total

    def step(self):
        total = self.accumulate()
        if self.finish:
            self.criterion.finish_([self.w, self.b])
        self.optimizer.step()
        return total


MICRO = {"uneven": (7, 5, 25), "first empty": (0, 12, 25), "second empty": (12, 0, 25), "many rows": (300, 1, ONE_LAUNCH + 316)}
# eps is far above the rounding of a gradient: Adam's first step is lr g / (|g| + eps), where a g of rounding alone were a step
WITH_EPS = {name: (*kinds, options | {"eps": 1e-4}) for name, (*kinds, options) in OPTIMIZERS.items()}
SGDS = {
    "robust=": (ab.ABSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.01), False),
    "finish_": (ab.ABSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.01), True),
    "finish_, torch's": (torch.optim.SGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9), True),
}


@over(way=SGDS | {name: (*rest, False) for name, rest in WITH_EPS.items()}, sizes=MICRO)
def test_deferred(where, way, sizes):
    """Uneven micro-batches, an empty one first, more rows than a launch weighs: one batch in float64 and torch's optimizer.
    A bad row then leaves everything as it was, and the step after that is as if it had not been."""
    optimizer, torchs, options, finish = way
    micro = Micro(where, sizes, 10, optimizer, finish, **options)
    params = [torch.nn.Parameter(p.detach().cpu().double()) for p in (micro.w, micro.b)]
    criterion, plain = ab.ABLoss(lam=-0.75, backend="reference").double(), torchs(params, **options)

    def step(k):
        micro.feed(k)
        micro.step()
        plain.zero_grad()
        criterion(micro.x.cpu().double() * params[0] + params[1], micro.y.cpu()).backward()
        plain.step()
        for p, q in zip((micro.w, micro.b), params):
            torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=2e-5, atol=2e-5)
        close(micro.criterion.log_s, numpy(criterion.log_s), torch.float32, "log_s", ulps=512, cancels=True)
        last = numpy(criterion.last.weights)[-sizes[-1] :]
        np.testing.assert_allclose(numpy(micro.criterion.last.weights), last, rtol=1e-4)

    for k in range(3):
        step(k)
    before = [t.clone() for t in micro.state().values()]
    micro.feed(3)
    micro.x[-1, 0] = NAN
    if finish:
        micro.accumulate()
        assert not micro.criterion.finish_([micro.w, micro.b])
        assert all(p.grad is None or p.grad.isnan().all() for p in (micro.w, micro.b))  # the host does not know on a GPU
        assert not where.gpu or micro.w.grad is not None
    else:
        micro.step()
    assert all(torch.equal(a, b) for a, b in zip(before, micro.state().values()))
    assert int(micro.criterion.nonfinite_batches) == 1
    step(3)


# ---- LinearABLoss ------------------------------------------------------------------------------------------------------


class Head:
    """A linear head and its targets, some of them ignored; the sizes make several chunks."""

    def __init__(self, where, dtype, bias, loss="ce", seed=0, **options):
        rows, width, classes = (1100, 48, 3000) if where.gpu else (130, 12, 60)
        draw = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
        numbers = [randn(rows, width), randn(classes, width) * 0.4, randn(classes) if bias else None]
        self.given = [None if t is None else where.leaf(t.to(dtype)) for t in numbers]
        target = torch.randint(classes, (rows,), generator=draw)
        target[3::11] = -100
        self.target, self.where, self.wanted = target.to(where.device), where, [t for t in self.given if t is not None]
        criterion = ab.LinearABLoss(where.fused(loss, classes, dtype), chunk=rows // 4 + 5, backend=where.backend,
                                    **{"lam": 0.6} | options)  # fmt: skip
        criterion = criterion.to(where.device)
        self.criterion = criterion.double() if dtype == torch.float64 else criterion

    def step(self):
        hidden, weight, bias = self.given
        loss = self.criterion(hidden, weight, self.target, bias)
        return loss, *torch.autograd.grad(loss, self.wanted)

    def plain(self, criterion):
        """The same of ABLoss on stored logits in float64 on the CPU."""
        given = [None if t is None else t.detach().cpu().double().requires_grad_() for t in self.given]
        loss = criterion(F.linear(*given), self.target.cpu())
        return loss, *torch.autograd.grad(loss, [t for t in given if t is not None])

    def change(self, k):
        draw = torch.Generator().manual_seed(100 + k)
        with torch.no_grad():
            for t in self.given[:2]:
                t.copy_(torch.randn(t.shape, generator=draw) * 0.5)

    def state(self):
        return {"log s": self.criterion.log_s, "weights": self.criterion.last.weights}


def relative(got, exact):
    """Distance over length: single elements of a gradient cancel."""
    got, exact = got.detach().cpu().double(), exact.detach().double()
    return float((got - exact).norm() / exact.norm().clamp(min=1e-300))


@over(
    loss=["ce", "focal", "gce, pruned", "ldam"],
    dtype={name: DTYPES[name] for name in ("fp32", "bf16", "fp64")},
    bias={"bias": True, "no bias": False},
)
def test_linear(where, loss, dtype, bias):
    """Several chunks, the last short: the plain route in float64, over steps in which the state moves; then one bad row."""
    if where.backend == "triton" and (loss != "ce" or dtype == torch.float64):
        raise SkipTest("each kernel costs a second to compile")
    if loss == "gce, pruned" and dtype == torch.bfloat16:
        raise SkipTest("logits rounded to bfloat16 prune other rows than exact ones")
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-11}[dtype]
    exact = None
    for seed in range(2):
        head = Head(where, dtype, bias, loss, seed)
        if exact is None:
            exact = ab.ABLoss(LOSSES[loss].module(**tensors_of(LOSSES[loss].given(len(head.given[1])), torch.float64)), lam=0.6,
                              backend="reference").double()  # fmt: skip
        else:
            head.criterion.log_s.copy_(exact.log_s)
        for name, got, wanted in zip(("loss", "hidden", "weight", "bias"), head.step(), head.plain(exact)):
            assert relative(got, wanted) <= limit, f"{name}: off by {relative(got, wanted):.1e}"
        assert relative(head.criterion.last.weights, exact.last.weights) <= 3 * limit
        assert relative(head.criterion.log_s, exact.log_s) <= limit
    with torch.no_grad():
        head.given[0][1] = NAN
    before = head.criterion.log_s.clone()
    loss, hidden_grad, *_ = head.step()
    assert loss.isnan() and hidden_grad[1].isnan().all() and hidden_grad[0].isfinite().all()
    assert torch.equal(head.criterion.log_s, before) and int(head.criterion.nonfinite_batches) == 1


def test_linear_deferred(where):
    """Micro-batches of chunks, the first of them empty: the gradient of one batch."""
    head = Head(where, torch.float32, True, deferred=True)
    hidden, weight, bias = head.given
    exact = ab.ABLoss(lam=0.6, backend="reference").double()
    for seed in range(2):
        head.change(seed)
        for t in head.wanted:
            t.grad = None
        rows = len(hidden)
        for part in (slice(0, 0), slice(0, rows // 3), slice(rows // 3, rows)):
            head.criterion(hidden[part], weight, head.target[part], bias).backward()
        assert head.criterion.finish_(head.wanted)
        _, *wanted = head.plain(exact)
        for name, t, gradient in zip(("hidden", "weight", "bias"), head.wanted, wanted):
            assert relative(t.grad, gradient) <= 1e-5, f"{name}: off by {relative(t.grad, gradient):.1e}"
        close(head.criterion.log_s, numpy(exact.log_s), torch.float32, "log_s", ulps=512)


WEIGHTINGS = {
    "term": partial(ab.weights.term, t=2.0),
    "eg": partial(ab.weights.term, t=-0.5),
    "grouped": partial(ab.weights.term, t=2.0, t_group=-1.0),
    "cvar": partial(ab.weights.cvar, beta=0.3),
    "cvar-kl": partial(ab.weights.cvar, beta=0.3, reg=0.5),
    "chi2": partial(ab.weights.chi2, rho=0.4),
    "groupdro": ab.weights.GroupDRO(3, eta=0.5),
}
GROUPED = ("grouped", "groupdro")

# one block; statistics and one launch; more rows than one launch weighs
LOOPS = [(64, 10), (300, 100), (ONE_LAUNCH + 617, 3)]


def check_replay(where, make, replays=8, near=None, each=lambda k, eager: None):
    """What make() makes, captured once: `change(k)` between replays, `step()` and `state()` as without a graph.

    To the bit (NaN in the same places), or so near where torch's own operators between ours promise less. each: a look at what
    eager execution came to after each step, so that it is known to be worth following.
    """
    if where.backend == "reference" and where.gpu:
        raise SkipTest("plain torch promises nothing about graphs")

    def alike(wanted, given, what):
        assert type(wanted) is type(given)
        if isinstance(wanted, torch.Tensor):
            tolerance = dict(rtol=near or 0, atol=near or 0, equal_nan=True)
            torch.testing.assert_close(given, wanted, **tolerance, msg=lambda text: f"{what}: {text}")
            return
        for a, b in zip(wanted, given, strict=True):
            alike(a, b, what)

    with unpoisoned():
        eager, replayed = make(), make()
        for _ in range(3):
            eager.step()
        replay, result = device_tools.captured(where.device, replayed.step, warm_up=3)
        for k in range(replays):
            eager.change(k)
            replayed.change(k)
            wanted, again = eager.step(), replay()
            alike(wanted, result if where.gpu else again, f"result of replay {k}")
            given = replayed.state()
            for name, t in eager.state().items():
                alike(t, given[name], f"{name} after replay {k}")
            each(k, eager)


@over(
    shape=LOOPS,
    optimizer={f.__name__: f for f in (ab.ABSGD, ab.ABAdamW, ab.ABAdam, ab.ABRMSprop, ab.ABAdagrad)},
)
def test_graph_replay(where, shape, optimizer):
    """Forward, backward and step captured once; lr, lambda and the batch change between replays: the bits of eager training."""
    check_replay(where, lambda: Loop(where, shape, optimizer))


@over(way={"robust=": (ab.ABSGD, False), "robust=, adamw": (ab.ABAdamW, False), "finish_": (ab.ABSGD, True)}, sizes=MICRO)
def test_graph_replay_of_micro_batches(where, way, sizes):
    """Deferred micro-batches and the step that finishes them in one graph."""
    optimizer, finish = way
    check_replay(where, lambda: Micro(where, sizes, 10, optimizer, finish))


class Rows:
    """A criterion on logits that change between replays: its loss, gradient and weights; `losses`: those of logit_loss too."""

    def __init__(self, where, shape, criterion, losses=None, groups=False, spoil=None):
        self.criterion, self.losses, self.spoil, self.shape = criterion, losses, spoil, shape
        self.ignore_index = criterion.criterion.ignore_index
        self.x = where.leaf(torch.zeros(shape))
        self.y = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device=where.device)
        self.given = {"groups": (torch.arange(shape[0]) * 7 % 11 % 3).to(where.device)} if groups else {}
        self.change(-1)

    def change(self, k):
        draw = torch.Generator().manual_seed(50 + k)
        with torch.no_grad():
            self.x.copy_(2 * torch.randn(self.shape, generator=draw))
            self.y.copy_(torch.randint(self.shape[1], self.y.shape, generator=draw))
            self.y[2] = self.ignore_index
            if k == self.spoil:
                self.x[0] = NAN

    def step(self):
        loss = self.criterion(self.x, self.y, **self.given)
        out = [loss, *torch.autograd.grad(loss, self.x), self.criterion.last.weights]
        if self.losses is not None:
            losses = self.losses(self.x, self.y)
            out += [losses, *torch.autograd.grad(losses.sum(), self.x)]
        return out

    def state(self):
        return {"log s": self.criterion.log_s, "bad batches": self.criterion.nonfinite_batches}


@over(loss=list(LOSSES), shape=[HELD, (BEYOND[0] * 20, 11)])
def test_graph_replay_of_every_loss(where, loss, shape):
    if where.backend == "triton" and loss not in ("ce", "all", "gce, pruned"):
        raise SkipTest("each kernel costs a second to compile")

    def make():
        return Rows(where, shape, where.criterion(loss, shape[1], lam=-0.75), where.fused(loss, shape[1]))

    check_replay(where, make, replays=3)


@over(rule=list(WEIGHTINGS))
def test_graph_replay_of_rules(where, rule):
    """A rule without a wait is one without an obstacle. (Their sums by index_add have no fixed order on a GPU.)"""

    def make():
        criterion = where.robust(ab.CrossEntropy(backend=where.backend), rule=copy.deepcopy(WEIGHTINGS[rule]))
        return Rows(where, (37, 5), criterion, groups=rule in GROUPED)

    check_replay(where, make, replays=3, near=1e-5)


@over(sizes=SIZES_OF_PARTS)
def test_graph_replay_of_the_stages(where, sizes):
    class Replayed(Parts):
        def change(self, k):
            draw = torch.Generator().manual_seed(k)
            for part in self.parts:
                part["losses"].copy_(3 * torch.rand(part["losses"].shape, generator=draw))
            self.lam.fill_(0.75 + 0.1 * k)

        def state(self):
            return {"log s": self.log_s, "settled": self.settled, "bad batches": self.nonfinite}

    check_replay(where, lambda: Replayed(where, sizes, torch.float32), replays=3)


def test_graph_replay_of_weights(where):
    """robust_weights and its vjp, and the robust loss of given losses."""

    class Vectors:
        def __init__(self):
            self.criterion, self.losses = where.robust(lambda x: x, lam=0.75), where.leaf(torch.zeros(3000))
            self.d, self.lam = torch.linspace(-1, 2, 3000, device=where.device), torch.tensor(0.75, device=where.device)
            self.log_s = torch.tensor(0.3, device=where.device)
            self.change(-1)

        def change(self, k):
            with torch.no_grad():
                self.losses.copy_(4 * torch.rand(3000, generator=torch.Generator().manual_seed(50 + k)))
            self.lam.fill_(1.0 + 0.1 * k)

        def step(self):
            weights, log_s = robust_weights(self.losses, self.log_s, self.lam, backend=where.backend)
            (slopes,) = torch.autograd.grad((weights, log_s), self.losses, (self.d, torch.ones_like(log_s)))
            loss = self.criterion(self.losses)
            return [weights.detach(), log_s.detach(), slopes, loss.detach(), *torch.autograd.grad(loss, self.losses)]

        def state(self):
            return {"log s": self.criterion.log_s}

    check_replay(where, Vectors, replays=3)


@over(dtype={"fp32": torch.float32, "bf16": torch.bfloat16})
def test_graph_replay_of_linear(where, dtype):
    """The chunks' loop with its matrix products. (Which of its algorithms cuBLAS takes in a graph is its own affair.)"""
    check_replay(where, lambda: Head(where, dtype, True), replays=3, near=1e-5 if dtype == torch.float32 else 1e-2)


@over(shape=LOOPS)
def test_a_bad_row_under_capture(where, shape):
    """The replay that meets it has a loss of NaN and leaves log s; those before and after it notice nothing."""
    make = lambda: Rows(where, shape, where.criterion(lam=-0.75), spoil=1)  # noqa: E731
    check_replay(where, make, replays=4)
    loop = make()
    for k in range(3):
        loop.change(k)
        before = loop.criterion.log_s.clone()
        loss, grad, weights = loop.step()
        assert bool(loss.isnan()) == bool(grad[0].isnan().any()) == bool(weights[0].isnan()) == (k == 1)
        assert grad[1].isfinite().all() and torch.equal(loop.criterion.log_s, before) == (k == 1)
    assert int(loop.criterion.nonfinite_batches) == 1

    class Spoilt(Micro):
        def change(self, k):
            self.feed(k)
            if k == 1:
                self.x[-1, 0] = NAN
            self.before = self.w.detach().clone()

    moved = []
    check_replay(
        where, lambda: Spoilt(where, (7, shape[0] - 7), shape[1]), replays=4,
        each=lambda k, eager: moved.append(not torch.equal(eager.before, eager.w)),
    )  # fmt: skip
    assert moved == [True, False, True, True]


@over(shape=LOOPS)
def test_same_bits_again(where, shape):
    runs = []
    for _ in range(3):
        loop = Loop(where, shape)
        losses = []
        for k in range(5):
            loop.feed(k)
            losses.append(loop.step().detach())
        runs.append([torch.stack(losses), *(t.detach() for t in loop.state().values())])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@gpu
@over(shape=LOOPS)
def test_streams_at_once(where, shape):
    """Three trainings on three streams, their launches interleaved: each with the bits that it has alone."""
    with unpoisoned():
        alone, losses = Loop(where, shape), []
        for k in range(30):
            alone.feed(k)
            losses.append(alone.step())
        where.synchronize()
        streams = [torch.cuda.Stream(where.device) for _ in range(3)]
        loops, found = [Loop(where, shape) for _ in streams], [[] for _ in streams]
        where.synchronize()
        for k in range(30):
            for stream, loop, out in zip(streams, loops, found):
                with torch.cuda.stream(stream):
                    loop.feed(k)
                    out.append(loop.step())
        where.synchronize()
        for loop, out in zip(loops, found):
            assert torch.equal(torch.stack(out), torch.stack(losses))
            assert all(torch.equal(a, b) for a, b in zip(loop.state().values(), alone.state().values()))


@gpu
@over(shape=LOOPS)
def test_the_host_never_waits(where, shape):
    """Forward, backward and step, with and without GradScaler; by torch's own alarm, and by what the profiler saw of ours."""
    with unpoisoned():
        loop = Loop(where, shape)
        scaler = torch.amp.GradScaler("cuda", init_scale=4.0)

        def scaled():
            loop.optimizer.zero_grad()
            scaler.scale(loop.criterion(loop.x * loop.w + loop.b, loop.y)).backward()
            scaler.step(loop.optimizer)
            scaler.update()

        for run in (loop.step, scaled):
            for _ in range(3):
                run()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for run in (loop.step, scaled):
                for k in range(3):
                    loop.feed(k)
                    loop.criterion.set_lam(-0.6, reset=False)
                    run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        for run in (loop.step, scaled):
            waits = device_tools.waits(where.device, run)
            assert waits == [], f"the host waited in {waits}"


@contextmanager
def no_waiting(where):
    before = torch.cuda.get_sync_debug_mode() if where.gpu else None
    if where.gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if where.gpu:
            torch.cuda.set_sync_debug_mode(before)


@over(rule=list(WEIGHTINGS), shape={"small": (37, 5), "large": (BEYOND[0] * 30, 5)})
def test_rules_from_losses_to_weights(where, rule, shape):
    """As on the CPU in float64, and without waiting; one loss is ignored, one is bad."""
    logits, target = torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.arange(shape[0]) % shape[1]
    target[3] = -100
    logits[7, 2] = INF
    groups = (torch.arange(shape[0]) * 7 % 11) % 3
    exact = ab.ABLoss(rule=copy.deepcopy(WEIGHTINGS[rule])).double()
    ours = where.robust(ab.CrossEntropy(backend=where.backend), rule=copy.deepcopy(WEIGHTINGS[rule]))
    x, here, grouped = where.leaf(logits), target.to(where.device), groups.to(where.device)
    given = lambda groups: {"groups": groups} if rule in GROUPED else {}  # noqa: E731
    for k in range(2):  # the first call compiles
        with no_waiting(where) if k else nullcontext():
            loss = ours(x, here, **given(grouped))
            loss.backward()
    exact(logits.double(), target, **given(groups))
    torch.testing.assert_close(ours.last.weights.cpu().double(), exact.last.weights, rtol=2e-5, atol=1e-6, equal_nan=True)
    assert loss.isnan() and int(ours.nonfinite_batches) == 2


@over(method=("jvp", "finite_difference", "unrolled", "last_layer"))
def test_l2rw(where, method):
    """As on the CPU in float64; dropout masks and running statistics are left alone, and the host does not wait. (Not in a graph:
    it reads torch's random state, which torch refuses while it captures.)"""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    model = torch.nn.Sequential(*layers)
    x, y = torch.randn(12, 1, 6, 6), torch.arange(12) % 3
    exact = ab.meta.l2rw_weights(copy.deepcopy(model).double(), F_NONE, (x.double(), y), (x[:4].double() + 0.1, y[:4]), method)
    model, x, y = model.to(where.device), x.to(where.device), y.to(where.device)
    loss_fn = ab.CrossEntropy(backend=where.backend)
    batch, clean = (x, y), (x[:4] + 0.1, y[:4])
    with torch.backends.cudnn.flags(allow_tf32=False):
        ab.meta.l2rw_loss(model, loss_fn, batch, clean, method)  # compiles
        state, before = random_numbers(where), {k: v.clone() for k, v in model.state_dict().items()}
        with no_waiting(where):
            weights = ab.meta.l2rw_weights(model, loss_fn, batch, clean, method)
        assert torch.equal(state, random_numbers(where))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        ab.meta.l2rw_loss(model, loss_fn, batch, clean, method).backward()
    assert float((weights.cpu() - exact).abs().sum()) <= (2e-2 if method == "finite_difference" else 1e-4)


F_NONE = torch.nn.CrossEntropyLoss(reduction="none")


def random_numbers(where):
    return torch.cuda.get_rng_state(where.device) if where.gpu else torch.get_rng_state()


@gpu
def test_the_fastest_is_chosen(where):
    """By those who name no backend; and the one that is named by the others."""
    assert _backend.select(where.device) == "cuda" and _backend.select(where.device, where.backend) == where.backend


@gpu
def test_made_here_and_moved_there(where):
    """A module is made before it is known where it will run."""
    criterion = ab.ABLoss(lam=0.75, backend=where.backend).to(where.device)
    x = torch.zeros(4, 5, device=where.device, requires_grad=True)
    criterion(x, torch.zeros(4, dtype=torch.int64, device=where.device)).backward()
    assert x.grad.any()


@gpu
def test_launches(where):
    """One for the loss, at most one for its backward, one for the step."""
    with unpoisoned():
        for shape, dtype in itertools.product(((128, 10), (128, 100), (512, 1000), (300, 8142)), (torch.float32, torch.bfloat16)):
            p = SimpleNamespace(logits=torch.randn(shape).to(dtype), target=torch.randint(shape[1], shape[:1]))
            x, target, criterion = where.leaf(p.logits), p.target.to(where.device), where.criterion(lam=-0.75)
            one = torch.ones((), device=where.device)
            for _ in range(2):
                torch.autograd.grad(criterion(x, target), x, one)
            seen = device_tools.kernels(where.device, lambda: criterion(x, target))
            assert len(seen) == 1, f"forward of {shape} {dtype}: {seen}"
            loss = criterion(x, target)
            seen = device_tools.kernels(where.device, lambda: torch.autograd.grad(loss, x, one))
            assert len(seen) <= 1, f"backward of {shape} {dtype}: {seen}"
        for count in (10, 161, 900 if where.backend == "cuda" else 161):
            params = parameters(where, [(5 + j % 300,) for j in range(count)], torch.float32)
            optimizer = ab.ABSGD(params, lr=0.1, weight_decay=0.1, backend=where.backend)
            set_grads(params, seed=0)
            for _ in range(2):
                optimizer.step()
            seen = device_tools.kernels(where.device, optimizer.step)
            assert len(seen) == 1, f"step of {count} tensors: {seen}"


TRAININGS = {
    **{str(shape): partial(Loop, shape=shape) for shape in LOOPS},
    "deferred": partial(Micro, sizes=MICRO["uneven"], classes=10),
    "finish_": partial(Micro, sizes=MICRO["first empty"], classes=10, finish=True),
    "linear": partial(Head, dtype=torch.float32, bias=True),
}


def trained(where, make):
    """The results of four steps, and the state after them, on the CPU."""
    training, out = make(where), []
    for k in range(4):
        training.change(k)
        out += training.step() if isinstance(training, Head) else [training.step()]
    out += training.state().values()
    assert all(t.device == where.device for t in out)
    return [t.detach().cpu() for t in out]


def needs_two_gpus():
    if torch.cuda.device_count() < 2:
        raise SkipTest("needs two GPUs")


@gpu
@over(make=TRAININGS)
def test_another_device_than_the_current_one(where, make):
    """Everything on device 1 while device 0 is current."""
    needs_two_gpus()
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(*(trained(Where(f"cuda:{index}", where.backend), make) for index in (0, 1)))


@gpu
@over(make=TRAININGS)
def test_while_a_stream_of_another_device_is_current(where, make):
    """torch.cuda.stream makes its device the current one; what is called is on the other, and goes to that one's own stream."""
    needs_two_gpus()
    results = []
    for index in (0, 1):
        alone = trained(Where(f"cuda:{index}", where.backend), make)
        with torch.cuda.stream(torch.cuda.Stream(1 - index)):
            assert torch.cuda.current_device() == 1 - index
            results.append(trained(Where(f"cuda:{index}", where.backend), make))
        torch.testing.assert_close(results[-1], alone)
    torch.testing.assert_close(*results)


# ---- beyond 2^31 -----------------------------------------------------------------------------------------------------


@gpu(alone=True)
@over(shape=[(16_384, 131_080), (70_000, 32_000), (2, 20, 54_000_000)])
def test_more_than_2_to_the_31_logits(where, shape):
    """In one launch, in several, and as images; some rows against the oracle, all weights against their losses."""
    elements = math.prod(shape)
    assert elements > 2**31
    rows = elements // shape[1]
    where.need(2 * 2 * elements + 120 * rows)
    torch.use_deterministic_algorithms(False)
    generator = torch.Generator(where.device).manual_seed(0)
    x = torch.empty(shape, dtype=torch.bfloat16, device=where.device).normal_(generator=generator).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator, device=where.device)
    criterion = where.criterion(lam=-0.5)
    criterion(x, target).backward()
    last, inner = criterion.last, math.prod(shape[2:])
    z = last.losses.double().flatten() / -0.5
    log_s = z.logsumexp(0) - math.log(rows)
    torch.testing.assert_close(criterion.log_s.double(), log_s, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.weights.flatten().double(), (z - log_s).exp(), rtol=2e-5, atol=0)
    middle = 2**31 // shape[1]
    for i in sorted({0, 1, rows // 3, middle - 1, middle, middle + 1, rows - 2, rows - 1}):
        place = (i // inner, slice(None), *[i % inner] * (len(shape) - 2))
        label = target[place[:1] + place[2:]]
        losses, grads = oracle.cross_entropy(numpy(x[place])[None], [int(label)])
        close(last.losses.flatten()[i : i + 1], losses, torch.bfloat16, f"loss of row {i}")
        factor = math.exp(losses[0] / -0.5 - float(log_s)) / rows
        close(x.grad[place], grads[0] * factor, torch.bfloat16, f"gradient of row {i}", ulps=512, stored=True)


@gpu(alone=True)
def test_more_than_2_to_the_31_parameters(where):
    count = 2**31 + 1000
    where.need(3 * 4 * count + 2**30)
    torch.use_deterministic_algorithms(False)
    p = torch.nn.Parameter(torch.empty(count, device=where.device).uniform_())
    p.grad = torch.empty_like(p).uniform_()
    spots = [slice(0, 999), slice(2**30 - 5, 2**30 + 5), slice(2**31 - 500, 2**31 + 500), slice(count - 7, count)]
    copies = [torch.nn.Parameter(p.detach()[s].double()) for s in spots]
    for copy, s in zip(copies, spots):
        copy.grad = p.grad[s].double()
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    ours, theirs = ab.ABSGD([p], **options, backend=where.backend), torch_sgd(copies, **options)
    for _ in range(3):
        ours.step()
        theirs.step()
    for copy, s in zip(copies, spots):
        torch.testing.assert_close(p.detach()[s].double(), copy.detach(), rtol=1e-5, atol=1e-5)


# ---- a tour of every kernel, small enough for a sanitizer ------------------------------------------------------------


TOUR = {"offset of one": (5, 37), "wider row": (3, 1030), "transposed": (3, 1031), "sliced rows": (2, 5, 3, 4)}


# How memcheck runs the tour, which then has to fit 30 s: it goes without float64 and without every second rule of the step.
UNDER_SANITIZER = os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1"


def test_tour(where):
    """Every walk, dtype and tail once, and every form of the step, weighted or not."""
    dtypes = [dtype for dtype in DTYPES.values() if not (UNDER_SANITIZER and dtype == torch.float64)]
    for dtype in dtypes:
        for layout, shape in TOUR.items():
            p = problem(shape, dtype, loss="all")
            x = LAYOUTS[layout](p.logits.to(where.device)).requires_grad_()
            target, options = p.target.to(where.device), tensors_of(p.options, dtype, where.device)
            losses = logit_loss(x, target, **options, backend=where.backend)
            (grad,) = torch.autograd.grad(losses, x, torch.full_like(losses, 2.0))
            close(losses, p.losses, dtype, f"losses {shape} {layout}", cancels=True)
            close(grad, 2 * p.grads, dtype, f"gradient {shape} {layout}", cancels=True, stored=True)
            check_robust(where.criterion("all", shape[1], dtype, lam=0.75), oracle.ABLoss(0.75), x, target, p, dtype)
    for shape in ((ONE_LAUNCH // 8 + 1, 8), (ONE_LAUNCH + 1, 3)):
        p = problem(shape, torch.float32)
        x, target = where.leaf(p.logits), p.target.to(where.device)
        check_robust(where.criterion(lam=-0.75), oracle.ABLoss(-0.75), x, target, p, torch.float32)
    for count in (1, 300, ONE_LAUNCH + 1):
        losses = torch.linspace(0, 5, count, device=where.device).requires_grad_()
        weights, log_s = robust_weights(losses, 0.3, -0.75, backend=where.backend)
        (weights.square().sum() + log_s).backward()
        assert losses.grad.isfinite().all() and rectified(where, losses.detach()).isfinite().all()
        where.robust(lambda x: x, lam=0.75)(losses).backward()
    for options, dtype in itertools.product(WEIGHTED.values(), dtypes):
        for gap, rows in ((0, 37), (1, 1030)):
            Weighted(where, [0, 1, 5, 64, 650], rows, dtype, gap).check(**options)
    Weighted(where, [3], ONE_LAUNCH + 3, torch.float32).check()
    sgd = [(ab.ABSGD, torch.optim.SGD, {"lr": 0.1} | {k: v for k, v in o.items() if v is not None}) for o in OPTIONS.values()]
    rules = [*sgd, *OPTIMIZERS.values()][:: 2 if UNDER_SANITIZER else 1]
    for rule, dtype, offset in itertools.product(rules, dtypes, (0, 1)):
        if dtype in (torch.float32, torch.float64):
            check_steps(where, rule, dtype, offset)


# ---- without pytest --------------------------------------------------------------------------------------------------


def collect(device, backends, only):
    """{id: (function, arguments)} of every test for a device, those of the fastest backend first."""
    out = {}
    for where in (where for where in CPU + GPU if where.device.type == device and where.backend in backends):
        for name, function in globals().items():
            if not name.startswith("test_") or (where.backend == "reference" and getattr(function, "gpu", False)):
                continue
            if getattr(function, "gpu", False) and not where.gpu:
                continue
            tables = getattr(function, "tables", {})
            for entries in itertools.product(*(table.items() for table in tables.values())):
                id = f"{name}[{'-'.join([where.backend, *(entry[0] for entry in entries)])}]"
                if not only or any(part in id for part in only):
                    out[id] = function, dict(zip(tables, (entry[1] for entry in entries)), where=where)
    return out


def one_row(where):
    return logit_loss(torch.zeros(1, 2, device=where.device), torch.zeros(1, dtype=torch.int64, device=where.device))


def clean_up(where, failed):
    """What the test has left behind, so that the next one does not meet it. That this fails says nothing of the device: torch
    2.11 does not empty its cache once a capture has failed. Returns what went wrong, as words."""
    steps = [gc.collect, torch.cuda.empty_cache] if failed or torch.cuda.memory_reserved() > 2**31 else []  # others want it
    if failed:  # a label out of range that nobody was told of is no error of the next test's
        steps += [partial(ops.reported_labels, check=True), partial(one_row, where)]
    said = ""
    for step in steps:
        try:
            step()
        except IndexError:
            pass
        except Exception as error:
            said += f"\nafterwards: {type(error).__name__}: {error}"
    return said[:1000]


def device_works(where):
    """torch alone computes on it: raises what it says if it does not."""
    torch.cuda.synchronize()
    assert torch.ones(2, device=where.device).sum().item() == 2


def attempt(id, function, arguments):
    """The result of one test; `usable`: the device can still be used."""
    start, where = time.perf_counter(), arguments["where"]
    status, message, usable = "passed", "", True
    setup_function()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**arguments)
            where.synchronize()  # a failure of a kernel belongs to the test that launched it
    except SkipTest as reason:
        status, message = "skipped", str(reason)
    except Exception as error:
        status = "failed"
        where_from = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        message = f"{type(error).__name__}: {str(error).strip()[:1500]}\n(at {' > '.join(where_from[-4:])})"
    finally:
        teardown_function()
    if where.gpu:
        message += clean_up(where, status == "failed")
        try:
            device_works(where)
        except Exception as error:
            status, message, usable = "failed", f"{message}\nthe CUDA context is lost: {error}"[:2500], False
    return dict(test=id, status=status, message=message, seconds=round(time.perf_counter() - start, 2), usable=usable)


def serve(tests):
    """A worker: takes ids from stdin, answers one line of JSON each. What tests print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(attempt(line.strip(), *tests[line.strip()])), file=answers, flush=True)


class Worker:
    """A process that runs one test after the other, and is replaced when it hangs or dies."""

    def __init__(self, arguments):
        self.command, self.process = [sys.executable, str(Path(__file__).resolve()), "--worker", *arguments], None

    def run(self, id, seconds):
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        start = time.perf_counter()
        try:
            print(id, file=self.process.stdin, flush=True)
            if not select.select([self.process.stdout], [], [], seconds)[0]:
                self.stop()
                return dict(test=id, status="failed", message=f"no answer within {seconds:.0f} s", seconds=round(seconds, 2))
            result = json.loads(self.process.stdout.readline())
            if not result["usable"]:
                self.stop()
            return result
        except (BrokenPipeError, json.JSONDecodeError):
            with suppress(subprocess.TimeoutExpired):  # it has closed its pipe, and ends now
                self.process.wait(PATIENCE)
            message = f"the process died with exit code {self.process.poll()}"
            self.stop()
            seconds = round(time.perf_counter() - start, 2)
            return dict(test=id, status="failed", message=message, seconds=seconds, usable=False)

    def stop(self):
        if self.process is not None:
            self.process.kill()
            with suppress(subprocess.TimeoutExpired):  # one that waits in the driver ends when that lets it go
                self.process.wait(PATIENCE)
            self.process = None


PATIENCE = 1.2  # Seconds for a worker to end.
# Seconds before the limit at which no test runs any more: time for four waits of PATIENCE, two for a worker that died at the last
# moment and two for the others, and for the report.
MARGIN = 5.0


def stop(workers):
    """All at once, so that they wait together."""
    for worker in workers:
        if worker.process is not None:
            worker.process.kill()
    for worker in workers:
        worker.stop()


STATUSES = ("passed", "failed", "skipped", "not run")


def not_run(id):
    return dict(test=id, status="not run", message="out of time", seconds=0)


CRASHES = 3  # A start costs a worker seconds. A backend that broke so many has a fault that more tests would only meet again.


def run_all(tests, jobs, limit, each, arguments, on_result):
    """Every test in one of `jobs` workers (0: in this process); those that want the memory for themselves come last, one at a
    time. After CRASHES workers that died or lost their CUDA context the rest of that backend's tests are not run."""
    end, crashes = time.perf_counter() + limit, Counter()
    queue = [id for id, (function, _) in tests.items() if not getattr(function, "alone", False)]
    alone = [id for id in tests if id not in set(queue)]
    lock = threading.Lock()

    def take(ids, run):
        while True:
            with lock:
                id = ids.pop(0) if ids else None
            if id is None:
                return
            left, backend = end - time.perf_counter(), tests[id][1]["where"].backend
            result = not_run(id)
            if crashes[backend] >= CRASHES:
                result["message"] = "the backend keeps crashing"
            elif left > 0:
                result = run(id, min(each, left))
                if result["status"] == "failed" and time.perf_counter() > end:
                    result["message"] += " (the time of the run was over)"
            with lock:
                crashes[backend] += not result.get("usable", True)  # a test that took too long says nothing of the next
                on_result(result)

    if not jobs:
        take(queue + alone, lambda id, seconds: attempt(id, *tests[id]))
        return
    workers = [Worker(arguments) for _ in range(min(jobs, max(1, len(queue))))]
    threads = [threading.Thread(target=take, args=(queue, worker.run)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop(workers[1:])
    take(alone, workers[0].run)
    stop(workers)


class Report:
    """The results so far, on disk every second: whoever is stopped in between leaves what it knows."""

    EVERY = 1.0  # seconds

    def __init__(self, tests, out, **about):
        self.queued, self.out, self.about = dict.fromkeys(tests), out, about
        self.results, self.start, self.written = [], time.perf_counter(), -INF
        self.write()

    def add(self, result):
        self.queued.pop(result["test"], None)
        self.results.append(result)
        if result["status"] != "passed":
            print(f"{result['status']}: {result['test']}: {result['message']}", flush=True)
        if time.perf_counter() > self.written + self.EVERY:
            self.write()

    def content(self):
        results = self.results + [not_run(id) for id in self.queued]
        count = Counter(result["status"] for result in results)
        return {
            **self.about,
            "seconds": round(time.perf_counter() - self.start, 1),
            **{name.replace(" ", "_"): count[name] for name in STATUSES},
            "failures": [{k: result[k] for k in ("test", "message")} for result in results if result["status"] == "failed"],
            "skips": dict(Counter(result["message"] for result in results if result["status"] == "skipped")),
            "tests": [{k: result[k] for k in ("test", "status", "seconds")} for result in results],
        }

    def write(self):
        """Never half of it: a reader finds the one before or this one."""
        content, self.written = self.content(), time.perf_counter()
        if self.out:
            new = self.out.with_name(self.out.name + ".new")
            new.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(new, self.out)
        return content


def main(argv=None, started=None):
    """started: since when the limit counts."""
    started = time.perf_counter() if started is None else started
    parser = argparse.ArgumentParser("test_gpu.py", description="Every backend of a GPU against the oracle, without pytest.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the bodies that need no GPU, to try them")
    parser.add_argument("--backends", help="with commas; default: all of the device")
    parser.add_argument("--only", default="", help="parts of names, with commas")
    parser.add_argument("--only-file", type=Path, help="a file of whole names, one a line: what failed in an earlier run")
    jobs = min(8, max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--jobs", type=int, default=jobs, help="processes; 0: this one, where nobody stops a test")
    parser.add_argument("--limit", type=float, default=170, help="seconds for all, the start of this process included")
    parser.add_argument("--each", type=float, default=30, help="seconds for one test")
    parser.add_argument("--out", type=Path, help="where the results go, as JSON, from the first one on")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        reason = _backend.why_not("cuda")
        print(f"test_gpu.py: torch sees no CUDA GPU ({reason}); --device cpu tries what needs none", file=sys.stderr)
        return 2
    known = {where.backend: where for where in CPU + GPU if where.device.type == options.device}
    backends = options.backends.split(",") if options.backends else list(known)
    if not set(backends) <= set(known):
        parser.error(f"--backends: got {options.backends!r}, expected some of {', '.join(known)}")
    missing = {name: reason for name in backends if (reason := known[name].why_not())}
    tests = collect(options.device, set(backends) - set(missing), [part for part in options.only.split(",") if part])
    if options.worker:
        torch.set_num_threads(1)  # the cores have other workers
        serve(tests)
        return 0
    # a backend that cannot run here has proved nothing
    unknown = {f"backend {name}": reason for name, reason in missing.items()}
    if options.only_file:
        wanted = list(dict.fromkeys(filter(None, map(str.strip, options.only_file.read_text().splitlines()))))
        unknown = {id: "there is no test of this name for these backends" for id in wanted if id not in tests} | unknown
        tests = {id: test for id, test in tests.items() if id in set(wanted)}

    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    report = Report(tests, options.out, device=device, backends=backends)
    for id, reason in unknown.items():
        report.add(dict(test=id, status="failed", message=reason, seconds=0))
    arguments = ["--device", options.device, "--backends", ",".join(backends)]
    left = options.limit - MARGIN - (time.perf_counter() - started)
    run_all(tests, options.jobs, left, options.each, arguments, report.add)
    found = report.write()
    count = {name: found[name.replace(" ", "_")] for name in STATUSES}
    print(", ".join(f"{count[name]} {name}" for name in STATUSES), f"in {found['seconds']} s")
    return 1 if count["failed"] or count["not run"] or not count["passed"] else 0


if __name__ == "__main__":
    sys.exit(main(started=STARTED))
