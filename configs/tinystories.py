"""Make a pretrained Llama sparse on TinyStories.

    python train.py --config=configs/tinystories.py --workdir=runs/tinystories
    python train.py --config=configs/tinystories.py:babyllama --workdir=runs/babyllama \
        --config.source.path=FOLDER

Default: a Llama of 15 M parameters from the hub. ":babyllama" and ":stories260k" are for the two
smaller models of docs/results.md, which have no hub id: name their folder. babyllama has 1 M
parameters over 105 characters; stories260k has 260 k and experts of 4 (few other sizes divide its
FFN width of 172). Any other Llama: --config.source.path=OWNER/NAME. --mirror reads local copies.

Cost:   babyllama and stories260k take three to five minutes on two cores; the default is not
        measured.
Expect: babyllama: perplexity over all validation stories 2.30, 2.43 and 2.63 at target_sparsity
        0.5, 0.75 and 0.9 (three seeds, ± 0.001, 0.003, 0.001; dense, untouched: 2.18). At 0.9 twice
        the rate is better: 2.57 (one seed) by stages.router.learning_rate=2e-3,
        stages.router.router_lr_multiplier=1.4 and stages.adapt.learning_rate=6e-4. stories260k
        with half the steps: 6.49 at 0.75 (dense 4.12), by stages.adapt.learning_rate=3e-4.
        docs/results.md has a table of an earlier recipe. The default: not measured.

Variants, joined by commas: ":babyllama" or ":stories260k", ":paper" (the paper's losses), ":smoke"
(a test).
"""

from lte_jax import config


def get_config(arg=""):
    words = config.variants(arg, "babyllama", "stories260k", "smoke", *config.PRESETS)
    lte = config.PRESETS["paper" if "paper" in words else "ours"]
    c = config.to_config_dict(config.Experiment(lte=lte))

    c.source.path = "Xenova/llama2.c-stories15M"
    c.data.train = c.data.validation = "roneneldan/TinyStories"
    c.data.max_documents = 20_000  # of two million; these stages read about 3,000
    c.data.length = 256  # L
    c.data.batch_size = 8
    c.data.max_validation_records = 128

    c.lte.expert_size = 32  # M
    if "paper" not in words:  # the paper fixes lte.efficiency_weight instead
        c.lte.target_sparsity = 0.5

    c.stages.router.steps = 270
    c.stages.router.learning_rate = 1e-3
    c.stages.router.router_lr_multiplier = 2.8
    c.stages.router.final_lr_ratio = 0.25
    c.stages.adapt.steps = 30
    c.stages.adapt.learning_rate = 1e-4
    c.optim.name = "muon"
    if "paper" in words:
        c.stages.router.learning_rate, c.stages.router.final_lr_ratio = 5e-4, 0.1
        c.stages.router.router_lr_multiplier, c.optim.name = 1.0, "adamw"
    c.optim.microbatches = 4  # two rows at a time stay in a core's cache: a sixth faster
    c.compute.unroll = 8  # all layers: a twentieth faster on a CPU
    c.checkpoint.every = 100

    if {"babyllama", "stories260k"} & {*words}:
        c.source.path = ""  # to be named
        c.data.newline = " "  # neither model ever saw a newline
    if "stories260k" in words:
        c.lte.expert_size = 4
    if "smoke" in words:  # every part, in seconds
        c.data.max_documents, c.data.length, c.data.batch_size = 40, 64, 4
        c.data.max_validation_records, c.lte.calibration_records = 8, 4
        for stage in (c.stages.router, c.stages.adapt):
            stage.steps = 4
        c.log_every = c.eval_every = c.checkpoint.every = 2
        c.sample_tokens, c.optim.microbatches = 8, 2
    return c
