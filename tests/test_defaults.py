"""torch's default dtype and default device change nothing: neither that under which an object is made, nor that under which it
is used."""

import ast
import math
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import absgd_fast as ab
from absgd_fast import functional, meta, reference, weights
from absgd_fast._exact import state_tensors
from absgd_fast.compat import losses as compat_losses
from absgd_fast.compat import repository
from absgd_fast.experiments import data, models, train
from absgd_fast.functional import weighted_momentum_step_

PACKAGE = Path(ab.__file__).parent

here = dict(dtype=torch.float32, device="cpu")  # the tests' own tensors, which are the same under every default
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), **here)
Y = torch.arange(8, device="cpu") % 4
LOSSES = torch.rand(8, generator=torch.Generator().manual_seed(1), **here) * 3
GROUPS = torch.arange(8, device="cpu") % 2
COUNTS = [50, 20, 7, 3]
WEIGHT = [0.7, 1.3, 1.1, 0.9]  # no number of bfloat16


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


# ---- the table: how an object is made, and the numbers that come out when it is used ----


def gradients(value, *inputs):
    return [value.detach(), *torch.autograd.grad(value.sum(), inputs)]


def of_loss(loss):
    x = X.clone().requires_grad_()
    return gradients(loss(x, Y), x)


def of_robust(criterion):
    """Three training steps, everything that may be read after each, and a second derivative where there is one."""
    results = []
    for i in range(3):
        x = (X + 0.1 * i).requires_grad_()
        results += gradients(criterion(x, Y), x)
        last = criterion.last
        results += [last.weights, last.losses, last.ess, last.mean_loss, criterion.objective.detach()]
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(criterion(1 * x, Y, update=False), x, create_graph=True)
    results += torch.autograd.grad(grad.sin().sum(), x)
    return results


def of_head(criterion):
    results = []
    for _ in range(2):
        hidden, head = X.clone().requires_grad_(), torch.eye(4, **here).requires_grad_()
        results += gradients(criterion(hidden, head, Y), hidden, head)
    return results


def optimizer(cls, backend, **options):
    params = [nn.Parameter(torch.linspace(-1, 1, 6, **here)), nn.Parameter(torch.linspace(-1, 1, 6, **here).bfloat16())]
    return cls(params, backend=backend, **options)


def three_steps(optimizer):
    """The parameters, and their states but for the counts of steps, whose dtype is torch's."""
    params = optimizer.param_groups[0]["params"]
    for i in range(3):
        for p in params:
            p.grad = torch.full_like(p, 0.3 * (i + 1))
        optimizer.step()
    states = [t for p in params for name, t in optimizer.state[p].items() if name != "step" and t is not None]
    return [p.detach() for p in params] + states


def deferred(backend):
    criterion = ab.ABLoss(ab.CrossEntropy(WEIGHT, backend=backend), lam=0.5, deferred=True, backend=backend)
    return criterion, ab.ABAdam([nn.Parameter(torch.eye(4, **here))], robust=criterion, backend=backend)


def of_deferred(pair, finish=False):
    criterion, optimizer = pair
    (p,) = optimizer.param_groups[0]["params"]
    for _ in range(2):
        p.grad = None
        for rows in (slice(0, 3), slice(3, 8)):
            criterion(X[rows] @ p, Y[rows]).backward()
        if finish:
            criterion.finish_(p)
        else:
            optimizer.step()
    return [p.detach(), p.grad]


def of_schedule(pair):
    loss, schedule = pair
    before = of_loss(loss)
    schedule.step()
    return before + of_loss(loss)


def scheduled(make_loss, make_schedule):
    loss = make_loss()
    return loss, make_schedule(loss)


def model():
    made = nn.Linear(4, 4, **here)
    made.load_state_dict({"weight": X[:4].clone(), "bias": X[4].clone()})
    return made


def of_l2rw(made, method):
    per_sample = nn.CrossEntropyLoss(reduction="none")
    return [meta.l2rw_weights(made, per_sample, (X, Y), (X[:3], Y[:3]), method)]


def robust_weights(backend):
    losses = LOSSES.clone().requires_grad_()
    made, log_s = functional.robust_weights(losses, -math.inf, 0.7, backend=backend)
    return [*gradients(made * LOSSES, losses), log_s.detach()]


def pure_head(backend):
    x = X.clone().requires_grad_()
    loss, log_s = ab.linear_robust_loss(x, torch.eye(X.shape[1], **here), Y, -math.inf, 0.7, backend=backend)
    return [*gradients(loss, x), log_s]


