"""Recurrent memory: the paper's equations (METHOD.md, "Recurrent memory").

m_t is the source state of position t; everything here reads m_{t-1}, already shifted. A memory of
``None`` is zero memory, and costs nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lrt_jax.model.layers import Array, linear, rms_norm, rope


class KV(NamedTuple):
    """Keys and values of one layer (or of all, stacked): [..., B, K, N, C] each in a buffer, and where they are
    made, positions before heads, [B, P, K, C]."""

    k: jax.Array
    v: jax.Array

    @property
    def heads_first(self) -> "KV":
        """[B, P, K, C] as [B, K, P, C]."""
        return KV(jnp.swapaxes(self.k, -3, -2), jnp.swapaxes(self.v, -3, -2))


class Refreshable(NamedTuple):
    """What KV refresh starts from: keys and values of one layer (or of all, stacked) under zero memory.

    Attributes:
      k: gated, before RoPE and QK norm: [..., B, P, K, C].
      v: gated, value embeddings included.
      gate: g_mem, [..., B, P, K, 1].
    """

    k: jax.Array
    v: jax.Array
    gate: jax.Array


def shift_right(states_BxTxD: jax.Array) -> jax.Array:
    """m_{t-1} for every t, from the states m_t in natural order; m_{-1} = 0."""
    return jnp.pad(states_BxTxD[:, :-1], ((0, 0), (1, 0), (0, 0)))


def mix_residual(
    x_BxPxD: jax.Array,
    x0_BxPxD: jax.Array,
    memory_BxPxD: jax.Array | None,
    alpha: jax.Array | None,
    beta: jax.Array | None,
    gamma: jax.Array | None,
) -> jax.Array:
    """Residual injection: α x + β x⁰ + γ m_{t-1}; a scalar that is None drops its factor or its term."""
    wide = jnp.promote_types(x_BxPxD.dtype, jnp.float32)
    mixed = x_BxPxD.astype(wide)
    if alpha is not None:
        mixed = alpha.astype(wide) * mixed
    if beta is not None:
        mixed += beta.astype(wide) * x0_BxPxD.astype(wide)
    if gamma is not None and memory_BxPxD is not None:
        mixed += gamma.astype(wide) * memory_BxPxD.astype(wide)
    return mixed.astype(x_BxPxD.dtype)


def gates(h_BxPxD: jax.Array, gate_cxGxK: jax.Array) -> list[jax.Array]:
    """2 sigmoid(G h[:c]): for each of the G kinds, one number per position and KV head, [B, P, K, 1].

    They are 1 where the gate's weights are 0, as at initialization.
    """
    h_BxPxc = h_BxPxD[..., : gate_cxGxK.shape[0]]
    logits_BxPxGxK = linear(h_BxPxc, gate_cxGxK)
    open_BxPxGxKx1 = (2 * jax.nn.sigmoid(logits_BxPxGxK))[..., None]
    return [open_BxPxGxKx1[:, :, kind] for kind in range(gate_cxGxK.shape[1])]


def project(memory_BxPxD: jax.Array, key_DxKxC: jax.Array, value_DxKxC: jax.Array) -> KV:
    """Uk m_{t-1} and Uv m_{t-1}, each [B, P, K, C]."""
    return KV(linear(memory_BxPxD, key_DxKxC), linear(memory_BxPxD, value_DxKxC))


def mix_keys_values(
    kv: KV,
    h_BxPxD: jax.Array,
    memory_gate_cx2xK: jax.Array | None,
    projected: KV | None,
    value_gate_cxK: jax.Array | None,
    value_embedding_BxPxKxC: jax.Array | None,
) -> tuple[KV, jax.Array | None]:
    """KV projection, before RoPE and QK norm (METHOD.md, "Recurrent memory").

    k ← g_loc ⊙ k + g_mem ⊙ Uk m_{t-1};  v ← g_loc ⊙ v + g_mem ⊙ Uv m_{t-1} + g_ve ⊙ VE[token].

    Args:
      kv: this layer's own k and v.
      h_BxPxD: the layer's normed input, which the gates read.
      memory_gate_cx2xK: weights of g_loc and g_mem, or, as ``parameters.by_layer`` may leave them, of g_ve as third;
        None in a model without memory projections.
      projected: Uk m_{t-1} and Uv m_{t-1}; None for zero memory.
      value_gate_cxK: weights of g_ve; None, with the next, in a layer without value embeddings.
      value_embedding_BxPxKxC: VE[token].

    Returns:
      The mixed k and v, and g_mem as [B, P, K, 1], None in a model without memory projections.
    """
    k, v = kv
    recurrent, embedded = None, []
    if memory_gate_cx2xK is not None:
        local, recurrent, *embedded = gates(h_BxPxD, memory_gate_cx2xK)
        k, v = local * k, local * v
        if projected is not None:
            k, v = k + recurrent * projected.k, v + recurrent * projected.v
    if value_gate_cxK is not None and value_embedding_BxPxKxC is not None:
        embedded = embedded or gates(h_BxPxD, value_gate_cxK[:, None])
        v = v + embedded[0] * value_embedding_BxPxKxC
    return KV(k, v), recurrent


def refresh(stale: Refreshable, projected: KV, rope_tables: tuple[Array, Array]) -> KV:
    """KV refresh (METHOD.md, "Training schedules"): keys and values under the latest memory, the layer not recomputed.

    Both are linear in the memory, so g_mem ⊙ U m is added to what they were under zero memory; k then passes
    RoPE and QK norm again. The result is heads first, as a buffer holds it.
    """
    k = rms_norm(rope(stale.k + stale.gate * projected.k, *rope_tables))
    return KV(k, stale.v + stale.gate * projected.v).heads_first
