"""The paper's models at full size, by shape: nothing of that size is ever allocated."""

import dataclasses
import math
import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from lte_jax import optim, routing, scoring, sharding, stages, tasks, training_step
from lte_jax.config import LTEConfig, load_config
from lte_jax.hf.config_json import parse
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


LLAMA2 = FLOPS["MODELS"]["LLaMA-7B"] | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
HUB = {  # what config.json says there; RoBERTa's with the head that it has before a task
    "huggyllama/llama-7b": FLOPS["MODELS"]["LLaMA-7B"],
    "meta-llama/Llama-2-7b-hf": LLAMA2,
    "openai-community/gpt2-medium": FLOPS["MODELS"]["GPT-2 medium"],
} | {
    f"FacebookAI/{name.lower()}": FLOPS["MODELS"][name] | {"architectures": ["RobertaForMaskedLM"]}
    for name in ("RoBERTa-base", "RoBERTa-large")
}
TWO_CLASSES = ("cola", "sst2", "mrpc", "qqp", "qnli", "rte")
DECODERS = (("gpt2_medium", "GPT-2 medium", 50257), ("llama7b", "LLaMA-7B", 32000))
ENCODERS = (("roberta_base", "RoBERTa-base", 768), ("roberta_large", "RoBERTa-large", 1024))
CLASSES = dict.fromkeys(("cola", "sst2", "mrpc", "qqp", "qnli", "rte"), 2) | {"mnli": 3, "stsb": 1}
# Each of the paper's experiments: its parameters, dense, and the logits of its head.
EXPERIMENTS = {
    f"{file}.py:{model}": (MODELS[name], logits)
    for file in ("e2e", "xsum", "wikitext")
    for model, name, logits in DECODERS
} | {
    f"glue.py:{task},{model}": (MODELS[name] + (classes - 2) * (width + 1), classes)
    for model, name, width in ENCODERS
    for task, classes in CLASSES.items()
}
EXPERIMENTS |= {"instruct.py:llama2_7b": (DENSE, 32000), "llama7b.py": (DENSE, 32000)}


def prepared(name):
    """An experiment, and the config of the dense model that it trains."""
    experiment = load_config(str(ROOT / "configs" / name))
    config, task = parse(HUB[experiment.source.path], "config.json")[0], experiment.data.task
    if task:
        config = tasks.find(task).adapted(experiment.data).dense_config(config)
    assert experiment.data.length <= config.max_length
    return experiment, config


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("preset", ["ours", "paper"])
def test_the_paper_s_experiments_have_the_parameters_they_should(name, preset):
    experiment, config = prepared(
        name + (",paper" if ":" in name else ":paper") * (preset == "paper")
    )
    assert (experiment.stages.router.router_lr_multiplier == 1) == (preset == "paper")
    number, logits = EXPERIMENTS[name]
    assert count(abstract_params(Transformer(config))) == number
    assert (config.num_labels if config.head == "classes" else config.vocab_size) == logits
    experts, layers = config.d_ff // 32, config.num_layers
    routers = layers * experts * (config.d_model + (preset == "ours"))  # which has biases
    assert count(abstract_params(Transformer(config, experiment.lte))) == number + routers


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_train_step_of_the_paper_s_experiments_lowers(name):
    experiment, config = prepared(name)
    assert experiment.lte.expert_size == 32
    how = experiment.compute
    model = Transformer(config, experiment.lte, dtype=how.dtype, remat=how.remat)
    shape = (experiment.data.batch_size, experiment.data.length)
    lower("router", model, experiment, shape, tensor=1)  # a vocabulary of odd size is not split


def test_the_scoring_of_mmlu_lowers():
    """Of LLaMA2-7B after configs/instruct.py, prompts of its whole context."""
    experiment, config = prepared("instruct.py:llama2_7b")
    model = Transformer(config, experiment.lte, dtype="bfloat16")
    rows = jax.ShapeDtypeStruct((8, config.max_length), jnp.int32)
    batch, how = {"tokens": rows, "segments": rows}, routing.make(None, config, experiment.lte)
    lowered = scoring._next_tokens.lower(model, abstract_params(model), batch, None, how)
    (next_BL, best_BL, last_BV), *_ = lowered.out_info
    assert next_BL.shape == best_BL.shape == (8, 4096) and last_BV.shape == (8, 32000)


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
            kind = jnp.int32 if model.config.num_labels > 1 else jnp.float32
            batch["labels"] = jax.ShapeDtypeStruct((shape[0], 1), kind, sharding=place)
        elif experiment.data.task:
            batch["answers"] = rows
        step = jax.jit(
            training_step.make_train_step(model, stage, optimizer),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        teacher = placed(params, shardings.params) if stage.taught else None
        lowered = step.lower(placed(state, shardings), batch, teacher)
    out_state, metrics = lowered.out_info
    assert count(out_state.params) == count(params)
    assert metrics["objective"].shape == ()
    return lowered.as_text()
