"""What gets a gradient (MATH §7): sample weights and soft targets against float64 autograd of eager torch; and all the rest."""

import math
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from tensors import LAYOUTS
from torch import nn
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint
from two_processes import RANKS, needs_gloo, run

import absgd_fast as ab
from absgd_fast import functional, meta, reference, weights
from absgd_fast.compat import repository

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
INF, NAN = math.inf, math.nan
ROWS, CLASSES = 6, 4
V = torch.tensor([0.5, 2.0, 0.75, 1.25], dtype=torch.float64)  # class weights
SMOOTHING, DIVISOR = 0.1, 3.0
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12, equal_nan=True)


def losses_of(x, t):
    """Cross-entropy as torch has it."""
    return F.cross_entropy(x, t, weight=V.to(x.dtype), label_smoothing=SMOOTHING, reduction="none")


def cross_entropy(backend, **more):
    return ab.CrossEntropy(V, SMOOTHING, backend=backend, **more)


def proportional(losses, mask=None):
    """A rule: W_i proportional to L_i, with mean 1 over the rows that count."""
    valid = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
    good = valid & losses.isfinite()
    return torch.where(valid, losses / (losses.where(good, 0).sum() / good.sum()), 0).masked_fill(valid & ~good, NAN)


def robust(**given):
    return lambda backend, options: ab.ABLoss(backend=backend, **given, **options)


# The robust losses that differ in how they come to their losses and weights.
FORMS = {
    "fused": lambda backend, options: ab.ABLoss(cross_entropy(backend), backend=backend, **options),
    "torch's module": robust(criterion=nn.CrossEntropyLoss(V, label_smoothing=SMOOTHING, reduction="none")),
    "callable": robust(criterion=losses_of),
    "divided": lambda backend, options: ab.ABLoss(cross_entropy(backend), backend=backend, loss_divisor=DIVISOR, **options),
    "rule": lambda backend, options: ab.ABLoss(cross_entropy(backend), backend=backend, rule=proportional, **options),
    "linear": lambda backend, options: ab.LinearABLoss(cross_entropy(backend), backend=backend, chunk=4, **options),
}
NUMBERS = {
    "moving": dict(lam=0.7),
    "mixed": dict(lam=-0.7, mix=0.5, max_weight=1.05),
    "plain": dict(lam=INF, mix=2.0),
    "none": dict(lam=-1.0, normalizer="none", max_weight=0.3),
}
BY_RULE = {"rule": {}, "rule, mixed": dict(mix=0.5, max_weight=1.2)}
CASES = [(form, options) for form in FORMS for options in (BY_RULE if form == "rule" else NUMBERS)]
CASES = [(form, options) for form, options in CASES if (form, options) not in {("linear", "mixed"), ("linear", "plain")}]


def tensors(soft=True, shape=(ROWS, CLASSES), seed=0, dtype=torch.float64):
    """Logits, target and sample weights that require grad, except labels."""
    generator = torch.Generator().manual_seed(seed)
    x, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    s = torch.rand(shape[:1] + shape[2:], generator=generator, dtype=torch.float64) + 0.2
    s[0] = 0  # its slope is that of any other
    t = (t.softmax(1) if soft else t.argmax(1)).to(dtype if soft else torch.int64)
    return x.to(dtype).requires_grad_(), t.requires_grad_(soft), s.to(dtype).requires_grad_()


def learned(*inputs):
    return [t for t in inputs if t.requires_grad]


def call(form, criterion, x, t, **rows):
    """The loss of logits x; a linear head has the identity as its weight, and the classes last."""
    if form == "linear":
        x, t = x.movedim(1, -1), t.movedim(1, -1) if t.is_floating_point() else t
        return criterion(x, torch.eye(x.shape[-1], dtype=x.dtype), t, **rows)
    return criterion(x, t, **rows)


def truth(form, options, x, t, s, keep=None):
    """The robust loss with the oracle's W as constants. keep: the rows that count and are finite."""
    keep = slice(None) if keep is None else keep
    losses = losses_of(x[keep], t[keep])
    plain = losses.detach().numpy()
    if form == "rule":
        w = np.minimum(plain / plain.mean(), options.get("max_weight", INF))
        mix = options.get("mix", 0.0)
    else:
        numbers = {k: v for k, v in options.items() if k not in ("lam", "mix")}
        start = 0.0 if options.get("normalizer") == "none" else -INF
        w = oracle.robust_weights(plain, start, options["lam"], **numbers).weights
        mix = 0.0 if math.isinf(options["lam"]) else options.get("mix", 0.0)
    factor = (torch.from_numpy(w) + mix) / losses.numel() * (DIVISOR if form == "divided" else 1)
    return (s[keep] * factor * losses).sum()


