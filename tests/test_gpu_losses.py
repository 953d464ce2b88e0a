"""Losses on logits, labels out of range and the graph of autograd, on every backend of a GPU against the float64 oracle."""

import math
import warnings
from functools import partial
from types import SimpleNamespace
from unittest import SkipTest

import numpy as np
import oracle
import torch
import torch.nn.functional as F
from gpu_cases import (
    BEYOND,
    CANCELS,
    CROSS_ENTROPIES,
    HELD,
    INF,
    LOSSES,
    ONE_LAUNCH,
    PATHS,
    Where,
    along,
    check_robust,
    close,
    exact_losses,
    gpu,
    numpy,
    over,
    problem,
    raises,
    tensors_of,
)
from gpu_hooks import pytest_generate_tests, setup_function, teardown_function, unpoisoned  # noqa: F401
from tensors import DTYPES, LAYOUTS, class_weight, counts, wide

import absgd_fast as ab
from absgd_fast.functional import logit_loss

# ---- losses on logits ------------------------------------------------------------------------------------------------


@over(dtype=DTYPES, loss=CROSS_ENTROPIES)
def test_losses(where, dtype, loss):
    """One class; less than a 16-byte access; a few; around where a block takes a row (128 accesses, 1024); many."""
    sizes = (1, 2, 10, 100, 513, 1000, 1027, 4099) + (32000,) * where.gpu
    if where.backend == "triton" and loss != "ce":  # compiles a kernel for each of these
        sizes = (2, 10, 1027, 32000)
    for classes in sizes:
        p = problem((5, classes), dtype, seed=classes, loss=loss)
        x, target = where.leaf(p.logits), p.target.to(where.device)
        if classes % 2 == 0:
            target = target.int()
        upstream = torch.linspace(-2, 1.5, 5, dtype=wide(dtype), device=where.device)
        losses = logit_loss(x, target, **tensors_of(p.options, dtype, where.device), backend=where.backend)
        (grad,) = torch.autograd.grad(losses, x, upstream)
        assert losses.dtype == wide(dtype) and losses.shape == (5,) and grad.dtype == dtype and grad.shape == x.shape
        close(losses, p.losses, dtype, f"losses of {classes} classes")
        exact = p.grads * along(numpy(upstream), p.grads)
        close(grad, exact, dtype, f"gradient of {classes} classes", cancels=loss in ("smooth", "all"), stored=True)


@over(dtype=DTYPES, layout=[name for name in LAYOUTS if name != "contiguous"])
def test_layouts(where, dtype, layout):
    """The same numbers elsewhere in memory: rows on a few lanes (37) and on a block (1030), with heads and tails; images."""
    if where.backend == "triton" and dtype not in (torch.float32, torch.bfloat16):
        raise SkipTest("loads and stores alone differ, and each kernel costs a second to compile")
    for shape in ((5, 37), (3, 1030), (3, 6, 7), (2, 5, 3, 4)):
        p = problem(shape, dtype)
        x = LAYOUTS[layout](p.logits.to(where.device)).requires_grad_()
        target = torch.stack([p.target, p.target * 0 - 7], -1).to(where.device)[..., 0]  # labels lie apart too
        upstream = torch.linspace(-1, 2, target.numel(), dtype=wide(dtype), device=where.device).reshape(target.shape)
        losses = logit_loss(x, target, backend=where.backend)
        (grad,) = torch.autograd.grad(losses, x, upstream)
        close(losses, p.losses, dtype, f"losses {shape}")
        close(grad, p.grads * along(numpy(upstream), p.grads), dtype, f"gradient {shape}", stored=True)
        check_robust(where.criterion(lam=0.75, dtype=dtype), oracle.ABLoss(0.75), x, target, p, dtype)


