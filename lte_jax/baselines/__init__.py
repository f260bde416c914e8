"""Methods of others, on the same model, data and steps as LTE: one file each.

A method is a change of an experiment (`Method.settings`), and what it needs for that: a routing, a
start for its routers, a grouping. So `train.py` and a sweep run it like any other experiment:

    from lte_jax import baselines
    baselines.METHODS["cats"].settings

What a method leaves out of its publication is said at the top of its file.
"""

from collections.abc import Mapping

from lte_jax.baselines import (
    cats,
    cmoe,
    d2dmoe,
    deja_vu,
    moefication,
    oracle,
    random_router,
    sigma_moe,
    softmax,
    static,
    teal,
    wanda,
    wina,
)
from lte_jax.baselines.method import Grouping, Pruner, Start
from lte_jax.baselines.method import Layer as Layer
from lte_jax.baselines.method import Method as Method
from lte_jax.selection import Routing

_FILES = (
    static, random_router, oracle, moefication, deja_vu, softmax, sigma_moe, d2dmoe, cmoe, cats,
    teal, wina, wanda,
)  # fmt: skip
METHODS: Mapping[str, Method] = {m.name: m for file in _FILES for m in file.METHODS}
ROUTINGS: Mapping[str, type[Routing]] = {
    name: routing for m in METHODS.values() for name, routing in m.routings.items()
}
STARTS: Mapping[str, Start] = {
    name: start for m in METHODS.values() for name, start in m.starts.items()
}
GROUPINGS: Mapping[str, Grouping] = {
    name: group for m in METHODS.values() for name, group in m.groupings.items()
}
PRUNERS: Mapping[str, Pruner] = {
    name: prune for m in METHODS.values() for name, prune in m.pruners.items()
}
