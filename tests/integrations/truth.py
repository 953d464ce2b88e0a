"""The truth of every integration: a plain loop with one big batch for each optimizer step, in the formulas of reference/.

A framework trains the same model in micro-batches, on one or two processes, with its own clipping. Its parameters must be those
of this loop. The loop uses torch's optimizers and torch's clip_grad_norm_, and nothing of the modules under test.
"""

import copy
import dataclasses
import math
import os
from functools import partial

import torch
import torch.nn.functional as F
import two_processes
from torch import nn

from absgd_fast import reference

FEATURES, CLASSES, ROWS = 5, 4, 3  # ROWS: samples of a micro-batch
EPOCHS = 4
LAM = -0.5
CLIP = 0.2  # a norm that clips every step of `network` on `samples`
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # the largest difference of a parameter

# eps is far above a gradient's rounding: Adam's first steps are lr g / (|g| + eps), and a g that is nothing but rounding would be
# a whole step.
OPTIMIZERS = {
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "AdamW": partial(torch.optim.AdamW, lr=0.01, eps=1e-4),
}
# Every pair of an optimizer and a dtype that the integrations are compared in: AdamW in float32 divides rounding by rounding.
EXACT = [("SGD", torch.float32), ("SGD", torch.float64), ("AdamW", torch.float64)]


# ---- models and batches ------------------------------------------------------------------------------------------------------


def network(dtype=torch.float32):
    """A small classifier; the same parameters in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Softplus(), nn.Linear(8, CLASSES)).to(dtype)


def samples(n, dtype=torch.float32, seed=0):
    """x (n, FEATURES) and y (n): labels that follow x, a third of them wrong, so that the weights differ."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n, FEATURES, generator=draw, dtype=torch.float64) * torch.linspace(0.5, 2, n, dtype=torch.float64)[:, None]
    y = x[:, :CLASSES].argmax(1)
    wrong = torch.rand(n, generator=draw) < 1 / 3
    return x.to(dtype), torch.where(wrong, torch.randint(CLASSES, (n,), generator=draw), y)


def group_sizes(batches, k):
    """How many micro-batches each optimizer step of an epoch has: 10 in fours are 4, 4 and 2."""
    return [min(k, batches - start) for start in range(0, batches, k)]


def big_batches(tensors, batches, k, epochs, *, processes=1, rows=ROWS):
    """The batch of every optimizer step, as tuples of tensors.

    Args:
        tensors: the data, in the order in which they are drawn in every epoch.
        batches: the number of micro-batches that one process draws in an epoch.
        k: the number of micro-batches of a step; or a list of it, one for each epoch.
        processes: how many processes draw micro-batches in turn; the first one takes the first `rows` samples.
    """
    for epoch in range(epochs):
        start = 0
        for size in group_sizes(batches, k[epoch] if isinstance(k, list) else k):
            stop = start + size * rows * processes
            yield tuple(t[start:stop] for t in tensors)
            start = stop


# ---- the plain loop ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Trained:
    """What the plain loop leaves: the model, and of each step the plain mean loss and the gradient's norm before clipping."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    log_s: torch.Tensor
    means: list = dataclasses.field(default_factory=list)
    norms: list = dataclasses.field(default_factory=list)


def cross_entropy(net, batch):
    """The losses (n) of a batch (x, y)."""
    return F.cross_entropy(net(batch[0]), batch[1], reduction="none")


def train(net, batches, optimizer="SGD", *, lam=LAM, max_norm=None, losses_of=cross_entropy, normalizer="moving"):
    """Train a copy of `net` by the definition of ABSGD (docs/MATH.md §1.1) with one batch for each step.

    Args:
        net: the model at the start.
        batches: the batch of each step.
        optimizer: a key of OPTIMIZERS, or a function that makes one from parameters.
        lam: lambda; or a function from the number of the step to it. Where it changes, log s starts anew.
        max_norm: clip the gradient to this norm, and make sure that this binds in every step.
        losses_of: (net, batch) -> the losses (n) of the samples that count.
        normalizer: as that of `ABLoss`.
    """
    net = copy.deepcopy(net)
    params = [p for p in net.parameters() if p.requires_grad]
    make = OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer
    out = Trained(net, make(params), torch.tensor(-math.inf, dtype=torch.float64))
    before = None
    for step, batch in enumerate(batches):
        now = lam(step) if callable(lam) else lam
        if now != before:
            out.log_s, before = torch.full_like(out.log_s, -math.inf), now
        out.optimizer.zero_grad()
        losses = losses_of(net, batch)
        weights, out.log_s = reference.robust_weights(losses.detach(), out.log_s, now, normalizer=normalizer)
        (weights * losses).mean().backward()
        out.means.append(float(losses.detach().mean()))
        norm = nn.utils.clip_grad_norm_(params, math.inf if max_norm is None else max_norm)
        assert max_norm is None or norm > max_norm, f"step {step}: a norm of {norm} is not clipped by {max_norm}"
        out.norms.append(float(norm))
        out.optimizer.step()
    return out


def wanted(batches=10, k=4, epochs=EPOCHS, dtype=torch.float32, processes=1, **options):
    """The plain loop on `network` and `samples`, as the trainings of Lightning and Accelerate have them. options: of `train`."""
    tensors = samples(batches * ROWS * processes, dtype)
    return train(network(dtype), big_batches(tensors, batches, k, epochs, processes=processes), **options)


def distance(net, other):
    """The largest difference of a parameter of two models."""
    pairs = list(zip(net.parameters(), other.parameters(), strict=True))
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def assert_same(net, truth, dtype=torch.float32):
    """The parameters of a model are those of the plain loop (a `Trained` or a model)."""
    far = distance(net, truth.net if isinstance(truth, Trained) else truth)
    assert far <= TOLERANCE[dtype], f"parameters differ by {far}"


# ---- two processes -----------------------------------------------------------------------------------------------------------


def _as_launched(body, port, rank, *args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(two_processes.RANKS),
        LOCAL_WORLD_SIZE=str(two_processes.RANKS),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    body(rank, *args)


def in_two_processes(body, tmp_path, *args):
    """body(rank, *args) in two processes with a gloo group, in the environment that torchrun gives; an error fails the test.

    The group is initialised already, so frameworks take it. body: a function of a module, because it is pickled.
    """
    two_processes.run(partial(_as_launched, body, 29500), tmp_path, *args)
