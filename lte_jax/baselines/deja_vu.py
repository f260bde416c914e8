"""Deja Vu: a low-rank predictor of which neurons are large, fitted to the unchanged model.

Liu et al. 2023 (arXiv 2310.17157) and its code (FMInference/DejaVu, sparse_predictor): two matrices
without biases or a function between them; binary cross-entropy in which a negative weighs as much
as positives are frequent, plus 0.005; AdamW, weight decay 0.01, batches of 1,024 tokens, a
twentieth held out, five epochs of patience. The model there has ReLU, and a label is h > 0. For
other activations the LTE paper prunes by magnitude: a label says that |h| is among the
(1 - target_sparsity) F largest of the token. Epochs and rate are ours: the original has 400,000
tokens, 20 epochs and 1e-4; on some 10,000 tokens that stays near its random start.

Dimension key: T tokens  D model width  R rank  F neurons, each an expert
"""

from __future__ import annotations

import jax.numpy as jnp

from lte_jax.baselines.method import Layer, Method
from lte_jax.config import LTEConfig
from lte_jax.selection import largest

_BATCH, _EPOCHS, _RATE, _PATIENCE = 1024, 200, 1e-3, 5
_RANK = 128  # the original has 1,000 at widths of 9,216 and 12,288; the LTE paper's is not stated


def labels(lte: LTEConfig, h_TF):
    """1 at the neurons of largest |h| of each token, else 0."""
    kept = 1.0 - lte.wanted_sparsity("lte.router_init='deja_vu'")
    return largest(jnp.abs(h_TF), max(1, round(kept * h_TF.shape[1]))).astype(jnp.float32)


def loss(logits_TF, label_TF):
    """Weighted binary cross-entropy."""
    from lte_jax.baselines import predictor

    weight = jnp.mean(label_TF) + 0.005
    each_TF = predictor.cross_entropy(logits_TF, label_TF)
    return jnp.mean((label_TF * (1 - weight) + weight) * each_TF)


def start(lte: LTEConfig, layer: Layer, key) -> dict:
    """The predictor of one layer."""
    from lte_jax.baselines import predictor  # imports Optax, which only training needs

    h_TF = layer.h_TEM.reshape(len(layer.h_TEM), -1)
    sizes = layer.x_TD.shape[1], lte.router_rank or h_TF.shape[1], h_TF.shape[1]
    begin = predictor.Weights.random(key, sizes, bias=False)
    how = predictor.Training(_EPOCHS, _BATCH, predictor.adam(_RATE, 0.01), 0.05, _PATIENCE)
    target_TF = labels(lte, h_TF)
    return predictor.fit(begin, layer.x_TD, target_TF, loss, lambda x: x, how, key).as_router()


METHODS = (
    Method(
        "deja_vu",
        "Deja Vu",
        "Liu et al. 2023",
        {
            "lte.expert_size": 1,
            "lte.router": "two_layer",
            "lte.router_activation": "none",
            "lte.router_rank": _RANK,
            "lte.router_bias": False,
            "lte.router_init": "deja_vu",
            "lte.routing": "top_k",
        },
        starts={"deja_vu": start},
    ),
)
