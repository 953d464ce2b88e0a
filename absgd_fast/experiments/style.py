"""The look of the plots: a colour, a line style and a marker for each method, axes, legends and marks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .methods import IN_STAGES, OF_LAM
from .spec import base as base_of

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
# The markers of what follows the method in a specification; when there are more, they begin again.
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "<", "p", ">", "*", "h")
HATCHES = ("//", "..", "xx", "\\\\", "++", "oo", "--", "**", "||")
FEW = 4  # a legend inside the axes has room for so many entries


def style_of(name: str, all_names: Iterable[str] = ()) -> dict[str, Any]:
    """The style of a method's line, as keyword arguments of matplotlib's plot.

    The colour and the line style are those of its METHOD in STYLES. The marker stands for the rest of the specification, so
    sgd:sce and absgd:sce have the same one, and a method that stands alone has none. The same names have the same styles in
    whatever order they are given. From the thirteenth marker on they are repeated.

    Args:
        name: a specification, METHOD[+EXTRA...][:LOSS...][@SETTING=VALUE...].
        all_names: the specifications of everything that is shown together; `name` may be missing.

    Returns:
        {"color", "linestyle"}, and "marker" and "markersize" for more than a METHOD. An unknown METHOD is drawn in black.

    Example:
        >>> from absgd_fast.experiments.style import style_of
        >>> style_of("sgd")
        {'color': '#6b6b6b', 'linestyle': '-'}
        >>> style_of("absgd:sce", ["sgd:ldam", "sgd:sce"])["marker"]
        's'

    Source: Okabe and Ito 2008, Color universal design (the colours).
    """
    style = STYLES.get(base_of(name), {"color": "#000000", "linestyle": "-"})
    rest = name.removeprefix(base_of(name))
    if not rest:
        return dict(style)
    return {**style, "marker": MARKERS[_place(rest, all_names) % len(MARKERS)], "markersize": 4.5}


def _place(rest: str, all_names: Iterable[str]) -> int:
    """The place of a specification's rest among those of all names, counted from 0."""
    rests: Sequence[str] = sorted({rest, *(name.removeprefix(base_of(name)) for name in all_names)} - {""})
    return rests.index(rest)


def make_axes(xlabel: str, ylabel: str, size: tuple[float, float] = (6.4, 3.8)) -> tuple[Figure, Axes]:
    """A new figure of `size` inches, and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """Leaves two sides of the frame out, and draws a light grid behind everything."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def legend(axes: Axes, entries: int, **options: Any) -> None:
    """Draws a legend with this number of entries: inside the axes, or beside them if there are more than FEW."""
    beside: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if entries > FEW else {}
    axes.legend(frameon=False, **options | beside)


def bar(method: str, all_names: Iterable[str] = ()) -> dict[str, Any]:
    """The colour of a method's bar, as style_of. It is hatched if the line is dashed, dotted or marked."""
    style = style_of(method, all_names)
    hatch = {DASHED: "//", DOTTED: ".."}.get(style["linestyle"])
    if "marker" in style:  # the line's own hatch, if any, comes first
        hatch = (hatch or "") + HATCHES[MARKERS.index(style["marker"]) % len(HATCHES)]
    return {"color": style["color"]} | ({"hatch": hatch, "edgecolor": "white", "linewidth": 0} if hatch else {})


def switch_of(config: dict[str, Any]) -> int:
    """The first epoch (counted from 0) with λ = lam, as train.Config.switch, of the saved settings of an experiment."""
    return round(config["warmup"] * config["epochs"])


def mark_switch(axes: Axes, results: dict[str, Any]) -> None:
    """Draws a line at the epoch in which λ, or the weighting of a method without λ, is switched on, or a ramp has reached λ."""
    c = results["config"]
    switch, switched = switch_of(c), [m for m in map(base_of, c["methods"]) if m in IN_STAGES]
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
