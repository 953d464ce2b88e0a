"""Our cross-entropies against torch's, through the same situations: same value, same gradient, or the same exception.

`FORMS` has the ways in which cross-entropy is called here, each beside the same in torch. Every form goes through `SITUATIONS`
(dtypes, shapes, layouts, labels, extreme logits), and a few through the protocols below them (graphs, checkpointing, copies,
transforms, autocast, compilation, export, tensors without values).

Values and gradients are judged by torch in float64. `DIFFERENT` lists where we differ from torch on purpose, with the reason.
"""

import copy
import io
import math
import pickle
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import absgd_fast as ab
from absgd_fast.compat import losses as absgd_losses
from absgd_fast.compat import repository

INF = math.inf


# ---- forms ------------------------------------------------------------------------------------------------------------------


def mean_over_counted(logits, target, ignore_index=-100, **options):
    """The mean loss of the rows that count, 0 without any: what a robust loss is at lambda = inf (MATH 1.1, 1.4)."""
    losses = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none", **options)
    count = losses.numel() if target.is_floating_point() else int((target != ignore_index).sum())
    return losses.sum() / max(count, 1)


def mean_over_all(logits, target, **options):
    """The same for a callable, whose rows all count: an ignored one as a loss of 0."""
    losses = F.cross_entropy(logits, target, reduction="none", **options)
    return losses.sum() / max(losses.numel(), 1)


class Form(NamedTuple):
    """A way to call cross-entropy, ours(logits, target, **options), and the same in torch."""

    ours: Callable
    torchs: Callable


def linear(logits, target, **options):
    """LinearABLoss of a head whose logits are these: the identity matrix as the weight. The classes come last there."""
    if logits.dim() > 2:
        target = target.movedim(1, -1) if target.shape == logits.shape else target
        logits = logits.movedim(1, -1)
    criterion = ab.LinearABLoss(ab.CrossEntropy(**options), lam=INF)
    return criterion(logits, torch.eye(logits.shape[-1] if logits.dim() else 1, dtype=logits.dtype), target)


FORMS = {
    **{
        f"module-{r}": Form(lambda x, y, r=r, **o: ab.CrossEntropy(reduction=r, **o)(x, y), partial(F.cross_entropy, reduction=r))
        for r in ("none", "mean", "sum")
    },
    "functional": Form(ab.functional.logit_loss, partial(F.cross_entropy, reduction="none")),
    "robust": Form(lambda x, y, **o: ab.ABLoss(ab.CrossEntropy(**o), lam=INF)(x, y), mean_over_counted),
    "robust-reference": Form(
        lambda x, y, **o: ab.ABLoss(ab.CrossEntropy(**o), lam=INF, backend="reference")(x, y), mean_over_counted
    ),
    "robust-of-torchs": Form(
        lambda x, y, **o: ab.ABLoss(nn.CrossEntropyLoss(reduction="none", **o), lam=INF)(x, y), mean_over_counted
    ),
    "robust-general": Form(  # a rule does not fuse, so the losses are made first
        lambda x, y, **o: ab.ABLoss(ab.CrossEntropy(**o), rule=torch.ones_like)(x, y), mean_over_counted
    ),
    "robust-of-callable": Form(
        lambda x, y, **o: ab.ABLoss(partial(F.cross_entropy, reduction="none", **o), lam=INF)(x, y), mean_over_all
    ),
    "linear": Form(linear, lambda x, y, **o: mean_over_counted(x @ torch.eye(x.shape[-1], dtype=x.dtype), y, **o)),
}


# ---- situations -------------------------------------------------------------------------------------------------------------


def logits_of(*shape, dtype=torch.float32):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)).to(dtype)


def labels_of(*shape, classes=5, dtype=torch.int64):
    return ((torch.arange(math.prod(shape)) * 3 + 1) % classes).reshape(shape).to(dtype)


class Situation(NamedTuple):
    logits: torch.Tensor
    target: torch.Tensor
    options: dict = {}  # noqa: RUF012  # never changed


def changed(x, *changes):
    """A copy of x with other numbers: (index, value)."""
    x = x.clone()
    for index, value in changes:
        x[index] = value
    return x


LABEL_DTYPES = ["uint8", "int8", "int16", "int32", "bool", "uint16", "uint32", "uint64", "float16", "float32", "complex64"]
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])
X, Y = logits_of(6, 5), labels_of(6)

