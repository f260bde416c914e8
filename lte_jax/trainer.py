"""The one training loop: a stage, a state and batches in; a trained state out.

The maths of a step is in training_step.py; around it are batches, checkpoints, validation, metrics,
and what to do when it is interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from lte_jax import data, interrupt, optim, sharding, sparsity, training_step
from lte_jax.checkpoint import Checkpointer
from lte_jax.config import Experiment
from lte_jax.errors import UserError
from lte_jax.model import Transformer
from lte_jax.sparsity import SparsityController
from lte_jax.stages import Stage
from lte_jax.training_step import Batch, TrainState
from lte_jax.writers import Writer

log = logging.getLogger(__name__)

PROFILED = 3  # steps of a trace


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a stage ends with."""

    params: Any
    control: SparsityController
    validation_loss: float  # nats per predicted token, hard routing
    validation_sparsity: float


def fit(
    model: Transformer,
    stage: Stage,
    params: Any,
    control: SparsityController,
    records: tuple[data.Records, data.Records],
    experiment: Experiment,
    folder: str | Path,
    writer: Writer,
    *,
    mesh: jax.sharding.Mesh,
    teacher: Any = None,
    profile: str | Path | None = None,
) -> Trained:
    """Runs a stage, from its newest checkpoint in `folder` if there is one, to its last step.

    Args:
      model: dense or LTE, as `params`.
      stage: what to train and how, see stages.py.
      params: where the stage starts; copied.
      control: likewise.
      records: to train on, and to validate on.
      experiment: batch size, optimizer, seed, and how often to log, validate and save.
      folder: of this stage's checkpoints.
      writer: of metrics.
      mesh: whose axes are those of sharding.py.
      teacher: the dense model's parameters in the same layout, for a stage that distils.
      profile: folder for a trace of PROFILED steps, the first that this process takes left out.

    Raises:
      UserError: on bad data or folders, and when the loss is not finite: the step's batch is then
        in `folder`/nonfinite-<step>.npz.
      Interrupted: after a signal, once the state is saved.
    """
    steps, keep = stage.config.steps, experiment.checkpoint
    with (
        jax.set_mesh(mesh),
        Checkpointer(folder, keep_last=keep.keep_last, keep_best=keep.keep_best) as checkpointer,
        _Trace(profile) as trace,
    ):
        loop = _Loop(model, stage, experiment, records, mesh, writer, checkpointer)
        loop.begin(params, control)
        while True:
            loop.validate()
            stopping = _stopping(loop.step)
            if stopping or loop.step == steps or loop.step % keep.every == 0:
                loop.save()
            if stopping:
                checkpointer.wait()
                raise interrupt.Interrupted(f"after step {loop.step} of stage {stage.name!r}")
            if loop.step == steps:
                checkpointer.wait()  # a signal may have come since
                interrupt.check(f"after step {loop.step} of stage {stage.name!r}")
                return Trained(loop.state.params, loop.state.control, **loop.validation)
            with trace.step(loop.step):
                loop.advance(teacher)


