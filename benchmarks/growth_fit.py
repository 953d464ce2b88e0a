"""How a time grows with a size: the slope of its logarithm over that of the size, and the size at which it changes its slope.

A slope of 1 is growth in proportion. A smaller one says that something is paid at every size; a larger one that the numbers no
longer fit where they were.
"""

import math
from itertools import pairwise
from pathlib import Path

import numpy as np

WINDOW = 5  # points of a local slope: three of freedom are left for its error
SURE = 2  # standard errors that a local slope must be away from 1


def slope(sizes, times):
    """(slope, its standard error) of log time over log size, by least squares. It needs three points."""
    (found, _), covariance = np.polyfit(np.log(sizes), np.log(times), 1, cov=True)
    return float(found), float(math.sqrt(covariance[0, 0]))


def upper(values):
    """The upper half of the points, in which the size rules the time."""
    return values[len(values) // 2 :]


def local_slopes(sizes, times, errors):
    """The slopes of all windows of neighbouring points, from the smallest sizes to the largest.

    Args:
        sizes, times: of each point.
        errors: the relative standard error of each time.

    Returns:
        [{size: the middle one of the window, slope, error, away: -1, 0 or 1}]. The error is that of the residuals or that of
        the times, whichever is larger, because five points can lie on a line by chance. `away` is the side of 1 on which a slope
        is by more than two standard errors.
    """
    found = []
    for k in range(len(sizes) - WINDOW + 1):
        x, y, e = (np.asarray(values[k : k + WINDOW], dtype=float) for values in (sizes, times, errors))
        value, error = slope(x, y)
        centred = np.log(x) - np.log(x).mean()
        error = max(error, float(np.sqrt(((centred * e) ** 2).sum()) / (centred**2).sum()))
        away = 0 if abs(value - 1) <= SURE * error else int(math.copysign(1, value - 1))
        found.append({"size": sizes[k + WINDOW // 2], "slope": value, "error": error, "away": away})
    return found


def knees(local):
    """Where the growth in proportion ends, as [{size, side}]: at most one for each side.

    side -1: the time grows more slowly than the size up to here. This is the largest such window. side 1: the time grows faster
    than the size from here on. This is the smallest such window. One window alone may be away by chance, so a neighbour must be
    away to the same side: the lower one for side -1, the higher one for side 1.
    """
    pairs = list(pairwise(local))
    slower = [higher for lower, higher in pairs if lower["away"] == higher["away"] == -1][-1:]
    faster = [lower for lower, higher in pairs if lower["away"] == higher["away"] == 1][:1]
    return [{"size": window["size"], "side": window["away"]} for window in slower + faster]


def caches(folder=Path("/sys/devices/system/cpu/cpu0/cache")):
    """{"L1d", "L2", "L3", ...: bytes} of the first core, as Linux tells them; {} where it does not."""
    found = {}
    for index in sorted(Path(folder).glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]
    return found


def place(size, bytes_of_one, sizes_of_caches):
    """Where a size lies among the caches, in words, such as "between L1d and L2"."""
    filled = {name: most / bytes_of_one for name, most in sizes_of_caches.items()}
    below = [name for name, most in filled.items() if most < size]
    above = [name for name, most in filled.items() if most >= size]
    if not filled:
        return "the caches are not known"
    if not below:
        return f"within {above[0]}"
    return f"between {below[-1]} and {above[0]}" if above else f"beyond {below[-1]}"
