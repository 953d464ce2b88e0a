"""Deferred normalisation (MATH section 5) in one process: micro-batches of one optimizer step against one big batch."""

import copy
import io
import math
import pickle
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import identity
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import absgd_fast as ab
from absgd_fast import _backend

INF, NAN = math.inf, math.nan
# Uneven micro-batches of 21 rows: the first two have no row, and all of the fourth (3 rows) are ignored.
SIZES = (0, 0, 7, 3, 5, 6)
IGNORED = slice(7, 10)
# Ours, torch's, arguments. eps is far above the rounding of a gradient: Adam's first steps are lr g / (|g| + eps), and a g that is
# nothing but rounding would be a whole step.
PAIRS = {
    "ABSGD": (ab.ABSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.01)),
    "ABAdam": (ab.ABAdam, torch.optim.Adam, dict(lr=0.005, eps=1e-4)),
    "ABAdamW": (ab.ABAdamW, torch.optim.AdamW, dict(lr=0.005, eps=1e-4, amsgrad=True)),
    "ABRMSprop": (ab.ABRMSprop, torch.optim.RMSprop, dict(lr=0.005, eps=1e-4, momentum=0.9, centered=True)),
    "ABAdagrad": (ab.ABAdagrad, torch.optim.Adagrad, dict(lr=0.05, eps=1e-4)),
}
# How a step is finished: inside ours, or by finish_ before ours or torch's
WAYS = {
    **{f"{name}-robust": (name, "robust") for name in PAIRS},
    **{f"{name}-finish": (name, "finish") for name in PAIRS},
    "SGD-finish": ("ABSGD", "torch"),
    "Adam-finish": ("ABAdam", "torch"),
}
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Loops of a few numbers: two threads of torch's would mostly wait for each other."""
    threads(1)


def network(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 4)).to(dtype)


def batch(step, dtype=torch.float64):
    """Losses of another size in each step, so that log s has somewhere to move."""
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(sum(SIZES), 5, generator=draw, dtype=torch.float64) * (0.5 + step % 3 / 2)
    y = torch.randint(4, (sum(SIZES),), generator=draw)
    y[IGNORED] = -100
    return x.to(dtype), y


def micro(*tensors):
    return zip(*(t.split(SIZES) for t in tensors))


def vector(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def distance(a, b):
    """Relative error of a whole vector."""
    return float((a - b).norm() / b.norm())


def snapshot(net, optimizer):
    """Parameters, states and counts of steps, to compare to the bit."""
    return copy.deepcopy([list(net.parameters()), optimizer.state_dict()["state"]])


def same(a, b):
    """Equal to the bit, NaN included, through lists and dicts."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


class Run:
    """A network in training: deferred, in micro-batches, finished in one of the WAYS; or (no way) plain and in one batch."""

    def __init__(self, way=None, *, optimizer="ABSGD", dtype=torch.float64, clip=None, backend=None, criterion=None, **options):
        self.dtype, self.clip, self.deferred = dtype, clip, way is not None
        name, self.how = WAYS[way] if self.deferred else (optimizer, "torch")
        self.net = network(dtype)
        options = {"lam": 0.5} | options | ({"deferred": True} if self.deferred else {})
        self.criterion = ab.ABLoss(criterion, backend=backend, **options)
        if dtype == torch.float64:
            self.criterion.double()
        ours, theirs, given = PAIRS[name]
        if self.how == "torch":
            self.optimizer = theirs(self.net.parameters(), **given)
        else:
            robust = {"robust": self.criterion} if self.how == "robust" else {}
            self.optimizer = ours(self.net.parameters(), **given, **robust, backend=backend)
        self.norms = []

    @classmethod
    def plain(cls, way, **options):
        """One big batch and torch's optimizer beside this way."""
        return cls(optimizer=WAYS[way][0], **options)

    def accumulate(self, x, y, wrap=lambda loss: loss):
        self.optimizer.zero_grad()
        for some in micro(x, y) if self.deferred else [(x, y)]:
            wrap(self.criterion(self.net(some[0]), some[1])).backward()

    def settle(self):
        """What stands between the last backward and the step."""
        counts = self.criterion.finish_(self.net.parameters()) if self.deferred and self.how != "robust" else None
        if self.clip is not None:
            self.norms.append(float(nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)))
        return counts

    def step(self, step, spoil=lambda x, y: None):
        x, y = batch(step, self.dtype)
        spoil(x, y)
        self.accumulate(x, y)
        counts = self.settle()
        self.optimizer.step()
        return counts


def assert_alike(run, plain, rtol=1e-11):
    assert distance(vector(run.net), vector(plain.net)) <= rtol
    np.testing.assert_allclose(run.criterion.log_s, plain.criterion.log_s, rtol=rtol, atol=rtol)
    assert run.criterion.nonfinite_batches == plain.criterion.nonfinite_batches


# ---- micro-batches are one batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way, clip", [(way, clip) for way in WAYS for clip in (None, 1.0) if clip is None or WAYS[way][1] != "robust"]
)
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_twenty_steps(one_backend, way, clip, dtype, limit):
    """Parameters after 20 steps against one big batch per step, the plain loss and torch's optimizer."""
    run = Run(way, dtype=dtype, clip=clip, backend=one_backend)
    plain = Run.plain(way, dtype=dtype, clip=clip, backend=one_backend)
    start = vector(plain.net)
    for step in range(20):
        assert run.step(step) in (None, True)
        plain.step(step)
    assert distance(start, vector(plain.net)) > 0.05
    if clip is not None:
        assert min(plain.norms) < clip < max(plain.norms)  # some steps are clipped and some are not
        np.testing.assert_allclose(run.norms, plain.norms, rtol=10 * limit)
    assert distance(vector(run.net), vector(plain.net)) <= limit
    np.testing.assert_allclose(run.criterion.log_s, plain.criterion.log_s, rtol=2 * limit)
    assert run.criterion.log_s.dtype == dtype and int(run.criterion.nonfinite_batches) == 0


