"""The directional derivative of a forward along tangents of the parameters, taken beside the graph that autograd records."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ._compiled import is_compiled

Functions = frozenset[Callable[..., Any]]
Found = dict[int, Tensor]  # tangents by the id of their tensor

VIEWS = "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "expand", "narrow", "select", "__getitem__"
OTHERS = "clone", "contiguous", "to", "float", "double", "mean", "sum"
# Linear in the first argument, which alone has a tangent.
LINEAR: Functions = frozenset(
    getattr(owner, name) for owner in (torch, Tensor) for name in VIEWS + OTHERS if hasattr(owner, name)
) | {F.avg_pool2d, F.adaptive_avg_pool2d, F.interpolate}
SUMS: Functions = frozenset({torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_})
RECTIFIERS: Functions = frozenset({F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_})
# What they give depends on more than their arguments: here on a graph.
BLIND: Functions = frozenset({Tensor.grad.__get__})  # type: ignore[union-attr]
PLAIN = (int, float, str, type(None))  # of a model's output: what cannot hold a tensor
# Linear in the first and in the second argument; a third one is a bias.
PRODUCTS: Functions = frozenset({F.linear, torch.conv1d, torch.conv2d, torch.conv3d})


class Unknown(Exception):
    """A tensor that was computed where no tangent was followed."""


# Models whose tangents were lost on the way. Another try would take up to 0.6 plain steps for nothing.
UNFOLLOWED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def may_be_followed(model: nn.Module) -> bool:
    """Whether tangents of its forward are worth a try. A compiled layer runs no functions that could be followed."""
    return model not in UNFOLLOWED and not any(is_compiled(m) or m._compiled_call_impl for m in model.modules())


class _Known(NamedTuple):
    owner: Callable[[], Tensor | None]
    version: int  # of the owner: another one has been changed in place since
    tangent: Tensor | None  # None: 0


class Tangents(TorchFunctionMode):
    """Follows tangents through the calls of torch's functions, and keeps no graph of them.

        y = f(x, ...)      dy = sum over the arguments of (df/dx) dx,   computed at once after y

    The call itself is untouched: its result, its graph and its random numbers are those without this mode. One forward then gives
    outputs, their graph and their tangents, where forward_ad beside a training forward would compute all outputs again.
    Convolutions, linear layers, sums, ReLU, views, pooling and BatchNorm have rules; any other function is called again with dual
    numbers, which torch differentiates forward.

    A tangent is known of every tensor that requires a gradient. Where one is not (a custom autograd.Function, TorchScript, a
    compiled function, a function that calls another one, a tensor changed in place after it was used), `lost` is true from then
    on, and no tangent is given. `missing` names a function of which torch has no forward derivative, and does not say so itself.

    Args:
        tangents: pairs of a tensor that the forward uses and its tangent; None: 0.
        recurrent: whether the forward may run a recurrent network.
        generators: the random generators of the forward.

    >>> w = torch.tensor([3.0], requires_grad=True)
    >>> with Tangents([(w, torch.tensor([1.0]))]) as tangents:
    ...     y = w * w
    >>> tangents.of(y)
    tensor([6.])
    """

    def __init__(
        self,
        tangents: Iterable[tuple[Tensor, Tensor | None]],
        recurrent: bool = False,
        generators: Iterable[torch.Generator] = (),
    ):
        super().__init__()
        self.lost, self.missing = False, ""
        self._recurrent, self._generators = recurrent, list(generators)
        self._known: dict[int, _Known] = {}
        for owner, tangent in tangents:
            self._learn(owner, tangent)

    def of(self, x: Any) -> Tensor | None:
        """The tangent of x; None: 0, or a number. Raises Unknown if it is not known, or if x may hold tensors."""
        if isinstance(x, PLAIN):
            return None
        if not isinstance(x, Tensor):
            raise Unknown
        if not x.requires_grad:
            return None
        known = self._known.get(id(x))
        if self.lost or known is None or known.owner() is not x or known.version != version(x):
            raise Unknown
        return known.tangent

    def _learn(self, x: Tensor, tangent: Tensor | None) -> None:
        if tangent is not None and tangent.stride() != x.stride():
            tangent = torch.empty_like(x, requires_grad=False).copy_(tangent)  # views of it are then as possible as those of x
        key, myself = id(x), weakref.ref(self)  # not self, which would be a circle of references

        def forget(owner: object) -> None:
            known = {} if (me := myself()) is None else me._known
            if key in known and known[key].owner is owner:
                del known[key]

        self._known[key] = _Known(weakref.ref(x, forget), version(x), tangent)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.lost or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        given = tree_leaves((args, kwargs))
        inputs = [x for x in given if isinstance(x, Tensor)]
        # before the call, which may change them in place
        versions = [version(x) for x in inputs]
        try:
            if func in BLIND or any(callable(x) and not isinstance(x, type) for x in given):
                raise Unknown  # a function among the arguments may use parameters
            found: Found | None = {id(x): t for x in inputs if (t := self.of(x)) is not None}
        except Unknown:
            found = None
        random = self._random() if found and func not in RULES else []
        out = func(*args, **kwargs)
        outputs = [x for x in _tensors(out) if x.requires_grad]
        if not outputs:
            return out
        if found is None:
            self._lose()
            return out
        changed = [x for x, before in zip(inputs, versions) if version(x) != before]
        try:
            # A dispatch mode of the caller's, such as that of selective checkpointing, is not to see how tangents are computed.
            with _disable_current_modes():
                self._follow(func, args, kwargs, out, found, changed, random)
        except Exception:  # no forward mode, most likely; the caller's forward goes on whatever it is
            self._lose()
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any, found: Found, changed: list[Tensor], random: list) -> None:
        """Learn the tangents of a call's outputs."""
        tangents: list[Tensor | None] | None = None
        with torch.no_grad():
            if not found:
                tangents = [None for _ in _tensors(out)]
            elif func in RULES and isinstance(out, Tensor) and (not changed or func in WITHOUT_OLD_VALUES):
                tangent = _by_rule(func, found, out, args, kwargs)
                tangents = None if tangent is None else [tangent]
            if tangents is None:
                tangents = self._by_dual_numbers(func, args, kwargs, found, changed, random)
                if any(t is None and x.requires_grad for x, t in zip(_tensors(out), tangents, strict=True)):
                    self.missing = getattr(func, "__name__", str(func))
                    raise Unknown
        for x, tangent in zip(_tensors(out), tangents, strict=True):
            if x.requires_grad:
                self._learn(x, tangent)

    def _by_dual_numbers(
        self, func: Any, args: Any, kwargs: Any, found: Found, changed: list[Tensor], random: list
    ) -> list[Tensor | None]:
        """The tangents by another call, with the random numbers of the first."""
        if changed:
            raise Unknown  # its old values are gone
        after = self._random()
        again = bool(random) and any(not torch.equal(a, b) for a, b in zip(random, after))
        if again:
            self._set_random(random)
        try:
            with forward_ad.dual_level(), _without_shortcuts(self._recurrent):

                def dual(x: Any) -> Any:
                    return dual_number(x, found.get(id(x))) if isinstance(x, Tensor) and x.requires_grad else x

                out = func(*tree_map(dual, args), **tree_map(dual, kwargs))
                return [forward_ad.unpack_dual(x).tangent for x in _tensors(out)]
        finally:
            if again:
                self._set_random(after)

    def _lose(self) -> None:
        self.lost = True
        self._known.clear()

    def _random(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _set_random(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states):
            generator.set_state(state)


def version(x: Any) -> int:
    """How often x was changed in place; 0 for what torch does not count."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def _tensors(tree: Any) -> Iterable[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


# ---- torch's own forward mode --------------------------------------------------------------------------------------------

# Fused attention has neither a forward-mode nor a second derivative.
DIFFERENTIABLE_ATTENTION = partial(sdpa_kernel, SDPBackend.MATH)


def dual_number(x: Any, tangent: Tensor | None) -> Any:
    """x with this tangent, detached; None: 0. What is no tensor stays as it is."""
    if not isinstance(x, Tensor):
        return x
    return x.detach() if tangent is None else forward_ad.make_dual(x.detach(), tangent)


def graph_without_values() -> saved_tensors_hooks:
    """A context whose graphs say what depends on what, and cannot be walked back: their memory is free.

    Vectors stay, for the rule of BatchNorm. A forward that walks its own graph raises Unknown.
    """

    return saved_tensors_hooks(_vectors, _kept)


def _vectors(saved: Tensor) -> Tensor | None:
    return saved.detach() if saved.dim() == 1 else None


def _kept(saved: Tensor | None) -> Tensor:
    if saved is None:
        raise Unknown
    return saved


def _saved_are_at_hand() -> bool:
    """Whether the graph gives a saved tensor for nothing. A hook of another one may compute it, as a checkpoint's does."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is None or hooks[0] is _vectors


def refuse(function: str) -> NoReturn:
    """RuntimeError, because a function has no forward derivative."""
    raise RuntimeError(f'jvp: torch has no forward derivative of {function}; use method="finite_difference"')


def tangent_of(x: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(x).tangent
    return torch.zeros_like(x) if tangent is None else tangent


@contextmanager
def forward_mode(recurrent: bool, resting: Iterable[nn.Module] = ()) -> Iterator[None]:
    """A place for dual numbers. Its RuntimeErrors say what to do if torch has no forward mode.

    Dual numbers are detached, so no graph is recorded though gradients are enabled, as in training. What the caller computes
    under no_grad is a constant, as it is for backward.

    recurrent: whether a recurrent network may run in it. resting: modules that are in evaluation meanwhile.
    """
    training = [m for m in resting if m.training]
    for m in training:
        m.training = False
    try:
        with torch.enable_grad(), forward_ad.dual_level(), _without_shortcuts(recurrent), _ConstantsOfNoGrad():
            yield
    except RuntimeError as error:
        words = "forward AD", "forward mode", "jvp", "automatic differentiation"
        if not isinstance(error, NotImplementedError) and not any(w in str(error) for w in words):
            raise
        raise RuntimeError(
            f'jvp: torch cannot differentiate this model forward ({error}); use method="finite_difference"'
        ) from error
    finally:
        for m in training:
            m.training = True


class _ConstantsOfNoGrad(TorchFunctionMode):
    """Forward mode itself does not ask whether gradients are enabled."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with forward_ad._set_fwd_grad_enabled(torch.is_grad_enabled()):
            return func(*args, **(kwargs or {}))


@contextmanager
def _without_shortcuts(recurrent: bool) -> Iterator[None]:
    """Switch off what has no forward mode.

    That is fused attention, and the fast paths that torch takes for recurrent networks and transformer encoders without grad.
    """
    mha, mkldnn = torch.backends.mha, torch.backends.mkldnn
    fast_path, onednn = mha.get_fastpath_enabled(), mkldnn.enabled
    mha.set_fastpath_enabled(False)
    if recurrent:
        mkldnn.enabled = False  # type: ignore[assignment]  # a descriptor of torch's, which takes a bool
    try:
        with DIFFERENTIABLE_ATTENTION():
            yield
    finally:
        mha.set_fastpath_enabled(fast_path)
        mkldnn.enabled = onednn


# ---- rules: the tangent of an output, or None where the general way has to serve -----------------------------------------


def _by_rule(func: Any, found: Found, out: Tensor, args: Any, kwargs: Any) -> Tensor | None:
    try:
        return RULES[func](func, found, out, *args, **kwargs)
    except TypeError:  # its arguments have names that the rule does not know
        return None


def _linear(func: Any, found: Found, out: Tensor, x: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    if not isinstance(x, Tensor) or id(x) not in found or any(id(y) in found for y in _tensors((args, kwargs))):
        return None
    return func(found[id(x)], *args, **kwargs)


def _pad(func: Any, found: Found, out: Tensor, x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Tensor | None:
    return func(found[id(x)], pad, mode)  # the value is a constant


def _sum(func: Any, found: Found, out: Tensor, x: Any, y: Any, **kwargs: Any) -> Tensor | None:
    if kwargs:
        return None
    a, b = found.get(id(x)), found.get(id(y))
    if a is None or b is None:
        one = b if a is None else a
        return None if one is None else one.to(out.dtype).expand(out.shape)
    return a + b


def _rectifier(func: Any, found: Found, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    return torch.ops.aten.threshold_backward(found[id(x)], out.detach(), 0)


def _product(
    func: Any, found: Found, out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor | None:
    """f(dx, w) + f(x, dw) + db. Detached, because under autocast torch would cache a copy of w that has no gradient."""
    dx, dw, db = (None if t is None else found.get(id(t)) for t in (x, w, bias))
    terms = [] if dw is None else [func(x.detach(), dw, db, *args, **kwargs)]
    if dx is not None:
        terms.append(func(dx, w.detach(), None if terms else db, *args, **kwargs))
    if not terms:
        return None
    return terms[0] if len(terms) == 1 else terms[0].add_(terms[1])


def _batch_norm(
    func: Any,
    found: Found,
    out: Tensor,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """Of y = weight z + bias, where z = (x - mean) / deviation: weight dz + dweight z + dbias.

    The derivative of z by x is symmetric, so the backward kernel makes weight dz from dx as it makes a gradient.
    """
    if not training:
        return None
    dx, dw, db = (None if t is None else found.get(id(t)) for t in (x, weight, bias))
    x, weight, node = x.detach(), None if weight is None else weight.detach(), out.grad_fn
    if type(node).__name__ == "NativeBatchNormBackward0" and _saved_are_at_hand():
        mean, inverse = node._saved_result1, node._saved_result2  # type: ignore[union-attr]
    else:
        variance, mean = torch.var_mean(x.float() if x.dtype.itemsize < 4 else x, [0, *range(2, x.dim())], correction=0)
        inverse = (variance + eps).rsqrt()
    terms = []
    if dx is not None:
        first = [True, False, False]
        terms += torch.ops.aten.native_batch_norm_backward(dx, x, weight, None, None, mean, inverse, True, eps, first)[:1]
    if dw is not None or db is not None:
        scale, shift = torch.zeros_like(mean) if dw is None else dw, torch.zeros_like(mean) if db is None else db
        terms.append(F.batch_norm(x, mean, inverse**-2 - eps, scale, shift, False, 0.0, eps))
    return terms[0] if len(terms) == 1 else terms[0].add_(terms[1])


RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys(LINEAR, _linear),
    **dict.fromkeys(SUMS, _sum),
    **dict.fromkeys(RECTIFIERS, _rectifier),
    **dict.fromkeys(PRODUCTS, _product),
    F.pad: _pad,
    F.batch_norm: _batch_norm,
}
WITHOUT_OLD_VALUES = SUMS | RECTIFIERS | {F.batch_norm}
