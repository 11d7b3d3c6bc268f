"""What the config's ``auto`` means on the devices at hand."""

import jax
import jax.numpy as jnp

from lrt_jax.setup.config import ModelConfig


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations and matrix products; parameters, norms, softmax and losses stay float32.

    ``auto`` is bfloat16 on a TPU and on a GPU with bfloat16 tensor cores (compute capability 8.0 or more), else
    float32.
    """
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    device = jax.devices()[0]
    fast = device.platform == "tpu" or float(getattr(device, "compute_capability", 0)) >= 8
    return jnp.dtype("bfloat16" if fast else "float32")


def attends_in_blocks(config: ModelConfig) -> bool:
    """Whether attention over whole subsets goes block by block; ``auto`` does on a CPU, where it was measured."""
    if config.attention == "auto":
        return jax.default_backend() == "cpu"
    return config.attention == "blocked"
