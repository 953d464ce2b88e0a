"""causal_lm_loss: the robust loss of a causal language model, without stored logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal, overload

import torch.nn.functional as nnf
from torch import Tensor, nn

from ..linear import LinearABLoss
from .head import base_of, find_head, head_computes

IGNORED = -100  # by which the labels of a causal language model mark the tokens that do not count
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")  # inputs that the loss uses, and the model does not


@overload
def causal_lm_loss(
    criterion: LinearABLoss, model: nn.Module, inputs: Mapping[str, Any], return_outputs: Literal[False] = False
) -> Tensor: ...
@overload
def causal_lm_loss(
    criterion: LinearABLoss, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool
) -> Tensor | tuple[Tensor, Any]: ...
def causal_lm_loss(
    criterion: LinearABLoss, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool = False
) -> Tensor | tuple[Tensor, Any]:
    """The robust loss of a causal language model, whose logits are never stored.

        L_bt = loss of the logits at position t for labels[b, t + 1],    loss = criterion's value over all tokens that count

    The model is one of Hugging Face transformers, or another with `get_output_embeddings()` whose forward takes the entries of
    `inputs` as keywords. It may stand in its wrappers: DistributedDataParallel, FSDP, PEFT and torch.compile. It is called as it
    is given, once, so that its wrappers work as always. During this call its head returns the loss instead of logits, and
    `LinearABLoss` makes loss and gradients a chunk of tokens at a time. Outside of the call the model is as before; call it for
    logits.

    Args:
        criterion: a `LinearABLoss`, such as ``DFT(linear=True)``, with any of its options. `criterion.last` has the losses and
            weights of the tokens as (B, T), in which position t belongs to labels[:, t + 1], and the last one is ignored.
        model: in training mode or not. The head must be a torch.nn.Linear. Its weight may be tied to the embedding, frozen, or
            trained by PEFT's modules_to_save.
        inputs: the batch: "input_ids", "attention_mask" and what else the model takes, and "labels" (B, T), int64. Labels of
            -100 do not count; attention_mask has no part in that. Instead of labels it may have "shift_labels" (B, T), which are
            shifted already. Entries that the model does not take are left out.
        return_outputs: also return the outputs of the model, with the loss as `loss` and None as `logits`.

    Returns:
        The loss, 0-d; with return_outputs the loss and the outputs. The loss is the criterion's alone: that of a mixture of
        experts for balance is `outputs.aux_loss`, if the model was asked for it.

    Raises:
        TypeError: the criterion is no `LinearABLoss`; the model has no head, or one that is no plain linear layer (one with LoRA,
            for example), or is a masked language model; labels that are no tensor.
        ValueError: inputs without labels, or with labels of another shape than the hidden states.
        RuntimeError: the model changes its logits after the head (a scale, a softcap), or does not call its head.

    >>> class Model(torch.nn.Module):  # as one of transformers
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.body, self.head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
    ...     def get_output_embeddings(self):
    ...         return self.head
    ...     def forward(self, input_ids):
    ...         return {"logits": self.head(self.body(input_ids))}
    >>> tokens, criterion = torch.arange(6).view(2, 3), DFT(linear=True)
    >>> causal_lm_loss(criterion, Model(), {"input_ids": tokens, "labels": tokens}).backward()
    >>> criterion.last.losses.shape
    torch.Size([2, 3])

    Source: shift and labels of -100 as in Hugging Face transformers; docs/MATH.md §6.
    """
    if not isinstance(criterion, LinearABLoss):
        raise TypeError(
            f"criterion: got {type(criterion).__name__}, expected a LinearABLoss, which stores no logits, such as"
            " LinearABLoss(lam=...) or DFT(linear=True)"
        )
    target = _next_tokens(inputs)
    head = find_head(model)
    taken = _taken(head.model, {name: value for name, value in inputs.items() if name not in _OF_THE_LOSS})

    def loss_of(hidden: Tensor, linear: nn.Linear) -> Tensor:
        return criterion(hidden, linear.weight, _for_hidden(target, hidden, criterion), linear.bias)

    with head_computes(head, loss_of):
        outputs = model(**taken)
    loss, outputs = _split(outputs)
    return (loss, outputs) if return_outputs else loss


def _next_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """(B, T) the label of each position: that of the next token. The last position has none."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: got {type(inputs).__name__}, expected a mapping with input_ids, labels and so on")
    shifted, labels = inputs.get("shift_labels"), inputs.get("labels")
    given = labels if shifted is None else shifted
    if given is not None and not isinstance(given, Tensor):
        name = "labels" if shifted is None else "shift_labels"
        raise TypeError(f"{name}: got {type(given).__name__}, expected a tensor (B, T) of int64; use torch.tensor({name})")
    if given is None:
        raise ValueError(
            f"inputs: got {sorted(map(str, inputs))}, expected labels (B, T) too, with {IGNORED} where a token does not count; to"
            " train on all tokens they are input_ids.masked_fill(attention_mask == 0, -100)"
        )
    return given if shifted is not None else nnf.pad(given[..., 1:], (0, 1), value=IGNORED)


def _for_hidden(target: Tensor, hidden: Tensor, criterion: LinearABLoss) -> Tensor:
    """The target on the device of hidden (B, T, d), with the number by which the criterion ignores."""
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels: got shape {tuple(target.shape)} with hidden states {tuple(hidden.shape)}, expected"
            f" {tuple(hidden.shape[:-1])}; leave logits_to_keep out of the inputs, and give virtual tokens the label {IGNORED}"
        )
    target = target.to(hidden.device)
    ignore_index = getattr(criterion.criterion, "ignore_index", IGNORED)
    return target if ignore_index == IGNORED else target.masked_fill(target == IGNORED, ignore_index)


def _taken(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that the model's forward takes."""
    parameters = inspect.signature(base_of(model).forward).parameters  # PEFT's forward takes what its base takes
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


def _split(outputs: Any) -> tuple[Tensor, Any]:
    """The loss that a model returned as its logits, and the outputs as if it were the loss."""
    if isinstance(outputs, Tensor):
        return outputs, outputs
    if isinstance(outputs, Mapping):  # transformers' outputs too, which take their fields as keywords
        fields = {**outputs, "loss": outputs["logits"]}
        fields["logits"] = None
        return fields["loss"], type(outputs)(**fields)
    return outputs[0], outputs
