"""Layers that are computed again for the backward pass, and gradients that are added up as they come.

What several forwards read has a gradient from each. Left alone, XLA adds them all in the end, and what the transpose of
``lax.scan`` makes of them is a stack of all layers each time: memory that grows with the number of forwards
(docs/LOG.md). Here a forward hands on what the next one reads, too, so that in the backward pass the sum of the
gradients so far comes in at that place. Scanned layers add their own to it in place.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_vjp
def summed(weight: jax.Array) -> jax.Array:
    """The weight for the next forward: its gradient is there before that of this forward is added to it."""
    return weight


summed.defvjp(lambda weight: (weight, None), lambda _, gradient: (lax.optimization_barrier(gradient),))

# (what has no gradient, what all layers share, x, one layer's own) to (x, what else the layer computes).
Layer = Callable[[Any, Any, jax.Array, Any], tuple[jax.Array, Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def scan(
    layer: Layer, source: int, known: tuple[Any, Any], shared: Any, x_BxPxD: jax.Array, read: Any, own: Any
) -> tuple[jax.Array, jax.Array, Any, Any]:
    """All L layers in turn.

    Args:
      layer: of ``known``, ``shared``, x and a pair of one layer's ``read`` and ``own``; it must not close over arrays
        that are traced.
      source: the source layer.
      known: what has no gradient: for all layers, and stacked by layer.
      shared: what all layers of this forward share.
      x_BxPxD: the residual stream that the first layer reads.
      read: stacked by layer, what other forwards read, too.
      own: stacked by layer, what only this forward reads.

    Returns:
      The last layer's x and the source layer's, what else layers computed as stacks, and ``read``, as it was, for the
      next forward.
    """
    x_BxPxD, source_BxPxD, computed, _ = _forward(layer, source, known, shared, x_BxPxD, read, own)
    return x_BxPxD, source_BxPxD, computed, read


def _forward(
    layer: Layer, source: int, known: tuple[Any, Any], shared: Any, x_BxPxD: jax.Array, read: Any, own: Any
) -> tuple[jax.Array, jax.Array, Any, jax.Array]:
    """As ``scan``, and last what each layer was given, [L, B, P, D]."""

    def step(x_BxPxD: jax.Array, each: Any) -> Any:
        by_layer, *arrays = each
        after_BxPxD, computed = layer((known[0], by_layer), shared, x_BxPxD, tuple(arrays))
        return after_BxPxD, (x_BxPxD, computed)

    x_BxPxD, (given_LxBxPxD, computed) = lax.scan(step, x_BxPxD, (known[1], read, own))
    source_BxPxD = x_BxPxD if source == len(given_LxBxPxD) - 1 else given_LxBxPxD[source + 1]
    return x_BxPxD, source_BxPxD, computed, given_LxBxPxD


def _scan_forward(
    layer: Layer, source: int, known: tuple[Any, Any], shared: Any, x_BxPxD: jax.Array, read: Any, own: Any
) -> tuple[Any, Any]:
    x_BxPxD, source_BxPxD, computed, given_LxBxPxD = _forward(layer, source, known, shared, x_BxPxD, read, own)
    return (x_BxPxD, source_BxPxD, computed, read), (known, shared, given_LxBxPxD, read, own)


def _scan_backward(layer: Layer, source: int, kept: tuple[Any, ...], gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    known, shared, given_LxBxPxD, read, own = kept
    last_BxPxD, source_BxPxD, computed, total = gradients
    indices_L = jnp.arange(len(given_LxBxPxD))

    def step(carry: Any, each: Any) -> Any:
        after_BxPxD, total_shared, total = carry
        index, by_layer, x_BxPxD, own, computed = each
        after_BxPxD = after_BxPxD + jnp.where(index == source, source_BxPxD, 0)
        mine = jax.tree.map(lambda stack: _one_of(stack, index), read)
        _, back = jax.vjp(
            lambda shared, x_BxPxD, read, own: layer((known[0], by_layer), shared, x_BxPxD, (read, own)),
            shared,
            x_BxPxD,
            mine,
            own,
        )
        of_shared, before_BxPxD, of_read, of_own = back((after_BxPxD, computed))
        total = jax.tree.map(lambda stack, one: _added(stack, one, index), total, of_read)
        return (before_BxPxD, jax.tree.map(jnp.add, total_shared, of_shared), total), of_own

    nothing = jax.tree.map(jnp.zeros_like, shared)
    (first_BxPxD, of_shared, total), of_own = lax.scan(
        step, (last_BxPxD, nothing, total), (indices_L, known[1], given_LxBxPxD, own, computed), reverse=True
    )
    return None, of_shared, first_BxPxD, total, of_own


def _one_of(stack: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(stack, index, keepdims=False)


def _added(stack: jax.Array, one: jax.Array, index: jax.Array) -> jax.Array:
    """``stack`` with ``one`` added to what is at ``index``; not a scatter, which may not be in place."""
    return lax.dynamic_update_index_in_dim(stack, _one_of(stack, index) + one, index, axis=0)


scan.defvjp(_scan_forward, _scan_backward)
