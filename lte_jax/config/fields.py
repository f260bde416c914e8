"""The types and ranges of config keys, checked whenever a config dataclass is made."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from flax import traverse_util
from ml_collections import ConfigDict

from lte_jax.errors import UserError, nearest

T = TypeVar("T")

# Keys of earlier versions and their present names; None: removed.
MOVED: Mapping[str, str | None] = {
    "source.compute_dtype": "compute.dtype",
    "source.remat": "compute.remat",
    "calibration_rows": "lte.calibration_records",
    "lte.calibration_rows": "lte.calibration_records",
    "data.max_validation_rows": "data.max_validation_records",
    "lte.seed": "seed",
    "name": None,
}


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a key may hold, as in Annotated[int, Range(...)].

    Integers must fit in 32 bits; floats must be finite in float32, the type they are used in.
    """

    holds: Callable[[Any], bool]
    expected: str  # in the words of an error message

    def expects(self, number: int | float) -> str:
        """What it expects in place of `number`; "" if the number is in range."""
        if isinstance(number, int):
            fits, limit = abs(number) < 2**31, ", and less than 2**31"
        else:
            number = ctypes.c_float(number).value
            fits, limit = math.isfinite(number), ", and finite in float32"
        return "" if fits and self.holds(number) else self.expected + limit * (not fits)


Count = Annotated[int, Range(lambda n: n >= 1, "a positive integer")]
Whole = Annotated[int, Range(lambda n: n >= 0, "zero or more")]
Length = Annotated[int, Range(lambda n: n >= 2, "2 or more: a token and its successor")]
Layers = Annotated[int, Range(lambda n: 1 <= n <= 10_000, "a positive integer, at most 10000")]
Axis = Annotated[int, Range(lambda n: n == -1 or n >= 1, "a positive integer, or -1: the rest")]
_ANY = Range(lambda x: True, "a number")
Finite = Annotated[float, _ANY]
Positive = Annotated[float, Range(lambda x: x > 0, "a positive number")]
NotNegative = Annotated[float, Range(lambda x: x >= 0, "zero or more")]
TopShare = Annotated[float, Range(lambda x: 0 < x <= 1, "within (0, 1]")]
Share = Annotated[float, Range(lambda x: 0 <= x <= 1, "within [0, 1]")]
Decay = Annotated[float, Range(lambda x: 0 <= x < 1, "in [0, 1)")]
Inside = Annotated[float, Range(lambda x: 0 < x < 1, "strictly between 0 and 1, such as 0.5")]
Target = Annotated[
    float,
    Range(
        lambda x: 0 < x < 1,
        "strictly between 0 and 1, such as 0.7 for 70%, or None: fixed efficiency_weight",
    ),
]


class Checked:
    """Base of the dataclasses in schema.py: checks each value against its type and range."""

    def __post_init__(self):
        for key, hint in _hints(type(self)).items():
            object.__setattr__(self, key, convert(hint, getattr(self, key), key))
        self._check_together()

    def _check_together(self) -> None:
        """Raises a UserError if values contradict each other."""


def to_config_dict(config: Any) -> ConfigDict:
    """The fields of a dataclass as a locked ConfigDict, for a configs/ file to change."""
    return ConfigDict(dataclasses.asdict(config), convert_dict=True).lock()


def from_mapping(cls: type[T], values: Mapping[str, Any] | ConfigDict, where: str = "config") -> T:
    """The dataclass `cls` with `values`; absent keys keep their defaults.

    Raises:
      UserError: on an unknown key (naming the nearest valid one), a missing key without a default,
        or a value of the wrong type or out of range; it names the key's dotted path.
    """
    hints, made = _hints(cls), {}
    for key, value in values.items():
        if key not in hints:
            raise unknown(f"{where}.{key}", nearest(str(key), hints))
        if (section := section_of(hints[key])) and isinstance(value, Mapping | ConfigDict):
            made[key] = from_mapping(section, value, f"{where}.{key}")
        else:
            made[key] = convert(hints[key], value, f"{where}.{key}")
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.name not in made and field.default is dataclasses.MISSING:
            raise UserError(f"{where}.{field.name} is missing: expected {spell(hints[field.name])}")
    try:
        return cls(**made)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def unknown(path: str, hint: str) -> UserError:
    """The error for an unknown key: its new name if it was renamed, else the `hint`."""
    old = path.removeprefix("config.")
    if old not in MOVED:
        return UserError(f"unknown key {path}: {hint}")
    if MOVED[old] is None:
        return UserError(f"{path} was removed: leave it out")
    return UserError(f"{path} was renamed to config.{MOVED[old]}")


def moved(values: dict[str, Any]) -> dict[str, Any]:
    """An Experiment's values as an earlier version wrote them, under this version's keys."""
    flat = traverse_util.flatten_dict(values, keep_empty_nodes=True)
    for old, new in MOVED.items():
        if (path := tuple(old.split("."))) in flat:
            value, path = flat.pop(path), tuple(new.split(".")) if new else ()
            if path and path[:-1] not in flat:  # or a damaged file has a value for the section
                flat.setdefault(path, value)
    return traverse_util.unflatten_dict(flat)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def options(hint: Any) -> tuple[Any, ...]:
    """The types that `A | B` allows; of a plain type, itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def section_of(hint: Any) -> Any:
    """The dataclass that a type allows as a value; None if it allows none."""
    return next(filter(dataclasses.is_dataclass, options(hint)), None)


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `hint`, or a UserError that names the key `where`.

    NumPy's numbers become Python's; a list becomes a tuple, a mapping a dict.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = convert(args[0], value, where)
        expected = args[1].expects(value)
    elif origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return convert(next(a for a in args if a is not type(None)), value, where)
    elif origin is Mapping and isinstance(value, Mapping):
        keys = {name: convert(args[0], name, f"{where} key") for name in value}
        return {keys[k]: convert(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    elif origin is Literal:
        known = any(type(value) is type(arg) and value == arg for arg in args)
        expected = "" if known else spell(hint)
    else:
        kind = {int: numbers.Integral, float: numbers.Real}.get(hint, hint)
        right = isinstance(kind, type) and isinstance(value, kind)
        expected = "" if right and (hint is bool or not isinstance(value, bool)) else spell(hint)
    if expected:
        try:
            shown = repr(value)
        except ValueError:  # Python refuses to write thousands of digits
            shown = "(thousands of digits)"
        raise UserError(f"{where}={shown}: expected {expected}")
    try:
        return hint(value) if hint in (int, float) else value
    except OverflowError:  # an integer too large for a float
        return math.inf


def spell(hint: Any) -> str:
    """An annotated type, as error messages spell it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return spell(args[0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is tuple:
        return f"tuple[{spell(args[0])}, ...]"
    if origin is Mapping:
        return f"a mapping from {spell(args[0])} to {spell(args[1])}"
    return "None" if hint is type(None) else " | ".join(map(spell, args)) or hint.__name__


def describe(hint: Any) -> str:
    """An annotated type with its range, as documentation spells it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return f"{spell(hint)}, {args[1].expected}" if args[1] is not _ANY else spell(hint)
    if origin is tuple:
        return f"tuple[{spell(args[0])}, ...]" + describe(args[0]).removeprefix(spell(args[0]))
    if type(None) in args:
        inner = " or ".join(describe(option) for option in args if option is not type(None))
        return f"{inner.partition(', or None')[0]}; or None"
    return spell(hint)
