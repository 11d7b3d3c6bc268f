"""Training schedules: the one place where forwards, position masks and losses meet.

A schedule takes a model and a batch and returns an :class:`Outcome`. All of them train the same
parameters, and gradients flow through every forward (METHOD.md, "Training schedules").
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from lrt_jax.method import forwards, noise, partitions
from lrt_jax.model.decoder import Forward
from lrt_jax.model.embedding import Embedded
from lrt_jax.model.memory import shift_right
from lrt_jax.model.model import Model
from lrt_jax.setup.schedule import ScheduleConfig


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


# Of a model, and of int tokens and targets [B, T].
Schedule = Callable[[Model, jax.Array, jax.Array], Outcome]


def forward_names(config: ScheduleConfig) -> list[str]:
    """The name of each forward whose loss counts, as metrics use it: ``init``, then ``subset_0`` …"""
    return [one.name for one in config.passes]


def build(config: ScheduleConfig, sequence_length: int) -> Schedule:
    """The schedule that ``config`` names.

    Raises:
      ValueError: it is staged, and so it is several: build each of ``config.kinds``.
      ConfigError: there is none of this name.
    """
    assert config.description
    return RUN[config.name](config, sequence_length)


def plain(model: Model, tokens_BxT: jax.Array, targets_BxT: jax.Array, *, weights: tuple[float, ...] = ()) -> Outcome:
    """One forward with zero memory: the baseline, and the initialization forward of other schedules."""
    model = model.by_layer()
    (embedded,) = model.embed(tokens_BxT)
    forward, model = forwards.initialization(model, embedded)
    losses_BxT = forwards.token_losses(model, forward.hidden_BxPxD, targets_BxT)
    return outcome(losses_BxT[None], jnp.ones((1, tokens_BxT.shape[1]), bool), forward.source_BxPxD, weights)


def interleaved(
    model: Model,
    tokens_BxT: jax.Array,
    targets_BxT: jax.Array,
    *,
    partition: partitions.Partition,
    sweeps: int = 1,
    kv_refresh: bool = False,
    settle: int = 0,
    noisy: noise.Noise | None = None,
    unroll: bool = True,
    weights: tuple[float, ...] = (),
) -> Outcome:
    """Interleaved training: an initialization forward, then one subset forward after the other.

    The initialization forward fills the shared buffer. Subset i then recomputes its own positions
    only: memory is the latest source state of t-1, its new keys and values are written into the buffer
    before its queries attend to all of it, and its source states are written back for later subsets.

    Args, beside those of every :data:`Schedule`:
      partition: the disjoint subsets.
      sweeps: W, how often it goes through all of them.
      kv_refresh: before each subset forward, bring keys and values at positions that no subset has
        visited up to date with the latest memory.
      settle: so many forwards without gradient (``forwards.settled``) fill the buffer, and no initialization forward
        with one; their losses do not count.
      noisy: what happens to the memory that subset forwards read.
      unroll: unroll the scan over subsets; the same numbers, compiled longer and run faster.
      weights: of the forwards' losses, 1 + W S or, with ``settle``, W S; empty for equal.
    """
    model = model.by_layer()
    natural, *in_subsets = forwards.begin_subsets(model, tokens_BxT, partition, unroll=unroll, natural=True)
    first, model, before = _begun(model, natural, targets_BxT, settle, fills=True, keep_refreshable=kv_refresh)
    # Unrolled, a subset's keys and values take the place of a piece, and nothing of the buffer is copied.
    positions_1xT = jnp.asarray(partition.positions_SxP.reshape(1, -1))
    buffer = first.buffer.reordered(partition.in_slots, positions_1xT, partition.subsets if unroll else 1)
    # Positions come before heads in what keys and values are refreshed from.
    refreshable = jax.tree.map(lambda x: partition.in_slots(x, -3), first.refreshable)
    losses_WxBxT, sources_BxTxD = forwards.subset_forwards(
        model,
        in_subsets,
        targets_BxT,
        partition,
        buffer,
        partition.in_slots(first.source_BxPxD, 1),
        sweeps=sweeps,
        refreshable=refreshable if kv_refresh else None,
        disturbed=_disturbed(noisy, tokens_BxT),
        unroll=unroll,
    )
    masks_FxT = jnp.tile(jnp.asarray(partition.masks_SxT), (sweeps, 1))
    losses_FxBxT = jnp.where(masks_FxT[:, None], jnp.repeat(losses_WxBxT, partition.subsets, axis=0), 0.0)
    return _outcome_after(before, losses_FxBxT, masks_FxT, sources_BxTxD, weights)


def multi_refinement(
    model: Model,
    tokens_BxT: jax.Array,
    targets_BxT: jax.Array,
    *,
    refinements: int,
    detach: bool = False,
    settle: int = 0,
    noisy: noise.Noise | None = None,
    unroll: bool = True,
    weights: tuple[float, ...] = (),
) -> Outcome:
    """Multi-refinement training: an initialization forward, then K more full forwards.

    Forward k reads the source states of forward k - 1, shifted right by one position.

    Args, beside those of every :data:`Schedule`:
      refinements: K.
      detach: no gradient flows from a forward into the source states it reads.
      settle: so many forwards without gradient (``forwards.settled``) take the place of the initialization forward;
        their losses do not count.
      noisy: what happens to the memory that refinements read.
      unroll: unroll the scan over forwards.
      weights: of the forwards' losses, 1 + K or, with ``settle``, K; empty for equal.
    """
    positions_T = np.arange(tokens_BxT.shape[1], dtype=np.int32)
    model = model.by_layer()
    embedded = forwards.begin(model, tokens_BxT)
    first, model, before = _begun(model, embedded, targets_BxT, settle, fills=False)
    disturbed = _disturbed(noisy, tokens_BxT)

    def refine(model: Model, sources_BxTxD: jax.Array, number: jax.Array) -> tuple[Model, jax.Array, jax.Array]:
        memory_BxTxD = shift_right(lax.stop_gradient(sources_BxTxD) if detach else sources_BxTxD)
        if disturbed is not None:
            memory_BxTxD = disturbed(memory_BxTxD, positions_T, number)
        out, model = forwards.full(model, embedded, memory_BxTxD)
        losses_BxT = forwards.token_losses(model, out.hidden_BxPxD, targets_BxT)
        return model, out.source_BxPxD, losses_BxT

    sources_BxTxD, losses_FxBxT = forwards.in_turn(
        refine, model, first.source_BxPxD, list(range(refinements)), unroll=unroll
    )
    masks_FxT = jnp.ones((refinements, len(positions_T)), bool)
    return _outcome_after(before, losses_FxBxT, masks_FxT, sources_BxTxD, weights)


def _begun(
    model: Model, embedded: Embedded, targets_BxT: jax.Array, settle: int, *, fills: bool, **options: bool
) -> tuple[Forward, Model, list[jax.Array]]:
    """What refinements begin with: the initialization forward, or the last of ``settle`` without gradient.

    Returns:
      That forward, with keys and values of all layers if it ``fills`` a buffer; the model for the next one; and the
      initialization forward's losses [B, T], if it was one.
    """
    if settle:
        return forwards.settled(model, embedded, settle, states_only=not fills), model, []
    first, model = forwards.initialization(model, embedded, **options)
    return first, model, [forwards.token_losses(model, first.hidden_BxPxD, targets_BxT)]


def _disturbed(noisy: noise.Noise | None, tokens_BxT: jax.Array) -> forwards.Disturbed | None:
    """Noise as forwards apply it, with one draw for each row of tokens."""
    if noisy is None:
        return None
    keys_B, length = noise.keys_of(tokens_BxT), tokens_BxT.shape[1]
    return lambda memory, positions, number: noisy(memory, positions, keys_B, length, number)


def chunked(
    model: Model,
    tokens_BxT: jax.Array,
    targets_BxT: jax.Array,
    *,
    chunks: int,
    unroll: bool = True,
    weights: tuple[float, ...] = (),
) -> Outcome:
    """N contiguous chunks in turn, the paper's weaker baseline: memory passes only across chunk borders.

    A chunk's first position reads the source state before it, which is known by then; its other
    positions, computed together with the ones before them, read zero memory. N is ``chunks``; ``unroll`` unrolls the
    scan over them; ``weights`` are those of the N forwards' losses, empty for equal.
    """
    partition = partitions.contiguous(tokens_BxT.shape[1], chunks)
    losses_BxT, sources_BxTxD = forwards.subset_forwards_alone(model, tokens_BxT, targets_BxT, partition, unroll=unroll)
    masks_NxT = jnp.asarray(partition.masks_SxT)
    return outcome(jnp.where(masks_NxT[:, None], losses_BxT[None], 0.0), masks_NxT, sources_BxTxD, weights)


def sequential(model: Model, tokens_BxT: jax.Array, targets_BxT: jax.Array) -> Outcome:
    """True recurrence, token by token, with exact backpropagation through time: one forward in T steps.

    The oracle of tests, and a way to train at small T: memory for the gradient grows with T².
    """
    length = tokens_BxT.shape[1]
    one_by_one = partitions.contiguous(length, length)
    losses_BxT, sources_BxTxD = forwards.subset_forwards_alone(model, tokens_BxT, targets_BxT, one_by_one, unroll=False)
    return outcome(losses_BxT[None], jnp.ones((1, length), bool), sources_BxTxD, ())


def outcome(
    token_losses_FxBxT: jax.Array, masks_FxT: jax.Array, sources_BxTxD: jax.Array, weights: tuple[float, ...] = ()
) -> Outcome:
    """The outcome of F forwards, from each one's losses (0 where it computed none) and the positions it computed.

    ``weights`` are those of the forwards' mean losses; empty for equal.
    """
    counts_F = jnp.sum(masks_FxT, axis=1) * token_losses_FxBxT.shape[1]
    forward_losses_F = jnp.sum(token_losses_FxBxT, axis=(1, 2)) / counts_F
    weights_F = jnp.asarray(weights or (1.0,) * len(masks_FxT), forward_losses_F.dtype)
    loss = jnp.sum(forward_losses_F * weights_F) / jnp.sum(weights_F)
    return Outcome(loss, forward_losses_F, token_losses_FxBxT, masks_FxT, sources_BxTxD)


def _outcome_after(
    before: list[jax.Array], losses_FxBxT: jax.Array, masks_FxT: jax.Array, sources_BxTxD: jax.Array, weights: Any
) -> Outcome:
    """The outcome of F forwards behind others over all positions, whose losses are [B, T] each."""
    if before:
        losses_FxBxT = jnp.concatenate([jnp.stack(before), losses_FxBxT])
        masks_FxT = jnp.concatenate([jnp.ones((len(before), masks_FxT.shape[1]), bool), masks_FxT])
    return outcome(losses_FxBxT, masks_FxT, sources_BxTxD, weights)


def _build_interleaved(config: ScheduleConfig, sequence_length: int) -> Schedule:
    return functools.partial(
        interleaved,
        partition=partitions.PARTITIONS[config.partition](sequence_length, config.subsets),
        sweeps=config.sweeps,
        kv_refresh=config.kv_refresh,
        settle=config.settle,
        noisy=noise.of(config),
        unroll=config.unroll,
        weights=_weights(config),
    )


def _weights(config: ScheduleConfig) -> tuple[float, ...]:
    """Of the losses of a schedule that may begin with an initialization forward."""
    if config.loss_weights or config.settle or config.init_weight == 1:
        return config.loss_weights
    return (config.init_weight, *(1.0,) * (config.forwards - 1))


# What makes a schedule's function of its config and T, by the names of ``setup.schedule.SCHEDULES``.
RUN: dict[str, Callable[[ScheduleConfig, int], Schedule]] = {
    "plain": lambda config, _: functools.partial(plain, weights=config.loss_weights),
    "interleaved": _build_interleaved,
    "multi_refinement": lambda config, _: functools.partial(
        multi_refinement,
        refinements=config.refinements,
        detach=config.detach,
        settle=config.settle,
        noisy=noise.of(config),
        unroll=config.unroll,
        weights=_weights(config),
    ),
    "chunked": lambda config, _: functools.partial(
        chunked, chunks=config.chunks, unroll=config.unroll, weights=config.loss_weights
    ),
    "sequential": lambda config, _: sequential,
}
