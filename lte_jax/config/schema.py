"""What a model, its sparsity and an experiment are, as frozen data.

Plain data without arrays: the model module, the importer, the trainer and the reports all read
the same dataclasses. `Experiment` is what a file in configs/ and the flags of train.py become.
The trailing comments are the documentation of the keys; their types hold their ranges (fields.py).

Dimension key: B batch  L length  D model width  E experts  M neurons per expert  F = E*M
               N layers  H heads  K kv heads  C head width  V vocabulary
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
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
from lte_jax.errors import UserError

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
RoutingName = Literal["dense", "soft", "hard", "straight_through", "top_k"]
MAX_PARAMS = 10**12  # of a model: more is a slip of the pen


@dataclasses.dataclass(frozen=True)
class RopeScaling(Checked):
    """Stretching of the rotary frequencies (`rope_scaling` of an HF config)."""

    kind: Literal["linear", "llama3"]  # all frequencies alike, or as Llama 3.1
    factor: Positive  # by which wavelengths grow
    low_freq_factor: Positive = 1.0  # llama3 only: longest waves are stretched in full
    high_freq_factor: Positive = 4.0  # llama3 only: shortest waves stay
    original_max_length: Count = 8192  # llama3 only: positions before stretching

    def _check_together(self):
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise UserError(
                f"low_freq_factor={self.low_freq_factor} is not below "
                f"high_freq_factor={self.high_freq_factor}: expected two ends of a range"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig(Checked):
    """The dense Transformer: everything its forward pass needs besides the weights."""

    vocab_size: Count = 259  # V; of the byte tokenizer
    d_model: Count = 64  # D; width of the residual stream
    d_ff: Count = 192  # F; neurons of an FFN
    num_layers: Layers = 2  # N; blocks
    num_heads: Count = 4  # H; query heads
    num_kv_heads: Count = 4  # K; = num_heads: multi-head attention, 1: multi-query
    head_dim: Count = 16  # C; width of a head
    max_length: Count = 256  # longest sequence the positions were trained for
    family: str = "llama"  # HF model_type
    activation: Activation = "silu"  # of the FFN
    gated: bool = True  # True: gate and up matrices (SwiGLU), False: up alone
    norm_eps: Positive = 1e-5  # added to the mean square of a norm
    rope_theta: Positive = 10000.0  # base of the rotary frequencies
    rope_scaling: RopeScaling | None = None  # how the rotary frequencies are stretched
    tie_embeddings: bool = False  # True: the embedding is the output head, too
    qkv_bias: bool = False  # of the query, key and value projections
    out_bias: bool = False  # of the attention output projection
    mlp_bias: bool = False  # of all matrices of the FFN
    qk_norm: bool = False  # RMSNorm of each query and key head (Qwen3)
    sliding_window: Count | None = None  # attend to this many latest positions (self included)
    sliding_layers: tuple[bool, ...] | None = None  # which layers slide; None: all of them
    bos_id: Whole | None = None  # token that begins a text
    eos_ids: tuple[Whole, ...] = ()  # tokens that end a text; (): what training appends
    pad_id: Whole | None = None  # token that fills up rows
    dtype: str = "float32"  # of the stored weights

    def _check_together(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: "
                "each kv head serves an equal group of query heads"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim={self.head_dim} is odd: rotary embedding needs an even width"
            )
        if self.sliding_layers is not None and len(self.sliding_layers) != self.num_layers:
            raise UserError(
                f"sliding_layers has {len(self.sliding_layers)} entries: expected one for each of "
                f"{self.num_layers} layers"
            )
        ids = {"bos_id": (self.bos_id,), "eos_ids": self.eos_ids, "pad_id": (self.pad_id,)}
        for key, values in ids.items():
            for value in values:
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
        """Parameters of all matrices; norms and biases, which are small, are left out."""
        attention = 2 * self.d_model * self.head_dim * (self.num_heads + self.num_kv_heads)
        ffn = (3 if self.gated else 2) * self.d_model * self.d_ff
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.d_model
        return embeddings + self.num_layers * (attention + ffn)


@dataclasses.dataclass(frozen=True)
class LTEConfig(Checked):
    """Experts, routers and the losses that teach them. Defaults are the preset `ours`."""

    expert_size: Count = 32  # M; must divide F. The paper: 32 for every model
    # What puts neurons into one expert: similar rows of the first matrix ("kmeans", as the paper),
    # being large on the same tokens ("coactivation"), or nothing ("random").
    grouping: Literal["kmeans", "coactivation", "random"] = "coactivation"
    router_bias: bool = True  # of a router's logits; the paper's Eq. 1 has none
    # How routers start: regressed on the choice of an oracle ("ridge"), at random ("normal"), or at
    # random with a bias that turns all experts on ("open").
    router_init: Literal["ridge", "normal", "open"] = "ridge"
    router_init_std: NotNegative = 2.0  # standard deviation of a router's logits at the start
    # Records of text that group neurons, start routers and, in training, set the last threshold.
    # None: training takes at least 32, and 32 real tokens for each of a router's D + 1 inputs;
    # `moefy` all that it is given.
    calibration_records: Count | None = None
    threshold: Inside = 0.5  # tau of Eq. 2: an expert runs where score > tau
    routing: RoutingName = "hard"  # what `apply` and `generate` use unless told otherwise
    stage1_routing: Literal["soft", "straight_through"] = "straight_through"  # the paper: "soft"
    target_sparsity: Target | None = 0.5  # share of experts to skip; None: fixed weight, threshold
    efficiency_weight: Finite = 0.0  # eta of Eq. 6; with a target_sparsity, its start
    efficiency_power: Literal[1, 2] = (
        2  # of a score in the efficiency loss; Eq. 4 prints the square
    )
    separability_weight: NotNegative = 0.0  # lambda of Eq. 6; the paper: 0.5
    separability_eps: Positive = 1e-2  # guard of Eq. 5, which divides by zero as printed
    distill_weight: Share = 1.0  # 1: only the KL to the dense model, 0: only the task loss

    def wanted_sparsity(self, who: str) -> float:
        """`target_sparsity`, for `who` cannot do without one.

        Raises:
          UserError: where there is none.
        """
        if self.target_sparsity is None:
            raise UserError(
                f"{who} needs lte.target_sparsity, the share of experts that are not to run: "
                "expected a number, found None"
            )
        return self.target_sparsity


def num_experts(config: ModelConfig, lte: LTEConfig | None) -> int:
    """E: how many experts an FFN has; 1 for a dense model.

    Raises:
      UserError: where the expert size does not divide the FFN width.
    """
    if lte is None:
        return 1
    if config.d_ff % lte.expert_size:
        small = [m for m in range(1, math.isqrt(config.d_ff) + 1) if config.d_ff % m == 0]
        sizes = {*small, *(config.d_ff // m for m in small)}
        near = sorted(sorted(sizes, key=lambda m: abs(m - lte.expert_size))[:4])
        raise UserError(
            f"lte.expert_size={lte.expert_size} does not divide the FFN width {config.d_ff}: "
            f"nearby sizes that do are {', '.join(map(str, near))}"
        )
    return config.d_ff // lte.expert_size


PRESETS: Mapping[str, LTEConfig] = types.MappingProxyType(
    {
        "ours": LTEConfig(),
        # Settings as the paper prints them (section 5.1), the guard of Eq. 5 aside. Eq. 1 has no
        # bias and the initialisation is not stated: small normal weights are the usual choice.
        "paper": LTEConfig(
            grouping="kmeans",
            router_bias=False,
            router_init="normal",
            router_init_std=1.0,
            stage1_routing="soft",
            target_sparsity=None,
            efficiency_weight=1.0,
            separability_weight=0.5,
            distill_weight=0.0,
        ),
    }
)


@dataclasses.dataclass(frozen=True)
class SourceConfig(Checked):
    """Where the dense model comes from."""

    path: str = ""  # HF or LTE folder, or hub id; "" starts from random weights
    scratch: ModelConfig = ModelConfig()  # the model to make where path is ""
    tokenizer: str = ""  # folder or hub id; "": the model's own, or bytes if path is ""


@dataclasses.dataclass(frozen=True)
class ComputeConfig(Checked):
    """How the model computes; parameters in training and optimizer states are float32."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and matrix products
    remat: bool = False  # recompute activations in the backward pass: less memory, a third slower


