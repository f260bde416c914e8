"""Gathers the reports of a sweep's runs: means with errors, differences seed by seed.

Every number of quality is against the best dense row: of the methods without experts the one of
best mean quality. A difference is taken between runs of the same seed, so that what the seeds share
(the texts, their order, what is measured) cancels.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lte_jax import figures, report, workdir
from lte_jax.config import Sweep
from lte_jax.errors import UserError
from lte_jax.files import expand, read_json
from lte_jax.sweep.expansion import Run
from lte_jax.sweep.folder import Folder, plain

Entry = dict[str, Any]  # of a run, or of a method at a target
_FLOPS = "gflops_per_token"
_KEPT = ("token_ppl", "metrics", "sparsity", _FLOPS, "sparsity_per_layer")


def collect(sweep: Sweep, runs: Sequence[Run], folder: Folder) -> dict[str, Any]:
    """What the finished runs of a sweep have measured, and its summary.

    Returns:
      {"grid", "metric", "dense", "runs", "summary", "missing", "environment"}: "dense" is the best
      dense row (None: there is none), "missing" are the runs that are not finished. An entry of
      "summary" is a method at a target: "quality", "sparsity", "gflops_per_token" and "seconds"
      over its seeds; "loss" is what it loses to the best dense row (percent of perplexity, or
      points of a metric), "difference" likewise to the reference at its target, and
      "difference_at_cost" at its FLOPs, see `losses_at_cost`. Of each there are mean, deviation
      (of a single run) and error (standard error of the mean; None of one seed).

    Raises:
      UserError: if no run is finished.
    """
    rows = [_measured(sweep, run, folder) for run in runs if folder.finished(run)]
    if not rows:
        raise UserError(f"{folder.root} has no finished run: leave out --collect to make some")
    best = best_dense(rows)
    return {
        "grid": plain(sweep),
        "metric": figures.quality(rows[0])[0],
        "dense": best,
        "runs": rows,
        "summary": summary(rows, best, sweep.reference),
        "missing": [run.name for run in runs if not folder.finished(run)],
        "environment": report.environment(),
    }


def read(path: str | Path) -> dict[str, Any]:
    """Reads the results.json of a sweep.

    Raises:
      UserError: if the file is absent or something else.
    """
    place, hint = expand(path), "expected the results.json that a sweep writes to its --out"
    made = read_json(place, hint)
    if not {"grid", "metric", "runs", "missing"} <= made.keys():
        raise UserError(f"{place}: no results of a sweep: {hint}")
    return made


def known(path: str | Path, runs: Sequence[Run], folder: Folder) -> dict[str, Entry]:
    """The rows of an earlier results.json, by name, that stand for runs of the same settings.

    A run that another, unfinished one goes on from is not among them: its model is needed.

    Raises:
      UserError: if the file is absent or something else.
    """
    rows = {row["name"]: row for row in read(path)["runs"]}
    found = {
        run.name: rows[run.name]
        for run in runs
        if run.name in rows and _same(rows[run.name]["settings"], run.overrides)
    }
    for run in reversed(runs):  # those that others go on from come before these
        if run.name not in found and not folder.made(run):
            found.pop(run.after, None)
    return found


def _same(settings: Sequence[str], overrides: Sequence[str]) -> bool:
    return workdir.affecting(settings) == workdir.affecting(overrides)


def _measured(sweep: Sweep, run: Run, folder: Folder) -> Entry:
    """A finished run, by its own report, or by an earlier sweep's."""
    if not folder.made(run):
        return dict(folder.known[run.name])
    results = report.read(folder.workdir(run) / "results.json")
    model = results["models"][-1]
    kept = {key: model[key] for key in _KEPT if key in model}
    return {
        "name": run.name,
        "method": run.method,
        "target": run.target,
        "seed": run.seed,
        "oracle": sweep.methods[run.method].oracle,
        "experts": bool(model.get("lte") or model["sparsity"]),
        "settings": list(run.overrides),
        "quality": figures.quality(model)[1],
        **kept,
        "seconds": _seconds(folder, run),
        "commit": results.get("environment", {}).get("commit"),
    }


def _seconds(folder: Folder, run: Run) -> float:
    """How long its stages took, over all its processes (docs/metrics.md)."""
    path = folder.workdir(run) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []  # a run of no steps has none
    last = {record["stage"]: record["seconds"] for record in map(json.loads, lines)}
    return float(sum(last.values()))


