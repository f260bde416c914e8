"""Argument checks of the public functions; each raises a one-line UserError.

Shapes and dtypes are always checked, values only on concrete arrays: tracers have none.

Dimension key: B batch  L length  T cache length  S cached tokens so far
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax.config import ModelConfig
from lte_jax.errors import UserError
from lte_jax.kernels.quantized import Quantized
from lte_jax.params import dimension_sizes, table

COMPUTE_DTYPES = ("float32", "bfloat16")


def model(value: Any, params: Any, name: str = "model") -> None:
    """Refuses anything but a model and its parameters, by names, shapes and kind of dtype.

    Args:
      value: should be a `Transformer`.
      params: should be its parameters.
      name: of the argument that holds the model, for the message.
    """
    config, lte = getattr(value, "config", None), getattr(value, "lte", None)
    if not (isinstance(config, ModelConfig) and callable(getattr(value, "apply", None))):
        raise UserError(f"{name} is {type(value).__name__}: expected a model, as returned by load")
    if not isinstance(params, Mapping):
        raise UserError(
            f"params is {type(params).__name__}: expected the dict of parameters that load returns "
            "with the model"
        )
    sizes = dimension_sizes(config, lte)
    for row in table(config, lte):
        leaf, expected = params, list(row.shape(sizes))
        for key in row.path.split("/"):
            leaf = leaf[key] if isinstance(leaf, Mapping) and key in leaf else None
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not hasattr(leaf, "shape"):
            found = "is missing" if leaf is None else f"is {type(leaf).__name__}"
        elif isinstance(leaf, Quantized):  # a dense FFN is cut into blocks
            if math.prod(leaf.shape) == math.prod(expected):
                continue
            found = f"is {leaf.format}{list(leaf.shape)}"
        elif list(leaf.shape) != expected or not jnp.issubdtype(dtype, jnp.floating):
            found = f"is {dtype}{list(leaf.shape)}"
        else:
            continue
        raise UserError(
            f"params: {row.path} {found}, expected floats {expected}: pass the parameters of this "
            f"{name}"
        )


def function(name: str, value: Any) -> None:
    """Refuses anything but a callable or None."""
    if value is not None and not callable(value):
        raise UserError(f"{name}={value!r}: expected a function, or None")


def token_ids(
    tokens: Any,
    vocab_size: int,
    name: str = "tokens",
    mend: str = "use the model's own tokenizer",
) -> None:
    """Refuses ids outside the vocabulary, which an embedding would wrap, clip or turn into NaN.

    Args:
      tokens: integers of any shape.
      vocab_size: V; ids are 0 to V - 1.
      name: of the argument or text, for the message.
      mend: the fix, for the message.
    """
    ids = concrete(tokens)
    if ids is None or not ids.size or (ids.min() >= 0 and ids.max() < vocab_size):
        return
    wrong = int(ids[(ids < 0) | (ids >= vocab_size)].flat[0])
    raise UserError(f"{name} has token id {wrong}, outside the vocabulary of {vocab_size}: {mend}")


def batch(
    config: ModelConfig,
    tokens: Any,
    mask: Any = None,
    cache: Any = None,
    name: str = "tokens",
    types: Any = None,
) -> None:
    """Refuses `tokens`, `mask`, `cache` and `types` that a forward pass cannot take."""
    _expect_integers(tokens, name)
    if len(tokens.shape) != 2:
        mend = f" (one text alone is {name}[None])" if len(tokens.shape) == 1 else ""
        raise UserError(f"{name} has shape {list(tokens.shape)}: expected [B, L]{mend}")
    if 0 in tokens.shape:
        raise UserError(f"{name} has shape {list(tokens.shape)}: expected at least one token")
    if mask is not None:
        mask_of(tokens, mask, name)
    token_ids(tokens, config.vocab_size, name)
    if types is not None:
        _expect_types(config, tokens, types, name)
    if cache is not None and not config.causal:
        raise UserError(
            f"cache: an encoder (family {config.family!r}) reads a text at once: expected None"
        )
    _expect_room(config, tokens, mask, cache, name)


def mask_of(tokens: Any, mask: Any, name: str = "tokens") -> None:
    """Refuses a mask without one valid entry per token."""
    _expect_integers(mask, "mask", "True at real tokens, or segment ids", or_bool=True)
    if mask.shape != tokens.shape:
        raise UserError(
            f"mask has shape {list(mask.shape)} and {name} {list(tokens.shape)}: expected one "
            "entry per token"
        )
    known = concrete(mask)
    if known is not None and known.min(initial=0) < 0:
        raise UserError(f"mask has the entry {known.min()}: expected 0 or larger")


def _expect_types(config: ModelConfig, tokens, types, name: str) -> None:
    _expect_integers(types, "types", "token types")
    known, most = concrete(types), max(config.token_types, 1) - 1
    outside = known is not None and not 0 <= known.min(initial=0) <= known.max(initial=0) <= most
    if types.shape != tokens.shape or outside:
        raise UserError(
            f"types has shape {list(types.shape)}: expected one of 0 to {most} for each of {name} "
            f"{list(tokens.shape)}"
        )


def _expect_room(config: ModelConfig, tokens, mask, cache, name: str) -> None:
    """Refuses tokens that exceed the cache or the model's positions."""
    rows, length = tokens.shape
    segments_BL = np.ones((rows, length), np.int32) if mask is None else concrete(mask)
    if cache is not None:
        places = cache["segments"].shape
        index, cached_BT = concrete(cache["index"]), concrete(cache["segments"])
        used = 0 if index is None else int(index)
        if rows != places[0] or used + length > places[1]:
            raise UserError(
                f"{name} has shape {[rows, length]}, but the cache has room for "
                f"{places[1] - used} more tokens of {places[0]} texts: make a longer one, "
                f"init_cache(model, {rows}, {used + length})"
            )
        if cached_BT is None or segments_BL is None:
            return
        segments_BL = np.concatenate([cached_BT[:, :used], segments_BL], axis=1)
    if segments_BL is None or segments_BL.shape[1] <= config.max_length:
        return
    ids = np.unique(segments_BL[segments_BL > 0])
    longest = max((int((segments_BL == i).sum(axis=1).max()) for i in ids), default=0)
    if longest > config.max_length:
        raise UserError(
            f"{name} has a text of {longest} tokens, but the model's max_length is "
            f"{config.max_length}: shorten it"
        )


