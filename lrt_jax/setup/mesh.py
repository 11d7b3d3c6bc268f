"""The device mesh, the rules from logical to mesh axes, and the shardings of state and batches."""

import bisect
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lrt_jax.setup.config import Config, ConfigError, MeshConfig

# Logical axis → mesh axis. Axes not named here are replicated.
RULES = (
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh that ``config`` describes, over ``devices`` (default: all of them).

    Raises:
      ConfigError: the axes' sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(devices) % fixed or (not rest and fixed != len(devices)):
        raise ConfigError(
            f"config.mesh is {sizes}, which needs {'a multiple of ' if rest else ''}{fixed} devices; "
            f"{len(devices)} found"
        )
    for axis in rest:
        sizes[axis] = len(devices) // fixed
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def check_divisibility(config: Config, mesh: Mesh) -> None:
    """Checks that the mesh axes divide what they shard.

    Raises:
      ConfigError: naming the mesh axis and the field that it does not divide.
    """
    rows = config.train.batch_size // config.train.accumulation
    for axes, field, size in (
        (("data", "fsdp"), "train.batch_size / train.accumulation", rows),
        (("data", "fsdp"), "eval.batch_size", config.eval.batch_size),
        (("fsdp",), "model.width", config.model.width),
        (("tensor",), "model.kv_heads", config.model.kv_heads),
        (("tensor",), "model.vocab_size", config.model.vocab_size),
    ):
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            raise ConfigError(f"config.mesh: {' × '.join(axes)} = {ways} does not divide config.{field} = {size}")


def shardings_of(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings of an abstract tree whose leaves carry logical axis names; replicated where they do not."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the ``data`` and ``fsdp`` axes, positions over ``sequence``."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "sequence"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def local_rows(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """Which of a batch's ``rows`` this process's devices hold, ascending."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((rows, mesh.shape["sequence"])).values()
    return tuple(sorted({row for index in slices if index for row in range(*index[0].indices(rows))}))


def global_batch(mesh: Mesh, local: Any, rows: int | None = None) -> Any:
    """A tree of this process's rows as global arrays.

    Args:
      mesh: where they go.
      local: arrays [n, T, ...] of the n rows that :func:`local_rows` names.
      rows: of the whole batch; None: all of them are here.
    """
    sharding = batch_sharding(mesh)

    def whole(array: np.ndarray) -> jax.Array:
        count = len(array) if rows is None else rows
        here = local_rows(mesh, count) if len(array) < count else range(count)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            begin, end, _ = index[0].indices(count)
            first = bisect.bisect_left(here, begin)
            return array[(slice(first, first + end - begin), *index[1:])]

        return jax.make_array_from_callback((count, *array.shape[1:]), sharding, part)

    return jax.tree.map(whole, local)


def cache_compilations(workdir: Path) -> None:
    """Keeps compiled programs in the work dir, so that a resumed run starts fast."""
    jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compilation_cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
