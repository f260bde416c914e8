"""How the weights of a layer are read, which is all that training and decoding do differently.

  Slice   the weights of one layer, by einsums over any number of tokens: training, prefill
  Stack   the weights of all layers and a layer's index, by the kernels: decoding

Dimension key: B batch  L length  T cache length  D model width  E experts  M neurons per expert
               N layers  H heads  K kv heads  C head width  V vocabulary  O outputs of a matrix
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int, Integer

from lte_jax import kernels
from lte_jax.attention import attention_in_turn, masked_attention, put
from lte_jax.config import Activation, ModelConfig
from lte_jax.kernels.quantized import Quantized
from lte_jax.kernels.reference import ACTIVATIONS
from lte_jax.params import BY_PATH, is_router
from lte_jax.selection import as_last

Weights = Mapping[str, Any]
NEURONS = "neurons"  # name of their products with x, which remat policies see as that alone
_HIGHEST = jax.lax.Precision.HIGHEST
_DENSE_ROWS = 32  # decoding reads a dense FFN in blocks of at most so many neurons


@dataclasses.dataclass(frozen=True)
class Slice:
    """The weights of one layer (or those outside the layers), used by einsums."""

    vectors: Weights  # all of them, the matrices among them
    dtype: Any  # to compute in
    tap: Callable[[str, Array], Any] = lambda name, value: None  # sees neurons, and what is read
    drop: Callable[[Array], Array] = lambda x: x  # dropout, in training
    key: Callable[[], Array | None] = lambda: None  # of random choices, in training
    attention: str = "xla"  # see Transformer, as is the next
    as_held: bool = False

    def at(self, name: str) -> Slice:
        """Those of a part."""
        return dataclasses.replace(self, vectors=self.vectors[name])

    def embed(self, name: str, ids_BL: Integer[Array | np.ndarray, "B L"]) -> Array:
        """Rows of an embedding, [B, L, D]."""
        table = self.vectors["embed"][name]
        if isinstance(table, Quantized):
            return table.rows(jnp.asarray(ids_BL)).astype(self.dtype)
        return jnp.take(table, ids_BL, axis=0).astype(self.dtype)

    def head(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Logits of tokens, float32; the embedding's where there is no head of its own."""
        matrix, letters = _head(self.vectors)
        operands = self._typed(x_BLD, matrix)
        logits_BLV = jnp.einsum(
            f"BLD,{letters}->BLV", *operands, preferred_element_type=jnp.float32
        )
        bias = self.vectors.get("lm_head", {}).get("bias")
        return logits_BLV if bias is None else logits_BLV + as_last(bias, logits_BLV)

    def linear(self, name: str, x_BLI: Array, exact: bool = False) -> Array:
        """The product with a kernel of that name, over all but x's first two axes, and its bias.

        `exact`: in float32, whose operands accelerators would round unless told otherwise.
        """
        kernel, inputs = self.vectors[name]["kernel"], x_BLI.ndim - 2
        if exact:
            operands = x_BLI.astype(jnp.float32), kernel.astype(jnp.float32)
            y = jnp.tensordot(*operands, inputs, precision=_HIGHEST)
        else:
            operands = self._typed(x_BLI, kernel)
            y = jnp.tensordot(*operands, inputs, preferred_element_type=self.dtype)
        y = _adapted(self.vectors[name], "kernel", x_BLI, y)
        bias = self.vectors[name].get("bias")
        return y if bias is None else y + as_last(bias, y)

    def linears(self, names: Sequence[str], x_BLI: Array) -> list[Array]:
        """`linear` of each name."""
        return [self.linear(name, x_BLI) for name in names]

    def attend(self, q_BLHC, k_BLKC, v_BLKC, kv, visible_BLT, index, causal: bool):
        """Attention over these tokens, or over a cache to which they are added at `index`."""
        if kv is None:
            operands = q_BLHC, k_BLKC, v_BLKC, visible_BLT
            if self.attention == "cpu":
                return kernels.attention(*operands, causal=causal), None
            return masked_attention(*operands, blocked=causal), None
        k_BTKC, v_BTKC = put(kv[0], k_BLKC, index), put(kv[1], v_BLKC, index)
        y_BLHC = attention_in_turn(q_BLHC, k_BTKC, v_BTKC, visible_BLT)
        return y_BLHC, (k_BTKC, v_BTKC)

    def experts(
        self,
        x_BLD: Float[Array, "B L D"],
        choose: Callable,
        activation: Activation,
        inputs: Callable[[str], Array],
    ):
        """The experts' outputs, each times its gate, summed; all experts are computed.

        `choose` makes a `Choice` of the activations of the neurons, act(x gate) * (x up), or
        act(x up) without a gate, and of act(x gate) alone; `inputs`, what gate and up read.
        """

        def project(name: str) -> Array:
            read_BLD = inputs(name).astype(x_BLD.dtype)
            h_BLEM = _neurons(*self._typed(read_BLD, self.vectors[name]), self.dtype)
            h_BLEM = checkpoint_name(h_BLEM, NEURONS)
            h_BLEM = _adapted(self.vectors, name, read_BLD, h_BLEM)
            bias = self.vectors.get(f"{name}_bias")
            if bias is None:
                return h_BLEM
            return h_BLEM + as_last(bias.reshape(h_BLEM.shape[2:]), h_BLEM)

        act = ACTIVATIONS[activation]
        gate_BLEM = act(project("gate" if "gate" in self.vectors else "up"))
        h_BLEM = gate_BLEM * project("up") if "gate" in self.vectors else gate_BLEM
        self.tap("ffn_input", x_BLD)
        self.tap("gate", gate_BLEM)
        self.tap("hidden", h_BLEM)
        scores_BLE, active_BLE, gates_BLE = choose(h_BLEM, gate_BLEM)
        if gates_BLE is not None:
            h_BLEM *= gates_BLE.astype(h_BLEM.dtype)[..., None]
        self.tap("down_reads", h_BLEM)
        operands = self._typed(h_BLEM, self.vectors["down"])
        y_BLD = jnp.einsum("BLEM,EMD->BLD", *operands, preferred_element_type=self.dtype)
        y_BLD = _adapted(self.vectors, "down", h_BLEM, y_BLD)
        return y_BLD, scores_BLE, active_BLE

    def _typed(self, x: Array, matrix: Any) -> tuple[Array, Array]:
        """Both in the type that they are multiplied in."""
        kind = matrix.dtype if self.as_held else self.dtype
        return x.astype(kind), matrix.astype(kind)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _neurons(x_BLD: Float[Array, "B L D"], w_EMD: Float[Array, "E M D"], dtype: Any) -> Array:
    """Each neuron's product with x, [B, L, E, M], of type `dtype`.

    The slope of w is a product of two arrays, one of which a CPU has to transpose. Einsum's own
    makes that the neurons', which are several times as many as D: a training step took a quarter
    longer.
    """
    return jnp.einsum("BLD,EMD->BLEM", x_BLD, w_EMD, preferred_element_type=dtype)


