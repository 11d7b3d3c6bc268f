"""Attention masked by true position: the same for full, subset and cached queries.

Keys may lie in any order, and slots may be empty: what a query sees is decided by positions alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

# The position of an empty slot: later than any query, hence seen by none.
EMPTY = np.iinfo(np.int32).max
# The score of a key that a query does not see: finite, so that a query that sees none gives no NaN.
MASKED = -1e30


def visible(queries_BxP: jax.Array, keys_BxN: jax.Array, window: jax.Array | int) -> jax.Array:
    """Which keys each query sees: itself and the ``window`` positions before it; bool [B, P, N]."""
    distance_BxPxN = queries_BxP[:, :, None] - keys_BxN[:, None, :]
    return (distance_BxPxN >= 0) & (distance_BxPxN <= window)


def attend(
    q_BxPxHxC: jax.Array,
    k_BxNxKxC: jax.Array,
    v_BxNxKxC: jax.Array,
    queries_BxP: jax.Array,
    keys_BxN: jax.Array,
    window: jax.Array | int,
) -> jax.Array:
    """Softmax attention, scaled by 1/√C, of P queries over N keys; softmax in float32 or wider.

    Args:
      q_BxPxHxC: queries, H heads.
      k_BxNxKxC: keys, K heads; each serves H / K query heads.
      v_BxNxKxC: values.
      queries_BxP: position of each query; the first axis may be 1, for all rows alike.
      keys_BxN: position of each key, EMPTY where there is none; the first axis may be 1.
      window: how many positions before itself a query sees.

    Returns:
      [B, P, H, C].
    """
    rows, length, heads, width = q_BxPxHxC.shape
    kv_heads = k_BxNxKxC.shape[2]
    wide = jnp.promote_types(q_BxPxHxC.dtype, jnp.float32)
    # Heads before positions, and the queries of one KV head as one matrix: plain batched matrix products,
    # forward and backward, which the CPU backend runs without transposed copies.
    q_BxKxGPxC = q_BxPxHxC.reshape(rows, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    q_BxKxGPxC = q_BxKxGPxC.reshape(rows, kv_heads, -1, width) * (width**-0.5)
    k_BxKxNxC, v_BxKxNxC = (array.transpose(0, 2, 1, 3) for array in (k_BxNxKxC, v_BxNxKxC))
    scores = jnp.einsum("bkqc,bknc->bkqn", q_BxKxGPxC, k_BxKxNxC, preferred_element_type=wide)
    scores_BxKxGxPxN = scores.reshape(rows, kv_heads, -1, length, k_BxNxKxC.shape[1])
    mask_Bx1x1xPxN = visible(queries_BxP, keys_BxN, window)[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask_Bx1x1xPxN, scores_BxKxGxPxN, MASKED), axis=-1)
    weights_BxKxGPxN = weights.reshape(scores.shape).astype(q_BxPxHxC.dtype)
    mixed_BxKxGPxC = jnp.einsum("bkqn,bknc->bkqc", weights_BxKxGPxN, v_BxKxNxC)
    mixed_BxKxGxPxC = mixed_BxKxGPxC.reshape(rows, kv_heads, -1, length, width)
    return mixed_BxKxGxPxC.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)
