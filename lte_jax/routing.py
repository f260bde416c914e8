"""Which experts run for a token: one `Routing` class per way of choosing them.

A router scores every expert for every token (Eq. 1). There are five routings of the same weights
(paper, section 4.2):

  dense             all experts run; the router is not used
  soft              all run, each multiplied by its score (Eq. 3)
  hard              those with score > threshold run, not multiplied (Eq. 2)
  straight_through  hard forward, soft gradient: scores train under the routing they are served with
  top_k             the (1 - target_sparsity) E experts of largest score, for comparison

A method that chooses by activations instead of router scores is another subclass, whose `scores`
come from the neurons.

Dimension key: B batch  L length  E experts  M neurons per expert
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lte_jax.config import LTEConfig, ModelConfig, num_experts
from lte_jax.errors import UserError, nearest

Scores = Float[Array, "*B E"]
Active = Bool[Array, "*B E"]


@dataclasses.dataclass(frozen=True)
class Routing:
    """Which experts run, given their scores, and the gate of each; the base class is hard."""

    routed: ClassVar[bool] = True  # whether experts are chosen at all
    skips: ClassVar[bool] = True  # whether idle experts add nothing and need not be read
    by_threshold: ClassVar[bool] = True  # whether the threshold decides, so it can be steered
    reads_neurons: ClassVar[bool] = False  # whether scores come from all neurons' activations
    served: ClassVar[str] = "hard"  # routing for validation and serving after training with this

    @classmethod
    def of(cls, config: ModelConfig, lte: LTEConfig) -> Routing:
        """The routing of this kind for a model with experts."""
        del config, lte
        return cls()

    def scores(self, logits: Callable[[], Scores], h_BLEM: Float[Array, "*B E M"] | None) -> Scores:
        """A float32 score per expert, from the router's `logits` or the neurons' activations.

        `h_BLEM` is None in kernels, which read only active experts, unless `reads_neurons`.
        """
        del h_BLEM
        return jax.nn.sigmoid(logits())

    def active(self, scores_BLE: Scores, threshold: Float[Array, ""] | float) -> Active:
        """The experts that run."""
        return scores_BLE > threshold

    def gates(self, scores_BLE: Scores, active_BLE: Active) -> Scores:
        """The factor of each expert's contribution."""
        return active_BLE.astype(scores_BLE.dtype)


class Dense(Routing):
    """All experts run."""

    routed, by_threshold, served = False, False, "dense"


class Hard(Routing):
    """The experts with a score strictly above the threshold run (Eq. 2)."""


class Soft(Routing):
    """All experts run, each multiplied by its score (Eq. 3)."""

    skips = False

    def gates(self, scores_BLE: Scores, active_BLE: Active) -> Scores:
        """The scores themselves."""
        del active_BLE
        return scores_BLE


class StraightThrough(Routing):
    """Hard in the forward pass, with the gradient of soft routing."""

    def gates(self, scores_BLE: Scores, active_BLE: Active) -> Scores:
        """0 or 1, with the gradient of the scores."""
        ones_BLE = active_BLE.astype(scores_BLE.dtype)
        return jax.lax.stop_gradient(ones_BLE - scores_BLE) + scores_BLE


@dataclasses.dataclass(frozen=True)
class TopK(Routing):
    """The `count` experts of largest score run; ties go to the lowest index."""

    by_threshold, served = False, "top_k"
    count: int

    @classmethod
    def of(cls, config: ModelConfig, lte: LTEConfig) -> TopK:
        """As many experts as `lte.target_sparsity` leaves, at least one."""
        kept = 1.0 - lte.wanted_sparsity("routing='top_k'")
        return cls(max(1, round(kept * num_experts(config, lte))))

    def active(self, scores_BLE: Scores, threshold: Float[Array, ""] | float) -> Active:
        """Exactly `count` per token."""
        del threshold
        return largest(scores_BLE, self.count)


KINDS: Mapping[str, type[Routing]] = {
    "dense": Dense,
    "soft": Soft,
    "hard": Hard,
    "straight_through": StraightThrough,
    "top_k": TopK,
}


def make(routing: Routing | str | None, config: ModelConfig, lte: LTEConfig | None) -> Routing:
    """The routing with this name, or the object itself; None: `lte.routing`.

    A dense model (`lte` None) always runs all neurons.

    Raises:
      UserError: on an unknown name, and on "top_k" without `lte.target_sparsity`.
    """
    if isinstance(routing, Routing):
        return routing
    kind(routing)
    if lte is None:
        return Dense()
    return kind(lte.routing if routing is None else routing).of(config, lte)


def kind(name: str | None) -> type[Routing]:
    """The class with this name; None: Hard.

    Raises:
      UserError: on an unknown name.
    """
    if name is not None and (not isinstance(name, str) or name not in KINDS):
        raise UserError(f"routing={name!r}: {nearest(str(name), KINDS)}")
    return Hard if name is None else KINDS[name]


def largest(x_BE: Float[Array, "*B E"], count: int) -> Active:
    """True at the `count` largest values of each row; ties go to the lowest index."""
    return first_largest(x_BE, jax.lax.top_k(x_BE, count)[0][..., -1:], count)


def first_largest(
    x_BE: Float[Array, "*B E"], least_B1: Float[Array, "*B 1"], count: Int[Array, "*B 1"] | int
) -> Active:
    """`largest`, given the smallest value that is kept."""
    above_BE, equal_BE = x_BE > least_B1, x_BE == least_B1
    room_B1 = count - jnp.sum(above_BE, axis=-1, keepdims=True, dtype=jnp.int32)
    return above_BE | (equal_BE & (jnp.cumsum(equal_BE, axis=-1, dtype=jnp.int32) <= room_B1))
