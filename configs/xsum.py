"""Summarise news articles in one sentence (XSum) with GPT-2 medium or LLaMA-7B, and make it sparse.

    python train.py --config=configs/xsum.py --workdir=runs/xsum

Words, joined by commas: a model (gpt2_medium, llama7b), `paper` for the paper's losses, `smoke` for
a test. An article is cut so that "TL;DR:" and a summary of 60 tokens fit in data.length. A data
folder has train.jsonl and validation.jsonl with the columns document and summary.

Cost:   not measured.
Expect: not measured. The paper gives curves of ROUGE-L only: LTE within 0.05 of dense at 84% FFN
        sparsity (LLaMA-7B). ours: ROUGE-L with stemming, beam 6, 10 to 60 tokens, no-repeat 3-gram.
"""

from lte_jax import config

MODELS = {"gpt2_medium": "openai-community/gpt2-medium", "llama7b": "huggyllama/llama-7b"}
EPOCH = 204045  # articles


def get_config(arg="gpt2_medium"):
    words = config.variants(arg, *MODELS, *config.PRESETS, "smoke")
    [model] = [w for w in words if w in MODELS] or ["gpt2_medium"]
    preset = "paper" if "paper" in words else "ours"
    c = config.to_config_dict(config.Experiment(lte=config.PRESETS[preset]))

    c.source.path = MODELS[model]
    c.data.task, c.data.train = "xsum", "EdinburghNLP/xsum"
    c.data.length, c.data.pack = 1024, False  # an article a record, as the paper counts batches
    c.data.batch_size = 8 if model == "gpt2_medium" else 16
    c.data.max_validation_records = 1000
    epoch = EPOCH // c.data.batch_size
    c.stages.finetune.steps = 3 * epoch
    c.stages.router.steps = c.stages.adapt.steps = epoch
    for stage in c.stages.values():
        stage.learning_rate = 5e-5 if model == "gpt2_medium" else 1.5e-5
        stage.schedule = "linear"
    c.lte.target_sparsity = 0.8 if preset == "ours" else None
    if preset == "paper":
        c.stages.router.router_lr_multiplier = 1.0
    c.compute.dtype, c.compute.remat = "bfloat16", True
    if model == "llama7b":
        c.mesh.data, c.mesh.fsdp = 1, -1
    c.sample_tokens = 0  # the report shows a summary
    c.eval_every = c.checkpoint.every = 1000
    if "smoke" in words:  # every part, in seconds
        c.data.max_documents, c.data.max_validation_records, c.data.batch_size = 16, 4, 8
        c.data.length, c.data.max_new_tokens, c.data.beams = 96, 16, 2
        c.lte.calibration_records = 8
        for stage in c.stages.values():
            stage.steps = 2
        c.log_every = c.eval_every = c.checkpoint.every = 1
    return c
