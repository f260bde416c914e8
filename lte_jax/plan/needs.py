"""What a stage needs: bytes of its state on each device and on the disk, and its steps' FLOPs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from lte_jax import lora, optim, sharding, stages, training_step
from lte_jax.config import Experiment, LTEConfig, ModelConfig
from lte_jax.model import Transformer, abstract_params
from lte_jax.params import is_router
from lte_jax.plan import step
from lte_jax.plan.devices import Devices
from lte_jax.sparsity import SparsityController


@dataclasses.dataclass(frozen=True)
class StageNeeds:
    """What a stage takes, in bytes."""

    name: str
    steps: int
    sparse: bool
    flops: float  # of a step, on each device
    checkpoint: int  # a training state, whole
    memory: dict[str, int]  # what it is for -> on each device

    def saves(self, every: int) -> int:
        """How many checkpoints it writes."""
        return -(-self.steps // every)

    @property
    def bytes(self) -> int:
        """All that it takes on each device."""
        return sum(self.memory.values())


def of_stage(
    stage: stages.Stage,
    experiment: Experiment,
    config: ModelConfig,
    devices: Devices,
    at_most: int | float = math.inf,
) -> StageNeeds:
    """Counts the needs of a stage.

    Args:
      stage: of the experiment.
      experiment: to run.
      config: of the dense model.
      devices: to run it on.
      at_most: bytes; if the state alone takes more on a device, its steps are not counted.
    """
    lte = experiment.lte if stage.sparse else None
    base, trained = lora.abstract(config, lte, experiment)
    optimizer = optim.make(experiment.optim, stage.config, stage.rules)

    def begin(params: Any) -> training_step.TrainState:
        control = SparsityController.start(experiment.lte, config.num_layers)
        number = jnp.zeros((), jnp.int32)
        return training_step.TrainState(number, params, optimizer.init(params), control)

    state = jax.eval_shape(begin, trained)
    places = training_step.state_shardings(state, devices.mesh)
    params, parts = a_device(state.params, places.params), experiment.optim.microbatches
    memory = {
        "parameters": params,
        "gradients": params * (1 if parts == 1 else 2),
        "moments": a_device(state.opt_state, places.opt_state),
        "the stage's start": params,
    }
    start, place = trained, places.params
    if base is not None:
        start, place = base.params, sharding.param_shardings(base.params, devices.mesh)
        memory = {"frozen": a_device(start, place)} | memory
    if stage.taught:
        memory["teacher"] = _teacher(stage, experiment, start, place)
    flops = 0.0
    if sum(memory.values()) <= at_most:
        data, fsdp, tensor = map(devices.along, sharding.MESH_AXES)
        rows = -(-experiment.data.batch_size // (data * fsdp * parts))
        counted = step.count(stage, experiment, config, rows, fsdp, tensor, devices.tpu)
        work = max(counted.layer, counted.head)
        memory |= {"activations": counted.kept + counted.layer, "logits": work - counted.layer}
        flops = counted.flops
    memory = {name: number for name, number in memory.items() if number}
    whole = sum(size(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
    return StageNeeds(stage.name, stage.config.steps, stage.sparse, flops, whole, memory)


def _teacher(stage: stages.Stage, experiment: Experiment, params: Any, places: Any) -> int:
    """Bytes of the teacher on each device, less what it shares with the start, or with `base`."""
    held = jax.eval_shape(lambda w: training_step.teacher_of(w, experiment.compute), params)
    first = next(s for s in stages.make(experiment.stages, experiment.lte) if s.sparse)
    shares = first.name == stage.name or experiment.lora.rank > 0
    shares = shares and training_step.starts_dense(experiment.lte)
    leaves = zip(*map(jax.tree.leaves, (params, held, places)), strict=True)
    own = (x for x in leaves if not (shares and x[0].dtype == x[1].dtype))
    return sum(size(place.shard_shape(leaf.shape), leaf.dtype) for _, leaf, place in own)


def folder_bytes(config: ModelConfig, lte: LTEConfig | None) -> int:
    """Bytes of a model's folder: weights in the source's type, routers and orders in 32 bits."""
    flat = traverse_util.flatten_dict(abstract_params(Transformer(config, lte)), sep="/")
    weights = sum(
        size(leaf.shape, leaf.dtype if is_router(path) else config.dtype)
        for path, leaf in flat.items()
    )
    return weights + (0 if lte is None else 4 * config.num_layers * config.d_ff)


def largest(config: ModelConfig) -> tuple[int, int]:
    """Bytes in float32 of the largest array of a dense model, and of the largest of its tensors.

    An array has the tensors of all layers, of which one at a time is written.
    """
    flat = traverse_util.flatten_dict(abstract_params(Transformer(config)), sep="/")
    whole = max(size(leaf.shape, jnp.float32) for leaf in flat.values())
    one = (leaf.shape[path.startswith("layers/") :] for path, leaf in flat.items())
    return whole, max(size(shape, jnp.float32) for shape in one)


def a_device(tree: Any, places: Any) -> int:
    """Bytes on each device of a tree of abstract arrays with these shardings."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    return sum(size(place.shard_shape(leaf.shape), leaf.dtype) for leaf, place in leaves)


def number(tree: Any) -> int:
    """The numbers in a tree of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def size(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array."""
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def written(number: int | float, unit: str = "B") -> str:
    """A number of bytes (or other units), in the largest unit that makes it 1 or more."""
    power = max(min(len(str(int(number))) - 1, 17) // 3, 0)
    names = ("bytes" if unit == "B" else unit, *(f"{prefix}{unit}" for prefix in "kMGTP"))
    return f"{number / 1000**power:.3g} {names[power]}"
