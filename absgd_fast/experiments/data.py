"""Data sets with long-tailed or step imbalance and label noise. A seed determines every random choice.

load_source() returns a Source, the whole data set. draw(source, seed) returns a Split: training images, the labels to train on
(some of them flipped), their true labels, and a clean test set.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index

import torch
from torch import Tensor

from . import cifar, folder, idx
from .augment import crop_flip as augment  # noqa: F401 (the imports that are not used here are used by others)
from .checkpoint import digest
from .choices import unknown
from .cifar import load_cifar  # noqa: F401
from .images import Images, Lazy, as_tensor
from .noise import (  # noqa: F401
    CIFAR10_MAPPING,
    FASHION_MNIST_MAPPING,
    IMBALANCES,
    MAPPINGS,
    MNIST_MAPPING,
    NOISES,
    add_noise,
    class_counts,
)
from .streams import INIT, METHOD, MIXUP, NOISE, ORDER, SPLIT, generator  # noqa: F401

# name: (channels, height, width) of its images; those of a folder have the size that they are read with
SHAPES = {"digits": (1, 8, 8), "digits-9-4": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
SHAPES |= dict.fromkeys((*idx.DATASETS, "mnist-9-4"), (1, idx.SIDE, idx.SIDE))
DATASETS = (*SHAPES, *folder.DATASETS)

# The names of the classes, where they say more than their numbers.
CLASS_NAMES = {
    "digits-9-4": ("9", "4"),
    "mnist-9-4": ("9", "4"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "fashion-mnist": (
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
}


@dataclass(frozen=True)
class Source:
    """A whole data set, before a seed chooses samples from it. If it has no test set, draw() holds test samples back.

    Images are (N, channels, height, width): uint8 0…255, floats that go into the model as they are, or files (images.Lazy).
    """

    name: str
    classes: int
    images: Images
    labels: Tensor  # (N,) int64
    test: tuple[Images, Tensor] | None  # (images, labels), or None
    n_max: int  # training samples of a class without imbalance
    n_test: int = 0  # test samples held back per class if test is None
    mapping: tuple[int, ...] | None = None  # of asymmetric noise; None = the next class
    augment: str = "none"  # how training changes the images at random, one of images.AUGMENTS
    class_names: tuple[str, ...] | None = None  # where CLASS_NAMES has none
    natural: bool = False  # whether it is imbalanced by itself: draw() takes all images unless it is asked for other numbers
    unmapped: str = ""  # why asymmetric noise is refused

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, height, width) of an image."""
        return tuple(self.images.shape[1:])

    @property
    def fingerprint(self) -> str:
        """Its name, size and digest in one line, equal only for equal images and labels. It takes half a second for CIFAR.

        Of images in files it has the paths and the sizes in bytes, and not the pixels.

        Raises:
            FileNotFoundError: an image file is missing.
        """
        size = "×".join(map(str, self.shape))
        return f"{self.name}, {len(self.labels)} labels, images of {size}, sha256 {self._digest()[:16]}"

    def _digest(self) -> str:
        sets = {"": (self.images, self.labels)} | ({"test ": self.test} if self.test else {})
        parts: dict[str, Tensor] = {}
        for name, (images, labels) in sets.items():
            if isinstance(images, Lazy):
                files = torch.frombuffer(bytearray.fromhex(images.digest(labels)), dtype=torch.uint8)
                parts |= {f"{name}files": files}
            else:
                parts |= {f"{name}images": images, f"{name}labels": labels}
        return digest(parts)

    def class_name(self, label: int) -> str:
        """The name of a class; its number if it has none."""
        names = self.class_names or CLASS_NAMES.get(self.name)
        return names[label] if names else str(label)


@dataclass(frozen=True)
class Split:
    """The training and test set that draw() makes of a Source for one seed. All methods of this seed train on the same Split."""

    x: Images  # (N, channels, height, width) float32
    y: Tensor  # (N,) int64: the labels to train on; under noise some are wrong
    y_true: Tensor  # (N,) int64: the right labels
    x_test: Images  # (N_test, channels, height, width) float32
    y_test: Tensor  # (N_test,) int64, without noise

    def part(self, chosen: Tensor) -> tuple[Images, Tensor, Tensor]:
        """(x, y, y_true) of some training images. chosen: their indices."""
        return self.x[chosen], self.y[chosen], self.y_true[chosen]


