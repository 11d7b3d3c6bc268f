"""One layer, as the paper has it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from lrt_jax.model import buffer, memory
from lrt_jax.model.cache import Cached
from lrt_jax.model.layers import Array, linear, mlp, rms_norm, rope
from lrt_jax.model.memory import KV, Refreshable
from lrt_jax.model.weights import Weights
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import ModelConfig


class Inputs(NamedTuple):
    """What every layer of one forward reads, with a gradient.

    Attributes:
      x0_BxPxD: x⁰.
      memory_BxPxD: m_{t-1}; None is zero memory.
      projected: Uk m_{t-1} and Uv m_{t-1}, where all layers share the projections.
    """

    x0_BxPxD: jax.Array
    memory_BxPxD: jax.Array | None
    projected: KV | None


class Positions(NamedTuple):
    """Where the positions of one forward are: the same for every layer, and without a gradient.

    Attributes:
      rope: cosine and sine of each position's angles.
      queries_BxP: int32 positions.
      keys_BxN: int32 positions of all keys that are seen.
      slot: the first slot of the buffer that is written.
    """

    rope: tuple[Array, Array]
    queries_BxP: jax.Array
    keys_BxN: jax.Array
    slot: jax.Array | int


class Context(NamedTuple):
    """What every layer of one forward shares."""

    config: ModelConfig
    mesh: Mesh | None
    attend: Callable[..., jax.Array]
    keep_refreshable: bool
    inputs: Inputs
    positions: Positions

    def stream(self, x_BxPxD: jax.Array) -> jax.Array:
        """The residual stream, sharded as the mesh says."""
        return meshes.constrain(self.mesh, x_BxPxD, "batch", "sequence", None)

    def heads(self, q_BxPxHxC: jax.Array) -> jax.Array:
        """Queries, or what attention returns: they stay where their positions are."""
        return meshes.constrain(self.mesh, q_BxPxHxC, "batch", "sequence", "heads", None)

    def written(self, kv: KV) -> KV:
        """Keys and values [B, K, P, C] where they are made."""
        return KV(*(meshes.constrain(self.mesh, leaf, "batch", "kv_heads", "sequence", None) for leaf in kv))

    def gathered(self, leaves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Keys, or values, of all positions, which come to the queries: [B, K, N, C] in pieces."""
        return tuple(meshes.constrain(self.mesh, leaf, "batch", "kv_heads", None, None) for leaf in leaves)


class LayerInputs(NamedTuple):
    """What a layer reads in one forward alone; or, as in ``Weights``, what all layers do, stacked.

    Attributes:
      window: int32, how many positions before itself a query sees.
      value_gate: the weights of g_ve [c, K]; None, with the next, in a layer without value embeddings.
      value_embedding: VE[token], [B, P, K, C].
    """

    window: Any
    value_gate: jax.Array | None = None
    value_embedding: jax.Array | None = None


class Before(NamedTuple):
    """What a layer knows of other positions: pieces of the shared buffer, and the KV cache of earlier tokens."""

    pieces: tuple[KV, ...] = ()
    cached: Cached | None = None


def block(
    context: Context, x_BxPxD: jax.Array, weights: Weights, own: LayerInputs, before: Before, farthest: int
) -> tuple[jax.Array, KV, Refreshable | None]:
    """One layer (METHOD.md, "Backbone", "Recurrent memory").

    It reads the residual stream x; ``farthest`` is its window, or where windows are traced the widest of all layers.

    Returns:
      The residual stream, the keys and values that were written, [B, K, P, C] each, and where asked for what KV refresh
      begins with.
    """
    inputs, positions = context.inputs, context.positions
    scalars = (weights.alpha, weights.beta, weights.gamma)
    x_BxPxD = memory.mix_residual(x_BxPxD, inputs.x0_BxPxD, inputs.memory_BxPxD, *scalars)

    h_BxPxD = rms_norm(x_BxPxD)
    q, kv = weights.queries_keys_values(h_BxPxD)
    gates = memory.gates(h_BxPxD, weights.memory_gate, own.value_gate)
    projected = weights.projected(inputs.memory_BxPxD) if inputs.projected is None else inputs.projected
    kv = memory.mix_keys_values(kv, gates, projected, own.value_embedding)
    stale = Refreshable(*kv, gates.memory) if context.keep_refreshable and gates.memory is not None else None

    q, k = (rms_norm(rope(each, *positions.rope)) for each in (q, kv.k))
    written = context.written(KV(k, kv.v).heads_first)
    # For this layer's attention: the buffer that is handed on is written behind all layers (``Decoder.__call__``).
    keys, values = map(context.gathered, zip(*buffer.write(before.pieces, written, positions.slot), strict=True))
    attend = context.attend if before.cached is None else before.cached.attend
    where = (positions.queries_BxP, positions.keys_BxN, own.window)
    attended = context.heads(attend(context.heads(q), keys, values, *where, farthest=farthest))
    x_BxPxD = context.stream(x_BxPxD + linear(attended, weights.output, inputs=2))
    x_BxPxD = x_BxPxD + mlp(rms_norm(x_BxPxD), weights.mlp_in, weights.mlp_out)
    return context.stream(x_BxPxD), written, stale
