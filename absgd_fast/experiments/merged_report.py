"""The report of merged trainings: the printed tables, report.html, report.md and report.json.

    cells, twice = merge(find(folders))
    results = numbers(cells, twice)
    write(cells, results, folder)            writes the three files, each completely or not at all

merged.py computes the numbers, merged_plots.py has the plots and merged_panels.py their panels. The page is merged.html.jinja,
and its look is report.css.jinja.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .checkpoint import write_whole
from .merged import AHEAD, ALIKE, BEHIND, Cell
from .merged_plots import PLOTS, figures
from .pages import rendered
from .summary import BASELINE, changes
from .svg import compact
from .words import plus_minus

DIGITS = 2  # decimals of an accuracy, as in the papers' tables
BYTES = 2_500_000  # of the plots of a page, shared by its cells. A MB of them takes 10 to 20 seconds
MOST_CELLS = 100  # that have plots at all
MARKS = {AHEAD: "▲", BEHIND: "▼", ALIKE: ""}
WORDS = {
    AHEAD: "ahead by more than two standard errors",
    BEHIND: "behind by more than two standard errors",
    ALIKE: "not told apart",
}
NOTHING = "–"
EXPLANATION = (
    "Mean ± standard error over the seeds, in percent, after the last epoch. ▲ and ▼: ahead of or behind its baseline by more "
    f"than two standard errors of the difference, which is paired by seed. The baseline is {BASELINE} with the same loss."
)
EXPLANATION_MARKDOWN = EXPLANATION.replace("▲ and ▼:", "**Bold** and ▼:")


# ------------------------------------------------------------------------------------------------ tables


def groups(results: dict[str, Any]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """[(title, source, cells)]: the cells of each recipe, and those of none."""
    found = []
    for recipe in [*results["recipes"], {"name": None, "title": "", "source": ""}]:
        cells = [cell for cell in results["cells"] if cell["recipe"] == recipe["name"]]
        if cells:
            title = recipe["title"] or ("Other trainings" if results["recipes"] else "Summary")
            found.append((title, recipe["source"], cells))
    return found


def rows_of(cells: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of a table with these cells as columns, in the order in which the cells name them."""
    return list(dict.fromkeys(method["row"] for cell in cells for method in cell["methods"]))


def matrix(cells: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any] | None]]]:
    """[(row, its method in each cell, None where it was not trained)]."""
    of_cells = [{method["row"]: method for method in cell["methods"]} for cell in cells]
    return [(row, [of_cell.get(row) for of_cell in of_cells]) for row in rows_of(cells)]


def value(method: dict[str, Any] | None, metric: str) -> str:
    """The mean ± standard error of a method as text."""
    if method is None or method[metric]["mean"] is None:
        return NOTHING
    return plus_minus(method[metric], "stderr", DIGITS)


def paper(reported: Sequence[float | None] | None) -> str:
    """What a paper reports, [mean, deviation or None], as text."""
    if not reported or reported[0] is None:
        return NOTHING
    return plus_minus({"mean": reported[0], "std": reported[1]}, "std", DIGITS)


def verdict(method: dict[str, Any] | None) -> str | None:
    """ "ahead", "behind" or "not told apart" from its baseline; None without one."""
    return method["to_baseline"]["verdict"] if method and method["to_baseline"] else None


def names_of(cells: Sequence[dict[str, Any]]) -> list[str]:
    """The titles of these cells, with the metric where they differ in it."""
    different = len({cell["metric"] for cell in cells}) > 1
    return [cell["title"] + f" ({cell['metric'].replace('_', ' ')})" * different for cell in cells]


def tables(results: dict[str, Any]) -> list[Table]:
    """The summary as rich tables, one for each recipe."""
    found = []
    for title, _, cells in groups(results):
        out = Table(title=title, caption=EXPLANATION, box=box.SIMPLE_HEAD, title_style="bold", caption_justify="left")
        out.add_column("method", no_wrap=True)
        for name in names_of(cells):
            out.add_column(name, justify="right")
        for row, methods in matrix(cells):
            marked = [f"{value(m, cell['metric'])} {MARKS.get(verdict(m) or ALIKE)}" for m, cell in zip(methods, cells)]
            out.add_row(row, *(text.strip() for text in marked))
        found.append(out)
    return found


# ------------------------------------------------------------------------------------------------ Markdown


