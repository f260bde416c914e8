"""A model's hyperparameters and tensors in a GGUF file.

Source: llama.cpp, conversion/llama.py and src/models/{llama,qwen2,qwen3}.cpp.

Dimension key: D model width  H heads  C head width
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lte_jax.attention import rope_amplitude, rope_frequencies, sliding_layers
from lte_jax.config import ModelConfig
from lte_jax.errors import UserError, nearest
from lte_jax.export_gguf import vocabulary
from lte_jax.files import expand, replacing_file
from lte_jax.hf import export as hf_export
from lte_jax.hf.fields import DTYPES
from lte_jax.model import Transformer


@dataclasses.dataclass(frozen=True)
class Family:
    """How llama.cpp runs a family of models.

    Attributes:
      architecture: its name there.
      interleaved: whether pairs that rotate together are neighbours, not halves of a head.
      free: fields of ModelConfig of any value, beside those of every family.
      fixed: field -> value, where that is not ModelConfig's default.
    """

    architecture: str
    interleaved: bool
    free: frozenset[str] = frozenset()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES = {
    "llama": Family("llama", True, frozenset({"qkv_bias", "out_bias", "mlp_bias"})),
    "mistral": Family("llama", True),
    "qwen2": Family("qwen2", False, fixed={"qkv_bias": True}),
    "qwen3": Family("qwen3", False, fixed={"qk_norm": True}),
}
# Fields that keys of the file hold, or that its tensors or tokenizer show, or with a check below.
_HELD = {
    *("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("max_length", "family", "norm_eps", "rope_theta", "rope_scaling", "tie_embeddings"),
    *("sliding_window", "sliding_layers", "bos_id", "eos_ids", "pad_id", "dtype"),
}

_KINDS = dict(zip(DTYPES, ("F32", "BF16", "F16"), strict=True))


def export(
    path: str | Path,
    model: Transformer,
    params: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    dtype: str | None = None,
    name: str = "",
) -> None:
    """Writes a dense model as a GGUF file, whole or not at all; an older file is replaced.

    Args:
      path: of the file, which ends in .gguf.
      model: dense, of one of FAMILIES.
      params: its parameters.
      tokenizer: of transformers, as from `lte_jax.load_tokenizer`. None: the file has none, and
        programs can give it token ids only.
      dtype: of all matrices: float32, bfloat16 or float16. None: that of each parameter.
      name: of the model, for programs to show.

    Raises:
      UserError: on an LTE model, a family, option or tokenizer that llama.cpp lacks, values beyond
        the dtype, parameters that are not the model's, a file that cannot be written, or without
        the package gguf.
    """
    path = expand(path, "OUT")
    gguf, family, config = *check(path, model), model.config
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}: {nearest(dtype, DTYPES)}")
    tensors = _tensors(gguf, config, family, params, dtype)
    writer = gguf.GGUFWriter(None, family.architecture)
    _add_config(gguf, writer, config, tensors)
    writer.add_string("general.name", name)
    vocabulary.add(gguf, writer, tokenizer, config)
    for tensor in tensors:
        kind, size = _kind(gguf, tensor.dtype), tensor.num_bytes
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(tensor.dtype), size, kind)
    with replacing_file(path) as half:
        try:
            writer.write_header_to_file(half)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                # NumPy writes types of others only as the bytes they are.
                writer.write_tensor_data(tensor.fetch().view(np.uint8))
        finally:
            writer.close()


def check(path: Path, model: Transformer) -> tuple[ModuleType, Family]:
    """The package gguf, and how llama.cpp runs the model; asked before parameters are read.

    Raises:
      UserError: as `export` does.
    """
    if path.suffix != ".gguf" or path.is_dir():
        raise UserError(f"{path}: expected the name of a file that ends in .gguf")
    family = _family(model)
    try:
        return importlib.import_module("gguf"), family
    except ImportError:
        raise UserError(
            "GGUF files are written by gguf, which is not installed: pip install 'lte-jax[gguf]'"
        ) from None


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the file."""

    name: str
    of_hf: Any  # what makes it: a tensor of an HF folder, or an array
    heads: int = 0  # whose rows are put in the order of interleaved pairs; 0: none are

    @property
    def dtype(self) -> str:
        return str(self.of_hf.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of_hf.shape

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def fetch(self) -> np.ndarray:
        """Its values on the host."""
        if isinstance(self.of_hf, np.ndarray):
            return self.of_hf
        with np.errstate(over="ignore"):
            values = self.of_hf.fetch()
        if self.dtype == "float16" and not np.isfinite(values).all():
            raise UserError(
                f"{self.name} has values that float16 cannot hold: write it with --dtype=bfloat16"
            )
        return np.ascontiguousarray(_interleaved(values, self.heads)) if self.heads else values


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows [H*C, ...], each head's two halves taken in turn: neighbours rotate together."""
    split = values.reshape(heads, 2, -1, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _family(model: Transformer) -> Family:
    """How llama.cpp runs this model.

    Raises:
      UserError: if it does not; names what it lacks.
    """
    config = model.config
    if model.lte is not None:
        raise UserError(
            "an LTE model has no GGUF, which knows no routers: lte-jax convert MODEL DENSE --dense "
            "writes the dense model that runs all experts, and that can be exported"
        )
    if config.family not in FAMILIES:
        valid = ", ".join(FAMILIES)
        raise UserError(f"family={config.family!r} is not written as GGUF: valid are {valid}")
    family, plain = FAMILIES[config.family], ModelConfig()
    for field in [field.name for field in dataclasses.fields(config)]:
        value, expected = getattr(config, field), family.fixed.get(field, getattr(plain, field))
        if value != expected and field not in _HELD | family.free:
            raise UserError(
                f"{field}={value!r} has no GGUF: llama.cpp runs {config.family} with {expected!r}"
            )
    window = config.sliding_window
    if window is not None and window < config.max_length and any(sliding_layers(config)):
        raise UserError(
            f"sliding_window={window} has no GGUF: llama.cpp runs {config.family} without windows, "
            f"which is the same up to {window} tokens only: with max_position_embeddings={window} "
            "in config.json it is written for those"
        )
    if config.rope_scaling is not None and not family.interleaved:
        raise UserError(
            f"rope_scaling has no GGUF with {config.family}: for short texts remove it from "
            "config.json"
        )
    if family.architecture == "qwen2" and config.head_dim * config.num_heads != config.d_model:
        raise UserError(
            f"head_dim={config.head_dim} has no GGUF: llama.cpp runs qwen2 with hidden_size / "
            f"num_attention_heads = {config.d_model / config.num_heads:g}"
        )
    return family


def _tensors(gguf, config: ModelConfig, family: Family, params, dtype) -> list[_Tensor]:
    """Everything the file holds, in its order."""
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    names = gguf.get_tensor_name_map(architecture, config.num_layers)
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    tensors = []
    if config.rope_scaling is not None:
        plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
        tensors.append(_Tensor("rope_freqs.weight", plain / rope_frequencies(config)))
    for tensor in hf_export.tensors(config, params, dtype):
        name = names.get_name(tensor.name, (".weight", ".bias"))
        if len(tensor.shape) == 1:  # llama.cpp has no other type for norms and biases
            tensor = dataclasses.replace(tensor, dtype="float32")
        permuted = heads.get(name.split(".")[-2], 0) if family.interleaved else 0
        tensors.append(_Tensor(name, tensor, permuted))
    return tensors


def _kind(gguf, dtype: str):
    """The type of a tensor, as the file names it."""
    return gguf.GGMLQuantizationType[_KINDS[dtype]]


def _add_config(gguf, writer, config: ModelConfig, tensors: list[_Tensor]) -> None:
    """The model's hyperparameters."""
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    if rope_amplitude(config) != 1:
        writer.add_rope_scaling_attn_factors(rope_amplitude(config))
    kinds = gguf.LlamaFileType
    whole = {"F32": kinds.ALL_F32, "BF16": kinds.MOSTLY_BF16, "F16": kinds.MOSTLY_F16}
    largest = max(tensors, key=lambda tensor: tensor.num_bytes)
    writer.add_file_type(whole[_kind(gguf, largest.dtype).name])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
