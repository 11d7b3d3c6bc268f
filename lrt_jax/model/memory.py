"""Recurrent memory: the paper's equations (METHOD.md, "Recurrent memory").

γ, Uk, Uv and the gates are made in ``parameters._memory_table``, which also says the optimizer's group of each: γ is
trained by AdamW with ``optimizer.scalar_lr``, the others as matrices. ``model.block`` calls what is here.

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
    """What KV refresh starts from: keys and values of one layer (or of all, stacked), made under zero memory.

    A forward that reads memory returns the same of its own, for whoever looks at the gates (``evaluation.health``).

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


class Gates(NamedTuple):
    """One number for each position and KV head, [B, P, K, 1]; None where there is none of this kind.

    g_loc, of the layer's own keys and values; g_mem, of the memory; and g_ve, of value embeddings.
    """

    local: jax.Array | None = None
    memory: jax.Array | None = None
    value: jax.Array | None = None


def gates(h_BxPxD: jax.Array, memory_gate_cx2xK: jax.Array | None, value_gate_cxK: jax.Array | None) -> Gates:
    """g = 2 sigmoid(G h[:c]), which is 1 where the gate's weights are 0, as at initialization.

    Args:
      h_BxPxD: the layer's normed input.
      memory_gate_cx2xK: weights of g_loc and g_mem, or, as ``weights.by_layer`` may leave them, of g_ve as third; None
        in a model without memory projections.
      value_gate_cxK: weights of g_ve; None in a layer without value embeddings.
    """

    def opened(weight_cxGxK: jax.Array) -> list[jax.Array]:
        logits_BxPxGxK = linear(h_BxPxD[..., : len(weight_cxGxK)], weight_cxGxK)
        open_BxPxGxKx1 = (2 * jax.nn.sigmoid(logits_BxPxGxK))[..., None]
        return [open_BxPxGxKx1[:, :, kind] for kind in range(weight_cxGxK.shape[1])]

    local, recurrent, *value = (None, None) if memory_gate_cx2xK is None else opened(memory_gate_cx2xK)
    if value_gate_cxK is not None and not value:
        value = opened(value_gate_cxK[:, None])
    return Gates(local, recurrent, *value)


def project(memory_BxPxD: jax.Array, key_DxKxC: jax.Array, value_DxKxC: jax.Array) -> KV:
    """Uk m_{t-1} and Uv m_{t-1}, each [B, P, K, C]."""
    return KV(linear(memory_BxPxD, key_DxKxC), linear(memory_BxPxD, value_DxKxC))


def mix_keys_values(kv: KV, gates: Gates, projected: KV | None, value_embedding_BxPxKxC: jax.Array | None) -> KV:
    """KV projection, before RoPE and QK norm (METHOD.md, "Recurrent memory").

    k ← g_loc k + g_mem Uk m_{t-1};  v ← g_loc v + g_mem Uv m_{t-1} + g_ve VE[token].

    Args:
      kv: this layer's own k and v.
      gates: a term whose gate is None is not there.
      projected: Uk m_{t-1} and Uv m_{t-1}; None for zero memory.
      value_embedding_BxPxKxC: VE[token]; None in a layer without value embeddings.
    """
    k, v = kv
    if gates.local is not None:
        k, v = gates.local * k, gates.local * v
    if gates.memory is not None and projected is not None:
        k, v = k + gates.memory * projected.k, v + gates.memory * projected.v
    if gates.value is not None and value_embedding_BxPxKxC is not None:
        v = v + gates.value * value_embedding_BxPxKxC
    return KV(k, v)


def refresh(stale: Refreshable, projected: KV, rope_tables: tuple[Array, Array]) -> KV:
    """KV refresh (METHOD.md, "Training schedules"): keys and values under the latest memory, the layer not recomputed.

    Both are linear in the memory, so g_mem ⊙ U m is added to what they were under zero memory; k then passes
    RoPE and QK norm again. The result is heads first, as a buffer holds it.
    """
    k = rms_norm(rope(stale.k + stale.gate * projected.k, *rope_tables))
    return KV(k, stale.v + stale.gate * projected.v).heads_first
