"""Continues prompts, streaming to the terminal.

    lte-jax generate runs/demo/lte "def main("
    lte-jax generate runs/demo/lte --file=prompts.txt --max-new-tokens=30
    echo "Once upon a time" | lte-jax generate owner/name --temperature=0.8 --seed=1
    lte-jax generate owner/name-instruct --chat "What is sparsity?"
Several prompts are continued one after the other. The last line, on stderr, says how fast it was,
the share of experts that did not run, and which kernels ran.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import lte_jax
from lte_jax import config
from lte_jax.errors import Parser, UserError, argument, cli_errors
from lte_jax.files import Mirror, expand
from lte_jax.generation import Measured
from lte_jax.kernels import IMPLEMENTATIONS
from lte_jax.kernels.quantized import BITS


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Passes the flags to `lte_jax.generate_text`."""
    with cli_errors():
        flags = vars(_parser(prog).parse_intermixed_args(argv))  # prompts may follow flags
        path, dtype, given = (flags.pop(name) for name in ("model", "dtype", "prompt"))
        prompts = _prompts(given, flags.pop("file"))
        model, params = lte_jax.load(path, dtype)
        if format := flags.pop("quantize"):
            params = lte_jax.quantize(model, params, format)
        tokenizer = lte_jax.load_tokenizer(path)
        write, measured = functools.partial(print, end="", flush=True), []
        flags |= {"write": write, "measured": measured.append}
        for i, prompt in enumerate(prompts):
            try:
                write("\n" * (i > 0) + ("" if flags["chat"] else prompt))
                lte_jax.generate_text(model, params, tokenizer, prompt, **flags)
            finally:
                print()  # so that an error starts on a new line
        print(_summary(measured), file=sys.stderr)


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    add, flag = parser.add_argument, config.flag
    add("model", help="HF or LTE folder, or hub id")
    add("prompt", type=argument, nargs="*", help="default: standard input, a prompt a line")
    add("--file", metavar="FILE", help="a file of prompts, one a line; - is standard input")
    add("--chat", action="store_true", help="prompts are questions, for the model's chat template")
    add("--max-new-tokens", type=flag(config.Count), default=100)
    add("--temperature", type=flag(config.NotNegative), default=0.0, help="0: greedy")
    add("--top-k", type=flag(config.Count), help="sample among the K likeliest tokens")
    add("--top-p", type=flag(config.TopShare), help="among the likeliest of this probability")
    add("--seed", type=flag(config.Whole), default=0, help="of the sampling")
    add("--routing", choices=["dense", "soft", "hard"], help="default: the model's own")
    add("--threshold", type=flag(config.Inside), help="default: the model's own")
    skipped = "share of experts to skip, of a model with a curve of thresholds (docs/sparsity.md)"
    add("--sparsity", type=flag(config.Share), help=skipped)
    add("--dtype", choices=["float32", "bfloat16"], help="default: as stored")
    bits = "round the large matrices to 8, 6 or 4 bits a weight (docs/quantization.md)"
    add("--quantize", choices=list(BITS), help=bits)
    kernels = f"kernels of the sparse FFN: auto (default), {', '.join(IMPLEMENTATIONS)}"
    add("--implementation", default="auto", help=kernels)
    return Mirror.add_to(parser)


def _prompts(given: list[str], file: str | None) -> list[str]:
    """The prompts of the command line, of a file or of standard input."""
    if given and file is not None:
        raise UserError("--file and a prompt: expected one of them")
    if given:
        return given
    if file is None and sys.stdin.isatty():
        raise UserError("no prompt: write one after the model, or give --file=FILE, or pipe some")
    if file in (None, "-"):
        where, data = "standard input", sys.stdin.buffer.read()
    else:
        where, data = str(file), _read(expand(file, "--file"))
    prompts = [line for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"no prompt in {where}: expected one a line")
    return prompts


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"--file={path}: no such file: expected prompts, one a line")
    return path.read_bytes()


def _summary(measured: list[Measured]) -> str:
    """One line: tokens, speed, sparsity, kernels."""
    tokens, seconds = (sum(getattr(m, name) for m in measured) for name in ("tokens", "seconds"))
    later = [sum(numbers) for numbers in zip(*(m.later for m in measured), strict=True)]
    speed = f"{tokens / seconds:.3g} tokens/s with compiling"
    if later[0]:
        speed = f"{later[0] / later[1]:.3g} tokens/s"
    skipped = [(m.sparsity * m.tokens, m.tokens) for m in measured if m.sparsity is not None]
    share = sum(s for s, _ in skipped) / max(1, sum(count for _, count in skipped))
    sparsity = f"{share:.1%} of the experts skipped" if share else "all experts run"
    kernels = measured[0].kernels
    return f"{tokens} tokens in {seconds:.3g} s, {speed}; {sparsity}; kernels: {kernels}"
