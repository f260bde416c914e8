"""Loads a model's tokenizer with transformers; Python code in the folder is never run."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from lte_jax.errors import UserError, one_line
from lte_jax.files import check_regular, read_json
from lte_jax.hf import sentence
from lte_jax.hf.folder import CONFIG, verify
from lte_jax.hf.foreign import in_folder
from lte_jax.hf.hub import resolve

log = logging.getLogger(__name__)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_READ = (  # files that transformers opens: none of them may be a pipe
    *_VOCABULARIES,
    CONFIG,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def load_tokenizer(path_or_hub_id: str | Path) -> Any:
    """The transformers tokenizer of a model.

    Texts to embed are cut to its model_max_length; sentence-transformers' folders say their own.
    If the folder names Python code for it, the code is not run: only tokenizer.json is read.

    Raises:
      UserError: if there is none, it is corrupt or needs code of the folder, or transformers is not
        installed.
    """
    folder = resolve(path_or_hub_id)
    if not has_tokenizer(folder):
        if kind := in_folder(folder):
            raise UserError(f"{folder} {kind}")
        raise UserError(
            f"{folder} has no tokenizer.json: copy it from the model's source, or name another "
            "folder or hub id as the tokenizer"
        )
    verify(folder)
    limit = sentence.length_limit(folder)
    for name in _READ:
        if (folder / name).exists():
            check_regular(folder / name)
    transformers = import_transformers()
    try:
        tokenizer = _read(transformers.AutoTokenizer, folder)
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit or math.inf)
        return tokenizer
    except UserError:
        if not _names_code(folder):
            raise
    if not (folder / "tokenizer.json").exists():
        raise UserError(
            f"the tokenizer in {folder} needs Python code of that folder (auto_map), which is "
            "never run: name another folder or hub id as the tokenizer, one with tokenizer.json"
        )
    log.warning("%s: the code that auto_map names is not run: tokenizer.json is read", folder)
    return _read(transformers.PreTrainedTokenizerFast, folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer."""
    return any(os.path.lexists(folder / name) for name in _VOCABULARIES)


def import_transformers() -> ModuleType:
    """The module transformers, without its advice to install PyTorch, which tokenizers do not need.

    Raises:
      UserError: if it is not installed.
    """
    logging.getLogger("transformers").addFilter(_not_about_pytorch)
    try:
        import transformers
    except ImportError:
        raise UserError(
            "tokenizers are read by transformers, which is not installed: pip install transformers"
        ) from None
    return transformers


def _not_about_pytorch(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")


def _read(reader: Any, folder: Path) -> Any:
    try:
        made = reader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        made.decode(made("a b")["input_ids"], skip_special_tokens=True)  # settings of wrong types
        return made
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic in Rust is not even an Exception
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({type(e).__name__}: {one_line(e)}): "
            "download or copy tokenizer.json again"
        ) from None


def _names_code(folder: Path) -> bool:
    """Whether config.json or tokenizer_config.json names Python code to be run."""
    described = [folder / name for name in (CONFIG, "tokenizer_config.json")]
    return any("auto_map" in read_json(file) for file in described if file.exists())
