"""Folders of images: ROOT/train/CLASS/… and ROOT/val/CLASS/…, or index files with a path and a label in each line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .choices import check_choice
from .images import Lazy

ENDINGS = (".jpg", ".jpeg", ".png")
_OLTR = "the two index files from https://github.com/zhmiao/OpenLongTailRecognition-OLTR"
# name: the index files that it must have, and how to get it. "folder" takes what it finds.
INDEXED = {
    "imagenet-lt": (
        ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),
        f"get ImageNet's images from https://image-net.org and {_OLTR}",
    ),
    "places-lt": (
        ("Places_LT_train.txt", "Places_LT_test.txt"),
        f"get the images from http://places2.csail.mit.edu and {_OLTR}",
    ),
    "inaturalist2018": (
        ("iNaturalist18_train.txt", "iNaturalist18_val.txt"),
        "get images and index files as https://github.com/facebookresearch/classifier-balancing says",
    ),
}
DATASETS = ("folder", *INDEXED)
TESTS = ("val", "test")  # the folder or the index file of the test images; the first one that is there

Samples = tuple[list[str], list[int]]  # paths from the root, and labels
Parts = tuple[Lazy, Tensor, Lazy, Tensor, tuple[str, ...]]


def load_folder(root: str | os.PathLike[str], name: str = "folder", size: int = 224) -> Parts:
    """Finds the images of a folder and their labels. It reads no image.

    "folder" takes the first of these that is there:

        root is a file            an index file with "train" in its name; beside it lies one with "val" or "test" in its place
        ROOT/train.txt            and ROOT/val.txt or ROOT/test.txt, index files
        ROOT/train/CLASS/…        and ROOT/val/CLASS/… or ROOT/test/CLASS/…, .jpg, .jpeg and .png files at any depth

    The other names take the index files of the same name in ROOT. A line of an index file is "PATH LABEL", with a path from the
    folder of the file and a class 0 … C−1. Without index files the classes are the folders in the order of their names.

    Args:
        root: ROOT, or an index file.
        name: "folder", "imagenet-lt", "places-lt" or "inaturalist2018".
        size: height and width to which an image is brought when it is read, pixels.

    Returns:
        (x_train, y_train, x_test, y_test, class names): images as Lazy, labels int64 (N,). The classes of an index file are named
        by their folders where each class has one of its own, otherwise by their numbers.

    Raises:
        ValueError: an unknown name, no images, a class that only one of the two sets has, or a malformed line (with its number).
        FileNotFoundError: a folder or an index file is missing.
        ImportError: Pillow is not installed.

    Example:
        >>> from absgd_fast.experiments.folder import load_folder
        >>> x, y, x_test, y_test, names = load_folder("/data/flowers")  # doctest: +SKIP

    Source: Liu et al. 2019, "Large-Scale Long-Tailed Recognition in an Open World" (ImageNet-LT, Places-LT).
    """
    check_choice("data set", name, DATASETS)
    try:
        import PIL  # noqa: F401 (said here, and not when the first image is read)
    except ImportError:
        raise ImportError(f"{name} needs Pillow, which is not installed: pip install pillow") from None
    here = Path(root)
    indices = _indices(here, name)
    if indices:
        here = indices[0].parent
        train, test = map(_of_index, indices)
        _every_class(train[1], test[1], *indices)
        names = _names(*train)
    else:
        folders = _folders(here)
        classes = [_classes(folder) for folder in folders]
        names = tuple(classes[0])
        _same(classes[0], classes[1], *folders)
        train, test = (_of_folder(here, folder, names) for folder in folders)
    labels = [torch.tensor(one[1], dtype=torch.int64, device="cpu") for one in (train, test)]
    return Lazy(here, train[0], size), labels[0], Lazy(here, test[0], size), labels[1], names


# ------------------------------------------------------------------------------------------------ index files


def _indices(here: Path, name: str) -> tuple[Path, Path] | None:
    """The two index files; None if the folder has none and needs none."""
    if name in INDEXED:
        files, get = INDEXED[name]
        train, test = (here / file for file in files)
        for path in (train, test):
            if not path.is_file():
                raise FileNotFoundError(f"{name}: no file {path.name} in {here}: {get}; its paths start at {here}")
        return train, test
    if here.is_file():
        if "train" not in here.name:
            raise ValueError(f"folder: got the file {here}, expected a folder, or an index file with 'train' in its name")
        train, tests = here, [here.with_name(here.name.replace("train", test)) for test in TESTS]
    elif (here / "train.txt").is_file():
        train, tests = here / "train.txt", [here / f"{test}.txt" for test in TESTS]
    else:
        return None
    found = [path for path in tests if path.is_file()]
    if not found:
        raise FileNotFoundError(f"folder: {train} has no {' or '.join(path.name for path in tests)} beside it; put one there")
    return train, found[0]


def _of_index(path: Path) -> Samples:
    """The samples of an index file."""
    files, labels = [], []
    with open(path, encoding="utf-8", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            file, *label = line.rsplit(None, 1)
            if not (label and label[0].isascii() and label[0].isdigit()) or os.path.isabs(file):
                raise ValueError(f"{path}:{number}: got {line.strip()!r}, expected a path from {path.parent} and a class 0, 1, …")
            files.append(file.lstrip())
            labels.append(int(label[0]))
    if not files:
        raise ValueError(f"{path} has no lines, expected a path and a class in each")
    return files, labels


def _every_class(train: list[int], test: list[int], *indices: Path) -> None:
    """Raises ValueError if one of the classes from 0 to the largest label is missing in a file."""
    known = (set(train), set(test))
    largest = max(known[0] | known[1])
    for found, index in zip(known, indices):
        if len(found) <= largest:
            missing = next(c for c in range(largest + 1) if c not in found)
            raise ValueError(f"{index} has no image of class {missing}, expected some of every class 0 … {largest} in both files")


def _names(files: list[str], labels: list[int]) -> tuple[str, ...]:
    """The names of the classes of an index file: those of their folders if each class has its own, otherwise their numbers."""
    folders: list[set[str]] = [set() for _ in range(max(labels) + 1)]
    for file, label in zip(files, labels):
        folders[label].add(Path(file).parent.name)
    own = [folder for one in folders if len(one) == 1 for folder in one if folder]
    return tuple(own if len(set(own)) == len(folders) else map(str, range(len(folders))))


# ------------------------------------------------------------------------------------------------ folders


def _folders(here: Path) -> tuple[Path, Path]:
    train, tests = here / "train", [here / test for test in TESTS]
    test = next((path for path in tests if path.is_dir()), None)
    if not train.is_dir() or test is None:
        found = "" if here.is_dir() else ", which is no folder"
        raise FileNotFoundError(
            f"folder: {here}{found}: expected the folders train and {' or '.join(TESTS)} with a folder for each class, or the "
            f"index files train.txt and {' or '.join(f'{test}.txt' for test in TESTS)}; give their folder with --data-root"
        )
    return train, test


def _classes(folder: Path) -> list[str]:
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(f"{folder} has no folders, expected one for each class, with its images")
    return found


def _same(train: list[str], test: list[str], *folders: Path) -> None:
    for one, other, (has, lacks) in ((train, test, folders), (test, train, folders[::-1])):
        if missing := sorted(set(one) - set(other)):
            raise ValueError(f"{has} has the class {missing[0]!r} and {lacks} does not; both need a folder for every class")


def _of_folder(root: Path, folder: Path, names: tuple[str, ...]) -> Samples:
    files, labels = [], []
    for label, name in enumerate(names):
        found = sorted(_images(folder / name))
        if not found:
            raise ValueError(f"{folder / name} has no images, expected one or more files that end in {', '.join(ENDINGS)}")
        files += [os.path.relpath(path, root) for path in found]
        labels += [label] * len(found)
    return files, labels


def _images(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(place, file) for file in files if _is_image(file))


def _is_image(file: str) -> bool:
    return file.lower().endswith(ENDINGS) and not file.startswith(".")  # some systems put ._cat.jpg beside cat.jpg
