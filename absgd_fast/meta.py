"""Learning to reweight examples (L2RW): each sample counts by how much a step on it would help on a small clean batch.

The paper takes the weights from the second derivative of an unrolled step. That derivative is a product of first derivatives, and
one directional derivative gives it for all samples at once, for any differentiable model (docs/MATH.md §4.5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import _checks, _tangents, ops
from ._compiled import is_compiled
from ._exact import ExactState, state_tensors
from ._tangents import Tangents, Unknown, dual_number, forward_mode, tangent_of, version
from .reference import real_dtype

METHODS = ("jvp", "finite_difference", "unrolled", "last_layer")
Batch = tuple[Tensor, Tensor]
LossFn = Callable[[Tensor, Tensor], Tensor]

# How far a central difference moves the parameters to either side, by their dtype: as a share of the length of all parameters.
# For parameters shorter than SHORTEST it is a share of that, so a model that starts at 0 is moved too.
STEP = {torch.float32: 1e-5, torch.float64: 1e-8}
SHORTEST = 10.0
# Multiplies a float16 clean loss, so that small gradients do not vanish. At 2^10 the gradients of a ResNet leave the range.
LOSS_SCALE = 2.0**5


def l2rw_weights(model: nn.Module, loss_fn: LossFn, batch: Batch, clean_batch: Batch, method: str = "jvp") -> Tensor:
    """L2RW weights of a training batch: each sample counts by how much it would lower the loss of a clean batch.

        u_i  = <grad f_i, grad g>                      f_i: loss of training sample i; g: mean loss of the clean batch
        w~_i = max(u_i, 0)
        w    = w~ / (sum w~ + 1[sum w~ = 0])           sums to 1, or all are 0

    Use it for noisy or imbalanced data if you have a small clean, balanced batch. `l2rw_loss` gives weights and loss for less.
    Source: Ren et al. 2018, "Learning to Reweight Examples for Robust Deep Learning", Alg. 1, Eq. 7 to 9 and 12;
    docs/MATH.md §4.5.

    The ways to compute u:

        "jvp"                one forward-mode derivative along grad g. It is exact, and serves every model that torch can
                             differentiate forward.
        "finite_difference"  (f_i(theta + e grad g) - f_i(theta - e grad g)) / 2e, with a small e |grad g| / |theta|. It needs no
                             more than forwards, so custom functions work too. In float32 |w - w*|_1 is 1e-4 to 1e-2.
        "unrolled"           the definition: the derivative of g(theta - sum_i eps_i grad f_i) by eps at 0, by double backward.
        "last_layer"         only the part of u that comes from the parameters of the last layer (Eq. 12). The step costs little
                             more than a plain one.

    The model is left as it was: gradients, buffers (running statistics of BatchNorm among them) and torch's random state. In
    training mode BatchNorm normalises by the batch in every pass. The passes over the training batch draw the same dropout masks
    as the caller's next forward, so that weights and loss belong together.

    Args:
        model: any nn.Module; all its parameters that require grad take part.
        loss_fn: loss_fn(model(inputs), targets) -> (B,) per-sample losses; a loss of this package or any other.
        batch: (inputs, targets) of B training samples. clean_batch: the same of M >= 1 clean samples, of the same shapes.
        method: one of the four names above.

    Returns:
        (B,) weights, detached, in the dtype of the losses. All are 0 if no sample helps (Eq. 9); then the gradient is 0, and
        momentum and weight decay go on. A sample whose u is not finite has w = NaN, and the others are weighed without it (with
        "unrolled" all are NaN then).

    Raises:
        ValueError: an unknown method; batches that are not pairs or do not fit each other; an empty clean batch; a loss_fn that
            does not return one loss per sample; a model without a parameter that requires grad; "finite_difference" with
            parameters narrower than float32; "last_layer" without a layer that has parameters, or with parameters outside of it
            that take part in the losses beside it.
        RuntimeError: "jvp" or "last_layer" through something that torch cannot differentiate forward.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> squares = lambda out, y: (out[:, 0] - y).square()
    >>> x, right = torch.tensor([[1.0], [2.0], [1.0]]), torch.tensor([2.0, 4.0, -9.0])  # the last is far off y = 2 x
    >>> _ = model.weight.data.fill_(1.0)
    >>> l2rw_weights(model, squares, (x, right), (torch.tensor([[3.0]]), torch.tensor([6.0])))
    tensor([0.2000, 0.8000, 0.0000])
    """
    return _Step(model, loss_fn, batch, clean_batch, method).weights()


def l2rw_loss(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Batch,
    clean_batch: Batch,
    method: str = "jvp",
    *,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The weighted loss of L2RW (learning to reweight), ready for backward.

    It weighs each training sample by how much a gradient step on it would lower the loss of the clean batch. The weights sum to
    1: do not divide the loss by B.

        loss = sum_i w_i f_i                           w: `l2rw_weights`, a constant for autograd

    One training forward serves both weights and loss. With "jvp" it serves the directional derivative too: each function of torch
    is differentiated right after it has run. A model with a custom autograd.Function, a compiled layer or TorchScript has another
    pass for that, as has one that changes views in place.
    Source: Ren et al. 2018, Alg. 1; docs/MATH.md §4.5.

    That forward is an ordinary one. It goes through `model` as it is (with DistributedDataParallel each process weighs
    its own batch by its own clean batch), moves BatchNorm's running statistics once, and draws random numbers once. The other
    passes leave no trace. Any optimizer may follow, and a GradScaler may scale the loss.

    Args:
        model, loss_fn, batch, clean_batch, method: as for `l2rw_weights`.
        return_weights: whether to return the weights too.

    Returns:
        0-d loss, in the dtype of the losses; with return_weights a pair (loss, (B,) weights).

    Raises:
        RuntimeError: under no_grad. The others as for `l2rw_weights`.

    >>> model = nn.Linear(4, 3)
    >>> batch = torch.randn(8, 4), torch.arange(8) % 3
    >>> loss = l2rw_loss(model, nn.CrossEntropyLoss(reduction="none"), batch, (batch[0][:3], batch[1][:3]))
    >>> loss.backward()
    """
    loss, weights = _Step(model, loss_fn, batch, clean_batch, method).loss()
    return (loss, weights) if return_weights else loss


