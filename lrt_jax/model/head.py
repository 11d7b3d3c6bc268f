"""From logits to losses."""

import jax
import jax.numpy as jnp

# Logits up to here need no shift: e⁴⁰ and e⁻⁴⁰, times any vocabulary, are normal numbers in float32.
UNSHIFTED = 40.0


def cross_entropy(logits: jax.Array, targets: jax.Array, softcap: float) -> jax.Array:
    """Cross entropy in nats of int targets [...] under logits [..., V] that are within ±``softcap``.

    As far as the cap allows, exponentials are taken as they are. Subtracting the largest logit first would mean to
    look for it: a pass of its own over all logits, the largest array there is (docs/LOG.md).

    The target's logit is selected by comparison: a gather's gradient is a scatter, which the CPU backend
    runs element by element (docs/LOG.md).
    """
    vocabulary_V = jnp.arange(logits.shape[-1]).reshape((1,) * targets.ndim + (-1,))
    chosen = jnp.sum(jnp.where(vocabulary_V == targets[..., None], logits, 0), axis=-1)
    if softcap > UNSHIFTED:
        return jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) - chosen
