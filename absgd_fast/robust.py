"""ABLoss: any per-sample loss, weighted by Algorithm 1 of the ABSGD paper."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import _backend, _checks, ops, reference
from . import functional as F
from .losses import CrossEntropy, fused_spec
from .reference import NORMALIZERS, real_dtype

_transformed = ops.transformed
_distributed = torch.distributed.is_initialized if torch.distributed.is_available() else lambda: False


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

    def __init__(self, rows: Tensor):
        self._rows = rows  # (3, ...): losses, weights, valid

    @property
    def losses(self) -> Tensor:
        """L_i (0 for ignored rows)."""
        return self._rows[0]

    @property
    def weights(self) -> Tensor:
        """W_i, without sample_weight and mix (0 for ignored rows, NaN for rows with a non-finite loss)."""
        return self._rows[1]

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


class ABLoss(nn.Module):
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
        process_group, deferred, loss_divisor, rule: not available yet beyond their defaults on one process.
        backend: None (the fastest that can run), "cuda", "triton", "cpu" or "reference".

    forward(*args, sample_weight=None, mask=None, score=None, update=True): args go to the criterion. sample_weight,
    mask (bool, True = valid) and score have the shape of the losses; with score, W comes from score / lam instead of
    L / lam. Returns a 0-d loss: float64 for float64 losses, else float32. log s moves only in training mode with
    gradients enabled and update=True. A NaN or infinite loss makes the returned loss NaN, counts in
    `nonfinite_batches` and leaves log s alone.

    Attributes:
        log_s, lam: 0-d buffers, float32 (float64 after .double()), in state_dict.
        last: `LastForward` of the latest forward. objective: lam log s, the running DRO objective (Eq. 7).
        nonfinite_batches: int64 buffer.

    Raises:
        ValueError: lam = 0 or NaN, gamma or alpha outside (0, 1], a criterion that returns a scalar, a batch on another
        device than the state. TypeError, IndexError: labels of a float dtype, out of range. The state is then unchanged.

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
        _not_yet("rule", rule is not None, "pass lam")
        _not_yet("deferred", bool(deferred), "call backward once per optimizer step")
        _not_yet("loss_divisor", loss_divisor != 1, "scale the loss yourself")
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
        self.process_group = process_group
        self.criterion = CrossEntropy() if criterion is None else criterion
        self.backend = backend
        self.register_buffer("lam", torch.tensor(math.inf))
        self.register_buffer("log_s", torch.tensor(-math.inf))
        self.register_buffer("nonfinite_batches", torch.tensor(0))
        self._rows: Tensor | None = None
        self._served: tuple[torch.device, ops.Operators | None] | None = None  # device, and the operators that serve it
        self.set_lam(lam)
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
        if isinstance(value, RelativeLam):
            self._relative, self._lam_is_open = value.r, True
            self.lam.fill_(math.nan)
        else:
            _checks.lam(value)
            self._relative, self._lam_is_open = None, False
            self.lam.copy_(value) if isinstance(value, Tensor) else self.lam.fill_(value)
        if reset:
            self.log_s.fill_(0.0 if self.normalizer == "none" else -math.inf)

    @property
    def objective(self) -> Tensor:
        """lam log s: the running estimate of the DRO objective (Eq. 7 without r); the last plain mean at |lam| = inf."""
        plain = self.last.mean_loss.to(self.log_s.dtype) if self._rows is not None else self.log_s.new_tensor(math.nan)
        return torch.where(self.lam.isinf() | self.lam.isnan(), plain, self.lam * self.log_s)

    @property
    def last(self) -> LastForward:
        if self._rows is None:
            raise RuntimeError("last: there was no forward yet; call the criterion first")
        return LastForward(self._rows)

    def _apply(self, fn, recurse=True):
        """Moves and casts with the module, but the state stays float32 or float64: in bfloat16 the average would not move."""
        exact = {name: getattr(self, name) for name in ("lam", "log_s")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype not in (torch.float32, torch.float64):
                setattr(self, name, before.to(after.device))
        self._served = None
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        loaded = state_dict.get(prefix + "lam")
        still_open = loaded is not None and bool(loaded.isnan())
        if still_open and self._relative is None:
            error_msgs.append(f"{prefix}lam: the saved RelativeLam was not fixed yet; construct ABLoss with lam=RelativeLam(r)")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
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
        if groups is not None:
            raise ValueError("groups: only a rule uses groups; leave it out")
        grad_mode = torch.is_grad_enabled()
        learns = update and grad_mode and self.training
        if learns and _distributed() and self.process_group is not None:
            self._check_one_process()
        if len(args) != 2:
            return self._any_loss(args, sample_weight, mask, score, learns)
        logits, target = args
        tensors = isinstance(logits, Tensor) and isinstance(target, Tensor)
        spec = fused_spec(self._modules.get("criterion"), logits) if tensors else None
        if spec is None:
            return self._any_loss(args, sample_weight, mask, score, learns)
        operators = self._operators(logits)
        if operators is None:
            return self._any_loss(args, sample_weight, mask, score, learns, spec)
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
            losses = F.losses_of(logits.detach(), target, spec, self._backend())
            valid = spec.valid(target, losses)
            self._fix_lam(losses, valid if mask is None else valid & mask)
        saves = operators.saves(logits) if grad_mode and logits.requires_grad else 0
        try:
            loss, rows, made = operators.robust_logit_loss(
                logits, target, weight, adjust, first, second, ignore_index, score, sample_weight, mask,
                *self._state(learns, saves | bits),
            )  # fmt: skip
        except RuntimeError as error:
            _checks.target(logits, target, soft=spec.soft)  # the usual mistakes, said in Python's words
            raise ops.translated(error) from None
        self.__dict__["_rows"] = rows  # nn.Module.__setattr__ costs 0.5 us
        if not saves:
            return loss
        plain = lambda x: self._plain(spec, x, target, rows, sample_weight)  # noqa: E731
        if saves == ops.WITH_STATS:
            return ops.attach_rows(
                operators, logits, loss, (target, weight, adjust, first if bits < ops.KIND else 0.0), made, plain
            )
        return ops.attach(operators, logits, loss, made, plain)

    def _plain(self, spec: F.LossSpec, logits: Tensor, target: Tensor, rows: Tensor, sample_weight: Tensor | None) -> Tensor:
        """The robust loss of a forward whose weights are known, in plain torch."""
        valid = rows[2] > 0
        factor = rows[1] + self.mix * (~self._buffers["lam"].isinf()).to(rows.dtype)
        if sample_weight is not None:
            factor = factor * sample_weight
        counted = (valid & ~rows[1].isnan()).sum().clamp(min=1)
        return (torch.where(valid, factor, 0.0) * spec.plain(logits, target)).sum() / counted

    def _state(self, learns: bool, saves: int) -> tuple:
        """The operators' last arguments: state and numbers."""
        state = self._buffers
        lam = (
            torch.full_like(state["lam"], math.inf) if self._lam_is_open else state["lam"]
        )  # an open RelativeLam: the plain mean
        flags = self._flags + (ops.UPDATE if learns else 0) + saves
        return state["log_s"], state["nonfinite_batches"], lam, self.gamma, self.alpha, self.mix, self.max_weight, flags

    def _any_loss(self, args, sample_weight, mask, score, learns, spec=None) -> Tensor:
        """Losses of any kind first, then the weights in one operator, or all by reference.py."""
        valid = None
        if spec is not None:
            logits = args[0]
            target = _checks.target(logits, args[1], soft=spec.soft)
            if not target.is_floating_point():
                if logits.device.type != "cpu" and not ops.transformed():
                    target = ops.check_labels(target, logits.shape[1], spec.ignore_index)
                if mask is not None:  # a row that is ignored anyway may hold anything
                    target = target.masked_fill(~_checks.per_sample(mask, "mask", target, torch.bool), spec.ignore_index)
            losses = F.losses_of(logits, target, spec, self._backend())
            valid = spec.valid(target, losses)
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
        if self._lam_is_open and learns:
            self._fix_lam(losses.detach(), mask)
        if operators is None:
            return self._reference(losses, sample_weight, mask, score, learns)
        saves = ops.WITH_GRAD if losses.requires_grad and torch.is_grad_enabled() else 0
        loss, rows, grad = operators.robust_loss(losses, score, sample_weight, mask, *self._state(learns, saves))
        self.__dict__["_rows"] = rows
        if not saves:
            return loss
        return ops.attach(operators, losses, loss, grad, lambda x: (grad * x).sum())

    def _reference(self, losses, sample_weight, mask, score, learns) -> Tensor:
        lam = self._state(False, 0)[2]
        loss, weights, log_s, bad = reference.robust_loss(
            losses, self.log_s, lam, mix=self.mix, sample_weight=sample_weight, score=score, mask=mask,
            gamma=self.gamma, alpha=self.alpha, init=self.init, normalizer=self.normalizer, max_weight=self.max_weight,
        )  # fmt: skip
        with torch.no_grad():
            valid = torch.ones_like(losses) if mask is None else mask.to(losses.dtype)
            self._rows = torch.stack([losses.detach().where(valid > 0, 0), weights, valid])
            if learns:
                self.log_s.copy_(log_s)
                self.nonfinite_batches += bad
        return loss

    # ---- helpers ----

    def _backend(self) -> str | None:
        return self.backend or getattr(self.criterion, "backend", None)

    def _operators(self, x: Tensor) -> ops.Operators | None:
        """The operators that serve this batch (None: reference.py); ValueError if the state is on another device."""
        if _transformed():
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

    def _fix_lam(self, losses: Tensor, mask: Tensor | None) -> None:
        """RelativeLam: lambda from the first batch whose plain mean is a finite number other than 0."""
        lam = self._relative * (losses if mask is None else losses[mask]).mean()
        if bool(lam.isfinite() & (lam != 0)):
            self.lam.copy_(lam)
            self._lam_is_open = False

    def _check_one_process(self) -> None:
        processes = torch.distributed.get_world_size(None if self.process_group == "auto" else self.process_group)
        if processes > 1:
            raise NotImplementedError(
                f"process_group: got {self.process_group!r} on {processes} processes, which is not available yet; "
                "process_group=None normalises each process by itself"
            )

    def extra_repr(self) -> str:
        lam = f"RelativeLam({self._relative})" if self._lam_is_open else f"{float(self.lam):g}"
        return f"lam={lam}, gamma={self.gamma:g}, alpha={self.alpha:g}, mix={self.mix:g}, normalizer={self.normalizer!r}"


def _checked(losses: object) -> Tensor:
    """What a criterion returned, if it is per-sample losses."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"ABLoss: criterion returned {type(losses).__name__}, expected a tensor of per-sample losses")
    if losses.dim() == 0:
        raise ValueError('ABLoss: criterion returned shape (), expected (B,) per-sample losses; pass reduction="none"')
    if not losses.is_floating_point():
        raise TypeError(f"ABLoss: criterion returned {losses.dtype}, expected floating per-sample losses")
    return losses


def _not_yet(name: str, given: bool, instead: str) -> None:
    if given:
        raise NotImplementedError(f"{name}: not available yet; {instead}")


def DFT(criterion: Callable[..., Tensor] | None = None) -> ABLoss:
    """Dynamic fine-tuning: W = exp(-L), which is p(label) for cross-entropy, with no normaliser.

    ABLoss(criterion, lam=-1, normalizer="none"): a token counts by how probable the model already finds it.

    >>> criterion = DFT()
    >>> _ = criterion(torch.zeros(1, 4, requires_grad=True), torch.tensor([2]))
    >>> criterion.last.weights
    tensor([0.2500])
    """
    return ABLoss(criterion, lam=-1.0, normalizer="none")
