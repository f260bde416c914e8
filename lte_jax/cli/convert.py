"""Writes a model in another dtype, in weights of 8, 6 or 4 bits, or an LTE model as a dense one.

    lte-jax convert owner/name my-model --dtype=bfloat16
    lte-jax convert runs/demo/lte runs/demo/lte-int8 --quantize=int8
    lte-jax convert runs/demo/lte runs/demo/lte-int4 --quantize=int4 --calibration=texts.jsonl
    lte-jax convert runs/demo/lte runs/demo/lte-int4 --quantize=int4 --calibration=texts.jsonl \
        --scale-steps=200
    lte-jax convert runs/demo/lte my-dense --dense
With --dense, the weights are those of the LTE model, its neurons back in the order of the dense
model it was made from; routers are left out. That computes what the LTE model does with all its
experts running (--routing=dense), and not what it does when it skips some.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

import lte_jax
from lte_jax import config, data, hf, interrupt, moefication, quantization
from lte_jax.errors import Parser, UserError, cli_errors
from lte_jax.files import Mirror, expand
from lte_jax.kernels.quantized import BITS, Quantized
from lte_jax.model import Transformer

_LENGTH = 512  # tokens of a calibration record


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Reads the one folder and writes the other, tokenizer and licence included."""
    parser = _parser(prog)
    with cli_errors():
        flags = parser.parse_args(argv)
        if not (flags.dtype or flags.dense or flags.quantize):
            parser.error("nothing to convert: give --dtype, --quantize or --dense")
        if flags.calibration and not flags.quantize:
            parser.error("--calibration is of --quantize: give both")
        if flags.scale_steps and not flags.calibration:
            parser.error("--scale-steps are on --calibration: give both")
        out, folder = expand(flags.out, "OUT"), hf.resolve(flags.model)
        if out.exists() and os.path.samefile(out, folder):
            raise UserError(f"{out} is the model itself: expected another folder to write to")
        hf.verify(folder, digests=True)
        read, lte = hf.read_config(folder)
        params, order = hf.load_params(folder, read, lte), hf.load_expert_order(folder)
        if found := quantization.format_of(params):
            raise UserError(f"{folder} is in {found}: name the model that it was quantised from")
        model = Transformer(read, lte)
        if flags.dense:
            model, params, order = *_dense(model, params, order, folder), None
        if flags.quantize:
            model = model.clone(dtype=flags.dtype or "bfloat16")
            params = _rounded(model, params, folder, flags)
        hf.save(out, model.config, model.lte, params, folder, order, dtype=flags.dtype)
        print(_told(out, model, params))


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="HF or LTE folder, or hub id")
    add("out", metavar="OUT", help="the folder to write; a model already there is replaced")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, help="of the weights but routers; default: as stored")
    bits = "8, 6 or 4 bits a weight of the large matrices; --dtype is then that of computing"
    add("--quantize", choices=list(BITS), help=bits)
    texts = "texts, as data.train of a config, on which rounding is to change little (GPTQ)"
    add("--calibration", metavar="TEXTS", help=texts)
    add("--calibration-tokens", type=config.flag(config.Count), default=16_384, help="to read")
    steps = "of training for the scales of rounded weights, afterwards; default: none"
    add("--scale-steps", type=config.flag(config.Count), default=0, help=steps)
    add("--dense", action="store_true", help="an LTE model as a dense one")
    return Mirror.add_to(parser)


def _rounded(model: Transformer, params, folder: Path, flags: argparse.Namespace):
    """The parameters in weights of 8, 6 or 4 bits; on texts, if there are any."""
    known = {}
    if flags.calibration:
        texts, wanted = data.read_texts(flags.calibration, split="train"), flags.calibration_tokens
        length = min(_LENGTH, model.config.max_length, wanted)
        records = data.pack(data.tokenize(texts, hf.load_tokenizer(folder)), length)
        some = records[: max(1, wanted // length)]
        known = {"calibration": some["tokens"], "mask": some["segments"]}
        known["scale_steps"] = flags.scale_steps
    with interrupt.handled("nothing has been written"):
        return lte_jax.quantize(model, params, flags.quantize, **known)


def _dense(model: Transformer, params, order_NEM, folder: Path) -> tuple[Transformer, dict]:
    """The dense model that an LTE model is when all its experts run."""
    if model.lte is None:
        raise UserError(f"--dense: {folder} is dense already: expected an LTE model")
    if model.lte.routing == "soft":
        raise UserError(
            f"--dense: {folder} runs with routing 'soft', which multiplies each expert by its "
            "score: no dense model computes that"
        )
    if order_NEM is None:  # unknown: the neurons stay in the order they have
        shape_NEM = params["layers"]["ffn"]["down"].shape[:3]
        size = shape_NEM[1] * shape_NEM[2]
        order_NEM = np.broadcast_to(np.arange(size).reshape(shape_NEM[1:]), shape_NEM)
    return moefication.to_dense(model, params, order_NEM)


def _told(out: Path, model: Transformer, params) -> str:
    """What was written, in one line."""
    read, lte = hf.read_config(out)
    whole = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Quantized))
    count = sum(math.prod(array.shape) for array in whole)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    experts = "dense" if lte is None else f"experts of {lte.expert_size}"
    kind = f"{read.family}, {experts}, {quantization.format_of(params) or read.dtype}"
    return f"{out}: {kind}, {count:,} parameters in {size / 1e6:,.1f} MB"
