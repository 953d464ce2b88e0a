"""The plots of a cell of merged trainings. Each is drawn from the runs that have its numbers, or left out if none has.

Every plot of a report uses the same styles (style.style_of with all methods of the report). A plot of more than ROOM lines is
split into panels, one for each loss, which share their axes.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .merged import Cell, canonical, loss_of
from .merged_panels import LEFT, LETTER, LOG_LEFT, WIDTH, legend_size, make_panels
from .plots import Plot, class_groups, mean_std, numbers
from .style import base_of, log_if_wide, mark_switch, plain, style_of
from .summary import by_method
from .svg import LOOK
from .train import Run
from .words import tested_on

ROOM = 7  # lines that one panel can hold
PANELS = 6  # methods that have a panel each, in the plots of many classes
# Of all lines of a plot, and of each line. More points can hardly be seen, and each has its bytes in the page.
POINTS, LEAST_POINTS = 1500, 30

Values = Callable[[Run], list[float] | None]  # the series of a run, an entry per epoch; None if it has none


# ------------------------------------------------------------------------------------------------ numbers of a run


def series(key: str) -> Values:
    """The entries of run["epochs"][key]; NaN for None, and no series if all are None or the key is missing."""

    def values(run: Run) -> list[float] | None:
        found = run["epochs"].get(key) or []
        return None if all(v is None for v in found) else numbers(found)

    return values


def weighing(key: str) -> Values:
    """As series(), without the runs in which every sample has the weight 1 throughout, or ESS/n is 1."""

    def values(run: Run) -> list[float] | None:
        found = series(key)(run)
        return None if found is None or all(v == 1 or math.isnan(v) for v in found) else found

    return values


def inverse_lam(run: Run) -> list[float] | None:
    """1/λ. None, an infinite λ, is 0; a method without a λ has no series."""
    found = run["epochs"].get("lam") or []
    return None if all(v is None for v in found) else [0.0 if v is None else 1 / v if v else math.nan for v in found]


def over_seeds(lines: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """(mean, std) of each epoch over the seeds. NaN is missing, and a single value has the std 0."""
    length = max(map(len, lines))
    table = torch.tensor([[*line, *[math.nan] * (length - len(line))] for line in lines], dtype=torch.float64, device="cpu")
    average, spread = mean_std(table)
    return average.tolist(), spread.tolist()


# ------------------------------------------------------------------------------------------------ lines over the epochs


@dataclass(frozen=True)
class Lines:
    """A plot of lines over the epochs.

    Attributes:
        title, caption: of the plot.
        columns: (heading of the panels in this column, label of their axis, values of a run).
        shared: whether all columns have one axis.
        log: whether the axis is logarithmic when the values span much.
        level: where a dashed line is drawn.
        late: whether the axis leaves out what is lower than everything after a third of the epochs.
    """

    title: str
    caption: str
    columns: Sequence[tuple[str, str, Values]]
    shared: bool = True
    log: bool = False
    level: float | None = None
    late: bool = False


LINES = (
    Lines(
        "Accuracy while training",
        "Mean over the seeds. A band, where there is room for it, is ± one standard deviation. The axis begins at the lowest "
        "accuracy after a third of the epochs.",
        [("", "balanced accuracy on the test set, %", series("balanced_accuracy"))],
        late=True,
    ),
    Lines(
        "Weight of right and wrong labels",
        "The average weight of the training samples with a right label, and of those with a wrong one. The methods do not know "
        "which are wrong. The dashed line is 1, the weight under plain SGD.",
        [
            ("right labels", "mean weight", weighing("clean_weight")),
            ("wrong labels", "mean weight", weighing("flipped_weight")),
        ],
        log=True,
        level=1.0,
    ),
    Lines(
        "Memorisation of wrong labels",
        "The share of the wrongly labelled training samples that the network predicts as their wrong label (memorised), and as "
        "their true class (seen through). Mean over the seeds.",
        [
            ("as the wrong label", "% of wrong labels", series("flipped_as_given")),
            ("as the true class", "% of wrong labels", series("flipped_as_true")),
        ],
    ),
    Lines(
        "Effective sample size",
        "ESS/n = (Σ W)² / (n Σ W²), the share of a batch that counts: the mean over the batches of each epoch. Equal weights "
        "have 1. Mean over the seeds.",
        [("", "ESS/n", weighing("ess"))],
        level=1.0,
    ),
    Lines(
        "λ and log s",
        "1/λ at the end of each epoch, which is 0 while training is plain (λ = ∞), and the logarithm of the moving average s. "
        "Mean over the seeds.",
        [("", "1/λ", inverse_lam), ("", "log s", series("log_s"))],
        shared=False,
    ),
)


def panels(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """[(heading, methods)]: all of them in one panel, or one panel for each loss if there are more than ROOM."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(loss_of(name), []).append(name)
    alone = len(names) <= ROOM or max(map(len, groups.values()), default=0) < 2 or len(groups) < 2
    return [("", list(names))] if alone else list(groups.items())


