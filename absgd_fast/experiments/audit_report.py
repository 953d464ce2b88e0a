"""The pages of `absgd-fast audit`: the printed table, audit.csv, audit.png (a contact sheet) and audit.html."""

from __future__ import annotations

import base64
import csv
import io
import math
import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from .audit import Findings
from .checkpoint import write_whole
from .pages import rendered

HEADER = ("rank", "index", "given", "predicted", "mean loss", "mean weight")
COLUMNS = 8  # images in a row of the contact sheet
IMAGES = 200  # on the contact sheet at most: a picture is less than 2^16 pixels high
LETTERS = 13  # of a class on the contact sheet
WRONG, RIGHT, PLAIN = "#b3400b", "#0072b2", "#9aa4af"


def rows(findings: Findings, by: str, top: int | None = None) -> list[dict[str, Any]]:
    """A dict for each of the `top` most suspicious samples, or for all; a number that is unknown is None."""
    order = findings.audit.ranked(by)[:top].tolist()
    losses, weights, counts = (x.tolist() for x in (findings.audit.mean_loss, findings.audit.mean_weight, findings.audit.count))
    given = findings.labels.tolist()
    predicted, flipped = ([None] * len(given) if x is None else x.tolist() for x in (findings.predictions, findings.flipped))
    return [
        {
            "rank": rank,
            "index": i,
            "given": given[i],
            "predicted": predicted[i],
            "mean_loss": losses[i] if counts[i] else None,
            "mean_weight": weights[i] if counts[i] else None,
            "seen": counts[i],
            "flipped": flipped[i],
        }
        for rank, i in enumerate(order, 1)
    ]


def words(findings: Findings, by: str, top: int) -> str:
    """What the audit found, and how many of the `top` samples the contact sheet leaves out, in a few sentences."""
    n, unseen = findings.audit.n_samples, int((findings.audit.count == 0).sum())
    text = f"{n:,} training samples, ranked by their average {by} while the network was trained."
    if unseen:
        text += (
            " One of them was never seen; it comes last."
            if unseen == 1
            else f" {unseen:,} of them were never seen; they come last."
        )
    if found := findings.precision(by):
        k, share = found
        text += f" {k:,} labels were flipped: of the {k:,} most suspicious samples {100 * share:.1f} % are among these."
    return text + _left_out(findings, by, top)


def _left_out(findings: Findings, by: str, top: int) -> str:
    """The sentence about the samples of the table that are not on the contact sheet. Without images there is neither."""
    if findings.images is None:
        return ""
    shown, pictured = len(rows(findings, by, top)), len(_pictured(findings, by, top))
    reasons = [f"{shown - pictured:,} have no image in the file"] if pictured < shown else []
    if pictured > IMAGES:
        reasons.append(f"a sheet has at most {IMAGES}")
    if not reasons:
        return ""
    return f" The contact sheet shows {min(pictured, IMAGES):,} of the {shown:,} samples of the table: {', and '.join(reasons)}."


def _pictured(findings: Findings, by: str, top: int) -> list[dict[str, Any]]:
    """Those of the `top` rows whose sample has an image."""
    known = set() if findings.images is None or findings.image_index is None else set(findings.image_index.tolist())
    return [row for row in rows(findings, by, top) if row["index"] in known]


def _cells(findings: Findings, row: dict[str, Any]) -> list[str]:
    named = ["" if row[key] is None else findings.name(row[key]) for key in ("given", "predicted")]
    numbers = ["" if row[key] is None else f"{row[key]:.3f}" for key in ("mean_loss", "mean_weight")]
    known = [] if row["flipped"] is None else ["yes" if row["flipped"] else "no"]
    return [str(row["rank"]), str(row["index"]), *named, *numbers, *known]


def _header(findings: Findings) -> list[str]:
    return [*HEADER, *(["flipped"] if findings.flipped is not None else [])]


