"""The folders of sentence-transformers: how the hidden states of a text become its embedding.

modules.json lists the steps, each with a folder of its settings. Read are a Transformer in the
folder itself, a Pooling of the first token or the mean (of a decoder: the last token), and maybe a
Normalize. Source: sentence-transformers, models/Pooling.py and util of its hub format.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from lte_jax.config import ModelConfig
from lte_jax.errors import UserError
from lte_jax.files import read_json
from lte_jax.hf.folder import inside

log = logging.getLogger(__name__)
MODULES, LIMITS, POOLING = "modules.json", "sentence_bert_config.json", "1_Pooling"
# Files and the folder that are written again with a model; other folders hold no settings we read.
FILES = (MODULES, LIMITS, "config_sentence_transformers.json", f"{POOLING}/config.json")
FIELDS = ("pooling", "unit_length")  # of ModelConfig
STEPS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_PACKAGE = "sentence_transformers.models"
_MODE = "pooling_mode_"
_MEAN, _CLS, _LAST = "mean_tokens", "cls_token", "lasttoken"


def read(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """The fields of ModelConfig that say how texts are embedded; {} without a modules.json.

    Raises:
      UserError: on steps and kinds of pooling that are not supported; names the file.
    """
    path = folder / MODULES
    if not path.exists():
        return {}
    modules = read_json(path, kind=list)
    if not all(isinstance(m, dict) and isinstance(m.get("type"), str) for m in modules):
        raise UserError(f"{path}: expected a list of modules with a type: download it again")
    steps = [module["type"].rpartition(".")[2] for module in modules]
    if steps not in STEPS or modules[0].get("path"):
        raise UserError(
            f"{path}: the modules {', '.join(steps)} are not supported: expected Transformer (in "
            "the folder itself), Pooling and maybe Normalize"
        )
    pooling = _pooling(folder / str(modules[1].get("path", POOLING)) / "config.json", config)
    return {"pooling": pooling, "unit_length": "Normalize" in steps}


def _pooling(path: Path, config: ModelConfig) -> str:
    raw = read_json(path)
    named = raw.get("pooling_mode")  # as newer versions spell it: "mean", or a list
    listed = map(str, named if isinstance(named, list) else filter(None, [named]))
    chosen = [{"mean": _MEAN, "cls": _CLS}.get(name, name) for name in listed]
    chosen += [key.removeprefix(_MODE) for key, on in raw.items() if key.startswith(_MODE) and on]
    known = {_MEAN: "mean", (_LAST if config.causal else _CLS): "first"}
    if len(chosen) != 1 or chosen[0] not in known:
        raise UserError(
            f"{path}: pooling by {' and '.join(chosen) or 'nothing'} is not supported: "
            f"expected {' or '.join(known)}"
        )
    return known[chosen[0]]


def length_limit(folder: Path) -> int | None:
    """The tokens that a text is cut to, or None where the folder does not say.

    Raises:
      UserError: if it is no positive integer.
    """
    path = folder / LIMITS
    limit = read_json(path).get("max_seq_length") if path.exists() else None
    if limit is not None and (type(limit) is not int or limit < 1):
        raise UserError(f"{path}: max_seq_length={limit!r}: expected a positive integer")
    return limit


def write(new: Path, config: ModelConfig, source: Path | None) -> None:
    """Writes how texts are embedded: as in `source`, or where config.json cannot say it."""
    if config.head == "classes" and config.pooling == "mean":
        log.warning("the classifier reads the mean token; transformers would read the first one")
    if source is not None and (source / MODULES).exists():
        for name in FILES:
            if (source / name).is_file() and inside(source / name, source):
                (new / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, new / name)
        return
    if config.pooling == "first" and not config.unit_length:
        return
    steps = STEPS[config.unit_length]
    paths = ["", POOLING, "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"{_PACKAGE}.{step}"}
        for i, step in enumerate(steps)
    ]
    one = _MEAN if config.pooling == "mean" else _LAST if config.causal else _CLS
    modes = {f"{_MODE}{kind}": kind == one for kind in (_CLS, _MEAN, _LAST)}
    (new / POOLING).mkdir()
    for name, raw in (
        (MODULES, modules),
        (f"{POOLING}/config.json", {"word_embedding_dimension": config.d_model} | modes),
    ):
        (new / name).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
