"""What a model, its sparsity and an experiment are, as frozen data.

Plain data without arrays: the model module, the importer, the trainer and the reports all read
the same dataclasses. `Experiment` is what a file in configs/ and the flags of train.py become.
The trailing comments are the documentation of the keys.

Dimension key: B batch  L length  D model width  E experts  M neurons per expert  F = E*M
               N layers  H heads  K kv heads  C head width  V vocabulary
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

from lte_jax.errors import UserError, nearest

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Routing = Literal["dense", "soft", "hard", "straight_through", "top_k"]
T = TypeVar("T")


def _check(ok: bool, where: str, value: Any, expected: str) -> None:
    if not ok:
        raise UserError(f"{where}={value!r}: expected {expected}")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Stretching of the rotary frequencies (`rope_scaling` of an HF config)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0  # llama3 only
    high_freq_factor: float = 4.0  # llama3 only
    original_max_length: int = 8192  # llama3 only


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The dense Transformer: everything its forward pass needs besides the weights."""

    vocab_size: int = 259  # V; of the byte tokenizer
    d_model: int = 64  # D
    d_ff: int = 192  # F
    num_layers: int = 2  # N
    num_heads: int = 4  # H
    num_kv_heads: int = 4  # K; H for multi-head, 1 for multi-query attention
    head_dim: int = 16  # C
    max_length: int = 256  # longest sequence the positions were trained for
    family: str = "llama"  # HF model_type
    activation: Activation = "silu"
    gated: bool = True  # gate and up matrices (SwiGLU), or up alone
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False  # attention output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head (Qwen3)
    sliding_window: int | None = None  # attend to this many latest positions (self included)
    sliding_layers: tuple[bool, ...] | None = None  # which layers slide; None: all of them
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    dtype: str = "float32"  # of the stored weights

    def __post_init__(self):
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


@dataclasses.dataclass(frozen=True)
class LTEConfig:
    """Experts, routers and the losses that teach them. Defaults are the preset `ours`."""

    expert_size: int = 32  # M; must divide F. The paper: 32 for every model
    grouping: Literal["kmeans", "coactivation", "random"] = "coactivation"
    seed: int = 0  # of the grouping and of random router starts
    router_bias: bool = True  # the paper's Eq. 1 has none
    router_init: Literal["ridge", "normal", "open"] = "ridge"
    router_init_std: float = 2.0  # of the logits at the start
    threshold: float = 0.5  # tau of Eq. 2: an expert runs where score > tau
    routing: Routing = "hard"  # what `apply` uses unless told otherwise
    stage1_routing: Literal["soft", "straight_through"] = "straight_through"
    target_sparsity: float | None = 0.5  # None: fixed efficiency_weight and threshold
    efficiency_weight: float = 0.0  # eta of Eq. 6; where the controller starts if there is one
    efficiency_power: Literal[1, 2] = 2  # Eq. 4 prints the square, its text says the mean
    separability_weight: float = 0.0  # lambda of Eq. 6
    separability_eps: float = 1e-2  # guard of Eq. 5, which divides by zero as printed
    distill_weight: float = 1.0  # 1: only KL to the dense model, 0: only the task loss

    def __post_init__(self):
        _check(self.expert_size >= 1, "expert_size", self.expert_size, "a positive integer")
        sparsity = self.target_sparsity
        _check(
            sparsity is None or 0 < sparsity < 1,
            "target_sparsity",
            sparsity,
            "strictly between 0 and 1, such as 0.5, or None for a fixed efficiency_weight",
        )
        _check(0 < self.threshold < 1, "threshold", self.threshold, "strictly between 0 and 1")
        _check(self.separability_eps > 0, "separability_eps", self.separability_eps, "positive")
        _check(
            0 <= self.distill_weight <= 1, "distill_weight", self.distill_weight, "within [0, 1]"
        )


def num_experts(config: ModelConfig, lte: LTEConfig | None) -> int:
    """E: how many experts an FFN has; 1 for a dense model.

    Raises:
      UserError: where the expert size does not divide the FFN width.
    """
    if lte is None:
        return 1
    if config.d_ff % lte.expert_size:
        near = [m for m in range(1, config.d_ff + 1) if config.d_ff % m == 0]
        near = sorted(sorted(near, key=lambda m: abs(m - lte.expert_size))[:4])
        raise UserError(
            f"lte.expert_size={lte.expert_size} does not divide the FFN width {config.d_ff}: "
            f"nearby sizes that do are {', '.join(map(str, near))}"
        )
    return config.d_ff // lte.expert_size


