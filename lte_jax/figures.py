"""Figures of evaluation results, drawn with matplotlib: quality against sparsity, layers, scores.

Results are what `evaluation.evaluate` returns, as in report.py.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lte_jax.files import atomic_write

Results = Mapping[str, Any]
_COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#64473a")
_INK, _FAINT, _DASHES = "#333333", "#8a8a8a", (0, (4, 3))
_STYLE = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}


def label(entry: Results) -> str:
    """A model's name, with its sparsity if it has any."""
    return f"{entry['name']} {entry['sparsity']:.0%}" if entry["sparsity"] else entry["name"]


def quality(entry: Results) -> tuple[str, Any]:
    """The first metric of a task and its value in percent, or the perplexity."""
    metrics = entry.get("metrics") or {"perplexity per token": entry.get("token_ppl")}
    return next(iter(metrics.items()))


def loss_of_quality(entry: Results, dense: Results) -> float:
    """What a model loses to the dense one: points of a metric, or percent of perplexity."""
    if "loss_of_quality" in entry:  # a mean over runs, each against its own dense model
        return entry["loss_of_quality"]
    mine, theirs = quality(entry)[1], quality(dense)[1]
    return theirs - mine if "metrics" in entry else 100 * (mine / theirs - 1)


def threshold_of(entry: Results) -> float:
    """The threshold that a model was measured with."""
    if entry.get("threshold") is not None:
        return entry["threshold"]
    return (entry.get("lte") or {}).get("threshold", 0.5)  # results of earlier versions


def with_dense(results: Sequence[Results]) -> list[tuple[Results, Results | None]]:
    """Each model with the dense model of its results, by sparsity and without duplicates."""
    entries: dict[tuple, tuple[Results, Results | None]] = {}
    for result in results:
        models = result["models"]
        dense = next((m for m in models if not (m.get("lte") or m["sparsity"])), None)
        for entry in models:
            key = (entry["name"], quality(entry), entry["sparsity"])
            entries.setdefault(key, (entry, dense))
    return sorted(entries.values(), key=lambda pair: pair[0]["sparsity"])


def draw(results: Sequence[Results], out: Path) -> list[Path]:
    """Draws the figures that the results have numbers for; returns their paths.

    quality.png: perplexity against sparsity. layers.png: sparsity of each layer. scores.png:
    histograms of router scores.
    """
    import matplotlib

    made = []
    with matplotlib.rc_context(_STYLE):
        for name in drawable(results):
            image = io.BytesIO()
            figure = _FIGURES[name][0](results)
            figure.savefig(image, format="png", dpi=160, bbox_inches="tight", facecolor="white")
            atomic_write(out / name, image.getvalue())
            made.append(out / name)
    return made


def drawable(results: Sequence[Results]) -> list[str]:
    """Names of the files that `draw` makes."""
    return [name for name, (_, key) in _FIGURES.items() if _sparse_entries(results, key)]


def _sparse_entries(results: Sequence[Results], key: str) -> list[Results]:
    """The models that skip experts and have numbers under `key`."""
    return [entry for entry, _ in with_dense(results) if entry["sparsity"] and entry.get(key)]


def _panels(count: int, columns: int = 3, height: float = 2.4):
    """A figure of `count` panels with shared axes, and the panels; a single one is larger."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = -(-count // columns)
    size = (7.0, 4.2) if count == 1 else (4.0 * columns, height * rows + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def _colours(entries: Sequence[Results]) -> dict[str, str]:
    """A colour for each name, the same in every figure."""
    names = dict.fromkeys(entry["name"] for entry in entries if entry["sparsity"])
    return dict(zip(names, itertools.cycle(_COLOURS), strict=False))


def _label_right(axes, places: Mapping[str, float], colours: Mapping[str, str], x: float) -> None:
    """Names at the right ends of lines, moved apart, at the fraction `x` of the axes' width."""
    low, high = axes.get_ylim()
    names, gap = sorted(places, key=lambda name: places[name]), 0.065 * (high - low)
    spread = itertools.accumulate(sorted(places.values()), lambda last, y: max(y, last + gap))
    for name, y in zip(names, spread, strict=True):
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(name, (x, y), (8, 0), va="center", color=colours[name], **where)


