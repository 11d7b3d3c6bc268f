"""The decoder: one forward that serves initialization, subsets and decoding.

It knows neither schedules nor losses. Everything it produces, it returns: hidden states, the source
state that becomes recurrent memory, and the buffer of keys and values.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from lrt_jax.model import cache, embedding, head, kernels, layers, memory, stack, weights
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.block import Before, Context, Inputs, Positions
from lrt_jax.model.buffer import Buffer, write
from lrt_jax.model.cache import Cache
from lrt_jax.model.embedding import Embedded
from lrt_jax.model.memory import KV, Refreshable
from lrt_jax.model.parameters import table
from lrt_jax.model.weights import is_by_layer
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import ModelConfig


class Forward(NamedTuple):
    """What one forward returns, for its P positions.

    Attributes:
      hidden_BxPxD: ``h_final``, which :meth:`Decoder.logits` reads; where only the source states were wanted, these.
      source_BxPxD: the source states m_t.
      buffer: the buffer given with this forward's keys and values written in, or, where none was given,
        just these.
      refreshable: where asked for, what :meth:`Decoder.refresh` starts from: a tuple of L
        :class:`Refreshable`, or one stacked as the buffer's pieces.
    """

    hidden_BxPxD: jax.Array
    source_BxPxD: jax.Array
    buffer: Buffer
    refreshable: Any = None


class Decoder(nn.Module):
    """The Latent Recurrent Transformer, and with its memory off the plain baseline (METHOD.md, "Backbone").

    Attributes:
      config: its shape and switches.
      mesh: where its activations lie, sharded by ``setup.mesh.RULES``; None: on one device.
      columns: within ``jax.shard_map``, the axis of devices that have each some columns of the embedding tables; None:
        tables are whole.
    """

    config: ModelConfig
    mesh: Mesh | None = None
    columns: str | None = None

    def setup(self) -> None:
        """Declares the arrays of the parameter table, with logical axes; or takes shards, or what ``by_layer`` made."""
        given = self.variables.get("params", {})
        if is_by_layer(given) or (given and self.columns):
            self.parameters = dict(given)
            return
        dtype = jnp.promote_types(jnp.float32, compute_dtype(self.config))
        self.parameters = {
            name: self.param(name, nn.with_logical_partitioning(spec.init, spec.axes), spec.shape, dtype)
            for name, spec in table(self.config).items()
        }

    def __call__(
        self,
        tokens_BxP: jax.Array | Embedded,
        positions_BxP: jax.Array,
        memory_BxPxD: jax.Array | None = None,
        buffer: Buffer | None = None,
        slot: jax.Array | int = 0,
        *,
        past: Cache | None = None,
        subsets: int | None = None,
        ragged: bool = False,
        keep_refreshable: bool = False,
        states_only: bool = False,
    ) -> tuple[Forward, dict[str, Any]]:
        """One forward over P positions.

        Args:
          tokens_BxP: int token ids, or what :meth:`embed` made of them: the gradient of a lookup writes a whole
            table, so several forwards over the same tokens should share one. Or what :meth:`below` made of that: then
            only layers from the first on that reads memory are computed, and the buffer is of these.
          positions_BxP: int32 position of each token; the first axis may be 1, for all rows alike.
          memory_BxPxD: m_{t-1} for each position; None is zero memory.
          buffer: keys and values of other positions. This forward's own are written into it, in every
            layer, before its queries attend; None: the queries see just this forward's positions.
          slot: where in the buffer, of N slots, the P positions are written: slots ``slot`` to ``slot + P``. In a
            buffer of several pieces it is a plain int, the first slot of one of them.
          past: the KV cache of the positions before these, and before the buffer's if there is one. The queries see
            it, too; it stays as it is. Its layers differ in size, so it needs ``scan_layers`` off.
          subsets: S, where the positions are one strided subset of S, ascending, and the buffer's slots
            hold all S in order; 1: they are all positions. None: nothing is known of their order. Attention
            may then leave out what cannot be seen; the numbers are the same.
          ragged: rows may begin with empty positions, which kernels know nothing of.
          keep_refreshable: also return what :meth:`refresh` needs; for a forward with zero memory.
          states_only: only the source states are wanted: layers above the source layer are left out.

        Returns:
          The :class:`Forward`, and the parameters as they were, for the next forward to read (``Model.__call__``).

        Raises:
          ValueError: shapes do not fit together.
        """
        config = self.config
        embedded = tokens_BxP if isinstance(tokens_BxP, Embedded) else self.embed(tokens_BxP)[0]
        _check_shapes(config, embedded.x0_BxPxD.shape[:2], positions_BxP, memory_BxPxD, buffer, past, states_only)
        positions_BxN = positions_BxP if buffer is None else buffer.positions_with(positions_BxP, slot)
        attend = kernels.attention_for(config, self.mesh, positions_BxP.shape[1], subsets, ragged, slot)
        positions = self._positions(positions_BxP, positions_BxN, slot)
        context = self._context(embedded, memory_BxPxD, positions, attend, keep_refreshable)
        first = 0 if embedded.x_BxPxD is None else config.memory_range.start
        running = range(first, config.source_index + 1 if states_only else config.layers)
        ran = self._run(context, embedded, _before(config, buffer, past, running), running)
        handed_on = dict(self.parameters)
        if len(running) == config.layers:
            handed_on = weights.with_weights(handed_on, ran.weights)
        written = (ran.written,)
        if buffer is not None:
            written = write(ran.before.pieces if config.scan_layers else buffer.pieces, ran.written, slot)
        hidden_BxPxD, source_BxPxD = layers.rms_norm(ran.x_BxPxD), layers.rms_norm(ran.source_BxPxD)
        return Forward(hidden_BxPxD, source_BxPxD, Buffer(written, positions_BxN), ran.refreshable), handed_on

    def below(self, embedded: Embedded, positions_BxP: jax.Array) -> Embedded:
        """All T tokens, with the residual stream below the first layer that reads memory, the same for any memory.

        Positions are int32, in order; their first axis may be 1.
        """
        config, running = self.config, range(self.config.memory_range.start)
        if not running:
            return embedded
        attend = kernels.attention_for(config, self.mesh, positions_BxP.shape[1], 1, False, 0)
        context = self._context(embedded, None, self._positions(positions_BxP, positions_BxP, 0), attend, False)
        ran = self._run(context, embedded, _before(config, None, None, running), running)
        return embedded._replace(x_BxPxD=ran.x_BxPxD)

    def _positions(self, positions_BxP: jax.Array, positions_BxN: jax.Array, slot: jax.Array | int) -> Positions:
        config = self.config
        rope = layers.rope_tables(positions_BxP, config.head_width, config.rope_base, compute_dtype(config))
        return Positions(rope, positions_BxP, positions_BxN, slot)

    def _context(
        self,
        embedded: Embedded,
        memory_BxPxD: jax.Array | None,
        positions: Positions,
        attend: Any,
        keep_refreshable: bool,
    ) -> Context:
        """What all layers of one forward share."""
        x0_BxPxD = meshes.constrain(self.mesh, embedded.x0_BxPxD, "batch", "sequence", None)
        projected, memory_BxPxD = None, memory_BxPxD if self.config.recurrent else None
        if memory_BxPxD is not None:
            memory_BxPxD = memory_BxPxD.astype(compute_dtype(self.config))
            memory_BxPxD = meshes.constrain(self.mesh, memory_BxPxD, "batch", "sequence", None)
            if self.config.shares_projections:
                projected = memory.project(memory_BxPxD, self.parameters["memory_key"], self.parameters["memory_value"])
        inputs = Inputs(x0_BxPxD, memory_BxPxD, projected)
        return Context(self.config, self.mesh, attend, keep_refreshable, inputs, positions)

    def _run(self, context: Context, embedded: Embedded, before: Any, running: range) -> stack.LayersOutput:
        """Some of the layers."""
        config, axes = self.config, ("batch", "sequence", "kv_heads", None)  # of one layer's, or of all stacked
        values = jax.tree.map(
            lambda x: meshes.constrain(self.mesh, x, *(None,) * (x.ndim - 4), *axes), embedded.values_ExBxPxKxC
        )
        own = stack.own_of_all_layers(config, self.parameters.get("value_gate"), values)
        edges = (running.start, running.stop)
        some = weights.of_some_layers(weights.of_all_layers(config, self.parameters), *edges)
        x_BxPxD = context.inputs.x0_BxPxD if embedded.x_BxPxD is None else embedded.x_BxPxD
        layers_run = stack.Layers(running, some, weights.of_some_layers(own, *edges), before)
        return stack.run(context, x_BxPxD, layers_run)

    def refresh(self, refreshable: Any, memory_BxPxD: jax.Array, positions_BxP: jax.Array) -> Any:
        """Each layer's keys and values under the latest memory (METHOD.md, "Training schedules"): a piece of a buffer.

        ``refreshable`` is from a forward with zero memory; m_{t-1} is of each of its positions. These are int32, and
        their first axis may be 1.
        """
        config, dtype = self.config, compute_dtype(self.config)
        memory_BxPxD = memory_BxPxD.astype(dtype)
        rope = layers.rope_tables(positions_BxP, config.head_width, config.rope_base, dtype)
        projections = [self.parameters[name] for name in ("memory_key", "memory_value")]
        shared = memory.project(memory_BxPxD, *projections) if config.shares_projections else None

        def one(stale: Refreshable, *own: jax.Array) -> KV:
            return memory.refresh(stale, shared or memory.project(memory_BxPxD, *own), rope)

        stacks = [] if shared else projections
        if config.scan_layers:
            return jax.vmap(one)(refreshable, *stacks)
        by_layer = [stack if isinstance(stack, tuple) else weights.cut(stack) for stack in stacks]
        return tuple(map(one, refreshable, *by_layer))

    def embed(self, *tokens_BxP: jax.Array) -> list[Embedded]:
        """x⁰ and the value embeddings of int tokens [B, P], those of several forwards together."""
        return embedding.embed(self.config, self.mesh, self.parameters, *tokens_BxP, columns=self.columns)

    def logits(self, hidden_BxPxD: jax.Array) -> jax.Array:
        """15 tanh(Whead h_final / 15), in float32 or wider: [B, P, V]."""
        return head.softcapped(self._raw(hidden_BxPxD), self.config.softcap)

    def losses(self, hidden_BxPxD: jax.Array, targets_BxP: jax.Array) -> jax.Array:
        """Cross entropy of int targets under the logits, in nats, float32 or wider: [B, P]."""
        return head.cross_entropy(self._raw(hidden_BxPxD), targets_BxP, self.config.softcap)

    def _raw(self, hidden_BxPxD: jax.Array) -> jax.Array:
        raw_BxPxV = layers.linear(hidden_BxPxD, self.parameters["head"])
        return meshes.constrain(self.mesh, raw_BxPxV, "batch", "sequence", "vocab")


def _before(config: ModelConfig, buffer: Buffer | None, past: Cache | None, running: range) -> Any:
    """What each layer knows of other positions: stacked where layers are scanned, else a list."""
    if config.scan_layers:
        return Before(() if buffer is None else buffer.pieces)
    nothing = [()] * len(running)
    pieces = nothing if buffer is None else buffer.by_layer()
    cached = [None] * len(running) if past is None else cache.by_layer(past)
    return list(map(Before, pieces, cached))


def _check_shapes(
    config: ModelConfig,
    shape: tuple[int, ...],
    positions_BxP: jax.Array,
    memory_BxPxD: jax.Array | None,
    buffer: Buffer | None,
    past: Cache | None,
    states_only: bool,
) -> None:
    rows, length = shape
    if positions_BxP.shape not in ((rows, length), (1, length)):
        raise ValueError(f"positions have shape {positions_BxP.shape}; allowed are {(rows, length)} and {(1, length)}")
    if memory_BxPxD is not None and memory_BxPxD.shape[:2] != (rows, length):
        raise ValueError(f"memory has shape {memory_BxPxD.shape}; it must begin with {(rows, length)}")
    if buffer is not None:
        found = buffer.positions_BxN.shape
        if found[0] not in (1, rows) or found[1] < length or (found[0] == 1 and positions_BxP.shape[0] != 1):
            raise ValueError(f"the buffer's positions have shape {found}; {(rows, length)} tokens do not fit")
    if buffer is not None and states_only:
        raise ValueError("a forward that ends at the source layer writes no buffer")
    if past is not None and (config.scan_layers or len(past.position_B) != rows):
        raise ValueError("a cache needs as many rows as there are tokens, and scan_layers off")
