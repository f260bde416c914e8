"""One training step: the loss of a stage, its gradient, and the update.

Pure functions, to be jitted; the training loop is in trainer.py.

Dimension key: B batch  L length  N layers  E experts
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array

from lte_jax import kernels, lora, losses, optim, quantization, sharding
from lte_jax.config import ComputeConfig, LTEConfig, ModelConfig
from lte_jax.model import Transformer, forward
from lte_jax.objective import Batch, counts_of, head_losses, predicted
from lte_jax.params import BY_PATH
from lte_jax.routing import kind
from lte_jax.sparsity import SparsityController
from lte_jax.stages import Stage

_TARGET = 2**31 - 1  # of the random numbers of a step, those of its target


@flax.struct.dataclass
class TrainState:
    """Everything a step changes."""

    step: Any  # of this stage, int32
    params: Any  # those that are trained, see lora.py
    opt_state: Any
    control: SparsityController


def trained_model(
    config: ModelConfig,
    lte: LTEConfig | None,
    compute: ComputeConfig,
    devices: int | None = None,
) -> Transformer:
    """The model as the stages train it; `lte` None: the dense one.

    `devices`: of the mesh; None: of any, with attention by XLA.
    """
    how = compute
    return Transformer(
        config,
        lte,
        how.dtype,
        remat=how.remat,
        attention=kernels.trains_attention(how.attention, how.dtype, config.head_dim, devices),
        unroll=how.unroll,
        head_tokens=how.head_tokens,
    )


def starts_dense(lte: LTEConfig) -> bool:
    """Whether the first sparse stage starts with the dense model's own weights, its teacher's."""
    return not (lte.refit or kind(lte.routing).keeps_zeros)


def teacher_of(params: Any, compute: ComputeConfig) -> Any:
    """The parameters of a dense model as a teacher holds them; those of that type are not copied.

    Matrices are in `compute.teacher_dtype`, but for the classifier's, which are exact.
    """
    dtype = compute.teacher_dtype

    def held(path: str, array: Array) -> Array:
        used = BY_PATH[path].is_matrix and not path.startswith("classifier")
        return array.astype(dtype) if used and array.dtype != dtype else array

    flat = traverse_util.flatten_dict(dict(params), sep="/")
    return traverse_util.unflatten_dict({k: held(k, v) for k, v in flat.items()}, sep="/")


def make_loss(model: Transformer, stage: Stage) -> Callable:
    """The loss of a stage: (params, teacher, batch, control, counts, key) -> (loss, parts).

    `counts` are of the whole batch: what is predicted, what is distilled, and the real tokens;
    `batch` may be a microbatch.
    `teacher` holds the dense model's parameters, in expert order, for distillation. `key` is for
    dropout; None: there is none.
    """
    student, dense = model.clone(dropout=stage.config.dropout), model.clone(as_held=True)

    def run(net, params, batch, **options):
        """The output, and the FFN inputs [N, B, L, D] if they have a loss."""
        if not stage.hidden_distill_weight:
            return forward(net, params, batch, **options), None
        out, sown = forward(net, params, batch, mutable="intermediates", **options)
        return out, sown["intermediates"]["layers"]["ffn"]["ffn_input"][0]

    def loss(params, teacher, batch, control, counts, key=None):
        real, threshold = batch["segments"] > 0, control.threshold
        options = {"routing": stage.routing, "threshold": threshold}
        if key is not None and (student.dropout or kind(stage.routing).random):
            options["rngs"] = {"dropout": key}
        out, read_NBLD = run(student, params, batch, **options)
        taught = None
        if stage.taught:
            with jax.named_scope("teacher"):
                said, taught_NBLD = run(dense, teacher, batch, routing="dense")
            taught = (teacher, said) if stage.distill_weight else None
        weights = stage.task_weight, stage.distill_weight
        total, parts = head_losses(model, params, out, batch, counts, weights, taught)
        if stage.hidden_distill_weight:
            parts["distill_hidden"] = losses.hidden_distillation(
                read_NBLD, taught_NBLD, real, counts["real"]
            )
            total += stage.hidden_distill_weight * parts["distill_hidden"]
        if out.scores is not None:
            count, power = counts["real"], model.lte.efficiency_power
            parts["active_fraction_N"] = losses.layer_means(out.active, real, count)
            parts["active_fraction"] = jnp.mean(parts["active_fraction_N"])
            if control.depths_K is not None:
                share = losses.count_true(real) / count
                active = parts[_steers(model)]
                parts["correction_K"] = control.correction(active, share)
                parts["drawn_sparsity"] = control.target_sparsity * share
            parts["efficiency"] = losses.efficiency(out.scores, real, count, power)
            if stage.efficiency and model.lte.per_layer:
                weight_N = control.efficiency_weight
                total += losses.efficiency(out.scores, real, count, power, weight_N)
            elif stage.efficiency:
                total += control.efficiency_weight * parts["efficiency"]
            if stage.separability_weight:
                parts["separability"] = losses.separability(
                    out.scores, real, count, threshold, model.lte.separability_eps
                )
                total += stage.separability_weight * parts["separability"]
        return total, parts | {"objective": total}

    return loss


def make_train_step(
    model: Transformer,
    stage: Stage,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    seed: int = 0,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """One optimizer step, to be jitted: (state, batch, teacher, base) -> (state, metrics).

    `base` is what the state's parameters adapt (lora.py); None: they are the whole model. `seed` is
    of dropout, whose random numbers depend on it and on the step alone. The metrics are scalars,
    and "sparsity_per_layer" [N]; docs/metrics.md says what each is.
    """
    loss, rate = make_loss(model, stage), optim.schedule(stage.config)

    def of_trained(params: Any, base: lora.Base | None, *args: Any):
        params = lora.whole(base, params)
        if format := stage.config.quantize:
            params = quantization.straight_through(model.config, model.lte, params, format)
        return loss(params, *args)

    gradient = jax.grad(of_trained, has_aux=True)

    def step(state: TrainState, batch: Batch, teacher: Any = None, base: lora.Base | None = None):
        counts = counts_of(model, batch)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        target_key = jax.random.fold_in(key, _TARGET)
        places = jnp.arange(microbatches) / microbatches

        def gradient_of(part, key, place):
            control = state.control.drawn(target_key, place)
            return gradient(state.params, base, teacher, part, control, counts, key)

        def accumulate(total, scanned):
            return jax.tree.map(jnp.add, total, gradient_of(*scanned)), None

        if microbatches == 1:
            grads, parts = gradient_of(batch, key, places[0])
        else:
            cut = jax.tree.map(lambda x: _interleave(x, microbatches), batch)
            scanned = cut, jax.random.split(key, microbatches), places
            shapes = jax.eval_shape(gradient_of, *jax.tree.map(lambda x: x[0], scanned))
            (grads, parts), _ = jax.lax.scan(accumulate, optax.tree.zeros_like(shapes), scanned)

        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            if kind(stage.routing).keeps_zeros:
                params = _with_zeros(state.params, params)
        control = _steered(state.control, stage, parts.get(_steers(model)), parts)
        parts.pop("correction_K", None)
        metrics = parts | {"grad_norm": optax.tree.norm(grads), "tokens": counts["real"]}
        metrics["learning_rate"] = rate(state.step)
        if "active_fraction" in parts:
            metrics["sparsity"] = 1.0 - metrics.pop("active_fraction")
            metrics["sparsity_per_layer"] = 1.0 - metrics.pop("active_fraction_N")
            metrics["efficiency_weight"] = state.control.efficiency_weight
            metrics["threshold"] = state.control.threshold
        return TrainState(state.step + 1, params, opt_state, control), metrics

    return step


def _steers(model: Transformer) -> str:
    """Which part of the loss the controller looks at."""
    return (
        "active_fraction_N" if model.lte is not None and model.lte.per_layer else "active_fraction"
    )


def _steered(control: SparsityController, stage: Stage, active_fraction, parts):
    """The controller after a step."""
    if stage.steer is None:
        return control
    if control.depths_K is not None:
        control = control.steer_curve(parts["correction_K"])
        return control.centre_curve(stage.integral_gain) if stage.steer == "weight" else control
    if stage.steer == "weight":
        return control.steer_weight(active_fraction, stage.integral_gain)
    return control.steer_threshold(active_fraction)


def _with_zeros(before: Any, after: Any) -> Any:
    """`after`, with zeros where the FFN's matrices had them before."""
    old, new = before["layers"]["ffn"], after["layers"]["ffn"]
    kept = {
        name: jnp.where(old[name] == 0, 0.0, w) if name in ("gate", "up", "down") else w
        for name, w in new.items()
    }
    return after | {"layers": after["layers"] | {"ffn": kept}}


