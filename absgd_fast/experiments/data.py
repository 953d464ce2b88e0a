"""Data sets as tensors, with long-tailed or step imbalance and label noise. A seed determines every random choice.

load_source() returns a Source, the whole data set. draw(source, seed) returns a Split: training images, the labels to train on
(some of them flipped), their true labels, and a clean test set.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _numbers
from . import idx
from .checkpoint import digest

# name: (channels, height, width) of its images
SHAPES = {"digits": (1, 8, 8), "digits-9-4": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
SHAPES |= dict.fromkeys(idx.DATASETS, (1, idx.SIDE, idx.SIDE))
DATASETS = tuple(SHAPES)
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

# The names of the classes, where they say more than their numbers.
CLASS_NAMES = {
    "digits-9-4": ("9", "4"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "fashion-mnist": (
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
}

# Each kind of choice has its own stream of random numbers, so another kind of noise does not change the split.
SPLIT, NOISE, INIT, ORDER, METHOD = range(5)


def generator(seed: int, stream: int) -> torch.Generator:
    """The random generator (CPU) of a seed for one `stream`: SPLIT, NOISE, INIT, ORDER or METHOD."""
    return torch.Generator("cpu").manual_seed(1_000_003 * index(seed) + stream)


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
        >>> from absgd_fast.experiments.data import class_counts
        >>> class_counts(5000, 10, "lt", rho=100)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
        >>> class_counts(110, 4, "step", rho=10)
        [110, 110, 11, 11]

    Source: ABSGD paper, Sec. 4.1 (LT and ST); Cui et al. 2019; Buda et al. 2018.
    """
    n_max, n_classes, rho = map(_numbers.plain, (n_max, n_classes, rho))
    if n_max < 1 or n_classes < 1:
        raise ValueError(f"class_counts: n_max and n_classes are at least 1, got {n_max} and {n_classes}")
    if kind not in IMBALANCES:
        raise ValueError(f"class_counts: unknown kind {kind!r}; use one of {', '.join(IMBALANCES)}")
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
        >>> from absgd_fast.experiments.data import add_noise
        >>> clean = torch.arange(10).repeat(1000)
        >>> noisy = add_noise(clean, "symmetric", 0.4, n_classes=10, seed=0)
        >>> 0.38 < (noisy != clean).float().mean() < 0.42
        tensor(True)

    Source: ABSGD paper, Sec. 4.3 (symmetric, asymmetric); L2RW (Ren et al. 2018), Sec. 4.3 (UniformFlip,
    BackgroundFlip).
    """
    labels = labels if isinstance(labels, Tensor) else torch.as_tensor(labels, device="cpu")
    rate, n_classes, seed, background = map(_numbers.plain, (rate, n_classes, seed, background))
    if kind not in NOISES:
        raise ValueError(f"add_noise: unknown kind {kind!r}; use one of {', '.join(NOISES)}")
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


# ------------------------------------------------------------------------------------------------ data sets


@dataclass(frozen=True)
class Source:
    """A whole data set, before a seed chooses samples from it. If it has no test set, draw() holds test samples back.

    Images are (N, channels, height, width), either uint8 0…255 or floats that go into the model as they are.
    """

    name: str
    classes: int
    images: Tensor
    labels: Tensor  # (N,) int64
    test: tuple[Tensor, Tensor] | None  # (images, labels), or None
    n_max: int  # training samples of a class without imbalance
    n_test: int = 0  # test samples held back per class if test is None
    mapping: tuple[int, ...] | None = None  # of asymmetric noise; None = the next class
    augment: bool = False  # whether training shifts and mirrors the images at random

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of an image."""
        return tuple(self.images.shape[1:])

    @property
    def fingerprint(self) -> str:
        """Its name, size and digest in one line, equal only for equal images and labels. It takes half a second for CIFAR."""
        parts = {"images": self.images, "labels": self.labels}
        parts |= dict(zip(("test images", "test labels"), self.test or ()))
        size = "×".join(map(str, self.shape))
        return f"{self.name}, {len(self.labels)} labels, images of {size}, sha256 {digest(parts)[:16]}"


