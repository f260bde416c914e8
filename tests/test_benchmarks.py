"""The benchmarks run, and what they write is what the README's tables are made of."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import random_models
from tiny import model_and_params

import lte_jax
from lte_jax import config, data, sharding
from lte_jax.model import Transformer

KINDS = ("step", "validation")
SMALL = ("source.path=", "compute.dtype=float32")
ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(script, *flags):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Both benchmarks' JSON files, of models too small to mean anything."""
    folder = tmp_path_factory.mktemp("measured")
    model, params = model_and_params()
    lte_jax.save(folder / "lte", model, params)
    runs = (
        ("ffn.py", "--d-model", 64, "--d-ff", 256, "--expert-size", 32, "--layers", 2)
        + ("--dtype", "float32", "--batch", "1,2", "--sparsity", "0,0.5", "--rounds", 1),
        ("decode.py", "--model", folder / "lte", "--prompt", 8, "--new-tokens", 4, "--rounds", 1),
    )
    files = []
    for script, *flags in runs:
        files.append(folder / f"{script}.json")
        done = run(script, *flags, "--json", files[-1])
        assert done.returncode == 0, done.stderr
        assert "GB/s" in done.stdout
    return files


def test_what_skipping_gains_in_a_sentence():
    """The last line of `make demo`."""
    small = ("--d-model", 64, "--d-ff", 640, "--expert-size", 32)
    done = run("ffn.py", "--brief", *small)
    assert done.returncode == 0, done.stderr
    expected = (
        r"dense, \S+ ms with 50% of .* \(\S+ of dense\), \S+ ms with 90% of .* \(\S+ of dense\)"
    )
    assert re.search(expected, done.stdout) and done.stdout.count("\n") == 1
    assert "benchmarks/ffn.py --brief" in (ROOT / "Makefile").read_text()


def test_launches_are_counted_in_the_loop_over_layers():
    launches = runpy.run_path(str(ROOT / "benchmarks/launches.py"))
    text = """
%layers.1 (p: (s32[])) -> (s32[]) {
  %p = (s32[]) parameter(0)
  %a = f32[2,8]{1,0} custom-call(%p), custom_call_target="triton_kernel_call_ffi"
  %b = (f32[4]{0}, s32[]) fusion(%a), kind=kLoop, calls=%c
  ROOT %t = (s32[]) tuple(%b)
}

%tokens.2 (p: (s32[])) -> (s32[]) {
  %w = (s32[]) while(%p), condition=%x, body=%layers.1
  ROOT %d = s32[] copy(%w)
}

ENTRY %main (p: s32[]) -> s32[] {
  ROOT %v = (s32[]) while(%p), condition=%y, body=%tokens.2
}
"""
    assert launches["of_a_layer"](text, 2) == {launches["TYPED"]: 0.5, "fusion": 0.5}


@pytest.mark.slow
def test_launches_need_a_plugin():
    if importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("the plugin is here: a 7B would be compiled four times")
    assert (
        "no jax-cuda12-plugin: expected it in a folder of PYTHONPATH" in run("launches.py").stderr
    )


@pytest.mark.slow
def test_programs_ahead_of_time():
    """Of a small run, for the devices at hand; without others' compiler a line says what to do."""
    ahead = runpy.run_path(str(ROOT / "benchmarks/ahead.py"))
    experiment = config.load_config(str(ROOT / "configs/llama7b.py:smoke"), SMALL)
    mesh = sharding.make_mesh(experiment.mesh)
    parts = ("preparation", "steps", "ending")
    programs = [program for part in parts for program in ahead[part](experiment, mesh)]
    names = [program.name for program in programs]
    start = ["grouping", "routers, products", "routers, quantiles", "down projections"]
    stages = [f"{kind} of {s}" for s in ("finetune", "router", "adapt") for kind in KINDS]
    end = ["evaluation, dense", "export of a tensor", "evaluation, LTE"]
    assert names == [*start, *stages, *end]
    row = ahead["measured"](programs[names.index("step of router")], mesh)
    assert 0.5 < float(row["plan"]) < 2 and "all-gather" in row["collectives"]
    done = run("ahead.py", "--config=configs/llama7b.py:smoke")
    assert done.returncode == 2 and "error: --devices=h200:8: no compiler" in done.stderr


@pytest.mark.slow
def test_a_synthetic_model_is_imported_once_and_gets_experts(tmp_path):
    """A tiny one: what is said of its memory is that of JAX."""
    done = run("synthetic7b.py", "--small", f"--out={tmp_path / 'new'}")
    assert done.returncode == 0, done.stderr
    line, other = done.stdout.splitlines()
    shards = int(re.search(r"4 layers, \S+ GB in (\d+) shards, onto 8 devices", line)[1])
    assert shards >= 3 and "of that size 1.0000 are held" in line
    assert re.search(r"2 layers of 4 experts, 64 tokens: \S+ s of CPU \(\S+ s\) a layer", other)
    assert list(tmp_path.iterdir()) == []
    done = run("synthetic7b.py", f"--out={tmp_path}")
    assert done.returncode == 2 and "exists: expected a new folder" in done.stderr


