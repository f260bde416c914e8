"""Checks that 1,000 steps stay finite at both presets on every config that a small machine can run.

    python benchmarks/thousand.py --models=FOLDER     (or: make thousand MODELS=FOLDER)

It takes a quarter of an hour. Models and texts are those of tinystories.py, named likewise. 700
steps of the router stage and 300 of adaptation, two records per step. Training itself stops at the
first loss that is not finite; this checks every number in metrics.jsonl as well.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from tinystories import MODELS, add_models_to, check

from lte_jax.errors import cli_errors
from lte_jax.sweep import processes

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = ("demo.py", *(f"tinystories.py:{name}" for name in MODELS), "llama7b.py:smoke")
OVERRIDES = {
    "stages.router.steps": 700,
    "stages.adapt.steps": 300,
    "data.batch_size": 2,
    "optim.microbatches": 1,
    "eval_every": 1000,
    "checkpoint.every": 1000,
    "report": False,
}


def run(config: str, preset: str, models: pathlib.Path, out: pathlib.Path) -> str:
    """Trains, unless already done; returns a row of the table."""
    joined = ("," if ":" in config else ":").join((config, preset))
    folder = out / joined.replace(".py", "").replace(":", "-").replace(",", "-")
    command = [sys.executable, "train.py", f"--config=configs/{joined}", f"--workdir={folder}"]
    command += [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    command += [f"--config.source.path={models / m}" for m in MODELS if config.endswith(m)]
    # One run per core.
    env = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "TQDM_DISABLE": "1"}
    out.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log).returncode
    if code:
        return f"| {joined} | failed with code {code}: see {folder.with_suffix('.log')} | |"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = [v for line in lines for v in line.values() if isinstance(v, int | float)]
    finite = all(math.isfinite(number) for number in numbers)
    print(f"{joined}: {'all finite' if finite else 'NOT FINITE'}", flush=True)
    return f"| {joined} | {len(numbers)} | {'all' if finite else 'NOT ALL'} |"


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "runs" / "thousand")
    add_models_to(parser)
    flags = parser.parse_args()
    flags.models = check(flags.models)
    out = flags.out.absolute()
    runs = [(config, preset) for config in CONFIGS for preset in ("ours", "paper")]
    with processes.side_by_side(2) as pool:
        rows = list(pool.map(lambda r: run(*r, flags.models, out), runs))
    print("\n| config | numbers | finite |\n|---|--:|---|", *rows, sep="\n")
    if any("failed" in row or "NOT" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