def logit_loss(backend):
    x, vector = X.clone().requires_grad_(), torch.tensor(WEIGHT, **here)
    call = partial(functional.logit_loss, x, Y, scale=vector, shift=vector, margin=vector, weight=vector, backend=backend)
    return gradients(call(), x) + gradients(functional.logit_loss(x, Y, kind="gce", k=0.3, prune=True, backend=backend), x)


def weighted_step(backend):
    w, b = torch.zeros(2, **here), torch.zeros(2, **here)
    grads = torch.stack([LOSSES, LOSSES + 1], 1)
    return [w, b, weighted_momentum_step_([w], [b], [grads], LOSSES, -math.inf, lam=-0.7, lr=0.3, backend=backend)]


IMAGES = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(2), **here)
SOURCE = data.Source("made", 3, IMAGES, torch.arange(60, device="cpu") % 3, None, n_max=13, n_test=7, augment="crop-flip")


def drawn():
    """What the experiments draw at random."""
    split = data.draw(SOURCE, 0, imbalance="lt", rho=3.0, noise="asymmetric", rate=0.5)
    made = models.make_model("mlp", SOURCE.shape, 3, 0)
    return [split.x, split.y, data.augment(split.x, data.generator(0, data.ORDER)), *made.state_dict().values()]


def trained():
    """What the experiments train and measure."""
    names = "absgd", "proportion", "random", "l2rw", "resample"
    config = train.Config(methods=names, imbalance="lt", rho=3.0, epochs=2, seeds=1, batch_size=8, clean=2, audit=True)
    audits: list = []
    results = list(train.runs(config, SOURCE, on_audit=lambda method, seed, parts: audits.append(parts)))
    return [parts["audit"]["sums"].to(torch.float32) for parts in audits] + [
        torch.tensor([run["train_loss"], run["accuracy"], *run["per_class_recall"]], **here) for run in results
    ]


