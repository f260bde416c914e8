"""The frozen dataclasses that describe a model, its sparsity and an experiment.

A file in configs/ and the flags of train.py become an `Experiment`. The comment beside a key is its
documentation in `train.py --help`; its type holds its range (fields.py).

Dimension key: B batch  L length  D model width  E experts  M neurons per expert  F = E*M
               N layers  H heads  K kv heads  C head width  V vocabulary
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from lte_jax.config.fields import (
    Axis,
    Checked,
    Count,
    Decay,
    Finite,
    Inside,
    Layers,
    Length,
    NotNegative,
    Positive,
    Share,
    Target,
    Whole,
)
from lte_jax.config.lora import LoraConfig
from lte_jax.config.names import (
    Activation,
    Grouping,
    Remat,
    RouterActivation,
    RouterKind,
    RouterStart,
    RoutingName,
)
from lte_jax.config.rope import RopeScaling
from lte_jax.errors import UserError

MAX_PARAMS = 10**12  # of a model; more is surely a typo


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
    """A dense Transformer: everything its forward pass needs besides the weights."""

    vocab_size: Count = 259  # V: vocabulary size; 259 is the byte tokenizer's
    d_model: Count = 64  # D: width of the residual stream
    d_ff: Count = 192  # F: neurons of each FFN
    num_layers: Layers = 2  # N: Transformer blocks
    num_heads: Count = 4  # H: query heads
    num_kv_heads: Count = 4  # K: kv heads; num_heads: multi-head attention, 1: multi-query
    head_dim: Count = 16  # C: width of an attention head
    max_length: Count = 256  # longest sequence that the positions were trained for
    family: str = "llama"  # model_type of Hugging Face's config.json
    causal: bool = True  # False: an encoder, whose tokens see those after them, too
    # What stands on the last layer: logits of the next token ("lm") or of masked ones
    # ("masked_lm"), one for each of num_labels classes ("classes"), or nothing ("none").
    head: Literal["lm", "masked_lm", "classes", "none"] = "lm"
    num_labels: Count = 2  # outputs of a head of classes; 1: a regression
    # What stands for a text: its first token (of a decoder: the last one), or the mean of all.
    pooling: Literal["first", "mean"] = "first"
    embed_dim: Count | None = None  # width of a dense layer for embeddings of texts; None: none
    embed_activation: Literal["none", "tanh"] = "none"  # what follows that layer
    unit_length: bool = False  # whether the embedding of a text is scaled to length 1
    pooler: bool = False  # whether what stands for a text passes a dense layer and a function
    pooler_activation: Literal["tanh", "relu"] = "tanh"  # that function
    activation: Activation = "silu"  # activation function of the FFN
    gated: bool = True  # True: gate and up matrices (SwiGLU); False: up only
    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    norm_bias: bool = False  # whether norms have a bias
    norm_offset: bool = False  # whether norms scale by 1 + their parameter (Gemma)
    # Where norms stand: before attention and FFN ("pre"), after the sum with the residual stream
    # ("post", BERT), on their outputs ("output", OLMo 2), or before and on outputs ("sandwich").
    norm_place: Literal["pre", "post", "output", "sandwich"] = "pre"
    parallel: bool = False  # whether the FFN reads what attention reads, not its sum (GPT-NeoX)
    norm_eps: Positive = 1e-5  # epsilon of norms, added to the mean square
    positions: Literal["rope", "learned"] = "rope"  # rotary, or a table of max_length rows
    position_offset: Whole = 0  # row of the first position in that table (RoBERTa: 2)
    token_types: Whole = 0  # rows of the table of token types (BERT: 2); 0: there is none
    embed_norm: bool = False  # whether the sum of the embeddings is normed
    embed_scale: Positive = 1.0  # factor of the embedding (Gemma: the root of d_model)
    rotary_dim: Count | None = None  # width of the part of a head that rotates; None: all
    rope_theta: Positive = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # stretching of the rotary frequencies; None: none
    rope_layers: tuple[bool, ...] | None = None  # which layers rotate at all; None: all
    # Base of the frequencies, then not stretched, of layers with a window; None: as in the others.
    sliding_rope_theta: Positive | None = None
    tie_embeddings: bool = False  # whether the embedding is the output head, too
    qkv_bias: bool = False  # whether the query, key and value projections have biases
    out_bias: bool = False  # whether the attention output projection has a bias
    mlp_bias: bool = False  # whether the FFN matrices have biases
    qk_norm: bool = False  # whether each query and key head has an RMSNorm (Qwen3)
    qk_full_norm: bool = False  # whether all query heads have one RMSNorm, all key heads another
    attention_scale: Positive | None = None  # factor of scores; None: 1 over the root of head_dim
    residual_scale: Positive = 1.0  # factor of what attention and FFN add (Granite)
    logits_divisor: Positive = 1.0  # divisor of the logits of tokens (Granite)
    sliding_window: Count | None = None  # positions attended to, self included; None: all
    sliding_layers: tuple[bool, ...] | None = None  # which layers have the window; None: all
    bos_id: Whole | None = None  # token that begins a text; None: there is none
    eos_ids: tuple[Whole, ...] = ()  # tokens that end a text; (): the one that training appends
    pad_id: Whole | None = None  # padding token; None: there is none
    dtype: str = "float32"  # type of the stored weights

    def _check_together(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: "
                "each kv head serves an equal group of query heads"
            )
        rotates = "head_dim" if self.rotary_dim is None else "rotary_dim"
        width = getattr(self, rotates)
        if self.positions == "rope" and (width % 2 or width > self.head_dim):
            raise UserError(
                f"{rotates}={width} is odd or above head_dim={self.head_dim}: rotary embedding "
                "needs an even width"
            )
        for key in ("sliding_layers", "rope_layers"):
            chosen = getattr(self, key)
            if chosen is not None and len(chosen) != self.num_layers:
                raise UserError(
                    f"{key} has {len(chosen)} entries: expected one for each of "
                    f"{self.num_layers} layers"
                )
        ends = [("eos_ids", value) for value in self.eos_ids]
        for key, value in (("bos_id", self.bos_id), ("pad_id", self.pad_id), *ends):
            if value is not None and value >= self.vocab_size:
                raise UserError(
                    f"{key}={value} is outside the vocabulary: expected an id below "
                    f"vocab_size={self.vocab_size}"
                )
        if self.num_params > MAX_PARAMS:
            raise UserError(
                f"num_layers={self.num_layers}, d_model={self.d_model}, d_ff={self.d_ff}, "
                f"num_heads={self.num_heads}, head_dim={self.head_dim} and "
                f"vocab_size={self.vocab_size} make {self.num_params:.1e} parameters: expected at "
                f"most {MAX_PARAMS:.0e}"
            )

    @property
    def num_params(self) -> int:
        """Parameters of all matrices, without norms and biases, which are small."""
        attention = 2 * self.d_model * self.head_dim * (self.num_heads + self.num_kv_heads)
        ffn = (3 if self.gated else 2) * self.d_model * self.d_ff
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.d_model
        return embeddings + self.num_layers * (attention + ffn)


@dataclasses.dataclass(frozen=True)
class LTEConfig(Checked):
    """Experts, routers and the losses that train them; `PRESETS` (experts.py) has whole recipes."""

    expert_size: Count = 32  # M: neurons per expert, a divisor of d_ff; 32 in the paper
    # How neurons are grouped: by similar rows of the first matrix ("kmeans", as in the paper), by
    # firing strongly on the same tokens ("coactivation"), or at random ("random"). Others are of
    # lte_jax/baselines/.
    grouping: Grouping = "coactivation"
    # What makes a logit of each expert: a matrix ("linear", as in the paper) or two, with a
    # function between. Others are of lte_jax/baselines/.
    router: RouterKind = "linear"
    router_rank: Count | None = None  # hidden units of a router of two layers; None: E
    router_activation: RouterActivation = "none"  # function between the two layers of a router
    router_bias: bool = True  # whether router logits have a bias; the paper's Eq. 1 has none
    # How routers start: regressed on an oracle's choice of experts ("ridge"), at random ("normal"),
    # or at random with a bias that turns all experts on ("open"). Others are of lte_jax/baselines/.
    router_init: RouterStart = "ridge"
    router_init_std: NotNegative = 2.0  # standard deviation of the router logits at the start
    refit: bool = False  # down projections fitted to what routers leave, before training
    # Records used to group neurons, start routers and, in training, set the final threshold. None:
    # in training at least 32, and 32 tokens for each of a router's D + 1 inputs; in `moefy` all.
    calibration_records: Count | None = None
    threshold: Inside = 0.5  # tau of Eq. 2: an expert runs if its score is above it
    routing: RoutingName = "hard"  # default routing of `apply` and `generate`
    # Routing of the router stage; "soft" in the paper.
    stage1_routing: Literal["soft", "straight_through", "softmax", "sigma"] = "straight_through"
    target_sparsity: Target | None = 0.5  # share of experts to skip; None: fixed efficiency_weight
    # Least and largest share of experts to skip, between which each training step draws its own, so
    # that one model serves all of them (docs/sparsity.md); (): the target_sparsity alone.
    sparsity_range: tuple[Target, ...] = ()
    per_layer: bool = False  # whether each layer skips so much, by a threshold of its own; or all
    # Where `sparsity=` finds thresholds: points of a share skipped and its threshold (per_layer: of
    # each layer), ascending. Written by training with a sparsity_range or per_layer, and by
    # `lte_jax.calibrate`.
    curve: tuple[tuple[Share, ...], ...] = ()
    efficiency_weight: Finite = 0.0  # eta of Eq. 6; with a target_sparsity, its initial value
    efficiency_power: Literal[1, 2] = 2  # power of a score in the efficiency loss; 2 in Eq. 4
    separability_weight: NotNegative = 0.0  # lambda of Eq. 6; 0.5 in the paper
    separability_eps: Positive = 1e-2  # guard against division by zero in Eq. 5
    distill_weight: Share = 1.0  # 1: only the KL to the dense model; 0: only the task loss
    # Weight of the squared distance of each FFN's input to the dense model's, over its square.
    hidden_distill_weight: NotNegative = 0.0

    def _check_together(self):
        low_high = self.sparsity_range
        if low_high and not (len(low_high) == 2 and low_high[0] < low_high[1]):
            raise UserError(
                f"sparsity_range={low_high}: expected the least and the largest, such as "
                "(0.5, 0.9), or (): none"
            )
        if low_high and not low_high[0] <= (self.target_sparsity or 0.0) <= low_high[1]:
            raise UserError(
                f"target_sparsity={self.target_sparsity} is outside sparsity_range={low_high}: "
                "expected one that lies within, which is served by default"
            )
        if low_high and self.stage1_routing != "straight_through":
            raise UserError(
                f"sparsity_range={low_high} with stage1_routing={self.stage1_routing!r}: expected "
                "'straight_through', which runs as many experts as a step has drawn"
            )
        if self.per_layer and self.target_sparsity is None:
            raise UserError("target_sparsity=None: expected a share for each layer, with per_layer")
        rising = all(
            len(a) == len(b) and all(x < y for x, y in zip(a, b, strict=True))
            for a, b in itertools.pairwise(self.curve)
        )
        if not rising or any(len(point) < 2 for point in self.curve):
            raise UserError(
                f"curve={self.curve}: expected points of a sparsity and its threshold (or one of "
                "each layer), all ascending"
            )

    def wanted_sparsity(self, who: str) -> float:
        """`target_sparsity`, or a UserError that says that `who` needs one."""
        if self.target_sparsity is None:
            raise UserError(
                f"{who} needs lte.target_sparsity, the share of experts to skip: expected a "
                "number, found None"
            )
        return self.target_sparsity


@dataclasses.dataclass(frozen=True)
class SourceConfig(Checked):
    """Where the dense model comes from."""

    path: str = ""  # Hugging Face or LTE folder, or hub id; "": random weights
    scratch: ModelConfig = ModelConfig()  # the model to make if path is ""
    # Function to put in place of the FFN's, which a finetune stage has to mend; "": the model's.
    activation: Literal["", "relu"] = ""
    # Folder or hub id; "bpe": byte-level BPE of scratch.vocab_size tokens, learned from
    # data.train; "": the model's own, or bytes without a source.path.
    tokenizer: str = ""


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Checked):
    """How the model computes; parameters in training and optimizer states are float32."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # type of activations and products
    # What the backward pass recomputes. True: all of a layer from its input: least memory, a third
    # slower; False: nothing; a policy of jax.checkpoint_policies: all but what it keeps.
    remat: Remat = False
    attention: Literal["auto", "xla", "cpu"] = "auto"  # of training; C++ where it can on one CPU
    unroll: Count = 1  # layers in a turn of training's loop; all: a twentieth faster on a CPU
    # Tokens of a device whose logits exist at a time, in training; None: as many as take 268 MB.
    head_tokens: Count | None = None
    # Type of the matrices of a distillation's dense model and of what they are multiplied with;
    # the sums are in `dtype`. In bfloat16 it takes half the memory, and on most CPUs half the time.
    teacher_dtype: Literal["float32", "bfloat16"] = "bfloat16"


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """Text in, batches of token ids out."""

    # Training text: a file (.jsonl, .json, .csv, .tsv, .txt, .md, each also .gz; .parquet), a glob
    # or folder of those, a hub id ("name:config:split") or "python-stdlib". Several: "a + b" is all
    # of both, "0.7 * a + 0.3 * b" shares of the characters, until one ends. A .txt or .md of more
    # than 16,000 characters is cut into documents of 8,000 or more, at blank lines or line ends.
    train: str = ""
    # Validation text, likewise; "": hold out documents of each source of the training text (blocks
    # of data.length tokens where most text is in a few long ones), a tenth at most.
    validation: str = ""
    # Name of a task of lte_jax/tasks/, such as "sst2"; "": language modelling. A task reads its own
    # columns from data.train and data.validation (or the hub's splits of data.train).
    task: str = ""
    # Width of the beam search of a task that generates; 1: greedy. None: the task's own.
    beams: Count | None = None
    max_new_tokens: Count | None = None  # tokens that such a task writes; None: the task's own
    column: str = "text"  # key of the text in each record
    join: str | None = None  # joins all records into one text; None: a record is a document
    # Token appended to each training document; "auto": what the pretrained model expects there, eos
    # or bos, by measurement (from scratch: eos).
    end_token: Literal["auto", "eos", "bos", "none"] = "auto"
    length: Length = 256  # L: tokens per record
    batch_size: Count = 16  # B: records per step, over all hosts and microbatches
    pack: bool = True  # True: several documents per record, attention within each; False: pad
    newline: str = "\n"  # replacement for newlines, which some character models never saw
    # Documents to read from each source, from the first; of the hub no more is loaded. None: all.
    max_documents: Count | None = None
    max_validation_records: Count = 64  # validation records to keep, of data.length tokens each
    # True: records of language modelling are prepared in WORKDIR/data by the first process; later
    # starts, and the other processes, read them there. False: each start and process makes them.
    cache: bool = False

    def _check_together(self):
        if self.join is not None and not self.pack:
            raise UserError(
                f"pack=False: expected True where join={self.join!r} makes one text of all "
                "records, as padding would keep only its beginning"
            )


