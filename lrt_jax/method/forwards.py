"""The forwards that schedules are made of, and their losses: the initialization forward, and subset forwards."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrt_jax.method.partitions import Partition, Strided
from lrt_jax.model import buffer as buffers
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.buffer import Buffer
from lrt_jax.model.decoder import Forward
from lrt_jax.model.embedding import Embedded
from lrt_jax.model.memory import shift_right
from lrt_jax.model.model import Model

# With ``model.remat``: how many logits a device holds at once; 512 MB in float32.
LOGITS = 2**27


# (memory_BxPxD, positions_P, number of the forward) → the memory that it reads.
Disturbed = Callable[[jax.Array, Any, Any], jax.Array]


def token_losses(model: Model, hidden_BxPxD: jax.Array, targets_BxP: jax.Array) -> jax.Array:
    """Cross entropy of each target, in nats: [B, P], float32 or wider.

    V is many times D, so with ``model.remat`` logits are the first of all activations to be computed again, and, where
    one device has many, some positions at a time. Devices that compute together would exchange weights and gradients of
    the head each time.
    """
    if not model.config.remat:
        return model.losses(hidden_BxPxD, targets_BxP)
    count = -(-targets_BxP.size * model.config.vocab_size // LOGITS)
    if count == 1 or (model.mesh is not None and model.mesh.size > 1):
        return jax.checkpoint(model.losses)(hidden_BxPxD, targets_BxP)

    def cut(flat: jax.Array) -> jax.Array:
        """As ``count`` parts of one row each, the last one filled up."""
        size = -(-len(flat) // count)
        return jnp.pad(flat, [(0, count * size - len(flat)), *[(0, 0)] * (flat.ndim - 1)]).reshape(
            count, 1, size, *flat.shape[1:]
        )

    parts = cut(hidden_BxPxD.reshape(-1, hidden_BxPxD.shape[-1])), cut(targets_BxP.reshape(-1))
    losses_Nx1xn = lax.map(lambda part: jax.checkpoint(model.losses)(*part), parts)
    return losses_Nx1xn.reshape(-1)[: targets_BxP.size].reshape(targets_BxP.shape)


def begin(model: Model, tokens_BxT: jax.Array) -> Embedded:
    """All T tokens, looked up, with the layers computed that no forward's memory reaches: once for all of them."""
    (embedded,) = model.embed(tokens_BxT)
    return model.below(embedded)


def begin_subsets(
    model: Model, tokens_BxT: jax.Array, partition: Partition, *, unroll: bool, natural: bool = False
) -> list[Embedded]:
    """:func:`begin` for each subset; with ``natural`` before them that of all tokens in natural order.

    A device that has its rows to itself looks all tokens up once, and reorders what it found: half as many rows to
    collect from other devices' columns, and to add to tables. Where positions are sharded, ids are cheaper to reorder
    than what was looked up. What layers have computed is reordered in any case.
    """
    alone = model.mesh is None or model.mesh.size == 1
    computed = model.config.memory_range.start > 0
    if computed or alone:
        whole = begin(model, tokens_BxT)
        first = [whole] if natural else []
        slots = jax.tree.map(lambda leaf: partition.in_slots(leaf, _positions_axis(leaf)), whole)
    else:
        in_order = [tokens_BxT] if natural else []
        slots_BxT = partition.in_slots(tokens_BxT, 1)
        if unroll:
            return model.embed(*in_order, *jnp.split(slots_BxT, partition.subsets, axis=1))
        # A scan over subsets reads stacks: one lookup, however many subsets there are.
        *first, slots = model.embed(*in_order, slots_BxT)
    leaves, structure = jax.tree.flatten(slots)
    parts = [jnp.split(leaf, partition.subsets, axis=_positions_axis(leaf)) for leaf in leaves]
    return [*first, *(jax.tree.unflatten(structure, mine) for mine in zip(*parts, strict=True))]


def _positions_axis(leaf: jax.Array) -> int:
    """Where the positions are in a leaf of ``Embedded``: x⁰ and x are [B, P, D], value embeddings [(E,) B, P, K, C]."""
    return 1 if leaf.ndim == 3 else leaf.ndim - 3


