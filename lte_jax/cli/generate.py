"""Continues a prompt, streaming to the terminal.

lte-jax generate runs/demo/lte "Once upon a time"
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import lte_jax
from lte_jax import config
from lte_jax.errors import Parser, argument, cli_errors
from lte_jax.files import Mirror


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Passes the flags to `lte_jax.generate_text`."""
    parser = Parser(prog=prog, description=__doc__)
    add, flag = parser.add_argument, config.flag
    add("model", help="HF or LTE folder, or hub id")
    add("prompt", type=argument)
    add("--max-new-tokens", type=flag(config.Count), default=100)
    add("--temperature", type=flag(config.NotNegative), default=0.0, help="0: greedy")
    add("--top-k", type=flag(config.Count))
    add("--top-p", type=flag(config.TopShare))
    add("--seed", type=flag(config.Whole), default=0)
    add("--routing", choices=["dense", "soft", "hard"], help="default: the model's own")
    add("--threshold", type=flag(config.Inside), help="default: the model's own")
    add("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    add("--implementation", default="auto", help="kernels of the sparse FFN")
    Mirror.add_to(parser)
    with cli_errors():
        flags = vars(parser.parse_args(argv))
        path, prompt, dtype = (flags.pop(name) for name in ("model", "prompt", "dtype"))
        model, params = lte_jax.load(path, dtype)
        tokenizer = lte_jax.load_tokenizer(path)
        write = functools.partial(print, end="", flush=True)
        try:
            write(prompt)
            lte_jax.generate_text(model, params, tokenizer, prompt, write=write, **flags)
        finally:
            print()  # so that an error starts on a new line
