"""How arrays are sharded over the device mesh: one table, from dimension to mesh axis.

params.py gives the dimensions of each parameter. Fully sharded data parallelism splits the model
width D, tensor parallelism splits heads, vocabulary and experts; the batch is split over data and
fsdp together.

Dimension key: B batch  L length  D model width  E experts  M neurons per expert
               N layers  H heads  K kv heads  C head width  V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lte_jax.config import MeshConfig
from lte_jax.errors import UserError
from lte_jax.params import BY_PATH, NAMES

AnyMesh = Mesh | AbstractMesh  # of devices that are here, or are not
MESH_AXES = ("data", "fsdp", "tensor")

# Dimension of a parameter or activation -> mesh axis; the others are not split.
RULES: dict[str, str | tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "D": "fsdp",
    "V": "tensor",
    "H": "tensor",
    "K": "tensor",
    "E": "tensor",
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or those given), with axes `data`, `fsdp`, `tensor`.

    Raises:
      UserError: if the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_shape(config: MeshConfig, number: int) -> tuple[int, ...]:
    """The devices along each axis of a mesh over so many.

    Raises:
      UserError: if the axis sizes do not multiply to that number.
    """
    shape = [config.data, config.fsdp, config.tensor]
    rest = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and rest > 0 and number % rest == 0:
        shape[shape.index(-1)] = number // rest
    if min(shape) < 1 or math.prod(shape) != number:
        raise UserError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not cover "
            f"{number} devices: the axes must multiply to that number (one may be -1)"
        )
    return tuple(shape)


def check_batch(batch_size: int, microbatches: int, mesh: AnyMesh) -> None:
    """Checks that a batch can be split over its devices and the microbatches.

    Raises:
      UserError: if it cannot; names the numbers and batch sizes that work.
    """
    devices = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
    unit = math.lcm(devices, microbatches)
    if batch_size % unit:
        near = [size for size in (batch_size // unit * unit, -(-batch_size // unit) * unit) if size]
        raise UserError(
            f"data.batch_size={batch_size} does not divide over {devices} devices (mesh.data x "
            f"mesh.fsdp) and optim.microbatches={microbatches}: nearby sizes that do are "
            f"{' and '.join(map(str, near))}; or fewer devices for it (mesh.tensor)"
        )


def param_shardings(tree: Any, mesh: AnyMesh) -> Any:
    """The NamedSharding of each leaf of a tree of arrays or ShapeDtypeStructs.

    Raises:
      UserError: if a mesh axis does not divide its dimension.
    """
    flat = traverse_util.flatten_dict(tree, sep="/")
    shardings = {path: _sharding(path, leaf.shape, mesh) for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(shardings, sep="/")


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """The sharding of arrays whose first dimension is the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["B"]))


def rows_here(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a batch that this process's devices hold, ascending.

    Processes whose devices hold the same rows (mesh.tensor over both) are given the same.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in places.values()]))


def feed(batch: Mapping[str, np.ndarray], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch as global arrays, of the rows of `rows_here` that each process has of it."""
    place, rows = batch_sharding(mesh), rows_here(batch_size, mesh)

    def array(part: np.ndarray) -> jax.Array:
        shape = (batch_size, *part.shape[1:])
        shards = []
        for device, index in place.addressable_devices_indices_map(shape).items():
            own = np.searchsorted(rows, np.arange(batch_size)[index[0]])
            shards.append(jax.device_put(part[own], device))
        return jax.make_array_from_single_device_arrays(shape, place, shards)

    return {name: array(part) for name, part in batch.items()}


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of `make_mesh` that a tree of arrays lies on; None: on no mesh."""
    for leaf in jax.tree.leaves(tree):
        place = getattr(leaf, "sharding", None)
        if isinstance(place, NamedSharding) and place.mesh.axis_names == MESH_AXES:
            return place.mesh
    return None


def placed(tree: Any, mesh: Mesh | None, under: str) -> Any:
    """Parameters that every process has alike, on the mesh; without one, on the default device.

    Args:
      tree: of arrays.
      mesh: as `mesh_of` returns it.
      under: the path of the tree, as in "layers/ffn".
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)

    def put(path: str, array: Any) -> jax.Array:
        whole = np.asarray(array)
        place = _sharding(f"{under}/{path}", whole.shape, mesh)
        return jax.make_array_from_callback(whole.shape, place, whole.__getitem__)

    flat = traverse_util.flatten_dict(tree, sep="/")
    return traverse_util.unflatten_dict({k: put(k, x) for k, x in flat.items()}, sep="/")


def gathered(array: Any, layer: int | None = None) -> Any:
    """An array, or one layer of it, whole in every process; all of them must call."""
    part = array if layer is None else array[layer]
    if isinstance(part, jax.Array) and not part.is_fully_addressable:
        return multihost_utils.process_allgather(part, tiled=True)
    return part


def replicated(mesh: AnyMesh) -> NamedSharding:
    """The sharding with a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array) -> jax.Array:
    """`x` [B, ...] sharded over the batch only, under `jax.set_mesh`; unchanged without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(RULES["B"]))


def over_batch(function: Callable, rows: int) -> Callable:
    """`function(whole, rows) -> (sums, rows)`, computed by each device on its rows of a batch.

    Each of the four is a tree of arrays; those of `rows` have the batch as their first dimension,
    `whole` is on every device, and `sums` are added up, once, when all devices are done. So a loop
    within `function` does not communicate. Without `jax.set_mesh`, or if the number of `rows` does
    not divide, it is the function itself, and XLA divides its work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in RULES["B"] if not mesh.empty and mesh.shape[axis] > 1)
    if not axes or rows % math.prod(mesh.shape[axis] for axis in axes):
        return function

    def local(whole: Any, rows: Any) -> tuple[Any, Any]:
        sums, others = function(whole, rows)
        return jax.lax.psum(sums, axes), others

    specs = PartitionSpec(), PartitionSpec(axes)
    # Unchecked: the check would add up gradients of `whole` wherever one is taken.
    return jax.shard_map(
        local, in_specs=specs, out_specs=specs, axis_names=set(axes), check_vma=False
    )


def devices_along(*axes: str) -> int:
    """The devices along mesh axes under `jax.set_mesh`; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)


def _sharding(path: str, shape: tuple[int, ...], mesh: AnyMesh) -> NamedSharding:
    if path not in BY_PATH:
        raise UserError(f"no parameter {path!r} in the table of params.py: add a row")
    letters = BY_PATH[path].letters
    spec = [RULES.get(letter) for letter in letters]
    if set(letters) <= set("NDC"):  # small: replicated
        spec = [None] * len(letters)
    elif (e := letters.find("EM")) > 0 and shape[e] == 1:  # a dense FFN: split its neurons
        spec[e], spec[e + 1] = spec[e + 1], spec[e]
    for size, letter, axis in zip(shape, letters, spec, strict=True):
        if axis and size % mesh.shape[axis]:
            raise UserError(
                f"{path}: {NAMES[letter]}={size} does not divide over mesh axis {axis}="
                f"{mesh.shape[axis]}: choose a mesh.{axis} that divides it"
            )
    return NamedSharding(mesh, PartitionSpec(*spec))
