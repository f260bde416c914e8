"""Tasks of generation: prompts, loss on answers only, metrics, and whole runs of E2E."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import config, data, losses, pipeline, tasks
from lte_jax.config import DataConfig, ModelConfig, SourceConfig, StageConfig, UserError
from lte_jax.generation import complete, generate
from lte_jax.model import Transformer
from lte_jax.objective import predicted, task_loss
from lte_jax.tasks import generation, nlg

MODEL = ModelConfig(
    vocab_size=259, d_model=32, d_ff=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=8,
    max_length=96,
)  # fmt: skip
GPT2 = dataclasses.replace(
    MODEL, family="gpt2", activation="gelu_tanh", gated=False, norm="layer", norm_bias=True,
    positions="learned", tie_embeddings=True, qkv_bias=True, out_bias=True, mlp_bias=True,
)  # fmt: skip
SETTINGS = DataConfig(length=96, batch_size=8, max_new_tokens=24, beams=2, max_validation_records=4)
NAMES = "Mill Vine Inn Cafe Park Moon Sun Oak".split()
BYTES = data.byte_tokenizer()


@pytest.fixture(autouse=True)
def libraries():
    for name in nlg.TASKS["e2e"].libraries:
        pytest.importorskip(name, reason="metrics need it: pip install 'lte-jax[tasks]'")


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path.parent)


def meanings(number):
    """Two references for each of `number` meanings."""
    for i in range(number):
        name, area = NAMES[i % 8], "river city".split()[i // 8 % 2]
        for reference in f"{name} is in the {area}.", f"The {area} has {name}.":
            yield {
                "meaning_representation": f"name[{name}], area[{area}]",
                "human_reference": reference,
            }


def e2e(settings=SETTINGS):
    return tasks.find("e2e").adapted(settings)


# ---------------------------------------------------------------------------------------- records


def test_prompts_and_references_of_e2e(tmp_path):
    folder = write(tmp_path / "e2e" / "train.jsonl", meanings(3))
    settings = dataclasses.replace(SETTINGS, length=192)
    records = e2e().records(folder, "train", settings, BYTES, MODEL)
    first = records.examples[0]
    assert BYTES.decode(first.prompt) == "<s>name : Mill | area : river ||"
    assert first.references == ("Mill is in the river.", "The river has Mill.")
    assert len(records.examples) == 3
    assert records.segments_RL.max() > 1  # packed
    tokens, answers = records.tokens_RL, records.more["answers"]
    texts = BYTES.decode(tokens[answers > 0]).split("</s>")
    assert sorted(texts) == ["", *sorted(" " + r["human_reference"] for r in meanings(3))]
    padded = dataclasses.replace(settings, pack=False)
    records = e2e().records(folder, "train", padded, BYTES, MODEL)
    assert len(records) == 6 and records.segments_RL.max() == 1
    assert records.more["answers"].sum() == (answers > 0).sum()


def test_a_part_of_the_validation_split_is_spread_over_it(tmp_path):
    folder = write(tmp_path / "e2e" / "train.jsonl", meanings(8))
    write(tmp_path / "e2e" / "validation.jsonl", meanings(16))
    settings = dataclasses.replace(SETTINGS, train=folder, batch_size=2)
    train, validation = e2e().build(settings, BYTES, MODEL)
    assert len(train.examples) == 8 and len(validation.examples) == 4
    prompts = [BYTES.decode(example.prompt) for example in validation.examples]
    assert "Mill | area : river" in prompts[0] and "Oak | area : city" in prompts[3]
    answers = validation.more["answers"] * validation.tokens_RL
    assert (answers == BYTES.eos_token_id).sum() == 8  # two references each


def test_long_documents_are_cut_and_keep_their_end(tmp_path, caplog):
    rows = [{"document": "abc " * 100, "summary": "The alphabet begins."}]
    folder = write(tmp_path / "xsum" / "train.jsonl", rows)
    task = tasks.find("xsum").adapted(SETTINGS)
    records = task.records(folder, "train", SETTINGS, BYTES, MODEL)
    text = BYTES.decode(records.examples[0].prompt)
    assert len(records.examples[0].prompt) == 96 - 24
    assert text.startswith("<s>abc abc") and text.endswith("abc \nTL;DR:")
    assert records.more["answers"].sum() == len(" The alphabet begins.") + 1
    assert "1 prompts are cut" in caplog.text


CHAT = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_conversations_by_the_template_or_plain(template, tmp_path):
    tokenizer = data.byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.split_special_tokens = template is None  # a template writes special tokens
    folder = write(tmp_path / "instruct" / "train.jsonl", [{"messages": CHAT}])
    task = tasks.find("instruct").adapted(SETTINGS)
    records = task.records(folder, "train", SETTINGS, tokenizer, MODEL)
    tokens, answers = records.tokens_RL[0], records.more["answers"][0]
    whole = tokenizer.decode(tokens[records.segments_RL[0] > 0])
    if template is None:
        expected = "<s>User: 1+1?\nAssistant: 2</s>User: 2+2?\nAssistant: 4</s>"
        assert tokenizer.decode(tokens[answers > 0]) == " 2</s> 4</s>"
    else:
        expected = "<s><u>1+1?<a>2</s><u>2+2?<a>4</s>"
        assert tokenizer.decode(tokens[answers > 0]) == "2</s>4</s>"
    assert whole == expected
    [example] = records.examples
    assert expected.startswith(tokenizer.decode(example.prompt)) and example.references == ("4",)


def test_conversations_without_a_validation_split_are_held_out(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "!"}]}
        for i in range(40)
    ]
    folder = write(tmp_path / "instruct" / "train.jsonl", rows)
    settings = dataclasses.replace(SETTINGS, train=folder)
    train, validation = tasks.find("instruct").adapted(settings).build(settings, BYTES, MODEL)
    prompts = [{BYTES.decode(e.prompt) for e in part.examples} for part in (train, validation)]
    assert len(prompts[0]) == 36 and len(prompts[1]) == 4 and not prompts[0] & prompts[1]


MEANING, REFERENCE = "meaning_representation", "human_reference"
GOOD = {MEANING: "name[Inn]", REFERENCE: "An inn."}
BAD = {
    "column": ("e2e", {"mr": "a", REFERENCE: "b"}, f"no column '{MEANING}'"),
    "empty": ("e2e", GOOD | {REFERENCE: " "}, f"column '{REFERENCE}' is empty"),
    "number": ("e2e", GOOD | {REFERENCE: 7}, f"column '{REFERENCE}' holds int"),
    "meaning": ("e2e", GOOD | {MEANING: "an inn"}, "expected slots, such as name[Blue Spice]"),
    "long": ("e2e", GOOD | {MEANING: f"name[{'x' * 99}]"}, "prompt has 110 tokens: expected at"),
    "summary": ("xsum", {"document": "a", "summary": ""}, "column 'summary' is empty"),
    "messages": ("instruct", {"messages": "hello"}, "messages='hello': expected a list"),
    "role": ("instruct", {"messages": [{"role": "bot", "content": "a"}]}, "expected a list"),
    "no answer": ("instruct", {"messages": CHAT[:1]}, "a question and an answer"),
    "empty answer": (
        "instruct",
        {"messages": [CHAT[0], {"role": "assistant", "content": ""}]},
        "an answer that is not empty",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_rows_of_generation(case, tmp_path):
    name, row, message = BAD[case]
    folder = write(tmp_path / name / "train.jsonl", [row])
    with pytest.raises(UserError) as error:
        task = tasks.find(name).adapted(SETTINGS)
        task.records(folder, "train", SETTINGS, BYTES, MODEL)
    assert message in str(error.value) and "train.jsonl:1" in str(error.value)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_bad_input_of_generation(tmp_path):
    file = tmp_path / "e2e" / "train.jsonl"
    folder = write(file, meanings(2))
    one_file = dataclasses.replace(SETTINGS, train=str(file))
    with pytest.raises(
        UserError, match="train.jsonl has no validation part: name a validation file"
    ):
        e2e().build(one_file, BYTES, MODEL)
    short = dataclasses.replace(SETTINGS, length=24)
    with pytest.raises(UserError, match="data.length=24 leaves no room"):
        e2e(short).records(folder, "train", short, BYTES, MODEL)
    encoder = dataclasses.replace(MODEL, causal=False, head="none")
    with pytest.raises(UserError, match="data.task='e2e' needs a decoder"):
        e2e().dense_config(encoder)
    with pytest.raises(UserError, match="needs an end of text"):
        e2e().records(folder, "train", SETTINGS, BYTES, dataclasses.replace(MODEL, vocab_size=256))


def test_settings_of_decoding():
    assert e2e(DataConfig()).decoding == {
        "max_new_tokens": 64, "beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4
    }  # fmt: skip
    assert e2e(DataConfig(beams=1, max_new_tokens=9)).decoding == {"max_new_tokens": 9}
    assert e2e(DataConfig(beams=3)).decoding["beams"] == 3


# ----------------------------------------------------------------------------------------- losses


def test_the_loss_counts_answers_only():
    """Other prompt tokens as targets change no loss; an answer's token does."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (2, 8)).astype(np.int32)
    segments = np.array([[1] * 8, [1] * 4 + [2] * 3 + [0]], np.int32)
    answers = np.array([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 0]], np.int32)
    batch = jax.tree.map(jnp.asarray, {"tokens": tokens, "segments": segments, "answers": answers})
    model = Transformer(dataclasses.replace(MODEL, vocab_size=64))
    logits = jnp.asarray(rng.normal(size=(2, 8, 64)), jnp.float32)
    mask = np.asarray(predicted(model, batch))
    assert np.argwhere(mask).tolist() == [[0, 4], [0, 5], [0, 6], [1, 1], [1, 2], [1, 5]]
    logp = np.asarray(jax.nn.log_softmax(logits))
    targets = [(0, 4), (0, 5), (0, 6), (1, 1), (1, 2), (1, 5)]
    by_hand = -sum(logp[b, t, tokens[b, t + 1]] for b, t in targets) / 6
    count = losses.count_true(predicted(model, batch))
    assert float(task_loss(model, logits, batch, count)) == pytest.approx(by_hand, rel=1e-6)
    prompt = np.where(answers > 0, tokens, (tokens + 1) % 64)
    assert task_loss(model, logits, batch | {"tokens": jnp.asarray(prompt)}, count) == task_loss(
        model, logits, batch, count
    )
    answer = np.where(answers > 0, (tokens + 1) % 64, tokens)
    assert task_loss(model, logits, batch | {"tokens": jnp.asarray(answer)}, count) != task_loss(
        model, logits, batch, count
    )