def markdown(results: dict[str, Any]) -> str:
    """The text of report.md: for each recipe a table of methods and cells, and one beside the paper's numbers."""
    parts = []
    for title, source, cells in groups(results):
        parts += [f"## {_escaped(title)}", "", *_markdown(["method", *names_of(cells)], _results_of(cells)), ""]
        metrics = " and ".join(dict.fromkeys(cell["metric"].replace("_", " ") for cell in cells))
        parts += [f"{metrics.capitalize()}. {EXPLANATION_MARKDOWN} {seeds(cells)}", ""]
        if beside := _beside(cells):
            parts += [f"### Beside the numbers of {_escaped(source or 'the paper')}", ""]
            parts += [*_markdown(*beside), "", "Here: mean ± standard deviation over the seeds, in percent.", ""]
    return "\n".join(parts)


def seeds(cells: Sequence[dict[str, Any]]) -> str:
    """How many seeds there are, as a sentence."""
    counts = sorted({len(method["seeds"]) for cell in cells for method in cell["methods"]})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{many} seed{'s' * (many != '1')}."


def _results_of(cells: Sequence[dict[str, Any]]) -> list[list[str]]:
    body = []
    for row, methods in matrix(cells):
        texts = [value(method, cell["metric"]) for method, cell in zip(methods, cells)]
        looks = {AHEAD: "**{}**", BEHIND: "{} " + MARKS[BEHIND]}
        body.append([_escaped(row), *(looks.get(verdict(m) or ALIKE, "{}").format(t) for t, m in zip(texts, methods))])
    return body


def _beside(cells: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]] | None:
    """(header, rows) of the table beside the paper's numbers; None if there are none."""
    cells = [cell for cell in cells if cell["reported"]]
    if not cells:
        return None
    header = ["method", *(f"{title}, {who}" for title in names_of(cells) for who in ("here", "paper"))]
    body = []
    for row in dict.fromkeys([*rows_of(cells), *(row for cell in cells for row in cell["reported"])]):
        texts = [_escaped(row)]
        for cell in cells:
            mine = next((method for method in cell["methods"] if method["row"] == row), None)
            known = mine is not None and mine[cell["metric"]]["mean"] is not None
            texts.append(plus_minus(mine[cell["metric"]], "std", DIGITS) if known and mine else NOTHING)
            texts.append(paper(cell["reported"].get(row)))
        body.append(texts)
    return header, body


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table. The texts of the body are Markdown already, those of the header are escaped here."""
    head = [_escaped(text) for text in header]
    line = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, line, *body)]


def _escaped(text: str) -> str:
    """A text in which no sign is Markdown's."""
    return re.sub(r"([\\`*|<>\[\]])", r"\\\1", " ".join(text.split()))


# ------------------------------------------------------------------------------------------------ the page


