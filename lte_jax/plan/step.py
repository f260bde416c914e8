"""What one training step computes and holds on each device, counted from its trace.

Nothing is compiled or allocated: JAX traces the loss of a stage and its gradient for what a device
has of it, its rows of the batch and, with mesh.tensor, its share of heads, experts and vocabulary.
Every family, routing and remat policy is counted by what it does.

    FLOPs   two for each multiplication of the matrix products in the trace, those of a loop times
            its length; what remat computes again is among them

    bytes = kept + the larger of (layer, head)
    kept    what the forward pass leaves for the backward pass: all its results that are read there,
            of all layers, but parameters and logits
    layer   the backward pass of one layer: what remat computes again, at least half of what the
            layer keeps without, for slopes; attention's scores and theirs; the slopes of all
            routers' scores; and the layer's weights and their gradients, whole and in
            compute.dtype, where they are sharded or cast. With adapters (lora.py) there are no
            such gradients, but the adapters' products beside those of the matrices. Where inputs of
            FFNs are compared with the teacher's, their slopes, of all layers, have taken the
            place of both by then
    head    _LOGITS float32 arrays of the tokens whose logits exist at a time; the head's matrices
            where they are sharded or cast; and the sum of its gradients over chunks. At least those
            slopes
    On TPUs the compiler remakes half a layer at a time, and holds those slopes, and a copy, beside
    what they were made of.

tests/test_plan.py holds the bytes to those that XLA reports of the compiled step.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lte_jax import lora, objective, stages, training_step
from lte_jax.config import Experiment, LTEConfig, ModelConfig, num_experts
from lte_jax.model import Transformer, abstract_params
from lte_jax.sparsity import SparsityController

# Float32 arrays of logits at once: shifted, exponentiated and sloped, and those of a teacher.
_LOGITS, _LOGITS_TAUGHT = 3, 6

Leaf = tuple[tuple[int, ...], Any]  # shape and type of an array


@dataclasses.dataclass(frozen=True)
class Step:
    """A step on each device: FLOPs of all its microbatches, and bytes at their largest."""

    flops: float
    kept: int
    layer: int
    head: int

    @property
    def bytes(self) -> int:
        """What comes and goes within a step, besides gradients."""
        return self.kept + max(self.layer, self.head)


def count(
    stage: stages.Stage,
    experiment: Experiment,
    config: ModelConfig,
    rows: int,
    fsdp: int = 1,
    tensor: int = 1,
    tpu: bool = False,
) -> Step:
    """Counts a step of which each device has `rows` records a microbatch.

    Args:
      stage: of the experiment.
      experiment: says how to compute.
      config: of the dense model.
      rows: records of a microbatch on a device.
      fsdp: devices over which parameters are sharded by width.
      tensor: devices over which heads, experts and vocabulary are.
      tpu: whether they are TPUs.
    """
    config, lte = _share(config, tensor), experiment.lte if stage.sparse else None
    model = training_step.trained_model(config, lte, experiment.compute)
    weights = _Weights(model, fsdp, experiment)
    shape, answers = (rows, experiment.data.length), bool(experiment.data.task)
    how = Experiment(compute=experiment.compute, lte=experiment.lte, lora=experiment.lora)
    trace = _trace(stage, model, how, shape, answers)
    logits = *shape, config.vocab_size
    seen = sum(_bytes(leaf) * n for leaf, n in trace.kept.items() if leaf[0] == logits)
    kept = sum(weights.bytes(leaf) * n for leaf, n in trace.kept.items()) - seen

    plain = model.clone(remat=False)
    again = _trace(stage, plain, how, shape, answers)
    own, held = (weights.of_one_layer(of.kept, config.num_layers) for of in (again, trace))
    layer = own // 2 if tpu else max(own - held, own // 2)
    layer += again.scores + weights.at_work
    layer += math.prod(shape) * weights.added
    if lte is not None:
        layer += 4 * math.prod(shape) * config.num_layers * num_experts(config, lte)

    slopes = math.prod(shape) * config.d_model * config.num_layers * weights.itemsize
    slopes *= stage.hidden_distill_weight > 0
    layer = max(0, layer + (2 * slopes if tpu else -slopes))

    head = slopes
    if config.head == "lm":
        length = objective.chunk_length(model, *shape)
        taught, matrix = stage.distill_weight > 0, config.d_model * config.vocab_size
        own = 4 * rows * length * config.vocab_size * (_LOGITS_TAUGHT if taught else _LOGITS)
        if weights.made:
            own += matrix * weights.itemsize * (1 + taught)
        if length < shape[1] and not weights.frozen:
            own += 4 * matrix
        head = max(head, own)
    return Step(experiment.optim.microbatches * trace.flops, kept, layer, head)


class _Weights:
    """What a device holds of a layer's matrices while they are used."""

    def __init__(self, model: Transformer, fsdp: int, experiment: Experiment) -> None:
        flat = traverse_util.flatten_dict(abstract_params(model), sep="/")
        base, trained = lora.abstract(model.config, model.lte, experiment)
        self._shapes = {leaf.shape for leaf in flat.values() if len(leaf.shape) > 2}
        self._fsdp, self.frozen = fsdp, base is not None
        self.itemsize = jnp.dtype(model.dtype).itemsize
        layered = (w.shape[1:] for path, w in flat.items() if path.startswith("layers/"))
        of_layer = sum(map(math.prod, layered)) * self.itemsize
        self.made = fsdp > 1 or (model.dtype != "float32" and not self.frozen)
        self.at_work = of_layer if self.frozen else 2 * of_layer * self.made
        own = traverse_util.flatten_dict(trained, sep="/").items()
        outputs = (math.prod(leaf.shape[2:]) for path, leaf in own if path.endswith("_b"))
        self.added = sum(outputs) * self.itemsize  # of adapters, for each token

    def bytes(self, leaf: Leaf) -> int:
        """Of a kept array; matrices that were cast are kept sharded as they are."""
        return _bytes(leaf) // (self._fsdp if leaf[0] in self._shapes else 1)

    def of_one_layer(self, kept: Mapping[Leaf, int], layers: int) -> int:
        """Bytes that are kept of each layer, in arrays that have all of them."""
        stacked = ((leaf, n) for leaf, n in kept.items() if leaf[0][:1] == (layers,))
        return sum(self.bytes(leaf) * n for leaf, n in stacked) // layers


