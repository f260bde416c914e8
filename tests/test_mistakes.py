"""The likeliest mistakes: each is one line that names what is wrong and how to mend it."""

import functools
import logging

import numpy as np
import pytest
import tiny
from hf_folders import assert_complains
from hf_models import config_json, write_folder

import lte_jax
from lte_jax import data

CONFIG = tiny.dataclasses.replace(tiny.CONFIG, vocab_size=259)
LTE = tiny.model_and_params(config=CONFIG)
DENSE = tiny.model_and_params(None, config=CONFIG)
TOKENS = np.ones((2, 8), np.int32)
MOEFY = functools.partial(lte_jax.moefy, *DENSE)
GENERATE = functools.partial(lte_jax.generate, *LTE, max_new_tokens=2)
TEXT = functools.partial(lte_jax.generate_text, *LTE, data.byte_tokenizer(), max_new_tokens=2)
MISTAKES = {
    "texts for tokens": (
        lambda: lte_jax.apply(*LTE, ["Once upon a time"]),
        ["tokens is text", "expected token ids", "load_tokenizer"],
    ),
    "a text for prompts of tokens": (lambda: GENERATE("Once"), ["tokens is a", "generate_text"]),
    "texts for prompts of tokens": (lambda: GENERATE(["Once"]), ["prompt 0 is text", "token ids"]),
    "tokens for a text": (lambda: TEXT([[1, 2]]), ["list of strings", "for ids: generate"]),
    "parameters of another model": (
        lambda: lte_jax.apply(DENSE[0], LTE[1], TOKENS),
        ["params: layers/ffn/", "expected floats", "pass the parameters of this model"],
    ),
    "a dense model with routing": (
        lambda: lte_jax.apply(*DENSE, TOKENS, routing="hard"),
        ["routing='hard'", "this model is dense", "leave it out", "lte_jax.moefy"],
    ),
    "generating with it": (
        lambda: lte_jax.generate(*DENSE, TOKENS, max_new_tokens=2, routing="hard"),
        ["routing='hard'", "this model is dense"],
    ),
    "measuring it": (
        lambda: lte_jax.evaluate(*DENSE, data.pad(list(TOKENS), 8), routing="top_k"),
        ["routing='top_k'", "this model is dense"],
    ),
    "no calibration": (
        lambda: MOEFY(expert_size=8),
        ["calibration", "expected token ids [rows, length]", "pass some"],
    ),
    "a misspelt setting": (
        lambda: MOEFY(TOKENS, expert_sise=8),
        ["expert_sise", "did you mean", "expert_size"],
    ),
    "a wrong dtype": (
        lambda: lte_jax.load("x", "float16"),
        ["dtype='float16'", "float32 or bfloat16"],
    ),
    "an empty prompt": (
        lambda: GENERATE([[]]),
        ["prompt 0 is empty", "beginning-of-text token"],
    ),
    "tokens beyond the vocabulary": (
        lambda: lte_jax.apply(*LTE, [[1, 300]]),
        ["token id 300", "vocabulary of 259", "the model's own tokenizer"],
    ),
    "too long a text": (
        lambda: TEXT("o" * 40),
        ["a prompt of 41 tokens", "max_length=32", "at most 0 new tokens fit"],
    ),
    "no threshold": (lambda: GENERATE([[1]], threshold=50), ["threshold=50", "in [0, 1]"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_mistakes(mistake):
    call, words = MISTAKES[mistake]
    assert_complains(call, *words)


def test_bad_input_an_empty_text_without_a_token_in_front():
    tokenizer = data.byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    text = functools.partial(lte_jax.generate_text, *LTE, tokenizer, max_new_tokens=2)
    for prompt in ("", ["a", ""]):
        assert_complains(lambda prompt=prompt: text(prompt), "prompt '' has no tokens", "a word")


@pytest.fixture
def run(tmp_path):
    """What training leaves, as far as it matters."""
    write_folder(tmp_path / "runs" / "demo" / "lte", config_json("llama"), {})
    return tmp_path / "runs" / "demo"


def test_bad_input_the_work_directory_for_its_model(run):
    for load in (lte_jax.load, lte_jax.load_tokenizer):
        assert_complains(lambda load=load: load(run), run, "work directory of a run", run / "lte")


def test_bad_input_a_model_that_a_run_has_not_written_yet(run, monkeypatch):
    (run / "experiment.json").write_text("{}")
    (run / "lte").rename(run / "dense")
    monkeypatch.chdir(run)
    for spelled, where in ((run / "lte", run), ("../demo/lte", "../demo"), ("lte", ".")):
        words = f"{where} is a run without lte/: run its train.py command again to finish it; it"
        assert_complains(lambda path=spelled: lte_jax.load(path), f"{words} has dense/")
    (run / "experiment.json").unlink()
    assert_complains(lambda: lte_jax.load(run / "lte"), f"{run / 'lte'}: no such folder")


@pytest.mark.parametrize(
    ("spelled", "meant"), [("demo/ltee", "demo/lte"), ("dmo/lte", "demo"), ("dem", "demo")]
)
def test_bad_input_a_misspelt_path(spelled, meant, run):
    folder = run.parent
    assert_complains(lambda: lte_jax.load(folder / spelled), f"did you mean {folder / meant}?")


def test_bad_input_a_hub_id_without_a_network(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    load = functools.partial(lte_jax.load, "owner/name")
    assert_complains(load, "owner/name is not a local folder", "hub failed", "go online")
    (tmp_path / "owner" / "nam").mkdir(parents=True)
    assert_complains(load, "owner/name is not a local folder", "did you mean owner/nam?")


def test_a_model_saved_without_a_tokenizer_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lte_jax"):
        lte_jax.save(tmp_path / "without", *LTE)
    [record] = caplog.records
    assert f"{tmp_path / 'without'} has no tokenizer" in record.message
    assert "source=" in record.message and "save_pretrained" in record.message
    caplog.clear()
    data.byte_tokenizer().save_pretrained(tmp_path / "without")
    with caplog.at_level(logging.WARNING, "lte_jax"):
        lte_jax.save(tmp_path / "with", *LTE, source=tmp_path / "without")
    assert not caplog.records
