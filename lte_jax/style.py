"""The look of figures, of the package, the benchmarks and the notebooks: sizes, colours, marks.

A figure is as wide as a README shows it: 8 inches are 800 pixels there, 10 points 14 pixels.
Colours are told apart in three kinds of colour blindness (tests/test_style.py simulates them), and
each has a marker of its own, so that colour never says a thing alone. The first four are of Okabe
and Ito, "Color Universal Design" (2008), less their pale ones, the last of Tol, "Colour Schemes".
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lte_jax.files import atomic_write

WIDTH = 8.0  # inches
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a4b00", "#332288")
MARKERS = "osD^vP"
MARKS = [{"color": c, "marker": m} for c, m in zip(COLOURS, MARKERS, strict=True)]
GREY = "#666666"  # the dense model, thresholds: what others are compared with
INK, PALE, DASHES = "#333333", "#e6e6e6", (0, (4, 3))
RC = {
    "figure.figsize": (WIDTH, 4.2),
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "savefig.dpi": 200,  # sharp where a screen has two dots a pixel
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 7,
    "lines.markeredgecolor": "white",
}


def applied() -> Any:
    """A context in which matplotlib draws in this style; within it make and save a figure."""
    import matplotlib

    return matplotlib.rc_context(RC)


def panels(count: int, columns: int = 3, height: float = 2.9) -> tuple[Any, list[Any]]:
    """A figure of `count` panels with shared axes, and the panels, row by row; one is higher."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    size = (WIDTH, max(4.2, height) if count == 1 else height * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def marks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each name, as keywords of `Axes.plot`; after 36 names they recur."""
    made = {}
    for i, name in enumerate(dict.fromkeys(names)):
        marker = MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]  # other ones in each round
        made[name] = {"color": COLOURS[i % len(COLOURS)], "marker": marker}
    return made


def labels(figure: Any, x: str, y: str) -> None:
    """Names of the axes that all panels share: below each column, and once at the left."""
    lowest = {axes.get_subplotspec().colspan.start: axes for axes in figure.axes}
    for axes in lowest.values():
        axes.set_xlabel(x)
        axes.tick_params(axis="x", labelbottom=True)  # also where the panel below is absent
    figure.supylabel(y, size="medium")


def legend(figure: Any) -> None:
    """One legend of all panels, below them and so off the data; each name once.

    A long one makes the figure higher, so that the panels keep their size.
    """
    known = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(name, handle)
    many = len(known) > 12
    room = (125 if many else 105) // (8 + max(map(len, known)))  # letters in width and column
    columns = max(1, min(len(known), room))
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * max(0, -(-len(known) // columns) - 3))
    size = "small" if many else "medium"
    how = {"loc": "outside lower center", "ncols": columns, "fontsize": size}
    figure.legend(known.values(), known, **how)


def save(figure: Any, path: Path) -> None:
    """Writes a figure as PNG, atomically, in its own size: text keeps the size it was given."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    atomic_write(path, image.getvalue())
