"""CIFAR-10 and CIFAR-100 from the python files that are on this machine. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .idx import check_digest

# name: folder, training files, test file, key of the labels, classes
FILES = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", b"labels", 10),
    "cifar100": ("cifar-100-python", ["train"], "test", b"fine_labels", 100),
}
COARSE = b"coarse_labels"  # the key of CIFAR-100's superclasses

# The md5 of the files, as torchvision knows them too.
DIGESTS = {
    "cifar10": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    },
    "cifar100": {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
}


def load_cifar(root: str | os.PathLike[str], name: str, digests: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loads CIFAR-10 or CIFAR-100 from the python files of https://www.cs.toronto.edu/~kriz/cifar.html.

    The files are pickles. A pickle can run any code when it is loaded, so this loader accepts only a dict of bytes, numbers and
    numpy arrays, and refuses everything else.

    Args:
        root: the unpacked folder (cifar-10-batches-py or cifar-100-python), or the folder that contains it.
        name: "cifar10" or "cifar100".
        digests: refuse files whose md5 is not that of the distributed ones (DIGESTS).

    Returns:
        (x_train, y_train, x_test, y_test): images uint8 (N, 3, 32, 32) with values 0…255, labels int64 (N,)
        (CIFAR-100: the 100 fine classes).

    Raises:
        ValueError: an unknown name, a file of another md5, or a file that is not a CIFAR batch (the message names it).
        FileNotFoundError: a file is missing.

    Example:
        >>> from absgd_fast.experiments.cifar import load_cifar
        >>> x, y, x_test, y_test = load_cifar("/data", "cifar10")  # doctest: +SKIP

    Source: Krizhevsky 2009.
    """
    return load_with_superclasses(root, name, digests)[:4]


def load_with_superclasses(
    root: str | os.PathLike[str], name: str, digests: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | str]:
    """As load_cifar, and the superclass of each training image.

    Returns:
        (x_train, y_train, x_test, y_test, superclasses). The last one is (N,) int64, or a line that says which file has none.
    """
    if name not in FILES:
        raise ValueError(f"load_cifar: unknown data set {name!r}; use cifar10 or cifar100")
    folder, train, test, key, classes = FILES[name]
    here = Path(root)
    if (here / folder).is_dir():
        here = here / folder
    for file in (*train, test):
        if not (here / file).is_file():
            raise FileNotFoundError(f"load_cifar: no file {file!r} in {here}; {_get(name)}")
    x, y, coarse = zip(*(_read_batch(here / file, key, classes, name if digests else None) for file in (*train, test)))
    lacking = next((here / file for file, found in zip(train, coarse) if found is None), None)
    superclasses = torch.cat(coarse[:-1]) if lacking is None else f"{lacking} has no {COARSE.decode()}; {_get(name)}"
    return torch.cat(x[:-1]), torch.cat(y[:-1]), x[-1], y[-1], superclasses


def superclass_mapping(fine: Tensor, coarse: Tensor, classes: int) -> tuple[int, ...]:
    """The class that each class is mistaken for under asymmetric noise: the next one of its superclass, in a circle.

    Args:
        fine: (N,) classes.
        coarse: (N,) superclasses of the same samples.
        classes: their number. A class without samples is mapped to itself.

    Returns:
        a tuple of `classes` class indices.

    Raises:
        ValueError: a class lies in more than one superclass.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.cifar import superclass_mapping
        >>> superclass_mapping(torch.tensor([0, 1, 2, 3, 4]), torch.tensor([7, 5, 7, 5, 7]), 5)
        (2, 3, 4, 1, 0)

    Source: Patrini et al. 2017, Sec. 5.2 (CIFAR-100).
    """
    pairs = sorted(set(zip(coarse.tolist(), fine.tolist())))
    if len({fine_class for _, fine_class in pairs}) < len(pairs):
        raise ValueError("a class lies in more than one superclass")
    members: dict[int, list[int]] = {}
    for superclass, fine_class in pairs:
        members.setdefault(superclass, []).append(fine_class)
    mapping = list(range(classes))
    for ring in members.values():
        for one, following in zip(ring, ring[1:] + ring[:1]):
            mapping[one] = following
    return tuple(mapping)


def _get(name: str) -> str:
    """How to get the files."""
    return f"unpack {name}'s python version there (folder {FILES[name][0]}, from https://www.cs.toronto.edu/~kriz/cifar.html)"


def _read_batch(path: Path, key: bytes, classes: int, known: str | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The images (n, 3, 32, 32) uint8, labels and superclasses (n,) int64 of a file. known: the data set, to compare the md5."""
    import numpy as np

    content = path.read_bytes()
    if known:
        check_digest(path, hashlib.md5(content, usedforsecurity=False).hexdigest(), DIGESTS[known][path.name], "md5", _get(known))
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        pixels, labels, coarse = batch[b"data"], _integers(batch[key]), batch.get(COARSE)
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3072)):
            raise ValueError(f"{key.decode()}: {len(labels)}, but data is not a uint8 array of {len(labels)} × 3072")
        if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels are not one or more classes in [0, {classes})")
        superclasses = None if coarse is None else _integers(coarse)
        if superclasses is not None and len(superclasses) != len(labels):
            raise ValueError(f"{COARSE.decode()}: {len(superclasses)}, but {len(labels)} labels")
    # the bytes may raise anything; the caller gets one kind of error
    except Exception as error:
        raise ValueError(f"load_cifar: {path} is not a CIFAR batch file ({type(error).__name__}: {error})") from error
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), labels, superclasses


def _integers(labels: Sequence[Any]) -> Tensor:
    return torch.tensor([int(label) for label in labels], dtype=torch.int64, device="cpu")


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
