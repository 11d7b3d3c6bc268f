"""The KV cache of decoding: for each layer a ring of the keys and values that later queries can still see.

A forward over new positions reads the cache and leaves it as it is; what it computed itself is written by
:func:`write` afterwards. So a forward over the same positions can be repeated, as fixed-point prefill does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from lrt_jax.model.attention import EMPTY, MASKED, grouped, scores, ungrouped, visible
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.memory import KV
from lrt_jax.setup.config import ModelConfig


class Cache(struct.PyTreeNode):
    """Keys and values, after gates, RoPE and QK norm, of the positions before each row's next token.

    Position t is in slot t mod N. A layer with a window of T/2 has N = T/2 slots: those are all that a query sees
    beside itself. Rows may be at different positions.

    Attributes:
      kv: a tuple of L :class:`KV` with leaves [B, K, N, C], where N is the layer's own.
      position_B: int32, the position of each row's next token: so many tokens the row has had.
    """

    kv: tuple[KV, ...]
    position_B: jax.Array


def empty_cache(config: ModelConfig, rows: int, slots: int) -> Cache:
    """A cache with nothing in it, for B = ``rows`` sequences of up to ``slots`` tokens each."""

    def zeros(window: int) -> KV:  # two arrays, not one twice: a cache can be donated
        shape = (rows, config.kv_heads, min(window, slots), config.head_width)
        return KV(*(jnp.zeros(shape, compute_dtype(config)) for _ in range(2)))

    return Cache(tuple(zeros(window) for window in config.windows), jnp.zeros((rows,), jnp.int32))


class Cached(NamedTuple):
    """What one layer's attention reads of a cache.

    Attributes:
      kv: keys and values, [B, K, N, C] each.
      positions_BxN: int32, the position in each slot, EMPTY where there is none.
    """

    kv: KV
    positions_BxN: jax.Array

    def attend(
        self,
        q_BxPxHxC: jax.Array,
        keys: tuple[jax.Array, ...],
        values: tuple[jax.Array, ...],
        queries_BxP: jax.Array,
        keys_BxN: jax.Array,
        window: jax.Array | int,
        *,
        farthest: int,
    ) -> jax.Array:
        """Attention [B, P, H, C] of P new positions over the cache and over N newer ones; softmax in float32 or wider.

        Args, beside those of ``attention.attend``:
          keys: of what the cache does not have, [B, K, n, C] in pieces: their own, and a buffer's beside it.
          values: likewise.
          queries_BxP: int32 positions; EMPTY where a row rests, whose result means nothing.
          farthest: ``window``, where it is known.
        """
        del farthest
        slots = self.kv.k.shape[2]
        q_BxKxGxPxC = grouped(q_BxPxHxC, self.kv.k.shape[1])
        k_BxKxNxC, v_BxKxNxC = (jnp.concatenate(pieces, axis=2) for pieces in (keys, values))
        scored = _scores_of_one if q_BxPxHxC.shape[1] == 1 else scores
        past = scored(q_BxKxGxPxC, self.kv.k, visible(queries_BxP, self.positions_BxN, window))
        newer = scored(q_BxKxGxPxC, k_BxKxNxC, visible(queries_BxP, keys_BxN, window))
        weights = jax.nn.softmax(jnp.concatenate([past, newer], axis=-1), axis=-1).astype(q_BxPxHxC.dtype)
        # In this order of axes values are read as they lie. With positions first a CPU transposes those of one KV head.
        mixed_BxKxGPxC = jnp.einsum("bkqn,bknc->bkqc", weights[..., :slots], self.kv.v)
        mixed_BxKxGPxC += jnp.einsum("bkqn,bknc->bkqc", weights[..., slots:], v_BxKxNxC)
        return ungrouped(mixed_BxKxGPxC.reshape(q_BxKxGxPxC.shape))


def _scores_of_one(q_BxKxGx1xC: jax.Array, k_BxKxNxC: jax.Array, visible_Bx1xN: jax.Array) -> jax.Array:
    """``attention.scores`` of one position: with keys first, or a CPU packs them all, for a product with G queries."""
    wide = jnp.promote_types(q_BxKxGx1xC.dtype, jnp.float32)
    found_BxKxNxG = jnp.einsum("bknc,bkgc->bkng", k_BxKxNxC, q_BxKxGx1xC[:, :, :, 0], preferred_element_type=wide)
    return jnp.where(visible_Bx1xN[:, None], found_BxKxNxG.swapaxes(2, 3), MASKED)


def by_layer(cache: Cache) -> list[Cached]:
    """The cache, layer by layer."""
    newest_Bx1 = cache.position_B[:, None] - 1

    def positions(slots: int) -> jax.Array:
        held_BxN = newest_Bx1 - (newest_Bx1 - jnp.arange(slots)[None]) % slots
        return jnp.where(held_BxN >= 0, held_BxN, EMPTY)

    sizes = [ring.k.shape[2] for ring in cache.kv]
    by_size = {size: positions(size) for size in set(sizes)}
    return [Cached(ring, by_size[size]) for ring, size in zip(cache.kv, sizes, strict=True)]


def write(cache: Cache, computed: tuple[KV, ...], positions_BxP: jax.Array) -> Cache:
    """The cache after P more positions.

    Args:
      cache: before them.
      computed: a tuple of L :class:`KV` with leaves [B, K, P, C], as a forward returns them.
      positions_BxP: int32, each row's next positions, ascending; EMPTY in columns where a row rests.
    """
    after_B = cache.position_B + jnp.sum(positions_BxP != EMPTY, axis=1, dtype=jnp.int32)
    rows_Bx1 = jnp.arange(len(after_B))[:, None]
    columns_1xP = jnp.arange(positions_BxP.shape[1])[None]

    def put(ring: KV, new: KV) -> KV:
        slots = ring.k.shape[2]
        kept_BxP = (positions_BxP < after_B[:, None]) & (positions_BxP >= after_B[:, None] - slots)
        # Slots beyond the last are dropped; they differ, so that all indices are unique.
        slot_BxP = jnp.where(kept_BxP, positions_BxP % slots, slots + columns_1xP)
        return KV(
            *(
                old.at[rows_Bx1, :, slot_BxP].set(jnp.swapaxes(array, 1, 2), mode="drop", unique_indices=True)
                for old, array in zip(ring, new, strict=True)
            )
        )

    return Cache(tuple(put(ring, new) for ring, new in zip(cache.kv, computed, strict=True)), after_B)
