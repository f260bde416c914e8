"""Make a model of yours sparse on texts of yours.

    python train.py --config=configs/finetune.py --workdir=runs/mine \
        --config.source.path=MODEL --config.data.train=TEXTS

MODEL is a folder or a hub id. TEXTS are files, a folder, a glob, a hub id or a mix: docs/data.md.
Without a data.validation, up to a tenth of them is held out. The texts stay as they are, newlines
and all. The dense model is the one you bring; if it does not know such texts yet, tune it on them
first: --config.stages.finetune.steps=500. Default sizes are for models up to some hundred million
parameters: 500 steps of 2,048 tokens. ":large" is for those of a billion and more: bfloat16,
recomputed activations, matrices spread over all devices, 1,000 steps of 32,768 tokens.

Cost:   8 FLOPs per parameter and token (the dense model's forward pass, and the sparse one's
        forward and backward), with recomputing 10: 135 M parameters 1.1e15, 7 B (large) 2.3e18.
        The first takes six hours of one core at 55 GFLOP/s, which a step of MiniLM reaches there
        (docs/log.md): computed, not measured. Measured: a Llama of 1 M parameters, seven minutes of
        CPU time. The run opens with the disk and memory it takes.
Expect: babyllama of docs/results.md, not fine-tuned, on TinyStories, dense perplexity 2.403: 2.576
        (+7.2%) with half of the FFN skipped. Others are not measured.

A first try takes a tenth of the time, and needs no texts of yours:
--config.data.train=python-stdlib --config.stages.router.steps=40 --config.stages.adapt.steps=10.

If data.length is more than the model can read, or lte.expert_size does not divide its FFN, an error
says which values do. Words, joined by commas: ":large", ":paper" (the paper's losses), ":smoke" (a
test; without a MODEL of random weights, without TEXTS on Python's own source).
"""

from lte_jax import config


def get_config(arg=""):
    words = config.variants(arg, "large", "smoke", *config.PRESETS)
    lte = config.PRESETS["paper" if "paper" in words else "ours"]
    c = config.to_config_dict(config.Experiment(lte=lte))

    c.data.length = 256  # L
    c.data.batch_size = 8
    c.data.max_validation_records = 128

    c.lte.expert_size = 32  # M
    if "paper" not in words:  # the paper fixes lte.efficiency_weight instead
        c.lte.target_sparsity = 0.5

    c.stages.router.steps = 400
    c.stages.adapt.steps = 100
    for stage in c.stages.values():
        stage.learning_rate = 2e-4
    c.stages.router.router_lr_multiplier = 1.0 if "paper" in words else 10.0
    c.checkpoint.every = 100

    if "large" in words:
        c.compute.dtype, c.compute.remat = "bfloat16", True
        c.mesh.data, c.mesh.fsdp = 1, -1
        c.data.length, c.data.batch_size = 2048, 16
        c.stages.router.steps, c.stages.adapt.steps = 800, 200
        for stage in c.stages.values():
            stage.learning_rate = 2e-5
        if "paper" not in words:
            c.stages.router.router_lr_multiplier = 50.0
        c.checkpoint.every, c.checkpoint.keep_best = 200, 0
    if "smoke" in words:  # every part, in seconds
        c.data.train = "python-stdlib"
        c.data.max_documents, c.data.length, c.data.batch_size = 40, 32, 8
        c.data.max_validation_records, c.lte.calibration_records = 8, 4
        for stage in c.stages.values():
            stage.steps = 4
        c.log_every = c.eval_every = c.checkpoint.every = 2
        c.sample_tokens = 8
    return c
