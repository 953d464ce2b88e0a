"""Segmentation: logits (B, C, H, W), one class that has 1 % of the pixels, and pixels without a label.

ABLoss weighs every pixel. With lam > 0 pixels of a large loss count more, which are those of the rare class at first.
Run it with: python examples/segmentation.py
"""

import math

import torch
from torch import nn

import absgd_fast as ab

SIZE, STEPS, UNLABELED, RARE = 32, 80, 255, 2


def batch(n=8):
    """Noisy images (n, 1, H, W) of a large square and a tiny one, and labels (n, H, W), in which their outlines have none."""
    images, labels = torch.zeros(n, 1, SIZE, SIZE), torch.zeros(n, SIZE, SIZE, dtype=torch.int64)
    for image, label in zip(images, labels):
        for kind, side in ((1, 12), (RARE, 3)):
            y, x = (int(torch.randint(SIZE - side, ())) for _ in range(2))
            label[max(y - 1, 0) : y + side + 1, max(x - 1, 0) : x + side + 1] = UNLABELED
            label[y : y + side, x : x + side] = kind
            image[0, y : y + side, x : x + side] = kind / 2
    return images + 0.25 * torch.randn_like(images), labels


def network():
    """A small convolutional network with logits (B, 3, H, W)."""
    layers = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1)]
    return nn.Sequential(*layers)


def train(lam):
    """Recall of each class on new images, in percent, and the share of all weight that the rare class has in the last batch."""
    torch.manual_seed(0)
    model, criterion = network(), ab.ABLoss(ab.CrossEntropy(ignore_index=UNLABELED), lam=lam)
    optimizer = ab.ABAdam(model.parameters(), lr=0.003)
    for _ in range(STEPS):
        images, labels = batch()
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()
    weights = criterion.last.weights  # (B, H, W), 0 where there is no label
    share = 100 * weights[labels == RARE].sum() / weights.sum()
    images, labels = batch(32)
    found = model(images).argmax(1)
    recall = [100 * (found == kind)[labels == kind].float().mean().item() for kind in range(3)]
    return [round(r) for r in recall], round(share.item(), 1)


for name, lam in {"plain mean": math.inf, "ABLoss(lam=0.2)": 0.2}.items():
    recall, share = train(lam)
    print(f"{name:15} recall of background, large and rare: {recall} %; weight of the rare class: {share} %")