@pytest.mark.parametrize(
    "options",
    [dict(normalizer="batch"), dict(normalizer="none", lam=-1.0), dict(init="zero"), dict(init="zero", alpha=0.3, gamma=0.2),
     dict(lam=-0.5), dict(lam=INF), dict(lam=-INF), dict(gamma=1.0), dict(gamma=0.1), dict(alpha=0.4),
     dict(normalizer="batch", alpha=0.4, lam=-2.0)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("way", ["ABSGD-robust", "ABSGD-finish"])
def test_options(one_backend, way, options):
    """The gradient itself (of finish_), the parameters and log s, in the first step and in later ones."""
    run, plain = Run(way, backend=one_backend, **options), Run.plain(way, backend=one_backend, **options)
    for step in range(4):
        run.step(step)
        plain.step(step)
        if run.how == "finish":
            assert distance(gradient(run.net), gradient(plain.net)) <= 1e-12
        assert_alike(run, plain)


def weighted(logits, target, factor):
    return factor * F.cross_entropy(logits, target, reduction="none", ignore_index=-100)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)], ids=str)
def test_any_criterion_and_all_arguments(one_backend, order, rng):
    """A function of three arguments, with sample_weight, mask and score; which micro-batch comes first does not matter."""
    net, parts = network(), [(0, 0), (0, 7), (7, 15), (15, 21)]
    x, y = batch(0)
    y[IGNORED] = 1
    rows = [torch.tensor(rng.uniform(0.5, 2, 21)) for _ in range(3)]
    mask = torch.tensor(rng.random(21) < 0.7)
    outcomes = []
    for deferred in (False, True):
        criterion = ab.ABLoss(weighted, lam=0.5, deferred=deferred, backend=one_backend).double()
        criterion.log_s.fill_(0.7)
        net.zero_grad()
        for start, end in [parts[k] for k in order] if deferred else [(0, 21)]:
            cut = slice(start, end)
            loss = criterion(net(x[cut]), y[cut], rows[0][cut], sample_weight=rows[1][cut], score=rows[2][cut], mask=mask[cut])
            loss.backward()
        if deferred:
            criterion.finish_(net.parameters())
        outcomes.append([gradient(net), criterion.log_s.clone()])
    torch.testing.assert_close(*outcomes, rtol=1e-12, atol=1e-14)


def test_every_loss(one_backend, case, rng):
    """(B, C, d) logits of the whole table, in micro-batches of 3, 0 and 5 samples."""
    layer = nn.Linear(6, 5 * 4).double()
    x, target = torch.tensor(rng.normal(size=(8, 6))), torch.tensor(rng.integers(0, 5, (8, 4)))
    outcomes = []
    for deferred in (False, True):
        criterion = ab.ABLoss(case.module(5, backend=one_backend), lam=0.6, deferred=deferred, backend=one_backend).double()
        layer.zero_grad()
        for _ in range(2):
            layer.zero_grad()
            for part in (slice(3), slice(0), slice(3, 8)) if deferred else (slice(8),):
                criterion(layer(x[part]).view(-1, 5, 4), target[part]).backward()
            if deferred:
                assert criterion.finish_(layer.parameters())
        outcomes.append([gradient(layer), criterion.log_s.clone()])
    torch.testing.assert_close(*outcomes, rtol=1e-11, atol=1e-13)


options = st.fixed_dictionaries(
    {
        "lam": st.sampled_from([-0.5, 0.25, 2.0, -5.0, INF, -INF]),
        "gamma": st.sampled_from([0.9, 0.5, 0.1, 1.0]),
        "alpha": st.sampled_from([0.4, 1.0]),
        "init": st.sampled_from(["first", "zero"]),
        "normalizer": st.sampled_from(["moving", "batch", "none"]),
    }
)
arguments = st.fixed_dictionaries({k: st.booleans() for k in ("sample_weight", "mask", "score")})


@given(
    options=options,
    call=arguments,
    sizes=st.lists(st.sampled_from([0, 1, 3, 17]), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_forward_and_gradient_are_the_oracles(backend, entry, options, call, sizes, seed):
    """m, the value sum exp(z - m) L, then gradient, weights and log s of the batch of all rows; two steps in a row."""
    rng = np.random.default_rng(seed)
    criterion = ab.ABLoss(entry.criterion(backend), deferred=True, backend=backend, **options).double()
    exact = oracle.ABLoss(**options)
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for size, end in zip(sizes, ends)]
    for _ in range(2):
        losses = torch.tensor(rng.exponential(1.0, ends[-1]) + 0.01)
        valid = rng.random(ends[-1]) < 0.6 if call["mask"] else np.ones(ends[-1], bool)
        extra = {k: torch.tensor(rng.random(ends[-1]) * 2) for k in ("sample_weight", "score") if call[k]}
        m, leaves = None, []
        for part in parts:
            rows = {k: v[part] for k, v in extra.items()}
            leaf, args, more = entry.inputs(losses[part], valid[part] if call["mask"] else None)
            value = criterion(*args, **more, **rows)
            value.backward()
            leaves.append(leaf)
            if m is None and valid[part].any():
                rule = {"mask": valid[part], "score": rows.get("score")} | exact.options
                m = oracle.robust_weights(losses[part], exact.log_s, exact.lam, **rule).norm
            wanted = 0.0
            if m is not None:
                z = (rows.get("score", losses[part]) / exact.lam)[valid[part]] if math.isfinite(exact.lam) else torch.zeros(())
                terms = (z - m).exp() * (rows.get("sample_weight", torch.ones(())) * losses[part])[valid[part]]
                wanted = float(terms.sum())
            assert value.dtype == torch.float64 and value.item() == pytest.approx(wanted, rel=1e-10, abs=1e-12)
        before = criterion.log_s.clone()
        forward = exact(losses, mask=valid, **extra)
        assert torch.equal(before, criterion.log_s)  # not before the step
        counts = criterion.finish_(leaves)
        assert counts.dtype == torch.bool and counts.shape == () and counts
        slope = torch.cat([entry.slope(leaf, losses[part]) for leaf, part in zip(leaves, parts)])
        close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
        close(slope, forward.grad)
        close(criterion.log_s, exact.log_s)
        close(criterion.last.weights, forward.weights[parts[-1]])
        close(criterion.last.losses[valid[parts[-1]]], losses[parts[-1]][valid[parts[-1]]])


def test_losses_of_masked_rows_read_as_zero(one_backend):
    for deferred in (False, True):
        criterion = ab.ABLoss(identity, lam=0.5, deferred=deferred, backend=one_backend)
        criterion(torch.tensor([1.0, 2.0, 3.0]), mask=torch.tensor([True, False, True]))
        assert criterion.last.losses.tolist() == [1.0, 0.0, 3.0]


def test_reference_point_by_hand(backend):
    """lam = 1, gamma = 3/4, s = 2: m = log(1/4 2 + 3/4 4) = log 3.5, although the second micro-batch has other losses."""
    criterion = ab.ABLoss(identity, lam=1.0, gamma=0.75, deferred=True, backend=backend).double()
    criterion.log_s.fill_(math.log(2))
    leaf = torch.tensor([2.0, 6.0, 1.0, 1.0], dtype=torch.float64).log().requires_grad_()
    values = [criterion(leaf[:0]), criterion(leaf[:2]), criterion(leaf[2:])]
    assert values[0] == 0
    assert values[1].item() == pytest.approx((2 * math.log(2) + 6 * math.log(6)) / 3.5, rel=1e-14)
    assert values[2].item() == 0  # log 1
    sum(values).backward()
    assert leaf.grad.tolist() == pytest.approx([2 / 3.5, 6 / 3.5, 1 / 3.5, 1 / 3.5], rel=1e-14)
    assert criterion.finish_(leaf)
    s = 0.25 * 2 + 0.75 * 2.5
    assert float(criterion.log_s) == pytest.approx(math.log(s), rel=1e-14)
    assert leaf.grad.tolist() == pytest.approx([2 / s / 4, 6 / s / 4, 1 / s / 4, 1 / s / 4], rel=1e-13)
    assert criterion.last.weights.tolist() == pytest.approx([1 / s, 1 / s], rel=1e-13)


def test_weights_before_and_after_the_step(one_backend):
    """`last` of the last micro-batch: its rows' share of the big batch, once log s is settled; ess and mean_loss at any time."""
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)
    for step in range(2):
        run.step(step)
        plain.step(step)
        rows = slice(21 - SIZES[-1], 21)
        torch.testing.assert_close(run.criterion.last.weights, plain.criterion.last.weights[rows], rtol=1e-12, atol=0)
        w, losses = plain.criterion.last.weights[rows], plain.criterion.last.losses[rows]
        torch.testing.assert_close(run.criterion.last.ess, w.sum() ** 2 / (w**2).sum())
        torch.testing.assert_close(run.criterion.last.mean_loss, losses.mean())
        torch.testing.assert_close(run.criterion.objective, plain.criterion.objective)


