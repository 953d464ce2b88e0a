"""The optimizers against torch.optim in float64 (the paper's own steps against their formulas), and everything users do to
parameters, gradients, options and state between steps."""

import copy
import gc
import inspect
import io
import math
import operator
import pickle
import re
import sys
import warnings
import weakref
from functools import lru_cache, partial

import pytest
import torch
from conftest import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import absgd_fast as ab
from absgd_fast import _backend, ops

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
            (first, second), lr, eps, decay = (group[name] for name in ("betas", "lr", "eps", "weight_decay"))
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    for name in () if state else ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(p)
                    state["step"] = state.get("step", torch.tensor(0.0)) + 1
                    w, g, v, u = map(real, (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
                    g = -g if group["maximize"] else g
                    v.copy_(first * v + (1 - first) * g)
                    u.copy_(second * u + (1 - second) * g * g)
                    w -= lr * (v / (u.sqrt() + eps) + decay * w)


def real(t):
    return torch.view_as_real(t) if t.is_complex() else t


# optimizer: (ours, torch's, {options: ...}). With heavy_ball or paper_form the formulas above stand in for torch's class.
OPTIMIZERS = {
    "sgd": (ab.ABSGD, torch.optim.SGD, {
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
    }),
    "adam": (ab.ABAdam, torch.optim.Adam, {
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
    }),
    "adamw": (ab.ABAdamW, torch.optim.AdamW, {
        "default": dict(),
        "decay": dict(weight_decay=0.3, betas=(0.7, 0.9)),
        "plain": dict(weight_decay=0.0),
        "amsgrad": dict(amsgrad=True, betas=(0.9, 0.9), eps=1e-4, weight_decay=0.1),
        "maximize": dict(maximize=True, weight_decay=0.1),
        "tensor-lr": dict(lr=torch.tensor([0.02], dtype=torch.float64)),
        "paper-form": dict(paper_form=True, eps=0.1, weight_decay=0.3),
    }),
    "rmsprop": (ab.ABRMSprop, torch.optim.RMSprop, {
        "default": dict(),
        "alpha": dict(alpha=0.8, eps=1e-3),
        "decay": dict(weight_decay=0.1),
        "momentum": dict(momentum=0.9, eps=1e-4),
        "centered": dict(centered=True, eps=1e-3),
        "everything": dict(centered=True, momentum=0.7, weight_decay=0.05, alpha=0.9, eps=1e-2, maximize=True),
        "maximize": dict(maximize=True),
        "tensor-lr": dict(lr=torch.tensor(0.02)),
    }),
    "adagrad": (ab.ABAdagrad, torch.optim.Adagrad, {
        "default": dict(),
        "lr-decay": dict(lr_decay=0.1),
        "decay": dict(weight_decay=0.1),
        "initial": dict(initial_accumulator_value=0.5, eps=1e-3),
        "everything": dict(lr_decay=0.05, weight_decay=0.05, initial_accumulator_value=0.1, maximize=True),
        "tensor-lr": dict(lr=torch.tensor(0.02, dtype=torch.float64), lr_decay=0.05),
    }),
}  # fmt: skip
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
        "sgd-nesterov", "sgd-heavy-ball", "adam-amsgrad-decay", "adam-paper-form-decay", "adamw-decay", "rmsprop-everything",
        "adagrad-everything",
    )
}  # fmt: skip
TORCHS = {name: case for name, case in EACH.items() if not case.form}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_optimizer = pytest.mark.parametrize("case", EACH.values(), ids=EACH)
each_of_torchs = pytest.mark.parametrize("case", TORCHS.values(), ids=TORCHS)


# ---- the ways to the kernel -----------------------------------------------------------------------------------------


@pytest.fixture(params=[*BACKENDS, "lists"])
def way(request, monkeypatch):
    """The `backend` of an optimizer. The CPU kernels get the table that a StepPlan keeps; "lists": where the host module is
    missing they get lists of tensors, and the backend is chosen (None)."""
    name, _, isa = request.param.partition("-")
    if name == "lists":
        monkeypatch.setattr(_backend, "host", lambda: None)
        yield None
    elif name == "cpu" and _backend.host() is None:
        pytest.skip("built without the host module")
    else:
        before = _backend.set_cpu_isa(isa) if isa else None
        yield name
        if isa:
            _backend.set_cpu_isa(before)


@pytest.fixture(params=["reference", *(["cpu", "lists"] if _backend.available("cpu") else [])])
def one_way(request, monkeypatch):
    """As `way`, for what no instruction set decides."""
    if request.param == "lists":
        monkeypatch.setattr(_backend, "host", lambda: None)
        return None
    if request.param == "cpu" and _backend.host() is None:
        pytest.skip("built without the host module")
    return request.param


def planned(optimizer):
    """How many parameters the kernel would take in the next step without help from Python."""
    return len(optimizer._plan.refresh(optimizer.param_groups, optimizer.state)[0])


@pytest.fixture(autouse=True)
def one_thread():
    """Unless a test says otherwise: several threads on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def garbage():
    """gc.collect looks at what comes from now on only, which takes a hundredth of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


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


# ---- the numbers ----------------------------------------------------------------------------------------------------


@every_case
def test_equals_torch(case, dtype, way):
    """40 steps, gradients missing now and then; on the way the state moves into torch's class and back again.

    Half precision: the expected parameters take over the rounded ones before each step, so that a step is judged by itself;
    the states are not touched. Torch would round these, so they move into another of our optimizers only.
    """
    params = make(dtype=dtype)
    expected = in_float64(params)
    ours, theirs = case.own(params, way), case.other(expected)
    for step in range(40):
        if step == 15:
            if not case.form and dtype not in HALF:
                guest = single(case.torch, params, lr=99.0)
                guest.load_state_dict(through_a_file(ours.state_dict()))
                for inner in range(5):
                    set_grads(params, expected, seed=1000 + inner)
                    guest.step()
                    theirs.step()
                ours = guest
            saved = through_a_file(ours.state_dict())
            ours = case.ours(params, lr=99.0, backend=way, **case.form)
            ours.load_state_dict(saved)
        if dtype in HALF:
            for p, q in zip(params, expected):
                q.data.copy_(p.data)
        set_grads(params, expected, seed=step, skip=0.2)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs, dtype)
    real_dtype = torch.float32 if dtype in HALF else dtype
    assert all(v.dtype == real_dtype for s in states(ours) for name, v in s.items() if name != "step")
    if ours._plan is not None:
        assert planned(ours) == sum(p.grad is not None for p in params)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=["complex64", "complex128"])
@every_case
def test_complex(case, dtype, one_way):
    params = make(dtype=dtype)
    expected = in_float64(params)
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(8):
        set_grads(params, expected, seed=step, skip=0.2)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs, torch.float32 if dtype == torch.complex64 else torch.float64)


def test_heavy_ball_is_equation_2(way):
    """w_{t+1} = w_t - lr_t (G + wd w_t) + beta (w_t - w_{t-1}), with an lr that changes."""
    beta, decay = 0.9, 0.01
    params = make()
    optimizer = ab.ABSGD(params, lr=0.1, momentum=beta, weight_decay=decay, heavy_ball=True, backend=way)
    now = [p.detach().clone() for p in params]
    before = [p.clone() for p in now]
    for step in range(20):
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (1 + step)
        set_grads(params, seed=step)
        optimizer.step()
        after = [w - lr * (p.grad + decay * w) + beta * (w - v) for w, v, p in zip(now, before, params)]
        before, now = now, after
        assert_near("parameters", params, now, 1e-12)


@each_optimizer
def test_same_bits_for_any_number_of_threads(case, threads):
    results = []
    for count in (1, 2, 3):
        threads(count)
        params = make([(10_001,), (7,), (333, 101)], torch.float32)
        optimizer = case.own(params)
        for step in range(3):
            set_grads(params, seed=step)
            optimizer.step()
        results.append([[p.data for p in params], states(optimizer)])
    assert_identical(results[0], results[1])
    assert_identical(results[0], results[2])


