"""The shared buffer: keys and values of all positions, which forwards write and read (METHOD.md, "Training schedules").

Written in ``model.block`` (for the attention of a layer) and ``model.decoder`` (what a forward hands on), read by
``model.kernels``, reordered by ``method.schedules.interleaved``, refreshed by ``method.forwards.SubsetForward``.
Prefill carries one, too (``inference.refinement``). Source states, which the paper counts to the buffer, are beside it.

Its slots are in pieces. Where a forward's positions are all of a piece, what it computed becomes that piece; written
into a larger one, it would copy what other positions still need.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lrt_jax.model.attention import EMPTY
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.memory import KV
from lrt_jax.setup.config import ModelConfig

# Slots are the last axis but one in every leaf of a piece: [(L,) B, K, N, C].
SLOTS = -2


class Buffer(struct.PyTreeNode):
    """Keys and values of every layer, after gates, RoPE and QK norm.

    Of all layers; where layers below the memory were computed before (``Decoder.below``), of the layers above them.

    Attributes:
      pieces: its N slots, in one piece or in several of the same size. A piece is a tuple of L :class:`KV` with
        leaves [B, K, N, C], or with ``scan_layers`` one KV with leaves [L, B, K, N, C].
      positions_BxN: int32, the position that each slot holds, ``attention.EMPTY`` where there is none; the first axis
        is 1 where all rows are alike.
    """

    pieces: tuple[Any, ...]
    positions_BxN: jax.Array

    def by_layer(self) -> list[tuple[KV, ...]]:
        """Each layer's part of every piece, where layers are not stacked."""
        return list(zip(*self.pieces, strict=True))

    def positions_with(self, positions_BxP: jax.Array, slot: jax.Array | int) -> jax.Array:
        """``positions_BxN`` once these are written at ``slot`` and behind it."""
        written_BxP = jnp.broadcast_to(positions_BxP, (self.positions_BxN.shape[0], positions_BxP.shape[1]))
        return lax.dynamic_update_slice_in_dim(self.positions_BxN, written_BxP, slot, axis=1)

    def reordered(self, order: Callable[[jax.Array, int], jax.Array], positions_BxN: jax.Array, count: int) -> "Buffer":
        """A buffer of one piece in another order of slots, cut into ``count``; ``order`` takes an array and an axis."""
        (piece,) = self.pieces
        pieces = _cut(jax.tree.map(lambda leaf: order(leaf, SLOTS), piece), count)
        # Reordered once: without the barrier every subset forward would gather from the natural order again.
        return Buffer(lax.optimization_barrier(pieces), positions_BxN)

    def refreshed(self, latest: Any, visited_N: jax.Array) -> "Buffer":
        """The buffer with the keys and values of ``latest``, a piece of N slots, at all slots not visited."""
        count = len(self.pieces)

        def chosen(visited_nx1: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
            # As many axes as a leaf has, whatever they are: nothing is broadcast by rank.
            return jnp.where(visited_nx1.reshape((1,) * (old.ndim - 2) + visited_nx1.shape), old, new)

        each = zip(_cut(visited_N[:, None], count), self.pieces, _cut(latest, count), strict=True)
        pieces = (jax.tree.map(functools.partial(chosen, visited), old, new) for visited, old, new in each)
        return self.replace(pieces=tuple(pieces))


def empty(config: ModelConfig, rows: int, slots: int, count: int = 1) -> Buffer:
    """A buffer with nothing in it: N = ``slots`` for each of B = ``rows`` sequences, in so many pieces.

    It is of the layers from the first on that reads memory (``Decoder.below``).
    """
    shape = (rows, config.kv_heads, slots // count, config.head_width)

    def zeros(*layers: int) -> KV:
        return KV(*(jnp.zeros((*layers, *shape), compute_dtype(config)) for _ in range(2)))

    layers = config.layers - config.memory_range.start
    piece = zeros(layers) if config.scan_layers else tuple(zeros() for _ in range(layers))
    return Buffer((piece,) * count, jnp.full((1, slots), EMPTY, jnp.int32))


def write(pieces: tuple[Any, ...], written: Any, slot: jax.Array | int) -> tuple[Any, ...]:
    """The pieces with P positions written at ``slot``: within the only piece, or, of several, in the place of one.

    Without any, what is written is all there is.
    """
    if not pieces:
        return (written,)
    if len(pieces) == 1:
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=slot, axis=SLOTS)
        return (jax.tree.map(put, pieces[0], written),)
    index = int(slot) // jax.tree.leaves(written)[0].shape[SLOTS]  # known while tracing
    return (*pieces[:index], written, *pieces[index + 1 :])


def _cut(piece: Any, count: int) -> tuple[Any, ...]:
    """A piece as ``count`` of the same size, along its slots."""
    leaves, structure = jax.tree.flatten(piece)
    parts = [jnp.split(leaf, count, axis=SLOTS) for leaf in leaves]
    return tuple(jax.tree.unflatten(structure, each) for each in zip(*parts, strict=True))
