"""LTE beside the methods of others: the same model, stories, steps and report, three seeds.

    python -m lte_jax.sweep --config=configs/sweeps/methods.py --out=runs/methods --workers=2 \
        --config.source.path=FOLDER

FOLDER holds babyllama, as for configs/sweeps/tinystories.py. Each method of lte_jax/baselines/ has
a row in which the model adapts to it with as many steps as LTE takes and the same teacher, and, if
it needs no training, one as it is published. MoEfication starts from a model with ReLU, fine-tuned.
"ours" is the preset `ours`. "paper's losses, our controller" is the preset `paper`, its guard 0.25,
with one rate for routers and model; but our controller moves its weight eta, so that sparsities
match. What fixed etas give is searched by configs/sweeps/paper.py.

Cost:   not measured; 309 runs, of three minutes on one core if they train.
Expect: not measured.

Variants: ":quick" (`make comparison`), all methods at one target with one seed, 30 steps in place
of 300 and 64 records of validation text: shows what is far apart, the rest is noise. Estimated, not
measured: 39 runs, a quarter of an hour on two cores. ":smoke", one target, a few steps (a test).
"""

from lte_jax import baselines, config

NO_EXPERTS = ("stages.router.steps=0", "stages.adapt.steps=0")
# One step at a rate of 0: a run without steps would end with the dense model.
UNTRAINED = ("stages.adapt.steps=1", "stages.adapt.learning_rate=0.0")
PAPER = (*config.preset("paper"), "stages.router.router_lr_multiplier=1.0")
RANK = 32  # of Deja Vu's predictors: a quarter of babyllama's width


def get_sweep(arg=""):
    words = config.variants(arg, "quick", "smoke")
    smoke, quick = "smoke" in words, "quick" in words
    steps = 8 if smoke else 30 if quick else 300  # of the router stage and of adaptation together
    tuned = ("stages.finetune.learning_rate=1e-4", f"stages.finetune.steps={steps}")
    spared = ("sample_tokens=0", "latency_rounds=0", "eval_every=1000", "checkpoint.keep_last=1")
    spared += ("checkpoint.keep_best=0", "checkpoint.keep_finished=False")
    if not smoke:
        spared += (f"data.max_validation_records={64 if quick else 2000}",)
    if quick and not smoke:
        spared += ("stages.router.steps=24", "stages.adapt.steps=6", "data.max_documents=2000")
    return config.Sweep(
        config=f"configs/tinystories.py:babyllama{',smoke' * smoke}",
        methods={
            "dense, untouched": config.Row(NO_EXPERTS, targets=()),
            "dense, fine-tuned": config.Row((*NO_EXPERTS, *tuned), targets=()),
            "dense, ReLU": config.Row((*NO_EXPERTS, *tuned, "source.activation=relu"), targets=()),
            "ours": config.Row(),
            "paper's losses, our controller": config.Row((*PAPER, "lte.separability_eps=0.25")),
            **dict(row for method in baselines.METHODS.values() for row in rows(method, steps)),
        },
        targets=(0.5,) if smoke else (0.75,) if quick else (0.5, 0.75, 0.9),
        seeds=(0,) if words else (0, 1, 2),
        overrides=spared,
        reference="ours",
    )


def rows(method, steps):
    """Name and row of each way to run a method."""
    settings = {**method.settings}
    if method.name == "deja_vu":
        settings["lte.router_rank"] = RANK
    own = tuple(f"{key}={value}" for key, value in settings.items())
    more = {"oracle": method.oracle}
    if method.name.startswith("moefication"):
        more["after"] = "dense, ReLU"
    if any(part in method.name for part in ("2_4", "4_8")):
        more["targets"] = (0.5,)
    if method.trains_router:
        yield method.title, config.Row(own, **more)
        return
    frozen = ("stages.router.steps=0", f"stages.adapt.steps={steps}")
    frozen += ("stages.adapt.learning_rate=5e-4",)
    yield method.title, config.Row((*own, *frozen), **more)
    untrained = (*own, "stages.router.steps=0", *UNTRAINED)
    yield f"{method.title}, untrained", config.Row(untrained, **more)