# ---------------------------------------------------------------------------------------- metrics

TEXTS = ["The Mill is a cheap pub by the river.", "Blue Spice serves French food."]
REFERENCES = [
    ["The Mill is a cheap pub near the river.", "By the river is The Mill, a cheap pub."],
    ["Blue Spice serves Italian food."],
]


def test_metrics_equal_their_libraries():
    import sacrebleu
    from nltk.translate.nist_score import corpus_nist
    from rouge_score.rouge_scorer import RougeScorer

    streams = [[r[0] for r in REFERENCES], [REFERENCES[0][1], None]]
    assert nlg.bleu(TEXTS, REFERENCES) == sacrebleu.corpus_bleu(TEXTS, streams).score > 20
    words = [
        "the mill is a cheap pub by the river .".split(),
        "blue spice serves french food .".split(),
    ]
    known = [[r.lower().replace(".", " .").replace(",", " ,").split() for r in refs]
             for refs in REFERENCES]  # fmt: skip
    assert nlg.nist(TEXTS, REFERENCES) == pytest.approx(corpus_nist(known, words, 5))
    for kind in "rouge1", "rouge2", "rougeL":
        scorer = RougeScorer([kind], use_stemmer=True)
        best = [
            max(scorer.score(r, text)[kind].fmeasure for r in refs)
            for text, refs in zip(TEXTS, REFERENCES, strict=True)
        ]
        assert nlg.rouge(TEXTS, REFERENCES, kind, True) == pytest.approx(100 * np.array(best))
    other = ["Blue Spice serves Italian food.", "the mill is a cheap pub"]  # any of them counts
    assert nlg.bleu(other[:1], [other[::-1]]) == pytest.approx(100)
    [half] = nlg.rouge(["the mill"], [["the mill by the river"]], "rougeL", False)
    assert half == pytest.approx(100 * 2 * 1.0 * 0.4 / 1.4)  # of precision and recall
    # Seven of nine words in order, and four of five.
    assert nlg.rouge(TEXTS, REFERENCES, "rougeL", False) == pytest.approx([800 / 9, 80])


