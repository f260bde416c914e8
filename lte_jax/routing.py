"""Which experts run for a token: one class for each way of choosing, and nothing else knows them.

A router scores every expert for every token (Eq. 1). Five routings of the same weights (paper,
section 4.2):

  dense             all experts run; the router plays no part
  soft              all run, each multiplied by its score (Eq. 3)
  hard              those with score > threshold run, unmultiplied (Eq. 2)
  straight_through  hard forward, soft gradient: scores learn under the routing they will serve
  top_k             the (1 - target_sparsity) E experts of largest score, for comparisons

A method that chooses by activations, not by router score, is another subclass of `Routing`, whose
`scores` are made of the neurons.

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
    """From scores to the experts that run, and what each is multiplied by; here: hard routing."""

    routed: ClassVar[bool] = True  # whether experts are chosen at all
    skips: ClassVar[bool] = True  # whether idle experts add nothing, so that none need be read
    by_threshold: ClassVar[bool] = True  # whether the threshold decides, so that control steers it
    reads_neurons: ClassVar[bool] = False  # whether scores are made of all neurons' activations
    served: ClassVar[str] = "hard"  # what a model trained so is validated and served with

    def scores(self, logits: Callable[[], Scores], h_BLEM: Float[Array, "*B E M"] | None) -> Scores:
        """A score for each expert, float32; called with the router, and the neurons' activations.

        `h_BLEM` is None in a kernel that reads active experts only, unless `reads_neurons`.
        """
        del h_BLEM
        return jax.nn.sigmoid(logits())

    def active(self, scores_BLE: Scores, threshold: Float[Array, ""] | float) -> Active:
        """The experts that run."""
        return scores_BLE > threshold

    def gates(self, scores_BLE: Scores, active_BLE: Active) -> Scores:
        """What the contribution of each expert is multiplied by."""
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
    """Hard going forward; the gradient is that of soft routing."""

    def gates(self, scores_BLE: Scores, active_BLE: Active) -> Scores:
        """0 or 1, with the gradient of the scores."""
        ones_BLE = active_BLE.astype(scores_BLE.dtype)
        return jax.lax.stop_gradient(ones_BLE - scores_BLE) + scores_BLE


@dataclasses.dataclass(frozen=True)
class TopK(Routing):
    """The `count` experts of largest score run; of equal scores, those of lowest index."""

    by_threshold, served = False, "top_k"
    count: int

    def active(self, scores_BLE: Scores, threshold: Float[Array, ""] | float) -> Active:
        """Exactly `count` for each token."""
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
    """The routing of this name, or the object itself; None: `lte.routing`.

    Of a dense model (`lte` None) all neurons run, whatever is asked for.

    Raises:
      UserError: on a name that is none, and on "top_k" without `lte.target_sparsity`.
    """
    if isinstance(routing, Routing):
        return routing
    kind(routing)
    if lte is None:
        return Dense()
    chosen = kind(lte.routing if routing is None else routing)
    if chosen is not TopK:
        return chosen()
    kept = 1.0 - lte.wanted_sparsity("routing='top_k'")
    return TopK(max(1, round(kept * num_experts(config, lte))))


def kind(name: str | None) -> type[Routing]:
    """The class of this name; of None, Hard.

    Raises:
      UserError: on a name that is none.
    """
    if name is not None and (not isinstance(name, str) or name not in KINDS):
        raise UserError(f"routing={name!r}: {nearest(str(name), KINDS)}")
    return Hard if name is None else KINDS[name]


def largest(x_BE: Float[Array, "*B E"], count: int) -> Active:
    """Where the `count` largest values of each row stand; of equal ones, those of lowest index."""
    return first_largest(x_BE, jax.lax.top_k(x_BE, count)[0][..., -1:], count)


def first_largest(
    x_BE: Float[Array, "*B E"], least_B1: Float[Array, "*B 1"], count: Int[Array, "*B 1"] | int
) -> Active:
    """`largest`, where the smallest of the values that are kept is known already."""
    above_BE, equal_BE = x_BE > least_B1, x_BE == least_B1
    room_B1 = count - jnp.sum(above_BE, axis=-1, keepdims=True, dtype=jnp.int32)
    return above_BE | (equal_BE & (jnp.cumsum(equal_BE, axis=-1, dtype=jnp.int32) <= room_B1))
