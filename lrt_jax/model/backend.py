"""What a config leaves to the machine: the kind of attention, the dtype of computation.

On the devices at hand, or on those that a program is compiled for. Of attention :func:`attention_kind` decides all but
one case: forwards that read a KV cache attend by ``cache.Cached.attend``, which is dense.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lrt_jax.setup.config import ConfigError, ModelConfig

# Where each kernel runs.
HOMES = {"splash": "tpu", "cudnn": "gpu"}
# Queries in a block of splash attention, best first; a size must divide P.
SPLASH_BLOCKS = (512, 256, 128)
# cuDNN is called for each of S pieces, by each of S subset forwards, in each layer: programs grow with S².
MOST_PIECES = 8

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
    if device.platform == "cpu":
        return jnp.dtype("float32")
    capability = _capability(device)
    fast = capability is None or capability >= 8  # None: TPUs, AMD's GPUs
    return jnp.dtype("bfloat16" if fast else "float32")


RAGGED = "rows begin with empty positions"


class Attention(NamedTuple):
    """How forwards over whole strided subsets, or over all positions, attend here.

    Attributes:
      kind: a value of ``model.attention``, but ``auto``.
      why: where there is a kernel for this machine and this is not it, the reason; else empty.
    """

    kind: str
    why: str = ""


def attention_kind(
    config: ModelConfig,
    length: int,
    mesh: Mesh | None = None,
    subsets: int | None = 1,
    *,
    traced: bool = False,
    ragged: bool = False,
) -> Attention:
    """What ``model.attention`` stands for.

    ``auto`` is the machine's kernel, splash on a TPU and cuDNN on a GPU, if it takes this model. Else, and on a CPU, it
    is blocked, or dense on a TPU and where a mesh shards a GPU's positions: in parts, so that memory does not grow
    with P N (``attention.attend_in_parts``). So is attention of positions whose order is not known.

    Args:
      config: the model.
      length: P, queries of a forward.
      mesh: of the decoder.
      subsets: S; None: queries are no strided subset.
      traced: which subset it is will be known only when the program runs, as in a scan over them.
      ragged: rows may begin with empty positions, which kernels know nothing of.

    Raises:
      ConfigError: the config asks for a kernel that is not for this machine.
    """
    asked, platform = config.attention, target().platform
    whole = mesh is None or mesh.shape["sequence"] == 1
    kernel = asked if asked in HOMES else next((name for name, home in HOMES.items() if home == platform), "")
    why = ""
    if asked in HOMES:
        _check_kernel(config, platform, whole)
    elif kernel:
        why = f"config.model.attention is {asked!r}" if asked != "auto" else _refusal(kernel, config, platform, whole)
    if kernel and not why:
        why = _misfit(kernel, length, subsets, traced, asked) or (RAGGED if ragged else "")
        if not why:
            return Attention(kernel)
    tiles = asked == "blocked" or (asked != "dense" and (platform == "cpu" or (platform == "gpu" and whole)))
    return Attention("blocked" if tiles and subsets is not None else "dense", why)


def splash_block(length: int) -> int | None:
    """The largest block of splash attention that divides P = ``length`` queries; None if there is none."""
    return next((size for size in SPLASH_BLOCKS if length % size == 0), None)


def _check_kernel(config: ModelConfig, platform: str, whole: bool) -> None:
    kind = config.attention
    why = _refusal(kind, config, platform, whole)
    if why:
        others = (other for other in HOMES if other != kind and HOMES[other] == platform)
        allowed = ["auto", "dense", "blocked", *others]
        raise ConfigError(f"config.model.attention is {kind!r}; {why}; allowed are: {', '.join(allowed)}")


def _refusal(kind: str, config: ModelConfig, platform: str, whole: bool) -> str:
    """Why a kernel cannot serve this model on this machine; empty if it can."""
    if platform not in (HOMES[kind], "cpu"):  # on a CPU XLA or an interpreter computes the same, slowly
        return f"it runs on a {HOMES[kind].upper()}, and the device is a {platform.upper()}"
    if not whole:
        return f"{kind} needs config.mesh.sequence = 1"
    if kind != "cudnn" or platform != "gpu":
        return ""
    dtype, capability = compute_dtype(config), _capability(target())
    widest = 256 if capability is not None and capability >= 9 else 128
    if capability is None:
        return "cuDNN is for NVIDIA GPUs"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's flash attention needs bfloat16, and config.model.dtype is {dtype}"
    if capability < 8:
        return f"cuDNN's flash attention needs a GPU of compute capability 8.0, and this one's is {capability}"
    if config.head_width % 8 or config.head_width > widest:
        return f"cuDNN takes head widths of multiples of 8 up to {widest}, and this model's is {config.head_width}"
    return ""


def _misfit(kind: str, length: int, subsets: int | None, traced: bool, asked: str) -> str:
    """Why a kernel is not for these queries; empty if it is. ``asked``: what the config says."""
    if subsets is None:
        return f"{kind} is for strided subsets of positions, and these are in another order"
    if traced:
        return f"{kind} must know the subset when it is compiled; set config.schedule.unroll = True"
    if kind == "splash" and splash_block(length) is None:
        return f"no block of splash attention divides {length} positions; the smallest is {min(SPLASH_BLOCKS)}"
    if kind == "cudnn" and asked == "auto" and subsets > MOST_PIECES:
        return f"{subsets} subsets would be {subsets} calls of cuDNN each; auto makes up to {MOST_PIECES}"
    return ""


def _capability(device: jax.Device) -> float | None:
    """An NVIDIA GPU's compute capability; None of others, whose name of the architecture is no number."""
    try:
        return float(getattr(device, "compute_capability", "none"))
    except ValueError:
        return None
