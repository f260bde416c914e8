"""Dispatch to the sparse kernels for this hardware.

The kernels are in the top-level folder kernels/, importable as lte_jax.kernels.<module>. It has no
__init__.py on purpose: a package named `kernels` would shadow Hugging Face's. In a wheel, the
modules are beside this file.

Dimension key: B rows  D model width  E experts  M neurons per expert  N layers  H heads
               K kv heads (of linear: inputs)  O outputs  C head width  T tokens so far
"""

from __future__ import annotations

import functools
import importlib
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lte_jax.errors import UserError

_HERE = pathlib.Path(__file__).resolve().parent
if not (_HERE / "reference.py").exists():  # a checkout or an editable install
    __path__.append(str(_HERE.parents[1] / "kernels"))

from .operands import check_caches, check_ffn, check_linear, place  # noqa: E402
from .quantized import Weight  # noqa: E402  found once the path is set

IMPLEMENTATIONS = ("reference", "xla", "cpu", "triton", "pallas")
_MODULES = {"triton": "gpu_triton", "pallas": "tpu_pallas"}  # the others are named after theirs
_BEST = {"cpu": "cpu", "gpu": "triton", "tpu": "pallas"}  # by jax's name of the device
_log = logging.getLogger(__name__)


def sparse_ffn(
    x_BD: Array,
    active_BE: Array,
    weights: Mapping[str, Weight],
    *,
    activation: str,
    layer: Array | int | None = None,
    implementation: str = "auto",
) -> Array:
    """Each row's sum over its active experts; only experts that some row uses are read.

    Args:
      x_BD: one token per row, float.
      active_BE: bool, the experts each row uses; no row gets another row's experts.
      weights: up, down and, if the FFN is gated, gate, each [E, M, D]; up_bias and gate_bias, if
        there are any, each [E, M]. All of x_BD's type; or the matrices `Quantized` (quantized.py),
        with weights of 8, 6 or 4 bits, to compute in that type. The caller adds the output bias,
        which belongs to no expert.
      activation: silu, gelu, gelu_tanh or relu.
      layer: the layer to use of stacked weights, [N, E, M, D] and [N, E, M], without slicing it
        out. None: weights are not stacked.
      implementation: one of IMPLEMENTATIONS, or "auto" for the device's best.

    Raises:
      UserError: if the implementation cannot run here, if shapes or types do not agree, and on
        differentiation: the kernels are for inference.
    """
    if layer is None:
        weights, layer = {key: w[None] for key, w in weights.items()}, 0
    check_ffn(x_BD, active_BE, weights, activation)
    layer = place("sparse_ffn: layer", layer, weights["up"].shape[0])
    operands = (x_BD, active_BE, dict(weights), layer)
    return _run("sparse_ffn", operands, implementation, activation=activation)


def linear(
    x_BK: Array,
    w: Weight,
    *,
    layer: Array | int | None = None,
    transposed: bool = False,
    implementation: str = "auto",
) -> Array:
    """x w for a few rows, at the speed of reading w: float32 [B, O].

    Args:
      x_BK: float.
      w: [K, O] or, transposed, [O, K]; of x_BK's type, or `Quantized` for it.
      layer: the layer to use of a stacked w, [N, K, O] or [N, O, K]. None: w is not stacked.
      transposed: whether w is [O, K].
      implementation: as in sparse_ffn.

    Raises: as sparse_ffn.
    """
    if layer is None:
        w, layer = w[None], 0
    check_linear(x_BK, w, transposed)
    operands = (x_BK, w, place("linear: layer", layer, w.shape[0]))
    return _run("linear", operands, implementation, transposed=transposed)


def linears(
    x_BK: Array, ws: Sequence[Weight], *, layer: Array | int, implementation: str = "auto"
) -> list[Array]:
    """x times each of several matrices, float32 [B, O]: in one call where a kernel can.

    Args:
      x_BK: as in `linear`.
      ws: stacked [N, K, O], as in `linear`.
      layer: the layer to use.
      implementation: as in sparse_ffn.

    Raises: as sparse_ffn.
    """
    if not hasattr(_module(resolve(implementation)), "linears"):
        return [linear(x_BK, w, layer=layer, implementation=implementation) for w in ws]
    for w in ws:
        check_linear(x_BK, w, transposed=False)
    operands = (x_BK, list(ws), place("linears: layer", layer, ws[0].shape[0]))
    return _run("linears", operands, implementation)


