"""Whether every backend of this machine computes the right numbers: `absgd-fast doctor --selftest`.

vectors.json has inputs, and the losses, gradients, weights and steps that follow from them. These are not this package's own
results. tests/selftest_vectors.py computed them in float64: from the formulas of docs/MATH.md, and with torch.optim. The inputs
are exact in every dtype, so a backend may differ by its own rounding only.

>>> checks = vectors()
>>> sorted({check["kind"] for check in checks})
['linear', 'logits', 'losses', 'rectified', 'robust logits', 'steps', 'weighted step']
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import absgd_fast as ab

from .. import _backend, ops

Check = dict[str, Any]
Results = dict[str, Tensor]

# The largest deviation of a tensor, divided by its largest element. Four times the largest that any backend of the CPU had.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Where:
    """What computes: a backend, the device of its tensors, and for the CPU kernels the instruction set."""

    backend: str
    device: str
    isa: str | None = None

    def __str__(self) -> str:
        return f"{self.backend}, {self.isa or self.device}"

    @contextmanager
    def chosen(self) -> Iterator[None]:
        """The instruction set is in use inside."""
        before = _backend.set_cpu_isa(self.isa) if self.isa else None
        try:
            yield
        finally:
            if before is not None:
                _backend.set_cpu_isa(before)

    def tensor(self, values: Any, dtype: torch.dtype | None = None) -> Tensor:
        """The numbers on the device."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass
class Outcome:
    """What one backend did with the checks in one dtype.

    worst: the largest deviation of all checks, as a share of the tolerance; above 1 a check failed.
    failures: one sentence for each check that failed.
    """

    where: str
    dtype: str
    checks: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


@cache
def vectors() -> list[Check]:
    """The checks. Each has a name, a kind, the inputs, and under "expected" the exact results by name."""
    return json.loads((Path(__file__).parent / "vectors.json").read_text())


def places() -> list[Where]:
    """Everything on this machine that can compute: the reference, the CPU kernels by instruction set, and each GPU's backends."""
    found = [Where("reference", "cpu"), *(Where("cpu", "cpu", isa) for isa in _backend.cpu_isas())]
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        gpus += [f"xpu:{i}" for i in range(torch.xpu.device_count())]
    if _backend.available("triton") and "cpu" in _backend.devices("triton"):  # in Triton's interpreter
        found.append(Where("triton", "cpu"))
    for backend in ("cuda", "triton", "reference"):
        served = None if backend == "reference" else _backend.devices(backend)
        if _backend.available(backend):
            found += [Where(backend, gpu) for gpu in gpus if served is None or gpu.split(":")[0] in served]
    return found


# ---- the kinds of checks: from inputs to results ----


def _module(check: Check, where: Where, dtype: torch.dtype) -> torch.nn.Module:
    given = dict(check["given"])
    if "weight" in given:
        given["weight"] = where.tensor(given["weight"], dtype)
    return getattr(ab, check["module"])(**given, backend=where.backend).to(where.device)


def _robust(cls: type, where: Where, dtype: torch.dtype, *args: Any, **options: Any) -> Any:
    """The criterion. Its state has the precision of the results: float64, or float32 for every narrower dtype."""
    return cls(*args, **options, backend=where.backend).to(where.device, torch.promote_types(dtype, torch.float32))


def _logits(check: Check, where: Where, dtype: torch.dtype) -> Results:
    x = where.tensor(check["logits"], dtype).requires_grad_()
    losses = _module(check, where, dtype)(x, where.tensor(check["target"]))
    losses.sum().backward()
    return {"losses": losses, "gradient": x.grad}


def _robust_logits(check: Check, where: Where, dtype: torch.dtype) -> Results:
    criterion = _robust(ab.ABLoss, where, dtype, _module(check, where, dtype), **check["options"])
    results: dict[str, Any] = {}
    for step, batch in enumerate(check["batches"], 1):
        x = where.tensor(batch["logits"], dtype).requires_grad_()
        value = criterion(x, where.tensor(batch["target"]))
        value.backward()
        results |= {f"value {step}": value, f"gradient {step}": x.grad, f"log s {step}": criterion.log_s.clone()}
    return results


def _losses(check: Check, where: Where, dtype: torch.dtype) -> Results:
    options = check["options"] | {"lam": float(check["options"]["lam"])}
    criterion = _robust(ab.ABLoss, where, dtype, lambda losses: losses, **options)
    results: dict[str, Any] = {}
    for step, batch in enumerate(check["batches"], 1):
        losses = where.tensor(batch["losses"], dtype).requires_grad_()
        value = criterion(losses, mask=where.tensor(batch["mask"]))
        value.backward()
        results |= {f"value {step}": value, f"gradient {step}": losses.grad, f"weights {step}": criterion.last.weights}
        if options["lam"] != float("inf"):  # the plain mean has no s
            results |= {f"log s {step}": criterion.log_s.clone()}
    return results


