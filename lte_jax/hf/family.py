"""What a family of models is: its config.json and its tensors, as data.

A file of families/ describes one family. Its config.json is read and written by the same keys and
parts, so what is imported one way cannot be exported another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from lte_jax.config import ModelConfig
from lte_jax.errors import UserError
from lte_jax.hf import labels
from lte_jax.hf.fields import Fields

Values = dict[str, Any]  # fields of ModelConfig
HEAD = ("head", "num_labels", "pooler")  # fields that say what stands on the last layer
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
    """A model_type of transformers.

    Attributes:
      model_type: as config.json spells it.
      architectures: head of ModelConfig -> class of transformers; the first where none is named.
      keys: field of ModelConfig -> key of config.json.
      parts: what takes several keys.
      tensors: path of params.py -> name and layout of its tensor, see hf/names.py.
      heads: head -> tensors that it names otherwise.
      prefix: of all tensors but the head's; a model without a head is stored without it.
      defaults: field -> default, where it is not that of the key.
      fixed: field -> value, or function of those read: fields without a key.
      ignored: keys that repeat what is fixed.
      expects: keys with one valid value, which is the default.
      constants: pattern of names of tensors that are no parameters.
      renamed: pattern -> replacement, in names that old checkpoints have.
    """

    model_type: str
    architectures: Mapping[str, str]
    keys: Mapping[str, Key]
    parts: tuple[Part, ...]
    tensors: Mapping[str, tuple[str, str]]
    heads: Mapping[str, Mapping[str, tuple[str, str]]] = dataclasses.field(default_factory=dict)
    prefix: str = "model."
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    expects: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constants: str = r"$^"
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def read(self, fields: Fields) -> ModelConfig:
        """The model that config.json describes."""
        named = fields.get("architectures", list, None) or [None]
        head = next((h for h, name in self.architectures.items() if name == named[0]), None)
        values: Values = {"family": self.model_type}
        values["head"] = head or next(iter(self.architectures))
        for field, key in self.keys.items():
            default = self.defaults.get(field, key.default)
            value = key.read(fields, key.name, *(() if default is REQUIRED else (default,)))
            values[field] = key.null(values) if value is None and key.null else value
        for part in self.parts:
            values |= part.read(fields, values)
        values |= labels.read(fields, values)
        for field, value in self.fixed.items():
            values[field] = value(values) if callable(value) else value
        for name, value in self.expects.items():
            if fields.get(name, (object, bool), value) not in (value, None):
                raise fields.wrong(name, f"{value!r}, as no other is supported")
        fields.asked |= {"model_type", *self.ignored}
        return ModelConfig(**values)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys of config.json that say `config`."""
        raw = {"model_type": self.model_type} | self.write_head(config)
        for field, key in self.keys.items():
            raw[key.name] = key.write(getattr(config, field))
        for part in self.parts:
            raw |= part.write(config)
        return raw

    def write_head(self, config: ModelConfig) -> dict[str, Any]:
        """The keys that name the head.

        Raises:
          UserError: if the family has no such head.
        """
        if config.head not in self.architectures:
            raise UserError(
                f"head={config.head!r} has no HF export with family={self.model_type!r}: valid are "
                f"{', '.join(self.architectures)}"
            )
        return {"architectures": [self.architectures[config.head]]} | labels.write(config)

    def names(self, config: ModelConfig) -> dict[str, tuple[str, str]]:
        """Name and layout of the tensor of each path, in a checkpoint of this model."""
        named = {**self.tensors, **self.heads.get(config.head, {})}
        if config.head != "none":
            return named
        return {path: (n.removeprefix(self.prefix), layout) for path, (n, layout) in named.items()}