# how a tensor of this shape lies in memory
STRIDES = {
    "dense": lambda t: t.clone(),
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t.clone(),
    "every other": lambda t: torch.stack([t] * 2, -1)[..., 0],
    "shifted": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),  # not aligned
}
tensors = st.tuples(
    st.one_of(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from([(16_385,), (129, 130), (8200, 1)])),
    st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from(list(STRIDES)),  # of the parameter
    st.sampled_from([*STRIDES, "expanded"]),  # of the gradient
    st.integers(0, 2),  # the group
)


@given(name=st.sampled_from(list(CASES)), drawn=st.lists(tensors, min_size=1, max_size=6))
def test_all_at_once_is_one_at_a_time(name, drawn, threads):
    """Any shapes, strides, dtypes and groups: the same bits as an optimizer for each tensor, on one thread or two."""
    case = CASES[name]

    def run(split, count):
        threads(count)
        params = make([shape for shape, *_ in drawn], torch.float64)
        for p, (_, dtype, stride, *_) in zip(params, drawn):
            p.data = STRIDES[stride](p.data.to(dtype))
        optimizers = split([(p, {"lr": 0.01 * (1 + group)}, group) for p, (*_, group) in zip(params, drawn)])
        for step in range(3):
            set_grads(params, seed=step)
            for p, (*_, stride, _) in zip(params, drawn):
                p.grad = p.grad.mean().expand(p.shape) if stride == "expanded" else STRIDES[stride](p.grad)
            for optimizer in optimizers:
                optimizer.step()
        of = {p: state for optimizer in optimizers for p, state in optimizer.state.items()}
        return [(p.data, dict(of.get(p, {}))) for p in params]

    def together(tensors):
        chosen = sorted({group for *_, group in tensors})
        return [case.own([{"params": [p for p, _, g in tensors if g == group], "lr": 0.01 * (1 + group)} for group in chosen])]

    alone = run(lambda tensors: [case.own([{"params": [p], **options}]) for p, options, _ in tensors], 1)
    for count in (1, 2):
        assert_identical(run(together, count), alone)


@each_optimizer
def test_dtypes_in_one_group(case, one_way):
    """float32, float64, halves and complex numbers side by side; half-precision parameters keep float32 states."""
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64, torch.float32)
    params = [make([(40,)], dtype, seed=j)[0] for j, dtype in enumerate(kinds)]
    expected = in_float64(params)
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(5):
        for p, q in zip(params, expected):
            if p.dtype in HALF:
                q.data.copy_(p.data)
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        for p, q, state, other in zip(params, expected, states(ours), states(theirs)):
            assert_near(str(p.dtype), [p], [q], *((0.51 * torch.finfo(p.dtype).eps, 2e-6) if p.dtype in HALF else (3e-6,)))
            for name in other:
                assert name == "step" or state[name].dtype == (torch.float32 if p.dtype in HALF else p.dtype)
                assert_near(name, [state[name]], [other[name]], 3e-6)


def test_weight_decay_0_leaves_infinite_parameters_alone(way):
    p = torch.nn.Parameter(torch.full((20,), torch.inf))
    optimizer = ab.ABSGD([p], lr=0.1, momentum=0.0, backend=way)
    p.grad = torch.ones(20)
    optimizer.step()
    assert p.isinf().all()


@each_optimizer
def test_groups_with_their_own_options(case, one_way):
    params, expected = make(), make()

    def groups(ps):
        return [dict(params=ps[:2], lr=0.5), dict(params=ps[2:5], weight_decay=0.2), dict(params=ps[5:])]

    ours, theirs = case.own(groups(params), one_way), case.other(groups(expected))
    for step in range(4):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


def test_groups_with_other_states(one_way):
    """A group without momentum keeps nothing, one with amsgrad three tensors."""
    for case, options in (
        (CASES["sgd-momentum"], [dict(momentum=0.0), dict(nesterov=True, weight_decay=0.1), dict(dampening=0.5)]),
        (CASES["adam-default"], [dict(amsgrad=True), dict(betas=(0.5, 0.5), eps=1e-2), dict(maximize=True)]),
        (CASES["rmsprop-default"], [dict(centered=True), dict(momentum=0.5), dict(alpha=0.5)]),
    ):
        params, expected = make(), make()
        ours, theirs = (
            build([dict(params=ps[k::3], **given) for k, given in enumerate(options)])
            for build, ps in ((partial(case.own, backend=one_way), params), (case.other, expected))
        )
        for step in range(4):
            set_grads(params, expected, seed=step)
            ours.step()
            theirs.step()
            assert_same(params, ours, expected, theirs)


# ---- what users do between steps ------------------------------------------------------------------------------------


def kept(optimizer):
    """(state, name) of every tensor that an optimizer keeps, but for the counts of steps."""
    return [(s, name) for s in optimizer.state.values() for name, value in s.items() if name != "step" and value is not None]


def swap_data(params, optimizer):
    for p in params:
        p.data = p.data.clone()


def new_storage(params, optimizer):
    """The tensor stays, its memory does not."""
    for p in params:
        p.data.set_(p.data.clone())


def resize(params, optimizer):
    params[5].data, params[5].grad = params[5].data[:5].clone(), params[5].grad[:5].clone()
    del optimizer.state[params[5]]


def replace_states(params, optimizer):
    for state, name in kept(optimizer):
        state[name] = torch.full_like(state[name], 0.5)


def swap_state_data(params, optimizer):
    for state, name in kept(optimizer):
        state[name].data = state[name] / 2


def drop_one_state(params, optimizer):
    del optimizer.state[params[4]]


def drop_the_state(params, optimizer):
    optimizer.state.clear()


def set_options(params, optimizer):
    group = optimizer.param_groups[0]
    new = dict(lr=0.3, weight_decay=0.2, betas=(0.6, 0.7), eps=1e-2, alpha=0.7, lr_decay=0.3, momentum=0.4)
    group.update({name: value for name, value in new.items() if name in group})


def tensor_lr(params, optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.3, dtype=torch.float64)


def no_weight_decay(params, optimizer):
    optimizer.param_groups[0]["weight_decay"] = 0


def maximize(params, optimizer):
    optimizer.param_groups[0]["maximize"] = not optimizer.param_groups[0]["maximize"]


def freeze(params, optimizer):
    params[5].requires_grad_(False).grad = None


