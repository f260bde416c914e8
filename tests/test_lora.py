"""Adapters: what they start as, what they learn, and the plain model that comes of them."""

import dataclasses
import functools
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models
import tiny
from flax import traverse_util

import lte_jax
from lte_jax import data, hf, lora, objective, optim, plan, sharding, trainer, training_step
from lte_jax.config import (
    ComputeConfig,
    Experiment,
    LoraConfig,
    LTEConfig,
    MeshConfig,
    OptimConfig,
    SourceConfig,
)
from lte_jax.errors import UserError
from lte_jax.params import ADAPTERS, BY_PATH, is_router

LORA = LoraConfig(rank=4, alpha=8.0)
EXPERIMENT = Experiment(source=SourceConfig("here"), lora=LORA)
# Every cut dimension divides by 2; heads, kv heads and experts differ.
CONFIG = dataclasses.replace(tiny.CONFIG, num_heads=8, head_dim=4)


def flat(tree):
    return traverse_util.flatten_dict(dict(tree), sep="/")


def adapted(lte=tiny.LTE, config=CONFIG, learned=True):
    """A random model, its parameters, and those frozen and trained; `learned`: b is not zero."""
    net, params = tiny.model_and_params(lte, config)
    base, trained = lora.start(config, lte, params, EXPERIMENT)
    if learned:
        values = flat(trained)
        for i, path in enumerate(values):
            if path.endswith("_b"):
                key = jax.random.key(i)
                values[path] = 0.1 * jax.random.normal(key, values[path].shape)
        trained = traverse_util.unflatten_dict(values, sep="/")
    return net, params, base, trained


def loss_of(net, stage, teacher, batch):
    """The loss of a stage as a function of all parameters."""
    loss, counts = training_step.make_loss(net, stage), objective.counts_of(net, batch)
    return lambda params: loss(params, teacher, batch, tiny.control(), counts)[0]


def summed(tree):
    """`lora.merged`, made of arrays."""
    whole = lambda x: np.stack([x[i] for i in range(x.shape[0])])  # noqa: E731
    return {
        path: whole(x) if isinstance(x, lora.Merged) else np.asarray(x)
        for path, x in flat(tree).items()
    }


# ------------------------------------------------------------------------------------ what there is


def test_what_is_frozen_has_no_gradient_and_no_state():
    """Matrices of layers, embedding and head; adapters, routers and vectors are trained."""
    net, params, base, trained = adapted(learned=False)
    own, frozen = flat(trained), {"embed/embedding", "lm_head/kernel"}
    matrices = {path for path in flat(params) if re.search("attn/./kernel|ffn/[gud]", path)}
    assert len(matrices) == 7 and matrices <= ADAPTERS.keys()
    adapters = {f"{path}_{part}" for path in matrices for part in "ab"}
    assert own.keys() == (flat(params).keys() | adapters) - matrices - frozen
    assert flat(base.params).keys() == {path for path in flat(params) if not is_router(path)}
    for path, array in (flat(base.params) | own).items():
        if path in flat(params):
            assert array is flat(params)[path], path  # nothing is copied
    stage = tiny.stage("router")
    state = optim.make(OptimConfig(), stage.config, stage.rules).init(trained)
    sizes = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
    assert sizes == 2 * sum(x.size for x in own.values())


@pytest.mark.parametrize(("path", "a", "b"), [
    ("layers/attn/q/kernel", (2, 32, 4), (2, 4, 8, 4)),
    ("layers/attn/o/kernel", (2, 8, 4, 4), (2, 4, 32)),
    ("layers/ffn/gate", (2, 32, 4), (2, 4, 8, 8)),
    ("layers/ffn/down", (2, 8, 8, 4), (2, 4, 32)),
])  # fmt: skip
def test_an_adapter_leads_from_inputs_to_outputs(path, a, b):
    *_, trained = adapted(learned=False)
    made_a, made_b = (flat(trained)[f"{path}_{part}"] for part in "ab")
    assert (made_a.shape, made_b.shape) == (a, b)
    assert not made_b.any()
    inputs = np.prod(a[1:-1])
    assert float(made_a.std()) == pytest.approx(inputs**-0.5, rel=0.2)


