"""The paper's models at full size, by shape: nothing of that size is ever allocated."""

import dataclasses
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from lte_jax import optim, sharding, stages, training_step
from lte_jax.config import LTEConfig, load_config
from lte_jax.model import Transformer, abstract_params
from lte_jax.sparsity import SparsityController, flops_per_token

ROOT = pathlib.Path(__file__).resolve().parents[1]
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


FLOPS = runpy.run_path(str(ROOT / "benchmarks/flops.py"))
# Parameters as transformers counts them.
MODELS = {
    "LLaMA-7B": DENSE,
    "GPT-2 medium": 354_823_168,
    "RoBERTa-base": 124_647_170,
    "RoBERTa-large": 355_361_794,
}
LTE = LTEConfig()
read = FLOPS["read"]


@pytest.mark.parametrize("name", MODELS)
def test_the_paper_s_models_have_the_parameters_they_should(name):
    config, number = read(name), MODELS[name]
    assert count(abstract_params(Transformer(config))) == number
    width, layers = config.d_model, config.num_layers
    experts = config.d_ff // 32
    assert experts == {768: 96, 1024: 128, 4096: 344}[width]
    routers = layers * experts * (width + 1)
    assert count(abstract_params(Transformer(config, LTE))) == number + routers


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_are_those_of_transformers(name):
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    import transformers

    raw, number = FLOPS["MODELS"][name], MODELS[name]
    theirs = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        model = getattr(transformers, raw["architectures"][0])(theirs)
    assert sum(p.numel() for p in model.parameters()) == number


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_xla_counts(name):
    """Of one layer, as XLA counts the body of a loop once, for a text of 64 tokens."""
    config = dataclasses.replace(read(name), num_layers=1, head="none", pooler=False)
    model, length = Transformer(config), 64
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    hidden = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).hidden)
    cost = hidden.lower(abstract_params(model), tokens).cost_analysis()
    scores = 2 * 2 * length * config.d_model  # queries by keys, weights by values
    expected = length * (flops_per_token(config) + scores)
    assert cost["flops"] == pytest.approx(expected, rel=0.02)


def test_the_page_has_the_flops_that_are_counted():
    assert f"\n\n{FLOPS['table']()}\n\n" in (ROOT / "docs/flops.md").read_text()
    config = read("LLaMA-7B")
    assert flops_per_token(config) / 2**30 == pytest.approx(12.06, abs=0.01)
    points = dict(FLOPS["POINTS"]["LLaMA-7B"])
    for task, printed in (("XSum", 5.38), ("E2E", 4.65), ("WikiText-103", 6.59)):  # of Table 1
        found = flops_per_token(config, LTE, points[task]) / 2**30
        assert found == pytest.approx(printed, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_train_step_of_the_paper_s_models_lowers(name):
    experiment = load_config("configs/glue.py:mrpc,roberta_base")
    model = Transformer(read(name), LTE)
    lower("router", model, experiment, (32, 128), tensor=1)  # a vocabulary of odd size is not split


@pytest.mark.parametrize("name", ["finetune", "router", "adapt"])
def test_llama7b_train_step_lowers_on_a_mesh(name):
    experiment = load_config("configs/llama7b.py")
    lte = None if name == "finetune" else experiment.lte
    model = Transformer(experiment.source.scratch, lte, dtype="bfloat16", remat=True)
    assert f"{344 if lte else 11008}" in lower(name, model, experiment, (16, 2048))


def lower(name, model, experiment, shape, tensor=2):
    """Lowers a step of a stage on eight devices; returns its text."""
    [stage] = [s for s in stages.make(experiment.stages, experiment.lte) if s.name == name]
    mesh = sharding.make_mesh(
        dataclasses.replace(experiment.mesh, data=2 // tensor, fsdp=4, tensor=tensor)
    )
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
        place = sharding.batch_sharding(mesh)
        rows = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=place)
        batch = {"tokens": rows, "segments": rows}
        if model.config.head == "classes":
            batch["labels"] = jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=place)
        step = jax.jit(
            training_step.make_train_step(model, stage, optimizer),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        teacher = placed(params, shardings.params) if stage.distill_weight else None
        lowered = step.lower(placed(state, shardings), batch, teacher)
    out_state, metrics = lowered.out_info
    assert count(out_state.params) == count(params)
    assert metrics["loss"].shape == ()
    return lowered.as_text()
