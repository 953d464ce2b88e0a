"""How every benchmark here is timed: in rounds that interleave the competitors, reported as medians and quartiles.

In each round every competitor has its turn, and another one begins each time. So a round gives one time per competitor and, from
times taken under the same conditions, one ratio of two of them: what else the machine does mostly cancels. Python's garbage
collector waits meanwhile.
"""

import contextlib
import gc
import statistics
from functools import partial
from time import perf_counter, perf_counter_ns

import torch

from .device import block_ns, synchronize

BLOCK = 5e6  # ns: long against the clock and a cold start, short against what changes on a machine
ROUNDS = (7, 101)  # at least, at most


@contextlib.contextmanager
def uncollected():
    """Python's garbage collector waits; what it has to do is done before."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def turns(names, rounds):
    """The names in the order of each round: another one begins each time."""
    for r in range(rounds):
        first = r % len(names)
        yield names[first:] + names[:first]


def interleave(runs, seconds, device=torch.device("cpu")):
    """{name: [µs per call in each round]} for {name: callable}, in about `seconds`. A turn is a block of calls."""
    block = partial(block_ns, device)
    calls = {name: max(1, round(BLOCK / min(block(run, 1) for _ in range(3)))) for name, run in runs.items()}
    times = {name: [] for name in runs}
    with uncollected():
        end = perf_counter_ns() + seconds * 1e9
        for r, names in enumerate(turns(list(runs), ROUNDS[1])):
            if r >= ROUNDS[0] and perf_counter_ns() > end:
                break
            for name in names:
                times[name].append(block(runs[name], calls[name]) / 1e3)
    return times


def interleave_long(runs, rounds, before=lambda: None):
    """{name: [seconds in each round]} for {name: callable} whose call takes so long that it is a turn by itself.

    before: called before each turn, and not timed.
    """
    times = {name: [] for name in runs}
    for names in turns(list(runs), rounds):
        for name in names:
            before()
            with uncollected():
                start = perf_counter()
                runs[name]()
                times[name].append(perf_counter() - start)
    return times


def host_us(device, run, calls=20, rounds=15):
    """µs of the host per call, once per round: what a call takes to return while the device's queue has room."""
    out = []
    with uncollected():
        for _ in range(rounds):
            run()
            synchronize(device)
            start = perf_counter_ns()
            for _ in range(calls):
                run()
            out.append((perf_counter_ns() - start) / calls / 1e3)
            synchronize(device)
    return out


def quartiles(values):
    """{"median", "q1", "q3"}"""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def ratios(mine, theirs):
    """The quartiles of mine over theirs, round by round."""
    return quartiles([a / b for a, b in zip(mine, theirs, strict=True)])
