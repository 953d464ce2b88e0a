"""Images as a training sees them: tensors, or files that are read when they are needed (Lazy).

batches(x, chosen, ...)      the images of each batch of an epoch, changed at random
whole(x, ...)                all images in parts, unchanged
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from . import augment as changes
from . import streams
from .choices import check_choice

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

AUGMENTS = ("none", "crop-flip", "randaugment")
# of ImageNet's training images with values in [0, 1]: red, green, blue
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AHEAD = 2  # batches that each process has ready before they are asked for


class Lazy:
    """Images in files, which are read when they are asked for. Indexing chooses images without reading them.

    An image is converted to RGB, cropped and resized to size × size, scaled to [0, 1], and normalised with ImageNet's mean and
    standard deviation.

    Args:
        root: the folder of the files.
        files: their paths from there.
        size: height and width of an image, pixels.
        index: (N,) int64, the images that are chosen from the files, in order. None chooses all.

    Raises:
        ValueError: size is less than 1.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.images import Lazy
        >>> x = Lazy("/data/train", ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"], size=64)
        >>> x[torch.tensor([2, 0])].names(), x.shape
        (['dog/1.jpg', 'cat/1.jpg'], (3, 3, 64, 64))
    """

    dtype = torch.float32

    def __init__(self, root: str | os.PathLike[str], files: Sequence[str], size: int, index: Tensor | None = None) -> None:
        if size < 1:
            raise ValueError(f"image-size: got {size}, expected at least 1")
        self.root, self.files, self.size = os.fspath(root), files, size
        self.index = torch.arange(len(files), dtype=torch.int64, device="cpu") if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, chosen: Tensor | slice) -> Lazy:
        index = self.index[chosen]
        if index.dim() != 1:
            raise TypeError(f"images are chosen by a slice or a vector of indices, got {chosen!r}")
        return Lazy(self.root, self.files, self.size, index)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, channels, height, width)."""
        return len(self), 3, self.size, self.size

    def names(self) -> list[str]:
        """The path of each image from the root."""
        return [self.files[i] for i in self.index.tolist()]

    def tensor(self, workers: int = 0) -> Tensor:
        """All images, unchanged: (N, 3, size, size) float32. Raises ValueError if a file cannot be read."""
        return torch.cat([torch.empty(0, *self.shape[1:], dtype=self.dtype, device="cpu"), *whole(self, workers=workers)])

    def digest(self, labels: Tensor) -> str:
        """The sha256 of the path, the size in bytes and the label of each file. It reads no pixels.

        Raises:
            FileNotFoundError: a file is missing. The message names it.
        """
        sha = hashlib.sha256()
        for name, label in zip(self.names(), labels.tolist()):
            path = os.path.join(self.root, name)
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise FileNotFoundError(f"{path}: this image is not there ({error.strerror}); put it there") from error
            sha.update(f"{name}\0{size}\0{label}\n".encode(errors="surrogateescape"))
        return sha.hexdigest()


Images: TypeAlias = "Tensor | Lazy"  # (N, channels, height, width)


def as_tensor(x: Images) -> Tensor:
    """The images as a tensor; those of files are read."""
    return x.tensor() if isinstance(x, Lazy) else x


def check_augment(x: Images, augment: str) -> None:
    """Raises ValueError for an unknown change, or one that these images do not have. The message is one line."""
    check_choice("augment", augment, AUGMENTS)
    if augment == "randaugment" and not isinstance(x, Lazy):
        raise ValueError("augment: got randaugment, expected none or crop-flip; only the images of a folder have randaugment")


def batches(
    x: Images, chosen: Sequence[Tensor], *, augment: str, seed: int, epoch: int, first: int = 0, workers: int = 0
) -> Iterator[Tensor]:
    """The images of the batches of one epoch, changed at random.

        none          as in a test
        crop-flip     tensors: shifted by up to 4 pixels and mirrored (augment.crop_flip)
                      files: a random part, resized and mirrored (augment.random_box)
        randaugment   files: as crop-flip, and then changed by augment.randaugment

    The random numbers are a pure function of the seed, the epoch, the number of the batch, and the place in it. So a training
    that goes on from batch `first` gets the same bits, with any number of workers.

    Args:
        x: N images.
        chosen: the indices of the images of each batch.
        augment: one of AUGMENTS.
        seed, epoch: of the training.
        first: the number of the first batch that is wanted.
        workers: the processes that read files beside this one. 0 reads them here. Tensors need none.

    Yields:
        For each batch of chosen[first:], in order, (B, channels, height, width) float32.

    Raises:
        ValueError: an unknown change, one that x does not have, or a file that cannot be read (the message names it).

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.images import batches
        >>> chosen = torch.arange(10).split(4)
        >>> [len(x) for x in batches(torch.zeros(10, 1, 8, 8), chosen, augment="crop-flip", seed=0, epoch=0, first=1)]
        [4, 2]

    Source: He et al. 2016, Sec. 4.2; Szegedy et al. 2015, Sec. 6; Cubuk et al. 2020.
    """
    check_augment(x, augment)
    if isinstance(x, Lazy):
        return _loaded(_Batches(x, chosen[first:], augment, (seed, epoch), first), workers)
    return _indexed(x, chosen[first:], augment, (seed, epoch), first)


def whole(x: Images, size: int = 250, workers: int = 0) -> Iterator[Tensor]:
    """All images in order, in parts of `size`, as a test sees them.

    Args:
        x: N images.
        size: images of a part; the last part may have fewer.
        workers: as for batches.

    Yields:
        (B, channels, height, width) float32.

    Raises:
        ValueError: a file cannot be read. The message names it.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.images import whole
        >>> [len(part) for part in whole(torch.zeros(5, 1, 8, 8), size=2)]
        [2, 2, 1]
    """
    if isinstance(x, Lazy):
        return _loaded(_Batches(x, torch.arange(len(x), device="cpu").split(size) if len(x) else (), "none", (), 0), workers)
    return iter(x.split(size))


def _indexed(x: Tensor, chosen: Sequence[Tensor], augment: str, key: tuple[int, ...], first: int) -> Iterator[Tensor]:
    for number, batch in enumerate(chosen, first):
        if augment == "none":
            yield x[batch]
        else:
            yield changes.crop_flip(x[batch], torch.Generator("cpu").manual_seed(streams.number(*key, number)))


# ------------------------------------------------------------------------------------------------ files


class _Batches(Dataset[Any]):
    """The batches of an epoch as torch's DataLoader takes them: an item is a whole batch, or what is wrong with one of its files.

    A string comes out of another process as it is. Of an exception torch would make one with a traceback in its message.
    """

    def __init__(self, x: Lazy, chosen: Sequence[Tensor], augment: str, key: tuple[int, ...], first: int) -> None:
        self.x, self.chosen, self.augment, self.key, self.first = x, chosen, augment, key, first

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, item: int) -> Tensor | str:
        names, size = self.x[self.chosen[item]].names(), self.x.size
        batch = _empty((len(names), 3, size, size))
        out = batch.numpy()
        for place, name in enumerate(names):
            random = Random(streams.number(*self.key, self.first + item, place)) if self.augment != "none" else None
            try:
                normalise(read(Path(self.x.root, name), size, random, self.augment == "randaugment"), out[place])
            except ValueError as error:
                return str(error)
        return batch


