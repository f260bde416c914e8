"""Tasks of classification and regression: records, losses, metrics, and a whole run of one."""

import argparse
import dataclasses
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lte_jax
from lte_jax import (
    config,
    data,
    hf,
    losses,
    objective,
    params,
    pipeline,
    preflight,
    scoring,
    sharding,
    tasks,
)
from lte_jax.config import DataConfig, MeshConfig, ModelConfig, UserError
from lte_jax.model import Transformer
from lte_jax.tasks import glue

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORDS = "the film is good bad a dull fine plot and no joy great".split()
ENCODER = ModelConfig(
    vocab_size=20, d_model=32, d_ff=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8,
    max_length=24, family="bert", causal=False, head="none", pooler=True, activation="gelu",
    gated=False, norm="layer", norm_bias=True, norm_place="post", norm_eps=1e-12,
    positions="learned", token_types=2, embed_norm=True, tie_embeddings=True, qkv_bias=True,
    out_bias=True, mlp_bias=True, pad_id=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return transformers.BertTokenizer(str(vocabulary))


@pytest.fixture
def encoder(tmp_path, tokenizer):
    """The folder of a tiny BERT without a head."""
    return saved(ENCODER, tokenizer, tmp_path / "bert")


def saved(config_, tokenizer, folder):
    rng = np.random.default_rng(0)
    draw = lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32)  # noqa: E731
    weights = jax.tree.map(draw, params.abstract(config_, None))
    hf.save(folder, config_, None, weights, tokenizer=tokenizer)
    return folder


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


