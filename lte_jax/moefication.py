"""Groups the neurons of each FFN into experts, and permutes the weights accordingly.

A dense FFN is a sum over its F neurons in any order, so E experts of M neurons are an order of the
neurons: `order_EM[e, m]` is the dense neuron that becomes neuron m of expert e. There are three
ways to choose the order of a layer (`LTEConfig.grouping`):

  kmeans        neurons whose first-matrix rows (of gate, or up without a gate) point the same way:
                balanced k-means on the L2-normalised rows, as in MoEfication (Zhang et al., 2022,
                section 3.1) and the paper (section 4.1)
  coactivation  neurons that are large on the same tokens: the same clustering, with the covariance
                of their magnitudes |h| over calibration tokens in place of inner products of rows
  random        a baseline

Both clusterings (clustering.py) need only inner products between neurons. Layers are processed one
at a time; several processes (which must all call) share them out, and all get all results.

Dimension key: N layers  F = E*M neurons of an FFN  E experts  M neurons per expert  D model width
               R calibration rows  L length  T tokens
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from lte_jax import baselines, clustering, interrupt, processes, refit, router_init, sharding
from lte_jax.baselines import Layer
from lte_jax.config import LTEConfig, num_experts
from lte_jax.errors import UserError
from lte_jax.kept import NOWHERE, Kept
from lte_jax.model import Transformer, abstract_params
from lte_jax.params import ROUTER, is_router, table

NEURON_MATRICES = ("gate", "up", "down", "gate_bias", "up_bias")  # of layers/ffn: [N, E, M, ...]


# ------------------------------------------------------------------------------------ the pipeline


def to_experts(
    model: Transformer,
    params: Any,
    lte: LTEConfig = LTEConfig(),  # noqa: B008 (frozen)
    calibration: np.ndarray | Array | Mapping[str, Any] | None = None,
    mask: np.ndarray | Array | None = None,
    *,
    seed: int = 0,
    kept: Kept = NOWHERE,
) -> tuple[Transformer, dict[str, Any], Int[np.ndarray, "N E M"]]:
    """Groups the neurons of a dense model into experts; adds no routers yet.

    Args:
      model: a dense Transformer.
      params: its parameters, on one device or spread over many; not changed.
      lte: the expert size, and how to group neurons.
      calibration: token ids [R, L] of typical text, or arrays as `model.forward` takes them, for
        grouping="coactivation".
      mask: [R, L], True or > 0 at real tokens. None: no padding.
      seed: of the grouping.
      kept: layers that are grouped already, of a run that was killed.

    Returns:
      The model with `lte`, its parameters without routers, and the dense neuron in each slot.

    Raises:
      UserError: if the expert size does not divide the FFN width, a layer's weights are not finite,
        or co-activation has no calibration tokens.
    """
    if model.lte is not None:
        raise UserError("model: already has experts; expected a dense model, or `to_dense` of it")
    num_experts(model.config, lte)
    if lte.grouping in baselines.GROUPINGS:
        layers = partial(router_init.ffn_layers, model, params, calibration, mask)
        group = partial(baselines.GROUPINGS[lte.grouping], lte)
    else:
        layers = partial(_first_matrices, model, params, lte, calibration, mask)
        group = partial(_group, lte, seed)
    experts = num_experts(model.config, lte)
    order_EM = jax.ShapeDtypeStruct((experts, lte.expert_size), np.int32)
    order_NEM = np.stack(processes.spread(layers, group, order_EM, kept.of("order")))
    return model.clone(lte=lte), permute(params, order_NEM), order_NEM


def _first_matrices(
    model: Transformer, params: Any, lte: LTEConfig, calibration: Any, mask: Any, start: int
) -> Iterator[tuple[int, Array | np.ndarray, np.ndarray | None]]:
    """Number, first matrix [1, F, D] and, for co-activation, covariance [F, F] of layers."""
    num_layers = model.config.num_layers
    first_N1FD = params["layers"]["ffn"]["gate" if model.config.gated else "up"]
    statistics = itertools.repeat(None, num_layers - start)
    if lte.grouping == "coactivation":
        statistics = coactivations(model, params, calibration, mask, start)
    how = {"initial": start, "unit": "layer", "disable": None}
    bar = tqdm(statistics, "grouping neurons", num_layers, **how)
    for layer, covariance_FF in enumerate(bar, start):
        yield layer, sharding.gathered(first_N1FD, layer), covariance_FF


def _group(lte: LTEConfig, seed: int, of_layer: Any) -> Int[np.ndarray, "E M"]:
    layer, first_1FD, covariance_FF = of_layer
    return group_neurons(np.asarray(first_1FD[0]), lte, layer, covariance_FF, seed=seed)


def add_routers(
    model: Transformer,
    params: Any,
    calibration: np.ndarray | Array | Mapping[str, Any] | None = None,
    mask: np.ndarray | Array | None = None,
    *,
    seed: int = 0,
    kept: Kept = NOWHERE,
) -> dict[str, Any]:
    """Adds routers to the parameters of `to_experts`, initialised by `model.lte.router_init`.

    With `model.lte.refit`, it then fits the down projections to what the routers leave, see
    refit.py: no longer those of the dense model.

    Args:
      model: with experts.
      params: its parameters; routers in them are replaced.
      calibration: token ids [R, L] of typical text, for router_init="ridge": at least
        `router_init.TOKENS_PER_UNKNOWN` real tokens for each of D + 1 unknowns (fewer give a
        warning). They are read row by row, so memory does not grow with them.
      mask: [R, L], True or > 0 at real tokens. None: no padding.
      seed: of random routers.
      kept: what is made already, of a run that was killed.

    Raises:
      UserError: if ridge has no calibration tokens, or only padding.
    """
    lte, key = model.lte, jax.random.key(seed)
    if lte.router_init in baselines.PRUNERS:
        if lte.refit:
            raise UserError(
                f"lte.refit=True: lte.router_init={lte.router_init!r} prunes weights and has no "
                "experts to skip; set lte.refit=False"
            )
        return _pruned(model, params, calibration, mask)
    if lte.router != "none":
        make = partial(_router, model, params, calibration, mask, key)
        like = abstract_params(model)["layers"]["ffn"]["router"]
        router = processes.once(make, like, kept.of("router"))
        params = _with_ffn(params, {"router": router})
    if not lte.refit:
        return params
    if calibration is None:
        raise UserError(_no_calibration("lte.refit=True", "lte.refit=False"))
    batches = router_init.rows(calibration, mask)
    down_NEMD = refit.down_projections(model, params, batches, kept.of("down"))
    return _with_ffn(params, {"down": down_NEMD.astype(params["layers"]["ffn"]["down"].dtype)})


def _router(model: Transformer, params: Any, calibration: Any, mask: Any, key: Array) -> Any:
    """Routers, started as `model.lte.router_init` says."""
    lte = model.lte
    if lte.router_init in ("normal", "open"):
        router = router_init.random_router(key, model.config, lte)
    elif calibration is None:
        raise UserError(_no_calibration(f"lte.router_init={lte.router_init!r}"))
    elif lte.router_init == "ridge":
        router = router_init.ridge_router(model, params, router_init.rows(calibration, mask), lte)
        if lte.router == "two_layer" and lte.router_activation == "none":
            router = router_init.factored(router, lte.router_rank or router["kernel"].shape[2])
    else:
        router = _started(model, params, calibration, mask, key)
    _check_router(model, router)
    return router


def _started(model: Transformer, params: Any, calibration: Any, mask: Any, key: Array) -> Any:
    """Routers by one of `baselines.STARTS`."""
    start = baselines.STARTS[model.lte.router_init]

    def of_layer(layer: Layer) -> Any:
        made = start(model.lte, layer, jax.random.fold_in(key, layer.index))
        _check_router(model, made)
        return made

    wanted = abstract_params(model)["layers"]["ffn"]["router"]
    like = jax.tree.map(lambda row: jax.ShapeDtypeStruct(row.shape[1:], row.dtype), wanted)
    layers = partial(router_init.ffn_layers, model, params, calibration, mask)
    each = processes.spread(layers, of_layer, like)
    return jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *each)


def _with_ffn(params: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with parameters of the FFN that every process has made alike, where they belong."""
    put = sharding.placed(made, sharding.mesh_of(params), "layers/ffn")
    ffn = params["layers"]["ffn"] | put
    return params | {"layers": params["layers"] | {"ffn": ffn}}


