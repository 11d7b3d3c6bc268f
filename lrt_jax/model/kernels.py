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

# Of keys, or of values: [B, K, n, C] each.
Pieces = tuple[jax.Array, ...]


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

            return _with_known_window(config, functools.partial(attend_by_cudnn, **where))
        from lrt_jax.model.splash import attend_by_splash

        return _with_known_window(config, _joined(config, functools.partial(attend_by_splash, mesh=mesh, **where)))
    # Where positions are sharded, so are scores.
    whole = mesh is None or mesh.shape["sequence"] == 1
    dense = _joined(config, attention.attend_in_parts if whole else attention.attend)
    return lambda *arguments, farthest: dense(*arguments)


def _with_known_window(config: ModelConfig, kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A kernel, part of which is its window, whose positions are those of a whole subset, the same in all rows."""

    def attend(q_BxPxHxC: jax.Array, k: Pieces, v: Pieces, *where: Any, farthest: int) -> jax.Array:
        if not config.scan_layers or len(set(config.windows)) == 1:
            return kernel(q_BxPxHxC, k, v, window=farthest)
        # Scanned layers choose between two.
        short, long = (functools.partial(kernel, window=size) for size in sorted(set(config.windows)))
        *_, window = where
        return lax.cond(window < config.sequence_length, short, long, q_BxPxHxC, k, v)

    return attend


# What only moves numbers: cheaper to do again than to keep.
MOVES = {"concatenate", "reshape", "transpose", "squeeze", "broadcast_in_dim", "pad", "slice"}


def _joined(config: ModelConfig, attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """``attend`` with the pieces of keys, and of values, as one array each.

    The backward pass joins more than two again. Kept, they would be a copy of the buffer for each of S subset forwards,
    in every layer: 0.9 GB for two layers of width 768, 8 rows of 2048 tokens and S = 8, as compiled for a TPU
    (docs/LOG.md). With ``remat`` nothing of a layer is kept.
    """

    def on_pieces(q_BxPxHxC: jax.Array, k: Pieces, v: Pieces, *where: Any, **window: int) -> jax.Array:
        def joined(q: jax.Array, k: Pieces, v: Pieces) -> jax.Array:
            return attend(q, *(jnp.concatenate(pieces, axis=SLOTS) for pieces in (k, v)), *where, **window)

        again = len(k) > 2 and not config.remat
        return (jax.checkpoint(joined, policy=_is_computed) if again else joined)(q_BxPxHxC, k, v)

    return on_pieces


def _is_computed(primitive: Any, *_: Any, **__: Any) -> bool:
    """What ``jax.checkpoint`` is to keep: results of anything but MOVES."""
    return primitive.name not in MOVES