def _interleave(x: Array, parts: int) -> Array:
    """[B, ...] as [parts, B/parts, ...]: records i, i + parts, ... so none changes device."""
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def make_eval_step(model: Transformer, stage: Stage) -> Callable[..., dict[str, Array]]:
    """Sums over a batch under the served routing: (params, batch, threshold, base) -> sums."""
    routing = kind(stage.routing).served

    def step(params: Any, batch: Batch, threshold: Array, base: lora.Base | None = None):
        params = lora.whole(base, params)
        out = forward(model, params, batch, routing=routing, threshold=threshold)
        real = jnp.sum(batch["segments"] > 0, dtype=jnp.float32)
        loss, _ = head_losses(model, params, out, batch, {"predicted": jnp.float32(1)})
        return {
            "loss": loss,
            "predicted": jnp.sum(predicted(model, batch), dtype=jnp.float32),
            "skipped": out.sparsity * real,
            "real": real,
        }

    return step


def state_shardings(state: TrainState, mesh: sharding.AnyMesh) -> TrainState:
    """Shardings of a whole (abstract) state: optimizer moments follow their parameters."""
    params = sharding.param_shardings(state.params, mesh)
    by_path = traverse_util.flatten_dict(params)
    replicated = sharding.replicated(mesh)

    def of(path, _) -> jax.sharding.NamedSharding:
        keys = tuple(getattr(key, "key", None) for key in path)
        # The path of a moment ends in the path of its parameter.
        ends = (by_path[keys[i:]] for i in range(len(keys)) if keys[i:] in by_path)
        return next(ends, replicated)

    return jax.tree_util.tree_map_with_path(of, state).replace(params=params)
