"""Evaluation against figures worked out by hand; reports; the script from flags to files."""

import copy
import dataclasses
import json
import math
import pathlib
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import config, evaluation, hf, report
from lte_jax.data import Records, byte_tokenizer, pack, pad, read_texts, tokenize
from lte_jax.errors import UserError
from lte_jax.model import Transformer

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOKENIZER = byte_tokenizer()
CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=len(TOKENIZER))
TEXTS = ["def f(x):", "Zoë ate 3 apples.", "a", "The dog ran home and slept."]


@pytest.fixture(scope="module")
def lte():
    """A random model whose routers are undecided."""
    return tiny.model_and_params(config=CONFIG)


def dense_of(model, params):
    """The dense model with the same weights."""
    ffn = {k: p for k, p in params["layers"]["ffn"].items() if k != "router"}
    one = {k: p.reshape(p.shape[0], 1, -1, p.shape[-1]) for k, p in ffn.items()}
    return Transformer(model.config), params | {"layers": params["layers"] | {"ffn": one}}


def packed():
    """Three records with several texts and some padding each."""
    documents = tokenize(TEXTS * 2, TOKENIZER)
    records = pack([document[:12] for document in documents], 30)
    assert len(records) >= 3 and records.segments_RL.max() > 1 and records.segments_RL.min() == 0
    return records


