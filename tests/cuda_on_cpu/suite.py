"""What only the CUDA operators have to prove: several blocks, other alignments, numbers in device memory, reports of labels.

Collected by test_cuda.py in a process of its own, where these operators serve tensors on the CPU.
"""

import math

import oracle
import pytest
import target_cases
import torch
from conftest import DTYPES, LOSSES
from plugin import simt

import absgd_fast as ab
from absgd_fast import ops, reference
from absgd_fast._codes import AMSGRAD, CENTERED, DECOUPLED, HEAVY_BALL, MAXIMIZE, NESTEROV, PAPER_FORM
from absgd_fast.functional import logit_loss, robust_weights, weighted_momentum_step_

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


@pytest.mark.covering(1)
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


@pytest.mark.parametrize("count", [0, 1, 257, ONE_LAUNCH + 1])
@pytest.mark.parametrize("bounded", [False, True])
def test_stages_of_every_length(count, bounded):
    """Totals of a part, log s' of several parts, and weights by it; a NaN, and a z beyond the bound."""
    operators, lam, log_s, bad = ops.OPERATORS["cpu"], torch.tensor(0.5), torch.tensor(0.4), torch.tensor(0)
    losses, mask, score, t = torch.randn(count), torch.rand(count) > 0.3, torch.randn(count), torch.rand(count)
    if count > 200:
        losses[100], score[150], mask[100], mask[150] = math.nan, 40.0, True, True  # z = 80
    bound = torch.tensor([4.0, 1.0, 64.0, 0.0, 1.0, 0.0], dtype=torch.float64) if bounded else None
    own = operators.robust_partial_stats(losses, score, mask, log_s, lam, bound)
    wanted = reference.partial_stats(losses.double(), log_s, lam, score=score, mask=mask, z_max=64.0 if bounded else None)
    torch.testing.assert_close(own, wanted, rtol=1e-6, atol=1e-6)
    assert own[2] == (0 if count < 200 else 1 + bounded)
    rows = torch.stack([own, torch.tensor([1.0, 7.0, 0.0]).double()])
    for update in (0, ops.UPDATE):
        before, counted = log_s.clone(), int(bad)
        settled = operators.robust_settle(rows, log_s, bad, lam, bound, 0.9, 0.8, 3.0, ops.INIT_FIRST | update)
        exact, state = reference.settle(rows, before, lam, gamma=0.9, alpha=0.8, grad_multiplier=3.0, reference=bound)
        torch.testing.assert_close(settled, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(log_s, state if update else before)
        assert bad == counted + (update > 0 and count > 200)
    given = (losses, score, t, mask, settled, log_s, lam, bounded, 0.5, 2.0, ops.WITH_GRAD)
    for got, exact in zip(operators.robust_apply(*given), ops.REFERENCE.robust_apply(*given)):
        torch.testing.assert_close(got, exact, rtol=2e-6, atol=1e-5 if got.dim() == 0 else 1e-6, equal_nan=True)


# ---- a target for the effective sample size ---------------------------------------------------------------------------

ONE_BLOCK = 2048  # csrc/launch.h kOneBlock


def state(dtype):
    return torch.tensor(target_cases.STATE, dtype=dtype), torch.tensor(0), torch.tensor(5.0, dtype=dtype)


def target_flags(update):
    return ops.flags("target", "first") | (ops.UPDATE if update else 0)


# nothing, one loss, one thread with more than one loss (257), one block, two and more blocks
@pytest.mark.covering(2)
@pytest.mark.parametrize("count", [0, 1, 2, 257, ONE_BLOCK, ONE_BLOCK + 1, 5000])
@pytest.mark.parametrize("batch", target_cases.BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("inputs", [False, True], ids=["plain", "inputs"])
def test_target_of_losses(batch, count, dtype, inputs):
    values = target_cases.BATCHES[batch](count).to(dtype) if count else torch.zeros(0, dtype=dtype)
    given = dict(score=values + values.roll(1), sample_weight=torch.rand(count, dtype=dtype), mask=torch.rand(count) > 0.3)
    given = given if inputs else dict.fromkeys(given)
    for k, share in enumerate(target_cases.SHARES):
        log_s, nonfinite, lam = state(dtype)
        arguments = values, *given.values(), log_s, nonfinite, lam, share, 1.0, 0.5 * inputs, INF
        loss, rows, grad = torch.ops.absgd_fast.robust_loss(*arguments, target_flags(k % 2 == 0) | ops.WITH_GRAD)
        results = loss, rows[1], grad, log_s, nonfinite, lam
        target_cases.check(values, share, *results, mix=0.5 * inputs, update=k % 2 == 0, **given)


# in registers of one block, if the limit of this run allows it; by lanes; a block for each row; columns; more tiles than blocks
@pytest.mark.parametrize("shape", [(1, 3), (40, 10), (300, 37), (7, 1100), (3, 5, 500), (ONE_BLOCK + 40, 3)], ids=str)
@pytest.mark.parametrize("max_weight", [INF, 1.25])
def test_target_of_logits(shape, max_weight, dtype):
    """Losses, weights, the gradient, and the state, with ignored rows and a bad one."""
    logits, real = torch.randn(shape, dtype=torch.float64).mul(3).to(dtype).requires_grad_(), reference.real_dtype(dtype)
    rows = shape[:1] + shape[2:]
    target = torch.randint(shape[1], rows)
    target.view(-1)[1::5] = -100
    valid, t = target != -100, torch.rand(rows, dtype=real) + 0.5
    for share, bad, update in ((0.7, False, True), (-0.4, False, False), (0.7, True, True)):
        if bad:
            with torch.no_grad():
                logits.movedim(1, -1)[(-1,) * len(rows)] = math.nan
            target.view(-1)[-1] = 0
            valid = target != -100
        operators = ops.OPERATORS["cpu"]
        mode = operators.backward_mode(logits)
        weighing = operators.weighing(logits, mode)
        log_s, nonfinite, lam = state(real)
        given = logits.detach(), target, None, None, 0.0, 0.0, -100, None, t, None, log_s, nonfinite, lam, share, 1.0, 0.0
        loss, seen, saved = operators.robust_logit_loss(*given, max_weight, target_flags(update) | mode, weighing)
        weights = ops.weights_of(seen, weighing)
        if max_weight == INF:
            results = loss, weights, None, log_s, nonfinite, lam
            target_cases.check(seen[0], share, *results, mask=valid, sample_weight=t, update=update)
        factor = torch.where(valid, weights * t, 0) / (valid & ~weights.isnan()).sum()
        assert weights.nan_to_num().max() <= max_weight
        if not bad:
            torch.testing.assert_close(loss, (factor * seen[0]).sum(), rtol=2e-5, atol=1e-6)
        grad = saved
        if mode == ops.WITH_STATS:
            grad = operators.logit_loss_backward(
                logits.detach(), target, None, None, 0.0, saved, torch.ones_like(loss), seen, weighing
            )
        wide = logits.detach().double().requires_grad_()
        exact = torch.autograd.grad((reference.logit_loss(wide, target) * factor.nan_to_num().double()).sum(), wide)[0]
        ok = torch.where(valid, ~weights.isnan(), True).unsqueeze(1).expand(shape)
        near = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
        torch.testing.assert_close(grad.double()[ok], exact[ok], rtol=near, atol=near / len(valid.view(-1)))


# up to 256, a block of as many threads; beyond, one of 512, here with two products for some
@pytest.mark.parametrize("count", [0, 3, 257, 700])
def test_rectified_weights(count):
    for dtype in (torch.float32, torch.float64):
        products = torch.randn(count, dtype=dtype)
        products[1:2], products[-2:-1] = INF, math.nan
        weights = ops.OPERATORS["cpu"].rectified(products)
        wanted = torch.from_numpy(oracle.rectified(products))
        torch.testing.assert_close(weights.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


# a row on lanes, in a block, in a block with more of it than shared memory keeps, with its classes apart, more of them than
# blocks that run at once
MADE = {
    "lanes": ((70, 37), None),
    "block": ((5, 4101), None),
    "long": ((2, 30_000), None),
    "apart": ((9, 40), 0),
    "images": ((3, 6, 35), None),
    "many": ((700, 600), None),
}


@pytest.mark.parametrize("case", MADE)
def test_gradients_made_on_the_chip(case, dtype):
    """Each row's own gradient over its logits, and the weighed one of a micro-batch whose reference point is known."""
    (shape, first), real = MADE[case], reference.real_dtype(dtype)
    draw = torch.randn(shape, dtype=torch.float64).mul(3).to(dtype)
    logits = draw if first is None else draw.transpose(0, 1).contiguous().transpose(0, 1)
    rows = shape[:1] + shape[2:]
    target = torch.randint(shape[1], rows)
    target.view(-1)[1] = -100
    logits.movedim(1, -1)[target == -100] = math.nan
    wide = logits.double().requires_grad_()
    exact = reference.logit_loss(wide, target)
    near = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    score, t, mask = torch.randn(rows, dtype=real), torch.rand(rows, dtype=real), torch.rand(rows) > 0.2
    settled = torch.tensor([0.4, 1.0, 60.4, 0.0, 1.0, 0.0], dtype=torch.float64)
    lam, log_s = torch.tensor(0.5, dtype=real), torch.tensor(0.1, dtype=real)
    given = (logits, target, None, None, 0.0, 0.0, -100, score, t, mask, settled, log_s, lam, 0)
    loss, seen, made, totals = torch.ops.absgd_fast.settled_logit_loss(*given)
    weights = torch.where((target != -100) & mask, (score.double() / 0.5 - 0.4).exp(), 0)
    wanted = torch.autograd.grad((weights * t * exact.where(weights > 0, 0)).sum(), wide, retain_graph=True)[0]
    torch.testing.assert_close(seen[1].double(), weights, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), (weights * t * exact.where(weights > 0, 0)).sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        totals, reference.partial_stats(exact.detach(), log_s, lam, score=score, mask=weights > 0), rtol=1e-5, atol=1e-6
    )
    assert made.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    torch.testing.assert_close(made.double().nan_to_num(9), wanted.nan_to_num(0), rtol=2 * near, atol=2 * near)
    if logits.is_contiguous() and logits.dim() == 2 and dtype != torch.float16:
        slopes = torch.autograd.grad(exact.sum(), wide)[0].nan_to_num(0)
        losses, valid = torch.ops.absgd_fast.logit_loss_(logits, target, None, None, 0.0, 0.0, -100, 0)
        torch.testing.assert_close(losses.double(), exact.detach(), rtol=3e-6, atol=1e-6)
        assert torch.equal(valid > 0, target != -100)
        torch.testing.assert_close(logits.double(), slopes, rtol=2 * near, atol=2 * near)


def test_the_last_block_combines_sums_only():
    """At 16384 rows the longest thread of the last block makes so many accesses to memory more than that of any other block. It
    made 1442 where the last block weighed all losses (commit caf1499). A sixteenth is allowed; it made 66."""
    if not hasattr(simt.library, "simt_longest"):
        pytest.skip("accesses are counted by the race checker's build")
    criterion = ab.ABLoss(lam=0.7)
    simt.configure("forward")
    criterion(torch.randn(ONE_LAUNCH, 10, requires_grad=True), torch.randint(10, (ONE_LAUNCH,)))
    last, before = simt.longest
    print(f"accesses of the longest thread: {last} in the last block, {before} in the others")
    assert 0 < last - before <= 1442 / 16


def test_the_two_ways_to_the_gradient_agree():
    """One block that makes it at once, and statistics from which backward makes it."""
    operators = ops.OPERATORS["cuda"]
    before = operators.gradient_limit
    grads = []
    try:
        for limit in (0, ops.ONE_BLOCK):
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

REAL_NEAR = {torch.float32: dict(rtol=1e-6, atol=1e-6), torch.float64: dict(rtol=1e-14, atol=1e-14)}
# a rounding to 8 or 11 bits besides
NEAR = REAL_NEAR | {torch.bfloat16: dict(rtol=2**-8, atol=1e-6), torch.float16: dict(rtol=2**-10, atol=1e-6)}


class Form:
    """One form of a rule: the numbers step_ is given, the first values of the states it keeps, and reference/'s step."""

    def __init__(self, rule, first, second=0.0, flags=0, eps=1e-3, weight_decay=0.01, lr=0.125):
        self.rule, self.first, self.second, self.flags, self.eps = rule, first, second, flags, eps
        self.weight_decay, self.lr = weight_decay, lr
        # square >= 1 >= 4 mean^2: nothing cancels in square - mean^2
        any_sign = torch.randn

        def square(n, dtype):
            return 1 + torch.rand(n, dtype=dtype)

        def mean(n, dtype):
            return torch.rand(n, dtype=dtype) / 2

        self.states = {
            "sgd": [any_sign] * (first != 0),
            "adam": [any_sign, square] + [square] * bool(flags & AMSGRAD),
            "rmsprop": [square] + [any_sign] * (second != 0) + [mean] * bool(flags & CENTERED),
            "adagrad": [square],
        }[rule]
        self.counts = rule != "sgd"

    def __call__(self, params, grads, states, steps, lr_tensor=None, grad_scale=None, found_inf=None):
        torch.ops.absgd_fast.step_(
            params,
            grads,
            [t for kind in states for t in kind],
            steps,
            lr_tensor,
            grad_scale,
            found_inf,
            None,
            self.lr if lr_tensor is None else -1.0,
            self.weight_decay,
            self.first,
            self.second,
            self.eps,
            ops.RULES.index(self.rule),
            self.flags,
        )

    def exact(self, params, grads, states, steps):
        flags, absent = self.flags, [None] * len(params)
        options = dict(lr=self.lr, weight_decay=self.weight_decay, maximize=bool(flags & MAXIMIZE))
        states = list(states)
        if self.rule == "sgd":
            options |= dict(momentum=self.first, dampening=self.second, nesterov=bool(flags & NESTEROV))
            options |= dict(heavy_ball=bool(flags & HEAVY_BALL))
            reference.momentum_step_(params, grads, states[0] if states else absent, **options)
        elif self.rule == "adam":
            options |= dict(betas=(self.first, self.second), eps=self.eps, paper_form=bool(flags & PAPER_FORM))
            options |= dict(decoupled_weight_decay=bool(flags & DECOUPLED))
            reference.adam_step_(params, grads, *states, *[absent] * (3 - len(states)), steps, **options)
        elif self.rule == "rmsprop":
            buffers = states.pop(1) if self.second else absent
            means = states.pop(1) if flags & CENTERED else absent
            options |= dict(alpha=self.first, momentum=self.second, eps=self.eps)
            reference.rmsprop_step_(params, grads, *states, buffers, means, steps, **options)
        else:
            reference.adagrad_step_(params, grads, *states, steps, lr_decay=self.first, eps=self.eps, **options)

    def tensors(self, sizes, dtype=torch.float32, offsets=(0, 0, 0)):
        """Parameters, gradients, states and counts of steps of both types. offsets: of the first three, in elements."""

        def make(draw, offset, dtype):
            return [draw(n + offset, dtype=dtype)[offset:] for n in sizes]

        params, grads = (make(torch.randn, offset, dtype) for offset in offsets[:2])
        states = [make(draw, offsets[2], reference.real_dtype(dtype)) for draw in self.states]
        kinds = (torch.float32, torch.float64)
        return params, grads, states, [torch.tensor(j % 5, dtype=kinds[j % 2]) for j in range(len(sizes))] if self.counts else []


FORMS = {
    "sgd": Form("sgd", 0.0),
    "momentum": Form("sgd", 0.9, 0.3, MAXIMIZE),
    "nesterov": Form("sgd", 0.9, 0.0, NESTEROV, weight_decay=0.0),
    "heavy ball": Form("sgd", 0.9, 0.0, HEAVY_BALL),
    "adam": Form("adam", 0.9, 0.999),
    "adam, betas 0": Form("adam", 0.0, 0.0, eps=0.1, weight_decay=0.0),
    "amsgrad": Form("adam", 0.9, 0.99, AMSGRAD | MAXIMIZE),
    "adamw": Form("adam", 0.9, 0.999, DECOUPLED),
    "adamw, amsgrad": Form("adam", 0.8, 0.99, DECOUPLED | AMSGRAD | MAXIMIZE),
    "paper's adam": Form("adam", 0.9, 0.999, DECOUPLED | PAPER_FORM),
    "rmsprop": Form("rmsprop", 0.99),
    "rmsprop, momentum": Form("rmsprop", 0.99, 0.9, MAXIMIZE),
    "centered": Form("rmsprop", 0.99, 0.0, CENTERED),
    "centered, momentum": Form("rmsprop", 0.9, 0.9, CENTERED, weight_decay=0.0),
    "adagrad": Form("adagrad", 0.0),
    "adagrad, lr_decay": Form("adagrad", 0.1, 0.0, MAXIMIZE, weight_decay=0.0),
}
ONE_OF_EACH = ["sgd", "momentum", "amsgrad", "centered, momentum", "adagrad, lr_decay"]  # 0 to 3 states, with and without counts


def map_tensors(f, tensors):
    return [map_tensors(f, t) if isinstance(t, (list, tuple)) else f(t) for t in tensors]


def flat(tensors):
    return [t for part in tensors for t in (flat(part) if isinstance(part, (list, tuple)) else [part])]


def copies(tensors):
    return map_tensors(torch.clone, tensors)


def in_double(tensors):
    return map_tensors(lambda t: t.to(torch.float64, copy=True), tensors)


def assert_near(ours, exact):
    for tensors, wanted in zip(ours, exact):
        for t, w in zip(flat(tensors), flat(wanted)):
            torch.testing.assert_close(t.double(), w, **NEAR[t.dtype])


def assert_same(ours, wanted):
    assert all(torch.equal(t, w) for t, w in zip(flat(ours), flat(wanted)))


# one 16-byte access (2, 4 or 8 numbers) and what a block takes (1024 or 2048), each with one more and one less
SIZES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 1023, 1024, 1025, 2047, 2048, 2049, 5000, 0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("offsets", [(0, 0, 0), (1, 1, 1), (0, 0, 1), (0, 1, 0)], ids=str)
def test_steps_of_every_size_and_alignment(form, dtype, offsets):
    form = FORMS[form]
    ours = form.tensors(SIZES, dtype, offsets)
    gradients = copies(ours[1])
    for _ in range(2):
        exact = in_double(ours)
        form(*ours)
        form.exact(*exact)
        assert_near(ours, exact)
    assert_same(ours[1], gradients)
    assert [t.item() for t in ours[3]] == [j % 5 + 2 for j in range(len(ours[3]))]


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_more_tensors_than_one_launch_holds(form):
    """959 to 546 with their states; 3600 counts."""
    form = FORMS[form]
    ours = form.tensors([j % 7 for j in range(3701 if form.counts else 2003)])
    exact = in_double(ours)
    form(*ours)
    form.exact(*exact)
    for tensors, wanted in zip(ours, exact):
        if tensors:
            near = dict(rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(
                torch.cat([t.view(-1).double() for t in flat(tensors)]), torch.cat([t.view(-1) for t in flat(wanted)]), **near
            )


# At and above the limits of the sizes. A tensor takes 33 to 58 bytes of its table and 9 of that of the counts, and 16 groups and
# the rest of a table less than 3000.
@pytest.mark.parametrize("form", ["momentum", "adam", "amsgrad"])
@pytest.mark.parametrize("tensors, room", [(128, 128), (161, 256), (256, 256), (300, 512), (512, 512), (1000, None)])
def test_a_step_travels_in_the_smallest_table(form, tensors, room, dtype):
    counts, bytes_each = FORMS[form].counts, {"momentum": 33, "adam": 50, "amsgrad": 58}[form]
    largest = {"momentum": 959, "adam": 633, "amsgrad": 546}[form]
    if room is not None and ((room > 128 and dtype in (torch.float16, torch.float64)) or (room > 256 and form != "momentum")):
        room = largest
    simt.clear()
    ours = FORMS[form].tensors([1 + j % 5 for j in range(tensors)], dtype)
    exact = in_double(ours)
    FORMS[form](*ours)
    FORMS[form].exact(*exact)
    assert_near(ours, exact)
    launches = -(-tensors // (room or largest))
    assert simt.launches == launches + counts
    table = launches * (room or largest) * bytes_each
    count = 9 * next(size for size in (128, 256, 512, 1024, 3600) if tensors <= size) if counts else 0
    assert 0 <= simt.parameter_bytes - table - count < launches * 3000


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_numbers_in_device_memory(form, dtype):
    """lr, grad_scale and found_inf are read by the kernel; unscaled gradients are written back, as torch's fused steps do."""
    form = FORMS[form]
    for lr in (torch.tensor(form.lr), torch.tensor(form.lr, dtype=torch.float64)):
        for scale in (torch.tensor(8.0), torch.tensor(3.0)):
            ours = form.tensors([5, 0, 2051], dtype, (0, 0, 0))
            exact = in_double(ours)
            for g in exact[1]:
                g /= scale.double()
            gradients = map_tensors(lambda g: g.to(reference.real_dtype(dtype)).to(dtype), exact[1])
            form(*ours, lr, scale, torch.tensor(0.0))
            form.exact(*exact)
            assert_near(ours, exact)
            assert_same(ours[1], gradients)


@pytest.mark.parametrize("form", FORMS)
def test_a_skipped_step_never_was(form, dtype):
    """The first and a later one; the step after it counts as if it had not been."""
    form = FORMS[form]
    ours = form.tensors([5, 0, 2051], dtype)
    for t in flat(ours[2:]):
        t.zero_()
    expected = copies(ours)
    for _ in range(2):
        form(*ours, None, torch.tensor(8.0), torch.tensor(1.0))
        assert_same(ours, expected)
        form(*ours, None, None, torch.tensor(0.0))
        form(*expected)
        assert_same(ours, expected)
    assert all(t == 2 for t in ours[3])


def test_empty_tensors_take_steps():
    form = FORMS["adam"]
    ours = form.tensors([0, 0])
    form(*ours)
    assert [t.item() for t in ours[3]] == [1, 2]


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_a_tensor_listed_twice_takes_two_steps(form):
    form = FORMS[form]
    params, grads, states, steps = form.tensors([3000])
    ours = params * 2, grads * 2, [kind * 2 for kind in states], steps * 2
    exact = in_double((params, grads, states, steps))
    form(*ours)
    form.exact(*exact)
    form.exact(*exact)
    assert_near((params, grads, states, steps), exact)


def test_a_count_of_two_tensors_counts_twice():
    form = FORMS["adamw"]
    params, grads, states, steps = form.tensors([5, 3000])
    ours = params, grads, states, steps[:1] * 2
    exact = in_double((params, grads, states, steps))
    exact[3][1] = exact[3][0]
    form(*ours)
    form.exact(*exact)
    assert_near(ours, exact)


def sgd_group(j):
    return dict(lr=0.01 * (j + 1), weight_decay=0.1 * j, nesterov=j % 3 == 0)


def adam_group(j):
    return dict(lr=0.001 * (j + 1), betas=(0.9 - 0.01 * j, 0.99), amsgrad=j % 3 == 0)


def rmsprop_group(j):
    return dict(lr=0.001 * (j + 1), momentum=0.1 * (j % 2), centered=j % 3 == 0)


@pytest.mark.parametrize(
    "name, options, group",
    [
        ("SGD", dict(momentum=0.9), sgd_group),
        ("AdamW", {}, adam_group),
        ("RMSprop", {}, rmsprop_group),
        ("Adagrad", {}, sgd_group),
    ],
    ids=["sgd", "adamw", "rmsprop", "adagrad"],
)
def test_groups_of_one_plan(name, options, group):
    """More groups than a launch holds, of several kernels in turns, through StepPlan."""
    kinds = (torch.float32, torch.float64, torch.bfloat16)
    params = [torch.nn.Parameter(torch.randn(j + 1).to(kinds[j % 2 if j < 40 else 2])) for j in range(42)]
    copied = [torch.nn.Parameter(p.detach().double()) for p in params]
    options = options | (dict(eps=1e-3) if name != "SGD" else {})

    def groups(params):
        some = [dict(params=[p], **group(j)) for j, p in enumerate(params)]
        return [{k: v for k, v in g.items() if k != "nesterov" or name == "SGD"} for g in some]

    ours = getattr(ab, f"AB{name}")(groups(params), **options)
    theirs = getattr(torch.optim, name)(groups(copied), **options)
    for _ in range(3):
        for p, q in zip(params, copied):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.double()
        ours.step()
        theirs.step()
        for p, q in zip(params, copied):
            torch.testing.assert_close(p.double(), q, rtol=NEAR[p.dtype]["rtol"], atol=2e-6 if p.dtype == torch.float32 else 1e-6)
            q.data.copy_(p)  # a rounding of this step is not the next one's
    if name != "SGD":
        assert all(state["step"] == 3 for state in ours.state.values())


def test_memory_shared_by_two_parameters():
    """Updated one after the other, as without a kernel."""
    memory = torch.ones(8)
    params = [torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[2:])]
    optimizer = ab.ABSGD(params, lr=0.1, momentum=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(memory, torch.tensor([0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.9, 0.9]))


# ---- weighted step --------------------------------------------------------------------------------------------------


def check_weighted_step(params, buffers, grads, losses, log_s=-INF, **options):
    """Two steps against plain torch in float64, each from where the last one ended; the last log s."""
    options = dict(lam=-0.7, lr=0.125, weight_decay=0.1) | options
    for _ in range(2):
        exact = in_double([params, buffers, grads, [losses]])
        exact_options = {k: v.double() if k == "sample_weight" and v is not None else v for k, v in options.items()}
        wanted = weighted_momentum_step_(*exact[:3], exact[3][0], log_s, **exact_options, backend="reference")
        log_s = weighted_momentum_step_(params, buffers, grads, losses, log_s, **options)
        torch.testing.assert_close(log_s.double(), wanted.double(), **REAL_NEAR[log_s.dtype])
        assert_near([params, buffers], exact[:2])
    return log_s


# one 16-byte access of 2, 4 or 8 numbers, and what a block takes (8 teams of 32 threads), each with one more and one less
COLUMNS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 31, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("gap", [0, 1, 16])
def test_weighted_columns_of_every_number_and_alignment(offset, gap, dtype):
    """offset: of parameters and buffers within their memory, in elements; gap: between the rows of a block. 37 rows: 4 teams
    have one row more than 4 at a time, or not."""
    real = reference.real_dtype(dtype)
    params, buffers = ([torch.randn(n + offset).to(d)[offset:] for n in COLUMNS] for d in (dtype, real))
    grads = [torch.randn(37, n + gap).to(dtype)[:, :n] for n in COLUMNS]
    check_weighted_step(params, buffers, grads, torch.rand(37, dtype=real))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 32, 33, 1023, 1024, 1025, 2100])
def test_weighted_rows(rows):
    """Around the rows of a team and of a piece; every fourth row masked or without weight, holding NaN."""
    mask, weight = torch.arange(rows) % 4 != 3, torch.rand(rows)
    weight[::5] = 0
    grads = [torch.randn(rows, n) for n in (8, 5)]
    for g in grads:
        g[~mask | (weight == 0)] = math.nan
    for momentum in (0.9, 0.0):
        params, buffers = ([torch.randn(n) for n in (8, 5)] for _ in range(2))
        check_weighted_step(params, buffers, grads, torch.rand(rows), mask=mask, sample_weight=weight, momentum=momentum)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_more_rows_than_a_block_weighs(dtype):
    """Then the weights take launches of their own."""
    rows = ONE_LAUNCH + 5
    losses, mask = torch.rand(rows, dtype=dtype), torch.rand(rows) < 0.7
    params, buffers, grads = [torch.randn(3, dtype=dtype)], [torch.zeros(3, dtype=dtype)], [torch.randn(rows, 3, dtype=dtype)]
    lam = torch.tensor(-0.75, dtype=dtype)
    log_s = check_weighted_step(params, buffers, grads, losses, mask=mask, lam=lam, mix=0.5)
    losses[mask.nonzero()[-1]] = INF
    before = copies([params, buffers])
    assert torch.equal(weighted_momentum_step_(params, buffers, grads, losses, log_s, mask=mask, lam=-0.75, lr=0.1), log_s)
    assert_same([params, buffers], before)


def test_more_columns_than_teams_share():
    """256 blocks of 1024 columns: there a thread has all of a column's rows."""
    sizes = [1024 * 255 + 3, 1000, 7]
    params, buffers, grads = [torch.randn(n) for n in sizes], [torch.randn(n) for n in sizes], [torch.randn(6, n) for n in sizes]
    check_weighted_step(params, buffers, grads, torch.rand(6))


def test_more_tensors_than_a_weighted_launch_holds():
    """800; of two dtypes, whose launches are apart. lr in device memory."""
    dtypes = [torch.float32 if j < 1700 else torch.bfloat16 for j in range(1900)]
    params = [torch.randn(j % 7).to(d) for j, d in enumerate(dtypes)]
    buffers, grads = [torch.zeros(p.shape) for p in params], [torch.randn(3, *p.shape).to(p.dtype) for p in params]
    log_s = torch.tensor(0.3)
    check_weighted_step(params, buffers, grads, torch.rand(3), log_s, lr=torch.tensor([0.125]), momentum=0.5)
    assert log_s == torch.tensor(0.3)


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
