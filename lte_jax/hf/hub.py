"""Finds a model: a local folder, or a download from the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from urllib.parse import unquote

from lte_jax.errors import UserError, one_line
from lte_jax.files import expand, mirrored
from lte_jax.hf.folder import COMPANIONS, CONFIG

_MODELS_OF_A_RUN = ("dense", "experts", "lte")  # in its work directory
_NAME = r"\w[\w.-]*"
_HUB_ID = re.compile(rf"(?P<id>{_NAME}(?:/{_NAME})?)(?:@(?P<revision>[\w./-]+))?/*")
_HUB_URL = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/"
    rf"(?P<id>(?!datasets/|spaces/){_NAME}/{_NAME})(?:/tree/(?P<revision>[\w.%-]+))?/*(?:[?#].*)?"
)


def resolve(path_or_hub_id: str | Path, config_only: bool = False) -> Path:
    """The local folder of a model; a hub model is downloaded to the hub's cache.

    With `config_only`, no weights are downloaded.
    If the mirror (`files.mirrored`) has it, nothing is downloaded.
    A hub model is named "owner/name", "owner/name@revision" (branch, tag or commit), or by the URL
    of its page. Only config, safetensors, tokenizer and licence files are downloaded.

    Raises:
      UserError: if it is neither a folder nor a hub model that can be downloaded.
    """
    if not isinstance(path_or_hub_id, str | os.PathLike) or not str(path_or_hub_id):
        raise UserError(f"{path_or_hub_id!r} names no model: expected a folder or a hub id")
    folder = expand(path_or_hub_id)
    if os.path.isdir(folder):
        return folder
    if os.path.lexists(folder):
        raise UserError(f"{folder} is a file: expected the folder of a model")
    spelled = str(path_or_hub_id)
    if unfinished := _of_an_unfinished_run(folder):
        raise UserError(unfinished)
    named = _HUB_URL.fullmatch(spelled) or _HUB_ID.fullmatch(spelled)
    if named is None:
        raise UserError(
            f"{spelled}: no such folder, and not spelled like a hub id (owner/name, "
            f"owner/name@revision): {_near(folder) or 'correct the path'}"
        )
    if named["revision"] is None and (local := mirrored(named["id"])) is not None:
        return local
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                named["id"],
                revision=named["revision"] and unquote(named["revision"]),
                allow_patterns=["*.json", *([] if config_only else ["*.safetensors", *COMPANIONS])],
                # Other formats of the same weights; of folders, 1_Pooling and 2_Dense are read.
                ignore_patterns=["[!12]*/*", "[12][!_]*/*", "consolidated*"],
            )
        )
    except Exception as e:  # HTTP, offline, cache and disk errors have no common base
        raise UserError(
            f"{spelled} is not a local folder, and downloading it from the hub failed "
            f"({type(e).__name__}: {one_line(e)}): "
            f"{_near(folder) or 'correct the path, go online, or log in'}"
        ) from None


def _of_an_unfinished_run(folder: Path) -> str | None:
    """What to do about a model that a run has not written yet; None for other folders."""
    run = folder.parent
    if folder.name not in _MODELS_OF_A_RUN or not os.path.isfile(run / "experiment.json"):
        return None
    held = [f"{name}/" for name in _MODELS_OF_A_RUN if os.path.isfile(run / name / CONFIG)]
    has = f"; it has {' and '.join(held)}" if held else ""
    return (
        f"{run} is a run without {folder.name}/: run its train.py command again to finish it{has}"
    )


def _near(folder: Path) -> str | None:
    """A hint at the nearest folder, where a name on the path is misspelt; None if there is none."""
    above = folder.parent
    while not above.is_dir() and above != above.parent:
        folder, above = above, above.parent
    try:
        others = [entry.name for entry in os.scandir(above) if entry.is_dir()]
    except OSError:  # not for us to read
        return None
    close = difflib.get_close_matches(folder.name, others, n=1, cutoff=0.7)
    return f"did you mean {above / close[0]}?" if close else None
