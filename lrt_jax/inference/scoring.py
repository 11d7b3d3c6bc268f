"""Scores of given text under true recurrence: for bits per byte and few-shot tasks."""

import jax
import jax.numpy as jnp
from flax import struct

from lrt_jax.inference import decode, prefill
from lrt_jax.inference.decode import PAD
from lrt_jax.model.model import Model
from lrt_jax.setup.config import DecodeConfig


class Scored(struct.PyTreeNode):
    """The losses of given text.

    Attributes:
      losses_BxT: each target's loss, nats; 0 where the token before it is PAD.
      refinements_B: see :class:`prefill.Prefilled`, as the next two; 0 where scored sequentially.
      residual_B: how far the source states are from their fixed point, at most.
      fallbacks_B: chunks computed sequentially because they did not converge.
    """

    losses_BxT: jax.Array
    refinements_B: jax.Array
    residual_B: jax.Array
    fallbacks_B: jax.Array


def score(
    model: Model,
    tokens_BxT: jax.Array,
    targets_BxT: jax.Array,
    config: DecodeConfig = DecodeConfig(),  # noqa: B008  frozen
    *,
    use_memory: bool = True,
) -> Scored:
    """The loss of each target given the tokens before it, with the memory.

    Args:
      tokens_BxT: int32 inputs; shorter rows have PAD on the left.
      targets_BxT: int32 targets; anything where the input is PAD.
      config: ``prefill`` says how: ``sequential``, which is exact, or ``fixed_point``.
      use_memory: False zeroes the memory that the model reads: for ablations.
    """
    rows, length = tokens_BxT.shape
    model = model.for_decoding()
    done = prefill.run(
        model,
        decode.start(model.config, rows, length),
        tokens_BxT,
        config,
        use_memory=use_memory,
        keep_hidden=True,
        from_start=True,
    )
    # The head's logits are the largest array: one chunk of columns at a time.
    pieces = [
        model.losses(done.hidden_BxNxD[:, begin : begin + config.chunk], targets_BxT[:, begin : begin + config.chunk])
        for begin in range(0, length, config.chunk)
    ]
    losses_BxT = jnp.where(tokens_BxT != PAD, jnp.concatenate(pieces, axis=1), 0.0)
    return Scored(losses_BxT, done.refinements_B, done.residual_B, done.fallbacks_B)
