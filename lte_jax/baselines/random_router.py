"""Random frozen routers: the experts of largest random logit; the model adapts to them.

The LTE paper, Figure 12.
"""

from __future__ import annotations

from lte_jax.baselines.method import Method

METHODS = (
    Method(
        "random",
        "random routers",
        "LTE paper, Fig. 12",
        {"lte.router_init": "normal", "lte.routing": "top_k"},
    ),
)
