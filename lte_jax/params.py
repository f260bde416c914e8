"""The table of all parameters: path in the tree, dimensions, and when each exists.

The Flax modules declare from it, sharding.py and decoding follow its letters, and hf/families/ maps
each row to its name in checkpoints. A new parameter needs a row here, its use in layers.py, and its
name in a family.

Dimension key: D model width  E experts  M neurons per expert  N layers  H heads  K kv heads
               C head width  V vocabulary  P pooled width (= D)  S rows of the table of positions
               U token types  Y labels  Z width of embeddings of texts  R hidden units of a router
               A rank of adapters
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lte_jax.config import LTEConfig, ModelConfig, num_experts

# The name of each letter in messages: the key of ModelConfig, if there is one.
NAMES = {
    "V": "vocab_size",
    "D": "d_model",
    "N": "num_layers",
    "H": "num_heads",
    "K": "num_kv_heads",
    "C": "head_dim",
    "E": "experts",
    "M": "neurons",
    "P": "d_model",  # of pooled tokens: D once more, where one matrix has both
    "S": "max_length + position_offset",
    "U": "token_types",
    "Y": "num_labels",
    "Z": "embed_dim",
    "R": "lte.router_rank",
    "A": "lora.rank",
}
Exists = Callable[[ModelConfig, LTEConfig | None], bool]
LAYERS = "layers/"  # parameters below it have a leading axis N
ROUTER = "layers/ffn/router/"


def always(config: ModelConfig, lte: LTEConfig | None) -> bool:
    """Of parameters that every model has."""
    return True


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter."""

    path: str  # in the parameter tree
    letters: str  # one per dimension
    start: str  # "ones", "zeros", or normal with variance 1 / (the product of these dimensions)
    exists: Exists = always

    @property
    def layered(self) -> bool:
        """Whether the array stacks all layers."""
        return self.path.startswith(LAYERS)

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix, which decoding reads in place from the stacked layers."""
        return self.start not in ("ones", "zeros")

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the whole array."""
        return tuple(sizes[letter] for letter in self.letters)

    def initializer(self, sizes: Mapping[str, int]) -> jax.nn.initializers.Initializer:
        """The initializer for training from scratch."""
        if self.is_matrix:
            return jax.nn.initializers.normal(math.prod(sizes[c] for c in self.start) ** -0.5)
        return {"ones": jax.nn.initializers.ones, "zeros": jax.nn.initializers.zeros}[self.start]


def _norm(path: str, letters: str, exists: Exists = always) -> tuple[Row, Row]:
    return (
        Row(f"{path}/scale", letters, "ones", exists),
        Row(f"{path}/bias", letters, "zeros", lambda c, lte: c.norm_bias and exists(c, lte)),
    )


def _router(kind: str, bias: bool = False) -> Exists:
    """Of a part of this kind of router; `bias`: if lte.router_bias."""
    return lambda _, lte: lte is not None and lte.router == kind and (lte.router_bias or not bias)


def _router_bias(config: ModelConfig, lte: LTEConfig | None) -> bool:
    """Of a bias of each expert's logit, which some kinds of routers cannot do without."""
    del config
    optional = {"linear": True, "glu": False, "constant": False, "cuts": False}
    return (
        lte is not None and lte.router in optional and (lte.router_bias or not optional[lte.router])
    )


ROWS = (
    Row("embed/embedding", "VD", "D"),
    Row("embed/positions", "SD", "D", lambda config, _: config.positions == "learned"),
    Row("embed/types", "UD", "D", lambda config, _: config.token_types > 0),
    *_norm("embed/norm", "D", lambda config, _: config.embed_norm),
    *_norm("layers/attn_norm", "ND"),
    Row("layers/attn/q/kernel", "NDHC", "D"),
    Row("layers/attn/q/bias", "NHC", "zeros", lambda config, _: config.qkv_bias),
    Row("layers/attn/k/kernel", "NDKC", "D"),
    Row("layers/attn/k/bias", "NKC", "zeros", lambda config, _: config.qkv_bias),
    Row("layers/attn/v/kernel", "NDKC", "D"),
    Row("layers/attn/v/bias", "NKC", "zeros", lambda config, _: config.qkv_bias),
    Row("layers/attn/q_norm/scale", "NC", "ones", lambda config, _: config.qk_norm),
    Row("layers/attn/k_norm/scale", "NC", "ones", lambda config, _: config.qk_norm),
    Row("layers/attn/q_full_norm/scale", "NHC", "ones", lambda config, _: config.qk_full_norm),
    Row("layers/attn/k_full_norm/scale", "NKC", "ones", lambda config, _: config.qk_full_norm),
    Row("layers/attn/o/kernel", "NHCD", "HC"),
    Row("layers/attn/o/bias", "ND", "zeros", lambda config, _: config.out_bias),
    *_norm("layers/attn_post_norm", "ND", lambda config, _: config.norm_place == "sandwich"),
    *_norm("layers/ffn_norm", "ND"),
    Row("layers/ffn/gate", "NEMD", "D", lambda config, _: config.gated),
    Row("layers/ffn/up", "NEMD", "D"),
    Row("layers/ffn/down", "NEMD", "D"),
    Row("layers/ffn/gate_bias", "NEM", "zeros", lambda c, _: c.mlp_bias and c.gated),
    Row("layers/ffn/up_bias", "NEM", "zeros", lambda config, _: config.mlp_bias),
    Row("layers/ffn/down_bias", "ND", "zeros", lambda config, _: config.mlp_bias),
    Row("layers/ffn/router/kernel", "NDE", "D", _router("linear")),
    Row("layers/ffn/router/bias", "NE", "zeros", _router_bias),
    Row("layers/ffn/router/input_bias", "ND", "zeros", _router("cuts")),
    Row("layers/ffn/router/inner/kernel", "NDR", "D", _router("two_layer")),
    Row("layers/ffn/router/inner/bias", "NR", "zeros", _router("two_layer", bias=True)),
    Row("layers/ffn/router/outer/kernel", "NRE", "R", _router("two_layer")),
    Row("layers/ffn/router/outer/bias", "NE", "zeros", _router("two_layer", bias=True)),
    Row("layers/ffn/router/gate/kernel", "NDE", "D", _router("glu")),
    Row("layers/ffn/router/up/kernel", "NDE", "D", _router("glu")),
    *_norm("layers/ffn_post_norm", "ND", lambda config, _: config.norm_place == "sandwich"),
    *_norm("final_norm", "D", lambda config, _: config.norm_place != "post"),
    Row("transform/kernel", "DP", "D", lambda config, _: config.head == "masked_lm"),
    Row("transform/bias", "P", "zeros", lambda config, _: config.head == "masked_lm"),
    *_norm("transform/norm", "P", lambda config, _: config.head == "masked_lm"),
    Row("lm_head/kernel", "DV", "D", lambda c, _: "lm" in c.head and not c.tie_embeddings),
    Row("lm_head/bias", "V", "zeros", lambda config, _: config.head == "masked_lm"),
    Row("pooler/kernel", "DP", "D", lambda config, _: config.pooler),
    Row("pooler/bias", "P", "zeros", lambda config, _: config.pooler),
    Row("classifier/kernel", "DY", "D", lambda config, _: config.head == "classes"),
    Row("dense/kernel", "DZ", "D", lambda config, _: config.embed_dim is not None),
    Row("dense/bias", "Z", "zeros", lambda config, _: config.embed_dim is not None),
    Row("classifier/bias", "Y", "zeros", lambda c, _: c.head == "classes" and not c.causal),
)


