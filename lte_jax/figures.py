"""Figures of results, drawn with matplotlib: quality against sparsity, layers, scores, experts.

Results are what `evaluation.evaluate` returns, as in report.py. style.py has sizes and colours.

Dimension key: L length  E experts
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from lte_jax import style

Results = Mapping[str, Any]


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


def draw(results: Sequence[Results], out: Path, log: bool = False) -> list[Path]:
    """Draws the figures that the results have numbers for; returns their paths.

    quality.png: perplexity against sparsity. layers.png: sparsity of each layer. scores.png:
    histograms of router scores. `log`: see `quality_panels`.
    """
    made = []
    with style.applied():
        for name in drawable(results):
            figure = _quality(results, log) if name == "quality.png" else _FIGURES[name][0](results)
            style.save(figure, out / name)
            made.append(out / name)
    return made


def drawable(results: Sequence[Results]) -> list[str]:
    """Names of the files that `draw` makes."""
    return [name for name, (_, key) in _FIGURES.items() if _sparse_entries(results, key)]


def _sparse_entries(results: Sequence[Results], key: str) -> list[Results]:
    """The models that skip experts and have numbers under `key`."""
    return [entry for entry, _ in with_dense(results) if entry["sparsity"] and entry.get(key)]


def _marks(results: Sequence[Results], key: str = "sparsity") -> dict[str, dict[str, Any]]:
    """Colour and marker of each name of a sparse model with numbers under `key`.

    They go by the order of the results, and so are the same in every figure of them.
    """
    entries = [entry for result in results for entry in result["models"] if entry["sparsity"]]
    marks = style.marks([entry["name"] for entry in entries])
    return {entry["name"]: marks[entry["name"]] for entry in entries if entry.get(key)}


def _quality(results: Sequence[Results], log: bool = False):
    """What sparsity costs, in one panel."""
    return quality_panels({"What sparsity costs": results}, log)


@dataclasses.dataclass(frozen=True)
class Across:
    """What the horizontal axis of a quality figure shows."""

    label: str
    key: str  # of a model's results
    unit: float
    limits: tuple[float, float | None]  # None: as the numbers are

    def of(self, entry: Results) -> float:
        """Where a model stands."""
        return self.unit * entry[self.key]


SPARSITY = Across("FFN sparsity, %", "sparsity", 100.0, (0.0, 100.0))
GFLOPS = Across("GFLOPs per token", "gflops_per_token", 1.0, (0.0, None))
MFLOPS = Across("MFLOPs per token", "gflops_per_token", 1024.0, (0.0, None))


def quality_panels(
    panels: Mapping[str, Sequence[Results]], log: bool = False, across: Across = SPARSITY
) -> Any:
    """A figure of perplexity, or a task's metric, against FFN sparsity: a line for each name.

    Each is relative to the dense model of its results where there is one. Panels share their axes.

    Args:
      panels: title -> results.
      log: perplexities as a ratio to dense, on a logarithmic axis: for ranges of more than a
        factor of two. Metrics in points stay as they are.
      across: the horizontal axis, in place of sparsity.
    """
    entries = [
        pair for results in panels.values() for pair in with_dense(results) if pair[0]["sparsity"]
    ]
    scale = _Scale.of(entries, log)
    marks = _marks([result for results in panels.values() for result in results])
    figure, grid = style.panels(len(panels))
    for (title, results), axes in zip(panels.items(), grid, strict=True):
        if scale.dense is not None:
            origin = next(across.of(dense) for _, dense in with_dense(results) if dense is not None)
            point = {"color": style.GREY, "markersize": 9, "clip_on": False, "zorder": 3}
            axes.plot(origin, scale.dense, "o", label="dense", **point)
        for name, mark in marks.items():
            mine = [
                pair
                for pair in with_dense(results)
                if pair[0]["name"] == name and pair[0]["sparsity"]
            ]
            if mine:
                _draw_line(axes, mine, (scale, across), mark, name)
        axes.set_title(title)
    heights = [scale.of_entry(*pair) for pair in entries]
    spread = _deviations(entries, scale, across)
    ends = [y + sign * d for y, d in zip(heights, spread["yerr"], strict=True) for sign in (-1, 1)]
    scale.fit(grid[0], ends)
    grid[0].set_xlim(*across.limits)
    style.labels(figure, across.label, scale.label)
    style.legend(figure)
    return figure


def _draw_line(
    axes, mine: Sequence[tuple], scales: tuple[_Scale, Across], mark: Mapping[str, Any], name: str
) -> None:
    """The models of one name, their deviations, and thin dashes to the dense model."""
    scale, across = scales
    x = [across.of(entry) for entry, _ in mine]
    y = [scale.of_entry(*pair) for pair in mine]
    axes.plot(x, y, label=name, clip_on=False, **mark)
    spread = _deviations(mine, scale, across)
    if any(map(any, spread.values())):
        axes.errorbar(x, y, **spread, fmt="none", ecolor=mark["color"], capsize=3, zorder=1)
    if scale.dense is not None:
        start = {"color": mark["color"], "linewidth": 1, "linestyle": style.DASHES, "zorder": 1}
        axes.plot([across.of(mine[0][1]), x[0]], [scale.dense, y[0]], **start)


@dataclasses.dataclass(frozen=True)
class _Scale:
    """What the vertical axis of a quality figure shows."""

    label: str
    dense: float | None  # where the dense model is; None: not shown, numbers are their own
    log: bool
    ratio: bool  # of perplexities, in place of percent

    @classmethod
    def of(cls, entries: Sequence[tuple[Results, Results | None]], log: bool) -> _Scale:
        name, points = quality(entries[0][0])[0], "metrics" in entries[0][0]
        if any(dense is None for _, dense in entries):
            return cls(name, None, log and not points, False)
        if points:
            return cls(f"{name} below dense, points", 0.0, False, False)
        if log:
            return cls("perplexity, times dense (log)", 1.0, True, True)
        return cls("perplexity over dense, %", 0.0, False, False)

    def of_entry(self, entry: Results, dense: Results | None) -> float:
        """The height of a model."""
        if self.dense is None or dense is None:
            return quality(entry)[1]
        loss = loss_of_quality(entry, dense)
        return 1 + loss / 100 if self.ratio else loss

    def fit(self, axes: Any, heights: Sequence[float]) -> None:
        """Limits of the shared axis: what is lost from nothing on."""
        if self.log:
            _log_axis(axes, heights)
        elif self.dense is None:
            axes.margins(y=0.15)
        else:
            low, high = min(0.0, *heights), max(0.0, *heights)
            axes.set_ylim(1.1 * low, 1.1 * high or 1.0)


def _log_axis(axes, heights: Sequence[float]) -> None:
    """A logarithmic vertical axis, with ticks that read as numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    axes.set_ylim(min(1.0, *heights) * 0.98, max(heights) * 1.15)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _deviations(mine: Sequence[tuple], scale: _Scale, across: Across) -> dict[str, list[float]]:
    """Standard errors, or else deviations, over the seeds, in the axes' units; of one run, 0.

    Means of several runs have "standard_error" or "deviation": of sparsity, of the quality, and
    ("loss_of_quality") of what each run loses to its own dense model.
    """
    spread = [entry.get("standard_error") or entry.get("deviation") or {} for entry, _ in mine]
    key = "quality" if scale.dense is None else "loss_of_quality"
    unit = 0.01 if scale.ratio else 1.0
    return {
        "xerr": [across.unit * (d.get(across.key) or 0.0) for d in spread],
        "yerr": [unit * (d.get(key) or 0.0) for d in spread],
    }


