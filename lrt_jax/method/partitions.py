"""Disjoint position masks: how T positions fall into S subsets of P = T/S (pure integers).

The shared buffer holds positions in *slot order*, subset after subset, so that a subset is one slice:
slot i·P + j holds position ``positions_SxP[i, j]``.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Partition:
    """S disjoint subsets that together hold every position once.

    Attributes:
      positions_SxP: int32 numpy array; row i lists the positions of subset i, ascending.
    """

    positions_SxP: np.ndarray

    @property
    def subsets(self) -> int:
        """S."""
        return self.positions_SxP.shape[0]

    @property
    def masks_SxT(self) -> np.ndarray:
        """bool: which positions each subset holds."""
        masks_SxT = np.zeros((self.subsets, self.positions_SxP.size), bool)
        np.put_along_axis(masks_SxT, self.positions_SxP, True, axis=1)
        return masks_SxT

    @property
    def slots_T(self) -> np.ndarray:
        """The slot of each position."""
        return np.argsort(self.positions_SxP.reshape(-1)).astype(np.int32)

    @property
    def previous_slots_SxP(self) -> np.ndarray:
        """The slot of the position before each; 0, which means nothing, for position 0."""
        return self.slots_T[np.maximum(self.positions_SxP - 1, 0)]

    def split(self, array: jax.Array, axis: int) -> jax.Array:
        """Turns an axis of T positions into two, S and P."""
        axis %= array.ndim
        shape = (*array.shape[:axis], *self.positions_SxP.shape, *array.shape[axis + 1 :])
        return jnp.take(array, self.positions_SxP.reshape(-1), axis=axis).reshape(shape)

    def in_slots(self, array: jax.Array, axis: int) -> jax.Array:
        """The same array with the T positions of ``axis`` in slot order."""
        return self.split(array, axis).reshape(array.shape)

    def merge(self, array: jax.Array, axis: int) -> jax.Array:
        """Turns the axes S (at ``axis``) and P (the next) back into T positions in natural order."""
        axis %= array.ndim
        shape = (*array.shape[:axis], self.positions_SxP.size, *array.shape[axis + 2 :])
        return jnp.take(array.reshape(shape), self.slots_T, axis=axis)


@dataclasses.dataclass(frozen=True)
class Strided(Partition):
    """Subset i holds the positions t ≡ i (mod S): splitting is a reshape, not a gather."""

    def split(self, array: jax.Array, axis: int) -> jax.Array:
        """Turns an axis of T positions into two, S and P."""
        axis %= array.ndim
        subsets, length = self.positions_SxP.shape
        shape = (*array.shape[:axis], length, subsets, *array.shape[axis + 1 :])
        return jnp.swapaxes(array.reshape(shape), axis, axis + 1)

    def merge(self, array: jax.Array, axis: int) -> jax.Array:
        """Turns the axes S (at ``axis``) and P (the next) back into T positions in natural order."""
        axis %= array.ndim
        shape = (*array.shape[:axis], self.positions_SxP.size, *array.shape[axis + 2 :])
        return jnp.swapaxes(array, axis, axis + 1).reshape(shape)


def strided(length: int, subsets: int) -> Strided:
    """The default partition (METHOD.md, "Training schedules"): subset i of S holds the positions t ≡ i (mod S).

    Raises:
      ValueError: ``subsets`` does not divide ``length``; as for the other partitions.
    """
    _check(length, subsets)
    return Strided(np.arange(length, dtype=np.int32).reshape(-1, subsets).T)


def contiguous(length: int, subsets: int) -> Partition:
    """Subset i holds the i-th stretch of P positions."""
    _check(length, subsets)
    return Partition(np.arange(length, dtype=np.int32).reshape(subsets, -1))


def random(length: int, subsets: int) -> Partition:
    """Positions are dealt to the subsets at random: the same for every step and run."""
    _check(length, subsets)
    order = np.random.default_rng(0).permutation(length).astype(np.int32)
    return Partition(np.sort(order.reshape(subsets, -1), axis=1))


# By the names that the config uses.
PARTITIONS = {"strided": strided, "contiguous": contiguous, "random": random}


def _check(length: int, subsets: int) -> None:
    if length % subsets:
        raise ValueError(f"{subsets} subsets do not divide {length} positions")
