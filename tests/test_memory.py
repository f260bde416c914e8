"""Memory that steps keep: lte_jax/memory.py."""

import pathlib
import subprocess
import sys

import pytest

from lte_jax import memory

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Pages of 32 buffers of 64 MB, touched one after another: fresh ones each time, or the same.
FAULTS = """
import ctypes, resource, sys
from lte_jax import memory
if sys.argv[1] == "keep":
    assert memory.keep()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(32):
    buffer = libc.malloc(64 << 20)
    ctypes.memset(buffer, 1, 64 << 20)
    libc.free(buffer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of Linux's C library")
def test_freed_memory_serves_again():
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, how],
                cwd=ROOT, capture_output=True, text=True, check=True,
            ).stdout
        )
        for how in ("keep", "as it is")
    }  # fmt: skip
    assert faults["keep"] < faults["as it is"] / 8, faults


HUGE = """
import ctypes
from lte_jax import memory
assert memory.keep()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
ctypes.memset(libc.malloc(128 << 20), 1, 128 << 20)
[line] = [line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
print(int(line.split()[1]) // 1024)
"""
SETTING = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="a system without huge pages"
)
def test_huge_pages():
    command = [sys.executable, "-c", HUGE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 64  # megabytes; the system may have no more of them


def test_nothing_is_kept_beside_an_accelerator(monkeypatch):
    monkeypatch.setattr(memory.importlib.metadata, "entry_points", lambda group: ["xla_cuda12"])
    assert memory.keep() is False


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep() is False
