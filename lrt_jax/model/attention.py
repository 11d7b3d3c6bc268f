"""Attention masked by true position: the same for full, subset and cached queries.

Keys may lie in any order, and slots may be empty: what a query sees is decided by positions alone. :func:`attend`
needs no more than that. :func:`attend_in_blocks` gives the same numbers where the order of queries and keys is
known: it leaves out the keys that causality and the window hide from a whole block of queries.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The position of an empty slot: later than any query, hence seen by none.
EMPTY = np.iinfo(np.int32).max
# The score of a key that a query does not see: finite, so that a query that sees none gives no NaN.
MASKED = -1e30
# Queries in a block, about: on 2 CPU cores 128 was fastest at T 512 (docs/LOG.md).
BLOCK = 128


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
    length, dtype = q_BxPxHxC.shape[1], q_BxPxHxC.dtype
    q_BxKxGPxC, k_BxKxNxC, v_BxKxNxC = _heads_first(q_BxPxHxC, k_BxNxKxC, v_BxNxKxC)
    scores_BxKxGPxN = _scores(q_BxKxGPxC, k_BxKxNxC, visible(queries_BxP, keys_BxN, window))
    weights_BxKxGPxN = jax.nn.softmax(scores_BxKxGPxN, axis=-1).astype(dtype)
    return _ungrouped(jnp.einsum("bkqn,bknc->bkqc", weights_BxKxGPxN, v_BxKxNxC), length)


def attend_in_blocks(
    q_BxPxHxC: jax.Array,
    k_BxNxKxC: jax.Array,
    v_BxNxKxC: jax.Array,
    queries_BxP: jax.Array,
    keys_BxN: jax.Array,
    window: jax.Array | int,
    *,
    subsets: int,
    farthest: int,
    block: int | None = None,
) -> jax.Array:
    """:func:`attend` for a strided subset, or, with ``subsets`` = 1, for all positions, block by block.

    The queries are one subset of S, in ascending order, and the N = S P keys are in slot order (slot r P + j holds
    position j S + r). A block of queries a to b sees nothing of the slots j ≥ b of any subset, nor of
    those farther back than the window: neither is computed, which halves the work. Scores are computed again in the
    backward pass instead of being kept, so memory does not grow with P N.

    Args:
      q_BxPxHxC: as in :func:`attend`, as the next five.
      k_BxNxKxC: keys.
      v_BxNxKxC: values.
      queries_BxP: position of each query.
      keys_BxN: position of each key.
      window: how many positions before itself a query sees; may be traced.
      subsets: S.
      farthest: a number that ``window`` does not exceed.
      block: queries in a block, about; None: BLOCK.

    Returns:
      [B, P, H, C].
    """
    length = q_BxPxHxC.shape[1]
    reach = -(-(farthest + subsets - 1) // subsets)
    blocks = max(1, length // (block or BLOCK))
    edges = [length * i // blocks for i in range(blocks + 1)]
    in_subsets = [array.reshape(len(array), subsets, length, *array.shape[2:]) for array in (k_BxNxKxC, v_BxNxKxC)]
    keys_BxSxP = keys_BxN.reshape(-1, subsets, length)
    mixed = []
    for begin, end in itertools.pairwise(edges):
        first = max(0, begin - reach)
        k, v, keys = (
            array[:, :, first:end].reshape(len(array), -1, *array.shape[3:]) for array in (*in_subsets, keys_BxSxP)
        )
        visible_BxPxN = visible(queries_BxP[:, begin:end], keys, window)
        mixed.append(_recomputed(q_BxPxHxC[:, begin:end], k, v, visible_BxPxN))
    return jnp.concatenate(mixed, axis=1)


@jax.custom_vjp
def _recomputed(q_BxPxHxC: jax.Array, k_BxNxKxC: jax.Array, v_BxNxKxC: jax.Array, visible_BxPxN: jax.Array) -> Any:
    """Softmax attention that keeps just the logarithm of each query's sum for its backward pass."""
    return _recomputed_forward(q_BxPxHxC, k_BxNxKxC, v_BxNxKxC, visible_BxPxN)[0]


