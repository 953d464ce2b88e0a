"""One normaliser for several processes (MATH §1.6 and §5): two ranks through gloo against one process with all rows."""

import contextlib
import copy
import math
import os
import re
import warnings
from functools import partial

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import identity
from deferred_cases import PAIRS, batch, distance, gradient, network, not_finite, same, spike, vector, weighted
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from two_processes import RANKS, needs_gloo, run

import absgd_fast as ab

INF, NAN = math.inf, math.nan
pytestmark = needs_gloo
# 21 rows: a rank and its micro-batches have what the others have not, one has none; those ignored are all of one micro-batch.
MICRO = ((0, 4, 3, 3), (2, 0, 6, 3))
PARTS = [list(torch.arange(21).split([n for sizes in MICRO for n in sizes])[4 * rank : 4 * rank + 4]) for rank in range(RANKS)]
ROWS = [torch.cat(parts) for parts in PARTS]


def plain(lam=0.5, criterion=None, **options):
    return ab.ABLoss(criterion, lam=lam, process_group=None, **options).double()


def shared(lam=0.5, criterion=None, **options):
    return ab.ABLoss(criterion, lam=lam, **options).double()


def average_gradients(net):
    """What DDP and FSDP do with them."""
    for p in net.parameters():
        dist.all_reduce(p.grad)
        p.grad /= RANKS


def of_all_ranks(value):
    """(ranks, ...) of a tensor of one shape."""
    out = [torch.empty_like(value) for _ in range(RANKS)]
    dist.all_gather(out, value.detach().contiguous())
    return torch.stack(out)


def assert_one_state(criterion):
    """log s, lam and the count are the same on all ranks, to the bit."""
    for name in ("log_s", "lam", "nonfinite_batches"):
        both = of_all_ranks(getattr(criterion, name).double().view(torch.int64))
        assert (both == both[0]).all(), (name, both)


def state(criterion):
    return {k: v.clone() for k, v in criterion.state_dict().items()}


COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "broadcast",
    "barrier",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all",
    "scatter",
    "send",
    "recv",
)


@contextlib.contextmanager
def counted(wanted, group=None):
    """The block makes so many all-gathers in this group, and no other collective."""
    calls = []

    def counting(name, function):
        def call(*args, **keywords):
            calls.append((name, keywords.get("group")))
            return function(*args, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        yield
    assert calls == [("all_gather", group)] * wanted, calls


def in_turn(rank, *bodies):
    """All in one pair of processes: these take 4 s to start."""
    for body in bodies:
        try:
            body(rank)
        except Exception as error:
            raise AssertionError(f"{getattr(body, 'func', body).__name__}, rank {rank}: {error}") from error
        dist.barrier()


# ---- the plain loss ----------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    dict(lam=-0.5),
    dict(lam=INF),
    dict(lam=-INF),
    dict(mix=1.0),
    dict(max_weight=0.7),
    dict(normalizer="batch"),
    dict(normalizer="none", lam=-1.0),
    dict(init="zero", alpha=0.4),
    dict(gamma=1.0),
    dict(gamma=0.2),
    dict(backend="reference"),
    dict(criterion=weighted),
    dict(loss_divisor=4),
]
SHARES = [ROWS, [torch.arange(21), torch.arange(0)], [torch.arange(0), torch.arange(21)], [torch.arange(1), torch.arange(1, 21)]]


def uneven_and_empty_ranks(rank):
    """Value, gradient, weights and log s; also where one rank has nothing, or all of its rows are ignored."""
    for options in OPTIONS:
        nets, criterions = [network(), network()], [plain(**options), shared(**options)]
        for step, share in enumerate([*SHARES, [torch.arange(7, 10), torch.arange(12, 20)], [torch.arange(0)] * 2]):
            x, y = batch(step)
            everybody, mine = torch.cat(share), share[rank]
            draw = torch.Generator().manual_seed(step)
            extra = dict(zip(("sample_weight", "score"), torch.rand(2, 21, generator=draw, dtype=torch.float64) * 2))
            extra["mask"] = torch.rand(21, generator=draw) < 0.8
            if step == 1 or options.get("criterion") is weighted:
                extra = {k: v for k, v in extra.items() if k == "mask"}  # the masked loss of a function, and no score
            values = []
            for net, criterion, rows in zip(nets, criterions, (everybody, mine)):
                net.zero_grad()
                third = (extra["mask"][rows] + 0.5,) if criterion.criterion is weighted else ()
                given = {k: v[rows] for k, v in extra.items()}
                loss = criterion(net(x[rows]), y[rows], *third, **given)
                (loss / options.get("loss_divisor", 1)).backward()
                values.append(loss.detach())
            average_gradients(nets[1])
            close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13, msg=lambda m: f"{options}, {step}: {m}")
            close(gradient(nets[1]), gradient(nets[0]))
            close(of_all_ranks(values[1]).mean(), values[0])
            close(criterions[1].log_s, criterions[0].log_s)
            start = sum(len(rows) for rows in share[:rank])
            close(criterions[1].last.weights, criterions[0].last.weights[start : start + len(mine)])
            assert_one_state(criterions[1])


