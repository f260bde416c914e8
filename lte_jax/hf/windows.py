"""Which layers have a sliding window: `sliding_window`, `layer_types` and others in config.json."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from lte_jax.config import ModelConfig
from lte_jax.errors import UserError
from lte_jax.hf.family import Values
from lte_jax.hf.fields import NULL, Fields

_KINDS = {"full_attention": False, "sliding_attention": True}


@dataclasses.dataclass(frozen=True)
class Windows:
    """The layers of a family that have a window: none, all, or some, as config.json says."""

    # "some": by the keys of Qwen2; "named": by layer_types, else all but each of number `every`.
    layers: Literal["none", "all", "some", "named"]
    default: int | None = 4096  # window, where the key is absent
    every: int = 0  # 0: all

    def read(self, fields: Fields, values: Values) -> Values:
        """The window and which layers have it (None: all), as in transformers' masks."""
        named = _named(fields, values["num_layers"])
        window = None
        if self.layers != "none":
            window = fields.size("sliding_window", self.default, nullable=True)
        if self.layers == "some":
            return self._some(fields, values["num_layers"], window, named)
        if self.layers == "named":
            return self._named(fields, values["num_layers"], window, named)
        if named is not None and set(named) != {window is not None}:
            raise UserError(
                f"layer_types has other kinds than the masks of a {values['family']} with "
                f"sliding_window={window}: make them agree"
            )
        return {"sliding_window": window, "sliding_layers": None}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys for this model."""
        window = config.sliding_window
        if self.layers == "all":
            return {"sliding_window": window}
        if self.layers == "named" and window is None:
            return {"sliding_window": None, "layer_types": ["full_attention"] * config.num_layers}
        if self.layers == "none" or window is None:
            return {}
        slides = config.sliding_layers or (True,) * config.num_layers
        kinds = [kind for s in slides for kind in _KINDS if _KINDS[kind] == s]
        if self.layers == "named":
            return {"sliding_window": window, "layer_types": kinds}
        first = slides.index(True) if True in slides else config.num_layers
        return {
            "use_sliding_window": True,
            "sliding_window": window,
            "max_window_layers": first,
            "layer_types": kinds,
        }

    def _some(self, fields: Fields, num_layers: int, window: Any, named: Any) -> Values:
        if not fields.get("use_sliding_window", bool, False):
            window = None
        first = fields.get("max_window_layers", int if window and not named else (int, NULL), 28)
        slides = named or tuple(window is not None and i >= first for i in range(num_layers))
        return _checked(slides, window, "use_sliding_window is not true or ")

    def _named(self, fields: Fields, num_layers: int, window: Any, named: Any) -> Values:
        every = self.every and fields.size("sliding_window_pattern", self.every)
        if named is None:
            named = tuple(not every or (i + 1) % every != 0 for i in range(num_layers))
            named = named if window is not None else (False,) * num_layers
        return _checked(named, window)


def _checked(slides: tuple[bool, ...], window: int | None, cause: str = "") -> Values:
    """The fields of layers of which these have the window."""
    if any(slides) and window is None:
        raise UserError(
            f"layer_types has sliding_attention, but {cause}sliding_window is null: make them agree"
        )
    return {
        "sliding_window": window if any(slides) else None,
        "sliding_layers": None if all(slides) or not any(slides) else slides,
    }


def _named(fields: Fields, num_layers: int) -> tuple[bool, ...] | None:
    """What layer_types says of each layer."""
    kinds = fields.get("layer_types", list, None)
    if kinds is None:
        return None
    if len(kinds) != num_layers:
        raise UserError(f"layer_types has {len(kinds)} entries for num_hidden_layers={num_layers}")
    if unknown := [kind for kind in kinds if kind not in tuple(_KINDS)]:
        raise UserError(f"layer_types has {unknown[0]!r}: valid are {', '.join(_KINDS)}")
    return tuple(_KINDS[kind] for kind in kinds)
