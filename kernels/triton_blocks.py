"""Block sizes of the Triton kernels: tuned for this device, else by rule.

A kernel is named after its function, of codes (triton_codes.py) also after their format: "hidden",
"combine int8".

Dimension key: B rows  E experts  M rows of the weights  D their columns; of codes, whatever the
               order in the model: outputs, and the inputs of an expert
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .quantized import GROUP, LANES, packed_shapes
from .reference import Unsupported

TUNED = pathlib.Path(__file__).with_name("tuned")  # <device>.json, by tune.py
ROWS = (1, 8, 16, 32, 64)  # numbers of rows that x is padded to, each with its block sizes
TYPES = ("float32", "bfloat16")
_PROGRAMS = 512  # of `combine`: about four for each of an H200's 132 multiprocessors


class Blocks(NamedTuple):
    """Block sizes of one kernel: a tile is `m` rows of the weights by `d` columns."""

    m: int
    d: int
    warps: int
    stages: int  # tiles in flight, plus one in use
    splits: int = 1  # parts of the sum (`combine`)


def padded(b: int) -> int:
    """The number of rows that b rows are padded to.

    Raises:
      Unsupported: on more rows than the kernels take.
    """
    for rows in ROWS:
        if b <= rows:
            return rows
    raise Unsupported(f"{b} rows: the Triton kernels take up to {ROWS[-1]} at once")


def blocks(kernel: str, b: int, m: int, d: int, dtype: str, *, experts: int = 1) -> Blocks:
    """The block sizes tuned for this device, kernel, weight shape, type and rows; else by rule.

    Raises:
      Unsupported: on a type or number of rows that the kernels do not take, and on a damaged file
        of tuned blocks.
    """
    if dtype not in TYPES:
        raise Unsupported(f"type {dtype}: the Triton kernels take {' and '.join(TYPES)}")
    shape = (kernel, b, m, d, dtype)
    tuned = read_tuned(tuned_path()) if jax.default_backend() == "gpu" else {}
    return tuned.get(key(*shape)) or by_rule(*shape, experts=experts)


def by_rule(kernel: str, b: int, m: int, d: int, dtype: str, *, experts: int = 1) -> Blocks:
    """Block sizes from arithmetic alone, powers of two.

    A multiprocessor of an H200 gets 36 GB/s, and a load takes up to a microsecond: 36 KB must
    always be in flight on each. The rules aim at twice that, with tiles of about 8 KiB, several
    tiles ahead in each program and several programs per multiprocessor, within its registers (some
    70 a thread) and shared memory (160 KB on an A100). A tile's rows have at least 256 bytes.
    """
    rows, size = padded(b), jnp.dtype(dtype).itemsize
    if kernel.partition(" ")[2]:
        return _of_codes(kernel, rows, m, d, experts)
    most = power(m)  # no tile needs more rows
    if kernel == "combine":
        # With several rows, the list of experts takes every second stage.
        tall, stages = (min(16, most), 6) if rows == 1 else (min(32, max(16, most)), 7)
        cut = Blocks(m=tall, d=256 // size, warps=4, stages=stages)
        panels, columns = experts * -(-m // cut.m), -(-d // cut.d)
        # With many rows the partial sums would be as large as the weights: use fewer.
        programs = _PROGRAMS if rows <= 16 else _PROGRAMS // 2
        return cut._replace(splits=min(panels, -(-programs // columns)))
    if rows == 1:
        # `project` reads one matrix, `hidden` two: a deeper pipeline keeps as many bytes in flight.
        stages = 3 if kernel == "hidden" else 5
        return Blocks(m=min(4, most), d=1024 // size, warps=4, stages=stages)
    # x is read again for each tile, so the more rows it has, the taller the tile.
    tall = 16 if rows <= 8 else 32
    # float32 does not use tensor cores, and four warps would run out of registers.
    warps = 8 if dtype == "float32" and rows > 16 else 4
    return Blocks(m=min(tall, max(16, most)), d=256 // size, warps=warps, stages=5)


def _of_codes(kernel: str, rows: int, m: int, d: int, experts: int) -> Blocks:
    """Likewise; a tile is cut from blocks of 16 outputs by 32 inputs, which are contiguous."""
    name, form = kernel.split()
    size = packed_shapes(GROUP, LANES, form)[0][-1]
    total = experts * d // GROUP
    # Several rows are multiplied by tensor cores, at least 16 outputs a warp; x is read again for
    # each tile, so the more rows it has, the taller the tile.
    tall = LANES if rows == 1 else max(LANES, min(64 if rows <= 16 else 128, power(m)))
    groups = 8192 // (size * tall // LANES) // (2 if name == "hidden" else 1)
    # A quarter of a block's inputs come at a time, and tensor cores take 16 at least.
    groups = max(min(power(groups + 1) // 2, power(total)), 4)
    warps = 8 if rows > 32 and tall > 64 else 4  # four would run out of registers
    cut = Blocks(m=tall, d=groups * GROUP, warps=warps, stages=4 if rows <= 16 else 3)
    if name == "hidden":
        return cut
    programs, columns = _PROGRAMS if rows <= 16 else _PROGRAMS // 2, -(-m // tall)
    return cut._replace(splits=min(-(-total // groups), -(-programs // columns)))


def power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def key(kernel: str, b: int, m: int, d: int, dtype: str) -> str:
    """The name of an entry in a file of tuned blocks, such as "hidden 32x4096 bfloat16 rows 8"."""
    return f"{kernel} {m}x{d} {dtype} rows {padded(b)}"


def tuned_path() -> pathlib.Path:
    """The file for this process's device, such as tuned/nvidia-h200.json."""
    return TUNED / (jax.devices()[0].device_kind.lower().replace(" ", "-") + ".json")


@functools.cache
def read_tuned(path: pathlib.Path) -> dict[str, Blocks]:
    """The entries of a file that tune.py wrote, by `key`; none if there is no file."""
    if not path.exists():
        return {}
    try:
        return {name: Blocks(**cut) for name, cut in json.loads(path.read_text())["blocks"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unsupported(f"{path}: not a file of tuned blocks ({error}): delete it") from error