@over(dtype=DTYPES, loss=["ce", "all"])
def test_many_rows(where, dtype, loss):
    """Rows on lanes of many blocks; more of them than one launch weighs; images of more than that."""
    if where.backend == "triton" and (loss == "all") != (dtype == torch.float32):
        raise SkipTest("each kernel costs a second to compile")
    for shape in [(2100, 1000), (70_000, 10)] * where.gpu + [(ONE_LAUNCH + 617, 33), (3, 5, 8, ONE_LAUNCH // 16)]:
        generator = torch.Generator().manual_seed(1)
        logits = (torch.randn(shape, generator=generator) * 3).to(dtype)
        target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
        options = LOSSES[loss].exact(shape[1])
        x, y = where.leaf(logits), target.to(where.device)
        exact_x = x.detach().double().requires_grad_()
        exact = exact_losses(exact_x, y, tensors_of(options, torch.float64, where.device))
        upstream = torch.randn(target.shape, generator=generator, dtype=torch.float64).to(where.device, wide(dtype))
        (slopes,) = torch.autograd.grad(exact.sum(), exact_x)
        losses = logit_loss(x, y, **tensors_of(options, dtype, where.device), backend=where.backend)
        (grad,) = torch.autograd.grad(losses, x, upstream)
        close(losses, numpy(exact), dtype, f"losses {shape}", cancels=True)
        close(grad, numpy(slopes * upstream.unsqueeze(1)), dtype, f"gradient {shape}", cancels=True, stored=True)
        spots = [0, target.numel() // 2, target.numel() - 1]
        spot_losses, _ = oracle.cross_entropy(oracle.rows(logits.double())[spots], target.flatten()[spots], **options)
        np.testing.assert_allclose(numpy(exact).flatten()[spots], spot_losses, rtol=1e-13)  # the formula above is the oracle's
        valid = numpy(y) != options.get("ignore_index", -100)
        p = SimpleNamespace(losses=numpy(exact), grads=numpy(slopes), valid=valid)
        check_robust(where.criterion(loss, shape[1], dtype, lam=-0.5), oracle.ABLoss(-0.5), x, y, p, dtype)


def test_certain_rows(where):
    """The label's gradient where p = 1 - 1e-6, to 1e-5 (eager torch is off by 17 %); logits of +-80, where exp overflows."""
    for classes in (2, 10, 1000, 32000 if where.gpu else 3000):
        logits = torch.linspace(-0.01, 0.01, classes).repeat(7, 1)
        target = torch.arange(7) * (classes - 1) // 6
        logits[torch.arange(7), target] = math.log((1 - 1e-6) / 1e-6 * (classes - 1))
        losses, grads = oracle.cross_entropy(logits.double(), target)
        for n, criterion in ((1, ab.CrossEntropy(reduction="sum", backend=where.backend)), (7, where.criterion(lam=INF))):
            x = where.leaf(logits)
            criterion(x, target.to(where.device)).backward()
            got, exact = numpy(x.grad[range(7), target]) * n, grads[range(7), target]
            assert np.abs(got / exact - 1).max() <= 1e-5, f"{classes} classes: off by {np.abs(got / exact - 1).max():.1e}"
    logits = torch.full((6, 40), -80.0)
    target = torch.arange(6)
    logits[0, 0], logits[1, 30], logits[2], logits[3, 2:9], logits[4, 4] = 80, 80, 80, 80, 0
    losses, grads = oracle.cross_entropy(logits.double(), target)
    for dtype in DTYPES.values():
        x = where.leaf(logits.to(dtype))
        values = logit_loss(x, target.to(where.device), backend=where.backend)
        (grad,) = torch.autograd.grad(values.sum(), x)
        close(values, losses, dtype, "losses of +-80")
        close(grad, grads, dtype, "gradient of +-80", stored=True)


@over(dtype={"bf16": torch.bfloat16, "fp16": torch.float16})
def test_half_precision_is_no_worse_than_eager(where, dtype):
    """Largest error of losses and of gradients, next to torch's on the same logits."""
    p = problem((16, 1000), dtype, seed=5)
    target = p.target.to(where.device)
    errors = []
    for function in (partial(logit_loss, backend=where.backend), partial(F.cross_entropy, reduction="none")):
        x = where.leaf(p.logits.nan_to_num(0))
        losses = function(x, target)
        losses.sum().backward()
        errors.append([np.abs(numpy(losses) - p.losses).max(), np.abs(numpy(x.grad) - p.grads).max()])
    (our_loss, our_grad), (their_loss, their_grad) = errors
    assert our_loss <= their_loss and our_grad <= their_grad * (1 + 1e-3), errors  # the same rounding of the same number, at best


def check_losses(where, criterion, p, dtype, what, cancels=False):
    """Losses and gradient of logit_loss with the options of p, and of the module `criterion`."""
    x, target = where.leaf(p.logits), p.target.to(where.device)
    upstream = torch.linspace(-2, 1.5, p.losses.size, dtype=wide(dtype), device=where.device).reshape(p.losses.shape)
    options = tensors_of(p.options, dtype, where.device)
    for losses in (logit_loss(x, target, **options, backend=where.backend), criterion(x, target)):
        (grad,) = torch.autograd.grad(losses, x, upstream)
        close(losses, p.losses, dtype, f"losses, {what}", cancels=cancels)
        exact = p.grads * along(numpy(upstream), p.grads)
        close(grad, exact, dtype, f"gradient, {what}", ulps=128, cancels=cancels, stored=True)


def check_loss(where, criterion, p, dtype, what, cancels=False):
    """The same, and a step of ABLoss on it."""
    check_losses(where, criterion, p, dtype, what, cancels)
    x, target = where.leaf(p.logits), p.target.to(where.device)
    check_robust(where.robust(criterion, dtype, lam=-0.75), oracle.ABLoss(-0.75), x, target, p, dtype, cancels=cancels)


@over(loss=list(LOSSES)[4:], dtype=DTYPES, path=PATHS)
def test_every_loss(where, loss, dtype, path):
    if where.backend == "triton" and dtype != torch.float32:
        raise SkipTest("each kernel costs a second to compile, and the dtypes are those of test_losses")
    p = problem(path, dtype, 3, 2.0, loss)
    check_loss(where, where.fused(loss, path[1], dtype), p, dtype, loss, cancels=loss in CANCELS)


SOFT = {
    "ce": (ab.CrossEntropy, lambda c: {}),
    "weight, smoothing": (ab.CrossEntropy, lambda c: {"weight": class_weight(c), "label_smoothing": 0.1}),
    "vs": (ab.VS, lambda c: {"cls_num_list": counts(c)}),
}


def soft_problem(shape, dtype, loss, seed=0):
    """Logits, probabilities and the module that has them as targets; exact losses and gradients by torch in float64."""
    draw = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=draw, dtype=torch.float64) * 2).to(dtype)
    target = torch.randn(shape, generator=draw, dtype=torch.float64).softmax(1).to(wide(dtype))
    module, given = SOFT[loss]
    options = oracle.vs(counts(shape[1])) if module is ab.VS else given(shape[1])
    exact, x = tensors_of(options, torch.float64), logits.double().requires_grad_()
    a, each = x, (-1, *[1] * (len(shape) - 2))
    if module is ab.VS:
        a = x * exact.pop("scale").view(each) + exact.pop("shift").view(each)
    losses = F.cross_entropy(a, target.double(), reduction="none", **exact)
    (grads,) = torch.autograd.grad(losses.sum(), x)
    valid = np.ones(losses.shape, bool)
    return SimpleNamespace(logits=logits, target=target, options=options, losses=numpy(losses), grads=numpy(grads), valid=valid)


@over(loss=list(SOFT), dtype=DTYPES, path=PATHS)
def test_soft_targets(where, loss, dtype, path):
    if where.backend == "triton" and dtype != torch.float32:
        raise SkipTest("each kernel costs a second to compile, and the dtypes are those of test_losses")
    module, given = SOFT[loss]
    fused = module(**tensors_of(given(path[1]), dtype), backend=where.backend).to(where.device)
    # each class has a term of its own, and the gradients of these cancel
    check_loss(where, fused, soft_problem(path, dtype, loss), dtype, loss, cancels=True)


# ---- labels out of range ---------------------------------------------------------------------------------------------


@over(shape=[HELD, BEYOND, (ONE_LAUNCH + 6, 3)], label=["one too many", "negative", "huge"])
def test_label_out_of_range(where, shape, label):
    """The CPU raises at once. A GPU ignores the row, a later call raises, once, and everything goes on."""
    p = problem(shape, torch.float32)
    label = {"one too many": shape[1], "negative": -1, "huge": 2**40}[label]
    bad = p.target.clone()
    bad[3] = label
    good, bad = p.target.to(where.device), bad.to(where.device)
    criterion = where.criterion(lam=0.75)
    for form in (partial(logit_loss, backend=where.backend), criterion):
        x = where.leaf(p.logits)
        if not where.gpu:
            raises(IndexError, (f"label {label} in row 3", f"< {shape[1]}"), lambda: form(x, bad))
            continue
        value = form(x, bad)
        value.sum().backward()
        where.synchronize()
        assert not x.grad[3].any() and x.grad[0].any()
        rows = value if value.dim() else criterion.last.weights
        assert rows[3] == 0 and rows[0] > 0 and value.isfinite().all()
        raises(IndexError, (f"label {label} in row 3", "earlier", f"< {shape[1]}"), lambda: form(x, good))
        form(x, good)
    x = where.leaf(p.logits)
    criterion(x, good).backward()
    where.synchronize()
    assert x.grad[3].any()


def linear(where):
    """LinearABLoss as a function of logits: hidden, with the unit matrix as weight."""
    criterion = ab.LinearABLoss(lam=0.75, backend=where.backend).to(where.device)

    def call(x, target):
        return criterion(x, torch.eye(x.shape[1], device=x.device), target)

    call.deferred = False
    return call


FORMS = {
    **{loss: partial(Where.criterion, loss=loss, classes=HELD[1], lam=0.75) for loss in LOSSES},
    "deferred": partial(Where.criterion, lam=0.75, deferred=True),
    "term": lambda where: where.robust(ab.CrossEntropy(backend=where.backend), rule=partial(ab.weights.term, t=0.5)),
    "cvar": lambda where: where.robust(ab.CrossEntropy(backend=where.backend), rule=partial(ab.weights.cvar, beta=0.3)),
    "linear": linear,
}


@over(form=FORMS)
def test_label_out_of_range_in_every_form(where, form):
    """The row is ignored where it cannot be refused, a later call raises, and the training goes on as if it had been ignored."""
    if where.backend == "triton" and form not in (FORMS["ce"], FORMS["all"], FORMS["deferred"], FORMS["cvar"]):
        raise SkipTest("each kernel costs a second to compile")
    p = problem(HELD, torch.float32)
    ours, twin = form(where), form(where)
    ignore_index = getattr(getattr(ours, "criterion", None), "ignore_index", -100)
    good = p.target.clamp(min=1).to(where.device)  # 0 is ignored by one of them
    bad, ignored = good.clone(), good.clone()
    bad[3], ignored[3] = HELD[1], ignore_index
    logits = p.logits.nan_to_num(0)

    def run(form, target):
        x = where.leaf(logits)
        value = form(x, target)
        value.backward()
        return value.detach(), x.grad

    if where.gpu:
        wanted, found = run(twin, ignored), run(ours, bad)  # in this order: whoever calls next is told of the label
        where.synchronize()
        torch.testing.assert_close(found, wanted)
        assert not found[1][3].any() and found[1][0].any()
    words = (f"label {HELD[1]} in row 3", f"< {HELD[1]}") + ("earlier",) * where.gpu
    raises(IndexError, words, lambda: ours(where.leaf(logits), good if where.gpu else bad))
    for criterion in (ours, twin):
        if criterion.deferred:
            criterion.discard()
    torch.testing.assert_close(run(ours, good), run(twin, good))
    where.synchronize()
    run(ours, good)


@gpu
def test_a_batch_on_another_device_than_the_state(where):
    """Is refused in words, and the right call afterwards works."""
    p = problem(HELD, torch.float32)
    x, target = where.leaf(p.logits), p.target.to(where.device)
    criterion, head = ab.ABLoss(lam=0.75), ab.LinearABLoss(lam=0.75)
    weight = torch.eye(HELD[1], device=where.device)
    for form in (lambda: criterion(x, target), lambda: head(x, weight, target)):
        raises(ValueError, (f"got a batch on {x.device}", "its state is on cpu", f"criterion.to('{x.device}')"), form)
    elsewhere = ("target: got a tensor on cpu", f"expected {x.device}")
    raises(ValueError, elsewhere, lambda: logit_loss(x, p.target, backend=where.backend))
    on_device = where.criterion(lam=0.75)
    raises(ValueError, ("cpu",), lambda: on_device(x, p.target))  # Triton's launcher has words of its own
    raises(ValueError, ("sample_weight",), lambda: on_device(x, target, sample_weight=torch.ones(HELD[0])))
    assert on_device.log_s == -INF
    check_robust(on_device, oracle.ABLoss(0.75), x, target, p, torch.float32)


# ---- the graph of autograd -------------------------------------------------------------------------------------------


@over(dtype=[torch.float32, torch.bfloat16, torch.float16], shape=[HELD, BEYOND])
def test_backward_again(where, dtype, shape):
    """With retain_graph each backward is the same function of its upstream, whatever was done to earlier gradients."""
    p = problem(shape, dtype)
    target, alone = p.target.to(where.device), ab.CrossEntropy(backend=where.backend)
    torchs = where.robust(partial(F.cross_entropy, reduction="none"), lam=0.75)
    for form in (alone, where.criterion(lam=0.75), torchs):
        x = where.leaf(p.logits.nan_to_num(0))
        value = form(x, target)
        again = partial(torch.autograd.grad, value, x)
        (first,) = again(torch.full_like(value, 4.0), retain_graph=True)
        kept = first.clone()
        first.zero_()  # a gradient handed out belongs to the caller
        (second,) = again(torch.full_like(value, 4.0), retain_graph=True)
        assert torch.equal(second, kept) and kept.abs().max() > 0
        (third,) = again(torch.full_like(value, -2.0))
        torch.testing.assert_close(third, kept * -0.5, rtol=torch.finfo(dtype).eps, atol=1e-7)
        assert torch.equal(second, kept)


def test_two_uses_of_one_loss(where):
    """A value used twice, and logits used by two losses: gradients add up."""
    p = problem(BEYOND, torch.float32)
    target = p.target.to(where.device)
    x, criterion = where.leaf(p.logits), where.criterion(lam=0.75, normalizer="batch")
    value = criterion(x, target)
    (value + 2 * value).backward()
    tripled, x.grad = x.grad, None
    (criterion(x, target) + criterion(x, target)).backward()
    torch.testing.assert_close(tripled / 3, x.grad / 2, rtol=1e-5, atol=1e-8)


@over(compiler=["aot_eager"] + ["inductor"] * torch.cuda.is_available(), batch=[8, 500 if torch.cuda.is_available() else 9])
def test_compiles_into_one_graph(where, compiler, batch):
    if compiler == "inductor" and where.backend != "cuda":
        raise SkipTest("costs ten seconds; the graph is that of aot_eager")
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Linear(20, 40).to(where.device)
    x, target = torch.randn(batch, 20, device=where.device), torch.randint(40, (batch,), device=where.device)
    results = []
    with unpoisoned(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for compiled in (False, True):
            criterion = where.criterion(lam=-0.5)
            run = step = lambda x, y, criterion=criterion: criterion(model(x), y)
            if compiled:
                run = torch.compile(step, fullgraph=True, backend=compiler, dynamic=False)
            for _ in range(3):
                model.zero_grad()
                loss = run(x, target)
                loss.backward()
            results.append((loss.detach(), criterion.log_s, model.weight.grad.clone()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
