"""The commands of `lte-jax`: what they read, print and refuse."""

import io
import re
import subprocess
import sys

import pytest
import tiny

import lte_jax
from lte_jax import data
from lte_jax.cli import COMMANDS, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An LTE model of bytes."""
    made = tmp_path_factory.mktemp("model") / "lte"
    config = tiny.dataclasses.replace(tiny.CONFIG, vocab_size=259)
    lte_jax.save(made, *tiny.model_and_params(config=config))
    data.byte_tokenizer().save_pretrained(made)
    return made


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