SITUATIONS = {
    "plain": Situation(X, Y),
    **{f"logits-{str(d)[6:]}": Situation(X.to(d), Y) for d in (torch.float64, torch.bfloat16, torch.float16)},
    **{f"labels-{d}": Situation(X, Y.to(getattr(torch, d))) for d in LABEL_DTYPES},
    **{
        f"labels-{d}-of-images": Situation(logits_of(2, 5, 3), labels_of(2, 3, dtype=getattr(torch, d)))
        for d in ("uint8", "int16", "bool", "float32")
    },
    "uint8-ignored-255": Situation(X, changed(Y.to(torch.uint8), (1, 255)), {"ignore_index": 255}),
    "uint8-255": Situation(X, changed(Y.to(torch.uint8), (1, 255))),
    "uint8-156": Situation(X, changed(Y.to(torch.uint8), (1, 156))),  # -100 in 8 bits
    "uint8-smooth-weight": Situation(X, Y.to(torch.uint8), {"weight": WEIGHT, "label_smoothing": 0.1}),
    "label-too-large": Situation(X, changed(Y, (2, 5))),
    "label-negative": Situation(X, changed(Y, (2, -1))),
    "label-too-large-of-images": Situation(logits_of(2, 5, 3), changed(labels_of(2, 3), ((1, 2), 9))),
    "empty": Situation(logits_of(0, 5), labels_of(0)),
    "empty-images": Situation(logits_of(2, 5, 0), labels_of(2, 0)),
    "all-ignored": Situation(X, torch.full((6,), -100)),
    "some-ignored": Situation(X, changed(Y, (0, -100), (4, -100))),
    "ignored-class": Situation(X, Y, {"ignore_index": 1}),
    "ignored-class-weight-smooth": Situation(X, Y, {"ignore_index": 1, "weight": WEIGHT, "label_smoothing": 0.2}),
    "ignored-negative": Situation(X, changed(Y, (3, -1)), {"ignore_index": -1}),
    "nan-in-ignored": Situation(changed(X, (0, math.nan)), changed(Y, (0, -100))),
    "weight": Situation(X, Y, {"weight": WEIGHT}),
    "weight-float64": Situation(X, Y, {"weight": WEIGHT.double()}),
    "weight-negative": Situation(X, Y, {"weight": WEIGHT - 1}),
    "weight-zero": Situation(X, Y, {"weight": changed(WEIGHT, (1, 0.0))}),
    "weight-nan": Situation(X, Y, {"weight": changed(WEIGHT, (1, math.nan))}),
    "weight-too-short": Situation(X, Y, {"weight": WEIGHT[:3]}),
    "smooth": Situation(X, Y, {"label_smoothing": 0.1}),
    "smooth-one": Situation(X, Y, {"label_smoothing": 1.0}),
    "smooth-too-large": Situation(X, Y, {"label_smoothing": 1.5}),
    "soft": Situation(X, logits_of(6, 5).flip(0).softmax(1)),
    "soft-weight-smooth": Situation(X, logits_of(6, 5).flip(0).softmax(1), {"weight": WEIGHT, "label_smoothing": 0.2}),
    "soft-images": Situation(logits_of(2, 5, 3), logits_of(2, 5, 3).flip(0).softmax(1)),
    "soft-not-normalised": Situation(X, logits_of(6, 5).flip(0).abs()),
    "soft-float64": Situation(X, logits_of(6, 5).flip(0).softmax(1).double()),
    "soft-integers": Situation(X, torch.ones(6, 5, dtype=torch.int64)),
    "minus-inf": Situation(changed(X, (0, torch.tensor([0.0, 1.0, -INF, -INF, 2.0]))), Y),
    "minus-inf-at-the-label": Situation(changed(X, ((0, 1), -INF)), Y),
    "minus-inf-everywhere": Situation(changed(X, (0, -INF)), Y),
    "plus-inf": Situation(changed(X, ((0, 2), INF)), Y),
    "plus-inf-at-the-label": Situation(changed(X, ((0, 1), INF)), Y),
    "nan": Situation(changed(X, ((0, 2), math.nan)), Y),
    "large": Situation(1e4 * X, Y),
    "one-class": Situation(logits_of(4, 1), torch.zeros(4, dtype=torch.int64)),
    "one-row": Situation(logits_of(1, 5), labels_of(1)),
    "zero-classes": Situation(logits_of(3, 0), torch.zeros(3, dtype=torch.int64)),
    "zero-classes-ignored": Situation(logits_of(3, 0), torch.full((3,), -100)),
    "zero-classes-empty": Situation(logits_of(0, 0), labels_of(0)),
    "1d": Situation(logits_of(5), torch.tensor(3)),
    "1d-uint8": Situation(logits_of(5), torch.tensor(3, dtype=torch.uint8)),
    "1d-weight-smooth": Situation(logits_of(5), torch.tensor(3), {"weight": WEIGHT, "label_smoothing": 0.1}),
    "1d-soft": Situation(logits_of(5), logits_of(5).flip(0).softmax(0)),
    "1d-ignored": Situation(logits_of(5), torch.tensor(-100)),
    "1d-out-of-range": Situation(logits_of(5), torch.tensor(7)),
    "1d-with-a-vector": Situation(logits_of(5), torch.tensor([3])),
    "0d": Situation(torch.tensor(1.0), torch.tensor(0)),
    "3d": Situation(logits_of(2, 5, 3), labels_of(2, 3)),
    "4d": Situation(logits_of(2, 5, 3, 4), labels_of(2, 3, 4), {"weight": WEIGHT}),
    "5d": Situation(logits_of(2, 5, 3, 1, 2), labels_of(2, 3, 1, 2), {"label_smoothing": 0.1}),
    "transposed": Situation(logits_of(5, 6).t(), Y),
    "strided": Situation(logits_of(6, 10)[:, ::2], Y),
    "expanded-rows": Situation(logits_of(1, 5).expand(6, 5), Y),
    "expanded-classes": Situation(logits_of(6, 1).expand(6, 5), Y),
    "channels-last": Situation(logits_of(2, 5, 3, 4).to(memory_format=torch.channels_last), labels_of(2, 3, 4)),
    "strided-labels": Situation(X, labels_of(6, 2)[:, 1]),
    "expanded-labels": Situation(X, torch.tensor(2).expand(6)),
    "too-few-labels": Situation(X, labels_of(4)),
    "labels-of-images-for-rows": Situation(X, labels_of(6, 1)),
    "integer-logits": Situation(X.long(), Y),
}


