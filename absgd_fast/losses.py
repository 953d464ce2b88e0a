"""Per-sample losses on logits as modules, class weights, and a classifier. Inside `ABLoss` the losses run fused with the robust
weights. The formulas are in `functional.logit_loss` (and csrc/math.h, reference/)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import _checks, ops
from . import functional as F
from .ops import LossSpec
from .reference import real_dtype


class LogitLoss(nn.Module):
    """What the losses on logits share: class weights, class vectors, ignored rows, the reduction.

    Shared arguments of every loss here:
        weight: (C) class weights v; they are part of the loss, so inside `ABLoss` they stand in the exponent, as in the ABSGD
            paper (Sec. 4) and the reference package.
        ignore_index: rows with this label do not count.
        reduction: "none" (one loss per sample, the default: what `ABLoss` needs), "mean" (divided by the sum of the labels'
            class weights over the rows that count, as torch does) or "sum".
        backend: None (the fastest that can run), "cuda", "triton", "cpu" or "reference".

    forward(logits, target): logits (B, C) or (B, C, d1, ...), float32, float64, bfloat16 or float16; target (B) or
    (B, d1, ...), int64 or int32. Losses are float32 (float64 for float64 logits). Raises as `functional.logit_loss`.

    >>> isinstance(CrossEntropy(), LogitLoss)
    True
    """

    def __init__(
        self,
        kind: str,
        weight: Tensor | None,
        ignore_index: int,
        reduction: str,
        backend: str | None,
        *,
        label_smoothing: float = 0.0,
        gamma: float = 2.0,
        q: float = 0.7,
        k: float | None = None,
        prune: bool = False,
        alpha: float = 0.1,
        beta: float = 1.0,
    ):
        super().__init__()
        if weight is not None:
            weight = torch.as_tensor(weight).detach().clone()
            if weight.dim() != 1 or not weight.is_floating_point():
                raise ValueError(
                    f"weight: got shape {tuple(weight.shape)} {weight.dtype}, expected one float weight per class, (C,)"
                )
        self.register_buffer("weight", weight)
        self._numbers = F.loss_spec(kind, None, None, label_smoothing, ignore_index, gamma, q, k, prune, alpha, beta)[2:]
        self.ignore_index = int(ignore_index)
        self.reduction = _checks.choice(reduction, "reduction", ("none", "mean", "sum"))
        self.backend = backend

    def _adjust(self, logits: Tensor) -> Tensor | None:
        """The class vectors S, D, M (3, C) in the dtype of the losses."""
        return None

    def spec(self, logits: Tensor) -> LossSpec:
        """This loss in the terms of the operators."""
        # _buffers: module.weight goes through nn.Module.__getattr__, 0.4 us
        return LossSpec(self._buffers["weight"], self._adjust(logits), *self._numbers)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """(B) or (B, d1, ...) losses for reduction="none", else 0-d."""
        spec = self.spec(logits)
        losses, valid = F.losses_and_validity(logits, target, spec, self.backend)
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        if target.is_floating_point():
            return losses.mean()
        valid = valid > 0
        losses = losses.where(valid, 0)  # ignored rows have gradient 0 even where nothing is left to divide by
        if self.weight is None:
            return losses.sum() / valid.sum()
        weight = self.weight.to(losses.device, real_dtype(logits.dtype))
        return losses.sum() / (weight[torch.where(valid, target, 0).long()] * valid).sum()

    def extra_repr(self) -> str:
        a, b, ignore_index, _ = self._numbers
        numbers = "" if not (a or b) else f"{a:g}, {b:g}, " if b else f"{a:g}, "
        return f"{numbers}ignore_index={ignore_index}, reduction={self.reduction!r}"


class CrossEntropy(LogitLoss):
    """Cross-entropy: l = (1 - e) v_y (-log p_y) + (e / C) sum_k v_k (-log p_k), as torch.nn.CrossEntropyLoss.

    Args:
        label_smoothing: e in [0, 1].
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    target may also be probabilities t of the shape of the logits: l = sum_k ((1 - e) t_k + e / C) v_k (-log p_k), and "mean"
    divides by the number of rows.

    >>> CrossEntropy()(torch.zeros(2, 10), torch.tensor([3, 7]))
    tensor([2.3026, 2.3026])
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "none",
        backend: str | None = None,
    ):
        super().__init__("ce", weight, ignore_index, reduction, backend, label_smoothing=label_smoothing)

    @property
    def label_smoothing(self) -> float:
        return self._numbers[0]


class Focal(LogitLoss):
    """Focal loss: l = w (1 - p)^gamma (-log p)  (Lin et al. 2017, Eq. 5).

    Args:
        gamma: >= 0; 0 is cross-entropy.
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    >>> Focal(gamma=2.0)(torch.zeros(1, 2), torch.tensor([0]))  # 0.25 log 2
    tensor([0.1733])
    """

    def __init__(self, gamma: float = 2.0, weight=None, ignore_index: int = -100, reduction: str = "none", backend=None):
        super().__init__("focal", weight, ignore_index, reduction, backend, gamma=gamma)


