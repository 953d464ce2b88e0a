"""The results of a training as plots."""

import math
from statistics import mean

import torch
from matplotlib import colormaps
from matplotlib.ticker import MaxNLocator

from .style import FEW, STYLES, bar, legend, log_if_wide, make_axes, mark_switch
from .summary import BASELINE, by_method, head_to_tail, judged


def figures(results):
    """(title, caption, matplotlib Figure) of each plot that the results allow."""
    runs_of = by_method(results["runs"])
    found = [_accuracy(results, runs_of), _recall(runs_of)]
    weighted = judged(runs_of)
    if weighted:
        found.append(_weights(results, weighted, runs_of[weighted]))
        if results["config"]["noise"] != "none":
            found.append(_clean_and_flipped(results, runs_of))
    return [*found, _seconds(runs_of)]


def over_seeds(runs, key):
    """(mean, std) over the seeds of a per-epoch series, (epochs,) each."""
    series = torch.tensor([_numbers(run["epochs"][key]) for run in runs], dtype=torch.float64)
    return _mean_std(series)


def _mean_std(series):
    """(mean, std) along the first dimension of a tensor, as numpy arrays; NaN counts as missing."""
    average, n = series.nanmean(0), series.isfinite().sum(0)
    variance = (series - average).square().nansum(0) / (n - 1).clamp_min(1)
    return average.numpy(), variance.sqrt().numpy()


def _numbers(values):
    return [math.nan if v is None else v for v in values]


def _accuracy(results, runs_of):
    figure, axes = make_axes("epoch", "balanced accuracy on the test set, %", size=(6.4 if len(runs_of) <= FEW else 8.4, 3.8))
    for method, mine in runs_of.items():
        average, std = over_seeds(mine.values(), "balanced_accuracy")
        epochs = range(1, len(average) + 1)
        axes.plot(epochs, average, label=method, linewidth=1.8, **STYLES[method])
        axes.fill_between(epochs, average - std, average + std, color=STYLES[method]["color"], alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    mark_switch(axes, results)
    legend(axes, len(runs_of))
    return "Accuracy while training", "Mean over the seeds; the band is ± one standard deviation.", figure


def _groups(runs):
    """[(classes, name, images)] from most to fewest training images: one class each, or ten groups where single classes
    would be a smear."""
    order, counts = head_to_tail(runs)
    size = 1 if len(order) <= 20 else math.ceil(len(order) / 10)
    groups = []
    for start in range(0, len(order), size):
        classes = order[start : start + size]
        most, fewest = f"{counts[classes[0]]:g}", f"{counts[classes[-1]]:g}"
        name = f"{classes[0]}" if size == 1 else f"{len(classes)} classes"
        groups.append((classes, name, most if most == fewest else f"{most}–{fewest}"))
    return groups


def _recall(runs_of):
    groups = _groups([run for mine in runs_of.values() for run in mine.values()])
    size = 6.4 if len(runs_of) <= FEW else 11, 3.8
    figure, axes = make_axes("class, from most to fewest training images (their number below)", "recall on the test set, %", size)
    width = 0.8 / len(runs_of)
    for i, (method, mine) in enumerate(runs_of.items()):
        recall = torch.tensor([_numbers(run["per_class_recall"]) for run in mine.values()], dtype=torch.float64)
        recall = torch.stack([recall[:, classes].nanmean(1) for classes, _, _ in groups], 1)
        average, std = _mean_std(recall)
        places = [place + (i - (len(runs_of) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(
            places,
            average,
            width * 0.92,
            yerr=std if len(recall) > 1 else None,
            label=method,
            error_kw={"elinewidth": 0.8, "ecolor": "#222222"},
            **bar(method),
        )
    labels = [f"{name}\n{images}".replace(" ", "\n") for _, name, images in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.grid(False, axis="x")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, ncols=min(len(runs_of), 7), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return "Recall of each class", "Mean over the seeds after the last epoch; whiskers are ± one standard deviation.", figure


def _weights(results, method, mine):
    groups = _groups(mine.values())
    series = torch.tensor(
        [[_numbers(epoch) for epoch in run["epochs"]["class_weight"]] for run in mine.values()], dtype=torch.float64
    ).nanmean(0)  # (epochs, C)
    figure, axes = make_axes("epoch", f"mean robust weight under {method}")
    colours = colormaps["viridis"].resampled(len(groups) + 1)  # its last, light yellow, is lost on white
    lines = [series[:, classes].nanmean(1).tolist() for classes, _, _ in groups]
    for i, ((_, name, images), line) in enumerate(zip(groups, lines)):
        axes.plot(range(1, len(line) + 1), line, color=colours(i), linewidth=1.5, label=f"{name} ({images})")
    axes.axhline(1, color=STYLES[BASELINE]["color"], linewidth=1, linestyle="--")
    log_if_wide(axes, sum(lines, []))
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
        "Average robust weight that the steps of each epoch gave to the samples labelled as this class, mean over the "
        "seeds (the paper's Fig. 4). Dashed: 1, plain SGD's weight for every sample.",
        figure,
    )


def _clean_and_flipped(results, runs_of):
    size = (6.4, 3.8) if len(runs_of) <= FEW else (9, 5.4)
    figure, axes = make_axes("epoch", "mean robust weight", size)
    ends = []
    for method in runs_of:
        if method == BASELINE:
            continue
        for key, label, marker in (("clean_weight", "right label", "o"), ("flipped_weight", "wrong label", "x")):
            average, _ = over_seeds(runs_of[method].values(), key)
            epochs = range(1, len(average) + 1)
            axes.plot(
                epochs,
                average,
                label=f"{method}, {label}",
                marker=marker,
                markevery=max(1, len(average) // 10),
                markersize=5,
                linewidth=1.6,
                **STYLES[method],
            )
            ends += average.tolist()
    axes.axhline(1, color=STYLES[BASELINE]["color"], linewidth=1, linestyle="--")
    log_if_wide(axes, ends)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    mark_switch(axes, results)
    legend(axes, len(runs_of), fontsize=8)
    return (
        "Weight of right and wrong labels",
        "Average robust weight of the training samples whose label is right, and of those whose label was flipped; the "
        "method is not told which is which. Dashed: 1, plain SGD's weight for every sample.",
        figure,
    )


def _seconds(runs_of):
    figure, axes = make_axes("seconds of training per run", "", size=(6.4, 0.9 + 0.55 * len(runs_of)))
    for place, (method, mine) in enumerate(runs_of.items()):
        values = [run["seconds"] for run in mine.values()]
        axes.barh(place, mean(values), 0.6, alpha=0.85, **bar(method))
        axes.plot(values, [place] * len(values), "|", color="#111111", markersize=12)
        axes.annotate(
            f"{mean(values):.3g} s", (max(values), place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(runs_of)), list(runs_of))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    return "Time", "Bars: mean; ticks: each run. Forward, loss, backward and step; no evaluation, no bookkeeping.", figure
