"""MNIST, Fashion-MNIST and KMNIST from the idx files that are on this machine. Nothing is downloaded.

An idx file has a big-endian header and then one byte for each value: two zero bytes, the type of the values (8 = unsigned byte),
the number of dimensions, and the size of each dimension. It holds no code.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import math
import os
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from .. import _backend
from .choices import check_choice

CLASSES, SIDE = 10, 28  # of all three data sets; their images are SIDE × SIDE

# name: how to get its files
GET = {
    "mnist": "get them from https://yann.lecun.com/exdb/mnist",
    "fashion-mnist": "`apt install dataset-fashion-mnist` (Debian, Ubuntu) puts them where they are found without --data-root, "
    "or get them from https://github.com/zalandoresearch/fashion-mnist",
    "kmnist": "get them from https://codh.rois.ac.jp/kmnist",
}
DATASETS = tuple(GET)

# The object id that git gives to each unpacked file, in the order of _FILES: `gzip -dc FILE.gz | git hash-object --stdin`.
# How a file is packed does not change it.
DIGESTS = {
    "mnist": (
        "bbce27659e0fc2b7ed2a64c127849380a477099b",
        "d6b4c5db3b52063d543fb397aede09aba0dc5234",
        "1170b2cae98de7a524b163fcc379ac8f00925b12",
        "d1c3a970612bbd2df47a3c0697f82bd394abc450",
    ),
    "fashion-mnist": (
        "ff2f5a96367a3c1656f09c93649f07143ff8b11e",
        "30424ca2ea876655f5bba14f9f07132769687975",
        "37bac79bc6f002d965f363e0b20514904504a4d9",
        "2195a4d0957e013db98d03e51697e2315816cce2",
    ),
    "kmnist": (
        "3cf037df1ccd08cf71c7e9465ca6bc729e79a251",
        "180cd088d65c3b75d97d046ad75476d1176666e0",
        "1adcabe5a6e822ca4ae03c51ca387e9ca736ad11",
        "6e9269c40e2642f2ac5bda1536e4a56c582e5be1",
    ),
}

_IN_TORCHVISION = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "kmnist": "KMNIST/raw"}
_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_NAMES = f"{', '.join(_FILES)}; each may end in .gz"
_DEFLATE = 1032  # the most bytes that one byte of a gzip file can stand for


def load_idx(root: str | os.PathLike[str] | None, name: str, digests: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loads one of the three data sets.

    Its files are train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte. Each may
    end in .gz, and may have a dot instead of the hyphen before idx.

    Args:
        root: the folder of the files, or the folder that contains it under the data set's name or torchvision's
            (FashionMNIST/raw). None looks into the folder datasets/NAME of the system's shared data: XDG_DATA_HOME,
            XDG_DATA_DIRS, /usr/local/share, /usr/share and share of the Python installation.
        name: "mnist", "fashion-mnist" or "kmnist".
        digests: refuse files that do not hold what the distributed ones hold (DIGESTS).

    Returns:
        (x_train, y_train, x_test, y_test): images uint8 (N, 1, 28, 28) with values 0…255, labels int64 (N,).

    Raises:
        ValueError: an unknown name, a file that does not hold what its name says, images and labels that do not belong together,
            or a file of another digest (the message names the files).
        FileNotFoundError: a file is missing. The message says how to get it.

    Example:
        >>> from absgd_fast.experiments.idx import load_idx
        >>> x, y, x_test, y_test = load_idx("/data/fashion-mnist", "fashion-mnist")  # doctest: +SKIP

    Source: the format is described at https://yann.lecun.com/exdb/mnist.
    """
    check_choice("data set", name, DATASETS)
    files = [_find(_folder(root, name), file, name) for file in _FILES]
    x, y, x_test, y_test = (*_read_pair(*files[:2]), *_read_pair(*files[2:]))
    if digests:
        for path, values, known in zip(files, (x[:, 0], y.byte(), x_test[:, 0], y_test.byte()), DIGESTS[name]):
            check_digest(path, digest(values), known, "git hash-object", GET[name])
    return x, y, x_test, y_test


def digest(values: Tensor) -> str:
    """The object id that git gives to the idx file of these values: the sha1 of "blob SIZE", a zero byte, and the file.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.idx import digest
        >>> digest(torch.tensor([7, 2, 1], dtype=torch.uint8))
        '5adae06ba6bb492e9bd9e7e10d4accd3f29cda6c'
    """
    head = bytes((0, 0, 8, values.dim())) + struct.pack(f">{values.dim()}I", *values.shape)
    sha = hashlib.sha1(f"blob {len(head) + values.numel()}\0".encode() + head, usedforsecurity=False)
    sha.update(values.contiguous().view(-1).numpy().data)
    return sha.hexdigest()


