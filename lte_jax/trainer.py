"""The training loop of a stage: batches, checkpoints, validation, metrics, interruption.

The computation of a step is in training_step.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lte_jax import calibration, data, interrupt, lora, optim, processes, sharding, training_step
from lte_jax.checkpoint import Checkpointer
from lte_jax.config import Experiment, LTEConfig, own_threshold
from lte_jax.errors import UserError
from lte_jax.model import Transformer
from lte_jax.routing import kind
from lte_jax.sparsity import Curve, SparsityController
from lte_jax.stages import Stage
from lte_jax.training_step import Batch, TrainState
from lte_jax.writers import Writer

log = logging.getLogger(__name__)

PROFILED = 3  # steps per trace


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of a stage."""

    params: Any
    control: SparsityController
    validation_loss: float | None = None  # nats per predicted token, hard routing
    validation_sparsity: float | None = None


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
    base: lora.Base | None = None,
    replaces: Sequence[Path] = (),
    profile: str | Path | None = None,
) -> Trained:
    """Runs a stage to its last step, from its newest checkpoint in `folder` if there is one.

    Args:
      model: dense or LTE.
      stage: what to train and how, see stages.py.
      params: initial parameters, of `lora.start` if there are adapters; copied.
      control: initial state of the controller.
      records: training and validation records.
      experiment: batch size, optimizer, seed, and how often to log, validate and save.
      folder: of this stage's checkpoints.
      writer: of metrics.
      mesh: with the axes of sharding.py.
      teacher: the dense model's parameters in the same layout, for a stage with distillation.
      base: what `params` adapt, not copied; None: they are the whole model's.
      replaces: folders to remove once `folder` has a checkpoint.
      profile: folder for a trace of PROFILED steps, after the first one, which compiles.

    Raises:
      UserError: on bad data or folders, and if the loss is not finite: the step's batch is then
        in `folder`/nonfinite-<step>.npz (of several processes, each one's rows in -<process>.npz).
      Interrupted: after a signal, once the state is saved.
    """
    steps, keep = stage.config.steps, experiment.checkpoint
    with (
        jax.set_mesh(mesh),
        Checkpointer(folder, keep.keep_last, keep.keep_best, replaces=replaces) as checkpointer,
        contextlib.closing(_traced(profile)) as turns,
    ):
        start = (params, control)
        loop = _Loop(model, stage, start, base, records, experiment, mesh, writer, checkpointer)
        for _ in turns:
            loop.validate()
            stopping = _stopping()
            if stopping or loop.step == steps or loop.step % keep.every == 0:
                loop.save()
            if stopping:
                checkpointer.wait()
                raise interrupt.Interrupted(f"after step {loop.step} of stage {stage.name!r}")
            if loop.step == steps:
                checkpointer.wait()  # a signal may have arrived since
                interrupt.check(f"after step {loop.step} of stage {stage.name!r}")
                return Trained(loop.state.params, loop.state.control, **loop.validation)
            with jax.profiler.StepTraceAnnotation("step", step_num=loop.step):
                loop.advance(teacher)


