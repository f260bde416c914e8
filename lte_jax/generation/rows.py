"""The rows of a cache as texts come and go: moved, and put into another cache.

Dimension key: R rows  T places of the cache
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from lte_jax.attention import Cache


@functools.partial(jax.jit, static_argnames="size")
def moved(cache: Cache, rows_R: Array, shift: Array, *, size: int) -> Cache:
    """These rows (-1: an empty one) of a cache, `shift` places further right, of `size` places."""
    old = cache["segments"].shape[1]
    slots_T = jnp.arange(size) - shift
    there_RT = (rows_R >= 0)[:, None] & ((slots_T >= 0) & (slots_T < old))[None]
    rows_R1, slots_1T = jnp.maximum(rows_R, 0)[:, None], jnp.clip(slots_T, 0, old - 1)[None]
    found = {name: cache[name][:, rows_R1, slots_1T] for name in ("k", "v")}
    for name in ("segments", "positions"):
        found[name] = jnp.where(there_RT, cache[name][rows_R1, slots_1T], 0)
    return found | {"index": cache["index"] + shift}


@functools.partial(jax.jit, donate_argnames="cache")
def joined(cache: Cache, row: Array, one: Cache, shift: Array) -> Cache:
    """The cache with another one's only row, `shift` places further right, in place of a row."""
    own = moved(one, jnp.zeros(1, jnp.int32), shift, size=cache["segments"].shape[1])
    parts = {name: cache[name].at[:, row].set(own[name][:, 0]) for name in ("k", "v")}
    parts |= {name: cache[name].at[row].set(own[name][0]) for name in ("segments", "positions")}
    return cache | parts