def one_all_gather(rank):
    """Per training forward, whatever lambda; none where nothing is learnt."""
    x, y = torch.randn(3 + rank, 4, requires_grad=True), torch.zeros(3 + rank, dtype=torch.int64)
    for options in OPTIONS:
        if "criterion" in options:
            continue
        criterion = shared(**options)
        for _ in range(3):
            with counted(1):
                loss = criterion(x, y)
            with counted(0):
                loss.backward()
                assert all(
                    number is not None for number in (criterion.last.weights, criterion.last.mean_loss, criterion.objective)
                )
        with counted(1):
            loss = checkpoint(criterion, x, y, use_reentrant=False)
        with counted(0):
            loss.backward()
        with counted(1):
            criterion(x[:0], y[:0])
        with counted(0):
            with torch.no_grad():
                criterion(x, y)
            with torch.inference_mode():
                criterion(x, y)
            criterion.eval()(x, y).backward()
            criterion.state_dict(), copy.deepcopy(criterion)
        criterion.train()
        before = state(criterion)
        with counted(1):
            criterion(x, y, update=False).backward()
        assert same(state(criterion), before)


def evaluation_alone(rank):
    """A rank that evaluates by itself waits for nobody, uses its own rows, and leaves the state alone."""
    x, y = batch(3)
    net = network()
    for deferred in (False, True):
        criterion = shared(deferred=deferred)
        criterion(net(x[ROWS[rank]]), y[ROWS[rank]]).backward()
        if deferred:
            criterion.finish_(net.parameters())
        before = state(criterion)
        if rank == 1:
            alone = plain()
            alone.load_state_dict(before)
            for _ in range(3):
                with torch.no_grad():
                    torch.testing.assert_close(criterion(net(x), y), alone(net(x), y), rtol=1e-13, atol=0)
                torch.testing.assert_close(criterion.eval()(net(x), y), alone.eval()(net(x), y), rtol=1e-13, atol=0)
                criterion.train()
                alone.train()
                torch.testing.assert_close(criterion.last.weights, alone.last.weights, rtol=1e-13, atol=0)
                with torch.inference_mode():
                    criterion(net(x), y)
        assert same(state(criterion), before)


def bad_rows(rank):
    """On one rank or on both: nobody's log s moves, everybody counts one batch; the finite rows are weighted without it."""
    for value in (NAN, INF):
        criterion, exact = shared(criterion=identity), oracle.ABLoss(0.5)
        for step, where in enumerate([None, (1, 2), None, (0, 0), "both"]):
            losses = torch.rand(2, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * (1 + step)
            if where is not None:
                losses[(0, 1), (1, 3)] if where == "both" else losses[where]
                losses[([0, 1], [1, 3]) if where == "both" else where] = value
            leaf = losses[rank].clone().requires_grad_()
            loss = criterion(leaf)
            loss.backward()
            wanted = exact(losses.flatten())
            close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13, equal_nan=True)
            close(criterion.last.weights, torch.tensor(wanted.weights).view(2, 4)[rank])
            close(leaf.grad, torch.tensor(wanted.grad).view(2, 4)[rank] * RANKS)
            assert loss.isfinite() == losses[rank].isfinite().all()
            assert float(criterion.log_s) == pytest.approx(exact.log_s, rel=1e-12)
            assert int(criterion.nonfinite_batches) == exact.nonfinite_batches
            assert_one_state(criterion)


