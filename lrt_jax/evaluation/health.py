"""The health of the recurrence: is memory read in parallel what decoding will read, and does the model use it?

Training sees memory that few forwards have made; decoding goes on for ever. A run is healthy if one more full forward,
fed the source states of the one before, changes less and less, and if true recurrence scores no worse.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from lrt_jax.method import forwards
from lrt_jax.model.memory import Refreshable, shift_right
from lrt_jax.model.model import Model
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config

# How many tokens too old a memory is read to see what its age costs.
OLD = 8


def program(config: Config, mesh: Mesh) -> Callable[..., dict[str, jax.Array]] | None:
    """The jitted function ``(model, tokens_BxT, targets_BxT, counted_BxT) -> sums`` that :func:`metrics` reads.

    ``config.eval.passes`` full forwards follow the initialization forward, each fed the source states of the one
    before; two more read the last ones' states in another order. None where a model has no memory, or no pass is asked
    for.
    """
    passes = config.eval.passes
    if not config.model.recurrent or not passes:
        return None

    def sums(
        model: Model, tokens_BxT: jax.Array, targets_BxT: jax.Array, counted_BxT: jax.Array
    ) -> dict[str, jax.Array]:
        gamma_L = model.params["gamma"] if "gamma" in model.params else jnp.zeros((0,))
        model = model.by_layer()
        embedded = forwards.begin(model, tokens_BxT)
        wide = jnp.promote_types(embedded.x0_BxPxD.dtype, jnp.float32)

        def read(memory_BxTxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            """A full forward's source states, its losses' sum, and its memory gates' sums, layer by layer."""
            out, _ = forwards.full(model, embedded, memory_BxTxD, keep_refreshable=True)
            losses_BxT = forwards.token_losses(model, out.hidden_BxPxD, targets_BxT)
            return out.source_BxPxD, jnp.sum(losses_BxT * counted_BxT), _gates(out.refreshable, counted_BxT)

        def again(states_BxTxD: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            after_BxTxD, loss, gates_L = read(shift_right(states_BxTxD))
            change_BxTxD = (after_BxTxD.astype(wide) - states_BxTxD.astype(wide)) * counted_BxT[..., None]
            return after_BxTxD, (loss, jnp.sum(change_BxTxD**2), gates_L)

        first_BxTxD = forwards.initialization(model, embedded)[0].source_BxPxD
        last_BxTxD, (losses_K, changes_K, gates_KxL) = lax.scan(again, first_BxTxD, length=passes)
        # The row before, of those that count: others fill up the last batch.
        rows = jnp.maximum(jnp.sum(jnp.any(counted_BxT, axis=1)), 1)
        shuffled_BxTxD = jnp.take(last_BxTxD, (jnp.arange(len(last_BxTxD)) - 1) % rows, axis=0)
        others_NxBxTxD = jnp.stack([shuffled_BxTxD, _older(last_BxTxD, OLD)])
        losses_N = lax.map(lambda states_BxTxD: read(shift_right(states_BxTxD))[1], others_NxBxTxD)
        return {
            "after": losses_K,
            "changes": changes_K,
            "others": losses_N,
            "gate": gates_KxL[-1],
            "gamma": gamma_L * jnp.sum(counted_BxT),
            "positions": jnp.sum(counted_BxT),
        }

    return jax.jit(sums, out_shardings=meshes.replicated(mesh))


def _older(states_BxTxD: jax.Array, tokens: int) -> jax.Array:
    """Each position's state of so many tokens before; zero before the first."""
    length = states_BxTxD.shape[1]
    return jnp.pad(states_BxTxD, ((0, 0), (tokens, 0), (0, 0)))[:, :length]


def _gates(refreshable: Any, counted_BxT: jax.Array) -> jax.Array:
    """The sums of g_mem over positions that count, mean over heads: [L], or [0] without memory projections."""
    layers = (refreshable,) if isinstance(refreshable, Refreshable) else refreshable or ()
    if not all(isinstance(layer, Refreshable) for layer in layers) or not layers:
        return jnp.zeros((0,))
    gates_LxBxTxKx1 = [layer.gate.reshape(-1, *layer.gate.shape[-4:]) for layer in layers]
    gates_LxBxT = jnp.mean(jnp.concatenate(gates_LxBxTxKx1), axis=(-2, -1))
    return jnp.sum(gates_LxBxT * counted_BxT[None], axis=(1, 2))


def metrics(sums: dict[str, np.ndarray], reading: range, bits_per_byte: Callable[[float], float]) -> dict[str, float]:
    """The metrics of docs/OPERATIONS.md that say how memory settles.

    Args:
      sums: of the function that :func:`program` made, added over batches.
      reading: the layers that read memory (``ModelConfig.memory_range``).
      bits_per_byte: of a sum of losses in nats.

    Returns:
      ``val/bpb_after_K`` of the K-th full forward; ``val/contraction``, by what factor the last one changed source
      states less than the one before; ``val/bpb_memory/shuffled`` with another row's memory and
      ``val/bpb_memory/old`` with that of OLD tokens before; by layer ``memory/gate/l``, the mean of g_mem, and
      ``memory/gamma/l``.
    """
    found = {f"val/bpb_after_{k}": bits_per_byte(loss) for k, loss in enumerate(sums["after"], 1)}
    if len(sums["changes"]) > 1:
        *_, before, last = sums["changes"]
        found["val/contraction"] = math.sqrt(last / before) if before > 0 else 0.0
    found["val/bpb_memory/shuffled"], found["val/bpb_memory/old"] = map(bits_per_byte, sums["others"])
    # Gates are of the layers from the first on that reads memory, γ of all.
    for name, first in (("gate", reading.start), ("gamma", 0)):
        for layer in reading if len(sums[name]) else ():
            found[f"memory/{name}/{layer + 1}"] = sums[name][layer - first] / sums["positions"]
    return {name: float(value) for name, value in found.items()}


def warning(scores: dict[str, float], most: float) -> str | None:
    """One line, where true recurrence scores worse than in parallel by more than ``most``, a share of the latter."""
    gap = scores["val/bpb_sequential"] / scores["val/bpb"] - 1
    if not gap > most:
        return None
    return (
        f"warning: decoding is worse than training shows: val/bpb_sequential is {gap:.1%} above val/bpb (merged); "
        f"config.eval.gap allows {most:.1%}: memory does not settle in as few forwards as training shows it"
    )


def lines(scores: dict[str, float]) -> Iterator[str]:
    """The part of the closing table that is about memory; nothing where it was not measured."""
    after = list(_numbered(scores, "val/bpb_after_").values())
    if not after:
        return
    yield "\nmemory: bits per byte where all positions read it in parallel, and what they read"
    passes = [scores["val/bpb_init"], *after]
    yield "  after 0, 1, 2, … full forwards                " + " ".join(f"{bpb:8.4f}" for bpb in passes)
    yield f"  of another row                                {scores['val/bpb_memory/shuffled']:8.4f}"
    yield f"  of {OLD} tokens before                            {scores['val/bpb_memory/old']:8.4f}"
    if "val/contraction" in scores:
        yield f"  a full forward's change of source states, to the one before's{scores['val/contraction']:11.3f}"
    for name, field in (("mean gate of memory projections", "memory/gate/"), ("γ", "memory/gamma/")):
        values = _numbered(scores, field)
        if values:
            which = f"{name}, layers {min(values)} to {max(values)}"
            yield f"  {which:<46}" + " ".join(f"{value:8.3f}" for value in values.values())


def _numbered(scores: dict[str, float], prefix: str) -> dict[int, float]:
    """The scores of 1, 2, … behind ``prefix``, by these numbers."""
    found = {int(name.removeprefix(prefix)): value for name, value in scores.items() if name.startswith(prefix)}
    return dict(sorted(found.items()))
