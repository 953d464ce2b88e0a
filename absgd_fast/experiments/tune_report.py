"""The report of `absgd-fast tune`: the printed table, the sentences, the plot of the held-out scores, and tune.html."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.table import Table

from absgd_fast.selection.candidates import Candidate, is_strongest

from .pages import rendered
from .style import DASHED, DOTTED, legend, make_axes
from .svg import embedded
from .words import minus, setting

# Okabe and Ito's colours, and the line styles for what exceeds them
COLOURS = ("#6b6b6b", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
LINES: tuple[Any, ...] = ("-", DASHED, DOTTED)
SCORES = {"accuracy": "accuracy", "balanced": "balanced accuracy"}


def title(results: dict[str, Any]) -> str:
    """The experiment in one line."""
    return f"{setting(results['config'])}: which λ?"


def shown(name: str) -> str:
    """A candidate as the report calls it: "inf" as ∞, with its minus sign, and with what it does."""
    if not name.startswith("ess") and math.isinf(float(name)):
        return "∞, the plain mean"
    return f"ESS/n = {name.removeprefix('ess')}" if name.startswith("ess") else f"ramp to {minus(name)}"


def rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table as text: a header, and a row for each candidate."""
    header = ["λ", f"held-out {SCORES[results['goal']]}, %", "behind the best, points", "epochs", "outcome"]
    body = []
    for row in results["table"]:
        behind = "" if row["behind"] is None else f"{row['behind']:.2f} ± {row['error']:.2f}"
        score = "" if row["score"] is None else f"{row['score']:.2f}"
        body.append([shown(row["candidate"]), score, behind if row["behind"] else "", str(row["epochs"]), row["outcome"]])
    return header, body


def explanation(results: dict[str, Any]) -> str:
    """What the columns of the table are."""
    of = "that of the last epoch" if results["window"] == 1 else f"the mean of the last {results['window']} epochs"
    return (
        f"The score is {of} on {results['held out']} held-out training images, whose"
        " labels are as noisy as the others. Behind the best: when the candidate was compared last, ± the standard error of the"
        " difference over these images. What another seed of the training would change is not in it. The first candidate wins if"
        " the best one's lead over it is at most half a standard error, which is a preference and no proof. A candidate"
        f" that is more than two behind after epoch {' or '.join(map(str, results['rungs'])) or '–'} is stopped; swings from"
        " epoch to epoch count as error."
    )


def answers(results: dict[str, Any]) -> dict[str, str]:
    """The sentences at the head of the report: {"choice", "why", "final"}."""
    final, epochs = results["final"], sum(row["epochs"] for row in results["table"])
    possible = len(results["table"]) * results["config"]["epochs"]
    return {
        "choice": f"{_capital(shown(results['chosen']))}.",
        "why": f"{_sentence(results)} {epochs} of {possible} epochs were trained to find it.",
        "final": f"Trained on all {results['held out'] + results['trained on']} images it reaches {final['accuracy']:.1f} % on"
        f" the test set (balanced accuracy {final['balanced_accuracy']:.1f} %). The choice was made without the test set.",
    }


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence(results: dict[str, Any]) -> str:
    chosen = next(row for row in results["table"] if row["candidate"] == results["chosen"])
    others = [row for row in results["table"] if row["outcome"] == "finished"]
    if not others:
        return "No other candidate came to its end."
    rival = max(others, key=lambda row: row["score"])
    lead, error = chosen["score"] - rival["score"], (rival if chosen["behind"] == 0 else chosen)["error"]
    if lead < 0:
        return f"{_capital(shown(rival['candidate']))} is {-lead:.2f} ± {error:.2f} points ahead of it, at most half an error."
    if lead == 0:
        return f"{_capital(shown(rival['candidate']))} has the same score, but stands later in the list."
    return f"It is {lead:.2f} ± {error:.2f} points ahead of the next best, {shown(rival['candidate'])}."


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know before trusting the choice. Often there is nothing."""
    failed = [row for row in results["table"] if row["outcome"].startswith("failed")]
    found = [f"{shown(row['candidate'])} {row['outcome']} ({row['epochs']} epochs were trained)." for row in failed]
    if is_strongest(*_candidates(results)):
        strongest = _capital(shown(results["chosen"]))
        found.append(f"{strongest} is the strongest candidate. A stronger one may be better still: see --candidates.")
    if results["held out"] < 100:
        found.append(
            f"Only {results['held out']} images are held out, so small differences cannot be seen. A larger --holdout sees more."
        )
    return found


def _candidates(results: dict[str, Any]) -> tuple[Candidate, list[Candidate]]:
    """The chosen candidate, and all."""
    return Candidate.named(results["chosen"]), [Candidate.named(row["candidate"]) for row in results["table"]]


def table(results: dict[str, Any]) -> Table:
    """The candidates as a rich table."""
    header, body = rows(results)
    out = Table(
        title=title(results), caption=explanation(results), box=box.SIMPLE_HEAD, title_style="bold", caption_justify="left"
    )
    for i, name in enumerate(header):
        out.add_column(name, justify="left" if i in (0, 4) else "right")
    for row in body:
        out.add_row(*row)
    return out


def figure(results: dict[str, Any]) -> Figure:
    """The held-out scores of all candidates, epoch by epoch."""
    drawn, axes = make_axes("epoch", f"held-out {SCORES[results['goal']]}, %", size=(9, 4.4))
    epochs = results["config"]["epochs"]
    for i, row in enumerate(results["table"]):
        name, colour = row["candidate"], COLOURS[i % len(COLOURS)]
        scores, wins = results["scores"][name], row["outcome"] == "chosen"
        axes.plot(
            range(1, len(scores) + 1),
            scores,
            color=colour,
            linestyle=LINES[i // len(COLOURS) % len(LINES)],
            linewidth=2.6 if wins else 1.5,
            label=shown(name) + " (chosen)" * wins,
        )
        if scores and not wins and len(scores) < epochs:
            axes.plot(len(scores), scores[-1], "X", color=colour, markersize=9, markeredgecolor="white")
    for rung in results["rungs"]:
        axes.axvline(rung + 0.5, color="#444444", linewidth=1, linestyle=":")
    axes.axvspan(epochs - results["window"] + 0.5, epochs + 0.5, color="#0072B2", alpha=0.07, linewidth=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes, 5)
    return drawn


CAPTION = (
    "A cross is where a candidate was stopped or failed. The dotted lines are where candidates are compared. The shaded epochs"
    " are averaged for the choice."
)


def html(results: dict[str, Any]) -> str:
    """The text of tune.html. The page needs no other file."""
    header, body = rows(results)
    return rendered(
        "tune.html.jinja",
        results=results,
        title=title(results),
        answers=answers(results),
        notes=notes(results),
        header=header,
        rows=body,
        explanation=explanation(results),
        caption=CAPTION,
        svg=embedded(figure(results)),
    )