def _no_calibration(setting: str, other: str = "lte.router_init='normal'") -> str:
    return (
        f"{setting} fits weights to data: pass calibration token ids [rows, length], or choose "
        f"{other}"
    )


def _pruned(model: Transformer, params: Any, calibration: Any, mask: Any) -> dict[str, Any]:
    """The parameters with some of the FFN's weights at zero."""
    if calibration is None:
        raise UserError(_no_calibration(f"lte.router_init={model.lte.router_init!r}"))
    prune, ffn = baselines.PRUNERS[model.lte.router_init], params["layers"]["ffn"]
    names = [name for name in router_init.MATRICES if name in ffn]
    like = {name: jax.ShapeDtypeStruct(ffn[name].shape[1:], np.float32) for name in names}
    of_layer = lambda layer: dict(layer.weights) | prune(model.lte, layer)  # noqa: E731
    layers = partial(router_init.ffn_layers, model, params, calibration, mask)
    each = processes.spread(layers, of_layer, like)
    left = {name: np.stack([w[name] for w in each]).astype(ffn[name].dtype) for name in names}
    return _with_ffn(params, left)


def _check_router(model: Transformer, router: Mapping[str, Any]) -> None:
    """Refuses a start that makes a router of another kind than the model has."""
    made = {f"{ROUTER}{path}" for path in traverse_util.flatten_dict(dict(router), sep="/")}
    lte = model.lte
    wanted = {row.path for row in table(model.config, lte) if is_router(row.path)}
    if made != wanted:
        raise UserError(
            f"lte.router_init={lte.router_init!r} makes {', '.join(sorted(made))}, but a router of "
            f"lte.router={lte.router!r} with router_bias={lte.router_bias} has "
            f"{', '.join(sorted(wanted))}: choose settings that go together"
        )


