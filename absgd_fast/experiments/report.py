"""What came out: the printed table, results.json and report.html.

    results = collect(config, runs, ...)     plain dict, ready for JSON
    table(results)                           rich table for the terminal
    write(results, folder)                   results.json and report.html, each whole or not at all

The numbers are made in summary.py, the sentences in words.py, the plots in plots.py (their look in style.py), and the look of the
page is report.css.jinja.
"""

import base64
import io
import json
from pathlib import Path
from statistics import median

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.table import Table

from .checkpoint import write_whole
from .plots import figures
from .summary import BASELINE, by_method, changes, collect, environment, pair, summarise, time_ratios  # noqa: F401
from .words import answers, changes_note, notes, plus_minus, title  # noqa: F401


def rows(results):
    """The summary as text: a header and a row per method."""
    header = ["method", "accuracy,\n%", "balanced\naccuracy, %", "seconds\nper run"]
    header += [f"balanced\n− {BASELINE}, points", f"time\n÷ {BASELINE}"]
    runs_of, body = by_method(results["runs"]), []
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
    templates = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    return templates.get_template("report.html.jinja").render(
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
