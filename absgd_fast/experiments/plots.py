"""The results of a training as plots."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from statistics import mean
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .style import FEW, STYLES, bar, legend, log_if_wide, make_axes, mark_switch, style_of
from .summary import BASELINE, RunsOf, by_method, head_to_tail, judged
from .train import Run
from .words import tested_on

Plot = tuple[str, str, Figure]  # title, caption, figure


def figures(results: dict[str, Any]) -> list[Plot]:
    """(title, caption, matplotlib Figure) of each plot that these results allow."""
    runs_of = by_method(results["runs"])
    found = [_accuracy(results, runs_of), _recall(runs_of)]
    weighted = judged(runs_of)
    if weighted:
        found.append(_weights(results, weighted, runs_of[weighted]))
        if results["config"]["noise"] != "none":
            found.append(_clean_and_flipped(results, runs_of))
    return [*found, seconds(runs_of)]


def _over_seeds(runs: Iterable[Run], key: str) -> tuple[Any, Any]:
    """(mean, std) over the seeds of a per-epoch series, each an array (epochs,)."""
    series = torch.tensor([numbers(run["epochs"][key]) for run in runs], dtype=torch.float64, device="cpu")
    return mean_std(series)


def line_and_band(axes: Axes, runs: Iterable[Run], key: str, *, color: str, **style: Any) -> Any:
    """Draws the mean over the seeds of a per-epoch series and a band of one standard deviation; returns the mean, (epochs,)."""
    average, std = _over_seeds(runs, key)
    epochs = range(1, len(average) + 1)
    axes.plot(epochs, average, color=color, **style)
    axes.fill_between(epochs, average - std, average + std, color=color, alpha=0.15, linewidth=0)
    return average


def mean_std(series: Tensor) -> tuple[Any, Any]:
    """(mean, std) along the first dimension of a tensor, as numpy arrays. NaN counts as missing."""
    average, n = series.nanmean(0), series.isfinite().sum(0)
    variance = (series - average).square().nansum(0) / (n - 1).clamp_min(1)
    return average.numpy(), variance.sqrt().numpy()


def numbers(values: Sequence[float | None]) -> list[float]:
    """The values, with NaN for None."""
    return [math.nan if v is None else v for v in values]


def _accuracy(results: dict[str, Any], runs_of: RunsOf) -> Plot:
    figure, axes = make_axes(
        "epoch",
        f"balanced accuracy on {tested_on(results['config'])}, %",
        size=(6.4 if len(runs_of) <= FEW else 8.4, 3.8),
    )
    for method, mine in runs_of.items():
        line_and_band(axes, mine.values(), "balanced_accuracy", label=method, linewidth=1.8, **style_of(method, runs_of))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    mark_switch(axes, results)
    legend(axes, len(runs_of))
    return "Accuracy while training", "Mean over the seeds. The band is ± one standard deviation.", figure


def class_groups(runs: Iterable[Run], most: int = 20) -> list[tuple[list[int], str, str]]:
    """[(classes, name, images)] from most to fewest training images. More than `most` classes make about ten groups."""
    order, counts = head_to_tail(runs)
    size = 1 if len(order) <= most else math.ceil(len(order) / 10)
    groups = []
    for start in range(0, len(order), size):
        classes = order[start : start + size]
        largest, smallest = f"{counts[classes[0]]:g}", f"{counts[classes[-1]]:g}"
        name = f"{classes[0]}" if size == 1 else f"{len(classes)} classes"
        groups.append((classes, name, largest if largest == smallest else f"{largest}–{smallest}"))
    return groups


def _recall(runs_of: RunsOf) -> Plot:
    groups = class_groups([run for mine in runs_of.values() for run in mine.values()])
    size = (6.4 if len(runs_of) <= FEW else 11, 3.8)
    figure, axes = make_axes("class, from most to fewest training images (their number below)", "recall on the test set, %", size)
    width = 0.8 / len(runs_of)
    for i, (method, mine) in enumerate(runs_of.items()):
        recall = torch.tensor([numbers(run["per_class_recall"]) for run in mine.values()], dtype=torch.float64, device="cpu")
        recall = torch.stack([recall[:, classes].nanmean(1) for classes, _, _ in groups], 1)
        average, std = mean_std(recall)
        places = [place + (i - (len(runs_of) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(
            places,
            average,
            width * 0.92,
            yerr=std if len(recall) > 1 else None,
            label=method,
            error_kw={"elinewidth": 0.8, "ecolor": "#222222"},
            **bar(method, runs_of),
        )
    labels = [f"{name}\n{images}".replace(" ", "\n") for _, name, images in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.grid(False, axis="x")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, ncols=min(len(runs_of), 7), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return "Recall of each class", "Mean over the seeds after the last epoch. The whiskers are ± one standard deviation.", figure


def _weights(results: dict[str, Any], method: str, mine: dict[int, Run]) -> Plot:
    groups = class_groups(mine.values())
    series = torch.tensor(
        [[numbers(epoch) for epoch in run["epochs"]["class_weight"]] for run in mine.values()], dtype=torch.float64, device="cpu"
    ).nanmean(0)  # (epochs, C)
    figure, axes = make_axes("epoch", f"mean robust weight under {method}")
    colours = colormaps["viridis"].resampled(len(groups) + 1)  # the last one, light yellow, cannot be seen on white
    lines = [series[:, classes].nanmean(1).tolist() for classes, _, _ in groups]
    for i, ((_, name, images), line) in enumerate(zip(groups, lines)):
        axes.plot(range(1, len(line) + 1), line, color=colours(i), linewidth=1.5, label=f"{name} ({images})")
    axes.axhline(1, color=STYLES[BASELINE]["color"], linewidth=1, linestyle="--")
    log_if_wide(axes, list(chain.from_iterable(lines)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    mark_switch(axes, results)
    axes.legend(
        title="class (training images)",
        frameon=False,
        fontsize=8,
        title_fontsize=8,
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    return (
        "Weight of each class",
        (
            "The average robust weight of the samples with this label in the steps of each epoch; mean over the seeds (as in the "
            "paper's Fig. 4). The dashed line is 1, the weight of every sample under plain SGD."
        ),
        figure,
    )


def _clean_and_flipped(results: dict[str, Any], runs_of: RunsOf) -> Plot:
    methods = [method for method in runs_of if method != BASELINE]
    entries = 2 * len(methods)
    figure, axes = make_axes("epoch", "mean robust weight", (6.4, 3.8) if entries <= FEW else (9, 5.4))
    drawn: list[float] = []
    for method in methods:
        for key, label, marker in (("clean_weight", "right label", "o"), ("flipped_weight", "wrong label", "x")):
            average, _ = _over_seeds(runs_of[method].values(), key)
            epochs = range(1, len(average) + 1)
            axes.plot(
                epochs,
                average,
                label=f"{method}, {label}",
                markevery=max(1, len(average) // 10),
                linewidth=1.6,
                **style_of(method, runs_of) | {"marker": marker, "markersize": 5},
            )
            drawn += average.tolist()
    axes.axhline(1, color=STYLES[BASELINE]["color"], linewidth=1, linestyle="--")
    log_if_wide(axes, drawn)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    mark_switch(axes, results)
    legend(axes, entries, fontsize=8)
    return (
        "Weight of right and wrong labels",
        (
            "The average robust weight of the training samples with a right label, and of those with a flipped label. The method "
            "does not know which labels are flipped. The dashed line is 1, the weight of every sample under plain SGD."
        ),
        figure,
    )


def seconds(runs_of: RunsOf) -> Plot:
    """The time of each method."""
    figure, axes = make_axes("seconds of training per run", "", size=(6.4, 0.9 + 0.55 * len(runs_of)))
    for place, (method, mine) in enumerate(runs_of.items()):
        values = [run["seconds"] for run in mine.values()]
        axes.barh(place, mean(values), 0.6, alpha=0.85, **bar(method, runs_of))
        axes.plot(values, [place] * len(values), "|", color="#111111", markersize=12)
        axes.annotate(
            f"mean {mean(values):.3g} s", (max(values), place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(runs_of)), list(runs_of))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    caption = "Bars are means, ticks are single runs. Only forward, loss, backward and step are timed."
    return "Time", caption, figure
