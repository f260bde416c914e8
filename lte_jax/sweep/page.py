"""Writes what sweeps have measured into a page: a section of its own, with figures beside the page.

    python -m lte_jax.sweep.page babyllama runs/methods/results.json runs/ablations/results.json
    python -m lte_jax.sweep.page babyllama          # again, of what benchmarks/results/ has kept

The section of the page (docs/results.md) is what stands between <!-- BEGIN babyllama --> and
<!-- END babyllama -->. What it is made of is kept in benchmarks/results/babyllama/results.json:
the runs of all sweeps, without their settings, so that page and numbers can be compared; table.md
beside it has a line for each method and target.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lte_jax import files, report
from lte_jax.errors import Parser, UserError, cli_errors
from lte_jax.sweep import claims, tables
from lte_jax.sweep import results as gathering

_OF_RUN = ("name", "method", "target", "seed", "oracle", "experts", "quality", "token_ppl")
_OF_RUN += ("metrics", "sparsity", "gflops_per_token", "sparsity_per_layer", "seconds", "commit")
_SAME = 1e-3  # runs of one name may differ by so much of their quality: another number of cores
_CAPTIONS = {
    "quality.png": "Quality against FFN sparsity",
    "cost.png": "Quality against FLOPs per token",
    "layers.png": "FFN sparsity of each layer",
    "ablation.png": "What methods lose beside the reference",
}


def merged(sweeps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The runs of several sweeps as one, each name once: what is kept of them.

    Raises:
      UserError: if sweeps measure different metrics, or runs of one name differ.
    """
    first, runs = sweeps[0], {}
    for sweep in sweeps:
        if sweep["metric"] != first["metric"]:
            raise UserError(
                f"results of {first['metric']} and of {sweep['metric']}: expected sweeps of one "
                "metric; others have sections of their own"
            )
        for run in sweep["runs"]:
            mine = {key: run[key] for key in _OF_RUN if key in run}
            known = runs.setdefault(run["name"], mine)
            if not math.isclose(known["quality"], mine["quality"], rel_tol=_SAME):
                raise UserError(
                    f"run {run['name']} has {known['quality']:.4f} and {mine['quality']:.4f}: "
                    "expected sweeps on the same model, texts and steps"
                )
    missing = dict.fromkeys(name for sweep in sweeps for name in sweep["missing"])
    return {
        "metric": first["metric"],
        "reference": next((s["grid"]["reference"] for s in sweeps if s["grid"]["reference"]), ""),
        "configs": list(dict.fromkeys(sweep["grid"]["config"] for sweep in sweeps)),
        "device": first["environment"]["device"],
        "missing": [name for name in missing if name not in runs],
        "figures": [],
        "runs": [*runs.values()],
    }


def read(path: Path) -> dict[str, Any]:
    """Reads what was kept.

    Raises:
      UserError: if it is absent or something else.
    """
    hint = "name the RESULTS.json of sweeps, to make it"
    kept = files.read_json(path, hint)
    if not {"metric", "reference", "configs", "device", "missing", "figures", "runs"} <= {*kept}:
        raise UserError(f"{path}: nothing that this program has kept: {hint}")
    return kept


