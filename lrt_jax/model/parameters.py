"""The table of parameters: every array's shape, logical axes, initial values and optimizer group.

One table serves the decoder that creates the arrays, the optimizer that partitions them, the sharding
rules, the counts printed at start, and the conversion from the authors' names. Arrays that every layer
owns are stacked on a leading ``layers`` axis, so a checkpoint does not depend on ``model.scan_layers``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from lrt_jax.setup.config import ModelConfig

Group = Literal["matrix", "embedding", "head", "alpha", "beta", "gamma"]
Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One array of the model.

    Attributes:
      shape: its shape, in the letters of METHOD.md, "Symbols".
      axes: a logical axis name per dimension; ``setup.mesh`` maps them to mesh axes.
      init: ``(key, shape, dtype) -> array``.
      group: which optimizer and learning rate it gets.
      inputs: for matrices, the dimensions that the product contracts; those left, but ``layers``, are outputs.
      memory: whether only a model with recurrent memory has it.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Initializer
    group: Group
    inputs: tuple[int, ...] = ()
    memory: bool = False

    @property
    def size(self) -> int:
        """Number of scalars."""
        return math.prod(self.shape)

    @property
    def matrices(self) -> tuple[int, int, int]:
        """How many matrices it holds, one after the other, and the inputs and outputs of each."""
        count = self.shape[0] if self.axes[0] == "layers" else 1
        inputs = math.prod(self.shape[axis] for axis in self.inputs)
        return count, inputs, self.size // count // inputs


def _uniform(std: float) -> Initializer:
    bound = std * math.sqrt(3.0)
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def table(config: ModelConfig) -> dict[str, Parameter]:
    """The parameters of the decoder that ``config`` describes, by name (METHOD.md, "Backbone")."""
    L, D, H, K, C, F, V = (
        config.layers,
        config.width,
        config.heads,
        config.kv_heads,
        config.head_width,
        config.mlp_width,
        config.vocab_size,
    )
    constant, normal, zeros = jax.nn.initializers.constant, jax.nn.initializers.normal, jax.nn.initializers.zeros
    fan_in = _uniform(1 / math.sqrt(D))
    query_axes, kv_axes = ("layers", "embed", "heads", "head"), ("layers", "embed", "kv_heads", "head")
    parameters = {
        "embedding": Parameter((V, D), ("vocab", "embed"), normal(1.0), "embedding"),
        "head": Parameter((D, V), ("embed", "vocab"), normal(0.001), "head"),
        "query": Parameter((L, D, H, C), query_axes, fan_in, "matrix", (1,)),
        "key": Parameter((L, D, K, C), kv_axes, fan_in, "matrix", (1,)),
        "value": Parameter((L, D, K, C), kv_axes, fan_in, "matrix", (1,)),
        "output": Parameter((L, H, C, D), ("layers", "heads", "head", "embed"), zeros, "matrix", (1, 2)),
        "mlp_in": Parameter((L, D, F), ("layers", "embed", "mlp"), fan_in, "matrix", (1,)),
        "mlp_out": Parameter((L, F, D), ("layers", "mlp", "embed"), zeros, "matrix", (1,)),
    }
    if config.alpha:
        parameters["alpha"] = Parameter((L,), ("layers",), constant(1.0), "alpha")
    if config.beta:
        parameters["beta"] = Parameter((L,), ("layers",), constant(0.1), "beta")
    if config.value_embedding_layers:
        E, c = len(config.value_embedding_layers), config.gate_inputs
        table_axes, gate_axes = ("layers", "vocab", "kv_heads", "value"), ("layers", "gate_inputs", "kv_heads")
        parameters["value_embedding"] = Parameter((E, V, K, C), table_axes, fan_in, "embedding")
        parameters["value_gate"] = Parameter((E, c, K), gate_axes, zeros, "matrix", (1,))
    parameters |= _memory_table(config, fan_in)
    return parameters


def _memory_table(config: ModelConfig, fan_in: Initializer) -> dict[str, Parameter]:
    """What recurrent memory adds: γ, the projections Uk and Uv, and the gates g_loc and g_mem."""
    L, D, K, C = config.layers, config.width, config.kv_heads, config.head_width
    parameters = {}
    if config.residual_injection:
        parameters["gamma"] = Parameter((L,), ("layers",), jax.nn.initializers.constant(0.1), "gamma", memory=True)
    if config.projects_memory:
        stack, stack_axes = ((), ()) if config.shares_projections else ((L,), ("layers",))
        for name in ("memory_key", "memory_value"):
            parameters[name] = Parameter(
                (*stack, D, K, C),
                (*stack_axes, "embed", "kv_heads", "head"),
                fan_in,
                "matrix",
                (len(stack),),
                memory=True,
            )
        parameters["memory_gate"] = Parameter(
            (L, config.gate_inputs, 2, K),
            ("layers", "gate_inputs", "gates", "kv_heads"),
            jax.nn.initializers.zeros,
            "matrix",
            (1,),
            memory=True,
        )
    return parameters
