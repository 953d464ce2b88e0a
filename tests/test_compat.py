"""absgd_fast.compat against the real `absgd` package: the same numbers first, then the faults that only that package has."""

import ctypes
import gc
import inspect
import math
import os
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from absgd.losses import ABLoss as ReferenceLoss
from absgd.optimizers import ABSGD as ReferenceSGD
from absgd.optimizers import ABAdam as ReferenceAdam
from sklearn.datasets import load_digits

import absgd_fast as ab
from absgd_fast.compat.losses import ABLoss
from absgd_fast.compat.optimizers import ABSGD, ABAdam

NEVER = 10**6
OPTIMIZERS = {"sgd": (ReferenceSGD, ABSGD, 0.1), "adam": (ReferenceAdam, ABAdam, 3e-3)}


@pytest.fixture(scope="module")
def digits():
    """Images in [0, 1] and labels with 30 % noise: the losses spread, so the weights do."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    noisy = rng.random(len(labels)) < 0.3
    labels[noisy] = rng.integers(0, 10, noisy.sum())
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def train(digits, loss, optimizer, lr, steps=50, epoch=10):
    """Parameters after `steps` batches of 64; updateLambda at the end of each epoch of 10, as the package's example does."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    optimizer = optimizer(model.parameters(), lr, weight_decay=1e-4)
    for step in range(steps):
        at = slice(step * 28, step * 28 + 64)
        optimizer.zero_grad()
        loss(model(digits[0][at]), digits[1][at]).backward()
        optimizer.step()
        if step % epoch == epoch - 1:
            loss.updateLambda()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "lam, milestone, options",
    [
        (1.0, 0, {}),
        (-1.0, 2, {}),
        (2.0, 1, {"abgamma": 0.5, "abalpha": 0.7}),
        (-1.5, 3, {"abgamma": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_on_digits(digits, name, lam, milestone, options):
    """Parameters within 1e-5 of the package's; and 1e-3 or more from plain cross-entropy, so the weights took part."""
    theirs_optimizer, ours_optimizer, lr = OPTIMIZERS[name]
    theirs = train(digits, ReferenceLoss(lam, milestone, **options), theirs_optimizer, lr)
    ours = train(digits, ABLoss(lam, milestone, **options), ours_optimizer, lr)
    plain = train(digits, ReferenceLoss(lam, NEVER), theirs_optimizer, lr)
    assert (ours - theirs).abs().max() <= 1e-5 and (ours - plain).abs().max() >= 1e-3


@pytest.mark.parametrize("milestone", [0, 1, 2, 4])
def test_milestone(milestone):
    """The plain mean lasts for max(1, milestone) calls of updateLambda, the package's off-by-one. Then comes its spike."""
    torch.manual_seed(0)
    theirs, ours, values = ReferenceLoss(0.7, milestone), ABLoss(0.7, milestone), []
    for _ in range(6):
        for _ in range(2):
            logits, target = torch.randn(8, 5, requires_grad=True), torch.randint(5, (8,))
            pair = [loss(logits, target) for loss in (theirs, ours)]
            grads = [torch.autograd.grad(value, logits)[0] for value in pair]
            torch.testing.assert_close(*pair, rtol=2e-6, atol=0)
            torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)
            values.append((pair[1].item(), F.cross_entropy(logits, target).item()))
        theirs.updateLambda(), ours.updateLambda()
    robust = [abs(value - mean) > 1e-3 for value, mean in values]
    assert robust == [False] * (2 * max(1, milestone)) + [True] * (12 - 2 * max(1, milestone))


@pytest.mark.parametrize("ours, theirs", [(ABLoss, ReferenceLoss), (ABSGD, ReferenceSGD), (ABAdam, ReferenceAdam)])
def test_signatures(ours, theirs):
    """Names, order and defaults (the default criterion by its type and reduction)."""

    def plain(f):
        return [
            (p.name, (type(p.default), p.default.reduction) if isinstance(p.default, torch.nn.Module) else p.default)
            for p in inspect.signature(f).parameters.values()
        ]

    def named(f):
        return [name for name, _ in plain(f)]

    assert named(ours)[: len(named(theirs))] == named(theirs)
    defaults = {k: v for k, v in plain(theirs) if k != "criterion"}
    assert {k: v for k, v in plain(ours) if k in defaults} == defaults


@pytest.mark.parametrize("mine", [F.mse_loss, F.l1_loss])
def test_own_criterion(mine):
    torch.manual_seed(0)
    pair = [cls(-0.7, criterion=lambda x, y: mine(x, y, reduction="none").mean(1)) for cls in (ReferenceLoss, ABLoss)]
    for loss in pair:
        loss.updateLambda()
    for _ in range(3):
        x, y = torch.randn(8, 3), torch.randn(8, 3)
        torch.testing.assert_close(*(loss(x, y) for loss in pair), rtol=2e-6, atol=0)


def test_optimizers_are_the_packages(digits):
    """Momentum 0.9, torch's defaults for the rest, and a state_dict that either loads from the other."""
    for theirs, ours, lr in OPTIMIZERS.values():
        parameters = [torch.nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
        pair = [f([p], lr, weight_decay=0.01) for f, p in zip((theirs, ours), parameters)]
        for step in range(4):
            for optimizer, p in zip(pair, parameters):
                p.grad = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
                optimizer.step()
            torch.testing.assert_close(*parameters, rtol=1e-6, atol=1e-7)
            if step == 1:
                states = [optimizer.state_dict() for optimizer in pair]
                pair[0].load_state_dict(states[1]), pair[1].load_state_dict(states[0])


# ---- what the package gets wrong ------------------------------------------------------------------------------------


def reference(lam):
    loss = ReferenceLoss(lam)
    loss.updateLambda()
    return loss


def compat(lam):
    loss = ABLoss(lam)
    loss.updateLambda()
    return loss


def new(lam):
    return ab.ABLoss(lam=lam)


OURS = pytest.mark.parametrize("make", [compat, new])


def batch(seed, rows=16, classes=10):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator).requires_grad_()
    return logits, torch.randint(classes, (rows,), generator=generator)


def allocated():
    """Bytes in use in the C heap, where tensors and graph nodes live and tracemalloc does not look. Exact, with glibc."""

    class Info(ctypes.Structure):
        _fields_ = [
            (name, ctypes.c_size_t)
            for name in (
                "arena",
                "ordblks",
                "smblks",
                "hblks",
                "hblkhd",
                "usmblks",
                "fsmblks",
                "uordblks",
                "fordblks",
                "keepcost",
            )
        ]

    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Info
    gc.collect()
    info = mallinfo()
    return info.uordblks + info.hblkhd


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(loss, steps):
    logits, target = batch(0)
    for _ in range(steps):
        logits.grad = None
        loss(logits, target).backward()


glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="heap in use is asked of glibc 2.33 or newer")


@glibc
def test_the_package_grows():
    """Its average keeps every step's graph: over 1000 bytes a step at 16 x 10. (Also the test of the measure below.)"""
    theirs = reference(0.5)
    run(theirs, 100)
    before = allocated()
    run(theirs, 300)
    assert allocated() - before > 1000 * 300


@glibc
@OURS
def test_memory_does_not_grow(make):
    """20,000 steps after a warm-up: no object more, under one byte a step in the heap, none to speak of in Python's memory."""
    loss = make(0.5)
    run(loss, 500)
    before, objects, pages = allocated(), len(gc.get_objects()), resident()
    run(loss, 18_000)
    assert allocated() - before < 20_000 and len(gc.get_objects()) - objects < 100
    assert resident() - pages < 2**22  # pages are what the heap was cut into, so this is the coarser measure
    tracemalloc.start()
    run(loss, 200)
    gc.collect()
    traced = tracemalloc.get_traced_memory()[0]
    run(loss, 2000)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    assert grown < 20_000


@OURS
def test_exponent_of_500(make):
    """L/lam = 500: the package returns NaN and never recovers."""
    large = torch.tensor([[0.0, 50.0], [0.0, -3.0]], requires_grad=True)
    target = torch.tensor([0, 0])
    theirs, ours = reference(0.1), make(0.1)
    assert math.isnan(theirs(large, target))
    value = ours(large, target)
    (grad,) = torch.autograd.grad(value, large)
    spike = 1 if make is new else 1 / 0.9
    assert value.item() == pytest.approx(50 * spike, rel=1e-4)  # all weight on the one large loss
    np.testing.assert_allclose(grad, [[-spike, spike], [0, 0]], rtol=1e-4, atol=1e-30)
    small = large.detach() / 100
    for _ in range(300):  # log s falls by log 10 a step, from 500
        theirs(small, target), ours(small, target)
    wanted = new(0.1)(small, target)
    assert float(ours(small, target)) == pytest.approx(float(wanted), rel=1e-4) and float(theirs(small, target)) == 0


@OURS
def test_resume(make):
    """Saved after 3 batches, continued with 2 more: the package starts its average again."""

    def go_on(factory):
        first, second = factory(0.5), factory(0.5)
        for seed in range(3):
            first(*batch(seed))
        second.load_state_dict(first.state_dict())
        return [[float(loss(*batch(seed))) for seed in (7, 8)] for loss in (first, second)]

    theirs, ours = go_on(reference), go_on(make)
    assert abs(theirs[0][0] - theirs[1][0]) > 1e-4 and ours[0] == ours[1]


@OURS
@pytest.mark.filterwarnings("ignore:.*the loaded state has lam")
def test_resume_carries_the_milestone(make):
    """The stage travels too: a resumed run does not fall back to the plain mean."""
    first, second = make(0.5), ABLoss(0.5) if make is compat else ab.ABLoss(lam=math.inf)
    second.load_state_dict(first.state_dict())
    assert float(first(*batch(0))) == float(second(*batch(0)))
    assert abs(float(first(*batch(1))) - float(F.cross_entropy(*batch(1)))) > 1e-3


@OURS
@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_evaluation_pass(make, mode):
    """An evaluation of large losses between two training batches: the package's next step is another one."""

    def next_value(factory, evaluate):
        loss = factory(0.5)
        loss(*batch(0))
        if evaluate:
            logits, target = batch(1)
            if mode == "eval":
                loss.eval()(5 * logits, target)
                loss.train()
            else:
                with torch.no_grad():
                    loss(5 * logits, target)
        return float(loss(*batch(2)))

    assert abs(next_value(reference, True) - next_value(reference, False)) > 1e-3
    assert next_value(make, True) == next_value(make, False)


def test_ignored_rows():
    """A padded batch is the batch without its padding; the package counts each ignored row as a loss of 0."""
    logits, target = batch(0)
    padded = target.clone()
    padded[10:] = -100

    def results(factory, logits, target):
        leaf = logits.detach().requires_grad_()
        value = factory(0.5)(leaf, target)
        value.backward()
        return value.item(), leaf.grad[:10]

    (theirs, _), (theirs_short, _) = results(reference, logits, padded), results(reference, logits[:10], target[:10])
    assert abs(theirs - theirs_short) > 1e-3
    (ours, grad), (ours_short, grad_short) = results(new, logits, padded), results(new, logits[:10], target[:10])
    assert ours == pytest.approx(ours_short, rel=1e-6)
    torch.testing.assert_close(grad, grad_short, rtol=1e-5, atol=1e-8)


@OURS
def test_empty_batch(make):
    """The package's average is NaN from then on."""
    empty = torch.zeros(0, 10, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    theirs = reference(0.5)
    theirs(*batch(0)), theirs(*empty)
    assert math.isnan(theirs(*batch(1)))
    with_empty, without = make(0.5), make(0.5)
    with_empty(*batch(0)), without(*batch(0))
    value = with_empty(*empty)
    value.backward()
    assert value.item() == 0
    assert float(with_empty(*batch(1))) == float(without(*batch(1)))


def test_empty_batch_before_the_milestone():
    """The package divides by zero there."""
    empty = torch.zeros(0, 10, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ZeroDivisionError):
        ReferenceLoss(0.5)(*empty)
    assert float(ABLoss(0.5)(*empty)) == 0


# ---- the authors' research code --------------------------------------------------------------------------------------


def test_repository_focal_has_the_weight_inside():
    """(1 - q)^gamma m with m = w n, q = exp(-m): their formula, in float64."""
    from absgd_fast.compat.repository import Focal

    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    target, weight = torch.tensor([0, 1, 2, 3, 4, -100, 2]), torch.rand(5, dtype=torch.float64) + 0.3
    m = F.cross_entropy(logits, target, weight, reduction="none")
    wanted = (1 - torch.exp(-m)) ** 1.5 * m
    for backend in (None, "reference"):
        losses = Focal(1.5, weight, backend=backend)(logits, target)
        torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=1e-14)
        ours, theirs = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (losses, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_repository_conventions():
    from absgd_fast.compat.repository import ABLoss

    logits, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = F.cross_entropy(logits, target, reduction="none")
    for lam in (200.0, 1e4):  # the plain mean
        torch.testing.assert_close(ABLoss(lam)(logits, target), losses.mean())
    weights = torch.exp(losses / 0.7) / (0.9 * torch.exp(losses / 0.7).mean())  # their first step: s starts at 0
    torch.testing.assert_close(ABLoss(0.7)(logits, target), (weights * losses).mean())
    torch.testing.assert_close(ABLoss(0.7, noisy=True)(logits, target), ((weights + 1) * losses).mean())
