"""Train a small dense model from scratch and make it sparse: no download, no GPU.

    python train.py --config=configs/demo.py --workdir=runs/demo        (or: make demo)

A byte-level Llama of 1 M parameters is trained on the source of Python's standard library, its FFNs
are cut into experts of 16 neurons, and both LTE stages follow.

Cost:   four minutes on two cores, seven of CPU time.
Expect: half of the FFN skipped for about 1% more perplexity per byte; the table has the figures.

Other sparsities: --config.lte.target_sparsity=0.75. Variants, joined by commas: ":paper" (the
paper's losses), ":smoke" (a test).
"""

from lte_jax import config


def get_config(arg=""):
    words = config.variants(arg, "smoke", *config.PRESETS)
    lte = config.PRESETS["paper" if "paper" in words else "ours"]
    c = config.to_config_dict(config.Experiment(lte=lte))

    c.source.scratch.vocab_size = 259  # V: bytes, and <s> </s> <pad>
    c.source.scratch.d_model = 128  # D
    c.source.scratch.d_ff = 512  # F
    c.source.scratch.num_layers = 4  # N
    c.source.scratch.num_heads = 4  # H
    c.source.scratch.num_kv_heads = 4  # K
    c.source.scratch.head_dim = 32  # C
    c.source.scratch.max_length = 256

    c.data.train = c.data.validation = "python-stdlib"
    c.data.length = 128  # L
    c.data.batch_size = 16
    c.data.max_validation_records = 128

    c.lte.expert_size = 16  # M
    if "paper" not in words:  # the paper fixes lte.efficiency_weight instead
        c.lte.target_sparsity = 0.5

    c.stages.finetune.steps = 240  # from random weights: this is the pretraining
    c.stages.finetune.learning_rate = 3e-3
    c.stages.router.steps = 120
    c.stages.router.learning_rate = 1e-3
    c.stages.router.router_lr_multiplier = 4.0
    c.stages.adapt.steps = 40
    c.stages.adapt.learning_rate = 5e-4
    c.checkpoint.every = 100
    c.sample_prompt, c.sample_temperature = "def read(", 0.7

    if "smoke" in words:  # every part, in seconds
        c.source.scratch.d_model, c.source.scratch.d_ff, c.source.scratch.num_layers = 32, 64, 2
        c.source.scratch.head_dim = 8
        c.data.max_documents, c.data.length, c.data.batch_size = 40, 32, 8
        c.data.max_validation_records, c.lte.calibration_records = 8, 4
        for stage in c.stages.values():
            stage.steps = 4
        c.log_every = c.eval_every = c.checkpoint.every = 2
        c.sample_tokens = 8
    return c