@pytest.mark.parametrize("r", [-0.5, 0.4])
def test_relative_lam_takes_the_first_micro_batch(one_backend, r):
    """That is the first batch it is used on; the first two here are empty."""
    run, plain = Run("ABSGD-finish", lam=ab.RelativeLam(r), backend=one_backend), Run.plain("ABSGD-finish", backend=one_backend)
    x, y = batch(0)
    plain.criterion.set_lam(r * F.cross_entropy(plain.net(x[:7]), y[:7]).item())
    for step in range(3):
        run.step(step)
        plain.step(step)
        assert_alike(run, plain)
    assert float(run.criterion.lam) == pytest.approx(float(plain.criterion.lam), rel=1e-12)


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABSGD-finish"])
def test_two_stages_and_set_lam_between_steps(one_backend, way):
    runs = [Run(way, backend=one_backend), Run.plain(way, backend=one_backend)]
    schedules = [ab.TwoStage(run.criterion, lam=-0.7, start=2, unit="step") for run in runs]
    for step in range(6):
        for run, schedule in zip(runs, schedules):
            if step == 4:
                run.criterion.set_lam(1.5, reset=False)
            run.step(step)
            schedule.step()
        assert_alike(*runs)


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-robust", "SGD-finish"])
def test_steps_of_nothing(one_backend, way):
    """Micro-batches without any row: the step that an empty batch makes, in which momentum goes on; log s stays."""
    run, plain = Run(way, backend=one_backend), Run.plain(way, backend=one_backend)

    def ignore(x, y):
        y.fill_(-100)

    for step in range(5):
        spoil = ignore if step in (0, 3) else lambda x, y: None
        assert run.step(step, spoil) in (None, True)
        plain.step(step, spoil)
        assert_alike(run, plain)


def test_one_micro_batch_is_the_plain_loss(one_backend):
    run, plain = Run("ABSGD-finish", backend=one_backend), Run.plain("ABSGD-finish", backend=one_backend)
    for step in range(3):
        for one in (run, plain):
            x, y = batch(step)
            one.optimizer.zero_grad()
            one.criterion(one.net(x), y).backward()
            one.settle()
            one.optimizer.step()
        assert_alike(run, plain, 1e-13)


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-robust", "ABAdagrad-finish"])
def test_bfloat16_parameters(one_backend, way):
    """As far as two ways to sum bfloat16 gradients agree: 2^-8 of a gradient, a few steps of 0.01 to 0.1 of the parameters."""
    run, plain = (make(way, dtype=torch.bfloat16, backend=one_backend) for make in (Run, Run.plain))
    for step in range(5):
        run.step(step)
        plain.step(step)
        assert all(p.grad.dtype == torch.bfloat16 for p in run.net.parameters())
    assert run.criterion.log_s.dtype == torch.float32
    assert distance(vector(run.net).double(), vector(plain.net).double()) <= 1e-2
    assert float(run.criterion.log_s) == pytest.approx(float(plain.criterion.log_s), abs=2e-2)


# ---- what surrounds a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-finish"])
def test_robust_leaves_the_gradients_and_finish_scales_them(one_backend, way):
    run = Run(way, backend=one_backend)
    run.accumulate(*batch(0))
    raw = gradient(run.net).clone()
    run.settle()
    finished = gradient(run.net).clone()
    run.optimizer.step()
    assert torch.equal(gradient(run.net), raw if run.how == "robust" else finished)
    assert (distance(finished, raw) > 0.5) == (run.how == "finish")


