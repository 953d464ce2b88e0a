"""What tests of several rooms take tensors and class vectors from. Without pytest: gpu_runner.py runs where there is none."""

import torch

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
# the same numbers (rows, classes, ...) in other places of memory
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced rows": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "sliced classes": lambda x: torch.stack([x, x + 1], 2).flatten(1, 2)[:, ::2],
    "wider row": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "offset of one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "permuted": lambda x: x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
}


def wide(dtype):
    """What losses of logits in `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def class_weight(classes):
    """Distinct values from 0.5 to 2, none of them 1: an unused or shifted weight shows."""
    return [0.5 + 1.5 * ((7 * c + 3) % 16) / 15.5 for c in range(classes)]


def counts(classes):
    """1 to 97 samples per class, neighbours unequal, the largest neither first nor last."""
    return [1 + (37 * c + 11) % 97 for c in range(classes)]


def equation_2(optimizer, params, set_grads, beta, decay):
    """Steps the optimizer twenty times with a changing lr. Yields, after each step, the parameters that Eq. 2 gives."""
    now = [p.detach().clone() for p in params]
    before = [p.clone() for p in now]
    for step in range(20):
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        set_grads(params, seed=step)
        optimizer.step()
        after = [w - lr * (p.grad + decay * w) + beta * (w - v) for w, v, p in zip(now, before, params)]
        before, now = now, after
        yield now