def initialization(model: Model, embedded: Embedded, **options: Any) -> tuple[Forward, Model]:
    """The full forward with zero memory."""
    return full(model, embedded, None, **options)


def full(model: Model, embedded: Embedded, memory_BxTxD: jax.Array | None, **options: Any) -> tuple[Forward, Model]:
    """A forward over all T positions that sees just these."""
    positions_T = np.arange(embedded.x0_BxPxD.shape[1], dtype=np.int32)
    return model(embedded, positions_T[None], memory_BxTxD, subsets=1, **options)


def settled(model: Model, embedded: Embedded, count: int, *, states_only: bool) -> Forward:
    """The last of ``count`` full forwards in turn, all without gradient: memory near its fixed point.

    The first has zero memory; each other one reads the source states of the one before. Of all but the last, and with
    ``states_only`` of that, too, only the source states are computed.
    """
    model, embedded = lax.stop_gradient((model, embedded))

    def source_of(memory_BxTxD: jax.Array | None) -> jax.Array:
        return full(model, embedded, memory_BxTxD, states_only=True)[0].source_BxPxD

    memory_BxTxD = None
    if count > 1:
        again = lambda _, states_BxTxD: source_of(shift_right(states_BxTxD))  # noqa: E731
        memory_BxTxD = shift_right(lax.fori_loop(1, count - 1, again, source_of(None)))
    forward, _ = full(model, embedded, memory_BxTxD, states_only=states_only)
    return lax.stop_gradient(forward)


class Subset(NamedTuple):
    """What one subset forward computes; in a scan all have a leading S axis.

    Attributes:
      number: how many subset forwards were before it.
      embedded: its inputs.
      targets_BxP: int targets.
      positions_P: its positions, ascending.
      previous_slots_P: the slot of the position before each.
      slot: its own first slot.
    """

    number: Any
    embedded: Embedded
    targets_BxP: jax.Array
    positions_P: Any
    previous_slots_P: Any
    slot: Any


@dataclasses.dataclass(frozen=True)
class SubsetForward:
    """A forward over one subset, as :func:`in_turn` takes it: it reads and writes the shared buffer and source states.

    Attributes:
      partition: the subsets.
      refreshable: for KV refresh, in slot order; None: keys and values stay as they are until their turn.
      disturbed: what to do to the memory that it reads.
    """

    partition: Partition
    refreshable: Any
    disturbed: Disturbed | None

    def __call__(self, model: Model, carry: tuple[Buffer, jax.Array], subset: Subset) -> tuple[Model, Any, jax.Array]:
        """The model for the next one, the buffer and source states [B, T, D] in slot order, and losses [B, P]."""
        buffer, sources_BxTxD = carry
        if self.refreshable is not None:
            buffer = self._refreshed(model, buffer, sources_BxTxD, subset.slot)
        memory_BxPxD = _memory(sources_BxTxD, subset.positions_P, subset.previous_slots_P)
        if self.disturbed is not None:
            memory_BxPxD = self.disturbed(memory_BxPxD, subset.positions_P, subset.number)
        strided = self.partition.subsets if isinstance(self.partition, Strided) else None
        positions_1xP = subset.positions_P[None]
        out, model = model(subset.embedded, positions_1xP, memory_BxPxD, buffer, subset.slot, subsets=strided)
        sources_BxTxD = lax.dynamic_update_slice_in_dim(sources_BxTxD, out.source_BxPxD, subset.slot, axis=1)
        losses_BxP = token_losses(model, out.hidden_BxPxD, subset.targets_BxP)
        return model, (out.buffer, sources_BxTxD), losses_BxP

    def _refreshed(self, model: Model, buffer: Buffer, sources_BxTxD: jax.Array, slot: jax.Array) -> Buffer:
        """The buffer with keys and values refreshed at all slots that no subset has visited: ``slot`` and later."""
        positions_T = jnp.asarray(self.partition.positions_SxP).reshape(-1)
        memory_BxTxD = _memory(sources_BxTxD, positions_T, jnp.asarray(self.partition.previous_slots_SxP).reshape(-1))
        latest = model.refresh(self.refreshable, memory_BxTxD, positions_T[None])
        return buffer.refreshed(latest, jnp.arange(len(positions_T)) < slot)


