"""Texts that come and go, continued together: each is a row of one cache, all by a token a step.

    engine = Engine(model, params, rows=8)
    texts = [engine.add(prompt, max_new_tokens=50) for prompt in prompts]
    while engine.step():
        pass
    texts[0].new  # token ids

All rows write at one place of the cache, which moves on with every step. So a text that joins is
laid to end there, wherever that makes it begin, and what stands before it is not seen; positions
count a text's own tokens. Rows and places are powers of two, as few as the texts need: whenever
they do not fit any more, or leave most of the cache empty, its rows are moved. A text's tokens do
not depend on the others. What a text leaves behind is kept for a while (prefixes.py): of a prompt
that begins alike, as a chat's next turn does, only the rest is read.

Dimension key: B rows  T places of the cache  V vocabulary
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lte_jax import checks
from lte_jax.attention import Cache
from lte_jax.errors import Given, UserError
from lte_jax.generation.decoding import Decoder, DecodeState, laid_out, round_up
from lte_jax.generation.prefixes import Prefix, Prefixes
from lte_jax.generation.rows import joined, moved
from lte_jax.generation.tokens import check, ends_of, prompts_of
from lte_jax.model import Transformer, init_cache
from lte_jax.routing import dial

_LEAST_PLACES = 64


@dataclasses.dataclass(eq=False)
class Text:
    """A prompt, how to continue it, and what follows it so far."""

    prompt: np.ndarray
    max_new_tokens: int
    temperature: float
    top_p: float
    key: np.ndarray  # data of a key of random numbers
    eos_ids: tuple[int, ...]
    new: list[int] = dataclasses.field(default_factory=list)
    reused: int = 0  # tokens of the prompt that were not read, as another text had them
    # Why it ended: an end of text, enough tokens, `drop`, logits that are not finite, `give_up`.
    end: Literal["stop", "length", "dropped", "not finite", "failed"] | None = None

    @property
    def total(self) -> int:
        """The tokens it may come to."""
        return len(self.prompt) + self.max_new_tokens

    @property
    def length(self) -> int:
        """Its tokens in the cache, which has all but the one chosen last."""
        return len(self.prompt) + len(self.new) - 1

    @property
    def done(self) -> bool:
        """Whether it came to an end of its own."""
        return self.end in ("stop", "length")

    def take(self, token: int, finite: bool) -> None:
        """One more token, unless the logits were not finite; ends the text where that is due."""
        if not finite:
            self.end = "not finite"
            return
        self.new.append(token)
        if token in self.eos_ids:
            self.end = "stop"
        elif len(self.new) == self.max_new_tokens:
            self.end = "length"


class Engine:
    """Continues texts that come and go. Of one thread."""

    def __init__(
        self,
        model: Transformer,
        params: Mapping[str, Any],
        *,
        rows: Given[int] = 8,
        places: Given[int | None] = None,
        kept: Given[int | None] = None,
        routing: Any = None,
        threshold: Given[float | None] = None,
        sparsity: Given[float | None] = None,
        implementation: Given[str] = "auto",
    ):
        """An engine without texts.

        Args:
          model: a decoder, dense or LTE, as from `lte_jax.load`.
          params: its parameters.
          rows: texts that are continued together, at most; others wait.
          places: tokens that the cache has place for, over all rows, each of which takes as many as
            the longest text may come to. None: 1,024 a row, or one text as long as the model reads.
          kept: tokens of texts that have ended whose keys and values are kept beside these, for
            prompts that begin alike; None: half of `places`.
          routing: as in `lte_jax.generate`.
          threshold: likewise.
          sparsity: likewise.
          implementation: likewise.

        Raises:
          UserError: on a model that writes no text, and settings that make no sense.
        """
        checks.model(model, params)
        checks.language_model(model.config, "Engine")
        checks.routing_of(model, routing)
        checks.threshold(threshold, model.config.num_layers)
        checks.integer("rows", rows, 1)
        if places is None:
            places = max(1024 * rows, round_up(model.config.max_length))
        checks.integer("places", places, _LEAST_PLACES)
        kept = places // 2 if kept is None else kept
        checks.integer("kept", kept, 0)
        threshold = dial(model.lte, routing, threshold, sparsity)
        self.decoder = Decoder.of(
            model, params, routing, threshold, temperature=1.0, implementation=implementation
        )
        self.rows, self.places = rows, places
        self.waiting: collections.deque[Text] = collections.deque()
        self.steps, self.read = 0, 0.0  # steps so far, and the sum of the shares of experts read
        self._table: list[Text | None] = []  # the text of each row
        self._cache: Cache | None = None
        self._index = 0  # where the next token is written
        self._prefixes = Prefixes(kept)

    @property
    def running(self) -> list[Text]:
        """The texts that are being continued."""
        return [text for text in self._table if text is not None]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and places of the cache as it is."""
        cache = self._cache  # another thread may ask, for figures
        return (0, 0) if cache is None else cache["segments"].shape

    def add(self, prompt: Any, **settings: Any) -> Text:
        """A text to be continued, which waits for a row; the arguments are those of `text`."""
        text = self.text(prompt, **settings)
        self.waiting.append(text)
        return text

    def text(
        self,
        prompt: Any,
        *,
        max_new_tokens: Given[int],
        temperature: Given[float] = 0.0,
        top_p: Given[float | None] = None,
        seed: Given[int] = 0,
        eos_ids: Given[Iterable[int] | None] = None,
    ) -> Text:
        """A text for `waiting`, whose tokens will be those of `lte_jax.generate` alone.

        That is of `generate(model, params, [prompt], ...)` with these settings, up to the rounding
        of sums. Any thread may call it.

        Raises:
          UserError: as `generate` does; and for a text that would never find place.
        """
        config = self.decoder.model.config
        [ids] = prompts_of([prompt], None, config.vocab_size)
        sampling = {"temperature": temperature, "top_k": None, "top_p": top_p}
        check(config, [ids], max_new_tokens, seed, threshold=None, stream=None, **sampling)
        ends = ends_of(config, eos_ids)
        text = Text(
            ids,
            int(max_new_tokens),
            float(temperature),
            1.0 if top_p is None else float(top_p),
            np.asarray(jax.random.key_data(jax.random.key(seed))),
            config.eos_ids if ends is None else ends,
        )
        if _places(text.total) > self.places:
            raise UserError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={max_new_tokens} need "
                f"{_places(text.total)} places: expected at most places={self.places}"
            )
        return text

    def drop(self, text: Text) -> None:
        """Ends a text; the next step does not compute it."""
        if text.end is None:
            text.end = "dropped"
        self._leave()

    def give_up(self) -> list[Text]:
        """Ends all texts, those that wait as well: after an error of a step. Returns them."""
        texts = [*self.running, *self.waiting]
        for text in texts:
            text.end = text.end or "failed"
        self._leave()
        return texts

    def step(self) -> list[Text]:
        """Continues all texts by a token, and lets one that waits join.

        Returns:
          The texts that have more tokens, or have ended; [] if there are none left.
        """
        new = self._join()
        stepped = self.running
        if stepped:
            self._advance()
        if new is not None and new not in stepped:  # its first token has ended it
            stepped.append(new)
        self._leave()
        return stepped

    def _join(self) -> Text | None:
        """Reads the prompt of the text that has waited longest, if there is place for it."""
        self._leave()
        if not self.waiting or len(self.running) == self.rows:
            return None
        text = self.waiting[0]
        rows, places = self._needed([*self.running, text])
        if self.running and rows * places > self.places:
            return None
        tokens_1T, mask_1T, length, turn = laid_out([text.prompt], 1, _LEAST_PLACES)
        text.reused, cache = self._start(text.prompt, int(length), tokens_1T.shape[1])
        operands = tokens_1T, mask_1T, length, np.int32(text.reused), cache
        logits_1V, cache = _read(self.decoder, *operands, turn=turn)
        token_1, finite_1 = _chosen(self.decoder, logits_1V, *_settings([text]))
        text.take(int(token_1[0]), bool(finite_1[0]))
        if text.done:
            self._keep(text, cache, 0, int(length))
        elif text.end is None:
            self._fit([*self.running, text])
            row = self._table.index(None)
            shift = np.int32(self._index - length)
            self._cache = joined(self._cache, np.int32(row), cache, shift)
            self._table[row] = text
        self.waiting.popleft()  # not before: after an error `give_up` must find it
        return text

    def _start(self, prompt: np.ndarray, length: int, places: int) -> tuple[int, Cache]:
        """How many tokens of a prompt are known, and a cache that has them."""
        known, prefix = self._prefixes.of(prompt)
        if prefix is None or length > len(prompt):  # a short one is laid elsewhere
            return 0, init_cache(self.decoder.model, 1, places)
        # What follows them is not seen: the prompt's other tokens, and new ones, are put over it.
        return known, moved(prefix.cache, np.zeros(1, np.int32), np.int32(0), size=places)

    def _keep(self, text: Text, cache: Cache, row: int, index: int) -> None:
        """Keeps what a text that ends at `index` has in a row of a cache."""
        tokens = np.array([*text.prompt, *text.new[:-1]], np.int32)
        places = _places(len(tokens))
        if self._prefixes.wants(len(tokens), places):
            shift = np.int32(len(tokens) - index)
            own = moved(cache, np.array([row], np.int32), shift, size=places)
            self._prefixes.add(Prefix(tokens, own))

    def _advance(self) -> None:
        if self._index == self.shape[1]:
            self._fit(self.running)
        assert self._cache is not None  # there are texts
        live_B = np.array([text is not None for text in self._table])
        tokens_B = np.array([text.new[-1] if text else 0 for text in self._table], np.int32)
        how = _settings(self._table)
        cache = self._cache | {"index": np.int32(self._index)}
        tokens_B, finite_B, read, self._cache = _step(self.decoder, cache, tokens_B, live_B, *how)
        self._index += 1
        self.steps, self.read = self.steps + 1, self.read + float(read)
        for text, token, finite in zip(self._table, tokens_B, finite_B, strict=True):
            if text is not None:
                text.take(int(token), bool(finite))
        for row, text in enumerate(self._table):
            if text is not None and text.done:
                self._keep(text, self._cache, row, self._index)

    def _leave(self) -> None:
        """Frees the rows of the texts that have ended, and most of the cache where few are left."""
        self._table = [t if t is not None and t.end is None else None for t in self._table]
        self.waiting = collections.deque(text for text in self.waiting if text.end is None)
        running = self.running
        if not running:
            self._table, self._cache, self._index = [], None, 0
        elif 4 * len(running) <= self.shape[0]:
            self._fit(running)

    def _needed(self, texts: list[Text]) -> tuple[int, int]:
        """Rows and places for these texts."""
        return 1 << (len(texts) - 1).bit_length(), _places(max(text.total for text in texts))

    def _fit(self, texts: list[Text]) -> None:
        """A cache for these texts, of which one may be without a row yet.

        Nothing is moved while they fit: the longest ends at the index, and the others beside it.
        """
        longest = max(text.length for text in texts)
        rows, places = self._needed(texts)
        has_rows, has_places = self.shape
        index = max(self._index, longest)
        fits = rows <= has_rows and places <= has_places and index < has_places
        if fits and index == self._index and 4 * len(texts) > has_rows:
            return
        if not fits or 4 * len(texts) <= has_rows:
            index = longest  # as far to the left as it goes
        else:
            rows, places = has_rows, has_places
        if self._cache is None:
            self._cache = init_cache(self.decoder.model, rows, places)
        order = [row for row, text in enumerate(self._table) if text is not None]
        filled = [*order, *[-1] * (rows - len(order))]
        shift = np.int32(index - self._index)
        self._cache = moved(self._cache, np.array(filled, np.int32), shift, size=places)
        self._table = [self._table[row] for row in order] + [None] * (rows - len(order))
        self._index = index


