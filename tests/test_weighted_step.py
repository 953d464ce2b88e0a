"""weighted_momentum_step_: against float64 (the oracle's weights, the mean and the step written here), against ABLoss with
autograd and the optimizers, its options, bad batches, layouts of memory, threads, errors, the examples of docs/scale.md."""

import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import DTYPES, wide
from torch.func import functional_call, grad_and_value, vmap

import absgd_fast as ab
from absgd_fast.functional import weighted_momentum_step_

INF, NAN = math.inf, math.nan
# What a step may lose: some ulp of the sum of 13 rows; one rounding of a half-precision parameter besides.
REAL = {torch.float32: dict(rtol=2e-6, atol=2e-6), torch.float64: dict(rtol=1e-13, atol=1e-13)}
NEAR = REAL | {torch.bfloat16: dict(rtol=2**-8, atol=2e-6), torch.float16: dict(rtol=2**-10, atol=2e-6)}


def exact_step(
    params,
    buffers,
    grads,
    losses,
    log_s,
    *,
    lam,
    lr,
    momentum=0.9,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    heavy_ball=False,
    mix=0.0,
    mask=None,
    sample_weight=None,
    **options,
):
    """One step in float64 with NumPy: (parameters, buffers, log s), new arrays."""
    params, buffers = ([np.asarray(t, np.float64) for t in ts] for ts in (params, buffers))
    w = oracle.robust_weights(losses, float(log_s), float(lam), mask=mask, **options)
    if (w.valid & ~w.good).any():
        return params, buffers, float(log_s)
    t = np.ones(len(w.weights)) if sample_weight is None else np.asarray(sample_weight, np.float64)
    factor = np.where(w.good, (w.weights + (0 if math.isinf(lam) else mix)) * np.where(w.good, t, 0), 0) / max(w.good.sum(), 1)
    out = [], []
    for p, b, g in zip(params, buffers, grads):
        g = np.asarray(g, np.float64)
        mean = sum((factor[i] * g[i] for i in np.flatnonzero(factor)), np.zeros(p.shape))
        slope = (-mean if maximize else mean) + weight_decay * p
        if heavy_ball:
            b = momentum * b - lr * slope
            p = p + b
        else:
            b = momentum * b + (1 - dampening) * slope
            p = p - lr * (slope + momentum * b if nesterov else b if momentum else slope)
        out[0].append(p)
        out[1].append(b)
    return *out, w.log_s


class Problem:
    """Parameters of these shapes, zero buffers, and batches of per-sample gradients and losses, the same for equal seeds."""

    def __init__(self, shapes, batch, dtype=torch.float32, seed=0):
        self.draw = torch.Generator().manual_seed(seed)
        self.batch, self.dtype, self.real = batch, dtype, wide(dtype)
        self.params = [self.random(s).to(dtype) for s in shapes]
        self.buffers = [torch.zeros(s, dtype=self.real) for s in shapes]

    def random(self, *shape):
        return torch.randn(*shape, generator=self.draw, dtype=torch.float64)

    def next(self):
        """Gradients and losses of one batch."""
        grads = [self.random(self.batch, *p.shape).to(self.dtype) for p in self.params]
        return grads, (torch.rand(self.batch, generator=self.draw, dtype=torch.float64) * 3).to(self.real)

    def step(self, log_s, exact=True, batch=None, **options):
        """One step on the next batch, checked against the exact one from the same place; the new log s."""
        grads, losses = batch or self.next()
        expected = exact_step(
            self.doubles(self.params),
            self.doubles(self.buffers),
            self.doubles(grads),
            losses.double().numpy(),
            log_s,
            **{k: v for k, v in options.items() if k != "backend"},
        )
        before = [b.clone() for b in self.buffers]
        new = weighted_momentum_step_(self.params, self.buffers, grads, losses, log_s, **options)
        assert isinstance(new, torch.Tensor) and new.shape == () and not new.requires_grad
        np.testing.assert_allclose(float(new), expected[2], **NEAR[new.dtype])
        for p, e in zip(self.params, expected[0]):
            np.testing.assert_allclose(p.double().numpy(), e, **NEAR[self.dtype])
        for b, e, old in zip(self.buffers, expected[1], before):
            assert torch.equal(b, old) if options.get("momentum") == 0 else True
            if options.get("momentum") != 0:
                np.testing.assert_allclose(b.double().numpy(), e, **NEAR[self.real])
        return new

    @staticmethod
    def doubles(tensors):
        return [t.double().numpy() for t in tensors]


def changed(before, after):
    return [not torch.equal(a, b) for a, b in zip(before, after)]


def copies(*lists):
    return [[t.clone() for t in ts] for ts in lists]


# ---- values ---------------------------------------------------------------------------------------------------------

