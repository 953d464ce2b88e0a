"""What becomes of the logits after a loss whose gradient the forward pass has made: they are not kept, and may be changed.

A second derivative then uses logits that are recovered from the gradient.
"""

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import LOSSES
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import absgd_fast as ab
from absgd_fast import _backend
from absgd_fast.functional import logit_loss
from absgd_fast.reference import logits_of_gradient

pytestmark = pytest.mark.skipif(
    not _backend.available("cpu"), reason="needs the CPU kernels, which make gradients in the forward"
)
ROWS, CLASSES = 12, 7
TARGET = torch.arange(ROWS) % CLASSES
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def logits_of(dtype=torch.float64, size=1.0, seed=0):
    """(ROWS, CLASSES) logits of this size; half of the labels are likely."""
    x = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[range(0, ROWS, 2), TARGET[::2]] += 2
    return (x * size).to(dtype)


def eager_of(case, dtype=torch.float64):
    return partial(case.eager, **case.tensors(CLASSES, dtype))


FORMS = {
    "losses": lambda case, dtype: case.module(CLASSES, dtype),
    "mean": lambda case, dtype: case.module(CLASSES, dtype, reduction="mean"),
    "functional": lambda case, dtype: partial(logit_loss, **case.tensors(CLASSES, dtype)),
    "ABLoss": lambda case, dtype: ab.ABLoss(case.module(CLASSES, dtype), lam=0.7, mix=0.2).to(dtype),
    "ABLoss of any losses": lambda case, dtype: ab.ABLoss(lambda *xy: case.module(CLASSES, dtype)(*xy), lam=0.7).to(dtype),
    "deferred": lambda case, dtype: later_micro_batch(ab.ABLoss(case.module(CLASSES, dtype), lam=0.7, deferred=True).to(dtype)),
}


def later_micro_batch(criterion):
    """A criterion in the middle of a deferred step, where the operator knows the reference point."""
    criterion(logits_of(criterion.log_s.dtype).requires_grad_(), TARGET).backward()
    return criterion


def keeps_logits(form, case):
    """Whether the graph keeps the logits: a vector of losses other than cross-entropy, and a scale that may be 0."""
    if form not in (FORMS["losses"], FORMS["functional"], FORMS["ABLoss of any losses"]):
        return False
    return case.kind != "ce" or (form is FORMS["functional"] and "scale" in case.tensors(CLASSES, torch.float64))


def factors(criterion):
    """d loss / d L_i of the latest forward."""
    _, weights, valid = criterion.memo.sample_stats.unbind()
    return torch.where(valid > 0, weights + criterion.mix, 0.0) / (1 if criterion.deferred else (valid > 0).sum())


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


# ---- memory ---------------------------------------------------------------------------------------------------------


def buffers_left(run, leaf):
    """How many buffers of the leaf's size are there after `run`, which returns what lives on, and were not there before."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()
        gc.collect()
    left = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    return left / leaf.nbytes, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("entry", ["torch", *LOSSES])
@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.covering(1)
def test_one_buffer_is_left(entry, robust, dtype):
    """As with torch's cross-entropy: one buffer after the caller has dropped the logits, none more after backward."""
    classes = 1024
    leaf = torch.randn(1024, classes, dtype=dtype, requires_grad=True)
    target = torch.randint(classes - 1, (1024,))
    if entry == "torch":
        loss = F.cross_entropy
    elif robust:
        loss = ab.ABLoss(LOSSES[entry].module(classes, torch.float32), lam=0.7)
    else:
        loss = LOSSES[entry].module(classes, torch.float32, reduction="mean")
    loss(leaf[:1] * 1, target[:1])  # makes what is made once
    left, value = buffers_left(lambda: loss(leaf * 1, target), leaf)
    wanted = 2 if robust and dtype == torch.bfloat16 and "smooth" in entry else 1  # its rounding hides small probabilities
    assert abs(left - wanted) < 0.05
    left, _ = buffers_left(value.backward, leaf)
    assert abs(left - (1 - wanted)) < 0.05 and leaf.grad is not None  # the buffer that was left is the gradient now


def test_soft_targets_leave_one_buffer():
    leaf, target = torch.randn(512, 1024, requires_grad=True), torch.rand(512, 1024).softmax(1)
    criterion = ab.ABLoss(lam=0.7)
    criterion(leaf * 1, target)
    left, _ = buffers_left(lambda: criterion(leaf * 1, target), leaf)
    assert abs(left - 1) < 0.05


