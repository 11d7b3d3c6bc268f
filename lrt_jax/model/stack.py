"""Running the layers of one forward, scanned or unrolled."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lrt_jax.model import recomputed
from lrt_jax.model.block import Before, Context, Inputs, LayerInputs, block
from lrt_jax.model.memory import KV, Refreshable
from lrt_jax.model.weights import Weights, cut, of_some_layers, unstacked
from lrt_jax.setup.config import ModelConfig


class Layers(NamedTuple):
    """Consecutive layers: which of the model's, and what each reads; ``before`` is a list where they are unrolled."""

    indices: range
    weights: Weights
    own: LayerInputs
    before: Any

    def part(self, indices: range) -> "Layers":
        """Some of them."""
        begin, end = indices.start - self.indices.start, indices.stop - self.indices.start
        if isinstance(self.before, list):
            before = self.before[begin:end]
        else:
            before = jax.tree.map(lambda stack: stack[begin:end], self.before)
        return Layers(indices, of_some_layers(self.weights, begin, end), of_some_layers(self.own, begin, end), before)


class LayersOutput(NamedTuple):
    """What layers of one forward computed, and what the next forward is to read.

    Attributes:
      x_BxPxD: the last layer's output.
      source_BxPxD: the source layer's output; it means nothing where that is none of them.
      written: a piece of a buffer.
      refreshable: where asked for; as a piece.
      weights: what the next forward is to read, if all of the model's layers ran as one stretch.
      before: likewise.
    """

    x_BxPxD: jax.Array
    source_BxPxD: jax.Array
    written: Any
    refreshable: Any
    weights: Weights
    before: Any


def own_of_all_layers(config: ModelConfig, value_gate: Any, values_ExBxPxKxC: Any) -> LayerInputs:
    """What each layer has in one forward; ``value_gate`` and the embeddings are of the E layers that own a table."""
    window = jnp.asarray(config.windows, jnp.int32)
    if values_ExBxPxKxC is None:
        return LayerInputs(window)
    return LayerInputs(window, *(_for_all_layers(config, owned) for owned in (value_gate, values_ExBxPxKxC)))


def _for_all_layers(config: ModelConfig, owned: Any) -> Any:
    """What layers with value embeddings own, for every layer: None, or in a scan, where all must be alike, zeros.

    Zeros add exactly nothing.
    """
    if len(owned) == config.layers:
        return owned
    if config.scan_layers:
        absent = jnp.zeros((config.layers, *owned.shape[1:]), owned.dtype)
        return absent.at[jnp.asarray(config.value_embedding_layers)].set(owned)
    parts = owned if isinstance(owned, tuple) else cut(owned)
    by_owner = dict(zip(config.value_embedding_layers, parts, strict=True))
    return tuple(by_owner.get(layer) for layer in range(config.layers))


def run(context: Context, x_BxPxD: jax.Array, layers: Layers) -> LayersOutput:
    """Runs the layers in turn; those of ``config.memory_range`` read the memory."""
    config, inputs = context.config, context.inputs
    reading = config.memory_range if inputs.memory_BxPxD is not None else layers.indices
    begin, end = layers.indices.start, layers.indices.stop
    edges = sorted({begin, *(edge for edge in (reading.start, reading.stop) if begin < edge < end), end})
    if len(edges) == 2 and end - begin == config.layers:
        return _run(context, x_BxPxD, layers)
    blind = context._replace(inputs=inputs._replace(memory_BxPxD=None, projected=None))
    stretches = [range(*pair) for pair in itertools.pairwise(edges)]
    parts = []
    for indices in stretches:
        here = context if indices.start in reading else blind
        parts.append(_run(here, x_BxPxD, layers.part(indices)))
        x_BxPxD = parts[-1].x_BxPxD
    holders = [part for part, indices in zip(parts, stretches, strict=True) if config.source_index in indices]
    written, refreshable = (_joined([getattr(part, name) for part in parts]) for name in ("written", "refreshable"))
    source_BxPxD = (holders or parts)[0].source_BxPxD
    return LayersOutput(x_BxPxD, source_BxPxD, written, refreshable, layers.weights, layers.before)


