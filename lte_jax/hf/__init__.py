"""Reads and writes dense and LTE models as Hugging Face folders.

An HF folder holds config.json, safetensors (one file, or shards with an index) and a tokenizer.
An LTE folder is an HF folder with three additions; programs that read HF folders load it as the
dense model, with its neurons in another order:

  config.json                   a section "lte": the fields of `LTEConfig`, the threshold among them
  model.layers.{i}.mlp.router.weight [E, D], .bias [E]   beside the other tensors, in the dtype
                                they were trained in; the bias only if lte.router_bias
  expert_order.safetensors      optional: "expert_order" int32 [N, E, M], the neuron of the dense
                                model that is neuron m of expert e

Every folder that this library writes, dense or LTE, has

  manifest.json                 size and SHA-256 of every file: `lte_jax.files`

Neuron m of expert e is row e*M + m of gate_proj.weight and up_proj.weight (and of their biases)
and column e*M + m of down_proj.weight. A folder is written under a temporary name and renamed, so
it is whole or absent; a killed process can leave a hidden `.NAME.new-*` beside it.

Dimension key: D model width  E experts  M neurons per expert  N layers
"""

from lte_jax.hf.config_json import read_config
from lte_jax.hf.export import save
from lte_jax.hf.folder import verify
from lte_jax.hf.hub import resolve
from lte_jax.hf.tokenizer import has_tokenizer, load_tokenizer
from lte_jax.hf.weights import check_params, load_expert_order, load_params

__all__ = [
    "check_params",
    "has_tokenizer",
    "load_expert_order",
    "load_params",
    "load_tokenizer",
    "read_config",
    "resolve",
    "save",
    "verify",
]