def test_an_open_second_derivative_frees_the_gradient():
    """backward(create_graph=True, retain_graph=False) ends the first graph."""
    leaf = torch.randn(512, 1024, requires_grad=True)
    value = ab.ABLoss(lam=0.7)(leaf * 1, torch.randint(1024, (512,)))
    node = value.grad_fn
    torch.autograd.grad(value, leaf, create_graph=True, retain_graph=False)
    assert getattr(node, "grad", None) is None  # the node of C++ shows nothing, but raises the same error
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


# ---- changed logits -------------------------------------------------------------------------------------------------


def derivatives(f, x, between=lambda z: None):
    """First and second derivatives of f at z = 1 x, by x. between(z) happens after the forward pass; z is dropped then."""
    z = x * 1
    value = f(z, TARGET)
    between(z)
    del z
    u = torch.linspace(1, 2, value.numel(), dtype=value.dtype).reshape(value.shape) * (ROWS / value.numel())  # means are small
    u.requires_grad_()
    (first,) = torch.autograd.grad(value, x, u, retain_graph=True)
    (open_,) = torch.autograd.grad(value, x, u, create_graph=True)
    second = torch.autograd.grad((open_ * open_.detach().cos()).sum(), (x, u), create_graph=True)
    return first, open_.detach(), *second, *torch.autograd.grad(second[0].square().sum(), x)


@pytest.mark.covering(2)
@pytest.mark.parametrize("between", ["dropped", "exp", "zero", "NaN"])
def test_changed_logits(case, form, between):
    """Derivatives of the first three orders after the logits were changed or dropped, as if they had not been."""
    changes = {
        "dropped": lambda z: None,
        "exp": lambda z: z.detach().exp_(),
        "zero": lambda z: z.data.zero_(),
        "NaN": lambda z: z.detach().fill_(float("nan")),
    }
    x = logits_of().requires_grad_()
    loss = form(case, torch.float64)
    if between != "dropped" and keeps_logits(form, case):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # logits that are kept
            derivatives(loss, x, lambda z: z.detach().exp_())
        return
    weights = []

    def noting(z, y):
        value = loss(z, y)
        if isinstance(loss, ab.ABLoss):
            weights[:] = [factors(loss)]
        return value

    got = derivatives(noting, x, changes[between])
    eager = eager_of(case)
    truth = eager if not weights else lambda z, y: (weights[0] * eager(z, y)).sum()
    if form is FORMS["mean"]:
        truth = partial(eager, reduction="mean")
    wanted = derivatives(truth, x)
    close(got, wanted)
    assert all(w.abs().max() > 1e-6 for w in wanted)


def test_head_changed_in_place():
    """`LinearABLoss` makes its gradients in the forward pass too, and needs its inputs no more."""
    torch.manual_seed(0)
    inputs = torch.randn(ROWS, 5), torch.randn(CLASSES, 5), torch.randn(CLASSES)
    grads = []
    for change in (False, True):
        hidden, weight, bias = (t.clone().requires_grad_() for t in inputs)
        z = hidden * 1
        value = ab.LinearABLoss(lam=0.7)(z, weight, TARGET, bias)
        if change:
            for t in (z, weight, bias):
                t.detach().zero_()
        grads.append(torch.autograd.grad(value, (hidden, weight, bias)))
    close(*grads, rtol=0, atol=0)


def test_losses_changed_in_place():
    """The losses of a user's criterion are not read again either, nor are the returned losses."""
    x = logits_of().requires_grad_()
    results = []
    for change in (False, True):
        held = []

        def losses(z, y):
            held[:] = [F.cross_entropy(z, y, reduction="none") * 1]
            return held[0]

        value = ab.ABLoss(losses, lam=0.7).double()(x, TARGET)
        own = ab.Focal()(x, TARGET)
        if change:
            with torch.no_grad():
                held[0].fill_(3)
            own.div_(2).mul_(2)
        (first,) = torch.autograd.grad(value + own.sum(), x, create_graph=True)
        results.append([first.detach(), *torch.autograd.grad(first.square().sum(), x)])
    close(*results)