def lines(plot: Lines, cell: Cell, names: Sequence[str]) -> Plot | None:
    """The plot of a cell, or None if no run has data for its last column (and for none of its columns if they are not shared)."""
    columns = [(*column[:2], _averages(cell, column[2])) for column in plot.columns]
    if plot.shared and not columns[-1][2]:
        return None
    columns = [column for column in columns if column[2]]
    if not columns:
        return None
    drawn = [name for name in cell.runs_of if any(name in averages for _, _, averages in columns)]
    grid = [(head, mine, column) for head, mine in panels(drawn) for column in columns]
    wide = 2 if len(grid) > 1 else 1
    most = max(LEAST_POINTS, POINTS // sum(len(averages) for _, _, averages in columns))
    handles = [Line2D([], [], linewidth=1.5, label=cell.rows[name], **style_of(name, names)) for name in drawn]
    abreast, rows = legend_size([cell.rows[name] for name in drawn])
    figure, axes = make_panels(
        len(grid),
        wide,
        height=(2.5 if wide == 1 else 1.7 if len(grid) == 2 else 1.35),
        above=0.4 if wide == 2 else 0.25,
        below=0.58 + 0.17 * rows,
        between=0.15 if plot.shared else 0.7,
        left=LOG_LEFT if plot.log else LEFT,
        sharey=True if plot.shared else "col",
    )
    for place, (here, (head, mine, (heading, label, averages))) in enumerate(zip(axes, grid)):
        for name in (name for name in mine if name in averages):
            _line(here, *averages[name], most=most, band=len(drawn) <= ROOM - 3, **style_of(name, names))
        _finish(here, plot, cell, drawn, ", ".join(filter(None, (head, heading))))
        if place % wide == 0 or not plot.shared:
            here.set_ylabel("\n".join(textwrap.wrap(label, 40 if wide == 1 else 20)))
        if place + wide >= len(grid):
            here.set_xlabel("epoch")
            here.tick_params(labelbottom=True)
    if plot.late:
        _from_late(axes[0], [mean for _, _, averages in columns for mean, _, _ in averages.values()])
    if plot.log:
        log_if_wide(axes[0], [v for _, _, averages in columns for mean, _, _ in averages.values() for v in mean])
    figure.legend(handles=handles, loc="lower center", ncols=abreast, frameon=False, fontsize=8)
    return plot.title, plot.caption, figure


Average = tuple[list[float], list[float], int]  # mean and std of each epoch, and the number of seeds


def _averages(cell: Cell, values: Values) -> dict[str, Average]:
    """{method: its Average} of those that have such a series."""
    found: dict[str, Average] = {}
    for name, runs in cell.runs_of.items():
        if mine := [line for line in map(values, runs.values()) if line]:
            found[name] = (*over_seeds(mine), len(mine))
    return found


def _line(axes: Axes, average: list[float], std: list[float], seeds: int, *, most: int, band: bool, **style: Any) -> None:
    kept = _kept(len(average), most)
    x, y = [place + 1 for place in kept], [average[place] for place in kept]
    axes.plot(x, y, linewidth=1.5, markevery=max(1, len(kept) // 6), **style)
    if band and seeds > 1:
        low, high = ([average[place] + sign * std[place] for place in kept] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _from_late(axes: Axes, averages: Sequence[list[float]]) -> None:
    """Sets the lower end of the axis to the lowest value after a third of the epochs, so that the differences can be seen."""
    late = [value for average in averages for value in average[len(average) // 3 :] if math.isfinite(value)]
    highest = max((value for average in averages for value in average if math.isfinite(value)), default=0)
    if late and highest > min(late):
        axes.set_ylim(min(late) - 0.05 * (highest - min(late)), highest + 0.1 * (highest - min(late)))


def _kept(epochs: int, most: int) -> list[int]:
    """The epochs that are drawn, counted from 0: about `most`, with the first and the last."""
    return sorted({*range(0, epochs, math.ceil(epochs / most)), epochs - 1})


def _finish(axes: Axes, plot: Lines, cell: Cell, drawn: Sequence[str], heading: str) -> None:
    plain(axes)
    axes.set_title(heading, loc="left", pad=15)  # above the word of mark_switch
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if plot.level is not None:
        axes.axhline(plot.level, color="#6b6b6b", linewidth=1, linestyle="--")
    # a method with a warm-up of its own switches at another epoch
    methods = [base_of(name) for name in drawn if "@warmup=" not in name]
    mark_switch(axes, {"config": cell.config | {"methods": methods}})


# ------------------------------------------------------------------------------------------------ classes


def _groups(runs: Sequence[Run]) -> list[tuple[list[int], str]]:
    """[(classes, label)] of plots.class_groups. Above 12 classes, about ten groups of several classes."""
    return [(classes, f"{name}\n({images})") for classes, name, images in class_groups(runs, most=12)]


def _columns(table: Tensor, groups: Sequence[tuple[list[int], str]]) -> Tensor:
    """The mean over the classes of each group: (..., C) → (..., groups). NaN is missing."""
    return torch.stack([table[..., classes].nanmean(-1) for classes, _ in groups], -1)


def _table(rows: Sequence[Sequence[float | None]]) -> Tensor:
    return torch.tensor([numbers(row) for row in rows], dtype=torch.float64, device="cpu")


def recall(cell: Cell, names: Sequence[str]) -> Plot | None:
    """A table of colours: the recall of each method on each class."""
    groups = _groups([run for runs in cell.runs_of.values() for run in runs.values()])
    values = torch.stack(
        [
            _columns(_table([run["per_class_recall"] for run in runs.values()]), groups).nanmean(0)
            for runs in cell.runs_of.values()
        ]
    )
    labels = ["\n".join(textwrap.wrap(cell.rows[name], 32)) for name in cell.runs_of]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    height = (0.24 if all("\n" not in label for label in labels) else 0.3) * len(values)
    figure, (axes,) = make_panels(1, 1, height=height, above=0.08, below=0.65, between=0, left=0.2 + LETTER * longest)
    known = values[values.isfinite()].tolist()
    least = 10 * math.floor(min(known, default=0) / 10)
    _colours(axes, values, min(least, 90), [f"{v:.0f}" for v in values.flatten().tolist()])
    axes.set_yticks(range(len(values)), labels, fontsize=8)
    axes.set_xticks(range(len(groups)), [label for _, label in groups], fontsize=8 if len(groups) <= 8 else 7)
    axes.set_xlabel("class, from most to fewest training images (their number)")
    caption = "Percent of the test images of each class that are recognised after the last epoch. Mean over the seeds."
    return "Recall of each class", caption, figure


def _colours(axes: Axes, values: Tensor, least: float, texts: Sequence[str], size: float = 7) -> Any:
    """A table of colours with its numbers, from `least` to 100 percent."""
    picture = axes.imshow(values.numpy(), cmap="cividis", vmin=least, vmax=100, aspect="auto")
    for place, (text, value) in enumerate(zip(texts, values.flatten().tolist())):
        if math.isfinite(value) and text:
            row, column = divmod(place, values.shape[1])
            colour = "white" if value < least + 0.55 * (100 - least) else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return picture


def _abreast(panels: int) -> int:
    """How many of the panels stand beside each other."""
    return min(panels, 3 if panels > 4 else 2)


def _name(axes: Axes, place: int, wide: int, panels: int, heading: str, xlabel: str, ylabel: str) -> None:
    """The heading of a panel, and the labels of its axes if it stands at the edge."""
    axes.set_title("\n".join(textwrap.wrap(heading, 60 // wide)[:2]), loc="left", fontsize=8)
    if place % wide == 0:
        axes.set_ylabel(ylabel)
    if place + wide >= panels:
        axes.set_xlabel(xlabel)
        axes.tick_params(labelbottom=True)


def _first(names: Sequence[str]) -> tuple[list[str], str]:
    """The first PANELS names, and a sentence that says how many are missing, or nothing."""
    left = len(names) - PANELS
    return list(names[:PANELS]), f" The first {PANELS} methods; {left} more are not shown." if left > 0 else ""


def class_weights(cell: Cell, names: Sequence[str]) -> Plot | None:
    """The mean weight of each class over the epochs, a panel for each method that weighs."""
    found = {}
    for name, runs in cell.runs_of.items():
        tables = [_table(run["epochs"]["class_weight"]) for run in runs.values()]
        tables = [table for table in tables if len(table) == len(tables[0])]
        values = torch.stack(tables).nanmean(0)  # (epochs, C)
        if bool(((values - 1).abs() > 1e-6).any()):
            found[name] = values
    if not found:
        return None
    shown, rest = _first(list(found))
    groups = _groups([run for runs in cell.runs_of.values() for run in runs.values()])
    colours = colormaps["viridis"].resampled(len(groups) + 1)  # the last one, light yellow, cannot be seen on white
    wide = _abreast(len(shown))
    size = {"height": 1.6, "above": 0.36, "below": 0.45, "between": 0.15, "left": LOG_LEFT, "right": 1.2}
    figure, axes = make_panels(len(shown), wide, **size, sharey=True)
    drawn: list[float] = []
    for place, (here, name) in enumerate(zip(axes, shown)):
        table = _columns(found[name], groups).T.tolist()
        kept = _kept(len(table[0]), max(LEAST_POINTS, POINTS // (len(shown) * len(groups))))
        for number, line in enumerate(table):
            here.plot([place + 1 for place in kept], [line[place] for place in kept], color=colours(number), linewidth=1.2)
            drawn += line
        plain(here)
        here.axhline(1, color="#6b6b6b", linewidth=1, linestyle="--")
        here.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
        _name(here, place, wide, len(shown), cell.rows[name], "epoch", "mean weight")
    log_if_wide(axes[0], drawn)
    labels = [label.replace("\n", " ") for _, label in groups]
    handles = [axes[0].plot([], [], color=colours(number), label=label)[0] for number, label in enumerate(labels)]
    figure.legend(handles=handles, loc="upper right", frameon=False, fontsize=7, title="class (images)", title_fontsize=7)
    caption = (
        "The average weight of the samples with this label in the steps of each epoch. Mean over the seeds. The dashed line is 1."
    )
    return "Weight of each class", caption + rest, figure


def confusion(cell: Cell, names: Sequence[str]) -> Plot | None:
    """What the wrongly labelled training samples are predicted as, a panel for each method."""
    found = {}
    for name, runs in cell.runs_of.items():
        tables = [_table(run["flipped_confusion"]) for run in runs.values() if run.get("flipped_confusion")]
        if tables and bool((total := torch.stack(tables).sum(0)).any()):
            found[name] = 100 * total / total.sum(1, keepdim=True).clamp_min(1)
    if not found:
        return None
    shown, rest = _first(list(found))
    wide = _abreast(len(shown))
    size = {"height": 1.6, "above": 0.36, "below": 0.45, "between": 0.15, "right": 0.8}
    figure, axes = make_panels(len(shown), wide, **size, sharey=True)
    for place, (here, name) in enumerate(zip(axes, shown)):
        values = found[name]
        texts = [f"{v:.0f}" if v >= 10 and len(values) <= 10 else "" for v in values.flatten().tolist()]
        picture = _colours(here, values, 0, texts, 6)
        _name(here, place, wide, len(shown), cell.rows[name], "predicted class", "true class")
        here.xaxis.set_major_locator(MaxNLocator(integer=True))
        here.yaxis.set_major_locator(MaxNLocator(integer=True))
    box = axes[0].get_position()
    scale = figure.add_axes((1 - 0.68 / WIDTH, box.y0, 0.12 / WIDTH, box.height))
    figure.colorbar(picture, cax=scale, label="%")
    caption = (
        "What the network predicts for the training samples with a wrong label, in percent of those of their true class, all "
        "seeds together. On the diagonal it has seen through the wrong label."
    )
    return "Predictions for wrong labels", caption + rest, figure


# ------------------------------------------------------------------------------------------------ a cell


def accuracy(cell: Cell, names: Sequence[str]) -> Plot | None:
    """The accuracy that the cell's methods are compared by, over the epochs."""
    label = f"{cell.metric.replace('_', ' ')} on {tested_on(cell.config)}, %"
    return lines(replace(LINES[0], columns=[("", label, series(cell.metric))]), cell, names)


_RIGHT_AND_WRONG, _MEMORISED, _ESS, _LAM = (partial(lines, plot) for plot in LINES[1:])

# title: the function that draws it, in the order of the page. A report of many cells has the first ones only.
PLOTS: dict[str, Callable[[Cell, Sequence[str]], Plot | None]] = {
    LINES[0].title: accuracy,
    "Recall of each class": recall,
    LINES[1].title: _RIGHT_AND_WRONG,
    LINES[2].title: _MEMORISED,
    "Weight of each class": class_weights,
    LINES[3].title: _ESS,
    LINES[4].title: _LAM,
    "Predictions for wrong labels": confusion,
}


def of_training(results: dict[str, Any]) -> list[Plot]:
    """The plots of one training with so many methods that they need panels and tables.

    They name the methods as the training does. Two names of one method, such as sgd and sgd:ce, are two.
    """
    given, names = by_method(results["runs"]), dict[str, str]()
    for method in given:
        name = canonical(method, results["config"]["loss"])
        names[method if name in names.values() else name] = method
    cell = Cell("", results["config"], {}, {name: given[method] for name, method in names.items()}, names)
    return [plot for _, plot in figures(cell, list(names)) if plot]


def figures(cell: Cell, names: Sequence[str]) -> Iterator[tuple[str, Plot | None]]:
    """Yields for each of PLOTS its title, and (title, caption, matplotlib Figure), or None if no run has data for it.

    Args:
        cell: a merged.Cell.
        names: all methods of the report, for their styles.
    """
    for title, draw in PLOTS.items():
        with rc_context(LOOK):
            plot = draw(cell, names)
        yield title, plot
