"""LinearABLoss: a linear head and its robust loss in one, for heads with too many logits to store."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .. import _checks, ops
from .._checkpointing import hooks_are_active
from .._compiled import outside_graphs
from ..losses import fused_spec
from ..robust import ABLoss
from ..robust import options as conflicts
from ..robust.base import RobustLoss
from ..robust.conclude import conclude
from ..robust.last import Weighed
from ..robust.normalizer import OWN, InStages, Own, Samples
from ..robust.options import LossOptions
from ..robust.paths import general, refuse_learned
from ..robust.replay import run_once_or_again
from ..robust.target import Before, Solved, before_stages, commit
from ..robust.weighting import Tilt
from .chunks import Chunks, check_inputs, check_tensors, in_rows
from .gradients import LinearLossGrad, RelativeGradients, refuse_second_derivative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LinearABLoss(RobustLoss):
    """The robust loss of a linear head, logits = hidden weight^T + bias, without storing the logits.

    Call it as criterion(hidden, head.weight, target, head.bias), with hidden (n, d), head.weight (C, d), target (n) labels or
    (n, C) probabilities, and head.bias (C) or None. The samples may have any shape instead of (n), such as (B, T) for the tokens
    of a language model. It replaces a last torch.nn.Linear(d, C) and `ABLoss`. Use it if the head has very many classes. The loss
    and the gradients are those of `ABLoss` on the logits:

        logits = hidden weight^T + bias,    L_i = loss of row i,    loss = (1/n) sum_i sample_weight_i W_i L_i

    The forward pass goes over the rows chunk by chunk, and makes the gradients in the same pass (docs/MATH.md §6). The peak of
    memory is one chunk of logits and the gradients, instead of four times all logits. The gradient of a frozen weight or hidden
    is not made. With backend="reference", and inside torch.func transforms, the logits are stored.

    Args:
        criterion: a loss of this package (default `CrossEntropy()`) or torch.nn.CrossEntropyLoss, with reduction="none".
        chunk: rows in a chunk. None: 1/25 of the rows on the CPU, 1/8 on a GPU (where each chunk reads and writes the sum of
            dweight), but at least 256. With fewer rows the matrix products lose: 2048 x 1024 x 32000 on two cores took 1.5 times
            the plain route with 64 rows, 1.4 times with 128, and 0.8 times with 256.
        rule: refused.
        **options: lam and all others of `ABLoss`, with the same defaults. mix must be 0, and max_weight needs normalizer="none",
            because the gradient is made before log s' is known. lam=-1 with normalizer="none" is dynamic fine-tuning (`DFT`).

    Ignored rows, NaN rows, eval mode, several processes and deferred mode are as for `ABLoss`.

    Raises:
        ValueError: chunk is not a positive integer; a rule, mix, or max_weight with a normaliser; the others as for `ABLoss`.
        TypeError: an option that is unknown, such as ignore_index, which the criterion has; the others as for `ABLoss`.

    >>> hidden = torch.randn(64, 16, requires_grad=True)
    >>> head = torch.nn.Linear(16, 1000)
    >>> criterion = LinearABLoss(lam=0.5)
    >>> criterion(hidden, head.weight, torch.arange(64), head.bias).backward()
    >>> hidden.grad.shape, head.weight.grad.shape, criterion.last.weights.shape
    (torch.Size([64, 16]), torch.Size([1000, 16]), torch.Size([64]))

    Source: ABSGD paper, Alg. 1; the idea of computing a loss with its linear layer in chunks: Hsu et al. 2024, Liger Kernel.
    """

    rule = None  # as an ABLoss without a rule

    def __init__(
        self,
        criterion: Callable[..., Tensor] | None = None,
        *,
        chunk: int | None = None,
        rule: None = None,
        **options: Unpack[LossOptions],
    ):
        conflicts.check("LinearABLoss", {"rule": rule})
        for name in options.keys() - LossOptions.__optional_keys__:
            instead = "CrossEntropy(ignore_index=...) as the criterion" if name == "ignore_index" else "one of help(LinearABLoss)"
            raise TypeError(f"LinearABLoss: got an unknown option {name!r}, expected {instead}")
        if isinstance(criterion, getattr(nn, "LinearCrossEntropyLoss", ())):  # torch 2.13 and later have it
            raise TypeError(
                "criterion: got torch.nn.LinearCrossEntropyLoss, which has a head of its own; expected the loss alone:"
                " LinearABLoss(CrossEntropy(weight, label_smoothing, ignore_index), lam=...), called as criterion(hidden,"
                " head.linear.weight, target, head.linear.bias) if head is torch's"
            )
        super().__init__(criterion, **options)
        conflicts.check("LinearABLoss", vars(self))
        self.chunk = None if chunk is None else _checks.at_least(chunk, "chunk", 1, "a positive number of rows, or None")

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
        """The robust loss of the head's logits.

        Args:
            hidden: (n, d) or (..., d), the inputs of the head, with any strides. linear_weight: (C, d). bias: (C) or None. All
                float32, float64 or bfloat16, and of one dtype; under autocast they are cast to its dtype.
            target: (...) labels, int64 or int32, or (..., C) probabilities. If these require grad, another (n, C)
                tensor is kept for their gradient.
            sample_weight, mask, score, update: as for `ABLoss.forward`, with one value per sample, (...). `last.losses` and
                `last.weights` have this shape too.

        Returns:
            0-d loss, float64 for float64 inputs, else float32. For bfloat16 inputs the gradient of the weight is summed in
            float32. On a CPU without instructions for bfloat16 their products are float32 too, and so are the logits of a
            chunk and their gradients; 1024 classes of the weight at a time are converted.

        Raises:
            ValueError: shapes or devices that do not fit each other. TypeError: a criterion that has no kernel, dtypes that
                differ, float16, an input that is no tensor (a module, for example). IndexError: a label out of range (on a GPU
                a later call raises it, and the row is counted within its chunk).
            RuntimeError: in backward, a second derivative (backend="reference" has it, and stores the logits); inside a
                torch.func transform, a forward that would update the state.
        """
        check_tensors(hidden, linear_weight, bias)
        if not hidden.is_meta and torch.is_autocast_enabled(hidden.device.type):  # torch knows no autocast of meta tensors
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, linear_weight, bias = hidden.to(dtype), linear_weight.to(dtype), None if bias is None else bias.to(dtype)
        check_inputs(hidden, linear_weight, bias)
        shape = hidden.shape[:-1]
        samples = Samples(sample_weight, mask, score)
        if len(shape) > 1:
            hidden, target, samples = in_rows(hidden, target, samples, len(linear_weight))
        trains, before = torch.is_grad_enabled() and self.training, self.memo.sample_stats
        normalizer, update_state = self.normalizer_for(trains), trains and update
        head = hidden, linear_weight, target, bias
        if hooks_are_active():
            of_batch = partial(_robust_loss, head=head, samples=samples)
            loss = run_once_or_again(of_batch, self, Tilt(), normalizer, update_state)
        else:
            loss = _robust_loss(self, Tilt(), normalizer, update_state, head, samples)
        if len(shape) > 1:
            self.memo.reshape(shape, before)
        if update_state and normalizer is not OWN:
            self._watch(loss)
        return loss

    @outside_graphs  # the chunks are a loop of Python around torch's matrix products
    def _in_chunks(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None,
        normalizer: Own | InStages,
        samples: Samples,
        update_state: bool,
    ) -> Weighed:
        """The loss, whose gradients are made in the same pass (unless none is wanted)."""
        inputs, head, head_bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        operators = self.operators_for(hidden)
        chunks = Chunks(self.criterion, operators, inputs, head, head_bias, target, samples, self.chunk)
        sample_weight = chunks.samples.sample_weight
        refuse_learned(self, update_state, sample_weight=sample_weight, target=chunks.target)
        wanted = [t is not None and ops.is_learned(t) for t in (hidden, weight, bias, chunks.target)]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            if self.lam_is_open and update_state:
                self.fix_lam(*chunks.losses(), lambda stats: normalizer.gather(stats, self, chunks.classes))
            solved = None if self.target is None else self._at_target(chunks, normalizer)
            state = self if solved is None else solved[1].state
            score = chunks.samples.score
            grads = RelativeGradients(state, operators, chunks, wanted)
            losses, valid = grads.losses_and_validity() if any(wanted) else chunks.losses()
            log_s, _, lam, *_ = state.operands(False, 0)
            settled, bounded = normalizer.weighing_normalizer(
                state,
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
                ops.WITH_GRAD if wanted[0] or wanted[3] else 0,
            )
            if solved is not None and update_state:
                commit(self, *solved)
        if any(wanted):
            made = loss, grads.unfinished(sample_factor), settled
            loss = LinearLossGrad.apply(hidden, weight, bias, chunks.target, made)
        if sample_weight is None or not ops.is_learned(sample_weight):
            return loss, sample_stats, None, lam
        slope = (sample_stats[0].double() * sample_stats[1] * settled[ops.SCALE]).to(loss.dtype)
        loss = ops.attach_sample_weight(loss, sample_weight, slope, refuse_second_derivative if any(wanted) else None)
        return loss, sample_stats, None, lam

    def _at_target(self, chunks: Chunks, normalizer: Own | InStages) -> tuple[Solved, Before]:
        """Find the lambda of a TargetESS by a walk that makes losses only, and give the chunks the scores relative to it."""
        losses, valid = chunks.losses()
        samples = chunks.samples
        solved = normalizer.solved(self, losses, samples._replace(mask=valid), chunks.classes)
        before = before_stages(self, solved, losses, samples.score)
        chunks.samples = samples._replace(score=before.score)
        return solved, before


def _robust_loss(
    criterion: LinearABLoss,
    weighting: Tilt,
    normalizer: Own | InStages,
    update_state: bool,
    head: tuple[Tensor, Tensor, Tensor, Tensor | None],
    samples: Samples,
) -> Tensor:
    """The robust loss of a head: hidden, weight, target and bias. Kernels make it in chunks, plain torch stores the logits."""
    hidden, weight, target, bias = head
    if criterion.operators_for(hidden, update_state).has_kernels:
        weighed = criterion._in_chunks(hidden, weight, target, bias, normalizer, samples, update_state)
        return conclude(criterion, normalizer, weighed, update_state)
    logits = nnf.linear(hidden, weight, bias)
    spec = fused_spec(criterion.criterion, logits)
    weighed = general(criterion, weighting, normalizer, (logits, target), spec, samples, None, update_state)
    return conclude(criterion, normalizer, weighed, update_state)


ABLoss.register(LinearABLoss)  # isinstance(criterion, ABLoss) is true for both
