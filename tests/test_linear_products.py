"""The products of a bfloat16 head on a CPU without instructions for bfloat16, which are computed in float32."""

import pytest
import torch
from test_linear import RULES, N, assert_close, compare, gradients, inputs, native, pair

import absgd_fast as ab
from absgd_fast.linear import products

pytestmark = [native, pytest.mark.usefixtures("one_thread", "without_bfloat16")]
ROUNDED = 3e-3  # a result that is rounded to bfloat16 once differs by 1.7e-3 on average, hidden's gradient is rounded twice
BOTH_ROUNDED = 5e-3  # compared with gradients that are rounded too


@pytest.fixture
def without_bfloat16(monkeypatch):
    """Whatever this machine has; 100 classes in blocks of 30, the last is short."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(products, "BLOCK", 30)


def exact_logits(hidden, weight, bias):
    """The logits of the bfloat16 inputs in float32, differentiable."""
    return torch.nn.functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


def in_float64(*given):
    """The same values as leaves in float64."""
    return [None if t is None else t.detach().double().requires_grad_() for t in given]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rule", [name for name in RULES if name != "large"])
def test_rules(rule, bias):
    one, two = pair(ab.CrossEntropy(), torch.bfloat16, **RULES[rule])
    for step in range(3):
        *given, target = inputs(dtype=torch.bfloat16, bias=bias, seed=step)
        compare(one, two, given, target, BOTH_ROUNDED, logits=exact_logits)


@pytest.mark.parametrize("chunk", [1, 7, 40, 150, None])
@pytest.mark.parametrize("classes", [1, 2, 10, 61, 100])
def test_against_float64(classes, chunk):
    """Losses and weights are as exact as in float32; the gradients are rounded to bfloat16 at their end."""
    *given, target = inputs(classes, torch.bfloat16)
    exact = in_float64(*given)
    one, two = ab.LinearABLoss(lam=0.5, chunk=chunk), ab.LinearABLoss(lam=0.5, backend="reference").double()
    loss, wanted = one(*given[:2], target, given[2]), two(*exact[:2], target, exact[2])
    assert_close([loss, one.last.losses, one.last.weights], [wanted, two.last.losses, two.last.weights], 3e-6)
    assert_close(gradients(loss, given), gradients(wanted, exact), ROUNDED)
    assert loss.dtype == torch.float32 and one.last.losses.dtype == torch.float32


def test_it_is_more_exact_than_products_of_bfloat16(monkeypatch):
    *given, target = inputs(dtype=torch.bfloat16)
    exact, errors = in_float64(*given), []
    wanted = gradients(ab.LinearABLoss(lam=0.5, backend="reference").double()(*exact[:2], target, exact[2]), exact)
    for has in (False, True):
        monkeypatch.setattr(products, "multiplies_bfloat16", lambda has=has: has)
        got = gradients(ab.LinearABLoss(lam=0.5, chunk=40)(*given[:2], target, given[2]), given)
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)])
    assert all(a < b for a, b in zip(*errors, strict=True))


@pytest.mark.parametrize(
    "options", [dict(lam=ab.TargetESS(0.3)), dict(lam=ab.RelativeLam(0.3))], ids=["TargetESS", "RelativeLam"]
)
def test_lambda_by_itself(options):
    one, two = ab.LinearABLoss(chunk=40, **options), ab.ABLoss(**options)
    *given, target = inputs(dtype=torch.bfloat16)
    compare(one, two, given, target, BOTH_ROUNDED, logits=exact_logits)
    torch.testing.assert_close(one.lam, two.lam, rtol=1e-4, atol=0)


def test_deferred():
    """Micro-batches of chunks; torch adds their gradients up in bfloat16."""
    one, two = ab.LinearABLoss(lam=0.5, deferred=True, chunk=40), ab.ABLoss(lam=0.5)
    hidden, weight, bias, target = inputs(dtype=torch.bfloat16)
    for part in (slice(0, 90), slice(90, 150)):
        one(hidden[part], weight, target[part], bias).backward()
    assert one.finish_([hidden, weight, bias])
    wanted = gradients(two(exact_logits(hidden, weight, bias), target), (hidden, weight, bias))
    assert_close([t.grad for t in (hidden, weight, bias)], wanted, 2 * BOTH_ROUNDED)


def test_under_autocast():
    """Leaves in float32, whose gradients are those of the rounded values."""
    *given, target = inputs(dtype=torch.float32)
    rounded = in_float64(*(t.bfloat16() for t in given))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ab.LinearABLoss(lam=0.5, chunk=40)(*given[:2], target, given[2])
    got = gradients(loss, given)
    wanted = gradients(ab.LinearABLoss(lam=0.5, backend="reference").double()(*rounded[:2], target, rounded[2]), rounded)
    assert [g.dtype for g in got] == [torch.float32] * 3
    assert_close(got, wanted, ROUNDED)


def test_strides():
    """A weight with the strides of its transpose, and hidden states of which every other is used."""
    hidden, weight, bias, target = inputs(dtype=torch.bfloat16)
    wanted = gradients(ab.LinearABLoss(lam=0.5, chunk=40)(hidden, weight, target, bias), (hidden, weight, bias))
    turned = weight.detach().t().contiguous().t().requires_grad_()
    wide = hidden.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()
    got = gradients(ab.LinearABLoss(lam=0.5, chunk=40)(wide, turned, target, bias), (wide, turned, bias))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen(frozen):
    one, two = pair(ab.CrossEntropy(), torch.bfloat16, lam=0.5)
    *given, target = inputs(dtype=torch.bfloat16)
    given[("hidden", "weight").index(frozen)].requires_grad_(False)
    compare(one, two, given, target, BOTH_ROUNDED, logits=exact_logits)


def test_soft_targets_that_require_grad():
    *given, _ = inputs(10, torch.bfloat16)
    soft = torch.rand(N, 10, generator=torch.Generator().manual_seed(1)).softmax(1)
    exact, of_soft = in_float64(*given), [soft.clone().requires_grad_(), soft.double().requires_grad_()]
    loss = ab.LinearABLoss(lam=0.5, chunk=40)(*given[:2], of_soft[0], given[2])
    wanted = ab.LinearABLoss(lam=0.5, backend="reference").double()(*exact[:2], of_soft[1], exact[2])
    assert_close(gradients(loss, [*given, of_soft[0]]), gradients(wanted, [*exact, of_soft[1]]), ROUNDED)


def test_nothing_to_do():
    *given, target = inputs(dtype=torch.bfloat16, n=0)
    loss = ab.LinearABLoss(lam=0.5)(*given[:2], target, given[2])
    assert loss == 0 and not any(g.any() for g in gradients(loss, given))


def test_memory(monkeypatch):
    """No tensor is larger than the sum of the weight's gradient, and none but that one is larger than a chunk of logits."""
    monkeypatch.setattr(products, "BLOCK", 100)
    n, width, classes, chunk = 1024, 64, 1000, 32
    hidden, weight = (torch.randn(k, width).bfloat16().requires_grad_() for k in (n, classes))
    with torch.profiler.profile(profile_memory=True) as seen:
        loss = ab.LinearABLoss(lam=0.5, chunk=chunk)(hidden, weight, torch.arange(n) % classes)
    sizes = sorted((e.cpu_memory_usage for e in seen.events() if e.name in ("aten::empty", "aten::zeros")), reverse=True)
    assert sizes[0] == 4 * classes * width and max(s for s in sizes if s != sizes[0]) <= 4 * classes * chunk
    assert loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_other_dtypes_keep_theirs(dtype):
    hidden, weight, bias, _ = inputs(dtype=dtype)
    assert isinstance(products.products(hidden, weight, bias), products.Given)


@pytest.mark.usefixtures("without_bfloat16")
def test_other_devices_keep_theirs():
    some = torch.empty(4, 4, dtype=torch.bfloat16, device="meta")
    assert isinstance(products.products(some, some, None), products.Given)


@pytest.mark.parametrize(
    "has, wanted",
    [({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"bf16": True}, True), ({}, False)],
    ids=["AVX-512", "AVX512_BF16", "AMX", "Arm", "none"],
)
def test_what_the_processor_can_do(monkeypatch, has, wanted):
    monkeypatch.undo()
    ask = products.multiplies_bfloat16.__wrapped__
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert ask() is wanted
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert ask() is False


def test_an_older_torch(monkeypatch):
    monkeypatch.undo()
    ask = products.multiplies_bfloat16.__wrapped__
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert ask() is False
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert ask() is True
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert ask() is False