# A matrix, an odd vector, a number, no number, one, and more than one register and one 64-column share of every kind
SHAPES = [(3, 4), (37,), (), (0, 5), (1,), (5, 3, 3, 3)]
OPTIONS = {
    "as it is": {},
    "no momentum": dict(momentum=0.0, weight_decay=0.1),
    "decay": dict(weight_decay=0.05),
    "dampening": dict(momentum=0.8, dampening=0.3),
    "nesterov": dict(nesterov=True, weight_decay=0.01),
    "heavy ball": dict(heavy_ball=True, weight_decay=0.01),
    "maximize": dict(maximize=True, weight_decay=0.05),
    "maximize, nesterov": dict(maximize=True, nesterov=True),
    "mix": dict(mix=0.7),
    "alpha, gamma": dict(alpha=0.6, gamma=0.3),
    "gamma of 1": dict(gamma=1.0),
    "init zero": dict(init="zero"),
    "batch": dict(normalizer="batch", alpha=0.5),
    "none": dict(normalizer="none"),
    "max_weight": dict(max_weight=1.1),
    "lam inf": dict(lam=INF, mix=0.7, max_weight=0.5),  # W = 1, and neither counts
    "lam -inf": dict(lam=-INF),
    "attention": dict(lam=0.4),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_three_steps(backend, dtype, options):
    """13 rows: 8, 4 and 1 at a time. Each step starts where the last one ended, rounded as it is."""
    problem = Problem(SHAPES, 13, dtype)
    log_s = -INF
    for _ in range(3):
        log_s = problem.step(log_s, **dict(lam=-0.7, lr=0.125) | OPTIONS[options], backend=backend)


@pytest.mark.parametrize("options", ["as it is", "mix", "lam inf"])
def test_rows_that_do_not_count(backend, dtype, options):
    """Masked rows and rows of sample weight 0 hold NaN: a loss and gradients that nobody may read."""
    problem = Problem(SHAPES, 13, dtype)
    mask, t = torch.arange(13) % 4 != 1, torch.linspace(0, 2, 13, dtype=problem.real)  # t[0] = 0
    log_s = -INF
    for _ in range(3):
        grads, losses = problem.next()
        for g in grads:
            g[~mask] = NAN
            g[0] = INF
        losses[~mask], t[~mask] = NAN, NAN
        rule = dict(lam=-0.7, lr=0.125) | OPTIONS[options]
        log_s = problem.step(log_s, batch=(grads, losses), mask=mask, sample_weight=t, **rule, backend=backend)


@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 40),
    lam=st.sampled_from([-20.0, -1.0, -0.3, 0.3, 1.0, 20.0]),
    gamma=st.sampled_from([1.0, 0.9, 0.01]),
    log_s=st.sampled_from([-INF, -4.0, 3.0]),
    init=st.sampled_from(["first", "zero"]),
)
def test_any_batch(backend, seed, batch, lam, gamma, log_s, init):
    sizes = [(int(n),) for n in np.random.default_rng(seed).integers(0, 200, 3)]
    problem = Problem(sizes, batch, torch.float64, seed)
    for _ in range(2):
        log_s = float(problem.step(log_s, lam=lam, gamma=gamma, init=init, lr=0.1, mix=0.1, weight_decay=0.01, backend=backend))


# around 4, 8 and 16 lanes and the 64 columns of a share; 8192 float32 or 4096 float64 are summed at a time
COLUMNS = [1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 129, 4097, 8193, 20_001]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 64, 67])
def test_every_number_of_rows_and_columns(backend, batch):
    """fp32, in one call for all of the columns; 64 rows and more only of the shorter ones."""
    problem = Problem([(n,) for n in COLUMNS if n * batch < 200_000], batch)
    problem.step(0.3, lam=-0.7, lr=0.125, weight_decay=0.1, backend=backend)


def test_long_batches(backend):
    """1029 rows (CUDA keeps the factors of 1024), of 70 numbers."""
    problem = Problem([(70,), (3,)], 1029, torch.float64)
    problem.step(-INF, lam=0.7, lr=0.125, backend=backend)


def test_losses_far_apart(backend):
    """L / lam = 1000 and -1000: a weight that underflows to 0, whose row then takes no part; the kernels lose no digit of the
    others in fp32, where log s alone would lose 3e-5 (plain torch does)."""
    problem = Problem([(5,)], 4, torch.float64 if backend == "reference" else torch.float32)
    grads, _ = problem.next()
    losses = torch.tensor([1000.0, 999.0, 1000.5, -1000.0], dtype=problem.real)
    grads[0][3] = NAN
    new = problem.step(999.0, batch=(grads, losses), lam=1.0, lr=0.125, backend=backend)
    assert float(new) == pytest.approx(1000, abs=1)


