"""The cost of learning to be sparse: time of a router-stage step over that of dense fine-tuning.

    python benchmarks/learning.py            (D 512, F 2048, E 64, N 8; 8 rows of 256 tokens)

Steps are timed in turn, so that other load on the machine affects all alike; the ratio is that of
medians. The forward pass of the dense model that the preset `ours` distils from is due to the loss,
not to routing, so there is a row without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from lte_jax import optim, stages, training_step
from lte_jax.config import PRESETS, LTEConfig, ModelConfig, OptimConfig, StageConfig, StagesConfig
from lte_jax.errors import cli_errors
from lte_jax.model import Transformer
from lte_jax.sparsity import SparsityController

CONFIG = ModelConfig(
    vocab_size=4096, d_model=512, d_ff=2048, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64,
    max_length=256,
)  # fmt: skip


def prepare(name: str, lte: LTEConfig):
    """A function that takes one step of a stage and waits for it."""
    model = Transformer(CONFIG, None if name == "finetune" else lte)
    plan = StagesConfig(finetune=StageConfig(steps=100))
    [stage] = [s for s in stages.make(plan, lte) if s.name == name]
    optimizer = optim.make(OptimConfig(), stage.config, stage.rules)
    tokens = jax.random.randint(jax.random.key(0), (8, 256), 0, CONFIG.vocab_size)
    batch = {"tokens": tokens, "segments": jnp.ones_like(tokens)}
    params = jax.jit(model.init)(jax.random.key(1), tokens[:1])["params"]
    teacher = jax.tree.map(jnp.copy, params) if stage.taught else None
    step = jax.jit(training_step.make_train_step(model, stage, optimizer), donate_argnums=0)
    state = training_step.TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), SparsityController.start(lte)
    )

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, batch, teacher)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    run()  # compiles
    return run


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    flags = parser.parse_args()
    ours = dataclasses.replace(PRESETS["ours"], expert_size=32)
    paper = dataclasses.replace(PRESETS["paper"], expert_size=32)
    rows = {
        "dense fine-tuning": prepare("finetune", ours),
        "router stage, preset paper (soft)": prepare("router", paper),
        "router stage, preset ours, no distillation": prepare(
            "router", dataclasses.replace(ours, distill_weight=0.0)
        ),
        "router stage, preset ours": prepare("router", ours),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(flags.rounds):
        for name, run in rows.items():
            times[name].append(run())
    dense = statistics.median(times["dense fine-tuning"])
    print("| step | median s | of dense |\n|---|--:|--:|")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median:.3f} | {median / dense:.2f} |")


if __name__ == "__main__":
    main()
