"""Where a model lies, a local folder or the Hugging Face hub, and its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lte_jax.errors import UserError, one_line

# Files of a folder that belong to the model besides its config and weights; copied on export.
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
_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


def resolve(path_or_hub_id: str | Path) -> Path:
    """The local folder of a model, downloaded to the hub's cache if it is a hub id.

    Of a hub model only config, safetensors, tokenizer and licence files are fetched.

    Raises:
      UserError: where it is neither a folder nor a hub model within reach.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file: expected the folder of a model")
    if not _HUB_ID.fullmatch(str(path_or_hub_id)):
        raise UserError(
            f"{path_or_hub_id} is no local folder, nor is it spelled like a hub id (owner/name): "
            "correct the path"
        )
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                str(path_or_hub_id),
                allow_patterns=["*.safetensors", "*.json", *COMPANIONS],
                ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
            )
        )
    except Exception as e:  # no common base: HTTP, offline, cache and disk errors each have theirs
        raise UserError(
            f"{path_or_hub_id} is neither a local folder nor could it be had from the hub "
            f"({type(e).__name__}: {one_line(e)}): correct the path, go online, or log in"
        ) from None


def load_tokenizer(path_or_hub_id: str | Path) -> Any:
    """The transformers tokenizer of a model.

    Raises:
      UserError: where there is none, it is corrupt, or transformers is not installed.
    """
    folder = resolve(path_or_hub_id)
    if not any((folder / f).exists() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(
            f"{folder} has no tokenizer.json: copy it from the model's source, or name another "
            "folder or hub id as the tokenizer"
        )
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError(
            "tokenizers are read by transformers, which is not installed: pip install transformers"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as e:  # whatever the tokenizer libraries stumble over: plain Exception, often
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({type(e).__name__}: {one_line(e)}): "
            "download or copy tokenizer.json again"
        ) from None
