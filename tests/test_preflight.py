"""What is wrong with a run is found before its first step, and before a directory is claimed."""

import dataclasses
import sys

import pytest
import tiny

import lte_jax
from lte_jax import data, pipeline, preflight, sharding, tasks
from lte_jax.config import SourceConfig, StageConfig, UserError


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return tiny.experiment(tmp_path_factory.mktemp("data"), report=True)


def changed(part, values):
    """An experiment, or a part of one, with fields changed: {"data": {"length": 64}}."""
    new = {k: changed(getattr(part, k), v) if isinstance(v, dict) else v for k, v in values.items()}
    return dataclasses.replace(part, **new)


def refused(experiment, tmp_path, monkeypatch, *words):
    monkeypatch.setattr(pipeline.trainer, "fit", lambda *_, **__: pytest.fail("it trains"))
    with pytest.raises(UserError) as caught:
        lte_jax.train(experiment, tmp_path / "new" / "run")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert word in message, message
    assert not (tmp_path / "new").exists()


WRONG = {
    "no-such-file": ({"data": {"train": "nowhere.jsonl"}}, ["nowhere.jsonl"]),
    "no-text": ({"data": {"train": ""}}, ["data.train is empty", "(--config.data.train=TEXTS)"]),
    "length": ({"data": {"length": 64}}, ["64", "32"]),
    "batch-size": ({"data": {"batch_size": 12}}, ["batch_size=12", "8 devices"]),
    "mesh": ({"mesh": {"data": 3}}, ["8 devices", "data=3"]),
    "expert-size": ({"lte": {"expert_size": 24}}, ["24", "64", "16, 32"]),
    "family": ({"source": {"scratch": {"family": "lama"}}}, ["lama", "llama"]),
    "vocabulary": ({"source": {"scratch": {"vocab_size": 64}}}, ["259", "64"]),
    "no-such-model": ({"source": {"path": "no/such-model"}}, ["no/such-model"]),
    "no-model": ({"stages": {"finetune": StageConfig()}}, ["source.path", "finetune.steps"]),
    "prompt": ({"sample_prompt": "x" * 40}, ["sample_prompt", "41 tokens", "32"]),
}


def test_bad_input_wandb_absent(experiment, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(changed(experiment, {"wandb": "mine"}), tmp_path, monkeypatch, "lte-jax[wandb]")


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_found_before_anything_is_claimed(experiment, tmp_path, case, monkeypatch):
    changes, words = WRONG[case]
    refused(changed(experiment, changes), tmp_path, monkeypatch, *words)


def test_bad_input_source_that_is_sparse_already(experiment, tmp_path, monkeypatch):
    model, params = tiny.model_and_params(config=experiment.source.scratch)
    lte_jax.save(tmp_path / "lte", model, params)
    data.byte_tokenizer().save_pretrained(tmp_path / "lte")
    sparse = changed(experiment, {"source": {"path": str(tmp_path / "lte")}})
    refused(sparse, tmp_path, monkeypatch, "LTE model", "expected the dense model")


def test_bad_input_a_tokenizer_learned_for_a_model_that_has_one(experiment, tmp_path, monkeypatch):
    source = tmp_path / "source"
    config = dataclasses.replace(tiny.CONFIG, vocab_size=259)
    lte_jax.save(source, *tiny.model_and_params(None, config))
    wrong = changed(experiment, {"source": {"path": str(source), "tokenizer": "bpe"}})
    refused(wrong, tmp_path, monkeypatch, "source.tokenizer='bpe'", "random weights", str(source))
    with pytest.raises(UserError, match=r"data.task='sst2' does not teach a tokenizer"):
        tasks.find("sst2").texts(wrong.data)


def test_a_tokenizer_is_learned_from_the_training_texts(experiment):
    learned = changed(experiment, {"source": {"tokenizer": "bpe", "scratch": {"vocab_size": 270}}})
    mesh = sharding.make_mesh(experiment.mesh)
    parts = preflight.prepare(learned, mesh, None, {})
    tokenizer = parts.tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer(" abcd")["input_ids"]) == ["<s>", "Ġabcd"]
    text = tokenizer.decode(parts.records[0].tokens_RL[0])
    assert text.startswith("<s>") and "abcd" in text
    again = preflight.prepare(learned, mesh, None, parts.inputs)
    assert again.inputs == parts.inputs


def test_inputs_are_of_the_source_model_and_its_tokenizer_too(experiment, tmp_path):
    source = tmp_path / "source"
    config = dataclasses.replace(tiny.CONFIG, vocab_size=259)
    lte_jax.save(source, *tiny.model_and_params(None, config))
    data.byte_tokenizer().save_pretrained(source)
    from_source = dataclasses.replace(experiment, source=SourceConfig(path=str(source)))
    mesh = sharding.make_mesh(experiment.mesh)

    def inputs():
        return preflight.prepare(from_source, mesh, None, {"end_token": 257}).inputs

    before = inputs()
    assert before["source/model.safetensors"][0] == (source / "model.safetensors").stat().st_size
    (source / "manifest.json").unlink()
    for name, changed in {
        "model.safetensors": {"source/model.safetensors"},
        "config.json": {"source/config.json"},
        "tokenizer.json": {"tokenizer/tokenizer.json"},
    }.items():
        kept = (source / name).read_bytes()
        other = kept[:-1] + bytes([kept[-1] ^ 1]) if name.endswith("tensors") else kept + b" "
        (source / name).write_bytes(other)
        now = inputs()
        assert {key for key in before if before[key] != now[key]} == changed
        (source / name).write_bytes(kept)
