"""The one table of backends x dtypes x losses, and the settings every test runs under."""

import gc
import inspect
import math
from functools import partial

import covering
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from tensors import DTYPES, class_weight, counts

import absgd_fast as ab
from absgd_fast import _backend

# An assert in a file that tests share then says as much as one in a test file.
for room in ("bench", "deferred", "gpu", "interpreted", "optim", "weights"):
    pytest.register_assert_rewrite(f"{room}_cases")

# derandomize: a failure seen once is seen by everybody. The fixtures below only choose a backend, so examples may share them.
settings.register_profile(
    "absgd_fast",
    deadline=None,
    derandomize=True,
    max_examples=30,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("absgd_fast")


@pytest.hookimpl(tryfirst=True)  # pytest selects by markers afterwards
def pytest_collection_modifyitems(items):
    for item in covering.deep(items):
        item.add_marker("deep")


# ---- the table ------------------------------------------------------------------------------------------------------

BACKENDS = ["reference"] + [f"cpu-{isa}" for isa in (_backend.cpu_isas() if _backend.available("cpu") else [])]


class Loss:
    """One row: a fused module, and the arguments of logit_loss that it stands for; the same in eager torch and in the oracle.

    given(C): what the module is called with for C classes; vectors: the oracle's class vectors of the losses that have any.
    """

    exact, valid = staticmethod(oracle.logit_loss), staticmethod(oracle.valid)

    def __init__(self, fused, kind="ce", given=lambda c: {}, vectors=None, *, cancels=(), every_class=False, sparse=True):
        self.fused, self.kind, self.given, self.vectors = fused, kind, given, vectors
        self.cancels = cancels  # "loss", "gradient": terms of opposite sign, so only an absolute error can be asked for
        self.every_class = every_class  # the loss holds every class's log p: -inf in any class makes it infinite
        self.sparse = sparse  # no branch of the loops over classes that another row does not meet: fewer widths will do

    def options(self, classes):
        """Arguments of logit_loss, of `eager` and of the oracle."""
        given = self.given(classes)
        if self.vectors:
            own = {k: given.pop(k) for k in inspect.signature(self.vectors).parameters if k in given}
            given |= self.vectors(**own)
        return {"kind": self.kind, **given}

    def tensors(self, classes, dtype):
        """Options with the class vectors as tensors of `dtype`."""
        return {k: torch.tensor(v, dtype=dtype) if isinstance(v, list) else v for k, v in self.options(classes).items()}

    def module(self, classes, dtype=torch.float64, **more):
        """The fused module, its class weights of `dtype`."""
        given = self.given(classes)
        if "weight" in given:
            given["weight"] = torch.tensor(given["weight"], dtype=dtype)
        return self.fused(**given, **more)

    @staticmethod
    def eager(
        logits,
        target,
        *,
        kind,
        scale=None,
        shift=None,
        margin=None,
        weight=None,
        ignore_index=-100,
        gamma=2.0,
        q=0.7,
        k=None,
        prune=False,
        alpha=0.1,
        beta=1.0,
        reduction="none",
        **smoothing,
    ):
        """Every loss as one would write it around F.cross_entropy; a mean divides by the weights of the rows that count."""
        along = (-1, *[1] * (logits.dim() - 2))
        if scale is not None:
            logits = logits * scale.view(along)
        if shift is not None:
            logits = logits + shift.view(along)
        if margin is not None:
            logits = logits - (target.unsqueeze(1) == torch.arange(len(margin)).view(along)) * margin.view(along)
        cross_entropy = partial(F.cross_entropy, logits, target, ignore_index=ignore_index)
        if kind == "ce":
            return cross_entropy(weight=weight, reduction=reduction, **smoothing)
        valid = target != ignore_index
        n, w = cross_entropy(reduction="none"), logits.new_ones(target.shape)
        if weight is not None:
            w = weight[torch.where(valid, target, 0)]
        p = torch.exp(-n)
        if kind == "focal":
            losses = (1 - p) ** gamma * n
        elif kind == "gce":
            losses = ((1 - p**q) - (0 if k is None else 1 - k**q)) / q
        elif kind == "sce":
            losses = alpha * n - beta * math.log(1e-4) * (1 - p)
        if prune:
            valid = valid & (p > k)
        losses = torch.where(valid, w * losses, 0)
        return {"none": losses, "sum": losses.sum(), "mean": losses.sum() / (w * valid).sum()}[reduction]


def weighted(**options):
    return lambda c: {"weight": class_weight(c)} | options


def counted(**options):
    return lambda c: {"cls_num_list": counts(c)} | options


LOSSES = {
    "ce": Loss(ab.CrossEntropy, sparse=False),
    "ce-weight": Loss(ab.CrossEntropy, given=weighted()),
    "ce-smooth": Loss(ab.CrossEntropy, given=lambda c: {"label_smoothing": 0.1}, cancels=("gradient",), every_class=True),
    "ce-weight-smooth-ignore": Loss(
        ab.CrossEntropy,
        given=weighted(label_smoothing=0.3, ignore_index=0),
        cancels=("gradient",),
        every_class=True,
        sparse=False,
    ),
    "focal": Loss(ab.Focal, "focal"),
    "focal-half-weight": Loss(ab.Focal, "focal", weighted(gamma=0.5)),  # below 1: another limit at p = 1
    "focal-zero": Loss(ab.Focal, "focal", lambda c: {"gamma": 0.0}),
    "gce": Loss(ab.GCE, "gce"),
    "gce-truncated": Loss(ab.GCE, "gce", lambda c: {"q": 0.4, "k": 0.5}, cancels=("loss",)),
    "gce-prune-weight-ignore": Loss(ab.GCE, "gce", weighted(k=0.2, prune=True, ignore_index=1), cancels=("loss",)),
    "sce": Loss(ab.SCE, "sce"),
    "sce-weight": Loss(ab.SCE, "sce", weighted(alpha=6.0, beta=0.7)),
    "ldam": Loss(ab.LDAM, "ce", counted(s=2.0), oracle.ldam),  # s = 2: logits that are not cosines reach the same |a|
    "vs-weight-ignore": Loss(ab.VS, "ce", lambda c: weighted(ignore_index=2)(c) | counted()(c), oracle.vs),
    "la": Loss(ab.LogitAdjusted, "ce", counted(tau=1.3), oracle.logit_adjusted),
    "cdt": Loss(ab.CDT, "ce", counted(gamma=0.2), oracle.cdt),
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
def one_thread(threads):
    """Several threads wait for each other on small tensors, and on a busy machine. A test may set another number itself."""
    threads(1)


@pytest.fixture
def garbage():
    """gc.collect looks at what comes from now on only, which takes a hundredth of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def rng():
    """NumPy's generator, the same numbers in every run."""
    return np.random.default_rng(0)
