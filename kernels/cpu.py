"""The sparse kernels for CPUs: C++ called by XLA, compiled at first use.

cpu_ffn.cc and cpu_attention.cc become a shared library in the user's cache folder. Its name holds
a digest of all it depends on (source, compiler and flags, jax, CPU) and one of itself: a damaged or
half-written library is never loaded, and processes that build at once do not interfere. The folder
is $LTE_JAX_CACHE, else lte_jax in $XDG_CACHE_HOME or ~/.cache. Loading a library runs its code, so
folder and library must belong to this user and be writable by no one else; otherwise each process
builds for itself. The compiler is $CXX, else g++ or clang++.

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
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .quantized import BITS, GROUP, Quantized, Weight
from .reference import ACTIVATIONS, Unsupported

_HEADER, *_SOURCES = map(
    pathlib.Path(__file__).with_name, ("cpu_common.h", "cpu_ffn.cc", "cpu_attention.cc")
)
_TYPES = ("float32", "bfloat16")
_log = logging.getLogger(__name__)


def sparse_ffn(
    x_BD: jax.Array,
    active_BE: jax.Array,
    weights: Mapping[str, Weight],
    layer: jax.Array,
    *,
    activation: str,
) -> jax.Array:
    """Output [B, D] of x's type, accumulated in float32; weights are stacked [N, E, M, D].

    Raises:
      Unsupported: on a type other than float32 and bfloat16, or if the library cannot be built.
    """
    _ready(x_BD)
    names = ("up", "down", "gate", "up_bias", "gate_bias")
    settings: dict = {"activation": np.int64(list(ACTIVATIONS).index(activation))}
    settings |= {f"has_{name}": name in weights for name in names[2:]}
    operands = jax.tree.leaves([weights[name] for name in names if name in weights])
    target, up = "lte_jax_ffn", weights["up"]
    if isinstance(up, Quantized):
        target, neurons = "lte_jax_scaledffn", up.shape[2]
        if neurons % GROUP:
            raise Unsupported(f"experts of {neurons} neurons in {up.format}: multiples of {GROUP}")
        settings |= {"bits": np.int64(BITS[up.format]), "neurons": np.int64(neurons)}
    out = jax.ShapeDtypeStruct(x_BD.shape, x_BD.dtype)
    call = jax.ffi.ffi_call(target, out, vmap_method="sequential")
    return call(x_BD, active_BE, layer, *operands, **settings)


def linear(x_BK: jax.Array, w: Weight, layer: jax.Array, *, transposed: bool) -> jax.Array:
    """x w[layer], float32 [B, O]; w is stacked [N, K, O] or, transposed, [N, O, K].

    Raises: as sparse_ffn.
    """
    _ready(x_BK)
    out = jax.ShapeDtypeStruct((len(x_BK), w.shape[1 if transposed else 2]), jnp.float32)
    if isinstance(w, Quantized):
        call = jax.ffi.ffi_call("lte_jax_scaledlinear", out, vmap_method="sequential")
        return call(x_BK, layer, w.codes, w.scales, bits=np.int64(BITS[w.format]))
    call = jax.ffi.ffi_call("lte_jax_linear", out, vmap_method="sequential")
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
    """Attention of one new token per row, [B, H, C], and the caches with it at `index` of `layer`.

    Raises: as sparse_ffn.
    """
    _ready(q_BHC)
    out = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q_BHC, k_NBTKC, v_NBTKC))
    call = jax.ffi.ffi_call("lte_jax_attend", out, input_output_aliases={3: 1, 4: 2})
    return tuple(call(q_BHC, k_BKC, v_BKC, k_NBTKC, v_NBTKC, visible_BT, layer, index))


def attend_many(
    q_BLHC: jax.Array,
    k_NBTKC: jax.Array,
    v_NBTKC: jax.Array,
    visible_BLT: jax.Array,
    layer: jax.Array,
    end: jax.Array,
) -> jax.Array:
    """Attention of several tokens per row over the first `end` places of the caches, [B, L, H, C].

    Raises: as sparse_ffn.
    """
    _ready(q_BLHC)
    out = jax.ShapeDtypeStruct(q_BLHC.shape, q_BLHC.dtype)
    call = jax.ffi.ffi_call("lte_jax_attendmany", out)
    return call(q_BLHC, k_NBTKC, v_NBTKC, visible_BLT, layer, end)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(
    q_BLHC: jax.Array,
    k_BLKC: jax.Array,
    v_BLKC: jax.Array,
    visible_BLT: jax.Array,
    causal: bool,
) -> jax.Array:
    """Softmax attention over the visible keys [B, L, H, C], with slopes, float32: for training.

    `causal`: no query sees a key behind its own place. One that sees none has y = 0.

    Raises:
      Unsupported: on other types, a head width that is no multiple of the vectors of this CPU, or
        if the library cannot be built.
    """
    return _attention(q_BLHC, k_BLKC, v_BLKC, visible_BLT, causal)[0]


def _attention(q_BLHC, k_BLKC, v_BLKC, visible_BLT, causal):
    if why := unsuited(q_BLHC.dtype.name, q_BLHC.shape[-1]):
        raise Unsupported(why)
    b, length, heads, _ = q_BLHC.shape
    out = jax.ShapeDtypeStruct(q_BLHC.shape, q_BLHC.dtype)
    sums = jax.ShapeDtypeStruct((b, heads, length), jnp.float32)
    call = jax.ffi.ffi_call("lte_jax_attention", (out, sums), vmap_method="sequential")
    y_BLHC, logsum_BHL = call(q_BLHC, k_BLKC, v_BLKC, visible_BLT, causal=causal)
    return y_BLHC, (q_BLHC, k_BLKC, v_BLKC, visible_BLT, y_BLHC, logsum_BHL)


def _attention_slopes(causal, kept, dy_BLHC):
    out = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in kept[:3])
    call = jax.ffi.ffi_call("lte_jax_attentionslopes", out, vmap_method="sequential")
    return (*call(*kept, dy_BLHC, causal=causal), None)


attention.defvjp(_attention, _attention_slopes)


def unsuited(dtype: str, head_dim: int) -> str | None:
    """Why `attention` cannot compute heads of this type and width; None if it can."""
    if dtype != "float32":
        return f"type {dtype}: attention in training takes float32"
    lanes = _load().LteJaxLanes()
    return f"heads {head_dim} wide: no multiple of {lanes}" if head_dim % lanes else None


def embed(tokens_B: jax.Array, table_VD: Weight) -> jax.Array:
    """Rows of the table: [B, D]. In bfloat16, XLA would first convert the whole table."""
    if isinstance(table_VD, Quantized):
        return table_VD.rows(tokens_B)
    _load()
    out = jax.ShapeDtypeStruct((tokens_B.size, table_VD.shape[1]), table_VD.dtype)
    return jax.ffi.ffi_call("lte_jax_embed", out)(tokens_B, table_VD)


def read(data: jax.Array) -> jax.Array:
    """Reads an array as the kernels read weights and does no more, for benchmarks: int32 [1]."""
    _load()
    return jax.ffi.ffi_call("lte_jax_read", jax.ShapeDtypeStruct((1,), jnp.int32))(data)


def reads_prompts(w: Weight) -> bool:
    """Whether these kernels are faster than XLA's products with as many rows as a prompt has."""
    return isinstance(w, Quantized) or (w.dtype == jnp.bfloat16 and _load().LteJaxHasPanels() == 1)


