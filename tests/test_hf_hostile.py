"""Folders as people have them, half right, of another kind, or meant to harm."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hf_models import (
    assert_bit_equal,
    config_json,
    random_tensors,
    read_tensors,
    tensor_shapes,
    write_folder,
)
from test_bad_input_hf import assert_complains, load
from test_roundtrip import LTE, as_lte, flat

import lte_jax
from lte_jax import data, hf, pipeline
from lte_jax.hf import renaming, stored

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(autouse=True)
def forget_what_was_said():
    stored.say_once.cache_clear()


def edit(folder, **changes):
    """Changes keys of config.json; None stands for null."""
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


def lte_folder(path, dense=None, **options):
    dense = dense or write_folder(path.parent / "dense", config_json("llama"))
    config, params, order = as_lte(dense)
    hf.save(path, config, LTE, params, source=dense, expert_order=order, **options)
    return path


# ----------------------------------------------------------------------- names as people have them


def tied_by_its_head(tensors):
    tensors[HEAD] = tensors.pop(EMBED)
    return tensors


RENAMED = {
    "torch.compile": lambda t: {f"_orig_mod.{n}": v for n, v in t.items()},
    "compiled inside": lambda t: {
        n.replace("model.", "model._orig_mod.", 1): v for n, v in t.items()
    },
    "ddp": lambda t: {f"module.{n}": v for n, v in t.items()},
    "ddp of compiled": lambda t: {f"module._orig_mod.{n}": v for n, v in t.items()},
    "compiled ddp": lambda t: {f"_orig_mod.module.{n}": v for n, v in t.items()},
    "peft": lambda t: {f"base_model.model.{n}": v for n, v in t.items()},
    "images and text": lambda t: {f"language_model.{n}": v for n, v in t.items()},
    "images and text, new": lambda t: {
        n.replace("model.", "model.language_model.", 1): v for n, v in t.items()
    },
    "no head": lambda t: {n.removeprefix("model."): v for n, v in t.items()},
    "only the head": tied_by_its_head,
    "only the head, ddp": lambda t: {f"module.{n}": v for n, v in tied_by_its_head(t).items()},
    "score": lambda t: t | {"score.weight": np.ones((2, 64), np.float32)},
    "masked_bias": lambda t: t | {"model.layers.0.self_attn.masked_bias": np.ones((), np.float32)},
}


@pytest.mark.parametrize("change", RENAMED)
def test_names_of_other_writers(change, tmp_path, caplog):
    raw = config_json("tied")
    tensors = random_tensors(raw)
    expected = load(write_folder(tmp_path / "plain", raw, tensors))
    assert not caplog.records
    folder = write_folder(tmp_path / "other", raw, RENAMED[change](dict(tensors)))
    for _ in range(2):
        assert_bit_equal(flat(load(folder)[2]), flat(expected[2]))
    [record] = caplog.records  # said once
    assert str(folder) in record.getMessage()
    config, lte, params = load(folder)
    hf.save(tmp_path / "new", config, lte, params, source=folder, dtype="source")
    assert_bit_equal(read_tensors(tmp_path / "new"), tensors)


def test_untied_names_of_other_writers(tmp_path):
    raw = config_json("llama")
    tensors = random_tensors(raw)
    renamed = {n if n == HEAD else n.removeprefix("model."): t for n, t in tensors.items()}
    folder = write_folder(tmp_path, raw, renamed)
    np.testing.assert_array_equal(load(folder)[2]["lm_head"]["kernel"].T, tensors[HEAD])


def test_renaming_is_all_or_nothing():
    """A prefix that only some layers have stays, and so do names that would fall together."""
    expected = set(tensor_shapes(config_json("llama")))
    some = [n if "layers.0" in n else f"module.{n}" for n in expected]
    assert renaming.to_expected(some, expected) == ({name: name for name in some}, "")
    both = [*expected, *(n.replace("model.", "language_model.") for n in expected)]
    assert renaming.to_expected(both, expected) == ({name: name for name in both}, "")
    assert renaming.to_expected(expected, expected) == ({name: name for name in expected}, "")


def test_bad_input_renamed_and_incomplete(tmp_path):
    """The complaint is about what is missing, not about every name."""
    tensors = {f"module.{n}": t for n, t in random_tensors(config_json("llama")).items()}
    del tensors["module.model.layers.1.mlp.up_proj.weight"]
    folder = write_folder(tmp_path, config_json("llama"), tensors)
    line = assert_complains(lambda: load(folder), "lacks model.layers.1.mlp.up_proj.weight")
    assert "more" not in line


# ------------------------------------------------------------------------- shards without an index


@pytest.fixture
def sharded(tmp_path):
    folder = write_folder(tmp_path / "model", config_json("llama"), shards=3)
    (folder / "model.safetensors.index.json").unlink()
    return folder


def test_shards_without_an_index(sharded, caplog):
    expected = random_tensors(config_json("llama"))
    np.testing.assert_array_equal(load(sharded)[2]["embed"]["embedding"], expected[EMBED])
    assert "model-00001-of-00003.safetensors" in caplog.text
    for i, file in enumerate(sorted(sharded.glob("*.safetensors"))):
        file.rename(sharded / f"part_{i}.safetensors")
    np.testing.assert_array_equal(load(sharded)[2]["embed"]["embedding"], expected[EMBED])


def test_bad_input_shard_of_a_set_absent(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert_complains(lambda: load(sharded), "model-00002-of-00003.safetensors is absent")


def test_bad_input_shards_that_overlap(sharded):
    shutil.copy(sharded / "model-00002-of-00003.safetensors", sharded / "copy.safetensors")
    assert_complains(lambda: load(sharded), "is both in", "copy.safetensors")


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", ".."]
)
def test_bad_input_shard_names_that_lead_elsewhere(file, tmp_path):
    folder = write_folder(tmp_path / "model", config_json("llama"), shards=2)
    safetensors.numpy.save_file({"x": np.zeros(1)}, tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"][EMBED] = file
    index.write_text(json.dumps(raw))
    assert_complains(lambda: load(folder), index, repr(file), "without a path")


# ----------------------------------------------------------------------- keys that change nothing

HARMLESS = {
    "layer_norm_eps": {"layer_norm_eps": 1e-12},
    "num_logits_to_keep": {"num_logits_to_keep": 1},
    "classifier": {"classifier_activation": "gelu", "classifier_dropout": 0.1},
    "dropout": {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1},
    "pattern": {"sliding_window_pattern": 1},
    "list of one bos": {"bos_token_id": [1]},
    "list of one pad": {"pad_token_id": [0]},
    "dtype": {"torch_dtype": "auto", "dtype": "auto"},  # float32, where config.json alone is asked
    "full layers": {"layer_types": ["full_attention"] * 3},
    "sliding layers": {
        **{"model_type": "mistral", "sliding_window": 8},
        "layer_types": ["sliding_attention"] * 3,
    },
    "max_window_layers": {"model_type": "qwen2", "max_window_layers": None},
    "max_window_layers of llama": {"max_window_layers": None},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless_keys(case, tmp_path):
    changes = HARMLESS[case]
    family = {"model_type": changes.get("model_type", "llama"), "sliding_window": None}
    family["torch_dtype"] = "float32"
    plain = config_json("llama", **family | {"sliding_window": changes.get("sliding_window")})
    raw = plain | changes
    config = hf.read_config(write_folder(tmp_path / "a", raw, {}))[0]
    pad = 0 if "pad_token_id" in changes else None
    assert (
        config == hf.read_config(write_folder(tmp_path / "b", plain | {"pad_token_id": pad}, {}))[0]
    )


MEANINGFUL = {
    "layer_types of llama": {"layer_types": ["sliding_attention"] * 3},
    "layer_types of mistral": {
        **{"model_type": "mistral", "sliding_window": 8},
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "sliding_window_pattern": {"sliding_window_pattern": 6},
    "bos_token_id": {"bos_token_id": [1, 2]},
    "max_window_layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "max_window_layers": None,
    },
    "rms_norm_eps": {"rms_norm_eps": 0.0},
    "rms_norm_eps negative": {"rms_norm_eps": -1e-5},
    "rms_norm_eps nan": {"rms_norm_eps": float("nan")},
    "rope_theta": {"rope_theta": 0},
    "rope_theta inf": {"rope_theta": float("inf")},
    "rope_scaling.factor": {"rope_scaling": {"type": "linear", "factor": -2.0}},
    "low_freq_factor": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 4.0,
            "high_freq_factor": 4.0,
        }
    },
}


@pytest.mark.parametrize("case", MEANINGFUL)
def test_bad_input_keys_that_change_something(case, tmp_path):
    folder = write_folder(tmp_path, config_json("llama", **MEANINGFUL[case]), {})
    assert_complains(lambda: hf.read_config(folder), folder / "config.json", case.split()[0])


# --------------------------------------------------------------- small files that eat the machine

HUGE = {  # what to change, and the key to be named: before anything grows to its size
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
    "layers of a sliding model": (
        {"model_type": "qwen2", "num_hidden_layers": 10**9}
        | {"use_sliding_window": True, "max_window_layers": 0},
        "num_hidden_layers=1000000000",
    ),
    "layer_types": (
        {"model_type": "qwen3", "layer_types": ["full_attention"] * 200_000},
        "layer_types has 200000 entries",
    ),
    "width": ({"intermediate_size": 10**18, "lte": {"expert_size": 7}}, "intermediate_size="),
    "vocabulary": ({"vocab_size": 10**400}, "vocab_size="),
    "eps": ({"rms_norm_eps": 10**400}, "rms_norm_eps="),
    "theta": ({"rope_theta": 10**400}, "rope_theta="),
    "eos": ({"eos_token_id": [2] * 100_000}, "eos_token_id has 100000 entries"),
    "key": ({"x" * 100_000 + "attn": "y" * 100_000}, "xxx"),
    "deep value": ({"attn": json.loads("[" * 900 + "1" + "]" * 900)}, ""),
}


@pytest.mark.parametrize("case", HUGE)
def test_bad_input_absurd_sizes(case, tmp_path):
    changes, words = HUGE[case]
    folder = edit(write_folder(tmp_path, config_json("llama")), **changes)
    began = time.monotonic()
    assert_complains(lambda: load(folder), folder / "config.json", words)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", '{"a": 1e999']
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_bad_input_json_bombs(name, text, tmp_path):
    folder = write_folder(tmp_path, config_json("llama"))
    (folder / name).write_text(text)
    assert_complains(lambda: load(folder), folder / name)


def header(*, length=None, **tensors):
    text = json.dumps(
        {n: {"dtype": d, "shape": s, "data_offsets": o} for n, (d, s, o) in tensors.items()}
    ).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(8)


LIES = {
    "length": header(length=2**62),
    "long": header(length=99_999_999),
    "overflow": header(a=("F32", [2**33, 2**33], [0, 8])),
    "overflow to nothing": header(a=("F32", [2**62, 4], [0, 0])),
    "negative": header(a=("F32", [-2], [0, 8])),
    "dtype": header(a=("F16", [2], [0, 8])),
    "backwards": header(a=("F32", [2], [8, 0])),
    "overlap": header(a=("F32", [2], [0, 8]), b=("F32", [2], [0, 8])),
    "huge and empty": header(a=("F32", [0, 2**62], [0, 0]), b=("F32", [2], [0, 8])),
    "thousand dimensions": header(a=("F32", [1] * 1000 + [2], [0, 8])),
    "deep": struct.pack("<Q", 500_000) + b'{"a":' * 100_000,
    "name": header(**{"a\n\x1b[31m" + "b" * 1000: ("F32", [2], [0, 8])}),
}


@pytest.mark.parametrize("case", LIES)
def test_bad_input_lying_safetensors(case, tmp_path):
    folder = write_folder(tmp_path, config_json("llama"))
    (folder / "model.safetensors").write_bytes(LIES[case])
    line = assert_complains(lambda: load(folder), folder)
    assert line.isprintable()


def test_bad_input_safetensors_header_that_eats_memory(tmp_path):
    folder = write_folder(tmp_path, config_json("llama"))
    size = 20 * 2**20
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", size) + b"{")
        file.truncate(size + 8)
    assert_complains(lambda: load(folder), folder / "model.safetensors", "header of 20,971,520")


# ------------------------------------------------------------------ pipes, devices, links, folders


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_bad_input_no_regular_file(name, kind, tmp_path):
    folder = write_folder(tmp_path / "m", config_json("llama"))
    (folder / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with in_time():
        line = assert_complains(lambda: (load(folder), hf.load_tokenizer(folder)), folder / name)
    assert "expected a regular file" in line


@contextlib.contextmanager
def in_time(seconds=10):
    """Ends what waits for a pipe."""

    def ring(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_export_follows_no_link_out_of_the_folder(tmp_path, caplog):
    (tmp_path / "secret").write_text("the key")
    folder = write_folder(tmp_path / "m", config_json("llama"))
    (folder / "LICENSE.txt").symlink_to("../secret")
    (folder / "NOTICE").write_text("ours")
    (folder / "NOTICE.md").symlink_to("NOTICE")
    os.mkfifo(folder / "vocab.txt")
    config, lte, params = load(folder)
    hf.save(tmp_path / "new", config, lte, params, source=folder)
    held = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert held == ["NOTICE", "NOTICE.md", "config.json", "manifest.json", "model.safetensors"]
    assert (tmp_path / "new" / "NOTICE.md").read_text() == "ours"
    assert "LICENSE.txt is left out" in caplog.text and "vocab.txt is left out" in caplog.text


def hub_snapshot(root, folder, shared_store=False):
    """A folder as huggingface_hub keeps it: links to blobs, which may be links themselves."""
    repository = root / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{i:064x}"
        shutil.copy(file, blob)
        if shared_store:
            (root / "blobs").mkdir(exist_ok=True)
            blob.rename(root / "blobs" / blob.name)
            blob.symlink_to(f"../../blobs/{blob.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("shared_store", [False, True])
def test_export_of_a_model_in_the_hub_cache(shared_store, tmp_path, caplog):
    folder = write_folder(tmp_path / "m", config_json("llama"))
    (folder / "LICENSE").write_text("free")
    snapshot = hub_snapshot(tmp_path / "hub", folder, shared_store)
    config, lte, params = load(snapshot)
    hf.save(tmp_path / "new", config, lte, params, source=snapshot)
    assert (tmp_path / "new" / "LICENSE").read_text() == "free" and not caplog.records
    assert (tmp_path / "new" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


# --------------------------------------------------------------------- code that a folder brings

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


# ------------------------------------------------------------------------------ what was found


def adapter(folder):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


def trainer(folder):
    for step in ("50", "1000", "900"):
        write_folder(folder / f"checkpoint-{step}", config_json("llama"), {})


def run(folder):
    write_folder(folder / "lte", config_json("llama"), {})


FOUND = {
    "adapter": (adapter, ["PEFT adapter", "merge_and_unload"]),
    "gguf": (lambda f: (f / "m.Q4.gguf").write_bytes(b""), ["m.Q4.gguf", "GGUF", "converted from"]),
    "meta": (lambda f: (f / "consolidated.00.pth").write_bytes(b""), ["Meta", "-hf"]),
    "trainer": (trainer, ["3 checkpoints of a Trainer", "checkpoint-1000"]),
    "run": (run, ["work directory of a run", "/lte"]),
    "cache": (lambda f: (f / "snapshots" / "abc").mkdir(parents=True), ["cache", "snapshots/abc"]),
}


@pytest.mark.parametrize("case", FOUND)
@pytest.mark.parametrize("with_config", [False, True])
def test_bad_input_folder_of_another_kind(case, with_config, tmp_path):
    make, words = FOUND[case]
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(config_json("llama")))
    make(tmp_path)
    line = assert_complains(lambda: load(tmp_path), tmp_path, *words)
    assert ".bin" not in line and "does not exist" not in line


def unfinished(root, *absent):
    folder = write_folder(root / "m", config_json("llama"), shards=2)
    snapshot = hub_snapshot(root / "hub", folder)
    for name in absent:
        (snapshot / name).unlink()
    (snapshot.parent.parent / "blobs" / "0a.incomplete").write_bytes(b"half")
    return snapshot


@pytest.mark.parametrize("absent", ["config.json", "model-00001-of-00002.safetensors"])
def test_bad_input_unfinished_download(absent, tmp_path):
    assert_complains(lambda: load(unfinished(tmp_path, absent)), "hf download owner/name")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["gptq, 4 bits"]),
        ({"quant_method": "awq", "bits": 4}, ["awq"]),
        ({"quant_method": "fp8"}, ["fp8"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes"]),
        ({"bits": 4}, ["4 bits"]),
    ],
)
def test_bad_input_quantised(quantization, words, tmp_path):
    folder = write_folder(tmp_path, config_json("llama", quantization_config=quantization), {})
    line = assert_complains(lambda: load(folder), "quantised", "quantised from", *words)
    assert "remove the key" not in line


@pytest.mark.parametrize(
    ("suffix", "method"), [("qweight", "GPTQ or AWQ"), ("weight_scale_inv", "fp8"), ("SCB", "bits")]
)
def test_bad_input_quantised_tensors_alone(suffix, method, tmp_path):
    tensors = random_tensors(config_json("llama"))
    tensors[f"model.layers.0.mlp.up_proj.{suffix}"] = np.zeros(4, np.float32)
    folder = write_folder(tmp_path, config_json("llama"), tensors)
    assert_complains(lambda: load(folder), method, "quantised from")


def test_bad_input_float64(tmp_path):
    folder = write_folder(tmp_path, config_json("llama"), dtype="float64")
    line = assert_complains(lambda: load(folder), "F64", "convert the model to float32")
    assert "quantised" not in line


@pytest.mark.parametrize(
    ("model_type", "word"),
    [
        ("mixtral", "mixture of experts already"),
        ("bert", "encoder"),
        ("t5", "encoder and a decoder"),
        ("qwen2_vl", "more than text"),
        ("mamba", "no Transformer"),
        ("gpt2", "blocks of its own"),
    ],
)
def test_bad_input_known_families(model_type, word, tmp_path):
    folder = write_folder(tmp_path, {"model_type": model_type}, {})
    assert_complains(lambda: load(folder), f"'{model_type}'", word, "llama, mistral, qwen2, qwen3")


def test_bad_input_classifier(tmp_path):
    tensors = random_tensors(config_json("llama"))
    tensors["score.weight"] = tensors.pop(HEAD)[:2]
    folder = write_folder(tmp_path, config_json("llama"), tensors)
    line = assert_complains(lambda: load(folder), "classifier", "score.weight", "language model")
    assert "tie_word_embeddings" not in line


def test_bad_input_saved_without_its_head(tmp_path):
    tensors = random_tensors(config_json("llama"))
    tensors = {n.removeprefix("model."): t for n, t in tensors.items() if n != HEAD}
    folder = write_folder(tmp_path, config_json("llama", architectures=["LlamaModel"]), tensors)
    assert_complains(lambda: load(folder), "saved as LlamaModel", "LlamaForCausalLM")


@pytest.mark.parametrize("types", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_tied_head_of_another_type(types, tmp_path):
    """Equal once converted: the tie is meant."""
    tensors = random_tensors(config_json("tied"))
    half = tensors[EMBED].astype(ml_dtypes.bfloat16)
    full = tensors[EMBED] if types[0] == "float32" else half.astype(np.float32)
    both = (full, half) if types[0] == "float32" else (half, full)
    tensors |= dict(zip((EMBED, HEAD), both, strict=True))
    folder = write_folder(tmp_path, config_json("tied"), tensors)
    np.testing.assert_array_equal(load(folder)[2]["embed"]["embedding"], both[0])
    tensors[HEAD] = both[1] * both[1].dtype.type(1.5)
    write_folder(tmp_path, config_json("tied"), tensors)
    line = assert_complains(lambda: load(folder), "lm_head.weight differs")
    assert "to false" not in line


def without_routers(folder):
    """The routers are gone and config.json still names them; the mend that is named works."""
    line = assert_complains(lambda: load(folder), "routers", '"lte"', "save_pretrained")
    assert "download" not in line
    raw = json.loads((folder / "config.json").read_text())
    del raw["lte"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert load(folder)[1] is None


def test_bad_input_lte_folder_without_its_routers(tmp_path):
    folder = lte_folder(tmp_path / "lte")
    tensors = {name: t for name, t in read_tensors(folder).items() if ".mlp.router." not in name}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "manifest.json").unlink()
    without_routers(folder)


def test_bad_input_lte_folder_saved_again_by_transformers(tmp_path):
    pytest.importorskip("torch", reason="transformers saves with torch")
    transformers = pytest.importorskip("transformers")
    folder = lte_folder(tmp_path / "lte")
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    without_routers(tmp_path / "again")


# ------------------------------------------------------------------------ how a model is named


@pytest.mark.parametrize(
    ("spelled", "repository", "revision"),
    [
        ("owner/name", "owner/name", None),
        ("owner/name/", "owner/name", None),
        ("gpt2", "gpt2", None),
        ("owner/name@v1.0", "owner/name", "v1.0"),
        ("owner/name@refs/pr/3", "owner/name", "refs/pr/3"),
        ("https://huggingface.co/owner/name", "owner/name", None),
        ("https://huggingface.co/owner/name/", "owner/name", None),
        ("https://huggingface.co/owner/name/tree/main", "owner/name", "main"),
        ("https://huggingface.co/owner/name/tree/refs%2Fpr%2F3/", "owner/name", "refs/pr/3"),
        ("https://huggingface.co/owner/name?library=jax", "owner/name", None),
        ("huggingface.co/owner/name", "owner/name", None),
        ("https://hf.co/owner/name", "owner/name", None),
    ],
)
def test_spellings_of_a_hub_model(spelled, repository, revision, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(name, revision, **_):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hf.resolve(spelled) == tmp_path
    assert asked == [(repository, revision)]


@pytest.mark.parametrize(
    "spelled",
    [
        "https://example.com/owner/name",
        "https://huggingface.co/datasets/owner/name",
        "https://huggingface.co/owner/name/tree/main/subfolder",
        "owner/name@",
        "a" * 5000,
        "a\0b",
    ],
)
def test_bad_input_spellings(spelled):
    assert_complains(lambda: hf.resolve(spelled), "correct the path")


def test_bad_input_no_name():
    assert_complains(lambda: hf.resolve(""), "'' names no model", "folder or a hub id")


def test_home_folder_and_trailing_slash(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_folder(tmp_path / "m", config_json("llama"))
    assert hf.resolve("~/m/") == folder
    model, params = lte_jax.load("~/m/")
    lte_jax.save("~/new", model, params, source="~/m")
    assert_bit_equal(read_tensors(tmp_path / "new"), read_tensors(folder))


# ------------------------------------------------------------------------------- the manifest


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_changed_in_a_folder_is_found(tmp_path):
    folder = lte_folder(tmp_path / "lte")
    lte_jax.load(folder, verify=True)
    files = sorted(file.name for file in folder.iterdir() if file.name != "manifest.json")
    assert files == ["config.json", "expert_order.safetensors", "model.safetensors"]
    for name in files:
        kept = (folder / name).read_bytes()
        flip(folder / name, -2)  # the size stays
        line = assert_complains(lambda: lte_jax.load(folder, verify=True), folder, name)
        assert "SHA-256" in line and "manifest.json" in line
        (folder / name).write_bytes(kept + b" ")
        for read in (lte_jax.load, hf.read_config, hf.load_expert_order):
            assert_complains(lambda read=read: read(folder), folder, name, "bytes instead of")
        (folder / name).unlink()
        assert_complains(lambda: lte_jax.load(folder), folder, name)
        (folder / name).write_bytes(kept)
    flip(folder / "manifest.json", 80)
    assert_complains(lambda: lte_jax.load(folder), "manifest.json is not as it was written")
    (folder / "manifest.json").unlink()
    lte_jax.load(folder, verify=True)


def test_bad_input_folder_of_a_run(tmp_path):
    """A run goes on only from folders that are, bit for bit, as it wrote them."""
    folder = lte_folder(tmp_path / "experts")
    pipeline._verify(folder)
    flip(folder / "model.safetensors")
    words = [folder, "model.safetensors is not as it was written", "remove it", "again"]
    assert_complains(lambda: pipeline._verify(folder), *words)
    flip(folder / "model.safetensors")
    pipeline._verify(folder)
    (folder / "manifest.json").unlink()
    assert_complains(lambda: pipeline._verify(folder), folder, "manifest.json", "remove it")


def test_bad_input_expert_order(tmp_path):
    """Gone, or no permutation: a line, also in folders without a manifest."""
    folder = lte_folder(tmp_path / "lte")
    order_NEM = hf.load_expert_order(folder)
    path = folder / "expert_order.safetensors"
    path.unlink()
    assert_complains(lambda: hf.load_expert_order(folder), "expert_order.safetensors is missing")
    (folder / "manifest.json").unlink()
    assert hf.load_expert_order(folder) is None
    twice = order_NEM.copy()
    twice[1, 0, 0] = twice[1, 0, 1]
    for wrong, words in {
        "twice": ({"expert_order": twice}, ["layer 1", "once"]),
        "shape": ({"expert_order": order_NEM[:2]}, ["[2, 12, 8]", "[3, 12, 8]"]),
        "dtype": ({"expert_order": order_NEM.astype(np.float32)}, ["F32", "I32"]),
        "name": ({"order": order_NEM}, ["nothing"]),
    }.values():
        safetensors.numpy.save_file(wrong, path)
        assert_complains(lambda: hf.load_expert_order(folder), path, *words)
    config, lte, params = load(folder)
    assert_complains(
        lambda: hf.save(tmp_path / "new", config, lte, params, expert_order=twice), "layer 1"
    )


def test_transformers_reads_a_folder_with_a_manifest(shared, tmp_path):
    transformers = pytest.importorskip("transformers")
    source = shared / "models" / "stories260k"
    config, params, order = as_lte(source, lte := lte_jax.LTEConfig(expert_size=43))
    hf.save(tmp_path / "lte", config, lte, params, source=source, expert_order=order)
    assert (tmp_path / "lte" / "manifest.json").exists()
    assert transformers.AutoConfig.from_pretrained(tmp_path / "lte").hidden_size == 64
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "lte")
    assert tokenizer("Once").input_ids == hf.load_tokenizer(source)("Once").input_ids
    (tmp_path / "lte" / "tokenizer.json").unlink()
    assert_complains(lambda: hf.load_tokenizer(tmp_path / "lte"), "tokenizer.json")
    assert_complains(lambda: lte_jax.load(tmp_path / "lte"), "tokenizer.json is missing")


# ----------------------------------------------------------------------- weights that mislead


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_bad_input_router_weights(value, part, tmp_path):
    folder = lte_folder(tmp_path / "lte")
    (folder / "manifest.json").unlink()
    tensors = read_tensors(folder)
    name = f"model.layers.1.mlp.router.{part}"
    tensors[name].flat[3] = value
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "model.safetensors"
    assert_complains(lambda: load(folder), name, path, "NaN or infinite")


def test_float16_is_a_type_to_store_in(tmp_path):
    raw = config_json("llama", torch_dtype="float16")
    folder = write_folder(tmp_path / "m", raw, dtype="float16")
    assert_complains(lambda: lte_jax.load(folder, "float16"), "float16", "may be stored")
    model, params = lte_jax.load(folder)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float16"}
    lte_jax.save(tmp_path / "new", model, params)
    assert_bit_equal(read_tensors(tmp_path / "new"), read_tensors(folder))
    assert hf.read_config(tmp_path / "new")[0].dtype == "float16"