def _empty(shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor to fill; in a process of the DataLoader, in the memory from which the training reads it."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    # As torch's own collation of a batch does it. Otherwise the batch would be copied there, a sixth of all the work.
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.float32, device="cpu").set_(storage).view(shape)


def _loaded(wanted: _Batches, workers: int) -> Iterator[Tensor]:
    """The batches in order, read by so many processes. They end with this iterator."""
    workers = min(workers, len(wanted))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # more processes than cores, as the user asked
        loader = DataLoader(
            wanted,
            batch_size=None,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator("cpu").manual_seed(0),  # or else it would draw from torch's global one
            prefetch_factor=AHEAD if workers else None,
        )
        running = iter(loader)
    try:
        while (batch := next(running, None)) is not None:
            if isinstance(batch, str):
                raise ValueError(batch)
            yield batch
    finally:
        del running  # the last reference, whose end is that of the processes


def read(path: Path, size: int, random: Random | None = None, randaugment: bool = False) -> np.ndarray[Any, Any]:
    """The pixels of an image file: (size, size, 3) uint8.

    Args:
        path: the file, of any format that Pillow reads.
        size: height and width, pixels.
        random: for the random part of a training image, which is mirrored with probability 1/2. None takes the square in the
            middle (augment.central_box).
        randaugment: whether it is also changed by augment.randaugment.

    Raises:
        ValueError: the file cannot be read as an image. The message is one line with its name.
        ImportError: Pillow is not installed.
    """
    import numpy as np
    from PIL import Image as pillow

    try:
        with pillow.open(path) as image:
            width, height = image.size
            box = changes.central_box(width, height) if random is None else changes.random_box(width, height, random)
            part = _resized(image, size, box)
    # a damaged file may raise anything in Pillow
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read as an image ({why}); replace it, or take it out of the data") from error
    mirrored = random is not None and random.random() < 0.5
    if randaugment and random is not None:
        part = part.transpose(pillow.Transpose.FLIP_LEFT_RIGHT) if mirrored else part
        return np.asarray(changes.randaugment(part, random))
    pixels = np.asarray(part)
    return pixels[:, ::-1] if mirrored else pixels


def _resized(image: Image, size: int, box: tuple[float, float, float, float]) -> Image:
    """The part of the image in the box, (left, upper, right, lower), as an RGB image of size × size."""
    from PIL import Image as pillow

    left, upper, right, lower = box
    width, height = image.size
    # JPEG only: decodes it at 1/2, 1/4 or 1/8 of its size, as long as the part keeps `size` pixels
    image.draft(None, (round(width * size / (right - left)), round(height * size / (lower - upper))))
    across, down = image.width / width, image.height / height
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    box = (left * across, upper * down, min(right * across, rgb.width), min(lower * down, rgb.height))
    return rgb.resize((size, size), pillow.Resampling.BILINEAR, box=box)


def normalise(pixels: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
    """Writes (pixels/255 − MEAN)/STD into out. pixels: (height, width, 3) uint8; out: (3, height, width) float32."""
    import numpy as np

    for channel, (mean, std) in enumerate(zip(MEAN, STD)):
        np.multiply(pixels[:, :, channel], np.float32(1 / (255 * std)), out=out[channel], casting="unsafe")
        out[channel] -= np.float32(mean / std)
