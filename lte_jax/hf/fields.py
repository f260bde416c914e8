"""Typed reading of the keys of a config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lte_jax.config import Activation
from lte_jax.errors import UserError

NULL = type(None)
DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS: dict[str, Activation] = {  # export writes the first of each kind
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
}
_MAX_EOS_IDS = 100
MAX_SIZE = 2**31 - 1  # JAX's index type
MAX_LAYERS = 2**14  # 40 times the deepest known


class Fields:
    """Typed reading of an HF config that remembers which keys were asked for."""

    def __init__(self, raw: Mapping[str, Any], section: str = ""):
        self.raw = raw
        self.section = section
        self.asked: set[str] = set()

    def get(self, key: str, kinds: type | tuple[type, ...], *default: Any) -> Any:
        """The value of a key, required if no default is given; null only as `kinds` allow."""
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
            raise self.wrong(key, expected)
        return value

    def size(
        self, key: str, *default: int | None, nullable: bool = False, most: int = MAX_SIZE
    ) -> Any:
        """A positive integer, or None for null where that is allowed."""
        value = self.get(key, (int, NULL) if nullable else int, *default)
        if value is not None and not 1 <= value <= most:
            raise self.wrong(key, f"a positive integer, at most {most:,}")
        return value

    def positive(self, key: str, *default: float | None) -> Any:
        """A finite number above zero; None only where that is the default."""
        value = self.get(key, (float, int), *default)
        if value is not None and not (0 < value <= 1e30 and math.isfinite(value)):
            raise self.wrong(key, "a positive number")
        return None if value is None else float(value)

    def flag(self, key: str, *default: bool) -> bool:
        """true or false."""
        return self.get(key, bool, *default)

    def activation(self, key: str, *default: str) -> Activation:
        """The name of an activation function."""
        name = self.get(key, str, *default)
        if name not in ACTIVATIONS:
            valid = ", ".join(ACTIVATIONS)
            raise UserError(f"{key}={name!r} is not supported: valid are {valid}")
        return ACTIVATIONS[name]

    def token_id(self, key: str, default: int | None) -> int | None:
        """A token id or null, which old folders spell -1; some have it in a list of one."""
        value = self.get(key, (int, list, NULL), default)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if value is not None and type(value) is not int:
            raise self.wrong(key, "one integer")
        return None if value == -1 else value

    def token_ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """A token id, a list of them, or null."""
        value = self.get(key, (int, list, NULL), default)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if len(ids) > _MAX_EOS_IDS:
            raise UserError(f"{key} has {len(ids)} entries: expected at most {_MAX_EOS_IDS}")
        if not all(type(i) is int for i in ids):
            raise self.wrong(key, "an integer or a list of them")
        return ids

    def wrong(self, key: str, expected: str) -> UserError:
        """The error that says what was expected of a key."""
        return UserError(f"{self.section}{key}={self.raw[key]!r}: expected {expected}")