def reorder(params, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def remove_a_parameter(params, optimizer):
    del optimizer.param_groups[0]["params"][3]


def replace_a_parameter(params, optimizer):
    """Another object: its state starts."""
    params[4] = optimizer.param_groups[0]["params"][4] = torch.nn.Parameter(params[4].data.clone())
    params[4].grad = torch.ones_like(params[4])


def load_own_state(params, optimizer):
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def strided_gradient(params, optimizer):
    params[5].grad = params[5].grad.T


def expanded_gradient(params, optimizer):
    params[5].grad = torch.tensor(0.5, dtype=params[5].dtype).expand_as(params[5])


def strided_state(params, optimizer):
    for state, name in kept(optimizer):
        if state[name].dim() == 2:
            state[name] = state[name].T.contiguous().T


def strided_parameter(params, optimizer):
    params[5].data = torch.stack([params[5].data] * 2, -1)[..., 0]


def channels_last(params, optimizer):
    """Everything of another shape, in an order that is dense."""
    del optimizer.state[params[5]]
    params[5].data = params[5].data.view(2, 4, 4, 8).to(memory_format=torch.channels_last)
    params[5].grad = params[5].grad.view(2, 4, 4, 8).to(memory_format=torch.channels_last)


def channels_last_parameter(params, optimizer):
    """The same, but the gradient stays as it was."""
    channels_last(params, optimizer)
    params[5].grad = params[5].grad.contiguous()


def tie(params, optimizer):
    """Two parameters in the same memory: torch updates them one after the other."""
    other = params[6].data[: params[5].numel()].view_as(params[5])
    params[5].data = other


def share_a_gradient(params, optimizer):
    """One gradient for two parameters."""
    params[5].grad = params[6].grad[: params[5].numel()].view_as(params[5])


CHANGES = [
    swap_data, new_storage, resize, replace_states, swap_state_data, drop_one_state, drop_the_state, set_options, tensor_lr,
    no_weight_decay, maximize, freeze, reorder, remove_a_parameter, replace_a_parameter, load_own_state, strided_gradient,
    expanded_gradient, strided_state, strided_parameter, channels_last, channels_last_parameter, tie, share_a_gradient,
]  # fmt: skip


@each_optimizer
@pytest.mark.parametrize("change", CHANGES, ids=[c.__name__ for c in CHANGES])
def test_equals_torch_after(one_way, case, change, threads):
    """The plan notices; the same is done to torch's optimizer."""
    two = change in (tie, new_storage)
    threads(1 + two)
    params, expected = (make(LARGE if two else SMALL) for _ in range(2))
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(6):
        set_grads(params, expected, seed=step)
        if step == 3:
            change(params, ours)
            change(expected, theirs)
        ours.step()
        theirs.step()
        assert_near("parameters", params, expected, 1e-12)


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_momentum_comes_and_goes(one_way, dampening):
    params, expected = make(), make()
    ours = ab.ABSGD(params, lr=0.1, momentum=0.0, dampening=dampening, backend=one_way)
    theirs = single(torch.optim.SGD, expected, lr=0.1, momentum=0.0, dampening=dampening)
    for step in range(12):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["momentum"] = [0.0, 0.9, 0.5][step // 2 % 3]
        if step == 5:
            for (p, *_), optimizer in ((params, ours), (expected, theirs)):
                del optimizer.state[p]["momentum_buffer"]
        set_grads(params, expected, seed=step, skip=0.2)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


@each_optimizer
@pytest.mark.parametrize("amp", [False, True], ids=["", "amp"])
def test_unfrozen_later(one_way, case, amp):
    """A parameter without a gradient at first simply starts later. (torch 2.13's fused SGD raises TypeError here.)"""
    params, expected = make(), make()
    for ps in (params, expected):
        ps[4].requires_grad_(False)
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(6):
        set_grads(params, expected, seed=step)
        if step < 3:
            params[4].grad = expected[4].grad = None
        elif step == 3:
            for ps in (params, expected):
                ps[4].requires_grad_(True)
        if amp:
            ours.grad_scale, ours.found_inf = torch.tensor(1.0), torch.tensor(0.0)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


@each_optimizer
@pytest.mark.parametrize("set_to_none", [True, False])
def test_training_loop(one_way, case, set_to_none):
    """A model whose gradients come from backward and are clipped, channels_last weights, a scheduler, a group added on the way."""

    def train(make_optimizer):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)
        ).to(torch.float64, memory_format=torch.channels_last)
        optimizer = make_optimizer(model[:3].parameters())
        schedule = lr_scheduler.StepLR(optimizer, 3, 0.5)
        for step in range(10):
            if step == 2:
                optimizer.add_param_group({"params": model[3:].parameters(), "lr": 0.01})
            x = torch.randn(5, 3, 8, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=set_to_none)
            model(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            schedule.step()
        return [p.detach() for p in model.parameters()]

    # the eps of the bias in front of a normalisation, whose gradient is rounding noise
    eps = {"eps": 0.1} if "eps" in inspect.signature(case.ours).parameters else {}
    trained = train(lambda ps: case.own(ps, one_way, **eps))
    assert_near("parameters", trained, train(lambda ps: case.other(ps, **eps)), 1e-11)


@each_optimizer
def test_a_parameter_listed_twice_moves_twice(one_way, case, threads):
    threads(2)
    params, expected = make([(20_000,)]), make([(20_000,)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about the duplicate
        ours, theirs = case.own(params * 2, one_way), case.other(expected * 2)
    # torch gives each mention of a new parameter its own momentum_buffer and keeps the last, which is nobody's intention
    for optimizer, (p,) in ((ours, params), (theirs, expected)):
        if "momentum_buffer" in case.theirs.__doc__ or issubclass(case.torch, torch.optim.SGD):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    for step in range(3):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_near("parameters", params, expected, 1e-12)


@each_optimizer
def test_nothing_to_do(one_way, case):
    """No gradient, or only of empty parameters: no error, no change, and what comes later starts as if this had not been."""
    params, expected = make(), make()
    ours, theirs = case.own(params, one_way), case.other(expected)
    before = snapshot(params, ours)
    ours.step()
    assert_identical(snapshot(params, ours), before)
    params[2].grad, expected[2].grad = torch.ones(0, dtype=torch.float64), torch.ones(0, dtype=torch.float64)
    ours.step()
    theirs.step()
    for step in range(3):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


@each_optimizer
def test_gradient_with_a_pending_sign(one_way, case):
    """The imaginary part of a conjugate is a tensor whose memory holds the opposite sign; autograd passes it on as it is."""
    params, expected = make([()]), make([()])
    ours, theirs = case.own(params, one_way), case.other(expected)
    for _ in range(3):
        params[0].grad = None
        two = torch.tensor(2.0, dtype=torch.float64)
        torch.view_as_real(torch.complex(two, params[0]).conj().resolve_conj()).sum().backward()
        assert params[0].grad.is_neg() and params[0].grad.item() == -1
        expected[0].grad = torch.tensor(-1.0, dtype=torch.float64)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


@each_optimizer
def test_gradient_with_a_pending_conjugate(one_way, case):
    """Complex: the memory holds the conjugate of the gradient."""
    params, expected = make([(4, 3)], torch.complex128), make([(4, 3)], torch.complex128)
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(3):
        set_grads(params, expected, seed=step)
        params[0].grad = params[0].grad.conj().resolve_conj().conj()
        assert params[0].grad.is_conj()
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


class Tagged(torch.Tensor):
    """A tensor subclass that does nothing."""


@each_optimizer
def test_tensor_subclasses(one_way, case):
    """They are stepped in plain torch, beside the others."""
    params, expected = make([(30,), (40,), (5,)]), make([(30,), (40,), (5,)])
    params[1] = torch.nn.Parameter(params[1].detach().as_subclass(Tagged))
    assert type(params[1].data) is Tagged
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(4):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


SPARSE = ("sgd-plain", "sgd-momentum", "sgd-dampening", "sgd-nesterov", "sgd-maximize", "adagrad-default", "adagrad-lr-decay",
          "adagrad-initial", "adagrad-tensor-lr")  # fmt: skip


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients(one_way, name):
    """Beside dense ones; of a row that two samples share there are two entries."""
    case = CASES[name]
    options = {} if name.startswith("adagrad") else {"weight_decay": 0.0}  # a sparse gradient and decay: torch refuses
    params, expected = make([(30,), (40, 3), (5,)]), make([(30,), (40, 3), (5,)])
    ours, theirs = case.own(params, one_way, **options), case.other(expected, **options)
    for step in range(4):
        set_grads(params, expected, seed=step)
        for ps in (params, expected):
            rows = torch.tensor([[step, 7, 7, 39]])
            ps[1].grad = torch.sparse_coo_tensor(rows, ps[1].grad[:4], (40, 3))
        ours.step()
        theirs.step()
        for p, q in zip(params, expected):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)
        assert [set(s) for s in states(ours)] == [set(s) for s in states(theirs)]


def test_embedding_with_sparse_gradients(one_way):
    """heavy_ball, which torch has not: as with the dense gradient."""
    params, expected = make([(40, 3)]), make([(40, 3)])
    ours = ab.ABSGD(params, lr=0.1, heavy_ball=True, backend=one_way)
    theirs = HeavyBall(expected, lr=0.1, momentum=0.9)
    for step in range(3):
        for (p,) in (params, expected):
            p.grad = None
            torch.nn.functional.embedding(torch.tensor([step, 7, 7]), p, sparse=p is params[0]).square().sum().backward()
        assert params[0].grad.is_sparse and not expected[0].grad.is_sparse
        ours.step()
        theirs.step()
        assert_near("parameters", params, expected, 1e-12)


@each_optimizer
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.complex64], ids=["fp32", "bf16", "complex"])
def test_version_counters(one_way, case, kind):
    """A backward through a graph from before the step must not use the new values silently."""
    p, q = torch.nn.Parameter(torch.ones(3, dtype=kind)), torch.nn.Parameter(torch.ones(3))
    optimizer = case.own([p, q], one_way)
    for _ in range(3):  # first step, first table, later tables
        graphs = [(p * p).sum().abs(), (q * q).sum()]
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        for y in graphs:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()


