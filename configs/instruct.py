"""Tune a model on instructions, with loss on the answers only, and make it sparse.

    python train.py --config=configs/instruct.py --workdir=runs/instruct
    python evaluate.py --model=runs/instruct/lte --dense=runs/instruct/dense --tasks=mmlu
    python train.py --config=configs/instruct.py:small --config.source.path=LLAMA \
        --config.data.train=FOLDER --workdir=runs/instruct_small

Words, joined by commas: a model (llama2_7b, smollm2), `paper` for the paper's losses, `control` for
a dense model of as many steps, `smoke` for a test. `small` is for a model of a million parameters
and a thousand rows on one core: LLAMA, or without it random weights that read bytes.

Data are rows with the column `messages`, a list of {"role", "content"}; a folder has train.jsonl.
Without a data.validation, a part of the rows is held out. Conversations are written by the
tokenizer's chat template, or as "User: ..." and "Assistant: ..." where it has none.

Cost:   small: five minutes on one core, a Llama of 1 M parameters; the others not measured.
Expect: small: LTE 24.6 ROUGE-L at 50% FFN sparsity (the preset `ours` without its distillation,
        experts of 8), its control 26.2, of 100 held-out prompts, one seed, standard errors 2; so
        small a model answers hardly anything right. The others are not measured. The paper tunes
        LLaMA2-7B on Tulu and reports 5-shot MMLU as a curve; dense LLaMA2-7B has 45.3. The ROUGE-L
        in the report is of greedy answers and only compares models.
"""

from lte_jax import config

MODELS = {"llama2_7b": "meta-llama/Llama-2-7b-hf", "smollm2": "HuggingFaceTB/SmolLM2-135M"}
SMALL = config.ModelConfig(
    vocab_size=259, d_model=128, d_ff=352, num_layers=5, num_heads=8, num_kv_heads=4, head_dim=16,
    max_length=256,
)  # fmt: skip
EPOCH = 326154  # conversations


def get_config(arg="llama2_7b"):
    words = config.variants(arg, *MODELS, "small", *config.PRESETS, "control", "smoke")
    [model] = [w for w in words if w in MODELS] or ["llama2_7b"]
    preset = "paper" if "paper" in words else "ours"
    c = config.to_config_dict(config.Experiment(lte=config.PRESETS[preset]))

    c.source.path = MODELS[model]
    c.data.task, c.data.train = "instruct", "allenai/tulu-v2-sft-mixture"
    c.data.length = 2048
    c.data.max_validation_records = 200
    # The paper's batches of 128 conversations; a packed record holds about four of them.
    c.data.batch_size = 32
    epoch = EPOCH // 128
    c.stages.finetune.steps = 3 * epoch
    c.stages.router.steps, c.stages.adapt.steps = epoch, 4 * epoch
    for stage in c.stages.values():
        stage.learning_rate = 2e-5
        stage.schedule = "linear"
    c.lte.target_sparsity = 0.5 if preset == "ours" else None
    if preset == "paper":
        c.stages.router.router_lr_multiplier = 1.0
    if model == "smollm2":
        c.stages.finetune.steps, c.stages.router.steps, c.stages.adapt.steps = 2000, 1000, 500
    c.compute.dtype, c.compute.remat = "bfloat16", True
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.sample_tokens = 0  # the report shows an answer
    c.eval_every = c.checkpoint.every = 500
    if "small" in words:
        _small(c)
    if "smoke" in words:  # every part, in seconds
        c.data.max_documents, c.data.max_validation_records, c.data.batch_size = 200, 4, 8
        c.data.length, c.data.max_new_tokens = 192, 24
        c.lte.calibration_records = 8
        for stage in c.stages.values():
            stage.steps = 2
        c.log_every = c.eval_every = c.checkpoint.every = 1
    if "control" in words:
        c.stages.finetune.steps = sum(stage.steps for stage in c.stages.values())
        c.stages.router.steps = c.stages.adapt.steps = 0
    return c


def _small(c):
    c.source.path, c.source.scratch = "", config.to_config_dict(SMALL)
    c.compute.dtype, c.compute.remat = "float32", False
    c.data.length, c.data.batch_size, c.data.max_new_tokens = 256, 8, 80
    c.data.max_validation_records = 100
    c.optim.microbatches = 2  # four rows at a time stay in a core's cache
    c.lte.expert_size = 8
    c.lte.hidden_distill_weight, c.lte.refit = 0.0, False
    c.lte.distill_weight = 0.0  # as in configs/e2e.py: the dense model still learns
    c.stages.finetune.steps, c.stages.finetune.learning_rate = 80, 5e-4
    c.stages.router.steps, c.stages.router.learning_rate = 110, 5e-4
    c.stages.router.router_lr_multiplier = 4.0
    c.stages.adapt.steps, c.stages.adapt.learning_rate = 40, 3e-4
    for stage in c.stages.values():
        stage.schedule = "cosine"
    c.checkpoint.every = 50
