"""Make LLaMA2-7B sparse on WikiText-103, with the paper's hyperparameters (Tables 5-7: LLaMA-7B).

    python train.py --config=configs/llama7b.py --workdir=runs/llama7b

Cost:   not measured. 40e18 FLOPs: about 3.5 hours on eight 80 GB H100s at 40% of their peak.
        Parameters, gradients and AdamW's moments take 108 GB in float32, over all devices. On the
        disk 190 GB at most: a checkpoint has 81 GB, and those that are no longer needed go.
Expect: not measured. The paper reports a perplexity of 5.95 at 52% sparsity of the whole model
        (Table 2, eta = 2), which is about 80% of the FFN; this config asks for 50%
        (--config.lte.target_sparsity=0.8). For comparison with published figures, WikiText's lines
        are joined into one running text, in records of 2048 tokens.

Variants: `:paper` takes the paper's losses and one learning rate instead of the preset `ours`;
`:lora` trains adapters and routers on one GPU of 24 GB (docs/scale.md); `:smoke` is a tiny model on
Python's own source, for tests. They go together, as `:paper,smoke`; `:lora,smoke` asks for a
source.path.
"""

from lte_jax import config

LLAMA2_7B = config.ModelConfig(
    vocab_size=32000,
    d_model=4096,
    d_ff=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_length=4096,
    norm_eps=1e-5,
    bos_id=1,
    eos_ids=(2,),
)

# Steps of 16 records of 2048 tokens that cover the training text once. The paper counts epochs and
# does not state its record length; 540 MB at an estimated 3.9 bytes a token are 138M tokens.
EPOCH = 4200


def get_config(arg=""):
    words = config.variants(arg, *config.PRESETS, "lora", "smoke")
    preset = "paper" if "paper" in words else "ours"
    c = config.to_config_dict(config.Experiment(lte=config.PRESETS[preset]))

    c.source.path = "meta-llama/Llama-2-7b-hf"
    c.source.scratch = config.to_config_dict(LLAMA2_7B)  # for --config.source.path= : from scratch
    c.compute.dtype = "bfloat16"
    c.compute.remat = True

    c.data.train = c.data.validation = "Salesforce/wikitext:wikitext-103-raw-v1"
    c.data.join = ""  # its records are single lines with their newlines
    c.data.cache = True  # tokenised once, by one process
    c.data.length = 2048
    c.data.batch_size = 16
    c.data.max_validation_records = 256  # all of it

    c.lte.expert_size = 32  # 344 experts a layer
    c.stages.finetune.steps = 3 * EPOCH
    c.stages.router.steps = EPOCH
    c.stages.adapt.steps = EPOCH
    for stage in c.stages.values():
        stage.learning_rate = 1.5e-5
        stage.warmup_ratio = 0.06
    c.optim.weight_decay = 0.0

    # A checkpoint has 81 GB: four an epoch, and only what resuming needs stays on the disk.
    c.checkpoint.every = EPOCH // 4
    c.checkpoint.keep_last, c.checkpoint.keep_best = 1, 0
    c.checkpoint.keep_finished = False

    if preset == "paper":  # one rate for router and model; it does not state the schedule's shape
        c.stages.router.router_lr_multiplier = 1.0
        c.optim.b2 = 0.999

    c.mesh.data = 1
    c.mesh.fsdp = -1  # every device holds a slice of every matrix

    if "lora" in words:
        _adapt(c)
    if "smoke" in words:
        _shrink(c)
    return c


def _adapt(c):
    c.lora.rank = 16  # 40M parameters beside the routers' 45M
    c.lte.refit = False  # so that the frozen model is the teacher, too
    c.optim.microbatches = 16  # one record at a time
    for stage in c.stages.values():  # adapters start at zero, and learn at ten times the rate
        stage.learning_rate = 1.5e-4
    c.stages.router.router_lr_multiplier = 2.5
    c.report = False  # it holds the dense model, too: `evaluate.py --workdir` where both fit


def _shrink(c):
    c.source.path, c.optim.microbatches = "", 1
    c.source.scratch = config.to_config_dict(config.ModelConfig(vocab_size=259))  # bytes, specials
    c.data.train = c.data.validation = "python-stdlib"
    c.data.max_documents, c.data.length, c.data.batch_size = 40, 32, 8
    c.data.max_validation_records, c.lte.calibration_records = 8, 4
    for stage in c.stages.values():
        stage.steps = 2
    c.log_every = c.eval_every = c.checkpoint.every = 1
    c.sample_tokens = 8
