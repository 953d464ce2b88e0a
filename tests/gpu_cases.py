"""Where the tests of test_gpu_*.py run, and the problems that they solve there, with the oracle's answers.

A body is a function of `where`, a device and a backend on it, and of the names of its tables.
"""

import importlib
import math
import sys
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import SkipTest
from unittest.mock import patch

import numpy as np
import oracle
import torch
import torch.nn.functional as F
from tensors import class_weight, counts, wide

import absgd_fast as ab
from absgd_fast import _backend

with patch.object(sys, "path", [str(Path(__file__).resolve().parents[1]), *sys.path]):  # benchmarks are no part of the package
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


# ---- problems and their exact answers --------------------------------------------------------------------------------


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
        logits=logits,
        target=target,
        options=options,
        valid=valid.reshape(target.shape),
        ignore_index=ignore,
        losses=losses.reshape(target.shape),
        grads=oracle.unrows(grads, shape),
    )


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
