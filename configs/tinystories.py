"""Make a pretrained Llama sparse on TinyStories.

    python train.py --config=configs/tinystories.py --workdir=runs/tinystories
    python train.py --config=configs/tinystories.py:stories260k --workdir=runs/stories260k

Default: babyllama, 1 M parameters over 105 characters, experts of 32. ":stories260k": 260 k
parameters, experts of 4 (few other sizes divide its FFN width of 172). Models and texts are read
from ../shared; without it, name a Llama folder or hub id and a data set, such as
--config.source.path=... --config.data.train=roneneldan/TinyStories.

Cost:   three to five minutes on two cores.
Expect: validation perplexity within 12%, 28% and 55% of a dense baseline at target_sparsity 0.5,
        0.75 and 0.9; docs/results.md has the table that `make tinystories` makes.

Variants, joined by commas: ":stories260k", ":paper" (the paper's losses), ":smoke" (a test).
"""

from lte_jax import config


def get_config(arg=""):
    words = config.variants(arg, "stories260k", "smoke", *config.PRESETS)
    lte = config.PRESETS["paper" if "paper" in words else "ours"]
    c = config.to_config_dict(config.Experiment(lte=lte))

    c.source.path = "../shared/models/babyllama"
    c.data.train = "../shared/data/tinystories/train.jsonl"
    c.data.validation = "../shared/data/tinystories/validation.jsonl"
    c.data.newline = " "  # neither model ever saw a newline
    c.data.length = 256  # L
    c.data.batch_size = 8
    c.data.max_validation_records = 128

    c.lte.expert_size = 32  # M
    if "paper" not in words:  # the paper fixes lte.efficiency_weight instead
        c.lte.target_sparsity = 0.5

    c.stages.router.steps = 240
    c.stages.router.learning_rate = 5e-4
    c.stages.router.router_lr_multiplier = 4.0
    c.stages.adapt.steps = 60
    c.stages.adapt.learning_rate = 3e-4
    c.optim.microbatches = 4  # two rows at a time stay in a core's cache: a sixth faster
    c.checkpoint.every = 100

    if "stories260k" in words:
        c.source.path = "../shared/models/stories260k"
        c.lte.expert_size = 4
    if "smoke" in words:  # every part, in seconds
        c.data.max_documents, c.data.length, c.data.batch_size = 40, 64, 4
        c.data.max_validation_records, c.lte.calibration_records = 8, 4
        for stage in (c.stages.router, c.stages.adapt):
            stage.steps = 4
        c.log_every = c.eval_every = c.checkpoint.every = 2
        c.sample_tokens, c.optim.microbatches = 8, 2
    return c
