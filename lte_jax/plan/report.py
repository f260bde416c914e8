"""What the report at the end takes of the one device that it runs on, see `pipeline`.

Both models lie there whole, in compute.dtype, and one of them reads a batch:

    bytes = models + routed + the larger of (layer, head)
    routed  of all layers: the scores of routers, their places in the histogram, which are active
    layer   its input and output, and either the neurons of the FFN or the scores of attention and
            their softmax, of one block of queries
    head    what it reads, and all logits in float32

tests/test_plan.py holds the bytes to those that XLA reports of the compiled program. What decoding
a sample takes, a record at a time, is less.

Dimension key: B batch  L length
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lte_jax.config import Experiment, ModelConfig, num_experts
from lte_jax.model import Transformer, abstract_params, forward
from lte_jax.plan import needs, step


def of_report(experiment: Experiment, config: ModelConfig, sparse: bool) -> dict[str, int]:
    """What it is for -> bytes on the device.

    Args:
      experiment: to run.
      config: of the dense model.
      sparse: whether an LTE model is measured beside the dense one.
    """
    of = {"dense model": None} | ({"LTE model": experiment.lte} if sparse else {})
    models = {n: Transformer(config, lte, dtype=experiment.compute.dtype) for n, lte in of.items()}
    held = {name: weights(model) for name, model in models.items()}
    last = list(models.values())[-1]
    return held | activations(last, experiment.data.batch_size, experiment.data.length)


def weights(model: Transformer) -> int:
    """Bytes of a model in the type that it computes in."""
    return jnp.dtype(model.dtype).itemsize * needs.number(abstract_params(model))


def activations(model: Transformer, rows: int, length: int) -> dict[str, int]:
    """What comes and goes as a model reads so many records and tokens of each."""
    config, width, tokens = model.config, jnp.dtype(model.dtype).itemsize, rows * length
    x = tokens * config.d_model * width
    neurons = (3 if config.gated else 2) * tokens * config.d_ff * width
    layer = 2 * x + max(neurons, 2 * _scores(model, rows, length))
    head = x + (4 * tokens * config.vocab_size if config.head == "lm" else 0)
    routed = 0
    if model.lte is not None:
        routed = (4 + 4 + 1) * tokens * config.num_layers * num_experts(config, model.lte)
    return {"activations": routed + layer, "logits": max(layer, head) - layer}


def _scores(model: Transformer, rows: int, length: int) -> int:
    """Bytes of the scores of attention that exist at a time."""
    cells_BL = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {"tokens": cells_BL, "segments": cells_BL}
    dense = model.clone(lte=None)
    traced = jax.make_jaxpr(lambda *args: forward(dense, *args).hidden)
    jaxpr = traced(abstract_params(dense), batch).jaxpr
    loops = (e for e, _ in step.equations(jaxpr, jaxpr.outvars) if e.primitive.name == "scan")
    found = (step.products(loop.params["jaxpr"].jaxpr, model.config.head_dim) for loop in loops)
    return max((size for sizes in found for size in sizes), default=0)
