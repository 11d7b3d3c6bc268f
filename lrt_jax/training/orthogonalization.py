"""Muon's orthogonalization of all matrices; on a mesh, whole matrices on different devices.

Newton-Schulz iterations multiply a matrix with itself. Where ``fsdp`` has a shard of each, XLA's partitioner gathers
its operands, and every ``data`` group does the same work. Here a device receives some of the matrices, whole, works
alone, and sends back what belongs elsewhere ("layer sharding", Essential AI, https://essential.ai/blog/muon-layer-sharding;
here over both axes, and over parameters of one shape together). Where there are more devices than matrices, groups of
neighbours on ``data`` do the same work, and so do slices: then nothing has to cross from one to the other.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh

from lrt_jax.model.parameters import Parameter
from lrt_jax.setup import mesh as meshes

Matrices = dict[str, jax.Array]
ITERATIONS = 5  # optax's default


@dataclasses.dataclass(frozen=True)
class Kind:
    """Matrices that are treated alike: of one shape, or its transpose, and stored alike.

    Attributes:
      shape: (M, N). The axis that ``fsdp`` shards comes first; where there is none, the shorter one.
      sharded: whether ``fsdp`` shards the first axis; else every device has all of it.
    """

    shape: tuple[int, int]
    sharded: bool

    @property
    def flops(self) -> float:
        """Of orthogonalizing one: X Xᵀ, its square, and their sum times X, on the shorter side, in each iteration."""
        short, long = sorted(self.shape)
        return ITERATIONS * (4 * short**2 * long + 2 * short**3)


@dataclasses.dataclass(frozen=True)
class Share:
    """How many matrices of a kind a device works on: every one of ``each × ways × parts`` has its place.

    Attributes:
      each: matrices of a device.
      ways: devices of ``fsdp`` that share them.
      parts: neighbours on ``data`` that share them.
    """

    each: int
    ways: int
    parts: int


def orthogonalizer(table: Mapping[str, Parameter], mesh: Mesh | None = None) -> Callable[[Matrices], Matrices]:
    """The function that takes matrices of the table by name, and makes each an (almost) orthogonal one.

    Singular values go to about 1, by optax's Newton-Schulz iterations in the dtype of the matrix. All axes of a
    parameter but inputs and outputs hold different matrices.

    Matrices are moved only where the mesh that they are stored on shards nothing but rows and parameters; with
    ``tensor`` or ``sequence``, the partitioner decides.
    """
    if mesh is None or not meshes.shards_rows_only(mesh.shape):
        return lambda matrices: {
            name: _newton_schulz(_stack(array, table[name])).reshape(array.shape) for name, array in matrices.items()
        }

    def orthogonalize(matrices: Matrices) -> Matrices:
        stored = {name: nn.logical_to_mesh_axes(table[name].axes, meshes.RULES) for name in matrices}
        function = lambda own: _of_shards(own, table, mesh)  # noqa: E731
        return jax.shard_map(function, mesh=mesh, in_specs=(stored,), out_specs=stored, check_vma=False)(matrices)

    return orthogonalize


def shares(
    table: Mapping[str, Parameter], names: Iterable[str], data: int, fsdp: int
) -> dict[Kind, tuple[list[str], Share]]:
    """Which of the named matrices of the table are of each kind, and how devices share them.

    ``data`` is the part of that axis that lies within a slice; ``fsdp`` is the size of that one.
    """
    alike: dict[Kind, list[str]] = {}
    for name in names:
        alike.setdefault(_kind(table[name], fsdp)[0], []).append(name)
    found = {}
    for kind, members in alike.items():
        count, ways = sum(table[name].matrices[0] for name in members), fsdp if kind.sharded else 1
        # As many neighbours as have something to do, in groups alike.
        wanted = min(-(-count // ways), data)
        parts = next(parts for parts in range(wanted, data + 1) if data % parts == 0)
        found[kind] = members, Share(-(-count // (ways * parts)), ways, parts)
    return found


def _kind(parameter: Parameter, fsdp: int) -> tuple[Kind, bool]:
    """What a parameter holds, and whether transposed."""
    _, inputs, outputs = parameter.matrices
    dimension = meshes.sharded_dimension(parameter.axes, {"fsdp": fsdp})
    turned = inputs > outputs if dimension is None else dimension not in parameter.inputs
    return Kind((outputs, inputs) if turned else (inputs, outputs), dimension is not None), turned


def _newton_schulz(stack_UxMxN: jax.Array) -> jax.Array:
    """U matrices, each made orthogonal: optax's Muon without momentum."""
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    muon = optax.contrib.scale_by_muon(ns_steps=ITERATIONS, beta=0.0, nesterov=False, weight_dimension_numbers=numbers)
    return muon.update(stack_UxMxN, muon.init(stack_UxMxN))[0]


def _stack(array: jax.Array, spec: Parameter) -> jax.Array:
    """A parameter, or a shard of it, as [U, inputs, outputs]; its axes lie in this order."""
    first, last = spec.inputs[0], spec.inputs[-1]
    assert spec.inputs == tuple(range(first, last + 1)) and first == int(spec.axes[0] == "layers"), spec
    return array.reshape(spec.matrices[0], math.prod(array.shape[first : last + 1]), -1)


def _of_shards(own: Matrices, table: Mapping[str, Parameter], mesh: Mesh) -> Matrices:
    """The same on one device of the mesh: of its shards, which it gets back as they came."""
    fsdp, done = mesh.shape["fsdp"], {}
    for names, share in shares(table, own, meshes.data_ways_of_a_slice(mesh), fsdp).values():
        stacks, turned = {}, {}
        for name in names:
            stack, turned[name] = _stack(own[name], table[name]), _kind(table[name], fsdp)[1]
            # The transpose of a matrix is made orthogonal with it.
            stacks[name] = stack.swapaxes(1, 2) if turned[name] else stack
        joined = _shared_out(jnp.concatenate(list(stacks.values())), share, mesh)
        ends = list(itertools.accumulate(len(stack) for stack in stacks.values()))[:-1]
        for name, stack in zip(names, jnp.split(joined, ends), strict=True):
            done[name] = (stack.swapaxes(1, 2) if turned[name] else stack).reshape(own[name].shape)
    return done


def _shared_out(stack_UxMxN: jax.Array, share: Share, mesh: Mesh) -> jax.Array:
    """U matrices of one kind made orthogonal, each by one device; M is this device's part of the first axis."""
    units, here = stack_UxMxN.shape[0], share.each * share.ways
    padded = jnp.pad(stack_UxMxN, ((0, here * share.parts - units), (0, 0), (0, 0)))
    some = lax.dynamic_slice_in_dim(padded, lax.axis_index("data") % share.parts * here, here)
    if share.ways > 1:
        some = _exchanged(some, split=0, join=1)
    some = _newton_schulz(some)
    if share.ways > 1:
        some = _exchanged(some, split=1, join=0)
    if share.parts > 1:
        data = mesh.shape["data"]
        groups = [list(range(first, first + share.parts)) for first in range(0, data, share.parts)]
        some = lax.all_gather(some, "data", axis_index_groups=groups, tiled=True)
    return some[:units]


def _exchanged(stack: jax.Array, split: int, join: int) -> jax.Array:
    # Without a barrier XLA's CPU backend exchanges what was joined before, each in a layout of its own, and then
    # refuses what it made.
    return lax.all_to_all(lax.optimization_barrier(stack), "fsdp", split_axis=split, concat_axis=join, tiled=True)
