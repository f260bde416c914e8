"""Tiny models in Hugging Face's format, and what the tests that use them share.

LTE_JAX_SOURCE_DTYPE=float16 or bfloat16: every model that a test starts from is stored so, those
of ../shared included, where the test names no type itself. See `make test-sources`.
"""

import json
import math
import os
import re
import shutil
from pathlib import Path

import ml_dtypes  # noqa: F401  (with it, NumPy knows bfloat16 by name)
import numpy as np
import pytest
import safetensors.numpy
from hf_shapes import tensor_shapes

SHARED_MODELS = ("stories260k", "babyllama")
SOURCE_DTYPE = os.environ.get("LTE_JAX_SOURCE_DTYPE", "float32")

_NORM = re.compile(r"norm|LayerNorm|\bln_")

_BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": SOURCE_DTYPE,
}
_GPT2 = {
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "torch_dtype": SOURCE_DTYPE,
}
_OPT = {name: _BASE[name] for name in _BASE if name not in ("rms_norm_eps", "rope_theta")} | {
    "ffn_dim": 96,
    "tie_word_embeddings": True,
}
for _name in ("intermediate_size", "num_key_value_heads"):
    del _OPT[_name]
_NEOX = {name: _BASE[name] for name in _BASE if name not in ("rms_norm_eps", "rope_theta")}
_NEOX |= {"layer_norm_eps": 1e-5, "hidden_act": "gelu"}
del _NEOX["num_key_value_heads"]
_BERT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": SOURCE_DTYPE,
    "num_hidden_layers": 2,
    "hidden_act": "gelu",
    "tie_word_embeddings": True,
    "pad_token_id": 1,
}
_DISTILBERT = {
    "dim": 64,
    "hidden_dim": 96,
    "n_layers": 2,
    "n_heads": 4,
    "activation": "gelu",
    "tie_word_embeddings": True,
    "pad_token_id": 1,
} | {name: _BASE[name] for name in ("vocab_size", "max_position_embeddings", "torch_dtype")}
_STAR, _STABLE = ({n: v for n, v in _BASE.items() if n != "rms_norm_eps"} for _ in range(2))
_STAR |= {"norm_epsilon": 1e-5, "hidden_act": "gelu_pytorch_tanh"}
_STABLE |= {"layer_norm_eps": 1e-5}
_BASES = {"starcoder2": _STAR, "stablelm": _STABLE}
_BASES |= {
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_neox": _NEOX,
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_GEMMA = {"head_dim": 32, "num_key_value_heads": 2, "tie_word_embeddings": True}
_OLMO3 = {"rope_theta": 5e5}  # in transformers 5, layers with a window have no other
_PAD = {"pad_token_id": 0}
_QWEN_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

# Every feature the importer knows, as config.json says it.
CASES = {
    "llama": {"model_type": "llama"},
    "grouped_query": {"model_type": "llama", "num_key_value_heads": 2},
    "multi_query": {"model_type": "llama", "num_key_value_heads": 1},
    "llama3_rope": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": _LLAMA3},
    "linear_rope": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn": {"model_type": "llama", "rope_scaling": _YARN},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "attention_bias": {"model_type": "llama", "attention_bias": True, "num_key_value_heads": 2},
    "mlp_bias": {"model_type": "llama", "mlp_bias": True},
    "head_dim": {"model_type": "llama", "head_dim": 32, "num_key_value_heads": 2},
    "relu": {"model_type": "llama", "hidden_act": "relu"},
    "gelu": {"model_type": "llama", "hidden_act": "gelu"},
    "gelu_tanh": {"model_type": "llama", "hidden_act": "gelu_pytorch_tanh"},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 8},
    "mistral_full": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e6},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": False},
    "qwen2_sliding": {"model_type": "qwen2", "tie_word_embeddings": True} | _QWEN_SLIDING,
    "qwen2_yarn": {
        "model_type": "qwen2",
        "rope_scaling": _YARN | {"beta_fast": 4.0, "beta_slow": 2.0, "attention_factor": 1.3},
    },
    "qwen3_yarn": {
        "model_type": "qwen3",
        "head_dim": 20,
        "rope_scaling": {"type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.2},
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "num_key_value_heads": 2},
    "qwen3_sliding": {
        "model_type": "qwen3",
        "head_dim": 16,
        "attention_bias": True,
        "layer_types": _MIXED_LAYERS,
    }
    | _QWEN_SLIDING,
    "phi3": {"model_type": "phi3", "num_key_value_heads": 2, "sliding_window": 8} | _PAD,
    "phi3_full": {"model_type": "phi3"} | _PAD,
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5} | _PAD,
    "smollm3_list": {"model_type": "smollm3", "no_rope_layers": [0, 1, 0], "attention_bias": True}
    | _PAD,
    "seed_oss_bias": {"model_type": "seed_oss", "head_dim": 16, "attention_out_bias": True},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 32, "num_key_value_heads": 2},
    "ministral_all": {"model_type": "ministral", "head_dim": 32, "sliding_window": 8},
    "ministral": {
        "model_type": "ministral",
        "head_dim": 16,
        "layer_types": _MIXED_LAYERS,
        "sliding_window": 8,
    },
    "gemma": {"model_type": "gemma", "hidden_act": "gelu"} | _GEMMA,
    "gemma_untied": {"model_type": "gemma", "head_dim": 16, "attention_bias": True},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "sliding_window": 8,
        "rope_theta": 1e6,
    }
    | _GEMMA,
    "gemma3_list": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "layer_types": _MIXED_LAYERS,
        "sliding_window": 8,
        "query_pre_attn_scalar": 40,
        "rope_theta": 3e4,
        "rope_local_base_freq": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "granite_plain": {"model_type": "granite", "attention_bias": True, "mlp_bias": True},
    "granite": {
        "model_type": "granite",
        "num_key_value_heads": 2,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.35,
        "residual_multiplier": 0.6,
        "logits_scaling": 0.6,
    },
    "olmo2_bias": {"model_type": "olmo2", "attention_bias": True},
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 2},
    "olmo3": {"model_type": "olmo3", "num_hidden_layers": 5, "sliding_window": 8} | _OLMO3,
    "olmo3_yarn": {
        "model_type": "olmo3",
        "layer_types": _MIXED_LAYERS,
        "sliding_window": 8,
        "rope_scaling": _YARN,
    }
    | _OLMO3,
    "opt": {"model_type": "opt"},
    "opt_gelu": {
        "model_type": "opt",
        "activation_function": "gelu",
        "tie_word_embeddings": False,
        "enable_bias": True,
    },
    "neox_in_turn": {
        "model_type": "gpt_neox",
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
        "rotary_emb_base": 500.0,
        "attention_bias": False,
    },
    "neox": {"model_type": "gpt_neox"},
    "starcoder2_plain": {"model_type": "starcoder2", "use_bias": False, "hidden_act": "silu"},
    "starcoder2": {"model_type": "starcoder2", "num_key_value_heads": 2, "sliding_window": 8},
    "stablelm": {"model_type": "stablelm", "use_qkv_bias": True, "num_key_value_heads": 2},
    "stablelm_half": {"model_type": "stablelm", "partial_rotary_factor": 0.5},
    "gpt2_inner": {"model_type": "gpt2", "n_inner": 96, "activation_function": "relu"},
    "gpt2": {"model_type": "gpt2"},
    "gpt2_untied": {"model_type": "gpt2", "tie_word_embeddings": False},
    "bert": {"model_type": "bert", "architectures": ["BertModel"]},
    "bert_classes": {
        "model_type": "bert",
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "no", "1": "perhaps", "2": "yes"},
        "label2id": {"no": 0, "perhaps": 1, "yes": 2},
    },
    "bert_masked": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
    "distilbert": {"model_type": "distilbert", "architectures": ["DistilBertModel"]},
    "distilbert_masked": {"model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"]},
    "distilbert_classes": {
        "model_type": "distilbert",
        "architectures": ["DistilBertForSequenceClassification"],
        "activation": "relu",
    },
    "roberta": {"model_type": "roberta", "architectures": ["RobertaModel"], "type_vocab_size": 1},
    "roberta_masked": {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]},
    "roberta_classes": {
        "model_type": "roberta",
        "architectures": ["RobertaForSequenceClassification"],
        "hidden_act": "gelu_new",
    },
    "xlm_roberta": {"model_type": "xlm-roberta", "architectures": ["XLMRobertaForMaskedLM"]},
}
FAMILY_CASES = list({raw["model_type"]: case for case, raw in CASES.items()}.values())  # one each


