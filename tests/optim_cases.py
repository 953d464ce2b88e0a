"""The optimizers and what each is compared with: torch's class in float64, or a formula of the paper."""

import copy
import inspect
import io
from functools import lru_cache

import pytest
import torch

import absgd_fast as ab

HALF = (torch.bfloat16, torch.float16)

# ---- the table ------------------------------------------------------------------------------------------------------


class HeavyBall(torch.optim.SGD):
    """Eq. 2 of the paper: w_{t+1} = w_t - lr (G + wd w_t) + momentum (w_t - w_{t-1}). State: the last difference."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, decay = (group[name] for name in ("lr", "momentum", "weight_decay"))
            for p in group["params"]:
                if p.grad is not None:
                    last = self.state[p].get("momentum_buffer", torch.zeros_like(p))
                    change = momentum * last - lr * ((-1 if group["maximize"] else 1) * p.grad + decay * p)
                    p += change
                    if momentum:
                        self.state[p]["momentum_buffer"] = change


class PaperForm(torch.optim.Adam):
    """Eq. 9 of the paper: v = b1 v + (1-b1) G, u = b2 u + (1-b2) G^2, w = w - lr (v / (sqrt(u) + G_0) + wd w)."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (beta1, beta2), lr, eps, decay = (group[name] for name in ("betas", "lr", "eps", "weight_decay"))
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    for name in () if state else ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(p)
                    state["step"] = state.get("step", torch.tensor(0.0)) + 1
                    w, g, v, u = map(real, (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
                    g = -g if group["maximize"] else g
                    v.copy_(beta1 * v + (1 - beta1) * g)
                    u.copy_(beta2 * u + (1 - beta2) * g * g)
                    w -= lr * (v / (u.sqrt() + eps) + decay * w)


def real(t):
    return torch.view_as_real(t) if t.is_complex() else t


# optimizer: (ours, torch's, {options: ...}). With heavy_ball or paper_form the formulas above stand in for torch's class.
OPTIMIZERS = {
    "sgd": (
        ab.ABSGD,
        torch.optim.SGD,
        {
            "plain": dict(momentum=0.0),
            "decay": dict(momentum=0.0, weight_decay=0.1),
            "momentum": dict(momentum=0.9),
            "momentum-decay": dict(momentum=0.9, weight_decay=0.05),
            "dampening": dict(momentum=0.8, dampening=0.3, weight_decay=0.01),
            "nesterov": dict(momentum=0.9, nesterov=True, weight_decay=0.01),
            "maximize": dict(momentum=0.5, maximize=True, weight_decay=0.01),
            "tensor-lr": dict(momentum=0.9, lr=torch.tensor(0.02)),
            "heavy-ball": dict(momentum=0.9, weight_decay=0.05, heavy_ball=True),
            "heavy-ball-maximize": dict(momentum=0.5, weight_decay=0.05, heavy_ball=True, maximize=True),
            "heavy-ball-plain": dict(momentum=0.0, heavy_ball=True),
        },
    ),
    "adam": (
        ab.ABAdam,
        torch.optim.Adam,
        {
            "default": dict(),
            "betas": dict(betas=(0.5, 0.8), eps=1e-3),
            "betas-0": dict(betas=(0.0, 0.0), eps=1e-3),
            "tensor-betas": dict(betas=(torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.95, dtype=torch.float64))),
            "decay": dict(weight_decay=0.1),
            "amsgrad": dict(amsgrad=True, betas=(0.9, 0.9)),
            "amsgrad-decay": dict(amsgrad=True, betas=(0.7, 0.9), weight_decay=0.05, maximize=True),
            "maximize": dict(maximize=True),
            "tensor-lr": dict(lr=torch.tensor(0.02, dtype=torch.float64)),
            "paper-form": dict(paper_form=True, eps=0.1),
            "paper-form-decay": dict(paper_form=True, eps=1e-2, weight_decay=0.1, betas=(0.7, 0.9)),
            "paper-form-maximize": dict(paper_form=True, eps=1e-3, maximize=True, weight_decay=0.1),
        },
    ),
    "adamw": (
        ab.ABAdamW,
        torch.optim.AdamW,
        {
            "default": dict(),
            "decay": dict(weight_decay=0.3, betas=(0.7, 0.9)),
            "plain": dict(weight_decay=0.0),
            "amsgrad": dict(amsgrad=True, betas=(0.9, 0.9), eps=1e-4, weight_decay=0.1),
            "maximize": dict(maximize=True, weight_decay=0.1),
            "tensor-lr": dict(lr=torch.tensor([0.02], dtype=torch.float64)),
            "paper-form": dict(paper_form=True, eps=0.1, weight_decay=0.3),
        },
    ),
    "rmsprop": (
        ab.ABRMSprop,
        torch.optim.RMSprop,
        {
            "default": dict(),
            "alpha": dict(alpha=0.8, eps=1e-3),
            "decay": dict(weight_decay=0.1),
            "momentum": dict(momentum=0.9, eps=1e-4),
            "centered": dict(centered=True, eps=1e-3),
            "everything": dict(centered=True, momentum=0.7, weight_decay=0.05, alpha=0.9, eps=1e-2, maximize=True),
            "maximize": dict(maximize=True),
            "tensor-lr": dict(lr=torch.tensor(0.02)),
        },
    ),
    "adagrad": (
        ab.ABAdagrad,
        torch.optim.Adagrad,
        {
            "default": dict(),
            "lr-decay": dict(lr_decay=0.1),
            "decay": dict(weight_decay=0.1),
            "initial": dict(initial_accumulator_value=0.5, eps=1e-3),
            "everything": dict(lr_decay=0.05, weight_decay=0.05, initial_accumulator_value=0.1, maximize=True),
            "tensor-lr": dict(lr=torch.tensor(0.02, dtype=torch.float64), lr_decay=0.05),
        },
    ),
}
FORMS = {"heavy_ball": HeavyBall, "paper_form": PaperForm}


class Case:
    """A row of the table: the same options for our class and for what it is compared with."""

    def __init__(self, ours, theirs, options):
        self.options = {"lr": 0.02} | options
        self.form = {name: True for name in FORMS if name in options}  # {}: torch has it too
        self.ours, self.torch = ours, theirs
        self.theirs = FORMS[next(iter(self.form))] if self.form else theirs

    def own(self, params, backend=None, **options):
        """Our optimizer. (Options are copied: schedulers write into a tensor lr.)"""
        return self.ours(params, **copy.deepcopy(self.options | options), backend=backend)

    def other(self, params, **options):
        """What it is compared with."""
        given = {name: value for name, value in (self.options | options).items() if name not in FORMS}
        return single(self.theirs, params, **copy.deepcopy(given))


def single(cls, params, **options):
    """torch's class in its plainest form: one tensor after the other."""
    fused = {"fused": False} if "fused" in inspect.signature(cls).parameters else {}
    return cls(params, **{"foreach": False, **fused} | options)


CASES = {
    f"{name}-{row}": Case(ours, theirs, options)
    for name, (ours, theirs, rows) in OPTIMIZERS.items()
    for row, options in rows.items()
}
# a row of each rule with all the states it can have, and the paper's two
EACH = {
    name: CASES[name]
    for name in (
        "sgd-nesterov",
        "sgd-heavy-ball",
        "adam-amsgrad-decay",
        "adam-paper-form-decay",
        "adamw-decay",
        "rmsprop-everything",
        "adagrad-everything",
    )
}
TORCHS = {name: case for name, case in EACH.items() if not case.form}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_optimizer = pytest.mark.parametrize("case", EACH.values(), ids=EACH)
each_of_torchs = pytest.mark.parametrize("case", TORCHS.values(), ids=TORCHS)


# ---- the ways to the kernel -----------------------------------------------------------------------------------------


def planned(optimizer):
    """How many parameters the kernel would take in the next step without help from Python."""
    return len(optimizer._plan.refresh(optimizer.param_groups, optimizer.state)[0])


# ---- parameters, gradients, comparisons -----------------------------------------------------------------------------

# scalar, one element, none, less than a register, not a multiple of one
SHAPES = [(), (1,), (0,), (3,), (17, 5, 3), (8, 8), (41,)]
# the same with enough in all for a second thread (> 16384)
LARGE = [*SHAPES[:5], (64, 64), (20_000,)]
SMALL = [*SHAPES[:5], (16, 16), (300,)]


def make(shapes=SHAPES, dtype=torch.float64, seed=0):
    """Parameters of these shapes; equal for equal seeds, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.complex64 if dtype.is_complex else torch.float32
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=kind).to(dtype)) for s in shapes]


def in_float64(params):
    """The same values in double precision."""
    return [torch.nn.Parameter(p.detach().to(torch.complex128 if p.is_complex() else torch.float64, copy=True)) for p in params]


@lru_cache(256)
def gradients(shapes, dtypes, seed, skip):
    """One for each shape, or None with probability `skip`; equal for equal seeds, up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for shape, dtype in zip(shapes, dtypes):
        none = torch.rand((), generator=generator) < skip
        grad = torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        out.append(None if none else grad.to(dtype))
    return out


def set_grads(*models, seed, skip=0.0):
    """The same gradients for each list of parameters, in the precision of the first."""
    grads = gradients(tuple(p.shape for p in models[0]), tuple(p.dtype for p in models[0]), seed, skip)
    for params in models:
        for p, grad in zip(params, grads):
            p.grad = None if grad is None else grad.to(p.dtype, copy=True)


def states(optimizer):
    """Of each parameter, in the order of the groups: what the optimizer keeps."""
    return [
        {name: value for name, value in optimizer.state.get(p, {}).items() if value is not None}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


@torch.no_grad()
def flat(tensors):
    values = [real(t).reshape(-1) for t in tensors] or [torch.empty(0)]
    return torch.cat([v.double() for v in values] if len({v.dtype for v in values}) > 1 else values).double()


def assert_near(what, actual, expected, relative, absolute=None):
    """absolute=None: the relative error of the largest value, as far as 10."""
    actual, expected = flat(actual), flat(expected)
    if absolute is None:
        absolute = relative * min(10.0, float(expected.abs().amax())) if len(expected) else 0.0
    if not torch.allclose(actual, expected, relative, absolute):  # NaN fails
        excess = (actual - expected).abs() - (absolute + relative * expected.abs())
        worst = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
        raise AssertionError(f"{what}: {actual[worst].item()} instead of {expected[worst].item()}")


TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6} | dict.fromkeys(HALF, 3e-6)


def assert_same(params, optimizer, expected_params, expected_optimizer, dtype=torch.float64):
    """Parameters and all states agree; half-precision parameters with the expected number, rounded."""
    tolerance = TOLERANCE[dtype]
    if dtype in HALF:
        assert_near("parameters", params, expected_params, 0.51 * torch.finfo(dtype).eps, 2e-6)
    else:
        assert_near("parameters", params, expected_params, tolerance)
    ours, theirs = states(optimizer), states(expected_optimizer)
    assert [set(s) for s in ours] == [set(s) for s in theirs]
    for name in set().union(*theirs):
        values = [[s[name] for s in group if name in s] for group in (ours, theirs)]
        if name == "step":
            assert [v.item() for v in values[0]] == [v.item() for v in values[1]]
        else:
            assert_near(name, *values, tolerance)


def snapshot(params, optimizer):
    """Copies of all that a step may change."""
    return copy.deepcopy(([p.data for p in params], [p.grad for p in params], optimizer.state_dict()))


def assert_identical(a, b):
    """Nested lists and dicts of tensors hold the same bits."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and a.layout == b.layout
        assert torch.equal(a.to_dense(), b.to_dense())
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_identical(x, y)
    else:
        assert a == b


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def kept(optimizer):
    """(state, name) of every tensor that an optimizer keeps, but for the counts of steps."""
    return [(s, name) for s in optimizer.state.values() for name, value in s.items() if name != "step" and value is not None]


def steps(params, optimizer, seeds):
    for seed in seeds:
        set_grads(params, seed=seed, skip=0.2)
        optimizer.step()
