"""Whether every backend of this machine computes the right numbers: `absgd-fast doctor --selftest`.

vectors.json has inputs, and the losses, gradients, weights and steps that follow from them. These are not this package's own
results. tests/selftest_vectors.py computed them in float64: from the formulas of docs/MATH.md, and with torch.optim. The inputs
are exact in every dtype, so a backend may differ by its own rounding only. Of a large input the file has the shape, and of its
results every so many rows and columns: the shapes take each way through the kernels (csrc/launch.h).

>>> sorted({check["kind"] for check in vectors()})  # doctest: +NORMALIZE_WHITESPACE
['deferred', 'linear', 'logits', 'losses', 'rectified', 'robust logits', 'rule', 'steps', 'weighted step', 'weights']
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
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

# The largest `deviation` that rounding may make: about three times the largest that any backend of the CPU had.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-5, torch.float16: 2.2e-3, torch.bfloat16: 2.1e-2}


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
        """The numbers on the device: given as nested lists, or as the shape of a large input."""
        if not isinstance(values, dict):
            return torch.tensor(values, dtype=dtype, device=self.device)
        return large(**values).to(self.device, dtype if dtype is not None and values["kind"] != "labels" else None)

    def why_not(self, dtype: torch.dtype) -> str | None:
        """Why the device cannot compute in a dtype, or None."""
        try:
            (torch.ones(1, dtype=dtype, device=self.device) + 1).item()
        except (RuntimeError, TypeError, AssertionError) as error:
            return str(error).splitlines()[0]
        return None


def large(kind: str, shape: list[int], classes: int = 0) -> Tensor:
    """A large input by a formula: "logits" and "losses" are multiples of 1/16 below 8, which every dtype holds exactly."""
    count = torch.arange(math.prod(shape), device="cpu")
    if kind == "labels":
        labels = count * 31 % classes
        return torch.where(count % 13 == 5, -100, labels).view(shape)
    values = (count * 7919 % 255 - 127).double() / 16
    return (values.abs() if kind == "losses" else values).view(shape)


@dataclass
class Outcome:
    """What one backend did with the checks in one dtype.

    worst: the largest deviation of all checks, as a share of the tolerance; above 1 a check failed.
    failures: one sentence for each check that failed.
    not_run: why there are no checks, or None.
    """

    where: str
    dtype: str
    checks: int = 0
    worst: float = 0.0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    not_run: str | None = None

    def sentences(self) -> list[str]:
        """The failures, each with the backend and the dtype."""
        return [f"{self.where}, {self.dtype}: {failure}" for failure in self.failures]


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
        # a graph that is kept has its gradient scaled into a new tensor, and another in place
        (value * batch["factor"]).backward(retain_graph=batch["factor"] != 1)
        results |= {f"value {step}": value, f"gradient {step}": x.grad, f"log s {step}": criterion.log_s.clone()}
    return results


def _deferred(check: Check, where: Where, dtype: torch.dtype) -> Results:
    criterion = _robust(ab.ABLoss, where, dtype, _module(check, where, dtype), **check["options"], deferred=True)
    leaves = []
    for batch in check["batches"]:
        leaves.append(where.tensor(batch["logits"], dtype).requires_grad_())
        criterion(leaves[-1], where.tensor(batch["target"])).backward()
    criterion.finish_(leaves)
    return {"log s": criterion.log_s} | {f"gradient {i}": x.grad for i, x in enumerate(leaves, 1) if x.grad is not None}


def _losses(check: Check, where: Where, dtype: torch.dtype) -> Results:
    options = check["options"] | {"lam": float(check["options"]["lam"])}
    criterion = _robust(ab.ABLoss, where, dtype, lambda losses: losses, **options)
    results: dict[str, Any] = {}
    for step, batch in enumerate(check["batches"], 1):
        losses = where.tensor(batch["losses"], dtype).requires_grad_()
        value = criterion(losses, mask=None if batch["mask"] is None else where.tensor(batch["mask"]))
        value.backward()
        results |= {f"value {step}": value, f"gradient {step}": losses.grad, f"weights {step}": criterion.last.weights}
        if options["lam"] != float("inf"):  # the plain mean has no s
            results |= {f"log s {step}": criterion.log_s.clone()}
    return results


def _weights(check: Check, where: Where, dtype: torch.dtype) -> Results:
    losses = where.tensor(check["losses"], dtype).requires_grad_()
    log_s = where.tensor(check["log_s"], torch.promote_types(dtype, torch.float32))
    weights, log_s = ab.functional.robust_weights(losses, log_s, **check["options"], backend=where.backend)
    (weights * where.tensor(check["upstream"], weights.dtype)).sum().backward()
    assert losses.grad is not None
    return {"weights": weights, "log s": log_s, "gradient": losses.grad}


def _rule(check: Check, where: Where, dtype: torch.dtype) -> Results:
    losses = where.tensor(check["losses"], dtype)
    if check["rule"] == "GroupDRO":
        rule = ab.weights.GroupDRO(**check["options"], backend=where.backend).to(
            where.device, torch.promote_types(dtype, torch.float32)
        )
        return {f"weights {step}": rule(losses, groups=where.tensor(check["groups"])) for step in (1, 2)}
    return {"weights": getattr(ab.weights, check["rule"])(losses, **check["options"], backend=where.backend)}


def _linear(check: Check, where: Where, dtype: torch.dtype) -> Results:
    hidden, weight = (where.tensor(check[name], dtype).requires_grad_() for name in ("hidden", "weight"))
    criterion = _robust(ab.LinearABLoss, where, dtype, lam=check["lam"], chunk=check["chunk"])
    value = criterion(hidden, weight, where.tensor(check["target"]))
    value.backward()
    return {"value": value, "hidden gradient": hidden.grad, "weight gradient": weight.grad}


def _steps(check: Check, where: Where, dtype: torch.dtype) -> Results:
    params = [where.tensor(values, dtype).requires_grad_() for values in check["params"]]
    optimizer = getattr(ab, check["optimizer"])(params, lr=1.0, **check["options"], backend=where.backend)
    for lr, gradients in zip(check["lrs"], check["gradients"]):
        optimizer.param_groups[0]["lr"] = lr
        for p, gradient in zip(params, gradients):
            p.grad = where.tensor(gradient, dtype)
        optimizer.step()
    return {f"parameter {i}": p for i, p in enumerate(params, 1)}


def _weighted_step(check: Check, where: Where, dtype: torch.dtype) -> Results:
    params, grads = ([where.tensor(v, dtype) for v in check[name]] for name in ("params", "per_sample_grads"))
    buffers = [where.tensor(v, torch.promote_types(dtype, torch.float32)) for v in check["buffers"]]
    losses, options = where.tensor(check["losses"], dtype), check["options"]
    log_s = ab.functional.weighted_momentum_step_(
        params, buffers, grads, losses, check["log_s"], **options, backend=where.backend
    )
    after = {f"parameter {i}": p for i, p in enumerate(params, 1)}
    return after | {f"momentum {i}": b for i, b in enumerate(buffers, 1)} | {"log s": log_s}


def _rectified(check: Check, where: Where, dtype: torch.dtype) -> Results:
    return {"weights": ops.OPERATORS[where.backend].rectified(where.tensor(check["products"], dtype))}


REAL = (torch.float64, torch.float32)
WIDE = (*REAL, torch.bfloat16)  # float16 is refused: sums that are not normalised yet would leave its range
ALL = (*WIDE, torch.float16)
KINDS: dict[str, tuple[Callable[[Check, Where, torch.dtype], Results], tuple[torch.dtype, ...]]] = {
    "logits": (_logits, ALL),
    "robust logits": (_robust_logits, ALL),
    "deferred": (_deferred, WIDE),
    "losses": (_losses, ALL),
    "weights": (_weights, REAL),
    "rule": (_rule, REAL),
    "linear": (_linear, WIDE),
    "steps": (_steps, ALL),
    "weighted step": (_weighted_step, ALL),
    "rectified": (_rectified, REAL),
}


# ---- running them ----


def part(values: Any, every: Sequence[int]) -> Any:
    """Of a large result, as a tensor or an array, every so many rows and columns."""
    rows, columns = every
    return values[::rows, ..., ::columns] if values.ndim > 1 else values[::rows]


def deviation(name: str, got: Tensor, expected: Any) -> float:
    """The largest |got − expected| of a result, relative to what is expected. Infinite where a number is NaN, or shapes differ.

    Each row of a gradient is measured by its own largest element, so a missing row shows, however small its weight. Losses and
    weights are measured one by one, down to a twentieth of the largest. Other results, whose terms may cancel, are measured by
    their largest element. The divisor is at least the smallest normal number of the dtype: smaller ones have fewer digits.
    """
    if isinstance(expected, dict):  # a part of a large result
        got, expected = part(got, expected["every"]), expected["values"]
    exact = torch.tensor(expected, dtype=torch.float64, device="cpu")
    if got.shape != exact.shape:
        return float("inf")
    size = exact.abs()
    if name.startswith("gradient") and exact.dim() > 1:
        size = size.amax(-1, keepdim=True)
    elif name.startswith(("losses", "weights", "gradient")):
        size = size.clamp(min=float(size.max()) / 20)
    else:
        size = size.max()
    found = (got.detach().cpu().double() - exact).abs() / size.clamp(min=torch.finfo(got.dtype).tiny)
    worst = float(found.max())
    return worst if worst == worst else float("inf")


def run_check(check: Check, where: Where, dtype: torch.dtype) -> dict[str, float]:
    """The deviation of every result of one check. Whatever the backend raises comes through."""
    compute = KINDS[check["kind"]][0]
    with where.chosen():
        results = compute(check, where, dtype)
    assert results.keys() == check["expected"].keys()
    return {name: deviation(name, value, check["expected"][name]) for name, value in results.items()}


def run_in(where: Where, dtype: torch.dtype, checks: list[Check] | None = None) -> Outcome:
    """Runs the checks of one backend in one dtype. An error of the backend is a failure of its check."""
    outcome = Outcome(str(where), str(dtype).removeprefix("torch."))
    outcome.not_run = where.why_not(dtype)
    if outcome.not_run:
        return outcome
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
    """Runs every check on everything that can compute here, in every dtype, and yields what each pair did.

    A backend that cannot run gives one outcome, with the reason. So does a device that does not answer any more after a failure.
    """
    for name in _backend.NAMES:
        if reason := _backend.why_not(name):
            yield Outcome(name, "", not_run=reason)
    lost: dict[str, str] = {}
    for where in places():
        if where.device in lost:
            yield Outcome(str(where), "", not_run=lost[where.device])
            continue
        for dtype in ALL:
            outcome = run_in(where, dtype)
            yield outcome
            silent = where.why_not(torch.float32) if outcome.failures else None
            if silent is not None:
                lost[where.device] = f"the device does not answer any more: {silent}"
                break
