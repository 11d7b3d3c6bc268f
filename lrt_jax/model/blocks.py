"""Attention in blocks: the numbers of ``attention.attend``, without the work for keys that a whole block cannot see.

A block of queries meets its keys tile by tile. A tile is a run of one subset's keys. To join those of several subsets
would make fewer and faster products, but XLA keeps what it joined, S copies of all keys (docs/LOG.md).
"""

import collections
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrt_jax.model import attention

# A block has about this many queries, or more where there would be too many blocks to compile.
BLOCK = 64
MOST_BLOCKS = 4
# Queries times keys of a tile, at most, unless a block is larger. Larger ones are no faster on 2 CPU cores, and XLA
# keeps more copies of keys for them (docs/LOG.md).
TILE = 8192

# Keys of a piece: the piece, the first key, the last + 1.
Stretch = tuple[int, int, int]
# The blocks of queries, each as its first, its last + 1, and its tiles.
Plan = tuple[tuple[int, int, tuple[Stretch, ...]], ...]
# Positions of queries and keys, and the window.
Where = tuple[jax.Array, jax.Array, jax.Array | int]
Pieces = tuple[jax.Array, ...]


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
    """``attention.attend``, in blocks, of a strided subset, or with ``subsets`` = 1 of all positions; [B, P, H, C].

    The queries are one subset of S, in ascending order, and the N = S P keys are in slot order (slot r P + j holds
    position j S + r). A block of queries a to b sees nothing of the slots j ≥ b of any subset, nor of
    those farther back than the window: neither is computed, which nearly halves the work. Nothing of size P N is kept
    for the backward pass, which computes scores again; XLA's CPU backend does that early, and then keeps them
    (docs/LOG.md). Keys and values are kept as they came, so S forwards over the same pieces keep them once.

    Args, beside those of ``attention.attend``:
      q_BxPxHxC: after QK norm, as the keys: no score is beyond ±√C, and its exponential is taken as it is.
      k_BxKxNxC: keys, in one piece or in S pieces of P.
      v_BxKxNxC: values, likewise.
      window: as there; it may be traced.
      subsets: S.
      farthest: a number that ``window`` does not exceed.
      block: queries in a block, about; None: BLOCK.
    """
    length = q_BxPxHxC.shape[1]
    k, v = (_in_subsets(pieces, subsets) for pieces in (k_BxKxNxC, v_BxKxNxC))
    where = (queries_BxP, keys_BxN.reshape(-1, subsets, length), window)
    q_BxKxGxPxC = attention.grouped(q_BxPxHxC, k[0].shape[1])
    plan = _plan(length, subsets, farthest, block or BLOCK)
    return attention.ungrouped(_attend(q_BxKxGxPxC, k, v, where, plan))


