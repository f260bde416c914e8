"""What a source of texts names: files, folders, globs, the hub, the standard library, or a mix.

"texts.jsonl", "texts/", "texts/*.csv.gz"         files
"owner/name", "owner/name:config:split"           a data set of the hub, or of the mirror
"python-stdlib"                                   the source files of this Python
"a.jsonl + b/"                                    all of both
"0.7 * a.jsonl + 0.3 * owner/name"                shares of the characters
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lte_jax.data.formats import KINDS, WholeText, file_rows, kind_of
from lte_jax.errors import UserError, nearest, one_line
from lte_jax.files import MIRROR, mirrored, sha256

STDLIB = "python-stdlib"
# Installed packages, and tests, which some distributions leave out.
NOT_OF_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
SPLITS = ("train", "validation")
SHARD = r"(-\d+-of-\d+)?"  # as in train-00000-of-00004.parquet
ANY_SPLIT = re.compile(rf"(train|validation|valid|dev|test)(_\w+)?{SHARD}")


def local_path(source: str) -> Path:
    """`source` as a path, `~` replaced by the home folder."""
    return Path(os.path.expanduser(source))  # unlike Path.expanduser, leaves an unknown ~user


def parts(source: str) -> list[tuple[float | None, str]]:
    """The sources that a mix names, each with its weight; None: none has one.

    Raises:
      UserError: on a weight that is no positive number, or if only some have one.
    """
    if os.path.lexists(local_path(source)):
        return [(None, source)]
    found = [_weighed(term, source) for term in re.split(r"\s\+\s", source)]
    if len({weight is None for weight, _ in found}) > 1:
        raise UserError(f"{source}: expected a weight for each source, or for none")
    return found


def _weighed(term: str, source: str) -> tuple[float | None, str]:
    weight, times, name = (part.strip() for part in term.partition(" * "))
    if weight and not times:
        return None, weight
    try:
        number = float(weight)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf") or not name:
        raise UserError(
            f"{source}: {weight!r} is no weight of a source: expected positive numbers, as in "
            "'0.7 * a.jsonl + 0.3 * b.jsonl'"
        )
    return number, name


def read_rows(
    source: str, split: str | None = None, streaming: bool = False, whole: bool = False
) -> contextlib.AbstractContextManager[Iterator[tuple[str, Any]]]:
    """The records of `source`, each with its place for error messages.

    A record is an object of columns, or a `WholeText`. They are read within a `with`, whose end
    closes the file: an iterator left in the middle, by an error in a record or a limit, would keep
    it open until it is collected.

    Args:
      source: as at the top of this file, without weights.
      split: the part to read if `source` has parts and names none. None: "train", of the standard
        library all.
      streaming: read a hub data set as it arrives, without storing it; for its first records.
      whole: do not cut plain texts into documents.
    """
    return contextlib.closing(_rows(source, split, streaming, whole))


def _rows(
    source: str, split: str | None, streaming: bool, whole: bool
) -> Iterator[tuple[str, Any]]:
    for weight, name in parts(source):
        if weight is not None:
            raise UserError(f"{source}: only texts are mixed by weights: leave the weights out")
        files = local_files(name, split)
        if files is not None:
            for file in files:
                yield from file_rows(file, whole)
        elif is_stdlib(name):
            yield from _stdlib_rows(name.partition(":")[2] or split)
        else:
            yield from _hub_rows(name, split, streaming)


def overlap(train: str, validation: str, split: str = "validation") -> str | None:
    """A file, or a part of a data set, that both sources would read; None: there is none."""
    pairs = (train, "train"), (validation, split)
    a, b = ({i for _, n in parts(s) for i in _identities(n, part)} for s, part in pairs)
    return min(a & b, default=None)


def digest(source: str, split: str) -> str:
    """SHA-256 of the contents of all files of a source; of the hub's, of their names alone."""
    sha = hashlib.sha256()
    for _, name in parts(source):
        files = local_files(name, split)
        for file in files or ():
            sha.update(sha256(file).encode() if file.is_file() else str(file).encode())
        if is_stdlib(name):
            with read_rows(name, split) as rows:
                sha.update(hashlib.sha256("".join(text for _, text in rows).encode()).digest())
        elif files is None:
            sha.update(name.encode())
    return sha.hexdigest()


def _identities(name: str, split: str) -> set[str]:
    files = local_files(name, split)
    if files is not None:
        return {os.path.realpath(file) if file.exists() else str(file) for file in files}
    if is_stdlib(name):
        return {f"{STDLIB}:{name.partition(':')[2] or split}"}
    of_hub, config, part = _hub_parts(name)
    return {f"{of_hub}:{config}:{part or split}"}


# ------------------------------------------------------------------------------------------- files


