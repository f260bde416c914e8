"""The paper's own LTE on babyllama: a search of the weights eta that give each sparsity.

    python -m lte_jax.sweep --config=configs/sweeps/paper.py --out=runs/paper-search --workers=2 \
        --config.source.path=FOLDER
    python -m lte_jax.sweep.search runs/paper-search/results.json --targets=0.5,0.75,0.9

FOLDER holds babyllama, as for configs/sweeps/tinystories.py. The recipe is that of
configs/tinystories.py:paper: the preset `paper`, AdamW, one rate for routers and model. Eta is its
only knob, and sparsity what comes of it. The separability loss cannot be used as printed: it is
infinite where a score is tau. So it has a guard, which the paper does not state: with 0.01 the loss
is a wall of 50 that keeps scores on the side of tau where they begin, with 0.25 one of 2.

Budget: 14 trials, seven etas by two guards, of one seed and 300 steps each, as many as a run of any
method takes. They are measured on held-out training stories, not on those that results report. The
second command takes, for each target, the guard of best quality there, quality and eta read
between the two neighbouring etas that reach less and more. What it prints goes into a row
"LTE of the paper" of configs/sweeps/methods.py; the table has the sparsity which that reaches.

":separability" is another grid: the paper's losses with the weights lambda of its Fig. 11, with
three seeds, on the validation stories; there our controller moves eta, so that sparsities match.

Cost:   15 runs, not measured; 14 of them take three minutes on one core. With ":separability" 33.
Expect: not measured.

Variants: ":separability", ":smoke", one seed, a few steps (a test).
"""

from lte_jax import config

NO_EXPERTS = ("stages.router.steps=0", "stages.adapt.steps=0")
ETAS = (0.1, 0.3, 1, 3, 10, 30, 100)
GUARDS = (0.01, 0.25)
HELD_OUT = "data.validation="  # validates on a part of the training text


def get_sweep(arg=""):
    words = config.variants(arg, "separability", "smoke")
    smoke, search = "smoke" in words, "separability" not in words
    tuned = ("stages.finetune.learning_rate=1e-4", f"stages.finetune.steps={8 if smoke else 300}")
    spared = config.QUALITY_ONLY
    spared += () if smoke else ("data.max_validation_records=2000",)
    dense = {"dense, untouched": config.Row(NO_EXPERTS, targets=())}
    if not search:
        dense["dense, fine-tuned"] = config.Row((*NO_EXPERTS, *tuned), targets=())
    return config.Sweep(
        config=f"configs/tinystories.py:babyllama,paper{',smoke' * smoke}",
        methods={**dense, **(trials() if search else separability())},
        targets=(0.5,) if smoke else (0.5, 0.75, 0.9),
        seeds=(0,) if search or smoke else (0, 1, 2),
        overrides=(*spared, HELD_OUT) if search else spared,
    )


def trials():
    """The rows of the search; none has a target."""
    return {
        f"guard {guard}, eta {eta:g}": config.Row(
            (f"lte.separability_eps={guard}", f"lte.efficiency_weight={eta:g}"), targets=()
        )
        for guard in GUARDS
        for eta in ETAS
    }


def separability():
    """The rows of lambda 0, 0.5 and 1."""
    return {
        f"paper's losses, lambda {weight:g}": config.Row(
            (f"lte.separability_weight={weight:g}", "lte.separability_eps=0.25")
        )
        for weight in (0, 0.5, 1)
    }
