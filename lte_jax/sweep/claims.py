"""What the paper says about methods, beside what a sweep has measured of them.

The paper's figures are of other models and texts, and most are plots without values: what can be
compared is which of two methods loses more. Figures and tables are those of arXiv 2402.06126; its
sparsities in Table 2 are of all weights, ours of the FFN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lte_jax.runs import with_spread
from lte_jax.sweep import results as gathering
from lte_jax.sweep.results import Entry

_BEYOND = 1000  # percent, or points: of more the number says nothing
ERRORS = 2  # standard errors that a difference has to exceed
SEARCHED = "LTE of the paper"  # the row with etas that configs/sweeps/paper.py finds
LTE = (SEARCHED, "paper's losses, our controller", "ours")
_LAMBDA = "paper's losses, lambda"


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one method loses more than another, or as much."""

    says: str
    worse: str  # name of a method in configs/sweeps/
    than: tuple[str, ...]  # names of others; each that there is makes a line
    alike: bool = False  # it says that there is no difference


CLAIMS = (
    Claim("noisy top-k softmax falls at little sparsity (Fig. 2)", "noisy top-k softmax", LTE),
    Claim("random groups are worse (Fig. 9)", "groups at random", ("groups by k-means", "ours")),
    Claim("k-means is like co-activation (Fig. 9)", "groups by k-means", ("ours",), alike=True),
    Claim("lambda 0 is worse than 0.5 (Fig. 11)", f"{_LAMBDA} 0", (f"{_LAMBDA} 0.5",)),
    Claim("lambda 1 gives no more (Fig. 11)", f"{_LAMBDA} 1", (f"{_LAMBDA} 0.5",), alike=True),
    Claim("random routers are worse (Fig. 12)", "random routers", LTE),
    Claim("sigma-MoE is worse (Fig. 13)", "sigma-MoE", LTE),
    Claim("Deja Vu, trained further, is worse (Fig. 13)", "Deja Vu", LTE),
    Claim(
        "Deja Vu falls from 30% on, takes for 0.5 of perplexity 7.92 GFLOPs, LTE 6.59 (Table 1)",
        "Deja Vu, untrained",
        LTE,
    ),
    Claim(
        "MoEfication falls from 70% on, takes on XSum 10.45 GFLOPs, LTE 5.38 (Table 1)",
        "MoEfication, ground truth (oracle)",
        LTE,
    ),
    Claim(
        "ReLU in place of GELU costs about 10% of accuracy on MRPC (text)",
        "dense, ReLU",
        ("dense, fine-tuned",),
    ),
    Claim(
        "Wanda at 50%: perplexity 6.87, LTE at 52% 5.95 (Table 2)",
        "Wanda, unstructured, untrained",
        LTE,
    ),
    Claim("Wanda 4:8: 8.17, LTE at 52% 5.95 (Table 2)", "Wanda, 4:8, untrained", LTE),
    Claim("Wanda 2:4: 10.82, LTE at 52% 5.95 (Table 2)", "Wanda, 2:4, untrained", LTE),
)


def differences(
    results: Mapping[str, Any], worse: str, than: str
) -> dict[float | None, dict[str, float | None]]:
    """Target -> by how much a method loses more than another, of the same seeds."""
    groups = gathering.by_method(results["runs"])
    dense = groups.get((results["dense"], None), {})
    found: dict[float | None, dict[str, float | None]] = {}
    for (method, target), seeds in groups.items():
        others: Mapping[int, Entry] = groups.get((than, target), {})
        if method == worse and (spread := gathering.spread(gathering.losses(seeds, dense, others))):
            found[target] = spread
    return found


def verdict(found: Sequence[Mapping[str, Any]], alike: bool) -> str:
    """Whether differences bear out a claim."""
    if any(difference["error"] is None for difference in found):
        return "one seed"
    beyond = {
        0 if abs(d["mean"]) <= ERRORS * d["error"] else 1 if d["mean"] > 0 else -1 for d in found
    }
    if beyond == ({0} if alike else {1}):
        return "as in the paper"
    if alike:
        return "not as in the paper"
    if 1 in beyond:
        return "not at every sparsity"
    return "no difference" if beyond == {0} else "the other way round, or no difference"


def table(results: Mapping[str, Any]) -> str:
    """The claims of which the results have both methods, as Markdown; "" if there are none."""
    unit = "" if "metrics" in results["runs"][0] else "%"
    lines = []
    for claim in CLAIMS:
        for other in claim.than:
            if not (found := differences(results, claim.worse, other)):
                continue
            told = "; ".join(
                f"{target:.0%}: {_number(d, unit)}" if target is not None else _number(d, unit)
                for target, d in found.items()
            )
            cells = claim.says, f"{claim.worse} against {other}", told
            lines.append(f"| {' | '.join(cells)} | {verdict([*found.values()], claim.alike)} |")
    if not lines:
        return ""
    return "\n".join(["| the paper | here | loses more by | |", "|---|---|---|---|", *lines]) + "\n"


def _number(difference: Mapping[str, Any], unit: str) -> str:
    if difference["mean"] > _BEYOND:
        return f"over {_BEYOND:,}{unit}"
    return with_spread(difference["mean"], difference["error"], "+.1f", unit)


def untested(results: Mapping[str, Any]) -> list[str]:
    """The claims of which the results have no pair of runs."""
    return [
        claim.says
        for claim in CLAIMS
        if not any(differences(results, claim.worse, other) for other in claim.than)
    ]