def unavailable() -> str | None:
    """Why these kernels cannot run here; None if they can."""
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


_CALLS = ("Ffn", "ScaledFfn", "Linear", "ScaledLinear", "Attend", "Attention", "AttentionSlopes")
_CALLS += ("AttendMany", "Embed", "Read")


@functools.cache
def _load() -> ctypes.CDLL:
    """The library; its calls are registered with XLA once per process."""
    try:
        library = ctypes.CDLL(str(_build()))
    except OSError as error:
        raise Unsupported(f"{error}: name another folder in $LTE_JAX_CACHE") from error
    for name in _CALLS:
        capsule = jax.ffi.pycapsule(library[f"LteJax{name}"])
        jax.ffi.register_ffi_target(f"lte_jax_{name.lower()}", capsule, platform="cpu")
    return library


def _build() -> pathlib.Path:
    """The path of the library, found in the cache or built."""
    compiler = _compiler()
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = ("-O3", native, "-std=c++17", "-fno-math-errno", "-shared", "-fPIC", "-w")
    version = _run([*compiler, "--version"])
    texts = (path.read_text(encoding="utf-8") for path in (_HEADER, *_SOURCES))
    parts = (*texts, *compiler, *flags, version, jax.__version__, _cpu())
    name = f"cpu_ffn-{_digest(chr(0).join(parts).encode())}-"

    folder = _cache_folder()
    for library in sorted(folder.glob(f"{name}*.so")):
        if _is_sound(library, library.stem.removeprefix(name)):
            return library
    _log.info("building the CPU kernels with %s into %s", compiler[-1], folder)
    file, path = tempfile.mkstemp(".so.part", name, folder)
    os.close(file)
    draft = pathlib.Path(path)
    try:
        _run([*compiler, *flags, f"-I{jax.ffi.include_dir()}", *map(str, _SOURCES), "-o", path])
        data = draft.read_bytes()
        if not data:
            raise Unsupported(f"{' '.join(compiler)} wrote nothing: name a C++ compiler in $CXX")
        draft.chmod(0o700)  # compilers apply the umask
        return draft.replace(folder / f"{name}{_digest(data)}.so")
    finally:
        draft.unlink(missing_ok=True)