# ---- where we differ on purpose ---------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """What ours does in some situations instead of what torch does.

    situations, forms: patterns of names, separated by blanks.
    instead: the exception; or how to change the situation so that torch does what ours does; or None: NaN, and the gradients of
        the rows with a finite loss as if the others were not there.
    """

    situations: str
    forms: str
    instead: type[Exception] | Callable[[Situation], Situation] | None
    reason: str


OF_LOGITS = "module-* functional robust robust-reference robust-of-torchs robust-general linear"  # all but the callable
OURS = "module-* functional robust robust-reference robust-general linear"  # those with a loss of this package
FUSED = "robust robust-reference robust-of-torchs robust-general linear"

A_BYTE = "torch's IndexError holds the label as a byte that is no text"


def with_long_labels(given):
    return given._replace(target=given.target.long())


def with_float32_weight(given):
    return given._replace(options={"weight": given.options["weight"].float()})


def without_nan(given):
    return given._replace(logits=given.logits.nan_to_num())


DIFFERENT = [
    Difference(
        "labels-int8* labels-int16* labels-bool* labels-uint16 labels-uint32 labels-uint64 labels-float* labels-complex64"
        " labels-uint8-of-images",
        OF_LOGITS,
        TypeError,
        "an argument of a wrong dtype is a TypeError, in torch a RuntimeError",
    ),
    Difference("labels-int32", OF_LOGITS, with_long_labels, "labels may also be int32"),
    Difference(
        "uint8-255 uint8-156",
        f"module-none functional {FUSED}",
        IndexError,
        A_BYTE,
    ),
    Difference("uint8-smooth-weight", "module-mean", with_long_labels, "torch refuses these three together, and only for a mean"),
    Difference("weight-float64", OF_LOGITS, with_float32_weight, "class weights are taken in the dtype of the losses"),
    Difference(
        "weight-nan",
        "module-* robust robust-reference robust-general linear",
        ValueError,
        "a loss of this package refuses class weights that are no finite numbers when it is made",
    ),
    Difference(
        "weight-too-short soft-integers labels-of-images-for-rows 1d-with-a-vector 0d",
        OF_LOGITS,
        ValueError,
        "numbers and shapes that do not fit are a ValueError, in torch mostly a RuntimeError",
    ),
    Difference("smooth-too-large", OURS, ValueError, "the same; torch's module raises its own error inside ABLoss"),
    Difference("integer-logits", OF_LOGITS, TypeError, "a NotImplementedError of a kernel in torch"),
    Difference("nan-in-ignored", OF_LOGITS, without_nan, "an ignored row has the gradient 0, whatever it holds (MATH 2.4)"),
    Difference(
        "1d 1d-uint8 1d-*s* 1d-ignored 1d-with-a-vector",
        "robust* linear",
        ValueError,
        "samples are weighed against each other, so a robust loss takes a batch",
    ),
    Difference("1d-out-of-range", FUSED, ValueError, "the same"),
    Difference("logits-float16", "linear", TypeError, "the range of float16 is too small for the sums over chunks"),
    Difference(
        "minus-inf-at-the-label minus-inf-everywhere plus-inf* nan weight-nan",
        "robust* linear",
        None,
        "a nonfinite loss gives NaN, and the others are weighed without it (MATH 1.4)",
    ),
    Difference("minus-inf", "linear", None, "the product of the head makes NaN of it"),
]


def named(name, patterns):
    """Whether a name fits one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())


def a_byte_is_an_index_error():
    """Whether Python makes an IndexError of torch's message, which holds the byte itself: 3.11.2 does, 3.11.7 does not."""
    try:
        F.cross_entropy(torch.zeros(1, 2), torch.tensor([255], dtype=torch.uint8), reduction="none")
    except (IndexError, UnicodeDecodeError) as error:
        return isinstance(error, IndexError)
    raise AssertionError("torch took a label that is out of range")


if a_byte_is_an_index_error():
    DIFFERENT = [d for d in DIFFERENT if d.reason != A_BYTE]


def difference(form, situation):
    """The first row of `DIFFERENT` for a form in a situation; None: ours does what torch does."""
    return next((d for d in DIFFERENT if named(situation, d.situations) and named(form, d.forms)), None)


# ---- the judge --------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    value: torch.Tensor | None = None
    grad: torch.Tensor | None = None
    error: Exception | None = None


def outcome(call, logits, target, options):
    """What a call leads to: its value and the gradient of the logits, for an upstream gradient that differs from row to row."""
    x = logits.detach()
    try:
        x = x.requires_grad_() if x.is_floating_point() else x
        value = call(x, target, **options)
        upstream = torch.linspace(0.5, 1.5, max(1, value.numel())).to(value.dtype)[: value.numel()].reshape(value.shape)
        return Outcome(value.detach(), torch.autograd.grad(value, x, upstream)[0])
    except Exception as error:
        return Outcome(error=error)


