"""The figures of a merged report: their panels, with a place for everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 6.0  # inches of every figure, so that all have the same size of letters
LETTER = 0.068  # inches: the width of a letter of 8 points
LEFT, LOG_LEFT = 0.62, 0.82  # inches left of the panels: for the label and numbers such as 0.05, or such as 0.0001


def legend_size(labels: Sequence[str]) -> tuple[int, int]:
    """(columns, rows) of a legend below the panels."""
    fitting = max(1, int((WIDTH - 0.2) / (max(map(len, labels)) * LETTER + 0.5)))
    columns = min(len(labels), fitting, 5)
    return columns, math.ceil(len(labels) / columns)


def make_panels(
    count: int,
    wide: int,
    *,
    height: float,
    above: float,
    below: float,
    between: float,
    left: float = LEFT,
    right: float = 0.12,
    **share: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure with this number of panels, `wide` of them beside each other. All lengths are inches.

    The places are computed here. Matplotlib's layouts draw a figure several times to find them, which takes three times as long.

    Args:
        height: of a panel.
        above: the room for the heading of each panel.
        below: the room under the last panels.
        between: the room between two columns.
        left, right: the room beside the panels.
        share: sharex or sharey, as for plt.subplots; sharex is True if it is not given.
    """
    tall = math.ceil(count / wide)
    total = above * tall + height * tall + below
    width = (WIDTH - left - right - between * (wide - 1)) / wide
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.subplots(
        tall,
        wide,
        squeeze=False,
        gridspec_kw={
            "left": left / WIDTH,
            "right": 1 - right / WIDTH,
            "top": 1 - above / total,
            "bottom": below / total,
            "hspace": above / height,
            "wspace": between / width,
        },
        **{"sharex": True} | share,
    )
    for empty in axes.flat[count:]:
        empty.set_visible(False)
    return figure, list(axes.flat[:count])
