"""Folders of models that tests load, change and complain about, beside those of hf_models.py."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from hf_models import config_json, write_folder

import lte_jax
from lte_jax import data, hf
from lte_jax.config import LTEConfig, UserError

UP = "model.layers.0.mlp.up_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LTE = LTEConfig(expert_size=8, threshold=0.4375, calibration_records=3, target_sparsity=None)


def of_bytes(folder):
    """Writes a small random LTE model of bytes, with its tokenizer; returns the folder."""
    config = dataclasses.replace(tiny.CONFIG, vocab_size=259)
    lte_jax.save(folder, *tiny.model_and_params(config=config))
    data.byte_tokenizer().save_pretrained(folder)
    return folder


def as_lte(folder, lte=LTE, seed=0):
    """A dense folder's model with its neurons shuffled into experts, and random routers."""
    config, _ = hf.read_config(folder)
    params = hf.load_params(folder, config, None)
    rng = np.random.default_rng(seed)
    layers, width, model_width = config.num_layers, config.d_ff, config.d_model
    order_NF = np.stack([rng.permutation(width) for _ in range(layers)]).astype(np.int32)
    ffn = dict(params["layers"]["ffn"])
    experts = width // lte.expert_size
    for name in ("gate_bias", "up_bias"):
        if name in ffn:
            b_NF = np.take_along_axis(np.asarray(ffn[name])[:, 0], order_NF, axis=1)
            ffn[name] = b_NF.reshape(layers, experts, lte.expert_size)
    for name in {"gate", "up", "down"} & ffn.keys():
        w_NFD = np.take_along_axis(np.asarray(ffn[name])[:, 0], order_NF[:, :, None], axis=1)
        ffn[name] = w_NFD.reshape(layers, experts, lte.expert_size, model_width)
    router_NDE = rng.standard_normal((layers, model_width, experts)).astype(np.float32)
    ffn["router"] = {"kernel": router_NDE * model_width**-0.5}
    if lte.router_bias:
        ffn["router"]["bias"] = rng.standard_normal((layers, experts)).astype(np.float32)
    params = params | {"layers": params["layers"] | {"ffn": ffn}}
    return config, params, order_NF.reshape(layers, experts, lte.expert_size)


def flat(params):
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def load(folder):
    config, lte = hf.read_config(folder)
    return config, lte, hf.load_params(folder, config, lte)


def assert_complains(action, *words):
    """That `action` raises one line with all of `words` in it; returns the line."""
    with pytest.raises(UserError) as raised:
        action()
    line = str(raised.value)
    assert "\n" not in line and 20 < len(line) < 500, line
    for word in map(str, words):
        assert word in line, f"{word!r} not in: {line}"
    return line


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


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


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
