"""cuDNN's flash attention (NVIDIA GPUs) for one strided subset's queries, over a buffer in pieces.

Query j of subset i is at position j S + i, key n of piece r at position n S + r. So the query sees the key iff n ≤ j
where r ≤ i, and iff n < j where r > i: each piece is a square problem with a causal, or strictly causal, mask, which
the kernel knows. The softmax over all pieces is put together from theirs:

    lse = log Σ_r exp(lse_r),    o = Σ_r exp(lse_r - lse) o_r.

The kernel's backward pass computes exp(scores - lse) again, and Σ_c dO ⊙ o. Given the lse and o of all pieces it
returns each piece's exact share of the gradients, as in ring attention (Liu et al., arXiv 2310.01889). S subsets
together do the products of one causal forward. ``jax.nn.dot_product_attention`` gives no gradient through its
logsumexp, hence the calls below it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused  # no public function takes a logsumexp (docs/DESIGN.md)

Pieces = tuple[jax.Array, ...]
Three = tuple[jax.Array, jax.Array, jax.Array]


def attend_by_cudnn(
    q_BxPxHxC: jax.Array, k: Pieces, v: Pieces, *, window: int, subsets: int, subset: int, interpret: bool
) -> jax.Array:
    """``attention.attend`` for subset i of S, all rows alike: [B, P, H, C].

    Args:
      q_BxPxHxC: the queries of subset i, ascending; bfloat16 or float16.
      k: keys in slot order, as one array [B, K, S P, C] or as S pieces [B, K, P, C].
      v: values, likewise.
      window: how many positions before itself a query sees.
      subsets: S; 1: all positions.
      subset: i.
      interpret: compute by XLA, where there is no GPU.
    """
    if len(k) != subsets:
        k, v = (tuple(jnp.split(jnp.concatenate(pieces, axis=2), subsets, axis=2)) for pieces in (k, v))
    plan = _plan(q_BxPxHxC.shape[1], subsets, subset, window)
    return jnp.swapaxes(_attend(jnp.swapaxes(q_BxPxHxC, 1, 2), k, v, plan, interpret), 1, 2)


# For each piece: the first queries that are left out, as are as many last keys; and how many keys, its own included, a
# query sees at most (None: all before it). A piece that is None is not seen at all.
Plan = tuple[tuple[int, int | None] | None, ...]


def _plan(length: int, subsets: int, subset: int, window: int) -> Plan:
    def of(piece: int) -> tuple[int, int | None] | None:
        strictly = int(piece > subset)
        # (j - n) S + i - r ≤ window; strictly causal, query j is number j - 1 of those that are left.
        count = (window - subset + piece) // subsets + 1 - strictly
        if count <= 0 or length == strictly:
            return None
        return strictly, count if count < length - strictly else None

    return tuple(of(piece) for piece in range(subsets))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q_BxHxPxC: jax.Array, k: Pieces, v: Pieces, plan: Plan, interpret: bool) -> jax.Array:
    return _attend_forward(q_BxHxPxC, k, v, plan, interpret)[0]


def _attend_forward(q: jax.Array, k: Pieces, v: Pieces, plan: Plan, interpret: bool) -> Any:
    forward = _forward_by_xla if interpret else _forward
    outs, logsumexps = [], []
    for k_r, v_r, how in zip(k, v, plan, strict=True):
        if how is not None:
            first, count = how
            out, logsumexp = forward(q[:, :, first:], _before_last(k_r, first), _before_last(v_r, first), count)
            outs.append(jnp.pad(out, ((0, 0), (0, 0), (first, 0), (0, 0))))
            logsumexps.append(jnp.pad(logsumexp, ((0, 0), (0, 0), (first, 0)), constant_values=-jnp.inf))
    if len(outs) == 1:
        return outs[0], (q, k, v, logsumexps[0], outs[0])
    total_BxHxP = functools.reduce(jnp.logaddexp, logsumexps)
    weighted = (
        jnp.exp(logsumexp - total_BxHxP)[..., None] * out.astype(total_BxHxP.dtype)
        for out, logsumexp in zip(outs, logsumexps, strict=True)
    )
    out = functools.reduce(jnp.add, weighted).astype(q.dtype)
    return out, (q, k, v, total_BxHxP, out)


def _attend_backward(plan: Plan, interpret: bool, kept: Any, d_out: jax.Array) -> Any:
    q, k, v, logsumexp, out = kept
    backward = _backward_by_xla if interpret else _backward
    d_q: list[jax.Array] = []
    d_k, d_v = ([jnp.zeros_like(piece) for piece in pieces] for pieces in (k, v))
    for piece, how in enumerate(plan):
        if how is not None:
            first, count = how
            q_r, out_r, d_out_r = (array[:, :, first:] for array in (q, out, d_out))
            k_r, v_r = _before_last(k[piece], first), _before_last(v[piece], first)
            d_q_r, *d_kv_r = backward((q_r, k_r, v_r), (logsumexp[:, :, first:], out_r, d_out_r), count)
            d_q.append(jnp.pad(d_q_r, ((0, 0), (0, 0), (first, 0), (0, 0))))
            behind = ((0, 0), (0, 0), (0, first), (0, 0))
            d_k[piece], d_v[piece] = (jnp.pad(gradient, behind) for gradient in d_kv_r)
    wide = functools.reduce(jnp.add, (part.astype(logsumexp.dtype) for part in d_q))
    return wide.astype(q.dtype), tuple(d_k), tuple(d_v)


_attend.defvjp(_attend_forward, _attend_backward)


def _before_last(keys_BxKxPxC: jax.Array, count: int) -> jax.Array:
    return keys_BxKxPxC[:, :, : keys_BxKxPxC.shape[2] - count]


# What follows is one square causal problem: q [B, H, P, C], k and v [B, K, P, C], logsumexp [B, H, P] in float32.


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, count: int | None) -> tuple[jax.Array, jax.Array]:
    """The kernel's output and logsumexp."""
    inputs, options = _call(q, k, v, count)
    out, logsumexp = fused._dot_product_attention_fwd_p_wrapper.bind(*inputs, **options, is_training=True)
    return out, logsumexp


