"""WikiText and MMLU by hand, and evaluate.py --tasks."""

import dataclasses
import json
import pathlib
import runpy
import sys

import jax
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import hf, report, tasks
from lte_jax.data import byte_tokenizer
from lte_jax.errors import UserError
from lte_jax.scoring import Likelihood
from lte_jax.tasks import mmlu, wikitext

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOKENIZER = byte_tokenizer()
CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=len(TOKENIZER))
TEXTS = ["= Title =", "A dog ran home.", "Zoë ate three apples and slept well."]
QUESTION = {"question": " Is it? ", "choices": ["no", "so", "yes", "it"], "subject": "high_art"}


@pytest.fixture(scope="module")
def lte():
    return tiny.model_and_params(config=CONFIG)


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


@pytest.fixture
def data(tmp_path):
    """A folder with a folder for each task."""
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/wikitext-2/test.jsonl", [{"text": text} for text in TEXTS])
    write(tmp_path / "data/mmlu/dev.jsonl", [QUESTION | {"answer": i % 4} for i in range(6)])
    write(tmp_path / "data/mmlu/test.jsonl", [QUESTION | {"answer": i} for i in range(4)])
    return tmp_path / "data"


def scores_of(model, params, ids):
    """Log-probabilities of each next token."""
    logits = lte_jax.apply(model, params, np.array([ids])).logits[0]
    return np.asarray(jax.nn.log_softmax(logits))[np.arange(len(ids) - 1), ids[1:]]


