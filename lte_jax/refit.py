"""Refits the down projections to the experts that routers leave, by least squares.

What skipped experts would have added is missing. Before any training the others can make up for a
large part of it: on calibration text, with each layer's input as the dense model has it,

    min over W  sum_t |y_t - W^T h'_t|^2 + penalty |W - W0|^2

where y are the outputs of the dense FFN, W0 its down projection, and h' the activations times the
gates of the routing that is served. It is a linear system of F unknowns for each of D outputs: the
correction that layer-wise pruning makes for the weights it removes (Frantar & Alistarh 2023,
SparseGPT, section 3), with zeros that move from token to token.

Dimension key: N layers  F = E*M neurons of an FFN  E experts  M neurons per expert  D model width
               T tokens
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lte_jax import interrupt, layers, processes, router_init, sharding
from lte_jax import routing as routings
from lte_jax.config import own_threshold
from lte_jax.errors import UserError
from lte_jax.kept import NOWHERE, Kept
from lte_jax.model import Transformer
from lte_jax.reading import Slice
from lte_jax.selection import View

PENALTY = 0.01  # over the mean square of an activation that is left
_HIGHEST = jax.lax.Precision.HIGHEST
log = logging.getLogger(__name__)


def down_projections(
    model: Transformer,
    params: Any,
    batches: Sequence[Mapping[str, Array | np.ndarray]],
    kept: Kept = NOWHERE,
) -> Float[np.ndarray, "N E M D"]:
    """The refitted down projections, float32; several processes (all must call) share the layers.

    Args:
      model: with experts.
      params: its parameters, routers among them.
      batches: {"tokens", "segments"} [B, L] of typical text. They are read once for as many layers
        as fit `router_init.PASS_BYTES`; memory does not grow with them.
      kept: layers that are done already, of a run that was killed.

    Raises:
      UserError: if no token is real, or no expert runs for any of them.
    """
    down = params["layers"]["ffn"]["down"]
    like = jax.ShapeDtypeStruct(down.shape[1:], np.float32), jax.ShapeDtypeStruct((2,), np.float32)
    each = processes.spread(partial(_systems, model, params, batches), _solved, like, kept)
    missing, mended = np.sum([energy for _, energy in each], axis=0)
    share = 100 * mended / max(missing, 1e-30)
    log.info("down projections refitted: %.0f%% of the squared error mended", share)
    return np.stack([down_EMD for down_EMD, _ in each])


def _systems(
    model: Transformer, params: Any, batches: Any, start: int
) -> Iterator[tuple[Any, ...]]:
    """Of each layer from `start` on its number, W0, and what `_sums` says of it."""
    num_layers, down = model.config.num_layers, params["layers"]["ffn"]["down"]
    for part in router_init.passes(num_layers, 4 * model.config.d_ff**2, start):
        sums = None
        for batch in batches:
            interrupt.check("while refitting the down projections")
            new = _sums(model, params, batch, part)
            sums = new if sums is None else router_init.added(sums, new)
        for layer in range(max(start, part.start), part.stop):
            place = layer - part.start
            of_layer = (np.asarray(sharding.gathered(sum_N, place)) for sum_N in sums)
            yield layer, np.asarray(sharding.gathered(down, layer)), *of_layer


@partial(jax.jit, static_argnames=("model", "part"))
def _sums(model, params, batch, part: range) -> tuple[Array, Array, Array]:
    """Sums over real tokens, of some layers, of products of h' and what is missing of y.

    Of h' with itself [N, F, F], of h' with what is missing [N, F, D], of that with itself [N].
    """
    config, lte = model.config, model.lte
    routing = routings.make(routings.kind(lte.routing).served, config, lte)
    parts = router_init.ffn_parts(model, params, batch, part)
    real_T1 = (batch["segments"] > 0).reshape(-1, 1).astype(jnp.float32)
    weights = jax.tree.map(lambda w_N: w_N[part.start : part.stop], params["layers"]["ffn"])
    threshold_N = jnp.broadcast_to(jnp.asarray(own_threshold(lte), jnp.float32), config.num_layers)

    def of_layer(w, threshold, x_TD, gate_TEM, h_TEM):
        x_1TD, gate_1TEM, h_1TEM = (a[None] for a in (x_TD, gate_TEM, h_TEM))
        reads = Slice(w, jnp.float32)
        logits = partial(layers.router, config, lte, reads, routing.router_input(x_1TD))
        choice = routing.choose(View(x_1TD, logits, w, h_1TEM, gate_1TEM), threshold)
        gates_TE = choice.gates[0].astype(jnp.float32) * real_T1
        left_TF = (h_TEM * gates_TE[..., None]).reshape(len(real_T1), -1)
        missing_TF = (h_TEM * (real_T1 - gates_TE)[..., None]).reshape(len(real_T1), -1)
        down_FD = w["down"].astype(jnp.float32).reshape(left_TF.shape[1], -1)
        missing_TD = jnp.matmul(missing_TF, down_FD, precision=_HIGHEST)
        gram_FF = jnp.matmul(left_TF.T, left_TF, precision=_HIGHEST)
        cross_FD = jnp.matmul(left_TF.T, missing_TD, precision=_HIGHEST)
        return gram_FF, cross_FD, jnp.sum(missing_TD**2)

    return jax.vmap(of_layer)(weights, threshold_N[part.start : part.stop], *parts)


def _solved(system: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The down projection [E, M, D] of a layer, and the squared error before, and mended by it."""
    layer, down_EMD, gram_FF, cross_FD, missing = system
    gram_FF, cross_FD = gram_FF.astype(np.float64), cross_FD.astype(np.float64)
    level = np.trace(gram_FF) / len(gram_FF)
    if not (np.isfinite(level) and level > 0):
        raise UserError(
            f"lte.refit: no expert of layer {layer} runs for any calibration token, or activations "
            "are not finite: expected routers that keep some, and real text; set lte.refit=False"
        )
    import scipy.linalg  # slower to import than all of lte_jax

    system_FF = gram_FF + PENALTY * level * np.eye(len(gram_FF))
    change_FD = scipy.linalg.solve(system_FF, cross_FD, assume_a="pos")
    mended = 2 * np.vdot(change_FD, cross_FD) - np.vdot(change_FD, gram_FF @ change_FD)
    made_EMD = down_EMD.astype(np.float64) + change_FD.reshape(down_EMD.shape)
    return made_EMD.astype(np.float32), np.array([missing, mended], np.float32)