def to_dense(
    model: Transformer, params: Any, order_NEM: Int[np.ndarray, "N E M"]
) -> tuple[Transformer, dict[str, Any]]:
    """Undoes `to_experts`: puts every neuron back in its place and drops the routers.

    Raises:
      UserError: if `order_NEM` is not an order of these neurons.
    """
    ffn = {name: w for name, w in params["layers"]["ffn"].items() if name != "router"}
    params = params | {"layers": params["layers"] | {"ffn": ffn}}
    order_NF = np.asarray(order_NEM).reshape(len(order_NEM), -1)
    return model.clone(lte=None), permute(params, np.argsort(order_NF, axis=1)[:, None])


def group_neurons(
    first_FD: Float[np.ndarray, "F D"],
    lte: LTEConfig,
    layer: int = 0,
    covariance_FF: Float[np.ndarray, "F F"] | None = None,
    *,
    seed: int = 0,
) -> Int[np.ndarray, "E M"]:
    """Groups the neurons of one layer; ascending within an expert.

    The same on every machine for the same weights and covariance; the covariance is only as
    reproducible as the forward pass behind it.

    Args:
      first_FD: the first matrix, one row per neuron, in any float dtype.
      lte: the expert size and grouping.
      layer: seeds each layer differently; named in errors.
      covariance_FF: of the neurons' magnitudes, for grouping="coactivation".
      seed: of the order in which neurons are visited.

    Raises:
      UserError: if the weights or the covariance are not finite, or the expert size does not
        divide F.
    """
    experts, rest = divmod(len(first_FD), lte.expert_size)
    if rest:
        raise UserError(f"lte.expert_size={lte.expert_size} does not divide F={len(first_FD)}")
    seeds = (seed, layer)
    if lte.grouping == "random":
        order_F = clustering.random_order(len(first_FD), seeds)
        return clustering.canonical(order_F.reshape(experts, -1))
    coactivation = lte.grouping == "coactivation"
    grouped_by = covariance_FF if coactivation else first_FD.astype(np.float32)
    assert grouped_by is not None
    if not np.isfinite(grouped_by).all():
        what = "covariance of the neurons" if coactivation else "first matrix"
        raise UserError(
            f"layers/ffn: the {what} of layer {layer} has values that are not finite; "
            "expected the weights of a working model"
        )
    if coactivation:
        return clustering.balanced_partition(grouped_by, experts, seed=seeds)
    return clustering.balanced_kmeans(clustering.normalize(first_FD), experts, seed=seeds)


# ------------------------------------------------------------------------------------ co-activation