def _memory(sources_BxTxD: jax.Array, positions_P: jax.Array, previous_slots_P: jax.Array) -> jax.Array:
    """m_{t-1}: the latest source state of the position before, 0 for the first."""
    latest_BxPxD = jnp.take(sources_BxTxD, previous_slots_P, axis=1)
    return jnp.where(positions_P[None, :, None] == 0, 0, latest_BxPxD)


def in_turn(
    forward: Callable[[Model, Any, Any], tuple[Model, Any, Any]],
    model: Model,
    carry: Any,
    each: list[Any],
    *,
    unroll: bool,
) -> tuple[Any, Any]:
    """``lax.scan`` of a forward over what each of several has of its own: the last carry and all outputs, stacked.

    ``forward`` takes model, carry and one of ``each``, and returns model, carry and output. Unrolled, what each has is
    known while tracing, and each reads the model that the one before handed on.
    """
    if not unroll:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        return lax.scan(lambda carry, one: forward(model, carry, one)[1:], carry, stacked)
    outputs = []
    for one in each:
        model, carry, output = forward(model, carry, one)
        outputs.append(output)
    return carry, jnp.stack(outputs)


def subset_forwards(
    model: Model,
    embedded: list[Embedded],
    targets_BxT: jax.Array,
    partition: Partition,
    shared: Buffer,
    sources_BxTxD: jax.Array,
    *,
    sweeps: int = 1,
    refreshable: Any = None,
    disturbed: Disturbed | None = None,
    unroll: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """One forward per subset, in turn, on a shared buffer: a scan over disjoint positions.

    Args, beside those of :class:`SubsetForward`:
      embedded: the inputs of each subset, looked up.
      targets_BxT: int targets.
      shared: the buffer, in slot order, in one piece or one for each subset; it may be empty.
      sources_BxTxD: source states, in slot order; 0 where there is none yet.
      sweeps: W, how often all subsets have their turn.
      unroll: unroll the scan.

    Returns:
      Each position's losses [W, B, T] and last source state [B, T, D], in natural order.
    """
    subset_length = partition.positions_SxP.shape[1]
    one = SubsetForward(partition, refreshable, disturbed)
    targets_SxBxP = jnp.split(partition.in_slots(targets_BxT, 1), partition.subsets, axis=1)
    subsets = [
        Subset(
            number,
            embedded[index],
            targets_SxBxP[index],
            partition.positions_SxP[index],
            partition.previous_slots_SxP[index],
            index * subset_length,
        )
        for number, index in enumerate(sweeps * list(range(partition.subsets)))
    ]
    (_, sources_BxTxD), losses_WSxBxP = in_turn(one, model, (shared, sources_BxTxD), subsets, unroll=unroll)
    losses_WxSxBxP = losses_WSxBxP.reshape(sweeps, partition.subsets, *losses_WSxBxP.shape[1:])
    split_sources = sources_BxTxD.reshape(sources_BxTxD.shape[0], partition.subsets, subset_length, -1)
    return partition.merge(jnp.moveaxis(losses_WxSxBxP, 1, 2), 2), partition.merge(split_sources, 1)


def subset_forwards_alone(
    model: Model, tokens_BxT: jax.Array, targets_BxT: jax.Array, partition: Partition, *, unroll: bool
) -> tuple[jax.Array, jax.Array]:
    """Subset forwards without an initialization forward: the buffer and the memory begin empty."""
    config, (rows, length) = model.config, tokens_BxT.shape
    empty = buffers.empty(config, rows, length, partition.subsets if unroll else 1)
    sources_BxTxD = jnp.zeros((rows, length, config.width), compute_dtype(config))
    model = model.by_layer()
    embedded = begin_subsets(model, tokens_BxT, partition, unroll=unroll)
    losses_1xBxT, sources_BxTxD = subset_forwards(
        model, embedded, targets_BxT, partition, empty, sources_BxTxD, unroll=unroll
    )
    return losses_1xBxT[0], sources_BxTxD
