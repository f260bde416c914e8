"""LTE beside the methods of others: the same model, stories, steps and report, three seeds.

    python -m lte_jax.sweep --config=configs/sweeps/methods.py --out=runs/methods --workers=2 \
        --config.source.path=FOLDER

FOLDER holds babyllama, as for configs/sweeps/tinystories.py. Each method of lte_jax/baselines/ has
a row in which the model adapts to it with as many steps as LTE takes, and what else LTE has: the
teacher, the distance of hidden states, the optimizer, down projections refitted before the first
step (where weights are not pruned). What differs is how experts or neurons are chosen. A method
that needs no training has a row as it is published, too. MoEfication starts from a model with
ReLU, fine-tuned. "ours" is the preset `ours`, at its rate of RATES. "paper's losses, our
controller" is the preset `paper`, its guard 0.25, with AdamW and one rate for routers and model;
but our controller moves its weight eta, so that sparsities match. What fixed etas give is searched
by configs/sweeps/paper.py.

":rates" is another grid, which chose RATES: every row that trains, at three learning rates, at 75%,
one seed, on held-out training stories, which no other grid reports. Its 63 runs are in
benchmarks/sweeps/rates.json. The table has these rates at 50 and 90%, too, for all methods alike;
at 50% lower ones are better, for all that were tried: ":rates,half" does that, and its first 14
runs, of six methods and ours, are in benchmarks/sweeps/rates_half.json (docs/log.md). The table's
own runs are in benchmarks/sweeps/methods.json: with --known=benchmarks/sweeps/methods.json a
changed grid makes only what is new (with --config.source.path=models/babyllama and a mirror that
holds the model there).

Cost:   309 runs, of two to four minutes on one core if they train, of half a minute if not: some
        ten hours of one core. ":rates": 63 runs, two hours.
Expect: ":rates": ours 2.575, Deja Vu 2.577, CATS 2.475, static removal 2.711, random routers 2.782
        at 75% (dense, fine-tuned: 2.308). The table: dense 2.180; ours 2.318, 2.415
        and 2.561 at 50, 75 and 90%. Beside ours at as many FLOPs Deja Vu loses 2.1 to 2.8% more,
        CATS 0.4% less at 50%, as much at 75% and 1.8% more at 90%, Wanda's pruned weights 2.1 to
        3.2% less at 50%, 1.4 and 21% more at 75 and 90%, all others at least 2.5%.

Variants: ":rates"; ":quick" (`make comparison`), all methods at one target with one seed, 30 steps
in place of 300 and 64 records of validation text: shows what is far apart, the rest is noise.
Estimated, not measured: 39 runs, a quarter of an hour on two cores. ":smoke", one target, a few
steps (a test).
"""

from lte_jax import baselines, config

NO_EXPERTS = ("stages.router.steps=0", "stages.adapt.steps=0")
# One step at a rate of 0: a run without steps would end with the dense model.
UNTRAINED = ("stages.adapt.steps=1", "stages.adapt.learning_rate=0.0", "lte.refit=False")
# AdamW's rate as in configs/tinystories.py:paper.
PAPER = (*config.preset("paper"), "stages.router.router_lr_multiplier=1.0", "optim.name=adamw")
PAPER += ("stages.router.learning_rate=5e-4", "stages.router.final_lr_ratio=0.1")
PAPER += ("lte.separability_eps=0.25",)
RANK = 32  # of Deja Vu's predictors: a quarter of babyllama's width
TRIED = (7e-4, 2e-3, 5e-3)  # peak learning rates
FINETUNE, OURS = "fine-tuning", "ours"  # in RATES
# The best of those; of fine-tuning, of a tenth of them. Not listed: 2e-3.
RATES = {FINETUNE: 7e-5, "oracle_neurons": 7e-4, "wanda_2_4": 7e-4, "wanda_4_8": 7e-4}
RATES |= dict.fromkeys(("random", "softmax", "d2dmoe", "teal", "wina"), 5e-3)
RATE = 2e-3


