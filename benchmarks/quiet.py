"""Whether the machine is quiet: a fixed piece of work is timed again and again before anything else is.

quiet       seconds: how long the work was repeated; spread: of its time (verdict.py); load: the load average at the start, of
            one minute; steal: the share of the time of all cores that the host took meanwhile. load and steal are null where
            the system does not tell them. quiet: whether each of the three is at most its limit; limits.
"""

import os
from pathlib import Path
from time import perf_counter

import torch

from .device import block_ns
from .timing import BLOCK, CPU, quartiles, uncollected
from .verdict import spread

SIZE = 256  # rows of a product of two matrices: 1 ms, in the caches of any machine, and large enough for several threads
LIMITS = {"spread": 0.05, "load": 0.5, "steal": 0.01}


def look(seconds=1.0):
    """The state of the machine, as a dict ready for JSON. It works with as many threads as torch has."""
    load, before, times = _load(), _ticks(), []
    left, right = torch.ones(SIZE, SIZE), torch.ones(SIZE, SIZE)
    calls = max(1, round(BLOCK / min(block_ns(CPU, lambda: left @ right, 1) for _ in range(5))))
    with uncollected():
        end = perf_counter() + seconds
        while perf_counter() < end or len(times) < 3:
            times.append(block_ns(CPU, lambda: left @ right, calls))
    found = {"spread": spread(quartiles(times)), "load": load, "steal": _stolen(before, _ticks())}
    quiet = all(found[name] is None or found[name] <= most for name, most in LIMITS.items())
    return {"seconds": seconds, **found, "quiet": quiet, "limits": LIMITS}


def sentence(found):
    """One sentence that says whether the machine is quiet, and by which numbers. Their limits are in brackets."""
    said = [f"a fixed piece of work varies by {_percent(found, 'spread')}"]
    if found["load"] is not None:
        said.append(f"the load is {found['load']:.1f} (at most {LIMITS['load']:g})")
    if found["steal"] is not None:
        said.append(f"the host took {_percent(found, 'steal')} of the time of the cores")
    *first, last = said
    words = f"{', '.join(first)}, and {last}" if first else last
    return (
        f"The machine is {'quiet' if found['quiet'] else 'not quiet, so ratios may differ from those on a quiet one'}: {words}."
    )


def _percent(found, name):
    return f"{100 * found[name]:.1f} % (at most {100 * LIMITS[name]:g} %)"


def _load():
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def _ticks():
    """(stolen, all) ticks of all cores since the start of the system, or None. They are in the first line of /proc/stat."""
    try:
        user, nice, system, idle, iowait, irq, softirq, steal, *_ = map(
            int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
        )
    except (OSError, ValueError):
        return None
    return steal, user + nice + system + idle + iowait + irq + softirq + steal


def _stolen(before, after):
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])