def best_dense(rows: Sequence[Entry]) -> str | None:
    """The method without experts of best mean quality, over the seeds that all such have."""
    dense: dict[str, dict[int, Entry]] = {}
    for row in rows:
        if not row["experts"]:
            dense.setdefault(row["method"], {})[row["seed"]] = row
    if not dense:
        return None
    common = set.intersection(*({*seeds} for seeds in dense.values()))
    sign = -1 if "metrics" in rows[0] else 1  # of a metric more is better
    means = {
        method: statistics.fmean(seeds[seed]["quality"] for seed in (common or seeds))
        for method, seeds in dense.items()
    }
    return min(means, key=lambda method: sign * means[method])


def by_method(rows: Sequence[Entry]) -> dict[tuple[str, float | None], dict[int, Entry]]:
    """(method, target) -> seed -> its run, in the order of the runs."""
    groups: dict[tuple[str, float | None], dict[int, Entry]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["target"]), {})[row["seed"]] = row
    return groups


def summary(rows: Sequence[Entry], best: str | None, reference: str = "") -> list[Entry]:
    """The methods at their targets, in the order of their runs: see `collect`."""
    groups = by_method(rows)
    dense = groups.get((best, None), {}) if best is not None else {}
    curve = [seeds for (method, _), seeds in groups.items() if method == reference]
    made = []
    for (method, target), seeds in groups.items():
        mine = [seeds[seed] for seed in sorted(seeds)]
        entry: Entry = {"method": method, "target": target, "seeds": sorted(seeds)}
        entry |= {key: mine[0][key] for key in ("oracle", "experts")}
        for key in ("quality", "sparsity", _FLOPS, "seconds"):
            entry[key] = spread([row[key] for row in mine if row.get(key) is not None])
        entry["loss"] = spread(losses(seeds, dense))
        others = groups.get((reference, target), {})
        entry["difference"] = spread(losses(seeds, dense, others)) if others else None
        served = entry["experts"] and not entry["oracle"] and method != reference
        alike = losses_at_cost(seeds, dense, curve) if served else []
        whole = len(alike) == len(seeds.keys() & dense.keys())  # of all, or nothing is said
        entry["difference_at_cost"] = spread(alike) if whole else None
        if all(row.get("sparsity_per_layer") for row in mine):
            layers = zip(*(row["sparsity_per_layer"] for row in mine), strict=True)
            entry["sparsity_per_layer"] = [statistics.fmean(layer) for layer in layers]
        made.append(entry)
    return made


def losses(
    mine: Mapping[int, Entry], dense: Mapping[int, Entry], others: Mapping[int, Entry] | None = None
) -> list[float]:
    """What each run loses to the dense one of its seed; with `others`, beyond what those lose."""
    lost = []
    for seed in sorted(mine.keys() & dense.keys()):
        loss = figures.loss_of_quality(mine[seed], dense[seed])
        if others is None:
            lost.append(loss)
        elif seed in others:
            lost.append(loss - figures.loss_of_quality(others[seed], dense[seed]))
    return lost


def losses_at_cost(
    mine: Mapping[int, Entry], dense: Mapping[int, Entry], curve: Sequence[Mapping[int, Entry]]
) -> list[float]:
    """What each run loses beyond the reference at as many FLOPs per token.

    Between the reference's targets and the dense run of the same seed, straight lines count, which
    lie above a curve that bends as these do; the last one goes on for a twentieth.
    """
    lost = []
    for seed in sorted(mine.keys() & dense.keys()):
        rows = [dense[seed], *(others[seed] for others in curve if seed in others)]
        if len(rows) < 2 or any(row.get(_FLOPS) is None for row in (mine[seed], *rows)):
            continue
        points = sorted((row[_FLOPS], figures.loss_of_quality(row, dense[seed])) for row in rows)
        flops, heights = np.array(points).T
        at = mine[seed][_FLOPS]
        if not 0.95 * flops[0] <= at <= flops[-1]:
            continue
        theirs = np.interp(at, flops, heights)
        if at < flops[0] < flops[1]:
            theirs += (at - flops[0]) * (heights[1] - heights[0]) / (flops[1] - flops[0])
        lost.append(float(figures.loss_of_quality(mine[seed], dense[seed]) - theirs))
    return lost


def spread(values: Sequence[float]) -> dict[str, float | None] | None:
    """Mean, standard deviation and standard error of the mean; None of no values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    error = None if deviation is None else deviation / math.sqrt(len(values))
    return {"mean": statistics.fmean(values), "deviation": deviation, "error": error}
