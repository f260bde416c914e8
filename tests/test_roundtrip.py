"""Round trip: what is imported and exported again is equal bit for bit, dense and LTE."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hf_folders import LTE, as_lte, flat
from hf_models import (
    CASES,
    FAMILY_CASES,
    SHARED_MODELS,
    assert_bit_equal,
    config_json,
    random_tensors,
    read_tensors,
    reference,
    write_folder,
)

import lte_jax
from lte_jax import hf, sharding
from lte_jax.config import MeshConfig
from lte_jax.model import Transformer, abstract_params


def import_export(folder, new, **options):
    config, lte = hf.read_config(folder)
    hf.save(new, config, lte, hf.load_params(folder, config, lte), **options)
    return new


@pytest.mark.parametrize("case", CASES)
def test_roundtrip_of_feature(case, tmp_path):
    folder = write_folder(tmp_path / "old", config_json(case))
    new = import_export(folder, tmp_path / "new", source=folder)
    assert_bit_equal(read_tensors(new), read_tensors(folder))
    assert (new / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_roundtrip_without_source(case, tmp_path):
    """The config.json is then our own; it says the same model, to us and to transformers."""
    folder = write_folder(tmp_path / "old", config_json(case))
    new = import_export(folder, tmp_path / "new")
    assert_bit_equal(read_tensors(new), read_tensors(folder))
    assert hf.read_config(new) == hf.read_config(folder)
    transformers = pytest.importorskip("transformers")
    theirs, mine = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (folder, new))
    for said in (theirs, mine):  # what can be said in two ways
        if "num_attention_heads" in said:
            said["head_dim"] = said.get("head_dim") or 64 // said["num_attention_heads"]
        if "n_embd" in said:
            said["n_inner"] = said["n_inner"] or 4 * said["n_embd"]
        for name in ("hidden_act", "activation_function"):
            gemma = said["model_type"] == "gemma"  # whose "gelu" older transformers left as it is
            if said.get(name) == "gelu_new" or gemma and said.get(name) == "gelu":
                said[name] = "gelu_pytorch_tanh"
        said["id2label"] = len(said["id2label"])  # the names of labels are not ours
        del said["label2id"], said["architectures"], said["_name_or_path"]
        said.pop("max_window_layers", None)  # layer_types says it
        for name in ("type", "attention_factor", "mscale", "mscale_all_dim"):
            said.get("rope_parameters", {}).pop(name, None)
    assert mine == theirs


@pytest.mark.parametrize("case", CASES)
def test_roundtrip_tree_is_that_of_the_model(case, tmp_path):
    folder = write_folder(tmp_path / "old", config_json(case))
    config, _ = hf.read_config(folder)
    expected = abstract_params(Transformer(config))
    params = hf.load_params(folder, config, None)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_roundtrip_of_stored_dtype(dtype, tmp_path):
    raw = config_json("llama", torch_dtype=dtype)
    folder = write_folder(tmp_path / "old", raw, dtype=dtype)
    for source in (None, folder):
        new = import_export(folder, tmp_path / "new", source=source)
        assert_bit_equal(read_tensors(new), read_tensors(folder))


def test_roundtrip_of_mixed_dtypes(tmp_path):
    """Norms in float32 beside weights in bfloat16, and a config.json that says neither."""
    tensors = random_tensors(config_json("llama"))
    half = {n: t if "norm" in n else t.astype(ml_dtypes.bfloat16) for n, t in tensors.items()}
    folder = write_folder(tmp_path / "old", config_json("llama", torch_dtype="float16"))
    safetensors.numpy.save_file(half, folder / "model.safetensors", {"format": "pt"})
    new = import_export(folder, tmp_path / "new", source=folder)
    assert_bit_equal(read_tensors(new), half)


def test_roundtrip_through_float32_masters(tmp_path):
    """bfloat16 weights loaded as float32: saved as they are held, or as the source has them."""
    raw = config_json("llama", torch_dtype="bfloat16")
    folder = write_folder(tmp_path / "old", raw, dtype="bfloat16")
    config, _ = hf.read_config(folder)
    params = hf.load_params(folder, config, None, dtype="float32")
    wide = {name: t.astype(np.float32) for name, t in read_tensors(folder).items()}
    for source, dtype in ((None, None), (folder, None), (folder, "float32")):
        hf.save(tmp_path / "wide", config, None, params, source=source, dtype=dtype)
        assert hf.read_config(tmp_path / "wide")[0].dtype == "float32"
        assert_bit_equal(read_tensors(tmp_path / "wide"), wide)
    for source, dtype in ((None, "bfloat16"), (folder, "source")):
        hf.save(tmp_path / "new", config, None, params, source=source, dtype=dtype)
        assert hf.read_config(tmp_path / "new")[0].dtype == "bfloat16"
        assert_bit_equal(read_tensors(tmp_path / "new"), read_tensors(folder))


def test_roundtrip_of_trained_weights(tmp_path):
    """What training moved by less than bfloat16 can tell is kept, and so are the logits."""
    raw = config_json("llama", torch_dtype="bfloat16")
    folder = write_folder(tmp_path / "old", raw, dtype="bfloat16")
    model, params = lte_jax.load(folder, "float32")
    trained = jax.tree.map(lambda p: p * jnp.float32(1.001), params)
    lte_jax.save(tmp_path / "new", model, trained, source=folder)
    again, loaded = lte_jax.load(tmp_path / "new")
    assert_bit_equal(flat(loaded), flat(trained))
    tokens = jnp.arange(24, dtype=jnp.int32)[None]
    before, after = (
        model.apply({"params": trained}, tokens),
        again.apply({"params": loaded}, tokens),
    )
    np.testing.assert_allclose(after.logits, before.logits, rtol=0, atol=1e-5)
    lte_jax.save(tmp_path / "half", model, trained, dtype="float16")
    assert hf.read_config(tmp_path / "half")[0].dtype == "float16"


def test_roundtrip_of_shards(tmp_path):
    folder = write_folder(tmp_path / "old", config_json("llama"), shards=3)
    new = import_export(folder, tmp_path / "new", source=folder, max_shard_bytes=100_000)
    index = json.loads((new / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in new.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert all((new / file).stat().st_size < 110_000 for file in files)
    assert_bit_equal(read_tensors(new), read_tensors(folder))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(new).values())
    again = import_export(new, tmp_path / "again")
    assert_bit_equal(read_tensors(again), read_tensors(folder))


def test_roundtrip_drops_what_repeats(tmp_path):
    """A stored copy of a tied head, and rotary frequencies: known, checked, not exported."""
    raw = config_json("tied")
    tensors = random_tensors(raw)
    more = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
    }
    folder = write_folder(tmp_path / "old", raw, tensors | more)
    new = import_export(folder, tmp_path / "new", source=folder)
    assert_bit_equal(read_tensors(new), tensors)


@pytest.mark.parametrize("name", SHARED_MODELS)
def test_roundtrip_of_real_model(name, shared, tmp_path):
    folder = shared / "models" / name
    new = import_export(folder, tmp_path / "new", source=folder)
    assert_bit_equal(read_tensors(new), read_tensors(folder))
    expected = {p.name for p in folder.iterdir()} | {"manifest.json"}
    assert {p.name for p in new.iterdir()} == expected
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            assert (new / file.name).read_bytes() == file.read_bytes()
    tokens = hf.load_tokenizer(folder)("Once upon a time").input_ids
    assert hf.load_tokenizer(new)("Once upon a time").input_ids == tokens


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("router_bias", [True, False])
def test_roundtrip_of_lte_folder(with_source, router_bias, tmp_path):
    lte = dataclasses.replace(LTE, router_bias=router_bias)
    folder = write_folder(tmp_path / "dense", config_json("grouped_query"))
    config, params, order = as_lte(folder, lte)
    new = tmp_path / "lte"
    hf.save(new, config, lte, params, source=folder if with_source else None, expert_order=order)
    assert hf.read_config(new) == (config, lte)
    loaded = hf.load_params(new, config, lte)
    assert_bit_equal(flat(loaded), flat(params))
    np.testing.assert_array_equal(hf.load_expert_order(new), order)

    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 97, (2, 16)), jnp.int32)
    apply = jax.jit(Transformer(config, lte).apply)
    before, after = (apply({"params": p}, tokens) for p in (params, loaded))
    assert 0.05 < before.sparsity < 0.95
    assert np.asarray(before.logits).tobytes() == np.asarray(after.logits).tobytes()

    again = import_export(new, tmp_path / "again", source=new)
    assert_bit_equal(read_tensors(again), read_tensors(new))


def test_roundtrip_layout_of_lte_folder(tmp_path):
    """As documented: row e*M + m is neuron m of expert e, in all three matrices and routers."""
    folder = write_folder(tmp_path / "dense", config_json("llama"))
    config, params, order = as_lte(folder)
    hf.save(tmp_path / "lte", config, LTE, params, expert_order=order)
    dense, experts = read_tensors(folder), read_tensors(tmp_path / "lte")
    for i in range(config.num_layers):
        rows, mlp = order[i].reshape(-1), f"model.layers.{i}.mlp"
        for name in ("gate_proj", "up_proj"):
            mine, theirs = experts[f"{mlp}.{name}.weight"], dense[f"{mlp}.{name}.weight"]
            np.testing.assert_array_equal(mine, theirs[rows])
        mine, theirs = experts[f"{mlp}.down_proj.weight"], dense[f"{mlp}.down_proj.weight"]
        np.testing.assert_array_equal(mine, theirs[:, rows])
        router = params["layers"]["ffn"]["router"]
        np.testing.assert_array_equal(experts[f"{mlp}.router.weight"], router["kernel"][i].T)
        np.testing.assert_array_equal(experts[f"{mlp}.router.bias"], router["bias"][i])


def test_an_lte_folder_of_an_earlier_version_loads(tmp_path):
    """Its settings had a seed of their own."""
    dense = write_folder(tmp_path / "dense", config_json("llama"))
    config, params, order_NEM = as_lte(dense)
    hf.save(tmp_path / "lte", config, LTE, params, dense, order_NEM)
    file = tmp_path / "lte/config.json"
    values = json.loads(file.read_text())
    values["lte"] = {k: v for k, v in values["lte"].items() if k != "calibration_records"} | {
        "seed": 3
    }
    file.write_text(json.dumps(values))
    (tmp_path / "lte/manifest.json").unlink()
    assert hf.read_config(tmp_path / "lte")[1] == dataclasses.replace(LTE, calibration_records=None)


def test_roundtrip_saves_what_was_trained_as_it_is(tmp_path):
    """Loaded in float32 and trained: not rounded again to the type it was stored in before."""
    raw = config_json("llama", torch_dtype="bfloat16")
    folder = write_folder(tmp_path / "source", raw, dtype="bfloat16")
    model, params = lte_jax.load(folder, "float32")
    trained = jax.tree.map(lambda leaf: leaf * 1.001, params)
    for source in (None, folder):
        lte_jax.save(tmp_path / "new", model, trained, source=source)
        again, loaded = lte_jax.load(tmp_path / "new")
        assert again.config.dtype == again.dtype == "float32"
        assert_bit_equal(flat(loaded), flat(trained))
    lte_jax.save(tmp_path / "new", model, trained, source=folder, dtype="source")
    assert {leaf.dtype.name for leaf in flat(lte_jax.load(tmp_path / "new")[1]).values()} == {
        "bfloat16"
    }


def test_roundtrip_routers_stay_float32(tmp_path):
    raw = config_json("llama", torch_dtype="bfloat16")
    folder = write_folder(tmp_path / "dense", raw, dtype="bfloat16")
    config, params, _ = as_lte(folder)
    hf.save(tmp_path / "lte", config, LTE, params, source=folder, dtype="float16")
    loaded = hf.load_params(tmp_path / "lte", config, LTE)["layers"]["ffn"]
    assert loaded["up"].dtype == "float16" and loaded["router"]["kernel"].dtype == "float32"


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_roundtrip_lte_folder_is_a_dense_model_to_transformers(case, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    folder = write_folder(tmp_path / "dense", config_json(case))
    config, params, order = as_lte(folder)
    hf.save(tmp_path / "lte", config, LTE, params, source=folder, expert_order=order)
    tokens = torch.arange(3, 43)[None]
    with torch.no_grad():
        dense, experts = (reference(f)(tokens) for f in (folder, tmp_path / "lte"))
    torch.testing.assert_close(experts[0], dense[0], rtol=0, atol=1e-4)


def test_roundtrip_replaces_an_older_model(tmp_path):
    """Also the very folder that the model was read from."""
    folder = write_folder(tmp_path / "model", config_json("llama"), shards=2)
    config, params, _ = as_lte(folder)
    hf.save(folder, config, LTE, params, source=folder)
    assert hf.read_config(folder) == (config, LTE)
    held = sorted(p.name for p in folder.iterdir())
    assert held == ["config.json", "manifest.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize("experts", [False, True])
def test_roundtrip_onto_a_mesh(mesh, experts, tmp_path):
    """Each device gets its part, and the parts make up the array."""
    raw = config_json("llama", vocab_size=96)
    folder = write_folder(tmp_path / "dense", raw)
    config, lte = hf.read_config(folder)
    if experts:
        config, params, _ = as_lte(folder)
        folder, lte = tmp_path / "lte", LTE
        hf.save(folder, config, LTE, params)
    devices = jax.devices()[: np.prod(mesh)]
    shardings = sharding.param_shardings(
        abstract_params(Transformer(config, lte)), sharding.make_mesh(MeshConfig(*mesh), devices)
    )
    whole = hf.load_params(folder, config, lte)
    parts = hf.load_params(folder, config, lte, shardings=shardings)
    assert_bit_equal(flat(parts), flat(whole))
    jax.tree.map(lambda leaf, s: leaf.sharding == s or pytest.fail(str(s)), parts, shardings)
    hf.save(tmp_path / "again", config, lte, parts)
    assert_bit_equal(read_tensors(tmp_path / "again"), read_tensors(folder))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts memory on Linux only")
def test_roundtrip_needs_no_second_copy(tmp_path):
    """Import fits into the result's size and a little more, and not into half of it."""
    raw = config_json("llama", vocab_size=60_000, hidden_size=256, num_hidden_layers=1)
    folder = write_folder(tmp_path / "big", raw, dtype="bfloat16")
    size = 4 * sum(tensor.size for tensor in read_tensors(folder).values())
    assert size > 2 * 4 * 60_000 * 256  # embedding and head: a copy of either exceeds the rest
    program = f"""
import resource, sys
import jax
from lte_jax import hf
config, lte = hf.read_config({str(folder)!r})
jax.block_until_ready(jax.device_put(0))
kilobytes = int([l for l in open("/proc/self/status") if l.startswith("VmData")][0].split()[1])
limit = kilobytes * 1024 + int({size} * float(sys.argv[1])) + (40 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
jax.block_until_ready(hf.load_params({str(folder)!r}, config, lte, dtype="float32"))
"""

    def loads_within(share):
        command = [sys.executable, "-c", program, share]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    fits = loads_within("1.0")
    assert fits.returncode == 0, fits.stderr[-2000:]
    assert loads_within("0.5").returncode != 0
