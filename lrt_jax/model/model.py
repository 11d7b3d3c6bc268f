"""A model as one value: a decoder and its parameters, which schedules, prefill and decoding hand around."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from lrt_jax.model import weights
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.buffer import Buffer
from lrt_jax.model.decoder import Decoder, Forward
from lrt_jax.model.embedding import Embedded
from lrt_jax.model.layers import Array
from lrt_jax.setup.config import ModelConfig


class Model(struct.PyTreeNode):
    """A decoder with its parameters. Differentiating by a model differentiates by its parameters.

    Attributes:
      decoder: the module; no leaf of the tree.
      params: its parameters, as ``parameters.table`` names them or as :meth:`by_layer` leaves them.
    """

    decoder: Decoder = struct.field(pytree_node=False)
    params: Any

    @property
    def config(self) -> ModelConfig:
        """The decoder's shape and switches."""
        return self.decoder.config

    @property
    def mesh(self) -> Mesh | None:
        """Where its activations lie."""
        return self.decoder.mesh

    def __call__(
        self,
        tokens_BxP: jax.Array | Embedded,
        positions_BxP: Array,
        memory_BxPxD: jax.Array | None = None,
        buffer: Buffer | None = None,
        slot: jax.Array | int = 0,
        **options: Any,
    ) -> "tuple[Forward, Model]":
        """:meth:`Decoder.__call__`: a forward over P positions, and this model as the next forward should read it.

        A forward that reads the returned model, and not this one, hands its gradient on to this forward in the backward
        pass, which adds its own in place (``model.recomputed``).
        """
        forward, params = self.decoder.apply(
            {"params": self.params}, tokens_BxP, positions_BxP, memory_BxPxD, buffer, slot, **options
        )
        return forward, self.replace(params=params)

    def embed(self, *tokens_BxP: jax.Array) -> list[Embedded]:
        """:meth:`Decoder.embed`: the tokens of as many forwards as are wanted, all looked up together."""
        return self._apply(Decoder.embed, *tokens_BxP)

    def below(self, embedded: Embedded) -> Embedded:
        """:meth:`Decoder.below` of all T tokens."""
        positions_T = np.arange(embedded.x0_BxPxD.shape[1], dtype=np.int32)
        return self._apply(Decoder.below, embedded, positions_T[None])

    def refresh(self, refreshable: Any, memory_BxPxD: jax.Array, positions_BxP: jax.Array) -> Any:
        """:meth:`Decoder.refresh`."""
        return self._apply(Decoder.refresh, refreshable, memory_BxPxD, positions_BxP)

    def logits(self, hidden_BxPxD: jax.Array) -> jax.Array:
        """:meth:`Decoder.logits`: [B, P, V], float32 or wider."""
        return self._apply(Decoder.logits, hidden_BxPxD)

    def losses(self, hidden_BxPxD: jax.Array, targets_BxP: jax.Array) -> jax.Array:
        """:meth:`Decoder.losses`: cross entropy in nats, [B, P], float32 or wider."""
        return self._apply(Decoder.losses, hidden_BxPxD, targets_BxP)

    def by_layer(self) -> "Model":
        """The model as several forwards should share it: parameters cut up once, unless layers are scanned."""
        if self.config.scan_layers:
            return self
        return self.replace(params=weights.by_layer(self.config, self.params))

    def for_decoding(self) -> "Model":
        """The model as decoding reads it: unrolled, by layer, matrices in the dtype of computation."""
        return self.unrolled.replace(params=_prepared(self.config, compute_dtype(self.config), self.params))

    @property
    def unrolled(self) -> "Model":
        """The same model with its layers unrolled, on which parameters do not depend."""
        return self.replace(decoder=_unrolled(self.decoder))

    def _apply(self, method: Any, *arguments: Any) -> Any:
        return self.decoder.apply({"params": self.params}, *arguments, method=method)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prepared(config: ModelConfig, dtype: jnp.dtype, params: Any) -> Any:
    return weights.cast(weights.by_layer(config, params), dtype)


@functools.lru_cache  # the same module each time, so that what is jitted with it is compiled once
def _unrolled(decoder: Decoder) -> Decoder:
    return decoder.clone(config=dataclasses.replace(decoder.config, scan_layers=False))
