"""mixup: training on convex combinations of two images, for any loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import _numbers


class Mixup(nn.Module):
    r"""A loss of mixed images: each image is mixed with another one of its batch, and so are the losses by their two labels.

        a      ~ Beta(alpha, alpha)                              one for the batch
        x~_i   = a x_i + (1 - a) x_perm(i)                       `mix`
        L~_i   = a L(f(x~_i), y_i) + (1 - a) L(f(x~_i), y_perm(i))     forward

    ``ABLoss(Mixup(ab.Focal(), 1.0, generator), lam=...)`` weighs the mixed losses. In eval mode, and before the first `mix`, the
    forward is the plain loss and `mix` changes nothing. What `mix` has drawn stays until the next `mix` or `forget`, so both
    passes of a SAM step see the same mixture.

    Args:
        loss: any callable (logits, labels) -> losses. It should return one loss per sample; with a mean the means are mixed.
        alpha: parameter >= 0 of the Beta distribution. 0 mixes nothing; 1 draws a uniformly from [0, 1].
        generator: the random generator (CPU) that determines every draw. Its state is in the state_dict.

    Attributes:
        share: a of the latest `mix`; None before it.
        permutation: (B,) int64 on the device of the images, perm of the latest `mix`; None before it.
        ignore_index: that of `loss`, or None. A row counts if its own label is not ignored. If only the label that is mixed in is
            ignored, the second term is what `loss` gives for it, usually 0.

    Raises:
        ValueError: alpha is no finite number >= 0, or the generator is not one of the CPU.
        TypeError: a loss that is not callable.

    >>> import absgd_fast as ab
    >>> from absgd_fast.experiments.mixup import Mixup
    >>> mixup = Mixup(ab.CrossEntropy(), 1.0, torch.Generator().manual_seed(0))
    >>> criterion = ab.ABLoss(mixup, lam=0.5)
    >>> images, labels = torch.ones(4, 1, 2, 2), torch.tensor([0, 1, 1, 0])
    >>> logits = mixup.mix(images).flatten(1)
    >>> criterion(logits, labels).shape, criterion.last.losses.shape
    (torch.Size([]), torch.Size([4]))

    Source: Zhang et al. 2018, "mixup: Beyond Empirical Risk Minimization", Eq. 2 and Fig. 1 (one a per batch, and the second
    image from the same batch).
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        number = _numbers.real(alpha)
        if number is None or not 0 <= number < float("inf"):
            raise ValueError(f"alpha: got {alpha!r}, expected a finite number >= 0, such as 1.0; 0 mixes nothing")
        if not callable(loss):
            raise TypeError(f"loss: got {type(loss).__name__}, expected a callable (logits, labels) -> losses")
        if generator.device.type != "cpu":
            raise ValueError(f"generator: got one of {generator.device}, expected torch.Generator('cpu'); it serves every device")
        self.loss, self.alpha, self.generator = loss, number, generator
        self.share: float | None = None
        self.permutation: Tensor | None = None

    @property
    def ignore_index(self) -> int | None:
        """The label that the inner loss ignores; None if it has none."""
        return getattr(self.loss, "ignore_index", None)

    def mix(self, images: Tensor) -> Tensor:
        """Draws a and perm, and returns the mixed images.

        Args:
            images: (B, ...), floating.

        Returns:
            (B, ...) of the same dtype on the same device. In eval mode the images themselves.

        Raises:
            ValueError: images that are not floating.
        """
        if not self.training:
            return images
        if not images.is_floating_point():
            raise ValueError(f"mix: got images of {images.dtype}, expected a floating dtype; convert them first")
        # NumPy's Beta is exact for a small alpha too, where Gamma variables would underflow to 0 / 0.
        seed = int(torch.randint(2**63 - 1, (), generator=self.generator, dtype=torch.int64, device="cpu"))
        import numpy as np  # `absgd-fast` must say without it what is missing

        a = float(np.random.default_rng(seed).beta(self.alpha, self.alpha)) if self.alpha else 1.0
        order = torch.randperm(len(images), generator=self.generator, dtype=torch.int64, device="cpu").to(images.device)
        self.share, self.permutation = a, order
        return a * images + (1 - a) * images[order]

    def forget(self) -> None:
        """Forget what `mix` has drawn: the next forward is the plain loss."""
        self.share = self.permutation = None

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mixed losses.

        Args:
            logits: (B, ...) of the mixed images.
            labels: (B, ...) of the images as they came, in the order that `mix` got them.

        Returns:
            what `loss` returns for them, mixed: (B,) per-sample losses.

        Raises:
            ValueError: another number of labels than `mix` had images.
        """
        if not self.training or self.share is None or self.permutation is None:
            return self.loss(logits, labels)
        if len(labels) != len(self.permutation):
            raise ValueError(
                f"Mixup: got {len(labels)} labels, expected {len(self.permutation)}, as many as mix() had images; call mix() for "
                "this batch, or forget() for the plain loss"
            )
        a, other = self.share, labels[self.permutation.to(labels.device)]
        return a * self.loss(logits, labels) + (1 - a) * self.loss(logits, other)

    def get_extra_state(self) -> Tensor:
        """The state of the generator, for state_dict()."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Puts back the state of the generator, for load_state_dict()."""
        self.generator.set_state(state.cpu())

    def extra_repr(self) -> str:
        """alpha, for repr()."""
        return f"alpha={self.alpha:g}"
