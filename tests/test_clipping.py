"""max_norm=: an optimizer clips by the global norm within its step (MATH §3.6)."""

import copy
import math
import pickle

import pytest
import torch
from optim_cases import (
    HALF,
    LARGE,
    assert_identical,
    assert_same,
    each_optimizer,
    every_case,
    in_float64,
    make,
    set_grads,
    snapshot,
    states,
)
from test_optim_amp import Settles
from torch import nn

import absgd_fast as ab
from absgd_fast import _backend, ops
from absgd_fast.optim import clipping
from absgd_fast.optim.scaling import Scaling

pytestmark = pytest.mark.usefixtures("one_thread")


def norm_of(grads):
    """The root of the sum of all squares, in float64, by Python's exact sum."""
    return math.sqrt(math.fsum(x * x for g in grads if g is not None for x in real_numbers(g)))


def real_numbers(g):
    g = g.to_dense() if g.is_sparse else g
    return (torch.view_as_real(g.resolve_conj()) if g.is_complex() else g).double().flatten().tolist()


def factor(total, max_norm):
    return min(1.0, max_norm / (total + 1e-6))


def clipped_by_hand(params, factor):
    """The same gradients, multiplied in float64."""
    return [None if p.grad is None else p.grad.to(torch.complex128 if p.is_complex() else torch.float64) * factor for p in params]


# ---- the step ----------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("kernel", [True, False], ids=["", "norms-by-torch"])
def test_step_uses_the_clipped_gradient(case, one_way, dtype, kernel, monkeypatch):
    """Against torch's class in float64 with gradients that were clipped by hand. Some steps are clipped and some are not, and the
    gradients stay as they are."""
    monkeypatch.setattr(ops.OPERATORS["cpu"], "has_squares", kernel and ops.OPERATORS["cpu"].has_squares)
    params = make(dtype=dtype)
    expected = in_float64(params)
    ours, theirs = case.own(params, one_way, max_norm=20.0), case.other(expected)
    clipped = []
    for step in range(5):
        set_grads(params, seed=step, skip=0.2)
        given = [None if p.grad is None else p.grad.mul_(1 + step).clone() for p in params]
        total = norm_of(given)
        clipped.append(total > 20)
        for p, grad in zip(expected, clipped_by_hand(params, factor(total, 20.0))):
            p.grad = grad
        ours.step()
        theirs.step()
        assert float(ours.last_grad_norm) == pytest.approx(total, rel=1e-12)
        assert ours.last_grad_norm.dim() == 0 and ours.last_grad_norm.dtype == torch.float64
        for p, grad in zip(params, given):
            assert p.grad is None if grad is None else torch.equal(p.grad, grad)
        assert_same(params, ours, expected, theirs, dtype)
        if dtype in HALF:
            for p, q in zip(params, expected):
                q.data.copy_(p)  # the next step starts from the rounded parameter
    assert any(clipped) and not all(clipped)


@each_optimizer
def test_a_norm_below_the_bound_changes_no_bit(case, one_way):
    params, expected = make(), make()
    ours, plain = case.own(params, one_way, max_norm=math.inf), case.own(expected, one_way)
    kept = []
    for step in range(3):
        set_grads(params, expected, seed=step)
        ours.step()
        plain.step()
        assert_identical([p.data for p in params], [p.data for p in expected])
        assert_identical(states(ours), states(plain))
        kept.append((ours.last_grad_norm, norm_of([p.grad for p in params])))
    for norm, by_hand in kept:  # each step has left a tensor of its own
        assert float(norm) == pytest.approx(by_hand, rel=1e-12)
    assert plain.last_grad_norm is None


@each_optimizer
@pytest.mark.parametrize("protocol", ["unscaled before", "in the step"])
def test_the_norm_is_that_of_the_finished_gradient(case, one_way, protocol):
    """With the scale of a deferred step and with GradScaler's: as the finished gradients in another optimizer."""
    params, expected = make(), make()
    ours, plain = case.own(params, one_way, max_norm=1.5), case.own(expected, one_way, max_norm=1.5)
    for step in range(4):
        set_grads(params, expected, seed=step)
        ours.robust = Settles(0.25)
        for p in params:
            p.grad.mul_(4)
        if protocol == "in the step":
            for p in params:
                p.grad.mul_(8)
            ours.grad_scale, ours.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        settled = ours.robust.settled.clone()
        ours.step()
        plain.step()
        assert float(ours.last_grad_norm) == pytest.approx(float(plain.last_grad_norm), rel=1e-12)
        assert torch.equal(ours.robust.settled, settled)  # another optimizer may need it
        assert_same(params, ours, expected, plain)