@pytest.mark.parametrize("shape", [(ROWS, CLASSES), (3, CLASSES, 2)], ids=str)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("form, options", CASES)
def test_gradients(form, options, soft, shape, one_backend):
    """First derivatives by logits, soft targets and sample weights, and second ones where there are some."""
    options = (NUMBERS | BY_RULE)[options]
    x, t, s = tensors(soft, shape)
    inputs = learned(x, t, s)
    value = call(form, FORMS[form](one_backend, options).double(), x, t, sample_weight=s)
    wanted = truth(form, options, x, t, s)
    close(value, wanted)
    first = torch.autograd.grad(wanted, inputs, create_graph=True)
    for got in (
        torch.autograd.grad(3 * value, inputs, retain_graph=True),
        torch.autograd.grad(3 * value, inputs, retain_graph=True),
    ):
        close(list(got), [3 * g for g in first])
    if form == "linear" and one_backend != "reference":
        for wrt in inputs:
            with pytest.raises(RuntimeError, match="create_graph=True"):
                torch.autograd.grad(value, wrt, create_graph=True)
        return
    second = [
        torch.autograd.grad(sum(g.sin().sum() for g in grads), inputs)
        for grads in (torch.autograd.grad(value, inputs, create_graph=True), first)
    ]
    close(*second)


@pytest.mark.parametrize("frozen", ["x", "xt", "xs", "ts", "t", "s"])
@pytest.mark.parametrize("form", FORMS)
def test_frozen_inputs(form, frozen, one_backend):
    """Each input gets its gradient whether the others need theirs or not, and gets none under no_grad."""
    options = {} if form == "rule" else NUMBERS["moving"]
    x, t, s = tensors()
    names = {"x": x, "t": t, "s": s}
    for name in frozen:
        names[name].requires_grad_(False)
    criterion = FORMS[form](one_backend, options).double()
    value = call(form, criterion, x, t, sample_weight=s, update=False)
    inputs = learned(x, t, s)
    close(list(torch.autograd.grad(value, inputs)), list(torch.autograd.grad(truth(form, options, x, t, s), inputs)))
    with torch.no_grad():
        assert not call(form, criterion, x, t, sample_weight=s).requires_grad


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("form", FORMS)
def test_masked_and_bad_rows(form, soft, one_backend):
    """A masked row gets 0 whatever its inputs hold, a row with a nonfinite loss NaN, the others what they get without these."""
    options = {} if form == "rule" else NUMBERS["moving"]
    x, t, s = (v.detach() for v in tensors(soft))
    mask = torch.tensor([True, False, True, True, True, True])
    keep = torch.tensor([0, 3, 4, 5])
    x[1] = s[1] = NAN
    x[2, 0] = NAN
    if soft:
        t[1] = NAN
    elif form not in ("callable", "rule"):
        t[5], keep = -100, keep[:-1]  # ignored by its label
    own = form != "callable"  # torch's backward makes 0 * NaN of a masked row
    x.requires_grad_(own), t.requires_grad_(own and soft), s.requires_grad_()
    inputs = learned(x, t, s)
    value = call(form, FORMS[form](one_backend, options).double(), x, t, sample_weight=s, mask=mask)
    assert value.isnan()
    got = torch.autograd.grad(value, inputs)
    wanted = torch.autograd.grad(truth(form, options, x, t, s, keep), inputs)
    for name, g, w in zip(("x", "t", "s") if len(inputs) == 3 else ("x", "s"), got, wanted):
        w = w.clone()
        w[2] = NAN
        close(g, w, msg=lambda text, name=name: f"{name}: {text}")


def test_weight_of_zero(one_backend):
    """A sample weight of 0 has the slope (W + mix) L / n, as any other; a bad row has NaN for the other kinds of target too."""
    x, y, s = tensors(soft=False)
    s = s.detach().clone()
    s[::2] = 0
    s.requires_grad_()
    criterion = ab.ABLoss(lam=0.7, mix=0.5, backend=one_backend).double()
    (got,) = torch.autograd.grad(criterion(x, y, sample_weight=s), s)
    losses = F.cross_entropy(x, y, reduction="none").detach()
    close(got, (criterion.last.weights + 0.5) * losses / ROWS)
    assert (got > 0).all()


