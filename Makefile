# `make` lists the targets. Each first makes its environment, from Python and pip alone.

PYTHON ?= python3
VENV ?= .venv
EXTRAS := data,dev,gguf,plot,serve,tasks,tensorboard
BIN := $(VENV)/bin
READY := $(VENV)/ready
# One worker per core, whole files, in the order of tests/conftest.py.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# Tests that write a model folder or read real ones: see tests/hf_models.py.
READING = $(shell grep -lE 'hf_models|shared / ' tests/test_*.py)

# Tests of what users run optimised: here XLA's rewriting is a part of what is tested.
OPTIMISED := $(patsubst %,tests/test_%.py,kernels model decoding)

.DEFAULT_GOAL := help
.PHONY: help env demo test check long test-optimised test-sources lint docs format bench tinystories comparison \
  thousand resume fuzz journeys blocks mutants clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is Python " \
	  + sys.version.split()[0] + ": 3.11 or later is needed, such as make PYTHON=python3.12")'
	@echo "making $(VENV) with lte-jax[$(EXTRAS)]: 1.7 GB, a minute or two"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# Not compiled, which takes half a minute: Python compiles what it imports, a fifth of it.
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile \
	  --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

env: $(READY)  ## make the environment only: .venv

demo: $(READY)  ## train a small dense model and make it sparse: four minutes
	$(BIN)/python train.py --config=configs/demo.py --workdir=runs/demo
	@echo
	@echo "The demo's model has 1 M parameters, too few to gain time by skipping."
	@$(BIN)/python benchmarks/ffn.py --brief

# Most of their time is compiling, of which a sixth is left without optimisation, with the older
# emitters of fused loops and each program in one piece. `make test XLA_FLAGS=` optimises fully.
test check long test-optimised blocks mutants: export XLA_FLAGS ?= --xla_backend_optimization_level=0 \
  --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters \
  --xla_cpu_parallel_codegen_split_count=1
test: $(READY)  ## run the fast tests, which are nearly all
	$(BIN)/pytest $(PARALLEL) -m "not slow"

check: $(READY)  ## run the slow tests: whole runs, killed runs, fuzzing
	$(BIN)/pytest $(PARALLEL) -m "slow and not long"

long: $(READY)  ## run the tests of a minute and more: journeys made small, forgetting, 64 bits, four processes
	$(BIN)/pytest $(PARALLEL) -m long

test-optimised: $(READY)  ## run the fast tests; kernels, model and decoding fully optimised
	$(BIN)/pytest $(PARALLEL) -m "not slow" $(addprefix --ignore=,$(OPTIMISED))
	XLA_FLAGS= $(BIN)/pytest $(PARALLEL) -m "not slow" $(OPTIMISED)

test-sources: $(READY)  ## run the tests that read models on float16, then on bfloat16 models
	LTE_JAX_SOURCE_DTYPE=float16 $(BIN)/pytest $(PARALLEL) $(READING)
	LTE_JAX_SOURCE_DTYPE=bfloat16 $(BIN)/pytest $(PARALLEL) $(READING)

lint: $(READY)  ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

$(VENV)/docs: $(READY)
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile \
	  --no-build-isolation --constraint constraints.txt --editable '.[docs]'
	@touch $@

docs: $(VENV)/docs  ## build the documentation as a site, strictly: runs/site/index.html
	@# Not --quiet, which would also keep --strict from seeing the warnings.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir runs/site

format: $(READY)  ## fix what lint can fix by itself
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY)  ## time kernels, decoding, training steps and the grouping of a LLaMA2-7B layer
	$(BIN)/python benchmarks/ffn.py --json runs/bench/ffn.json
	$(BIN)/python benchmarks/decode.py --new-tokens 8 --rounds 3 --json runs/bench/decode.json
	$(BIN)/python benchmarks/learning.py
	$(BIN)/python benchmarks/kmeans.py --layer 11008x4096

tinystories: $(READY)  ## README's table, from babyllama/ and stories260k/ in MODELS=FOLDER: half an hour
	$(BIN)/python benchmarks/tinystories.py --models='$(MODELS)' --out=runs/tinystories-table

comparison: $(READY)  ## a small table of every method, from babyllama/ in MODELS=FOLDER: a quarter of an hour (estimated)
	@test -f '$(MODELS)/babyllama/config.json' || { echo "error: '$(MODELS)' has no" \
	  "babyllama/config.json: name its folder, as in make comparison MODELS=FOLDER" >&2; exit 2; }
	$(BIN)/python -m lte_jax.sweep --config=configs/sweeps/methods.py:quick --workers=2 \
	  --out=runs/comparison --config.source.path='$(MODELS)/babyllama'

thousand: $(READY)  ## check that 1,000 steps stay finite, also on MODELS=FOLDER: 15 minutes
	$(BIN)/python benchmarks/thousand.py --models='$(MODELS)' --out=runs/thousand

resume: $(READY)  ## check that killed, stopped and full-disk runs resume bit for bit: half an hour
	LTE_JAX_KILLS=60 LTE_JAX_STOPS=12 LTE_JAX_DISKS=10 LTE_JAX_SWEEPS=1 LTE_JAX_PROCESSES=1 \
	  $(BIN)/pytest -m "not long" tests/test_resume.py tests/test_sweep.py tests/test_processes.py

fuzz: $(READY)  ## try hostile files, flags and arguments for ten minutes: success or a one-line error
	$(BIN)/python tests/fuzz --seed $${SEED:-0} --minutes 10

journeys: $(READY)  ## do what someone new does, in a clone and an environment of its own: 15 minutes
	$(BIN)/python tests/journeys

blocks: $(READY)  ## run each command of README and docs, made small: ten minutes
	LTE_JAX_BLOCKS=1 $(BIN)/pytest -n 2 --dist loadgroup tests/test_docs_commands.py

mutants: $(READY)  ## check that the tests catch one-line faults: ten minutes
	$(BIN)/python tests/mutants

clean:  ## remove environments, builds and caches; runs/ stays
	rm -rf .venv .venv312 build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
