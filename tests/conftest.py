"""The one table of backends x dtypes x losses, and the settings every test runs under."""

from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings

import absgd_fast as ab
from absgd_fast import _backend

# derandomize: a failure seen once is seen by everybody. The fixtures below only choose a backend, so examples may share them.
settings.register_profile(
    "absgd_fast", deadline=None, derandomize=True, max_examples=30, database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
settings.load_profile("absgd_fast")

# ---- the table ------------------------------------------------------------------------------------------------------

BACKENDS = ["reference"] + [f"cpu-{isa}" for isa in (_backend.cpu_isas() if _backend.available("cpu") else [])]
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loss:
    """One row: the fused loss, the same in eager torch, and the oracle; options(C) are what all three are called with."""

    def __init__(self, fused, eager, exact, kind, options, cancels=False):
        self.fused, self.eager, self.exact, self.kind, self.options = fused, eager, exact, kind, options
        self.cancels = cancels  # gradient terms of opposite sign: only an absolute error can be asked for

    def tensors(self, classes, dtype):
        """Options with the class vectors as tensors of `dtype`."""
        return {k: torch.tensor(v, dtype=dtype) if isinstance(v, list) else v for k, v in self.options(classes).items()}


def class_weight(classes):
    """Distinct values from 0.5 to 2, none of them 1: an unused or shifted weight shows."""
    return [0.5 + 1.5 * ((7 * c + 3) % 16) / 15.5 for c in range(classes)]


ce = partial(Loss, ab.CrossEntropy, partial(F.cross_entropy, reduction="none"), oracle.cross_entropy, "ce")
LOSSES = {
    "ce": ce(lambda c: {}),
    "ce-weight": ce(lambda c: {"weight": class_weight(c)}),
    "ce-smooth": ce(lambda c: {"label_smoothing": 0.1}, cancels=True),
    "ce-weight-smooth-ignore": ce(lambda c: {"weight": class_weight(c), "label_smoothing": 0.3, "ignore_index": 0}, cancels=True),
}


# ---- ways in which given losses reach ABLoss ------------------------------------------------------------------------


def identity(losses):
    return losses


class Losses:
    """A callable that returns the per-sample losses; rows are ignored through mask=."""

    zeroes_ignored = True  # the gradient of an ignored row is 0 even where it holds NaN

    def criterion(self, backend):
        return identity

    def inputs(self, losses, valid=None):
        """Leaf, positional and keyword arguments of a call whose per-sample losses are `losses`, a tensor (B,)."""
        leaf = losses.clone().requires_grad_()
        return leaf, (leaf,), {} if valid is None else {"mask": torch.as_tensor(valid)}

    def slope(self, leaf, losses):
        """d loss / d L from the gradient of the leaf."""
        return leaf.grad


class Fused:
    """Two-class logits with these cross-entropies; rows are ignored through ignore_index."""

    zeroes_ignored = True

    def criterion(self, backend):
        return ab.CrossEntropy(backend=backend)

    def inputs(self, losses, valid=None):
        logits = torch.stack([torch.zeros_like(losses), losses + torch.log(-torch.expm1(-losses))], 1)
        logits[losses == torch.inf] = torch.tensor([-torch.inf, 0.0], dtype=losses.dtype)
        target = torch.zeros(len(losses), dtype=torch.int64)
        if valid is not None:
            target[~torch.as_tensor(valid)] = -100
        leaf = logits.requires_grad_()
        return leaf, (leaf, target), {}

    def slope(self, leaf, losses):
        grad = leaf.grad
        torch.testing.assert_close(grad[:, 0], -grad[:, 1], equal_nan=True)
        return grad[:, 1] / -torch.expm1(-losses)


class Wrapped(Fused):
    """The same logits through torch's own module; rows are ignored through mask=."""

    zeroes_ignored = False  # torch's backward of cross-entropy makes 0 * NaN of a zero upstream gradient

    def criterion(self, backend):
        return torch.nn.CrossEntropyLoss(reduction="none")

    def inputs(self, losses, valid=None):
        leaf, args, _ = super().inputs(losses)
        return leaf, args, {} if valid is None else {"mask": torch.as_tensor(valid)}


class Callable(Wrapped):
    """The same through a function around F.cross_entropy."""

    def criterion(self, backend):
        return partial(F.cross_entropy, reduction="none")


ENTRIES = {"losses": Losses(), "fused": Fused(), "wrapped": Wrapped(), "callable": Callable()}


# ---- fixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def poison():
    """Deterministic mode fills what torch.empty returns with NaN: a read of uninitialised memory shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """A backend's name, with the CPU kernels set to one of the instruction sets this machine has."""
    name, _, isa = request.param.partition("-")
    before = _backend.set_cpu_isa(isa) if isa else None
    yield name
    if isa:
        _backend.set_cpu_isa(before)


@pytest.fixture(params=[n for n in ("reference", "cpu") if n == "reference" or _backend.available(n)])
def one_backend(request):
    """As `backend`, for what no kernel decides: the CPU kernels once, on the best instruction set."""
    return request.param


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]


@pytest.fixture(params=LOSSES)
def case(request):
    return LOSSES[request.param]


@pytest.fixture(params=ENTRIES)
def entry(request):
    return ENTRIES[request.param]


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def rng():
    """NumPy's generator, the same numbers in every run."""
    return np.random.default_rng(0)
