"""The steps of the optimizers and the weighted step, on every backend of a GPU against float64."""

import copy
import itertools
from unittest.mock import patch

import torch
from gpu_cases import INF, NAN, ONE_LAUNCH, device_tools, gpu, over
from gpu_hooks import pytest_generate_tests, setup_function, teardown_function, unpoisoned  # noqa: F401
from tensors import DTYPES, equation_2, wide

import absgd_fast as ab
from absgd_fast import _backend
from absgd_fast.functional import weighted_momentum_step_

# ---- the step --------------------------------------------------------------------------------------------------------

# one element, none, less than an access, no multiple of one, a chunk of 2048 and one more, several chunks
SIZES = [(), (1,), (0,), (3,), (17, 5, 3), (64, 64), (2049,), (20_000,)]
OPTIONS = {
    "plain": dict(momentum=0.0),
    "decay": dict(momentum=0.0, weight_decay=0.1),
    "momentum": dict(momentum=0.9, weight_decay=0.05),
    "dampening": dict(momentum=0.8, dampening=0.3, weight_decay=0.01),
    "nesterov": dict(momentum=0.9, nesterov=True, weight_decay=0.01),
    "maximize": dict(momentum=0.5, maximize=True, weight_decay=0.01),
    "tensor lr": dict(momentum=0.9, lr=None),  # on the device
}


def parameters(where, sizes=SIZES, dtype=torch.float64, seed=0, offset=0):
    """Equal for equal seeds, whatever the dtype; `offset` elements into their memory."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for size in sizes:
        values = torch.randn(size, generator=generator)
        place = torch.zeros(values.numel() + offset, dtype=dtype, device=where.device)[offset:].view(size)
        out.append(torch.nn.Parameter(place.copy_(values)))
    return out


def set_grads(*models, seed, skip=0.0):
    """The same gradients for each list of parameters; each is None with probability `skip`."""
    generator = torch.Generator().manual_seed(seed)
    for tensors in zip(*models):
        none = torch.rand((), generator=generator) < skip
        grad = torch.randn(tensors[0].shape, generator=generator)
        for p in tensors:
            p.grad = None if none else grad.to(p.device, p.dtype, copy=True)


def torch_sgd(params, **options):
    return torch.optim.SGD(params, **{"lr": 0.02, "foreach": True} | options)


OPTIMIZERS = {
    "adam": (ab.ABAdam, torch.optim.Adam, dict(lr=2**-6, weight_decay=0.01)),
    "adam, amsgrad": (ab.ABAdam, torch.optim.Adam, dict(lr=2**-6, amsgrad=True, maximize=True)),
    "adamw": (ab.ABAdamW, torch.optim.AdamW, dict(lr=2**-6, betas=(0.5, 0.75))),
    "rmsprop": (ab.ABRMSprop, torch.optim.RMSprop, dict(lr=2**-6)),
    "rmsprop, all": (ab.ABRMSprop, torch.optim.RMSprop, dict(lr=2**-6, momentum=0.5, centered=True, weight_decay=0.01)),
    "adagrad": (ab.ABAdagrad, torch.optim.Adagrad, dict(lr=2**-6, lr_decay=0.1, weight_decay=0.01)),
}


def same(ours, theirs, tolerance, slack=1):
    """Parameters and all states of two optimizers; slack: of the states' absolute error, in tolerances."""
    pairs = zip(*([p for group in optimizer.param_groups for p in group["params"]] for optimizer in (ours, theirs)))
    for p, q in pairs:
        torch.testing.assert_close(p.double(), q.double(), rtol=tolerance, atol=tolerance)
        kept = {name: value for name, value in theirs.state[q].items() if value is not None}
        assert ours.state[p].keys() == kept.keys()
        for name, value in kept.items():
            given = ours.state[p][name].to(value.device, value.dtype)
            message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
            torch.testing.assert_close(given, value, rtol=tolerance, atol=slack * tolerance, msg=message)


def check_steps(where, rule, dtype, offset=0):
    """Two steps of one of OPTIMIZERS or the like."""
    make, torch_make, options = rule
    params, expected = parameters(where, dtype=dtype, offset=offset), parameters(where)
    ours = make(params, **options, backend=where.backend)
    theirs = torch_make(expected, **options, foreach=False)
    for step in range(2):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
    double, slack = (1e-13, 10) if make is ab.ABSGD else (1e-12, 1)
    same(ours, theirs, 1e-5 if dtype == torch.float32 else double, slack)