def _joined(parts: list[Any]) -> Any:
    """What consecutive layers computed, as if all had run together: tuples by layer, or stacks."""
    if parts[0] is None or len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], (KV, Refreshable)):
        return jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *parts)
    return tuple(itertools.chain(*parts))


def _run(context: Context, x_BxPxD: jax.Array, layers: Layers) -> LayersOutput:
    config = context.config
    if not config.scan_layers:
        return _run_unrolled(context, x_BxPxD, layers)
    if config.remat:
        return _run_recomputed(context, x_BxPxD, layers)

    def body(carry: tuple[jax.Array, jax.Array], layer: Any) -> Any:
        (x_BxPxD, source_BxPxD), (index, weights, own, before) = carry, layer
        # The window is traced; the widest of all layers is known.
        x_BxPxD, *computed = block(context, x_BxPxD, weights, own, before, max(config.windows))
        return (x_BxPxD, jnp.where(index == config.source_index, x_BxPxD, source_BxPxD)), tuple(computed)

    carry = (x_BxPxD, jnp.zeros_like(x_BxPxD))
    indices = jnp.arange(layers.indices.start, layers.indices.stop)
    each = (indices, layers.weights, layers.own, layers.before)
    (x_BxPxD, source_BxPxD), (written, refreshable) = lax.scan(body, carry, each)
    return LayersOutput(x_BxPxD, source_BxPxD, written, refreshable, layers.weights, layers.before)


def _run_unrolled(context: Context, x_BxPxD: jax.Array, layers: Layers) -> LayersOutput:
    config, computed, source_BxPxD = context.config, [], jnp.zeros_like(x_BxPxD)
    reads = (unstacked(layers.weights, len(layers.indices)), unstacked(layers.own, len(layers.indices)), layers.before)
    for index, *read in zip(layers.indices, *reads, strict=True):
        one = functools.partial(block, context, farthest=config.windows[index])
        x_BxPxD, *written_and_stale = (jax.checkpoint(one) if config.remat else one)(x_BxPxD, *read)
        source_BxPxD = x_BxPxD if index == config.source_index else source_BxPxD
        computed.append(written_and_stale)
    weights = jax.tree.map(recomputed.summed, layers.weights) if config.remat else layers.weights
    written, refreshable = zip(*computed, strict=True)
    return LayersOutput(x_BxPxD, source_BxPxD, written, refreshable, weights, layers.before)


def _run_recomputed(context: Context, x_BxPxD: jax.Array, layers: Layers) -> LayersOutput:
    """Scanned by ``recomputed.scan``, which wants to be told apart what has gradients, and whom they belong to."""
    config, pieces = context.config, layers.before.pieces
    arrays, structure = jax.tree.flatten(context.positions)
    traced = {index: leaf for index, leaf in enumerate(arrays) if isinstance(leaf, jax.Array)}
    # Of several pieces, this forward's own takes the place of one, which nobody reads: it has no gradient.
    several = len(pieces) > 1
    place = int(context.positions.slot) // x_BxPxD.shape[1] if several else 0
    others = (*pieces[:place], *pieces[place + 1 :]) if several else ()

    def layer(known: Any, inputs: Inputs, x_BxPxD: jax.Array, reads: Any) -> Any:
        (traced, window), ((weights, others), (own, only)) = known, reads
        positions = jax.tree.unflatten(structure, [traced.get(index, leaf) for index, leaf in enumerate(arrays)])
        seen = (*others[:place], None, *others[place:]) if several else only
        here = context._replace(inputs=inputs, positions=positions)
        own = own._replace(window=window)
        x_BxPxD, *computed = block(here, x_BxPxD, weights, own, Before(seen), max(config.windows))
        return x_BxPxD, tuple(computed)

    last = len(layers.indices) - 1
    source = config.source_index - layers.indices.start
    x_BxPxD, source_BxPxD, (written, refreshable), (weights, others) = recomputed.scan(
        layer,
        source if 0 <= source <= last else last,  # whose output is not read, then
        (traced, layers.own.window),
        context.inputs,
        x_BxPxD,
        (layers.weights, others),
        (layers.own._replace(window=None), () if several else pieces),
    )
    if several:
        pieces = (*others[:place], pieces[place], *others[place:])
    return LayersOutput(x_BxPxD, source_BxPxD, written, refreshable, weights, Before(pieces))
