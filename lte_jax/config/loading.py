"""Reads a file in configs/ and command-line flags into an `Experiment`.

The types of the dataclasses decide how the text of a flag is parsed, so a key that is None or a
tuple can be set like any other.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from lte_jax.config import reference
from lte_jax.config.fields import MOVED, convert, from_mapping, options, unknown
from lte_jax.config.schema import Experiment
from lte_jax.errors import UserError, nearest
from lte_jax.files import Mirror, expand

T = TypeVar("T")


def load_config(spec: str, overrides: Iterable[str] = ()) -> Experiment:
    """The experiment that a file in configs/ describes.

    The file is plain Python with a function `get_config(arg="")` that returns a ConfigDict, as
    `to_config_dict(Experiment())` makes it. It is run by path, not imported, so it may be anywhere.

    Args:
      spec: path of the file; after a colon the argument of get_config: "configs/demo.py:smoke". If
        there is no such file, one of the package's own by its name: "demo", "demo:smoke".
      overrides: "dotted.key=value" each, such as "lte.target_sparsity=0.7". None, numbers, true
        and false are written as in Python; a tuple is written 1,2 and the empty one ().

    Raises:
      UserError: if the file is missing, fails (with the line) or returns something else; on an
        unknown key, naming the nearest valid one; on a value of the wrong type or out of range.
    """
    path, arg = split(spec)
    values = run_file(find(path), "get_config", arg, ConfigDict).to_dict()
    for override in overrides:
        _override(values, override)
    return from_mapping(Experiment, values)


def variants(arg: str, *valid: str) -> frozenset[str]:
    """The comma-separated words of a get_config argument, such as "paper,smoke".

    Raises:
      UserError: on a word that is not among `valid`.
    """
    words = frozenset(filter(None, arg.split(",")))
    for word in sorted(words - set(valid)):
        raise UserError(f"unknown variant {word!r}: {nearest(word, valid)}")
    return words


def split(spec: str) -> tuple[str, str]:
    """The file or name of a config, and the argument of its function."""
    path, colon, arg = spec.partition(".py:")
    if colon or spec.endswith(".py"):
        return (path + ".py", arg) if colon else (spec, "")
    path, _, arg = spec.partition(":")
    return path, arg


def packaged(kind: str = "") -> dict[str, Path]:
    """The configs that come with the package: beside it in a checkout, in it in a wheel.

    Args:
      kind: a folder of configs/; "": that folder itself.
    """
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {file.stem: file for file in sorted((folder / kind).glob("*.py"))}


def find(path: str, kind: str = "") -> str:
    """The file itself or, if there is none, the package's own of that name and kind."""
    file, own = expand(path), packaged(kind)
    if file.is_file():
        return str(file)
    name = file.stem if file.suffix == ".py" else file.name
    if name in own and str(file.parent) in (".", str(Path("configs", kind))):
        return str(own[name])
    others = [str(other) for other in file.parent.glob("*.py") if file.suffix == ".py"]
    near = difflib.get_close_matches(str(file), [*others, *own], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "expected FILE.py or FILE.py:VARIANT"
    raise UserError(f"no config file {str(file)!r}: {hint} (or one of {', '.join(own)})")


def run_file(path: str, function: str, arg: str, kind: type[T]) -> T:
    """What a function of a file returns for `arg`, or without an argument if that is "".

    Raises:
      UserError: if the file has no such function, fails (with the line) or returns another `kind`.
    """
    try:
        call = runpy.run_path(path).get(function)
        if call is None:
            raise UserError(f"expected a function {function}() that returns a {kind.__name__}")
        made = call(arg) if arg else call()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # the file may raise anything
        raise UserError(_blame(path, error)) from error
    if not isinstance(made, kind):
        found = type(made).__name__
        raise UserError(f"{path}: {function}() returned {found}: expected a {kind.__name__}")
    return made


def _blame(path: str, error: Exception) -> str:
    """One line on a config file that failed: the file, the line in it and the error."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines = [error.lineno]
    # On a misspelt key, ConfigDict's message lists everything it holds.
    message = re.sub(r'\. Other fields present: "{.*}"', ".", str(error), flags=re.DOTALL)
    message = " ".join(message.replace(r"\n", " ").split())
    for old in MOVED:
        if re.search(rf"""["']{old.rpartition(".")[2]}["']""", message):
            message += f" ({unknown(f'config.{old}', '')})"
    return ":".join([path, *map(str, lines[-1:])]) + f": {type(error).__name__}: {message}"


def _override(values: dict[str, Any], override: str) -> None:
    """Sets one "dotted.key=value" in the nested dict of an Experiment's values."""
    key, equals, text = override.partition("=")
    hints = _hints()
    if inside := [leaf for leaf in hints if leaf.startswith(f"{key}.") and key not in hints]:
        raise UserError(
            f"config.{key} is a section: set one of its keys, such as config.{inside[0]}"
        )
    if key not in hints:
        close = difflib.get_close_matches(key, hints, n=1, cutoff=0)[0]
        raise unknown(f"config.{key}", f"did you mean config.{close}? (--help lists all)")
    if not equals:
        raise UserError(f"config.{key} has no value: write config.{key}=VALUE")
    *sections, name = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise UserError(f"config.{section} is {values!r} in the file: expected a section")
    values[name] = _parse(hints[key], text)


@functools.cache  # a sweep has hundreds of overrides
def _hints() -> dict[str, Any]:
    """Key -> its annotated type."""
    return {key.name: key.hint for key in reference.keys()}


def _parse(hint: Any, text: str) -> Any:
    """The Python value of command-line `text` for a key of type `hint`."""
    if hint is str or text in typing.get_args(hint):  # "none" may be a word of a Literal
        return text
    try:
        value = ast.literal_eval(text.title() if text in ("true", "false", "none") else text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # literal_eval's own
        return text  # a word of a Literal, or wrong: `convert` decides
    is_tuple = any(typing.get_origin(option) is tuple for option in options(hint))
    return (value,) if is_tuple and isinstance(value, int | float) else value


def flag(hint: Any) -> Callable[[str], Any]:
    """The `type=` of an argparse flag whose value is checked against a type of fields.py."""

    def parse(text: str) -> Any:
        try:
            return convert(hint, _parse(hint, text), "value")
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def parse_flags(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Experiment]:
    """The flags of `parser`, and the experiment of --config=FILE and --config.KEY=VALUE.

    Raises:
      UserError: as `load_config` does. On a wrong flag, argparse ends the program.
    """
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py[:VARIANT]",
        help=f"a file, or the package's {', '.join(packaged())}; --config.KEY=VALUE overrides",
    )
    Mirror.add_to(parser)
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        parser.epilog = _help(argv)
    flags, rest = parser.parse_known_args(argv)
    if wrong := [flag for flag in rest if not flag.startswith("--config.")]:
        how = "a key is set by --config.KEY=VALUE, with =, not a space"
        parser.error(f"unrecognized {' '.join(wrong)} ({how})")
    return flags, load_config(flags.config, [flag.removeprefix("--config.") for flag in rest])


def _help(argv: Sequence[str]) -> str:
    """The keys of an experiment, with their values in the --config of the command line, if any."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    spec, rest = parser.parse_known_args(argv)
    if spec.config is None:
        of = "their defaults (with --config=FILE.py, those of the file)"
        return reference.help_text(Experiment(), of)
    given = [flag.removeprefix("--config.") for flag in rest if flag.startswith("--config.")]
    of = f"their values in {' '.join([spec.config, *given])}"
    return reference.help_text(load_config(spec.config, given), of)