def load_source(
    name: str, data_root: str | os.PathLike[str] | None = None, *, digests: bool = True, image_size: int = 224
) -> Source:
    """Loads a data set.

    Args:
        name: "digits" (scikit-learn's), "digits-9-4" (its nines as class 0 and its fours as class 1; under imbalance the nines
            dominate, as in the L2RW paper, Sec. 4.1), "cifar10", "cifar100", "mnist", "mnist-9-4" (as digits-9-4, with MNIST's
            own test images of the two), "fashion-mnist", "kmnist", or one of folder.DATASETS, images in files.
        data_root: the folder of the files (see load_cifar, idx.load_idx and folder.load_folder). digits needs none; idx files
            may be found without.
        digests: refuse files of CIFAR and of idx.DATASETS that do not hold what the distributed ones hold.
        image_size: height and width of the images of a folder, pixels.

    Raises:
        ValueError: an unknown name, CIFAR or a folder without data_root, or files that do not hold the data set.
        FileNotFoundError: the files are not there.
        ImportError: digits without scikit-learn, or a folder without Pillow.
    """
    if name in ("digits", "digits-9-4"):
        return _digits(name)
    if name in ("cifar10", "cifar100"):
        if data_root is None:
            raise ValueError(f"{name} is read from your disk: give the folder of its python files with --data-root")
        return _cifar(name, data_root, digests)
    if name == "mnist-9-4":
        every = idx.load_idx(data_root, "mnist", digests)
        return _of_files(name, 2, (*_nines_and_fours(*every[:2]), *_nines_and_fours(*every[2:])))
    if name in idx.DATASETS:
        return _of_files(name, idx.CLASSES, idx.load_idx(data_root, name, digests))
    if name in folder.DATASETS:
        if data_root is None:
            raise ValueError(f"{name} is read from your disk: give the folder of its images with --data-root")
        x, y, x_test, y_test, names = folder.load_folder(data_root, name, image_size)
        found = _of_files(name, len(names), (x, y, x_test, y_test))
        return replace(found, augment="crop-flip", class_names=names, natural=True)
    raise ValueError(unknown("data set", name, DATASETS))


def _digits(name: str) -> Source:
    from sklearn.datasets import load_digits  # here and not above, because this import takes a second

    bunch = load_digits()
    # 1797 images of 8×8 with grey values 0…16, at least 174 per class.
    images = torch.from_numpy(bunch.images).float().div_(16).unsqueeze_(1)
    labels = torch.from_numpy(bunch.target).long()
    if name == "digits":
        return Source(name, 10, images, labels, None, n_max=110, n_test=60)
    return Source(name, 2, *_nines_and_fours(images, labels), None, n_max=100, n_test=80)  # of 180 and 181 images