@each_optimizer
def test_the_step_leaves_no_graph(one_way, case):
    """Neither parameters nor states require gradients of the step, whatever mode the caller is in."""
    for mode in (torch.enable_grad(), torch.no_grad(), torch.autograd.detect_anomaly(check_nan=False)):
        params = make([(3,), (4, 2)], torch.float32)
        optimizer = case.own(params, one_way)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with mode:
                for step in range(2):
                    for p in params:
                        p.grad = (torch.ones_like(p) * p.detach().clone().requires_grad_()) if step else torch.ones_like(p)
                    optimizer.step()
        assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)
        assert all(not v.requires_grad for s in states(optimizer) for v in s.values())


# ---- the optimizer as a torch optimizer ------------------------------------------------------------------------------


def test_signatures():
    """Arguments and defaults are torch's, but for what API and docstrings name."""
    extra = {"robust": None, "backend": None}
    own = {"sgd": {"momentum": 0.9, "heavy_ball": False}, "adam": {"paper_form": False}, "adamw": {"paper_form": False}}
    absent = {"foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}
    for name, (ours, theirs, _) in OPTIMIZERS.items():
        assert issubclass(ours, theirs)
        defaults = {n: p.default for n, p in inspect.signature(theirs).parameters.items() if n not in absent}
        assert {n: p.default for n, p in inspect.signature(ours).parameters.items()} == defaults | own.get(name, {}) | extra
        assert ours(make()).defaults.items() >= theirs(make(), **{"momentum": 0.9} if name == "sgd" else {}).defaults.items()


@each_optimizer
def test_closure_and_hooks(one_way, case):
    params, expected = make([(3,)]), make([(3,)])
    optimizer, other = case.own(params, one_way), case.other(expected)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: calls.append("global before") if o is optimizer else None),
        register_optimizer_step_post_hook(lambda o, *_: calls.append("global after") if o is optimizer else None),
        optimizer.register_step_pre_hook(lambda *_: calls.append("before")),
        optimizer.register_step_post_hook(lambda *_: calls.append("after")),
    ]

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = (params[0] * 3).sum()
        loss.backward()
        return loss

    try:
        start = params[0].sum().item() * 3
        with torch.no_grad():  # closures are run with gradients all the same
            assert optimizer.step(closure).item() == pytest.approx(start)
            assert optimizer.step(closure=closure) is not None
        once = ["global before", "before", "closure", "after", "global after"]
        assert sorted(calls) == sorted(once * 2)
        assert [c for c in calls if "global" not in c] == ["before", "closure", "after"] * 2
        for _ in range(2):
            expected[0].grad = torch.full((3,), 3.0, dtype=torch.float64)
            other.step()
        assert_same(params, optimizer, expected, other)
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    assert optimizer.step() is None
    assert calls == []


@each_optimizer
def test_a_hook_may_change_the_gradients_and_the_arguments(one_way, case):
    """Weight decay and closures are put in by pre-hooks; a post-hook sees the new parameters."""
    params, expected = make([(3,)]), make([(3,)])
    optimizer, other = case.own(params, one_way), case.other(expected)
    seen = []

    def double(optimizer, args, kwargs):
        params[0].grad.mul_(2)

    optimizer.register_step_pre_hook(double)
    optimizer.register_step_pre_hook(lambda *_: ((optimizer, lambda: 5.0), {}))
    optimizer.register_step_post_hook(lambda *_: seen.append(params[0].detach().clone()))
    params[0].grad, expected[0].grad = torch.ones(3, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.float64)
    assert optimizer.step() == 5.0
    other.step()
    assert_same(params, optimizer, expected, other)
    assert torch.equal(seen[0], params[0])


@each_optimizer
def test_profiler_sees_the_step(case):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = case.own([p])
    p.grad = torch.ones(3)
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert f"Optimizer.step#{case.ours.__name__}.step" in {event.key for event in profile.key_averages()}


@each_optimizer
def test_named_parameters(one_way, case):
    """The names are kept in the groups and in checkpoints, and change nothing."""
    model, twin = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    twin.load_state_dict(model.state_dict())
    named, plain = case.own(model.named_parameters(), one_way), case.own(twin.parameters(), one_way)
    for step in range(3):
        set_grads([*model.parameters()], [*twin.parameters()], seed=step)
        named.step()
        plain.step()
    assert_identical([p.data for p in model.parameters()], [p.data for p in twin.parameters()])
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]
    assert named.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    plain.load_state_dict(named.state_dict())
    with pytest.raises(ValueError, match="same format|names"):
        named.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    named.add_param_group({"params": [("more", torch.nn.Parameter(torch.ones(2)))]})
    assert named.param_groups[1]["param_names"] == ["more"]


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.1),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=has_momentum(o)),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 12, cycle_momentum=has_momentum(o)),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, 4),
}


def has_momentum(optimizer):
    return bool({"momentum", "betas"} & optimizer.defaults.keys())


def test_every_scheduler_is_tested():
    classes = {name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))} - {"LRScheduler"}
    assert SCHEDULERS.keys() == classes | {"SWALR"}


@each_optimizer
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_schedulers(case, scheduler, tensor):
    """The one that was changed last counts: lr, and with it momentum or betas."""
    params, expected = make(SHAPES[3:5]), make(SHAPES[3:5])
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor else 0.05
    ours, theirs = case.own(params, lr=lr), case.other(expected, lr=lr)
    schedules = [scheduler(ours), scheduler(theirs)]
    used = set()
    for step in range(10):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        for schedule in schedules:
            schedule.step(*[1.0] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else [])
        assert_same(params, ours, expected, theirs)
        used.add(float(ours.param_groups[0]["lr"]))
    assert len(used) > 1  # it did change
    assert isinstance(ours.param_groups[0]["lr"], torch.Tensor) == tensor


# ---- saving and copying ---------------------------------------------------------------------------------------------


def steps(params, optimizer, seeds):
    for seed in seeds:
        set_grads(params, seed=seed, skip=0.2)
        optimizer.step()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resumed_is_identical(case, dtype, one_way):
    """From a file, and through a torch optimizer in between: the same bits as without."""
    params, resumed = make(dtype=dtype), make(dtype=dtype)
    ours = case.own(params, one_way)
    steps(params, ours, range(4))
    for p, q in zip(params, resumed):
        q.data.copy_(p.data)
    state = through_a_file(ours.state_dict())
    if not case.form and dtype not in HALF:
        guest = case.torch(resumed)
        guest.load_state_dict(state)
        state = through_a_file(guest.state_dict())
    other = case.ours(resumed, **case.form, backend=one_way)
    other.load_state_dict(state)
    assert_identical(states(other), states(ours))
    steps(params, ours, range(4, 8))
    steps(resumed, other, range(4, 8))
    assert_identical([p.data for p in params], [p.data for p in resumed])
    assert_identical(states(other), states(ours))


# what checkpoints of torch's classes may have been made with
MADE_WITH = {"foreach": dict(foreach=True), "fused": dict(fused=True), "capturable": dict(capturable=True), "default": {}}


