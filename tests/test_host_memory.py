"""Freed memory is kept where the CPU is the device: seen from a process of its own."""

import subprocess
import sys

import jax
import pytest

from lrt_jax.setup import host_memory

FAULTS = """
import resource, sys
from lrt_jax.setup import host_memory
if sys.argv[1] == "keep" and not host_memory.keep_freed():
    sys.exit("not kept")
import jax, jax.numpy as jnp
x = jnp.ones((3072, 64))
step = jax.jit(lambda x: (x @ x.T) @ x)  # 38 MB of temporary memory: past any threshold that glibc would find itself
def eight():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(eight() for _ in range(8)))
"""


def faults(how: str) -> int:
    """Page faults of eight steps, the fewest of eight times: on busy cores the heap grows late."""
    command = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is what is told")
def test_a_step_asks_the_kernel_for_no_memory_again():
    pages = 8 * 4 * 3072 * 3072 // 4096  # of eight steps
    assert faults("give back") > 0.8 * pages  # or there is nothing to keep
    assert faults("keep") < 0.1 * pages


@pytest.mark.parametrize(
    ("platforms", "found", "expected"),
    [
        ("cpu", "nvidia0", True),
        ("cuda,cpu", "", False),
        (None, "nvidia0", False),
        (None, "vfio/0", False),
        (None, "", True),
    ],
)
def test_an_accelerator_leaves_the_host_alone(monkeypatch, tmp_path, platforms, found, expected):
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # is there without a TPU, too
    if found:
        (tmp_path / found).touch()
    monkeypatch.setattr(host_memory, "DEVICES", tmp_path)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert host_memory.cpu_is_device() == expected
    finally:
        jax.config.update("jax_platforms", before)
