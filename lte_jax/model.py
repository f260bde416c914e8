"""One Transformer (Flax Linen), decoder or encoder, whose config spans those of hf/families/.

The modules declare the parameters of params.py and scan over layers, so parameters of layers have
a leading axis N; the arithmetic is in layers.py. One forward pass trains, evaluates and, given a
cache, continues a text; `decode` is that pass through the kernels, for its last token's logits.

Dimension key: B batch  L length  T cache length  D model width  E experts  M neurons per expert
               N layers  H heads  K kv heads  C head width  V vocabulary
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lte_jax import checks, kernels, layers, reading
from lte_jax import params as parameters
from lte_jax import routing as routings
from lte_jax.attention import Cache
from lte_jax.config import LTEConfig, ModelConfig, Remat, own_threshold
from lte_jax.kernels.quantized import Quantized
from lte_jax.layers import Output
from lte_jax.selection import Routing


class Transformer(nn.Module):
    """A dense (`lte` None) or LTE model: `model.apply({"params": params}, tokens)`."""

    config: ModelConfig
    lte: LTEConfig | None = None
    # Of the computation: float32 or bfloat16. Router scores and logits are always float32.
    dtype: str = "float32"
    remat: Remat = False  # what the backward pass recomputes, see ComputeConfig
    attention: str = "xla"  # what computes it without a cache, see `kernels.trains_attention`
    unroll: int = 1  # see ComputeConfig, as is the next
    head_tokens: int | None = None  # of training and evaluation
    # Multiplies matrices in the type that they are held in, into sums of `dtype`: a teacher.
    as_held: bool = False
    # Share of what embedding, attention and FFN put out (and the classifier reads) that is zeroed,
    # the rest scaled up, where `apply` is given rngs={"dropout": key}, as in training.
    dropout: float = 0.0

    def __post_init__(self):
        checks.compute_dtype(self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B L"] | Any,
        *,
        routing: Routing | str | None = None,
        types: Int[Array | np.ndarray, "B L"] | Any = None,
        mask: Bool[Array | np.ndarray, "B L"] | Int[Array | np.ndarray, "B L"] | Any = None,
        threshold: Float[Array, "*N"] | float | Any = None,
        cache: Cache | None = None,
        texts: int | None = None,
    ) -> Output:
        """Logits of tokens or classes, see `ModelConfig.head`.

        Args:
          tokens: token ids.
          routing: see routing.py; None: `lte.routing` ("dense" for a dense model).
          types: the type of each token, of models that have token types; None: all 0.
          mask: True (or a segment id > 0) at real tokens; tokens attend only to their own segment,
            and positions count its real tokens. None: all real, one segment per row.
          threshold: in place of the model's own: one number, or one of each layer.
          cache: of earlier tokens (`init_cache`), to which these are appended.
          texts: of each row, to classify, which are its segments 1, 2, ...: logits [B, texts, Y];
            None: one text a row, logits [B, Y].

        Raises:
          UserError: on arguments that do not fit the model or each other.
        """
        config, lte = self.config, self.lte
        checks.batch(config, tokens, mask, cache, types=types)
        checks.threshold(threshold, config.num_layers)
        if texts is not None:
            checks.integer("texts", texts, 1)
        how = routings.make(routing, config, lte)
        if threshold is None:
            threshold = own_threshold(lte)
        threshold = jnp.asarray(threshold, jnp.float32)
        segments_BL = (
            jnp.ones(tokens.shape, jnp.int32) if mask is None else jnp.asarray(mask, jnp.int32)
        )
        dtype = jnp.dtype(self.dtype)
        drop = _dropout(self)
        weights = declare(self, config, lte, "", without="layers")
        w = reading.Slice(weights, dtype, drop=drop, as_held=self.as_held)
        block = Block
        if self.remat:
            block = nn.remat(Block, prevent_cse=False, policy=_policy(self.remat))
        scanned = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0, INPUTS: 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast),
            length=config.num_layers,
            unroll=self.unroll,
        )(config, lte, how, dtype, self.dropout, self.attention, self.as_held, name="layers")
        return layers.transformer(
            config, w, scanned, tokens, types, segments_BL, threshold, cache, texts
        )


def forward(model: Transformer, params: Any, batch: Mapping[str, Any], **options: Any) -> Any:
    """`model.apply` on a batch: "tokens", "segments" and maybe "types" [B, L], "labels" [B, S]."""
    options |= {"types": batch.get("types"), "mask": batch["segments"]}
    if "labels" in batch:
        options["texts"] = batch["labels"].shape[1]
    return model.apply({"params": params}, batch["tokens"], **options)


def _policy(remat: Any) -> Callable[..., Any] | None:
    """What the backward pass need not compute again; None: that is all."""
    if remat is True:
        return None
    policies = jax.checkpoint_policies
    products = policies.save_only_these_names(reading.NEURONS)  # matrix products, too
    return policies.save_from_both_policies(getattr(policies, remat), products)


def _dropout(module: Transformer | Block) -> Callable[[Array], Array]:
    """The module's dropout: none without a key for it."""
    return nn.Dropout(module.dropout, deterministic=not module.has_rng("dropout"))


