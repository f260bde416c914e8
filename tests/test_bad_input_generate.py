"""What a user can get wrong with generation, evaluation and reports ends in one clear line."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import tiny

from lte_jax import evaluation, report
from lte_jax.__main__ import main
from lte_jax.config import UserError
from lte_jax.data import pad
from lte_jax.generate import generate
from lte_jax.model import Transformer, abstract_params

MODEL = Transformer(tiny.CONFIG, tiny.LTE)
PARAMS = abstract_params(MODEL)  # no check may come so late that it needs numbers
LARGE = Transformer(dataclasses.replace(tiny.CONFIG, vocab_size=65))
GOOD = {"tokens": [[1, 2, 3]], "max_new_tokens": 4}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": []}, "no prompt"),
        ({"tokens": [[1], []]}, "prompt 1 is empty"),
        ({"tokens": "Once"}, "is a string.*generate_text"),
        ({"tokens": [1, 2]}, "prompt 0 .*a list in a list"),
        ({"tokens": [[1.5]]}, "prompt 0 is float64"),
        ({"tokens": [[1, 64]]}, "token id 64, outside the vocabulary of 64"),
        ({"tokens": [[1], [-1, 5]]}, "prompt 1 has token id -1"),
        (
            {"tokens": np.ones((2, 3), int), "mask": np.ones((2, 4), bool)},
            r"\[2, 4\] and tokens \[2, 3\]",
        ),
        ({"tokens": np.ones((2, 3), int), "mask": np.zeros((2, 3), bool)}, "prompt 0 is empty"),
        ({"tokens": [[1], [1, 2]], "mask": np.ones((2, 2), bool)}, "need no mask"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected an integer of at least 1"),
        ({"max_new_tokens": 30}, "exceed the model's max_length=32: at most 29"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, r"top_p=0.0: expected within \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"routing": "sparse"}, "routing='sparse'"),
        ({"eos_ids": (1, 64)}, "eos_ids: token=64: expected an integer from 0 to 63, the vocab"),
        ({"tokens": np.array(3)}, "tokens is ndarray: expected a list"),
        ({"implementation": "cuda"}, "implementation='cuda'.*auto, reference, xla"),
    ],
)
@pytest.mark.parametrize("checked", [True, False])
def test_bad_input_of_generate(wrong, message, checked, monkeypatch):
    if not checked:  # as outside the tests, where annotations are not executed
        monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(UserError, match=message) as raised:
        generate(MODEL, PARAMS, **(GOOD | wrong))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eos_ids": 3}, "eos_ids=3: expected a list of token ids"),
        ({"eos_ids": ["x"]}, "eos_ids: token='x'"),
        ({"stream": 3}, "stream=3: expected a function"),
        ({"implementation": np.zeros((0, 4), int)}, "implementation="),
    ],
)
def test_bad_input_of_other_types(wrong, message, monkeypatch):
    test_bad_input_of_generate(wrong, message, False, monkeypatch)


ROWS = pad([np.arange(1, 20)], 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: evaluation.perplexity(MODEL, PARAMS, pad([np.ones(1, int)], 8)),
            "no token to",
        ),
        (lambda: evaluation.evaluate(MODEL, PARAMS, ROWS, batch_size=0), "batch_size=0"),
        (
            lambda: evaluation.evaluate(MODEL, PARAMS, ROWS, baseline=(MODEL, PARAMS)),
            "is an LTE model",
        ),
        (
            lambda: evaluation.evaluate(
                MODEL, PARAMS, ROWS, baseline=(LARGE, abstract_params(LARGE))
            ),
            "vocabulary has 64 tokens, the baseline's 65",
        ),
    ],
)
def test_bad_input_of_evaluate(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("{", "cannot be read"),
        ("[]", "no results of evaluate.py"),
        ('{"models": []}', "no results of evaluate.py"),
        ('{"models": [{"name": "x"}]}', "sparsity, token_ppl"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_bad_input_of_report(content, message, tmp_path, capsys):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stopped:
        report.main([str(path), "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_input_report_into_a_file(tmp_path, capsys):
    results = {"models": [{"name": "a", "token_ppl": 2.0, "sparsity": 0.0}]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "results.json"), "--out", str(tmp_path / "results.json")])
    assert "name another place" in capsys.readouterr().err


def test_bad_input_figures_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = {"models": [{"name": "a", "token_ppl": 2.0, "sparsity": 0.0}]}
    with pytest.raises(UserError, match=r"lte-jax\[plot\]"):
        report.write([results], tmp_path)
    assert (tmp_path / "results.json").exists()  # the measuring is not lost


def test_bad_input_of_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lte_jax", str(tmp_path / "absent"), "Hello"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "absent" in error and error.count("\n") == 1
