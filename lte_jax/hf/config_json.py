"""ModelConfig and LTEConfig <-> the config.json of an HF folder.

The file is read as plain JSON, as transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) or 5
(`rope_parameters`, `dtype`) spells it, with transformers' defaults for each family. An unknown key
that could change the forward pass is an error: better no model than one that computes something
other than its author meant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lte_jax.config import LTEConfig, ModelConfig, from_mapping, moved, num_experts
from lte_jax.errors import UserError, nearest
from lte_jax.files import read_json
from lte_jax.hf import foreign, scaled, sentence
from lte_jax.hf.families import FAMILIES
from lte_jax.hf.fields import DTYPES, Fields
from lte_jax.hf.folder import CONFIG, verify
from lte_jax.hf.harmless import reject_unknown


def read_config(folder: Path) -> tuple[ModelConfig, LTEConfig | None]:
    """The configs of the model in an HF or LTE folder; the LTEConfig is None for a dense model.

    Raises:
      UserError: if config.json is missing or corrupt, lacks a key, or asks for something that is
        not supported (family, rotary embedding, activation, unknown keys).
    """
    path = Path(folder) / CONFIG
    if not path.exists() and (found := foreign.in_folder(Path(folder))):
        raise UserError(f"{folder} {found}")
    verify(folder)
    raw = read_json(path, f"is {folder} the folder of a model in Hugging Face format?")
    generation = path.with_name("generation_config.json")
    stops = read_json(generation).get("eos_token_id") if generation.exists() else None
    if stops is not None:  # where transformers' `generate` stops, too
        raw = raw | {"eos_token_id": stops}
    config, lte = parse(raw, str(path))
    return dataclasses.replace(config, **sentence.read(Path(folder), config)), lte


def parse(raw: Mapping[str, Any], where: str) -> tuple[ModelConfig, LTEConfig | None]:
    """As `read_config`, from the object in config.json; error messages begin with `where`."""
    try:
        fields = Fields(raw)
        model_type = fields.get("model_type", str)
        if model_type not in FAMILIES:
            valid = ", ".join(FAMILIES)
            raise UserError(
                f"model_type={model_type!r} {foreign.family(model_type)}: valid are {valid}"
            )
        if fields.get(scaled.KEY, dict, None) and scaled.format_of(raw) is None:
            raise UserError(foreign.quantised(raw[scaled.KEY]))
        config = dataclasses.replace(FAMILIES[model_type].read(fields), dtype=_dtype(fields))
        section = fields.get("lte", dict, None)
        reject_unknown(fields)
        lte = (
            None
            if section is None
            else from_mapping(LTEConfig, moved({"lte": section}).get("lte", {}), "lte")
        )
        num_experts(config, lte)  # raises if the expert size does not divide the FFN width
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    except RecursionError:  # from showing a deeply nested value in a message
        raise UserError(f"{where} is nested too deeply: download or copy it again") from None
    return config, lte


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The object of a config.json that transformers 4 and 5 read as this dense model.

    Raises:
      UserError: if the family's config cannot express this model.
    """
    if config.family not in FAMILIES:
        known = nearest(config.family, FAMILIES)
        raise UserError(f"family={config.family!r} has no HF export: {known}")
    raw = FAMILIES[config.family].write(config) | {"torch_dtype": dtype}
    elsewhere = {name: getattr(config, name) for name in ("dtype", *sentence.FIELDS)}
    told = dataclasses.replace(parse(raw, CONFIG)[0], **elsewhere)
    if config.sliding_layers is not None and all(config.sliding_layers):
        config = dataclasses.replace(config, sliding_layers=None)
    for field in dataclasses.fields(config):
        mine, theirs = getattr(config, field.name), getattr(told, field.name)
        if mine != theirs:
            raise UserError(
                f"an HF config of model_type {config.family!r} cannot have {field.name}={mine!r} "
                f"(it would be read as {theirs!r}): choose a family that has it"
            )
    return raw


def _dtype(fields: Fields) -> str:
    old, new = fields.get("torch_dtype", str, None), fields.get("dtype", str, None)
    said = [name.removeprefix("torch.") for name in (new, old) if name not in (None, "auto")]
    name = said[0] if said else "float32"
    if name not in DTYPES:
        raise UserError(f"dtype={name!r} is not supported: valid are {', '.join(DTYPES)}")
    return name