def local_files(name: str, split: str | None = None) -> list[Path] | None:
    """The files of one source, in the order they are read; None: it has none, see `is_stdlib`.

    Raises:
      UserError: if a folder or a glob has none.
    """
    path = local_path(name)
    if is_stdlib(name):
        return None
    if os.path.isdir(path):
        return _of_folder(path, split)
    if os.path.lexists(path):
        return [path]
    if set("*?[") & set(name):
        found = [Path(f) for f in glob.glob(str(path), recursive=True) if os.path.isfile(f)]
        if not found:
            raise UserError(
                f"{name}: no file matches (looked from {Path.cwd()}): expected a glob such as "
                "'texts/*.jsonl', or a weight with spaces around its *"
            )
        return _of_one_kind(name, found)
    if name.startswith((".", "/", "~")) or path.suffix in (*KINDS, ".gz"):
        return [path]
    if local := mirrored("/".join(name.split(":")[:2]).rstrip("/")):
        part = ":".join(name.split(":")[2:]) or split
        return _of_folder(local, part) if local.is_dir() else [local]
    return None


def _of_folder(folder: Path, split: str | None) -> list[Path]:
    """The files of a split, where files are named by splits; else all, of the folders within too.

    Those of a split may lie in data/, as in repositories of the hub.
    """
    walked = ((Path(at), folders, files) for at, folders, files in os.walk(folder))
    found = []
    for at, folders, files in walked:
        folders[:] = (name for name in folders if not name.startswith("."))
        found += [at / name for name in files if not name.startswith(".")]
    known = [file for file in found if kind_of(file) in KINDS]
    named = {
        file: file.name.removesuffix(".gz").removesuffix(kind_of(file))
        for file in known
        if file.parent in (folder, folder / "data")
    }
    split = split or "train"
    of_split = [f for f in named if re.fullmatch(re.escape(split) + SHARD, named[f])]
    if of_split:
        return _of_one_kind(str(folder), of_split)
    if not known or any(map(ANY_SPLIT.fullmatch, named.values())):
        held = sorted(file.name for file in folder.iterdir())
        raise UserError(
            f"{folder}: is a folder without {split}.jsonl (or {', '.join(KINDS[1:])}): expected a "
            f"file for each split, or texts, found {', '.join(held[:5]) or 'nothing'}"
        )
    return _of_one_kind(str(folder), known)


def _of_one_kind(name: str, files: list[Path]) -> list[Path]:
    kinds = sorted({kind_of(file) for file in files})
    if len(kinds) > 1:
        raise UserError(
            f"{name}: holds files of {len(kinds)} kinds ({', '.join(kinds)}): expected one, as by "
            f"the glob '{name if os.path.isdir(name) else '...'}/**/*{kinds[0]}'"
        )
    return sorted(files, key=lambda file: file.as_posix())


# ------------------------------------------------------------------- the standard library, the hub


def is_stdlib(name: str) -> bool:
    """Whether a source is the standard library."""
    return name.partition(":")[0] == STDLIB


def _stdlib_rows(part: str | None) -> Iterator[tuple[str, Any]]:
    if part not in (None, *SPLITS):
        raise UserError(f"{STDLIB}:{part}: {nearest(part, SPLITS)}")
    root = Path(sysconfig.get_paths()["stdlib"])
    own = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - NOT_OF_STDLIB
        own += [Path(folder, f).relative_to(root).as_posix() for f in files if f.endswith(".py")]
    if not own:
        raise UserError(f"{STDLIB}: no source files in {root}: name a JSON-lines file instead")
    for name in sorted(own):
        held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        machine_made = name.startswith("_sysconfigdata")  # holds paths of the build machine
        if not machine_made and (part is None or held_out == (part == "validation")):
            text = (root / name).read_text(encoding="utf-8", errors="replace")
            yield name, WholeText(text)


def _hub_parts(source: str) -> tuple[str, str, str]:
    name, config, part, *more = source.split(":") + ["", ""]
    if any(more):
        raise UserError(f"{source}: expected name, name:config or name:config:split")
    return name, config, part


def _hub_rows(source: str, split: str | None, streaming: bool) -> Iterator[tuple[str, Any]]:
    name, config, part = _hub_parts(source)
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError:
        raise UserError(
            f"{source}: no such file, and reading a hub dataset of that name needs the package "
            f"datasets: pip install 'lte-jax[data]', or set {MIRROR} to a folder that holds it"
        ) from None
    # Offline there is only the cache, which a stream does not read.
    stream = streaming and not constants.HF_HUB_OFFLINE
    load: Callable[..., Any] = datasets.load_dataset  # whose overloads know no bool
    try:
        rows = load(name, config or None, split=part or split or "train", streaming=stream)
        for number, row in enumerate(rows):
            yield f"{source}: row {number}", row
    except Exception as error:  # HTTP, offline, cache and disk errors have no common base
        reason = one_line(error) or type(error).__name__
        raise UserError(
            f"{source}: no such file, and the hub dataset of that name cannot be loaded "
            f"({reason}): correct it, go online, or set {MIRROR} to a folder that holds it"
        ) from None
