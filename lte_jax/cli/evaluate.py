"""Measures a model on text or on tasks, next to its dense model.

    python evaluate.py --model=runs/demo/lte --dense=runs/demo/dense --data=FILE
    python evaluate.py --model=runs/demo/lte --tasks=wikitext,mmlu    # see docs/tasks.md
    python evaluate.py --workdir=runs/demo    # redo the report of a finished train.py run
    python evaluate.py --runs runs/a runs/b runs/c --out=runs/abc    # means over their seeds
Prints a table and, of a text, a sample; writes results.json, table.md and figures to --out.
`lte-jax evaluate` is the same program.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lte_jax
from lte_jax import config, data, errors, files, interrupt, pipeline, report, runs, tasks
from lte_jax.kernels.quantized import BITS


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Turns the flags into records and models, and evaluates them."""
    parser = _parser(prog)
    with errors.cli_errors(), interrupt.handled("measurements so far are lost"):
        flags = parser.parse_args(argv)
        out = files.expand(flags.out, "--out") if flags.out is not None else None
        if flags.workdir is not None:
            _refuse_beside("workdir", flags, parser)
            pipeline.report_again(flags.workdir)
            return
        if flags.runs is not None:
            _refuse_beside("runs", flags, parser, "out", "no_figures")
            return _together(flags, out)
        if flags.model is None or not (flags.tasks or flags.data):
            parser.error("give --model and --data; or --model and --tasks; or --workdir; or --runs")
        model, params = lte_jax.load(flags.model, flags.dtype)
        if flags.quantize:
            params = lte_jax.quantize(model, params, flags.quantize)
        chosen = {
            k: getattr(flags, k) for k in ("name", "routing", "threshold", "sparsity", "batch_size")
        }
        chosen["baseline"] = lte_jax.load(flags.dense, flags.dtype) if flags.dense else None
        chosen["tokenizer"] = lte_jax.load_tokenizer(flags.model)
        if flags.tasks:
            flags.records = None if flags.records == "all" else flags.records
            what = flags.tasks, model, params, *(getattr(flags, k) for k in tasks.SETTINGS)
            return report.write_tasks(tasks.measure(*what, **chosen), out, vars(flags))
        records, extent = _records(flags, chosen["tokenizer"])
        results = lte_jax.evaluate(model, params, records, prompt=flags.prompt, **chosen) | extent
        results |= {"environment": report.environment(), "source": vars(flags)}
        written = [] if out is None else report.write([results], out, not flags.no_figures)
        measured = f"\nMeasured on {report.extent(results)}.\n"
        print(report.table([results]) + measured + report.samples([results]))
        report.say_written(written)


def _parser(prog: str | None) -> errors.Parser:
    parser = files.Mirror.add_to(errors.Parser(prog=prog, description=__doc__))
    add, flag = parser.add_argument, config.flag
    add("--workdir", help="a finished train.py run: redo its report; no other flags")
    several = "finished train.py runs: a table of means over their seeds, figures to --out"
    add("--runs", nargs="+", metavar="WORKDIR", help=several)
    add("--model", help="HF or LTE folder, or hub id")
    add("--dense", help="the dense model to compare with: folder or hub id")
    add("--data", help="texts, as data.train of a config (docs/data.md); of tasks, a folder")
    add("--column", default="text", help="column of --data that holds the text")
    add("--newline", default="\n", help="replaces newlines in the text")
    add("--join", help="joins all records of --data into one text, with this between them")
    add("--length", type=flag(config.Length), help="tokens per record; default: 256, or the task's")
    add("--records", type=_number, help="to read of --data, or 'all'; default: 64, of tasks all")
    add("--batch-size", type=flag(config.Count), default=8)
    tasks.add_to(parser)
    add("--routing", choices=["dense", "soft", "hard"], help="default: the model's own")
    add("--threshold", type=flag(config.Inside), help="default: the model's own")
    several = "shares of experts to skip, joined by commas, of a model with a curve of thresholds"
    add("--sparsity", type=config.flag(tuple[config.Share, ...]), help=several)
    add("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    add("--quantize", choices=list(BITS), help="round the model's weights to so many bits")
    add("--prompt", type=errors.argument, default="Once upon a time", help="of the sample text")
    add("--name", help="name of the model in the table and figures")
    add("--out", help="output folder")
    add("--no-figures", action="store_true")
    return parser


def _refuse_beside(mode: str, flags: Namespace, parser: errors.Parser, *taken: str) -> None:
    """Ends the program where flags are given that `--mode` would ignore."""
    unset = vars(parser.parse_args([]))
    ignored = [key for key in unset if getattr(flags, key) != unset[key]]
    ignored = ["--" + k.replace("_", "-") for k in ignored if k not in (mode, *taken)]
    if ignored:
        several = " and ".join("--" + key.replace("_", "-") for key in taken)
        takes = f"takes {several} alone" if taken else "takes no other flags"
        parser.error(f"--{mode} {takes}: leave out {', '.join(ignored)}")


def _number(text: str) -> int | str:
    """The value of --records."""
    return text if text == "all" else config.flag(config.Count)(text)


def _records(flags: Namespace, tokenizer: Any) -> tuple[data.Records, dict[str, int | None]]:
    """The records of --data, and how much of it they are."""
    limit = {None: 64, "all": None}.get(flags.records, flags.records)
    texts = data.read_texts(
        *(flags.data, flags.column, flags.newline, limit, "validation", flags.join)
    )
    whole = data.count_texts(flags.data, flags.column, "validation", flags.join)
    documents = data.tokenize(texts, tokenizer)
    length = min(flags.length or 256, max(map(len, documents)))
    if flags.join is None:
        return data.pad(documents, length), {"of_records": whole}
    # Padding would cut off one long text.
    lines = whole if limit is None else min(limit, whole or limit)
    return data.pack(documents, length), {"lines": lines, "of_lines": whole}


def _together(flags: Namespace, out: Path | None) -> None:
    results = runs.together(flags.runs)
    print(runs.table(results) + "\n" + runs.notes(flags.runs))
    if out is not None:
        print(*runs.write(results, flags.runs, out, figures=not flags.no_figures), sep="\n")
