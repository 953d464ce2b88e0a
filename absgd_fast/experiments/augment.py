"""Random changes of training images: crops and mirror images of tensors and of Pillow's images, and RandAugment.

This module needs Pillow only for the images of files, and loads it then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

PADDING = 4  # pixels around a tensor's image before it is cropped
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a crop: its share of the area, and its width over its height
TRIES = 10
OPERATIONS, MAGNITUDE = 2, 9  # N and M of RandAugment; M is in [0, 10]
FILL = (124, 116, 104)  # ImageNet's mean colour, where RandAugment moves an image away

Box = tuple[int, int, int, int]  # left, upper, right, lower


def crop_flip(x: Tensor, random: torch.Generator) -> Tensor:
    """Shifts each image of a batch by up to 4 pixels and mirrors it with probability 1/2.

    An image is padded with 4 zeros on each side and cropped to its size at a random place.

    Args:
        x: (B, channels, height, width), any dtype.
        random: a generator on the CPU.

    Returns:
        The changed images, of the shape and dtype of x.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.augment import crop_flip
        >>> crop_flip(torch.ones(2, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 32, 32])

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", Sec. 4.2.
    """
    n, channels, height, width = x.shape
    shift = torch.randint(0, 2 * PADDING + 1, (2, n, 1), generator=random, device="cpu")
    rows, columns = (one + torch.arange(size, device="cpu") for one, size in zip(shift, (height, width)))
    mirrored = torch.rand(n, 1, generator=random, dtype=torch.float32, device="cpu") < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = torch.nn.functional.pad(x, (PADDING,) * 4)
    image, channel = (torch.arange(size, device="cpu") for size in (n, channels))
    image, channel = image.view(n, 1, 1, 1), channel.view(1, channels, 1, 1)
    return padded[image, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def random_box(width: int, height: int, random: Random) -> Box:
    """The part of an image that a training step sees, which is then resized to a square.

        area = s · width · height,  s ~ U(0.08, 1)           w/h = r,  log r ~ U(log 3/4, log 4/3)

    A part that does not fit is drawn again, up to ten times. After that it is the largest part in the middle with a ratio r that
    is allowed.

    Args:
        width, height: of the image, pixels.
        random: where the numbers come from.

    Returns:
        (left, upper, right, lower), pixels.

    Example:
        >>> from random import Random
        >>> from absgd_fast.experiments.augment import random_box
        >>> left, upper, right, lower = random_box(500, 375, Random(0))
        >>> 0 <= left < right <= 500 and 0 <= upper < lower <= 375
        True

    Source: Szegedy et al. 2015, "Going Deeper with Convolutions", Sec. 6.
    """
    for _ in range(TRIES):
        area = width * height * random.uniform(*SCALE)
        ratio = math.exp(random.uniform(*map(math.log, RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = random.randint(0, width - w), random.randint(0, height - h)
            return left, upper, left + w, upper + h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def central_box(width: int, height: int) -> tuple[float, float, float, float]:
    """The square in the middle of an image that a test sees: 224/256 of the shorter side.

    Resizing it to size × size is the usual resizing of the shorter side to size · 256/224 and cropping to size × size.

    Example:
        >>> from absgd_fast.experiments.augment import central_box
        >>> central_box(512, 256)
        (144.0, 16.0, 368.0, 240.0)
    """
    side = min(width, height) * 224 / 256
    left, upper = (width - side) / 2, (height - side) / 2
    return left, upper, left + side, upper + side


# ------------------------------------------------------------------------------------------------ RandAugment


def _moved(image: Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image:
    """The image whose pixel (x, y) is that of (ax + by + c, dx + ey + f) of the given one."""
    from PIL import Image as pillow

    return image.transform(image.size, pillow.Transform.AFFINE, (a, b, c, d, e, f), pillow.Resampling.NEAREST, fillcolor=FILL)


def _rotate(image: Image, value: float) -> Image:
    from PIL import Image as pillow

    return image.rotate(value, pillow.Resampling.NEAREST, fillcolor=FILL)


def _enhanced(name: str) -> Callable[[Image, float], Image]:
    """The function that enhances the colour, contrast, brightness or sharpness by a factor of 1 + value."""

    def enhance(image: Image, value: float) -> Image:
        from PIL import ImageEnhance

        return getattr(ImageEnhance, name)(image).enhance(1 + value)

    return enhance


def _mapped(name: str) -> Callable[[Image, float], Image]:
    """The function of ImageOps that takes nothing but the image."""

    def change(image: Image, value: float) -> Image:
        from PIL import ImageOps

        return getattr(ImageOps, name)(image)

    return change


def _posterize(image: Image, value: float) -> Image:
    from PIL import ImageOps

    return ImageOps.posterize(image, 8 - round(value))


def _solarize(image: Image, value: float) -> Image:
    from PIL import ImageOps

    return ImageOps.solarize(image, round(256 - value))


# name: (the change of an image by a value, the value at magnitude 10, whether its sign is random). The ranges are those of
# AutoAugment. All of them grow with the magnitude.
CHANGES: dict[str, tuple[Callable[[Image, float], Image], float, bool]] = {
    "identity": (lambda image, value: image, 0.0, False),
    "autocontrast": (_mapped("autocontrast"), 0.0, False),
    "equalize": (_mapped("equalize"), 0.0, False),
    "rotate": (_rotate, 30.0, True),  # degrees
    "solarize": (_solarize, 256.0, False),  # how far below 256 values begin to be inverted
    "posterize": (_posterize, 4.0, False),  # bits that are dropped
    "color": (_enhanced("Color"), 0.9, True),
    "contrast": (_enhanced("Contrast"), 0.9, True),
    "brightness": (_enhanced("Brightness"), 0.9, True),
    "sharpness": (_enhanced("Sharpness"), 0.9, True),
    "shear-x": (lambda image, value: _moved(image, 1, value, 0, 0, 1, 0), 0.3, True),
    "shear-y": (lambda image, value: _moved(image, 1, 0, 0, value, 1, 0), 0.3, True),
    # 150 of the 331 pixels of AutoAugment's images
    "translate-x": (lambda image, value: _moved(image, 1, 0, value * image.width, 0, 1, 0), 150 / 331, True),
    "translate-y": (lambda image, value: _moved(image, 1, 0, 0, 0, 1, value * image.height), 150 / 331, True),
}


def randaugment(image: Image, random: Random, operations: int = OPERATIONS, magnitude: float = MAGNITUDE) -> Image:
    """Changes an image `operations` times, each time in one of 14 ways that are equally likely.

        value = (magnitude/10) · the way's largest value, with a random sign where both directions exist

    Args:
        image: an RGB image of Pillow.
        random: where the numbers come from.
        operations: N.
        magnitude: M in [0, 10].

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: a negative number of operations, or a magnitude outside [0, 10].

    Example:
        >>> from random import Random
        >>> from PIL import Image
        >>> from absgd_fast.experiments.augment import randaugment
        >>> randaugment(Image.new("RGB", (32, 24)), Random(0)).size
        (32, 24)

    Source: Cubuk et al. 2020, "RandAugment", Sec. 3 and Fig. 2.
    """
    if operations < 0 or not 0 <= magnitude <= 10:
        raise ValueError(
            f"randaugment: got {operations} operations of magnitude {magnitude}, expected 0 or more, of a magnitude in [0, 10]"
        )
    for _ in range(operations):
        change, largest, both = CHANGES[random.choice(list(CHANGES))]
        value = largest * magnitude / 10
        image = change(image, -value if both and random.random() < 0.5 else value)
    return image