@pytest.mark.slow
def test_rows(measured):
    ffn, decode = (json.loads(path.read_text())["rows"] for path in measured)
    common = {"implementation", "device", "dtype", "batch", "sparsity", "time_ms", "dense_ms"}
    common |= {"ratio_to_dense", "floor_ms"}
    assert [(r["batch"], r["routing"]) for r in ffn[::2]] == [
        (1, "uniform"), (2, "uniform"), (2, "skewed"),
    ]  # fmt: skip
    assert [r["sparsity"] for r in ffn] == [0.0, 0.5] * 3  # as asked for
    assert all(r["union_sparsity"] <= r["sparsity"] for r in ffn)
    for row in ffn + decode:
        assert common <= row.keys()
        assert row["ratio_to_dense"] == pytest.approx(row["time_ms"] / row["dense_ms"])
    assert decode[0]["ratio_to_dense"] == 1 and decode[1]["predicted_ratio"] < 1
    assert decode[1]["tokens_per_s"] == pytest.approx(1e3 / decode[1]["time_ms"])


@pytest.mark.slow
def test_gpu_rehearsed(tmp_path):
    """All that benchmarks/gpu.sh runs on a GPU runs, and it ends in a device's file."""
    done = subprocess.run(
        ["bash", "benchmarks/gpu.sh", "--rehearse", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("*.json")
    rows = {name: part["rows"] for name, part in json.loads(path.read_text()).items()}
    assert rows.keys() == {"ffn", "decode"}
    assert {(r["batch"], r["prompt"]) for r in rows["decode"]} == {(1, 8), (1, 16), (2, 8), (4, 8)}


@pytest.mark.slow
def test_peers(tmp_path):
    """Ours, and whichever peers are installed, at shapes too small to mean anything."""
    script = runpy.run_path(str(ROOT / "benchmarks/peers.py"))
    here = [
        peer
        for peer, needed in script["PEERS"].items()
        if all(importlib.util.find_spec(name) for name in needed)
    ]
    small = ("--small", "--prompt", 8, "--new-tokens", 2, "--prefill", 16, "--threads", 1)
    done = run("peers.py", *small, "--rounds", 1, "--json", tmp_path / "peers.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "peers.json").read_text())["rows"]
    formats = {"lte_jax": ["bf16"] * 4, "PyTorch": ["bf16"]}
    formats["llama.cpp"] = ["BF16", *script["QUANTISED"]]
    for program in ("lte_jax", *script["PEERS"]):
        own = [row for row in rows if row["program"] == program]
        if program in here or program == "lte_jax":
            assert [row["format"] for row in own] == formats[program]
        else:
            assert not own and f"{program} is left out: " in done.stdout
    found = {(row["program"], row["format"], row["sparsity"]): row for row in rows}
    dense = found["lte_jax", "bf16", None]
    equal = found.get(("llama.cpp", "BF16", None))
    for row in rows:
        for kind in ("decode", "prefill"):
            low, high = row[f"{kind}_spread_ms"]
            assert 0 < low <= row[f"{kind}_ms"] <= high
            if row["format"] == "bf16":
                ratio = equal and row[f"{kind}_ms"] / equal[f"{kind}_ms"]
                assert row[f"{kind}_of_equal_bits"] == (equal and pytest.approx(ratio))
        if row["sparsity"] is None and row["format"] in ("bf16", "BF16"):  # read the same weights
            assert row["floor_ms"] == pytest.approx(dense["floor_ms"], rel=0.02)
    skipped = [row["skipped"] for row in rows if row["program"] == "lte_jax"]
    floors = [row["floor_ms"] for row in rows if row["program"] == "lte_jax"]
    assert skipped == sorted(skipped) and floors == sorted(floors, reverse=True)
    assert found["lte_jax", "bf16", 0.9]["floor_ms"] < 0.9 * dense["floor_ms"]


@pytest.mark.slow
def test_peers_of_a_model(tmp_path):
    """A folder's, with tied embeddings, which are read as the head."""
    model = Transformer(dataclasses.replace(random_models.LLAMA, d_ff=1024, tie_embeddings=True))
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 1), jnp.int32))["params"]
    lte_jax.save(tmp_path / "dense", model, params)
    flags = ("--model", tmp_path / "dense", "--sparsity", 0.5, "--threads", 1)
    short = ("--prompt", 8, "--new-tokens", 2, "--prefill", 16, "--rounds", 1)
    done = run("peers.py", *flags, *short, "--json", tmp_path / "peers.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "peers.json").read_text())
    dense, half = (row for row in written["rows"] if row["program"] == "lte_jax")
    assert 0.3 < half["skipped"] < 0.7 and half["floor_ms"] < dense["floor_ms"]
    # All weights, two bytes each, and few keys and values.
    read = dense["floor_ms"] * written["bandwidth_gb_per_s"] * 1e6
    assert 1.0 <= read / (2 * sum(x.size for x in jax.tree.leaves(params))) < 1.2


def test_bad_input_peers(monkeypatch, capsys):
    script = runpy.run_path(str(ROOT / "benchmarks/peers.py"))
    for flags, match in (
        ("--formats=int3", "--formats=int3: valid are bf16, int8, int4"),
        ("--peers=ollama", "--peers=ollama: valid are llama.cpp, PyTorch"),
        ("--threads=1000", "cores: expected no more"),
    ):
        monkeypatch.setattr(sys, "argv", ["peers.py", flags])
        with pytest.raises(SystemExit):
            script["main"]()
        assert match in capsys.readouterr().err


@pytest.mark.slow
def test_report(measured, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra `plot`) for the figure")
    results, readme = tmp_path / "results", tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks: begin -->old<!-- benchmarks: end -->\nafter\n")
    flags = ("--results", results, "--figure", tmp_path / "kernels.png")
    done = run("report.py", *flags, "--merge", *measured, "--readme", readme)
    assert done.returncode == 0, done.stderr
    [path] = results.glob("*.json")
    assert json.loads(path.read_text()).keys() == {"ffn", "decode"}
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| type | batch |") == text.count("| batch | prompt |") == 1
    assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_the_tables_here_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script = runpy.run_path(str(ROOT / "benchmarks/report.py"))
    results, summary = script["RESULTS"], script["summary"]
    whole = script["LEGEND"] + summary(results, whole=True)
    assert (results / "README.md").read_text() == whole
    assert summary(results, whole=False) in (ROOT / "README.md").read_text()


def test_bad_input_to_the_report(tmp_path):
    (tmp_path / "other.json").write_text('{"rows": 3}')
    for name, match in (("other.json", "not of ffn.py or decode.py"), ("absent.json", "absent")):
        done = run("report.py", "--results", tmp_path / "results", "--merge", tmp_path / name)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and match in done.stderr
        assert not (tmp_path / "results").exists()


@pytest.mark.slow
@pytest.mark.long
def test_a_row_of_tinystories(shared, tmp_path, monkeypatch):
    """Texts by their hub id from the mirror, the model from its folder."""
    (tmp_path / "mirror/roneneldan").mkdir(parents=True)
    (tmp_path / "mirror/roneneldan/TinyStories").symlink_to(shared / "data/tinystories")
    monkeypatch.setenv("LTE_JAX_MIRROR", str(tmp_path / "mirror"))
    script = runpy.run_path(str(ROOT / "benchmarks/tinystories.py"))
    script["measure"].__globals__["STORIES"] = 27  # not all of them
    wanted = [row for row in script["runs"](4, 2, False) if row.model == "stories260k"]
    [frozen] = [row for row in wanted if row.method == "ridge, frozen"]  # of one stage
    row = script["result"](frozen, shared / "models", tmp_path)
    assert row["target"] == 0.75 and 0.5 < row["sparsity"] < 0.9
    assert 4.1 < row["perplexity"] < 100  # 4.18 when dense
    assert f"| 4 | 75% | {row['sparsity']:.1%} |" in script["table"]([row, row | {"target": None}])


@pytest.mark.parametrize("name", ["tinystories.py", "thousand.py"])
def test_bad_input_models(name, tmp_path):
    done = run(name, "--models", tmp_path)
    assert done.returncode == 2
    assert f"{tmp_path} has no babyllama/config.json: name the folder" in done.stderr
    assert done.stderr.count("\n") == 1


def test_bad_input_texts_are_found_before_the_first_run(tmp_path, monkeypatch):
    for name in ("babyllama", "stories260k"):
        lte_jax.save(tmp_path / name, *model_and_params(lte=None))
        data.byte_tokenizer().save_pretrained(tmp_path / name)
    mirror = tmp_path / "mirror/roneneldan/TinyStories"
    mirror.mkdir(parents=True)
    (mirror / "train.jsonl").write_text('{"text": "a"}\n')
    flags = ("--models", tmp_path, "--mirror", tmp_path / "mirror", "--out", tmp_path / "out")
    done = run("tinystories.py", *flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert "TinyStories: is a folder without validation.jsonl" in done.stderr
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run("tinystories.py", "--models", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2 and "set LTE_JAX_MIRROR to a folder" in done.stderr


def test_the_summary_of_glue_is_against_the_control_of_the_same_seed():
    script = runpy.run_path(str(ROOT / "benchmarks/glue.py"))

    def row(seed, target, accuracy, start=False):
        one = {"task": "sst2", "seed": seed, "target": target, "start": start}
        return one | {"metrics": {"accuracy": accuracy}, "sparsity": target or 0.0}

    rows = [row(0, None, 89, True), row(1, None, 88, True), row(1, 0.9, 88.5), row(0, 0.9, 90)]
    rows += [row(0, None, 91), row(1, None, 90.5)]
    found = {entry["method"]: entry for entry in script["summary"](rows)}
    assert found["LTE, 90%"]["gap"] == pytest.approx(-1.5)  # -1 and -2
    assert found["LTE, 90%"]["gap_error"] == pytest.approx(0.5)
    assert found["dense control"]["value"] == pytest.approx(90.75)
    assert "| sst2 | LTE, 90% | 90.0% | accuracy | 89.25 ± 0.75 | -1.50 ± 0.50 |" in script[
        "table"
    ](script["summary"](rows))
