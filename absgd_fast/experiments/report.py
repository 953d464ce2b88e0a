"""What came out: summaries, the printed table, results.json and report.html.

    results = collect(config, runs, ...)     plain dict, ready for JSON
    table(results)                           rich table for the terminal
    write(results, folder)                   results.json and report.html, each whole or not at all

Differences are paired: each seed's result less plain SGD's on the same seed, so the luck of the split cancels.
Every sentence of the report is computed from the results, whichever way they point.
"""

import base64
import datetime
import importlib.metadata
import io
import json
import math
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median, stdev

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from rich import box
from rich.table import Table

from absgd_fast import _backend

from .checkpoint import write_whole
from .methods import IN_STAGES, OF_LAM

BASELINE = "sgd"
METRICS = ("accuracy", "balanced_accuracy", "seconds")

# what may change the last bits of a result; --resume keeps the number of threads itself
BITS = ("torch", "absgd_fast", "absgd", "backend", "instruction set", "machine")

# Okabe and Ito's colours, which colour-blind readers tell apart, and a line style each: not by colour alone
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


# ------------------------------------------------------------------------------------------------ numbers


def collect(config, runs, *, command=(), threads=None, partial=False, earlier=()):
    """The results as one dict, ready for JSON.

    Args:
        config: the train.Config of the runs.
        runs: what train.runs yielded, all or the first few.
        command: the command line, for the report.
        threads: CPU threads that torch used.
        partial: True when training was cut short.
        earlier: where training was resumed, environment() of each part before this one.

    Returns:
        {"config": {...}, "runs": [...], "summary": summarise(runs), "paired": pair(runs), "partial", "command",
        "environment", "changes": changes([*earlier, environment(...)]), "created"}
    """
    here = environment(config, threads)
    settings = asdict(config) | {"methods": list(config.methods)}
    if math.isinf(config.lam):
        settings["lam"] = str(config.lam)  # JSON has no infinity
    return {
        "config": settings,
        "runs": list(runs),
        "summary": summarise(runs),
        "paired": pair(runs),
        "partial": partial,
        "command": shlex.join(command),
        "environment": here,
        "changes": changes([*earlier, here]),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def environment(config, threads):
    """What the results were made with, name by name: versions, kernels, machine."""
    here = _backend.report()
    found = {name: str(here[name]) for name in ("python", "torch")} | {"absgd_fast": here["version"]}  # torch's is no plain str
    if "reference" in config.methods:
        found["absgd"] = importlib.metadata.version("absgd")
    return found | {
        "backend": here["selected for CPU tensors"],
        "instruction set": here["cpu"]["instruction set"],
        "machine": here["cpu"]["machine"],
        "cpus": os.cpu_count(),
        "threads": threads,
    }


def changes(environments):
    """{name: [value, …]} of what the parts of a resumed training had different and what may change their bits.

    Example:
        >>> from absgd_fast.experiments.report import changes
        >>> changes([{"torch": "2.12.0", "cpus": 2}, {"torch": "2.13.0", "cpus": 4}])
        {'torch': ['2.12.0', '2.13.0']}
    """
    values = {name: list(dict.fromkeys(e[name] for e in environments if name in e)) for name in BITS}
    return {name: several for name, several in values.items() if len(several) > 1}


def summarise(runs):
    """{method: {metric: {"mean", "std", "n"}}} over the seeds; std with n − 1, None for a single seed.

    Example:
        >>> from absgd_fast.experiments.report import summarise
        >>> numbers = {"accuracy": 70.0, "balanced_accuracy": 70.0, "seconds": 1.0}
        >>> runs = [{"method": "sgd", "seed": 0} | numbers, {"method": "sgd", "seed": 1} | numbers | {"accuracy": 72.0}]
        >>> summarise(runs)["sgd"]["accuracy"]
        {'mean': 71.0, 'std': 1.4142135623730951, 'n': 2}
    """
    summary = {}
    for method, mine in _by_method(runs).items():
        columns = {metric: [run[metric] for run in mine.values()] for metric in METRICS}
        summary[method] = {m: {"mean": mean(v), "std": _std(v), "n": len(v)} for m, v in columns.items()}
    return summary


def pair(runs, baseline=BASELINE):
    """{method: {metric: {"mean", "stderr", "n"}}} of each method's difference to the baseline on the same seed.

    Only seeds that both finished count. stderr = std / √n, None for a single seed; no baseline, no entries.
    """
    by_method = _by_method(runs)
    base = by_method.pop(baseline, {})
    pairs = {}
    for method, mine in by_method.items():
        if shared := sorted(mine.keys() & base.keys()):
            pairs[method] = {}
            for metric in METRICS:
                differences = [mine[seed][metric] - base[seed][metric] for seed in shared]
                pairs[method][metric] = {"mean": mean(differences), "stderr": _stderr(differences), "n": len(shared)}
    return pairs


def _by_method(runs):
    """{method: {seed: run}}, methods in the order of STYLES (plain SGD first)."""
    methods = sorted({run["method"] for run in runs}, key=list(STYLES).index)
    return {m: {run["seed"]: run for run in runs if run["method"] == m} for m in methods}


def _judged(by_method):
    return next((m for m in by_method if m != BASELINE), None)


def _std(values):
    return stdev(values) if len(values) > 1 else None


def _stderr(values):
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


# ------------------------------------------------------------------------------------------------ words


def answers(results):
    """What the report says first: {"verdict": "better" | "worse" | "unclear" | "none", "help", "classes", "cost"}.

    The method judged is absgd, or else the first other in the order of STYLES, by its balanced accuracy against plain SGD. Its
    difference counts as one only when 0 lies outside the 95 % interval of Student's t over the paired seeds.
    """
    by_method = _by_method(results["runs"])
    method = _judged(by_method)
    pairs = results["paired"].get(method)
    if pairs is None:
        reached = "; ".join(f"{m} {_plus_minus(s['balanced_accuracy'], 'std')} %" for m, s in results["summary"].items())
        return {
            "verdict": "none",
            "help": f"Cannot be said: it takes a seed that both {BASELINE} and another method have finished. "
            f"Balanced accuracy: {reached}.",
            "classes": "Cannot be said without that comparison.",
            "cost": "Cannot be said without that comparison.",
        }
    mine, base = by_method[method], by_method[BASELINE]
    seeds = sorted(mine.keys() & base.keys())
    verdict, sentence = _judge(method, mine, base, seeds)
    return {
        "verdict": verdict,
        "help": sentence,
        "classes": _classes(mine, base, seeds),
        "cost": _cost(method, by_method, seeds),
    }


def _judge(method, mine, base, seeds):
    values = [(mine[s]["balanced_accuracy"], base[s]["balanced_accuracy"]) for s in seeds]
    differences = [a - b for a, b in values]
    gap, level = mean(differences), [mean(column) for column in zip(*values)]
    levels = f"{level[0]:.1f} % against {level[1]:.1f} %"
    if len(seeds) == 1:
        return "unclear", (
            f"One seed cannot tell: {method} came out {_signed(gap)} points of balanced accuracy from {BASELINE} "
            f"({levels}), and how much of that is chance takes more seeds to see."
        )
    from scipy.stats import t  # comes with scikit-learn; a second to import

    error = _stderr(differences)
    margin = float(t.ppf(0.975, len(seeds) - 1)) * error
    wins = sum(d > 0 for d in differences)
    size = f"{abs(gap):.1f} ± {error:.1f} points of balanced accuracy"
    tail = f"({levels}; mean ± standard error over {len(seeds)} paired seeds, better in {wins} of them)"
    if gap - margin > 0:
        return "better", f"Yes. {method} beat {BASELINE} by {size} {tail}."
    if gap + margin < 0:
        return "worse", f"No, it did harm. {method} fell behind {BASELINE} by {size} {tail}."
    return "unclear", (
        f"Not shown. {method} and {BASELINE} differ by {_signed(gap)} ± {error:.1f} points of balanced accuracy "
        f"{tail}; the 95 % interval, {_signed(gap - margin)} to {_signed(gap + margin)}, contains 0."
    )


def _classes(mine, base, seeds):
    order, counts = _head_to_tail(mine.values())
    gains = {}
    for c in order:
        pairs = [(mine[s]["per_class_recall"][c], base[s]["per_class_recall"][c]) for s in seeds]
        if pairs := [(a, b) for a, b in pairs if a is not None and b is not None]:
            gains[c] = mean(a - b for a, b in pairs)

    def listed(classes):
        return ", ".join(f"class {c} ({_signed(gains[c])} points, {_images(counts[c])})" for c in classes)

    risen = sorted((c for c in gains if gains[c] > 0), key=lambda c: -gains[c])
    fallen = sorted((c for c in gains if gains[c] < 0), key=lambda c: gains[c])
    text = f"Recall rose on {len(risen)} of {len(gains)} classes"
    text += f", most on {listed(risen[:3])}. " if risen else ". "
    text += f"It fell on {len(fallen)}, most on {listed(fallen[:3])}." if fallen else "It fell on none."
    if max(counts) > min(counts):
        half = len(order) // 2
        head, tail = ([gains[c] for c in part if c in gains] for part in (order[:half], order[half:]))
        if head and tail:
            text += (
                f" Averaged over the {half} largest classes: {_signed(mean(head))} points; over the "
                f"{len(order) - half} smallest: {_signed(mean(tail))}."
            )
    right, wrong = (
        [w for s in seeds if (w := mine[s]["epochs"][key][-1]) is not None] for key in ("clean_weight", "flipped_weight")
    )
    if right and wrong:
        text += f" In the last epoch right labels weighed {mean(right):.2f} on average, wrong ones {mean(wrong):.2f}."
    return text


def _cost(method, by_method, seeds):
    text = f"{method} trained for {median(by_method[method][s]['seconds'] for s in seeds):.3g} s per run"
    others = [BASELINE] + [m for m in by_method if m not in (BASELINE, method)]
    parts = []
    for other in others:
        if ratios := _time_ratios(by_method[method], by_method[other]):
            parts.append(
                f"{median(ratios):.2f} times {other}'s time (median of {len(ratios)} paired runs, "
                f"{min(ratios):.2f} to {max(ratios):.2f})"
            )
    return f"{text}: {', and '.join(parts)}. Only forward, loss, backward and step are timed."


def _time_ratios(mine, base):
    return [mine[s]["seconds"] / base[s]["seconds"] for s in sorted(mine.keys() & base.keys())]


def changes_note(changed):
    """A sentence about changes() that are not empty."""
    parts = [f"{name} ({', then '.join(map(str, values))})" for name, values in changed.items()]
    return f"Training was resumed with another {', '.join(parts)}: its last bits need not be those of one never stopped."


def notes(results):
    """Things a reader must know before trusting the numbers, as sentences; often none."""
    by_method, found = _by_method(results["runs"]), []
    if results["changes"]:
        found.append(changes_note(results["changes"]))
    if results["partial"]:
        found.append(
            f"Training was interrupted: {len(results['runs'])} of "
            f"{len(results['config']['methods']) * results['config']['seeds']} runs were finished, and only these count."
        )
    for method, mine in by_method.items():
        if broken := sum(run["train_loss"] is None for run in mine.values()):
            found.append(f"{broken} of {len(mine)} runs of {method} ended with a loss that is not a finite number.")
        # one class gets every image: the others are too rare, or a step was too large and ReLUs no longer answer
        if stuck := sum(sorted(r or 0 for r in run["per_class_recall"])[-2:] == [0, 100] for run in mine.values()):
            hint = " Weights that rest on few samples make large steps: a smaller learning rate may help." * (method == "l2rw")
            found.append(f"{stuck} of {len(mine)} runs of {method} ended with one answer for every image.{hint}")
    losses = [run["train_loss"] for run in by_method.get(BASELINE, {}).values() if run["train_loss"] is not None]
    if losses and mean(losses) < 0.01:
        found.append(
            f"Plain SGD ended with a training loss of {mean(losses):.2g}: the model fits its training set, and where "
            "all losses vanish there is nothing left to reweight. A smaller model, more weight decay or fewer epochs "
            "leave something."
        )
    return found


def title(results):
    """The experiment in one line."""
    c = results["config"]
    parts = [c["dataset"]]
    if c["imbalance"] != "none":
        parts.append(f"{ {'lt': 'long-tailed', 'step': 'step-imbalanced'}[c['imbalance']] } ρ = {c['rho']:g}")
    if c["noise"] != "none":
        parts.append(f"{100 * c['noise_rate']:g} % {c['noise']} label noise")
    seeds = len({run["seed"] for run in results["runs"]})
    if set(c["methods"]) & set(OF_LAM):
        lam = c["lam"] if isinstance(c["lam"], str) else f"{c['lam']:g}"
        lams = [f"λ = {_minus(lam)}"]
    else:
        lams = []
    return ", ".join([*parts, c["model"], *lams, f"{seeds} seed{'s' * (seeds != 1)}"])


def _head_to_tail(runs):
    """(class indices from most to fewest training samples, mean count of each class)."""
    columns = zip(*(run["train_counts"] for run in runs))
    counts = [mean(column) for column in columns]
    return sorted(range(len(counts)), key=lambda c: -counts[c]), counts


def _images(count):
    return f"{count:g} training image{'s' * (count != 1)}"


def _minus(text):
    return text.replace("-", "−")


def _signed(value, digits=1):
    return _minus(f"{value:+.{digits}f}")


def _plus_minus(entry, spread, digits=1, signed=False):
    """ "71.0 ± 1.4", or "71.0" where one seed has no spread."""
    text = _signed(entry["mean"], digits) if signed else f"{entry['mean']:.{digits}f}"
    return text if entry[spread] is None else f"{text} ± {entry[spread]:.{digits}f}"


# ------------------------------------------------------------------------------------------------ tables and files


def rows(results):
    """The summary as text: a header and a row per method."""
    header = ["method", "accuracy,\n%", "balanced\naccuracy, %", "seconds\nper run"]
    header += [f"balanced\n− {BASELINE}, points", f"time\n÷ {BASELINE}"]
    by_method, body = _by_method(results["runs"]), []
    for method, entry in results["summary"].items():
        paired = results["paired"].get(method)
        ratios = _time_ratios(by_method[method], by_method.get(BASELINE, {}))
        body.append([
            method,
            _plus_minus(entry["accuracy"], "std"),
            _plus_minus(entry["balanced_accuracy"], "std"),
            _plus_minus(entry["seconds"], "std", 3 if entry["seconds"]["mean"] < 1 else 2),
            _plus_minus(paired["balanced_accuracy"], "stderr", 2, signed=True) if paired else "",
            f"{median(ratios):.2f}" if ratios and method != BASELINE else "",
        ])  # fmt: skip
    return header, body


EXPLANATION = (
    "Test set after the last epoch; balanced accuracy is the mean recall of the classes; seconds of training alone: mean "
    f"± standard deviation over the seeds. − {BASELINE}: difference in balanced accuracy, paired by seed, mean ± standard "
    f"error. ÷ {BASELINE}: median over the seeds."
)


def table(results):
    """The summary as a rich table; for an interrupted training its title says so."""
    header, body = rows(results)
    heading = title(results) + (" — interrupted, finished runs only" if results["partial"] else "")
    out = Table(title=heading, caption=EXPLANATION, box=box.SIMPLE_HEAD, title_style="bold", caption_justify="left")
    for i, name in enumerate(header):
        out.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in body:
        out.add_row(*row)
    return out


def write(results, folder):
    """Writes results.json and report.html into `folder`, which is made if need be; returns their paths.

    Each is written beside its place and then moved there, so a reader never finds half a file.
    """
    folder = Path(folder)
    texts = {"results.json": json.dumps(results, indent=1, allow_nan=False) + "\n", "report.html": html(results)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(folder / name, text.encode())
    return [folder / name for name in texts]


def html(results):
    """report.html: one file with everything in it, plots included."""
    header, body = rows(results)
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.jinja").render(
        results=results,
        title=title(results),
        answers=answers(results),
        notes=notes(results),
        header=header,
        rows=body,
        explanation=EXPLANATION,
        figures=[{"title": heading, "caption": caption, "svg": _svg(figure)} for heading, caption, figure in figures(results)],
    )


def _svg(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode()


# ------------------------------------------------------------------------------------------------ plots


def figures(results):
    """(title, caption, matplotlib Figure) of each plot that the results allow."""
    by_method = _by_method(results["runs"])
    found = [_accuracy(results, by_method), _recall(by_method)]
    weighted = _judged(by_method)
    if weighted:
        found.append(_weights(results, weighted, by_method[weighted]))
        if results["config"]["noise"] != "none":
            found.append(_clean_and_flipped(results, by_method))
    return [*found, _seconds(by_method)]


def _axes(xlabel, ylabel, size=(6.4, 3.8)):
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


FEW = 4  # methods that a legend inside the axes has room for


def _legend(axes, methods, **options):
    """Inside the axes, or beside them where there are too many methods."""
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if methods > FEW else {}
    axes.legend(frameon=False, **options | beside)


def _bar(method):
    """A bar's colour; what is dashed or dotted as a line is hatched, for one colour serves two methods."""
    style = STYLES[method]
    hatch = {DASHED: "//", DOTTED: ".."}.get(style["linestyle"])
    return {"color": style["color"]} | ({"hatch": hatch, "edgecolor": "white", "linewidth": 0} if hatch else {})


def _over_seeds(runs, key):
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


def _mark_switch(axes, results):
    """A line where λ, or a rule, is switched on."""
    c = results["config"]
    switch, switched = round(c["warmup"] * c["epochs"]), [m for m in c["methods"] if m in IN_STAGES]
    if 0 < switch < c["epochs"] and switched:
        axes.axvline(switch + 0.5, color="#444444", linewidth=1, linestyle=":")
        axes.annotate(
            "λ on" if set(switched) & set(OF_LAM) else "rule on", (switch + 0.5, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
            ha="center", va="bottom", fontsize=9, color="#444444",
        )  # fmt: skip


def _accuracy(results, by_method):
    figure, axes = _axes("epoch", "balanced accuracy on the test set, %", size=(6.4 if len(by_method) <= FEW else 8.4, 3.8))
    for method, mine in by_method.items():
        average, std = _over_seeds(mine.values(), "balanced_accuracy")
        epochs = range(1, len(average) + 1)
        axes.plot(epochs, average, label=method, linewidth=1.8, **STYLES[method])
        axes.fill_between(epochs, average - std, average + std, color=STYLES[method]["color"], alpha=0.15, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_switch(axes, results)
    _legend(axes, len(by_method))
    return "Accuracy while training", "Mean over the seeds; the band is ± one standard deviation.", figure


def _groups(runs):
    """[(classes, name, images)] from most to fewest training images: one class each, or ten groups where single classes
    would be a smear."""
    order, counts = _head_to_tail(runs)
    size = 1 if len(order) <= 20 else math.ceil(len(order) / 10)
    groups = []
    for start in range(0, len(order), size):
        classes = order[start : start + size]
        most, fewest = f"{counts[classes[0]]:g}", f"{counts[classes[-1]]:g}"
        name = f"{classes[0]}" if size == 1 else f"{len(classes)} classes"
        groups.append((classes, name, most if most == fewest else f"{most}–{fewest}"))
    return groups


def _recall(by_method):
    groups = _groups([run for mine in by_method.values() for run in mine.values()])
    size = 6.4 if len(by_method) <= FEW else 11, 3.8
    figure, axes = _axes("class, from most to fewest training images (their number below)", "recall on the test set, %", size)
    width = 0.8 / len(by_method)
    for i, (method, mine) in enumerate(by_method.items()):
        recall = torch.tensor([_numbers(run["per_class_recall"]) for run in mine.values()], dtype=torch.float64)
        recall = torch.stack([recall[:, classes].nanmean(1) for classes, _, _ in groups], 1)
        average, std = _mean_std(recall)
        places = [place + (i - (len(by_method) - 1) / 2) * width for place in range(len(groups))]
        axes.bar(
            places, average, width * 0.92, yerr=std if len(recall) > 1 else None, label=method,
            error_kw={"elinewidth": 0.8, "ecolor": "#222222"}, **_bar(method),
        )  # fmt: skip
    labels = [f"{name}\n{images}".replace(" ", "\n") for _, name, images in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.grid(False, axis="x")
    axes.set_ylim(0, 105)
    axes.legend(frameon=False, ncols=min(len(by_method), 7), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return "Recall of each class", "Mean over the seeds after the last epoch; whiskers are ± one standard deviation.", figure


def _weights(results, method, mine):
    groups = _groups(mine.values())
    series = torch.tensor(
        [[_numbers(epoch) for epoch in run["epochs"]["class_weight"]] for run in mine.values()], dtype=torch.float64
    ).nanmean(0)  # (epochs, C)
    figure, axes = _axes("epoch", f"mean robust weight under {method}")
    colours = colormaps["viridis"].resampled(len(groups) + 1)  # its last, light yellow, is lost on white
    lines = [series[:, classes].nanmean(1).tolist() for classes, _, _ in groups]
    for i, ((_, name, images), line) in enumerate(zip(groups, lines)):
        axes.plot(range(1, len(line) + 1), line, color=colours(i), linewidth=1.5, label=f"{name} ({images})")
    axes.axhline(1, color=STYLES[BASELINE]["color"], linewidth=1, linestyle="--")
    _log_if_wide(axes, sum(lines, []))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_switch(axes, results)
    axes.legend(
        title="class (training images)", frameon=False, fontsize=8, title_fontsize=8, loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )  # fmt: skip
    return (
        "Weight of each class",
        "Average robust weight that the steps of each epoch gave to the samples labelled as this class, mean over the "
        "seeds (the paper's Fig. 4). Dashed: 1, plain SGD's weight for every sample.",
        figure,
    )


def _clean_and_flipped(results, by_method):
    size = (6.4, 3.8) if len(by_method) <= FEW else (9, 5.4)
    figure, axes = _axes("epoch", "mean robust weight", size)
    ends = []
    for method in by_method:
        if method == BASELINE:
            continue
        for key, label, marker in (("clean_weight", "right label", "o"), ("flipped_weight", "wrong label", "x")):
            average, _ = _over_seeds(by_method[method].values(), key)
            epochs = range(1, len(average) + 1)
            axes.plot(
                epochs, average, label=f"{method}, {label}", marker=marker, markevery=max(1, len(average) // 10),
                markersize=5, linewidth=1.6, **STYLES[method],
            )  # fmt: skip
            ends += average.tolist()
    axes.axhline(1, color=STYLES[BASELINE]["color"], linewidth=1, linestyle="--")
    _log_if_wide(axes, ends)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_switch(axes, results)
    _legend(axes, len(by_method), fontsize=8)
    return (
        "Weight of right and wrong labels",
        "Average robust weight of the training samples whose label is right, and of those whose label was flipped; the "
        "method is not told which is which. Dashed: 1, plain SGD's weight for every sample.",
        figure,
    )


def _log_if_wide(axes, values):
    """A log scale when the weights span more than a factor of four."""
    values = [value for value in values if math.isfinite(value) and value > 0]
    if values and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _seconds(by_method):
    figure, axes = _axes("seconds of training per run", "", size=(6.4, 0.9 + 0.55 * len(by_method)))
    for place, (method, mine) in enumerate(by_method.items()):
        values = [run["seconds"] for run in mine.values()]
        axes.barh(place, mean(values), 0.6, alpha=0.85, **_bar(method))
        axes.plot(values, [place] * len(values), "|", color="#111111", markersize=12)
        axes.annotate(
            f"{mean(values):.3g} s", (max(values), place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(by_method)), list(by_method))
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    return "Time", "Bars: mean; ticks: each run. Forward, loss, backward and step; no evaluation, no bookkeeping.", figure
