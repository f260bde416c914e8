"""Tensor names as other writers spell them."""

import numpy as np
import pytest
from hf_folders import EMBED, HEAD, assert_complains, flat, load
from hf_models import (
    assert_bit_equal,
    config_json,
    random_tensors,
    read_tensors,
    tensor_shapes,
    write_folder,
)

from lte_jax import hf
from lte_jax.hf import renaming, stored
from lte_jax.hf.families import FAMILIES

LLAMA = FAMILIES["llama"]


@pytest.fixture(autouse=True)
def forget_what_was_said():
    stored.say_once.cache_clear()


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
    assert renaming.to_expected(some, expected, LLAMA) == ({name: name for name in some}, "")
    both = [*expected, *(n.replace("model.", "language_model.") for n in expected)]
    assert renaming.to_expected(both, expected, LLAMA) == ({name: name for name in both}, "")
    assert renaming.to_expected(expected, expected, LLAMA) == (
        {name: name for name in expected},
        "",
    )


def test_bad_input_renamed_and_incomplete(tmp_path):
    """The complaint is about what is missing, not about every name."""
    tensors = {f"module.{n}": t for n, t in random_tensors(config_json("llama")).items()}
    del tensors["module.model.layers.1.mlp.up_proj.weight"]
    folder = write_folder(tmp_path, config_json("llama"), tensors)
    line = assert_complains(lambda: load(folder), "lacks model.layers.1.mlp.up_proj.weight")
    assert "more" not in line
