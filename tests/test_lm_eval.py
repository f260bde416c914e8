"""The adaptor for lm-eval scores and writes what lm-eval's own HFLM does with the same weights."""

import itertools
import json

import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import tasks
from lte_jax.config import UserError
from lte_jax.data import byte_tokenizer

pytest.importorskip("torch", reason="the reference implementation needs torch")
HFLM = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval[hf]").HFLM
import lm_eval  # noqa: E402


@pytest.fixture(scope="module")
def models(shared):
    """The adaptor and HFLM on the same small Llama."""
    import transformers

    from lte_jax.lm_eval import LMEval

    folder = shared / "models/stories260k"
    model, params = lte_jax.load(folder, "float32")
    mine = LMEval(model, params, lte_jax.load_tokenizer(folder), batch_size=8)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=8, device="cpu")
    return mine, theirs


def rows(path, number=None):
    with path.open() as file:
        return [json.loads(line) for line in itertools.islice(file, number)]


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_loglikelihoods(models, shared):
    stories = [row["text"] for row in rows(shared / "data/tinystories/validation.jsonl", 46)]
    pairs = []
    for i, story in enumerate(stories):
        words, cut = story.split(" "), 4 + i
        pairs.append((" ".join(words[:cut]), " " + " ".join(words[cut : cut + 1 + i % 2 * 9])))
    pairs += [("Once upon a time ", "there was"), ("", "Lily liked"), ("<s>One day", " he")]
    pairs += [(stories[0] * 4, " the end")]  # longer than the model's context
    assert len(pairs) == 50 and all(new for _, new in pairs)
    found, expected = (lm.loglikelihood(instances("loglikelihood", pairs)) for lm in models)
    nats, greedy = (np.array(column) for column in zip(*found, strict=True))
    np.testing.assert_allclose(nats, [one[0] for one in expected], atol=1e-3)
    assert greedy.tolist() == [one[1] for one in expected]
    assert 0 < greedy.sum() < len(greedy)


def test_rolling_loglikelihoods(models, shared):
    stories = [row["text"] for row in rows(shared / "data/tinystories/validation.jsonl", 48)]
    texts = [
        (text,) for text in [*(s[:300] for s in stories), stories[0] * 4, "a"]
    ]  # one longer than the context
    requests = instances("loglikelihood_rolling", texts)
    found, expected = (lm.loglikelihood_rolling(requests) for lm in models)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-3)


def test_generation(models, shared):
    stories = [row["text"] for row in rows(shared / "data/tinystories/validation.jsonl", 50)]
    settings = [{"until": [".", "\n"], "max_gen_toks": 40}, {"max_gen_toks": 24, "until": "zebra"}]
    requests = [(text[: 20 + i], settings[i % 2]) for i, text in enumerate(stories)]
    requests = instances("generate_until", requests)
    found, expected = (lm.generate_until(requests) for lm in models)
    assert found == expected
    assert all("." not in text for text in found[::2]) and any("." in text for text in found[1::2])


