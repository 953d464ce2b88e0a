"""Imbalanced classes and wrong labels: how many samples a class keeps, and which labels are flipped to which."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _numbers
from .choices import check_choice
from .streams import NOISE, generator

IMBALANCES = ("lt", "step")
NOISES = ("symmetric", "uniform", "asymmetric", "background")

# The class that each class is mistaken for under asymmetric noise. The other classes keep their labels. CIFAR-10 and MNIST are as
# in Patrini et al. 2017, Fashion-MNIST is as in Zhang & Sabuncu 2018.
# truck → automobile, bird → airplane, deer → horse, cat ↔ dog
CIFAR10_MAPPING = (0, 1, 0, 5, 7, 3, 6, 7, 8, 1)
# 7 → 1, 2 → 7, 5 ↔ 6, 3 → 8
MNIST_MAPPING = (0, 1, 7, 8, 4, 6, 5, 1, 8, 9)
# ankle boot → sneaker, sneaker → sandal, pullover → shirt, coat ↔ dress
FASHION_MNIST_MAPPING = (0, 1, 6, 4, 3, 5, 6, 5, 8, 7)
MAPPINGS = {"cifar10": CIFAR10_MAPPING, "mnist": MNIST_MAPPING, "fashion-mnist": FASHION_MNIST_MAPPING}


def class_counts(n_max: int, n_classes: int, kind: str = "lt", rho: float = 100.0) -> list[int]:
    """The number of training samples that each class keeps, largest class first.

        lt:    n_c = n_max · rho^(−c/(C−1))                  exponential decay from n_max to n_max/rho
        step:  n_max for the first half of the classes (the larger half when C is odd), n_max/rho for the others

    Each number is rounded down and is at least 1.

    Args:
        n_max: samples of the largest class.
        n_classes: C.
        kind: "lt" (long-tailed) or "step".
        rho: imbalance ratio, largest over smallest class, ≥ 1.

    Returns:
        list of C ints, in the order of the class indices.

    Raises:
        ValueError: n_max or n_classes < 1, unknown kind, rho not a finite number ≥ 1.

    Example:
        >>> from absgd_fast.experiments.noise import class_counts
        >>> class_counts(5000, 10, "lt", rho=100)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
        >>> class_counts(110, 4, "step", rho=10)
        [110, 110, 11, 11]

    Source: ABSGD paper, Sec. 4.1 (LT and ST); Cui et al. 2019; Buda et al. 2018.
    """
    n_max, n_classes, rho = map(_numbers.plain, (n_max, n_classes, rho))
    if n_max < 1 or n_classes < 1:
        raise ValueError(f"class_counts: n_max and n_classes are at least 1, got {n_max} and {n_classes}")
    check_choice("imbalance", kind, IMBALANCES)
    if not (math.isfinite(rho) and rho >= 1):
        raise ValueError(f"class_counts: rho (largest over smallest class) is a finite number ≥ 1, got {rho}")
    if kind == "lt":
        fractions = [rho ** (-c / max(n_classes - 1, 1)) for c in range(n_classes)]
    else:
        head = (n_classes + 1) // 2
        fractions = [1.0] * head + [1 / rho] * (n_classes - head)
    # Without the last factor, rounding errors would make 99 of an exact whole number such as 1000 · 1000^(−1/3) = 100.
    return [max(1, math.floor(n_max * fraction * (1 + 1e-12))) for fraction in fractions]


def add_noise(
    labels: Tensor | Sequence[int],
    kind: str,
    rate: float,
    n_classes: int,
    seed: int,
    *,
    mapping: Sequence[int] | None = None,
    background: int = 0,
) -> Tensor:
    """A copy of the labels in which each label is flipped with probability `rate`, independently of the others.

        symmetric, uniform   (two names of the same noise) to one of the C − 1 other classes, all equally likely
        asymmetric           to mapping[c]; by default to the next class, (c + 1) mod C
        background           to the class `background`; samples of this class keep their label

    Symmetric noise never flips a label to itself, so `rate` is the expected fraction of wrong labels. (Some papers draw from
    all C classes, which leaves rate/C of the labels right by chance.)

    Args:
        labels: (N,) integers in [0, n_classes), any integer dtype. They are not modified.
        kind: "symmetric", "uniform", "asymmetric" or "background".
        rate: flip probability in [0, 1).
        n_classes: C, at least 2.
        seed: the same seed flips the same samples to the same classes.
        mapping: for asymmetric noise, C class indices: the class that each class is mistaken for. A class that is mapped to
            itself is never flipped. `CIFAR10_MAPPING` is the usual mapping for CIFAR-10.
        background: for background noise, the class that labels are flipped to.

    Returns:
        (N,) tensor of the labels' dtype, on their device.

    Raises:
        ValueError: an unknown kind, a rate outside [0, 1), fewer than 2 classes, a label, mapping or background class out of
            range, or labels that are not a vector of integers.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.noise import add_noise
        >>> clean = torch.arange(10).repeat(1000)
        >>> noisy = add_noise(clean, "symmetric", 0.4, n_classes=10, seed=0)
        >>> 0.38 < (noisy != clean).float().mean() < 0.42
        tensor(True)

    Source: ABSGD paper, Sec. 4.3 (symmetric, asymmetric); L2RW (Ren et al. 2018), Sec. 4.3 (UniformFlip,
    BackgroundFlip).
    """
    labels = labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")
    rate, n_classes, seed, background = map(_numbers.plain, (rate, n_classes, seed, background))
    check_choice("noise", kind, NOISES)
    if not 0 <= rate < 1:  # also true of NaN
        raise ValueError(f"add_noise: rate is a probability in [0, 1), got {rate}")
    if n_classes < 2:
        raise ValueError(f"add_noise: flipping a label takes at least 2 classes, got n_classes={n_classes}")
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"add_noise: labels are a vector of integers, got {labels.dtype} of shape {tuple(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise ValueError(f"add_noise: labels lie in [0, {n_classes}), got {int(labels.min())} to {int(labels.max())}")

    random, old = generator(seed, NOISE), labels.cpu().long()
    flips = torch.rand(len(old), generator=random, dtype=torch.float64, device="cpu") < rate
    if kind in ("symmetric", "uniform"):
        # adding 1 … C−1 modulo C reaches every class except the sample's own
        new = (old + torch.randint(1, n_classes, (len(old),), generator=random, device="cpu")) % n_classes
    elif kind == "asymmetric":
        mapping = [(c + 1) % n_classes for c in range(n_classes)] if mapping is None else list(map(_numbers.plain, mapping))
        if len(mapping) != n_classes or not all(0 <= c < n_classes for c in mapping):
            raise ValueError(f"add_noise: mapping has {n_classes} classes in [0, {n_classes}), got {mapping}")
        new = torch.tensor(mapping, dtype=torch.int64, device="cpu")[old]
    else:
        if not 0 <= background < n_classes:
            raise ValueError(f"add_noise: background is a class in [0, {n_classes}), got {background}")
        new = torch.full_like(old, background)
    return torch.where(flips, new, old).to(labels)
