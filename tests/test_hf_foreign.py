"""Folders of another kind: what was found is named, and what makes a model of it."""

import json

import numpy as np
import pytest
import safetensors.numpy
from hf_folders import HEAD, assert_complains, hub_snapshot, load, lte_folder
from hf_models import config_json, random_tensors, read_tensors, write_folder

from lte_jax.hf.families import FAMILIES


def adapter(folder):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def trainer(folder):
    for step in ("50", "1000", "900"):
        write_folder(folder / f"checkpoint-{step}", config_json("llama"), {})


def run(folder):
    write_folder(folder / "lte", config_json("llama"), {})


FOUND = {
    "adapter": (adapter, ["PEFT adapter", "merge_and_unload"]),
    "gguf": (lambda f: (f / "m.Q4.gguf").write_bytes(b""), ["m.Q4.gguf", "GGUF", "converted from"]),
    "meta": (lambda f: (f / "consolidated.00.pth").write_bytes(b""), ["Meta", "-hf"]),
    "trainer": (trainer, ["3 checkpoints of a Trainer", "checkpoint-1000"]),
    "run": (run, ["work directory of a run", "/lte"]),
    "cache": (lambda f: (f / "snapshots" / "abc").mkdir(parents=True), ["cache", "snapshots/abc"]),
}


@pytest.mark.parametrize("case", FOUND)
@pytest.mark.parametrize("with_config", [False, True])
def test_bad_input_folder_of_another_kind(case, with_config, tmp_path):
    make, words = FOUND[case]
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(config_json("llama")))
    make(tmp_path)
    line = assert_complains(lambda: load(tmp_path), tmp_path, *words)
    assert ".bin" not in line and "does not exist" not in line


def unfinished(root, *absent):
    folder = write_folder(root / "m", config_json("llama"), shards=2)
    snapshot = hub_snapshot(root / "hub", folder)
    for name in absent:
        (snapshot / name).unlink()
    (snapshot.parent.parent / "blobs" / "0a.incomplete").write_bytes(b"half")
    return snapshot


@pytest.mark.parametrize("absent", ["config.json", "model-00001-of-00002.safetensors"])
def test_bad_input_unfinished_download(absent, tmp_path):
    assert_complains(lambda: load(unfinished(tmp_path, absent)), "hf download owner/name")


def test_bad_input_only_pytorch_weights(tmp_path):
    folder = write_folder(tmp_path, config_json("llama"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    words = [folder, "model.safetensors", "convert pytorch_model.bin", "save_pretrained"]
    assert_complains(lambda: load(folder), *words)


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["gptq, 4 bits"]),
        ({"quant_method": "awq", "bits": 4}, ["awq"]),
        ({"quant_method": "fp8"}, ["fp8"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes"]),
        ({"bits": 4}, ["4 bits"]),
    ],
)
def test_bad_input_quantised(quantization, words, tmp_path):
    folder = write_folder(tmp_path, config_json("llama", quantization_config=quantization), {})
    line = assert_complains(lambda: load(folder), "quantised", "quantised from", *words)
    assert "remove the key" not in line


@pytest.mark.parametrize(
    ("suffix", "method"), [("qweight", "GPTQ or AWQ"), ("weight_scale_inv", "fp8"), ("SCB", "bits")]
)
def test_bad_input_quantised_tensors_alone(suffix, method, tmp_path):
    tensors = random_tensors(config_json("llama"))
    tensors[f"model.layers.0.mlp.up_proj.{suffix}"] = np.zeros(4, np.float32)
    folder = write_folder(tmp_path, config_json("llama"), tensors)
    assert_complains(lambda: load(folder), method, "quantised from")


def test_bad_input_float64(tmp_path):
    folder = write_folder(tmp_path, config_json("llama"), dtype="float64")
    line = assert_complains(lambda: load(folder), "F64", "convert the model to float32")
    assert "quantised" not in line


@pytest.mark.parametrize(
    ("model_type", "word"),
    [
        ("mixtral", "mixture of experts already"),
        ("deberta", "encoder"),
        ("t5", "encoder and a decoder"),
        ("qwen2_vl", "more than text"),
        ("mamba", "no Transformer"),
        ("bloom", "blocks of its own"),
        ("gemma2", "caps its attention scores"),
    ],
)
def test_bad_input_known_families(model_type, word, tmp_path):
    folder = write_folder(tmp_path, {"model_type": model_type}, {})
    assert_complains(lambda: load(folder), f"'{model_type}'", word, ", ".join(FAMILIES))


def test_bad_input_classifier(tmp_path):
    tensors = random_tensors(config_json("llama"))
    tensors["score.weight"] = tensors.pop(HEAD)[:2]
    folder = write_folder(tmp_path, config_json("llama"), tensors)
    line = assert_complains(lambda: load(folder), "classifier", "score.weight", "language model")
    assert "tie_word_embeddings" not in line


def test_bad_input_saved_without_its_head(tmp_path):
    tensors = random_tensors(config_json("llama"))
    tensors = {n.removeprefix("model."): t for n, t in tensors.items() if n != HEAD}
    folder = write_folder(tmp_path, config_json("llama", architectures=["LlamaModel"]), tensors)
    assert_complains(lambda: load(folder), "saved as LlamaModel", "LlamaForCausalLM")


def without_routers(folder):
    """The routers are gone and config.json still names them; the mend that is named works."""
    line = assert_complains(lambda: load(folder), "routers", '"lte"', "save_pretrained")
    assert "download" not in line
    raw = json.loads((folder / "config.json").read_text())
    del raw["lte"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert load(folder)[1] is None


def test_bad_input_lte_folder_without_its_routers(tmp_path):
    folder = lte_folder(tmp_path / "lte")
    tensors = {name: t for name, t in read_tensors(folder).items() if ".mlp.router." not in name}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "manifest.json").unlink()
    without_routers(folder)


def test_bad_input_lte_folder_saved_again_by_transformers(tmp_path):
    pytest.importorskip("torch", reason="transformers saves with torch")
    transformers = pytest.importorskip("transformers")
    folder = lte_folder(tmp_path / "lte")
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    without_routers(tmp_path / "again")
