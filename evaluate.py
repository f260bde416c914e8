"""Measures a model on text: perplexity, sparsity, cost and speed, next to its dense model.

    python evaluate.py --model=runs/demo/lte --dense=runs/demo/dense --data=FILE --out=runs/eval
    python evaluate.py --workdir=runs/demo    # redo the report of a finished train.py run

Prints a table and a sample text; writes results.json, table.md and figures to --out.
"""

import lte_jax
from lte_jax import config, data, errors, files, interrupt, pipeline, report


def main() -> None:
    """Turns the flags into records and models, and evaluates them."""
    parser = errors.Parser(description=__doc__)
    add, flag = parser.add_argument, config.flag
    add("--workdir", help="a finished train.py run: redo its report; no other flags")
    add("--model", help="HF or LTE folder, or hub id")
    add("--dense", help="the dense model to compare with: folder or hub id")
    add("--data", help="JSON-lines file, hub dataset, or python-stdlib")
    add("--column", default="text", help="column of --data that holds the text")
    add("--newline", default="\n", help="replaces newlines in the text")
    add("--join", help="joins all records of --data into one text, with this between them")
    add("--length", type=flag(config.Length), default=256, help="tokens per record")
    add("--records", type=flag(config.Count), default=64, help="read this many texts of --data")
    add("--batch-size", type=flag(config.Count), default=8)
    add("--routing", choices=["dense", "soft", "hard"], help="default: the model's own")
    add("--threshold", type=flag(config.Inside), help="default: the model's own")
    add("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    add("--prompt", type=errors.argument, default="Once upon a time", help="of the sample text")
    add("--name", help="name of the model in the table and figures")
    add("--out", help="output folder")
    add("--no-figures", action="store_true")
    with errors.cli_errors(), interrupt.handled("measurements so far are lost"):
        flags = parser.parse_args()
        if flags.workdir is not None:
            return pipeline.report_again(flags.workdir)
        if None in (flags.model, flags.data, flags.out):
            parser.error("give --model, --data and --out, or --workdir alone")
        out = files.expand(flags.out, "--out")
        model, params = lte_jax.load(flags.model, flags.dtype)
        baseline = lte_jax.load(flags.dense, flags.dtype) if flags.dense else None
        tokenizer = lte_jax.load_tokenizer(flags.model)
        source = (flags.data, flags.column, flags.newline, flags.records, "validation", flags.join)
        documents = data.tokenize(data.read_texts(*source), tokenizer)
        fill = data.pad if flags.join is None else data.pack  # padding would cut off one long text
        records = fill(documents, min(flags.length, max(map(len, documents))))
        settings = ("name", "routing", "threshold", "batch_size", "prompt")
        chosen = {name: getattr(flags, name) for name in settings}
        chosen |= {"baseline": baseline, "tokenizer": tokenizer}
        results = lte_jax.evaluate(model, params, records, **chosen)
        results |= {"environment": report.environment(), "source": vars(flags)}
        report.write([results], out, figures=not flags.no_figures)
        print(report.table([results]) + report.samples([results]))


if __name__ == "__main__":
    main()
