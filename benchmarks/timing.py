"""Timing in rounds that interleave the competitors, reported as medians and quartiles.

In each round every competitor has one turn, and each round begins with another one. So a round gives one time per competitor,
and one ratio for each pair. The times of a round are taken under the same conditions, so the load of the machine mostly cancels
in the ratios. Python's garbage collector is off during a turn.
"""

import contextlib
import gc
import statistics
from functools import partial
from time import perf_counter, perf_counter_ns

import torch

from .device import block_ns, synchronize

CPU = torch.device("cpu")
BLOCK = 5e6  # ns of a turn: long compared with the clock's resolution and a cold start, short compared with changes of the load
ROUNDS = (7, 101)  # the least and the largest number of rounds


@contextlib.contextmanager
def uncollected():
    """Runs Python's garbage collector, and keeps it off inside this context."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def turns(names, rounds):
    """The order of the names in each round. Each round begins with another one."""
    for r in range(rounds):
        first = r % len(names)
        yield names[first:] + names[:first]


def interleave(runs, seconds, device=CPU, least=None):
    """{name: [µs per call in each round]} for {name: callable}, measured for about `seconds`. A turn is a block of calls.

    least: the least number of rounds, by default ROUNDS[0].
    """
    block = partial(block_ns, device)
    calls = {name: _calls(partial(block, run, 1)) for name, run in runs.items()}
    times = {name: [] for name in runs}
    with uncollected():
        end = perf_counter_ns() + seconds * 1e9
        for r, names in enumerate(turns(list(runs), ROUNDS[1])):
            if r >= (least or ROUNDS[0]) and perf_counter_ns() > end:
                break
            for name in names:
                times[name].append(block(runs[name], calls[name]) / 1e3)
    return times


def _calls(once):
    """The number of calls in a turn. once() is the time of one call in ns. A call that takes very long is not repeated here."""
    first = once()
    return 1 if first > 100 * BLOCK else max(1, round(BLOCK / min(first, once(), once())))


def interleave_long(runs, rounds, before=lambda: None, clock=perf_counter):
    """{name: [seconds in each round]} for {name: callable}. A turn is one call; use this for calls that take long.

    before: a function that is called before each turn and is not timed.
    clock: time.process_time gives the CPU time of this process, in which the load of the machine does not count.
    """
    times = {name: [] for name in runs}
    for names in turns(list(runs), rounds):
        for name in names:
            before()
            with uncollected():
                start = clock()
                runs[name]()
                times[name].append(clock() - start)
    return times


def host_us(device, run, calls=20, rounds=15):
    """µs per call until it returns, once per round. The device's queue has room, so this is the time of the host."""
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
    """{"median", "q1", "q3"} of the values."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def ratios(mine, theirs):
    """The quartiles of the ratios mine / theirs of all rounds."""
    return quartiles([a / b for a, b in zip(mine, theirs, strict=True)])