def write(cells: Sequence[Cell], results: dict[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes report.html, report.md and report.json into `folder`, which is created if there is none. Returns their paths.

    Args:
        cells: of merged.merge.
        results: merged.numbers of them.
        folder: where the files go. A reader never finds half a file.
    """
    into = Path(folder)
    texts = {
        "report.html": html(cells, results),
        "report.md": markdown(results),
        "report.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
    }
    into.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(into / name, text.encode())
    return [into / name for name in texts]


def html(cells: Sequence[Cell], results: dict[str, Any]) -> str:
    """The text of report.html. The page needs no other file, because it contains its plots."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.runs_of))
    share = BYTES / max(1, len(cells))
    sections = [
        _section(number, cell, of_cell, names, share if number < MOST_CELLS else 0)
        for number, (cell, of_cell) in enumerate(zip(cells, results["cells"]))
    ]
    many = len(cells)
    return rendered(
        "merged.html.jinja",
        title=f"{results['runs']} runs in {many} experiment{'s' * (many != 1)}" if results["runs"] != 1 else "1 run",
        results=results,
        notes=notes(cells, results),
        groups=[_group(title, source, mine, results) for title, source, mine in groups(results)],
        sections=sections,
        explanation=EXPLANATION,
        words=WORDS,
        marks=MARKS,
    )


def notes(cells: Sequence[Cell], results: dict[str, Any]) -> list[str]:
    """What a reader must know before trusting the numbers, a sentence or two each."""
    found = []
    if twice := results["found_twice"]:
        were = "runs were" if twice > 1 else "run was"
        found.append(f"{twice} {were} found twice with the same parameters, and counted once.")
    for cell in cells:
        if different := changes(cell.environments):
            parts = ", ".join(f"{name} ({' and '.join(map(str, several))})" for name, several in different.items())
            found.append(f"{cell.title}: its trainings differ in {parts}. This may change the last bits of their results.")
    said = {cell.recipe.get("recipe_title", ""): cell.recipe.get("notes", ()) for cell in cells}
    return found + [f"{title}: {' '.join(of_recipe)}" for title, of_recipe in said.items() if of_recipe]


def _group(title: str, source: str, cells: Sequence[dict[str, Any]], results: dict[str, Any]) -> dict[str, Any]:
    """A summary table of the page."""
    places = [results["cells"].index(cell) for cell in cells]
    rows = []
    for row, methods in matrix(cells):
        entries = [
            {
                "text": value(m, cell["metric"]),
                "verdict": verdict(m) or "",
                "paper": paper(m["reported"]) if m and m["reported"] else "",
            }
            for m, cell in zip(methods, cells)
        ]
        rows.append((row, entries))
    columns = [{"name": name, "place": place} for name, place in zip(names_of(cells), places)]
    metrics = " and ".join(dict.fromkeys(cell["metric"].replace("_", " ") for cell in cells)).capitalize()
    return {
        "title": title,
        "source": source,
        "columns": columns,
        "rows": rows,
        "metric": metrics,
        "seeds": seeds(cells),
        "beside": _beside(cells),
    }


def _section(number: int, cell: Cell, of_cell: dict[str, Any], names: Sequence[str], share: float) -> dict[str, Any]:
    """A cell of the page: its table, and its plots until they have as many bytes as its share of the page."""
    plots: list[dict[str, Any]] = []
    left, without = list(PLOTS), list[str]()
    drawing, used = figures(cell, names), 0
    while left and used < share:
        title, plot = next(drawing)
        left.remove(title)
        if plot is None:
            without.append(title)
            continue
        content = compact(plot[2])
        plots.append({"title": title, "caption": plot[1], "svg": base64.b64encode(content).decode()})
        used += len(content)
    header, body = _cell_table(of_cell)
    return {
        "number": number,
        "title": cell.title,
        "header": header,
        "rows": body,
        "figures": plots,
        "without": without,
        "left": left,
        "folders": cell.folders,
        "settings": {name: v for name, v in of_cell["settings"].items() if v is not None},
    }


def _cell_table(cell: dict[str, Any]) -> tuple[list[str], list[list[dict[str, str]]]]:
    """(header, rows) of the numbers of a cell. A row's entry is {"text", "verdict", "more"}."""
    methods, what = cell["methods"], cell["metric"].replace("_", " ")
    known = [method for method in methods if method["flipped_as_given"]["n"]]
    columns: list[tuple[str, bool]] = [
        ("method", True),
        ("seeds", True),
        ("accuracy, %", True),
        ("balanced accuracy, %", True),
        (f"{what} − same loss, points", any(method["to_baseline"] for method in methods)),
        (f"{what} − {BASELINE}, points", any(method["to_sgd"] for method in methods)),
        ("paper", any(method["reported"] for method in methods)),
        ("memorised, %", bool(known)),
        ("seconds per run", True),
    ]
    body = []
    for method in methods:
        entries = [
            _plain(method["row"]) | {"more": method["method"] * (method["row"] != method["method"])},
            _plain(str(len(method["seeds"]))),
            _plain(_deviation(method["accuracy"])),
            _plain(_deviation(method["balanced_accuracy"])),
            _difference(method["to_baseline"], method["baseline"]),
            _difference(method["to_sgd"], BASELINE),
            _plain(paper(method["reported"])),
            _plain(_deviation(method["flipped_as_given"], 1)),
            _plain(_deviation(method["seconds"], 3 if (method["seconds"]["mean"] or 0) < 1 else 1)),
        ]
        body.append([entry for entry, (_, kept) in zip(entries, columns) if kept])
    return [name for name, kept in columns if kept], body


def _plain(text: str) -> dict[str, str]:
    return {"text": text, "verdict": "", "more": ""}


def _deviation(entry: dict[str, Any], digits: int = DIGITS) -> str:
    return NOTHING if entry["mean"] is None else plus_minus(entry, "std", digits)


def _difference(entry: dict[str, Any] | None, baseline: str | None) -> dict[str, str]:
    if entry is None:
        return _plain(NOTHING)
    more = {AHEAD: "ahead of", BEHIND: "behind", ALIKE: "not told apart from"}[entry["verdict"]]
    text = plus_minus(entry, "stderr", DIGITS, signed=True)
    return {"text": text, "verdict": entry["verdict"], "more": f"{more} {baseline}"}