def _neurons_kept(x: Any, w: Any, dtype: Any) -> tuple[Array, tuple[Array | None, Array]]:
    """Keeps x for the slope of w, unless w is frozen."""
    return _neurons(x.value, w.value, dtype), (x.value if w.perturbed else None, w.value)


def _neurons_back(dtype: Any, kept: Any, slope_BLEM: Any) -> tuple[Array | None, Array | None]:
    del dtype
    if isinstance(slope_BLEM, SymbolicZero):
        return None, None
    x_BLD, w_EMD = kept
    slope_EMD = None
    if x_BLD is not None:
        slope_EMD = jnp.moveaxis(jnp.einsum("BLD,BLEM->DEM", x_BLD, slope_BLEM), 0, -1)
    return jnp.einsum("BLEM,EMD->BLD", slope_BLEM, w_EMD), slope_EMD


_neurons.defvjp(_neurons_kept, _neurons_back, symbolic_zeros=True)


def _adapted(weights: Weights, name: str, x_BLI: Array, y_BLO: Array) -> Array:
    """The product y of x with a matrix, and what its adapters add if it has some (lora.py)."""
    if f"{name}_a" not in weights:
        return y_BLO
    a_IA, b_AO = (weights[f"{name}_{part}"].astype(y_BLO.dtype) for part in "ab")
    inner_BLA = jnp.tensordot(x_BLI.astype(y_BLO.dtype), a_IA, a_IA.ndim - 1)
    return y_BLO + jnp.tensordot(inner_BLA, b_AO, 1)