def _label_right(axes, places: Mapping[str, float]) -> None:
    """Names at heights of the axes, to their right, moved apart."""
    low, high = axes.get_ylim()
    names, gap = sorted(places, key=lambda name: places[name]), 0.08 * (high - low)
    spread = itertools.accumulate(sorted(places.values()), lambda last, y: max(y, last + gap))
    for name, y in zip(names, spread, strict=True):
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(name, (1, y), (6, 0), va="center", color=style.INK, **where)


def layer_panels(results: Sequence[Results]) -> Any:
    """A figure of the sparsity of each layer: a panel per name, a line per model of that name."""
    entries = _sparse_entries(results, "sparsity_per_layer")
    marks = _marks(results, "sparsity_per_layer")
    figure, panels = style.panels(len(marks))
    for (name, mark), axes in zip(marks.items(), panels, strict=True):
        means = {}
        for entry in (entry for entry in entries if entry["name"] == name):
            share = [100 * value for value in entry["sparsity_per_layer"]]
            axes.plot(range(1, len(share) + 1), share, clip_on=False, **mark)
            mean = 100 * entry["sparsity"]
            axes.axhline(mean, color=mark["color"], linestyle=style.DASHES, linewidth=1)
            means[f"mean {mean:.0f}%" if len(marks) == 1 else f"{mean:.0f}%"] = mean
        axes.set_ylim(0, 100)
        _label_right(axes, means)
        axes.locator_params(axis="x", integer=True)
        axes.grid(axis="x", visible=False)
        title = f"Sparsity of each layer: {name}" if len(panels) == 1 else textwrap.fill(name, 22)
        axes.set_title(title)
    style.labels(figure, "layer", "experts skipped, %")
    return figure