def in_float64(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def truth(form, given):
    """What torch makes of a situation in float64."""
    options = {name: in_float64(value) for name, value in given.options.items()}
    return outcome(FORMS[form].torchs, in_float64(given.logits), in_float64(given.target), options)


def assert_near(got, exact, torchs, eps, what):
    """As exact as torch's, up to rounding of the largest number. NaN and infinity stand in the same places."""
    got, torchs, finite = got.double(), exact if torchs is None else torchs.double(), exact.isfinite()
    assert torch.equal(got[~finite].nan_to_num(7.0), exact[~finite].nan_to_num(7.0)), f"{what}: {got}, expected {exact}"
    if finite.any():
        off = (got - exact)[finite].abs().max()
        allowed = eps * exact[finite].abs().max().clamp(min=1e-3) + 2 * (torchs - exact)[finite].abs().nan_to_num(0, 0, 0).max()
        assert off <= allowed, f"{what}: off by {off}, allowed {allowed}"


def assert_same(ours, exact, torchs, dtype):
    """The value is exact to the dtype of the losses, and the gradient to that of the logits, which it has."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    assert ours.value.dtype in (real, torch.float64 if torchs.value.dtype == torch.float64 else real)
    assert ours.grad.dtype == dtype
    assert ours.value.shape == exact.value.shape and ours.grad.shape == exact.grad.shape
    assert_near(ours.value, exact.value, torchs.value, 8 * torch.finfo(real).eps, "value")
    assert_near(ours.grad, exact.grad, torchs.grad, torch.finfo(dtype).eps + 8 * torch.finfo(real).eps, "gradient")


def without_nonfinite_rows(form, given):
    """What torch makes of the rows with a finite loss, beside a value of NaN and gradients of NaN for the other rows."""
    counts = F.cross_entropy(given.logits, given.target, reduction="none", **given.options).isfinite()
    if form == "linear":
        counts &= given.logits.isfinite().all(1)
    rest = truth(form, given._replace(logits=given.logits[counts], target=given.target[counts]))
    grad = torch.full(given.logits.shape, math.nan, dtype=torch.float64)
    grad[counts] = rest.grad
    return Outcome(torch.full_like(rest.value, math.nan), grad)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_situations(form, situation):
    given, differs = SITUATIONS[situation], difference(form, situation)
    ours, torchs = (outcome(call, *given) for call in FORMS[form][:2])
    if differs is None:
        if torchs.error is not None:
            assert type(ours.error) is type(torchs.error), (ours, torchs)
            return
        exact = truth(form, given)
    elif differs.instead is None:
        exact = without_nonfinite_rows(form, given)
    elif isinstance(differs.instead, type):
        assert type(ours.error) is differs.instead, (ours, torchs)
        assert type(torchs.error) is not differs.instead, f"torch does the same as ours: {differs}"
        return
    else:
        exact = truth(form, differs.instead(given))
    if ours.error is not None:
        raise ours.error
    assert_same(ours, exact, torchs if torchs.error is None and differs is None else exact, given.logits.dtype)


# ---- protocols --------------------------------------------------------------------------------------------------------------
#
# Each calls a criterion as criterion(logits, target), with Y or parts of it, and returns what comes out as a list.


class Head(nn.Module):
    """LinearABLoss as a criterion on logits."""

    def __init__(self):
        super().__init__()
        self.criterion = ab.LinearABLoss(lam=INF)
        self.register_buffer("weight", torch.eye(5))

    def forward(self, x, y):
        return self.criterion(x, self.weight.to(x.dtype), y)


class FunctionalMean(nn.Module):
    """The mean of `functional.logit_loss` as a criterion."""

    def forward(self, x, y):
        return ab.functional.logit_loss(x, y).mean()


def per_sample_cross_entropy(x, y):
    return F.cross_entropy(x, y, reduction="none")


CRITERIA = {
    "module": lambda: ab.CrossEntropy(reduction="mean"),
    "module-weight": lambda: ab.CrossEntropy(WEIGHT, label_smoothing=0.1, reduction="mean"),
    "functional": FunctionalMean,
    "robust": lambda: ab.ABLoss(lam=INF),
    "robust-reference": lambda: ab.ABLoss(lam=INF, backend="reference"),
    "robust-of-torchs": lambda: ab.ABLoss(nn.CrossEntropyLoss(reduction="none"), lam=INF),
    "robust-of-callable": lambda: ab.ABLoss(per_sample_cross_entropy, lam=INF),
    "linear": Head,
}


def torchs_criterion(name, dtype):
    return (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1) if name == "module-weight" else nn.CrossEntropyLoss()).to(dtype)


class WithLoss(nn.Module):
    """A model that contains its criterion."""

    def __init__(self, criterion, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.criterion = nn.Linear(5, 5).bfloat16().to(dtype), criterion  # the same numbers in every dtype

    def forward(self, x, y):
        return self.criterion(self.linear(x), y)


def leaf(logits=X):
    return logits.clone().requires_grad_()


def gradient(criterion, logits):
    x = leaf(logits)
    return torch.autograd.grad(criterion(x, Y), x)[0]


def retained(criterion, logits):
    x = leaf(logits)
    loss = criterion(x, Y)
    return [torch.autograd.grad(loss, x, retain_graph=keep)[0] for keep in (True, True, False)]


def backward_again(criterion, logits):
    loss = criterion(leaf(logits), Y)
    loss.backward()
    loss.backward()


def changed_in_place(criterion, logits):
    x = leaf(logits)
    z = x * 1
    loss = criterion(z, Y)
    z.zero_()
    return [torch.autograd.grad(loss, x)[0]]


def labels_changed(criterion, logits):
    """torch's own refuses the change."""
    x, labels = leaf(logits), Y.clone()
    loss = criterion(x, labels)
    if type(criterion) is not nn.CrossEntropyLoss:
        labels.zero_()
    return [torch.autograd.grad(loss, x)[0]]


def labels_buffer_reused(criterion, logits):
    """One buffer for the labels of two micro-batches with a common backward, which torch's own refuses."""
    x, buffer, losses = leaf(logits), torch.empty_like(Y[:3]), []
    for part in (slice(0, 3), slice(3, 6)):
        buffer.copy_(Y[part])
        losses.append(criterion(x[part], Y[part] if type(criterion) is nn.CrossEntropyLoss else buffer) / 2)
    return [torch.autograd.grad(sum(losses), x)[0]]


def twice_differentiated(criterion, logits):
    x = leaf(logits)
    (grad,) = torch.autograd.grad(criterion(x, Y), x, create_graph=True)
    return [grad.detach(), *torch.autograd.grad(grad.square().sum(), x)]


def accumulated(criterion, logits):
    x = leaf(logits)
    for part in (slice(0, 3), slice(3, 6)):
        (criterion(x[part], Y[part]) / 2).backward()
    return [x.grad]


def checkpointed(criterion, logits, use_reentrant):
    x = leaf(logits)
    loss = checkpoint(lambda x: criterion(2 * x, Y), x, use_reentrant=use_reentrant)
    loss.backward()
    return [loss.detach(), x.grad]


def without_grad(criterion, logits, mode):
    with mode():
        loss = criterion(leaf(logits), Y)
    return [loss, torch.tensor([loss.requires_grad, loss.is_inference()])]


def constant_logits(criterion, logits):
    loss = criterion(logits, Y)
    return [loss, torch.tensor(loss.requires_grad)]


def copies(criterion, logits):
    criterion(logits, Y)
    file = io.BytesIO()
    torch.save(criterion, file)
    file.seek(0)
    made = copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)), torch.load(file, weights_only=False)
    return [result for c in made for result in (c(logits, Y), gradient(c, logits))]