@pytest.mark.parametrize("name", ["finetune", "router", "adapt"])
def test_the_first_loss_is_that_of_the_model_itself(name):
    lte = None if name == "finetune" else tiny.LTE
    net, params, base, trained = adapted(lte, learned=False)
    stage = tiny.stage(name, task_weight=1.0)
    loss = jax.jit(loss_of(net, stage, params, tiny.batch(4)))
    assert loss(lora.whole(base, trained)) == loss(params)


# ---------------------------------------------------------------------------------- what they learn


def test_gradients_are_those_of_the_matrices_through_the_product():
    """Of W + s a b: s dW b' and s a' dW."""
    net, _, base, trained = adapted()
    params = traverse_util.unflatten_dict(summed(lora.merged(base, trained)), sep="/")
    stage = tiny.stage("router", task_weight=1.0, distill_weight=0.0)
    loss = loss_of(net, stage, None, tiny.batch(4))
    of_whole = flat(jax.jit(jax.grad(loss))(params))
    of_own = flat(jax.jit(jax.grad(lambda own: loss(lora.whole(base, own))))(trained))
    for path, (a, b) in ADAPTERS.items():
        letters = [row.letters for row in (BY_PATH[path], a, b)]
        own = [np.asarray(flat(trained)[row.path]) for row in (a, b)]
        for row, other, factor in ((a, letters[2], own[1]), (b, letters[1], own[0])):
            product = np.einsum(f"{letters[0]},{other}->{row.letters}", of_whole[path], factor)
            size = np.abs(product).max()
            assert size > 0, row.path
            np.testing.assert_allclose(
                of_own[row.path], 2.0 * product, rtol=1e-4, atol=1e-5 * size, err_msg=row.path
            )
    for path in of_own.keys() & of_whole.keys():  # routers and vectors
        size = np.abs(of_whole[path]).max()
        np.testing.assert_allclose(of_own[path], of_whole[path], rtol=1e-4, atol=1e-5 * size)


def test_a_head_that_is_frozen_has_no_gradient_in_chunks_either():
    """The product with its gradient is in no program."""
    net, params, base, trained = adapted()
    net = net.clone(head_tokens=8)
    loss = loss_of(net, tiny.stage("router"), params, tiny.batch(4))

    def made(loss, params):
        program = str(jax.make_jaxpr(jax.grad(loss))(params))
        return re.findall(r"f32\[(?:32,64|64,32)\] = dot_general", program)  # D and V

    assert made(loss, params)
    assert not made(lambda own: loss(lora.whole(base, own)), trained)


@functools.cache  # one device is what a mesh is compared with
def step_on(mesh, name, microbatches, optimizer):
    """Metrics, and parameters after a step, of a mesh; None: of one device."""
    lte = None if name == "finetune" else tiny.LTE
    net, params, base, trained = adapted(lte)
    stage = tiny.stage(name, task_weight=0.5, distill_weight=0.5 if lte else 0.0)
    how = OptimConfig(name=optimizer, eps=1e-3)  # below it a gradient is rounding
    made = optim.make(how, stage.config, stage.rules)
    step = training_step.make_train_step(net, stage, made, microbatches)
    teacher = jax.tree.map(lambda x: 1.1 * x, base.params) if lte else None
    start = lambda own: training_step.TrainState(  # noqa: E731
        jnp.zeros((), jnp.int32), own, made.init(own), tiny.control()
    )
    if mesh is None:
        return jax.jit(step)(start(trained), tiny.batch(8), teacher, base)
    with jax.set_mesh(mesh):
        places = sharding.param_shardings(base.params, mesh)
        base = base.replace(params=jax.device_put(base.params, places))
        teacher = jax.device_put(teacher, places) if lte else None
        shardings = training_step.state_shardings(jax.eval_shape(start, trained), mesh)
        state = jax.jit(start, out_shardings=shardings)(trained)
        batch = jax.device_put(tiny.batch(8), sharding.batch_sharding(mesh))
        outputs = (shardings, sharding.replicated(mesh))
        return jax.jit(step, out_shardings=outputs)(state, batch, teacher, base)


