"""What only a GPU has: streams, several devices, launches, a host that never waits, more than 2^31 elements; and a short tour."""

import itertools
import math
import os
from functools import partial
from types import SimpleNamespace
from unittest import SkipTest

import oracle
import torch
from gpu_cases import ONE_LAUNCH, Where, check_robust, close, device_tools, gpu, numpy, over, problem, tensors_of
from gpu_hooks import pytest_generate_tests, setup_function, teardown_function, unpoisoned  # noqa: F401
from gpu_trainings import LOOPS, MICRO, Head, Loop, Micro
from tensors import DTYPES, LAYOUTS
from test_gpu_robust import rectified
from test_gpu_steps import OPTIMIZERS, OPTIONS, WEIGHTED, Weighted, check_steps, parameters, set_grads, torch_sgd

import absgd_fast as ab
from absgd_fast import _backend
from absgd_fast.functional import logit_loss, robust_weights


@over(shape=LOOPS)
def test_same_bits_again(where, shape):
    runs = []
    for _ in range(3):
        loop = Loop(where, shape)
        losses = []
        for k in range(5):
            loop.feed(k)
            losses.append(loop.step().detach())
        runs.append([torch.stack(losses), *(t.detach() for t in loop.state().values())])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@gpu
@over(shape=LOOPS)
def test_streams_at_once(where, shape):
    """Three trainings on three streams, their launches interleaved: each with the bits that it has alone."""
    with unpoisoned():
        alone, losses = Loop(where, shape), []
        for k in range(30):
            alone.feed(k)
            losses.append(alone.step())
        where.synchronize()
        streams = [torch.cuda.Stream(where.device) for _ in range(3)]
        loops, found = [Loop(where, shape) for _ in streams], [[] for _ in streams]
        where.synchronize()
        for k in range(30):
            for stream, loop, out in zip(streams, loops, found):
                with torch.cuda.stream(stream):
                    loop.feed(k)
                    out.append(loop.step())
        where.synchronize()
        for loop, out in zip(loops, found):
            assert torch.equal(torch.stack(out), torch.stack(losses))
            assert all(torch.equal(a, b) for a, b in zip(loop.state().values(), alone.state().values()))


@gpu
@over(shape=LOOPS)
def test_the_host_never_waits(where, shape):
    """Forward, backward and step, with and without GradScaler; by torch's own alarm, and by what the profiler saw of ours.

    With fused=True, because in the default protocol GradScaler itself waits.
    """
    with unpoisoned():
        loop = Loop(where, shape, fused=True)
        scaler = torch.amp.GradScaler("cuda", init_scale=4.0)

        def scaled():
            loop.optimizer.zero_grad()
            scaler.scale(loop.criterion(loop.x * loop.w + loop.b, loop.y)).backward()
            scaler.step(loop.optimizer)
            scaler.update()

        for run in (loop.step, scaled):
            for _ in range(3):
                run()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for run in (loop.step, scaled):
                for k in range(3):
                    loop.feed(k)
                    loop.criterion.set_lam(-0.6, reset=False)
                    run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        for run in (loop.step, scaled):
            waits = device_tools.waits(where.device, run)
            assert waits == [], f"the host waited in {waits}"


@gpu
def test_the_fastest_is_chosen(where):
    """By those who name no backend; and the one that is named by the others."""
    assert _backend.select(where.device) == "cuda" and _backend.select(where.device, where.backend) == where.backend


@gpu
def test_made_here_and_moved_there(where):
    """A module is made before it is known where it will run."""
    criterion = ab.ABLoss(lam=0.75, backend=where.backend).to(where.device)
    x = torch.zeros(4, 5, device=where.device, requires_grad=True)
    criterion(x, torch.zeros(4, dtype=torch.int64, device=where.device)).backward()
    assert x.grad.any()


