"""The names of activations, routings, routers and groupings that a configuration may hold.

What they mean is said where they are made: routing.py, router_init.py, moefication.py, baselines/.
"""

from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Remat = Literal[False, True, "dots_with_no_batch_dims_saveable", "dots_saveable"]
RoutingName = Literal[
    "dense", "soft", "hard", "straight_through", "top_k",
    # of baselines/:
    "oracle_neurons", "oracle_experts", "activations", "top_k_unit", "softmax", "sigma",
    "dynamic_k", "representative", "cats", "teal", "wina", "pruned", "static",
]  # fmt: skip
RouterStart = Literal[
    "ridge", "normal", "open",
    # of baselines/:
    "removal", "similar", "trained", "deja_vu", "norms", "representative", "quantile", "quantiles",
    "wanda", "wanda_2_4", "wanda_4_8",
]  # fmt: skip
Grouping = Literal["kmeans", "coactivation", "random", "cmoe"]
RouterKind = Literal["linear", "two_layer", "glu", "constant", "cuts", "none"]
RouterActivation = Literal["none", "relu", "tanh", "gelu"]
