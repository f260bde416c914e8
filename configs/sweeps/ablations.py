"""What each part of the preset `ours` is worth: one change at a time, on babyllama, at 75%.

    python -m lte_jax.sweep --config=configs/sweeps/ablations.py --out=runs/ablations --workers=2 \
        --config.source.path=FOLDER
    python -m lte_jax.sweep.search runs/ablations/results.json --targets=0.75

FOLDER holds babyllama, as for configs/sweeps/tinystories.py. Each row is `ours` with what its name
says; a value that `ours` has already has no row. Two changes do not come alone. A router of two
layers with a function between starts at random, so it stands beside "routers start at random". A
fixed efficiency weight leaves ridge routers no target to start from, so it stands beside "routers
start open"; it has the sparsity that it happens to reach, and the second command reads the quality
at 75% between two weights. Expert sizes divide babyllama's 352 neurons, as 64 does not. Without a
row, as no key sets them: a threshold that does not move, the union over a batch.

Cost:   93 runs, not measured; 87 of them train for 300 steps with experts, three minutes each on
        one core (experts of 1 take longer).
Expect: not measured.

Variant: ":smoke", one seed, a few steps (a test).
"""

from lte_jax import config

NO_EXPERTS = ("stages.router.steps=0", "stages.adapt.steps=0")
# Key of config.LTEConfig -> value -> name of its row.
VALUES = {
    "grouping": {
        "coactivation": "groups by co-activation",
        "kmeans": "groups by k-means",
        "random": "groups at random",
    },
    "router_init": {
        "ridge": "routers start from ridge",
        "normal": "routers start at random",
        "open": "routers start open",
    },
    "stage1_routing": {"straight_through": "straight-through", "soft": "soft router stage"},
    "distill_weight": {0.0: "no distillation", 1.0: "distillation only"},
    "hidden_distill_weight": {x: f"hidden distillation {x:g}" for x in (0.0, 1.0, 2.0, 4.0)},
    "refit": {True: "down projections refitted", False: "not refitted"},
    "expert_size": {m: f"experts of {m}" for m in (1, 8, 16, 32, 44, 88)},
    "per_layer": {False: "all layers together", True: "each layer by itself"},
    "threshold": {tau: f"tau {tau}" for tau in (0.3, 0.5, 0.7)},
}
# With its best rate (docs/log.md, 2026-11-30); the routers' is that of `ours`.
ADAMW = ("optim.name=adamw", "stages.router.learning_rate=7e-4", "stages.adapt.learning_rate=1e-4")
ADAMW += ("stages.router.router_lr_multiplier=4.0", "stages.router.final_lr_ratio=0.1")
GUARDS = (0.01, 0.25)  # of the separability loss, which is at most 1 / guard
ETAS = (0.25, 0.5, 1.0, 2.0)


def get_sweep(arg=""):
    smoke = "smoke" in config.variants(arg, "smoke")
    steps = 8 if smoke else 300  # of the router stage and of adaptation together
    router, adapt = (6, 2) if smoke else (240, 60)
    tuned = ("stages.finetune.learning_rate=1e-4", f"stages.finetune.steps={steps}")
    earlier = (f"stages.router.steps={router}", f"stages.adapt.steps={adapt}")
    two_layers = ("lte.router=two_layer", "lte.router_activation=relu", "lte.router_rank=32")
    spared = config.QUALITY_ONLY
    return config.Sweep(
        config=f"configs/tinystories.py:babyllama{',smoke' * smoke}",
        methods={
            "dense, untouched": config.Row(NO_EXPERTS, targets=()),
            "dense, fine-tuned": config.Row((*NO_EXPERTS, *tuned), targets=()),
            "ours": config.Row(),
            **changed(),
            **{f"separability 0.5, guard {eps}": config.Row(separable(eps)) for eps in GUARDS},
            "low-rank routers": config.Row(("lte.router=two_layer", "lte.router_rank=4")),
            "two-layer routers at random": config.Row((*two_layers, "lte.router_init=normal")),
            "shorter router stage": config.Row(earlier),
            "AdamW": config.Row(ADAMW),
            **{f"fixed eta {eta:g}": config.Row(fixed(eta), targets=()) for eta in ETAS},
        },
        targets=(0.75,),
        seeds=(0,) if smoke else (0, 1, 2),
        overrides=spared if smoke else (*spared, "data.max_validation_records=2000"),
        reference="ours",
    )


def changed():
    """A row for each of VALUES that `ours` does not have."""
    return {
        name: config.Row((f"lte.{key}={value}",))
        for key, values in VALUES.items()
        for value, name in values.items()
        if value != getattr(config.PRESETS["ours"], key)
    }


def separable(guard):
    """The overrides of the separability loss with the paper's weight."""
    return "lte.separability_weight=0.5", f"lte.separability_eps={guard}"


def fixed(eta):
    """The overrides of an efficiency weight that no controller moves."""
    return "lte.router_init=open", "lte.target_sparsity=None", f"lte.efficiency_weight={eta:g}"
