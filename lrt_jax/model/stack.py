"""The stack of layers: what each owns, what all of one forward share, and running them scanned or unrolled."""

import functools
import itertools
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lrt_jax.model import cache, layers, memory, recomputed
from lrt_jax.model.memory import KV, Refreshable
from lrt_jax.model.parameters import cut, table, unstack
from lrt_jax.model.pieces import SLOTS, write
from lrt_jax.setup.config import ModelConfig

# An array, and its dimensions' logical axes: ``setup.mesh.constrain`` on the decoder's mesh.
Sharded = Callable[..., jax.Array]


class Inputs(NamedTuple):
    """What every layer of one forward reads, with a gradient."""

    x0_BxPxD: jax.Array
    memory_BxPxD: jax.Array | None
    projected: KV | None


class Places(NamedTuple):
    """Where the positions of one forward are: the same for every layer, and without a gradient."""

    rope: tuple[layers.Array, layers.Array]
    queries_BxP: jax.Array
    keys_BxN: jax.Array
    slot: jax.Array | int


class Context(NamedTuple):
    """What every layer of one forward shares."""

    config: ModelConfig
    sharded: Sharded
    attend: Callable[..., jax.Array]
    keep_refreshable: bool
    inputs: Inputs
    places: Places


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
    if values_ExBxPxKxC is not None:
        for name, array in (("value_embedding", values_ExBxPxKxC), ("value_gate", arrays["value_gate"])):
            own[name] = array if len(array) == config.layers else _for_all_layers(config, array)
    return own


def _for_all_layers(config: ModelConfig, owned: Any) -> Any:
    """What the layers with value embeddings own, for every layer: None, or in a scan, where all must be alike, zeros.

    Zeros add exactly nothing.
    """
    if config.scan_layers:
        absent = jnp.zeros((config.layers, *owned.shape[1:]), owned.dtype)
        return absent.at[jnp.asarray(config.value_embedding_layers)].set(owned)
    parts = owned if isinstance(owned, tuple) else cut(owned)
    by_owner = dict(zip(config.value_embedding_layers, parts, strict=True))
    return tuple(by_owner.get(layer) for layer in range(config.layers))


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
    config, sharded, inputs, places = context.config, context.sharded, context.inputs, context.places
    x_BxPxD = memory.mix_residual(
        x_BxPxD, inputs.x0_BxPxD, inputs.memory_BxPxD, own.get("alpha"), own.get("beta"), own.get("gamma")
    )
    h_BxPxD = layers.rms_norm(x_BxPxD)
    q_BxPxHxC, fresh = _queries_keys_values(h_BxPxD, own)
    projected = inputs.projected
    if config.memory == "layerwise" and inputs.memory_BxPxD is not None:
        projected = memory.project(inputs.memory_BxPxD, own["memory_key"], own["memory_value"])
    fresh, memory_gate = memory.mix_keys_values(
        fresh, h_BxPxD, own.get("memory_gate"), projected, own.get("value_gate"), own.get("value_embedding")
    )
    refreshable = None
    if context.keep_refreshable and memory_gate is not None:
        refreshable = Refreshable(fresh.k, fresh.v, memory_gate)
    q_BxPxHxC = sharded(layers.rms_norm(layers.rope(q_BxPxHxC, *places.rope)), "batch", "sequence", "heads", None)
    fresh = KV(layers.rms_norm(layers.rope(fresh.k, *places.rope)), fresh.v).heads_first
    fresh = KV(*(sharded(leaf, "batch", "kv_heads", "sequence", None) for leaf in fresh))
    held = before if isinstance(before, cache.Held) else None
    pieces = before.beside if isinstance(before, cache.Held) else before
    seen = write(pieces, fresh, places.slot) if pieces else (fresh,)
    # Queries stay where their positions are; keys and values of all positions come to them.
    k, v = (
        tuple(sharded(leaf, "batch", "kv_heads", None, None) for leaf in leaves) for leaves in zip(*seen, strict=True)
    )
    # The window is traced where layers are scanned; the widest of all layers is known.
    farthest = max(config.windows) if farthest is None else farthest
    where = (places.queries_BxP, places.keys_BxN, own["window"])
    if held is not None:
        mixed_BxPxHxC = cache.attend(q_BxPxHxC, _whole(k), _whole(v), *where, held=held)
    else:
        mixed_BxPxHxC = context.attend(q_BxPxHxC, k, v, *where, farthest=farthest)
    mixed_BxPxHxC = sharded(mixed_BxPxHxC, "batch", "sequence", "heads", None)
    x_BxPxD = sharded(x_BxPxD + layers.linear(mixed_BxPxHxC, own["output"], inputs=2), "batch", "sequence", None)
    x_BxPxD = x_BxPxD + layers.mlp(layers.rms_norm(x_BxPxD), own["mlp_in"], own["mlp_out"])
    return sharded(x_BxPxD, "batch", "sequence", None), fresh, refreshable


def _whole(pieces: tuple[jax.Array, ...]) -> jax.Array:
    """Pieces as one array."""
    return jnp.concatenate(pieces, axis=SLOTS) if len(pieces) > 1 else pieces[0]


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