def paths(where):
    """Both ways to the kernel: the table that a StepPlan keeps, and lists of tensors."""
    yield lambda: patch.object(_backend, "host", _backend.host)
    if where.backend == "cuda" and _backend.host() is not None:
        yield lambda: patch.object(_backend, "host", lambda: None)


@over(options=OPTIONS, dtype={"fp32": torch.float32, "fp64": torch.float64}, offset=[0, 1])
def test_step(where, options, dtype, offset):
    """40 steps, gradients missing now and then; on the way the state moves into torch's class and back again.

    (Fewer on the CPU, where test_optim_numbers.py takes them all.)"""
    lr = 2**-6  # exact in float32 too
    options = dict(lr=lr) | options
    if options["lr"] is None:
        options["lr"] = torch.tensor(lr, device=where.device)
    for path in paths(where):
        with path():
            params, expected = parameters(where, dtype=dtype, offset=offset), parameters(where)
            ours = ab.ABSGD(params, **options, backend=where.backend)
            theirs = torch_sgd(expected, **options | {"lr": lr})
            for step in range(40 if where.gpu else 10):
                if step == 5:
                    guest = torch_sgd(params, lr=99.0)
                    guest.load_state_dict(ours.state_dict())
                    for inner in range(5):
                        set_grads(params, expected, seed=1000 + inner)
                        guest.step()
                        theirs.step()
                    ours = ab.ABSGD(params, lr=99.0, backend=where.backend)
                    ours.load_state_dict(guest.state_dict())
                set_grads(params, expected, seed=step, skip=0.2)
                ours.step()
                theirs.step()
            same(ours, theirs, 1e-5 if dtype == torch.float32 else 1e-13, slack=10)


@over(rule=OPTIMIZERS, dtype={"fp32": torch.float32, "fp64": torch.float64}, offset=[0, 1])
def test_rules_of_the_step(where, rule, dtype, offset):
    """20 steps, gradients missing now and then, a checkpoint on the way; the lr in a tensor on the device, which changes."""
    make, torch_make, options = rule
    for path in paths(where):
        with path():
            params, expected = parameters(where, dtype=dtype, offset=offset), parameters(where)
            lr = torch.tensor(options["lr"], device=where.device)
            ours = make(params, **options | {"lr": lr}, backend=where.backend)
            theirs = torch_make(expected, **options, foreach=False)
            for step in range(20 if where.gpu else 6):
                if step == 3:
                    saved = copy.deepcopy(ours.state_dict())
                    ours = make(params, lr=99.0, backend=where.backend)
                    ours.load_state_dict(saved)
                    ours.param_groups[0]["lr"] = lr
                lr.fill_(options["lr"] * 2.0**-step)
                theirs.param_groups[0]["lr"] = options["lr"] * 2.0**-step
                set_grads(params, expected, seed=step, skip=0.2)
                ours.step()
                theirs.step()
            same(ours, theirs, 1e-5 if dtype == torch.float32 else 1e-12)


@over(
    rule=OPTIMIZERS | {"sgd": (ab.ABSGD, torch.optim.SGD, dict(lr=2**-6, momentum=0.5))},
    dtype={"bf16": torch.bfloat16, "fp16": torch.float16},
)
def test_rules_of_the_step_in_half_precision(where, rule, dtype):
    """States keep float32's exactness. Each step's parameters are those of torch in float64 from the same ones, rounded once."""
    make, torch_make, options = rule
    params, expected = parameters(where, dtype=dtype), parameters(where)
    ours = make(params, **options, backend=where.backend)
    theirs = torch_make(expected, **options, foreach=False)
    for step in range(4):
        with torch.no_grad():
            for p, q in zip(params, expected):
                q.copy_(p)
        set_grads(params, expected, seed=step)
        for p, q in zip(params, expected):
            q.grad.copy_(p.grad)
        ours.step()
        theirs.step()
        for p, q in zip(params, expected):
            torch.testing.assert_close(p.double(), q, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-7)
            for name, value in theirs.state[q].items():
                if value is not None and name != "step":
                    assert ours.state[p][name].dtype == torch.float32
                    torch.testing.assert_close(ours.state[p][name].double(), value, rtol=1e-5, atol=1e-5)  # sums of terms near 1


