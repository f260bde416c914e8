"""A message to the user is one line that a terminal can print, whatever it quotes."""

import os
import pathlib
import pickle
import runpy
import subprocess
import sys

import hf_folders
import pytest

import lte_jax
from lte_jax.cli import main
from lte_jax.errors import MAX_LENGTH, UserError, argument, cli_errors

ROOT = pathlib.Path(__file__).resolve().parents[1]
ENDINGS = """
import atexit, signal, sys, time
from lte_jax.errors import UserError, cli_errors
with cli_errors():
"""


@pytest.mark.parametrize(
    ("quoted", "shown"),
    [
        ("tab\there", "tab\\there"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("lone \udc80", "lone \\udc80"),
        ("line\nfeed", "line feed"),
        ("Grüße, 日本", "Grüße, 日本"),
        ("two  blanks", "two  blanks"),
    ],
)
def test_what_is_quoted_is_printable(quoted, shown):
    error = UserError(f"{quoted}: mend it")
    assert str(error) == f"{shown}: mend it"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_long_messages_keep_culprit_and_mend():
    line = str(UserError(f"config.json: key={'x' * 10_000}: remove the key"))
    assert len(line) <= MAX_LENGTH
    assert line.startswith("config.json: key=xx") and line.endswith("xx: remove the key")
    assert " ... " in line
    exact = "y" * MAX_LENGTH
    assert str(UserError(exact)) == exact


def end(body, **settings):
    """How a script with `body` inside cli_errors ends."""
    return subprocess.run(
        [sys.executable, "-c", ENDINGS + f"    {body}"],
        cwd=ROOT, capture_output=True, encoding="utf-8", **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("raise UserError('a b: mend')", 2, "error: a b: mend\n"),
        ("open('/no/\\x1b[31m')", 2, "No such file or directory: '/no/\\x1b[31m'\n"),
        ("raise OSError('x' * 10_000)", 2, " ... "),
        ("raise KeyboardInterrupt", 130, ""),
        ("signal.raise_signal(signal.SIGINT); time.sleep(9)", 130, ""),
        # Once more, while the interpreter takes itself apart.
        ("atexit.register(signal.raise_signal, signal.SIGINT); raise SystemExit(143)", 130, ""),
    ],
)
def test_how_a_program_ends(body, code, err):
    done = end(body)
    assert done.returncode == code and done.stdout == ""
    assert err in done.stderr and done.stderr.count("\n") == (code == 2)
    assert len(done.stderr) <= len("error: \n") + MAX_LENGTH


