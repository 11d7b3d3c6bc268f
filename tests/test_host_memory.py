"""Freed memory is kept where the CPU is the device, in huge pages: seen from a process of its own."""

import resource
import subprocess
import sys
from pathlib import Path

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

HUGE = """
import re
from lrt_jax.setup import host_memory
host_memory.keep_freed()
import jax, jax.numpy as jnp
jax.jit(lambda x: x + 1)(jnp.ones((4096, 4096))).block_until_ready()  # 64 MB each
areas = re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read())
print(sum(int(re.search(r"AnonHugePages: +(\\d+)", area)[1]) for area in areas if " hg" in area.split("VmFlags")[1]))
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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a page's size is asked of Linux")
def test_arrays_lie_in_huge_pages():
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[never]" in enabled.read_text() or not host_memory._addresses_are_free():
        pytest.skip("this machine gives nobody huge pages")
    done = subprocess.run([sys.executable, "-c", HUGE], check=True, capture_output=True, text=True)
    assert int(done.stdout) > 100 * 1024  # KB


def test_addresses_are_left_alone_where_they_cost_something(monkeypatch, tmp_path):
    monkeypatch.setattr(host_memory, "OVERCOMMIT", tmp_path / "overcommit_memory")
    assert not host_memory._addresses_are_free()
    host_memory.OVERCOMMIT.write_text("2\n")
    assert not host_memory._addresses_are_free()
    host_memory.OVERCOMMIT.write_text("0\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert host_memory._addresses_are_free()
    monkeypatch.setenv("MALLOC_PERTURB_", "165")
    assert not host_memory._addresses_are_free()
    monkeypatch.delenv("MALLOC_PERTURB_")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**34, 2**34))
    assert not host_memory._addresses_are_free()


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
