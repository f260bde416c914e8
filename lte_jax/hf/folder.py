"""Which files of a folder belong to its model, and which of them can be trusted.

A folder that this library wrote has a manifest (`lte_jax.files`): a file that has changed since is
refused. A folder may come from a stranger: links to files outside it are not copied.
"""

from __future__ import annotations

import fnmatch
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from lte_jax import files
from lte_jax.errors import UserError

CONFIG = "config.json"
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPERT_ORDER = "expert_order.safetensors"
# Files that belong to the model besides its config and weights; copied on export.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)
# Those of sentence-transformers, see sentence.py.
_EMBEDDING = ("modules.json", "*sentence_*.json")
_BELOW = {"1_Pooling": {CONFIG}, "2_Dense": {CONFIG, ONE_FILE}}
_ALL = (*_EMBEDDING, CONFIG, INDEX, EXPERT_ORDER, files.MANIFEST, "model*.safetensors", *COMPANIONS)
log = logging.getLogger(__name__)


def verify(folder: Path, *, digests: bool = False, mend: str | None = None) -> None:
    """Compares a folder with its manifest: the sizes of its files, and if asked their contents.

    Args:
      folder: of a model. One without a manifest, written by others, passes.
      digests: compare contents, too; reads every file.
      mend: advice for the error message. With it, the folder must have a manifest.

    Raises:
      UserError: names the file that is not as it was written.
    """
    folder = Path(folder)
    if mend is None and not os.path.lexists(folder / files.MANIFEST):
        return
    try:
        files.verify(folder, digests=digests)
    except files.Damaged as damage:
        advice = (
            f"copy or make the folder again, or remove {files.MANIFEST} if the change was meant"
        )
        raise UserError(f"{folder} is not as it was written: {damage}: {mend or advice}") from None


def companions(folder: Path) -> Iterator[Path]:
    """The files of a folder that are saved along with its model.

    A link that leads elsewhere is left out: it would publish a file of this machine. In the hub's
    cache files are links, to blobs of the same cache.
    """
    for file in sorted(folder.iterdir()):
        if not _matches(file.name, COMPANIONS) or file.is_dir():
            continue
        if not file.is_file():
            log.warning("%s is not saved with the model: it is not a regular file", file)
        elif not inside(file, folder):
            where = os.path.realpath(file)
            log.warning("%s is not saved with the model: it is a link to %s", file, where)
        else:
            yield file


def check_replaceable(folder: Path) -> None:
    """Raises if writing `folder` would destroy anything but an older model."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder to write the model to")
    held = sorted(folder.iterdir())
    foreign = [entry.name for entry in held if not _ours(entry)]
    if held and not foreign and not (folder / CONFIG).exists():
        foreign = [held[0].name]
    if foreign:
        raise UserError(
            f"{folder} holds {foreign[0]}, which is not part of a model, and would be replaced: "
            "choose another folder, or empty this one"
        )


def cached_repository(folder: Path) -> str | None:
    """The hub id of a snapshot folder in the hub's cache; None for other folders."""
    snapshot = Path(os.path.realpath(folder))
    kind, *name = snapshot.parent.parent.name.split("--")
    if snapshot.parent.name != "snapshots" or kind != "models" or not name:
        return None
    return "/".join(name)


def inside(file: Path, folder: Path) -> bool:
    """Whether a file, its links followed, lies in the folder or in its hub cache."""
    home = Path(os.path.realpath(folder))
    homes = [home]
    if cached_repository(home):  # models--owner--name/snapshots/commit; blobs may be shared
        repository = home.parent.parent
        homes += [repository / "blobs", repository.parent / "blobs"]
    real = os.path.realpath(file)
    return any(Path(real).is_relative_to(os.path.realpath(place)) for place in homes)


def _ours(entry: Path) -> bool:
    """Whether a file, or a folder of sentence-transformers, is a part of a model."""
    if entry.is_dir():
        held = {file.name for file in entry.iterdir()}
        return entry.name in _BELOW and held <= _BELOW[entry.name]
    return _matches(entry.name, _ALL)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
