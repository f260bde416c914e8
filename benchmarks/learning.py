"""The cost of learning to be sparse: time of a router-stage step over that of dense fine-tuning.

    python benchmarks/learning.py            (D 512, F 2048, E 64, N 8; 8 rows of 256 tokens)
    python benchmarks/learning.py --torch    # beside transformers on PyTorch, the same dense model

Steps are timed in turn, so that other load on the machine affects all alike; the ratio is that of
medians. The forward pass of the dense model that the preset `ours` distils from is due to the loss,
not to routing, so there is a row without it. PyTorch (which no extra installs) has a process of its
own, as many threads as there are cores, AdamW with one kernel for all parameters, and clips
gradients, as we do.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import pathlib
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from lte_jax import memory, optim, stages, training_step
from lte_jax.config import (
    PRESETS,
    ComputeConfig,
    LTEConfig,
    ModelConfig,
    OptimConfig,
    StageConfig,
    StagesConfig,
)
from lte_jax.errors import UserError, cli_errors
from lte_jax.sparsity import SparsityController

CONFIG = ModelConfig(
    vocab_size=4096, d_model=512, d_ff=2048, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64,
    max_length=256,
)  # fmt: skip

_PAUSE = 0.5  # seconds before a step: threads that wait for more work have gone to sleep


def prepare(name: str, lte: LTEConfig):
    """A function that takes one step of a stage and waits for it."""
    compute = ComputeConfig(unroll=CONFIG.num_layers)
    model = training_step.trained_model(CONFIG, None if name == "finetune" else lte, compute, 1)
    plan = StagesConfig(finetune=StageConfig(steps=100))
    [stage] = [s for s in stages.make(plan, lte) if s.name == name]
    optimizer = optim.make(OptimConfig(), stage.config, stage.rules)
    tokens = jax.random.randint(jax.random.key(0), (8, 256), 0, CONFIG.vocab_size)
    batch = {"tokens": tokens, "segments": jnp.ones_like(tokens)}
    params = jax.jit(model.init)(jax.random.key(1), tokens[:1])["params"]
    held = functools.partial(training_step.teacher_of, compute=compute)
    teacher = jax.jit(held)(params) if stage.taught else None
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


class TorchProcess:
    """Dense fine-tuning by transformers on PyTorch, in a process of its own, as a user's.

    Calling it takes a step; the result is its seconds.
    """

    def __init__(self):
        command = [sys.executable, __file__, "--torch-steps"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self()

    def __call__(self) -> float:
        tell, hear = self._process.stdin, self._process.stdout
        assert tell is not None
        assert hear is not None
        print("step", file=tell, flush=True)
        answer = hear.readline()
        if not answer:
            raise UserError("--torch: PyTorch's process ended, see its message above")
        return float(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def torch_steps() -> None:
    """What that process runs: a step for each line that it reads."""
    try:
        import torch
    except ImportError:
        raise UserError("--torch: PyTorch is not installed: pip install torch") from None
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    c = CONFIG
    shapes = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_length,
    )
    model = LlamaForCausalLM(shapes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, c.vocab_size, (8, 256))
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        print(time.perf_counter() - start, flush=True)


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--torch", action="store_true", help="time transformers on PyTorch, too")
    parser.add_argument("--torch-steps", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.torch_steps:
        return torch_steps()
    memory.keep()  # as train.py does
    ours = dataclasses.replace(PRESETS["ours"], expert_size=32)
    paper = dataclasses.replace(PRESETS["paper"], expert_size=32)
    rows = {
        "dense fine-tuning": prepare("finetune", ours),
        "router stage, preset paper (soft)": prepare("router", paper),
        "router stage, preset ours, no distillation": prepare(
            "router", dataclasses.replace(ours, distill_weight=0.0, hidden_distill_weight=0.0)
        ),
        "router stage, preset ours": prepare("router", ours),
    }
    if flags.torch:
        rows["dense fine-tuning, transformers on PyTorch"] = peer = TorchProcess()
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(flags.rounds):
        for name, run in rows.items():
            time.sleep(_PAUSE)
            times[name].append(run())
    if flags.torch:
        peer.close()
    dense = statistics.median(times["dense fine-tuning"])
    print("| step | median s | of dense |\n|---|--:|--:|")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median:.3f} | {median / dense:.2f} |")


if __name__ == "__main__":
    main()
