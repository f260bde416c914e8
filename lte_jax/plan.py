"""What a run is about to do and needs, counted before it begins: the opening table, and the disk.

Bytes are those of the shapes that training holds (`TrainState`: float32 parameters and AdamW's
moments; one such state is a checkpoint). Not counted are activations, on devices, and metrics and
figures, on the disk.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lte_jax import kernels, optim, stages, training_step
from lte_jax.config import CheckpointConfig, Experiment, LTEConfig, ModelConfig, num_experts
from lte_jax.errors import UserError
from lte_jax.model import Transformer, abstract_params
from lte_jax.params import is_router
from lte_jax.preflight import Parts, is_sparse
from lte_jax.sparsity import SparsityController
from lte_jax.workdir import Paths

FRUGAL = CheckpointConfig(keep_last=1, keep_best=0, keep_finished=False)


@dataclasses.dataclass(frozen=True)
class StageNeeds:
    """What a stage takes, in bytes."""

    name: str
    steps: int
    sparse: bool
    checkpoint: int  # a training state, whole
    memory: dict[str, int]  # what it is for -> on each device

    def saves(self, every: int) -> int:
        """How many checkpoints it writes."""
        return -(-self.steps // every)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run that has passed its checks."""

    experiment: Experiment
    parts: Parts
    mesh: jax.sharding.Mesh
    stages: tuple[StageNeeds, ...]

    @classmethod
    def of(cls, experiment: Experiment, parts: Parts, mesh: jax.sharding.Mesh) -> Plan:
        """Counts, with nothing allocated."""
        made = stages.make(experiment.stages, experiment.lte)
        distils = any(stage.taught for stage in made)
        needs = (_needs(stage, experiment, parts.config, mesh, distils) for stage in made)
        return cls(experiment, parts, mesh, tuple(needs))

    def disk(self, keep: CheckpointConfig) -> tuple[int, str]:
        """The most bytes that lie in the work directory at a time, and when that is."""
        return max(self._on_disk(keep))

    def _on_disk(self, keep: CheckpointConfig) -> Iterator[tuple[int, str]]:
        """Bytes in the work directory at the fullest moment of each step of the pipeline."""
        kept, lte = keep.keep_last + keep.keep_best, self.experiment.lte
        models, left = 0, 0  # models written, checkpoints of earlier stages
        for sparse in (False, True):
            if sparse and not is_sparse(self.experiment):
                return
            if sparse:
                models += folder_bytes(self.parts.config, lte)
                yield models + left, "when experts/ is written"
            began = left
            for stage in (stage for stage in self.stages if stage.sparse == sparse):
                saves = stage.saves(keep.every)
                # A save is complete before an older one is deleted.
                most = stage.checkpoint * min(saves, kept + 1)
                yield models + left + most, f"in stage {stage.name}"
                left += stage.checkpoint * min(saves, kept)
            models += folder_bytes(self.parts.config, lte if sparse else None)
            yield models + left, f"when {'lte' if sparse else 'dense'}/ is written"
            left = left if keep.keep_finished else began

    def written(self) -> int:
        """Bytes of all checkpoints together."""
        every = self.experiment.checkpoint.every
        return sum(stage.saves(every) * stage.checkpoint for stage in self.stages)

    def check_room(self, paths: Paths) -> None:
        """Checks that the disk has room for the run.

        Raises:
          UserError: if it has not; with the numbers.
        """
        keep = self.experiment.checkpoint
        most, when = self.disk(keep)
        here, free = _present(paths), shutil.disk_usage(paths.root).free
        if most - here <= free:
            return
        frugal = dataclasses.replace(FRUGAL, every=keep.every)
        least = self.disk(frugal)[0]
        mend = "free some, or name a workdir on another disk"
        if least < most:
            mend += (
                "; with checkpoint.keep_last=1, checkpoint.keep_best=0 and "
                f"checkpoint.keep_finished=False it needs {_size(least)}"
            )
        largest = max(stage.checkpoint for stage in self.stages)
        has = f" and it holds {_size(here)} of them" if here else ""
        raise UserError(
            f"workdir {paths.root}: the run needs {_size(most)} of disk {when} (a checkpoint has "
            f"{_size(largest)}){has}, but only {_size(free)} are free: {mend}"
        )

    def banner(self, root: Path) -> str:
        """The opening table: a line each."""
        rows = {
            "model": self._model(),
            "devices": self._devices(),
            "experts": self._experts(),
            "tokens": self._tokens(),
            "kernels": self._kernels(),
            "steps": ", ".join(f"{stage.name} {stage.steps:,}" for stage in self.stages),
            "disk": self._disk(root),
            "memory": self._memory(),
        }
        return "\n".join(f"{name:<9}{words}" for name, words in rows.items() if words)

    def _model(self) -> str:
        config = self.parts.config
        number = _count(abstract_params(Transformer(config)))
        source = self.experiment.source.path or "random weights"
        return f"{config.family}, {number:,} parameters, from {source}"

    def _devices(self) -> str:
        devices, axes = self.mesh.devices.ravel(), self.mesh.shape.items()
        mesh = ", ".join(f"{name} {size}" for name, size in axes)
        kind, processes = devices[0].device_kind, jax.process_count()
        many = f", {processes} processes" if processes > 1 else ""
        return f"{len(devices)} x {kind}{many}; mesh: {mesh}"

    def _experts(self) -> str:
        config, lte = self.parts.config, self.experiment.lte
        if not is_sparse(self.experiment):
            return ""
        made, dense = (_count(abstract_params(Transformer(config, x))) for x in (lte, None))
        wanted = lte.target_sparsity
        target = "" if wanted is None else f"; {wanted:.0%} of them to be skipped"
        sizes = f"{config.num_layers} x {num_experts(config, lte)} x {lte.expert_size}"
        return f"{sizes} (layers x experts x neurons); routers {made - dense:,} parameters{target}"

    def _tokens(self) -> str:
        train, validation = (np.count_nonzero(r.segments_RL) for r in self.parts.records)
        batch, length = self.experiment.data.batch_size, self.parts.records[0].tokens_RL.shape[1]
        return (
            f"{train:,} to train on, {validation:,} to validate; {batch * length:,} a step "
            f"({batch} records of {length})"
        )

    def _kernels(self) -> str:
        training = "training: XLA, all experts computed and masked"
        if not self.experiment.report or self.parts.config.head != "lm":
            return training
        return f"{training}; report: {kernels.resolve('auto')}"

    def _disk(self, root: Path) -> str:
        most, when = self.disk(self.experiment.checkpoint)
        largest = max((stage.checkpoint for stage in self.stages), default=0)
        return (
            f"{_size(most)} at most, {when}; {_size(shutil.disk_usage(root).free)} are free; "
            f"a checkpoint {_size(largest)}, all that are written {_size(self.written())}"
        )

    def _memory(self) -> str:
        if not self.stages:
            return ""
        worst = max(self.stages, key=lambda stage: sum(stage.memory.values()))
        words = ", ".join(f"{name} {_size(number)}" for name, number in worst.memory.items())
        total = _size(sum(worst.memory.values()))
        return f"{total} a device at most, in stage {worst.name}, besides activations: {words}"


