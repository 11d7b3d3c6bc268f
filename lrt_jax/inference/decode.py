"""Decoding with the memory: the state that decoding carries, and one recurrent step.

Evaluation and generation share this path: whatever is scored or sampled uses the recurrent memory.
"""

import jax
import jax.numpy as jnp
from flax import struct

from lrt_jax.model import cache as caches
from lrt_jax.model.attention import EMPTY
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.buffer import Buffer
from lrt_jax.model.cache import Cache
from lrt_jax.model.decoder import Forward
from lrt_jax.model.model import Model
from lrt_jax.setup.config import ModelConfig

# Stands where a row has no token and rests: before a prompt shorter than others, or after its text has ended.
PAD = -1


class DecodeState(struct.PyTreeNode):
    """Everything that decoding B rows carries from one token to the next. Rows know nothing of each other.

    Attributes:
      cache: keys and values of the tokens so far; short layers keep T/2 of them.
      memory_BxD: m_{t-1}, the source state of each row's last token; 0 before its first.
      key_B: each row's random key. Position t draws with ``fold_in(key, t)``, so that a row's text depends on its
        seed and prompt, and on nothing else in the batch.
    """

    cache: Cache
    memory_BxD: jax.Array
    key_B: jax.Array

    @property
    def position_B(self) -> jax.Array:
        """int32, the position of each row's next token."""
        return self.cache.position_B


def start(config: ModelConfig, rows: int, slots: int, seeds_B: jax.Array | None = None) -> DecodeState:
    """The state before the first token of B = ``rows`` rows, which may get ``slots`` tokens each, PAD not counted.

    Each row has a seed, uint32; None: 0 for all.
    """
    seeds_B = jnp.zeros((rows,), jnp.uint32) if seeds_B is None else seeds_B
    return DecodeState(
        cache=caches.empty_cache(config, rows, slots),
        memory_BxD=jnp.zeros((rows, config.width), compute_dtype(config)),
        key_B=jax.vmap(jax.random.key)(seeds_B),
    )


def positions_of(state: DecodeState, tokens_BxP: jax.Array) -> jax.Array:
    """The positions of each row's next tokens, EMPTY for PAD: int32 [B, P]."""
    begun_BxP = tokens_BxP != PAD
    places_BxP = state.position_B[:, None] + jnp.cumsum(begun_BxP, axis=1, dtype=jnp.int32) - 1
    return jnp.where(begun_BxP, places_BxP, EMPTY)


def forward(
    model: Model,
    state: DecodeState,
    tokens_BxP: jax.Array,
    memory_BxPxD: jax.Array | None,
    positions_BxP: jax.Array,
    buffer: Buffer | None = None,
    subset: int = 0,
    *,
    from_start: bool = False,
) -> Forward:
    """One forward for each row's next tokens, PAD among them only before others; the state stays as it was.

    Args:
      model: as in :func:`step`, as the next.
      state: after the tokens before.
      tokens_BxP: int32.
      memory_BxPxD: m_{t-1} of each token; None is zero memory.
      positions_BxP: of :func:`positions_of`.
      buffer: keys and values of all the next tokens, of which these are strided subset ``subset``; None: these are all.
      from_start: the state is that of :func:`start`, so there is nothing in its cache.

    Returns:
      The forward, whose buffer holds the next tokens' keys and values.
    """
    length = tokens_BxP.shape[1]
    subsets = 1 if buffer is None else buffer.positions_BxN.shape[1] // length
    out, _ = model.unrolled(
        jnp.where(tokens_BxP != PAD, tokens_BxP, 0),
        positions_BxP,
        memory_BxPxD,
        buffer,
        subset * length,
        past=None if from_start else state.cache,
        # Where PAD is only before other tokens, columns are apart as far as positions are.
        subsets=subsets if from_start else None,
        ragged=True,
    )
    return out


def absorb(state: DecodeState, out: Forward, positions_BxP: jax.Array) -> DecodeState:
    """The state after the tokens of a :func:`forward`; rows whose last column is PAD keep their memory."""
    last_Bx1 = positions_BxP[:, -1:] != EMPTY
    return DecodeState(
        cache=caches.write(state.cache, out.buffer.pieces[0], _once_computed(positions_BxP, out.hidden_BxPxD)),
        memory_BxD=jnp.where(last_Bx1, out.source_BxPxD[:, -1], state.memory_BxD),
        key_B=state.key_B,
    )


def _once_computed(positions_BxP: jax.Array, hidden_BxPxD: jax.Array) -> jax.Array:
    """The positions, which nobody knows before the hidden states: no maximum is below -∞.

    So XLA writes into the cache after all layers have read it, in place. Otherwise it copies the whole cache for each
    token, so that writes and reads can go side by side (docs/LOG.md); it takes barriers away before it decides.
    """
    never_B = jnp.max(hidden_BxPxD, axis=(1, 2)) < -jnp.inf
    return positions_BxP + never_B[:, None].astype(positions_BxP.dtype)


def advance(
    model: Model, state: DecodeState, tokens_B: jax.Array, *, use_memory: bool = True
) -> tuple[DecodeState, jax.Array]:
    """:func:`step` up to the head: the state after one token per row, and its hidden state, [B, D]."""
    memory_Bx1xD = state.memory_BxD[:, None] if use_memory else None
    positions_Bx1 = positions_of(state, tokens_B[:, None])
    out = forward(model, state, tokens_B[:, None], memory_Bx1xD, positions_Bx1)
    return absorb(state, out, positions_Bx1), out.hidden_BxPxD[:, 0]


def step(
    model: Model, state: DecodeState, tokens_B: jax.Array, *, use_memory: bool = True
) -> tuple[DecodeState, jax.Array]:
    """One forward for one token per row (METHOD.md, "Decoding and evaluation").

    Args:
      model: the model, best as ``Model.for_decoding`` leaves it.
      state: after the tokens before.
      tokens_B: int32, the next token of each row, or PAD in rows that rest: their state stays as it is.
      use_memory: False zeroes the memory that the model reads: for ablations.

    Returns:
      The state after the token, and the logits of the token that follows, [B, V] float32 or wider.
    """
    state, hidden_BxD = advance(model, state, tokens_B, use_memory=use_memory)
    return state, model.logits(hidden_BxD[:, None])[:, 0]
