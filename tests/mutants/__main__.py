"""Mutants: one-line faults, each of which must turn a test red that is there to see it.

    python tests/mutants                        # or: make mutants
    python tests/mutants --only clip --only rope    # those whose name has one of these words
    python tests/mutants --list

Each is put into a copy of the checkout, alone, and its tests run there; the checkout itself is not
touched. A test that can not be collected, or that never ends, sees nothing. Exit code 1 where a
mutant survives or no longer applies, or where its tests fail without it.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import dial
import families_tasks
import faults
import learning
import methods
import running
import serving
from forked import pytest
from mutant import Mutant

ROOT = pathlib.Path(__file__).resolve().parents[2]
MUTANTS = learning.MUTANTS + running.MUTANTS + families_tasks.MUTANTS + faults.MUTANTS
MUTANTS += methods.MUTANTS
MUTANTS += dial.MUTANTS
MUTANTS += serving.MUTANTS
LIMIT = 180  # seconds for the tests of one mutant
PASSED, FAILED = 0, 1  # exit codes of pytest; others say that it could not run the tests


def copy(root: pathlib.Path, tree: pathlib.Path) -> None:
    """The files of a checkout that git knows, or would, as they are now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():  # or deleted, and that not committed
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, tree / name)


def try_out(mutant: Mutant, trees: queue.Queue[pathlib.Path]) -> tuple[str, str]:
    """("killed", which test says what), ("survived", ...) or ("broken", why it says nothing)."""
    tree = trees.get()
    try:
        with mutant.applied(tree):
            code, output = pytest(tree, *mutant.tests.split(), limit=LIMIT)
    except LookupError as error:
        return "broken", str(error)
    finally:
        trees.put(tree)
    if code == FAILED:
        [seen] = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(.*)", output, re.MULTILINE)[:1] or [""]
        return "killed", seen
    if code == PASSED:
        return "survived", mutant.tests
    return "broken", "its tests never end" if code is None else output[-1500:]


def unmutated(mutants: list[Mutant], tree: pathlib.Path) -> str:
    """What their tests say in a tree without a fault; "" where all pass."""
    tests = dict.fromkeys(test for mutant in mutants for test in mutant.tests.split())
    code, output = pytest(tree, *tests, limit=LIMIT + 20 * len(tests), keep_bytecode=True)
    return "" if code == PASSED else f"{output[-3000:]}\nthe tests must pass without a mutant"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/mutants", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--only", action="append", metavar="WORDS", default=[])
    parser.add_argument("--list", action="store_true", help="names, files and tests alone")
    flags = parser.parse_args()
    chosen = [m for m in MUTANTS if not flags.only or any(words in m.name for words in flags.only)]
    if flags.list:
        for mutant in chosen:
            print(f"{mutant.name}\n    {mutant.file}: {mutant.old!r}\n    {mutant.tests}")
        return 0
    if not chosen:
        raise SystemExit(f"no mutant's name has any of {flags.only}")
    with tempfile.TemporaryDirectory(prefix="lte_jax-mutants-") as folder:
        return run(chosen, pathlib.Path(folder))


def run(mutants: list[Mutant], folder: pathlib.Path, workers: int = 2) -> int:
    start, trees = time.monotonic(), queue.Queue()
    first = folder / "0" / "lte_jax"
    copy(ROOT, first)
    print(f"the tests of {len(mutants)} mutants, without them", flush=True)
    if problem := unmutated(mutants, first):
        print(problem)
        return 1
    for worker in range(1, workers):  # with the bytecode that stands in the first by now
        trees.put(shutil.copytree(first, folder / str(worker) / "lte_jax"))
    trees.put(first)
    found = collections.defaultdict(list)
    with ThreadPoolExecutor(workers) as pool:
        tries = {pool.submit(try_out, mutant, trees): mutant for mutant in mutants}
        for done, future in enumerate(as_completed(tries), 1):
            (outcome, why), name = future.result(), tries[future].name
            found[outcome].append(name)
            print(f"[{done:3}/{len(mutants)}] {outcome:8} {name}  ({why})", flush=True)
    minutes = (time.monotonic() - start) / 60
    counts = ", ".join(f"{len(found[o])} {o}" for o in ("killed", "survived", "broken"))
    print(f"\n{counts} in {minutes:.1f} minutes")
    for outcome in "survived", "broken":
        for name in found[outcome]:
            print(f"{outcome}: {name}")
    return int(bool(found["survived"] or found["broken"]))


if __name__ == "__main__":
    sys.exit(main())
