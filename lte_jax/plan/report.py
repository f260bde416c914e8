"""What the report at the end takes of the one device that it runs on, see `pipeline`.

The models, by default both, lie there whole, in compute.dtype, and one of them reads a batch:

    bytes = models + routed + the larger of (layer, head)
    routed  of all layers: the scores of routers, their places in the histogram, which are active
    layer   its input and output, and either the neurons of the FFN or the scores of attention and
            their softmax, of one block of queries; TPUs hold the softmax of all blocks
    head    what it reads, and the logits of a chunk in float32, see objective.py

tests/test_plan.py holds the bytes to those that XLA reports of the compiled program. What decoding
a sample takes, a record at a time, is less.

Dimension key: B batch  L length
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from lte_jax.config import Experiment, ModelConfig, num_experts
from lte_jax.model import Transformer, abstract_params, forward
from lte_jax.objective import chunk_length
from lte_jax.plan import needs, step


def of_report(
    experiment: Experiment, config: ModelConfig, sparse: bool, tpu: bool = False
) -> dict[str, int]:
    """What it is for -> bytes on the device.

    Args:
      experiment: to run.
      config: of the dense model.
      sparse: whether an LTE model is measured.
      tpu: whether the device is one.
    """
    of = {"dense model": None} if experiment.report_dense or not sparse else {}
    of |= {"LTE model": experiment.lte} if sparse else {}
    models = {n: Transformer(config, lte, dtype=experiment.compute.dtype) for n, lte in of.items()}
    held = {name: weights(model) for name, model in models.items()}
    last = list(models.values())[-1]
    return held | activations(last, experiment.data.batch_size, experiment.data.length, tpu)


def weights(model: Transformer) -> int:
    """Bytes of a model in the type that it computes in."""
    return jnp.dtype(model.dtype).itemsize * needs.number(abstract_params(model))


def activations(model: Transformer, rows: int, length: int, tpu: bool = False) -> dict[str, int]:
    """What comes and goes as a model reads so many records and tokens of each."""
    config, width, tokens = model.config, jnp.dtype(model.dtype).itemsize, rows * length
    x = tokens * config.d_model * width
    neurons = (3 if config.gated else 2) * tokens * config.d_ff * width
    blocks = _scores(model, rows, length)
    scores = max(2 * max(blocks, default=0), sum(blocks) if tpu else 0)
    layer = 2 * x + max(neurons, scores)
    chunk = rows * chunk_length(model, rows, length)
    head = x + (4 * chunk * config.vocab_size if config.head == "lm" else 0)
    routed = 0
    if model.lte is not None:
        routed = (4 + 4 + 1) * tokens * config.num_layers * num_experts(config, model.lte)
    return {"activations": routed + layer, "logits": max(layer, head) - layer}


def _scores(model: Transformer, rows: int, length: int) -> list[int]:
    """Bytes of the scores of attention in the layers of one loop, of each block of queries."""
    cells_BL = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = {"tokens": cells_BL, "segments": cells_BL}
    dense = model.clone(lte=None)
    traced = jax.make_jaxpr(lambda *args: forward(dense, *args).hidden)
    jaxpr = traced(abstract_params(dense), batch).jaxpr
    loops = (e for e, _ in step.equations(jaxpr, jaxpr.outvars) if e.primitive.name == "scan")
    found = (step.products(loop.params["jaxpr"].jaxpr, model.config.head_dim) for loop in loops)
    return max((list(sizes) for sizes in found), key=sum, default=[])
