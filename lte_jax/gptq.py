"""Rounds weights one input at a time, and lets those that are left make up for the error: GPTQ.

What a matrix puts out on text matters, and not its weights alone. With the products H of its
inputs, summed over calibration tokens, the output's squared error after rounding one input's
weights is least if the others move by what Frantar et al. 2023 ("GPTQ", equations 2 and 3,
Algorithm 1) derive. Inputs of more energy come first, and the scales of groups are those of the
weights before ("act order" with "static groups" in their code), so that groups stay as they are.

Experts: the inputs of down are all neurons together, zero where the served routing skips them, so
that experts make up for each other's errors as well.

Dimension key: N layers  E experts  M neurons per expert  D model width  T tokens
               K inputs of a matrix  O outputs  G = K/32 groups
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from lte_jax import interrupt, quantization, router_init, sharding
from lte_jax import routing as routings
from lte_jax.errors import UserError, nearest
from lte_jax.kernels import quantized
from lte_jax.kernels.quantized import BITS, GROUP, Quantized
from lte_jax.model import INPUTS, Transformer, forward
from lte_jax.params import LAYERS, dimension_sizes, table

DAMPING = 0.01  # added to the diagonal of H, over its mean
_READS = {  # which inputs a matrix of layers reads
    **{f"{LAYERS}attn/{name}/kernel": "qkv" for name in "qkv"},
    f"{LAYERS}attn/o/kernel": "o",
    **{f"{LAYERS}ffn/{name}": "ffn" for name in ("gate", "up")},
    f"{LAYERS}ffn/down": "down",
}
_HIGHEST = jax.lax.Precision.HIGHEST


def quantize(
    model: Transformer,
    params: Mapping[str, Any],
    format: str,
    batches: Sequence[Mapping[str, Array | np.ndarray]],
) -> dict[str, Any]:
    """As `quantization.quantize`, with errors made up for; embedding and head are rounded as there.

    Args:
      model: dense or LTE.
      params: its parameters.
      format: one of BITS.
      batches: {"tokens", "segments"} [B, L] of typical text. They are read once for as many layers
        as fit `router_init.PASS_BYTES`.

    Raises:
      UserError: as there; if no token is real, or activations are not finite.
    """
    from tqdm import tqdm

    config, lte = model.config, model.lte
    if format not in BITS:
        raise UserError(f"quantize: format={format!r}: {nearest(format, BITS)}")
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    dimensions, layered = dimension_sizes(config, lte), []
    for row in table(config, lte):
        if quantization.is_coarse(row):
            flat[row.path] = quantization.coarse(flat[row.path])
        if not (kind := quantization.format_in(row, format)):
            continue
        where = quantization.cut(row, dimensions)
        quantization.matrices(row, flat[row.path], where, kind)  # or it says what does not fit
        if row.layered:
            layered.append((row.path, where, []))
        else:
            found = quantization.nearest_codes(row, flat[row.path], where, kind, model.dtype)
            flat[row.path] = found
    total = len(layered) * config.num_layers
    with tqdm(total=total, desc="rounding", unit=" matrices", disable=None, leave=False) as bar:
        for layer, grams in _grams(model, params, batches):
            for path, where, made in layered:
                interrupt.check("while rounding")
                w = np.asarray(sharding.gathered(flat[path], layer), np.float32)
                gram_KK = grams[_READS[path]]
                made.append(_of_layer(w, where, gram_KK, format, f"{path}, layer {layer}"))
                bar.update()
    for path, where, made in layered:
        codes, scales = (jnp.stack(arrays) for arrays in zip(*made, strict=True))
        dtype = jnp.dtype(model.dtype)
        flat[path] = Quantized(codes, scales, format, where.sizes, where.inputs_first, dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def _of_layer(
    w: np.ndarray, where: quantization.Cut, gram_KK: np.ndarray, format: str, name: str
) -> tuple[Array, Array]:
    """Codes and scales of one layer's matrix, or of those of its experts, as `Quantized` has them.

    Experts whose inputs are neurons are one matrix of all neurons; others share their inputs.
    """
    experts = where.lead[1:]
    if where.inputs_first:
        w_OK = w.reshape(-1, where.outputs).T
    else:
        w_OK = w.reshape(-1, where.inputs)
    codes_OK, scales_OG = compensated(w_OK, gram_KK, format, name)
    cut = [  # into experts: [*experts, O, ...]
        np.moveaxis(x.reshape(where.outputs, *experts, -1), 0, -2)
        if where.inputs_first
        else x.reshape(*experts, where.outputs, -1)
        for x in (codes_OK, scales_OG)
    ]
    return quantized.packed(*map(jnp.asarray, cut), format)


def compensated(
    w_OK: Float[np.ndarray, "O K"], gram_KK: Float[np.ndarray, "K K"], format: str, name: str = "w"
) -> tuple[Float[np.ndarray, "O K"], Float[np.ndarray, "O G"]]:
    """The code of each weight of a matrix, and the scale of each group of 32 of its inputs.

    Args:
      w_OK: the matrix.
      gram_KK: sums over tokens of products of its inputs.
      format: one of BITS.
      name: of the matrix, for errors.

    Raises:
      UserError: if the sums are not finite, or all of them are zero.
    """
    import scipy.linalg  # slower to import than all of lte_jax

    gram_KK = np.asarray(gram_KK, np.float64)
    level = np.trace(gram_KK) / len(gram_KK)
    if not (np.isfinite(gram_KK).all() and level > 0):
        raise UserError(
            f"{name}: its inputs are not finite on the calibration tokens, or all zero: expected "
            "real tokens, and the weights of a working model"
        )
    scales_OG = np.asarray(quantized.scales_of(jnp.asarray(w_OK, jnp.float32), format))
    order_K = np.argsort(-np.diag(gram_KK), kind="stable")
    damped_KK = gram_KK[np.ix_(order_K, order_K)] + DAMPING * level * np.eye(len(gram_KK))
    lower_KK = scipy.linalg.cholesky(damped_KK, lower=True)
    inverse_KK = scipy.linalg.cho_solve((lower_KK, True), np.eye(len(gram_KK)))
    upper_KK = scipy.linalg.cholesky(inverse_KK, lower=False).astype(np.float32)
    scale_OK = np.repeat(scales_OG, GROUP, axis=1)[:, order_K]
    found_OK = _in_turn(w_OK[:, order_K], scale_OK, upper_KK, bits=BITS[format])
    codes_OK = np.empty(w_OK.shape, np.float32)
    codes_OK[:, order_K] = found_OK
    return codes_OK, scales_OG


@partial(jax.jit, static_argnames="bits")
def _in_turn(w_OK: Array, scale_OK: Array, upper_KK: Array, *, bits: int) -> Array:
    """Codes: input by input, the error of each taken over by those after it, 32 at a time."""
    outputs, inputs = w_OK.shape
    zero = 2 ** (bits - 1)

    def block(number: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        w_OK, codes_OK = carry
        start = number * GROUP
        cut = lambda x, rows: jax.lax.dynamic_slice(x, *rows)  # noqa: E731
        here = ((0, start), (outputs, GROUP))
        scale_OB, upper_BB = cut(scale_OK, here), cut(upper_KK, ((start, start), (GROUP, GROUP)))

        def one(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            w_OB, codes_OB, errors_OB = carry
            code_O = quantized.round_to(w_OB[:, i], scale_OB[:, i], bits)
            error_O = (w_OB[:, i] - scale_OB[:, i] * (code_O - zero)) / upper_BB[i, i]
            w_OB -= error_O[:, None] * upper_BB[i][None]
            return w_OB, codes_OB.at[:, i].set(code_O), errors_OB.at[:, i].set(error_O)

        empty_OB = jnp.zeros((outputs, GROUP), jnp.float32)
        begin = (cut(w_OK, here), empty_OB, empty_OB)
        _, codes_OB, errors_OB = jax.lax.fori_loop(0, GROUP, one, begin)
        later_1K = (jnp.arange(inputs) >= start + GROUP)[None]
        upper_BK = jnp.where(later_1K, cut(upper_KK, ((start, 0), (GROUP, inputs))), 0.0)
        w_OK -= jnp.matmul(errors_OB, upper_BK, precision=_HIGHEST)
        return w_OK, jax.lax.dynamic_update_slice(codes_OK, codes_OB, here[0])

    return jax.lax.fori_loop(0, inputs // GROUP, block, (w_OK, jnp.zeros_like(w_OK)))[1]


def _grams(model: Transformer, params: Any, batches: Any):
    """Of each layer its number, and the sums of products of what its matrices read."""
    config = model.config
    widest = max(config.d_ff, config.d_model, config.num_heads * config.head_dim)
    for part in router_init.passes(config.num_layers, 16 * widest**2):
        sums = None
        for batch in batches:
            interrupt.check("while rounding")
            new = _sums(model, params, batch, part)
            sums = new if sums is None else router_init.added(sums, new)
        for place, layer in enumerate(part):
            yield layer, {k: np.asarray(sharding.gathered(x, place)) for k, x in sums.items()}


@partial(jax.jit, static_argnames=("model", "part"))
def _sums(model: Transformer, params: Any, batch: Any, part: range) -> dict[str, Array]:
    """Of some layers, sums over real tokens of products of inputs, [N, K, K]."""
    routing = None
    if model.lte is not None:
        routing = routings.make(routings.kind(model.lte.routing).served, model.config, model.lte)
    how = {"routing": routing, "mutable": ("intermediates", INPUTS)}
    _, sown = forward(model, params, batch, **how)
    layers, ffn = sown[INPUTS]["layers"], sown["intermediates"]["layers"]["ffn"]
    reads = {
        "qkv": layers["qkv_reads"],
        "o": layers["o_reads"],
        "ffn": ffn["ffn_input"],
        "down": layers["ffn"]["down_reads"],
    }
    real_1T1 = (batch["segments"] > 0).reshape(1, -1, 1)

    def products(x_NBLK: Array) -> Array:
        x_NBLK = x_NBLK[part.start : part.stop].astype(jnp.float32)
        x_NTK = jnp.where(real_1T1, x_NBLK.reshape(len(part), real_1T1.size, -1), 0.0)
        return jnp.einsum("NTK,NTJ->NKJ", x_NTK, x_NTK, precision=_HIGHEST)

    return {name: products(x) for name, [x] in reads.items()}