def test_metrics_of_nothing_written():
    scores = tasks.find("e2e").score(["", ""], REFERENCES)
    assert scores == {"rougeL": 0, "bleu": 0, "nist": 0}
    assert tasks.find("e2e").score(["", "Blue"], REFERENCES)["nist"] >= 0


# --------------------------------------------------------------------------------------- measuring


def test_measuring_e2e(tmp_path, monkeypatch):
    """The dense and the LTE model write greedily; the metrics are of what `generate` writes.

    As random models write no words, some are added.
    """
    settings = []

    def written(*args, label, **how):
        settings.append(how)
        return [f"{text} in the river" for text in complete(*args, **how)]

    monkeypatch.setattr(generation, "complete", written)
    write(tmp_path / "e2e_nlg" / "validation.jsonl", meanings(9))
    model, params = tiny.model_and_params(config=MODEL)
    dense = tiny.model_and_params(None, MODEL)
    how = {"tokenizer": BYTES, "baseline": dense, "beams": 1, "max_new_tokens": 8}
    found = tasks.measure(["e2e"], model, params, str(tmp_path), limit=3, **how)
    assert [row["model"] for row in found] == ["dense"] * 3 + ["LTE"] * 3
    rows = list(meanings(9))[0:2], list(meanings(9))[8:10], list(meanings(9))[16:18]
    references = [[row[REFERENCE] for row in pair] for pair in rows]
    prompts = [nlg.slots(pair[0][MEANING], "") + " ||" for pair in rows]
    for offset, (made, weights) in enumerate([dense, (model, params)]):
        ids = [BYTES(prompt)["input_ids"] for prompt in prompts]
        new = generate(made, weights, ids, max_new_tokens=8, eos_ids=[BYTES.eos_token_id])
        texts = [BYTES.decode(part, skip_special_tokens=True).strip() for part in new]
        texts = [f"{text} in the river" for text in texts]
        each = nlg.rouge(texts, references, "rougeL", False)
        rouge, bleu, nist = found[3 * offset : 3 * offset + 3]
        assert rouge["metric"] == "rougeL" and rouge["records"] == 3
        assert rouge["value"] == pytest.approx(np.mean(each)) and len(set(each)) > 1
        assert rouge["error"] == pytest.approx(np.std(each, ddof=1) / np.sqrt(3))
        assert bleu["value"] == nlg.bleu(texts, references) and bleu["error"] is None
        assert nist["metric"] == "nist"
    assert found[0]["sparsity"] == 0 < found[3]["sparsity"] < 1
    greedy = {"batch_size": 8, "max_new_tokens": 8}
    assert settings == [greedy, greedy | {"routing": None, "threshold": None}]
    everything = tasks.measure(["e2e"], model, params, str(tmp_path), **how)
    assert everything[0]["records"] == 9