def table():
    """name -> (make, use, whether the object is a module, whose buffers torch makes on its default device)."""
    cases = {}

    def add(name, make, use, is_module=False):
        cases[name] = make, use, is_module

    nothing = lambda: None  # noqa: E731
    for backend in (None, "reference"):
        of = f", {backend}"
        losses = {
            "CrossEntropy": partial(ab.CrossEntropy, WEIGHT, label_smoothing=0.1),
            "CrossEntropy, mean": partial(ab.CrossEntropy, WEIGHT, reduction="mean"),
            "Focal": partial(ab.Focal, weight=WEIGHT),
            "GCE": partial(ab.GCE, k=0.2, weight=WEIGHT),
            "SCE": partial(ab.SCE, weight=WEIGHT),
            "LDAM": partial(ab.LDAM, COUNTS, weight=WEIGHT),
            "VS": partial(ab.VS, COUNTS),
            "LogitAdjusted": partial(ab.LogitAdjusted, COUNTS),
            "CDT": partial(ab.CDT, COUNTS),
            "compat.repository.Focal": partial(repository.Focal, weight=WEIGHT),
        }
        for name, make in losses.items():
            make = partial(make, backend=backend)
            add(name + of, make, of_loss, True)
            if "mean" not in name:
                add(f"ABLoss of {name}{of}", lambda make=make, b=backend: ab.ABLoss(make(), lam=-0.3, backend=b), of_robust, True)
        rules = {
            "term": partial(weights.term, t=2.0, backend=backend),
            "cvar": partial(weights.cvar, beta=0.3, backend=backend),
            "cvar, reg": partial(weights.cvar, beta=0.3, reg=0.7, backend=backend),
            "chi2": partial(weights.chi2, rho=0.3, backend=backend),
        }
        for name, rule in rules.items():
            add(f"{name}{of}", nothing, lambda _, rule=rule: [rule(LOSSES)])
            add(f"ABLoss by {name}{of}", partial(ab.ABLoss, rule=rule, backend=backend), of_robust, True)
        add(f"term, groups{of}", nothing, lambda _, b=backend: [weights.term(LOSSES, 2.0, GROUPS, 0.7, backend=b)])
        add(
            f"GroupDRO{of}", partial(weights.GroupDRO, 2, 0.3, backend=backend), lambda r: [r(LOSSES, GROUPS) for _ in "12"], True
        )
        robust = partial(ab.ABLoss, backend=backend)
        add(f"RelativeLam{of}", lambda make=robust: make(lam=ab.RelativeLam(-0.3), mix=0.3, max_weight=1.1), of_robust, True)
        add(f"TargetESS{of}", lambda make=robust: make(lam=ab.TargetESS(0.6), mix=0.3), of_robust, True)
        add(f"TargetESS in stages{of}", lambda make=robust: make(lam=ab.TargetESS(0.6), loss_divisor=3), of_robust, True)
        per_sample = partial(nn.CrossEntropyLoss, reduction="none")
        add(f"ABLoss of a callable{of}", lambda make=robust: make(per_sample(), lam=0.7, loss_divisor=3), of_robust, True)
        add(
            f"LinearABLoss{of}",
            lambda b=backend: ab.LinearABLoss(ab.CrossEntropy(WEIGHT), lam=0.7, chunk=3, backend=b),
            of_head,
            True,
        )
        add(f"deferred{of}", partial(deferred, backend), of_deferred)
        add(f"finish_{of}", partial(deferred, backend), partial(of_deferred, finish=True))
        for cls in (ab.ABSGD, ab.ABAdam, ab.ABAdamW, ab.ABRMSprop, ab.ABAdagrad):
            add(cls.__name__ + of, partial(optimizer, cls, backend), three_steps)
        add(f"ABSGD, heavy_ball{of}", partial(optimizer, ab.ABSGD, backend, heavy_ball=True), three_steps)
        add(f"ABSGD, dampening{of}", partial(optimizer, ab.ABSGD, backend, dampening=0.3), three_steps)
        add(f"ABAdam, paper_form{of}", partial(optimizer, ab.ABAdam, backend, paper_form=True), three_steps)
        add(f"ABAdam, amsgrad{of}", partial(optimizer, ab.ABAdam, backend, amsgrad=True), three_steps)
        add(f"ABRMSprop, centered{of}", partial(optimizer, ab.ABRMSprop, backend, centered=True, momentum=0.9), three_steps)
        add(f"robust_weights{of}", nothing, lambda _, b=backend: robust_weights(b))
        add(f"linear_robust_loss{of}", nothing, lambda _, b=backend: pure_head(b))
        add(f"logit_loss{of}", nothing, lambda _, b=backend: logit_loss(b))
        add(f"weighted_momentum_step_{of}", nothing, lambda _, b=backend: weighted_step(b))
    add("DFT", ab.DFT, of_robust, True)
    add("compat.losses.ABLoss", partial(compat_losses.ABLoss, 0.7), of_loss, True)
    add("DRW", partial(scheduled, ab.CrossEntropy, lambda loss: ab.DRW(loss, WEIGHT, 1)), of_schedule)
    add("TLA", partial(scheduled, partial(ab.CDT, COUNTS), lambda loss: ab.TLA(loss, 1)), of_schedule)
    add("vs_tla_adrw", partial(ab.vs_tla_adrw, COUNTS, start=1), of_schedule)
    add("class_balanced_weights", partial(ab.class_balanced_weights, COUNTS), lambda w: [w])
    add("adrw_weights", partial(ab.adrw_weights, COUNTS, 1.0), lambda w: [w])
    for method in meta.METHODS:
        add(f"l2rw_weights, {method}", model, partial(of_l2rw, method=method))
    add("rectified", nothing, lambda _: [reference.rectified(torch.full((3,), 3e38, **here))])  # the sum overflows
    inverse = partial(reference.logits_of_gradient, X / 8, Y, LOSSES, kind="gce", q=0.7)
    add("logits_of_gradient", nothing, lambda _: [inverse()])
    add("experiments, data", nothing, lambda _: drawn())
    add("experiments, training", nothing, lambda _: trained())
    return cases


CASES = table()


def the_same(got, wanted, exactly):
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted):
        assert a.device == b.device
        if exactly:
            assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, check_dtype=False, equal_nan=True)


# ---- the default dtype ----


