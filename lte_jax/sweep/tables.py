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

_EVEN = 0.01  # methods whose layers' sparsities differ by less have no panel in layers.png
_ROOM = 50.0  # percent of the best dense row's perplexity: what loses more is in no figure
_NAMED = 5  # runs that are missing; of more, only how many
_TIMES = 1000.0  # percent from which a loss is told as times the best dense row's perplexity


def overview(results: Mapping[str, Any]) -> str:
    """What each method loses, as Markdown: a line for each, a column for each target."""
    points, best = _in_points(results), results["dense"]
    rows: dict[str, dict[float | None, Entry]] = {}
    for entry in results["summary"]:
        rows.setdefault(_name(entry), {})[entry["target"]] = entry
    targets = sorted(
        {t for row in rows.values() for t in row}, key=lambda t: -1 if t is None else t
    )
    labels = ["as it is" if target is None else f"{target:.0%}" for target in targets]
    heads = ["method", "seeds", *labels]
    sought = [t for t in targets if any(_at_cost(row.get(t)) for row in rows.values())]
    heads += [f"at its FLOPs, {target:.0%}" for target in sought if target is not None]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for name, row in rows.items():
        seeds = sorted({len(entry["seeds"]) for entry in row.values()})
        cells = [name, "-".join(str(count) for count in seeds)]
        for target in targets:
            entry = row.get(target)
            gap = entry and entry["loss"]
            is_best = entry is not None and entry["method"] == best
            own = f"{entry['quality']['mean']:.3f}" if entry is not None and is_best else ""
            cells.append(own or (_lost(gap, points) if gap else ""))
        cells += [_lost(gap, points) if (gap := _at_cost(row.get(t))) else "" for t in sought]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _at_cost(entry: Entry | None) -> Mapping[str, Any] | None:
    return entry.get("difference_at_cost") if entry else None


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
            with_spread(
                *_both(entry["quality"]), ".3f" if entry["quality"]["mean"] < 1000 else ",.0f"
            ),
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
    if len(_with_room(results)) < len(results["summary"]):
        text += f" Figures leave out what loses more than {_ROOM:.0f}%."
    if missing := results["missing"]:
        named = f": {', '.join(missing)}" if len(missing) <= _NAMED else f", {missing[0]} the first"
        count = len(missing) + len(results["runs"])
        text += f"\n\nNot finished: {len(missing)} of {count} runs{named}."
    return text + "\n"


def _with_room(results: Mapping[str, Any]) -> list[Entry]:
    """The summary but for what would leave no room in a figure for the rest."""
    if _in_points(results):
        return results["summary"]
    return [e for e in results["summary"] if not e["loss"] or e["loss"]["mean"] <= _ROOM]


def _unit(gflops: Iterable[float]) -> figures.Across:
    """In which FLOPs per token are told."""
    return figures.GFLOPS if max(gflops, default=1.0) >= 0.1 else figures.MFLOPS


def _lost(gap: Mapping[str, Any], points: bool) -> str:
    """More perplexity, or less of a metric."""
    if points:
        return with_spread(-gap["mean"], gap["error"], "+.2f")
    if gap["mean"] >= _TIMES:
        return f"{1 + gap['mean'] / 100:,.0f} times"
    mean, error = _both(gap)
    return with_spread(round(mean, 1) + 0.0, error, "+.1f", "%")  # no -0.0


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
    What loses more than _ROOM is left out, and of layers those methods that treat all alike.
    """
    results = {**results, "summary": _with_room(results)}
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
        uneven = {model["name"] for model in sparse if _spread(model) > _EVEN}
        if told := [model for model in sparse if model["name"] in uneven]:
            made["layers.png"] = figures.layer_panels([{"models": told}])
        if panels := _differences(results):
            unit = "points" if _in_points(results) else "% of the best dense row's perplexity"
            label = f"loses more than {results['grid']['reference']}, {unit}"
            made["ablation.png"] = figures.bar_panels(panels, label)
        for name, figure in made.items():
            style.save(figure, out / f"{prefix}{name}")
    return [out / f"{prefix}{name}" for name in made]


def _spread(model: Entry) -> float:
    """By how much the sparsities of its layers differ."""
    share = model.get("sparsity_per_layer", (0.0,))
    return max(share) - min(share)


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
