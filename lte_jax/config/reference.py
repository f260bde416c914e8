"""What each key of an experiment means: for `train.py --help` and the documentation.

The comments beside the keys in schema.py are their meaning; their types hold their ranges.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from lte_jax.config.fields import describe, section_of
from lte_jax.config.schema import Experiment

_DEFAULTS = Experiment()


class Key(NamedTuple):
    """One key of an experiment, as "lte.target_sparsity"."""

    name: str
    hint: Any  # its annotated type
    value: Any  # in the experiment that was asked for
    meaning: str


def keys(values: Any = _DEFAULTS, cls: Any = Experiment, prefix: str = "") -> Iterator[Key]:
    """All keys of a dataclass of dataclasses, in order; of a section that is None, too."""
    documented = _comments(cls)
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        value, section = getattr(values, name, None), section_of(hint)
        if section is not hint:
            yield Key(prefix + name, hint, value, documented[name])
        if section is not None:
            yield from keys(value, section, f"{prefix}{name}.")


def help_text(experiment: Experiment, of: str) -> str:
    """Every key with its value in `experiment`, its type and range, and its meaning."""
    lines, indent = [f"--config.KEY=VALUE, keys and {of}:"], " " * 6
    for key in keys(experiment):
        lines.append(f"  {key.name} = {key.value!r}  ({describe(key.hint)})")
        lines += textwrap.wrap(key.meaning, 80, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


@functools.cache
def _comments(cls: Any) -> dict[str, str]:
    """Key -> the comment beside it, or on the lines above it, in schema.py."""
    found, above = {}, []
    for line in inspect.getsource(cls).splitlines():
        code, _, comment = line.partition("  # ")
        if key := re.match(r"    (\w+): ", code):
            found[key[1]] = " ".join(filter(None, [*above, comment]))
        above = [*above, comment] if not code.strip() and comment else []
    return found
