"""What training may do to the memory that a forward reads, so that decoding does not depend on it to the last digit.

Drawn from the tokens themselves: the same on every process, mesh and split into microbatches, and for a run that goes
on; other tokens, other draws.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lrt_jax.setup.schedule import ScheduleConfig


@dataclasses.dataclass(frozen=True)
class Noise:
    """Jitter, and a plain prefix (Full-bandwidth Transformer, arXiv 2608.08888).

    Attributes:
      jitter: each entry of the memory moves by a uniform draw from -jitter to jitter; source states have RMS 1.
      plain_prefix: each row has zero memory up to a position drawn from all of its T.
    """

    jitter: float = 0.0
    plain_prefix: bool = False

    def __call__(
        self, memory_BxPxD: jax.Array, positions_P: jax.Array, keys_B: jax.Array, length: int, salt: jax.Array | int
    ) -> jax.Array:
        """The memory as a forward reads it.

        Args:
          memory_BxPxD: m_{t-1} of each position.
          positions_P: int32.
          keys_B: of :func:`keys_of`.
          length: T.
          salt: of this forward; others of the same step jitter otherwise. The prefix is the same in all.
        """
        wide = jnp.promote_types(memory_BxPxD.dtype, jnp.float32)
        if self.jitter:
            fold = jax.vmap(lambda key: jax.random.fold_in(key, salt))
            draw = jax.vmap(lambda key: jax.random.uniform(key, memory_BxPxD.shape[1:], wide, -1.0, 1.0))
            moved_BxPxD = memory_BxPxD + self.jitter * draw(fold(keys_B))
            # Before the first position there is nothing to move.
            memory_BxPxD = jnp.where(positions_P[None, :, None] == 0, memory_BxPxD, moved_BxPxD)
        if self.plain_prefix:
            prefix_B = jax.vmap(lambda key: jax.random.randint(key, (), 0, length))(keys_B)
            memory_BxPxD = jnp.where(positions_P[None, :, None] < prefix_B[:, None, None], 0, memory_BxPxD)
        return memory_BxPxD


def of(config: ScheduleConfig) -> Noise | None:
    """What the config asks for; None: nothing."""
    return Noise(config.jitter, config.plain_prefix) if config.jitter or config.plain_prefix else None


def keys_of(tokens_BxT: jax.Array) -> jax.Array:
    """A key for each row, from all its tokens and their order: [B]. What is drawn is not causal; its gradient is 0."""
    weights_T = jax.random.bits(jax.random.key(0), tokens_BxT.shape[1:], jnp.uint32) | 1
    return jax.vmap(jax.random.key)(jnp.sum(tokens_BxT.astype(jnp.uint32) * weights_T[None], axis=1, dtype=jnp.uint32))
