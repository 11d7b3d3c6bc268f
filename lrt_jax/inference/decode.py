"""Decoding with the memory: the state that decoding carries, and one recurrent step.

Evaluation and generation share this path: whatever is scored or sampled uses the recurrent memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lrt_jax.model.attention import EMPTY
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.decoder import Buffer, Decoder, empty_buffer
from lrt_jax.model.head import cross_entropy
from lrt_jax.setup.config import ModelConfig

# Stands where a row has no token: rows of unequal length are padded on the left.
PAD = -1


class DecodeState(struct.PyTreeNode):
    """Everything that decoding B rows carries from one token to the next.

    Attributes:
      buffer: the KV cache, N slots a row.
      memory_BxD: m_{t-1}, the source state of each row's last token; 0 before its first.
      position_B: int32, the position of each row's next token.
      slot: int32 scalar, the cache slot of the next token, the same in all rows.
    """

    buffer: Buffer
    memory_BxD: jax.Array
    position_B: jax.Array
    slot: jax.Array


def start(config: ModelConfig, rows: int, slots: int) -> DecodeState:
    """The state before the first token: B = ``rows``, room for N = ``slots`` tokens a row, padding included."""
    return DecodeState(
        buffer=empty_buffer(config, rows, slots),
        memory_BxD=jnp.zeros((rows, config.width), compute_dtype(config)),
        position_B=jnp.zeros((rows,), jnp.int32),
        slot=jnp.zeros((), jnp.int32),
    )


def step(
    decoder: Decoder, params: Any, state: DecodeState, tokens_B: jax.Array, *, use_memory: bool = True
) -> tuple[DecodeState, jax.Array]:
    """One forward for one token per row (method.md, "Sequential decoding").

    Args:
      decoder: the model.
      params: its parameters.
      state: after the tokens before.
      tokens_B: int32, the next token of each row, or PAD in rows that have not begun.
      use_memory: False zeroes the memory that the model reads: for ablations.

    Returns:
      The state after the token, and the logits of the token that follows, [B, V] float32 or wider.
    """
    begun_B = tokens_B != PAD
    positions_Bx1 = jnp.where(begun_B, state.position_B, EMPTY)[:, None]
    tokens_Bx1 = jnp.where(begun_B, tokens_B, 0)[:, None]
    memory_Bx1xD = state.memory_BxD[:, None] if use_memory else None
    out = decoder.apply({"params": params}, tokens_Bx1, positions_Bx1, memory_Bx1xD, state.buffer, state.slot)
    logits_Bx1xV = decoder.apply({"params": params}, out.hidden_BxPxD, method=Decoder.logits)
    after = DecodeState(
        buffer=out.buffer,
        memory_BxD=jnp.where(begun_B[:, None], out.source_BxPxD[:, 0], 0),
        position_B=state.position_B + begun_B,
        slot=state.slot + 1,
    )
    return after, logits_Bx1xV[:, 0]


def score(
    decoder: Decoder, params: Any, tokens_BxT: jax.Array, targets_BxT: jax.Array, *, use_memory: bool = True
) -> jax.Array:
    """The loss of each target under true recurrence, token by token: [B, T] nats."""
    rows, length = tokens_BxT.shape

    def advance(state: DecodeState, column: tuple[jax.Array, jax.Array]) -> tuple[DecodeState, jax.Array]:
        state, logits_BxV = step(decoder, params, state, column[0], use_memory=use_memory)
        return state, cross_entropy(logits_BxV, column[1])

    state = start(decoder.config, rows, length)
    _, losses_TxB = lax.scan(advance, state, (tokens_BxT.T, targets_BxT.T))
    return losses_TxB.T
