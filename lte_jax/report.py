"""Reports on evaluation results: a Markdown table, figures, and a folder with both.

    python -m lte_jax.report runs/a/results.json runs/b/results.json --out runs/report

Results are what `evaluation.evaluate` returns; several of them (other sparsities, other models)
make one table and one figure of quality against sparsity.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lte_jax.errors import Parser, UserError, cli_errors
from lte_jax.figures import Results, draw, drawable, label, with_dense
from lte_jax.files import atomic_write, expand, explained, read_json

NO_FIGURES = "figures need matplotlib, which is not installed: pip install 'lte-jax[plot]'"
_PACKAGES = ("lte-jax", "jax", "jaxlib", "flax", "numpy")


def environment() -> dict[str, Any]:
    """What results depend on besides the model: versions, commit, device."""
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
    """The commit of this checkout, with "+" if tracked files differ; None outside git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    words = "describe --always --abbrev=40 --exclude=* --dirty=+".split()
    try:
        run = subprocess.check_output(["git", "-C", root, *words], stderr=subprocess.DEVNULL)
        return run.decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_again(path: Path) -> dict[str, Any] | None:
    """The results in the file; None if they must be measured (again)."""
    if not path.exists():
        return None
    try:
        return read(path)
    except UserError as error:
        logging.getLogger(__name__).warning("%s: evaluating again", error)
        return None


def read(path: str | Path) -> dict[str, Any]:
    """Reads a results.json.

    Raises:
      UserError: if the file is absent or something else.
    """
    results = read_json(expand(path), "expected a results.json of evaluate.py")
    models, needed = results.get("models"), {"name", "token_ppl", "sparsity"}
    if not models or not all(isinstance(m, dict) and _is_entry(m) for m in models):
        raise UserError(
            f'{path}: no results of evaluate.py: expected {{"models": [...]}}, each with '
            f"{', '.join(sorted(needed))}"
        )
    return results


def write(
    results: Sequence[Results], out: str | Path, figures: bool = True, log: bool = False
) -> list[Path]:
    """Writes table.md, the figures and, last, results.json (of a single result) to a folder.

    Each file is written atomically, so a folder with a results.json is complete.

    Returns:
      The files written.

    Raises:
      UserError: if the folder cannot be written, or, after writing all else, if matplotlib is
        missing.
    """
    out = expand(out, "out")
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    made = [out / "table.md"]
    atomic_write(made[0], table(results) + "\n" + notes(results) + samples(results))
    drawn = figures and importlib.util.find_spec("matplotlib") is not None
    if drawn:
        made += draw(results, out, log)
    if len(results) == 1:
        made.append(out / "results.json")
        atomic_write(made[-1], as_json(results[0]))
    if figures and not drawn:
        raise UserError(NO_FIGURES)
    return made


def write_tasks(
    rows: Sequence[Mapping[str, Any]], out: Path | None, source: Mapping[str, Any]
) -> None:
    """Prints the rows of `tasks.measure`; writes table.md and results.json to `out`, if given."""
    limit = source.get("records")
    most = f"At most {limit:,} records (--records) of each task" if limit else "All records"
    text = f"{task_table(rows)}\n{most} were measured{', of MMLU of each subject' * bool(limit)}.\n"
    print(text)
    if out is None:
        return
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "table.md", text)
    results = {"tasks": list(rows), "environment": environment(), "source": dict(source)}
    atomic_write(out / "results.json", as_json(results))
    say_written([out / "table.md", out / "results.json"])


def say_written(paths: Sequence[Path]) -> None:
    """Prints the files that a report consists of, if any."""
    if paths:
        print("wrote", *(f"  {path}" for path in paths), sep="\n")


def absent(results: Sequence[Results], out: Path, figures: bool = True) -> list[str]:
    """Names of the files that `write` would make and that do not exist."""
    names = ["table.md", *(drawable(results) if figures else ()), "results.json"]
    return [name for name in names if not (out / name).exists()]


def as_json(results: Mapping[str, Any]) -> str:
    """The text of results.json.

    Raises:
      UserError: on NaN and infinities, which JSON cannot represent; names the entry.
    """
    try:
        return json.dumps(results, indent=1, allow_nan=False) + "\n"
    except ValueError:
        import jax

        leaves = jax.tree_util.tree_leaves_with_path({"results": results})
        numbers = ((path, value) for path, value in leaves if isinstance(value, float))
        path, value = next(found for found in numbers if not math.isfinite(found[1]))
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        raise UserError(
            f"{where}={value}: expected a finite number, as JSON has no others"
        ) from None


