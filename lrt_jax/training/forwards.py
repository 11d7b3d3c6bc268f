"""The forwards that schedules are made of, and their losses: the initialization forward, and subset forwards."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lrt_jax.model.attention import EMPTY
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.decoder import Buffer, Decoder, Embedded, Forward, empty_buffer
from lrt_jax.model.head import cross_entropy
from lrt_jax.training.partitions import Partition, Strided


def token_losses(decoder: Decoder, params: Any, hidden_BxPxD: jax.Array, targets_BxP: jax.Array) -> jax.Array:
    """Cross entropy of each target, in nats: [B, P], float32 or wider."""
    logits_BxPxV = decoder.apply({"params": params}, hidden_BxPxD, method=Decoder.logits)
    return cross_entropy(logits_BxPxV, targets_BxP)


def forward(
    decoder: Decoder,
    params: Any,
    embedded: Embedded,
    positions_P: jax.Array,
    memory_BxPxD: jax.Array | None,
    buffer: Buffer | None,
    slot: jax.Array | int,
    *,
    subsets: int | None = None,
    keep_refreshable: bool = False,
) -> Forward:
    """:meth:`Decoder.__call__` with positions that are the same in all rows."""
    return decoder.apply(
        {"params": params},
        embedded,
        positions_P[None],
        memory_BxPxD,
        buffer,
        slot,
        subsets=subsets,
        keep_refreshable=keep_refreshable,
    )


def embed(decoder: Decoder, params: Any, tokens_BxT: jax.Array) -> Embedded:
    """The tokens looked up, for all forwards of a schedule."""
    return decoder.apply({"params": params}, tokens_BxT, method=Decoder.embed)


def initialization(decoder: Decoder, params: Any, embedded: Embedded, *, keep_refreshable: bool = False) -> Forward:
    """The full forward with zero memory."""
    positions_T = jnp.arange(embedded.x0_BxPxD.shape[1])
    return forward(decoder, params, embedded, positions_T, None, None, 0, subsets=1, keep_refreshable=keep_refreshable)


def subset_forwards(
    decoder: Decoder,
    params: Any,
    embedded: Embedded,
    targets_BxT: jax.Array,
    partition: Partition,
    shared: Buffer,
    sources_BxTxD: jax.Array,
    *,
    refreshable: Any = None,
    unroll: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """One forward per subset, in turn, on a shared buffer: a scan over disjoint positions.

    Args:
      decoder: the model.
      params: its parameters.
      embedded: the inputs, looked up.
      targets_BxT: int targets.
      partition: the subsets.
      shared: the buffer, in slot order; it may be empty.
      sources_BxTxD: source states, in slot order; 0 where there is none yet.
      refreshable: for KV refresh, in slot order.
      unroll: unroll the scan.

    Returns:
      Each position's loss [B, T] and source state [B, T, D], in natural order.
    """
    subset_length = partition.positions_SxP.shape[1]

    def memory_of(sources_BxTxD: jax.Array, positions_P: jax.Array, previous_slots_P: jax.Array) -> jax.Array:
        latest_BxPxD = jnp.take(sources_BxTxD, previous_slots_P, axis=1)
        return jnp.where(positions_P[None, :, None] == 0, 0, latest_BxPxD)

    def up_to_date(buffer: Buffer, sources_BxTxD: jax.Array, slot: jax.Array) -> Buffer:
        """The buffer with keys and values refreshed at all slots that no subset has visited: ``slot`` and later."""
        positions_T, previous_slots_T = (
            jnp.asarray(array).reshape(-1) for array in (partition.positions_SxP, partition.previous_slots_SxP)
        )
        memory_BxTxD = memory_of(sources_BxTxD, positions_T, previous_slots_T)
        refreshed = decoder.apply(
            {"params": params}, refreshable, memory_BxTxD, positions_T[None], method=Decoder.refresh
        )
        visited_Tx1x1 = (jnp.arange(len(positions_T)) < slot)[:, None, None]
        # The mask has as many axes as a buffer's leaf, whatever that is: nothing is broadcast by rank.
        kv = jax.tree.map(
            lambda old, new: jnp.where(visited_Tx1x1.reshape((1,) * (old.ndim - 3) + visited_Tx1x1.shape), old, new),
            buffer.kv,
            refreshed,
        )
        return Buffer(kv, buffer.positions_BxN)

    def subset_forward(carry: tuple[Buffer, jax.Array], xs: dict[str, Any]) -> Any:
        buffer, sources_BxTxD = carry
        if refreshable is not None:
            buffer = up_to_date(buffer, sources_BxTxD, xs["slot"])
        memory_BxPxD = memory_of(sources_BxTxD, xs["positions_P"], xs["previous_slots_P"])
        out = forward(
            decoder,
            params,
            xs["embedded"],
            xs["positions_P"],
            memory_BxPxD,
            buffer,
            xs["slot"],
            subsets=partition.subsets if isinstance(partition, Strided) else None,
        )
        sources_BxTxD = lax.dynamic_update_slice_in_dim(sources_BxTxD, out.source_BxPxD, xs["slot"], axis=1)
        losses_BxP = token_losses(decoder, params, out.hidden_BxPxD, xs["targets_BxP"])
        return (out.buffer, sources_BxTxD), losses_BxP

    xs = {
        "embedded": Embedded(
            jnp.moveaxis(partition.split(embedded.x0_BxPxD, 1), 1, 0),
            None
            if embedded.values_ExBxPxKxC is None
            else jnp.moveaxis(partition.split(embedded.values_ExBxPxKxC, 2), 2, 0),
        ),
        "targets_BxP": jnp.moveaxis(partition.split(targets_BxT, 1), 1, 0),
        "positions_P": jnp.asarray(partition.positions_SxP),
        "previous_slots_P": jnp.asarray(partition.previous_slots_SxP),
        "slot": jnp.arange(partition.subsets) * subset_length,
    }
    (_, sources_BxTxD), losses_SxBxP = lax.scan(subset_forward, (shared, sources_BxTxD), xs, unroll=unroll)
    split_sources = sources_BxTxD.reshape(sources_BxTxD.shape[0], partition.subsets, subset_length, -1)
    return partition.merge(jnp.moveaxis(losses_SxBxP, 0, 1), 1), partition.merge(split_sources, 1)


def subset_forwards_alone(
    decoder: Decoder,
    params: Any,
    tokens_BxT: jax.Array,
    targets_BxT: jax.Array,
    partition: Partition,
    *,
    unroll: bool,
) -> tuple[jax.Array, jax.Array]:
    """Subset forwards without an initialization forward: the buffer and the memory begin empty."""
    config, (rows, length) = decoder.config, tokens_BxT.shape
    empty = Buffer(empty_buffer(config, rows, length).kv, jnp.full((1, length), EMPTY, jnp.int32))
    sources_BxTxD = jnp.zeros((rows, length, config.width), compute_dtype(config))
    embedded = embed(decoder, params, tokens_BxT)
    return subset_forwards(decoder, params, embedded, targets_BxT, partition, empty, sources_BxTxD, unroll=unroll)
