r"""Tokenises and packs texts once, into shards that training runs read record by record.

    lte-jax prepare --config=finetune --out=runs/shards --config.source.path=MODEL \
        --config.data.train=TEXTS
    lte-jax train --config=finetune --workdir=runs/mine --config.source.path=MODEL \
        --config.data.train=runs/shards

The records are those that the run would make of the texts itself: data.length, data.pack,
data.end_token, what is held out, the tokenizer. Of the model only config and tokenizer are read,
with data.end_token=auto also its weights. A killed command goes on when it is given again; how many
workers there were makes no difference (docs/data.md). `python -m lte_jax.data prepare` is the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from lte_jax import config, errors, files, interrupt


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Turns the flags into settings and prepares the texts."""
    parser = errors.Parser(prog=prog, description=__doc__)
    count = config.flag(config.Count)
    parser.add_argument("--out", required=True, help="folder for the shards and their manifest")
    text = "processes that tokenise and pack; default: one for each core"
    parser.add_argument("--workers", type=count, default=_cores(), metavar="N", help=text)
    afterwards = "what is written stays; run the same command to go on"
    with errors.cli_errors(), interrupt.handled(afterwards):
        flags, experiment = config.parse_flags(parser, argv)
        from lte_jax import data, preflight, workdir  # with all of training: it starts to log

        out = files.expand(flags.out, "--out")
        model_config, tokenizer, end = preflight.of_texts(experiment)
        with workdir.held(out):
            found = data.prepare(
                *(out, experiment.data, tokenizer, model_config),
                seed=experiment.seed,
                end=end,
                processes=flags.workers,
            )
        print(_told(found), f"{out}: train with --config.data.train={flags.out}", sep="\n")


def _cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _told(found: dict[str, Any]) -> str:
    """What is in the folder, in one line."""
    train, kept = found["train"], found["validation"]
    return (
        f"{train['documents']:,} documents: {train['records']:,} training records of "
        f"{found['length']} ({len(train['shards'])} shards), {train['tokens']:,} tokens; "
        f"{kept['records']:,} of {kept['whole']:,} validation records"
    )