def test_bad_input_of_measuring_generation():
    lte = tiny.model_and_params(config=MODEL)
    with pytest.raises(UserError, match="--tasks=instruct has no validation split on the hub"):
        tasks.measure(["instruct"], *lte, tokenizer=BYTES)
    encoder = tiny.model_and_params(
        config=dataclasses.replace(MODEL, causal=False, head="none", family="bert")
    )
    with pytest.raises(UserError, match="data.task='xsum' needs a decoder"):
        tasks.measure(["xsum"], *encoder, tokenizer=BYTES)


# ------------------------------------------------------------------------------------- a whole run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "words"), [(MODEL, "bpe"), (GPT2, "")], ids=["llama,bpe", "gpt2,bytes"]
)
def test_a_whole_run_of_e2e(model, words, tmp_path, capsys):
    folder = write(tmp_path / "e2e" / "train.jsonl", meanings(16))
    write(tmp_path / "e2e" / "validation.jsonl", meanings(16))
    two = StageConfig(steps=2, learning_rate=1e-3)
    experiment = dataclasses.replace(
        tiny.experiment(tmp_path / "texts"),
        source=SourceConfig(scratch=model, tokenizer=words),
        data=dataclasses.replace(SETTINGS, task="e2e", train=folder),
        stages=config.StagesConfig(dataclasses.replace(two, steps=6), two, two),
        eval_every=6,
        checkpoint=config.CheckpointConfig(every=6),
        report=True,
        sample_tokens=0,
    )
    pipeline.train(experiment, tmp_path / "run")
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["task"] == "e2e"
    assert results["references"][0] == ["Mill is in the river.", "The river has Mill."]
    dense, lte = results["models"]
    for entry in dense, lte:
        assert list(entry["metrics"]) == ["rougeL", "bleu", "nist"]
        assert len(entry["texts"]) == 4 == len(results["references"])
        assert entry["metrics"] == tasks.find("e2e").score(entry["texts"], results["references"])
        assert entry["loss"] > 0 and entry["latency_ms"] > 0
    assert dense["sparsity"] == 0 < lte["sparsity"]
    out = capsys.readouterr().out
    assert "| model | rougeL | bleu | nist | FFN sparsity |" in out and "name : Mill" in out
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    first, *_, last = [row["loss"] for row in log if row["stage"] == "finetune"]
    assert last < first
    tokenizer = lte_jax.load_tokenizer(tmp_path / "run/lte")
    told = json.loads((tmp_path / "run/lte/config.json").read_text())["eos_token_id"]
    assert told == tokenizer.eos_token_id == (1 if words else 257)
    found = tasks.measure(
        ["e2e"], *lte_jax.load(tmp_path / "run/lte"), folder, limit=4, tokenizer=tokenizer,
        baseline=lte_jax.load(tmp_path / "run/dense"), beams=2, max_new_tokens=24,
    )  # fmt: skip
    for entry in dense, lte:
        rows = [row for row in found if row["model"] == entry["name"]]
        assert {row["metric"]: row["value"] for row in rows} == entry["metrics"]
        assert rows[0]["sparsity"] == pytest.approx(entry["sparsity"], abs=0.05)