def table(findings: Findings, by: str, top: int) -> Table:
    """The most suspicious samples as a rich table."""
    out = Table(title=findings.title or None, caption=words(findings, by, top), box=box.SIMPLE_HEAD, caption_justify="left")
    for name in _header(findings):
        named = name in ("given", "predicted")  # on a narrow terminal long names take several lines, and numbers stay whole
        out.add_column(name, justify="left" if named or name == "flipped" else "right", no_wrap=not named)
    for row in rows(findings, by, top):
        out.add_row(*_cells(findings, row))
    return out


def table_csv(findings: Findings, by: str) -> str:
    """All samples as a table with commas, most suspicious first. An unknown value is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    found = rows(findings, by)
    names = list(found[0])
    writer.writerow(names)
    for row in found:
        values = (row[name] for name in names)
        writer.writerow(
            ["" if v is None else int(v) if isinstance(v, bool) else f"{v:.6g}" if isinstance(v, float) else v for v in values]
        )
    return out.getvalue()


def sheet(findings: Findings, by: str, top: int) -> Figure | None:
    """The contact sheet: the images of the most suspicious samples in the order of their rank; None if there are none."""
    if findings.images is None or findings.image_index is None:
        return None
    place = {i: j for j, i in enumerate(findings.image_index.tolist())}
    found = _pictured(findings, by, top)[:IMAGES]
    if not found:
        return None
    columns = min(COLUMNS, len(found))
    lines = math.ceil(len(found) / columns)
    figure = Figure(figsize=(1.45 * columns + 0.1, 1.95 * lines + 0.35), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for one in axes[len(found) :]:
        one.set_axis_off()
    for one, row in zip(axes, found):
        image = findings.images[place[row["index"]]].permute(1, 2, 0).numpy()
        one.imshow(image[..., 0] if image.shape[2] == 1 else image, cmap="gray_r", vmin=0, vmax=255)
        one.set_xticks([])
        one.set_yticks([])
        colour = PLAIN if row["flipped"] is None else WRONG if row["flipped"] else RIGHT
        for spine in one.spines.values():
            spine.set(color=colour, linewidth=2.5)
        given, predicted = (None if row[key] is None else _short(findings.name(row[key])) for key in ("given", "predicted"))
        one.set_title(f"#{row['rank']}  {given}", fontsize=9, pad=3, parse_math=False)
        if predicted is not None:
            one.set_xlabel(f"→ {predicted}", fontsize=9, labelpad=2, color="#1d2530", parse_math=False)
    figure.suptitle(caption(findings), fontsize=9, color="#5a6572")
    return figure


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"


def caption(findings: Findings) -> str:
    """How to read the contact sheet."""
    text = "Above: rank and given label" + (". Below: predicted label" if findings.predictions is not None else "")
    return text + (". Frame: red if the label was flipped, blue if not." if findings.flipped is not None else ".")


def html(findings: Findings, by: str, top: int, png: bytes | None) -> str:
    """The text of audit.html. The page needs no other file."""
    return rendered(
        "audit.html.jinja",
        title=f"Label audit: {findings.title}" if findings.title else "Label audit",
        words=words(findings, by, top),
        header=_header(findings),
        rows=[(_cells(findings, row), row["flipped"]) for row in rows(findings, by, top)],
        sheet=None if png is None else base64.b64encode(png).decode(),
        by=by,
    )


def write(findings: Findings, folder: str | os.PathLike[str], by: str, top: int) -> list[Path]:
    """Writes audit.csv, audit.png (if there are images) and audit.html into the folder, each completely or not at all."""
    contents: dict[str, bytes] = {"audit.csv": table_csv(findings, by).encode()}
    png = None
    if figure := sheet(findings, by, top):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        contents["audit.png"] = png = buffer.getvalue()
    contents["audit.html"] = html(findings, by, top, png).encode()
    for name, content in contents.items():
        write_whole(Path(folder) / name, content)
    return [Path(folder) / name for name in contents]
