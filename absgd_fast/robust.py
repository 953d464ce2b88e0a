"""ABLoss: any per-sample loss, weighted by Algorithm 1 of the ABSGD paper."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import _backend, _checks, distributed, ops, reference
from . import weights as rules
from . import functional as F
from .losses import CrossEntropy, fused_spec
from .reference import NORMALIZERS, real_dtype

_is_distributed = torch.distributed.is_initialized if torch.distributed.is_available() else lambda: False


class RelativeLam:
    """lambda = r times the plain mean loss of the first training batch it is used on, then fixed (and saved).

    On scikit-learn's digits r = -0.5 came within 2 points of the best lambda of a grid at noise rates 0.2, 0.4 and 0.6.

    Args:
        r: not 0; > 0 attends to large losses, < 0 to small ones.

    >>> criterion = ABLoss(lam=RelativeLam(-0.5))
    >>> _ = criterion(torch.zeros(4, 10, requires_grad=True), torch.arange(4))
    >>> criterion.lam  # -0.5 log(10)
    tensor(-1.1513)
    """

    def __init__(self, r: float):
        self.r = float(_checks.lam(r))
        if math.isinf(self.r):
            raise ValueError(f"r: got {r}, expected a finite number other than 0")

    def __repr__(self) -> str:
        return f"RelativeLam({self.r})"


class LastForward:
    """Detached view of one forward of `ABLoss`; every figure is computed when it is read.

    losses, weights: shape of the per-sample losses. ess, mean_loss: 0-d.

    >>> criterion = ABLoss(lam=1.0)
    >>> _ = criterion(torch.zeros(2, 4), torch.tensor([0, 3]))
    >>> criterion.last.mean_loss, criterion.last.ess
    (tensor(1.3863), tensor(2.))
    """

    def __init__(self, rows: Tensor, moved: tuple[Tensor, Tensor] | None = None, weighing: Tensor | None = None):
        self._rows, self._weighing = rows, weighing  # ops.weights_of
        self._moved = moved  # the weights are relative to the first log s'; here is the second

    @property
    def losses(self) -> Tensor:
        """L_i (0 for ignored rows)."""
        return self._rows[0]

    @property
    def weights(self) -> Tensor:
        """W_i, without sample_weight and mix (0 for ignored rows, NaN for rows with a non-finite loss).

        In deferred mode they are relative to the step's reference point until the step, or `finish_`, settles log s.
        """
        weights = ops.weights_of(self._rows, self._weighing)
        if self._moved is None:
            return weights
        reference, settled = self._moved
        return weights * (reference[0] - settled[0]).exp().to(weights.dtype)

    @property
    def _counted(self) -> Tensor:
        return (self._rows[2] > 0) & ~self.weights.isnan()

    @property
    def ess(self) -> Tensor:
        """Effective sample size (sum W)^2 / sum W^2 over the rows that count."""
        weights = self.weights.where(self._counted, 0)
        return weights.sum().square() / weights.square().sum()

    @property
    def mean_loss(self) -> Tensor:
        """The plain mean of the losses that count: what to log beside the robust loss (0 for an empty batch)."""
        counted = self._counted
        return self.losses.where(counted, 0).sum() / counted.sum().clamp(min=1)


class ABLoss(rules.ExactState):
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
        super().__init__()
        tilt = None
        if rule is not None:
            given = dict(lam=lam, gamma=gamma, alpha=alpha, init=init, normalizer=normalizer, process_group=process_group,
                         deferred=deferred, loss_divisor=loss_divisor)  # fmt: skip
            _check_alone(rule, given)
            tilt = rules.flat_tilt(rule)
            lam, normalizer = (math.inf, normalizer) if tilt is None else (1 / tilt, "batch")
        if lam is None:
            raise ValueError("lam: got None, expected a number other than 0 or RelativeLam(r); math.inf is the plain mean")
        if criterion is not None and not callable(criterion):
            raise TypeError(f"criterion: got {type(criterion).__name__}, expected a callable that returns per-sample losses")
        self.gamma = _checks.share(gamma, "gamma")
        self.alpha = _checks.share(alpha, "alpha")
        self.mix = float(mix)
        if not math.isfinite(self.mix):
            raise ValueError(f"mix: got {mix!r}, expected a finite number")
        self.max_weight = math.inf if max_weight is None else float(max_weight)
        if not self.max_weight > 0:
            raise ValueError(f"max_weight: got {max_weight!r}, expected a positive number or None")
        self.init = _checks.choice(init, "init", ("first", "zero"))
        self.normalizer = _checks.choice(normalizer, "normalizer", NORMALIZERS)
        self._flags = ops.flags(self.normalizer, self.init)
        distributed.check(process_group)
        self.process_group = process_group
        self.loss_divisor = _checks.positive(loss_divisor, "loss_divisor")
        self.deferred = bool(deferred)
        if self.deferred:
            self._check_deferrable("deferred=True")
        self._ranks_before = 1
        self._agreed: tuple | None = None  # what the processes were last seen to agree on
        self._configured: Tensor | None = None
        self._step = _Deferred()
        self.criterion = CrossEntropy() if criterion is None else criterion
        self.rule, self._by_rule = rule, rule is not None and tilt is None
        self._rule_takes = frozenset() if rule is None else rules.options(rule)
        self.backend = backend
        self.register_buffer("lam", torch.tensor(math.inf))
        self.register_buffer("log_s", torch.tensor(-math.inf))
        self.register_buffer("nonfinite_batches", torch.tensor(0))
        self._rows: Tensor | None = None
        self._weighing: Tensor | None = None
        self._served: tuple[torch.device, ops.Operators | None] | None = None  # device, and the operators that serve it
        self._set_lam(lam)
        reason = None if backend is None else _backend.why_not(backend)  # the module may still be moved to another device
        if reason is not None:
            raise RuntimeError(
                f"backend {backend!r} cannot run: {reason}; run `python -m absgd_fast doctor`, or use backend=None"
            )

    # ---- state ----

    def set_lam(self, value: float | RelativeLam, reset: bool = True) -> None:
        """Use another lambda. s lives on the old lambda's scale, so it starts anew unless reset=False.

        >>> criterion = ABLoss(lam=math.inf)
        >>> criterion.set_lam(-0.5)
        >>> criterion.lam
        tensor(-0.5000)
        """
        if self.rule is not None:
            raise RuntimeError("set_lam: got a lambda for an ABLoss that weighs by a rule; expected ABLoss(lam=...)")
        if self._step.totals is not None:
            raise RuntimeError(
                "set_lam: got another lambda in the middle of a deferred step, expected it after the optimizer's step (or finish_);"
                " where the step is given up, call criterion.discard() first"
            )
        self._set_lam(value, reset)

    def _set_lam(self, value: float | RelativeLam, reset: bool = True) -> None:
        self._given_lam = math.nan if isinstance(value, (RelativeLam, Tensor)) else float(value)
        if isinstance(value, RelativeLam):
            self._relative, self._lam_is_open = value.r, True
            self.lam.fill_(math.nan)
        else:
            _checks.lam(value)
            self._relative, self._lam_is_open = None, False
            self.lam.copy_(value) if isinstance(value, Tensor) else self.lam.fill_(value)
        self._agreed = None
        self._step.forget()
        if reset:
            self.log_s.fill_(0.0 if self.normalizer == "none" else -math.inf)

    def discard(self) -> None:
        """Deferred mode: forget the micro-batches since the last step, whose gradients were thrown away (zero_grad).

        >>> criterion = ABLoss(lam=0.5, deferred=True)
        >>> criterion(torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 3])).backward()
        >>> criterion.discard()
        """
        self._step.forget()

    @property
    def objective(self) -> Tensor:
        """lam log s: the running estimate of the DRO objective (Eq. 7 without r); the last plain mean at |lam| = inf; with a rule
        the last (1/n) sum W L."""
        if self.rule is not None and self._rows is not None:
            last = self.last
            counted = last._counted
            return ((last.weights * last.losses).where(counted, 0).sum() / counted.sum().clamp(min=1)).to(self.log_s.dtype)
        plain = self.last.mean_loss.to(self.log_s.dtype) if self._rows is not None else self.log_s.new_tensor(math.nan)
        return torch.where(self.lam.isinf() | self.lam.isnan(), plain, self.lam * self.log_s)

    @property
    def last(self) -> LastForward:
        if self._rows is None:
            raise RuntimeError("last: there was no forward yet; call the criterion first")
        return LastForward(self._rows, self._step.moved, self._weighing)

    def _apply(self, fn, recurse=True):
        before = self.lam
        super()._apply(fn, recurse)
        self._served = None
        if self.lam.dtype != before.dtype and not before.is_meta and bool(before == before.new_tensor(self._given_lam)):
            self.lam.fill_(self._given_lam)  # not what float32 made of it
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        loaded = state_dict.get(prefix + "lam")
        still_open = loaded is not None and bool(loaded.isnan())
        if still_open and self._relative is None and self.rule is None:
            error_msgs.append(f"{prefix}lam: the saved RelativeLam was not fixed yet; construct ABLoss with lam=RelativeLam(r)")
            return
        if self.rule is not None and loaded is not None and float(loaded) not in (self._given_lam, float(self.lam)):
            error_msgs.append(
                f"{prefix}lam: the saved one is of an ABLoss with another lambda or rule than {rules.shown(self.rule)}"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        self._agreed = None
        self._step.forget(lost=self._step.totals is not None)
        if loaded is not None:
            self._lam_is_open = still_open

    # ---- forward ----

    def forward(
        self,
        *args,
        sample_weight: Tensor | None = None,
        mask: Tensor | None = None,
        score: Tensor | None = None,
        groups: Tensor | None = None,
        update: bool = True,
    ) -> Tensor:
        # Written for few Python calls: at 128 x 10 the kernels take 3 us of the 25 that forward and backward take.
        by_rule = self._by_rule
        if groups is not None:
            if self.rule is None:
                raise ValueError("groups: only a rule uses groups; leave it out")
            by_rule = True
        grad_mode = torch.is_grad_enabled()
        trains = grad_mode and self.training
        learns = update and trains
        staged = trains and self._is_staged()
        if len(args) != 2:
            return self._any_loss(args, sample_weight, mask, score, groups, learns, staged)
        logits, target = args
        tensors = isinstance(logits, Tensor) and isinstance(target, Tensor)
        spec = fused_spec(self._modules.get("criterion"), logits) if tensors else None
        if spec is None:
            return self._any_loss(args, sample_weight, mask, score, groups, learns, staged)
        operators = self._operators(logits)
        settled = staged and learns and not by_rule and self._weighs_by_reference(operators, logits)
        if operators is None or (staged and not settled) or by_rule:
            return self._any_loss(args, sample_weight, mask, score, groups, learns, staged, spec)
        weight, adjust, first, second, ignore_index, bits = spec
        if weight is not None:
            weight = _checks.class_weight(weight, logits)
        if adjust is not None:
            adjust = _checks.adjust(adjust, logits)
        if target.is_floating_point():
            target = _checks.target(logits, target, soft=spec.soft)
        if sample_weight is not None or mask is not None or score is not None:
            real, like = real_dtype(logits.dtype), target.select(1, 0) if target.is_floating_point() else target
            sample_weight = _checks.per_sample(sample_weight, "sample_weight", like, real)
            mask = _checks.per_sample(mask, "mask", like, torch.bool)
            score = _checks.per_sample(score, "score", like, real)
        if self._lam_is_open and learns:
            losses, valid = F.losses_and_validity(logits.detach(), target, spec, self._backend())
            self._fix_lam(losses, valid > 0 if mask is None else (valid > 0) & mask)
        saves = operators.saves(logits) if grad_mode and logits.requires_grad else 0
        weighing = operators.weighing(logits, saves) if operators.weighs_late else None
        given = (logits, target, weight, adjust, first, second, ignore_index, score, sample_weight, mask)
        try:
            if settled:
                return self._by_reference(operators, spec, given)
            loss, rows, made = operators.robust_logit_loss(*given, *self._state(learns, saves | bits), weighing)
        except RuntimeError as error:
            _checks.target(logits, target, soft=spec.soft)  # the usual mistakes, said in Python's words
            raise ops.translated(error) from None
        self._remember(rows, weighing)
        if not saves:
            return loss
        plain = lambda x: self._plain(spec, x, target, rows, ops.weights_of(rows, weighing), sample_weight)  # noqa: E731
        if saves == ops.WITH_STATS:
            return ops.attach_rows(
                operators, logits, loss, (target, weight, adjust, first if bits < ops.KIND else 0.0), made, plain, rows, weighing
            )
        return ops.attach(operators, logits, loss, made, plain)

    def _weighs_by_reference(self, operators: ops.Operators | None, logits: Tensor) -> bool:
        """Whether this micro-batch of a deferred step finds the step's reference point, and kernels that use it at once."""
        step = self._step
        return (
            self.deferred
            and operators is not None
            and operators.weighs_late
            and step.totals is not None
            and self.max_weight == math.inf
            and not self._lam_is_open
            and logits.requires_grad
            and not step.cannot_look(step.totals)
            and step.has_reference()
        )

    def _by_reference(self, operators: ops.Operators, spec: F.LossSpec, given: tuple) -> Tensor:
        """sum_i exp(z_i - m) L_i, and its gradient while each row is on the chip: one read and one write of the logits."""
        logits, target, *loss_args, score, sample_weight, mask = given
        if mask is not None and not target.is_floating_point():  # a row that is ignored anyway may hold anything
            target = target.masked_fill(~mask, spec.ignore_index)
        log_s, _, lam, *_, flags = self._state(False, spec.bits)
        loss, rows, made, totals = operators.settled_logit_loss(
            logits, target, *loss_args, score, sample_weight, mask, self._step.reference, log_s, lam, flags
        )
        self._add_totals(operators, totals)
        self._remember(rows)

        def plain(x: Tensor) -> Tensor:  # asked only by a second derivative
            factor = rows[1] if sample_weight is None else rows[1] * sample_weight
            return (torch.where(rows[2] > 0, factor, 0.0) * spec.plain(x, target)).sum()

        return ops.attach(operators, logits, loss, made, plain)

    def _plain(self, spec: F.LossSpec, logits: Tensor, target: Tensor, rows: Tensor, weights: Tensor, sample_weight) -> Tensor:
        """The robust loss of a forward whose weights are known, in plain torch."""
        valid = rows[2] > 0
        factor = weights + self.mix * (~self._buffers["lam"].isinf()).to(rows.dtype)
        if sample_weight is not None:
            factor = factor * sample_weight
        counted = (valid & ~weights.isnan()).sum().clamp(min=1)
        return (torch.where(valid, factor, 0.0) * spec.plain(logits, target)).sum() / counted

    def _state(self, learns: bool, saves: int) -> tuple:
        """The operators' last arguments: state and numbers."""
        state = self._buffers
        lam = (
            torch.full_like(state["lam"], math.inf) if self._lam_is_open else state["lam"]
        )  # an open RelativeLam: the plain mean
        flags = self._flags + (ops.UPDATE if learns else 0) + saves
        return state["log_s"], state["nonfinite_batches"], lam, self.gamma, self.alpha, self.mix, self.max_weight, flags

    def _any_loss(self, args, sample_weight, mask, score, groups, learns, staged, spec=None) -> Tensor:
        """Losses of any kind first, then the weights in one operator, or all by reference.py."""
        valid = None
        if spec is not None:
            logits = args[0]
            target = _checks.target(logits, args[1], soft=spec.soft)
            if mask is not None and not target.is_floating_point():  # a row that is ignored anyway may hold anything
                target = target.masked_fill(~_checks.per_sample(mask, "mask", target, torch.bool), spec.ignore_index)
            losses, valid = F.losses_and_validity(logits, target, spec, self._backend())
            valid = valid > 0
            if mask is not None:
                valid = valid & _checks.per_sample(mask, "mask", valid, torch.bool)
        else:
            losses = _checked(self.criterion(*args))
        real = real_dtype(losses.dtype)
        losses = losses.to(real).contiguous()
        sample_weight = _checks.per_sample(sample_weight, "sample_weight", losses, real)
        mask = _checks.per_sample(mask, "mask", losses, torch.bool) if valid is None else valid
        score = _checks.per_sample(score, "score", losses, real)
        operators = self._operators(losses)
        if self.rule is not None:
            if staged:
                raise ValueError(
                    "rule: weighs the batch of one process; pass process_group=None to weigh each process's batch by itself"
                )
            if self._by_rule or groups is not None:
                return self._weighed_by_rule(operators, losses, sample_weight, mask, score, groups, learns)
        if staged:
            classes = args[0].shape[1] if spec is not None else 0
            return self._in_stages(operators, losses, sample_weight, mask, score, learns, classes)
        if self._lam_is_open and learns:
            self._fix_lam(losses.detach(), mask)
        if operators is None:
            return self._reference(losses, sample_weight, mask, score, learns)
        saves = ops.WITH_GRAD if losses.requires_grad and torch.is_grad_enabled() else 0
        loss, rows, grad = operators.robust_loss(losses, score, sample_weight, mask, *self._state(learns, saves))
        self._remember(rows)
        if not saves:
            return loss
        return ops.attach(operators, losses, loss, grad, lambda x: (grad * x).sum())

    def _weighed_by_rule(self, operators, losses, sample_weight, mask, score, groups, learns) -> Tensor:
        """The weights of the rule, as the sample weights of a plain mean."""
        plain = losses.detach()
        seen = plain if score is None else score.where(plain.isfinite(), math.nan)
        weights = rules.weigh(self.rule, self._rule_takes, seen, mask, groups, learns)
        if self.max_weight != math.inf:
            weights = weights.clamp(max=self.max_weight)
        factor = weights + self.mix if self.mix else weights
        factor = factor if sample_weight is None else factor * sample_weight
        log_s, nonfinite, lam, *_ = self._state(False, 0)
        lam = torch.full_like(lam, math.inf)
        if operators is None:
            loss, _, _, bad = reference.robust_loss(losses, log_s, lam, sample_weight=factor, score=score, mask=mask)
            if learns:
                with torch.no_grad():
                    nonfinite += bad
            self._remember(ops.stacked_rows(plain, weights, mask))
            return loss
        saves = ops.WITH_GRAD if losses.requires_grad and torch.is_grad_enabled() else 0
        flags = ops.flags("moving", "first") | saves | (ops.UPDATE if learns else 0)
        loss, rows, grad = operators.robust_loss(
            losses, score, factor, mask, log_s, nonfinite, lam, 1.0, 1.0, 0.0, math.inf, flags
        )  # fmt: skip
        rows[1] = weights
        self._remember(rows)
        return ops.attach(operators, losses, loss, grad, lambda x: (grad * x).sum()) if saves else loss

    def _remember(self, rows: Tensor, weighing: Tensor | None = None) -> None:
        self.__dict__["_rows"] = rows  # nn.Module.__setattr__ costs 0.5 us
        self.__dict__["_weighing"] = weighing
        self._step.moved = None

    def _reference(self, losses, sample_weight, mask, score, learns) -> Tensor:
        lam = self._state(False, 0)[2]
        loss, weights, log_s, bad = reference.robust_loss(
            losses, self.log_s, lam, mix=self.mix, sample_weight=sample_weight, score=score, mask=mask,
            gamma=self.gamma, alpha=self.alpha, init=self.init, normalizer=self.normalizer, max_weight=self.max_weight,
        )  # fmt: skip
        with torch.no_grad():
            self._remember(ops.stacked_rows(losses.detach(), weights, mask))
            if learns:
                self.log_s.copy_(log_s)
                self.nonfinite_batches += bad
        return loss

    # ---- rows of several processes or micro-batches ----

    def _is_staged(self) -> bool:
        """Whether a training forward goes through the stages totals, settle and apply, because other rows belong to it."""
        return (
            self.deferred
            or self.loss_divisor != 1
            or (
                self.process_group is not None
                and (self.process_group != distributed.AUTO or self._ranks_before > 1 or _is_distributed())
                and self._ranks() > 1
            )
        )

    def _ranks(self) -> int:
        count = distributed.ranks(self.process_group, self._ranks_before)
        self.__dict__["_ranks_before"] = count
        return count

    def _in_stages(self, operators, losses, sample_weight, mask, score, learns, classes) -> Tensor:
        """The robust loss of rows whose normaliser other processes or micro-batches have a part in."""
        if ops.transformed():
            raise RuntimeError(
                "ABLoss: deferred, loss_divisor and a process group do not go through torch.func transforms; expected a plain"
                " forward, or ABLoss(process_group=None), or functional.robust_weights"
            )
        ranks, plain = self._ranks(), losses.detach()
        if self._lam_is_open and learns:
            self._fix_lam(plain, mask, lambda row: self._gather(row, ranks, classes))
        log_s, _, lam, _, _, mix, max_weight, _ = self._state(False, 0)
        stages = operators or ops.IN_TORCH
        settled, bounded = self._settle_rows(
            stages, lambda bound: stages.robust_totals(plain, score, mask, log_s, lam, bound), ranks, classes, learns
        )
        if operators is None:
            loss, weights = reference.apply(
                losses, settled, log_s, lam, mix=mix, max_weight=max_weight, sample_weight=sample_weight, score=score,
                mask=mask, bounded=bounded,
            )  # fmt: skip
            self._remember(ops.stacked_rows(plain, weights, mask))
            return loss
        saves = ops.WITH_GRAD if losses.requires_grad else 0
        loss, rows, grad = operators.robust_apply(
            plain, score, sample_weight, mask, settled, log_s, lam, bounded, mix, max_weight, saves
        )  # fmt: skip
        self._remember(rows)
        return ops.attach(operators, losses, loss, grad, lambda x: (grad * x).sum()) if saves else loss

    def _settle_rows(self, operators, totals_of, ranks, classes, learns, trains=True) -> tuple[Tensor, bool]:
        """What the rows of a forward are weighed by (reference.settle), and whether their z is bounded.

        totals_of(bound): the totals of these rows, whose z is bounded by a settled normaliser, or None.
        """
        log_s, nonfinite, lam, gamma, alpha, _, _, flags = self._state(False, 0)
        step = self._step
        if not (self.deferred and learns):
            rows = self._gather(totals_of(None), ranks, classes)
            share = ranks * self.loss_divisor if trains else 1.0
            flags |= ops.UPDATE if learns else 0
            return operators.robust_settle(rows, log_s, nonfinite, lam, None, gamma, alpha, share, flags), False
        settle = lambda rows: operators.robust_settle(rows, log_s, nonfinite, lam, None, gamma, alpha, 1.0, flags)  # noqa: E731
        if step.totals is None:
            step.forget()  # what was left of the step before
        bounded = step.has_reference()
        totals = totals_of(step.reference if bounded else None)
        if not bounded:
            step.begin(settle(self._gather(totals, ranks, classes)))
        elif ranks == 1 and step.cannot_look(totals):
            step.begin_where_empty(settle(totals.unsqueeze(0)))
        self._add_totals(operators, totals)
        return step.reference, bounded

    def _add_totals(self, operators, totals: Tensor) -> None:
        """Adds the rows of a micro-batch to what its deferred step has."""
        if self._step.totals is not None:
            log_s, nonfinite, lam, gamma, alpha, _, _, flags = self._state(False, 0)
            both = torch.stack([self._step.totals, totals])
            totals = operators.robust_settle(both, log_s, nonfinite, lam, None, gamma, alpha, 1.0, flags)[3:]
        self._step.totals = totals

    def _gather(self, totals: Tensor, ranks: int, classes: int = 0) -> Tensor:
        """(ranks, 3 or more): the totals of all processes, which are seen to be set up alike."""
        if ranks == 1:
            return totals.unsqueeze(0)
        fixed = (self.gamma, self.alpha, self.mix, self.max_weight, self._flags, self.deferred, self.loss_divisor, classes,
                 self._relative if self._lam_is_open else 0.0)  # fmt: skip
        key = (fixed, totals.device)
        if self._configured is None or self._configured[0] != key:
            numbers = torch.tensor([float(x) for x in fixed], dtype=torch.float64).to(totals.device, non_blocking=True)
            self.__dict__["_configured"] = (key, numbers)
        lam = self._buffers["lam"].detach().double().reshape(1)
        rows = distributed.exchange(torch.cat([totals, lam, self._configured[1]]), self.process_group, ranks)
        # On a GPU looking would wait for it, so there it is done once for each setting.
        if not torch.compiler.is_compiling() and (totals.device.type == "cpu" or self._agreed != key):
            distributed.check_agreement(rows[:, 3:].cpu(), _CONFIGURATION, _shown)
            self.__dict__["_agreed"] = key
        return rows

    def finish_(self, params) -> Tensor:
        """Settle log s for all micro-batches since the last step, and bring the gradients to their size, in place.

            log s' of all their rows, on all processes;    grad <- exp(m - log s') / n  grad  (times the R processes that average)

        For ``deferred=True`` with any optimizer: after the last backward (and after GradScaler.unscale_), before clipping.

        Args:
            params: the parameters of the step, all of them (a tensor or an iterable of tensors).

        Returns:
            0-d bool, whether the step counts. It does not after a NaN or infinite loss, or one whose z is 60 beyond the
            reference point: the state stays as it was, and there is no gradient left on the CPU (an optimizer then passes over
            the parameters), nothing but NaN on a GPU, where nobody can know without waiting for it.

        Raises:
            RuntimeError: not deferred, nothing to finish, or finished already. ValueError: a float16 gradient, which cannot
            hold sums that are not normalised.

        >>> weight = torch.zeros(10, 4, requires_grad=True)
        >>> criterion = ABLoss(lam=0.5, deferred=True)
        >>> for x, y in [(torch.ones(2, 4), torch.tensor([0, 1])), (torch.ones(1, 4), torch.tensor([2]))]:
        ...     criterion(x @ weight.T, y).backward()
        >>> criterion.finish_(weight)
        tensor(True)

        Source: ABSGD paper, Alg. 1, steps 5 and 6: s' divides every gradient alike, so it may be applied last.
        """
        if not self.deferred:
            raise RuntimeError("finish_: got an ABLoss that is not deferred, whose gradients have their size already")
        self._step.check("finish_")
        if self._step.finished:
            raise RuntimeError(
                "finish_: the gradients have been finished already; expected one call per step, with the parameters of all"
                " optimizers, or a forward before it"
            )
        if self._step.totals is None:
            raise RuntimeError("finish_: got no forward in training mode since the last step, expected at least one micro-batch")
        params = [params] if isinstance(params, Tensor) else list({id(p): p for p in params}.values())
        grads = [p.grad for p in params if p.grad is not None]
        if any(grad.dtype == torch.float16 for grad in grads):
            raise ValueError("finish_: got a float16 gradient, which cannot hold deferred sums; expected float32 or bfloat16")
        settled = self.settle()
        self._step.finished = True
        counts = settled[5] == 0
        if settled.device.type == "cpu" and not counts:
            for p in params:
                p.grad = None
            return counts
        scale = settled[1].where(counts, math.nan)
        by_kind: dict[tuple, list[Tensor]] = {}
        for grad in grads:
            grad = getattr(grad, "_local_tensor", grad)  # of a DTensor: its share
            by_kind.setdefault((grad.device, grad.dtype, grad.layout), []).append(grad)
        with torch.no_grad():
            for (device, _, layout), some in by_kind.items():
                factor = float(scale) if scale.device.type == "cpu" else scale.to(device, non_blocking=True)
                if layout == torch.strided:
                    torch._foreach_mul_(some, factor)
                else:
                    for grad in some:
                        grad.mul_(factor)
        return counts

    def settle(self) -> Tensor | None:
        """Deferred mode: log s' of all micro-batches since the last step, written to the state; what finishes the gradients.

        Called by `finish_` and by an optimizer with ``robust=``; the gradients are not touched.

        Returns:
            (6) float64, reference.settle: the second number multiplies the gradients, the last counts rows that are not finite;
            or None: no micro-batch since gradients were last computed.

        Raises:
            RuntimeError: `finish_` was called: the gradients have their size; or a state was loaded since the micro-batches.
        """
        step = self._step
        step.check("step")
        if step.finished:
            raise RuntimeError(
                "step: the gradients were finished by criterion.finish_ already; expected an optimizer without robust= beside"
                " finish_ (which clipping needs), or robust= without finish_"
            )
        if step.totals is None:
            return step.settled
        log_s, nonfinite, lam, gamma, alpha, _, _, flags = self._state(False, 0)
        operators = self._operators(log_s) or ops.IN_TORCH
        ranks = self._ranks()
        rows, share = self._gather(step.totals, ranks), ranks * self.loss_divisor
        settled = operators.robust_settle(
            rows, log_s, nonfinite, lam, step.reference, gamma, alpha, share, flags | ops.UPDATE
        )  # fmt: skip
        step.end(settled)
        return settled

    # ---- helpers ----

    def _backend(self) -> str | None:
        return self.backend or getattr(self.criterion, "backend", None)

    def _operators(self, x: Tensor) -> ops.Operators | None:
        """The operators that serve this batch (None: reference.py); ValueError if the state is on another device."""
        if ops.transformed():
            return None
        device = x.device if isinstance(x, Tensor) else None
        served = self._served
        operators = served[1] if served is not None and served[0] == device else self._serve(device)
        return operators.compiled if operators is not None and torch.compiler.is_compiling() else operators

    def _serve(self, device: torch.device | None) -> ops.Operators | None:
        if device is None:
            raise TypeError("ABLoss: expected tensors, criterion(logits, target)")
        if device != self.log_s.device:
            raise ValueError(
                f"ABLoss: got a batch on {device}, but its state is on {self.log_s.device}; use criterion.to({str(device)!r})"
            )
        operators = ops.serving(device, self._backend())
        if not torch.compiler.is_compiling():
            self.__dict__["_served"] = (device, operators)
        return operators

    def _fix_lam(self, losses: Tensor, mask: Tensor | None, gather=None) -> None:
        """RelativeLam: lambda from the first batch whose plain mean, over all processes, is a finite number other than 0."""
        kept = losses if mask is None else losses[mask]
        row = torch.stack([kept.double().sum(), kept.new_tensor(kept.numel(), dtype=torch.float64), kept.new_zeros(()).double()])
        rows = row.unsqueeze(0) if gather is None else gather(row)
        lam = self._relative * rows[:, 0].sum() / rows[:, 1].sum()
        if bool(lam.isfinite() & (lam != 0)):
            self.lam.copy_(lam)
            self._lam_is_open = False

    def _check_deferrable(self, what: str) -> None:
        """ValueError for what needs log s' before the rows are all known."""
        if self.mix != 0:
            raise ValueError(f"mix: got {self.mix:g} with {what}, expected 0: two sums of other sizes cannot share one gradient")
        if self.max_weight != math.inf and self.normalizer != "none":
            raise ValueError(
                f"max_weight: got {self.max_weight:g} with {what}, expected None: the weights are known only after the gradient"
            )

    def extra_repr(self) -> str:
        if self.rule is not None:
            return f"rule={rules.shown(self.rule)}, mix={self.mix:g}"
        lam = f"RelativeLam({self._relative})" if self._lam_is_open else f"{float(self.lam):g}"
        return f"lam={lam}, gamma={self.gamma:g}, alpha={self.alpha:g}, mix={self.mix:g}, normalizer={self.normalizer!r}"


