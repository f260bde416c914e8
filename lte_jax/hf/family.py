"""What a family of models is: its config.json and its tensors, as data.

A file of families/ describes one family. Its config.json is read and written by the same keys and
parts, so what is imported one way cannot be exported another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from lte_jax.config import ModelConfig
from lte_jax.hf.fields import Fields

Values = dict[str, Any]  # fields of ModelConfig
REQUIRED: Any = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json that holds one field of ModelConfig."""

    name: str
    read: Callable[..., Any]  # (fields, name, default): a method of Fields
    default: Any = REQUIRED  # what transformers assumes if the key is absent
    null: Callable[[Values], Any] | None = None  # from the fields read so far, in place of null
    write: Callable[[Any], Any] = lambda value: value


@runtime_checkable
class Part(Protocol):
    """Several keys of config.json that together hold several fields."""

    def read(self, fields: Fields, values: Values) -> Values:
        """The fields; `values` are those read so far."""
        ...

    def write(self, config: ModelConfig) -> Mapping[str, Any]:
        """The keys of config.json."""
        ...


@dataclasses.dataclass(frozen=True)
class Family:
    """A model_type of transformers."""

    model_type: str
    architecture: str  # the class of transformers that config.json names
    keys: Mapping[str, Key]  # by field of ModelConfig
    parts: tuple[Part, ...]
    tensors: Mapping[str, tuple[str, str]]  # by path of params.py: see hf/names.py
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # in place of the keys'
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # fields without a key
    ignored: tuple[str, ...] = ()  # keys that repeat what is fixed

    def read(self, fields: Fields) -> ModelConfig:
        """The model that config.json describes."""
        values: Values = {"family": self.model_type, **self.fixed}
        for field, key in self.keys.items():
            default = self.defaults.get(field, key.default)
            value = key.read(fields, key.name, *(() if default is REQUIRED else (default,)))
            values[field] = key.null(values) if value is None and key.null else value
        for part in self.parts:
            values |= part.read(fields, values)
        fields.asked |= {"model_type", *self.ignored}
        return ModelConfig(**values)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of config.json that say `config`."""
        raw = {"architectures": [self.architecture], "model_type": self.model_type}
        for field, key in self.keys.items():
            raw[key.name] = key.write(getattr(config, field))
        for part in self.parts:
            raw |= part.write(config)
        return raw
