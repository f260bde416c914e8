"""The head taken to chunks of tokens has the losses and gradients of all logits at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lte_jax import layers, objective, optim, sharding, training_step
from lte_jax.config import ComputeConfig, MeshConfig
from lte_jax.layers import Output
from lte_jax.model import Transformer, forward
from lte_jax.reading import Slice

ROWS, LENGTH, KEY = 8, 16, jax.random.key(0)


def losses_of(config, head_tokens, batch, dtype="float32", distils=True):
    """The sum, its parts and its gradient for the head's parameters and the hidden states."""
    model = Transformer(config, dtype=dtype, head_tokens=head_tokens)
    _, params = tiny.model_and_params(None, config)
    teacher = jax.tree.map(lambda w: w * 1.1 + 0.01, params)
    shape = (*batch["tokens"].shape, config.d_model)
    hidden_BLD, taught_BLD = (jax.random.normal(k, shape, dtype) for k in jax.random.split(KEY))

    def output(params, x_BLD, as_held=False):
        w = Slice(params, jnp.dtype(dtype), as_held=as_held)
        logits = layers.head(config, w, x_BLD, batch["segments"], None)
        return Output(logits, None, None, jnp.zeros(()), None, x_BLD)

    def total(params, hidden_BLD):
        out, counts = output(params, hidden_BLD), objective.counts_of(model, batch)
        weights, taught = (0.3, 0.0), None
        if distils:
            weights, taught = (0.3, 0.7), (teacher, output(teacher, taught_BLD, as_held=True))
        sums = objective.head_losses(model, params, out, batch, counts, weights, taught)
        return 2.0 * sums[0], sums[1]

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, hidden_BLD)


def assert_equal(found, expected, tolerance=1e-5):
    """Numbers, and gradients beside the largest of their array."""
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        a, b = np.float32(a), np.float32(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def with_answers(batch):
    """Every third token is an answer's."""
    answers_BL = jnp.broadcast_to(jnp.arange(LENGTH) % 3 == 0, (ROWS, LENGTH))
    return batch | {"answers": answers_BL.astype(jnp.int32)}


HEADS = {
    "own": {},
    "tied": {"tie_embeddings": True},
    "divided": {"tie_embeddings": True, "logits_divisor": 8.0},
}


@pytest.mark.parametrize(("head", "answers", "distils"), [
    ("own", False, True),
    ("tied", True, True),
    ("divided", False, False),
])  # fmt: skip
def test_chunks_have_the_losses_and_gradients_of_the_whole(head, answers, distils):
    config = dataclasses.replace(tiny.CONFIG, **HEADS[head])
    batch = with_answers(tiny.batch()) if answers else tiny.batch()
    whole = losses_of(config, None, batch, distils=distils)
    (_, parts), (grads, _) = whole
    assert set(parts) == ({"loss", "distill"} if distils else {"loss"})
    used = grads["embed"]["embedding"] if config.tie_embeddings else grads["lm_head"]["kernel"]
    assert float(jnp.abs(used).max()) > 1e-3
    for tokens in (5 * ROWS, 1):  # 6 of each record, the last chunk is filled up; one of each
        assert_equal(losses_of(config, tokens, batch, distils=distils), whole)


def test_chunks_add_up_gradients_in_float32():
    whole, parts = (losses_of(tiny.CONFIG, n, tiny.batch(), "bfloat16") for n in (None, ROWS))
    assert_equal(parts, whole, 2**-7)  # of a product rounded to bfloat16
    assert_equal(parts[0], whole[0], 1e-5)
    assert parts[1][1].dtype == jnp.bfloat16 and parts[1][0]["lm_head"]["kernel"].dtype == "float32"


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [(MeshConfig(2, 2, 2), ROWS), (MeshConfig(1, 8, 1), ROWS), (MeshConfig(1, 8, 1), 4)],
)
def test_chunks_on_a_mesh(mesh, rows):
    """Also of four records on eight devices, which XLA divides."""
    config, batch = dataclasses.replace(tiny.CONFIG, tie_embeddings=True), tiny.batch(rows)
    whole = losses_of(config, None, batch)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert_equal(losses_of(config, 4, batch), whole)


def test_devices_add_up_their_gradients_once():
    """Not in every chunk: the loop over them has no communication."""
    model, batch = Transformer(tiny.CONFIG, head_tokens=1), tiny.batch()
    whole = {"counts": {"predicted": jnp.float32(9)}}

    def total(kernel, x_BLD):
        told = {"targets": batch["tokens"], "predicted": batch["segments"] > 0}
        head = {"lm_head": {"kernel": kernel}}
        return objective._chunked(model, 1, (1.0, 0.0), head, x_BLD, whole, told)[0]

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((32, 64), (ROWS, LENGTH, 32))]
    with jax.set_mesh(sharding.make_mesh(MeshConfig())):
        found = list(equations(jax.make_jaxpr(jax.grad(total))(*shapes).jaxpr))
    [loop] = [eqn for eqn in found if eqn.primitive.name == "scan"]
    assert "dot_general" in str(loop) and "psum" not in str(loop)
    assert sum(eqn.primitive.name == "psum" for eqn in found) == 3  # the sum, its part, the kernel


