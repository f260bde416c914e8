"""The plan of a run: its opening table, and what it refuses because it cannot fit."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from lte_jax import data, hf, kernels, objective, sharding, stages, tasks, training_step
from lte_jax.config import CheckpointConfig, Experiment, ModelConfig, num_experts
from lte_jax.errors import UserError
from lte_jax.model import Transformer, abstract_params
from lte_jax.plan import needs, report
from lte_jax.plan.devices import Devices, host_memory
from lte_jax.plan.needs import StageNeeds
from lte_jax.workdir import Paths

FRUGAL = CheckpointConfig(keep_last=1, keep_best=0, keep_finished=False)
Records = tuple[data.Records, data.Records]  # training, validation


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, counted."""

    experiment: Experiment
    config: ModelConfig  # of the dense model
    devices: Devices
    stages: tuple[StageNeeds, ...]
    report: dict[str, int]  # bytes on one device, by what they are for; {}: there is no report
    records: Records | None = None  # None: not read yet

    @classmethod
    def of(
        cls,
        experiment: Experiment,
        config: ModelConfig,
        devices: Devices,
        records: Records | None = None,
    ) -> Plan:
        """Counts, with nothing allocated."""
        made = stages.make(experiment.stages, experiment.lte)
        counted = tuple(needs.of_stage(stage, experiment, config, devices) for stage in made)
        sparse = any(stage.sparse for stage in made)
        last = {}
        if experiment.report:
            last = report.of_report(experiment, config, sparse, devices.tpu)
        return cls(experiment, config, devices, counted, last, records)

    @property
    def sparse(self) -> bool:
        """Whether the run ends in an LTE model."""
        return any(stage.sparse for stage in self.stages)

    def disk(self, keep: CheckpointConfig) -> tuple[int, str]:
        """The most bytes that lie in the work directory at a time, and when that is."""
        return max(self._on_disk(keep))

    def _on_disk(self, keep: CheckpointConfig) -> Iterator[tuple[int, str]]:
        """Bytes in the work directory at the fullest moment of each step of the pipeline."""
        kept, lte = keep.keep_last + keep.keep_best, self.experiment.lte
        models, left = 0, 0  # models written, checkpoints of earlier stages
        for sparse in (False, True):
            if sparse and not self.sparse:
                return
            if sparse:
                models += needs.folder_bytes(self.config, lte)
                yield models + left, "when experts/ is written"
            for stage in (stage for stage in self.stages if stage.sparse == sparse):
                # A save is complete before older ones, or those of the stage before, are deleted.
                saves, when = stage.saves(keep.every), f"in stage {stage.name}"
                yield models + left + stage.checkpoint, when
                left = left if keep.keep_finished else 0
                yield models + left + stage.checkpoint * min(saves, kept + 1), when
                left += stage.checkpoint * min(saves, kept)
            models += needs.folder_bytes(self.config, lte if sparse else None)
            yield models + left, f"when {'lte' if sparse else 'dense'}/ is written"
            left = left if keep.keep_finished else 0

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
                f"checkpoint.keep_finished=False it needs {needs.written(least)}"
            )
        largest = needs.written(max(stage.checkpoint for stage in self.stages))
        has = f" and it holds {needs.written(here)} of them" if here else ""
        raise UserError(
            f"workdir {paths.root}: the run needs {needs.written(most)} of disk {when} (a "
            f"checkpoint has {largest}){has}, but only {needs.written(free)} are free: {mend}"
        )

    def check_memory(self) -> None:
        """Checks that each stage fits the devices, as far as their memory is known, and the report.

        Raises:
          UserError: if one does not; with the numbers, and what would make it fit.
        """
        worst, limit, of = self._worst(), self.devices.memory, self.devices.kind
        if worst is not None and limit is not None and worst.bytes > limit:
            raise UserError(
                f"stage {worst.name} needs {needs.written(worst.bytes)} on each of "
                f"{self.devices.number} x {of}, which can use {needs.written(limit)} "
                f"({_largest(worst.memory)}, ...): {self._mend()}"
            )
        needed, limit = sum(self.report.values()), self.devices.alone
        if limit is not None and needed > limit:
            raise UserError(
                f"the report needs {needs.written(needed)} on one {of}, which can use "
                f"{needs.written(limit)} ({_largest(self.report)}, ...): set report=False, and run "
                "evaluate.py --workdir where both models fit"
            )

    def _mend(self) -> str:
        """The least change that makes all stages fit."""
        devices, tensor = self.devices.number, self.devices.along("tensor")
        least, batch = self.devices.along("fsdp"), self.experiment.data.batch_size
        frugal = dataclasses.replace(self.experiment.compute, remat=True)
        key = {} if frugal == self.experiment.compute else {"compute.remat": True}
        thrift = self._with(compute=frugal)
        tries = {(): self.experiment, tuple(key.items()): thrift}
        parts = batch // (devices // tensor)  # each of one record a device
        if parts > self.experiment.optim.microbatches:
            optim = dataclasses.replace(self.experiment.optim, microbatches=parts)
            cut = key | {"optim.microbatches": parts}
            tries[tuple(cut.items())] = dataclasses.replace(thrift, optim=optim)
        for (keys, experiment), fsdp in itertools.product(
            tries.items(), _divisors(devices // tensor)
        ):
            shape = devices // tensor // fsdp, fsdp, tensor
            if fsdp >= least and self._fits(experiment, self.devices.with_mesh(*shape)):
                mesh = {} if fsdp == least else {"mesh.data": -1, "mesh.fsdp": fsdp}
                words = (f"{key}={value}" for key, value in (mesh | dict(keys)).items())
                return f"it fits with {' '.join(words)}"
        for fsdp in (devices // tensor * 2**power for power in range(1, 11)):
            if self._fits(thrift, self.devices.with_mesh(1, fsdp, tensor)):
                also = " and compute.remat=True" if key else ""
                return f"take {fsdp * tensor} such devices with mesh.fsdp={fsdp}{also}"
        return "take larger devices, more of them with a larger data.batch_size, or a smaller model"

    def _with(self, **sections: Any) -> Experiment:
        return dataclasses.replace(self.experiment, **sections)

    def _fits(self, experiment: Experiment, devices: Devices) -> bool:
        """Whether all stages would fit these devices."""
        limit, parts = devices.memory or 0, experiment.optim.microbatches
        batch = experiment.data.batch_size
        for stage in stages.make(experiment.stages, experiment.lte):
            try:
                sharding.check_batch(batch, parts, devices.mesh)
                counted = needs.of_stage(stage, experiment, self.config, devices, limit)
            except UserError:  # the mesh divides the batch or the model no more
                return False
            if counted.bytes > limit:
                return False
        return True

    def _worst(self) -> StageNeeds | None:
        """The stage that takes most memory."""
        return max(self.stages, key=lambda stage: stage.bytes, default=None)

    def banner(self, root: Path | None = None) -> str:
        """The opening table: a line each; `root` is the work directory, if there is one."""
        rows = {
            "model": self._model(),
            "devices": self._devices(),
            "experts": self._experts(),
            "tokens": self._tokens(),
            "kernels": self._kernels(),
            "steps": ", ".join(f"{stage.name} {stage.steps:,}" for stage in self.stages),
            "compute": self._compute(),
            "flops": self._flops(),
            "time": self._time(),
            "disk": self._disk(root),
            "memory": self._memory(),
            "report": self._report(),
            "host": self._host(),
        }
        return "\n".join(f"{name:<9}{words}" for name, words in rows.items() if words)

    def _model(self) -> str:
        number = needs.number(abstract_params(Transformer(self.config)))
        source = self.experiment.source.path or "random weights"
        return f"{self.config.family}, {number:,} parameters, from {source}"

    def _devices(self) -> str:
        mesh = ", ".join(f"{name} {size}" for name, size in self.devices.mesh.shape.items())
        processes = jax.process_count()
        many = f", {processes} processes" if self.devices.here and processes > 1 else ""
        return f"{self.devices.number} x {self.devices.kind}{many}; mesh: {mesh}"

    def _experts(self) -> str:
        config, lte = self.config, self.experiment.lte
        if not self.sparse:
            return ""
        made, dense = (needs.number(abstract_params(Transformer(config, x))) for x in (lte, None))
        wanted = lte.target_sparsity
        target = "" if wanted is None else f"; {wanted:.0%} of them to be skipped"
        sizes = f"{config.num_layers} x {num_experts(config, lte)} x {lte.expert_size}"
        return f"{sizes} (layers x experts x neurons); routers {made - dense:,} parameters{target}"

    def _tokens(self) -> str:
        batch, length = self.experiment.data.batch_size, self.experiment.data.length
        if self.records is not None:
            length = self.records[0].length
        step = f"{batch * length:,} a step ({batch} records of {length})"
        if self.records is None:
            return step
        train, validation = (r.num_tokens for r in self.records)
        return f"{train:,} to train on, {validation:,} to validate; {step}"

    def _kernels(self) -> str:
        how = self.experiment.compute
        devices = self.devices.number if self.devices.here else None
        attention = kernels.trains_attention(
            how.attention, how.dtype, self.config.head_dim, devices
        )
        training = "training: XLA, all experts computed and masked"
        if attention == "cpu":
            training += "; attention in C++"
        if not (self.experiment.report and self.devices.here) or self.config.head != "lm":
            return training
        return f"{training}; report: {kernels.resolve('auto')}"

    def _compute(self) -> str:
        how, microbatches = self.experiment.compute, self.experiment.optim.microbatches
        words = [how.dtype, f"remat {how.remat}"]
        if microbatches > 1:
            words.append(f"{microbatches} microbatches")
        if rank := self.experiment.lora.rank:
            words.append(f"adapters of rank {rank}")
        model = training_step.trained_model(self.config, None, how)
        batch = self.experiment.data.batch_size // microbatches
        rows = -(-batch // (self.devices.along("data") * self.devices.along("fsdp")))
        length, tensor = self.experiment.data.length, self.devices.along("tensor")
        chunk = objective.chunk_length(model, rows, length, tensor)
        if self.config.head == "lm":
            size = needs.written(4 * rows * chunk * self.config.vocab_size // tensor)
            words.append(f"logits of {rows * chunk:,} tokens ({size}) on a device at a time")
        if any("teacher" in stage.memory for stage in self.stages):
            words.append(f"teacher in {how.teacher_dtype}")
        return ", ".join(words)

    def _flops(self) -> str:
        number = self.devices.number
        each = (f"{s.name} {needs.written(s.flops * number, 'FLOP')}" for s in self.stages)
        return ", ".join(each) + " a step, over all devices" if self.stages else ""

    def _time(self) -> str:
        dtype = self.experiment.compute.dtype
        seconds = [self.devices.seconds(s.flops, dtype) for s in self.stages]
        if not seconds or None in seconds:
            why = f"no rate of {self.devices.kind} in {dtype} in the table"
            return f"not known: {why}" if seconds else ""
        each = (f"{s.name} {t:.3g} s" for s, t in zip(self.stages, seconds, strict=True))
        total = sum(s.steps * t for s, t in zip(self.stages, seconds, strict=True))
        return f"{', '.join(each)} a step, {total / 3600:.3g} h in all, {self.devices.rate()}"

    def _disk(self, root: Path | None) -> str:
        most, when = self.disk(self.experiment.checkpoint)
        largest = max((stage.checkpoint for stage in self.stages), default=0)
        free = "" if root is None else f"; {needs.written(shutil.disk_usage(root).free)} are free"
        return (
            f"{needs.written(most)} at most, {when}{free}; a checkpoint "
            f"{needs.written(largest)}, all that are written {needs.written(self.written())}"
        )

    def _memory(self) -> str:
        worst, limit = self._worst(), self.devices.memory
        if worst is None:
            return ""
        words = ", ".join(f"{name} {needs.written(n)}" for name, n in worst.memory.items())
        of = "" if limit is None else f", of {needs.written(limit)} that it can use"
        total, advice = needs.written(worst.bytes), self.devices.advice(worst.bytes)
        return f"{total} a device at most{of}, in stage {worst.name}: {words}{advice}"

    def _report(self) -> str:
        if not self.report:
            return ""
        words = ", ".join(f"{name} {needs.written(n)}" for name, n in self.report.items() if n)
        return f"{needs.written(sum(self.report.values()))} on one device: {words}"

    def _host(self) -> str:
        """What arrays take there on their way to the disk, and from it."""
        array, tensor = needs.largest(self.config)
        words = [f"{needs.written(array)} for the largest array as it is read"]
        words += [f"{needs.written(tensor)} for the largest tensor as it is written"]
        if self.stages and self.devices.kind != "cpu":  # whose arrays lie there anyhow
            state = max(stage.checkpoint for stage in self.stages)
            words += [f"{needs.written(state)} over all hosts for a copy of what is saved"]
        found = host_memory() if self.devices.here else None
        has = "" if found is None else f"; it has {needs.written(found)}"
        return f"{', '.join(words)}{has}"


def foreseen(experiment: Experiment) -> ModelConfig:
    """The config of the dense model, from its config.json alone; no weights are read or fetched.

    Raises:
      UserError: if there is none to be had.
    """
    path = experiment.source.path
    if not path:
        return experiment.source.scratch
    config = hf.read_config(hf.resolve(path, config_only=True))[0]
    if experiment.data.task:
        config = tasks.find(experiment.data.task).adapted(experiment.data).dense_config(config)
    return config


def show(experiment: Experiment, where: str) -> None:
    """Prints the plan of an experiment for devices, see `Devices.named`.

    Where the config.json of its model cannot be had, the model of source.scratch stands for it.

    Raises:
      UserError: if it does not fit the devices, and if there is no model to count.
    """
    devices = Devices.named(where, experiment.mesh)
    try:
        config = foreseen(experiment)
    except UserError as error:
        if experiment.source.scratch == ModelConfig():
            raise
        print(f"counted is source.scratch, as source.path cannot be read: {error}")
        config = experiment.source.scratch
    sharding.check_batch(experiment.data.batch_size, experiment.optim.microbatches, devices.mesh)
    plan = Plan.of(experiment, config, devices)
    print(plan.banner(), flush=True)
    plan.check_memory()


def _present(paths: Paths) -> int:
    """Bytes of models and checkpoints in the work directory."""
    folders = (*paths.models, paths.root / "checkpoints")
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)


def _largest(memory: dict[str, int]) -> str:
    """The three largest needs, in words."""
    most = sorted(memory.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{name} {needs.written(number)}" for name, number in most)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
