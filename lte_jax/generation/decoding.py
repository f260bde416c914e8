"""The compiled parts of generation: prefill, and the loop that decodes token by token.

Dimension key: B batch  L prompt length  E experts  N layers  V vocabulary  S new tokens
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lte_jax import layers, reading
from lte_jax import routing as routings
from lte_jax.attention import Cache
from lte_jax.config import own_threshold
from lte_jax.kernels import reads_prompts, resolve
from lte_jax.kernels.quantized import Quantized
from lte_jax.model import Transformer, decode, init_cache
from lte_jax.selection import Routing, first_largest, largest

LIKELIEST = 1024  # tokens among which top_p is looked for first
AT_ONCE = 512  # tokens of a prompt that are read together, at most
_LEAST_CACHE, _LEAST = 256, 32  # tokens that a cache has place for, and those read together
_static = functools.partial(flax.struct.field, pytree_node=False)


@flax.struct.dataclass
class DecodeState:
    """A batch during generation."""

    # Any, because abstract values may stand in for the arrays.
    tokens_B: Any  # chosen last, not yet read by the model
    done_B: Any  # bool: an end-of-text token has been chosen
    step: Any  # int32, tokens chosen so far
    key: Any
    read: Any  # float32: share of experts read, mean over layers, summed over steps
    cache: Cache | Any
    finite: Any  # bool: the logits of all tokens chosen so far were finite

    @classmethod
    def start(cls, cache: Cache, key: Array) -> DecodeState:
        """The state before the first token is chosen."""
        zeros_B = jnp.zeros(len(cache["segments"]), jnp.int32)
        return cls(zeros_B, zeros_B > 0, jnp.int32(0), key, jnp.float32(0), cache, jnp.bool_(True))


@flax.struct.dataclass
class Decoder:
    """A model and the settings of its decoding; `of` makes one.

    Programs are compiled for the static fields and for shapes; the scalars, float32, can change
    without recompiling.
    """

    # Any, as above.
    params: Any  # in the types they are used in
    threshold: Any
    temperature: Any
    top_p: Any
    model: Transformer = _static()
    routing: Routing = _static()
    implementation: str = _static()  # of the sparse FFN
    greedy: bool = _static()
    top_k: int | None = _static()
    nucleus: bool = _static()  # whether top_p < 1
    eos_ids: tuple[int, ...] = _static()

    @classmethod
    def of(
        cls,
        model: Transformer,
        params: Mapping[str, Any],
        routing: Routing | str | None = None,
        threshold: float | Any = None,
        *,
        implementation: str = "auto",
        temperature: float | Any = 0.0,
        top_k: int | Any = None,
        top_p: float | Any = None,
        eos_ids: tuple[int, ...] | None = None,
    ) -> Decoder:
        """A decoder with these settings of `generate`.

        Raises:
          UserError: on an unknown routing or implementation.
        """
        resolve(implementation)
        routing = routings.make(routing, model.config, model.lte)
        if threshold is None:
            threshold = own_threshold(model.lte)
        scalars = (threshold, temperature, 1.0 if top_p is None else top_p)
        return cls(
            computed(model, params),
            *(jnp.asarray(value, jnp.float32) for value in scalars),
            model=model,
            routing=routing,
            implementation=implementation,
            greedy=temperature == 0,
            top_k=top_k,
            nucleus=top_p is not None and top_p < 1,
            eos_ids=model.config.eos_ids if eos_ids is None else eos_ids,
        )

    def prefill(self, prompts: Sequence[np.ndarray], *, room: int, seed: int = 0) -> DecodeState:
        """The state after reading the prompts and choosing the first new token of each.

        `room` is the number of new tokens that the cache has place for.
        """
        tokens_BT, mask_BT, length, turn = laid_out(prompts, room)
        return self._prefill(tokens_BT, mask_BT, length, jax.random.key(seed), turn=turn)

    @functools.partial(jax.jit, static_argnames="turn")
    def _prefill(self, tokens_BT, mask_BT, length, key, turn: int) -> DecodeState:
        cache = init_cache(self.model, *tokens_BT.shape)
        logits_BV, cache = self.read(tokens_BT, mask_BT, length, cache, turn)
        return self._choose(DecodeState.start(cache, key), logits_BV, cache)

    def read(
        self,
        tokens_BT: Array,
        mask_BT: Array,
        length: Array | int,
        cache: Cache,
        turn: int,
        known: Array | int = 0,
    ) -> tuple[Array, Cache]:
        """Reads prompts that end at `length`: the logits [B, V] after them, the cache with them.

        The cache has the first `known` places already, less than all.
        They are read in turns of `turn` tokens, of which the second may begin within the first:
        memory grows with their length and not with its square, and one program reads prompts of
        any length. Where the kernels are best at it, they read the active experts alone; else all
        experts are computed.
        """
        stack = self.stack()
        if stack is not None:
            by_kernels = reads_prompts(self.implementation, stack[1]["layers"]["ffn"]["up"])
            stack = stack if by_kernels else None

        count = -(-(length - known) // turn)

        def some(i: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
            start = jnp.maximum(0, length - (count - i) * turn).astype(jnp.int32)
            cache = carry[1] | {"index": start}
            tokens_BL, mask_BL = (
                jax.lax.dynamic_slice_in_dim(jnp.asarray(x), start, turn, axis=1)
                for x in (tokens_BT, mask_BT)
            )
            if stack is None:
                out = self.apply(tokens_BL, cache, mask=mask_BL)
            else:
                how = {"segments_BL": mask_BL, "live_BL": mask_BL > 0}
                out = self._decode(stack, tokens_BL, cache, **how)
            return out.logits[:, -1], out.cache

        logits_BV = jnp.zeros((len(tokens_BT), self.model.config.vocab_size), jnp.float32)
        return jax.lax.fori_loop(0, count, some, (logits_BV, cache))

    def _decode(self, stack: Any, tokens_BL: Array, cache: Cache, **how: Array) -> layers.Output:
        settings = {"routing": self.routing, "threshold": self.threshold} | how
        settings["implementation"] = self.implementation
        return decode(self.model, stack, tokens_BL, cache, **settings)

    @functools.partial(jax.jit, static_argnames="size")
    def extend(self, state: DecodeState, limit: Array, size: int) -> tuple[Array, DecodeState]:
        """Up to `limit` more tokens of each row, at most `size`; stops once all rows are done.

        Returns:
          tokens_BS: int32 [B, size]; -1 after a row's end and beyond `limit`.
          the state after them.
        """
        return self._extended(state, limit, size)

    @functools.partial(jax.jit, static_argnames="size", donate_argnames="state")
    def go_on(self, state: DecodeState, limit: Array, size: int) -> tuple[Array, DecodeState]:
        """As `extend`, in the memory of `state`, which is used up: the cache is not copied."""
        return self._extended(state, limit, size)

    def _extended(self, state: DecodeState, limit: Array, size: int) -> tuple[Array, DecodeState]:
        stack = self.stack()

        def more(carry):
            i, state, _ = carry
            return (i < jnp.minimum(limit, size)) & ~jnp.all(state.done_B) & state.finite

        def one(carry):
            i, before, tokens_BS = carry
            logits_BV, cache, read = self.step(stack, before)
            state = self._choose(before, logits_BV, cache)
            state = state.replace(read=state.read + read)
            chosen_B = jnp.where(before.done_B, -1, state.tokens_B)
            return i + 1, state, tokens_BS.at[:, i].set(chosen_B)

        tokens_BS = jnp.full((state.tokens_B.size, size), -1, jnp.int32)
        _, state, tokens_BS = jax.lax.while_loop(more, one, (jnp.int32(0), state, tokens_BS))
        return tokens_BS, state

    def stack(self) -> Any:
        """The parameters for `step`; None for a routing that the kernels do not support."""
        routing = self.routing
        if not routing.skips or routing.weighs or routing.reads_neurons:
            return None
        return reading.stacked(self.model.config, self.params, jnp.dtype(self.model.dtype))

    def step(self, stack: Any, state: DecodeState) -> tuple[Array, Cache, Array]:
        """Logits [B, V] after `state.tokens_B`, the cache with it, the share of experts read.

        `stack` is from `stack()`; if it is None, all experts are read.
        """
        if stack is None:
            out = self.apply(state.tokens_B[:, None], state.cache)
            return out.logits[:, 0], out.cache, jnp.ones((), jnp.float32)
        live_B = ~state.done_B
        out = self._decode(stack, state.tokens_B[:, None], state.cache, live_BL=live_B[:, None])
        if out.active is None:
            return out.logits[:, 0], out.cache, jnp.any(live_B).astype(jnp.float32)
        used_NE = jnp.any(out.active[:, :, 0] & live_B[None, :, None], axis=1)
        return out.logits[:, 0], out.cache, jnp.mean(used_NE, dtype=jnp.float32)

    def apply(self, tokens_BL, cache: Cache, mask=None) -> layers.Output:
        """The forward pass, all experts computed, which extends the cache."""
        settings = {"routing": self.routing, "threshold": self.threshold, "cache": cache}
        return self.model.apply({"params": self.params}, tokens_BL, mask=mask, **settings)

    def _choose(self, state: DecodeState, logits_BV: Array, cache: Cache) -> DecodeState:
        """The state with each row's next token chosen; rows that are done stay as they are."""
        if self.greedy:
            tokens_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        else:
            keys_B = jax.vmap(
                lambda b: jax.random.fold_in(jax.random.fold_in(state.key, b), state.step)
            )(jnp.arange(logits_BV.shape[0]))
            allowed_BV = self.allowed_logits(logits_BV)
            tokens_B = jax.vmap(jax.random.categorical)(keys_B, allowed_BV).astype(jnp.int32)
        tokens_B = jnp.where(state.done_B, state.tokens_B, tokens_B)
        finite_B = jnp.all(jnp.isfinite(logits_BV), axis=-1) | state.done_B
        finite, done_B = state.finite & jnp.all(finite_B), state.done_B
        for eos in self.eos_ids:
            done_B |= tokens_B == eos
        return DecodeState(tokens_B, done_B, state.step + 1, state.key, state.read, cache, finite)

    def allowed_logits(self, logits_BV: Array) -> Array:
        """Logits over temperature, -inf at tokens that top_k and then top_p exclude.

        Of equally likely tokens, those of lowest id stay.
        """
        logits_BV = logits_BV / self.temperature
        if self.top_k is not None and self.top_k < logits_BV.shape[-1]:
            logits_BV = jnp.where(largest(logits_BV, self.top_k), logits_BV, -jnp.inf)
        if self.nucleus:
            kept_BV = first_largest(logits_BV, *_nucleus(logits_BV, self.top_p))
            logits_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
        return logits_BV


