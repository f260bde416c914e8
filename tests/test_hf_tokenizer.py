"""Tokenizers of a folder: missing, corrupt, or with code, which is never run."""

import json
import os
import subprocess
import sys

import pytest
from hf_folders import assert_complains, edit
from hf_models import config_json, write_folder

from lte_jax import data, hf


def test_bad_input_tokenizer_missing(tmp_path):
    folder = write_folder(tmp_path, config_json("llama"), {})
    assert_complains(lambda: hf.load_tokenizer(folder), folder, "tokenizer.json", "copy it")


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[]", '"text"'])
def test_bad_input_tokenizer_corrupt(content, tmp_path):
    folder = write_folder(tmp_path, config_json("llama"), {})
    (folder / "tokenizer.json").write_text(content)
    assert_complains(lambda: hf.load_tokenizer(folder), folder, "tokenizer", "copy")


CODE = """
open({marker!r}, "w").write("ran")
from transformers import PreTrainedTokenizerFast
class Mine(PreTrainedTokenizerFast): pass
"""


def folder_with_code(folder, marker, where, family):
    write_folder(folder, config_json("llama"), {})
    data.byte_tokenizer().save_pretrained(folder)
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    raw = json.loads((folder / where).read_text())
    raw["auto_map"] = {"AutoTokenizer": ["code.Mine", "code.Mine"], "AutoConfig": "code.Mine"}
    if where == "tokenizer_config.json":
        raw["tokenizer_class"] = "Mine"
    (folder / where).write_text(json.dumps(raw))
    return edit(folder, model_type=family)


def test_no_code_of_a_folder_is_run(tmp_path):
    """Not even where somebody at a terminal would say yes."""
    marker = tmp_path / "marker"
    folders = [
        folder_with_code(tmp_path / f"{where}-{family}", marker, where, family)
        for where in ("config.json", "tokenizer_config.json")
        for family in ("llama", "unheard-of")
    ]
    program = f"""
from lte_jax import hf, pipeline
for folder in {list(map(str, folders))}:
    print(hf.load_tokenizer(folder)("Once upon a time").input_ids)
"""
    ours, theirs = os.openpty()
    os.write(ours, b"y\n" * 9)
    command = [sys.executable, "-c", program]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, stdin=theirs, capture_output=True, text=True, timeout=120, env=environment
    )
    os.close(ours), os.close(theirs)
    assert not marker.exists() and "[y/N]" not in done.stdout + done.stderr
    assert done.returncode == 0, done.stderr[-2000:]
    expected = data.byte_tokenizer()("Once upon a time").input_ids
    assert done.stdout.splitlines() == [str(expected)] * 4


def test_bad_input_tokenizer_that_needs_code(tmp_path):
    folder = folder_with_code(
        tmp_path / "m", tmp_path / "marker", "tokenizer_config.json", "unheard-of"
    )
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert_complains(lambda: hf.load_tokenizer(folder), folder, "auto_map", "never run")
    assert not (tmp_path / "marker").exists()


def test_no_advice_to_install_pytorch():
    """What transformers says where there is no PyTorch; all else that it says is heard."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lte_jax import data\ndata.byte_tokenizer()\n"
        "import transformers\ntransformers.logging.get_logger('transformers').warning('heard')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "PyTorch" not in done.stderr and "heard" in done.stderr