@dataclasses.dataclass(frozen=True)
class Stack:
    """The weights of all layers, of which the kernels read one in place.

    Decoding reads one token a text (L = 1); where the kernels are as good with many, so do prompts.
    A scan that sliced the matrices layer by layer would copy them, idle experts too.
    """

    vectors: Weights  # norms and biases of one layer, which a scan may slice
    matrices: Weights  # of all layers, as `stacked` makes them
    layer: Array | int
    live_BL: Bool[Array, "B L"]  # tokens that want experts: not padding, nor of finished texts
    implementation: str = "auto"

    def tap(self, name: str, value: Array) -> None:
        """Nobody looks on."""

    def drop(self, x: Array) -> Array:
        """No dropout: decoding does not train."""
        return x

    def at(self, name: str) -> Stack:
        """Those of a part."""
        return dataclasses.replace(
            self, vectors=self.vectors.get(name, {}), matrices=self.matrices.get(name, {})
        )

    def embed(self, name: str, ids_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Rows of an embedding."""
        table_VD = self.matrices["embed"][name]
        x_RD = kernels.embed(ids_BL.reshape(-1), table_VD, implementation=self.implementation)
        return x_RD.reshape(*ids_BL.shape, -1)

    def head(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B 1 V"]:
        """As that of Slice, but of the last token alone, which the next is chosen by."""
        matrix, letters = _head(self.matrices)
        logits_BV = kernels.linear(
            x_BLD[:, -1], matrix, transposed=letters == "VD", implementation=self.implementation
        )
        return logits_BV[:, None]

    def linear(self, name: str, x_BLI: Array, exact: bool = False) -> Array:
        """As that of Slice."""
        kernel = self.matrices[name]["kernel"]
        if not exact or kernel.dtype.itemsize >= x_BLI.dtype.itemsize:
            return self._shaped(name, self._products((name,), x_BLI)[0], x_BLI, exact)
        x_1RI = x_BLI.reshape(1, math.prod(x_BLI.shape[:2]), -1)
        near_1RI = x_1RI.astype(kernel.dtype)
        rest_1RI = (x_1RI - near_1RI.astype(x_1RI.dtype)).astype(kernel.dtype)  # of rounding
        y_2RO = self._products((name,), jnp.concatenate([near_1RI, rest_1RI]))[0]
        return self._shaped(name, y_2RO[0] + y_2RO[1], x_BLI, exact)

    def linears(self, names: Sequence[str], x_BLI: Array) -> list[Array]:
        """As that of Slice, in one call where the kernels have one."""
        products = self._products(names, x_BLI)
        return [self._shaped(*of, x_BLI, exact=False) for of in zip(names, products, strict=True)]

    def _products(self, names: Sequence[str], x_BLI: Array) -> list[Array]:
        """The product with each kernel, float32 [B, L, O], outputs in one row."""
        x_RI = x_BLI.reshape(math.prod(x_BLI.shape[:2]), -1)
        matrices = [self.matrices[name]["kernel"] for name in names]
        ys_RO = kernels.linears(
            x_RI.astype(matrices[0].dtype),
            [
                w.reshape(w.shape[0], x_RI.shape[1], math.prod(w.shape[x_BLI.ndim - 1 :]))
                for w in matrices
            ],
            layer=self.layer,
            implementation=self.implementation,
        )
        return [y_RO.reshape(*x_BLI.shape[:2], -1) for y_RO in ys_RO]

    def _shaped(self, name: str, y_BLO: Array, x_BLI: Array, exact: bool) -> Array:
        """A product in the shape of the kernel's outputs, with its bias."""
        outputs = self.matrices[name]["kernel"].shape[1 + x_BLI.ndim - 2 :]
        y = y_BLO.astype(jnp.float32 if exact else x_BLI.dtype).reshape(*x_BLI.shape[:2], *outputs)
        bias = self.vectors.get(name, {}).get("bias")
        return y if bias is None else y + as_last(bias, y)

    def attend(self, q_BLHC, k_BLKC, v_BLKC, kv, visible_BLT, index, causal: bool = True):
        """Attention over a cache, to which the new tokens are added at `index`."""
        k_NBTKC, v_NBTKC = kv
        if q_BLHC.shape[1] > 1:
            here = (self.layer, jnp.int32(0), index, jnp.int32(0), jnp.int32(0))
            k_NBTKC, v_NBTKC = (
                jax.lax.dynamic_update_slice(cache, new[None], here)
                for cache, new in ((k_NBTKC, k_BLKC), (v_NBTKC, v_BLKC))
            )
            how = {"layer": self.layer, "end": index + q_BLHC.shape[1]}
            how["implementation"] = self.implementation
            y_BLHC = kernels.attend_many(q_BLHC, k_NBTKC, v_NBTKC, visible_BLT, **how)
            return y_BLHC, (k_NBTKC, v_NBTKC)
        y_BHC, k_NBTKC, v_NBTKC = kernels.attend(
            q_BLHC[:, 0],
            k_BLKC[:, 0],
            v_BLKC[:, 0],
            k_NBTKC,
            v_NBTKC,
            visible_BLT[:, 0],
            layer=self.layer,
            index=index,
            implementation=self.implementation,
        )
        return y_BHC[:, None], (k_NBTKC, v_NBTKC)

    def key(self) -> None:
        """No random choices: decoding does not train."""
        return None

    def experts(self, x_BLD: Float[Array, "B L D"], choose: Callable, activation: Activation, _):
        """The active experts' outputs summed; no other expert is read, and no gate but 0 and 1."""
        scores_BLE, active_BLE, _ = choose()
        neurons = {name: w for name, w in self.matrices.items() if name != "router"}
        shape = (*x_BLD.shape[:2], neurons["up"].shape[1])
        live_BLE = jnp.broadcast_to(self.live_BL[..., None], shape)
        used_BLE = live_BLE if active_BLE is None else live_BLE & active_BLE
        y_RD = kernels.sparse_ffn(
            x_BLD.reshape(-1, x_BLD.shape[2]),
            used_BLE.reshape(-1, shape[2]),
            neurons,
            activation=activation,
            layer=self.layer,
            implementation=self.implementation,
        )
        return y_RD.reshape(x_BLD.shape), scores_BLE, active_BLE


def stacked(config: ModelConfig, params: Weights, dtype: Any) -> tuple[Weights, Weights]:
    """The parameters as `Stack` wants them: vectors, and matrices with all layers stacked.

    A dense FFN is cut into blocks, all of them active: work for every thread of a CPU and every
    multiprocessor of a GPU. Routers are float32, or bfloat16 beside matrices of fewer bits, whose
    rounding has left them values of that (quantization.py).
    """
    rows = max(m for m in range(1, min(_DENSE_ROWS, config.d_ff) + 1) if config.d_ff % m == 0)
    vectors, matrices = {}, {}
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    small = any(isinstance(array, Quantized) for array in flat.values())
    for path, array in flat.items():
        row = BY_PATH[path]
        neurons = "EM" in row.letters
        if not (row.is_matrix or neurons):
            vectors[path] = array
            continue
        if isinstance(array, Quantized):
            matrices[path] = array
            continue
        if neurons and array.shape[1] == 1:
            array = array.reshape(array.shape[0], -1, rows, *array.shape[3:])
        own = jnp.bfloat16 if small else jnp.float32  # of routers
        matrices[path] = array.astype(own if is_router(path) else dtype)
    unflatten = functools.partial(traverse_util.unflatten_dict, sep="/")
    return unflatten(vectors), unflatten(matrices)


def _head(weights: Weights) -> tuple[Array | Quantized, str]:
    """The matrix of the head and its dimensions: the embedding where the two are tied."""
    if "kernel" in weights.get("lm_head", {}):
        return weights["lm_head"]["kernel"], "DV"
    return weights["embed"]["embedding"], "VD"