def test_no_worse_than_eager(backend):
    """fp32 at 128 x 5000: the largest error, beside that of a matrix product and torch's SGD in fp32 with the same weights."""
    problem = Problem([(5000,)], 128)
    (grads,), losses = problem.next()
    before = problem.params[0].clone()
    expected = exact_step([before.double()], [np.zeros(5000)], [grads], losses.double().numpy(), -INF, lam=-0.5, lr=1.0)[0][0]
    weights, _ = ab.functional.robust_weights(losses, -INF, -0.5, backend="reference")
    eager = torch.nn.Parameter(before.clone())
    eager.grad = weights @ grads / 128
    torch.optim.SGD([eager], lr=1.0, momentum=0.9).step()
    weighted_momentum_step_(problem.params, problem.buffers, [grads], losses, -INF, lam=-0.5, lr=1.0, backend=backend)
    errors = [np.abs(t.detach().double().numpy() - expected).max() for t in (problem.params[0], eager)]
    assert errors[0] <= 2 * errors[1] + 1e-7


# ---- the composition it replaces --------------------------------------------------------------------------------------


def network(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 11), torch.nn.Tanh(), torch.nn.Linear(11, 5)).to(dtype)


COMPOSED = {
    "torch's SGD": (torch.optim.SGD, dict(momentum=0.9, weight_decay=1e-3)),
    "torch's SGD, nesterov": (torch.optim.SGD, dict(momentum=0.8, nesterov=True)),
    "ABSGD": (ab.ABSGD, dict(momentum=0.9, weight_decay=1e-3)),
    "ABSGD, heavy ball": (ab.ABSGD, dict(momentum=0.9, heavy_ball=True, maximize=True)),
    "ABSGD, no momentum": (ab.ABSGD, dict(momentum=0.0, weight_decay=1e-3)),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=["fp32", "fp64"])