@dataclasses.dataclass(frozen=True)
class StageConfig(Checked):
    """Length and learning rate of one stage; stages.py says what it trains and on which losses."""

    steps: Whole = 0  # optimizer steps; 0 skips the stage
    learning_rate: NotNegative = 1e-4  # peak learning rate of the model
    router_lr_multiplier: NotNegative = 1.0  # learning rate of the routers over that of the model
    warmup_ratio: Share = 0.06  # share of the steps with linear warmup
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # decay after the warmup
    final_lr_ratio: Share = 0.1  # learning rate of the last step over the peak
    # Share of what embedding, attention and FFN put out that is zeroed in training; 0.1 in the
    # recipes of BERT and GPT-2, 0 in Llama's.
    dropout: Decay = 0.0
    # The weights are rounded as `lte-jax convert --quantize` will round them, in every step, and
    # gradients pass as if they were not: what is converted afterwards loses less.
    quantize: Literal["int8", "int6", "int4"] | None = None


@dataclasses.dataclass(frozen=True)
class StagesConfig(Checked):
    """The stages, in the order they run."""

    finetune: StageConfig = StageConfig()  # dense, before experts are made
    router: StageConfig = StageConfig(steps=1000, router_lr_multiplier=25.0)
    adapt: StageConfig = StageConfig(steps=500)


