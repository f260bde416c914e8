"""Initialises routers: by ridge regression on an oracle's choice of experts, or at random.

Dimension key: B batch  L length  T tokens  R rows  D model width  K = D + 1 unknowns of a logit
               E experts  M neurons per expert  N layers  S bins of a histogram
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lte_jax import interrupt, processes, sharding
from lte_jax.baselines import Layer
from lte_jax.config import LTEConfig, ModelConfig, num_experts
from lte_jax.errors import UserError
from lte_jax.model import Transformer, forward
from lte_jax.selection import contribution, largest

log = logging.getLogger(__name__)

TOKENS_PER_UNKNOWN = 32  # babyllama at 75%, untrained: perplexity 21.2 of 2, 14.6 of 8, 13.0 of 64
LEAST_ROWS = 32
ROWS_AT_A_TIME = 256  # that are read to count their tokens
PASS_BYTES = 4 * 2**30  # of arrays of layers held in a pass over the calibration data
MATRICES = ("gate", "up", "down")  # of layers/ffn: [N, E, M, D]
BINS = 1024  # of a histogram of logits, over REACH standard deviations on either side of the mean
REACH = 8.0
_HIGHEST = jax.lax.Precision.HIGHEST  # by default accelerators round operands of float32 products


def random_router(key: Array, config: ModelConfig, lte: LTEConfig):
    """Random routers: kernel [N, D, E] and bias [N, E].

    "normal": zero-mean logits of standard deviation `router_init_std` on inputs of unit RMS.
    "open": the same at a tenth of the size, with a bias that activates all experts.

    Raises:
      UserError: for "open" without a bias.
    """
    if lte.router_init == "open" and not lte.router_bias:
        raise UserError("lte.router_init='open' needs lte.router_bias=True: a bias opens the gates")
    size, level = (0.1, lte.router_init_std) if lte.router_init == "open" else (1.0, 0.0)
    n, d, e = config.num_layers, config.d_model, num_experts(config, lte)
    std = lte.router_init_std * size
    if lte.router == "linear":
        router = {"kernel": std / d**0.5 * jax.random.normal(key, (n, d, e), jnp.float32)}
        return router | ({"bias": jnp.full((n, e), level, jnp.float32)} if lte.router_bias else {})
    keys, rank = jax.random.split(key), lte.router_rank or e
    inner = {"kernel": jax.random.normal(keys[0], (n, d, rank), jnp.float32) / d**0.5}
    outer = {"kernel": std / rank**0.5 * jax.random.normal(keys[1], (n, rank, e), jnp.float32)}
    if lte.router_bias:
        inner["bias"] = jnp.zeros((n, rank), jnp.float32)
        outer["bias"] = jnp.full((n, e), level, jnp.float32)
    return {"inner": inner, "outer": outer}


def factored(router: Mapping[str, Array], rank: int) -> dict[str, Any]:
    """A linear router as one of two layers without a function between: its best of that rank."""
    u_NDR, s_NR, v_NRE = jnp.linalg.svd(router["kernel"], full_matrices=False)
    root_N1R = jnp.sqrt(s_NR[:, None, :rank])
    inner = {"kernel": u_NDR[..., :rank] * root_N1R}
    outer = {"kernel": jnp.swapaxes(root_N1R, 1, 2) * v_NRE[:, :rank]}
    if "bias" in router:
        inner["bias"] = jnp.zeros_like(s_NR[:, :rank])
        outer["bias"] = router["bias"]
    return {"inner": inner, "outer": outer}


def enough_records(
    segments_RL: Any, d_model: int, asked: int | None, rng: np.random.Generator
) -> Int[np.ndarray, " C"]:
    """A random choice of `asked` rows to calibrate on, ascending; all rows if there are fewer.

    None: enough for TOKENS_PER_UNKNOWN real tokens per unknown of a logit, at least LEAST_ROWS.

    Args:
      segments_RL: an array, or what reads its rows by index; no more are read than it takes.
      d_model: D.
      asked: see above.
      rng: of the choice.
    """
    order_R, tokens = rng.permutation(len(segments_RL)), 0
    wanted = TOKENS_PER_UNKNOWN * (d_model + 1)
    for start in range(0, len(order_R) if asked is None else 0, ROWS_AT_A_TIME):
        some_CL = segments_RL[order_R[start : start + ROWS_AT_A_TIME]]
        tokens_C = tokens + np.cumsum(np.count_nonzero(some_CL, axis=1))
        tokens = int(tokens_C[-1])
        if tokens >= wanted:
            enough = start + 1 + int(np.searchsorted(tokens_C, wanted))
            return np.sort(order_R[: max(LEAST_ROWS, enough)])
    if asked is None:
        log.warning(
            "calibration: uses all %d tokens of the training text, fewer than the %d wanted",
            *(tokens, wanted),
        )
    return np.sort(order_R[:asked])


def ridge_router(
    model: Transformer,
    params: Any,
    batches: Iterable[Mapping[str, Array | np.ndarray]],
    lte: LTEConfig,
):
    """Routers regressed on an oracle's choice of experts: kernel [N, D, E] and bias [N, E].

    On each real token of `batches` ({"tokens", "segments"} [B, L]) the oracle keeps the experts
    of largest `contribution`; ridge regression of that choice on the FFN's input gives the
    direction of each expert's logit. A layer's logits are scaled to a standard deviation of
    `router_init_std`; the bias makes each expert active as often as the oracle chooses it.

    A logit has D + 1 unknowns; fewer than TOKENS_PER_UNKNOWN tokens for each give a warning. Runs
    the dense model over the batches twice (once without a bias): first for sums of products, then
    for a histogram of each logit. Memory does not grow with the number of batches.

    Raises:
      UserError: if no token is real, or the model's activations are not finite.
    """
    experts = num_experts(model.config, lte)
    kept = 1.0 - lte.wanted_sparsity("lte.router_init='ridge'")
    top = max(1, round(kept * experts))
    sums = None
    for batch in batches:
        interrupt.check("while starting routers")
        part = _moments(model, top, params, batch)
        sums = part if sums is None else added(sums, part)
    if sums is None or not (count := float(sharding.gathered(sums["gram"][0, -1, -1]))):
        raise UserError("mask: all calibration tokens are padding; expected some real ones")
    _warn_of_few(round(count), model.config.d_model)
    # Float32 sums over R batches err by at most R * 6e-8 of the diagonal: a hundredth of the ridge
    # penalty after 160 batches. From here on, float64 and one layer at a time.
    kernel_NDE, mean_NE, std_NE = _regressed(model, lte, sums)
    router = {"kernel": jnp.asarray(kernel_NDE, jnp.float32)}
    if not lte.router_bias:
        return router
    mesh = sharding.mesh_of(params)
    kernel_NDE = sharding.placed(router, mesh, "layers/ffn/router")["kernel"]
    low_NE = mean_NE - REACH * std_NE
    width_NE = 2 * REACH / BINS * np.maximum(std_NE, 1e-12)
    place = [array.astype(np.float32) for array in (low_NE, width_NE)]
    counts_NES = np.zeros((*low_NE.shape, BINS), np.int64)
    for batch in batches:
        interrupt.check("while starting routers")
        counts = sharding.gathered(_histogram(model, params, batch, kernel_NDE, *place))
        counts_NES += np.asarray(counts)
        del counts  # before the next batch is made
    chosen_NE = np.asarray(sharding.gathered(sums["cross"][:, -1]), np.float64)
    cut_NE = low_NE + width_NE * _upper(counts_NES, chosen_NE)
    # An expert chosen always or never has a constant logit: keep it clear of rounding errors.
    clear = 0.1 * lte.router_init_std
    cut_NE += clear * ((chosen_NE < 0.5).astype(float) - (chosen_NE > count - 0.5))
    bias_NE = np.log(lte.threshold / (1 - lte.threshold)) - cut_NE
    return router | {"bias": jnp.asarray(bias_NE, jnp.float32)}


def added(sums: Any, part: Any) -> Any:
    """Sums and the part of a batch, in place of the old sums.

    Waits for them: of several processes on CPUs, collectives of dozens of batches in flight, which
    do not depend on each other, can wait for each other forever.
    """
    return jax.block_until_ready(_added(sums, part))


@partial(jax.jit, donate_argnums=0)
def _added(sums: Any, part: Any) -> Any:
    return jax.tree.map(jnp.add, sums, part)


def _regressed(model: Transformer, lte: LTEConfig, sums: Mapping[str, Array]) -> list[np.ndarray]:
    """What `_regress` returns, of all layers, from their `_moments`."""
    d, e = model.config.d_model, num_experts(model.config, lte)
    like = tuple(jax.ShapeDtypeStruct(shape, np.float32) for shape in ((d, e), (e,), (e,)))

    def moments(start: int) -> Iterator[tuple[int, Any, Any]]:
        for layer in range(start, model.config.num_layers):
            yield layer, *(sharding.gathered(sums[name], layer) for name in ("gram", "cross"))

    def regress(of_layer: tuple[int, Any, Any]) -> tuple[np.ndarray, ...]:
        layer, *arrays = of_layer
        gram_KK, cross_KE = (np.asarray(array, np.float64) for array in arrays)
        return _regress(gram_KK, cross_KE, lte, layer)

    made = processes.spread(moments, regress, like)
    return [np.stack(arrays) for arrays in zip(*made, strict=True)]


@partial(jax.jit, static_argnames=("model", "top"))
def _moments(model, top: int, params, batch) -> dict[str, Array]:
    """Sums over real tokens: gram [N, K, K] of (inputs, 1); cross [N, K, E] with the choice."""
    x_NTD, h_NTEM, real_T = ffn_intermediates(model, params, batch)
    down_NEMD = params["layers"]["ffn"]["down"].astype(jnp.float32)
    chosen_NTE = largest(jax.vmap(contribution)(h_NTEM, down_NEMD), top)
    x_NTK = jnp.concatenate([x_NTD, jnp.ones_like(x_NTD[..., :1])], axis=-1)
    x_NTK = jnp.where(real_T[None, :, None], x_NTK, 0.0)
    einsum = partial(jnp.einsum, precision=_HIGHEST)
    return {
        "gram": einsum("NTK,NTJ->NKJ", x_NTK, x_NTK),
        "cross": einsum("NTK,NTE->NKE", x_NTK, chosen_NTE.astype(jnp.float32)),
    }


def _regress(
    gram_KK: np.ndarray, cross_KE: np.ndarray, lte: LTEConfig, layer: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The kernel [D, E] of one layer, and mean and standard deviation [E] of its logits.

    The constant is not penalised and then dropped: quantiles replace it.
    """
    if not (np.isfinite(gram_KK).all() and np.isfinite(cross_KE).all()):
        raise UserError(
            f"layers/ffn: activations of layer {layer} are not finite on the calibration tokens; "
            "expected the weights of a working model"
        )
    import scipy.linalg  # slower to import than all of lte_jax

    level = max(np.trace(gram_KK[:-1, :-1]) / (len(gram_KK) - 1), 1e-30)
    penalty_K = np.append(np.full(len(gram_KK) - 1, 1e-3 * level), 0.0)
    kernel_DE = scipy.linalg.solve(gram_KK + np.diag(penalty_K), cross_KE, assume_a="pos")[:-1]
    mean_D = gram_KK[-1, :-1] / gram_KK[-1, -1]
    covariance_DD = gram_KK[:-1, :-1] / gram_KK[-1, -1] - mean_D[:, None] * mean_D
    variance_E = np.maximum(np.sum(kernel_DE * (covariance_DD @ kernel_DE), axis=0), 0.0)
    scale = lte.router_init_std / max(np.sqrt(np.mean(variance_E)), 1e-6)
    return scale * kernel_DE, scale * (mean_D @ kernel_DE), scale * np.sqrt(variance_E)


