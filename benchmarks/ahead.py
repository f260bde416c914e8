"""Compiles every program of a run for devices that are not at hand, and compares with the plan.

    PYTHONPATH=PLUGIN python benchmarks/ahead.py                 # configs/llama7b.py, 8 H200
    PYTHONPATH=PLUGIN python benchmarks/ahead.py --config=configs/llama7b.py:paper --devices=h200:16
    PYTHONPATH=PLUGIN python benchmarks/ahead.py --devices=v5p:64 --config.data.batch_size=64

PLUGIN is a folder with the compiler of those devices, of the version that jax has:

    pip install --no-deps --target PLUGIN jax-cuda12-plugin==JAX jax-cuda12-pjrt==JAX
    pip install --no-deps --target PLUGIN libtpu                  # for TPUs

Nothing is allocated and nothing runs. For each program: bytes on each device of its operands, and
of what comes and goes while it runs (results that do not take an operand's place among it), as XLA
counts them; the plan's count of the same over XLA's; collective operations in its text, those in a
loop once; and how long it took to compile. XLA does not measure which algorithms are fastest, as
it does where the devices are. Writes a table to --out as well.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TPU_SKIP_MDS_QUERY": "1"}
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.experimental import topologies

from lte_jax import (
    config,
    evaluation,
    lora,
    moefication,
    optim,
    plan,
    refit,
    router_init,
    sharding,
    stages,
)
from lte_jax import training_step as training
from lte_jax.errors import UserError, cli_errors
from lte_jax.files import atomic_write
from lte_jax.model import Transformer, abstract_params
from lte_jax.plan.needs import written
from lte_jax.sparsity import SparsityController

# A description of the device, as XLA's GpuTargetConfigProto.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H200"
"""
TPU = {"v5p": "v5p:{}x{}x{}", "v5e": "v5e:{}x{}", "v6e": "v6e:{}x{}", "v4": "v4:{}x{}x{}"}
START = "the stage's start"
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Program(NamedTuple):
    """A program of a run, with shapes in place of arrays."""

    name: str
    lower: Callable[[], Any]
    planned: int | None = None  # bytes on each device, of all; None: the plan does not count it
    alone: bool = False  # on one device, outside of the mesh


