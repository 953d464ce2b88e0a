"""The figures of all pages as SVG, as small as it can be."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

LOOK: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "svg.fonttype": "none",  # letters as text: as outlines they would be most of the bytes
    "svg.hashsalt": "absgd_fast",  # the same plot has the same bytes
}


def embedded(figure: Figure) -> str:
    """A figure in base64, for the src of an image."""
    return base64.b64encode(compact(figure)).decode()


def compact(figure: Figure) -> bytes:
    """A figure as a small SVG: a tenth of a point is enough, and comments are none of the picture."""
    buffer = io.BytesIO()
    with rc_context(LOOK):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", buffer.getvalue().decode(), flags=re.DOTALL)
    text = re.sub(r' (?:d|x|y)="[^"]*"', _short, text)
    styles = list(dict.fromkeys(re.findall(r' style="([^"]*)"', text)))  # most are there many times
    text = re.sub(r' style="([^"]*)"', lambda found: f' class="s{styles.index(found[1])}"', text)
    rules = "".join(f".s{number}{{{style}}}" for number, style in enumerate(styles))
    text = text.replace("</style>", rules + "</style>", 1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to groups
    return re.sub(r"\s*\n\s*", "\n", text).encode()


def _short(found: re.Match[str]) -> str:
    """Coordinates with one decimal. Numbers that follow M x y are those of a line, so its L can be left out."""
    text = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), found[0])
    return re.sub(r"M [-\d. \n]+(?:L [-\d. \n]+)+", lambda line: re.sub(r"\s*L ", " ", line[0]), text)
