"""Attention masked by true position: the same for full, subset and cached queries.

Keys may lie in any order, and slots may be empty: what a query sees is decided by positions alone. :func:`attend`
needs no more than that. :func:`attend_in_blocks` gives the same numbers where the order of queries and keys is
known: it leaves out the keys that causality and the window hide from a whole block of queries.

Keys and values have heads before positions, [B, K, N, C], in the buffer too: products over them are plain batched
matrix products, and no subset forward transposes the whole buffer again.
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The position of an empty slot: later than any query, hence seen by none.
EMPTY = np.iinfo(np.int32).max
# The score of a key that a query does not see: finite, so that a query that sees none gives no NaN.
MASKED = -1e30
# A block has about this many queries, or more where there would be too many blocks to compile: on 2 CPU cores 128 was
# as fast as 64 at T 512, with less memory (docs/LOG.md).
BLOCK = 128
MOST_BLOCKS = 4


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
    """Softmax attention, scaled by 1/√C, of P queries over N keys; softmax in float32 or wider.

    Args:
      q_BxPxHxC: queries, H heads.
      k_BxKxNxC: keys, K heads; each serves H / K query heads.
      v_BxKxNxC: values.
      queries_BxP: position of each query; the first axis may be 1, for all rows alike.
      keys_BxN: position of each key, EMPTY where there is none; the first axis may be 1.
      window: how many positions before itself a query sees.

    Returns:
      [B, P, H, C].
    """
    q_BxKxGxPxC = _grouped(q_BxPxHxC, k_BxKxNxC.shape[1])
    scores_BxKxGPxN = _scores(q_BxKxGxPxC, k_BxKxNxC, visible(queries_BxP, keys_BxN, window))
    weights_BxKxGPxN = jax.nn.softmax(scores_BxKxGPxN, axis=-1).astype(q_BxPxHxC.dtype)
    mixed_BxKxGPxC = jnp.einsum("bkqn,bknc->bkqc", weights_BxKxGPxN, v_BxKxNxC)
    return _ungrouped(mixed_BxKxGPxC.reshape(q_BxKxGxPxC.shape))


def attend_in_blocks(
    q_BxPxHxC: jax.Array,
    k_BxKxNxC: Sequence[jax.Array],
    v_BxKxNxC: Sequence[jax.Array],
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
    backward pass instead of being kept, so memory does not grow with P N; keys and values are kept as they came,
    so S forwards over the same pieces keep them once.

    Args:
      q_BxPxHxC: as in :func:`attend`.
      k_BxKxNxC: keys, in one piece or in S pieces of P.
      v_BxKxNxC: values, likewise.
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
    blocks = min(max(1, length // (block or BLOCK)), MOST_BLOCKS)
    edges = [length * i // blocks for i in range(blocks + 1)]
    stretches = list(itertools.pairwise(edges))
    plan = tuple(
        (begin, end, tuple(tile for tile in stretches[: number + 1] if tile[1] > begin - reach))
        for number, (begin, end) in enumerate(stretches)
    )
    k, v = (_in_subsets(pieces, subsets) for pieces in (k_BxKxNxC, v_BxKxNxC))
    keys_BxSxP = keys_BxN.reshape(-1, subsets, length)
    return _ungrouped(_in_blocks(_grouped(q_BxPxHxC, k[0].shape[1]), k, v, (queries_BxP, keys_BxSxP, window), plan))


# The blocks of queries, each as (its first, its last + 1, the stretches of every piece's keys that it may see).
Plan = tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
# Positions of queries and keys, and the window.
Where = tuple[jax.Array, jax.Array, jax.Array | int]
Pieces = tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_blocks(q_BxKxGxPxC: jax.Array, k_BxKxPxC: Pieces, v_BxKxPxC: Pieces, where: Where, plan: Plan) -> jax.Array:
    """Softmax attention that keeps just the logarithm of each query's sum for its backward pass.

    A block of queries meets stretch by stretch of keys, each a product of its own: nothing is concatenated.
    """
    return _in_blocks_forward(q_BxKxGxPxC, k_BxKxPxC, v_BxKxPxC, where, plan)[0]


def _in_blocks_forward(q: jax.Array, k: Pieces, v: Pieces, where: Where, plan: Plan) -> Any:
    mixed, logsumexp = [], []
    for begin, end, stretches in plan:
        q_b = q[:, :, :, begin:end]
        tiles = [(piece, *stretch) for piece in range(len(k)) for stretch in stretches]
        scores = [_tile_scores(q_b, k, where, (begin, end), tile) for tile in tiles]
        largest = functools.reduce(jnp.maximum, (jnp.max(part, axis=-1, keepdims=True) for part in scores))
        weights = [jnp.exp(part - largest) for part in scores]
        total = _add(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
        product = _add(
            jnp.einsum("bkqn,bknc->bkqc", part.astype(q.dtype), v[piece][:, :, a:b], preferred_element_type=total.dtype)
            for part, (piece, a, b) in zip(weights, tiles, strict=True)
        )
        mixed.append((product / total).astype(q.dtype).reshape(q_b.shape))
        logsumexp.append((largest + jnp.log(total)).reshape(*q_b.shape[:-1], 1))
    out = jnp.concatenate(mixed, axis=3)
    return out, (q, k, v, where, jnp.concatenate(logsumexp, axis=3), out)


def _in_blocks_backward(plan: Plan, kept: Any, d_out: jax.Array) -> Any:
    q, k, v, where, logsumexp, out = kept
    product = functools.partial(jnp.einsum, preferred_element_type=logsumexp.dtype)
    # The part of the softmax's gradient that is the same for all keys.
    common = jnp.sum(d_out.astype(logsumexp.dtype) * out, axis=-1, keepdims=True)
    d_q = []
    d_k: dict[tuple[int, int, int], list[jax.Array]] = collections.defaultdict(list)
    d_v: dict[tuple[int, int, int], list[jax.Array]] = collections.defaultdict(list)
    for begin, end, stretches in plan:
        q_b = q[:, :, :, begin:end]
        q_flat, d_out_b, logsumexp_b, common_b = (
            _flat(array[:, :, :, begin:end]) for array in (q, d_out, logsumexp, common)
        )
        d_q_b = []
        for tile in ((piece, *stretch) for piece in range(len(k)) for stretch in stretches):
            k_t, v_t = (pieces[tile[0]][:, :, tile[1] : tile[2]] for pieces in (k, v))
            # Keys before queries: two of the three products below would else contract the first axes of both.
            seen = jnp.swapaxes(_tile_seen(where, (begin, end), tile), 1, 2)
            scores = product("bknc,bkqc->bknq", k_t, q_flat)
            scores = jnp.where(jnp.tile(seen, (1, 1, q_b.shape[2]))[:, None], scores, MASKED)
            weights = jnp.exp(scores - jnp.swapaxes(logsumexp_b, -1, -2))
            d_scores = (weights * (product("bknc,bkqc->bknq", v_t, d_out_b) - jnp.swapaxes(common_b, -1, -2))).astype(
                q.dtype
            )
            d_q_b.append(product("bknq,bknc->bkqc", d_scores, k_t))
            d_k[tile].append(product("bknq,bkqc->bknc", d_scores, q_flat))
            d_v[tile].append(product("bknq,bkqc->bknc", weights.astype(q.dtype), d_out_b))
        d_q.append(_add(d_q_b).reshape(q_b.shape))
    # Every stretch is seen by the block of its own queries.
    d_kv = (
        tuple(
            jnp.concatenate([_add(parts[piece, begin, end]) for begin, end, _ in plan], axis=2).astype(q.dtype)
            for piece in range(len(k))
        )
        for parts in (d_k, d_v)
    )
    return jnp.concatenate(d_q, axis=3).astype(q.dtype), *d_kv, (None, None, None)


_in_blocks.defvjp(_in_blocks_forward, _in_blocks_backward)


def _tile_scores(
    q_BxKxGxpxC: jax.Array, k: Pieces, where: Where, block: tuple[int, int], tile: tuple[int, int, int]
) -> jax.Array:
    """The scores of a block of queries under a stretch of one piece's keys."""
    piece, begin, end = tile
    return _scores(q_BxKxGxpxC, k[piece][:, :, begin:end], _tile_seen(where, block, tile))