def table(results: Sequence[Results]) -> str:
    """All models of all results as a Markdown table, by sparsity, dense models first."""
    entries = with_dense(results)
    metrics = dict.fromkeys(name for entry, _ in entries for name in entry.get("metrics", ()))
    heads = ["model", *(metrics or ("perplexity / token", "/ byte")), "FFN sparsity"]
    heads += ["GFLOPs / token", "ms / token", "time / dense"]
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for entry, dense in entries:
        perplexity = _number(entry.get("token_ppl"), ".3f")
        if dense is not None and entry is not dense and "token_ppl" in entry:
            perplexity += f" ({entry['token_ppl'] / dense['token_ppl'] - 1:+.1%})"
        scores = [_number(entry.get("metrics", {}).get(name), ".2f") for name in metrics]
        cells = [
            entry["name"],
            *(scores or (perplexity, _number(entry.get("byte_ppl"), ".3f"))),
            f"{entry['sparsity']:.1%}",
            _number(entry.get("gflops_per_token"), ".3g"),
            _number(entry.get("latency_ms"), ".3g"),
            _time_ratio(entry),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def task_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `tasks.measure` as a Markdown table."""
    lines = [
        "| task | metric | model | value | standard error | records | FFN sparsity |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [
            *(row[key] for key in ("task", "metric", "model")),
            *(_number(row[key], ".3f") for key in ("value", "error")),
            str(row["records"]),
            f"{row['sparsity']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def notes(results: Sequence[Results]) -> str:
    """What the columns of `table` mean, and where the numbers come from."""
    lines = [
        "Perplexity in brackets is relative to the dense model. GFLOPs are 2^30 FLOPs of attention "
        "projections, FFN and router, without embedding, head and attention scores. ms per token "
        "is the median at batch size 1; its ratio is to the dense model in the same run, round by "
        'round, and "about 1" where the rounds differ by more.'
    ]
    for result in results:
        env, source = result.get("environment", {}), result.get("source", {})
        versions = ", ".join(f"{k} {v}" for k, v in env.get("versions", {}).items())
        parts = [
            source.get("model"),
            source.get("data"),
            extent(result),
            env.get("device"),
            versions,
            f"commit {env['commit'][:12]}" if env.get("commit") else None,
        ]
        if any(parts):
            lines.append("- " + "; ".join(str(part) for part in parts if part))
    return "\n".join(lines) + "\n"


def extent(result: Results) -> str:
    """How much of the data was measured: "64 of 324 records of 256 tokens, 9,213 predicted"."""
    records, whole, tokens = (result.get(k) for k in ("records", "of_records", "tokens"))
    words = []
    if records:
        length = f" of {result['length']} tokens" if result.get("length") else ""
        words.append(f"{_some(records, whole)} records{length}")
    if tokens and all("token_ppl" in model for model in result["models"]):
        words.append(f"{tokens:,} tokens predicted" if not words else f"{tokens:,} predicted")
    if "lines" in result:  # joined into one text
        lines, of_lines = result["lines"], result["of_lines"]
        words.append(f"from {_some(lines, of_lines)} lines" if lines else "from all lines")
    return ", ".join(words)


def _some(number: int, whole: int | None) -> str:
    """Such as "64 of 324", "all 324" or, of an unknown whole, "64"."""
    if whole is None or number > whole:
        return f"{number:,}"
    return f"all {number:,}" if number == whole else f"{number:,} of {whole:,}"


def samples(results: Sequence[Results]) -> str:
    """What each model wrote, as Markdown."""
    blocks = []
    for entry, _ in with_dense(results):
        if "sample" in entry:
            text = entry["sample"]["prompt"] + entry["sample"]["text"]
            fence = "`" * (3 + text.count("```"))
            blocks.append(f"\n{label(entry)} wrote:\n\n{fence}text\n{text}\n{fence}\n")
    return "".join(blocks)


def _is_entry(entry: Mapping[str, Any]) -> bool:
    """Whether it describes a model: what it is called, how good and how sparse it is."""
    return {"name", "sparsity"} <= entry.keys() and bool({"token_ppl", "metrics"} & entry.keys())


def _time_ratio(entry: Mapping[str, Any]) -> str:
    ratio, noise = entry.get("latency_ratio"), entry.get("latency_noise", 0.0)
    near = ratio is not None and ratio != 1 and abs(ratio - 1) <= noise
    return "about 1" if near else _number(ratio, ".2f")


def _number(value: float | int | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def main(argv: Sequence[str] | None = None) -> None:
    """Makes one table and one set of figures from one or more results.json."""
    parser = Parser(prog="python -m lte_jax.report", description=main.__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULTS.json")
    parser.add_argument("--out", required=True, help="folder for table.md and the figures")
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--log", action="store_true", help="perplexity on a logarithmic axis")
    with cli_errors():
        flags = parser.parse_args(argv)
        results = [read(path) for path in flags.results]
        made = write(results, flags.out, not flags.no_figures, flags.log)
        print(table(results), *made, sep="\n")


if __name__ == "__main__":
    main()
