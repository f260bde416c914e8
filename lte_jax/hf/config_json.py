"""ModelConfig and LTEConfig <-> the config.json of an HF folder.

The file is read as the JSON it is, in the spelling of transformers 4 (`rope_theta`,
`rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`), with the defaults of each
family in transformers. A key that could change the forward pass and is not understood is an
error: a model that computes something else than its author meant is worse than none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lte_jax.config import (
    Activation,
    LTEConfig,
    ModelConfig,
    RopeScaling,
    from_mapping,
    num_experts,
)
from lte_jax.errors import UserError, nearest
from lte_jax.files import read_json
from lte_jax.hf.fields import NULL, Fields

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class _Family:
    """What transformers assumes of a model_type where config.json is silent."""

    architecture: str
    max_length: int
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    special_ids: tuple[int | None, int | None] = (None, None)  # bos, eos
    attention_bias: bool | None = False  # None: config.json says; else always so
    attention_bias_of_output: bool = True  # whether attention_bias reaches o_proj
    mlp_bias: bool | None = False
    qk_norm: bool = False
    sliding: str | None = None  # "all" layers slide, or those that config.json names ("some")


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

_ACTIVATIONS: dict[str, Activation] = {  # the first of each kind is what we write
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
}

# Keys seen in real folders that no forward pass of these families reads.
_WITHOUT_EFFECT = frozenset(
    "_attn_implementation _attn_implementation_autoset _flash_attn_2_enabled add_cross_attention "
    "architectures attention_dropout attn_implementation auto_map chunk_size_feed_forward "
    "cross_attention_hidden_size embd_pdrop finetuning_task hidden_dropout initializer_range "
    "is_decoder is_encoder_decoder is_llama_config model_max_length output_attentions "
    "output_hidden_states pretraining_tp problem_type resid_pdrop tie_encoder_decoder "
    "tie_last_hidden_states transformers.js_config transformers_version use_cache".split()
)
_WITHOUT_EFFECT_IF = {"is_causal": True, "partial_rotary_factor": 1.0}
# Any other key with such a word in it could change what is computed.
_TELLING = re.compile(
    "act|alibi|attention|attn|bias|cap|causal|clip|embed|expert|head|hidden|layer|logit|mlp|moe|"
    "mup|multiplier|norm|position|quant|residual|rope|rotary|scal|slid|soft|window"
)


def read_config(folder: Path) -> tuple[ModelConfig, LTEConfig | None]:
    """The model in an HF or LTE folder; the second is None where it is dense.

    Raises:
      UserError: where config.json is absent or corrupt, lacks a key, or asks for what this
        library does not compute (family, rotary embedding, activation, unknown keys).
    """
    path = Path(folder) / "config.json"
    raw = read_json(path, f"is {folder} the folder of a model in Hugging Face format?")
    generation = path.with_name("generation_config.json")
    stops = read_json(generation).get("eos_token_id") if generation.exists() else None
    if stops is not None:  # what `generate` of transformers stops at, too
        raw = raw | {"eos_token_id": stops}
    return parse(raw, str(path))


def parse(raw: Mapping[str, Any], where: str) -> tuple[ModelConfig, LTEConfig | None]:
    """As `read_config`, from the object in config.json; `where` begins the messages."""
    try:
        fields = Fields(raw)
        config = _model_config(fields)
        section = fields.get("lte", dict, None)
        _reject_unknown(fields)
        lte = None if section is None else from_mapping(LTEConfig, section, "lte")
        num_experts(config, lte)  # raises where the expert size does not divide
    except UserError as e:
        raise UserError(f"{where}: {e}") from None
    return config, lte


def write_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The object of a config.json that transformers 4 and 5 read as this dense model.

    Raises:
      UserError: where the family has no key for what the model is.
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
        "rope_scaling": _rope_json(config.rope_scaling),
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
                f"an HF config of model_type {config.family!r} cannot say {field.name}={mine!r} "
                f"(it would be read as {theirs!r}): choose a family that has it"
            )


def _reject_unknown(fields: Fields) -> None:
    """Raises on keys that nobody asked for and that could change the forward pass."""
    for key in sorted(fields.raw.keys() - fields.asked - _WITHOUT_EFFECT):
        value = fields.raw[key]
        if key in _WITHOUT_EFFECT_IF:
            harmless = value is None or value == _WITHOUT_EFFECT_IF[key]
        else:
            harmless = not value or not _TELLING.search(key)
        if not harmless:
            raise UserError(
                f"{key}={value!r} could change what a {fields.raw['model_type']} model computes "
                "and is not supported: remove the key if the model does not depend on it"
            )


def _model_config(fields: Fields) -> ModelConfig:
    model_type = fields.get("model_type", str)
    if model_type not in _FAMILIES:
        raise UserError(f"model_type={model_type!r} is not supported: valid are {_list(_FAMILIES)}")
    family = _FAMILIES[model_type]
    hidden_size = fields.size("hidden_size")
    num_layers = fields.size("num_hidden_layers")
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
    theta, scaling = _rope(fields, max_length)
    window, slides = _sliding(fields, family, num_layers)
    bos, eos = family.special_ids
    pad = fields.get("pad_token_id", int, None)
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
        norm_eps=float(fields.get("rms_norm_eps", (float, int), 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(fields.get("tie_word_embeddings", bool, False)),
        qkv_bias=attention_bias,
        out_bias=attention_bias and family.attention_bias_of_output,
        mlp_bias=_flag(fields, "mlp_bias", family.mlp_bias),
        qk_norm=family.qk_norm,
        sliding_window=window,
        sliding_layers=slides,
        bos_id=fields.get("bos_token_id", (int, NULL), bos),
        eos_ids=_ids(fields.get("eos_token_id", (int, list, NULL), eos)),
        pad_id=pad if pad is not None and pad >= 0 else None,  # -1 stands for none in old folders
        dtype=_dtype(fields),
    )


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(names)


def _flag(fields: Fields, key: str, fixed: bool | None) -> bool:
    """A switch that some families have in config.json and others have `fixed`."""
    if fixed is None:
        return bool(fields.get(key, bool, False))
    if fixed:  # saying so besides does no harm; where it is not so, `reject_rest` objects
        fields.asked.add(key)
    return fixed


def _ids(value: int | list | None) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(i) is int for i in ids):
        raise UserError(f"eos_token_id={value!r}: expected an integer or a list of them")
    return ids


def _dtype(fields: Fields) -> str:
    old, new = fields.get("torch_dtype", str, None), fields.get("dtype", str, None)
    name = (new or old or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype={name!r} is not supported: valid are {', '.join(DTYPES)}")
    return name


def _sliding(
    fields: Fields, family: _Family, num_layers: int
) -> tuple[int | None, tuple[bool, ...] | None]:
    """The window and which layers have it (None: all), as transformers' masks have them."""
    if family.sliding is None:
        return None, None
    if family.sliding == "all":
        return fields.size("sliding_window", 4096, nullable=True), None
    window = fields.size("sliding_window", 4096, nullable=True)
    if not fields.get("use_sliding_window", bool, False):
        window = None
    first = fields.get("max_window_layers", int, 28)
    kinds = fields.get("layer_types", list, None)
    if kinds is None:
        slides = tuple(window is not None and i >= first for i in range(num_layers))
    else:
        slides = _from_layer_types(kinds, num_layers)
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
    for kind in kinds:
        if kind not in valid:
            raise UserError(f"layer_types has {kind!r}: valid are {', '.join(valid)}")
    if len(kinds) != num_layers:
        raise UserError(f"layer_types has {len(kinds)} entries for num_hidden_layers={num_layers}")
    return tuple(kind == "sliding_attention" for kind in kinds)


