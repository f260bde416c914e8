"""pytest in a child forked from a server that has imported all it needs but the project itself.

Importing takes a child longer than most tests. The server imports only packages that start no
thread and no backend of jax, so that forking it is safe.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pathlib
import runpy
import signal
import sys

_HERE = pathlib.Path(__file__).resolve().parent
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["jax", "flax.linen", "optax", "orbax.checkpoint", "grain", "ml_collections", "transformers",
     "beartype.claw", "pytest"]
)  # fmt: skip
runpy.run_path(str(_HERE.parent / "environment.py"))  # the server's too: it imports jax


def _child(tree: pathlib.Path, tests: tuple[str, ...], output: pathlib.Path, keep: bool) -> None:
    """Ends with pytest's exit code."""
    import pytest

    gc.freeze()  # what the server imported is not searched for garbage
    os.setsid()  # a group of its own, killed as one
    for stream in 1, 2:
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if path != str(_HERE))]
    sys.dont_write_bytecode = not keep
    bytecode = {"PYTHONDONTWRITEBYTECODE": "" if keep else "1"}
    os.environ |= bytecode | {"PYTHONPATH": str(tree), "COLUMNS": "160"}
    quiet = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    sys.exit(pytest.main(["-x", "-q", *quiet, *tests]))


def pytest(
    tree: pathlib.Path, *tests: str, limit: float, keep_bytecode: bool = False
) -> tuple[int | None, str]:
    """Exit code (None: it never ended) and output of tests in a tree."""
    output = tree.parent / "output"
    output.unlink(missing_ok=True)
    process = _SERVER.Process(target=_child, args=(tree, tests, output, keep_bytecode))
    process.start()
    process.join(limit)
    if (code := process.exitcode) is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return code, output.read_text()
