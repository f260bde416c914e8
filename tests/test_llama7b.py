"""LLaMA2-7B at full size, by shape: nothing of that size is ever allocated."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from lte_jax import optim, sharding, stages, training_step
from lte_jax.config import load_config
from lte_jax.model import Transformer, abstract_params
from lte_jax.sparsity import SparsityController

DENSE = 6_738_415_616  # as Meta counts it
ROUTERS, BIASES = 45_088_768, 11_008  # 32 x 4096 x 344 and 32 x 344


@pytest.fixture(autouse=True)
def promotion():
    """The gradient of JAX's own attention mixes bfloat16 and float32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("variant", ["", ":paper"])
def test_llama7b_has_the_parameters_it_should(variant):
    experiment = load_config(f"configs/llama7b.py{variant}")
    config, lte = experiment.source.scratch, experiment.lte
    assert count(abstract_params(Transformer(config))) == DENSE
    sparse = abstract_params(Transformer(config, lte))
    assert sparse["layers"]["ffn"]["gate"].shape == (32, 344, 32, 4096)
    assert math.prod(sparse["layers"]["ffn"]["router"]["kernel"].shape) == ROUTERS
    assert count(sparse) == DENSE + ROUTERS + (BIASES if lte.router_bias else 0)


@pytest.mark.parametrize("name", ["finetune", "router", "adapt"])
def test_llama7b_train_step_lowers_on_a_mesh(name):
    experiment = load_config("configs/llama7b.py")
    lte = None if name == "finetune" else experiment.lte
    model = Transformer(experiment.source.scratch, lte, dtype="bfloat16", remat=True)
    [stage] = [s for s in stages.make(experiment.stages, experiment.lte) if s.name == name]
    mesh = sharding.make_mesh(dataclasses.replace(experiment.mesh, data=1, fsdp=4, tensor=2))
    optimizer = optim.make(experiment.optim, stage.config, stage.rules)

    def start(params):
        return training_step.TrainState(
            jnp.zeros((), jnp.int32),
            params,
            optimizer.init(params),
            SparsityController.start(experiment.lte),
        )

    def placed(shapes, shardings):
        return jax.tree.map(
            lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings
        )

    params = abstract_params(model)
    state = jax.eval_shape(start, params)
    with jax.set_mesh(mesh):
        shardings = training_step.state_shardings(state, mesh)
        rows = jax.ShapeDtypeStruct((16, 2048), jnp.int32, sharding=sharding.batch_sharding(mesh))
        step = jax.jit(
            training_step.make_train_step(model, stage, optimizer),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        teacher = placed(params, shardings.params) if stage.distill_weight else None
        lowered = step.lower(placed(state, shardings), {"tokens": rows, "segments": rows}, teacher)
    experts = 344 if lte else 11008
    assert f"{experts}" in lowered.as_text()
    out_state, metrics = lowered.out_info
    assert count(out_state.params) == count(params)
    assert metrics["loss"].shape == ()
