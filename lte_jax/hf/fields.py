"""Typed reading of what a config.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lte_jax.errors import UserError

NULL = type(None)


class Fields:
    """Typed reading of an HF config that remembers which keys were asked for."""

    def __init__(self, raw: Mapping[str, Any], section: str = ""):
        self.raw = raw
        self.section = section
        self.asked: set[str] = set()

    def get(self, key: str, kinds: type | tuple[type, ...], *default: Any) -> Any:
        """The value of a key, which must be there if no default is given; null as `kinds` allow."""
        self.asked.add(key)
        if key not in self.raw:
            if not default:
                raise UserError(f"{self.section}{key} is missing: download or copy the file again")
            return default[0]
        value = self.raw[key]
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if value is None and (default == (None,) or NULL in kinds):
            return None
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(k.__name__ for k in kinds if k is not NULL)
            raise UserError(f"{self.section}{key}={value!r}: expected {expected}")
        return value

    def size(self, key: str, *default: int | None, nullable: bool = False) -> Any:
        """A positive integer, or None for null where that is allowed."""
        value = self.get(key, (int, NULL) if nullable else int, *default)
        if value is not None and value < 1:
            raise UserError(f"{key}={value}: expected a positive integer")
        return value