def top_k(config: ModelConfig, lte: LTEConfig | None, routing: Routing) -> int | None:
    """How many experts routing="top_k" keeps for each token; None for other routings."""
    if lte is None or routing != "top_k":
        return None
    return max(1, round((1.0 - (lte.target_sparsity or 0.0)) * num_experts(config, lte)))


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
class SourceConfig:
    """Where the dense model comes from."""

    path: str = ""  # HF or LTE folder, or hub id; "" starts from random weights
    scratch: ModelConfig = ModelConfig()  # the model to make where path is ""
    tokenizer: str = ""  # folder or hub id; "": the model's own, or bytes where path is ""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # masters stay float32
    remat: bool = False  # recompute activations in the backward pass: less memory, a third slower


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text in, batches of token ids out."""

    train: str = ""  # JSON-lines file, hub id ("name" or "name:config"), or "python-stdlib"
    validation: str = ""
    column: str = "text"
    length: int = 256  # L
    batch_size: int = 16  # sequences a step, over all hosts and microbatches
    pack: bool = True  # fill rows with several documents (attention stays within each), or pad
    newline: str = "\n"  # what replaces newlines: some character models never saw one
    max_documents: int | None = None  # of each source; None: all of them
    max_validation_rows: int = 64  # rows of `length`

    def __post_init__(self):
        _check(self.length >= 2, "length", self.length, "2 or more: a token and its successor")
        for name in ("batch_size", "max_validation_rows"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """Length and speed of one stage; what it trains and which losses it has is in stages.py."""

    steps: int = 0  # 0 skips the stage
    learning_rate: float = 1e-4  # of the model, at the peak
    router_lr_multiplier: float = 1.0
    warmup_ratio: float = 0.06
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr_ratio: float = 0.1  # of the peak, at the last step

    def __post_init__(self):
        for name in ("steps", "learning_rate", "router_lr_multiplier"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "zero or more")
        for name in ("warmup_ratio", "final_lr_ratio"):
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "within [0, 1]")


@dataclasses.dataclass(frozen=True)
class StagesConfig:
    """The stages in the order in which they run."""

    finetune: StageConfig = StageConfig()  # dense, before experts are made
    router: StageConfig = StageConfig(steps=1000, router_lr_multiplier=25.0)
    adapt: StageConfig = StageConfig(steps=500)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW, the same in every stage."""

    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0  # the paper: 0
    clip_norm: float = 1.0  # of routers and model apart; 0: no clipping
    microbatches: int = 1  # gradient accumulation: the batch is cut into this many parts

    def __post_init__(self):
        for name in ("b1", "b2"):
            _check(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("weight_decay", "clip_norm"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "zero or more")
        _check(self.eps > 0, "eps", self.eps, "positive")
        _check(self.microbatches >= 1, "microbatches", self.microbatches, "a positive integer")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product is the number of devices. -1: all the rest."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """How often, and how many, training states are kept."""

    every: int = 200  # steps
    keep_last: int = 2
    keep_best: int = 1  # by validation loss

    def __post_init__(self):
        for name in ("every", "keep_last"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        _check(self.keep_best >= 0, "keep_best", self.keep_best, "zero or more")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One run of train.py: what `get_config()` of a file in configs/ describes."""

    name: str = "experiment"
    seed: int = 0
    source: SourceConfig = SourceConfig()
    data: DataConfig = DataConfig()
    lte: LTEConfig = LTEConfig()
    calibration_rows: int | None = None  # training rows that group neurons, start routers and set
    # the last threshold; None: at least 32, and 32 real tokens for each of a router's D + 1 inputs
    stages: StagesConfig = StagesConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval_every: int = 100  # steps
    log_every: int = 10  # steps
    report: bool = True  # measure the result at the end, beside the dense model
    sample_prompt: str = "Once upon a time"
    sample_tokens: int = 100  # of the text that the report shows
    sample_temperature: float = 0.0  # 0: the likeliest token each time

    def __post_init__(self):
        for name in ("eval_every", "log_every"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "a positive integer")
        rows = self.calibration_rows
        _check(rows is None or rows >= 1, "calibration_rows", rows, "a positive integer or None")


def to_config_dict(config: Any) -> ConfigDict:
    """A locked, mutable ConfigDict with the fields of a dataclass: the start of a configs/ file."""
    fields = dataclasses.asdict(config)
    return ConfigDict(fields, convert_dict=True).lock()


def from_mapping(cls: type[T], values: Mapping[str, Any] | ConfigDict, where: str = "config") -> T:
    """The dataclass `cls` with `values`; absent keys keep their defaults.

    Raises:
      UserError: on a key that `cls` does not have (naming the nearest that it has), a value of
        the wrong type or outside its range, or a key without a default that is absent; with the
        dotted path of the key.
    """
    hints = typing.get_type_hints(cls)
    made = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"unknown key {where}.{key}: {nearest(key, hints)}")
        made[key] = _convert(hints[key], value, f"{where}.{key}")
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if field.name not in made and field.default is dataclasses.MISSING:
            raise UserError(f"{where}.{field.name} is missing: expected {spell(hints[field.name])}")
    try:
        return cls(**made)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `hint`, or a UserError that names the key `where`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping | ConfigDict):
        return from_mapping(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        _check(value in args, where, value, spell(hint))
        return value
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wrong_bool = isinstance(value, bool) and hint is not bool
    right = isinstance(hint, type) and isinstance(value, hint) and not wrong_bool
    _check(right, where, value, spell(hint))
    return value


def spell(hint: Any) -> str:
    """An annotated type in the words of an error message."""
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