# ---- losses without weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_cross_entropy(reduction, one_backend):
    """Soft targets of `CrossEntropy` and logit_loss against torch's, twice differentiated; a target of 0 has its slope too."""
    x, t, _ = tensors()
    t = t.detach().clone()
    t[0] = F.one_hot(torch.tensor(2), CLASSES)
    t.requires_grad_()
    ours = cross_entropy(one_backend, reduction=reduction)(x, t)
    theirs = F.cross_entropy(x, t, weight=V, label_smoothing=SMOOTHING, reduction=reduction)
    grads = [torch.autograd.grad(v.sin().sum(), (x, t), create_graph=True) for v in (ours, theirs)]
    close(*grads)
    close(*(torch.autograd.grad(sum(g.sin().sum() for g in both), (x, t)) for both in grads))
    assert torch.autograd.gradcheck(partial(functional.logit_loss, weight=V, backend=one_backend), (x, t))


def test_soft_targets_of_adjusted_logits(one_backend):
    """A loss with class vectors takes soft targets too: the slope is that of the adjusted logits."""
    x, t, _ = tensors()
    loss = ab.VS([5, 1, 7, 2], weight=V, backend=one_backend)
    scale, shift, _ = loss._adjust(x)
    results = [v.sum() for v in (loss(x, t), F.cross_entropy(x * scale + shift, t, weight=V, reduction="none"))]
    close(*(torch.autograd.grad(v, (x, t)) for v in results))


def test_impossible_classes(one_backend):
    """A class with the logit -inf adds nothing where its target is 0, and gets no slope; the other classes keep theirs."""
    x, t, _ = tensors()
    x, t = x.detach().clone(), t.detach().clone()
    x[:, 3] = -INF
    t[:, 3] = 0
    t.requires_grad_()
    (got,) = torch.autograd.grad(ab.CrossEntropy(reduction="sum", backend=one_backend)(x, t), t)
    close(got[:, :3], -x[:, :3].log_softmax(1))
    assert (got[:, 3] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, one_backend):
    x, t, s = (v.detach() for v in tensors(shape=(3, CLASSES, 2)))
    wanted = torch.autograd.grad(truth("fused", NUMBERS["moving"], *(v.requires_grad_() for v in (x, t, s))), (x, t, s))
    leaves = [v.detach().clone().requires_grad_() for v in (x, t, s)]
    laid = [LAYOUTS[layout](v) for v in leaves[:2]] + [leaves[2].t().contiguous().t()]
    value = FORMS["fused"](one_backend, NUMBERS["moving"]).double()(laid[0], laid[1], sample_weight=laid[2])
    close(torch.autograd.grad(value, leaves), wanted)


