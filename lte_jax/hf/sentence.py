"""The folders of sentence-transformers: how the hidden states of a text become its embedding.

modules.json lists the steps, each with a folder of its settings. Read are a Transformer in the
folder itself, a Pooling of the first token or the mean (of a decoder: the last token), and maybe a
Dense layer, with a tanh or nothing behind it, and a Normalize. Source: sentence-transformers,
models/Pooling.py and models/Dense.py.
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
MODULES, LIMITS, POOLING, DENSE = (
    "modules.json", "sentence_bert_config.json", "1_Pooling", "2_Dense",
)  # fmt: skip
SETTINGS = (MODULES, LIMITS, "config_sentence_transformers.json") + tuple(
    f"{folder}/config.json" for folder in (POOLING, DENSE)
)
FIELDS = ("pooling", "embed_dim", "embed_activation", "unit_length")  # of ModelConfig
TENSORS = {  # of the dense layer, in the file of its folder
    "dense/kernel": (f"{DENSE}.linear.weight", "Z D"),
    "dense/bias": (f"{DENSE}.linear.bias", "Z"),
}
_PACKAGE = "sentence_transformers.models"
_FIRST, _MORE = ["Transformer", "Pooling"], ([], ["Normalize"], ["Dense"], ["Dense", "Normalize"])
_MODE = "pooling_mode_"
_MEAN, _CLS, _LAST = "mean_tokens", "cls_token", "lasttoken"
_ACTIVATIONS = {"Tanh": "tanh", "Identity": "none"}
_TORCH = {"tanh": "torch.nn.modules.activation.Tanh", "none": "torch.nn.modules.linear.Identity"}


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
    dense = "Dense" in steps
    if steps[:2] != _FIRST or steps[2:] not in _MORE:
        raise UserError(
            f"{path}: the modules {', '.join(steps)} are not supported: expected Transformer, "
            "Pooling, and maybe Dense and Normalize"
        )
    for module, place in zip(modules, ("", POOLING, DENSE)[: 2 + dense], strict=False):
        if module.get("path", place) != place:
            raise UserError(f"{path}: path={module['path']!r}: expected {place!r}")
    fields = {"pooling": _pooling(folder / POOLING / "config.json", config)}
    if dense:
        fields |= _dense(folder / DENSE / "config.json", config)
    return fields | {"unit_length": "Normalize" in steps}


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


def _dense(path: Path, config: ModelConfig) -> dict[str, Any]:
    raw = read_json(path)
    width, after = raw.get("out_features"), str(raw.get("activation_function", "Tanh"))
    kind = after.rpartition(".")[2]
    if type(width) is not int or width < 1 or raw.get("in_features") != config.d_model:
        raise UserError(
            f"{path}: in_features={raw.get('in_features')!r}, out_features={width!r}: expected "
            f"{config.d_model} and a positive integer"
        )
    if kind not in _ACTIVATIONS or raw.get("bias", True) is not True:
        raise UserError(
            f"{path}: activation_function={after!r}, bias={raw.get('bias')!r}: expected a bias, "
            f"and {' or '.join(_ACTIVATIONS)}"
        )
    return {"embed_dim": width, "embed_activation": _ACTIVATIONS[kind]}


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
    """Writes how texts are embedded: as in `source`, or where config.json cannot say it.

    A classifier that reads the first token, as those of transformers do, needs none of it.
    """
    if config.head == "classes" and config.pooling == "first":
        return
    if config.head == "classes":
        log.warning(
            "the classifier reads the mean of all tokens; transformers would read the first one"
        )
    if source is not None and (source / MODULES).exists():
        for name in SETTINGS:
            if (source / name).is_file() and inside(source / name, source):
                (new / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source / name, new / name)
    elif config.pooling != "first" or config.unit_length or config.embed_dim is not None:
        _write_anew(new, config)


def _write_anew(new: Path, config: ModelConfig) -> None:
    steps = _FIRST + ["Dense"] * (config.embed_dim is not None) + ["Normalize"] * config.unit_length
    paths = ["", *(f"{i}_{step}" for i, step in enumerate(steps) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"{_PACKAGE}.{step}"}
        for i, (step, path) in enumerate(zip(steps, paths, strict=True))
    ]
    one = _MEAN if config.pooling == "mean" else _LAST if config.causal else _CLS
    modes = {f"{_MODE}{kind}": kind == one for kind in (_CLS, _MEAN, _LAST)}
    files: dict[str, Any] = {MODULES: modules}
    files[f"{POOLING}/config.json"] = {"word_embedding_dimension": config.d_model} | modes
    if config.embed_dim is not None:
        files[f"{DENSE}/config.json"] = {
            "in_features": config.d_model,
            "out_features": config.embed_dim,
            "bias": True,
            "activation_function": _TORCH[config.embed_activation],
        }
    for name, raw in files.items():
        (new / name).parent.mkdir(exist_ok=True)
        (new / name).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
