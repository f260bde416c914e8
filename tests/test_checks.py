"""What the public functions refuse: one line, before any work, and nothing that is right."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import lte_jax
from lte_jax import checks, data, evaluation
from lte_jax.config import UserError
from lte_jax.model import Transformer, abstract_params, init_cache

MODEL = Transformer(tiny.CONFIG, tiny.LTE)
DENSE = Transformer(tiny.CONFIG)
PARAMS, DENSE_PARAMS = (
    abstract_params(MODEL),
    abstract_params(DENSE),
)  # no check may come so late that it needs numbers
TOKENS = np.arange(12).reshape(2, 6)
ROWS = data.pad([np.arange(1, 20)], 16)
APPLY = functools.partial(lte_jax.apply, MODEL, PARAMS)

UNCHECKED = "jaxtyping.config.jaxtyping_disable"  # outside tests annotations are not executed
WRONG_TOKENS = [
    (lambda t: np.where(t == 5, 64, t), "token id 64, outside the vocabulary of 64"),
    (lambda t: t - 1, "token id -1, outside the vocabulary of 64"),
    (lambda t: t[0], r"has shape \[6\]: expected \[B, L\] \(one text alone is .*\[None\]"),
    (lambda t: t[None], r"has shape \[1, 2, 6\]: expected \[B, L\]"),
    (lambda t: t[:, :0], "expected at least one token"),
    (lambda t: t / 2, r"is float64\[2, 6\]: expected integers"),
    (lambda t: t > 2, r"is bool\[2, 6\]: expected integers"),
    (lambda t: [[1, 2], [3]], "rows of different length.*mask"),
    (lambda t: "Once", "is text: expected token ids"),
    (lambda t: np.zeros((1, 33), int), "a text of 33 tokens, but the model's max_length is 32"),
]
WRONG_MASKS = [
    (np.ones((2, 5), bool), r"mask has shape \[2, 5\] and .* \[2, 6\]"),
    (np.ones(6, bool), r"mask has shape \[6\]"),
    (np.ones((2, 6)), r"mask is float64\[2, 6\]: expected integers"),
    (-np.ones((2, 6), int), "mask has the entry -1"),
    ([[True], [True, False]], "mask has rows of different length"),
]
WRONG_ROUTINGS = ["hrad", "Hard", ""]
WRONG_THRESHOLDS = [7, len, np.array("a"), -0.1, math.nan, math.inf, "0.5", [0.5], True]


def refused(message, call, *args, **kwargs):
    with pytest.raises(UserError, match=message) as raised:
        call(*args, **kwargs)
    assert "\n" not in str(raised.value) and len(str(raised.value)) <= 500


@pytest.fixture(params=["checked", "unchecked"], autouse=True)
def annotations(request, monkeypatch):
    """Whether annotations are executed, as in tests, or not, as outside of them."""
    if request.param == "unchecked":
        monkeypatch.setattr(UNCHECKED, True)


@pytest.mark.parametrize(("change", "message"), WRONG_TOKENS)
def test_tokens(change, message):
    wrong = change(TOKENS)
    refused(f"tokens .*{message}", APPLY, wrong)
    refused(f"calibration .*{message}", lte_jax.moefy, DENSE, DENSE_PARAMS, wrong)
    if not isinstance(wrong, list | str):
        rows = data.Records(wrong, np.ones(wrong.shape, int))
        refused(f"records.tokens_RL .*{message}", evaluation.perplexity, MODEL, PARAMS, rows)


def test_tokens_of_other_kinds():
    refused(
        r"tokens is uint32.* id 4294967295|token id 4294967295", APPLY, TOKENS.astype("uint32") - 1
    )
    refused("token id 1099511627776", APPLY, TOKENS + 2**40)
    refused("tokens has token id 64", MODEL.apply, {"params": PARAMS}, jnp.full((1, 2), 64))


@pytest.mark.parametrize(("mask", "message"), WRONG_MASKS)
def test_masks(mask, message):
    refused(message, APPLY, TOKENS, mask=mask)
    refused(message, lte_jax.moefy, DENSE, DENSE_PARAMS, TOKENS, mask)
    refused(message, lte_jax.generate, MODEL, PARAMS, TOKENS, mask=mask, max_new_tokens=2)


@pytest.mark.parametrize("routing", WRONG_ROUTINGS)
@pytest.mark.parametrize("model", [MODEL, DENSE], ids=["lte", "dense"])
def test_routings(model, routing):
    params = abstract_params(model)
    for call in (
        functools.partial(lte_jax.apply, model, params, TOKENS),
        functools.partial(lte_jax.generate, model, params, [[1]], max_new_tokens=2),
        functools.partial(lte_jax.evaluate, model, params, ROWS),
    ):
        refused(f"routing={routing!r}", call, routing=routing)


@pytest.mark.parametrize("threshold", WRONG_THRESHOLDS)
def test_thresholds(threshold):
    for call in (
        functools.partial(APPLY, TOKENS),
        functools.partial(lte_jax.generate, MODEL, PARAMS, [[1]], max_new_tokens=2),
        functools.partial(lte_jax.evaluate, MODEL, PARAMS, ROWS),
    ):
        refused("threshold=", call, threshold=threshold)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": None}, "seed=None: expected an integer from 0 to"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"seed": 1.0}, "seed=1.0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ({"max_new_tokens": None}, "max_new_tokens=None"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": None}, "temperature=None"),
        ({"top_k": 2.0}, "top_k=2.0"),
        ({"top_p": "all"}, "top_p='all'"),
        ({"tokens": 5}, "tokens is int"),
        ({"tokens": np.array(3)}, "tokens is ndarray: expected a list"),
        ({"tokens": []}, "no prompt"),
        ({"tokens": [[1], []]}, "prompt 1 is empty"),
        ({"tokens": "Once"}, "is a string.*generate_text"),
        ({"tokens": [1, 2]}, "prompt 0 .*a list in a list"),
        ({"tokens": [[1.5]]}, "prompt 0 is float64"),
        ({"tokens": [["a"]]}, "prompt 0 is"),
        ({"tokens": [[1, 64]]}, "token id 64, outside the vocabulary of 64"),
        ({"tokens": [[1], [-1, 5]]}, "prompt 1 has token id -1"),
        ({"tokens": [[1] * 33]}, "a prompt of 33 tokens.*max_length=32"),
        ({"tokens": np.ones((2, 3), int), "mask": np.zeros((2, 3), bool)}, "prompt 0 is empty"),
        ({"tokens": [[1], [1, 2]], "mask": np.ones((2, 2), bool)}, "need no mask"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected an integer of at least 1"),
        ({"max_new_tokens": 32}, "exceed the model's max_length=32: at most 31"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, r"top_p=0.0: expected within \(0, 1\]"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"eos_ids": (1, 64)}, "eos_ids: token=64: expected an integer from 0 to 63, the vocab"),
        ({"implementation": "cuda"}, "implementation='cuda'.*auto, reference, xla"),
    ],
)
def test_settings_of_generate(wrong, message):
    refused(
        message, lte_jax.generate, MODEL, PARAMS, **({"tokens": [[1]], "max_new_tokens": 2} | wrong)
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eos_ids": 3}, "eos_ids=3: expected a list of token ids"),
        ({"eos_ids": ["x"]}, "eos_ids: token='x'"),
        ({"stream": 3}, "stream=3: expected a function"),
        ({"implementation": np.zeros((0, 4), int)}, "implementation="),
    ],
)
def test_settings_of_other_types(wrong, message, monkeypatch):
    monkeypatch.setattr(UNCHECKED, True)
    test_settings_of_generate(wrong, message)


def test_prompts_of_texts():
    tokenizer = data.byte_tokenizer()
    model = Transformer(tiny.CONFIG.__class__(vocab_size=259, max_length=32))
    params = abstract_params(model)
    text = functools.partial(lte_jax.generate_text, model, params, tokenizer, max_new_tokens=2)
    refused("prompt is int: expected a string or a list of strings", text, 3)
    refused(r"prompt is list of \['int', 'str'\]: expected a string or a list", text, ["Once", 3])
    refused("prompt is an empty list", text, [])
    refused("write is of one prompt", text, ["Once"], write=print)
    refused("no chat template", text, "Once", chat=True)
    refused("a prompt of 41 tokens.*max_length=32", text, "o" * 40)
    refused("seed=None", text, "Once", seed=None)
    evaluate = functools.partial(lte_jax.evaluate, model, params, ROWS, tokenizer=tokenizer)
    refused("prompt 'o+' has 41 tokens: expected 1 to 31", evaluate, prompt="o" * 40)
    refused("prompt is NoneType", evaluate, prompt=None)
    refused("sample_tokens=-1", evaluate, sample_tokens=-1)
    refused("records is list: expected data.Records", lte_jax.evaluate, model, params, [[1, 2]])
    refused("batch_size=2.0", evaluate, batch_size=2.0)
    refused("batch_size=0", evaluate, batch_size=0)
    lte = functools.partial(lte_jax.evaluate, MODEL, PARAMS, ROWS)
    refused("is an LTE model", lte, baseline=(MODEL, PARAMS))
    refused("vocabulary has 64 tokens, the baseline's 259", lte, baseline=(model, params))
    short = data.pad([np.ones(1, int)], 8)
    refused("no token to", evaluation.perplexity, MODEL, PARAMS, short)


def test_a_cache_with_no_room():
    step = functools.partial(MODEL.apply, {"params": PARAMS}, TOKENS)
    refused("room for 5 more tokens of 2 texts.*init_cache", step, cache=init_cache(MODEL, 2, 5))
    refused("room for 9 more tokens of 3 texts", step, cache=init_cache(MODEL, 3, 9))
    used = init_cache(MODEL, 2, 9) | {"index": jnp.int32(4)}
    refused("room for 5 more tokens.*init_cache.model, 2, 10", step, cache=used)
    full = init_cache(MODEL, 2, 40)
    full |= {"segments": full["segments"].at[:, :30].set(1), "index": jnp.int32(30)}
    refused("a text of 36 tokens, but the model's max_length is 32", step, cache=full)


def test_what_is_right_passes():
    model, params = tiny.model_and_params()
    apply = functools.partial(lte_jax.apply, model, params)
    expected = apply(TOKENS).logits
    for tokens in (TOKENS.tolist(), TOKENS.astype("uint8"), jnp.asarray(TOKENS), TOKENS.tolist()):
        np.testing.assert_array_equal(apply(tokens).logits, expected)
    np.testing.assert_array_equal(
        apply(TOKENS, mask=np.ones((2, 6), bool).tolist()).logits, expected
    )
    for threshold in (0, 1, np.float32(0.5), jnp.float32(0.5)):
        apply(TOKENS, threshold=threshold)
    # A row may be longer than a text may be.
    long = np.ones((1, 40), int)
    apply(long, mask=np.repeat([[1, 2]], 20, axis=1))
    assert lte_jax.generate(model, params, [[1]], max_new_tokens=1, seed=2**32 - 1)
    # Under a trace values are not known, and shapes still are.
    jitted = jax.jit(
        lambda tokens, mask=None, threshold=0.5: (
            apply(tokens, mask=mask, threshold=threshold).logits
        )
    )
    np.testing.assert_allclose(jitted(TOKENS), expected, atol=1e-5)
    jitted(TOKENS, TOKENS > 3, 0.7)
    refused("mask has shape", jitted, TOKENS, np.ones((2, 5), bool))
    refused("max_length is 32", jitted, np.ones((1, 33), int))


def test_parameters_that_are_not_finite():
    model, params = tiny.model_and_params()
    params["layers"]["ffn"]["router"]["kernel"] = jnp.full_like(
        params["layers"]["ffn"]["router"]["kernel"], jnp.nan
    )
    message = "model 'LTE': parameter layers/ffn/router/kernel has values that are not finite"
    refused(message, lte_jax.evaluate, model, params, ROWS)


def test_logits_that_are_not_finite():
    model, params = tiny.model_and_params(lte=None)
    params["lm_head"] = {"kernel": jnp.full_like(params["lm_head"]["kernel"], 3e38)}
    refused(
        "model 'dense': the loss over these records is (nan|inf)",
        lte_jax.evaluate,
        model,
        params,
        ROWS,
    )


def test_a_perplexity_that_overflows():
    model, params = tiny.model_and_params(lte=None)
    params["lm_head"] = {"kernel": params["lm_head"]["kernel"] * 1e5}
    refused("model 'dense': a loss of .* nats per token", lte_jax.evaluate, model, params, ROWS)


def test_one_check_of_ids_for_texts():
    refused("document 3 has token id 9", checks.token_ids, [1, 9], 9, "document 3")
    checks.token_ids(np.zeros(0, int), 9)


# ------------------------------------------------------------------- no model, no parameters of it


def entries(model, params, tmp_path):
    """Every public function that takes a model."""
    return (
        lambda: lte_jax.apply(model, params, TOKENS),
        lambda: lte_jax.generate(model, params, [[1]], max_new_tokens=2),
        lambda: lte_jax.generate_text(model, params, data.byte_tokenizer(), "a", max_new_tokens=2),
        lambda: lte_jax.evaluate(model, params, ROWS),
        lambda: lte_jax.moefy(model, params, expert_size=8),
        lambda: lte_jax.save(tmp_path / "saved", model, params),
    )


@pytest.mark.parametrize("value", [[], None, 3, "x", tiny.CONFIG, Transformer], ids=str)
def test_what_is_no_model(value, tmp_path, monkeypatch):
    monkeypatch.setattr(UNCHECKED, True)
    for call in entries(value, PARAMS, tmp_path):
        refused("^model is .*: expected a model", call)
    for baseline in (value, (value, PARAMS)) if value is not None else ((value, PARAMS),):
        call = functools.partial(lte_jax.evaluate, MODEL, PARAMS, ROWS, baseline=baseline)
        refused("^baseline is ", call)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ([PARAMS], "params is list"),
        (None, "params is NoneType"),
        ("\0", "params is str"),
        ({}, "embed/embedding is missing, expected floats .64, 32."),
        (PARAMS | {"embed": 3}, "embed/embedding is missing"),
        (PARAMS | {"embed": {"embedding": [[1.0]]}}, "embed/embedding is list"),
        (
            PARAMS | {"final_norm": {"scale": np.ones(16, np.float32)}},
            r"final_norm/scale is float32\[16\], expected floats \[32\]",
        ),
        (PARAMS | {"final_norm": {"scale": np.ones(32, int)}}, r"final_norm/scale is int64\[32\]"),
        (DENSE_PARAMS, "layers/ffn/"),
    ],
)
def test_what_are_no_parameters_of_the_model(params, message, tmp_path, monkeypatch):
    monkeypatch.setattr(UNCHECKED, True)
    for call in entries(MODEL, params, tmp_path):
        refused(message, call)


def test_what_is_no_experiment_no_tokenizer_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(UNCHECKED, True)
    refused("experiment is list", lte_jax.train, [], tmp_path / "run")
    text = functools.partial(lte_jax.generate_text, MODEL, PARAMS, max_new_tokens=2)
    refused("tokenizer is list", text, [], "a")
    refused("write=3: expected a function", text, data.byte_tokenizer(), "a", write=3)
    for name in (b"a", math.inf):
        refused("name=.*expected a text", lte_jax.evaluate, MODEL, PARAMS, ROWS, name=name)


def test_bad_input_moefy_of_a_model_that_is_not_finite():
    model, params = tiny.model_and_params(None)
    params["final_norm"] = {"scale": params["final_norm"]["scale"].at[0].set(jnp.nan)}
    settings = {"expert_size": 8, "grouping": "random", "router_init": "normal"}
    with pytest.raises(UserError, match="final_norm/scale has values that are not finite"):
        lte_jax.moefy(model, params, **settings)