class GCE(LogitLoss):
    """Generalised cross-entropy: l = w (1 - p^q) / q  (Zhang & Sabuncu 2018, Eq. 6), between -log p (q -> 0) and 1 - p (q = 1).

    Args:
        q: in (0, 1].
        k: truncation (their Eq. 9, TCE): l = w (k^q - p^q) / q, negative for p > k; None = none.
        prune: with k, rows with p <= k are treated as ignored, batch by batch. (The original prunes a data set at chosen
            epochs.)
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    >>> GCE(q=1.0)(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.5000])
    """

    def __init__(
        self,
        q: float = 0.7,
        k: float | None = None,
        prune: bool = False,
        weight=None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend=None,
    ):
        super().__init__("gce", weight, ignore_index, reduction, backend, q=q, k=k, prune=prune)


class SCE(LogitLoss):
    """Symmetric cross-entropy: l = w [alpha (-log p) + beta A (1 - p)], A = -log 1e-4  (Wang et al. 2019, Eq. 5).

    Args:
        alpha, beta: >= 0; the paper has (0.1, 1) for CIFAR-10 and (6, 1) for CIFAR-100 (0.1 in its text).
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    >>> SCE()(torch.zeros(1, 2), torch.tensor([0]))  # 0.1 log 2 + 9.2103 / 2
    tensor([4.6745])
    """

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 1.0,
        weight=None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend=None,
    ):
        super().__init__("sce", weight, ignore_index, reduction, backend, alpha=alpha, beta=beta)


# ---- losses with class vectors ---------------------------------------------------------------------------------------