@pytest.mark.parametrize("made", [torch.bfloat16, torch.float16, torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_default_dtype(name, made):
    """float64 as default gives float64 states, as `.double()` does, so the last digits of the results may differ."""
    make, use, is_module = CASES[name]
    wanted = use(make())
    for used in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        with default_dtype(made):
            thing = make()
        with default_dtype(used):
            got = use(thing)
        the_same(got, wanted, exactly=made != torch.float64)
        if is_module:
            wide = torch.float64 if made == torch.float64 else torch.float32
            floats = [t for t in (*thing.buffers(), *state_tensors(thing).values()) if t.is_floating_point()]
            assert {t.dtype for t in floats if t.dim()} | {t.dtype for t in state_tensors(thing).values()} <= {wide}
            assert {t.dtype for t in floats} <= {torch.float32, wide}


def test_class_weights_of_a_list():
    """Their dtype is that of states; a tensor keeps its own."""
    for made, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        with default_dtype(made):
            assert ab.CrossEntropy(WEIGHT).weight.dtype == wide
            assert torch.equal(ab.CrossEntropy(WEIGHT).weight, torch.tensor(WEIGHT, dtype=wide))
            assert ab.CrossEntropy(torch.tensor(WEIGHT, dtype=torch.bfloat16)).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("cls", [ab.ABAdam, ab.ABRMSprop, ab.ABAdagrad], ids=lambda c: c.__name__)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_counts_of_steps_have_the_dtype_of_torch(cls, backend):
    """torch counts in float64 if that is the default dtype where the count is made. Both serve, and a default may change."""
    for dtype, wide in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        with default_dtype(dtype):
            of = optimizer(cls, backend)
            three_steps(of)
        three_steps(of)
        assert [(s["step"].dtype, float(s["step"])) for s in of.state.values()] == [(wide, 6.0)] * 2


def test_adagrad_counts_from_the_beginning():
    """torch makes its states in the constructor, on the default device; a checkpoint may be taken before the first step."""
    with torch.device("meta"):
        of = optimizer(ab.ABAdagrad, None)
    assert [float(s["step"]) for s in of.state_dict()["state"].values()] == [0.0, 0.0]


def test_class_vectors_of_several_dtypes():
    """Neither rounds the other to its own dtype, whichever comes first."""
    vectors = torch.tensor([0.7, 1.3, 1.1, 0.9], dtype=torch.float64)
    for first in (torch.bfloat16, torch.int64, torch.float32):
        scale = torch.tensor([1, 2, 1, 2]).to(first)
        wanted = functional.logit_loss(X * scale.float() + vectors.float(), Y)
        torch.testing.assert_close(functional.logit_loss(X, Y, scale=scale, shift=vectors), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(functional.logit_loss(X, Y, scale=scale, shift=vectors.float()), wanted, rtol=1e-6, atol=1e-6)


# ---- the default device ----


def filled(thing):
    """A module that was made on the meta device, or the modules among several things, with values on the CPU."""
    for one in thing if isinstance(thing, tuple) else (thing,):
        if isinstance(one, nn.Module):
            one.to_empty(device="cpu")
            for part in one.modules():
                getattr(part, "reset_parameters", lambda: None)()
    return thing


@pytest.mark.parametrize("name", [name for name in CASES if name != "experiments, training"])  # it makes modules
def test_used_under_another_default_device(name):
    """The meta device stands for a GPU: what is made there by mistake has no values."""
    make, use, _ = CASES[name]
    wanted = use(make())
    for default in (torch.device, default_device):
        thing = make()
        with default("meta"):
            got = use(thing)
        the_same(got, wanted, exactly=True)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("l2rw")])
def test_made_under_another_default_device(name):
    """Modules have their buffers there, as torch's have, until to_empty. All else is made where its parameters are."""
    make, use, _ = CASES[name]
    with torch.device("meta"):
        thing = make()
    the_same(use(filled(thing)), use(make()), exactly=True)


# ---- the kind ----

FACTORIES = {"tensor", "as_tensor", "scalar_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "logspace", "eye"}
FACTORIES |= {"rand", "randn", "randint", "randperm", "range"}
INTEGERS = {"randint", "randperm", "arange"}  # of integers, unless somebody says otherwise
# where torch's default is wanted, as in torch's own modules
# What users give to `select`, of any dtype and on any device.
GIVEN = {("selection/run.py", "_score")} | {("selection/split.py", name) for name in ("_given", "_integers", "_tensor", "split")}
ON_DEFAULT_DEVICE = GIVEN | {
    ("audit.py", "__init__"),
    ("losses.py", "_keep_vectors"),  # the class vectors that the first forward is likely to ask for
    ("losses.py", "__init__"),  # CosineClassifier, a layer as torch.nn.Linear
    ("robust/state.py", "__init__"),
    ("weights/group_dro.py", "__init__"),
}
OF_ANY_DTYPE = GIVEN | {("losses.py", "__init__"), ("experiments/noise.py", "add_noise")}  # the latter takes labels of any dtype


def calls(node, function=""):
    """Every call inside a node of the syntax tree, with the name of the function that it stands in."""
    for child in ast.iter_child_nodes(node):
        inside = child.name if isinstance(child, ast.FunctionDef) else function
        if isinstance(child, ast.Call):
            yield inside, child
        yield from calls(child, inside)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_tensors_are_made_with_dtype_and_device(path):
    """A tensor that is made without them is a bug that only another default shows, or a GPU."""
    file = path.relative_to(PACKAGE).as_posix()
    for function, call in calls(ast.parse(path.read_text())):
        of, _, name = ast.unparse(call.func).rpartition(".")
        if of != "torch" or name not in FACTORIES:
            continue
        missing = {"dtype", "device"} - {keyword.arg for keyword in call.keywords}
        missing -= {"device"} if (file, function) in ON_DEFAULT_DEVICE else set()
        missing -= {"dtype"} if (file, function) in OF_ANY_DTYPE or name in INTEGERS else set()
        assert not missing, f"{file}:{call.lineno}: {ast.unparse(call)} names no {' and no '.join(sorted(missing))}"
