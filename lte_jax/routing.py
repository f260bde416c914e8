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

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float

from lte_jax import baselines, checks
from lte_jax.config import LTEConfig, ModelConfig, threshold_at
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
    """Hard in the forward pass, with the gradient of soft routing.

    That of scores moved so that the threshold is one half, where the sigmoid is steepest: far from
    it, experts next to the threshold would hardly learn.
    """

    def choose(self, view: View, threshold: Float[Array, ""] | float) -> Choice:
        """Gates of 0 or 1, with the gradient of the scores."""
        logits_BLE = view.logits()
        scores_BLE = jax.nn.sigmoid(logits_BLE)
        active_BLE = self.active(scores_BLE, threshold)
        centred_BLE = jax.nn.sigmoid(logits_BLE - jax.scipy.special.logit(threshold))
        ones_BLE = active_BLE.astype(scores_BLE.dtype)
        gates_BLE = jax.lax.stop_gradient(ones_BLE - centred_BLE) + centred_BLE
        return Choice(scores_BLE, active_BLE, gates_BLE)


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


def dial(
    lte: LTEConfig | None,
    routing: Routing | str | None,
    threshold: Any,
    sparsity: float | Any,
) -> Any:
    """`threshold`, or that at which the share `sparsity` of experts is skipped, by `lte.curve`.

    Raises:
      UserError: on a sparsity that is no number, or that the model has no threshold for; if both
        are given; with a routing that no threshold decides.
    """
    if sparsity is None:
        return threshold
    if threshold is not None:
        raise UserError(f"threshold={threshold} and sparsity={sparsity}: expected one of them")
    if not checks.is_number(sparsity):
        raise UserError(
            f"sparsity={sparsity!r}: expected a number, such as 0.7 for 70% of experts skipped"
        )
    if lte is None:
        raise UserError(f"sparsity={sparsity}: a dense model runs all neurons: expected experts")
    how = routing if isinstance(routing, Routing) else kind(routing or lte.routing)
    if not how.by_threshold:
        raise UserError(
            f"sparsity={sparsity}: no threshold decides under routing "
            f"{routing or lte.routing!r}; its sparsity is lte.target_sparsity"
        )
    return threshold_at(lte, sparsity)


def dials(
    name: str | None,
    lte: LTEConfig | None,
    routing: Routing | str | None,
    threshold: float | Any,
    sparsity: float | Sequence[float] | Any,
) -> dict[str, float | Any]:
    """Thresholds of a model to measure, by its name; of several sparsities, one each, see `dial`.

    Without a name it is "LTE", or "dense" without experts.

    Raises:
      UserError: as `dial` does; if a sparsity is there twice.
    """
    name = name or ("dense" if lte is None else "LTE")
    if not isinstance(sparsity, list | tuple):
        return {name: dial(lte, routing, threshold, sparsity)}
    found = {s: dial(lte, routing, threshold, s) for s in sparsity}
    if not sparsity or len(found) < len(sparsity):
        raise UserError(f"sparsity={sparsity}: expected one or more, each once")
    return {f"{name}, {100 * s:g}%": chosen for s, chosen in found.items()}


def kind(name: str | None) -> type[Routing]:
    """The class with this name; None: Hard.

    Raises:
      UserError: on an unknown name.
    """
    if name is not None and (not isinstance(name, str) or name not in KINDS):
        raise UserError(f"routing={name!r}: {nearest(str(name), KINDS)}")
    return Hard if name is None else KINDS[name]
