"""Parameters as layers read them: typed, of one layer or of all, and in the form that several forwards share best."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from lrt_jax.model.layers import linear
from lrt_jax.model.memory import KV, project
from lrt_jax.model.parameters import table
from lrt_jax.setup.config import ModelConfig

Of = TypeVar("Of", bound=tuple[Any, ...])


class Weights(NamedTuple):
    """A layer's own parameters, named as in ``parameters.table``; None: the model has none, or layers share them.

    Of all layers, every field is a stack with a leading layer axis, or a tuple of one array per layer.

    Attributes:
      attention_in: queries, keys and values as one matrix [D, K, H/K + 2, C], in place of the three.
      memory_gate: with the gate of value embeddings as a third kind, where :func:`by_layer` has joined them.
    """

    output: Any
    mlp_in: Any
    mlp_out: Any
    query: Any = None
    key: Any = None
    value: Any = None
    attention_in: Any = None
    alpha: Any = None
    beta: Any = None
    gamma: Any = None
    memory_key: Any = None
    memory_value: Any = None
    memory_gate: Any = None

    def queries_keys_values(self, h_BxPxD: jax.Array) -> tuple[jax.Array, KV]:
        """Wq h [B, P, H, C], and Wk h and Wv h [B, P, K, C]."""
        if self.attention_in is None:
            q, k, v = (linear(h_BxPxD, weight) for weight in (self.query, self.key, self.value))
            return q, KV(k, v)
        q_BxPxKxGxC, *keys_values = lax.split(
            linear(h_BxPxD, self.attention_in), (self.attention_in.shape[2] - 2, 1, 1), axis=3
        )
        k_BxPxKxC, v_BxPxKxC = (jnp.squeeze(array, axis=3) for array in keys_values)
        return q_BxPxKxGxC.reshape(*k_BxPxKxC.shape[:2], -1, k_BxPxKxC.shape[-1]), KV(k_BxPxKxC, v_BxPxKxC)

    def projected(self, memory_BxPxD: jax.Array | None) -> KV | None:
        """Uk m_{t-1} and Uv m_{t-1} of a layer with projections of its own; None: it has none, or memory is zero."""
        if self.memory_key is None or memory_BxPxD is None:
            return None
        return project(memory_BxPxD, self.memory_key, self.memory_value)


def of_all_layers(config: ModelConfig, params: dict[str, Any]) -> Weights:
    """What all layers own."""
    shared = ("memory_key", "memory_value") if config.shares_projections else ()
    return Weights(**{name: params[name] for name in Weights._fields if name in params and name not in shared})


def with_weights(params: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The parameters with these of all layers in the place of theirs."""
    return params | {name: stack for name, stack in weights._asdict().items() if stack is not None}


def of_some_layers(stacks: Of, begin: int, end: int) -> Of:
    """Those of some layers, of a tuple whose fields have one for each layer."""
    parts: list[Any] = [stack if stack is None else stack[begin:end] for stack in stacks]
    return type(stacks)(*parts)


def unstacked(stacks: Of, layers: int) -> list[Of]:
    """One tuple for each layer, of a tuple whose fields have one for each layer."""
    absent = (None,) * layers
    parts = [absent if stack is None else stack if isinstance(stack, tuple) else cut(stack) for stack in stacks]
    return [type(stacks)(*each) for each in zip(*parts, strict=True)]


def cut(stack: jax.Array) -> tuple[jax.Array, ...]:
    """One array per layer. ``lax.split``'s gradient is one concatenation; indexing's would be L padded sums."""
    return tuple(jnp.squeeze(part, axis=0) for part in lax.split(stack, [1] * len(stack), axis=0))


def by_layer(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters as several forwards share them best; the decoder takes either form.

    Every stack becomes a tuple of one array per layer: a step of decoding reads each weight once, so cutting it out
    of a stack in every step would cost as much as the step; and forwards that share what was cut out
    add up its gradients layer by layer, where each would fill a stack. Queries, keys and values
    become one matrix, ``attention_in`` [D, K, H/K + 2, C], and so do a layer's gates: a subset forward, or a decoding
    step, has few rows, and its products are faster the wider they are. In this form already, they stay as they are.
    """
    if is_by_layer(params):
        return params
    spec = table(config)
    ready: dict[str, Any] = {
        # Value embeddings are looked up for all layers at once.
        name: cut(array) if spec[name].axes[0] == "layers" and name != "value_embedding" else array
        for name, array in params.items()
    }
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


def cast(params: dict[str, Any], dtype: jnp.dtype) -> dict[str, Any]:
    """The parameters, in either form, with matrices in another dtype; α, β and γ stay as they are."""
    return by_name(lambda name, array: array if name in ("alpha", "beta", "gamma") else array.astype(dtype), params)


def by_name(function: Callable[[str, Any], Any], params: dict[str, Any]) -> dict[str, Any]:
    """``function`` of each array, and of the name of the parameter that it belongs to, in either form."""
    return {name: jax.tree.map(functools.partial(function, name), arrays) for name, arrays in params.items()}


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
