"""The picture and the table of the README, made from the results of `make demo`.

    python -m benchmarks.readme demo docs/noise.png [record.json]      draws the picture and prints the rows of the table

The picture shows the experiment with wrong labels: accuracy while training, and the weights of right and wrong labels.
"""

import json
import sys
from pathlib import Path
from statistics import median

from matplotlib.figure import Figure

from absgd_fast.experiments.plots import line_and_band
from absgd_fast.experiments.style import DASHED, STYLES, switch_of
from absgd_fast.experiments.summary import by_method, time_ratios
from absgd_fast.experiments.words import plus_minus

RIGHT, WRONG = "#009E73", "#D55E00"  # Okabe and Ito's green and vermilion


def picture(results):
    """A matplotlib Figure with two plots side by side. Each line has its name at its end."""
    runs_of = by_method(results["runs"])
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, name in (("sgd", "SGD"), ("absgd", "ABSGD")):
        line(left, runs_of[method].values(), "balanced_accuracy", name, **STYLES[method])
    left.set_title("Balanced accuracy on the test set, %", loc="left", fontsize=11)
    for key, name, colour in (("clean_weight", "right label", RIGHT), ("flipped_weight", "wrong label", WRONG)):
        line(right, runs_of["absgd"].values(), key, name, color=colour)
    right.set_title("Mean weight of a training sample under ABSGD", loc="left", fontsize=11)
    right.set_ylim(bottom=0)
    epochs, switch = results["config"]["epochs"], switch_of(results["config"])
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.set_xlim(0, epochs * 1.3)
        axes.set_xticks([round(epochs * quarter / 4) for quarter in range(5)])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e6e6e6", linewidth=0.8)
        axes.axvline(switch + 0.5, color="#444444", linewidth=1, linestyle=DASHED)
        axes.annotate(" λ is switched on", (switch + 0.5, 0.42), xycoords=("data", "axes fraction"), fontsize=9, color="#444444")
    return figure


def line(axes, runs, key, name, **style):
    """Draws the mean over the seeds, a band of one standard deviation, and the name at the end of the line."""
    average = line_and_band(axes, runs, key, linewidth=2, **style)
    axes.annotate(
        name,
        (len(average), average[-1]),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        color=style["color"],
        fontweight="bold",
    )


def row(results):
    """The numbers of one row of the README's table: each method's balanced accuracy and its time over plain SGD's."""
    runs_of, cells = by_method(results["runs"]), []
    for method, entry in results["summary"].items():
        cell = plus_minus(entry["balanced_accuracy"], "std")
        if method != "sgd":
            cell += f", {median(time_ratios(runs_of[method], runs_of['sgd'])):.2f} ×"
        cells.append(cell)
    return " | ".join([*cells, plus_minus(results["paired"]["absgd"]["balanced_accuracy"], "stderr", signed=True)])


def record(results):
    """The results of an experiment without its epochs, for benchmarks/results/digits-demo.json."""
    kept = ("method", "seed", "accuracy", "balanced_accuracy", "seconds", "parameters")
    runs = [{name: run[name] for name in kept} for run in results["runs"]]
    return {name: results[name] for name in ("config", "summary", "paired", "environment", "created")} | {"runs": runs}


def main(folder, picture_path, record_path=None):
    """Draws the picture of folder/noise, and prints the rows of folder/noise and folder/longtail."""
    read = {name: json.loads((Path(folder) / name / "results.json").read_text()) for name in ("noise", "longtail")}
    picture(read["noise"]).savefig(picture_path, dpi=140, metadata={"Software": None})
    if record_path is not None:
        text = json.dumps({name: record(results) for name, results in read.items()}, indent=1)
        Path(record_path).write_text(text + "\n")
    for name, results in read.items():
        print(f"{name}: {row(results)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