@pytest.mark.parametrize(("name", "microbatches", "optimizer"), [
    ("router", 2, "adamw"),
    pytest.param("finetune", 1, "adamw", marks=pytest.mark.slow),
    pytest.param("adapt", 1, "muon", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_mesh_takes_the_step_of_one_device(name, microbatches, optimizer):
    one, seen = step_on(None, name, microbatches, optimizer)
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    many, others = step_on(mesh, name, microbatches, optimizer)
    for metric in ("loss", "objective", "grad_norm"):
        np.testing.assert_allclose(seen[metric], others[metric], rtol=1e-5, err_msg=metric)
    before = flat(adapted(None if name == "finetune" else tiny.LTE)[3])
    for path, array in flat(many.params).items():
        expected, frozen = flat(one.params)[path], name == "adapt" and is_router(path)
        assert np.array_equal(before[path], array) == frozen, path
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5, err_msg=path)
    if name != "finetune":
        gate = flat(many.params)["layers/ffn/gate_b"]
        assert gate.sharding.spec == jax.sharding.PartitionSpec(None, None, "tensor", None)
        assert gate.addressable_shards[0].data.shape == (2, 4, 4, 8)
        a = flat(many.params)["layers/ffn/gate_a"]
        assert a.addressable_shards[0].data.shape == (2, 16, 4)


# ---------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("variant", [
    "llama", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sliding", "biases"))
])  # fmt: skip
def test_the_written_model_says_what_model_and_adapters_say(variant, tmp_path):
    net, params = random_models.make(variant)
    base, trained = lora.start(net.config, net.lte, params, EXPERIMENT)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    move = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape)  # noqa: E731
    trained = jax.tree.map(move, trained)
    tokens = tiny.batch(2, vocab=net.config.vocab_size)["tokens"]
    run = jax.jit(lambda params: net.apply({"params": params}, tokens))
    expected = run(lora.whole(base, trained))
    plain = lora.merged(base, trained)
    read = traverse_util.unflatten_dict(summed(plain), sep="/")
    if variant == "llama":  # others than the family has
        hf.save(tmp_path / "lte", net.config, net.lte, plain, dtype="float32")
        same, loaded = lte_jax.load(tmp_path / "lte")
        assert same == net
        jax.tree.map(np.testing.assert_array_equal, loaded, read)
    np.testing.assert_allclose(run(read).logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert np.abs(run(params).logits - expected.logits).max() > 0.1
    np.testing.assert_array_equal(run(read).active, expected.active)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dense model in a folder, in bfloat16."""
    folder = tmp_path_factory.mktemp("source") / "dense"
    config = dataclasses.replace(tiny.CONFIG, vocab_size=259)
    how = {"tokenizer": data.byte_tokenizer(), "dtype": "bfloat16"}
    hf.save(folder, config, None, tiny.model_and_params(None, config)[1], **how)
    return folder


@pytest.fixture(scope="module")
def experiment(source, tmp_path_factory):
    how = {"lora": LORA, "compute": ComputeConfig("bfloat16")}
    made = tiny.experiment(tmp_path_factory.mktemp("texts"), **how)
    return dataclasses.replace(made, source=SourceConfig(str(source)))


def train(experiment, root):
    """A run, in which JAX's own attention may mix bfloat16 and float32."""
    with jax.numpy_dtype_promotion("standard"):
        lte_jax.train(experiment, root)


@pytest.fixture(scope="module")
def run(experiment, tmp_path_factory):
    """A whole run: its folder, and what each stage was given and made."""
    root, fits = tmp_path_factory.mktemp("run") / "run", {}
    fit = trainer.fit

    def watched(net, stage, params, *args, **kwargs):
        trained = fit(net, stage, params, *args, **kwargs)
        fits[stage.name] = (net, kwargs, trained)
        return trained

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fit", watched)
        train(experiment, root)
    return root, fits


@pytest.mark.slow
def test_a_run_holds_the_dense_model_once_and_writes_the_sums(run):
    root, fits = run
    for stage, folder in (("finetune", "dense"), ("adapt", "lte")):
        _, given, trained = fits[stage]
        read = flat(lte_jax.load(root / folder)[1])
        sums = summed(lora.merged(given["base"], trained.params))
        assert read.keys() == sums.keys()
        for path, array in sums.items():
            stored = array if is_router(path) else array.astype(jnp.bfloat16)
            assert read[path].dtype == stored.dtype, path
            np.testing.assert_array_equal(read[path], stored, err_msg=path)
        assert not np.array_equal(
            sums["layers/ffn/up"], given["base"].params["layers"]["ffn"]["up"]
        )
    for stage in "router", "adapt":
        base, teacher = (fits[stage][1][name] for name in ("base", "teacher"))
        for path, array in flat(teacher).items():
            assert array is flat(base.params)[path], path
    assert flat(fits["adapt"][2].params).keys() == flat(fits["router"][2].params).keys()


@pytest.mark.slow
def test_a_stage_goes_on_from_its_checkpoint_to_the_same_bits(run, experiment, tmp_path):
    root, _ = run
    copy = shutil.copytree(root, tmp_path / "run")
    shutil.rmtree(copy / "lte")
    shutil.rmtree(copy / "checkpoints" / "adapt" / "2")
    train(experiment, copy)
    for file in ("model.safetensors", "config.json"):
        assert (copy / "lte" / file).read_bytes() == (root / "lte" / file).read_bytes()


def test_frozen_matrices_are_held_in_the_type_of_the_products(source):
    made = dataclasses.replace(EXPERIMENT, compute=ComputeConfig("bfloat16"))
    config = hf.read_config(source)[0]
    types = lora.dtypes(config, None, made)
    params = hf.load_params(source, config, None, types)
    base, trained = lora.start(config, None, params, made)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)  # noqa: E731
    assert jax.tree.all(jax.tree.map(same, (base, trained), lora.abstract(config, None, made)))
    assert {str(x.dtype) for x in jax.tree.leaves(trained)} == {"float32"}
    held = {path: str(x.dtype) for path, x in flat(base.params).items()}
    assert held["layers/attn/q/kernel"] == held["embed/embedding"] == "bfloat16"
    assert held["final_norm/scale"] == "float32"
    taught = training_step.teacher_of(base.params, made.compute)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (taught, base.params)), strict=True))


