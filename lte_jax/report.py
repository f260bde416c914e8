"""From results to what people read: a Markdown table, figures, a folder with both.

    python -m lte_jax.report runs/a/results.json runs/b/results.json --out runs/report

Results are what `evaluation.evaluate` returns; several of them (other sparsities, other models)
make one table and one figure of quality against sparsity. No number is typed anywhere by hand.
"""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lte_jax.errors import Parser, UserError, cli_errors
from lte_jax.files import atomic_write, expand

Results = Mapping[str, Any]
_PACKAGES = ("lte-jax", "jax", "jaxlib", "flax", "numpy")


def environment() -> dict[str, Any]:
    """What a number depends on besides the model: versions, commit, device."""
    import jax

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            continue
    device = jax.devices()[0]
    return {
        "versions": versions,
        "commit": _commit(),
        "device": f"{device.platform} {device.device_kind}",
        "cores": os.cpu_count(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _commit() -> str | None:
    """The commit of the checkout that runs, "+" where files differ from it; None outside git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = [
            subprocess.run(
                ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
            )
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[0].stdout.strip() + ("+" if run[1].stdout.strip() else "")


def read(path: str | Path) -> dict[str, Any]:
    """Results from a results.json.

    Raises:
      UserError: when the file is absent or something else.
    """
    try:
        results = json.loads(expand(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: expected a results.json of evaluate.py") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}): expected a results.json") from None
    models = results.get("models") if isinstance(results, dict) else None
    needed = {"name", "token_ppl", "sparsity"}
    if not models or not all(isinstance(m, dict) and needed <= m.keys() for m in models):
        raise UserError(
            f'{path}: no results of evaluate.py: expected {{"models": [...]}}, each with '
            f"{', '.join(sorted(needed))}"
        )
    return results


def write(results: Sequence[Results], out: str | Path, figures: bool = True) -> list[Path]:
    """Writes table.md, the figures and, last, results.json (of one result) into a folder.

    Each is whole or absent, so a folder with a results.json has all that could be drawn.

    Returns:
      The files written.

    Raises:
      UserError: when the folder cannot be written, or matplotlib is not there: the figures alone
        are then missing.
    """
    out, problem = expand(out, "out"), None
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out} cannot be made a folder ({error.strerror}): name another place"
        ) from None
    made = [out / "table.md"]
    atomic_write(made[0], table(results) + "\n" + notes(results) + samples(results))
    if figures:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            problem = "figures need matplotlib, which is not installed: pip install 'lte-jax[plot]'"
        else:
            made += draw(results, out)
    if len(results) == 1:
        made.append(out / "results.json")
        atomic_write(made[-1], as_json(results[0]))
    if problem:
        raise UserError(problem)
    return made


def absent(results: Sequence[Results], out: Path, figures: bool = True) -> list[str]:
    """Names of the files that `write` would make and that are not there."""
    drawn = [name for name, (_, entries) in _FIGURES.items() if figures and entries(results)]
    names = ["table.md", *(f"{name}.png" for name in drawn), "results.json"]
    return [name for name in names if not (out / name).exists()]


# ---------------------------------------------------------------------------------------- tables


def as_json(results: Mapping[str, Any]) -> str:
    """The text of results.json.

    Raises:
      UserError: on NaN and infinities, which JSON has no word for; names the entry.
    """
    try:
        return json.dumps(results, indent=1, allow_nan=False) + "\n"
    except ValueError:
        [where, value] = next(_not_finite(results, "results"))
        raise UserError(
            f"{where}={value}: expected a finite number, as JSON has no other"
        ) from None


def _not_finite(value: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield where, value
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, part in items:
            yield from _not_finite(part, f"{where}.{key}")


def table(results: Sequence[Results]) -> str:
    """All models of all results as a Markdown table, the dense ones first, then by sparsity."""
    heads = [
        "model",
        "perplexity / token",
        "/ byte",
        "FFN sparsity",
        "GFLOPs / token",
        "ms / token",
        "time of dense",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for entry, dense in _entries(results):
        cells = [
            entry["name"],
            f"{entry['token_ppl']:.3f}{_change(entry, dense)}",
            _number(entry.get("byte_ppl"), ".3f"),
            f"{entry['sparsity']:.1%}",
            _number(entry.get("gflops_per_token"), ".3g"),
            _number(entry.get("latency_ms"), ".3g"),
            _number(entry.get("latency_ratio"), ".2f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def notes(results: Sequence[Results]) -> str:
    """What the columns of `table` mean, and where the numbers are from."""
    lines = [
        "Perplexity in brackets is relative to the dense model. GFLOPs are 2^30 of attention "
        "projections, FFN and router, without embedding, head and attention scores. ms per token "
        "is the median of decoding one text; its ratio is to the dense model in the same run."
    ]
    for result in results:
        env, source = result.get("environment", {}), result.get("source", {})
        versions = ", ".join(f"{k} {v}" for k, v in env.get("versions", {}).items())
        parts = [
            source.get("model"),
            source.get("data"),
            f"{result['tokens']} tokens predicted" if result.get("tokens") else None,
            env.get("device"),
            versions,
            f"commit {env['commit'][:12]}" if env.get("commit") else None,
        ]
        if any(parts):
            lines.append("- " + "; ".join(str(part) for part in parts if part))
    return "\n".join(lines) + "\n"


def samples(results: Sequence[Results]) -> str:
    """What each model wrote, as Markdown."""
    blocks = []
    for entry, _ in _entries(results):
        if "sample" in entry:
            text = entry["sample"]["prompt"] + entry["sample"]["text"]
            fence = "`" * (3 + text.count("```"))
            blocks.append(f"\n{label(entry)} wrote:\n\n{fence}text\n{text}\n{fence}\n")
    return "".join(blocks)


def label(entry: Results) -> str:
    """A model's name with its sparsity, where it has any."""
    return f"{entry['name']} {entry['sparsity']:.0%}" if entry["sparsity"] else entry["name"]


def _entries(results: Sequence[Results]) -> list[tuple[Results, Results | None]]:
    """Each model with the dense model of its results; one that several results share comes once."""
    entries: list[tuple[Results, Results | None]] = []
    for result in results:
        models = result["models"]
        dense = next((m for m in models if not (m.get("lte") or m["sparsity"])), None)
        for entry in models:
            known = [(old["name"], old["token_ppl"], old["sparsity"]) for old, _ in entries]
            if (entry["name"], entry["token_ppl"], entry["sparsity"]) not in known:
                entries.append((entry, dense))
    return sorted(entries, key=lambda pair: pair[0]["sparsity"])


def _change(entry: Results, dense: Results | None) -> str:
    if dense is None or entry is dense:
        return ""
    return f" ({entry['token_ppl'] / dense['token_ppl'] - 1:+.1%})"


def _number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


# --------------------------------------------------------------------------------------- figures

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


def draw(results: Sequence[Results], out: Path) -> list[Path]:
    """Draws the figures that the results have numbers for; returns their files.

    quality.png: perplexity against sparsity. layers.png: sparsity of each layer. scores.png: how
    router scores are spread.
    """
    import matplotlib

    made = []
    with matplotlib.rc_context(_STYLE):
        for name, (make, entries) in _FIGURES.items():
            if entries(results):
                image = io.BytesIO()
                figure = make(results)
                figure.savefig(image, format="png", dpi=160, bbox_inches="tight", facecolor="white")
                atomic_write(out / f"{name}.png", image.getvalue())
                made.append(out / f"{name}.png")
    return made


def _sparse_entries(results: Sequence[Results], key: str = "sparsity") -> list[Results]:
    """The models that leave experts out and have numbers under `key`."""
    return [entry for entry, _ in _entries(results) if entry["sparsity"] and entry.get(key)]


def _panels(count: int, columns: int = 3, height: float = 2.4):
    """A figure of `count` panels with common axes, and the panels; one alone is larger."""
    from matplotlib.figure import Figure

    if count == 1:
        figure = Figure(figsize=(7.0, 4.2), layout="constrained")
        return figure, [figure.subplots()]
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.0 * columns, height * rows + 1.0), layout="constrained")
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for unused in grid[count:]:
        unused.remove()
    return figure, grid[:count]


