"""Per-sample losses on logits as modules, and a classifier.

Inside `ABLoss` a loss and the robust weights are computed in one fused pass. The formulas are in `functional.logit_loss`, in
reference/losses.py and in docs/MATH.md §2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from . import _checks, ops
from . import functional as F
from ._exact import exact_dtype
from ._scheduled import Scheduled
from .ops import LossSpec
from .reference import real_dtype


class LogitLoss(Scheduled):
    """Base class of the losses on logits: class weights, class vectors, ignored rows and the reduction.

    Every loss here has these arguments, and some have others besides.

    Args:
        weight: (C) class weights v, default all 1: what `set_weight` takes. They are part of the loss. Inside `ABLoss` they
            therefore stand in the exponent, as in the ABSGD paper (Sec. 4) and the reference package. ValueError if one is NaN or
            infinite, RuntimeError if they require grad. A negative weight turns the loss of its class around, as in torch.
        ignore_index: rows with this label do not count.
        reduction: "none" (the default): one loss per sample, which `ABLoss` needs. "mean": the sum, divided as torch does by the
            sum of the labels' class weights over the rows that count (docs/MATH.md §2.4). "sum".
        backend: None (the fastest that can run on the device), "cuda", "triton", "cpu" or "reference".

    forward(logits, target) takes logits (B, C) or (B, C, d1, ...), float32, float64, bfloat16 or float16, and target (B) or
    (B, d1, ...), int64 or int32; for one sample also logits (C) and a label (). The losses are float32 (float64 for float64
    logits). It takes other targets and raises errors as `functional.logit_loss`.

    >>> isinstance(CrossEntropy(), LogitLoss)
    True
    """

    COUNTS: ClassVar[tuple[str, ...]] = ("drw_count",)

    # A buffer, as in torch's losses, and no state tensor: no training step moves it, and an average of two is class weights too.
    weight: Tensor | None
    drw_count: int | None = None  # of a schedule.DRW that drives this loss

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
        self.register_buffer("weight", None)
        self.set_weight(weight)
        self._numbers = F.loss_spec(kind, None, None, label_smoothing, ignore_index, gamma, q, k, prune, alpha, beta)[2:]
        self.ignore_index = self._numbers[2]
        self.reduction = _checks.choice(reduction, "reduction", ("none", "mean", "sum"))
        self.backend = backend

    def set_weight(self, weight: Tensor | Sequence[float] | None) -> None:
        """Use these class weights from now on; None for 1. The constructor takes the same, and raises the same errors.

        Args:
            weight: (C) finite numbers: a floating tensor, an array, a list of numbers, or one of 0-d tensors. A tensor or a
                floating array keeps its dtype. Other numbers become float32, or float64 if that is torch's default dtype.
        """
        self.weight = None if weight is None else _checks.given_class_weight(weight)
        self._given_weight = None if self.weight is None else self.weight.clone()

    def reset_parameters(self) -> None:
        """Give the class weights the values that `set_weight` or the constructor got. torch calls it after `to_empty`."""
        if self.weight is not None and self._given_weight is not None:
            self.weight.copy_(self._given_weight)

    def _adjust(self, logits: Tensor) -> Tensor | None:
        """The class vectors S, D, M, (3, C) in the dtype of the losses; None if the loss has none."""
        return None

    def spec(self, logits: Tensor) -> LossSpec:
        """This loss in the form that the operators take."""
        # self._buffers["weight"], because self.weight goes through nn.Module.__getattr__, which costs 0.4 us
        return LossSpec(self._buffers["weight"], self._adjust(logits), *self._numbers)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The losses, (B) or (B, d1, ...) for reduction="none", else 0-d; 0-d for one sample."""
        copies = self.reduction != "none"
        losses, valid = F.losses_and_validity(
            logits, target, self.spec(logits), self.backend, one_sample=True, copy_losses=copies
        )
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        if target.is_floating_point():
            return losses.mean()
        valid = valid > 0
        losses = losses.where(valid, 0)  # so that ignored rows have gradient 0 even if no row is left and the divisor is 0
        if self.weight is None:
            return losses.sum() / valid.sum()
        weight = self.weight.to(losses.device, real_dtype(logits.dtype))
        of_rows = weight[torch.where(valid, target, 0).long().flatten()]  # flat: torch reads a 0-d index on the host
        return losses.sum() / (of_rows * valid.flatten()).sum()

    def extra_repr(self) -> str:
        """The numbers of the loss, for repr()."""
        a, b, ignore_index, _ = self._numbers
        numbers = "" if not (a or b) else f"{a:g}, {b:g}, " if b else f"{a:g}, "
        return f"{numbers}ignore_index={ignore_index}, reduction={self.reduction!r}"


