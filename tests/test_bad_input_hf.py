"""Bad input in Hugging Face folders: one line that names culprit and mend, nothing half-written."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
import safetensors.numpy
from hf_models import config_json, random_tensors, read_tensors, tensor_shapes, write_folder

from lte_jax import hf
from lte_jax.config import LTEConfig, UserError
from lte_jax.hf import export

UP = "model.layers.0.mlp.up_proj.weight"


def load(folder):
    config, lte = hf.read_config(folder)
    return config, lte, hf.load_params(folder, config, lte)


def assert_complains(action, *words):
    """That `action` raises one line with all of `words` in it; returns the line."""
    with pytest.raises(UserError) as raised:
        action()
    line = str(raised.value)
    assert "\n" not in line and 20 < len(line) < 500, line
    for word in map(str, words):
        assert word in line, f"{word!r} not in: {line}"
    return line


# config.json

CONFIG_CHANGES = {
    "family": ({"model_type": "lama"}, ["model_type='lama'", "llama, mistral, qwen2, qwen3"]),
    "rope": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        ["rope_type='yarn'", "llama3"],
    ),
    "rope_v5": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ["'dynamic'"]),
    "rope_factor": ({"rope_scaling": {"type": "linear"}}, ["rope_scaling.factor is missing"]),
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


# Where the model is said to lie


def test_bad_input_empty_folder(tmp_path):
    line = assert_complains(lambda: load(tmp_path), tmp_path / "config.json", "does not exist")
    assert "Hugging Face" in line


@pytest.mark.parametrize(
    "name", ["no/such-model", "no-such-model", "missing/folder/of/mine", "/a b"]
)
def test_bad_input_neither_folder_nor_hub_id(name):
    assert_complains(lambda: hf.resolve(name), name, "folder", "hub")


def test_bad_input_file_in_place_of_folder(tmp_path):
    folder = write_folder(tmp_path, config_json("llama"))
    path = folder / "model.safetensors"
    assert_complains(lambda: hf.resolve(path), path, "is a file", "folder of a model")


# Tensors


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


@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_bad_input_truncated_file(keep, tmp_path):
    path = write_folder(tmp_path, config_json("llama")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert_complains(lambda: load(tmp_path), path, "truncated or corrupt", "copy it again")


def test_bad_input_garbage_file(tmp_path):
    path = write_folder(tmp_path, config_json("llama")) / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert_complains(lambda: load(tmp_path), path, "truncated or corrupt")


def test_bad_input_only_pytorch_weights(tmp_path):
    folder = write_folder(tmp_path, config_json("llama"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    words = [folder, "model.safetensors", "convert pytorch_model.bin", "save_pretrained"]
    assert_complains(lambda: load(folder), *words)


# Shards


@pytest.fixture
def sharded(tmp_path):
    return write_folder(tmp_path / "model", config_json("llama"), shards=2)


def test_bad_input_shard_absent(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    words = ["model-00002-of-00002.safetensors is absent", "15 tensors", "download"]
    assert_complains(lambda: load(sharded), *words)


def test_bad_input_index_names_what_the_shard_lacks(sharded):
    index = sharded / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(raw))
    assert_complains(lambda: load(sharded), index, "model.layers.9.", "model-00001-of-00002")


def test_bad_input_index_names_the_wrong_shard(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("00001-of", "0000X-of", 1).replace("0000X", "00002"))
    assert_complains(lambda: load(sharded), index, "does not hold it")


def test_bad_input_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))
    tensors = safetensors.numpy.load_file(first)
    name = min(tensors)
    safetensors.numpy.save_file(safetensors.numpy.load_file(second) | {name: tensors[name]}, second)
    assert_complains(lambda: load(sharded), name, first, second)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": {"a": 1}}'])
def test_bad_input_corrupt_index(content, sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(content)
    assert_complains(lambda: load(sharded), index, "again")


# Tokenizer


def test_bad_input_tokenizer_missing(tmp_path):
    folder = write_folder(tmp_path, config_json("llama"), {})
    assert_complains(lambda: hf.load_tokenizer(folder), folder, "tokenizer.json", "copy it")


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[]", '"text"'])
def test_bad_input_tokenizer_corrupt(content, tmp_path):
    folder = write_folder(tmp_path, config_json("llama"), {})
    (folder / "tokenizer.json").write_text(content)
    assert_complains(lambda: hf.load_tokenizer(folder), folder, "tokenizer", "copy")


# Export


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("dense") / "model", config_json("llama"))
    return *load(folder), folder


def assert_save_complains(model, target, *words, **options):
    """That saving to `target` raises, and that everything beside it is as it was."""
    config, lte, params, _ = model
    beside = target.parent if target.parent.is_dir() else target.parent.parent
    before = sorted(map(str, beside.rglob("*"))) if beside != target.root else []
    assert_complains(lambda: hf.save(target, config, lte, params, **options), *words)
    after = sorted(map(str, beside.rglob("*"))) if beside != target.root else []
    assert before == after


def test_bad_input_export_onto_a_file(model, tmp_path):
    (tmp_path / "out").write_text("precious")
    assert_save_complains(model, tmp_path / "out", tmp_path / "out", "is a file")
    assert (tmp_path / "out").read_text() == "precious"


def test_bad_input_export_below_a_file(model, tmp_path):
    (tmp_path / "file").write_text("precious")
    target = tmp_path / "file" / "out"
    assert_save_complains(model, target, f"cannot write {target}", "choose a writable folder")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc on this system")
def test_bad_input_export_to_a_read_only_place(model):
    config, lte, params, _ = model
    words = ["cannot write /proc/out", "writable"]
    assert_complains(lambda: hf.save("/proc/out", config, lte, params), *words)


@pytest.mark.parametrize("foreign", ["notes.txt", "checkpoints/"])
def test_bad_input_export_over_other_things(foreign, model, tmp_path):
    config, lte, params, _ = model
    target = tmp_path / "out"
    hf.save(target, config, lte, params)
    if foreign.endswith("/"):
        (target / foreign).mkdir()
    else:
        (target / foreign).write_text("precious")
    assert_save_complains(model, target, target, foreign.strip("/"), "choose another folder")


def test_bad_input_export_over_a_folder_without_config(model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("precious")
    assert_save_complains(model, tmp_path / "out", "tokenizer.json", "choose another folder")


def test_bad_input_export_to_a_full_disk_simulated(model, tmp_path, monkeypatch):
    """An older model in that place survives."""
    config, lte, params, _ = model
    target = tmp_path / "out"
    hf.save(target, config, lte, params)
    before = read_tensors(target)
    write, written = export._Tensor.fetch, []

    def fetch(tensor):
        written.append(tensor.name)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(tensor)

    monkeypatch.setattr(export._Tensor, "fetch", fetch)
    assert_save_complains(model, target, f"cannot write {target}", "No space left on device")
    assert len(written) == 6 and sorted(read_tensors(target)) == sorted(before)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_bad_input_export_to_a_full_disk(model, small_disk):
    target = small_disk / "out"
    assert_save_complains(model, target, f"cannot write {target}", "No space left on device")
    free = shutil.disk_usage(small_disk)
    assert free.used == 0


def test_bad_input_export_of_other_parameters(model, tmp_path):
    config, lte, params, _ = model
    fewer = {k: v for k, v in params.items() if k != "lm_head"}
    more = params | {"head": {"kernel": params["lm_head"]["kernel"]}}
    narrow = params | {"lm_head": {"kernel": params["lm_head"]["kernel"][:, :5]}}
    cases = ((fewer, "is missing"), (more, "head/kernel"), (narrow, "[64, 5], expected [64, 97]"))
    for wrong, word in cases:
        assert_save_complains((config, lte, wrong, None), tmp_path / "out", word, "agree")


def test_bad_input_export_with_another_source(model, tmp_path):
    other = write_folder(tmp_path / "other", config_json("llama", rope_theta=5e5), {})
    words = [other, "rope_theta=500000.0", "10000.0"]
    assert_save_complains(model, tmp_path / "out", *words, source=other)


def test_bad_input_export_of_what_the_family_lacks(model, tmp_path):
    config, lte, params, folder = model
    for change in ({"qk_norm": True}, {"sliding_window": 8}, {"gated": False}, {"family": "gpt9"}):
        wrong = dataclasses.replace(config, **change)
        words = [next(iter(change))]
        assert_save_complains((wrong, lte, params, folder), tmp_path / "out", *words)


def test_bad_input_export_expert_order(model, tmp_path):
    words = ["expert_order", "[3, 96]"]
    assert_save_complains(model, tmp_path / "out", *words, expert_order=np.zeros((3, 96), int))


def test_bad_input_export_lte_size(model, tmp_path):
    config, _, params, folder = model
    broken_lte = (config, LTEConfig(expert_size=7), params, folder)
    assert_save_complains(broken_lte, tmp_path / "out", "expert_size=7", "96")


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