def test_a_reader_that_has_gone_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", ENDINGS + "    print('x' * 100_000)"],
        cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_terminal_lacks_is_replaced(encoding):
    done = end("print('a \\u65e5 b')", env=os.environ | {"PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stdout, done.stderr) == (0, "a ? b\n", "")


def test_arguments_that_are_not_utf8():
    assert argument(os.fsdecode("Grüße".encode())) == "Grüße"
    assert argument("a\udcffb") == "a\ufffdb"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of bytes that can be run."""
    return hf_folders.of_bytes(tmp_path_factory.mktemp("model") / "lte")


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["lte-jax", "generate", *map(str, flags)])
    main()


def test_what_is_chosen_is_said_once(folder):
    command = [sys.executable, "-m", "lte_jax", "generate", folder, "abc", "--max-new-tokens=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("abc")
    assert sum(line.startswith("kernels: ") for line in done.stderr.splitlines()) == 1, done.stderr


def test_an_error_begins_on_a_line_of_its_own(folder, monkeypatch, capfd):
    with pytest.raises(SystemExit):
        run(monkeypatch, folder, "abc", "--max-new-tokens=1000")
    out, err = capfd.readouterr()
    assert out == "abc\n" and err.startswith("error: ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_continuation(folder, dtype, monkeypatch, capfd):
    """From a folder named as people do, in a chosen type, of a prompt that is not UTF-8."""
    monkeypatch.setenv("HOME", str(folder.parent))
    given = []
    load = lambda path, chosen: (given.append(chosen), load_(path, chosen))[1]  # noqa: E731
    load_ = lte_jax.load
    monkeypatch.setattr(lte_jax, "load", load)
    flags = ("--max-new-tokens=3", f"--dtype={dtype}", "--threshold=0.4")
    run(monkeypatch, "~/lte/", "ab\udcff", *flags)
    out = capfd.readouterr().out
    assert out.startswith("ab\ufffd") and out.endswith("\n") and given == [dtype]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--max-new-tokens=0", "value=0: expected a positive integer"),
        ("--temperature=-1", "value=-1.0: expected zero or more"),
        ("--temperature=1e999", "finite"),
        ("--top-p=2", "within (0, 1]"),
        ("--top-k=0", "a positive integer"),
        ("--seed=-1", "zero or more"),
        ("--threshold=7", "strictly between 0 and 1"),
        ("--dtype=float16", "invalid choice: 'float16'"),
        ("--no-such=a\nb\x1b", r"error: unrecognized arguments: --no-such=a b\x1b"),
    ],
)
def test_bad_input_flags_are_found_before_a_model_is_loaded(flag, message, monkeypatch, capfd):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "/no/such/folder", "abc", flag)
    assert stopped.value.code == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--length=1", "2 or more"),
        ("--records=0", "a positive integer"),
        ("--batch-size=-1", "a positive integer"),
        ("--threshold=nan", "expected float"),
        ("--out=", "--out is empty"),
    ],
)
def test_bad_input_evaluate_flags_are_found_before_a_model_is_loaded(
    flag, message, monkeypatch, capsys
):
    command = ["evaluate.py", "--model=/no/such/folder", "--data=x.jsonl", "--out=o", flag]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--workdir=w", "--threshold=0.6", "--out=o"), "takes no other flags: leave out"),
        (("--workdir=w", "--runs", "a", "b"), "--workdir takes no other flags: leave out --runs"),
        (
            ("--runs", "a", "b", "--out=o", "--batch-size=2"),
            "--runs takes --out and --no-figures alone: leave out --batch-size",
        ),
    ],
)
def test_bad_input_flags_that_would_be_ignored(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_cli_errors_hide_no_bug():
    with pytest.raises(ValueError, match="bug"), cli_errors():
        raise ValueError("bug")


def test_tuning_of_kernels_without_a_gpu_is_one_line(monkeypatch, capsys):
    from lte_jax.kernels import tune

    monkeypatch.setattr(tune.gpu_triton, "unavailable", lambda: "there is no GPU")
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit) as stopped:
        tune.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: no block sizes can be timed here: there is no GPU\n"


@pytest.mark.parametrize(
    ("words", "linear"),
    [
        ([], [(4096, 12288, None), (4096, 4096, None), (4096, 32000, None)]),
        (["--quantize=int4"], [(4096, 12288, None), (4096, 4096, None), (4096, 32000, "int6")]),
        (["--linear", "64x96:int8"], [(64, 96, "int8")]),
    ],
)
def test_what_is_tuned_is_what_decoding_reads(words, linear, monkeypatch, tmp_path):
    """q, k and v as one matrix, and beside int4 the head in 6 bits."""
    from lte_jax.kernels import tune

    seen = []
    monkeypatch.setattr(tune.gpu_triton, "unavailable", lambda: None)
    monkeypatch.setattr(tune, "tune", lambda flags, rows: seen.append((flags, rows)) or ())
    argv = ["tune", *words, "--rows", "1", "8", f"--out={tmp_path / 'x.json'}"]
    monkeypatch.setattr("sys.argv", argv)
    tune.main()
    assert [rows for _, rows in seen] == [1, 8]
    assert seen[0][0].linear == [(k, o, False, kind) for k, o, kind in linear]
