"""Eight devices compute what one does, and really hold parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from lte_jax import objective, optim, sharding, training_step
from lte_jax.config import MeshConfig, UserError

MESHES = [
    MeshConfig(2, 2, 2),
    MeshConfig(8, 1, 1),
    MeshConfig(1, 8, 1),
    MeshConfig(1, 1, 8),
]
# Every cut dimension divides by 8: D 32, experts 8, heads 8, vocabulary 64.
CONFIG = tiny.dataclasses.replace(tiny.CONFIG, num_heads=8, num_kv_heads=8, head_dim=4)


@functools.cache  # one device is what every mesh is compared with
def loss_and_gradients(lte, stage, mesh):
    model, params = tiny.model_and_params(lte, CONFIG)
    batch, loss = tiny.batch(8), training_step.make_loss(model, stage)
    teacher = jax.tree.map(lambda p: p * 1.1, params)

    def whole(params, teacher, batch):
        counts = objective.counts_of(model, batch)
        return loss(params, teacher, batch, tiny.control(), counts)

    gradient = jax.jit(jax.value_and_grad(whole, has_aux=True))
    if mesh is None:
        return gradient(params, teacher, batch)
    with jax.set_mesh(mesh):
        place = sharding.param_shardings(params, mesh)
        params, teacher = jax.device_put(params, place), jax.device_put(teacher, place)
        return gradient(params, teacher, jax.device_put(batch, sharding.batch_sharding(mesh)))


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        (MESHES[0], "router"),
        *(
            pytest.param(mesh, name, marks=pytest.mark.slow)
            for mesh, name in [
                (MESHES[0], "finetune"),
                (MESHES[0], "adapt"),
                *((mesh, "router") for mesh in MESHES[1:]),
            ]
        ),
    ],
    ids=str,
)
def test_mesh_gives_the_loss_and_gradients_of_one_device(mesh, name):
    lte = None if name == "finetune" else tiny.LTE
    stage = tiny.stage(name, task_weight=0.5, distill_weight=0.0 if lte is None else 0.5)
    (one, _), one_grads = loss_and_gradients(lte, stage, None)
    (many, _), grads = loss_and_gradients(lte, stage, sharding.make_mesh(mesh))
    np.testing.assert_allclose(one, many, rtol=1e-5)
    size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(one_grads))
    for path, g in traverse_util.flatten_dict(one_grads, sep="/").items():
        other = traverse_util.flatten_dict(grads, sep="/")[path]
        np.testing.assert_allclose(g, other, rtol=1e-4, atol=1e-5 * size, err_msg=path)


def test_mesh_leaves_carry_their_declared_shardings():
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    model, params = tiny.model_and_params(tiny.LTE, CONFIG)
    stage = tiny.stage("router")
    optimizer = optim.make(tiny.OPTIM, stage.config, stage.rules)

    def start(params):
        return training_step.TrainState(
            jnp.zeros((), jnp.int32), params, optimizer.init(params), tiny.control()
        )

    with jax.set_mesh(mesh):
        shardings = training_step.state_shardings(jax.eval_shape(start, params), mesh)
        state = jax.jit(start, out_shardings=shardings)(params)
        step = jax.jit(
            training_step.make_train_step(model, stage, optimizer),
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        batch = jax.device_put(tiny.batch(8), sharding.batch_sharding(mesh))
        state, _ = step(state, batch, params)
    gate = state.params["layers"]["ffn"]["gate"]
    assert gate.sharding.spec == jax.sharding.PartitionSpec(None, "tensor", None, "fsdp")
    assert gate.addressable_shards[0].data.shape == (2, 4, 8, 16)
    router = state.params["layers"]["ffn"]["router"]["kernel"]
    assert router.addressable_shards[0].data.shape == (2, 16, 4)
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if jax.tree_util.keystr(path).endswith("['layers']['ffn']['gate']")
    ]
    assert len(moments) == 2  # mean and variance
    for moment in moments:
        assert moment.addressable_shards[0].data.shape == (2, 4, 8, 16)


def test_mesh_that_does_not_cover_the_devices_is_an_error():
    with pytest.raises(UserError, match="8 devices"):
        sharding.make_mesh(MeshConfig(3, 1, 1))


def test_mesh_axis_that_does_not_divide_names_the_parameter():
    _, params = tiny.model_and_params(tiny.LTE, tiny.CONFIG)  # 2 kv heads
    with pytest.raises(UserError, match=r"kv_heads=2 .*tensor=8.*mesh\.tensor"):
        sharding.param_shardings(params, sharding.make_mesh(MeshConfig(1, 1, 8)))


def test_mesh_parameter_without_a_rule_is_an_error():
    with pytest.raises(UserError, match="unheard/of"):
        sharding.param_shardings(
            {"unheard": {"of": jnp.zeros(3)}}, sharding.make_mesh(MeshConfig())
        )


@pytest.mark.parametrize(
    ("batch_size", "microbatches", "mesh", "mend"),
    [
        (8, 1, MeshConfig(), None),
        (8, 2, MeshConfig(2, 2, 2), None),
        (8, 2, MeshConfig(), None),  # four rows at a time on eight devices: slow, and right
        (3, 1, MeshConfig(1, 1, 8), None),
        (3, 1, MeshConfig(), "sizes that do are 8"),
        (12, 1, MeshConfig(), "sizes that do are 8 and 16"),
        (4, 3, MeshConfig(1, 1, 8), "sizes that do are 3 and 6"),
        (6, 4, MeshConfig(1, 2, 4), "sizes that do are 4 and 8"),
    ],
)
def test_bad_input_batch_that_cannot_be_cut(batch_size, microbatches, mesh, mend):
    made = sharding.make_mesh(mesh)
    if mend is None:
        return sharding.check_batch(batch_size, microbatches, made)
    with pytest.raises(UserError) as raised:
        sharding.check_batch(batch_size, microbatches, made)
    devices = made.shape["data"] * made.shape["fsdp"]
    for part in (f"batch_size={batch_size} ", f"{devices} devices", f"={microbatches}:", mend):
        assert part in str(raised.value)
