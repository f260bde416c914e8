"""The sparse kernels for CPUs: C++ called by XLA, compiled at first use.

cpu_ffn.cc beside this file becomes a shared library in a cache folder of the user's, under a name
that holds a digest of all it depends on (source, compiler and flags, jax, CPU) and one of itself:
a damaged or half-written library is never loaded, and processes that build at once do not meet.
The folder is $LTE_JAX_CACHE, else lte_jax in $XDG_CACHE_HOME or ~/.cache; where it cannot be
written, each process builds for itself. $CXX names the compiler, else g++ or clang++ is taken.

Dimension key: B rows  D model width  E experts  M neurons per expert  N layers  K inputs
               O outputs  H heads  C head width  T tokens so far
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .reference import ACTIVATIONS, Unsupported

_SOURCE = pathlib.Path(__file__).with_name("cpu_ffn.cc")
_TYPES = ("float32", "bfloat16")
_log = logging.getLogger(__name__)


def sparse_ffn(
    x_BD: jax.Array,
    active_BE: jax.Array,
    weights: Mapping[str, jax.Array],
    layer: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    """Output [B, D] of x's type, accumulated in float32; weights are stacked [N, E, M, D].

    Raises:
      Unsupported: on a type other than float32 and bfloat16, or where the library cannot be built.
    """
    _ready(x_BD)
    names = ("up", "down", "gate", "up_bias", "gate_bias")
    call = jax.ffi.ffi_call(
        "lte_jax_ffn", jax.ShapeDtypeStruct(x_BD.shape, x_BD.dtype), vmap_method="sequential"
    )
    return call(
        x_BD,
        active_BE,
        layer,
        *(weights[name] for name in names if name in weights),
        activation=np.int64(list(ACTIVATIONS).index(activation)),
        **{f"has_{name}": name in weights for name in names[2:]},
    )


def linear(x_BK: jax.Array, w: jax.Array, layer: jax.Array, *, transposed: bool) -> jax.Array:
    """x w[layer], float32 [B, O]; w is stacked [N, K, O] or, transposed, [N, O, K].

    Raises: as sparse_ffn.
    """
    _ready(x_BK)
    shape = (x_BK.shape[0], w.shape[1 if transposed else 2])
    call = jax.ffi.ffi_call(
        "lte_jax_linear", jax.ShapeDtypeStruct(shape, jnp.float32), vmap_method="sequential"
    )
    return call(x_BK, layer, w, transposed=transposed)


def attend(
    q_BHC: jax.Array,
    k_BKC: jax.Array,
    v_BKC: jax.Array,
    k_NBTKC: jax.Array,
    v_NBTKC: jax.Array,
    visible_BT: jax.Array,
    layer: jax.Array,
    index: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one new token a row, [B, H, C], and the caches with it at `index` of `layer`.

    Raises: as sparse_ffn.
    """
    _ready(q_BHC)
    out = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q_BHC, k_NBTKC, v_NBTKC))
    call = jax.ffi.ffi_call("lte_jax_attend", out, input_output_aliases={3: 1, 4: 2})
    y_BHC, k_NBTKC, v_NBTKC = call(q_BHC, k_BKC, v_BKC, k_NBTKC, v_NBTKC, visible_BT, layer, index)
    return y_BHC, k_NBTKC, v_NBTKC


def embed(tokens_B: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Rows of the table: [B, D]. XLA's, in bfloat16, first converts the table."""
    _load()
    out = jax.ShapeDtypeStruct((tokens_B.size, table_VD.shape[1]), table_VD.dtype)
    return jax.ffi.ffi_call("lte_jax_embed", out)(tokens_B, table_VD)


def unavailable() -> str | None:
    """Why these kernels cannot run here, in words; None if they can."""
    if jax.default_backend() != "cpu":
        return f"it is for CPUs, and jax runs on {jax.default_backend()}"
    try:
        _load()
    except Unsupported as reason:
        return str(reason)
    return None


def _ready(x: jax.Array) -> None:
    if x.dtype.name not in _TYPES:
        raise Unsupported(f"type {x.dtype.name}: the CPU kernels take {' and '.join(_TYPES)}")
    _load()


@functools.cache
def _load() -> None:
    """Registers the calls with XLA, once a process."""
    path = _build()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unsupported(f"{error}: name another folder in $LTE_JAX_CACHE") from error
    for name in ("Ffn", "Linear", "Attend", "Embed"):
        capsule = jax.ffi.pycapsule(library[f"LteJax{name}"])
        jax.ffi.register_ffi_target(f"lte_jax_{name.lower()}", capsule, platform="cpu")


def _build() -> pathlib.Path:
    """The library, from the cache or made."""
    compiler = _compiler()
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = ("-O3", native, "-std=c++17", "-fno-math-errno", "-shared", "-fPIC", "-w")
    version = _run([compiler, "--version"])
    parts = (_SOURCE.read_text(), *flags, version, jax.__version__, _cpu())
    name = f"cpu_ffn-{_digest(chr(0).join(parts).encode())}-"

    folder = _cache_folder()
    for library in sorted(folder.glob(f"{name}*.so")):
        if library.stem.removeprefix(name) == _digest(library.read_bytes()):
            return library
        _log.warning("%s is damaged: building it anew", library)
        library.unlink(missing_ok=True)
    _log.info("building the CPU kernels with %s into %s", compiler, folder)
    file, draft = tempfile.mkstemp(".so.part", name, folder)
    os.close(file)
    try:
        include = f"-I{jax.ffi.include_dir()}"
        _run([compiler, *flags, include, str(_SOURCE), "-o", draft])
        library = folder / f"{name}{_digest(pathlib.Path(draft).read_bytes())}.so"
        os.replace(draft, library)
    except BaseException:
        pathlib.Path(draft).unlink(missing_ok=True)
        raise
    return library


def _compiler() -> str:
    names = (os.environ["CXX"],) if os.environ.get("CXX") else ("g++", "clang++")
    for name in names:
        if path := shutil.which(name):
            return path
    raise Unsupported(
        f"no C++ compiler ({' or '.join(names)}) on the PATH: install one (apt install g++), or "
        "name one in $CXX"
    )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        line = next((line for line in lines if "error" in line), lines[-1])
        raise Unsupported(f"{command[0]} failed: {line.strip()}")
    return done.stdout


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _cache_folder() -> pathlib.Path:
    """A folder that exists and can be written; at worst one of this process alone."""
    chosen = os.environ.get("LTE_JAX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(chosen or f"{base}/lte_jax").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        _log.warning(
            "%s cannot be written (%s): each process builds the CPU kernels for itself, three "
            "seconds; name a folder in $LTE_JAX_CACHE",
            folder,
            error.strerror,
        )
        return pathlib.Path(_private_folder().name)


@functools.cache
def _private_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="lte_jax-")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
