"""Memory of the host, where the CPU is the device: freed memory is kept, and lies in huge pages.

XLA's CPU client allocates a program's temporary memory anew at every call. By default glibc gives so large a block
back to the kernel when it is freed, and the next step pays for a page fault on each of its pages, and for zeroing
them: about a seventh of a step of benchmarks/step.py. Pages of 2 MB instead of 4 KB, which the kernel hands out where
it is asked to, spare the processor most of its walks through page tables: 2 to 5 % of a step (docs/LOG.md).
"""

import ctypes
import os
from pathlib import Path

import jax

# Of <malloc.h>: mallopt's parameters. Its trim threshold is -1 for "never".
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
# Of <sys/mman.h>.
MADV_HUGEPAGE = 14
# Whether the kernel promises more memory than there is.
OVERCOMMIT, NEVER = Path("/proc/sys/vm/overcommit_memory"), "2"
# What a machine with a GPU or TPU has there.
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel[0-9]*", "vfio/[0-9]*")
DEVICES = Path("/dev")


def keep_freed() -> bool:
    """Makes this process keep what it frees, in huge pages where it can; returns whether it keeps.

    It does if the CPU is its device. To be called before JAX starts its threads: they share one arena then, the only
    one that may be of any size. Where there is an accelerator, or a C library other than glibc, nothing is changed.
    """
    if not cpu_is_device():
        return False
    try:
        libc = ctypes.CDLL(None)
        kept = all(libc.mallopt(*what) for what in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)))
    except (OSError, AttributeError):  # no C library by this name, or not glibc
        return False
    if kept and _addresses_are_free():
        _want_huge_pages(libc)
    return kept


def _addresses_are_free() -> bool:
    """Whether allocating costs nothing until it is used: no limit counts it, and no debugging option fills it."""
    try:
        import resource  # not on Windows
    except ImportError:
        return False
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    filled = os.environ.get("MALLOC_PERTURB_") or "perturb" in os.environ.get("GLIBC_TUNABLES", "")
    counted = not OVERCOMMIT.exists() or OVERCOMMIT.read_text().strip() == NEVER
    return not filled and not counted and all(limit == resource.RLIM_INFINITY for limit in limits)


def _want_huge_pages(libc: ctypes.CDLL) -> None:
    """Grows the heap by half of the machine's memory, in addresses alone, and asks for huge pages there.

    Freed memory is kept by now, so all that is allocated from here on lies there, as long as there is room. Where the
    kernel does not allow so much, or has no huge pages, nothing changes.
    """
    libc.malloc.restype = ctypes.c_void_p
    page, size = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if start := libc.malloc(ctypes.c_size_t(size)):
        first = -(-start // page) * page
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(start + size - first), MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(start))


def cpu_is_device() -> bool:
    """Whether JAX will compute on the CPU, without starting it: by its config, else by what the machine has."""
    if chosen := jax.config.jax_platforms:  # type: ignore[attr-defined]
        return chosen.split(",")[0] == "cpu"
    return not any(path for pattern in ACCELERATORS for path in DEVICES.glob(pattern))
