"""The rectified weights of L2RW (Eq. 8 and 9) on every backend, against the float64 oracle."""

import math

import numpy as np
import oracle
import pytest
import torch
from conftest import DTYPES

from absgd_fast import _backend, meta, ops

INF, NAN = math.inf, math.nan
REAL = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-13}  # reference/ sums 20000 products in their own type
# one register of every instruction set and less; a GPU's block and more; many rounds of both
COUNTS = [0, 1, 3, 17, 1000, 20000]


def rectified(products, backend):
    return ops.OPERATORS[backend].rectified(products)


def products(count, dtype, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("real", REAL, ids=str)
def test_weights_are_the_formula(backend, real, count):
    u = products(count, real)
    before = u.clone()
    w = rectified(u, backend)
    assert w.dtype == real and w.shape == (count,) and torch.equal(u, before)
    np.testing.assert_allclose(w, oracle.rectified(u), rtol=TOLERANCE[real])
    assert not w[u <= 0].any() and (count < 3 or abs(float(w.double().sum()) - 1) < TOLERANCE[real])


@pytest.mark.parametrize("real", REAL, ids=str)
def test_nothing_positive(backend, real):
    """No sample helps: all 0, without a division by 0."""
    for u in (torch.zeros(19), -products(19, real).abs(), torch.full((19,), -0.0), torch.tensor([-INF, -1.0])[1:]):
        assert torch.equal(rectified(u.to(real), backend), torch.zeros(len(u), dtype=real))


@pytest.mark.parametrize("real", REAL, ids=str)
def test_nonfinite(backend, real):
    """Such a u has w = NaN, wherever it stands, and the others are weighed without it."""
    u = products(37, real)
    u[0], u[5], u[20], u[36] = NAN, INF, -INF, NAN
    w = rectified(u, backend)
    np.testing.assert_allclose(w, oracle.rectified(u), rtol=TOLERANCE[real])
    assert w.isnan().nonzero().flatten().tolist() == [0, 5, 20, 36]
    assert rectified(torch.tensor([NAN, INF, -INF], dtype=real), backend).isnan().all()
    w = rectified(torch.tensor([INF, -1.0, 0.0], dtype=real), backend)
    assert w[0].isnan() and w[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("real", REAL, ids=str)
def test_extreme_magnitudes(backend, real):
    """The smallest and the largest numbers there are: their sum neither vanishes nor overflows."""
    info = torch.finfo(real)
    for u in (info.smallest_normal * info.eps, info.smallest_normal, 1.0, 2.0**64, info.max / 2, info.max):
        for count in (1, 3, 17, 1000):
            w = rectified(torch.full((count,), u, dtype=real), backend)
            np.testing.assert_allclose(w, 1 / count, rtol=2 * info.eps, err_msg=f"{count} times {u}")
    mixed = torch.tensor([info.max, info.smallest_normal, -info.max, info.max, 1.0], dtype=real)
    np.testing.assert_allclose(rectified(mixed, backend), [0.5, 0, 0, 0.5, 0], rtol=2 * info.eps, atol=1e-37)
    for scale in (2.0**-120, 2.0**120):
        u = products(100, real) * scale
        np.testing.assert_allclose(rectified(u, backend), oracle.rectified(u), rtol=TOLERANCE[real])


@pytest.mark.parametrize("real", REAL, ids=str)
def test_same_bits_for_any_number_of_threads(backend, real, threads):
    u = products(20000, real)
    made = []
    for n in (1, 2, 3):
        threads(n)
        made.append(rectified(u, backend))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


@pytest.mark.parametrize("name", DTYPES)
def test_any_products(name, one_backend, monkeypatch):
    """`meta.rectified` takes every dtype and layout; the sum of half-precision products would leave their range."""
    monkeypatch.setattr(_backend, "select", lambda device, backend: one_backend)
    dtype = DTYPES[name]
    u = (products(600, torch.float64) * 1000).to(dtype)
    for given in (u, u[::2], u.view(300, 2)[:, 1], u.requires_grad_()):
        w = meta.rectified(given)
        assert w.dtype == dtype and w.shape == given.shape and not w.requires_grad
        exact = oracle.rectified(given.detach().double())
        half = dtype in (torch.bfloat16, torch.float16)
        atol = 6e-8 if dtype == torch.float16 else 0  # its smallest number
        np.testing.assert_allclose(w.double(), exact, rtol=torch.finfo(dtype).eps if half else TOLERANCE[dtype], atol=atol)


def test_transforms_and_compile(one_backend, monkeypatch):
    """Inside transforms the formula serves, where the kernels cannot."""
    monkeypatch.setattr(_backend, "select", lambda device, backend: one_backend)
    u = products(24, torch.float64).view(4, 6)
    wanted = torch.stack([meta.rectified(row) for row in u])
    torch.testing.assert_close(torch.func.vmap(meta.rectified)(u), wanted)
    compiled = torch.compile(meta.rectified, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(u[0]), wanted[0])


@pytest.mark.skipif(not _backend.available("cpu"), reason="the native library is not built here")
@pytest.mark.parametrize("given", [torch.ones(4, dtype=torch.bfloat16), torch.ones(8)[::2], torch.ones(3, dtype=torch.int64)])
def test_what_the_operator_refuses(given):
    with pytest.raises(RuntimeError, match="products: expected a contiguous tensor|expected float32"):
        torch.ops.absgd_fast.rectified(given)
