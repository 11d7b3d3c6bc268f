"""Memory of the host, where the CPU is the device: what is freed is kept.

XLA's CPU client allocates a program's temporary memory anew at every call. By default glibc gives so large a block
back to the kernel when it is freed, and the next step pays for a page fault on each of its pages, and for zeroing
them: about a seventh of a step of benchmarks/step.py (docs/LOG.md).
"""

import ctypes
from pathlib import Path

import jax

# Of <malloc.h>: mallopt's parameters. Its trim threshold is -1 for "never".
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
# What a machine with a GPU or TPU has there.
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel[0-9]*", "vfio/[0-9]*")
DEVICES = Path("/dev")


def keep_freed() -> bool:
    """Makes this process keep what it frees; returns whether it does.

    It does if the CPU is its device. To be called before JAX starts its threads: they share one arena then, the only
    one that may be of any size. Where there is an accelerator, or a C library other than glibc, nothing is changed.
    """
    if not cpu_is_device():
        return False
    try:
        libc = ctypes.CDLL(None)
        return all(libc.mallopt(*what) for what in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))
    except (OSError, AttributeError):  # no C library by this name, or not glibc
        return False


def cpu_is_device() -> bool:
    """Whether JAX will compute on the CPU, without starting it: by its config, else by what the machine has."""
    if chosen := jax.config.jax_platforms:  # type: ignore[attr-defined]
        return chosen.split(",")[0] == "cpu"
    return not any(path for pattern in ACCELERATORS for path in DEVICES.glob(pattern))
