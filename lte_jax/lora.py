"""Low-rank adapters: the matrices of layers stay as they are, and training adds a product to each.

Hu et al. 2021 (arXiv 2106.09685), Eq. 3: y = x W + alpha / rank (x a) b. Here W is a matrix of
attention, or one of all experts together. Embeddings and the head of tokens stay as they are, too;
routers, vectors and the heads of tasks are trained whole. So there are no gradients, moments and
copies of the frozen weights. They lie on the devices once, in `compute.dtype`, and are the teacher
of a distillation, too: without adapters they are the dense model.

`b` starts at zero, so the first step is that of the model itself. What is written in the end is a
plain model of the sums W + alpha / rank a b, see `merged`.

Dimension key: D model width  E experts  M neurons per expert  N layers  A rank
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array

from lte_jax import sharding, stages
from lte_jax.config import Experiment, LTEConfig, ModelConfig
from lte_jax.errors import UserError
from lte_jax.params import ADAPTERS, BY_PATH, Row, dimension_sizes, is_router, table
from lte_jax.routing import kind


@flax.struct.dataclass
class Base:
    """A model to adapt."""

    params: Any  # all of it but routers, as it was before training
    scale: float = flax.struct.field(pytree_node=False)  # of what adapters add: alpha / rank


def check(experiment: Experiment, config: ModelConfig) -> None:
    """Checks that adapters can train what an experiment asks for.

    Raises:
      UserError: if they cannot.
    """
    rank = experiment.lora.rank
    if not rank:
        return
    if not experiment.source.path:
        raise UserError(
            f"lora.rank={rank} adapts a trained model, but source.path is empty: name one "
            "(--config.source.path=MODEL), or set lora.rank=0"
        )
    if rank >= config.d_model:
        raise UserError(
            f"lora.rank={rank} is not below d_model={config.d_model}, the width of the matrices: "
            "expected a smaller one, such as 16"
        )
    for stage in stages.make(experiment.stages, experiment.lte):
        if kind(stage.routing).reads_weights:
            raise UserError(
                f"lora.rank={rank}: lte.routing={stage.routing!r} chooses by the weights "
                "themselves, which adapters leave as they are: set lora.rank=0"
            )


def dtypes(config: ModelConfig, lte: LTEConfig | None, experiment: Experiment) -> dict[str, str]:
    """The type in which each parameter is held to be trained: without adapters float32."""
    frozen = experiment.compute.dtype if experiment.lora.rank else "float32"
    return {row.path: frozen if _freezes(row) else "float32" for row in table(config, lte)}


def start(
    config: ModelConfig, lte: LTEConfig | None, params: Any, experiment: Experiment
) -> tuple[Base | None, Any]:
    """What stays frozen, and what is trained: adapters, and all that is trained whole.

    Args:
      config: of the model.
      lte: of its experts; None: dense.
      params: its parameters, on one device or many; those that both results hold are not copied.
      experiment: without adapters the result is None, and `params`.
    """
    if not experiment.lora.rank:
        return None, params
    sizes, rows = _adapters(config, lte, experiment)
    shapes = {row.path: row.shape(sizes) for pair in rows for row in pair}

    def draw(key: Array) -> Any:
        made = {}
        for i, (a, b) in enumerate(rows):
            random = a.initializer(sizes)
            made[a.path] = random(jax.random.fold_in(key, i), shapes[a.path], jnp.float32)
            made[b.path] = jnp.zeros(shapes[b.path], jnp.float32)
        return _tree(made)

    key, mesh = jax.random.key(experiment.seed), sharding.mesh_of(params)
    places = None
    if mesh is not None:
        places = sharding.param_shardings(jax.eval_shape(draw, key), mesh)
    return _split(params, jax.jit(draw, out_shardings=places)(key), experiment)


def abstract(
    config: ModelConfig, lte: LTEConfig | None, experiment: Experiment
) -> tuple[Base | None, Any]:
    """What `start` returns of parameters held in `dtypes`, as ShapeDtypeStructs."""
    sizes, types = dimension_sizes(config, lte), dtypes(config, lte, experiment)
    params = {
        row.path: jax.ShapeDtypeStruct(row.shape(sizes), jnp.dtype(types[row.path]))
        for row in table(config, lte)
    }
    if not experiment.lora.rank:
        return None, _tree(params)
    sizes, rows = _adapters(config, lte, experiment)
    made = (row for pair in rows for row in pair)
    own = {row.path: jax.ShapeDtypeStruct(row.shape(sizes), jnp.float32) for row in made}
    return _split(_tree(params), _tree(own), experiment)


def whole(base: Base | None, trained: Any) -> Any:
    """The parameters of the model as `model.forward` takes them, adapters beside their matrices."""
    if base is None:
        return trained
    flat = _flat(base.params) | _flat(trained)
    for _, b in ADAPTERS.values():
        if b.path in flat:
            flat[b.path] = base.scale * flat[b.path]
    return _tree(flat)


def merged(base: Base | None, trained: Any) -> Any:
    """The parameters of the plain model; matrices with adapters are `Merged`."""
    if base is None:
        return trained
    flat = _flat(base.params) | _flat(trained)
    for path, (a, b) in ADAPTERS.items():
        if a.path in flat:
            parts = flat[path], flat.pop(a.path), flat.pop(b.path)
            flat[path] = Merged(path, base.scale, *parts)
    return _tree(flat)


@dataclasses.dataclass(frozen=True)
class Merged:
    """The sum of a matrix of all layers and what its adapters add, float32, of a layer at a time.

    To be written (hf/export.py); the whole sums would be the model once more.
    """

    path: str
    scale: float
    matrix: Any
    a: Any
    b: Any
    dtype = jnp.dtype("float32")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all layers."""
        return self.matrix.shape

    def __getitem__(self, layer: int) -> Array:
        """The sum in a layer."""
        return _sum(self.path, self.scale, *(x[layer] for x in (self.matrix, self.a, self.b)))


@functools.partial(jax.jit, static_argnames=("path", "scale"))
def _sum(path: str, scale: float, matrix: Array, a: Array, b: Array) -> Array:
    letters = (row.letters[1:] for row in (*ADAPTERS[path], BY_PATH[path]))
    product = jnp.einsum("{},{}->{}".format(*letters), a, b, precision=jax.lax.Precision.HIGHEST)
    return matrix.astype(jnp.float32) + scale * product


def _freezes(row: Row) -> bool:
    """Whether a parameter stays as it is."""
    table_or_head = row.path.startswith(("embed/", "lm_head/"))
    return row.path in ADAPTERS or (row.is_matrix and table_or_head)


def _split(params: Any, adapters: Any, experiment: Experiment) -> tuple[Base, Any]:
    flat, own = _flat(params), _flat(adapters)
    own |= {path: x for path, x in flat.items() if not _freezes(BY_PATH[path])}
    base = {path: x for path, x in flat.items() if not is_router(path)}
    settings = experiment.lora
    return Base(_tree(base), settings.alpha / settings.rank), _tree(own)


def _adapters(
    config: ModelConfig, lte: LTEConfig | None, experiment: Experiment
) -> tuple[dict[str, int], list[tuple[Row, Row]]]:
    """The sizes of all letters, and the adapters of a model."""
    sizes = dimension_sizes(config, lte) | {"A": experiment.lora.rank}
    return sizes, [ADAPTERS[row.path] for row in table(config, lte) if row.path in ADAPTERS]


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.flatten_dict(dict(tree), sep="/")


def _tree(flat: Mapping[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(flat), sep="/")
