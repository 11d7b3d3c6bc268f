"""Training schedules: the one place where forwards, position masks and losses meet.

A schedule takes a model and a batch and returns an :class:`Outcome`. All of them train the same
parameters, and gradients flow through every forward (method.md, "Training schedules").
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lrt_jax.model.decoder import SLOTS, Buffer, Decoder, Forward
from lrt_jax.model.head import cross_entropy
from lrt_jax.setup.config import ScheduleConfig
from lrt_jax.training import partitions


class Outcome(struct.PyTreeNode):
    """What a schedule computes of one batch: F forwards over B rows of T positions.

    Attributes:
      loss: the weighted mean of ``forward_losses_F``, nats per token.
      forward_losses_F: each forward's mean loss over its own positions.
      token_losses_FxBxT: each forward's losses, 0 at the positions it did not compute.
      masks_FxT: bool, the positions each forward computed.
      sources_BxTxD: the last source state of every position.
    """

    loss: jax.Array
    forward_losses_F: jax.Array
    token_losses_FxBxT: jax.Array
    masks_FxT: jax.Array
    sources_BxTxD: jax.Array

    @property
    def merged_losses_BxT(self) -> jax.Array:
        """Each position's loss in the last forward that computed it."""
        forwards = self.masks_FxT.shape[0]
        last_T = forwards - 1 - jnp.argmax(self.masks_FxT[::-1], axis=0)
        chosen_FxT = jnp.arange(forwards)[:, None] == last_T[None, :]
        return jnp.sum(jnp.where(chosen_FxT[:, None, :], self.token_losses_FxBxT, 0.0), axis=0)


Schedule = Callable[[Decoder, Any, jax.Array, jax.Array], Outcome]


def forward_names(config: ScheduleConfig) -> list[str]:
    """The name of each forward, as metrics use it: ``init``, then ``subset_0`` …"""
    subsets = config.subsets if config.name == "interleaved" else 0
    return ["init", *(f"subset_{i}" for i in range(subsets))]


def build(config: ScheduleConfig, sequence_length: int) -> Schedule:
    """The schedule that ``config`` names, as a function of (decoder, params, tokens_BxT, targets_BxT)."""
    if config.name == "plain":
        return functools.partial(plain, weights=config.loss_weights)
    partition = partitions.strided(sequence_length, config.subsets)
    return functools.partial(interleaved, partition=partition, unroll=config.unroll, weights=config.loss_weights)


def plain(
    decoder: Decoder,
    params: Any,
    tokens_BxT: jax.Array,
    targets_BxT: jax.Array,
    *,
    weights: tuple[float, ...] = (),
) -> Outcome:
    """One forward with zero memory: the baseline, and the initialization forward of every other schedule."""
    forward = _initialization(decoder, params, tokens_BxT)
    losses_BxT = token_losses(decoder, params, forward.hidden_BxPxD, targets_BxT)
    return _outcome(losses_BxT[None], jnp.ones((1, tokens_BxT.shape[1]), bool), forward.source_BxPxD, weights)