@partial(jax.jit, static_argnames="model")
def _histogram(model, params, batch, kernel_NDE, low_NE, width_NE) -> Int[Array, "N E S"]:
    """How many real tokens have their logit in each bin; outliers count in the outer bins."""
    x_NTD, _, real_T = ffn_intermediates(model, params, batch)
    z_NTE = jnp.einsum("NTD,NDE->NTE", x_NTD, kernel_NDE, precision=_HIGHEST)
    bin_NTE = jnp.clip((z_NTE - low_NE[:, None]) / width_NE[:, None], 0, BINS - 1)
    empty_S = jnp.zeros(BINS, jnp.int32)
    count = lambda bin_T: empty_S.at[bin_T].add(real_T.astype(jnp.int32))  # noqa: E731
    return jax.vmap(jax.vmap(count, in_axes=1))(bin_NTE.astype(jnp.int32))


def _upper(counts_NES: np.ndarray, chosen_NE: np.ndarray) -> np.ndarray:
    """The quantile, in bins, with `chosen_NE` tokens above it; within a bin of `np.quantile`."""
    sums_NES = np.cumsum(counts_NES, axis=-1)
    last = sums_NES[0, 0, -1] - 1
    place_NE = np.clip((1.0 - chosen_NE / (last + 1)) * last, 0, last)

    def at(rank_NE: np.ndarray) -> np.ndarray:
        """The place of the logit of this rank, if those of a bin are spread over it evenly."""
        bin_NE1 = np.sum(sums_NES <= rank_NE[..., None], axis=-1, keepdims=True)
        here_NE = np.take_along_axis(counts_NES, bin_NE1, -1)[..., 0]
        before_NE = np.take_along_axis(sums_NES, bin_NE1, -1)[..., 0] - here_NE
        return bin_NE1[..., 0] + (rank_NE - before_NE + 0.5) / here_NE

    below_NE = np.floor(place_NE)
    part_NE = place_NE - below_NE
    return (1 - part_NE) * at(below_NE) + part_NE * at(np.minimum(below_NE + 1, last))


