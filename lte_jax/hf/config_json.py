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

from lte_jax.config import (
    Activation,
    LTEConfig,
    ModelConfig,
    from_mapping,
    moved,
    num_experts,
)
from lte_jax.errors import UserError, nearest
from lte_jax.files import read_json
from lte_jax.hf import foreign, rope
from lte_jax.hf.fields import MAX_LAYERS, NULL, Fields
from lte_jax.hf.folder import CONFIG, verify
from lte_jax.hf.harmless import reject_unknown

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class _Family:
    """What transformers assumes of a model_type if config.json does not say."""

    architecture: str
    max_length: int
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    special_ids: tuple[int | None, int | None] = (None, None)  # bos, eos
    attention_bias: bool | None = False  # None: as in config.json
    attention_bias_of_output: bool = True  # whether attention_bias applies to o_proj
    mlp_bias: bool | None = False
    qk_norm: bool = False
    sliding: str | None = None  # "all" layers have a window, or "some", as in config.json


_FAMILIES = {
    "llama": _Family(
        "LlamaForCausalLM", 2048, special_ids=(1, 2), attention_bias=None, mlp_bias=None
    ),
    "mistral": _Family("MistralForCausalLM", 131072, kv_heads=8, special_ids=(1, 2), sliding="all"),
    "qwen2": _Family(
        "Qwen2ForCausalLM",
        32768,
        kv_heads=32,
        attention_bias=True,
        attention_bias_of_output=False,
        sliding="some",
    ),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        32768,
        kv_heads=32,
        head_dim=128,
        attention_bias=None,
        qk_norm=True,
        sliding="some",
    ),
}

_MAX_EOS_IDS = 100
_ACTIVATIONS: dict[str, Activation] = {  # export writes the first of each kind
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
}


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
    return parse(raw, str(path))


def parse(raw: Mapping[str, Any], where: str) -> tuple[ModelConfig, LTEConfig | None]:
    """As `read_config`, from the object in config.json; error messages begin with `where`."""
    try:
        fields = Fields(raw)
        config = _model_config(fields)
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
    if config.family not in _FAMILIES:
        known = nearest(config.family, _FAMILIES)
        raise UserError(f"family={config.family!r} has no HF export: {known}")
    family = _FAMILIES[config.family]
    names = {ours: hf for hf, ours in reversed(_ACTIVATIONS.items())}
    eos = list(config.eos_ids)
    raw = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_act": names[config.activation],
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope.write(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": eos if len(eos) > 1 else eos[0] if eos else None,
        "pad_token_id": config.pad_id,
        "torch_dtype": dtype,
    }
    if family.attention_bias is None:
        raw["attention_bias"] = config.qkv_bias
    if family.mlp_bias is None:
        raw["mlp_bias"] = config.mlp_bias
    sliding = config.sliding_window is not None
    if family.sliding == "all":
        raw["sliding_window"] = config.sliding_window
    elif family.sliding == "some" and sliding:
        slides = config.sliding_layers or (True,) * config.num_layers
        kinds = ["sliding_attention" if s else "full_attention" for s in slides]
        raw |= {
            "use_sliding_window": True,
            "sliding_window": config.sliding_window,
            "max_window_layers": slides.index(True) if True in slides else config.num_layers,
            "layer_types": kinds,
        }
    _check_expressible(config, raw, dtype)
    return raw


def _check_expressible(config: ModelConfig, raw: Mapping[str, Any], dtype: str) -> None:
    told = dataclasses.replace(parse(raw, "config.json")[0], dtype=config.dtype)
    if config.sliding_layers is not None and all(config.sliding_layers):
        config = dataclasses.replace(config, sliding_layers=None)
    for field in dataclasses.fields(config):
        mine, theirs = getattr(config, field.name), getattr(told, field.name)
        if mine != theirs:
            raise UserError(
                f"an HF config of model_type {config.family!r} cannot have {field.name}={mine!r} "
                f"(it would be read as {theirs!r}): choose a family that has it"
            )


