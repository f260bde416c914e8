"""Keys and values of texts that have ended, for those that begin as they do: a chat's next turn.

Dimension key: T places of the cache
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from lte_jax.attention import Cache

_LEAST = 16  # tokens: to read fewer again costs less than to keep them


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """A text's first tokens, and a cache of one row with them from place 0 on."""

    tokens: np.ndarray
    cache: Cache

    @property
    def places(self) -> int:
        """T."""
        return self.cache["segments"].shape[1]


class Prefixes:
    """Those used last, of so many places together."""

    def __init__(self, places: int):
        self.places = places
        self._kept: collections.deque[Prefix] = collections.deque()  # the one used last at the end

    def __len__(self) -> int:
        return len(self._kept)

    def wants(self, tokens: int, places: int) -> bool:
        """Whether it would keep so many tokens, in a cache of so many places."""
        return tokens >= _LEAST and places <= self.places

    def add(self, prefix: Prefix) -> None:
        """Keeps a text, in place of what it begins with, and of what was used longest ago."""
        again = [old for old in self._kept if shared(old.tokens, prefix.tokens) == len(old.tokens)]
        for old in again:
            self._kept.remove(old)
        self._kept.append(prefix)
        while sum(one.places for one in self._kept) > self.places:
            self._kept.popleft()

    def of(self, prompt: np.ndarray) -> tuple[int, Prefix | None]:
        """The text that begins most like a prompt, and how many tokens they share.

        The prompt's last token is never among them: it has to be read, for what follows it.
        """
        best, most = None, _LEAST - 1
        for one in self._kept:
            count = shared(one.tokens, prompt[:-1])
            if count > most:
                best, most = one, count
        if best is None:
            return 0, None
        self._kept.remove(best)
        self._kept.append(best)
        return most, best


def shared(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens they begin with alike."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if differs.size else length
