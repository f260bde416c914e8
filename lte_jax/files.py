"""Safe file access: atomic writes, folders with a manifest, checked JSON.

A manifest (`manifest.json`) lists the size and SHA-256 of every file in a folder, and any metadata
of the writer. Its first line is the SHA-256 of the JSON that follows. It is written last, so a
folder with a manifest is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lte_jax.errors import UserError

MIRROR = "LTE_JAX_MIRROR"
MANIFEST = "manifest.json"
_NAME_BYTES = 255  # most bytes in one component of a path, on all common file systems
MAX_JSON_BYTES = 32 * 2**20  # the largest weight index on the hub is about 10 MB


def expand(path: str | os.PathLike, name: str = "a path") -> Path:
    """The path with `~` expanded and any trailing slash dropped.

    Raises:
      UserError: if it is no path, empty or no valid file name, or the home folder is unknown.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{name} is {type(path).__name__}: expected the path of a file or folder")
    if not os.fspath(path):
        raise UserError(f"{name} is empty: expected a file or folder (. is the current folder)")
    try:
        components = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:  # a lone surrogate
        components = [b"\0"]
    if any(b"\0" in part or len(part) > _NAME_BYTES for part in components):
        raise UserError(f"{name} {path}: no file can have this name: correct the path")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: the home folder ~ is unknown: write it out") from None


def mirrored(hub_id: str) -> Path | None:
    """Where a model or data set of the hub lies in the local mirror, if there is one and it does.

    A mirror is a folder that holds each under its hub id, as in owner/name, or owner/name/config
    for a configuration of a data set; MIRROR, an environment variable, names it.
    """
    root = os.environ.get(MIRROR)
    if not root:
        return None
    folder = expand(root, MIRROR)
    if not folder.is_dir():
        raise UserError(f"{MIRROR}={root}: is no folder: expected one that holds owner/name")
    return folder / hub_id if os.path.exists(folder / hub_id) else None


class Mirror(argparse.Action):
    """The flag of a command line for `mirrored`."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Sets the environment variable, which subprocesses see, too."""
        os.environ[MIRROR] = str(values)

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Adds --mirror; returns the parser."""
        text = f"folder with models and data sets by hub id, used before the hub; or set {MIRROR}"
        parser.add_argument(
            "--mirror", metavar="FOLDER", action=cls, default=argparse.SUPPRESS, help=text
        )
        return parser


class Damaged(Exception):
    """A folder differs from its manifest; the message says which file and how."""


# ----------------------------------------------------------------------------------------- writing


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Writes or replaces a file atomically.

    Raises:
      UserError: if it cannot be written; an existing file is then untouched.
    """
    with replacing_file(Path(path)) as half:
        half.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yields the name of a file to write: it replaces `path` on success, is removed on an error.

    Raises:
      UserError: if it cannot be written; an existing file is then untouched.
    """
    half = path.with_name(f".{path.name}.half-written")
    try:
        with explained(path):
            yield half
            sync(half)
            half.replace(path)
            sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            half.unlink()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an OSError into the UserError that `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): free some space or name another place"
        ) from error


def sync(path: Path) -> None:
    """Flushes a file's contents, or a folder's renames, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_trouble(error: BaseException) -> str | None:
    """The system's error text if the disk is at fault, not a program; else None."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UserError):
        return None
    # TensorStore (ValueError) and tokenizers (Exception) quote the system's text in theirs.
    codes = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO
    return next((os.strerror(code) for code in codes if os.strerror(code) in str(error)), None)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that replaces `folder` on success and is removed on an error.

    A killed process leaves a hidden `.NAME.new-*` next to it or, between the two renames, the
    previous folder as `.NAME.old-*`.

    Raises:
      UserError: if it cannot be written; the previous folder is then untouched.
    """
    folder = Path(os.path.realpath(folder))
    tag = secrets.token_hex(4)
    new, old = (folder.parent / f".{folder.name}.{word}-{tag}" for word in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        for file in (*new.rglob("*"), new):
            sync(file)
        try:
            if folder.is_dir():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
        sync(folder.parent)
    except Exception as e:
        if (reason := disk_trouble(e)) is None:
            raise
        raise UserError(
            f"cannot write {folder} ({reason}): choose a writable folder on a disk with "
            "free space; nothing was changed there"
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


# --------------------------------------------------------------------------------------- manifests


def sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digests(paths: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256, paths))


def inventory(
    folder: Path, chosen: Callable[[str], bool] = lambda name: True
) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of a folder's current files, but for the manifest, that are chosen."""
    named = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    paths = {name: named[name] for name in sorted(named) if name != MANIFEST and chosen(name)}
    digests = zip(paths.items(), _digests(list(paths.values())), strict=True)
    return {name: (path.stat().st_size, digest) for (name, path), digest in digests}


def write_manifest(
    folder: Path,
    kept: Mapping[str, Any] | None = None,
    found: Mapping[str, tuple[int, str]] | None = None,
) -> None:
    """Writes the manifest of a folder.

    Args:
      folder: to be complete with it.
      kept: stored as extra keys.
      found: the `inventory` of the folder. None: it is made.
    """
    listed = dict(sorted((inventory(folder) if found is None else found).items()))
    text = json.dumps(dict(kept or {}) | {"files": listed}, indent=1)
    atomic_write(folder / MANIFEST, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads what `write_manifest` wrote.

    Raises:
      Damaged: if it is absent or corrupt.
    """
    path = folder / MANIFEST
    try:
        check_regular(path)
        digest, _, text = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except UserError:
        raise Damaged(f"{MANIFEST} is not a regular file") from None
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise Damaged(f"{MANIFEST} is corrupt (its SHA-256 differs)")
    return json.loads(text)


def verify(
    folder: Path, *, digests: bool = True, chosen: Callable[[str], bool] = lambda name: True
) -> dict[str, Any]:
    """Checks a folder's files against its manifest, by size, and returns the manifest.

    Args:
      folder: has a manifest.
      digests: also read every file and compare its SHA-256.
      chosen: which files to check, by name.

    Raises:
      Damaged: if a file is missing or different; names it.
    """
    manifest = read_manifest(folder)
    named = {name: entry for name, entry in manifest["files"].items() if chosen(name)}
    for name, (size, _) in named.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{name} has {path.stat().st_size} bytes instead of {size}")
    if digests:
        found = _digests([folder / name for name in named])
        for (name, (_, digest)), actual in zip(named.items(), found, strict=True):
            if actual != digest:
                raise Damaged(f"{name} is corrupt (its SHA-256 differs)")
    return manifest


# ----------------------------------------------------------------------------------------- reading


def check_regular(path: Path) -> None:
    """Refuses folders, and pipes, sockets and devices, which could block a reader forever.

    Raises:
      UserError: on those; FileNotFoundError and other OSErrors as `os.stat` does.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise UserError(f"{path} is {kind}: expected a regular file")


def read_json(path: Path, hint: str = "download or copy it again", kind: type = dict) -> Any:
    """Reads the JSON object, or the list, in a file.

    Raises:
      UserError: if the file is absent, not regular, too large, or not of that kind; names it,
        with `hint` as the fix.
    """
    try:
        check_regular(path)
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise UserError(
                f"{path} has {size:,} bytes: expected at most {MAX_JSON_BYTES:,} of JSON: {hint}"
            )
        raw = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {hint}") from None
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{path} cannot be read (nested too deeply): {hint}") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): {hint}") from None
    if not isinstance(raw, kind):
        wanted = "an object of keys" if kind is dict else f"a {kind.__name__}"
        raise UserError(f"{path} holds a JSON {type(raw).__name__}: expected {wanted}")
    return raw
