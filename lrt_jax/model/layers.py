"""Norm, rotary position embedding and MLP: the parts of a layer that know nothing of memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lrt_jax.model.backend import target

# Constants of a program may be NumPy's.
Array = jax.Array | np.ndarray


def rms_norm(x: jax.Array) -> jax.Array:
    """RMS norm over the last axis, without parameters (METHOD.md, "Backbone").

    Computed in float32 or wider; the result has the dtype of ``x``. ε is the machine epsilon of the
    dtype computed in, as in the reference.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + jnp.finfo(wide.dtype).eps)
    return (wide * scale).astype(x.dtype)


def rope_tables(positions_BxP: Array, head_width: int, base: float, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Cosine and sine of the rotary angles: two arrays [B, P, 1, C/2], in float32 or wider.

    Positions that are a NumPy array give constants. On a CPU, XLA would compute both again for every element of every
    head in every layer, forward and backward: 1.9 ms instead of 0.1 ms for [4, 512, 6, 64] (docs/LOG.md).
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    known = isinstance(positions_BxP, np.ndarray) and target().platform == "cpu"
    xp = np if known else jnp
    exponents = xp.arange(0, head_width, 2, dtype=wide) / head_width
    angles = positions_BxP[:, :, None, None].astype(wide) * (base**-exponents)[None, None, None, :]
    return xp.cos(angles), xp.sin(angles)


def rope(x_BxPxHxC: jax.Array, cos: Array, sin: Array) -> jax.Array:
    """Rotates channel i with channel i + C/2: (x1 cos + x2 sin, -x1 sin + x2 cos)."""
    x1, x2 = jnp.split(x_BxPxHxC.astype(cos.dtype), 2, axis=-1)
    rotated = jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)
    return rotated.astype(x_BxPxHxC.dtype)


def linear(x_BxPxI: jax.Array, weight: jax.Array, inputs: int = 1) -> jax.Array:
    """x W over the last ``inputs`` axes of x and the first of W, as one matrix product, [B, P, *outputs].

    Flattened by hand for a CPU, whose backend copies transposed operands in the gradient of a product with several
    batch axes (measured in docs/LOG.md: up to 3.4 times the time, forward and backward). Elsewhere
    nothing is flattened: rows and positions may be sharded both, and no sharding of their product says so.
    """
    weight = weight.astype(x_BxPxI.dtype)
    rows = x_BxPxI.ndim - inputs
    if target().platform != "cpu":
        contracted = (tuple(range(rows, x_BxPxI.ndim)), tuple(range(inputs)))
        return jax.lax.dot_general(x_BxPxI, weight, (contracted, ((), ())))
    size = math.prod(weight.shape[:inputs])
    flat = x_BxPxI.reshape(-1, size) @ weight.reshape(size, -1)
    return flat.reshape(*x_BxPxI.shape[:rows], *weight.shape[inputs:])


def mlp(x_BxPxD: jax.Array, in_DxF: jax.Array, out_FxD: jax.Array) -> jax.Array:
    """W2 relu(W1 x)², without biases."""
    return linear(jnp.square(jax.nn.relu(linear(x_BxPxD, in_DxF))), out_FxD)