def _nucleus(logits_BV: Array, top_p: Array) -> tuple[Array, Array]:
    """The smallest logit among the fewest that have probability top_p together; their number.

    A sort of a large vocabulary takes as long as some layers: it is done only if the LIKELIEST
    tokens have too little.
    """
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)

    def fewest(sorted_BC: Array) -> tuple[Array, Array, Array]:
        probs_BC = jnp.exp(sorted_BC - total_B1)
        sums_BC = jnp.cumsum(probs_BC, axis=-1)
        before_BC = sums_BC - probs_BC  # mass of all likelier tokens
        count_B1 = jnp.sum(before_BC < top_p, axis=-1, keepdims=True, dtype=jnp.int32)
        count_B1 = jnp.maximum(count_B1, 1)  # a tiny top_p is 0 in float32
        least_B1 = jnp.take_along_axis(sorted_BC, count_B1 - 1, axis=-1)
        return least_B1, count_B1, jnp.all(sums_BC[:, -1:] >= top_p)

    def of_all() -> tuple[Array, Array]:
        return fewest(jnp.sort(logits_BV, axis=-1, descending=True))[:2]

    if logits_BV.shape[-1] <= LIKELIEST:
        return of_all()
    least_B1, count_B1, enough = fewest(jax.lax.top_k(logits_BV, LIKELIEST)[0])
    return jax.lax.cond(enough, lambda: (least_B1, count_B1), of_all)


