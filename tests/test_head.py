"""Losses from logits, at the ends of what the softcap allows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lrt_jax.model.head import UNSHIFTED, cross_entropy


@pytest.mark.parametrize("softcap", [1.0, 15.0, UNSHIFTED, 100.0])
@pytest.mark.parametrize("kind", ["drawn", "all lowest", "all highest", "target lowest"])
def test_losses_and_gradients_are_those_of_softmax(softcap, kind):
    vocabulary, targets = 50_000, np.array([0, 49_999, 7])
    logits = np.clip(softcap * np.random.default_rng(0).normal(size=(3, vocabulary)), -softcap, softcap)
    if kind.startswith("all"):
        logits = np.full_like(logits, -softcap if kind == "all lowest" else softcap)
    if kind == "target lowest":
        logits[:, :] = softcap
        logits[np.arange(3), targets] = -softcap

    def of(function, dtype):
        arguments = jnp.asarray(logits, dtype), jnp.asarray(targets)
        losses, back = jax.vjp(lambda logits: function(logits, arguments[1]), arguments[0])
        return losses, back(jnp.ones_like(losses))[0]

    found, gradient = of(lambda *arguments: cross_entropy(*arguments, softcap), jnp.float32)
    with jax.enable_x64(True):
        expected, expected_gradient = of(optax.softmax_cross_entropy_with_integer_labels, jnp.float64)
    assert found.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6 * softcap)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-9)