def rectified(products: Tensor) -> Tensor:
    """w = max(u, 0) / (sum max(u, 0) + 1[sum = 0]) over the finite u, and NaN for the others (L2RW, Eq. 8 and 9; MATH §4.5).

    The weights are detached.
    """
    u = _checks.floating(products, "products", "one product per sample").detach().to(real_dtype(products.dtype)).contiguous()
    return ops.serving(products.device, None).rectified(u).to(products.dtype)


class _Call(NamedTuple):
    """A call of a layer in the training forward."""

    layer: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    place: GradientEdge  # of the output, in the graph
    shape: torch.Size  # of the output


class _Step:
    """The passes of one step.

    In `loss` the training forward is the caller's own. In `weights` it is a pass like the others: it uses the random numbers,
    buffers and running statistics that the caller's next forward will find, and puts them back.
    """

    calls: list[_Call]  # of layers, by the training forward
    mixed: bool  # whether a norm without parameters ran after the last of these calls

    def __init__(self, model: nn.Module, loss_fn: LossFn, batch: Batch, clean_batch: Batch, method: str):
        _checks.choice(method, "method", METHODS)
        self.batch, self.clean_batch = _checked_pairs(batch, clean_batch)
        self.model, self.loss_fn, self.method = model, loss_fn, method
        self.unwrapped = _unwrapped(model)
        self.params: dict[str, Tensor] = {name: p for name, p in self.unwrapped.named_parameters() if p.requires_grad}
        if not self.params:
            raise ValueError("model: got no parameter that requires grad, expected something to train")
        if any(isinstance(p, UninitializedParameter) for p in self.params.values()):
            raise ValueError("model: got lazy modules that have not seen a batch; expected one forward before")
        self.device = next(iter(self.params.values())).device
        others = sorted({str(p.dtype) for p in self.params.values() if p.dtype not in STEP})
        if method == "finite_difference" and others:
            raise ValueError(
                f"finite_difference: got parameters of {others[0]}, expected float32 or float64 (in a narrower type a small step"
                ' is lost to rounding); use method="jvp"'
            )
        self.norms = [m for m in self.unwrapped.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        frozen = {id(b) for m in self.norms for b in m.buffers(recurse=False)}
        buffers = dict(self.unwrapped.named_buffers()) | state_tensors(self.unwrapped)
        self.buffers = {name: b.clone() for name, b in buffers.items() if id(b) not in frozen}
        self.stateful = [m for m in self.unwrapped.modules() if isinstance(m, ExactState)]
        self.recurrent = any(isinstance(m, nn.RNNBase) for m in self.unwrapped.modules())
        self.random = self._random_state()
        self.calls, self.mixed = [], False

    def weights(self) -> Tensor:
        """(B,) the weights, without a trace of any pass."""
        losses = None
        with self._apart(), torch.enable_grad():
            if self.method == "jvp":
                return rectified(self._jvp())
            if self.method in ("unrolled", "last_layer"):
                with self._watched():
                    losses = self._losses(self.batch)
            return rectified(getattr(self, f"_{self.method}")(losses))

    def loss(self) -> tuple[Tensor, Tensor]:
        """The weighted loss and the weights, by the caller's own training forward."""
        if not torch.is_grad_enabled():
            raise RuntimeError("l2rw_loss: got gradients switched off (no_grad), expected them on; l2rw_weights needs none")
        if self.method == "jvp":
            with self._apart():
                tangents = self._clean_gradient(self.params)
            out, products_of = self._beside(partial(self.model, self.batch[0]), tangents)
            losses = self._per_sample(out, self.batch)
        else:
            with self._watched():
                losses = self._per_sample(self.model(self.batch[0]), self.batch)
            products_of = partial(getattr(self, f"_{self.method}"), losses)
        with self._apart(), torch.enable_grad():
            products = products_of()
        weights = rectified(products)
        return (weights * losses).sum(), weights

    # ---- u, up to a positive factor; `losses`: those of the training forward, with their graph ----

    def _jvp(self) -> Tensor:
        """u by a forward-mode derivative along the clean gradient."""
        tangents = self._clean_gradient(self.params)
        self._set_random_state(self.random)
        with self._unchanged():
            try:
                with _tangents.graph_without_values():
                    _, products_of = self._beside(partial(self._output, self.batch[0]), tangents)
            except Exception:  # a model that differentiates by itself, or has hooks of its own; another error comes once more
                products_of = partial(self._along, self.params, tangents)
            return products_of()

    def _along(self, params: dict[str, Tensor], tangents: list[Tensor]) -> Tensor:
        """u by a forward-mode derivative along these tangents, in a pass of its own over the training batch."""
        with forward_mode(self.recurrent, self.stateful):
            duals = {name: dual_number(p, t) for (name, p), t in zip(params.items(), tangents)}
            return tangent_of(self._losses(self.batch, duals))

    def _beside(self, forward: Callable[[], Any], tangents: list[Tensor]) -> tuple[Any, Callable[[], Tensor]]:
        """The output of this training forward, and what gives u from tangents that were taken beside it.

        Where they cannot be followed, a pass of its own gives u.
        """
        apart = partial(self._along, self.params, tangents)
        if not _tangents.may_be_followed(self.model):
            return forward(), apart
        inputs = self.batch[0]
        pairs = [*zip(self.params.values(), tangents), *([(inputs, None)] if inputs.requires_grad else [])]
        with Tangents(pairs, self.recurrent, self._generators()) as followed:
            out = forward()
        leaves, structure = tree_flatten(out)
        try:
            directions = [followed.of(x) for x in leaves]
        except Unknown:
            if followed.missing:
                return out, partial(_tangents.refuse, followed.missing)
            _tangents.UNFOLLOWED.add(self.model)
            return out, apart
        random, versions = self._random_state(), [version(x) for x in leaves]

        def through_loss() -> Tensor:
            if versions != [version(x) for x in leaves]:
                return apart()  # loss_fn has changed them in place
            self._set_random_state(random)
            with forward_mode(self.recurrent, self.stateful), self._unchanged():
                duals = [dual_number(x, t) for x, t in zip(leaves, directions)]
                return tangent_of(self._per_sample(tree_unflatten(duals, structure), self.batch))

        return out, through_loss

    def _finite_difference(self, losses: Tensor | None) -> Tensor:
        """u by a central difference along the clean gradient."""
        tangents, params = self._clean_gradient(self.params), [p.detach() for p in self.params.values()]
        # under autocast the losses would be rounded, and their difference would be noise
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            length = [torch.stack(torch._foreach_norm(x)).norm() for x in (params, tangents)]
            step = torch.where(length[1] > 0, STEP[params[0].dtype] * length[0].clamp(min=SHORTEST) / length[1], 0.0)
            moves = torch._foreach_mul(tangents, step)
            plus = self._losses(self.batch, dict(zip(self.params, torch._foreach_add(params, moves))))
            minus = self._losses(self.batch, dict(zip(self.params, torch._foreach_sub(params, moves))))
            return plus - minus

    def _unrolled(self, losses: Tensor) -> Tensor:
        """u by its definition, a second derivative."""
        weights = torch.zeros_like(losses, requires_grad=True)
        names, params = zip(*self.params.items())
        grads = torch.autograd.grad(weights @ losses, params, create_graph=True, allow_unused=True)
        moved = {name: p if grad is None else p - grad for name, p, grad in zip(names, params, grads)}
        with _tangents.DIFFERENTIABLE_ATTENTION():
            clean = self._losses(self.clean_batch, moved, apart=True).mean()
        grad = torch.autograd.grad(clean, weights, retain_graph=True, allow_unused=True)[0] if clean.requires_grad else None
        return torch.zeros_like(losses) if grad is None else -grad

    def _last_layer(self, losses: Tensor) -> Tensor:
        """The part of u from the last layer's parameters (Eq. 12): output gradients times a derivative of that layer."""
        if not self.calls:
            raise ValueError('last_layer: got a forward without a layer that has parameters to train; use method="jvp"')
        last = self.calls[-1].layer
        names = {id(p): name for name, p in last.named_parameters() if p.requires_grad}
        own = {name: p for name, p in self.params.items() if id(p) in names}
        inside, places = set(last.modules()), [call.place for call in self.calls if call.layer is last]
        if beyond := _reached_without(losses, places) & ({id(p) for p in self.params.values()} - names.keys()):
            name = next(name for name, p in self.params.items() if id(p) in beyond)
            raise ValueError(
                f"last_layer: took {type(last).__name__} for the last layer, but the losses also depend on {name} by another way"
                ' (a bare parameter, a compiled layer, several heads); use method="jvp"'
            )
        tied = any(id(p) in names for m in self.unwrapped.modules() if m not in inside for p in m._parameters.values())
        if tied or self.mixed:  # its parameters serve another layer too, or a norm mixes its outputs
            return self._along(own, self._clean_gradient(own))
        tangents, products = self._clean_gradient(own), torch.zeros_like(losses)
        before = self._random_state()
        for layer, args, kwargs, place, shape in self.calls:
            if layer is not last:
                continue
            if shape[:1] != losses.shape:
                raise ValueError(
                    f"last_layer: the output of {type(layer).__name__} has shape {tuple(shape)}, expected one row for each of"
                    f' the {len(losses)} samples; use method="jvp"'
                )
            slopes = torch.autograd.grad(losses.sum(), place, retain_graph=True)[0]
            with forward_mode(self.recurrent, self.stateful):
                duals = {names[id(p)]: dual_number(p, t) for p, t in zip(own.values(), tangents)}
                tangent = tangent_of(functional_call(layer, duals, args, kwargs))
                products = products + (slopes * tangent).flatten(1).sum(1)
        if any(not torch.equal(a, b) for a, b in zip(before, self._random_state())):
            # the layer draws random numbers, and drew others than in the training forward
            return self._along(own, self._clean_gradient(own))
        return products

    def _clean_gradient(self, params: dict[str, Tensor]) -> list[Tensor]:
        """grad g by `params`; all other parameters are constants. In float16 it has length 1."""
        leaves = {name: p.detach().requires_grad_(name in params) for name, p in self.params.items()}
        clean = self._losses(self.clean_batch, leaves, apart=True).mean()
        half = torch.is_autocast_enabled(self.device.type) and torch.get_autocast_dtype(self.device.type) == torch.float16
        half = half or any(p.dtype == torch.float16 for p in params.values())
        if half:
            clean = clean * LOSS_SCALE
        some = [leaves[name] for name in params]
        found: Sequence[Tensor | None] = [None] * len(some)
        if clean.requires_grad:
            found = torch.autograd.grad(clean, some, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g for p, g in zip(some, found)]
        if half:  # only its direction matters, and with length 1 it stays in range
            length = torch.stack([g.float().norm() for g in grads]).norm()
            grads = [(g / torch.where(length > 0, length, 1.0)).to(g.dtype) for g in grads]
        return grads

    # ---- passes that leave no trace ----

    def _losses(self, batch: Batch, params: dict[str, Tensor] | None = None, apart: bool = False) -> Tensor:
        """Per-sample losses of a pass that leaves no trace.

        params: used instead of the model's. apart: draw other random numbers than the training forward.
        """
        self._set_random_state(self.random)
        if apart:
            seed = int(torch.randint(2**62, (), device="cpu"))
            for generator in self._generators():
                generator.manual_seed(seed)
        with self._unchanged():
            return self._per_sample(self._output(batch[0], params), batch)

    def _output(self, inputs: Tensor, params: dict[str, Tensor] | None = None) -> Any:
        """The model's output, by copies of its buffers. params: used instead of the model's."""
        buffers = {name: b.clone() for name, b in self.buffers.items()}
        return functional_call(self.unwrapped, (params or {}) | buffers, (inputs,))

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Keep what criteria inside the model remember beside their buffers."""
        before = [found for m in self.stateful for found in m.also_changed()]
        try:
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)

    def _per_sample(self, out: Any, batch: Batch) -> Tensor:
        """The losses of the model's output. ValueError if loss_fn does not return one loss per sample."""
        losses = self.loss_fn(out, batch[1])
        count = len(batch[1])
        if not isinstance(losses, Tensor) or losses.shape != (count,) or not losses.is_floating_point():
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f'loss_fn: returned {got}, expected ({count},) per-sample losses; use reduction="none"')
        return losses

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Prepare the training forward for the method.

        For "last_layer" it records the calls of layers, which are modules with parameters whose children have none.
        """
        if self.method != "last_layer":
            with _tangents.DIFFERENTIABLE_ATTENTION() if self.method == "unrolled" else nullcontext():
                yield
            return

        def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any], out: object) -> None:
            if isinstance(out, Tensor) and out.requires_grad:
                # the place in the graph stays right if the output is changed in place afterwards
                self.calls.append(_Call(layer, args, kwargs, torch.autograd.graph.get_gradient_edge(out), out.shape))
                self.mixed = False

        def note_mixing(layer: nn.Module, args: tuple, out: object) -> None:
            self.mixed = True

        def trains(m: nn.Module) -> bool:
            return any(p.requires_grad for p in m.parameters())

        layers = [
            m
            for m in self.unwrapped.modules()
            if trains(m) and not any(trains(child) for name, child in m.named_children() if name != "parametrizations")
        ]
        mixing = [m for m in self.unwrapped.modules() if isinstance(m, _BatchNorm) and m.training and not trains(m)]
        handles = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
        handles += [layer.register_forward_hook(note_mixing) for layer in mixing]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Keep BatchNorm's running statistics and torch's random state as they are.

        Forward mode refuses to write running statistics, and BatchNorm in training mode computes the same without them.
        """
        random = self._random_state()
        for m in self.norms:
            m.track_running_stats = False
        try:
            yield
        finally:
            for m in self.norms:
                m.track_running_stats = True
            self._set_random_state(random)

    def _generators(self) -> list[torch.Generator]:
        """torch's default generators, of the CPU and of the model's GPU."""
        cuda = [torch.cuda.default_generators[self.device.index]] if self.device.type == "cuda" else []
        return [torch.default_generator, *cuda]

    def _random_state(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _set_random_state(self, state: list[Tensor]) -> None:
        for generator, s in zip(self._generators(), state):
            generator.set_state(s)


def _reached_without(losses: Tensor, places: list[GradientEdge]) -> set[int]:
    """ids of the leaves that the losses depend on by a way through none of these places in the graph."""
    found: set[int] = set()
    seen, ahead = {place.node for place in places}, [losses.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        ahead += [following for following, _ in node.next_functions]
    return found


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile and DistributedDataParallel, whose bookkeeping belongs to the training forward only."""
    while is_compiled(model) or isinstance(model, nn.parallel.DistributedDataParallel):
        model = model._orig_mod if is_compiled(model) else model.module
    return model


def _checked_pairs(batch: Batch, clean_batch: Batch) -> tuple[Batch, Batch]:
    """Both pairs as tuples. ValueError if they are not pairs of tensors, or do not fit each other."""
    for name, pair in (("batch", batch), ("clean_batch", clean_batch)):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(x, Tensor) and x.dim() for x in pair):
            raise ValueError(f"{name}: expected a pair of tensors (inputs, targets), got {type(pair).__name__}")
        inputs, targets = pair
        if len(inputs) != len(targets):
            raise ValueError(f"{name}: got {len(inputs)} inputs and {len(targets)} targets, expected as many of both")
    (inputs, targets), (clean_inputs, clean_targets) = batch, clean_batch
    if not len(clean_inputs):
        raise ValueError("clean_batch: got no sample, expected one at least")
    for name, x, clean in (("inputs", inputs, clean_inputs), ("targets", targets, clean_targets)):
        if x.shape[1:] != clean.shape[1:]:
            raise ValueError(
                f"clean_batch: got {name} of shape {tuple(clean.shape)}, expected (any, {', '.join(map(str, x.shape[1:]))}) as"
                f" those of the batch, {tuple(x.shape)}"
            )
    return (inputs, targets), (clean_inputs, clean_targets)
