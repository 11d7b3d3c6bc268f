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
    raw = softcap * np.random.default_rng(0).normal(size=(3, vocabulary))
    if kind.startswith("all"):
        raw = np.full_like(raw, -3 * softcap if kind == "all lowest" else 3 * softcap)
    if kind == "target lowest":
        raw[:, :] = 3 * softcap
        raw[np.arange(3), targets] = -3 * softcap

    def of(function, dtype):
        losses, back = jax.vjp(lambda raw: function(raw, jnp.asarray(targets)), jnp.asarray(raw, dtype))
        return losses, back(jnp.arange(1, 4, dtype=losses.dtype))[0]

    def reference(raw, targets):
        return optax.softmax_cross_entropy_with_integer_labels(softcap * jnp.tanh(raw / softcap), targets)

    found, gradient = of(lambda *arguments: cross_entropy(*arguments, softcap), jnp.float32)
    with jax.enable_x64(True):
        expected, expected_gradient = of(reference, jnp.float64)
        exact = of(lambda *arguments: cross_entropy(*arguments, softcap), jnp.float64)
    assert found.dtype == gradient.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6 * softcap)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(exact[0], expected, rtol=1e-13)
    np.testing.assert_allclose(exact[1], expected_gradient, rtol=1e-10, atol=1e-16)


def test_what_is_kept_of_logits_is_what_the_product_left():
    """No float32 array of the logits' size waits for the backward pass."""
    raw, targets = jax.ShapeDtypeStruct((2, 8, 64), jnp.bfloat16), jax.ShapeDtypeStruct((2, 8), jnp.int32)
    back = jax.eval_shape(
        lambda raw, targets: jax.vjp(lambda raw: cross_entropy(raw, targets, 15.0), raw)[1], raw, targets
    )
    assert [leaf.dtype for leaf in jax.tree.leaves(back) if leaf.size >= 2 * 8 * 64] == [jnp.bfloat16]