@pytest.mark.parametrize("mode", ["eval", "no_grad", "inference_mode", "update=False"])
@pytest.mark.parametrize("way", ["ABSGD-robust", "ABSGD-finish"])
def test_evaluation_defers_nothing(one_backend, way, mode):
    """Between two micro-batches and between two steps: the whole loss at once, and the training is as if it had not been."""
    run, undisturbed = Run(way, backend=one_backend), Run(way, backend=one_backend)
    plain = Run.plain(way, backend=one_backend)
    x, y = batch(77)

    def evaluate(one):
        if mode == "eval":
            value = one.criterion.eval()(run.net(x), y)
            one.criterion.train()
        elif mode == "update=False":
            value = one.criterion(run.net(x), y, update=False)
        else:
            with getattr(torch, mode)():
                value = one.criterion(run.net(x), y)
        return value

    for step in range(3):
        before = run.criterion.log_s.clone()
        run.optimizer.zero_grad()
        for some in micro(*batch(step)):
            plain.criterion.log_s.copy_(before)
            value, wanted = evaluate(run), evaluate(plain)
            torch.testing.assert_close(value, wanted, rtol=1e-13, atol=0)
            torch.testing.assert_close(run.criterion.last.weights, plain.criterion.last.weights, rtol=1e-13, atol=0)
            if mode == "update=False":  # its gradient has its size
                slopes = [torch.autograd.grad(v, run.net[0].weight)[0] for v in (value, wanted)]
                torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)
            run.criterion(run.net(some[0]), some[1]).backward()
            assert torch.equal(run.criterion.log_s, before)
        run.settle()
        run.optimizer.step()
        evaluate(run)
        undisturbed.step(step)
        assert torch.equal(vector(run.net), vector(undisturbed.net))
        assert torch.equal(run.criterion.log_s, undisturbed.criterion.log_s)
    fresh = Run("ABSGD-finish", backend=one_backend)
    evaluate(fresh)
    with pytest.raises(RuntimeError, match="no forward in training mode"):
        fresh.criterion.finish_(fresh.net.parameters())


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-robust", "ABAdagrad-robust", "SGD-finish", "Adam-finish"])
def test_state_dict_between_steps(one_backend, way):
    """Saved to a file after two steps and loaded into new objects, the training goes on to the bit."""
    run, other = Run(way, backend=one_backend), Run(way, backend=one_backend, gamma=0.9)
    for step in range(2):
        run.step(step)
    file = io.BytesIO()
    torch.save({k: getattr(run, k).state_dict() for k in ("net", "criterion", "optimizer")}, file)
    file.seek(0)
    other.step(5)  # whatever was before is gone
    for name, saved in torch.load(file).items():
        getattr(other, name).load_state_dict(saved)
    for step in range(2, 5):
        run.step(step)
        other.step(step)
        assert torch.equal(vector(run.net), vector(other.net)) and torch.equal(run.criterion.log_s, other.criterion.log_s)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-robust", "ABAdam-finish"])
def test_copies_stay_linked(one_backend, way, copied):
    """A copied optimizer finishes the copied criterion: both go their way to the bit, and neither moves the other."""
    run, undisturbed = Run(way, backend=one_backend), Run(way, backend=one_backend)
    for one in (run, undisturbed):
        one.step(0)
    twin = copied(run)
    if run.how == "robust":
        assert twin.optimizer.robust is twin.criterion and twin.criterion is not run.criterion
    for one in (twin, undisturbed, run):
        one.step(1)
        one.step(2)
    for one in (twin, run):
        assert same(snapshot(one.net, one.optimizer), snapshot(undisturbed.net, undisturbed.optimizer))
        assert torch.equal(one.criterion.log_s, undisturbed.criterion.log_s)


def test_deepcopy_between_micro_batches(one_backend):
    """With its gradients, which torch does not copy with parameters, the copy ends the step that the original began."""
    run = Run("ABSGD-robust", backend=one_backend)
    run.step(0)
    parts = list(micro(*batch(1)))
    run.optimizer.zero_grad()
    for some in parts[:4]:
        run.criterion(run.net(some[0]), some[1]).backward()
    twin = copy.deepcopy(run)
    for p, q in zip(run.net.parameters(), twin.net.parameters()):
        q.grad = p.grad.clone()
    for one in (run, twin):
        for some in parts[4:]:
            one.criterion(one.net(some[0]), some[1]).backward()
        one.optimizer.step()
    assert torch.equal(vector(run.net), vector(twin.net)) and torch.equal(run.criterion.log_s, twin.criterion.log_s)


@pytest.mark.parametrize("how", ["robust", "finish"])
@pytest.mark.parametrize("bad", [False, True])
def test_two_optimizers_share_a_criterion(one_backend, how, bad):
    """Weights to one and biases to another of other settings; a row that is not finite skips both."""
    plain = Run(backend=one_backend)
    net, criterion = network(), ab.ABLoss(lam=0.5, deferred=True, backend=one_backend).double()

    def pair(net, first, second, **more):
        weights, biases = ([p for p in net.parameters() if p.dim() == d] for d in (2, 1))
        return [first(weights, lr=0.1, momentum=0.9, **more), second(biases, lr=0.01, eps=1e-4, **more)]

    more = {"robust": criterion} if how == "robust" else {}
    ours = pair(net, ab.ABSGD, ab.ABAdam, backend=one_backend, **more)
    theirs = pair(plain.net, torch.optim.SGD, torch.optim.Adam)
    for step in range(4):
        x, y = batch(step)
        if bad and step == 1:
            x[12] = NAN
        net.zero_grad()
        for some in micro(x, y):
            criterion(net(some[0]), some[1]).backward()
        if how == "finish":
            criterion.finish_(net.parameters())
        for optimizer in ours:
            optimizer.step()
        plain.net.zero_grad()
        plain.criterion(plain.net(x), y).backward()
        for optimizer in theirs if not (bad and step == 1) else []:
            optimizer.step()
        assert distance(vector(net), vector(plain.net)) <= 1e-12
        assert torch.equal(criterion.nonfinite_batches, plain.criterion.nonfinite_batches)
        assert float(criterion.log_s) == pytest.approx(float(plain.criterion.log_s), rel=1e-12)


