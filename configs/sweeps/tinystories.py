"""Every method of benchmarks/tinystories.py on babyllama, three seeds.

    python -m lte_jax.sweep --config=configs/sweeps/tinystories.py --out=runs/tinystories-sweep \
        --workers=2 --config.source.path=FOLDER

babyllama has no hub id: FOLDER holds it (docs/results.md). All rows but the untouched one are
trained for 300 steps. Perplexity is over all of the validation stories, packed into records of 256
tokens; that of benchmarks/tinystories.py is over their first 256 tokens.

Cost:   33 runs, not measured; 27 of them train for 300 steps with experts, three minutes each on
        one core.
Expect: not measured.

Variant: ":smoke", ten runs of a few steps (a test).
"""

from lte_jax import config

NO_EXPERTS = ("stages.router.steps=0", "stages.adapt.steps=0")


def get_sweep(arg=""):
    smoke = "smoke" in config.variants(arg, "smoke")
    steps = 8 if smoke else 300  # of the router stage and of adaptation together
    tuned = ("stages.finetune.learning_rate=1e-4", f"stages.finetune.steps={steps}")
    frozen = ("stages.router.steps=0", f"stages.adapt.steps={steps}")
    frozen += ("stages.adapt.learning_rate=1e-3",)
    random = ("lte.router_init=normal", "lte.routing=top_k")
    return config.Sweep(
        config=f"configs/tinystories.py:babyllama{',smoke' * smoke}",
        methods={
            "dense, untouched": config.Row(NO_EXPERTS, targets=()),
            "dense, fine-tuned": config.Row((*NO_EXPERTS, *tuned), targets=()),
            "ours": config.Row(),
            "ridge, frozen": config.Row(frozen),
            "random, frozen": config.Row((*frozen, *random)),
        },
        targets=(0.5,) if smoke else (0.5, 0.75, 0.9),
        seeds=(0, 1) if smoke else (0, 1, 2),
        overrides=config.QUALITY_ONLY + (() if smoke else ("data.max_validation_records=2000",)),
        reference="ours",
    )
