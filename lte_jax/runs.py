"""Several finished runs as one table and one figure: means over the seeds.

    python evaluate.py --runs runs/a runs/b runs/c --out runs/together

Runs whose configurations differ in the seed alone are one row: mean and standard deviation. What
else differs, the target sparsity aside, becomes a part of the model's name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import traverse_util

from lte_jax import report
from lte_jax.config import Experiment
from lte_jax.errors import UserError
from lte_jax.figures import Results, draw, loss_of_quality, quality, with_dense
from lte_jax.files import atomic_write, expand, explained
from lte_jax.workdir import FREE, Paths, read_experiment

# Keys of a configuration that do not reach the dense model.
_OF_SPARSE = ("lte.", "stages.router.", "stages.adapt.")
_TARGET = "lte.target_sparsity"
_MEANS = ("loss", "token_ppl", "byte_ppl", "bits_per_byte", "sparsity", "threshold")
_MEANS += ("gflops_per_token", "gbytes_per_token", "latency_ms", "latency_ratio")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its work directory, configuration and results."""

    folder: Path
    settings: Mapping[str, str]  # key -> value, as JSON; without the seed and keys of reporting
    seed: int
    dense: Results | None
    model: Results  # the last one: sparse, or of a dense baseline the dense one

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Reads the work directory of a finished run.

        Raises:
          UserError: if it is something else, or has no report.
        """
        paths = Paths(expand(folder, "--runs"))
        experiment = read_experiment(paths)
        if not (paths.root / "results.json").exists():
            raise UserError(
                f"{paths.root} has no results.json: finish the run with report=True, or measure it "
                f"with evaluate.py --workdir={paths.root}"
            )
        models = report.read(paths.root / "results.json")["models"]
        dense = next((m for m in models if not (m.get("lte") or m["sparsity"])), None)
        return cls(paths.root, _settings(experiment), experiment.seed, dense, models[-1])

    @property
    def is_sparse(self) -> bool:
        """Whether its last model has experts."""
        return self.model is not self.dense

    def of_dense(self) -> frozenset[tuple[str, str]]:
        """The settings that its dense model depends on."""
        return frozenset(x for x in self.settings.items() if not x[0].startswith(_OF_SPARSE))


def _settings(experiment: Experiment) -> dict[str, str]:
    values = json.loads(json.dumps(dataclasses.asdict(experiment)))
    flat = traverse_util.flatten_dict(values)
    named = {".".join(key): json.dumps(value) for key, value in flat.items()}
    return {k: v for k, v in named.items() if k != "seed" and k.partition(".")[0] not in FREE}


def together(folders: Sequence[str | Path]) -> list[Results]:
    """The results of runs, with the means over the seeds as models.

    Besides what results of one run have, a model has "seeds", "target" (None: none, or dense),
    "loss_of_quality" (mean of what it loses to the dense model of the same run, as in figures.py),
    and "deviation": the standard deviation of each number, of "quality" and "loss_of_quality"; {}
    of one seed.

    Raises:
      UserError: as `Run.read`; also on two runs of one configuration and seed.
    """
    runs = [Run.read(folder) for folder in folders]
    _check_apart(runs)
    dense: dict[frozenset, list[Run]] = {}  # by settings
    sparse: dict[frozenset, list[Run]] = {}
    for run in runs:
        dense.setdefault(run.of_dense(), []).append(run)
        if run.is_sparse:
            sparse.setdefault(frozenset(run.settings.items()), []).append(run)
    apart, sparse_apart = _differing(dense), _differing(sparse)
    results = []
    for settings, mine in dense.items():
        seeds = {run.seed: (run.dense, None) for run in mine if run.dense is not None}
        models = [_mean(_named("dense", settings, apart), seeds)] if seeds else []
        for others, group in sparse.items():
            if group[0].of_dense() == settings:
                name = _named(group[0].model["name"], others, sparse_apart)
                mean = _mean(name, {run.seed: (run.model, run.dense) for run in group})
                models.append(mean | {"target": json.loads(group[0].settings[_TARGET])})
        results.append({"models": models})
    return results


def _check_apart(runs: Sequence[Run]) -> None:
    seen: dict[tuple, Path] = {}
    for run in runs:
        key = (run.seed, *sorted(run.settings.items()))
        if key in seen:
            raise UserError(
                f"{seen[key]} and {run.folder} hold one run, of seed {run.seed}: name one of them"
            )
        seen[key] = run.folder


def _differing(groups: Iterable[frozenset[tuple[str, str]]]) -> list[str]:
    """The keys in which the settings of groups of runs differ, besides the target."""
    settings = [dict(group) for group in groups]
    keys = sorted({key for group in settings for key in group} - {_TARGET})
    return [key for key in keys if len({group.get(key) for group in settings}) > 1]


def _named(name: str, settings: frozenset[tuple[str, str]], apart: Sequence[str]) -> str:
    """The name, with the settings that tell this group from others."""
    known = dict(settings)
    told = (f"{'.'.join(key.split('.')[-2:])}={known.get(key)}" for key in apart)
    return ", ".join([name, *told]).replace('"', "")


def _mean(name: str, seeds: Mapping[int, tuple[Results, Results | None]]) -> dict[str, Any]:
    """The mean of a model's results over the seeds; each with the dense model of its run."""
    entries = [entry for entry, _ in seeds.values()]
    scores = entries[0].get("metrics") or {}
    values = {key: [e[key] for e in entries] for key in _MEANS if _all_have(entries, key)}
    scored = {key: [e["metrics"][key] for e in entries] for key in scores}
    lost = [loss_of_quality(entry, dense) for entry, dense in seeds.values() if dense is not None]
    if len(lost) == len(entries):
        values["loss_of_quality"] = lost
    mean: dict[str, Any] = {"name": name, "seeds": sorted(seeds), "target": None}
    mean |= {key: statistics.fmean(numbers) for key, numbers in values.items()}
    if scored:
        mean["metrics"] = {key: statistics.fmean(numbers) for key, numbers in scored.items()}
    if _all_have(entries, "sparsity_per_layer"):
        layers = zip(*(entry["sparsity_per_layer"] for entry in entries), strict=True)
        mean["sparsity_per_layer"] = [statistics.fmean(layer) for layer in layers]
    if _all_have(entries, "score_histogram"):
        bins = zip(*(entry["score_histogram"] for entry in entries), strict=True)
        mean["score_histogram"] = [sum(counts) for counts in bins]
    spread = values | scored | {"quality": [quality(entry)[1] for entry in entries]}
    many = len(entries) > 1
    mean["deviation"] = {k: statistics.stdev(v) for k, v in spread.items()} if many else {}
    return mean | {"lte": entries[0].get("lte"), "config": entries[0].get("config")}


