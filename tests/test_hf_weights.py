"""Tensors that do not fit the model: missing, misshapen, of another type, not finite."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tiny
from hf_folders import EMBED, HEAD, UP, assert_complains, load, lte_folder
from hf_models import (
    assert_bit_equal,
    config_json,
    random_tensors,
    read_tensors,
    tensor_shapes,
    write_folder,
)

import lte_jax
from lte_jax import hf
from lte_jax.hf import weights


def broken(tmp_path, change, case="llama", **changes):
    """A folder whose tensors `change` has altered in place."""
    raw = config_json(case, **changes)
    tensors = random_tensors(raw)
    change(tensors)
    return write_folder(tmp_path / "model", raw, tensors)


def test_bad_input_tensor_missing(tmp_path):
    folder = broken(tmp_path, lambda t: t.pop(UP))
    words = [folder, "lacks", UP, "[intermediate_size=96, hidden_size=64]", "download"]
    assert_complains(lambda: load(folder), *words)


def test_bad_input_more_layers_than_stored(tmp_path):
    folder = broken(tmp_path, lambda t: None)
    (folder / "config.json").write_text(json.dumps(config_json("llama", num_hidden_layers=5)))
    words = ["model.layers.3.", "17 more", "num_hidden_layers=5"]
    assert_complains(lambda: load(folder), *words)


def test_bad_input_fewer_layers_than_stored(tmp_path):
    folder = broken(tmp_path, lambda t: None)
    (folder / "config.json").write_text(json.dumps(config_json("llama", num_hidden_layers=2)))
    assert_complains(lambda: load(folder), "model.layers.2.", "8 more", "num_hidden_layers=2")


def test_bad_input_tensor_extra(tmp_path):
    bias = "model.layers.1.self_attn.q_proj.bias"
    folder = broken(tmp_path, lambda t: t.update({bias: np.zeros(64, np.float32)}))
    assert_complains(lambda: load(folder), "model.safetensors", bias, "[64]", "config.json")


def test_bad_input_tensor_misshapen(tmp_path):
    folder = broken(tmp_path, lambda t: t.update({UP: np.zeros((96, 65), np.float32)}))
    expected = f"{UP} has shape [96, 65], expected [intermediate_size=96, hidden_size=64]"
    assert_complains(lambda: load(folder), expected, folder / "model.safetensors")


def test_bad_input_misshapen_in_words_of_the_config(tmp_path):
    """Whichever dimension is wrong, its config key is named."""
    shapes = tensor_shapes(config_json("qwen3"))
    for name, word in {
        "model.embed_tokens.weight": "vocab_size=97",
        "model.layers.0.self_attn.q_proj.weight": "num_attention_heads*head_dim=128",
        "model.layers.0.self_attn.k_proj.weight": "num_key_value_heads*head_dim=64",
        "model.layers.0.self_attn.q_norm.weight": "head_dim=32",
        "model.norm.weight": "hidden_size=64",
    }.items():
        grown = np.zeros([size + 1 for size in shapes[name]], np.float32)
        folder = broken(tmp_path, lambda t, n=name, g=grown: t.update({n: g}), "qwen3")
        assert_complains(lambda f=folder: load(f), name, list(grown.shape), word)


def test_bad_input_router_missing(tmp_path):
    router = {f"model.layers.{i}.mlp.router.weight": np.zeros((12, 64)) for i in range(2)}
    lte = {"expert_size": 8, "router_bias": False}
    folder = broken(tmp_path, lambda t: t.update(router), lte=lte)
    words = ["layers.2.mlp.router.weight", "[intermediate_size/lte.expert_size=12, hidden_size=64]"]
    assert_complains(lambda: load(folder), *words)


@pytest.mark.parametrize("dtype", ["int8", "float64", "int32"])
def test_bad_input_tensor_dtype(dtype, tmp_path):
    folder = broken(tmp_path, lambda t: t.update({UP: t[UP].astype(dtype)}))
    line = assert_complains(lambda: load(folder), UP, "F32, BF16, F16")
    assert {"int8": "I8", "float64": "F64", "int32": "I32"}[dtype] in line


def test_bad_input_layers_of_different_dtype(tmp_path):
    wide = {name: t.astype(np.float32) for name, t in random_tensors(config_json("llama")).items()}
    folder = broken(tmp_path, lambda t: t.update(wide | {UP: t[UP].astype(np.float16)}))
    assert_complains(lambda: load(folder), UP, "F16", "F32", "give a dtype")


def test_bad_input_asked_for_dtype(tmp_path):
    folder = broken(tmp_path, lambda t: None)
    config, lte = hf.read_config(folder)
    complaint = ["dtype='bfloat61'", "'bfloat16'"]
    assert_complains(lambda: hf.load_params(folder, config, lte, dtype="bfloat61"), *complaint)


def test_bad_input_tied_head_that_differs(tmp_path):
    head = {"lm_head.weight": np.ones((97, 64), np.float32)}
    folder = broken(tmp_path, lambda t: t.update(head), "tied")
    assert_complains(lambda: load(folder), "lm_head.weight differs", "tie_word_embeddings")


def test_bad_input_untied_head_missing(tmp_path):
    folder = broken(tmp_path, lambda t: t.pop("lm_head.weight"))
    assert_complains(lambda: load(folder), "lacks lm_head.weight", "set tie_word_embeddings=true")


@pytest.mark.parametrize("types", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_tied_head_of_another_type(types, tmp_path):
    """Equal once converted: the tie is meant."""
    tensors = random_tensors(config_json("tied"))
    half = tensors[EMBED].astype(ml_dtypes.bfloat16)
    full = tensors[EMBED] if types[0] == "float32" else half.astype(np.float32)
    both = (full, half) if types[0] == "float32" else (half, full)
    tensors |= dict(zip((EMBED, HEAD), both, strict=True))
    folder = write_folder(tmp_path, config_json("tied"), tensors)
    np.testing.assert_array_equal(load(folder)[2]["embed"]["embedding"], both[0])
    tensors[HEAD] = both[1] * both[1].dtype.type(1.5)
    write_folder(tmp_path, config_json("tied"), tensors)
    line = assert_complains(lambda: load(folder), "lm_head.weight differs")
    assert "to false" not in line


def test_bad_input_expert_order(tmp_path):
    """Gone, or no permutation: a line, also in folders without a manifest."""
    folder = lte_folder(tmp_path / "lte")
    order_NEM = hf.load_expert_order(folder)
    path = folder / "expert_order.safetensors"
    path.unlink()
    assert_complains(lambda: hf.load_expert_order(folder), "expert_order.safetensors is missing")
    (folder / "manifest.json").unlink()
    assert hf.load_expert_order(folder) is None
    twice = order_NEM.copy()
    twice[1, 0, 0] = twice[1, 0, 1]
    for wrong, words in {
        "twice": ({"expert_order": twice}, ["layer 1", "once"]),
        "shape": ({"expert_order": order_NEM[:2]}, ["[2, 12, 8]", "[3, 12, 8]"]),
        "dtype": ({"expert_order": order_NEM.astype(np.float32)}, ["F32", "I32"]),
        "name": ({"order": order_NEM}, ["nothing"]),
    }.values():
        safetensors.numpy.save_file(wrong, path)
        assert_complains(lambda: hf.load_expert_order(folder), path, *words)
    config, lte, params = load(folder)
    assert_complains(
        lambda: hf.save(tmp_path / "new", config, lte, params, expert_order=twice), "layer 1"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_bad_input_router_weights(value, part, tmp_path):
    folder = lte_folder(tmp_path / "lte")
    (folder / "manifest.json").unlink()
    tensors = read_tensors(folder)
    name = f"model.layers.1.mlp.router.{part}"
    tensors[name].flat[3] = value
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "model.safetensors"
    assert_complains(lambda: load(folder), name, path, "NaN or infinite")


def test_float16_is_a_type_to_store_in(tmp_path):
    raw = config_json("llama", torch_dtype="float16")
    folder = write_folder(tmp_path / "m", raw, dtype="float16")
    assert_complains(lambda: lte_jax.load(folder, "float16"), "float16", "may be stored")
    model, params = lte_jax.load(folder)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float16"}
    lte_jax.save(tmp_path / "new", model, params)
    assert_bit_equal(read_tensors(tmp_path / "new"), read_tensors(folder))
    assert hf.read_config(tmp_path / "new")[0].dtype == "float16"


@pytest.mark.parametrize(
    "bits", [0x7F800080, 0x7FC00000]
)  # NaN that signals, and one that is quiet
def test_bad_input_nan_is_converted_without_a_warning(bits, tmp_path):
    tensors = random_tensors(config_json("llama"), dtype="float32")
    tensors[UP].view(np.uint32)[3, 4] = bits
    folder = write_folder(tmp_path, config_json("llama"), tensors)
    config, lte = hf.read_config(folder)
    params = hf.load_params(folder, config, lte, "bfloat16")
    [place] = np.argwhere(np.isnan(np.asarray(params["layers"]["ffn"]["up"], np.float32)))
    assert place.tolist() == [0, 0, 3, 4]


def resident(path) -> int:
    """Bytes of a file that lie in this process's memory, as Linux counts them."""
    found, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            mine = line.endswith(str(path))
        elif mine and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is resident")
def test_what_was_read_is_not_in_memory_twice(tmp_path, monkeypatch):
    """The file's pages go with each tensor: beside the parameters they would be as much again."""
    config = dataclasses.replace(tiny.CONFIG, vocab_size=8192, d_model=256, d_ff=1024)
    lte_jax.save(tmp_path, *tiny.model_and_params(None, config))
    path, seen, load_row = tmp_path / "model.safetensors", [], weights._load_row

    def watched(*args):
        array = load_row(*args)
        seen.append(resident(path))
        return array

    monkeypatch.setattr(weights, "_load_row", watched)
    hf.load_params(tmp_path, config, None)
    assert len(seen) > 8 and max(seen) < path.stat().st_size / 10
