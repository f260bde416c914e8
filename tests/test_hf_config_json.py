"""config.json: what is wrong, unknown or harmful in it is one line that names the key."""

import json
import time

import pytest
from hf_folders import assert_complains, edit, load
from hf_models import config_json, write_folder

from lte_jax import hf

CONFIG_CHANGES = {
    "family": ({"model_type": "lama"}, ["model_type='lama'", "llama, mistral, qwen2, qwen3"]),
    "rope": (
        {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
        ["rope_type='longrope'", "llama3, yarn"],
    ),
    "rope_v5": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic'"]),
    "rope_factor": ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor is missing"]),
    "phi3_longrope": (
        {"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        ["rope_type='longrope'", "valid are default"],
    ),
    "gemma3_cap": (
        {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
        ["attn_logit_softcapping=50.0", "no other is supported"],
    ),
    "gemma3_local_rope": (
        {
            "model_type": "gemma3_text",
            "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
        },
        ["rope_parameters.sliding_attention.rope_type='linear'", "expected default"],
    ),
    "no_rope_layers": (
        {"model_type": "smollm3", "no_rope_layers": [1, 0]},
        ["no_rope_layers has 2 entries", "3 layers"],
    ),
    "opt_350m": (
        {"model_type": "opt", "ffn_dim": 96, "do_layer_norm_before": False},
        ["do_layer_norm_before=False"],
    ),
    "stablelm_parallel": (
        {"model_type": "stablelm", "use_parallel_residual": True},
        ["use_parallel_residual=True"],
    ),
    "yarn_factor": ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling.factor is missing"]),
    "rope_key": ({"rope_scaling": {"rope_type": "default", "mscale": 0.7}}, ["mscale"]),
    "partial_rope": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
    "activation": ({"hidden_act": "silou"}, ["hidden_act='silou'", "silu", "relu"]),
    "multiplier": ({"residual_multiplier": 0.22}, ["residual_multiplier=0.22", "remove the key"]),
    "softcap": ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping"]),
    "quantised": ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    "bidirectional": ({"is_causal": False}, ["is_causal=False"]),
    "window_of_llama": ({"sliding_window": 64}, ["sliding_window=64", "llama"]),
    "string": ({"hidden_size": "64"}, ["hidden_size='64'", "expected int"]),
    "boolean": ({"num_hidden_layers": True}, ["num_hidden_layers=True", "expected int"]),
    "zero": ({"num_attention_heads": 0}, ["num_attention_heads=0", "positive"]),
    "kv_heads": ({"num_key_value_heads": 3}, ["num_kv_heads=3", "num_heads=4"]),
    "dtype": ({"torch_dtype": "int8"}, ["dtype='int8'", "float32, bfloat16, float16"]),
    "eos": ({"eos_token_id": [2, "x"]}, ["eos_token_id"]),
    "layer_types": (
        {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3},
        ["layer_types", "use_sliding_window"],
    ),
    "layer_kind": (
        {"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention", "x"]},
        ["chunked_attention", "full_attention, sliding_attention"],
    ),
    "lte_size": ({"lte": {"expert_size": 7}}, ["expert_size=7", "96", "6", "8"]),
    "lte_key": ({"lte": {"expert_sise": 8}}, ["lte.expert_sise", "'expert_size'"]),
    "lte_value": ({"lte": {"threshold": 1.5}}, ["lte.threshold=1.5", "between 0 and 1"]),
    "lte_type": ({"lte": {"expert_size": "8"}}, ["lte.expert_size='8'", "int"]),
    "lte_section": ({"lte": [8]}, ["lte=[8]", "dict"]),
}


@pytest.mark.parametrize("case", CONFIG_CHANGES)
def test_bad_input_config_json(case, tmp_path):
    changes, words = CONFIG_CHANGES[case]
    folder = write_folder(tmp_path, config_json("llama", **changes), {})
    assert_complains(lambda: hf.read_config(folder), folder / "config.json", *words)


@pytest.mark.parametrize(
    "key", "model_type hidden_size intermediate_size num_hidden_layers vocab_size".split()
)
def test_bad_input_config_key_missing(key, tmp_path):
    raw = config_json("llama")
    del raw[key]
    folder = write_folder(tmp_path, raw, {})
    assert_complains(lambda: hf.read_config(folder), folder / "config.json", key, "missing")


@pytest.mark.parametrize("content", [b"", b'{"hidden_size": 64', b"\xff\xfe\x00", b"[1, 2]"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_bad_input_corrupt_json(name, content, tmp_path):
    folder = write_folder(tmp_path, config_json("llama"), {})
    (folder / name).write_bytes(content)
    assert_complains(lambda: hf.read_config(folder), folder / name)


HARMLESS = {
    "layer_norm_eps": {"layer_norm_eps": 1e-12},
    "num_logits_to_keep": {"num_logits_to_keep": 1},
    "classifier": {"classifier_activation": "gelu", "classifier_dropout": 0.1},
    "dropout": {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1},
    "pattern": {"sliding_window_pattern": 1},
    "list of one bos": {"bos_token_id": [1]},
    "list of one pad": {"pad_token_id": [0]},
    "dtype": {"torch_dtype": "auto", "dtype": "auto"},  # float32, where config.json alone is asked
    "full layers": {"layer_types": ["full_attention"] * 3},
    "sliding layers": {
        **{"model_type": "mistral", "sliding_window": 8},
        "layer_types": ["sliding_attention"] * 3,
    },
    "max_window_layers": {"model_type": "qwen2", "max_window_layers": None},
    "max_window_layers of llama": {"max_window_layers": None},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_keys(case, tmp_path):
    changes = HARMLESS[case]
    family = {"model_type": changes.get("model_type", "llama"), "sliding_window": None}
    family["torch_dtype"] = "float32"
    plain = config_json("llama", **family | {"sliding_window": changes.get("sliding_window")})
    raw = plain | changes
    config = hf.read_config(write_folder(tmp_path / "a", raw, {}))[0]
    pad = 0 if "pad_token_id" in changes else None
    assert (
        config == hf.read_config(write_folder(tmp_path / "b", plain | {"pad_token_id": pad}, {}))[0]
    )


MEANINGFUL = {
    "layer_types of llama": {"layer_types": ["sliding_attention"] * 3},
    "layer_types of mistral": {
        **{"model_type": "mistral", "sliding_window": 8},
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "sliding_window_pattern": {"sliding_window_pattern": 6},
    "bos_token_id": {"bos_token_id": [1, 2]},
    "max_window_layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": None,
    },
    "rms_norm_eps": {"rms_norm_eps": 0.0},
    "rms_norm_eps negative": {"rms_norm_eps": -1e-5},
    "rms_norm_eps nan": {"rms_norm_eps": float("nan")},
    "rope_theta": {"rope_theta": 0},
    "rope_theta inf": {"rope_theta": float("inf")},
    "rope_scaling.factor": {"rope_scaling": {"type": "linear", "factor": -2.0}},
    "low_freq_factor": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 4.0,
            "high_freq_factor": 4.0,
        }
    },
}


@pytest.mark.parametrize("case", MEANINGFUL)
def test_bad_input_keys_that_change_something(case, tmp_path):
    folder = write_folder(tmp_path, config_json("llama", **MEANINGFUL[case]), {})
    assert_complains(lambda: hf.read_config(folder), folder / "config.json", case.split()[0])


HUGE = {  # what to change, and the key to be named: before anything grows to its size
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
    "layers of a sliding model": (
        {"model_type": "qwen2", "num_hidden_layers": 10**9}
        | {"use_sliding_window": True, "max_window_layers": 0},
        "num_hidden_layers=1000000000",
    ),
    "layer_types": (
        {"model_type": "qwen3", "layer_types": ["full_attention"] * 200_000},
        "layer_types has 200000 entries",
    ),
    "width": ({"intermediate_size": 10**18, "lte": {"expert_size": 7}}, "intermediate_size="),
    "vocabulary": ({"vocab_size": 10**400}, "vocab_size="),
    "eps": ({"rms_norm_eps": 10**400}, "rms_norm_eps="),
    "theta": ({"rope_theta": 10**400}, "rope_theta="),
    "eos": ({"eos_token_id": [2] * 100_000}, "eos_token_id has 100000 entries"),
    "key": ({"x" * 100_000 + "attn": "y" * 100_000}, "xxx"),
    "deep value": ({"attn": json.loads("[" * 900 + "1" + "]" * 900)}, ""),
}


@pytest.mark.parametrize("case", HUGE)
def test_bad_input_absurd_sizes(case, tmp_path):
    changes, words = HUGE[case]
    folder = edit(write_folder(tmp_path, config_json("llama")), **changes)
    began = time.monotonic()
    assert_complains(lambda: load(folder), folder / "config.json", words)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", '{"a": 1e999']
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_bad_input_json_bombs(name, text, tmp_path):
    folder = write_folder(tmp_path, config_json("llama"))
    (folder / name).write_text(text)
    assert_complains(lambda: load(folder), folder / name)