def test_gradient_penalty():
    """The logits are temporaries between a model and the loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, CLASSES)).double()
    data = torch.randn(ROWS, 5, dtype=torch.float64, requires_grad=True)
    results = []
    for loss in (ab.CrossEntropy(reduction="mean"), F.cross_entropy, ab.ABLoss(lam=float("inf")).double()):
        value = loss(model(data), TARGET)
        (grad,) = torch.autograd.grad(value, data, create_graph=True)
        results.append(torch.autograd.grad(value + grad.square().sum(), list(model.parameters())))
    close(results[0], results[1])
    close(results[2], results[1])


def test_scale_of_0():
    """A class with S = 0 does not show in the gradient. Then the logits are kept, and their change is noticed."""
    scale = torch.ones(CLASSES, dtype=torch.float64).scatter(0, torch.tensor([2]), 0.0)
    x = logits_of().requires_grad_()
    ours, eager = partial(logit_loss, scale=scale), lambda z, y: F.cross_entropy(z * scale, y, reduction="none")
    close(derivatives(ours, x), derivatives(eager, x))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        derivatives(ours, x, lambda z: z.detach().exp_())
    with pytest.raises(RuntimeError, match="class vector S with a 0"):
        logits_of_gradient(x.detach(), TARGET, scale=scale)


@pytest.mark.parametrize("soft", [False, True])
def test_bfloat16_with_class_weights(soft):
    """Label smoothing and soft targets: logits that are kept, and their change noticed by a second derivative only."""
    x = logits_of(torch.bfloat16).requires_grad_()
    target = x.detach().flip(0).float().softmax(1) if soft else TARGET
    grads = []
    for change in (False, True):
        z = x * 1
        value = ab.ABLoss(ab.CrossEntropy(label_smoothing=0.1), lam=0.7)(z, target)
        if change:
            z.detach().exp_()
        grads += torch.autograd.grad(value, x, retain_graph=True)
    assert torch.equal(*grads)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, x, create_graph=True)


# ---- the copy of bfloat16 logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["losses", "functional"])
def test_changed_bfloat16_logits(case, form):
    """Backward makes the gradient from a copy: any number of times, of any loss, and for a second derivative too."""
    x, results = logits_of(torch.bfloat16).requires_grad_(), []
    upstream = torch.linspace(1, 2, ROWS)
    for change in (False, True):
        z = x * 1
        value = FORMS[form](case, torch.float32)(z, TARGET)
        if change:
            z.detach().exp_()
        del z
        first = torch.autograd.grad(value, x, upstream, retain_graph=True)
        (open_,) = torch.autograd.grad(value, x, upstream, create_graph=True)
        (second,) = torch.autograd.grad(open_.float().square().sum(), x, retain_graph=True)
        results.append([*first, *torch.autograd.grad(value, x, upstream), open_.detach(), second])
        with pytest.raises(RuntimeError, match="second time"):
            value.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(*results))
    first, again, open_, second = results[0]
    assert torch.equal(first, again) and first.any() and second.any()
    close(first.float(), open_.float(), rtol=2**-7, atol=1e-6)


HOMES = {"ordinary": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("changed", ["target", "weight", "shift"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.covering(3)  # what happens to a tensor depends on all three
def test_changed_labels_and_class_weights(dtype, changed, home):
    """They are not read again, whatever the dtype, and whether or not torch counts their changes."""
    x, upstream, grads = logits_of(dtype).requires_grad_(), torch.linspace(1, 2, ROWS), []
    for change in (False, True):
        with HOMES[home]():
            given = {
                "target": TARGET.clone(),
                "weight": torch.linspace(0.5, 1.5, CLASSES),
                "shift": torch.linspace(0, 1, CLASSES),
            }
        loss = logit_loss(x, label_smoothing=0.1, **given)  # so that backward needs the class weights
        if change:
            with HOMES[home]():
                given[changed].zero_()
        grads.append(torch.autograd.grad(loss, x, upstream)[0])
    assert torch.equal(*grads) and grads[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_class_weights_loaded_before_backward(dtype):
    """load_state_dict and DDP's broadcast of buffers write class weights in place."""
    x, grads = logits_of(dtype).requires_grad_(), []
    for change in (False, True):
        criterion = ab.CrossEntropy(torch.linspace(0.5, 1.5, CLASSES), label_smoothing=0.1)
        loss = criterion(x, TARGET)
        if change:
            criterion.load_state_dict({"weight": torch.ones(CLASSES)})
            criterion.weight.zero_()
        grads.append(torch.autograd.grad(loss.sum(), x)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_label_buffer_of_two_micro_batches(dtype):
    """The same memory holds the labels of both."""
    x, other = logits_of(dtype).requires_grad_(), TARGET.flip(0)
    wanted = torch.autograd.grad((logit_loss(x, TARGET) + logit_loss(x, other)).sum(), x)[0]
    buffer = TARGET.clone()
    first = logit_loss(x, buffer)
    second = logit_loss(x, buffer.copy_(other))
    assert torch.equal(torch.autograd.grad((first + second).sum(), x)[0], wanted)


@pytest.mark.parametrize("create_graph", [False, True])
def test_changed_soft_targets(create_graph):
    """The graph keeps no copy of them, because they are large. Every backward notices their change, as in torch."""
    x = logits_of(torch.bfloat16).requires_grad_()
    target = x.detach().flip(0).float().softmax(1)
    loss = logit_loss(x, target, label_smoothing=0.1).sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    target.zero_()
    for retain in (True, False, False):
        with pytest.raises(RuntimeError, match="^target: got soft targets that were modified by an inplace operation"):
            torch.autograd.grad(loss, x, retain_graph=retain, create_graph=create_graph)


def test_soft_targets_of_inference_mode():
    """torch does not count their changes, so the graph keeps a copy."""
    x, grads = logits_of(torch.bfloat16).requires_grad_(), []
    for change in (False, True):
        with torch.inference_mode():
            target = x.detach().flip(0).float().softmax(1)
        loss = logit_loss(x, target)
        if change:
            with torch.inference_mode():
                target.zero_()
        grads.append(torch.autograd.grad(loss.sum(), x)[0])
    assert torch.equal(*grads) and grads[0].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_compiled_losses_of_bfloat16(transposed):
    """The gradient of logits that autograd keeps, here too rounded once and in any layout."""
    torch._dynamo.reset()
    x = logits_of(torch.bfloat16)
    x = (x.t().contiguous().t() if transposed else x).requires_grad_()
    losses, upstream = partial(logit_loss, target=TARGET, label_smoothing=0.1), torch.linspace(1, 2, ROWS)
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    assert torch.equal(*(torch.autograd.grad(f(x), x, upstream)[0] for f in (losses, compiled)))


def test_hooks_see_logits_and_their_copy():
    """As gradient and logits of the other dtypes."""
    x, packed = logits_of(torch.bfloat16).requires_grad_(), []
    upstream = torch.linspace(1, 2, ROWS)
    (wanted,) = torch.autograd.grad(ab.CrossEntropy()(x, TARGET), x, upstream)
    with saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        value = ab.CrossEntropy()(x, TARGET)
    assert [t.shape for t in packed] == [x.shape, x.shape]
    assert torch.equal(torch.autograd.grad(value, x, upstream)[0], wanted)
    value = checkpoint(lambda x: ab.CrossEntropy()(x * 1, TARGET), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(value, x, upstream)[0], wanted)


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("size", [1.0, 6.0, 25.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_second_derivative_is_as_good_as_torchs(case, dtype, size, robust):
    """At most 4 times the error of eager torch in the same dtype, or 4 roundings of the largest number."""
    x = logits_of(dtype, size).requires_grad_()
    v = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def second(f, x):
        (first,) = torch.autograd.grad(f(x, TARGET), x, create_graph=True)
        return torch.autograd.grad((first * v.to(first.dtype)).sum(), x)[0].double()

    module = case.module(CLASSES, torch.float32)
    factor = torch.full((ROWS,), 1.0)
    if robust:
        criterion = ab.ABLoss(module, lam=-3.0)
        criterion(x.detach(), TARGET, update=False)
        factor = factors(criterion)
        got = second(criterion, x)
    else:
        got = second(lambda *xy: module(*xy).sum(), x)
    wanted = second(lambda *xy: (factor.double() * eager_of(case)(*xy)).sum(), x.detach().double().requires_grad_())
    eager = second(lambda *xy: (factor * eager_of(case, dtype)(*xy)).sum(), x)
    error, theirs = ((g - wanted).abs().nan_to_num(0).max() for g in (got, eager))  # eager focal is NaN at p = 1 if gamma < 1
    assert got.isfinite().all()
    assert error <= 4 * max(theirs, torch.finfo(dtype).eps * wanted.abs().max()), (error, theirs, wanted.abs().max())


# ---- logits_of_gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_images(soft):
    """(B, C, d1) logits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, CLASSES, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    target = x.detach().flip(0).softmax(1) if soft else torch.arange(12).reshape(3, 4) % CLASSES
    weight = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)
    results = []
    for loss in (ab.CrossEntropy, torch.nn.CrossEntropyLoss):
        loss = loss(weight=weight, label_smoothing=0.1 if soft else 0.0, reduction="none")
        z = x * 1
        value = loss(z, target)
        z.data.zero_()
        (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        results.append([first.detach(), *torch.autograd.grad(first.square().sum(), x)])
    close(*results)


def test_rows_without_a_gradient():
    """A row with the factor 0 gets finite logits, one that holds NaN gets NaN, and neither touches another row."""
    x, losses = logits_of(), eager_of(LOSSES["focal"])
    factor = torch.ones(ROWS, dtype=torch.float64)
    factor[3], x[5, 2] = 0, float("nan")
    leaf = x.clone().requires_grad_()
    values = losses(leaf, TARGET)
    (grad,) = torch.autograd.grad((values * factor).sum(), leaf)
    found = logits_of_gradient(grad, TARGET, values.detach(), factor, kind="focal", gamma=2.0)
    assert found[3].isfinite().all() and found[5].isnan().any()
    others = [i for i in range(ROWS) if i not in (3, 5)]
    close(found.softmax(1)[others], x.softmax(1)[others])


@pytest.mark.parametrize("shape", [(0, 5), (4, 1), (3, 0), (2, 3, 0)])
def test_shapes_without_a_choice(shape):
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    found = logits_of_gradient(torch.zeros(shape), target)
    assert found.shape == shape and found.isfinite().all()


# ---- other people's hooks -------------------------------------------------------------------------------------------


def test_hooks_see_gradient_and_logits():
    """Activation checkpointing and save_on_cpu get all that backward reads, in the same number and shapes in every pass."""
    x, criterion = logits_of(torch.bfloat16).requires_grad_(), ab.ABLoss(lam=0.7)
    (wanted,) = torch.autograd.grad(criterion(x, TARGET, update=False), x)
    passes = []
    for _ in range(2):
        packed, unpacked = [], []
        with saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: unpacked.append(t) or t):
            value = criterion(x, TARGET, update=False)
        assert [t.shape for t in packed] == [x.shape, x.shape] and not unpacked
        (grad,) = torch.autograd.grad(value, x)
        assert torch.equal(grad, wanted) and len(unpacked) == 2
        passes.append([(t.shape, t.dtype) for t in packed])
    assert passes[0] == passes[1]


def test_second_derivative_inside_checkpointing():
    x, criterion = logits_of().requires_grad_(), ab.ABLoss(lam=0.7).double()
    plain = partial(criterion, update=False)
    wanted = derivatives(plain, x)[1:3]
    value = checkpoint(lambda x: plain(x * 1, TARGET), x, use_reentrant=False)
    u = torch.full((), float(ROWS), dtype=value.dtype, requires_grad=True)
    (open_,) = torch.autograd.grad(value, x, u, create_graph=True)
    close((open_.detach(), *torch.autograd.grad((open_ * open_.detach().cos()).sum(), x)), wanted)


def test_forbidden_hooks():
    """Where hooks are forbidden the logits are kept, and their change is noticed."""
    x = logits_of().requires_grad_()
    criterion = ab.ABLoss(lam=0.7).double()
    wanted = derivatives(partial(criterion, update=False), x)
    with disable_saved_tensors_hooks("forbidden"):
        close(derivatives(partial(criterion, update=False), x), wanted)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            derivatives(criterion, x, lambda z: z.detach().exp_())


def test_no_hook_is_left_behind():
    """Neither after a forward, nor after one that fails."""
    x = logits_of().requires_grad_()
    ab.ABLoss(lam=0.7).double()(x, TARGET)
    with pytest.raises(IndexError):
        ab.ABLoss(lam=0.7).double()(x, TARGET + 1)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


@pytest.mark.parametrize("kind", ["ce", "focal", "weighted_focal", "gce", "sce"])
def test_a_class_of_weight_0(kind):
    """Its rows have the second derivative 0, though their losses do not say what p is."""
    target, weight = torch.tensor([0, 1]), torch.tensor([1.0, 0.0, 2.0])

    def second(backend):
        z = torch.zeros(2, 3, requires_grad=True)
        options = {"gamma": 0.5} if "focal" in kind else {}
        losses = ab.functional.logit_loss(z * 1, target, kind=kind, weight=weight, backend=backend, **options)
        (gradient,) = torch.autograd.grad(ab.ABLoss(lambda x: x, lam=0.7)(losses), z, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), z)[0], losses.detach()

    got, wanted = second(None), second("reference")
    assert not got[0][1].any()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
