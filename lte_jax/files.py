"""Safe file access: atomic writes, folders with a manifest, checked JSON.

A manifest (`manifest.json`) lists the size and SHA-256 of every file in a folder, and any metadata
of the writer. Its first line is the SHA-256 of the JSON that follows. It is written last, so a
folder with a manifest is complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lte_jax.errors import UserError

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
    if not _can_be_a_name(path):
        raise UserError(f"{name} {path}: no file can have this name: correct the path")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: the home folder ~ is unknown: write it out") from None


def _can_be_a_name(path: str | os.PathLike) -> bool:
    """Whether a file can have this name: encodable, no null byte, not too long."""
    try:
        name = os.fsencode(path)
        return b"\0" not in name and max(map(len, name.split(b"/"))) <= _NAME_BYTES
    except UnicodeEncodeError:  # a lone surrogate
        return False


class Damaged(Exception):
    """A folder differs from its manifest; the message says which file and how."""


# ----------------------------------------------------------------------------------------- writing


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Writes or replaces a file atomically.

    Raises:
      UserError: if it cannot be written; an existing file is then untouched.
    """
    path = Path(path)
    half = path.with_name(f".{path.name}.half-written")
    try:
        with half.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            half.unlink()
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
    new = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
        new.chmod(0o777 & ~_umask())  # mkdtemp makes it 0o700
        yield new
        for file in (*new.iterdir(), new):
            sync(file)
        _move(new, folder)
        sync(folder.parent)
    except Exception as e:
        if (reason := disk_trouble(e)) is None:
            raise
        raise UserError(
            f"cannot write {folder} ({reason}): choose a writable folder on a disk with "
            "free space; nothing was changed there"
        ) from None
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def _move(new: Path, folder: Path) -> None:
    """Replaces `folder` by `new`; on failure `folder` stays."""
    if not folder.exists():
        new.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old-", dir=folder.parent))
    folder.rename(old)  # replaces the empty folder
    try:
        new.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --------------------------------------------------------------------------------------- manifests


def sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprints(folder: Path) -> dict[str, list[Any]]:
    """Relative name -> [size in bytes, SHA-256] of every file in a folder except its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path != folder / MANIFEST]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, files))
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, digest]
        for path, digest in zip(files, digests, strict=True)
    }


def write_manifest(folder: Path, kept: Mapping[str, Any] | None = None) -> None:
    """Writes the manifest of a folder's current files; `kept` is stored as extra keys."""
    text = json.dumps(dict(kept or {}) | {"files": fingerprints(folder)}, indent=1)
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


def verify(folder: Path, *, digests: bool = True) -> dict[str, Any]:
    """Checks a folder's files against its manifest, by size, and returns the manifest.

    Args:
      folder: has a manifest.
      digests: also read every file and compare its SHA-256.

    Raises:
      Damaged: if a file is missing or different; names it.
    """
    manifest = read_manifest(folder)
    named = manifest["files"]
    for name, (size, _) in named.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{name} is missing")
        if path.stat().st_size != size:
            raise Damaged(f"{name} has {path.stat().st_size} bytes instead of {size}")
    if digests:
        with ThreadPoolExecutor() as pool:
            found = pool.map(sha256, [folder / name for name in named])
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


def read_json(path: Path, hint: str = "download or copy it again") -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
      UserError: if the file is absent, not regular, too large, or not a JSON object; names it,
        with `hint` as the fix.
    """
    try:
        check_regular(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(
                f"{path} has {path.stat().st_size:,} bytes: expected at most {MAX_JSON_BYTES:,} "
                f"of JSON: {hint}"
            )
        raw = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {hint}") from None
    except UserError:
        raise
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}): {hint}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds a JSON {type(raw).__name__}: expected an object of keys")
    return raw


def parse_json(text: bytes | str) -> Any:
    """`json.loads` that raises only ValueError."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