def averaged(criterion, logits):
    model = WithLoss(criterion, logits.dtype)
    averages, optimizer = AveragedModel(model, use_buffers=True), torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        model(logits, Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.update_parameters(model)
    return [averages.eval()(logits, Y).detach(), *(p.detach() for p in averages.module.linear.parameters())]


def vmapped(criterion, logits):
    """torch's own is called in a loop, because it does not go through vmap with class weights."""
    batches = logits.reshape(2, 3, 5), Y.reshape(2, 3)
    if type(criterion) is nn.CrossEntropyLoss:
        return [torch.stack([criterion(x, y) for x, y in zip(*batches)])]
    return [torch.vmap(criterion.eval())(*batches)]


def grad_of_func(criterion, logits):
    return [torch.func.grad(criterion.eval())(logits, Y)]


def grads_of_samples(criterion, logits):
    return [torch.vmap(torch.func.grad(criterion.eval()))(logits, Y)]


def pushed_forward(criterion, logits):
    return list(torch.func.jvp(lambda x: criterion.eval()(x, Y), (logits,), (logits.flip(0),)))


def hessian(criterion, logits):
    return [torch.func.hessian(lambda x: criterion.eval()(x, Y[:2]))(logits[:2])]


def autocast(criterion, logits):
    """The logits come from a product in bfloat16."""
    x = leaf(logits)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion(x @ torch.eye(5).to(x), Y)
    return [loss.detach(), torch.autograd.grad(loss, x)[0].bfloat16()]


def on_meta(criterion, logits):
    x = logits.to("meta").requires_grad_()
    loss = criterion.to("meta")(x, Y.to("meta"))
    loss.backward()
    return [torch.tensor(t.shape) for t in (loss, x.grad)]


def in_fake_mode(criterion, logits):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(logits).requires_grad_()
        loss = criterion(x, mode.from_tensor(Y))
        loss.backward()
        shapes = [list(t.shape) for t in (loss, x.grad)]
    return [*map(torch.tensor, shapes), copy.deepcopy(criterion)(logits, Y)]  # the mode leaves no trace


def target_elsewhere(criterion, logits):
    return [criterion(leaf(logits), Y.to("meta"))]


def logits_elsewhere(criterion, logits):
    return [criterion(logits.to("meta").requires_grad_(), Y)]


def compiled(criterion, logits):
    model = torch.compile(criterion)
    return [model(logits, Y), gradient(model, logits)]


def exported(criterion, logits, strict, trains=False):
    model = WithLoss(criterion, logits.dtype).train(trains)
    program = torch.export.export(model, (logits, Y), strict=strict)
    again = copy.deepcopy(model)  # the trace leaves no tensor without values in the model
    return [m(2 * logits, Y).detach() for m in (program.module(), program.run_decompositions().module(), model, again)]


PROTOCOLS = {
    "gradient": lambda criterion, logits: [gradient(criterion, logits)],
    "retained": retained,
    "backward-again": backward_again,
    "changed-in-place": changed_in_place,
    "labels-changed": labels_changed,
    "labels-buffer-reused": labels_buffer_reused,
    "twice-differentiated": twice_differentiated,
    "accumulated": accumulated,
    "checkpointed": partial(checkpointed, use_reentrant=False),
    "checkpointed-reentrant": partial(checkpointed, use_reentrant=True),
    "no-grad": partial(without_grad, mode=torch.no_grad),
    "inference": partial(without_grad, mode=torch.inference_mode),
    "constant-logits": constant_logits,
    "copies": copies,
    "averaged": averaged,
    "vmapped": vmapped,
    "grad-of-func": grad_of_func,
    "grads-of-samples": grads_of_samples,
    "pushed-forward": pushed_forward,
    "hessian": hessian,
    "autocast": autocast,
    "meta": on_meta,
    "fake": in_fake_mode,
    "target-elsewhere": target_elsewhere,
    "logits-elsewhere": logits_elsewhere,
}
LONG_PROTOCOLS = {
    "exported": partial(exported, strict=False),
    "exported-in-training": partial(exported, strict=False, trains=True),
    "compiled": compiled,
    "exported-strictly": partial(exported, strict=True),
    "exported-strictly-in-training": partial(exported, strict=True, trains=True),
}


class Refusal(NamedTuple):
    """Criteria (patterns) that raise in some protocols (patterns) although torch's does not, or raise another exception."""

    protocols: str
    criteria: str
    error: type[Exception]
    words: str
    reason: str


REFUSED = [
    Refusal("labels-*", "robust-of-callable", RuntimeError, "inplace operation", "torch's own keeps the labels"),
    Refusal("twice-differentiated", "linear", RuntimeError, "create_graph", "the logits are not stored (MATH 6)"),
    Refusal("grads-of-samples", "robust* linear", ValueError, "batch of one|per-sample|hidden", "a robust loss takes a batch"),
    Refusal("target-elsewhere", f"module* functional {FUSED}", ValueError, "^target", "ours is a ValueError that names it"),
    Refusal("logits-elsewhere", "module* functional", ValueError, "^target", "ours is a ValueError that names it"),
    Refusal("logits-elsewhere", FUSED, ValueError, "criterion.to|hidden is on", "the state of a robust loss has a device too"),
    Refusal("exported*-in-training", "robust* linear", RuntimeError, "export", "an exported program cannot keep log s"),
    Refusal("exported-strictly", "linear", Exception, "disable", "torch.compile does not trace the walk over chunks"),
]


# What is rounded in the protocols with bfloat16 logits, besides the gradient once: numbers between the loss and the results.
ROUNDED_AGAIN = "twice-differentiated averaged grad* pushed-forward hessian exported* compiled"


def results_of(protocol, criterion, logits):
    try:
        return protocol(criterion, logits)
    except Exception as error:
        return error


def check_protocol(protocol, criterion, dtype=torch.float32):
    """float32 is judged by torch in float32, bfloat16 by torch in float64 on the same numbers."""
    run, logits = (PROTOCOLS | LONG_PROTOCOLS)[protocol], X.to(dtype)
    for refused in REFUSED:
        if named(protocol, refused.protocols) and named(criterion, refused.criteria):
            with pytest.raises(refused.error, match=refused.words):
                run(CRITERIA[criterion](), logits)
            return
    exact = dtype if dtype == torch.float32 else torch.float64
    torchs = results_of(run, torchs_criterion(criterion, exact), logits.to(exact))
    ours = results_of(run, CRITERIA[criterion](), logits)
    if isinstance(torchs, Exception):
        assert type(ours) is type(torchs), (ours, torchs)
        return
    if isinstance(ours, Exception):
        raise ours
    for got, expected in zip(ours, torchs, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(got, expected)
            continue
        more = named(protocol, ROUNDED_AGAIN) or named(criterion, "linear robust-of-callable")  # products and losses in bfloat16
        assert_rounded(got, expected.double(), more)


def assert_rounded(got, exact, more):
    """The number in float64, rounded once to the dtype of `got`. more: rounded several times, against the largest number."""
    assert got.shape == exact.shape
    if not got.numel():
        return
    eps, largest = torch.finfo(got.dtype if got.is_floating_point() else torch.float32).eps, exact.abs().max()
    rounding = (4 * torch.finfo(torch.bfloat16).eps * largest) if more else eps / 2 * exact.abs()
    off = (got.double() - exact).abs() - rounding
    assert (off <= 32 * torch.finfo(torch.float32).eps * largest).all(), f"got {got}, expected {exact}"


@pytest.mark.filterwarnings("ignore:.*isn't a leaf.*")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_protocols(criterion, protocol, dtype):
    check_protocol(protocol, criterion, dtype)


@pytest.mark.deep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("protocol", LONG_PROTOCOLS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_long_protocols(criterion, protocol, dtype):
    check_protocol(protocol, criterion, dtype)


def test_export():
    """A row of the long protocols that is not left to the long sweeps."""
    check_protocol("exported", "robust")


def test_class_vectors_of_fake_mode():
    """Class vectors that are made there, for a dtype that the loss has not met before, serve no other forward."""
    loss, x = ab.VS([5, 4, 3, 2, 1]), X.double()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        loss(mode.from_tensor(x), mode.from_tensor(Y))
    torch.testing.assert_close(loss(x, Y), ab.VS([5, 4, 3, 2, 1])(x, Y))


# ---- what is refused, and what a masked row may hold -----------------------------------------------------------------------

NOT_FINITE = [torch.tensor([1.0, bad, 1.0]) for bad in (math.nan, INF, -INF)]
MAKERS = {
    **{
        cls.__name__: lambda weight, cls=cls: cls(weight=weight)
        for cls in (ab.CrossEntropy, ab.Focal, ab.GCE, ab.SCE, repository.Focal)
    },
    **{cls.__name__: lambda weight, cls=cls: cls([3, 2, 1], weight=weight) for cls in (ab.LDAM, ab.VS, ab.LogitAdjusted, ab.CDT)},
    "set_weight": lambda weight: ab.CrossEntropy().set_weight(weight),
    "DRW": lambda weight: ab.DRW(ab.CrossEntropy(), weight, 1),
}


@pytest.mark.parametrize("weight", NOT_FINITE, ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_class_weights_are_finite(make, weight):
    with pytest.raises(ValueError, match="^weight: got .* for class 1, expected a finite number"):
        make(weight)
    make(torch.tensor([1.0, -0.5, 0.0]))  # as in torch


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_class_weights_of_8_bits(make, dtype):
    make(torch.tensor([1.0, -0.5, 0.0]).to(dtype))
    with pytest.raises(ValueError, match="^weight: got nan for class 1"):
        make(torch.tensor([1.0, math.nan, 1.0]).to(dtype))


def test_float8_class_weights_switch_on():
    loss = ab.CrossEntropy()
    schedule = ab.DRW(loss, torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0]).to(torch.float8_e4m3fn), start=1)
    schedule.step(), schedule.step()
    torch.testing.assert_close(loss(X, Y), F.cross_entropy(X, Y, torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0]), reduction="none"))


