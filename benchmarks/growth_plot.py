"""The picture of how the cost grows, docs/growth.png, made from the record of growth.py."""

import numpy as np
from matplotlib.figure import Figure

from absgd_fast.experiments.style import DASHED, STYLES, plain

from .growth_fit import upper

COLOURS = [STYLES[name]["color"] for name in ("absgd", "reference", "l2rw", "cvar")]  # of the numbers of threads
GREY = "#444444"


def picture(report):
    """A matplotlib Figure with a panel for each sweep, and a line for each number of threads."""
    names = list(dict.fromkeys(found["sweep"] for found in report["sweeps"]))
    figure = Figure(figsize=(9.6, 3.5 * -(-len(names) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(names) // 2), 2, squeeze=False).flat
    for name, axes in zip(names, panels):  # names first, or zip would take a panel too many
        _panel(axes, [found for found in report["sweeps"] if found["sweep"] == name], report["caches"])
    for axes in panels:  # a last one without a sweep
        axes.set_visible(False)
    return figure


def _panel(axes, sweeps, caches):
    first = sweeps[0]
    plain(axes)
    axes.set_title(f"{first['sweep']} ({first['fixed']})", loc="left", fontsize=11)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylabel("µs")
    for colour, found in zip(COLOURS, sweeps):
        sizes, median = np.asarray(found["sizes"], dtype=float), np.asarray([us["median"] for us in found["us"]])
        below, above = (np.asarray([abs(us[end] - us["median"]) for us in found["us"]]) for end in ("q1", "q3"))
        threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
        label = f"{threads}: slope {found['slope']:.2f} ± {found['error']:.2f}"
        axes.errorbar(sizes, median, [below, above], color=colour, marker="o", markersize=3.5, linewidth=1.2, label=label)
        x, y = upper(sizes), upper(median)
        middle = np.exp(np.log(y).mean()), np.exp(np.log(x).mean())
        axes.plot(x, middle[0] * (x / middle[1]) ** found["slope"], color=colour, linestyle=DASHED, linewidth=1)
        for knee in found["knees"]:
            at = np.exp(np.interp(np.log(knee["size"]), np.log(sizes), np.log(median)))
            axes.plot(knee["size"], at, "o" if knee["side"] < 0 else "s", color=colour, markersize=11, fillstyle="none")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    if first["bytes_of_one"]:
        _mark(axes, {name: size / first["bytes_of_one"] for name, size in caches.items()})


def _mark(axes, filled):
    """Draws a line at the size that fills each cache of one core, if it is among the sizes."""
    least, most = axes.get_xlim()
    for name, size in filled.items():
        if least < size < most:
            axes.axvline(size, color=GREY, linewidth=1, linestyle=":")
            axes.annotate(
                f" {name}",
                (size, 0.02),
                xycoords=("data", "axes fraction"),
                fontsize=9,
                color=GREY,
            )