def test_a_scale_that_the_kernel_divides_by():
    """On a GPU the kernel of the step divides the gradients by GradScaler's scale, after the norm was taken."""
    params = make([(3,)])
    params[0].grad = torch.tensor([0.0, 24.0, 32.0], dtype=torch.float64)
    given = Scaling(torch.tensor(8.0), torch.tensor(0.0), torch.tensor([3.0, 0.5, 0, 0, 0, 0], dtype=torch.float64))
    groups = [{"params": params}]
    scaling = clipping.prepared(given, groups)
    total = clipping.clip_(scaling, 1.0, [(params, clipping.sums_of_squares(params))], groups)
    assert float(total) == pytest.approx(2.5)
    assert scaling.settled.tolist() == pytest.approx([3.0, 0.5 / (2.5 + 1e-6), 0, 0, 0, 0])


@each_optimizer
@pytest.mark.parametrize("skipped_by", ["a bad loss", "an overflow"])
def test_skipped_steps(case, one_way, skipped_by):
    params = make()
    ours = case.own(params, one_way, max_norm=1.0)
    set_grads(params, seed=0)
    ours.step()
    assert math.isfinite(ours.last_grad_norm)
    if skipped_by == "a bad loss":
        ours.robust = Settles(0.25, bad=1.0)
    else:
        ours.grad_scale, ours.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    before = snapshot(params, ours)
    ours.step()
    assert_identical(snapshot(params, ours), before)
    assert math.isnan(ours.last_grad_norm)


@each_optimizer
def test_no_gradients(case, one_way):
    params = make()
    ours = case.own(params, one_way, max_norm=1.0)
    before = snapshot(params, ours)
    ours.step()
    assert_identical(snapshot(params, ours), before)
    assert float(ours.last_grad_norm) == 0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_nonfinite_gradients_are_as_torchs(one_way, value):
    """Without GradScaler nobody skips the step: an infinite norm makes the finite gradients 0."""
    params, expected = make([(3,), (4,)]), make([(3,), (4,)])
    ours = ab.ABSGD(params, lr=0.1, momentum=0.0, max_norm=1.0, backend=one_way)
    theirs = torch.optim.SGD(expected, lr=0.1)
    set_grads(params, expected, seed=0)
    params[0].grad[1] = expected[0].grad[1] = value
    torch.nn.utils.clip_grad_norm_(expected, 1.0)
    ours.step()
    theirs.step()
    for p, q in zip(params, expected):
        torch.testing.assert_close(p, q, equal_nan=True)


