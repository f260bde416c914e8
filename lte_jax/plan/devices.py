"""The devices of a plan: those at hand, or some that one does not have, as `h200:8`.

A rate is that of dense matrix products in bfloat16 with float32 sums, at its peak, and memory is as
the maker prints it. Figures "with sparsity" are twice as high.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path

import jax
from jax.sharding import AbstractMesh, AxisType

from lte_jax import sharding
from lte_jax.config import MeshConfig
from lte_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of device."""

    kind: str  # a pattern of what JAX calls it
    memory: float  # bytes
    rate: float  # FLOPs a second
    source: str

    @property
    def usable(self) -> int:
        """Bytes that programs may have."""
        return int(_USABLE * self.memory)


_ADA = "NVIDIA Ada GPU Architecture whitepaper"
MACHINES = {
    "a100": Machine("A100", 80e9, 312e12, "NVIDIA A100 80GB datasheet, SXM"),
    "h100": Machine("H100", 80e9, 989.5e12, "NVIDIA H100 datasheet, SXM"),
    "h200": Machine("H200", 141e9, 989.5e12, "NVIDIA H200 datasheet, SXM"),
    "l4": Machine("NVIDIA L4$", 24e9, 121e12, "NVIDIA L4 datasheet"),
    "rtx4090": Machine("RTX 4090", 24e9, 165.2e12, _ADA),
    "v4": Machine("TPU v4", 32e9, 275e12, "cloud.google.com/tpu/docs/v4"),
    "v5e": Machine("TPU v5 ?(lite|e)", 16e9, 197e12, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Machine("TPU v5p?$", 95e9, 459e12, "cloud.google.com/tpu/docs/v5p"),
    "v6e": Machine("TPU v6 ?(lite|e)", 32e9, 918e12, "cloud.google.com/tpu/docs/v6e"),
}
_ACHIEVED = 0.4  # of the peak rate: what well-tuned training of dense models comes to
_USABLE = 0.95  # of the memory: what programs may have beside the drivers'
_TAKEN = 0.75  # of a GPU's memory: what JAX takes unless told otherwise


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices in a mesh."""

    kind: str
    mesh: sharding.AnyMesh
    memory: int | None  # bytes of each that a program may use; None: not known
    machine: Machine | None  # None: not in the table
    here: bool = True

    @classmethod
    def at_hand(cls, mesh: jax.sharding.Mesh) -> Devices:
        """Those of this mesh."""
        first = mesh.local_devices[0]  # others do not tell their memory
        kind = first.device_kind
        machine = next((m for m in MACHINES.values() if re.search(m.kind, kind)), None)
        limit = (first.memory_stats() or {}).get("bytes_limit")
        if limit is None and first.platform == "cpu":  # they share the host's
            limit = (host_memory() or 0) // jax.local_device_count()
        return cls(kind, mesh, limit or (machine and machine.usable), machine)

    @classmethod
    def named(cls, words: str, config: MeshConfig) -> Devices:
        """Devices that one does not have, as "h200:8"; or those at hand, as "".

        Raises:
          UserError: on another kind, or a number that is none.
        """
        if not words:
            return cls.at_hand(sharding.make_mesh(config))
        kind, _, number = words.partition(":")
        if kind not in MACHINES:
            raise UserError(f"--plan={words!r}: no device {kind!r}: {nearest(kind, MACHINES)}")
        if not re.fullmatch(r"[1-9]\d{0,5}", number or "1"):
            raise UserError(f"--plan={words!r}: expected a number of devices, such as {kind}:8")
        shape = sharding.mesh_shape(config, int(number or 1))
        mesh = AbstractMesh(shape, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
        machine = MACHINES[kind]
        return cls(kind, mesh, machine.usable, machine, here=False)

    @property
    def number(self) -> int:
        """Of all processes."""
        return math.prod(self.mesh.shape.values())

    @property
    def tpu(self) -> bool:
        """Whether they are TPUs."""
        return "TPU" in (self.machine.kind if self.machine else self.kind)

    @property
    def alone(self) -> int | None:
        """Bytes that a program on one of them may use while the others rest; None: not known."""
        shared = jax.local_device_count() if self.here and self.kind == "cpu" else 1
        return self.memory and self.memory * shared

    def along(self, axis: str) -> int:
        """How many there are along an axis of the mesh."""
        return self.mesh.shape[axis]

    def with_mesh(self, data: int, fsdp: int, tensor: int) -> Devices:
        """As many as these axes have, of the same kind."""
        shape, types = (data, fsdp, tensor), (AxisType.Auto,) * 3
        return dataclasses.replace(
            self, mesh=AbstractMesh(shape, sharding.MESH_AXES, axis_types=types)
        )

    def seconds(self, flops: float, dtype: str) -> float | None:
        """How long each device takes for so many FLOPs; None: not known."""
        if self.machine is None or dtype != "bfloat16":
            return None
        return flops / (_ACHIEVED * self.machine.rate)

    def rate(self) -> str:
        """What `seconds` assumes."""
        assert self.machine is not None
        peak = f"{self.machine.rate / 1e12:.4g} TFLOP/s"
        return f"at {_ACHIEVED:.0%} of {peak} a device ({self.machine.source})"

    def advice(self, needed: int) -> str:
        """What to set so that JAX takes as much of a GPU as is needed; "" if nothing."""
        machine = self.machine
        if self.here or machine is None or machine.kind.startswith("TPU"):
            return ""
        if not _TAKEN * machine.memory < needed <= machine.usable:
            return ""
        return f"; JAX takes {_TAKEN:.0%} of a GPU: set XLA_PYTHON_CLIENT_MEM_FRACTION={_USABLE}"


def host_memory() -> int | None:
    """Bytes of memory that this process may use; None: the system does not say."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    words = limit.read_text().strip() if limit.is_file() else ""
    return min(found, int(words)) if words.isdigit() else found