def _rope(fields: Fields, max_length: int) -> tuple[float, RopeScaling | None]:
    """Base and stretching of the rotary frequencies; transformers: modeling_rope_utils.py."""
    theta = fields.get("rope_theta", (float, int), None)
    old, new = fields.get("rope_scaling", dict, None), fields.get("rope_parameters", dict, None)
    rope = Fields(old or new or {}, "rope_scaling." if old else "rope_parameters.")
    theta = rope.get("rope_theta", (float, int), None) or theta or 10000.0
    old_kind = rope.get("type", str, None)
    kind = rope.get("rope_type", str, None) or old_kind or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UserError(f"rope_type={kind!r} is not supported: valid are default, linear, llama3")
    outer = fields.get("original_max_position_embeddings", int, None)
    inner = rope.get("original_max_position_embeddings", int, None)
    scaling = None
    if kind == "linear":
        scaling = RopeScaling("linear", float(rope.get("factor", (float, int))))
    elif kind == "llama3":
        scaling = RopeScaling(
            "llama3",
            factor=float(rope.get("factor", (float, int))),
            low_freq_factor=float(rope.get("low_freq_factor", (float, int))),
            high_freq_factor=float(rope.get("high_freq_factor", (float, int))),
            original_max_length=outer or inner or max_length,
        )
    unknown = {
        key: value
        for key, value in rope.raw.items()
        if key not in rope.asked and value is not None and (key, value) not in _NEUTRAL_IN_ROPE
    }
    if unknown:
        raise UserError(
            f"{rope.section[:-1]} has {unknown}, which is not supported with rope_type={kind!r}: "
            "remove it if the model does not depend on it"
        )
    return float(theta), scaling


_NEUTRAL_IN_ROPE = [("partial_rotary_factor", 1.0), ("attention_factor", 1.0), ("factor", 1.0)]


def _rope_json(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
    }