@gpu
def test_launches(where):
    """One for the loss, at most one for its backward, one for the step."""
    with unpoisoned():
        for shape, dtype in itertools.product(((128, 10), (128, 100), (512, 1000), (300, 8142)), (torch.float32, torch.bfloat16)):
            p = SimpleNamespace(logits=torch.randn(shape).to(dtype), target=torch.randint(shape[1], shape[:1]))
            x, target, criterion = where.leaf(p.logits), p.target.to(where.device), where.criterion(lam=-0.75)
            one = torch.ones((), device=where.device)
            for _ in range(2):
                torch.autograd.grad(criterion(x, target), x, one)
            seen = device_tools.kernels(where.device, lambda: criterion(x, target))
            assert len(seen) == 1, f"forward of {shape} {dtype}: {seen}"
            loss = criterion(x, target)
            seen = device_tools.kernels(where.device, lambda: torch.autograd.grad(loss, x, one))
            assert len(seen) <= 1, f"backward of {shape} {dtype}: {seen}"
        for count in (10, 161, 900 if where.backend == "cuda" else 161):
            params = parameters(where, [(5 + j % 300,) for j in range(count)], torch.float32)
            optimizer = ab.ABSGD(params, lr=0.1, weight_decay=0.1, backend=where.backend)
            set_grads(params, seed=0)
            for _ in range(2):
                optimizer.step()
            seen = device_tools.kernels(where.device, optimizer.step)
            assert len(seen) == 1, f"step of {count} tensors: {seen}"


TRAININGS = {
    **{str(shape): partial(Loop, shape=shape) for shape in LOOPS},
    "deferred": partial(Micro, sizes=MICRO["uneven"], classes=10),
    "finish_": partial(Micro, sizes=MICRO["first empty"], classes=10, finish=True),
    "linear": partial(Head, dtype=torch.float32, bias=True),
}


def trained(where, make):
    """The results of four steps, and the state after them, on the CPU."""
    training, out = make(where), []
    for k in range(4):
        training.change(k)
        out += training.step() if isinstance(training, Head) else [training.step()]
    out += training.state().values()
    assert all(t.device == where.device for t in out)
    return [t.detach().cpu() for t in out]


def needs_two_gpus():
    if torch.cuda.device_count() < 2:
        raise SkipTest("needs two GPUs")


@gpu
@over(make=TRAININGS)
def test_another_device_than_the_current_one(where, make):
    """Everything on device 1 while device 0 is current."""
    needs_two_gpus()
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(*(trained(Where(f"cuda:{index}", where.backend), make) for index in (0, 1)))


@gpu
@over(make=TRAININGS)
def test_while_a_stream_of_another_device_is_current(where, make):
    """torch.cuda.stream makes its device the current one; what is called is on the other, and goes to that one's own stream."""
    needs_two_gpus()
    results = []
    for index in (0, 1):
        alone = trained(Where(f"cuda:{index}", where.backend), make)
        with torch.cuda.stream(torch.cuda.Stream(1 - index)):
            assert torch.cuda.current_device() == 1 - index
            results.append(trained(Where(f"cuda:{index}", where.backend), make))
        torch.testing.assert_close(results[-1], alone)
    torch.testing.assert_close(*results)


# ---- beyond 2^31 -----------------------------------------------------------------------------------------------------