def _model_config(fields: Fields) -> ModelConfig:
    model_type = fields.get("model_type", str)
    if model_type not in _FAMILIES:
        raise UserError(
            f"model_type={model_type!r} {foreign.family(model_type)}: valid are {_list(_FAMILIES)}"
        )
    if fields.get("quantization_config", dict, None):
        raise UserError(foreign.quantised(fields.raw["quantization_config"]))
    family = _FAMILIES[model_type]
    hidden_size = fields.size("hidden_size")
    num_layers = fields.size("num_hidden_layers", most=MAX_LAYERS)
    num_heads = fields.size("num_attention_heads")
    kv_heads = fields.size("num_key_value_heads", family.kv_heads, nullable=True)
    head_dim = fields.size("head_dim", family.head_dim, nullable=True)
    max_length = fields.size("max_position_embeddings", family.max_length)
    activation = fields.get("hidden_act", str, "silu")
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"hidden_act={activation!r} is not supported: valid are {_list(_ACTIVATIONS)}"
        )
    attention_bias = _flag(fields, "attention_bias", family.attention_bias)
    theta, scaling = rope.read(fields, max_length)
    window, slides = _sliding(fields, family, num_layers)
    bos, eos = family.special_ids
    pad = fields.token_id("pad_token_id", None)
    return ModelConfig(
        vocab_size=fields.size("vocab_size"),
        d_model=hidden_size,
        d_ff=fields.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=kv_heads or num_heads,
        head_dim=head_dim or hidden_size // num_heads,
        max_length=max_length,
        family=model_type,
        activation=_ACTIVATIONS[activation],
        norm_eps=fields.positive("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(fields.get("tie_word_embeddings", bool, False)),
        qkv_bias=attention_bias,
        out_bias=attention_bias and family.attention_bias_of_output,
        mlp_bias=_flag(fields, "mlp_bias", family.mlp_bias),
        qk_norm=family.qk_norm,
        sliding_window=window,
        sliding_layers=slides,
        bos_id=fields.token_id("bos_token_id", bos),
        eos_ids=_ids(fields.get("eos_token_id", (int, list, NULL), eos)),
        pad_id=pad if pad is not None and pad >= 0 else None,  # -1 means none in old folders
        dtype=_dtype(fields),
    )


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(names)


def _flag(fields: Fields, key: str, fixed: bool | None) -> bool:
    """A boolean that some families read from config.json and others have `fixed`."""
    if fixed is None:
        return bool(fields.get(key, bool, False))
    if fixed:  # the key is redundant; elsewhere `reject_unknown` rejects it
        fields.asked.add(key)
    return fixed


def _ids(value: int | list | None) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(i) is int for i in ids):
        raise UserError(f"eos_token_id={value!r}: expected an integer or a list of them")
    if len(ids) > _MAX_EOS_IDS:
        raise UserError(f"eos_token_id has {len(ids)} entries: expected at most {_MAX_EOS_IDS}")
    return ids


def _dtype(fields: Fields) -> str:
    old, new = fields.get("torch_dtype", str, None), fields.get("dtype", str, None)
    said = [name.removeprefix("torch.") for name in (new, old) if name not in (None, "auto")]
    name = said[0] if said else "float32"
    if name not in DTYPES:
        raise UserError(f"dtype={name!r} is not supported: valid are {', '.join(DTYPES)}")
    return name


def _sliding(
    fields: Fields, family: _Family, num_layers: int
) -> tuple[int | None, tuple[bool, ...] | None]:
    """The window and which layers have it (None: all), as in transformers' masks."""
    kinds = fields.get("layer_types", list, None)
    named = None if kinds is None else _from_layer_types(kinds, num_layers)
    if family.sliding != "some":
        window = fields.size("sliding_window", 4096, nullable=True) if family.sliding else None
        if named is not None and set(named) != {window is not None}:
            raise UserError(
                f"layer_types has other kinds than the masks of a {fields.raw['model_type']} with "
                f"sliding_window={window}: make them agree"
            )
        return window, None
    window = fields.size("sliding_window", 4096, nullable=True)
    if not fields.get("use_sliding_window", bool, False):
        window = None
    first = fields.get("max_window_layers", int if window and not named else (int, NULL), 28)
    slides = named or tuple(window is not None and i >= first for i in range(num_layers))
    if not any(slides):
        return None, None
    if window is None:
        raise UserError(
            "layer_types has sliding_attention, but use_sliding_window is not true or "
            "sliding_window is null: make them agree"
        )
    return window, None if all(slides) else slides


def _from_layer_types(kinds: list, num_layers: int) -> tuple[bool, ...]:
    valid = ("full_attention", "sliding_attention")
    if len(kinds) != num_layers:
        raise UserError(f"layer_types has {len(kinds)} entries for num_hidden_layers={num_layers}")
    for kind in kinds:
        if kind not in valid:
            raise UserError(f"layer_types has {kind!r}: valid are {', '.join(valid)}")
    return tuple(kind == "sliding_attention" for kind in kinds)