class _ClassVectorLoss(LogitLoss):
    """Cross-entropy on a_k = S_k x_k + D_k - M_y 1[k = y], S, D and M from the numbers of samples per class."""

    def __init__(self, cls_num_list: Sequence[int], weight, ignore_index: int, reduction: str, backend):
        super().__init__("ce", weight, ignore_index, reduction, backend)
        self.cls_num_list = _checks.class_counts(cls_num_list).tolist()
        self.scaled = True  # False: S = 1 (schedule.TLA)
        self._made: dict = {}  # (device, dtype, scaled) -> S, D, M

    def _vectors(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def _keep_vectors(self) -> None:
        """For float32 logits on the default device now: what is kept only later, torch.compile would compile for anew."""
        self._adjust(torch.empty(0))

    def _adjust(self, logits: Tensor) -> Tensor:
        key = logits.device, real_dtype(logits.dtype), self.scaled
        if key not in self._made:
            counts = torch.tensor(self.cls_num_list, dtype=torch.float64)
            scale, shift, margin = self._vectors(counts)
            scale = scale if self.scaled else torch.ones_like(scale)
            self._made[key] = torch.stack([scale, shift, margin]).to(key[0], key[1])
        return self._made[key]

    def __getstate__(self):
        return self.__dict__ | {"_made": {}}


class LDAM(_ClassVectorLoss):
    """Label-distribution-aware margins (Cao et al. 2019, Eq. 13): cross-entropy on s (x_k - m_y 1[k = y]) with
    m_j = max_m N_j^(-1/4) / max_k N_k^(-1/4).

    Wants logits in [-1, 1]: see `CosineClassifier`.

    Args:
        cls_num_list: numbers of samples per class N, positive.
        max_m: the largest margin, >= 0.
        s: scale of the logits, > 0.
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    >>> LDAM([100, 1], max_m=0.5, s=1.0)(torch.zeros(1, 2), torch.tensor([1]))  # log(1 + exp(0.5))
    tensor([0.9741])
    """

    def __init__(
        self,
        cls_num_list: Sequence[int],
        max_m: float = 0.5,
        s: float = 30.0,
        weight=None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend=None,
    ):
        super().__init__(cls_num_list, weight, ignore_index, reduction, backend)
        self.max_m = _checks.within(max_m, "max_m", 0, math.inf)
        self.s = _checks.within(s, "s", 0, math.inf, open_below=True)
        self._numbers = (*self._numbers[:3], self._numbers[3] | ops.HARD)
        self._keep_vectors()

    def _vectors(self, counts):
        margin = counts**-0.25
        return torch.full_like(counts, self.s), torch.zeros_like(counts), self.s * self.max_m * margin / margin.max()


class VS(_ClassVectorLoss):
    """Vector scaling (Kini et al. 2021, Eq. 2): cross-entropy on S_k x_k + D_k with S_k = (N_k / N_max)^gamma and
    D_k = tau log pi_k, pi the class frequencies.

    Args:
        cls_num_list: numbers of samples per class N, positive.
        gamma: >= 0, of the multiplicative part. tau: >= 0, of the additive part.
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    >>> VS([3, 1], gamma=0.0, tau=1.0)(torch.zeros(1, 2), torch.tensor([1]))  # -log(1/4)
    tensor([1.3863])
    """

    def __init__(
        self,
        cls_num_list: Sequence[int],
        gamma: float = 0.3,
        tau: float = 1.0,
        weight=None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend=None,
    ):
        super().__init__(cls_num_list, weight, ignore_index, reduction, backend)
        self.gamma = _checks.within(gamma, "gamma", 0, math.inf)
        self.tau = _checks.within(tau, "tau", 0, math.inf)
        self._keep_vectors()

    def _vectors(self, counts):
        return (counts / counts.max()) ** self.gamma, self.tau * (counts / counts.sum()).log(), torch.zeros_like(counts)


class LogitAdjusted(VS):
    """Logit adjustment (Menon et al. 2021, Eq. 10): cross-entropy on x_k + tau log pi_k; `VS` with gamma = 0.

    >>> LogitAdjusted([3, 1])(torch.zeros(1, 2), torch.tensor([0]))  # -log(3/4)
    tensor([0.2877])
    """

    def __init__(
        self,
        cls_num_list: Sequence[int],
        tau: float = 1.0,
        weight=None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend=None,
    ):
        super().__init__(cls_num_list, 0.0, tau, weight, ignore_index, reduction, backend)


class CDT(VS):
    """Class-dependent temperatures (Ye et al. 2020): cross-entropy on (N_k / N_max)^gamma x_k; `VS` with tau = 0.

    >>> CDT([4, 1], gamma=0.5)(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))  # log(1 + exp(-1))
    tensor([0.3133])
    """

    def __init__(
        self,
        cls_num_list: Sequence[int],
        gamma: float = 0.3,
        weight=None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend=None,
    ):
        super().__init__(cls_num_list, gamma, 0.0, weight, ignore_index, reduction, backend)


class CosineClassifier(nn.Module):
    """Logits x_k = cos(h, W_k) in [-1, 1]: the last layer for `LDAM`, whose s is their scale (Cao et al. 2019, Sec. 3.2).

    Args:
        in_features: length of h. out_features: number of classes C.

    forward(hidden): (..., in_features) -> (..., out_features).

    >>> layer = CosineClassifier(8, 3)
    >>> bool((layer(torch.randn(5, 8)).abs() <= 1 + 1e-6).all())
    True
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.normalize(hidden, dim=-1), nn.functional.normalize(self.weight, dim=-1))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


# ---- class weights ---------------------------------------------------------------------------------------------------


def class_balanced_weights(cls_num_list: Sequence[int], beta: float = 0.9999) -> Tensor:
    """w_j proportional to (1 - beta) / (1 - beta^N_j), summing to C  (Cui et al. 2019, Eq. 12).

    Args:
        cls_num_list: numbers of samples per class N, positive. beta: in [0, 1); 0 gives equal weights.

    Returns:
        (C) float32.

    >>> class_balanced_weights([1000, 10], beta=0.9)
    tensor([0.7888, 1.2112])
    """
    counts = _checks.class_counts(cls_num_list)
    beta = _checks.within(beta, "beta", 0, 1, open_above=True)
    return _normalised((1 - beta) / -torch.expm1(counts * math.log(beta)) if beta else torch.ones_like(counts))


def adrw_weights(cls_num_list: Sequence[int], nu: float) -> Tensor:
    """w_j proportional to pi_j^(-nu), summing to C: the aligned deferred re-weighting of Wang et al. 2023, Sec. 3.3.

    Args:
        cls_num_list: numbers of samples per class, positive; pi the class frequencies. nu: >= 0.

    Returns:
        (C) float32.

    >>> adrw_weights([3, 1], nu=1.0)
    tensor([0.5000, 1.5000])
    """
    counts = _checks.class_counts(cls_num_list)
    return _normalised((counts / counts.sum()) ** -_checks.within(nu, "nu", 0, math.inf))


def _normalised(weights: Tensor) -> Tensor:
    return (weights * (len(weights) / weights.sum())).float()


# ---- what runs fused -------------------------------------------------------------------------------------------------


def fused_spec(criterion: object, logits: Tensor) -> LossSpec | None:
    """What the fused operators are called with to give the per-sample losses of `criterion`.

    That is our own losses and torch.nn.CrossEntropyLoss, with reduction="none"; None for everything else.

    >>> fused_spec(torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1), torch.zeros(1, 2)).hyper_a
    0.1
    """
    kind = type(criterion)
    if getattr(kind, "forward", None) is LogitLoss.forward:  # a subclass with a forward of its own does something else
        return criterion.spec(logits) if criterion.reduction == "none" else None
    if kind is nn.CrossEntropyLoss and criterion.reduction == "none" and not _has_hooks(criterion):
        return LossSpec(criterion._buffers["weight"], None, criterion.label_smoothing, 0.0, criterion.ignore_index, 0)
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