def relative_lam(rank):
    """r times the mean loss of all rows, however they are shared out; of the first batch that has any."""
    for deferred in (False, True):
        for r in (-0.5, 0.3):
            criterion = shared(lam=ab.RelativeLam(r), deferred=deferred)
            net, (x, y) = network(), batch(1)
            criterion(net(x[:0]), y[:0]).backward()
            assert criterion.lam.isnan()
            rows = ROWS[rank]
            criterion(net(x[rows]), y[rows]).backward()
            wanted = r * float(F.cross_entropy(net(x).detach(), y))
            assert float(criterion.lam) == pytest.approx(wanted, rel=1e-12)
            assert_one_state(criterion)
            criterion(net(x[:3]), y[:3])
            assert float(criterion.lam) == pytest.approx(wanted, rel=1e-12)


def fifty_steps(rank):
    """Random uneven shares, bad rows in one step of ten: the ranks' states never differ by a bit, in fp32."""
    draw, everybody = torch.Generator().manual_seed(5 + rank), torch.Generator().manual_seed(5)
    for deferred in (False, True):
        criterion = ab.ABLoss(identity, lam=0.5, deferred=deferred)
        for _ in range(50):
            leaf = torch.ones((), requires_grad=True)
            for _ in range(2 if deferred else 1):
                losses = torch.rand(int(torch.randint(6, (), generator=draw)), generator=draw) * 4
                if len(losses) and torch.rand((), generator=everybody) < 0.1:
                    losses[0] = NAN
                criterion(losses * leaf).backward()
            if deferred:
                criterion.finish_(leaf)
            assert_one_state(criterion)
        assert 0 < int(criterion.nonfinite_batches) < 50 and criterion.log_s.isfinite()


def groups(rank):
    """None and a group of one rank are this process alone; a group of both is as "auto"."""
    x, y = batch(2)
    rows, net = ROWS[rank], network()
    both, ones = dist.new_group([0, 1]), [dist.new_group([r]) for r in range(RANKS)]
    for deferred in (False, True):
        outcomes = []
        for group, calls in ((None, 0), (ones[rank], 0), ("auto", 1), (both, 1)):
            criterion = ab.ABLoss(lam=0.5, process_group=group, deferred=deferred).double()
            for _ in range(2):
                net.zero_grad()
                with counted(calls, both if group is both else None):
                    criterion(net(x[rows]), y[rows]).backward()
                if deferred:
                    with counted(calls, both if group is both else None):
                        criterion.finish_(net.parameters())
            outcomes.append([gradient(net), criterion.log_s.clone()])
        assert same(outcomes[0], outcomes[1]) and same(outcomes[2], outcomes[3])
        assert distance(outcomes[2][0], outcomes[0][0]) > 0.01
    exact = oracle.ABLoss(0.5)
    for _ in range(2):
        exact(F.cross_entropy(net(x[rows]), y[rows], reduction="none").detach(), mask=y[rows] >= 0)
    assert float(outcomes[0][1]) == pytest.approx(exact.log_s, rel=1e-12)
    assert float(ab.ABLoss(lam=0.5, process_group=None).log_s) == -INF
    with pytest.raises((TypeError, RuntimeError), match="process_group"):  # what a process gets that is not in the group
        ab.ABLoss(lam=0.5, process_group=ones[1 - rank])(net(x), y)


# ---- deferred ----------------------------------------------------------------------------------------------------------


def collectives_of_a_step(rank):
    """One at the first micro-batch, for the reference point, and one at the step; none in between and in evaluation."""
    for how in ("finish", "robust"):
        net, criterion = network(), shared(deferred=True)
        optimizer = ab.ABSGD(net.parameters(), robust=criterion if how == "robust" else None)
        x, y = batch(1)
        for _ in range(2):
            for k, part in enumerate(PARTS[rank]):
                with counted(k == 0):
                    loss = checkpoint(lambda x, y: criterion(net(x), y), x[part], y[part], use_reentrant=False)
                with counted(0):
                    loss.backward()
                with counted(0), torch.no_grad():
                    criterion(net(x), y)
            with counted(1):
                if how == "finish":
                    criterion.finish_(net.parameters())
                optimizer.step()
        for part in (slice(0), slice(7, 10)):  # nobody has a row that counts: there is no reference point yet
            with counted(1):
                criterion(net(x[part]), y[part]).backward()
        with counted(1):
            criterion(net(x), y).backward()
        for _ in range(1 + 2 * rank):  # as many micro-batches as a rank likes
            with counted(0):
                criterion(net(x), y).backward()
        with counted(1):
            optimizer.step() if how == "robust" else criterion.finish_(net.parameters())


