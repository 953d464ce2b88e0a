"""The optimizers in mixed precision: GradScaler, and `robust=`, which scales gradients in the step."""

import pytest
import torch
from optim_cases import assert_identical, assert_same, each_optimizer, every_case, make, set_grads, single, snapshot, states

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