class CrossEntropy(LogitLoss):
    """Cross-entropy, as torch.nn.CrossEntropyLoss (docs/MATH.md §2.2).

        l = (1 - e) v_y (-log p_y) + (e / C) sum_k v_k (-log p_k)

    target may also be probabilities t of the shape of the logits (docs/MATH.md §2.4), which get a gradient if they require grad
    (§7). Then "mean" divides by the number of rows:

        l = sum_k ((1 - e) t_k + e / C) v_k (-log p_k)

    Args:
        label_smoothing: e in [0, 1].
        weight, ignore_index, reduction, backend: see `LogitLoss`.

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
        """The label smoothing e."""
        return self._numbers[0]


class Focal(LogitLoss):
    """Focal loss (Lin et al. 2017, Eq. 5; docs/MATH.md §2.2).

        l = w (1 - p)^gamma (-log p)

    Args:
        gamma: >= 0; 0 is cross-entropy.
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    >>> Focal(gamma=2.0)(torch.zeros(1, 2), torch.tensor([0]))  # 0.25 log 2
    tensor([0.1733])
    """

    def __init__(
        self,
        gamma: float = 2.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend: str | None = None,
    ):
        super().__init__("focal", weight, ignore_index, reduction, backend, gamma=gamma)


class GCE(LogitLoss):
    """Generalised cross-entropy, for mislabelled data (Zhang & Sabuncu 2018, Eq. 6; docs/MATH.md §2.2).

        l = w (1 - p^q) / q              from -log p (q -> 0) to 1 - p (q = 1)
        l = w (k^q - p^q) / q            truncated at k (Eq. 9, TCE); negative for p > k

    Args:
        q: in (0, 1].
        k: in (0, 1); None: not truncated.
        prune: True (needs k): rows with p <= k are treated as ignored, batch by batch. The original prunes the data set at chosen
            epochs.
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    >>> GCE(q=1.0)(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.5000])
    """

    def __init__(
        self,
        q: float = 0.7,
        k: float | None = None,
        prune: bool = False,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend: str | None = None,
    ):
        super().__init__("gce", weight, ignore_index, reduction, backend, q=q, k=k, prune=prune)


class SCE(LogitLoss):
    """Symmetric cross-entropy, for mislabelled data (Wang et al. 2019, Eq. 5; docs/MATH.md §2.2).

        l = w [alpha (-log p) + beta A (1 - p)],    A = -log 1e-4

    Args:
        alpha, beta: >= 0. The paper has (0.1, 1) for CIFAR-10 and (6, 1) for CIFAR-100 (0.1 in its text).
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    >>> SCE()(torch.zeros(1, 2), torch.tensor([0]))  # 0.1 log 2 + 9.2103 / 2
    tensor([4.6745])
    """

    def __init__(
        self,
        alpha: float = 0.1,
        beta: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend: str | None = None,
    ):
        super().__init__("sce", weight, ignore_index, reduction, backend, alpha=alpha, beta=beta)


# ---- losses with class vectors ---------------------------------------------------------------------------------------


class _ClassVectorLoss(LogitLoss):
    """Cross-entropy on a_k = S_k x_k + D_k - M_y 1[k = y], with S, D and M made from the numbers of samples per class."""

    def __init__(
        self, cls_num_list: Sequence[int], weight: Tensor | None, ignore_index: int, reduction: str, backend: str | None
    ):
        super().__init__("ce", weight, ignore_index, reduction, backend)
        self.cls_num_list = _checks.class_counts(cls_num_list)
        self.scaled: bool = True  # False: S = 1, which schedule.TLA sets
        self._made: dict[tuple[torch.device, torch.dtype, bool], Tensor] = {}  # (device, dtype, scaled) -> S, D, M

    def _vectors(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S, D, M (C) float64 from the numbers of samples per class."""
        raise NotImplementedError

    def _counts(self) -> Tensor:
        """The number of samples of each class, (C) float64 on the CPU."""
        return torch.tensor(self.cls_num_list, dtype=torch.float64, device="cpu")

    def _keep_vectors(self) -> None:
        """Make the class vectors for float32 logits on the default device now; ValueError if a number is out of their range.

        If they were made in the first forward, torch.compile would compile that forward twice.
        """
        for x in self._vectors(self._counts()):
            _checks.per_class_finite(x.float(), f"{type(self).__name__}: class vector")
        self._adjust(torch.empty(0, dtype=exact_dtype()))

    def _adjust(self, logits: Tensor) -> Tensor:
        """The class vectors S, D, M for these logits, (3, C); made once for each device and dtype."""
        key = logits.device, real_dtype(logits.dtype), self.scaled
        if key not in self._made:
            scale, shift, margin = self._vectors(self._counts())
            scale = scale if self.scaled else torch.ones_like(scale)
            made = torch.stack([scale, shift, margin]).to(key[0], key[1])
            if isinstance(made, _checks.TRACED):
                return made  # of a trace, whose tensors serve no other forward
            self._made[key] = made
        return self._made[key]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_made": {}}


