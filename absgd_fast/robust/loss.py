"""ABLoss: any per-sample loss, weighted by Algorithm 1 of the ABSGD paper."""

from __future__ import annotations

import math
from abc import ABCMeta
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .._checkpointing import hooks_are_active
from .._scheduled import Counted
from ..losses import fused_spec
from . import ignored, options
from .base import RobustLoss, Rule
from .conclude import conclude
from .lam import RelativeLam, TargetESS
from .normalizer import OWN, InStages, Own, Samples
from .paths import NOTHING, fused, general
from .repeat import weighed_again
from .replay import run_once_or_again
from .weighting import FromWeights, Tilt, flat_tilt, shown, weighting_of


class ABLoss(RobustLoss, metaclass=ABCMeta):
    """The robust loss of ABSGD: every sample's loss is multiplied by a weight that depends on that loss.

    Use it in place of your criterion, with any optimizer: the gradient of the value that it returns is the weighted gradient of
    ABSGD. It is for imbalanced data (lam > 0: large losses count more) and for mislabelled data (lam < 0: small losses count
    more).

        z_i    = L_i / lam                                             L_i: the loss of sample i
        log g  = log mean exp(z)                                       over the n samples that count
        log s' = logaddexp(log(1 - gamma) + log s, log(gamma alpha) + log g)
        W_i    = exp(z_i - log s')                                     a constant for autograd
        loss   = (1/n) sum_i sample_weight_i (W_i + mix) L_i

    Source: ABSGD paper, Alg. 1 and Eq. 2, in the log domain; docs/MATH.md §1. The module keeps one number from batch to batch,
    log s, the moving average of g in logarithms. Because of it W_i <= n / (gamma alpha): no weight overflows, whatever lam is
    (except with normalizer="none").

    Args:
        criterion: makes the losses L_i. Either a loss of this package (default `CrossEntropy()`), or any callable that returns a
            floating tensor of per-sample losses with at least one dimension. Losses of this package and
            torch.nn.CrossEntropyLoss(reduction="none") take the fast way: one kernel makes losses and weights.
        lam: temperature, required unless `rule` is given. lam > 0 attends to large losses (imbalance), lam < 0 to small ones
            (label noise). The closer to 0, the more unequal the weights. +-inf is the plain mean: W = 1, mix is ignored, log s
            stays. A number or 0-d tensor other than 0, `TargetESS(share)`, which finds a lambda for each batch, or
            `RelativeLam(r)`, which the first training batch turns into a number.
        gamma: share of the current batch in the moving average, in (0, 1].
        alpha: factor of the current batch's mean in the moving average, in (0, 1] (abalpha in the reference package).
        mix: how much of the plain mean is added to the weighted one; any finite number. 1 reproduces the authors' code for noisy
            labels.
        init: how log s starts. "first": the first batch sets it by itself (log s' = log alpha + log g). "zero": s = 0, as in the
            paper, which makes the first weights too large by the factor 1 / (gamma alpha) ("first": by 1 / alpha).
        normalizer: "moving": log s' as above. "batch": this batch alone, log s' = log alpha + log g (with lam = 1/t this is
            TERM). "none": log s' = 0, so W_i = exp(L_i / lam), which may overflow (docs/MATH.md §1.2).
        max_weight: upper bound of every W_i; log s does not see it. None: no bound.
        rule: makes the weights instead of lam: a function of `absgd_fast.weights` with its numbers bound by functools.partial, or
            any callable losses -> W. See "Rules".
        process_group: which processes are normalised as one. "auto": the default group of torch.distributed once it is
            initialised, else this process alone; None: this process alone; or a ProcessGroup. See "Several processes".
        deferred: normalise all micro-batches of an optimizer step at once, at its end. See "Gradient accumulation".
        loss_divisor: the number by which a framework divides the loss before backward (its accumulation steps). It is undone
            exactly. Any finite number > 0.
        ignore_index: for a criterion of yours that takes labels: rows with this label do not count, as those with mask=False.
            None: that of the criterion if it has an attribute of this name (as torch.nn.NLLLoss), else no label. A loss of this
            package has its own. See "Ignored rows".
        report: what the value of the forward is. "robust": the loss above, whose gradient is the value's own. "mean": the plain
            mean loss, which people log, with the same gradient. See "Reported value".
        warn_of_collapse: warn once if a small share of the rows has nearly all of the weight in 100 training forwards in a row.
            See "Collapsed weights".
        backend: "cuda", "triton", "cpu" or "reference" (plain torch); None: the fastest that can run.

    Ignored rows
        These are the rows with mask=False, and for losses of this package and torch.nn.CrossEntropyLoss the rows whose label is
        `ignore_index`. Their loss, weight and gradient are 0, and they do not count in n. If no row counts, the loss is 0 with a
        gradient of 0, and log s stays. For any other criterion give `ignore_index` here too: its labels are the one positional
        argument that is an integer tensor of the shape of the losses, or, if none has this shape, with as many elements in the
        same order. Without it such rows count as losses of 0. If several arguments could be the labels, or integers are given
        and none could be, it is an error; then give a mask instead. The gradient of an ignored row is what the criterion makes of
        the upstream gradient 0.

    Nonfinite losses (NaN rows)
        These are NaN and infinite losses, and losses whose z is out of the range of log s (float32). The returned loss is NaN.
        The weight and the gradient of the row itself are NaN; those of the other rows are made without it. log s stays, so one
        bad batch does not spoil the next, and `nonfinite_batches` grows by 1.

    Reported value, report="mean"
        The value is (1/n) sum_i L_i over the rows that count, without W, mix and sample_weight: `last.mean_loss`, summed in
        float64. The gradient is that of report="robust" to the last bit, second derivatives and those of sample_weight and soft
        targets too. In training, deferred micro-batches included, the mean is that of the rows of all processes. This takes one
        more all-gather in every training forward, so all processes must make equally many. The mean is multiplied by
        `loss_divisor`, because the framework divides it again. In eval mode and under no_grad it is the mean of this batch. It is
        NaN if a row has a nonfinite loss, and 0 if no row counts. The weighted value is `last.weighted_mean_loss`.

    Collapsed weights
        Too small a |lam| gives nearly all of the weight to a small share of the rows, and the loss does not show it. One training
        forward in 100 is looked at. If its ESS/n is below the limit, every following forward is looked at too, as long as the
        mean of ESS/n over these forwards is below it. After 100 of them there is one warning, which names lam and
        docs/choosing-lambda.md. The limit is 0.17 if the weights fall with the loss (the weighted mean of the losses is below the
        plain one, as with lam < 0), and 0.05 otherwise. Weights that all underflow to 0 have ESS 0. A forward in which no row
        counts is passed over. ESS/n is at least 1/n, so forwards of at most 5 rows (20 if the weights rise with the loss) cannot
        be warned of unless weights underflow, also if these are micro-batches of a larger batch. A model that has learned one of
        fewer than 7 classes is not warned of either. `set_lam`, `reset_parameters` and loading a state start the count anew, and
        the warning may come again. On a GPU nothing waits for it. A compiled criterion is not looked at.

    Evaluation
        In eval mode, under no_grad and with update=False the same value is computed, but neither log s nor `nonfinite_batches`
        changes (docs/MATH.md §1.4).

    Several processes (DDP, FSDP2; docs/MATH.md §1.6)
        n and log s' are those of all rows of all R processes. Each training forward makes one all-gather of 15 float64 numbers
        per process: three statistics (log sum exp z, n, number of nonfinite losses), and what the processes must have in common
        (lam, log s, gamma and others). So load a checkpoint on every process. In deferred mode the first micro-batch of a step
        and its end make one each. With report="robust" the micro-batches between them make none, and the processes may make
        different numbers of them. With report="mean" every forward makes one more, so in a step all processes must make equally
        many. A TargetESS makes four more in every training forward. Each process returns its sum times R / n, so the average
        of the gradients that DDP and FSDP make is the gradient of one big batch. Processes may have different numbers of rows.
        A process without rows must call the criterion with an empty batch, because all take part. A nonfinite loss on one
        process counts on all of them. In eval mode and under no_grad nothing is exchanged, and each process uses its own batch.

    Gradient accumulation, deferred=True (docs/MATH.md §5)
        K micro-batches give the gradient of one big batch. Each training forward returns sum_i exp(z_i - m) L_i, with one
        reference point m for the whole optimizer step. This value is for backward only; log `last.mean_loss`. At the end of the
        step log s' is computed from all rows, and exp(m - log s') / n multiplies the gradients. `ABSGD(..., robust=criterion)`
        does it within its step. For any other optimizer, and before any clipping, call `criterion.finish_(params)`. With
        neither, the second step of an optimizer with gradients of this criterion raises RuntimeError. A step with a nonfinite
        loss changes neither the parameters nor log s (docs/scale.md shows the loops). `discard()` gives a step up before its
        end. In eval mode, under no_grad and with update=False a forward is no part of the step and returns a normalised loss. To
        add its gradient to those of micro-batches (SAM), call `finish_` first, and use an optimizer without ``robust=``.

    Rules, rule= (docs/MATH.md §4)
        W = rule(losses) is a constant for autograd; its mean over the rows that count should be 1. If the rule has arguments of
        these names, it is also given groups= (as forward got them), mask= (bool, False for ignored rows) and update= (whether its
        own state may change). A rule without an argument `mask` is given only the rows that count; to select them the host waits
        for a GPU. With score= a rule is given the scores instead of the losses. A rule that is a module becomes part of this
        module, and its state is saved. ``partial(weights.term, t=t)`` is the same as lam=1/t with normalizer="batch", and as
        fast. A rule weighs the batch of one process. It cannot be combined with lam, gamma, alpha, init, normalizer, deferred,
        loss_divisor or a process_group; under several processes pass process_group=None.

    Attributes:
        log_s, lam: 0-d tensors, float32 (float64 after .double()), in the state_dict. They are no buffers, so that nothing
            averages or broadcasts them. Casting the module to half precision leaves them float32.
        nonfinite_batches: 0-d int64 buffer; in deferred mode it counts steps.
        last: `LastForward`, the losses and weights of the latest forward.
        objective: lam log s, the running estimate of the DRO objective (Eq. 7); with a rule (1/n) sum_i W_i L_i of the latest
            forward.

    Raises:
        ValueError: lam is 0 or NaN; gamma or alpha is outside (0, 1]; an ignore_index that is not that of the criterion; options
            that exclude each other (mix or max_weight with deferred=True, because they need log s' at once; a rule or a TargetESS
            with an option that it does not use).
        TypeError: a criterion or a rule that is not callable, a rule that needs an argument which is not bound, a lam that is no
            number, a process_group of another type.
        RuntimeError: a backend that cannot run here.

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
        lam: float | Tensor | RelativeLam | TargetESS | None = None,
        gamma: float = 0.9,
        alpha: float = 1.0,
        mix: float = 0.0,
        init: str = "first",
        normalizer: str = "moving",
        max_weight: float | None = None,
        rule: Rule | None = None,
        process_group: torch.distributed.ProcessGroup | str | None = "auto",
        deferred: bool = False,
        loss_divisor: float = 1,
        ignore_index: int | None = None,
        report: str = "robust",
        warn_of_collapse: bool = True,
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
            report=report,
            warn_of_collapse=warn_of_collapse,
            backend=backend,
        )
        self.ignore_index = ignored.checked(ignore_index, self.criterion)
        self.rule = rule
        self._weighting = weighting_of(rule)

    def forward(
        self,
        *args: Any,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        score: Tensor | None = None,
        groups: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:
        """The robust loss of a batch.

        Args:
            *args: go to the criterion; for a loss on logits they are logits (B, C) or (B, C, d1, ...) and target (B) or (B, d1,
                ...).
            sample_weight: shape of the losses; multiplies the whole term of each sample, outside the weight W. If it requires
                grad it gets its gradient, and so do soft targets (docs/MATH.md §7).
            mask: bool, shape of the losses; False = ignored. For losses of this package and torch.nn.CrossEntropyLoss an ignored
                row may hold any label and any logits.
            score: shape of the losses; W comes from score / lam instead of L / lam. It is a constant for autograd, as W is.
            groups: shape of the losses, integers; for a rule that uses groups.
            update: False computes the loss without changing log s, `nonfinite_batches` or the state of a rule.

        Returns:
            0-d loss: float64 for float64 losses, else float32. Use it for backward; log `last.mean_loss` beside it, or choose
            report="mean".

        Raises:
            ValueError: shapes that do not fit; losses that are not per sample; an ignore_index without labels that fit, or with
                several; a batch on another device than the state; groups without a rule that uses them, or a rule that needs
                groups without them; a rule that returns another shape; processes that disagree on lam, gamma, the number of
                classes or another setting; in deferred mode a sample_weight or soft target that requires grad.
            TypeError: labels of a dtype that the loss does not take; a score that is not floating; a criterion that returns no
                floating tensor. IndexError: a label out of range (on a GPU it is raised by a later call).
            RuntimeError: the process group is gone, or the exchange failed; class weights that require grad; a forward inside a
                torch.func transform or under torch.export that would update the state (pass update=False, or call eval()). After
                any error log s is as it was.
        """
        no_samples = sample_weight is None and mask is None and score is None
        if no_samples and groups is None and update and not is_compiling():
            weighed = weighed_again(self, args)
            if weighed is not None:
                return conclude(self, OWN, weighed, True)
        weighting = self._weighting if groups is None else self._weighting.with_groups()
        trains = self.training and torch.is_grad_enabled()
        update_state = update and trains
        normalizer = self.normalizer_for(trains)
        samples = NOTHING if no_samples else Samples(sample_weight, mask, score)
        if hooks_are_active():
            of_batch = partial(_robust_loss, args=args, samples=samples, groups=groups)
            loss = run_once_or_again(of_batch, self, weighting, normalizer, update_state)
        else:
            loss = _robust_loss(self, weighting, normalizer, update_state, args, samples, groups)
        if update_state and normalizer is not OWN:
            self._watch(loss)
        return loss

    def set_lam(self, value: float | Tensor | RelativeLam | TargetESS, reset: bool = True) -> None:
        """As described in `RobustLoss.set_lam`; RuntimeError for an ABLoss with a rule, which has no lambda."""
        if self.rule is not None:
            raise RuntimeError("set_lam: got a lambda for an ABLoss with a rule, which has none; expected an ABLoss(lam=...)")
        super().set_lam(value, reset)

    @property
    def objective(self) -> Tensor:
        """lam log s, as described in `RobustLoss.objective`; with a rule (1/n) sum_i W_i L_i of the latest forward. 0-d."""
        if self.rule is not None and self.memo.sample_stats is not None:
            return self.last.weighted_mean_loss.to(self.log_s.dtype)
        return super().objective

    def _refusal(self, lam: Tensor, schedules: list[Counted]) -> str | None:
        if self.rule is None:
            return super()._refusal(lam, schedules)
        if not self.has_lam(lam):
            return f"the saved one is of an ABLoss with another lambda or rule than {shown(self.rule)}"
        return None

    def weighting_in_words(self) -> str:
        """As `RobustLoss.weighting_in_words`; the rule, if there is one."""
        return super().weighting_in_words() if self.rule is None else f"rule={shown(self.rule)}"

    def extra_repr(self) -> str:
        """The rule, or the numbers, for repr()."""
        return super().extra_repr() if self.rule is None else f"rule={shown(self.rule)}, mix={self.mix:g}"


def _robust_loss(
    criterion: RobustLoss,
    weighting: Tilt | FromWeights,
    normalizer: Own | InStages,
    update_state: bool,
    args: tuple,
    samples: Samples,
    groups: Tensor | None,
) -> Tensor:
    """The robust loss of a batch, by the faster of the two ways that can serve it. args: as `ABLoss.forward` got them."""
    spec = None
    if len(args) == 2:
        logits, target = args
        if isinstance(logits, Tensor) and isinstance(target, Tensor):
            spec = fused_spec(criterion._modules.get("criterion"), logits)
        if spec is not None and weighting.fuses and not target.requires_grad:
            operators, reference = criterion.operators_for(logits, update_state), None
            if not isinstance(normalizer, Own):
                reference = normalizer.known_reference(criterion, operators, logits, update_state)
            if reference is not None or isinstance(normalizer, Own):
                weighed = fused(criterion, operators, normalizer, logits, target, spec, samples, update_state, reference)
                return conclude(criterion, normalizer, weighed, update_state)
    weighed = general(criterion, weighting, normalizer, args, spec, samples, groups, update_state)
    return conclude(criterion, normalizer, weighed, update_state)