def sentences(number, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(number):
        words = rng.choice(WORDS, 6).tolist()
        yield {"sentence": " ".join(words), "label": int("good" in words or "great" in words)}


# ---------------------------------------------------------------------------------------- records


def test_records_of_pairs_have_types_and_labels(tokenizer, tmp_path, caplog):
    rows = [
        {"sentence1": "the film", "sentence2": "is good", "label": 1},
        {"sentence1": "a " * 12, "sentence2": "dull plot", "label": 0},
    ]
    folder = write(tmp_path / "mrpc" / "train.jsonl", rows)
    task = tasks.find("mrpc")
    settings = DataConfig(train=str(folder), length=12, pack=False)
    config_ = task.dense_config(ENCODER)
    assert (config_.head, config_.num_labels, config_.pooler) == ("classes", 2, True)
    records = task.records(str(folder), "train", settings, tokenizer, config_)
    first = records[0]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    assert first["tokens"][:7].tolist() == [cls, 5, 6, sep, 7, 8, sep]
    assert first["types"].tolist() == [0] * 4 + [1] * 3 + [0] * 5
    assert first["segments"].tolist() == [1] * 7 + [0] * 5
    assert records.more["labels"].tolist() == [[1], [0]]
    assert records[1]["tokens"][-1] == sep and np.all(records[1]["segments"])
    assert "1 of 2 texts are cut to 12 tokens" in caplog.text


def test_a_part_of_the_validation_split_is_chosen_by_the_seed(tokenizer, tmp_path):
    folder = write(tmp_path / "sst2" / "train.jsonl", sentences(20))
    write(folder / "validation.jsonl", sentences(13, seed=1))
    parts = {}
    for most, seed in (64, 0), (5, 0), (5, 0), (5, 1):
        settings = DataConfig(train=str(folder), length=8, pack=False, max_validation_records=most)
        train, kept = tasks.find("sst2").build(settings, tokenizer, ENCODER, seed)
        found = np.hstack([kept.tokens_RL, kept.more["labels"]]).tolist()
        assert len(train) == 20 and parts.setdefault((most, seed), found) == found
    everything = parts[64, 0]
    assert len(everything) == 13 and len(parts[5, 0]) == 5 and parts[5, 0] != parts[5, 1]
    for part in parts.values():  # with their labels, in their order
        assert part == [row for row in everything if row in part]


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_packed_texts_have_the_logits_of_single_ones(pooling, tokenizer, tmp_path):
    """Several texts a record, each with its types, label and logits, wherever it lies."""
    rng = np.random.default_rng(1)
    texts = [[" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(2)] for _ in range(20)]
    rows = [
        {"sentence1": a, "sentence2": b, "label": int(a.split()[0] in WORDS[:4])} for a, b in texts
    ]
    folder = write(tmp_path / "mrpc" / "train.jsonl", rows)
    task = tasks.find("mrpc")
    config_ = dataclasses.replace(task.dense_config(ENCODER), pooling=pooling)
    model = Transformer(config_)
    draw = lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32)  # noqa: E731
    weights = jax.tree.map(draw, params.abstract(config_, None))
    by_text, measured = {}, []
    product = {"product": lambda guessed, labels: float(np.mean(guessed * labels))}  # by order
    ordered = dataclasses.replace(task, labels=(), metrics=product)
    for pack in False, True:
        settings = DataConfig(train=str(folder), length=32, pack=pack)
        records = task.records(str(folder), "train", settings, tokenizer, config_)
        logits, _ = scoring.class_logits(model, weights, records, batch_size=4)
        whole, found = records[:], []
        labels = whole["labels"][objective.predicted(model, whole)]
        for tokens, segments, types in zip(
            whole["tokens"], whole["segments"], whole["types"], strict=True
        ):
            for segment in range(1, segments.max() + 1):
                mine = segments == segment
                found.append((*tokens[mine].tolist(), *types[mine].tolist()))
        how = {"task": ordered, "batch_size": 4, "latency_rounds": 0}
        measured.append(lte_jax.evaluate(model, weights, records, **how))
        by_text[pack] = dict(zip(found, zip(labels.tolist(), logits, strict=True), strict=True))
        size = len(records)
    assert size < 15  # packed
    assert [results["records"] for results in measured] == [20, 20]
    single, packed = (results["models"][0] for results in measured)
    assert packed["metrics"] == pytest.approx(single["metrics"], rel=1e-4)
    expected = 100 * np.mean([label * logits[0] for label, logits in by_text[False].values()])
    assert packed["metrics"]["product"] == pytest.approx(expected, rel=1e-4)
    assert packed["loss"] == pytest.approx(single["loss"], rel=1e-5)
    assert by_text[True].keys() == by_text[False].keys() and len(by_text[True]) > 15
    assert {label for label, _ in by_text[False].values()} == {0, 1}
    for text, (label, logits) in by_text[False].items():
        assert by_text[True][text][0] == label
        np.testing.assert_allclose(by_text[True][text][1], logits, atol=2e-5)


def test_a_mean_stands_for_a_text():
    """The logits of a mean are those of the mean of its tokens' hidden states, padding left out."""
    config_ = dataclasses.replace(ENCODER, head="classes", pooling="mean", pooler=False)
    model, rng = Transformer(config_), np.random.default_rng(2)
    draw = lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32)  # noqa: E731
    weights = jax.tree.map(draw, params.abstract(config_, None))
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    weights = jax.tree.map(jnp.asarray, weights)
    out = lte_jax.apply(model, weights, rng.integers(5, 12, (2, 4)), mask=mask)
    hidden = np.asarray(out.hidden)
    means = np.stack([hidden[0, :3].mean(axis=0), hidden[1].mean(axis=0)])
    head = jax.tree.map(np.asarray, weights["classifier"])
    np.testing.assert_allclose(out.logits, means @ head["kernel"] + head["bias"], atol=1e-5)
    with pytest.raises(UserError, match="texts"):
        model.apply({"params": weights}, jnp.asarray(mask), texts=0)


BAD = {
    "label": ({"sentence": "a film", "label": 2}, "label=2: expected 0 (negative), 1 (positive)"),
    "hidden": ({"sentence": "a film", "label": -1}, "test set without labels"),
    "fraction": ({"sentence": "a film", "label": 0.5}, "label=0.5"),
    "nan": ({"sentence": "a film", "label": float("nan")}, "label=nan"),
    "infinite": ({"sentence": "a film", "label": float("inf")}, "label=inf"),
    "word": ({"sentence": "a film", "label": "good"}, "label='good'"),
    "column": ({"text": "a film", "label": 1}, "no column 'sentence'"),
    "no label": ({"sentence": "a film"}, "no column 'label'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_records(case, tokenizer, tmp_path):
    row, message = BAD[case]
    good = {"sentence": "fine", "label": 1}
    folder = write(tmp_path / "sst2" / "train.jsonl", [good, row])
    write(tmp_path / "sst2" / "validation.jsonl", [good])
    settings = DataConfig(train=str(folder), batch_size=1, length=8)
    with pytest.raises(UserError) as error:
        tasks.find("sst2").build(settings, tokenizer, ENCODER)
    assert message in str(error.value) and "train.jsonl:2" in str(error.value)


def test_bad_input_task(tokenizer, tmp_path):
    with pytest.raises(UserError, match="data.task='sst': .*'sst2'"):
        tasks.find("sst")
    with pytest.raises(UserError, match="data.task='sst2' needs an encoder"):
        tasks.find("sst2").dense_config(ModelConfig())
    folder = write(tmp_path / "sst2" / "dev.jsonl", sentences(2))
    with pytest.raises(UserError, match="without train.jsonl.*found dev.jsonl"):
        tasks.find("sst2").build(DataConfig(train=str(folder), length=8), tokenizer, ENCODER)


def test_bad_input_encoder_without_a_task(encoder):
    experiment = config.Experiment(
        source=config.SourceConfig(path=str(encoder)), data=DataConfig(train="python-stdlib")
    )
    with pytest.raises(UserError, match="is an encoder .*set data.task, one of cola, sst2"):
        preflight.prepare(experiment, sharding.make_mesh(MeshConfig()), None, {})


# ------------------------------------------------------------------------------- losses and metrics


def test_label_losses_by_hand():
    logits = jnp.float32([[[0.0, 1.0], [2.0, 0.0]], [[9.0, 9.0], [9.0, 9.0]]])
    mask, count = jnp.asarray([[True, True], [False, False]]), jnp.float32(2)
    expected = (np.log(1 + np.exp(-1)) + np.log(1 + np.exp(2))) / 2
    loss = losses.label_loss(logits, jnp.int32([[1, 1], [0, 0]]), mask, count)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    found = losses.label_loss(logits[..., :1], jnp.float32([[1.0, 0.5], [7.0, 7]]), mask, count)
    np.testing.assert_allclose(found, (1.0 + 1.5**2) / 2, rtol=1e-6)
    found = losses.distillation(logits[..., :1], logits[..., :1] + 2, mask, count)
    np.testing.assert_allclose(found, 4.0, rtol=1e-6)


def test_metrics_by_hand():
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'lte-jax[tasks]'")
    guessed, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])
    logits = np.eye(2)[guessed]
    assert tasks.find("sst2").score(logits, labels) == pytest.approx({"accuracy": 60})
    scores = tasks.find("mrpc").score(logits, labels)
    assert scores == pytest.approx({"accuracy": 60, "f1": 100 * 2 / 3})
    # (TP TN - FP FN) / sqrt of the product of the four margins
    assert glue.matthews(guessed, labels) == pytest.approx((2 * 1 - 1 * 1) / 6)
    values = np.array([0.0, 1.0, 2.0, 9.0])
    assert glue.spearman(values**3, values) == pytest.approx(1)
    assert glue.pearson(values, -values) == pytest.approx(-1)


# -------------------------------------------------------------------------------------- a whole run


@pytest.fixture
def experiment(encoder, tmp_path):
    folder = write(tmp_path / "sst2" / "train.jsonl", sentences(64))
    write(tmp_path / "sst2" / "validation.jsonl", sentences(13, seed=1))
    c = config.to_config_dict(config.Experiment())
    c.source.path, c.data.task, c.data.train = str(encoder), "sst2", str(folder)
    c.data.length, c.data.batch_size, c.lte.expert_size = 12, 8, 8
    c.data.pack = False
    c.lte.calibration_records = 16
    c.stages.finetune.steps, c.stages.router.steps, c.stages.adapt.steps = 12, 4, 2
    c.stages.finetune.learning_rate, c.log_every = 3e-3, 2
    return config.from_mapping(config.Experiment, c.to_dict())


def measured_again(folder, experiment, entry):
    """evaluate.py --tasks measures what the run's report says; other tasks refuse an encoder."""
    model, weights = lte_jax.load(folder)
    parts = model, weights, experiment.data.train, 12
    settings = {"tokenizer": lte_jax.load_tokenizer(folder)}
    [row] = tasks.measure(["sst2"], *parts, **settings)
    assert row["value"] == pytest.approx(entry["metrics"]["accuracy"]) and row["records"] == 13
    assert row["sparsity"] == pytest.approx(entry["sparsity"], abs=1e-5) and row["error"] >= 0
    for name in "mmlu", "wikitext":
        write(pathlib.Path(experiment.data.train) / "test.jsonl", [{"text": "a film " * 20}])
        with pytest.raises(UserError, match="needs a model that predicts the next token"):
            tasks.measure([name], *parts, **settings)


@pytest.mark.slow
def test_a_whole_run(experiment, tokenizer, tmp_path, capsys):
    pipeline.train(experiment, tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    measured_again(tmp_path / "run/lte", experiment, results["models"][1])
    assert results["task"] == "sst2" and results["records"] == 13
    dense, lte = results["models"]
    for entry in dense, lte:
        assert 0 <= entry["metrics"]["accuracy"] <= 100 and "token_ppl" not in entry
    assert dense["sparsity"] == 0 < lte["sparsity"]
    assert "| model | accuracy | FFN sparsity |" in capsys.readouterr().out
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    first, *_, last = [row["loss"] for row in log if row["stage"] == "finetune"]
    assert last < first
    written, again = hf.read_config(tmp_path / "run/lte")
    assert written.head == "classes" and again.expert_size == 8

    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    import transformers

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/lte")
    model, weights = lte_jax.load(tmp_path / "run/lte", "float32")
    records = tasks.find("sst2").records(
        experiment.data.train, "validation", experiment.data, tokenizer, model.config
    )
    batch = {name: torch.tensor(x).long() for name, x in records[:].items()}
    with torch.no_grad():
        expected = theirs.eval()(
            batch["tokens"], attention_mask=batch["segments"], token_type_ids=batch["types"]
        ).logits
    settings = {"mask": records.segments_RL, "types": records.more["types"], "routing": "dense"}
    found = lte_jax.apply(model, weights, records.tokens_RL, **settings).logits
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_filling_up_a_batch_counts_in_no_loss(experiment, encoder):
    """Records of zeros, which fill the last batch of a validation, change no sum."""
    from lte_jax.stages import make
    from lte_jax.training_step import make_eval_step

    parts = preflight.prepare(experiment, sharding.make_mesh(MeshConfig()), None, {})
    model = Transformer(parts.config)
    weights = hf.load_params(encoder, ENCODER, None)
    weights = params.adopt(parts.config, weights, jax.random.key(0))
    step = jax.jit(make_eval_step(model, make(experiment.stages, experiment.lte)[0]))
    whole = [step(weights, b, jnp.float32(0.5)) for b in data.eval_batches(parts.records[1], 13)]
    cut = [step(weights, b, jnp.float32(0.5)) for b in data.eval_batches(parts.records[1], 8)]
    for name in "loss", "predicted", "real":
        sums = [sum(float(part[name]) for part in sums) for sums in (whole, cut)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert sum(float(part["predicted"]) for part in cut) == 13


def test_a_new_head_keeps_what_the_old_model_has(encoder):
    old = hf.load_params(encoder, ENCODER, None)
    new_config = dataclasses.replace(ENCODER, head="classes", num_labels=3)
    new = params.adopt(new_config, old, jax.random.key(0))
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(
        jnp.shape, params.abstract(new_config, None)
    )
    assert new["layers"] is old["layers"] or jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), new["layers"], old["layers"])
    )
    assert 0 < float(jnp.std(new["classifier"]["kernel"])) < 0.05
    assert not np.any(new["classifier"]["bias"])


