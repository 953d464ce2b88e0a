"""Data sets as tensors, long-tailed and step imbalance, label noise: every random choice follows from a seed.

Source --draw(seed)--> Split: images, labels to train on (some of them flipped), the true labels, a clean test set
"""

import math
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from .checkpoint import digest

DATASETS = ("digits", "digits-9-4", "cifar10", "cifar100")
IMBALANCES = ("lt", "step")
NOISES = ("symmetric", "uniform", "asymmetric", "background")

# Which class each CIFAR-10 class is mistaken for (Patrini et al. 2017): truck → automobile, bird → airplane,
# deer → horse, cat ↔ dog; the other five keep their label.
CIFAR10_MAPPING = (0, 1, 0, 5, 7, 3, 6, 7, 8, 1)

# One stream of random numbers for each kind of choice: changing the noise then leaves the split as it was.
SPLIT, NOISE, INIT, ORDER, METHOD = range(5)


def generator(seed, stream):
    """The random generator (CPU) of one `stream` (SPLIT, NOISE, INIT, ORDER, METHOD) under one seed."""
    return torch.Generator().manual_seed(1_000_003 * seed + stream)


def class_counts(n_max, n_classes, kind="lt", rho=100.0):
    """How many training samples each class keeps, largest class first.

        lt:    n_c = n_max · rho^(−c/(C−1))                  exponential decay from n_max to n_max/rho
        step:  n_max for the first half of the classes (the larger half when C is odd), n_max/rho for the others

    each rounded down and at least 1.

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
    if n_max < 1 or n_classes < 1:
        raise ValueError(f"class_counts: n_max and n_classes are at least 1, got {n_max} and {n_classes}")
    if kind not in IMBALANCES:
        raise ValueError(f"class_counts: unknown kind {kind!r}; use one of {', '.join(IMBALANCES)}")
    if not (math.isfinite(rho) and rho >= 1):
        raise ValueError(f"class_counts: rho (largest over smallest class) is a finite number ≥ 1, got {rho}")
    if kind == "lt":
        shares = [rho ** (-c / max(n_classes - 1, 1)) for c in range(n_classes)]
    else:
        head = (n_classes + 1) // 2
        shares = [1.0] * head + [1 / rho] * (n_classes - head)
    # The factor keeps an exact whole number, such as 1000 · 1000^(−1/3) = 100, from being rounded down to 99.
    return [max(1, math.floor(n_max * share * (1 + 1e-12))) for share in shares]


def add_noise(labels, kind, rate, n_classes, seed, *, mapping=None, background=0):
    """A copy of the labels in which each one is flipped with probability `rate`, independently.

        symmetric, uniform   two names for one thing: to one of the C − 1 other classes, all equally likely
        asymmetric           to mapping[c]; by default to the next class, (c + 1) mod C
        background           to the class `background`, whose own samples keep their label

    So symmetric noise never flips a label to itself: `rate` is the share of wrong labels. (Some papers draw from all C
    classes, which leaves rate/C of the labels right by chance.)

    Args:
        labels: (N,) integers in [0, n_classes), any integer dtype. Not modified.
        kind: "symmetric", "uniform", "asymmetric" or "background".
        rate: flip probability in [0, 1).
        n_classes: C, at least 2.
        seed: int; the same seed flips the same samples to the same classes.
        mapping: for asymmetric noise, C class indices: what each class is mistaken for. A class mapped to itself is
            never flipped. `CIFAR10_MAPPING` is the one usual for CIFAR-10.
        background: for background noise, the class that labels flip to.

    Returns:
        (N,) tensor of the labels' dtype, on their device.

    Raises:
        ValueError: unknown kind, rate outside [0, 1), fewer than 2 classes, a label, mapping or background class out of
            range, labels that are not a vector of integers.

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
    labels = torch.as_tensor(labels)
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
    flips = torch.rand(len(old), generator=random, dtype=torch.float64) < rate
    if kind in ("symmetric", "uniform"):
        # adding 1 … C−1 modulo C reaches every class but the sample's own
        new = (old + torch.randint(1, n_classes, (len(old),), generator=random)) % n_classes
    elif kind == "asymmetric":
        mapping = [(c + 1) % n_classes for c in range(n_classes)] if mapping is None else list(mapping)
        if len(mapping) != n_classes or not all(0 <= c < n_classes for c in mapping):
            raise ValueError(f"add_noise: mapping has {n_classes} classes in [0, {n_classes}), got {mapping}")
        new = torch.tensor(mapping)[old]
    else:
        if not 0 <= background < n_classes:
            raise ValueError(f"add_noise: background is a class in [0, {n_classes}), got {background}")
        new = torch.full_like(old, background)
    return torch.where(flips, new, old).to(labels)


