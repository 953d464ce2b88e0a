"""The report of a training: the printed table, results.json and report.html.

    results = collect(config, runs, ...)     plain dict, ready for JSON
    table(results)                           rich table for the terminal
    write(results, folder)                   writes results.json and report.html, each completely or not at all

summary.py computes the numbers, words.py the sentences, plots.py the plots (style.py has their look), or merged_plots.py those of
many methods. The page is report.html.jinja, and its look is report.css.jinja.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

from . import merged_plots, plots
from .checkpoint import write_whole
from .pages import rendered
from .summary import BASELINE, by_method, changes, collect, environment, pair, summarise, time_ratios  # noqa: F401
from .svg import embedded
from .words import answers, changes_note, class_counts, notes, plus_minus, title  # noqa: F401

MANY = 6  # methods whose bars of a class, and whose lines of right and wrong labels, can be told apart in one plot


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The summary as text: a header, and a row for each method."""
    header = ["method", "accuracy,\n%", "balanced\naccuracy, %", "seconds\nper run"]
    header += [f"balanced\n− {BASELINE}, points", f"time\n÷ {BASELINE}"]
    runs_of = by_method(results["runs"])
    body: list[list[str]] = []
    for method, entry in results["summary"].items():
        paired = results["paired"].get(method)
        ratios = time_ratios(runs_of[method], runs_of.get(BASELINE, {}))
        body.append(
            [
                method,
                plus_minus(entry["accuracy"], "std"),
                plus_minus(entry["balanced_accuracy"], "std"),
                plus_minus(entry["seconds"], "std", 3 if entry["seconds"]["mean"] < 1 else 2),
                plus_minus(paired["balanced_accuracy"], "stderr", 2, signed=True) if paired else "",
                f"{median(ratios):.2f}" if ratios and method != BASELINE else "",
            ]
        )
    return header, body


EXPLANATION = (
    "Accuracies are those on the test set after the last epoch. Balanced accuracy is the mean recall of the classes. Seconds are "
    "those of training alone. These columns show mean ± standard deviation over the seeds. "
    f"− {BASELINE}: the difference in balanced accuracy, paired by seed, mean ± standard error. "
    f"÷ {BASELINE}: the ratio of the seconds, median over the seeds."
)


def table(results: dict[str, Any]) -> Table:
    """The summary as a rich table. If training was interrupted, its title says so."""
    header, body = rows(results)
    heading = title(results) + (" — interrupted, finished runs only" if results["partial"] else "")
    out = Table(title=heading, caption=EXPLANATION, box=box.SIMPLE_HEAD, title_style="bold", caption_justify="left")
    for i, name in enumerate(header):
        out.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in body:
        out.add_row(*row)
    return out


def write(results: dict[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes results.json and report.html into `folder`, which is created if there is none. Returns their paths.

    A reader never finds half a file, because each file is written under another name and then renamed. The results come first, so
    that they are there even if a plot cannot be drawn.
    """
    into = Path(folder)
    into.mkdir(parents=True, exist_ok=True)
    numbers, page = into / "results.json", into / "report.html"
    write_whole(numbers, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    write_whole(page, html(results).encode())
    return [numbers, page]


def html(results: dict[str, Any]) -> str:
    """The text of report.html. The page needs no other file, because it contains its plots."""
    header, body = rows(results)
    return rendered(
        "report.html.jinja",
        results=results,
        title=title(results),
        answers=answers(results),
        notes=notes(results),
        header=header,
        rows=body,
        explanation=EXPLANATION,
        figures=[{"title": name, "caption": caption, "svg": embedded(figure)} for name, caption, figure in figures(results)],
    )


def figures(results: dict[str, Any]) -> list[plots.Plot]:
    """(title, caption, matplotlib Figure) of each plot. For more than MANY methods they are those of merged trainings."""
    runs_of = by_method(results["runs"])
    if len(runs_of) <= MANY:
        return plots.figures(results)
    return [*merged_plots.of_training(results), plots.seconds(runs_of)]