def test_set_weight_inside_torch_compile():
    """The values are not checked there, because a graph cannot look at them."""
    loss, weight = ab.CrossEntropy(), torch.tensor([1.0, 2.0, 0.5, 4.0, 1.0])
    compiled = torch.compile(lambda x, w: (loss.set_weight(w), loss(x, Y))[1], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, weight), F.cross_entropy(X, Y, weight, reduction="none"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ab.LDAM([3, 1], s=1e39),  # infinite in float32
        lambda: ab.VS([3, 1], tau=1e39),
        lambda: ab.adrw_weights([3, 1], nu=1e306),
        lambda: ab.class_balanced_weights([1e-320, 1.0], beta=0.5),
    ],
)
def test_made_class_vectors_are_finite(make):
    with pytest.raises(ValueError, match="class .*expected a finite number"):
        make()


INTEGERS = torch.arange(3)
LOGITS = logits_of(3, 4)
TAKE_LOSSES = {
    "robust_weights": lambda: ab.functional.robust_weights(INTEGERS, 0.0, 1.0),
    "weighted_momentum_step_": lambda: ab.functional.weighted_momentum_step_(
        [torch.zeros(2)], [torch.zeros(2)], [torch.zeros(3, 2)], INTEGERS, 0.0, lam=1.0, lr=0.1
    ),
    "term": lambda: ab.weights.term(INTEGERS, 1.0),
    "cvar": lambda: ab.weights.cvar(INTEGERS, 0.5),
    "chi2": lambda: ab.weights.chi2(INTEGERS, 0.5),
    "GroupDRO": lambda: ab.weights.GroupDRO(2, 0.1)(INTEGERS, INTEGERS % 2),
    "rectified": lambda: ab.meta.rectified(INTEGERS),
    "callable": lambda: ab.ABLoss(lambda x: x, lam=1.0)(INTEGERS),
    "score": lambda: ab.ABLoss(lam=1.0)(LOGITS, INTEGERS, score=INTEGERS),
    "score-general": lambda: ab.ABLoss(lambda x: x, lam=1.0)(LOGITS[:, 0], score=INTEGERS),
    "score-linear": lambda: ab.LinearABLoss(lam=1.0)(LOGITS, torch.eye(4), INTEGERS, score=INTEGERS),
}