def _plan(length: int, subsets: int, farthest: int, block: int) -> Plan:
    """What each block of queries may see, in tiles."""
    blocks = min(max(1, length // block), MOST_BLOCKS)
    edges = list(itertools.pairwise(length * i // blocks for i in range(blocks + 1)))
    # Query j of subset i is (j - n) S + i - r after key n of subset r; both may be at an end of their S positions.
    reach = (farthest + subsets - 1) // subsets
    plan = []
    for number, (begin, end) in enumerate(edges):
        near = [edge for edge in edges[: number + 1] if edge[1] > begin - reach]
        # Stretches of keys in a tile: at least one.
        count = max(1, TILE // (end - begin) // max(b - a for a, b in near))
        runs = [near[first : first + count] for first in range(0, len(near), count)]
        tiles = tuple((piece, run[0][0], run[-1][1]) for piece in range(subsets) for run in runs)
        plan.append((begin, end, tiles))
    return tuple(plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BxKxGxPxC: jax.Array, k_BxKxPxC: Pieces, v_BxKxPxC: Pieces, where: Where, plan: Plan) -> jax.Array:
    """Softmax attention that keeps just the logarithm of each query's sum for its backward pass."""
    return _attend_forward(q_BxKxGxPxC, k_BxKxPxC, v_BxKxPxC, where, plan)[0]


def _attend_forward(q: jax.Array, k: Pieces, v: Pieces, where: Where, plan: Plan) -> Any:
    mixed, logsumexp = [], []
    for begin, end, tiles in plan:
        q_b = q[:, :, :, begin:end]
        scores = [attention.scores(q_b, _keys_of(k, tile), _seen(where, (begin, end), tile)) for tile in tiles]
        # No larger one is subtracted: |score| ≤ √C. Looking for the largest would cost one more pass over all scores,
        # and hold up every tile until the last is there.
        weights = [jnp.exp(part) for part in scores]
        total = _add(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
        product = _add(
            jnp.einsum("bkqn,bknc->bkqc", part.astype(q.dtype), _keys_of(v, tile), preferred_element_type=total.dtype)
            for part, tile in zip(weights, tiles, strict=True)
        )
        mixed.append((product / total).astype(q.dtype).reshape(q_b.shape))
        logsumexp.append(jnp.log(total).reshape(*q_b.shape[:-1], 1))
    out = jnp.concatenate(mixed, axis=3)
    return out, (q, k, v, where, jnp.concatenate(logsumexp, axis=3), out)


def _attend_backward(plan: Plan, kept: Any, d_out: jax.Array) -> Any:
    q, k, v, where, logsumexp, out = kept
    product = functools.partial(jnp.einsum, preferred_element_type=logsumexp.dtype)
    # The part of the softmax's gradient that is the same for all keys.
    common = jnp.sum(d_out.astype(logsumexp.dtype) * out, axis=-1, keepdims=True)
    d_q = []
    d_k: dict[Stretch, list[jax.Array]] = collections.defaultdict(list)
    d_v: dict[Stretch, list[jax.Array]] = collections.defaultdict(list)
    for begin, end, tiles in plan:
        q_b = q[:, :, :, begin:end]
        q_flat, d_out_b, logsumexp_b, common_b = (
            attention.flat(array[:, :, :, begin:end]) for array in (q, d_out, logsumexp, common)
        )
        d_q_b = []
        for tile in tiles:
            k_t, v_t = _keys_of(k, tile), _keys_of(v, tile)
            # Keys before queries: two of the three products below would else contract the first axes of both.
            seen = jnp.swapaxes(_seen(where, (begin, end), tile), 1, 2)
            scores = product("bknc,bkqc->bknq", k_t, q_flat)
            scores = jnp.where(jnp.tile(seen, (1, 1, q_b.shape[2]))[:, None], scores, attention.MASKED)
            weights = jnp.exp(scores - jnp.swapaxes(logsumexp_b, -1, -2))
            d_scores = (weights * (product("bknc,bkqc->bknq", v_t, d_out_b) - jnp.swapaxes(common_b, -1, -2))).astype(
                q.dtype
            )
            # Transposed first, and behind a barrier, or XLA would put both back into one slow product (docs/LOG.md).
            transposed = jax.lax.optimization_barrier(jnp.swapaxes(d_scores, -1, -2))
            d_q_b.append(product("bkqn,bknc->bkqc", transposed, k_t))
            _share_out(d_k, plan, tile, product("bknq,bkqc->bknc", d_scores, q_flat))
            _share_out(d_v, plan, tile, product("bknq,bkqc->bknc", weights.astype(q.dtype), d_out_b))
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


_attend.defvjp(_attend_forward, _attend_backward)


def _keys_of(pieces: Pieces, tile: Stretch) -> jax.Array:
    """A tile's keys, or values: [B, K, n, C]."""
    piece, begin, end = tile
    return pieces[piece][:, :, begin:end]


def _seen(where: Where, block: tuple[int, int], tile: Stretch) -> jax.Array:
    """Which of a tile's keys each query of a block sees: bool [B, p, n]."""
    (queries_BxP, keys_BxSxP, window), (piece, begin, end) = where, tile
    return attention.visible(queries_BxP[:, slice(*block)], keys_BxSxP[:, piece, begin:end], window)


def _share_out(parts: dict[Stretch, list[jax.Array]], plan: Plan, tile: Stretch, gradient_BxKxnxC: jax.Array) -> None:
    """Gives each block's stretch of a tile its part of the gradient."""
    piece, first, last = tile
    for begin, end, _ in plan:
        if first <= begin and end <= last:
            parts[piece, begin, end].append(gradient_BxKxnxC[:, :, begin - first : end - first])


def _add(parts: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, parts)


def _in_subsets(pieces: Sequence[jax.Array], subsets: int) -> Pieces:
    """Keys or values as S pieces."""
    return tuple(jnp.split(pieces[0], subsets, axis=2)) if len(pieces) == 1 else tuple(pieces)
