"""What a routing is: which experts run for a token, and how much each counts.

The routings of LTE are in routing.py, those of other methods in baselines/: each is a subclass of
`Routing` that says where scores come from and how they decide.

Dimension key: B batch  L length  D model width  E experts  M neurons per expert
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lte_jax.config import LTEConfig, ModelConfig

Scores = Float[Array, "*B E"]
Active = Bool[Array, "*B E"]


@dataclasses.dataclass(frozen=True)
class View:
    """What a routing may look at in one layer; what it does not look at is not computed."""

    x_BLD: Float[Array, "*B D"]  # the FFN's input
    logits: Callable[[], Scores]  # of the router, float32
    weights: Mapping[str, Any]  # the FFN's; in kernels only its vectors
    # None in kernels, which read active experts only, unless the routing `reads_neurons`:
    h_BLEM: Float[Array, "*B E M"] | None = None  # activations: act(x gate) * (x up)
    gate_BLEM: Float[Array, "*B E M"] | None = None  # act(x gate) alone
    key: Callable[[], Array | None] = lambda: None  # of random numbers; None but in training


class Choice(NamedTuple):
    """What a routing decides for each token."""

    scores: Scores | None  # float32, in [0, 1] if a threshold decides
    active: Active | Float[Array, "*B P"] | None  # experts that run, or shares of parts that do
    gates: Scores | None  # the factor of each expert's contribution


@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts run, given their scores, and the gate of each; the base class is hard."""

    routed: ClassVar[bool] = True  # whether experts are chosen at all
    skips: ClassVar[bool] = True  # whether idle experts add nothing and need not be read
    weighs: ClassVar[bool] = False  # whether gates are more than 0 and 1, which kernels do not know
    by_threshold: ClassVar[bool] = True  # whether the threshold decides, so it can be steered
    reads_neurons: ClassVar[bool] = False  # whether scores come from all neurons' activations
    random: ClassVar[bool] = False  # whether training asks for random numbers
    keeps_zeros: ClassVar[bool] = False  # whether weights of the FFN that are zero stay so
    reads_weights: ClassVar[bool] = False  # whether it looks at values of the FFN's matrices
    served: ClassVar[str] = "hard"  # routing for validation and serving after training with this

    @classmethod
    def of(cls, config: ModelConfig, lte: LTEConfig) -> Routing:
        """The routing of this kind for a model with experts."""
        del config, lte
        return cls()

    def inputs(self, view: View, matrix: str) -> Float[Array, "*B D"]:
        """What the `matrix`, gate or up, reads in place of the FFN's input."""
        del matrix
        return view.x_BLD

    @staticmethod
    def router_input(x_BLD: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """What the router reads in place of the FFN's input."""
        return x_BLD

    @staticmethod
    def ffn_weights(config: ModelConfig, sparsity: float) -> float:
        """Weights of one FFN, without its router, that a token reads at this sparsity."""
        return (3 if config.gated else 2) * config.d_model * config.d_ff * (1.0 - sparsity)

    def scores(self, view: View) -> Scores:
        """A float32 score per expert."""
        return jax.nn.sigmoid(view.logits())

    def active(self, scores_BLE: Scores, threshold: Float[Array, ""] | float) -> Active:
        """The experts that run."""
        return scores_BLE > threshold

    def gates(self, scores_BLE: Scores, active_BLE: Active) -> Scores:
        """The factor of each expert's contribution."""
        return active_BLE.astype(scores_BLE.dtype)

    def choose(self, view: View, threshold: Float[Array, ""] | float) -> Choice:
        """Scores, active experts and gates."""
        scores_BLE = self.scores(view)
        active_BLE = self.active(scores_BLE, threshold)
        return Choice(scores_BLE, active_BLE, self.gates(scores_BLE, active_BLE))


@dataclasses.dataclass(frozen=True)
class Largest(Routing):
    """The experts of largest score: `count` of them, one `more` for that share of the tokens.

    So the mean number is any that is asked for, also where experts are few: half of 11 are 5 for
    one half of the tokens and 6 for the other. Which tokens have one more is left to low digits of
    a ratio of scores, as good as chance and the same at any time. Ties go to the lowest index.
    """

    by_threshold: ClassVar[bool] = False
    served: ClassVar[str] = "top_k"
    count: int
    more: float = 0.0

    @classmethod
    def of(cls, config: ModelConfig, lte: LTEConfig) -> Largest:
        """As many experts as `lte.target_sparsity` leaves on average, at least one."""
        kept = 1.0 - lte.wanted_sparsity(f"routing={cls.served!r}")
        number = max(1.0, kept * (config.d_ff // lte.expert_size))
        whole = math.floor(number + 1e-6)  # 0.1 of 10 may be 0.9999999 of an expert
        return cls(whole, max(0.0, number - whole))

    def active(self, scores_BLE: Scores, threshold: Float[Array, ""] | float) -> Active:
        """So many of each token."""
        del threshold
        if self.more < 1e-6:
            return largest(scores_BLE, self.count)
        top_BK = jax.lax.top_k(scores_BLE, self.count + 1)[0]
        last_B1, next_B1 = top_BK[..., -2:-1], top_BK[..., -1:]
        ratio_B1 = next_B1 / jnp.where(last_B1 == 0, 1.0, last_B1)  # of any scale of the scores
        extra_B1 = (jnp.mod(1021.0 * ratio_B1, 1.0) < self.more).astype(jnp.int32)
        least_B1 = jnp.where(extra_B1 > 0, next_B1, last_B1)
        return first_largest(scores_BLE, least_B1, self.count + extra_B1)


def largest(x_BE: Float[Array, "*B E"], count: int) -> Active:
    """True at the `count` largest values of each row; ties go to the lowest index."""
    # Not the last of them: on a CPU, XLA makes a slice of them a sort of everything.
    least_B1 = jnp.min(jax.lax.top_k(x_BE, count)[0], axis=-1, keepdims=True)
    return first_largest(x_BE, least_B1, count)


def first_largest(
    x_BE: Float[Array, "*B E"], least_B1: Float[Array, "*B 1"], count: Int[Array, "*B 1"] | int
) -> Active:
    """`largest`, given the smallest value that is kept."""
    above_BE, equal_BE = x_BE > least_B1, x_BE == least_B1
    room_B1 = count - jnp.sum(above_BE, axis=-1, keepdims=True, dtype=jnp.int32)
    return above_BE | (equal_BE & (jnp.cumsum(equal_BE, axis=-1, dtype=jnp.int32) <= room_B1))


def contribution(
    h_BLEM: Float[Array | np.ndarray, "*B E M"], down_EMD: Float[Array | np.ndarray, "E M D"]
) -> Float[Array, "*B E"]:
    """The L2 norm of what each expert adds to the residual stream."""
    highest = jax.lax.Precision.HIGHEST
    # By the Gram matrix, which avoids an array [.., E, D].
    gram_EMK = jnp.einsum("EMD,EKD->EMK", down_EMD, down_EMD, precision=highest)
    squared_BLE = jnp.einsum("...EM,EMK,...EK->...E", h_BLEM, gram_EMK, h_BLEM, precision=highest)
    return jnp.sqrt(jnp.maximum(squared_BLE, 0.0))


def as_last(vector: Array, x: Array) -> Array:
    """`vector` in x's type, with axes before its own for all that x has more."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - vector.ndim) + vector.shape)