def _all_have(entries: Sequence[Results], key: str) -> bool:
    return all(entry.get(key) is not None for entry in entries)


def table(results: Sequence[Results]) -> str:
    """The models of `together` as a Markdown table, by sparsity."""
    entries = [entry for entry, _ in with_dense(results)]
    metrics = dict.fromkeys(name for entry in entries for name in entry.get("metrics", ()))
    heads = ["model", "target", "seeds", "FFN sparsity", *(metrics or ["perplexity / token"])]
    heads += ["against dense", "time / dense"]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for entry in entries:
        spread, target = entry["deviation"], entry["target"]
        scores = [
            with_spread(entry.get("metrics", {}).get(name), spread.get(name), ".2f")
            for name in metrics
        ]
        lost = entry.get("loss_of_quality")
        gap = (lost, "+.1f", "%") if "token_ppl" in entry else (lost and -lost, "+.2f", "")
        cells = [
            entry["name"],
            "" if target is None else f"{target:.0%}",
            ", ".join(map(str, entry["seeds"])),
            with_spread(100 * entry["sparsity"], 100 * spread.get("sparsity", 0.0), ".1f", "%"),
            *(scores or [with_spread(entry.get("token_ppl"), spread.get("token_ppl"), ".3f")]),
            with_spread(gap[0], spread.get("loss_of_quality"), *gap[1:]),
            with_spread(entry.get("latency_ratio"), spread.get("latency_ratio"), ".2f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_spread(mean: float | None, spread: float | None, spec: str, unit: str = "") -> str:
    """A cell of a table: "2.131 ± 0.004"; "" of no mean."""
    if mean is None:
        return ""
    more = f" ± {spread:{spec.removeprefix('+')}}" if spread else ""
    return f"{mean:{spec}}{more}{unit}"


def notes(folders: Sequence[str | Path]) -> str:
    """What the table's numbers are."""
    places = "".join(f"\n- {folder}" for folder in folders)
    return (
        "Means over the seeds, ± the standard deviation of a single run. "
        '"Against dense" is to the dense model of the same run: percent of perplexity, or points '
        f"of the first metric.\n{places}\n"
    )


def write(
    results: Sequence[Results], folders: Sequence[str | Path], out: str | Path, figures: bool = True
) -> list[Path]:
    """Writes table.md, the figures and, last, runs.json; returns the files.

    Raises:
      UserError: as `report.write`.
    """
    out = expand(out, "--out")
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    drawn = figures and importlib.util.find_spec("matplotlib") is not None
    made = [out / "table.md", *(draw(results, out) if drawn else ()), out / "runs.json"]
    atomic_write(made[0], table(results) + "\n" + notes(folders))
    whole = {"runs": [str(folder) for folder in folders], "results": list(results)}
    atomic_write(made[-1], report.as_json(whole))
    if figures and not drawn:
        raise UserError(report.NO_FIGURES)
    return made
