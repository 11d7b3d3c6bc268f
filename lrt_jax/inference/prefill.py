"""Prefill: from given tokens to the state after them, token by token or by fixed-point refinement.

Both give the hidden state of every token too, so that given text is scored the same way (``scoring.py``).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from lrt_jax.inference import decode, refinement
from lrt_jax.inference.decode import PAD, DecodeState
from lrt_jax.inference.refinement import Chunk, Guess
from lrt_jax.method import partitions
from lrt_jax.model.model import Model
from lrt_jax.setup.config import DecodeConfig


class Prefilled(struct.PyTreeNode):
    """The state after a prompt, and how it came about.

    Attributes:
      state: after the prompt.
      hidden_BxNxD: h_final of its tokens, or of the last alone (N = 1) where no more was asked for.
      refinements_B: int32, full forwards fed source states, or sweeps, the most of any chunk; 0 where all was
        sequential.
      residual_B: largest change of any source state in the last of them, the largest of any chunk.
      fallbacks_B: int32, chunks that did not converge and were computed sequentially instead.
    """

    state: DecodeState
    hidden_BxNxD: jax.Array
    refinements_B: jax.Array
    residual_B: jax.Array
    fallbacks_B: jax.Array


def pad_left(rows: list[np.ndarray], length: int) -> np.ndarray:
    """Rows of tokens as one int32 array [B, ``length``], PAD before each row's first token.

    Raises:
      ValueError: a row is empty or longer than ``length``.
    """
    padded_BxN = np.full((len(rows), length), PAD, np.int32)
    for index, row in enumerate(rows):
        if not 0 < len(row) <= length:
            raise ValueError(f"prompt {index} has {len(row)} tokens; allowed are 1 to {length}")
        padded_BxN[index, length - len(row) :] = row
    return padded_BxN


def run(
    model: Model,
    state: DecodeState,
    tokens_BxN: jax.Array,
    config: DecodeConfig,
    *,
    use_memory: bool = True,
    keep_hidden: bool = False,
    from_start: bool = False,
) -> Prefilled:
    """Prefill as ``config.prefill`` says, in chunks of at most ``config.chunk`` tokens.

    Args:
      model: best as ``Model.for_decoding`` leaves it.
      state: from :func:`decode.start`, or after earlier tokens.
      tokens_BxN: int32 prompts, padded on the left with PAD.
      use_memory: False zeroes the memory that the model reads.
      keep_hidden: return the hidden states of all tokens, not of the last alone.
      from_start: ``state`` is that of :func:`decode.start`.
    """
    rows, length = tokens_BxN.shape
    if config.prefill == "sequential":
        state, hidden_BxNxD = sequential(model, state, tokens_BxN, use_memory, keep_hidden)
        none_B = jnp.zeros((rows,), jnp.int32)
        return Prefilled(state, hidden_BxNxD, none_B, jnp.zeros((rows,), hidden_BxNxD.dtype), none_B)

    chunks = -(-length // (config.chunk - config.chunk % config.subsets))
    size = -(-length // chunks)  # of equal chunks, so that little is padded
    size += -size % config.subsets
    padded_BxN = jnp.pad(tokens_BxN, ((0, 0), (chunks * size - length, 0)), constant_values=PAD)
    chunks_MxBxP = padded_BxN.reshape(rows, chunks, size).swapaxes(0, 1)

    def one(state: DecodeState, chunk_BxP: jax.Array, from_start: bool = False) -> tuple[DecodeState, Prefilled]:
        done = fixed_point(
            model, state, chunk_BxP, config, use_memory=use_memory, keep_hidden=keep_hidden, from_start=from_start
        )
        return done.state, done.replace(state=None)

    state, first = one(state, chunks_MxBxP[0], from_start)
    if chunks == 1:
        return first.replace(state=state, hidden_BxNxD=first.hidden_BxNxD[:, -length:])
    # Each chunk's fixed point is found given the cache of the chunks before: exact, in bounded memory.
    state, rest = lax.scan(one, state, chunks_MxBxP[1:])
    every = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)
    hidden_BxMxPxD = every.hidden_BxNxD.swapaxes(0, 1)
    hidden_BxNxD = hidden_BxMxPxD.reshape(rows, -1, hidden_BxMxPxD.shape[-1])[:, -length if keep_hidden else -1 :]
    return Prefilled(
        state=state,
        hidden_BxNxD=hidden_BxNxD,
        refinements_B=jnp.max(every.refinements_B, axis=0),
        residual_B=jnp.max(every.residual_B, axis=0),
        fallbacks_B=jnp.sum(every.fallbacks_B, axis=0),
    )


def sequential(
    model: Model, state: DecodeState, tokens_BxN: jax.Array, use_memory: bool = True, keep_hidden: bool = False
) -> tuple[DecodeState, jax.Array]:
    """Exact prefill, one recurrent step per token; first columns in which every row has PAD cost nothing.

    Returns:
      The state, and hidden states [B, N, D], those of such columns 0; or of the last token alone, [B, 1, D].
    """
    (rows, length), width = tokens_BxN.shape, state.memory_BxD.shape[-1]
    begun_N = jnp.any(tokens_BxN != PAD, axis=0)
    first = jnp.where(jnp.any(begun_N), jnp.argmax(begun_N), length)

    def body(index: jax.Array, carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        tokens_B = lax.dynamic_index_in_dim(tokens_BxN, index, axis=1, keepdims=False)
        after, hidden_BxD = decode.advance(model, carry[0], tokens_B, use_memory=use_memory)
        kept = index if keep_hidden else 0
        return after, lax.dynamic_update_index_in_dim(carry[1], hidden_BxD, kept, axis=0)

    hidden_NxBxD = jnp.zeros((length if keep_hidden else 1, rows, width), state.memory_BxD.dtype)
    state, hidden_NxBxD = lax.fori_loop(first, length, body, (state, hidden_NxBxD))
    return state, hidden_NxBxD.swapaxes(0, 1)


def fixed_point(
    model: Model,
    state: DecodeState,
    tokens_BxP: jax.Array,
    config: DecodeConfig,
    *,
    use_memory: bool = True,
    keep_hidden: bool = True,
    from_start: bool = False,
) -> Prefilled:
    """Prefill of one chunk by fixed-point refinement (METHOD.md, "Decoding and evaluation").

    A forward with zero memory, then refinements (``refinement.refined``) until no entry of any source state changes by
    more than ``config.tolerance``. Each makes one more token exact, or with S subsets S more, so that at tolerance 0 it
    ends, after at most P / S, with what :func:`sequential` computes. A row that has converged stays as it is while
    others go on, so its result does not depend on them. A row that has not converged after ``config.max_refinements``
    (0: no limit) is computed sequentially. Without memory one forward is exact.

    The arguments are those of :func:`run`; P is a multiple of ``config.subsets``.
    """
    length, recurrent = tokens_BxP.shape[1], model.config.recurrent and use_memory
    chunk = Chunk(
        model=model,
        state=state,
        tokens_BxP=tokens_BxP,
        positions_BxP=decode.positions_of(state, tokens_BxP),
        partition=partitions.strided(length, config.subsets),
        from_start=from_start,
    )
    needed_B = chunk.needed_B * recurrent
    most = chunk.needed_by(length)
    limit = min(config.max_refinements or most, most)

    def unfinished(guess: Guess) -> jax.Array:
        return ~(guess.residual_B <= config.tolerance) & (guess.refinements_B < needed_B)  # NaN has not converged

    guess = refinement.first(chunk, needed_B, zero_memory=not recurrent)
    if limit and recurrent:
        guess = lax.while_loop(
            lambda guess: jnp.any(unfinished(guess) & (guess.refinements_B < limit)),
            lambda guess: _choose(unfinished(guess), refinement.refined(chunk, guess), guess),
            guess,
        )
    diverged_B = unfinished(guess)
    out = refinement.in_order(chunk, guess)
    after = decode.absorb(state, out, chunk.positions_BxP)
    hidden_BxNxD = out.hidden_BxPxD if keep_hidden else out.hidden_BxPxD[:, -1:]
    if limit < most and recurrent:
        found = (after, hidden_BxNxD)
        exact = lambda: sequential(model, state, tokens_BxP, use_memory, keep_hidden)  # noqa: E731
        after, hidden_BxNxD = lax.cond(jnp.any(diverged_B), lambda: _choose(diverged_B, exact(), found), lambda: found)
    return Prefilled(after, hidden_BxNxD, guess.refinements_B, guess.residual_B, diverged_B.astype(jnp.int32))


def _choose(which_B: jax.Array, yes: Any, no: Any) -> Any:
    """Row by row: every leaf's first axis is B."""
    return jax.tree.map(lambda a, b: jnp.where(which_B.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)