@dataclass(frozen=True)
class Split:
    """The training and test set that draw() makes of a Source for one seed. All methods of this seed train on the same Split."""

    x: Tensor  # (N, channels, height, width) float32
    y: Tensor  # (N,) int64: the labels to train on; under noise some are wrong
    y_true: Tensor  # (N,) int64: the right labels
    x_test: Tensor  # (N_test, channels, height, width) float32
    y_test: Tensor  # (N_test,) int64, without noise

    def part(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x, y, y_true) of some training images. chosen: their indices."""
        return self.x[chosen], self.y[chosen], self.y_true[chosen]


def load_source(name: str, data_root: str | os.PathLike[str] | None = None) -> Source:
    """Loads a data set.

    Args:
        name: "digits" (scikit-learn's), "digits-9-4" (its nines as class 0 and its fours as class 1; under imbalance the nines
            dominate, as in the L2RW paper, Sec. 4.1), "cifar10", "cifar100", "mnist", "fashion-mnist" or "kmnist".
        data_root: the folder of the files (see load_cifar and idx.load_idx). digits needs none; idx files may be found without.

    Raises:
        ValueError: an unknown name, CIFAR without data_root, or files that do not hold the data set.
        FileNotFoundError: the files are not there.
        ImportError: digits without scikit-learn.
    """
    if name in ("digits", "digits-9-4"):
        from sklearn.datasets import load_digits  # here and not above, because this import takes a second

        bunch = load_digits()
        # 1797 images of 8×8 with grey values 0…16, at least 174 per class.
        images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze_(1)
        labels = torch.from_numpy(bunch.target).long()
        if name == "digits":
            return Source(name, 10, images, labels, None, n_max=110, n_test=60)
        kept = (labels == 9) | (labels == 4)  # 180 and 181 images
        return Source(name, 2, images[kept], (labels[kept] == 4).long(), None, n_max=100, n_test=80)
    if name in ("cifar10", "cifar100"):
        if data_root is None:
            raise ValueError(f"{name} is read from your disk: give the folder of its python files with --data-root")
        return _of_files(name, 10 if name == "cifar10" else 100, load_cifar(data_root, name), augment=True)
    if name in idx.DATASETS:
        return _of_files(name, idx.CLASSES, idx.load_idx(data_root, name))
    raise ValueError(f"unknown data set {name!r}; use one of {', '.join(DATASETS)}")


def _of_files(name: str, classes: int, parts: tuple[Tensor, Tensor, Tensor, Tensor], augment: bool = False) -> Source:
    """The Source of a data set that has a test set of its own."""
    x, y, x_test, y_test = parts
    n_max = int(torch.bincount(y, minlength=classes).min())
    if n_max == 0:
        raise ValueError(f"{name}: a class has no training images")
    return Source(name, classes, x, y, (x_test, y_test), n_max, mapping=MAPPINGS.get(name), augment=augment)


def draw(
    source: Source,
    seed: int,
    *,
    per_class: int | None = None,
    imbalance: str = "none",
    rho: float = 100.0,
    noise: str = "none",
    rate: float = 0.0,
) -> Split:
    """Draws the split of one seed: the samples for training and for testing, and the wrong labels.

    Imbalance is applied before noise. The test set gets neither. Images stored as bytes are standardised per channel with the
    mean and standard deviation of the training images; other images are taken as they are.

    Args:
        source: the data set.
        seed: determines all choices.
        per_class: the number of training images of each class before imbalance, at most source.n_max. None takes n_max.
        imbalance: "none", or the kind of class_counts.
        rho: as for class_counts.
        noise: "none", or the kind of add_noise.
        rate: as for add_noise.

    Raises:
        ValueError: per_class is out of range, or as class_counts and add_noise.
    """
    n_max = source.n_max if per_class is None else index(per_class)
    if not 1 <= n_max <= source.n_max:
        raise ValueError(f"draw: per_class of {source.name} is in [1, {source.n_max}], got {n_max}")
    keep = [n_max] * source.classes
    if imbalance != "none":
        keep = class_counts(n_max, source.classes, imbalance, rho)
    random = generator(seed, SPLIT)
    train_of, test_of = [], []
    for c, count in enumerate(keep):
        members = torch.nonzero(source.labels == c).flatten()
        members = members[torch.randperm(len(members), generator=random, device="cpu")]
        train_of.append(members[:count])
        # the test samples begin after the place of a full class, so an imbalance does not change them
        test_of.append(members[source.n_max : source.n_max + source.n_test])
    train = torch.cat(train_of)
    if source.test is None:
        held_back = torch.cat(test_of)
        x_test, y_test = source.images[held_back], source.labels[held_back]
    else:
        x_test, y_test = source.test
    x, y_true = source.images[train], source.labels[train]
    y = y_true if noise == "none" else add_noise(y_true, noise, rate, source.classes, seed, mapping=source.mapping)
    if x.dtype == torch.uint8:
        x, x_test = _standardise(x, x_test)
    return Split(x, y, y_true, x_test, y_test)


def clean_part(split: Split, per_class: int) -> tuple[Tensor, Tensor]:
    """The clean samples of L2RW: images and right labels of the first `per_class` training samples of each class.

    Smaller classes give all their samples. The samples also stay in the training set, with the labels that they have there (L2RW
    paper, Sec. 3.1 and 4.1).
    """
    classes = range(int(split.y_true.max()) + 1)
    kept = torch.cat([torch.nonzero(split.y_true == c).flatten()[:per_class] for c in classes])
    return split.x[kept], split.y_true[kept]


def _standardise(x: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    """(N, channels, H, W) uint8 → float32. Over the training images each channel has mean 0 and standard deviation 1."""
    x, x_test = x.float(), x_test.float()
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    return x.sub_(mean).div_(std), x_test.sub_(mean).div_(std)  # both are copies


def augment(x: Tensor, random: torch.Generator) -> Tensor:
    """Shifts each image of a batch (B, C, H, W) by up to 4 pixels and mirrors it with probability 1/2 (He et al. 2016)."""
    n, channels, height, width = x.shape
    shift = torch.randint(0, 9, (2, n, 1), generator=random, device="cpu")
    rows, columns = (one + torch.arange(size, device="cpu") for one, size in zip(shift, (height, width)))
    mirrored = torch.rand(n, 1, generator=random, dtype=torch.float32, device="cpu") < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    image, channel = (torch.arange(size, device="cpu") for size in (n, channels))
    image, channel = image.view(n, 1, 1, 1), channel.view(1, channels, 1, 1)
    return padded[image, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


# ------------------------------------------------------------------------------------------------ CIFAR

# name: folder, training files, test file, key of the labels, classes
_CIFAR = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels", 10),
    "cifar100": ("cifar-100-python", ["train"], "test", b"fine_labels", 100),
}


def load_cifar(root: str | os.PathLike[str], name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loads CIFAR-10 or CIFAR-100 from the python files of https://www.cs.toronto.edu/~kriz/cifar.html.

    The files are pickles. A pickle can run any code when it is loaded, so this loader accepts only a dict of bytes, numbers and
    numpy arrays, and refuses everything else.

    Args:
        root: the unpacked folder (cifar-10-batches-py or cifar-100-python), or the folder that contains it.
        name: "cifar10" or "cifar100".

    Returns:
        (x_train, y_train, x_test, y_test): images uint8 (N, 3, 32, 32) with values 0…255, labels int64 (N,)
        (CIFAR-100: the 100 fine classes).

    Raises:
        ValueError: an unknown name, or a file that is not a CIFAR batch (the message names it).
        FileNotFoundError: a file is missing.

    Example:
        >>> from absgd_fast.experiments.data import load_cifar
        >>> x, y, x_test, y_test = load_cifar("/data", "cifar10")  # doctest: +SKIP

    Source: Krizhevsky 2009.
    """
    if name not in _CIFAR:
        raise ValueError(f"load_cifar: unknown data set {name!r}; use cifar10 or cifar100")
    folder, train, test, key, classes = _CIFAR[name]
    here = Path(root)
    if (here / folder).is_dir():
        here = here / folder
    for file in (*train, test):
        if not (here / file).is_file():
            raise FileNotFoundError(
                f"load_cifar: no file {file!r} in {here}; unpack {name}'s python version there (folder {folder}, "
                "from https://www.cs.toronto.edu/~kriz/cifar.html)"
            )
    parts = [_read_batch(here / file, key, classes) for file in train]
    x, y = (torch.cat(tensors) for tensors in zip(*parts))
    return (x, y, *_read_batch(here / test, key, classes))


