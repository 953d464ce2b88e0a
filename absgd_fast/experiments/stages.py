"""Classifier stages: a new last layer after the training, on the features of the trained network.

    tau    every class's weights are divided by a power of their norm
    crt    a fresh classifier is trained with class-balanced sampling
    lws    every class's weights are multiplied by a factor that is trained with class-balanced sampling

STAGES has them by name, with one signature. Their features are computed once, because the stages do not change them.
Source of all: Kang et al. 2020, "Decoupling Representation and Classifier for Long-Tailed Recognition", Sec. 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _numbers

if TYPE_CHECKING:
    from .config import Config


def tau_normalised(classifier: nn.Module, tau: float) -> nn.Linear:
    r"""The classifier with weights of more equal norms, which a long-tailed training makes larger for frequent classes.

        w~_i = w_i / ||w_i||^tau,    no bias

    Args:
        classifier: an nn.Linear with C rows w_i. It stays as it is.
        tau: 0 leaves the weights as they are, 1 makes all norms 1.

    Returns:
        a new layer of the same dtype on the same device. A row of zeros stays one.

    Raises:
        ValueError: a classifier that is no nn.Linear (a CosineClassifier has no norms to change), or a tau that is not finite.

    Example:
        >>> from absgd_fast.experiments.stages import tau_normalised
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> tau_normalised(layer, 1.0).weight.data
        tensor([[0.6000, 0.8000]])

    Source: Kang et al. 2020, Sec. 4 (tau-normalized classifier).
    """
    classifier = _checked_linear(classifier, "tau")
    number = _numbers.real(tau)
    if number is None or not math.isfinite(number):
        raise ValueError(f"tau: got {tau!r}, expected a finite number, such as 1.0")
    w = classifier.weight.detach().double()
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    return _linear(w / torch.where(norm > 0, norm**number, 1.0), None, like=classifier.weight)


def crt(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    weight_decay: float,
    momentum: float,
    seed: int,
) -> nn.Linear:
    """cRT: a fresh linear classifier, trained by cross-entropy with class-balanced sampling on fixed features.

    Every sample of a batch is drawn by first drawing a class, all equally likely, and then one of its samples. An epoch has as
    many draws as there are samples. The learning rate falls to 0 along a cosine, epoch by epoch: lr (1 + cos(pi e / epochs)) / 2.

    Args:
        features: (n, d), floating. Half precision is trained in float32.
        labels: (n,) integers in 0 .. classes - 1. Classes without a sample are never drawn.
        classes: C.
        epochs: >= 1.
        lr, weight_decay, momentum: as in torch.optim.SGD.
        batch_size: samples per step.
        seed: determines the initial weights, which are drawn as by nn.Linear, and the samples. The global generator stays.

    Returns:
        the classifier, on the device of the features; float64 for float64 features, else float32.

    Raises:
        ValueError: shapes that do not fit, no sample, a label out of range, epochs or batch_size < 1.

    Example:
        >>> from absgd_fast.experiments.stages import crt
        >>> x, y = torch.tensor([[1.0], [1.0], [1.0], [-1.0]]), torch.tensor([0, 0, 0, 1])
        >>> given = dict(epochs=5, lr=0.5, batch_size=2, weight_decay=0.0, momentum=0.9, seed=0)
        >>> crt(x, y, 2, **given)(x).argmax(1)
        tensor([0, 0, 0, 1])

    Source: Kang et al. 2020, Sec. 4 (Classifier Re-training), and Sec. 3 (class-balanced sampling, q = 0).
    """
    features = _checked(features, labels, classes)
    generator = torch.Generator("cpu").manual_seed(seed)
    like = torch.empty(0, dtype=features.dtype, device="cpu")
    bound = features.shape[1] ** -0.5 if features.shape[1] else 0.0  # nn.Linear's own, of weights and bias
    weight, bias = (
        torch.empty(size, dtype=like.dtype, device="cpu").uniform_(-bound, bound, generator=generator)
        for size in ((classes, features.shape[1]), (classes,))
    )
    layer = _linear(weight, bias, like=like).to(features.device)
    optimizer = torch.optim.SGD(layer.parameters(), lr, momentum, weight_decay=weight_decay)
    _train(layer, optimizer, features, labels, epochs, batch_size, generator)
    return layer


def lws(
    classifier: nn.Module,
    features: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    weight_decay: float,
    momentum: float,
    seed: int,
) -> nn.Linear:
    """LWS, learnable weight scaling: each class's logit is multiplied by a factor, and only the factors are trained.

        logit_i = f_i (w_i . x + b_i),    f_i = 1 at the start

    The training is that of `crt`. As in the authors' code a bias is scaled with its weights.

    Args:
        classifier: an nn.Linear with C rows w_i, with or without bias. It stays as it is.
        features, labels, epochs, lr, batch_size, weight_decay, momentum: as for `crt`. weight_decay pulls the factors to 0.
        seed: determines the samples. The global generator stays.

    Returns:
        a new layer with the weights f_i w_i and the bias f_i b_i, of the dtype and on the device of the classifier.

    Raises:
        ValueError: as `crt`; a classifier that is no nn.Linear (a CosineClassifier has no norms to change).

    Example:
        >>> from absgd_fast.experiments.stages import lws
        >>> layer = torch.nn.Linear(1, 2, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
        >>> scaled = lws(layer, x, y, epochs=3, lr=0.5, batch_size=2, weight_decay=0.0, momentum=0.0, seed=0)
        >>> bool((scaled.weight.abs() > 1).all())
        True

    Source: Kang et al. 2020, Sec. 4 (Learnable weight scaling).
    """
    classifier = _checked_linear(classifier, "lws")
    features = _checked(features, labels, len(classifier.weight), classifier.weight.shape[1])
    w, b = (None if p is None else p.detach().to(features) for p in (classifier.weight, classifier.bias))
    f = torch.ones(len(classifier.weight), dtype=features.dtype, device=features.device, requires_grad=True)
    optimizer = torch.optim.SGD([f], lr, momentum, weight_decay=weight_decay)
    generator = torch.Generator("cpu").manual_seed(seed)
    _train(lambda x: f * F.linear(x, w, b), optimizer, features, labels, epochs, batch_size, generator)
    scale = f.detach()
    return _linear(scale.unsqueeze(1) * w, None if b is None else scale * b, like=classifier.weight)


# ---- the training --------------------------------------------------------------------------------------------------------


def class_balanced(labels: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Indices of samples, each drawn by first drawing one of the classes that occur, all equally likely, and then a sample of it.

    Args:
        labels: (n,) integers, n >= 1.
        draws: how many.
        generator: of the CPU.

    Returns:
        (draws,) int64 on the CPU, with replacement.

    Example:
        >>> from absgd_fast.experiments.stages import class_balanced
        >>> labels = torch.tensor([0] * 9 + [5])
        >>> chosen = class_balanced(labels, 1000, torch.Generator().manual_seed(0))
        >>> abs(int((labels[chosen] == 5).sum()) - 500) < 60
        True
    """
    labels = labels.cpu()
    by_class = torch.argsort(labels, stable=True)
    _, counts = torch.unique(labels, return_counts=True)
    first = counts.cumsum(0) - counts
    chosen = torch.randint(len(counts), (draws,), generator=generator, dtype=torch.int64, device="cpu")
    # A float64 below 1 times a count may round up to the count only beyond 2^53 samples.
    place = torch.rand(draws, generator=generator, dtype=torch.float64, device="cpu") * counts[chosen]
    return by_class[first[chosen] + place.long()]


def _train(
    logits_of: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    labels: Tensor,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> None:
    """Trains by cross-entropy with class-balanced sampling; the learning rate falls along a cosine, epoch by epoch."""
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    labels = labels.to(features.device, torch.int64)
    with torch.enable_grad():
        for _ in range(epochs):
            for chosen in class_balanced(labels, len(labels), generator).to(features.device).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(logits_of(features[chosen]), labels[chosen]).backward()
                optimizer.step()
            cosine.step()
    optimizer.zero_grad()


def _checked(features: Tensor, labels: Tensor, classes: int, width: int | None = None) -> Tensor:
    """The features in the dtype of the training, without a graph. ValueError for what does not fit; width: d, if it is known."""
    if features.dim() != 2 or labels.shape != features.shape[:1] or not len(labels) or width not in (None, features.shape[1]):
        d = "d" if width is None else width
        raise ValueError(
            f"stage: got features {tuple(features.shape)} and labels {tuple(labels.shape)}, expected (n, {d}) and (n,), n >= 1"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"stage: got labels from {low} to {high}, expected 0 to {classes - 1}, those of the {classes} classes")
    return features.detach().to(torch.float64 if features.dtype == torch.float64 else torch.float32)


def _checked_linear(classifier: nn.Module, stage: str) -> nn.Linear:
    """The classifier itself. ValueError if its weights have no norms that count."""
    if not isinstance(classifier, nn.Linear):
        raise ValueError(
            f"stage {stage}: got a {type(classifier).__name__}, expected an nn.Linear, whose norms it can change; use crt, which "
            "trains a fresh classifier"
        )
    return classifier


def _linear(weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Linear:
    """A layer of these numbers, of the dtype and on the device of `like`. It draws no random numbers, as nn.Linear() does."""
    classes, width = weight.shape
    layer = nn.utils.skip_init(nn.Linear, width, classes, bias=bias is not None, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


# ---- by name -------------------------------------------------------------------------------------------------------------

Stage = Callable[[nn.Module, Tensor, Tensor, "Config", int], nn.Module]


def _tau(classifier: nn.Module, features: Tensor, labels: Tensor, config: Config, seed: int) -> nn.Module:
    return tau_normalised(classifier, config.tau)


def _crt(classifier: nn.Module, features: Tensor, labels: Tensor, config: Config, seed: int) -> nn.Module:
    weight = classifier.weight
    assert isinstance(weight, Tensor)  # (C, d), of an nn.Linear or a CosineClassifier
    return crt(features, labels, len(weight), **_settings(config, seed)).to(weight)


def _lws(classifier: nn.Module, features: Tensor, labels: Tensor, config: Config, seed: int) -> nn.Module:
    return lws(classifier, features, labels, **_settings(config, seed))


def _settings(config: Config, seed: int) -> dict[str, Any]:
    return dict(
        epochs=config.stage_epochs,
        lr=config.stage_lr,
        batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        seed=seed,
    )


# stage(classifier, features, labels, config, seed) -> a new classifier; the fields of config are tau, stage_epochs, stage_lr,
# batch_size, weight_decay and momentum
STAGES: dict[str, Stage] = {"tau": _tau, "crt": _crt, "lws": _lws}
