"""The rows of a batch of Transformers: logits and labels with one row for each label, and figures of the tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..losses import LogitLoss

IGNORED = -100  # the label of the rows that do not count, in all of Transformers
_CHUNK = 256  # tokens whose logits `figures_of_head` makes at once


def without_labels(inputs: dict[str, Any], names: list[str]) -> tuple[dict[str, Any], Tensor]:
    """The inputs of the model without the labels, so that it makes no loss of its own, and the labels."""
    shifted = inputs.get("shift_labels") is not None
    taken = ["shift_labels"] if shifted else [name for name in names if inputs.get(name) is not None]
    if len(taken) != 1:
        raise ValueError(
            f"inputs: got {', '.join(inputs)}, in which the labels are {', '.join(taken) or 'missing'}; expected one tensor of"
            f" labels, under the name {' or '.join(names)} (TrainingArguments(label_names=[...]) changes it)"
        )
    return {name: x for name, x in inputs.items() if name not in ("shift_labels", *names)}, inputs[taken[0]]


_PROMPTS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")  # of PEFT, whose virtual tokens make the logits longer


def with_virtual_tokens(model: Any, inputs: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The inputs with a label that does not count for each virtual token, which PEFT puts before the tokens of a sequence."""
    config = getattr(model, "active_peft_config", None)
    if config is None or str(getattr(config.peft_type, "value", config.peft_type)) not in _PROMPTS:
        return inputs
    longer = {name: inputs[name] for name in ("shift_labels", *names) if inputs.get(name) is not None}
    return inputs | {name: nnf.pad(x, (config.num_virtual_tokens, 0), value=IGNORED) for name, x in longer.items()}


def next_labels(labels: Tensor) -> Tensor:
    """The label of the next token at each position. The last position of a sequence has none, and does not count."""
    return nnf.pad(labels[..., 1:], (0, 1), value=IGNORED)


def rows(logits: Tensor, labels: Tensor, criterion: Any) -> tuple[Tensor, Tensor]:
    """Logits (n, C) and labels (n), of which all count, unless the criterion itself ignores the others.

    Logits are (B, C), (B, T, C) with labels (B, T), or dense: (B, C, d1, ...) with labels (B, d1, ...). Predictions of a
    regression, (B, 1) with labels (B), become (B).
    """
    labels = labels.to(logits.device)
    if logits.shape == (*labels.shape, 1) and not of_logits(criterion):
        logits, labels = logits.flatten(), labels.flatten()
    elif logits.dim() > 2:
        if _classes_are_second(logits.shape, labels.shape):
            logits = logits.movedim(1, -1)
            labels = labels.movedim(1, -1) if labels.dim() == logits.dim() else labels
        labels = labels.reshape(-1, *labels.shape[logits.dim() - 1 :])
        logits = logits.reshape(-1, logits.shape[-1])
    ignores = of_logits(criterion) and criterion.ignore_index == IGNORED
    if ignores or labels.is_floating_point() or labels.dim() != 1:
        return logits, labels
    counts = labels != IGNORED
    return logits[counts], labels[counts]


def of_logits(criterion: Any) -> bool:
    """Whether a criterion is one of the losses that choose one class of several."""
    return isinstance(criterion, (LogitLoss, nn.CrossEntropyLoss))


def _classes_are_second(logits: torch.Size, labels: torch.Size) -> bool:
    """Whether dimension 1 of the logits is that of the classes, and not the last.

    If the shapes fit both, three dimensions are those of a sequence (B, T, C), and more are those of an image (B, C, H, W).
    """
    last = labels[: len(logits) - 1] == logits[:-1]
    second = labels in (logits, torch.Size([logits[0], *logits[2:]]))
    if not last and not second:
        dense = "B, C, " + ", ".join(f"d{i}" for i in range(1, len(logits) - 1))
        raise ValueError(
            f"labels: got shape {tuple(labels)} with logits {tuple(logits)}, expected {tuple(logits[:-1])} (the last dimension is"
            f" that of the classes) or {(logits[0], *logits[2:])} (dense logits: {dense}); bring logits and labels to one size in"
            " the model's forward, with torch.nn.functional.interpolate for example"
        )
    return second and not (last and len(logits) == 3)


@torch.no_grad()
def figures(logits: Tensor, labels: Tensor) -> Tensor:
    """(3): how many of the labels count, the sum of the entropies of their logits, and how many have the largest logit."""
    counts = labels != IGNORED
    logits, labels = logits[counts].float(), labels[counts]
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum()
    return torch.stack([counts.sum().to(entropy.dtype), entropy, (logits.argmax(-1) == labels).sum().to(entropy.dtype)])


@torch.no_grad()
def figures_of_head(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    """The `figures` of a linear head, without storing its logits. labels: in the shape of hidden without its last dimension."""
    counts = labels != IGNORED
    hidden, labels = hidden[counts], labels[counts]
    chunks = zip(hidden.split(_CHUNK), labels.split(_CHUNK), strict=True)
    return torch.stack([figures(nnf.linear(x, weight, bias), y) for x, y in chunks]).sum(0)