def equations(jaxpr):
    """Those of a jaxpr and of all within."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_the_logits_of_all_tokens_do_not_exist():
    config = dataclasses.replace(tiny.CONFIG, vocab_size=61)
    batch = jax.tree.map(lambda x: x % 61, tiny.batch())
    stage = tiny.stage("router", task_weight=0.5, distill_weight=0.5)

    def lowered(head_tokens):
        model, params = tiny.model_and_params(tiny.LTE, config, head_tokens=head_tokens)
        loss = training_step.make_loss(model, stage)
        counts = objective.counts_of(model, batch)
        step = jax.grad(lambda w: loss(w, params, batch, tiny.control(), counts)[0])
        return jax.jit(step).lower(params).as_text()

    assert f"{ROWS}x{LENGTH}x61xf32" in lowered(None)
    parts = lowered(ROWS * 4)
    assert f"{ROWS}x{LENGTH}x61xf32" not in parts and f"{ROWS}x4x61xf32" in parts


def test_chunks_are_as_long_as_their_logits_may_be():
    length = functools.partial(objective.chunk_length, rows=8, length=2048)
    wide = dataclasses.replace(tiny.CONFIG, vocab_size=32000)
    assert length(Transformer(wide)) == 256  # 2097 tokens have 2**28 bytes; 9 parts would do
    assert length(Transformer(tiny.CONFIG)) == length(Transformer(wide, head_tokens=10**6)) == 2048
    assert length(Transformer(wide, head_tokens=3)) == 1
    assert length(Transformer(dataclasses.replace(wide, head="classes"))) == 2048
    assert length(Transformer(wide), tensor=8) == 2048


@pytest.mark.slow
def test_a_step_in_chunks_is_the_step():
    """With two microbatches, dropout off, the model of both stages."""
    for name in ("router", "adapt"):
        stage, after = tiny.stage(name, task_weight=0.5, distill_weight=0.5), []
        for head_tokens in (None, 8):
            model, params = tiny.model_and_params(head_tokens=head_tokens)
            optimizer = optim.make(tiny.OPTIM, stage.config, stage.rules)
            state = training_step.TrainState(
                jnp.zeros((), jnp.int32), params, optimizer.init(params), tiny.control()
            )
            step = jax.jit(training_step.make_train_step(model, stage, optimizer, microbatches=2))
            teacher = jax.tree.map(lambda w: w * 1.1, params)
            after.append(step(state, tiny.batch(), teacher))
        (whole, metrics), (parts, others) = after
        assert_equal(others, metrics, 1e-4)
        for path, moment in jax.tree_util.tree_leaves_with_path(whole.opt_state):
            other = dict(jax.tree_util.tree_leaves_with_path(parts.opt_state))[path]
            assert_equal(other, moment)


def test_a_teacher_says_the_same_in_the_type_it_computes_in():
    model, params = tiny.model_and_params(tiny.LTE, dtype="bfloat16")
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    kept = training_step.teacher_of(placed, ComputeConfig(dtype="bfloat16"))
    assert kept["layers"]["ffn"]["gate"].dtype == kept["embed"]["embedding"].dtype == jnp.bfloat16
    assert kept["layers"]["attn_norm"]["scale"] is placed["layers"]["attn_norm"]["scale"]
    for old, new in zip(*map(jax.tree.leaves, (placed, kept)), strict=True):
        assert new.sharding == old.sharding
    tokens = tiny.batch(2)["tokens"]
    for plain in (model, model.clone(as_held=True)):
        said = jax.jit(lambda w, m=plain: m.apply({"params": w}, tokens, routing="dense").logits)
        np.testing.assert_array_equal(said(kept), said(placed if plain is model else kept))
    shared = training_step.teacher_of(params, ComputeConfig(teacher_dtype="float32"))
    for old, new in zip(*map(jax.tree.leaves, (params, shared)), strict=True):
        assert new is old


@pytest.mark.parametrize("head_tokens", [None, 16])
def test_a_teacher_in_bfloat16_multiplies_in_bfloat16_and_adds_up_in_float32(head_tokens):
    model, params = tiny.model_and_params(tiny.LTE)
    model = model.clone(as_held=True, head_tokens=head_tokens)
    held = training_step.teacher_of(params, ComputeConfig())
    assert held["layers"]["ffn"]["down"].dtype == jnp.bfloat16
    assert held["layers"]["attn_norm"]["scale"] is params["layers"]["attn_norm"]["scale"]
    batch = tiny.batch(2)
    whole = lambda w: forward(model, w, batch, routing="dense")  # noqa: E731
    products = [
        eqn.params["preferred_element_type"]
        for eqn in equations(jax.make_jaxpr(whole)(held).jaxpr)
        if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.dtype == jnp.bfloat16
    ]
    assert products == [jnp.float32] * 8  # q, k, v, o; gate, up, down; head
    said, exact = whole(held).logits, whole(params).logits
    assert 0 < float(jnp.std(said - exact)) < 0.02 * float(jnp.std(exact))
    out, counts = forward(model, params, batch, routing="dense"), objective.counts_of(model, batch)
    args = model, params, out, batch, counts, (0.0, 1.0)
    apart = float(objective.head_losses(*args, (held, whole(held)))[1]["distill"])
    logp, taught = jax.nn.log_softmax(exact), jax.nn.log_softmax(said)
    kl_BL = jnp.sum(jnp.exp(taught) * (taught - logp), axis=-1)
    expected = jnp.mean(kl_BL[batch["segments"] > 0])
    assert apart == pytest.approx(float(expected), rel=1e-2)
