"""Writes a dense model as a GGUF file, for llama.cpp and the programs built on it.

    lte-jax export-gguf my-dense my-dense.gguf --dtype=bfloat16
    lte-jax convert runs/demo/lte my-dense --dense      first, if the model is an LTE model

Llama, Mistral (without a sliding window), Qwen2 and Qwen3; the tokenizer goes along. To quantise
the file, use llama.cpp's own tools. Needs gguf: pip install 'lte-jax[gguf]'.
`python -m lte_jax.export_gguf` is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from lte_jax import export_gguf, hf
from lte_jax.errors import Parser, cli_errors
from lte_jax.files import Mirror, expand
from lte_jax.model import Transformer

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Reads the folder and writes the file."""
    parser = _parser(prog)
    with cli_errors():
        flags = parser.parse_args(argv)
        out, folder = expand(flags.out, "OUT"), hf.resolve(flags.model)
        hf.verify(folder, digests=True)
        config, lte = hf.read_config(folder)
        model = Transformer(config, lte)
        export_gguf.check(out, model)
        tokenizer = None
        if flags.tokenizer and hf.has_tokenizer(folder):
            tokenizer = hf.load_tokenizer(folder)
        elif flags.tokenizer:
            log.warning("%s has no tokenizer: the file takes token ids only", folder)
        params = hf.load_params(folder, config, lte)
        name = folder.resolve().name
        export_gguf.export(out, model, params, tokenizer, dtype=flags.dtype, name=name)
        print(f"{out}: {config.family}, {out.stat().st_size / 1e6:,.1f} MB")


def _parser(prog: str | None):
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="HF folder of a dense model, or hub id")
    add("out", metavar="OUT", help="the file to write, OUT.gguf; a file already there is replaced")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, help="of the matrices; default: as stored")
    text = "leave the tokenizer out: programs then need token ids"
    add("--no-tokenizer", dest="tokenizer", action="store_false", help=text)
    return Mirror.add_to(parser)