@dataclasses.dataclass(frozen=True)
class _Trace:
    """The gradient of a microbatch."""

    flops: float
    kept: dict[Leaf, int]  # how many arrays there are of a shape and type
    scores: int  # bytes of attention's scores and their slopes in one layer


@functools.cache
def _trace(
    stage: stages.Stage,
    model: Transformer,
    experiment: Experiment,
    shape: tuple[int, int],
    answers: bool,
) -> _Trace:
    """Traces the gradient of a stage's loss for so many records and tokens of each.

    `experiment` has `compute`, `lte` and `lora` alone, so that others share a trace.
    """
    base, weights = lora.abstract(model.config, model.lte, experiment)
    loss = training_step.make_loss(model, stage)
    inputs = _inputs(model.config, experiment.lte, shape, answers)

    def gradient(params: Any, base: Any, teacher: Any, inputs: Any) -> Any:
        of_trained = lambda w: loss(lora.whole(base, w), teacher, *inputs)  # noqa: E731
        total, back, parts = jax.vjp(of_trained, params, has_aux=True)
        return jax.tree.leaves(back), (total, parts, back(jnp.ones_like(total)))

    teacher = None
    if stage.taught:
        held = functools.partial(training_step.teacher_of, compute=experiment.compute)
        teacher = jax.eval_shape(held, weights if base is None else base.params)
    traced = jax.make_jaxpr(gradient, return_shape=True)
    closed, (kept, _) = traced(weights, base, teacher, inputs)
    jaxpr, given = closed.jaxpr, set(map(id, closed.jaxpr.invars))
    left = {id(var): var.aval for var in jaxpr.outvars[: len(kept)] if id(var) not in given}
    flops, scores = 0.0, 0
    for eqn, times in equations(jaxpr, jaxpr.outvars[len(kept) :]):
        if eqn.primitive.name == "dot_general":
            (summed, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in summed)
            flops += times * 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)
        if eqn.primitive.name == "scan":
            loop, width = eqn.params["jaxpr"].jaxpr, model.config.head_dim
            scores = max(scores, sum(products(loop, width)))
    counted = collections.Counter(
        (aval.shape, aval.dtype) for aval in left.values() if jnp.issubdtype(aval.dtype, np.generic)
    )
    return _Trace(flops, dict(counted), scores)


def products(loop: Any, width: int) -> Iterator[int]:
    """Bytes of each product over `width`, that of a head, of activations with each other."""
    for eqn, _ in equations(loop, loop.outvars):
        if eqn.primitive.name == "dot_general":
            (summed, _), (together, _) = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in summed)
            out = eqn.outvars[0].aval
            if together and depth == width:
                yield _bytes((out.shape, out.dtype))


def _share(config: ModelConfig, tensor: int) -> ModelConfig:
    """What one of `tensor` devices has of a model, without what makes no difference to a step."""
    cut = ("num_heads", "num_kv_heads", "d_ff", "vocab_size")
    parts = {name: -(-getattr(config, name) // tensor) for name in cut}
    words = {"bos_id": None, "eos_ids": (), "pad_id": None}
    return dataclasses.replace(config, **words, **parts, dtype="float32")


def _inputs(
    config: ModelConfig, lte: LTEConfig, shape: tuple[int, int], answers: bool
) -> tuple[Any, ...]:
    """What a loss takes besides parameters: batch, control, counts and key."""
    number, cells = (jax.ShapeDtypeStruct(*x) for x in (((), jnp.float32), (shape, jnp.int32)))
    batch = {"tokens": cells, "segments": cells}
    if config.head == "classes":
        kind = jnp.int32 if config.num_labels > 1 else jnp.float32
        batch["labels"] = jax.ShapeDtypeStruct((shape[0], 1), kind)
    elif answers:
        batch["answers"] = cells
    start = lambda: SparsityController.start(lte, config.num_layers)  # noqa: E731
    counts = dict.fromkeys(("predicted", "distilled", "real"), number)
    return batch, jax.eval_shape(start), counts, jax.eval_shape(lambda: jax.random.key(0))


def equations(jaxpr: Any, results: Sequence[Any], times: int = 1) -> Iterator[tuple[Any, int]]:
    """The equations that lead to the results, also those within others, and how often each runs."""
    needed = set(map(id, results))
    for eqn in reversed(jaxpr.eqns):
        if not needed & set(map(id, eqn.outvars)):
            continue
        needed |= set(map(id, eqn.invars))
        yield eqn, times
        for value in eqn.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(each, "jaxpr", each)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, inner.outvars, times * eqn.params.get("length", 1))


def _bytes(leaf: Leaf) -> int:
    return math.prod(leaf[0]) * jnp.dtype(leaf[1]).itemsize