def _read_batch(path: Path, key: bytes, classes: int) -> tuple[Tensor, Tensor]:
    """The images (n, 3, 32, 32) uint8 and labels (n,) int64 of one file."""
    import numpy as np

    try:
        with open(path, "rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
        pixels, labels = batch[b"data"], torch.tensor([int(label) for label in batch[key]], dtype=torch.int64, device="cpu")
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3072)):
            raise ValueError(f"{key.decode()}: {len(labels)}, but data is not a uint8 array of {len(labels)} × 3072")
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels are not one or more classes in [0, {classes})")
    # the bytes may raise anything; the caller gets one kind of error
    except Exception as error:
        raise ValueError(f"load_cifar: {path} is not a CIFAR batch file ({type(error).__name__}: {error})") from error
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), labels


class _Unpickler(pickle.Unpickler):
    """Loads numpy arrays and plain values. It refuses everything else that a pickle may name, such as os.system."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy as np

        core = getattr(np, "_core", None) or np.core  # numpy 2 renamed it
        allowed = {
            "numpy.ndarray": np.ndarray,
            "numpy.dtype": np.dtype,
            "numpy.core.multiarray._reconstruct": core.multiarray._reconstruct,
            "numpy.core.numeric._frombuffer": core.numeric._frombuffer,
            "_codecs.encode": _latin1_bytes,
        }
        asked = f"{module}.{name}"
        try:
            return allowed[asked.replace("numpy._core", "numpy.core")]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {asked}, which has no place in a CIFAR file") from None


def _latin1_bytes(text: str, encoding: str) -> bytes:
    # Python 3 writes bytes like this in the old pickle protocols; other codecs are refused
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")
