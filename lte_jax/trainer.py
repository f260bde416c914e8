"""The one training loop: a stage, a state and batches in; a trained state out.

`make_train_step` is the whole of the maths, one pure function under `jax.jit`; `fit` is the loop
around it: batches, checkpoints, validation, metrics, and what to do when it is interrupted.

Dimension key: B batch  L length  N layers  E experts
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from lte_jax import data, interrupt, losses, optim, sharding, sparsity
from lte_jax.checkpoint import Checkpointer
from lte_jax.config import Experiment
from lte_jax.errors import UserError
from lte_jax.model import Transformer
from lte_jax.routing import kind
from lte_jax.sparsity import Control
from lte_jax.stages import Stage
from lte_jax.writers import Writer

log = logging.getLogger(__name__)

Batch = dict[str, Array | np.ndarray]  # tokens [B, L] and segments [B, L], int32


@flax.struct.dataclass
class TrainState:
    """Everything a step changes."""

    step: Any  # of this stage, int32
    params: Any
    opt_state: Any
    control: Control


def make_loss(model: Transformer, stage: Stage) -> Callable:
    """The loss of a stage: (params, teacher, batch, control, counts) -> (loss, its parts).

    `counts` are the predicted and the real tokens of the whole batch, of which this may be a part.
    `teacher` is the parameter tree of the dense model, in expert order, for distillation.
    """

    def loss(params, teacher, batch, control, counts):
        tokens, segments = batch["tokens"], batch["segments"]
        predicted, real = losses.predicted(segments), segments > 0
        out = model.apply(
            {"params": params},
            tokens,
            routing=stage.routing,
            mask=segments,
            threshold=control.threshold,
        )
        task = losses.cross_entropy(out.logits, tokens, predicted, counts["predicted"])
        total, parts = stage.task_weight * task, {"task": task}
        if stage.distill_weight:
            dense = model.apply({"params": teacher}, tokens, routing="dense", mask=segments)
            parts["distill"] = losses.distillation(out.logits, dense.logits, real, counts["real"])
            total += stage.distill_weight * parts["distill"]
        if out.scores is not None:
            power = model.lte.efficiency_power
            parts["kept"] = jnp.mean(losses.layer_means(out.active, real, counts["real"]))
            parts["efficiency"] = losses.efficiency(out.scores, real, counts["real"], power)
            if stage.efficiency:
                total += control.efficiency_weight * parts["efficiency"]
            if stage.separability_weight:
                parts["separability"] = losses.separability(
                    out.scores,
                    real,
                    counts["real"],
                    control.threshold,
                    model.lte.separability_eps,
                )
                total += stage.separability_weight * parts["separability"]
        return total, parts | {"loss": total}

    return loss


def make_train_step(
    model: Transformer,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
) -> Callable[[TrainState, Batch, Any], tuple[TrainState, dict[str, Float[Array, ""]]]]:
    """One optimizer step of a stage, to be jitted: (state, batch, teacher) -> (state, metrics)."""
    gradient = jax.grad(make_loss(model, stage), has_aux=True)

    def step(state: TrainState, batch: Batch, teacher: Any = None):
        counts = {
            "predicted": _count(losses.predicted(batch["segments"])),
            "real": _count(batch["segments"] > 0),
        }

        def accumulate(total, part):
            return jax.tree.map(
                jnp.add, total, gradient(state.params, teacher, part, state.control, counts)
            ), None

        if microbatches == 1:
            grads, parts = gradient(state.params, teacher, batch, state.control, counts)
        else:
            cut = jax.tree.map(lambda x: _interleave(x, microbatches), batch)
            first = jax.tree.map(lambda x: x[0], cut)
            start = jax.eval_shape(gradient, state.params, teacher, first, state.control, counts)
            start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), start)
            (grads, parts), _ = jax.lax.scan(accumulate, start, cut)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        control = state.control
        if stage.steer == "weight":
            control = control.steer_weight(parts["kept"], stage.integral_gain)
        elif stage.steer == "threshold":
            control = control.steer_threshold(parts["kept"])
        metrics = parts | {"grad_norm": optax.tree.norm(grads), "tokens": counts["real"]}
        if "kept" in parts:
            metrics["sparsity"] = 1.0 - metrics.pop("kept")
            metrics |= {"eta": state.control.efficiency_weight, "tau": state.control.threshold}
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, control), metrics

    return step


def _count(mask: Array) -> Float[Array, ""]:
    return jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)


def _interleave(x: Array, parts: int) -> Array:
    """[B, ...] as [parts, B/parts, ...]: rows i, i + parts, ... so that no row moves device."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def make_eval_step(model: Transformer, stage: Stage) -> Callable[..., dict[str, Array]]:
    """Sums over a batch: (params, batch, threshold) -> sums; routing is as it will be served."""
    routing = kind(stage.routing).served

    def step(params: Any, batch: Batch, threshold: Float[Array, ""]):
        tokens, segments = batch["tokens"], batch["segments"]
        predicted, one = losses.predicted(segments), jnp.ones((), jnp.float32)
        out = model.apply(
            {"params": params}, tokens, routing=routing, mask=segments, threshold=threshold
        )
        real = jnp.sum((segments > 0).astype(jnp.float32))
        return {
            "loss": losses.cross_entropy(out.logits, tokens, predicted, one),
            "predicted": jnp.sum(predicted.astype(jnp.float32)),
            "skipped": out.sparsity * real,
            "real": real,
        }

    return step


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a stage ends with."""

    params: Any
    control: Control
    validation_loss: float  # nats per predicted token, hard routing
    validation_sparsity: float


def fit(
    model: Transformer,
    stage: Stage,
    params: Any,
    control: Control,
    rows: tuple[data.Rows, data.Rows],
    experiment: Experiment,
    folder: str | Path,
    writer: Writer,
    *,
    mesh: jax.sharding.Mesh,
    teacher: Any = None,
) -> Trained:
    """Runs a stage, from its newest checkpoint in `folder` if there is one, to its last step.

    Args:
      model: dense or LTE, as `params`.
      stage: what to train and how, see stages.py.
      params: where the stage starts; copied.
      control: likewise.
      rows: to train on, and to validate on.
      experiment: batch size, optimizer, seed, and how often to log, validate and save.
      folder: of this stage's checkpoints.
      writer: of metrics.
      mesh: whose axes are those of sharding.py.
      teacher: the dense model's parameters in the same layout, for a stage that distils.

    Raises:
      UserError: on bad data or folders, and when the loss is not finite: the step's batch is then
        in `folder`/nonfinite-<step>.npz.
      Interrupted: after a signal, once the state is saved.
    """
    folder, steps, keep = Path(folder), stage.config.steps, experiment.checkpoint
    seed = (experiment.seed + zlib.crc32(stage.name.encode())) % 2**32
    batches = data.train_iterator(rows[0], experiment.data.batch_size, seed, **_share())
    with (
        jax.set_mesh(mesh),
        Checkpointer(folder, keep_last=keep.keep_last, keep_best=keep.keep_best) as checkpointer,
    ):
        loop = _compile(model, stage, experiment, params, control, mesh)
        restored = checkpointer.restore(loop.abstract_state)
        validation: dict[str, float] = {}
        if restored is None:
            step, state = 0, loop.start(params)
        else:
            step, state, seen = restored
            batches.set_state(seen["batches"])
            validation = seen["validation"]
        saved = step
        writer.start(stage.name, step, steps)
        unchecked: tuple[int, Any, Any] | None = None  # fetched a step late: the device never waits
        while True:
            if step and (step % experiment.eval_every == 0 or step == steps) and not validation:
                validation = _validate(loop, state, rows[1], experiment.data.batch_size, mesh)
                if validation:
                    writer.write(stage.name, step, validation)
            stopping = _stopping(step)
            if step > saved and (stopping or step == steps or step % keep.every == 0):
                _check_finite(unchecked, stage, folder)
                position = {"batches": batches.get_state(), "validation": validation}
                checkpointer.save(step, state, position, validation)
            if stopping:
                checkpointer.wait()
                raise interrupt.Interrupted(f"after step {step} of stage {stage.name!r}")
            if step == steps:
                checkpointer.wait()  # a signal may have come since
                interrupt.check(f"after step {step} of stage {stage.name!r}")
                return Trained(state.params, state.control, **validation)
            batch, validation = next(batches), {}
            state, metrics = loop.train_step(state, _to_mesh(batch, mesh), teacher)
            step += 1
            _check_finite(unchecked, stage, folder)
            unchecked = (step, metrics, batch)
            if step % experiment.log_every == 0 or step == steps:
                writer.write(stage.name, step, {k: float(v) for k, v in metrics.items()})


@dataclasses.dataclass(frozen=True)
class _Loop:
    """The compiled parts of a stage."""

    start: Callable[[Any], TrainState]
    abstract_state: TrainState  # with shardings
    train_step: Callable
    eval_step: Callable


def _compile(
    model: Transformer,
    stage: Stage,
    experiment: Experiment,
    params: Any,
    control: Control,
    mesh: jax.sharding.Mesh,
) -> _Loop:
    optimizer = optim.make(experiment.optim, stage.config, stage.rules)

    def start(params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), control)

    abstract = jax.eval_shape(start, params)
    shardings = state_shardings(abstract, mesh)
    step = make_train_step(model, stage, optimizer, experiment.optim.microbatches)
    outputs = (shardings, sharding.replicated(mesh))
    return _Loop(
        start=jax.jit(start, out_shardings=shardings),
        abstract_state=_with_shardings(abstract, shardings),
        train_step=jax.jit(step, donate_argnums=0, out_shardings=outputs),
        eval_step=jax.jit(make_eval_step(model, stage)),
    )


def _validate(
    loop: _Loop, state: TrainState, rows: data.Rows, batch_size: int, mesh: jax.sharding.Mesh
) -> dict[str, float]:
    """Means over the validation rows; {} where a signal cut it short."""
    sums: dict[str, float] = {}
    for batch in data.eval_batches(rows, batch_size, **_share()):
        if interrupt.requested():
            return {}
        part = loop.eval_step(state.params, _to_mesh(batch, mesh), state.control.threshold)
        sums = {k: sums.get(k, 0.0) + float(v) for k, v in part.items()}
    return {
        "validation_loss": sums["loss"] / max(sums["predicted"], 1.0),
        "validation_sparsity": sums["skipped"] / max(sums["real"], 1.0),
    }


def settle_threshold(
    model: Transformer,
    params: Any,
    control: Control,
    rows: data.Rows,
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> Control:
    """The control with the threshold that gives the wanted sparsity on `rows`, hard routing.

    Where scores crowd at one value it may be out of reach: a warning says what was reached.
    """
    count = jax.jit(
        functools.partial(sparsity.score_histogram, model),
        out_shardings=sharding.replicated(mesh),
    )

    def histogram(threshold: float) -> np.ndarray:
        total = np.zeros((), np.int64)
        for batch in data.eval_batches(rows, batch_size, **_share()):
            interrupt.check("while setting the threshold")
            total = total + np.asarray(count(params, _to_mesh(batch, mesh), np.float32(threshold)))
        return total

    target = float(control.target_sparsity)
    with jax.set_mesh(mesh):
        threshold, reached = sparsity.settle(histogram, float(control.threshold), target)
    log.log(
        logging.INFO if abs(reached - target) <= sparsity.SETTLED else logging.WARNING,
        "threshold set to %.4f on %d calibration records: sparsity %.4f (target %.4f)",
        *(threshold, len(rows), reached, target),
    )
    return control.replace(threshold=jnp.asarray(threshold, jnp.float32))


def _share() -> dict[str, int]:
    """This process's part of every batch."""
    return {"shard_index": jax.process_index(), "shard_count": jax.process_count()}


