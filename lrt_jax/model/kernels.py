"""What attends to a buffer in pieces: splash attention on a TPU, cuDNN's on an NVIDIA GPU, tiles, or dense attention.

Which of them it is, ``backend.attention_kind`` decides from config, machine, mesh and subsets.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from lrt_jax.model import attention, blocks
from lrt_jax.model.backend import HOMES, attention_kind, target
from lrt_jax.model.buffer import SLOTS
from lrt_jax.setup.config import ModelConfig


def attention_for(
    config: ModelConfig, mesh: Mesh | None, length: int, subsets: int | None, ragged: bool, slot: jax.Array | int
) -> Callable[..., jax.Array]:
    """What attends in every layer: a function of q, pieces of k and v, positions, window and its bound.

    The arguments are those of :class:`decoder.Decoder`; P = ``length``.
    """
    kind = attention_kind(config, length, mesh, subsets, traced=not isinstance(slot, int), ragged=ragged).kind
    if kind == "blocked" and subsets is not None:  # it never is without
        return functools.partial(blocks.attend_in_blocks, subsets=subsets)
    if kind in HOMES:
        where: dict[str, Any] = {"subsets": subsets, "subset": slot // length, "interpret": target().platform == "cpu"}
        # Experimental and inner parts of JAX, imported by those who use them.
        if kind == "cudnn":
            from lrt_jax.model.cudnn import attend_by_cudnn

            kernel: Callable[..., jax.Array] = functools.partial(attend_by_cudnn, **where)
        else:
            from lrt_jax.model.splash import attend_by_splash

            kernel = functools.partial(_joined, config, functools.partial(attend_by_splash, mesh=mesh, **where))
        return functools.partial(_attend_by_kernel, config=config, kernel=kernel)
    # Where positions are sharded, so are scores.
    whole = mesh is None or mesh.shape["sequence"] == 1
    dense = attention.attend_in_parts if whole else attention.attend
    return functools.partial(_attend_densely, config=config, attend=dense)


def _attend_densely(
    q_BxPxHxC: jax.Array,
    k: tuple[jax.Array, ...],
    v: tuple[jax.Array, ...],
    queries_BxP: jax.Array,
    keys_BxN: jax.Array,
    window: jax.Array | int,
    *,
    farthest: int,
    config: ModelConfig,
    attend: Callable[..., jax.Array],
) -> jax.Array:
    """``attention.attend`` over pieces."""
    del farthest
    return _joined(config, attend, q_BxPxHxC, k, v, queries_BxP=queries_BxP, keys_BxN=keys_BxN, window=window)


def _attend_by_kernel(
    q_BxPxHxC: jax.Array,
    k: tuple[jax.Array, ...],
    v: tuple[jax.Array, ...],
    queries_BxP: jax.Array,
    keys_BxN: jax.Array,
    window: jax.Array | int,
    *,
    farthest: int,
    config: ModelConfig,
    kernel: Callable[..., jax.Array],
) -> jax.Array:
    """A kernel over pieces, whose positions are those of a whole subset, the same in all rows."""
    del queries_BxP, keys_BxN
    if not config.scan_layers or len(set(config.windows)) == 1:
        return kernel(q_BxPxHxC, k, v, window=farthest)
    # A window is part of its kernel: scanned layers choose between two.
    short, long = (functools.partial(kernel, window=size) for size in sorted(set(config.windows)))
    return lax.cond(window < config.sequence_length, short, long, q_BxPxHxC, k, v)


# What only moves numbers: cheaper to do again than to keep.
MOVES = {"concatenate", "reshape", "transpose", "squeeze", "broadcast_in_dim", "pad", "slice"}


def _joined(
    config: ModelConfig,
    attend: Callable[..., jax.Array],
    q_BxPxHxC: jax.Array,
    k: tuple[jax.Array, ...],
    v: tuple[jax.Array, ...],
    **rest: jax.Array | int,
) -> jax.Array:
    """``attend`` with the pieces of keys, and of values, as one array each.

    The backward pass joins more than two again. Kept, they would be a copy of the buffer for each of S subset forwards,
    in every layer: 0.9 GB for two layers of width 768, 8 rows of 2048 tokens and S = 8, as compiled for a TPU
    (docs/LOG.md). With ``remat`` nothing of a layer is kept.
    """

    def on_pieces(q: jax.Array, k: tuple[jax.Array, ...], v: tuple[jax.Array, ...]) -> jax.Array:
        return attend(q, *(jnp.concatenate(pieces, axis=SLOTS) for pieces in (k, v)), **rest)

    if len(k) > 2 and not config.remat:
        on_pieces = jax.checkpoint(on_pieces, policy=_is_computed)
    return on_pieces(q_BxPxHxC, k, v)


def _is_computed(primitive: Any, *_: Any, **__: Any) -> bool:
    """What ``jax.checkpoint`` is to keep: results of anything but MOVES."""
    return primitive.name not in MOVES