def test_heavy_ball_is_equation_2(where):
    """w_{t+1} = w_t - lr_t (G + wd w_t) + beta (w_t - w_{t-1}), with an lr that changes."""
    beta, decay = 0.9, 0.01
    params = parameters(where)
    optimizer = ab.ABSGD(params, lr=0.1, momentum=beta, weight_decay=decay, heavy_ball=True, backend=where.backend)
    *_, now = equation_2(optimizer, params, set_grads, beta, decay)
    for p, w in zip(params, now):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_groups(where):
    """More than a launch holds (16), with options of their own; two groups of both dtypes; a gradient in another layout."""

    def groups(ps):
        some = [dict(params=[p], lr=0.01 * (j + 1), weight_decay=0.1 * (j % 3)) for j, p in enumerate(ps[8:])]
        return [dict(params=ps[:4], lr=0.5, momentum=0.0), dict(params=ps[4:8], nesterov=True, weight_decay=0.1), *some]

    sizes = [*SIZES, *[(j % 5 + 1, 7) for j in range(20)]]
    params = parameters(where, sizes, torch.float32)
    params[::2] = [torch.nn.Parameter(p.detach().double()) for p in params[::2]]
    expected = parameters(where, sizes)
    ours = ab.ABSGD(groups(params), lr=0.1, momentum=0.7, backend=where.backend)
    theirs = torch_sgd(groups(expected), lr=0.1, momentum=0.7)
    for step in range(4):
        set_grads(params, expected, seed=step)
        params[5].grad = params[5].grad.T.contiguous().T
        ours.step()
        theirs.step()
    same(ours, theirs, 1e-5, slack=10)


def test_many_tensors(where):
    """More than one launch holds (900), some of them empty."""
    sizes = [(j % 7 * 13,) for j in range(2003)]
    params, expected = parameters(where, sizes, torch.float32), parameters(where, sizes)
    ours = ab.ABSGD(params, lr=0.1, weight_decay=0.01, backend=where.backend)
    theirs = torch_sgd(expected, lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(3):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
    together = [torch.cat([p.detach().double() for p in ps]) for ps in (params, expected)]
    torch.testing.assert_close(*together, rtol=1e-5, atol=1e-5)


def test_memory_shared_by_two_parameters(where):
    """Updated one after the other, as torch's own loop does."""
    memory = [torch.linspace(-1, 1, 20_000, dtype=torch.float64, device=where.device) for _ in range(2)]
    params, expected = ([torch.nn.Parameter(m[:15_000]), torch.nn.Parameter(m[5_000:])] for m in memory)
    ours = ab.ABSGD(params, lr=0.1, momentum=0.9, weight_decay=0.3, backend=where.backend)
    theirs = torch_sgd(expected, lr=0.1, momentum=0.9, weight_decay=0.3, foreach=False)
    for step in range(4):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
    torch.testing.assert_close(*memory, rtol=1e-12, atol=1e-12)


@over(
    rule=OPTIMIZERS
    | {f"sgd, dampening {d}": (ab.ABSGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=d)) for d in (0.0, 0.5)}
)
def test_grad_scaler(where, rule):
    """The first step skipped, another one later, gradients unscaled by hand in between, in both protocols: as torch's unfused
    loop."""
    make, torch_make, options = rule
    for path, fused in itertools.product(paths(where), (None, True)):
        with path():
            params, expected = (parameters(where, dtype=torch.float32) for _ in range(2))
            ours = make(params, **options, backend=where.backend, fused=fused)
            theirs = torch_make(expected, **options, foreach=False)
            scalers = [torch.amp.GradScaler(where.device.type, init_scale=4.0, growth_interval=2) for _ in range(2)]
            for step in range(8):
                for ps, optimizer, scaler in ((params, ours, scalers[0]), (expected, theirs, scalers[1])):
                    set_grads(ps, seed=step)
                    scaler.scale(torch.ones((), device=where.device))
                    for p in ps:
                        p.grad *= scaler.get_scale()
                    if step in (0, 4):
                        ps[5].grad[0, 0] = INF
                    if step == 6:
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
                for p, q in zip(params, expected):
                    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


# ---- the weighted step -------------------------------------------------------------------------------------------------