def _stopping(step: int) -> bool:
    """Whether to stop after this step: where several processes train, JAX decides for them all."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return interrupt.requested()


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Shardings of a whole (abstract) state: optimizer moments lie as their parameters do."""
    params = sharding.param_shardings(state.params, mesh)
    by_path = traverse_util.flatten_dict(params)
    replicated = sharding.replicated(mesh)

    def of(path, _) -> jax.sharding.NamedSharding:
        keys = tuple(getattr(key, "key", None) for key in path)
        # The path of a moment ends in the path of its parameter.
        ends = (by_path[keys[i:]] for i in range(len(keys)) if keys[i:] in by_path)
        return next(ends, replicated)

    return jax.tree_util.tree_map_with_path(of, state).replace(params=params)


def _with_shardings(abstract: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )


def _to_mesh(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """This process's rows of a batch as its part of the global arrays."""
    place = sharding.batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(place, v) for k, v in batch.items()}


def _check_finite(unchecked: tuple[int, Any, Any] | None, stage: Stage, folder: Path) -> None:
    if unchecked is None:
        return
    step, metrics, batch = unchecked
    values = {k: float(v) for k, v in metrics.items()}
    if all(math.isfinite(value) for value in values.values()):
        return
    path = folder / f"nonfinite-{step}.npz"
    np.savez(path, step=step, **batch, **{f"metric_{k}": v for k, v in values.items()})
    bad = ", ".join(f"{k}={v}" for k, v in values.items() if not math.isfinite(v))
    raise UserError(
        f"stage {stage.name!r} step {step}: {bad}; its batch is in {path}. Checkpoints before it "
        f"are whole: try a lower stages.{stage.name}.learning_rate, or a smaller optim.clip_norm"
    )