@gpu(alone=True)
@over(shape=[(16_384, 131_080), (70_000, 32_000), (2, 20, 54_000_000)])
def test_more_than_2_to_the_31_logits(where, shape):
    """In one launch, in several, and as images; some rows against the oracle, all weights against their losses."""
    elements = math.prod(shape)
    assert elements > 2**31
    rows = elements // shape[1]
    where.need(2 * 2 * elements + 120 * rows)
    torch.use_deterministic_algorithms(False)
    generator = torch.Generator(where.device).manual_seed(0)
    x = torch.empty(shape, dtype=torch.bfloat16, device=where.device).normal_(generator=generator).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator, device=where.device)
    criterion = where.criterion(lam=-0.5)
    criterion(x, target).backward()
    last, inner = criterion.last, math.prod(shape[2:])
    z = last.losses.double().flatten() / -0.5
    log_s = z.logsumexp(0) - math.log(rows)
    torch.testing.assert_close(criterion.log_s.double(), log_s, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.weights.flatten().double(), (z - log_s).exp(), rtol=2e-5, atol=0)
    middle = 2**31 // shape[1]
    for i in sorted({0, 1, rows // 3, middle - 1, middle, middle + 1, rows - 2, rows - 1}):
        place = (i // inner, slice(None), *[i % inner] * (len(shape) - 2))
        label = target[place[:1] + place[2:]]
        losses, grads = oracle.cross_entropy(numpy(x[place])[None], [int(label)])
        close(last.losses.flatten()[i : i + 1], losses, torch.bfloat16, f"loss of row {i}")
        factor = math.exp(losses[0] / -0.5 - float(log_s)) / rows
        close(x.grad[place], grads[0] * factor, torch.bfloat16, f"gradient of row {i}", ulps=512, stored=True)


@gpu(alone=True)
def test_more_than_2_to_the_31_parameters(where):
    count = 2**31 + 1000
    where.need(3 * 4 * count + 2**30)
    torch.use_deterministic_algorithms(False)
    p = torch.nn.Parameter(torch.empty(count, device=where.device).uniform_())
    p.grad = torch.empty_like(p).uniform_()
    spots = [slice(0, 999), slice(2**30 - 5, 2**30 + 5), slice(2**31 - 500, 2**31 + 500), slice(count - 7, count)]
    copies = [torch.nn.Parameter(p.detach()[s].double()) for s in spots]
    for copy, s in zip(copies, spots):
        copy.grad = p.grad[s].double()
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.01)
    ours, theirs = ab.ABSGD([p], **options, backend=where.backend), torch_sgd(copies, **options)
    for _ in range(3):
        ours.step()
        theirs.step()
    for copy, s in zip(copies, spots):
        torch.testing.assert_close(p.detach()[s].double(), copy.detach(), rtol=1e-5, atol=1e-5)


# ---- a tour of every kernel, small enough for a sanitizer ------------------------------------------------------------


TOUR = {"offset of one": (5, 37), "wider row": (3, 1030), "transposed": (3, 1031), "sliced rows": (2, 5, 3, 4)}


# How memcheck runs the tour, which then has to fit 30 s: it goes without float64 and without every second rule of the step.
UNDER_SANITIZER = os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1"


def test_tour(where):
    """Every walk, dtype and tail once, and every form of the step, weighted or not."""
    dtypes = [dtype for dtype in DTYPES.values() if not (UNDER_SANITIZER and dtype == torch.float64)]
    for dtype in dtypes:
        for layout, shape in TOUR.items():
            p = problem(shape, dtype, loss="all")
            x = LAYOUTS[layout](p.logits.to(where.device)).requires_grad_()
            target, options = p.target.to(where.device), tensors_of(p.options, dtype, where.device)
            losses = logit_loss(x, target, **options, backend=where.backend)
            (grad,) = torch.autograd.grad(losses, x, torch.full_like(losses, 2.0))
            close(losses, p.losses, dtype, f"losses {shape} {layout}", cancels=True)
            close(grad, 2 * p.grads, dtype, f"gradient {shape} {layout}", cancels=True, stored=True)
            check_robust(where.criterion("all", shape[1], dtype, lam=0.75), oracle.ABLoss(0.75), x, target, p, dtype)
    for shape in ((ONE_LAUNCH // 8 + 1, 8), (ONE_LAUNCH + 1, 3)):
        p = problem(shape, torch.float32)
        x, target = where.leaf(p.logits), p.target.to(where.device)
        check_robust(where.criterion(lam=-0.75), oracle.ABLoss(-0.75), x, target, p, torch.float32)
    for count in (1, 300, ONE_LAUNCH + 1):
        losses = torch.linspace(0, 5, count, device=where.device).requires_grad_()
        weights, log_s = robust_weights(losses, 0.3, -0.75, backend=where.backend)
        (weights.square().sum() + log_s).backward()
        assert losses.grad.isfinite().all() and rectified(where, losses.detach()).isfinite().all()
        where.robust(lambda x: x, lam=0.75)(losses).backward()
    for options, dtype in itertools.product(WEIGHTED.values(), dtypes):
        for gap, rows in ((0, 37), (1, 1030)):
            Weighted(where, [0, 1, 5, 64, 650], rows, dtype, gap).check(**options)
    Weighted(where, [3], ONE_LAUNCH + 3, torch.float32).check()
    sgd = [(ab.ABSGD, torch.optim.SGD, {"lr": 0.1} | {k: v for k, v in o.items() if v is not None}) for o in OPTIONS.values()]
    rules = [*sgd, *OPTIMIZERS.values()][:: 2 if UNDER_SANITIZER else 1]
    for rule, dtype, offset in itertools.product(rules, dtypes, (0, 1)):
        if dtype in (torch.float32, torch.float64):
            check_steps(where, rule, dtype, offset)