@dataclasses.dataclass(frozen=True)
class OptimConfig(Checked):
    """The optimizer, the same in every stage."""

    # muon: matrices of layers by orthogonalised momentum, in place of AdamW; see optim.py
    name: Literal["adamw", "muon"] = "adamw"
    b1: Decay = 0.9  # decay of the mean gradient
    b2: Decay = 0.99  # decay of the mean squared gradient
    eps: Positive = 1e-8  # added to the root of the mean squared gradient
    weight_decay: NotNegative = 0.0  # decoupled, times the learning rate; 0 in the paper
    clip_norm: NotNegative = 1.0  # largest gradient norm, routers and model apart; 0: no clipping
    microbatches: Count = 1  # gradient accumulation: parts that each batch is cut into


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices along each mesh axis; their product is the number of devices. -1: all the rest."""

    data: Axis = -1  # data-parallel copies of the model, each with its part of the batch
    fsdp: Axis = 1  # devices that split the batch and, by width, all parameters
    tensor: Axis = 1  # devices that split heads, experts and vocabulary


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Checked):
    """How often training states are saved, and how many are kept."""

    every: Count = 200  # steps between two checkpoints
    keep_last: Count = 2  # how many of the newest checkpoints to keep
    keep_best: Whole = 1  # how many checkpoints of lowest validation loss to keep
    # Whether those of a stage stay once dense/ or lte/ is written, or the next stage has its first.
    keep_finished: bool = True


@dataclasses.dataclass(frozen=True)
class Experiment(Checked):
    """One run of train.py: what `get_config()` of a file in configs/ describes."""

    seed: Whole = 0  # seed of all random numbers: data order, initial weights, grouping
    source: SourceConfig = SourceConfig()
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    lte: LTEConfig = LTEConfig()
    stages: StagesConfig = StagesConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval_every: Whole = 100  # steps between two validations, the last step has one; 0: none
    log_every: Count = 10  # steps between two lines of metrics
    # Project of Weights & Biases to send metrics to, "project" or "entity/project" (needs the extra
    # wandb); "": none.
    wandb: str = ""
    report: bool = True  # whether to evaluate the result at the end
    report_dense: bool = True  # whether the report also measures the dense model it was made from
    sample_prompt: str = "Once upon a time"  # prompt of the sample in the report
    sample_tokens: Whole = 100  # length of that sample in tokens; 0: no sample
    sample_temperature: NotNegative = 0.0  # temperature of that sample; 0: greedy
    latency_rounds: Whole = 9  # timings of decoding in the report, the median counts; 0: none

    def _check_together(self):
        parts, size = self.optim.microbatches, self.data.batch_size
        if size % parts:
            raise UserError(
                f"optim.microbatches={parts} does not divide data.batch_size={size}: set a "
                f"batch_size of {-(-size // parts) * parts}, or other microbatches"
            )
