"""LinearABLoss: a linear head and its robust loss together, for heads whose logits are too many to store."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as nnf
from torch import Tensor

from . import _checks, ops
from .functional import LossSpec
from .losses import fused_spec
from .reference import real_dtype
from .robust import ABLoss

REACH = 20.0  # how far above the reference point a chunk may lie before the sums so far are rescaled to it
CLASS_BLOCK = 8192  # classes whose part of a half-precision weight gradient is added at once
CHUNKS = {"cpu": 25}  # unless told otherwise, and where a chunk has LEAST_ROWS
CHUNKS_ELSEWHERE = 8
LEAST_ROWS = 256


class LinearABLoss(ABLoss):
    """The robust loss of logits = hidden weight^T (+ bias), chunk by chunk, without ever storing them.

        logits = H W^T + b,    L_i the losses of its rows,    loss = (1/n) sum_i sample_weight_i W_i L_i    as in `ABLoss`

    A chunk of rows at a time: logits, losses, and in place of the logits the gradient G of each row's own loss. Its weight joins
    afterwards: dW = sum over the chunks of G^T (diag(w) H) and db = sum of G^T w with w_i = sample_weight_i exp(z_i - m), m a
    reference point that follows the chunks where they lie exp(20) above it; dH = diag(W / n) (G weight) once log s' is known. The
    peak is one chunk of logits beside the gradients, instead of four times all of them. The forward pass makes the gradients;
    backward multiplies them. A frozen weight or a frozen hidden costs none.

    Args:
        criterion: one of the fused losses (default `CrossEntropy()`) or torch.nn.CrossEntropyLoss(reduction="none").
        chunk: rows at a time; None: 1/25 of them (1/8 on a GPU, where the sum of dW is read and written for each), at least 256,
            below which matrix products lose (2048 x 1024 x 32000 on two cores, over the plain route: 64 rows 1.5, 128 1.4,
            256 0.8).
        The others as for `ABLoss`; mix is 0, and max_weight needs normalizer="none", because the gradient is made before
        log s' is known. With lam=-1, normalizer="none" this is dynamic fine-tuning (`DFT`) of a language model.

    forward(hidden, linear_weight, target, bias=None, *, sample_weight=None, mask=None, score=None, update=True):
        hidden (n, d), linear_weight (C, d), bias (C): float32, float64 or bfloat16, all alike (under autocast they are brought
        to its dtype). target (n) labels, or (n, C) probabilities; sample_weight, mask and score (n). Returns a 0-d loss. The
        weight's gradient is summed in float32 for bfloat16.

    Raises:
        ValueError: shapes or devices that do not fit each other; mix, or max_weight with a normaliser. TypeError: a criterion that
        is not fused, dtypes that differ, float16. IndexError: a label out of range (on a GPU by a
        later call, which counts its row within its chunk). RuntimeError: a second derivative (backend="reference" has it, and
        stores the logits).

    >>> hidden = torch.randn(64, 16, requires_grad=True)
    >>> head = torch.nn.Linear(16, 1000)
    >>> criterion = LinearABLoss(lam=0.5)
    >>> criterion(hidden, head.weight, torch.arange(64), head.bias).backward()
    >>> hidden.grad.shape, head.weight.grad.shape, criterion.last.weights.shape
    (torch.Size([64, 16]), torch.Size([1000, 16]), torch.Size([64]))

    Source: ABSGD paper, Alg. 1; the idea of computing a loss with its linear layer in chunks: Hsu et al. 2024, Liger Kernel.
    """

    def __init__(self, criterion: Callable[..., Tensor] | None = None, *, chunk: int | None = None, **options):
        if options.get("rule") is not None:
            raise ValueError("rule: got one with LinearABLoss, whose gradients are made before all losses are known; use ABLoss")
        super().__init__(criterion, **options)
        self._check_deferrable("LinearABLoss")
        if chunk is not None and not (isinstance(chunk, int) and not isinstance(chunk, bool) and chunk > 0):
            raise ValueError(f"chunk: got {chunk!r}, expected a positive number of rows, or None")
        self.chunk = chunk

    def forward(
        self,
        hidden: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        score: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, linear_weight, bias = (t if t is None else t.to(dtype) for t in (hidden, linear_weight, bias))
        _check_inputs(hidden, linear_weight, bias)
        rows = dict(sample_weight=sample_weight, mask=mask, score=score)
        if self._operators(hidden) is None:
            return super().forward(nnf.linear(hidden, linear_weight, bias), target, **rows, update=update)
        return self._in_chunks(hidden, linear_weight, target, bias, rows, update)

    @torch.compiler.disable  # the chunks are a loop of Python around torch's matrix products
    def _in_chunks(self, hidden, weight, target, bias, rows, update) -> Tensor:
        trains = torch.is_grad_enabled() and self.training
        wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        given = [None if t is None else t.detach() for t in (hidden, weight, bias)]
        head = _Head(self, *given, self._operators(hidden), target, rows)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            ranks = self._ranks() if trains else 1
            learns = trains and update
            if self._lam_is_open and learns:
                losses, valid = head.losses(in_place=False)
                gather = lambda row: self._gather(row, ranks, head.classes)  # noqa: E731
                self._fix_lam(losses, valid, gather)
            made = head.gradients(wanted) if any(wanted) else head.nothing_but_losses()
            operators, (log_s, _, lam, *_) = head.operators, self._state(False, 0)
            settled, bounded = self._settle_rows(
                operators, lambda bound: operators.robust_totals(made.losses, head.score, made.valid, log_s, lam, bound),
                ranks, head.classes, learns, trains,
            )  # fmt: skip
            loss, seen, made.row_factor = operators.robust_apply(
                made.losses, head.score, head.sample_weight, made.valid, settled, log_s, lam, bounded, 0.0, self.max_weight,
                ops.WITH_GRAD if wanted[0] else 0,
            )  # fmt: skip
        self._remember(seen)
        if not any(wanted):
            return loss
        return _Attach.apply(hidden, weight, bias, (loss, made, settled))


def _check_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"LinearABLoss: got hidden {tuple(hidden.shape)} and linear_weight {tuple(weight.shape)}, expected (n, d) and (C, d)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}, one number per class")
    for name, t in (("linear_weight", weight), ("bias", bias)):
        if t is not None and t.dtype != hidden.dtype:
            raise TypeError(f"{name}: got {t.dtype}, but hidden is {hidden.dtype}; expected one dtype")
        if t is not None and t.device != hidden.device:
            raise ValueError(f"{name}: got a tensor on {t.device}, but hidden is on {hidden.device}")
    if hidden.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(
            f"hidden: got {hidden.dtype}, expected float32, float64 or bfloat16, which hold sums without a loss scale"
        )


class _Made:
    """What one walk over the chunks leaves."""

    losses: Tensor  # (n) real
    valid: Tensor  # (n) bool
    hidden: Tensor | None = None  # (n, d): G weight, the rows of dH but for
    row_factor: Tensor | None = None  # (n) real: d loss / d L_i
    weight: Tensor | None = None  # (C, d) real: dW relative to the reference point
    bias: Tensor | None = None  # (C) real: db, likewise
    point: Tensor  # (6) float64, reference.settle of the chunk the reference point is from, but its scale is 1


class _Head:
    """The inputs of one forward pass, and the walk over its rows."""

    def __init__(self, criterion: LinearABLoss, hidden, weight, bias, operators, target, rows):
        empty = hidden.new_empty((0, weight.shape[0]))
        spec = fused_spec(criterion.criterion, empty)
        if spec is None:
            raise TypeError(
                f"criterion: got {type(criterion.criterion).__name__}, expected one of the fused losses with reduction='none':"
                " others need the whole of the logits, ABLoss(criterion)(hidden @ weight.T, target)"
            )
        self.criterion, self.operators, self.classes, self.spec = criterion, operators, weight.shape[0], spec
        self.hidden, self.weight, self.bias = hidden.contiguous(), weight, bias
        self.target = _target(target, hidden, self.classes, spec)
        real, like = real_dtype(hidden.dtype), hidden[:, 0] if hidden.shape[1] else hidden.new_empty(len(hidden))
        self.sample_weight = _checks.per_sample(rows["sample_weight"], "sample_weight", like, real)
        self.mask = _checks.per_sample(rows["mask"], "mask", like, torch.bool)
        self.score = _checks.per_sample(rows["score"], "score", like, real)
        if spec.class_weight is not None:
            spec = spec._replace(class_weight=_checks.class_weight(spec.class_weight, empty))
        if spec.adjust is not None:
            spec = spec._replace(adjust=_checks.adjust(spec.adjust, empty))
        self.spec = spec
        if self.mask is not None and not self.target.is_floating_point():  # a row that is ignored anyway may hold anything
            self.target = self.target.masked_fill(~self.mask, spec.ignore_index)
        chunks = CHUNKS.get(hidden.device.type, CHUNKS_ELSEWHERE)
        self.chunk = criterion.chunk or max(LEAST_ROWS, math.ceil(len(hidden) / chunks))

    def parts(self):
        """(rows, their logits) of each chunk; the logits of the next take their place."""
        n = len(self.hidden)
        buffer = self.hidden.new_empty((min(self.chunk, n), self.classes))
        for begin in range(0, n, self.chunk):
            part = slice(begin, min(begin + self.chunk, n))
            hidden, logits = self.hidden[part], buffer[: min(self.chunk, n - begin)]
            if self.bias is None:
                torch.mm(hidden, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, hidden, self.weight.t(), out=logits)
            yield part, logits

    def losses_of(self, logits: Tensor, part: slice, in_place: bool) -> tuple[Tensor, Tensor]:
        """Losses of a chunk, and which rows count; in place: their gradients take the place of the logits."""
        spec, operator = self.spec, self.operators.logit_loss_ if in_place else self.operators.logit_loss
        try:
            losses, *_, valid = operator(logits, self.target[part], *spec)
        except RuntimeError as error:
            raise ops.translated(error, part.start) from None
        valid = valid > 0
        if self.mask is not None:
            valid &= self.mask[part]
            if in_place and spec.soft and self.target.is_floating_point():
                logits.masked_fill_(~valid.unsqueeze(1), 0.0)
        return losses, valid

    def losses(self, in_place: bool, then=lambda *chunk: None) -> tuple[Tensor, Tensor]:
        """Losses and validity of all rows. then(part, G or logits, losses, validity) for each chunk."""
        rows = [(self.hidden.new_empty(0, dtype=real_dtype(self.hidden.dtype)), self.target.new_empty(0, dtype=torch.bool))]
        for part, logits in self.parts():
            rows.append(self.losses_of(logits, part, in_place))
            then(part, logits, *rows[-1])
        losses, valid = map(torch.cat, zip(*rows))
        return losses, valid

    def nothing_but_losses(self) -> _Made:
        out = _Made()
        out.losses, out.valid = self.losses(in_place=False)
        return out

    def gradients(self, wanted: list[bool]) -> _Made:
        """wanted: of hidden, weight, bias."""
        out, real = _Made(), real_dtype(self.hidden.dtype)
        out.hidden = torch.empty_like(self.hidden) if wanted[0] else None
        out.weight, out.bias = (
            t.new_zeros(t.shape, dtype=real) if on else None for t, on in zip((self.weight, self.bias), wanted[1:])
        )
        out.point = torch.zeros(6, dtype=torch.float64, device=self.hidden.device)

        def add(part, grad, losses, valid):
            if out.hidden is not None:
                torch.mm(grad, self.weight, out=out.hidden[part])
            if out.weight is None and out.bias is None:
                return
            weights = self.weights(out, part, losses, valid).unsqueeze(1)
            if out.weight is not None:
                _add_product(out.weight, grad.t(), (self.hidden[part] * weights).to(grad.dtype))
            if out.bias is not None:
                _add_product(out.bias.unsqueeze(1), grad.t(), weights.to(grad.dtype))

        out.losses, out.valid = self.losses(True, add)
        return out

    def weights(self, made: _Made, part: slice, losses: Tensor, valid: Tensor) -> Tensor:
        """sample_weight_i exp(z_i - m) of a chunk, 0 where a row does not count. First m is brought near the chunk, and the sums
        to it. All on the device."""
        criterion, operators = self.criterion, self.operators
        log_s, nonfinite, lam, *_ = criterion._state(False, 0)
        score, sample_weight = (None if t is None else t[part] for t in (self.score, self.sample_weight))
        bits = ops.flags("none" if criterion.normalizer == "none" else "batch", "first")
        totals = operators.robust_totals(losses, score, valid, log_s, lam, None)
        here = operators.robust_settle(totals.unsqueeze(0), log_s, nonfinite, lam, None, 1.0, 1.0, 1.0, bits)
        here[1] = 1.0
        point, some = made.point, made.point[4] > 0
        moves = (here[4] > 0) & (~some | (here[0] > point[0] + REACH))
        ratio = torch.where(moves & some, (point[0] - here[0]).exp(), 1.0).to(losses.dtype)
        for total in (made.weight, made.bias):
            if total is not None:
                operators.scale_(total, ratio)  # by 1: nothing is read
        made.point = torch.where(moves, here, point)
        return operators.robust_apply(
            losses, score, sample_weight, valid, made.point, log_s, lam, False, 0.0, criterion.max_weight, ops.WITH_GRAD
        )[2]


def _target(target: Tensor, hidden: Tensor, classes: int, spec: LossSpec) -> Tensor:
    return _checks.target(hidden.new_empty(()).expand(len(hidden), classes), target, soft=spec.soft).contiguous()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b: in float32 for bfloat16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif _adds_in_float32(total.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        for block in range(0, len(total), CLASS_BLOCK):
            of = slice(block, block + CLASS_BLOCK)
            total[of] += a[of] @ b


@cache
def _adds_in_float32(device: torch.device) -> bool:
    """Whether torch adds a product of bfloat16 matrices to a float32 one. CUDA does; the CPU does not as of torch 2.13."""
    some = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    try:
        total = some.float()
        torch.addmm(total, some, some, out_dtype=torch.float32, out=total)  # the overload that is used
    except (RuntimeError, TypeError):  # NotImplementedError is the first; torch 2.11's decomposition for `meta` raises the second
        return False
    return True


class _Attach(torch.autograd.Function):
    """The loss, whose gradients are known up to a factor each."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, made):
        loss, ctx.made, ctx.settled = made
        ctx.dtype = hidden.dtype
        ctx.used = False
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "LinearABLoss: got backward with create_graph=True, which needs the logits that were never stored; use"
                " backend='reference', or ABLoss on hidden @ weight.T"
            )
        made, kept = ctx.made, ops.graph_is_kept()
        if made is None:
            raise RuntimeError("LinearABLoss: got a second backward, expected retain_graph=True in the first")

        def finished(grad: Tensor | None, factor: Tensor) -> Tensor | None:
            if grad is None:
                return None
            factor = factor.to(grad.dtype) if grad.dtype == torch.float64 else factor.float()
            return (grad * factor if kept else grad.mul_(factor)).to(ctx.dtype)

        log_s, to_mean, *_ = ctx.settled
        # without a row that counts the sums are 0, or NaN from bad rows, and stay so
        moved = torch.where(made.point[4] > 0, (made.point[0] - log_s).exp(), 1.0)
        sums = upstream.double() * to_mean * moved
        rows = None if made.hidden is None else (upstream * made.row_factor).unsqueeze(1)
        grads = finished(made.hidden, rows), finished(made.weight, sums), finished(made.bias, sums)
        if not kept:
            ctx.made = None
        return (*grads, None)
