"""Memory that a step has freed serves the next one, in huge pages, where that is the host's.

XLA asks for its buffers anew at each step. glibc maps a large one from the system and gives it back
when it is freed, so every step on a CPU touches hundreds of megabytes of fresh pages, which the
system zeroes first: an eighth of a step's time (docs/log.md, 2026-11-30).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

# Names and numbers of <malloc.h>, see mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_HUGE_PAGE, _MADV_HUGEPAGE = 2 << 20, 14  # of <sys/mman.h>


def keep() -> bool:
    """Asks the C library to keep what this process frees; call it before other threads start.

    Nothing is given back until the process ends, so it holds what it needed at most. The result
    says whether that was done: not without glibc, and not where JAX has a plugin for an
    accelerator, as buffers are there then.
    """
    if sys.platform != "linux":
        return False
    if importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    # No mapping, no trimming, and one arena: others would map memory of their own.
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))
    if not all([libc.mallopt(name, value) == 1 for name, value in settings]):
        return False
    _ask_for_huge_pages(libc)
    return True


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """For as many addresses as half of the host's memory has; they take none until used.

    As nothing is trimmed, they stay the heap's after `free`, and what is allocated comes from them.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    start = libc.malloc(size)
    if start is None:  # a limit of addresses: pages stay small
        return
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(first, start + size - first, _MADV_HUGEPAGE)  # no harm where it is refused
    libc.free(start)
