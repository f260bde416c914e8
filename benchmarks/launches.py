"""Compiles decoding for an H200 that is not at hand, and counts what each layer launches.

    PYTHONPATH=PLUGIN python benchmarks/launches.py
    PYTHONPATH=PLUGIN python benchmarks/launches.py --batch 8 --length 8192

PLUGIN is a folder with the compiler of that device and with jax-triton:

    pip install --no-deps --target PLUGIN jax-cuda12-plugin==JAX jax-cuda12-pjrt==JAX
    pip install --no-deps --target PLUGIN jax-triton triton       # as the extra gpu pins them

JAX is the version that jax has. The model has the shapes of --config and random routers; nothing is
allocated and nothing runs. For each batch and length of the cache: kernels that a layer of one step
launches, those of Triton and those of XLA (fusions, copies), calls that XLA leaves out of CUDA
graphs, bytes of operands (weights and cache) and of what comes and goes, seconds to compile.
"""

from __future__ import annotations

import argparse
import collections
import re
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.lib import gpu_triton
from lte_jax.kernels.quantized import BITS

import lte_jax
from lte_jax import config
from lte_jax.errors import UserError, cli_errors
from lte_jax.generation.decoding import Decoder, DecodeState
from lte_jax.kernels import unroll
from lte_jax.model import Transformer, abstract_params, init_cache
from lte_jax.params import is_router
from lte_jax.plan.needs import written

AHEAD = runpy.run_path(str(Path(__file__).with_name("ahead.py")))
FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast"}  # launch nothing
TYPED = "triton_kernel_call_ffi"


def compiled(model: Transformer, batch: int, length: int, form: str | None, device: Any) -> Any:
    """The program that decodes up to 32 tokens of each row, with weights of a format."""
    here = jax.sharding.SingleDeviceSharding(device)

    def put(x: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=here)

    def weight(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        name = "/".join(key.key for key in path)
        return put(x, jnp.float32 if is_router(name) else jnp.bfloat16)

    def start() -> DecodeState:
        return DecodeState.start(init_cache(model, batch, length), jax.random.key(0))

    def extend(params: Any, state: DecodeState, limit: jax.Array) -> Any:
        return Decoder.of(model, params, implementation="triton")._extended(state, limit, 32)  # noqa: SLF001

    params = jax.tree.map_with_path(weight, abstract_params(model))
    if form is not None:
        rounded = jax.eval_shape(lambda p: lte_jax.quantize(model, p, form), params)
        params = jax.tree.map(put, rounded)
    operands = params, jax.tree.map(put, jax.eval_shape(start)), put(jnp.int32(0))
    return jax.jit(extend, donate_argnums=1).lower(*operands).compile()


def of_a_layer(text: str, layers: int) -> collections.Counter:
    """Kind -> launches in the loop over layers, for one of the `layers` that a turn has."""
    loops = re.findall(r"while\([^\n]*?body=(%[\w.-]+)", text)
    bodies = dict(re.findall(r"\n(%[\w.-]+) \([^\n]*\{\n(.*?)\n\}", text, re.DOTALL))
    [body] = [bodies[name] for name in loops if not re.search(r"= .*? while\(", bodies[name])]
    kinds: collections.Counter = collections.Counter()
    for line in body.splitlines():
        kind = re.search(r"= (?:\(.*?\)|\S+) ([a-z][\w-]*)\(", line)
        if kind and kind[1] not in FREE:
            target = re.search(r'custom_call_target="([^"]+)"', line)
            kinds[target[1] if target else kind[1]] += 1
    return collections.Counter({kind: count / layers for kind, count in kinds.items()})


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="configs/llama7b.py", help="of an experiment with a source.scratch")
    add("--batch", type=int, nargs="+", default=[1, 8], help="rows")
    add("--length", type=int, nargs="+", default=[2048, 8192], help="of the cache")
    add("--quantize", choices=[*BITS], help="weights of so many bits")
    flags = parser.parse_args()
    if not hasattr(gpu_triton, "TritonKernel"):
        raise UserError("no jax-cuda12-plugin: expected it in a folder of PYTHONPATH, see --help")
    gpu_triton.get_compute_capability = lambda device: 90  # jax-triton 0.3 asks a device
    experiment = config.load_config(flags.config, ["source.path="])
    model = Transformer(experiment.source.scratch, experiment.lte, dtype="bfloat16")
    device = AHEAD["topology"]("h200:1")[0]
    print("| rows | cache | launches a layer | Triton | untyped | operands | comes and goes | s |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|")
    for batch in flags.batch:
        for length in flags.length:
            begin = time.monotonic()
            made = compiled(model, batch, length, flags.quantize, device)
            took, memory = time.monotonic() - begin, made.memory_analysis()
            kinds = of_a_layer(made.as_text(), unroll("triton"))
            triton = sum(n for kind, n in kinds.items() if kind.startswith("triton"))
            untyped = triton - kinds[TYPED]
            cells = [batch, f"{length:,}", f"{kinds.total():.1f}", f"{triton:g}", f"{untyped:g}"]
            cells += [written(memory.argument_size_in_bytes), written(memory.temp_size_in_bytes)]
            print("|", *(f"{cell} |" for cell in cells), f"{took:.0f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
