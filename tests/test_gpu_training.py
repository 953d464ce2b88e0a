"""A training step as a whole, on every backend of a GPU: deferred micro-batches, LinearABLoss, rules and L2RW."""

import copy
from contextlib import nullcontext
from unittest import SkipTest

import numpy as np
import torch
from gpu_cases import BEYOND, INF, LOSSES, NAN, close, numpy, over, tensors_of
from gpu_hooks import pytest_generate_tests, setup_function, teardown_function  # noqa: F401
from gpu_trainings import GROUPED, MICRO, WEIGHTINGS, Head, Micro, no_waiting
from tensors import DTYPES
from test_gpu_steps import OPTIMIZERS

import absgd_fast as ab

# ---- a training step as a whole --------------------------------------------------------------------------------------


# eps is far above the rounding of a gradient: Adam's first step is lr g / (|g| + eps), where a g of rounding alone were a step
WITH_EPS = {name: (*kinds, options | {"eps": 1e-4}) for name, (*kinds, options) in OPTIMIZERS.items()}
SGDS = {
    "robust=": (ab.ABSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.01), False),
    "finish_": (ab.ABSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.01), True),
    "finish_, torch's": (torch.optim.SGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9), True),
}


@over(way=SGDS | {name: (*rest, False) for name, rest in WITH_EPS.items()}, sizes=MICRO)
def test_deferred(where, way, sizes):
    """Uneven micro-batches, an empty one first, more rows than a launch weighs: one batch in float64 and torch's optimizer.
    A bad row then leaves everything as it was, and the step after that is as if it had not been."""
    optimizer, torchs, options, finish = way
    micro = Micro(where, sizes, 10, optimizer, finish, **options)
    params = [torch.nn.Parameter(p.detach().cpu().double()) for p in (micro.w, micro.b)]
    criterion, plain = ab.ABLoss(lam=-0.75, backend="reference").double(), torchs(params, **options)

    def step(k):
        micro.feed(k)
        micro.step()
        plain.zero_grad()
        criterion(micro.x.cpu().double() * params[0] + params[1], micro.y.cpu()).backward()
        plain.step()
        for p, q in zip((micro.w, micro.b), params):
            torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=2e-5, atol=2e-5)
        close(micro.criterion.log_s, numpy(criterion.log_s), torch.float32, "log_s", ulps=512, cancels=True)
        last = numpy(criterion.last.weights)[-sizes[-1] :]
        np.testing.assert_allclose(numpy(micro.criterion.last.weights), last, rtol=1e-4)

    for k in range(3):
        step(k)
    before = [t.clone() for t in micro.state().values()]
    micro.feed(3)
    micro.x[-1, 0] = NAN
    if finish:
        micro.accumulate()
        assert not micro.criterion.finish_([micro.w, micro.b])
        assert all(p.grad is None or p.grad.isnan().all() for p in (micro.w, micro.b))  # the host does not know on a GPU
        assert not where.gpu or micro.w.grad is not None
    else:
        micro.step()
    assert all(torch.equal(a, b) for a, b in zip(before, micro.state().values()))
    assert int(micro.criterion.nonfinite_batches) == 1
    step(3)


# ---- LinearABLoss ------------------------------------------------------------------------------------------------------


def relative(got, exact):
    """Distance over length: single elements of a gradient cancel."""
    got, exact = got.detach().cpu().double(), exact.detach().double()
    return float((got - exact).norm() / exact.norm().clamp(min=1e-300))


@over(
    loss=["ce", "focal", "gce, pruned", "ldam"],
    dtype={name: DTYPES[name] for name in ("fp32", "bf16", "fp64")},
    bias={"bias": True, "no bias": False},
)
def test_linear(where, loss, dtype, bias):
    """Several chunks, the last short: the plain route in float64, over steps in which the state moves; then one bad row."""
    if where.backend == "triton" and (loss != "ce" or dtype == torch.float64):
        raise SkipTest("each kernel costs a second to compile")
    if loss == "gce, pruned" and dtype == torch.bfloat16:
        raise SkipTest("logits rounded to bfloat16 prune other rows than exact ones")
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-11}[dtype]
    exact = None
    for seed in range(2):
        head = Head(where, dtype, bias, loss, seed)
        if exact is None:
            exact = ab.ABLoss(
                LOSSES[loss].module(**tensors_of(LOSSES[loss].given(len(head.given[1])), torch.float64)),
                lam=0.6,
                backend="reference",
            ).double()
        else:
            head.criterion.log_s.copy_(exact.log_s)
        for name, got, wanted in zip(("loss", "hidden", "weight", "bias"), head.step(), head.plain(exact)):
            assert relative(got, wanted) <= limit, f"{name}: off by {relative(got, wanted):.1e}"
        assert relative(head.criterion.last.weights, exact.last.weights) <= 3 * limit
        assert relative(head.criterion.log_s, exact.log_s) <= limit
    with torch.no_grad():
        head.given[0][1] = NAN
    before = head.criterion.log_s.clone()
    loss, hidden_grad, *_ = head.step()
    assert loss.isnan() and hidden_grad[1].isnan().all() and hidden_grad[0].isfinite().all()
    assert torch.equal(head.criterion.log_s, before) and int(head.criterion.nonfinite_batches) == 1