def _compiler() -> list[str]:
    """The compiler command as a list of words: $CXX may be "ccache g++"."""
    chosen = os.environ.get("CXX", "").strip()
    try:
        words = [chosen] if shutil.which(chosen) else shlex.split(chosen)
    except ValueError as error:
        raise Unsupported(f"$CXX is {chosen!r}: {error}") from None
    for name, *rest in [words] if words else [["g++"], ["clang++"]]:
        if path := shutil.which(name):
            return [path, *rest]
    raise Unsupported(
        f"no C++ compiler ({chosen or 'g++ or clang++'}) on the PATH: install one (apt install "
        "g++), or name one in $CXX"
    )


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise Unsupported(f"{command[0]} cannot be run: {error.strerror}") from None
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
    """A folder that only this user can write; failing that, one for this process alone."""
    chosen = os.environ.get("LTE_JAX_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(chosen or f"{base}/lte_jax")
    try:
        folder = pathlib.Path(os.path.abspath(folder.expanduser()))
        folder = folder.parent.resolve() / folder.name  # its own link is left, to be refused
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        unsafe = filter(None, map(_unsafe, folder.parents))
        why = _distrust(folder, stat.S_ISDIR) or next(unsafe, "")
        if not why:
            with tempfile.TemporaryFile(dir=folder):
                return folder
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
    except RuntimeError:  # no $HOME, and none in the list of users
        why = "cannot be found, as this user has no home"
    return pathlib.Path(_private_folder(folder, why).name)


@functools.cache  # so it warns once, too
def _private_folder(instead: pathlib.Path, why: str) -> tempfile.TemporaryDirectory:
    _log.warning(
        "%s %s: each process builds the CPU kernels for itself, ten seconds; name a folder of "
        "your own in $LTE_JAX_CACHE",
        *(instead, why),
    )
    return tempfile.TemporaryDirectory(prefix="lte_jax-")


def _is_sound(library: pathlib.Path, digest: str) -> bool:
    """Whether a library found in the cache may be loaded; if not, it is removed."""
    try:
        why = _distrust(library, stat.S_ISREG)
        if not why:
            data = library.read_bytes()
            if data and _digest(data) == digest:
                return True
            why = "is damaged"
        library.unlink(missing_ok=True)
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
    _log.warning("%s %s: building it anew", library, why)
    return False


def _distrust(path: pathlib.Path, is_kind: Callable[[int], bool]) -> str:
    """Why another user may have made or changed what is at `path`; "" if none could."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not is_kind(found.st_mode):
        return "is of another kind"
    if found.st_uid != os.geteuid():
        return f"belongs to another user (number {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(found.st_mode):o}; mend: chmod 700)"
    return ""


def _unsafe(parent: pathlib.Path) -> str:
    """Why another user could replace a folder inside `parent`; "" if none can."""
    found = parent.stat()
    writers = stat.S_IWOTH
    if found.st_gid != found.st_uid:  # else the group that many systems give to each user alone
        writers |= stat.S_IWGRP
    owned = found.st_uid in (0, os.geteuid())
    if owned and (found.st_mode & stat.S_ISVTX or not found.st_mode & writers):
        return ""
    return f"lies in {parent}, where others can write"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
