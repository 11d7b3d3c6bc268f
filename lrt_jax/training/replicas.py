"""The gradient of a batch over many devices, with one gathering of weights and one sum of gradients a step.

Left to XLA's partitioner, every forward gathers the weights over ``fsdp``, and adds up its own gradients over rows:
1 + S times in an interleaved step. Here each device runs the whole schedule on its own rows, by itself. What that
needs beside: a copy of all weights in the dtype of activations, and their gradients in float32, until they are summed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lrt_jax.model import parameters, weights
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.decoder import Decoder
from lrt_jax.setup import mesh as meshes
from lrt_jax.training.guard import Gradient

ROWS = ("data", "fsdp")
TABLES = ("embedding", "value_embedding")


def gradient_of(decoder: Decoder, of_rows: Callable[[Decoder], Gradient]) -> Gradient:
    """The function ``(params, tokens_BxT, targets_BxT) -> (metrics, gradient)`` of the whole batch.

    Weights are gathered layer by layer, unless layers are scanned, so that the next ones can come while a layer
    computes; likewise gradients, which are summed in float32, or wider. Embedding tables, most of all parameters, stay
    where they are (``model.embedding``).

    Args:
      decoder: the model, on a mesh that shards just rows and parameters (``setup.mesh.gathers_once``).
      of_rows: makes the same function for a decoder on one device, and means over its rows.
    """
    config, mesh = decoder.config, decoder.mesh
    assert mesh is not None
    alone = decoder.clone(mesh=None, columns="fsdp" if mesh.shape["fsdp"] > 1 else None)
    gradient = of_rows(alone)
    axes = {name: spec.axes for name, spec in parameters.table(config).items()}
    stored = {name: nn.logical_to_mesh_axes(names, meshes.RULES) for name, names in axes.items()}

    def of_own_rows(params: Any, tokens_BxT: jax.Array, targets_BxT: jax.Array) -> tuple[Any, Any]:
        if config.scan_layers:
            return exchanged(params, axes, tokens_BxT, targets_BxT)
        layers, back = jax.vjp(lambda params: weights.by_layer(config, params), params)
        metrics, grads = exchanged(layers, weights.axes_by_layer(config), tokens_BxT, targets_BxT)
        return metrics, back(grads)[0]

    def exchanged(params: Any, axes: dict[str, Any], tokens_BxT: jax.Array, targets_BxT: jax.Array) -> tuple[Any, Any]:
        where = {
            name: None if name in TABLES else meshes.sharded_dimension(names, mesh.shape)
            for name, names in axes.items()
        }
        whole = weights.by_name(lambda name, shard: _gathered(shard, where[name], compute_dtype(config)), params)
        metrics, grads = gradient(whole, tokens_BxT, targets_BxT)
        # A table's gradient has come from all rows of its ``fsdp`` group, by the way of what was looked up.
        summed = {name: name in TABLES and alone.columns is not None for name in axes}
        grads = weights.by_name(lambda name, grad: _mean(grad, where[name], mesh, summed=summed[name]), grads)
        return lax.pmean(metrics, ROWS), grads

    rows = PartitionSpec(ROWS)
    return jax.shard_map(
        of_own_rows, mesh=mesh, in_specs=(stored, rows, rows), out_specs=(PartitionSpec(), stored), check_vma=False
    )


def _gathered(shard: jax.Array, axis: int | None, dtype: jnp.dtype) -> jax.Array:
    """A whole weight, as wide as its shard, but travelled in the dtype that products use it in."""
    if axis is None:
        return shard
    return lax.all_gather(shard.astype(dtype), "fsdp", axis=axis, tiled=True).astype(shard.dtype)


def _mean(grad: jax.Array, axis: int | None, mesh: Mesh, *, summed: bool) -> jax.Array:
    """A gradient's mean over all rows, where the parameter is stored; it may be a sum over ``fsdp`` already."""
    if axis is not None:
        grad = lax.psum_scatter(grad, "fsdp", scatter_dimension=axis, tiled=True)
    rest = ("data",) if summed or axis is not None else ROWS
    return lax.psum(grad, rest) / (mesh.shape["data"] * mesh.shape["fsdp"])
