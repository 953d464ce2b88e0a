"""CUDA graphs: what is captured once and replayed is to the bit what eager execution computes."""

import copy
from unittest import SkipTest

import torch
from gpu_cases import BEYOND, HELD, LOSSES, NAN, device_tools, over
from gpu_hooks import pytest_generate_tests, setup_function, teardown_function, unpoisoned  # noqa: F401
from gpu_trainings import GROUPED, LOOPS, MICRO, WEIGHTINGS, Head, Loop, Micro
from test_gpu_robust import SIZES_OF_PARTS, Parts

import absgd_fast as ab
from absgd_fast.functional import robust_weights


def check_replay(where, make, replays=8, near=None, each=lambda k, eager: None):
    """What make() makes, captured once: `change(k)` between replays, `step()` and `state()` as without a graph.

    To the bit (NaN in the same places), or so near where torch's own operators between ours promise less. each: a look at what
    eager execution came to after each step, so that it is known to be worth following.
    """
    if where.backend == "reference" and where.gpu:
        raise SkipTest("plain torch promises nothing about graphs")

    def alike(wanted, given, what):
        assert type(wanted) is type(given)
        if isinstance(wanted, torch.Tensor):
            tolerance = dict(rtol=near or 0, atol=near or 0, equal_nan=True)
            torch.testing.assert_close(given, wanted, **tolerance, msg=lambda text: f"{what}: {text}")
            return
        for a, b in zip(wanted, given, strict=True):
            alike(a, b, what)

    with unpoisoned():
        eager, replayed = make(), make()
        for _ in range(3):
            eager.step()
        replay, result = device_tools.captured(where.device, replayed.step, warm_up=3)
        for k in range(replays):
            eager.change(k)
            replayed.change(k)
            wanted, again = eager.step(), replay()
            alike(wanted, result if where.gpu else again, f"result of replay {k}")
            given = replayed.state()
            for name, t in eager.state().items():
                alike(t, given[name], f"{name} after replay {k}")
            each(k, eager)


@over(
    shape=LOOPS,
    optimizer={f.__name__: f for f in (ab.ABSGD, ab.ABAdamW, ab.ABAdam, ab.ABRMSprop, ab.ABAdagrad)},
)
def test_graph_replay(where, shape, optimizer):
    """Forward, backward and step captured once; lr, lambda and the batch change between replays: the bits of eager training."""
    check_replay(where, lambda: Loop(where, shape, optimizer))


@over(way={"robust=": (ab.ABSGD, False), "robust=, adamw": (ab.ABAdamW, False), "finish_": (ab.ABSGD, True)}, sizes=MICRO)
def test_graph_replay_of_micro_batches(where, way, sizes):
    """Deferred micro-batches and the step that finishes them in one graph."""
    optimizer, finish = way
    check_replay(where, lambda: Micro(where, sizes, 10, optimizer, finish))


class Rows:
    """A criterion on logits that change between replays: its loss, gradient and weights; `losses`: those of logit_loss too."""

    def __init__(self, where, shape, criterion, losses=None, groups=False, spoil=None):
        self.criterion, self.losses, self.spoil, self.shape = criterion, losses, spoil, shape
        self.ignore_index = criterion.criterion.ignore_index
        self.x = where.leaf(torch.zeros(shape))
        self.y = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device=where.device)
        self.given = {"groups": (torch.arange(shape[0]) * 7 % 11 % 3).to(where.device)} if groups else {}
        self.change(-1)

    def change(self, k):
        draw = torch.Generator().manual_seed(50 + k)
        with torch.no_grad():
            self.x.copy_(2 * torch.randn(self.shape, generator=draw))
            self.y.copy_(torch.randint(self.shape[1], self.y.shape, generator=draw))
            self.y[2] = self.ignore_index
            if k == self.spoil:
                self.x[0] = NAN

    def step(self):
        loss = self.criterion(self.x, self.y, **self.given)
        out = [loss, *torch.autograd.grad(loss, self.x), self.criterion.last.weights]
        if self.losses is not None:
            losses = self.losses(self.x, self.y)
            out += [losses, *torch.autograd.grad(losses.sum(), self.x)]
        return out

    def state(self):
        return {"log s": self.criterion.log_s, "bad batches": self.criterion.nonfinite_batches}