@dataclasses.dataclass(frozen=True)
class DataConfig(Checked):
    """Text in, batches of token ids out."""

    train: str = ""  # JSON-lines file, hub id ("name" or "name:config"), or "python-stdlib"
    validation: str = ""  # likewise; "": a part of the training text is held out
    column: str = "text"  # of the records
    join: str | None = None  # None: a record is a document; "" or " ": records make one text
    # Appended to each training document: what the pretrained model expects there of its tokenizer's
    # eos and bos, measured ("auto"; from scratch: eos), one of them, or nothing.
    end_token: Literal["auto", "eos", "bos", "none"] = "auto"
    length: Length = 256  # L; tokens in a row of a batch
    batch_size: Count = 16  # sequences a step, over all hosts and microbatches
    pack: bool = True  # fill rows with several documents (attention stays within each), or pad
    newline: str = "\n"  # what replaces newlines, which some character models never saw
    max_documents: Count | None = None  # of each source; None: all of them
    max_validation_records: Count = 64  # rows of `length`

    def _check_together(self):
        if self.join is not None and not self.pack:
            raise UserError(
                f"pack=False: expected True where join={self.join!r} makes one text of all "
                "records, of which padding would keep one row"
            )


@dataclasses.dataclass(frozen=True)
class StageConfig(Checked):
    """Length and speed of one stage; what it trains and which losses it has is in stages.py."""

    steps: Whole = 0  # 0 skips the stage
    learning_rate: NotNegative = 1e-4  # of the model, at the peak
    router_lr_multiplier: NotNegative = 1.0  # routers learn at this many times learning_rate
    warmup_ratio: Share = 0.06  # share of the steps in which the rate grows linearly
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # of the rate after that
    final_lr_ratio: Share = 0.1  # of the peak, at the last step


