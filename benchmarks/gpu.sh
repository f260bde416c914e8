#!/usr/bin/env bash
# Measures everything on a GPU: the kernels' tests, block sizes, the FFN kernel, decoding. It is
# meant to take nine minutes, and has not run on one yet.
#
#     benchmarks/gpu.sh [FOLDER]               (default benchmarks/results)
#     benchmarks/gpu.sh --rehearse FOLDER      (every script, at tiny shapes, on a CPU)
#
# Needs this repository, jax for the GPU, pytest and the extra `gpu` (jax-triton) with a matching
# triton: 3.6 for jax-triton 0.3.1. Writes FOLDER/<device>.json with commit, versions and command;
# FOLDER/parts has what each part measured and printed. A part that fails does not stop the others,
# but the script then ends in an error. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
rehearse=
if [[ ${1:-} == --rehearse ]]; then
  rehearse=1
  shift
  [[ $# == 1 ]] || { echo "error: --rehearse writes figures that mean nothing: name a FOLDER" >&2; exit 2; }
fi
results=${1:-benchmarks/results}
parts=$results/parts
python=${PYTHON:-python}
failed=()
mkdir -p "$parts"
rm -f "$parts"/*.json

part() { # NAME SECONDS COMMAND...: one part, with what it prints in NAME.log
  local name=$1 seconds=$2
  shift 2
  echo "== $name: $*"
  timeout "$seconds" "$@" 2>&1 | tee "$parts/$name.log" || failed+=("$name")
}

if [[ $rehearse ]]; then
  export JAX_PLATFORMS=cpu
  kernel=xla
  ffn=(--d-model 64 --d-ff 256 --layers 2 --dtype float32 --batch 1,2 --sparsity 0,0.5,0.95 --rounds 1)
  decode=(--small --prompt 8,16 --rounds 1 --new-tokens 4)
  batches=(--small --prompt 8 --batch 2,4 --sparsity 0.5 --new-tokens 4 --rounds 1)
else
  export JAX_PLATFORMS=cuda,cpu # tests otherwise choose the CPU, and those of Triton are skipped
  kernel=triton
  ffn=(--dtype bfloat16 --batch 1,2,4,8,16 --layers 16 --rounds 21)
  decode=(--prompt 128,512,2048 --rounds 5)
  batches=(--prompt 128 --batch 2,4,8,16 --sparsity 0.5 --new-tokens 64 --rounds 3)
  "$python" - <<'CHECK'
import jax
from lte_jax import kernels
if jax.default_backend() != "gpu":
    raise SystemExit(f"error: jax runs on {jax.default_backend()}: expected a GPU")
if reason := kernels.unavailable("triton"):
    raise SystemExit(f"error: the Triton kernels cannot run: {reason}")
CHECK
fi

# Meant to take 1.5 of tests, 2 of tuning, 2 of the FFN, 3 of decoding; in minutes.
part tests 90 "$python" -m pytest -q tests/test_kernels.py -k "$kernel" -p no:cacheprovider
# pytest is content when all are skipped.
grep -Eq '(^|[ =])[1-9][0-9]* passed' "$parts/tests.log" || failed+=("tests: none ran")
if [[ $rehearse ]]; then
  part tune 60 "$python" -m lte_jax.kernels.tune --help
else
  part tune 120 "$python" -m lte_jax.kernels.tune --rows 1
fi
part ffn 180 "$python" benchmarks/ffn.py "${ffn[@]}" --json "$parts/ffn.json"
part decode 180 "$python" benchmarks/decode.py "${decode[@]}" --json "$parts/decode.json"
part batches 120 "$python" benchmarks/decode.py "${batches[@]}" --json "$parts/batches.json"
measured=("$parts"/*.json)
if [[ -e ${measured[0]} ]]; then
  "$python" benchmarks/report.py --results "$results" --merge "${measured[@]}"
fi
if ((${#failed[@]})); then
  printf 'FAILED or cut short: %s\n' "${failed[@]}" >&2
  exit 1
fi