def computed(model: Transformer, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters in the types they are used in, so that no step converts them again.

    Routers are float32, all else is of the model's type; what has its type is not copied.
    """

    def convert(path, leaf):
        if isinstance(leaf, Quantized):
            return leaf
        is_router = any(getattr(key, "key", None) == "router" for key in path)
        return jnp.asarray(leaf, jnp.float32 if is_router else model.dtype)

    return jax.tree.map_with_path(convert, params, is_leaf=lambda x: isinstance(x, Quantized))


def laid_out(
    prompts: Sequence[np.ndarray], room: int, least: int = _LEAST_CACHE
) -> tuple[np.ndarray, np.ndarray, np.int32, int]:
    """What `Decoder.read` reads: tokens and mask [B, T], where prompts end, and tokens a turn.

    T is a power of two, at least `least`, and has place for `room` more tokens.
    """
    longest = max(map(len, prompts))
    size = round_up(longest + room, least)
    if _turn(size) + room > size:  # what is read is a turn or more
        size *= 2
    turn = _turn(size)
    length = max(longest, turn)
    return *pad_left(prompts, length, size), np.int32(length), turn


def pad_left(
    prompts: Sequence[np.ndarray], length: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The prompts as tokens [B, size] that end at `length`, and a mask, 1 at real tokens; int32."""
    tokens_BT = np.zeros((len(prompts), size), np.int32)
    mask_BT = np.zeros_like(tokens_BT)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, length - len(prompt) : length] = prompt
        mask_BT[row, length - len(prompt) : length] = 1
    return tokens_BT, mask_BT


def round_up(count: int, least: int = _LEAST) -> int:
    """The next power of two, so that few programs are compiled; at least `least`."""
    return max(least, 1 << (count - 1).bit_length())


def _turn(size: int) -> int:
    """Tokens a turn: few enough that padding is little, and enough to be read fast."""
    return min(AT_ONCE, max(_LEAST, size // 4))