def test_sampling_depends_on_the_seed(models):
    from lte_jax.lm_eval import LMEval

    mine = models[0]
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 20, "until": []}
    requests = instances("generate_until", [("Once upon a time", settings)])
    parts = mine.model, mine.params, mine.tokenizer
    texts = [LMEval(*parts, seed=seed).generate_until(requests)[0] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def mmlu(shared, subject, number):
    """lm-eval's own task of a subject, on the rows of `shared`."""
    import datasets
    import yaml

    folder = next(path for path in lm_eval.__path__) + "/tasks/mmlu/default"
    with (
        open(f"{folder}/_default_template_yaml") as general,
        open(f"{folder}/mmlu_{subject}.yaml") as own,
    ):
        task = yaml.safe_load(general) | yaml.safe_load(own)
    splits = {}
    for split, limit in ("dev", 5), ("test", number):
        chosen = (
            row for row in rows(shared / f"data/mmlu/{split}.jsonl") if row["subject"] == subject
        )
        splits[split] = datasets.Dataset.from_list(list(itertools.islice(chosen, limit)))
    for key in "include", "dataset_path", "dataset_name", "tag", "task_alias":
        del task[key]
    return task | {"custom_dataset": lambda **_: splits, "num_fewshot": 5}


@pytest.mark.slow
def test_the_task_mmlu_is_lm_evals(models, shared, tmp_path):
    """Accuracy and standard error of evaluate.py's own mmlu."""
    mine, task = models[0], mmlu(shared, "anatomy", 16)
    for split, found in task["custom_dataset"]().items():
        found.to_json(tmp_path / f"{split}.jsonl")
    parts = mine.model, mine.params, str(tmp_path)
    row = tasks.measure(["mmlu"], *parts, tokenizer=mine.tokenizer)[0]
    [expected] = lm_eval.simple_evaluate(model=mine, tasks=[task])["results"].values()
    assert row["value"] == pytest.approx(100 * expected["acc,none"])
    assert row["error"] == pytest.approx(100 * expected["acc_stderr,none"]) and row["records"] == 16


def arc(shared):
    """Multiple choice in the format of ARC, of the meanings and sentences of E2E."""
    import datasets

    texts = [row["human_reference"] for row in rows(shared / "data/e2e_nlg/test.jsonl", 200)][::4]
    made = [
        {
            "question": text[: len(text) // 2],
            "choices": {
                "text": [texts[(i + k) % 50][-20:] for k in (0, 7, 11)],
                "label": ["A", "B", "C"],
            },
            "answerKey": "A",
        }
        for i, text in enumerate(texts)
    ]
    return {
        "task": "arc",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(made)},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def wikitext(shared):
    """Perplexity of whole articles in the format of lm-eval's wikitext."""
    import datasets

    texts = [
        {"page": row["text"][:1500]} for row in rows(shared / "data/wikitext-2/test.jsonl", 50)
    ]
    return {
        "task": "wikitext_pages",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(texts)},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mmlu", "arc", "wikitext"])
def test_whole_tasks(models, shared, name):
    make = {"mmlu": lambda: mmlu(shared, "anatomy", 50), "arc": lambda: arc(shared)}
    task = make.get(name, lambda: wikitext(shared))()
    settings = {"tasks": [task], "bootstrap_iters": 0}
    found, expected = (
        lm_eval.simple_evaluate(model=lm, log_samples=True, **settings) for lm in models
    )
    [samples], [others] = found["samples"].values(), expected["samples"].values()
    assert len(samples) == 50
    for mine, other in zip(samples, others, strict=True):
        assert mine["arguments"] == other["arguments"]
        mine, other = (np.ravel(one["filtered_resps"]).astype(float) for one in (mine, other))
        np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-3)
        if name != "wikitext":
            assert mine[::2].argmax() == other[::2].argmax()
    [mine], [other] = found["results"].values(), expected["results"].values()
    assert mine.keys() == other.keys()
    for key, value in mine.items():
        assert value == (
            pytest.approx(other[key], rel=1e-6) if isinstance(value, float) else other[key]
        )


def test_routing_and_threshold_reach_the_model():
    import dataclasses

    from lte_jax.lm_eval import LMEval

    model, params = tiny.model_and_params(config=dataclasses.replace(tiny.CONFIG, vocab_size=259))
    requests = instances("loglikelihood", [("abc", "def")])
    nats = {}
    for how in ({}, {"routing": "dense"}, {"threshold": 0.0}, {"threshold": 1.0}):
        lm = LMEval(model, params, byte_tokenizer(), **how)
        nats[str(how)] = lm.loglikelihood(requests)[0][0]
    own, dense, every, none = nats.values()
    assert every == pytest.approx(dense, abs=1e-5) and len({own, dense, none}) == 3


def test_bad_input(models):
    mine = models[0]
    for arguments, message in [
        (("a", ""), "0 to predict"),
        (("a", "long " * 2000), "max_length=512 to predict"),
    ]:
        with pytest.raises(UserError, match=message):
            mine.loglikelihood(instances("loglikelihood", [arguments]))
    for setting, message in [
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"max_gen_toks": 512}, "leaves no room"),
    ]:
        with pytest.raises(UserError, match=message):
            mine.generate_until(instances("generate_until", [("a", setting)]))