@each_of_torchs
@pytest.mark.parametrize("made_with", MADE_WITH.values(), ids=MADE_WITH)
def test_checkpoints_of_torchs_other_forms(one_way, case, made_with):
    """torch.optim's class with foreach, fused or capturable, on both sides of a few steps of ours."""
    if not made_with.keys() <= inspect.signature(case.torch).parameters.keys():
        pytest.skip(f"torch.optim.{case.torch.__name__} has no {', '.join(made_with)}")
    stepped = "capturable" not in made_with  # which torch takes on GPUs only
    params, expected = make(), make()
    options = {name: value for name, value in case.options.items() if name != "lr"}
    guest, theirs = case.torch(params, lr=0.02, **options, **made_with), case.other(expected)
    if not stepped:  # as loaded from a checkpoint that was made elsewhere
        made = case.other(params)
        set_grads(params, expected, seed=100)
        made.step()
        theirs.step()
        guest.load_state_dict(made.state_dict())
        guest.param_groups[0].update(made_with)
    for round in range(2):
        if stepped:
            for step in range(3):
                set_grads(params, expected, seed=step)
                guest.step()
                theirs.step()
        ours = case.ours(params, backend=one_way)
        ours.load_state_dict(through_a_file(guest.state_dict()))
        for step in range(3, 6):
            set_grads(params, expected, seed=step)
            ours.step()
            theirs.step()
            assert_same(params, ours, expected, theirs)
        guest = case.torch(params, **made_with)
        guest.load_state_dict(through_a_file(ours.state_dict()))


@each_of_torchs
def test_checkpoints_with_counts_that_are_numbers(one_way, case):
    """As written by old releases of torch."""
    params, expected = make(), make()
    ours, theirs = case.own(params, one_way), case.other(expected)
    for step in range(4):
        if step == 2:
            state = ours.state_dict()
            for entry in state["state"].values():
                if "step" in entry:
                    entry["step"] = int(entry["step"].item())
            ours = case.ours(params, backend=one_way)
            ours.load_state_dict(state)
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


@pytest.mark.parametrize("ours, form", [(ab.ABSGD, "heavy_ball"), (ab.ABAdam, "paper_form"), (ab.ABAdamW, "paper_form")])
@pytest.mark.parametrize("loaded", [True, False])
def test_checkpoint_of_the_other_form(one_way, ours, form, loaded):
    """Its states mean something else: refused before anything is loaded, in any group, from torch's class too."""
    theirs = ours.__mro__[ours.__mro__.index(torch.optim.Optimizer) - 1]
    sources = [lambda ps: ours(ps, lr=0.3, **{form: loaded})] + ([] if loaded else [lambda ps: theirs(ps, lr=0.3)])
    for source in sources:
        for groups in (lambda ps: ps, lambda ps: [{"params": ps[:3]}, {"params": ps[3:], form: loaded}]):
            params = make()
            split = groups(params)
            optimizer = ours(split, lr=0.1, backend=one_way, **{form: not loaded})
            if split is not params:
                optimizer.param_groups[1][form] = not loaded
            steps(params, optimizer, range(2))
            before = snapshot(params, optimizer)
            checkpoint = source(groups(make())).state_dict()
            checkpoint["param_groups"][0].pop(form, None) if not loaded else None
            with pytest.raises(ValueError, match=f"{form}.*{form}={loaded}.*{form}={not loaded}"):
                optimizer.load_state_dict(checkpoint)
            assert_identical(snapshot(params, optimizer), before)


@each_optimizer
def test_state_of_another_model_is_refused(one_way, case):
    params = make()
    optimizer = case.own(params, one_way)
    steps(params, optimizer, range(2))
    before = snapshot(params, optimizer)
    for other in (params[:2], [{"params": params[:2]}, {"params": params[2:]}]):
        with pytest.raises(ValueError, match="doesn't match the size|different number of parameter groups"):
            optimizer.load_state_dict(case.own(other, lr=0.3).state_dict())
        assert_identical(snapshot(params, optimizer), before)


@each_optimizer
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o)), through_a_file],
    ids=["deepcopy", "copy", "pickle", "save"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_copies_go_on(one_way, case, copied, dtype, monkeypatch):
    if copied is through_a_file:
        monkeypatch.setattr(torch, "load", partial(torch.load, weights_only=False))
    params = make(dtype=dtype)
    optimizer = case.own(params, one_way)
    for step in range(3):
        set_grads(params, seed=step)
        optimizer.step()
    other = copied(optimizer)
    assert type(other) is type(optimizer) and other.backend == one_way
    others = other.param_groups[0]["params"]
    if copied is copy.copy:  # the same parameters and the same state
        assert others[0] is params[0] and other.state is optimizer.state
        other.step()
        return
    assert_identical(states(other), states(optimizer))
    set_grads(params, others, seed=9)
    optimizer.step()
    other.step()
    for p, q in zip(params, others):
        assert p is not q and torch.equal(p, q)
    assert_identical(states(other), states(optimizer))


# ---- mixed precision ------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_grad_scale_and_found_inf(case, one_way, dtype):
    """Scaled by 4, which costs no bit: as without. A step with found_inf never was, be it the first or a later one; what gets
    its first gradient in one starts later."""
    params, expected = make(dtype=dtype), make(dtype=dtype)
    ours, plain = case.own(params, one_way), case.own(expected, one_way)
    for step in range(6):
        found = step in (0, 1, 4)
        set_grads(params, expected, seed=step)
        if step < 3:
            params[4].grad = expected[4].grad = None
        for p in params:
            if p.grad is not None:
                p.grad.mul_(torch.inf if found else 4)
        ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(float(found))
        before = snapshot(params, ours)
        ours.step()
        if found:
            assert_identical(snapshot(params, ours)[::2], before[::2])
        else:
            plain.step()
            assert_identical([p.data for p in params], [p.data for p in expected])
            assert_identical(states(ours), states(plain))
    ours.grad_scale = None  # after GradScaler.unscale_
    set_grads(params, expected, seed=6)
    ours.found_inf = torch.tensor(0.0)
    ours.step()
    plain.step()
    assert_identical([p.data for p in params], [p.data for p in expected])


class Settles:
    """In place of a deferred ABLoss: what its settle() returns (reference.settle)."""

    def __init__(self, scale, bad=0.0):
        self.settled = torch.tensor([3.0, scale, 63.0, 2.0, 5.0, bad], dtype=torch.float64)

    def settle(self):
        return self.settled


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_robust(case, one_way, dtype):
    """The gradients are multiplied by a scale that costs no bit, and stay as they are; with a bad row nothing happens, be it in
    the first step or a later one."""
    params, expected = make(dtype=dtype), make(dtype=dtype)
    ours, plain = case.own(params, one_way), case.own(expected, one_way)
    for step in range(5):
        set_grads(params, expected, seed=step)
        for p in params:
            p.grad.mul_(4)
        given = [p.grad.clone() for p in params]
        bad = step in (0, 3)
        ours.robust = Settles(0.25, float(bad))
        before = snapshot(params, ours)
        ours.step()
        assert_identical([p.grad for p in params], given)
        if bad:
            assert_identical(snapshot(params, ours), before)
        else:
            plain.step()
            assert_identical([p.data for p in params], [p.data for p in expected])
            assert_identical(states(ours), states(plain))


@each_optimizer
@pytest.mark.parametrize("kind", ["sparse", "complex", "strided"])
def test_robust_of_other_gradients(one_way, case, kind):
    if kind == "sparse" and not issubclass(case.torch, torch.optim.SGD):
        pytest.skip("takes no sparse gradients, or not with decay")
    dtype = torch.complex64 if kind == "complex" else torch.float32
    params, expected = ([torch.nn.Parameter(torch.ones(4, 6, dtype=dtype))] for _ in range(2))
    options = {"weight_decay": 0.0} if kind == "sparse" else {}  # which torch refuses together
    ours, plain = case.own(params, one_way, **options), case.own(expected, one_way, **options)
    for step in range(3):
        for model, scale in ((params, 4), (expected, 1)):
            draw = torch.Generator().manual_seed(step)
            grad = (scale * torch.randn(4, 6, generator=draw)).to(params[0].dtype)
            grad = grad.to_sparse() if kind == "sparse" else grad.t().contiguous().t() if kind == "strided" else grad
            model[0].grad = grad
        ours.robust = Settles(0.25)
        ours.step()
        plain.step()
        assert_identical(params, expected)
    ours.robust, before = Settles(0.25, bad=1.0), snapshot(params, ours)
    ours.step()
    assert_identical(snapshot(params, ours), before)


@each_optimizer
@pytest.mark.parametrize("kind", ["sparse", "complex", "float16", "strided"])
def test_grad_scale_of_other_gradients(one_way, case, kind):
    if kind == "sparse" and not issubclass(case.torch, torch.optim.SGD):
        pytest.skip("takes no sparse gradients, or not with decay")
    kinds = {"complex": torch.complex64, "float16": torch.float16}
    params, expected = ([make([(4, 3)], kinds.get(kind, torch.float32))[0], make([(5,)], torch.float32)[0]] for _ in range(2))
    options = {"weight_decay": 0.0}
    ours, plain = case.own(params, one_way, **options), case.own(expected, one_way, **options)
    for step in range(3):
        set_grads(params, expected, seed=step)
        for ps, scale in ((params, 4), (expected, 1)):
            for p in ps:
                p.grad.mul_(scale)
            grad = ps[0].grad
            if kind == "sparse":
                ps[0].grad = torch.sparse_coo_tensor(torch.tensor([[0, 2, 2]]), grad[:3], (4, 3))
            elif kind == "strided":
                ps[0].grad = grad.T.contiguous().T
        ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        ours.step()
        plain.step()
        assert_identical([p.data for p in params], [p.data for p in expected])


@each_optimizer
def test_grad_scaler(one_way, case):
    """torch.amp.GradScaler, its first step skipped. (torch 2.13's fused SGD leaves the momentum uninitialised then.)"""
    params, expected = make(dtype=torch.float32), make()
    ours, theirs = case.own(params, one_way), case.other(expected)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2) for _ in range(2)]
    for step in range(8):
        set_grads(params, expected, seed=step)
        for ps, optimizer, scaler in ((params, ours, scalers[0]), (expected, theirs, scalers[1])):
            scaler.scale(torch.ones(()))
            for p in ps:
                p.grad *= scaler.get_scale()
            if step in (0, 4):
                ps[5].grad[0, 0] = torch.inf
            if step == 6:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        if step == 0:
            assert not any("momentum_buffer" in s or "exp_avg" in s for s in states(ours))
        assert_same(params, ours, expected, theirs, torch.float32)