INPUTS = "inputs"  # the collection of what matrices of layers are multiplied with, see gptq.py


def _sow(module: nn.Module, name: str, value: Array) -> None:
    module.sow(INPUTS if name.endswith("_reads") else "intermediates", name, value)


class Block(nn.Module):
    """One layer of the scan, see `layers.block`."""

    config: ModelConfig
    lte: LTEConfig | None
    routing: Routing
    dtype: jnp.dtype
    dropout: float
    attention: str
    as_held: bool

    @nn.compact
    def __call__(self, x_BLD, kv, own, context):
        """The new x, and the layer's (k, v) and scores and active experts of its FFN."""
        weights = declare(self, self.config, self.lte, "layers/", without="ffn")
        sow, drop = functools.partial(_sow, self), _dropout(self)
        ways = {"attention": self.attention, "as_held": self.as_held}
        w = reading.Slice(weights, self.dtype, sow, drop, **ways)
        ffn = ExpertFFN(self.config, self.lte, self.routing, self.dtype, self.as_held, name="ffn")
        x_BLD, kv, outputs = layers.block(self.config, w, ffn, x_BLD, kv, own, context)
        return x_BLD, (kv, outputs)


class ExpertFFN(nn.Module):
    """The FFN of one block: dense (one expert, no router) if `lte` is None."""

    config: ModelConfig
    lte: LTEConfig | None
    routing: Routing
    dtype: jnp.dtype
    as_held: bool

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], threshold: Float[Array, ""] | float
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L E"] | None, Array | None]:
        """The layer's output, router scores, and active experts (None if all run)."""
        idle = not (self.routing.routed or self.is_initializing())  # moefy adds routers later
        weights = declare(
            self, self.config, self.lte, "layers/ffn/", without="router" if idle else ""
        )
        key = lambda: self.make_rng("dropout") if self.has_rng("dropout") else None  # noqa: E731
        sow = functools.partial(_sow, self)
        w = reading.Slice(weights, self.dtype, sow, key=key, as_held=self.as_held)
        return layers.ffn(self.config, self.lte, self.routing, w, x_BLD, threshold)


class Parameters(nn.Module):
    """The parameters of the table below `prefix`, as a nested dict."""

    config: ModelConfig
    lte: LTEConfig | None
    prefix: str

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        """The parameters; those of layers are of one layer."""
        return declare(self, self.config, self.lte, self.prefix)


