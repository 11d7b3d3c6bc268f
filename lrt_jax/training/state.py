"""The training state, and its initialization straight into its shards."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from lrt_jax.model.decoder import Decoder
from lrt_jax.setup import mesh as meshes
from lrt_jax.training import guard
from lrt_jax.training.guard import Running


class TrainState(struct.PyTreeNode):
    """Everything that a step reads and writes.

    Attributes:
      step: int32 scalar, steps done.
      params: the decoder's parameters, a flat dict with the names of ``model.parameters.table``.
      opt_state: the optimizer's state.
      guard: what is remembered of the steps so far, to tell a bad one.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    opt_state: Any
    guard: Running | None = None


def init_params(decoder: Decoder, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters, each leaf boxed with its logical axis names."""
    tokens_1x1 = jnp.zeros((1, 1), jnp.int32)
    return decoder.init(key, tokens_1x1, tokens_1x1)["params"]


def abstract(decoder: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state as shapes, dtypes and shardings, nothing allocated."""
    return _sharded(jax.eval_shape(lambda key: _create(decoder, optimizer, key), jax.random.key(0)), mesh)


def abstract_params(decoder: Decoder, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters alone as shapes, dtypes and shardings."""
    return _sharded(jax.eval_shape(lambda key: init_params(decoder, key), jax.random.key(0)), mesh)


def _sharded(boxed: Any, mesh: Mesh) -> Any:
    shardings = meshes.shardings_of(boxed, mesh)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        shardings,
    )


def create(decoder: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> TrainState:
    """A fresh state, every array made on the devices that hold it."""
    shardings = state_shardings(decoder, optimizer, mesh)
    make = jax.jit(lambda key: nn.unbox(_create(decoder, optimizer, key)), out_shardings=shardings)
    return make(jax.random.key(seed))


def state_shardings(decoder: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Where every array of the state lies."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract(decoder, optimizer, mesh))


def _create(decoder: Decoder, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params = init_params(decoder, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), guard.fresh())
