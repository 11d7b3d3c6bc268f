"""One optimizer step as one jitted function: accumulate → gradient → update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lrt_jax.model.decoder import Decoder
from lrt_jax.setup import mesh as meshes
from lrt_jax.training.schedules import Schedule
from lrt_jax.training.state import TrainState, state_shardings

Step = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]


def build(
    decoder: Decoder,
    schedule: Schedule,
    optimizer: optax.GradientTransformation,
    forward_names: list[str],
    accumulation: int = 1,
) -> Step:
    """The jitted ``(state, tokens_BxT, targets_BxT) -> (state, metrics)``; it takes over ``state``'s memory.

    Args:
      decoder: the model.
      schedule: computes the loss.
      optimizer: turns gradients into updates.
      forward_names: names of the schedule's forwards, for the metrics.
      accumulation: microbatches that the rows are split into, one after the other; the gradient is
        that of the whole batch.

    Returns:
      The step. Its metrics are scalars on the device: ``train/loss``, ``train/loss_<forward>`` (nats
      per token) and ``train/grad_norm``.
    """

    def gradient(params: Any, tokens_BxT: jax.Array, targets_BxT: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        def objective(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            outcome = schedule(decoder, params, tokens_BxT, targets_BxT)
            parts = {f"train/loss_{name}": outcome.forward_losses_F[i] for i, name in enumerate(forward_names)}
            return outcome.loss, {"train/loss": outcome.loss, **parts}

        grads, metrics = jax.grad(objective, has_aux=True)(params)
        return metrics, grads

    def accumulated(params: Any, tokens_BxT: jax.Array, targets_BxT: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        if accumulation == 1:
            return gradient(params, tokens_BxT, targets_BxT)
        split = [rows.reshape(accumulation, -1, rows.shape[1]) for rows in (tokens_BxT, targets_BxT)]
        total = jax.eval_shape(lambda: gradient(params, split[0][0], split[1][0]))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), total)
        add = lambda total, rows: (jax.tree.map(jnp.add, total, gradient(params, *rows)), None)  # noqa: E731
        total, _ = lax.scan(add, zeros, tuple(split))
        return jax.tree.map(lambda leaf: leaf / accumulation, total)

    def step(
        state: TrainState, tokens_BxT: jax.Array, targets_BxT: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        metrics, grads = accumulated(state.params, tokens_BxT, targets_BxT)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["train/grad_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, opt_state), metrics

    if decoder.mesh is None:
        return jax.jit(step, donate_argnums=0)
    # Left to itself, the compiler shards the state that comes out in another way than the one that went in.
    shardings = state_shardings(decoder, optimizer, decoder.mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, meshes.replicated(decoder.mesh)))
