"""Settings of JAX for every test, and tiny models with no parameter left at a neutral value."""

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Compiling takes nearly all the time here, and the programs are tiny: so it is done once, for all workers and for the
# processes that tests start (they inherit this), and with as little optimization as XLA can do.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/lrt-jax-tests-{os.getpid()}")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")  # else programs are bound to its path
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# jaxlib 0.11 has one way to emit fusions, and ends a process that names the choice.
os.environ.setdefault(
    "XLA_FLAGS",
    ("--xla_cpu_use_fusion_emitters=false " if version("jaxlib").startswith("0.10.") else "")
    + "--xla_cpu_parallel_codegen_split_count=1",
)

import jax
import numpy as np
import pytest

from lrt_jax.model.parameters import table
from lrt_jax.setup.config import ModelConfig

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure():
    """Removes the compiled programs, once all workers are done: they have inherited the first process's place."""
    place = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    if place.name == f"lrt-jax-tests-{os.getpid()}":
        shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., ModelConfig]:
    """Makes the config of a tiny model: L 2, D 16, H 4, K 2, T 8, V 40."""

    def make(**changes: Any) -> ModelConfig:
        fields = {
            "layers": 2,
            "width": 16,
            "heads": 4,
            "kv_heads": 2,
            "sequence_length": 8,
            "vocab_size": 40,
            "dtype": "float32",
        }
        return ModelConfig(**(fields | changes))

    return make


@pytest.fixture(scope="session")
def random_params() -> Callable[..., dict[str, np.ndarray]]:
    """Draws every parameter at random, those that start at zero too: else output, mlp_out and gates would hide bugs."""

    def draw(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
        params = {}
        for index, (name, spec) in enumerate(sorted(table(config).items())):
            values = 0.3 * np.random.default_rng([seed, index]).normal(size=spec.shape)
            values += float(name == "alpha")
            params[name] = values.astype("float64" if config.dtype == "float64" else "float32")
        return params

    return draw


@pytest.fixture(scope="session")
def random_batch() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Draws inputs and targets, [rows, T] each."""

    def draw(config: ModelConfig, rows: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        shape = (rows, config.sequence_length + 1)
        tokens = np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int32)
        return tokens[:, :-1], tokens[:, 1:]

    return draw


# Files that compile much or start processes: ``make check`` leaves them out.
SLOW = {
    "test_attention",
    "test_causality",
    "test_costs",
    "test_decoding",
    "test_equalities",
    "test_generate",
    "test_gpu_programs",
    "test_host_memory",
    "test_main",
    "test_meshes",
    "test_notebooks",
    "test_orthogonalization",
    "test_parity",
    "test_processes",
    "test_programs",
    "test_recomputed",
    "test_replicas",
    "test_report",
    "test_report_pages",
    "test_schedules",
    "test_topology",
    "test_watchdog",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is slow."""
    for item in items:
        if item.path.stem in SLOW or item.path.parent.name == "faults":
            item.add_marker("slow")