# ------------------------------------------------------------------------------------------------ data sets


@dataclass(frozen=True)
class Source:
    """A data set before any seed is drawn. Without a test part of its own, draw() holds test samples back.

    Images are (N, channels, height, width): uint8 0…255, or float as the model is to see them.
    """

    name: str
    classes: int
    images: torch.Tensor
    labels: torch.Tensor  # (N,) int64
    test: tuple | None  # (images, labels), or None
    n_max: int  # training samples of a full class
    n_test: int = 0  # test samples held back per class where test is None
    mapping: tuple | None = None  # of asymmetric noise; None = the next class
    augment: bool = False  # random crops and mirror images while training

    @property
    def shape(self):
        """(channels, height, width) of an image."""
        return tuple(self.images.shape[1:])

    @property
    def fingerprint(self):
        """Its name, size and digest in a line: equal for equal images and labels only. Half a second for CIFAR."""
        parts = {"images": self.images, "labels": self.labels}
        parts |= dict(zip(("test images", "test labels"), self.test or ()))
        size = "×".join(map(str, self.shape))
        return f"{self.name}, {len(self.labels)} labels, images of {size}, sha256 {digest(parts)[:16]}"


@dataclass(frozen=True)
class Split:
    """What one seed makes of a Source; every method of that seed trains on the very same one.

    x, x_test: float32 (N, channels, height, width), (N_test, …); y: the labels to train on, some wrong under noise;
    y_true: the right ones; y_test: clean. Labels are int64 (N,), (N_test,).
    """

    x: torch.Tensor
    y: torch.Tensor
    y_true: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def load_source(name, data_root=None):
    """The data set "digits" (scikit-learn's), "digits-9-4", "cifar10" or "cifar100" (from `data_root`, see load_cifar).

    digits-9-4 has the nines as class 0 and the fours as class 1, so that under imbalance the nines dominate, as in the L2RW paper
    (Sec. 4.1).

    Raises:
        ValueError: unknown name; CIFAR without data_root, or files that do not hold it.
        FileNotFoundError: no CIFAR files under data_root.
        ImportError: digits without scikit-learn.
    """
    if name in ("digits", "digits-9-4"):
        from sklearn.datasets import load_digits  # costs a second to import: only when asked for

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
            raise ValueError(f"{name} is read from your disk: say with --data-root where its python files are")
        x, y, x_test, y_test = load_cifar(data_root, name)
        classes = 10 if name == "cifar10" else 100
        n_max = int(torch.bincount(y, minlength=classes).min())
        if n_max == 0:
            raise ValueError(f"{name} under {data_root}: a class has no training images")
        mapping = CIFAR10_MAPPING if name == "cifar10" else None
        return Source(name, classes, x, y, (x_test, y_test), n_max, mapping=mapping, augment=True)
    raise ValueError(f"unknown data set {name!r}; use one of {', '.join(DATASETS)}")


def draw(source, seed, *, imbalance="none", rho=100.0, noise="none", rate=0.0):
    """Draws the split of one seed: which samples train and test, how many of each class, which labels are wrong.

    Images stored as bytes are standardised per channel with the training part's mean and standard deviation, others
    are taken as they are. Imbalance comes before noise, and the test part gets neither.

    Raises:
        ValueError: as class_counts and add_noise.
    """
    keep = [source.n_max] * source.classes
    if imbalance != "none":
        keep = class_counts(source.n_max, source.classes, imbalance, rho)
    random = generator(seed, SPLIT)
    train, held_back = [], []
    for c, count in enumerate(keep):
        members = torch.nonzero(source.labels == c).flatten()
        members = members[torch.randperm(len(members), generator=random)]
        train.append(members[:count])
        # the test samples stand behind the full class's place, so an imbalance does not change them
        held_back.append(members[source.n_max : source.n_max + source.n_test])
    train = torch.cat(train)
    if source.test is None:
        held_back = torch.cat(held_back)
        x_test, y_test = source.images[held_back], source.labels[held_back]
    else:
        x_test, y_test = source.test
    x, y_true = source.images[train], source.labels[train]
    y = y_true if noise == "none" else add_noise(y_true, noise, rate, source.classes, seed, mapping=source.mapping)
    if x.dtype == torch.uint8:
        x, x_test = _standardise(x, x_test)
    return Split(x, y, y_true, x_test, y_test)


