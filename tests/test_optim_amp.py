"""The optimizers in mixed precision: GradScaler, and `robust=`, which scales gradients in the step."""

import copy
import inspect
import pickle

import pytest
import torch
from optim_cases import (
    assert_identical,
    assert_same,
    each_of_torchs,
    each_optimizer,
    every_case,
    make,
    set_grads,
    single,
    snapshot,
    states,
    steps,
    through_a_file,
)

import absgd_fast as ab

pytestmark = pytest.mark.usefixtures("one_thread")


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


# ---- torch.amp.GradScaler ----------------------------------------------------------------------------------------------

PROTOCOLS = {"default": dict(), "fused": dict(fused=True)}
each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


def is_fused(optimizer):
    """What GradScaler asks."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


@each_optimizer
def test_the_protocol(case, one_way):
    """torch's fused one for fused=True, for robust= and for float16 parameters, whichever group holds them and since when; else
    that of torch's default class."""
    takes_fused = "fused" in inspect.signature(case.torch).parameters
    for fused in (None, False, True):
        ours = case.own(make([(3,)]), one_way, fused=fused)
        assert is_fused(ours) is bool(fused)
        assert ours.param_groups[0]["fused"] is ours.defaults["fused"] is fused
        if takes_fused:
            theirs = case.torch(make([(3,)]), fused=fused)
            assert is_fused(theirs) is is_fused(ours) and theirs.param_groups[0]["fused"] is fused
    robust = ab.ABLoss(lam=0.5, deferred=True)
    assert is_fused(case.own(make([(3,)]), one_way, robust=robust))
    later = case.own(make([(3,)], torch.float32), one_way)
    for value, expected in ((robust, True), (None, False)):
        later.robust = value
        assert is_fused(later) is expected
    later.add_param_group({"params": make([(2,)], torch.float16)})
    assert is_fused(later)
    cast = torch.nn.Linear(2, 1)
    optimizer = case.own(cast.parameters(), one_way)
    assert [is_fused(optimizer), cast.half() and is_fused(optimizer), cast.float() and is_fused(optimizer)] == [
        False,
        True,
        False,
    ]


@each_of_torchs
def test_the_protocol_travels_as_torchs(case, one_way):
    """Saved groups hold the option, and a loaded group takes it over; the protocol stays the constructor's, through copies too.
    An optimizer that was pickled before there was the option has the default protocol."""
    for fused in (None, True):
        ours = case.own(make([(3,)]), one_way, fused=fused)
        steps([*ours.param_groups[0]["params"]], ours, range(2))
        for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert is_fused(copied) is bool(fused) and copied.param_groups[0]["fused"] is fused
        state = through_a_file(ours.state_dict())
        assert state["param_groups"][0]["fused"] is fused
        for others in (case.torch, case.ours):
            other = others(make([(3,)]))
            other.load_state_dict(state)
            assert other.param_groups[0]["fused"] is fused and not is_fused(other)
            state = other.state_dict()
    fixed = case.own(make([(3,)]), one_way, fused=True)
    fixed.load_state_dict(case.torch(make([(3,)])).state_dict())
    assert is_fused(fixed) and fixed.param_groups[0]["fused"] is None
    old = case.own(make([(3,)]), one_way)
    for options in (old.defaults, *old.param_groups):
        options.pop("fused")
    old = pickle.loads(pickle.dumps(old))
    assert not is_fused(old) and not old.param_groups[0]["fused"]


@each_optimizer
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_the_protocol_refuses_no_tensor(one_way, case, kind):
    """torch's own fused kernels take neither sparse gradients nor complex numbers; ours do, with fused=True as without."""
    if kind == "sparse" and not issubclass(case.torch, torch.optim.SGD):
        pytest.skip("takes no sparse gradients, or not with decay")
    models = [make([(4, 3)], torch.complex64 if kind == "complex" else torch.float32) for _ in PROTOCOLS]
    for params, protocol in zip(models, PROTOCOLS.values()):
        optimizer = case.own(params, one_way, **protocol, weight_decay=0.0)
        for step in range(3):
            set_grads(params, seed=step)
            if kind == "sparse":
                params[0].grad = params[0].grad.to_sparse()
            optimizer.step()
    assert_identical(*models)


def count_steps(optimizer):
    """A list that grows with each call of step: how accelerate knows that GradScaler has left one out."""
    step, calls = optimizer.step, []
    optimizer.step = lambda *args: calls.append(True) or step(*args)
    return calls


def scale_grads(params, scaler, overflow):
    """The gradients that scaler.scale(loss).backward() leaves; overflow: one of them is infinite."""
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad *= scaler.get_scale()
    if overflow:
        params[5].grad[0, 0] = torch.inf


@each_optimizer
@each_protocol
def test_an_overflow_in_the_middle(one_way, case, protocol):
    """As torch's class in the same protocol, step by step: the calls of step that are left out, parameters, states, scale."""
    has = protocol if not case.form and "fused" in inspect.signature(case.torch).parameters else {}
    params, expected = make(dtype=torch.float32), make()
    ours, theirs = case.own(params, one_way, **protocol), case.other(expected, **has)
    calls = [count_steps(optimizer) for optimizer in (ours, theirs)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2) for _ in range(2)]
    for step in range(7):
        set_grads(params, expected, seed=step)
        for ps, optimizer, scaler in ((params, ours, scalers[0]), (expected, theirs, scalers[1])):
            scale_grads(ps, scaler, overflow=step in (3, 5))
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_same(params, ours, expected, theirs, torch.float32)
    left_out = 0 if protocol else 2
    assert len(calls[0]) == 7 - left_out
    assert len(calls[1]) == (7 - left_out if has == protocol else 5)


@each_protocol
def test_an_overflow_ends_the_deferred_step(one_way, protocol):
    """With robust= GradScaler calls step after an overflow too, so log s has seen the micro-batches of each step once: as with
    one big batch and a plain loss. If it left step out, they would count again in the next one."""
    log_s = []
    for deferred in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        criterion = ab.ABLoss(lam=0.5, gamma=0.5, deferred=deferred)
        options = dict(robust=criterion) | protocol if deferred else dict()
        optimizer = ab.ABSGD(model.parameters(), lr=0.1, **options, backend=one_way)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            optimizer.zero_grad()
            x, y = torch.randn(8, 4) * (1 + 3 * (step == 1)), torch.randint(3, (8,))
            for rows in (slice(0, 3), slice(3, 8)) if deferred else (slice(8),):
                scaler.scale(criterion(model(x[rows]), y[rows])).backward()
            if step == 1:
                model.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            log_s.append(criterion.log_s.clone())
    torch.testing.assert_close(log_s[:4], log_s[4:], rtol=1e-6, atol=1e-6)


@each_optimizer
@each_protocol
def test_grad_scaler(one_way, case, protocol):
    """torch.amp.GradScaler, its first step skipped. (torch 2.13's fused SGD leaves the momentum uninitialised then.)"""
    params, expected = make(dtype=torch.float32), make()
    ours, theirs = case.own(params, one_way, **protocol), case.other(expected)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2) for _ in range(2)]
    for step in range(8):
        set_grads(params, expected, seed=step)
        for ps, optimizer, scaler in ((params, ours, scalers[0]), (expected, theirs, scalers[1])):
            scale_grads(ps, scaler, overflow=step in (0, 4))
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