@over(loss=list(LOSSES), shape=[HELD, (BEYOND[0] * 20, 11)])
def test_graph_replay_of_every_loss(where, loss, shape):
    if where.backend == "triton" and loss not in ("ce", "all", "gce, pruned"):
        raise SkipTest("each kernel costs a second to compile")

    def make():
        return Rows(where, shape, where.criterion(loss, shape[1], lam=-0.75), where.fused(loss, shape[1]))

    check_replay(where, make, replays=3)


@over(rule=list(WEIGHTINGS))
def test_graph_replay_of_rules(where, rule):
    """A rule without a wait is one without an obstacle. (Their sums by index_add have no fixed order on a GPU.)"""

    def make():
        criterion = where.robust(ab.CrossEntropy(backend=where.backend), rule=copy.deepcopy(WEIGHTINGS[rule]))
        return Rows(where, (37, 5), criterion, groups=rule in GROUPED)

    check_replay(where, make, replays=3, near=1e-5)


@over(sizes=SIZES_OF_PARTS)
def test_graph_replay_of_the_stages(where, sizes):
    class Replayed(Parts):
        def change(self, k):
            draw = torch.Generator().manual_seed(k)
            for part in self.parts:
                part["losses"].copy_(3 * torch.rand(part["losses"].shape, generator=draw))
            self.lam.fill_(0.75 + 0.1 * k)

        def state(self):
            return {"log s": self.log_s, "settled": self.settled, "bad batches": self.nonfinite}

    check_replay(where, lambda: Replayed(where, sizes, torch.float32), replays=3)


def test_graph_replay_of_weights(where):
    """robust_weights and its vjp, and the robust loss of given losses."""

    class Vectors:
        def __init__(self):
            self.criterion, self.losses = where.robust(lambda x: x, lam=0.75), where.leaf(torch.zeros(3000))
            self.d, self.lam = torch.linspace(-1, 2, 3000, device=where.device), torch.tensor(0.75, device=where.device)
            self.log_s = torch.tensor(0.3, device=where.device)
            self.change(-1)

        def change(self, k):
            with torch.no_grad():
                self.losses.copy_(4 * torch.rand(3000, generator=torch.Generator().manual_seed(50 + k)))
            self.lam.fill_(1.0 + 0.1 * k)

        def step(self):
            weights, log_s = robust_weights(self.losses, self.log_s, self.lam, backend=where.backend)
            (slopes,) = torch.autograd.grad((weights, log_s), self.losses, (self.d, torch.ones_like(log_s)))
            loss = self.criterion(self.losses)
            return [weights.detach(), log_s.detach(), slopes, loss.detach(), *torch.autograd.grad(loss, self.losses)]

        def state(self):
            return {"log s": self.criterion.log_s}

    check_replay(where, Vectors, replays=3)


@over(dtype={"fp32": torch.float32, "bf16": torch.bfloat16})
def test_graph_replay_of_linear(where, dtype):
    """The chunks' loop with its matrix products. (Which of its algorithms cuBLAS takes in a graph is its own affair.)"""
    check_replay(where, lambda: Head(where, dtype, True), replays=3, near=1e-5 if dtype == torch.float32 else 1e-2)


@over(shape=LOOPS)
def test_a_bad_row_under_capture(where, shape):
    """The replay that meets it has a loss of NaN and leaves log s; those before and after it notice nothing."""
    make = lambda: Rows(where, shape, where.criterion(lam=-0.75), spoil=1)  # noqa: E731
    check_replay(where, make, replays=4)
    loop = make()
    for k in range(3):
        loop.change(k)
        before = loop.criterion.log_s.clone()
        loss, grad, weights = loop.step()
        assert bool(loss.isnan()) == bool(grad[0].isnan().any()) == bool(weights[0].isnan()) == (k == 1)
        assert grad[1].isfinite().all() and torch.equal(loop.criterion.log_s, before) == (k == 1)
    assert int(loop.criterion.nonfinite_batches) == 1

    class Spoilt(Micro):
        def change(self, k):
            self.feed(k)
            if k == 1:
                self.x[-1, 0] = NAN
            self.before = self.w.detach().clone()

    moved = []
    check_replay(
        where,
        lambda: Spoilt(where, (7, shape[0] - 7), shape[1]),
        replays=4,
        each=lambda k, eager: moved.append(not torch.equal(eager.before, eager.w)),
    )
    assert moved == [True, False, True, True]