def clean_part(split, per_class):
    """(images, right labels) of the first `per_class` training samples of each class, or of as many as there are: what somebody
    has looked through. They are drawn from the training set and stay in it (L2RW paper, Sec. 3.1 and 4.1), with the labels
    they have there."""
    classes = range(int(split.y_true.max()) + 1)
    kept = torch.cat([torch.nonzero(split.y_true == c).flatten()[:per_class] for c in classes])
    return split.x[kept], split.y_true[kept]


def _standardise(x, x_test):
    # (B, channels, H, W) uint8 → float, with mean 0 and standard deviation 1 per channel over the training part
    x, x_test = x.float(), x_test.float()
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    return (x - mean) / std, (x_test - mean) / std


def augment(x, random):
    """Each image of the batch (B, C, H, W) shifted by up to 4 pixels and, half of the time, mirrored (He et al. 2016)."""
    n, channels, height, width = x.shape
    shift = torch.randint(0, 9, (2, n, 1), generator=random)
    rows, columns = shift[0] + torch.arange(height), shift[1] + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=random) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    image, channel = torch.arange(n).view(n, 1, 1, 1), torch.arange(channels).view(1, channels, 1, 1)
    return padded[image, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


# ------------------------------------------------------------------------------------------------ CIFAR

_CIFAR = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels", 10),
    "cifar100": ("cifar-100-python", ["train"], "test", b"fine_labels", 100),
}


def load_cifar(root, name):
    """CIFAR-10 or CIFAR-100 from the python files that https://www.cs.toronto.edu/~kriz/cifar.html distributes.

    The files are pickles, which can run any code when loaded; here only what makes up a dict of bytes, numbers and
    numpy arrays is let through.

    Args:
        root: the unpacked folder (cifar-10-batches-py or cifar-100-python), or the one it lies in.
        name: "cifar10" or "cifar100".

    Returns:
        (x_train, y_train, x_test, y_test): images uint8 (N, 3, 32, 32) with values 0…255, labels int64 (N,)
        (CIFAR-100: the 100 fine classes).

    Raises:
        ValueError: unknown name; a file that does not hold what it should (its name is in the message).
        FileNotFoundError: a file is missing.

    Example:
        >>> from absgd_fast.experiments.data import load_cifar
        >>> x, y, x_test, y_test = load_cifar("/data", "cifar10")  # doctest: +SKIP

    Source: Krizhevsky 2009.
    """
    if name not in _CIFAR:
        raise ValueError(f"load_cifar: unknown data set {name!r}; use cifar10 or cifar100")
    folder, train, test, key, classes = _CIFAR[name]
    root = Path(root)
    if (root / folder).is_dir():
        root = root / folder
    for file in (*train, test):
        if not (root / file).is_file():
            raise FileNotFoundError(
                f"load_cifar: no file {file!r} in {root}; unpack {name}'s python version there (folder {folder}, "
                "from https://www.cs.toronto.edu/~kriz/cifar.html)"
            )
    parts = [_read_batch(root / file, key, classes) for file in train]
    x, y = (torch.cat(tensors) for tensors in zip(*parts))
    return (x, y, *_read_batch(root / test, key, classes))


def _read_batch(path, key, classes):
    """One file → (n, 3, 32, 32) uint8, (n,) int64."""
    import numpy as np

    try:
        with open(path, "rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
        pixels, labels = batch[b"data"], torch.tensor([int(label) for label in batch[key]], dtype=torch.int64)
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3072)):
            raise ValueError(f"{key.decode()}: {len(labels)}, but data is not a uint8 array of {len(labels)} × 3072")
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels are not one or more classes in [0, {classes})")
    # whatever bytes stand in the file, the caller gets one kind of error
    except Exception as error:
        raise ValueError(f"load_cifar: {path} is not a CIFAR batch file ({type(error).__name__}: {error})") from error
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), labels


class _Unpickler(pickle.Unpickler):
    """Only numpy arrays and plain values: anything else a pickle names, such as os.system, is refused."""

    def find_class(self, module, name):
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


def _latin1_bytes(text, encoding):
    # how Python 3 writes bytes in the old pickle protocols; no other codec is let through
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"it asks for the codec {encoding!r}")
    return text.encode("latin1")