@each_optimizer
def test_grad_scaler_with_a_dampened_start(one_way, case):
    """With dampening the first gradient counts in full, also after a step that never was."""
    if not issubclass(case.torch, torch.optim.SGD) or case.form:
        pytest.skip("has no dampening")
    params, expected = make([(5,)]), make([(5,)])
    ours = ab.ABSGD(params, lr=0.1, momentum=0.9, dampening=0.5, backend=one_way)
    theirs = single(torch.optim.SGD, expected, lr=0.1, momentum=0.9, dampening=0.5)
    for step in range(5):
        set_grads(params, expected, seed=step)
        ours.grad_scale, ours.found_inf = None, torch.tensor(float(step == 0))
        ours.step()
        if step:
            theirs.step()
            assert_same(params, ours, expected, theirs)


# ---- torch.compile --------------------------------------------------------------------------------------------------


class Graphs:
    """A backend for torch.compile that counts the steps its graphs make with our operator."""

    def __init__(self, backend="aot_eager"):
        self.backend = torch._dynamo.lookup_backend(backend)
        self.launches = []

    def __call__(self, graph, inputs):
        self.launches.append(sum("absgd_fast" in str(n.target) and "step_" in str(n.target) for n in graph.graph.nodes))
        return self.backend(graph, inputs)


@pytest.fixture
def compiler():
    """torch.compile of a step without graph breaks, and nothing left of it afterwards."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lambda optimizer, graphs: torch.compile(optimizer.step, fullgraph=True, backend=graphs)
    torch._dynamo.reset()


@each_optimizer
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_compiled_step(one_backend, case, tensor, compiler):
    """One graph with one call of the operator; no other one when a tensor lr gets another value."""
    if tensor and one_backend == "reference":
        pytest.skip("nothing that the other three do not test, and it takes long")
    # without the 0-d one: in float64 torch 2.13's compiler loses updates in place of it, in torch.optim.SGD too
    params, expected = make(SHAPES[1:]), make(SHAPES[1:])
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    ours, theirs = case.own(params, one_backend, lr=lr), case.other(expected, lr=lr)
    graphs, compiled = Graphs(), []
    step = compiler(ours, graphs)
    for seed in range(5):
        if tensor:
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + seed))
        set_grads(params, expected, seed=seed)
        step()
        theirs.step()
        assert_same(params, ours, expected, theirs)
        compiled.append(len(graphs.launches))
    assert compiled[1:] == [compiled[1]] * 4  # the first step makes the states
    if one_backend == "cpu":
        assert graphs.launches and all(launches == 1 for launches in graphs.launches)


@each_optimizer
def test_compiled_groups_and_dtypes(case, compiler):
    """With more than one of each: as in eager mode."""
    params, expected = (make(SHAPES[1:4], torch.bfloat16) + make(SHAPES[4:], torch.float32) for _ in range(2))
    ours, eager = (case.own([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.1}]) for ps in (params, expected))
    step = compiler(ours, "aot_eager")
    for seed in range(3):
        set_grads(params, expected, seed=seed)
        step()
        eager.step()
        assert_near("half", params[:3], expected[:3], 1e-2)
        assert_near("parameters", params[3:], expected[3:], 3e-6)
        for ours_of_p, eager_of_p in zip(states(ours)[3:], states(eager)[3:]):
            for name in eager_of_p:
                assert_near(name, [ours_of_p[name]], [eager_of_p[name]], 3e-6)


@pytest.mark.parametrize("case", [EACH["sgd-nesterov"], EACH["adam-amsgrad-decay"]], ids=["sgd", "adam"])
def test_compiled_by_inductor(case, compiler):
    """The default compiler, where it can build what it generates."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"no compiler for torch.compile: {error}")
    params, expected = make(SHAPES[1:], torch.float32), make(SHAPES[1:])
    ours, theirs = case.own(params), case.other(expected)
    graphs = Graphs("inductor")
    step = compiler(ours, graphs)
    for seed in range(3):
        set_grads(params, expected, seed=seed)
        step()
        theirs.step()
        assert_same(params, ours, expected, theirs, torch.float32)
    if _backend.available("cpu"):
        assert graphs.launches and all(launches == 1 for launches in graphs.launches)


# ---- the operators --------------------------------------------------------------------------------------------------

# rule: how many states, with how many flags set, it takes; whether it counts
RULES = {
    "sgd": [(0, dict(first=0.0), False), (1, dict(first=0.9), False)],
    "adam": [(2, dict(first=0.9, second=0.99, eps=1e-8), True), (3, dict(first=0.9, second=0.99, eps=1e-8, flags=8), True)],
    "rmsprop": [(1, dict(first=0.9, eps=1e-8), True), (3, dict(first=0.9, second=0.5, eps=1e-8, flags=64), True)],
    "adagrad": [(1, dict(eps=1e-8), True)],
}
RULE_ROWS = [(rule, *row) for rule, rows in RULES.items() for row in rows]