def _colours(entries: Sequence[Results]) -> dict[str, str]:
    """A colour for each name, the same in all figures."""
    names = dict.fromkeys(entry["name"] for entry in entries if entry["sparsity"])
    return dict(zip(names, itertools.cycle(_COLOURS), strict=False))


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """The places, in ascending order, moved up where they are closer than `gap`."""
    spread: list[float] = []
    for place in places:
        spread.append(max(place, spread[-1] + gap) if spread else place)
    return spread


def _label_right(axes, places: Mapping[str, float], colours: Mapping[str, str], x: float) -> None:
    """Names beside the right ends of lines, at the fraction `x` of the axes' width."""
    low, high = axes.get_ylim()
    names = sorted(places, key=lambda name: places[name])
    for name, y in zip(names, _spread(sorted(places.values()), 0.065 * (high - low)), strict=True):
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate(name, (x, y), (8, 0), va="center", color=colours[name], **where)


def _quality(results: Sequence[Results]):
    """Perplexity against FFN sparsity, one line for each name."""
    entries = [(e, dense) for e, dense in _entries(results) if e["sparsity"]]
    relative = all(dense is not None for _, dense in entries)
    figure, [axes] = _panels(1)
    colours, ends = _colours([entry for entry, _ in entries]), {}
    for name, colour in colours.items():
        mine = [(e, dense) for e, dense in entries if e["name"] == name]
        x = [100 * e["sparsity"] for e, _ in mine]
        y = [
            100 * (e["token_ppl"] / dense["token_ppl"] - 1)
            if relative and dense
            else e["token_ppl"]
            for e, dense in mine
        ]
        axes.plot(x, y, "o-", color=colour, markeredgecolor="white", markersize=8)
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
    axes.set_ylabel("perplexity over dense, %" if relative else "perplexity per token")
    axes.set_title("What sparsity costs")
    return figure


