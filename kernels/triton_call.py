"""A Triton kernel called from jax, by any jax-triton from 0.3 on.

Versions before 0.4 are mended as they are imported: their calls become typed ones, and Triton is
asked for PTX that XLA's assembler knows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax

from .reference import Unsupported
from .triton_blocks import Blocks


def call(
    kernel: str, arrays: tuple, out, grid: tuple[int, ...], cut: Blocks, **constants: Any
) -> Any:
    """One launch of a kernel; returns arrays of the shapes `out`.

    Raises:
      Unsupported: if there is no jax-triton.
    """
    library = jax_triton()
    from . import triton_codes, triton_kernels

    # Fused multiply-add, which later versions of Triton leave off by default.
    fused = {"enable_fp_fusion": True}
    if _is_old(library):
        by_version = {"out_shape": out, **fused}
    else:
        by_version = {"out_type": out, "backend_options": {**fused, **_assembly()}}
    return library.triton_call(
        *arrays,
        kernel=getattr(triton_kernels, kernel, None) or getattr(triton_codes, kernel),
        grid=grid,
        name=f"lte_jax_{kernel}",
        num_warps=cut.warps,
        num_stages=cut.stages,
        **by_version,
        **constants,
    )


@functools.cache
def jax_triton():
    """The package, mended where it is old.

    Raises:
      Unsupported: if it is absent.
    """
    try:
        import jax_triton as package
        import triton  # noqa: F401  jax_triton imports without it
    except ImportError as error:
        raise Unsupported(
            f"no jax-triton ({str(error).splitlines()[0]}): pip install 'lte-jax[gpu]'"
        ) from error
    if _is_old(package):
        library = package.triton_lib
        library.jax = _With(jax, ffi=_With(jax.ffi, ffi_lowering=_typed))
        library.cb = _With(library.cb, CUDABackend=_backend(library.cb.CUDABackend))
    return package


def _assembly() -> dict[str, int]:
    """The version of PTX, where it is chosen: that of CUDA 12.5 suffices up to Hopper.

    Triton's own is for the newest assembler, and XLA's may be older.
    """
    newer = jax.default_backend() == "gpu" and float(jax.devices()[0].compute_capability) >= 10.0
    return {} if newer else {"ptx_version": 85}


def _is_old(package) -> bool:
    return tuple(int(part) for part in package.__version__.split(".")[:2]) < (0, 4)


class _With:
    """A module with other attributes."""

    def __init__(self, module, **attributes):
        self._module = module
        self.__dict__ |= attributes

    def __getattr__(self, name: str):
        return getattr(self._module, name)


def _backend(usual: type) -> type:
    """Triton's compiler, asked for `_assembly`: jax-triton before 0.4 hands on no such options."""

    class Backend(usual):
        def parse_options(self, options: dict):
            return super().parse_options({**_assembly(), **options})

    return Backend


def _typed(name: str, *, backend_config: bytes, operand_output_aliases, **_):
    """How jax-triton before 0.4 lowers every call, but typed, as later ones do and Pallas does.

    XLA leaves an untyped call, and so nearly each layer, out of CUDA graphs.
    """
    del name  # "triton_kernel_call"
    how = {"api_version": 4, "operand_output_aliases": operand_output_aliases}
    rule = jax.ffi.ffi_lowering("triton_kernel_call_ffi", **how)
    return functools.partial(rule, opaque=backend_config)
