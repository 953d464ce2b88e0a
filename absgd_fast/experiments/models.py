"""The networks by name: make_model, check_model, and split, which takes a network apart.

linear and mlp take images of any size, the others those that SMALLEST and SIDES say. All take float32 images (B, channels,
height, width) and return logits (B, classes). The residual networks are in resnets.py.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index

import torch
from torch import nn

from ..losses import CosineClassifier
from .choices import check_choice
from .resnets import TORCHVISION, check_torchvision, last_block, preactivation, resnet, torchvision_resnet, wide_resnet

__all__ = ["HEADS", "MODELS", "check_model", "last_block", "make_model", "resnet", "split"]

MODELS = ("linear", "mlp", "cnn", "resnet32", "cnn4", "cnn8", "lenet", "preact", "wrn-16-2", "wrn-28-10", *TORCHVISION)
HEADS = ("linear", "cosine")
# The smallest side of images that a model takes. Below it nothing would be left after its pooling, or a residual network would
# have stages that see single pixels only.
SMALLEST = {"cnn": 4, "cnn4": 4, "cnn8": 8, "preact": 8, "wrn-16-2": 4, "wrn-28-10": 4, **dict.fromkeys(TORCHVISION, 8)}
# The sides of the square images that a model was made for.
SIDES = {"resnet32": (32,), "lenet": (28, 32)}


def make_model(name: str, shape: tuple[int, ...], classes: int, seed: int, head: str = "linear") -> nn.Sequential:
    """A freshly initialised network. The same seed gives the same weights, and torch's global generator does not change.

    Args:
        name: one of MODELS:
            "linear"     softmax regression
            "mlp"        two hidden layers of 128
            "cnn"        two 3×3 convolutions
            "resnet32"   ResNet-32 for 32×32 images (He et al. 2016)
            "cnn4"       the 4 layers that Wang et al. 2019 train on MNIST: two 3×3 convolutions and two linear layers
            "cnn8"       the 8 layers that they train on CIFAR-10: six 3×3 convolutions and two linear layers
            "lenet"      LeNet-5 for 28×28 and 32×32 images (LeCun et al. 1998, Fig. 2), with ReLU and max-pooling
            "preact"     pre-activation ResNet with 18 layers and 16 to 128 channels (He et al. 2016b), small enough for a CPU
            "wrn-16-2", "wrn-28-10"   wide ResNets (Zagoruyko & Komodakis 2016), wrn-28-10 with dropout of 0.3
            "resnet18", "resnet34", "resnet50", "resnet152"   torchvision's (He et al. 2016), with random weights; with the usual
                beginning for CIFAR if no side of the images has more than 64 pixels
        shape: (channels, height, width) of the images.
        classes: number of logits.
        seed: the seed of the initial weights.
        head: the last layer: "linear", or "cosine" for absgd_fast.CosineClassifier, which the LDAM loss needs. The other layers
            have the same initial weights with both.

    Returns:
        An nn.Sequential in training mode. Its last layer is the classifier, and those before it give (B, d) features.

    Raises:
        ValueError: unknown name or head, a size that the model does not take, or no torchvision for a model that needs it.

    Example:
        >>> import torch
        >>> from absgd_fast.experiments.models import make_model
        >>> make_model("mlp", (1, 8, 8), 10, seed=0)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
        >>> make_model("cnn4", (1, 8, 8), 10, seed=0, head="cosine")[-1]
        CosineClassifier(128, 10)

    Source: Wang, Ma, Chen, Luo, Yi, Bailey 2019, "Symmetric cross entropy for robust learning with noisy labels", ICCV, and its
    authors' code for cnn4 and cnn8; Ren et al. 2018, "Learning to reweight examples for robust deep learning", ICML, for the
    dropout of wrn-28-10.
    """
    check_model(name, shape)
    check_choice("head", head, HEADS)
    classes = index(classes)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), float32_default():
        torch.manual_seed(index(seed))
        model = _made(name, shape, classes)
        if head == "cosine":  # after all others have drawn their weights
            last = model[-1]
            assert isinstance(last, nn.Linear)
            model[-1] = CosineClassifier(last.in_features, classes)
    return model


def split(model: nn.Module) -> tuple[nn.Sequential, nn.Module]:
    """Takes a network apart: classifier(features(x)) is model(x).

    Args:
        model: a network of make_model, also one whose classifier (its last layer) was replaced.

    Returns:
        (features, classifier). features(x) is (B, d). Both share their layers with the model, and model.train() and model.eval()
        still set the mode of these.

    Raises:
        ValueError: not such a network, e.g. one inside DistributedDataParallel: take its .module.

    Example:
        >>> features, classifier = split(make_model("mlp", (1, 8, 8), 10, seed=0))
        >>> features(torch.zeros(5, 1, 8, 8)).shape, classifier
        (torch.Size([5, 128]), Linear(in_features=128, out_features=10, bias=True))
    """
    if not isinstance(model, nn.Sequential) or len(model) < 2:
        raise ValueError(
            f"model: got {type(model).__name__}, expected the nn.Sequential of make_model, which ends in its classifier; "
            "of a network inside DistributedDataParallel take .module"
        )
    features = nn.Sequential(OrderedDict(list(model.named_children())[:-1]))
    features.training = model.training
    return features, model[-1]


def check_model(name: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError if make_model has no network of this name for images of this shape, (channels, height, width).

    The message is one line: what was given, what the model takes, and what to use instead.

    >>> check_model("cnn", (1, 3, 8))
    Traceback (most recent call last):
    ValueError: model cnn takes images of at least 4×4, these are 3×8: use linear or mlp
    """
    check_choice("model", name, MODELS)
    _, height, width = shape
    instead = "linear, mlp or cnn" if min(height, width) >= SMALLEST["cnn"] else "linear or mlp"
    sides = SIDES.get(name)
    if sides and (height != width or height not in sides):
        takes = " and ".join(f"{side}×{side}" for side in sides)
        raise ValueError(f"model {name} takes {takes} images, these are {height}×{width}: use {instead}")
    smallest = SMALLEST.get(name, 1)
    if min(height, width) < smallest:
        raise ValueError(
            f"model {name} takes images of at least {smallest}×{smallest}, these are {height}×{width}: use {instead}"
        )
    if name in TORCHVISION:
        check_torchvision(name)


