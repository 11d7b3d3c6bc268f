"""The table of parameters: every array's shape, logical axes, initial values and optimizer group.

One table serves the decoder that creates the arrays, the optimizer that partitions them, the sharding
rules, the counts printed at start, and the conversion from the authors' names. Arrays that every layer
owns are stacked on a leading ``layers`` axis, so a checkpoint does not depend on ``model.scan_layers``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

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
        stack, stack_axes = ((L,), ("layers",)) if config.memory == "layerwise" else ((), ())
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


def by_layer(config: ModelConfig, params: dict[str, Any], dtype: jnp.dtype | None = None) -> dict[str, Any]:
    """The parameters as several forwards share them best; the decoder takes either form.

    Every stack becomes a tuple of one array per layer: a step of decoding reads each weight once, so cutting it out
    of a stack, or casting it, in every step would cost as much as the step; and forwards that share what was cut out
    add up its gradients layer by layer, where each would fill a stack. Queries, keys and values
    become one matrix, ``attention_in`` [D, K, H/K + 2, C], and so do a layer's gates: a subset forward, or a decoding
    step, has few rows, and its products are faster the wider they are.

    Args:
      config: the model.
      params: as the table has them, or in this form already.
      dtype: what to cast matrices to; None: leave them.
    """
    spec = table(config)
    if is_by_layer(params):
        return params
    ready: dict[str, Any] = {}
    for name, array in params.items():
        matrix = spec[name].group in ("matrix", "embedding", "head")
        array = array.astype(dtype) if matrix and dtype is not None else array
        if spec[name].axes[0] == "layers" and name != "value_embedding":  # which is looked up for all layers at once
            array = cut(array)
        ready[name] = array
    query, *key_value = (ready.pop(name) for name in ("query", "key", "value"))
    # As many rows as there are: it may be a shard.
    in_groups = (len(query[0]), config.kv_heads, -1, config.head_width)
    ready["attention_in"] = tuple(
        jnp.concatenate([array.reshape(in_groups) for array in arrays], axis=2)
        for arrays in zip(query, *key_value, strict=True)
    )
    if "memory_gate" in ready and len(config.value_embedding_layers) == config.layers:
        # All three gates of a layer as one product: for few rows, starting a product costs more than these do.
        pairs = zip(ready["memory_gate"], ready["value_gate"], strict=True)
        ready["memory_gate"] = tuple(jnp.concatenate([two, one[:, None]], axis=1) for two, one in pairs)
    return ready


def axes_by_layer(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of what :func:`by_layer` makes; where that is a tuple, of one layer's array."""
    axes: dict[str, tuple[str | None, ...]] = {
        name: spec.axes[1:] if spec.axes[0] == "layers" and name != "value_embedding" else spec.axes
        for name, spec in table(config).items()
    }
    for joined in ("query", "key", "value"):
        del axes[joined]
    return axes | {"attention_in": ("embed", "kv_heads", None, "head")}


def is_by_layer(params: dict[str, Any]) -> bool:
    """Whether these are parameters that :func:`by_layer` made."""
    return "attention_in" in params


def cut(stack: jax.Array) -> tuple[jax.Array, ...]:
    """One array per layer. ``lax.split``'s gradient is one concatenation; indexing's would be L padded sums."""
    return tuple(jnp.squeeze(part, axis=0) for part in lax.split(stack, [1] * len(stack), axis=0))


def unstack(stacks: dict[str, Any], layers: int) -> list[dict[str, jax.Array]]:
    """One tree per layer."""
    pieces = {name: stack if isinstance(stack, tuple) else cut(stack) for name, stack in stacks.items()}
    return [{name: parts[index] for name, parts in pieces.items()} for index in range(layers)]