def _quality(results: Sequence[Results]):
    """Perplexity, or a task's metric, against FFN sparsity, one line for each name."""
    entries = [(e, dense) for e, dense in with_dense(results) if e["sparsity"]]
    relative = all(dense is not None for _, dense in entries)
    figure, [axes] = _panels(1)
    colours, ends = _colours([entry for entry, _ in entries]), {}
    for name, colour in colours.items():
        mine = [(e, dense) for e, dense in entries if e["name"] == name]
        x = [100 * e["sparsity"] for e, _ in mine]
        y = [
            loss_of_quality(e, dense) if relative and dense else quality(e)[1] for e, dense in mine
        ]
        axes.plot(x, y, "o-", color=colour, markeredgecolor="white", markersize=8)
        if any(e.get("deviation") for e, _ in mine):
            spread = _deviations(mine, relative)
            axes.errorbar(*(x, y), **spread, fmt="none", ecolor=colour, capsize=3, zorder=1)
        if relative:
            axes.plot([0, x[0]], [0, y[0]], color=colour, linewidth=1, linestyle=_DASHES, zorder=1)
        ends[name] = y[-1]
    if relative:
        axes.plot(0, 0, "o", color=_FAINT, markersize=8, clip_on=False, zorder=3)
        axes.annotate("dense", (0, 0), (9, -12), textcoords="offset points", color=_FAINT)
    axes.set_xlim(0, 100)
    axes.margins(y=0.15)
    _label_right(axes, ends, colours, max(e["sparsity"] for e, _ in entries))
    axes.set_xlabel("FFN sparsity, %")
    name = quality(entries[0][0])[0]
    points = "metrics" in entries[0][0]
    lost = f"{name} below dense, points" if points else "perplexity over dense, %"
    axes.set_ylabel(lost if relative else name)
    axes.set_title("What sparsity costs")
    return figure


def _deviations(
    mine: Sequence[tuple[Results, Results | None]], relative: bool
) -> dict[str, list[float]]:
    """Standard deviations over the seeds, in the axes' units; of one run, 0.

    Means of several runs have "deviation": of sparsity, of the quality, and ("loss_of_quality") of
    what each run loses to its own dense model.
    """
    spread = [entry.get("deviation") or {} for entry, _ in mine]
    key = "loss_of_quality" if relative else "quality"
    return {
        "xerr": [100 * (d.get("sparsity") or 0.0) for d in spread],
        "yerr": [d.get(key) or 0.0 for d in spread],
    }


def _layers(results: Sequence[Results]):
    """Sparsity of each layer: a panel per name, a line per model of that name."""
    entries = _sparse_entries(results, "sparsity_per_layer")
    colours = _colours(entries)
    figure, panels = _panels(len(colours), height=3.4)
    for (name, colour), axes in zip(colours.items(), panels, strict=True):
        means = {}
        for entry in (entry for entry in entries if entry["name"] == name):
            share = [100 * value for value in entry["sparsity_per_layer"]]
            style = {"color": colour, "markeredgecolor": "white", "clip_on": False}
            axes.plot(range(1, len(share) + 1), share, "o-", **style)
            mean = 100 * entry["sparsity"]
            axes.axhline(mean, color=colour, linestyle=_DASHES, linewidth=1, alpha=0.7)
            means[f"mean {mean:.0f}%"] = mean
        axes.set_ylim(0, 100)
        _label_right(axes, means, dict.fromkeys(means, colour), 1.0)
        axes.locator_params(axis="x", integer=True)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("layer")
        axes.set_title(f"Sparsity of each layer: {name}" if len(panels) == 1 else name)
    panels[0].set_ylabel("experts skipped, %")
    return figure


def _scores(results: Sequence[Results]):
    """Histograms of router scores, one panel per model."""
    entries = _sparse_entries(results, "score_histogram")
    colours = _colours(entries)
    figure, panels = _panels(len(entries), columns=len(colours) if len(colours) > 1 else 3)
    for i, (entry, axes) in enumerate(zip(entries, panels, strict=True)):
        counts = entry["score_histogram"]
        total, width = sum(counts), 1 / len(counts)
        centres = [(bin + 0.5) * width for bin in range(len(counts))]
        heights = [100 * count / total for count in counts]
        axes.bar(centres, heights, width * 0.9, color=colours[entry["name"]])
        threshold = threshold_of(entry)
        axes.axvline(threshold, color=_INK, linestyle=_DASHES, linewidth=1.2)
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate("threshold" if i == 0 else "", (threshold, 1), (5, -4), va="top", **where)
        axes.grid(axis="x", visible=False)
        axes.set_xlim(0, 1)
        axes.set_title(label(entry) if len(panels) > 1 else f"Router scores: {label(entry)}")
    figure.supxlabel("router score", size="medium")
    figure.supylabel("share of scores, %", size="medium")
    return figure


# File -> what draws it, and the numbers that a model must have to be in it.
_FIGURES = {
    "quality.png": (_quality, "sparsity"),
    "layers.png": (_layers, "sparsity_per_layer"),
    "scores.png": (_scores, "score_histogram"),
}