class _Loop:
    """A stage between two of its steps: compiled functions, the state, and what is due next."""

    def __init__(
        self,
        model: Transformer,
        stage: Stage,
        experiment: Experiment,
        records: tuple[data.Records, data.Records],
        mesh: jax.sharding.Mesh,
        writer: Writer,
        checkpointer: Checkpointer,
    ):
        self._model, self._stage, self._experiment, self._mesh = model, stage, experiment, mesh
        self._writer, self._checkpointer, self._held_out = writer, checkpointer, records[1]
        seed = (experiment.seed + zlib.crc32(stage.name.encode())) % 2**32
        self._batches = data.train_iterator(
            records[0], experiment.data.batch_size, seed, **_share()
        )
        self._unchecked: tuple[int, Any, Any] | None = None  # a step, its metrics and its batch

    def begin(self, params: Any, control: SparsityController) -> None:
        """Compiles; takes up the newest checkpoint, or starts from `params`."""
        experiment, stage = self._experiment, self._stage
        optimizer = optim.make(experiment.optim, stage.config, stage.rules)

        def start(params: Any) -> TrainState:
            return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), control)

        abstract = jax.eval_shape(start, params)
        shardings = training_step.state_shardings(abstract, self._mesh)
        step = training_step.make_train_step(
            self._model, stage, optimizer, experiment.optim.microbatches
        )
        outputs = (shardings, sharding.replicated(self._mesh))
        self._train_step = jax.jit(step, donate_argnums=0, out_shardings=outputs)
        self._eval_step = jax.jit(training_step.make_eval_step(self._model, stage))
        restored = self._checkpointer.restore(_with_shardings(abstract, shardings))
        self.validation: dict[str, float] = {}  # of this step, where there is one
        if restored is None:
            self.step, self.state = 0, jax.jit(start, out_shardings=shardings)(params)
        else:
            self.step, self.state, seen = restored
            self._batches.set_state(seen["batches"])
            self.validation = seen["validation"]
        self._saved = self.step
        self._writer.start(stage.name, self.step, stage.config.steps)

    def validate(self) -> None:
        """Means over the validation records, where they are due and no signal cuts them short."""
        due = self.step % self._experiment.eval_every == 0 or self.step == self._stage.config.steps
        if not (self.step and due) or self.validation:
            return
        sums: dict[str, float] = {}
        for batch in data.eval_batches(
            self._held_out, self._experiment.data.batch_size, **_share()
        ):
            if interrupt.requested():
                return
            threshold = self.state.control.threshold
            part = self._eval_step(self.state.params, _to_mesh(batch, self._mesh), threshold)
            sums = {k: sums.get(k, 0.0) + v for k, v in _fetched(part).items()}
        self.validation = {
            "validation_loss": sums["loss"] / max(sums["predicted"], 1.0),
            "validation_sparsity": sums["skipped"] / max(sums["real"], 1.0),
        }
        self._writer.write(self._stage.name, self.step, self.validation)

    def save(self) -> None:
        """Saves the state and the place in the data, unless they are saved."""
        if self.step > self._saved:
            self._check_finite()
            position = {"batches": self._batches.get_state(), "validation": self.validation}
            self._checkpointer.save(self.step, self.state, position, self.validation)

    def advance(self, teacher: Any) -> None:
        """One step; whether the one before it was finite is seen meanwhile: no device waits."""
        batch, self.validation = next(self._batches), {}
        self.state, metrics = self._train_step(self.state, _to_mesh(batch, self._mesh), teacher)
        self.step += 1
        self._check_finite()
        self._unchecked = (self.step, metrics, batch)
        if self.step % self._experiment.log_every == 0 or self.step == self._stage.config.steps:
            self._writer.write(self._stage.name, self.step, _fetched(metrics))

    def _check_finite(self) -> None:
        if self._unchecked is None:
            return
        step, metrics, batch = self._unchecked
        values, name = _fetched(metrics), self._stage.name
        if all(math.isfinite(value) for value in values.values()):
            return
        path = self._checkpointer.folder / f"nonfinite-{step}.npz"
        np.savez(path, step=step, **batch, **{f"metric_{k}": v for k, v in values.items()})
        bad = ", ".join(f"{k}={v}" for k, v in values.items() if not math.isfinite(v))
        raise UserError(
            f"stage {name!r} step {step}: {bad}; its batch is in {path}. Checkpoints before it "
            f"are whole: try a lower stages.{name}.learning_rate, or a smaller optim.clip_norm"
        )


class _Trace(contextlib.ExitStack):
    """A trace of PROFILED steps in a folder; without one, none."""

    def __init__(self, folder: str | Path | None):
        super().__init__()
        self._folder, self._taken = folder, 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around each step."""
        if self._folder is not None and self._taken == 1:  # the first one compiles
            self.enter_context(jax.profiler.trace(self._folder))
        with jax.profiler.StepTraceAnnotation("step", step_num=number):
            yield
        if self._taken == PROFILED:
            self.close()
        self._taken += 1


def settle_threshold(
    model: Transformer,
    params: Any,
    control: SparsityController,
    records: data.Records,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> SparsityController:
    """The control with the threshold that gives the wanted sparsity on `records`, hard routing.

    Where scores crowd at one value it may be out of reach: a warning says what was reached.
    """
    count = jax.jit(
        functools.partial(sparsity.score_histogram, model),
        out_shardings=sharding.replicated(mesh),
    )

    def histogram(threshold: float) -> np.ndarray:
        total = np.zeros((), np.int64)
        for batch in data.eval_batches(records, batch_size, **_share()):
            interrupt.check("while setting the threshold")
            total = total + np.asarray(count(params, _to_mesh(batch, mesh), np.float32(threshold)))
        return total

    target = float(control.target_sparsity)
    with jax.set_mesh(mesh):
        threshold, reached = sparsity.settle(histogram, float(control.threshold), target)
    log.log(
        logging.INFO if abs(reached - target) <= sparsity.SETTLED else logging.WARNING,
        "threshold set to %.4f on %d calibration records: sparsity %.4f (target %.4f)",
        *(threshold, len(records), reached, target),
    )
    return control.replace(threshold=jnp.asarray(threshold, jnp.float32))


def _fetched(metrics: Mapping[str, Array]) -> dict[str, float]:
    """Scalars from the devices."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def _share() -> dict[str, int]:
    """This process's part of every batch."""
    return {"shard_index": jax.process_index(), "shard_count": jax.process_count()}


def _stopping(step: int) -> bool:
    """Whether to stop after this step: where several processes train, JAX decides for them all."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return interrupt.requested()


def _with_shardings(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )


def _to_mesh(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """This process's records of a batch as its part of the global arrays."""
    place = sharding.batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(place, v) for k, v in batch.items()}
