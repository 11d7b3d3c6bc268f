"""Tokens looked up: x⁰ and value embeddings, for one forward or for several at once.

The gradient of a lookup is a whole table. Forwards that look tokens up together share one, where each would
else fill its own, most of it with zeros.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from lrt_jax.model import layers
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.weights import cut
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import ModelConfig


class Embedded(NamedTuple):
    """Tokens looked up: what a forward needs of them.

    Attributes:
      x0_BxPxD: x⁰ = norm(E[token]).
      values_ExBxPxKxC: VE[token] of the E layers that have a table: a tuple, or stacked where layers are scanned; None
        without value embeddings.
      x_BxPxD: the residual stream below the layers that read memory (:meth:`decoder.Decoder.below`), where it is known;
        None: not yet.
    """

    x0_BxPxD: jax.Array
    values_ExBxPxKxC: Any
    x_BxPxD: jax.Array | None = None


def embed(
    config: ModelConfig,
    mesh: Mesh | None,
    parameters: Mapping[str, Any],
    *tokens_BxP: jax.Array,
    columns: str | None = None,
) -> list[Embedded]:
    """Looks up the int tokens [B, P] of several forwards, each with a P of its own; ``columns`` as in ``Decoder``."""
    tables = (parameters["embedding"], parameters.get("value_embedding"))
    x0, values = _at_once(mesh, columns, *tables, tokens_BxP, compute_dtype(config))
    if not config.scan_layers:
        values = [own if own is None else cut(own) for own in values]
    return [Embedded(layers.rms_norm(x0_BxPxD), own) for x0_BxPxD, own in zip(x0, values, strict=True)]


# Of each forward: what is looked up for x⁰ [B, P, D], and of E tables [E, B, P, K, C], or None.
Found = tuple[list[jax.Array], list[Any]]


def _at_once(
    mesh: Mesh | None,
    columns: str | None,
    embedding_VxD: jax.Array,
    values_ExVxKxC: Any,
    tokens: tuple[jax.Array, ...],
    dtype: jnp.dtype,
) -> Found:
    """One lookup of all tokens in all tables, cut up afterwards."""
    tokens_BxP = jnp.concatenate(tokens, axis=1)
    edges = np.cumsum([rows.shape[1] for rows in tokens])[:-1]
    wanted = tokens_BxP if columns is None else lax.all_gather(tokens_BxP, columns)  # of one device, or of N

    def look_up(table: jax.Array, axis: int, *axes: str | None) -> jax.Array:
        # Where a table's last axis lies, all rows of the batch are looked up in that part of it, and only then
        # do rows and columns change places, so that table and gradient need not travel (with constraints alone, the
        # partitioner sends them all the same where a device has many rows; docs/LOG.md).
        if columns is not None:
            each = functools.partial(_of_all_columns, tokens_NxBxP=wanted, columns=columns, dtype=dtype)
            return each(table) if axis == 0 else lax.map(each, table)
        return meshes.constrain(mesh, jnp.take(table, wanted, axis=axis).astype(dtype), *axes)

    x0_BxPxD = look_up(embedding_VxD, 0, "looked_up", "sequence", "embed")
    x0 = jnp.split(meshes.constrain(mesh, x0_BxPxD, "batch", "sequence", None), edges, axis=1)
    if values_ExVxKxC is None:
        return x0, [None] * len(tokens)
    values_ExBxPxKxC = look_up(values_ExVxKxC, 1, None, "looked_up", "sequence", None, "value")
    values_ExBxPxKxC = meshes.constrain(mesh, values_ExBxPxKxC, None, "batch", "sequence", "kv_heads", None)
    return x0, jnp.split(values_ExBxPxKxC, edges, axis=2)


def _of_all_columns(table: jax.Array, tokens_NxBxP: jax.Array, columns: str, dtype: jnp.dtype) -> jax.Array:
    """What ``_at_once`` says, by hand: ``table`` has some of the last axis, and this device is to have its own rows.

    All behind the first axis, that of the vocabulary, is one axis meanwhile: a device's part of a head is narrower than
    a TPU's vectors, which would be filled with nothing (27 instead of 7 GiB at depth 12; docs/SCALING.md).
    """
    found = jnp.take(table.reshape(len(table), -1), tokens_NxBxP, axis=0).astype(dtype)
    found = lax.all_to_all(found, columns, split_axis=0, concat_axis=0)  # N are devices' columns now
    parts = jnp.moveaxis(found.reshape(*tokens_NxBxP.shape, *table.shape[1:]), 0, -2)
    return parts.reshape(*parts.shape[:-2], -1)
