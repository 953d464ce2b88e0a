"""The optimizers against torch.optim in float64, and the paper's own steps against their formulas: the numbers of a step."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optim_cases import (
    CASES,
    HALF,
    assert_identical,
    assert_near,
    assert_same,
    each_optimizer,
    every_case,
    in_float64,
    make,
    planned,
    set_grads,
    single,
    states,
    through_a_file,
)
from tensors import equation_2

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")


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
    for now in equation_2(optimizer, params, set_grads, beta, decay):
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