def get_sweep(arg=""):
    words = config.variants(arg, "rates", "half", "quick", "smoke")
    smoke, quick, rates = ("smoke" in words, "quick" in words, "rates" in words)
    tried = (0.5,) if "half" in words else (0.75,)
    steps = 8 if smoke else 30 if quick else 300  # of the router stage and of adaptation together
    spared = config.QUALITY_ONLY
    spared += ("data.validation=",) if rates else ()  # validates on a part of the training text
    if not smoke:
        spared += (f"data.max_validation_records={64 if quick else 2000}",)
    if quick and not smoke:
        spared += ("stages.router.steps=24", "stages.adapt.steps=6", "data.max_documents=2000")
    return config.Sweep(
        config=f"configs/tinystories.py:babyllama{',smoke' * smoke}",
        methods={
            "dense, untouched": config.Row(NO_EXPERTS, targets=()),
            "dense, fine-tuned": config.Row(finetuned(steps), targets=()),
            "dense, ReLU": config.Row((*finetuned(steps), "source.activation=relu"), targets=()),
            **(trials(steps) if rates else compared(steps)),
        },
        targets=(0.5,) if smoke else tried if quick or rates else (0.5, 0.75, 0.9),
        seeds=(0,) if words else (0, 1, 2),
        overrides=spared,
        reference="" if rates else OURS,
    )


def finetuned(steps, rate=None):
    """The overrides of dense fine-tuning."""
    rate = rate or RATES[FINETUNE]
    return (*NO_EXPERTS, f"stages.finetune.steps={steps}", f"stages.finetune.learning_rate={rate}")


def compared(steps):
    """The rows of the table."""
    rows = {OURS: config.Row(learned(RATES.get(OURS, RATE)))}
    rows["paper's losses, our controller"] = config.Row(PAPER)
    for method in baselines.METHODS.values():
        rows[method.title] = adapted(method, steps, RATES.get(method.name, RATE))
        if not method.trains_router:
            rows[f"{method.title}, untrained"] = untrained(method)
    return rows


def trials(steps):
    """The rows that RATES are chosen by."""
    rows = {}
    for rate in TRIED:
        rows[f"{FINETUNE}, {rate / 10:g}"] = config.Row(finetuned(steps, rate / 10), targets=())
        rows[f"{OURS}, {rate:g}"] = config.Row(learned(rate))
        for method in baselines.METHODS.values():
            rows[f"{method.name}, {rate:g}"] = adapted(method, steps, rate)
    return rows


def learned(rate):
    """The overrides of a peak rate where routers learn: theirs, 2.8e-3, stays."""
    own = (f"stages.router.learning_rate={rate}", f"stages.adapt.learning_rate={0.3 * rate:g}")
    return (*own, f"stages.router.router_lr_multiplier={2.8e-3 / rate:g}")


def adapted(method, steps, rate):
    """The row of a method to which the model adapts."""
    if method.trains_router:
        return row(method, *learned(rate))
    frozen = ("stages.router.steps=0", f"stages.adapt.steps={steps}")
    return row(method, *frozen, f"stages.adapt.learning_rate={rate}")


def untrained(method):
    """The row of a method as it is published."""
    return row(method, "stages.router.steps=0", *UNTRAINED)


def row(method, *more):
    """A row with a method's settings and more overrides."""
    settings = {**method.settings}
    if method.name == "deja_vu":
        settings["lte.router_rank"] = RANK
    own = tuple(f"{key}={value}" for key, value in settings.items())
    pairs = any(part in method.name for part in ("2_4", "4_8"))
    return config.Row(
        (*own, *more),
        targets=(0.5,) if pairs else None,
        after="dense, ReLU" if method.name.startswith("moefication") else "",
        oracle=method.oracle,
    )