# What processes must have in common to share one normaliser; lam first, the others as in ABLoss._gather.
_CONFIGURATION = (
    "lam", "gamma", "alpha", "mix", "max_weight", "normalizer and init", "deferred", "loss_divisor", "the number of classes",
    "the r of RelativeLam",
)  # fmt: skip


def _shown(name: str, value: float) -> str:
    if name == "normalizer and init":
        return f"{NORMALIZERS[int(value) & 3]!r} and {'first' if int(value) & ops.INIT_FIRST else 'zero'!r}"
    return str(bool(value)) if name == "deferred" else f"{value:g}" if value == value else "a RelativeLam that is still open"


class _Deferred:
    """The optimizer step that a deferred ABLoss is in: what its micro-batches so far came to. Plain attributes, which DDP does
    not hand from one process to the others as it does with buffers, and no part of a checkpoint: nor are gradients."""

    def __init__(self):
        self.forget()

    def forget(self, lost: bool = False) -> None:
        self.totals: Tensor | None = None  # (3), reference.totals of the micro-batches so far
        self.reference: Tensor | None = None  # (6), reference.settle of the first; its scale is 1
        self.settled: Tensor | None = None  # what finishes the gradients, once the step is settled
        self.moved: tuple[Tensor, Tensor] | None = None  # for `last`
        self.finished = False  # by finish_
        self.lost = lost  # there were micro-batches, whose gradients nothing can bring to their size any more
        self._n: tuple | None = None

    def check(self, caller: str) -> None:
        if self.lost:
            raise RuntimeError(
                f"{caller}: a state was loaded since the micro-batches, whose gradients cannot be brought to their size any more;"
                " expected zero_grad() and new micro-batches, or discard()"
            )

    def begin(self, settled: Tensor) -> None:
        """The first micro-batch, or another after nothing but empty ones."""
        settled[1] = 1.0
        self.reference, self._n = settled, None
        if settled.is_cuda and not self.cannot_look(settled):
            host = torch.empty(1, dtype=settled.dtype, pin_memory=True)
            with torch.cuda.device(settled.device):  # its stream, whichever device is the current one
                host.copy_(settled[4:5], non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._n = (host, event)

    def begin_where_empty(self, settled: Tensor) -> None:
        """The same where the host cannot look whether those before were empty."""
        settled[1] = 1.0
        self.reference = torch.where(self.reference[4] > 0, self.reference, settled)

    @staticmethod
    def cannot_look(like: Tensor) -> bool:
        if torch.compiler.is_compiling() or not like.is_cuda:
            return torch.compiler.is_compiling()
        with torch.cuda.device(like.device):
            return torch.cuda.is_current_stream_capturing()

    def has_reference(self) -> bool:
        """Whether a micro-batch of this step had a row on any process. On a GPU this waits for the first forward, behind
        which a backward and the next forward are queued by now."""
        if self.reference is None:
            return False
        if self.cannot_look(self.reference):
            return True
        if self._n is not None:
            host, event = self._n
            event.synchronize()
            return bool(host > 0)
        return bool(self.reference[4] > 0)

    def end(self, settled: Tensor) -> None:
        self.settled, self.moved = settled, (self.reference, settled)
        self.totals = self.reference = None


def _checked(losses: object) -> Tensor:
    """What a criterion returned, if it is per-sample losses."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"ABLoss: criterion returned {type(losses).__name__}, expected a tensor of per-sample losses")
    if losses.dim() == 0:
        raise ValueError('ABLoss: criterion returned shape (), expected (B,) per-sample losses; pass reduction="none"')
    if not losses.is_floating_point():
        raise TypeError(f"ABLoss: criterion returned {losses.dtype}, expected floating per-sample losses")
    return losses


def _check_alone(rule: object, given: dict) -> None:
    """ValueError for what a rule has not: it weighs one batch of one process."""
    if not callable(rule):
        raise TypeError(f"rule: got {type(rule).__name__}, expected one of absgd_fast.weights, or a callable losses -> W")
    alone = dict(lam=None, gamma=0.9, alpha=1.0, init="first", normalizer="moving", deferred=False, loss_divisor=1)
    for name, value in given.items():
        if name == "process_group" and value not in (None, distributed.AUTO):
            raise ValueError("process_group: got a group with a rule, which weighs the batch of one process; expected None")
        if name in alone and value != alone[name]:
            raise ValueError(f"{name}: got {value!r} with a rule, which weighs a batch by itself; leave it out")


def DFT(criterion: Callable[..., Tensor] | None = None) -> ABLoss:
    """Dynamic fine-tuning: W = exp(-L), which is p(label) for cross-entropy, with no normaliser.

    ABLoss(criterion, lam=-1, normalizer="none"): a token counts by how probable the model already finds it.

    >>> criterion = DFT()
    >>> _ = criterion(torch.zeros(1, 4, requires_grad=True), torch.tensor([2]))
    >>> criterion.last.weights
    tensor([0.2500])
    """
    return ABLoss(criterion, lam=-1.0, normalizer="none")