def _layers(results: Sequence[Results]):
    """Sparsity of each layer: a panel for each name, a line for each model of that name."""
    entries = _sparse_entries(results, "sparsity_per_layer")
    colours = _colours(entries)
    figure, panels = _panels(len(colours), height=3.4)
    for (name, colour), axes in zip(colours.items(), panels, strict=True):
        means = {}
        for entry in (entry for entry in entries if entry["name"] == name):
            share = [100 * value for value in entry["sparsity_per_layer"]]
            axes.plot(
                range(1, len(share) + 1), share, "o-", color=colour, markeredgecolor="white",
                clip_on=False,
            )  # fmt: skip
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
    """The spread of router scores, one panel a model."""
    entries = _sparse_entries(results, "score_histogram")
    colours = _colours(entries)
    figure, panels = _panels(len(entries), columns=len(colours) if len(colours) > 1 else 3)
    for i, (entry, axes) in enumerate(zip(entries, panels, strict=True)):
        counts = entry["score_histogram"]
        total, width = sum(counts), 1 / len(counts)
        centres = [(bin + 0.5) * width for bin in range(len(counts))]
        heights = [100 * count / total for count in counts]
        axes.bar(centres, heights, width * 0.9, color=colours[entry["name"]])
        threshold = (entry.get("lte") or {}).get("threshold", 0.5)
        axes.axvline(threshold, color=_INK, linestyle=_DASHES, linewidth=1.2)
        axes.annotate(
            "threshold" if i == 0 else "",
            (threshold, 1),
            (5, -4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
        )
        axes.grid(axis="x", visible=False)
        axes.set_xlim(0, 1)
        axes.set_title(label(entry) if len(panels) > 1 else f"Router scores: {label(entry)}")
    figure.supxlabel("router score", size="medium")
    figure.supylabel("share of scores, %", size="medium")
    return figure


# Name -> what draws it, and the models it shows: none, no figure.
_FIGURES = {
    "quality": (_quality, _sparse_entries),
    "layers": (_layers, partial(_sparse_entries, key="sparsity_per_layer")),
    "scores": (_scores, partial(_sparse_entries, key="score_histogram")),
}

# ----------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> None:
    """One table and one set of figures out of one or more results.json."""
    parser = Parser(prog="python -m lte_jax.report", description=main.__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULTS.json")
    parser.add_argument("--out", required=True, help="folder for table.md and the figures")
    parser.add_argument("--no-figures", action="store_true")
    with cli_errors():
        flags = parser.parse_args(argv)
        results = [read(path) for path in flags.results]
        made = write(results, flags.out, figures=not flags.no_figures)
        print(table(results), *made, sep="\n")


if __name__ == "__main__":
    main()