@pytest.mark.parametrize("form", ["fused", "divided", "rule", "linear"])
@pytest.mark.parametrize("logits", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(form, logits, given, one_backend):
    """The gradient has the dtype of its input, whatever the logits are, and is as close to the truth as this dtype allows."""
    options = {} if form == "rule" else NUMBERS["moving"]
    x, t, s = tensors()
    x, t, s = (v.detach().to(dtype).requires_grad_() for v, dtype in ((x, logits), (t, given), (s, given)))
    criterion = FORMS[form](one_backend, options)
    criterion = criterion.double() if logits == torch.float64 else criterion
    got = torch.autograd.grad(call(form, criterion, x, t, sample_weight=s), (t, s))
    assert [g.dtype for g in got] == [given, given]
    exact = [v.detach().double().requires_grad_() for v in (x, t, s)]
    wanted = torch.autograd.grad(truth(form, options, *exact), exact[1:])
    rough = 2 * torch.finfo(logits).eps if form == "linear" else 0.0  # its logits are rounded to their dtype
    tolerance = max(torch.finfo(given).eps, 1e-6 if logits != torch.float64 else 1e-12, 30 * rough)
    for g, w in zip(got, wanted):
        torch.testing.assert_close(g.double(), w, rtol=tolerance, atol=tolerance * float(w.abs().max()))


@pytest.mark.parametrize("form", ["fused", "linear"])
def test_autocast(form, one_backend):
    x, t, s = tensors(dtype=torch.float32)
    head = torch.randn(CLASSES, CLASSES)
    criterion = FORMS[form](one_backend, NUMBERS["moving"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = criterion(x, head, t, sample_weight=s) if form == "linear" else criterion(x @ head.T, t, sample_weight=s)
    got = torch.autograd.grad(value, (t, s))
    exact = [v.detach().double().requires_grad_() for v in (x @ head.T, t, s)]
    wanted = torch.autograd.grad(truth(form, NUMBERS["moving"], *exact), exact[1:])
    for g, w in zip(got, wanted):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g.double(), w, rtol=0.1, atol=0.1 * float(w.abs().max()))


# ---- later, inside transforms, compiled ----------------------------------------------------------------------------------


def test_what_changes_after_the_forward(one_backend):
    """Another lambda, another batch and changed logits leave the gradient; a second derivative by changed logits is an error."""
    x, y, s = tensors(soft=False)
    z = x * 1
    criterion = ab.ABLoss(lam=0.7, mix=0.5, backend=one_backend).double()
    value = criterion(z, y, sample_weight=s)
    (wanted,) = torch.autograd.grad(value, s, retain_graph=True)
    criterion(x * 2, y)
    criterion.set_lam(INF)
    criterion.mix = 0.0
    if one_backend == "reference":
        return
    z.detach().zero_()
    close(torch.autograd.grad(value, s, retain_graph=True), (wanted,))
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(value, s, create_graph=True)


@pytest.mark.parametrize("form", FORMS)
def test_recomputation(form, one_backend):
    """Activation checkpointing runs the forward again: the same gradients, and log s moves once."""
    options = {} if form == "rule" else NUMBERS["moving"]
    x, t, s = tensors()
    criteria = [FORMS[form](one_backend, options).double() for _ in range(2)]
    value = checkpoint(lambda x, t, s: call(form, criteria[0], x, t, sample_weight=s), x, t, s, use_reentrant=False)
    got = torch.autograd.grad(value, (x, t, s))
    close(list(got), list(torch.autograd.grad(truth(form, options, x, t, s), (x, t, s))))
    call(form, criteria[1], x, t, sample_weight=s)
    close(criteria[0].log_s, criteria[1].log_s)


@pytest.mark.parametrize("form", FORMS)
def test_transforms(form, one_backend):
    """jvp, grad and vmap over grad of the robust loss by target and sample weight."""
    options = {} if form == "rule" else NUMBERS["moving"]
    x, t, s = (v.detach() for v in tensors())
    criterion = FORMS[form](one_backend, options | ({} if form == "divided" else {"process_group": None})).double()
    f = lambda t, s: call(form, criterion, x, t, sample_weight=s, update=False)  # noqa: E731
    if form == "divided":
        criterion.eval()  # a forward that trains shares its normaliser, which no transform does
    exact = lambda t, s: truth("fused" if form == "divided" else form, options, x, t, s)  # noqa: E731
    leaves = t.clone().requires_grad_(), s.clone().requires_grad_()
    wanted = torch.autograd.grad(exact(*leaves), leaves)
    close(grad(f, (0, 1))(t, s), wanted)
    tangents = torch.cos(t), torch.sin(s)
    _, slope = jvp(f, (t, s), tangents)
    close(slope, sum((g * v).sum() for g, v in zip(wanted, tangents)))
    stacked = torch.stack([s, 2 * s])
    close(vmap(grad(partial(f, t)))(stacked), torch.stack([wanted[1]] * 2))


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("form", ["fused", "callable", "divided", "rule"])
def test_compiles_into_one_graph(form, soft, one_backend):
    torch._dynamo.reset()
    options = {} if form == "rule" else NUMBERS["moving"]
    eager, inner = (FORMS[form](one_backend, options).double() for _ in range(2))
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x, t, s = tensors(soft, seed=seed)
        inputs = learned(x, t, s)
        close(*(torch.autograd.grad(c(x, t, sample_weight=s), inputs) for c in (eager, compiled)))
    close(eager.log_s, inner.log_s)


# ---- several processes, deferred mode ------------------------------------------------------------------------------------


def _of_one_big_batch(rank):
    """The average over ranks that DDP makes of a gradient equals that of one batch of all rows: so n is n_total / R here."""
    x, t, s = tensors(shape=(9, CLASSES))
    rows = [slice(0, 3), slice(3, 9)][rank]
    options = NUMBERS["mixed"]
    inputs = [v.detach()[rows].clone().requires_grad_() for v in (x, t, s)]
    value = FORMS["fused"](None, options).double()(inputs[0], inputs[1], sample_weight=inputs[2])
    wanted = torch.autograd.grad(truth("fused", options, x, t, s), (x, t, s))
    close(list(torch.autograd.grad(value, inputs)), [RANKS * g[rows] for g in wanted])
    options = NUMBERS["moving"]
    value = call("linear", FORMS["linear"](None, options).double(), inputs[0], inputs[1], sample_weight=inputs[2])
    wanted = torch.autograd.grad(truth("linear", options, x, t, s), (x, t, s))
    close(list(torch.autograd.grad(value, inputs)), [RANKS * g[rows] for g in wanted])


@needs_gloo
def test_two_processes(tmp_path):
    run(_of_one_big_batch, tmp_path)


@pytest.mark.parametrize("what", ["sample_weight", "target"])
@pytest.mark.parametrize("form", ["fused", "callable", "linear"])
def test_deferred(form, what, one_backend):
    """A gradient that nobody would normalise is refused in every micro-batch, and leaves the step and log s as they were."""
    if (form, what) == ("callable", "target"):
        pytest.skip("what a callable does with its arguments is not known")
    x, t, s = tensors()
    given = {"target": t.detach(), "sample_weight": s.detach()}
    criterion = FORMS[form](one_backend, NUMBERS["moving"] | {"deferred": True}).double()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{what}: got a tensor that requires grad in deferred mode.*{what}.detach()"):
            bad = given | {what: {"target": t, "sample_weight": s}[what]}
            call(form, criterion, x, bad["target"], sample_weight=bad["sample_weight"])
        call(form, criterion, x, given["target"], sample_weight=given["sample_weight"])
    assert criterion.deferred_step.partial_stats[1] == 2 * ROWS and criterion.log_s == -INF
    value = call(form, criterion, x, t, sample_weight=s, update=False)  # normalised at once
    close(torch.autograd.grad(value, (x, s)), torch.autograd.grad(truth(form, NUMBERS["moving"], x, t, s), (x, s)))


# ---- the table of MATH §7 ------------------------------------------------------------------------------------------------


def plain(*shape):
    return torch.linspace(0.5, 1.5, math.prod(shape)).view(shape)


LOGITS, LABELS = plain(2, 3).log(), torch.tensor([0, 2])
LINEAR = torch.eye(3)


def pure(**given):
    """linear_robust_loss with one argument that requires grad."""
    return ab.linear_robust_loss(**dict(input=LOGITS, linear_weight=LINEAR, target=LABELS, log_s=-1.0, lam=0.5) | given)[0]


# name in the table -> its answer, the shape of the argument, and calls that are given it
TABLE = {
    "logits": ("gradient", (2, 3), [
        lambda v: functional.logit_loss(v, LABELS).sum(),
        lambda v: ab.ABLoss(lam=0.5)(v, LABELS),
    ]),
    "soft targets": ("gradient", (2, 3), [
        lambda v: functional.logit_loss(LOGITS, v).sum(),
        lambda v: ab.CrossEntropy(reduction="mean")(LOGITS, v),
        lambda v: ab.ABLoss(lam=0.5)(LOGITS, v),
        lambda v: ab.LinearABLoss(lam=0.5)(LOGITS, LINEAR, v),
        lambda v: pure(target=v),
    ]),
    "sample_weight": ("gradient", (2,), [
        lambda v: ab.ABLoss(lam=0.5)(LOGITS, LABELS, sample_weight=v),
        lambda v: ab.ABLoss(lambda x: x.sum(1), lam=0.5)(LOGITS, sample_weight=v),
        lambda v: ab.ABLoss(rule=proportional)(LOGITS, LABELS, sample_weight=v),
        lambda v: ab.LinearABLoss(lam=0.5)(LOGITS, LINEAR, LABELS, sample_weight=v),
        lambda v: repository.ABLoss(-1.0, noisy=True)(LOGITS, LABELS, sample_weight=v),
    ]),
    "losses of `robust_weights`": ("gradient", (2,), [
        lambda v: functional.robust_weights(v, -1.0, 0.5)[0][0],
        lambda v: functional.robust_weights(v, -1.0, 0.5)[1],
    ]),
    "hidden": ("gradient", (2, 3), [lambda v: ab.LinearABLoss(lam=0.5)(v, LINEAR, LABELS), lambda v: pure(input=v)]),
    "linear_weight": ("gradient", (3, 3), [
        lambda v: ab.LinearABLoss(lam=0.5)(LOGITS, v, LABELS),
        lambda v: pure(linear_weight=v),
    ]),
    "bias": ("gradient", (3,), [
        lambda v: ab.LinearABLoss(lam=0.5)(LOGITS, LINEAR, LABELS, v),
        lambda v: pure(linear_bias=v),
    ]),
    "score": ("constant", (2,), [
        lambda v: ab.ABLoss(lam=0.5)(LOGITS, LABELS, score=v),
        lambda v: ab.LinearABLoss(lam=0.5)(LOGITS, LINEAR, LABELS, score=v),
        lambda v: ab.ABLoss(rule=proportional)(LOGITS, LABELS, score=v),
    ]),
    "log_s": ("constant", (), [
        lambda v: functional.robust_weights(plain(2), v, 0.5)[0].sum(),
        lambda v: pure(log_s=v),
    ]),
    "losses of a rule": ("constant", (4,), [
        lambda v: weights.cvar(v, beta=0.5),
        lambda v: weights.chi2(v, rho=0.5),
        lambda v: weights.term(v, t=1.0),
        lambda v: meta.rectified(v),
    ]),
    "weight": ("refused", (3,), [
        lambda v: functional.logit_loss(LOGITS, LABELS, weight=v),
        lambda v: functional.logit_loss(LOGITS, LOGITS.softmax(1), weight=v),
        lambda v: ab.CrossEntropy(v),
        lambda v: repository.Focal(weight=v),
        lambda v: ab.DRW(ab.CrossEntropy(), v, start=1),
        lambda v: ab.ABLoss(nn.CrossEntropyLoss(v, reduction="none"), lam=0.5)(LOGITS, LABELS),
        lambda v: ab.LinearABLoss(nn.CrossEntropyLoss(v, reduction="none"), lam=0.5)(LOGITS, LINEAR, LABELS),
        lambda v: pure(weight=v),
    ]),
    "scale": ("refused", (3,), [lambda v: functional.logit_loss(LOGITS, LABELS, scale=v)]),
    "shift": ("refused", (3,), [lambda v: functional.logit_loss(LOGITS, LABELS, shift=v)]),
    "margin": ("refused", (3,), [lambda v: functional.logit_loss(LOGITS, LABELS, margin=v)]),
    "cls_num_list": ("refused", (3,), [
        lambda v: ab.VS(v),
        lambda v: ab.class_balanced_weights(v),
        lambda v: ab.adrw_weights(v, 1.0),
    ]),
    "lam": ("refused", (), [
        lambda v: ab.ABLoss(lam=v),
        lambda v: ab.ABLoss(lam=0.5).set_lam(v),
        lambda v: functional.robust_weights(plain(2), -1.0, v),
        lambda v: pure(lam=v),
        lambda v: ab.RelativeLam(v),
        lambda v: ab.TargetESS(v),
        lambda v: ab.TargetESS(sign=v.sign()),
        lambda v: functional.weighted_momentum_step_([], None, [], plain(2), -1.0, lam=v, lr=0.1),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("name, number", [(name, i) for name, row in TABLE.items() for i in range(len(row[2]))])
def test_what_requires_grad(name, number):
    """Every argument gets a gradient, is a documented constant, or is refused in torch's words."""
    answer, shape, calls = TABLE[name]
    value, f = plain(*shape).requires_grad_(), calls[number]
    if answer == "refused":
        with pytest.raises(
            RuntimeError, match=f"not differentiable with respect to argument '({name}|r|share|sign)'.*requires_grad.*detach"
        ):
            f(value)
        with torch.no_grad():
            f(value)
        f(value.detach())
    elif answer == "constant":
        assert not f(value).requires_grad
    else:
        (slope,) = torch.autograd.grad(f(value), value)
        assert slope.abs().max() > 0


def test_the_words_are_torchs():
    """A torch that puts it in other words, or that differentiates by class weights, asks for another look."""
    with pytest.raises(
        RuntimeError, match="not differentiable with respect to argument 'weight'.*cannot have requires_grad True"
    ):
        F.cross_entropy(LOGITS, LABELS, weight=plain(3).requires_grad_())


def test_the_slope_of_reference():
    """reference.soft_target_slope, which kernels rely on, against autograd of the same file."""
    x, t, _ = tensors()
    options = dict(scale=V, shift=V - 1, weight=V.flip(0), label_smoothing=0.2)
    value = reference.logit_loss(x, t, **options)
    close(torch.autograd.grad(value.sum(), t)[0], reference.soft_target_slope(x, t, **options))