@pytest.mark.parametrize(
    "ours, theirs",
    [(partial(ab.ABSGD, lr=0.1, momentum=0), partial(torch.optim.SGD, lr=0.1)),
     (partial(ab.ABAdagrad, lr=0.1), partial(torch.optim.Adagrad, lr=0.1)),
     (None, partial(torch.optim.SGD, lr=0.1)), (None, partial(torch.optim.SparseAdam, lr=0.01, eps=1e-4))],
    ids=["ABSGD-robust", "ABAdagrad-robust", "SGD-finish", "SparseAdam-finish"],
)  # fmt: skip
def test_sparse_gradients(one_backend, ours, theirs):
    """Rows of a table that come in several micro-batches, and several times in one."""
    tables = []
    for _ in range(2):
        torch.manual_seed(2)
        tables.append(nn.Embedding(9, 4, sparse=True).double())
    criterions = [ab.ABLoss(lam=0.5, deferred=d, backend=one_backend).double() for d in (False, True)]
    plain = theirs(tables[0].parameters())
    optimizer = (
        ours(tables[1].parameters(), robust=criterions[1], backend=one_backend) if ours else theirs(tables[1].parameters())
    )
    for step in range(4):
        draw = torch.Generator().manual_seed(step)
        words = torch.randint(9, (sum(SIZES),), generator=draw)
        target = torch.randint(4, (sum(SIZES),), generator=draw)
        for one in (plain, optimizer):
            one.zero_grad()
        criterions[0](tables[0](words), target).backward()
        for some in zip(words.split(SIZES[2:]), target.split(SIZES[2:])):
            criterions[1](tables[1](some[0]), some[1]).backward()
        assert tables[1].weight.grad.is_sparse
        if not ours:
            assert criterions[1].finish_(tables[1].weight) and tables[1].weight.grad.is_sparse
        plain.step()
        optimizer.step()
        assert distance(tables[1].weight.detach(), tables[0].weight.detach()) <= 1e-12


def test_evaluation_between_two_optimizers(one_backend):
    """update=False defers nothing, so neither does it end the step that the second optimizer still has to take."""
    outcomes = []
    for looks in (False, True):
        net, criterion = network(), ab.ABLoss(lam=0.5, deferred=True, backend=one_backend).double()
        optimizers = [ab.ABSGD(layer.parameters(), lr=0.1, robust=criterion, backend=one_backend) for layer in (net[0], net[2])]
        x, y = batch(0)
        criterion(net(x), y).backward()
        optimizers[0].step()
        if looks:
            criterion(net(x), y, update=False)
        optimizers[1].step()
        outcomes.append(vector(net))
    assert torch.equal(*outcomes)


def test_closure(one_backend):
    """The closure's micro-batches are those of the step."""
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)
    for step in range(3):

        def closure(step=step):
            run.accumulate(*batch(step))
            return step

        assert run.optimizer.step(closure) == step
        plain.step(step)
        assert_alike(run, plain)


def test_sharpness_aware(one_backend):
    """SAM: the gradient at a point uphill of the first, by a forward with update=False, which is the whole loss. So finish_."""
    run, plain = Run("ABSGD-finish", backend=one_backend), Run.plain("ABSGD-finish", backend=one_backend)
    for step in range(3):
        for one in (run, plain):
            x, y = batch(step)
            one.accumulate(x, y)
            one.settle()
            way = gradient(one.net)
            uphill = [0.05 * p.grad / way.norm() for p in one.net.parameters()]
            torch._foreach_add_([p.data for p in one.net.parameters()], uphill)
            one.optimizer.zero_grad()
            one.criterion(one.net(x), y, update=False).backward()
            torch._foreach_sub_([p.data for p in one.net.parameters()], uphill)
            one.optimizer.step()
        assert_alike(run, plain)


def test_a_step_without_a_micro_batch_takes_the_gradients_as_they_are(one_backend):
    """Between them, training by another loss: no scale of the robust one is left over."""
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)
    for one in (run, plain):
        x, y = batch(0)
        F.cross_entropy(one.net(x), y).backward()
        one.optimizer.step()
    assert_alike(run, plain)


@pytest.mark.parametrize("bad", [False, True])
def test_gradients_of_another_loss_between_robust_steps(one_backend, bad):
    """They have their size, and the last step's scale is none of theirs."""
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)
    run.step(0)
    plain.step(0)
    if bad:
        run.step(9, SPOILS["nan"])
        plain.criterion.nonfinite_batches += 1
    x, y = batch(1)
    for one in (run, plain):
        one.optimizer.zero_grad()
        F.cross_entropy(one.net(x), y).backward()
        one.optimizer.step()
    assert_alike(run, plain)


def test_finish_takes_a_tensor_a_generator_and_parameters_without_gradient(one_backend):
    for form in (lambda w, other: w, lambda w, other: iter([other, w]), lambda w, other: {w: 0, other: 0}.keys()):
        criterion = ab.ABLoss(identity, lam=1.0, deferred=True, backend=one_backend)
        w, other = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
        criterion(w).backward()
        criterion(w[:1]).backward()
        assert criterion.finish_(form(w, other))
        assert other.grad is None
        torch.testing.assert_close(w.grad, torch.tensor([0.5, 0.25, 0.25]))


def test_a_loaded_state_between_backward_and_step(one_backend):
    """Gradients that nothing can bring to their size any more: an error, and nothing is written."""
    run = Run("ABSGD-robust", backend=one_backend)
    run.step(0)
    run.accumulate(*batch(1))
    before = snapshot(run.net, run.optimizer)
    with pytest.raises(RuntimeError):
        run.criterion.load_state_dict(run.criterion.state_dict())
        run.optimizer.step()
    assert same(snapshot(run.net, run.optimizer), before)


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABSGD-finish"])
def test_set_lam_in_the_middle_of_a_step_is_refused(one_backend, way):
    """The step goes on as it was."""
    run, plain = Run(way, backend=one_backend), Run.plain(way, backend=one_backend)
    for step in range(2):
        run.accumulate(*batch(step))
        before = [run.criterion.log_s.clone(), run.criterion.lam.clone()]
        for lam in (0.25, ab.RelativeLam(0.3)):
            with pytest.raises(RuntimeError, match="set_lam.*middle of a deferred step.*discard"):
                run.criterion.set_lam(lam)
        assert same([run.criterion.log_s, run.criterion.lam], before)
        run.settle()
        run.optimizer.step()
        plain.step(step)
        assert_alike(run, plain)


