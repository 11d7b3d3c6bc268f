"""Refinement of given tokens' source states towards their fixed point, which is what sequential decoding computes.

With one subset a refinement is a full forward whose memory is the source states of the one before: each makes one more
token exact. With S strided subsets it is a sweep: S subset forwards in turn, of P / S tokens each, that read what the
ones before them computed. It costs as much as a full forward, and goes S tokens farther (Gauss-Seidel, not Jacobi).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from lrt_jax.inference import decode
from lrt_jax.inference.decode import PAD, DecodeState
from lrt_jax.method.partitions import Strided
from lrt_jax.model.buffer import SLOTS, Buffer
from lrt_jax.model.decoder import Forward
from lrt_jax.model.model import Model


class Guess(struct.PyTreeNode):
    """One iterate of the fixed point, in slot order: a subset's tokens lie together.

    Attributes:
      kv: a piece of a buffer, with keys and values of all P tokens.
      source_BxPxD: their source states.
      hidden_BxPxD: their h_final.
      refinements_B: int32, how many led here.
      residual_B: the largest change of a source state in the last of them.
    """

    kv: Any
    source_BxPxD: jax.Array
    hidden_BxPxD: jax.Array
    refinements_B: jax.Array
    residual_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What all refinements of given tokens have in common.

    Attributes:
      state: before the tokens.
      tokens_BxP: int32, PAD only on the left.
      positions_BxP: of ``decode.positions_of``.
      partition: of the P columns.
      from_start: there is nothing in the state's cache.
    """

    model: Model
    state: DecodeState
    tokens_BxP: jax.Array
    positions_BxP: jax.Array
    partition: Strided
    from_start: bool

    @property
    def begun_BxP(self) -> jax.Array:
        """Where there is a token."""
        return self.tokens_BxP != PAD

    @property
    def first_BxP(self) -> jax.Array:
        """Where each row's first token is, whose memory is known: that of the state."""
        return self.begun_BxP & (jnp.cumsum(self.begun_BxP, axis=1) == 1)

    @property
    def needed_B(self) -> jax.Array:
        """After so many refinements every token of a row is exact, whatever changed last; 0 or less: already."""
        return self.needed_by(jnp.sum(self.begun_BxP, axis=1, dtype=jnp.int32))

    def needed_by(self, tokens: Any) -> Any:
        """The same of a row with so many tokens: the first is exact before, and each sweep ends one more stretch."""
        length, subsets = self.tokens_BxP.shape[1], self.partition.subsets
        return (length - 1) // subsets - (length - tokens + 1) // subsets + 1

    def memory(self, source_BxPxD: jax.Array | None, previous_P: Any, first_BxP: jax.Array) -> jax.Array:
        """m_{t-1} of some columns: the state's for a row's first, else the source states at the slots before; or 0."""
        known_Bx1xD = self.state.memory_BxD[:, None]
        guess = jnp.zeros_like(known_Bx1xD) if source_BxPxD is None else jnp.take(source_BxPxD, previous_P, axis=1)
        return jnp.where(first_BxP[:, :, None], known_Bx1xD, guess)


def first(chunk: Chunk, needed_B: jax.Array, *, zero_memory: bool) -> Guess:
    """The iterate that the others begin with: a full forward in which all but each row's first token have zero memory.

    With ``zero_memory`` the first has it, too. ``needed_B`` refinements make a row exact.
    """
    nothing = zero_memory or chunk.from_start  # in the first state the first memory is zero
    memory = None if nothing else chunk.memory(None, None, chunk.first_BxP)
    columns = (chunk.tokens_BxP, memory, chunk.positions_BxP)
    out = decode.forward(chunk.model, chunk.state, *columns, from_start=chunk.from_start)
    wide = jnp.promote_types(out.source_BxPxD.dtype, jnp.float32)
    in_slots = chunk.partition.in_slots
    return Guess(
        kv=jax.tree.map(lambda leaf: in_slots(leaf, SLOTS), out.buffer.pieces[0]),
        source_BxPxD=in_slots(out.source_BxPxD, 1),
        hidden_BxPxD=in_slots(out.hidden_BxPxD, 1),
        refinements_B=jnp.zeros_like(needed_B),
        residual_B=jnp.where(needed_B > 0, jnp.inf, 0.0).astype(wide),
    )


def refined(chunk: Chunk, guess: Guess) -> Guess:
    """The next iterate: each subset in turn reads the latest source states, keys and values of all tokens."""
    partition, wide = chunk.partition, guess.residual_B.dtype
    begun_BxP = partition.in_slots(chunk.begun_BxP, 1)
    positions_BxP = partition.in_slots(chunk.positions_BxP, 1)
    size = partition.positions_SxP.shape[1]

    def subset(carry: tuple[Any, jax.Array, jax.Array], mine: Any) -> tuple[tuple[Any, jax.Array, jax.Array], None]:
        kv, source_BxPxD, hidden_BxPxD = carry
        index, tokens, positions, first_BxP, previous_P = mine
        memory_BxPxD = chunk.memory(source_BxPxD, previous_P, first_BxP)
        columns = (tokens, memory_BxPxD, positions)
        rest = (Buffer((kv,), positions_BxP), index) if partition.subsets > 1 else ()
        out = decode.forward(chunk.model, chunk.state, *columns, *rest, from_start=chunk.from_start)
        put = lambda old, new: lax.dynamic_update_slice_in_dim(old, new, index * size, axis=1)  # noqa: E731
        states = put(source_BxPxD, out.source_BxPxD), put(hidden_BxPxD, out.hidden_BxPxD)
        return (out.buffer.pieces[0], *states), None

    each = (chunk.tokens_BxP, chunk.positions_BxP, chunk.first_BxP)
    split = [jnp.moveaxis(partition.split(array, 1), 1, 0) for array in each]
    order = (jnp.arange(partition.subsets), *split, jnp.asarray(partition.previous_slots_SxP))
    (kv, source_BxPxD, hidden_BxPxD), _ = lax.scan(subset, (guess.kv, guess.source_BxPxD, guess.hidden_BxPxD), order)
    change_BxPxD = jnp.abs(source_BxPxD.astype(wide) - guess.source_BxPxD.astype(wide))
    change_B = jnp.max(jnp.where(begun_BxP[:, :, None], change_BxPxD, 0.0), axis=(1, 2))
    return Guess(kv, source_BxPxD, hidden_BxPxD, guess.refinements_B + 1, change_B)


def in_order(chunk: Chunk, guess: Guess) -> Forward:
    """The iterate as a forward of the tokens in their order would return it."""
    slots_P = chunk.partition.slots_T
    put = lambda array, axis: jnp.take(array, slots_P, axis=axis)  # noqa: E731
    if chunk.partition.subsets == 1:
        put = lambda array, axis: array  # noqa: E731
    kv = jax.tree.map(lambda leaf: put(leaf, SLOTS), guess.kv)
    return Forward(
        hidden_BxPxD=put(guess.hidden_BxPxD, 1),
        source_BxPxD=put(guess.source_BxPxD, 1),
        buffer=Buffer((kv,), chunk.positions_BxP),
    )
