"""One optimizer step as one jitted function: accumulate → gradient → update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lrt_jax.method import schedules
from lrt_jax.model.backend import compute_dtype
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import ScheduleConfig
from lrt_jax.training import guard, replicas
from lrt_jax.training.state import TrainState, state_shardings

Step = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
# (what is remembered, loss, gradient norm) → (whether the step is good, what is remembered)
Judge = Callable[[guard.Running, jax.Array, jax.Array], tuple[jax.Array, guard.Running]]


def build(
    decoder: Decoder,
    schedule: ScheduleConfig,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    judge: Judge | None = None,
    *,
    gather_once: bool = False,
) -> Step:
    """The jitted ``(state, tokens_BxT, targets_BxT) -> (state, metrics)``; it takes over ``state``'s memory.

    Args:
      decoder: the model.
      schedule: computes the loss; not a staged one.
      optimizer: turns gradients into updates.
      accumulation: microbatches that the rows are split into, one after the other; the gradient is
        that of the whole batch.
      judge: tells good steps from bad ones, whose updates are then held back; None: every step is good.
      gather_once: as in :func:`gradient_of`.

    Returns:
      The step. Its metrics are scalars on the device: ``train/loss``, ``train/loss_<forward>`` (nats
      per token) and ``train/grad_norm``; with a judge also ``train/bad_steps`` so far and ``train/bad_in_a_row``.
    """
    gradient = gradient_of(decoder, schedule, accumulation, gather_once=gather_once)

    def step(
        state: TrainState, tokens_BxT: jax.Array, targets_BxT: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        metrics, grads = gradient(state.params, tokens_BxT, targets_BxT)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["train/grad_norm"] = optax.tree.norm(grads)
        after = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
        if judge is None or state.guard is None:
            return after, metrics
        ok, running = judge(state.guard, metrics["train/loss"], metrics["train/grad_norm"])
        metrics |= {"train/bad_steps": running.bad, "train/bad_in_a_row": running.in_a_row}
        params, opt_state = guard.choose(ok, (params, opt_state), (state.params, state.opt_state))
        return after.replace(params=params, opt_state=opt_state, guard=running), metrics

    if decoder.mesh is None:
        return jax.jit(step, donate_argnums=0)
    # Left to itself, the compiler shards the state that comes out in another way than the one that went in.
    shardings = state_shardings(decoder, optimizer, decoder.mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, meshes.replicated(decoder.mesh)))


def gradient_of(
    decoder: Decoder, schedule: ScheduleConfig, accumulation: int = 1, *, gather_once: bool = False
) -> guard.Gradient:
    """The function ``(params, tokens_BxT, targets_BxT) -> (metrics, gradient)`` of :func:`build`, not jitted.

    With ``gather_once``, where ``setup.mesh.gathers_once``, weights are gathered, and gradients summed over devices,
    once, and not by every forward of every microbatch (``replicas``).
    """
    if gather_once:
        return replicas.gradient_of(decoder, lambda alone: _gradient_of(alone, schedule, accumulation))
    return _gradient_of(decoder, schedule, accumulation)


def _gradient_of(decoder: Decoder, config: ScheduleConfig, accumulation: int) -> guard.Gradient:
    schedule = schedules.build(config, decoder.config.sequence_length)
    names = [f"train/loss_{name}" for name in schedules.forward_names(config)]

    def gradient(params: Any, tokens_BxT: jax.Array, targets_BxT: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        def objective(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            outcome = schedule(Model(decoder, params), tokens_BxT, targets_BxT)
            return outcome.loss, {"train/loss": outcome.loss, **dict(zip(names, outcome.forward_losses_F, strict=True))}

        grads, metrics = jax.grad(objective, has_aux=True)(params)
        return metrics, grads

    def accumulated(params: Any, tokens_BxT: jax.Array, targets_BxT: jax.Array) -> tuple[dict[str, jax.Array], Any]:
        if accumulation == 1:
            return gradient(params, tokens_BxT, targets_BxT)
        split = [rows.reshape(accumulation, -1, rows.shape[1]) for rows in (tokens_BxT, targets_BxT)]
        # Asked of the gradient itself, its shapes would cost a trace of the whole schedule.
        zero = jnp.zeros((), jnp.promote_types(jnp.float32, compute_dtype(decoder.config)))
        zeros = dict.fromkeys(["train/loss", *names], zero), jax.tree.map(jnp.zeros_like, params)
        add = lambda total, rows: (jax.tree.map(jnp.add, total, gradient(params, *rows)), None)  # noqa: E731
        total, _ = lax.scan(add, zeros, tuple(split))
        return jax.tree.map(lambda leaf: leaf / accumulation, total)

    return accumulated