def reference_point(rank):
    """m of all ranks' first micro-batches, of which the first rank's is empty; after nothing but empty ones, of the next."""
    losses = torch.rand(2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 3
    criterion = shared(criterion=identity, deferred=True, gamma=0.7)
    for log_s in (-INF, 0.4):
        for empty in (0, 2):
            criterion.log_s.fill_(log_s)
            exact = oracle.ABLoss(0.5, gamma=0.7)
            exact.log_s = log_s
            leaf = losses[rank].clone().requires_grad_()
            for _ in range(empty):
                assert criterion(leaf[:0]) == 0
            parts = [slice(0), slice(5)] if rank == 0 else [slice(3), slice(3, 5)]
            m = oracle.robust_weights(losses[1, :3], log_s, 0.5, gamma=0.7).norm
            values = []
            for part in parts:
                values.append(criterion(leaf[part]))
                wanted = (((losses[rank, part] / 0.5) - m).exp() * losses[rank, part]).sum()
                torch.testing.assert_close(values[-1].detach(), wanted, rtol=1e-12, atol=1e-14)
            sum(values).backward()
            wanted = exact(losses.flatten())
            assert criterion.finish_(leaf)
            torch.testing.assert_close(leaf.grad, torch.tensor(wanted.grad).view(2, 5)[rank] * RANKS, rtol=1e-12, atol=0)
            torch.testing.assert_close(
                criterion.last.weights, torch.tensor(wanted.weights).view(2, 5)[rank, parts[-1]], rtol=1e-12, atol=0
            )
            assert float(criterion.log_s) == pytest.approx(exact.log_s, rel=1e-12)
            assert_one_state(criterion)


def options_of_deferred(rank):
    """Every option against one big batch; a framework that divides by four; ranks with unequally many micro-batches."""
    for options in OPTIONS:
        if "mix" in options or "max_weight" in options or "criterion" in options:
            continue
        nets, criterions = [network(), network()], [plain(**options), shared(deferred=True, **options)]
        for step in range(3):
            x, y = batch(step)
            divisor = options.get("loss_divisor", 1)
            for net in nets:
                net.zero_grad()
            (criterions[0](nets[0](x), y) / divisor).backward()
            for part in PARTS[rank] if rank or not step else [ROWS[0][:6], ROWS[0][6:]]:
                (criterions[1](nets[1](x[part]), y[part]) / divisor).backward()
            average_gradients(nets[1])
            assert criterions[1].finish_(nets[1].parameters())
            torch.testing.assert_close(gradient(nets[1]), gradient(nets[0]), rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(criterions[1].log_s, criterions[0].log_s, rtol=1e-12, atol=1e-13)
            assert_one_state(criterions[1])


class Training:
    """Micro-batches on ranks under DDP or FSDP2, finished inside the step or before it; or one process with all rows."""

    def __init__(self, wrapper, name, how, *, dtype=torch.float32, clip=None, inside=False, **options):
        self.wrapper, self.clip, self.how, self.dtype = wrapper, clip, how, dtype
        distributed = wrapper is not None
        group = {} if distributed else {"process_group": None}
        self.criterion = ab.ABLoss(lam=0.5, **group, **options).to(dtype)
        self.net = self.model = network(dtype)
        if inside:
            self.model = WithLoss(self.net, self.criterion)
        if wrapper == "DDP":
            self.model = DistributedDataParallel(self.model)
        elif wrapper == "FSDP2":
            from torch.distributed.fsdp import fully_shard

            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer)
        ours, theirs, given = PAIRS[name]
        if how == "robust":
            self.optimizer = ours(self.net.parameters(), **given, robust=self.criterion, max_norm=clip)
        else:
            self.optimizer = (theirs if how == "torch" else ours)(self.net.parameters(), **given)
        self.loss = self.model if inside else lambda x, y: self.criterion(self.model(x), y)
        self.norms = []

    def vector(self):
        return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().detach().flatten() for p in self.net.parameters()])

    def accumulate(self, x, y, parts, sync_all=False):
        self.optimizer.zero_grad()
        for k, part in enumerate(parts):
            last = sync_all or k == len(parts) - 1
            if self.wrapper == "FSDP2":
                self.net.set_requires_gradient_sync(last)
            with self.model.no_sync() if self.wrapper == "DDP" and not last else contextlib.nullcontext():
                self.loss(x[part], y[part]).backward()

    def settle(self):
        counts = self.criterion.finish_(self.net.parameters()) if self.criterion.deferred and self.how != "robust" else None
        if self.clip is not None and self.how != "robust" and (counts is None or counts):
            norm = nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
            self.norms.append(float(getattr(norm, "full_tensor", lambda: norm)()))
        return counts

    def step(self, step, parts, spoil=lambda x, y: None, **more):
        x, y = batch(step, self.dtype)
        spoil(x, y)
        self.accumulate(x, y, parts, **more)
        counts = self.settle()
        self.optimizer.step()
        if self.clip is not None and self.how == "robust":
            self.norms.append(float(self.optimizer.last_grad_norm))
        return counts