def _warn_of_few(tokens: int, d_model: int) -> None:
    wanted = TOKENS_PER_UNKNOWN * (d_model + 1)
    if tokens < wanted:
        log.warning(
            "calibration: %d tokens are %.1f for each of the d_model + 1 = %d unknowns of a "
            "router's logit; with fewer than %d routers start worse: use %d tokens "
            "(in an experiment: lte.calibration_records)",
            *(tokens, tokens / (d_model + 1), d_model + 1, TOKENS_PER_UNKNOWN, wanted),
        )


def ffn_intermediates(model: Transformer, params: Any, batch: Mapping[str, Array]):
    """FFN inputs [N, T, D], hidden activations [N, T, E, M], and real tokens [T]; T = B*L."""
    _, sown = forward(model, params, batch, routing="dense", mutable="intermediates")
    ffn = sown["intermediates"]["layers"]["ffn"]
    [x_NBLD], [h_NBLEM] = ffn["ffn_input"], ffn["hidden"]
    return _flat(x_NBLD), _flat(h_NBLEM), (batch["segments"] > 0).reshape(-1)


@partial(jax.jit, static_argnames=("model", "layers"))
def ffn_parts(model: Transformer, params: Any, batch: Mapping[str, Array], layers: range):
    """FFN inputs [N, T, D], act(x gate) and h [N, T, E, M] of some layers; T = B*L."""
    _, sown = forward(model, params, batch, routing="dense", mutable="intermediates")
    ffn = sown["intermediates"]["layers"]["ffn"]
    names = ("ffn_input", "gate", "hidden")
    return tuple(_flat(ffn[name][0][layers.start : layers.stop]) for name in names)


