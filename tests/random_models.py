"""Small random models that write more than one token over and over, and prompts for them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.model import Transformer, abstract_params

LLAMA = ModelConfig(vocab_size=61, d_ff=96, max_length=128, num_kv_heads=2)
VARIANTS = {
    "llama": LLAMA,
    "sliding": dataclasses.replace(
        LLAMA, sliding_window=4, sliding_layers=(True, False), qk_norm=True, tie_embeddings=True
    ),
    "biases": dataclasses.replace(
        LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, gated=False, activation="gelu"
    ),
}
PROMPTS = [[1, 7, 9, 30, 2, 2, 5], [4], [60, 3, 3, 18, 44, 12, 9, 9, 9, 23, 50]]


@functools.cache
def make(variant="llama", dtype="float32", **changes):
    """A random model whose routers keep about half of the experts and whose text is not a loop."""
    config = dataclasses.replace(VARIANTS[variant], **changes)
    model = Transformer(config, LTEConfig(expert_size=8), dtype=dtype)
    rng = np.random.default_rng(0)
    # A tied model needs lively blocks to say anything but its last token; others, a lively input.
    embed, block = (0.2, 4.0) if config.tie_embeddings else (3.0, 1.0)

    def draw(path, leaf):
        keys = {key.key for key in path}
        if "scale" in keys:
            return jnp.ones(leaf.shape, leaf.dtype)
        fan_in = leaf.shape[-1] if keys & {"gate", "up", "down"} else math.prod(leaf.shape[1:-1])
        scale = 0.3 if path[-1].key.endswith("bias") else fan_in**-0.5
        scale *= block if keys & {"o", "down"} else 1.0
        scale = embed if "embed" in keys else scale
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

    return model, jax.tree.map_with_path(draw, abstract_params(model))
