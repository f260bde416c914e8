"""Counts the FLOPs per token of the LTE paper's models: the table of docs/flops.md.

    python benchmarks/flops.py

Nothing is run: the count follows from the shapes (`sparsity.flops_per_token`). The sparsities of
LLaMA-7B are those that the paper's Table 1 implies; GPT-2 medium is counted at the same ones, and
the RoBERTas at 80 to 95%, where the paper reports no drop on GLUE.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from lte_jax.config import LTEConfig, ModelConfig, num_experts
from lte_jax.hf.config_json import parse
from lte_jax.sparsity import flops_per_token

GIGA = 2**30  # as in Table 1
_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 50257,
    "n_positions": 1024, "n_embd": 1024, "n_layer": 24, "n_head": 16,
}  # fmt: skip
_ROBERTA = {
    "model_type": "roberta", "architectures": ["RobertaForSequenceClassification"],
    "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
    "layer_norm_eps": 1e-5, "hidden_act": "gelu", "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2,
}  # fmt: skip
_BASE = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12,
}  # fmt: skip
_LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16,
}  # fmt: skip
# What config.json says of each model on the hub.
MODELS: dict[str, dict[str, Any]] = {
    "LLaMA-7B": _LLAMA,
    "GPT-2 medium": _GPT2,
    "RoBERTa-base": _ROBERTA | _BASE,
    "RoBERTa-large": _ROBERTA | _LARGE,
}
TABLE_1 = {"XSum": 5.38, "E2E": 4.65, "WikiText-103": 6.59}  # of LTE on LLaMA-7B
_GENERATION = [("XSum", 0.839), ("E2E", 0.930), ("WikiText-103", 0.689)]
_GLUE = [("GLUE", 0.8), ("GLUE", 0.9), ("GLUE", 0.95)]
POINTS = {
    "LLaMA-7B": _GENERATION, "GPT-2 medium": _GENERATION,
    "RoBERTa-base": _GLUE, "RoBERTa-large": _GLUE,
}  # fmt: skip


def read(name: str) -> ModelConfig:
    """The model of that name."""
    return parse(MODELS[name], "config.json")[0]


def table() -> str:
    """The table in Markdown: a row for each model, dense and at each of its sparsities."""
    lines = ["| model | experts | FFN sparsity | | GFLOPs | of dense | paper |"]
    lines += ["|---|--:|--:|---|--:|--:|--:|"]
    lte = LTEConfig(expert_size=32)
    for name, points in POINTS.items():
        config, printed = read(name), TABLE_1 if name == "LLaMA-7B" else {}
        dense, experts = flops_per_token(config) / GIGA, num_experts(config, lte)
        lines += [f"| {name} | 1 | dense | | {dense:.4f} | | {12.06 if printed else ''} |"]
        for task, sparsity in points:
            count = flops_per_token(config, lte, sparsity) / GIGA
            cells = (name, experts, f"{sparsity:.1%}", task, f"{count:.4f}", f"{count / dense:.3f}")
            lines += [f"| {' | '.join(map(str, cells))} | {printed.get(task, '')} |"]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