def _places(total: int) -> int:
    return round_up(total, _LEAST_PLACES)


def _settings(texts: list[Text | None]) -> tuple[np.ndarray, ...]:
    """Of each row: the key of its random numbers, tokens chosen so far, temperature, top_p."""
    none = (np.zeros(2, np.uint32), 0, 0.0, 1.0)
    of_rows = [(t.key, len(t.new), t.temperature, t.top_p) if t else none for t in texts]
    types = (np.uint32, np.int32, np.float32, np.float32)
    columns = zip(*of_rows, strict=True)
    return tuple(np.array(column, dtype) for column, dtype in zip(columns, types, strict=True))


@functools.partial(jax.jit, static_argnames="turn", donate_argnames="cache")
def _read(
    decoder: Decoder, tokens_1T, mask_1T, length, known, cache: Cache, *, turn: int
) -> tuple[Array, Cache]:
    """Logits [1, V] after a prompt, whose first `known` tokens the cache has, and all of it."""
    return decoder.read(tokens_1T, mask_1T, length, cache, turn, known)


@functools.partial(jax.jit, donate_argnames="cache")
def _step(decoder: Decoder, cache: Cache, tokens_B, live_B, *how):
    """A token more of each row; whether its logits were finite; the share of experts read."""
    # What a text left behind is seen by nobody, not even by the row it was in.
    segments_BT = jnp.where(live_B[:, None], cache["segments"], 0)
    state = DecodeState.start(cache | {"segments": segments_BT}, jax.random.key(0))
    state = state.replace(tokens_B=tokens_B, done_B=~live_B)
    logits_BV, cache, read = decoder.step(decoder.stack(), state)
    return *_chosen(decoder, logits_BV, *how), read, cache


@jax.jit
def _chosen(
    decoder: Decoder, logits_BV: Array, key_B2, count_B, temperature_B, top_p_B
) -> tuple[Array, Array]:
    """The next token of each row, and whether its logits are finite."""
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def sampled() -> Array:
        heat_B1 = jnp.where(temperature_B > 0, temperature_B, 1)[:, None]
        how = decoder.replace(temperature=heat_B1, top_p=top_p_B[:, None], nucleus=True)
        within_BV = how.allowed_logits(logits_BV)
        allowed_BV = jnp.where(top_p_B[:, None] < 1, within_BV, logits_BV / heat_B1)
        # The random numbers of `generate` for the first row of a batch.
        fold = jax.random.fold_in
        keys_B = jax.vmap(lambda key, i: fold(fold(jax.random.wrap_key_data(key), 0), i))(
            key_B2, count_B
        )
        return jax.vmap(jax.random.categorical)(keys_B, allowed_BV).astype(jnp.int32)

    sampled_B = jax.lax.cond(jnp.any(temperature_B > 0), sampled, lambda: likeliest_B)
    tokens_B = jnp.where(temperature_B > 0, sampled_B, likeliest_B)
    return tokens_B, jnp.all(jnp.isfinite(logits_BV), axis=-1)
