"""The device mesh, the rules from logical to mesh axes, and the shardings of state and batches."""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lrt_jax.setup.config import Config, ConfigError, MeshConfig

# Logical axis → mesh axis, of parameters and activations. Axes not named here are replicated; where two axes of one
# array want the same mesh axis, the first has it.
RULES: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp")),
    ("looked_up", "data"),  # rows, where fsdp has the columns of what is looked up
    ("sequence", "sequence"),
    ("embed", "fsdp"),
    ("value", "fsdp"),  # the last axis of a value embedding: its vocabulary and heads are taken by tensor
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
)
AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that ``config`` describes, over ``devices`` (default: all of them), neighbours on inner axes.

    With several slices the ``data`` axis goes over them, outermost: only it crosses their slow network. Devices that
    are no TPUs lie in one, host after host: any axis may go over hosts.

    Raises:
      ConfigError: the axes' sizes do not multiply to the number of devices, or the slices are not those found.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = resolve(config, len(devices))
    found = slices_of(devices)
    if found != config.slices and devices[0].platform == "tpu":
        raise ConfigError(f"config.mesh.slices is {config.slices}; the devices found lie in {found}")
    shape = tuple(sizes.values())
    if found == 1:  # also where slices are only imagined: virtual devices lie in order
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within = (shape[0] // found, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(within, (found, 1, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def resolve(config: MeshConfig, devices: int) -> dict[str, int]:
    """The size of each mesh axis on so many devices.

    Raises:
      ConfigError: the axes' sizes do not multiply to the number of devices, or the slices do not divide ``data``.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    rest = [axis for axis, size in sizes.items() if size == -1]
    if devices % fixed or (not rest and fixed != devices):
        raise ConfigError(
            f"config.mesh is {sizes}, which needs {'a multiple of ' if rest else ''}{fixed} devices; {devices} found"
        )
    for axis in rest:
        sizes[axis] = devices // fixed
    if sizes["data"] % config.slices:
        raise ConfigError(
            f"config.mesh.slices is {config.slices}, which does not divide the data axis of {sizes['data']}: only the "
            "data axis goes over slices"
        )
    return sizes


def gathers_once(config: MeshConfig, sizes: Mapping[str, int]) -> bool:
    """Whether a training step gathers weights, and sums gradients, once, on a mesh of these sizes; else each forward.

    ``auto`` does where it can: where a mesh shards just rows and parameters.

    Raises:
      ConfigError: ``config.mesh.gather`` asks for it where it cannot.
    """
    others = [axis for axis in ("tensor", "sequence") if sizes[axis] > 1]
    if config.gather == "step" and others:
        raise ConfigError(
            f'config.mesh.gather is "step", which needs {" and ".join(others)} to be 1, not '
            f"{' and '.join(str(sizes[axis]) for axis in others)}; allowed there: auto, forward"
        )
    return config.gather != "forward" and shards_rows_only(sizes)


def shards_rows_only(sizes: Mapping[str, int]) -> bool:
    """Whether a mesh of these sizes has several devices, and shards nothing but rows and parameters over them."""
    return sizes["data"] * sizes["fsdp"] > 1 and sizes["tensor"] == sizes["sequence"] == 1


def slices_of(devices: Iterable[jax.Device]) -> int:
    """The number of TPU slices that the devices lie in; 1 for others, where XLA calls each host of GPUs a slice."""
    return len({getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices})


def data_ways_of_a_slice(mesh: Mesh) -> int:
    """The part of the ``data`` axis that lies within one slice: neighbours on it, from any multiple of it on."""
    return mesh.shape["data"] // slices_of(mesh.devices.flat)


def check(config: Config, sizes: Mapping[str, int]) -> None:
    """Checks that the mesh axes, of these sizes, divide what they shard, and allow ``config.mesh.gather``.

    Raises:
      ConfigError: naming the mesh axis and the field that it does not divide, or allow.
    """
    gathers_once(config.mesh, sizes)
    model, train = config.model, config.train
    checks: list[tuple[tuple[str, ...], str, int]] = [
        (("data", "fsdp"), "train.batch_size / train.accumulation", train.batch_size // train.accumulation),
        (("fsdp",), "model.width", model.width),
        (("tensor",), "model.heads", model.heads),
        (("tensor",), "model.kv_heads", model.kv_heads),
        (("tensor",), "model.mlp_width", model.mlp_width),
        (("tensor",), "model.vocab_size", model.vocab_size),
        (("sequence",), "model.sequence_length", model.sequence_length),
    ]
    if model.value_embedding_layers:
        checks.append((("fsdp",), "model.head_width (of the value embeddings)", model.head_width))
    for schedule in config.schedule.kinds:
        if schedule.description.divides:
            field = schedule.description.number
            positions = f"P = model.sequence_length / schedule.{field}"
            checks.append((("sequence",), positions, model.sequence_length // getattr(schedule, field)))
    for axes, field, size in checks:
        ways = math.prod(sizes[axis] for axis in axes)
        if size % ways:
            raise ConfigError(f"config.mesh: {' × '.join(axes)} = {ways} does not divide config.{field} = {size}")


def constrain(mesh: Mesh | None, array: jax.Array, *axes: str | None) -> jax.Array:
    """``array`` sharded by its logical axes, one for each dimension.

    Without constraints the compiler may choose to replicate activations (docs/SCALING.md). A dimension that
    the mesh does not divide, as in decoding of a few rows, is left to it.
    """
    if mesh is None or mesh.size == 1:
        return array
    spec = nn.logical_to_mesh_axes(axes, RULES)
    fitting = (
        names if size % _ways(mesh, names) == 0 else PartitionSpec.UNCONSTRAINED
        for names, size in zip(spec, array.shape, strict=True)
    )
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*fitting)))


def _ways(mesh: Mesh, names: str | tuple[str, ...] | None) -> int:
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(mesh.shape[name] for name in names)


def shardings_of(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings of an abstract tree whose leaves carry logical axis names; replicated where they do not."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)


def sharded_dimension(axes: Sequence[str | None], sizes: Mapping[str, int]) -> int | None:
    """The dimension that ``fsdp`` shards of an array with these logical axes, on a mesh of these sizes, if any."""
    spec = nn.logical_to_mesh_axes(tuple(axes), RULES)
    return spec.index("fsdp") if "fsdp" in spec and sizes["fsdp"] > 1 else None


def sharding_of(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array whose dimensions have these logical axes."""
    return NamedSharding(mesh, nn.logical_to_mesh_axes(axes, RULES))


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


def whole_rows(mesh: Mesh, rows: int) -> int:
    """The smallest number from ``rows`` on that the devices share evenly."""
    ways = _ways(mesh, ("data", "fsdp"))
    return -(-rows // ways) * ways


def whole_columns(mesh: Mesh, columns: int) -> int:
    """The smallest number from ``columns`` on that the devices along ``sequence`` share evenly."""
    return -(-columns // mesh.shape["sequence"]) * mesh.shape["sequence"]


def global_batch(mesh: Mesh, local: Any, rows: int | None = None) -> Any:
    """A tree of this process's rows, arrays [n, T, ...] of the n that :func:`local_rows` names, as global arrays.

    The whole batch has ``rows`` rows; None: all of them are here.
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
    """Keeps compiled programs in the work dir, for a fast resumed start; or where JAX was told to keep them."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compilation_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