def _grouped(x_BxPxHxC: jax.Array, kv_heads: int) -> jax.Array:
    """The queries of one KV head as one matrix: [B, K, G P, C]."""
    rows, length, heads, width = x_BxPxHxC.shape
    return (
        x_BxPxHxC.reshape(rows, length, kv_heads, heads // kv_heads, width)
        .transpose(0, 2, 3, 1, 4)
        .reshape(rows, kv_heads, -1, width)
    )


def _ungrouped(x_BxKxGPxC: jax.Array, length: int) -> jax.Array:
    """The inverse of :func:`_grouped`."""
    rows, kv_heads, _, width = x_BxKxGPxC.shape
    return (
        x_BxKxGPxC.reshape(rows, kv_heads, -1, length, width).transpose(0, 3, 1, 2, 4).reshape(rows, length, -1, width)
    )


def _heads_first(
    q_BxPxHxC: jax.Array, k_BxNxKxC: jax.Array, v_BxNxKxC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scaled queries [B, K, G P, C], keys and values [B, K, N, C].

    Heads before positions: plain batched matrix products, forward and backward, which the CPU backend runs
    without transposed copies.
    """
    grouped = _grouped(q_BxPxHxC, k_BxNxKxC.shape[2]) * (q_BxPxHxC.shape[-1] ** -0.5)
    return grouped, k_BxNxKxC.transpose(0, 2, 1, 3), v_BxNxKxC.transpose(0, 2, 1, 3)


def _scores(q_BxKxGPxC: jax.Array, k_BxKxNxC: jax.Array, visible_BxPxN: jax.Array) -> jax.Array:
    """[B, K, G P, N], float32 or wider, MASKED where not visible."""
    wide = jnp.promote_types(q_BxKxGPxC.dtype, jnp.float32)
    scores = jnp.einsum("bkqc,bknc->bkqn", q_BxKxGPxC, k_BxKxNxC, preferred_element_type=wide)
    copies = q_BxKxGPxC.shape[2] // visible_BxPxN.shape[1]
    return jnp.where(jnp.tile(visible_BxPxN, (1, copies, 1))[:, None], scores, MASKED)


def _recomputed_forward(q: jax.Array, k: jax.Array, v: jax.Array, visible_BxPxN: jax.Array) -> Any:
    length, dtype = q.shape[1], q.dtype
    q, k, v = _heads_first(q, k, v)
    scores = _scores(q, k, visible_BxPxN)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bkqn,bknc->bkqc", weights.astype(dtype), v, preferred_element_type=total.dtype) / total
    return _ungrouped(mixed.astype(dtype), length), (q, k, v, visible_BxPxN, largest + jnp.log(total), mixed)


def _recomputed_backward(kept: Any, d_mixed: jax.Array) -> Any:
    q, k, v, visible_BxPxN, logsumexp, mixed = kept
    dtype, length = q.dtype, d_mixed.shape[1]
    d_mixed = _grouped(d_mixed, k.shape[1])
    product = functools.partial(jnp.einsum, preferred_element_type=logsumexp.dtype)
    weights = jnp.exp(_scores(q, k, visible_BxPxN) - logsumexp)
    d_v = product("bkqn,bkqc->bknc", weights.astype(dtype), d_mixed)
    d_weights = product("bkqc,bknc->bkqn", d_mixed, v)
    d_scores = weights * (d_weights - jnp.sum(d_mixed * mixed, axis=-1, keepdims=True))
    d_scores = d_scores.astype(dtype)
    d_q = product("bkqn,bknc->bkqc", d_scores, k) * (q.shape[-1] ** -0.5)
    d_k = product("bkqn,bkqc->bknc", d_scores, q)
    d_k, d_v = (array.astype(dtype).transpose(0, 2, 1, 3) for array in (d_k, d_v))
    return _ungrouped(d_q.astype(dtype), length), d_k, d_v, None


_recomputed.defvjp(_recomputed_forward, _recomputed_backward)
