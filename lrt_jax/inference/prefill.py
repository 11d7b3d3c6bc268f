"""Prefill: from a prompt to the state after it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrt_jax.inference import decode
from lrt_jax.inference.decode import PAD, DecodeState
from lrt_jax.model.decoder import Decoder


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


def sequential(
    decoder: Decoder, params: Any, state: DecodeState, tokens_BxN: jax.Array, *, use_memory: bool = True
) -> tuple[DecodeState, jax.Array]:
    """Exact prefill, one recurrent step per token.

    Args:
      decoder: the model.
      params: its parameters.
      state: from :func:`decode.start`, or after earlier tokens.
      tokens_BxN: int32 prompts, padded on the left with PAD.
      use_memory: False zeroes the memory that the model reads.

    Returns:
      The state after the prompts, and the logits of the tokens that follow, [B, V].
    """

    def advance(carry: tuple[DecodeState, jax.Array], tokens_B: jax.Array) -> Any:
        state, logits_BxV = decode.step(decoder, params, carry[0], tokens_B, use_memory=use_memory)
        return (state, logits_BxV), None

    logits = jax.eval_shape(lambda: decode.step(decoder, params, state, tokens_BxN[:, 0])[1])
    carry = (state, jnp.zeros(logits.shape, logits.dtype))
    (state, logits_BxV), _ = lax.scan(advance, carry, tokens_BxN.T)
    return state, logits_BxV
