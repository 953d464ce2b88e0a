"""The picture of docs/performance.md, made from the records of the benchmark.

    python -m benchmarks.performance_plot [RECORD.json ...] [--out docs/performance.png]

It shows the ratio of our time to that of each competitor: a dot at the median, a whisker from quartile to quartile, and a mark at
the ratio that was aimed at. A case that is in several records is drawn from the last of them. Without arguments the records are
those of the tables in docs/performance.md.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from absgd_fast.experiments.style import STYLES, plain

from . import changes
from .cases import PLAIN_HEAD, chunked
from .verdict import too_noisy

ROOT = Path(__file__).parent
RECORDS = [ROOT / "results" / f"cpu-2-cores-avx512{part}.json" for part in ("", "-steps", "-heads", "-training")]
TORCH, PACKAGE, DEFAULT, CHUNKED = (STYLES[name]["color"] for name in ("absgd", "reference", "l2rw", "cvar"))
# {suite: (title, {competitor: (its name in the legend, colour, marker)})}
_OF_TORCH = ("torch's fastest: F.cross_entropy, logits stored, and fused or foreach steps", TORCH, "o")
_OF_PACKAGE = ("the package absgd", PACKAGE, "s")
_OF_DEFAULT = ("torch's SGD by default", DEFAULT, "D")
PANELS = {
    "loss": ("ABLoss, forward and backward", {"cross_entropy": _OF_TORCH, "absgd package": _OF_PACKAGE}),
    "step": ("ABSGD.step()", {"SGD fused": _OF_TORCH, "SGD default": _OF_DEFAULT}),
    "rules": ("step() of the other optimizers", {"torch's fastest": _OF_TORCH}),
    "linear": (
        "LinearABLoss, forward and backward: rows × width × classes",
        {PLAIN_HEAD: _OF_TORCH, chunked("auto"): ("torch's chunked loss of a head, with the policy auto", CHUNKED, "^")},
    ),
    "train": ("Whole training steps", {"cross_entropy, SGD fused": _OF_TORCH, "absgd package": _OF_PACKAGE}),
    "language model": ("Whole steps of a language model, LinearABLoss", {"logits stored, SGD fused": _OF_TORCH}),
}
ROW, HEAD, FOOT = 0.27, 0.45, 0.95  # inches: of a case, of a panel's title, of axis and legend


def cases(records):
    """{suite: {case: peers}} of the suites that are drawn, in their order there. A case is taken from its last record."""
    found = {}
    for record in records:
        for result in record["results"]:
            if result["suite"] in PANELS and "peers" in result:
                found.setdefault(result["suite"], {})[result["case"]] = result["peers"]
    return {suite: found[suite] for suite in PANELS if suite in found}


def picture(records):
    """A matplotlib Figure with a panel for each suite and a row for each case. Raises ValueError if there is nothing to draw."""
    suites = cases(records)
    if not suites:
        raise ValueError(f"the records have none of the suites {', '.join(PANELS)}")
    rows = [len(of) for of in suites.values()]
    height = ROW * sum(rows) + HEAD * len(rows) + FOOT
    figure = Figure(figsize=(9.2, height), layout="constrained")
    panels = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=[n + HEAD / ROW for n in rows])[:, 0]
    for axes, (suite, of) in zip(panels, suites.items()):
        _panel(axes, suite, of)
    panels[-1].set_xlabel("our time over theirs (below 1 we are faster)")
    drawn = [style for suite in suites for style in PANELS[suite][1].values()]
    figure.legend(handles=_legend(dict.fromkeys(drawn)), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _panel(axes, suite, of):
    title, competitors = PANELS[suite]
    plain(axes)
    axes.grid(False, axis="y")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(labelbottom=True, labelsize=9)
    axes.axvline(1, color="#444444", linewidth=1)
    axes.set_yticks(range(len(of)), list(of))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(of) - 0.4, -0.6)
    for row, peers in enumerate(of.values()):
        axes.axhspan(row - 0.5, row + 0.5, color="#f5f5f5" if row % 2 else "white", linewidth=0, zorder=0)
        shown = [name for name in competitors if name in peers]
        for place, name in enumerate(shown):
            _ratio(axes, row + 0.3 * (place - (len(shown) - 1) / 2), peers[name], *competitors[name][1:])


def _ratio(axes, y, peer, colour, marker):
    ratio = peer["ratio"]
    axes.hlines(y, ratio["q1"], ratio["q3"], color=colour, linewidth=1.6)
    axes.plot(ratio["median"], y, marker, color=colour, markersize=5.5, markerfacecolor="white" if too_noisy(ratio) else colour)
    if peer["target"] is not None:
        axes.plot(peer["target"], y, "|", color=colour, markersize=11, markeredgewidth=1.6)


def _legend(styles):
    """The entries: the competitors, and what the marks mean."""
    entries = [Line2D([], [], linestyle="", marker=marker, color=colour, label=name) for name, colour, marker in styles]
    hollow = {"marker": "o", "markerfacecolor": "white", "color": "#444444"}
    return [
        *entries,
        Line2D([], [], linestyle="", label="varies by more than 10 %", **hollow),
        Line2D([], [], linestyle="", marker="|", color="#444444", markersize=11, markeredgewidth=1.6, label="aimed at"),
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.performance_plot", description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="*", default=RECORDS, metavar="RECORD.json")
    parser.add_argument("--out", type=Path, default=ROOT.parent / "docs" / "performance.png")
    given = parser.parse_args(argv)
    try:
        figure = picture([changes.read(path) for path in given.records])
    except (changes.NotARecord, ValueError) as refusal:
        parser.error(str(refusal))
    figure.savefig(given.out, dpi=140, metadata={"Software": None})
    print(f"written: {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
