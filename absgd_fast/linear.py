"""LinearABLoss: a linear head and its robust loss together, for heads whose logits are too many to store."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor

from . import _checks, ops
from .functional import LossSpec
from .losses import fused_spec
from .reference import real_dtype
from .robust import ABLoss

REACH = 20.0  # how far above the reference point a chunk may lie before the sum so far is rescaled to it
CLASS_BLOCK = 8192  # classes whose part of a half-precision weight gradient is added at once


class LinearABLoss(ABLoss):
    """The robust loss of logits = hidden weight^T (+ bias), chunk by chunk, without ever storing them.

        logits = H W^T + b,    L_i the losses of its rows,    loss = (1/n) sum_i sample_weight_i W_i L_i    as in `ABLoss`

    A chunk of rows at a time: logits, losses, and at once the gradient, with weights exp(z_i - a_c) relative to the chunk's own
    log sum exp a_c. Gradients are linear in 1 / s', so at the end, when log s' is known, the rows of dH are brought to their
    size by exp(a_c - log s') / n; dW is added up relative to one reference point, which follows the chunks where they lie
    exp(20) above it. The peak is one chunk of logits (two on a GPU) beside the gradients, instead of four times all of them.
    The forward pass makes the gradients; backward multiplies them. A frozen weight or a frozen hidden costs none.

    Args:
        criterion: one of the fused losses (default `CrossEntropy()`) or torch.nn.CrossEntropyLoss(reduction="none").
        chunk: rows at a time; None: 1/25 of them (1/50 on a GPU, where the gradient stands beside the logits), at least 256, below which
            matrix products lose (2048 x 1024 x 32000 on two cores, over the plain route: 64 rows 1.5, 128 1.4, 256 0.8).
        The others as for `ABLoss`; mix is 0, and max_weight needs normalizer="none", because the gradient is made before
        log s' is known. With lam=-1, normalizer="none" this is dynamic fine-tuning (`DFT`) of a language model.

    forward(hidden, linear_weight, target, bias=None, *, sample_weight=None, mask=None, score=None, update=True):
        hidden (n, d), linear_weight (C, d), bias (C): float32, float64 or bfloat16, all alike (under autocast they are brought
        to its dtype). target (n) labels, or (n, C) probabilities; sample_weight, mask and score (n). Returns a 0-d loss. The
        weight's gradient is summed in float32 for bfloat16.

    Raises:
        ValueError: shapes or devices that do not fit each other; mix, or max_weight with a normaliser. TypeError: a criterion that
        is not fused, dtypes that differ, float16. IndexError: a label out of range. RuntimeError: a second derivative
        (backend="reference" has it, and stores the logits).

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
                losses, valid = head.losses()
                gather = lambda row: self._gather(row, ranks, head.classes)  # noqa: E731
                self._fix_lam(losses, valid, gather)
            made = head.gradients(wanted)
            operators, (log_s, _, lam, *_) = head.operators, self._state(False, 0)
            settled, bounded = self._settle_rows(
                operators, lambda bound: operators.robust_totals(made.losses, head.score, made.valid, log_s, lam, bound),
                ranks, head.classes, learns, trains,
            )  # fmt: skip
            loss, seen, _ = operators.robust_apply(
                made.losses, head.score, head.sample_weight, made.valid, settled, log_s, lam, bounded, 0.0, self.max_weight, 0
            )
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
    sizes: list[int]  # rows of each chunk
    levels: Tensor  # (chunks) float64, a_c: the rows of dH in chunk c count exp(a_c) times
    hidden: Tensor | None = None  # dH (n, d)
    weight: _Sum | None = None  # dW (C, d)
    bias: _Sum | None = None  # db (C)


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
        # the CPU's gradient takes the place of the logits; on a GPU it stands beside them
        self.in_place = operators.in_place
        self.chunk = criterion.chunk or max(256, math.ceil(len(hidden) / (25 if self.in_place else 50)))

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

    def weigh(self, logits: Tensor, part: slice, lam: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """(3, rows): losses, weights, valid of a chunk by itself; and the gradient of its mean of W_i L_i."""
        spec, criterion, operators = self.spec, self.criterion, self.operators
        of_rows = [None if t is None else t[part] for t in (self.score, self.sample_weight, self.mask)]
        loss = (spec.class_weight, spec.adjust, spec.first, spec.second, spec.ignore_index)
        normalizer = "none" if criterion.normalizer == "none" else "batch"
        flags = ops.flags(normalizer, "first") | spec.bits
        target = self.target[part]
        args = (logits, target, *loss, *of_rows, criterion.log_s, criterion.nonfinite_batches, lam, 1.0, 1.0, 0.0,
                criterion.max_weight)  # fmt: skip
        if not wanted:
            return operators.robust_logit_loss(*args, flags)[1], None
        if self.in_place:
            return operators.robust_logit_loss_(*args, flags)[1], logits
        _, rows, stats = operators.robust_logit_loss(*args, flags | ops.WITH_STATS)
        one = logits.new_ones((), dtype=rows.dtype)
        smoothing = spec.first if spec.bits < ops.KIND else 0.0
        return rows, operators.logit_loss_backward(logits, target, *loss[:2], smoothing, stats, one)

    def losses(self) -> tuple[Tensor, Tensor]:
        lam = torch.full_like(self.criterion.lam, math.inf)
        rows = torch.cat([self.weigh(logits, part, lam, False)[0] for part, logits in self.parts()], 1)
        return rows[0], rows[2] > 0

    def gradients(self, wanted: list[bool]) -> _Made:
        """wanted: of hidden, weight, bias."""
        lam, out = self.criterion._state(False, 0)[2], _Made()
        real = real_dtype(self.hidden.dtype)
        rows, levels, out.sizes = [self.hidden.new_empty((3, 0), dtype=real)], [], []
        out.hidden = torch.empty_like(self.hidden) if wanted[0] else None
        out.weight, out.bias = (
            _Sum(t, real, self.operators) if on else None for t, on in zip((self.weight, self.bias), wanted[1:])
        )
        for part, logits in self.parts():
            seen, grad = self.weigh(logits, part, lam, any(wanted))
            rows.append(seen)
            out.sizes.append(seen.shape[1])
            if grad is None:
                continue
            level = self.level(seen, part, lam)
            levels.append(level)
            if out.hidden is not None:
                torch.mm(grad, self.weight, out=out.hidden[part])
            if out.weight is not None:
                out.weight.add_product(grad, self.hidden[part], level)
            if out.bias is not None:
                out.bias.add(grad.sum(0, dtype=real), level)
        seen = torch.cat(rows, 1)
        out.losses, out.valid = seen[0].contiguous(), seen[2] > 0
        out.levels = torch.stack(levels) if levels else torch.empty(0, dtype=torch.float64, device=self.hidden.device)
        return out

    def level(self, seen: Tensor, part: slice, lam: Tensor) -> Tensor:
        """a_c (0-d float64): exp(a_c) times the gradient of a chunk is that of sum_i exp(z_i) L_i. -inf without a row."""
        score = None if self.score is None else self.score[part]
        totals = self.operators.robust_totals(seen[0], score, seen[2] > 0, self.criterion.log_s, lam, None)
        return totals[1].log() if self.criterion.normalizer == "none" else totals[0]


def _target(target: Tensor, hidden: Tensor, classes: int, spec: LossSpec) -> Tensor:
    target = _checks.target(hidden.new_empty(()).expand(len(hidden), classes), target, soft=spec.soft)
    return target if target.is_floating_point() else ops.check_labels(target, classes, spec.ignore_index).contiguous()


class _Sum:
    """sum_c exp(a_c) part_c, kept as exp(-reference) times it: in float32 for bfloat16."""

    def __init__(self, like: Tensor, real: torch.dtype, operators: ops.Operators):
        self.total = torch.zeros(like.shape, dtype=real, device=like.device)
        self.reference = torch.full((), -math.inf, dtype=torch.float64, device=like.device)
        self.operators = operators

    def _factor(self, level: Tensor) -> Tensor:
        """What the part of this level is multiplied by; rescales the sum where the reference point moves. All on the device."""
        moved = torch.where(level > self.reference + REACH, level, self.reference)
        ratio = torch.where(moved > self.reference, (self.reference - moved).exp(), 1.0)
        self.operators.scale_(self.total, ratio.to(self.total.dtype))  # by 1: nothing is read
        self.reference = moved
        # a chunk without a row that counts: its part is 0, or NaN from a bad row, and stays so
        return torch.where(level.isneginf(), 1.0, (level - moved).exp()).to(self.total.dtype)

    def add(self, part: Tensor, level: Tensor) -> None:
        self.total.addcmul_(part, self._factor(level))

    def add_product(self, grad: Tensor, hidden: Tensor, level: Tensor) -> None:
        """grad (rows, C), hidden (rows, d): grad^T hidden."""
        factor = self._factor(level)
        if grad.dtype == self.total.dtype:
            self.total.addmm_(grad.t(), hidden * factor)
            return
        for block in range(0, len(self.total), CLASS_BLOCK):
            of = slice(block, block + CLASS_BLOCK)
            self.total[of].addcmul_((grad[:, of].t() @ hidden).to(factor.dtype), factor)


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

        to_mean = upstream.double() * ctx.settled[1]
        rows = to_mean * (made.levels - ctx.settled[0]).exp()
        rows = rows.masked_fill(made.levels.isneginf(), 1.0)  # no row that counts: 0, or NaN from a bad row
        per_row = rows.repeat_interleave(
            torch.tensor(made.sizes, dtype=torch.int64, device=rows.device), output_size=sum(made.sizes)
        )
        grads = [finished(made.hidden, per_row.unsqueeze(1))]
        for total in (made.weight, made.bias):
            point = None if total is None else total.reference
            factor = None if total is None else torch.where(point.isneginf(), to_mean, to_mean * (point - ctx.settled[0]).exp())
            grads.append(None if total is None else finished(total.total, factor))
        if not kept:
            ctx.made = None
        return (*grads, None)
