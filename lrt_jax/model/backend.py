"""What a config leaves to the machine: on the devices at hand, or on those that a program is compiled for."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lrt_jax.setup.config import ConfigError, ModelConfig

# Where each kernel runs.
HOMES = {"splash": "tpu", "cudnn": "gpu"}
# Queries in a block of splash attention, best first; a size must divide P.
SPLASH_BLOCKS = (512, 256, 128)

_TARGET: ContextVar[jax.Device | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(device: jax.Device) -> Iterator[None]:
    """Within, what is traced is for machines of this kind (``lrt_jax.aot``), whatever machine this is."""
    token = _TARGET.set(device)
    try:
        yield
    finally:
        _TARGET.reset(token)


def target() -> jax.Device:
    """A device like those that will run what is traced now."""
    return _TARGET.get() or jax.devices()[0]


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations and matrix products; parameters, norms, softmax and losses stay float32.

    ``auto`` is bfloat16 on a TPU and on a GPU with bfloat16 tensor cores (compute capability 8.0 or more), else
    float32. ``float64`` makes everything float64.

    Raises:
      ConfigError: float64, where JAX would make float32 of it.
    """
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise ConfigError(
            "config.model.dtype is 'float64', and JAX computes in 32 bits here; set JAX_ENABLE_X64=1 to allow it, or "
            "choose one of: auto, float32, bfloat16"
        )
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    device = target()
    capability = str(getattr(device, "compute_capability", 0))  # of AMD's GPUs the name of the architecture
    fast = device.platform == "tpu" or not capability[:1].isdecimal() or float(capability) >= 8
    return jnp.dtype("bfloat16" if fast else "float32")


def attention_kind(config: ModelConfig, length: int, mesh: Mesh | None = None) -> str:
    """How forwards over whole strided subsets, or over all positions, attend: a value of ``model.attention``.

    ``auto`` is blocked on a CPU, where it was measured; splash on a TPU whose mesh does not shard positions, if its
    smallest block divides P; else dense.

    Args:
      config: the model.
      length: P, queries of a forward.
      mesh: of the decoder.

    Raises:
      ConfigError: the config asks for a kernel that is not for this machine.
    """
    platform, whole = target().platform, mesh is None or mesh.shape["sequence"] == 1
    kind = config.attention
    if kind in HOMES:
        _check_kernel(config, platform, whole)
    if kind != "auto":
        return kind
    if platform == "tpu" and whole and splash_block(length) is not None:
        return "splash"
    return "blocked" if platform == "cpu" else "dense"


def splash_block(length: int) -> int | None:
    """The largest block of splash attention that divides P = ``length`` queries; None if there is none."""
    return next((size for size in SPLASH_BLOCKS if length % size == 0), None)


def _check_kernel(config: ModelConfig, platform: str, whole: bool) -> None:
    kind, why = config.attention, ""
    if platform not in (HOMES[kind], "cpu"):  # on a CPU XLA or an interpreter computes the same, slowly
        why = f"it runs on a {HOMES[kind].upper()}, and the device is a {platform.upper()}"
    elif not whole:
        why = "it needs config.mesh.sequence = 1"
    elif kind == "cudnn" and platform == "gpu" and compute_dtype(config) != jnp.bfloat16:
        why = f"cuDNN's flash attention needs bfloat16, and config.model.dtype is {compute_dtype(config)}"
    elif kind == "cudnn" and (config.head_width % 8 or config.head_width > 128):
        why = f"head widths that cuDNN takes are multiples of 8 up to 128, and this model's is {config.head_width}"
    if why:
        allowed = [
            "auto",
            "dense",
            "blocked",
            *(other for other in HOMES if other != kind and HOMES[other] == platform),
        ]
        raise ConfigError(f"config.model.attention is {kind!r}; {why}; allowed are: {', '.join(allowed)}")