def _tile_seen(where: Where, block: tuple[int, int], tile: tuple[int, int, int]) -> jax.Array:
    """Which keys of a stretch each query of a block sees: bool [B, p, n]."""
    (queries_BxP, keys_BxSxP, window), (piece, begin, end) = where, tile
    return visible(queries_BxP[:, slice(*block)], keys_BxSxP[:, piece, begin:end], window)


def _add(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _in_subsets(pieces: Sequence[jax.Array], subsets: int) -> Pieces:
    """Keys or values as S pieces."""
    return tuple(jnp.split(pieces[0], subsets, axis=2)) if len(pieces) == 1 else tuple(pieces)


def _grouped(q_BxPxHxC: jax.Array, kv_heads: int) -> jax.Array:
    """Queries by the KV head that serves them, scaled by 1/√C: [B, K, G, P, C]."""
    rows, length, heads, width = q_BxPxHxC.shape
    in_groups = q_BxPxHxC.reshape(rows, length, kv_heads, heads // kv_heads, width)
    return in_groups.transpose(0, 2, 3, 1, 4) * (width**-0.5)


def _ungrouped(x_BxKxGxPxC: jax.Array) -> jax.Array:
    """[B, P, H, C]."""
    rows, kv_heads, groups, length, width = x_BxKxGxPxC.shape
    return x_BxKxGxPxC.transpose(0, 3, 1, 2, 4).reshape(rows, length, kv_heads * groups, width)


def _flat(x_BxKxGxPxC: jax.Array) -> jax.Array:
    """The queries of one KV head as one matrix: [B, K, G P, C]."""
    return x_BxKxGxPxC.reshape(*x_BxKxGxPxC.shape[:2], -1, x_BxKxGxPxC.shape[-1])


def _scores(q_BxKxGxPxC: jax.Array, k_BxKxNxC: jax.Array, visible_BxPxN: jax.Array) -> jax.Array:
    """[B, K, G P, N], float32 or wider, MASKED where not visible."""
    wide = jnp.promote_types(q_BxKxGxPxC.dtype, jnp.float32)
    scores = jnp.einsum("bkqc,bknc->bkqn", _flat(q_BxKxGxPxC), k_BxKxNxC, preferred_element_type=wide)
    return jnp.where(jnp.tile(visible_BxPxN, (1, q_BxKxGxPxC.shape[2], 1))[:, None], scores, MASKED)
