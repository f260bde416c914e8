"""The commands of `lte-jax`: what they read, print and refuse."""

import io
import json
import re
import shutil
import subprocess
import sys

import hf_folders
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import data, hf, moefication
from lte_jax.cli import COMMANDS, main
from lte_jax.config import LTEConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An LTE model of bytes."""
    return hf_folders.of_bytes(tmp_path_factory.mktemp("model") / "lte")


def said(capsys, *words) -> str:
    """The line of an error."""
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, words)))
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_what_it_does(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: lte-jax {name} ")


def test_the_table_of_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)
    assert "choose from" in said(capsys, "trian") and "COMMAND" in said(capsys)


def test_help_is_quick():
    """Transformers, Orbax and the like are not imported for it."""
    heavy = {"datasets", "grain", "matplotlib", "optax", "orbax", "scipy.linalg", "transformers"}
    code = "import sys\nfrom lte_jax.cli import main\ntry: main(['--help'])\nexcept SystemExit: "
    code += f"print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr


# --------------------------------------------------------------------------------------- generate


def generate(folder, *words):
    main(["generate", str(folder), "--max-new-tokens=3", *words])


def test_prompts_of_arguments_a_file_and_a_pipe_are_the_same(folder, tmp_path, monkeypatch, capsys):
    generate(folder, "one", "two words")
    expected, err = capsys.readouterr()
    assert expected.startswith("one") and "\n\ntwo words" in expected
    (tmp_path / "prompts.txt").write_text("one\n\ntwo words\n")
    generate(folder, f"--file={tmp_path / 'prompts.txt'}")
    assert capsys.readouterr().out == expected
    for words in ((), ("--file=-",)):
        pipe = io.TextIOWrapper(io.BytesIO(b"one\ntwo words"))
        monkeypatch.setattr(sys, "stdin", pipe)
        generate(folder, *words)
        assert capsys.readouterr().out == expected
    told = r"6 tokens in \S+ s, \S+ tokens/s with compiling; \d+\.\d% of the experts skipped; "
    assert re.fullmatch(f"{told}kernels: cpu", err.splitlines()[-1])


def test_the_last_line_says_what_ran(folder, capsys):
    main(
        [
            "generate",
            str(folder),
            "a",
            "--max-new-tokens=20",
            "--routing=dense",
            "--implementation=xla",
        ]
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(" tokens/s; all experts run; kernels: xla")


def test_bad_input_prompts(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "expected one of them" in said(capsys, "generate", folder, "a", "--file=b")
    assert "no such file" in said(capsys, "generate", folder, f"--file={tmp_path / 'no'}")
    empty = said(capsys, "generate", folder, f"--file={tmp_path / 'empty.txt'}")
    assert "no prompt in " in empty and "expected one a line" in empty
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert "no prompt: write one after the model" in said(capsys, "generate", folder)
    assert "no chat template" in said(capsys, "generate", folder, "--chat", "a")


# ---------------------------------------------------------------------------------------- convert


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A dense folder, and the LTE folder made from it."""
    folder = tmp_path_factory.mktemp("models")
    model, params = tiny.model_and_params(None)
    hf.save(folder / "dense", model.config, None, params)
    settings = LTEConfig(expert_size=8, grouping="kmeans", router_init="normal")
    sparse, moved, order = moefication.to_experts(model, params, settings)
    moved = moefication.add_routers(sparse, moved)
    hf.save(folder / "lte", sparse.config, sparse.lte, moved, folder / "dense", order)
    return folder


def test_an_lte_model_as_the_dense_one_it_was_made_from(pair, tmp_path, capsys):
    main(["convert", str(pair / "lte"), str(tmp_path / "new"), "--dense"])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'new'}: llama, dense, float32, ")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "new" / name).read_bytes() == (pair / "dense" / name).read_bytes()


def test_without_its_order_it_computes_the_same(pair, tmp_path):
    model, params = lte_jax.load(pair / "lte")
    lte_jax.save(tmp_path / "lte", model, params)
    main(["convert", str(tmp_path / "lte"), str(tmp_path / "new"), "--dense"])
    dense, weights = lte_jax.load(tmp_path / "new")
    tokens = [[1, 2, 3, 4]]
    logits = lte_jax.apply(model, params, tokens, routing="dense").logits
    assert dense.lte is None and not (tmp_path / "new" / "expert_order.safetensors").exists()
    np.testing.assert_allclose(lte_jax.apply(dense, weights, tokens).logits, logits, atol=1e-5)


def test_another_dtype_keeps_routers_order_and_tokenizer(pair, tmp_path):
    source = shutil.copytree(pair / "lte", tmp_path / "lte")
    (source / "manifest.json").unlink()
    data.byte_tokenizer().save_pretrained(source)
    main(["convert", str(source), str(tmp_path / "new"), "--dtype=bfloat16"])
    model, params = lte_jax.load(tmp_path / "new")
    assert model.dtype == params["layers"]["ffn"]["up"].dtype == "bfloat16"
    assert params["layers"]["ffn"]["router"]["kernel"].dtype == "float32"
    order = hf.load_expert_order(tmp_path / "new")
    np.testing.assert_array_equal(order, hf.load_expert_order(pair / "lte"))
    lte_jax.load_tokenizer(tmp_path / "new")


def test_bad_input_convert(pair, tmp_path, capsys):
    new = tmp_path / "new"
    assert "nothing to convert" in said(capsys, "convert", pair / "lte", new)
    dense = said(capsys, "convert", pair / "dense", new, "--dense")
    assert "is dense already: expected an LTE model" in dense
    same = said(capsys, "convert", pair / "lte", pair / "lte", "--dense")
    assert "is the model itself" in same
    config = json.loads((pair / "lte" / "config.json").read_text())
    soft = shutil.copytree(pair / "lte", tmp_path / "soft")
    (soft / "manifest.json").unlink()
    config["lte"]["routing"] = "soft"
    (soft / "config.json").write_text(json.dumps(config))
    assert "no dense model computes that" in said(capsys, "convert", soft, new, "--dense")
    assert not new.exists()
