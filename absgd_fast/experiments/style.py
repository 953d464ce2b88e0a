"""How the plots look: a colour and a line style of each method, axes, legends and marks."""

import math

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .methods import IN_STAGES, OF_LAM

# Okabe and Ito's colours, which colour-blind readers tell apart, and a line style each, so that a plot does not speak by colour
# alone. The order of the methods is that of methods.METHODS.
DASHED, DOTTED = (0, (4, 3)), (0, (1, 1.5))
STYLES = {
    "sgd": {"color": "#6b6b6b", "linestyle": "-"},
    "absgd": {"color": "#0072B2", "linestyle": "-"},
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
FEW = 4  # methods that a legend inside the axes has room for


def make_axes(xlabel, ylabel, size=(6.4, 3.8)):
    """A figure and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def legend(axes, methods, **options):
    """Inside the axes, or beside them where there are too many methods."""
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if methods > FEW else {}
    axes.legend(frameon=False, **options | beside)


def bar(method):
    """A bar's colour; what is dashed or dotted as a line is hatched, for one colour serves two methods."""
    style = STYLES[method]
    hatch = {DASHED: "//", DOTTED: ".."}.get(style["linestyle"])
    return {"color": style["color"]} | ({"hatch": hatch, "edgecolor": "white", "linewidth": 0} if hatch else {})


def mark_switch(axes, results):
    """A line where λ, or a rule, is switched on."""
    c = results["config"]
    switch, switched = round(c["warmup"] * c["epochs"]), [m for m in c["methods"] if m in IN_STAGES]
    if 0 < switch < c["epochs"] and switched:
        axes.axvline(switch + 0.5, color="#444444", linewidth=1, linestyle=":")
        axes.annotate(
            "λ on" if set(switched) & set(OF_LAM) else "rule on",
            (switch + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color="#444444",
        )


def log_if_wide(axes, values):
    """A log scale when the weights span more than a factor of four."""
    values = [value for value in values if math.isfinite(value) and value > 0]
    if values and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
