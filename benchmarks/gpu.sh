#!/usr/bin/env bash
# Measures everything on a GPU: block sizes, the FFN kernel, decoding. It is meant to take nine
# minutes, and has not run yet.
#
#     benchmarks/gpu.sh [FOLDER]          (default benchmarks/results)
#
# Needs this repository, jax for the GPU and the extra `gpu` (jax-triton) with a matching triton:
# 3.6 for jax-triton 0.3.1. Writes FOLDER/<device>.json with commit, versions and command; after a
# failure, FOLDER/parts has what was measured before. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-benchmarks/results}
parts=$results/parts
python=${PYTHON:-python}
mkdir -p "$parts"

"$python" - <<'CHECK'
import jax
from lte_jax import kernels
if jax.default_backend() != "gpu":
    raise SystemExit(f"error: jax runs on {jax.default_backend()}: expected a GPU")
if reason := kernels.unavailable("triton"):
    raise SystemExit(f"error: the Triton kernels cannot run: {reason}")
CHECK

# Meant to take 1.5 of tests, 2 of tuning, 2 of the FFN, 3 of decoding; in minutes.
timeout 90 "$python" -m pytest -q tests/test_kernels.py -k triton -p no:cacheprovider |
  tee "$parts/tests.log" || echo "FAILED or cut short: see $parts/tests.log"
timeout 120 "$python" -m lte_jax.kernels.tune --rows 1 |
  tee "$parts/tune.log" || echo "not all tuned: see $parts/tune.log"
"$python" benchmarks/ffn.py --dtype bfloat16 --batch 1,2,4,8,16 --layers 16 --rounds 21 \
  --json "$parts/ffn.json"
"$python" benchmarks/decode.py --prompt 128,512,2048 --rounds 5 --json "$parts/decode.json"
"$python" benchmarks/decode.py --prompt 128 --batch 2,4,8,16 --sparsity 0.5 --new-tokens 64 \
  --rounds 3 --json "$parts/decode-batches.json"
"$python" benchmarks/report.py --results "$results" --merge "$parts/"*.json