class WithLoss(nn.Module):
    def __init__(self, net, criterion):
        super().__init__()
        self.net, self.criterion = net, criterion

    def forward(self, x, y):
        return self.criterion(self.net(x), y)


ALL = [slice(None)]


def twenty_steps(rank, wrapper):
    """The figure: 4 uneven micro-batches on 2 ranks, fp32, against one process with one big batch and torch's optimizer."""
    cases = [("ABSGD", "torch", None), ("ABSGD", "ours", 1.0), ("ABAdam", "ours", None), ("ABAdam", "torch", 1.0)]
    of_the_step = [
        (name, "robust", clip) for name in (PAIRS if wrapper == "DDP" else ("ABSGD", "ABAdam")) for clip in (None, 1.0)
    ]
    for name, how, clip in [*cases, *of_the_step]:
        run = Training(wrapper, name, how, clip=clip, deferred=True)
        alone = Training(None, name, "torch", clip=clip)
        for step in range(20):
            assert run.step(step, PARTS[rank]) in (None, True)
            alone.step(step, ALL)
        assert distance(run.vector(), alone.vector()) <= 1e-6, (name, how, clip)
        assert_alike_state(run, alone, 2e-6)
        if clip is not None:
            assert min(run.norms) < clip < max(run.norms)
            np.testing.assert_allclose(run.norms, alone.norms, rtol=1e-5)


def written_gradients(rank, wrapper):
    """The averages that DDP and FSDP2 write after backward are no clipping, and clipping is found beside them."""
    for clips in (False, True):
        run = Training(wrapper, "ABSGD", "robust", deferred=True)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for step in range(3):
                run.accumulate(*batch(step, torch.float32), PARTS[rank])
                if clips:
                    nn.utils.clip_grad_norm_(run.net.parameters(), 1.0)
                run.optimizer.step()
        assert [w for w in found if "changed in place after backward" in str(w.message)][1:] == []
        assert any("changed in place after backward" in str(w.message) for w in found) == clips


def assert_alike_state(run, alone, rtol):
    assert float(run.criterion.log_s) == pytest.approx(float(alone.criterion.log_s), rel=rtol)
    assert run.criterion.nonfinite_batches == alone.criterion.nonfinite_batches
    assert_one_state(run.criterion)


def plain_training(rank, wrapper):
    """The loss that is not deferred, with uneven ranks; and a deferred one whose gradients are averaged in each micro-batch."""
    for name in ("ABSGD", "ABAdam"):
        run, alone = Training(wrapper, name, "ours", dtype=torch.float64), Training(None, name, "torch", dtype=torch.float64)
        each = Training(wrapper, name, "robust", dtype=torch.float64, deferred=True)
        for step in range(6):
            alone.step(step, ALL)
            run.step(step, [SHARES[step % 4][rank]])
            each.step(step, PARTS[rank], sync_all=True)
            for one in (run, each):
                assert distance(one.vector(), alone.vector()) <= 1e-11
                assert_alike_state(one, alone, 1e-12)