def _nines_and_fours(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The images of nines, as class 0, and of fours, as class 1."""
    kept = (labels == 9) | (labels == 4)
    return images[kept], (labels[kept] == 4).long()


def _cifar(name: str, data_root: str | os.PathLike[str], digests: bool) -> Source:
    classes = 10 if name == "cifar10" else 100
    x, y, x_test, y_test, superclasses = cifar.load_with_superclasses(data_root, name, digests)
    source = replace(_of_files(name, classes, (x, y, x_test, y_test)), augment="crop-flip")
    if source.mapping:
        return source
    if isinstance(superclasses, str):
        return replace(source, unmapped=superclasses)
    try:
        return replace(source, mapping=cifar.superclass_mapping(source.labels, superclasses, classes))
    except ValueError as error:
        return replace(source, unmapped=f"{data_root}: {error}")


def _of_files(name: str, classes: int, parts: tuple[Images, Tensor, Images, Tensor]) -> Source:
    """The Source of a data set that has a test set of its own."""
    x, y, x_test, y_test = parts
    counts = torch.bincount(y, minlength=classes).tolist()
    if 0 in counts:
        raise ValueError(f"{name}: class {counts.index(0)} has no training images; each class needs at least one")
    return Source(name, classes, x, y, (x_test, y_test), min(counts), mapping=MAPPINGS.get(name))


def draw(
    source: Source,
    seed: int,
    *,
    per_class: int | None = None,
    share: float = 1.0,
    imbalance: str = "none",
    rho: float = 100.0,
    noise: str = "none",
    rate: float = 0.0,
    background: int = 0,
) -> Split:
    """Draws the split of one seed: the samples for training and for testing, and the wrong labels.

    Imbalance is applied before noise. The test set gets neither. Images stored as bytes are standardised per channel with the
    mean and standard deviation of the training images; other images are taken as they are. Images in files are not read.

    Args:
        source: the data set.
        seed: determines all choices.
        per_class: the number of training images of each class before imbalance, at most source.n_max. None takes n_max, or all
            images of a source.natural without imbalance.
        share: the share of these images of each class that is kept, at least one of a class; only where all images are taken.
        imbalance: "none", or the kind of class_counts.
        rho: as for class_counts.
        noise: "none", or the kind of add_noise.
        rate, background: as for add_noise.

    Raises:
        ValueError: per_class is out of range, a class ends without a training image, asymmetric noise of a data set that does not
            say which classes are mistaken, or as class_counts and add_noise.
    """
    n_max = source.n_max if per_class is None else index(per_class)
    if not 1 <= n_max <= source.n_max:
        raise ValueError(f"draw: per_class of {source.name} is in [1, {source.n_max}], got {n_max}")
    if noise == "asymmetric" and source.unmapped:
        raise ValueError(f"asymmetric noise of {source.name} needs to know its superclasses: {source.unmapped}")
    keep: Sequence[int | None] = [n_max] * source.classes
    if source.natural and per_class is None:
        counts = torch.bincount(source.labels, minlength=source.classes).tolist()
        keep = [None if share == 1 else max(1, round(share * count)) for count in counts]
    if imbalance != "none":
        keep = class_counts(n_max, source.classes, imbalance, rho)
    train, held_back = _choose(source, keep, generator(seed, SPLIT))
    x_test, y_test = source.test or (source.images[held_back], source.labels[held_back])
    x, y_true, y = source.images[train], source.labels[train], source.labels[train]
    if noise != "none":
        y = add_noise(y_true, noise, rate, source.classes, seed, mapping=source.mapping, background=background)
    if isinstance(x, Tensor) and isinstance(x_test, Tensor) and x.dtype == torch.uint8:
        x, x_test = _standardise(x, x_test)
    return Split(x, y, y_true, x_test, y_test)


def _choose(source: Source, keep: Sequence[int | None], random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The indices of the training samples, and of those that are held back to test. keep: of each class, None for all of them."""
    train_of, test_of = [], []
    for c, count in enumerate(keep):
        members = torch.nonzero(source.labels == c).flatten()
        if not len(members):
            raise ValueError(f"draw: class {source.class_name(c)} of {source.name} has no training image; each class needs one")
        members = members[torch.randperm(len(members), generator=random, device="cpu")]
        train_of.append(members[:count])
        # the test samples begin after the place of a full class, so an imbalance does not change them
        test_of.append(members[source.n_max : source.n_max + source.n_test])
    return torch.cat(train_of), torch.cat(test_of)


def some_test_images(split: Split, count: int | None) -> Split:
    """The split with `count` of its test images, the same ones in every call. None, or more than there are, keeps all of them."""
    if count is None or count >= len(split.y_test):
        return split
    some = torch.randperm(len(split.y_test), generator=torch.Generator("cpu").manual_seed(0), device="cpu")[:count].sort().values
    return replace(split, x_test=split.x_test[some], y_test=split.y_test[some])


def clean_part(split: Split, per_class: int) -> tuple[Tensor, Tensor]:
    """The clean samples of L2RW: images and right labels of the first `per_class` training samples of each class.

    Smaller classes give all their samples. The samples also stay in the training set, with the labels that they have there (L2RW
    paper, Sec. 3.1 and 4.1).
    """
    classes = range(int(split.y_true.max()) + 1)
    kept = torch.cat([torch.nonzero(split.y_true == c).flatten()[:per_class] for c in classes])
    return as_tensor(split.x[kept]), split.y_true[kept]


def train_counts(split: Split, classes: int) -> list[int]:
    """The number of training samples of each class, by their right label.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.data import Split, train_counts
        >>> x, y = torch.zeros(3, 1, 8, 8), torch.tensor([0, 2, 2])
        >>> train_counts(Split(x, y, y, x, y), classes=4)
        [1, 0, 2, 0]
    """
    return torch.bincount(split.y_true, minlength=classes).tolist()


def _standardise(x: Tensor, x_test: Tensor) -> tuple[Tensor, Tensor]:
    """(N, channels, H, W) uint8 → float32. Over the training images each channel has mean 0 and standard deviation 1."""
    x, x_test = x.float(), x_test.float()
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    return x.sub_(mean).div_(std), x_test.sub_(mean).div_(std)  # both are copies