def _scores(results: Sequence[Results]):
    """Histograms of router scores, one panel per model."""
    entries = _sparse_entries(results, "score_histogram")
    marks = _marks(results, "score_histogram")
    figure, panels = style.panels(len(entries), min(len(marks), 3) if len(marks) > 1 else 3)
    for entry, axes in zip(entries, panels, strict=True):
        counts = entry["score_histogram"]
        total, width = sum(counts), 1 / len(counts)
        centres = [(bin + 0.5) * width for bin in range(len(counts))]
        heights = [100 * count / total for count in counts]
        axes.bar(centres, heights, width * 0.9, color=marks[entry["name"]]["color"])
        line = {"color": style.INK, "linestyle": style.DASHES, "linewidth": 1.2}
        axes.axvline(threshold_of(entry), label="threshold: experts to its right run", **line)
        axes.grid(axis="x", visible=False)
        axes.set_xlim(0, 1)
        axes.set_title(label(entry) if len(panels) > 1 else f"Router scores: {label(entry)}")
    style.labels(figure, "router score", "share of scores, %")
    style.legend(figure)
    return figure


def bar_panels(panels: Mapping[str, Mapping[str, tuple[float, float]]], label: str) -> Any:
    """A figure of horizontal bars from zero, with errors: a panel per title.

    Args:
      panels: title -> name -> length and error of its bar. A name stands at one height in all.
      label: of the lengths.
    """
    names = list(dict.fromkeys(name for bars in panels.values() for name in bars))
    figure, grid = style.panels(len(panels), height=max(2.9, 0.3 * len(names)))
    for (title, bars), axes in zip(panels.items(), grid, strict=True):
        places = [names.index(name) for name in bars]
        lengths, errors = zip(*bars.values(), strict=True)
        axes.barh(places, lengths, 0.7, color=style.COLOURS[0])
        how = {"fmt": "none", "ecolor": style.INK, "capsize": 3}
        axes.errorbar(lengths, places, xerr=errors, **how)
        axes.axvline(0, color=style.GREY, linewidth=1)
        axes.set_title(title)
        axes.grid(axis="y", visible=False)
    grid[0].set_yticks(range(len(names)), names)
    grid[0].set_ylim(len(names) - 0.4, -0.6)  # the first on top
    style.labels(figure, "", "")
    figure.supxlabel(label, size="medium")
    return figure


def draw_experts(axes: Any, run_EL: Bool[np.ndarray, "E L"], pieces: Sequence[str]) -> None:
    """A map of which experts run for each token: dark where one runs.

        out = lte_jax.apply(model, params, tokens)
        figures.draw_experts(axes, np.asarray(out.active[layer, 0]).T, pieces)

    Args:
      axes: of matplotlib.
      run_EL: whether an expert runs.
      pieces: the text of each token.
    """
    from matplotlib.colors import ListedColormap

    num_experts, length = run_EL.shape
    colours = ListedColormap([style.PALE, style.COLOURS[0]])
    cells = {"cmap": colours, "vmin": 0, "vmax": 1, "edgecolors": "white", "linewidth": 0.8}
    axes.pcolormesh(run_EL, **cells)
    shown = [visible(piece) for piece in pieces]
    rotation = 90 if max(map(len, shown)) > 2 else 0
    axes.set_xticks(np.arange(length) + 0.5, shown, family="monospace", rotation=rotation)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(f"{num_experts} experts")
    axes.set_ylim(num_experts, 0)


def visible(piece: str) -> str:
    """A token's text, without the spaces around it; a space alone as a sign, as is a new line."""
    return piece.replace("\n", "↵").replace(" ", "␣") if not piece.strip() else piece.strip()


# File -> what draws it, and the numbers that a model must have to be in it.
_FIGURES = {
    "quality.png": (_quality, "sparsity"),
    "layers.png": (layer_panels, "sparsity_per_layer"),
    "scores.png": (_scores, "score_histogram"),
}