def test_linear_deferred(where):
    """Micro-batches of chunks, the first of them empty: the gradient of one batch."""
    head = Head(where, torch.float32, True, deferred=True)
    hidden, weight, bias = head.given
    exact = ab.ABLoss(lam=0.6, backend="reference").double()
    for seed in range(2):
        head.change(seed)
        for t in head.wanted:
            t.grad = None
        rows = len(hidden)
        for part in (slice(0, 0), slice(0, rows // 3), slice(rows // 3, rows)):
            head.criterion(hidden[part], weight, head.target[part], bias).backward()
        assert head.criterion.finish_(head.wanted)
        _, *wanted = head.plain(exact)
        for name, t, gradient in zip(("hidden", "weight", "bias"), head.wanted, wanted):
            assert relative(t.grad, gradient) <= 1e-5, f"{name}: off by {relative(t.grad, gradient):.1e}"
        close(head.criterion.log_s, numpy(exact.log_s), torch.float32, "log_s", ulps=512)


@over(rule=list(WEIGHTINGS), shape={"small": (37, 5), "large": (BEYOND[0] * 30, 5)})
def test_rules_from_losses_to_weights(where, rule, shape):
    """As on the CPU in float64, and without waiting; one loss is ignored, one is bad."""
    logits, target = torch.randn(shape, generator=torch.Generator().manual_seed(1)), torch.arange(shape[0]) % shape[1]
    target[3] = -100
    logits[7, 2] = INF
    groups = (torch.arange(shape[0]) * 7 % 11) % 3
    exact = ab.ABLoss(rule=copy.deepcopy(WEIGHTINGS[rule])).double()
    ours = where.robust(ab.CrossEntropy(backend=where.backend), rule=copy.deepcopy(WEIGHTINGS[rule]))
    x, here, grouped = where.leaf(logits), target.to(where.device), groups.to(where.device)
    given = lambda groups: {"groups": groups} if rule in GROUPED else {}  # noqa: E731
    for k in range(2):  # the first call compiles
        with no_waiting(where) if k else nullcontext():
            loss = ours(x, here, **given(grouped))
            loss.backward()
    exact(logits.double(), target, **given(groups))
    torch.testing.assert_close(ours.last.weights.cpu().double(), exact.last.weights, rtol=2e-5, atol=1e-6, equal_nan=True)
    assert loss.isnan() and int(ours.nonfinite_batches) == 2


@over(method=("jvp", "finite_difference", "unrolled", "last_layer"))
def test_l2rw(where, method):
    """As on the CPU in float64; dropout masks and running statistics are left alone, and the host does not wait. (Not in a graph:
    it reads torch's random state, which torch refuses while it captures.)"""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    model = torch.nn.Sequential(*layers)
    x, y = torch.randn(12, 1, 6, 6), torch.arange(12) % 3
    exact = ab.meta.l2rw_weights(copy.deepcopy(model).double(), F_NONE, (x.double(), y), (x[:4].double() + 0.1, y[:4]), method)
    model, x, y = model.to(where.device), x.to(where.device), y.to(where.device)
    loss_fn = ab.CrossEntropy(backend=where.backend)
    batch, clean = (x, y), (x[:4] + 0.1, y[:4])
    with torch.backends.cudnn.flags(allow_tf32=False):
        ab.meta.l2rw_loss(model, loss_fn, batch, clean, method)  # compiles
        state, before = random_numbers(where), {k: v.clone() for k, v in model.state_dict().items()}
        with no_waiting(where):
            weights = ab.meta.l2rw_weights(model, loss_fn, batch, clean, method)
        assert torch.equal(state, random_numbers(where))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        ab.meta.l2rw_loss(model, loss_fn, batch, clean, method).backward()
    assert float((weights.cpu() - exact).abs().sum()) <= (2e-2 if method == "finite_difference" else 1e-4)


F_NONE = torch.nn.CrossEntropyLoss(reduction="none")


def random_numbers(where):
    return torch.cuda.get_rng_state(where.device) if where.gpu else torch.get_rng_state()
