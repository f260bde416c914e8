"""Make GPT-2 medium or LLaMA-7B sparse on WikiText-103, with the paper's hyperparameters.

    python train.py --config=configs/wikitext.py --workdir=runs/wikitext
    python evaluate.py --model=runs/wikitext/lte --dense=runs/wikitext/dense --tasks=wikitext103

Words, joined by commas: a model (gpt2_medium, llama7b), `paper` for the paper's losses, `smoke` for
a test: the same kind of model, tiny, on Python's own source. The lines of the data set are joined
into one running text, in records of as many tokens as the model reads. configs/llama7b.py is the
same for LLaMA2-7B.

Cost:   not measured. An epoch is an estimate: 540 MB at 4.6 (GPT-2) or 3.9 (LLaMA) bytes a token.
Expect: not measured. The paper gives curves for GPT-2 medium; for LLaMA-7B a perplexity at most 0.5
        above dense at 69% FFN sparsity (Table 1) and 5.95 at about 80% (Table 2). Dense, before
        fine-tuning: GPT-2 medium 26.37 (its paper, another protocol).
"""

from lte_jax import config

MODELS = {"gpt2_medium": "openai-community/gpt2-medium", "llama7b": "huggyllama/llama-7b"}
TOKENS = {"gpt2_medium": 118_000_000, "llama7b": 138_000_000}  # of training, estimated
ADAPT = {"gpt2_medium": 3, "llama7b": 1}  # epochs
LLAMA = config.ModelConfig(vocab_size=259)
GPT2 = config.ModelConfig(
    vocab_size=259, family="gpt2", activation="gelu_tanh", gated=False, norm="layer",
    norm_bias=True, positions="learned", tie_embeddings=True, qkv_bias=True, out_bias=True,
    mlp_bias=True,
)  # fmt: skip
SCRATCH = {"gpt2_medium": GPT2, "llama7b": LLAMA}  # of the test


def get_config(arg="gpt2_medium"):
    words = config.variants(arg, *MODELS, *config.PRESETS, "smoke")
    [model] = [w for w in words if w in MODELS] or ["gpt2_medium"]
    preset = "paper" if "paper" in words else "ours"
    c = config.to_config_dict(config.Experiment(lte=config.PRESETS[preset]))

    c.source.path = MODELS[model]
    c.data.train = c.data.validation = "Salesforce/wikitext:wikitext-103-raw-v1"
    c.data.join = ""  # its records are single lines with their newlines
    c.data.length = 1024 if model == "gpt2_medium" else 2048
    c.data.batch_size = 8 if model == "gpt2_medium" else 16
    c.data.max_validation_records = 256  # all of it
    epoch = TOKENS[model] // (c.data.batch_size * c.data.length)
    c.stages.finetune.steps = 3 * epoch
    c.stages.router.steps = epoch
    c.stages.adapt.steps = ADAPT[model] * epoch
    for stage in c.stages.values():
        stage.learning_rate = 5e-5 if model == "gpt2_medium" else 1.5e-5
        stage.schedule = "linear"
    c.lte.target_sparsity = 0.7 if preset == "ours" else None
    if preset == "paper":
        c.stages.router.router_lr_multiplier = 1.0
    c.compute.dtype, c.compute.remat = "bfloat16", True
    if model == "llama7b":
        c.mesh.data, c.mesh.fsdp = 1, -1
    c.eval_every = c.checkpoint.every = 1000
    if "smoke" in words:
        _shrink(c, SCRATCH[model])
    return c


def _shrink(c, scratch):
    """Every part, in seconds."""
    c.source.path, c.source.scratch = "", config.to_config_dict(scratch)
    c.data.train = c.data.validation = "python-stdlib"
    c.data.max_documents, c.data.length, c.data.batch_size = 40, 32, 8
    c.data.max_validation_records, c.lte.calibration_records = 8, 4
    for stage in c.stages.values():
        stage.steps = 2
    c.log_every = c.eval_every = c.checkpoint.every = 1
    c.sample_tokens = 8