def topology(words: str) -> list[Any]:
    """Devices as "h200:8" or "v5p:64"; they can be compiled for, not used."""
    kind, _, number = words.partition(":")
    if kind not in ("h200", *TPU) or not (number or "1").isdigit():
        raise UserError(f"--devices={words}: expected h200 or one of {', '.join(TPU)}, as h200:8")
    count = int(number or 1)
    try:
        if kind == "h200":
            how = {"target_config": H200, "topology": f"1x1x{count}"}
            return topologies.get_topology_desc("", "cuda", **how).devices
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # else it looks for its host
        axes = TPU[kind].count("{}")
        sides = [2 ** ((count.bit_length() - 1 + axis) // axes) for axis in range(axes)]
        return topologies.get_topology_desc(TPU[kind].format(*sides), "tpu").devices
    except RuntimeError as error:  # NotImplementedError is one
        raise UserError(
            f"--devices={words}: no compiler for them ({error}): expected its packages in a folder "
            "of PYTHONPATH, see --help"
        ) from None


def placed(tree: Any, shardings: Any) -> Any:
    """Abstract arrays with their places."""
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(put, tree, shardings)


def loaded(model: Transformer, experiment: config.Experiment, mesh: jax.sharding.Mesh) -> Any:
    """The parameters of a model as the pipeline loads them."""
    types = lora.dtypes(model.config, model.lte, experiment)
    shapes = traverse_util.flatten_dict(abstract_params(model), sep="/")
    typed = {k: jax.ShapeDtypeStruct(x.shape, jnp.dtype(types[k])) for k, x in shapes.items()}
    params = traverse_util.unflatten_dict(typed, sep="/")
    return placed(params, sharding.param_shardings(params, mesh))


def step_of(
    stage: stages.Stage, experiment: config.Experiment, mesh: jax.sharding.Mesh
) -> tuple[Any, tuple[Any, ...]]:
    """The training step of a stage as the trainer jits it, and its operands."""
    scratch, data = experiment.source.scratch, experiment.data
    lte = experiment.lte if stage.sparse else None
    model = training.trained_model(scratch, lte, experiment.compute)
    optimizer = optim.make(experiment.optim, stage.config, stage.rules)

    def begin(params: Any) -> training.TrainState:
        control = SparsityController.start(experiment.lte, scratch.num_layers)
        number = jnp.zeros((), jnp.int32)
        return training.TrainState(number, params, optimizer.init(params), control)

    base, params = lora.abstract(scratch, lte, experiment)
    state = jax.eval_shape(begin, params)
    places = training.state_shardings(state, mesh)
    whole = params
    if base is not None:
        whole = placed(base.params, sharding.param_shardings(base.params, mesh))
        base = base.replace(params=whole)
    teacher = None
    if stage.taught:
        held = jax.eval_shape(lambda w: training.teacher_of(w, experiment.compute), whole)
        teacher = placed(held, sharding.param_shardings(whole, mesh))
    cells = jax.ShapeDtypeStruct((data.batch_size, data.length), jnp.int32)
    batch = dict.fromkeys(("tokens", "segments"), placed(cells, sharding.batch_sharding(mesh)))
    step = training.make_train_step(model, stage, optimizer, experiment.optim.microbatches)
    outputs = (places, sharding.replicated(mesh))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=outputs)
    return jitted, (placed(state, places), batch, teacher, base)


def steps(experiment: config.Experiment, mesh: jax.sharding.Mesh) -> Iterator[Program]:
    """The training step and the validation of each stage."""
    scratch = experiment.source.scratch
    devices = plan.Devices(mesh.devices.flat[0].device_kind, mesh, None, None)
    for stage in stages.make(experiment.stages, experiment.lte):
        step, operands = step_of(stage, experiment, mesh)
        needed = plan.needs.of_stage(stage, experiment, scratch, devices).memory
        # What else lies there, the stage's start, is no operand, unless it is the teacher.
        own = "teacher" if {"teacher", "frozen"} & {*needed} or not stage.taught else START
        names = ("frozen", "parameters", "moments", "gradients", "activations", "logits", own)
        counted = sum(needed.get(name, 0) for name in names)
        yield Program(f"step of {stage.name}", lambda f=step, x=operands: f.lower(*x), counted)
        state, batch, _, base = operands
        lte = experiment.lte if stage.sparse else None
        model = training.trained_model(scratch, lte, experiment.compute)
        check = jax.jit(training.make_eval_step(model, stage))
        seen = state.params, batch, jax.ShapeDtypeStruct((), jnp.float32), base
        yield Program(f"validation of {stage.name}", lambda f=check, x=seen: f.lower(*x))


def preparation(experiment: config.Experiment, mesh: jax.sharding.Mesh) -> Iterator[Program]:
    """Grouping, the start of the routers, and the fit of down projections, on a record each."""
    scratch, lte = experiment.source.scratch, experiment.lte
    everywhere = sharding.replicated(mesh)
    cells = jax.ShapeDtypeStruct((1, experiment.data.length), jnp.int32, sharding=everywhere)
    record = {"tokens": cells, "segments": cells}
    model = training.trained_model(scratch, lte, experiment.compute)
    params = loaded(model, experiment, mesh)
    whole = {k: w for k, w in params["layers"]["ffn"].items() if k != "router"}
    bare = params | {"layers": params["layers"] | {"ffn": whole}}
    part = range(max(1, router_init.PASS_BYTES // (4 * scratch.d_ff**2)))
    if lte.grouping == "coactivation":
        dense = model.clone(lte=None)
        shapes = loaded(dense, experiment, mesh)
        sums = moefication._magnitude_sums  # noqa: SLF001
        yield Program("grouping", lambda: sums.lower(dense, shapes, record, part))
    if lte.router_init == "ridge":
        experts = config.num_experts(scratch, lte)
        top = max(1, round((1 - lte.wanted_sparsity("ridge")) * experts))
        moments = router_init._moments  # noqa: SLF001
        yield Program("routers, products", lambda: moments.lower(model, top, bare, record))
        shape = scratch.num_layers, scratch.d_model, experts
        kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
        place = sharding.param_shardings({"layers": {"ffn": {"router": {"kernel": kernel}}}}, mesh)
        kernel = placed(kernel, place["layers"]["ffn"]["router"]["kernel"])
        edges = jax.ShapeDtypeStruct(shape[::2], jnp.float32, sharding=everywhere)
        count = router_init._histogram  # noqa: SLF001
        yield Program(
            "routers, quantiles", lambda: count.lower(model, bare, record, kernel, edges, edges)
        )
    if lte.refit:
        fit = refit._sums  # noqa: SLF001
        yield Program("down projections", lambda: fit.lower(model, params, record, part))


def ending(experiment: config.Experiment, mesh: jax.sharding.Mesh) -> Iterator[Program]:
    """What comes after training: a tensor is written, both models are measured on one device."""
    scratch, how = experiment.source.scratch, experiment.compute
    for words, lte in ("dense", None), ("LTE", experiment.lte):
        model = Transformer(scratch, lte, dtype=how.dtype)
        if lte is not None:
            params = traverse_util.flatten_dict(loaded(model, experiment, mesh), sep="/")
            largest = max(params.values(), key=lambda x: math.prod(x.shape[1:]))
            one = jax.jit(lambda w: w[0], out_shardings=sharding.replicated(mesh))
            yield Program("export of a tensor", functools.partial(one.lower, largest))
        here = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
        put = functools.partial(jax.ShapeDtypeStruct, sharding=here)
        own = jax.tree.map(lambda x, put=put: put(x.shape, how.dtype), abstract_params(model))
        shape = experiment.data.batch_size, experiment.data.length
        batch = dict.fromkeys(("tokens", "segments"), put(shape, jnp.int32))
        measure = functools.partial(evaluation._measure.lower, routing=None)  # noqa: SLF001
        lower = functools.partial(measure, model, own, batch, None)
        work = plan.report.activations(model, *shape, tpu=mesh.devices.flat[0].platform == "tpu")
        counted = plan.report.weights(model) + sum(work.values())
        yield Program(f"evaluation, {words}", lower, counted, alone=True)


def measured(program: Program, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """A row of the table."""
    begin = time.monotonic()
    with contextlib.nullcontext() if program.alone else jax.set_mesh(mesh):
        compiled = program.lower().compile()
    seconds, memory = time.monotonic() - begin, compiled.memory_analysis()
    operands = memory.argument_size_in_bytes
    work = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = collections.Counter(
        re.findall(rf"= .*? ({'|'.join(COLLECTIVES)})(?:-start)?\(", compiled.as_text())
    )
    return {
        "program": program.name,
        "operands": written(operands),
        "work": written(work),
        "plan": f"{program.planned / (operands + work):.2f}" if program.planned else "",
        "collectives": ", ".join(f"{n} {name}" for name, n in sorted(found.items())),
        "compiled": f"{seconds:.1f} s",
    }


@cli_errors()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", default="configs/llama7b.py", help="of an experiment with a source.scratch")
    add("--devices", default="h200:8", help="kind and number")
    add("--only", default="", metavar="NAME", help="of programs whose names begin so")
    add("--out", type=Path, help="file for the table")
    flags, overrides = parser.parse_known_args()
    keys = [word.removeprefix("--config.") for word in overrides]
    experiment = config.load_config(flags.config, ["source.path=", *keys])
    mesh = sharding.make_mesh(experiment.mesh, topology(flags.devices))
    rows = []
    made = (*preparation(experiment, mesh), *steps(experiment, mesh), *ending(experiment, mesh))
    for program in made:
        if not program.name.startswith(flags.only):
            continue
        rows.append(measured(program, mesh))
        print(*rows[-1].values(), sep="  ", flush=True)
    heads = list(rows[0])
    lines = ["| " + " | ".join(heads) + " |", "|---|--:|--:|--:|---|--:|"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in rows]
    table = f"{flags.config}, {flags.devices}, mesh {dict(mesh.shape)}:\n\n" + "\n".join(lines)
    print(table)
    if flags.out:
        atomic_write(flags.out, table + "\n")


if __name__ == "__main__":
    sys.exit(main())