def arguments(rule, kinds, numbers, counts, dtype=torch.float32):
    def tensors(dtype=dtype):
        return [torch.rand(3, 4, dtype=dtype), torch.rand(5, dtype=dtype)]

    kept = [t for _ in range(kinds) for t in tensors(torch.float32 if dtype in HALF else dtype)]
    given = {"first": 0.0, "second": 0.0, "eps": 0.0} | {k: v for k, v in numbers.items() if k != "flags"}
    steps = [torch.zeros(()), torch.ones(())] if counts else []
    return [tensors(), tensors(), kept, steps, None, None, None, None, 0.1, 0.01, *given.values(), ops.RULES.index(rule),
            numbers.get("flags", 0)]  # fmt: skip


@pytest.mark.parametrize("rule, kinds, numbers, counts", RULE_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_operator_has_a_right_fake(rule, kinds, numbers, counts, dtype):
    torch.library.opcheck(
        torch.ops.absgd_fast.step_.default,
        tuple(arguments(rule, kinds, numbers, counts, dtype)),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.skipif(not _backend.available("cpu"), reason="the native library is not built here")
def test_parameters_on_another_device():
    """Parameters that come to a device after the optimizer was made find the kernels there."""
    p = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = ab.ABSGD([p], lr=0.5)
    optimizer.param_groups[0]["params"][0] = p = torch.nn.Parameter(torch.ones(3))
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    assert optimizer._operators[p.device].backend == "cpu" and optimizer._plan is not None
    assert optimizer._plan.refresh(optimizer.param_groups, optimizer.state)[3] == []
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.5 - 0.5 * 1.9))


@pytest.mark.skipif(not _backend.available("cpu"), reason="the native library is not built here")
@pytest.mark.parametrize("rule, kinds, numbers, counts", RULE_ROWS)
def test_operator_refuses_what_does_not_fit(rule, kinds, numbers, counts):
    params, grads, kept, steps = range(4)

    def refused(message, **wrong):
        given = arguments(rule, kinds, numbers, counts)
        for place, value in wrong.items():
            given[int(place[1:])] = value(given[int(place[1:])])
        before = copy.deepcopy(given)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.absgd_fast.step_(*given)
        assert_identical(given, before)

    refused("one gradient", _1=lambda grads: grads[:1])
    refused("states that the rule keeps", _2=lambda kept: [*kept, torch.ones(5)])
    refused("steps", _3=lambda steps: [*steps, torch.zeros(())])
    refused("one dtype", _1=lambda grads: [g.double() for g in grads])
    refused("another shape", _1=lambda grads: [grads[0], torch.ones(6)])
    refused("unknown rule", _13=lambda rule: 4)
    if kinds:
        refused("another shape", _2=lambda kept: [*kept[:-1], torch.ones(6)])
        refused("states of", _2=lambda kept: [*kept[:-1], torch.ones(5, dtype=torch.bfloat16)])
        refused("states that the rule keeps", _2=lambda kept: kept[:-1])
    if counts:
        refused("steps", _3=lambda steps: steps[:1])
        refused("step", _3=lambda steps: [steps[0], torch.zeros(2)])


@pytest.mark.skipif(not _backend.available("cpu"), reason="the native library is not built here")
def test_planned_step_refuses_what_is_no_table():
    with pytest.raises(RuntimeError, match="table of a StepPlan"):
        torch.ops.absgd_fast.planned_step(torch.zeros(2, dtype=torch.int64), torch.ones(3))


# ---- bad input ------------------------------------------------------------------------------------------------------

ONLY = {"sgd": "sgd", "adam": "adam adamw", "rmsprop": "rmsprop", "adagrad": "adagrad", "all": "sgd adam adamw rmsprop adagrad"}
# options that torch's class refuses, and for which of them
MISTAKES = [
    ("all", dict(lr=-1.0), "-1.0"),
    ("all", dict(lr=torch.tensor(-0.5)), "-0.5"),
    ("all", dict(lr=torch.ones(2)), "1-element"),
    ("all", dict(weight_decay=-0.125), "-0.125"),
    ("adam rmsprop adagrad adamw", dict(lr=math.nan), "nan"),
    ("adam rmsprop adagrad adamw", dict(eps=-1e-3), "-0.001"),
    ("adam rmsprop adagrad adamw", dict(eps=math.nan), "nan"),
    ("adam rmsprop adagrad adamw", dict(weight_decay=math.nan), "nan"),
    ("adam adamw", dict(betas=(1.0, 0.5)), "1.0"),
    ("adam adamw", dict(betas=(0.5, -0.25)), "-0.25"),
    ("adam adamw", dict(betas=(0.5, math.nan)), "nan"),
    ("adam adamw", dict(betas=(0.5, torch.tensor(0.5))), "betas"),
    ("adam adamw", dict(betas=(torch.rand(2), torch.rand(2))), ""),
    ("sgd rmsprop", dict(momentum=-0.1), "-0.1"),
    ("sgd", dict(nesterov=True, momentum=0.0), "Nesterov"),
    ("sgd", dict(nesterov=True, dampening=0.1, momentum=0.9), "Nesterov"),
    ("rmsprop", dict(alpha=-0.1), "-0.1"),
    ("adagrad", dict(lr_decay=-0.1), "-0.1"),
    ("adagrad", dict(initial_accumulator_value=-0.1), "-0.1"),
    ("all", dict(lr="0.1"), ""),
    ("all", dict(learning_rate=0.1), "learning_rate"),
]
# what is no list of parameters
NO_PARAMETERS = {
    "none": list,
    "no group": lambda: [{"lr": 0.1}],
    "a tensor": lambda: torch.nn.Parameter(torch.ones(3)),
    "a set": lambda: [{"params": {torch.nn.Parameter(torch.ones(3))}}],
    "a number": lambda: [1.0],
    "not a leaf": lambda: [torch.nn.Parameter(torch.ones(3)) * 2],
    "in two groups": lambda: [{"params": (p := [torch.nn.Parameter(torch.ones(3))])}, {"params": p}],
    "names for some": lambda: [("weight", torch.nn.Parameter(torch.ones(3))), torch.nn.Parameter(torch.ones(3))],
}


def assert_same_error(ours, theirs, replaced=()):
    """Both raise the same type with the same words."""
    with pytest.raises(Exception) as expected:
        theirs()
    message = str(expected.value)
    for theirs_name, ours_name in replaced:
        message = message.replace(theirs_name, ours_name)
    with pytest.raises(expected.type, match=f"^{re.escape(message)}$"):
        ours()
    return message


@pytest.mark.parametrize(
    "name, options, named",
    [(name, options, named) for names, options, named in MISTAKES for name in ONLY.get(names, names).split()],
    ids=lambda value: None if isinstance(value, (str, dict)) else value,
)
def test_mistakes_that_torch_knows(name, options, named):
    ours, theirs, _ = OPTIMIZERS[name]
    replaced = [(f"{theirs.__name__}.", f"{ours.__name__}.")]
    message = assert_same_error(lambda: ours(make(), **options), lambda: theirs(make(), **options), replaced)
    assert named in message


@pytest.mark.parametrize("params", NO_PARAMETERS.values(), ids=NO_PARAMETERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_no_list_of_parameters(name, params):
    ours, theirs, _ = OPTIMIZERS[name]
    assert_same_error(lambda: ours(params()), lambda: theirs(params()))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(robust=ab.ABLoss(lam=1.0)), TypeError, "robust: got an ABLoss that is not deferred, expected ABLoss"),
        (dict(backend="gpu"), ValueError, "backend: got 'gpu', expected one of None"),
        (dict(backend="cuda"), RuntimeError, "backend 'cuda' cannot run: "),
    ],
    ids=["robust", "unknown-backend", "backend-that-cannot-run"],
)
def test_bad_options_of_every_class(name, options, error, message):
    with pytest.raises(error, match=message):
        OPTIMIZERS[name][0](make(), **options)