@pytest.mark.parametrize(
    "config_",
    [
        *(dataclasses.replace(ENCODER, head=head) for head in ("none", "masked_lm", "classes")),
        ModelConfig(head="none"),
    ],
    ids=lambda config_: f"{config_.family}-{config_.head}",
)
def test_bad_input_without_a_head_of_next_tokens(config_, tmp_path):
    model, weights = Transformer(config_), params.abstract(config_, None)
    weights = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), weights)
    needs, kind = "needs a model that predicts", f"{config_.family!r} with head={config_.head!r}"
    with pytest.raises(UserError, match=f"generate {needs}.*{kind}"):
        lte_jax.generate(model, weights, [[5, 6]], max_new_tokens=2)
    records = data.pad([np.arange(5, 12)], 8)
    with pytest.raises(UserError, match=f"perplexity {needs}.*{kind}"):
        lte_jax.evaluate(model, weights, records, latency_rounds=0)
    with pytest.raises(UserError, match=f"a log-likelihood {needs}.*{kind}"):
        scoring.loglikelihoods(model, weights, [([5], [6])])
    with pytest.raises(UserError, match=f"mmlu {needs}.*{kind}"):
        tasks.measure(["mmlu"], model, weights, str(tmp_path), tokenizer=None)


# ------------------------------------------------------------------------------------ the benchmark