def test_perplexity_by_hand(lte):
    model, params = lte
    records = packed()
    measured = evaluation.perplexity(model, params, records, batch_size=2, num_bytes=100)

    nll, active, scores = [], [], []
    apply = jax.jit(lambda t, s: model.apply({"params": params}, t, mask=s))
    for r in range(len(records)):
        one = records[r : r + 1]
        out = apply(one["tokens"], one["segments"])
        for t in range(records.tokens_RL.shape[1]):
            segment = records.segments_RL[r, t]
            if segment:
                active.append(np.asarray(out.active[:, 0, t]))
                scores.append(np.asarray(out.scores[:, 0, t]))
            if segment and t + 1 < 30 and records.segments_RL[r, t + 1] == segment:
                logp_V = jax.nn.log_softmax(out.logits[0, t])
                nll.append(-float(logp_V[records.tokens_RL[r, t + 1]]))
    assert measured["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert measured["token_ppl"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    assert measured["byte_ppl"] == pytest.approx(math.exp(np.sum(nll) / 100), rel=1e-5)
    assert measured["bits_per_byte"] == pytest.approx(np.sum(nll) / 100 / math.log(2), rel=1e-5)
    per_layer_N = 1 - np.mean(active, axis=(0, 2))
    assert 0.1 < per_layer_N.mean() < 0.9
    np.testing.assert_allclose(measured["sparsity_per_layer"], per_layer_N, atol=1e-6)
    assert measured["sparsity"] == pytest.approx(per_layer_N.mean(), abs=1e-6)
    expected, _ = np.histogram(scores, bins=64, range=(0, 1))
    np.testing.assert_array_equal(measured["score_histogram"], expected)


@pytest.mark.parametrize("format", [None, "int8", "int4"])
def test_logits_in_chunks_make_no_difference(format):
    """Nor are they ever all there; a rounded head, six bits of it beside int4, is read alike."""
    model, params = tiny.model_and_params(dataclasses.replace(tiny.LTE, expert_size=32), CONFIG)
    params = params if format is None else lte_jax.quantize(model, params, format)
    records = packed()
    in_chunks = model.clone(head_tokens=8)  # four of each of two records
    whole, other = (
        evaluation.perplexity(net, params, records, batch_size=2) for net in (model, in_chunks)
    )
    assert other["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    left = {"loss": 0, "token_ppl": 0}
    assert other | left == whole | left
    compiled = evaluation._measure.lower(in_chunks, params, records[:2], None, routing=None)
    logits = f"tensor<2x30x{CONFIG.vocab_size}xf32>"
    assert logits not in compiled.as_text()
    whole = evaluation._measure.lower(model, params, records[:2], None, routing=None)
    assert logits in whole.as_text()


def test_union_sparsity_falls_with_the_batch(lte):
    model, params = lte
    records = Records(np.random.default_rng(0).integers(0, 256, (8, 16)), np.ones((8, 16), int))
    records = Records(records.tokens_RL.astype(np.int32), records.segments_RL.astype(np.int32))
    measured = evaluation.perplexity(model, params, records, batch_size=8)
    union = measured["union_sparsity"]
    assert list(union) == ["1", "2", "4", "8"]
    active_NBLE = model.apply({"params": params}, jnp.asarray(records.tokens_RL)).active
    for size, value in union.items():
        expected = 1 - np.asarray(active_NBLE)[:, : int(size)].any(axis=1).mean()
        assert value == pytest.approx(expected, abs=1e-6)
    assert union["1"] > union["2"] > union["8"]


def test_bytes_of_the_scored_text():
    documents = tokenize(TEXTS, TOKENIZER)
    whole = pad(documents, 40)
    assert evaluation.scored_bytes(whole, TOKENIZER) == sum(len(text.encode()) for text in TEXTS)
    # One byte is one token here; the first of a row, <s> or not, is given.
    assert evaluation.scored_bytes(packed(), TOKENIZER) == sum(
        len(segment) - 1
        for row in range(len(packed()))
        for number in range(1, packed().segments_RL[row].max() + 1)
        if len(segment := np.flatnonzero(packed().segments_RL[row] == number))
    )


def test_evaluate_beside_the_dense_model(lte):
    model, params = lte
    results = evaluation.evaluate(
        model,
        params,
        pad(tokenize(TEXTS, TOKENIZER), 24),
        baseline=dense_of(model, params),
        tokenizer=TOKENIZER,
        threshold=0.0,  # all experts on: the dense model in other words
        prompt="def",
        latency_rounds=2,
    )
    json.dumps(results)
    dense, sparse = results["models"]
    assert (dense["name"], sparse["name"]) == ("dense", "LTE")
    assert sparse["token_ppl"] == pytest.approx(dense["token_ppl"], rel=1e-4)
    assert sparse["sparsity"] == 0.0 and dense["score_histogram"] is None
    assert sparse["threshold"] == 0.0 and dense["threshold"] is None
    assert sparse["sample"] == dense["sample"] and len(dense["sample"]["text"]) > 5
    assert dense["latency_ratio"] == 1.0 and sparse["latency_ms"] > 0
    assert sparse["gflops_per_token"] > dense["gflops_per_token"]  # the router is charged
    assert (results["records"], results["of_records"], results["length"]) == (4, None, 24)
    assert results["tokens"] == sum(min(len(text.encode()), 23) for text in TEXTS)


def test_perplexity_of_a_real_model(shared):
    folder = shared / "models" / "babyllama"
    config, lte = hf.read_config(folder)
    params = hf.load_params(folder, config, lte, dtype="float32")
    stories = shared / "data" / "tinystories" / "validation.jsonl"
    texts = read_texts(str(stories), newline=" ", limit=40)
    records = pad(tokenize(texts, hf.load_tokenizer(folder)), 256)
    measured = evaluation.perplexity(Transformer(config, lte), params, records)
    assert measured["token_ppl"] == pytest.approx(2.000, rel=1e-3)


# ---------------------------------------------------------------------------------------- script


def run_script(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")


def test_script_from_folders_to_table_and_figures(lte, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    model, params = lte
    for name, (made, weights) in {"lte": lte, "dense": dense_of(model, params)}.items():
        hf.save(tmp_path / name, made.config, made.lte, weights)
        TOKENIZER.save_pretrained(tmp_path / name)
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    flags = {
        "model": tmp_path / "lte",
        "dense": tmp_path / "dense",
        "data": tmp_path / "texts.jsonl",
        "length": 24,
        "records": 3,
        "prompt": "def",
        "out": tmp_path / "eval",
    }
    run_script(monkeypatch, *(f"--{key}={value}" for key, value in flags.items()))
    out = capsys.readouterr().out
    assert "| dense |" in out and "| LTE |" in out and "wrote:" in out
    made = {path.name for path in (tmp_path / "eval").iterdir()}
    assert made == {"results.json", "table.md", "quality.png", "layers.png", "scores.png"}
    results = report.read(tmp_path / "eval" / "results.json")
    again = copy.deepcopy(results)
    assert report.table([again]) in out
    assert results["source"]["records"] == 3 and results["environment"]["versions"]["jax"]
    dense, sparse_one = results["models"]
    assert (
        dense["config"]
        == sparse_one["config"]
        == dataclasses.asdict(CONFIG)
        | {
            "sliding_layers": None,
            "eos_ids": [],
        }
    )
    assert sparse_one["lte"]["expert_size"] == 8


def test_script_without_a_folder_says_how_much_it_measured(lte, tmp_path, monkeypatch, capsys):
    lte_jax.save(tmp_path / "lte", *lte)
    TOKENIZER.save_pretrained(tmp_path / "lte")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""])
    (tmp_path / "texts.jsonl").write_text(rows)
    before = sorted(tmp_path.rglob("*"))
    flags = f"--model={tmp_path / 'lte'}", f"--data={tmp_path / 'texts.jsonl'}", "--prompt=def"
    for more, words in {
        ("--records=3",): "Measured on 3 of 4 records of 19 tokens, ",
        ("--records=all", "--length=9"): "Measured on all 4 records of 9 tokens, ",
        ("--join=", "--length=9", "--records=3"): "Measured on 4 records of 9 tokens, 25 predicted",
    }.items():
        run_script(monkeypatch, *flags, *more)
        assert words in (out := capsys.readouterr().out), out
    assert "from 3 of 5 lines." in out
    assert sorted(tmp_path.rglob("*")) == before


def test_script_of_several_runs(tmp_path, monkeypatch, capsys):
    made = config.Experiment()
    for seed, ppl in enumerate((4.4, 4.6)):
        (tmp_path / str(seed)).mkdir()
        models = [
            {"name": "dense", "token_ppl": 4.0, "sparsity": 0.0},
            {"name": "LTE", "token_ppl": ppl, "sparsity": 0.5},
        ]
        (tmp_path / str(seed) / "results.json").write_text(json.dumps({"models": models}))
        experiment = dataclasses.asdict(dataclasses.replace(made, seed=seed))
        (tmp_path / str(seed) / "experiment.json").write_text(json.dumps(experiment))
    run_script(monkeypatch, "--runs", tmp_path / "0", tmp_path / "1")
    out = capsys.readouterr().out
    assert "| LTE | 50% | 0, 1 | 50.0% | 4.500 ± 0.141 | +12.5 ± 3.5% |  |" in out
    assert "± the standard deviation" in out
    run_script(
        *(monkeypatch, "--runs", tmp_path / "0", tmp_path / "1"),
        *("--out", tmp_path / "both", "--no-figures"),
    )
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"table.md", "runs.json"}


def test_script_joins_records_into_one_text(lte, tmp_path, monkeypatch):
    lte_jax.save(tmp_path / "lte", *lte)
    TOKENIZER.save_pretrained(tmp_path / "lte")
    records = "".join(json.dumps({"text": t}) + "\n" for t in ("one", "", "two three", "four"))
    (tmp_path / "lines.jsonl").write_text(records)
    seen = []

    def measure(model, params, records, **chosen):
        seen.append(records)
        raise UserError("enough")

    monkeypatch.setattr(lte_jax, "evaluate", measure)
    flags = {"model": tmp_path / "lte", "data": tmp_path / "lines.jsonl", "out": tmp_path / "out"}
    flags |= {"join": "-", "length": 6, "records": 3}
    with pytest.raises(SystemExit):
        run_script(monkeypatch, *(f"--{key}={value}" for key, value in flags.items()))
    [records] = seen
    [text] = tokenize(["one--two three"], TOKENIZER)
    np.testing.assert_array_equal(records.tokens_RL[records.segments_RL > 0], text)
    assert records.tokens_RL.shape == (3, 6)


def test_script_bad_input(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_script(
            monkeypatch, "--model", tmp_path / "no", "--data=x.jsonl", "--out", tmp_path / "o"
        )
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "o").exists()
