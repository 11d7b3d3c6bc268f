"""Splash attention (TPUs) for one strided subset's queries.

Nothing of size P × N is ever stored, forward or backward: the kernel is given the mask of the subset, and computes
just the blocks that it leaves.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, PartitionSpec

from lrt_jax.model.backend import SPLASH_BLOCKS, splash_block


class StridedMask(masks._ComputableMask):  # the base of every mask that a kernel computes instead of loading it
    """What subset i of S sees: keys in slot order, causal by true position, within a window.

    Query j is at position j S + i, and slot r P + j holds position j S + r.
    """

    def __init__(self, length: int, subsets: int, subset: int, window: int):
        """The mask of P = ``length`` queries over S P slots; ``window`` as in ``attention.visible``."""
        self.key = (length, subsets, subset, window)

        def visible(queries: np.ndarray, slots: np.ndarray) -> np.ndarray:
            # A slot's subset by comparison: vector units have no integer division.
            owner = sum(((slots >= length * r).astype(np.int32) for r in range(1, subsets)), start=0 * slots)
            distance = queries - ((slots - owner * length) * subsets + owner)
            return (distance >= 0) & (distance <= window)

        super().__init__((length, subsets * length), visible)
        self.q_sequence = np.arange(length, dtype=np.int32) * subsets + subset

    def __eq__(self, other: object) -> bool:
        """Masks are equal if they are made alike."""
        return isinstance(other, StridedMask) and self.key == other.key

    def __hash__(self) -> int:
        """As ``__eq__``."""
        return hash((type(self), self.key))


def attend_by_splash(
    q_BxPxHxC: jax.Array,
    k_BxKxNxC: jax.Array,
    v_BxKxNxC: jax.Array,
    *,
    window: int,
    subsets: int,
    subset: int,
    mesh: Mesh | None,
    interpret: bool,
) -> jax.Array:
    """``attention.attend`` for subset i of S, its keys in slot order, all rows alike: [B, P, H, C].

    Args:
      q_BxPxHxC: the queries of subset i, ascending.
      k_BxKxNxC: keys, N = S P.
      v_BxKxNxC: values.
      window: how many positions before itself a query sees.
      subsets: S; 1: all positions.
      subset: i.
      mesh: a kernel is not partitioned by GSPMD, so rows and heads are dealt to the devices of this mesh by hand.
      interpret: run the kernel in Python's stead, where there is no TPU.

    Raises:
      ValueError: no block size divides P.
    """
    rows, length = q_BxPxHxC.shape[:2]
    block = splash_block(length)
    if block is None:
        smallest = min(SPLASH_BLOCKS)
        raise ValueError(f"{length} queries are not divisible by {smallest}, the smallest block of splash attention")

    def local(q_BxHxPxC: jax.Array, k_BxKxNxC: jax.Array, v_BxKxNxC: jax.Array) -> jax.Array:
        kernel = _kernel(q_BxHxPxC.shape[1], length, subsets, subset, window, block, interpret)
        return jnp.asarray(jax.vmap(kernel)(q_BxHxPxC, k_BxKxNxC, v_BxKxNxC))

    if mesh is not None and mesh.size > 1:
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        spec = PartitionSpec(("data", "fsdp") if rows % ways == 0 else None, "tensor", None, None)
        local = jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
    scaled_BxHxPxC = jnp.swapaxes(q_BxPxHxC * q_BxPxHxC.shape[-1] ** -0.5, 1, 2)
    return jnp.swapaxes(local(scaled_BxHxPxC, k_BxKxNxC, v_BxKxNxC), 1, 2).astype(q_BxPxHxC.dtype)


def _kernel(
    heads: int, length: int, subsets: int, subset: int, window: int, block: int, interpret: bool
) -> splash.SplashAttentionKernel:
    mask = masks.MultiHeadMask([StridedMask(length, subsets, subset, window)] * heads)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
