"""Which token ends a training text, and that a run keeps to it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import data, preflight, sharding, workdir
from lte_jax.config import (
    DataConfig,
    Experiment,
    LTEConfig,
    ModelConfig,
    SourceConfig,
    StageConfig,
    StagesConfig,
)
from lte_jax.errors import UserError

CONFIG = ModelConfig(vocab_size=259, d_model=32, d_ff=64, num_layers=1, head_dim=8, max_length=32)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    records = [{"text": "tale " + "x" * i} for i in range(0, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    return DataConfig(train=str(path), length=32, batch_size=8)


@pytest.mark.slow
def test_probabilities_are_those_after_the_last_token():
    model, params = tiny.model_and_params(None)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 64, size).astype(np.int32) for size in (5, 16, 40)]
    by_hand = [
        jax_softmax(lte_jax.apply(model, params, document[None, -16:]).logits[0, -1])
        for document in documents
    ]
    expected = np.mean(by_hand, axis=0)[[3, 60]]
    got = data.end_probabilities(model, params, documents, [3, 60], length=16)
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def jax_softmax(logits):
    powers = np.exp(np.asarray(logits, np.float64) - float(logits.max()))
    return powers / powers.sum()


@pytest.mark.slow
def test_a_pretrained_model_is_asked_which_token_it_expects(texts):
    model, params = tiny.model_and_params(None, CONFIG)
    tokenizer = data.byte_tokenizer()
    documents = data.tokenize(data.read_texts(texts.train), tokenizer)
    means = data.end_probabilities(model, params, documents, [256, 257], 32)
    likelier = 256 + int(means[1] > means[0])
    assert data.end_token(texts, tokenizer, CONFIG, lambda: (model, params)) == likelier
    head = next(k for k in params if "head" in k)
    swapped = (
        jnp.asarray(params[head]["kernel"])
        .at[:, [256, 257]]
        .set(params[head]["kernel"][:, jnp.array([257, 256])])
    )
    params[head] = params[head] | {"kernel": swapped}
    assert data.end_token(texts, tokenizer, CONFIG, lambda: (model, params)) == 513 - likelier


def test_the_choice_is_logged_in_words(texts, monkeypatch, caplog):
    monkeypatch.setattr(data.ends, "end_probabilities", lambda *_: [0.0026, 0.0015])
    with caplog.at_level("INFO", "lte_jax"):
        end = data.end_token(texts, data.byte_tokenizer(), CONFIG, lambda: (None, {}))
    assert end == 256
    assert caplog.messages == [
        "training documents end with token 256 '<s>': of the candidates the likeliest after a text "
        "(0.0026; 257 '</s>': 0.0015); data.end_token sets another"
    ]


@pytest.mark.parametrize(("name", "mean"), [("stories260k", 0.685), ("babyllama", 0.57)])
def test_real_models_expect_the_beginning_of_the_next_text(shared, name, mean, monkeypatch):
    model, params = lte_jax.load(shared / "models" / name)
    tokenizer = lte_jax.load_tokenizer(shared / "models" / name)
    config = DataConfig(train=str(shared / "data/tinystories/train.jsonl"), newline=" ", length=256)
    measured = {}

    def measure(model, params, documents, ids, length):
        means = data.end_probabilities(model, params, documents, ids, length)
        measured.update(zip(ids, means, strict=True))
        return means

    monkeypatch.setattr(data.ends, "end_probabilities", measure)
    found = data.end_token(config, tokenizer, model.config, lambda: (model, params))
    assert found == tokenizer.bos_token_id == 1
    bos, eos = measured[1], measured[2]
    assert eos < 1e-4 and bos == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize(
    ("choice", "vocabulary", "expected"),
    [
        ("auto", 259, 257),
        ("auto", 257, None),
        ("eos", 259, 257),
        ("bos", 259, 256),
        ("none", 259, None),
    ],
)
def test_from_scratch(texts, choice, vocabulary, expected):
    config = DataConfig(train=texts.train, end_token=choice)
    model_config = ModelConfig(vocab_size=vocabulary)
    assert data.end_token(config, data.byte_tokenizer(), model_config, None) == expected


def test_a_token_that_is_not_there(texts):
    config = DataConfig(train=texts.train, end_token="eos")
    with pytest.raises(UserError, match=r"data.end_token='eos': .* vocabulary of 257: set 'auto'"):
        data.end_token(config, data.byte_tokenizer(), ModelConfig(vocab_size=257), None)


def test_a_run_records_its_end_token_and_keeps_to_it(texts, tmp_path, monkeypatch):
    scratch = SourceConfig(scratch=CONFIG)
    stages = StagesConfig(finetune=StageConfig(steps=1))
    experiment = Experiment(source=scratch, data=texts, stages=stages, report=False)
    mesh = sharding.make_mesh(experiment.mesh)
    first = preflight.prepare(experiment, mesh, None, {})
    assert first.inputs["end_token"] == 257
    assert first.config.eos_ids == (257,)  # so that `generate` ends where a text does
    ends = first.records[0].tokens_RL == 257
    assert ends.sum() == 52  # of 54 documents in training: two fill their last row, without an end

    paths = workdir.Paths(tmp_path / "run")
    (paths.checkpoints("finetune") / "1").mkdir(parents=True)
    workdir.claim(paths, experiment, first.inputs)
    known = workdir.recorded(paths)
    assert known == first.inputs
    # What was found at the start counts, not what would be found now.
    monkeypatch.setattr(data, "end_token", lambda *args: 256)
    assert preflight.prepare(experiment, mesh, None, known).inputs == first.inputs
    assert preflight.prepare(experiment, mesh, None, {}).inputs != first.inputs


def test_a_run_asks_its_pretrained_model(shared, tmp_path):
    experiment = Experiment(
        source=SourceConfig(path=str(shared / "models/stories260k")),
        data=DataConfig(
            train=str(shared / "data/tinystories/train.jsonl"), newline=" ", max_documents=24
        ),
        lte=LTEConfig(expert_size=4),
    )
    parts = preflight.prepare(experiment, sharding.make_mesh(experiment.mesh), None, {})
    assert parts.inputs["end_token"] == 1
    tokens_RL, segments_RL = parts.records[0].tokens_RL, parts.records[0].segments_RL
    last_R = tokens_RL[np.arange(len(tokens_RL)), (segments_RL == 1).sum(1) - 1]
    assert (last_R == 1).mean() > 0.3  # the others are cut
