"""Muon's orthogonalization of all matrices; on a mesh, whole matrices on different devices.

Newton-Schulz iterations multiply a matrix with itself. Where ``fsdp`` has a shard of each, XLA's partitioner gathers
operands again in every iteration, and every ``data`` group does the same work. Here each device receives whole
matrices, a share of all there are, works alone, and sends back what belongs elsewhere.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh

from lrt_jax.model.parameters import Parameter
from lrt_jax.setup import mesh as meshes

Matrices = dict[str, jax.Array]


def orthogonalizer(table: Mapping[str, Parameter], mesh: Mesh | None = None) -> Callable[[Matrices], Matrices]:
    """The function that takes matrices of the table by name, and makes each an (almost) orthogonal one.

    Singular values go to about 1, by optax's Newton-Schulz iterations in the dtype of the matrix. All axes of a
    parameter but inputs and outputs hold different matrices.

    Args:
      table: the parameter table.
      mesh: that the matrices are stored on. Matrices are moved only where it shards nothing but rows and parameters;
        with ``tensor`` or ``sequence``, the partitioner decides.
    """
    if mesh is None or not meshes.shards_rows_only(mesh.shape):
        return lambda matrices: {
            name: _newton_schulz(_stack(array, table[name])).reshape(array.shape) for name, array in matrices.items()
        }

    def orthogonalize(matrices: Matrices) -> Matrices:
        stored = {name: nn.logical_to_mesh_axes(table[name].axes, meshes.RULES) for name in matrices}
        shards = {name: "fsdp" in spec and mesh.shape["fsdp"] > 1 for name, spec in stored.items()}
        function = lambda own: _of_shards(own, table, shards, mesh)  # noqa: E731
        return jax.shard_map(function, mesh=mesh, in_specs=(stored,), out_specs=stored, check_vma=False)(matrices)

    return orthogonalize


def _newton_schulz(stack_UxMxN: jax.Array) -> jax.Array:
    """U matrices, each made orthogonal: optax's Muon without momentum."""
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    muon = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=numbers)
    return muon.update(stack_UxMxN, muon.init(stack_UxMxN))[0]


def _stack(array: jax.Array, spec: Parameter) -> jax.Array:
    """A parameter, or a shard of it, as [U, inputs, outputs]; its axes lie in this order."""
    layers = int(spec.axes[0] == "layers")
    first_output = layers + len(spec.inputs)
    assert spec.inputs == tuple(range(layers, first_output)), spec
    shape = array.shape
    return array.reshape(math.prod(shape[:layers]), math.prod(shape[layers:first_output]), -1)


def _of_shards(own: Matrices, table: Mapping[str, Parameter], shards: Mapping[str, bool], mesh: Mesh) -> Matrices:
    """The same on one device of the mesh: of its shards, which it gets back as they came."""
    stacks, turned = {}, {}
    for name, array in own.items():
        stack = _stack(array, table[name])
        # The transpose of a matrix is made orthogonal with it: the axis that is sharded comes first, else the shorter.
        _, inputs, outputs = stack.shape
        turned[name] = table[name].axes.index("embed") not in table[name].inputs if shards[name] else inputs > outputs
        stacks[name] = stack.swapaxes(1, 2) if turned[name] else stack
    alike: dict[Any, list[str]] = {}
    for name, stack in stacks.items():
        alike.setdefault((stack.shape[1:], shards[name], stack.dtype), []).append(name)
    done: Matrices = {}
    for (_, sharded, _), names in alike.items():
        joined = _shared_out(jnp.concatenate([stacks[name] for name in names]), sharded, mesh)
        ends = [sum(stacks[name].shape[0] for name in names[: i + 1]) for i in range(len(names) - 1)]
        for name, stack in zip(names, jnp.split(joined, ends), strict=True):
            done[name] = (stack.swapaxes(1, 2) if turned[name] else stack).reshape(own[name].shape)
    return done


def _shared_out(stack_UxMxN: jax.Array, sharded: bool, mesh: Mesh) -> jax.Array:
    """U matrices of one shape made orthogonal, each by one device of ``fsdp`` and of some neighbours on ``data``.

    Args:
      stack_UxMxN: all of them; where they are ``sharded``, M is this device's part of the first axis.
      sharded: over ``fsdp``; else every device has all of them whole.
      mesh: of the devices.
    """
    units, ways = stack_UxMxN.shape[0], mesh.shape["fsdp"] if sharded else 1
    parts = _parts(-(-units // ways), mesh)
    each = -(-units // (ways * parts))
    padded = jnp.pad(stack_UxMxN, ((0, each * ways * parts - units), (0, 0), (0, 0)))
    mine = lax.axis_index("data") % parts
    some = lax.dynamic_slice_in_dim(padded, mine * each * ways, each * ways)
    if sharded:
        some = _exchanged(some, split=0, join=1)
    some = _newton_schulz(some)
    if sharded:
        some = _exchanged(some, split=1, join=0)
    if parts > 1:
        groups = [list(range(first, first + parts)) for first in range(0, mesh.shape["data"], parts)]
        some = lax.all_gather(some, "data", axis_index_groups=groups, tiled=True)
    return some[:units]


def _exchanged(stack: jax.Array, split: int, join: int) -> jax.Array:
    # Without a barrier XLA's CPU backend exchanges what was joined before, each in a layout of its own, and then
    # refuses what it made.
    return lax.all_to_all(lax.optimization_barrier(stack), "fsdp", split_axis=split, concat_axis=join, tiled=True)


def _parts(wanted: int, mesh: Mesh) -> int:
    """How many neighbours on ``data`` share the work: enough for ``wanted``, all of one slice, and groups alike."""
    within = meshes.data_ways_of_a_slice(mesh)
    return next(parts for parts in range(1, within + 1) if within % parts == 0 and parts >= min(wanted, within))
