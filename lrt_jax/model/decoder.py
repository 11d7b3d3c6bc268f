"""The decoder: one forward that serves initialization, subsets and decoding.

It knows neither schedules nor losses. Everything it produces, it returns: hidden states, the source
state that becomes recurrent memory, and the buffer of keys and values.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax import lax
from jax.sharding import Mesh

from lrt_jax.model import attention, cache, embedding, head, layers, memory, pieces, stack
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.cache import Cache
from lrt_jax.model.embedding import Embedded
from lrt_jax.model.memory import KV, Refreshable
from lrt_jax.model.parameters import is_by_layer, table, unstack
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import ModelConfig


class Buffer(struct.PyTreeNode):
    """Keys and values of every layer, after gates, RoPE and QK norm: the shared buffer.

    Of L layers; where those below the memory are known (:meth:`Decoder.below`), of the others.

    Attributes:
      pieces: its N slots, in one piece or in several of the same size. A piece is a tuple of L :class:`KV` with
        leaves [B, K, N, C], or with ``scan_layers`` one KV with leaves [L, B, K, N, C]. A forward that fills a
        whole piece takes its place, where within a piece it would have to copy what others still need.
      positions_BxN: int32, the position each slot holds, ``attention.EMPTY`` where none; the first axis
        is 1 where all rows are alike.
    """

    pieces: tuple[Any, ...]
    positions_BxN: jax.Array


class Forward(NamedTuple):
    """What one forward returns, for its P positions.

    Attributes:
      hidden_BxPxD: ``h_final``, which :meth:`Decoder.logits` reads.
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