def is_router(path: str) -> bool:
    """Whether the path is that of a router parameter."""
    return path.startswith(ROUTER)


def _adapters(row: Row) -> tuple[Row, Row]:
    """Beside a matrix: a, from its inputs to A numbers, and b, from those to its outputs."""
    inputs = "EM" if row.path == f"{LAYERS}ffn/down" else row.start
    outputs = "".join(letter for letter in row.letters[1:] if letter not in inputs)
    a, b = f"{row.path}_a", f"{row.path}_b"
    return Row(a, f"N{inputs}A", inputs), Row(b, f"NA{outputs}", "A")


# Of each matrix of attention and experts the two that lora.py adds; no model has them by itself.
ADAPTERS: Mapping[str, tuple[Row, Row]] = {
    row.path: _adapters(row)
    for row in ROWS
    if row.layered and row.is_matrix and not is_router(row.path)
}
BY_PATH: Mapping[str, Row] = {row.path: row for rows in (ROWS, *ADAPTERS.values()) for row in rows}


def table(config: ModelConfig, lte: LTEConfig | None) -> tuple[Row, ...]:
    """The parameters of a model; `lte` None: of the dense one."""
    return tuple(row for row in ROWS if row.exists(config, lte))


def dimension_sizes(config: ModelConfig, lte: LTEConfig | None) -> dict[str, int]:
    """The size of each dimension letter."""
    experts = num_experts(config, lte)
    sizes = {letter: getattr(config, NAMES[letter]) for letter in "VDNHKCPUY"}
    sizes["S"] = config.max_length + config.position_offset
    sizes["Z"] = config.embed_dim or 0  # of no parameter
    sizes["R"] = experts if lte is None else lte.router_rank or experts
    return sizes | {"E": experts, "M": config.d_ff // experts}


def abstract(config: ModelConfig, lte: LTEConfig | None) -> dict[str, Any]:
    """The parameter tree as float32 ShapeDtypeStructs, which take no memory."""
    sizes = dimension_sizes(config, lte)
    shapes = {row.path: row.shape(sizes) for row in table(config, lte)}
    structs = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return traverse_util.unflatten_dict(structs, sep="/")


def adopt(
    config: ModelConfig, params: Mapping[str, Any], key: Any, shardings: Any = None
) -> dict[str, Any]:
    """The parameters of a dense model with `config`, from those of one with another head.

    What both have is kept. The rest starts as in transformers: matrices normal, with a standard
    deviation of 0.02, and vectors as in the table.
    """
    sizes, old = dimension_sizes(config, None), traverse_util.flatten_dict(dict(params), sep="/")
    placed = {} if shardings is None else traverse_util.flatten_dict(shardings, sep="/")
    new = {}
    for i, row in enumerate(table(config, None)):
        if row.path in old:
            new[row.path] = old[row.path]
            continue
        start = jax.nn.initializers.normal(0.02) if row.is_matrix else row.initializer(sizes)
        fresh = start(jax.random.fold_in(key, i), row.shape(sizes), jnp.float32)
        if placed:  # every process has made it alike, and puts the parts of its devices there
            whole = np.asarray(fresh)
            fresh = jax.make_array_from_callback(whole.shape, placed[row.path], whole.__getitem__)
        new[row.path] = fresh
    return traverse_util.unflatten_dict(new, sep="/")