def language_model(config: ModelConfig, what: str) -> None:
    """Refuses models that do not predict the next token; `what` needs one that does."""
    if config.head != "lm" or not config.causal:
        raise UserError(
            f"{what} needs a model that predicts the next token: this one is of family "
            f"{config.family!r} with head={config.head!r}"
        )


def routing_of(model: Any, routing: Any) -> None:
    """Refuses a routing other than dense, by name or as an object, for a dense model."""
    name = routing if isinstance(routing, str) else type(routing).__name__.lower()
    if model.lte is None and routing is not None and name != "dense":
        raise UserError(
            f"routing={routing!r}: this model is dense, without experts to choose from: leave it "
            "out, or give the model experts first (lte_jax.moefy, or training)"
        )


def array(value: Any, name: str) -> Any:
    """Arrays unchanged; lists converted to an array.

    Raises:
      UserError: if rows differ in length, and on text.
    """
    first = next(iter(value), None) if isinstance(value, list | tuple) else value
    if isinstance(first, str):
        raise UserError(
            f"{name} is text: expected token ids, such as those of "
            "lte_jax.load_tokenizer(path)(texts)['input_ids']"
        )
    if isinstance(value, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        return value
    try:
        return np.asarray(value)
    except ValueError:
        raise UserError(
            f"{name} has rows of different lengths: pad them to one length and pass a mask, "
            "True at real tokens"
        ) from None


def threshold(value: Any, num_layers: int) -> None:
    """Refuses anything but numbers in [0, 1], one or one a layer; None: the model's own.

    0 runs all experts.
    """
    if value is None or isinstance(value, jax.core.Tracer):
        return
    several = isinstance(value, list | tuple) or np.ndim(value) == 1
    right = len(value) == num_layers if several else True
    if not right or not all(map(_is_share, value if several else [value])):
        raise UserError(f"threshold={value!r}: expected one number in [0, 1], or one of each layer")


def _is_share(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    numeric = dtype is not None and not np.ndim(value) and jnp.issubdtype(dtype, jnp.number)
    return (numeric or is_number(value)) and 0 <= float(value) <= 1


def is_number(value: Any) -> bool:
    """Whether it is a single number; bools do not count."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def compute_dtype(value: Any) -> None:
    """Refuses dtypes that models do not compute in."""
    if not (isinstance(value, str) and value in COMPUTE_DTYPES):
        raise UserError(
            f"dtype={value!r}: a model computes in {' or '.join(COMPUTE_DTYPES)}; its parameters "
            "may be stored in another type"
        )


def seed(value: Any) -> None:
    """Refuses anything but 32 bits, which mean the same with and without 64-bit types."""
    integer("seed", value, 0, 2**32 - 1)


def integer(name: str, value: Any, least: int, most: int | None = None, words: str = "") -> None:
    """Refuses anything but an integer from `least` to `most`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bound = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{name}={value!r}: expected an integer {bound}{words}")


def finite_params(params: Mapping[str, Any], name: str) -> None:
    """Refuses parameters that are not finite; names the first one and the model."""
    finite = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree))(params)
    for path, good in jax.tree_util.tree_leaves_with_path(finite):
        if not good:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise UserError(
                f"model {name!r}: parameter {where} has values that are not finite: use the "
                "weights of a working model"
            )


def concrete(array: Any) -> np.ndarray | None:
    """The values of an array; None for tracers and arrays with shards in other processes."""
    if isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return np.asarray(array)


def _expect_integers(value: Any, name: str, words: str = "token ids", or_bool=False) -> None:
    dtype = getattr(value, "dtype", None)
    if dtype is None or not hasattr(value, "shape"):
        raise UserError(f"{name} is {type(value).__name__}: expected an array [B, L] of {words}")
    if not (jnp.issubdtype(dtype, jnp.integer) or or_bool and jnp.issubdtype(dtype, jnp.bool_)):
        raise UserError(f"{name} is {dtype}{list(value.shape)}: expected integers [B, L], {words}")
