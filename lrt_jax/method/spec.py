"""The whole method at its plainest: docs/METHOD.md as a program, to be read before anything else, and run by tests.

Every training schedule, and sequential decoding, is one loop (:func:`run`): some positions are computed, with the
latest source states as their memory, and attend to the latest keys and values of all positions. ``tests/test_spec.py``
holds the code that trains (``model``, ``method.schedules``) to these numbers and to their gradients.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lrt_jax.method import partitions
from lrt_jax.setup.config import ModelConfig, ScheduleConfig


class Buffer(NamedTuple):
    """The shared buffer: the latest of every position; bool known_T says of which there is any."""

    k: list[jax.Array]  # of each layer [B, T, K, C], after RoPE and QK norm
    v: list[jax.Array]
    stale: list[Any]  # of each layer what KV refresh begins with: k before RoPE, v, g_mem [B, T, K, 1]
    source_BxTxD: jax.Array  # source states, 0 where none is known
    known_T: np.ndarray


def norm(x: jax.Array) -> jax.Array:
    """RMS norm without parameters."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + jnp.finfo(x.dtype).eps)


def rope(x_BxPxHxC: jax.Array, positions_P: np.ndarray, base: float) -> jax.Array:
    """Rotates channel i with channel i + C/2."""
    angles_Px1xc = positions_P[:, None, None] * base ** -np.linspace(0, 1, x_BxPxHxC.shape[-1] // 2, endpoint=False)
    (x1, x2), cos, sin = jnp.split(x_BxPxHxC, 2, axis=-1), np.cos(angles_Px1xc), np.sin(angles_Px1xc)
    return jnp.concatenate([x1 * cos + x2 * sin, x2 * cos - x1 * sin], axis=-1)


def gate(h_BxPxD: jax.Array, weight_cxK: jax.Array) -> jax.Array:
    """g = 2 sigmoid(G h[:c]): one number for each position and KV head, [B, P, K, 1]."""
    return 2 * jax.nn.sigmoid(h_BxPxD[..., : len(weight_cxK)] @ weight_cxK)[..., None]


def attention(q_BxPxHxC: jax.Array, k: jax.Array, v: jax.Array, visible_PxT: np.ndarray) -> jax.Array:
    """Softmax attention over the keys and values [B, T, K, C] that each query sees; K divides H."""
    k_BxTxHxC, v_BxTxHxC = (jnp.repeat(x, q_BxPxHxC.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores_BxHxPxT = jnp.einsum("bphc,bthc->bhpt", q_BxPxHxC, k_BxTxHxC) / np.sqrt(q_BxPxHxC.shape[-1])
    weights_BxHxPxT = jax.nn.softmax(jnp.where(visible_PxT, scores_BxHxPxT, -jnp.inf), axis=-1)
    return jnp.einsum("bhpt,bthc->bphc", weights_BxHxPxT, v_BxTxHxC)


class Model(NamedTuple):
    """A model, its parameters (by the names of ``model.parameters.table``) and int tokens [B, T]."""

    config: ModelConfig
    params: dict[str, jax.Array]
    tokens_BxT: jax.Array

    def weights(self, layer: int) -> dict[str, jax.Array]:
        """What a layer reads; neutral values for what the model goes without, so that no equation needs an "if"."""
        config, (D, K, C), c = self.config, self.params["key"].shape[1:], self.config.gate_inputs
        absent = {"memory_key": (D, K, C), "memory_value": (D, K, C), "memory_gate": (c, 2, K), "beta": (), "gamma": ()}
        absent |= {"value_embedding": (config.vocab_size, K, C), "value_gate": (c, K)}
        W = {"alpha": jnp.ones(())} | {name: jnp.zeros(shape) for name, shape in absent.items()}
        for name in self.params.keys() - {"embedding", "head"}:
            owners = config.value_embedding_layers if name.startswith("value_") else range(config.layers)
            shared = config.shares_projections and name in ("memory_key", "memory_value")
            if shared or layer in owners:
                W[name] = self.params[name] if shared else self.params[name][owners.index(layer)]
        return W

    def forward(self, x_BxTxD: jax.Array, m_BxTxD: jax.Array, positions_P: Any, buffer: Buffer, layers: range) -> Any:
        """Some layers for some of the positions, given the residual stream x and the recurrent memory m_{t-1} of all.

        Returns the residual stream behind the last layer [B, P, D], and the buffer with what these positions wrote.
        """
        (keys, values, stale), source_BxTxD = map(list, buffer[:3]), buffer.source_BxTxD
        every = np.arange(len(buffer.known_T))
        known_T, distance_PxT = buffer.known_T | np.isin(every, positions_P), positions_P[:, None] - every
        tokens_BxP, x = self.tokens_BxT[:, positions_P], x_BxTxD[:, positions_P]
        x0, windows = norm(self.params["embedding"][tokens_BxP]), self.config.windows
        for layer in layers:
            W, m = self.weights(layer), m_BxTxD[:, positions_P] * (layer in self.config.memory_range)
            x = W["alpha"] * x + W["beta"] * x0 + W["gamma"] * m
            h = norm(x)
            q, k, v = (jnp.tensordot(h, W[name], 1) for name in ("query", "key", "value"))
            g_loc, g_mem, g_ve = (gate(h, G) for G in (*jnp.moveaxis(W["memory_gate"], 1, 0), W["value_gate"]))
            k = g_loc * k + g_mem * jnp.tensordot(m, W["memory_key"], 1)
            v = g_loc * v + g_mem * jnp.tensordot(m, W["memory_value"], 1) + g_ve * W["value_embedding"][tokens_BxP]
            stale[layer] = [a.at[:, positions_P].set(b) for a, b in zip(stale[layer], (k, v, g_mem), strict=True)]
            q, k = (norm(rope(a, positions_P, self.config.rope_base)) for a in (q, k))
            keys[layer], values[layer] = (a[layer].at[:, positions_P].set(b) for a, b in ((keys, k), (values, v)))
            visible_PxT = known_T & (distance_PxT >= 0) & (distance_PxT <= windows[layer])
            x = x + jnp.tensordot(attention(q, keys[layer], values[layer], visible_PxT), W["output"], 2)
            x = x + jax.nn.relu(norm(x) @ W["mlp_in"]) ** 2 @ W["mlp_out"]
            if layer == self.config.source_index:
                source_BxTxD = source_BxTxD.at[:, positions_P].set(norm(x))
        return x, Buffer(keys, values, stale, source_BxTxD, known_T)

    def refresh(self, m_BxTxD: jax.Array, buffer: Buffer, unvisited_T: np.ndarray) -> None:
        """KV refresh: writes keys and values that were made with zero memory once more, under the latest memory."""
        for layer, (k, v, g_mem) in enumerate(buffer.stale):
            k = k + g_mem * jnp.tensordot(m_BxTxD, self.weights(layer)["memory_key"], 1)
            v = v + g_mem * jnp.tensordot(m_BxTxD, self.weights(layer)["memory_value"], 1)
            k = norm(rope(k, np.arange(len(unvisited_T)), self.config.rope_base))
            for latest, new in ((buffer.k, k), (buffer.v, v)):
                latest[layer] = jnp.where(unvisited_T[:, None, None], new, latest[layer])


def forwards_of(schedule: ScheduleConfig, length: int) -> list[tuple[np.ndarray, bool]]:
    """A step's forwards in turn: which positions each computes, and whether it has a loss and a gradient."""
    every = np.arange(length)
    full = [(every, False)] * schedule.settle or [(every, True)]
    if schedule.name == "interleaved":
        subsets_SxP = partitions.PARTITIONS[schedule.partition](length, schedule.subsets).positions_SxP
        return full + [(positions_P, True) for positions_P in subsets_SxP] * schedule.sweeps
    if schedule.name == "multi_refinement":
        return full + [(every, True)] * schedule.refinements
    parts = {"plain": 1, "chunked": schedule.chunks, "sequential": length}[schedule.name]
    return [(positions_P, True) for positions_P in np.split(every, parts)]


def run(config: ModelConfig, schedule: ScheduleConfig, params: Any, tokens_BxT: Any, targets_BxT: Any) -> Any:
    """A step of any schedule but staged ones, without noise. As "sequential" it is what decoding computes.

    Returns the loss in nats, each position's loss in the last forward that computed it [B, T], and source states.
    """
    model, every, rows = Model(config, params, tokens_BxT), np.arange(tokens_BxT.shape[1]), tokens_BxT.shape
    x_BxTxD = norm(params["embedding"][tokens_BxT])
    kv, layers = jnp.zeros((*rows, config.kv_heads, config.head_width)), config.layers
    buffer = Buffer([kv] * layers, [kv] * layers, [(kv, kv, kv[..., :1])] * layers, 0 * x_BxTxD, every < 0)
    # Layers below the memory compute the same in every forward: once.
    x_BxTxD, _ = model.forward(x_BxTxD, 0 * x_BxTxD, every, buffer, range(config.memory_range.start))
    losses, merged_BxT, visited_T = [], jnp.zeros(rows), every < 0
    for number, (positions_P, learns) in enumerate(forwards_of(schedule, len(every))):
        m_BxTxD = jnp.pad(buffer.source_BxTxD[:, :-1], ((0, 0), (1, 0), (0, 0)))  # m_{t-1}, and m_{-1} = 0
        m_BxTxD = jax.lax.stop_gradient(m_BxTxD) if schedule.detach else m_BxTxD
        if schedule.kv_refresh and number:
            model.refresh(m_BxTxD, buffer, ~visited_T)
            visited_T = visited_T | np.isin(every, positions_P)
        x, buffer = model.forward(x_BxTxD, m_BxTxD, positions_P, buffer, range(config.memory_range.start, layers))
        buffer = buffer if learns else jax.lax.stop_gradient(buffer)
        if learns:
            nats_BxPxV = -jax.nn.log_softmax(config.softcap * jnp.tanh(norm(x) @ params["head"] / config.softcap))
            losses_BxP = jnp.take_along_axis(nats_BxPxV, targets_BxT[:, positions_P, None], axis=-1)[..., 0]
            merged_BxT = merged_BxT.at[:, positions_P].set(losses_BxP)
            losses.append(losses_BxP.mean())
    weights = schedule.loss_weights or [1.0 if schedule.settle else schedule.init_weight, *[1.0] * len(losses[1:])]
    return jnp.average(jnp.array(losses), weights=jnp.array(weights)), merged_BxT, buffer.source_BxTxD