def test_as_loss_backward_and_optimizer(backend, name, dtype, near):
    """20 steps of per-sample gradients by vmap(grad), against ABLoss, backward and the optimizer on a twin."""
    make, options = COMPOSED[name]
    ours, theirs = network(dtype), network(dtype)
    rule = dict(lam=-0.75, gamma=0.7, alpha=0.9, mix=0.3, max_weight=3.0, init="zero")
    criterion = ab.ABLoss(**rule, backend=backend).to(dtype)
    optimizer = make(theirs.parameters(), lr=0.05, **options)
    params = {k: p.detach() for k, p in ours.named_parameters()}
    buffers = [torch.zeros_like(p) for p in params.values()]

    def loss_of(params, x, y):
        return torch.nn.functional.cross_entropy(functional_call(ours, params, (x[None],)), y[None])

    log_s = torch.tensor(-INF, dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        x = torch.randn(19, 7, generator=draw, dtype=torch.float64).to(dtype)
        y = torch.randint(5, (19,), generator=draw)
        mask, t = torch.rand(19, generator=draw) < 0.8, torch.rand(19, generator=draw, dtype=torch.float64).to(dtype)
        grads, losses = vmap(grad_and_value(loss_of), in_dims=(None, 0, 0))(params, x, y)
        log_s = weighted_momentum_step_(
            params.values(),
            buffers,
            grads.values(),
            losses,
            log_s,
            **rule,
            lr=0.05,
            mask=mask,
            sample_weight=t,
            **options,
            backend=backend,
        )
        optimizer.zero_grad()
        criterion(theirs(x), y, mask=mask, sample_weight=t).backward()
        optimizer.step()
    torch.testing.assert_close(log_s, criterion.log_s, rtol=near, atol=near)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert (p - q).abs().max() <= near * q.abs().max()


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_row_writes_nothing(backend, bad):
    """In each place, in first and later steps. A masked one is as if it were absent. 19: registers of 16, 8 and 4, and tails."""
    problem = Problem([(3, 4), (70,)], 19)
    log_s = torch.tensor(0.4)
    weighted_momentum_step_(problem.params, problem.buffers, *problem.next(), log_s, lam=-0.7, lr=0.1, backend=backend)
    for at in range(19):
        grads, losses = problem.next()
        losses[at] = bad
        before = copies(problem.params, problem.buffers)
        for lam in (-0.7, INF):
            new = weighted_momentum_step_(problem.params, problem.buffers, grads, losses, log_s, lam=lam, lr=0.1, backend=backend)
            assert torch.equal(new, log_s) and new.data_ptr() != log_s.data_ptr()
            assert not any(changed(before[0] + before[1], problem.params + problem.buffers))
        problem.step(log_s, batch=(grads, losses), mask=torch.arange(19) != at, lam=-0.7, lr=0.1, backend=backend)


def test_overflow_of_the_exponent_is_a_bad_row(backend):
    """1e30 / 1e-10 is finite in fp64 and infinite in fp32, the precision of these losses."""
    problem = Problem([(3,)], 2)
    grads, _ = problem.next()
    before = copies(problem.params, problem.buffers)
    new = weighted_momentum_step_(
        problem.params, problem.buffers, grads, torch.tensor([1e30, 1e-10]), 0.25, lam=1e-10, lr=0.1, backend=backend
    )
    assert float(new) == 0.25 and not any(changed([t for ts in before for t in ts], problem.params + problem.buffers))


@pytest.mark.parametrize("batch, mask", [(0, None), (3, torch.zeros(3, dtype=torch.bool))], ids=["no rows", "all masked"])
@pytest.mark.parametrize("lam", [-0.7, INF])
def test_an_empty_batch_goes_on(backend, batch, mask, lam):
    """G = 0: momentum and decay act; log s stays."""
    problem = Problem([(3, 4), (70,)], batch)
    for b in problem.buffers:
        b.copy_(torch.randn(b.shape))
    before = copies(problem.params, problem.buffers)
    for log_s in (-INF, torch.tensor(0.4)):
        new = problem.step(log_s, mask=mask, lam=lam, lr=0.1, weight_decay=0.1, backend=backend)
        assert float(new) == float(log_s)
    assert all(changed(before[0] + before[1], problem.params + problem.buffers))


def test_no_parameters(backend):
    """The state moves all the same; so it does where no parameter has a number."""
    losses = torch.tensor([0.5, 2.0])
    wanted = oracle.robust_weights([0.5, 2.0], 0.3, -0.7).log_s
    empty = torch.zeros(0, 3)
    for lists in (([], [], []), ([empty], [empty.clone()], [torch.zeros(2, 0, 3)])):
        new = weighted_momentum_step_(*lists, losses, 0.3, lam=-0.7, lr=0.1, backend=backend)
        assert float(new) == pytest.approx(wanted, rel=1e-6) and new.dtype == torch.float32
        assert float(weighted_momentum_step_(*lists, losses * NAN, 0.3, lam=-0.7, lr=0.1, backend=backend)) == pytest.approx(0.3)


def test_inputs_are_left_alone(backend):
    """Only parameters and buffers are written, without momentum only parameters; the new state is new memory."""
    problem = Problem([(3, 4), (5,)], 6)
    grads, losses = problem.next()
    log_s, lam, lr = torch.tensor(0.5), torch.tensor(-0.7), torch.tensor([0.1])
    mask, t = torch.arange(6) > 0, torch.rand(6)
    given = [*grads, losses, log_s, lam, lr, mask, t]
    before = copies(given)[0]
    buffers = copies(problem.buffers)[0]
    for momentum in (0.9, 0.0):
        new = weighted_momentum_step_(
            problem.params,
            problem.buffers,
            grads,
            losses,
            log_s,
            lam=lam,
            lr=lr,
            momentum=momentum,
            mask=mask,
            sample_weight=t,
            backend=backend,
        )
        assert not any(changed(before, given))
        assert new.data_ptr() not in {x.data_ptr() for x in given}
        assert any(changed(buffers, problem.buffers)) == (momentum == 0.9)
        buffers = copies(problem.buffers)[0]


@pytest.mark.parametrize("none", [None, [], [None, None]], ids=str)
def test_buffers_may_be_absent_without_momentum(backend, none):
    problem = Problem([(3,), (2, 2)], 6)
    batch, twin = problem.next(), copies(problem.params)[0]
    problem.step(0.3, batch=batch, lam=-0.7, lr=0.1, momentum=0.0, backend=backend)
    weighted_momentum_step_(twin, none, *batch, 0.3, lam=-0.7, lr=0.1, momentum=0.0, backend=backend)
    assert not any(changed(twin, problem.params))


@pytest.mark.parametrize("state", ["float", "fp32", "fp64"])
def test_dtype_of_the_state(backend, dtype, state):
    """That of log s if it is a tensor, else of the losses."""
    given_dtype = {"float": None, "fp32": torch.float32, "fp64": torch.float64}[state]
    log_s = 0.3 if given_dtype is None else torch.tensor(0.3, dtype=given_dtype)
    problem = Problem([(5,)], 4, dtype)
    new = weighted_momentum_step_(problem.params, problem.buffers, *problem.next(), log_s, lam=-0.7, lr=0.1, backend=backend)
    assert new.dtype == (given_dtype or wide(dtype))


NUMBER_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]