class LDAM(_ClassVectorLoss):
    """Label-distribution-aware margins, for imbalanced data (Cao et al. 2019, Eq. 13; docs/MATH.md §2.2).

        l = cross-entropy of s (x_k - m_y 1[k = y]),    m_j = max_m N_j^(-1/4) / max_k N_k^(-1/4)

    The logits must lie in [-1, 1]; `CosineClassifier` makes logits of this kind.

    Args:
        cls_num_list: number of samples N of each class, positive.
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
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend: str | None = None,
    ):
        super().__init__(cls_num_list, weight, ignore_index, reduction, backend)
        self.max_m = _checks.within(max_m, "max_m", 0, math.inf)
        self.s = _checks.within(s, "s", 0, math.inf, open_below=True)
        self._numbers = (*self._numbers[:3], self._numbers[3] | ops.HARD)
        self._keep_vectors()

    def _vectors(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        margin = counts**-0.25
        return torch.full_like(counts, self.s), torch.zeros_like(counts), self.s * self.max_m * margin / margin.max()


class VS(_ClassVectorLoss):
    """Vector scaling, for imbalanced data (Kini et al. 2021, Eq. 2; docs/MATH.md §2.2).

        l = cross-entropy of S_k x_k + D_k,    S_k = (N_k / N_max)^gamma,    D_k = tau log pi_k,    pi_k = N_k / sum_j N_j

    Args:
        cls_num_list: number of samples N of each class, positive.
        gamma: >= 0, exponent of the multiplicative part S; 0 gives S = 1.
        tau: >= 0, factor of the additive part D; 0 gives D = 0.
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    >>> VS([3, 1], gamma=0.0, tau=1.0)(torch.zeros(1, 2), torch.tensor([1]))  # -log(1/4)
    tensor([1.3863])
    """

    COUNTS = ("drw_count", "tla_count")

    tla_count: int | None = None  # of a schedule.TLA that drives this loss

    def __init__(
        self,
        cls_num_list: Sequence[int],
        gamma: float = 0.3,
        tau: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend: str | None = None,
    ):
        super().__init__(cls_num_list, weight, ignore_index, reduction, backend)
        self.gamma = _checks.within(gamma, "gamma", 0, math.inf)
        self.tau = _checks.within(tau, "tau", 0, math.inf)
        self._keep_vectors()

    def _vectors(self, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (counts / counts.max()) ** self.gamma, self.tau * (counts / counts.sum()).log(), torch.zeros_like(counts)


class LogitAdjusted(VS):
    """Logit adjustment, for imbalanced data (Menon et al. 2021, Eq. 10; docs/MATH.md §2.2): `VS` with gamma = 0.

        l = cross-entropy of x_k + tau log pi_k

    Args:
        cls_num_list: number of samples of each class, positive; pi are the class frequencies.
        tau: >= 0.
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    >>> LogitAdjusted([3, 1])(torch.zeros(1, 2), torch.tensor([0]))  # -log(3/4)
    tensor([0.2877])
    """

    def __init__(
        self,
        cls_num_list: Sequence[int],
        tau: float = 1.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend: str | None = None,
    ):
        super().__init__(cls_num_list, 0.0, tau, weight, ignore_index, reduction, backend)


class CDT(VS):
    """Class-dependent temperatures, for imbalanced data (Ye et al. 2020; docs/MATH.md §2.2): `VS` with tau = 0.

        l = cross-entropy of (N_k / N_max)^gamma x_k

    Args:
        cls_num_list: number of samples N of each class, positive.
        gamma: >= 0.
        weight, ignore_index, reduction, backend: see `LogitLoss`.

    >>> CDT([4, 1], gamma=0.5)(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))  # log(1 + exp(-1))
    tensor([0.3133])
    """

    def __init__(
        self,
        cls_num_list: Sequence[int],
        gamma: float = 0.3,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "none",
        backend: str | None = None,
    ):
        super().__init__(cls_num_list, gamma, 0.0, weight, ignore_index, reduction, backend)


class CosineClassifier(nn.Module):
    """The last layer for `LDAM`: logits x_k = cos(h, W_k) in [-1, 1], which `LDAM` scales by s (Cao et al. 2019, Sec. 3.2).

    Args:
        in_features: length of the hidden vector h.
        out_features: number of classes C.

    forward(hidden) takes (..., in_features) and returns (..., out_features).

    >>> layer = CosineClassifier(8, 3)
    >>> bool((layer(torch.randn(5, 8)).abs() <= 1 + 1e-6).all())
    True
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new vectors of the classes, as torch.nn.Linear does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden: Tensor) -> Tensor:
        """The cosines of the hidden vectors (..., in_features) with each class's vector, (..., out_features)."""
        return nn.functional.linear(nn.functional.normalize(hidden, dim=-1), nn.functional.normalize(self.weight, dim=-1))

    def extra_repr(self) -> str:
        """The sizes of the layer, for repr()."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


# ---- which losses the fused operators know ---------------------------------------------------------------------------


def fused_spec(criterion: object, logits: Tensor) -> LossSpec | None:
    """The description of a criterion that the fused operators take, or None if they do not know it.

    They know our own losses and torch.nn.CrossEntropyLoss, with reduction="none".

    >>> fused_spec(torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1), torch.zeros(1, 2)).hyper_a
    0.1
    """
    if isinstance(criterion, LogitLoss):
        known = type(criterion).forward is LogitLoss.forward  # a subclass with a forward of its own is another loss
        return criterion.spec(logits) if known and criterion.reduction == "none" else None
    if type(criterion) is nn.CrossEntropyLoss and criterion.reduction == "none" and not _has_hooks(criterion):
        smoothing = criterion.label_smoothing
        if 0 <= smoothing <= 1:  # any other is refused by torch's own forward
            return LossSpec(criterion._buffers["weight"], None, smoothing, 0.0, criterion.ignore_index, 0)
    return None


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody registered a hook, which the fused operators would not call."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