@pytest.mark.parametrize("call", TAKE_LOSSES.values(), ids=TAKE_LOSSES)
def test_losses_and_scores_are_floating(call):
    with pytest.raises(TypeError, match="int64, expected .*floating"):
        call()


@pytest.mark.parametrize("lam", [INF, 0.5, ab.RelativeLam(1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("options", [{}, {"deferred": True}, {"rule": torch.ones_like}], ids=lambda o: next(iter(o), "plain"))
@pytest.mark.parametrize("form", ["ABLoss", "ABLoss-reference", "ABLoss-of-torchs", "LinearABLoss"])
def test_masked_rows_hold_anything(form, options, dtype, lam):
    """A row with mask=False is as if its label were ignore_index, whatever its label and its logits are."""
    if "rule" in options:
        if form == "LinearABLoss":
            return
        lam = None
    criteria = {
        "ABLoss": lambda: ab.ABLoss(lam=lam, **options),
        "ABLoss-reference": lambda: ab.ABLoss(lam=lam, backend="reference", **options),
        "ABLoss-of-torchs": lambda: ab.ABLoss(nn.CrossEntropyLoss(reduction="none"), lam=lam, **options),
        "LinearABLoss": lambda: ab.LinearABLoss(lam=lam, **options),
    }
    mask = torch.tensor([True, False, True, True, False, True])
    bad = changed(Y, (1, 99), (4, 200)).to(dtype)
    outcomes = []
    for target, more in ((bad, {"mask": mask}), (Y.masked_fill(~mask, -100), {})):
        criterion, x = criteria[form](), leaf()
        head = (torch.eye(5),) if form == "LinearABLoss" else ()
        criterion(x, *head, target, **more).backward()
        criterion.discard()
        outcomes.append([x.grad, criterion.last.losses, criterion.last.weights, criterion.log_s])
    for got, expected in zip(*outcomes):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("ignore_index", [torch.iinfo(torch.int64).min, 2**40, 2**31, -(2**31), 2**31 - 1], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("form", ["fused", "reference", "general", "torchs", "head"])
def test_masked_rows_with_an_ignore_index_of_64_bits(form, dtype, ignore_index):
    """int32 labels cannot hold it."""
    loss = ab.CrossEntropy(ignore_index=ignore_index)
    make = {
        "fused": lambda: ab.ABLoss(loss, lam=0.5),
        "reference": lambda: ab.ABLoss(loss, lam=0.5, backend="reference"),
        "general": lambda: ab.ABLoss(loss, rule=torch.ones_like),
        "torchs": lambda: ab.ABLoss(nn.CrossEntropyLoss(reduction="none", ignore_index=ignore_index), lam=0.5),
        "head": lambda: ab.LinearABLoss(loss, lam=0.5),
    }
    mask = torch.tensor([True, False, True, True, False, True])
    head = (torch.eye(5),) if form == "head" else ()
    x, wanted = leaf(), leaf()
    criterion, usual = make[form](), ab.ABLoss(rule=torch.ones_like) if form == "general" else ab.ABLoss(lam=0.5)
    criterion(x, *head, Y.to(dtype), mask=mask).backward()
    usual(wanted, Y.masked_fill(~mask, -100)).backward()
    torch.testing.assert_close(x.grad, wanted.grad)
    torch.testing.assert_close(criterion.last.losses, usual.last.losses)


def test_class_vectors_of_different_dtypes():
    """An integer or half-precision vector does not round the others."""
    x, y, scale, shift = X, Y, torch.tensor([1, 2, 1, 2, 1]), torch.tensor([0.25, -0.5, 0.75, 0.0, 0.125])
    got = ab.functional.logit_loss(x, y, scale=scale, shift=shift)
    torch.testing.assert_close(got, F.cross_entropy(x * scale + shift, y, reduction="none"))
    removed = ab.functional.logit_loss(x, torch.zeros_like(y), shift=torch.tensor([0.0, 0.0, -INF, 0.0, 0.0]))
    torch.testing.assert_close(removed, F.cross_entropy(x[:, [0, 1, 3, 4]], torch.zeros_like(y), reduction="none"))


def test_export_leaves_the_state():
    """A training forward is refused while torch.export traces, and leaves state, step and rule as they were."""
    for criterion in (ab.ABLoss(lam=0.5), ab.ABLoss(lam=0.5, deferred=True), ab.ABLoss(lam=ab.RelativeLam(0.5))):
        before = copy.deepcopy(criterion.state_dict())
        with pytest.raises(RuntimeError, match="ABLoss: got a forward that updates the state .*eval"):
            torch.export.export(WithLoss(criterion), (X, Y), strict=False)
        torch.testing.assert_close(criterion.state_dict(), before, equal_nan=True)
        assert torch.isfinite(criterion(leaf(), Y))
        criterion.discard()


def test_no_operator_takes_some_tensors_on_meta():
    """One tensor on "meta" sends a call to the operator's fake, whose results on the CPU would hold any numbers."""
    with pytest.raises(RuntimeError, match="scale: got some tensors on meta"):
        ab.ABLoss(lam=1.0).operators_for(X).scale(X, torch.ones((), device="meta"), False)


TAKE_LABELS = {
    **{cls.__name__: lambda x, y, cls=cls: cls(weight=WEIGHT[:4])(x, y).sum() for cls in (ab.Focal, ab.GCE, ab.SCE)},
    **{cls.__name__: lambda x, y, cls=cls: cls([4, 3, 2, 1])(x, y).sum() for cls in (ab.LDAM, ab.VS, ab.LogitAdjusted, ab.CDT)},
    "DFT": lambda x, y: ab.DFT()(x, y),
    "moving": lambda x, y: ab.ABLoss(ab.VS([4, 3, 2, 1]), lam=0.5)(x, y, sample_weight=torch.arange(3.0)),
    "deferred": lambda x, y: ab.ABLoss(lam=0.5, deferred=True)(x, y, update=False),
    "RelativeLam": lambda x, y: ab.ABLoss(lam=ab.RelativeLam(0.5))(x, y),
    "TargetESS": lambda x, y: ab.ABLoss(lam=ab.TargetESS(0.7))(x, y),
    "groups": lambda x, y: ab.ABLoss(rule=ab.weights.GroupDRO(2, 0.1))(x, y, groups=y % 2),
    "LinearABLoss": lambda x, y: ab.LinearABLoss(lam=0.5, chunk=2)(x, torch.eye(4), y),
    "compat.losses": lambda x, y: absgd_losses.ABLoss(0.5)(x, y),
    "compat.repository": lambda x, y: repository.ABLoss(0.5)(x, y),
    "l2rw": lambda x, y: ab.meta.l2rw_loss(WithLogits(x), ab.CrossEntropy(), (INTEGERS, y), (INTEGERS, y)),
    "reference": lambda x, y: ab.reference.logit_loss(x, y).sum(),
}


class WithLogits(nn.Module):
    """A model whose outputs are its parameter."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x.detach().clone())

    def forward(self, rows):
        return self.x[rows]


@pytest.mark.parametrize("call", TAKE_LABELS.values(), ids=TAKE_LABELS)
def test_uint8_labels_everywhere(call):
    labels = torch.tensor([2, 0, 3])
    torch.testing.assert_close(call(LOGITS, labels.to(torch.uint8)), call(LOGITS, labels))
    with pytest.raises((IndexError, RuntimeError), match="156"):  # a RuntimeError of torch's in reference/
        call(LOGITS, torch.tensor([2, 156, 3], dtype=torch.uint8))  # -100 in 8 bits