@dataclasses.dataclass(frozen=True)
class StagesConfig(Checked):
    """The stages in the order in which they run."""

    finetune: StageConfig = StageConfig()  # dense, before experts are made
    router: StageConfig = StageConfig(steps=1000, router_lr_multiplier=25.0)
    adapt: StageConfig = StageConfig(steps=500)


@dataclasses.dataclass(frozen=True)
class OptimConfig(Checked):
    """AdamW, the same in every stage."""

    b1: Decay = 0.9  # decay of the mean gradient
    b2: Decay = 0.99  # decay of the mean squared gradient
    eps: Positive = 1e-8  # added to the root of the latter
    weight_decay: NotNegative = 0.0  # decoupled, times the learning rate; the paper: 0
    clip_norm: NotNegative = 1.0  # norm of the gradient, routers and model apart; 0: no clipping
    microbatches: Count = 1  # parts that a batch is cut into: gradient accumulation


@dataclasses.dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices along each mesh axis; their product is the number of devices. -1: all the rest."""

    data: Axis = -1  # copies of the model, each with its part of the batch
    fsdp: Axis = 1  # parts of the batch, the width of all parameters being cut as well
    tensor: Axis = 1  # heads, experts and vocabulary are cut


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Checked):
    """How often, and how many, training states are kept."""

    every: Count = 200  # steps between two
    keep_last: Count = 2  # the newest
    keep_best: Whole = 1  # those of least validation loss


@dataclasses.dataclass(frozen=True)
class Experiment(Checked):
    """One run of train.py: what `get_config()` of a file in configs/ describes."""

    seed: Whole = 0  # of everything random: order of data, initial weights, grouping
    source: SourceConfig = SourceConfig()
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    lte: LTEConfig = LTEConfig()
    stages: StagesConfig = StagesConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval_every: Count = 100  # steps between two validations
    log_every: Count = 10  # steps between two lines of metrics
    report: bool = True  # measure the result at the end, beside the dense baseline
    sample_prompt: str = "Once upon a time"  # of the text that the report shows
    sample_tokens: Whole = 100  # length of that text; 0: none
    sample_temperature: NotNegative = 0.0  # of that text; 0: the likeliest token each time

    def _check_together(self):
        parts, size = self.optim.microbatches, self.data.batch_size
        if size % parts:
            raise UserError(
                f"optim.microbatches={parts} does not divide data.batch_size={size}: set a "
                f"batch_size of {-(-size // parts) * parts}, or other microbatches"
            )