def interleaved(
    decoder: Decoder,
    params: Any,
    tokens_BxT: jax.Array,
    targets_BxT: jax.Array,
    *,
    partition: partitions.Partition,
    unroll: bool = True,
    weights: tuple[float, ...] = (),
) -> Outcome:
    """Interleaved training: an initialization forward, then one subset forward after the other.

    The initialization forward fills the shared buffer. Subset i then recomputes its own positions
    only: memory is the latest source state of t-1, fresh keys and values are written into the buffer
    before its queries attend to all of it, and its source states are written back for later subsets.

    Args:
      decoder: the model.
      params: its parameters.
      tokens_BxT: int inputs.
      targets_BxT: int targets.
      partition: the disjoint subsets.
      unroll: unroll the scan over subsets; the same numbers, compiled longer and run faster.
      weights: of the 1 + S forwards' losses; empty for equal.
    """
    first = _initialization(decoder, params, tokens_BxT)
    init_losses_BxT = token_losses(decoder, params, first.hidden_BxPxD, targets_BxT)
    subset_length = partition.positions_SxP.shape[1]

    def slot_order(array: jax.Array, axis: int) -> jax.Array:
        return partition.split(array, axis).reshape(array.shape)

    def subset_forward(carry: tuple[Buffer, jax.Array], xs: dict[str, jax.Array]) -> Any:
        buffer, sources_BxTxD = carry
        memory_BxPxD = jnp.where(
            xs["positions_P"][None, :, None] == 0, 0, jnp.take(sources_BxTxD, xs["previous_slots_P"], axis=1)
        )
        out = _forward(decoder, params, xs["tokens_BxP"], xs["positions_P"], memory_BxPxD, buffer, xs["slot"])
        sources_BxTxD = lax.dynamic_update_slice_in_dim(sources_BxTxD, out.source_BxPxD, xs["slot"], axis=1)
        losses_BxP = token_losses(decoder, params, out.hidden_BxPxD, xs["targets_BxP"])
        return (out.buffer, sources_BxTxD), losses_BxP

    positions_1xT = jnp.asarray(partition.positions_SxP.reshape(1, -1))
    shared = Buffer(jax.tree.map(lambda x: slot_order(x, SLOTS), first.buffer.kv), positions_1xT)
    xs = {
        "tokens_BxP": jnp.moveaxis(partition.split(tokens_BxT, 1), 1, 0),
        "targets_BxP": jnp.moveaxis(partition.split(targets_BxT, 1), 1, 0),
        "positions_P": jnp.asarray(partition.positions_SxP),
        "previous_slots_P": jnp.asarray(partition.previous_slots_SxP),
        "slot": jnp.arange(partition.subsets) * subset_length,
    }
    carry = (shared, slot_order(first.source_BxPxD, 1))
    (_, sources_BxTxD), losses_SxBxP = lax.scan(subset_forward, carry, xs, unroll=unroll)

    refined_BxT = partition.merge(jnp.moveaxis(losses_SxBxP, 0, 1), 1)
    masks_SxT = jnp.asarray(partition.masks_SxT)
    losses_FxBxT = jnp.concatenate([init_losses_BxT[None], jnp.where(masks_SxT[:, None], refined_BxT[None], 0.0)])
    masks_FxT = jnp.concatenate([jnp.ones_like(masks_SxT[:1]), masks_SxT])
    split_sources = sources_BxTxD.reshape(sources_BxTxD.shape[0], partition.subsets, subset_length, -1)
    return _outcome(losses_FxBxT, masks_FxT, partition.merge(split_sources, 1), weights)


def token_losses(decoder: Decoder, params: Any, hidden_BxPxD: jax.Array, targets_BxP: jax.Array) -> jax.Array:
    """Cross entropy of each target, in nats: [B, P], float32 or wider."""
    logits_BxPxV = decoder.apply({"params": params}, hidden_BxPxD, method=Decoder.logits)
    return cross_entropy(logits_BxPxV, targets_BxP)


def _forward(
    decoder: Decoder,
    params: Any,
    tokens_BxP: jax.Array,
    positions_P: jax.Array,
    memory_BxPxD: jax.Array | None,
    buffer: Buffer | None,
    slot: jax.Array | int,
) -> Forward:
    return decoder.apply({"params": params}, tokens_BxP, positions_P[None], memory_BxPxD, buffer, slot)


def _initialization(decoder: Decoder, params: Any, tokens_BxT: jax.Array) -> Forward:
    """The full forward with zero memory."""
    return _forward(decoder, params, tokens_BxT, jnp.arange(tokens_BxT.shape[1]), None, None, 0)


def _outcome(
    token_losses_FxBxT: jax.Array, masks_FxT: jax.Array, sources_BxTxD: jax.Array, weights: tuple[float, ...]
) -> Outcome:
    counts_F = jnp.sum(masks_FxT, axis=1) * token_losses_FxBxT.shape[1]
    forward_losses_F = jnp.sum(token_losses_FxBxT, axis=(1, 2)) / counts_F
    weights_F = jnp.asarray(weights or (1.0,) * len(masks_FxT), forward_losses_F.dtype)
    loss = jnp.sum(forward_losses_F * weights_F) / jnp.sum(weights_F)
    return Outcome(loss, forward_losses_F, token_losses_FxBxT, masks_FxT, sources_BxTxD)