def whole(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Results as `results.collect` makes them, from what was kept."""
    best = gathering.best_dense(kept["runs"])
    summary = gathering.summary(kept["runs"], best, kept["reference"])
    grid = {"reference": kept["reference"]}
    return {**kept, "grid": grid, "dense": best, "summary": summary}


def section(name: str, kept: Mapping[str, Any]) -> str:
    """The section of a page, as Markdown."""
    results, runs = whole(kept), kept["runs"]
    commits = dict.fromkeys(run["commit"] for run in runs if run["commit"])
    short = ", ".join(commit[:12] + "+" * commit.endswith("+") for commit in commits)
    commit = f"; commit {short}" if commits else ""
    hours = sum(run["seconds"] for run in runs) / 3600
    origin = f"{len(runs)} runs of {', '.join(f'`{config}`' for config in kept['configs'])}"
    origin += f", {hours:.1f} hours of training on {kept['device'].partition(' ')[2]}"
    parts = [
        f"By `python -m lte_jax.sweep.page {name}`, from `benchmarks/results/{name}/results.json`: "
        f"{origin}{commit}. Below is what each method loses against the best dense row; "
        f"[a table](../benchmarks/results/{name}/table.md) has quality, sparsity and FLOPs.\n",
        tables.overview(results),
        tables.notes(results),
        *(f"![{_CAPTIONS[figure]}]({name}-{figure})\n" for figure in kept["figures"]),
    ]
    if compared := claims.table(results):
        unit = "points" if "metrics" in runs[0] else "percent of the best dense row's perplexity"
        parts.append(
            "**Beside the paper**, whose models (RoBERTa, GPT-2 Medium, LLaMA-7B) were not run "
            "here: its values cannot be compared, only which of two methods loses more. "
            f'"Loses more by" is in {unit}, of the same seeds; a verdict takes '
            f"{claims.ERRORS} standard errors.\n"
        )
        parts.append(compared)
    if left := claims.untested(results):
        parts.append(f"Of the paper, not run here: {'; '.join(left)}.\n")
    return "\n".join(parts)


def put(name: str, text: str, page: str) -> str:
    """The page's text with another section.

    Raises:
      UserError: if the page has no such section, or several.
    """
    begin, end = f"<!-- BEGIN {name} -->", f"<!-- END {name} -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    if page.count(begin) != 1 or page.count(end) != 1 or end not in rest:
        raise UserError(f"the page has no section {name}: expected one line {begin}, then {end}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def stored(kept: Mapping[str, Any]) -> str:
    """What is kept, as JSON with a line for each run."""
    head = report.as_json({key: value for key, value in kept.items() if key != "runs"})
    runs = ",\n".join("  " + json.dumps(run) for run in kept["runs"])
    return head.removesuffix("\n}\n") + f',\n "runs": [\n{runs}\n ]\n}}\n'


def write(name: str, kept: dict[str, Any], page: Path, folder: Path, figures: bool) -> list[Path]:
    """Writes the section, figures beside the page, and what they are made of; returns the files.

    Raises:
      UserError: if the page has no such section, or figures are asked for without matplotlib.
    """
    if not page.is_file():
        raise UserError(f"no page {page}: expected a Markdown file with a section {name}")
    text = page.read_text()
    put(name, "", text)  # raises before anything is written
    made = []
    if figures:
        if importlib.util.find_spec("matplotlib") is None:
            raise UserError(report.NO_FIGURES)
        made = tables.draw(whole(kept), page.parent, f"{name}-")
        kept = kept | {"figures": [path.name.removeprefix(f"{name}-") for path in made]}
    place = folder / name / "results.json"
    with files.explained(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write(place, stored(kept))
    details = place.with_name("table.md")
    files.atomic_write(details, tables.table(whole(kept)) + "\n" + tables.notes(whole(kept)))
    files.atomic_write(page, put(name, section(name, kept), text))
    return [place, details, *made, page]


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a section of a page."""
    parser = Parser(prog="python -m lte_jax.sweep.page", description=__doc__, allow_abbrev=False)
    parser.add_argument("name", help="of the section")
    parser.add_argument("results", nargs="*", metavar="RESULTS.json", help="of sweeps; none: kept")
    parser.add_argument("--page", default="docs/results.md", help="default: %(default)s")
    parser.add_argument("--keep", default="benchmarks/results", help="default: %(default)s")
    parser.add_argument("--no-figures", action="store_true", help="leave those there are")
    with cli_errors():
        flags = parser.parse_args(argv)
        if not re.fullmatch(r"\w[\w-]*", flags.name):
            parser.error(f"name={flags.name!r}: expected letters, digits and hyphens")
        page, folder = files.expand(flags.page, "--page"), files.expand(flags.keep, "--keep")
        if flags.results:
            kept = merged([gathering.read(path) for path in flags.results])
        else:
            kept = read(folder / flags.name / "results.json")
        report.say_written(write(flags.name, kept, page, folder, not flags.no_figures))


if __name__ == "__main__":
    main()
