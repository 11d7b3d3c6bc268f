"""Attention masked by true position: the same for full, subset and cached queries.

Keys may lie in any order, and slots may be empty: what a query sees is decided by positions alone. :func:`attend`
needs no more than that. ``blocks.attend_in_blocks`` gives the same numbers where the order of queries and keys is
known: it leaves out what causality and the window hide.

Keys and values have heads before positions, [B, K, N, C], in the buffer too: products over them are plain batched
matrix products, and no subset forward transposes the whole buffer again.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# The position of an empty slot: later than any query, hence seen by none.
EMPTY = np.iinfo(np.int32).max
# Scores of one head and row that are held at once: 512 queries of 2048 keys, say. More are computed in parts.
MOST_SCORES = 2**20
# The score of a key that a query does not see: finite, so that a query that sees none gives no NaN.
MASKED = -1e30


def visible(queries_BxP: jax.Array, keys_BxN: jax.Array, window: jax.Array | int) -> jax.Array:
    """Which keys each query sees: itself and the ``window`` positions before it; bool [B, P, N]."""
    distance_BxPxN = queries_BxP[:, :, None] - keys_BxN[:, None, :]
    return (distance_BxPxN >= 0) & (distance_BxPxN <= window)


def attend(
    q_BxPxHxC: jax.Array,
    k_BxKxNxC: jax.Array,
    v_BxKxNxC: jax.Array,
    queries_BxP: jax.Array,
    keys_BxN: jax.Array,
    window: jax.Array | int,
) -> jax.Array:
    """Softmax attention, scaled by 1/√C, of P queries over N keys: [B, P, H, C]; softmax in float32 or wider.

    Args:
      q_BxPxHxC: queries, H heads.
      k_BxKxNxC: keys, K heads; each serves H / K query heads.
      v_BxKxNxC: values.
      queries_BxP: position of each query; the first axis may be 1, for all rows alike.
      keys_BxN: position of each key, EMPTY where there is none; the first axis may be 1.
      window: how many positions before itself a query sees.
    """
    q_BxKxGxPxC = grouped(q_BxPxHxC, k_BxKxNxC.shape[1])
    scores_BxKxGPxN = scores(q_BxKxGxPxC, k_BxKxNxC, visible(queries_BxP, keys_BxN, window))
    weights_BxKxGPxN = jax.nn.softmax(scores_BxKxGPxN, axis=-1).astype(q_BxPxHxC.dtype)
    mixed_BxKxGPxC = jnp.einsum("bkqn,bknc->bkqc", weights_BxKxGPxN, v_BxKxNxC)
    return ungrouped(mixed_BxKxGPxC.reshape(q_BxKxGxPxC.shape))


def attend_in_parts(
    q_BxPxHxC: jax.Array,
    k_BxKxNxC: jax.Array,
    v_BxKxNxC: jax.Array,
    queries_BxP: jax.Array,
    keys_BxN: jax.Array,
    window: jax.Array | int,
) -> jax.Array:
    """:func:`attend`, with so many queries at a time that a head holds MOST_SCORES; its arguments.

    The backward pass computes scores again. For any order of positions, on any device: memory grows with N, not with
    P N.
    """
    length = q_BxPxHxC.shape[1]
    size = max(1, MOST_SCORES // k_BxKxNxC.shape[2])
    if length <= size:
        return attend(q_BxPxHxC, k_BxKxNxC, v_BxKxNxC, queries_BxP, keys_BxN, window)
    count = -(-length // size)

    def cut(x_BxPx: jax.Array, fill: int) -> jax.Array:
        behind = [(0, 0), (0, count * size - length), *[(0, 0)] * (x_BxPx.ndim - 2)]
        padded = jnp.pad(x_BxPx, behind, constant_values=fill)
        return jnp.swapaxes(padded.reshape(len(x_BxPx), count, size, *x_BxPx.shape[2:]), 0, 1)

    def part(each: tuple[jax.Array, jax.Array]) -> jax.Array:
        return attend(each[0], k_BxKxNxC, v_BxKxNxC, each[1], keys_BxN, window)

    mixed_NxBxpxHxC = lax.map(jax.checkpoint(part), (cut(q_BxPxHxC, 0), cut(queries_BxP, EMPTY)))
    mixed_BxNxpxHxC = jnp.swapaxes(mixed_NxBxpxHxC, 0, 1)
    return mixed_BxNxpxHxC.reshape(len(q_BxPxHxC), count * size, *q_BxPxHxC.shape[2:])[:, :length]


def grouped(q_BxPxHxC: jax.Array, kv_heads: int) -> jax.Array:
    """Queries by the KV head that serves them, scaled by 1/√C: [B, K, G, P, C]."""
    rows, length, heads, width = q_BxPxHxC.shape
    in_groups = q_BxPxHxC.reshape(rows, length, kv_heads, heads // kv_heads, width)
    return in_groups.transpose(0, 2, 3, 1, 4) * (width**-0.5)


def ungrouped(x_BxKxGxPxC: jax.Array) -> jax.Array:
    """[B, P, H, C]."""
    rows, kv_heads, groups, length, width = x_BxKxGxPxC.shape
    return x_BxKxGxPxC.transpose(0, 3, 1, 2, 4).reshape(rows, length, kv_heads * groups, width)


def flat(x_BxKxGxPxC: jax.Array) -> jax.Array:
    """The queries of one KV head as one matrix: [B, K, G P, C]."""
    return x_BxKxGxPxC.reshape(*x_BxKxGxPxC.shape[:2], -1, x_BxKxGxPxC.shape[-1])


def scores(q_BxKxGxPxC: jax.Array, k_BxKxNxC: jax.Array, visible_BxPxN: jax.Array) -> jax.Array:
    """[B, K, G P, N], float32 or wider, MASKED where not visible."""
    wide = jnp.promote_types(q_BxKxGxPxC.dtype, jnp.float32)
    scores = jnp.einsum("bkqc,bknc->bkqn", flat(q_BxKxGxPxC), k_BxKxNxC, preferred_element_type=wide)
    return jnp.where(jnp.tile(visible_BxPxN, (1, q_BxKxGxPxC.shape[2], 1))[:, None], scores, MASKED)