def criterion_inside_ddp(rank):
    """Of its state only the count is broadcast before each forward; in the fourth step the second rank has a bad row."""
    for options in ({}, {"deferred": True}):
        run = Training("DDP", "ABSGD", "robust" if options else "ours", dtype=torch.float64, inside=True, **options)
        assert run.model.broadcast_buffers
        assert [n for n, _ in run.model.named_buffers()] == ["module.criterion.nonfinite_batches"]
        alone = Training(None, "ABSGD", "torch", dtype=torch.float64)
        for step in range(8):
            before = run.vector()
            spoil = not_finite(15, NAN) if step == 3 else lambda x, y: None
            if step != 3:
                alone.step(step, ALL)
            else:
                alone.criterion.nonfinite_batches += 1
                if not options:  # DDP averages the NaN, and a plain loss leaves the step to the loop
                    x, y = batch(step, torch.float64)
                    spoil(x, y)
                    run.accumulate(x, y, [ROWS[rank]])
                    assert gradient(run.net).isnan().any()
                    assert_alike_state(run, alone, 1e-12)
                    continue
            run.step(step, PARTS[rank] if options else [ROWS[rank]], spoil)
            assert step != 3 or torch.equal(run.vector(), before)
            assert distance(run.vector(), alone.vector()) <= 1e-11
            assert_alike_state(run, alone, 1e-12)


def state_loaded_on_one_rank(rank):
    """DDP does not hand it on, neither when it is made nor before a forward: the exchange says which number differs."""
    for name, value, shown in (("log_s", 0.75, ("0.75", "-inf")), ("lam", 0.25, ("0.25", "0.5"))):
        for deferred in (False, True):
            criterion = shared(deferred=deferred)
            saved = criterion.state_dict() | {name: torch.tensor(value)}
            if rank == 0:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of another lambda than the constructor's
                    criterion.load_state_dict(saved)
            model = DistributedDataParallel(WithLoss(network(), criterion))
            assert_disagree(criterion, lambda m=model: m(*batch(0)), name.replace("_", " "), shown)
            criterion.set_lam(1.0, reset=False)
            criterion.load_state_dict(saved)  # on every rank
            model(*batch(0)).backward()
            assert_one_state(criterion)


def own_states_inside_ddp(rank):
    """With process_group=None each process keeps its own log s, though DDP broadcasts the buffers of the model."""
    criterion = plain()
    model = DistributedDataParallel(WithLoss(network(), criterion))
    alone, net = plain(), copy.deepcopy(model.module.net)
    for step in range(2):
        x, y = batch(step)
        model(x[ROWS[rank]], y[ROWS[rank]]).backward()
        alone(net(x[ROWS[rank]]), y[ROWS[rank]])
        torch.testing.assert_close(criterion.log_s, alone.log_s, rtol=1e-13, atol=0)
    assert len(of_all_ranks(criterion.log_s).unique()) == RANKS


def bad_steps(rank, wrapper):
    """A NaN or a spike on one rank: nobody takes the step, to the bit, and the next is as if it had not been."""
    for how in ("robust", "torch", "ours"):
        # of the first micro-batch of a rank, of its first one with any row, and of later ones
        for spoil in (not_finite(10, NAN), spike(1), spike(8), not_finite(15, INF)):
            run, undisturbed = (Training(wrapper, "ABAdam", how, dtype=torch.float64, deferred=True) for _ in range(2))
            for step in range(3):
                if step == 1:
                    before = [run.vector(), run.criterion.log_s.clone()]
                    counts = run.step(9, PARTS[rank], spoil)
                    assert same([run.vector(), run.criterion.log_s], before)
                    assert int(run.criterion.nonfinite_batches) == 1
                    if how != "robust":
                        assert not counts and all(p.grad is None for p in run.net.parameters())
                    assert_one_state(run.criterion)
                run.step(step, PARTS[rank])
                undisturbed.step(step, PARTS[rank])
            assert torch.equal(run.vector(), undisturbed.vector())
            assert torch.equal(run.criterion.log_s, undisturbed.criterion.log_s)


