"""Learns the scales of rounded weights, so that the model computes what it did before rounding.

Codes stay as they are. What is trained is one number for 32 weights, the step between their codes,
by gradient descent through the whole model: that makes up for what rounding one matrix at a time
(gptq.py) leaves. Chen et al. 2024 ("EfficientQAT", arXiv 2407.11062) train steps in the second of
their two phases, on the loss of the next token. Here what the head reads is to be that of the model
in floats, which serves every kind of head and needs no labels.

Dimension key: B batch  L length  D model width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jaxtyping import Array

from lte_jax import interrupt, losses
from lte_jax import routing as routings
from lte_jax.errors import UserError
from lte_jax.kernels.quantized import Quantized
from lte_jax.model import Transformer, forward
from lte_jax.params import LAYERS

# babyllama in int4 loses 0.7% with 200 steps at this rate, 0.6% at twice, 2.3% at ten times it.
RATE = 5e-3  # of Adam, on scales over those they began as; falls to 0 as a cosine
ROWS = 8  # records of a step


def learn(
    model: Transformer,
    params: Mapping[str, Any],
    rounded: Mapping[str, Any],
    batches: Sequence[Mapping[str, Array | np.ndarray]],
    steps: int,
) -> dict[str, Any]:
    """The rounded parameters with other scales, those of embedding and head as they are.

    The experts of a sparse model are those that it would run, rounded, by its own routing.

    Args:
      model: dense or LTE; it computes in its own dtype.
      params: its parameters, in floats.
      rounded: the same, rounded.
      batches: {"tokens", "segments"} [1, L] of typical text. Each step has ROWS of them, drawn.
      steps: how many.

    Raises:
      UserError: if the distance between the two models is not finite.
    """
    from tqdm import tqdm

    flat = traverse_util.flatten_dict(dict(rounded), sep="/")
    start = {
        path: jnp.asarray(array.scales, jnp.float32)
        for path, array in flat.items()
        if isinstance(array, Quantized) and path.startswith(LAYERS)
    }
    rate = optax.cosine_decay_schedule(RATE, steps)
    adam = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rate))
    change = jax.tree.map(jnp.zeros_like, start)
    moments, step = adam.init(change), _step(model, adam)
    rng = np.random.default_rng(0)
    with tqdm(total=steps, desc="scales", unit=" steps", disable=None, leave=False) as bar:
        for number in range(steps):
            interrupt.check("while learning scales")
            drawn = [batches[i] for i in rng.permutation(len(batches))[:ROWS]]
            batch = {name: np.concatenate([b[name] for b in drawn]) for name in drawn[0]}
            change, moments, distance = step(change, moments, start, params, rounded, batch)
            if not np.isfinite(distance):
                raise UserError(
                    f"scales: after {number} steps the rounded model's distance to its floats is "
                    f"{distance}: expected a finite one; round without learning scales"
                )
            bar.set_postfix_str(f"distance {distance:.3g}", refresh=False)
            bar.update()
    return _with(
        rounded, jax.tree.map(lambda d, s: (s * (1 + d)).astype(jnp.bfloat16), change, start)
    )


def _step(model: Transformer, adam: optax.GradientTransformation) -> Any:
    """(change, moments, start, params, rounded, batch) -> new change and moments, and distance."""
    routing = None
    if model.lte is not None:
        routing = routings.make(routings.kind(model.lte.routing).served, model.config, model.lte)
    lean = model.clone(remat=True)

    def distance(change: Any, start: Any, params: Any, rounded: Any, batch: Any) -> Array:
        scales = jax.tree.map(lambda d, s: s * (1 + d), change, start)
        found, wanted = (
            forward(lean, weights, batch, routing=routing).hidden[None]
            for weights in (_with(rounded, scales), params)
        )
        real_BL = batch["segments"] > 0
        return losses.hidden_distillation(found, wanted, real_BL, losses.count_true(real_BL))

    @jax.jit
    def step(change: Any, moments: Any, *rest: Any) -> tuple[Any, Any, Array]:
        value, gradient = jax.value_and_grad(distance)(change, *rest)
        updates, moments = adam.update(gradient, moments)
        return optax.apply_updates(change, updates), moments, value

    return step


def _with(rounded: Mapping[str, Any], scales: Mapping[str, Array]) -> dict[str, Any]:
    """The rounded parameters with the scales of these paths."""
    flat = traverse_util.flatten_dict(dict(rounded), sep="/")
    for path, array in scales.items():
        flat[path] = dataclasses.replace(flat[path], scales=array)
    return traverse_util.unflatten_dict(flat, sep="/")