def attend(
    q_BHC: Array,
    k_BKC: Array,
    v_BKC: Array,
    k_NBTKC: Array,
    v_NBTKC: Array,
    visible_BT: Array,
    *,
    layer: Array | int,
    index: Array | int,
    implementation: str = "auto",
) -> tuple[Array, Array, Array]:
    """Attention of one new token per row over all keys and values so far, its own included.

    Args:
      q_BHC: queries of the new tokens.
      k_BKC: their keys; K divides H.
      v_BKC: their values.
      k_NBTKC: the cache of keys, all layers.
      v_NBTKC: the cache of values. All arrays are of one type.
      visible_BT: bool, the positions each row sees: `index` among them, and none beyond it.
      layer: of the cache.
      index: the new tokens' position in the cache; one beyond it is refused where it is known.
      implementation: as in sparse_ffn.

    Returns:
      y_BHC: of q's type.
      k_NBTKC, v_NBTKC: with the new tokens in them; under `jax.jit` the same memory.

    Raises: as sparse_ffn.
    """
    (b, _, c), (n, _, t, k, _) = q_BHC.shape, k_NBTKC.shape
    check_caches("attend", q_BHC, k_NBTKC, v_NBTKC, visible_BT, (b, t))
    if not k_BKC.shape == v_BKC.shape == (b, k, c) or not k_BKC.dtype == v_BKC.dtype == q_BHC.dtype:
        found = " and ".join(f"{a.dtype}{list(a.shape)}" for a in (k_BKC, v_BKC))
        raise UserError(f"attend: k and v are {found}, expected twice {q_BHC.dtype}{[b, k, c]}")
    places = (place("attend: layer", layer, n), place("attend: index", index, t))
    operands = (q_BHC, k_BKC, v_BKC, k_NBTKC, v_NBTKC, visible_BT, *places)
    return _run("attend", operands, implementation)


def attend_many(
    q_BLHC: Array,
    k_NBTKC: Array,
    v_NBTKC: Array,
    visible_BLT: Array,
    *,
    layer: Array | int,
    end: Array | int,
    implementation: str = "auto",
) -> Array:
    """Attention of several new tokens per row, which the caches already have: [B, L, H, C].

    Args:
      q_BLHC: queries.
      k_NBTKC: the cache of keys, all layers; K divides H.
      v_NBTKC: the cache of values, likewise. All are of one type.
      visible_BLT: bool, the places each query sees; one that sees none has zeros.
      layer: of the cache.
      end: places of the cache in use: none is seen from there on.
      implementation: as in sparse_ffn.

    Raises: as sparse_ffn.
    """
    n, _, t, _, _ = k_NBTKC.shape
    wanted = (*q_BLHC.shape[:2], t)
    check_caches("attend_many", q_BLHC, k_NBTKC, v_NBTKC, visible_BLT, wanted)
    places = place("attend_many: layer", layer, n), place("attend_many: end", end, t + 1)
    return _run("attend_many", (q_BLHC, k_NBTKC, v_NBTKC, visible_BLT, *places), implementation)


def embed(tokens_B: Array, table_VD: Weight, *, implementation: str = "auto") -> Array:
    """Rows of the table: [B, D], of its type.

    Args:
      tokens_B: integers, one token per row; rows of those outside 0 to V - 1 are undefined.
      table_VD: of any type, or `Quantized`.
      implementation: as in sparse_ffn.

    Raises: as sparse_ffn.
    """
    if tokens_B.ndim != 1 or table_VD.ndim != 2:
        raise UserError(
            f"embed: tokens {tokens_B.shape} and table {table_VD.shape}: expected [B] and [V, D]"
        )
    if not jnp.issubdtype(tokens_B.dtype, jnp.integer):
        raise UserError(f"embed: tokens are {tokens_B.dtype}, expected integers")
    return _run("embed", (jnp.asarray(tokens_B, jnp.int32), table_VD), implementation)


