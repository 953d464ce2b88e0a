"""The residual networks of models.py: ResNet-32 and its like for CIFAR, pre-activation and wide ResNets, and torchvision's.

Each is an nn.Sequential that ends in global average pooling, nn.Flatten and nn.Linear. All weights are random.
"""

import importlib
from collections import OrderedDict
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet152")
SMALL = 64  # the largest side of images that are not shrunk by four before the first block


def resnet(channels: int, classes: int, blocks_per_stage: int = 5) -> nn.Sequential:
    """ResNet for 32×32 images with 6 n + 2 layers, where n = blocks_per_stage; n = 5 is ResNet-32 (He et al. 2016, Sec. 4.2).

    >>> sum(p.numel() for p in resnet(3, 10).parameters())
    464154
    """
    blocks: list[nn.Module] = []
    width = 16
    for out in (16, 32, 64):
        for i in range(blocks_per_stage):
            blocks.append(PlainBlock(width, out, stride=2 if i == 0 and out != width else 1))
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


class PlainBlock(nn.Module):
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
        """(B, channels, H, W) → (B, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad)))


# ------------------------------------------------------------------------------------------------ normalised before each block


def preactivation(
    channels: int, classes: int, blocks_per_stage: int = 2, widths: Sequence[int] = (16, 32, 64, 128), dropout: float = 0.0
) -> nn.Sequential:
    """ResNet with BatchNorm and ReLU before the convolutions (He et al. 2016b, Fig. 4 (e)).

    A 3×3 convolution with 16 channels comes first. Each stage has blocks_per_stage blocks of two 3×3 convolutions, and each stage
    but the first halves the sides of the image.

    Args:
        channels: of the images.
        classes: number of logits.
        blocks_per_stage: blocks of each stage.
        widths: the channels of each stage. Four stages with 2 blocks each have 18 layers.
        dropout: the probability of a zero between the two convolutions of a block (Zagoruyko & Komodakis 2016, Sec. 2.4).

    Returns:
        An nn.Sequential in training mode. The convolutions begin with He et al.'s normal distribution over the outputs, as in
        Zagoruyko & Komodakis' code, and the last layer's bias with zeros.

    Example:
        >>> preactivation(1, 10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])

    Source: He, Zhang, Ren, Sun 2016b, "Identity mappings in deep residual networks", ECCV.
    """
    blocks: list[nn.Module] = []
    width = 16
    for stage, out in enumerate(widths):
        for i in range(blocks_per_stage):
            blocks.append(PreactivationBlock(width, out, stride=2 if i == 0 and stage else 1, dropout=dropout))
            width = out
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        *blocks,
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def wide_resnet(channels: int, classes: int, depth: int, widen: int, dropout: float = 0.0) -> nn.Sequential:
    """WRN-depth-widen: three stages with (depth − 4) / 6 blocks each and 16, 32 and 64 times `widen` channels.

    Args:
        channels: of the images.
        classes: number of logits.
        depth: 6 n + 4 for n blocks of two convolutions in each stage.
        widen: the factor of the channels.
        dropout: as for preactivation().

    Returns:
        An nn.Sequential in training mode, initialised as preactivation() says.

    Raises:
        ValueError: the depth is not 6 n + 4 with n ≥ 1.

    Example:
        >>> sum(p.numel() for p in wide_resnet(3, 10, depth=16, widen=2).parameters())
        691674

    Source: Zagoruyko & Komodakis 2016, "Wide residual networks", BMVC, Table 1.
    """
    blocks, left = divmod(depth - 4, 6)
    if left or blocks < 1:
        raise ValueError(f"depth: got {depth}, expected 6 n + 4 for n blocks in each stage, e.g. 16 or 28")
    return preactivation(channels, classes, blocks, (16 * widen, 32 * widen, 64 * widen), dropout)


class PreactivationBlock(nn.Module):
    """shortcut + conv(relu(bn(conv(relu(bn(x)))))), with dropout before the second convolution.

    The shortcut is x. If the size changes, it is a 1×1 convolution of relu(bn(x)), as in the code of Zagoruyko & Komodakis 2016.
    """

    def __init__(self, channels: int, out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, padding=1, bias=False)
        same = stride == 1 and channels == out
        self.shortcut = None if same else nn.Conv2d(channels, out, 1, stride, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
        active = F.relu(self.bn1(x))
        y = F.relu(self.bn2(self.conv1(active)))
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        return self.conv2(y) + (x if self.shortcut is None else self.shortcut(active))


# ------------------------------------------------------------------------------------------------ torchvision's


def check_torchvision(name: str) -> ModuleType:
    """The module torchvision.models. ValueError with one line if it does not import.

    >>> check_torchvision("resnet18").__name__  # doctest: +SKIP
    'torchvision.models'
    """
    try:
        return importlib.import_module("torchvision.models")
    # Not only ImportError: beside another build of torch, torchvision's operators fail with RuntimeError, and with AttributeError
    # when the import is tried again.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"model {name} needs torchvision, which does not import here ({reason}): install the one built for torch "
            f"{torch.__version__} (pip install torchvision, from the index that torch came from), or use preact, which needs no "
            "torchvision"
        ) from None


def torchvision_resnet(name: str, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """torchvision's ResNet of this name with random weights, its layers in a row under torchvision's names.

    For images with sides of at most 64 pixels it begins with a 3×3 convolution of stride 1 and has no max-pooling, as is usual
    for CIFAR. For other images it begins as in He et al. 2016, Table 1. The state_dict has torchvision's keys.

    Args:
        name: one of TORCHVISION.
        shape: (channels, height, width) of the images.
        classes: number of logits.

    Returns:
        An nn.Sequential in training mode with the layers conv1, bn1, relu, maxpool, layer1 to layer4, avgpool, flatten and fc.

    Raises:
        ValueError: torchvision does not import.

    Example:
        >>> torchvision_resnet("resnet18", (3, 32, 32), 10)(torch.zeros(2, 3, 32, 32)).shape  # doctest: +SKIP
        torch.Size([2, 10])

    Source: He, Zhang, Ren, Sun 2016, "Deep residual learning for image recognition", CVPR.
    """
    model = getattr(check_torchvision(name), name)(num_classes=classes)
    channels, height, width = shape
    small = max(height, width) <= SMALL
    if small or channels != model.conv1.in_channels:
        kernel, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        model.conv1 = nn.Conv2d(channels, model.conv1.out_channels, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small:
        model.maxpool = nn.Identity()
    layers = {key: getattr(model, key) for key in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")}
    return nn.Sequential(OrderedDict(layers, avgpool=model.avgpool, flatten=nn.Flatten(), fc=model.fc))


# ------------------------------------------------------------------------------------------------ the last block


def last_block(model: nn.Module) -> nn.Module:
    """The last residual block of a network, for training it and the classifier alone.

    For a network with BatchNorm before its blocks it is the block with the BatchNorm and ReLU behind it, which are its
    activation (He et al. 2016b, Appendix). It shares its parameters with the model.

    Args:
        model: a network of models.make_model.

    Returns:
        A module that maps the features before the block to those after it.

    Raises:
        ValueError: the model has no residual blocks.

    Example:
        >>> model = resnet(3, 10)
        >>> last_block(model) is model[-4]
        True

    Source: the code of the ABSGD paper, which trains the classifier and the last block of ResNet-50 (layer4.2) and ResNet-32.
    """
    if isinstance(model, nn.Sequential):
        stage = getattr(model, "layer4", None)
        if isinstance(stage, nn.Sequential):
            return stage[-1]
        for i in reversed(range(len(model))):
            if isinstance(model[i], PlainBlock):
                return model[i]
            if isinstance(model[i], PreactivationBlock):
                return model[i : i + 3]
    raise ValueError(
        "the model has no residual blocks, so it has no last block to train: use trainable all or fc, or a model with blocks "
        f"(resnet32, preact, wrn-16-2, wrn-28-10, {', '.join(TORCHVISION)})"
    )
