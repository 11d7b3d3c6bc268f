"""The real programs of a run, compiled for devices that are not there: the train step, a decode step, evaluation."""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lrt_jax.evaluation import accuracy, bits_per_byte, health
from lrt_jax.inference import decode
from lrt_jax.model import backend, costs
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.model.parameters import table
from lrt_jax.model.weights import axes_by_layer, by_name
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config
from lrt_jax.setup.durations import train_steps
from lrt_jax.topology.chips import TopologyError
from lrt_jax.training import guard, optimizer, state, step

PROGRAMS = ("train", "decode", "evaluate")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one program on one device.

    Attributes:
      name: of the program.
      seconds: that compiling took.
      peak: bytes of memory at its fullest; what it would need, where it does not fit.
      arguments: bytes of what it is given: parameters, optimizer state, batch.
      fits: whether there is a program at all.
    """

    name: str
    seconds: float
    peak: float
    arguments: float
    fits: bool


def devices(topology: str, slices: int = 1) -> list[Any]:
    """Devices of a TPU topology to compile for, on any machine with libtpu.

    Raises:
      TopologyError: libtpu is missing, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError("compiling for a TPU needs its compiler: pip install 'lrt-jax[aot]' (or libtpu)")
    # This machine is no TPU VM: there is nobody to ask, and no chip that only one process may have.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TopologyError(
            f"--topology is {topology!r} with --slices={slices}, which libtpu refuses ({reason})"
        ) from None
    return list(found.devices)


def compile_all(config: Config, mesh: Mesh, names: tuple[str, ...] = PROGRAMS) -> list[Compiled]:
    """Compiles the programs of a run, one after the other.

    Raises:
      ConfigError: the mesh does not divide what it shards.
    """
    meshes.check(config, mesh.shape)
    makers = {"train": train_steps_of, "decode": _decode, "evaluate": _evaluate}
    with backend.compiling_for(mesh.devices.flat[0]):
        return [_compiled(label, *program) for name in names for label, *program in makers[name](config, mesh)]


def _compiled(name: str, function: Any, arguments: tuple[Any, ...]) -> Compiled:
    began = time.perf_counter()
    lowered = function.lower(*arguments)
    held = sum(_bytes_here(leaf) for leaf in jax.tree.leaves(arguments))
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        wanted = _wanted(str(error))
        if wanted is None:
            raise
        return Compiled(name, time.perf_counter() - began, wanted, held, fits=False)
    return Compiled(name, time.perf_counter() - began, memory.peak_memory_in_bytes, held, fits=True)


def _wanted(message: str) -> float | None:
    """Bytes that a program would have needed, from the compiler's words; None if they are not about memory."""
    if "RESOURCE_EXHAUSTED" not in message and "HbmOom" not in message:
        return None
    # Compilers differ; where just temporary memory is named, it is the least that is needed.
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of|required [^(]*\(([\d.]+)([KMGT]?)\)", message)
    if found is None:
        return math.nan
    number, unit = (part for part in found.groups() if part is not None)
    return float(number) * 2 ** (10 * " KMGT".index(unit or " "))


def _bytes_here(leaf: Any) -> float:
    """Bytes of an array's share on one device."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.batch_sharding(mesh))


def train_steps_of(config: Config, mesh: Mesh) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """The training step of each schedule of a run: its label, the jitted function, and abstract arguments."""
    decoder = Decoder(config.model, mesh)
    length = config.model.sequence_length
    steps = train_steps(config.train, length, costs.count_parameters(config.model).total)
    transformation = optimizer.build(config.optimizer, table(config.model), steps, mesh)
    whole = state.abstract(decoder, transformation, mesh)
    batch = (_rows(mesh, (config.train.batch_size, length)),) * 2
    kinds = config.schedule.kinds
    for schedule in kinds:
        judge, once = functools.partial(guard.judge, config=config.train), meshes.gathers_once(config.mesh, mesh.shape)
        function = step.build(decoder, schedule, transformation, config.train.accumulation, judge, gather_once=once)
        label = "train step" if len(kinds) == 1 else f"train step, {schedule.label}"
        yield label, function, (whole, *batch)


def _decode(config: Config, mesh: Mesh) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """A step of decoding, one row for each device that holds rows of its own, with room for T tokens."""
    rows = meshes.whole_rows(mesh, 1)

    def spread(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp") if leaf.shape[:1] == (rows,) else None))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    before = jax.eval_shape(lambda: decode.start(config.model, rows, config.model.sequence_length))
    function = jax.jit(decode.step, donate_argnums=1)
    tokens_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
    yield "decode step", function, (_prepared(config, mesh), jax.tree.map(spread, before), spread(tokens_B))


def _prepared(config: Config, mesh: Mesh) -> Model:
    """The abstract model as ``Model.for_decoding`` leaves it: by layer, matrices in the dtype of activations."""
    params = state.abstract_params(Decoder(config.model), mesh)
    shapes = jax.eval_shape(Model.for_decoding, Model(Decoder(config.model, mesh), params))
    axes = axes_by_layer(config.model)

    def placed(name: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=meshes.sharding_of(mesh, *axes[name]))

    return shapes.replace(params=by_name(placed, shapes.params))


def _evaluate(config: Config, mesh: Mesh) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    decoder = Decoder(config.model, mesh)
    shape = (meshes.whole_rows(mesh, config.eval.batch_size), config.model.sequence_length)
    batch = (_rows(mesh, shape), _rows(mesh, shape), _rows(mesh, shape, jnp.bool_))
    arguments = (Model(decoder, state.abstract_params(decoder, mesh)), *batch)
    if config.data.task:
        parallel, sequential = accuracy.programs(config, mesh)
        yield "parallel evaluation", parallel, arguments
        longer = (shape[0], meshes.whole_columns(mesh, accuracy.longest_of(config)))
        words = (_rows(mesh, longer), _rows(mesh, longer), _rows(mesh, longer, jnp.bool_))
        yield "sequential evaluation", sequential, (arguments[0], *words)
        return
    parallel, sequential = bits_per_byte.programs(config, mesh)
    yield "parallel evaluation", parallel, arguments
    yield "sequential evaluation", sequential, arguments
    measured = health.program(config, mesh)
    if measured is not None:
        yield "health of the recurrence", measured, arguments