# ----------------------------------------------------------------------------------------- the plan


def test_seven_billion_parameters_fit_one_gpu_of_24_gb():
    """And not without adapters."""
    root = Path(__file__).resolve().parents[1]
    there = plan.Devices.named("rtx4090:1", MeshConfig())
    made = lte_jax.config.load_config(str(root / "configs" / "llama7b.py:lora"))
    counted = plan.Plan.of(made, made.source.scratch, there)
    counted.check_memory()
    assert max(stage.bytes for stage in counted.stages) < 20e9
    for stage in counted.stages:
        assert stage.memory["frozen"] == pytest.approx(2 * 6.738e9, rel=1e-3)
        assert "teacher" not in stage.memory
        assert stage.memory["moments"] <= 2.01 * stage.memory["parameters"]
    refitted = dataclasses.replace(made, lte=dataclasses.replace(made.lte, refit=True))
    with pytest.raises(UserError, match="stage router needs"):  # a teacher of its own
        plan.Plan.of(refitted, made.source.scratch, there).check_memory()


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(("changes", "words"), [
    ({"source": SourceConfig()}, "lora.rank=4 adapts a trained model, but source.path is empty"),
    ({"lora": LoraConfig(32)}, "lora.rank=32 is not below d_model=32"),
    ({"lte": LTEConfig(routing="pruned", router="none", router_init="wanda")}, "chooses by the"),
])  # fmt: skip
def test_bad_input_adapters(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        lora.check(dataclasses.replace(EXPERIMENT, **changes), tiny.CONFIG)
    assert "\n" not in str(caught.value)
