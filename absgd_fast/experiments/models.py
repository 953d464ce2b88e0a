"""The networks: linear and mlp for any image size, cnn for images of at least 4×4, resnet32 for CIFAR.

All take float32 images (B, channels, height, width) and return logits (B, classes).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import index

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MODELS = ("linear", "mlp", "cnn", "resnet32")


def make_model(name: str, shape: tuple[int, ...], classes: int, seed: int) -> nn.Sequential:
    """A freshly initialised network. The same seed gives the same weights, and torch's global generator does not change.

    Args:
        name: "linear" (softmax regression), "mlp" (two hidden layers of 128), "cnn" (two 3×3 convolutions) or
            "resnet32" (He et al. 2016).
        shape: (channels, height, width) of the images.
        classes: number of logits.
        seed: the seed of the initial weights.

    Returns:
        An nn.Sequential in training mode.

    Raises:
        ValueError: unknown name, or resnet32 for anything but 32×32 images.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.models import make_model
        >>> make_model("mlp", (1, 8, 8), 10, seed=0)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    check_model(name, shape)
    classes = index(classes)
    channels, height, width = shape
    pixels = channels * height * width
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _float32():
        torch.manual_seed(index(seed))
        if name == "linear":
            return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
        if name == "mlp":
            return nn.Sequential(
                nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes)
            )
        if name == "cnn":
            return nn.Sequential(
                nn.Conv2d(channels, 16, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(32 * (height // 4) * (width // 4), classes),
            )
        return resnet(channels, classes)


@contextmanager
def _float32() -> Iterator[None]:
    """Make float32 torch's default dtype: the layers are made in it, and the images are float32 whatever the default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_model(name: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError if make_model has no network of this name for images of this shape, (channels, height, width)."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; use one of {', '.join(MODELS)}")
    _, height, width = shape
    if name == "resnet32" and (height, width) != (32, 32):
        raise ValueError(f"model resnet32 takes 32×32 images, these are {height}×{width}: use linear, mlp or cnn")
    if name == "cnn" and min(height, width) < 4:
        raise ValueError(f"model cnn takes images of at least 4×4, these are {height}×{width}: use linear or mlp")


def resnet(channels: int, classes: int, blocks_per_stage: int = 5) -> nn.Sequential:
    """ResNet for 32×32 images with 6 n + 2 layers, where n = blocks_per_stage; n = 5 is ResNet-32 (He et al. 2016, Sec. 4.2)."""
    blocks: list[nn.Module] = []
    width = 16
    for out in (16, 32, 64):
        for i in range(blocks_per_stage):
            blocks.append(_Block(width, out, stride=2 if i == 0 and out != width else 1))
            width = out
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, classes),
    )


class _Block(nn.Module):
    """relu(x + F(x)), where F has two 3×3 convolutions.

    If the size changes, the shortcut takes every second pixel and fills the new channels with zeros, so it has no parameters
    (He et al. 2016, Sec. 4.2, option A).
    """

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.pad = stride, (out - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad)))
