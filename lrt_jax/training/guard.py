"""Bad steps: a loss or gradient norm that is not finite, or far above its running mean, is noticed on the device.

The update of a bad step is held back there, so that nothing it poisons is ever in the state; the host learns of it
with the step's other metrics, one step later, and never waits for it. What follows is ``config.train.on_bad_step``:

* ``skip``: the run goes on with the next batch; too many bad steps in a row end it.
* ``stop``: all later updates are held back too, so that the parameters stay those that the bad step met, and
  the run ends with :func:`report`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from lrt_jax.setup.config import TrainConfig

# The running means: their decay per good step, and how many good steps there must be before a spike can be told.
DECAY, WARMUP = 0.98, 50


class Running(struct.PyTreeNode):
    """What the judgement depends on; a part of the training state, so that a resumed run judges alike.

    Attributes:
      loss: running mean, not yet divided by 1 - DECAY^good.
      grad_norm: the same.
      good: int32, good steps so far.
      bad: int32, bad steps so far.
      in_a_row: int32, bad steps since the last good one.
    """

    loss: jax.Array
    grad_norm: jax.Array
    good: jax.Array
    bad: jax.Array
    in_a_row: jax.Array


def fresh() -> Running:
    """Before the first step."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return Running(zero, zero, none, none, none)


def judge(running: Running, loss: jax.Array, grad_norm: jax.Array, config: TrainConfig) -> tuple[jax.Array, Running]:
    """Whether a step is good, by ``spike_factor`` and ``on_bad_step``: bool scalar, and what is remembered of it.

    The loss and the global norm of its gradient, before clipping, are scalars.
    """
    loss, grad_norm = loss.astype(jnp.float32), grad_norm.astype(jnp.float32)
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.spike_factor:
        share = 1.0 - jnp.power(DECAY, running.good.astype(jnp.float32))
        limits = config.spike_factor * running.loss, config.spike_factor * running.grad_norm
        spike = (loss * share > limits[0]) | (grad_norm * share > limits[1])
        ok &= ~(spike & (running.good >= WARMUP))
    if config.on_bad_step == "stop":
        ok &= running.in_a_row == 0
    mean = lambda before, now: jnp.where(ok, DECAY * before + (1.0 - DECAY) * now, before)  # noqa: E731
    bad = (~ok).astype(jnp.int32)
    after = Running(
        loss=mean(running.loss, loss),
        grad_norm=mean(running.grad_norm, grad_norm),
        good=running.good + 1 - bad,
        bad=running.bad + bad,
        in_a_row=(running.in_a_row + bad) * bad,
    )
    return ok, after


def choose(ok: jax.Array, new: Any, old: Any) -> Any:
    """``new`` where the step is good, else ``old``: trees of one structure."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


@jax.jit
def _finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack(leaves)


def not_finite(tree: Any) -> list[str]:
    """The names of arrays that hold NaN or infinity; waits for the device, so it is asked before saves only."""
    paths = [path for path, leaf in jax.tree.leaves_with_path(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return [jax.tree_util.keystr(path) for path, fine in zip(paths, np.asarray(_finite(tree)), strict=True) if not fine]


Gradient = Callable[[Any, jax.Array, jax.Array], tuple[dict[str, jax.Array], Any]]


def report(
    step: int, values: dict[str, float], statistics: dict[str, Any], documents: Sequence[str], repeats: bool
) -> Iterator[str]:
    """What is known of a bad step, line by line.

    Args:
      step: its number.
      values: its metrics.
      statistics: of the parameters it met and of its gradient, computed again: :func:`statistics` on the host.
      documents: what its batch is made of.
      repeats: the parameters are to the bit those that the step met, so a second computation must agree.
    """
    yield f"step {step:,} is bad: " + ", ".join(f"{name} {value:.6g}" for name, value in values.items())
    repeated = {name: float(value) for name, value in statistics["metrics"].items()}
    agrees = all(np.isclose(repeated[name], values[name], rtol=1e-3, equal_nan=True) for name in repeated)
    if agrees:
        yield "computed again: the same"
    else:
        differs = ", ".join(f"{name} {value:.6g}" for name, value in repeated.items())
        yield f"computed again: {differs}" + ("; the device or its memory may be at fault" if repeats else "")
    yield f"{'parameter, layer by layer':<28}{'largest':>12}{'grad. norm':>12}{'not finite':>12}  (of the gradient)"
    for name, (largest, norm, bad) in statistics["parameters"].items():
        for layer, row in enumerate(zip(np.ravel(largest), np.ravel(norm), np.ravel(bad), strict=True)):
            label = f"{name}[{layer}]" if np.ndim(largest) else name
            yield f"{label:<28}{row[0]:>12.4g}{row[1]:>12.4g}{int(row[2]):>12}"
    yield "the documents of its batch, on this process:"
    yield from documents


def statistics(gradient: Gradient, stacked: set[str]) -> Callable[[Any, jax.Array, jax.Array], dict[str, Any]]:
    """A jitted function of (params, tokens_BxT, targets_BxT): what :func:`report` shows.

    The leading axis of parameters that are ``stacked`` is the layer.
    """

    def of(name: str, param: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        axes = tuple(range(1 if name in stacked else 0, param.ndim))
        norm = jnp.sqrt(jnp.sum(jnp.square(grad.astype(jnp.float32)), axis=axes))
        return jnp.max(jnp.abs(param), axis=axes), norm, jnp.sum(~jnp.isfinite(grad), axis=axes)

    def compute(params: Any, tokens_BxT: jax.Array, targets_BxT: jax.Array) -> dict[str, Any]:
        metrics, grads = gradient(params, tokens_BxT, targets_BxT)
        return {
            "metrics": metrics,
            "parameters": {name: of(name, params[name], grads[name]) for name in sorted(params)},
        }

    return jax.jit(compute)