def test_a_schedule_in_the_middle_of_a_step_is_refused():
    """After the step it does what it was refused."""
    run = Run("ABSGD-robust")
    schedule = ab.TwoStage(run.criterion, lam=0.25, start=1)
    run.accumulate(*batch(0))
    with pytest.raises(RuntimeError, match="middle of a deferred step"):
        schedule.step()
    run.optimizer.step()
    schedule.step()
    assert float(run.criterion.lam) == 0.25


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-finish"])
def test_discard(one_backend, way):
    """A step given up half-way is forgotten, a spike in it included: what follows is as if it had not been begun."""
    run, undisturbed = Run(way, backend=one_backend), Run(way, backend=one_backend)
    for step in range(3):
        x, y = batch(7)
        SPOILS["spike" if step == 1 else "nan"](x, y)
        run.accumulate(x, y)
        run.criterion.discard()
        with pytest.raises(RuntimeError, match="no forward"):
            run.criterion.finish_(run.net.parameters())
        if step == 2:
            for one in (run, undisturbed):
                one.criterion.set_lam(-0.5)
        run.step(step)
        undisturbed.step(step)
        assert same(snapshot(run.net, run.optimizer), snapshot(undisturbed.net, undisturbed.optimizer))
        assert same(run.criterion.state_dict(), undisturbed.criterion.state_dict())
    ab.ABLoss(lam=0.5).discard()  # where nothing was begun there is nothing to forget


# ---- torch.compile ------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """torch.compile without code generation, and nothing left of it afterwards."""
    torch.compiler.reset()
    yield partial(torch.compile, backend="aot_eager")
    torch.compiler.reset()


@pytest.mark.parametrize(
    "backend, way",
    [(None, "ABSGD-robust"), (None, "ABAdam-robust"), (None, "ABSGD-finish"),
     pytest.param("reference", "ABSGD-robust", marks=pytest.mark.slow)],
)  # fmt: skip
def test_compiled(backend, way, compiled):
    """Loss and step compiled, the kernels' in one graph each. A row that is not finite skips the step."""
    whole = backend is None and _backend.available("cpu")
    run, eager = Run(way, backend=backend), Run(way, backend=backend)
    loss, step = compiled(run.criterion, fullgraph=whole), compiled(run.optimizer.step, fullgraph=whole)
    for k in range(4):
        x, y = batch(k)
        if k == 2:
            x[12] = NAN
            before = vector(run.net)
        run.optimizer.zero_grad()
        for part in (slice(10), slice(10, None)):
            loss(run.net(x[part]), y[part]).backward()
        run.settle()
        step()
        eager.accumulate(x, y)
        eager.settle()
        eager.optimizer.step()
        assert_alike(run, eager)
        assert k != 2 or torch.equal(vector(run.net), before)


def test_compiled_for_many_micro_batches(compiled):
    leaf = torch.ones(3, requires_grad=True)
    criterion = ab.ABLoss(identity, lam=0.5, deferred=True)
    loss = compiled(criterion, fullgraph=True)
    for _ in range(12):
        loss(leaf * 1.0).backward()
    assert criterion.finish_(leaf)


def test_compiled_reference_point_of_an_empty_micro_batch(compiled):
    """Losses of 100 lambdas, whose exponentials fp32 does not hold, are no matter where all are like that."""
    criterion, plain = ab.ABLoss(identity, lam=0.5, deferred=True), ab.ABLoss(identity, lam=0.5)
    loss, leaf = compiled(criterion), torch.tensor([50.0, 51.0, 50.5], requires_grad=True)
    for part in (leaf[:0], leaf[:2], leaf[2:]):
        loss(part).backward()
    assert criterion.finish_(leaf)
    (wanted,) = torch.autograd.grad(plain(leaf), leaf)
    torch.testing.assert_close(leaf.grad, wanted)


# ---- rows that are not finite, and spikes -------------------------------------------------------------------------------


def not_finite(row, value):
    def spoil(x, y):
        x[row] = value

    return spoil


def spike(row):
    """A loss of hundreds of lambdas, where its micro-batch is not the first."""

    def spoil(x, y):
        x[row] = torch.linspace(-3e3, 3e3, 5)
        y[row] = 0

    return spoil


# of row 2, which is in the first micro-batch that has any, and row 12, which is in a later one
SPOILS = {"nan-first": not_finite(2, NAN), "nan": not_finite(12, NAN), "inf": not_finite(12, INF), "spike": spike(12)}


@each_way
@pytest.mark.parametrize("spoil", SPOILS)
def test_bad_steps_never_were(one_backend, way, spoil):
    """Parameters, states and counts stay as they are to the bit, log s too; the event is counted; the next step is as good as
    in a training that never had this one, be it the first."""
    run, undisturbed = Run(way, backend=one_backend), Run(way, backend=one_backend)
    for step in range(3):
        if step in (0, 2):
            before = [snapshot(run.net, run.optimizer), run.criterion.log_s.clone()]
            counts = run.step(9, SPOILS[spoil])
            assert same([snapshot(run.net, run.optimizer), run.criterion.log_s], before)
            assert int(run.criterion.nonfinite_batches) == 1 + step // 2
            if run.how != "robust":
                assert counts.dtype == torch.bool and counts.shape == () and not counts
                assert all(p.grad is None for p in run.net.parameters())
        run.step(step)
        undisturbed.step(step)
        assert same(snapshot(run.net, run.optimizer), snapshot(undisturbed.net, undisturbed.optimizer))
        assert torch.equal(run.criterion.log_s, undisturbed.criterion.log_s)


def test_several_bad_micro_batches_are_one_event(one_backend):
    run = Run("ABSGD-robust", backend=one_backend)

    def spoil(x, y):
        x[[2, 12, 13, 20]] = NAN

    run.step(0, spoil)
    assert int(run.criterion.nonfinite_batches) == 1 and float(run.criterion.log_s) == -INF


