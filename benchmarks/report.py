"""Makes a file per device, the README's tables and a figure from kernel and decoding measurements.

    python benchmarks/report.py --merge ffn.json decode.json   (to benchmarks/results/<device>.json;
                                                                also of peers.py)
    python benchmarks/report.py --readme README.md             (tables and figure of all results)

No number is copied by hand: the README's tables stand between two marks and are replaced.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import decode
import ffn
import peers

from lte_jax import style
from lte_jax.errors import UserError, cli_errors
from lte_jax.files import atomic_write

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = ROOT / "docs" / "kernels.png"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
LEGEND = """\
Weights are random, and so is the choice of experts: each row of a batch by itself (`uniform`), or
with favourites in common (`skewed`). `sparsity` is the share of experts that a row skips, `union`
that of the experts that no row of the batch uses. Dense is a layer, or a model, with all experts
on: by the faster of plain JAX (`plain`) and these kernels (`kernel`). `floor ms` is the bytes to
be read over the bandwidth of a plain pass over an array (on a GPU, of a copy), measured in the
same run; kernels can exceed it. `used` is the floor over the time, `predicted` the ratio of the
bytes that a step reads, sparse over dense. A CPU's model is not noted. Beside others, four layers
with the whole head, or a whole small model: `of equal bits` is the time over that of llama.cpp with
as many bits a weight (BF16, Q8_0, Q4_0), `of dense` that over the same program's dense model in the
same format.

"""
_TABLES = {"ffn": ffn.table, "decode": decode.table, "peers": peers.table, "model": peers.table}
_TITLES = {
    "ffn": "One FFN layer of LLaMA2-7B (4096 x 11008, experts of 32)",
    "decode": "Decoding with LLaMA2-7B's shapes, end to end",
    "peers": "Beside what else runs it: four layers of LLaMA2-7B, and its head",
    "model": "The same of a whole small model",
}


def merge(paths: list[pathlib.Path], results: pathlib.Path) -> pathlib.Path:
    """Merges the results of several benchmarks on one device into its file.

    Raises:
      UserError: on a file that is not a benchmark's, or of another device.
    """
    parts = {}
    for path in paths:
        record = _read(path)
        part = parts.setdefault(record["benchmark"], record | {"rows": []})
        part["rows"] += record["rows"]
    devices = {record["rows"][0]["device"] for record in parts.values()}
    if len(devices) != 1:
        raise UserError(f"{', '.join(map(str, paths))}: of {len(devices)} devices, expected one")
    name = re.sub(r"[^a-z0-9]+", "-", devices.pop().lower()).strip("-")
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    atomic_write(path, json.dumps(before | parts, indent=1) + "\n")
    return path


def _read(path: pathlib.Path) -> dict:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): expected a benchmark's") from None
    if not isinstance(record, dict) or not record.get("rows") or "benchmark" not in record:
        raise UserError(
            f"{path}: not of ffn.py or decode.py, nor peers.py: expected what their --json writes"
        )
    return record


def brief(row: dict) -> bool:
    """Whether a row of ffn.py or decode.py is shown in the README: bfloat16, one token at a time.

    All rows are in benchmarks/results/README.md.
    """
    one = row["dtype"] == "bfloat16" and row["batch"] == 1
    wanted = (0.5, 0.74, 0.9) if "layers" in row else (0.5, 0.9)
    return one and round(row["sparsity"], 2) in wanted


def summary(results: pathlib.Path, whole: bool) -> str:
    """Markdown of all devices measured: every row, or the brief ones."""
    lines = []
    for path in sorted(results.glob("*.json")):
        parts = json.loads(path.read_text())
        for name, record in ((name, parts[name]) for name in _TITLES if name in parts):
            rows, versions = record["rows"], record["versions"]
            shown = peers.brief if name in ("peers", "model") else brief
            commit = (record["commit"] or "unknown")[:10]
            lines += [
                f"**{_TITLES[name]}** on {rows[0]['device']}, {record['cores']} cores, "
                f"{record['bandwidth_gb_per_s']:.3g} GB/s, `{rows[0]['implementation']}` kernels, "
                f"jax {versions['jax']}, commit {commit}:",
                "",
                _TABLES[name]([row for row in rows if whole or shown(row)]),
                "",
                f"`python benchmarks/{' '.join(record['command'])}`",
                "",
            ]
    return "\n".join(lines)


def figure(results: pathlib.Path, path: pathlib.Path) -> None:
    """Time against sparsity at batch size 1: a panel per device, a line per number format."""
    files = [json.loads(p.read_text()) for p in sorted(results.glob("*.json"))]
    with style.applied():
        made, panels = style.panels(len(files))
        for axes, parts in zip(panels, files, strict=True):
            _draw_device(axes, parts)
        style.labels(made, "FFN sparsity, %", "time per token, % of dense")
        style.legend(made)
        style.save(made, path)


def _draw_device(axes, parts: dict) -> None:
    """Filled marks and lines: bfloat16; hollow and dashed: float32, as they lie close together."""
    decoding = [r for r in parts.get("decode", {"rows": []})["rows"] if r["batch"] == 1]
    decoding = [r for r in decoding if r["prompt"] == min(p["prompt"] for p in decoding)]
    layer = [r for r in parts["ffn"]["rows"] if r["batch"] == 1]
    axes.plot([0, 100], [100, 0], color=style.GREY, linewidth=1, label="share of experts run")
    for what, rows in (("FFN layer", layer), ("whole model", decoding)):
        for dtype in sorted({r["dtype"] for r in rows}):
            mine = sorted((r for r in rows if r["dtype"] == dtype), key=lambda r: r["sparsity"])
            mark = dict(style.MARKS[0 if what == "FFN layer" else 1])
            if dtype == "float32":
                mark |= {"markerfacecolor": "white", "markeredgecolor": mark["color"]}
                mark |= {"linestyle": style.DASHES, "markersize": 11, "linewidth": 1.2, "zorder": 1}
            axes.plot(
                [100 * r["sparsity"] for r in mine],
                [100 * r["ratio_to_dense"] for r in mine],
                label=f"{what}, {dtype} (dense {mine[0]['dense_ms']:.3g} ms)",
                clip_on=False,
                **mark,
            )
    axes.plot(0, 100, "o", color=style.GREY, markersize=9, clip_on=False, zorder=3, label="dense")
    axes.set_title(f"LLaMA2-7B's shapes on {layer[0]['device']}, one token at a time")
    axes.set_xlim(0, 100)
    axes.set_ylim(0)


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--merge", type=pathlib.Path, nargs="+", metavar="JSON")
    parser.add_argument("--readme", type=pathlib.Path, help="put tables between its marks")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--figure", type=pathlib.Path, default=FIGURE)
    flags = parser.parse_args()
    if flags.merge:
        print(f"wrote {merge(flags.merge, flags.results)}")
    print(summary(flags.results, whole=True))
    if flags.readme:
        before, _, rest = flags.readme.read_text().partition(BEGIN)
        _, mark, after = rest.partition(END)
        if not mark:
            raise UserError(f"{flags.readme}: expected the marks {BEGIN} and {END}")
        text = summary(flags.results, whole=False)
        atomic_write(flags.readme, f"{before}{BEGIN}\n\n{text}\n{END}{after}")
        atomic_write(flags.results / "README.md", LEGEND + summary(flags.results, whole=True))
        figure(flags.results, flags.figure)
        print(f"wrote {flags.readme} and {flags.figure}")


if __name__ == "__main__":
    main()