def config_json(case: str, **changes) -> dict:
    """The config.json of a case, in the spelling of transformers 4."""
    raw = CASES[case] | changes
    return _BASES.get(raw["model_type"], _BASE) | raw


def is_decoder(case: str) -> bool:
    """Whether the model of a case continues texts."""
    return "architectures" not in CASES[case]


def reference(folder: Path):
    """The model as transformers loads it, in float32, or a skip."""
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    transformers = pytest.importorskip("transformers")
    named = json.loads((folder / "config.json").read_text()).get("architectures")
    kind = getattr(transformers, named[0] if named else "AutoModelForCausalLM")
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def random_tensors(raw: dict, seed: int = 0, dtype=SOURCE_DTYPE) -> dict[str, np.ndarray]:
    """Random weights: matrices keep variance, norms are near one, biases near zero."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(raw).items():
        scale = 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.2
        is_norm = _NORM.search(name) and name.endswith("weight")
        middle = 1.0 if is_norm and "gemma" not in raw["model_type"] else 0.0
        values = rng.standard_normal(shape) * scale + middle
        tensors[name] = values.astype(dtype)
    return tensors


def write_folder(folder: Path, raw: dict, tensors: dict | None = None, dtype=None, shards=1):
    """An HF folder with random (or the given) tensors, converted to `dtype` if any; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = random_tensors(raw) if tensors is None else tensors
    if dtype is not None:
        tensors = {name: t.astype(dtype) for name, t in tensors.items()}
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[i::shards]}
        safetensors.numpy.save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def copy_models(models: Path, to: Path) -> None:
    """A folder of HF folders in float32, stored in `SOURCE_DTYPE`."""
    for old in models.iterdir():
        shutil.copytree(old, to / old.name, copy_function=shutil.copyfile)
        (to / old.name).chmod(0o755)
        raw = json.loads((old / "config.json").read_text()) | {"torch_dtype": SOURCE_DTYPE}
        write_folder(to / old.name, raw, read_tensors(old), dtype=SOURCE_DTYPE)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, read by safetensors itself."""
    tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def assert_bit_equal(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]):
    """The same names, dtypes, shapes and bits."""
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert mine[name].dtype == tensor.dtype and mine[name].shape == tensor.shape, name
        assert mine[name].tobytes() == tensor.tobytes(), name
