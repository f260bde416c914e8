"""Where every array lives on the device mesh: one table, from parameter path to mesh axes.

A parameter has logical axes (what its dimensions mean), a logical axis has a mesh axis (or none),
and both tables are here. Fully sharded data parallelism cuts the model width D, tensor
parallelism cuts heads, vocabulary and experts; the batch is cut over data and fsdp together.

Dimension key: B batch  L length  D model width  E experts  M neurons per expert
               N layers  H heads  K kv heads  C head width  V vocabulary
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lte_jax.config import MeshConfig
from lte_jax.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axis. Change sharding here and nowhere else.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "experts": "tensor",
    "dense_neurons": "tensor",  # a dense FFN is one expert: its neurons are cut in its place
    "neurons": None,
    "layers": None,
    "head_dim": None,
}

# Parameter path -> logical axes; the first match wins and every parameter must match.
PARAM_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("embed/embedding", ("vocab", "embed")),
    ("lm_head/kernel", ("embed", "vocab")),
    (".*norm/scale", ()),  # small: a copy on each device
    ("layers/attn/q/kernel", ("layers", "embed", "heads", "head_dim")),
    ("layers/attn/[kv]/kernel", ("layers", "embed", "kv_heads", "head_dim")),
    ("layers/attn/o/kernel", ("layers", "heads", "head_dim", "embed")),
    ("layers/attn/q/bias", ("layers", "heads", "head_dim")),
    ("layers/attn/[kv]/bias", ("layers", "kv_heads", "head_dim")),
    ("layers/attn/o/bias", ("layers", "embed")),
    ("layers/ffn/router/kernel", ("layers", "embed", "experts")),
    ("layers/ffn/router/bias", ("layers", "experts")),
    ("layers/ffn/(gate|up|down)", ("layers", "experts", "neurons", "embed")),
    ("layers/ffn/(gate|up)_bias", ("layers", "experts", "neurons")),
    ("layers/ffn/down_bias", ("layers", "embed")),
)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices (or those given), with axes `data`, `fsdp`, `tensor`.

    Raises:
      UserError: where the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [config.data, config.fsdp, config.tensor]
    rest = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and rest > 0 and len(devices) % rest == 0:
        shape[shape.index(-1)] = len(devices) // rest
    if min(shape) < 1 or math.prod(shape) != len(devices):
        raise UserError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not cover "
            f"{len(devices)} devices: the axes must multiply to that number (one may be -1)"
        )
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def check_batch(batch_size: int, microbatches: int, mesh: Mesh) -> None:
    """That a batch can be cut: over the devices that share it, the processes, and in microbatches.

    Raises:
      UserError: where it cannot; names the three numbers and batch sizes that can.
    """
    devices = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
    unit = math.lcm(devices, microbatches, jax.process_count())
    if batch_size % unit:
        near = [size for size in (batch_size // unit * unit, -(-batch_size // unit) * unit) if size]
        raise UserError(
            f"data.batch_size={batch_size} does not divide over {devices} devices (mesh.data x "
            f"mesh.fsdp), {jax.process_count()} processes and optim.microbatches={microbatches}: "
            f"nearby sizes that do are {' and '.join(map(str, near))}"
        )


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """The NamedSharding of each leaf of a tree of arrays or ShapeDtypeStructs.

    Raises:
      UserError: where a dimension does not divide over its mesh axis.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    shardings = {path: _sharding(path, leaf.shape, mesh) for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(shardings, sep="/")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose first dimension is the batch."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` held to its logical axes under `jax.set_mesh`; as it is where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = PartitionSpec(*(RULES[axis] if axis else None for axis in axes))
    return jax.lax.with_sharding_constraint(x, spec)


def _sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    for pattern, axes in PARAM_AXES:
        if re.fullmatch(pattern, path):
            break
    else:
        raise UserError(f"no sharding rule for parameter {path!r}: add one to PARAM_AXES")
    if "neurons" in axes and shape[1] == 1:
        axes = tuple({"experts": "layers", "neurons": "dense_neurons"}.get(a, a) for a in axes)
    spec = [RULES[axis] for axis in axes]
    used = [axis for axis in spec if axis]
    if len(set(used)) != len(used):
        raise UserError(f"{path}: two dimensions of {axes} claim one mesh axis: {spec}")
    for size, logical, axis in zip(shape, axes, spec, strict=False):
        if axis and size % mesh.shape[axis]:
            raise UserError(
                f"{path}: {logical}={size} does not divide over mesh axis {axis}="
                f"{mesh.shape[axis]}: choose a mesh.{axis} that divides it"
            )
    return NamedSharding(mesh, PartitionSpec(*spec))