@contextmanager
def float32_default() -> Iterator[None]:
    """Make float32 torch's default dtype: the layers are made in it, and the images are float32 whatever the default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _made(name: str, shape: tuple[int, ...], classes: int) -> nn.Sequential:
    """The network with a linear head."""
    channels, height, width = shape
    match name:
        case "linear":
            return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, classes))
        case "mlp":
            layers = nn.Linear(channels * height * width, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
            return nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, classes))
        case "cnn":
            return nn.Sequential(
                *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
                nn.Flatten(),
                nn.Linear(32 * (height // 4) * (width // 4), classes),
            )
        case "cnn4":
            return _normalised_cnn(shape, classes, stages=((32,), (64,)), hidden=128)
        case "cnn8":
            return _normalised_cnn(shape, classes, stages=((64, 64), (128, 128), (196, 196)), hidden=256)
        case "lenet":
            return _lenet(channels, height, classes)
        case "resnet32":
            return resnet(channels, classes)
        case "preact":
            return preactivation(channels, classes)
        case "wrn-16-2":
            return wide_resnet(channels, classes, depth=16, widen=2)
        case "wrn-28-10":
            return wide_resnet(channels, classes, depth=28, widen=10, dropout=0.3)
    return torchvision_resnet(name, shape, classes)


def _normalised_cnn(shape: tuple[int, ...], classes: int, stages: tuple[tuple[int, ...], ...], hidden: int) -> nn.Sequential:
    """Stages of 3×3 convolutions, each stage with max-pooling behind it, one hidden linear layer, and the classifier.

    BatchNorm and ReLU come after every layer but the last. The weights begin with He et al.'s normal distribution over the inputs
    and the biases with zeros, as in the code of Wang et al. 2019. BatchNorm has torch's momentum of 0.1 and its ε, and all layers
    share one weight decay.

    Args:
        shape: (channels, height, width) of the images.
        classes: number of logits.
        stages: the channels of the convolutions of each stage.
        hidden: length of the features.
    """
    channels, height, width = shape
    layers: list[nn.Module] = []
    for stage in stages:
        for out in stage:
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2))
        height, width = height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(channels * height * width, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
    layers.append(nn.Linear(hidden, classes))
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _lenet(channels: int, side: int, classes: int) -> nn.Sequential:
    """LeNet-5 with every channel of the second convolution connected to all of the first. 28×28 images are padded to 32×32."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 6, 5, padding=(32 - side) // 2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU()),
        nn.Linear(84, classes),
    )