def _linear(check: Check, where: Where, dtype: torch.dtype) -> Results:
    hidden, weight = (where.tensor(check[name], dtype).requires_grad_() for name in ("hidden", "weight"))
    criterion = _robust(ab.LinearABLoss, where, dtype, lam=check["lam"], chunk=check["chunk"])
    value = criterion(hidden, weight, where.tensor(check["target"]))
    value.backward()
    return {"value": value, "gradient of hidden": hidden.grad, "gradient of weight": weight.grad}


def _steps(check: Check, where: Where, dtype: torch.dtype) -> Results:
    params = [where.tensor(values, dtype).requires_grad_() for values in check["params"]]
    optimizer = getattr(ab, check["optimizer"])(params, **check["options"], backend=where.backend)
    for gradients in check["gradients"]:
        for p, gradient in zip(params, gradients):
            p.grad = where.tensor(gradient, dtype)
        optimizer.step()
    return {f"parameter {i}": p for i, p in enumerate(params, 1)}


def _weighted_step(check: Check, where: Where, dtype: torch.dtype) -> Results:
    params, buffers, grads = ([where.tensor(v, dtype) for v in check[name]] for name in ("params", "buffers", "per_sample_grads"))
    losses, options = where.tensor(check["losses"], dtype), check["options"]
    log_s = ab.functional.weighted_momentum_step_(
        params, buffers, grads, losses, check["log_s"], **options, backend=where.backend
    )
    after = {f"parameter {i}": p for i, p in enumerate(params, 1)}
    return after | {f"momentum {i}": b for i, b in enumerate(buffers, 1)} | {"log s": log_s}


def _rectified(check: Check, where: Where, dtype: torch.dtype) -> Results:
    return {"weights": ops.OPERATORS[where.backend].rectified(where.tensor(check["products"], dtype))}


ALL, REAL = (torch.float64, torch.float32, torch.bfloat16, torch.float16), (torch.float64, torch.float32)
KINDS: dict[str, tuple[Callable[[Check, Where, torch.dtype], Results], tuple[torch.dtype, ...]]] = {
    "logits": (_logits, ALL),
    "robust logits": (_robust_logits, ALL),
    "losses": (_losses, REAL),
    "linear": (_linear, REAL),
    "steps": (_steps, REAL),
    "weighted step": (_weighted_step, REAL),
    "rectified": (_rectified, REAL),
}


# ---- running them ----


def deviation(got: Tensor, expected: Any) -> float:
    """The largest |got − expected|, divided by the largest |expected|. Infinite where a number is NaN, or the shapes differ.

    The divisor is at least the smallest normal number of the dtype, because smaller numbers have fewer digits.
    """
    exact = torch.tensor(expected, dtype=torch.float64, device="cpu")
    if got.shape != exact.shape:
        return float("inf")
    scale = max(float(exact.abs().max()), torch.finfo(got.dtype).tiny)
    worst = float((got.detach().cpu().double() - exact).abs().max()) / scale
    return worst if worst == worst else float("inf")


def run_check(check: Check, where: Where, dtype: torch.dtype) -> dict[str, float]:
    """The deviation of every result of one check. Whatever the backend raises comes through."""
    compute = KINDS[check["kind"]][0]
    with where.chosen():
        results = compute(check, where, dtype)
    assert results.keys() == check["expected"].keys()
    return {name: deviation(value, check["expected"][name]) for name, value in results.items()}


def run_in(where: Where, dtype: torch.dtype, checks: list[Check] | None = None) -> Outcome:
    """Runs the checks of one backend in one dtype. An error of the backend is a failure of its check."""
    outcome = Outcome(str(where), str(dtype).removeprefix("torch."))
    begun = time.perf_counter()
    for check in vectors() if checks is None else checks:
        if dtype not in KINDS[check["kind"]][1]:
            continue
        outcome.checks += 1
        try:
            found = run_check(check, where, dtype)
        except Exception as error:
            outcome.worst = float("inf")
            outcome.failures.append(f"{check['name']} raised {type(error).__name__}: {error}")
            continue
        name, worst = max(found.items(), key=lambda item: item[1])
        outcome.worst = max(outcome.worst, worst / TOLERANCES[dtype])
        if worst > TOLERANCES[dtype]:
            outcome.failures.append(f"{check['name']}: {name} deviates by {worst:.1e}, more than {TOLERANCES[dtype]:.1e}")
    outcome.seconds = time.perf_counter() - begun
    return outcome


def run() -> Iterator[Outcome]:
    """Runs every check on everything that can compute here, in every dtype, and yields what each pair did."""
    for where in places():
        for dtype in ALL:
            yield run_in(where, dtype)
