"""The head of a language model: where it is inside the wrappers of a model, and how it computes a loss instead of logits.

A model is called through its wrapper (DistributedDataParallel, FSDP, PEFT, torch.compile), because only so do the processes
average their gradients, and the head's weight is whole only during the wrapper's forward. So the loss is computed there too: for
one call the forward of the head is replaced by one that returns the loss, which the model hands out as its logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._compiled import outside_graphs

_WRAPPERS = ("module", "_orig_mod")  # the attributes by which wrappers of torch and DeepSpeed hold what they wrap


class Head(NamedTuple):
    """The head of a model, and the model that says which of its modules it is."""

    model: nn.Module
    linear: nn.Linear


def find_head(wrapped: nn.Module) -> Head:
    """The head of a causal language model inside its wrappers.

    TypeError if there is none, or it is no plain torch.nn.Linear.
    """
    if isinstance(wrapped, nn.DataParallel):
        raise TypeError(
            "model: got a torch.nn.DataParallel, which copies the model in every forward; expected one process per device, with"
            " torch.nn.parallel.DistributedDataParallel"
        )
    model: Any = wrapped
    while not hasattr(model, "get_output_embeddings"):
        inner = next((getattr(model, name) for name in _WRAPPERS if isinstance(getattr(model, name, None), nn.Module)), None)
        if inner is None:
            raise TypeError(
                f"model: got {type(wrapped).__name__}, in which no module has get_output_embeddings(); expected a causal language"
                " model as of Hugging Face transformers, or use LinearABLoss on its hidden states and its head"
            )
        model = inner
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TypeError(
            f"model: got {type(model).__name__}, an encoder-decoder model, whose labels are not shifted; expected a causal"
            " language model"
        )
    name = type(base_of(model)).__name__
    if name.endswith("ForMaskedLM"):  # the configs of BERT and others do not say it
        raise TypeError(
            f"model: got {name}, a masked language model, whose labels are not shifted; expected a causal"
            " language model, or use LinearABLoss on its hidden states and its head"
        )
    return Head(model, _plain_linear(model, model.get_output_embeddings()))


def base_of(model: Any) -> nn.Module:
    """The model inside PEFT's wrapper; any other model itself."""
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return base


def _plain_linear(model: nn.Module, given: Any) -> nn.Linear:
    """The linear layer in which the head's product is made."""
    head = given
    while not isinstance(head, nn.Linear):
        copies = getattr(head, "modules_to_save", None)  # PEFT: trained copies of a whole module
        if isinstance(copies, nn.ModuleDict):
            active = [copies[name] for name in head.active_adapters if name in copies]
            inner = head.original_module if head.disable_adapters or not active else active[0]
        elif hasattr(head, "base_layer"):
            raise TypeError(
                f"model: got a head that is adapted ({type(head).__name__}), so its logits are not hidden @ weight.T; expected"
                " the adapter on other modules: leave the head out of target_modules, or train all of it with"
                " modules_to_save=['lm_head'] (by the name of your model's head)"
            )
        else:
            inner = next((getattr(head, name) for name in _WRAPPERS if isinstance(getattr(head, name, None), nn.Module)), None)
        if inner is None:
            break
        head = inner
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"model: got {type(model).__name__} with {type(given).__name__} as get_output_embeddings(), expected a"
            " torch.nn.Linear; for another head use ABLoss on the model's logits"
        )
    return head


@contextmanager
def head_computes(head: Head, loss_of: Callable[[Tensor, nn.Linear], Tensor]) -> Iterator[None]:
    """Within it the head returns loss_of(its input, the head).

    RuntimeError, when the model is called, unless the head runs once, and the model hands out what it returned.
    """
    made: list[Tensor] = []
    versions: list[int] = []
    linear = head.linear

    @outside_graphs  # so that the model hands out this very tensor
    def forward(hidden: Tensor) -> Tensor:
        if made:
            raise RuntimeError("causal_lm_loss: the model called its head twice in one forward, expected one call")
        made.append(loss_of(hidden, linear))
        versions.append(_version(made[0]))
        return made[0]

    @outside_graphs
    def check(_: nn.Module, __: Any, outputs: Any) -> None:
        name = type(head.model).__name__
        if not made:
            raise RuntimeError(f"causal_lm_loss: {name} did not call its head, expected logits = head(hidden) in its forward")
        if logits_of(outputs) is not made[0] or _version(made[0]) != versions[0]:
            raise RuntimeError(_LOGITS_CHANGE.format(name))

    own = vars(linear).get("forward")  # a framework may have put one there
    linear.forward = forward  # type: ignore[method-assign, assignment]
    hook = head.model.register_forward_hook(check, prepend=True)  # FSDP's hook may cast the loss
    try:
        yield
    except (IndexError, TypeError) as error:
        if not made:
            raise
        raise RuntimeError(_LOGITS_CHANGE.format(type(head.model).__name__)) from error
    finally:
        hook.remove()
        del linear.forward
        if own is not None:
            linear.forward = own  # type: ignore[method-assign]


_LOGITS_CHANGE = (
    "causal_lm_loss: {} changes its logits after the head (a scale or a softcap, for example), so they are not"
    " hidden @ weight.T; expected a model that returns what its head returns; for this one use ABLoss on the model's logits"
)


def _version(x: Tensor) -> int:
    """How often x was changed in place; 0 in inference mode, where torch does not count."""
    return 0 if x.is_inference() else x._version


def logits_of(outputs: Any) -> Any:
    """The logits in the outputs of a model, which are a mapping, a tuple or the logits themselves."""
    if isinstance(outputs, Mapping):
        return outputs.get("logits")
    return outputs if isinstance(outputs, Tensor) else outputs[0]