def test_a_spike_in_an_ignored_row_is_none(one_backend):
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)

    def spoil(x, y):
        spike(12)(x, y)
        y[12] = -100

    for one in (run, plain):
        one.step(0)
        one.step(1, spoil)
    assert_alike(run, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("lam", [0.5, -0.5])
@pytest.mark.parametrize("beyond", [59.0, 61.0])
@pytest.mark.parametrize("scored", [False, True])
def test_the_bound_of_spikes(backend, dtype, lam, beyond, scored):
    """z - m = 59 in a later micro-batch is a row like any other, 61 is not finite; a z far below m is no matter."""
    criterion = ab.ABLoss(identity, lam=lam, deferred=True, backend=backend).to(dtype)
    criterion.log_s.fill_(0.3)
    first, second = (
        torch.tensor([0.5, 1.0, 0.1], dtype=dtype),
        torch.tensor([0.7, -50.0, 2.0], dtype=dtype) * (1 if lam > 0 else -1),
    )
    m = oracle.robust_weights(first.double(), float(criterion.log_s), lam).norm
    second[2] = lam * (m + beyond)
    exact = oracle.ABLoss(lam)
    exact.log_s = float(criterion.log_s)
    wanted = exact(torch.cat([first, second]).double())
    leaves = [torch.ones_like(part, requires_grad=True) for part in (first, second)]
    values = []
    for leaf, part in zip(leaves, (first, second)):
        if scored:
            values.append(criterion(leaf, score=part))
        else:
            values.append(criterion(part + 0 * leaf + (leaf - 1)))  # d L / d leaf = 1
        values[-1].backward()
    counts = criterion.finish_(leaves)
    assert bool(counts) == (beyond < 60) == bool(values[1].isfinite())
    assert int(criterion.nonfinite_batches) == (beyond > 60)
    if beyond > 60:
        assert float(criterion.log_s) == pytest.approx(0.3) and all(leaf.grad is None for leaf in leaves)
        assert criterion.last.weights.isnan().tolist() == [False, False, True]
        return
    rtol = 1e-12 if dtype == torch.float64 else 2e-5  # the 24 bits of z = 60 leave 4e-6 of exp(z)
    np.testing.assert_allclose(torch.cat([leaf.grad for leaf in leaves]), wanted.grad, rtol=rtol, atol=1e-30)
    np.testing.assert_allclose(criterion.log_s, exact.log_s, rtol=rtol)


def test_no_spike_in_the_first_micro_batch(one_backend):
    """m comes from its rows, so none can be far beyond: a loss of 200 lambdas there is a row like any other."""
    criterion = ab.ABLoss(identity, lam=0.5, deferred=True, backend=one_backend).double()
    plain = ab.ABLoss(identity, lam=0.5, backend=one_backend).double()
    x = torch.tensor([0.5, 100.0, 0.7, 1.0], dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        criterion(x[:2]).backward()
        criterion(x[2:]).backward()
        assert criterion.finish_(x)
        (wanted,) = torch.autograd.grad(plain(x), x)
        torch.testing.assert_close(x.grad, wanted, rtol=1e-12, atol=1e-200)
        x.grad = None
    assert int(criterion.nonfinite_batches) == 0


# ---- loss scaling ------------------------------------------------------------------------------------------------------


@each_way
def test_grad_scaler(one_backend, way):
    """torch.amp.GradScaler, with an overflow in the third step and a NaN row in the fifth: what the plain loss and torch's
    optimizer do, step by step, the scale included. finish_ comes after unscale_."""
    run = Run(way, dtype=torch.float32, backend=one_backend)
    plain = Run.plain(way, dtype=torch.float32, backend=one_backend)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    for step in range(7):
        for one, scaler in zip((run, plain), scalers):
            x, y = batch(step, one.dtype)
            if step == 4:
                x[12] = NAN
            one.accumulate(x, y, scaler.scale)
            if step == 2:
                one.net[0].weight.grad[0, 0] = INF
            before = snapshot(one.net, one.optimizer)
            if one.how != "robust":
                scaler.unscale_(one.optimizer)
                one.settle()
            scaler.step(one.optimizer)
            scaler.update()
            assert same(snapshot(one.net, one.optimizer)[0], before[0]) == (step in (2, 4))
            assert same(snapshot(one.net, one.optimizer), before) == (step in (2, 4))
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_alike(run, plain, 1e-6)
    assert int(run.criterion.nonfinite_batches) == 1


@pytest.mark.parametrize("way", ["ABSGD-robust", "ABAdam-robust", "SGD-finish"])
def test_loss_divisor_deferred(one_backend, way):
    """A framework divides the loss by the six micro-batches before backward."""
    run, plain = Run(way, loss_divisor=6, backend=one_backend), Run.plain(way, backend=one_backend)
    for step in range(4):
        run.accumulate(*batch(step), lambda loss: loss / 6)
        run.settle()
        run.optimizer.step()
        plain.step(step)
        assert_alike(run, plain)


@pytest.mark.parametrize("divisor", [4, 3, 0.5])
@pytest.mark.parametrize("options", [{}, dict(mix=1.0), dict(max_weight=0.6), dict(lam=INF), dict(normalizer="none")], ids=str)
def test_loss_divisor_of_a_plain_loss(one_backend, entry, divisor, options, rng):
    """Value and gradient are those of the plain loss after the division; log s and the weights never knew. No multiple in
    evaluation, where nobody divides."""
    losses = torch.tensor(rng.exponential(1.0, 21) + 0.01)
    make = partial(ab.ABLoss, entry.criterion(one_backend), backend=one_backend, **({"lam": 0.5} | options))
    ours, plain = make(loss_divisor=divisor).double(), make().double()
    for _ in range(2):
        results = []
        for criterion, by in ((ours, divisor), (plain, 1)):
            leaf, args, more = entry.inputs(losses)
            value = criterion(*args, **more) / by
            value.backward()
            results.append([value.detach(), leaf.grad, criterion.log_s.clone(), criterion.last.weights, criterion.last.mean_loss])
        torch.testing.assert_close(*results, rtol=1e-13, atol=1e-15)
    with torch.no_grad():
        torch.testing.assert_close(ours(*args, **more), plain(*args, **more), rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.eval()(*args, **more), plain.eval()(*args, **more), rtol=1e-13, atol=0)


# ---- what is refused, and leaves everything as it was ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, named",
    [(dict(deferred=True, mix=0.5), "mix.*0.5"), (dict(deferred=True, max_weight=2.0), "max_weight.*2")]
    + [(dict(loss_divisor=value), f"loss_divisor.*{value}") for value in (0, -1, NAN, INF, "2", None)],
    ids=str,
)
def test_refused_options(options, named):
    with pytest.raises(ValueError, match=named):
        ab.ABLoss(lam=0.5, **options)


def test_refused_robust():
    w = [torch.zeros(2, requires_grad=True)]
    for name in PAIRS:
        make = partial(getattr(ab, name), lr=0.1)
        with pytest.raises(TypeError, match="not deferred.*deferred=True"):
            make(w, robust=ab.ABLoss(lam=0.5))
        with pytest.raises(TypeError, match="CrossEntropy.*deferred=True"):
            make(w, robust=ab.CrossEntropy())
        deferred = ab.ABLoss(lam=0.5, deferred=True)
        half = torch.zeros(2, dtype=torch.float16, requires_grad=True)
        with pytest.raises(ValueError, match="float16"):
            make([half], robust=deferred)
        optimizer = make(w, robust=deferred)
        with pytest.raises(ValueError, match="float16"):
            optimizer.add_param_group({"params": [half]})


def test_refused_float16_gradients(one_backend):
    """The network was cast after the optimizer was made."""
    net, criterion = network(torch.float32), ab.ABLoss(lam=0.5, deferred=True, backend=one_backend)
    optimizer = ab.ABSGD(net.parameters(), robust=criterion, backend=one_backend)
    x, y = batch(0, torch.float16)
    criterion(net.half()(x), y).backward()
    before = vector(net)
    with pytest.raises(ValueError, match="float16"):
        optimizer.step()
    assert torch.equal(vector(net), before) and float(criterion.log_s) == -INF


def test_refused_finish(one_backend):
    """Each with the word for what is wrong; neither gradients nor log s are touched."""
    criterion = ab.ABLoss(identity, lam=0.5, deferred=True, backend=one_backend)
    w = torch.tensor([0.5, 1.0, 3.0], requires_grad=True)
    with pytest.raises(RuntimeError, match="no forward"):
        criterion.finish_(w)
    criterion(w).backward()
    half = torch.ones(2, dtype=torch.float16, requires_grad=True)
    half.grad = torch.ones_like(half)
    raw = w.grad.clone()
    with pytest.raises(ValueError, match="float16"):
        criterion.finish_([w, half])
    assert torch.equal(w.grad, raw) and float(criterion.log_s) == -INF and torch.equal(half.grad, torch.ones_like(half))
    assert criterion.finish_([w])  # still there
    finished, log_s = w.grad.clone(), criterion.log_s.clone()
    with pytest.raises(RuntimeError, match="finished already"):
        criterion.finish_([w])
    assert torch.equal(w.grad, finished) and torch.equal(criterion.log_s, log_s)
    plain = ab.ABLoss(identity, lam=0.5, backend=one_backend)
    w.grad = None
    plain(w).backward()
    torch.testing.assert_close(w.grad, finished, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="not deferred"):
        plain.finish_(w)


@pytest.mark.parametrize("name", PAIRS)
def test_robust_after_finish_is_refused(one_backend, name):
    """Two scales on one gradient: nothing is written; the next step, finished once, is fine."""
    run = Run(f"{name}-robust", backend=one_backend)
    run.step(0)
    run.accumulate(*batch(1))
    assert run.criterion.finish_(run.net.parameters())
    before = [snapshot(run.net, run.optimizer), run.criterion.log_s.clone()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="finish_"):
            run.optimizer.step()
        assert same([snapshot(run.net, run.optimizer), run.criterion.log_s], before)
    run.step(2)
    assert not same(snapshot(run.net, run.optimizer), before[0])


def test_finish_after_a_robust_step_is_refused(one_backend):
    run = Run("ABSGD-robust", backend=one_backend)
    run.step(0)
    raw = gradient(run.net).clone()
    with pytest.raises(RuntimeError, match="no forward"):
        run.criterion.finish_(run.net.parameters())
    assert torch.equal(gradient(run.net), raw)


def test_transforms_are_refused(one_backend):
    criterion = ab.ABLoss(identity, lam=0.5, deferred=True, backend=one_backend)
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.grad(criterion)(torch.ones(3))
    assert float(criterion.log_s) == -INF
    with pytest.raises(RuntimeError, match="no forward"):
        criterion.finish_(torch.ones(3))


def test_wrong_labels_leave_the_step_as_it_was(one_backend):
    """A micro-batch that raised is none: the step goes on with the others."""
    run, plain = Run("ABSGD-robust", backend=one_backend), Run.plain("ABSGD-robust", backend=one_backend)
    for one in (run, plain):
        one.step(0)
    x, y = batch(1)
    run.optimizer.zero_grad()
    for some in micro(x, y):
        run.criterion(run.net(some[0]), some[1]).backward()
        with pytest.raises(IndexError):
            run.criterion(run.net(x[:2]), torch.tensor([0, 4]))
        with pytest.raises(ValueError, match="sample_weight"):
            run.criterion(run.net(x[:2]), y[:2], sample_weight=torch.ones(3))
    run.optimizer.step()
    plain.step(1)
    assert_alike(run, plain)


def test_micro_batches_that_know_the_reference_point(one_backend):
    """The second and later ones: empty, of which some rows are masked and hold labels out of range, and with weights that are NaN
    where the row does not count. As one batch."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 5, generator=draw, dtype=torch.float64).requires_grad_()
    rows = [
        (torch.randn(n, 5, generator=draw, dtype=torch.float64), torch.randint(6, (n,), generator=draw)) for n in (12, 0, 25, 300)
    ]
    masks = [torch.arange(len(x)) % 3 != 1 for x, _ in rows]
    junk = [y.where(m, 77) for (_, y), m in zip(rows, masks)]
    scales = [torch.rand(len(x), generator=draw, dtype=torch.float64).where(m, math.nan) for (x, _), m in zip(rows, masks)]
    whole = ab.ABLoss(lam=0.7, backend="reference").double()
    x, y, mask, t = torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows]), torch.cat(masks), torch.cat(scales)
    whole(x @ weight.t(), y, mask=mask, sample_weight=t.nan_to_num(0)).backward()
    wanted, weight.grad = weight.grad, None
    deferred = ab.ABLoss(lam=0.7, deferred=True, backend=one_backend).double()
    for (x, _), y, mask, t in zip(rows, junk, masks, scales):
        value = deferred(x @ weight.t(), y, mask=mask, sample_weight=t)
        assert value.isfinite() and (len(x) > 0 or value == 0)
        value.backward()
    deferred.finish_(weight)
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(deferred.log_s, whole.log_s)