@pytest.mark.parametrize(
    "ours, options, message",
    [
        (ab.ABSGD, dict(lr=math.nan), "Invalid learning rate: nan"),
        (ab.ABSGD, dict(momentum=math.nan), "Invalid momentum value: nan"),
        (ab.ABSGD, dict(weight_decay=math.nan), "Invalid weight_decay value: nan"),
        (ab.ABSGD, dict(heavy_ball=True, nesterov=True), "heavy_ball.*nesterov.*True"),
        (ab.ABSGD, dict(heavy_ball=True, dampening=0.125), "heavy_ball.*dampening.*0.125"),
        (ab.ABAdam, dict(paper_form=True, amsgrad=True), "paper_form.*amsgrad"),
        (ab.ABAdamW, dict(paper_form=True, amsgrad=True), "paper_form.*amsgrad"),
    ],
)
def test_bad_options_that_torch_does_not_know(ours, options, message):
    with pytest.raises(ValueError, match=message):
        ours(make(), **options)


@each_optimizer
@pytest.mark.parametrize("bad", ["twice", "not a leaf", "a number", "a set"])
def test_a_bad_group_is_not_added(one_way, case, bad):
    """torch's error, and the optimizer goes on as if nothing had been."""
    params, expected = make(), make()
    ours, theirs = case.own(params, one_way), case.other(expected)

    def group(ps):
        return {"twice": ps[:1], "not a leaf": [ps[0] * 2], "a number": [1.0], "a set": {*ps}}[bad]

    assert_same_error(lambda: ours.add_param_group({"params": group(params)}),
                      lambda: theirs.add_param_group({"params": group(expected)}))  # fmt: skip
    assert len(ours.param_groups) == 1
    for step in range(3):
        set_grads(params, expected, seed=step)
        ours.step()
        theirs.step()
        assert_same(params, ours, expected, theirs)


def sparse_gradient(params, optimizer):
    params[5].grad = params[5].grad.to_sparse()


def gradient_of_another_size(params, optimizer):
    params[5].data = torch.cat([params[5].data] * 2)


def number_that_is_a_string(params, optimizer):
    optimizer.param_groups[1]["weight_decay"] = "0.1"


def option_that_is_missing(params, optimizer):
    del optimizer.param_groups[1]["weight_decay"]


def parameter_in_one_place(params, optimizer):
    """All elements share memory: no tensor may be written in place there."""
    params[5].data = params[5].data[:1, :1].clone().expand(8, 8)


def closure_that_raises(params, optimizer):
    pass


FAILURES = [sparse_gradient, gradient_of_another_size, number_that_is_a_string, option_that_is_missing, parameter_in_one_place,
            closure_that_raises]  # fmt: skip


@each_optimizer
@pytest.mark.parametrize("fail", FAILURES, ids=operator.attrgetter("__name__"))
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_step_that_fails_changes_nothing(one_way, case, fail, first):
    """The mistake is in the second group. The error is torch's, and, once it is mended, steps go on as if that had not been."""
    if fail is sparse_gradient and issubclass(case.torch, torch.optim.SGD) and case.form:
        pytest.skip("heavy_ball takes sparse gradients")

    def build(make_optimizer):
        params = make()
        return params, make_optimizer([{"params": params[:3]}, {"params": params[3:]}])

    (params, ours), (untouched, other) = build(lambda groups: case.own(groups, one_way)), build(lambda groups: case.own(groups))
    other = case.own([{"params": untouched[:3]}, {"params": untouched[3:]}], one_way)
    for step in range(0 if first else 2):
        set_grads(params, untouched, seed=step)
        ours.step()
        other.step()
    if not case.form:
        theirs_params, theirs = build(case.other)
        set_grads(theirs_params, seed=7)
        theirs.step()
        set_grads(theirs_params, seed=8)
        fail(theirs_params, theirs)
        with pytest.raises(Exception) as error:
            theirs.step(*[lambda: 1 / 0] * (fail is closure_that_raises))
        error = error.type
    else:
        error = Exception
    set_grads(params, seed=8)
    data, options = params[5].data, dict(ours.param_groups[1])
    fail(params, ours)
    before = snapshot(params, ours)
    with pytest.raises(error):
        ours.step(*[lambda: 1 / 0] * (fail is closure_that_raises))
    after = snapshot(params, ours)
    assert_identical(after[:2], before[:2])
    if not first:
        assert_identical(after[2], before[2])
    params[5].data = data
    ours.param_groups[1].update(options)
    for step in range(3):
        set_grads(params, untouched, seed=10 + step)
        ours.step()
        other.step()
        assert_identical([p.data for p in params], [p.data for p in untouched])
        assert_identical(states(ours), states(other))


@pytest.mark.parametrize(
    "name, message",
    [
        ("adam-default", "Adam does not support sparse gradients, please consider SparseAdam instead"),
        ("adamw-default", "Adam does not support sparse gradients, please consider SparseAdam instead"),
        ("adam-paper-form", "Adam does not support sparse gradients, please consider SparseAdam instead"),
        ("rmsprop-default", "RMSprop does not support sparse gradients"),
        ("adagrad-decay", "weight_decay option is not compatible with sparse gradients"),
    ],
)
def test_sparse_gradients_that_are_refused(one_way, name, message):
    params = make()
    optimizer = CASES[name].own(params, one_way)
    set_grads(params, seed=0)
    params[4].grad = params[4].grad.to_sparse()
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


# ---- memory ----------------------------------------------------------------------------------------------------------


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", [EACH["sgd-nesterov"], EACH["adam-amsgrad-decay"]], ids=["sgd", "adam"])
def test_no_growth(case, one_way, garbage):
    """Thousands of steps; one leaked Python object a step would show as that many blocks, 100 bytes a step as 1 MB."""
    params = make([(4,), (8, 8)], torch.float32)
    optimizer = case.own(params, one_way, lr=1e-3)

    def run(n):
        for _ in range(n):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        return sys.getallocatedblocks(), resident_bytes()

    count = {"reference": 500, "cpu": 10_000, None: 1_000}[one_way]
    blocks, resident = run(200)
    more_blocks, more_resident = run(count)
    assert more_blocks - blocks < 200
    assert more_resident - resident < 1_000_000


@each_optimizer
def test_gradients_and_replaced_states_are_let_go(case, garbage):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = case.own([p])
    old = []
    for _ in range(3):
        p.grad = torch.ones(3)
        grad = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        assert grad() is None and all(t() is None for t in old)
        old = [weakref.ref(state[name]) for state, name in kept(optimizer)]
        assert old
        for state, name in kept(optimizer):
            state[name] = torch.ones(3)
    p.grad = torch.ones(3)
    optimizer.step()
    old = [weakref.ref(value) for kept_of_p in optimizer.state.values() for value in kept_of_p.values()]
    assert old and all(t() is not None for t in old)
    del optimizer, state
    gc.collect()
    assert all(t() is None for t in old)


@each_optimizer
def test_the_table_is_kept_between_steps(case):
    """As long as nothing grows: a step allocates no new one."""
    params = make()
    optimizer = case.own(params)
    if optimizer._plan is None:
        pytest.skip("no host module, or no kernels")
    steps(params, optimizer, range(2))
    set_grads(params, seed=2)
    optimizer.step()
    plan, table = optimizer._plan, optimizer._plan.table.data_ptr()
    steps(params, optimizer, range(5))
    assert optimizer._plan is plan and plan.table.data_ptr() == table


@each_optimizer
def test_a_step_inside_backward_does_not_keep_the_model_alive(one_way, case, garbage):
    """The hook's closure makes a cycle: parameter, hook, optimizer, plan. The garbage collector can undo it."""
    model = torch.nn.Linear(3, 2)
    alive = weakref.ref(model)
    for p in model.parameters():
        optimizer = case.own([p], one_way)

        def hook(param, optimizer=optimizer):
            optimizer.step()
            param.grad = None

        p.register_post_accumulate_grad_hook(hook)
    before = model.weight.detach().clone()
    for _ in range(3):
        model(torch.ones(4, 3)).sum().backward()
    assert not torch.equal(before, model.weight) and model.weight.grad is None
    del model, p, hook, optimizer
    gc.collect()
    assert alive() is None
