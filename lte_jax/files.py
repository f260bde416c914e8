"""Files that are whole or absent: atomic writes, folders with a manifest, JSON that is checked.

A manifest (`manifest.json`) names every file of a folder with its size and SHA-256, and whatever
else the writer wants kept with them, under a checksum of its own: its first line is the SHA-256 of
the JSON that follows. It is written last, so a folder that has one was finished.
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
_NAME_BYTES = 255  # of one part of a path, on all file systems in use
MAX_JSON_BYTES = 32 * 2**20  # the largest index of a model on the hub has some 10 MB


def expand(path: str | os.PathLike, name: str = "a path") -> Path:
    """A path as the shell would give it: `~` is the home folder, a slash at its end means nothing.

    Raises:
      UserError: where it is no path, is empty, has characters that no file system takes, or the
        home folder is not known.
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
        raise UserError(f"{path}: the home folder of ~ is not known: write it out") from None


def _can_be_a_name(path: str | os.PathLike) -> bool:
    """Whether a file can have this name: no null, nothing that cannot be encoded, not too long."""
    try:
        name = os.fsencode(path)
        return b"\0" not in name and max(map(len, name.split(b"/"))) <= _NAME_BYTES
    except UnicodeEncodeError:  # a lone surrogate
        return False


class Damaged(Exception):
    """A folder is not as it was written; says which file and how."""


# ----------------------------------------------------------------------------------------- writing


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Writes a file whole or not at all, over an older one if there is one.

    Raises:
      UserError: when it cannot be written; an older file is then untouched.
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
    """Makes what was written to a file, or renamed in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_trouble(error: BaseException) -> str | None:
    """The system's own words if the disk, and not a program, is at fault; else None."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UserError):
        return None
    # TensorStore (ValueError) and tokenizers (Exception) raise them with the words inside.
    codes = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO
    return next((os.strerror(code) for code in codes if os.strerror(code) in str(error)), None)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place at the end; on an error, nothing.

    A process killed meanwhile leaves a hidden `.NAME.new-*` beside it, or, between the two
    renames, the older folder as `.NAME.old-*`.

    Raises:
      UserError: where it cannot be written; an older folder is then untouched.
    """
    folder = Path(os.path.realpath(folder))
    new = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=folder.parent))
        new.chmod(0o777 & ~_umask())  # mkdtemp makes it private
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
            "room; nothing was changed there"
        ) from None
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


def _move(new: Path, folder: Path) -> None:
    """`new` takes the place of `folder`, which stays if that fails."""
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
    """The digest of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprints(folder: Path) -> dict[str, list[Any]]:
    """Relative name -> [size in bytes, SHA-256] of every file in a folder but its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path != folder / MANIFEST]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, files))
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, digest]
        for path, digest in zip(files, digests, strict=True)
    }


def write_manifest(folder: Path, kept: Mapping[str, Any] | None = None) -> None:
    """Writes the manifest of a folder's files as they are now; `kept` is stored beside them."""
    text = json.dumps(dict(kept or {}) | {"files": fingerprints(folder)}, indent=1)
    atomic_write(folder / MANIFEST, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises:
      Damaged: where it is absent or not as it was written.
    """
    path = folder / MANIFEST
    try:
        check_regular(path)
        digest, _, text = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise Damaged(f"{MANIFEST} cannot be read ({error.strerror})") from None
    except UserError:
        raise Damaged(f"{MANIFEST} is no regular file") from None
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise Damaged(f"{MANIFEST} is not as it was written")
    return json.loads(text)


def verify(folder: Path, *, digests: bool = True) -> dict[str, Any]:
    """The manifest of a folder whose files are all there, of the size they were written with.

    Args:
      folder: with a manifest.
      digests: read every file and compare its SHA-256 as well.

    Raises:
      Damaged: where one is missing or different; names it.
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
                    raise Damaged(f"{name} is not as it was written (SHA-256 differs)")
    return manifest


# ----------------------------------------------------------------------------------------- reading


def check_regular(path: Path) -> None:
    """Refuses what would block or never end when read: pipes, sockets, devices.

    Raises:
      UserError: on those; FileNotFoundError and other OSErrors as `os.stat`.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise UserError(f"{path} is {kind}: expected a regular file")


def read_json(path: Path, hint: str = "download or copy it again") -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: where the file is absent, no regular file, too large, or holds something else;
        names it, with `hint` as the mend.
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
    """`json.loads`, of which every failure is a ValueError."""
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
