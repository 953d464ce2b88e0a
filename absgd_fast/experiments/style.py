"""The look of the plots: a colour and a line style for each method, axes, legends and marks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .methods import IN_STAGES, OF_LAM

# Okabe and Ito's colours, which colour-blind readers can tell apart. Methods of the same colour differ in their line style. The
# order of the methods is that of methods.METHODS.
DASHED, DOTTED = (0, (4, 3)), (0, (1, 1.5))
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#6b6b6b", "linestyle": "-"},
    "absgd": {"color": "#0072B2", "linestyle": "-"},
    "ramp": {"color": "#0072B2", "linestyle": DASHED},
    "targetess": {"color": "#009E73", "linestyle": DASHED},
    "reference": {"color": "#E69F00", "linestyle": DASHED},
    "term": {"color": "#56B4E9", "linestyle": "-"},
    "eg": {"color": "#56B4E9", "linestyle": DASHED},
    "cvar": {"color": "#D55E00", "linestyle": "-"},
    "chi2": {"color": "#D55E00", "linestyle": DASHED},
    "groupdro": {"color": "#CC79A7", "linestyle": "-"},
    "l2rw": {"color": "#009E73", "linestyle": "-"},
    "proportion": {"color": "#CC79A7", "linestyle": DOTTED},
    "resample": {"color": "#000000", "linestyle": DASHED},
    "hard-mining": {"color": "#E69F00", "linestyle": DOTTED},
    "random": {"color": "#000000", "linestyle": DOTTED},
}
FEW = 4  # a legend inside the axes has room for so many entries


def make_axes(xlabel: str, ylabel: str, size: tuple[float, float] = (6.4, 3.8)) -> tuple[Figure, Axes]:
    """A new figure of `size` inches, and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def legend(axes: Axes, entries: int, **options: Any) -> None:
    """Draws a legend with this number of entries: inside the axes, or beside them if there are more than FEW."""
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if entries > FEW else {}
    axes.legend(frameon=False, **options | beside)


def bar(method: str) -> dict[str, Any]:
    """The colour of a method's bar. It is hatched if the method's line is dashed or dotted, because methods share colours."""
    style = STYLES[method]
    hatch = {DASHED: "//", DOTTED: ".."}.get(style["linestyle"])
    return {"color": style["color"]} | ({"hatch": hatch, "edgecolor": "white", "linewidth": 0} if hatch else {})


def switch_of(config: dict[str, Any]) -> int:
    """The first epoch (counted from 0) with λ = lam, as train.Config.switch, of the saved settings of an experiment."""
    return round(config["warmup"] * config["epochs"])


def mark_switch(axes: Axes, results: dict[str, Any]) -> None:
    """Draws a line at the epoch in which λ, or the weighting of a method without λ, is switched on, or a ramp has reached λ."""
    c = results["config"]
    switch, switched = switch_of(c), [m for m in c["methods"] if m in IN_STAGES]
    with_lam = {"targetess", *OF_LAM}
    label = "full λ" if "ramp" in switched else "λ on" if with_lam & set(switched) else "weights on"
    if 0 < switch < c["epochs"] and switched:
        axes.axvline(switch + 0.5, color="#444444", linewidth=1, linestyle=":")
        axes.annotate(
            label,
            (switch + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color="#444444",
        )


def log_if_wide(axes: Axes, values: Iterable[float]) -> None:
    """Sets a logarithmic scale if the positive values span more than a factor of four."""
    positive = [value for value in values if math.isfinite(value) and value > 0]
    if positive and max(positive) > 4 * min(positive):
        axes.set_yscale("log")
        # over many powers of ten 2 and 5 would crowd the axis, and matplotlib then draws no label at all
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(positive) <= 200 * min(positive) else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