def check_digest(path: Path, found: str, expected: str, kind: str, get: str) -> None:
    """Raises ValueError if the digest of a file is not the known one. get: how to get the right file."""
    if found != expected:
        raise ValueError(
            f"{path} is not the file that is distributed ({kind} {found}, expected {expected}): {get}, or take it all the same "
            "with --no-digests (digests=False)"
        )


def read_idx(path: str | os.PathLike[str], dimensions: int) -> Tensor:
    """Reads an idx file of unsigned bytes, plain or with gzip (a name that ends in .gz).

    Args:
        path: the file.
        dimensions: how many its values must have: 3 for images, 1 for labels.

    Returns:
        A uint8 tensor of the sizes in its header.

    Raises:
        ValueError: it is not such a file, or is cut short, damaged or too long. The message names it.
        OSError: it cannot be read.
    """
    with _named(path), open(path, "rb") as raw:
        zipped = os.fspath(path).endswith(".gz")
        file: IO[bytes] = gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[assignment]  # it has all that is used
        magic = file.read(4)
        expected = bytes((0, 0, 8, dimensions))
        if magic != expected:
            begins = f"begins with the bytes {magic.hex(' ')}" if magic else "is empty"
            kind = f"unsigned bytes in {dimensions} dimension{'s' * (dimensions > 1)}"
            raise ValueError(f"it {begins}, expected {expected.hex(' ')} ({kind})")
        header = file.read(4 * dimensions)
        if len(header) < 4 * dimensions:
            raise ValueError(f"it ends inside its header of {4 + 4 * dimensions} bytes")
        sizes = struct.unpack(f">{dimensions}I", header)
        said, size = math.prod(sizes), os.fstat(raw.fileno()).st_size
        # before so much memory is asked for
        if said > size * (_DEFLATE if zipped else 1):
            raise ValueError(f"it has {size} bytes, which cannot hold the {_times(sizes)} = {said} values of its header")
        values = torch.empty(sizes, dtype=torch.uint8, device="cpu")
        found = _fill(file, values)
        if found != said or file.read(1):
            more = "more" if found == said else f"{found}"
            raise ValueError(f"it holds {more} values, expected the {_times(sizes)} = {said} of its header")
        return values


@contextlib.contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file in whatever goes wrong with its content."""
    try:
        yield
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile, RuntimeError) as error:  # torch's, for sizes that it refuses
        raise ValueError(f"{os.fspath(path)} is not the idx file that is expected: {error}") from error


def _fill(file: IO[bytes], values: Tensor) -> int:
    """Reads bytes of the file into the tensor until one of them ends, a mebibyte at a time. Returns how many."""
    free, found = values.view(-1).numpy().data, 0
    while found < len(free) and (count := file.readinto(free[found : found + (1 << 20)])):  # type: ignore[attr-defined]
        found += count
    return found


def _times(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))


def _read_pair(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """The images (N, 1, 28, 28) uint8 and labels (N,) int64 of two files that belong together."""
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if len(x) == 0 or x.shape[1:] != (SIDE, SIDE):
        raise ValueError(f"{images}: got {_times(x.shape)} values, expected one or more images of {SIDE} × {SIDE}")
    if len(x) != len(y):
        raise ValueError(f"{images} has {len(x)} images and {labels} has {len(y)} labels; expected as many of both")
    if (largest := int(y.max())) >= CLASSES:
        raise ValueError(f"{labels}: got the label {largest}, expected labels in [0, {CLASSES})")
    return x.unsqueeze_(1), y.long()


# ------------------------------------------------------------------------------------------------ where the files are


def _folder(root: str | os.PathLike[str] | None, name: str) -> Path:
    """The folder of a data set's files."""
    if root is not None:
        here = Path(root)
        folders = [here, here / name, here / _IN_TORCHVISION[name]]
        where = f"in {here}"
    else:
        shared = list(dict.fromkeys((*_backend.data_folders(), Path(sys.prefix, "share"))))
        folders = [folder / "datasets" / name for folder in shared]
        where = f"in {', '.join(map(str, folders))}, and no --data-root was given"
    found = next(
        (folder for folder in folders if any(path.is_file() for file in _FILES for path in _spellings(folder, file))), None
    )
    if found is None:
        raise FileNotFoundError(f"load_idx: no files of {name} {where}: {GET[name]} ({_NAMES})")
    return found


def _find(folder: Path, file: str, name: str) -> Path:
    found = next((path for path in _spellings(folder, file) if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"load_idx: no file {file} or {file}.gz in {folder}; {name} has four files ({_NAMES})")
    return found


def _spellings(folder: Path, file: str) -> list[Path]:
    """The names that a file may have."""
    return [folder / (spelling + end) for spelling in (file, file.replace("-idx", ".idx")) for end in ("", ".gz")]