@pytest.mark.slow
def test_the_runs_of_glue(tokenizer, tmp_path):
    """A start and an LTE run that goes on from it, and nothing trained twice."""
    script = runpy.run_path(str(ROOT / "benchmarks/glue.py"))
    folder = saved(dataclasses.replace(ENCODER, max_length=128), tokenizer, tmp_path / "bert")
    write(tmp_path / "data/glue/sst2/train.jsonl", sentences(64))
    write(tmp_path / "data/glue/sst2/validation.jsonl", sentences(40, seed=1))
    (tmp_path / "out").mkdir()
    flags = argparse.Namespace(
        out=tmp_path / "out", model=str(folder), data=str(tmp_path / "data"), smoke=True
    )
    script["result"](script["Run"]("sst2", 1, start=True), flags)
    row = script["result"](script["Run"]("sst2", 1, 0.5), flags)
    assert row["records"] == 40 and 0 < row["sparsity"] < 1
    made = json.loads((tmp_path / "out/sst2-1-0.5/experiment.json").read_text())
    assert made["source"]["path"] == str(tmp_path / "out/sst2-1-start/dense")
    assert made["stages"]["finetune"]["steps"] == 0 and made["seed"] == 1001
    (tmp_path / "out/sst2-1-0.5.log").unlink()
    assert script["result"](script["Run"]("sst2", 1, 0.5), flags) == row
    assert not (tmp_path / "out/sst2-1-0.5.log").exists()
    flags.smoke = False
    with pytest.raises(UserError, match="sst2-1-0.5/measured.json was made with other settings"):
        script["result"](script["Run"]("sst2", 1, 0.5), flags)