def coactivations(
    model: Transformer,
    params: Any,
    calibration: np.ndarray | Array | Mapping[str, Any] | None,
    mask: np.ndarray | Array | None = None,
    start: int = 0,
) -> Iterator[Float[np.ndarray, "F F"]]:
    """Yields, layer by layer from `start` on, the covariance of |h| over the real tokens.

    The data is read row by row, once for as many layers as fit router_init.PASS_BYTES. On babyllama
    (experts of 32, the half with the largest sum of |h| kept) the squared error of the FFN outputs,
    relative to their square, was 0.14 with k-means on rows, 0.12 with cosines of h, 0.105 with
    cosines, correlations or top-decile counts of |h|, and 0.104 with this covariance. (Its largest
    deviation is 5.2 medians; clustering.py shortens those beyond `clustering.LONGEST` medians.)

    Raises:
      UserError: if calibration tokens are missing, or not in rows.
    """
    tokens = calibration.get("tokens") if isinstance(calibration, Mapping) else calibration
    if tokens is None or np.ndim(tokens) != 2 or not np.size(tokens):
        shape = None if tokens is None else np.shape(tokens)
        raise UserError(
            f"lte.grouping='coactivation': calibration has shape {shape}, expected token ids "
            "[rows, length]; pass some, or choose lte.grouping='kmeans'"
        )
    rows = router_init.rows(calibration, mask)
    num_tokens = sum(np.count_nonzero(row["segments"] > 0) for row in rows)
    if not num_tokens:
        raise UserError("mask: all calibration tokens are padding; expected some real ones")
    num_layers, d_ff = model.config.num_layers, model.config.d_ff
    for layers in router_init.passes(num_layers, 4 * d_ff**2, start):
        sums = None
        for row in rows:
            interrupt.check("while grouping neurons")
            new = _magnitude_sums(model, params, row, layers)
            sums = new if sums is None else router_init.added(sums, new)
        for place in range(max(start - layers.start, 0), len(layers)):
            product_FF, sum_F = (np.asarray(sharding.gathered(sum_N, place)) for sum_N in sums)
            mean_F = sum_F / np.float32(num_tokens)
            product_FF = product_FF / np.float32(num_tokens)
            yield product_FF - mean_F[:, None] * mean_F[None]


@partial(jax.jit, static_argnames=("model", "layers"))
def _magnitude_sums(model, params, batch, layers: range):
    """Sums over the real tokens of |h_f| |h_g|, [N, F, F], and of |h_f|, [N, F], of some layers."""
    _, h_NTEM, real_T = router_init.ffn_intermediates(model, params, batch)
    h_NTF = jnp.abs(h_NTEM[layers.start : layers.stop].reshape(len(layers), real_T.size, -1))
    h_NTF = jnp.where(real_T[None, :, None], h_NTF, 0.0)
    product_NFG = jnp.einsum("NTF,NTG->NFG", h_NTF, h_NTF, precision=jax.lax.Precision.HIGHEST)
    return product_NFG, jnp.sum(h_NTF, axis=1)


# -------------------------------------------------------------------------------------- permutation


def permute(params: Any, order_NEM: Int[np.ndarray, "N E M"]) -> dict[str, Any]:
    """Reorders the FFN neurons of each layer: [N, *, *, ...] becomes [N, E, M, ...].

    Gate, up, down and their biases move together, so the FFN computes the same. Other parameters
    are returned as they are. Copies one matrix (of all layers) at a time.

    Raises:
      UserError: if `order_NEM` is not an order of these neurons.
    """
    ffn = params["layers"]["ffn"]
    neurons = ffn["down"].shape[0], ffn["down"].shape[1] * ffn["down"].shape[2]
    order_NF = np.asarray(order_NEM).reshape(len(order_NEM), -1)
    identity_NF = np.broadcast_to(np.arange(neurons[1]), neurons)
    if order_NF.shape != neurons or not np.array_equal(np.sort(order_NF, axis=1), identity_NF):
        raise UserError(
            f"expert order of shape {np.shape(order_NEM)}: expected for each of {neurons[0]} layers"
            f" a permutation of its {neurons[1]} neurons; use the order this model was made with"
        )
    named = {name: ffn[name] for name in NEURON_MATRICES if name in ffn}
    shapes = {
        name: jax.ShapeDtypeStruct((*np.shape(order_NEM), *w.shape[3:]), w.dtype)
        for name, w in named.items()
    }
    places, mesh = dict.fromkeys(named), sharding.mesh_of(named)
    if mesh is not None:
        places = sharding.param_shardings({"layers": {"ffn": shapes}}, mesh)["layers"]["ffn"]
    moved = {name: _permuted(w, order_NEM, places[name]) for name, w in named.items()}
    return params | {"layers": params["layers"] | {"ffn": ffn | moved}}


@partial(jax.jit, static_argnames="place")
def _permuted(w_NEMD: Array, order_NEM: Array, place: jax.sharding.Sharding | None) -> Array:
    """The neurons of each layer in this order, on the devices where they belong."""
    w_NFD = w_NEMD.reshape(w_NEMD.shape[0], -1, *w_NEMD.shape[3:])
    moved_NEMD = jax.vmap(lambda w_FD, order_EM: w_FD[order_EM])(w_NFD, order_NEM)
    return moved_NEMD if place is None else jax.lax.with_sharding_constraint(moved_NEMD, place)