def declare(
    module: nn.Module, config: ModelConfig, lte: LTEConfig | None, prefix: str, without: str = ""
) -> dict[str, Any]:
    """Declares the parameters below `prefix` on the module, except those of part `without`."""
    sizes, weights = parameters.dimension_sizes(config, lte), {}
    for row in parameters.table(config, lte):
        name, _, below = row.path.removeprefix(prefix).partition("/")
        if not row.path.startswith(prefix) or name == without or name in weights:
            continue
        if below:
            weights[name] = Parameters(config, lte, f"{prefix}{name}/", name=name)()
        else:
            shape = row.shape(sizes)[row.layered :]
            stored = module.get_variable("params", name)
            if isinstance(stored, Quantized):
                weights[name] = stored
            else:
                weights[name] = module.param(name, row.initializer(sizes), shape, jnp.float32)
            for adapter in parameters.ADAPTERS.get(row.path, ()):  # in training, see lora.py
                beside = adapter.path.rpartition("/")[2]
                if module.has_variable("params", beside):
                    weights[beside] = module.get_variable("params", beside)
    return weights


def decode(
    model: Transformer,
    stack: tuple[reading.Weights, reading.Weights],
    tokens_BL: Int[Array, "B L"],
    cache: Cache,
    *,
    routing: Routing,
    threshold: Float[Array, "*N"] | float,
    live_BL: Bool[Array, "B L"],
    segments_BL: Int[Array, "B L"] | None = None,
    implementation: str = "auto",
) -> Output:
    """Reads more tokens through the kernels, like `model.apply` with a cache.

    The logits are those after the last token of each row, [B, 1, V].

    Only the weights of active experts are read, so the routing must skip idle experts, and must not
    need the activations of all neurons.

    Args:
      model: dense or LTE.
      stack: its parameters, from `reading.stacked`.
      tokens_BL: the tokens to read.
      cache: of earlier tokens.
      routing: see above.
      threshold: of the routing.
      live_BL: False at tokens that use no experts: padding, and those of finished rows.
      segments_BL: > 0 at real tokens; None: at all.
      implementation: of the kernels.
    """
    config = model.config
    vectors, matrices = stack

    def blocks(x_BLD, kv, own_N, context):
        def layer(carry, scanned):
            (x_BLD, kv), (vectors, own, index) = carry, scanned
            w = reading.Stack(vectors, matrices["layers"], index, live_BL, implementation)
            ffn = functools.partial(layers.ffn, config, model.lte, routing, w.at("ffn"))
            x_BLD, kv, outputs = layers.block(config, w, ffn, x_BLD, kv, own, context)
            return (x_BLD, kv), outputs

        indices_N = jnp.arange(config.num_layers, dtype=jnp.int32)
        scanned = (vectors["layers"], own_N, indices_N)
        unroll = kernels.unroll(implementation)
        (x_BLD, kv), outputs = jax.lax.scan(layer, (x_BLD, kv), scanned, unroll=unroll)
        return x_BLD, (kv, outputs)

    w = reading.Stack(vectors, matrices, 0, live_BL, implementation)
    if segments_BL is None:
        segments_BL = jnp.ones_like(tokens_BL)
    threshold = jnp.asarray(threshold, jnp.float32)
    return layers.transformer(config, w, blocks, tokens_BL, None, segments_BL, threshold, cache)


def init_cache(model: Transformer, batch_size: int, length: int) -> Cache:
    """An empty cache for `batch_size` texts of up to `length` tokens.

    k, v [N, B, T, K, C]; segments [B, T], > 0 at real tokens; positions [B, T] of tokens in their
    segments; index: tokens so far.
    """
    c = model.config
    shape = (c.num_layers, batch_size, length, c.num_kv_heads, c.head_dim)
    return {
        "k": jnp.zeros(shape, model.dtype),
        "v": jnp.zeros(shape, model.dtype),
        "segments": jnp.zeros((batch_size, length), jnp.int32),
        "positions": jnp.zeros((batch_size, length), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def abstract_params(model: Transformer) -> Any:
    """The parameter tree as ShapeDtypeStructs, which take no memory."""
    return parameters.abstract(model.config, model.lte)
