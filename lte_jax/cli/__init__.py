"""The command line: `lte-jax COMMAND ...`, and `python -m lte_jax COMMAND ...`, which is the same.

Each command is a module of this folder ("-" is "_" there) with a function `main(argv, prog)`,
imported when it is asked for. train.py and evaluate.py at the top of a checkout are the commands of
that name.
"""

from __future__ import annotations

import importlib
import platform
import sys
from collections.abc import Collection, Sequence

import jax

import lte_jax
from lte_jax.errors import Parser

COMMANDS = {  # one line adds another
    "train": "run an experiment: dense model, sparse model, report",
    "prepare": "tokenise and pack texts once, into shards that runs read",
    "evaluate": "measure a model on text or on tasks, next to its dense model",
    "sweep": "methods x sparsities x seeds from one grid, as one table",
    "generate": "continue prompts",
    "serve": "serve completions and chats over HTTP",
    "convert": "write a model in another dtype, or a sparse one as a dense one",
    "export-gguf": "write a dense model as a GGUF file, for llama.cpp",
}


def main(
    argv: Sequence[str] | None = None,
    prog: str = "lte-jax",
    commands: Collection[str] = tuple(COMMANDS),
) -> None:
    """Runs the command that the first word names with the words after it (None: sys.argv)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    width = max(map(len, commands)) + 2
    table = [f"  {name:{width}}{COMMANDS[name]}" for name in commands]
    epilog = "\n".join(["commands:", *table, "", f"{prog} COMMAND --help says more of each."])
    parser = Parser(prog=prog, description=lte_jax.__doc__.splitlines()[0], epilog=epilog)
    version = f"lte-jax {lte_jax.__version__} (jax {jax.__version__}, Python "
    version += f"{platform.python_version()})"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="one of those below")
    command = parser.parse_args(argv[:1]).command
    module = importlib.import_module(f"{__name__}.{command.replace('-', '_')}")
    module.main(argv[1:], f"{prog} {command}")