def state_of_several_optimizers(rank):
    """Weights to one and biases to another: one exchange for both of them."""
    net, criterion = network(), shared(deferred=True)
    optimizers = [ab.ABSGD([p for p in net.parameters() if p.dim() == d], lr=0.1, robust=criterion) for d in (1, 2)]
    alone = Training(None, "ABSGD", "torch", dtype=torch.float64)
    alone.optimizer = torch.optim.SGD(alone.net.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        x, y = batch(step)
        net.zero_grad()
        for part in PARTS[rank]:
            criterion(net(x[part]), y[part]).backward()
        average_gradients(net)
        with counted(1):
            for optimizer in optimizers:
                optimizer.step()
        alone.step(step, ALL)
        assert distance(vector(net), vector(alone.net)) <= 1e-12


# ---- what is refused, and leaves everything as it was ---------------------------------------------------------------------

# Option, the two ranks' values, and how the message names them
DISAGREEMENTS = [
    ("lam", (0.5, 0.25), ("0.5", "0.25")),
    ("lam", (INF, 0.25), ("inf", "0.25")),
    ("gamma", (0.9, 0.8), ("0.9", "0.8")),
    ("alpha", (0.5, 1.0), ("0.5", "1")),
    ("mix", (0.0, 1.0), ("0", "1")),
    ("max_weight", (None, 2.0), ("inf", "2")),
    ("normalizer", ("batch", "none"), ("batch", "none")),
    ("normalizer", ("moving", "batch"), ("moving", "batch")),
    ("init", ("first", "zero"), ("first", "zero")),
    ("deferred", (False, True), ("False", "True")),
    ("loss_divisor", (1, 4), ("1", "4")),
    ("report", ("robust", "mean"), ("robust", "mean")),
    ("lam", (ab.RelativeLam(0.5), 0.25), ("RelativeLam", "0.25")),
    ("lam", (ab.RelativeLam(0.5), ab.RelativeLam(-0.5)), ("0.5", "-0.5")),
]


def assert_disagree(criterion, call, name, shown):
    before = [state(criterion), criterion.lam_is_open]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - its text is matched below
        call()
    pattern = f"{name}.*rank 0.*{re.escape(shown[0])}.*rank 1.*{re.escape(shown[1])}"
    assert re.search(pattern, str(caught.value), re.IGNORECASE), str(caught.value)
    assert same([state(criterion), criterion.lam_is_open], before)


def disagreement(rank):
    """Both ranks get the error, with both values; then they agree, and train."""
    x, y = torch.randn(4, 5, generator=torch.Generator().manual_seed(rank), requires_grad=True), torch.tensor([0, 1, 2, 0])
    for deferred in (False, True):
        for name, values, shown in DISAGREEMENTS:
            options = {"lam": 0.5, name: values[rank]} | ({"deferred": True} if deferred else {})
            if deferred and name in ("mix", "max_weight", "deferred"):
                continue
            criterion = ab.ABLoss(**options)
            assert_disagree(criterion, lambda c=criterion: c(x, y), name, shown)
            if options.get("deferred"):
                with pytest.raises(RuntimeError, match="no forward"):
                    criterion.finish_(x)
            if name == "lam":
                criterion.set_lam(0.5)
                criterion(x, y)
                assert_one_state(criterion)
        criterion = ab.ABLoss(lam=0.5, deferred=deferred)
        criterion(x, y)
        if deferred:
            criterion.finish_(x)
        wide = torch.randn(4, 5 + rank)
        assert_disagree(criterion, lambda c=criterion, w=wide: c(w.requires_grad_(), y), "classes", ("5", "6"))
        criterion(x, y)  # and it goes on
        assert_one_state(criterion)


def disagreement_at_the_step(rank):
    """Noticed by the exchange that settles: gradients and state are as they were."""
    for how in ("finish", "robust"):
        net, criterion = network(), shared(deferred=True)
        optimizer = ab.ABSGD(net.parameters(), lr=0.1, robust=criterion if how == "robust" else None)
        x, y = batch(rank)
        criterion(net(x), y).backward()
        before = [vector(net), gradient(net)]
        criterion.gamma = (0.9, 0.3)[rank]
        call = optimizer.step if how == "robust" else lambda c=criterion, n=net: c.finish_(n.parameters())
        assert_disagree(criterion, call, "gamma", ("0.9", "0.3"))
        assert same([vector(net), gradient(net)], before)
        criterion.gamma = 0.9
        call()
        assert_one_state(criterion)


def group_gone(rank, folder):
    """destroy_process_group between two forwards, and between a micro-batch and the step: an error that says so, and nothing is
    overwritten; evaluation goes on; so does training, by itself or in a new group."""
    x, y = batch(1)
    net = network()
    own = dist.new_group([0, 1])
    made = {}
    for group in ("auto", own):
        for deferred in (False, True):
            criterion = ab.ABLoss(lam=0.5, process_group=group, deferred=deferred).double()
            net.zero_grad()
            criterion(net(x), y).backward()
            made[group, deferred] = criterion, [p.grad.clone() for p in net.parameters()], state(criterion)
    optimizer = ab.ABSGD(net.parameters(), lr=0.1, robust=made["auto", True][0])
    untouched = vector(net)
    dist.barrier()
    dist.destroy_process_group(own)
    with pytest.raises(RuntimeError, match="process_group.*gone"):
        made[own, False][0](net(x), y)
    dist.destroy_process_group()
    for (group, deferred), (criterion, grads, before) in made.items():
        for p, grad in zip(net.parameters(), grads):
            p.grad = grad.clone()
        if deferred:
            for call in (lambda c=criterion: c.finish_(net.parameters()), optimizer.step if group == "auto" else None):
                if call is not None:
                    with pytest.raises(RuntimeError, match="process_group.*gone"):
                        call()
            assert same([p.grad for p in net.parameters()], grads) and torch.equal(vector(net), untouched)
        with pytest.raises(RuntimeError, match="process_group.*gone"):
            criterion(net(x), y)
        assert same(state(criterion), before)
        with torch.no_grad():
            assert criterion(net(x), y).isfinite()
        assert criterion.eval()(net(x), y).isfinite() and same(state(criterion), before)
        criterion.train()
    criterion = made["auto", False][0]
    criterion.process_group = None
    criterion(net(3 * x), y)
    assert not same(state(criterion), made["auto", False][2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=RANKS)
    dist.barrier()
    criterion = made["auto", True][0]
    net.zero_grad()
    criterion.discard()
    criterion(net(x[ROWS[rank]]), y[ROWS[rank]]).backward()
    assert criterion.finish_(net.parameters())
    assert_one_state(criterion)


def other_process_ended(rank):
    """The second process ends where the first expects it: an error instead of a wait, and the state is as it was."""
    criterions = [ab.ABLoss(lam=0.5, deferred=deferred) for deferred in (False, True)]
    x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, 0])
    for criterion in criterions:
        criterion(x, y).backward()
    if rank == 1:
        os._exit(0)
    grad = x.grad.clone()
    before = [state(criterion) for criterion in criterions]
    with pytest.raises(RuntimeError, match="2 processes.*state is as it was.*a process ended"):
        criterions[0](x, y)
    with pytest.raises(RuntimeError, match="2 processes.*state is as it was.*a process ended"):
        criterions[1].finish_(x)
    assert same([state(criterion) for criterion in criterions], before) and torch.equal(x.grad, grad)
    os._exit(0)  # there is nobody to say goodbye to


