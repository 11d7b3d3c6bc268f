"""From logits to losses."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy in nats of int targets [...] under logits [..., V].

    The target's logit is selected by comparison: a gather's gradient is a scatter, which the CPU backend
    runs element by element (docs/LOG.md).
    """
    vocabulary_V = jnp.arange(logits.shape[-1]).reshape((1,) * targets.ndim + (-1,))
    chosen = jnp.sum(jnp.where(vocabulary_V == targets[..., None], logits, 0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - chosen
