"""Models small enough for a test and batches for them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np

from lte_jax import stages
from lte_jax.config import (
    CheckpointConfig,
    DataConfig,
    Experiment,
    LTEConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    StageConfig,
    StagesConfig,
)
from lte_jax.model import Transformer
from lte_jax.sparsity import SparsityController

CONFIG = ModelConfig(
    vocab_size=64, d_model=32, d_ff=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_length=32,
)  # fmt: skip
LTE = LTEConfig(expert_size=8, target_sparsity=0.5)
STAGES = StagesConfig(
    finetune=StageConfig(steps=20, learning_rate=1e-3),
    router=StageConfig(steps=20, learning_rate=1e-3, router_lr_multiplier=10.0),
    adapt=StageConfig(steps=20, learning_rate=1e-3),
)


def model_and_params(lte=LTE, config=CONFIG, seed=0, **fields):
    """A random model; LTE unless `lte` is None."""
    model = Transformer(config, lte, **fields)
    params = _params(model, seed)
    return model, jax.tree.map(lambda array: array, params)  # dicts that the caller may change


@functools.cache
def _params(model, seed):
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]


def batch(rows=8, length=16, seed=0, vocab=CONFIG.vocab_size):
    """Records of two segments and some padding, as the data pipeline makes them."""
    rng = np.random.default_rng(seed)
    tokens_BL = rng.integers(0, vocab, (rows, length)).astype(np.int32)
    cut_B1 = rng.integers(3, length - 6, (rows, 1))
    place_1L = np.arange(length)[None]
    segments_BL = np.where(place_1L < cut_B1, 1, np.where(place_1L < length - 3, 2, 0))
    return {"tokens": jnp.asarray(tokens_BL), "segments": jnp.asarray(segments_BL, jnp.int32)}


def stage(name, lte=LTE, **changes):
    """One of the stages of `STAGES`, with fields changed."""
    [made] = [s for s in stages.make(STAGES, lte) if s.name == name]
    return dataclasses.replace(made, **changes)


def control(lte=LTE):
    """The control at the start."""
    return SparsityController.start(lte)


OPTIM = OptimConfig()


def experiment(folder, **changes):
    """A whole run of a few seconds, on a text that is written into `folder`; steps of two."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = folder / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} abcd " * 12}) + "\n" for i in range(64)))
    two = StageConfig(steps=2, learning_rate=1e-3)
    made = Experiment(
        source=SourceConfig(scratch=dataclasses.replace(CONFIG, vocab_size=259)),
        data=DataConfig(train=str(texts), length=16, batch_size=8, max_validation_records=8),
        lte=LTEConfig(expert_size=8, calibration_records=4),
        stages=StagesConfig(two, two, two),
        checkpoint=CheckpointConfig(every=1),
        eval_every=2,
        log_every=1,
        report=False,
        sample_tokens=4,
        sample_prompt="1 a",
    )
    return dataclasses.replace(made, **changes)


def assert_order(order_EM: np.ndarray, neurons: int, size: int) -> None:
    """Experts of `size` that have each of `neurons` once, as moefy puts them."""
    assert order_EM.shape == (neurons // size, size)
    assert order_EM.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order_EM.ravel()), np.arange(neurons))
    assert (np.diff(order_EM, axis=1) > 0).all(), "neurons ascend within an expert"
    assert (np.diff(order_EM[:, 0]) > 0).all(), "experts are in the order of their first neurons"
