"""What only the CUDA operators have to prove: several blocks, other alignments, numbers in device memory, reports of labels.

Collected by test_cuda.py in a process of its own, where these operators serve tensors on the CPU.
"""

import math

import pytest
import torch
from conftest import DTYPES, LOSSES

import absgd_fast as ab
from absgd_fast import ops, reference
from absgd_fast.functional import logit_loss, robust_weights

INF = math.inf
ONE_LAUNCH = 16384


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- losses ---------------------------------------------------------------------------------------------------------


# classes: around one 16-byte access of each dtype (2, 4, 8), a warp of them, and where a block takes a row (128 accesses)
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 31, 33, 127, 130, 257, 1024, 1027, 4101])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_of_every_length_and_alignment(classes, offset, dtype):
    rows = 5
    storage = torch.randn(rows * (classes + 2) + offset, dtype=torch.float64).mul(3).to(dtype)
    logits = storage[offset:].view(rows, classes + 2)[:, :classes].requires_grad_()
    target = torch.tensor([0, classes - 1, classes // 2, -100, 0])
    upstream = torch.rand(rows, dtype=reference.real_dtype(dtype))
    wide = logits.detach().double().requires_grad_()
    losses, wanted = logit_loss(logits, target), reference.logit_loss(wide, target)
    losses.backward(upstream)
    wanted.backward(upstream.double())
    torch.testing.assert_close(losses.double(), wanted, rtol=3e-6 if dtype != torch.float64 else 1e-12, atol=1e-6)
    assert losses[3] == 0 and not logits.grad[3].any()
    near = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=near, atol=near)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("shape", [(ONE_LAUNCH + 6, 3), (2, 3, 8200)], ids=["rows", "images"])
def test_more_rows_than_one_block_weighs(kind, shape):
    """Then the weights take launches of their own."""
    case = LOSSES[kind]
    logits = torch.randn(shape, requires_grad=True)
    wide = logits.detach().double().requires_grad_()
    target = torch.randint(3, shape[:1] + shape[2:])
    ours = ab.ABLoss(case.module(3), lam=0.7, mix=0.5)
    exact = ab.ABLoss(case.module(3, backend="reference"), lam=0.7, mix=0.5).double()
    for _ in range(2):
        logits.grad = wide.grad = None
        a, b = ours(logits, target), exact(wide, target)
        a.backward()
        b.backward()
        torch.testing.assert_close(a.double(), b, rtol=2e-6, atol=0)
        torch.testing.assert_close(ours.last.weights.double(), exact.last.weights, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=2e-5, atol=1e-9)
        torch.testing.assert_close(ours.log_s.double(), exact.log_s, rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [0, 1, 31, 257, 4096, 4097, ONE_LAUNCH, ONE_LAUNCH + 1, 70_001])
@pytest.mark.parametrize("masked", [False, True])
def test_vectors_of_every_length(count, masked):
    losses = torch.randn(count, requires_grad=True)
    wide = losses.detach().double().requires_grad_()
    mask = torch.rand(count) > 0.3 if masked else None
    upstream = torch.randn(count)
    for log_s in (-INF, 0.4):
        losses.grad = wide.grad = None
        weights, state = robust_weights(losses, log_s, 0.5, mask=mask)
        exact, exact_state = robust_weights(wide, log_s, 0.5, mask=mask, backend="reference")
        torch.testing.assert_close(state.double(), exact_state, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(weights.double(), exact, rtol=2e-6, atol=1e-6)
        ((weights * upstream).sum() + 3 * state).backward()
        ((exact * upstream).sum() + 3 * exact_state).backward()
        torch.testing.assert_close(losses.grad.double(), wide.grad, rtol=1e-5, atol=2e-5)
    value = ab.ABLoss(lambda x: x * 1, lam=0.5)(losses, mask=mask)
    wanted = ab.ABLoss(lambda x: x * 1, lam=0.5, backend="reference").double()(wide, mask=mask)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_two_ways_to_the_gradient_agree():
    """One block that makes it at once, and statistics from which backward makes it."""
    operators = ops.OPERATORS["cuda"]
    before = operators.gradient_limit
    grads = []
    try:
        for limit in (0, ONE_LAUNCH):
            operators.gradient_limit = limit
            torch.manual_seed(1)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                logits = torch.randn(70, 13, dtype=dtype, requires_grad=True)
                criterion = ab.ABLoss(ab.CrossEntropy(torch.rand(13), label_smoothing=0.1), lam=-0.7)
                (3 * criterion(logits, torch.randint(13, (70,)), sample_weight=torch.rand(70))).backward()
                grads.append(logits.grad)
    finally:
        operators.gradient_limit = before
    for first, second in zip(grads[:3], grads[3:]):
        torch.testing.assert_close(first, second, rtol={4: 1e-5, 2: 1e-2}[first.element_size()], atol=1e-6)


def test_a_label_out_of_range_is_ignored_and_reported_later():
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([0, 3, 1, 2])
    losses = logit_loss(logits, target)
    losses.sum().backward()
    assert losses[1] == 0 and not logits.grad[1].any() and (losses[[0, 2, 3]] > 0).all()
    with pytest.raises(IndexError, match="label 3 in row 1 .* of an earlier batch, expected 0 <= label < 3"):
        logit_loss(logits, target.clamp(max=2))
    logit_loss(logits, target.clamp(max=2))  # once only
    criterion = ab.ABLoss(lam=0.5)
    value = criterion(logits, torch.tensor([0, -1, 1, 2]))
    wanted = ab.ABLoss(lam=0.5, backend="reference")(logits, torch.tensor([0, -100, 1, 2]))
    torch.testing.assert_close(value, wanted)
    with pytest.raises(IndexError, match="label -1 in row 1"):
        criterion(logits, target.clamp(max=2))


# ---- step -----------------------------------------------------------------------------------------------------------


def step(params, grads, buffers, lr_tensor=None, grad_scale=None, found_inf=None, **options):
    options = (
        dict(lr=0.1, momentum=0.9, dampening=0.0, weight_decay=0.01, nesterov=False, maximize=False, heavy_ball=False) | options
    )
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "heavy_ball")
    torch.ops.absgd_fast.sgd_step_(params, grads, buffers, lr_tensor, grad_scale, found_inf, *(options[n] for n in names))
    return options


def tensors(sizes, dtype=torch.float32, offset=0):
    return [torch.randn(n + offset, dtype=dtype)[offset:] for n in sizes]


# one 16-byte access and a chunk of 2048 or 1024 numbers, each with one more and one less
SIZES = [0, 1, 3, 4, 5, 1023, 1024, 1025, 2047, 2048, 2049, 7000]
FORMS = [dict(momentum=0.0), {}, dict(nesterov=True), dict(heavy_ball=True), dict(dampening=0.3, maximize=True)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("real", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_steps_of_every_size_and_alignment(form, real, offset):
    params, grads, buffers = (tensors(SIZES, real, offset) for _ in range(3))
    exact = [[t.double() for t in group] for group in (params, grads, buffers)]
    options = step(params, grads, buffers if form.get("momentum", 1) else [], **form)
    wanted = reference.momentum_step_(*exact, **options)
    near = dict(rtol=1e-6, atol=1e-6) if real == torch.float32 else dict(rtol=1e-14, atol=1e-14)
    for j in range(len(SIZES)):
        torch.testing.assert_close(params[j].double(), exact[0][j], **near)
        if wanted[j] is not None:
            torch.testing.assert_close(buffers[j].double(), wanted[j], **near)


def test_more_tensors_than_one_launch_holds():
    sizes = [j % 7 for j in range(2003)]
    params, grads, buffers = (tensors(sizes) for _ in range(3))
    exact = [[t.double() for t in group] for group in (params, grads, buffers)]
    reference.momentum_step_(*exact, **step(params, grads, buffers))
    torch.testing.assert_close(torch.cat(params).double(), torch.cat(exact[0]), rtol=1e-6, atol=1e-6)


def test_numbers_in_device_memory():
    """lr, grad_scale and found_inf are read by the kernel; unscaled gradients are written back, as torch's fused SGD does."""
    for lr in (torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)):
        params, grads, buffers = (tensors([5, 2050]) for _ in range(3))
        exact = [[t.double() for t in group] for group in (params, grads, buffers)]
        scale = torch.tensor(8.0)
        for g in exact[1]:
            g /= 8
        options = step(params, grads, buffers, lr, scale, torch.tensor(0.0), lr=-1.0)
        reference.momentum_step_(*exact, **(options | {"lr": 0.3}))
        for ours, wanted in zip((params, grads, buffers), exact):
            torch.testing.assert_close(torch.cat(ours).double(), torch.cat(wanted), rtol=1e-6, atol=1e-6)
        before = [torch.cat(group) for group in (params, grads, buffers)]
        step(params, grads, buffers, lr, scale, torch.tensor(1.0))
        assert all(torch.equal(torch.cat(group), b) for group, b in zip((params, grads, buffers), before))


def test_groups_of_one_plan():
    """More groups than a launch holds, of both dtypes, through StepPlan."""
    torch.manual_seed(2)
    params = [torch.nn.Parameter(torch.randn(j + 1, dtype=(torch.float32, torch.float64)[j % 2])) for j in range(40)]
    copies = [torch.nn.Parameter(p.detach().double()) for p in params]
    ours = ab.ABSGD([dict(params=[p], lr=0.01 * (j + 1), weight_decay=0.1 * j) for j, p in enumerate(params)])
    theirs = torch.optim.SGD(
        [dict(params=[p], lr=0.01 * (j + 1), weight_decay=0.1 * j) for j, p in enumerate(copies)], momentum=0.9
    )
    for _ in range(3):
        for p, q in zip(params, copies):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.double()
        ours.step()
        theirs.step()
    for p, q in zip(params, copies):
        torch.testing.assert_close(p.double(), q, rtol=2e-6, atol=2e-6)


def test_memory_shared_by_two_parameters():
    """Updated one after the other, as without a kernel."""
    memory = torch.ones(8)
    params = [torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[2:])]
    optimizer = ab.ABSGD(params, lr=0.1, momentum=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(memory, torch.tensor([0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.9, 0.9]))


def test_scaling_a_gradient():
    assert set(DTYPES) == {"fp32", "fp64", "bf16", "fp16"}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        grad = torch.randn(3, 4100).to(dtype)
        upstream = torch.tensor(0.5, dtype=reference.real_dtype(dtype))
        assert torch.equal(torch.ops.absgd_fast.scale(grad, upstream, False), grad * 0.5)
        rows = torch.rand(3, dtype=upstream.dtype)
        wanted = (grad.to(rows.dtype) * rows[:, None]).to(dtype)
        torch.ops.absgd_fast.scale_(grad, rows)
        assert torch.equal(grad, wanted)
        torch.ops.absgd_fast.scale_(grad, torch.ones_like(upstream))
        assert torch.equal(grad, wanted)
    made = torch.randn(7)
    assert torch.equal(torch.ops.absgd_fast.scale(made, torch.tensor(2.0), True), (made * 2).half())
