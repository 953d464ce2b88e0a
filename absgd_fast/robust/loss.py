"""ABLoss: any per-sample loss, weighted by Algorithm 1 of the ABSGD paper."""

from __future__ import annotations

import math
from abc import ABCMeta
from collections.abc import Callable

import torch
from torch import Tensor

from ..losses import fused_spec
from . import options
from .base import RobustLoss
from .lam import RelativeLam
from .normalizer import OWN, Samples
from .paths import NOTHING, fused, general
from .weighting import flat_tilt, shown, weighting_of


class ABLoss(RobustLoss, metaclass=ABCMeta):
    """The robust loss whose gradient is the weighted gradient of ABSGD; works with any optimizer.

        z_i    = L_i / lam
        log s' = logaddexp(log(1 - gamma) + log s, log(gamma alpha) + log mean exp(z))
        W_i    = exp(z_i - log s')
        loss   = (1/n) sum_i sample_weight_i (W_i + mix) L_i              (W detached; n valid, finite rows)

    (ABSGD paper, Alg. 1 and Eq. 2, in the log domain; W_i <= n / (gamma alpha), so nothing overflows whatever lam.)

    Args:
        criterion: a fused loss (default `CrossEntropy()`), or any callable that returns per-sample losses of any shape.
            torch.nn.CrossEntropyLoss(reduction="none") takes the fused path by itself.
        lam: temperature. > 0 attends to large losses (imbalance), < 0 to small ones (label noise), +-inf is the plain
            mean. Or `RelativeLam(r)`.
        gamma: share of the current batch in the moving average, in (0, 1].
        alpha: multiplier on the batch mean, in (0, 1] (the reference package's abalpha).
        mix: weight of an added plain mean term; 1 reproduces the authors' code for noisy labels.
        init: "first": the first batch sets s by itself; "zero": s starts at 0 as in the paper, so that the first step
            is 1 / (gamma alpha) too large.
        normalizer: "moving"; "batch": this batch alone (TERM, EG); "none": W = exp(L / lam), log s = 0.
        max_weight: upper bound of W_i; None = none.
        process_group: whose batches are normalised as one. "auto": the default group of torch.distributed, where that is
            initialised; None: this process alone; or a group.
        deferred: normalise once for all micro-batches of an optimizer step (see below).
        loss_divisor: what a framework divides the loss by before backward (its accumulation steps); undone exactly.
        rule: what weighs the losses in place of lambda: one of `absgd_fast.weights`, its numbers bound by functools.partial, or any
            callable losses -> W (see below).
        backend: None (the fastest that can run), "cuda", "triton", "cpu" or "reference".

    forward(*args, sample_weight=None, mask=None, score=None, groups=None, update=True): args go to the criterion. sample_weight,
    mask (bool, True = valid) and score have the shape of the losses; with score, W comes from score / lam instead of
    L / lam. Returns a 0-d loss: float64 for float64 losses, else float32. log s moves only in training mode with
    gradients enabled and update=True. A NaN or infinite loss makes the returned loss NaN, counts in
    `nonfinite_batches` and leaves log s alone.

    Several processes (DDP, FSDP2): s is of all rows of all processes. A training forward makes one all-gather of
    (log sum exp z, n, bad rows), and its value is scaled by R / n_total, so that the average over the R processes that DDP
    and FSDP make of gradients is the gradient of one big batch, however many rows each process has (0 too: then call it
    with an empty batch). A bad row anywhere leaves log s alone everywhere. There is no exchange in eval mode and under
    no_grad: each process then uses its own batch.

    Accumulation, `deferred=True`: each forward returns sum_i exp(z_i - m) L_i, with one reference point m for the whole
    optimizer step, and adds (log sum exp z, n) to what the step has. At the end log s' is that of all rows together and
    exp(m - log s') / n brings the gradient to its size: in the optimizer's kernel (`ABSGD(..., robust=criterion)`), or by
    `criterion.finish_(params)` for any optimizer, and before any clipping. K micro-batches then give the gradient of one
    big batch. A step that is given up half-way is forgotten by `discard()`. The value of the forward is for backward alone; log
    `last.mean_loss`. With update=False, in eval mode and under no_grad the whole loss is returned at once and nothing is
    deferred; such a gradient has its size, so where it goes into ``.grad`` after micro-batches (SAM), `finish_` comes between,
    and the optimizer has no ``robust=``.

    Another rule, `rule=`: W comes from rule(losses), 1 on average. It is also given groups= (as forward got them), mask= (the rows
    that count) and update= (whether states may move), if it takes arguments of these names; without a mask it is given the rows
    that count and are finite, alone. With score it sees the scores. A rule that is a module is part of this one, and so is its
    state. ``partial(weights.term, t=t)`` is lam=1/t with normalizer="batch", and as fast. A rule weighs one batch: it has no lam,
    gamma, alpha, init, normalizer, deferred, loss_divisor and process group.

    Attributes:
        log_s, lam: 0-d buffers, float32 (float64 after .double()), in state_dict.
        last: `LastForward` of the latest forward. objective: lam log s, the running DRO objective (Eq. 7); with a
            rule (1/n) sum W L of the latest forward.
        nonfinite_batches: int64 buffer.

    Raises:
        ValueError: lam = 0 or NaN, gamma or alpha outside (0, 1], a criterion that returns a scalar, a batch on another
        device than the state; a rule beside what it has not, or one that returns another shape; deferred with mix, or with max_weight (they need log s' at once); processes that disagree
        on lam, gamma, the number of classes, ... TypeError, IndexError: labels of a float dtype, out of range.
        RuntimeError: a process group that is gone. The state is then unchanged.

    >>> criterion = ABLoss(lam=-0.5)
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 4.0]], requires_grad=True)
    >>> loss = criterion(logits, torch.tensor([0, 0]))  # the second label looks wrong
    >>> loss.backward()
    >>> criterion.last.weights
    tensor([1.9993e+00, 6.7070e-04])
    """

    def __init__(
        self,
        criterion: Callable[..., Tensor] | None = None,
        *,
        lam: float | RelativeLam | None = None,
        gamma: float = 0.9,
        alpha: float = 1.0,
        mix: float = 0.0,
        init: str = "first",
        normalizer: str = "moving",
        max_weight: float | None = None,
        rule: Callable | None = None,
        process_group="auto",
        deferred: bool = False,
        loss_divisor: float = 1,
        backend: str | None = None,
    ):
        if rule is not None:
            if not callable(rule):
                raise TypeError(f"rule: got {type(rule).__name__}, expected one of absgd_fast.weights, or a callable losses -> W")
            options.check(
                "rule",
                dict(
                    lam=lam,
                    gamma=gamma,
                    alpha=alpha,
                    init=init,
                    normalizer=normalizer,
                    process_group=process_group,
                    deferred=deferred,
                    loss_divisor=loss_divisor,
                ),
            )
            tilt = flat_tilt(rule)
            lam, normalizer = (math.inf, normalizer) if tilt is None else (1 / tilt, "batch")
        super().__init__(
            criterion,
            lam=lam,
            gamma=gamma,
            alpha=alpha,
            mix=mix,
            init=init,
            normalizer=normalizer,
            max_weight=max_weight,
            process_group=process_group,
            deferred=deferred,
            loss_divisor=loss_divisor,
            backend=backend,
        )
        self.rule = rule
        self._weighting = weighting_of(rule)

    def forward(
        self,
        *args,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        score: Tensor | None = None,
        groups: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:
        weighting = self._weighting if groups is None else self._weighting.with_groups()
        trains = self.training and torch.is_grad_enabled()
        update_state = update and trains
        normalizer = self.normalizer_for(trains)
        no_samples = sample_weight is None and mask is None and score is None
        samples = NOTHING if no_samples else Samples(sample_weight, mask, score)
        spec = None
        if len(args) == 2:
            logits, target = args
            if isinstance(logits, Tensor) and isinstance(target, Tensor):
                spec = fused_spec(self._modules.get("criterion"), logits)
            if spec is not None:
                operators = self.operators_for(logits)
                at_once = normalizer is OWN or (update_state and normalizer.knows_weights(self, operators, logits))
                if at_once and weighting.fuses and operators.has_kernels:
                    return fused(self, operators, normalizer, logits, target, spec, samples, update_state)
        return general(self, weighting, normalizer, args, spec, samples, groups, update_state)

    def set_lam(self, value: float | RelativeLam, reset: bool = True) -> None:
        if self.rule is not None:
            raise RuntimeError("set_lam: got a lambda for an ABLoss that weighs by a rule; expected ABLoss(lam=...)")
        super().set_lam(value, reset)

    @property
    def objective(self) -> Tensor:
        """As of `LinearABLoss`; with a rule the last (1/n) sum W L."""
        if self.rule is not None and self.memo.sample_stats is not None:
            return self.last.weighted_mean_loss.to(self.log_s.dtype)
        return super().objective

    def _refusal(self, lam: Tensor | None) -> str | None:
        if self.rule is None:
            return super()._refusal(lam)
        if lam is not None and float(lam) not in (self._given_lam, float(self.lam)):
            return f"the saved one is of an ABLoss with another lambda or rule than {shown(self.rule)}"
        return None

    def extra_repr(self) -> str:
        return super().extra_repr() if self.rule is None else f"rule={shown(self.rule)}, mix={self.mix:g}"


def DFT(criterion: Callable[..., Tensor] | None = None) -> ABLoss:
    """Dynamic fine-tuning: W = exp(-L), which is p(label) for cross-entropy, with no normaliser.

    ABLoss(criterion, lam=-1, normalizer="none"): a token counts by how probable the model already finds it.

    >>> criterion = DFT()
    >>> _ = criterion(torch.zeros(1, 4, requires_grad=True), torch.tensor([2]))
    >>> criterion.last.weights
    tensor([0.2500])
    """
    return ABLoss(criterion, lam=-1.0, normalizer="none")