class Weighted:
    """Parameters, momentum and per-sample gradients on the device, and the same in float64 for plain torch on the CPU."""

    def __init__(self, where, sizes, rows, dtype, gap=0, seed=0):
        draw = torch.Generator().manual_seed(seed)
        self.where, device, real = where, where.device, wide(dtype)
        self.params, self.buffers = ([torch.randn(n, generator=draw).to(device, d) for n in sizes] for d in (dtype, real))
        self.grads = [torch.randn(rows, n + gap, generator=draw).to(device, dtype)[:, :n] for n in sizes]
        self.losses = (3 * torch.rand(rows, generator=draw)).to(device, real)
        self.log_s = torch.tensor(-INF, dtype=real, device=device)

    def step(self, **options):
        self.log_s = weighted_momentum_step_(
            self.params,
            self.buffers,
            self.grads,
            self.losses,
            self.log_s,
            **dict(lam=-0.75, lr=2**-6) | options,
            backend=self.where.backend,
        )

    def check(self, **options):
        """One step, from where this one is, in float64."""
        cpu = lambda t: t.to("cpu", torch.float64) if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
        exact = [[cpu(t) for t in ts] for ts in (self.params, self.buffers, self.grads)]
        given = {k: v.cpu() if k == "mask" else cpu(v) for k, v in options.items()}
        log_s = weighted_momentum_step_(
            *exact, cpu(self.losses), cpu(self.log_s), **dict(lam=-0.75, lr=2**-6) | given, backend="reference"
        )
        self.step(**options)
        real = dict(rtol=1e-12, atol=1e-12) if self.losses.dtype == torch.float64 else dict(rtol=1e-5, atol=1e-5)
        half = {torch.bfloat16: dict(rtol=2**-7, atol=1e-5), torch.float16: dict(rtol=2**-9, atol=1e-5)}
        torch.testing.assert_close(cpu(self.log_s), log_s, **real)
        for t, e in zip([*self.params, *self.buffers], exact[0] + exact[1]):
            torch.testing.assert_close(cpu(t), e, **half.get(t.dtype, real))


WEIGHTED = {
    "momentum": dict(weight_decay=0.01),
    "plain": dict(momentum=0.0, maximize=True),
    "nesterov": dict(nesterov=True, mix=0.5),
    "heavy ball": dict(heavy_ball=True, init="zero"),
}


@over(options=WEIGHTED, dtype=DTYPES, gap=[0, 1])
def test_weighted_step(where, options, dtype, gap):
    """Few and many columns (of which a block has some, and of which the blocks fill the chip), rows of odd addresses, rows that
    hold NaN and do not count."""
    sizes = [0, 1, 5, 64, 650, 4099]
    if where.gpu:  # the CPU's answer in float64 takes its time: only the blocks of our own kernel are to fill the chip
        sizes.append(600_000 if where.backend == "cuda" else 60_000)
    problem = Weighted(where, sizes, 37, dtype, gap)
    mask, weight = torch.arange(37, device=where.device) % 5 != 2, torch.linspace(0, 2, 37, device=where.device)
    for g in problem.grads:
        g[~mask] = NAN
        g[0] = NAN
    for _ in range(3):
        problem.check(mask=mask, sample_weight=weight, **options)


@over(rows=[1, 1025, ONE_LAUNCH + 3])
def test_weighted_step_of_many_rows(where, rows):
    problem = Weighted(where, [3, 40], rows, torch.float32)
    for _ in range(2):
        problem.check(weight_decay=0.1)
    before = [t.clone() for t in [*problem.params, *problem.buffers, problem.log_s]]
    problem.losses[rows // 2] = NAN
    problem.step()
    assert all(torch.equal(a, b) for a, b in zip(before, [*problem.params, *problem.buffers, problem.log_s]))


@gpu
def test_weighted_step_launches_and_waits(where):
    """One launch of CUDA's, two of Triton's (the weights apart) beside what copies its state; nobody waits, and a captured graph
    follows lr."""
    with unpoisoned():
        problem, twin = (Weighted(where, [5 + j % 300 for j in range(161)], 64, torch.float32) for _ in range(2))
        lr = [torch.tensor(2**-6, device=where.device) for _ in range(2)]
        for _ in range(2):
            problem.step(lr=lr[0])
        seen = device_tools.kernels(where.device, lambda: problem.step(lr=lr[0]))
        assert where.backend != "cuda" or len(seen) == 1, f"{seen}"
        assert device_tools.waits(where.device, lambda: problem.step(lr=lr[0])) == []
        problem = Weighted(where, [5 + j % 300 for j in range(161)], 64, torch.float32)
        state = problem.log_s.zero_()

        def captured():
            problem.log_s = state
            problem.step(lr=lr[0])
            state.copy_(problem.log_s)

        replay, _ = device_tools.captured(where.device, captured, warm_up=3)
        twin.log_s.zero_()
        for _ in range(3):
            twin.step(lr=lr[1])
        for k in range(4):
            for number in lr:
                number.fill_(2**-6 / (1 + k))
            twin.step(lr=lr[1])
            replay()
            assert torch.equal(state, twin.log_s)
            assert all(torch.equal(a, b) for a, b in zip([*problem.params, *problem.buffers], [*twin.params, *twin.buffers]))
