"""What train.py says to a run that cannot work: one line, the culprit and the mend, code 2."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import data, sharding, trainer, writers
from lte_jax.config import (
    DataConfig,
    Experiment,
    LTEConfig,
    MeshConfig,
    SourceConfig,
    StageConfig,
    StagesConfig,
    UserError,
    load_config,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": "abcd " * 40}) + "\n" for _ in range(40)))
    return str(path)


@pytest.fixture
def experiment(texts):
    """A run that would work."""
    scratch = dataclasses.replace(tiny.CONFIG, vocab_size=259)
    one = StageConfig(steps=1)
    return Experiment(
        source=SourceConfig(scratch=scratch),
        data=DataConfig(train=texts, length=16, batch_size=8, max_validation_records=8),
        lte=LTEConfig(expert_size=8, calibration_records=4),
        stages=StagesConfig(one, one, one),
        sample_tokens=0,
    )


def change(experiment, **parts):
    """The experiment with fields of its parts changed: data={"length": 64}."""
    made = {k: dataclasses.replace(getattr(experiment, k), **v) for k, v in parts.items()}
    return dataclasses.replace(experiment, **made)


def refused(experiment, workdir, *words):
    with pytest.raises(UserError) as caught:
        lte_jax.train(experiment, workdir)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_bad_input_sequence_longer_than_the_context(experiment, tmp_path):
    refused(change(experiment, data={"length": 64}), tmp_path / "run", "64", "32")


def test_bad_input_no_training_text(experiment, tmp_path):
    refused(change(experiment, data={"train": ""}), tmp_path / "run", "data.train is empty")


@pytest.mark.slow
def test_the_largest_seed_works(experiment, tmp_path):
    """The stage's name is mixed in, and the data loader takes 32 bits."""
    few = change(experiment, stages={"router": StageConfig(), "finetune": StageConfig(steps=1)})
    lte_jax.train(dataclasses.replace(few, seed=2**31 - 1, report=False), tmp_path / "run")


def test_bad_input_nothing_to_start_from(experiment, tmp_path):
    none = change(experiment, stages={"finetune": StageConfig()})
    refused(none, tmp_path / "run", "source.path", "finetune.steps")


def test_bad_input_source_that_is_nowhere(experiment, tmp_path):
    refused(change(experiment, source={"path": "no/such-model"}), tmp_path / "run", "no/such-model")


def test_bad_input_source_that_is_sparse_already(experiment, tmp_path):
    model, params = tiny.model_and_params(config=experiment.source.scratch)
    lte_jax.save(tmp_path / "lte", model, params)
    data.byte_tokenizer().save_pretrained(tmp_path / "lte")
    sparse = change(experiment, source={"path": str(tmp_path / "lte")})
    refused(sparse, tmp_path / "run", "LTE model", "expected the dense model")
    assert not (tmp_path / "run" / "dense").exists()


def test_bad_input_expert_size_that_does_not_divide(experiment, tmp_path):
    bad = change(experiment, lte={"expert_size": 24})
    refused(bad, tmp_path / "run", "24", "64", "16, 32")


def test_bad_input_mesh_that_does_not_fit_the_devices(experiment, tmp_path):
    bad = dataclasses.replace(experiment, mesh=MeshConfig(3, 1, 1))
    refused(bad, tmp_path / "run", "8 devices", "data=3")


def test_bad_input_workdir_of_another_run(experiment, tmp_path):
    (tmp_path / "run" / "checkpoints" / "finetune" / "1").mkdir(parents=True)
    (tmp_path / "run" / "experiment.json").write_text(json.dumps(dataclasses.asdict(experiment)))
    other = change(experiment, lte={"target_sparsity": 0.7})
    refused(other, tmp_path / "run", "config.lte.target_sparsity", "new workdir")


def test_bad_input_workdir_that_cannot_be_made(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    refused(experiment, tmp_path / "file" / "run", "file", "name another")


def test_bad_input_more_bytes_than_the_vocabulary(experiment, tmp_path):
    refused(change(experiment, source={"scratch": tiny.CONFIG}), tmp_path / "run", "259", "64")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lte.target_sparsity=0", ["target_sparsity", "between 0 and 1"]),
        ("lte.target_sparsity=1.0", ["target_sparsity", "between 0 and 1"]),
        ("lte.target_sparsty=0.5", ["target_sparsty", "did you mean config.lte.target_sparsity"]),
        ("stages.router.learning_rate=-1", ["learning_rate", "zero or more"]),
        ("optim.microbatches=0", ["microbatches", "positive"]),
        ("lte.grouping=kmean", ["grouping", "kmeans"]),
    ],
)
def test_bad_input_on_the_command_line_ends_with_code_2(
    override, words, tmp_path, monkeypatch, capsys
):
    command = ["train.py", f"--config={ROOT / 'configs/demo.py'}:smoke"]
    command += [f"--workdir={tmp_path / 'run'}", f"--config.{override}"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1 and said.startswith("error: ")
    for word in words:
        assert word in said
    assert not (tmp_path / "run").exists()


def test_bad_input_weights_that_are_not_finite_stop_and_save_the_batch(experiment, tmp_path):
    model, params = tiny.model_and_params()
    params = jax.tree.map(lambda p: p.at[..., 0].set(jnp.nan), params)
    rows = data.Records(*(np.asarray(tiny.batch(16)[k]) for k in ("tokens", "segments")))
    stage = tiny.stage("adapt", distill_weight=0.0, task_weight=1.0)
    with pytest.raises(UserError) as caught:
        trainer.fit(
            model, stage, params, tiny.control(), (rows, rows), experiment, tmp_path / "ck",
            writers.MultiWriter(()), mesh=sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1]),
        )  # fmt: skip
    message = str(caught.value)
    assert "'adapt' step 1" in message and "loss=nan" in message and "learning_rate" in message
    with np.load(tmp_path / "ck" / "nonfinite-1.npz") as saved:
        assert saved["tokens"].shape == (8, 16) and np.isnan(saved["metric_loss"])
    assert not list((tmp_path / "ck").glob("[0-9]*"))  # no checkpoint of a broken state


def test_configs_that_differ_in_presets_are_both_loadable():
    assert load_config("configs/llama7b.py").lte.grouping == "coactivation"
    assert load_config("configs/llama7b.py:paper").lte.grouping == "kmeans"