# ---- all kinds of tensors ----------------------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("kind", ["sparse", "complex", "conjugate", "float16", "strided", "subclass"])
def test_every_kind_of_gradient_counts(case, one_way, kind):
    """Beside plain ones, in two groups. torch's own step on clipped gradients is the truth."""
    if kind == "sparse" and not issubclass(case.torch, torch.optim.SGD):
        pytest.skip("takes no sparse gradients, or not with decay")
    kinds = {"complex": torch.complex64, "conjugate": torch.complex64, "float16": torch.float16}
    two = [make([(4, 3)], kinds.get(kind, torch.float32))[0], make([(5,)], torch.float64)[0]]
    params = [nn.Parameter(Sub(two[0].detach().clone())), two[1]] if kind == "subclass" else two
    expected = in_float64(two)
    options = {"weight_decay": 0.0}
    groups = lambda ps: [{"params": ps[:1]}, {"params": ps[1:], "lr": 0.01}]  # noqa: E731
    ours, theirs = case.own(groups(params), one_way, max_norm=0.7, **options), case.other(groups(expected), **options)
    for step in range(3):
        set_grads(params, seed=step)
        grad = params[0].grad
        if kind == "sparse":  # with a place that stands twice
            params[0].grad = torch.sparse_coo_tensor(torch.tensor([[0, 2, 2]]), grad[:3], (4, 3), check_invariants=True)
        elif kind == "strided":
            params[0].grad = grad.T.contiguous().T
        elif kind == "conjugate":
            params[0].grad = grad.conj().resolve_conj().conj()
        total = norm_of([p.grad for p in params])
        for p, grad in zip(expected, clipped_by_hand(params, factor(total, 0.7))):
            p.grad = grad.to_dense() if kind == "sparse" else grad.as_subclass(torch.Tensor)
        ours.step()
        theirs.step()
        assert total > 0.7
        assert float(ours.last_grad_norm) == pytest.approx(total, rel=1e-12)
    for p, q in zip(params, expected):
        near = dict(rtol=2**-10, atol=2**-10) if p.dtype in HALF else dict(rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(p.detach().as_subclass(torch.Tensor), q.detach().to(p.dtype), **near)


class Sub(torch.Tensor):
    """A subclass that behaves as a tensor."""


# ---- the kernel --------------------------------------------------------------------------------------------------------

native = pytest.mark.skipif(_backend.host() is None, reason="built without the host module")


def squares(params):
    """What the kernel gives for gradients that an optimizer has planned."""
    optimizer = ab.ABSGD(params, lr=0.0, momentum=0.0, backend="cpu")
    _, _, on, others = optimizer._plan.refresh(optimizer.param_groups, optimizer.state)
    assert others == []
    return torch.ops.absgd_fast.planned_squares(optimizer._plan.table, on)


@native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_squares(backend, dtype):
    """Of every length up to two registers and around the length of a block, on every instruction set."""
    if backend != "cpu":
        pytest.skip("only the CPU has this kernel")
    params = make([(n,) for n in (*range(70), 16383, 16384, 16385, 40000)], dtype)
    set_grads(params, seed=1)
    expected = torch.stack([p.grad.double().square().sum() for p in params])
    torch.testing.assert_close(squares(params), expected, rtol=1e-13, atol=0)


@native
def test_squares_beyond_the_range_of_float():
    """The gradients of a deferred step may be sums of exp(z - m) with z - m up to 60."""
    params = make([(40,)], torch.float32)
    params[0].grad = torch.full_like(params[0], 1e26)
    torch.testing.assert_close(squares(params), torch.tensor([40e52], dtype=torch.float64), rtol=1e-6, atol=0)
    for backend in (None, "reference"):
        optimizer = ab.ABSGD(params, lr=0.0, max_norm=1.0, backend=backend)
        optimizer.robust = Settles(1e-26)
        optimizer.step()
        assert float(optimizer.last_grad_norm) == pytest.approx(math.sqrt(40), rel=1e-6)


@native
def test_same_bits_for_any_number_of_threads(threads):
    params = make(LARGE, torch.float32)
    set_grads(params, seed=0)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(squares(params))
    assert all(torch.equal(found[0], other) for other in found)


# ---- the attributes ------------------------------------------------------------------------------------------------------


@each_optimizer
def test_it_stands_in_no_group_and_travels_with_copies(case, one_way):
    ours = case.own(make(), one_way, max_norm=2)
    assert ours.max_norm == 2.0 and type(ours.max_norm) is float and math.isnan(ours.last_grad_norm)
    assert "max_norm" not in ours.defaults and all("max_norm" not in group for group in ours.param_groups)
    set_grads(ours.param_groups[0]["params"], seed=0)
    ours.step()
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert copied.max_norm == 2.0 and torch.equal(copied.last_grad_norm, ours.last_grad_norm)
    state = ours.state_dict()
    assert set(state) == {"state", "param_groups"} and "max_norm" not in str(state["param_groups"])
    ours.max_norm = None
    ours.step()
    assert ours.last_grad_norm is None
    ours.max_norm = 0.5
    assert ours.max_norm == 0.5


@each_optimizer
@pytest.mark.parametrize("value", [0, -1.0, math.nan, "1", True, float, [1.0]], ids=str)
def test_refused(case, one_way, value):
    with pytest.raises(ValueError, match="max_norm: got .*, expected a number > 0, or None for no clipping"):
        case.own(make(), one_way, max_norm=value)
    ours = case.own(make(), one_way, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm: got"):
        ours.max_norm = value
    assert ours.max_norm == 1.0


def test_shards_that_do_not_say_so_are_refused():
    """FullyShardedDataParallel marks its parameters; each process sees the norm of its own part only."""
    params = make([(3,), (2,)])
    params[0]._fsdp_flattened = True
    with pytest.raises(ValueError, match="FullyShardedDataParallel.*expected fully_shard.*clip_grad_norm_"):
        ab.ABSGD(params, lr=0.1, max_norm=1.0)
    optimizer = ab.ABSGD(params[1:], lr=0.1, max_norm=1.0)
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        optimizer.add_param_group({"params": params[:1]})
    ab.ABSGD(params, lr=0.1)


@each_optimizer
@pytest.mark.parametrize("refused", ["float16", "FullyShardedDataParallel"])
def test_a_refused_group_is_not_added(case, one_way, refused):
    ours = case.own(make(), one_way, max_norm=1.0)
    (param,) = make([(3,)], torch.float16 if refused == "float16" else torch.float32)
    if refused == "float16":
        ours.robust = ab.ABLoss(lam=0.5, deferred=True)
    else:
        param._fsdp_flattened = True
    with pytest.raises(ValueError, match=refused):
        ours.add_param_group({"params": [param]})
    assert len(ours.param_groups) == 1


@each_optimizer
@pytest.mark.parametrize("name", ["max_norm", "robust"])
def test_options_of_a_group_that_would_do_nothing(case, one_way, name):
    with pytest.raises(ValueError, match=f"{name}: got it as an option of a parameter group"):
        case.own([{"params": make(), name: None}], one_way)


@each_optimizer
def test_a_step_that_raises_has_used_nothing(case, one_way):
    """The normaliser of the micro-batches serves the step that follows once the mistake is mended."""
    params, expected = make([(3,), (4,)]), make([(3,), (4,)])
    ours, plain = case.own(params, one_way, max_norm=1.0), case.own(expected, one_way, max_norm=1.0)
    ours.robust = Settles(0.25)
    set_grads(params, expected, seed=0)
    for p in params:
        p.grad.mul_(4)
    ours.state[params[1]][next(iter(ours._rule.states))] = torch.ones(9)
    with pytest.raises(RuntimeError, match="shape"):
        ours.step()
    ours.state.clear()
    ours.step()
    plain.step()
    assert_same(params, ours, expected, plain)


def test_compiled(one_way):
    """torch.compile of the step, whose lists of tensors then serve."""
    params, expected = make(dtype=torch.float32), make(dtype=torch.float32)
    ours, plain = (ab.ABSGD(ps, lr=0.1, momentum=0.9, max_norm=2.0, backend=one_way) for ps in (params, expected))
    compiled = torch.compile(ours.step, backend="eager")
    for step in range(3):
        set_grads(params, expected, seed=step)
        compiled()
        plain.step()
        assert float(ours.last_grad_norm) == pytest.approx(float(plain.last_grad_norm), rel=1e-6)
        assert_same(params, ours, expected, plain, torch.float32)


@each_optimizer
@pytest.mark.parametrize("fused", [None, True], ids=["default", "fused"])
@pytest.mark.parametrize("deferred", [False, True], ids=["", "deferred"])
def test_under_grad_scaler(case, one_way, fused, deferred):
    """Both protocols of torch.amp.GradScaler, an overflow on the way: as torch's class after unscale_ and clip_grad_norm_."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4).double()
    other = copy.deepcopy(model)
    criterion = ab.ABLoss(lam=0.5, deferred=deferred, backend=one_way).double()
    twin = ab.ABLoss(lam=0.5, backend=one_way).double()
    ours = case.own(model.parameters(), one_way, max_norm=0.3, fused=fused)
    ours.robust = criterion if deferred else None
    theirs = case.other(other.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) for _ in range(2)]
    for step in range(6):
        draw = torch.Generator().manual_seed(step)
        x, y = torch.randn(10, 6, generator=draw, dtype=torch.float64), torch.randint(4, (10,), generator=draw)
        spoil = math.inf if step == 3 else 1.0
        ours.zero_grad()
        theirs.zero_grad()
        for part in (slice(0, 3), slice(3, 10)) if deferred else (slice(None),):
            scalers[0].scale(criterion(model(x[part]), y[part])).backward()
        scalers[1].scale(twin(other(x), y)).backward()
        model.bias.grad[0] *= spoil
        other.bias.grad[0] *= spoil
        scalers[1].unscale_(theirs)
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.3)
        for scaler, optimizer in zip(scalers, (ours, theirs)):
            scaler.step(optimizer)
            scaler.update()
        if spoil == 1.0:
            assert float(ours.last_grad_norm) == pytest.approx(float(norm), rel=1e-9)
        for p, q in zip(model.parameters(), other.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    assert scalers[0].get_scale() == scalers[1].get_scale()
