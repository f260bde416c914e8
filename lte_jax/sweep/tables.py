"""The table, figures and files of a sweep, from what results.py gathers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lte_jax import figures, report, style
from lte_jax.errors import UserError
from lte_jax.files import atomic_write
from lte_jax.runs import with_spread
from lte_jax.sweep.results import Entry


def table(results: Mapping[str, Any]) -> str:
    """The summary as Markdown, in the order of the grid."""
    points, best = _in_points(results), results["dense"]
    heads = ["method", "target", "seeds", "FFN sparsity", results["metric"], "against best dense"]
    known = (e["gflops_per_token"] for e in results["summary"])
    across = _unit(flops["mean"] for flops in known if flops)
    heads.append(across.label.replace(" per ", " / "))
    at_cost = any(entry.get("difference_at_cost") for entry in results["summary"])
    if at_cost:
        heads.append(f"against {results['grid']['reference']} at its FLOPs")
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for entry in results["summary"]:
        against, flops = "", entry["gflops_per_token"]
        if gap := entry["loss"]:
            against = _lost(gap, points)
        share = {k: 100 * v if v is not None else v for k, v in entry["sparsity"].items()}
        cells = [
            _name(entry),
            "" if entry["target"] is None else f"{entry['target']:.0%}",
            str(len(entry["seeds"])),
            with_spread(*_both(share), ".1f", "%"),
            with_spread(*_both(entry["quality"]), ".3f"),
            "best dense" if entry["method"] == best else against,
            with_spread(flops and flops["mean"] * across.unit, None, ".3g"),
        ]
        if at_cost:
            gap = entry.get("difference_at_cost")
            cells.append(_lost(gap, points) if gap else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def notes(results: Mapping[str, Any]) -> str:
    """What the table's numbers are."""
    unit = "points" if _in_points(results) else "percent"
    text = "Means over the seeds, ± their standard error. "
    if results["dense"] is None:
        text += "The grid has no finished dense row to compare with."
    else:
        text += (
            f'"Against best dense" is the mean difference, in {unit}, to the run of the same seed '
            f"of the best dense row: {results['dense']}."
        )
    if any(entry.get("difference_at_cost") for entry in results["summary"]):
        name = results["grid"]["reference"]
        text += (
            f' "Against {name} at its FLOPs" is the mean difference, likewise, to what {name} has '
            "at as many FLOPs by straight lines between its sparsities and the best dense row. The "
            "lines favour the other methods; oracles and what lies beyond them have no number."
        )
    if any(entry["oracle"] for entry in results["summary"]):
        text += " An oracle looks at what a served model would have to compute first."
    if results["missing"]:
        text += f"\n\nNot finished: {', '.join(results['missing'])}."
    return text + "\n"


def _unit(gflops: Iterable[float]) -> figures.Across:
    """In which FLOPs per token are told."""
    return figures.GFLOPS if max(gflops, default=1.0) >= 0.1 else figures.MFLOPS


def _lost(gap: Mapping[str, Any], points: bool) -> str:
    """More perplexity, or less of a metric."""
    if points:
        return with_spread(-gap["mean"], gap["error"], "+.2f")
    return with_spread(*_both(gap), "+.1f", "%")


def _both(numbers: Mapping[str, Any]) -> tuple[float, float | None]:
    return numbers["mean"], numbers["error"]


def _name(entry: Entry) -> str:
    marked = not entry["oracle"] or "oracle" in entry["method"]
    return entry["method"] if marked else f"{entry['method']} (oracle)"


def _in_points(results: Mapping[str, Any]) -> bool:
    """Whether quality is a task's metric, not perplexity."""
    return "metrics" in results["runs"][0]


def draw(results: Mapping[str, Any], out: Path, prefix: str = "") -> list[Path]:
    """Draws the figures that the results have numbers for; returns their paths.

    quality.png and cost.png: quality against sparsity and GFLOPs, layers.png: sparsity of each
    layer, ablation.png: differences to the reference; after `prefix`. Bars are standard errors.
    """
    models = [{"models": _models(results)}]
    sparse = [model for model in models[0]["models"] if model["sparsity"]]
    large = not _in_points(results) and any(m.get("loss_of_quality", 0) > 100 for m in sparse)
    made = {}
    with style.applied():
        if sparse:
            title = "What sparsity costs"
            made["quality.png"] = figures.quality_panels({title: models}, large)
        if sparse and all("gflops_per_token" in model for model in models[0]["models"]):
            across = _unit(model["gflops_per_token"] for model in models[0]["models"])
            title = "What sparsity costs, and saves"
            made["cost.png"] = figures.quality_panels({title: models}, large, across)
        if any("sparsity_per_layer" in model for model in sparse):
            made["layers.png"] = figures.layer_panels(models)
        if panels := _differences(results):
            unit = "points" if _in_points(results) else "% of the best dense row's perplexity"
            label = f"loses more than {results['grid']['reference']}, {unit}"
            made["ablation.png"] = figures.bar_panels(panels, label)
        for name, figure in made.items():
            style.save(figure, out / f"{prefix}{name}")
    return [out / f"{prefix}{name}" for name in made]


def _models(results: Mapping[str, Any]) -> list[Entry]:
    """The summary as figures.py takes models; of the dense rows the best one."""
    points, models = _in_points(results), []
    for entry in results["summary"]:
        if not entry["experts"] and entry["method"] != results["dense"]:
            continue
        value = entry["quality"]["mean"]
        model = {"name": _name(entry), "sparsity": entry["sparsity"]["mean"]}
        model |= {"metrics": {results["metric"]: value}} if points else {"token_ppl": value}
        model |= {"lte": True} if entry["experts"] else {}
        if "sparsity_per_layer" in entry:
            model["sparsity_per_layer"] = entry["sparsity_per_layer"]
        known = {"loss_of_quality": entry["loss"]}
        known |= {key: entry[key] for key in ("quality", "sparsity", "gflops_per_token")}
        known = {key: numbers for key, numbers in known.items() if numbers}
        optional = known.keys() & {"loss_of_quality", "gflops_per_token"}
        model |= {key: known[key]["mean"] for key in optional}
        model["standard_error"] = {key: numbers["error"] for key, numbers in known.items()}
        models.append(model)
    return models


def _differences(results: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """Title -> method -> difference to the reference at a target, and its standard error."""
    panels: dict[str, dict[str, tuple[float, float]]] = {}
    reference = results["grid"]["reference"]
    for entry in results["summary"]:
        if entry["difference"] and entry["target"] is not None and entry["method"] != reference:
            bar = entry["difference"]["mean"], entry["difference"]["error"] or 0.0
            panels.setdefault(f"at {entry['target']:.0%}", {})[_name(entry)] = bar
    return panels


def write(results: Mapping[str, Any], out: Path, with_figures: bool = True) -> list[Path]:
    """Writes table.md, the figures and, last, results.json; returns the files.

    Raises:
      UserError: as `report.write`.
    """
    drawn = with_figures and importlib.util.find_spec("matplotlib") is not None
    made: Sequence[Path] = [out / "table.md", *(draw(results, out) if drawn else ())]
    atomic_write(made[0], table(results) + "\n" + notes(results))
    made = [*made, out / "results.json"]
    atomic_write(made[-1], report.as_json(results))
    if with_figures and not drawn:
        raise UserError(report.NO_FIGURES)
    return made