class Ran(NamedTuple):
    """What layers of one forward computed, and what the next forward is to read.

    Attributes:
      x_BxPxD: the last layer's output.
      source_BxPxD: the source layer's output; zeros where it is none of them.
      fresh: a piece of a buffer.
      refreshable: where asked for; as a piece.
      own: each layer's arrays; those of all layers, if these were.
      before: the pieces that were there.
    """

    x_BxPxD: jax.Array
    source_BxPxD: jax.Array
    fresh: Any
    refreshable: Any
    own: dict[str, jax.Array]
    before: Any


def run(
    context: Context,
    x_BxPxD: jax.Array,
    own: dict[str, jax.Array],
    before: Any,
    shared: Collection[str],
    layers: range,
) -> Ran:
    """``layers`` in turn, scanned or unrolled; of them ``config.memory_range`` reads the memory.

    ``before`` is what each of them has of other positions: a list, or stacked where layers are scanned. ``shared``
    names those of ``own`` that other forwards read, too.
    """
    config, whole = context.config, own
    blind = context._replace(inputs=context.inputs._replace(memory_BxPxD=None, projected=None))
    reading = config.memory_range if context.inputs.memory_BxPxD is not None else layers
    edges = sorted({layers.start, *(edge for edge in (reading.start, reading.stop) if edge in layers), layers.stop})
    if len(edges) == 2 and layers == range(config.layers):
        return _run(context, x_BxPxD, own, before, shared, 0)
    parts = []
    for begin, end in itertools.pairwise(edges):
        parts.append(
            _run(
                context if begin in reading else blind,
                x_BxPxD,
                {name: array[begin:end] for name, array in own.items()},
                _of_layers(before, begin - layers.start, end - layers.start),
                shared,
                begin,
            )
        )
        x_BxPxD = parts[-1].x_BxPxD
    holders = [part for part, end in zip(parts, edges[1:], strict=True) if config.source_index < end]
    fresh, refreshable = (_joined([getattr(part, name) for part in parts]) for name in ("fresh", "refreshable"))
    return Ran(x_BxPxD, (holders or parts)[0].source_BxPxD, fresh, refreshable, whole, before)


def _of_layers(before: Any, begin: int, end: int) -> Any:
    """What some of the layers have of other positions."""
    if before is None or isinstance(before, list):
        return before and before[begin:end]
    return jax.tree.map(lambda stack: stack[begin:end], before)


def _joined(parts: list[Any]) -> Any:
    """What consecutive layers computed, as if all had run together: tuples by layer, or stacks."""
    if parts[0] is None or len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], (KV, Refreshable)):
        return jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *parts)
    return tuple(itertools.chain(*parts))


def _run(
    context: Context, x_BxPxD: jax.Array, own: dict[str, jax.Array], before: Any, shared: Collection[str], begin: int
) -> Ran:
    """The layers that ``own`` is of, from ``begin`` on."""
    config, count = context.config, len(own["index"])
    if config.scan_layers and config.remat:
        return _run_recomputed(context, x_BxPxD, own, before, shared, begin)

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
        for index, layer_own in enumerate(unstack(own, count)):
            layer = (layer_own, None if before is None else before[index])
            carry, layer_produced = step_of(config.windows[begin + index])(carry, layer)
            produced.append(layer_produced)
        fresh, refreshable = zip(*produced, strict=True)
    if config.remat:
        own = own | {name: jax.tree.map(recomputed.summed, own[name]) for name in shared}
    return Ran(*carry, fresh, refreshable, own, before)


def _run_recomputed(
    context: Context, x_BxPxD: jax.Array, own: dict[str, jax.Array], before: Any, shared: Collection[str], begin: int
) -> Ran:
    """``_run`` by ``recomputed.scan``, which wants to be told apart what has gradients, and whom they belong to."""
    source, count = context.config.source_index - begin, len(own["index"])
    leaves, structure = jax.tree.flatten(context.places)
    traced = {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}
    # Of several pieces, this forward's own takes the place of one, which nobody reads: it has no gradient.
    several = before is not None and len(before) > 1
    place = int(context.places.slot) // x_BxPxD.shape[1] if several else 0
    others = (*before[:place], *before[place + 1 :]) if several else ()

    def layer(known: Any, inputs: Inputs, x_BxPxD: jax.Array, arrays: Any) -> Any:
        (traced, each), ((weights, others), (alone, only)) = known, arrays
        places = jax.tree.unflatten(structure, [traced.get(index, leaf) for index, leaf in enumerate(leaves)])
        seen = (*others[:place], None, *others[place:]) if several else only
        here = context._replace(inputs=inputs, places=places)
        x_BxPxD, *computed = _layer(here, x_BxPxD, each | weights | alone, seen)
        return x_BxPxD, tuple(computed)

    each = {name: own[name] for name in ("index", "window")}
    weights = {name: own[name] for name in shared}
    alone = {name: array for name, array in own.items() if name not in each and name not in weights}
    x_BxPxD, source_BxPxD, (fresh, refreshable), (weights, others) = recomputed.scan(
        layer,
        source if source in range(count) else count - 1,  # whose output is not read, then
        (traced, each),
        context.inputs,
        x_BxPxD,
        (weights, others),
        (alone, None if several else before),
    )
    if several:
        before = (*others[:place], before[place], *others[place:])
    return Ran(x_BxPxD, source_BxPxD, fresh, refreshable, own | weights, before)
