"""From what the head's matrix gives to logits and losses."""

import functools

import jax
import jax.numpy as jnp

# Logits up to here need no shift: e⁴⁰ and e⁻⁴⁰, times any vocabulary, are normal numbers in float32.
UNSHIFTED = 40.0


def softcapped(raw: jax.Array, softcap: float) -> jax.Array:
    """Logits: softcap · tanh(raw / softcap), in float32 or wider."""
    wide = raw.astype(jnp.promote_types(raw.dtype, jnp.float32))
    return softcap * jnp.tanh(wide / softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(raw: jax.Array, targets: jax.Array, softcap: float) -> jax.Array:
    """Cross entropy [...] of int targets under the logits :func:`softcapped` of raw [..., V]: nats, float32 or wider.

    Of all that is as large as the logits, the largest array there is, one is kept for the backward pass: ``raw``, in
    the dtype that the product left it in, or, where that is no narrower, the logits; the rest is computed again.

    As far as the cap allows, exponentials are taken as they are. Subtracting the largest logit first would mean to
    look for it: a pass of its own over all logits (docs/LOG.md).

    The target's logit is selected by comparison: a gather's gradient is a scatter, which the CPU backend
    runs element by element (docs/LOG.md).
    """
    return _forward(raw, targets, softcap)[0]


def _forward(
    raw: jax.Array, targets: jax.Array, softcap: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    logits = softcapped(raw, softcap)
    chosen = jnp.sum(jnp.where(_is_target(raw, targets), logits, 0), axis=-1)
    shifted = softcap > UNSHIFTED
    logsumexp = jax.nn.logsumexp(logits, axis=-1) if shifted else jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
    kept = raw if _narrower(raw) else logits
    return logsumexp - chosen, (kept, targets, logsumexp)


def _backward(
    softcap: float, kept: tuple[jax.Array, jax.Array, jax.Array], d_losses: jax.Array
) -> tuple[jax.Array, None]:
    kept_array, targets, logsumexp = kept
    logits = softcapped(kept_array, softcap) if _narrower(kept_array) else kept_array
    d_logits = d_losses[..., None] * (jnp.exp(logits - logsumexp[..., None]) - _is_target(logits, targets))
    return (d_logits * (1 - jnp.square(logits / softcap))).astype(kept_array.dtype), None


cross_entropy.defvjp(_forward, _backward)


def _narrower(raw: jax.Array) -> bool:
    """Whether it is narrower than logits are: they are float32 at least."""
    return raw.dtype.itemsize < 4


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    vocabulary_V = jnp.arange(logits.shape[-1]).reshape((1,) * targets.ndim + (-1,))
    return vocabulary_V == targets[..., None]
