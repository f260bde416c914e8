"""Measures a model on text or on tasks, next to its dense model.

    python evaluate.py --model=runs/demo/lte --dense=runs/demo/dense --data=FILE --out=runs/eval
    python evaluate.py --model=runs/demo/lte --tasks=wikitext,mmlu    # see docs/tasks.md
    python evaluate.py --workdir=runs/demo    # redo the report of a finished train.py run
Prints a table and, of a text, a sample; writes results.json, table.md and figures to --out.
`lte-jax evaluate` is the same program.
"""

from __future__ import annotations

from collections.abc import Sequence

import lte_jax
from lte_jax import config, data, errors, files, interrupt, pipeline, report, tasks


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Turns the flags into records and models, and evaluates them."""
    parser = files.Mirror.add_to(errors.Parser(prog=prog, description=__doc__))
    add, flag = parser.add_argument, config.flag
    add("--workdir", help="a finished train.py run: redo its report; no other flags")
    add("--model", help="HF or LTE folder, or hub id")
    add("--dense", help="the dense model to compare with: folder or hub id")
    add("--data", help="JSON-lines file, hub dataset, or python-stdlib; of tasks, a folder")
    add("--column", default="text", help="column of --data that holds the text")
    add("--newline", default="\n", help="replaces newlines in the text")
    add("--join", help="joins all records of --data into one text, with this between them")
    add("--length", type=flag(config.Length), help="tokens per record; default: 256, or the task's")
    add("--records", type=flag(config.Count), help="to read of --data; default: 64, of tasks all")
    add("--batch-size", type=flag(config.Count), default=8)
    tasks.add_to(parser)
    add("--routing", choices=["dense", "soft", "hard"], help="default: the model's own")
    add("--threshold", type=flag(config.Inside), help="default: the model's own")
    add("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    add("--prompt", type=errors.argument, default="Once upon a time", help="of the sample text")
    add("--name", help="name of the model in the table and figures")
    add("--out", help="output folder")
    add("--no-figures", action="store_true")
    with errors.cli_errors(), interrupt.handled("measurements so far are lost"):
        flags = parser.parse_args(argv)
        if flags.workdir is not None:
            return pipeline.report_again(flags.workdir)
        if flags.model is None or not flags.tasks and None in (flags.data, flags.out):
            parser.error("give --model, --data and --out; or --model and --tasks; or --workdir")
        out = files.expand(flags.out, "--out") if flags.out is not None else None
        model, params = lte_jax.load(flags.model, flags.dtype)
        chosen = {k: getattr(flags, k) for k in ("name", "routing", "threshold", "batch_size")}
        chosen["baseline"] = lte_jax.load(flags.dense, flags.dtype) if flags.dense else None
        chosen["tokenizer"] = lte_jax.load_tokenizer(flags.model)
        if flags.tasks:
            what = flags.tasks, model, params, *(getattr(flags, k) for k in tasks.SETTINGS)
            return report.write_tasks(tasks.measure(*what, **chosen), out, vars(flags))
        source = (flags.data, flags.column, flags.newline, flags.records or 64, "validation")
        documents = data.tokenize(data.read_texts(*source, flags.join), chosen["tokenizer"])
        fill = data.pad if flags.join is None else data.pack  # padding would cut off one long text
        records = fill(documents, min(flags.length or 256, max(map(len, documents))))
        results = lte_jax.evaluate(model, params, records, prompt=flags.prompt, **chosen)
        results |= {"environment": report.environment(), "source": vars(flags)}
        report.write([results], out, figures=not flags.no_figures)
        print(report.table([results]) + report.samples([results]))
