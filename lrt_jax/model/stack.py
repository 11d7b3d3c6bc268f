"""The stack of layers: what each owns, what all of one forward share, and running them scanned or unrolled."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from lrt_jax.model import attention, blocks, cache, kernels, layers, memory
from lrt_jax.model.backend import attention_kind, target
from lrt_jax.model.memory import KV, Refreshable
from lrt_jax.model.parameters import table, unstack
from lrt_jax.setup.config import ModelConfig

# Slots are the last axis but one in every leaf of a buffer's pieces: [(L,) B, K, N, C].
SLOTS = -2

# What attends to whole strided subsets beside XLA, by the names that the config uses.
KERNELS = {"splash": kernels.attend_by_splash, "cudnn": kernels.attend_by_cudnn}

# An array, and its dimensions' logical axes: ``setup.mesh.constrain`` on the decoder's mesh.
Sharded = Callable[..., jax.Array]


class Context(NamedTuple):
    """What every layer of one forward shares."""

    config: ModelConfig
    sharded: Sharded
    x0_BxPxD: jax.Array
    memory_BxPxD: jax.Array | None
    projected: KV | None
    rope: tuple[layers.Array, layers.Array]
    queries_BxP: jax.Array
    keys_BxN: jax.Array
    slot: jax.Array | int
    mesh: Mesh | None
    attend: Callable[..., jax.Array]
    keep_refreshable: bool


def shared_projection(config: ModelConfig, memory_BxPxD: jax.Array | None, arrays: dict[str, jax.Array]) -> KV | None:
    """Uk m and Uv m where all layers share the projections: computed once a forward."""
    if config.memory != "shared" or memory_BxPxD is None:
        return None
    return memory.project(memory_BxPxD, arrays["memory_key"], arrays["memory_value"])


def per_layer(config: ModelConfig, arrays: dict[str, Any], values_ExBxPxKxC: Any) -> dict[str, jax.Array]:
    """What each layer has of its own, every array with a leading layer axis."""
    stacked = {name for name, spec in table(config).items() if spec.axes[0] == "layers"} | {"attention_in"}
    own = {name: array for name, array in arrays.items() if name in stacked - {"value_embedding", "value_gate"}}
    own["index"] = jnp.arange(config.layers)
    own["window"] = jnp.asarray(config.windows, jnp.int32)
    owners = config.value_embedding_layers
    if values_ExBxPxKxC is not None:
        for name, array in (("value_embedding", values_ExBxPxKxC), ("value_gate", arrays["value_gate"])):
            # Layers without a table get zeros, which add exactly nothing, so that all layers are alike.
            if len(array) < config.layers and isinstance(array, tuple):
                given, absent = dict(zip(owners, array, strict=True)), jnp.zeros_like(array[0])
                array = tuple(given.get(layer, absent) for layer in range(config.layers))
            elif len(array) < config.layers:
                absent = jnp.zeros((config.layers, *array.shape[1:]), array.dtype)
                array = absent.at[jnp.asarray(owners)].set(array)
            own[name] = array
    return own


def write(pieces: tuple[Any, ...], fresh: Any, slot: jax.Array | int) -> tuple[Any, ...]:
    """The pieces with P fresh positions at ``slot``: within the only piece, or, of several, in place of one."""
    if len(pieces) == 1:
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=slot, axis=SLOTS)
        return (jax.tree.map(put, pieces[0], fresh),)
    index = int(slot) // jax.tree.leaves(fresh)[0].shape[SLOTS]  # known while tracing
    return (*pieces[:index], fresh, *pieces[index + 1 :])


def _layer(
    context: Context,
    x_BxPxD: jax.Array,
    own: dict[str, jax.Array],
    before: tuple[KV, ...] | cache.Held | None,
    farthest: int | None = None,
) -> tuple[jax.Array, KV, Refreshable | None]:
    """One layer: its output, its keys and values for the buffer, and, if asked for, its refreshable.

    ``farthest`` is the layer's window, where it is known while tracing.
    """
    config, sharded = context.config, context.sharded
    x_BxPxD = memory.mix_residual(
        x_BxPxD, context.x0_BxPxD, context.memory_BxPxD, own.get("alpha"), own.get("beta"), own.get("gamma")
    )
    h_BxPxD = layers.rms_norm(x_BxPxD)
    q_BxPxHxC, fresh = _queries_keys_values(h_BxPxD, own)
    projected = context.projected
    if config.memory == "layerwise" and context.memory_BxPxD is not None:
        projected = memory.project(context.memory_BxPxD, own["memory_key"], own["memory_value"])
    fresh, memory_gate = memory.mix_keys_values(
        fresh, h_BxPxD, own.get("memory_gate"), projected, own.get("value_gate"), own.get("value_embedding")
    )
    refreshable = None
    if context.keep_refreshable and memory_gate is not None:
        refreshable = Refreshable(fresh.k, fresh.v, memory_gate)
    q_BxPxHxC = sharded(layers.rms_norm(layers.rope(q_BxPxHxC, *context.rope)), "batch", "sequence", "heads", None)
    fresh = KV(layers.rms_norm(layers.rope(fresh.k, *context.rope)), fresh.v).heads_first
    fresh = KV(*(sharded(leaf, "batch", "kv_heads", "sequence", None) for leaf in fresh))
    held = before if isinstance(before, cache.Held) else None
    seen = (fresh,) if before is None or held is not None else write(before, fresh, context.slot)
    # Queries stay where their positions are; keys and values of all positions come to them.
    k, v = (
        tuple(sharded(leaf, "batch", "kv_heads", None, None) for leaf in leaves) for leaves in zip(*seen, strict=True)
    )
    # The window is traced where layers are scanned; the widest of all layers is known.
    farthest = max(config.windows) if farthest is None else farthest
    where = (context.queries_BxP, context.keys_BxN, own["window"])
    if held is not None:
        mixed_BxPxHxC = cache.attend(q_BxPxHxC, fresh.k, fresh.v, *where, held=held)
    else:
        mixed_BxPxHxC = context.attend(q_BxPxHxC, k, v, *where, farthest=farthest)
    mixed_BxPxHxC = sharded(mixed_BxPxHxC, "batch", "sequence", "heads", None)
    x_BxPxD = sharded(x_BxPxD + layers.linear(mixed_BxPxHxC, own["output"], inputs=2), "batch", "sequence", None)
    x_BxPxD = x_BxPxD + layers.mlp(layers.rms_norm(x_BxPxD), own["mlp_in"], own["mlp_out"])
    return sharded(x_BxPxD, "batch", "sequence", None), fresh, refreshable


def attention_for(
    config: ModelConfig, mesh: Mesh | None, length: int, subsets: int | None, ragged: bool, slot: jax.Array | int
) -> Callable[..., jax.Array]:
    """What attends in every layer: a function of q, pieces of k and v, positions, window and its bound.

    The arguments are those of :class:`decoder.Decoder`; P = ``length``.
    """
    kind = attention_kind(config, length, mesh)
    if kind == "blocked" and subsets is not None:
        return functools.partial(blocks.attend_in_blocks, subsets=subsets)
    if kind in KERNELS and subsets is not None and not ragged and isinstance(slot, int):
        on_cpu = target().platform == "cpu"
        kernel = functools.partial(KERNELS[kind], subsets=subsets, subset=slot // length, mesh=mesh, interpret=on_cpu)
        return functools.partial(_attend_by_kernel, config=config, kernel=kernel)
    return functools.partial(_attend_densely, config=config)


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
) -> jax.Array:
    """``attention.attend`` over pieces."""
    del farthest
    return _joined(config, attention.attend, q_BxPxHxC, k, v, queries_BxP, keys_BxN, window)


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
    """One of KERNELS over pieces, whose positions are those of a whole subset, the same in all rows."""
    del queries_BxP, keys_BxN
    if not config.scan_layers or len(set(config.windows)) == 1:
        return _joined(config, functools.partial(kernel, window=farthest), q_BxPxHxC, k, v)
    # A window is part of its kernel: scanned layers choose between two.
    short, long = (functools.partial(kernel, window=size) for size in sorted(set(config.windows)))

    def either(q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array | int) -> jax.Array:
        return lax.cond(window < config.sequence_length, short, long, q, k, v)

    return _joined(config, either, q_BxPxHxC, k, v, window)


# What only moves numbers: cheaper to do again than to keep.
MOVES = {"concatenate", "reshape", "transpose", "squeeze", "broadcast_in_dim", "pad", "slice"}


def _joined(
    config: ModelConfig,
    attend: Callable[..., jax.Array],
    q_BxPxHxC: jax.Array,
    k: tuple[jax.Array, ...],
    v: tuple[jax.Array, ...],
    *rest: jax.Array | int,
) -> jax.Array:
    """``attend`` with the pieces of keys, and of values, as one array each.

    The backward pass joins more than two again. Kept, they would be a copy of the buffer for each of S subset forwards,
    in every layer: 0.9 GB for two layers of width 768, 8 rows of 2048 tokens and S = 8, as compiled for a TPU
    (docs/LOG.md). With ``remat`` nothing of a layer is kept.
    """

    def on_pieces(q: jax.Array, k: tuple[jax.Array, ...], v: tuple[jax.Array, ...], *rest: Any) -> jax.Array:
        return attend(q, *(jnp.concatenate(pieces, axis=SLOTS) for pieces in (k, v)), *rest)

    if len(k) > 2 and not config.remat:
        on_pieces = jax.checkpoint(on_pieces, policy=_is_computed)
    return on_pieces(q_BxPxHxC, k, v, *rest)


def _is_computed(primitive: Any, *_: Any, **__: Any) -> bool:
    """What ``jax.checkpoint`` is to keep: results of anything but MOVES."""
    return primitive.name not in MOVES


def _queries_keys_values(h_BxPxD: jax.Array, own: dict[str, jax.Array]) -> tuple[jax.Array, KV]:
    """q [B, P, H, C], and k and v [B, P, K, C], in one product where the parameters come as ``by_layer`` has them."""
    if "attention_in" not in own:
        q, k, v = (layers.linear(h_BxPxD, own[name]) for name in ("query", "key", "value"))
        return q, KV(k, v)
    q_BxPxKxGxC, k_BxPxKx1xC, v_BxPxKx1xC = lax.split(
        layers.linear(h_BxPxD, own["attention_in"]), (own["attention_in"].shape[2] - 2, 1, 1), axis=3
    )
    k, v = (jnp.squeeze(array, axis=3) for array in (k_BxPxKx1xC, v_BxPxKx1xC))
    return q_BxPxKxGxC.reshape(*k.shape[:2], -1, k.shape[-1]), KV(k, v)


def run(
    context: Context, x_BxPxD: jax.Array, own: dict[str, jax.Array], before: Any
) -> tuple[jax.Array, jax.Array, Any, Any]:
    """All layers in turn, scanned or unrolled: last output, source layer's output, fresh piece, refreshable.

    ``before`` is what each layer has of other positions: a list of L, or stacked where layers are scanned.
    """
    config = context.config

    def body(
        carry: tuple[jax.Array, jax.Array],
        layer: tuple[dict[str, jax.Array], tuple[KV, ...] | cache.Held | None],
        farthest: int | None = None,
    ) -> Any:
        x_BxPxD, source_BxPxD = carry
        x_BxPxD, fresh, refreshable = _layer(context, x_BxPxD, *layer, farthest)
        source_BxPxD = jnp.where(layer[0]["index"] == config.source_index, x_BxPxD, source_BxPxD)
        return (x_BxPxD, source_BxPxD), (fresh, refreshable)

    def step_of(farthest: int | None) -> Any:
        bound = functools.partial(body, farthest=farthest)
        return jax.checkpoint(bound) if config.remat else bound

    carry = (x_BxPxD, jnp.zeros_like(x_BxPxD))
    if config.scan_layers:
        carry, (fresh, refreshable) = lax.scan(step_of(None), carry, (own, before))
    else:
        produced = []
        for index, layer_own in enumerate(unstack(own, config.layers)):
            layer = (layer_own, None if before is None else before[index])
            carry, layer_produced = step_of(config.windows[index])(carry, layer)
            produced.append(layer_produced)
        fresh, refreshable = zip(*produced, strict=True)
    return *carry, fresh, refreshable