def test_wikitext_by_hand(lte, data):
    model, params = lte
    ids = TOKENIZER("\n\n".join(TEXTS))["input_ids"]
    blocks = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    losses = [-scores_of(model, params, block).mean() for block in blocks]
    [row] = tasks.measure(["wikitext"], model, params, str(data), 16, tokenizer=TOKENIZER)
    assert row["metric"] == "perplexity / token, context and stride 16" and row["model"] == "LTE"
    assert row["value"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    error = row["value"] * np.std(losses, ddof=1) / np.sqrt(len(blocks))
    assert row["error"] == pytest.approx(error, rel=1e-4) and row["records"] == len(blocks) == 4
    assert 0 < row["sparsity"] < 1


def test_wikitext_words_by_hand(lte, data):
    model, params = lte
    text = "\n\n".join(TEXTS)
    ids = TOKENIZER(text)["input_ids"]
    total = scores_of(model, params, ids[:17]).sum()
    for start in range(17, len(ids), 16):
        end = min(start + 16, len(ids))
        total += scores_of(model, params, ids[end - 17 : end])[start - end :].sum()
    [row] = tasks.measure(["wikitext_words"], model, params, str(data), 16, tokenizer=TOKENIZER)
    assert row["value"] == pytest.approx(np.exp(-total / len(text.split())), rel=1e-5)
    assert row["records"] == len(text.split()) and row["error"] is None


@pytest.mark.parametrize("count", [2, 9, 10, 17, 18, 25, 26, 30])
def test_windows_predict_each_token_once(count):
    ids = np.arange(count)
    pairs = wikitext._windows(ids, 8)
    assert np.concatenate([new for _, new in pairs]).tolist() == list(range(1, count))
    assert all(len(context) + len(new) <= 9 for context, new in pairs)
    for context, new in pairs:
        whole = [*context, *new]
        assert whole == list(range(whole[0], whole[0] + len(whole)))


def test_mmlu_by_hand(lte, data):
    model, params = tiny.model_and_params(config=dataclasses.replace(CONFIG, max_length=600))
    shown = "Is it?\nA. no\nB. so\nC. yes\nD. it\nAnswer:"
    prompt = "The following are multiple choice questions (with answers) about high art.\n\n"
    prompt += "".join(f"{shown} {'ABCDA'[i]}\n\n" for i in range(5)) + shown
    ids = TOKENIZER(prompt)["input_ids"]
    scores = [scores_of(model, params, ids + list(f" {x}".encode()))[-2:].sum() for x in "ABCD"]
    found = tasks.measure(["mmlu"], model, params, str(data), tokenizer=TOKENIZER)
    values = {row["metric"]: row for row in found}
    # All four questions are the same; each letter is right once.
    for name in "accuracy", "accuracy, mean of subjects", "accuracy: high_art":
        assert values[name]["value"] == 25 and values[name]["error"] == 25
    folder = write(data / "mmlu/test.jsonl", [QUESTION | {"answer": int(np.argmax(scores))}])
    found = tasks.measure(["mmlu"], model, params, str(folder), tokenizer=TOKENIZER)
    assert found[0]["value"] == 100 and found[0]["records"] == 1


def test_prompts_of_mmlu(lte, data, monkeypatch):
    """Five examples of the dev split in their order, and four answers in theirs."""
    asked = []

    def score(model, params, pairs, **how):
        asked.extend(pairs)
        return [Likelihood(-float(i % 4 != 2), False) for i in range(len(pairs))], 0.0

    monkeypatch.setattr(mmlu, "loglikelihoods", score)
    answers = [{"answer": i} for i in (3, 1, 0, 2, 1, 3)]
    folder = write(data / "mmlu/dev.jsonl", [QUESTION | answer for answer in answers])
    found = tasks.measure(["mmlu"], *lte, str(folder), tokenizer=TOKENIZER)
    assert found[0]["value"] == 25  # of the answers A to D, C
    shown = "Is it?\nA. no\nB. so\nC. yes\nD. it\nAnswer:"
    prompt = "The following are multiple choice questions (with answers) about high art.\n\n"
    prompt += "".join(f"{shown} {letter}\n\n" for letter in "DBACB") + shown
    expected = [(TOKENIZER(prompt)["input_ids"], list(f" {x}".encode())) for x in "ABCD"]
    assert [(list(context), list(new)) for context, new in asked] == expected * 4


BAD = {
    "choices": (QUESTION | {"choices": ["a"], "answer": 0}, "choices=.*expected a list of 4"),
    "answer": (QUESTION | {"answer": 4}, "answer=4: expected 0 to 3"),
    "subject": (QUESTION | {"answer": 0, "subject": "law"}, "'law' has 0 examples"),
    "column": ({"question": "a"}, "no column 'subject'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_mmlu(case, lte, data):
    row, message = BAD[case]
    write(data / "mmlu/test.jsonl", [row])
    with pytest.raises(UserError, match=f"test.jsonl:1: .*{message}"):
        tasks.measure(["mmlu"], *lte, str(data), tokenizer=TOKENIZER)


def test_bad_input_model_and_text(lte, data):
    model, params = lte
    with pytest.raises(UserError, match="fewer than one block of 32: give --length"):
        write(data / "wikitext-2/test.jsonl", [{"text": "short"}])
        tasks.measure(["wikitext"], model, params, str(data), tokenizer=TOKENIZER)
    with pytest.raises(UserError, match="sst2: the model has no head of 2 classes"):
        tasks.measure(["sst2"], model, params, str(data), tokenizer=TOKENIZER)


def test_the_script(lte, data, tmp_path, monkeypatch, capsys):
    model, params = lte
    hf.save(tmp_path / "lte", model.config, model.lte, params, tokenizer=TOKENIZER)
    flags = f"--model={tmp_path}/lte --data={data} --length=16 --out={tmp_path}/out"
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--tasks=wikitext,mmlu", *flags.split()])
    runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    table = capsys.readouterr().out
    assert "| wikitext | perplexity / token, context and stride 16 | LTE |" in table
    assert "\nAll records were measured.\n" in table
    assert table.endswith(f"wrote\n  {tmp_path}/out/table.md\n  {tmp_path}/out/results.json\n")
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["task"] for row in results["tasks"]] == ["wikitext"] + ["mmlu"] * 3
    report.write_tasks([], None, {"records": 1200})
    said = "At most 1,200 records (--records) of each task were measured, of MMLU of each subject."
    assert said in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model=/no/model", "--tasks=mmul"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    assert "task='mmul': did you mean 'mmlu'?" in capsys.readouterr().err
