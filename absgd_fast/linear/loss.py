"""LinearABLoss: a linear head and its robust loss together, for heads whose logits are too many to store."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .. import ops
from ..losses import fused_spec
from ..robust import ABLoss
from ..robust import options as conflicts
from ..robust.base import RobustLoss
from ..robust.normalizer import Own, Samples, Shared
from ..robust.paths import general
from ..robust.weighting import Tilt
from .chunks import Chunks, check_inputs
from .gradients import LinearLossGrad, RelativeGradients


class LinearABLoss(RobustLoss):
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

    rule = None  # as ABLoss without one

    def __init__(self, criterion: Callable[..., Tensor] | None = None, *, chunk: int | None = None, **options):
        conflicts.check("LinearABLoss", {"rule": options.pop("rule", None)})
        super().__init__(criterion, **options)
        conflicts.check("LinearABLoss", vars(self))
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
        check_inputs(hidden, linear_weight, bias)
        trains = torch.is_grad_enabled() and self.training
        normalizer, update_state = self.normalizer_for(trains), trains and update
        samples = Samples(sample_weight, mask, score)
        if self.operators_for(hidden).has_kernels:
            return self._in_chunks(hidden, linear_weight, target, bias, normalizer, samples, update_state)
        logits = nnf.linear(hidden, linear_weight, bias)
        return general(
            self, Tilt(), normalizer, (logits, target), fused_spec(self.criterion, logits), samples, None, update_state
        )

    @torch.compiler.disable  # the chunks are a loop of Python around torch's matrix products
    def _in_chunks(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        normalizer: Own | Shared,
        samples: Samples,
        update_state: bool,
    ) -> Tensor:
        wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        given = [None if t is None else t.detach() for t in (hidden, weight, bias)]
        operators = self.operators_for(hidden)
        chunks = Chunks(self.criterion, operators, *given, target, samples, self.chunk)
        sample_weight, _, score = chunks.samples
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            if self.lam_is_open and update_state:
                self.fix_lam(*chunks.losses(), lambda stats: normalizer.gather(stats, self, chunks.classes))
            grads = RelativeGradients(self, operators, chunks, wanted)
            losses, valid = grads.losses_and_validity() if any(wanted) else chunks.losses()
            log_s, _, lam, *_ = self.operands(False, 0)
            settled, bounded = normalizer.settle(
                self,
                operators,
                lambda bound: operators.robust_partial_stats(losses, score, valid, log_s, lam, bound),
                chunks.classes,
                update_state,
            )
            loss, sample_stats, sample_factor = operators.robust_apply(
                losses,
                score,
                sample_weight,
                valid,
                settled,
                log_s,
                lam,
                bounded,
                0.0,
                self.max_weight,
                ops.WITH_GRAD if wanted[0] else 0,
            )
        self.memo.remember(sample_stats)
        if not any(wanted):
            return loss
        return LinearLossGrad.apply(hidden, weight, bias, (loss, grads.unfinished(sample_factor), settled))


ABLoss.register(LinearABLoss)  # isinstance(criterion, ABLoss) is true for both