def passes(num_layers: int, size: int, start: int = 0) -> Iterator[range]:
    """Layers to be held together, of `size` bytes each; those of a pass that has some from `start`.

    They do not depend on `start`, so that what a killed run goes on with is the same to the bit.
    """
    chunk = max(1, PASS_BYTES // size)
    for begin in range(0, num_layers, chunk):
        layers = range(begin, min(begin + chunk, num_layers))
        if start < layers.stop:
            yield layers


def ffn_layers(
    model: Transformer, params: Any, calibration: Any, mask: Any, start: int = 0
) -> Iterator[Layer]:
    """The FFN of layers, on all real calibration tokens; some layers are held at a time."""
    batches = rows(calibration, mask)
    tokens = sum(np.count_nonzero(row["segments"] > 0) for row in batches)
    if not tokens:
        raise UserError("mask: all calibration tokens are padding; expected some real ones")
    config, ffn = model.config, params["layers"]["ffn"]
    width = 2 * config.d_ff + config.d_model
    for layers in passes(config.num_layers, int(4 * tokens * width), start):
        parts = []
        for row in batches:
            interrupt.check("while starting routers")
            real_T = np.asarray(row["segments"]).reshape(-1) > 0
            found = map(sharding.gathered, ffn_parts(model, params, row, layers))
            parts.append([np.asarray(part_NT)[:, real_T] for part_NT in found])
        x_NTD, gate_NTEM, h_NTEM = (
            np.concatenate(part, axis=1) for part in zip(*parts, strict=True)
        )
        for layer in range(max(start, layers.start), layers.stop):
            place = layer - layers.start
            weights = {
                name: np.asarray(sharding.gathered(ffn[name], layer), np.float32)
                for name in MATRICES
                if name in ffn
            }
            yield Layer(x_NTD[place], gate_NTEM[place], h_NTEM[place], weights, config, layer)


def rows(calibration: Any, mask: Any = None) -> list[dict[str, np.ndarray | Array]]:
    """Token ids [R, L], or a batch of arrays [R, ...], as batches of one row each."""
    if not isinstance(calibration, Mapping):
        mask_RL = np.ones(calibration.shape) if mask is None else mask
        calibration = {"tokens": calibration, "segments": np.asarray(mask_RL, np.int32)}
    numbers = range(len(calibration["tokens"]))
    return [{name: x[row : row + 1] for name, x in calibration.items()} for row in numbers]


def _flat(a_NBLX: Array) -> Array:
    """[N, B, L, ...] as [N, T, ...], float32."""
    return a_NBLX.astype(jnp.float32).reshape(a_NBLX.shape[0], -1, *a_NBLX.shape[3:])
