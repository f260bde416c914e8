"""Memory that a step has freed serves the next one, in place of going back to the system.

XLA asks for its buffers anew at each step. glibc maps a large one from the system and gives it back
when it is freed, so every step on a CPU touches hundreds of megabytes of fresh pages, which the
system zeroes first: an eighth of a step's time (docs/log.md, 2026-11-30).
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import sys

# Names and numbers of <malloc.h>, see mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


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
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never = ctypes.c_int(2**31 - 1)
    # No mapping, no trimming, and one arena: others would map memory of their own.
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, never), (_ARENA_MAX, 1))
    return all([mallopt(name, value) == 1 for name, value in settings])