def empty_buffer(config: ModelConfig, rows: int, slots: int, pieces: int = 1) -> Buffer:
    """A buffer with nothing in it: N = ``slots`` for each of B = ``rows`` sequences, in as many pieces of one size.

    It is of the layers from the first on that reads memory (:meth:`Decoder.below`).
    """
    shape = (rows, config.kv_heads, slots // pieces, config.head_width)

    def zeros(*layers: int) -> KV:
        return KV(*(jnp.zeros((*layers, *shape), compute_dtype(config)) for _ in range(2)))

    layers = config.layers - config.memory_range.start
    kv = zeros(layers) if config.scan_layers else tuple(zeros() for _ in range(layers))
    return Buffer((kv,) * pieces, jnp.full((1, slots), attention.EMPTY, jnp.int32))


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
        config, dtype = self.config, compute_dtype(self.config)
        embedded = tokens_BxP if isinstance(tokens_BxP, Embedded) else self.embed(tokens_BxP)[0]
        rows, length = embedded.x0_BxPxD.shape[:2]
        _check_shapes((rows, length), positions_BxP, memory_BxPxD, buffer)
        if past is not None and (config.scan_layers or len(past.position_B) != rows):
            raise ValueError("a cache needs as many rows as there are tokens, and scan_layers off")
        if memory_BxPxD is not None:
            memory_BxPxD = memory_BxPxD.astype(dtype) if config.recurrent else None
        if memory_BxPxD is not None:
            memory_BxPxD = meshes.constrain(self.mesh, memory_BxPxD, "batch", "sequence", None)
        positions_BxN = positions_BxP
        if buffer is not None:
            written_BxP = jnp.broadcast_to(positions_BxP, (buffer.positions_BxN.shape[0], positions_BxP.shape[1]))
            positions_BxN = lax.dynamic_update_slice_in_dim(buffer.positions_BxN, written_BxP, slot, axis=1)
        before: Any = None if buffer is None else buffer.pieces  # by layer, or stacked where layers are scanned
        if past is not None:
            before = cache.held(past, () if buffer is None else buffer.pieces)
        elif buffer is not None and not config.scan_layers:
            before = list(zip(*buffer.pieces, strict=True))
        context = self._context(
            embedded,
            positions_BxP,
            positions_BxN,
            memory_BxPxD,
            pieces.attention_for(config, self.mesh, positions_BxP.shape[1], subsets, ragged, slot),
            slot,
            keep_refreshable,
        )
        first = 0 if embedded.x_BxPxD is None else config.memory_range.start
        layers_run = range(first, config.source_index + 1 if states_only else config.layers)
        ran, handed_on = self._run(context, embedded, before, layers_run)
        written: tuple[Any, ...] = (ran.fresh,)
        if buffer is not None:
            written = pieces.write(ran.before if config.scan_layers else buffer.pieces, ran.fresh, slot)
        hidden_BxPxD, source_BxPxD = layers.rms_norm(ran.x_BxPxD), layers.rms_norm(ran.source_BxPxD)
        return Forward(hidden_BxPxD, source_BxPxD, Buffer(written, positions_BxN), ran.refreshable), handed_on

    def below(self, embedded: Embedded, positions_BxP: jax.Array) -> Embedded:
        """The same tokens with the residual stream below the first layer that reads memory, the same for any memory.

        Args:
          embedded: all T tokens, looked up.
          positions_BxP: int32, in order; the first axis may be 1.
        """
        first = self.config.memory_range.start
        if first == 0:
            return embedded
        attend = pieces.attention_for(self.config, self.mesh, positions_BxP.shape[1], 1, False, 0)
        context = self._context(embedded, positions_BxP, positions_BxP, None, attend, 0, False)
        ran, _ = self._run(context, embedded, None, range(first))
        return embedded._replace(x_BxPxD=ran.x_BxPxD)

    def _context(
        self,
        embedded: Embedded,
        positions_BxP: jax.Array,
        positions_BxN: jax.Array,
        memory_BxPxD: jax.Array | None,
        attend: Any,
        slot: jax.Array | int,
        keep_refreshable: bool,
    ) -> stack.Context:
        """What all layers of one forward share."""
        config, sharded = self.config, functools.partial(meshes.constrain, self.mesh)
        x0_BxPxD = sharded(embedded.x0_BxPxD, "batch", "sequence", None)
        projected = stack.shared_projection(config, memory_BxPxD, self.parameters)
        return stack.Context(
            config=config,
            sharded=sharded,
            attend=attend,
            keep_refreshable=keep_refreshable,
            inputs=stack.Inputs(x0_BxPxD, memory_BxPxD, projected),
            places=stack.Places(
                rope=layers.rope_tables(positions_BxP, config.head_width, config.rope_base, compute_dtype(config)),
                queries_BxP=positions_BxP,
                keys_BxN=positions_BxN,
                slot=slot,
            ),
        )

    def _run(
        self, context: stack.Context, embedded: Embedded, before: Any, layers_run: range
    ) -> tuple[stack.Ran, dict[str, Any]]:
        """Some of the layers; and the parameters as the next forward should read them."""
        config, arrays = self.config, self.parameters
        axes = ("batch", "sequence", "kv_heads", None)  # of one layer's, or of all stacked
        values = jax.tree.map(lambda x: context.sharded(x, *(None,) * (x.ndim - 4), *axes), embedded.values_ExBxPxKxC)
        own = stack.per_layer(config, arrays, values)
        weights = [name for name, array in own.items() if array is arrays.get(name)]
        begins = context.inputs.x0_BxPxD if embedded.x_BxPxD is None else embedded.x_BxPxD
        ran = stack.run(context, begins, own, before, weights, layers_run)
        return ran, {**arrays, **{name: ran.own[name] for name in weights}}

    def refresh(self, refreshable: Any, memory_BxPxD: jax.Array, positions_BxP: jax.Array) -> Any:
        """Keys and values of every layer under the latest memory (METHOD.md, "Training schedules").

        Args:
          refreshable: from a forward with zero memory.
          memory_BxPxD: m_{t-1} for each of its positions.
          positions_BxP: int32; the first axis may be 1.

        Returns:
          A piece of a buffer.
        """
        config, arrays = self.config, self.parameters
        dtype = compute_dtype(config)
        memory_BxPxD = memory_BxPxD.astype(dtype)
        rope = layers.rope_tables(positions_BxP, config.head_width, config.rope_base, dtype)
        if config.memory == "shared":
            projected = memory.project(memory_BxPxD, arrays["memory_key"], arrays["memory_value"])
            refreshed = functools.partial(memory.refresh, projected=projected, rope_tables=rope)
            return jax.vmap(refreshed)(refreshable) if config.scan_layers else tuple(map(refreshed, refreshable))

        def one(stale: Refreshable, key_DxKxC: jax.Array, value_DxKxC: jax.Array) -> KV:
            return memory.refresh(stale, memory.project(memory_BxPxD, key_DxKxC, value_DxKxC), rope)

        if config.scan_layers:
            return jax.vmap(one)(refreshable, arrays["memory_key"], arrays["memory_value"])
        own = unstack({name: arrays[name] for name in ("memory_key", "memory_value")}, config.layers)
        return tuple(
            one(stale, layer["memory_key"], layer["memory_value"])
            for stale, layer in zip(refreshable, own, strict=True)
        )

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


def _check_shapes(
    shape: tuple[int, ...], positions_BxP: jax.Array, memory_BxPxD: jax.Array | None, buffer: Buffer | None
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