def _needs(
    stage: stages.Stage,
    experiment: Experiment,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    distils: bool,
) -> StageNeeds:
    lte = experiment.lte if stage.sparse else None
    optimizer = optim.make(experiment.optim, stage.config, stage.rules)

    def begin(params: Any) -> training_step.TrainState:
        control = SparsityController.start(experiment.lte, config.num_layers)
        step = jnp.zeros((), jnp.int32)
        return training_step.TrainState(step, params, optimizer.init(params), control)

    state = jax.eval_shape(begin, abstract_params(Transformer(config, lte)))
    places = training_step.state_shardings(state, mesh)
    params = _a_device(state.params, places.params)
    memory = {
        "parameters": params,
        "gradients": params * (1 if experiment.optim.microbatches == 1 else 2),
        "moments": _a_device(state.opt_state, places.opt_state),
        "the stage's start": params,
        "teacher": params if distils and stage.sparse else 0,
    }
    memory = {name: number for name, number in memory.items() if number}
    whole = sum(_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state))
    return StageNeeds(stage.name, stage.config.steps, stage.sparse, whole, memory)


def folder_bytes(config: ModelConfig, lte: LTEConfig | None) -> int:
    """Bytes of a model's folder: weights in the source's type, routers and orders in 32 bits."""
    flat = traverse_util.flatten_dict(abstract_params(Transformer(config, lte)), sep="/")
    weights = sum(
        _bytes(leaf.shape, leaf.dtype if is_router(path) else config.dtype)
        for path, leaf in flat.items()
    )
    return weights + (0 if lte is None else 4 * config.num_layers * config.d_ff)


def _present(paths: Paths) -> int:
    """Bytes of models and checkpoints in the work directory."""
    folders = (*paths.models, paths.root / "checkpoints")
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)


def _a_device(tree: Any, places: Any) -> int:
    """Bytes on each device of a tree of abstract arrays with these shardings."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
    return sum(_bytes(place.shard_shape(leaf.shape), leaf.dtype) for leaf, place in leaves)


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return math.prod(shape) * jnp.dtype(dtype).itemsize


def _size(number: int) -> str:
    """A number of bytes, in the largest unit that makes it 1 or more."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(str(number)) - 1, 14) // 3
    return f"{number / 1000**power:.3g} {units[power]}"