@pytest.mark.parametrize("dtype", NUMBER_DTYPES)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_numbers_in_tensors(backend, dtype, shape):
    """lam, lr and log s as numbers and as tensors: the same step; lr of one dimension also of a parameter of none."""
    one, other = Problem([(5,), ()], 4), Problem([(5,), ()], 4)
    lam, lr, log_s = (0.75, 0.125, 0.25) if dtype.is_floating_point else (2, 1, 1)
    batch = one.next()
    wanted = weighted_momentum_step_(one.params, one.buffers, *batch, log_s, lam=lam, lr=lr, backend=backend)
    new = weighted_momentum_step_(
        other.params,
        other.buffers,
        *batch,
        torch.tensor(log_s, dtype=dtype),
        lam=torch.tensor(lam, dtype=dtype),
        lr=torch.full(shape, lr, dtype=dtype),
        backend=backend,
    )
    torch.testing.assert_close(one.params + one.buffers, other.params + other.buffers, rtol=1e-6, atol=1e-7)
    assert new.dtype == (torch.float64 if dtype == torch.float64 else wanted.dtype)  # a state that keeps small changes
    assert float(new) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_losses_are_widened(backend, half):
    problem, twin = (Problem([(5,)], 4, half) for _ in range(2))
    grads, losses = problem.next()
    losses = losses.to(half)
    weighted_momentum_step_(problem.params, problem.buffers, grads, losses, 0.3, lam=-0.7, lr=0.1, backend=backend)
    weighted_momentum_step_(twin.params, twin.buffers, grads, losses.float(), 0.3, lam=-0.7, lr=0.1, backend=backend)
    assert not any(changed(twin.params + twin.buffers, problem.params + problem.buffers))


def test_autograd_sees_a_write_and_no_more(backend):
    """Leaves that require a gradient are stepped without no_grad, keep it, and a graph that saved one of them notices."""
    params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
    buffers = [torch.zeros(3), torch.zeros(2)]
    graph = params[0].square().sum()
    versions = [t._version for t in params + buffers]
    grads, losses = [torch.ones(2, 3), torch.ones(2, 2)], torch.rand(2, requires_grad=True)
    log_s = weighted_momentum_step_(params, buffers, grads, losses, -INF, lam=1.0, lr=0.1, backend=backend)
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in params) and not log_s.requires_grad
    assert all(t._version > v for t, v in zip(params + buffers, versions))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


def test_under_torch_compile(backend):
    """One graph, traced with fake tensors; the numbers of the eager call."""
    problem, twin = (Problem([(5,), (2, 3)], 4, torch.float64) for _ in range(2))
    step = partial(weighted_momentum_step_, lam=-0.7, backend=backend)
    # plain torch decides by the losses' values whether to write, which leaves the graph
    compiled = torch.compile(step, backend="aot_eager", fullgraph=backend != "reference")
    log_s = wanted = torch.tensor(0.3, dtype=torch.float64)
    for lr in (0.1, 0.2):
        batch, lr = problem.next(), torch.tensor(lr)
        log_s = compiled(problem.params, problem.buffers, *batch, log_s, lr=lr)
        wanted = step(twin.params, twin.buffers, *batch, wanted, lr=lr)
    torch.testing.assert_close(
        [log_s, *problem.params, *problem.buffers], [wanted, *twin.params, *twin.buffers], rtol=1e-12, atol=1e-12
    )


# ---- memory ---------------------------------------------------------------------------------------------------------


def strided(t):
    """The same numbers with gaps between them."""
    out = torch.zeros(*t.shape, 2, dtype=t.dtype)[..., 0]
    return out.copy_(t)


def off(t):
    """The same numbers one element into their memory."""
    return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def apart(g):
    """Rows of a wider block."""
    return torch.zeros(len(g), g[0].numel() + 3, dtype=g.dtype)[:, 2:-1].view(g.shape).copy_(g)


def channels_last(t):
    return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t


def rows_channels_last(g):
    return torch.stack([channels_last(x) for x in g.unbind()]) if g.dim() != 5 else g.movedim(2, -1).contiguous().movedim(-1, 2)


same = torch.clone
LAYOUTS = {  # parameters, buffers, gradients, losses
    "gaps everywhere": (strided, strided, strided, strided),
    "gaps in the parameters": (strided, same, same, same),
    "gaps in the buffers": (same, strided, same, same),
    "gaps in the gradients": (same, same, strided, same),
    "odd addresses": (off, off, off, off),
    "odd parameters": (off, same, same, same),
    "rows of a wider block": (same, same, apart, same),
    "odd rows of a wider block": (off, off, apart, off),
    "channels last": (channels_last, channels_last, rows_channels_last, same),
    "channels last, gradients not": (channels_last, channels_last, same, same),
    "gradients channels last alone": (same, same, rows_channels_last, same),
    "buffers channels last alone": (same, channels_last, same, same),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, dtype, layout):
    """The same step whatever lies where, in two steps; a tensor that is copied for it is written back."""
    shapes = [(2, 3, 2, 3), (7, 9), (5,), (), (128,)]
    plain, twin = Problem(shapes, 9, dtype), Problem(shapes, 9, dtype)
    of_params, of_buffers, of_grads, of_losses = LAYOUTS[layout]
    params, buffers = [of_params(p) for p in plain.params], [of_buffers(b) for b in plain.buffers]
    places = [t.data_ptr() for t in params + buffers]
    log_s = wanted = torch.tensor(-INF)
    for _ in range(2):
        grads, losses = twin.next()
        wanted = twin.step(wanted, batch=(grads, losses), lam=-0.7, lr=0.125, weight_decay=0.1, backend=backend)
        given = [of_grads(g) for g in grads], of_losses(losses)
        log_s = weighted_momentum_step_(params, buffers, *given, log_s, lam=-0.7, lr=0.125, weight_decay=0.1, backend=backend)
    torch.testing.assert_close(log_s, wanted, rtol=1e-6, atol=1e-6)
    for t, w in zip(params + buffers, twin.params + twin.buffers):
        torch.testing.assert_close(t, w, rtol=NEAR[t.dtype]["rtol"], atol=NEAR[t.dtype]["atol"])
    assert [t.data_ptr() for t in params + buffers] == places


