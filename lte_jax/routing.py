"""The routings of LTE, and the names of all.

A router scores every expert for every token (Eq. 1). There are five routings of the same weights
(paper, section 4.2):

  dense             all experts run; the router is not used
  soft              all run, each multiplied by its score (Eq. 3)
  hard              those with score > threshold run, not multiplied (Eq. 2)
  straight_through  hard forward, soft gradient: scores train under the routing they are served with
  top_k             the (1 - target_sparsity) E experts of largest score, for comparison

The methods of others, in baselines/, have routings of their own.

Dimension key: B batch  E experts
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

from lte_jax import baselines
from lte_jax.config import LTEConfig, ModelConfig
from lte_jax.errors import UserError, nearest
from lte_jax.selection import Active, Choice, Largest, Routing, Scores, View


class Dense(Routing):
    """All experts run."""

    routed, by_threshold, served = False, False, "dense"

    def choose(self, view: View, threshold: Float[Array, ""] | float) -> Choice:
        """Nothing."""
        return Choice(None, None, None)


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


class TopK(Largest):
    """The experts of largest score: (1 - target_sparsity) E of them on average."""


KINDS: Mapping[str, type[Routing]] = {
    "dense": Dense,
    "soft": Soft,
    "hard": Hard,
    "straight_through": StraightThrough,
    "top_k": TopK,
    **baselines.ROUTINGS,
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
