"""Whole trainings on a device, small enough to be followed to the bit: what graphs, streams and several devices are tried on."""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from gpu_cases import ONE_LAUNCH

import absgd_fast as ab


class Loop:
    """A training whose model has no matrix product, so that every bit of it is ours or elementwise: logits = x w + b."""

    def __init__(self, where, shape, optimizer=ab.ABSGD, lr=0.1, fused=None):
        self.shape, device = shape, where.device
        generator = torch.Generator().manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator).to(device)  # noqa: E731
        self.w, self.b = torch.nn.Parameter(draw(shape[1])), torch.nn.Parameter(draw(shape[1]))
        self.batches = [(draw(*shape), torch.randint(shape[1], shape[:1], generator=generator).to(device)) for _ in range(4)]
        self.x, self.y = (t.clone() for t in self.batches[0])
        self.lr = torch.tensor(lr, device=device)
        self.criterion = where.criterion(lam=-0.75)
        self.optimizer = optimizer([self.w, self.b], lr=self.lr, weight_decay=0.01, backend=where.backend, fused=fused)

    def step(self):
        self.optimizer.zero_grad()
        loss = self.criterion(self.x * self.w + self.b, self.y)
        loss.backward()
        self.optimizer.step()
        return loss

    def feed(self, k):
        for static, new in zip((self.x, self.y), self.batches[k % 4]):
            static.copy_(new)

    def change(self, k):
        """Another batch, lr and lambda."""
        self.feed(k)
        self.lr.fill_(0.1 / (1 + k))
        self.criterion.set_lam(-0.75 + 0.05 * k, reset=False)

    def state(self):
        """{name: tensor}"""
        states = {f"{name} of {p}": t for p, q in (("w", self.w), ("b", self.b)) for name, t in self.optimizer.state[q].items()}
        return {"w": self.w, "b": self.b, "log s": self.criterion.log_s} | states


class Micro(Loop):
    """The same in deferred micro-batches of these sizes, finished in the optimizer's kernel or (`finish`) by finish_."""

    def __init__(self, where, sizes, classes, optimizer=ab.ABSGD, finish=False, lam=-0.75, **options):
        super().__init__(where, (sum(sizes), classes))
        self.sizes, self.finish = sizes, finish
        self.criterion = where.criterion(lam=lam, deferred=True)
        ours = {} if optimizer.__module__.startswith("torch") else {"backend": where.backend}
        robust = {} if finish else {"robust": self.criterion}
        self.optimizer = optimizer([self.w, self.b], **{"lr": self.lr} | options, **ours, **robust)

    def accumulate(self):
        self.optimizer.zero_grad()
        total = 0
        for x, y in zip(self.x.split(self.sizes), self.y.split(self.sizes)):
            loss = self.criterion(x * self.w + self.b, y)
            loss.backward()
            total = total + loss.detach()
        return total

    def step(self):
        total = self.accumulate()
        if self.finish:
            self.criterion.finish_([self.w, self.b])
        self.optimizer.step()
        return total


MICRO = {"uneven": (7, 5, 25), "first empty": (0, 12, 25), "second empty": (12, 0, 25), "many rows": (300, 1, ONE_LAUNCH + 316)}


class Head:
    """A linear head and its targets, some of them ignored; the sizes make several chunks."""

    def __init__(self, where, dtype, bias, loss="ce", seed=0, **options):
        rows, width, classes = (1100, 48, 3000) if where.gpu else (130, 12, 60)
        draw = torch.Generator().manual_seed(seed)
        randn = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
        numbers = [randn(rows, width), randn(classes, width) * 0.4, randn(classes) if bias else None]
        self.given = [None if t is None else where.leaf(t.to(dtype)) for t in numbers]
        target = torch.randint(classes, (rows,), generator=draw)
        target[3::11] = -100
        self.target, self.where, self.wanted = target.to(where.device), where, [t for t in self.given if t is not None]
        criterion = ab.LinearABLoss(
            where.fused(loss, classes, dtype), chunk=rows // 4 + 5, backend=where.backend, **{"lam": 0.6} | options
        )
        criterion = criterion.to(where.device)
        self.criterion = criterion.double() if dtype == torch.float64 else criterion

    def step(self):
        hidden, weight, bias = self.given
        loss = self.criterion(hidden, weight, self.target, bias)
        return loss, *torch.autograd.grad(loss, self.wanted)

    def plain(self, criterion):
        """The same of ABLoss on stored logits in float64 on the CPU."""
        given = [None if t is None else t.detach().cpu().double().requires_grad_() for t in self.given]
        loss = criterion(F.linear(*given), self.target.cpu())
        return loss, *torch.autograd.grad(loss, [t for t in given if t is not None])

    def change(self, k):
        draw = torch.Generator().manual_seed(100 + k)
        with torch.no_grad():
            for t in self.given[:2]:
                t.copy_(torch.randn(t.shape, generator=draw) * 0.5)

    def state(self):
        return {"log s": self.criterion.log_s, "weights": self.criterion.last.weights}


WEIGHTINGS = {
    "term": partial(ab.weights.term, t=2.0),
    "eg": partial(ab.weights.term, t=-0.5),
    "grouped": partial(ab.weights.term, t=2.0, t_group=-1.0),
    "cvar": partial(ab.weights.cvar, beta=0.3),
    "cvar-kl": partial(ab.weights.cvar, beta=0.3, reg=0.5),
    "chi2": partial(ab.weights.chi2, rho=0.4),
    "groupdro": ab.weights.GroupDRO(3, eta=0.5),
}
GROUPED = ("grouped", "groupdro")

# one block; statistics and one launch; more rows than one launch weighs
LOOPS = [(64, 10), (300, 100), (ONE_LAUNCH + 617, 3)]


@contextmanager
def no_waiting(where):
    before = torch.cuda.get_sync_debug_mode() if where.gpu else None
    if where.gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if where.gpu:
            torch.cuda.set_sync_debug_mode(before)