def _backward(qkv: Three, known: Three, count: int | None) -> Three:
    """Gradients of q, k and v, where logsumexp, output and the output's gradient are known."""
    inputs, options = _call(*qkv, count)
    d_q, d_k, d_v = fused._dot_product_attention_bwd_p_wrapper.bind(*inputs, *known, **options)
    return d_q, d_k, d_v


def _call(q: jax.Array, k: jax.Array, v: jax.Array, count: int | None) -> tuple[tuple[jax.Array, ...], dict[str, Any]]:
    absent = jnp.zeros(0, q.dtype)  # bias, lengths, offsets, page tables
    return (q, k, v, *[absent] * 7), {
        "scale": q.shape[-1] ** -0.5,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of one
        "mask_type": fused.MaskType.CAUSAL,
        "layout": fused.AttentionLayout.BNTH.value,
        "sliding_window_length": count,
    }


def _weights(q: jax.Array, k: jax.Array, count: int | None, logsumexp: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """exp(scores - logsumexp) [B, H, P, P], and the logsumexp, of these scores where none is given."""
    length = q.shape[2]
    distance_PxP = jnp.arange(length)[:, None] - jnp.arange(length)[None]
    seen_PxP = (distance_PxP >= 0) & (distance_PxP < (count or length))
    wide = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhqc,bhnc->bhqn", q, _repeated(k, q), preferred_element_type=wide) * q.shape[-1] ** -0.5
    scores = jnp.where(seen_PxP[None, None], scores, -jnp.inf)
    logsumexp = jax.nn.logsumexp(scores, axis=-1) if logsumexp is None else logsumexp
    return jnp.exp(scores - logsumexp[..., None]), logsumexp


def _repeated(keys_BxKxPxC: jax.Array, q_BxHxPxC: jax.Array) -> jax.Array:
    return jnp.repeat(keys_BxKxPxC, q_BxHxPxC.shape[1] // keys_BxKxPxC.shape[1], axis=1)


def _forward_by_xla(q: jax.Array, k: jax.Array, v: jax.Array, count: int | None) -> tuple[jax.Array, jax.Array]:
    """What ``_forward`` computes."""
    weights, logsumexp = _weights(q, k, count, None)
    return jnp.einsum("bhqn,bhnc->bhqc", weights.astype(q.dtype), _repeated(v, q)), logsumexp


def _backward_by_xla(qkv: Three, known: Three, count: int | None) -> Three:
    """What ``_backward`` computes."""
    (q, k, v), (logsumexp, out, d_out) = qkv, known
    weights, _ = _weights(q, k, count, logsumexp)
    common = jnp.sum(d_out * out, axis=-1, keepdims=True)
    d_scores = weights * (jnp.einsum("bhqc,bhnc->bhqn", d_out, _repeated(v, q)) - common) * q.shape[-1] ** -0.5

    def by_kv_head(gradient_BxHxPxC: jax.Array) -> jax.Array:
        rows, _, length, width = gradient_BxHxPxC.shape
        return jnp.sum(gradient_BxHxPxC.reshape(rows, k.shape[1], -1, length, width), axis=2).astype(k.dtype)

    return (
        jnp.einsum("bhqn,bhnc->bhqc", d_scores, _repeated(k, q)).astype(q.dtype),
        by_kv_head(jnp.einsum("bhqn,bhqc->bhnc", d_scores, q)),
        by_kv_head(jnp.einsum("bhqn,bhqc->bhnc", weights, d_out)),
    )
