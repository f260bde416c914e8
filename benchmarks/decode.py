"""Time decoding end to end at LLaMA2-7B's shapes: dense, and at chosen FFN sparsities.

    python benchmarks/decode.py --new-tokens 8 --rounds 3       (CPU: 14 GB, ten minutes)
    python benchmarks/decode.py --prompt 128,512,2048 --json benchmarks/results/decode.json    (GPU)
    python benchmarks/decode.py --model runs/demo/lte           (a trained model as it is)

Weights are random; every layer's router logits are about standard normal, and the threshold is set
for the sparsity asked for; the table has the share of experts that was really skipped. Dense and
sparse use the same weights and code, dense with all experts on and no router. They take turns; ms
per step is the median over rounds of decoding `--new-tokens` after a prompt of that length, without
prefill. Predicted is the ratio of the bytes a step reads: weights of attention, active experts,
router and head, and the cached keys and values.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import statistics
import sys
import time
import zlib

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from ffn import bandwidth, listed, publish
from lte_jax.kernels.quantized import BITS
from tqdm import tqdm

import lte_jax
from lte_jax import kernels, quantization
from lte_jax.config import LTEConfig, load_config
from lte_jax.errors import UserError, cli_errors
from lte_jax.generation.decoding import Decoder, DecodeState
from lte_jax.model import Transformer, abstract_params, init_cache
from lte_jax.sparsity import bytes_per_token

SMALL = {"vocab_size": 128, "d_model": 64, "num_heads": 4, "num_kv_heads": 4, "d_ff": 128}


def random_model(layers: int | None, dtype: str, small: bool) -> tuple[Transformer, dict]:
    """LLaMA2-7B with experts of 32, cut to `layers`; parameters of `dtype`, all layers alike."""
    experiment = load_config(str(pathlib.Path(__file__).parents[1] / "configs/llama7b.py"))
    config = experiment.source.scratch
    if small:
        config = dataclasses.replace(config, num_layers=2, **SMALL)
    config = dataclasses.replace(config, num_layers=layers or config.num_layers)
    model = Transformer(config, LTEConfig(expert_size=32, router_bias=False), dtype)

    def make(path, leaf):
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return jnp.ones(leaf.shape, dtype)
        of_layer = leaf.shape[1:] if "layers" in name else leaf.shape
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))
        kind = "float32" if "router" in name else dtype
        # Inputs of unit RMS give logits of unit variance: a threshold's quantile is the sparsity.
        one = jax.random.normal(key, of_layer, kind) * config.d_model**-0.5
        return jnp.broadcast_to(one, leaf.shape)

    create = jax.jit(make, static_argnums=(0, 1))
    flat, tree = jax.tree_util.tree_flatten_with_path(abstract_params(model))
    return model, jax.tree.unflatten(tree, [create(path, leaf) for path, leaf in flat])


def started(model: Transformer, batch: int, prompt: int, room: int) -> DecodeState:
    """A state as after prefill of prompts of that length; the values of the keys do not matter."""
    cache = init_cache(model, batch, prompt + room)
    cache["segments"] = cache["segments"].at[:, :prompt].set(1)
    cache["index"] = jnp.int32(prompt)
    state = DecodeState.start(cache, jax.random.key(0))
    return state.replace(tokens_B=jnp.ones(batch, jnp.int32))


def decoder(model, params, sparsity: float | None, implementation: str, own: bool = False):
    """A decoder that skips about this share of random experts; None: none of them.

    `own` says that the model has a threshold, which then decides.
    """
    logit = None if own or sparsity is None else statistics.NormalDist().inv_cdf(sparsity)
    threshold = None if logit is None else float(jax.nn.sigmoid(logit))
    routing = "dense" if sparsity is None else "hard"
    settings = {"implementation": implementation, "eos_ids": ()}
    return Decoder.of(model, params, routing, threshold, **settings)


def measure(model, params, flags, batch: int, prompt: int, bytes_per_s: float) -> list[dict]:
    """The rows of one batch size and prompt length, dense first."""
    config, size = model.config, flags.new_tokens
    state = started(model, batch, prompt, size)

    def extending(sparsity):
        made = decoder(model, params, sparsity, flags.implementation, flags.model is not None)
        return lambda: made.extend(state, jnp.int32(size), size)[1]

    decoders = {sparsity: extending(sparsity) for sparsity in (None, *flags.sparsity)}
    times: dict = {key: [] for key in decoders}
    read = {}
    for turn in tqdm(range(flags.rounds + 1), desc=f"batch {batch}, prompt {prompt}", leave=False):
        for key, run in decoders.items():
            start = time.perf_counter()
            after = jax.block_until_ready(run())
            if turn:
                times[key].append(time.perf_counter() - start)
            read[key] = float(after.read) / size

    width, widths = jnp.dtype(model.dtype).itemsize, quantization.widths(params, model.dtype)
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * width
    kv *= batch * (prompt + size / 2)
    dense_s = statistics.median(times[None]) / size
    dense_bytes = bytes_per_token(config, None, 0.0, *widths) + kv
    rows = []
    for key, seconds in times.items():
        lte = None if key is None else model.lte
        needed = bytes_per_token(config, lte, 1.0 - read[key], *widths) + kv
        step_s = statistics.median(seconds) / size
        rows.append(
            {
                "implementation": kernels.resolve(flags.implementation),
                "device": jax.devices()[0].device_kind,
                "dtype": quantization.format_of(params) or model.dtype,
                "layers": config.num_layers,
                "batch": batch,
                "prompt": prompt,
                "new_tokens": size,
                "routing": "dense" if key is None else "hard",
                "sparsity": 1.0 - read[key],
                "time_ms": 1e3 * step_s,
                "tokens_per_s": batch / step_s,
                "dense_ms": 1e3 * dense_s,
                "ratio_to_dense": step_s / dense_s,
                "predicted_ratio": needed / dense_bytes,
                "floor_ms": 1e3 * needed / bytes_per_s,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = [
        "| batch | prompt | sparsity | ms / step | tokens / s | of dense | predicted | floor ms |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        lines.append(
            f"| {r['batch']} | {r['prompt']} | {r['sparsity']:.1%} | {r['time_ms']:.4g} "
            f"| {r['tokens_per_s']:.4g} | {r['ratio_to_dense']:.3f} | {r['predicted_ratio']:.3f} "
            f"| {r['floor_ms']:.4g} |"
        )
    return "\n".join(lines)


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, help="fewer than LLaMA2-7B's 32, to save memory")
    parser.add_argument(
        "--small", action="store_true", help="two layers of 64: to see that everything runs"
    )
    parser.add_argument("--model", help="an LTE folder, in place of random weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", choices=[*BITS], help="weights of so many bits")
    parser.add_argument("--batch", type=listed(int), default=(1,))
    parser.add_argument("--prompt", type=listed(int), default=(128,))
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--sparsity", type=listed(float), default=(0.5, 0.75, 0.9))
    parser.add_argument("--implementation", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here as well")
    flags = parser.parse_args()
    if flags.model is None:
        model, params = random_model(flags.layers, flags.dtype, flags.small)
    else:
        model, params = lte_jax.load(flags.model)
        if model.lte is None:
            raise UserError(f"{flags.model} is a dense model: expected an LTE folder")
        flags.sparsity = flags.sparsity[:1]  # its own
    if flags.quantize:
        params = lte_jax.quantize(model, params, flags.quantize)
    bytes_per_s = bandwidth(os.cpu_count() or 1)
    rows = [
        row
        for batch in flags.batch
        for prompt in flags.prompt
        for row in measure(model, params, flags, batch, prompt, bytes_per_s)
    ]
    publish("decode", rows, table(rows), bytes_per_s, flags)


if __name__ == "__main__":
    main()