def attention(
    q_BLHC: Array,
    k_BLKC: Array,
    v_BLKC: Array,
    visible_BLT: Array,
    *,
    causal: bool,
) -> Array:
    """Softmax attention of whole texts with slopes, [B, L, H, C], by the kernels for CPUs.

    It is for where `trains_attention` says "cpu".

    Args:
      q_BLHC: queries.
      k_BLKC: keys; K divides H.
      v_BLKC: values, likewise.
      visible_BLT: bool, the keys that each query sees.
      causal: whether none of them is behind the query's place.
    """
    return _module("cpu").attention(q_BLHC, k_BLKC, v_BLKC, visible_BLT, causal)


def trains_attention(wanted: str, dtype: str, head_dim: int, devices: int | None) -> str:
    """What computes attention in training: "cpu", the kernels' (C++), or "xla".

    Args:
      wanted: one of those, or "auto": "cpu" where it can.
      dtype: to compute in.
      head_dim: C.
      devices: of the mesh; None: of a plan, which is for any.

    Raises:
      UserError: where "cpu" is wanted and cannot be.
    """
    if wanted == "xla" or devices is None:
        return "xla"
    if devices > 1:
        why: str | None = f"the mesh has {devices} devices, and it is for one"
    else:
        why = unavailable("cpu") or _module("cpu").unsuited(dtype, head_dim)
    if why and wanted == "cpu":
        raise UserError(f'compute.attention="cpu" cannot run: {why}: set "auto"')
    return "xla" if why else "cpu"


def resolve(implementation: str) -> str:
    """The name itself, or what "auto" stands for here.

    Raises:
      UserError: on an unknown name.
    """
    valid = ("auto", *IMPLEMENTATIONS)
    if not isinstance(implementation, str) or implementation not in valid:
        raise UserError(
            f"implementation={implementation!r} is unknown: valid are {', '.join(valid)}"
        )
    return _choose() if implementation == "auto" else implementation


def unavailable(name: str) -> str | None:
    """Why this implementation cannot run here; None if it can."""
    kernel = _module(name)
    return kernel.unavailable() if hasattr(kernel, "unavailable") else None


def reads_prompts(implementation: str, w: Weight) -> bool:
    """Whether its kernels are the fastest for as many rows as a prompt has tokens, too."""
    kernel = _module(resolve(implementation))
    return hasattr(kernel, "reads_prompts") and kernel.reads_prompts(w)


def unroll(implementation: str) -> int:
    """How many layers each turn of decoding's loop over them has."""
    return getattr(_module(resolve(implementation)), "UNROLL", 1)


@functools.cache
def _choose() -> str:
    """The implementation for this process's device, logged once."""
    backend = jax.default_backend()
    name = _BEST.get(backend, "xla")
    if reason := unavailable(name):
        _log.warning("kernels: using the slower XLA loop, as %r cannot run: %s", name, reason)
        return "xla"
    _log.info("kernels: %s on %s", name, backend)
    return name


_warn_once = functools.cache(_log.warning)


def _module(name: str):
    return importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")


def _run(kernel: str, operands: tuple, implementation: str, **settings: Any) -> Any:
    """Calls a kernel of the implementation; "auto" gives what it refuses to "xla"."""
    from .reference import Unsupported

    def call(name: str) -> Any:
        function = functools.partial(getattr(_module(name), kernel), **settings)
        return _inference_only(function, *operands)

    name = resolve(implementation)
    try:
        return call(name)
    except Unsupported as reason:
        if implementation != "auto":
            raise UserError(f"implementation={name!r} cannot run: {reason}") from reason
        _warn_once(f"kernels: using the slower XLA loop, as {name!r} cannot run: {reason}")
        return call("xla")


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _inference_only(function: Callable[..., Any], *operands) -> Any:
    return function(*operands)


@_inference_only.defjvp
def _refuse(function, primals, tangents):
    raise UserError(
        "the kernels are for inference and have no gradient: train through "
        'lte_jax.apply(model, params, tokens, routing="soft") (or "straight_through", "hard")'
    )