class _Pace:
    """The wall-clock time of a stage, and how fast its steps are.

    Told when the steps so far are done on the devices. The first step, which compiles, and pauses
    (validation, saving) do not count as time of steps.
    """

    def __init__(self, before: float) -> None:
        """`before`: seconds that earlier processes spent on the stage, up to its checkpoint."""
        self._begin = time.monotonic() - before
        self._stepping: float | None = None  # since when, pauses subtracted; None: compiling
        self._tokens = 0.0

    @property
    def compiling(self) -> bool:
        """Whether no step is done yet."""
        return self._stepping is None

    @property
    def seconds(self) -> float:
        """Since the stage began, over all its processes, without lost steps."""
        return time.monotonic() - self._begin

    def done(self, tokens: float) -> None:
        """A step of so many real tokens is done."""
        self._tokens += tokens
        if self._stepping is None:
            self._stepping, self._tokens = time.monotonic(), 0.0

    def read(self) -> dict[str, float]:
        """`writers.CLOCK`; tokens per second are since the last call, if a step counts."""
        read = {"seconds": self.seconds}
        if self._tokens and self._stepping is not None:
            read["tokens_per_second"] = self._tokens / (time.monotonic() - self._stepping)
            self._stepping, self._tokens = time.monotonic(), 0.0
        return read

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens within does not count as time of steps."""
        begin = time.monotonic()
        yield
        if self._stepping is not None:
            self._stepping += time.monotonic() - begin


class _Loop:
    """A running stage: compiled functions, the training state, and what is due next."""

    def __init__(self, model, stage, start, base, records, experiment, mesh, writer, checkpointer):
        """Builds the step functions; restores the newest checkpoint, or takes the `start`."""
        self._base = base
        self._stage, self._experiment, self._mesh = stage, experiment, mesh
        self._writer, self._checkpointer, self._held_out = writer, checkpointer, records[1]
        self._running: tuple[int, Any, Any] | None = None  # step, metrics, batch
        self._finished: dict[str, float] = {}  # metrics of the last step that is done
        self._line: dict[str, float] = {}  # metrics of this step, to be written
        self.validation: dict[str, float] = {}  # of this step, if validated
        seed = (experiment.seed + zlib.crc32(stage.name.encode())) % 2**32
        batch_size = experiment.data.batch_size
        rows = sharding.rows_here(batch_size, mesh)
        self._batches = data.train_iterator(records[0], batch_size, seed, rows)
        optimizer = optim.make(experiment.optim, stage.config, stage.rules)

        def begin(params: Any, control: SparsityController) -> TrainState:
            return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), control)

        abstract = jax.eval_shape(begin, *start)
        shardings = training_step.state_shardings(abstract, mesh)
        parts = experiment.optim.microbatches
        step = training_step.make_train_step(model, stage, optimizer, parts, seed)
        outputs = (shardings, sharding.replicated(mesh))
        self._train_step = jax.jit(step, donate_argnums=0, out_shardings=outputs)
        self._eval_step = jax.jit(training_step.make_eval_step(model, stage))
        placed = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
        restored = checkpointer.restore(jax.tree.map(placed, abstract, shardings))
        seen: dict[str, Any] = {}
        if restored is None:
            self.step, self.state = 0, jax.jit(begin, out_shardings=shardings)(*start)
        else:
            self.step, self.state, seen = restored
            self._batches.set_state(seen["batches"])
            self.validation = seen["validation"]
            self._line = seen.get("line", {})  # absent from checkpoints of earlier versions
        self._pace = _Pace(seen.get("seconds", 0.0))
        self._saved = self.step
        writer.start(stage.name, self.step, stage.config.steps)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self._stage.config.steps)

    def validate(self) -> None:
        """Measures the validation records if that is due, and writes the metrics of this step.

        They are written once, together. If a signal stops the validation, they are not: they go
        into the checkpoint, and are written when the run resumes and validates.
        """
        if self.step and self._due(self._experiment.eval_every) and not self.validation:
            self._finish()
            with self._pace.pause():
                self.validation = self._validated()
            if not self.validation:
                return
            self._line |= self.validation
        if self._line:
            self._writer.write(self._stage.name, self.step, self._line)
            self._line = {}

    def _validated(self) -> dict[str, float]:
        """Loss and sparsity on the validation records; {} after a signal."""
        sums: dict[str, float] = {}
        threshold, batch_size = self.state.control.threshold, self._experiment.data.batch_size
        for batch in _fed(self._held_out, batch_size, self._mesh):
            if interrupt.requested():
                return {}
            part = self._eval_step(self.state.params, batch, threshold, self._base)
            sums = {k: sums.get(k, 0.0) + v for k, v in _fetched(part).items()}
        return {
            "validation_loss": sums["loss"] / max(sums["predicted"], 1.0),
            "validation_sparsity": sums["skipped"] / max(sums["real"], 1.0),
        }

    def save(self) -> None:
        """Saves the state and the position in the data, unless already saved."""
        if self.step > self._saved:
            self._finish()
            position = {"batches": self._batches.get_state(), "validation": self.validation}
            position |= {"line": self._line, "seconds": self._pace.seconds}
            with self._pace.pause():
                self._checkpointer.save(self.step, self.state, position, self.validation)

    def advance(self, teacher: Any) -> None:
        """Takes one step; checks meanwhile that the previous one was finite, so no device waits."""
        batch, self.validation = next(self._batches), {}
        fed = sharding.feed(batch, self._experiment.data.batch_size, self._mesh)
        self.state, metrics = self._train_step(self.state, fed, teacher, self._base)
        self.step += 1
        self._finish()
        self._running = (self.step, metrics, batch)
        if self._pace.compiling:
            self._finish()
        if self._due(self._experiment.log_every) or self._due(self._experiment.eval_every):
            self._line = self._finish() | self._pace.read()

    def _finish(self) -> dict[str, float]:
        """Waits for the running step, if there is one, and checks that its metrics are finite.

        Returns:
          The metrics of the last step.
        """
        if self._running is None:
            return self._finished
        (step, metrics, batch), self._running = self._running, None
        values, name = _fetched(metrics), self._stage.name
        self._pace.done(values["tokens"])
        if all(math.isfinite(value) for value in values.values()):
            self._finished = values
            return values
        own = f"-{jax.process_index()}" if jax.process_count() > 1 else ""  # its rows of the batch
        path = self._checkpointer.folder / f"nonfinite-{step}{own}.npz"
        fetched = jax.device_get(metrics)
        np.savez(path, step=step, **batch, **{f"metric_{k}": v for k, v in fetched.items()})
        scalars = ((k, values[k]) for k in metrics if k in values)
        bad = ", ".join(f"{k}={v}" for k, v in scalars if not math.isfinite(v))
        raise UserError(
            f"stage {name!r} step {step}: {bad}; its batch is in {path}. Earlier checkpoints "
            f"are intact: try a lower stages.{name}.learning_rate, or a smaller optim.clip_norm"
        )


def _traced(folder: str | Path | None) -> Iterator[None]:
    """An endless iterator; PROFILED of its turns are traced into the folder, if one is given."""
    yield  # the first step compiles
    with contextlib.nullcontext() if folder is None else jax.profiler.trace(folder):
        for _ in range(PROFILED):
            yield
    while True:
        yield


def settle_threshold(
    model: Transformer,
    params: Any,
    control: SparsityController,
    records: data.Records,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> SparsityController:
    """The control with the threshold that gives the target sparsity on `records`, hard routing.

    If many scores are equal, the target may be out of reach: a warning gives the sparsity reached.
    """
    histogram = _histogram(model, params, records, batch_size, mesh)
    target, start_R = float(control.target_sparsity), np.array([float(control.threshold)])
    with jax.set_mesh(mesh):
        [threshold], [reached] = calibration.settle(histogram, start_R, target)
    log.log(
        logging.INFO if abs(reached - target) <= calibration.SETTLED else logging.WARNING,
        "threshold set to %.4f on %d calibration records: sparsity %.4f (target %.4f)",
        *(threshold, len(records), reached, target),
    )
    return control.replace(threshold=jnp.asarray(threshold, jnp.float32))


def calibrated(
    model: Transformer,
    params: Any,
    control: SparsityController,
    records: data.Records,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> LTEConfig:
    """The config of the trained model, with its final threshold, or curve of thresholds."""
    on_text, lte = (records, batch_size, mesh), model.lte
    lte = dataclasses.replace(lte, threshold=float(jnp.mean(control.threshold)))
    if lte.sparsity_range or lte.per_layer:
        lte = dataclasses.replace(lte, curve=measure_curve(model.clone(lte=lte), params, *on_text))
    if lte.per_layer:
        return dataclasses.replace(lte, threshold=float(np.mean(own_threshold(lte))))
    if lte.target_sparsity is None or not kind(lte.routing).by_threshold:
        return lte
    control = settle_threshold(model, params, control, *on_text)
    return dataclasses.replace(lte, threshold=float(control.threshold))


def measure_curve(
    model: Transformer,
    params: Any,
    records: data.Records,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Curve:
    """The curve of thresholds on `records`, hard routing, see `calibration.curve`."""
    histogram = _histogram(model, params, records, batch_size, mesh)
    with jax.set_mesh(mesh):
        return calibration.curve(model, histogram)


def _histogram(model, params, records, batch_size, mesh) -> calibration.Histogram:
    """Of the scores over `records`."""

    def batches() -> Iterator[Batch]:
        for batch in _fed(records, batch_size, mesh):
            interrupt.check("while setting the threshold")
            yield batch

    replicated = sharding.replicated(mesh)
    return calibration.histogram_over(model, params, batches, out_shardings=replicated)


def _fed(records: data.Records, batch_size: int, mesh: jax.sharding.Mesh) -> Iterator[Batch]:
    """Every record once, on the mesh."""
    for batch in data.eval_batches(records, batch_size, sharding.rows_here(batch_size, mesh)):
        yield sharding.feed(batch, batch_size, mesh)


def _fetched(metrics: Mapping[str, Array]) -> dict[str, float]:
    """Fetches numbers from the devices; those of layers get its number: NAME/01, NAME/02, ..."""
    values = {}
    for name, value in jax.device_get(metrics).items():
        layers = enumerate(np.ravel(value), 1)
        values |= (
            {f"{name}/{n:02d}": float(x) for n, x in layers}
            if np.ndim(value)
            else {name: float(value)}
        )
    return values


def _stopping() -> bool:
    """Whether to stop after this step; several processes stop after the same one."""
    return processes.preempted() if jax.process_count() > 1 else interrupt.requested()