def test_rows_that_are_one(backend):
    """A gradient expanded over the batch: its rows share their memory, which nobody writes."""
    problem = Problem([(5,)], 4)
    _, losses = problem.next()
    problem.step(0.3, batch=([torch.randn(5).expand(4, 5)], losses), lam=-0.7, lr=0.1, backend=backend)


def test_many_tensors(backend):
    """200 of all sizes to 40, float32, bfloat16 and float16 in one call."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    parts = [Problem([((7 * j) % 41,) for j in range(67)], 9, d, seed=k) for k, d in enumerate(dtypes)]
    losses = parts[0].next()[1]
    grads = [p.next()[0] for p in parts]
    order = np.random.default_rng(0).permutation(201)
    lists = [[t for ts in kind for t in ts] for kind in ([p.params for p in parts], [p.buffers for p in parts], grads)]
    lists = [[ts[i] for i in order] for ts in lists]
    expected = exact_step(*[Problem.doubles(ts) for ts in lists], losses.double().numpy(), 0.3, lam=-0.7, lr=0.125)
    weighted_momentum_step_(*lists, losses, 0.3, lam=-0.7, lr=0.125, backend=backend)
    for t, e in zip(lists[0] + lists[1], expected[0] + expected[1]):
        np.testing.assert_allclose(t.double().numpy(), e, **NEAR[t.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_bits_for_any_number_of_threads(backend, dtype, threads):
    """Shares end within tensors, and within the 32 KB that are summed at a time; also with rows left out."""
    results = []
    for n in (1, 2, 3, 1):
        threads(n)
        problem = Problem([(30_001,), (77,), (200, 31)], 21, dtype)
        log_s = -INF
        for mask in (None, torch.arange(21) % 5 > 0):
            log_s = weighted_momentum_step_(
                problem.params,
                problem.buffers,
                *problem.next(),
                log_s,
                lam=-0.7,
                lr=0.1,
                mask=mask,
                weight_decay=0.01,
                backend=backend,
            )
        results.append([log_s, *problem.params, *problem.buffers])
    for other in results[1:]:
        assert not any(changed(results[0], other))


# ---- errors ---------------------------------------------------------------------------------------------------------


def call():
    return dict(
        params=[torch.ones(3), torch.ones(2, 2)],
        momentum_buffers=[torch.zeros(3), torch.zeros(2, 2)],
        per_sample_grads=[torch.ones(4, 3), torch.ones(4, 2, 2)],
        losses=torch.rand(4, generator=torch.Generator().manual_seed(0)),
        log_s=0.3,
        lam=-0.7,
        lr=0.1,
    )


def swap(name, at, value):
    """A call with one tensor of one list replaced (value: of the call)."""

    def change(arguments):
        arguments[name][at] = value(arguments) if callable(value) else value

    return change


def put(**values):
    return lambda arguments: arguments.update(values)


memory = torch.ones(20)
WRONG = {
    "grads of another shape": (
        swap("per_sample_grads", 1, torch.ones(4, 2, 3)),
        ValueError,
        r"per_sample_grads\[1\].*4, 2, 3.*2, 2.*4",
    ),
    "grads without a batch": (swap("per_sample_grads", 0, torch.ones(3)), ValueError, r"per_sample_grads\[0\].*\(3,\).*\(4, 3\)"),
    "flat grads": (swap("per_sample_grads", 1, torch.ones(4, 4)), ValueError, r"per_sample_grads\[1\].*\(4, 4\).*\(4, 2, 2\)"),
    "another batch": (swap("per_sample_grads", 0, torch.ones(5, 3)), ValueError, r"per_sample_grads\[0\].*\(5, 3\).*4 losses"),
    "losses of another batch": (put(losses=torch.ones(3)), ValueError, r"per_sample_grads\[0\].*\(4, 3\).*3 losses"),
    "one loss": (put(losses=torch.tensor(1.0)), ValueError, r"losses.*\(\).*\(B,\)"),
    "losses of two dimensions": (put(losses=torch.ones(4, 1)), ValueError, r"losses.*\(4, 1\).*\(B,\)"),
    "buffer of another shape": (
        swap("momentum_buffers", 0, torch.zeros(4)),
        ValueError,
        r"momentum_buffers\[0\].*\(4,\).*\(3,\)",
    ),
    "fewer grads": (put(per_sample_grads=[torch.ones(4, 3)]), ValueError, "per_sample_grads.*1 tensors.*2 params"),
    "fewer buffers": (put(momentum_buffers=[torch.zeros(3)]), ValueError, "momentum_buffers.*1 tensors.*2 params"),
    "no buffers": (put(momentum_buffers=None), ValueError, "momentum_buffers.*0 tensors.*zeros.*2 params"),
    "a buffer that is None": (swap("momentum_buffers", 1, None), TypeError, r"momentum_buffers\[1\].*NoneType.*tensor"),
    "a grad that is None": (swap("per_sample_grads", 1, None), TypeError, r"per_sample_grads\[1\].*NoneType.*tensor"),
    "a parameter that is a number": (swap("params", 0, 1.0), TypeError, r"params\[0\].*float.*tensor"),
    "fewer params": (put(params=[torch.ones(3)]), ValueError, "(per_sample_grads|momentum_buffers).*2 tensors.*1 params"),
    "integers": (swap("params", 0, torch.ones(3, dtype=torch.int64)), TypeError, r"params\[0\].*int64.*float32"),
    "complex numbers": (swap("params", 0, torch.ones(3, dtype=torch.complex64)), TypeError, r"params\[0\].*complex64.*float32"),
    "grads of another dtype": (
        swap("per_sample_grads", 0, torch.ones(4, 3).half()),
        TypeError,
        r"per_sample_grads\[0\].*float16.*float32",
    ),
    "buffers of another dtype": (
        swap("momentum_buffers", 1, torch.zeros(2, 2).double()),
        TypeError,
        r"momentum_buffers\[1\].*float64.*float32",
    ),
    "a parameter in double": (swap("params", 1, torch.ones(2, 2).double()), TypeError, r"losses.*float32.*params\[1\].*float64"),
    "losses in double": (put(losses=torch.ones(4).double()), TypeError, r"losses.*float64.*params\[0\].*float32"),
    "integer losses": (put(losses=torch.ones(4, dtype=torch.int64)), TypeError, "losses.*int64"),
    "no losses": (put(losses=[1.0, 2.0]), TypeError, "losses.*list"),
    "another device": (
        swap("per_sample_grads", 0, torch.ones(4, 3, device="meta")),
        ValueError,
        r"per_sample_grads\[0\].*meta.*cpu",
    ),
    "a sparse gradient": (
        swap("per_sample_grads", 0, torch.eye(4, 3).to_sparse()),
        TypeError,
        r"per_sample_grads\[0\].*sparse.*strided",
    ),
    "a parameter listed twice": (
        swap("params", 0, lambda a: a["params"][1].view(4)[:3]),
        ValueError,
        r"params\[[01]\], params\[[01]\].*share",
    ),
    "a buffer listed twice": (
        swap("momentum_buffers", 0, lambda a: a["momentum_buffers"][1].view(4)[1:]),
        ValueError,
        r"momentum_buffers.*share",
    ),
    "a buffer that is its parameter": (
        swap("momentum_buffers", 1, lambda a: a["params"][1]),
        ValueError,
        r"(params|buffers)\[1\].*share",
    ),
    "a gradient that is a parameter": (
        swap("per_sample_grads", 0, lambda a: a["params"][0].expand(4, 3)),
        ValueError,
        r"params\[0\].*share",
    ),
    "losses that are a parameter": (lambda a: a.update(losses=a["params"][1].view(4)), ValueError, "losses.*share|share.*losses"),
    "an expanded parameter": (swap("params", 0, torch.ones(1).expand(3)), ValueError, r"params\[0\].*share one place.*clone"),
    "an expanded buffer": (swap("momentum_buffers", 0, torch.zeros(1).expand(3)), ValueError, r"buffers\[0\].*share one place"),
    "the same columns twice": (
        lambda a: a.update(
            params=[memory[:6:2], memory[:6:2].view(3)],
            momentum_buffers=[torch.zeros(3), torch.zeros(3)],
            per_sample_grads=[torch.ones(4, 3), torch.ones(4, 3)],
        ),
        ValueError,
        r"params\[0\], params\[1\].*share",
    ),
    "mask of another shape": (put(mask=torch.ones(3, dtype=torch.bool)), ValueError, r"mask.*\(3,\).*\(4,\)"),
    "mask of numbers": (put(mask=torch.ones(4)), TypeError, "mask.*float32.*bool"),
    "sample_weight of another shape": (put(sample_weight=torch.ones(5)), ValueError, r"sample_weight.*\(5,\).*\(4,\)"),
    "lam": (put(lam=0.0), ValueError, "lam.*0"),
    "a vector of lam": (put(lam=torch.tensor([0.5])), ValueError, r"lam.*\(1,\)"),
    "a vector of log_s": (put(log_s=torch.zeros(2)), ValueError, r"log_s.*\(2,\)"),
    "gamma": (put(gamma=0.0), ValueError, "gamma.*0"),
    "alpha": (put(alpha=1.5), ValueError, "alpha.*1.5"),
    "init": (put(init="last"), ValueError, "init.*last.*first"),
    "normalizer": (put(normalizer="mean"), ValueError, "normalizer.*mean.*moving"),
    "mix": (put(mix=INF), ValueError, "mix.*inf"),
    "max_weight": (put(max_weight=0.0), ValueError, "max_weight.*0"),
    "lr": (put(lr=-0.1), ValueError, "lr.*-0.1"),
    "a NaN lr": (put(lr=NAN), ValueError, "lr.*nan"),
    "two lr": (put(lr=torch.ones(2)), ValueError, r"lr.*\(2,\)"),
    "momentum": (put(momentum=-0.1), ValueError, "momentum.*-0.1"),
    "weight_decay": (put(weight_decay=-1.0), ValueError, "weight_decay.*-1"),
    "dampening": (put(dampening=INF), ValueError, "dampening.*inf"),
    "nesterov without momentum": (put(nesterov=True, momentum=0.0), ValueError, "nesterov.*momentum"),
    "nesterov with dampening": (put(nesterov=True, dampening=0.1), ValueError, "nesterov.*dampening"),
    "heavy ball with nesterov": (put(nesterov=True, heavy_ball=True), ValueError, "heavy_ball.*nesterov"),
    "heavy ball with dampening": (put(dampening=0.5, heavy_ball=True), ValueError, "heavy_ball.*dampening"),
    "backend": (put(backend="abacus"), ValueError, "backend.*abacus"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors(one_backend, wrong):
    """What was given and what was expected are both said, and nothing is written."""
    change, error, words = WRONG[wrong]
    arguments = call() | {"backend": one_backend}
    change(arguments)
    tensors = [t for ts in (arguments["params"], arguments["momentum_buffers"] or []) for t in ts if isinstance(t, torch.Tensor)]
    before = copies(tensors)[0]
    with pytest.raises(error, match=f"(?is){words}"):
        weighted_momentum_step_(**arguments)
    assert not any(changed(before, tensors))


def test_inside_a_transform(one_backend):
    """Its place is after vmap: it says so."""
    arguments = call() | {"backend": one_backend}
    with pytest.raises(RuntimeError, match="inside a torch.func transform"):
        vmap(lambda x: weighted_momentum_step_(**arguments) * x)(torch.ones(2))


def test_what_is_not_wrong(one_backend):
    """Neighbours in one memory; columns of one matrix in turns; any iterable; a call that the wrong ones above start from."""
    memory, columns = torch.ones(20), torch.ones(3, 2)
    arguments = call() | {"backend": one_backend}
    arguments["params"] = (p for p in (memory[:3], memory[3:7].view(2, 2), columns[:, 0], columns[:, 1]))
    arguments["momentum_buffers"] = (b for b in (memory[7:10], memory[10:14].view(2, 2), torch.zeros(3), torch.zeros(3)))
    arguments["per_sample_grads"] = (*arguments["per_sample_grads"], torch.ones(4, 3), torch.zeros(4, 3))
    weighted_momentum_step_(**arguments)
    assert (memory[:7] < 1).all() and (memory[14:] == 1).all() and (columns[:, 0] < 1).all() and (columns[:, 1] == 1).all()
    weighted_momentum_step_(**call(), backend=one_backend)


# ---- the examples of docs/scale.md ---------------------------------------------------------------------------------------


def test_the_examples_of_the_guide():
    """Both run, and both train: 30 epochs on two blobs, one label in eight wrong, after which every right one is predicted."""
    text = (Path(__file__).resolve().parent.parent / "docs" / "scale.md").read_text()
    examples = [e for e in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "weighted_momentum_step_" in e]
    assert len(examples) == 2
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (64,), generator=draw)
    images = torch.randn(64, 5, generator=draw) + 4 * labels[:, None] - 2
    noisy = torch.where(torch.arange(64) % 8 == 0, 1 - labels, labels)
    for example in examples:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        loader = [(images[part], noisy[part]) for part in torch.arange(64).split(16)] * 30
        names = dict(
            ab=ab,
            torch=torch,
            math=math,
            model=model,
            loader=loader,
            backbone=model[:2],
            images=images,
            labels=noisy,
            head=model[2],
            epochs=30,
        )
        assert (model(images).argmax(1) == labels).float().mean() < 0.5
        exec(compile(example, "docs/scale.md", "exec"), names)
        assert (model(images).argmax(1) == labels).all() and math.isfinite(names["log_s"])


def test_every_dtype_is_here():
    assert set(DTYPES.values()) == set(NEAR)