# ---- tests -------------------------------------------------------------------------------------------------------------


def test_plain(tmp_path):
    bodies = uneven_and_empty_ranks, one_all_gather, evaluation_alone, bad_rows, relative_lam, fifty_steps, groups
    run(in_turn, tmp_path, *bodies)


def test_deferred(tmp_path):
    run(in_turn, tmp_path, collectives_of_a_step, reference_point, options_of_deferred, state_of_several_optimizers)


@pytest.mark.parametrize("wrapper", ["DDP", pytest.param("FSDP2", marks=pytest.mark.deep)])
def test_training(tmp_path, wrapper):
    bodies = [partial(body, wrapper=wrapper) for body in (twenty_steps, plain_training, bad_steps, written_gradients)]
    run(
        in_turn,
        tmp_path,
        *bodies,
        *([criterion_inside_ddp, state_loaded_on_one_rank, own_states_inside_ddp] if wrapper == "DDP" else []),
    )


def test_bad_input(tmp_path):
    run(in_turn, tmp_path, disagreement, disagreement_at_the_step, partial(group_gone, folder=tmp_path))


def test_a_process_that_ended(tmp_path):
    run(other_process_ended, tmp_path)


@pytest.mark.parametrize("used", [False, True])
def test_a_group_of_one_that_is_gone(tmp_path, used):
    """Who named a group does not train by himself without a word."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        criterion = ab.ABLoss(identity, lam=0.5, process_group=dist.new_group([0]))
        losses = torch.ones(3, requires_grad=True)
        if used:
            criterion(losses)
    finally:
        dist.destroy_process_group()
    before = state(criterion)
    with torch.no_grad():
        assert criterion(losses).isfinite()
    with pytest.raises(RuntimeError, match="process_group.*gone"):
        criterion(2 * losses)
    assert same(state(criterion), before)


@pytest.mark.parametrize("wrong", ["default", 0, [0, 1], "AUTO", True, object])
def test_no_process_group(wrong):
    with pytest.raises(TypeError, match="process_group: got .*'auto'.*None"):
        ab.ABLoss(lam=0.5, process_group=wrong)
